"""Measures one group of rows: the answers first, then the times, in turns.

Each provider lives in a process of its own, stopped (SIGSTOP) but while it is its turn, so that its
idle threads can take nothing from the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Pipe
from pathlib import Path

import numpy as np

from bench import results, stats, workloads
from bench.providers import PROVIDERS, Task, available
from bench.results import Row
from bench.workloads import Workload
from fasternet_kernels import timing

__all__ = [
    "TRIES",
    "OtherLoad",
    "Pool",
    "Process",
    "Spec",
    "WorkerError",
    "measure",
    "other_load",
    "parity",
]

CACHE = results.ROOT / "build" / "bench"
# Largest relative L2 error of an answer that still counts as the same network. float32 runtimes are
# around 1e-6, TF32 is around 1e-3; bfloat16 has 8 bits.
GATE = {"fp32": 1e-3, "bf16": 5e-2}
PREPARE_SECONDS = 900  # longer than any compilation
CALL_SECONDS = 300
TRIES = 3  # of a session during which others kept processors busy


class WorkerError(Exception):
    """Why a provider has no number."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long to measure. Where others use the machine too, many short rounds tell more than a few
    long ones: a ratio is of neighbours in time, and an interval narrows with the rounds.

    Attributes:
        burst_seconds: of one burst at least.
        pause_seconds: before each burst.
        session_seconds: that the bursts of one session should take; the number of rounds follows.
        rounds: at least and at most.
    """

    burst_seconds: float = 0.04
    pause_seconds: float = 0.02
    session_seconds: float = 36.0
    rounds: tuple[int, int] = (5, 60)


# Many providers side by side, each round of them long: fewer calls of each make room for rounds.
LAYERS = Settings(session_seconds=35.0, rounds=(5, 20))
BESIDE = Settings(session_seconds=20.0, rounds=(5, 30))
SHORT = Settings(session_seconds=6.0, rounds=(5, 30))
SETTINGS = {"network": Settings(), "chain": SHORT, "operator": SHORT, "layers": LAYERS}
QUICK = Settings(session_seconds=2.0, rounds=(2, 3))


@dataclasses.dataclass(frozen=True)
class Spec:
    """What one session compares: every provider in every dtype on every workload."""

    workloads: tuple[str, ...]
    providers: tuple[str, ...]
    batch: int
    threads: int
    mode: str = "latency"
    dtypes: tuple[str, ...] = ("fp32",)

    @property
    def title(self) -> str:
        streams = f"{self.threads} streams" if self.mode == "streams" else f"threads {self.threads}"
        return f"{' '.join(self.workloads)}, batch {self.batch}, {streams}"

    def settings(self, quick: bool) -> Settings:
        """How long to measure it."""
        if quick:
            return QUICK
        beside = any(not workloads.find(name).foldable for name in self.workloads)
        return BESIDE if beside else SETTINGS[workloads.find(self.workloads[0]).kind]

    def contenders(self) -> Iterator[tuple[str, str, str]]:
        """(workload, provider, dtype) of each row."""
        for workload, dtype, provider in itertools.product(
            self.workloads, self.dtypes, self.providers
        ):
            able = workloads.find(workload).providers
            if dtype in PROVIDERS[provider].dtypes and (able is None or provider in able):
                yield workload, provider, dtype

    def keys(self) -> set[tuple]:
        """The `Row.key` of each row."""
        return {
            (workload, self.batch, self.threads, self.mode, dtype, provider)
            for workload, provider, dtype in self.contenders()
        }

    def expected_seconds(self, quick: bool) -> float:
        """A guess, for the progress bar."""
        settings = self.settings(quick)
        total, a_round = 0.0, 0.0
        for name, provider, _ in self.contenders():
            if not available(provider):
                call = workloads.find(name).about_flops(self.batch) / (150e9 * self.threads)
                total += 2 * call + (10.0 if provider == "torch_compile" else 1.0)
                a_round += max(settings.burst_seconds, call) + settings.pause_seconds
        return total + _rounds(a_round or 1, settings) * a_round


def _rounds(round_seconds: float, settings: Settings) -> int:
    low, high = settings.rounds
    return int(np.clip(settings.session_seconds / round_seconds, low, high))


# ---- Processes -----------------------------------------------------------------------------------


class Process:
    """A worker process; stopped but while it answers a request."""

    def __init__(self, provider: str, threads: int, log: Path):
        environment = dict(os.environ)
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(CACHE / "inductor")
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(results.ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        )
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.connection, theirs = Pipe()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.worker", str(theirs.fileno()), provider],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        theirs.close()
        self.stopped = False

    def start(self) -> None:
        """Lets it run."""
        if self.stopped:
            self._signal(signal.SIGCONT)
            self.stopped = False

    def stop(self) -> None:
        """Takes the processors from it, spinning threads and all."""
        if not self.stopped:
            self._signal(signal.SIGSTOP)
            self.stopped = True

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def send(self, command: str, *arguments: object) -> None:
        """Starts it on a request."""
        self.start()
        try:
            self.connection.send((command, arguments))
        except OSError:
            raise self._death() from None

    def receive(self, seconds: float):
        """Its answer; it is stopped from then on.

        Raises:
            WorkerError: it reports an error, has died, or takes longer than `seconds`.
        """
        try:
            if not self.connection.poll(seconds):
                self.close()
                raise WorkerError(f"no answer within {seconds:.0f} s")
            state, result = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        self.stop()
        if state == "error":
            raise WorkerError(result)
        return result

    def request(self, command: str, *arguments: object, seconds: float = CALL_SECONDS):
        """`send`, then `receive`."""
        self.send(command, *arguments)
        return self.receive(seconds)

    def _death(self) -> WorkerError:
        self.close()
        last = (self.log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        return WorkerError(f"died with status {self.process.returncode}: {last}".rstrip(": "))

    def cpu_seconds(self) -> float:
        """Processor time it has used."""
        return _cpu_seconds(self.process.pid)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """Ends it."""
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5 if not self.stopped else 0)
        self.process.kill()
        self.process.wait()


class Pool:
    """The worker processes, kept from one session to the next while the threads stay the same."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder or CACHE / "logs"
        self.processes: dict[tuple[str, int, int], Process] = {}

    def get(self, provider: str, threads: int, index: int = 0) -> Process:
        """The process of that provider; `index` tells apart those of one stream each."""
        key = provider, threads, index
        process = self.processes.get(key)
        if process is None or not process.alive:
            log = self.folder / f"{provider}-{threads}-{index}.log"
            process = self.processes[key] = Process(provider, threads, log)
        return process

    def retain(self, threads: int) -> None:
        """Closes the processes that use another number of threads."""
        for key in [key for key in self.processes if key[0] != "machine" and key[1] != threads]:
            self._close(key)

    def _close(self, key: tuple[str, int, int]) -> None:
        self.processes.pop(key).close()

    def cpu_seconds(self) -> float:
        """Processor time of all of them, those that have ended and this process included."""
        alive = 0.0
        for process in self.processes.values():
            with contextlib.suppress(OSError):
                alive += process.cpu_seconds() if process.alive else 0.0
        return alive + sum(os.times()[:4])  # with that of children that have ended

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        for key in list(self.processes):
            self._close(key)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # its own and its children's


