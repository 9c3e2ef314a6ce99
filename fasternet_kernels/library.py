"""Loads the compiled CPU kernels, and says clearly when they are absent.

``import fasternet_kernels`` never fails for want of the compiled library: it warns once with the
reason and the ops run their plain PyTorch reference. The one exception is a wrong
``FASTERNET_KERNELS_ISA``, which is the user's explicit request.
"""

from __future__ import annotations

import ctypes
import dataclasses
import pathlib
import warnings

import torch

_PATH = pathlib.Path(__file__).with_name("_C.so")


@dataclasses.dataclass(frozen=True)
class Status:
    """State of the compiled library.

    loaded: whether its kernels are registered with torch. path: the file, if it exists. reason: why
        it is not loaded.
    isa: the instruction set in use. available_isas: those this machine could use, slowest first.
        compiler: what built it.
    """

    loaded: bool
    path: str | None = None
    reason: str | None = None
    isa: str | None = None
    available_isas: tuple[str, ...] = ()
    compiler: str | None = None


_status: Status | None = None


def status() -> Status:
    """What became of the compiled library."""
    return load()


def load() -> Status:
    """Loads the compiled library beside this file and registers its kernels; warns if it cannot.
    Later calls do nothing.

    Raises:
        RuntimeError: ``FASTERNET_KERNELS_ISA`` names an instruction set that is unknown or that
            this machine lacks.
    """
    global _status
    if _status is not None:
        return _status
    _status = _load()
    if not _status.loaded:
        warnings.warn(
            f"fasternet_kernels runs its slow PyTorch reference on CPU: {_status.reason}",
            RuntimeWarning,
            stacklevel=3,
        )
    return _status


def _load() -> Status:
    path = str(_PATH)
    if not _PATH.exists():
        return Status(
            loaded=False,
            reason=f"the compiled library {path} does not exist; build it with pip install .",
        )
    try:
        torch.ops.load_library(path)
        build = ctypes.CDLL(path).fasternet_kernels_build
    except (OSError, AttributeError) as error:
        return Status(
            loaded=False, path=path, reason=f"the compiled library {path} cannot be loaded: {error}"
        )
    build.restype = ctypes.c_char_p
    text = build().decode()
    if text.startswith("!"):
        raise RuntimeError(text[1:])
    isa, available, compiler = text.split(";")
    return Status(
        loaded=True,
        path=path,
        isa=isa,
        available_isas=tuple(available.split(",")),
        compiler=compiler,
    )


def has_kernel(name: str, device: str = "cpu") -> bool:
    """Whether op ``name`` has a kernel of its own for the device type ``device``."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"fasternet_kernels::{name}", key
    )
