"""Tables that set networks, operators and the paper's claims side by side, from rows alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from bench import published, report, results, workloads, zoo
from bench.providers import PROVIDERS
from bench.results import Row
from bench.stats import Interval

__all__ = [
    "Beside",
    "beside",
    "conclusions_text",
    "errors_text",
    "fastest",
    "layer_rows",
    "layer_threads",
    "left_out_text",
    "networks_text",
    "operators_text",
    "rivals_text",
]

HEADLINE = ("mobilevit_xxs", "mobilenetv2_100", "edgenext_xx_small")
LABELS = {system.name: system.label for system in zoo.SYSTEMS} | {
    f"fasternet_{size}": f"FasterNet-{size.upper()}" for size in workloads.NETWORKS
}
OPERATORS = {
    "conv3x3": "dense 3x3",
    "gconv3x3": "grouped 3x3, 16 groups",
    "dwconv3x3": "depthwise 3x3",
    "pconv3x3": "PConv, split and cat",
    "pconv3x3_slicing": "PConv, slicing",
    "pconv3x3_inplace": "PConv, in place",
    "pconv_pw": "PConv + 1x1",
    "dwconv_pw": "depthwise + 1x1",
}
NOTHING = "Not measured yet: `python -m bench {}`."


# ---- Networks ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Beside:
    """A FasterNet and another network that were measured in turns, batch 1.

    Attributes:
        rival: the other network on its best runtime.
        ours: the FasterNet on this library's kernels.
        general: the FasterNet on the best other runtime, if it was measured in that session.
    """

    rival: Row
    ours: Row
    general: Row | None

    @property
    def ratio(self) -> Interval:
        """How many times faster this library's FasterNet is."""
        return report.compare(self.rival, self.ours)

    @property
    def general_ratio(self) -> Interval | None:
        """How many times faster the FasterNet is without this library."""
        return None if self.general is None else report.compare(self.rival, self.general)


def _latency(rows: Iterable[Row], kind: str) -> list[Row]:
    return [
        row
        for row in rows
        if (row.kind, row.mode, row.dtype, row.batch) == (kind, "latency", "fp32", 1)
    ]


def _networks(rows: Iterable[Row]) -> list[Row]:
    """What tables and charts of networks are made of: one run, whatever the threads."""
    return results.fullest_run(_latency(rows, "network"))


def _sessions(rows: Iterable[Row]) -> list[list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.session, []).append(row)
    return list(found.values())


def beside(rows: Sequence[Row], fasternet: str, rival: str, threads: int) -> Beside | None:
    """The two networks in the fullest of the last sessions that had both, of the fullest run; None
    without one."""
    chosen, size = None, 0
    for session in _sessions(r for r in _networks(rows) if r.threads == threads):
        others = [r for r in session if r.workload == rival and r.ok]
        same = [r for r in session if r.workload == fasternet and r.ok]
        ours = [r for r in same if r.provider == "ours"]
        if others and ours and len(others) >= size:
            size = len(others)
            general = report.best(r for r in same if not r.provider.startswith("ours"))
            chosen = Beside(report.best(others), ours[-1], general)
    return chosen


def _network_threads(rows: Sequence[Row]) -> list[int]:
    names = {system.name for system in zoo.SYSTEMS} - {"mobilenetv2_100"}
    found = {row.threads for row in _networks(rows) if row.workload in names}
    return sorted(found)


def rivals_text(rows: Sequence[Row]) -> str:
    """README's table: T0 beside the networks that its paper's headline names."""
    threads = _network_threads(rows)
    if not threads:
        return NOTHING.format("networks")
    figures = published.read()
    t0 = figures.number("fasternet_t0", "paper_cpu_ms")
    header = ["", "top-1", "in the paper"]
    for n in threads:
        where = report.threads_text(n)
        header += [f"{where}, T0 on other runtimes", f"{where}, T0 here"]
    lines = [header]
    for name in HEADLINE:
        paper = figures.number(name, "paper_cpu_ms")
        line = [LABELS[name], f"{figures.get(name, 'top1').value} %", f"{paper / t0:.2f}x"]
        for n in threads:
            pair = beside(rows, "fasternet_t0", name, n)
            line += ["-", "-"] if pair is None else [_ratio(pair.general_ratio), str(pair.ratio)]
        lines.append(line)
    top1 = figures.get("fasternet_t0", "top1").value
    return (
        f"How many times faster FasterNet-T0 ({top1} % top-1) is than each network, each on "
        "the faster of ONNX Runtime and OpenVINO (FasterNet-T0 and MobileNetV2 also on eager "
        "PyTorch), batch 1; below 1 it is slower. MobileViT and EdgeNeXt read 256 x 256 pixels. "
        f"The paper measured eager PyTorch on one thread.\n\n{report.markdown(lines)}"
    )


