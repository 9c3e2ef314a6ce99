"""The Triton kernels of inference in Triton's interpreter on CPU tensors, against float64.

float32 and float16: the interpreter's products in bfloat16 are wrong. Uninitialised memory is NaN
(conftest.py), so what a kernel does not write is seen.
"""

import importlib
import os
import random
import subprocess
import sys
import unittest.mock

import pytest
import torch
import torch.nn.functional as F
from cases import (
    ACTS,
    DTYPES,
    EDGES,
    FORMATS,
    NETWORKS,
    Case,
    assert_right,
    double,
    image,
    loop_conv,
    randn,
    taking_turns,
    weights,
)

if torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
    pytest.skip(
        "there is a GPU, whose tests are in test_gpu.py; these alone run with TRITON_INTERPRET=1",
        allow_module_level=True,
    )

from triton.runtime.interpreter import interpreter_builder

from fasternet_kernels import ops, reference
from fasternet_kernels.selftest import allowed_errors, errors
from fasternet_kernels.triton import FAMILIES, KERNELS, common, layout, pconv

# Every stage's channels, few pixels.
STAGES = [
    Case(2, width << stage, 3, 4 - stage % 2, act="gelu" if name in ("t0", "t1") else "relu")
    for name, width in NETWORKS.items()
    for stage in range(4)
]
FLOATS = ["fp32", "fp16"]


PATHS = ["fused", "split"]


@pytest.fixture(params=PATHS)
def path(request):
    """Few multiprocessors have enough to do with whole blocks; many get blocks in parts."""
    with common.pretend(multiprocessors=1 if request.param == "fused" else 1000):
        yield request.param


@pytest.fixture
def shuffled(monkeypatch):
    """The programs of a launch run in a random order: a race becomes a wrong answer."""
    set_index = interpreter_builder.set_grid_idx
    generator = random.Random(0)
    order: list[int] = []

    def set_grid_idx(x, y, z):
        assert y == z == 0
        if x == 0:
            order[:] = range(interpreter_builder.grid_dim[0])
            generator.shuffle(order)
        set_index(order[x], y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)


def fake(name, args):
    """What the op's fake gives, on meta tensors."""
    meta = [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
        if isinstance(a, torch.Tensor)
        else a
        for a in args
    ]
    return getattr(torch.ops.fasternet_kernels, name)(*meta)


def check(name, *args):
    """The kernel against the reference in float64, beside the reference in the same dtype with
    PyTorch's convolutions and with sums in order."""
    kept = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    got = KERNELS[name](*args)
    for before, after in zip(kept, args):
        if isinstance(after, torch.Tensor):
            assert torch.equal(before.nan_to_num(7), after.nan_to_num(7)), f"{name} wrote an input"
    expected = fake(name, args)
    assert (got.dtype, got.shape, got.stride()) == (
        expected.dtype,
        expected.shape,
        expected.stride(),
    )
    plain = getattr(reference, name)
    exact = plain(*double(args))

    def in_order():
        with unittest.mock.patch.object(F, "conv2d", loop_conv):
            return plain(*args)

    assert_right(got, exact, lambda: plain(*args), in_order, what=name)
    return got


def block_arguments(x, w, act, bare=False):
    names = ("scale", "shift", "layer_scale", "sample_scale")
    vectors = (None if bare else w[name] for name in names)
    return x, w["w_partial"], w["w_pw1"], w["w_pw2"], *vectors, act


def pw_arguments(x, w, act, bare=False):
    vectors = (None, None) if bare else (w["scale"], w["shift"])
    return x, w["w_partial"], w["w_pw1"], *vectors, act


def check_in_place(x, weight):
    """pconv3x3_ on x, which is overwritten; what surrounds a slice must stay."""
    exact = reference.pconv3x3(x.double(), weight.double())
    eager = reference.pconv3x3(x, weight)
    rest = x[:, weight.shape[0] :].clone()
    assert KERNELS["pconv3x3_"](x, weight) is None
    assert_right(x, exact, eager, what="pconv3x3_")
    assert torch.equal(x[:, weight.shape[0] :].nan_to_num(7), rest.nan_to_num(7))


