"""Charts, from the rows of a CSV and published figures alone.

Colours are Okabe and Ito's palette, and every series has a marker, a hatch or a line of its own as
well, so that charts can be read without colours and in print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bench import published, report, results, tables, workloads, zoo
from bench.providers import PROVIDERS
from bench.results import Row

__all__ = ["draw", "figures", "save"]

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
FAMILIES = {  # the start of a name -> colour and marker
    "mobilenet": ("#E69F00", "s"),
    "ghostnet": ("#009E73", "v"),
    "repghost": ("#009E73", "^"),
    "mobileone": ("#CC79A7", "P"),
    "mobilevit": ("#D55E00", "D"),
    "edgenext": ("#56B4E9", "X"),
    "": (GREY, "o"),
}
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--", "oo", "**")


def draw(rows: Sequence[Row], folder: Path, endings: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Writes each chart that the rows allow, with each ending; see `figures`."""
    return save(figures(rows), folder, endings)


def figures(rows: Sequence[Row]) -> dict[str, object]:
    """Each chart that the rows allow, a matplotlib figure by name.

    accuracy_threads<n>           published accuracy over latency, each network on its best runtime
    speedup_threads<n>            each FasterNet here, over other runtimes
    operators_threads<n>          FLOPS of ten layers of one operator
    roofline_threads<n>           chains of blocks under the measured limits
    latency_batch<b>_threads<n>   bars for each FasterNet and provider
    peak_share_threads<n>         share of the FMA peak over channels, chains at each stage

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no row has a number.
    """
    found = [row for row in rows if row.ok and (row.mode, row.dtype) == ("latency", "fp32")]
    if not found:
        raise ValueError("no results to draw: python -m bench")
    names = {f"fasternet_{size}" for size in workloads.NETWORKS} | {"mobilenetv2_100"}
    networks = [row for row in found if row.workload in names]
    charts: dict[str, object] = {}
    for batch, threads in sorted({(row.batch, row.threads) for row in networks}):
        chosen = _of_one_run(networks, batch, threads)
        charts[f"latency_batch{batch}_threads{threads}"] = _latency(chosen, batch, threads)
        if batch == 1:
            charts[f"speedup_threads{threads}"] = _speedup(chosen, threads)
            charts[f"accuracy_threads{threads}"] = _accuracy(rows, threads)
    chains = [r for r in found if r.kind == "chain" and r.batch == 1 and r.peak_share is not None]
    for threads in sorted({row.threads for row in chains}):
        chosen = _of_one_run(chains, 1, threads)
        charts[f"peak_share_threads{threads}"] = _shares(chosen, threads)
        charts[f"roofline_threads{threads}"] = _roofline(chosen, threads)
    for threads in tables.layer_threads(rows):
        charts[f"operators_threads{threads}"] = _operators(rows, threads)
    return {name: figure for name, figure in charts.items() if figure is not None}


def _of_one_run(rows: Sequence[Row], batch: int, threads: int) -> list[Row]:
    same = (row for row in rows if (row.batch, row.threads) == (batch, threads))
    return results.latest(results.fullest_run(same))


# ---- Networks ------------------------------------------------------------------------------------


