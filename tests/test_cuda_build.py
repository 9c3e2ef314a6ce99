"""csrc/cuda compiled by nvcc and read: registers, spills and instructions. No GPU is needed; what
the kernels compute is tested on the CPU by csrc/tests/test_cuda_*.cpp and on a GPU by test_gpu.py.
"""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
INSTANCES = 2 * 3 * 4  # dtypes, widths of a copy, steps of 16 channels


pytestmark = pytest.mark.slow  # nvcc takes its time


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library that `make cuda` builds; warnings are errors there."""
    for tool in ("nvcc", "make"):
        if not shutil.which(tool):
            pytest.skip(f"no {tool} here")
    path = tmp_path_factory.mktemp("cuda") / "_cuda.so"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-C", str(ROOT), "cuda", f"CUDA_LIBRARY={path}"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path, done.stdout + done.stderr


def test_no_spills(library):
    _, log = library
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", log)
    assert len(frames) == 2 * INSTANCES  # sm_80 and sm_90a
    assert set(frames) == {("0", "0", "0")}
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    assert max(registers) <= 128  # two blocks of 256 threads on a multiprocessor


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_instructions(library, architecture):
    nvidia = pytest.importorskip("triton.backends.nvidia")
    folder = pathlib.Path(nvidia.__file__).parent / "bin"
    if not (folder / "cuobjdump").exists():
        pytest.skip("triton's package has no cuobjdump here")
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    listing = subprocess.run(
        [folder / "cuobjdump", "-sass", "-arch", architecture, library[0]],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout
    functions = re.split(r"\n\s*Function : ", listing)[1:]
    assert len(functions) == INSTANCES
    for function in functions:
        name = function.split()[0]
        bits = int(re.search(r"ILi\d+ELi(\d+)E|Lb\dELi\d+ELi(\d+)E", name).group(2)) * 8
        assert "HMMA.16816.F32" in function, name
        assert "LDSM.16.M88.4" in function, name
        copy = "LDGSTS.E " if bits == 32 else f"LDGSTS.E.{bits}"
        assert copy in function, name
        assert not re.search(r"\b(?:LDL|STL)\b", function), name
        # The barrier of a cluster is what makes it right in place.
        assert ("UCGABAR_ARV" in function) == (architecture == "sm_90a"), name
