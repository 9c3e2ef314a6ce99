"""Every op against float64: forward, gradients, layouts, special values, and that the bits do not
move."""

import functools

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    EDGES,
    FORMATS,
    STAGES,
    Case,
    assert_right,
    double,
    image,
    loop_conv,
    randn,
    weights,
)
from torch.utils.flop_counter import FlopCounterMode

import fasternet_kernels as fk
from fasternet_kernels import reference
from fasternet_kernels.reference import ACTS, BLOCK, EMIT, HEAD, PATCH_CONV

OPS = torch.ops.fasternet_kernels


def plain_act(x, act):
    return {
        "identity": lambda: x,
        "relu": lambda: F.relu(x),
        "gelu": lambda: F.gelu(x),
        "gelu_tanh": lambda: F.gelu(x, approximate="tanh"),
        "silu": lambda: F.silu(x),
        "hardswish": lambda: F.hardswish(x),
    }[act]()


def plain_pconv(x, weight, conv=F.conv2d):
    """The official split-cat forward, written independently of the package's reference."""
    first, rest = torch.split(x, [weight.shape[0], x.shape[1] - weight.shape[0]], dim=1)
    return torch.cat((conv(first, weight, padding=1), rest), dim=1)


def vector(v):
    return v.reshape(1, -1, 1, 1)


def plain_pconv_pw(x, w_partial, w_pw, scale, shift, act, conv=F.conv2d):
    z = conv(plain_pconv(x, w_partial, conv), w_pw)
    z = z if scale is None else z * vector(scale).to(z.dtype)
    z = z if shift is None else z + vector(shift).to(z.dtype)
    return plain_act(z, act)


def plain_block(
    x,
    w_partial,
    w_pw1,
    w_pw2,
    scale=None,
    shift=None,
    layer_scale=None,
    sample_scale=None,
    act="relu",
    conv=F.conv2d,
):
    y = conv(plain_pconv_pw(x, w_partial, w_pw1, scale, shift, act, conv), w_pw2)
    y = y if layer_scale is None else y * vector(layer_scale).to(y.dtype)
    y = y if sample_scale is None else y * sample_scale.reshape(-1, 1, 1, 1).to(y.dtype)
    return x + y


def plain_patch_conv(x, weight, scale, shift, conv=F.conv2d):
    y = conv(x, weight, stride=tuple(weight.shape[2:]))
    y = y if scale is None else y * vector(scale).to(y.dtype)
    return y if shift is None else y + vector(shift).to(y.dtype)


def plain_head(x, w_conv, b_conv, w_fc, b_fc, act, conv=F.conv2d):
    pooled = x.mean((2, 3), keepdim=True)
    b_conv = b_conv if b_conv is None else b_conv.to(x.dtype)
    b_fc = b_fc if b_fc is None else b_fc.to(x.dtype)
    return conv(plain_act(conv(pooled, w_conv, b_conv), act), w_fc[:, :, None, None], b_fc).flatten(
        1
    )


