"""Whether two modules compute the same, shown on a float64 copy with random parameters."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .swapped import Refused

TOLERANCE = 1e-10  # relative, in float64: what differs by more computes something else


def randomised_copy(module: nn.Module) -> nn.Module:
    """A float64 CPU copy without hooks whose parameters and statistics are random, so that none is
    zero or one by chance."""
    if any(t.is_meta for t in module.state_dict(keep_vars=True).values()):
        raise Refused("its parameters are on the meta device")
    groups = [getattr(m, "process_group", None) for m in module.modules()]
    try:
        twin = copy.deepcopy(module, {id(group): group for group in groups if group is not None})
    except Exception as error:  # whatever the user put there: locks, files, tensors with history
        raise Refused(f"it cannot be copied: {error}") from None
    if not {id(m) for m in twin.modules()}.isdisjoint(id(m) for m in module.modules()):
        raise Refused("it cannot be copied: a module's copy is the module itself")
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


def discard(twin: nn.Module) -> None:
    """Frees what a copy holds. Swapped modules refer to themselves, as the official code's do, so
    the memory would wait for the garbage collector, which does not know what tensors weigh."""
    for m in list(twin.modules()):
        vars(m).clear()


def relative_difference(a, b) -> float:
    """Relative L2 distance, the largest of a list's or a tuple's; infinite where the results are
    not comparable."""
    if type(a) is type(b) and type(a) in (list, tuple) and len(a) == len(b) > 0:
        differences = [relative_difference(*pair) for pair in zip(a, b)]
        return float(torch.tensor(differences, dtype=torch.float64).max())  # keeps NaN
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape:
        return float("inf")
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def seeded_run(module: nn.Module, x: Tensor, seed: int):
    """(result, the input afterwards); the random numbers of the module are the same at every
    call."""
    x = x.clone()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(seed)
        return module(x), x


def random_image(channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, height, width, dtype=torch.float64, generator=generator)


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
