"""`make gpu` without a GPU: a dry run of all of it, and its parts that need none."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from bench import gpu_report, gpu_tune, results, roofline
from bench.calls import TRAINING, TRAINING_BATCH, Call
from bench.gpu import SECTIONS, main
from bench.gpu_rows import GpuRow
from bench.offline import GPUS, Binary, record
from fasternet_kernels import cuda

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).resolve().parent.parent
TUNING = sorted((ROOT / "fasternet_kernels" / "triton" / "tuning").glob("*.json"))


def script(*arguments):
    environment = {k: v for k, v in os.environ.items() if k not in ("OUT", "TRITON_INTERPRET")}
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_dry_run(tmp_path):
    """Every section runs to its end, nothing is taken for a time, then nothing is left to do."""
    tuning = [path.read_text() for path in TUNING]
    status, output = script("--dry-run", "--out", str(tmp_path))
    assert status == 0, output
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["done"] == dict.fromkeys(SECTIONS, "ok"), output

    rows = results.read(tmp_path / "gpu.csv", GpuRow)
    assert {row.kind for row in rows} == {"peak", "operator", "chain", "network", "training"}
    assert {row.status for row in rows} == {"dry run"}, [r for r in rows if r.status != "dry run"]
    assert {row.device for row in rows} == {"dry run"}
    for row in rows:
        assert row.median_ms is None and row.gb_per_s is None and row.peak_mib is None
    assert len({row.key for row in rows}) == len(rows)
    assert "A dry run: no times." in (tmp_path / "summary.txt").read_text()

    (table,) = (tmp_path / "tuning").glob("*.json")
    assert json.loads(table.read_text()).keys() == json.loads(TUNING[0].read_text()).keys()
    assert [path.read_text() for path in TUNING] == tuning

    status, output = script("--dry-run", "--resume", "--out", str(tmp_path))
    assert status == 0
    assert "==" not in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == 2
    assert "CUDA" in capsys.readouterr().err
    assert cuda.unavailable() == "torch has no CUDA device"
    x = torch.randn(1, 8, 4, 4, dtype=torch.float16).to(memory_format=torch.channels_last)
    before = x.clone()
    assert not cuda.pconv3x3_(x, torch.randn(2, 2, 3, 3, dtype=torch.float16))
    assert torch.equal(x, before)


def test_unknown_section(capsys):
    with pytest.raises(SystemExit):
        main(["--sections", "tests,tuna"])
    assert "tuna" in capsys.readouterr().err


def row(provider, median_ms, **changes) -> GpuRow:
    text = dict.fromkeys(
        ["run", "date", "commit", "device", "capability", "driver", "cuda", "cudnn", "torch"], "a"
    )
    values = text | {
        "triton": "3", "fasternet_kernels": "1", "python": "3", "dirty": False, "kind": "network",
        "workload": "fasternet_t0", "channels": 3, "height": 224, "width": 224, "batch": 256,
        "dtype": "bf16", "provider": provider, "status": "ok", "median_ms": median_ms,
        "matrix_share": 0.25, "round_medians_ms": (median_ms, median_ms),
    }  # fmt: skip
    return GpuRow(**{**values, **changes})


def test_rows_survive_the_file(tmp_path):
    rows = [row("ours", 1.25), row("eager", None, status="out of memory", round_medians_ms=())]
    results.append(tmp_path / "gpu.csv", rows[:1])
    results.append(tmp_path / "gpu.csv", rows[1:])
    assert results.read(tmp_path / "gpu.csv", GpuRow) == rows
    with pytest.raises(ValueError, match="columns"):
        results.read(tmp_path / "gpu.csv")


def test_summary(tmp_path):
    rows = [row("compile", 3.0), row("eager", 4.0), row("ours", 1.5), row("ours_graph", 1.0)]
    rows.append(row("max_autotune", None, status="RuntimeError: no", round_medians_ms=()))
    text = gpu_report.text(rows, tmp_path)
    assert "ours_graph against compile: 3.00x" in text
    assert "ours 1.500 ms (25% matrix)" in text
    assert "max_autotune: RuntimeError: no" in text


@pytest.mark.parametrize("path", TUNING, ids=lambda path: path.stem)
def test_tables_are_written_as_they_are_read(path, tmp_path):
    table = json.loads(path.read_text())
    gpu_tune.write_table(tmp_path / "table.json", table)
    assert json.loads((tmp_path / "table.json").read_text()) == table
    for name, rows in table.items():
        if name != "capabilities":
            for entry in rows:
                assert gpu_tune.candidates(entry["config"])[0] == entry["config"]


def test_candidates():
    config = {"BLOCK_M": 16, "most_channels": 8, "num_warps": 4, "num_stages": 2}
    found = gpu_tune.candidates(config)
    assert found[0] == config
    assert {**config, "BLOCK_M": 32} in found
    assert {**config, "num_warps": 8} in found
    assert all(trial["BLOCK_M"] >= 16 and trial["most_channels"] == 8 for trial in found)
    assert len({json.dumps(trial) for trial in found}) == len(found)


def test_every_training_kernel_is_tuned():
    """What the launchers of training ask the tables for is among what is tuned, key by key."""
    asked = {}
    for call in gpu_tune._plan(dry=False):
        if call.network == "t0" and call.op in TRAINING and call.batch == TRAINING_BATCH:
            with gpu_tune._answering({}, asked):
                record(call, GPUS[9, 0])
    tables = json.loads(TUNING[0].read_text()).keys() - {"capabilities"}
    inference = {"pconv_in_place", "block", "pconv_pw", "gemm", "patch_conv"}
    assert {op for op, _, _ in asked} == tables - inference
    key, config = next((k, c) for k, c in asked.items() if k[0] == "weight_gradient")
    found = {}
    with gpu_tune._answering({key: {**config, "BLOCK_M": 1024}}, found):
        record(Call("act_pw_residual_backward", "t0", 1, TRAINING_BATCH, "bf16"), GPUS[9, 0])
        record(Call("pw_stats_backward", "t0", 1, TRAINING_BATCH, "bf16"), GPUS[9, 0])
    changed = [k for k, c in found.items() if c != asked[k]]
    assert changed == [key] and len(found) > 1


@pytest.mark.parametrize("op", roofline.OPS)
@pytest.mark.parametrize("network, stage", [("t0", 1), ("m", 2), ("l", 4)])
def test_flops_of_launches_add_up(op, network, stage):
    """What the roofline takes each launch to compute is what the op's FLOP formula says in all."""
    from torch.utils.flop_counter import FlopCounterMode

    call = Call(op, network, stage, 2, "bf16")
    with FlopCounterMode(display=False) as counter:
        getattr(torch.ops.fasternet_kernels, op)(*call.arguments())
    macs = 0
    for launch in record(call, GPUS[9, 0]):
        if launch.kernel.__name__ in roofline._MACS:
            macs += roofline._MACS[launch.kernel.__name__](launch.args)
    assert 2 * macs == counter.get_total_flops()


def test_roofline_says_that_it_is_computed(tmp_path):
    (launch,) = record(Call("block", "t0", 1, 256, "bf16"), GPUS[9, 0])
    call = Call("block", "t0", 1, 256, "bf16")
    binary = Binary("block_kernel", (9, 0), ("c",), ("bf16",), {}, 8, 2, 100, 0, 0, 1024, 4096)
    image = 256 * 40 * 56 * 56 * 2
    assert roofline._memory_bytes(launch) == 2 * image
    no_act = dataclasses.replace(launch, args={**launch.args, "ACT": "identity"})
    found = roofline._row(call, no_act, binary, roofline.H100)
    assert found.memory_us == pytest.approx(2 * image / 3.35e12 * 1e6)
    assert found.basis == "computed, not measured"
    roofline.write(tmp_path / "r.csv", [found])
    assert "computed, not measured" in (tmp_path / "r.csv").read_text()
    assert "computed, not measured" in roofline.text([found])