def check(op, plain, x, *args, fmt=None, **kwargs):
    """op(x, *args) against plain in float64; eager plain and a plain loop in x's dtype set the bar.
    Inputs must not change."""
    tensors = [t for t in (x, *args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    y = op(x, *args, **kwargs)
    for t, b in zip(tensors, before):
        assert torch.equal(t, b) or (
            t.isnan().any() and torch.equal(t.nan_to_num(), b.nan_to_num())
        ), "an input changed"
    exact = plain(double(x), *double(args), **double(kwargs))
    assert_right(
        y,
        exact,
        plain(x, *args, **kwargs),
        lambda: plain(x, *args, conv=loop_conv, **kwargs),
        what=getattr(op, "__name__", str(op)),
    )
    if y.dim() == 4 and y.numel() > 0:
        assert y.is_contiguous(memory_format=fmt or reference.memory_format(x)), (
            f"strides {y.stride()}"
        )
    return y


def block_args(case, dtype, scales=True):
    w = weights(case, dtype)
    names = ["w_partial", "w_pw1", "w_pw2"]
    names += ["scale", "shift", "layer_scale", "sample_scale"]
    return [w[name] if scales or name.startswith("w_") else None for name in names]


# ---- Parity --------------------------------------------------------------------------------------


# From the simplest op to the ones built on it: the first failure names the culprit.


@pytest.mark.parametrize("case", [*STAGES[::5], *EDGES], ids=lambda c: c.id)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pconv3x3(case, dtype, fmt):
    x, w = image(case, DTYPES[dtype], FORMATS[fmt]), weights(case, DTYPES[dtype])["w_partial"]
    y = check(OPS.pconv3x3, plain_pconv, x, w)
    assert torch.equal(y[:, case.c_partial :], x[:, case.c_partial :])
    # In place: the same bits, and nothing else in the memory around x moves.
    wide = randn(case.batch, case.channels + 6, case.height, case.width, seed=9, dtype=x.dtype).to(
        memory_format=FORMATS[fmt]
    )
    wide[:, 2:-4] = x
    before = wide.clone()
    inner = wide[:, 2:-4]
    assert OPS.pconv3x3_(inner, w) is None
    assert torch.equal(inner, y)
    assert torch.equal(wide[:, :2], before[:, :2]) and torch.equal(wide[:, -4:], before[:, -4:])


@pytest.mark.parametrize("case", [*STAGES[::5], *EDGES], ids=lambda c: c.id)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pconv_pw(case, dtype, fmt):
    w = weights(case, DTYPES[dtype])
    x = image(case, DTYPES[dtype], FORMATS[fmt])
    check(
        OPS.pconv_pw,
        plain_pconv_pw,
        x,
        w["w_partial"],
        w["w_pw1"],
        w["scale"],
        w["shift"],
        case.act,
    )
    check(OPS.pconv_pw, plain_pconv_pw, x, w["w_partial"], w["w_pw1"], None, None, case.act)


@pytest.mark.parametrize("case", STAGES, ids=lambda c: c.id)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_block_stages(case, dtype):
    args = block_args(case, DTYPES[dtype])
    args[6] = None  # without a sample scale the residual joins in the kernel's epilogue
    check(OPS.block, plain_block, image(case, DTYPES[dtype]), *args, case.act)


@pytest.mark.parametrize("case", EDGES, ids=lambda c: c.id)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_edges(case, dtype, fmt):
    x = image(case, DTYPES[dtype], FORMATS[fmt])
    for scales in (True, False):
        check(OPS.block, plain_block, x, *block_args(case, DTYPES[dtype], scales), case.act)


PATCHES = [
    # batch, channels, height, width, c_out, kh, kw
    (1, 3, 32, 32, 40, 4, 4),
    (2, 40, 8, 10, 80, 2, 2),
    (1, 3, 17, 23, 13, 4, 4),
    (3, 13, 5, 7, 17, 2, 3),
    (1, 160, 4, 4, 320, 2, 2),
    (1, 1, 12, 12, 5, 6, 1),
    (0, 3, 8, 8, 16, 4, 4),
    (1, 300, 4, 4, 20, 1, 1),
    (1, 3, 3, 1000, 24, 1, 2),
]


@pytest.mark.parametrize("shape", PATCHES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_patch_conv(shape, dtype, fmt):
    batch, channels, height, width, c_out, kh, kw = shape
    dtype = DTYPES[dtype]
    x = randn(batch, channels, height, width, seed=1, dtype=dtype).to(memory_format=FORMATS[fmt])
    w = randn(c_out, channels, kh, kw, seed=2, dtype=dtype, scale=(channels * kh * kw) ** -0.5)
    scale = randn(c_out, seed=3, dtype=reference.compute_dtype(dtype))
    shift = randn(c_out, seed=4, dtype=reference.compute_dtype(dtype))
    check(OPS.patch_conv, plain_patch_conv, x, w, scale, shift)
    y = check(OPS.patch_conv, plain_patch_conv, x, w, None, None)
    last = OPS.patch_conv(x, w, None, None, True)
    assert torch.equal(last, y) and last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("batch", [0, 1, 3, 14])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head(batch, act, dtype, fmt):
    dtype = DTYPES[dtype]
    x = randn(batch, 44, 3, 5, seed=1, dtype=dtype).to(memory_format=FORMATS[fmt])
    w_conv = randn(75, 44, 1, 1, seed=2, dtype=dtype, scale=0.5)
    w_fc = randn(101, 75, seed=3, dtype=dtype, scale=0.1)
    biases = [randn(n, seed=4, dtype=reference.compute_dtype(dtype)).to(dtype) for n in (75, 101)]
    check(OPS.head, plain_head, x, w_conv, biases[0], w_fc, biases[1], act)
    check(OPS.head, plain_head, x, w_conv, None, w_fc, None, act)


# ---- Packs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, c, k", [(1, 1, 1), (8, 3, 3), (9, 5, 1), (16, 4, 2), (17, 7, 3), (40, 10, 3), (33, 300, 1)]
)
def test_pack_layout(n, c, k, dtype):
    """The compiled packing has the documented layout, which the reference writes with reshapes;
    unpacking inverts it."""
    dtype = DTYPES[dtype]
    compute = reference.compute_dtype(dtype)
    w, w2 = randn(n, c, k, k, seed=1, dtype=dtype), randn(n + 3, c, seed=2, dtype=dtype)
    scale, shift = randn(n, seed=3, dtype=compute), randn(n + 3, seed=4, dtype=compute)
    pack = OPS.pack([w, w2], [scale, None], [None, shift])
    assert torch.equal(pack, reference.pack([w, w2], [scale, None], [None, shift]))
    (first, no_shift), (second, got_shift) = reference.unpack(
        pack, [(n, c, k, k), (n + 3, c, 1, 1)]
    )
    assert torch.equal(first, (w.double() * scale.double()[:, None, None, None]).to(compute))
    assert torch.equal(second[:, :, 0, 0], w2.to(compute))
    assert torch.equal(got_shift, shift) and not no_shift.any()


@pytest.mark.parametrize("c_partial", [16, 24, 36, 40, 72])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_for_the_fast_tier(c_partial, dtype):
    """It starts with the same bytes; the transformed weights behind them agree with the reference's
    to the last place, as the order of their sums is not the same."""
    w = weights(Case(1, 2 * c_partial, 1, 1, n_div=2), DTYPES[dtype])
    args = [w["w_partial"], w["w_pw1"]], [None, w["scale"]], [None, w["shift"]]
    pack, fast = OPS.pack(*args), OPS.pack(*args, True)
    expected = reference.pack(*args, True)
    has_fast = dtype == "fp32" and c_partial not in (16, 36)
    assert (fast.numel() > pack.numel()) == has_fast and fast.shape == expected.shape
    assert torch.equal(fast[: pack.numel()], pack)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(fast, expected, rtol=eps, atol=eps * 2**-24)


FAST_CASES = [c for c in STAGES if c.height >= 14 and c.c_partial >= 24] + [
    Case(2, 96, 17, 15),
    Case(1, 48, 15, 173, n_div=2, act="gelu"),
    Case(3, 96, 28, 14, extra=8),
]


@pytest.mark.parametrize("case", FAST_CASES, ids=lambda c: c.id)
def test_fast_tier(case):
    """A whole block, in which the convolution is one of three, is within the default tier's own
    criterion; only special values may stand elsewhere."""
    x, w = image(case), weights(case)
    exact = plain_block(double(x), **double(w), act=case.act)
    args = [w[n] for n in ("w_partial", "w_pw1", "w_pw2")]
    pack = OPS.pack(args, [None, w["scale"], w["layer_scale"]], [None, w["shift"], None], True)
    packed = pack, case.c_partial, case.c_hidden, w["sample_scale"], case.act
    with torch.no_grad():
        default = OPS.block_packed(x, *packed)
        fast = OPS.block_packed(x, *packed, True)
        assert torch.equal(OPS.block_packed(x, *packed, True), fast)
        assert torch.equal(
            fk.fasternet_block(x, **w, act=case.act), default
        )  # a pack for the fast tier does not change the default one
    assert_right(fast, exact, plain_block(x, **w, act=case.act))
    assert torch.equal(fast, default) == (case.c_partial % 8 != 0)


@pytest.mark.parametrize("case", [Case(6, 128, 56, 56), Case(25, 96, 27, 31)], ids=lambda c: c.id)
def test_fast_functions(case):
    """On enough pixels the functions transform the weights themselves; gradients never do."""
    x, w = image(case), weights(case)
    calls = {
        "pconv3x3": lambda fast: fk.pconv3x3(x, w["w_partial"], fast=fast),
        "pconv_pw": lambda fast: fk.pconv_pw(x, w["w_partial"], w["w_pw1"], fast=fast),
        "block": lambda fast: fk.fasternet_block(x, **w, fast=fast),
    }
    d, wide = double(x), double(w)
    exactly = {
        "pconv3x3": lambda: plain_pconv(d, wide["w_partial"]),
        "pconv_pw": lambda: plain_pconv_pw(d, wide["w_partial"], wide["w_pw1"], None, None, "relu"),
        "block": lambda: plain_block(d, **wide),
    }
    for name, call in calls.items():
        direct = call(False)
        assert torch.equal(call(True), direct), name  # gradients are on
        with torch.no_grad():
            fast = call(True)
        assert not torch.equal(fast, direct), name
        exact = exactly[name]()  # csrc/fasternet_cpu.h: up to five times the direct error
        assert (fast - exact).norm() <= 5 * (direct - exact).norm(), name


def test_fast_functions_know_no_special_value_from_afar():
    """A NaN reaches at most two rows and four columns away."""
    x = torch.randn(7, 96, 56, 56).to(memory_format=torch.channels_last)
    x[3, 5, 20, 30] = float("nan")
    with torch.no_grad():
        y = fk.pconv3x3(x, torch.randn(24, 24, 3, 3), fast=True)[:, :24]
    reached = y.isnan().any(1).nonzero()
    assert (reached[:, 0] == 3).all()
    assert (reached[:, 1] - 20).abs().max() <= 2 and (reached[:, 2] - 30).abs().max() <= 4
    assert y[3, :, 19:22, 29:32].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_at_the_kinks(dtype):
    """Of relu at 0 and hardswish at -3 and 3, as eager's."""
    z = torch.tensor([-3.0, 0.0, 3.0], dtype=dtype).repeat(16)[None, None].expand(1, 4, 1, 48)
    z = z.contiguous(memory_format=torch.channels_last)
    zero, one = torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
    for act in ("relu", "hardswish"):
        leaf = z.clone().requires_grad_()
        plain_act(leaf, act).sum().backward()
        got = OPS.bn_act_backward(
            torch.ones_like(z), z, zero, one, zero, act, [True, False, False, False]
        )
        assert torch.equal(got[0], leaf.grad), act


def test_fast_weights_need_a_square_filter():
    pack = OPS.pack([torch.randn(24, 48, 3, 3), torch.zeros(4, 24)], [None] * 2, [None] * 2, True)
    assert (
        pack.numel()
        == OPS.pack([torch.randn(24, 48, 3, 3), torch.zeros(4, 24)], [None] * 2, [None] * 2).numel()
    )


@pytest.mark.parametrize("case", [STAGES[0], STAGES[14], *EDGES], ids=lambda c: c.id)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_ops(case, dtype, fmt):
    """The ops on packs, with scale and layer_scale folded in, hold the same criterion."""
    x, w = image(case, DTYPES[dtype], FORMATS[fmt]), weights(case, DTYPES[dtype])
    pack = OPS.pack(
        [w["w_partial"], w["w_pw1"], w["w_pw2"]],
        [None, w["scale"], w["layer_scale"]],
        [None, w["shift"], None],
    )

    def packed_block(x, *args):
        return OPS.block_packed(x, pack, case.c_partial, case.c_hidden, args[6], case.act)

    check(packed_block, plain_block, x, *block_args(case, DTYPES[dtype]), case.act)
    pack_pw = OPS.pack([w["w_partial"], w["w_pw1"]], [None, w["scale"]], [None, w["shift"]])

    def packed_pconv_pw(x, *args):
        return OPS.pconv_pw_packed(x, pack_pw, case.c_partial, case.c_hidden, case.act)

    check(
        packed_pconv_pw,
        plain_pconv_pw,
        x,
        w["w_partial"],
        w["w_pw1"],
        w["scale"],
        w["shift"],
        case.act,
    )


def small_network(dtype):
    """(packs, plan, the same in plain float ops) of stem, block, emit, merging, block, emit,
    head."""
    stem = randn(24, 3, 4, 4, seed=1, dtype=dtype, scale=0.15)
    merge = randn(48, 24, 2, 2, seed=2, dtype=dtype, scale=0.1)
    first, second = (weights(Case(1, c, 1, 1), dtype) for c in (24, 48))
    w_conv, w_fc = (
        randn(64, 48, 1, 1, seed=3, dtype=dtype, scale=0.2),
        randn(10, 64, seed=4, dtype=dtype, scale=0.2),
    )
    vectors = [randn(n, seed=5, dtype=reference.compute_dtype(dtype)) for n in (24, 48, 64, 10)]

    def pack_block(w):
        return OPS.pack(
            [w["w_partial"], w["w_pw1"], w["w_pw2"]],
            [None, w["scale"], None],
            [None, w["shift"], None],
        )

    packs = [
        OPS.pack([stem], [None], [vectors[0]]),
        pack_block(first),
        OPS.pack([merge], [None], [vectors[1]]),
        pack_block(second),
        OPS.pack([w_conv, w_fc], [None, None], [vectors[2], vectors[3]]),
    ]
    emit = [EMIT, 0, 0, 0, 0]
    plan = [
        PATCH_CONV,
        24,
        4,
        4,
        0,
        BLOCK,
        6,
        48,
        0,
        ACTS.index("gelu"),
        *emit,
        PATCH_CONV,
        48,
        2,
        2,
        0,
    ]
    plan += [BLOCK, 12, 96, 0, ACTS.index("relu"), *emit, HEAD, 64, 10, 0, ACTS.index("gelu")]

    def plain(x, conv=F.conv2d):
        def to(value):
            return value.to(x.dtype)

        def block(x, w, act):
            names = ("w_partial", "w_pw1", "w_pw2", "scale", "shift")
            return plain_block(x, *(to(w[name]) for name in names), act=act, conv=conv)

        a = block(plain_patch_conv(x, to(stem), None, vectors[0], conv), first, "gelu")
        b = block(plain_patch_conv(a, to(merge), None, vectors[1], conv), second, "relu")
        return [
            a,
            b,
            plain_head(b, to(w_conv), to(vectors[2]), to(w_fc), to(vectors[3]), "gelu", conv),
        ]

    return packs, plan, plain


@pytest.mark.parametrize("batch, height, width", [(1, 32, 32), (3, 33, 71), (0, 16, 16)])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_network(batch, height, width, dtype, fmt):
    dtype = DTYPES[dtype]
    packs, plan, plain = small_network(dtype)
    x = randn(batch, 3, height, width, seed=9, dtype=dtype).to(memory_format=FORMATS[fmt])
    results = OPS.network(x, packs, plan)
    loops = []

    def loop(i):
        if not loops:
            loops.extend(plain(x, loop_conv))
        return loops[i]

    for i, (got, exact, eager) in enumerate(zip(results, plain(x.double()), plain(x), strict=True)):
        assert_right(got, exact, eager, lambda i=i: loop(i), what=f"output {i}")
        assert got.dim() == 2 or got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "plan, message",
    [
        ([], "without an output"),
        ([BLOCK, 6, 48, 0, 0, EMIT, 0, 0, 0, 0], "is a block|does not fit"),
        ([PATCH_CONV, 24, 4, 4, 0], "without an output"),
        ([PATCH_CONV, 24, 4, 4], "expected 5 a step"),
        ([PATCH_CONV, 25, 4, 4, 0, EMIT, 0, 0, 0, 0], "pack does not fit"),
        ([PATCH_CONV, 24, 4, 4, 9, EMIT, 0, 0, 0, 0], "unknown activation"),
        ([7, 24, 4, 4, 0], "unknown kind|does not fit"),
        ([EMIT, 0, 0, 0, 0], "nothing to emit|uses 0 packs"),
    ],
)
def test_network_refuses_bad_plans(plan, message):
    packs = [small_network(torch.float32)[0][0]] if plan else []
    with pytest.raises((RuntimeError, ValueError), match=message):
        OPS.network(torch.ones(1, 3, 16, 16), packs, plan)


# ---- Properties ----------------------------------------------------------------------------------


def all_forward_calls(x, case, w):
    """name -> call, for every compiled op that maps images to images."""
    pack = OPS.pack(
        [w["w_partial"], w["w_pw1"], w["w_pw2"]], [None, w["scale"], None], [None, w["shift"], None]
    )
    pack_pw = OPS.pack([w["w_partial"], w["w_pw1"]], [None, w["scale"]], [None, w["shift"]])
    patch = randn(24, case.channels, 2, 2, seed=11, dtype=x.dtype)
    pack_patch = OPS.pack([patch], [None], [None])
    w_conv, w_fc = (
        randn(33, case.channels, 1, 1, seed=12, dtype=x.dtype),
        randn(21, 33, seed=13, dtype=x.dtype),
    )
    pack_head = OPS.pack([w_conv, w_fc], [None, None], [None, None])
    cp, ch = case.c_partial, case.c_hidden

    def in_place(x):
        y = x.clone(memory_format=torch.preserve_format)
        OPS.pconv3x3_(y, w["w_partial"])
        return y

    return {
        "pconv3x3": lambda x: OPS.pconv3x3(x, w["w_partial"]),
        "pconv3x3_": in_place,
        "pconv_pw": lambda x: OPS.pconv_pw(
            x, w["w_partial"], w["w_pw1"], w["scale"], w["shift"], case.act
        ),
        "pconv_pw_packed": lambda x: OPS.pconv_pw_packed(x, pack_pw, cp, ch, case.act),
        "block": lambda x: OPS.block(
            x, w["w_partial"], w["w_pw1"], w["w_pw2"], w["scale"], w["shift"], None, None, case.act
        ),
        "block_packed": lambda x: OPS.block_packed(x, pack, cp, ch, None, case.act),
        "patch_conv": lambda x: OPS.patch_conv(x, patch, None, None),
        "patch_conv_packed": lambda x: OPS.patch_conv_packed(x, pack_patch, 24, 2, 2),
        "head": lambda x: OPS.head(x, w_conv, None, w_fc, None, case.act),
        "head_packed": lambda x: OPS.head_packed(x, pack_head, 33, 21, case.act),
    }


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_bits_do_not_depend_on_threads_or_batch(dtype, act, threads):
    case = Case(3, 40, 14, 14, act=act)
    x, w = image(case, DTYPES[dtype]), weights(case, DTYPES[dtype])
    for name, call in all_forward_calls(x, case, w).items():
        threads(1)
        y = call(x)
        assert torch.equal(call(x), y), f"{name}: another call gives other bits"
        for image_index in range(3):
            alone = call(x[image_index : image_index + 1])
            assert torch.equal(alone[0], y[image_index]), f"{name}: an image alone gives other bits"
        for n in (2, 3, 7):
            threads(n)
            assert torch.equal(call(x), y), f"{name}: {n} threads give other bits"


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_in_place_with_threads(n, fmt, threads):
    """Threads overwrite rows that their neighbours read: any number of them gives the out-of-place
    bits."""
    threads(n)
    for case in (Case(1, 40, 23, 17), Case(3, 24, 2, 9), Case(2, 16, 1, 5)):
        x, w = image(case, memory_format=FORMATS[fmt]), weights(case)["w_partial"]
        y = OPS.pconv3x3(x, w)
        for _ in range(5):
            z = x.clone()
            OPS.pconv3x3_(z, w)
            assert torch.equal(z, y)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("channel", [0, 39], ids=["convolved", "untouched"])
def test_special_values(act, value, channel):
    """One special value in the input comes out where the float64 reference puts it, and nowhere
    else."""
    case = Case(2, 40, 6, 7, act=act)
    x, w = image(case), weights(case)
    x[1, channel, 2, 3] = value
    args = (w["w_partial"], w["w_pw1"], w["w_pw2"], w["scale"], w["shift"], None, None, act)
    y, exact = OPS.block(x, *args), plain_block(double(x), *double(args))
    assert torch.equal(y.isnan(), exact.isnan()) and torch.equal(y.isinf(), exact.isinf())
    y = OPS.pconv_pw(x, *args[:2], *args[3:5], act)
    exact = plain_pconv_pw(double(x), *double(args[:2]), *double(args[3:5]), act)
    assert torch.equal(y.isnan(), exact.isnan()) and torch.equal(y.isinf(), exact.isinf())
    assert torch.equal(y[y.isinf()].sign(), exact[exact.isinf()].float().sign())
    z = OPS.pconv3x3(x, w["w_partial"])
    exact = plain_pconv(double(x), double(w["w_partial"]))
    assert torch.equal(z.isnan(), exact.isnan()) and torch.equal(z.isinf(), exact.isinf())


@pytest.mark.parametrize("act", ACTS)
def test_activations_over_their_range(act):
    """The vector activations, through an identity pointwise convolution, over all magnitudes."""
    magnitude = torch.logspace(-30, 3, 2000, dtype=torch.float64)
    values = torch.cat(
        (magnitude, -magnitude, torch.linspace(-12, 12, 4000, dtype=torch.float64))
    ).float()
    x = (
        values.reshape(1, 1, -1, 1)
        .expand(1, 8, -1, 1)
        .contiguous(memory_format=torch.channels_last)
    )
    w_partial = torch.zeros(1, 1, 3, 3)
    w_partial[0, 0, 1, 1] = 1
    eye = torch.eye(8)[:, :, None, None]
    y = OPS.pconv_pw(x, w_partial, eye, None, None, act)
    exact = plain_act(values.double(), act).reshape(1, 1, -1, 1).expand(1, 8, -1, 1)
    small = values.abs().reshape(1, 1, -1, 1).expand_as(y) <= 12
    eager = plain_act(x, act)
    assert_right(y[small], exact[small], eager[small], what=act)
    assert_right(y, exact, eager, what=act)
    assert y.isfinite().all()


def test_mixed_dtypes_follow_autocast():
    """x in float32 beside bfloat16 weights: rounded for the convolutions, uncast in the residual,
    result float32."""
    case = Case(2, 40, 7, 9)
    x, w = image(case), weights(case, torch.bfloat16)
    rounded = x.to(torch.bfloat16)
    args = (w["w_partial"], w["w_pw1"], w["w_pw2"], w["scale"], w["shift"], None, None, "relu")
    y = OPS.block(x, *args)
    zero = OPS.block(rounded, *args).double() - rounded.double()
    assert y.dtype == torch.float32
    branch = plain_block(double(rounded), *double(args)) - rounded.double()
    assert_right(y, x.double() + branch, x + (plain_block(rounded, *args) - rounded).float())
    assert (y.double() - x.double() - zero).norm() < 0.01 * zero.norm()
    z = OPS.pconv_pw(x, *args[:2], None, None, "relu")
    assert z.dtype == torch.bfloat16 and torch.equal(
        z, OPS.pconv_pw(rounded, *args[:2], None, None, "relu")
    )
    u = OPS.pconv3x3(x, w["w_partial"])
    assert u.dtype == torch.float32 and torch.equal(u[:, 10:], x[:, 10:])
    assert torch.equal(u[:, :10], OPS.pconv3x3(rounded, w["w_partial"])[:, :10].float())


# ---- Gradients -----------------------------------------------------------------------------------


def training_args(case, dtype):
    """Arguments of act_pw_residual and bn_act: z, its statistics as vectors, and the rest of a
    block."""
    w = weights(case, dtype)
    z = randn(case.batch, case.c_hidden, case.height, case.width, seed=21, dtype=dtype).to(
        memory_format=torch.channels_last
    )
    mean = randn(case.c_hidden, seed=22, dtype=reference.compute_dtype(dtype))
    return z, mean, w["scale"], w["shift"], w["w_pw2"], w["layer_scale"], w["sample_scale"]


def with_statistics(z):
    wide = z.to(reference.compute_dtype(z.dtype))
    mean = wide.mean((0, 2, 3))
    return z, mean, (wide - vector(mean)).square().sum((0, 2, 3))


def plain_pw_stats(x, w_partial, w_pw):
    return with_statistics(F.conv2d(plain_pconv(x, w_partial), w_pw))


def plain_patch_stats(x, weight):
    return with_statistics(plain_patch_conv(x, weight, None, None))


def plain_bn_act(z, mean, scale, shift, act):
    wide = z.to(mean.dtype)
    return plain_act((wide - vector(mean)) * vector(scale) + vector(shift), act).to(z.dtype)


def plain_act_pw_residual(x, z, mean, scale, shift, w_pw2, layer_scale, sample_scale, act):
    y = F.conv2d(plain_bn_act(z, mean, scale, shift, act), w_pw2)
    y = y if layer_scale is None else y * vector(layer_scale).to(y.dtype)
    return x + (y if sample_scale is None else y * sample_scale.reshape(-1, 1, 1, 1).to(y.dtype))


def differentiable(case, dtype, act):
    """name -> (op, plain version, arguments), for every op with a gradient."""
    x, w = image(case, dtype), weights(case, dtype)
    z, mean, scale, shift, w_pw2, layer_scale, sample_scale = training_args(case, dtype)
    compute = reference.compute_dtype(dtype)
    patch = randn(12, case.channels, 2, 2, seed=23, dtype=dtype, scale=0.2)
    vectors = [randn(12, seed=s, dtype=compute) for s in (24, 25)]
    w_conv, w_fc = (
        randn(9, case.channels, 1, 1, seed=26, dtype=dtype),
        randn(5, 9, seed=27, dtype=dtype),
    )
    biases = [randn(n, seed=28, dtype=dtype) for n in (9, 5)]
    partial, pw1 = w["w_partial"], w["w_pw1"]
    return {
        "pconv3x3": (fk.pconv3x3, plain_pconv, (x, partial)),
        "pconv_pw": (OPS.pconv_pw, plain_pconv_pw, (x, partial, pw1, scale, shift, act)),
        "pconv_pw_bare": (OPS.pconv_pw, plain_pconv_pw, (x, partial, pw1, None, None, act)),
        "block": (
            OPS.block,
            plain_block,
            (x, partial, pw1, w_pw2, scale, shift, layer_scale, sample_scale, act),
        ),
        "block_bare": (
            OPS.block,
            plain_block,
            (x, partial, pw1, w_pw2, None, None, None, None, act),
        ),
        "patch_conv": (OPS.patch_conv, plain_patch_conv, (x, patch, *vectors)),
        "patch_conv_bare": (OPS.patch_conv, plain_patch_conv, (x, patch, None, None)),
        "head": (OPS.head, plain_head, (x, w_conv, biases[0], w_fc, biases[1], act)),
        "head_bare": (OPS.head, plain_head, (x, w_conv, None, w_fc, None, act)),
        "pw_stats": (OPS.pw_stats, plain_pw_stats, (x, partial, pw1)),
        "patch_stats": (OPS.patch_stats, plain_patch_stats, (x, patch)),
        "bn_act": (OPS.bn_act, plain_bn_act, (z, mean, scale, shift, act)),
        "act_pw_residual": (
            OPS.act_pw_residual,
            plain_act_pw_residual,
            (x, z, mean, scale, shift, w_pw2, layer_scale, sample_scale, act),
        ),
        "act_pw_residual_bare": (
            OPS.act_pw_residual,
            plain_act_pw_residual,
            (x, z, mean, scale, shift, w_pw2, None, None, act),
        ),
    }


DIFFERENTIABLE = list(differentiable(Case(2, 8, 4, 4), torch.float32, "relu"))


def run_gradients(fn, args, needs, incoming):
    """Gradients of sum(outputs * incoming) for the arguments that need them."""
    leaves = [
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_(need)
        if isinstance(a, torch.Tensor)
        else a
        for a, need in zip(args, needs)
    ]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [incoming(i, o) for i, o in enumerate(outputs)])
    return outputs, [leaf.grad if isinstance(leaf, torch.Tensor) else None for leaf in leaves]


