"""What the results say: ratios with intervals, the goals, and README's table. From rows alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

from bench import results, stats
from bench.providers import PEERS, PROVIDERS
from bench.results import Row
from bench.stats import Interval

__all__ = [
    "GOALS",
    "Goal",
    "Verdict",
    "best",
    "columns",
    "compare",
    "judge",
    "markdown",
    "milliseconds",
    "readme_text",
    "session_text",
    "threads_text",
]

NETWORKS = ("t0", "t1", "t2", "s", "m", "l")
DIRECT = tuple(peer for peer in PEERS if peer != "mnn")  # those that do not use Strassen


# ---- The goals -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Goal:
    """A statement about rows: this provider, on these networks, beats the best of those rivals.

    Attributes:
        networks: t0 to l.
        batch, threads: of the rows; threads None means every number measured.
        provider: of this library.
        rivals: providers, of which the fastest counts.
        at_least: the ratio to reach; the interval must lie above 1 as well.
        rival_workload: what the rivals run, if not the same network.
    """

    networks: tuple[str, ...]
    batch: int
    threads: int | None
    provider: str
    rivals: tuple[str, ...]
    at_least: float
    rival_workload: str = ""


@dataclasses.dataclass(frozen=True)
class ShareGoal:
    """A statement about ReLU chains on one thread: their share of the FMA peak, direct FLOPs."""

    channels: tuple[int, int]  # from, to
    at_least: float


WIDE = ("t2", "s", "m", "l")
GOALS = (
    Goal(("t0", "t1"), 1, 1, "ours", PEERS, 1.10),
    Goal(("t0", "t1"), 1, 2, "ours", PEERS, 1.20),
    Goal(WIDE, 1, None, "ours", DIRECT, 1.03),
    Goal(WIDE, 1, None, "ours_fast", PEERS, 1.08),
    Goal(("t0", "t1"), 16, None, "ours", PEERS, 1.0),
    Goal(WIDE, 16, None, "ours", DIRECT, 1.0),
    Goal(WIDE, 16, None, "ours_fast", PEERS, 1.0),
    Goal(("t0",), 1, None, "ours", PEERS, 1.0, "mobilenetv2_100"),
    Goal(("t0",), 1, None, "ours", ("eager_channels_last",), 1.8),
    Goal(("s",), 1, None, "ours", ("eager_channels_last",), 1.4),
    Goal(("l",), 1, None, "ours", ("eager_channels_last",), 1.3),
)
SHARE_GOALS = (ShareGoal((40, 79), 0.76), ShareGoal((80, 4096), 0.92))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One line of the goals' table. `met` is None where a row is missing."""

    what: str
    value: str
    wanted: str
    met: bool | None


def best(rows: Iterable[Row]) -> Row | None:
    """The fastest of those that have a number."""
    return min((r for r in rows if r.ok), key=lambda r: r.median_ms, default=None)


