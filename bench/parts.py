"""Where a network's time goes: stem, blocks of each stage, merging layers and head, measured in
turns with the whole network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from bench import workloads
from bench.providers import PROVIDERS
from bench.report import columns
from bench.results import Row

__all__ = ["Part", "find", "text"]


@dataclasses.dataclass(frozen=True)
class Part:
    """Attributes:
    label: what it is.
    workload: what was measured for it.
    times: how often a network contains that workload; a chain has more blocks than some stages.
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
    """A table for each provider and dtype of one session: milliseconds, shares of their sum, and
    how fast the parts are. A part is called by itself, which its time contains."""
    return "\n".join(
        _table([row for row in rows if (row.provider, row.dtype) == of])
        for of in dict.fromkeys((row.provider, row.dtype) for row in rows)
    )


def _table(rows: list[Row]) -> str:
    measured = {row.workload: row for row in rows if row.ok}
    whole = next(row for row in rows if row.kind == "network")
    parts = find(whole.workload.removeprefix("fasternet_"))
    title = f"{PROVIDERS[whole.provider].label}, {whole.dtype}"
    missing = [part.label for part in parts if part.workload not in measured]
    if missing or not whole.ok:
        return f"{title}: not measured: {', '.join(missing or [whole.workload])}"
    times = [part.times * measured[part.workload].median_ms for part in parts]
    total = sum(times)
    lines = [(title, "ms", "of the sum", "GFLOP", "GFLOP/s", "peak")]
    for part, time in zip(parts, times):
        row = measured[part.workload]
        lines.append(_line(part.label, time, f"{time / total:.1%}", row, part.times))
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
