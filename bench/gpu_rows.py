"""Rows of `make gpu`: columns, provenance, and a session that fills them."""

from __future__ import annotations

import dataclasses
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import results
from bench.gpu_timing import Device, Prepared

__all__ = ["Contender", "GpuRow", "Session", "Work", "provenance"]

# Relative L2 error of an answer that still counts as the same computation; bench.session's for the
# other dtypes. TF32 has 10 bits of mantissa, float16 too.
GATE = {"fp32": 5e-3, "fp16": 1e-2, "bf16": 5e-2}
CHECKED_IMAGES = 2  # of the batch, against float64


@dataclasses.dataclass(frozen=True)
class GpuRow:
    """One provider on one workload; columns of the CSV in this order. Shares are of what the
    section `peaks` measured on this GPU; bytes and FLOPs are the least that the work needs."""

    run: str
    date: str
    commit: str
    dirty: bool
    device: str
    capability: str
    driver: str
    cuda: str
    cudnn: str
    torch: str
    triton: str
    fasternet_kernels: str
    python: str
    kind: str  # peak, operator, chain, network, training
    workload: str
    channels: int
    height: int
    width: int
    batch: int
    dtype: str
    provider: str
    status: str  # "ok", or why there are no times
    error_rel_l2: float | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    images_per_s: float | None = None
    gflop: float | None = None
    tflop_per_s: float | None = None
    matrix_share: float | None = None
    mbyte: float | None = None
    gb_per_s: float | None = None
    copy_share: float | None = None
    peak_mib: float | None = None  # that torch allocated to prepare and to call it once
    rounds: int | None = None
    calls: int | None = None
    round_medians_ms: tuple[float, ...] = ()
    kernels: str = ""  # what a profiler saw, where it was asked

    @property
    def key(self) -> tuple:
        return self.kind, self.workload, self.batch, self.dtype, self.provider


def provenance(device: Device) -> dict[str, object]:
    """The columns that say by what and on what."""
    common = results.provenance()
    names = ("date", "commit", "dirty", "torch", "fasternet_kernels", "python")
    columns = {name: common[name] for name in names}
    columns["triton"] = results._version("triton")
    if device.dry:
        return columns | {
            "device": "dry run",
            "capability": "",
            "driver": "",
            "cuda": "",
            "cudnn": "",
        }
    properties = torch.cuda.get_device_properties(0)
    return columns | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version()),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.split()[0]


@dataclasses.dataclass(frozen=True)
class Work:
    """What the providers of one session compute. gflop and mbyte: of one call."""

    kind: str
    name: str
    shape: tuple[int, int, int, int]
    dtype: str
    gflop: float = 0.0
    mbyte: float = 0.0


@dataclasses.dataclass(frozen=True)
class Contender:
    """One provider of a session.

    Attributes:
        prepare: builds what is timed.
        answer: what to compare, of the first CHECKED_IMAGES images; None: nothing to compare.
        exact: the same in float64.
        gflop, mbyte: instead of the work's, where this provider has other work to do.
        profile: whether to note the kernels' names.
    """

    prepare: Callable[[], Prepared]
    answer: Callable[[], Tensor] | None = None
    exact: Callable[[], Tensor] | None = None
    gflop: float | None = None
    mbyte: float | None = None
    profile: bool = False


