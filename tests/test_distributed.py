"""Two processes on one machine (gloo): batch norms over both, and gradients as on the joint batch.

Each test spawns its processes once and lets them run every case, since importing torch is most of
the time. The processes meet through a file, so no network port is taken.
"""

import copy
import traceback
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import wild
from cases import randn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fasternet_kernels as fk

sync = nn.SyncBatchNorm.convert_sync_batchnorm


def small(**kwargs):
    settings = {"embed_dim": 16, "depths": (1, 2), "num_classes": 7, "feature_dim": 24}
    model = fk.models.FasterNet(act="gelu", drop_path_rate=0.0, **(settings | kwargs))
    return wild.randomise(model).double().train()


def batch(seed, size=6):
    x = randn(size, 3, 16, 24, seed=seed, dtype=torch.float64)
    return x, torch.arange(size) % 7


def near(a, b, what):
    """Rounding in float64 is far below, a sample counted twice or not at all far above."""
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m: f"{what}: {m}")


def run_in(processes, function, path):
    """Calls function(rank) in that many processes; the first error of any fails the test."""
    context = mp.get_context("spawn")
    errors = context.Queue()
    arguments = (function, processes, str(path / "store"), errors)
    children = [context.Process(target=_child, args=(r, *arguments)) for r in range(processes)]
    for child in children:
        child.start()
    try:
        for _ in children:
            error = errors.get(timeout=120)
            assert error is None, error
        for child in children:
            child.join(30)
    finally:
        for child in children:  # after an error the others wait for ever
            child.kill()


def _child(rank, function, processes, store, errors):
    error = None
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=processes
        )
        function(rank)
    except BaseException:
        error = f"process {rank}: {traceback.format_exc()}"
    errors.put(error)  # before the goodbye, which waits for the other process
    if error is None:
        dist.destroy_process_group()


# ---- Batch norms over both processes -------------------------------------------------------------


def sync_then_accelerate(model, lean, wrap):
    return wrap(fk.accelerate(sync(model), lean=lean))


def accelerate_then_sync(model, lean, wrap):
    return sync(wrap(fk.accelerate(model, lean=lean)))


def unwrapped(model):
    return model


def accelerate_and_sync_then(model, lean, wrap):
    """The order of most training scripts."""
    return wrap(sync(fk.accelerate(model, lean=lean)))


def in_ddp(model):
    """DistributedDataParallel refuses a SyncBatchNorm on the CPU, where PyTorch's own does not run:
    that check, which does nothing else, is left out, and all the rest is as on GPUs."""
    check = "_passing_sync_batchnorm_handle"
    if not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        return DistributedDataParallel(model)
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        DistributedDataParallel(model)
    with mock.patch.object(DistributedDataParallel, check, return_value=None):
        return DistributedDataParallel(model)


