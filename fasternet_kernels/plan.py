"""Writes a network's plan to a file that runs without torch.

What an accelerated network calls in eval without gradients, one op over packed weights, needs
neither its modules nor PyTorch: :func:`export_plan` writes the steps and the packs to one file.
``fasternet_runtime.load`` runs it on NumPy arrays, ``fasternet::Plan`` in C++. The format stands in
csrc/fasternet_cpu.h ("Plan files").
"""

from __future__ import annotations

import copy
import os
import struct
import uuid
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .accelerate import accelerate, report
from .networks import NetworkPlan, network_of
from .reference import BLOCK, EMIT, HEAD, PATCH_CONV, has_fast_tier

_MAGIC, _MARK, _VERSION, _SEQUENCE, _FAST = b"FNETPLAN", 0x01020304, 1, 1, 1
_HEADER = struct.Struct("=8sIIQIIIIII40xI")  # and the checksum
_STEP, _OUTPUT = struct.Struct("=IIIIqqqQQQ"), struct.Struct("=IIqqq")
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_LINE = 64


def export_plan(model: nn.Module, path: str | os.PathLike[str], *, fast: bool = False) -> None:
    """Writes ``model``, as it is now, to a file for ``fasternet_runtime.load``.

    The file holds the layers with batch norms folded and weights packed, for images (B, C, H, W)
    of any size. It appears at once and whole, or not at all.

    Args:
        model: a FasterNet in eval mode, accelerated or not, with logits or feature maps as outputs;
            float32, float64 or bfloat16. It is not changed: a copy is accelerated.
        path: of the file, which is replaced if it exists.
        fast: allow the fast tier, whatever ``model`` was accelerated with: Winograd's convolution
            where it pays, in float32. A network's error against float64 stays below 2e-5
            (relative, L2); an infinity or NaN may reach other pixels nearby. The file also holds
            the weights for it, and libraries that know no fast tier in files refuse it.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or of another dtype.
        ValueError: ``model`` is in training mode, or not a network that runs as one op; the message
            says why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}, expected a torch.nn.Module")
    training = [name or "(model)" for name, m in model.named_modules() if m.training]
    if training:
        raise ValueError(
            f"model is in training mode ({training[0]}), expected eval mode: call model.eval()"
        )
    plan = _plan_of(model, fast)
    if plan.dtype not in _DTYPES:
        raise TypeError(f"model is of {plan.dtype}, expected float32, float64 or bfloat16")
    _write(path, _pieces(plan, fast))


def _plan_of(model: nn.Module, fast: bool) -> NetworkPlan:
    twin = copy.deepcopy(model).to("cpu")
    if any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules()):
        raise ValueError("model has forward hooks, which a plan cannot call: remove them")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        network = network_of(accelerate(twin, fast=fast))
        plan = None if network is None else network.plan()
    if plan is None:
        refused = [f"{row.path or '(model)'}: {row.reason}" for row in report(twin).refused]
        why = "; ".join(refused) or (
            "it is no chain of stem, blocks and merging layers that ends in logits or feature maps"
        )
        raise ValueError(f"model ({type(model).__name__}) does not run as one op: {why}")
    return plan


def _rows(steps: list[int]) -> Iterable[tuple[int, int, int, int, int]]:
    return zip(*[iter(steps)] * 5)


def _outputs(plan: NetworkPlan) -> list[bytes]:
    """What each output is, by the steps that lead to it."""
    outputs = []
    channels, rows, columns = plan.channels, 1, 1
    for kind, a, b, c, _ in _rows(plan.steps):
        if kind == PATCH_CONV:
            channels, rows, columns = a, rows * b, columns * c
        elif kind == HEAD:
            outputs.append(_OUTPUT.pack(1, 0, b, 0, 0))
        elif kind == EMIT:
            outputs.append(_OUTPUT.pack(0, 0, channels, rows, columns))
    return outputs


def _pieces(plan: NetworkPlan, fast: bool) -> list:
    """The file's contents, in order."""
    from . import __version__

    writer = f"fasternet_kernels {__version__}".encode()
    outputs = _outputs(plan)
    n_steps = len(plan.steps) // 5
    tables = _HEADER.size + 4 + n_steps * _STEP.size + len(outputs) * _OUTPUT.size + len(writer)
    offset = tables + -tables % _LINE
    steps, weights = [], []
    packs: Iterable[Tensor] = iter(plan.packs)
    for kind, a, b, c, act in _rows(plan.steps):
        if kind == EMIT:
            steps.append(_STEP.pack(kind, act, 0, 0, a, b, c, 0, 0, 0))
            continue
        data = memoryview(next(packs).detach().contiguous().numpy()).cast("B")
        allowed = _FAST if fast and kind == BLOCK and has_fast_tier(a, plan.dtype) else 0
        steps.append(_STEP.pack(kind, act, allowed, 0, a, b, c, offset, len(data), 0))
        weights.append(data)  # packs are whole cache lines
        offset += len(data)
    flags = 0 if plan.collect is None else _SEQUENCE
    counts = (plan.channels, n_steps, len(outputs), len(writer))
    header = _HEADER.pack(_MAGIC, _MARK, _VERSION, offset, _DTYPES[plan.dtype], flags, *counts, 0)
    body = [*steps, *outputs, writer, bytes(-tables % _LINE), *weights]
    checksum = zlib.crc32(header)
    for piece in body:
        checksum = zlib.crc32(piece, checksum)
    return [header, struct.pack("=I", checksum), *body]


def _write(path: str | os.PathLike[str], pieces: list) -> None:
    path = os.fsdecode(path)
    draft = f"{path}.{uuid.uuid4().hex}.tmp"
    file = open(draft, "xb")  # noqa: SIM115
    try:
        with file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
