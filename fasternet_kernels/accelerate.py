"""Finds FasterNet's parts in a live model and swaps in fused modules; puts the originals back.

What is looked for is structure, never names: a block is a module with a 3x3 convolution on part of
its channels and two 1x1 convolutions around an activation; a patch convolution is one whose stride
is its kernel, with its norm; a network is a chain of
these with a pooled head. What is found must then prove itself: a copy with random parameters in
float64 has to give the same answers fused and unfused, in eval and in training mode, and leave its
input alone. Only then is the module replaced, by one that shares the original's children,
parameters, buffers, hooks and attributes, so parameters stay the same objects under the same keys.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import library, ops
from .modules import (
    NORMS,
    BlockParts,
    FusedBlock,
    FusedPatchConv,
    PackingModule,
    PConv,
    Sources,
    act_name,
    autocast_dtype,
    hooked,
    uses_batch_statistics,
)
from .reference import ACTS, BLOCK, HEAD, PATCH_CONV, compute_dtype

_ops = torch.ops.fasternet_kernels
_FUSED_TRAINING = [kind for kind in ("cpu", "cuda") if library.has_kernel("pw_stats", kind)]
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

    @property
    def swapped(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.swapped)

    @property
    def refused(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.swapped)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped, {len(self.refused)} refused"]
        for row in self.rows:
            done = "swapped" if row.swapped else "refused"
            reason = f": {row.reason}" if row.reason else ""
            lines.append(f"  {done}  {row.kind:<12} {row.path or '(model)'}{reason}")
        return "\n".join(lines)


class _Refused(Exception):
    """Why something that looks like a part is not swapped."""


class _DoesNotRun(_Refused):
    """The original module itself does not accept the input."""


# ---- Swapped modules -----------------------------------------------------------------------------


def _resolve(module: nn.Module, path: tuple[str, ...]):
    for name in path:
        module = module._modules[name]
    return module


class _Swapped:
    """What the swapped modules share: they take over the whole state of the original and keep it
    for restore."""

    def adopt(self, original: nn.Module) -> None:
        state = {name: value for name, value in original.__dict__.items() if name != "forward"}
        self.__dict__.update(state)
        self.__dict__["original"] = original  # not a child: it would appear in the state_dict


class SwappedBlock(_Swapped, FusedBlock):
    """Stands in for a block of another library. ``original`` is that block."""

    def __init__(self, original: nn.Module, paths: dict[str, tuple[str, ...] | None], act: str):
        super().__init__()
        self.adopt(original)
        self.__dict__["_paths"] = paths
        self.__dict__["_act"] = act

    def parts(self) -> BlockParts:
        at = {
            name: None if path is None else _resolve(self, path)
            for name, path in self._paths.items()
            if name != "layer_scale"
        }
        path = self._paths["layer_scale"]
        layer_scale = None if path is None else _resolve(self, path[:-1])._parameters[path[-1]]
        return BlockParts(act=self._act, layer_scale=layer_scale, **at)

    def fits(self, p: BlockParts) -> bool:
        # Without fused training kernels the original's own forward is the quicker one.
        if uses_batch_statistics(p.norm) and p.pw1.weight.device.type not in _FUSED_TRAINING:
            return False
        act_path = self._paths_act
        if act_path is not None and act_name(_resolve(self, act_path)) != self._act:
            return False
        return super().fits(p)

    def unfused(self, x: Tensor) -> Tensor:
        return self.original(x)


class SwappedPatchConv(_Swapped, FusedPatchConv):
    """Stands in for a stem or merging layer of another library. ``original`` is that layer."""

    def __init__(self, original: nn.Module, conv: tuple[str, ...], norm: tuple[str, ...] | None):
        super().__init__()
        self.adopt(original)
        self.__dict__["_paths"] = (conv, norm)

    def parts(self) -> tuple[nn.Conv2d, nn.Module | None]:
        conv, norm = self._paths
        return _resolve(self, conv), None if norm is None else _resolve(self, norm)


class SwappedPConv(_Swapped, nn.Module):
    """Stands in for a partial convolution of another library. ``original`` is that module."""

    def __init__(self, original: nn.Module, conv: tuple[str, ...]):
        super().__init__()
        self.adopt(original)
        self.__dict__["_path"] = conv

    def forward(self, x: Tensor) -> Tensor:
        conv = _resolve(self, self._path)
        if type(conv) is not nn.Conv2d or hooked(conv):
            return self.original(x)
        return ops.pconv3x3(x, conv.weight)


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


def _match_block(module: nn.Module) -> SwappedBlock | None:
    """A stand-in for ``module`` if it has a block's structure, None if it is something else
    altogether."""
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
    swapped = SwappedBlock(
        module,
        {
            "partial": partial_path,
            "pw1": pw1_path,
            "norm": norms[0][0] if norms else None,
            "pw2": pw2_path,
            "layer_scale": own[0][0] if own else None,
            "drop_path": rest[0][0] if rest else None,
        },
        act,
    )
    swapped.__dict__["_paths_act"] = acts[0][0] if acts else None
    return swapped


def _match_patch_conv(module: nn.Module) -> SwappedPatchConv | None:
    leaves = list(_leaves(module))
    if not leaves or len(leaves) > 2 or type(leaves[0][1]) is not nn.Conv2d:
        return None
    conv = leaves[0][1]
    norm = leaves[1] if len(leaves) == 2 else None
    if norm is not None and type(norm[1]) not in (*NORMS, nn.Identity):
        return None
    if min(conv.kernel_size) < 2 or conv.stride != conv.kernel_size or conv.padding != (0, 0):
        return None
    if conv.dilation != (1, 1) or conv.groups != 1 or _own_parameters(module, leaves):
        return None
    return SwappedPatchConv(module, leaves[0][0], None if norm is None else norm[0])


def _match_pconv(module: nn.Module) -> SwappedPConv | None:
    leaves = list(_leaves(module))
    if len(leaves) != 1 or not _is_same_conv3x3(leaves[0][1]) or _own_parameters(module, leaves):
        return None
    path, conv = leaves[0]
    _check_plain("the 3x3 convolution", conv, (1, 1), (1, 1))
    if conv.bias is not None:
        raise _Refused("the 3x3 convolution has a bias")
    return SwappedPConv(module, path)


# ---- Proof ---------------------------------------------------------------------------------------


def _randomised_copy(module: nn.Module) -> nn.Module:
    """A float64 CPU copy without hooks whose parameters and statistics are random, so that none is
    zero or one by chance."""
    if any(t.is_meta for t in module.state_dict(keep_vars=True).values()):
        raise _Refused("its parameters are on the meta device")
    try:
        twin = copy.deepcopy(module)
    except (
        Exception
    ) as error:  # tensors with history, locks, open files: whatever the user put there
        raise _Refused(f"it cannot be copied: {error}") from None
    for m in twin.modules():
        for hooks in (
            m._forward_hooks,
            m._forward_pre_hooks,
            m._backward_hooks,
            m._backward_pre_hooks,
        ):
            hooks.clear()
    twin = twin.to(device="cpu", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, t in twin.state_dict(keep_vars=True).items():
            if not t.is_floating_point():
                continue
            if name.endswith("running_var"):
                t.uniform_(0.5, 1.5, generator=generator)
            else:
                t.normal_(
                    0.0,
                    (1.0 / max(1, t[0].numel())) ** 0.5 if t.dim() > 1 else 1.0,
                    generator=generator,
                )
    return twin.requires_grad_(False)


def _difference(a, b) -> float:
    """Relative L2 distance; infinite where the results are not comparable."""
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


def _prove(swapped, x: Tensor, modes: tuple[bool, ...]) -> None:
    """Raises _Refused unless copies of the original and of its stand-in agree on ``x`` in the given
    training modes."""
    theirs = _randomised_copy(swapped.original)
    ours = copy.deepcopy(theirs)
    fused = copy.copy(swapped)
    fused.__dict__.update(
        {name: value for name, value in ours.__dict__.items() if name != "forward"}
    )
    fused.__dict__["original"] = ours
    for training in modes:
        theirs.train(training)
        fused.train(training)
        mode = "training" if training else "eval"
        for seed in range(2 if training else 1):
            try:
                expected, x_after = _run(theirs, x, seed)
            except Exception as error:  # whatever the module raises: it is not one of ours
                raise _DoesNotRun(
                    f"it does not run on an input of shape {tuple(x.shape)}: {error}"
                ) from None
            if not torch.equal(x_after, x):
                raise _Refused("it changes its input in place")
            try:
                got, _ = _run(fused, x, seed)
            except Exception as error:
                raise _Refused(f"the fused module does not run: {error}") from None
            difference = _difference(got, expected)
            if not difference <= _TOLERANCE:
                raise _Refused(
                    f"it computes something else: in {mode} mode it differs by {difference:.1e}"
                )
        for (name, a), b in zip(fused.named_buffers(), theirs.buffers()):
            if a.is_floating_point() and not _difference(a, b) <= _TOLERANCE:
                raise _Refused(f"it updates {name} differently")


def _image(channels: int, height: int, width: int) -> Tensor:
    return torch.randn(
        2, channels, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def _prove_block(swapped: SwappedBlock) -> None:
    _prove(swapped, _image(swapped.parts().pw1.in_channels, 3, 5), (False, True))


def _prove_patch_conv(swapped: SwappedPatchConv) -> None:
    conv, _ = swapped.parts()
    kh, kw = conv.kernel_size
    _prove(swapped, _image(conv.in_channels, 2 * kh + 1, 3 * kw), (False, True))


def _prove_pconv(swapped: SwappedPConv) -> None:
    """The number of input channels stands nowhere in the convolution: it is one of the module's
    integers, or a sum."""
    c_partial = _resolve(swapped, swapped._path).in_channels
    numbers = [v for v in vars(swapped.original).values() if type(v) is int and v > 0]
    candidates = sorted({v for v in (*numbers, *(c_partial + v for v in numbers)) if v > c_partial})
    candidates += [
        n_div * c_partial for n_div in (4, 2, 3, 8) if n_div * c_partial not in candidates
    ]
    for channels in candidates:
        try:
            return _prove(swapped, _image(channels, 3, 5), (False, True))
        except _DoesNotRun:
            continue  # not the input's width
    raise _DoesNotRun("it runs on no input wider than its convolution")


# ---- Networks ------------------------------------------------------------------------------------


class NetworkForward:
    """Runs a whole accelerated network as one op when nothing needs gradients; otherwise module by
    module.

    An instance stands in the model's ``__dict__`` under ``forward``, so that copies and pickles of
    the model carry their own. A plan of packed weights is kept from call to call; each call makes
    sure that the model still has the modules, parameters, buffers and modes that it was made of,
    and no hooks.
    """

    def __init__(self, model: nn.Module, steps, head: dict[str, tuple[str, ...]], act: str):
        self.model = model
        # The model's own per-instance forward, if it has one.
        self.inner = model.__dict__.get("forward")
        self.steps = [_resolve(model, path) for path in steps]
        self.head = head
        self.act = act
        inside = {id(m) for step in self.steps for m in step.modules()}
        self.outside = [
            (m, tuple(m._modules.values())) for m in model.modules() if id(m) not in inside
        ]
        self._kept: tuple[_Snapshot, list[Tensor], list[int]] | None = None

    def drop_pack(self) -> None:
        """Forgets the plan; the next call makes a new one from the packs of the modules."""
        self._kept = None

    def __getstate__(self):
        return {**self.__dict__, "_kept": None}

    def modules_run(self, x: Tensor):
        """The model as it is, module by module."""
        if self.inner is not None:
            return self.inner(x)
        return type(self.model).forward(self.model, x)

    def intact(self) -> bool:
        """Whether the chain outside the swapped modules is as it was recognised."""
        return all(
            len(m._modules) == len(children)
            and all(a is b for a, b in zip(m._modules.values(), children))
            for m, children in self.outside
        )

    def plan(self) -> tuple[list[Tensor], list[int]] | None:
        """(packs, plan) for the network op, or None if a part cannot take part now."""
        if self._kept is not None and self._kept[0].current():
            return self._kept[1:]
        self._kept = None
        snapshot = _Snapshot(self.model)
        if not self.intact() or snapshot.has_hooks():
            return None
        packs, plan = [], []
        for step in self.steps:
            if isinstance(step, FusedPatchConv):
                conv, norm = step.parts()
                if not step.fits(conv, norm):
                    return None
                packs.append(step.patch_pack(conv, norm))
                plan += [PATCH_CONV, conv.out_channels, *conv.kernel_size, 0]
            else:
                p = step.parts()
                if not step.fits(p) or _drops_paths(p.drop_path):
                    return None
                packs.append(step.block_pack(p))
                plan += [BLOCK, p.partial.out_channels, p.pw1.out_channels, 0, ACTS.index(p.act)]
        conv, fc = _resolve(self.model, self.head["conv"]), _resolve(self.model, self.head["fc"])
        if conv.weight.dtype != fc.weight.dtype:
            return None
        with torch.no_grad():
            dtype = compute_dtype(conv.weight.dtype)
            shifts = [None if b is None else b.to(dtype) for b in (conv.bias, fc.bias)]
            packs.append(_ops.pack([conv.weight, fc.weight], [None, None], shifts))
        plan += [HEAD, conv.out_channels, fc.out_features, 0, ACTS.index(self.act)]
        self._kept = (snapshot, packs, plan)
        return packs, plan

    @property
    def __code__(self):
        """torch.export asks a module's forward for its code, to name where it comes from."""
        return type(self).__call__.__code__

    def __call__(self, x: Tensor):
        unfused = (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or self.model.training
            or not isinstance(x, Tensor)
            or x.dim() != 4
            or x.device.type != "cpu"
        )
        plan = None if unfused else self.plan()
        if plan is None:
            return self.modules_run(x)
        stem, _ = self.steps[0].parts()
        cast = autocast_dtype(x)
        if x.shape[1] != stem.in_channels or not _large_enough(x, plan[1]):
            return self.modules_run(x)  # the modules raise as they always did
        if cast is not None:
            x = x.to(cast)
        elif x.dtype != stem.weight.dtype or stem.weight.device != x.device:
            return self.modules_run(x)
        (logits,) = _ops.network(x, *plan)
        return logits