def incoming_gradient(kind):
    def make(i, output):
        g = randn(*output.shape, seed=31 + i, dtype=torch.float64)
        if kind == "expanded":
            g = g.flatten()[:1].reshape([1] * output.dim()).expand(output.shape)
        elif kind == "channels_last" and output.dim() == 4:
            g = g.to(memory_format=torch.channels_last)
        elif kind == "strided":
            g = torch.stack((g, g), dim=-1)[..., 0]
        return (
            g.to(output.dtype)
            if kind != "expanded"
            else g[(slice(0, 1),) * g.dim()].to(output.dtype).expand(output.shape)
        )

    return make


@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "expanded", "strided"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(name, dtype, kind):
    """Every gradient against float64 autograd, for every layout of the incoming gradient."""
    case = Case(2, 24, 5, 6)
    op, plain, args = differentiable(case, DTYPES[dtype], "gelu")[name]
    needs = [isinstance(a, torch.Tensor) for a in args]
    incoming = incoming_gradient(kind)
    _, got = run_gradients(op, args, needs, incoming)
    _, exact = run_gradients(
        plain,
        double(args),
        needs,
        lambda i, o: incoming(
            i, o.to(DTYPES[dtype]) if o.dim() != 1 else o.to(reference.compute_dtype(DTYPES[dtype]))
        ).double(),
    )
    _, eager = run_gradients(plain, args, needs, incoming)
    for i, (g, e, rival) in enumerate(zip(got, exact, eager)):
        if needs[i]:
            assert g.dtype == args[i].dtype
            assert_right(g, e, rival, what=f"{name}: gradient {i}")


