"""Everything there is to do on a machine with a CUDA GPU: `make gpu`, within a budget of nine
minutes.

    make gpu                              all sections, in this order
    make gpu ARGS="--sections tests,tune" some of them
    make gpu ARGS=--resume                what an earlier run left undone
    make gpu ARGS=--dry-run               all of it on the CPU, by Triton's interpreter, at tiny
                                          shapes: no times, nothing written outside --out

    build       csrc/cuda with nvcc, the package with pip; nothing is downloaded
    tests       tests/test_gpu.py, with compute-sanitizer where it is
    peaks       copy bandwidth and matrix rates of this GPU, which the shares below are of
    tune        the configurations of the Triton kernels, written as tuning tables
    operators   PConv beside dense, grouped and depthwise convolutions (the paper's Table 1 shapes)
    blocks      chains of blocks, each stage of each network
    networks    T0 to L in inference
    training    T0 to L, one step
    cpu         the CPU kernels of this machine
    summary     one page of text, from the CSV

Each section is a process of its own with a time of its own: what fails or takes too long costs the
others nothing, and what it has measured by then is in the CSV. Everything goes to --out: by default
$OUT if that is set, else build/gpu.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import results
from bench.workloads import NETWORKS

__all__ = ["SECTIONS", "main"]

# Seconds for each; a section may use what those before it have left, the last ones excepted.
SECTIONS = {
    "build": 70,
    "tests": 130,
    "peaks": 12,
    "tune": 60,
    "operators": 40,
    "blocks": 45,
    "networks": 100,
    "training": 40,
    "cpu": 25,
    "summary": 8,
}
BUDGET = 530
DRY_FACTOR = 20  # more time for all: it is a CPU, perhaps a busy one
LOG = "log.txt"  # what the commands printed
UNFINISHED = 3  # exit status of a section that has left something out


@dataclasses.dataclass
class State:
    """What a run has done so far, in a file of its folder."""

    path: Path
    run: str
    done: dict[str, str] = dataclasses.field(default_factory=dict)  # section -> how it ended

    @classmethod
    def load(cls, folder: Path, resume: bool) -> State:
        path = folder / "state.json"
        if resume and path.exists():
            return cls(path, **json.loads(path.read_text()))
        return cls(path, results.now())

    def finish(self, section: str, how: str) -> None:
        self.done[section] = how
        self.path.write_text(json.dumps({"run": self.run, "done": self.done}, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections; returns 1 if one of them failed."""
    args = _parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
        os.environ["FASTERNET_GPU_DRY_RUN"] = "1"
    if args.worker:
        from bench import gpu_sections

        return gpu_sections.run(args.worker, args)
    if not args.dry_run:
        reason = _no_gpu()
        if reason:
            print(f"make gpu: {reason}. `make gpu ARGS=--dry-run` needs none.", file=sys.stderr)
            return 2

    state = State.load(args.out, args.resume)
    begin, failed, compilers = time.monotonic(), [], []
    factor = DRY_FACTOR if args.dry_run else 1
    for section in args.sections:
        if state.done.get(section) == "ok":
            continue
        left = factor * BUDGET - (time.monotonic() - begin)
        if section != "summary":
            left -= SECTIONS["summary"]
        if left < 5:
            state.finish(section, "no time left")
            continue
        seconds = min(left, args.seconds or factor * SECTIONS[section])
        print(f"\n== {section}, at most {seconds:.0f} s ==", flush=True)
        start = time.monotonic()
        if section != "tests":
            _stop(compilers)  # from here on the GPU is for what is measured
        how = _run(section, args, state, seconds)
        print(f"== {section}: {how}, {time.monotonic() - start:.0f} s ==", flush=True)
        state.finish(section, how)
        if how not in ("ok", "no time left"):
            failed.append(section)
        if section == "build" and {"tests", "networks"} <= set(args.sections):
            # While the tests run, torch.compile fills its cache on disk for `networks`.
            names = ("t0",) if args.dry_run else NETWORKS
            compilers = [_start(args, state, f"compile {name}", BUDGET) for name in names]
    _stop(compilers)
    if failed:
        print(f"make gpu: {', '.join(failed)} failed", file=sys.stderr)
    return int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def sections(text: str) -> tuple[str, ...]:
        names = text.split(",")
        for name in names:
            if name not in SECTIONS:
                raise argparse.ArgumentTypeError(f"no section {name!r}; {', '.join(SECTIONS)}")
        return tuple(name for name in SECTIONS if name in names)

    parser.add_argument("--sections", type=sections, default=tuple(SECTIONS))
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny shapes")
    parser.add_argument("--seconds", type=float, help="for each section, instead of its own time")
    out = Path(os.environ.get("OUT") or results.ROOT / "build" / "gpu")
    parser.add_argument("--out", type=Path, default=out, help="folder of everything written")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the section that this process is
    return parser


