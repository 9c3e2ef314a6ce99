"""Measures this library against other runtimes, on this machine.

    python -m bench                 the rows that the goals are about, then the goals: 20 minutes
    python -m bench networks        FasterNet beside the networks of other papers: 15 minutes
    python -m bench operators       the paper's table of operators, ten layers each: 10 minutes
    python -m bench blocks          chains of blocks, each stage of each network
    python -m bench parts           where our time goes: stem, stages, merging layers, head
    python -m bench training        a training step of T0 and S, and its goals: 5 minutes
    python -m bench roofline        least times of the GPU kernels, computed, without a GPU
    python -m bench report          the goals, from the CSV
    python -m bench plot            charts, from the CSV
    python -m bench readme          the tables of README and docs/, from the fullest CSV

Rows are appended to bench/results/<device>.csv as they come. Cut off? `--resume` goes on where the
last run ended. Filters: --only t0,s --providers ours,mnn --threads 1 --batch 1 --mode latency.
`operators --only pconv3x3` finds single operators of each stage too.
Ratios compare rows of one session only, and the times of one table or chart are of one run, the
last of those that measured the most of it; trials belong elsewhere, --csv trial.csv. Close
everything else first: what another process takes, some provider loses.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import pages, parts, plot, report, results, session, workloads, zoo
from bench.providers import PROVIDERS
from bench.session import Pool, Spec

__all__ = ["main", "specs"]

KINDS = {"networks": "network", "blocks": "chain", "operators": "operator"}
OURS = tuple(name for name in PROVIDERS if name.startswith("ours"))
# For networks of several papers: every network on its own best runtime, FasterNet here as well.
COMPARED = ("eager_channels_last", "onnxruntime", "openvino", "ours")
RIVALS_PER_SESSION = 4  # beside one FasterNet: what a cut may lose, against what it costs to ready
THREADS = (1, 2, 4, 8, 16)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    args = _parser().parse_args(argv)
    looked = results.ROOT / "build" / "bench" / "quick.csv"  # a look is not published
    usual = results.default_path()
    if args.command == "parts":  # beside the other rows, which tables and charts are made of
        usual = usual.parent / "parts" / usual.name
    path = args.csv or (looked if args.quick else usual)
    try:
        if args.command == "report":
            print(report.text(results.calmest(results.read(path))))
        elif args.command == "training":
            _measure_training(args, path)
        elif args.command == "plot":
            for file in plot.draw(
                results.calmest(results.read(path)), args.out or path.with_suffix("")
            ):
                print(file)
        elif args.command == "roofline":
            _roofline(args)
        elif args.command == "readme":
            fullest = args.csv or results.fullest_file() or path
            pages.update(results.calmest(results.read(fullest)), args.out or results.ROOT)
        else:
            _measure(args, path)
    except (ImportError, OSError, ValueError, session.WorkerError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbench: cut off; what was measured is kept, --resume goes on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    def words(text: str) -> tuple[str, ...]:
        return tuple(word for word in text.split(",") if word)

    def numbers(text: str) -> tuple[int, ...]:
        found = tuple(map(int, words(text)))
        if not found or min(found) < 1:
            raise argparse.ArgumentTypeError(f"expected numbers from 1 on, got {text!r}")
        return found

    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command",
        nargs="?",
        default="goals",
        choices=["goals", *KINDS, "parts", "training", "report", "plot", "readme", "roofline"],
    )
    parser.add_argument("--csv", type=Path, help="results; by default those of this device")
    parser.add_argument("--out", type=Path, help="folder of charts, or of README.md and docs/")
    parser.add_argument(
        "--only", type=words, help="workloads that contain one of these words, such as t0,stage1"
    )
    parser.add_argument("--providers", type=words, help=f"of {', '.join(PROVIDERS)}")
    parser.add_argument("--threads", type=numbers, help="such as 1,2; by default doubled up to all")
    parser.add_argument("--batch", type=numbers, help="images per call, such as 1,16")
    parser.add_argument(
        "--mode",
        choices=["latency", "streams"],
        help="by default latency; streams: processes of one thread each",
    )
    parser.add_argument(
        "--dtype",
        default="fp32",
        choices=list(workloads.DTYPES),
        help="bf16: those that can, beside themselves in fp32",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few short bursts, for a look; into build/bench/quick.csv",
    )
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help="go on with a run, by default the last"
    )
    return parser


def _roofline(args: argparse.Namespace) -> None:
    from bench import calls, roofline  # triton, only here

    if os.environ.get("TRITON_INTERPRET"):
        raise ValueError("TRITON_INTERPRET is set: nothing would be compiled")
    networks = args.only or tuple(workloads.NETWORKS)
    if not set(networks) <= set(workloads.NETWORKS):
        raise ValueError(f"--only {','.join(networks)}: expected {', '.join(workloads.NETWORKS)}")
    wanted = calls.calls(roofline.OPS, networks, args.batch or (256,), ("bf16",))
    found = roofline.rows(sorted(wanted, key=lambda c: list(workloads.NETWORKS).index(c.network)))
    print(roofline.text(found))
    path = args.csv or roofline.PATH
    roofline.write(path, found)
    print(path)


# ---- What is measured ----------------------------------------------------------------------------


def specs(args: argparse.Namespace) -> list[Spec]:
    """The sessions of a command, those with the same number of threads together.

    Raises:
        ValueError: a filter names nothing.
    """
    for name in args.providers or ():
        if name not in PROVIDERS:
            raise ValueError(f"no provider {name!r}; there are {', '.join(PROVIDERS)}")
    if args.command == "goals":
        found = _goal_specs(args)
    elif args.command == "networks" and args.dtype == "fp32":
        found = _network_specs(args)
    elif args.command == "parts":
        found = _part_specs(args)
    elif args.command == "operators":
        found = _layer_specs(args)
        if args.only:
            found += _kind_specs(args, "operator", (*workloads.EAGER, *OURS))
    else:
        found = _kind_specs(args, KINDS[args.command])
    found = [spec for spec in found if any(spec.contenders())]
    if not found:
        raise ValueError("the filters leave nothing to measure")
    return sorted(found, key=lambda spec: spec.threads if spec.mode == "latency" else 1.5)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads(args: argparse.Namespace) -> tuple[int, ...]:
    if args.threads:
        return args.threads
    return tuple(n for n in THREADS if n <= _processors())


def _selected(args: argparse.Namespace, kind: str) -> list[str]:
    """Names of a kind that --only leaves."""
    names = [w.name for w in workloads.all_workloads().values() if w.kind == kind]
    if args.only:
        names = [n for n in names if any(word in n.split("_") or word == n for word in args.only)]
    return names


def _network_specs(args: argparse.Namespace) -> list[Spec]:
    """Each FasterNet with the networks of other papers that are compared with it."""
    selected = _selected(args, "network")
    providers = args.providers or COMPARED
    found = []
    for size in workloads.NETWORKS:
        ours = [name for name in (f"fasternet_{size}",) if name in selected]
        rivals = [s.name for s in zoo.SYSTEMS if s.beside == size and s.name in selected]
        count = -(-len(rivals) // RIVALS_PER_SESSION)
        for part in [rivals[i::count] for i in range(count)] or [[]]:
            for batch in args.batch or (1,):
                for threads in _threads(args):
                    mode = args.mode or "latency"
                    if mode == "latency" or threads > 1:
                        found.append(Spec((*ours, *part), tuple(providers), batch, threads, mode))
    return [spec for spec in found if spec.workloads]


def _layer_specs(args: argparse.Namespace) -> list[Spec]:
    """The paper's table: all operators at one feature map side by side, on one thread and all."""
    selected = _selected(args, "layers")
    providers = args.providers or [
        p for p in PROVIDERS if any(p in (workloads.find(n).providers or ()) for n in selected)
    ]
    found = []
    for channels, side in workloads.MAPS:
        names = tuple(name for name in selected if name.endswith(f"_{channels}x{side}"))
        for threads in args.threads or sorted({1, _processors()}):
            if names:
                found.append(Spec(names, tuple(providers), 1, threads))
    return found


