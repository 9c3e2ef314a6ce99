"""Fused modules: PConv, PConvPW and the FasterNet block, with ordinary parameters and the fused ops
as their forward.

A module holds plain ``nn.Conv2d`` and ``nn.BatchNorm2d`` children, so state_dicts, optimizers and
converters see what they know. What runs depends on the call:

* batch statistics wanted (training): ``pw_stats``, the running statistics as ``nn.BatchNorm2d``
  updates them, then ``bn_act`` or ``act_pw_residual``;
* running statistics, gradients on: the op on raw weights, with gradients for everything;
* running statistics, gradients off: the op on packed weights. The pack is kept between calls, and
  dropped by ``train()``, by a call with gradients on, by ``.to()`` and its kin and by
  ``load_state_dict``. Each call compares address and version of every parameter and buffer with the
  pack's, so only an edit through ``.data``, which PyTorch itself does not count, needs
  :func:`repack`. Under ``torch.compile`` and ``torch.export`` packing is part of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .models import ACTIVATIONS, DropPath
from .reference import apply_act, compute_dtype

_ops = torch.ops.fasternet_kernels
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


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


def uses_batch_statistics(norm: nn.Module | None) -> bool:
    return isinstance(norm, NORMS) and (norm.training or norm.running_mean is None)


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


def _batch_scale_and_shift(
    norm: nn.Module, z: Tensor, mean: Tensor, m2: Tensor
) -> tuple[Tensor, Tensor]:
    """(scale, shift) of ``(z - mean) * scale + shift`` from batch statistics; updates the running
    ones as nn.BatchNorm2d does."""
    count = z.shape[0] * z.shape[2] * z.shape[3]
    if count <= 1:
        raise ValueError(
            "batch statistics need more than 1 value per channel, "
            f"got a hidden tensor of shape {tuple(z.shape)}; call eval() for a single value"
        )
    if norm.training and norm.running_mean is not None:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            factor = norm.momentum
            if factor is None:
                factor = 1.0 / norm.num_batches_tracked.to(mean.dtype)
            for running, batch in ((norm.running_mean, mean), (norm.running_var, m2 / (count - 1))):
                running.mul_(1 - factor).add_((batch * factor).to(running.dtype))
    scale = torch.rsqrt(m2 / count + norm.eps)
    if norm.weight is None:
        return scale, torch.zeros_like(scale)
    return scale * norm.weight.to(scale.dtype), norm.bias.to(scale.dtype)


def _needs_process_group(norm: nn.Module | None) -> bool:
    """Whether statistics must be combined across processes, which the fused forward does not do."""
    return isinstance(norm, nn.SyncBatchNorm) and torch.distributed.is_initialized()


def hooked(*modules: nn.Module | None) -> bool:
    """Whether calling one of the modules does more than its forward: the fused forward would skip
    that."""
    return any(m is not None and (m._forward_hooks or m._forward_pre_hooks) for m in modules)


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


class Sources:
    """Tensors that something was computed from, and how to tell whether it is still current.

    Holds the tensors themselves, so that no other can take their place in memory unnoticed.
    """

    def __init__(self, tensors: Sequence[Tensor | None], constants: tuple = ()):
        self.constants = constants
        try:
            self.seen = tuple((t, 0 if t is None else _state(t)) for t in tensors)
        except RuntimeError:  # inference tensors do not count their versions: nothing can be told
            self.seen = None

    def current(self, tensors: Sequence[Tensor | None], constants: tuple = ()) -> bool:
        """Whether these are the same tensors with the same contents as far as PyTorch knows."""
        if self.seen is None or constants != self.constants or len(tensors) != len(self.seen):
            return False
        for t, (known, state) in zip(tensors, self.seen):
            if t is not known or (t is not None and _state(t) != state):
                return False
        return True


def _state(t: Tensor) -> tuple[int, int]:
    return t._version, t.data_ptr()


class PackingModule(nn.Module):
    """A module that keeps a pack of its folded weights for calls without gradients."""

    _pack: tuple[Sources, Tensor] | None = None

    def drop_pack(self) -> None:
        """Forgets the pack; the next call without gradients makes a new one."""
        self.__dict__["_pack"] = None

    def packed(self, weights: list[Tensor], others: tuple, norm: nn.Module | None, fold) -> Tensor:
        """The pack of ``weights``, made anew only if something it depends on has changed.

        It also depends on the tensors ``others`` and on ``norm``; ``fold()`` gives the (scales,
        shifts) that are packed in.
        """
        if torch.compiler.is_compiling():
            return _ops.pack(weights, *fold())
        constants = ()
        tensors = (*weights, *others)
        if isinstance(norm, NORMS):
            tensors += (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            constants = (norm.eps,)
        if self._pack is not None and self._pack[0].current(tensors, constants):
            return self._pack[1]
        with torch.no_grad():
            pack = _ops.pack([w.detach() for w in weights], *fold())
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
        return {**self.__dict__, "_pack": None}


def repack(model: nn.Module) -> nn.Module:
    """Makes every fused module under ``model`` pack its weights anew at its next call; returns
    ``model``.

    Needed only after edits through ``.data``, which leave no trace in a tensor's version counter.
    """
    for module in model.modules():
        if isinstance(module, PackingModule):
            module.drop_pack()
        forward = module.__dict__.get("forward")
        if hasattr(forward, "drop_pack"):
            forward.drop_pack()
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
        return ops.pconv3x3(x, self.partial_conv3.weight)


class PConvPW(PackingModule):
    """Partial convolution, 1x1 convolution, BatchNorm and activation in one pass (arXiv 2303.03667,
    section 3.3).

    Args:
        dim: channels C of the input.
        out_channels: channels of the output.
        n_div: C_partial = dim // n_div channels are convolved 3x3.
        act: relu, gelu (erf), gelu_tanh, silu, hardswish or identity.

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

    def forward(self, x: Tensor) -> Tensor:
        partial, pw, norm = self.partial_conv3, self.pw, self.bn
        _check_input(x, pw.in_channels, pw.weight)
        if hooked(partial, pw, norm) or (norm.training and _needs_process_group(norm)):
            c_partial = partial.out_channels
            u = torch.cat((partial(x[:, :c_partial]), x[:, c_partial:]), dim=1)
            return apply_act(norm(pw(u)), self.act)
        dtype = compute_dtype(pw.weight.dtype)
        if uses_batch_statistics(norm):
            z, mean, m2 = _ops.pw_stats(x, *ops.autocast_weights(x, partial.weight, pw.weight))
            return _ops.bn_act(z, mean, *_batch_scale_and_shift(norm, z, mean, m2), self.act)
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

    def parts(self) -> BlockParts:
        """Where the block's pieces are."""
        raise NotImplementedError

    def unfused(self, x: Tensor) -> Tensor:
        """The same block, module by module: for calls that the fused ops do not cover."""
        p = self.parts()
        c_partial = p.partial.out_channels
        branch = p.pw1(torch.cat((p.partial(x[:, :c_partial]), x[:, c_partial:]), dim=1))
        branch = apply_act(branch if p.norm is None else p.norm(branch), p.act)
        branch = p.pw2(branch)
        if p.layer_scale is not None:
            branch = p.layer_scale.reshape(-1, 1, 1) * branch
        return x + (branch if p.drop_path is None else p.drop_path(branch))

    def fits(self, p: BlockParts) -> bool:
        """Whether the fused ops do all that calling the parts would: no hooks, no other module in a
        part's place."""
        convs = type(p.partial) is type(p.pw1) is type(p.pw2) is nn.Conv2d
        norm = p.norm is None or type(p.norm) in (*NORMS, nn.Identity)
        if not (convs and norm) or hooked(p.partial, p.pw1, p.norm, p.pw2, p.drop_path):
            return False
        return not (
            uses_batch_statistics(p.norm)
            and (p.pw1.bias is not None or _needs_process_group(p.norm))
        )

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
        p = self.parts()
        if not self.fits(p):
            return self.unfused(x)
        _check_input(x, p.pw1.in_channels, p.pw1.weight)
        sample_scale = None
        if (
            p.drop_path is not None
            and p.drop_path.training
            and type(p.drop_path) is not nn.Identity
        ):
            # The user's own module draws the samples: same distribution, same random numbers.
            ones = torch.ones((x.shape[0], 1, 1, 1), dtype=compute_dtype(x.dtype), device=x.device)
            sample_scale = p.drop_path(ones).reshape(-1)
        layer_scale = None if p.layer_scale is None else p.layer_scale.reshape(-1)
        if uses_batch_statistics(p.norm):
            w_partial, w_pw1, w_pw2 = ops.autocast_weights(
                x, p.partial.weight, p.pw1.weight, p.pw2.weight
            )
            z, mean, m2 = _ops.pw_stats(x, w_partial, w_pw1)
            scale, shift = _batch_scale_and_shift(p.norm, z, mean, m2)
            return _ops.act_pw_residual(
                x, z, mean, scale, shift, w_pw2, layer_scale, sample_scale, p.act
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
            x, pack, p.partial.out_channels, p.pw1.out_channels, sample_scale, p.act
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
        device=None,
        dtype=None,
    ):
        super().__init__()
        ops.check_act(act)
        factory = {"device": device, "dtype": dtype}
        hidden = int(dim * mlp_ratio)
        self.act = act
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

    def parts(self) -> BlockParts:
        pw1, norm, _, pw2 = self.mlp
        return BlockParts(
            self.spatial_mixing.partial_conv3,
            pw1,
            norm,
            self.act,
            pw2,
            self.layer_scale,
            self.drop_path,
        )


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

    Inference without gradients is one op on packed weights; otherwise convolution and norm run as
    they are.
    """

    def parts(self) -> tuple[nn.Conv2d, nn.Module | None]:
        """The convolution and the norm."""
        raise NotImplementedError

    def fits(self, conv: nn.Conv2d, norm: nn.Module | None) -> bool:
        """Whether the packed op does all that calling the parts would."""
        known = type(conv) is nn.Conv2d and (norm is None or type(norm) in (*NORMS, nn.Identity))
        return known and not hooked(conv, norm) and not uses_batch_statistics(norm)

    def patch_pack(self, conv: nn.Conv2d, norm: nn.Module | None) -> Tensor:
        """The pack for the packed ops."""

        def fold():
            scale, shift = _folded(norm, conv.bias, conv.weight)
            return [scale], [shift]

        return self.packed([conv.weight], (conv.bias,), norm, fold)

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.parts()
        if torch.is_grad_enabled() or not self.fits(conv, norm):
            self.drop_pack()
            y = conv(x.contiguous(memory_format=torch.channels_last))
            return y if norm is None else norm(y)
        _check_input(x, conv.in_channels, conv.weight)
        pack = self.patch_pack(conv, norm)
        cast = autocast_dtype(x)
        x = x if cast is None else x.to(cast)
        return _ops.patch_conv_packed(x, pack, conv.out_channels, *conv.kernel_size, True)
