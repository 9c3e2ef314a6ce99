"""How fast the kernels can be on an H100, reckoned from what they have to do; nothing is measured.

    python -m bench roofline                    all networks, bfloat16, batch 256
    python -m bench roofline --only t0,l --batch 1,256

For each kernel that an op launches at a stage, the least time by each of four bounds:

    memory       bytes through HBM: every image that the launch reads or writes, once; in place, the
                 convolved channels and the scratch
    L2           bytes of weights, which the programs of each tile of pixels read anew, and of
                 images that several tiles of outputs read
    arithmetic   the activation's instructions on the FP32 and the special-function units, counted
                 in its machine code
    matrix       FLOPs on the tensor cores

The largest is the bound that the kernel runs into. Registers, shared memory and spills are the
compiler's, from the binary. The table goes to bench/results/gpu/roofline-h100.csv.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench import offline, results
from bench.calls import Call
from fasternet_kernels.triton import common

__all__ = ["COMPUTED", "H100", "OPS", "PATH", "Row", "rows", "text", "write"]

OPS = (
    "block",
    "pconv_pw",
    "pconv3x3",
    "pconv3x3_",
    "patch_conv",
    "pw_stats",
    "patch_stats",
    "act_pw_residual",
)
PATH = results.RESULTS / "gpu" / "roofline-h100.csv"  # beside the measurements, not among them
COMPUTED = "computed, not measured"
CAPABILITY = (9, 0)


@dataclasses.dataclass(frozen=True)
class Device:
    """Rates of a GPU, per second: bytes, FLOPs, instructions of one thread."""

    memory: float
    l2: float
    matrix: dict[str, float]
    alu: float
    special: float


# The H100 SXM by NVIDIA's data sheet, dense rates; 132 multiprocessors at 1.755 GHz with 128 FP32
# lanes and 16 for special functions. Of L2 NVIDIA gives no rate: 64 bytes a clock for each
# multiprocessor, which is what one takes in.
_CLOCKS = 132 * 1.755e9
H100 = Device(
    memory=3.35e12,
    l2=64 * _CLOCKS,
    matrix={"bf16": 989e12, "fp16": 989e12, "fp32": 494e12},
    alu=128 * _CLOCKS,
    special=16 * _CLOCKS,
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One launch of one call; columns of the CSV. Times in microseconds."""

    op: str
    network: str
    stage: int
    channels: int
    side: int
    batch: int
    dtype: str
    act: str
    kernel: str
    programs: int
    warps: int
    registers: int
    spilled_bytes: int
    shared_kb: float
    mbyte: float
    l2_mbyte: float
    gflop: float
    memory_us: float
    l2_us: float
    arithmetic_us: float
    matrix_us: float
    bound: str
    least_us: float
    basis: str = COMPUTED


# ---- What a launch has to do ---------------------------------------------------------------------


def _of(a: dict, *names: str) -> int:
    """The first of the names among a launch's arguments; kernel files differ in them."""
    return next(a[name] for name in names if name in a)


def _is_image(name: str, t: object) -> bool:
    smallest_side = 7  # weights have 1 or 3 there
    of_images = isinstance(t, Tensor) and t.dim() == 4 and t.shape[2] >= smallest_side
    return of_images or name == "scratch"


def _pixels(a: dict) -> int:
    image = next(t for name, t in a.items() if name != "scratch" and _is_image(name, t))
    return image.shape[0] * image.shape[2] * image.shape[3]


# Multiply-adds of each kernel by its arguments.
_MACS = {
    "pconv_kernel": lambda a: _pixels(a) * 9 * a["CP"] ** 2,
    "in_place_kernel": lambda a: _pixels(a) * 9 * a["CP"] ** 2,
    "pconv_pw_kernel": lambda a: a["M"] * (9 * a["CP"] ** 2 + a["C"] * a["CH"]),
    "block_kernel": lambda a: a["M"] * (9 * a["CP"] ** 2 + 2 * a["C"] * a["CH"]),
    "gemm_kernel": lambda a: a["M"] * a["N"] * a["K"],
    "patch_kernel": lambda a: a["M"] * a["N"] * a["C"] * a["KH"] * a["KW"],
    "patch_stats_kernel": lambda a: a["M"] * a["N"] * a["C"] * a["KH"] * a["KW"],
    "pw_stats_kernel": lambda a: (
        a["rows"] * (a["FUSED"] * 9 * a["C_PARTIAL"] ** 2 + a["C"] * a["C_OUT"])
    ),
    "act_pw_residual_kernel": lambda a: a["rows"] * a["C"] * a["C_HIDDEN"],
}
_WRITTEN = ("y", "u", "a", "y_ptr", "z_ptr")


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _memory_bytes(launch) -> int:
    """Bytes of the images, each once, whatever is masked away."""
    a = launch.args
    images = {name: t for name, t in a.items() if _is_image(name, t)}
    if "scratch" not in images:
        return sum(map(_bytes, images.values()))
    scratch = _bytes(images["scratch"])
    if launch.kernel.__name__ == "copy_borders":
        return 2 * scratch
    return scratch + 2 * _pixels(a) * a["CP"] * images["x"].element_size()


def _programs(launch) -> int:
    return math.prod(launch.grid)


