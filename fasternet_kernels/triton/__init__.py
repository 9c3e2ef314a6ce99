"""Triton kernels behind the ops on CUDA devices, one file per kernel family.

:func:`register` puts them under the CUDA dispatch key of the ops of :mod:`fasternet_kernels.ops`,
whose schemas, fakes and autograd formulas serve every device. Importing this package needs no
triton: a family's file is imported when one of its ops is first called.

``KERNELS`` maps an op's name to a function with exactly the op's arguments. It takes CUDA tensors;
CPU tensors where ``TRITON_INTERPRET=1`` was set before triton was imported; meta tensors inside
:func:`fasternet_kernels.triton.common.record`.

What the kernels do not serve runs in :mod:`fasternet_kernels.reference` on the GPU: float64, and
devices before compute capability 8.0.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops, reference

# The ops of each file beside this one, whose KERNELS has these keys.
FAMILIES = {
    "pconv": ("pconv3x3", "pconv3x3_"),
    "block": ("pconv_pw", "block"),
    "patch": ("patch_conv", "head"),
    "packed": (
        "pack",
        "pconv_pw_packed",
        "block_packed",
        "patch_conv_packed",
        "head_packed",
        "network",
    ),
    "training": ("pw_stats", "patch_stats", "bn_act", "act_pw_residual"),
    "backward": (
        "pconv3x3_backward",
        "pconv_pw_backward",
        "block_backward",
        "patch_conv_backward",
        "pw_stats_backward",
        "patch_stats_backward",
        "bn_act_backward",
        "bn_act_recompute_backward",
        "act_pw_residual_backward",
        "act_pw_residual_recompute_backward",
    ),
}

_library: torch.library.Library | None = None


def __getattr__(name: str):
    if name != "KERNELS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kernels = {op: kernel(op) for names in FAMILIES.values() for op in names}
    globals()["KERNELS"] = kernels
    return kernels


@functools.cache
def kernel(op: str) -> Callable:
    """The function behind the op, from its family's file."""
    family = next(name for name, names in FAMILIES.items() if op in names)
    return importlib.import_module(f".{family}", __name__).KERNELS[op]


@functools.cache
def _old(index: int | None) -> bool:
    capability = torch.cuda.get_device_capability(index)
    if capability >= (8, 0):
        return False
    warnings.warn(
        "fasternet_kernels runs its slow PyTorch reference on this GPU: it has compute capability "
        f"{capability[0]}.{capability[1]}, the Triton kernels need 8.0",
        RuntimeWarning,
        stacklevel=4,
    )
    return True


def serves(*tensors: Tensor) -> bool:
    """Whether calls with these tensors run in the Triton kernels, not in the reference."""
    return _library is not None and all(
        t.is_cuda and t.dtype != torch.float64 and not _old(t.device.index) for t in tensors
    )


def _tensors(args) -> list[Tensor]:
    flat = (t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)))
    return [t for t in flat if isinstance(t, Tensor)]


def _dispatch(op: str) -> Callable:
    """The op's implementation for CUDA: Triton kernel or reference, both below autocast, which has
    already cast what it casts."""
    plain = getattr(reference, op)

    def run(*args, **kwargs):
        if torch.is_autocast_enabled("cuda"):
            with torch.autocast("cuda", enabled=False):
                return run(*args, **kwargs)
        tensors = _tensors(args)
        if serves(*tensors):
            return kernel(op)(*args, **kwargs)
        doubles = [t.dtype == torch.float64 for t in tensors]
        if op in FAMILIES["packed"] and any(doubles) and not all(doubles):
            # The reference would read a pack of the kernels as one of its own.
            raise TypeError(f"{op} got float64 and other dtypes, expected one dtype")
        return plain(*args, **kwargs)

    return run


def register() -> None:
    """Registers the kernels for CUDA where torch has it; warns if there is a GPU but no triton.
    Later calls do nothing."""
    global _library
    if _library is not None or torch.version.cuda is None:
        return
    if importlib.util.find_spec("triton") is None:
        if torch.cuda.is_available():
            warnings.warn(
                "fasternet_kernels runs its slow PyTorch reference on CUDA: triton is not "
                "installed; install it with pip install triton",
                RuntimeWarning,
                stacklevel=3,
            )
        return
    _library = torch.library.Library(ops.NAMESPACE, "IMPL")
    for names in FAMILIES.values():
        for op in names:
            _library.impl(op, _dispatch(op), "CUDA")
