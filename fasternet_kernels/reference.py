"""The operators in plain PyTorch: what every kernel is compared with, and what runs where there is
no kernel.

Each function here has the name and the arguments of an op in :mod:`fasternet_kernels.ops`, where
shapes are documented, and is registered as its ``CompositeExplicitAutograd`` implementation. PConv
is written as in the official code: split, convolve, concatenate. Backward functions recompute what
they need from their arguments.

Types. The convolutions run in the weights' dtype (autocast hands in float32 ``x`` beside bfloat16
weights); scale, shift and statistics are float32, or float64 beside float64. Outputs follow the
memory format that ``x`` suggests.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ACTS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "hardswish")


def memory_format(x: Tensor) -> torch.memory_format:
    """What ``Tensor.suggest_memory_format()`` answers in C++: channels_last if strides are ordered
    N >= H >= W >= C."""
    size, stride = x.shape, x.stride()
    if stride[1] == 0:
        return torch.contiguous_format
    least = 0
    for d in (1, 3, 2, 0):
        if size[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return torch.contiguous_format
        least = stride[d] * size[d]
    return torch.channels_last


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulation, statistics and packs: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense(t: Tensor, fmt: torch.memory_format = torch.contiguous_format) -> Tensor:
    """``t`` with exactly the strides that ``torch.empty`` gives that format, also where a dimension
    is 1 and ``contiguous()`` leaves any stride."""
    t = t.contiguous(memory_format=fmt)
    if 1 in t.shape:
        exact = torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=fmt)
        if exact.stride() != t.stride():
            return exact.copy_(t)
    return t


def like(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in the memory format of ``x``."""
    return dense(y, memory_format(x))


def apply_act(x: Tensor, act: str) -> Tensor:
    """The activation named ``act`` of ``x``."""
    if act == "relu":
        return F.relu(x)
    if act == "gelu":
        return F.gelu(x)
    if act == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if act == "silu":
        return F.silu(x)
    if act == "hardswish":
        return F.hardswish(x)
    if act == "identity":
        return x
    raise ValueError(f"act is {act!r}, expected one of {', '.join(ACTS)}")


def act_backward(grad: Tensor, x: Tensor, act: str) -> Tensor:
    """``grad`` times the derivative of the activation at ``x``."""
    aten = torch.ops.aten
    if act == "relu":
        return aten.threshold_backward(grad, x, 0)
    if act == "gelu":
        return aten.gelu_backward(grad, x)
    if act == "gelu_tanh":
        return aten.gelu_backward(grad, x, approximate="tanh")
    if act == "silu":
        return aten.silu_backward(grad, x)
    if act == "hardswish":
        return aten.hardswish_backward(grad, x)
    return grad


def _column(v: Tensor) -> Tensor:
    """A per-channel vector as (C, 1, 1), to broadcast over (B, C, H, W)."""
    return v[:, None, None]


def _scaled(z: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is not None:
        z = z * _column(scale)
    return z if shift is None else z + _column(shift)


def _conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    need_x: bool,
    need_weight: bool,
    stride=(1, 1),
    padding=0,
):
    """(dx, dweight) of a convolution without bias; None where not needed."""
    if not (need_x or need_weight):
        return None, None
    dx, dw, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        stride,
        (padding, padding),
        (1, 1),
        False,
        (0, 0),
        1,
        (need_x, need_weight, False),
    )
    return dx if need_x else None, like(dw, weight) if need_weight else None


