"""The Triton kernels of training and of every backward pass, in Triton's interpreter on CPU tensors
(float32 and float16: its bfloat16 products are wrong), against float64."""

import functools
import math
import mmap
import os

import pytest
import torch
import torch.nn.functional as F
from cases import (
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
    slow_if,
    taking_turns,
    weights,
)

if torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
    pytest.skip(
        "there is a GPU, whose tests are in test_gpu.py; these alone run with TRITON_INTERPRET=1",
        allow_module_level=True,
    )

from triton.runtime.interpreter import GridExecutor, interpreter_builder

from fasternet_kernels import reference
from fasternet_kernels.reference import ACTS
from fasternet_kernels.triton import backward, common, kernel, training

# Every stage's channels, few pixels.
STAGES = [
    Case(2, width << stage, 3, 4 - stage % 2, act="gelu" if name in ("t0", "t1") else "relu")
    for name, width in NETWORKS.items()
    for stage in range(4)
]
LAST_STAGES = STAGES[3::4]  # behind which nothing merges
SMALL = Case(2, 24, 5, 6, act="gelu")
# More than a tile of pixels, and C_partial that is no multiple of 8.
TILES = [Case(3, 40, 11, 9, act="gelu"), Case(2, 13, 12, 13, n_div=3, act="silu")]
FLOATS = ["fp32", "fp16"]


@pytest.fixture
def shipped_tiles(monkeypatch):
    """The tiles that run on a GPU, not the interpreter's: several blocks of columns."""
    monkeypatch.setattr(training, "ALL_COLUMNS", False)


@pytest.fixture
def few_programs():
    """A grid of few programs, each with several tiles of pixels."""
    with common.pretend(multiprocessors=1):
        yield


def arguments(case, dtype, fmt=torch.channels_last):
    """name -> (arguments, position of the mask or None, how many gradients)."""
    x, w = image(case, dtype, fmt), weights(case, dtype)
    partial, pw1, pw2 = w["w_partial"], w["w_pw1"], w["w_pw2"]
    shape = case.batch, case.c_hidden, case.height, case.width
    z = randn(*shape, seed=21, dtype=dtype).to(memory_format=fmt)
    mean = randn(case.c_hidden, seed=22)
    vectors = mean, w["scale"], w["shift"]
    dstats = [randn(case.c_hidden, seed=s, scale=0.1) for s in (45, 46)]
    dy, dz = (randn(*t.shape, seed=s, dtype=dtype) for t, s in ((x, 47), (z, 48)))
    dy, dz = dy.to(memory_format=fmt), dz.to(memory_format=fmt)
    scales = w["layer_scale"], w["sample_scale"]
    none = None, None
    act = case.act
    # Merging patches of 2 x 2 where the image has them.
    size = min(2, case.height), min(2, case.width)
    patch = randn(case.c_hidden, case.channels, *size, seed=49, dtype=dtype)
    patch *= (case.channels * size[0] * size[1]) ** -0.5
    shape = *shape[:2], case.height // size[0], case.width // size[1]
    patches, dpatches = (
        randn(*shape, seed=s, dtype=dtype).to(memory_format=torch.channels_last) for s in (50, 51)
    )
    cp = case.c_partial
    return {
        "pw_stats": ((x, partial, pw1), 0),
        "patch_stats": ((x, patch), 0),
        "bn_act": ((z, *vectors, act), 0),
        "act_pw_residual": ((x, z, *vectors, pw2, *scales, act), 0),
        "act_pw_residual bare": ((x, z, *vectors, pw2, *none, act), 0),
        "pconv3x3_backward": ((dy, x[:, :cp], partial), 2),
        "pw_stats_backward": ((dz, *dstats, x, z, mean, partial, pw1), 3, dy),
        "pw_stats_backward alone": ((dz, *dstats, x, z, mean, partial, pw1), 3),
        "patch_stats_backward": ((dpatches, *dstats, x, patches, mean, patch), 2),
        "bn_act_backward": ((dz, z, *vectors, act), 4),
        "bn_act_recompute_backward": ((dz, x, *vectors, partial, pw1, act), 4),
        "act_pw_residual_backward": ((dy, z, *vectors, pw2, *scales, act), 7),
        "act_pw_residual_backward bare": ((dy, z, *vectors, pw2, *none, act), 5),
        "act_pw_residual_recompute_backward": (
            (dy, x, *vectors, partial, pw1, pw2, *scales, act),
            7,
        ),
        "pconv_pw_backward": ((dz, x, partial, pw1, w["scale"], w["shift"], act), 5),
        "pconv_pw_backward bare": ((dz, x, partial, pw1, *none, act), 3),
        "block_backward": (
            (dy, x, partial, pw1, pw2, w["scale"], w["shift"], *scales, act),
            8,
        ),
        "block_backward bare": ((dy, x, partial, pw1, pw2, *none, *none, act), 4),
    }