def _ratio(ratio: Interval | None) -> str:
    return "-" if ratio is None else str(ratio)


def networks_text(rows: Sequence[Row]) -> str:
    """All networks by published accuracy: latency on the best runtime, and the FasterNet beside."""
    threads = _network_threads(rows)
    if not threads:
        return NOTHING.format("networks")
    figures = published.read()
    header = ["", "top-1, %", "GMACs", "paper's CPU, ms"]
    for n in threads:
        header += [f"{report.threads_text(n)}, ms", "on"]
    header += [f"FasterNet here, times faster, {report.threads_text(n)}" for n in threads]
    names = [system.name for system in zoo.SYSTEMS]
    names += [f"fasternet_{size}" for size in workloads.NETWORKS]
    names.sort(key=lambda name: figures.number(name, "top1"))
    systems = {system.name: system for system in zoo.SYSTEMS}
    lines, failures = [header], []
    for name in names:
        ours = name.startswith("fasternet")
        line = [f"**{LABELS[name]}**" if ours else LABELS[name]]
        for quantity in ("top1", "gmacs", "paper_cpu_ms"):
            figure = figures.get(name, quantity)
            line.append("-" if figure is None else figure.value)
        ratios = []
        for n in threads:
            row = fastest(rows, name, n)
            runtime = "" if row is None else PROVIDERS[row.provider].label
            line += ["-", "-"] if row is None else [report.milliseconds(row), runtime]
            if row is None:
                failures += _failures(rows, name, n)
            pair = None if ours else beside(rows, f"fasternet_{systems[name].beside}", name, n)
            label = "" if ours else f" ({systems[name].beside.upper()})"
            ratios.append("-" if pair is None else f"{pair.ratio}{label}")
        lines.append(line + ratios)
    text = report.markdown(lines)
    if failures:
        text += "\n\n" + "\n".join(f"- {failure}" for failure in dict.fromkeys(failures))
    return text


def fastest(rows: Sequence[Row], name: str, threads: int, ours: bool | None = None) -> Row | None:
    """A network's fastest row, in the fullest of its last sessions, of the fullest run; `ours`
    leaves this library's rows or those of others. Of this library the default tier counts."""
    mine = [
        r
        for r in _networks(rows)
        if (r.workload, r.threads) == (name, threads) and r.provider != "ours_fast"
    ]
    sessions = _sessions(mine)
    if not sessions:
        return None
    fullest = max(reversed(sessions), key=lambda session: sum(r.ok for r in session))
    return report.best(r for r in fullest if ours is None or r.provider.startswith("ours") == ours)


def _failures(rows: Sequence[Row], name: str, threads: int) -> list[str]:
    return [
        f"{LABELS[name]}, {PROVIDERS[row.provider].label}: {row.status}"
        for row in _networks(rows)
        if (row.workload, row.threads) == (name, threads) and not row.ok
    ]


def left_out_text() -> str:
    """The footnote: systems that were not measured, why, and what was published."""
    figures = published.read()
    parts = []
    for name in figures.subjects("left_out"):
        reason, known = figures.get(name, "left_out"), figures.get(name, "published")
        about = f"{known.value}; " if known else ""
        parts.append(f"{name} ({about}{reason.value}; {reason.source})")
    return f"Not measured: {', '.join(parts)}."


def errors_text(rows: Sequence[Row]) -> str:
    """Relative L2 error of each provider's logits against float64, batch 1, one thread."""
    sizes = [f"fasternet_{size}" for size in workloads.NETWORKS]
    last = [r for r in _latency(results.latest(rows), "network") if r.ok and r.threads == 1]
    found = {(r.workload, r.provider): r.error_rel_l2 for r in last if r.workload in sizes}
    if not found:
        return NOTHING.format("networks")
    providers = [p for p in PROVIDERS if any(key[1] == p for key in found)]
    lines = [["", *(PROVIDERS[p].label for p in providers)]]
    for name in sizes:
        errors = [found.get((name, p)) for p in providers]
        if any(error is not None for error in errors):
            cells = ["-" if error is None else f"{error:.1e}" for error in errors]
            lines.append([LABELS[name], *cells])
    return report.markdown(lines)


# ---- Operators -----------------------------------------------------------------------------------