@pytest.mark.parametrize("channels", [24, 64])
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16", "fp16"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_channels_last_weights(name, dtype, channels):
    """The same bits, and gradients in the weights' memory format, which autograd takes as they
    are."""
    case = Case(2, channels, 5, 6)
    op, _, args = differentiable(case, DTYPES[dtype], "gelu")[name]
    incoming = incoming_gradient("channels_last")

    def run(fmt):
        leaves = []
        for a in args:
            if isinstance(a, torch.Tensor):
                if a.dim() == 4 and a.shape[0] != case.batch:  # a weight
                    a = a.to(memory_format=fmt)
                a = a.detach().requires_grad_()
            leaves.append(a)
        outputs = op(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        grads = torch.autograd.grad(
            outputs, leaves, [incoming(i, o) for i, o in enumerate(outputs)]
        )
        for leaf, grad in zip(leaves, grads):
            assert grad.stride() == leaf.stride()
        return (*outputs, *grads)

    for a, b in zip(run(torch.contiguous_format), run(torch.channels_last)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name, act, threads):
    """Every argument's gradient against finite differences in float64."""
    threads(1)  # thousands of tiny calls
    op, _, args = differentiable(Case(2, 4, 2, 3, n_div=2), torch.float64, act)[name]
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    assert torch.autograd.gradcheck(op, args, nondet_tol=0.0)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_only_the_gradients_asked_for(name):
    """Each argument alone: its gradient is what it is among all, and no other is computed."""
    op, _, args = differentiable(Case(2, 8, 4, 5), torch.float64, "silu")[name]
    everything = [isinstance(a, torch.Tensor) for a in args]
    incoming = incoming_gradient("contiguous")
    _, full = run_gradients(op, args, everything, incoming)
    for i, need in enumerate(everything):
        if need:
            _, alone = run_gradients(op, args, [j == i for j in range(len(args))], incoming)
            assert_right(alone[i], full[i], what=f"gradient {i} of {name} alone")
            assert all(g is None for j, g in enumerate(alone) if j != i)


def test_in_place_gradients():
    """pconv3x3_ in a graph: gradients for x, for the weight, and for a second use of what it
    returns."""
    case = Case(2, 24, 5, 6)
    x, w = image(case, torch.float64), weights(case, torch.float64)["w_partial"]

    def in_place(x, w):
        y = x * 1.5
        assert fk.pconv3x3_(y, w) is y
        return y

    assert torch.autograd.gradcheck(
        in_place, (x[:, :8, :3, :3].clone().requires_grad_(), w[:2, :2].clone().requires_grad_())
    )
    for needs in ((True, True), (True, False), (False, True)):
        _, got = run_gradients(in_place, (x, w), needs, incoming_gradient("contiguous"))
        _, exact = run_gradients(
            lambda x, w: plain_pconv(x * 1.5, w), (x, w), needs, incoming_gradient("contiguous")
        )
        for g, e in zip(got, exact):
            assert (g is None) == (e is None)
            if g is not None:
                assert_right(g, e)


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if "bare" not in n])
def test_double_backward_is_refused(name):
    op, _, args = differentiable(Case(2, 8, 3, 3), torch.float64, "gelu")[name]
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    output = op(*args)
    output = output[0] if isinstance(output, tuple) else output
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        torch.autograd.grad(output.square().sum(), args[0], create_graph=True)


