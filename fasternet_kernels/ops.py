"""The ops of FasterNet as torch custom ops, and the public functions in front of them.

``torch.ops.fasternet_kernels.*`` is the one registry. This file defines every schema, its fake
(shapes, dtypes and strides without data), its autograd formula and its FLOP count, and registers
:mod:`fasternet_kernels.reference` as the implementation for every device; compiled kernels override
that per device (CPU: ``python/bind_torch.cpp``, CUDA: ``triton/``). Backward passes are ops too.

Notation: ``x`` (B, C, H, W); ``C_partial`` is the number of first channels that are convolved;
``C_hidden`` is the block's inner width. With ``u = x`` whose first ``C_partial`` channels are
replaced by their 3x3 convolution (stride 1, zero padding 1, no bias):

===================  =============================================================================
pconv3x3             ``u`` (arXiv 2303.03667, section 3.2)
pconv_pw             ``act(conv1x1(u, w_pw) * scale + shift)``
block                ``x + sample_scale * layer_scale * conv1x1(a, w_pw2)`` with
                     ``a = act(conv1x1(u, w_pw1) * scale + shift)`` (section 3.3)
patch_conv           ``conv(x, weight, stride = kernel) * scale + shift``: stem and merging layers
head                 ``fc(act(conv1x1(mean(x))))``
pack, *_packed       the same on one flat tensor of packed weights, scale, shift and layer_scale
                     in it; inference only; each device type has a layout of its own
network              a list of such steps as one op; inference only
pw_stats             ``z = conv1x1(u, w_pw)`` with the mean and the sum of squared deviations of
                     each channel of ``z``
patch_stats          the same of ``z = conv(x, weight, stride = kernel)``, in channels_last memory
bn_act               ``act((z - mean) * scale + shift)``
act_pw_residual      ``x + sample_scale * layer_scale * conv1x1(bn_act(z), w_pw2)``
batch_norm_layer     the two halves of a layer of training as one op, in a process that shares its
                     statistics with no other; returns ``y``, ``z`` and its statistics; its backward
                     computes ``z`` again where it was not kept
===================  =============================================================================

Training with batch statistics is ``pw_stats`` or ``patch_stats``, then the batch norm's vectors in
plain torch (where the statistics of several processes are combined), then ``bn_act`` or
``act_pw_residual``; ``batch_norm_layer`` is all of that in one process. Backward has the same two
halves: ``bn_act_backward`` or ``act_pw_residual_backward`` gives ``dz`` and the batch norm's sums
over pixels, which are added up over the processes; then ``patch_stats_backward``, or
``pw_stats_backward``, which adds ``dy``, the gradient of the residual, to ``dx``. The
``*_recompute_backward`` ops are the first half where ``z`` was not kept: they return it in front of
the gradients, for the second half. Gradients of images and of convolutions' weights have the memory
format of what they belong to.
:mod:`fasternet_kernels.training` puts the halves together.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .reference import (
    ACTS,
    EMIT,
    HEAD,
    PATCH_CONV,
    compute_dtype,
    gemm_shapes,
    memory_format,
    packed_fast_size,
    packed_size,
)

NAMESPACE = "fasternet_kernels"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

SCHEMAS = {
    "pconv3x3": "(Tensor x, Tensor weight, bool fast=False) -> Tensor",
    "pconv3x3_": "(Tensor(a!) x, Tensor weight) -> ()",
    "pconv3x3_backward": (
        "(Tensor grad, Tensor x_partial, Tensor weight, bool[] output_mask) -> (Tensor, Tensor)"
    ),
    "pack": ("(Tensor[] weights, Tensor?[] scales, Tensor?[] shifts, bool fast=False) -> Tensor"),
    "pconv_pw": (
        "(Tensor x, Tensor w_partial, Tensor w_pw, Tensor? scale, Tensor? shift, str act, "
        "bool fast=False) -> Tensor"
    ),
    "pconv_pw_packed": (
        "(Tensor x, Tensor pack, int c_partial, int c_out, str act, bool fast=False) -> Tensor"
    ),
    "pconv_pw_backward": (
        "(Tensor grad, Tensor x, Tensor w_partial, Tensor w_pw, Tensor? scale, Tensor? shift, "
        "str act, bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "block": (
        "(Tensor x, Tensor w_partial, Tensor w_pw1, Tensor w_pw2, Tensor? scale, Tensor? "
        "shift, Tensor? layer_scale, Tensor? sample_scale, str act, bool fast=False)"
        " -> Tensor"
    ),
    "block_packed": (
        "(Tensor x, Tensor pack, int c_partial, int c_hidden, Tensor? sample_scale, str act, "
        "bool fast=False) -> Tensor"
    ),
    "block_backward": (
        "(Tensor grad, Tensor x, Tensor w_partial, Tensor w_pw1, Tensor w_pw2, Tensor? scale, "
        "Tensor? shift, Tensor? layer_scale, Tensor? sample_scale, str act, bool[] "
        "output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "patch_conv": (
        "(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, bool channels_last=False)"
        " -> Tensor"
    ),
    "patch_conv_packed": (
        "(Tensor x, Tensor pack, int c_out, int kh, int kw, bool channels_last=False) -> Tensor"
    ),
    "patch_conv_backward": (
        "(Tensor grad, Tensor x, Tensor weight, Tensor? scale, Tensor? shift, bool[] "
        "output_mask) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "head": (
        "(Tensor x, Tensor w_conv, Tensor? b_conv, Tensor w_fc, Tensor? b_fc, str act) -> Tensor"
    ),
    "head_packed": "(Tensor x, Tensor pack, int c_mid, int c_out, str act) -> Tensor",
    "head_backward": (
        "(Tensor grad, Tensor x, Tensor w_conv, Tensor? b_conv, Tensor w_fc, Tensor? b_fc, "
        "str act, bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "network": "(Tensor x, Tensor[] packs, int[] plan, bool fast=False) -> Tensor[]",
    "pw_stats": "(Tensor x, Tensor w_partial, Tensor w_pw) -> (Tensor, Tensor, Tensor)",
    "pw_stats_backward": (
        "(Tensor dz, Tensor dmean, Tensor dm2, Tensor x, Tensor z, Tensor mean, Tensor "
        "w_partial, Tensor w_pw, bool[] output_mask, Tensor? dy=None) -> (Tensor, Tensor, Tensor)"
    ),
    "patch_stats": "(Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)",
    "patch_stats_backward": (
        "(Tensor dz, Tensor dmean, Tensor dm2, Tensor x, Tensor z, Tensor mean, Tensor weight, "
        "bool[] output_mask) -> (Tensor, Tensor)"
    ),
    "bn_act": "(Tensor z, Tensor mean, Tensor scale, Tensor shift, str act) -> Tensor",
    "bn_act_backward": (
        "(Tensor grad, Tensor z, Tensor mean, Tensor scale, Tensor shift, str act, bool[] "
        "output_mask) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "bn_act_recompute_backward": (
        "(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor? w_partial, "
        "Tensor w, str act, bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "act_pw_residual": (
        "(Tensor x, Tensor z, Tensor mean, Tensor scale, Tensor shift, Tensor w_pw2, Tensor? "
        "layer_scale, Tensor? sample_scale, str act) -> Tensor"
    ),
    "act_pw_residual_backward": (
        "(Tensor grad, Tensor z, Tensor mean, Tensor scale, Tensor shift, Tensor w_pw2, "
        "Tensor? layer_scale, Tensor? sample_scale, str act, bool[] output_mask)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "act_pw_residual_recompute_backward": (
        "(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor w_partial, "
        "Tensor w_pw1, Tensor w_pw2, Tensor? layer_scale, Tensor? sample_scale, str act, bool[] "
        "output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "batch_norm_layer": (
        "(Tensor x, Tensor? w_partial, Tensor w_conv, Tensor? weight, Tensor? bias, Tensor? w_pw2, "
        "Tensor? layer_scale, Tensor? sample_scale, float eps, str act)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "batch_norm_layer_backward": (
        "(Tensor grad, Tensor x, Tensor? w_partial, Tensor w_conv, Tensor? weight, Tensor? bias, "
        "Tensor? w_pw2, Tensor? layer_scale, Tensor? sample_scale, Tensor? z, Tensor mean, Tensor "
        "m2, float eps, str act, bool[] output_mask)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}

_library = torch.library.Library(NAMESPACE, "DEF")


def _without_autocast(fn):
    """The reference as an implementation below autocast, which has already cast what it casts."""

    def run(*args, **kwargs):
        tensor = next(a for a in pytree.tree_leaves(args) if isinstance(a, Tensor))
        kind = tensor.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return fn(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return fn(*args, **kwargs)

    return run


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _reference = _without_autocast(getattr(reference, _name))
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
_ops = getattr(torch.ops, NAMESPACE)


# ---- Fakes ---------------------------------------------------------------------------------------


def _fake(name):
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=_library)


def _image(
    like: Tensor, shape, dtype: torch.dtype, fmt: torch.memory_format | None = None
) -> Tensor:
    return torch.empty(
        shape, dtype=dtype, device=like.device, memory_format=fmt or memory_format(like)
    )


def _same(x: Tensor) -> Tensor:
    return _image(x, x.shape, x.dtype)


def _wanted(mask, *grads) -> tuple[Tensor, ...]:
    """The fake gradients that output_mask asks for; the others are empty."""
    return tuple(
        g() if need else torch.empty(0, dtype=like.dtype, device=like.device)
        for need, (g, like) in zip(mask, grads)
    )


def _grad(t: Tensor | None, like: Tensor):
    """A pair (maker of the fake gradient of ``t``, tensor whose dtype an empty one has). Gradients
    of images and of convolutions' weights have the memory format of these."""
    return (lambda: _same(t) if t.dim() == 4 else t.new_empty(t.shape)), like