def layer_rows(rows: Sequence[Row], threads: int, side: tuple[int, int]) -> dict[str, list[Row]]:
    """operator -> its rows with a number at one feature map, all of the fullest last session in the
    fullest run."""
    ending = f"_{side[0]}x{side[1]}"
    run = results.fullest_run(row for row in _latency(rows, "layers") if row.threads == threads)
    mine = [row for row in run if row.workload.endswith(ending)]
    sessions = _sessions(mine)
    if not sessions:
        return {}
    fullest = max(reversed(sessions), key=lambda session: sum(r.ok for r in session))
    found: dict[str, list[Row]] = {}
    for row in fullest:
        if row.ok:
            found.setdefault(row.workload.removesuffix(ending), []).append(row)
    return found


def layer_threads(rows: Sequence[Row]) -> list[int]:
    """Numbers of threads for which the table of operators was measured."""
    return sorted({row.threads for row in _latency(rows, "layers")})


def _ways(operator: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(label, providers of which the faster counts) of an operator's lines."""
    eager = ("eager, the faster layout", workloads.EAGER)
    compiled = ("compiled", ("torch_compile",))
    runtimes = ("ONNX Runtime or OpenVINO", ("onnxruntime", "openvino"))
    ours = ("fasternet_kernels", ("ours",))
    able = workloads.find(f"{operator}_96x56").providers
    return tuple(way for way in (eager, compiled, runtimes, ours) if set(way[1]) & set(able))


def operators_text(rows: Sequence[Row]) -> str:
    """The paper's Table 1 and its table of PConv with 1x1, ten layers each: time and FLOPS."""
    if not layer_threads(rows):
        return NOTHING.format("operators")
    figures = published.read()
    parts = []
    for threads in layer_threads(rows):
        at = {side: layer_rows(rows, threads, side) for side in workloads.MAPS}
        maps = [f"{c}x{s}x{s}" for c, s in workloads.MAPS]
        lines = [["ten layers", "by", *maps]]
        for operator, label in OPERATORS.items():
            cells = [figures.get(f"{operator}_{c}x{s}", "paper_cpu_ms") for c, s in workloads.MAPS]
            if threads == 1 and all(cells):
                lines.append([label, "the paper, i9-9900X, eager", *(f.value for f in cells)])
            for way, providers in _ways(operator):
                line = [label, way]
                for side in workloads.MAPS:
                    row = _by(at[side], operator, providers)
                    line.append(
                        "-"
                        if row is None
                        else f"{report.milliseconds(row)} ({row.gflop_per_s:.0f})"
                    )
                lines.append(line)
        peaks = [r.peak_gflop_per_s for found in at.values() for rs in found.values() for r in rs]
        peaks = sorted(peak for peak in peaks if peak is not None)
        peak = f"; the FMA peak was {peaks[len(peaks) // 2]:.0f} GFLOP/s" if peaks else ""
        title = (
            f"Batch 1, {report.threads_text(threads)}: milliseconds, in brackets GFLOP/s"
            f" (direct method, two for a multiply-add{peak})"
        )
        parts.append(f"{title}\n\n{report.markdown(lines)}\n\n{_fair(at, threads)}")
    return "\n\n".join(parts)


def _by(found: dict[str, list[Row]], operator: str, providers: Iterable[str]) -> Row | None:
    return report.best(r for r in found.get(operator, ()) if r.provider in providers)


def _others(found: dict[str, list[Row]], operator: str) -> Row | None:
    """The fastest that is not this library; of PConv out of place, in either form."""
    forms = (operator, "pconv3x3_slicing") if operator == "pconv3x3" else (operator,)
    return report.best(
        r for form in forms for r in found.get(form, ()) if not r.provider.startswith("ours")
    )


def _fair(at: dict[tuple[int, int], dict[str, list[Row]]], threads: int) -> str:
    """PConv + 1x1 against depthwise + 1x1 of the same output width."""
    lines = [["PConv + 1x1 over depthwise + 1x1", *(f"{c}x{s}x{s}" for c, s in workloads.MAPS)]]
    for label, pick in (
        ("both on the fastest other runtime", _others),
        ("PConv + 1x1 here", lambda found, name: _by(found, name, ("ours",))),
    ):
        cells = []
        for side in workloads.MAPS:
            slower, faster = _others(at[side], "dwconv_pw"), pick(at[side], "pconv_pw")
            ratio = report.compare(slower, faster) if slower and faster else None
            cells.append(_ratio(ratio))
        lines.append([label, *cells])
    return (
        "At equal output width, how many times faster PConv with a 1x1 convolution is than a "
        f"depthwise one with a 1x1 convolution, {report.threads_text(threads)}:\n\n"
        f"{report.markdown(lines)}"
    )


# ---- The paper's claims --------------------------------------------------------------------------

# (FasterNet, the other network): what the paper's text and its Table 3 compare on a CPU.
CLAIMS = (
    ("t0", "mobilevit_xxs"),
    ("t0", "edgenext_xx_small"),
    ("t0", "mobilenetv2_100"),
    ("t0", "shufflenet_v2_x1_5"),
    ("t1", "ghostnet_130"),
    ("s", "resnet50"),
    ("s", "convnext_tiny"),
    ("s", "swin_tiny_patch4_window7_224"),
    ("l", "convnext_base"),
    ("l", "swin_base_patch4_window7_224"),
)


def verdict(general: Interval | None, ours: Interval | None, paper: float) -> str:
    """Whether a claim of being `paper` times faster holds: for general runtimes, or with these
    kernels, or not; decided by the intervals."""

    def less(ratio: Interval) -> str:
        return "; less than published" if ratio.high < paper else ""

    if general is not None and general.low > 1:
        return "holds" + less(general)
    if ours is not None and ours.low > 1:
        if general is None:
            return "holds with these kernels; others not measured" + less(ours)
        if general.high < 1:
            return "only with these kernels" + less(ours)
        return "holds with these kernels; undecided without" + less(ours)
    known = [ratio for ratio in (general, ours) if ratio is not None]
    if not known:
        return "not measured"
    if all(ratio.high < 1 for ratio in known):
        return "does not hold"
    return "undecided: the interval holds 1"


def conclusions_text(rows: Sequence[Row]) -> str:
    """Each of the paper's claims about speed on a CPU, on one thread as the paper measured."""
    figures = published.read()
    lines = [["claim", "the paper", "general runtimes", "with these kernels", "verdict"]]
    for size, rival in CLAIMS:
        name = f"fasternet_{size}"
        paper = figures.number(rival, "paper_cpu_ms") / figures.number(name, "paper_cpu_ms")
        pair = beside(rows, name, rival, 1)
        general, ours = (None, None) if pair is None else (pair.general_ratio, pair.ratio)
        words = verdict(general, ours, paper)
        claim = f"{LABELS[name]} is faster than {LABELS[rival]}"
        lines.append([claim, f"{paper:.2f}x", _ratio(general), _ratio(ours), words])
    for claim, quantity, operator, other in (
        ("PConv does more FLOPS than depthwise", "flops", "pconv3x3", "dwconv3x3"),
        ("PConv does more FLOPS than grouped (eager)", "flops", "pconv3x3", "gconv3x3"),
        ("PConv takes less time than dense 3x3 (eager)", "time", "pconv3x3", "conv3x3"),
        ("PConv takes less time than depthwise (not claimed)", "time", "pconv3x3", "dwconv3x3"),
        ("PConv + 1x1 takes less time than depthwise + 1x1", "time", "pconv_pw", "dwconv_pw"),
    ):
        for channels, side in workloads.MAPS:
            found = layer_rows(rows, 1, (channels, side))
            paper = _paper_layers(quantity, operator, other, (channels, side))
            general = _layer_ratio(quantity, _others(found, operator), _others(found, other))
            mine = _by(found, operator, ("ours",))
            ours = _layer_ratio(quantity, mine, _others(found, other))
            words = verdict(general, ours, 1.0 if paper is None else paper)
            where = f"{claim}, {channels}x{side}x{side}"
            shown = "-" if paper is None else f"{paper:.2f}x"
            lines.append([where, shown, _ratio(general), _ratio(ours), words])
    return report.markdown(lines)


def _layer_ratio(quantity: str, one: Row | None, other: Row | None) -> Interval | None:
    """How many times less time one takes than the other, or how many times more FLOPS it does."""
    ratio = report.compare(other, one) if one and other else None
    if ratio is None or quantity == "time":
        return ratio
    return Interval(*(value * one.gflop / other.gflop for value in ratio))


def _paper_layers(quantity: str, operator: str, other: str, side: tuple[int, int]) -> float | None:
    figures = published.read()

    def number(name: str, what: str) -> float | None:
        return figures.number(f"{name}_{side[0]}x{side[1]}", what)

    one, two = number(operator, "paper_cpu_ms"), number(other, "paper_cpu_ms")
    if one is None or two is None:
        return None
    ratio = two / one
    if quantity == "flops":
        ratio *= number(operator, "mmacs") / number(other, "mmacs")
    return ratio
