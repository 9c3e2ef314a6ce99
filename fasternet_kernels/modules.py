"""Fused modules: PConv, PConvPW and the FasterNet block, with ordinary parameters and the fused ops
as their forward.

A module holds plain ``nn.Conv2d`` and ``nn.BatchNorm2d`` children, so state_dicts, optimizers and
converters see what they know. What runs depends on the call:

* batch statistics wanted (training): :func:`fasternet_kernels.training.batch_norm_layer`;
* running statistics, gradients on: the op on raw weights, with gradients for everything;
* running statistics, gradients off: the op on packed weights. The pack is kept between calls, and
  dropped by ``train()``, by a call with gradients on, by ``.to()`` and its kin and by
  ``load_state_dict``. Each call compares address and version of every parameter and buffer with the
  pack's and asks whether any optimizer has stepped since, so only an edit that PyTorch itself
  does not count needs :func:`repack`. Under ``torch.compile`` and ``torch.export`` packing is part
  of the graph.

Calls that the fused ops do not serve (hooks inside, forward-mode differentiation, ``torch.func``
transforms, ``torch.jit.trace``) run the parts one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import ops
from .models import ACTIVATIONS, DropPath
from .reference import apply_act, compute_dtype
from .training import (
    NORMS,
    batch_norm_layer,
    is_fused,
    process_group,
    uses_batch_statistics,
)

_ops = torch.ops.fasternet_kernels


class BlockParts(NamedTuple):
    """The pieces of a block, wherever its module keeps them."""

    partial: nn.Conv2d
    pw1: nn.Conv2d
    norm: nn.Module | None
    act: str
    pw2: nn.Conv2d
    layer_scale: Tensor | None
    drop_path: nn.Module | None


# ---- Batch norm as vectors -----------------------------------------------------------------------


def _scale_and_shift(
    norm: nn.Module | None, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The batch norm with running statistics, after a convolution's bias, as (scale, shift) vectors
    of ``dtype``."""
    if not isinstance(norm, NORMS):
        return None, None if bias is None else bias.to(dtype)
    scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    mean = norm.running_mean.to(dtype)
    if bias is not None:
        mean = mean - bias.to(dtype)
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(dtype)
    return scale, shift


