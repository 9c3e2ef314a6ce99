"""The one-page summary of `make gpu`, from its rows alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from bench import stats
from bench.gpu_rows import GpuRow

__all__ = ["text"]


def text(rows: Sequence[GpuRow], folder: Path) -> str:
    """The rows of one run as a page; `folder` has the run's state and the tests' log."""
    if not rows:
        return "No rows: nothing has been measured.\n"
    first = rows[0]
    lines = [
        f"make gpu, run {first.run}: {first.device}, compute capability {first.capability}, "
        f"driver {first.driver}",
        f"commit {first.commit}{' with changes' if first.dirty else ''}, torch {first.torch}, "
        f"CUDA {first.cuda}, cuDNN {first.cudnn}, triton {first.triton}",
        "",
    ]
    state = folder / "state.json"
    if state.exists():
        done = json.loads(state.read_text())["done"]
        lines.append("sections: " + ", ".join(f"{name} {how}" for name, how in done.items()))
    log = folder / "log.txt"
    if log.exists():
        ends = re.findall(
            r"^.*\b(?:passed|failed|skipped)\b.* in [\d.]+s.*$", log.read_text(), re.M
        )
        lines += [f"tests: {ends[-1]}"] if ends else []
    times = [row for row in rows if row.median_ms is not None]
    for kind, title in (
        ("peak", "Measured peaks (what the shares are of)"),
        ("network", "Networks, inference"),
        ("training", "Training step, bfloat16 by autocast"),
        ("chain", "Chains of 4 blocks"),
        ("operator", "Operators, the paper's Table 1 shapes"),
    ):
        found = [row for row in times if row.kind == kind]
        if found:
            lines += ["", title, *_table(found)]
    bad = [row for row in rows if row.median_ms is None and row.status != "dry run"]
    if bad:
        lines += ["", "Without a time"]
        lines += [f"  {r.workload} {r.batch} {r.dtype} {r.provider}: {r.status}" for r in bad]
    if not times:
        lines += ["", "A dry run: no times."]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[GpuRow]) -> list[str]:
    """One line for each workload: each provider's time, ours with shares and a ratio."""
    groups: dict[tuple, dict[str, GpuRow]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.batch, row.dtype), {})[row.provider] = row
    lines = []
    for (workload, batch, dtype), found in groups.items():
        if rows[0].kind == "peak":
            row = next(iter(found.values()))
            rate = f"{row.gb_per_s:.0f} GB/s" if row.gb_per_s else f"{row.tflop_per_s:.0f} TFLOP/s"
            lines.append(f"  {workload:6s} {rate}")
            continue
        cells = [_cell(name, row) for name, row in found.items()]
        lines.append(f"  {workload} x{batch} {dtype}: " + ", ".join(cells))
        ratio = _ratio(found)
        if ratio:
            lines.append(f"      {ratio}")
    return lines


def _cell(name: str, row: GpuRow) -> str:
    shares = [
        f"{share:.0%} {what}"
        for share, what in ((row.copy_share, "copy"), (row.matrix_share, "matrix"))
        if share is not None and name.startswith("ours")
    ]
    return f"{name} {row.median_ms:.3f} ms" + (f" ({', '.join(shares)})" if shares else "")


def _ratio(found: dict[str, GpuRow]) -> str:
    """Our best against the best of the others that do the same work, round by round."""
    peers = ("eager", "compile", "max_autotune", "pconv_split_cat", "pconv_slicing")
    ours = [row for name, row in found.items() if name.startswith("ours")]
    others = [found[name] for name in peers if name in found]
    if not ours or not others:
        return ""
    mine = min(ours, key=lambda row: row.median_ms)
    peer = min(others, key=lambda row: row.median_ms)
    if len(mine.round_medians_ms) != len(peer.round_medians_ms):
        return ""
    interval = stats.speedup(peer.round_medians_ms, mine.round_medians_ms)
    return f"{mine.provider} against {peer.provider}: {interval}"