# ---- Every stage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case, dtype", taking_turns(STAGES, FLOATS))
@pytest.mark.usefixtures("large_tiles")
def test_stage(case, dtype, path):
    x, w = image(case, DTYPES[dtype]), weights(case, DTYPES[dtype])
    if path == "split" or case.channels <= 384:
        check("block", *block_arguments(x, w, case.act))
    if path == "fused":
        if case.channels <= 384:
            check("pconv_pw", *pw_arguments(x, w, case.act))
        check("pconv3x3", x, w["w_partial"])
        check_in_place(x, w["w_partial"])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "channels", [3, *sorted({w << i for w in NETWORKS.values() for i in range(3)})]
)
@pytest.mark.usefixtures("large_tiles")
def test_stage_patch_conv(channels, dtype):
    side, c_out = (4, 40) if channels == 3 else (2, 2 * channels)
    x = randn(1, channels, 2 * side + 1, 3 * side, seed=1, dtype=DTYPES[dtype])
    x = x.to(memory_format=torch.channels_last)
    k = channels * side * side
    weight = randn(c_out, channels, side, side, seed=2, dtype=DTYPES[dtype], scale=k**-0.5)
    check("patch_conv", x, weight, randn(c_out, seed=3) + 1, randn(c_out, seed=4), True)


# ---- Edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, path", taking_turns(EDGES, PATHS), indirect=["path"])
def test_edge(case, path):
    fmt = FORMATS["nhwc" if path == "fused" else "nchw"]
    x, w = image(case, torch.float16, fmt), weights(case, torch.float16)
    check("block", *block_arguments(x, w, case.act, bare=path == "fused"))
    check("pconv_pw", *pw_arguments(x, w, case.act, bare=path == "split"))
    if path == "fused":
        check("pconv3x3", x, w["w_partial"])
        check_in_place(x, w["w_partial"])
    else:
        check_in_place(x[:, :, :4, :9], w["w_partial"])


def check_special(name, got, broken, clean, *args):
    """NaN and infinities stand where the float64 reference has them, and nothing else has moved:
    the bar is eager's on the clean image, because eager's own products may spread them."""
    plain = getattr(reference, name)
    exact, clean_exact = plain(broken.double(), *double(args)), plain(clean.double(), *double(args))
    assert torch.equal(got.isnan(), exact.isnan()) and torch.equal(got.isinf(), exact.isinf())
    assert torch.equal(got[got.isinf()].sign(), exact[exact.isinf()].to(got.dtype).sign())
    eager = errors(plain(clean, *args), clean_exact)
    allowed = allowed_errors(clean_exact, got.dtype, [eager])
    assert errors(got, exact).within(allowed), name


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("act, path", taking_turns(ACTS, PATHS), indirect=["path"])
def test_nan_and_infinity(act, path):
    case = Case(1, 40, 6, 7, act=act)
    x, w = image(case, torch.float16), weights(case, torch.float16)
    # In convolved and in untouched channels, in the middle, on a border, in a corner.
    for values in (
        {(0, 3, 3, 3): "nan", (0, 10, 5, 0): "-inf"},
        {(0, 9, 0, 6): "inf", (0, 39, 2, 2): "nan"},
    ):
        broken = x.clone()
        for where, value in values.items():
            broken[where] = float(value)
        args = block_arguments(x, w, act)[1:]
        check_special("block", KERNELS["block"](broken, *args), broken, x, *args)
        args = pw_arguments(x, w, act)[1:]
        check_special("pconv_pw", KERNELS["pconv_pw"](broken, *args), broken, x, *args)
        if path == "fused":
            weight = w["w_partial"]
            got = KERNELS["pconv3x3"](broken, weight)
            check_special("pconv3x3", got, broken, x, weight)
            in_place = broken.clone()
            KERNELS["pconv3x3_"](in_place, weight)
            check_special("pconv3x3", in_place, broken, x, weight)


