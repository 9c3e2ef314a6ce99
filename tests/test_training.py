"""Training: what is kept for backward, lean mode, what trainers do around a step, and its errors.

`plain` is a network that was never accelerated, `fast` an accelerated one with the same weights.
"""

import copy
import os
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import wild
from cases import Case, assert_right, double, image, randn, weights
from torch import nn
from torch.utils.checkpoint import checkpoint

import fasternet_kernels as fk
from bench import zoo
from fasternet_kernels import training

timm = zoo.import_timm()

# Relative, in float64: what a step or a run computed differently would show at all is far above,
# rounding far below. The bound of the long run's losses at the end of this file.
SAME = 1e-9


def near(a, b):
    torch.testing.assert_close(a, b, rtol=SAME, atol=SAME)


def small(act="gelu", **kwargs):
    settings = {"embed_dim": 16, "depths": (1, 2), "num_classes": 7, "feature_dim": 24}
    return fk.models.FasterNet(act=act, **(settings | {"drop_path_rate": 0.0} | kwargs))


def twins(make=small, dtype=torch.float64, lean=False):
    """(plain, fast) in training mode with the same weights."""
    plain = wild.randomise(make()).to(dtype).train()
    return plain, fk.accelerate(copy.deepcopy(plain), lean=lean)


def timm_fasternet():
    network = {"embed_dim": 16, "depths": (1, 2, 2), "num_classes": 7, "feature_dim": 24}
    return timm.models.fasternet.FasterNet(act_layer=nn.GELU, drop_path_rate=0.0, **network)


def batch(seed=0, size=4, dtype=torch.float64):
    x = randn(size, 3, 32, 40, seed=seed, dtype=dtype)
    return x, torch.arange(size) % 7


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def assert_same_state(fast, plain):
    """Parameters, their gradients, and buffers."""
    assert list(fast.state_dict()) == list(plain.state_dict())
    for a, b in zip(fast.state_dict().values(), plain.state_dict().values()):
        near(a, b)
    for a, b in zip(fast.parameters(), plain.parameters()):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            near(a.grad, b.grad)


# ---- What is kept --------------------------------------------------------------------------------


def kept_bytes(model, x, call=wild.call):
    """Bytes of the storages that one forward saves for backward, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call(model, x)
    assert y.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "make, share, lean_share",
    [
        pytest.param(fk.models.fasternet_t0, 0.48, 0.22, id="t0"),
        pytest.param(fk.models.fasternet_s, 0.58, 0.25, id="s", marks=pytest.mark.slow),
    ],
)
def test_kept_for_backward(make, share, lean_share):
    plain = make(drop_path_rate=0.0).train()
    x = torch.ones(1, 3, 128, 128)
    eager = kept_bytes(plain, x)
    assert kept_bytes(fk.accelerate(plain), x) <= share * eager
    assert kept_bytes(fk.accelerate(plain, lean=True), x) <= lean_share * eager


@pytest.fixture(params=["one op", "halves"])
def way(request, monkeypatch):
    """A layer as one op, or in the two halves between which processes share statistics and which
    torch.compile and GPUs take."""
    if request.param == "halves":
        monkeypatch.setattr(training, "_WHOLE", ())
    return request.param


@pytest.mark.parametrize("lean", [False, True])
def test_nothing_is_kept_outside_save_for_backward(lean, way):
    """Where hooks on saved tensors, checkpointing and the free after backward would miss it."""
    _, fast = twins(partial(small, drop_path_rate=0.3, layer_scale_init_value=0.5), lean=lean)
    x, _ = batch()
    calls = [
        fast(x),
        fk.PConvPW(16, 8, lean=lean).double()(x.repeat(1, 6, 1, 1)[:, :16]),
        fk.fasternet_block(*double(list(weights_of_a_block().values())[:4])),
    ]
    nodes = wild.graph(*calls)
    for node in nodes:
        for name, value in getattr(node, "__dict__", {}).items():
            values = value if isinstance(value, (tuple, list)) else [value]
            assert not any(isinstance(v, torch.Tensor) for v in values), (node, name)
    # Of the network, a node for each of two stages or for each of five layers.
    layer, n = {"one op": ("_LayersBackward", 3), "halves": ("_FromStatisticsBackward", 6)}[way]
    assert sum(type(node).__name__ == layer for node in nodes) == n


# ---- A network as a whole ------------------------------------------------------------------------


@pytest.mark.parametrize("lean", [False, True])
def test_a_stage_is_a_node(lean):
    """Of five layers: stem and block, merging layer and two blocks. Whatever asks for the layers
    one by one gets them: five nodes."""
    plain, fast = twins(partial(small, drop_path_rate=0.3, layer_scale_init_value=0.5), lean=lean)
    x, _ = batch()
    wild.assert_same_step(fast, plain, x)
    assert wild.layer_nodes(fast(x)) == 2
    handle = fast.stages[1].register_forward_hook(lambda *_: None)
    assert wild.layer_nodes(fast(x)) == 5
    handle.remove()
    assert wild.layer_nodes(fast(x)) == 2
    with torch.no_grad():
        fast(x)
        assert fast.eval()(x).grad_fn is None
    assert wild.layer_nodes(fast(x)) == 0  # running statistics: another op
    fast.train().patch_embed.norm.eval()
    assert wild.layer_nodes(fast(x)) == 4
    fast.train()
    for norm in (m for m in fast.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None
    assert wild.layer_nodes(fast(x)) == 2


def test_feature_maps_are_nodes():
    plain, fast = twins(partial(small, features_only=True))
    x, _ = batch()
    wild.assert_same_step(fast, plain, x)
    assert [wild.layer_nodes(y) for y in fast(x)] == [1, 2]


class Tenth(torch.autograd.Function):
    """The identity, with a tenth of its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy / 10