def _kind_specs(
    args: argparse.Namespace,
    kind: str,
    providers: Sequence[str] = tuple(PROVIDERS),
    batches: Sequence[int] = (1,),
    threads: Sequence[int] | None = None,
    modes: Sequence[str] = ("latency", "streams"),
) -> list[Spec]:
    """Every workload of a kind that is ours, as the filters leave them; what follows `kind` are
    defaults."""
    names = _selected(args, kind)
    if kind == "network":
        names = [n for n in names if n.startswith("fasternet") or n == "mobilenetv2_100"]
    providers = args.providers or providers
    dtypes = ("fp32",) if args.dtype == "fp32" else ("fp32", "bf16")
    if args.dtype == "bf16":
        providers = [p for p in providers if "bf16" in PROVIDERS[p].dtypes]
    modes = [args.mode] if args.mode else modes if kind == "network" else ["latency"]
    # Beside T0 and not alone: how the two compare is a ratio of rounds.
    groups = [(n,) for n in names if n != "mobilenetv2_100"]
    if "mobilenetv2_100" in names:
        beside = ("fasternet_t0",)
        groups = [g for g in groups if g != beside] + [(*beside, "mobilenetv2_100")]
        groups.sort(key=lambda group: names.index(group[0]) if group[0] in names else -1)
    found = []
    for batch in args.batch or batches:
        for group in groups:
            if batch != 1 and len(group) > 1:
                group = group[:1]
            for n in threads or _threads(args):
                for mode in modes:
                    if mode == "latency" or (n > 1 and batch == 1):
                        found.append(Spec(group, tuple(providers), batch, n, mode, tuple(dtypes)))
    return found


