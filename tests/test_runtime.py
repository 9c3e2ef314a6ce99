"""fasternet_runtime: the kernels on NumPy arrays, against a float64 reference in NumPy."""

import inspect
import itertools
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import fasternet_runtime as runtime
import numpy as np
import pytest

ACTS = ("relu", "gelu", "gelu_tanh", "silu", "hardswish", "identity")


@pytest.fixture(autouse=True)
def _same_number_of_threads_afterwards():
    before = runtime.get_num_threads()
    yield
    runtime.set_num_threads(before)


# ---- Reference ---------------------------------------------------------------------------------
# The dtype decides: float64 is the reference, float32 a plain loop in order of K with one rounded
# multiplication and one rounded addition at a time, which says how much error is normal.


def conv(x, weight, stride=(1, 1), pad=0):
    """x (B, H, W, C), weight (N, C, kh, kw)."""
    n, c, kh, kw = weight.shape
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = (x.shape[1] - kh) // stride[0] + 1, (x.shape[2] - kw) // stride[1] + 1
    y = np.zeros((x.shape[0], height, width, n), x.dtype)
    for i, j in itertools.product(range(kh), range(kw)):
        rows = slice(i, i + (height - 1) * stride[0] + 1, stride[0])
        columns = slice(j, j + (width - 1) * stride[1] + 1, stride[1])
        for k in range(c):
            y += x[:, rows, columns, k, None] * weight[:, k, i, j]
    return y


def activate(x, act):
    half, one, three = x.dtype.type(0.5), x.dtype.type(1), x.dtype.type(3)
    if act == "relu":
        return np.maximum(x, 0)
    if act == "gelu":
        erf = np.vectorize(math.erf, otypes=[np.float64])(x * x.dtype.type(math.sqrt(0.5)))
        return half * x * (one + erf.astype(x.dtype))
    if act == "gelu_tanh":
        inner = x + x.dtype.type(0.044715) * x * x * x
        return half * x * (one + np.tanh(x.dtype.type(math.sqrt(2 / math.pi)) * inner))
    if act == "silu":
        return x / (one + np.exp(-x))
    if act == "hardswish":
        return x * np.clip(x + three, 0, 6) / x.dtype.type(6)
    return x


def fold(weight, scale, dtype):
    """weight * scale in float64, rounded once: what every inference runtime does to a norm."""
    weight = weight.astype(np.float64)
    if scale is not None:
        weight = weight * scale.astype(np.float64)[:, None, None, None]
    return weight.astype(dtype)


def reference(name, dtype, x, *weights, scale=None, shift=None, act="relu", layer_scale=None):
    """The function `name` of fasternet_runtime in plain arithmetic of `dtype`."""
    x = x.astype(dtype)
    added = 0 if shift is None else shift.astype(dtype)
    if name == "patch_conv":
        return conv(x, fold(weights[0], scale, dtype), stride=weights[0].shape[2:]) + added
    if name == "head":
        w_conv, b_conv, w_fc, b_fc = (w.astype(dtype) for w in weights)
        total = np.zeros((x.shape[0], x.shape[3]), dtype)
        for h, w in itertools.product(range(x.shape[1]), range(x.shape[2])):
            total += x[:, h, w]
        mean = (total / dtype(x.shape[1] * x.shape[2]))[:, None, None]
        a = activate(conv(mean, w_conv) + b_conv, act)
        return (conv(a, w_fc[:, :, None, None]) + b_fc)[:, 0, 0]
    c_partial = weights[0].shape[0]
    u = x.copy()
    u[..., :c_partial] = conv(x[..., :c_partial], weights[0].astype(dtype), pad=1)
    if name == "pconv3x3":
        return u
    a = activate(conv(u, fold(weights[1], scale, dtype)) + added, act)
    if name == "pconv_pw":
        return a
    return x + conv(a, fold(weights[2], layer_scale, dtype))


def check_close(result, exact, plain):
    """L2 and largest error: at most twice the plain loop's, plus one ulp of the largest value."""
    assert result.shape == exact.shape
    if result.size == 0:
        return
    error, norm, largest = np.abs(result - exact), np.linalg.norm(exact), np.abs(exact).max()
    if result.dtype == np.float64:
        assert np.linalg.norm(error) <= 1e-13 * norm
        assert error.max() <= 1e-13 * largest
        return
    normal = np.abs(plain.astype(np.float64) - exact)
    ulp = float(np.spacing(np.float32(largest)))
    assert np.linalg.norm(error) <= 2 * np.linalg.norm(normal) + ulp
    assert error.max() <= 2 * normal.max() + ulp