def compare(slower: Row, faster: Row) -> Interval | None:
    """How many times faster; None if the two were not measured in turns."""
    if slower.session != faster.session or not (slower.ok and faster.ok):
        return None
    return stats.speedup(slower.round_medians_ms, faster.round_medians_ms)


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Each goal on each network and number of threads that was measured."""
    last = results.latest(rows)
    last = [row for row in last if row.mode == "latency" and row.dtype == "fp32"]
    verdicts = []
    for goal in GOALS:
        wide = {row.threads for row in last if row.kind == "network" and row.batch == goal.batch}
        for network in goal.networks:
            for threads in sorted(wide) if goal.threads is None else [goal.threads]:
                verdicts.append(_judge(goal, network, threads, last))
    for goal in SHARE_GOALS:
        low, high = goal.channels
        chains = [
            row
            for row in last
            if (row.kind, row.act, row.batch, row.threads, row.provider)
            == ("chain", "relu", 1, 1, "ours")
            and low <= row.channels <= high
        ]
        for row in sorted(chains, key=lambda r: (r.channels, r.workload)):
            share = row.peak_share
            verdicts.append(
                Verdict(
                    f"{row.workload} (C = {row.channels}), 1 thread: share of FMA peak",
                    row.status if share is None else f"{share:.1%}",
                    f"{goal.at_least:.0%}",
                    None if share is None else share >= goal.at_least,
                )
            )
    return verdicts


def _judge(goal: Goal, network: str, threads: int, rows: list[Row]) -> Verdict:
    workload = f"fasternet_{network}"
    same = [row for row in rows if row.batch == goal.batch and row.threads == threads]
    ours = [row for row in same if (row.workload, row.provider) == (workload, goal.provider)]
    others = goal.rival_workload or workload
    rivals = [row for row in same if row.workload == others and row.provider in goal.rivals]
    rival = best(rivals)
    what = f"{network.upper()}, batch {goal.batch}, {threads_text(threads)}: "
    what += PROVIDERS[goal.provider].label
    wanted = f"{goal.at_least:.2f}x" if goal.at_least > 1 else "above 1"
    if rival is None or best(ours) is None:
        missing = (ours or rivals)[0].status if ours or rivals else ""
        return Verdict(what, "not measured" if missing in ("", "ok") else missing, wanted, None)
    against = PROVIDERS[rival.provider].label
    what += f" over {against}" + (f" on {others}" if goal.rival_workload else "")
    ratio = compare(rival, ours[0])
    if ratio is None:
        return Verdict(what, "not measured in turns", wanted, None)
    return Verdict(what, str(ratio), wanted, ratio.value >= goal.at_least and ratio.low > 1)


# ---- Text ----------------------------------------------------------------------------------------


def text(rows: Sequence[Row]) -> str:
    """The goals, each with what was measured."""
    if not rows:
        return "No results yet: python -m bench"
    words = {True: "met", False: "FALLS SHORT", None: "-"}
    from bench import training  # which needs this module

    verdicts = judge(rows) + training.judge(rows)
    lines = [("goal", "measured", "wanted", "")]
    lines += [(v.what, v.value, v.wanted, words[v.met]) for v in verdicts]
    count = [sum(v.met is state for v in verdicts) for state in (True, False, None)]
    summary = f"{count[0]} met, {count[1]} fall short, {count[2]} not measured"
    ratios = "Ratios: median over rounds, in brackets the 95 % bootstrap interval."
    return f"{columns(lines)}\n\n{summary}. {ratios}"


def session_text(title: str, rows: Sequence[Row]) -> str:
    """A session's rows, the fastest first."""
    lines = [("", "ms", "p20", "p80", "min", "GFLOP/s", "peak", "error", "slower than ours")]
    for row in sorted(rows, key=lambda r: (r.workload, r.median_ms or float("inf"))):
        name = f"{row.workload} {PROVIDERS[row.provider].label}"
        name += f" {row.dtype}" if row.dtype != "fp32" else ""
        if not row.ok:
            lines.append((name, row.status, *[""] * 7))
            continue
        times = (row.median_ms, row.p20_ms, row.p80_ms, row.min_ms)
        share = "" if row.peak_share is None else f"{row.peak_share:.0%}"
        ratio = ""
        if row.vs_ours is not None:
            ratio = str(Interval(row.vs_ours, row.vs_ours_low, row.vs_ours_high))
        lines.append(
            (
                name,
                *(f"{t:.2f}" for t in times),
                f"{row.gflop_per_s:.0f}",
                share,
                f"{row.error_rel_l2:.1e}",
                ratio,
            )
        )
    return f"\n{title}{load_note(rows)}\n{columns(lines)}"


def load_note(rows: Sequence[Row]) -> str:
    """Said behind the title of a session that others disturbed."""
    load = results.other_load(rows)
    return f"   (others kept {load:.1f} processors busy)" if results.disturbed(rows) else ""