class Own(fk.models.FasterNet):
    """A network whose forward does something that is seen in training alone, or not in values."""

    does = "nothing"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("steps", torch.tensor(0))
        self.calls, self.features = 0, None

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.does != "no_grad"):
            x = self.patch_embed(x)
        if self.does == "detach":
            x = x.detach()
        if self.does == "scale gradients":
            x = Tenth.apply(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.does == "autocast"):
            if self.does == "checkpoint" and self.training:
                x = checkpoint(self.stages, x, use_reentrant=False)
            else:
                x = self.stages(x)
        if self.training:
            self.steps += self.does == "count in a buffer"
            self.calls += self.does == "count in an attribute"
            if self.does == "keep features":
                self.features = x
            if self.does == "draw" and torch.rand(()) < 0.01:
                x = 2 * x
        return self.forward_head(x)

    def train(self, mode=True):
        return super().train(mode and self.does != "stay in eval mode")


@pytest.mark.parametrize(
    "does, reason",
    [
        ("nothing", ""),
        ("no_grad", "other parameters have gradients"),
        ("detach", "other parameters have gradients"),
        ("scale gradients", "it computes another gradient"),
        ("autocast", "it casts"),
        ("checkpoint", "computes its layers again in backward"),
        ("count in a buffer", "it updates steps differently"),
        ("count in an attribute", "training changes its attributes"),
        ("keep features", "training changes its attributes"),
        ("draw", "it draws other random numbers"),
        ("dropout", "it draws other random numbers"),
        ("stay in eval mode", "a layer of it does not run as one op"),
    ],
)
def test_what_else_a_network_does_in_training(does, reason):
    """It runs as a whole only where the proof has seen nothing else: the report says why not."""

    def make():
        settings = {"embed_dim": 16, "depths": (1, 2), "num_classes": 7, "feature_dim": 24}
        rate = 0.5 if does == "dropout" else 0.0
        model = Own(act="gelu", drop_path_rate=0.0, drop_rate=rate, **settings)
        model.does = does
        return model

    plain, fast = twins(make)
    (row,) = [row for row in fk.report(fast).rows if row.kind == "network"]
    assert row.swapped and reason in row.reason and bool(row.reason) == (does != "nothing")
    wild.assert_same_step(fast, plain, batch()[0])
    assert fast.calls == (does == "count in an attribute")
    assert (fast.features is not None) == (does == "keep features")
    assert (wild.layer_nodes(fast(batch()[0])) == 2) == (does == "nothing")


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_accelerate_without_gradients(grad):
    """The proof of training has its own; where it cannot, the network trains module by module."""
    plain = wild.randomise(small()).double().train()
    fast = copy.deepcopy(plain)
    with grad():
        fk.accelerate(fast)
    x, _ = batch()
    wild.assert_same_step(fast, plain, x)
    assert wild.layer_nodes(fast(x)) == (2 if grad is torch.no_grad else 5)


