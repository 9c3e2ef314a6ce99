"""The command fasternet-kernels: exit status and what it says when something is wrong."""

import copy
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fasternet_kernels as fk
from fasternet_kernels import cli, library, models


@pytest.fixture
def no_library(monkeypatch):
    """The state in which the compiled library could not be loaded."""
    status = library.Status(loaded=False, reason="libmissing.so is not there")
    monkeypatch.setattr(library, "status", lambda: status)


@pytest.fixture
def selftest(monkeypatch):
    """Puts a self-test with the given rows in place of the real one."""

    def install(*rows):
        module = types.ModuleType("fasternet_kernels.selftest")
        module.run = lambda progress=None: list(rows)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(fk, "selftest", module, raising=False)

    return install


def row(op, ok):
    return SimpleNamespace(
        op=op,
        backend="cpu",
        dtype="float32",
        layout="NCHW",
        error=1.5e-7,
        allowed=3e-7,
        ok=ok,
        detail="",
    )


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert library.status().path in out
    assert library.status().isa in out


@pytest.mark.usefixtures("no_library")
def test_info_without_library(capsys):
    assert cli.main(["info"]) == 0
    assert "NOT LOADED: libmissing.so is not there" in capsys.readouterr().out


def test_check(capsys, selftest):
    selftest(row("pconv3x3", True), row("block", True))
    assert cli.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["operator", "backend", "dtype", "layout", "error", "allowed"]
    assert lines[1].split() == ["pconv3x3", "cpu", "float32", "NCHW", "1.50e-07", "3.00e-07", "ok"]
    assert lines[-1] == "2 checks, 0 wrong"


def test_check_finds_a_mismatch(capsys, selftest):
    selftest(row("pconv3x3", True), row("block", False))
    assert cli.main(["check"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert "2 checks, 1 wrong" in out


def test_check_of_nothing_is_no_success(selftest):
    selftest()
    assert cli.main(["check"]) == 1


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("command", ["check", "demo"])
def test_without_library_is_no_success(capsys, selftest, command):
    selftest(row("pconv3x3", True))
    assert cli.main([command]) == 1
    message = "The compiled kernels are not loaded: libmissing.so is not there"
    assert message in capsys.readouterr().err


def test_demo_refuses_bad_files(capsys, tmp_path):
    assert cli.main(["demo", "--image", str(tmp_path / "no.jpg")]) == 2
    assert "no.jpg" in capsys.readouterr().err
    assert cli.main(["demo", "--checkpoint", str(tmp_path / "no.pth")]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


class WrongPartialConv(nn.Module):
    """This library's partial convolution with one tap of the kernel left out."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight.detach().clone()
        self.weight[:, :, 0, 1] = 0

    def forward(self, x):
        return fk.pconv3x3(x, self.weight)


def test_demo_finds_a_wrong_network(capsys, monkeypatch, tmp_path):
    def accelerate(model):
        block = next(m for m in model.modules() if isinstance(m, models.Block))
        block.spatial_mixing = WrongPartialConv(block.spatial_mixing.partial_conv3.weight)
        return model

    monkeypatch.setattr(fk, "accelerate", accelerate)
    monkeypatch.setattr(fk, "report", lambda model: "one block")
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "does NOT agree with the eager one" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_demo_refuses_a_network_that_was_not_accelerated(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(fk, "accelerate", copy.copy)
    monkeypatch.setattr(fk, "report", lambda model: "nothing")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert "calls none of this library's operators" in capsys.readouterr().err


@pytest.mark.slow
def test_demo(capsys, tmp_path):
    threads = torch.get_num_threads()
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "agrees with the eager one" in out
    assert "Speed-up of fasternet_kernels" in out
    assert (tmp_path / "out" / "fasternet_t0_latency.png").stat().st_size > 10_000
    assert torch.get_num_threads() == threads