class Session:
    """Measures works one after the other until its time is up; rows are written as they come."""

    def __init__(self, device: Device, path: Path, run: str, seconds: float):
        self.device, self.path, self.run = device, path, run
        self.end = time.monotonic() + seconds
        self.provenance = provenance(device)
        rows = results.read(path, GpuRow)
        self.rows = {row.key: row for row in rows if row.run == run}
        self.left_out: list[str] = []

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def peak(self, name: str) -> float:
        """A rate that the section `peaks` has measured: GB/s or TFLOP/s; 0 where it has not."""
        row = self.rows.get(("peak", name, 1, "" if name == "copy" else name, "torch"))
        if row is None:
            return 0.0
        return (row.gb_per_s if name == "copy" else row.tflop_per_s) or 0.0

    def measure(
        self, work: Work, contenders: Mapping[str, Contender], seconds: float = 1.0
    ) -> None:
        """Answers, then times in turns; what this run has already is left as it is.

        Args:
            seconds: a guess of what it takes; nothing is begun that could not end in time.
        """
        b = work.shape[0]
        todo = {
            name: contender
            for name, contender in contenders.items()
            if (work.kind, work.name, b, work.dtype, name) not in self.rows
        }
        if not todo:
            return
        if self.seconds_left < seconds:
            self.left_out.append(f"{work.name}, batch {b}, {work.dtype}")
            return
        made, status, errors, memory, kernels = {}, {}, {}, {}, {}
        for name, contender in todo.items():
            try:
                errors[name] = self._error(contender, work.dtype)
                before = 0
                if not self.device.dry:
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                made[name] = contender.prepare()
                made[name].call()
                self.device.synchronize()
                if not self.device.dry:
                    memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
                if contender.profile and (name == "ours" or not self.device.dry):
                    kernels[name] = self._kernels(made[name])
                status[name] = "ok"
            except Exception as error:  # whatever a provider dies of is its row's status
                made.pop(name, None)
                text = str(error).strip().splitlines() or [""]
                status[name] = f"{type(error).__name__}: {text[0]}"[:200]
        times = self.device.measure(made) if made else None
        for name, contender in todo.items():
            columns = {"error_rel_l2": errors.get(name), "peak_mib": memory.get(name)}
            columns["kernels"] = kernels.get(name, "")
            if times is not None and name in times:
                columns |= self._columns(work, contender, times[name])
            elif status[name] == "ok":
                status[name] = "dry run"
            self._write(work, name, status[name], columns)

    def _error(self, contender: Contender, dtype: str) -> float | None:
        if contender.answer is None:
            return None
        got, exact = contender.answer().double().cpu(), contender.exact().cpu()
        if got.shape != exact.shape:
            raise ValueError(f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
        error = float((got - exact).norm() / exact.norm())
        if not error <= GATE[dtype]:
            raise ValueError(f"relative error {error:.1e} against float64")
        return error

    def _kernels(self, prepared: Prepared) -> str:
        from torch.profiler import ProfilerActivity, profile

        activity = ProfilerActivity.CPU if self.device.dry else ProfilerActivity.CUDA
        with profile(activities=[activity]) as profiler:
            prepared.call()
            self.device.synchronize()
        names = [e.key for e in profiler.key_averages() if not e.key.startswith(("cuda", "Mem"))]
        return "; ".join(dict.fromkeys(name[:90] for name in names))[:400]

    def _columns(self, work: Work, contender: Contender, taken) -> dict[str, object]:
        seconds = taken.median
        gflop = work.gflop if contender.gflop is None else contender.gflop
        mbyte = work.mbyte if contender.mbyte is None else contender.mbyte
        matrix, copy = self.peak(work.dtype), self.peak("copy")
        columns: dict[str, object] = {
            "median_ms": seconds * 1e3,
            "p20_ms": taken.p20 * 1e3,
            "p80_ms": taken.p80 * 1e3,
            "images_per_s": work.shape[0] / seconds,
            "rounds": len(taken.rounds),
            "calls": len(taken.samples),
            "round_medians_ms": tuple(float(np.median(r)) * 1e3 for r in taken.rounds),
        }
        if gflop:
            rate = gflop / seconds / 1e3
            columns |= {"gflop": gflop, "tflop_per_s": rate}
            columns["matrix_share"] = rate / matrix if matrix else None
        if mbyte:
            rate = mbyte / seconds / 1e3
            columns |= {
                "mbyte": mbyte,
                "gb_per_s": rate,
                "copy_share": rate / copy if copy else None,
            }
        return columns

    def _write(self, work: Work, provider: str, status: str, columns: dict[str, object]) -> None:
        batch, channels, height, width = work.shape
        row = GpuRow(
            run=self.run,
            **self.provenance,
            kind=work.kind,
            workload=work.name,
            channels=channels,
            height=height,
            width=width,
            batch=batch,
            dtype=work.dtype,
            provider=provider,
            status=status,
            **columns,
        )
        self.rows[row.key] = row
        results.append(self.path, [row])
        took = "" if row.median_ms is None else f"{row.median_ms:9.4f} ms"
        print(f"{work.name} {batch}x{channels}x{height} {work.dtype} {provider}: {took} {status}")
