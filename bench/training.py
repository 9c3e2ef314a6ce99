"""A training step, in turns: forward, loss, backward and an SGD step with momentum.

Each provider has a process of its own in which nothing else has run, as a user's has: what others
leave in the allocator spares it page faults. None gets a number before its loss and its gradients
have been compared with float64's.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasternet_kernels as fk
from bench import report, results, session, stats, workloads
from bench.report import Verdict, best, compare
from bench.results import Row
from fasternet_kernels import timing

__all__ = [
    "GOALS",
    "LABELS",
    "WORK",
    "Trainer",
    "judge",
    "measure",
    "saved_bytes",
    "session_text",
    "table_text",
]

WORK = (("t0", 16), ("s", 4))  # network, batch
LABELS = {
    "eager_channels_last": "eager, channels_last",
    "compile": "torch.compile",
    "ours": "fasternet_kernels",
    "ours_lean": "fasternet_kernels, lean",
}
# Network, batch, rival, at least this many times faster on all threads.
GOALS = (
    ("t0", 16, "eager_channels_last", 1.5),
    ("t0", 16, "compile", 1.3),
    ("s", 4, "eager_channels_last", 1.3),
)

# Largest relative L2 error of a step's loss and gradients that still counts as the same training.
# A ReLU's derivative jumps: where rounding takes a value before it to the other side of 0 its whole
# gradient comes or goes. The CSV has S off by 2e-4 in eager and 1.2e-3 here, T0, with GELU, by 2e-7
# and 1e-7. So T0 tells whether the kernels are right, and a ReLU network only that it is the same.
GATE = {"gelu": 1e-5, "relu": 1e-2}


def workload(network: str) -> str:
    """What the rows call a training step of fasternet_<network>."""
    return f"fasternet_{network}_step"


# ---- Providers -----------------------------------------------------------------------------------


def _model(plain: nn.Module, provider: str) -> nn.Module:
    model = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    if provider == "compile":
        return torch.compile(model)
    if provider.startswith("ours"):
        return fk.accelerate(model, lean=provider == "ours_lean")
    if provider != "eager_channels_last":
        raise ValueError(f"no provider {provider!r}")
    return model


def _backward(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    return loss.detach()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    _backward(model, x, target)
    optimizer.step()


def _answers(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The loss and every gradient of one step, in one float64 vector."""
    loss = _backward(model, x, target)
    return torch.cat([t.double().flatten() for t in (loss, *(p.grad for p in model.parameters()))])


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that a forward keeps for backward, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = model(x)
    assert held.requires_grad
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


class Trainer:
    """A provider's model: what the requests to its process name (see ``bench.worker``)."""

    def __init__(self, provider: str):
        self.provider = provider

    @staticmethod
    def _inputs(network: str, batch: int, size: int, threads: int):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        plain = getattr(fk.models, f"fasternet_{network}")(drop_path_rate=0.0).train()
        x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
        return plain, x, torch.randint(0, 1000, (batch,))

    def answer(self, path: Path, network: str, batch: int, size: int, threads: int) -> None:
        """Writes the answers of a step in float64."""
        plain, x, target = self._inputs(network, batch, size, threads)
        np.save(path, _answers(plain.double(), x.double(), target).numpy())

    def prepare(
        self, path: Path, network: str, batch: int, size: int, threads: int
    ) -> tuple[float, float, int | None]:
        """Makes the step ready, of which `path` has the answers.

        Returns:
            The relative L2 norm of its answers' error and the largest, against float64; the bytes
            it saves for backward, unless it is one graph.
        """
        plain, x, target = self._inputs(network, batch, size, threads)
        exact = torch.from_numpy(np.load(path))
        model = _model(plain, self.provider)
        off = _answers(model, x, target) - exact
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.step = functools.partial(_step, model, optimizer, x, target)
        saved = None if self.provider == "compile" else saved_bytes(model, x)
        return (off.norm() / exact.norm()).item(), off.abs().max().item(), saved

    def burst(self, seconds: float, dropped: int, minimum: int) -> tuple[float, ...]:
        """Seconds per step, as ``timing.burst``."""
        return timing.burst(self.step, seconds, dropped, minimum)