# ---- Cases -------------------------------------------------------------------------------------


def make(name, shape=(2, 7, 9, 20), c_partial=5, n=33, dtype=np.float32, seed=0, **options):
    """The arguments of a call: x, weights, and the optional ones `options` asks for."""
    rng = np.random.default_rng(seed)

    def normal(*size):
        fan_in = max(1, math.prod(size[1:]))
        return (rng.standard_normal(size) / math.sqrt(fan_in)).astype(dtype)

    channels = shape[3]
    x = rng.standard_normal(shape).astype(dtype)
    w_partial, w_pw = normal(c_partial, c_partial, 3, 3), normal(n, channels, 1, 1)
    weights = {
        "pconv3x3": (w_partial,),
        "pconv3x3_": (w_partial,),
        "pconv_pw": (w_partial, w_pw),
        "fasternet_block": (w_partial, w_pw, normal(channels, n, 1, 1)),
        "patch_conv": (normal(n, channels, 2, 2),),
        "head": (w_pw, normal(n), normal(10, n), normal(10)),
    }[name]
    keywords = {}
    if options.get("bn"):
        keywords |= {"scale": rng.uniform(0.5, 1.5, n).astype(dtype), "shift": normal(n)}
    if options.get("layer_scale"):
        keywords["layer_scale"] = rng.uniform(0.1, 1, channels).astype(dtype)
    if options.get("act"):
        keywords["act"] = options["act"]
    return (x, *weights), keywords