@_fake("pconv3x3")
def _(x, weight, fast=False):
    return _same(x)


@_fake("pconv3x3_")
def _(x, weight):
    return None


@_fake("pconv3x3_backward")
def _(grad, x_partial, weight, output_mask):
    return _wanted(output_mask, _grad(grad, grad), _grad(weight, grad))


@_fake("pack")
def _(weights, scales, shifts, fast=False):
    from . import triton  # which imports this file
    from .triton import layout

    if triton.serves(weights[0]):
        dtype = weights[0].dtype
        size = layout.size([w.shape for w in weights], dtype)
        return torch.empty(size, dtype=dtype, device=weights[0].device)
    dtype = compute_dtype(weights[0].dtype)
    size = sum(packed_size(n, k, dtype) for n, k in gemm_shapes([w.shape for w in weights]))
    size += packed_fast_size(weights) if fast else 0
    return torch.empty(size, dtype=dtype, device=weights[0].device)


@_fake("pconv_pw")
def _(x, w_partial, w_pw, scale, shift, act, fast=False):
    return _image(x, (x.shape[0], w_pw.shape[0], *x.shape[2:]), w_pw.dtype)


@_fake("pconv_pw_packed")
def _(x, pack, c_partial, c_out, act, fast=False):
    return _image(x, (x.shape[0], c_out, *x.shape[2:]), x.dtype)