def test_packed_ops_refuse_gradients():
    case = Case(1, 24, 4, 4)
    x, w = image(case).requires_grad_(), weights(case)
    pack = OPS.pack([w["w_partial"], w["w_pw1"], w["w_pw2"]], [None] * 3, [None] * 3)
    with pytest.raises(RuntimeError, match="packed weights carry no gradient"):
        OPS.block_packed(x, pack, 6, 48, None, "relu")
    with pytest.raises(RuntimeError, match="packed weights carry no gradient"):
        OPS.pack([w["w_partial"].requires_grad_()], [None], [None])


# ---- Training: the two halves --------------------------------------------------------------------


@pytest.mark.parametrize("case", [*STAGES[::7], *EDGES], ids=lambda c: c.id)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pw_stats(case, dtype, fmt):
    """z, and the statistics of z as stored."""
    x, w = image(case, DTYPES[dtype], FORMATS[fmt]), weights(case, DTYPES[dtype])
    found = []

    def op(*args):
        found[:] = OPS.pw_stats(*args)
        return found[0]

    def plain(x, w_partial, w_pw, conv=F.conv2d):
        return conv(plain_pconv(x, w_partial, conv), w_pw)

    z = check(op, plain, x, w["w_partial"], w["w_pw1"])
    if case.batch > 0:
        assert_statistics(z, *found[1:])


@pytest.mark.parametrize("case", [*STAGES[::7], *EDGES], ids=lambda c: c.id)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_patch_stats(case, dtype, fmt):
    """z has the bits of patch_conv, and the statistics are those of z as stored."""
    x = image(case, DTYPES[dtype], FORMATS[fmt])
    kernel = (min(2, case.height), min(3, case.width))
    patch = randn(9, case.channels, *kernel, seed=41, dtype=x.dtype, scale=0.1)
    z, mean, m2 = OPS.patch_stats(x, patch)
    expected = OPS.patch_conv(x, patch, None, None, True)
    assert torch.equal(z, expected) and z.stride() == expected.stride()
    if case.batch > 0:
        assert_statistics(z, mean, m2)


def loop_statistics(z, dtype):
    """(mean, m2) of each channel, one pixel after another (Welford's method)."""
    rows = z.to(dtype).permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    mean, m2 = torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
    for n, row in enumerate(rows, 1):
        delta = row - mean
        mean = mean + delta / n
        m2 = m2 + delta * (row - mean)
    return mean, m2