FUNCTIONS = ("pconv3x3", "pconv_pw", "fasternet_block", "patch_conv", "head")
CASES = [
    *((name, {}) for name in FUNCTIONS),
    *(
        (name, {"shape": shape})
        for name in FUNCTIONS
        for shape in [(1, 2, 2, 5), (1, 14, 14, 36), (3, 5, 70, 20), (0, 7, 9, 20)]
    ),
    *((name, {"act": act}) for name in ("pconv_pw", "fasternet_block", "head") for act in ACTS),
    *((name, {"bn": True}) for name in ("pconv_pw", "fasternet_block", "patch_conv")),
    *((name, {"c_partial": 20}) for name in ("pconv3x3", "pconv_pw", "fasternet_block")),
    ("fasternet_block", {"bn": True, "layer_scale": True, "act": "gelu"}),
    ("fasternet_block", {"shape": (1, 4, 7, 300), "c_partial": 75, "n": 600}),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_parity(name, options, dtype):
    arguments, keywords = make(name, dtype=dtype, **options)
    before = [a.copy() for a in arguments]
    result = getattr(runtime, name)(*arguments, **keywords)
    assert result.dtype == dtype
    assert result.flags.c_contiguous
    check_close(
        result,
        reference(name, np.float64, *arguments, **keywords),
        reference(name, dtype, *arguments, **keywords),
    )
    for a, b in zip(arguments, before, strict=True):
        np.testing.assert_array_equal(a, b)


# ---- Views -------------------------------------------------------------------------------------


def strided(x, how):
    """An array equal to x whose memory is arranged differently."""
    batch, height, width, channels = x.shape
    if how == "channel slice":
        wide = np.full((batch, height, width, channels + 7), np.nan, x.dtype)
        view = wide[..., 3 : 3 + channels]
    elif how == "every other channel":
        view = np.full((batch, height, width, 2 * channels), np.nan, x.dtype)[..., ::2]
    elif how == "NCHW":
        view = np.full((batch, channels, height, width), np.nan, x.dtype).transpose(0, 2, 3, 1)
    elif how == "crop":
        view = np.full((batch, height + 4, width + 3, channels), np.nan, x.dtype)[:, 2:-2, 1:-2]
    elif how == "flipped":
        view = np.full(x.shape, np.nan, x.dtype)[:, ::-1, ::-1]
    else:
        assert how == "unaligned"
        memory = np.zeros(x.nbytes + 1, np.uint8)[1:]
        view = memory.view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


VIEWS = ("channel slice", "every other channel", "NCHW", "crop", "flipped", "unaligned")


@pytest.mark.parametrize("how", VIEWS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_views_give_the_same_bits(name, how):
    (x, *weights), _ = make(name)
    expected = getattr(runtime, name)(x, *weights)
    view = strided(x, how)
    result = getattr(runtime, name)(view, *[strided_weight(w) for w in weights])
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(view, x)


def strided_weight(weight):
    return np.stack([weight, np.full_like(weight, np.nan)], axis=-1)[..., 0]


def test_broadcast_images_are_read():
    (x, weight), _ = make("pconv3x3")
    same = np.broadcast_to(x[:1], (4, *x.shape[1:]))
    expected = runtime.pconv3x3(np.ascontiguousarray(same), weight)
    np.testing.assert_array_equal(runtime.pconv3x3(same, weight), expected)


# ---- In place ----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("how", ["dense", *VIEWS[:-1]])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_in_place(how, threads, dtype):
    runtime.set_num_threads(threads)
    (x, weight), _ = make("pconv3x3", shape=(2, 17, 9, 20), dtype=dtype)
    view = x.copy() if how == "dense" else strided(x, how)
    base = view if view.base is None else view.base
    before = base.copy()
    expected = runtime.pconv3x3(x, weight)
    assert runtime.pconv3x3_(view, weight) is view
    np.testing.assert_array_equal(view, expected)
    # Put the convolved channels back: all else must be as it was.
    view[..., : len(weight)] = x[..., : len(weight)]
    np.testing.assert_array_equal(base, before)


def test_in_place_of_nothing():
    (x, weight), _ = make("pconv3x3_", shape=(0, 7, 9, 20))
    assert runtime.pconv3x3_(x, weight) is x


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_stay_where_they_belong(value):
    (x, weight), _ = make("pconv3x3")
    x[1, 3, 4, 19] = value  # not convolved: copied, and nothing else
    x[0, 0, 0, 0] = value
    with np.errstate(invalid="ignore"):
        exact = reference("pconv3x3", np.float64, x, weight)
    result = runtime.pconv3x3(x, weight)
    np.testing.assert_array_equal(np.isnan(result), np.isnan(exact))
    np.testing.assert_array_equal(result[np.isinf(exact)], exact[np.isinf(exact)])
    assert np.isfinite(result[np.isfinite(exact)]).all()


# ---- Errors ------------------------------------------------------------------------------------


def changed(name, position, value, **options):
    """A call's arguments with one of them replaced, by a value or by a function of it."""
    arguments, keywords = make(name, **options)
    arguments = list(arguments)
    if isinstance(position, str):
        keywords[position] = value
    else:
        arguments[position] = value(arguments[position]) if callable(value) else value
    return name, arguments, keywords


def zeros(*shape):
    return np.zeros(shape, np.float32)


def read_only(x):
    x.setflags(write=False)
    return x


def wrong_arguments():
    for name in (*FUNCTIONS, "pconv3x3_"):
        yield (
            *changed(name, 0, [1.0]),
            TypeError,
            f"{name}: x is a list, expected a NumPy array of float32 or float64",
        )
        yield (
            *changed(name, 0, lambda x: x.astype(np.float16)),
            TypeError,
            f"{name}: x has dtype float16, expected float32 or float64",
        )
        yield (
            *changed(name, 0, lambda x: x.astype(x.dtype.newbyteorder())),
            TypeError,
            f"{name}: x has dtype >f4, expected float32 or float64 in native byte order",
        )
        yield (
            *changed(name, 0, lambda x: x[0]),
            ValueError,
            f"{name}: x has shape (7, 9, 20), expected 4 dimensions (B, H, W, C)",
        )
        yield (
            *changed(name, 0, lambda x: x[..., :0]),
            ValueError,
            f"{name}: x has shape (2, 7, 9, 0), expected 4 dimensions (B, H, W, C) with at least",
        )
    for name, weight in [
        ("pconv3x3", "weight"),
        ("pconv3x3_", "weight"),
        ("pconv_pw", "w_partial"),
        ("fasternet_block", "w_partial"),
    ]:
        cases = [
            (None, TypeError, "is a NoneType, expected a NumPy array of float32"),
            (lambda w: w.astype("d"), TypeError, "has dtype float64, expected float32"),
            (lambda w: w[0], ValueError, "has shape (5, 3, 3), expected (C_partial, C_partial,"),
            (zeros(5, 4, 3, 3), ValueError, "has shape (5, 4, 3, 3), expected (C_partial, C_par"),
            (zeros(5, 5, 1, 1), ValueError, "has shape (5, 5, 1, 1), expected (C_partial, C_par"),
            (zeros(0, 0, 3, 3), ValueError, "has shape (0, 0, 3, 3), expected (C_partial, C_par"),
            (zeros(21, 21, 3, 3), ValueError, "has C_partial = 21, expected at most the 20 chan"),
        ]
        for value, error, message in cases:
            yield *changed(name, 1, value), error, f"{name}: {weight} {message}"
    for name, position, weight, expected in [
        ("pconv_pw", 2, "w_pw", "(C_out, 20, 1, 1)"),
        ("fasternet_block", 2, "w_pw1", "(C_hidden, 20, 1, 1)"),
        ("fasternet_block", 3, "w_pw2", "(C, C_hidden, 1, 1) = (20, 33, 1, 1)"),
        ("patch_conv", 1, "weight", "(C_out, 20, kh, kw)"),
        ("head", 1, "w_conv", "(C_mid, 20, 1, 1)"),
        ("head", 3, "w_fc", "(C_out, 33)"),
    ]:
        start = f"{name}: {weight} "
        yield (
            *changed(name, position, lambda w: w.tolist()),
            TypeError,
            start + "is a list, expected a NumPy array of float32",
        )
        yield (
            *changed(name, position, lambda w: w.astype(np.float64)),
            TypeError,
            start + "has dtype float64, expected float32, the dtype of x",
        )
        yield (
            *changed(name, position, lambda w: w[:, :-1]),
            ValueError,
            f", expected {expected}",
        )
        yield *changed(name, position, lambda w: w[:0]), ValueError, f", expected {expected}"
    for name, vector, expected in [
        ("pconv_pw", "scale", "(C_out,) = (33,)"),
        ("pconv_pw", "shift", "(C_out,) = (33,)"),
        ("fasternet_block", "scale", "(C_hidden,) = (33,)"),
        ("fasternet_block", "shift", "(C_hidden,) = (33,)"),
        ("fasternet_block", "layer_scale", "(C,) = (20,)"),
        ("patch_conv", "scale", "(C_out,) = (33,)"),
        ("patch_conv", "shift", "(C_out,) = (33,)"),
        ("head", 2, "(C_mid,) = (33,)"),
        ("head", 4, "(C_out,) = (10,)"),
    ]:
        label = {2: "b_conv", 4: "b_fc"}.get(vector, vector)
        yield (
            *changed(name, vector, zeros(3)),
            ValueError,
            f"{name}: {label} has shape (3,), expected {expected}",
        )
        yield (
            *changed(name, vector, 1.0),
            TypeError,
            f"{name}: {label} is a float, expected a NumPy array of float32",
        )
        yield (
            *changed(name, vector, np.zeros(3)),
            TypeError,
            f"{name}: {label} has dtype float64, expected float32, the dtype of x",
        )
    for name in ("pconv_pw", "fasternet_block", "head"):
        yield (
            *changed(name, "act", "tanh"),
            ValueError,
            f"{name}: act is 'tanh', expected one of relu, gelu, gelu_tanh, silu, hardswish",
        )
        yield *changed(name, "act", None), TypeError, f"{name}: act is a NoneType, expected a str"
    yield (
        *changed("patch_conv", 0, lambda x: x[:, :1]),
        ValueError,
        "patch_conv: x is 1 by 9 pixels, expected at least one patch of 2 by 2",
    )
    yield (
        *changed("head", 0, lambda x: x[:, :0]),
        ValueError,
        "head: x has shape (2, 0, 9, 20), expected at least one pixel to average",
    )
    yield (
        *changed("pconv3x3_", 0, read_only),
        ValueError,
        "pconv3x3_: x is read-only, expected a writable array",
    )
    yield (
        *changed("pconv3x3_", 0, lambda x: strided(x, "unaligned")),
        ValueError,
        "pconv3x3_: x is not aligned, expected elements aligned",
    )
    overlapping = np.lib.stride_tricks.sliding_window_view(zeros(7, 9, 40), 20, 2, writeable=True)
    for view in (
        np.lib.stride_tricks.as_strided(zeros(7, 9, 20), (2, 7, 9, 20), (0, 720, 80, 4)),
        overlapping.transpose(2, 0, 1, 3),
    ):
        yield (
            *changed("pconv3x3_", 0, view),
            ValueError,
            "pconv3x3_: x overlaps itself, expected an array in which no two indices share",
        )


WRONG = list(wrong_arguments())


@pytest.mark.parametrize(
    ("name", "arguments", "keywords", "error", "message"),
    WRONG,
    ids=[f"{i} {case[0]}" for i, case in enumerate(WRONG)],
)
def test_wrong_arguments(name, arguments, keywords, error, message):
    before = [np.array(a) for a in arguments if isinstance(a, np.ndarray)]
    with pytest.raises(error, match=re.escape(message)):
        getattr(runtime, name)(*arguments, **keywords)
    after = [a for a in arguments if isinstance(a, np.ndarray)]
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, "set_num_threads: n is 0, expected 1 to 1024"),
        (-1, ValueError, "set_num_threads: n is -1, expected 1 to 1024"),
        (10**30, ValueError, "expected 1 to 1024"),
        (2.0, TypeError, "set_num_threads: n is a float, expected an int"),
        ("2", TypeError, "set_num_threads: n is a str, expected an int"),
    ],
)
def test_wrong_number_of_threads(n, error, message):
    before = runtime.get_num_threads()
    with pytest.raises(error, match=re.escape(message)):
        runtime.set_num_threads(n)
    assert runtime.get_num_threads() == before


