"""Bad input: every case is refused with a message that names the argument, what came and what was
expected, and nothing is written."""

import pytest
import torch
from cases import Case, image, weights

import fasternet_kernels as fk

CASE = Case(2, 40, 6, 7)


def block_arguments(**changes):
    w = weights(CASE)
    arguments = {
        name: w[name] for name in ("w_partial", "w_pw1", "w_pw2", "scale", "shift", "layer_scale")
    }
    return {"x": image(CASE), "act": "relu", **arguments, **changes}


def call_block(**changes):
    return fk.fasternet_block(**block_arguments(**changes))


def call_pconv_pw(**changes):
    a = block_arguments()
    a = {
        "x": a["x"],
        "w_partial": a["w_partial"],
        "w_pw": a["w_pw1"],
        "scale": a["scale"],
        "shift": a["shift"],
    }
    return fk.pconv_pw(**{**a, **changes})


def call_pconv(**changes):
    return fk.pconv3x3(**{"x": image(CASE), "weight": weights(CASE)["w_partial"], **changes})


def call_pconv_(**changes):
    return fk.pconv3x3_(**{"x": image(CASE), "weight": weights(CASE)["w_partial"], **changes})


PARTIAL = {
    call_block: "w_partial",
    call_pconv_pw: "w_partial",
    call_pconv: "weight",
    call_pconv_: "weight",
}


@pytest.mark.parametrize("call", PARTIAL, ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    "x, error, message",
    [
        ([1.0], TypeError, "x is of type list, expected a torch.Tensor"),
        (torch.ones(40, 6, 7), ValueError, r"x has 3 dimensions \(40, 6, 7\), expected 4"),
        (torch.ones(1, 2, 40, 6, 7), ValueError, "x has 5 dimensions"),
        (
            torch.ones(2, 40, 6, 7, dtype=torch.int32),
            TypeError,
            "x has dtype torch.int32, expected one of float32",
        ),
        (torch.ones(2, 40, 6, 7, dtype=torch.complex64), TypeError, "x has dtype torch.complex64"),
        (torch.ones(2, 9, 6, 7), ValueError, "convolves 10 channels, expected 1 to x's 9"),
    ],
    ids=["type", "rank3", "rank5", "int", "complex", "channels"],
)
def test_x(call, x, error, message):
    with pytest.raises(error, match=message):
        call(x=x)


@pytest.mark.parametrize("call", PARTIAL, ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    "weight, error, message",
    [
        (None, TypeError, "is of type NoneType, expected a torch.Tensor"),
        (torch.ones(10, 10, 3), ValueError, "has 3 dimensions"),
        (
            torch.ones(10, 10, 5, 5),
            ValueError,
            r"has shape \(10, 10, 5, 5\), expected \(10, 10, 3, 3\)",
        ),
        (
            torch.ones(10, 11, 3, 3),
            ValueError,
            r"has shape \(10, 11, 3, 3\), expected \(10, 10, 3, 3\)",
        ),
        (torch.ones(41, 41, 3, 3), ValueError, "convolves 41 channels, expected 1 to x's 40"),
        (torch.ones(0, 0, 3, 3), ValueError, "convolves 0 channels"),
        (
            torch.ones(10, 10, 3, 3, dtype=torch.float64),
            TypeError,
            "has dtype torch.float64, expected x's dtype torch.float32",
        ),
        (
            torch.ones(10, 10, 3, 3, device="meta"),
            ValueError,
            "is on meta, expected x's device cpu",
        ),
    ],
    ids=["type", "rank", "kernel", "square", "too_many", "none", "dtype", "device"],
)
def test_partial_weight(call, weight, error, message):
    with pytest.raises(error, match=f"^{PARTIAL[call]} {message}"):
        call(**{PARTIAL[call]: weight})


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"w_pw1": torch.ones(80, 41, 1, 1)},
            ValueError,
            r"w_pw1 has shape \(80, 41, 1, 1\), expected \(80, 40, 1, 1\)",
        ),
        ({"w_pw1": torch.ones(80, 40)}, ValueError, "w_pw1 has 2 dimensions"),
        (
            {"w_pw2": torch.ones(40, 81, 1, 1)},
            ValueError,
            r"w_pw2 has shape \(40, 81, 1, 1\), expected \(40, 80, 1, 1\)",
        ),
        ({"w_pw2": torch.ones(40, 80, 1, 1).half()}, TypeError, "w_pw2 has dtype torch.float16"),
        ({"scale": torch.ones(40)}, ValueError, "scale has 40 elements, expected 80"),
        ({"shift": torch.ones(80, 1)}, ValueError, "shift has 2 dimensions"),
        ({"shift": torch.ones(80, dtype=torch.int64)}, TypeError, "shift has dtype torch.int64"),
        ({"shift": 1.0}, TypeError, "shift is of type float"),
        ({"scale": torch.ones(80, device="meta")}, ValueError, "scale is on meta"),
        ({"layer_scale": torch.ones(80)}, ValueError, "layer_scale has 80 elements, expected 40"),
        ({"sample_scale": torch.ones(3)}, ValueError, "sample_scale has 3 elements, expected 2"),
        ({"act": "tanh"}, ValueError, "act is 'tanh', expected one of identity, relu"),
        ({"act": None}, ValueError, "act is None"),
    ],
    ids=str,
)
def test_block(changes, error, message):
    with pytest.raises(error, match=message):
        call_block(**changes)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"w_pw": torch.ones(80, 41, 1, 1)},
            ValueError,
            r"w_pw has shape \(80, 41, 1, 1\), expected \(80, 40, 1, 1\)",
        ),
        ({"w_pw": torch.ones(80, 40, 3, 3)}, ValueError, "w_pw has shape"),
        ({"scale": torch.ones(79)}, ValueError, "scale has 79 elements, expected 80"),
        ({"act": "softmax"}, ValueError, "act is 'softmax'"),
    ],
    ids=["channels", "kernel", "scale", "act"],
)
def test_pconv_pw(changes, error, message):
    with pytest.raises(error, match=message):
        call_pconv_pw(**changes)


