"""Whether two modules compute the same, shown on a float64 copy with random parameters."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .swapped import Refused

TOLERANCE = 1e-10  # relative, in float64: what differs by more computes something else


@contextlib.contextmanager
def copied(module: nn.Module, shared: Iterable[Tensor] = ()) -> Iterator[nn.Module]:
    """A copy that holds nothing of the module but ``shared`` and process groups, freed at the end:
    swapped modules refer to themselves, as the official code's do, so the memory would wait for the
    garbage collector, which does not know what tensors weigh."""
    shared = list(shared)
    try:
        groups = [getattr(m, "process_group", None) for m in module.modules()]
        memo = {id(value): value for value in (*shared, *groups) if value is not None}
        for m in module.modules():  # hooks may hold anything
            memo |= {id(vars(m)[name]): OrderedDict() for name in _HOOKS if vars(m).get(name)}
        twin = copy.deepcopy(module, memo)
        del memo  # it holds the copy
        common = _held(twin).keys() & _held(module).keys() - _held_by(shared).keys()
    except Exception as error:  # whatever the user put there: locks, files, tensors with history
        raise Refused(f"it cannot be copied: {error}") from None
    if common:
        raise Refused("it cannot be copied: a copy holds modules or tensors of the original")
    contents = [vars(m) for m in twin.modules()]  # now: a forward may add what is not the copy's
    try:
        yield twin
    finally:
        for own in contents:
            own.clear()


_HELD = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _held(module: nn.Module) -> dict[int, object]:
    """What changes with the module, by address: its modules, their dicts, tensors and storages."""
    held: dict[int, object] = {}
    for m in module.modules():
        own = vars(m)
        dicts = [own[name] for name in (*_HELD, *_HOOKS) if name in own]
        tensors = [t for name in _HELD[:2] for t in own.get(name, {}).values() if t is not None]
        held |= {id(value): value for value in (m, own, *dicts)} | _held_by(tensors)
    return held


def _held_by(tensors: list[Tensor]) -> dict[int, Tensor]:
    held = {id(t): t for t in tensors}
    for t in tensors:
        with contextlib.suppress(Exception):  # sparse tensors and subclasses have none
            held[t.untyped_storage().data_ptr() or id(t)] = t
    return held


@contextlib.contextmanager
def randomised_copy(module: nn.Module) -> Iterator[nn.Module]:
    """A float64 CPU copy without hooks whose parameters and statistics are random, so that none is
    zero or one by chance."""
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        raise Refused("its parameters are on the meta device")
    with copied(module) as twin:
        try:
            _randomise(twin)
        except Exception as error:  # tensors and modules of other kinds may allow nothing of this
            raise Refused(f"its copy cannot be given random weights: {error}") from None
        yield twin


def _randomise(twin: nn.Module) -> None:
    for m in twin.modules():
        for name in _HOOKS:
            getattr(m, name).clear()
        if type(m) is nn.SyncBatchNorm:  # of one process, also where there are several
            m.__class__, m.process_group = nn.BatchNorm2d, None
    twin.to(device="cpu", dtype=torch.float64)
    generator = torch.Generator("cpu").manual_seed(0)
    owned = {id(t) for t in (*twin.parameters(), *twin.buffers())}
    with torch.no_grad():
        for name, t in twin.state_dict(keep_vars=True).items():
            if id(t) not in owned or not t.is_floating_point():  # extra state, counters
                continue
            if name.endswith("running_var"):
                t.uniform_(0.5, 1.5, generator=generator)
            else:
                bound = (3.0 / max(1, t[0].numel())) ** 0.5 if t.dim() > 1 and len(t) else 1.0
                t.uniform_(-bound, bound, generator=generator)
    twin.requires_grad_(False)


def relative_difference(a, b) -> float:
    """Relative L2 distance, the largest of a list's or a tuple's; infinite where the results are
    not comparable."""
    if type(a) is type(b) and type(a) in (list, tuple) and len(a) == len(b) > 0:
        differences = [relative_difference(*pair) for pair in zip(a, b)]
        largest = torch.tensor(differences, dtype=torch.float64, device="cpu").max()  # keeps NaN
        return float(largest)
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape:
        return float("inf")
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def seeded_run(module: nn.Module, x: Tensor, seed: int):
    """(result, the input afterwards); the random numbers of the module are the same at every
    call."""
    x = x.clone()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        # torch.manual_seed would seed other devices, whose states nothing brings back.
        torch.default_generator.manual_seed(seed)
        return module(x), x


def random_image(channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(1)
    shape = (2, channels, height, width)
    return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)


def agree(ours: nn.Module, theirs: nn.Module, x: Tensor, seed: int, when: str) -> None:
    """Raises Refused unless both give the same on ``x`` and leave it alone."""
    try:
        expected, x_after = seeded_run(theirs, x, seed)
    except Exception as error:  # whatever the module raises: it is not one of ours
        raise Refused(f"it does not run on an input of shape {tuple(x.shape)}: {error}") from None
    if not torch.equal(x_after, x):
        raise Refused("it changes its input in place")
    try:
        got, _ = seeded_run(ours, x, seed)
    except Exception as error:
        raise Refused(f"the fused module does not run: {error}") from None
    difference = relative_difference(got, expected)
    if not difference <= TOLERANCE:
        raise Refused(f"it computes something else: {when} it differs by {difference:.1e}")


def agree_in_buffers(ours: nn.Module, theirs: nn.Module) -> None:
    """Raises Refused unless both have the same buffers."""
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers()):
        if a.is_floating_point():
            same = relative_difference(a, b) <= TOLERANCE
        else:
            same = torch.equal(a, b)
        if not same:
            raise Refused(f"it updates {name} differently")
