"""Training with batch statistics: convolution, batch norm over one process or many, and the rest.

A layer here is a convolution ``z = conv(x)`` (of patches, or a partial one and a pointwise one), a
batch norm with the statistics of this batch, and what follows: an activation, or a block's
activation, second pointwise convolution and residual. Each half is an op of its own, forward and
backward, because between them stands what belongs to no kernel:

========  ==========================  ===============================  ===========================
forward   z, mean and m2              of all processes; running ones   y
backward  dx, dw_partial, dw_conv     sums of all processes            dz and sums over the pixels
========  ==========================  ===============================  ===========================

Kept from forward to backward are x, z, the statistics and the parameters, and a lean layer does not
keep z but computes it again from x. Where no other process has a part in the statistics, eager code
on the CPU runs both halves as one op (``batch_norm_layer``), without Python between its kernels,
and layers that follow each other as one node of autograd (``batch_norm_layers``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import library
from .reference import scale_and_shift

_ops = torch.ops.fasternet_kernels
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_DEVICES = tuple(kind for kind in ("cpu", "cuda") if library.has_kernel("pw_stats", kind))
_WHOLE = tuple(kind for kind in _DEVICES if library.has_kernel("batch_norm_layer", kind))


def is_fused(t: Tensor) -> bool:
    """Whether a layer of tensors like ``t`` trains in kernels, rather than in the PyTorch behind
    the same ops, which is slower than the layer that it replaces. (On a GPU before compute
    capability 8.0, of which the first op warns, that PyTorch runs nevertheless.)"""
    return t.device.type in _DEVICES and not (t.is_cuda and t.dtype == torch.float64)


def is_one_op(t: Tensor) -> bool:
    """Whether a layer of tensors like ``t`` whose statistics are its own runs as one op now."""
    return t.device.type in _WHOLE and not torch.compiler.is_compiling()


def uses_batch_statistics(norm: nn.Module | None) -> bool:
    return isinstance(norm, NORMS) and (norm.training or norm.running_mean is None)


def process_group(norm: nn.Module | None):
    """The processes among which ``norm`` shares its batch statistics, as nn.SyncBatchNorm decides
    it; None if it uses its own alone."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _over_processes(mean: Tensor, m2: Tensor, pixels: int, group) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, m2, pixels) of all processes together, by Chan's formula; one without pixels counts
    for nothing."""
    if pixels == 0:
        mean, m2 = torch.zeros_like(mean), torch.zeros_like(m2)
    mine = torch.cat((mean, m2, mean.new_full((1,), pixels))).double()
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group)
    means, m2s, counts = torch.stack(everyone).split((len(mean), len(mean), 1), dim=1)
    total = counts.sum()
    joint = (means * counts).sum(0) / total
    m2 = (m2s + counts * (means - joint).square()).sum(0)
    return joint.to(mean.dtype), m2.to(mean.dtype), total.to(mean.dtype)


def _update_running_statistics(norm: nn.Module, mean: Tensor, m2: Tensor, pixels) -> None:
    if not (norm.training and norm.track_running_stats):
        return
    factor = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            factor = 1.0 / norm.num_batches_tracked.to(mean.dtype)
    if norm.running_mean is None:
        return
    for running, batch in ((norm.running_mean, mean), (norm.running_var, m2 / (pixels - 1))):
        if running.dtype == batch.dtype and isinstance(factor, float):
            running.mul_(1 - factor).add_(batch, alpha=factor)
        else:
            running.copy_((1 - factor) * running.to(batch.dtype) + factor * batch)


def _run(op, *args):
    """``op(*args)`` without gradients, and without its autograd kernel, which is in Python."""
    if torch.compiler.is_compiling():
        return op(*args)
    with _BelowAutograd():
        return op(*args)


class Layer(NamedTuple):
    """A layer of :func:`batch_norm_layers`, in the terms of :func:`batch_norm_layer`.

    parameters: w_partial, w_conv, the norm's weight and bias, w_pw2, layer_scale, sample_scale.
    """

    norm: nn.Module
    act: str
    parameters: tuple[Tensor | None, ...]


class _Layers(torch.autograd.Function):
    """Layers one after another that share their statistics with no other process."""

    @staticmethod
    def forward(ctx, lean, first, layers, x, *parameters):
        """``parameters``: those of all layers. ``first``: from this layer on something is kept;
        those before it have no gradients."""
        op = _ops.batch_norm_layer.default
        ctx.settings = [(norm.eps, act) for norm, act, _ in layers]
        kept, updates = [], []
        for i, settings in enumerate(ctx.settings):
            y, z, mean, m2 = _run(op, x, *parameters[7 * i : 7 * i + 7], *settings)
            kept += (x, None if lean else z, mean, m2) if i >= first else [None] * 4
            updates.append((mean, m2, z.shape[0] * z.shape[2] * z.shape[3]))
            x = y
            del y, z
        # After all kernels, which take what Python needs out of the caches.
        for layer, update in zip(layers, updates):
            _update_running_statistics(layer.norm, *update)
        ctx.save_for_backward(*[None] * (7 * first), *parameters[7 * first :], *kept)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        op = _ops.batch_norm_layer_backward.default
        n = len(ctx.settings)
        saved = ctx.saved_tensors
        parameters, kept = saved[: 7 * n], saved[7 * n :]
        need_x, *needs = ctx.needs_input_grad[3:]
        grads: list[Tensor | None] = [None] * (7 * n)
        for i in reversed(range(n)):
            one = slice(7 * i, 7 * i + 7)
            inner = need_x or any(needs[: 7 * i])
            mask = (inner, *needs[one])
            if not any(mask):
                break
            x, *statistics = kept[4 * i : 4 * i + 4]
            dy, *own = _run(op, dy, x, *parameters[one], *statistics, *ctx.settings[i], mask)
            grads[one] = [g if need else None for g, need in zip(own, needs[one])]
        return *([None] * 3), dy if need_x else None, *grads


def _apply(lean: bool, x: Tensor, layers: Sequence[Layer]) -> Tensor:
    first = 0
    if not torch.is_grad_enabled():
        first = len(layers)
    elif not x.requires_grad:
        learns = [
            any(t is not None and t.requires_grad for t in layer.parameters) for layer in layers
        ]
        first = (*learns, True).index(True)
    parameters = itertools.chain.from_iterable(layer.parameters for layer in layers)
    return _Layers.apply(lean, first, layers, x, *parameters)


class _FromStatistics(torch.autograd.Function):
    """What follows the batch statistics; the gradient is that of the whole layer."""

    @staticmethod
    def forward(ctx, x, *rest):
        parameters, (z, *statistics), (act, lean, group) = rest[:7], rest[7:11], rest[11:]
        _, _, weight, bias, w_pw2, layer_scale, sample_scale = parameters
        ctx.act, ctx.group = act, group
        ctx.save_for_backward(x, *parameters, None if lean else z, *statistics)
        mean, invstd, _ = statistics
        scale, shift = scale_and_shift(invstd, weight, bias)
        if w_pw2 is None:
            return _run(_ops.bn_act.default, z, mean, scale, shift, act)
        after = (w_pw2, layer_scale, sample_scale, act)
        return _run(_ops.act_pw_residual.default, x, z, mean, scale, shift, *after)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, w_partial, w_conv, weight, bias, w_pw2, layer_scale, sample_scale, *rest = (
            ctx.saved_tensors
        )
        z, mean, invstd, total = rest
        need_x, need_partial, need_conv, need_weight, need_bias, *others = ctx.needs_input_grad[:8]
        inner = need_x or need_partial or need_conv
        sums = inner or need_weight or need_bias
        scale, shift = scale_and_shift(invstd, weight, bias)

        # The second half of the forward. Its gradient of the mean, -scale * dshift, is not the one
        # wanted below where other processes have a part in it.
        alone = ctx.group is None
        vectors, mask = (mean, scale, shift), [inner, inner and alone, sums, sums]
        if w_pw2 is None:
            if z is None:
                op, weights = _ops.bn_act_recompute_backward.default, (w_partial, w_conv)
                z, *grads = _run(op, dy, x, *vectors, *weights, ctx.act, mask)
            else:
                grads = _run(_ops.bn_act_backward.default, dy, z, *vectors, ctx.act, mask)
            dw_pw2 = dlayer_scale = dsample_scale = None
        else:
            after = (w_pw2, layer_scale, sample_scale, ctx.act, mask + others)
            if z is None:
                op = _ops.act_pw_residual_recompute_backward.default
                z, *grads = _run(op, dy, x, *vectors, w_partial, w_conv, *after)
            else:
                grads = _run(_ops.act_pw_residual_backward.default, dy, z, *vectors, *after)
            dw_pw2, dlayer_scale, dsample_scale = grads[4:]
        dz, dmean, dscale, dshift = grads[:4]
        dweight = (dscale * invstd).to(weight.dtype) if need_weight else None
        dbias = dshift.to(bias.dtype) if need_bias else None

        # The statistics, then the first half.
        dx = dw_partial = dw_conv = None
        if inner:
            pixels = count = z.shape[0] * z.shape[2] * z.shape[3]
            if not alone:
                both = torch.cat((dscale, dshift))
                dist.all_reduce(both, group=ctx.group)
                dscale, dshift = both.chunk(2)
                count = total
                dmean = dshift * scale * (-pixels / count)
            dm2 = (dscale * invstd).mul_(invstd).mul_(scale).mul_(-0.5 / count)
            first = (dz, dmean, dm2, x, z, mean)
            if w_partial is None:
                mask = [need_x, need_conv]
                dx, dw_conv = _run(_ops.patch_stats_backward.default, *first, w_conv, mask)
            else:
                mask = [need_x, need_partial, need_conv]
                residual = None if w_pw2 is None else dy
                dx, dw_partial, dw_conv = _run(
                    _ops.pw_stats_backward.default, *first, w_partial, w_conv, mask, residual
                )
        grads = (dx, dw_partial, dw_conv, dweight, dbias, dw_pw2, dlayer_scale, dsample_scale)
        return *(g if n else None for g, n in zip(grads, ctx.needs_input_grad)), *([None] * 7)


def _refuse_single_value(count: int, shape: tuple[int, ...]) -> None:
    if count == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, "
            f"got a hidden tensor of shape {shape}; call eval() for a single value"
        )


def batch_norm_layer(
    norm: nn.Module,
    x: Tensor,
    w_partial: Tensor | None,
    w_conv: Tensor,
    w_pw2: Tensor | None = None,
    layer_scale: Tensor | None = None,
    sample_scale: Tensor | None = None,
    act: str = "identity",
    lean: bool = False,
) -> Tensor:
    """A convolution, ``norm`` with batch statistics and what follows, with gradients of everything.

    Updates the running statistics as nn.BatchNorm2d does. Under an nn.SyncBatchNorm in training,
    with torch.distributed initialised, the statistics are those of all processes of its group, in
    gradients as well; batches may differ in size and be empty. Every process must come here as
    often as the others, in the same order.

    Args:
        norm: a batch norm that :func:`uses_batch_statistics`.
        x: (B, C, H, W).
        w_partial: (C_partial, C_partial, 3, 3), or None for a convolution of patches.
        w_conv: (C_out, C, 1, 1), of patches (C_out, C, kh, kw), stride = kernel; under autocast in
            its dtype, as the other weights.
        w_pw2: (C, C_out, 1, 1) of a block, or None: the activation is the end.
        layer_scale: (C) or None. sample_scale: (B) or None. Of a block.
        act: the activation's name.
        lean: keep x and compute z again in backward.

    Returns:
        As ``act_pw_residual`` of a block, else as ``bn_act`` of z.

    Raises:
        ValueError: one value per channel has no variance.
    """
    kh, kw = w_conv.shape[2:]
    shape = (x.shape[0], w_conv.shape[0], x.shape[2] // kh, x.shape[3] // kw)
    pixels = shape[0] * shape[2] * shape[3]
    group, total = process_group(norm), None
    parameters = (w_partial, w_conv, norm.weight, norm.bias, w_pw2, layer_scale, sample_scale)
    if group is None:
        _refuse_single_value(pixels, shape)
        if is_one_op(x):
            return _apply(lean, x, [Layer(norm, act, parameters)])
    with torch.no_grad():
        if w_partial is None:
            z, mean, m2 = _run(_ops.patch_stats.default, x, w_conv)
        else:
            z, mean, m2 = _run(_ops.pw_stats.default, x, w_partial, w_conv)
        if group is not None:
            mean, m2, total = _over_processes(mean, m2, pixels, group)
            # A count on another device is not looked at: that would wait for it.
            if total.device.type == "cpu" and not torch.compiler.is_compiling():
                _refuse_single_value(int(total), shape)
        count = pixels if total is None else total
        _update_running_statistics(norm, mean, m2, count)
        invstd = (m2 / count).add_(norm.eps).rsqrt_()
    return _FromStatistics.apply(x, *parameters, z, mean, invstd, total, act, lean, group)


def batch_norm_layers(x: Tensor, layers: Sequence[Layer], lean: bool = False) -> Tensor:
    """:func:`batch_norm_layer` of one layer after another on the CPU, as one node of autograd.

    That saves what Python does between layers. What a node keeps is freed together, so a network
    should be several.

    Args:
        x: (B, C, H, W), for the first layer.
        layers: at least one; no norm shares its statistics with another process.
        lean: keep only the input of each layer and compute the rest again in backward.

    Returns:
        What the last layer returns.

    Raises:
        ValueError: one value per channel has no variance.
    """
    batch, _, height, width = x.shape
    for _, _, parameters in layers:
        c_out, _, kh, kw = parameters[1].shape
        height, width = height // kh, width // kw
        _refuse_single_value(batch * height * width, (batch, c_out, height, width))
    return _apply(lean, x, layers)