NAMES = list(arguments(Case(1, 8, 2, 2), torch.float32))
BACKWARD = [name for name in NAMES if "backward" in name]
PARITY = [name for name in NAMES if "recompute" not in name]  # whose bits have a test of their own
STAGE_NAMES = [name for name in PARITY if len(name.split()) == 1]
# Those that are composed of the others' launches are left out where it takes long.
SINGLE = [name for name in STAGE_NAMES if name not in ("pconv_pw_backward", "block_backward")]


def outputs_of(name):
    """How many tensors the op's mask speaks of."""
    schema = getattr(torch.ops.fasternet_kernels, name.split()[0]).default._schema
    return len(schema.returns) - ("recompute" in name)


def run(fn, name, call, mask=None):
    args, n, *after = call
    if n:
        args = (*args, [i < n for i in range(outputs_of(name))] if mask is None else mask, *after)
    found = fn(*args)
    return found if isinstance(found, tuple) else (found,)


def loop_conv_backward(grad, x, weight, need_x, need_weight, stride=(1, 1), padding=0):
    """The gradients of a convolution, one multiply and one add at a time; its stride is 1 or the
    kernel."""
    kernel = weight.shape[2:]
    dx = dw = None
    if need_x and padding:
        dx = loop_conv(grad, weight.flip(2, 3).transpose(0, 1), padding=kernel[0] - 1 - padding)
    elif need_x:  # no pixel is in two patches
        columns = loop_conv(grad, weight.flatten(1).t()[:, :, None, None])
        dx = F.fold(columns.float().flatten(2), x.shape[2:], kernel, stride=stride).to(grad.dtype)
    if need_weight:
        columns = F.unfold(x.float(), kernel, padding=padding, stride=stride)
        dw = torch.zeros(weight.shape).flatten(1)
        for g, a in zip(
            *(t.transpose(1, 2).flatten(0, 1) for t in (grad.float().flatten(2), columns))
        ):
            dw = dw + g[:, None] * a
        dw = dw.reshape(weight.shape).to(weight.dtype)
    return dx, dw


