"""Shapes, random inputs and the one criterion of the kernel tests.

A result is right when its error against float64 on the same rounded inputs, as relative L2 norm and
as maximum, is at most twice the larger of what eager PyTorch and a plain in-order loop make in the
same dtype, plus one ulp of the largest value; in float64, 1e-13 relative. NaN and infinities must
stand where the reference has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasternet_kernels.reference import ACTS, compute_dtype
from fasternet_kernels.selftest import allowed_errors, errors

FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
slow = pytest.mark.slow
DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of shapes. ``extra`` channels around x make it a slice of a wider tensor."""

    batch: int
    channels: int
    height: int
    width: int
    n_div: int = 4
    ratio: float = 2.0
    act: str = "relu"
    extra: int = 0

    @property
    def id(self) -> str:
        text = f"{self.batch}x{self.channels}x{self.height}x{self.width}-div{self.n_div}-{self.act}"
        return text + (f"-slice{self.extra}" if self.extra else "")

    @property
    def c_partial(self) -> int:
        return self.channels // self.n_div

    @property
    def c_hidden(self) -> int:
        return int(self.channels * self.ratio)


NETWORKS = {"t0": 40, "t1": 64, "t2": 96, "s": 128, "m": 144, "l": 192}
STAGES = [
    Case(
        1, width << stage, 56 >> stage, 56 >> stage, act="gelu" if name in ("t0", "t1") else "relu"
    )
    for name, width in NETWORKS.items()
    for stage in range(4)
]
EDGES = [
    *(Case(2, 40, 7, 9, act=act) for act in ACTS),
    *(Case(2, 24, 5, 6, n_div=n_div) for n_div in range(1, 9)),
    Case(1, 40, 1, 1),
    Case(3, 13, 7, 9, n_div=3),
    Case(0, 40, 7, 7),
    Case(2, 4, 3, 1, n_div=4),
    Case(2, 17, 1, 30, n_div=2, ratio=3.0, act="silu"),
    Case(1, 40, 3, 301, act="gelu"),
    Case(3, 40, 7, 9, extra=5),
    Case(1, 72, 4, 4, ratio=8.0),
    Case(1, 300, 4, 5, ratio=1.0),
]


def taking_turns(cases, ways):
    """(case, way) parameters, all there are. Each case is quick in one of the ways, which changes
    from stage to stage and from network to network; in the others it is slow, and everywhere if it
    is wider than 192 channels. Cases and ways are cases, strings or numbers."""
    return [
        pytest.param(
            case,
            way,
            id="-".join(str(getattr(part, "id", part)) for part in (case, way)),
            marks=[slow] * ((i + i // 4) % len(ways) != j or getattr(case, "channels", 0) > 192),
        )
        for i, case in enumerate(cases)
        for j, way in enumerate(ways)
    ]


def slow_if(condition, values, ids=str):
    """A parameter for each value, slow where the condition of its position and itself holds."""
    return [
        pytest.param(v, id=ids(v), marks=[slow] * bool(condition(i, v)))
        for i, v in enumerate(values)
    ]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, dtype=torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * scale).to(dtype)


def image(case: Case, dtype=torch.float32, memory_format=torch.channels_last) -> Tensor:
    wide = randn(
        case.batch, case.channels + case.extra, case.height, case.width, seed=1, dtype=dtype
    )
    wide = wide.to(memory_format=memory_format)
    begin = case.extra // 2
    return wide[:, begin : begin + case.channels]


def weights(case: Case, dtype=torch.float32) -> dict[str, Tensor]:
    """Arguments of a block, scaled so that every layer's output is of the order of one."""
    c, cp, ch = case.channels, case.c_partial, case.c_hidden
    vector = compute_dtype(dtype)
    return {
        "w_partial": randn(cp, cp, 3, 3, seed=2, dtype=dtype, scale=(9 * cp) ** -0.5),
        "w_pw1": randn(ch, c, 1, 1, seed=3, dtype=dtype, scale=c**-0.5),
        "w_pw2": randn(c, ch, 1, 1, seed=4, dtype=dtype, scale=ch**-0.5),
        "scale": randn(ch, seed=5, dtype=vector, scale=0.3) + 1,
        "shift": randn(ch, seed=6, dtype=vector),
        "layer_scale": randn(c, seed=7, dtype=vector, scale=0.3) + 1,
        "sample_scale": torch.rand(case.batch, generator=generator(8), dtype=torch.float64).to(
            vector
        )
        * 2,
    }


def double(value):
    """``value`` with every floating-point tensor in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: double(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(double(v) for v in value)
    return value


# ---- A plain in-order loop -----------------------------------------------------------------------


def loop_conv(x: Tensor, weight: Tensor, bias=None, stride=1, padding=0) -> Tensor:
    """A convolution as one multiply and one add at a time, in order of K, accumulated in the
    compute dtype."""
    dtype = compute_dtype(x.dtype)
    stride = (stride, stride) if isinstance(stride, int) else tuple(stride)
    n, _, kh, kw = weight.shape
    columns = F.unfold(x.to(dtype), (kh, kw), padding=padding, stride=stride)
    rows = weight.to(dtype).reshape(n, -1)
    total = columns.new_zeros(x.shape[0], n, columns.shape[2])
    for k in range(rows.shape[1]):
        total = total + columns[:, k : k + 1] * rows[:, k][:, None]
    height = (x.shape[2] + 2 * padding - kh) // stride[0] + 1
    width = (x.shape[3] + 2 * padding - kw) // stride[1] + 1
    if bias is not None:
        total = total + bias.to(dtype)[:, None]
    return total.reshape(x.shape[0], n, height, width).to(x.dtype)


# ---- The criterion -------------------------------------------------------------------------------


def assert_right(
    got: Tensor, exact: Tensor, *rivals: Tensor | Callable[[], Tensor], what: str = "result"
) -> None:
    """Holds ``got`` to the criterion. ``rivals`` are the same computation in the same dtype, the
    costly ones as callables, which are only run when the others do not settle it."""
    assert got.shape == exact.shape, (
        f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    )
    assert exact.dtype == torch.float64
    wide = got.double()
    assert torch.equal(wide.isnan(), exact.isnan()), (
        f"{what}: NaN in other places than in the reference"
    )
    largest_float = torch.finfo(got.dtype).max
    inf = exact.isinf() | (exact.abs() > largest_float)
    assert torch.equal(wide[wide.isinf()].sign(), exact[inf].sign()) and torch.equal(
        wide.isinf(), inf
    ), f"{what}: infinities in other places than in the reference"
    exact = exact.masked_fill(inf, float("inf"))
    finite = exact[exact.isfinite()]
    if finite.numel() == 0:
        return
    ours, rival_errors = errors(got, exact), []
    allowed = allowed_errors(exact, got.dtype, rival_errors)
    if got.dtype == torch.float64:
        rivals = ()
    for rival in rivals:
        rival = rival() if callable(rival) else rival
        assert rival.dtype == got.dtype, f"{what}: dtype {got.dtype}, eager has {rival.dtype}"
        rival_errors.append(errors(rival, exact))
        allowed = allowed_errors(exact, got.dtype, rival_errors)
        if ours.within(allowed):
            return
    norm = float(finite.norm().clamp_min(1e-300))
    assert ours.within(allowed), (
        f"{what}: relative L2 error {ours.l2 / norm:.2e} (allowed {allowed.l2 / norm:.2e}), "
        f"maximum {ours.maximum:.2e} (allowed {allowed.maximum:.2e})"
    )
