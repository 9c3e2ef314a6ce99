"""Whether a model is still what it was, asked before every call of a network that runs as a whole.

Everything that decides what a model computes is noted once, as tuples of plain objects, and
compared at each call: the class of every module and the dict of its attributes, the attributes that
its forward reads, its children, parameters and buffers (the very objects), and that nothing is
hooked in; of a model whose weights are packed also the address and version of every tensor, and
that no optimizer has stepped.
Nothing of this is signalled by PyTorch, so all of it is looked at each time: over a thousand
comparisons for a FasterNet-T0. In C (``fasternet_runtime``, python/unchanged.h) that takes
microseconds; where that module was not built, the same loop in Python takes several times as long.
"""

from __future__ import annotations

import operator

import torch
from torch import nn

from . import modules as _modules

try:
    from fasternet_runtime import _unchanged
except ImportError:
    _unchanged = None


# What may be expected of an attribute, besides a value. Classes, because a copy of a class is the
# class itself.
class _Absent:
    """That there is none."""


class _Empty:
    """An empty dict."""


class _Contents(dict):
    """A dict that holds the same."""


_ARGUMENTS = (
    *(_Absent, _Empty, _Contents),
    *(torch._C.TensorBase._version, torch._C.TensorBase.data_ptr),
)
_GLOBALS = vars(torch.nn.modules.module)

# Modules whose forward is known: the attributes that it reads, and where else it looks. Of all
# others everything is watched.
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
_UNREAD = {*vars(nn.Module()), "_pack", "_compiled_call_impl", "call_super_init", "forward"}
_UNREAD -= {"training"}


def _is_plain(value) -> bool:
    """Whether a value is a number, a string or a collection of such: what code branches on."""
    if type(value) in (tuple, list, set, frozenset):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return type(value) in _PLAIN


def _copy(value):
    """A plain value, and a copy of what can be edited: equal until then, but not the same object,
    which is slower to compare."""
    if type(value) is list:
        return list(map(_copy, value))
    if type(value) is dict:
        return {k: _copy(v) for k, v in value.items()}
    if type(value) is tuple:
        items = tuple(map(_copy, value))
        return value if all(map(operator.is_, items, value)) else items
    return set(value) if type(value) is set else value


def attributes(m: nn.Module) -> list[tuple[str, object]]:
    """(name, value) of what a forward may read in a module's ``__dict__``, besides its children and
    tensors; the value is _Absent where it would be found in the class."""
    own = vars(m)
    if type(m) in _KNOWN:
        names = {*_KNOWN[type(m)], "forward"}
    else:
        names = {"forward"} | (own.keys() - _UNREAD)
        for level in type(m).__mro__[: type(m).__mro__.index(nn.Module)]:
            names |= {k for k, v in vars(level).items() if _is_plain(v) and k[:2] != "__"} - _UNREAD
    values = ((name, own.get(name, _Absent)) for name in names)
    return [(name, _copy(value) if _is_plain(value) else value) for name, value in values]


def has(m: nn.Module, name: str, value) -> bool:
    """Whether a module still has what :func:`attributes` said."""
    now = vars(m).get(name, _Absent)
    try:
        return now is value or (type(now) is type(value) and bool(now == value))
    except Exception:  # arrays and tensors, for which == is no question of yes or no
        return False


class Watch:
    """What a model was when this was made.

    Holds the tensors and their storage, so that nothing else can take their place in memory
    unnoticed. ``values``: whether the tensors must hold what they held, and forward hooks are all
    that counts, as in inference; else tensors may be written, and backward hooks count as well.
    """

    def __init__(self, model: nn.Module, values: bool = True):
        modules, tensors = [], []
        kinds = ("forward", "forward_pre", *(() if values else ("backward", "backward_pre")))
        checks = [x for kind in kinds for x in (_GLOBALS, f"_global_{kind}_hooks", _Empty)]
        for m in model.modules():  # all of one module together: its dict is in the cache then
            own = vars(m)
            modules += m, type(m), own
            for name, value in attributes(m):
                checks += own, name, value
            if m is not model:  # whose hooks run around its forward
                checks += (x for kind in kinds for x in (own, f"_{kind}_hooks", _Empty))
            for name in _CONTENTS.get(type(m), () if type(m) in _KNOWN else _ALL_CONTENTS):
                checks += own, name, _Contents(own[name]) or _Empty
                if name != "_modules":
                    tensors += [t for t in own[name].values() if t is not None]
        self.optimizer_steps = _modules.optimizer_steps() if values else None
        if not values:
            tensors = []
        try:
            versions = [x for t in tensors for x in (t, t._version, t.data_ptr())]
            self.storages = [t.untyped_storage() for t in tensors]
        except RuntimeError:  # inference tensors do not count their versions: nothing can be told
            self.seen = None
        else:
            self.seen = (*map(tuple, (modules, checks, versions)), *_ARGUMENTS)

    def add_packs(self, modules: list[nn.Module]) -> None:
        """From now on, these modules must also keep the packs that they have."""
        if self.seen is not None:
            checks = [x for m in modules for x in (vars(m), "_pack", vars(m).get("_pack"))]
            self.seen = (self.seen[0], (*checks, *self.seen[1]), *self.seen[2:])

    def holds(self) -> bool:
        """Whether nothing has changed since, as far as can be told, and nothing is hooked in."""
        if self.seen is None or self.optimizer_steps not in (None, _modules.optimizer_steps()):
            return False
        try:
            return unchanged(*self.seen)
        except Exception:  # what took the place of an attribute cannot be compared with it
            return False


def python_unchanged(modules, checks, tensors, absent, empty, contents, version, address) -> bool:
    """What ``fasternet_runtime._unchanged`` does.

    Three flat tuples: (module, its class, its ``__dict__``)...; (dict, key, expected value)...;
    (tensor, its version, its address).... A value is expected to be the same object, or equal and
    of the same class; ``absent``: no such key; ``empty``: an empty dict; of class ``contents``: a
    dict of the same objects under the same keys in the same order.
    """

    def triples(values):
        return zip(*[iter(values)] * 3)

    for m, cls, own in triples(modules):
        if type(m) is not cls or vars(m) is not own:
            return False
    for own, name, expected in triples(checks):
        now = own.get(name, absent)
        if expected is empty:
            same = now is not absent and not now
        elif type(expected) is contents:
            same = now is not absent and list(now) == list(expected)
            same = same and all(map(operator.is_, now.values(), expected.values()))
        else:
            same = now is expected or (type(now) is type(expected) and now == expected)
        if not same:
            return False
    for t, seen_version, seen_address in triples(tensors):
        if t._version != seen_version or t.data_ptr() != seen_address:
            return False
    return True


unchanged = _unchanged or python_unchanged
