"""Charts, from the rows of a CSV alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import results
from bench.providers import PROVIDERS
from bench.results import Row

__all__ = ["draw"]


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes each chart the rows allow, as SVG and PNG.

    latency_batch<b>_threads<n>   bars for each network and provider
    peak_share_threads<n>         share of the FMA peak over channels, chains at each stage

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no row has a number.
    """
    last = [row for row in results.latest(rows) if row.ok and row.mode == "latency"]
    last = [row for row in last if row.dtype == "fp32"]
    if not last:
        raise ValueError("no results to draw: python -m bench")
    files = []
    networks = [row for row in last if row.kind == "network"]
    for batch, threads in sorted({(row.batch, row.threads) for row in networks}):
        chosen = [row for row in networks if (row.batch, row.threads) == (batch, threads)]
        figure = _latency(chosen, batch, threads)
        files += _save(figure, folder / f"latency_batch{batch}_threads{threads}")
    chains = [r for r in last if r.kind == "chain" and r.batch == 1 and r.peak_share is not None]
    for threads in sorted({row.threads for row in chains}):
        figure = _shares([row for row in chains if row.threads == threads], threads)
        files += _save(figure, folder / f"peak_share_threads{threads}")
    return files


def _latency(rows: list[Row], batch: int, threads: int):
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.workload for row in rows))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 0.8 + 2.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for panel, name in zip(panels, names):
        shown = {row.provider: row for row in rows if row.workload == name}
        shown = [shown[provider] for provider in PROVIDERS if provider in shown]
        medians = [row.median_ms for row in shown]
        bars = panel.barh(
            [PROVIDERS[row.provider].label for row in shown],
            medians,
            xerr=[
                [row.median_ms - row.p20_ms for row in shown],
                [row.p80_ms - row.median_ms for row in shown],
            ],
            capsize=2,
            color=[PROVIDERS[row.provider].colour for row in shown],
        )
        panel.bar_label(bars, [f"{value:.3g}" for value in medians], padding=4)
        panel.set_title(name)
        panel.invert_yaxis()
        panel.margins(x=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels:
        panel.set_visible(False)  # those left over
    figure.suptitle(f"Batch {batch}, {_threads(threads)}: milliseconds per call, less is better")
    figure.supxlabel(_caption(rows), fontsize=8)
    return figure


def _shares(rows: list[Row], threads: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    panel = figure.subplots()
    styles = {"relu": ("o", "-"), "gelu": ("^", ":")}
    for provider, about in PROVIDERS.items():
        for act, (marker, line) in styles.items():
            chosen = [row for row in rows if (row.provider, row.act) == (provider, act)]
            chosen.sort(key=lambda row: (row.channels, row.height))
            if chosen:
                panel.plot(
                    [row.channels for row in chosen],
                    [100 * row.peak_share for row in chosen],
                    marker=marker,
                    linestyle=line,
                    color=about.colour,
                    label=f"{about.label}, {act}",
                )
    channels = sorted({row.channels for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(channels, map(str, channels), rotation=60, fontsize=7)
    panel.minorticks_off()
    panel.set_xlabel("channels C")
    panel.set_ylabel("% of measured FMA peak, direct FLOPs")
    panel.set_ylim(bottom=0)
    panel.axhline(100, color="black", linewidth=0.8)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    panel.set_title(f"Chains of blocks, batch 1, {_threads(threads)}")
    figure.supxlabel(_caption(rows), fontsize=8)
    return figure


def _caption(rows: list[Row]) -> str:
    newest = max(rows, key=lambda row: row.date)
    return (
        f"{newest.processor}, {newest.isa}, torch {newest.torch}, float32, {newest.date[:10]}, "
        f"commit {newest.commit or 'unknown'}\nmedians of interleaved bursts, bars: 20th to 80th "
        "percentile"
    )


def _save(figure, stem: Path) -> list[Path]:
    import matplotlib

    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
    # Without ids from random numbers and without the date: the same rows give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fasternet_kernels"}):
        figure.savefig(files[0], metadata={"Date": None})
    figure.savefig(files[1], dpi=150)
    return files


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"