def test_checkpointing_before_accelerate():
    """As after it: every stage computes its layers again, and keeps its input alone."""
    plain = wild.randomise(timm_fasternet()).train()
    plain.set_grad_checkpointing()
    fast = fk.accelerate(copy.deepcopy(plain))
    later = copy.deepcopy(plain)
    later.set_grad_checkpointing(False)
    later = fk.accelerate(later)
    x = torch.ones(2, 3, 64, 64)
    usual = kept_bytes(later, x)
    later.set_grad_checkpointing()
    assert kept_bytes(fast, x) == kept_bytes(later, x) < 0.7 * usual


def test_other_types_than_the_stem_s():
    """Mixed types are an error in training as a whole too, as they are layer by layer."""
    x = batch(dtype=torch.float32)[0]
    for part in ("stages.0", "stages.1", "conv_head"):
        _, fast = twins(dtype=torch.float32)
        fast(x)
        fast.get_submodule(part).bfloat16()
        with pytest.raises((TypeError, RuntimeError)):
            fast(x)
    _, fast = twins(dtype=torch.float32)
    fast(x)
    for p in fast.parameters():
        p.data = p.data.bfloat16()
    with pytest.raises(TypeError, match="dtype"):
        fast(x)


def test_gradients_have_the_weights_strides():
    _, fast = twins()
    fast.to(memory_format=torch.channels_last)
    F.cross_entropy(fast(batch()[0]), batch()[1]).backward()
    for name, p in fast.named_parameters():
        assert p.grad.stride() == p.stride(), name


def test_nothing_is_kept_without_gradients():
    """Of layers before the first one that learns, and of none without gradients."""
    _, fast = twins()
    x = batch()[0]
    whole = kept_bytes(fast, x)
    for model in (fast.patch_embed, fast.stages[0], fast.stages[1].downsample):
        model.requires_grad_(False)
    part = kept_bytes(fast, x)
    assert part < 0.5 * whole
    restored = copy.deepcopy(fast)
    restored.stages[1].register_forward_hook(lambda *_: None)  # layer by layer
    assert part == kept_bytes(restored, x)
    loss = fast(x).sum()
    with torch.no_grad():
        fast.patch_embed.proj.weight.mul_(0.5)  # nothing of it is needed any more
    loss.backward()


def test_nothing_is_computed_for_frozen_layers(monkeypatch):
    """Of the second stage: the merging layer is frozen, the first block is not."""
    _, fast = twins()
    for part in (fast.patch_embed, fast.stages[0], fast.stages[1].downsample):
        part.requires_grad_(False)
    x, t = batch()
    loss = F.cross_entropy(fast(x), t)
    calls = []
    run = training._run
    monkeypatch.setattr(training, "_run", lambda op, *args: calls.append(args) or run(op, *args))
    loss.backward()
    assert [args[-1][0] for args in calls] == [True, False]  # whether dx is wanted, in either block


def weights_of_a_block():
    case = Case(2, 16, 5, 5)
    w = {name: t.requires_grad_() for name, t in weights(case).items()}
    return {"x": image(case)} | w