def in_loops(name, call):
    """The reference with plain loops for convolutions, in the same dtype."""
    op = getattr(reference, name.split()[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference.F, "conv2d", loop_conv)
        patch.setattr(reference, "_conv_backward", loop_conv_backward)
        return run(op, name, call)


def in_order_statistics(z):
    """(mean, m2) of each channel, one pixel after another in float32 (Welford's method)."""
    rows = z.float().permute(0, 2, 3, 1).flatten(0, 2)
    mean, m2 = torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
    for n, row in enumerate(rows, 1):
        delta = row - mean
        mean = mean + delta / n
        m2 = m2 + delta * (row - mean)
    return mean, m2


def in_order(rows):
    """The sum of the rows, one after another; cumsum would add floats in double."""
    return functools.reduce(torch.add, rows, torch.zeros_like(rows[0]))


def in_order_sums(op, args):
    """(dmean, dscale, dshift) of dz's ops in float32, one pixel after another."""
    grad, z, mean, scale, shift, *rest, act = args
    da = grad.float()
    if op == "act_pw_residual_backward":
        w_pw2, layer, sample = rest
        if layer is not None:
            da = da * layer[:, None, None] * sample[:, None, None, None]
        da = F.conv_transpose2d(da, w_pw2.float())
    centred = z - mean[:, None, None]
    t = centred * scale[:, None, None] + shift[:, None, None]
    dt = reference.act_backward(da, t, act)
    dscale, dshift = (
        in_order(terms.permute(0, 2, 3, 1).flatten(0, 2)) for terms in (dt * centred, dt)
    )
    return -scale * dshift, dscale, dshift


def in_order_dsample(op, call):
    """dsample_scale: its exact terms added one after another."""
    grad, *args = double(call[0])
    if op == "block_backward":
        branch = reference.block(*args[:-2], None, args[-1]) - args[0]
    else:
        branch = reference.act_pw_residual(torch.zeros_like(grad), *args[:-2], None, args[-1])
    return in_order((grad * branch).float().flatten(1).t())


def check(name, call):
    """The kernel against the reference in float64, beside the reference in the same dtype and, for
    sums over pixels, a plain loop."""
    op = name.split()[0]
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in call[0]]
    got = run(kernel(op), name, call)
    for t, old in zip(call[0], before):
        if isinstance(t, torch.Tensor):
            assert torch.allclose(t, old, rtol=0, atol=0, equal_nan=True), "an input was changed"
    exact = list(run(getattr(reference, op), name, double(call)))
    eager = run(getattr(reference, op), name, call)
    loops = functools.cache(lambda: in_loops(name, call))
    rivals = [[e, lambda i=i: loops()[i]] for i, e in enumerate(eager)]
    if op in ("pw_stats", "patch_stats"):  # the statistics are those of z as stored
        exact[1:] = reference.statistics(got[0].double())
        for i, rival in enumerate(reference.statistics(got[0]), 1):
            rivals[i] = [rival, lambda i=i: in_order_statistics(got[0])[i - 1]]
    if op in ("bn_act_backward", "act_pw_residual_backward"):
        for i in (1, 2, 3):
            rivals[i].append(lambda i=i: in_order_sums(op, call[0])[i - 1])
    if op in ("block_backward", "act_pw_residual_backward"):
        rivals[-1].append(lambda: in_order_dsample(op, call))
    for i, (g, e, of_same_dtype) in enumerate(zip(got, exact, rivals, strict=True)):
        assert_right(g, e, *of_same_dtype, what=f"{name}: output {i}")
        assert g.dtype == eager[i].dtype
        assert g.stride() == eager[i].stride(), f"{name}: strides of output {i}"
    return got


@pytest.mark.parametrize("case, dtype", taking_turns(STAGES, FLOATS))
@pytest.mark.usefixtures("large_tiles")
def test_stages(case, dtype):
    """Every kernel at every stage's channels of T0 to L."""
    calls = arguments(case, DTYPES[dtype])
    for name in SINGLE:
        if not (name.startswith("patch") and case in LAST_STAGES):
            check(name, calls[name])


@pytest.mark.parametrize("name, dtype", taking_turns(PARITY, FLOATS))
def test_many_tiles(name, dtype, few_programs):
    """Several tiles of pixels in a program, and several programs."""
    check(name, arguments(TILES[FLOATS.index(dtype)], DTYPES[dtype])[name])


@pytest.mark.parametrize(
    "channels, dtype, wide",
    [(80, "fp32", 80), pytest.param(144, "fp16", 256, marks=pytest.mark.slow)],
)
def test_shipped_tiles(channels, dtype, wide, shipped_tiles, monkeypatch):
    """Several blocks of channels; both places where the partial convolution runs; the gradient of z
    in memory from ``wide`` channels on."""
    monkeypatch.setattr(backward, "WIDE", wide)
    calls = arguments(Case(3, channels, 3, 2), DTYPES[dtype])
    for name in SINGLE:
        check(name, calls[name])


@pytest.mark.parametrize(
    "case",
    slow_if(
        lambda i, _: i % 2, [c for c in EDGES if c.channels < 100 and c.width < 100], lambda c: c.id
    ),
)
def test_edges(case):
    calls = arguments(case, torch.float32)
    if case.batch == 1:  # dsample_scale is then one number: too few to judge by
        calls["act_pw_residual_backward"] = (calls["act_pw_residual_backward"][0], 6)
    for name in SINGLE:
        if case.batch or name not in ("pw_stats", "patch_stats"):
            check(name, calls[name])


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    "name", ["bn_act", "act_pw_residual", "bn_act_backward", "act_pw_residual_backward"]
)
def test_acts(name, act):
    """With values at the activations' kinks, and NaN and infinities where bn_act has them."""
    call = arguments(Case(2, 24, 5, 6, act=act), torch.float32)[name]
    z = call[0][1 if name.startswith("act") else 0 if name == "bn_act" else 1]
    mean, scale, shift = (t for t in call[0] if isinstance(t, torch.Tensor) and t.shape == (48,))
    mean[:6], scale[:6], shift[:6] = 0, 1, 0
    z[0, :5, 0, 0] = torch.tensor([0.0, -0.0, 3.0, -3.0, 20.0])
    if "residual" not in name:
        z[0, :3, 1, 1] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    if name == "bn_act_backward":
        # A sum with a NaN or an infinity is not to be compared.
        call = (call[0], 1)
    check(name, call)