def _no_gpu() -> str:
    """Why there is no GPU to work with; "" if there is."""
    code = "import torch; print(torch.version.cuda or 'none', torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return f"no torch: {done.stderr.strip().splitlines()[-1]}"
    version, available = done.stdout.split()[-2:]
    if version == "none":
        return "this torch is built without CUDA"
    return "" if available == "True" else "torch finds no CUDA device"


def _start(
    args: argparse.Namespace, state: State, section: str, seconds: float
) -> subprocess.Popen:
    """A process for one section."""
    command = [sys.executable, "-m", "bench.gpu", "--worker", section, "--run", state.run]
    command += ["--out", str(args.out.resolve()), "--seconds", str(seconds)]
    if args.dry_run:
        command.append("--dry-run")
    return subprocess.Popen(command, cwd=results.ROOT)


def _stop(processes: list[subprocess.Popen]) -> None:
    """Ends the compilers; what they have finished is in the cache."""
    for process in processes:
        process.kill()
        process.wait()
    processes.clear()


def _run(section: str, args: argparse.Namespace, state: State, seconds: float) -> str:
    """Runs one section; returns how it ended, "ok" if well."""
    try:
        if section == "build":
            return _build(args, seconds)
        if section == "tests":
            return _tests(args, seconds)
        if section == "cpu":
            return _cpu(args, seconds)
        process = _start(args, state, section, seconds)
        try:
            status = process.wait(timeout=seconds + 15)
        except subprocess.TimeoutExpired:
            return "took too long"
        finally:
            process.kill()
            process.wait()
        return {0: "ok", UNFINISHED: "no time left"}.get(status, f"exit status {status}")
    except subprocess.TimeoutExpired:
        return "took too long"
    except OSError as error:
        return str(error)


def _call(
    args: argparse.Namespace, command: Sequence[str], seconds: float, also_dry: bool = False
) -> int:
    """Runs a command, what it prints to the log; returns its exit status."""
    skipped = args.dry_run and not also_dry
    print("$", *command, "(not in a dry run)" if skipped else "", flush=True)
    if skipped:
        return 0
    with (args.out / LOG).open("a", encoding="utf-8") as log:
        done = subprocess.run(
            command, cwd=results.ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds
        )
    return done.returncode


def _build(args: argparse.Namespace, seconds: float) -> str:
    if not shutil.which("nvcc"):
        print("no nvcc: csrc/cuda is left out")
    elif _call(args, ["make", "cuda"], seconds):
        print(f"nvcc failed, see {LOG}; going on without csrc/cuda")
    # Editable: tests and bench run from this folder and must find the compiled library in it.
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    pip = [sys.executable, "-m", "pip", "install", *options, "--editable", "."]
    return "ok" if _call(args, pip, seconds) == 0 else f"pip failed, see {LOG}"


def _tests(args: argparse.Namespace, seconds: float) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "tests/test_gpu.py"]
    command += ["-p", "no:cacheprovider"]
    status = _call(args, command, seconds, also_dry=True)
    print((args.out / LOG).read_text().strip().splitlines()[-1])
    return "ok" if status == 0 else f"exit status {status}, see {LOG}"


def _cpu(args: argparse.Namespace, seconds: float) -> str:
    """The CPU kernels beside what runtimes there are, in bench's own way."""
    command = [sys.executable, "-m", "bench", "networks", "--only", "t0", "--batch", "1"]
    command += ["--mode", "latency", "--quick", "--csv", str(args.out.resolve() / "cpu.csv")]
    providers = ["eager_channels_last", "ours"]
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        providers.append("onnxruntime")
    command += ["--providers", ",".join(providers)]
    status = _call(args, command, seconds)
    return "ok" if status == 0 else f"exit status {status}, see {LOG}"


if __name__ == "__main__":
    sys.exit(main())