def _accuracy(rows: Sequence[Row], threads: int):
    """The paper's first figure: accuracy over latency, here of every network at its fastest."""
    figures = published.read()
    sizes = [f"fasternet_{size}" for size in workloads.NETWORKS]
    points = {}
    for name in [*sizes, *(system.name for system in zoo.SYSTEMS)]:
        row = tables.fastest(rows, name, threads)
        if row is not None:
            points[name] = row
    others = [name for name in points if not name.startswith("fasternet")]
    if len(others) < 2 or not set(points) & set(sizes):
        return None
    figure = _figure(8.5, 5.6)
    panel = figure.subplots()
    placed: list[tuple[float, float, str]] = []
    for name in others:
        colour, marker = next(style for start, style in FAMILIES.items() if name.startswith(start))
        x, y = points[name].median_ms, figures.number(name, "top1")
        panel.plot(x, y, marker, color=colour, markersize=7, markeredgecolor="black", mew=0.5)
        placed.append((x, y, tables.LABELS[name]))
    for label, style, ours in (
        ("FasterNet, fasternet_kernels", {"color": BLUE, "marker": "*", "markersize": 13}, True),
        (
            "FasterNet, fastest other runtime",
            {"color": "black", "marker": "o", "linestyle": "--", "fillstyle": "none"},
            False,
        ),
    ):
        line = []
        for name in sizes:
            row = tables.fastest(rows, name, threads, ours)
            if row is not None:
                line.append((row.median_ms, figures.number(name, "top1"), name))
        panel.plot([p[0] for p in line], [p[1] for p in line], label=label, zorder=3, **style)
        placed += [
            (x, y, name.removeprefix("fasternet_").upper() if ours else "") for x, y, name in line
        ]
    panel.set_xscale("log")
    panel.set_xlabel("milliseconds per image, less is better")
    panel.set_ylabel("published ImageNet-1k top-1, %")
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.xaxis.set_minor_formatter(
        lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else ""
    )
    panel.margins(x=0.09)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=9, loc="lower right")
    panel.set_title(
        f"Accuracy and latency, batch 1, {report.threads_text(threads)}: each network on the "
        "runtime that is fastest for it",
        fontsize=10,
    )
    _label_points(figure, panel, placed)
    return _finish(figure, list(points.values()))


def _label_points(figure, panel, points: Sequence[tuple[float, float, str]]) -> None:
    """Writes each label inside the panel where it covers no other label, no point and no legend, as
    far as there is room."""
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    spots = [panel.transData.transform((x, y)) for x, y, _ in points]
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in spots]
    taken += [legend.get_window_extent().extents for legend in [panel.get_legend()] if legend]
    inside = panel.bbox.extents
    for (px, py), (x, y, label) in zip(spots, points):
        if not label:
            continue
        width, height = 4.4 * len(label) * scale, 9 * scale
        gap = 6 * scale
        corners = [
            ("left", "center", px + gap, py - height / 2),
            ("right", "center", px - gap - width, py - height / 2),
            ("center", "bottom", px - width / 2, py + gap),
            ("center", "top", px - width / 2, py - gap - height),
        ]

        def overlap(corner: tuple, box: tuple, width: float = width, height: float = height):
            left, low = corner[2], corner[3]
            return max(0.0, min(left + width, box[2]) - max(left, box[0])) * max(
                0.0, min(low + height, box[3]) - max(low, box[1])
            )

        def covered(corner: tuple) -> float:
            # What leaves the panel counts like what lies on something.
            return sum(overlap(corner, box) for box in taken) - overlap(corner, inside)

        ha, va, left, low = min(corners, key=covered)
        taken.append((left, low, left + width, low + height))
        offset = {"left": (6, 0), "right": (-6, 0)}.get(ha, (0, 6 if va == "bottom" else -6))
        panel.annotate(
            label, (x, y), offset, textcoords="offset points", ha=ha, va=va, fontsize=7.5
        )