def test_in_place_refusals():
    weight = weights(CASE)["w_partial"]
    leaf = image(CASE).requires_grad_()
    expanded = torch.ones(1, 40, 6, 7).expand(2, -1, -1, -1)
    windows = torch.arange(3000.0).as_strided((2, 40, 6, 7), (1000, 1, 40, 20))
    shared = torch.ones(4000)
    for x, w, message in [
        (leaf, weight, "x is a leaf that requires grad"),
        (expanded, weight, "x overlaps itself"),
        (windows, weight, "x overlaps itself"),
        (
            shared[: 40 * 42].view(1, 40, 6, 7),
            shared[-900:].view(10, 10, 3, 3),
            "x shares memory with weight",
        ),
    ]:
        before = x.detach().clone()
        with pytest.raises(ValueError, match=message):
            fk.pconv3x3_(x, w)
        assert torch.equal(x.detach(), before)
    with torch.no_grad():
        fk.pconv3x3_(leaf, weight)  # allowed, as for any in-place op


def test_in_place_on_a_view_of_a_leaf():
    leaf = image(CASE).clone().requires_grad_()
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match="x is a view of a leaf"):
        fk.pconv3x3_(leaf[:1], weights(CASE)["w_partial"])
    assert torch.equal(leaf.detach(), before)


def test_a_failing_call_leaves_x_alone():
    for bad in (
        torch.ones(10, 10, 5, 5),
        torch.ones(41, 41, 3, 3),
        torch.ones(10, 10, 3, 3).double(),
    ):
        x = image(CASE)
        before = x.clone()
        with pytest.raises((TypeError, ValueError)):
            fk.pconv3x3_(x, bad)
        assert torch.equal(x, before)