def _busy_seconds() -> float:
    """Processor time that the whole machine has used, or that a hypervisor took away."""
    user, nice, system, _idle, _wait, irq, soft, steal = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


class OtherLoad:
    """How many processors anything but this benchmark keeps busy, from now on."""

    def __init__(self, pool: Pool):
        self.pool = pool
        self.start = self._now()

    def _now(self) -> tuple[float, float] | None:
        try:
            return time.perf_counter(), _busy_seconds() - self.pool.cpu_seconds()
        except OSError:
            return None  # not Linux

    def __call__(self) -> float | None:
        end = self._now()
        if self.start is None or end is None:
            return None
        return max(0.0, (end[1] - self.start[1]) / (end[0] - self.start[0]))


def other_load(pool: Pool, seconds: float = 1.0) -> float | None:
    """How many processors anything but this benchmark keeps busy just now."""
    load = OtherLoad(pool)
    time.sleep(seconds)
    return load()


# ---- The answers ---------------------------------------------------------------------------------


def parity(answer: np.ndarray, exact: np.ndarray, dtype: str) -> tuple[float, float, str]:
    """Error of an answer against float64.

    Returns:
        The relative L2 norm of the difference, its largest absolute value, and why the answer
        cannot be that of the same network, or "".
    """
    if answer.shape != exact.shape:
        return np.nan, np.nan, f"answer of shape {answer.shape}, expected {exact.shape}"
    difference = answer.astype(np.float64) - exact
    relative = float(np.linalg.norm(difference) / np.linalg.norm(exact))
    maximum = float(np.abs(difference).max())
    if relative <= GATE[dtype]:
        return relative, maximum, ""
    return relative, maximum, f"wrong answer: relative L2 error {relative:.1e}"


