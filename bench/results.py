"""The results: rows in a CSV for each device, with all that is needed to judge or repeat them.

Files are only appended to. A row says how one provider did on one workload; rows of one `session`
were measured in turns, so their rounds can be compared one by one.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from fasternet_kernels.timing import processor_name

__all__ = [
    "ROOT",
    "Row",
    "append",
    "calmest",
    "default_path",
    "disturbed",
    "fullest_file",
    "fullest_run",
    "latest",
    "newest_run",
    "other_load",
    "provenance",
    "read",
]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BUSY = 0.15  # processors: more than a quiet system's own housekeeping


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the CSV, columns in this order; None is an empty cell.

    Times are milliseconds per call; with mode "streams", per image of all processes together.
    Shares, ratios and intervals come from rounds, each taken within seconds.
    """

    # When, where, by what
    run: str
    session: str
    date: str
    commit: str
    dirty: bool
    processor: str
    cores: int
    isa: str
    compiler: str
    python: str
    fasternet_kernels: str
    torch: str
    onnxruntime: str
    openvino: str
    mnn: str
    # What
    kind: str  # network, chain, operator
    workload: str
    channels: int  # of one input image
    height: int
    width: int
    act: str
    batch: int
    threads: int
    mode: str  # latency, or streams: as many processes of one thread each at once
    dtype: str
    provider: str
    # How it went: "ok", or why there are no numbers
    status: str
    error_rel_l2: float | None = None  # against float64 eager PyTorch on the same rounded inputs
    error_max_abs: float | None = None
    median_ms: float | None = None  # over all calls
    p20_ms: float | None = None
    p80_ms: float | None = None
    min_ms: float | None = None
    images_per_s: float | None = None
    gflop: float | None = None  # of one call: direct method, two for a multiply-add
    gflop_per_s: float | None = None
    peak_gflop_per_s: float | None = None  # multiply-adds in registers on `isa`, same rounds
    peak_share: float | None = None  # median over rounds
    gb_per_s: float | None = None  # of what must be moved at least
    copy_gb_per_s: float | None = None  # read and written by a plain copy in this session
    vs_ours: float | None = None  # this one's time / ours (bf16 ours: / fp32 ours)
    vs_ours_low: float | None = None  # 95 % bootstrap interval
    vs_ours_high: float | None = None
    rounds: int | None = None
    calls: int | None = None
    other_load: float | None = None  # processors that anything else kept busy meanwhile
    round_medians_ms: tuple[float, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def key(self) -> tuple:
        """What is measured, whenever; a run measures it once."""
        return (self.workload, self.batch, self.threads, self.mode, self.dtype, self.provider)


AnyRow = TypeVar("AnyRow")  # Row, or another dataclass of columns of the same types


def _to_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " ".join(f"{v:.6g}" for v in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _from_text(kind: str, text: str) -> object:
    if kind.startswith("tuple"):
        return tuple(map(float, text.split()))
    if not text and "None" in kind:
        return None
    base = kind.partition(" ")[0]
    if base == "bool":
        return text == "True"
    return {"int": int, "float": float, "str": str}[base](text)


def append(path: Path, rows: Iterable[AnyRow]) -> None:
    """Adds rows of one kind at the end of a CSV, which is created if it does not exist.

    Raises:
        ValueError: the file has other columns; nothing has been written.
    """
    rows = list(rows)
    if not rows:
        return
    columns = tuple(field.name for field in dataclasses.fields(rows[0]))
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        _check_header(path, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(columns)
        writer.writerows([_to_text(getattr(row, name)) for name in columns] for row in rows)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, of: type[AnyRow] = Row) -> list[AnyRow]:
    """All rows of a CSV, in order; none if there is no such file. `of`: their kind.

    Raises:
        ValueError: the file has other columns, or a cell that does not fit its column.
    """
    if not path.exists():
        return []
    kinds = {field.name: str(field.type) for field in dataclasses.fields(of)}
    _check_header(path, tuple(kinds))
    with path.open(newline="", encoding="utf-8") as file:
        return [
            of(**{name: _from_text(kinds[name], text) for name, text in cells.items()})
            for cells in csv.DictReader(file)
        ]


def _check_header(path: Path, columns: tuple[str, ...]) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        header = tuple(next(csv.reader(file), ()))
    if header != columns:
        odd = sorted(set(header) ^ set(columns))
        raise ValueError(f"{path} has other columns ({', '.join(odd) or 'in another order'})")


def disturbed(rows: Sequence[Row]) -> bool:
    """Whether others kept processors busy while these rows of a session were measured."""
    return other_load(rows) > BUSY


def calmest(rows: Sequence[Row]) -> list[Row]:
    """The rows that count where a run measured the same work several times because others kept
    processors busy: of the sessions in which the most providers have a number, those of the one
    with the least other load, which is known whatever came out."""

    def rank(session: list[Row]) -> tuple[int, float]:
        return -sum(row.ok for row in session), other_load(session)

    sessions: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        sessions.setdefault((row.run, row.session), []).append(row)
    chosen: dict[tuple, tuple[str, str]] = {}
    for name, session in sessions.items():
        work = session[0].run, frozenset(row.key for row in session)
        if work not in chosen or rank(session) < rank(sessions[chosen[work]]):
            chosen[work] = name
    kept = set(chosen.values())
    return [row for row in rows if (row.run, row.session) in kept]


def other_load(rows: Sequence[Row]) -> float:
    """The processors that others kept busy while these rows of a session were measured; 0 where
    that is not known."""
    return max((row.other_load or 0.0 for row in rows), default=0.0)


def latest(rows: Sequence[Row]) -> list[Row]:
    """The rows that count: for the same work under the same conditions, those of one session, the
    last of those in which the most providers have a number. So rows side by side were measured side
    by side, and a later look at two providers does not hide the others."""
    groups: dict[tuple, dict[str, dict[str, Row]]] = {}
    for row in rows:
        sessions = groups.setdefault(row.key[:-1], {})
        sessions.setdefault(row.session, {})[row.provider] = row
    chosen = []
    for sessions in groups.values():
        best = max(reversed(sessions.values()), key=lambda s: sum(row.ok for row in s.values()))
        chosen += best.values()
    return chosen


def fullest_run(rows: Iterable[Row]) -> list[Row]:
    """Those of one run: the last of the runs that have a number for the most work and, of that, the
    most providers. Times of one table or chart come from here, for a machine may be slower in
    another run; a later run of a part of the work does not mix with them."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row.run, []).append(row)

    def measured(run: list[Row]) -> tuple[int, int]:
        keys = {row.key for row in run if row.ok}
        return len({key[:-1] for key in keys}), len(keys)

    return max(reversed(runs.values()), key=measured, default=[])


def newest_run(rows: Sequence[Row]) -> str | None:
    """The run of the last row."""
    return rows[-1].run if rows else None


def fullest_file(folder: Path = RESULTS) -> Path | None:
    """The CSV that pages are made of: that with the most networks and layers, which they compare,
    and of several the one with the latest row; None if there are none. So a device on which a part
    was measured does not take the place of one on which all was."""

    def key(path: Path) -> tuple[int, str, str]:
        rows = read(path)
        compared = {row.workload for row in rows if row.ok and row.kind in ("network", "layers")}
        return len(compared), max((row.date for row in rows), default=""), path.name

    return max(folder.glob("*.csv"), key=key, default=None)


def default_path() -> Path:
    """The CSV of this device."""
    name = re.sub(r"[^a-z0-9]+", "-", processor_name().lower()).strip("-")
    return RESULTS / f"{name}-{os.cpu_count()}.csv"


@functools.cache
def provenance() -> dict[str, object]:
    """The columns of a row that say when, where and by what, but for run and session."""
    import fasternet_kernels as fk

    status = fk.library.status()
    names = ("fasternet_kernels", "torch", "onnxruntime", "openvino", "mnn")
    versions = {name: _version(name) for name in names}
    if not versions["fasternet_kernels"]:
        versions["fasternet_kernels"] = fk.__version__  # run from the source tree
    return {
        "date": now(),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        # Rows of an earlier command, and what is generated from them, do not count.
        "dirty": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", ".", *_GENERATED)
        ),
        "processor": processor_name(),
        "cores": os.cpu_count() or 1,
        "isa": status.isa or "",
        "compiler": status.compiler or "",
        "python": platform.python_version(),
        **versions,
    }


_GENERATED = (":(exclude)bench/results", ":(exclude)README.md", ":(exclude)docs")


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""  # not a checkout
    return done.stdout.strip()