def _sum(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    return t.sum(dims, dtype=compute_dtype(t.dtype))


def _results(x: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients for an op's return: an empty tensor stands for one that was not asked for."""
    return tuple(x.new_empty(0) if g is None else g for g in grads)


# ---- Forward -------------------------------------------------------------------------------------


def _pconv(x: Tensor, weight: Tensor) -> Tensor:
    c_partial = weight.shape[0]
    convolved = F.conv2d(x[:, :c_partial], weight, padding=1)
    return torch.cat((convolved, x[:, c_partial:]), dim=1)


def pconv3x3(x: Tensor, weight: Tensor, fast: bool = False) -> Tensor:
    c_partial = weight.shape[0]
    convolved = F.conv2d(x[:, :c_partial].to(weight.dtype), weight, padding=1).to(x.dtype)
    return like(torch.cat((convolved, x[:, c_partial:]), dim=1), x)


def pconv3x3_(x: Tensor, weight: Tensor) -> None:
    partial = x[:, : weight.shape[0]]
    partial.copy_(F.conv2d(partial.to(weight.dtype), weight, padding=1))


def pconv_pw(x, w_partial, w_pw, scale, shift, act: str, fast: bool = False) -> Tensor:
    z = F.conv2d(_pconv(x.to(w_pw.dtype), w_partial), w_pw)
    return like(apply_act(_scaled(z, scale, shift), act).to(w_pw.dtype), x)


def block(
    x,
    w_partial,
    w_pw1,
    w_pw2,
    scale,
    shift,
    layer_scale,
    sample_scale,
    act: str,
    fast: bool = False,
) -> Tensor:
    z = F.conv2d(_pconv(x.to(w_pw1.dtype), w_partial), w_pw1)
    a = apply_act(_scaled(z, scale, shift), act).to(w_pw1.dtype)
    return act_residual(x, a, w_pw2, layer_scale, sample_scale)


def act_residual(x, a, w_pw2, layer_scale, sample_scale) -> Tensor:
    """x + sample_scale * layer_scale * conv1x1(a, w_pw2): the end of a block."""
    branch = F.conv2d(a, w_pw2)
    if layer_scale is not None:
        branch = branch * _column(layer_scale)
    if sample_scale is not None:
        branch = branch * sample_scale[:, None, None, None]
    return like((x + branch).to(torch.result_type(x, a)), x)


def patch_conv(x, weight, scale, shift, channels_last: bool = False) -> Tensor:
    y = _scaled(F.conv2d(x.to(weight.dtype), weight, stride=weight.shape[2:]), scale, shift).to(
        weight.dtype
    )
    return dense(y, torch.channels_last) if channels_last else like(y, x)


def head(x, w_conv, b_conv, w_fc, b_fc, act: str) -> Tensor:
    a = apply_act(F.conv2d(x.to(w_conv.dtype).mean((2, 3), keepdim=True), w_conv, b_conv), act)
    return F.linear(a.flatten(1), w_fc, b_fc)


# ---- Packs ---------------------------------------------------------------------------------------
# One flat tensor: for each weight, panels of output channels the width of a cache line (the last
# half that width where it suffices), each panel K rows; then the shift; padded with zeros to a
# cache line. Of several weights, a first one that is 3x3 is PConv's: its kernel columns are outputs
# of their own. csrc/fasternet_cpu.h, "Packed weights".


def panel_width(dtype: torch.dtype) -> int:
    """Output channels in a panel: 64 bytes of the compute dtype."""
    return 8 if dtype == torch.float64 else 16


def packed_size(n: int, k: int, dtype: torch.dtype) -> int:
    """Elements of the packed weight of a GEMM with ``n`` outputs and depth ``k``, in the compute
    dtype ``dtype``."""
    width = panel_width(dtype)
    padded = (n + width // 2 - 1) // (width // 2) * (width // 2)
    return (padded * (k + 1) + width - 1) // width * width


def gemm_shapes(shapes: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    """The (n, k) of each weight of a pack, for weights of shapes (N, C, kh, kw) or (N, C)."""
    gemms = [(shape[0], math.prod(shape[1:])) for shape in shapes]
    if _starts_with_pconv(shapes):
        gemms[0] = (3 * gemms[0][0], gemms[0][1] // 3)
    return gemms


def _starts_with_pconv(shapes) -> bool:
    return len(shapes) > 1 and tuple(shapes[0][2:]) == (3, 3)


# Winograd's transforms of a filter, F(2, 3) down its columns and F(4, 3) along its rows
# (arXiv 1509.09308).
_WINOGRAD_ROWS = ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1))
_WINOGRAD_COLUMNS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


def has_fast_tier(c_partial: int, dtype: torch.dtype) -> bool:
    """Whether a pack may hold PConv's transformed weights: what the kernels use them for."""
    return dtype == torch.float32 and c_partial >= 24 and c_partial % 8 == 0


def packed_fast_size(weights: list[Tensor]) -> int:
    """Elements that ``pack(weights, ..., fast=True)`` adds: those of PConv's 24 transformed
    weights, where there is a fast tier."""
    c_partial, c_in = weights[0].shape[:2]
    has_fast = c_in == c_partial and has_fast_tier(c_partial, weights[0].dtype)
    if not (has_fast and _starts_with_pconv([w.shape for w in weights])):
        return 0
    return 24 * packed_size(c_partial, c_partial, torch.float32)


def _pack_fast(weight: Tensor) -> Tensor:
    """The transformed weights, each packed like a 1x1 convolution's."""
    rows, columns = (
        torch.tensor(m, dtype=torch.float64, device=weight.device)
        for m in (_WINOGRAD_ROWS, _WINOGRAD_COLUMNS)
    )
    products = torch.einsum("ih,jw,nchw->ijnc", rows, columns, weight.double())
    return torch.cat([pack([w], [None], [None]) for w in products.flatten(0, 1).float()])


def pack(
    weights: list[Tensor],
    scales: list[Tensor | None],
    shifts: list[Tensor | None],
    fast: bool = False,
) -> Tensor:
    pieces = []
    with_pconv = _starts_with_pconv([w.shape for w in weights])
    for i, (weight, scale, shift) in enumerate(zip(weights, scales, shifts)):
        dtype = compute_dtype(weight.dtype)
        width = panel_width(dtype)
        rows = weight.to(dtype)
        if scale is not None:
            factors = scale.to(dtype).double().reshape(-1, *[1] * (rows.dim() - 1))
            rows = (rows.double() * factors).to(dtype)
        bias = rows.new_zeros(rows.shape[0]) if shift is None else shift.to(dtype)
        if with_pconv and i == 0:  # (kernel column, output) by (kernel row, input)
            rows, bias = rows.permute(3, 0, 2, 1).flatten(0, 1), bias.repeat(3)
        elif rows.dim() == 4:
            rows = rows.permute(0, 2, 3, 1)
        rows = rows.flatten(1)
        n, k = rows.shape
        padded = F.pad(rows, (0, 0, 0, -n % (width // 2)))
        full = padded.shape[0] // width * width
        pieces.append(padded[:full].reshape(-1, width, k).transpose(1, 2).reshape(-1))
        pieces.append(padded[full:].t().reshape(-1))
        pieces.append(F.pad(bias, (0, padded.shape[0] - n)))
        pieces.append(rows.new_zeros(-padded.shape[0] * (k + 1) % width))
    if fast and packed_fast_size(weights):
        pieces.append(_pack_fast(weights[0]))
    return torch.cat(pieces)


def unpack(packed: Tensor, shapes: list[tuple[int, int, int, int]]) -> list[tuple[Tensor, Tensor]]:
    """The (weight, shift) pairs in ``packed``, weights of the given (n, c, kh, kw) shapes with
    their scale folded in."""
    pairs = []
    begin = 0
    width = panel_width(packed.dtype)
    for i, ((n, k), shape) in enumerate(zip(gemm_shapes(shapes), shapes)):
        padded = (n + width // 2 - 1) // (width // 2) * (width // 2)
        full = padded // width * width
        panels = packed[begin : begin + padded * k]
        rows = panels[: full * k].reshape(-1, k, width).transpose(1, 2).reshape(full, k)
        half = panels[full * k :].reshape(k, padded - full).t()
        rows = torch.cat((rows, half))[:n]
        outputs, c, kh, kw = shape
        if i == 0 and _starts_with_pconv(shapes):
            rows = rows.reshape(kw, outputs, kh, c).permute(1, 3, 2, 0)
        else:
            rows = rows.reshape(outputs, kh, kw, c).permute(0, 3, 1, 2)
        shift = packed[begin + padded * k : begin + padded * k + outputs]
        pairs.append((rows, shift))
        begin += packed_size(n, k, packed.dtype)
    return pairs


def pconv_pw_packed(x, packed, c_partial: int, c_out: int, act: str, fast: bool = False) -> Tensor:
    (w_partial, _), (w_pw, shift) = unpack(
        packed, [(c_partial, c_partial, 3, 3), (c_out, x.shape[1], 1, 1)]
    )
    return like(pconv_pw(x.to(packed.dtype), w_partial, w_pw, None, shift, act).to(x.dtype), x)


def block_packed(
    x, packed, c_partial: int, c_hidden: int, sample_scale, act: str, fast: bool = False
) -> Tensor:
    c = x.shape[1]
    shapes = [(c_partial, c_partial, 3, 3), (c_hidden, c, 1, 1), (c, c_hidden, 1, 1)]
    (w_partial, _), (w_pw1, shift), (w_pw2, _) = unpack(packed, shapes)
    y = block(x.to(packed.dtype), w_partial, w_pw1, w_pw2, None, shift, None, sample_scale, act)
    return like(y.to(x.dtype), x)


def patch_conv_packed(
    x, packed, c_out: int, kh: int, kw: int, channels_last: bool = False
) -> Tensor:
    ((weight, shift),) = unpack(packed, [(c_out, x.shape[1], kh, kw)])
    y = patch_conv(x.to(packed.dtype), weight, None, shift, channels_last).to(x.dtype)
    return y if channels_last else like(y, x)


def head_packed(x, packed, c_mid: int, c_out: int, act: str) -> Tensor:
    (w_conv, b_conv), (w_fc, b_fc) = unpack(
        packed, [(c_mid, x.shape[1], 1, 1), (c_out, c_mid, 1, 1)]
    )
    return head(x.to(packed.dtype), w_conv, b_conv, w_fc[:, :, 0, 0], b_fc, act).to(x.dtype)


# The steps of a network plan: five integers each, (kind, a, b, c, act).
PATCH_CONV, BLOCK, HEAD, EMIT = range(4)


def network(x: Tensor, packs: list[Tensor], plan: list[int], fast: bool = False) -> list[Tensor]:
    outputs = []
    remaining = iter(packs)
    for i in range(0, len(plan), 5):
        kind, a, b, c, act = plan[i : i + 5]
        if kind == PATCH_CONV:
            x = patch_conv_packed(x, next(remaining), a, b, c, channels_last=True)
        elif kind == BLOCK:
            x = block_packed(x, next(remaining), a, b, None, ACTS[act])
        elif kind == HEAD:
            outputs.append(head_packed(x, next(remaining), a, b, ACTS[act]))
        else:
            outputs.append(x.clone(memory_format=torch.channels_last))
    return outputs


# ---- Training ------------------------------------------------------------------------------------


def statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, sum of squared deviations from it) of each channel, in the compute dtype."""
    wide = z.to(compute_dtype(z.dtype))
    mean = wide.mean((0, 2, 3))
    return mean, (wide - _column(mean)).square().sum((0, 2, 3))


def pw_stats(x, w_partial, w_pw) -> tuple[Tensor, Tensor, Tensor]:
    z = like(F.conv2d(_pconv(x.to(w_pw.dtype), w_partial), w_pw), x)
    return z, *statistics(z)


def patch_stats(x, weight) -> tuple[Tensor, Tensor, Tensor]:
    z = patch_conv(x, weight, None, None, True)
    return z, *statistics(z)


def _normalise(z, mean, scale, shift) -> tuple[Tensor, Tensor]:
    """(z - mean, (z - mean) * scale + shift): subtracting first keeps a large mean's digits."""
    centred = z - _column(mean)
    return centred, torch.addcmul(_column(shift), centred, _column(scale))


def bn_act(z, mean, scale, shift, act: str) -> Tensor:
    return like(apply_act(_normalise(z, mean, scale, shift)[1], act).to(z.dtype), z)


def act_pw_residual(x, z, mean, scale, shift, w_pw2, layer_scale, sample_scale, act: str) -> Tensor:
    return act_residual(x, bn_act(z, mean, scale, shift, act), w_pw2, layer_scale, sample_scale)


# ---- Backward ------------------------------------------------------------------------------------


def pconv3x3_backward(grad, x_partial, weight, output_mask: list[bool]) -> tuple[Tensor, Tensor]:
    c_partial = weight.shape[0]
    need_x, need_weight = output_mask
    dx, dw = _conv_backward(
        grad[:, :c_partial].to(weight.dtype),
        x_partial.to(weight.dtype),
        weight,
        need_x,
        need_weight,
        padding=1,
    )
    if need_x:
        dx = like(torch.cat((dx.to(grad.dtype), grad[:, c_partial:]), dim=1), grad)
    return _results(grad, dx, dw)


def _pconv_pw_conv_backward(dz, x, u, w_partial, w_pw, need_x, need_partial, need_pw):
    """Gradients of conv1x1(pconv(x)): dz in the weights' dtype, u the PConv's output. dx in x's
    dtype."""
    c_partial = w_partial.shape[0]
    du, dw_pw = _conv_backward(dz, u, w_pw, need_x or need_partial, need_pw)
    dx = dw_partial = None
    if du is not None:
        partial = x[:, :c_partial].to(w_partial.dtype)
        dx_partial, dw_partial = _conv_backward(
            du[:, :c_partial], partial, w_partial, need_x, need_partial, padding=1
        )
        if need_x:
            dx = like(torch.cat((dx_partial, du[:, c_partial:]), dim=1).to(x.dtype), x)
    return dx, dw_partial, dw_pw


def _scaled_act_backward(da, z, scale, shift, act, need_scale, need_shift):
    """From the gradient of act(z * scale + shift): (dz, dscale, dshift)."""
    dt = act_backward(
        da.to(compute_dtype(da.dtype)), _scaled(z, scale, shift).to(compute_dtype(z.dtype)), act
    )
    dscale = _sum(dt * z, (0, 2, 3)).to(scale.dtype) if need_scale else None
    dshift = _sum(dt, (0, 2, 3)).to(shift.dtype) if need_shift else None
    return (dt if scale is None else dt * _column(scale)).to(z.dtype), dscale, dshift


def pconv_pw_backward(
    grad, x, w_partial, w_pw, scale, shift, act: str, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    need_x, need_partial, need_pw, need_scale, need_shift = output_mask
    u = _pconv(x.to(w_pw.dtype), w_partial)
    z = F.conv2d(u, w_pw)
    dz, dscale, dshift = _scaled_act_backward(grad, z, scale, shift, act, need_scale, need_shift)
    dx, dw_partial, dw_pw = _pconv_pw_conv_backward(
        dz, x, u, w_partial, w_pw, need_x, need_partial, need_pw
    )
    return _results(grad, dx, dw_partial, dw_pw, dscale, dshift)


def _branch_backward(
    grad, a, w_pw2, layer_scale, sample_scale, need_a, need_pw2, need_layer, need_sample
):
    """From the gradient of act_residual: (da, dw_pw2, dlayer_scale, dsample_scale), da in a's
    dtype."""
    g = grad.to(compute_dtype(grad.dtype))
    branch = F.conv2d(a, w_pw2) if need_layer or need_sample else None
    dsample = dlayer = None
    if need_sample:
        scaled = branch if layer_scale is None else branch * _column(layer_scale)
        dsample = _sum(g * scaled, (1, 2, 3)).to(sample_scale.dtype)
    if sample_scale is not None:
        g = g * sample_scale[:, None, None, None]
    if need_layer:
        dlayer = _sum(g * branch, (0, 2, 3)).to(layer_scale.dtype)
    if layer_scale is not None:
        g = g * _column(layer_scale)
    da, dw_pw2 = _conv_backward(g.to(a.dtype), a, w_pw2, need_a, need_pw2)
    return da, dw_pw2, dlayer, dsample


def block_backward(
    grad,
    x,
    w_partial,
    w_pw1,
    w_pw2,
    scale,
    shift,
    layer_scale,
    sample_scale,
    act: str,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    need_x, need_partial, need_pw1, need_pw2, need_scale, need_shift, need_layer, need_sample = (
        output_mask
    )
    u = _pconv(x.to(w_pw1.dtype), w_partial)
    z = F.conv2d(u, w_pw1)
    a = apply_act(_scaled(z, scale, shift), act).to(w_pw1.dtype)
    inner = need_x or need_partial or need_pw1 or need_scale or need_shift
    da, dw_pw2, dlayer, dsample = _branch_backward(
        grad, a, w_pw2, layer_scale, sample_scale, inner, need_pw2, need_layer, need_sample
    )
    dx = dw_partial = dw_pw1 = dscale = dshift = None
    if inner:
        dz, dscale, dshift = _scaled_act_backward(da, z, scale, shift, act, need_scale, need_shift)
        dx, dw_partial, dw_pw1 = _pconv_pw_conv_backward(
            dz, x, u, w_partial, w_pw1, need_x, need_partial, need_pw1
        )
    if need_x:
        dx = like((grad + dx).to(x.dtype), x)
    return _results(grad, dx, dw_partial, dw_pw1, dw_pw2, dscale, dshift, dlayer, dsample)


def patch_conv_backward(
    grad, x, weight, scale, shift, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    need_x, need_weight, need_scale, need_shift = output_mask
    stride = weight.shape[2:]
    g = grad.to(compute_dtype(grad.dtype))
    dscale = None
    if need_scale:
        dscale = _sum(g * F.conv2d(x.to(weight.dtype), weight, stride=stride), (0, 2, 3)).to(
            scale.dtype
        )
    dshift = _sum(g, (0, 2, 3)).to(shift.dtype) if need_shift else None
    if scale is not None:
        g = g * _column(scale)
    dx, dw = _conv_backward(
        g.to(weight.dtype), x.to(weight.dtype), weight, need_x, need_weight, stride=stride
    )
    return _results(grad, None if dx is None else like(dx.to(x.dtype), x), dw, dscale, dshift)


def head_backward(
    grad, x, w_conv, b_conv, w_fc, b_fc, act: str, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    need_x, need_w_conv, need_b_conv, need_w_fc, need_b_fc = output_mask
    pooled = x.to(w_conv.dtype).mean((2, 3))
    w_mid = w_conv[:, :, 0, 0]
    z = F.linear(pooled, w_mid, b_conv)
    dw_fc = grad.t() @ apply_act(z, act) if need_w_fc else None
    db_fc = _sum(grad, (0,)).to(b_fc.dtype) if need_b_fc else None
    dz = act_backward(grad @ w_fc, z, act)
    dw_conv = like((dz.t() @ pooled)[:, :, None, None], w_conv) if need_w_conv else None
    db_conv = _sum(dz, (0,)).to(b_conv.dtype) if need_b_conv else None
    dx = None
    if need_x:
        dx = ((dz @ w_mid) / (x.shape[2] * x.shape[3])).to(x.dtype)[:, :, None, None].expand_as(x)
        dx = torch.empty_like(x, memory_format=memory_format(x)).copy_(dx)
    return _results(grad, dx, dw_conv, db_conv, dw_fc, db_fc)


def statistics_backward(dz, dmean, dm2, z, mean) -> Tensor:
    """The gradient of z from those of z, mean and m2: mean = sum(z) / n, and the derivative of
    m2 = sum((z - mean)^2) by the mean is zero."""
    n = z.shape[0] * z.shape[2] * z.shape[3]
    wide = torch.addcmul(dz + _column(dmean / max(n, 1)), z - _column(mean), _column(2 * dm2))
    return wide.to(z.dtype)


def pw_stats_backward(
    dz, dmean, dm2, x, z, mean, w_partial, w_pw, output_mask: list[bool], dy=None
) -> tuple[Tensor, ...]:
    total = statistics_backward(dz, dmean, dm2, z, mean)
    u = _pconv(x.to(w_pw.dtype), w_partial)
    dx, *others = _pconv_pw_conv_backward(total, x, u, w_partial, w_pw, *output_mask)
    if dx is not None and dy is not None:
        dx = like((dy + dx).to(x.dtype), x)
    return _results(dz, dx, *others)


def patch_stats_backward(
    dz, dmean, dm2, x, z, mean, weight, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    total = statistics_backward(dz, dmean, dm2, z, mean)
    return patch_conv_backward(total, x, weight, None, None, [*output_mask, False, False])[:2]


def _bn_act_backward(da, z, mean, scale, shift, act, need_z, need_mean, need_scale, need_shift):
    centred, t = _normalise(z, mean, scale, shift)
    dt = act_backward(da.to(t.dtype), t, act)
    total = dt.sum((0, 2, 3)) if need_mean or need_shift else None
    dscale = (dt * centred).sum((0, 2, 3)) if need_scale else None
    dmean = -scale * total if need_mean else None
    dz = like((dt * _column(scale)).to(z.dtype), z) if need_z else None
    return dz, dmean, dscale, total if need_shift else None


def bn_act_backward(
    grad, z, mean, scale, shift, act: str, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    return _results(grad, *_bn_act_backward(grad, z, mean, scale, shift, act, *output_mask))


def act_pw_residual_backward(
    grad, z, mean, scale, shift, w_pw2, layer_scale, sample_scale, act: str, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    need_z, need_mean, need_scale, need_shift, need_pw2, need_layer, need_sample = output_mask
    inner = need_z or need_mean or need_scale or need_shift
    a = bn_act(z, mean, scale, shift, act)
    da, dw_pw2, dlayer, dsample = _branch_backward(
        grad, a, w_pw2, layer_scale, sample_scale, inner, need_pw2, need_layer, need_sample
    )
    dz = dmean = dscale = dshift = None
    if inner:
        dz, dmean, dscale, dshift = _bn_act_backward(
            da, z, mean, scale, shift, act, need_z, need_mean, need_scale, need_shift
        )
    return _results(grad, dz, dmean, dscale, dshift, dw_pw2, dlayer, dsample)


def scale_and_shift(invstd, weight, bias) -> tuple[Tensor, Tensor]:
    """The batch norm as (z - mean) * scale + shift."""
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    return scale, torch.zeros_like(scale) if bias is None else bias.to(scale.dtype)


# Composed of ops, so that the compiled ones serve where there are some: z then has the same bits as
# it had in the forward pass, and a ReLU's gradient is cut where its value was.


def bn_act_recompute_backward(
    grad, x, mean, scale, shift, w_partial, w, act: str, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    ops = torch.ops.fasternet_kernels
    if w_partial is None:
        z = ops.patch_conv(x, w, None, None, True)
    else:
        z = ops.pw_stats(x, w_partial, w)[0]
    return z, *ops.bn_act_backward(grad, z, mean, scale, shift, act, output_mask)


def act_pw_residual_recompute_backward(
    grad, x, mean, scale, shift, w_partial, w_pw1, *others
) -> tuple[Tensor, ...]:
    ops = torch.ops.fasternet_kernels
    z = ops.pw_stats(x, w_partial, w_pw1)[0]
    return z, *ops.act_pw_residual_backward(grad, z, mean, scale, shift, *others)


def _check_layer(w_partial, w_pw2) -> None:
    if w_partial is None and w_pw2 is not None:
        raise RuntimeError("w_pw2 needs w_partial: a layer of patches has no residual")


def batch_norm_layer(
    x, w_partial, w_conv, weight, bias, w_pw2, layer_scale, sample_scale, eps: float, act: str
) -> tuple[Tensor, ...]:
    _check_layer(w_partial, w_pw2)
    ops = torch.ops.fasternet_kernels
    stats = ops.patch_stats(x, w_conv) if w_partial is None else ops.pw_stats(x, w_partial, w_conv)
    z, mean, m2 = stats
    scale, shift = scale_and_shift((m2 / max(z[:, 0].numel(), 1) + eps).rsqrt(), weight, bias)
    if w_pw2 is None:
        return ops.bn_act(z, mean, scale, shift, act), *stats
    return (
        ops.act_pw_residual(x, z, mean, scale, shift, w_pw2, layer_scale, sample_scale, act),
        *stats,
    )


def batch_norm_layer_backward(
    grad,
    x,
    w_partial,
    w_conv,
    weight,
    bias,
    w_pw2,
    layer_scale,
    sample_scale,
    z,
    mean,
    m2,
    eps: float,
    act: str,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    _check_layer(w_partial, w_pw2)
    ops = torch.ops.fasternet_kernels
    need_x, need_partial, need_conv, need_weight, need_bias, *others = output_mask
    inner = need_x or need_partial or need_conv
    sums = inner or need_weight or need_bias
    if z is None and w_partial is None:
        z = ops.patch_conv(x, w_conv, None, None, True)
    elif z is None:
        z = ops.pw_stats(x, w_partial, w_conv)[0]
    pixels = max(z[:, 0].numel(), 1)
    invstd = (m2 / pixels + eps).rsqrt()
    scale, shift = scale_and_shift(invstd, weight, bias)
    first, mask = (grad, z, mean, scale, shift), [inner, inner, sums, sums]
    if w_pw2 is None:
        dz, dmean, dscale, dshift = ops.bn_act_backward(*first, act, mask)
        after = [None] * 3
    else:
        after = (w_pw2, layer_scale, sample_scale)
        dz, dmean, dscale, dshift, *after = ops.act_pw_residual_backward(
            *first, *after, act, mask + others
        )
    dx = dw_partial = dw_conv = None
    if inner:
        dm2 = dscale * invstd * invstd * scale * (-0.5 / pixels)
        then = (dz, dmean, dm2, x, z, mean)
        if w_partial is None:
            dx, dw_conv = ops.patch_stats_backward(*then, w_conv, [need_x, need_conv])
        else:
            mask = [need_x, need_partial, need_conv]
            dx, dw_partial, dw_conv = ops.pw_stats_backward(
                *then, w_partial, w_conv, mask, None if w_pw2 is None else grad
            )
    dweight = (dscale * invstd).to(weight.dtype) if need_weight else None
    dbias = dshift.to(bias.dtype) if need_bias else None
    results = (dx, dw_partial, dw_conv, dweight, dbias, *after)
    return _results(grad, *(g if need else None for g, need in zip(results, output_mask)))