@_fake("pconv_pw_backward")
def _(grad, x, w_partial, w_pw, scale, shift, act, output_mask):
    return _wanted(
        output_mask,
        _grad(x, grad),
        *(_grad(t, grad) for t in (w_partial, w_pw, scale, shift)),
    )


@_fake("block")
def _(x, w_partial, w_pw1, w_pw2, scale, shift, layer_scale, sample_scale, act, fast=False):
    return _image(x, x.shape, torch.promote_types(x.dtype, w_pw1.dtype))


@_fake("block_packed")
def _(x, pack, c_partial, c_hidden, sample_scale, act, fast=False):
    return _same(x)


@_fake("block_backward")
def _(grad, x, w_partial, w_pw1, w_pw2, scale, shift, layer_scale, sample_scale, act, output_mask):
    vectors = (w_partial, w_pw1, w_pw2, scale, shift, layer_scale, sample_scale)
    return _wanted(output_mask, _grad(x, grad), *(_grad(t, grad) for t in vectors))


def _patches(x, c_out, kh, kw, dtype, channels_last):
    shape = (x.shape[0], c_out, x.shape[2] // kh, x.shape[3] // kw)
    return _image(x, shape, dtype, torch.channels_last if channels_last else None)


@_fake("patch_conv")
def _(x, weight, scale, shift, channels_last=False):
    return _patches(
        x, weight.shape[0], weight.shape[2], weight.shape[3], weight.dtype, channels_last
    )


@_fake("patch_conv_packed")
def _(x, pack, c_out, kh, kw, channels_last=False):
    return _patches(x, c_out, kh, kw, x.dtype, channels_last)


@_fake("patch_conv_backward")
def _(grad, x, weight, scale, shift, output_mask):
    return _wanted(output_mask, _grad(x, grad), *(_grad(t, grad) for t in (weight, scale, shift)))


@_fake("head")
def _(x, w_conv, b_conv, w_fc, b_fc, act):
    return x.new_empty((x.shape[0], w_fc.shape[0]), dtype=w_fc.dtype)


@_fake("head_packed")
def _(x, pack, c_mid, c_out, act):
    return x.new_empty((x.shape[0], c_out))


@_fake("head_backward")
def _(grad, x, w_conv, b_conv, w_fc, b_fc, act, output_mask):
    return _wanted(
        output_mask,
        _grad(x, grad),
        *(_grad(t, grad) for t in (w_conv, b_conv, w_fc, b_fc)),
    )


@_fake("network")
def _(x, packs, plan, fast=False):
    outputs = []
    c, h, w = x.shape[1:]
    for i in range(0, len(plan), 5):
        kind, a, b, stride_w, _act = plan[i : i + 5]
        if kind == PATCH_CONV:
            c, h, w = a, h // b, w // stride_w
        elif kind == HEAD:
            outputs.append(x.new_empty((x.shape[0], b)))
        elif kind == EMIT:
            outputs.append(_image(x, (x.shape[0], c, h, w), x.dtype, torch.channels_last))
    return outputs


def _with_statistics(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    stats = (z.new_empty(z.shape[1], dtype=compute_dtype(z.dtype)) for _ in range(2))
    return z, *stats


@_fake("pw_stats")
def _(x, w_partial, w_pw):
    return _with_statistics(_image(x, (x.shape[0], w_pw.shape[0], *x.shape[2:]), w_pw.dtype))


@_fake("pw_stats_backward")
def _(dz, dmean, dm2, x, z, mean, w_partial, w_pw, output_mask, dy=None):
    return _wanted(output_mask, _grad(x, dz), _grad(w_partial, dz), _grad(w_pw, dz))


@_fake("patch_stats")
def _(x, weight):
    c_out, _, kh, kw = weight.shape
    return _with_statistics(_patches(x, c_out, kh, kw, weight.dtype, channels_last=True))


@_fake("patch_stats_backward")
def _(dz, dmean, dm2, x, z, mean, weight, output_mask):
    return _wanted(output_mask, _grad(x, dz), _grad(weight, dz))


@_fake("bn_act")
def _(z, mean, scale, shift, act):
    return _same(z)


@_fake("bn_act_backward")
def _(grad, z, mean, scale, shift, act, output_mask):
    return _wanted(output_mask, _grad(z, grad), *(_grad(t, grad) for t in (mean, scale, shift)))


@_fake("bn_act_recompute_backward")
def _(grad, x, mean, scale, shift, w_partial, w, act, output_mask):
    z = _image(x, grad.shape, w.dtype, torch.channels_last if w_partial is None else None)
    vectors = (mean, scale, shift)
    return z, *_wanted(output_mask, _grad(z, grad), *(_grad(t, grad) for t in vectors))


@_fake("act_pw_residual")
def _(x, z, mean, scale, shift, w_pw2, layer_scale, sample_scale, act):
    return _image(x, x.shape, torch.promote_types(x.dtype, z.dtype))


@_fake("act_pw_residual_backward")
def _(grad, z, mean, scale, shift, w_pw2, layer_scale, sample_scale, act, output_mask):
    vectors = (mean, scale, shift, w_pw2, layer_scale, sample_scale)
    return _wanted(output_mask, _grad(z, grad), *(_grad(t, grad) for t in vectors))


@_fake("act_pw_residual_recompute_backward")
def _(grad, x, mean, scale, shift, w_partial, w_pw1, *others):
    *after, _act, output_mask = others  # as of act_pw_residual_backward
    z = _image(x, (x.shape[0], w_pw1.shape[0], *x.shape[2:]), w_pw1.dtype)
    vectors = (mean, scale, shift, *after)
    return z, *_wanted(output_mask, _grad(z, grad), *(_grad(t, grad) for t in vectors))


@_fake("batch_norm_layer")
def _(x, w_partial, w_conv, weight, bias, w_pw2, layer_scale, sample_scale, eps, act):
    c_out, _, kh, kw = w_conv.shape
    z = _patches(x, c_out, kh, kw, w_conv.dtype, channels_last=w_partial is None)
    y = _same(z)
    if w_pw2 is not None:
        y = _image(x, x.shape, torch.promote_types(x.dtype, z.dtype))
    return y, *_with_statistics(z)


@_fake("batch_norm_layer_backward")
def _(grad, x, *others):
    *parameters, _z, _mean, _m2, _eps, _act, output_mask = others
    return _wanted(output_mask, _grad(x, grad), *(_grad(t, grad) for t in parameters))


# ---- Autograd ------------------------------------------------------------------------------------


def _differentiable(name: str, saved: int, backward):
    """Registers the gradient of an op whose first ``saved`` arguments are tensors (or None) and are
    saved.

    ``backward(grads, saved tensors, the other arguments, mask)`` returns a gradient for each saved
    argument.
    """

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:saved])
        ctx.others = inputs[saved:]

    def run(ctx, *grads):
        mask = [bool(need) for need in ctx.needs_input_grad[:saved]]
        results = backward(grads, ctx.saved_tensors, ctx.others, mask)
        results = [g if need else None for g, need in zip(results, mask)]
        return (*results, *([None] * len(ctx.others)))

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", run, setup_context=setup_context, lib=_library
    )