def test_raw_ops_check_what_memory_safety_needs():
    """torch.ops are below the public functions, but never read or write out of bounds."""
    ops = torch.ops.fasternet_kernels
    x, w = image(CASE), weights(CASE)
    pack = ops.pack([w["w_partial"], w["w_pw1"], w["w_pw2"]], [None] * 3, [None] * 3)
    for call, message in [
        (lambda: ops.block_packed(x, pack[:-16], 10, 80, None, "relu"), "pack does not fit"),
        (lambda: ops.block_packed(x, pack.double(), 10, 80, None, "relu"), "pack does not fit"),
        (lambda: ops.block_packed(x, pack, 10, 81, None, "relu"), "pack does not fit"),
        (lambda: ops.block_packed(x, pack, 41, 80, None, "relu"), "c_partial is 41"),
        (lambda: ops.block_packed(x, pack, 0, 80, None, "relu"), "c_partial is 0"),
        (
            lambda: ops.block_packed(x, pack, 10, 80, torch.ones(3), "relu"),
            "sample_scale has the wrong shape",
        ),
        (lambda: ops.block_packed(x, pack, 10, 80, None, "tanh"), "act is 'tanh'"),
        (lambda: ops.block_packed(x[0], pack, 10, 80, None, "relu"), "x has 3 dimensions"),
        (lambda: ops.pconv_pw_packed(x, pack, 10, 80, "relu"), "pack does not fit"),
        (lambda: ops.patch_conv_packed(x, pack, 8, 2, 2), "pack does not fit"),
        (lambda: ops.patch_conv_packed(x, pack, 8, 0, 2), "at least 1"),
        (lambda: ops.head_packed(x, pack, 8, 9, "relu"), "pack does not fit"),
        (
            lambda: ops.head_packed(
                x[:, :, :0],
                ops.pack([w["w_pw1"], w["w_pw1"]], [None] * 2, [None] * 2),
                80,
                80,
                "relu",
            ),
            ".",
        ),
        (lambda: ops.pconv3x3(x, torch.ones(10, 11, 3, 3)), "weight has the wrong shape"),
        (lambda: ops.pconv3x3(x.int(), w["w_partial"].int()), "unsupported dtype"),
        (lambda: ops.pack([w["w_pw1"]], [], [None]), "as many scales and shifts as weights"),
        (lambda: ops.pack([w["w_pw1"]], [torch.ones(3)], [None]), "scale has the wrong shape"),
        (
            lambda: ops.pack([w["w_pw1"], w["w_pw2"].double()], [None] * 2, [None] * 2),
            "weights of one dtype",
        ),
        (lambda: ops.pconv3x3_(x[:1].expand(2, -1, -1, -1), w["w_partial"]), "overlaps itself"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()


def test_empty_batches_and_images():
    """Nothing in, nothing out, no error."""
    w = weights(CASE)
    for shape in ((0, 40, 6, 7), (2, 40, 0, 7), (2, 40, 6, 0)):
        x = torch.ones(shape)
        y = fk.fasternet_block(x, w["w_partial"], w["w_pw1"], w["w_pw2"])
        assert y.shape == shape
        assert fk.pconv_pw(x, w["w_partial"], w["w_pw1"]).shape == (shape[0], 80, *shape[2:])
        assert fk.pconv3x3(x, w["w_partial"]).shape == shape
        assert fk.pconv3x3_(x, w["w_partial"]) is x


@pytest.mark.slow
def test_more_than_2_31_elements():
    """64-bit addressing: an image of 2^31 elements, of which the last rows are compared."""
    x = torch.empty(1, 8, 16400, 16400, dtype=torch.bfloat16, memory_format=torch.channels_last)
    assert x.numel() > 2**31
    x.fill_(1.0)
    tail = torch.randn(1, 8, 4, 16400).to(torch.bfloat16)
    x[:, :, -4:] = tail
    weight = torch.randn(2, 2, 3, 3).to(torch.bfloat16)
    y = fk.pconv3x3(x, weight)
    expected = fk.pconv3x3(x[:, :, -8:], weight)
    assert torch.equal(y[:, :, -4:], expected[:, :, -4:])
    fk.pconv3x3_(x, weight)
    assert torch.equal(x[:, :, -4:], expected[:, :, -4:])


def test_weights_without_elements():
    """Refused by the functions and, for callers of the raw ops, by the compiled kernels."""
    x = image(CASE)
    with pytest.raises(ValueError, match=r"w_pw has shape \(0, 40, 1, 1\), expected at least one"):
        call_pconv_pw(w_pw=torch.zeros(0, 40, 1, 1), scale=None, shift=None)
    none = {"w_pw1": torch.zeros(0, 40, 1, 1), "w_pw2": torch.zeros(40, 0, 1, 1)}
    with pytest.raises(ValueError, match=r"w_pw1 has shape .* expected at least one element"):
        call_block(**none, scale=None, shift=None)
    ops, w = torch.ops.fasternet_kernels, weights(CASE)
    with torch.no_grad():
        for call in (
            lambda: ops.head(x, torch.zeros(0, 40, 1, 1), None, torch.zeros(5, 0), None, "relu"),
            lambda: ops.block(x, w["w_partial"], *none.values(), None, None, None, None, "relu"),
            lambda: ops.pack([torch.zeros(0, 40)], [None], [None]),
            lambda: ops.patch_conv(x, torch.zeros(0, 40, 2, 2), None, None),
        ):
            with pytest.raises(RuntimeError, match=r"elements|does not fit"):
                call()
