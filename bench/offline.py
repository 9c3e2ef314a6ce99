"""The Triton kernels compiled without a GPU, and what stands in their binaries.

    python -m bench.offline --capabilities 9.0,8.6 --networks t0,l --json out.json

The launches of each op are recorded on meta tensors, as they would be made on a GPU of that compute
capability, and compiled with the same specialisation of arguments as a launch has. Launches that
lead to the same binary are compiled once. No TRITON_INTERPRET here: it replaces the compiler.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.calls import BACKWARD, DTYPES, FORWARD, INFERENCE, NETWORKS, Call, calls

__all__ = ["GPUS", "Binary", "Gpu", "Kernel", "binaries", "compile_kernel", "kernels", "record"]


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a launcher asks of a device, by NVIDIA's tables; shared_memory: of one block, bytes."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


# One of each compute capability that the compiler targets.
GPUS = {
    gpu.capability: gpu
    for gpu in (
        Gpu("A100", (8, 0), 108, 163 * 1024),
        Gpu("RTX 3090", (8, 6), 82, 99 * 1024),
        Gpu("RTX 4090", (8, 9), 128, 99 * 1024),
        Gpu("H100", (9, 0), 132, 227 * 1024),
        Gpu("B200", (10, 0), 148, 227 * 1024),
        Gpu("RTX 5090", (12, 0), 170, 99 * 1024),
    )
}
# Tensor-core instructions; on 9.0 and 10.0 the first is the wide kind.
MATRIX = {(9, 0): ("HGMMA", "HMMA"), (10, 0): ("UTCHMMA", "HMMA")}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel to compile: one launch, and the calls that make a launch like it."""

    gpu: Gpu
    launch: Any  # common.Launch
    calls: tuple[Call, ...]

    @property
    def name(self) -> str:
        return self.launch.kernel.__name__


@dataclasses.dataclass(frozen=True)
class Binary:
    """What the compiler made of a kernel.

    Attributes:
        calls: names of some calls that launch it, with dtype and batch.
        constants: of the kernel.
        registers: of a thread. stack, local: bytes of a thread in device memory, 0 without spills.
        shared: bytes of a program. limit: bytes that the device has for it.
        dots: (M, N, K) of each matrix product of the source.
        opcodes: SASS instruction with its modifiers -> how often it stands in the code.
        error: why there is no binary; then the rest is empty.
    """

    kernel: str
    capability: tuple[int, int]
    calls: tuple[str, ...]
    dtypes: tuple[str, ...]
    constants: dict[str, str]
    num_warps: int
    num_stages: int
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    limit: int = 0
    dots: tuple[tuple[int, int, int], ...] = ()
    opcodes: dict[str, int] = dataclasses.field(default_factory=dict)
    error: str = ""

    def count(self, pattern: str) -> int:
        """How many instructions begin with a match of the pattern."""
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.local or self.count("(LDL|STL)"))

    @property
    def matrix_instructions(self) -> str:
        """The kind of tensor-core instruction in the code, or "": the widest of this device."""
        for opcode in MATRIX.get(tuple(self.capability), ("HMMA",)):
            if self.count(opcode):
                return opcode
        return ""

    @property
    def title(self) -> str:
        words = ", ".join(f"{name} {value}" for name, value in self.constants.items())
        number = f"{self.capability[0]}.{self.capability[1]}"
        return f"{self.kernel} on {number} ({words}, {self.num_warps} warps), as in {self.calls[0]}"


# ---- From calls to kernels -----------------------------------------------------------------------


def _specialise(launch, capability: tuple[int, int]):
    """(ASTSource, options, target) as a launch with those arguments would compile."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    backend = make_backend(target)
    kernel = launch.kernel
    given = {**launch.args, "num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bound, specialisation, options = create_function_from_signature(
        kernel.signature, kernel.params, backend
    )(**given, debug=False)
    options, signature, constants, attributes = kernel._pack_args(
        backend, {"debug": False, **given}, bound, specialisation, options
    )
    return ASTSource(kernel, signature, constants, attributes), options, target


def record(call: Call, gpu: Gpu) -> list:
    """The launches of a call on that device."""
    from fasternet_kernels.triton import common, kernel

    with common.record(gpu.capability, gpu.multiprocessors, gpu.shared_memory) as launches:
        kernel(call.op)(*call.arguments("meta"))
    return launches


def key(launch, capability: tuple[int, int]) -> tuple:
    """Launches with equal keys lead to the same binary."""
    source, options, _ = _specialise(launch, capability)
    return capability, source.hash(), options.hash()


def kernels(wanted: Iterable[Call], capabilities: Iterable[tuple[int, int]]) -> list[Kernel]:
    """The different kernels that those calls launch on those devices."""
    found: dict[tuple, list] = {}
    wanted = list(wanted)
    for capability in capabilities:
        gpu = GPUS[capability]
        for call in wanted:
            for launch in record(call, gpu):
                users = found.setdefault(key(launch, capability), [gpu, launch, []])[2]
                users.append(call)
    return [Kernel(gpu, launch, tuple(users)) for gpu, launch, users in found.values()]


# ---- From kernels to binaries --------------------------------------------------------------------


@functools.cache
def _tool(name: str) -> Path:
    """A program of CUDA's toolkit that triton's package carries."""
    import triton.backends.nvidia as nvidia

    path = Path(nvidia.__file__).parent / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"triton's package has no {name} here")
    return path


def read_cubin(cubin: bytes) -> tuple[dict[str, int], dict[str, int]]:
    """(resources, opcodes) of the one kernel in a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def run(tool: str, option: str) -> str:
            command = [_tool(tool), option, path]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", run("cuobjdump", "-res-usage")))
        listing = run("nvdisasm", "-c")
    opcodes = re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE
    )
    return {key: int(value) for key, value in usage.items()}, dict(collections.Counter(opcodes))


