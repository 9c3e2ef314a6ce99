"""Modules of other libraries that run fused: the same objects, with another class.

A swapped module keeps its parameters, attributes, methods, hooks and references: only its class
changes, to one that puts a fused forward in front of the original class. It runs fused while it is
built as it was when that was proved, and its original forward otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect

from torch import Tensor, nn

from . import ops
from .modules import BlockParts, FusedBlock, FusedPatchConv, PackingModule, hooked, must_run_plainly
from .training import NORMS, is_fused, process_group, uses_batch_statistics

RECORD = "_fasternet_kernels"


class Refused(Exception):
    """Why something that looks like a part is not swapped."""


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


class Swapped:
    """What swapped modules share. ``mixin`` is set by each kind to itself, for copy and pickle."""

    def __reduce_ex__(self, protocol):
        return _rebuild, (self.mixin, self.original_class), self.__getstate__()

    def __getstate__(self):
        return nn.Module.__getstate__(self)  # without what Module.compile made of the original

    def original(self, *args, **kwargs):
        """The module's original forward."""
        own = self.__dict__[RECORD].forward
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
        return self.__dict__[RECORD].fast

    def as_proved(self) -> bool:
        """Whether the module is built as it was when it was proved, and nothing hooks into it."""
        record = self.__dict__[RECORD]
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
        path = self.__dict__[RECORD].paths.get(name)
        if path is None:
            return None
        m = self
        for step in path:
            m = m._modules[step]
        return m


def swap(module: nn.Module, mixin: type, paths: dict, act: str = "identity") -> None:
    """Turns ``module`` into a swapped one, in place. Raises Refused if its class does not allow
    it."""
    try:
        swapped = _swapped_class(mixin, type(module))
    except (TypeError, ValueError) as error:
        raise Refused(f"its class cannot be extended: {error}") from None
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
    module.__dict__[RECORD] = _Record(own, paths, act, known, children, settings)
    module.__class__ = swapped


def unswap(module: nn.Module) -> None:
    """Makes a swapped module what it was."""
    record = module.__dict__.pop(RECORD)
    module.__dict__.pop("_pack", None)
    module.__class__ = module.original_class
    if record.forward is not None and "forward" not in module.__dict__:
        own = record.forward
        module.__dict__["forward"] = getattr(module, own) if isinstance(own, str) else own


class SwappedBlock(Swapped, FusedBlock):
    """A block of another library that runs fused."""

    def fused(self, x: Tensor) -> Tensor:
        return FusedBlock.forward(self, x)

    def parts(self) -> BlockParts | None:
        if not self.as_proved():
            return None
        record = self.__dict__[RECORD]
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
        return self.__dict__[RECORD].lean

    def __getstate__(self):
        return PackingModule.__getstate__(self)


class SwappedPatchConv(Swapped, FusedPatchConv):
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
        return self.__dict__[RECORD].lean

    def __getstate__(self):
        return PackingModule.__getstate__(self)


class SwappedPConv(Swapped, nn.Module):
    """A partial convolution of another library that runs fused."""

    def fused(self, x: Tensor) -> Tensor:
        if must_run_plainly() or not self.as_proved():
            return self.original(x)
        return ops.pconv3x3(x, self.part("partial").weight, fast=self.fast)


for _kind in (SwappedBlock, SwappedPatchConv, SwappedPConv):
    _kind.mixin = _kind
