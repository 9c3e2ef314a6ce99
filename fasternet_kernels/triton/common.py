"""What the kernel files share: launching and recording, devices, tuned configurations, how images
lie in memory, and the small device functions (pieces of a width, activations).

Every kernel works on pixels: an image (B, C, H, W) in channels_last memory is a matrix of
M = B * H * W rows of C elements, ``step`` apart. A program finds its first row in 64 bits; what it
adds to that fits into 32, so tensors may have more than 2^31 elements, and batches more than 2^31
pixels. Images and weights of which that is not true are refused: :func:`check_reach` for whatever
is read or written, :func:`check_weight`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import dense, memory_format
from .layout import round_up, vector  # noqa: F401 - for the kernel files

# ---- Devices -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    """What launchers ask of a GPU. shared_memory: bytes that one program may have."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


_H100 = Device((9, 0), 132, 227 * 1024)
_pretended: Device | None = None


@functools.cache
def _cuda_device(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    return Device((p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin)


def device(t: Tensor) -> Device:
    """The GPU that ``t`` is on; what :func:`pretend` says, else an H100, for tensors on none."""
    if _pretended is not None:
        return _pretended
    return _cuda_device(t.device.index) if t.is_cuda else _H100


# ---- Launches ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch: ``kernel[grid](**args, num_warps=num_warps, num_stages=num_stages)``."""

    kernel: Any  # triton's JITFunction
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    num_stages: int


_launches: list[Launch] | None = None


@contextlib.contextmanager
def pretend(
    capability: tuple[int, int] = _H100.capability,
    multiprocessors: int = _H100.multiprocessors,
    shared_memory: int = _H100.shared_memory,
) -> Iterator[None]:
    """Launchers choose as if they were on that GPU."""
    global _pretended
    before, _pretended = _pretended, Device(capability, multiprocessors, shared_memory)
    try:
        yield
    finally:
        _pretended = before


@contextlib.contextmanager
def record(
    capability: tuple[int, int] = _H100.capability,
    multiprocessors: int = _H100.multiprocessors,
    shared_memory: int = _H100.shared_memory,
) -> Iterator[list[Launch]]:
    """Collects what would be launched on that GPU instead of launching it; outputs stay unwritten.
    Works on meta tensors."""
    global _launches
    before, _launches = _launches, []
    try:
        with pretend(capability, multiprocessors, shared_memory):
            yield _launches
    finally:
        _launches = before


def launch(kernel, grid: tuple[int, ...], *, num_warps: int, num_stages: int, **args) -> None:
    """Launches a kernel on the device of its tensors, or records that.

    Raises:
        ValueError: a grid that no GPU takes.
    """
    if 0 in grid:
        return
    if grid[0] >= 2**31 or any(n >= 2**16 for n in grid[1:]):
        raise ValueError(
            f"{kernel.__name__} would need a grid of {grid} programs for tensors of this size, "
            "expected less than 2^31, on other axes 2^16"
        )
    if _launches is not None:
        _launches.append(Launch(kernel, grid, args, num_warps, num_stages))
        return
    t = next(value for value in args.values() if isinstance(value, Tensor))
    elsewhere = t.is_cuda and t.device.index != torch.cuda.current_device()
    with torch.cuda.device(t.device) if elsewhere else contextlib.nullcontext():
        kernel[grid](**args, num_warps=num_warps, num_stages=num_stages)


# ---- Tuned configurations ------------------------------------------------------------------------


def precision(dtype: torch.dtype) -> str:
    """How products of that dtype are taken: "16" (fp16 and bf16), "tf32" or "fp32", for which
    convolutions in float32 follow ``torch.backends.cudnn``."""
    if dtype in (torch.float16, torch.bfloat16):
        return "16"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "fp32"


def dot_precision(dtype: torch.dtype) -> str:
    """The input_precision of tl.dot."""
    return "ieee" if precision(dtype) == "fp32" else "tf32"


@functools.cache
def _tables() -> list[dict]:
    folder = pathlib.Path(__file__).with_name("tuning")
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


@functools.cache
def _table(capability: tuple[int, int]) -> dict:
    listed = [(tuple(c), table) for table in _tables() for c in table["capabilities"]]
    nearest, table = max((row for row in listed if row[0] <= capability), key=lambda row: row[0])
    if nearest == capability:
        return table
    major, minor = nearest
    warnings.warn(
        f"fasternet_kernels has no tuning for compute capability {capability[0]}.{capability[1]}: "
        f"it takes that for {major}.{minor}",
        RuntimeWarning,
        stacklevel=5,
    )
    return table


@functools.lru_cache(maxsize=4096)
def _nearest(op: str, shape: tuple[int, ...], kind: str, capability: tuple[int, int]) -> dict:
    rows = [row for row in _table(capability)[op] if row["precision"] == kind]

    def distance(row) -> float:
        # The shape's first number, a width, counts for more than the others: it decides what fits.
        logs = [abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(shape, row["shape"])]
        return 16 * logs[0] + sum(logs[1:])

    return min(rows, key=distance)["config"]


def config(op: str, shape: tuple[int, ...], dtype: torch.dtype, on: Device) -> dict:
    """The configuration in tuning/ for the nearest shape: constants of the kernel beside num_warps
    and num_stages. ``shape`` is what the table's rows have for that op, a width first."""
    return _nearest(op, shape, precision(dtype), on.capability)


def rounded_act(act: str, dtype: torch.dtype) -> str:
    """The activation that :func:`activation` shall compute for a result in ``dtype``."""
    return "gelu_16" if act == "gelu" and dtype.itemsize == 2 else act


# ---- Images as pixels ----------------------------------------------------------------------------


def check_reach(x: Tensor) -> None:
    """Refuses images whose pixels 32-bit offsets within a tile do not reach.

    Raises:
        ValueError: an image has 2^30 pixels or a row 2^31 elements, or more.
    """
    _, channels, height, width = x.shape
    if height * width >= 2**30 or (width + 2**12) * max(channels, x.stride(3)) >= 2**31:
        raise ValueError(
            f"got images of {height} x {width} pixels of {channels} channels, expected less than "
            "2^30 pixels an image and 2^31 elements a row"
        )


def check_weight(weight: Tensor) -> None:
    """Refuses weights that 32-bit offsets do not reach.

    Raises:
        ValueError: it has 2^30 elements or more.
    """
    if weight.numel() >= 2**30:
        raise ValueError(
            f"got a weight of shape {tuple(weight.shape)}, expected less than 2^30 elements"
        )


def pixel_step(x: Tensor) -> int | None:
    """The distance between the pixels of a channels_last image, which may be a slice of the
    channels of a wider one; None if ``x`` lies in memory in another way.

    Raises:
        ValueError: as :func:`check_reach`.
    """
    check_reach(x)
    batch, channels, height, width = x.shape
    strides = ((width, x.stride(3), 1), (height, x.stride(2), width))
    strides += ((batch, x.stride(0), height * width),)
    step = next((stride // inner for size, stride, inner in strides if size > 1), channels)
    expected = (step * height * width, 1, step * width, step)
    if step < channels or any(
        size > 1 and a != b for size, a, b in zip(x.shape, x.stride(), expected)
    ):
        return None
    return step


def pixels(x: Tensor) -> tuple[Tensor, int]:
    """(x or a copy of it in channels_last memory, distance between its pixels)."""
    step = pixel_step(x)
    return (dense(x, torch.channels_last), x.shape[1]) if step is None else (x, step)


def empty_image(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised channels_last image of like's batch, height and width."""
    return empty_of_size(like, (channels, *like.shape[2:]), dtype)


def empty_of_size(like: Tensor, size: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """An uninitialised channels_last image of like's batch and that (C, H, W)."""
    shape = (like.shape[0], *size)
    y = torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)
    check_reach(y)
    return y


def in_format_of(y: Tensor, x: Tensor) -> Tensor:
    """``y``, channels_last, in the memory format that ``x`` suggests."""
    if y.numel() == 0:  # for which contiguous() leaves any strides
        return torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=memory_format(x))
    return dense(y, memory_format(x))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int, least: int = 16) -> int:
    """The next power of two; tl.dot takes no dimension under 16."""
    return max(least, triton.next_power_of_2(n))


def pieces(n: int, first: int = 0, most: int = 3, largest: int = 256) -> tuple[int, ...]:
    """Powers of two of at least 16 that together cover ``n`` with little waste, at most ``most``
    beyond what ``largest`` needs: 40 -> (32, 16), 192 -> (128, 64). ``first``: the first piece."""
    rest = -(-n // 16) * 16
    widths = []
    if first:
        widths.append(first)
        rest -= first
    while rest > largest:
        widths.append(largest)
        rest -= largest
    small: list[int] = []
    while rest > 0:
        last = len(small) == most - 1
        width = power_of_2(rest) if last else 1 << (rest.bit_length() - 1)
        small.append(width)
        rest -= width
    return (*widths, *small)


# ---- Device functions ----------------------------------------------------------------------------
# Sizes of tensors in Triton are powers of two. A width of 40 is a tuple of two, 32 and 16 wide.


@triton.constexpr_function
def piece_begin(widths, i):
    return sum(widths[:i])


@triton.jit
def piece_columns(WIDTHS: tl.constexpr, i: tl.constexpr):
    """The columns of the piece ``i``."""
    return piece_begin(WIDTHS, i) + tl.arange(0, WIDTHS[i])


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def zero_pieces(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """Accumulators, one for each piece."""
    pieces = ()
    for i in tl.static_range(len(WIDTHS)):
        pieces = pieces + (zeros(ROWS, WIDTHS[i]),)
    return pieces


@triton.jit
def activation(x, ACT: tl.constexpr):
    """The activation of float32 ``x``, NaN and infinities as PyTorch has them."""
    if ACT == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_16":
        # For results of 16 bits: x * erf by an odd polynomial of 9 terms that reaches 1 at 4.4, off
        # by at most 3.7e-5, fitted by least squares with weights raised where the error is largest.
        # 16 instructions and none of the special functions, whose unit bounds erf at small widths.
        t = tl.minimum(tl.maximum(x, -4.4), 4.4)
        u = t * t
        p = 7.141213315131623e-11
        p = p * u - 7.509986410525471e-09
        p = p * u + 3.4823207784029364e-07
        p = p * u - 9.450844117964152e-06
        p = p * u + 0.00016859731113072485
        p = p * u - 0.0021100512240082026
        p = p * u + 0.019286267459392548
        p = p * u - 0.13215318322181702
        p = p * u + 0.7975233793258667
        p = tl.minimum(tl.maximum(p * t, -1.0), 1.0)
        h = 0.5 * x
        x = h * p + h
    elif ACT == "gelu_tanh":
        # (1 + tanh(t)) / 2 = 1 / (1 + exp(-2 t))
        t = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-t))
    elif ACT == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACT == "hardswish":
        low = tl.maximum(x + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = x * tl.minimum(low, 6.0, propagate_nan=tl.PropagateNan.ALL) * (1.0 / 6.0)
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
    return x