def _not_differentiable(name: str, reason: str):
    """An op without a gradient says so when one is needed, rather than dropping it."""

    def setup_context(ctx, inputs, output):
        raise RuntimeError(f"fasternet_kernels.{name}: {reason}")

    def run(ctx, *grads):
        raise RuntimeError(f"fasternet_kernels.{name}: {reason}")

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", run, setup_context=setup_context, lib=_library
    )


def _pconv3x3_setup(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x[:, : weight.shape[0]], weight)


def _pconv3x3_gradient(ctx, grad):
    x_partial, weight = ctx.saved_tensors
    mask = [bool(need) for need in ctx.needs_input_grad[:2]]
    dx, dw = _ops.pconv3x3_backward(grad, x_partial, weight, mask)
    return dx if mask[0] else None, dw if mask[1] else None, None


torch.library.register_autograd(
    f"{NAMESPACE}::pconv3x3", _pconv3x3_gradient, setup_context=_pconv3x3_setup, lib=_library
)


def _differentiable_statistics(name: str, backward):
    """Registers the gradient of an op (x, *weights) -> (z, mean, m2)."""

    def setup_context(ctx, inputs, output):
        x, *weights = inputs
        z, mean, _ = output
        ctx.save_for_backward(x, z, mean, *weights)

    def run(ctx, dz, dmean, dm2):
        mask = [bool(need) for need in ctx.needs_input_grad]
        grads = backward(dz, dmean, dm2, *ctx.saved_tensors, mask)
        return tuple(g if need else None for g, need in zip(grads, mask))

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", run, setup_context=setup_context, lib=_library
    )


_differentiable_statistics("pw_stats", lambda *args: _ops.pw_stats_backward(*args))
_differentiable_statistics("patch_stats", lambda *args: _ops.patch_stats_backward(*args))
_differentiable(
    "pconv_pw",
    5,
    lambda g, saved, others, mask: _ops.pconv_pw_backward(*g, *saved, others[0], mask),
)
_differentiable(
    "block", 8, lambda g, saved, others, mask: _ops.block_backward(*g, *saved, others[0], mask)
)
_differentiable(
    "patch_conv", 4, lambda g, saved, others, mask: _ops.patch_conv_backward(*g, *saved, mask)
)
_differentiable(
    "head", 5, lambda g, saved, others, mask: _ops.head_backward(*g, *saved, others[0], mask)
)
_differentiable(
    "bn_act", 4, lambda g, saved, others, mask: _ops.bn_act_backward(*g, *saved, others[0], mask)
)


def _act_pw_residual_setup(ctx, inputs, output):
    x, *saved, act = inputs
    ctx.save_for_backward(*saved)  # not x: its gradient is the incoming one
    ctx.act, ctx.x_dtype = act, x.dtype


def _act_pw_residual_gradient(ctx, grad):
    need_x, *mask = (bool(need) for need in ctx.needs_input_grad[:8])
    grads = (
        _ops.act_pw_residual_backward(grad, *ctx.saved_tensors, ctx.act, mask)
        if any(mask)
        else [None] * 7
    )
    dx = grad.to(ctx.x_dtype) if need_x else None
    return (dx, *(g if need else None for g, need in zip(grads, mask)), None)


torch.library.register_autograd(
    f"{NAMESPACE}::act_pw_residual",
    _act_pw_residual_gradient,
    setup_context=_act_pw_residual_setup,
    lib=_library,
)