@pytest.mark.parametrize("name", slow_if(lambda _, name: " " in name, BACKWARD))
def test_output_masks(name):
    """Each gradient alone is what it is among all; the others are empty."""
    call = arguments(SMALL, torch.float32)[name]
    n, outputs = call[1], outputs_of(name)
    op = kernel(name.split()[0])
    everything = run(op, name, call)
    first = len(everything) - outputs
    for i in range(n):
        found = run(op, name, call, [j == i for j in range(outputs)])
        for j in range(outputs):
            expected = everything[first + j] if j == i else torch.empty(0)
            assert torch.equal(found[first + j], expected)
    assert all(t.numel() == 0 for t in run(op, name, call, [False] * outputs)[first:])


@pytest.mark.parametrize("kind", ["nchw", "expanded", "strided", "slice"])
@pytest.mark.parametrize("name", [name for name in SINGLE if name in BACKWARD])
def test_layouts_of_the_gradient(name, kind):
    """The incoming gradient, and dy, in any layout: the bits do not change."""
    args, n, *after = arguments(SMALL, torch.float32)[name]
    make = {
        "nchw": lambda g: g.contiguous(),
        "expanded": lambda g: g[:1, :1, :1, :1].expand(g.shape),
        "strided": lambda g: torch.stack((g, g), dim=-1)[..., 0],
        "slice": lambda g: torch.cat((g, g), 1)[:, 3 : 3 + g.shape[1]],
    }[kind]
    layouts = []
    for dense in (False, True):
        changed = [make(g) for g in (args[0], *after)]
        if dense:
            changed = [g.contiguous(memory_format=torch.channels_last) for g in changed]
        layouts.append(
            run(kernel(name.split()[0]), name, ((changed[0], *args[1:]), n, *changed[1:]))
        )
    for a, b in zip(*layouts, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in SINGLE if name in BACKWARD])