@pytest.mark.parametrize(
    "case, dtype",
    taking_turns(
        [
            Case(1, 16, 17, 40, n_div=2),  # tiles in both directions, the last ones partly outside
            Case(2, 12, 33, 6, n_div=4),  # tiles that span the width; three channels
            Case(1, 20, 9, 34, n_div=2, extra=3),
        ],
        FLOATS,
    ),
)
def test_in_place_in_any_order(case, dtype, shuffled):
    check_in_place(image(case, DTYPES[dtype]), weights(case, DTYPES[dtype])["w_partial"])


def test_in_place_without_room_for_a_tile(monkeypatch):
    """More convolved channels than a program holds: through a copy of these channels."""
    case = Case(1, 260, 2, 3, n_div=1)
    launched = []
    original = common.launch

    def launch(kernel, *args, **kwargs):
        launched.append(kernel.__name__)
        original(kernel, *args, **kwargs)

    monkeypatch.setattr(pconv, "launch", launch)
    check_in_place(image(case), weights(case)["w_partial"])
    assert launched == ["pconv_kernel"]


def test_mixed_dtypes(path):
    """Under autocast x is float32 beside weights of 16 bits: only the operands are rounded."""
    case = Case(2, 40, 4, 5)
    x, w = image(case), weights(case, torch.float16)
    check("block", *block_arguments(x, w, "gelu"))
    check("pconv_pw", *pw_arguments(x, w, "gelu"))
    check("patch_conv", x, randn(24, 40, 2, 2, seed=3, dtype=torch.float16), None, None)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fmt", list(FORMATS))
