"""Imports timm where torchvision's compiled operators do not fit the installed torch.

timm imports torchvision, whose Python code registers fake kernels for operators that its own
library defines. On machines with a CPU build of torch that library does not load, and the
registration of a fake for an unknown operator raises. The tests need nothing of torchvision, so
those registrations are skipped while timm is imported.
"""

import functools
import importlib
import types

import torch


@functools.cache
def import_timm() -> types.ModuleType:
    """The module timm, imported without torchvision's operators; for tests only."""
    register_fake = torch.library.register_fake

    def register_known_fake(op, *args, **kwargs):
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    torch.library.register_fake = register_known_fake
    try:
        return importlib.import_module("timm")
    finally:
        torch.library.register_fake = register_fake