class _Snapshot:
    """Everything that a plan of packed weights depends on, in a form that is quick to compare."""

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self.children = [(m, m._modules, tuple(m._modules.values())) for m in modules]
        self.hooks = [
            hooks
            for m in modules
            if m is not model  # the model's own hooks run around its forward
            for hooks in (m._forward_hooks, m._forward_pre_hooks)
        ]
        module = torch.nn.modules.module
        self.hooks += [module._global_forward_hooks, module._global_forward_pre_hooks]
        self.slots = [
            (slots, name)
            for m in modules
            for slots in (m._parameters, m._buffers)
            for name in slots
        ]
        self.norms = [m for m in modules if isinstance(m, NORMS)]
        self.sources = Sources(self.tensors(), self.constants())

    def tensors(self) -> list[Tensor | None]:
        return [slots[name] for slots, name in self.slots]

    def constants(self) -> tuple:
        return tuple((m.eps, m.training) for m in self.norms)

    def has_hooks(self) -> bool:
        return any(self.hooks)

    def current(self) -> bool:
        """Whether nothing has changed since, as far as PyTorch can tell."""
        if any(self.hooks):
            return False
        for m, modules, children in self.children:
            if m.training or len(modules) != len(children):
                return False
            for a, b in zip(modules.values(), children):
                if a is not b:
                    return False
        try:
            return self.sources.current(self.tensors(), self.constants())
        except KeyError:  # a parameter or buffer is gone
            return False


