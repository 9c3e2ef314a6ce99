"""Fused kernels for FasterNet (arXiv 2303.03667): partial convolution with what follows it, for inference and training."""

from . import library, ops

library.load()

from .ops import fasternet_block, pconv3x3, pconv3x3_, pconv_pw  # noqa: E402

__version__ = "0.1.0"
