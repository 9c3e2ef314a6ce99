"""Whole networks: recognised, proved, and run as one.

A network is a chain of stem, blocks and merging layers with a pooled head, or with feature maps as
outputs. It runs by a plan that is kept from call to call: in eval without gradients one op over
packed weights, in training with the batch statistics of one process one node of autograd for each
stage. Each call makes sure that the model still has the modules, parameters, buffers, modes and
settings that the plan was made of, and no hooks; else it makes a new plan, and where there can be
none the network runs module by module.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .modules import BlockParts, act_name, branch_scales, drops_paths, hooked, must_run_plainly
from .parts import is_conv1x1
from .proof import (
    TOLERANCE,
    agree_in_buffers,
    copied,
    random_image,
    randomised_copy,
    relative_difference,
    seeded_run,
)
from .reference import ACTS, BLOCK, EMIT, HEAD, PATCH_CONV, apply_act, compute_dtype
from .swapped import RECORD, Refused, Swapped, SwappedBlock, SwappedPatchConv
from .training import Layer, batch_norm_layers, is_one_op, uses_batch_statistics
from .watch import Watch, attributes, has

_ops = torch.ops.fasternet_kernels
_network = _ops.network.default
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
NETWORK = "_fasternet_kernels_network"


class SwappedNetwork(Swapped):
    """A whole network of another library that runs by a plan, where it can."""

    def fused(self, x):
        network = self.__dict__[NETWORK]
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
        plan = network.plan()
        if plan is None:
            return self.original(x)
        dtype = x.dtype
        cast = torch.is_autocast_enabled("cpu") and torch.float64 not in (dtype, plan.dtype)
        if (dtype != plan.dtype and not cast) or not plan.fits(x):
            return self.original(x)  # whose modules say what is wrong
        if self.training:
            return self.original(x) if cast else plan.run(x, self.__dict__[RECORD].lean)
        if cast:
            x = x.to(torch.get_autocast_dtype("cpu"))
        with _BelowAutograd():  # no gradients are wanted, and its kernel in Python takes its time
            outputs = _network(x, plan.packs, plan.steps, self.fast)
        return outputs[0] if plan.collect is None else plan.collect(outputs)

    def drop_pack(self) -> None:
        """Forgets the plan; the next call makes a new one from the packs of the modules."""
        self.__dict__[NETWORK].kept = None


SwappedNetwork.mixin = SwappedNetwork


# ---- Plans ---------------------------------------------------------------------------------------


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


class _Chain(NamedTuple):
    """Where in a model the layers of a network are, in the order of their calls."""

    steps: list[str]
    head: tuple[str, str, str] | None = None  # 1x1 convolution, name of its activation, linear
    emit: tuple[int, ...] = ()  # without a head: the steps whose outputs are the network's
    collect: type | None = None  # what it returns them in, see NetworkPlan


class Network:
    """The chain of a recognised network, in the model's ``__dict__``."""

    training_refused = ""  # why it trains part by part, whatever the parts are now

    def __init__(self, model: nn.Module, chain: _Chain):
        self.model = model
        self.steps = [model.get_submodule(name) for name in chain.steps]
        self.head = None
        if chain.head is not None:
            conv, act, fc = chain.head
            self.head = (model.get_submodule(conv), act, model.get_submodule(fc))
        self.emit, self.collect = chain.emit, chain.collect
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

    def plan(self) -> NetworkPlan | TrainingPlan | None:
        """The plan for the model's mode, or None if a part of it has to run by itself now: because
        something is hooked in, modes are mixed, a norm is frozen or shares its statistics, or
        weights are not the model's parameters."""
        training = self.model.training
        kept = self.kept
        if isinstance(kept, TrainingPlan if training else NetworkPlan) and kept.watch.holds():
            return kept
        self.kept = None
        inside = (m for m in self.model.modules() if m is not self.model)
        if self.intact() and not hooked(inside):
            self.kept = self._training_plan() if training else self._network_plan()
        return self.kept

    def _parts(self) -> list[tuple] | None:
        """The parts of every step, or None if one would not run fused now."""
        found = []
        for step in self.steps:
            parts = None if "forward" in step.__dict__ else step.parts()
            if parts is None:
                return None
            found.append(parts)
        return found

    def _network_plan(self) -> NetworkPlan | None:
        # First what is cheap, for networks that never have a plan.
        if any(m.training for m in self.model.modules()) or self._parts() is None:
            return None
        watch = Watch(self.model)  # before anything is kept: what changes meanwhile is seen later
        parts = self._parts()
        if parts is None:
            return None
        packs, steps, patches = [], [], []
        for i, (step, found) in enumerate(zip(self.steps, parts)):
            block = found if isinstance(found, BlockParts) else None
            conv, norm = (block.pw1, block.norm) if block else found
            if uses_batch_statistics(norm):
                return None
            if block:
                packs.append(step.block_pack(block))
                act = ACTS.index(block.act)
                steps += [BLOCK, block.partial.out_channels, conv.out_channels, 0, act]
            else:
                packs.append(step.patch_pack(conv, norm))
                steps += [PATCH_CONV, conv.out_channels, *conv.kernel_size, 0]
                patches.append(conv.kernel_size)
            if i in self.emit:
                steps += [EMIT, 0, 0, 0, 0]
        if self.head is not None:
            conv, act, fc = self.head
            if conv.weight.dtype != fc.weight.dtype:
                return None
            with torch.no_grad():
                dtype = compute_dtype(conv.weight.dtype)
                shifts = [None if b is None else b.to(dtype) for b in (conv.bias, fc.bias)]
                packs.append(_ops.pack([conv.weight, fc.weight], [None, None], shifts))
            steps += [HEAD, conv.out_channels, fc.out_features, 0, ACTS.index(act)]
        stem = self.steps[0].part("conv").weight
        if not stem.is_cpu:
            return None
        watch.add_packs(self.steps)
        dtype, channels = stem.dtype, stem.shape[1]
        return NetworkPlan(watch, packs, steps, dtype, channels, tuple(patches), self.collect)

    def _training_plan(self) -> TrainingPlan | None:
        if self.training_refused:
            return None
        parameters = list(self.model.parameters())
        if not all(p.is_leaf for p in parameters):  # lent for this call
            return None
        parts = self._parts()
        if parts is None:
            return None
        known = set(map(id, parameters))
        segments: list[_Segment] = []
        weights: list[Tensor] = []
        patches = []
        for i, (step, found) in enumerate(zip(self.steps, parts)):
            layer = _training_layer(found)
            if layer is None or not all(t is None or id(t) in known for t in layer.parameters):
                return None
            w_partial, w_conv, _, _, w_pw2, *_ = layer.parameters
            weights += [w for w in (w_partial, w_conv, w_pw2) if w is not None]
            step.drop_pack()
            block = found if isinstance(found, BlockParts) else None
            if not block:
                patches.append(found[0].kernel_size)
            if not block or segments[-1].emits:
                segments.append(_Segment([], {}, False))
            layers, blocks, _ = segments[-1]
            if block and (block.layer_scale is not None or drops_paths(block.drop_path)):
                blocks[len(layers)] = block
            layers.append(layer)
            if i in self.emit:
                segments[-1] = segments[-1]._replace(emits=True)
        if self.head is not None:
            conv, _, fc = self.head
            weights += conv.weight, fc.weight
        dtype, channels = weights[0].dtype, weights[0].shape[1]
        if any(w.dtype != dtype for w in weights):
            return None
        takes = (dtype, channels, tuple(patches))
        watch = Watch(self.model, values=False)
        return TrainingPlan(watch, segments, self.head, weights, *takes, self.collect)