def _speedup(rows: list[Row], threads: int):
    """How many times faster here than eager PyTorch and than the fastest other runtime."""
    series: dict[str, list] = {"fastest other runtime": [], "eager, channels_last": []}
    names = []
    for size in workloads.NETWORKS:
        mine = [r for r in rows if r.workload == f"fasternet_{size}"]
        ours = next((r for r in mine if r.provider == "ours"), None)
        rival = report.best(r for r in mine if not r.provider.startswith("ours"))
        eager = next((r for r in mine if r.provider == "eager_channels_last"), None)
        if ours is None or rival is None:
            continue
        names.append(size.upper())
        series["fastest other runtime"].append(report.compare(rival, ours))
        series["eager, channels_last"].append(report.compare(eager, ours) if eager else None)
    if not names:
        return None
    figure = _figure(7, 4)
    panel = figure.subplots()
    styles = (("#0072B2", ""), ("#E69F00", "//"))
    for index, ((label, ratios), (colour, hatch)) in enumerate(zip(series.items(), styles)):
        shown = [(i, r) for i, r in enumerate(ratios) if r is not None]
        bars = panel.bar(
            [i + 0.4 * index - 0.2 for i, _ in shown],
            [r.value for _, r in shown],
            0.36,
            yerr=[[r.value - r.low for _, r in shown], [r.high - r.value for _, r in shown]],
            capsize=2,
            color=colour,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.5,
            label=f"over {label}",
        )
        panel.bar_label(bars, [f"{r.value:.2f}" for _, r in shown], padding=2, fontsize=8)
    panel.axhline(1, color="black", linewidth=1)
    panel.set_xticks(range(len(names)), [f"FasterNet-{name}" for name in names], fontsize=8)
    panel.set_ylabel("times faster; below 1 is slower")
    panel.margins(y=0.15)
    panel.legend(fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(f"fasternet_kernels, batch 1, {report.threads_text(threads)}", fontsize=10)
    return _finish(figure, rows, "bars: 95 % bootstrap interval of the ratio")


def _latency(rows: list[Row], batch: int, threads: int):
    names = list(dict.fromkeys(row.workload for row in rows))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = _figure(4.2 * columns, 0.8 + 2.4 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for name, panel in zip(names, panels):
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
    figure.suptitle(
        f"Batch {batch}, {report.threads_text(threads)}: milliseconds per call, less is better"
    )
    return _finish(figure, rows, "bars: 20th to 80th percentile")


# ---- Operators and chains ------------------------------------------------------------------------


def _operators(rows: Sequence[Row], threads: int):
    """FLOPS of each operator at the paper's feature maps, at its fastest."""
    at = {side: tables.layer_rows(rows, threads, side) for side in workloads.MAPS}
    bars = [
        ("dense 3x3", "conv3x3", False),
        ("grouped", "gconv3x3", False),
        ("depthwise", "dwconv3x3", False),
        ("PConv, others", "pconv3x3", False),
        ("PConv, here", "pconv3x3", True),
        ("depthwise + 1x1", "dwconv_pw", False),
        ("PConv + 1x1, others", "pconv_pw", False),
        ("PConv + 1x1, here", "pconv_pw", True),
    ]
    colours = [GREY, "#F0E442", "#E69F00", "#56B4E9", BLUE, "#CC79A7", "#009E73", ORANGE]
    figure = _figure(9, 4.4)
    panel = figure.subplots()
    width = 0.86 / len(bars)
    shown = []
    for index, ((label, operator, ours), colour) in enumerate(zip(bars, colours)):
        places, heights = [], []
        for place, side in enumerate(workloads.MAPS):
            row = report.best(
                r for r in at[side].get(operator, ()) if r.provider.startswith("ours") == ours
            )
            if row is not None:
                places.append(place + (index - (len(bars) - 1) / 2) * width)
                heights.append(row.gflop_per_s)
                shown.append(row)
        panel.bar(
            places,
            heights,
            width,
            color=colour,
            hatch=HATCHES[index],
            edgecolor="black",
            linewidth=0.4,
            label=label,
        )
    peaks = [row.peak_gflop_per_s for row in shown if row.peak_gflop_per_s is not None]
    if peaks:
        panel.axhline(np.median(peaks), color="black", linewidth=1, linestyle="--")
        panel.annotate(
            "FMA peak", (0.995, np.median(peaks)), xycoords=("axes fraction", "data"),
            ha="right", va="bottom", fontsize=8,
        )  # fmt: skip
    panel.set_yscale("log")
    for set_formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        set_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "125" else "")
    panel.set_ylabel("GFLOP/s")
    panel.set_xticks(range(len(at)), [f"{c} x {s} x {s}" for c, s in at])
    panel.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.09))
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(
        f"Ten layers of one operator, batch 1, {report.threads_text(threads)}, each by who is "
        "fastest",
        fontsize=10,
    )
    return _finish(figure, shown)


