"""The compiled library: present, absent, unloadable, and on each instruction set."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from cases import slow_if

import fasternet_kernels as fk

PACKAGE = pathlib.Path(fk.__file__).parent
SCRIPT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fasternet_kernels as fk
    import fasternet_kernels.library
    fk.library.load()
ours = [str(w.message) for w in caught if "fasternet_kernels" in str(w.message)]
print("warnings", len(ours))
print("\\n".join(ours))
import torch
x = torch.randn(1, 8, 5, 5)
y = fk.pconv3x3(x, torch.zeros(2, 2, 3, 3))
assert not y[:, :2].any() and torch.equal(y[:, 2:], x[:, 2:])
print("status", fk.library.status())
"""


def run(code_or_module, cwd, *, isa=None, arguments=()):
    env = {name: value for name, value in os.environ.items() if name != "FASTERNET_KERNELS_ISA"}
    env["PYTHONPATH"] = str(cwd)
    if isa is not None:
        env["FASTERNET_KERNELS_ISA"] = isa
    flag = ["-m", code_or_module] if code_or_module.isidentifier() else ["-c", code_or_module]
    return subprocess.run(
        [sys.executable, *flag, *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def copied_package(tmp_path):
    shutil.copytree(
        PACKAGE,
        tmp_path / "fasternet_kernels",
        ignore=shutil.ignore_patterns("_C.so", "__pycache__"),
    )
    return tmp_path


def test_loaded_and_overriding():
    status = fk.library.status()
    assert status.loaded and status.isa in status.available_isas and status.compiler
    assert pathlib.Path(status.path).is_file()
    # What overrides the reference is a kernel registered for the CPU key itself.
    assert fk.library.has_kernel("block")
    assert not fk.library.has_kernel("act_pw_residual_recompute_backward")  # composed of others


@pytest.mark.parametrize(
    "library",
    [
        pytest.param(None, id="missing"),
        pytest.param(b"no shared library", id="unloadable", marks=pytest.mark.slow),
    ],
)
def test_without_the_library(copied_package, library):
    """Importing works, warns once with the reason, and the ops run their reference; info says so;
    check and the tests fail."""
    if library is not None:
        (copied_package / "fasternet_kernels" / "_C.so").write_bytes(library)
    reason = "does not exist" if library is None else "cannot be loaded"
    result = run(SCRIPT, copied_package)
    assert result.returncode == 0, result.stderr
    assert "warnings 1\n" in result.stdout and reason in result.stdout
    assert "loaded=False" in result.stdout
    program = (
        "import sys, warnings; warnings.simplefilter('ignore');"
        "from fasternet_kernels.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    info = run(program, copied_package, arguments=["info"])
    assert info.returncode == 0 and "NOT LOADED" in info.stdout and reason in info.stdout
    assert run(program, copied_package, arguments=["check"]).returncode == 1


def test_the_suite_refuses_to_run_without_the_library(copied_package):
    tests = pathlib.Path(__file__).parent
    for name in ("conftest.py", "cases.py", "test_ops.py"):
        shutil.copy(tests / name, copied_package)
    result = run("pytest", copied_package, arguments=["-q", "test_ops.py"])
    assert result.returncode == 3
    assert "no compiled kernels, nothing to test" in result.stdout + result.stderr


@pytest.mark.parametrize("isa", ["avx9000", "AVX2"])
def test_an_unknown_isa_is_an_error(isa):
    result = run("import fasternet_kernels", PACKAGE.parent, isa=isa)
    assert result.returncode != 0
    assert (
        f"FASTERNET_KERNELS_ISA is '{isa}', expected one that this machine has: generic"
        in result.stderr
    )


@pytest.mark.parametrize(
    "isa",
    slow_if(lambda _, isa: isa != fk.library.status().isa, fk.library.status().available_isas),
)
def test_check_passes_on_every_isa(isa):
    code = "import sys; from fasternet_kernels.cli import main; sys.exit(main(['check']))"
    result = run(code, PACKAGE.parent, isa=isa)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    assert isa in result.stdout and "0 wrong" in result.stdout


def test_packs_fit_every_isa():
    """A pack made by one instruction set serves another: the layout is one."""
    code = (
        "import torch, fasternet_kernels, hashlib; torch.manual_seed(0);"
        "w = [torch.randn(40, 10, 3, 3), torch.randn(33, 40)];"
        "p = torch.ops.fasternet_kernels.pack(w, [None, None], [None, None]);"
        "print(hashlib.sha256(p.numpy().tobytes()).hexdigest())"
    )
    digests = {
        run(code, PACKAGE.parent, isa=isa).stdout for isa in fk.library.status().available_isas
    }
    assert len(digests) == 1 and digests.pop().strip()


def test_selftest_sees_a_wrong_kernel(monkeypatch):
    """A row of the self-test fails when op and reference differ, in value or in layout."""
    from fasternet_kernels import reference, selftest

    honest = reference.pconv3x3
    monkeypatch.setattr(reference, "pconv3x3", lambda x, w, fast=False: honest(x, w) * (1 + 1e-4))
    rows = [row for row in selftest.run() if row.op == "pconv3x3" and row.dtype == "float32"]
    assert rows and not any(row.ok for row in rows)
    monkeypatch.setattr(reference, "pconv3x3", lambda x, w, fast=False: honest(x, w).contiguous())
    rows = [row for row in selftest.run() if row.op == "pconv3x3" and row.layout == "NHWC"]
    assert rows and not any(row.ok for row in rows)
    monkeypatch.undo()
    rows = selftest.run()
    assert all(row.ok for row in rows) and {row.op for row in rows} == set(fk.ops.SCHEMAS)
    assert {row.backend for row in rows if row.op == "block"} == {fk.library.status().isa}
    assert torch.is_grad_enabled()
