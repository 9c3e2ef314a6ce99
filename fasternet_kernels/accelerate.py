"""Finds FasterNet's parts in a live model and makes them run fused; makes them what they were.

What is looked for is structure, never names: a block is a module with a 3x3 convolution on part of
its channels and two 1x1 convolutions around an activation; a patch convolution is one whose stride
is its kernel, with its norm; a network is a chain of these with a pooled head. What is found must
then prove itself: a copy with random parameters in float64 has to give the same answers fused and
unfused, in eval and in training mode, and leave its input alone. Only then does the module change
its class, and nothing else: it stays the same object with the same parameters under the same keys.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import itertools
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import ops
from .modules import (
    BlockParts,
    FusedBlock,
    FusedPatchConv,
    PackingModule,
    PConv,
    act_name,
    branch_scales,
    drops_paths,
    hooked,
    must_run_plainly,
)
from .reference import ACTS, BLOCK, EMIT, HEAD, PATCH_CONV, apply_act, compute_dtype
from .training import (
    NORMS,
    Layer,
    batch_norm_layers,
    is_fused,
    is_one_op,
    process_group,
    uses_batch_statistics,
)
from .watch import Watch, attributes, has

_ops = torch.ops.fasternet_kernels
_network = _ops.network.default
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_TOLERANCE = 1e-10  # relative, in float64: what differs by more computes something else


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a report: where, what it was taken for, whether it was swapped, and why not."""

    path: str
    kind: str
    swapped: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did to a model. ``print`` it, or read ``rows``."""

    rows: tuple[Row, ...]
    fast: bool = False  # whether the fast tier was allowed

    @property
    def swapped(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.swapped)

    @property
    def refused(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.swapped)

    def __str__(self) -> str:
        fast = ", fast tier allowed" if self.fast else ""
        lines = [f"{len(self.swapped)} swapped, {len(self.refused)} refused{fast}"]
        for row in self.rows:
            done = "swapped" if row.swapped else "refused"
            reason = f": {row.reason}" if row.reason else ""
            lines.append(f"  {done}  {row.kind:<12} {row.path or '(model)'}{reason}")
        return "\n".join(lines)


class _Refused(Exception):
    """Why something that looks like a part is not swapped."""


@dataclasses.dataclass(frozen=True)
class _Match:
    """A module's structure, as one of the kinds that can be swapped."""

    mixin: type
    paths: dict[str, tuple[str, ...] | None]
    act: str
    shapes: list[tuple[int, int, int]]  # of images to prove it on


# ---- Swapped modules -----------------------------------------------------------------------------
# A swapped module stays the same object: only its class changes, to one that puts a fused forward
# in front of the original class. So attributes, methods, hooks, isinstance and references hold.

_RECORD = "_fasternet_kernels"


@dataclasses.dataclass
class _Record:
    """What a swapped module was when it was proved, kept in its ``__dict__``."""

    forward: object  # its own per-instance forward: a method's name, another callable, or None
    paths: dict[str, tuple[str, ...] | None]  # where the parts are, below the module
    act: str
    known: list[tuple[tuple[str, ...], nn.Module]]  # all modules below it but the norm
    children: list[tuple[nn.Module, int]]  # how many each of them has
    settings: list[tuple[nn.Module, str, object]]  # see _settings
    lean: bool = False  # see accelerate
    fast: bool = False  # whether the fast tier is allowed


_PLAIN = (int, float, str, bool, type(None))
_CONV = ("stride", "padding", "dilation", "groups", "padding_mode")
_VARYING = ("training", "_pack", "call_super_init", "_is_full_backward_hook")


def _settings(m: nn.Module) -> list[tuple[nn.Module, str, object]]:
    """What of a module besides its children and tensors decides what it computes: triples of the
    module, a name in its ``__dict__`` and the value."""
    if isinstance(m, nn.Conv2d):
        names = _CONV
    elif isinstance(m, nn.GELU):
        names = ("approximate",)
    elif m._modules:
        # Its own attributes, and the defaults of its classes that an attribute may come to shadow.
        levels = type(m).__mro__[: type(m).__mro__.index(nn.Module)]
        found = [item for level in (m, *levels) for item in level.__dict__.items()]
        names = {k for k, v in found if type(v) in _PLAIN and k not in _VARYING and k[:2] != "__"}
    else:
        names = ()
    return [(m, name, m.__dict__.get(name)) for name in (*names, "forward")]


def _unchanged(settings: list[tuple[nn.Module, str, object]]) -> bool:
    for m, name, value in settings:
        now = m.__dict__.get(name)
        if now is not value and now != value:
            return False
    return True


@functools.cache
def _swapped_class(mixin: type, cls: type) -> type:
    """``cls`` with the fused forward of ``mixin`` in front, under the same name."""
    names = ("__module__", "__qualname__", "__doc__")
    body = {name: getattr(cls, name) for name in names} | {"original_class": cls}
    signature = inspect.signature(cls.forward)

    def forward(self, *args, **kwargs):
        return self.run(*args, **kwargs)

    forward.__signature__ = signature  # torch.export names the inputs after it
    return type(cls.__name__, (mixin, cls), body | {"forward": forward})


def _rebuild(mixin: type, cls: type) -> nn.Module:
    """An empty swapped module for copy and pickle to fill."""
    return object.__new__(_swapped_class(mixin, cls))