# ---- Threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_threads_do_not_change_the_bits(name):
    arguments, keywords = make(name, shape=(3, 28, 28, 40), c_partial=10, n=80)
    results = []
    for threads in (1, 2, 1, 7):
        runtime.set_num_threads(threads)
        assert runtime.get_num_threads() == threads
        results.append(getattr(runtime, name)(*arguments, **keywords))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_calls_from_several_python_threads():
    runtime.set_num_threads(2)
    calls = [
        (name, *make(name, shape=(2, 21, 28, 40), c_partial=10, n=80, seed=seed))
        for name in FUNCTIONS
        for seed in range(4)
    ]
    expected = [getattr(runtime, name)(*args, **keywords) for name, args, keywords in calls]

    def run(offset):
        # Every thread makes every call, each in another order.
        for i in range(3 * len(calls)):
            k = (i * 7 + offset) % len(calls)
            name, args, keywords = calls[k]
            if not np.array_equal(getattr(runtime, name)(*args, **keywords), expected[k]):
                return name
            if i % 11 == offset:
                runtime.set_num_threads(1 + i % 3)  # the pool may change between calls
        return None

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [None] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_computes():
    code = """
import os, sys
import numpy as np
import fasternet_runtime as runtime

runtime.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((2, 28, 28, 40)).astype(np.float32)
w = np.ones((10, 10, 3, 3), np.float32)
expected = runtime.pconv3x3(x, w)  # the parent's pool now has a worker, which a child lacks
child = os.fork()
if child == 0:
    same = np.array_equal(runtime.pconv3x3(x, w), expected) and runtime.get_num_threads() == 2
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- The module --------------------------------------------------------------------------------


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_does_not_import_torch():
    code = "import sys, fasternet_runtime as r; r.build_info(); print('torch' in sys.modules)"
    result = run_python(code)
    assert result.stdout.strip() == "False", result.stderr


def test_build_info():
    info = runtime.build_info()
    assert set(info) == {"version", "compiler", "available_isas", "isa"}
    assert info["available_isas"][0] == "generic"
    assert info["isa"] in info["available_isas"]
    assert info["compiler"]


@pytest.mark.parametrize("isa", runtime.build_info()["available_isas"])
def test_environment_chooses_the_isa(isa):
    code = "import fasternet_runtime as r; print(r.build_info()['isa'])"
    assert run_python(code, FASTERNET_KERNELS_ISA=isa).stdout.strip() == isa


def test_unknown_isa_is_a_clear_error():
    code = """
import fasternet_runtime as runtime, numpy as np
x, w = np.ones((1, 2, 2, 4), np.float32), np.ones((1, 1, 3, 3), np.float32)
try:
    runtime.pconv3x3_(x, w)
except RuntimeError as error:
    print(error, (x == 1).all())
"""
    result = run_python(code, FASTERNET_KERNELS_ISA="pentium")
    assert "pentium" in result.stdout, result.stderr
    assert result.stdout.strip().endswith("True")


@pytest.mark.parametrize("name", [*FUNCTIONS, "pconv3x3_", "build_info", "set_num_threads"])
def test_documented(name):
    function = getattr(runtime, name)
    assert inspect.signature(function) is not None
    assert function.__doc__
    if name in FUNCTIONS:
        assert "the paper" in function.__doc__
        assert "(B, H, W, C)" in function.__doc__
