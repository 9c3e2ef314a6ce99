"""The demo: one photograph through FasterNet-T0, eager and accelerated.

It first shows that both give the same answer, by the error of each against a float64 run of the
same network. Only then are they timed, beside the other ways PyTorch offers, and the chart drawn.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fasternet_kernels import library, models, timing
from fasternet_kernels.selftest import Errors, allowed_errors, errors

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["add_arguments", "run"]

IMAGE_SIZE = 224
OURS = "fasternet_kernels"
COMPILED = "torch.compile, freezing"
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "eager, NCHW": "#999999",
    "eager, channels_last": "#56B4E9",
    COMPILED: "#E69F00",
    OURS: "#0072B2",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to a parser."""
    parser.add_argument(
        "--image", type=Path, help="a picture; by default one that scikit-learn ships"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="FasterNet-T0 weights, timm's or the official repository's; by default random ones",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo_output"), help="folder for the chart (%(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, and without torch.compile"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo with parsed arguments.

    Returns:
        0 if the accelerated network agrees with the eager one; 1 if it does not, or if there are
        no compiled kernels to show.

    Raises:
        ImportError: a package of the extra [demo] is missing.
        OSError, ValueError: the picture or the checkpoint cannot be read.
    """
    _require_packages()
    status = library.status()
    if not status.loaded:
        print(f"The compiled kernels are not loaded: {status.reason}", file=sys.stderr)
        return 1
    import fasternet_kernels as fk

    picture, picture_name = _open_picture(args.image)
    x = _preprocess(picture)
    model = _build_model(args.checkpoint)
    weights = args.checkpoint.name if args.checkpoint else "random weights"
    machine = f"{timing.processor_name()}, {status.isa}, torch {torch.__version__}"
    size = f"batch 1, {IMAGE_SIZE}x{IMAGE_SIZE}, float32"
    print(f"FasterNet-T0, {weights}, {picture_name}, {size}\n{machine}\n")

    accelerated = fk.accelerate(copy.deepcopy(model))
    print(f"{fk.report(accelerated)}\n")
    with torch.no_grad():
        calls = _operators_called(accelerated, x)
        if not calls:
            print(
                "The accelerated network calls none of this library's operators.", file=sys.stderr
            )
            return 1
        called = ", ".join(f"{name} x {count}" for name, count in calls.items())
        print(f"Operators in one forward pass: {called}\n")
        judge = Judge(model, x)
        if not _compare(judge, accelerated(x)):
            return 1
        results = _time_all(model, accelerated, x, judge, quick=args.quick)
    if any(OURS not in timings for timings in results.values()):
        return 1
    _print_latencies(results)
    chart = _draw(results, f"FasterNet-T0, {size}", machine, args.out)
    print(f"\nChart: {chart}")
    return 0


# ---- The picture and the network -----------------------------------------------------------------


def _require_packages() -> None:
    needed = {
        "matplotlib": "matplotlib",
        "PIL": "pillow",
        "sklearn": "scikit-learn",
        "tqdm": "tqdm",
    }
    missing = [package for name, package in needed.items() if not importlib.util.find_spec(name)]
    if missing:
        raise ImportError(f"needs {', '.join(missing)}: pip install 'fasternet_kernels[demo]'")


def _open_picture(path: Path | None) -> tuple[Image, str]:
    """The picture at `path`, or a photograph of a temple in China, and what to call it."""
    from PIL import Image, ImageOps
    from sklearn.datasets import load_sample_image

    if path is None:
        return Image.fromarray(load_sample_image("china.jpg")), "scikit-learn's china.jpg"
    with Image.open(path) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB"), path.name


def _preprocess(picture: Image) -> Tensor:
    """Shorter side to 256, centre crop, ImageNet's mean and deviation: (1, 3, 224, 224) float32."""
    from PIL import Image

    scale = 256 / min(picture.size)
    picture = picture.resize(
        [round(side * scale) for side in picture.size], Image.Resampling.BICUBIC
    )
    left, top = ((side - IMAGE_SIZE) // 2 for side in picture.size)
    picture = picture.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)) / 255
    mean = torch.tensor([0.485, 0.456, 0.406])
    deviation = torch.tensor([0.229, 0.224, 0.225])
    return ((pixels - mean) / deviation).permute(2, 0, 1)[None].contiguous()


def _build_model(checkpoint: Path | None) -> nn.Module:
    """FasterNet-T0 in eval mode, with the checkpoint's weights or random ones."""
    torch.manual_seed(0)
    model = models.fasternet_t0()
    if checkpoint is not None:
        models.load_checkpoint(model, checkpoint)
    else:
        _randomise(model)
    return model.eval()


def _randomise(model: nn.Module) -> None:
    """Weights and statistics under which every layer matters to the answer.

    The initial ones, made for training, let the blocks contribute almost nothing, so that a wrong
    block could pass for a right one.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


# ---- Agreement -----------------------------------------------------------------------------------


class Judge:
    """Decides whether logits are right, by the errors that eager PyTorch itself makes in float32.

    Errors are the L2 norm of the difference and its largest absolute value. Each may be at most
    twice the larger of what eager makes in its two layouts, plus one unit in the last place of the
    largest logit.
    """

    def __init__(self, model: nn.Module, x: Tensor):
        channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        self.reference = copy.deepcopy(model).double()(x.double())
        self.eager = {
            "eager, NCHW": model(x),
            "eager, channels_last": channels_last(x.to(memory_format=torch.channels_last)),
        }

    def error(self, logits: Tensor) -> Errors:
        """Errors of logits of the reference's shape."""
        return errors(logits, self.reference)

    def allowed(self, factor: float = 2.0) -> Errors:
        """The largest right errors."""
        rivals = [self.error(logits) for logits in self.eager.values()]
        return allowed_errors(self.reference, torch.float32, rivals, factor)

    def accepts(self, logits: Tensor, factor: float = 2.0) -> bool:
        """Whether both errors are allowed; NaN is not."""
        return self.error(logits).within(self.allowed(factor))


def _compare(judge: Judge, logits: Tensor) -> bool:
    """Prints the answers and their errors; returns whether the accelerated network's is right."""

    norm = judge.reference.norm().item()

    def row(name: str, error: Errors | None, logits: Tensor | None) -> None:
        numbers = f"{error.l2 / norm:12.2e} {error.maximum:12.2e}" if error else " " * 25
        top = "" if logits is None else " ".join(map(str, logits[0].topk(5).indices.tolist()))
        print(f"{name:<28}{numbers}   {top}".rstrip())

    print(f"{'Answers':<28}{'relative L2':>12} {'max error':>12}   top-5 classes")
    row("eager, float64", None, judge.reference)
    for name, answer in judge.eager.items():
        row(name, judge.error(answer), answer)
    row(OURS, judge.error(logits), logits)
    row("allowed: 2 x eager + 1 ulp", judge.allowed(), None)
    agrees = judge.accepts(logits)
    print(
        f"The accelerated network {'agrees' if agrees else 'does NOT agree'} with the eager one.\n"
    )
    return agrees


def _operators_called(model: nn.Module, x: Tensor) -> Counter[str]:
    """How often one forward pass calls each of this library's operators.

    Counted by a function mode: under a dispatch mode an accelerated network takes its blocks one by
    one, for that mode to see them.
    """
    calls: Counter[str] = Counter()

    class Count(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            namespace, _, name = str(function).partition(".")
            if namespace == "fasternet_kernels":
                calls[name.removesuffix(".default")] += 1
            return function(*args, **(kwargs or {}))

    model(x)  # the first pass packs the weights
    with Count():
        model(x)
    return calls


# ---- Latency -------------------------------------------------------------------------------------


def _time_all(
    model: nn.Module, accelerated: nn.Module, x: Tensor, judge: Judge, quick: bool
) -> dict[int, dict[str, timing.Timing]]:
    """threads -> name -> latency of those that answer right, on one thread and on all."""
    all_threads = torch.get_num_threads()
    results = {}
    try:
        for threads in sorted({1, all_threads}):
            torch.set_num_threads(threads)
            results[threads] = _time(model, accelerated, x, judge, quick)
    finally:
        torch.set_num_threads(all_threads)
    return results


def _time(
    model: nn.Module, accelerated: nn.Module, x: Tensor, judge: Judge, quick: bool
) -> dict[str, timing.Timing]:
    """name -> latency with torch's present number of threads; a wrong answer gets no number."""
    from tqdm import tqdm

    threads = _threads(torch.get_num_threads())
    folded = models.fold_batch_norm(model)
    folded_last = copy.deepcopy(folded).to(memory_format=torch.channels_last)
    x_last = x.to(memory_format=torch.channels_last)
    contenders: dict[str, Callable[[], Tensor]] = {
        "eager, NCHW": lambda: folded(x),
        "eager, channels_last": lambda: folded_last(x_last),
        OURS: lambda: accelerated(x_last),
    }
    if not quick:
        print(f"{threads}: torch.compile at work, about half a minute ...", flush=True)
        try:
            contenders[COMPILED] = _compile(folded_last, x_last)
        except Exception as error:  # a contender that cannot run here is no reason to stop
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            print(f"{threads}: no number for {COMPILED}: {reason}")

    for name, forward in list(contenders.items()):
        # The others need not be as exact as we must, but they have to compute the same network.
        factor = 2.0 if name == OURS else 10.0
        answer = forward()
        if not judge.accepts(answer, factor):
            print(f"{threads}: no number for {name}: {judge.error(answer)} is not right")
            del contenders[name]

    with tqdm(desc=threads, unit="burst", leave=False) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_postfix_str(name, refresh=False)
            bar.update(done - bar.n)

        measured = timing.measure(contenders, rounds=4 if quick else 12, progress=progress)
    return {name: measured[name] for name in COLOURS if name in measured}


def _compile(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A compiled forward pass on `x`, with the weights frozen into it; already warm."""
    import torch._inductor.config as inductor

    # Inductor writes the number of threads into the code it makes: each number, a new compilation.
    torch.compiler.reset()
    compiled = torch.compile(model)
    with inductor.patch({"freezing": True, "cpp.threads": torch.get_num_threads()}):
        compiled(x)
    return lambda: compiled(x)


def _print_latencies(results: dict[int, dict[str, timing.Timing]]) -> None:
    """Two tables: latencies, and how many times faster ours is than each other one."""
    names = [name for name in COLOURS if any(name in timings for timings in results.values())]

    def table(title: str, cell: Callable[[dict[str, timing.Timing], str], str]) -> None:
        print(f"{title:<26}" + "".join(f"{_threads(threads):>24}" for threads in results))
        for name in names:
            cells = [
                cell(timings, name) if name in timings else "-" for timings in results.values()
            ]
            if any(cells):
                print(f"{name:<26}" + "".join(f"{text:>24}" for text in cells))

    def latency(timings: dict[str, timing.Timing], name: str) -> str:
        t = timings[name]
        return f"{t.median * 1e3:.2f} ({t.p20 * 1e3:.2f} to {t.p80 * 1e3:.2f})"

    def speed_up(timings: dict[str, timing.Timing], name: str) -> str:
        if name == OURS:
            return ""
        r = timing.ratio(timings[name], timings[OURS])
        return f"{r.median:.2f}x ({r.p20:.2f} to {r.p80:.2f})"

    print("\nMilliseconds per image: median (20th to 80th percentile). BatchNorm is folded into")
    print("the convolutions in every row; torch.compile, where shown, runs on channels_last.")
    table("Latency", latency)
    print()
    table(f"Speed-up of {OURS}", speed_up)


def _draw(
    results: dict[int, dict[str, timing.Timing]], title: str, machine: str, folder: Path
) -> Path:
    """Writes a bar chart of the latencies to `folder` and returns its path."""
    from matplotlib.figure import Figure

    names = [name for name in COLOURS if any(name in timings for timings in results.values())]
    figure = Figure(figsize=(5.5 * len(results), 3.5), layout="constrained")
    panels = figure.subplots(1, len(results), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (threads, timings) in zip(panels, results.items(), strict=True):
        medians = [t.median * 1e3 for t in timings.values()]
        bars = panel.barh(
            [names.index(name) for name in timings],
            medians,
            xerr=[
                [(t.median - t.p20) * 1e3 for t in timings.values()],
                [(t.p80 - t.median) * 1e3 for t in timings.values()],
            ],
            capsize=3,
            color=[COLOURS[name] for name in timings],
        )
        panel.bar_label(bars, [f"{value:.1f} ms" for value in medians], padding=6)
        panel.set_title(_threads(threads))
        panel.set_xlabel("milliseconds per image, less is better")
        panel.margins(x=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()  # the table's order; the panels share the axis
    figure.suptitle(title)
    figure.supxlabel(
        f"{machine}\nmedian, and 20th to 80th percentile; BatchNorm folded everywhere", fontsize=8
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fasternet_t0_latency.png"
    figure.savefig(path, dpi=150)
    return path


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"
