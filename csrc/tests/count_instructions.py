"""Counts the AArch64 instructions of one FasterNet-T0 forward under QEMU, kernels and plain loops.

    python csrc/tests/count_instructions.py BUILD_FOLDER PLUGIN RESULTS EMULATOR...

BUILD_FOLDER holds the program `count_instructions`, PLUGIN is qemu_count.c built for the host,
EMULATOR the command that runs programs for AArch64. A count is that of a process with two forwards
less that of a process with one, so start-up, random weights and packing cancel and all scratch is
allocated. Prints a table and appends it to RESULTS, a CSV.
"""

import csv
import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LOGITS = 1000

# (the row's name, the program's argument, FASTERNET_KERNELS_ISA)
WAYS = [
    ("kernels, NEON", "kernels", "neon"),
    ("kernels, generic", "kernels", "generic"),
    ("plain loops, output channels innermost", "rows", "neon"),
    ("plain loops, input channels innermost", "dots", "neon"),
]


def output(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def git(*arguments: str) -> str:
    """What git prints; nothing where the sources are not a checkout."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def forward_instructions(program: list[str], plugin: Path, way: str, isa: str) -> int:
    """Instructions of one warm forward."""
    counts = []
    for runs in (1, 2):
        result = subprocess.run(
            [*program[:-1], "-plugin", str(plugin), program[-1], way, str(runs)],
            env={**os.environ, "FASTERNET_KERNELS_ISA": isa},
            capture_output=True,
            text=True,
            check=False,
        )
        found = re.search(r"^instructions (\d+)$", result.stderr, re.MULTILINE)
        if result.returncode or not found:
            raise SystemExit(f"count_instructions {way} {runs} failed:\n{result.stderr}")
        counts.append(int(found[1]))
    return counts[1] - counts[0]


def compiler(build: Path) -> str:
    """Name and version of the compiler of a CMake build."""
    for line in (build / "CMakeCache.txt").read_text().splitlines():
        if line.startswith("CMAKE_CXX_COMPILER:"):
            return output(line.partition("=")[2], "--version").splitlines()[0]
    raise SystemExit(f"{build} is not a CMake build")


def main(build: Path, plugin: Path, results: Path, *emulator: str) -> None:
    """Checks the program's answers, counts, prints and appends."""
    program = [*emulator, str(build / "count_instructions")]
    subprocess.run([*program, "check"], check=True)
    multiply_adds = int(output(*program, "multiply_adds"))
    provenance = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": git("rev-parse", "--short=12", "HEAD"),
        # Counts of an earlier run do not make the sources dirty.
        "dirty": bool(git("status", "--porcelain", "-uno", "--", ".", ":(exclude)bench/results")),
        "compiler": compiler(build),
        "emulator": output(emulator[0], "--version").splitlines()[0],
    }
    rows = []
    print(f"FasterNet-T0, batch 1, 224x224, float32: {multiply_adds:,} multiply-adds")
    print(f"{'':40} {'instructions':>15} {'per multiply-add':>18} {'per logit':>12}")
    for name, way, isa in WAYS:
        count = forward_instructions(program, plugin, way, isa)
        print(
            f"{name:40} {count:15,} {count / multiply_adds:18.3f} {count / LOGITS:12,.0f}",
            flush=True,
        )
        rows.append(
            {
                **provenance,
                "what": name,
                "instructions": count,
                "multiply_adds": multiply_adds,
                "per_multiply_add": round(count / multiply_adds, 4),
                "per_logit": round(count / LOGITS),
            }
        )
    new = not results.exists()
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) < 5:
        raise SystemExit(__doc__)
    main(*map(Path, sys.argv[1:4]), *sys.argv[4:])