def state_after_steps(model, samples, times, seeds=(1, 2)):
    """Two steps on the samples of this process; the loss is a mean over the joint batch. Returns
    the last gradient of x."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in seeds:
        x, t = batch(seed)
        optimizer.zero_grad()
        x = x[samples].clone().requires_grad_()
        loss = F.cross_entropy(model(x), t[samples], reduction="sum") / len(t)
        (loss * times).backward()  # DDP takes the average over the processes, we want the sum
        if not isinstance(model, DistributedDataParallel):
            for p in model.parameters():
                if dist.is_initialized() and dist.get_world_size() > 1:
                    dist.all_reduce(p.grad)
        optimizer.step()
    return x.grad / times


def compare_with_one_process(rank):
    plain = small(layer_scale_init_value=0.5)
    alone = copy.deepcopy(plain)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05)
    for seed in (1, 2):
        x, t = batch(seed)
        x.requires_grad_()
        optimizer.zero_grad()
        F.cross_entropy(alone(x), t).backward()
        optimizer.step()
    splits = {
        "equal": ([0, 1, 2], [3, 4, 5]),
        "unequal": ([0], [1, 2, 3, 4, 5]),
        "one empty": ([0, 1, 2, 3, 4, 5], []),
        "the other empty": ([], [0, 1, 2, 3, 4, 5]),
    }
    cases = [
        (sync_then_accelerate, False, "equal", unwrapped),
        (sync_then_accelerate, True, "equal", in_ddp),
        (accelerate_then_sync, False, "unequal", in_ddp),
        (accelerate_then_sync, True, "unequal", unwrapped),
        (accelerate_and_sync_then, False, "equal", in_ddp),
        (sync_then_accelerate, False, "one empty", in_ddp),
        (sync_then_accelerate, True, "the other empty", unwrapped),
    ]
    for convert, lean, name, wrap in cases:
        what = f"{convert.__name__}, lean {lean}, {name}, {wrap.__name__}"
        model = convert(copy.deepcopy(plain), lean, wrap)
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == 5
        assert {row.kind for row in fk.report(inner).swapped} >= {"block", "patch_conv"}
        dx = state_after_steps(model, splits[name][rank], 1 if inner is model else 2)
        near(dx, x.grad[splits[name][rank]], f"{what}: gradient of x")
        for (key, a), b in zip(
            inner.state_dict().items(), alone.state_dict().values(), strict=True
        ):
            near(a, b, f"{what}: {key}")


def own_modules(rank):
    """The package's modules, whose norms are converted."""
    x = randn(5, 24, 6, 7, seed=1, dtype=torch.float64)
    mine = [slice(0, 2), slice(2, 5)][rank]
    for make in (
        lambda lean: fk.FasterNetBlock(24, layer_scale_init_value=0.3, lean=lean),
        lambda lean: fk.PConvPW(24, 40, act="silu", lean=lean),
    ):
        for lean in (False, True):
            alone = wild.randomise(make(lean)).double()
            both = sync(copy.deepcopy(alone))
            expected = wild.step(alone, x)
            leaf = x[mine].clone().requires_grad_()
            y = both(leaf)
            near(y, expected["output 0"][mine], "output")
            signs = torch.randint(-8, 9, expected["output 0"].shape, generator=wild.generator(0))
            y.backward(signs[mine].double() / 8)
            near(leaf.grad, expected["gradient of x"][mine], "gradient of x")
            for name, p in both.named_parameters():
                dist.all_reduce(p.grad)
                near(p.grad, expected[f"gradient of {name}"], name)


def compiled(rank):
    """The collectives are part of one graph."""
    torch.manual_seed(0)
    eager = sync(fk.FasterNetBlock(16)).double()
    model = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True)
    x = randn(2 + rank, 16, 5, 5, seed=rank, dtype=torch.float64)
    for a, b in zip(wild.step(model, x).values(), wild.step(eager, x).values(), strict=True):
        near(a, b, "compiled")


def alone_in_a_group(rank):
    """Statistics stay in their group, and in eval mode nobody waits for another."""
    groups = [dist.new_group([r]) for r in range(2)]
    plain = small()
    model = fk.accelerate(sync(copy.deepcopy(plain), groups[rank]), lean=True)
    assert {row.kind for row in fk.report(model).swapped} >= {"block", "patch_conv"}
    x, t = batch(rank)
    if rank == 0:
        for m in (model, plain):
            F.cross_entropy(m(x), t).backward()
        for (name, a), b in zip(model.named_parameters(), plain.parameters()):
            near(a.grad, b.grad, name)
        model = fk.accelerate(sync(copy.deepcopy(plain))).eval()
        near(model(x), plain.eval()(x), "in eval mode")
        with torch.no_grad():
            near(model(x), plain(x), "in eval mode, without gradients")


def on_two_processes(rank):
    compare_with_one_process(rank)
    own_modules(rank)
    compiled(rank)
    alone_in_a_group(rank)


def test_two_processes(tmp_path):
    """One batch norm over two processes is that of the joint batch, and nothing else changes."""
    run_in(2, on_two_processes, tmp_path)
