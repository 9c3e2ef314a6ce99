"""The machine code of the micro-kernels: vectors as wide as the instruction set's, one FMA for each
accumulator and step of K, nothing spilled to the stack.

A micro-kernel that spills computes the right numbers, several times slower, and no other test sees
it. The instantiations are found by their symbols, `fasternet::ISA::micro<T, bytes, rows, vectors,
...>` and, of the weight gradients, `fasternet::ISA::outer<T, rows, vectors>`, so a change of tile
sizes needs no change here.
"""

import dataclasses
import functools
import pathlib
import platform
import re
import shutil
import subprocess

import pytest

import fasternet_kernels as fk

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARY = pathlib.Path(fk.__file__).parent / "_C.so"
ARM_LIBRARY = ROOT / "build" / "arm" / "libfasternet_cpu.a"  # made by `make test-arm`
SUFFIX = {"float": "s", "double": "d"}


@dataclasses.dataclass(frozen=True)
class Machine:
    """How one processor family writes things down."""

    jump: str  # a jump to a label of the same function; group 1 is its address
    frame: str  # the instruction that makes a frame pointer, in functions that have one
    frame_pointer: str
    stack_pointer: str

    def touches_stack(self, instruction, has_frame):
        names = [self.stack_pointer, *([self.frame_pointer] if has_frame else [])]
        return any(re.search(rf"\b{name}\b", instruction) for name in names)


X86 = Machine(r"j\w+\s+([0-9a-f]+) <", r"mov\s+rbp,rsp$", "rbp", "rsp")
ARM = Machine(
    r"(?:b\.\w+|cbn?z|tbn?z)\s+(?:.*,\s*)?([0-9a-f]+) <", r"mov\s+x29,\s*sp$", "x29", "sp"
)


@dataclasses.dataclass(frozen=True)
class Isa:
    machine: Machine
    vector_bytes: int
    registers: int

    def fma(self, scalar, vector_bytes):
        """Pattern of an FMA on whole vectors."""
        if self.machine is ARM:
            return rf"fmla\s+v\d+\.{'4s' if scalar == 'float' else '2d'},"
        register = {16: "xmm", 32: "ymm", 64: "zmm"}[vector_bytes]
        return rf"vfmadd(?:132|213|231)p{SUFFIX[scalar]}\s+{register}\d+,"


ISAS = {"avx2": Isa(X86, 32, 16), "avx512": Isa(X86, 64, 32), "neon": Isa(ARM, 16, 32)}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One instantiation of the micro-kernel."""

    scalar: str
    vector_bytes: int
    rows: int
    vectors: int
    code: tuple[tuple[int, str], ...]  # address, instruction

    @property
    def accumulators(self):
        return self.rows * self.vectors

    def inner_loops(self, machine):
        """The instructions of each loop that contains no other loop."""
        index = {address: i for i, (address, _) in enumerate(self.code)}
        loops = []
        for i, (address, text) in enumerate(self.code):
            jump = re.match(machine.jump, text)
            target = int(jump[1], 16) if jump else None
            if target in index and target <= address:
                loops.append(range(index[target], i + 1))
        return [
            [self.code[i][1] for i in loop]
            for loop in loops
            if not any(o != loop and o[0] >= loop[0] and o[-1] <= loop[-1] for o in loops)
        ]

    def has_frame(self, machine):
        return any(re.match(machine.frame, text) for _, text in self.code)


def parse(listing, isa, name="micro"):
    """The micro-kernels of one instruction set in objdump's listing."""
    vector_bytes = r"(\d+), " if name == "micro" else "()"
    title = re.compile(
        rf"^[0-9a-f]+ <.*\bfasternet::{isa}::{name}<(float|double), {vector_bytes}(\d+), (\d+)\b"
        r".*>:\n((?:[ \t].*\n)+)",
        re.MULTILINE,
    )
    kernels = []
    for found in title.finditer(listing):
        code = []
        for line in found[5].splitlines():
            address, _, text = line.partition(":")
            text = re.split(r"\s+(?:#|//)", text.strip())[0]  # without objdump's comments
            code.append((int(address, 16), re.sub(r"\s+", " ", text)))
        sizes = int(found[2] or ISAS[isa].vector_bytes), int(found[3]), int(found[4])
        kernels.append(Kernel(found[1], *sizes, tuple(code)))
    return kernels


def fmas_of(loop, pattern):
    return sum(bool(re.match(pattern, text)) for text in loop)


def faults(kernel, isa):
    """What is wrong with one micro-kernel's inner loops, in words."""
    pattern = isa.fma(kernel.scalar, kernel.vector_bytes)
    has_frame = kernel.has_frame(isa.machine)
    found = []
    computing = []  # the loops that do the work, each with its number of FMAs
    for loop in kernel.inner_loops(isa.machine):
        fmas = fmas_of(loop, pattern)
        if fmas:
            computing.append((fmas, loop))
        if fmas % kernel.accumulators:
            found.append(f"{fmas} FMAs, no multiple of {kernel.accumulators} accumulators")
        if not fmas and any(re.match(r"v?fm(?:add|la)", text) for text in loop):
            found.append(f"FMAs that are not {pattern}")
    if not computing:
        return [*found, "no loop of vector FMAs"]
    # What is left over by an unrolled main loop may reload a pointer, but no accumulator.
    main = max(computing, key=lambda pair: pair[0])[1]
    for _, loop in computing:
        stack = [
            text
            for text in loop
            if isa.machine.touches_stack(text, has_frame)
            and (loop is main or re.search(r"\b[xyz]mm\d|\b[vqd]\d", text))
        ]
        if stack:
            found.append(f"{len(stack)} of {len(loop)} instructions use the stack: {stack[0]}")
    return found