def _pconv3x3_raw(keyset, x, weight):
    """The raw op has no gradient of its own: the public pconv3x3_ wraps it."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise RuntimeError(
            "fasternet_kernels.pconv3x3_: the raw op carries no gradient; "
            "call the function fasternet_kernels.pconv3x3_"
        )
    _ops.pconv3x3_.default.redispatch(keyset & torch._C._after_autograd_keyset, x, weight)
    torch.autograd.graph.increment_version(x)


_library.impl("pconv3x3_", _pconv3x3_raw, "Autograd", with_keyset=True)

_PACKED = (
    "packed weights carry no gradient; call it under torch.no_grad(), or use the op on raw weights"
)
for _name in (
    "pack",
    "pconv_pw_packed",
    "block_packed",
    "patch_conv_packed",
    "head_packed",
    "network",
):
    _not_differentiable(_name, _PACKED)
_not_differentiable(
    "batch_norm_layer",
    "the raw op carries no gradient; call fasternet_kernels.training.batch_norm_layer",
)
for _name in SCHEMAS:
    if _name.endswith("_backward"):
        _not_differentiable(_name, "second derivatives are not supported")


# ---- FLOPs (two per multiply-add, convolutions only, as torch counts them) -----------------------


def _flops(name):
    return register_flop_formula(getattr(_ops, name))


def _pixels(shape) -> int:
    return shape[0] * shape[2] * shape[3]


@_flops("pconv3x3")
def _(x, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * _pixels(x) * 9 * weight[0] ** 2


@_flops("pconv3x3_")
def _(x, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * _pixels(x) * 9 * weight[0] ** 2


@_flops("pconv3x3_backward")
def _(grad, x_partial, weight, output_mask, *args, out_shape=None, **kwargs) -> int:
    return 2 * _pixels(grad) * 9 * weight[0] ** 2 * sum(output_mask)


@_flops("pack")
def _(*args, out_shape=None, **kwargs) -> int:
    return 0


def _pconv_pw_flops(x, c_partial: int, c_out: int) -> int:
    return 2 * _pixels(x) * (9 * c_partial**2 + x[1] * c_out)


@_flops("pconv_pw")
def _(x, w_partial, w_pw, *args, out_shape=None, **kwargs) -> int:
    return _pconv_pw_flops(x, w_partial[0], w_pw[0])


@_flops("pconv_pw_packed")
def _(x, pack, c_partial, c_out, *args, out_shape=None, **kwargs) -> int:
    return _pconv_pw_flops(x, c_partial, c_out)


def _pconv_pw_gradients(x, w_partial, w_pw, need_x, need_partial, need_pw) -> int:
    """The FLOPs of the gradient of conv1x1(pconv(x)), without recomputing it."""
    pw, partial = w_pw[0] * x[1], 9 * w_partial[0] ** 2
    return (
        2
        * _pixels(x)
        * (pw * ((need_x or need_partial) + need_pw) + partial * (need_x + need_partial))
    )


@_flops("pconv_pw_backward")
def _(
    grad, x, w_partial, w_pw, scale, shift, act, output_mask, *args, out_shape=None, **kwargs
) -> int:
    forward = _pconv_pw_flops(x, w_partial[0], w_pw[0])
    return forward + _pconv_pw_gradients(x, w_partial, w_pw, *output_mask[:3])


def _block_flops(x, c_partial: int, c_hidden: int) -> int:
    return 2 * _pixels(x) * (9 * c_partial**2 + 2 * x[1] * c_hidden)


@_flops("block")
def _(x, w_partial, w_pw1, *args, out_shape=None, **kwargs) -> int:
    return _block_flops(x, w_partial[0], w_pw1[0])


@_flops("block_packed")
def _(x, pack, c_partial, c_hidden, *args, out_shape=None, **kwargs) -> int:
    return _block_flops(x, c_partial, c_hidden)


@_flops("block_backward")
def _(
    grad,
    x,
    w_partial,
    w_pw1,
    w_pw2,
    scale,
    shift,
    layer,
    sample,
    act,
    output_mask,
    *args,
    out_shape=None,
    **kwargs,
) -> int:
    need_x, need_partial, need_pw1, need_pw2, need_scale, need_shift, need_layer, need_sample = (
        output_mask
    )
    inner = need_x or need_partial or need_pw1 or need_scale or need_shift
    pw = 2 * _pixels(x) * x[1] * w_pw1[0]
    total = _pconv_pw_flops(x, w_partial[0], w_pw1[0]) + pw * (
        inner + need_pw2 + (need_layer or need_sample)
    )
    return total + _pconv_pw_gradients(x, w_partial, w_pw1, need_x, need_partial, need_pw1)


def _patch_flops(x, c_out: int, kh: int, kw: int) -> int:
    return 2 * x[0] * (x[2] // kh) * (x[3] // kw) * c_out * x[1] * kh * kw


@_flops("patch_conv")
def _(x, weight, *args, out_shape=None, **kwargs) -> int:
    return _patch_flops(x, weight[0], weight[2], weight[3])


@_flops("patch_conv_packed")
def _(x, pack, c_out, kh, kw, *args, out_shape=None, **kwargs) -> int:
    return _patch_flops(x, c_out, kh, kw)


@_flops("patch_conv_backward")
def _(grad, x, weight, scale, shift, output_mask, *args, out_shape=None, **kwargs) -> int:
    return _patch_flops(x, weight[0], weight[2], weight[3]) * sum(output_mask[:3])


def _head_flops(x, c_mid: int, c_out: int) -> int:
    return 2 * x[0] * c_mid * (x[1] + c_out)


@_flops("head")
def _(x, w_conv, b_conv, w_fc, *args, out_shape=None, **kwargs) -> int:
    return _head_flops(x, w_conv[0], w_fc[0])


@_flops("head_packed")
def _(x, pack, c_mid, c_out, *args, out_shape=None, **kwargs) -> int:
    return _head_flops(x, c_mid, c_out)


@_flops("head_backward")
def _(
    grad, x, w_conv, b_conv, w_fc, b_fc, act, output_mask, *args, out_shape=None, **kwargs
) -> int:
    need_x, need_w_conv, _need_b, need_w_fc, _need_b_fc = output_mask
    mid, fc = 2 * x[0] * x[1] * w_conv[0], 2 * x[0] * w_fc[0] * w_fc[1]
    return mid * (1 + need_x + need_w_conv) + fc * (1 + need_w_fc)


@_flops("network")
def _(x, packs, plan, *args, out_shape=None, **kwargs) -> int:
    total = 0
    x = list(x)
    for i in range(0, len(plan), 5):
        kind, a, b, c, _act = plan[i : i + 5]
        if kind == PATCH_CONV:
            total += _patch_flops(x, a, b, c)
            x = [x[0], a, x[2] // b, x[3] // c]
        elif kind == HEAD:
            total += _head_flops(x, a, b)
        elif kind != EMIT:
            total += _block_flops(x, a, b)
    return total


@_flops("pw_stats")
def _(x, w_partial, w_pw, *args, out_shape=None, **kwargs) -> int:
    return _pconv_pw_flops(x, w_partial[0], w_pw[0])


@_flops("pw_stats_backward")
def _(
    dz, dmean, dm2, x, z, mean, w_partial, w_pw, output_mask, *args, out_shape=None, **kwargs
) -> int:
    recompute = 2 * _pixels(x) * 9 * w_partial[0] ** 2
    return recompute + _pconv_pw_gradients(x, w_partial, w_pw, *output_mask)


@_flops("patch_stats")
def _(x, weight, *args, out_shape=None, **kwargs) -> int:
    return _patch_flops(x, weight[0], weight[2], weight[3])


@_flops("patch_stats_backward")
def _(dz, dmean, dm2, x, z, mean, weight, output_mask, *args, out_shape=None, **kwargs) -> int:
    return _patch_flops(x, weight[0], weight[2], weight[3]) * sum(output_mask)


@_flops("bn_act")
def _(*args, out_shape=None, **kwargs) -> int:
    return 0


@_flops("bn_act_backward")
def _(*args, out_shape=None, **kwargs) -> int:
    return 0


@_flops("bn_act_recompute_backward")
def _(grad, x, mean, scale, shift, w_partial, w, *args, out_shape=None, **kwargs) -> int:
    if w_partial is None:
        return _patch_flops(x, w[0], w[2], w[3])
    return _pconv_pw_flops(x, w_partial[0], w[0])


@_flops("act_pw_residual")
def _(x, z, mean, scale, shift, w_pw2, *args, out_shape=None, **kwargs) -> int:
    return 2 * _pixels(x) * w_pw2[0] * w_pw2[1]


def _act_pw_residual_gradients(
    x, w_pw2, need_z, need_mean, need_scale, need_shift, need_pw2, need_layer, need_sample
) -> int:
    inner = need_z or need_mean or need_scale or need_shift
    return 2 * _pixels(x) * w_pw2[0] * w_pw2[1] * (inner + need_pw2 + (need_layer or need_sample))


@_flops("act_pw_residual_backward")
def _(
    grad,
    z,
    mean,
    scale,
    shift,
    w_pw2,
    layer,
    sample,
    act,
    output_mask,
    *args,
    out_shape=None,
    **kwargs,
) -> int:
    return _act_pw_residual_gradients(z, w_pw2, *output_mask)


@_flops("act_pw_residual_recompute_backward")
def _(
    grad,
    x,
    mean,
    scale,
    shift,
    w_partial,
    w_pw1,
    w_pw2,
    layer,
    sample,
    act,
    output_mask,
    *args,
    out_shape=None,
    **kwargs,
) -> int:
    recompute = _pconv_pw_flops(x, w_partial[0], w_pw1[0])
    return recompute + _act_pw_residual_gradients(x, w_pw2, *output_mask)


@_flops("batch_norm_layer")
def _(x, w_partial, w_conv, weight, bias, w_pw2, *args, out_shape=None, **kwargs) -> int:
    if w_partial is None:
        return _patch_flops(x, w_conv[0], w_conv[2], w_conv[3])
    second = 0 if w_pw2 is None else 2 * _pixels(x) * w_pw2[0] * w_pw2[1]
    return _pconv_pw_flops(x, w_partial[0], w_conv[0]) + second


@_flops("batch_norm_layer_backward")
def _(grad, x, *rest, out_shape=None, **kwargs) -> int:
    w_partial, w_conv, _weight, _bias, w_pw2, _layer, _sample, z, *_, output_mask = rest
    need_x, need_partial, need_conv, need_weight, need_bias, *others = output_mask
    if w_partial is None:
        products = need_x + need_conv + (z is None)
        return _patch_flops(x, w_conv[0], w_conv[2], w_conv[3]) * products
    total = _pconv_pw_flops(x, w_partial[0], w_conv[0]) if z is None else 0
    if need_x or need_partial or need_conv:
        total += 2 * _pixels(x) * 9 * w_partial[0] ** 2
        total += _pconv_pw_gradients(x, w_partial, w_conv, need_x, need_partial, need_conv)
    if w_pw2 is not None:
        needs = (need_x or need_partial or need_conv, False, need_weight, need_bias, *others)
        total += _act_pw_residual_gradients(x, w_pw2, *needs)
    return total


# ---- Argument checks -----------------------------------------------------------------------------


def check_tensor(name: str, t, rank: int) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is of type {type(t).__name__}, expected a torch.Tensor")
    if t.dim() != rank:
        raise ValueError(f"{name} has {t.dim()} dimensions {tuple(t.shape)}, expected {rank}")
    if t.dtype not in DTYPES:
        raise TypeError(
            f"{name} has dtype {t.dtype}, expected one of float32, float64, bfloat16, float16"
        )


def _check_image(x) -> None:
    check_tensor("x", x, 4)


def _check_weight(name: str, weight, x: Tensor, shape: tuple[int, ...]) -> None:
    check_tensor(name, weight, len(shape))
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected {shape}")
    if weight.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected at least one element")
    if weight.device != x.device:
        raise ValueError(f"{name} is on {weight.device}, expected x's device {x.device}")
    if weight.dtype != x.dtype and not (
        x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)
    ):
        raise TypeError(f"{name} has dtype {weight.dtype}, expected x's dtype {x.dtype}")


def _check_vector(name: str, vector, x: Tensor, size: int) -> None:
    if vector is None:
        return
    check_tensor(name, vector, 1)
    if vector.shape[0] != size:
        raise ValueError(f"{name} has {vector.shape[0]} elements, expected {size}")
    if vector.device != x.device:
        raise ValueError(f"{name} is on {vector.device}, expected x's device {x.device}")


def _check_partial(name: str, weight, x: Tensor) -> int:
    check_tensor(name, weight, 4)
    c_partial = weight.shape[0]
    if c_partial < 1 or c_partial > x.shape[1]:
        raise ValueError(f"{name} convolves {c_partial} channels, expected 1 to x's {x.shape[1]}")
    _check_weight(name, weight, x, (c_partial, c_partial, 3, 3))
    return c_partial


def check_act(act) -> None:
    if act not in ACTS:
        raise ValueError(f"act is {act!r}, expected one of {', '.join(ACTS)}")


def _overlaps_itself(x: Tensor) -> bool:
    """Whether two elements of ``x`` may share memory: dimensions sorted by stride must each step
    over all before."""
    extent = 1
    for stride, size in sorted((x.stride(d), x.shape[d]) for d in range(x.dim()) if x.shape[d] > 1):
        if stride < extent:
            return True
        extent += (size - 1) * stride
    return False


def autocast_weights(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The weights in autocast's dtype, if autocast is on for x's device and x's dtype takes part in
    it.

    ``x`` itself stays: the ops round it to the weights' dtype for the convolutions and add the
    residual uncast, as eager does.
    """
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return tuple(w.to(torch.get_autocast_dtype(kind)) for w in weights)
    return weights


