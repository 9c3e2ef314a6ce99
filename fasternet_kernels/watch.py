"""Whether a model is still what it was, asked before every call of a network that runs as one op.

Everything that decides what a model computes in eval without gradients is noted once, as tuples of
plain objects, and compared at each call: the class of every module and the dict of its attributes,
the attributes that its forward reads, its children, parameters and buffers (the very objects), the
address and version of every tensor, that nothing is hooked in, and that no optimizer has stepped.
Nothing of this is signalled by PyTorch, so all of it is looked at each time: some 1500 comparisons
for a FasterNet-T0. In C (``fasternet_runtime``, python/unchanged.h) that takes microseconds; where
that module was not built, the same loop in Python takes ten times as long.
"""

from __future__ import annotations

import torch
from torch import nn

from . import modules as _modules

try:
    from fasternet_runtime import _unchanged
except ImportError:
    _unchanged = None

_ABSENT = object()
_VERSION = torch._C.TensorBase._version
_ADDRESS = torch._C.TensorBase.data_ptr
_GLOBALS = vars(torch.nn.modules.module)
_GLOBAL_HOOKS = (_GLOBALS, "_global_forward_hooks", _GLOBALS, "_global_forward_pre_hooks")

# Modules whose forward is known: the attributes that it reads, and where else it looks. Of all others
# everything is watched.
_CONV = ("stride", "padding", "dilation", "groups", "padding_mode")
_NORM = ("training", "eps")
_KNOWN = {
    nn.Conv2d: _CONV,
    nn.Linear: (),
    nn.BatchNorm2d: _NORM,
    nn.SyncBatchNorm: _NORM,
    nn.GELU: ("approximate",),
    nn.ReLU: (),
    nn.SiLU: (),
    nn.Hardswish: (),
    nn.Identity: (),
    nn.Sequential: (),
}
_CONTENTS = {
    nn.Conv2d: ("_parameters",),
    nn.Linear: ("_parameters",),
    nn.BatchNorm2d: ("_parameters", "_buffers"),
    nn.SyncBatchNorm: ("_parameters", "_buffers"),
    nn.Sequential: ("_modules",),
}
_ALL_CONTENTS = ("_parameters", "_buffers", "_modules")

_PLAIN = (int, float, str, bool, type(None))
# What every module has, or what says nothing about its answers.
_UNREAD = {*vars(nn.Module()), "_pack", "call_super_init", "forward"} - {"training"}


def _is_plain(value) -> bool:
    """Whether a value is a number, a string or a collection of such: what code branches on."""
    if type(value) in (tuple, list, set, frozenset):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return type(value) in _PLAIN


def _copy(value):
    """A plain value, where it can be edited a copy: equal until then, but not the same object."""
    if type(value) in (list, tuple):
        return type(value)(map(_copy, value))
    if type(value) is dict:
        return {k: _copy(v) for k, v in value.items()}
    return set(value) if type(value) is set else value


def _attributes(m: nn.Module) -> list[tuple[str, object]]:
    """(name, value) of what a forward may read in a module's ``__dict__``, besides its children and
    tensors; the value is _ABSENT where it would be found in the class."""
    own = vars(m)
    if type(m) in _KNOWN:
        names = {*_KNOWN[type(m)], "forward"}
    else:
        names = {"forward"} | (own.keys() - _UNREAD)
        for level in type(m).__mro__[: type(m).__mro__.index(nn.Module)]:
            names |= {k for k, v in vars(level).items() if _is_plain(v) and k[:2] != "__"} - _UNREAD
    values = ((name, own.get(name, _ABSENT)) for name in names)
    return [(name, _copy(value) if _is_plain(value) else value) for name, value in values]


class Watch:
    """What a model was when this was made.

    Holds the tensors and their storage, so that nothing else can take their place in memory
    unnoticed.
    """

    def __init__(self, model: nn.Module):
        modules, items, hooks, contents, tensors = [], [], list(_GLOBAL_HOOKS), [], []
        for m in model.modules():
            own = vars(m)
            modules += m, type(m), own
            for name, value in _attributes(m):
                items += own, name, value
            if m is not model:  # whose hooks run around its forward
                hooks += own, "_forward_hooks", own, "_forward_pre_hooks"
            for name in _CONTENTS.get(type(m), () if type(m) in _KNOWN else _ALL_CONTENTS):
                contents += own, name, dict(own[name])
                if name != "_modules":
                    tensors += [t for t in own[name].values() if t is not None]
        self.hooks = hooks
        self.optimizer_steps = _modules.optimizer_steps()
        try:
            versions = [x for t in tensors for x in (t, t._version, t.data_ptr())]
            self.storages = [t.untyped_storage() for t in tensors]
        except RuntimeError:  # inference tensors do not count their versions: nothing can be told
            self.seen = None
        else:
            lists = (modules, items, hooks, contents, versions)
            self.seen = (*map(tuple, lists), _ABSENT, _VERSION, _ADDRESS)

    def hooked(self) -> bool:
        """Whether calling a module of the model does more than its forward."""
        return any(own[name] for own, name in zip(*[iter(self.hooks)] * 2))

    def add_packs(self, modules: list[nn.Module]) -> None:
        """From now on, these modules must also keep the packs that they have."""
        if self.seen is not None:
            items = [x for m in modules for x in (vars(m), "_pack", vars(m).get("_pack"))]
            self.seen = (self.seen[0], (*items, *self.seen[1]), *self.seen[2:])

    def holds(self) -> bool:
        """Whether nothing has changed since, as far as can be told, and nothing is hooked in."""
        if self.seen is None or self.optimizer_steps != _modules.optimizer_steps():
            return False
        try:
            return unchanged(*self.seen)
        except Exception:  # what took the place of an attribute cannot be compared with it
            return False


def python_unchanged(modules, items, hooks, contents, tensors, absent, version, address) -> bool:
    """What ``fasternet_runtime._unchanged`` does.

    The arguments are flat tuples: (object, its class, its ``__dict__``)..., (dict, key, value or
    ``absent``)..., (dict, key of an empty dict)..., (dict, key of a dict, copy of that)...,
    (tensor, its version, its address)...
    """

    def groups(values, n):
        return zip(*[iter(values)] * n)

    for m, cls, own in groups(modules, 3):
        if type(m) is not cls or vars(m) is not own:
            return False
    for own, name, value in groups(items, 3):
        now = own.get(name, absent)
        if now is not value and (type(now) is not type(value) or now != value):
            return False
    for own, name in groups(hooks, 2):
        if own.get(name, True):
            return False
    for own, name, copy in groups(contents, 3):
        now = own.get(name)
        if now is None or list(now) != list(copy):
            return False
        for a, b in zip(now.values(), copy.values()):
            if a is not b:
                return False
    for t, seen_version, seen_address in groups(tensors, 3):
        if t._version != seen_version or t.data_ptr() != seen_address:
            return False
    return True


unchanged = _unchanged or python_unchanged