def _training_layer(parts: tuple) -> Layer | None:
    """A step's parts as a layer of training; None if it is not one: without a norm, with one that
    is frozen or shares its statistics, with a bias before it, or where no one op trains it."""
    if isinstance(parts, BlockParts):
        conv, norm, act = parts.pw1, parts.norm, parts.act
        w_partial, after = parts.partial.weight, (parts.pw2.weight, parts.layer_scale, None)
    else:
        (conv, norm), act = parts, "identity"
        w_partial, after = None, (None, None, None)
    if type(norm) is not nn.BatchNorm2d or not norm.training or conv.bias is not None:
        return None
    if not is_one_op(conv.weight):
        return None
    return Layer(norm, act, (w_partial, conv.weight, norm.weight, norm.bias, *after))


def network_of(model: nn.Module) -> Network | None:
    """The chain that ``model`` was recognised as, None if it runs module by module."""
    return model.__dict__.get(NETWORK)


# ---- Recognition ---------------------------------------------------------------------------------


def match_network(model: nn.Module) -> Network | None:
    """Recognises and proves a chain of stem, blocks and merging layers, then either pool, 1x1
    convolution, activation and linear, or nothing: the outputs are feature maps of the chain."""
    units = dict(_units(model))
    convs = [m.part("conv") for m in units.values() if isinstance(m, SwappedPatchConv)]
    if not convs or len({conv.in_channels for conv in convs}) != len(convs):
        return None
    rows = columns = 1
    for conv in convs:
        rows, columns = rows * conv.kernel_size[0], columns * conv.kernel_size[1]
    channels = min(conv.in_channels for conv in convs)
    images = (
        random_image(channels, 2 * rows, columns),
        # No multiple of anything, so whatever pads or crops shows.
        random_image(channels, rows + 3, 2 * columns - 1) * 1000.0,
    )
    with randomised_copy(model) as twin:
        twin.eval()
        chain = _match_chain(twin, units, images[0])
        if chain is None:
            return None
        _prove_inference(twin, chain, images)
        network = Network(model, chain)
        try:
            _prove_training(twin, chain, random_image(channels, 2 * rows, 2 * columns))
        except Refused as refused:
            network.training_refused = f"trains module by module: {refused}"
    return network