def _roofline(rows: list[Row], threads: int):
    """Chains of blocks under what the machine can compute and copy."""
    rows = [r for r in rows if r.gb_per_s and r.copy_gb_per_s and r.provider.startswith("ours")]
    if not rows:
        return None
    peak = float(np.median([row.peak_gflop_per_s for row in rows]))
    copy = float(np.median([row.copy_gb_per_s for row in rows]))
    figure = _figure(8, 4.8)
    panel = figure.subplots()
    intensity = [row.gflop_per_s / row.gb_per_s for row in rows]
    x = np.geomspace(min(1.0, peak / copy / 4), 1.3 * max(intensity), 200)
    panel.plot(x, np.minimum(peak, copy * x), color="black", linewidth=1.2)
    panel.annotate(f"FMA peak, {peak:.0f} GFLOP/s", (x[0], peak), (2, 3), fontsize=8,
                   textcoords="offset points")  # fmt: skip
    panel.annotate(f"copy, {copy:.0f} GB/s", (x[0], copy * x[0]), (8, -4), fontsize=8,
                   textcoords="offset points", va="top")  # fmt: skip
    markers = ("o", "s", "^", "D")
    for provider, about in PROVIDERS.items():
        for stage in range(1, workloads.STAGES + 1):
            for act in ("relu", "gelu"):
                chosen = [
                    (row, value)
                    for row, value in zip(rows, intensity)
                    if row.provider == provider and row.workload.endswith(f"stage{stage}_{act}")
                ]
                if chosen:
                    panel.plot(
                        [value for _, value in chosen],
                        [row.gflop_per_s for row, _ in chosen],
                        markers[stage - 1],
                        color=about.colour,
                        fillstyle="full" if act == "relu" else "none",
                        label=f"{about.label}, stage {stage}, {act}",
                    )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xlabel("FLOP per byte that has to be moved (weights once, maps in and out)")
    panel.set_ylabel("GFLOP/s, direct method")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7, ncols=2, loc="lower right")
    panel.set_title(
        f"Chains of {workloads.CHAIN_BLOCKS} blocks, batch 1, {report.threads_text(threads)}",
        fontsize=10,
    )
    return _finish(figure, rows, "what fits a cache is moved faster than a copy of large arrays")


def _shares(rows: list[Row], threads: int):
    figure = _figure(8, 4.5)
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
    panel.set_title(f"Chains of blocks, batch 1, {report.threads_text(threads)}")
    return _finish(figure, rows)


# ---- All of them ---------------------------------------------------------------------------------


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _finish(figure, rows: Sequence[Row], note: str = ""):
    """The figure with a caption: where, when and by what its rows were measured."""
    newest = max(rows, key=lambda row: row.date)
    caption = (
        f"{newest.processor}, {newest.isa}, torch {newest.torch}, float32, {newest.date[:10]}, "
        f"commit {newest.commit or 'unknown'}\nmedians of interleaved bursts"
    )
    figure.supxlabel(f"{caption}; {note}" if note else caption, fontsize=8)
    return figure


def save(charts: Mapping[str, object], folder: Path, endings: Sequence[str]) -> list[Path]:
    """Writes figures to <folder>/<name>.<ending>; returns the files."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in charts.items():
        for ending in endings:
            files.append(folder / f"{name}.{ending}")
            if ending == "svg":
                # No ids from random numbers and no date: the same rows, the same file.
                with matplotlib.rc_context({"svg.hashsalt": "fasternet_kernels"}):
                    figure.savefig(files[-1], metadata={"Date": None})
            else:
                figure.savefig(files[-1], dpi=150)
    return files