def test_channels_last_weights(name):
    """Weights in channels_last memory have gradients in it, of the same bits."""
    args, *others = arguments(SMALL, torch.float32)[name]
    last = [
        t.to(memory_format=torch.channels_last)
        if isinstance(t, torch.Tensor) and t.dim() == 4
        else t
        for t in args
    ]
    expected = run(kernel(name.split()[0]), name, (args, *others))
    for a, b in zip(check(name, (tuple(last), *others)), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", PARITY)
def test_nchw(name):
    """Images in PyTorch's default layout come out in it."""
    check(name, arguments(SMALL, torch.float32, FORMATS["nchw"])[name])


@pytest.mark.parametrize("name", PARITY)
def test_mixed_dtypes(name):
    """Under autocast: the block's input in float32 beside weights and z in float16."""
    args, n, *after = arguments(SMALL, torch.float16)[name]
    shape = (SMALL.batch, SMALL.channels, SMALL.height, SMALL.width)
    args, after = (
        [t.float() if isinstance(t, torch.Tensor) and t.shape == shape else t for t in ts]
        for ts in (args, after)
    )
    check(name, (tuple(args), n, *after))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "channels, kernel, size, fmt",
    [(3, (4, 4), (9, 14), "nchw"), (3, (4, 4), (8, 8), "nhwc"), (40, (2, 2), (6, 5), "nhwc")],
    ids=["stem", "stem-nhwc", "merging"],
)
def test_patches(channels, kernel, size, fmt, dtype, few_programs):
    """Stem and merging layers. Pixels that no patch covers have a gradient of zero."""
    dtype = DTYPES[dtype]
    x = randn(3, channels, *size, seed=1, dtype=dtype).to(memory_format=FORMATS[fmt])
    weight = randn(24, channels, *kernel, seed=2, dtype=dtype, scale=0.2)
    grad = randn(3, 24, size[0] // kernel[0], size[1] // kernel[1], seed=3, dtype=dtype)
    scale, shift = (randn(24, seed=s) for s in (4, 5))
    check("patch_conv_backward", ((grad, x, weight, scale, shift), 4))
    check("patch_conv_backward", ((grad, x, weight, None, None), 2))
    z, mean, _ = check("patch_stats", ((x, weight), 0))
    dstats = [randn(24, seed=s, scale=0.1) for s in (6, 7)]
    check("patch_stats_backward", ((grad, *dstats, x, z, mean, weight), 2))


@pytest.mark.parametrize(
    "lean", ["bn_act_recompute_backward", "act_pw_residual_recompute_backward"]
)
def test_recompute(lean):
    """z has the bits of pw_stats, and the gradients those of the op that is given it."""
    args, n = arguments(SMALL, torch.float16)[lean]
    grad, x, *vectors, partial, pw1 = args[:7]
    z = kernel("pw_stats")(x, partial, pw1)[0]
    plain = kernel(lean.replace("_recompute", ""))
    expected = (z, *plain(grad, z, *vectors, *args[7:], [True] * n))
    for a, b in zip(run(kernel(lean), lean, (args, n)), expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_recompute_of_patches():
    calls = arguments(SMALL, torch.float16)
    (x, patch), _ = calls["patch_stats"]
    grad = calls["patch_stats_backward"][0][0]
    _, _, *vectors, act = calls["bn_act_backward"][0]
    z = kernel("patch_stats")(x, patch)[0]
    assert torch.equal(z, kernel("patch_conv")(x, patch, None, None, True))
    expected = (z, *kernel("bn_act_backward")(grad, z, *vectors, act, [True] * 4))
    got = kernel("bn_act_recompute_backward")(grad, x, *vectors, None, patch, act, [True] * 4)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("batch, size", [(5, 12), (1, 1), (2, 2)])
def test_statistics_of_a_large_mean(batch, size, dtype, few_programs):
    """Mean 1e4 (float16: 1e3) and standard deviation 1: sums of squares would leave no digit."""
    case = Case(batch, 24, size, size)
    x, w = image(case, DTYPES[dtype]), weights(case, DTYPES[dtype])
    x[:, -1], w["w_pw1"][:, -1] = 1e4 if dtype == "fp32" else 1e3, 1
    patch = randn(48, 24, 1, 1, seed=9, dtype=x.dtype, scale=0.2)
    patch[:, -1] = 1
    for name, *args in (("pw_stats", x, w["w_partial"], w["w_pw1"]), ("patch_stats", x, patch)):
        _, mean, _ = check(name, (tuple(args), 0))
        assert mean.min() > 9e2


def test_gradients_beside_a_large_mean():
    calls = arguments(SMALL, torch.float32)
    for name, z in (
        ("pw_stats_backward", 4),
        ("patch_stats_backward", 4),
        ("bn_act_backward", 1),
        ("act_pw_residual_backward", 1),
    ):
        args = list(calls[name][0])
        args[z], args[z + 1] = args[z] + 1e4, args[z + 1] + 1e4
        check(name, (tuple(args), *calls[name][1:]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_masked_does_not_spread(value):
    """A NaN or an infinity beside the convolved channels, or in another image, stays where the
    reference has it: operands are masked, not multiplied by zero."""
    case = Case(2, 24, 5, 6, n_div=4)  # 6 convolved channels of 8 that are read
    for channel, pixel in ((6, (0, 0)), (7, (4, 5)), (2, (0, 5))):
        x, w = image(case), weights(case)
        x[0, channel, pixel[0], pixel[1]] = value
        z, *_ = kernel("pw_stats")(x, w["w_partial"], w["w_pw1"])
        exact = reference.pw_stats(*double((x, w["w_partial"], w["w_pw1"])))[0]
        assert torch.equal(z.isfinite(), exact.isfinite())
        grad = x.clone()
        dx, dw = kernel("pconv3x3_backward")(grad, image(case)[:, :6], w["w_partial"], [True] * 2)
        exact = reference.pconv3x3_backward(
            *double((grad, image(case)[:, :6], w["w_partial"])), [True] * 2
        )
        assert torch.equal(dx.isfinite(), exact[0].isfinite())
        if channel >= 6:
            assert dw.isfinite().all()


def test_a_pixel_stays_in_its_patch():
    """A NaN comes out of its own patch alone, and from a pixel that no patch covers nowhere."""
    calls = arguments(SMALL, torch.float32)
    (x, patch), _ = calls["patch_stats"]
    (dz, *dstats, _, z, mean, _), _ = calls["patch_stats_backward"]
    x[0, 0, 0, 2], x[:, :, 4] = float("nan"), float("nan")
    found = kernel("patch_stats")(x, patch)[0].isnan().all(1)
    assert found[0, 0, 1] and found.sum() == 1
    x[0, 0, 0, 2] = 0
    _, dw = kernel("patch_stats_backward")(dz, *dstats, x, z, mean, patch, [False, True])
    assert dw.isfinite().all()


def test_rows_beyond_the_last_have_no_gradient():
    """Without the statistics' part either, which may be infinite where z is not near its mean."""
    dz, dmean, dm2, x, z, mean, *others = arguments(SMALL, torch.float32)["pw_stats_backward"][0]
    args = dz, dmean, 100 * dm2, x, torch.full_like(z, 2e38), torch.full_like(mean, 2e38)
    for grad in kernel("pw_stats_backward")(*args, *others, [True] * 3):
        assert grad.isfinite().all()


def surrounded(value):
    """A tensor of the same values in memory that has NaN around them: images as the first of a
    batch and channels of wider ones, others as the first rows of longer ones."""
    if not isinstance(value, torch.Tensor):
        return value
    shape = list(value.shape)
    shape[0] += 2
    begin = 0
    if value.dim() == 4 and value.shape[2:] != (3, 3) and value.shape[3] > 2:
        shape[1], begin = shape[1] + 8, 4
    whole = torch.full(shape, float("nan"), dtype=value.dtype)
    if value.dim() == 4 and value.stride(1) == 1:
        whole = whole.to(memory_format=torch.channels_last)
    part = whole[: value.shape[0]]
    return (part[:, begin : begin + value.shape[1]] if begin else part).copy_(value)


@pytest.mark.parametrize("wide", [False, True], ids=["one-tile", "wide"])
@pytest.mark.parametrize("name", SINGLE)
def test_what_lies_around_is_not_read(name, wide, monkeypatch, few_programs):
    """Rows beyond the last pixel and columns beyond the last channel hold NaN: each operand is
    masked by itself, for zero times NaN is NaN."""
    if wide:  # shipped tiles, and the gradient of z in memory
        monkeypatch.setattr(training, "ALL_COLUMNS", False)
        monkeypatch.setattr(backward, "WIDE", 1)
    args, n, *after = arguments(Case(2, 40, 7, 6, act="silu"), torch.float32)[name]
    expected = run(kernel(name), name, (args, n, *after))
    around = tuple(map(surrounded, args)), n, *map(surrounded, after)
    assert torch.isnan(torch.as_strided(around[0][0], (2 * args[0].numel(),), (1,), 0)).any()
    for a, b in zip(run(kernel(name), name, around), expected, strict=True):
        assert torch.equal(a, b)


def test_the_same_bits_on_every_run(few_programs):
    """Of every kernel: the ops that are left out launch the same ones."""
    calls = arguments(TILES[0], torch.float32)
    for name in SINGLE:
        a, b = (run(kernel(name.split()[0]), name, calls[name]) for _ in range(2))
        assert all(torch.equal(s, t) for s, t in zip(a, b))


def meta(value):
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    return type(value)(map(meta, value)) if isinstance(value, (list, tuple)) else value


# ---- More than 2^31 elements and pixels ----------------------------------------------------------


def resized(value, batch, size):
    """A meta tensor for one of arguments(Case(8, 12, 4, 4)): that many images, of that size."""
    if not isinstance(value, torch.Tensor):
        return value
    shape = list(value.shape)
    if shape[0] == 8 and (len(shape) == 1 or (shape[2] == shape[3] and shape[2] in (2, 4))):
        shape = [batch, *shape[1:2], *(n * size // 4 for n in shape[2:])]
    fmt = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=value.dtype, device="meta", memory_format=fmt)


def recorded(name, call, batch=8, size=4):
    args, n, *after = call
    if (batch, size) != (8, 4):
        args, after = ([resized(t, batch, size) for t in ts] for ts in (args, after))
    with common.record() as launches:
        run(kernel(name.split()[0]), name, (tuple(args), n, *after))
    return launches


def sparse(shape, dtype):
    """Zeros, of which only the touched pages take memory."""
    size = math.prod(shape) * dtype.itemsize
    no_reserve = 0x4000
    try:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError as error:
        pytest.skip(f"this system maps no {size >> 30} GiB without having them: {error}")
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def far(meta, near):
    """As ``meta`` says, ending in what ``near`` has."""
    if meta.dim() == 4:
        b, c, h, w = meta.shape
        t = sparse((b, h, w, c), meta.dtype).permute(0, 3, 1, 2)
    else:
        t = sparse(meta.shape, meta.dtype)
    t[-near.shape[0] :] = near
    return t


@pytest.mark.parametrize("name", [*SINGLE, "act_pw_residual_backward bare"])
def test_the_last_of_many_pixels(name, monkeypatch):
    """2^31 pixels and eight images more: the program of the last tile reads and writes the last
    images as it does where there are no others."""
    table = common._nearest
    monkeypatch.setattr(common, "_nearest", lambda op, shape, *on: table(op, (*shape[:-1], 1), *on))
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)  # copies to itself
    index, builder = [], interpreter_builder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_dim", lambda *_: set_dim(*[2**31] * 3))
    monkeypatch.setattr(builder, "set_grid_idx", lambda *_: set_index(*index))
    call = arguments(Case(8, 12, 4, 4), torch.float32)[name]
    if name in ("pw_stats_backward", "patch_stats_backward"):
        call[0][1].zero_()  # dmean, which is divided by the number of pixels
    made = {}  # address of a meta tensor's replacement
    for near, there in zip(recorded(name, call), recorded(name, call, 2**27 + 8), strict=True):
        if "programs" in near.args:  # sums of what programs found
            continue
        there_args = dict(there.args)
        for key, t in there.args.items():
            if isinstance(t, torch.Tensor) and t.is_meta:
                t_near = near.args[key]
                if t.shape == t_near.shape:  # a weight, or a vector
                    there_args[key] = t_near
                else:  # before anything is written to t_near
                    made.setdefault(id(t), (t, far(t, t_near)))
                    there_args[key] = made[id(t)][1]
        both = dict(near.args), there_args
        for launch, args in zip((near, there), both):
            tiles = -(-(args["rows"] if "rows" in args else args["M"]) // args["BLOCK_M"])
            axis = 0
            if "tiles_per_program" in args:
                axis = len(launch.grid) - 1
                args["tiles_per_program"] = 1
                partial = args["partial_ptr"]
                if partial is not None:
                    args["partial_ptr"] = sparse((tiles, *partial.shape[1:]), partial.dtype)
            else:
                assert launch.grid[0] == tiles
            index[:] = [tiles - 1 if i == axis else 0 for i in range(3)]
            launch.kernel[(1,)](**args, num_warps=4, num_stages=1)
        for key, t in both[0].items():
            if isinstance(t, torch.Tensor):
                last = 1 if key == "partial_ptr" else 4
                assert torch.equal(t[-last:].nan_to_num(7), both[1][key][-last:].nan_to_num(7))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_out_of_reach_is_refused(name):
    """Images and weights of which 32 bits do not reach every element from a program's first."""
    call = arguments(Case(8, 12, 4, 4), torch.float32)[name]
    assert recorded(name, call, 2**27)
    with pytest.raises(ValueError, match="expected less than 2\\^30 pixels an image"):
        recorded(name, call, 1, 2**16)
    if name != "bn_act" and not name.startswith("bn_act_backward"):
        wide = [
            torch.empty((2**15, 2**15, *t.shape[2:]), device="meta")
            if isinstance(t, torch.Tensor) and t.dim() == 4 and t.shape[0] != 8
            else t
            for t in meta(call[0])
        ]
        with pytest.raises(ValueError, match="expected less than 2\\^30 elements"):
            recorded(name, (tuple(wide), *meta(call[1:])))


@pytest.mark.parametrize("name", NAMES)
def test_recorded_on_meta_tensors(name, shipped_tiles):
    """Launchers need no data, so they never wait for a GPU, and outputs are as the fakes say."""
    call = meta(arguments(Case(2, 320, 7, 7), torch.bfloat16)[name])
    with common.record() as launches:
        got = run(kernel(name.split()[0]), name, call)
    assert launches
    for launch in launches:
        assert all(0 < n < 2**31 for n in launch.grid)
        assert all(n < 2**16 for n in launch.grid[1:])
    fakes = run(getattr(torch.ops.fasternet_kernels, name.split()[0]), name, call)
    for g, f in zip(got, fakes, strict=True):
        assert g.shape == f.shape and g.dtype == f.dtype and g.stride() == f.stride()