def _units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of what is swapped below ``module``, and of what has no children."""
    for name, child in module._modules.items():
        if isinstance(child, Swapped) or (child is not None and not child._modules):
            yield prefix + name, child
        elif child is not None:
            yield from _units(child, f"{prefix}{name}.")


def _as_list(outputs) -> list:
    return list(outputs) if type(outputs) in (list, tuple) else [outputs]


def _watched_run(twin: nn.Module, x: Tensor, units) -> tuple[object, list[str], list[object]]:
    """(outputs, names of the ``units`` in the order of their calls, what each call returned)."""
    calls: list[str] = []
    returned: list[object] = []

    def note(name, output):
        calls.append(name)
        returned.append(output)

    with contextlib.ExitStack() as stack:
        try:
            for name in units:
                handle = twin.get_submodule(name).register_forward_hook(
                    lambda _module, _inputs, output, name=name: note(name, output)
                )
                stack.callback(handle.remove)
            outputs = seeded_run(twin, x, 0)[0]
        except Exception as error:
            raise Refused(f"it does not run on small images: {error}") from None
    return outputs, calls, returned


def _match_chain(twin: nn.Module, units: dict[str, nn.Module], x: Tensor) -> _Chain | None:
    """The chain of a model with these ``units``, if it is one.

    Registration order says nothing about the order of calls (timm's stages register their merging
    layer last), so the calls of a random copy are watched.
    """
    steps = {name for name, m in units.items() if isinstance(m, (SwappedBlock, SwappedPatchConv))}
    others = {
        name
        for name, m in units.items()
        if name not in steps and next(m.parameters(), None) is not None
    }
    outputs, calls, returned = _watched_run(twin, x, units)
    order = [name for name in calls if name in steps]
    if sorted(order) != sorted(steps) or not isinstance(units[order[0]], SwappedPatchConv):
        return None
    if isinstance(outputs, Tensor) and outputs.dim() == 2:
        head = _match_head(calls[calls.index(order[-1]) + 1 :], units, others)
        return None if head is None else _Chain(order, head)
    # Identities hand on the very tensor that a step returned.
    made_by = {id(y): order.index(name) for name, y in zip(calls, returned) if name in steps}
    emit = tuple(made_by.get(id(y), -1) for y in _as_list(outputs))
    collect = None if isinstance(outputs, Tensor) else type(outputs)
    if collect not in (None, list, tuple):
        raise Refused(f"it returns a {collect.__name__}, not tensors, a list or a tuple")
    if -1 in emit:
        if others:
            raise Refused("its outputs are made by other layers: " + ", ".join(sorted(others)))
        raise Refused("its outputs are not those of its blocks")
    if any(a >= b for a, b in itertools.pairwise(emit)):
        raise Refused("its outputs are in another order than its blocks")
    return _Chain(order[: emit[-1] + 1], None, emit, collect)


def _match_head(
    tail: list[str], units: dict[str, nn.Module], others: set[str]
) -> tuple[str, str, str] | None:
    """The head, if the calls ``tail`` after the chain are one and all ``others`` belong to it."""
    if len(others) != 2 or not others <= set(tail) or len(tail) != len(set(tail)):
        return None
    convs = [name for name in tail if is_conv1x1(units[name])]
    linears = [name for name in tail if isinstance(units[name], nn.Linear)]
    acts = {act_name(units[name]) for name in tail} - {None, "identity"}
    if len(convs) != 1 or len(linears) != 1 or len(acts) > 1:
        return None
    return convs[0], (*acts, "identity")[0], linears[0]


# ---- Proof ---------------------------------------------------------------------------------------


def _prove_inference(twin: nn.Module, chain: _Chain, images: Iterable[Tensor]) -> None:
    """Raises Refused unless the chain, as one op, computes what the model's own forward does."""
    network = Network(twin, chain)
    for x in images:
        expected = _as_list(seeded_run(twin, x, 0)[0])
        with torch.no_grad():
            try:
                plan = network.plan()
                if plan is None:
                    raise Refused("the chain does not run as one op")
                got = _ops.network(x, plan.packs, plan.steps)
            except Refused:
                raise
            except Exception as error:
                raise Refused(f"the chain does not run as one op: {error}") from None
        difference = relative_difference(list(got), expected)
        if not difference <= TOLERANCE:
            raise Refused(f"the chain computes something else: it differs by {difference:.1e}")


