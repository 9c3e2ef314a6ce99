"""The Triton kernels compiled by the real compiler, without a GPU, and their machine code read: no
spills, tensor-core instructions, 16-byte loads, no more shared memory than the device has.

`make test` compiles, at batch 256 in bfloat16, inference of T0's first stage and a block of S's
third for sm_90, and blocks and the in-place PConv of L's third stage for sm_86, which has less
shared memory. `make test-all` has inference of all networks and stages for all six targets, small
batches, float16 and float32 (TF32) for two of them, and training of all networks for sm_90. What is
left out there too, `python -m bench.offline` compiles: all of it is many thousand kernels.

The compiler runs in processes of their own: in this one Triton may be its interpreter.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from bench.calls import FORWARD, INFERENCE, TRAINING
from bench.offline import Binary

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).resolve().parent.parent
ALL = "8.0,8.6,8.9,9.0,10.0,12.0"
NETWORKS = "t0,t1,t2,s,m,l"


def job(ops, capabilities, networks, dtypes="bf16", batches="256", stages="1,2,3,4"):
    return {
        "--ops": ",".join(ops),
        "--capabilities": capabilities,
        "--networks": networks,
        "--dtypes": dtypes,
        "--batches": batches,
        "--stages": stages,
    }


QUICK = {
    "inference, sm_90": job(INFERENCE, "9.0", "t0", stages="1"),
    "blocks, sm_90": job(["block"], "9.0", "s", stages="3"),
    "blocks, sm_86": job(["block", "pconv3x3_"], "8.6", "l", stages="3"),
}
LONG = {
    "inference, all targets": job(INFERENCE, ALL, NETWORKS),
    "inference, small batches": job(INFERENCE, "8.6,9.0", NETWORKS, batches="1,32"),
    "training": job(TRAINING, "9.0", NETWORKS, batches="128"),
    "training, small": job(FORWARD, "8.6,12.0", "t0,l", batches="128"),
    "float16 and TF32": job(INFERENCE, "8.6,9.0", "t0,s,l", "fp16,fp32"),
}


@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param(options, id=name) for name, options in QUICK.items()),
        *(pytest.param(o, id=name, marks=pytest.mark.slow) for name, o in LONG.items()),
    ],
)
def test_binaries(options, tmp_path):
    path = tmp_path / "binaries.json"
    command = [sys.executable, "-m", "bench.offline", "--json", str(path)]
    command += [word for pair in options.items() for word in pair]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert path.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    binaries = [Binary(**fields) for fields in json.loads(path.read_text())]
    assert binaries
    bad = [f"{b.title}: {fault}" for b in binaries for fault in faults(b)]
    assert not bad, f"{len(bad)} faults in {len(binaries)} kernels\n" + "\n".join(bad)


def faults(b):
    """What is wrong with one binary, in words."""
    if b.error:
        return [b.error]
    found = []
    if b.spills:
        found.append(f"spills: {b.stack} bytes of stack, {b.count('(LDL|STL)')} local accesses")
    if b.shared > b.limit:
        found.append(f"{b.shared / 1024:.0f} KB of shared memory, the device has {b.limit / 1024}")
    if b.registers > 255:
        found.append(f"{b.registers} registers")
    if b.dots:
        # Products in full float32 ("ieee") have none, but nothing is shipped with them by default.
        if not b.matrix_instructions:
            found.append("no tensor-core instructions")
        # A warpgroup's instruction is 64 rows.
        wide = b.num_warps % 4 == 0 and all(m >= 64 for m, _, _ in b.dots)
        hopper = tuple(b.capability) == (9, 0)
        if b.matrix_instructions and hopper and wide and b.matrix_instructions != "HGMMA":
            found.append(f"{b.matrix_instructions} where HGMMA was possible")
        # A weight gradient of taps gathers rows of C_partial channels, which nothing aligns.
        gathers = b.constants.get("OPERAND") == "taps"
        if not gathers and not b.count(r"(LDG|LDGSTS)\..*128|UTMALDG"):
            found.append("no 16-byte loads")
    return found


def test_what_a_fault_is():
    """Each demand on a binary is one that a binary can fail."""
    good = Binary(
        "k", (9, 0), ("c",), ("bf16",), {}, 4, 2, registers=100, shared=1024, limit=4096,
        dots=((128, 64, 64),), opcodes={"HGMMA.64x64x16.F32": 4, "LDG.E.128": 8, "STG.E.128": 2},
    )  # fmt: skip
    assert faults(good) == []
    for change, word in (
        ({"stack": 8}, "spills"),
        ({"opcodes": {**good.opcodes, "STL.64": 1}}, "spills"),
        ({"shared": 4097}, "shared memory"),
        ({"opcodes": {"LDG.E.128": 8, "FFMA": 99, "HFMA2.MMA": 2}}, "tensor-core"),
        ({"opcodes": {"LDG.E.128": 8, "HMMA.16816.F32": 9}}, "HGMMA"),
        ({"opcodes": {"HGMMA.64x64x16.F32": 4, "LDG.E.64": 8}}, "16-byte"),
        ({"error": "out of resources"}, "resources"),
    ):
        (fault,) = faults(dataclasses.replace(good, **change))
        assert word in fault