def _part_specs(args: argparse.Namespace) -> list[Spec]:
    """Each FasterNet with its parts: ours, where no providers are named."""
    if args.mode == "streams":
        raise ValueError("--mode streams: parts are measured one call at a time")
    selected = [name.removeprefix("fasternet_") for name in _selected(args, "network")]
    dtypes = ("fp32",) if args.dtype == "fp32" else ("fp32", "bf16")
    found = []
    for network in workloads.NETWORKS:
        if network in selected:
            names = (f"fasternet_{network}", *(part.workload for part in parts.find(network)))
            for batch, threads in itertools.product(args.batch or (1,), _threads(args)):
                providers = tuple(args.providers or ("ours",))
                found.append(Spec(names, providers, batch, threads, "latency", dtypes))
    return found


def _goal_specs(args: argparse.Namespace) -> list[Spec]:
    """The rows that the goals are about: networks at batch 1 with everybody, at batch 16 without
    eager PyTorch, and chains for their share of the peak alone."""
    compiled = [name for name in PROVIDERS if not name.startswith("eager")]
    found = []
    for batch, providers in ((1, tuple(PROVIDERS)), (16, compiled)):
        if not args.batch or batch in args.batch:
            only = argparse.Namespace(**{**vars(args), "batch": (batch,)})
            found += _kind_specs(only, "network", providers, modes=["latency"])
    if args.mode != "streams":
        found += _kind_specs(args, "chain", OURS, threads=args.threads or (1,))
    return found


def _measure(args: argparse.Namespace, path: Path) -> None:
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("needs tqdm: pip install 'fasternet_kernels[bench]'") from None

    todo = specs(args)
    run = results.now()
    if args.resume is not None:
        run = args.resume or results.newest_run(results.read(path)) or run
    with Pool() as pool:
        busy = session.other_load(pool)
    if busy is not None and busy > results.BUSY:
        print(f"Warning: other processes keep {busy:.1f} processors busy.", file=sys.stderr)
    weights = [spec.expected_seconds(args.quick) for spec in todo]
    minutes = max(1, round(sum(weights) / 60))
    print(f"run {run}, {len(todo)} sessions, about {minutes} min, {path}", flush=True)
    before = dict(zip(todo, itertools.accumulate(weights, initial=0.0)))
    expected = dict(zip(todo, weights))
    with tqdm(
        total=round(sum(weights)),
        bar_format="{l_bar}{bar}| {elapsed}, {remaining} left {postfix}",
        disable=None,
    ) as bar:

        def progress(spec: Spec, what: str, share: float) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update(max(0, before[spec] + share * expected[spec] - bar.n))  # again: it stays

        for spec, rows in session.measure(todo, path, run, progress, args.quick):
            tqdm.write(report.session_text(spec.title, rows))
    if args.command in ("goals", "parts"):
        text = report.text if args.command == "goals" else parts.text
        print(f"\n{text(_of_run(path, run))}")


def _of_run(path: Path, run: str) -> list[results.Row]:
    return results.calmest([row for row in results.read(path) if row.run == run])


def _measure_training(args: argparse.Namespace, path: Path) -> None:
    from bench import training

    run = results.now()
    work = [w for w in training.WORK if not args.only or w[0] in args.only]
    providers = args.providers or tuple(training.LABELS)
    for threads in args.threads or (None,):
        for measured in training.measure(path, run, work, providers, threads, quick=args.quick):
            print(training.session_text(*measured), flush=True)
    print(report.text(_of_run(path, run)))


if __name__ == "__main__":
    sys.exit(main())