class _Swapped:
    """What swapped modules share. ``mixin`` is set by each kind to itself, for copy and pickle."""

    def __reduce_ex__(self, protocol):
        return _rebuild, (self.mixin, self.original_class), self.__getstate__()

    def __getstate__(self):
        return dict(self.__dict__)

    def original(self, *args, **kwargs):
        """The module's original forward."""
        own = self.__dict__[_RECORD].forward
        if own is None or isinstance(own, str):
            return getattr(self.original_class, own or "forward")(self, *args, **kwargs)
        return own(*args, **kwargs)

    def run(self, *args, **kwargs):
        """The fused forward for a call with one argument, the original for any other."""
        if len(args) != 1 or kwargs:
            return self.original(*args, **kwargs)
        return self.fused(*args)

    def unfused(self, x: Tensor) -> Tensor:
        return self.original(x)

    @property
    def fast(self) -> bool:
        """Whether the fast tier is allowed."""
        return self.__dict__[_RECORD].fast

    def as_proved(self) -> bool:
        """Whether the module is built as it was when it was proved, and nothing hooks into it."""
        record = self.__dict__[_RECORD]
        for path, module in record.known:
            m = self
            for name in path:
                m = m._modules.get(name)
                if m is None:
                    return False
            if m is not module:
                return False
        for m, n in record.children:
            if len(m._modules) != n:
                return False
        if not _unchanged(record.settings):
            return False
        norm = self.part("norm")
        inside = [m for _, m in record.known]
        return not hooked(inside if norm is None else [*inside, norm])

    def part(self, name: str) -> nn.Module | None:
        """The part of that name, where the record says it is."""
        path = self.__dict__[_RECORD].paths.get(name)
        if path is None:
            return None
        m = self
        for step in path:
            m = m._modules[step]
        return m


def _swap(module: nn.Module, mixin: type, paths: dict, act: str = "identity") -> None:
    """Turns ``module`` into a swapped one, in place."""
    try:
        swapped = _swapped_class(mixin, type(module))
    except (TypeError, ValueError) as error:
        raise _Refused(f"its class cannot be extended: {error}") from None
    norm = paths.get("norm")
    known = [
        (tuple(name.split(".")), m)
        for name, m in module.named_modules()
        if name and tuple(name.split(".")) != norm
    ]
    varying = paths.get("drop_path")
    own = module.__dict__.pop("forward", None)
    if getattr(own, "__self__", None) is module and hasattr(type(module), own.__name__):
        own = own.__name__  # as in the official code; a bound method would not survive pickling
    proved = [module, *(m for path, m in known if path != varying)]
    children = [(m, len(m._modules)) for m in proved if m._modules]
    settings = [setting for m in proved for setting in _settings(m)]
    module.__dict__[_RECORD] = _Record(own, paths, act, known, children, settings)
    module.__class__ = swapped


def _unswap(module: nn.Module) -> None:
    record = module.__dict__.pop(_RECORD)
    module.__dict__.pop("_pack", None)
    module.__class__ = module.original_class
    if record.forward is not None and "forward" not in module.__dict__:
        own = record.forward
        module.__dict__["forward"] = getattr(module, own) if isinstance(own, str) else own


class SwappedBlock(_Swapped, FusedBlock):
    """A block of another library that runs fused."""

    def fused(self, x: Tensor) -> Tensor:
        return FusedBlock.forward(self, x)

    def parts(self) -> BlockParts | None:
        if not self.as_proved():
            return None
        record = self.__dict__[_RECORD]
        norm = self.part("norm")
        if norm is not None and type(norm) not in (*NORMS, nn.Identity):
            return None
        path = record.paths["layer_scale"]
        layer_scale = None
        if path is not None:
            owner = self
            for step in path[:-1]:
                owner = owner._modules[step]
            layer_scale = owner._parameters.get(path[-1])
            if layer_scale is None:
                return None
        return BlockParts(
            self.part("partial"),
            self.part("pw1"),
            norm,
            record.act,
            self.part("pw2"),
            layer_scale,
            self.part("drop_path"),
        )

    def trains_unfused(self, p: BlockParts) -> bool:
        # Without fused training kernels the original's own forward is the quicker one. But it keeps
        # more, and it does not share statistics among processes on the CPU.
        kind = p.pw1.weight.device.type
        asked_for = self.trains_lean() or (kind == "cpu" and process_group(p.norm) is not None)
        if uses_batch_statistics(p.norm) and not is_fused(p.pw1.weight) and not asked_for:
            return True
        return super().trains_unfused(p)

    def trains_lean(self) -> bool:
        return self.__dict__[_RECORD].lean

    def __getstate__(self):
        return PackingModule.__getstate__(self)


class SwappedPatchConv(_Swapped, FusedPatchConv):
    """A stem or merging layer of another library that runs fused."""

    def fused(self, x: Tensor) -> Tensor:
        return FusedPatchConv.forward(self, x)

    def parts(self) -> tuple[nn.Conv2d, nn.Module | None] | None:
        if not self.as_proved():
            return None
        norm = self.part("norm")
        if norm is not None and type(norm) not in (*NORMS, nn.Identity):
            return None
        return self.part("conv"), norm

    def trains_lean(self) -> bool:
        return self.__dict__[_RECORD].lean

    def __getstate__(self):
        return PackingModule.__getstate__(self)


class SwappedPConv(_Swapped, nn.Module):
    """A partial convolution of another library that runs fused."""

    def fused(self, x: Tensor) -> Tensor:
        if must_run_plainly() or not self.as_proved():
            return self.original(x)
        return ops.pconv3x3(x, self.part("partial").weight, fast=self.fast)


for _kind in (SwappedBlock, SwappedPatchConv, SwappedPConv):
    _kind.mixin = _kind


# ---- Recognition ---------------------------------------------------------------------------------