def assert_statistics(z, mean, m2):
    exact, wide = z.double(), z.to(mean.dtype)
    exact_mean, average = exact.mean((0, 2, 3)), wide.mean((0, 2, 3))
    assert_right(mean, exact_mean, average, lambda: loop_statistics(z, mean.dtype)[0], what="mean")
    assert_right(
        m2,
        (exact - vector(exact_mean)).square().sum((0, 2, 3)),
        (wide - vector(average)).square().sum((0, 2, 3)),
        lambda: loop_statistics(z, mean.dtype)[1],
        what="m2",
    )


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("batch, size", [(4, 56), (3, 9), (1, 1), (2, 2)])
def test_statistics_of_a_large_mean(batch, size, dtype):
    """Channels with mean 1e4 and standard deviation 1: sums of squares would leave no digit."""
    case = Case(batch, 24, size, size)
    x, w = image(case, DTYPES[dtype]), weights(case, DTYPES[dtype])
    x[:, -1], w["w_pw1"][:, -1] = 1e4, 1
    z, mean, m2 = OPS.pw_stats(x, w["w_partial"], w["w_pw1"])
    assert mean.min() > 9e3
    assert_statistics(z, mean, m2)


@pytest.mark.parametrize("name", ["bn_act", "act_pw_residual", "act_pw_residual_bare"])
def test_gradients_beside_a_large_mean(name):
    """As test_gradients, where z has mean 1e4 and standard deviation 1."""
    op, plain, args = differentiable(Case(2, 24, 5, 6), torch.float32, "gelu")[name]
    for t in args[:2] if name == "bn_act" else args[1:3]:
        t.add_(1e4)
    needs = [isinstance(a, torch.Tensor) for a in args]
    incoming = incoming_gradient("channels_last")
    _, got = run_gradients(op, args, needs, incoming)
    _, exact = run_gradients(
        plain, double(args), needs, lambda i, o: incoming(i, o.float()).double()
    )
    _, eager = run_gradients(plain, args, needs, incoming)
    for i, (g, e, rival) in enumerate(zip(got, exact, eager)):
        if needs[i]:
            assert_right(g, e, rival, what=f"{name}: gradient {i}")


@pytest.mark.parametrize("case", [*STAGES[::7], *EDGES], ids=lambda c: c.id)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_statistics(case, dtype, fmt):
    """bn_act and act_pw_residual; z, too, in either layout."""
    dtype = DTYPES[dtype]
    x = image(case, dtype, FORMATS[fmt])
    z, *vectors, w_pw2, layer_scale, sample_scale = training_args(case, dtype)
    z = z.to(memory_format=FORMATS[fmt])

    def bn_act(z, *args, conv=F.conv2d):
        return plain_bn_act(z, *args)

    def block(x, z, mean, scale, shift, w_pw2, layer_scale, sample_scale, act, conv=F.conv2d):
        y = conv(plain_bn_act(z, mean, scale, shift, act), w_pw2)
        y = y if layer_scale is None else y * vector(layer_scale).to(y.dtype)
        y = y if sample_scale is None else y * sample_scale.reshape(-1, 1, 1, 1).to(y.dtype)
        return x + y

    check(OPS.bn_act, bn_act, z, *vectors, case.act)
    for scales in ((layer_scale, sample_scale), (None, None)):
        check(OPS.act_pw_residual, block, x, z, *vectors, w_pw2, *scales, case.act)


def backward_calls(case, dtype, fmt=torch.channels_last):
    """name -> (op, arguments but the mask, how many gradients, arguments after the mask)."""
    x, w = image(case, dtype, fmt), weights(case, dtype)
    z, mean, scale, shift, w_pw2, layer, sample = training_args(case, dtype)
    z = z.to(memory_format=fmt)
    partial, pw1 = w["w_partial"], w["w_pw1"]
    dy, dz = x.flip(0).contiguous(memory_format=fmt), z.flip(0).contiguous(memory_format=fmt)
    dstats = [randn(case.c_hidden, seed=s, dtype=mean.dtype) for s in (45, 46)]
    vectors = (mean, scale, shift)
    patch = randn(case.c_hidden, case.channels, 2, 2, seed=47, dtype=dtype, scale=0.1)
    patches = OPS.patch_stats(x, patch)[:2]
    dpatches = patches[0].flip(0).contiguous(memory_format=fmt)
    return {
        "patch_stats_backward": ((dpatches, *dstats, x, *patches, patch), 2, ()),
        "pw_stats_backward": ((dz, *dstats, x, z, mean, partial, pw1), 3, (dy,)),
        "pw_stats_backward alone": ((dz, *dstats, x, z, mean, partial, pw1), 3, ()),
        "bn_act_backward": ((dz, z, *vectors, case.act), 4, ()),
        "act_pw_residual_backward": (
            (dy, z, *vectors, w_pw2, layer, sample, case.act),
            7,
            (),
        ),
        "act_pw_residual_backward bare": ((dy, z, *vectors, w_pw2, None, None, case.act), 5, ()),
        "batch_norm_layer_backward": (
            *((dy, x, *layer_of(case, dtype), *with_statistics(z), 1e-5, case.act), 8),
            (),
        ),
    }


def layer_of(case, dtype):
    """The parameters of batch_norm_layer."""
    _, _, weight, bias, w_pw2, layer, sample = training_args(case, dtype)
    w = weights(case, dtype)
    return w["w_partial"], w["w_pw1"], weight, bias, w_pw2, layer, sample


