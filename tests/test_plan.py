"""Networks that run as one op: when they do, what they watch, and their files.

A file's plan must give the bits of the op on the same packs; what the op gives is held to eager
PyTorch in test_accelerate.py.
"""

import copy
import os
import pickle
import re
import struct
import subprocess
import sys
import textwrap
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import fasternet_runtime as runtime
import numpy as np
import pytest
import torch
import wild
from cases import randn, taking_turns
from torch import nn

import fasternet_kernels as fk
from fasternet_kernels import watch
from fasternet_kernels.networks import network_of

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


def small(features_only=False, embed_dim=24, **kwargs):
    """FasterNet with all its parts, narrow."""
    return fk.models.FasterNet(
        embed_dim=embed_dim,
        depths=(1, 2),
        feature_dim=40,
        num_classes=11,
        act="gelu",
        features_only=features_only,
        layer_scale_init_value=0.3,
        **kwargs,
    )


def model(dtype=torch.float32, make=small, **kwargs):
    return wild.randomise(make(**kwargs)).to(dtype).eval()


def image(batch=2, height=32, width=48, dtype=torch.float32):
    return randn(batch, 3, height, width, seed=11, dtype=dtype)


def runs_as_one_op(fast, x=None):
    """Whether a call of the accelerated model without gradients leaves a plan behind."""
    with torch.no_grad():
        fast(image() if x is None else x)
    return network_of(fast) is not None and network_of(fast).kept is not None


# ---- When a network runs as one op ---------------------------------------------------------------


class Outputs(nn.Module):
    """The stages of a FasterNet, and what `choose` makes of their outputs."""

    def __init__(self, choose):
        super().__init__()
        self.net = small(features_only=True)
        self.choose = choose

    def forward(self, x):
        return self.choose(self.net(x))


COLLECTED = {
    "list": (lambda y: y, list),
    "tuple": (tuple, tuple),
    "first": (lambda y: y[:1], list),
    "last": (lambda y: [y[1]], list),
    "a tensor": (lambda y: y[0], torch.Tensor),
}


@pytest.mark.parametrize("name", COLLECTED)
def test_feature_maps(name):
    choose, kind = COLLECTED[name]
    plain = model(make=partial(Outputs, choose))
    fast = fk.accelerate(copy.deepcopy(plain))
    assert runs_as_one_op(fast)
    with torch.no_grad():
        for x in (image(), image(3, 37, 51), image(0)):
            y = fast(x)
            assert type(y) is kind
            for a, b in zip(wild.as_list(y), wild.as_list(plain(x)), strict=True):
                assert a.shape == b.shape
                assert a.is_contiguous(memory_format=torch.channels_last)
        wild.assert_agree(fast, plain, image())
        fk.restore(fast)
        for a, b in zip(wild.as_list(fast(image())), wild.as_list(plain(image())), strict=True):
            assert torch.equal(a, b)


