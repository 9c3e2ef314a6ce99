"""Refuses to run without the compiled kernels, fills uninitialised memory with NaN, and frees what
tests leave behind."""

import ctypes
import gc
import os
import sys

# Before torch is imported: waiting threads sleep, so a busy machine does not stall tiny calls.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's, which spin

import pytest
import torch

if not torch.cuda.is_available():
    # Before triton is imported: the tests of its kernels interpret them, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fasternet_kernels as fk

MOST_MEMORY = 1 << 30  # bytes a process may gain before what nobody refers to is freed

COMPILED = (
    "pconv3x3",
    "pconv3x3_",
    "pack",
    "pconv_pw",
    "pconv_pw_packed",
    "block",
    "block_packed",
    "patch_conv",
    "patch_conv_packed",
    "head",
    "head_packed",
    "network",
    "pw_stats",
    "pw_stats_backward",
    "patch_stats",
    "patch_stats_backward",
    "bn_act",
    "bn_act_backward",
    "act_pw_residual",
    "act_pw_residual_backward",
    "batch_norm_layer",
    "batch_norm_layer_backward",
)


def pytest_sessionstart(session):
    # Without the compiled library the ops run their reference, and every parity test would compare
    # it with itself.
    status = fk.library.status()
    missing = [name for name in COMPILED if not fk.library.has_kernel(name)]
    if not status.loaded or missing:
        pytest.exit(
            f"no compiled kernels, nothing to test: {status.reason or missing}", returncode=3
        )


def pytest_report_header():
    status = fk.library.status()
    isas = ", ".join(status.available_isas)
    return f"kernels: {status.isa} of {isas}; {status.compiler}; torch {torch.__version__}"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so an element that a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


_after_freeing = 0


@pytest.fixture(autouse=True)
def freed_memory():
    """Models that refer to themselves wait for the garbage collector, which does not know what
    tensors weigh: in two processes of thousands of tests they would fill a machine."""
    yield
    global _after_freeing
    if sys.platform == "linux" and resident_bytes() > _after_freeing + MOST_MEMORY:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        _after_freeing = resident_bytes()


@pytest.fixture
def large_tiles(monkeypatch):
    """Tiles as no GPU could have them, where the shipped ones make Triton's interpreter slow."""
    from fasternet_kernels.triton import common

    table = common._nearest

    def nearest(op, shape, *args):
        found = table(op, shape, *args)
        if op in ("pconv", "gemm", "patch_conv") and shape[0] >= 64:
            found = found | {"BLOCK_N": 512, "BLOCK_K": 128}
        return found

    monkeypatch.setattr(common, "_nearest", nearest)


@pytest.fixture
def threads():
    """Sets torch's number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