@pytest.mark.parametrize("kernel", [(4, 4), (2, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 17, 40])
def test_patch_conv(channels, kernel, fmt, dtype):
    x = randn(2, channels + 2, 13, 9, seed=1, dtype=DTYPES[dtype]).to(memory_format=FORMATS[fmt])
    weight = randn(20, channels, *kernel, seed=2, dtype=DTYPES[dtype], scale=0.2)
    check("patch_conv", x[:, 1:-1], weight, None, randn(20, seed=4), True)
    check("patch_conv", x[:, 1:-1], weight, randn(20, seed=3), None, False)
    check("patch_conv", x[:0, 1:-1], weight, None, None, True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_head(act, dtype):
    x = randn(3, 40, 7, 7, seed=1, dtype=DTYPES[dtype]).to(memory_format=torch.channels_last)
    w_conv = randn(72, 40, 1, 1, seed=2, dtype=DTYPES[dtype], scale=0.2)
    w_fc = randn(11, 72, seed=3, dtype=DTYPES[dtype], scale=0.1)
    bias = randn(11, seed=4, dtype=DTYPES[dtype])
    check("head", x, w_conv, None, w_fc, bias, act)
    check("head", x, w_conv, randn(72, seed=5, dtype=DTYPES[dtype]), w_fc, None, act)
    check("head", x[:0], w_conv, None, w_fc, bias, act)


# ---- Packs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", [EDGES[0], Case(3, 13, 7, 9, n_div=3)], ids=lambda c: c.id)
def test_packed_has_the_bits_of_the_raw_op(case, dtype, path):
    x, w = image(case, DTYPES[dtype]), weights(case, DTYPES[dtype])
    matrices = [w["w_partial"], w["w_pw1"], w["w_pw2"]]
    pack = KERNELS["pack"](matrices, [None, w["scale"], w["layer_scale"]], [None, w["shift"], None])
    assert pack.dtype == x.dtype
    assert pack.numel() == layout.size([m.shape for m in matrices], x.dtype)
    sizes = case.c_partial, case.c_hidden
    got = KERNELS["block_packed"](x, pack, *sizes, w["sample_scale"], case.act)
    assert torch.equal(got, KERNELS["block"](*block_arguments(x, w, case.act)))
    pack = KERNELS["pack"](matrices[:2], [None, w["scale"]], [None, w["shift"]])
    got = KERNELS["pconv_pw_packed"](x, pack, *sizes, case.act)
    assert torch.equal(got, KERNELS["pconv_pw"](*pw_arguments(x, w, case.act)))


def test_pack_of_another_dtype():
    """Under autocast a pack of float32 weights meets x of 16 bits, as the weights would."""
    case = Case(2, 40, 4, 5)
    x, w = image(case, torch.float16), weights(case)
    pack = KERNELS["pack"]([w["w_partial"], w["w_pw1"]], [None, w["scale"]], [None, w["shift"]])
    got = KERNELS["pconv_pw_packed"](x, pack, case.c_partial, case.c_hidden, "relu")
    half = {name: t.half() for name, t in w.items()} | {"scale": w["scale"], "shift": w["shift"]}
    assert torch.equal(got, KERNELS["pconv_pw"](*pw_arguments(x, half, "relu")))


@pytest.mark.parametrize("dtype", FLOATS)
def test_network(dtype):
    """A stem, a block, a merging layer, a block, two outputs: on packs against raw weights."""
    dtype = DTYPES[dtype]
    first, second = Case(2, 16, 5, 4, act="gelu"), Case(2, 32, 2, 2)
    packs, exact_weights = [], []

    def add(matrices, scales, shifts):
        packs.append(KERNELS["pack"](matrices, scales, shifts))
        exact_weights.append(reference.pack(*double((matrices, scales, shifts))))

    steps = []
    for case, c_in, side in ((first, 3, 4), (second, 16, 2)):
        w, c = weights(case, dtype), case.channels
        patch = randn(c, c_in, side, side, seed=9, dtype=dtype, scale=(c_in * side**2) ** -0.5)
        add([patch], [randn(c, seed=3)], [randn(c, seed=4)])
        steps += [reference.PATCH_CONV, c, side, side, 0]
        add(
            [w["w_partial"], w["w_pw1"], w["w_pw2"]],
            [None, w["scale"], w["layer_scale"]],
            [None, w["shift"], None],
        )
        act = ACTS.index(case.act)
        steps += [reference.BLOCK, case.c_partial, case.c_hidden, 0, act]
        steps += [reference.EMIT, 0, 0, 0, 0]
    add([randn(20, 32, 1, 1, seed=5, dtype=dtype), randn(6, 20, seed=6, dtype=dtype)], [None] * 2,
        [None, randn(6, seed=7)])  # fmt: skip
    steps += [reference.HEAD, 20, 6, 0, ACTS.index("relu")]
    x = randn(2, 3, 21, 16, seed=1, dtype=dtype)
    got = KERNELS["network"](x, packs, steps)
    exact = reference.network(x.double(), exact_weights, steps)

    assert len(got) == len(exact) == 3
    for i, (a, b) in enumerate(zip(got, exact)):
        assert a.dtype == dtype
        if a.dim() == 4:
            assert a.is_contiguous(memory_format=torch.channels_last)
        assert_right(a, b, eager_network(dtype, x, exact_weights, steps, i), what=f"output {i}")


def eager_network(dtype, x, packs, steps, i):
    """The i-th output where every layer is eager in ``dtype``, its weights rounded to it."""
    outputs, remaining = [], iter(packs)
    for kind, a, b, c, act in zip(*[iter(steps)] * 5):
        if kind == reference.PATCH_CONV:
            ((w, shift),) = reference.unpack(next(remaining), [(a, x.shape[1], b, c)])
            x = reference.patch_conv(x, w.to(dtype), None, shift.float(), True)
        elif kind == reference.BLOCK:
            channels = x.shape[1]
            shapes = [(a, a, 3, 3), (b, channels, 1, 1), (channels, b, 1, 1)]
            (wp, _), (w1, shift), (w2, _) = reference.unpack(next(remaining), shapes)
            wp, w1, w2 = (w.to(dtype) for w in (wp, w1, w2))
            act = ACTS[act]
            x = reference.block(x, wp, w1, w2, None, shift.float(), None, None, act)
        elif kind == reference.EMIT:
            outputs.append(x)
        else:
            shapes = [(a, x.shape[1], 1, 1), (b, a, 1, 1)]
            (w, _), (fc, bias) = reference.unpack(next(remaining), shapes)
            w, fc, bias = (t.to(dtype) for t in (w, fc[:, :, 0, 0], bias))
            outputs.append(reference.head(x, w, None, fc, bias, ACTS[act]))
    return outputs[i]


# ---- What stands around the kernels --------------------------------------------------------------


def test_recorded_launches_need_no_data():
    """Launchers look at shapes only: they never wait for the GPU, and CUDA graphs capture them."""
    case = Case(256, 40, 56, 56)
    args = block_arguments(image(Case(1, 40, 1, 1)), weights(case), "gelu")
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    args[0] = torch.empty((256, 40, 56, 56), device="meta").to(memory_format=torch.channels_last)
    with common.record() as launches:
        KERNELS["block"](*args)
    assert [launch.kernel.__name__ for launch in launches] == ["block_kernel"]
    assert launches[0].args["M"] == 256 * 56 * 56
    args[0] = torch.empty((1, 40, 56, 56), device="meta").to(memory_format=torch.channels_last)
    with common.record(multiprocessors=1000) as launches:
        KERNELS["block"](*args)
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["pconv_kernel", "gemm_kernel", "gemm_kernel"]


def test_configuration_of_an_unknown_device():
    common._table.cache_clear()
    common._nearest.cache_clear()
    device = common.Device((12, 9), 10, 99 * 1024)
    with pytest.warns(RuntimeWarning, match="no tuning for compute capability 12.9"):
        found = common.config("block", (40, 80, 100), torch.float16, device)
    assert found == common.config(
        "block", (40, 80, 100), torch.float16, common.Device((12, 0), 10, 99 * 1024)
    )


def test_images_too_large_are_refused():
    x = torch.empty((1, 16, 2**15, 2**15), device="meta").to(memory_format=torch.channels_last)
    weight = torch.empty((4, 4, 3, 3), device="meta")
    with common.record(), pytest.raises(ValueError, match="expected less than 2\\^30 pixels"):
        KERNELS["pconv3x3"](x, weight)


def test_every_op_has_a_kernel():
    assert set(KERNELS) <= set(ops.SCHEMAS)
    missing = set(ops.SCHEMAS) - set(KERNELS)
    composed = {"batch_norm_layer", "batch_norm_layer_backward"}  # of others, by their reference
    assert missing == {"head_backward", *composed}  # two products of B rows


def test_registration():
    """As in a torch with CUDA: every op gets its kernel under the CUDA key, float64 the reference,
    and the kernels are not imported before a call."""
    program = """
import sys, torch
torch.version.cuda = "13.0"
import fasternet_kernels as fk
assert "fasternet_kernels.triton.common" not in sys.modules
assert all(fk.library.has_kernel(op, "cuda") for ops in fk.triton.FAMILIES.values() for op in ops)
x, w = torch.randn(2, 8, 3, 3).double(), torch.randn(2, 2, 3, 3).double()
assert torch.equal(fk.triton._dispatch("pconv3x3")(x, w), fk.reference.pconv3x3(x, w))
try:
    fk.triton._dispatch("pconv_pw_packed")(x, torch.zeros(200), 2, 8, "relu")
except TypeError as error:
    assert "float64" in str(error)
else:
    raise AssertionError
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)


def test_families_name_their_kernels():
    for family, names in FAMILIES.items():
        module = importlib.import_module(f"fasternet_kernels.triton.{family}")
        assert set(names) == set(module.KERNELS)