UNFIT = {
    "a dict": (lambda y: dict(enumerate(y)), "returns a dict"),
    "reversed": (lambda y: y[::-1], "in another order"),
    "twice": (lambda y: [y[0], y[0]], "in another order"),
    "doubled": (lambda y: [2 * y[0], y[1]], "not those of its blocks"),
    "changed in place": (lambda y: [y[0].mul_(2), y[1]], "computes something else"),
    "normalised": (None, "made by other layers: feature_norms.0, feature_norms.1"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_outputs_that_no_plan_makes(name):
    choose, reason = UNFIT[name]
    make = partial(Outputs, choose) if choose else partial(small, True, feature_norm=True)
    plain = model(make=make)
    fast = fk.accelerate(copy.deepcopy(plain))
    (row,) = (row for row in fk.report(fast).rows if row.kind == "network")
    assert not row.swapped and reason in row.reason
    with torch.no_grad():
        got, expected = fast(image()), plain(image())
    assert type(got) is type(expected)


@pytest.mark.parametrize("features_only", [False, True])
def test_copies_run_as_one_op(features_only):
    fast = fk.accelerate(model(features_only=features_only))
    assert runs_as_one_op(fast)
    assert runs_as_one_op(copy.deepcopy(fast))
    assert runs_as_one_op(pickle.loads(pickle.dumps(fast)))
    assert runs_as_one_op(fk.accelerate(model(make=wild.OfficialFasterNet)))


# ---- What is watched -----------------------------------------------------------------------------


def conv_of(m):
    return m.stages[1].blocks[0].mlp[0]


def norm_of(m):
    return m.stages[1].blocks[0].mlp[1]


def replaced_hooks(m):
    """An idiom to drop all hooks; those that come later land in the new dict."""
    conv_of(m)._forward_hooks = type(conv_of(m)._forward_hooks)()
    conv_of(m).register_forward_hook(lambda *_: None)


def move_storage(m):
    """As `Module.half().float()` does: the same parameter, other memory, no version counted."""
    conv_of(m).weight.data = conv_of(m).weight.data.clone()


def swap_class(m):
    class Other(nn.Conv2d):
        pass

    conv_of(m).__class__ = Other


def set_entry(m, attribute, name, value):
    getattr(m, attribute)[name] = value


CHANGES = {
    "hook": lambda m: conv_of(m).register_forward_hook(lambda *_: None),
    "pre-hook": lambda m: m.stages[0].register_forward_pre_hook(lambda *_: None),
    "hook in a new dict": replaced_hooks,
    "hook by hand": lambda m: set_entry(conv_of(m), "_forward_hooks", 7, lambda *_: None),
    "stride": lambda m: setattr(conv_of(m), "stride", (2, 2)),
    "eps": lambda m: setattr(norm_of(m), "eps", 0.5),
    "approximation": lambda m: setattr(m.stages[1].blocks[0].mlp[2], "approximate", "tanh"),
    "forward": lambda m: setattr(norm_of(m), "forward", lambda x: x),
    "class": swap_class,
    "training": lambda m: norm_of(m).train(),
    "container in training": lambda m: setattr(m.stages[1].blocks[0], "training", True),
    "attribute of a block": lambda m: setattr(m.stages[1].blocks[0].spatial_mixing, "dim_conv", 5),
    "attribute of the model": lambda m: setattr(m, "features_only", 1),
    "removed attribute": lambda m: delattr(m, "num_classes"),
    "child": lambda m: setattr(m.stages[1].blocks[0].mlp, "4", nn.Identity()),
    "other child": lambda m: setattr(m.stages[1].blocks[0].mlp, "2", nn.GELU()),
    "order of children": lambda m: m.stages._modules.update({"0": m.stages._modules.pop("0")}),
    "parameter": lambda m: set_entry(
        conv_of(m), "_parameters", "weight", nn.Parameter(conv_of(m).weight.detach())
    ),
    "parameter of a container": lambda m: (
        m.stages[1].blocks[0].register_parameter("extra", nn.Parameter(torch.zeros(1)))
    ),
    "buffer": lambda m: set_entry(norm_of(m), "_buffers", "running_mean", torch.zeros(96)),
    "optimizer": lambda m: torch.optim.SGD([conv_of(m).weight], lr=1.0).step(),
    "edit in place": lambda m: conv_of(m).weight.detach().mul_(2),
    "edit of a counter": lambda m: norm_of(m).num_batches_tracked.add_(1),
    "other memory": move_storage,
    "attributes replaced": lambda m: setattr(conv_of(m), "__dict__", dict(vars(conv_of(m)))),
    "pack dropped": lambda m: m.stages[1].blocks[0].drop_pack(),
    "global hook": lambda m: nn.modules.module.register_module_forward_hook(lambda *_: None),
}
UNREAD = {
    "conv's channels": lambda m: setattr(conv_of(m), "in_channels", 1),
    "an attribute of ours": lambda m: fk.report(m),
    "equal stride": lambda m: setattr(conv_of(m), "stride", (1, 1)),
    "gradients": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("unchanged", ["C", "Python"])
@pytest.mark.parametrize("change", [*CHANGES, *UNREAD])
def test_watch(change, unchanged, monkeypatch):
    monkeypatch.setattr(
        watch, "unchanged", runtime._unchanged if unchanged == "C" else watch.python_unchanged
    )
    fast = fk.accelerate(model())
    assert runs_as_one_op(fast)
    seen = network_of(fast).kept.watch
    assert seen.holds()
    handle = (CHANGES | UNREAD)[change](fast)
    try:
        assert seen.holds() == (change in UNREAD)
    finally:
        if change == "global hook":
            handle.remove()


def test_watch_uses_the_compiled_loop():
    assert watch.unchanged is runtime._unchanged


def test_watch_survives_values_without_a_truth():
    """An attribute becomes an array, whose == is no question of yes or no."""
    plain = model()
    plain.note = np.zeros(3)
    fast = fk.accelerate(plain)
    assert runs_as_one_op(fast)
    seen = network_of(fast).kept.watch
    fast.note = np.ones(3)
    assert not seen.holds()
    assert not runs_as_one_op(fast)  # until accelerate has proved it anew
    assert runs_as_one_op(fk.accelerate(fast))


def test_watch_keeps_nothing_alive_in_a_circle():
    import gc
    import weakref

    fast = fk.accelerate(model())
    assert runs_as_one_op(fast)
    ghost = weakref.ref(conv_of(fast).weight)
    del fast
    gc.collect()
    assert ghost() is None


BAD_ARGUMENTS = [
    (),
    ([], (), (), 0, 0, 0, torch.Tensor._version, 0),
    ((1,), (), (), 0, 0, 0, torch.Tensor._version, 0),
    ((), (1, 2, 3), (), 0, 0, 0, torch.Tensor._version, 0),
    ((), (), (), 0, 0, 0, 0, 0),
    ((), (), (1, 2, 3), 0, 0, 0, torch.Tensor._version, torch.Tensor.data_ptr),
]


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
def test_unchanged_refuses_what_it_does_not_take(arguments):
    with pytest.raises(TypeError):
        runtime._unchanged(*arguments)


# ---- Files: the same answers ---------------------------------------------------------------------


def as_array(t):
    return t.view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.numpy()


def export(tmp_path, plain, fast=False, **kwargs):
    path = tmp_path / "network.plan"
    fk.export_plan(plain, path, fast=fast)
    return runtime.load(path, **kwargs)


def assert_same_bits(plan, fast, x, array=None):
    with torch.no_grad():
        expected = fast(x)
    got = plan(as_array(x) if array is None else array)
    if isinstance(expected, torch.Tensor):
        expected, got = [expected], [got]
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.dtype == as_array(b).dtype
        assert np.array_equal(a, as_array(b)), "other bits than the op's"


@pytest.mark.parametrize("outputs, threads", taking_turns(["logits", "features"], [1, 2]))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_round_trip(tmp_path, dtype, outputs, threads):
    plain = model(dtype, fk.models.fasternet_t0, features_only=outputs == "features")
    plan = export(tmp_path, plain, threads=threads)
    fast = fk.accelerate(plain)
    for shape in ((1, 32, 32), (3, 64, 97), (0, 32, 64)):
        assert_same_bits(plan, fast, image(*shape, dtype=dtype))
    assert runs_as_one_op(fast, image(1, 32, 32, dtype=dtype))


@pytest.mark.parametrize("make", [wild.OfficialFasterNet, partial(Outputs, lambda y: y[1])])
def test_other_networks(tmp_path, make):
    plain = model(make=make)
    assert_same_bits(export(tmp_path, plain), fk.accelerate(plain), image())


def test_strides(tmp_path):
    plain = model()
    plan, fast = export(tmp_path, plain), fk.accelerate(plain)
    x = image(3)
    nhwc = np.ascontiguousarray(x.numpy().transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    wide = np.zeros((3, 5, 34, 100), np.float32)
    wide[:, 1:4, 1:33, 1:97:2] = x.numpy()
    packed = np.zeros(3, dtype=[("pad", "u1"), ("x", "<f4", (3, 32, 48))])
    packed["x"] = x.numpy()
    for array in (
        x.numpy(),
        nhwc,
        wide[:, 1:4, 1:33, 1:97:2],
        np.ascontiguousarray(x.numpy()[:, ::-1])[:, ::-1],
        np.ascontiguousarray(x.numpy()[..., ::-1])[..., ::-1],
        packed["x"],
    ):
        before = array.copy()
        assert_same_bits(plan, fast, x, array)
        assert np.array_equal(array, before)
    constant = np.broadcast_to(np.float32(0.5), (2, 3, 32, 48))
    assert np.array_equal(plan(constant), plan(np.ascontiguousarray(constant)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_fast_tier(tmp_path, dtype):
    """The bits of the model accelerated so, in float32 and where maps are large enough others than
    the default tier's, within the error that is promised."""
    plain = model(dtype, partial(small, features_only=True, embed_dim=96))
    plan, default = export(tmp_path, plain, fast=True, threads=2), fk.accelerate(plain)
    fast = fk.accelerate(copy.deepcopy(plain), fast=True)
    has_fast = dtype == torch.float32
    assert {step["fast"] for step in plan.steps if step["kind"] == "block"} == {has_fast}
    for shape, runs in (((2, 60, 68), True), ((1, 32, 48), False), ((0, 64, 64), False)):
        x = image(*shape, dtype=dtype)
        assert_same_bits(plan, fast, x)
        with torch.no_grad():
            same = [np.array_equal(a, as_array(b)) for a, b in zip(plan(as_array(x)), default(x))]
            assert all(same) != (runs and has_fast)
            if runs and has_fast:
                exact = fk.restore(copy.deepcopy(plain)).double()(x.double())
                for a, b in zip(plan(as_array(x)), exact):
                    assert (torch.from_numpy(a) - b).norm() <= 2e-5 * b.norm()


def test_a_fast_tier_that_no_block_has(tmp_path):
    """It is allowed, and the file is the default tier's."""
    plain = model()
    for fast in (False, True):
        fk.export_plan(plain, tmp_path / str(fast), fast=fast)
    assert (tmp_path / "False").read_bytes() == (tmp_path / "True").read_bytes()


@pytest.mark.parametrize("tier", [False, True], ids=["default", "fast"])
def test_export_of_an_accelerated_model(tmp_path, tier):
    """The same file whichever tier the model runs in, and the model stays as it is."""
    plain = model(make=partial(small, embed_dim=96) if tier else small)
    models = {
        "plain": plain,
        "default": fk.accelerate(copy.deepcopy(plain)),
        "fast": fk.accelerate(copy.deepcopy(plain), fast=True),
    }
    for name, m in models.items():
        if m is not plain:
            runs_as_one_op(m)
        before, state = dict(vars(m)), copy.deepcopy(m.state_dict())
        types = [type(x) for x in m.modules()]
        fk.export_plan(m, tmp_path / name, fast=tier)
        assert vars(m) == before
        assert [type(x) for x in m.modules()] == types
        assert all(torch.equal(a, state[k]) for k, a in m.state_dict().items())
    assert len({(tmp_path / name).read_bytes() for name in models}) == 1
    assert sorted(os.listdir(tmp_path)) == sorted(models)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "network.plan"
    fk.export_plan(model(), path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fk.export_plan(wild.randomise(model(), seed=3), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["network.plan"]


def test_what_a_plan_says(tmp_path):
    plan = export(tmp_path, model(torch.bfloat16, features_only=True))
    assert (plan.dtype, plan.input_channels) == ("bfloat16", 3)
    assert plan.writer == f"fasternet_kernels {fk.__version__}"
    assert [step["kind"] for step in plan.steps] == [
        *("patch_conv", "block", "emit"),
        *("patch_conv", "block", "block", "emit"),
    ]
    assert plan.steps[0] == {"kind": "patch_conv", "c_out": 24, "kh": 4, "kw": 4}
    block = {"kind": "block", "c_partial": 6, "c_hidden": 48, "act": "gelu", "fast": False}
    assert plan.steps[1] == block
    assert repr(plan) == (
        "<fasternet_runtime.Plan: bfloat16 (B, 3, H, W), 7 steps, 2 outputs, "
        f"written by fasternet_kernels {fk.__version__}>"
    )


def test_two_threads_call_one_plan(tmp_path):
    plain = model()
    plan = export(tmp_path, plain, threads=2)
    images = [image(1 + i % 3).numpy() * (1 + i) for i in range(8)]
    expected = [plan(x) for x in images]

    def call_all(_):
        return all(np.array_equal(plan(x), y) for x, y in zip(images * 5, expected * 5))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(call_all, range(2)))


def test_without_torch(tmp_path):
    plain = model()
    plan = export(tmp_path, plain)
    x = image().numpy()
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", plan(x))
    script = """
        import sys, numpy as np, fasternet_runtime
        plan = fasternet_runtime.load(sys.argv[1] + "/network.plan")
        x, y = (np.load(f"{sys.argv[1]}/{name}.npy") for name in "xy")
        assert np.array_equal(plan(x), y)
        assert not [m for m in sys.modules if m.split(".")[0] in ("torch", "fasternet_kernels")]
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(runtime.__file__)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- Files: what is refused ----------------------------------------------------------------------


class Hooked(Outputs):
    def __init__(self):
        super().__init__(lambda y: y)
        self.net.register_forward_hook(lambda *_: None)


NOT_EXPORTED = {
    "no module": (lambda: "t0", TypeError, r"model is of type str, expected a torch\.nn\.Module"),
    "training": (
        lambda: model().train(),
        ValueError,
        r"in training mode \(\(model\)\), expected eval mode",
    ),
    "a part in training": (
        lambda: [m := model(), m.stages[0].train()][0],
        ValueError,
        r"in training mode \(stages\.0\)",
    ),
    "half": (lambda: model(torch.float16), TypeError, r"of torch\.float16, expected float32"),
    "something else": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3)).eval(),
        ValueError,
        r"model \(Sequential\) does not run as one op: it is no chain of stem",
    ),
    "norms on outputs": (
        lambda: model(features_only=True, feature_norm=True),
        ValueError,
        r"made by other layers: feature_norms\.0",
    ),
    "hooks": (lambda: model(make=Hooked), ValueError, "has forward hooks"),
    "no statistics": (
        lambda: [m := model(), setattr(norm_of(m), "running_mean", None)][0],
        ValueError,
        "does not run",
    ),
}


@pytest.mark.parametrize("name", NOT_EXPORTED)
def test_not_exported(name, tmp_path):
    make, error, message = NOT_EXPORTED[name]
    with pytest.raises(error, match=message):
        fk.export_plan(make(), tmp_path / "network.plan")
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of a small plan."""
    path = tmp_path_factory.mktemp("plan") / "network.plan"
    fk.export_plan(model(), path)
    return path.read_bytes()


def with_checksum(content):
    """The same bytes under a checksum that fits them: forged, not damaged."""
    return (
        content[:92]
        + struct.pack("=I", zlib.crc32(content[96:], zlib.crc32(content[:92])))
        + (content[96:])
    )


def patched(offset, format, value):
    def patch(content):
        data = bytearray(content)
        struct.pack_into(format, data, offset, value)
        return with_checksum(bytes(data))

    return patch


STEP = 96  # where the first step begins; 64 bytes each
WRONG_FILES = {
    "empty": (lambda c: b"", "has 0 bytes, expected at least the 96 of a header"),
    "another format": (lambda c: b"PK\3\4" + c[4:], "does not begin with FNETPLAN"),
    "other byte order": (patched(8, "=I", 0x04030201), "machine of the other byte order"),
    "no byte order": (patched(8, "=I", 5), "byte order mark is none"),
    "newer": (
        patched(12, "=I", 2),
        r"format version 2, this library reads version 1; a newer fasternet_kernels wrote it",
    ),
    "older": (patched(12, "=I", 0), r"format version 0, this library reads version 1$"),
    "cut off": (lambda c: c[:-64], r"is cut off: it has \d+ bytes, its header says \d+"),
    "longer": (lambda c: c + b"\0", r"is longer: it has more than \d+ bytes"),
    "a flipped bit": (
        lambda c: c[:-100] + bytes([c[-100] ^ 1]) + c[-99:],
        "is damaged: its checksum does not fit",
    ),
    "a huge length": (patched(16, "=Q", 2**62), "is cut off"),
    "dtype": (patched(24, "=I", 3), "has dtype 3"),
    "flags": (patched(28, "=I", 2), "flags that this library does not know"),
    "no channels": (patched(32, "=I", 0), "an input of 0 channels"),
    "huge channels": (patched(32, "=I", 2**31), "an input of 2147483648 channels"),
    "other channels": (patched(32, "=I", 4), "step 0 has its weights at"),
    "steps beyond the file": (patched(36, "=I", 60000), "has tables of"),
    "too many steps": (patched(36, "=I", 2**32 - 1), "which cannot be"),
    "outputs": (patched(40, "=I", 0), r"describes 0 outputs, its steps make 1|output 0"),
    "writer": (patched(44, "=I", 2**32 - 1), "which cannot be"),
    "kind": (patched(STEP, "=I", 4), "step 0 is of an unknown kind"),
    "activation": (patched(STEP + 64 + 4, "=I", 6), "step 1 has an unknown activation"),
    "flags of a step": (patched(STEP + 64 + 8, "=I", 2), "step 1 has flags"),
    "no fast tier": (patched(STEP + 64 + 8, "=I", 1), "step 1 allows a fast tier that it does not"),
    "no block": (patched(STEP + 8, "=I", 1), "step 0 allows a fast tier that it does not have"),
    "negative size": (patched(STEP + 16, "=q", -4), "step 0 has sizes that cannot be"),
    "huge size": (patched(STEP + 16, "=q", 2**62), "step 0 has sizes that cannot be"),
    "large size": (patched(STEP + 16, "=q", 2**24), "step 0 has its weights at"),
    "huge patch": (patched(STEP + 24, "=q", 2**40), "step 0 has sizes that cannot be"),
    "other patch": (patched(STEP + 24, "=q", 2), "step 0 has its weights at"),
    "c_partial": (patched(STEP + 64 + 16, "=q", 25), "step 1 convolves more channels"),
    "offset": (patched(STEP + 40, "=Q", 2**64 - 64), "step 0 has its weights at"),
    "odd offset": (patched(STEP + 40, "=Q", 1025), "step 0 has its weights at"),
    "weights in the tables": (patched(STEP + 40, "=Q", 64), "step 0 has its weights at"),
    "bytes": (patched(STEP + 48, "=Q", 2**64 - 64), "step 0 has its weights at"),
    "a block first": (patched(STEP, "=I", 1), "step 0"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_file(name, content, tmp_path):
    change, message = WRONG_FILES[name]
    path = tmp_path / "network.plan"
    path.write_bytes(change(content))
    with pytest.raises(RuntimeError, match=message) as error:
        runtime.load(path)
    assert str(error.value).startswith(f"{path}: ")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        runtime.load(tmp_path / "none.plan")
    with pytest.raises(RuntimeError, match="cannot be read: Is a directory"):
        runtime.load(tmp_path)
    with pytest.raises(TypeError):
        runtime.load(3.5)
    with pytest.raises(ValueError, match="load: threads is 0, expected 1 to 1024"):
        runtime.load(tmp_path, threads=0)
    with pytest.raises(TypeError, match="load: threads is a str, expected an int"):
        runtime.load(tmp_path, threads="2")


WRONG_INPUTS = {
    "list": ([1], TypeError, "plan: x is a list, expected a NumPy array of float32"),
    "float64": (np.zeros((1, 3, 32, 32)), TypeError, "x has dtype float64, expected float32"),
    "big-endian": (np.zeros((1, 3, 32, 32), ">f4"), TypeError, "x has dtype >f4, expected float32"),
    "uint16": (np.zeros((1, 3, 32, 32), np.uint16), TypeError, "x has dtype uint16"),
    "rank": (np.zeros((3, 32, 32), np.float32), ValueError, r"shape \(3, 32, 32\), expected 4"),
    "channels": (
        np.zeros((1, 4, 32, 32), np.float32),
        ValueError,
        r"shape \(1, 4, 32, 32\), expected 4 dimensions \(B, 3, H, W\)",
    ),
    "size": (np.zeros((1, 3, 8, 7), np.float32), ValueError, "is 8 by 7 pixels, expected at least"),
    "huge": (
        np.broadcast_to(np.float32(0), (2**20, 3, 2**18, 2**18)),
        (ValueError, MemoryError),
        None,
    ),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_wrong_input(name, tmp_path):
    x, error, message = WRONG_INPUTS[name]
    plan = export(tmp_path, model())
    with pytest.raises(error, match=message):
        plan(x)
    assert np.isfinite(plan(np.zeros((1, 3, 8, 8), np.float32))).all()


def test_bfloat16_of_ml_dtypes(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    plain = model(torch.bfloat16)
    plan = export(tmp_path, plain)
    bits = as_array(image(dtype=torch.bfloat16))
    y = plan(bits.view(ml_dtypes.bfloat16))
    assert y.dtype == ml_dtypes.bfloat16
    assert np.array_equal(y.view(np.uint16), plan(bits))


def test_messages_are_one_line(content, tmp_path):
    path = tmp_path / "network.plan"
    for name, (change, _) in WRONG_FILES.items():
        path.write_bytes(change(content))
        with pytest.raises(RuntimeError) as error:
            runtime.load(path)
        assert re.fullmatch(r"[^\n]+", str(error.value)), name