@functools.cache
def disassemble(isa):
    """objdump's listing of the compiled kernels, or a skip."""
    on_arm = platform.machine().lower() in ("aarch64", "arm64")
    library, tool = LIBRARY, "objdump"
    if (isa == "neon") != on_arm:
        if isa != "neon":
            pytest.skip(f"{isa} is not compiled in on {platform.machine()}")
        library, tool = ARM_LIBRARY, "aarch64-linux-gnu-objdump"
        sources = [*(ROOT / "csrc" / "cpu").glob("*"), ROOT / "CMakeLists.txt"]
        if not library.is_file() or library.stat().st_mtime < max(
            path.stat().st_mtime for path in sources if path.is_file()
        ):
            pytest.skip("build/arm is absent or older than csrc: `make test-arm` builds it")
    if not shutil.which(tool):
        pytest.skip(f"no {tool} here; it is in binutils")
    command = [tool, "-d", "-C", "--no-show-raw-insn"]
    if library == LIBRARY and not on_arm:
        command += ["-M", "intel"]
    listing = subprocess.run(
        [*command, str(library)], capture_output=True, text=True, check=True
    ).stdout
    if "<fasternet::" not in listing and " fasternet::" not in listing:
        pytest.skip(f"{library} has been stripped of its symbols")
    return listing


@pytest.mark.parametrize("name", ["micro", "outer"])
@pytest.mark.parametrize("isa", ISAS)
def test_micro_kernels_keep_their_accumulators_in_registers(isa, name):
    kernels = parse(disassemble(isa), isa, name)
    assert {kernel.scalar for kernel in kernels} == {"float", "double"}
    widest = max(
        (kernel for kernel in kernels if kernel.scalar == "float"), key=lambda k: k.accumulators
    )
    assert widest.vector_bytes == ISAS[isa].vector_bytes
    assert widest.accumulators > ISAS[isa].registers // 2, "half of the registers are idle"
    wrong = {
        f"{name}<{k.scalar}, {k.vector_bytes}, {k.rows}, {k.vectors}>": found
        for k in kernels
        if (found := faults(k, ISAS[isa]))
    }
    assert not wrong


@pytest.mark.parametrize("name", ["micro", "outer"])
def test_few_instructions_to_an_fma(name):
    """Of AVX-512's tile of three vectors, those on vectors; how many others a loop takes is the
    compiler's. A core issues four instructions in the time of two FMAs, and two when another thread
    has its turn: there each instruction more costs as much as an FMA."""
    isa = ISAS["avx512"]
    kernels = parse(disassemble("avx512"), "avx512", name)
    tiles = [k for k in kernels if k.scalar == "float" and k.vectors == 3]
    largest = max(tiles, key=lambda k: k.rows)
    pattern = isa.fma("float", largest.vector_bytes)
    loops = [(fmas_of(loop, pattern), loop) for loop in largest.inner_loops(isa.machine)]
    fmas, main = max(loops, key=lambda pair: pair[0])
    assert largest.rows == 9
    assert fmas and sum(text.startswith("v") for text in main) <= 1.4 * fmas


# A micro-kernel of 1 x 2 vectors, once as it should be and once with an accumulator on the stack.
GOOD = """\
0000000000001000 <void fasternet::avx2::micro<float, 32, 1, 2, 2>(M const&)>:
    1000:\tpush   rbp
    1001:\tvbroadcastss ymm2,DWORD PTR [rbp+rdx*1-0x4]
    1004:\tvfmadd231ps ymm0,ymm2,YMMWORD PTR [rdi]
    1009:\tvfmadd231ps ymm1,ymm2,YMMWORD PTR [rdi+0x20]
    100e:\tjne    1001 <void fasternet::avx2::micro<float, 32, 1, 2, 2>(M const&)+0x1>
    1010:\tvmovups YMMWORD PTR [rsp+0x20],ymm0
    1013:\tret
"""


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("", "", None),
        ("YMMWORD PTR [rdi]", "YMMWORD PTR [rsp+0x40]", "use the stack"),
        ("push   rbp", "mov    rbp,rsp", "use the stack"),  # then rbp is the frame
        ("ymm", "xmm", "no loop of vector FMAs"),
        ("vfmadd231ps ymm1,ymm2", "vaddps ymm1,ymm2", "1 FMAs, no multiple of 2"),
        ("1001 <", "1010 <", "no loop of vector FMAs"),  # a jump forward
    ],
)
def test_faults_are_seen(old, new, fault):
    (kernel,) = parse(GOOD.replace(old, new) if old else GOOD, "avx2")
    assert (kernel.rows, kernel.vectors) == (1, 2)
    found = faults(kernel, ISAS["avx2"])
    assert (fault is None and not found) or any(fault in text for text in found)