def _prove_training(theirs: nn.Module, chain: _Chain, x: Tensor) -> None:
    """Raises Refused unless a step of the chain, stage by stage, is a step of the model's own
    forward: outputs, every gradient and which there are, buffers, random numbers. What a model does
    besides (dropout in its head, checkpointing, a detach, a counter) is seen only in training."""
    calls = []

    def note(*_):
        calls.append(torch.is_autocast_enabled("cpu"))

    with contextlib.ExitStack() as stack:
        try:
            theirs.train()
            theirs.requires_grad_()
            ours = stack.enter_context(copied(theirs, theirs.parameters()))
            plan = Network(ours, chain).plan()
            if not isinstance(plan, TrainingPlan):  # train() may leave a model in eval mode
                raise Refused("a layer of it does not run as one op")
            network = Network(theirs, chain)
            names = [set(vars(m)) for m, *_ in network.outside]
            for step in network.steps:
                stack.callback(step.register_forward_hook(note).remove)
            expected, state = _step(theirs, theirs, x)
            got, our_state = _step(ours, lambda x: plan.run(x, lean=False), x)
        except Refused:
            raise
        except Exception as error:  # whatever the model raises
            raise Refused(f"it does not train on a small image: {error}") from None
        if any(calls) or len(calls) != len(network.steps):
            raise Refused("it casts, or computes its layers again in backward")
        if not network.intact() or names != [set(vars(m)) for m, *_ in network.outside]:
            raise Refused("training changes its attributes")
        if not torch.equal(state, our_state):
            raise Refused("it draws other random numbers")
        _same_results(got, expected)
        agree_in_buffers(ours, theirs)


def _same_results(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises Refused unless both are the same outputs and gradients, but for rounding."""
    if list(got) != list(expected):
        raise Refused("other parameters have gradients")
    largest = max(float(t.norm()) for t in expected.values())
    for name, e in expected.items():
        error = float((got[name] - e).norm())
        # Some gradients are nothing but rounding.
        if got[name].dtype != e.dtype or not error <= 1e-8 * float(e.norm()) + 1e-12 * largest:
            raise Refused(f"it computes another {name}")


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
        torch.default_generator.manual_seed(0)
        outputs = _as_list(run(x))
        state = torch.get_rng_state()
        torch.autograd.backward(outputs, list(map(torch.randn_like, outputs)))
    parameters = ((f"gradient of {name}", p.grad) for name, p in module.named_parameters())
    result = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    result |= {name: g for name, g in (("gradient of x", x.grad), *parameters) if g is not None}
    return result, state