@functools.lru_cache(maxsize=2)
def _module(workload: Workload):
    """The workload's module and a digest of its weights."""
    module = workload.build()
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return module, digest.hexdigest()[:12]


def _cached(workload: Workload, batch: int, suffix: str, write: Callable[[Path], None]) -> Path:
    """A file that depends on the workload's weights and the batch; written once."""
    path = CACHE / "files" / f"{workload.name}-{_module(workload)[1]}-{batch}{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{os.getpid()}-{path.name}")
        write(partial)
        partial.rename(path)
    return path


def _images(workload: Workload, batch: int) -> Path:
    images = workloads.images(workload, batch).numpy()
    return _cached(workload, batch, ".images.npy", lambda path: np.save(path, images))


def _exact(workload: Workload, batch: int, dtype: str) -> np.ndarray:
    """The answer of eager PyTorch in float64, on weights and images rounded to dtype."""
    import torch

    def write(path: Path) -> None:
        rounded = workloads.DTYPES[dtype]
        module = workload.build().to(rounded).double()
        with torch.inference_mode():
            answers = [
                module(image[None].to(rounded).double())
                for image in workloads.images(workload, batch)
            ]
        np.save(path, torch.cat(answers).numpy())

    return np.load(_cached(workload, batch, f".{dtype}.npy", write))


def _onnx(workload: Workload, batch: int) -> Path:
    """The network as ONNX for that batch, with BatchNorm folded where that is known to be right;
    the exporter and the runtimes fold what they recognise."""
    import torch

    from fasternet_kernels import models

    def write(path: Path) -> None:
        module = _module(workload)[0]
        folded = models.fold_batch_norm(module) if workload.foldable else module
        x = workloads.images(workload, batch)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # that this exporter is the older one
            # Not dynamo: constant shapes and plain Conv nodes are all that is needed, and this
            # exporter needs no further package.
            torch.onnx.export(folded, (x,), str(path), dynamo=False, opset_version=17)

    return _cached(workload, batch, ".onnx", write)


# ---- One session ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Contender:
    """A provider, on a workload, in a dtype: one row to be."""

    workload: Workload
    provider: str
    dtype: str
    processes: list[Process]
    status: str = "ok"
    errors: tuple[float | None, float | None] = (None, None)
    seconds: float = 0.0  # of one call, about

    @property
    def name(self) -> str:
        return f"{self.workload.name} {self.provider} {self.dtype}"

    def prepare(self, task: Task) -> None:
        """Readies all processes and checks what they answer."""
        try:
            if PROVIDERS[self.provider].reads_onnx:
                task = dataclasses.replace(task, onnx=_onnx(self.workload, task.batch))
            exact = _exact(self.workload, task.batch, self.dtype)
            for process in self.processes:
                answer, self.seconds = process.request(
                    "prepare", self.name, task, seconds=PREPARE_SECONDS
                )
                relative, maximum, reason = parity(answer, exact, self.dtype)
                self.errors = relative, maximum
                if reason:
                    raise WorkerError(reason)
        except Exception as error:  # an exporter's included: this row has no number, others do
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.status = lines[0]

    def burst(self, settings: Settings, batch: int, streams: bool) -> tuple[float, ...]:
        """One burst: seconds per call, or of streams one sample, seconds per image."""
        if self.status != "ok":
            return ()
        # Of calls that take long, few are needed, and cold caches do not show in them.
        dropped = 2 if self.seconds < 0.05 else int(self.seconds < 0.3)
        minimum = 3 if self.seconds < 0.1 else 2 if self.seconds < 0.4 else 1
        arguments = self.name, settings.burst_seconds, dropped, minimum
        if streams:  # long, so that all are at work most of the time
            arguments = self.name, max(settings.burst_seconds, 4 * self.seconds), dropped, minimum
        try:
            for process in self.processes:
                process.send("burst", *arguments)
            samples = [process.receive(CALL_SECONDS) for process in self.processes]
        except WorkerError as error:
            self.status = str(error)
            return ()
        if not streams:
            return samples[0]
        return (1 / sum(batch * len(taken) / sum(taken) for taken in samples),)

    def forget(self) -> None:
        for process in self.processes:
            if process.alive:
                with contextlib.suppress(WorkerError):
                    process.request("forget", self.name)


