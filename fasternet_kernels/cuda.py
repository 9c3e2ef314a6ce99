"""The kernels of csrc/cuda, for the cases in which the tuning table says that they are the faster.

`make cuda` compiles them to ``_cuda.so`` with nvcc. Without that file, without a GPU that it has
code for (compute capability 8.x and 9.0), or for arguments that a kernel does not take, the Triton
kernels do the work; nothing warns, because nothing is lost but a little time.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib

import torch
from torch import Tensor

_PATH = pathlib.Path(__file__).with_name("_cuda.so")
_NOT_SUPPORTED = 801  # cudaErrorNotSupported


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none."""
    if not torch.cuda.is_available():
        return "torch has no CUDA device"
    try:
        library = ctypes.CDLL(str(_PATH))
    except OSError as error:
        return f"{error}; `make cuda` builds it"
    number, address = ctypes.c_int64, ctypes.c_void_p
    library.fasternet_cuda_pconv3x3_inplace.argtypes = [
        *(address, address, ctypes.c_int),
        *(number, number, number, number),
        *(ctypes.POINTER(number), address),
    ]
    library.fasternet_cuda_error.restype = ctypes.c_char_p
    return library


def unavailable(device: torch.device | None = None) -> str:
    """Why the kernels cannot run on a CUDA device, by default the current one; "" if they can."""
    library = _library()
    if isinstance(library, str):
        return library
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 8 and capability != (9, 0):
        return f"compiled for compute capability 8.x and 9.0, this is {capability}"
    return ""


def pconv3x3_(x: Tensor, weight: Tensor) -> bool:
    """The in-place partial convolution in one launch.

    Args:
        x: (B, C, H, W) on a CUDA device, float16 or bfloat16, adjacent channels (channels_last, or
            a slice of its channels).
        weight: (C_partial, C_partial, 3, 3) of x's dtype and device.

    Returns:
        Whether it has been launched, on the current stream. If not, nothing has happened: another
        kernel has to do it.

    Raises:
        RuntimeError: the launch failed.
    """
    if x.dtype not in (torch.float16, torch.bfloat16) or weight.dtype != x.dtype:
        return False
    if x.stride(1) != 1:
        return False
    if unavailable(x.device):
        return False
    weight = weight.contiguous()
    library = _library()
    with torch.cuda.device(x.device):
        error = library.fasternet_cuda_pconv3x3_inplace(
            x.data_ptr(),
            weight.data_ptr(),
            int(x.dtype == torch.bfloat16),
            *(x.shape[0], x.shape[2], x.shape[3], weight.shape[0]),
            (ctypes.c_int64 * 3)(x.stride(0), x.stride(2), x.stride(3)),
            torch.cuda.current_stream().cuda_stream,
        )
    if error and error != _NOT_SUPPORTED:
        raise RuntimeError(f"pconv3x3_: {library.fasternet_cuda_error(error).decode()}")
    return error == 0