def _output_tiles(a: dict) -> int:
    """Tiles of output channels, each of which reads its pixels anew."""
    if "BLOCK_N" not in a:
        return 1
    if "C_HIDDEN" in a:
        return -(-a["C"] // a["BLOCK_N"])
    return -(-_of(a, "N", "C_OUT", "CP", "C") // a["BLOCK_N"])


def _l2_bytes(launch) -> int:
    a = launch.args
    weights = sum(
        _bytes(t) for name, t in a.items() if isinstance(t, Tensor) and not _is_image(name, t)
    )
    read = sum(_bytes(t) for name, t in a.items() if _is_image(name, t) and name not in _WRITTEN)
    tiles = _programs(launch)
    if "BLOCK_M" in a and ("M" in a or "rows" in a):
        tiles = -(-_of(a, "M", "rows") // a["BLOCK_M"])
    return tiles * weights + (_output_tiles(a) - 1) * read


def _activations(a: dict) -> int:
    """Elements that the activation is applied to, again for every tile of outputs where it stands
    before the product."""
    if a.get("ACT", "identity") == "identity":
        return 0
    again = _output_tiles(a) if "C_HIDDEN" in a else 1
    return again * _of(a, "M", "rows") * _of(a, "CH", "C_HIDDEN", "N")


@triton.jit
def _elementwise(x, ACT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, common.activation(tl.load(x + i), ACT))


@functools.cache
def activation_cost(act: str) -> tuple[float, float]:
    """(instructions, special-function instructions) of one element on sm_90: those of a kernel that
    does nothing else, without those of one that copies."""
    elements, threads = 1024, 128

    def counts(name: str) -> tuple[int, int]:
        with common.record() as launches:
            x = torch.empty(elements, device="meta")
            constants = {"ACT": name, "BLOCK": elements}
            common.launch(_elementwise, (1,), x=x, **constants, num_warps=4, num_stages=1)
        call = Call("block", "t0", 1, 1, "fp32")
        kernel = offline.Kernel(offline.GPUS[CAPABILITY], launches[0], (call,))
        binary = offline.compile_kernel(kernel)
        if binary.error:
            raise RuntimeError(binary.error)
        special = binary.count("MUFU")
        others = binary.count("(LD|ST|EXIT|BRA|NOP|S2|BAR|ULDC)")
        return sum(binary.opcodes.values()) - special - others, special

    (alu, special), (alu_0, special_0) = counts(act), counts("identity")
    per_thread = elements / threads
    return (alu - alu_0) / per_thread, (special - special_0) / per_thread


# ---- The table -----------------------------------------------------------------------------------


def rows(calls: Iterable[Call], device: Device = H100, workers: int | None = None) -> list[Row]:
    """One row for each launch of each call, in order.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    gpu = offline.GPUS[CAPABILITY]
    launches = [(call, launch) for call in calls for launch in offline.record(call, gpu)]
    keys = [offline.key(launch, CAPABILITY) for _, launch in launches]
    todo = {
        key: offline.Kernel(gpu, launch, (call,)) for key, (call, launch) in zip(keys, launches)
    }
    numbered = dict(zip(todo, offline.binaries(list(todo.values()), workers, ordered=True)))
    found = []
    for key, (call, launch) in zip(keys, launches):
        if numbered[key].error:
            raise RuntimeError(f"{numbered[key].title}: {numbered[key].error}")
        found.append(_row(call, launch, numbered[key], device))
    return found


def _row(call: Call, launch, binary: offline.Binary, device: Device) -> Row:
    a, name = launch.args, launch.kernel.__name__
    flops = 2 * _MACS[name](a) if name in _MACS else 0
    memory, l2 = _memory_bytes(launch), _l2_bytes(launch)
    elements = _activations(a)
    alu, special = activation_cost(a["ACT"]) if elements else (0.0, 0.0)
    seconds = {
        "memory": memory / device.memory,
        "L2": l2 / device.l2,
        "arithmetic": elements * max(alu / device.alu, special / device.special),
        "matrix": flops / device.matrix[call.dtype],
    }
    bound = max(seconds, key=seconds.get)
    memory_us, l2_us, arithmetic_us, matrix_us = (1e6 * s for s in seconds.values())
    return Row(
        op=call.op,
        network=call.network,
        stage=call.stage,
        channels=call.channels,
        side=call.shape[2],
        batch=call.batch,
        dtype=call.dtype,
        act=call.act,
        kernel=name,
        programs=_programs(launch),
        warps=launch.num_warps,
        registers=binary.registers,
        spilled_bytes=binary.stack + binary.local,
        shared_kb=binary.shared / 1024,
        mbyte=memory / 1e6,
        l2_mbyte=l2 / 1e6,
        gflop=flops / 1e9,
        memory_us=memory_us,
        l2_us=l2_us,
        arithmetic_us=arithmetic_us,
        matrix_us=matrix_us,
        bound=bound,
        least_us=1e6 * seconds[bound],
    )


def write(path: Path, found: Sequence[Row]) -> None:
    """The rows as a CSV, in place of what was there: they follow from the sources alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in dataclasses.fields(Row)])
        writer.writerows([results._to_text(v) for v in dataclasses.astuple(row)] for row in found)


def text(found: Sequence[Row]) -> str:
    """The rows as a table for reading."""
    lines = [
        f"Least times on an H100 SXM, {COMPUTED}: us by memory, L2, arithmetic, matrix units",
        f"{'call':30s} {'kernel':22s} regs {'KB':>6s} {'memory':>8s} {'L2':>8s} "
        f"{'arith.':>8s} {'matrix':>8s}  bound",
    ]
    for r in found:
        name = f"{r.op}_{r.network}_stage{r.stage} x{r.batch} {r.dtype}"
        spills = " SPILLS" if r.spilled_bytes else ""
        lines.append(
            f"{name:30s} {r.kernel:22s} {r.registers:4d} {r.shared_kb:6.1f} {r.memory_us:8.1f} "
            f"{r.l2_us:8.1f} {r.arithmetic_us:8.1f} {r.matrix_us:8.1f}  {r.bound}{spills}"
        )
    return "\n".join(lines)