# ---- Measuring -----------------------------------------------------------------------------------


def measure(
    path: Path,
    run: str,
    work: Sequence[tuple[str, int]] = WORK,
    providers: Sequence[str] = tuple(LABELS),
    threads: int | None = None,
    size: int = 224,
    quick: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[tuple[str, list[Row], dict[str, int]]]:
    """Measures each piece of work and appends its rows to the CSV. Where others kept processors
    busy meanwhile, it is measured again, `session.TRIES` times in all at most, if not quick; which
    rows count is up to `results.calmest`.

    Args:
        path: of the CSV.
        run: its name in the rows.
        work: (network, batch) pairs.
        providers: keys of LABELS.
        threads: of PyTorch; by default as many as it has.
        size: height and width of the images.
        quick: few short bursts, for a look.
        progress: as in ``timing.measure``.

    Yields:
        (title, rows, bytes saved for backward by the providers that say so) of each piece of work.

    Raises:
        ValueError: an unknown provider, or no work.
        session.WorkerError: there is no float64 to compare with.
    """
    for provider in providers:
        if provider not in LABELS:
            raise ValueError(f"no provider {provider!r}; there are {', '.join(LABELS)}")
    if not work:
        raise ValueError("the filters leave nothing to measure")
    threads = threads or torch.get_num_threads()
    tries = [(i, *of, n) for i, of in enumerate(work) for n in range(1 if quick else session.TRIES)]
    rows: list[Row] = []
    for i, network, batch, attempt in tries:
        if attempt > 0 and not results.disturbed(rows):
            continue
        common = {
            "run": run,
            "session": f"{run}/training {i}-{threads}-{attempt}",
            "kind": "training",
            "workload": workload(network),
            "act": workloads.find(f"fasternet_{network}").act,
            "batch": batch,
            "threads": threads,
            "height": size,
            "width": size,
        }
        with session.Pool() as pool, tempfile.TemporaryDirectory() as folder:
            exact = Path(folder, "answers.npy")
            task = network, batch, size, threads
            pool.get("training:float64", threads).request("answer", exact, *task)
            rows, saved = _session(pool, exact, task, common, providers, quick, progress)
        results.append(path, rows)
        yield f"{workload(network)}, batch {batch}, threads {threads}", rows, saved


def _session(
    pool, exact, task, common, providers, quick, progress
) -> tuple[list[Row], dict[str, int]]:
    functions, saved, found = {}, {}, {}
    settings = {"rounds": 2, "pause_seconds": 0} if quick else {"rounds": 12, "pause_seconds": 0.1}
    length = (0.1 if quick else 0.6, 1, 2)  # seconds, dropped calls, calls at least

    def burst(process: session.Process, outcome: dict) -> tuple[float, ...]:
        if outcome["status"] != "ok":
            return ()
        try:
            return process.request("burst", *length)
        except session.WorkerError as reason:
            outcome["status"] = str(reason)
            return ()

    for provider in providers:
        process = pool.get(f"training:{provider}", common["threads"])
        try:
            error, largest, kept = process.request("prepare", exact, *task)
        except session.WorkerError as reason:
            found[provider] = {"status": str(reason)}
            continue
        ok = error <= GATE[common["act"]]
        found[provider] = {
            "status": "ok" if ok else f"wrong: relative error {error:.1e}",
            "error_rel_l2": error,
            "error_max_abs": largest,
        }
        if ok:
            functions[provider] = functools.partial(burst, process, found[provider])
            if kept is not None:
                saved[provider] = kept
    taken = {}
    load = session.OtherLoad(pool)
    if functions:
        taken = timing.interleave(functions, progress=progress, **settings)
        taken = {p: t for p, t in taken.items() if found[p]["status"] == "ok"}
    busy = load()
    medians = {p: _round_medians(t) for p, t in taken.items()}
    rows = []
    for provider in providers:
        values = {"provider": provider, **found[provider]}
        if provider in taken:
            t = taken[provider]
            values |= {
                "median_ms": t.median * 1e3,
                "p20_ms": t.p20 * 1e3,
                "p80_ms": t.p80 * 1e3,
                "min_ms": t.minimum * 1e3,
                "images_per_s": common["batch"] / t.median,
                "rounds": len(t.rounds),
                "calls": len(t.samples),
                "other_load": busy,
                "round_medians_ms": medians[provider],
            }
            if "ours" in taken:
                ratio = stats.speedup(medians[provider], medians["ours"])
                values |= dict(zip(("vs_ours", "vs_ours_low", "vs_ours_high"), ratio))
        rows.append(
            Row(
                **results.provenance(),
                **common,
                channels=3,
                mode="latency",
                dtype="fp32",
                **values,
            )
        )
    return rows, saved


def _round_medians(taken: timing.Timing) -> tuple[float, ...]:
    return tuple(sorted(samples)[len(samples) // 2] * 1e3 for samples in taken.rounds)


# ---- Text ----------------------------------------------------------------------------------------


def session_text(title: str, rows: Sequence[Row], saved: dict[str, int]) -> str:
    """A session's rows, the fastest first, with what each saves for backward."""
    lines = [f"\n{title}{report.load_note(rows)}"]
    for row in sorted(rows, key=lambda r: r.median_ms or float("inf")):
        name = f"{LABELS[row.provider]:24}"
        if not row.ok:
            lines.append(f"{name}  {row.status}")
            continue
        line = f"{name}  {row.median_ms:7.1f} ms ({row.p20_ms:.1f} to {row.p80_ms:.1f})"
        line += f"  error {row.error_rel_l2:.1e}"
        if row.provider in saved:
            line += f"  saves {saved[row.provider] / 2**20:.0f} MiB"
        if row.vs_ours is not None and row.provider != "ours":
            line += f"  {stats.Interval(row.vs_ours, row.vs_ours_low, row.vs_ours_high)} ours"
        lines.append(line)
    return "\n".join(lines)


def table_text(rows: Sequence[Row]) -> str:
    """The last run's steps as Markdown: milliseconds of each provider, and how many times ours."""
    last = results.latest(results.fullest_run(row for row in rows if row.kind == "training"))
    if not any(row.ok for row in last):
        return "Not measured yet: `python -m bench training`."
    steps = dict.fromkeys((row.workload, row.batch, row.threads) for row in last)
    lines = [["a step of", *LABELS.values()]]
    for step in steps:
        name, batch, threads = step
        network = name.removeprefix("fasternet_").removesuffix("_step").upper()
        line = [f"{network}, batch {batch}, {report.threads_text(threads)}"]
        for provider in LABELS:
            row = best(
                r
                for r in last
                if (r.workload, r.batch, r.threads) == step and r.provider == provider
            )
            cell = "-" if row is None else report.milliseconds(row)
            if row is not None and provider != "ours" and row.vs_ours is not None:
                cell += f", {stats.Interval(row.vs_ours, row.vs_ours_low, row.vs_ours_high)}"
            line.append(cell)
        lines.append(line)
    row = last[-1]
    where = f"{row.processor}, {row.cores} processors, {row.isa}; torch {row.torch}"
    return f"{where}; commit {row.commit}.\n\n{report.markdown(lines)}"


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Each goal, on the most threads that were measured."""
    last = [row for row in results.latest(rows) if row.kind == "training"]
    verdicts = []
    for network, batch, rival, at_least in GOALS:
        same = [r for r in last if (r.workload, r.batch) == (workload(network), batch)]
        same = [r for r in same if r.threads == max(row.threads for row in same)]
        mine, theirs = (
            best(r for r in same if r.provider == provider) for provider in ("ours", rival)
        )
        ratio = compare(theirs, mine) if mine and theirs else None
        verdicts.append(
            Verdict(
                f"training step of {network.upper()}, batch {batch}: over {LABELS[rival]}",
                "not measured" if ratio is None else str(ratio),
                f"{at_least:.2f}x",
                None if ratio is None else ratio.value >= at_least and ratio.low > 1,
            )
        )
    return verdicts
