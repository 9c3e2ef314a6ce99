"""examples/train.py as a user starts it."""

import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAIN = str(ROOT / "examples" / "train.py")


def run(tmp_path, *arguments, launcher=()):
    """(share of held-out digits recognised by backend, losses by backend)."""
    command = [sys.executable, *launcher, TRAIN, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(\w+): ([\d.]+)% of the held-out digits", done.stdout)
    losses = {}
    with open(tmp_path / "losses.csv") as file:
        for row in csv.DictReader(file):
            assert int(row["step"]) == len(losses.setdefault(row["backend"], []))
            losses[row["backend"]].append(float(row["loss"]))
    assert [backend for backend, _ in found] == list(losses)
    return {backend: float(share) / 100 for backend, share in found}, losses


def test_one_epoch_and_its_plot(tmp_path):
    shares, losses = run(tmp_path, "--epochs", "1", "--plot", "losses.png")
    assert list(shares) == ["eager", "fused"]
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    eager, fused = losses.values()
    assert len(eager) == len(fused) == 22
    assert math.isclose(eager[0], fused[0], rel_tol=1e-5)


@pytest.mark.slow
def test_digits_are_learnt(tmp_path):
    shares, losses = run(tmp_path, "--backend", "fused")
    assert shares["fused"] >= 0.97
    assert losses["fused"][-1] < 0.1 * losses["fused"][0]


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    """Two processes see each sample once an epoch, and rank 0 alone reports and writes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    shares, losses = run(tmp_path, "--epochs", "40", launcher=launcher)
    assert shares["fused"] >= 0.97
    assert len(losses["fused"]) == 40 * 22
