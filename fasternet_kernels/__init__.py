"""Fused kernels for FasterNet (arXiv 2303.03667): partial convolution with what follows it, for
inference and training."""

from . import library, ops

library.load()

from . import models  # noqa: E402
from .accelerate import Report, accelerate, report, restore  # noqa: E402
from .modules import FasterNetBlock, PConv, PConvPW, repack  # noqa: E402
from .ops import fasternet_block, pconv3x3, pconv3x3_, pconv_pw  # noqa: E402
from .plan import export_plan  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "FasterNetBlock",
    "PConv",
    "PConvPW",
    "Report",
    "accelerate",
    "export_plan",
    "fasternet_block",
    "library",
    "models",
    "ops",
    "pconv3x3",
    "pconv3x3_",
    "pconv_pw",
    "repack",
    "report",
    "restore",
]