def _folded(
    norm: nn.Module | None, bias: Tensor | None, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The same for packing: computed in float64, rounded once."""
    scale, shift = _scale_and_shift(norm, bias, torch.float64)
    dtype = compute_dtype(weight.dtype)
    return None if scale is None else scale.to(dtype), None if shift is None else shift.to(dtype)


def _empty_alone(x: Tensor, norm: nn.Module | None) -> bool:
    """Whether batch statistics of nothing are wanted, which only other processes could give."""
    return x.numel() == 0 and uses_batch_statistics(norm) and process_group(norm) is None


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether calling one of the modules does more than its forward: a fused forward would skip
    that."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
    return bool(torch.nn.modules.module._has_any_global_hook())


def must_run_plainly() -> bool:
    """Whether the caller differentiates or traces in a way that the fused ops do not support:
    forward-mode differentiation, torch.func transforms, torch.jit.trace."""
    return forward_ad._current_level >= 0 or _in_functional_transform() or torch.jit.is_tracing()


def _in_functional_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# Dynamo cannot trace that call, but knows the transforms it is in when it evaluates it. This is
# what torch.compiler.assume_constant_result does, without its import of all of Dynamo.
_in_functional_transform._dynamo_marked_constant = True


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _check_input(x, channels: int, weight: Tensor) -> None:
    ops.check_tensor("x", x, 4)
    if x.shape[1] != channels:
        raise ValueError(f"x has {x.shape[1]} channels, expected {channels}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, expected the parameters' device {weight.device}")
    if x.dtype != weight.dtype and autocast_dtype(x) is None:
        raise TypeError(f"x has dtype {x.dtype}, expected the parameters' dtype {weight.dtype}")


def _partial_channels(dim: int, n_div: int) -> int:
    if n_div < 1 or dim // n_div < 1:
        raise ValueError(
            f"n_div is {n_div}, which leaves no channel of {dim} to convolve; expected 1 to {dim}"
        )
    return dim // n_div


# ---- Packs ---------------------------------------------------------------------------------------


_optimizer_steps = 0


def _count_optimizer_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers write parameters without counting a version, so every step of any counts here.
register_optimizer_step_post_hook(_count_optimizer_step)


def optimizer_steps() -> int:
    """How often any optimizer has stepped in this process."""
    return _optimizer_steps


class Sources:
    """Tensors that something was computed from, and how to tell whether it is still current.

    Holds the tensors and their storage, so that nothing else can take their place in memory
    unnoticed.
    """

    def __init__(self, tensors: Sequence[Tensor | None], constants: tuple = ()):
        self.constants = constants
        self.optimizer_steps = _optimizer_steps
        try:
            self.seen = [None if t is None else (t, t._version, t.data_ptr()) for t in tensors]
            self.storages = [None if t is None else t.untyped_storage() for t in tensors]
        except RuntimeError:  # inference tensors do not count their versions: nothing can be told
            self.seen = None

    def current(self, tensors: Sequence[Tensor | None], constants: tuple = ()) -> bool:
        """Whether these are the same tensors with the same contents as far as can be known."""
        if (
            self.seen is None
            or self.optimizer_steps != _optimizer_steps
            or constants != self.constants
            or len(tensors) != len(self.seen)
        ):
            return False
        for t, seen in zip(tensors, self.seen):
            if t is None or seen is None:
                if t is not seen:
                    return False
            elif t is not seen[0] or t._version != seen[1] or t.data_ptr() != seen[2]:
                return False
        return True


def norm_tensors(norm: nn.Module | None) -> tuple[Tensor | None, ...]:
    """What a batch norm computes from. The counter stands for the running statistics, whose
    updates by a forward in training count no version."""
    if not isinstance(norm, NORMS):
        return ()
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked


class PackingModule(nn.Module):
    """A module that keeps a pack of its folded weights for calls without gradients."""

    _pack: tuple[Sources, Tensor] | None = None
    fast = False  # whether the fast tier is allowed: see :func:`fasternet_kernels.accelerate`

    def drop_pack(self) -> None:
        """Forgets the pack; the next call without gradients makes a new one."""
        self.__dict__["_pack"] = None

    def packed(self, weights: list[Tensor], others: tuple, norm: nn.Module | None, fold) -> Tensor:
        """The pack of ``weights``, made anew only if something it depends on has changed.

        It also depends on the tensors ``others`` and on ``norm``; ``fold()`` gives the (scales,
        shifts) that are packed in. Under a compiler or a dispatch mode nothing is kept.
        """
        fast = self.fast and weights[0].device.type == "cpu"
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return _ops.pack(weights, *fold(), fast)
        tensors = (*weights, *others, *norm_tensors(norm))
        constants = (norm.eps,) if isinstance(norm, NORMS) else ()
        kept = self._pack
        if kept is not None and kept[0].current(tensors, constants):
            return kept[1]
        with torch.no_grad():
            pack = _ops.pack([w.detach() for w in weights], *fold(), fast)
        if type(pack) is Tensor:
            self.__dict__["_pack"] = (Sources(tensors, constants), pack)
        return pack

    def train(self, mode: bool = True):
        self.drop_pack()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self.drop_pack()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self.drop_pack()
        return super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        return {**nn.Module.__getstate__(self), "_pack": None}


def repack(model: nn.Module) -> nn.Module:
    """Makes every fused module under ``model`` pack its weights anew at its next call; returns
    ``model``.

    Needed only after edits that leave no trace in a tensor's version counter: through ``.data``;
    through memory shared with NumPy or another library; by a collective of ``torch.distributed`` on
    a detached tensor; of running statistics by a direct call of ``F.batch_norm``.
    """
    for module in model.modules():
        if hasattr(module, "drop_pack"):
            module.drop_pack()
    return model


# ---- Modules -------------------------------------------------------------------------------------


class PConv(nn.Module):
    """Partial convolution (arXiv 2303.03667, section 3.2): 3x3 on the first ``dim // n_div``
    channels, the rest untouched.

    Args:
        dim: channels C of the input.
        n_div: C_partial = dim // n_div channels are convolved.

    Shape: (B, C, H, W) to (B, C, H, W), same dtype and memory format.

    Raises:
        ValueError: n_div leaves no channel to convolve. In forward: as
            :func:`fasternet_kernels.pconv3x3`.
    """

    def __init__(self, dim: int, n_div: int = 4, device=None, dtype=None):
        super().__init__()
        self.dim_conv3 = _partial_channels(dim, n_div)
        self.dim_untouched = dim - self.dim_conv3
        self.partial_conv3 = nn.Conv2d(
            self.dim_conv3, self.dim_conv3, 3, 1, 1, bias=False, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        conv = self.partial_conv3
        if must_run_plainly() or type(conv) is not nn.Conv2d or hooked((conv,)):
            c_partial = conv.out_channels
            return torch.cat((conv(x[:, :c_partial]), x[:, c_partial:]), dim=1)
        return ops.pconv3x3(x, conv.weight)


class PConvPW(PackingModule):
    """Partial convolution, 1x1 convolution, BatchNorm and activation in one pass (arXiv 2303.03667,
    section 3.3).

    Args:
        dim: channels C of the input.
        out_channels: channels of the output.
        n_div: C_partial = dim // n_div channels are convolved 3x3.
        act: relu, gelu (erf), gelu_tanh, silu, hardswish or identity.
        lean: in training, keep only x from forward to backward and compute the convolutions again.

    Shape: (B, C, H, W) to (B, out_channels, H, W), same dtype (autocast's under autocast) and
        memory format.

    Raises:
        ValueError: n_div leaves no channel to convolve; act is unknown; x does not fit; batch
            statistics of a single value.
        TypeError: x is no tensor or of another dtype than the parameters.
    """

    def __init__(
        self,
        dim: int,
        out_channels: int,
        n_div: int = 4,
        act: str = "relu",
        lean: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        ops.check_act(act)
        factory = {"device": device, "dtype": dtype}
        c_partial = _partial_channels(dim, n_div)
        self.partial_conv3 = nn.Conv2d(c_partial, c_partial, 3, 1, 1, bias=False, **factory)
        self.pw = nn.Conv2d(dim, out_channels, 1, bias=False, **factory)
        self.bn = nn.BatchNorm2d(out_channels, **factory)
        self.act = act
        self.lean = lean

    def forward(self, x: Tensor) -> Tensor:
        partial, pw, norm = self.partial_conv3, self.pw, self.bn
        _check_input(x, pw.in_channels, pw.weight)
        batch_statistics = uses_batch_statistics(norm)
        if (
            must_run_plainly()
            or not type(partial) is type(pw) is nn.Conv2d
            or type(norm) not in NORMS
            or hooked((partial, pw, norm))
            or (batch_statistics and _empty_alone(x, norm))
        ):
            self.drop_pack()
            c_partial = partial.out_channels
            u = torch.cat((partial(x[:, :c_partial]), x[:, c_partial:]), dim=1)
            return apply_act(norm(pw(u)), self.act)
        dtype = compute_dtype(pw.weight.dtype)
        if batch_statistics:
            self.drop_pack()
            weights = ops.autocast_weights(x, partial.weight, pw.weight)
            return batch_norm_layer(norm, x, *weights, act=self.act, lean=self.lean)
        if torch.is_grad_enabled():
            self.drop_pack()
            scale, shift = _scale_and_shift(norm, None, dtype)
            return ops.pconv_pw(x, partial.weight, pw.weight, scale, shift, self.act)

        def fold():
            scale, shift = _folded(norm, None, pw.weight)
            return [None, scale], [None, shift]

        pack = self.packed([partial.weight, pw.weight], (), norm, fold)
        cast = autocast_dtype(x)
        x = x if cast is None else x.to(cast)
        return _ops.pconv_pw_packed(x, pack, partial.out_channels, pw.out_channels, self.act)


class FusedBlock(PackingModule):
    """The forward of a FasterNet block over parts that a subclass names; see
    :class:`FasterNetBlock`."""

    def parts(self) -> BlockParts | None:
        """The block's pieces; None if calling them would not be what the fused ops compute."""
        raise NotImplementedError

    def unfused(self, x: Tensor) -> Tensor:
        """The same block, module by module: for calls that the fused ops do not cover."""
        raise NotImplementedError

    def trains_unfused(self, p: BlockParts) -> bool:
        """Whether batch statistics are wanted that the fused ops do not take."""
        return uses_batch_statistics(p.norm) and p.pw1.bias is not None

    def trains_lean(self) -> bool:
        """Whether z is computed again in backward rather than kept, with batch statistics."""
        return False

    def block_pack(self, p: BlockParts) -> Tensor:
        """The pack for the packed ops: see ``pack`` in :mod:`fasternet_kernels.ops`."""

        def fold():
            scale, shift = _folded(p.norm, p.pw1.bias, p.pw1.weight)
            layer = p.layer_scale
            if layer is not None:
                layer = layer.detach().reshape(-1).to(compute_dtype(p.pw2.weight.dtype))
            return [None, scale, layer], [None, shift, None]

        weights = [p.partial.weight, p.pw1.weight, p.pw2.weight]
        return self.packed(weights, (p.pw1.bias, p.layer_scale), p.norm, fold)

    def forward(self, x: Tensor) -> Tensor:
        ops.check_tensor("x", x, 4)
        p = None if must_run_plainly() else self.parts()
        if p is not None:
            _check_input(x, p.pw1.in_channels, p.pw1.weight)
        if p is None or self.trains_unfused(p) or _empty_alone(x, p.norm):
            self.drop_pack()
            return self.unfused(x)
        layer_scale, sample_scale = branch_scales(p, x)
        if layer_scale is not None and autocast_dtype(x) is not None:
            # Autocast leaves products alone: layer_scale widens the branch, and so the sum.
            x = x.to(torch.promote_types(x.dtype, layer_scale.dtype))
        if uses_batch_statistics(p.norm):
            self.drop_pack()
            weights = ops.autocast_weights(x, p.partial.weight, p.pw1.weight, p.pw2.weight)
            return batch_norm_layer(
                p.norm, x, *weights, layer_scale, sample_scale, p.act, self.trains_lean()
            )
        if torch.is_grad_enabled():
            self.drop_pack()
            scale, shift = _scale_and_shift(p.norm, p.pw1.bias, compute_dtype(p.pw1.weight.dtype))
            return ops.fasternet_block(
                x,
                p.partial.weight,
                p.pw1.weight,
                p.pw2.weight,
                scale,
                shift,
                p.act,
                layer_scale,
                sample_scale=sample_scale,
            )
        pack = self.block_pack(p)
        return _ops.block_packed(
            x, pack, p.partial.out_channels, p.pw1.out_channels, sample_scale, p.act, self.fast
        )


class FasterNetBlock(FusedBlock):
    """The FasterNet block (arXiv 2303.03667, section 3.3 and Figure 4) as one fused op.

    ``x + drop_path(layer_scale * conv1x1(act(batch_norm(conv1x1(pconv(x))))))``, with timm's
    state_dict keys.

    Args:
        dim: channels C.
        n_div: C_partial = dim // n_div channels are convolved 3x3.
        mlp_ratio: C_hidden = int(dim * mlp_ratio).
        act: relu, gelu (erf), gelu_tanh, silu, hardswish or identity.
        drop_path: probability that a sample skips the block in training.
        layer_scale_init_value: initial value of the per-channel ``layer_scale``; 0 for none.
        lean: in training, keep only x from forward to backward and compute the hidden tensor again.

    Shape: (B, C, H, W) to (B, C, H, W), same dtype and memory format.

    Raises:
        ValueError: n_div leaves no channel to convolve; act is unknown; x does not fit; batch
            statistics of a single value.
        TypeError: x is no tensor or of another dtype than the parameters.
    """

    def __init__(
        self,
        dim: int,
        n_div: int = 4,
        mlp_ratio: float = 2.0,
        act: str = "relu",
        drop_path: float = 0.0,
        layer_scale_init_value: float = 0.0,
        lean: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        ops.check_act(act)
        factory = {"device": device, "dtype": dtype}
        hidden = int(dim * mlp_ratio)
        self.act = act
        self.lean = lean
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False, **factory),
            nn.BatchNorm2d(hidden, **factory),
            ACTIVATIONS[act](),
            nn.Conv2d(hidden, dim, 1, bias=False, **factory),
        )
        self.spatial_mixing = PConv(dim, n_div, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.layer_scale = None
        if layer_scale_init_value > 0.0:
            self.layer_scale = nn.Parameter(torch.full((dim,), layer_scale_init_value, **factory))

    def parts(self) -> BlockParts | None:
        if len(self.mlp) != 4:
            return None
        pw1, norm, act, pw2 = self.mlp
        mixing, drop_path = self.spatial_mixing, self.drop_path
        p = BlockParts(mixing.partial_conv3, pw1, norm, self.act, pw2, self.layer_scale, drop_path)
        replaced = (
            type(mixing) is not PConv
            or not type(p.partial) is type(pw1) is type(pw2) is nn.Conv2d
            or type(norm) not in (*NORMS, nn.Identity)
            or act_name(act) != self.act
        )
        inside = (self.mlp, pw1, norm, act, pw2, mixing, p.partial, drop_path)
        return None if replaced or hooked(inside) else p

    def trains_lean(self) -> bool:
        return self.lean

    def unfused(self, x: Tensor) -> Tensor:
        branch = self.mlp(self.spatial_mixing(x))
        if self.layer_scale is not None:
            branch = self.layer_scale[:, None, None] * branch
        return x + self.drop_path(branch)


def drops_paths(drop_path: nn.Module | None) -> bool:
    """Whether a block's drop_path may drop samples now."""
    return drop_path is not None and drop_path.training and type(drop_path) is not nn.Identity


def branch_scales(p: BlockParts, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A block's (layer_scale, sample_scale) for input x, drawn anew."""
    layer_scale = None if p.layer_scale is None else p.layer_scale.reshape(-1)
    if not drops_paths(p.drop_path):
        return layer_scale, None
    # The user's own module draws the samples: same distribution, same random numbers.
    ones = torch.ones((x.shape[0], 1, 1, 1), dtype=compute_dtype(x.dtype), device=x.device)
    return layer_scale, p.drop_path(ones).reshape(-1)


def act_name(module: nn.Module) -> str | None:
    """The name of the activation that ``module`` computes, or None if it is none that the kernels
    know."""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return {
        nn.ReLU: "relu",
        nn.SiLU: "silu",
        nn.Hardswish: "hardswish",
        nn.Identity: "identity",
    }.get(type(module))


class FusedPatchConv(PackingModule):
    """A convolution whose stride is its kernel, with BatchNorm: the stem and the merging layers.
    Emits channels_last.

    Inference without gradients is one op on packed weights; training with batch statistics runs the
    fused ops on the CPU and where CUDA kernels are, and elsewhere in a lean layer. Otherwise
    convolution and norm run as they are.
    """

    def parts(self) -> tuple[nn.Conv2d, nn.Module | None] | None:
        """The convolution and the norm; None if calling them would not be what the fused op
        computes."""
        raise NotImplementedError

    def unfused(self, x: Tensor) -> Tensor:
        """The same layer, module by module."""
        raise NotImplementedError

    def trains_lean(self) -> bool:
        """Whether the convolution is computed again in backward rather than kept."""
        return False

    def patch_pack(self, conv: nn.Conv2d, norm: nn.Module | None) -> Tensor:
        """The pack for the packed ops."""

        def fold():
            scale, shift = _folded(norm, conv.bias, conv.weight)
            return [scale], [shift]

        return self.packed([conv.weight], (conv.bias,), norm, fold)

    def forward(self, x: Tensor) -> Tensor:
        ops.check_tensor("x", x, 4)
        parts = None if must_run_plainly() else self.parts()
        if parts is not None:
            conv, norm = parts
            _check_input(x, conv.in_channels, conv.weight)
            if x.shape[2] < conv.kernel_size[0] or x.shape[3] < conv.kernel_size[1]:
                raise ValueError(
                    f"x has height and width {tuple(x.shape[2:])}, "
                    f"expected at least one patch of {conv.kernel_size}"
                )
        if parts is None:
            self.drop_pack()
            return self.unfused(x)
        if torch.is_grad_enabled() or uses_batch_statistics(norm):
            self.drop_pack()
            x = x.contiguous(memory_format=torch.channels_last)
            if (
                (self.trains_lean() or is_fused(conv.weight))
                and uses_batch_statistics(norm)
                and conv.bias is None
                and not _empty_alone(x, norm)
            ):
                (weight,) = ops.autocast_weights(x, conv.weight)
                return batch_norm_layer(norm, x, None, weight, lean=self.trains_lean())
            return self.unfused(x)
        pack = self.patch_pack(conv, norm)
        cast = autocast_dtype(x)
        x = x if cast is None else x.to(cast)
        return _ops.patch_conv_packed(x, pack, conv.out_channels, *conv.kernel_size, True)