def columns(lines: Sequence[Sequence[str]]) -> str:
    """A table as plain text; the first line is its head."""
    # What is wrong with a provider may be long, and is the last thing on its line.
    full = [line for line in lines if len(line) < 2 or any(line[2:]) or len(line) == 2]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    widths[0] = max(len(line[0]) for line in lines)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def threads_text(number: int) -> str:
    """Such as "1 thread"."""
    return "1 thread" if number == 1 else f"{number} threads"


# ---- README --------------------------------------------------------------------------------------


def readme_text(rows: Sequence[Row]) -> str:
    """README's tables, as Markdown: networks by batch and threads, and where it was measured."""
    # The other networks have a table of their own.
    names = {f"fasternet_{name}" for name in NETWORKS} | {"mobilenetv2_100"}
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        if row.workload in names and row.dtype == "fp32":
            groups.setdefault((row.mode, row.batch, row.threads), []).append(row)
    if not groups:
        return "No results are committed yet."
    groups = {key: results.latest(results.fullest_run(groups[key])) for key in sorted(groups)}
    newest = max(itertools.chain(*groups.values()), key=lambda row: row.date)
    parts = [_where(newest)]
    for (mode, batch, threads), group in groups.items():
        if mode == "latency":
            title = f"Batch {batch}, {threads_text(threads)}: milliseconds per call"
            cell = milliseconds
        else:
            title = f"{threads} processes of one thread each, batch {batch}: images per second"
            cell = _images
        parts.append(f"{title}\n\n{_table(group, cell)}")
    return "\n\n".join(parts)


def _where(row: Row) -> str:
    versions = [
        f"{name} {getattr(row, column)}"
        for name, column in (
            ("torch", "torch"),
            ("ONNX Runtime", "onnxruntime"),
            ("OpenVINO", "openvino"),
            ("MNN", "mnn"),
        )
        if getattr(row, column)
    ]
    return (
        f"{row.processor}, {row.cores} processors, {row.isa}; {', '.join(versions)}; "
        f"{row.compiler}; float32, 224x224, random weights. Runtimes take turns in short bursts; "
        "BatchNorm is folded for all. Cells are medians over all calls. The last columns say how "
        "many times faster fasternet_kernels is than the fastest other runtime of its row: the "
        "median of the ratios of single rounds, with its 95 % bootstrap interval. Where the "
        "machine's speed changed they differ from the quotient of two cells; an interval that "
        "holds 1 decides nothing, and below 1 it is slower."
    )


def milliseconds(row: Row) -> str:
    """The median, with as many digits as mean something."""
    return f"{row.median_ms:.2f}" if row.median_ms < 100 else f"{row.median_ms:.0f}"


def _images(row: Row) -> str:
    return f"{row.images_per_s:.1f}" if row.images_per_s < 100 else f"{row.images_per_s:.0f}"


def _table(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    by_key = {(row.workload, row.provider): row for row in rows}
    names = list(dict.fromkeys(row.workload for row in rows))
    names.sort(key=lambda name: [*(f"fasternet_{n}" for n in NETWORKS), name].index(name))
    providers = [p for p in PROVIDERS if any(row.provider == p and row.ok for row in rows)]
    ours = [p for p in providers if p.startswith("ours")]
    header = ["", *(PROVIDERS[p].label for p in providers)]
    header += [f"{PROVIDERS[p].label} over the best other" for p in ours]
    lines = [header]
    for name in names:
        found = [by_key.get((name, p)) for p in providers]
        fastest = best(row for row in found if row is not None)
        line = [name]
        for row in found:
            shown = cell(row) if row is not None and row.ok else "-"
            line.append(f"**{shown}**" if row is not None and row is fastest else shown)
        rival = best(r for p, r in zip(providers, found) if p not in ours and r is not None)
        for p in ours:
            mine = by_key.get((name, p))
            ratio = compare(rival, mine) if rival is not None and mine is not None else None
            line.append(str(ratio) if ratio is not None else "-")
        lines.append(line)
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table, the first line its header."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
