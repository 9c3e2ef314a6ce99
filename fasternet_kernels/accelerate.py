"""Makes the FasterNet parts of a live model run fused, and makes them what they were.

What is looked for is structure (parts.py, networks.py). What is found must then prove itself: a
copy with random parameters in float64 has to give the same answers fused and unfused, in eval and
in training mode, and leave its input alone. Only then does the module change its class (swapped.py)
and nothing else: it stays the same object with the same parameters under the same keys.
"""

from __future__ import annotations

import dataclasses
import threading

from torch import nn

from .modules import FusedBlock, PackingModule, PConv
from .networks import NETWORK, SwappedNetwork, match_network
from .parts import match_block, match_patch_conv, match_pconv, prove
from .swapped import RECORD, Refused, Swapped, swap, unswap


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


def _swap_innermost(
    module: nn.Module, path: tuple[str, ...], match, kind: str, rows: list[Row]
) -> bool:
    """Swaps the innermost matches in ``module``, itself or below. Returns whether it found any."""
    if isinstance(module, (Swapped, PackingModule, PConv)):
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
        prove(module, matched)
        swap(module, matched.mixin, matched.paths, matched.act)
    except Refused as refused:
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
    _swap_innermost(model, (), match_block, "block", rows)
    _swap_innermost(model, (), match_pconv, "pconv", rows)
    if any(isinstance(m, FusedBlock) for m in model.modules()):
        _swap_innermost(model, (), match_patch_conv, "patch_conv", rows)
    try:
        network = match_network(model)
        if network is not None:
            model.__dict__[NETWORK] = network
            swap(model, SwappedNetwork, {})
            rows.append(Row("", "network", True, network.training_refused))
    except Refused as refused:
        rows.append(Row("", "network", False, str(refused)))
    for module in model.modules():
        if isinstance(module, Swapped):
            module.__dict__[RECORD].lean = lean
            module.__dict__[RECORD].fast = fast
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
        if isinstance(module, Swapped):
            unswap(module)
    model.__dict__.pop(NETWORK, None)
    model.__dict__.pop(_REPORT, None)
    return model


def report(model: nn.Module) -> Report:
    """What :func:`accelerate` swapped in ``model`` and what it refused, with the reasons; empty if
    it was never called."""
    return model.__dict__.get(_REPORT, Report(()))


_REPORT = "_fasternet_kernels_report"
