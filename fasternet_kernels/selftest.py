"""A self-test of every op on this machine: its kernel against float64, beside what eager PyTorch
makes of the same inputs.

An error is allowed to be twice eager's, in relative L2 norm and in maximum, plus one ulp of the
largest value; 1e-13 relative in float64. Of a weight's gradient, which is a long sum for every
element, the larger of eager's error and that of a plain loop over the pixels counts.
``fasternet-kernels check`` prints the rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import library, ops, reference, triton
from .reference import ACTS, BLOCK, EMIT, HEAD, PATCH_CONV, compute_dtype

_ops = torch.ops.fasternet_kernels
_FORMATS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison. error and allowed are relative L2 errors; ok also covers the maximum error,
    shape, strides and dtype."""

    op: str
    backend: str
    dtype: str
    layout: str
    error: float
    allowed: float
    ok: bool
    detail: str = ""


class Errors(NamedTuple):
    """How far a result is off, or may be: L2 norm and largest absolute value of the difference."""

    l2: float
    maximum: float

    def within(self, allowed: Errors) -> bool:
        """Whether both are allowed; NaN is not."""
        return self.l2 <= allowed.l2 and self.maximum <= allowed.maximum


def errors(got: Tensor, exact: Tensor) -> Errors:
    """The errors of ``got`` where ``exact``, in float64, is finite."""
    difference = (got.double() - exact)[exact.isfinite()]
    if difference.numel() == 0:
        return Errors(0.0, 0.0)
    return Errors(float(difference.norm()), float(difference.abs().max()))


def allowed_errors(
    exact: Tensor, dtype: torch.dtype, rivals: Iterable[Errors], factor: float = 2.0
) -> Errors:
    """What a right result in ``dtype`` may be off: each error at most ``factor`` times the largest
    of the rivals', plus one unit in the last place of the largest value; in float64, 1e-13
    relative.

    Args:
        exact: the result in float64, from the same rounded inputs.
        dtype: of the result.
        rivals: errors of the same computation in the same dtype by other means, such as eager
            PyTorch.
    """
    finite = exact[exact.isfinite()]
    if finite.numel() == 0:
        return Errors(0.0, 0.0)
    largest = float(finite.abs().max())
    if dtype == torch.float64:
        return Errors(1e-13 * float(finite.norm()), 1e-13 * largest)
    info = torch.finfo(dtype)
    ulp = info.eps * 2.0 ** math.floor(math.log2(max(largest, info.tiny)))
    rivals = list(rivals)
    return Errors(
        factor * max((rival.l2 for rival in rivals), default=0.0) + ulp,
        factor * max((rival.maximum for rival in rivals), default=0.0) + ulp,
    )