# ---- Lean ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_lean_blocks_have_the_same_bits(act, dtype, autocast):
    for make in (
        partial(fk.FasterNetBlock, 24, act=act, layer_scale_init_value=0.3, drop_path=0.4),
        partial(fk.PConvPW, 24, 40, act=act),
    ):
        usual = wild.randomise(make()).to(dtype)
        lean = make(lean=True).to(dtype)
        lean.load_state_dict(usual.state_dict())
        x = randn(3, 24, 9, 7, seed=1, dtype=dtype).to(memory_format=torch.channels_last)
        got, expected = (wild.step(model, x, autocast=autocast) for model in (lean, usual))
        for name, e in expected.items():
            assert torch.equal(got[name], e), name


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lean_stem_and_merging(dtype, autocast):
    make = partial(small, embed_dim=160)
    plain, fast = twins(make, dtype, lean=True)
    for part, channels in (("patch_embed", 3), ("stages.1.downsample", 160)):
        x = randn(3, channels, 26, 17, seed=3, dtype=dtype)
        parts = (fast.get_submodule(part), plain.get_submodule(part))
        wild.assert_same_step(*parts, x, autocast=autocast)
        assert wild.layer_nodes(parts[0](x)) == 1


def test_lean_is_part_of_the_model():
    """It survives copies, and goes when accelerate is called without it."""
    x, _ = batch()
    _, fast = twins(lean=True)
    lean = kept_bytes(fast, x)
    assert kept_bytes(copy.deepcopy(fast), x) == lean
    assert kept_bytes(pickle.loads(pickle.dumps(fast)), x) == lean
    assert kept_bytes(fk.accelerate(fast), x) > 1.5 * lean


# ---- Batch norms ---------------------------------------------------------------------------------


def test_a_large_mean():
    """A hidden tensor of mean 1e4 and standard deviation 1, forward and backward, against float64
    and nn.BatchNorm2d."""
    torch.manual_seed(0)
    ours = fk.FasterNetBlock(24, act="gelu")
    with torch.no_grad():
        ours.mlp[0].weight[:, -1] = 1
        ours.mlp[0].weight[:, :-1].normal_(0, 24**-0.5)
    plain = fk.models.Block(24, 4, 2.0, 0.0, 0.0, "gelu")
    plain.load_state_dict(ours.state_dict())
    x = randn(4, 24, 14, 14, seed=2)
    x[:, -1] = 1e4
    results = [
        wild.step(model, image)
        for model, image in [
            (ours, x),
            (copy.deepcopy(plain).double(), x.double()),
            *wild.rivals(plain, x),
        ]
    ]
    got, exact, *eager = results
    assert got["mlp.1.running_mean"].min() > 9e2
    for name, e in exact.items():
        if e.is_floating_point():
            assert_right(got[name], e, *(r[name] for r in eager), what=name)


@pytest.mark.parametrize("frozen", ["norms", "weights", "all but the head", "stem"])
@pytest.mark.parametrize("lean", [False, True])
def test_frozen(frozen, lean, way):
    """Only the gradients that are wanted, and running statistics only where they move."""
    plain, fast = twins(lean=lean)
    for model in (plain, fast):
        for name, m in model.named_modules():
            if isinstance(m, nn.BatchNorm2d) and frozen == "norms":
                m.eval().requires_grad_(False)
            if isinstance(m, nn.Conv2d) and frozen == "weights":
                m.requires_grad_(False)
            if frozen == "all but the head" and name in ("patch_embed", "stages"):
                m.requires_grad_(False)
            if frozen == "stem" and name == "patch_embed":
                m.requires_grad_(False)
    x, t = batch()
    for model in (plain, fast):
        F.cross_entropy(model(x), t).backward()
    assert_same_state(fast, plain)


# ---- What trainers do ----------------------------------------------------------------------------


def accumulate(model):
    optimizer = sgd(model)
    for i in range(4):
        x, t = batch(i)
        (F.cross_entropy(model(x), t) / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=i == 1)


def clip(model):
    optimizer = sgd(model)
    for i in range(3):
        x, t = batch(i)
        optimizer.zero_grad()
        F.cross_entropy(model(x), t).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1
        optimizer.step()