def _refuse_forward_ad() -> None:
    """The ops have reverse-mode gradients only; a tangent would be dropped without a word."""
    if forward_ad._current_level >= 0:
        raise RuntimeError("fasternet_kernels does not support forward-mode differentiation")


# ---- Public functions ----------------------------------------------------------------------------


def pconv3x3(x: Tensor, weight: Tensor, *, fast: bool = False) -> Tensor:
    """Partial convolution: a 3x3 convolution of the first channels, the others passed through
    (arXiv 2303.03667, section 3.2).

    Args:
        x: (B, C, H, W), float32, float64, bfloat16 or float16, any strides.
        weight: (C_partial, C_partial, 3, 3), x's dtype and device, 1 <= C_partial <= C.
        fast: allow Winograd's convolution where it pays, in float32 on CPUs and with gradients
            off: a larger rounding error, and an infinity or NaN may reach other pixels nearby.
            The weights are transformed in the call, which takes many pixels to pay.

    Returns:
        (B, C, H, W) of x's dtype in the memory format that x suggests. The convolution has stride
        1, zero padding 1 and no bias.

    Raises:
        TypeError: an argument is no tensor, or a dtype does not fit.
        ValueError: a rank, shape or device does not fit.
    """
    _refuse_forward_ad()
    _check_image(x)
    _check_partial("weight", weight, x)
    (weight,) = autocast_weights(x, weight)
    return _ops.pconv3x3(x, weight, fast and not torch.is_grad_enabled())