def compile_kernel(kernel: Kernel) -> Binary:
    """Compiles a kernel and reads its binary; a failure is in the result."""
    import triton

    launch = kernel.launch
    names = tuple(f"{c.name}, {c.dtype}, batch {c.batch}" for c in kernel.calls)
    parameters = {p.name for p in launch.kernel.params if p.is_constexpr}
    binary = Binary(
        kernel.name,
        kernel.gpu.capability,
        names,
        tuple(sorted({c.dtype for c in kernel.calls})),
        {name: str(value) for name, value in launch.args.items() if name in parameters},
        launch.num_warps,
        launch.num_stages,
        limit=kernel.gpu.shared_memory,
    )
    try:
        source, options, target = _specialise(launch, kernel.gpu.capability)
        compiled = triton.compile(source, target=target, options=options.__dict__)
        usage, opcodes = read_cubin(compiled.asm["cubin"])
        dots = re.findall(
            r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x", compiled.asm["ttir"]
        )
    except Exception as error:  # the compiler has many kinds
        return dataclasses.replace(binary, error=f"{type(error).__name__}: {error}"[:2000])
    return dataclasses.replace(
        binary,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=compiled.metadata.shared,
        dots=tuple(sorted({(int(m), int(n), int(k)) for m, k, n in dots})),
        opcodes=opcodes,
    )


_todo: list[Kernel] = []  # inherited by the workers: a launch holds what cannot be sent


def _compile_number(index: int) -> Binary:
    return compile_kernel(_todo[index])


def binaries(
    todo: Sequence[Kernel], workers: int | None = None, ordered: bool = False
) -> Iterator[Binary]:
    """Compiles all on so many processes, by default one on each processor; as they get done, or in
    order."""
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    _todo[:] = todo
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        run = pool.imap if ordered else pool.imap_unordered
        yield from run(_compile_number, range(len(_todo)))


# ---- The command ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.offline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def words(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, words(text)))

    def capabilities(text: str) -> tuple[tuple[int, int], ...]:
        return tuple((int(a), int(b)) for a, b in (word.split(".") for word in words(text)))

    parser.add_argument("--capabilities", type=capabilities, default=tuple(GPUS))
    parser.add_argument("--networks", type=words, default=tuple(NETWORKS))
    parser.add_argument("--ops", type=words, default=INFERENCE + FORWARD + BACKWARD)
    parser.add_argument("--dtypes", type=words, default=tuple(DTYPES))
    parser.add_argument("--batches", type=numbers, default=(1, 32, 256))
    parser.add_argument("--stages", type=numbers, default=(1, 2, 3, 4))
    parser.add_argument("--workers", type=int)
    parser.add_argument("--json", type=Path, help="writes what was found in the binaries")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")

    wanted = calls(args.ops, args.networks, args.batches, args.dtypes, args.stages)
    todo = kernels(wanted, args.capabilities)
    print(f"{len(todo)} kernels", flush=True)
    found = []
    for binary in binaries(todo, args.workers):
        found.append(binary)
        what = binary.error.splitlines()[0] if binary.error else _summary(binary)
        print(f"{binary.title}: {what}", flush=True)
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(b) for b in found]))
    return int(any(b.error for b in found))


def _summary(b: Binary) -> str:
    spills = f", SPILLS {b.stack} + {b.local}" if b.spills else ""
    matrix = b.matrix_instructions or "no matrix instructions"
    return f"{b.registers} registers{spills}, {b.shared / 1024:.1f} KB shared, {matrix}"


if __name__ == "__main__":
    sys.exit(main())
