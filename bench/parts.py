"""Where a network's time goes: stem, blocks of each stage, merging layers and head, measured in
turns with the whole network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from bench import workloads
from bench.providers import PROVIDERS
from bench.report import columns, threads_text
from bench.results import Row

__all__ = ["NOTE", "Part", "find", "text"]

NOTE = """A part's time is that of a workload of its own, called by itself: what a call costs
is in each part, the network pays it once. A stage's blocks are a chain of four, times depth / 4;
their weights may stay in a cache from call to call where a network's do not. So the sum may lie on
either side of the network's own time."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a network, and what is measured for it.

    Attributes:
        label: what it is.
        workload: what is measured.
        times: that workload's time, times this, is the part's: depth / 4 for the blocks of a stage,
            of which a chain has four, else 1.
    """

    label: str
    workload: str
    times: float


def find(network: str) -> list[Part]:
    """The parts of a network, t0 to l, in its order."""
    with torch.device("meta"):
        stages = workloads.find(f"fasternet_{network}").make().stages
    found = []
    for number, stage in enumerate(stages, 1):
        where, depth = f"{network}_stage{number}", len(stage.blocks)
        layer = "stem" if number == 1 else f"merging layer {number - 1}"
        blocks = f"stage {number}, {depth} block{'s' if depth > 1 else ''}"
        chain = f"{where}_{workloads.OWN_ACT[network]}"
        found.append(Part(layer, f"patch_conv_{where}", 1))
        found.append(Part(blocks, chain, depth / workloads.CHAIN_BLOCKS))
    return [*found, Part("head", f"head_{network}", 1)]


def text(rows: Sequence[Row]) -> str:
    """A table for each session, provider and dtype that has a whole network: milliseconds, shares
    of their sum, and how fast the parts are."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.session, row.provider, row.dtype), {})[row.workload] = row
    tables = [_table(group) for group in groups.values()]
    return "\n\n".join([*filter(None, tables), NOTE])


def _table(rows: dict[str, Row]) -> str:
    whole = next((row for row in rows.values() if row.kind == "network"), None)
    if whole is None:
        return ""
    network = whole.workload.removeprefix("fasternet_")
    title = (
        f"{network.upper()}, batch {whole.batch}, {threads_text(whole.threads)}, "
        f"{PROVIDERS[whole.provider].label} {whole.dtype}"
    )
    parts = find(network)
    wanted = [("the network at once", whole.workload), *((p.label, p.workload) for p in parts)]
    missing = [label for label, name in wanted if name not in rows or not rows[name].ok]
    if missing:
        return f"{title}: not measured: {', '.join(missing)}"
    times = [part.times * rows[part.workload].median_ms for part in parts]
    total = sum(times)
    lines = [(title, "ms", "of the sum", "GFLOP", "GFLOP/s", "peak")]
    for part, time in zip(parts, times):
        lines.append(
            _line(part.label, time, f"{time / total:.1%}", rows[part.workload], part.times)
        )
    lines.append(("sum", f"{total:.2f}", *[""] * 4))
    lines.append(_line("the network at once", whole.median_ms, "", whole, 1))
    return columns(lines)


def _line(label: str, time: float, of_sum: str, row: Row, times: float) -> tuple[str, ...]:
    share = "" if row.peak_share is None else f"{row.peak_share:.0%}"
    return (
        label,
        f"{time:.2f}",
        of_sum,
        f"{row.gflop * times:.2f}",
        f"{row.gflop_per_s:.0f}",
        share,
    )
