"""The command `fasternet-kernels`: info, check and demo.

    fasternet-kernels info     what is installed and which kernels run here
    fasternet-kernels check    every operator of every backend of this machine against the reference
    fasternet-kernels demo     a photograph through FasterNet-T0, before and after `accelerate`

Exit status: 0 when all is well, 1 when something is wrong with the kernels, 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Sequence

import torch

from fasternet_kernels import demo, library
from fasternet_kernels.timing import processor_name

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: the arguments, without the program's name; by default the process's own.

    Returns:
        The exit status. Bad arguments raise SystemExit(2), as argparse does.
    """
    parser = argparse.ArgumentParser(
        prog="fasternet-kernels", description="FasterNet's partial convolution as fused kernels."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed and which kernels run here")
    commands.add_parser("check", help="compare every operator on this machine with the reference")
    demo.add_arguments(
        commands.add_parser("demo", help="a photograph through FasterNet-T0, before and after")
    )
    args = parser.parse_args(argv)
    try:
        if args.command == "info":
            return info()
        if args.command == "check":
            return check()
        return demo.run(args)
    except (OSError, ValueError, ImportError) as error:
        print(f"fasternet-kernels {args.command}: {error}", file=sys.stderr)
        return 2


def info() -> int:
    """Prints versions, the machine, and the state of each backend; returns 0."""
    status = library.status()
    rows = [
        ("fasternet_kernels", _version("fasternet_kernels")),
        ("Python", f"{platform.python_implementation()} {platform.python_version()}"),
        ("platform", platform.platform()),
        ("processor", f"{processor_name()}, {os.cpu_count()} logical processors"),
        ("torch", torch.__version__),
        ("torch threads", str(torch.get_num_threads())),
        ("numpy", _version("numpy")),
        ("compiled kernels", status.path if status.loaded else f"NOT LOADED: {status.reason}"),
        ("instruction set", status.isa or "-"),
        ("available", ", ".join(status.available_isas) or "-"),
        ("compiler", status.compiler or "-"),
        ("fasternet_runtime", _runtime_state()),
        ("triton", _version("triton")),
        ("CUDA", _cuda_state()),
    ]
    _print_table(rows)
    return 0


def check() -> int:
    """Prints one row per operator, backend, dtype and layout; returns 1 on any mismatch."""
    from fasternet_kernels import selftest

    status = library.status()
    if not status.loaded:
        # Without them the reference would be compared with itself, and pass.
        print(f"The compiled kernels are not loaded: {status.reason}", file=sys.stderr)
        return 1
    rows = selftest.run(progress=_progress_line())
    header = ("operator", "backend", "dtype", "layout", "error", "allowed", "", "")
    table = [
        (
            row.op,
            row.backend,
            row.dtype,
            row.layout,
            _number(row.error),
            _number(row.allowed),
            "ok" if row.ok else "WRONG",
            row.detail or "",
        )
        for row in rows
    ]
    _print_table([header, *table])
    wrong = sum(not row.ok for row in rows)
    print(f"\n{len(rows)} checks, {wrong} wrong")
    return 0 if rows and not wrong else 1


def _number(value: object) -> str:
    return f"{value:.2e}" if isinstance(value, float) else str(value)


def _print_table(rows: Iterable[Sequence[str]]) -> None:
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _progress_line():
    """A progress callback that rewrites one line of a terminal; None where there is none."""
    if not sys.stderr.isatty():
        return None

    def show(*what: object) -> None:
        line = " ".join(map(str, what))[:78]
        print(f"\r{line:<78}\r", end="", file=sys.stderr, flush=True)

    return show


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _runtime_state() -> str:
    try:
        import fasternet_runtime
    except ImportError as error:
        return f"not importable: {error}"
    return fasternet_runtime.__file__


def _cuda_state() -> str:
    if not torch.cuda.is_available():
        return "no device" if torch.version.cuda else "not in this build of torch"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"


if __name__ == "__main__":
    sys.exit(main())