def scale(model):
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(3):
        x, t = batch(i)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), t)).backward()
        if i == 1:  # an overflow: the step is skipped, the scale halved
            next(model.parameters()).grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0


def average(model):
    """An exponential moving average by deepcopy, evaluated and trained further."""
    optimizer, mean = sgd(model), copy.deepcopy(model)
    for i in range(3):
        x, t = batch(i)
        optimizer.zero_grad()
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
        with torch.no_grad():
            for a, b in zip(mean.state_dict().values(), model.state_dict().values()):
                a.copy_(a.lerp(b, 0.3) if a.is_floating_point() else b)
            y = mean.eval()(x)
    F.cross_entropy(mean.train()(x), t).backward()
    return [y, *mean.state_dict().values(), *(p.grad for p in mean.parameters())]


def average_of_torch(model):
    optimizer = sgd(model)
    mean = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for i in range(2):
        x, t = batch(i)
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
        mean.update_parameters(model)
    return [mean.eval()(x), *mean.state_dict().values()]


def functional(model):
    """Other parameters than the model's own, with gradients; and none of the model's."""
    x, t = batch()
    state = {n: (p * 1.25).detach().requires_grad_() for n, p in model.named_parameters()}
    F.cross_entropy(torch.func.functional_call(model, state, (x,)), t).backward()
    assert all(p.grad is None for p in model.parameters())
    return [p.grad for p in state.values()]


def recompute(model, reentrant):
    x, t = batch()
    x.requires_grad_()
    F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), t).backward()
    return [x.grad]


def recompute_stages(model, reentrant):
    x, t = batch()
    x = model.patch_embed(x)
    for stage in model.stages:
        for part in (stage.downsample, *stage.blocks):
            x = checkpoint(part, x, use_reentrant=reentrant)
    F.cross_entropy(model.forward_head(x), t).backward()


def twice(model):
    """The same weights at two places in the graph."""
    x, _ = batch()
    y = model.patch_embed(x)
    block = model.stages[0].blocks[0]
    y = block(block(y * 2) + y)
    model.forward_head(model.stages[1](y)).square().sum().backward()


def on_the_cpu(model):
    """Saved tensors moved away and back."""
    x, t = batch()
    with torch.autograd.graph.save_on_cpu():
        loss = F.cross_entropy(model(x), t)
    loss.backward()


def retain(model):
    x, t = batch()
    loss = F.cross_entropy(model(x), t)
    loss.backward(retain_graph=True)
    loss.backward()