def _leaves(
    module: nn.Module, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """The modules without children below ``module``, in registration order."""
    for name, child in module._modules.items():
        if child is None:
            continue
        if child._modules:
            yield from _leaves(child, (*path, name))
        else:
            yield (*path, name), child


def _is_same_conv3x3(m: nn.Module) -> bool:
    return type(m) is nn.Conv2d and m.kernel_size == (3, 3) and m.in_channels == m.out_channels


def _is_conv1x1(m: nn.Module) -> bool:
    return type(m) is nn.Conv2d and m.kernel_size == (1, 1)


def _check_plain(
    name: str, conv: nn.Conv2d, stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    if (
        conv.stride != stride
        or conv.padding != padding
        or conv.dilation != (1, 1)
        or conv.padding_mode != "zeros"
    ):
        raise _Refused(
            f"{name} has stride {conv.stride}, padding {conv.padding}, dilation {conv.dilation}"
        )
    if conv.groups != 1:
        raise _Refused(f"{name} has {conv.groups} groups")


def _own_parameters(module: nn.Module, leaves) -> list[tuple[tuple[str, ...], Tensor]]:
    """The parameters that containers (not leaves) hold directly."""
    owned = {id(p) for _, leaf in leaves for p in leaf.parameters(recurse=False)}
    return [
        (tuple(name.split(".")), p) for name, p in module.named_parameters() if id(p) not in owned
    ]


def _match_block(module: nn.Module) -> _Match | None:
    """The match of a module with a block's structure, None if it is something else altogether."""
    leaves = list(_leaves(module))
    partials = [(path, m) for path, m in leaves if _is_same_conv3x3(m)]
    pointwise = [(path, m) for path, m in leaves if _is_conv1x1(m)]
    if len(partials) != 1 or len(pointwise) != 2:
        return None
    (partial_path, partial), ((pw1_path, pw1), (pw2_path, pw2)) = partials[0], pointwise
    if pw1.in_channels < partial.in_channels or (pw2.in_channels, pw2.out_channels) != (
        pw1.out_channels,
        pw1.in_channels,
    ):
        return None
    _check_plain("the 3x3 convolution", partial, (1, 1), (1, 1))
    _check_plain("the first 1x1 convolution", pw1, (1, 1), (0, 0))
    _check_plain("the second 1x1 convolution", pw2, (1, 1), (0, 0))
    if partial.bias is not None or pw2.bias is not None:
        raise _Refused("the 3x3 or the second 1x1 convolution has a bias")
    order = [path for path, _ in leaves]
    between = leaves[order.index(pw1_path) + 1 : order.index(pw2_path)]
    norms = [(path, m) for path, m in between if isinstance(m, NORMS)]
    acts = [(path, m) for path, m in between if not isinstance(m, (*NORMS, nn.Identity))]
    if (
        len(norms) > 1
        or len(acts) > 1
        or (norms and acts and order.index(norms[0][0]) > order.index(acts[0][0]))
    ):
        raise _Refused("between the 1x1 convolutions there is more than a norm and an activation")
    act = act_name(acts[0][1]) if acts else "identity"
    if act is None:
        raise _Refused(f"the kernels do not know the activation {type(acts[0][1]).__name__}")
    used = {path for path, _ in [partials[0], *pointwise, *norms, *acts]}
    rest = [(path, m) for path, m in leaves if path not in used and type(m) is not nn.Identity]
    if any(next(m.parameters(), None) is not None for _, m in rest) or len(rest) > 1:
        raise _Refused("it has other layers: " + ", ".join(type(m).__name__ for _, m in rest))
    if rest and not hasattr(rest[0][1], "drop_prob"):
        raise _Refused(f"it has another layer: {type(rest[0][1]).__name__}")
    own = _own_parameters(module, leaves)
    if len(own) > 1 or (own and own[0][1].numel() != pw1.in_channels):
        raise _Refused("it has other parameters: " + ", ".join(".".join(path) for path, _ in own))
    paths = {
        "partial": partial_path,
        "pw1": pw1_path,
        "norm": norms[0][0] if norms else None,
        "pw2": pw2_path,
        "layer_scale": own[0][0] if own else None,
        "drop_path": rest[0][0] if rest else None,
    }
    return _Match(SwappedBlock, paths, act, [(pw1.in_channels, 3, 5), (pw1.in_channels, 4, 2)])


def _match_patch_conv(module: nn.Module) -> _Match | None:
    leaves = list(_leaves(module))
    if not leaves or len(leaves) > 2 or type(leaves[0][1]) is not nn.Conv2d:
        return None
    path, conv = leaves[0]
    norm = leaves[1] if len(leaves) == 2 else None
    if norm is not None and type(norm[1]) not in (*NORMS, nn.Identity):
        return None
    if min(conv.kernel_size) < 2 or conv.stride != conv.kernel_size or conv.padding != (0, 0):
        return None
    if conv.dilation != (1, 1) or conv.groups != 1 or _own_parameters(module, leaves):
        return None
    kh, kw = conv.kernel_size
    paths = {"conv": path, "norm": None if norm is None else norm[0]}
    shapes = [(conv.in_channels, 2 * kh + 1, 3 * kw), (conv.in_channels, kh, 2 * kw + kw - 1)]
    return _Match(SwappedPatchConv, paths, "identity", shapes)


def _match_pconv(module: nn.Module) -> _Match | None:
    """The number of input channels stands nowhere in a partial convolution: it is one of the
    module's integers, or a sum. What accepts no input wider than its convolution is something else.
    """
    leaves = list(_leaves(module))
    if len(leaves) != 1 or not _is_same_conv3x3(leaves[0][1]) or _own_parameters(module, leaves):
        return None
    path, conv = leaves[0]
    c_partial = conv.in_channels
    numbers = [v for v in vars(module).values() if type(v) is int and v > 0]
    widths = sorted({v for v in (*numbers, *(c_partial + v for v in numbers)) if v > c_partial})
    widths += [n * c_partial for n in (4, 2, 3, 8) if n * c_partial not in widths]
    twin = _randomised_copy(module).eval()
    for width in widths:
        try:
            y, _ = _run(twin, _image(width, 3, 5), 0)
        except Exception:  # not the input's width
            continue
        if isinstance(y, Tensor) and y.dim() == 4 and y.shape[1] == width:
            _check_plain("the 3x3 convolution", conv, (1, 1), (1, 1))
            if conv.bias is not None:
                raise _Refused("the 3x3 convolution has a bias")
            return _Match(
                SwappedPConv, {"partial": path}, "identity", [(width, 3, 5), (width, 4, 2)]
            )
    return None


# ---- Proof ---------------------------------------------------------------------------------------


def _randomised_copy(module: nn.Module) -> nn.Module:
    """A float64 CPU copy without hooks whose parameters and statistics are random, so that none is
    zero or one by chance."""
    if any(t.is_meta for t in module.state_dict(keep_vars=True).values()):
        raise _Refused("its parameters are on the meta device")
    groups = [getattr(m, "process_group", None) for m in module.modules()]
    try:
        twin = copy.deepcopy(module, {id(group): group for group in groups if group is not None})
    except Exception as error:  # whatever the user put there: locks, files, tensors with history
        raise _Refused(f"it cannot be copied: {error}") from None
    for m in twin.modules():
        for hooks in (
            m._forward_hooks,
            m._forward_pre_hooks,
            m._backward_hooks,
            m._backward_pre_hooks,
        ):
            hooks.clear()
        if type(m) is nn.SyncBatchNorm:  # of one process, also where there are several
            m.__class__, m.process_group = nn.BatchNorm2d, None
    twin = twin.to(device="cpu", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, t in twin.state_dict(keep_vars=True).items():
            if not t.is_floating_point():
                continue
            if name.endswith("running_var"):
                t.uniform_(0.5, 1.5, generator=generator)
            else:
                bound = (3.0 / max(1, t[0].numel())) ** 0.5 if t.dim() > 1 else 1.0
                t.uniform_(-bound, bound, generator=generator)
    return twin.requires_grad_(False)


def _difference(a, b) -> float:
    """Relative L2 distance, the largest of a list's or a tuple's; infinite where the results are
    not comparable."""
    if type(a) is type(b) and type(a) in (list, tuple) and len(a) == len(b) > 0:
        differences = [_difference(*pair) for pair in zip(a, b)]
        return float(torch.tensor(differences, dtype=torch.float64).max())  # keeps NaN
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape:
        return float("inf")
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def _run(module: nn.Module, x: Tensor, seed: int):
    """(result, the input afterwards); the random numbers of the module are the same at every
    call."""
    x = x.clone()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(seed)
        return module(x), x


def _image(channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, height, width, dtype=torch.float64, generator=generator)


def _agree(ours: nn.Module, theirs: nn.Module, x: Tensor, seed: int, when: str) -> None:
    """Raises _Refused unless both give the same on ``x`` and leave it alone."""
    try:
        expected, x_after = _run(theirs, x, seed)
    except Exception as error:  # whatever the module raises: it is not one of ours
        raise _Refused(f"it does not run on an input of shape {tuple(x.shape)}: {error}") from None
    if not torch.equal(x_after, x):
        raise _Refused("it changes its input in place")
    try:
        got, _ = _run(ours, x, seed)
    except Exception as error:
        raise _Refused(f"the fused module does not run: {error}") from None
    difference = _difference(got, expected)
    if not difference <= _TOLERANCE:
        raise _Refused(f"it computes something else: {when} it differs by {difference:.1e}")


def _prove(module: nn.Module, match: _Match) -> None:
    """Raises _Refused unless copies of the module, one swapped and one not, agree in eval and in
    training mode, on inputs of the order of 1 and of 1000."""
    theirs = _randomised_copy(module)
    ours = copy.deepcopy(theirs)
    _swap(ours, match.mixin, match.paths, match.act)
    if not ours.as_proved():  # it would run unfused, and prove nothing
        raise _Refused("global module hooks are registered")
    ours.__dict__[_RECORD].lean = True  # trains fused on every device
    for training in (False, True):
        theirs.train(training)
        ours.train(training)
        when = "in training mode" if training else "in eval mode"
        for seed, shape in enumerate(match.shapes):
            _agree(ours, theirs, _image(*shape) * 1000.0**seed, seed, when)
        _agree_in_buffers(ours, theirs)


def _agree_in_buffers(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers()):
        same = _difference(a, b) <= _TOLERANCE if a.is_floating_point() else torch.equal(a, b)
        if not same:
            raise _Refused(f"it updates {name} differently")


# ---- Networks ------------------------------------------------------------------------------------


class SwappedNetwork(_Swapped):
    """A whole network that runs as one op in eval without gradients, and stage by stage in training
    with the batch statistics of one process; else module by module.

    A plan is kept from call to call; each call makes sure that the model still has the modules,
    parameters, buffers, modes and settings that it was made of, and no hooks.
    """

    def fused(self, x):
        network = self.__dict__[_NETWORK]
        unfused = (
            (torch.is_grad_enabled() and not self.training)
            or torch.compiler.is_compiling()
            or network.model is not self  # a shallow copy, as DataParallel makes
            or not isinstance(x, Tensor)
            or x.dim() != 4
            or not x.is_cpu
            or must_run_plainly()
            or _get_current_dispatch_mode() is not None
        )
        if unfused:
            network.kept = None
            return self.original(x)
        plan = network.training_plan() if self.training else network.plan()
        if plan is None:
            return self.original(x)
        dtype = x.dtype
        cast = torch.is_autocast_enabled("cpu") and torch.float64 not in (dtype, plan.dtype)
        if (dtype != plan.dtype and not cast) or not plan.fits(x):
            return self.original(x)  # whose modules say what is wrong
        if self.training:
            return self.original(x) if cast else plan.run(x, self.__dict__[_RECORD].lean)
        if cast:
            x = x.to(torch.get_autocast_dtype("cpu"))
        with _BelowAutograd():  # no gradients are wanted, and its kernel in Python takes its time
            outputs = _network(x, plan.packs, plan.steps, self.fast)
        return outputs[0] if plan.collect is None else plan.collect(outputs)

    def drop_pack(self) -> None:
        """Forgets the plan; the next call makes a new one from the packs of the modules."""
        self.__dict__[_NETWORK].kept = None


SwappedNetwork.mixin = SwappedNetwork
_NETWORK = "_fasternet_kernels_network"


class NetworkPlan(NamedTuple):
    """What the network op is called with, and for which calls."""

    watch: Watch
    packs: list[Tensor]
    steps: list[int]
    dtype: torch.dtype
    channels: int
    patches: tuple[tuple[int, int], ...]  # kernel sizes of the patch convolutions, in order
    collect: type | None  # list or tuple: of the outputs; None: the one output itself

    def fits(self, x: Tensor) -> bool:
        return _fits(x, self.channels, self.patches)


def _fits(x: Tensor, channels: int, patches: Iterable[tuple[int, int]]) -> bool:
    """Whether x has the channels of the stem and pixels for every patch convolution."""
    height, width = x.shape[2:]
    for kh, kw in patches:
        height //= kh
        width //= kw
    return x.shape[1] == channels and height > 0 and width > 0


class _Segment(NamedTuple):
    """Layers of training that are one node of autograd: a stage, or what of it ends in an output of
    the network. ``blocks``: of layers whose scales are drawn or reshaped at every call."""

    layers: list[Layer]
    blocks: dict[int, BlockParts]
    emits: bool


class TrainingPlan(NamedTuple):
    """The layers of a network in training, and for which calls."""

    watch: Watch
    segments: list[_Segment]
    head: tuple[nn.Conv2d, str, nn.Linear] | None
    weights: list[Tensor]  # all of ``dtype``
    dtype: torch.dtype
    channels: int
    patches: tuple[tuple[int, int], ...]
    collect: type | None

    def fits(self, x: Tensor) -> bool:
        # The weights' type is looked at each time: through .data it changes unnoticed.
        same_type = all(w.dtype is self.dtype for w in self.weights)
        return same_type and x.shape[0] > 0 and _fits(x, self.channels, self.patches)

    def run(self, x: Tensor, lean: bool):
        """What the network returns for x of a shape that ``fits``."""
        x = x.contiguous(memory_format=torch.channels_last)
        outputs = []
        for segment in self.segments:
            layers = list(segment.layers)
            for i, block in segment.blocks.items():
                parameters = (*layers[i].parameters[:5], *branch_scales(block, x))
                layers[i] = layers[i]._replace(parameters=parameters)
            x = batch_norm_layers(x, layers, lean)
            if segment.emits:
                outputs.append(x)
        if self.head is None:
            return outputs[0] if self.collect is None else self.collect(outputs)
        conv, act, fc = self.head
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        weight = conv.weight
        if weight.stride(3) != 1:  # channels_last, as its gradient will then be
            weight = weight.permute(0, 2, 3, 1)
        x = apply_act(F.linear(x, weight.flatten(1), conv.bias), act)
        return F.linear(x, fc.weight, fc.bias)


@dataclasses.dataclass(frozen=True)
class _Head:
    """Global average pool, 1x1 convolution, activation, linear: where these are in a model."""

    conv: str
    fc: str
    act: str


class _Network:
    """The chain of a recognised network, in the model's ``__dict__``.

    ``emit`` are the indices of the steps whose outputs are the network's; ``collect`` is what it
    returns them in.
    """

    training_refused = ""  # why it trains part by part, whatever the parts are now

    def __init__(
        self,
        model: nn.Module,
        chain: list[str],
        head: _Head | None,
        emit: tuple[int, ...] = (),
        collect: type | None = None,
    ):
        self.model = model
        self.steps = [model.get_submodule(name) for name in chain]
        self.head = head
        self.emit, self.collect = emit, collect
        inside = {id(m) for step in self.steps for m in step.modules()}
        others = [m for m in model.modules() if id(m) not in inside]
        self.outside = [(m, type(m), tuple(m._modules.values())) for m in others]
        self.settings = [
            (m, name, value)
            for m in others
            for name, value in attributes(m)
            if name != "training" and (m is not model or name != "forward")
        ]
        self.kept: NetworkPlan | TrainingPlan | None = None

    def __getstate__(self):
        return {**self.__dict__, "kept": None}

    def intact(self) -> bool:
        """Whether the modules outside the steps are as they were recognised."""
        return all(has(*setting) for setting in self.settings) and all(
            (type(m) is cls or m is self.model)  # whose class accelerate changes itself
            and len(m._modules) == len(children)
            and all(a is b for a, b in zip(m._modules.values(), children))
            for m, cls, children in self.outside
        )

    def plan(self) -> NetworkPlan | None:
        """The plan for the network op, or None if a part cannot take part now."""
        kept = self.kept
        if isinstance(kept, NetworkPlan) and kept.watch.holds():
            return kept
        self.kept = None
        if any(m.training for m in self.model.modules()) or not self.intact():
            return None
        watch = Watch(self.model)
        if watch.hooked():
            return None
        packs, steps, patches = [], [], []
        for i, step in enumerate(self.steps):
            parts = None if "forward" in step.__dict__ else step.parts()
            if parts is None:
                return None
            if isinstance(step, FusedPatchConv):
                conv, norm = parts
                if uses_batch_statistics(norm):
                    return None
                packs.append(step.patch_pack(conv, norm))
                steps += [PATCH_CONV, conv.out_channels, *conv.kernel_size, 0]
                patches.append(conv.kernel_size)
            else:
                if uses_batch_statistics(parts.norm):
                    return None
                packs.append(step.block_pack(parts))
                c_partial, c_hidden = parts.partial.out_channels, parts.pw1.out_channels
                steps += [BLOCK, c_partial, c_hidden, 0, ACTS.index(parts.act)]
            if i in self.emit:
                steps += [EMIT, 0, 0, 0, 0]
        if self.head is not None:
            conv, fc = (self.model.get_submodule(name) for name in (self.head.conv, self.head.fc))
            if conv.weight.dtype != fc.weight.dtype:
                return None
            with torch.no_grad():
                dtype = compute_dtype(conv.weight.dtype)
                shifts = [None if b is None else b.to(dtype) for b in (conv.bias, fc.bias)]
                packs.append(_ops.pack([conv.weight, fc.weight], [None, None], shifts))
            steps += [HEAD, conv.out_channels, fc.out_features, 0, ACTS.index(self.head.act)]
        stem = self.steps[0].part("conv").weight
        if not stem.is_cpu:
            return None
        watch.add_packs(self.steps)
        dtype, channels = stem.dtype, stem.shape[1]
        plan = NetworkPlan(watch, packs, steps, dtype, channels, tuple(patches), self.collect)
        self.kept = plan
        return plan

    def training_plan(self) -> TrainingPlan | None:
        """The plan for training, or None if a part has to train by itself now: because something is
        hooked in, a norm is frozen or shares its statistics, or weights are not parameters."""
        kept = self.kept
        if isinstance(kept, TrainingPlan) and kept.watch.holds():
            return kept
        self.kept = None
        inside = (m for m in self.model.modules() if m is not self.model)
        if self.training_refused or hooked(inside) or not self.intact():
            return None
        parameters = list(self.model.parameters())
        if not all(p.is_leaf for p in parameters):  # lent for this call
            return None
        known = set(map(id, parameters))
        segments: list[_Segment] = []
        weights: list[Tensor] = []
        patches = []
        for i, step in enumerate(self.steps):
            parts = None if "forward" in step.__dict__ else step.parts()
            if parts is None:
                return None
            patch = isinstance(step, FusedPatchConv)
            if patch:
                (conv, norm), act = parts, "identity"
                convs, scales = (None, conv.weight), (None, None)
                patches.append(conv.kernel_size)
            else:
                conv, norm, act = parts.pw1, parts.norm, parts.act
                convs = (parts.partial.weight, conv.weight)
                scales = (parts.pw2.weight, parts.layer_scale)
            if type(norm) is not nn.BatchNorm2d or not norm.training or conv.bias is not None:
                return None
            layer = Layer(norm, act, (*convs, norm.weight, norm.bias, *scales, None))
            tensors = [t for t in layer.parameters if t is not None]
            if not is_one_op(conv.weight) or not all(id(t) in known for t in tensors):
                return None
            weights += [w for w in (*convs, scales[0]) if w is not None]
            step.drop_pack()
            if patch or segments[-1].emits:
                segments.append(_Segment([], {}, False))
            layers, blocks, _ = segments[-1]
            if not patch and (parts.layer_scale is not None or drops_paths(parts.drop_path)):
                blocks[len(layers)] = parts
            layers.append(layer)
            if i in self.emit:
                segments[-1] = segments[-1]._replace(emits=True)
        head = None
        if self.head is not None:
            conv, fc = (self.model.get_submodule(name) for name in (self.head.conv, self.head.fc))
            head = (conv, self.head.act, fc)
            weights += conv.weight, fc.weight
        dtype, channels = weights[0].dtype, weights[0].shape[1]
        if any(w.dtype != dtype for w in weights):
            return None
        watch, patches = Watch(self.model, values=False), tuple(patches)
        plan = TrainingPlan(watch, segments, head, weights, dtype, channels, patches, self.collect)
        self.kept = plan
        return plan


def network_of(model: nn.Module) -> _Network | None:
    """The chain that ``model`` was recognised as, None if it runs module by module."""
    return model.__dict__.get(_NETWORK)


def _as_list(outputs) -> list:
    return list(outputs) if type(outputs) in (list, tuple) else [outputs]


def _watched_run(twin: nn.Module, x: Tensor, units) -> tuple[object, list[str], list[object]]:
    """(outputs, names of the ``units`` in the order of their calls, what each call returned)."""
    calls: list[str] = []
    returned: list[object] = []

    def note(name, output):
        calls.append(name)
        returned.append(output)

    handles = [
        twin.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: note(name, output)
        )
        for name in units
    ]
    try:
        outputs = _run(twin, x, 0)[0]
    except Exception as error:
        raise _Refused(f"it does not run on small images: {error}") from None
    finally:
        for handle in handles:
            handle.remove()
    return outputs, calls, returned


def _match_network(model: nn.Module) -> _Network | None:
    """Recognises and proves a chain of stem, blocks and merging layers, then either pool, 1x1
    convolution, activation and linear, or nothing: the outputs are feature maps of the chain.

    Registration order says nothing about the order of calls (timm's stages register their merging
    layer last), so the calls of a random copy are watched.
    """
    units: dict[str, nn.Module] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module._modules.items():
            if isinstance(child, _Swapped) or (child is not None and not child._modules):
                units[prefix + name] = child
            elif child is not None:
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    steps = {name for name, m in units.items() if isinstance(m, (SwappedBlock, SwappedPatchConv))}
    convs = [m.part("conv") for m in units.values() if isinstance(m, SwappedPatchConv)]
    others = {
        name
        for name, m in units.items()
        if name not in steps and next(m.parameters(), None) is not None
    }
    if not convs or len({conv.in_channels for conv in convs}) != len(convs):
        return None
    total = [1, 1]
    for conv in convs:
        total = [t * k for t, k in zip(total, conv.kernel_size)]
    stem = min(convs, key=lambda conv: conv.in_channels)
    # The second image is no multiple of anything, so whatever pads or crops shows.
    images = [
        _image(stem.in_channels, 2 * total[0], total[1]),
        _image(stem.in_channels, total[0] + 3, 2 * total[1] - 1) * 1000.0,
    ]
    twin = _randomised_copy(model).eval()
    outputs, calls, returned = _watched_run(twin, images[0], units)
    chain = [name for name in calls if name in steps]
    if len(chain) != len(steps) or set(chain) != steps:
        return None
    if not isinstance(units[chain[0]], SwappedPatchConv):
        return None
    if isinstance(outputs, Tensor) and outputs.dim() == 2:
        head = _match_head(calls[calls.index(chain[-1]) + 1 :], units, others)
        arguments = (chain, head)
        if head is None:
            return None
    else:
        # Identities hand on the very tensor that a step returned.
        made_by = {id(y): chain.index(name) for name, y in zip(calls, returned) if name in steps}
        emit = tuple(made_by.get(id(y), -1) for y in _as_list(outputs))
        collect = None if isinstance(outputs, Tensor) else type(outputs)
        if collect not in (None, list, tuple):
            raise _Refused(f"it returns a {collect.__name__}, not tensors, a list or a tuple")
        if -1 in emit:
            if others:
                raise _Refused("its outputs are made by other layers: " + ", ".join(sorted(others)))
            raise _Refused("its outputs are not those of its blocks")
        if any(a >= b for a, b in itertools.pairwise(emit)):
            raise _Refused("its outputs are in another order than its blocks")
        arguments = (chain[: emit[-1] + 1], None, emit, collect)
    network = _Network(twin, *arguments)
    for x in images:
        expected = _as_list(_run(twin, x, 0)[0])
        with torch.no_grad():
            try:
                plan = network.plan()
                got = _ops.network(x, plan.packs, plan.steps)
            except Exception as error:
                raise _Refused(f"the chain does not run as one op: {error}") from None
        difference = _difference(list(got), expected)
        if not difference <= _TOLERANCE:
            raise _Refused(f"the chain computes something else: it differs by {difference:.1e}")
    network = _Network(model, *arguments)
    try:
        _prove_training(twin, arguments, _image(stem.in_channels, 2 * total[0], 2 * total[1]))
    except _Refused as refused:
        network.training_refused = f"trains module by module: {refused}"
    return network


def _prove_training(twin: nn.Module, arguments: tuple, x: Tensor) -> None:
    """Raises _Refused unless a step of the chain, stage by stage, is a step of the model's own
    forward: outputs, every gradient and which there are, buffers, random numbers. What a model does
    besides (dropout in its head, checkpointing, a detach, a counter) is seen only in training."""
    calls, handles = [], []

    def note(*_):
        calls.append(torch.is_autocast_enabled("cpu"))

    try:
        theirs = twin.train().requires_grad_()
        ours = copy.deepcopy(theirs, {id(p): p for p in theirs.parameters()})
        plan = _Network(ours, *arguments).training_plan()
        if plan is None:
            raise _Refused("a layer of it does not run as one op")
        network = _Network(theirs, *arguments)
        names = [set(vars(m)) for m, *_ in network.outside]
        handles += [step.register_forward_hook(note) for step in network.steps]
        expected, state = _step(theirs, theirs, x)
        got, our_state = _step(ours, lambda x: plan.run(x, lean=False), x)
    except _Refused:
        raise
    except Exception as error:  # whatever the model raises
        raise _Refused(f"it does not train on a small image: {error}") from None
    finally:
        for handle in handles:
            handle.remove()
    if any(calls) or len(calls) != len(network.steps):
        raise _Refused("it casts, or computes its layers again in backward")
    if not network.intact() or names != [set(vars(m)) for m, *_ in network.outside]:
        raise _Refused("training changes its attributes")
    if not torch.equal(state, our_state):
        raise _Refused("it draws other random numbers")
    if list(got) != list(expected):
        raise _Refused("other parameters have gradients")
    largest = max(float(t.norm()) for t in expected.values())
    for name, e in expected.items():
        error = float((got[name] - e).norm())
        # Some gradients are nothing but rounding.
        if got[name].dtype != e.dtype or not error <= 1e-8 * float(e.norm()) + 1e-12 * largest:
            raise _Refused(f"it computes another {name}")
    _agree_in_buffers(ours, theirs)


def _step(module: nn.Module, run, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """(outputs and gradients by name, the state of the random numbers) after ``run(x)`` and a
    backward from random numbers."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        torch.manual_seed(0)
        outputs = _as_list(run(x))
        state = torch.get_rng_state()
        torch.autograd.backward(outputs, list(map(torch.randn_like, outputs)))
    parameters = ((f"gradient of {name}", p.grad) for name, p in module.named_parameters())
    result = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    result |= {name: g for name, g in (("gradient of x", x.grad), *parameters) if g is not None}
    return result, state


def _match_head(tail: list[str], units: dict[str, nn.Module], others: set[str]) -> _Head | None:
    """The head, if the calls ``tail`` after the chain are one and all ``others`` belong to it."""
    if len(others) != 2 or not others <= set(tail) or len(tail) != len(set(tail)):
        return None
    convs = [name for name in tail if _is_conv1x1(units[name])]
    linears = [name for name in tail if isinstance(units[name], nn.Linear)]
    acts = {act_name(units[name]) for name in tail} - {None, "identity"}
    if len(convs) != 1 or len(linears) != 1 or len(acts) > 1:
        return None
    return _Head(convs[0], linears[0], (*acts, "identity")[0])


# ---- Public functions ----------------------------------------------------------------------------


def _swap_innermost(
    module: nn.Module, path: tuple[str, ...], match, kind: str, rows: list[Row]
) -> bool:
    """Swaps the innermost matches in ``module``, itself or below. Returns whether it found any."""
    if isinstance(module, (_Swapped, PackingModule, PConv)):
        return True
    found = False
    first = len(rows)
    for name, child in module._modules.items():
        if child is not None:
            found |= _swap_innermost(child, (*path, name), match, kind, rows)
    if found or not module._modules:
        return found
    try:
        matched = match(module)
        if matched is None:
            return False
        _prove(module, matched)
        _swap(module, matched.mixin, matched.paths, matched.act)
    except _Refused as refused:
        if len(rows) == first:  # else the reason is already given further down
            rows.append(Row(".".join(path), kind, False, str(refused)))
        return False
    rows[first:] = [Row(".".join(path), kind, True)]
    return True


def accelerate(model: nn.Module, *, lean: bool = False, fast: bool = False) -> nn.Module:
    """Swaps the FasterNet parts of ``model`` for fused modules, in place, and returns ``model``.

    Same parameters (the same objects), same state_dict keys, same answers, in ``train()`` and
    ``eval()``. Recognises the blocks, stems and merging layers of timm's and the official
    FasterNet, of this package's models and of forks with the same structure, and single partial
    convolutions elsewhere; a whole network, up to its logits or its feature maps, also runs as one
    op in eval without gradients. Each swap is proved numerically first, on a random float64 copy;
    what does not pass is left alone with the reason in :func:`report`. :func:`restore` undoes it.
    Calling it again is harmless, and needed after replacing modules.

    A network with batch statistics trains on the CPU as one node of autograd for each stage, where
    nothing asks for its layers one by one.

    Inference and frozen batch norms run fused. With batch statistics (``train()``) a swapped block
    runs its original's forward on devices that have no fused training kernels, unless ``lean``.

    Args:
        model: any module that is or holds such parts, on any device and of any dtype.
        lean: training with batch statistics keeps only the input of each swapped part for backward,
            where the rest is computed again: less memory for more time.
        fast: allow the fast tier: Winograd's convolution where it pays, in float32 on CPUs in
            inference without gradients. A network's error against float64 stays below 2e-5
            (relative, L2); an infinity or NaN may reach other pixels nearby. The proof in float64
            is the same; nothing else changes.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}, expected a torch.nn.Module")
    with _proving:
        return _accelerate(model, lean, fast)


_proving = threading.RLock()  # the proofs seed the process's random numbers


def _accelerate(model: nn.Module, lean: bool, fast: bool) -> nn.Module:
    restore(model)
    rows: list[Row] = []
    _swap_innermost(model, (), _match_block, "block", rows)
    _swap_innermost(model, (), _match_pconv, "pconv", rows)
    if any(isinstance(m, FusedBlock) for m in model.modules()):
        _swap_innermost(model, (), _match_patch_conv, "patch_conv", rows)
    try:
        network = _match_network(model)
        if network is not None:
            model.__dict__[_NETWORK] = network
            _swap(model, SwappedNetwork, {})
            rows.append(Row("", "network", True, network.training_refused))
    except _Refused as refused:
        rows.append(Row("", "network", False, str(refused)))
    for module in model.modules():
        if isinstance(module, _Swapped):
            module.__dict__[_RECORD].lean = lean
            module.__dict__[_RECORD].fast = fast
    model.__dict__[_REPORT] = Report(tuple(rows), fast)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Makes every module that :func:`accelerate` swapped what it was, and returns ``model``.

    Parameters, buffers, hooks and training modes stay as they are now.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}, expected a torch.nn.Module")
    for module in list(model.modules()):
        if isinstance(module, _Swapped):
            _unswap(module)
    model.__dict__.pop(_NETWORK, None)
    model.__dict__.pop(_REPORT, None)
    return model


def report(model: nn.Module) -> Report:
    """What :func:`accelerate` swapped in ``model`` and what it refused, with the reasons; empty if
    it was never called."""
    return model.__dict__.get(_REPORT, Report(()))


_REPORT = "_fasternet_kernels_report"