class Session:
    """Measures what a `Spec` names."""

    def __init__(self, spec: Spec, pool: Pool, settings: Settings, run: str, session: str):
        self.spec, self.pool, self.settings = spec, pool, settings
        self.run, self.session = run, session
        streams = spec.mode == "streams"
        count, self.threads = (spec.threads, 1) if streams else (1, spec.threads)
        self.streams = streams
        self.contenders = []
        for name, provider, dtype in spec.contenders():
            missing = available(provider)
            processes = (
                [] if missing else [pool.get(provider, self.threads, i) for i in range(count)]
            )
            self.contenders.append(
                Contender(workloads.find(name), provider, dtype, processes, missing or "ok")
            )

    def __call__(self, progress: Callable[[str, float], None]) -> list[Row]:
        """The rows. `progress` is told what is done next, and the share of the session done."""
        for done, contender in enumerate(self.contenders):
            progress(f"preparing {contender.name}", 0.4 * done / len(self.contenders))
            if contender.status == "ok":
                contender.prepare(self._task(contender))
        machine = self.pool.get("machine", 1)
        try:
            copy_rate = machine.request("copy", self.spec.threads)
        except WorkerError:
            copy_rate = None

        def peak() -> tuple[float, ...]:
            try:
                return machine.request("peak", 0.06, self.spec.threads)
            except WorkerError:
                return ()  # fasternet_runtime is not built

        running = {c.name: c for c in self.contenders if c.status == "ok"}
        bursts = {
            name: functools.partial(c.burst, self.settings, self.spec.batch, self.streams)
            for name, c in running.items()
        }
        a_round = sum(self._burst_seconds(c) for c in running.values()) or 1
        load = OtherLoad(self.pool)
        timings = timing.interleave(
            bursts | {"peak": peak},
            rounds=_rounds(a_round, self.settings),
            pause_seconds=self.settings.pause_seconds,
            progress=lambda done, total, name: progress(name, 0.4 + 0.6 * done / total),
        )
        busy = load()
        peaks = timings.pop("peak")
        for contender in self.contenders:
            contender.forget()
        return [self._row(c, timings, peaks, copy_rate, busy) for c in self.contenders]

    def _task(self, contender: Contender) -> Task:
        images = _images(contender.workload, self.spec.batch)
        return Task(
            workload=contender.workload.name,
            batch=self.spec.batch,
            threads=self.threads,
            dtype=contender.dtype,
            images=images,
            alone=not self.streams,
        )

    def _burst_seconds(self, contender: Contender) -> float:
        calls = 5 if contender.seconds < 0.1 else 1
        burst = max(self.settings.burst_seconds, contender.seconds * calls)
        if self.streams:
            burst = max(burst, 5 * contender.seconds)
        return burst + self.settings.pause_seconds

    def _row(
        self,
        contender: Contender,
        timings: dict[str, timing.Timing],
        peaks: timing.Timing,
        copy_rate: float | None,
        busy: float | None,
    ) -> Row:
        spec, workload = self.spec, contender.workload
        channels, height, width = workload.shape
        row = Row(
            **results.provenance(),
            run=self.run,
            session=self.session,
            kind=workload.kind,
            workload=workload.name,
            channels=channels,
            height=height,
            width=width,
            act=workload.act,
            batch=spec.batch,
            threads=spec.threads,
            mode=spec.mode,
            dtype=contender.dtype,
            provider=contender.provider,
            status=contender.status,
            error_rel_l2=contender.errors[0],
            error_max_abs=contender.errors[1],
        )
        row = dataclasses.replace(row, date=results.now())
        if contender.status != "ok":
            return row
        taken = timings[contender.name]
        medians = _round_medians(taken)
        images = 1 if self.streams else spec.batch  # that one sample stands for
        flops = workload.flops(images)
        traffic = None if self.streams else workload.traffic(spec.batch)
        measured = {
            "median_ms": taken.median * 1e3,
            "p20_ms": taken.p20 * 1e3,
            "p80_ms": taken.p80 * 1e3,
            "min_ms": taken.minimum * 1e3,
            "images_per_s": images / taken.median,
            "gflop": flops / 1e9,
            "gflop_per_s": flops / 1e9 / taken.median,
            "copy_gb_per_s": None if copy_rate is None else copy_rate / 1e9,
            "rounds": len(taken.rounds),
            "calls": len(taken.samples),
            "other_load": busy,
            "round_medians_ms": tuple(m * 1e3 for m in medians),
        }
        if traffic is not None:
            size = workloads.DTYPES[contender.dtype].itemsize
            measured["gb_per_s"] = traffic * size / taken.median / 1e9
        if peaks.samples:
            limits = np.array(_round_medians(peaks)) * flops / 1e9  # seconds at the peak
            measured["peak_gflop_per_s"] = 1 / peaks.median
            measured["peak_share"] = float(np.median(limits / np.array(medians)))
        dtype = "fp32" if contender.provider == "ours" else contender.dtype
        ours = timings.get(f"{workload.name} ours {dtype}")
        if ours is not None and ours is not taken and all(ours.rounds):
            ratio = stats.speedup(medians, _round_medians(ours))
            measured["vs_ours"], measured["vs_ours_low"], measured["vs_ours_high"] = ratio
        return dataclasses.replace(row, **measured)