def _drops_paths(drop_path: nn.Module | None) -> bool:
    return drop_path is not None and drop_path.training and type(drop_path) is not nn.Identity


def _large_enough(x: Tensor, plan: list[int]) -> bool:
    """Whether every patch convolution of the plan has at least one patch."""
    height, width = x.shape[2:]
    for i in range(0, len(plan), 5):
        if plan[i] == PATCH_CONV:
            height, width = height // plan[i + 2], width // plan[i + 3]
    return height > 0 and width > 0


def _match_network(model: nn.Module) -> NetworkForward | None:
    """Recognises and proves stem, blocks and merging layers, then pool, 1x1 convolution,
    activation, linear.

    Registration order says nothing about the order of calls (timm's stages register their merging
    layer last), so the calls of a random copy are watched.
    """
    units: dict[str, nn.Module] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module._modules.items():
            if isinstance(child, (FusedBlock, FusedPatchConv)) or (
                child is not None and not child._modules
            ):
                units[prefix + name] = child
            elif child is not None:
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    patches = [m for m in units.values() if isinstance(m, FusedPatchConv)]
    steps = {name for name, m in units.items() if isinstance(m, (FusedBlock, FusedPatchConv))}
    others = {
        name
        for name, m in units.items()
        if name not in steps and next(m.parameters(), None) is not None
    }
    if (
        not patches
        or len(others) != 2
        or len({m.parts()[0].in_channels for m in patches}) != len(patches)
    ):
        return None
    twin = _randomised_copy(model).eval()
    calls: list[str] = []
    handles = []
    for name in units:
        handles.append(
            twin.get_submodule(name).register_forward_pre_hook(
                lambda *_, name=name: calls.append(name)
            )
        )
    stem = min((m.parts()[0] for m in patches), key=lambda conv: conv.in_channels)
    total = [1, 1]
    for m in patches:
        total = [t * k for t, k in zip(total, m.parts()[0].kernel_size)]
    x = _image(stem.in_channels, 2 * total[0], total[1])
    try:
        expected, _ = _run(twin, x, 0)
    except Exception as error:
        raise _Refused(f"it does not run on an input of shape {tuple(x.shape)}: {error}") from None
    for handle in handles:
        handle.remove()
    chain = [name for name in calls if name in steps]
    tail = [name for name in calls[calls.index(chain[-1]) + 1 :] if chain] if chain else []
    if (
        len(chain) != len(steps)
        or set(chain) != steps
        or [name for name in tail if name in others] != [name for name in calls if name in others]
    ):
        return None
    convs = [name for name in tail if _is_conv1x1(units[name])]
    linears = [name for name in tail if isinstance(units[name], nn.Linear)]
    acts = {act_name(units[name]) for name in tail} - {None, "identity"}
    if len(convs) != 1 or len(linears) != 1 or len(acts) > 1:
        return None
    path = {name: tuple(name.split(".")) for name in (*chain, convs[0], linears[0])}
    arguments = (
        [path[name] for name in chain],
        {"conv": path[convs[0]], "fc": path[linears[0]]},
        (*acts, "identity")[0],
    )
    got, _ = _run(NetworkForward(twin, *arguments), x, 0)
    difference = _difference(got, expected)
    if not difference <= _TOLERANCE:
        raise _Refused(f"the chain computes something else: it differs by {difference:.1e}")
    return NetworkForward(model, *arguments)