def optimise_in_backward(model):
    optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}

    def hook(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for i in range(2):
        x, t = batch(i)
        F.cross_entropy(model(x), t).backward()


PROCEDURES = {
    "accumulation": accumulate,
    "clip_grad": clip,
    "GradScaler": scale,
    "average by deepcopy": average,
    "AveragedModel": average_of_torch,
    "functional_call": functional,
    "checkpoint": partial(recompute, reentrant=False),
    "checkpoint, reentrant": partial(recompute, reentrant=True),
    "checkpoint of parts": partial(recompute_stages, reentrant=False),
    "checkpoint of parts, reentrant": partial(recompute_stages, reentrant=True),
    "shared weights": twice,
    "save_on_cpu": on_the_cpu,
    "retain_graph": retain,
    "optimizer in backward": optimise_in_backward,
}


@pytest.mark.parametrize("lean", [False, True], ids=["usual", "lean"])
@pytest.mark.parametrize("name", PROCEDURES)
def test_procedures(name, lean, way):
    plain, fast = twins(lean=lean)
    results = [PROCEDURES[name](model) or [] for model in (fast, plain)]
    for a, b in zip(*results, strict=True):
        near(a, b)
    assert_same_state(fast, plain)


@pytest.mark.parametrize("lean", [False, True], ids=["usual", "lean"])
def test_autocast_with_a_scaler(lean):
    """Scaled gradients in bfloat16 are the unscaled ones times the scale, to the bit."""
    _, fast = twins(dtype=torch.float32, lean=lean)
    x, t = batch(dtype=torch.float32)
    gradients = []
    for factor in (1.0, 1024.0):
        model = copy.deepcopy(fast)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), t)
        (loss * factor).backward()
        gradients.append([p.grad / factor for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.slow
@pytest.mark.parametrize("lean", [False, True])
def test_compiled_step_of_t0(lean):
    compiled_step("aot_eager", lean)


@pytest.mark.slow
@pytest.mark.parametrize("lean", [False, True], ids=["usual", "lean"])
def test_inductor_step_of_t0(lean):
    compiled_step("inductor", lean)


def compiled_step(backend, lean):
    """A whole training step of T0 in one graph: eager's loss, gradients and statistics."""
    torch.compiler.reset()
    plain, fast = twins(partial(fk.models.fasternet_t0, num_classes=10), lean=lean)
    x, t = randn(4, 3, 64, 64, seed=1, dtype=torch.float64), torch.arange(4)

    def loss_of(model, x):
        return F.cross_entropy(model(x), t)

    compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
    expected, loss = loss_of(plain, x), compiled(fast, x)
    near(loss, expected)
    expected.backward()
    loss.backward()
    assert_same_state(fast, plain)
    if backend == "aot_eager":  # Inductor keeps copies of weights, too, in a layout that it prefers
        assert kept_bytes(fast, x, compiled) < 0.5 * kept_bytes(plain, x)
    torch.compiler.reset()


# ---- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(
    "make", [partial(fk.FasterNetBlock, 24), partial(fk.PConvPW, 24, 40)], ids=["block", "pconv_pw"]
)
def test_misuse(make, lean, way):
    model = make(lean=lean).double()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.ones(1, 24, 1, 1, dtype=torch.float64))
    x = randn(2, 24, 4, 4, seed=1, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    with pytest.raises(ValueError, match="a leaf that requires grad"):
        fk.pconv3x3_(leaf, torch.ones(6, 6, 3, 3, dtype=torch.float64))

    y = model(x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()

    y = model(leaf * 1.0)
    (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.square().sum().backward()

    kept = leaf * 1.0
    y = model(kept)
    kept.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- Long runs -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lean", [False, True], ids=["usual", "lean"])
def test_two_hundred_steps_of_t0(lean):
    """The losses of a run in float64 are eager's, to 1e-9."""
    torch.manual_seed(0)
    plain = fk.models.fasternet_t0(num_classes=10).double().train()
    fast = fk.accelerate(copy.deepcopy(plain), lean=lean)
    losses = []
    for model in (plain, fast):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
        losses.append([])
        for step in range(200):
            x = randn(16, 3, 64, 64, seed=step, dtype=torch.float64)
            t = (x.mean((1, 2, 3)) * 1e4).long() % 10
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), t)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    eager, ours = torch.tensor(losses, dtype=torch.float64)
    assert ((ours - eager).abs() / eager).max() <= 1e-9
    assert eager.isfinite().all()


PEAK = """
import re, sys, torch
import fasternet_kernels as fk

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
model = fk.models.fasternet_t0().train().to(memory_format=torch.channels_last)
if sys.argv[1] != "eager":
    fk.accelerate(model, lean=sys.argv[1] == "lean")
x = torch.ones(16, 3, 224, 224).contiguous(memory_format=torch.channels_last)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = status("VmRSS")
for _ in range(2):
    model(x).sum().backward()
print(status("VmHWM") - before)
"""


@pytest.mark.slow
def test_peak_memory_of_a_step():
    """Resident memory of a process: eager needs more than fused, fused more than lean."""
    # Freed tensors go back to the system at once: glibc would keep some for later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}

    def run(kind):
        command = [sys.executable, "-c", PEAK, kind]
        return int(subprocess.check_output(command, text=True, env=environment))

    peak = {kind: run(kind) for kind in ("eager", "usual", "lean")}
    assert peak["lean"] < peak["usual"] < peak["eager"], peak