def _round_medians(taken: timing.Timing) -> list[float]:
    return [float(np.median(samples)) for samples in taken.rounds]


def measure(
    specs: Sequence[Spec],
    path: Path,
    run: str,
    progress: Callable[[Spec, str, float], None],
    quick: bool = False,
) -> Iterator[tuple[Spec, list[Row]]]:
    """Measures each spec and appends its rows to the CSV at once, so that a cut loses one session
    at most. Those whose rows the run already has are skipped. Where others kept processors busy
    meanwhile, it is measured again after all others, `TRIES` times in all at most, if not quick;
    which rows count is up to `results.calmest`.

    Args:
        specs: in the order to measure; processes are kept while the threads stay the same.
        path: of the CSV.
        run: what the rows belong to.
        progress: is told the spec, what is done next, and the share of the spec done.
        quick: few short bursts.

    Yields:
        Each measured spec with its rows.
    """
    sessions: dict[str, list[Row]] = {}
    for row in results.read(path):
        if row.run == run:
            sessions.setdefault(row.session, []).append(row)
    with Pool() as pool:
        for attempt in range(1 if quick else TRIES):
            for index, spec in enumerate(specs):
                wanted = spec.keys()
                keys = {name: {row.key for row in s} for name, s in sessions.items()}
                before = [name for name in sessions if wanted <= keys[name]]
                if len(before) > attempt or any(
                    keys[name] > wanted or not results.disturbed(sessions[name]) for name in before
                ):
                    if attempt == 0:
                        progress(spec, "measured before", 1.0)
                    continue
                pool.retain(1 if spec.mode == "streams" else spec.threads)
                name = f"{run}/{index}-{results.now()}"
                session = Session(spec, pool, spec.settings(quick), run, name)
                rows = sessions[name] = session(functools.partial(progress, spec))
                results.append(path, rows)
                yield spec, rows