# ---- Public functions ----------------------------------------------------------------------------


def _swap_below(
    module: nn.Module, path: tuple[str, ...], match, prove, kind: str, rows: list[Row]
) -> bool:
    """Swaps the innermost matches below ``module``, which is not swapped itself. Returns whether
    anything below matched."""
    found = False
    for name, child in list(module._modules.items()):
        if (
            child is None
            or not child._modules
            or isinstance(child, (_Swapped, PackingModule, PConv))
        ):
            found |= isinstance(child, (_Swapped, PackingModule, PConv))
            continue
        where = (*path, name)
        if _swap_below(child, where, match, prove, kind, rows):
            found = True
            continue
        try:
            swapped = match(child)
            if swapped is None:
                continue
            prove(swapped)
        except _DoesNotRun:
            continue  # a convolution on all channels of something else
        except _Refused as refused:
            rows.append(Row(".".join(where), kind, False, str(refused)))
            continue
        found = True
        rows.append(Row(".".join(where), kind, True))
        module._modules[name] = swapped
    return found


def accelerate(model: nn.Module) -> nn.Module:
    """Swaps the FasterNet parts of ``model`` for fused modules, in place, and returns ``model``.

    Same parameters (the same objects), same state_dict keys, same answers, in ``train()`` and
    ``eval()``. Recognises the blocks, stems and merging layers of timm's and the official
    FasterNet, of this package's models and of forks with the same structure, and single partial
    convolutions elsewhere; a whole classification network also runs as one op in eval without
    gradients. Each swap is proved numerically first, on a random float64 copy; what does not pass
    is left alone with the reason in :func:`report`. :func:`restore` undoes it. Calling it again is
    harmless, and needed after replacing modules.

    Inference and frozen batch norms run fused. With batch statistics (``train()``) a swapped block
    runs its original's forward on devices that have no fused training kernels.

    Args:
        model: any module that holds such parts below it, on any device and of any dtype.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}, expected a torch.nn.Module")
    rows: list[Row] = []
    _swap_below(model, (), _match_block, _prove_block, "block", rows)
    _swap_below(model, (), _match_pconv, _prove_pconv, "pconv", rows)
    if any(isinstance(m, FusedBlock) for m in model.modules()):
        _swap_below(model, (), _match_patch_conv, _prove_patch_conv, "patch_conv", rows)
    if isinstance(model.__dict__.get("forward"), NetworkForward):
        _restore_forward(model)
    try:
        forward = _match_network(model)
        if forward is not None:
            model.__dict__["forward"] = forward
            rows.append(Row("", "network", True))
    except _Refused as refused:
        rows.append(Row("", "network", False, str(refused)))
    kept = [row for row in report(model).rows if row.swapped and row.kind != "network"]
    model.__dict__["_fasternet_kernels_report"] = Report((*kept, *rows))
    return model


def _restore_forward(model: nn.Module) -> None:
    forward = model.__dict__.get("forward")
    if isinstance(forward, NetworkForward):
        del model.__dict__["forward"]
        if forward.inner is not None:
            model.__dict__["forward"] = forward.inner


def restore(model: nn.Module) -> nn.Module:
    """Puts the original modules back in place of those that :func:`accelerate` swapped, and returns
    ``model``.

    Parameters, buffers and training modes stay as they are now.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}, expected a torch.nn.Module")
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, _Swapped):
                child.original.training = child.training
                module._modules[name] = child.original
    _restore_forward(model)
    model.__dict__.pop("_fasternet_kernels_report", None)
    return model


def report(model: nn.Module) -> Report:
    """What :func:`accelerate` swapped in ``model`` and what it refused, with the reasons; empty if
    it was never called."""
    return model.__dict__.get("_fasternet_kernels_report", Report(()))