class _InPlace(torch.autograd.Function):
    """pconv3x3_ with gradients. The channels that are overwritten are saved first, the others are
    not needed."""

    @staticmethod
    def forward(ctx, x, weight):
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(x[:, : weight.shape[0]].clone(), weight)
        else:
            # Only the shape of the convolved channels is needed for dx.
            ctx.save_for_backward(x.new_empty(()).expand(x[:, : weight.shape[0]].shape), weight)
        ctx.mark_dirty(x)
        _ops.pconv3x3_(x, weight)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        mask = list(ctx.needs_input_grad)
        dx, dw = _ops.pconv3x3_backward(grad, *ctx.saved_tensors, mask)
        return dx if mask[0] else None, dw if mask[1] else None


def pconv3x3_(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`pconv3x3` in place: overwrites the first C_partial channels of ``x`` and returns
    ``x``.

    The other channels are never read or written and ``x`` is never copied: the scratch is a few
    image rows per thread.

    Args:
        x: (B, C, H, W), any strides that do not overlap; not a leaf that requires grad.
        weight: (C_partial, C_partial, 3, 3), x's dtype and device.

    Raises:
        TypeError, ValueError: as :func:`pconv3x3`; also if ``x`` overlaps itself, shares memory
            with ``weight``, or is (a view of) a leaf that requires grad while gradients are on.
            ``x`` is then untouched.
    """
    _refuse_forward_ad()
    _check_image(x)
    _check_partial("weight", weight, x)
    grad = torch.is_grad_enabled()
    tracing = torch.compiler.is_compiling()
    bases = (x, x._base) if not tracing and x._is_view() else (x,)
    if grad and any(t.requires_grad and t.is_leaf for t in bases):
        what = "a leaf" if x.is_leaf else "a view of a leaf"
        raise ValueError(
            f"x is {what} that requires grad, expected a tensor that may be changed in place"
        )
    if not tracing and _overlaps_itself(x):
        raise ValueError(
            f"x overlaps itself (shape {tuple(x.shape)}, strides {x.stride()}), "
            "expected every element in memory of its own"
        )
    if not tracing and x.untyped_storage()._cdata == weight.untyped_storage()._cdata:
        raise ValueError("x shares memory with weight, expected memory of its own")
    (weight,) = autocast_weights(x, weight)
    if grad and (x.requires_grad or weight.requires_grad):
        return _InPlace.apply(x, weight)
    _ops.pconv3x3_(x, weight)
    return x


def pconv_pw(
    x: Tensor,
    w_partial: Tensor,
    w_pw: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "relu",
    *,
    fast: bool = False,
) -> Tensor:
    """Partial convolution, pointwise convolution, scale and shift, activation: one pass over
    memory.

    ``act(conv1x1(pconv3x3(x, w_partial), w_pw) * scale + shift)``; scale and shift are a batch norm
    at inference (arXiv 2303.03667, sections 3.2 and 3.3).

    Args:
        x: (B, C, H, W), float32, float64, bfloat16 or float16, any strides.
        w_partial: (C_partial, C_partial, 3, 3), x's dtype.
        w_pw: (C_out, C, 1, 1), x's dtype.
        scale, shift: (C_out) or None for 1 and 0; floating point, applied in float32 (float64
            beside float64).
        act: relu, gelu (erf), gelu_tanh, silu, hardswish or identity.
        fast: allow Winograd's convolution where it pays, in float32 on CPUs and with gradients
            off: a larger rounding error, and an infinity or NaN may reach other pixels nearby.
            The weights are transformed in the call, which takes many pixels to pay.

    Returns:
        (B, C_out, H, W) of x's dtype (autocast's under autocast) in the memory format that x
        suggests.

    Raises:
        TypeError: an argument is no tensor, or a dtype does not fit.
        ValueError: a rank, shape or device does not fit, or act is unknown.
    """
    _refuse_forward_ad()
    _check_image(x)
    _check_partial("w_partial", w_partial, x)
    check_tensor("w_pw", w_pw, 4)
    _check_weight("w_pw", w_pw, x, (w_pw.shape[0], x.shape[1], 1, 1))
    _check_vector("scale", scale, x, w_pw.shape[0])
    _check_vector("shift", shift, x, w_pw.shape[0])
    check_act(act)
    w_partial, w_pw = autocast_weights(x, w_partial, w_pw)
    fast = fast and not torch.is_grad_enabled()
    return _ops.pconv_pw(x, w_partial, w_pw, scale, shift, act, fast)


def fasternet_block(
    x: Tensor,
    w_partial: Tensor,
    w_pw1: Tensor,
    w_pw2: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "relu",
    layer_scale: Tensor | None = None,
    *,
    sample_scale: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """A whole FasterNet block in one pass: ``x + layer_scale * conv1x1(pconv_pw(x, ...), w_pw2)``
    (arXiv 2303.03667, section 3.3).

    Args:
        x: (B, C, H, W), float32, float64, bfloat16 or float16, any strides.
        w_partial: (C_partial, C_partial, 3, 3), x's dtype.
        w_pw1: (C_hidden, C, 1, 1), x's dtype.
        w_pw2: (C, C_hidden, 1, 1), x's dtype.
        scale, shift: (C_hidden) or None for 1 and 0; floating point, applied in float32 (float64
            beside float64).
        act: relu, gelu (erf), gelu_tanh, silu, hardswish or identity.
        layer_scale: (C) or None for 1.
        sample_scale: (B) or None for 1: stochastic depth, 0 or 1 / keep probability for each
            sample.
        fast: allow Winograd's convolution where it pays, in float32 on CPUs and with gradients
            off: a larger rounding error, and an infinity or NaN may reach other pixels nearby.
            The weights are transformed in the call, which takes many pixels to pay.

    Returns:
        (B, C, H, W) of x's dtype in the memory format that x suggests.

    Raises:
        TypeError: an argument is no tensor, or a dtype does not fit.
        ValueError: a rank, shape or device does not fit, or act is unknown.
    """
    _refuse_forward_ad()
    _check_image(x)
    channels = x.shape[1]
    _check_partial("w_partial", w_partial, x)
    check_tensor("w_pw1", w_pw1, 4)
    c_hidden = w_pw1.shape[0]
    _check_weight("w_pw1", w_pw1, x, (c_hidden, channels, 1, 1))
    _check_weight("w_pw2", w_pw2, x, (channels, c_hidden, 1, 1))
    _check_vector("scale", scale, x, c_hidden)
    _check_vector("shift", shift, x, c_hidden)
    _check_vector("layer_scale", layer_scale, x, channels)
    _check_vector("sample_scale", sample_scale, x, x.shape[0])
    check_act(act)
    w_partial, w_pw1, w_pw2 = autocast_weights(x, w_partial, w_pw1, w_pw2)
    fast = fast and not torch.is_grad_enabled()
    return _ops.block(
        x, w_partial, w_pw1, w_pw2, scale, shift, layer_scale, sample_scale, act, fast
    )