class _PlainLoop(TorchDispatchMode):
    """Weights' gradients of convolutions summed over the pixels in order, one at a time."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.convolution_backward.default or not args[10][1]:
            return result
        grad, x, weight, _, stride, padding = args[:6]
        dtype = compute_dtype(weight.dtype)
        columns = F.unfold(x.to(dtype), weight.shape[2:], padding=padding, stride=stride)
        total = torch.zeros(weight.shape[0], columns.shape[1], dtype=dtype, device=x.device)
        for g, c in zip(grad.to(dtype).flatten(2), columns):
            for pixel in range(c.shape[1]):
                total += torch.outer(g[:, pixel], c[:, pixel])
        return result[0], total.reshape(weight.shape).to(weight.dtype), result[2]


def _compare(
    got: Tensor, exact: Tensor, eager: Tensor, *rivals: Tensor
) -> tuple[float, float, str]:
    """(relative error, allowed relative error, what is wrong or an empty string)."""
    if got.shape != eager.shape or got.dtype != eager.dtype or got.stride() != eager.stride():
        return float("inf"), 0.0, "shape, strides or dtype differ from eager's"
    ours = errors(got, exact)
    allowed = allowed_errors(exact, got.dtype, [errors(r, exact) for r in (eager, *rivals)])
    detail = ""
    if not ours.within(allowed):
        detail = f"maximum error {ours.maximum:.1e}, allowed {allowed.maximum:.1e}"
    norm = max(float(exact.norm()), 1e-30)
    return ours.l2 / norm, allowed.l2 / norm, detail


def _arguments(
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    act: str,
    device: torch.device,
    exact: bool = False,
    make_pack: Callable = reference.pack,
) -> dict[str, tuple]:
    """Arguments for every op: a batch of two at 40 channels, 10 of them convolved, 9x7 pixels.

    With ``exact``, the same values, rounded to ``dtype``, in float64, and packs made of those.
    ``make_pack``: each device type has packs of its own.
    """
    generator = torch.Generator().manual_seed(0)
    compute = compute_dtype(dtype)

    def finish(t, of):
        t = t.to(device=device, dtype=of)
        return t.double() if exact else t

    def randn(*shape, of=dtype):
        fan_in = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 1
        t = torch.randn(*shape, generator=generator, dtype=torch.float64) / fan_in**0.5
        return finish(t, of)

    def image(*shape):
        t = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return finish(t, dtype).to(memory_format=memory_format)

    x, z, pixels = image(2, 40, 9, 7), image(2, 80, 9, 7), image(2, 3, 16, 24)
    partial, pw1, pw2 = randn(10, 10, 3, 3), randn(80, 40, 1, 1), randn(40, 80, 1, 1)
    scale, shift, mean = (randn(80, of=compute) for _ in range(3))
    layer, sample = randn(40, of=compute), randn(2, of=compute)
    patch, patch_shift = randn(40, 3, 4, 4), randn(40, of=compute)
    w_conv, w_fc = randn(70, 40, 1, 1), randn(30, 70)
    b_conv, b_fc = randn(70), randn(30)
    weights = [partial, pw1, pw2]
    pack = make_pack(weights, [None, scale, layer], [None, shift, None])
    pack_pw = make_pack(weights[:2], [None, scale], [None, shift])
    pack_patch = make_pack([patch], [None], [patch_shift])
    pack_head = make_pack(
        [w_conv, w_fc],
        [None, None],
        [b_conv.to(compute_dtype(b_conv.dtype)), b_fc.to(compute_dtype(b_fc.dtype))],
    )
    patches = image(2, 40, 4, 6)
    code = ACTS.index(act)
    plan = [
        PATCH_CONV,
        40,
        4,
        4,
        0,
        BLOCK,
        10,
        80,
        0,
        code,
        EMIT,
        0,
        0,
        0,
        0,
        HEAD,
        70,
        30,
        0,
        code,
    ]
    block = (partial, pw1, pw2, scale, shift, layer, sample, act)
    return {
        "pconv3x3": (x, partial),
        "pconv3x3_": (x, partial),
        "pconv3x3_backward": (x.flip(0), x[:, :10], partial, [True, True]),
        "pack": (weights, [None, scale, layer], [None, shift, None]),
        "pconv_pw": (x, partial, pw1, scale, shift, act),
        "pconv_pw_packed": (x, pack_pw, 10, 80, act),
        "pconv_pw_backward": (z, x, partial, pw1, scale, shift, act, [True] * 5),
        "block": (x, *block),
        "block_packed": (x, pack, 10, 80, sample, act),
        "block_backward": (x.flip(0), x, *block, [True] * 8),
        "patch_conv": (pixels, patch, None, patch_shift),
        "patch_conv_packed": (pixels, pack_patch, 40, 4, 4),
        "patch_conv_backward": (
            patches,
            pixels,
            patch,
            None,
            patch_shift,
            [True, True, False, True],
        ),
        "head": (x, w_conv, b_conv, w_fc, b_fc, act),
        "head_packed": (x, pack_head, 70, 30, act),
        "head_backward": (randn(2, 30), x, w_conv, b_conv, w_fc, b_fc, act, [True] * 5),
        "network": (pixels, [pack_patch, pack, pack_head], plan),
        "pw_stats": (x, partial, pw1),
        "pw_stats_backward": (z, mean, shift, x, z, mean, partial, pw1, [True] * 3, x),
        "patch_stats": (pixels, patch),
        "patch_stats_backward": (
            *(patches, mean[:40], shift[:40], pixels, patches.flip(0), mean[:40], patch),
            [True] * 2,
        ),
        "bn_act": (z, mean, scale, shift, act),
        "bn_act_backward": (z.flip(0), z, mean, scale, shift, act, [True] * 4),
        "bn_act_recompute_backward": (
            *(z, x, mean, scale, shift, partial, pw1, act),
            [True] * 4,
        ),
        "act_pw_residual": (x, z, mean, scale, shift, pw2, layer, sample, act),
        "act_pw_residual_backward": (x, z, mean, scale, shift, pw2, layer, sample, act, [True] * 7),
        "act_pw_residual_recompute_backward": (
            *(x, x, mean, scale, shift, partial, pw1, pw2, layer, sample, act),
            [True] * 7,
        ),
        "batch_norm_layer": (x, partial, pw1, scale, shift, pw2, layer, sample, 1e-5, act),
        "batch_norm_layer_backward": (
            *(x.flip(0), x, partial, pw1, scale, shift, pw2, layer, sample, z, mean),
            *(scale.square(), 1e-5, act, [True] * 8),
        ),
    }


def _results(fn: Callable, args: tuple) -> list[Tensor]:
    if fn in (_ops.pconv3x3_, reference.pconv3x3_):
        x = args[0].clone()
        fn(x, *args[1:])
        return [x]
    results = fn(*args)
    return [results] if isinstance(results, Tensor) else list(results)


def backend_of(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """What runs op ``name`` on ``device``: the compiled kernel's instruction set, Triton, or the
    PyTorch reference."""
    if device.type == "cpu" and library.has_kernel(name):
        return library.status().isa or "compiled"
    if device.type == "cuda" and library.has_kernel(name, "cuda") and dtype != torch.float64:
        return "triton"
    return "reference"


def run(progress: Callable[[int, int], None] | None = None, device: str = "cpu") -> list[Row]:
    """Compares every op with float64 in every dtype and layout it takes, on ``device``; a few
    seconds on a CPU.

    Args:
        progress: called as progress(done, total) after each comparison.
        device: where the ops run; the float64 results are computed on the CPU.

    Returns:
        One row for each op, dtype and layout. An op without a kernel on this device runs its
        reference; its row says so and only shows that it is the same computation as in float64.
    """
    where = torch.device(device)
    combinations = [(dtype, layout) for dtype in _DTYPES for layout in _FORMATS]
    total = len(ops.SCHEMAS) * len(combinations)
    rows: list[Row] = []
    for i, (dtype, layout) in enumerate(combinations):
        act = ACTS[1 + i % (len(ACTS) - 1)]
        plain_arguments = _arguments(dtype, _FORMATS[layout], act, where)
        arguments = _arguments(dtype, _FORMATS[layout], act, where, make_pack=_ops.pack)
        doubles = _arguments(dtype, _FORMATS[layout], act, where, exact=True)
        for name in ops.SCHEMAS:
            args = plain_arguments[name]
            plain = getattr(reference, name)
            try:
                with torch.no_grad():
                    exact = [r.cpu() for r in _results(plain, doubles[name])]
                    eager = [r.cpu() for r in _results(plain, args)]
                    got = [r.cpu() for r in _results(getattr(_ops, name), arguments[name])]
                if name == "pack":
                    # float64 has other panels: the plain packing is the reference. Packs for Triton
                    # are unlike it; the rows of the ops that read them show that they are right.
                    eager = got if triton.serves(*args[0]) else eager
                    exact = [r.double() for r in eager]
                found = [_compare(*row) for row in zip(got, exact, eager, strict=True)]
                if any(row[2] for row in found) and name.endswith("_backward"):
                    with torch.no_grad(), _PlainLoop():
                        loop = [r.cpu() for r in _results(plain, args)]
                    found = [_compare(*row) for row in zip(got, exact, eager, loop, strict=True)]
                error, allowed, detail = max(found, key=lambda row: (row[2] != "", row[0]))
            except Exception as failure:  # a row that cannot be computed is a finding, not an end
                error, allowed, detail = float("inf"), 0.0, f"{type(failure).__name__}: {failure}"
            short = str(dtype).removeprefix("torch.")
            rows.append(
                Row(
                    name,
                    backend_of(name, where, dtype),
                    short,
                    layout,
                    error,
                    allowed,
                    detail == "",
                    detail,
                )
            )
            if progress is not None:
                progress(len(rows), total)
    return rows