BACKWARD = list(backward_calls(Case(1, 8, 2, 2), torch.float32))


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("name", BACKWARD)
def test_output_masks(name, dtype):
    """Every mask: the gradients asked for are as right as they are among all, and what is not asked
    for is empty."""
    args, n, after = backward_calls(Case(2, 24, 5, 6, act="gelu"), DTYPES[dtype])[name]
    op = getattr(OPS, name.split()[0])
    outputs = len(op._schemas[""].returns)
    everything = op(*args, [i < n for i in range(outputs)], *after)
    exact = op(*double(args), [i < n for i in range(outputs)], *double(after))
    for bits in range(2**n):
        mask = [bool(bits >> i & 1) for i in range(outputs)]
        found = op(*args, mask, *after)
        for g, e, full, need in zip(found, exact, everything, mask, strict=True):
            if need:
                assert_right(g, e, full, what=f"{name} with mask {mask}")
            else:
                assert g.numel() == 0


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_residual_s_gradient(fmt, dtype):
    """pw_stats_backward adds dy to dx, whatever the layout of dy, and to nothing else."""
    dtype = DTYPES[dtype]
    args, n, (dy,) = backward_calls(Case(3, 24, 5, 6), dtype, FORMATS[fmt])["pw_stats_backward"]
    wide = torch.stack((dy, dy), dim=-1)[..., 0]
    ones = dy[:1, :1, :1, :1].expand_as(dy)
    plain = OPS.pw_stats_backward(*args, [True] * n)
    exact = OPS.pw_stats_backward(*double(args), [True] * n)
    for d in (dy, dy.contiguous(), wide, ones):
        got = OPS.pw_stats_backward(*args, [True] * n, d)
        assert_right(got[0], exact[0] + d.double(), plain[0] + d)
        assert all(torch.equal(a, b) for a, b in zip(got[1:], plain[1:]))


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_recompute(fmt, dtype):
    """The recompute ops are the others after z = conv(x), to the bit."""
    case, dtype = Case(2, 24, 6, 4, act="gelu"), DTYPES[dtype]
    x, w = image(case, dtype, FORMATS[fmt]), weights(case, dtype)
    z, mean, _ = OPS.pw_stats(x, w["w_partial"], w["w_pw1"])
    vectors = (mean, w["scale"], w["shift"])
    dy, dz = x.flip(0), z.flip(0)
    after = (w["w_pw2"], w["layer_scale"], w["sample_scale"], case.act, [True] * 7)
    got = OPS.act_pw_residual_recompute_backward(
        dy, x, *vectors, w["w_partial"], w["w_pw1"], *after
    )
    for a, b in zip(got, (z, *OPS.act_pw_residual_backward(dy, z, *vectors, *after)), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    after = (case.act, [True] * 4)
    got = OPS.bn_act_recompute_backward(dz, x, *vectors, w["w_partial"], w["w_pw1"], *after)
    for a, b in zip(got, (z, *OPS.bn_act_backward(dz, z, *vectors, *after)), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    patch = randn(9, 24, 2, 2, seed=41, dtype=dtype, scale=0.1)
    vectors = [v[:9] for v in vectors]
    z = OPS.patch_conv(x, patch, None, None, True)
    got = OPS.bn_act_recompute_backward(z.flip(0), x, *vectors, None, patch, *after)
    for a, b in zip(got, (z, *OPS.bn_act_backward(z.flip(0), z, *vectors, *after)), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def layers(batch=3):
    """name -> arguments of batch_norm_layer but eps and act, from the dtypes of x and of the
    convolutions and the memory format of x."""
    case = Case(batch, 24, 6, 4)

    def make(part, dtype, weight_dtype, fmt):
        x = image(case, dtype, fmt)
        partial, conv, weight, bias, pw2, *scales = layer_of(case, weight_dtype)
        if part == "patches":
            partial = pw2 = None
            conv = randn(case.c_hidden, case.channels, 2, 2, seed=47, dtype=weight_dtype)
        if part != "block":
            weight, scales = None, (None, None)
        if part == "bare":
            bias = None
        return x, partial, conv, weight, bias, None if part == "pconv_pw" else pw2, *scales

    return {
        part: functools.partial(make, part) for part in ("block", "bare", "pconv_pw", "patches")
    }


@pytest.mark.parametrize("part", layers())
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [*DTYPES, "fp32 x, bf16", "fp32 x, fp16"])
def test_a_layer_is_its_parts(dtype, fmt, part):
    """batch_norm_layer and its backward: the same z to the bit, and all else as right as the other
    ops, put together."""
    dtypes = [DTYPES[name] for name in dtype.replace(" x", "").split(", ")]
    args = layers()[part](dtypes[0], dtypes[-1], FORMATS[fmt])
    got, parts, exact = (
        op(*a, 1e-5, "gelu")
        for op, a in (
            (OPS.batch_norm_layer, args),
            (reference.batch_norm_layer, args),
            (reference.batch_norm_layer, double(args)),
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(got[1:], parts[1:]))
    assert_right(got[0], exact[0], parts[0])
    incoming = randn(*got[0].shape, seed=48, dtype=got[0].dtype)
    mask = [isinstance(t, torch.Tensor) for t in args]
    for grad in (incoming, torch.stack((incoming, incoming), dim=-1)[..., 0]):
        call = (grad, *args, *got[1:], 1e-5, "gelu", mask)
        grads = OPS.batch_norm_layer_backward(*call)
        parts = reference.batch_norm_layer_backward(*call)
        exact = reference.batch_norm_layer_backward(*double(call))
        for i, (a, b, c) in enumerate(zip(grads, exact, parts, strict=True)):
            assert_right(a, b, c, what=f"gradient {i}")
            assert a.stride() == c.stride()
        again = OPS.batch_norm_layer_backward(*call[:9], None, *call[10:])  # z is not kept
        assert all(torch.equal(a, b) for a, b in zip(grads, again))


@pytest.mark.parametrize("part", layers())
def test_a_layer_of_an_empty_batch(part):
    args = layers(batch=0)[part](*[torch.float32] * 2, torch.channels_last)
    y, z, mean, m2 = OPS.batch_norm_layer(*args, 1e-5, "relu")
    assert y.numel() == z.numel() == 0
    mask = [isinstance(t, torch.Tensor) for t in args]
    call = (y, *args, z, torch.zeros_like(mean), m2, 1e-5, "relu", mask)
    for backward in (OPS.batch_norm_layer_backward, reference.batch_norm_layer_backward):
        for g, t in zip(backward(*call), args, strict=True):
            assert t is None or (g.shape == t.shape and not g.any())


def test_misuse_of_a_layer():
    args = layers()["block"](*[torch.float32] * 2, torch.channels_last)
    for op in (OPS.batch_norm_layer, reference.batch_norm_layer):
        with pytest.raises(RuntimeError, match="w_pw2 needs w_partial"):
            op(args[0], None, *args[2:], 1e-5, "relu")
    bare = layers()["bare"](*[torch.float32] * 2, torch.channels_last)
    y, *rest = OPS.batch_norm_layer(*bare, 1e-5, "relu")
    for i in (3, 4, 6, 7):
        mask = [j == i for j in range(8)]
        with pytest.raises(RuntimeError, match=f"entry {i}, a parameter that is not there"):
            OPS.batch_norm_layer_backward(y, *bare, *rest, 1e-5, "relu", mask)


@pytest.mark.parametrize("part", layers())
def test_flops_of_a_layer(part):
    """As its parts, put together, count."""
    args = layers()[part](*[torch.float32] * 2, torch.channels_last)
    y, z, mean, m2 = OPS.batch_norm_layer(*args, 1e-5, "relu")
    there = [isinstance(t, torch.Tensor) for t in args]
    calls = [("batch_norm_layer", (*args, 1e-5, "relu"))]
    for bits in range(256):
        mask = [there[i] and bool(bits >> i & 1) for i in range(8)]
        for kept in (z, None):
            calls.append(
                ("batch_norm_layer_backward", (y, *args, kept, mean, m2, 1e-5, "relu", mask))
            )
    for name, call in calls:
        counts = []
        for op in (getattr(OPS, name), getattr(reference, name)):
            with FlopCounterMode(display=False) as counter:
                op(*call)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1], call[-1]


TRAINING = ["pw_stats", "patch_stats", "bn_act", "act_pw_residual", *BACKWARD]


@pytest.mark.parametrize("channels", [1, 4, 33])
def test_one_hidden_channel(channels):
    """Both strides of w_pw2 are 1 then, and layer_scale counts all the same."""
    x, z = randn(2, channels, 3, 4, seed=1), randn(2, 1, 3, 4, seed=2)
    vectors = [randn(1, seed=s) for s in (3, 4, 5)]
    w_pw2, layer = randn(channels, 1, 1, 1, seed=6), randn(channels, seed=7)
    args = (x, z, *vectors, w_pw2, layer, None, "relu")
    exact = reference.act_pw_residual(*double(args))
    assert_right(OPS.act_pw_residual(*args), exact, reference.act_pw_residual(*args))


# Hidden channels within a vector, off a panel, and more than one pass of K; few pixels and many.
THREADED = [
    Case(5, 40, 14, 14),
    Case(2, 35, 14, 14),
    Case(2, 128, 14, 14),
    Case(3, 132, 20, 26),
    Case(2, 320, 7, 7),
]


@pytest.mark.parametrize("case", THREADED, ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("name", TRAINING)
def test_training_bits_do_not_depend_on_threads(name, dtype, case, threads):
    """Statistics and weight gradients, too: their sums over pixels have a fixed order."""
    act = case.act
    if name in BACKWARD:
        args, n, after = backward_calls(case, DTYPES[dtype])[name]
        op = getattr(OPS, name.split()[0])
        mask = [i < n for i in range(len(op._schemas[""].returns))]
        calls = [(*args, mask, *after), (*args, [False, *mask[1:]], *after)]  # also without dx
    else:
        op, _, args = differentiable(case, DTYPES[dtype], act)[name]
        calls = [args]
    for args in calls:
        assert_same_bits(name, op, args, threads)


def assert_same_bits(name, op, args, threads):
    results = []
    for n in (1, 1, 2, 3, 7):
        threads(n)
        y = op(*args)
        results.append(y if isinstance(y, tuple) else (y,))
    for n, again in zip((1, 2, 3, 7), results[1:]):
        for i, (a, b) in enumerate(zip(results[0], again, strict=True)):
            assert torch.equal(a, b), f"{name}: {n} threads give other bits in output {i}"


# ---- opcheck, FLOPs ------------------------------------------------------------------------------


def opcheck_samples():
    """name -> argument tuples for every op of the library."""
    samples = {}
    for dtype in (torch.float32, torch.bfloat16):
        for fmt in FORMATS.values():
            case = Case(2, 16, 4, 6, act="gelu")
            x = image(case, dtype, fmt)
            w = weights(case, dtype)
            z, mean, scale, shift, w_pw2, layer, sample = training_args(case, dtype)
            partial, pw1 = w["w_partial"], w["w_pw1"]
            pack = reference.pack([partial, pw1, w_pw2], [None, scale, None], [None, shift, None])
            pack_pw = reference.pack([partial, pw1], [None, scale], [None, shift])
            patch = randn(8, 16, 2, 2, seed=41, dtype=dtype)
            partial, patch = (w.to(memory_format=fmt) for w in (partial, patch))
            w_conv, w_fc = (
                randn(9, 16, 1, 1, seed=42, dtype=dtype),
                randn(5, 9, seed=43, dtype=dtype),
            )
            packs, plan, _ = small_network(dtype)
            pixels = randn(1, 3, 16, 16, seed=44, dtype=dtype).to(memory_format=fmt)
            g, g_hidden = x.flip(0).contiguous(memory_format=fmt), z.to(memory_format=fmt)
            z = z.to(memory_format=fmt)
            dstats = [randn(32, seed=45, dtype=mean.dtype) for _ in range(2)]
            patch_z, patch_dstats = OPS.patch_stats(x, patch), [d[:8] for d in dstats]
            for name, *args in [
                ("pconv3x3", x, partial),
                ("pconv3x3_", x.clone(), partial),
                ("pconv3x3_backward", g, x[:, :4], partial, [True, False]),
                ("pack", [partial, w_fc], [None, None], [None, mean[:5]]),
                ("pconv_pw", x, partial, pw1, scale, None, "gelu"),
                ("pconv_pw_packed", x, pack_pw, 4, 32, "gelu"),
                (
                    "pconv_pw_backward",
                    g_hidden,
                    x,
                    partial,
                    pw1,
                    scale,
                    shift,
                    "gelu",
                    [True, True, True, False, True],
                ),
                ("block", x, partial, pw1, w_pw2, scale, shift, layer, sample, "relu"),
                ("block_packed", x, pack, 4, 32, sample, "relu"),
                (
                    "block_backward",
                    *(g, x, partial, pw1, w_pw2, scale, shift, layer, sample, "relu"),
                    [True, True, True, True, True, True, True, False],
                ),
                ("patch_conv", x, patch, None, None, True),
                ("patch_conv_packed", x, reference.pack([patch], [None], [None]), 8, 2, 2),
                (
                    "patch_conv_backward",
                    randn(2, 8, 2, 3, seed=46, dtype=dtype),
                    x,
                    patch,
                    None,
                    None,
                    [True, True, False, False],
                ),
                ("head", x, w_conv, None, w_fc, None, "gelu"),
                (
                    "head_packed",
                    x,
                    reference.pack([w_conv, w_fc], [None, None], [None, None]),
                    9,
                    5,
                    "gelu",
                ),
                (
                    "head_backward",
                    randn(2, 5, seed=47, dtype=dtype),
                    x,
                    w_conv,
                    None,
                    w_fc,
                    None,
                    "gelu",
                    [True, True, False, True, False],
                ),
                ("network", pixels, packs, plan),
                ("pw_stats", x, partial, pw1),
                (
                    "pw_stats_backward",
                    g_hidden,
                    *dstats,
                    x,
                    z,
                    mean,
                    partial,
                    pw1,
                    [True, True, True],
                ),
                (
                    "pw_stats_backward",
                    *(g_hidden, *dstats, x, z, mean, partial, pw1),
                    [True, False, True],
                    g,
                ),
                ("patch_stats", x, patch),
                (
                    "patch_stats_backward",
                    *(randn(*patch_z[0].shape, seed=49, dtype=dtype), *patch_dstats, x),
                    *(*patch_z[:2], patch, [True, True]),
                ),
                ("bn_act", z, mean, scale, shift, "silu"),
                (
                    "bn_act_backward",
                    g_hidden,
                    z,
                    mean,
                    scale,
                    shift,
                    "silu",
                    [True, True, False, True],
                ),
                (
                    "bn_act_recompute_backward",
                    *(g_hidden, x, mean, scale, shift, partial, pw1, "silu"),
                    [True, False, True, True],
                ),
                (
                    "bn_act_recompute_backward",
                    randn(2, 8, 2, 3, seed=48, dtype=dtype).to(memory_format=fmt),
                    *(x, mean[:8], scale[:8], shift[:8], None, patch, "identity"),
                    [True, True, False, False],
                ),
                ("act_pw_residual", x, z, mean, scale, shift, w_pw2, layer, sample, "relu"),
                (
                    "act_pw_residual_backward",
                    *(g, z, mean, scale, shift, w_pw2, layer, None, "relu"),
                    [True, True, True, True, True, True, False],
                ),
                (
                    "act_pw_residual_backward",
                    *(g, z, mean, scale, shift, w_pw2, None, sample, "gelu"),
                    [False, False, True, True, False, False, True],
                ),
                (
                    "act_pw_residual_recompute_backward",
                    *(g, x, mean, scale, shift, partial, pw1, w_pw2, layer, sample, "gelu"),
                    [True, False, True, True, True, True, False],
                ),
                (
                    "batch_norm_layer",
                    *(x, partial, pw1, scale, shift, w_pw2, layer, sample, 1e-5, "gelu"),
                ),
                ("batch_norm_layer", x, None, patch, None, shift[:8], *[None] * 3, 1e-3, "silu"),
                (
                    "batch_norm_layer_backward",
                    *(g, x, partial, pw1, scale, shift, w_pw2, layer, sample, z, mean, scale**2),
                    *(1e-5, "gelu", [True, True, True, True, False, True, True, False]),
                ),
                (
                    "batch_norm_layer_backward",
                    randn(2, 8, 2, 3, seed=50, dtype=dtype),
                    *(x, None, patch, scale[:8], None, None, None, None, None, patch_z[1]),
                    *(patch_z[2], 1e-3, "silu", [True, False, True, True, *[False] * 4]),
                ),
            ]:
                samples.setdefault(name, []).append(tuple(args))
    return samples


OPCHECK = opcheck_samples()


def test_every_op_has_samples():
    assert set(OPCHECK) == set(fk.ops.SCHEMAS)


@pytest.mark.parametrize("ends", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", fk.ops.SCHEMAS)
def test_opcheck(name, ends):
    """The first and the last sample, which differ in everything, and those between."""
    trainable = any(name == n for n in DIFFERENTIABLE)
    for args in OPCHECK[name][:: len(OPCHECK[name]) - 1] if ends else OPCHECK[name][1:-1]:
        torch.library.opcheck(getattr(OPS, name), args)
        if trainable:
            leaves = tuple(
                a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a
                for a in args
            )
            torch.library.opcheck(getattr(OPS, name), leaves)


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if "bare" not in n])
def test_flops(name):
    """The formulas count what torch counts for the same convolutions, forward and backward."""
    case = Case(2, 16, 4, 6)
    op, plain, args = differentiable(case, torch.float32, "relu")[name]
    needs = [isinstance(a, torch.Tensor) for a in args]
    counts = []
    for fn in (op, plain):
        leaves = [
            a.detach().clone().requires_grad_(need) if need else a for a, need in zip(args, needs)
        ]
        with FlopCounterMode(display=False) as counter:
            fn(*leaves)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] if name not in ("bn_act",) else counts[0] == 0


def test_flops_of_every_op_are_registered():
    from torch.utils.flop_counter import flop_registry

    for name in fk.ops.SCHEMAS:
        assert getattr(OPS, name) in flop_registry
    with FlopCounterMode(display=False) as counter:
        packs, plan, _ = small_network(torch.float32)
        OPS.network(torch.ones(1, 3, 32, 32), packs, plan)
    stem, merge, head = 64 * 24 * 48, 16 * 48 * 96, 64 * 48 + 640
    blocks = 64 * (9 * 36 + 2 * 24 * 48) + 16 * (9 * 144 + 2 * 48 * 96)
    assert counter.get_total_flops() == 2 * (stem + merge + head + blocks)
