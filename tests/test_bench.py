"""bench/: statistics, rows, the parity gate, goals, tables and charts; no time decides a test."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch

import fasternet_kernels as fk
from bench import (
    pages,
    parts,
    plot,
    published,
    report,
    results,
    session,
    stats,
    tables,
    training,
    workloads,
    zoo,
)
from bench.__main__ import _parser, _processors, main, specs
from bench.providers import PEERS, PROVIDERS, available
from fasternet_kernels import models, timing

MAC = 2  # FLOPs


def row(provider="ours", median_ms=1.0, **changes) -> results.Row:
    """A row as a session makes them, of three rounds around `median_ms`."""
    values = {
        "run": "r1",
        "session": "r1/0",
        "date": "2026-01-02T03:04:05Z",
        "commit": "abc",
        "dirty": False,
        "processor": 'A "processor", of sorts',
        "cores": 2,
        "isa": "avx2",
        "compiler": "GCC 12",
        "python": "3.11",
        "fasternet_kernels": "0.1.0",
        "torch": "2.13.0",
        "onnxruntime": "1.32.0",
        "openvino": "",
        "mnn": "",
        "kind": "network",
        "workload": "fasternet_t0",
        "channels": 3,
        "height": 224,
        "width": 224,
        "act": "gelu",
        "batch": 1,
        "threads": 1,
        "mode": "latency",
        "dtype": "fp32",
        "provider": provider,
        "status": "ok",
        "error_rel_l2": 1.5e-6,
        "median_ms": median_ms,
        "p20_ms": median_ms * 0.5,
        "p80_ms": median_ms * 1.5,
        "min_ms": median_ms * 0.25,
        "images_per_s": 1e3 / median_ms,
        "gflop_per_s": 100.0,
        "peak_share": 0.5,
        "round_medians_ms": (median_ms, median_ms * 2, median_ms * 4),
    }
    return results.Row(**{**values, **changes})


def failed(provider, status, **changes) -> results.Row:
    numbers = (
        "median_ms", "p20_ms", "p80_ms", "min_ms", "images_per_s", "gflop_per_s", "peak_share",
    )  # fmt: skip
    none = dict.fromkeys(numbers)
    return dataclasses.replace(row(provider), status=status, round_medians_ms=(), **none, **changes)


# ---- Statistics ----------------------------------------------------------------------------------


def test_speedup_takes_ratios_round_by_round():
    """A machine that halves its speed between rounds does not change the ratio."""
    assert stats.speedup([3.0, 6.0, 12.0], [1.0, 2.0, 4.0]) == (3.0, 3.0, 3.0)


def test_speedup_has_the_bootstrap_interval_of_a_median():
    """Exact for an odd number n of distinct values: a resampled median is at most the k-th smallest
    when at least half of n draws are among the k smallest."""
    n = 9
    values = np.sort(np.random.default_rng(1).uniform(1, 2, n))

    def at_most(k):
        draws = range(n // 2 + 1, n + 1)
        return sum(math.comb(n, m) * (k / n) ** m * (1 - k / n) ** (n - m) for m in draws)

    low = next(values[k - 1] for k in range(1, n + 1) if at_most(k) >= 0.025)
    high = next(values[k - 1] for k in range(1, n + 1) if at_most(k) >= 0.975)
    shuffled = np.random.default_rng(2).permutation(values)
    got = stats.speedup(shuffled, np.ones(n))
    assert got == (np.median(values), low, high)
    assert stats.speedup(shuffled, np.ones(n)) == got


def test_speedup_refuses_rounds_that_are_not_pairs():
    for pair in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match="expected as many, at least one"):
            stats.speedup(*pair)


# ---- Workloads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, gmacs",
    [("t0", 0.34), ("t1", 0.85), ("t2", 1.91), ("s", 4.56), ("m", 8.74), ("l", 15.52)],
)
def test_flops_of_networks_are_the_papers(name, gmacs):
    """Table 3 of arXiv 2303.03667."""
    flops = workloads.find(f"fasternet_{name}").flops(2)
    assert flops == pytest.approx(2 * MAC * gmacs * 1e9, rel=0.02)


def test_mobilenet_is_timms():
    """With BatchNorm and activation apart it is the network that it was, and it can be folded."""
    workload = workloads.find("mobilenetv2_100")
    try:
        timm = zoo.import_timm()
    except ImportError as error:
        pytest.skip(str(error))
    module, x = workload.build().double(), workloads.images(workload, 1).double()
    original = timm.create_model("mobilenetv2_100").eval().double()
    tensors = list(module.state_dict().values())
    shapes = [tensor.shape for tensor in original.state_dict().values()]
    assert [tensor.shape for tensor in tensors] == shapes
    original.load_state_dict(dict(zip(original.state_dict(), tensors)))
    with torch.no_grad():
        exact = original(x).numpy()
        for same in (module, models.fold_batch_norm(module)):
            assert session.parity(same(x).numpy(), exact, "fp32")[0] < 1e-12
    assert workload.flops(1) == pytest.approx(MAC * 0.30e9, rel=0.03)  # arXiv 1801.04381


def test_flops_and_traffic_of_a_chain():
    chain = workloads.find("m_stage3_relu")
    c, side, blocks = 576, 14, workloads.CHAIN_BLOCKS
    weights = 9 * (c // 4) ** 2 + 4 * c * c
    norm = 2 * 2 * c
    assert chain.shape == (c, side, side)
    assert chain.flops(3) == blocks * 3 * side**2 * weights * MAC
    assert chain.traffic(3) == blocks * (weights + norm + 2 * 3 * c * side**2)


def test_workloads_are_the_same_in_every_process():
    workload = workloads.find("t0_stage4_gelu")
    one, other = workload.build().state_dict(), workload.build().state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(workloads.images(workload, 3)[:2], workloads.images(workload, 2))
    weights = [value for key, value in one.items() if key.endswith("mlp.0.weight")]
    assert len({float(value.sum()) for value in weights}) == workloads.CHAIN_BLOCKS


def test_there_is_a_chain_for_each_stage_and_act():
    chains = [w for w in workloads.all_workloads().values() if w.kind == "chain"]
    assert len(chains) == 6 * 4 + 2 * 4  # ReLU everywhere, GELU where the network has it
    assert {w.shape[0] for w in chains} >= {40, 80, 576, 1152, 1536}


def test_unknown_workload():
    with pytest.raises(ValueError, match="no workload 'resnet51'"):
        workloads.find("resnet51")


@pytest.mark.parametrize(
    "name",
    [
        "pconv3x3_t0_stage4",
        "pconv_pw_t0_stage4",
        "patch_conv_t0_stage4",
        "head_t0",
        "t0_stage4_gelu",
        "pconv3x3_768x7",
        "pconv3x3_inplace_768x7",
        "pconv_pw_768x7",
    ],
)
def test_ours_computes_the_workload(name):
    """What is timed as ours passes the gate, with room: the ops are fed folded, packed weights."""
    from bench.providers import _packed_ops

    workload = workloads.find(name)
    module, x = workload.build(), workloads.images(workload, 2)
    with torch.no_grad():
        exact = workload.build().double()(x.double()).numpy()
        got = _packed_ops(module)(x.to(memory_format=torch.channels_last)).numpy()
    assert session.parity(got, exact, "fp32")[0] < 1e-5


# ---- Rows ----------------------------------------------------------------------------------------


def test_rows_survive_the_csv(tmp_path):
    path = tmp_path / "new" / "results.csv"
    rows = [row(), failed("mnn", 'died with status -11: "bad", it said'), row(dirty=True)]
    results.append(path, rows[:1])
    results.append(path, rows[1:])
    assert results.read(path) == rows
    assert results.read(tmp_path / "none.csv") == []
    assert results.newest_run(rows) == "r1"


def test_the_fullest_of_the_last_sessions_counts():
    old = [row("ours", 3.0, session="1"), row("mnn", 3.0, session="1")]
    new = [row("ours", 2.0, session="2"), row("mnn", 2.0, session="2")]
    look = [row("ours", 1.0, session="3"), failed("mnn", "not installed", session="3")]
    elsewhere = row("ours", 1.0, session="4", threads=2)
    assert results.latest([*old, *new, *look, elsewhere]) == [*new, elsewhere]


def test_the_fullest_of_the_last_runs_counts():
    """By the work that has a number, then by its providers; of equals the last."""
    work = (("fasternet_t0", "ours"), ("fasternet_t0", "mnn"), ("fasternet_l", "ours"))

    def run(name, *pairs):
        return [row(p, workload=w, run=name, session=f"{name}/{w}") for w, p in pairs]

    whole, again = run("1", *work), run("2", *work)
    many = run("3", *(("fasternet_t0", p) for p in (*PEERS, "ours")))  # providers, little work
    few = run("4", *work[1:])
    dead = [*run("5", work[0]), failed("mnn", "died", workload="fasternet_l", run="5")]
    assert results.fullest_run([*whole, *again, *many, *few, *dead]) == again
    resumed = run("1", ("fasternet_m", "ours"))
    assert results.fullest_run([*whole, *again, *resumed]) == [*whole, *resumed]
    assert results.fullest_run([*many, *dead]) == many
    assert results.fullest_run([]) == []


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "results.csv"
    results.append(path, [row()])
    text = path.read_text().replace("peak_share", "share")
    path.write_text(text)
    for use in (results.read, lambda p: results.append(p, [row()])):
        with pytest.raises(ValueError, match=r"other columns \(peak_share, share\)"):
            use(path)
    assert path.read_text() == text


def test_provenance():
    about = results.provenance()
    fields = {field.name for field in dataclasses.fields(results.Row)}
    assert set(about) < fields
    assert about["torch"] == torch.__version__
    assert about["isa"] == fk.library.status().isa


def test_fullest_file(tmp_path):
    assert results.fullest_file(tmp_path) is None
    results.append(tmp_path / "a.csv", [row(date="2026-02-01T00:00:00Z")])
    results.append(tmp_path / "b.csv", [row(date="2026-01-01T00:00:00Z")])
    assert results.fullest_file(tmp_path) == tmp_path / "a.csv"
    more = row(date="2026-01-01T00:00:00Z", workload="mobilenetv2_100")
    chain = row(date="2026-03-01T00:00:00Z", workload="t0_stage1_relu", kind="chain")
    failed = row(date="2026-03-01T00:00:00Z", workload="mobilevit_xxs", status="fails")
    results.append(tmp_path / "b.csv", [more])
    results.append(tmp_path / "a.csv", [chain, failed])
    assert results.fullest_file(tmp_path) == tmp_path / "b.csv"


# ---- The gate ------------------------------------------------------------------------------------


def test_parity():
    exact = np.array([[3.0, -4.0]])
    relative, maximum, reason = session.parity(np.float32([[3.0, -4.005]]), exact, "fp32")
    assert relative == pytest.approx(1e-3, rel=1e-4)
    assert maximum == pytest.approx(5e-3, rel=1e-4)
    assert reason.startswith("wrong answer: relative L2 error 1.0e-03")
    assert not session.parity(np.float32([[3.0, -4.004]]), exact, "fp32")[2]
    assert not session.parity(np.float32([[3.0, -4.1]]), exact, "bf16")[2]
    for wrong in ([[np.nan, -4.0]], [[np.inf, -4.0]], [[3.0, 4.0]]):
        assert session.parity(np.float32(wrong), exact, "fp32")[2]
    assert "shape (2,), expected (1, 2)" in session.parity(np.float32([3, -4]), exact, "fp32")[2]


class FakeProcess:
    """Answers `prepare` with an array and nothing else."""

    def __init__(self, answer):
        self.answer = answer

    def request(self, command, *arguments, seconds=0):
        assert command == "prepare"
        return self.answer, 0.001


def test_a_wrong_provider_gets_no_number(monkeypatch, tmp_path):
    monkeypatch.setattr(session, "CACHE", tmp_path)
    workload = workloads.find("t0_stage4_gelu")
    exact = session._exact(workload, 1, "fp32")
    # One tap of one block's 3x3 left out: a small error, as real ones are.
    module = workload.build()
    module[3].spatial_mixing.partial_conv3.weight.data[:, :, 0, 1] = 0
    with torch.no_grad():
        wrong = module(workloads.images(workload, 1)).numpy()
    task = session.Task("t0_stage4_gelu", 1, 1, "fp32", tmp_path / "unused.npy")
    for answer, ok in ((exact.astype(np.float32), True), (wrong, False)):
        contender = session.Contender(workload, "ours", "fp32", [FakeProcess(answer)])
        contender.prepare(task)
        assert (contender.status == "ok") is ok
    assert "wrong answer" in contender.status
    assert contender.errors[0] > session.GATE["fp32"]
    assert contender.burst(session.QUICK, 1, streams=False) == ()  # and no process was asked


# ---- Runs ----------------------------------------------------------------------------------------


def test_a_run_is_resumed(monkeypatch, tmp_path):
    asked = []

    class FakeSession:
        def __init__(self, spec, pool, settings, run, name):
            self.spec, self.run, self.name = spec, run, name

        def __call__(self, progress):
            asked.append(self.spec.threads)
            if self.spec.threads == 2 and len(asked) == 2:
                raise KeyboardInterrupt
            return [
                row(p, workload=w, threads=self.spec.threads, run=self.run, session=self.name)
                for w, p, _ in self.spec.contenders()
            ]

    monkeypatch.setattr(session, "Session", FakeSession)
    path = tmp_path / "results.csv"
    todo = [session.Spec(("fasternet_t0",), ("ours", "mnn"), 1, n) for n in (1, 2, 4)]

    def measure(run):
        return list(session.measure(todo, path, run, lambda *_: None))

    with pytest.raises(KeyboardInterrupt):
        measure("r1")
    assert [r.threads for r in results.read(path)] == [1, 1]
    assert len(measure("r1")) == 2
    assert asked == [1, 2, 2, 4]
    assert measure("r1") == []
    assert len(measure("r2")) == 3


def test_a_disturbed_session_is_measured_again(monkeypatch, tmp_path):
    """After all others, at most `TRIES` times, in a resumed run too; the calmest session counts."""
    loads = {1: [0.5, 0.2, 0.4], 2: [0.0], 4: [0.3, 0.1]}
    asked = []

    class FakeSession:
        def __init__(self, spec, pool, settings, run, name):
            self.spec, self.run, self.name = spec, run, f"{name}-{len(asked)}"

        def __call__(self, progress):
            threads = self.spec.threads
            load = loads[threads][asked.count(threads)]
            asked.append(threads)
            return [
                row(p, 1 + load, threads=threads, run=self.run, session=self.name, other_load=load)
                for _, p, _ in self.spec.contenders()
            ]

    monkeypatch.setattr(session, "Session", FakeSession)
    path = tmp_path / "results.csv"
    todo = [session.Spec(("fasternet_t0",), ("ours", "mnn"), 1, n) for n in loads]
    runs = session.measure(todo, path, "r1", lambda *_: None)
    for _ in range(4):
        next(runs)
    runs.close()
    assert asked == [1, 2, 4, 1]
    assert len(list(session.measure(todo, path, "r1", lambda *_: None))) == 2
    assert asked == [1, 2, 4, 1, 4, 1]
    counting = results.calmest(results.read(path))
    assert [(r.threads, r.median_ms) for r in counting] == [
        *[(2, 1.0)] * 2,
        *[(1, 1.2)] * 2,
        *[(4, 1.1)] * 2,
    ]
    narrow = [session.Spec(("fasternet_t0",), ("ours",), 1, 1)]
    results.append(path, [row(p, run="r3", other_load=0.9) for p in ("ours", "mnn")])
    assert list(session.measure(narrow, path, "r3", lambda *_: None)) == []
    loads[1] = [0.5]
    asked.clear()
    assert len(list(session.measure(todo[:1], path, "r2", lambda *_: None, quick=True))) == 1


def test_calmest():
    def of(load, **changes):
        return [row(p, other_load=load, **changes) for p in ("ours", "mnn")]

    first, again = of(0.4), of(0.3, session="r1/1")
    beside = [*of(0.9, session="r1/2"), row("mnn", workload="mobilenetv2_100", session="r1/2")]
    other_run = of(0.0, run="r2", session="r2/0")
    rows = [*first, *again, *beside, *other_run]
    assert results.calmest(rows) == [*again, *beside, *other_run]
    assert results.calmest([*again, *of(0.3, session="r1/3")]) == again  # the first of equals
    died = [row("ours", other_load=0.0, session="r1/4"), failed("mnn", "died")]
    died[1] = dataclasses.replace(died[1], session="r1/4")
    assert results.calmest([*again, *died]) == again  # fewer providers have a number
    assert results.calmest([]) == []
    assert results.disturbed(first) and not results.disturbed(other_run)
    assert not results.disturbed([row(other_load=None)])


def test_specs():
    def planned(*argv):
        return specs(_parser().parse_args(argv))

    everything = planned("--threads", "1,2")
    threads = [spec.threads for spec in everything]
    assert threads == sorted(threads)  # processes live on while threads stay
    first = everything[0]
    assert first.workloads == ("fasternet_t0", "mobilenetv2_100")
    rivals = {(w, p) for w, p, _ in first.contenders() if w != "fasternet_t0"}
    assert rivals == {("mobilenetv2_100", p) for p in PROVIDERS if not p.startswith("ours")}

    networks = planned("networks", "--threads", "1")
    together = next(spec for spec in networks if "mobilenetv2_100" in spec.workloads)
    assert together.workloads[0] == "fasternet_t0"  # so that their rounds can be compared
    assert ("mobilenetv2_100", "openvino", "fp32") in set(together.contenders())
    measured = [w for spec in networks for w in spec.workloads]
    assert {s.name for s in zoo.SYSTEMS} | {f"fasternet_{n}" for n in workloads.NETWORKS} == set(
        measured
    )
    assert len(set(networks)) == len(networks)
    operators = planned("operators")
    assert {spec.threads for spec in operators} == {1, _processors()}
    sides = [name.rpartition("_")[2] for spec in operators for name in spec.workloads]
    assert set(sides) == {"96x56", "192x28", "384x14", "768x7"}
    assert not any("ours" in p for w, p, _ in operators[0].contenders() if w.startswith("dwconv"))
    streams = planned("networks", "--only", "s", "--threads", "1,2", "--mode", "streams")
    assert [(s.workloads, s.threads, s.mode) for s in streams] == [(("fasternet_s",), 2, "streams")]
    (bf16,) = planned(
        "blocks", "--only", "l_stage1_relu", "--threads", "1", "--dtype", "bf16",
        "--providers", "ours,mnn",
    )  # fmt: skip
    assert list(bf16.contenders()) == [
        ("l_stage1_relu", "ours", "fp32"),
        ("l_stage1_relu", "ours", "bf16"),
    ]
    (whole, *rest) = planned("parts", "--only", "t1", "--threads", "1,2", "--batch", "16")
    assert (whole.providers, whole.batch, whole.threads) == (("ours",), 16, 1)
    assert whole.workloads[0] == "fasternet_t1" and len(whole.workloads) == 1 + 4 + 4 + 1
    assert [(s.workloads, s.threads) for s in rest] == [(whole.workloads, 2)]
    with pytest.raises(ValueError, match="one call at a time"):
        planned("parts", "--mode", "streams")
    for argv in (["networks", "--only", "resnet"], ["networks", "--providers", "tvm"]):
        with pytest.raises(ValueError, match=r"nothing to measure|no provider 'tvm'"):
            planned(*argv)


@pytest.mark.parametrize("network", workloads.NETWORKS)
def test_parts_are_the_network(network):
    """They do the same work: FLOPs and weights."""
    whole = workloads.find(f"fasternet_{network}")
    found = [(part, workloads.find(part.workload)) for part in parts.find(network)]
    assert len({part.label for part, _ in found}) == len(found) == 9
    assert sum(part.times * w.flops(2) for part, w in found) == pytest.approx(whole.flops(2))
    count = sum(part.times * sum(p.numel() for p in w.make().parameters()) for part, w in found)
    assert count == pytest.approx(sum(p.numel() for p in whole.make().parameters()))


def test_parts_text():
    def of(workload, ms, **changes):
        gflop = workloads.find(workload).flops(1) / 1e9
        rate = gflop / ms * 1e3
        return row(workload=workload, median_ms=ms, gflop=gflop, gflop_per_s=rate, **changes)

    # Each part takes 4 ms: a chain of four blocks is 1 ms a block.
    found = [of(part.workload, 4.0, kind="operator") for part in parts.find("t0")]
    whole = of("fasternet_t0", 30.0, kind="network", peak_share=0.5)
    lines = parts.text([whole, *found]).splitlines()
    assert lines[12] == ""  # a head, nine parts, their sum, the network
    cells = {line.split("  ")[0].strip(): line.split() for line in lines[1:12]}
    assert cells["stem"][1:3] == ["4.00", f"{4 / 33:.1%}"]
    assert cells["stage 1, 1 block"][4:6] == ["1.00", f"{1 / 33:.1%}"]
    assert cells["stage 3, 8 blocks"][4:6] == ["8.00", f"{8 / 33:.1%}"]
    assert cells["sum"][1:] == ["33.00"]  # 4 patch layers, 13 blocks, head
    assert cells["the network at once"][4] == "30.00" and cells["the network at once"][-1] == "50%"
    assert parts.NOTE in parts.text([whole, *found])
    again = [dataclasses.replace(r, dtype="bf16", session="r1/1") for r in (whole, *found)]
    tables = parts.text([whole, *found, *again]).split("\n\n")
    assert [t.split("  ")[0] for t in tables[:2]] == [
        f"T0, batch 1, 1 thread, fasternet_kernels {dtype}" for dtype in ("fp32", "bf16")
    ]
    broken = [dataclasses.replace(whole, status="died"), *found[:-1]]
    title = "T0, batch 1, 1 thread, fasternet_kernels fp32"
    assert parts.text(broken).startswith(f"{title}: not measured: the network at once, head\n")


def test_interleave_keeps_what_bursts_return():
    samples = iter(range(100))
    got = timing.interleave(
        {"a": lambda: (next(samples), next(samples)), "b": lambda: ()}, rounds=3, pause_seconds=0
    )
    assert got["a"].rounds == ((0, 1), (2, 3), (4, 5))
    assert got["b"].samples == ()


def test_cli(capsys, monkeypatch, tmp_path):
    """One operator in real processes: the rows are there, right, and complete."""
    monkeypatch.setattr(session, "CACHE", tmp_path)
    path = tmp_path / "results.csv"
    argv = ["operators", "--only", "pconv3x3_t0_stage4", "--threads", "1", "--quick"]
    argv += ["--providers", "eager_channels_last,ours", "--csv", str(path)]
    assert main(argv) == 0
    assert "pconv3x3_t0_stage4, batch 1, threads 1" in capsys.readouterr().out
    rows = results.read(path)
    assert [r.provider for r in rows] == ["eager_channels_last", "ours"]
    for r in rows:
        assert r.status == "ok"
        assert 0 <= r.error_rel_l2 < 1e-5
        assert 0 < r.min_ms <= r.p20_ms <= r.median_ms <= r.p80_ms
        assert len(r.round_medians_ms) == r.rounds
        assert min(r.calls, r.gflop_per_s, r.gb_per_s, r.copy_gb_per_s) > 0
    assert rows[0].vs_ours_low <= rows[0].vs_ours <= rows[0].vs_ours_high
    assert report.compare(*rows)[0] == pytest.approx(rows[0].vs_ours, rel=1e-4)

    assert main([*argv, "--resume"]) == 0
    assert results.read(path) == rows
    assert main(["networks", "--providers", "tvm", "--csv", str(path)]) == 2
    assert "no provider 'tvm'" in capsys.readouterr().err


@pytest.mark.slow
def test_cli_parts(capsys, monkeypatch, tmp_path):
    """The whole run's tables, after a resumption too."""
    monkeypatch.setattr(session, "CACHE", tmp_path)
    path = tmp_path / "results.csv"
    argv = ["parts", "--only", "t0", "--threads", "1", "--quick", "--csv", str(path)]
    for extra in ([], ["--resume"]):
        assert main([*argv, *extra]) == 0
        out = capsys.readouterr().out
        assert "T0, batch 1, 1 thread, fasternet_kernels fp32" in out
        assert all(part.label in out for part in parts.find("t0"))
    assert len(results.read(path)) == 10


def test_a_process_that_fails_or_dies_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(session, "CACHE", tmp_path)
    task = session.Task("no_such_workload", 1, 1, "fp32", tmp_path / "none.npy")
    with session.Pool() as pool:
        process = pool.get("ours", 1)
        with pytest.raises(session.WorkerError, match="ValueError: no workload 'no_such_workload'"):
            process.request("prepare", "key", task)
        process.process.kill()
        with pytest.raises(session.WorkerError, match="died with status -9"):
            process.request("forget", "key")
        assert pool.get("ours", 1) is not process  # a new one for the next session


@pytest.mark.slow
@pytest.mark.parametrize("provider", list(PROVIDERS))
@pytest.mark.parametrize("name", ["fasternet_t0", "t0_stage4_gelu"])
def test_provider_computes_the_network(provider, name, tmp_path):
    if reason := available(provider):
        pytest.skip(reason)
    spec = session.Spec((name,), (provider,), 2, 1)
    with session.Pool(tmp_path) as pool:
        (got,) = session.Session(spec, pool, session.QUICK, "run", "session")(lambda *_: None)
    assert got.status == "ok"
    assert 0 < got.error_rel_l2 < session.GATE["fp32"]


# ---- What is made of the rows --------------------------------------------------------------------


def verdict(rows, start):
    (found,) = [v for v in report.judge(rows) if v.what.startswith(start)]
    return found


def test_goals():
    rows = [
        row("ours", 1.0),
        row("mnn", 1.3),
        row("openvino", 1.2),
        failed("onnxruntime", "wrong answer"),
        row("eager_nchw", 0.5),  # no peer
    ]
    start = "T0, batch 1, 1 thread: fasternet_kernels over"
    met = [v for v in report.judge(rows) if v.what.startswith(start)]
    assert [(v.what.removeprefix(start), v.value, v.wanted, v.met) for v in met] == [
        (" OpenVINO", "1.20x (1.20 to 1.20)", "1.10x", True)
    ]
    short = [*rows, row("openvino", 1.05, date="2026-01-03T00:00:00Z")]
    assert verdict(short, f"{start} OpenVINO").met is False
    # A ratio above the threshold whose interval reaches 1 is no success.
    loose = dataclasses.replace(rows[2], round_medians_ms=(0.9, 2.4, 4.8))
    assert verdict([rows[0], loose], f"{start} OpenVINO").met is False
    apart = row("mnn", 2.0, workload="mobilenetv2_100", session="r1/7")
    found = verdict([rows[0], apart], f"{start} MNN on mobilenetv2_100")
    assert (found.value, found.met) == ("not measured in turns", None)
    missing = [v for v in report.judge([]) if v.what.startswith("T1, batch 1, 1 thread")]
    assert [(v.value, v.met) for v in missing] == [("not measured", None)]


def test_goals_of_shares():
    chain = {"kind": "chain", "act": "relu"}
    rows = [
        row(workload="t0_stage1_relu", channels=40, peak_share=0.8, **chain),
        row(workload="t0_stage2_relu", channels=80, peak_share=0.8, **chain),
        row(workload="t1_stage2_gelu", channels=128, peak_share=0.1, kind="chain", act="gelu"),
    ]
    shares = [v for v in report.judge(rows) if "share of FMA peak" in v.what]
    assert [(v.value, v.wanted, v.met) for v in shares] == [
        ("80.0%", "76%", True),
        ("80.0%", "92%", False),
    ]


def test_text():
    text = report.text([row("ours", 1.0), row("mnn", 1.3)])
    assert "1.30x (1.30 to 1.30)" in text
    assert "1 met, 0 fall short" in text
    assert "python -m bench" in report.text([])
    lines = report.session_text("title", [row("ours"), failed("mnn", "died with status -11")])
    assert "died with status -11" in lines
    assert lines.index("fasternet_kernels") < lines.index("died")


SYNTHETIC = [
    *(
        row(provider, median, workload=f"fasternet_{name}", threads=threads)
        for name in ("t0", "l")
        for threads in (1, 2)
        for provider, median in (("eager_channels_last", 2.0), ("mnn", 0.8), ("ours", 1.0))
    ),
    row("mnn", 3.0, workload="mobilenetv2_100"),
    failed("openvino", "openvino is not installed"),
    row("ours", 9.0, date="2025-01-01T00:00:00Z", workload="t1_stage1_gelu", kind="chain"),
]


def layer(name, provider, median_ms, threads=1, **changes):
    values = {"kind": "layers", "workload": name, "threads": threads, "act": "", "gflop": 1.0}
    values |= {"peak_gflop_per_s": 200.0, "gflop_per_s": 1e3 / median_ms, "session": "layers"}
    return row(provider, median_ms, **(values | changes))


COMPARED = [
    *(row(p, m) for p, m in (("openvino", 6.0), ("onnxruntime", 8.0), ("ours", 4.0))),
    row("openvino", 3.0, workload="mobilenetv2_100"),
    row("onnxruntime", 12.0, workload="mobilevit_xxs", height=256, width=256),
    failed("openvino", "no such layer", workload="mobilevit_xxs"),
    row("onnxruntime", 5.0, workload="edgenext_xx_small"),
    failed("onnxruntime", "cannot be exported", workload="fbnetc_100"),
    *(
        layer(f"{name}_{c}x{side}", provider, median)
        for c, side in workloads.MAPS[:2]
        for name, provider, median in (
            ("dwconv3x3", "eager_nchw", 2.0),
            ("pconv3x3", "eager_nchw", 4.0),
            ("pconv3x3", "ours", 1.0),
            ("pconv_pw", "eager_nchw", 6.0),
            ("pconv_pw", "ours", 3.0),
            ("dwconv_pw", "openvino", 4.0),
        )
    ),
]


def lines_of(text):
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in cells}


def test_networks_beside_each_other():
    pair = tables.beside(COMPARED, "fasternet_t0", "mobilevit_xxs", 1)
    assert (pair.rival.provider, pair.general.provider) == ("onnxruntime", "openvino")
    assert pair.ratio == (3.0, 3.0, 3.0)
    assert pair.general_ratio == (2.0, 2.0, 2.0)
    apart = [dataclasses.replace(COMPARED[2], session="r1/9"), *COMPARED[3:]]
    assert tables.beside(apart, "fasternet_t0", "mobilevit_xxs", 1) is None
    later = row("onnxruntime", 4.0, workload="mobilevit_xxs", session="r2")
    assert tables.beside([*COMPARED, later], "fasternet_t0", "mobilevit_xxs", 1) == pair

    rivals = lines_of(tables.rivals_text(COMPARED))
    assert rivals["MobileViT-XXS"] == [
        "69.0 %", "3.35x", "2.00x (2.00 to 2.00)", "3.00x (3.00 to 3.00)"
    ]  # fmt: skip
    assert rivals["MobileNetV2"][-1] == "0.75x (0.75 to 0.75)"  # a loss is shown
    text = tables.networks_text(COMPARED)
    table = lines_of(text)
    assert table["**FasterNet-T0**"][3:5] == ["4.00", "fasternet_kernels"]
    assert table["MobileViT-XXS"][-1] == "3.00x (3.00 to 3.00) (T0)"
    assert table["FBNet-C"][3:] == ["-", "-", "-"]
    assert "- FBNet-C, ONNX Runtime: cannot be exported" in text
    for name in ("HorNet", "TRT-ViT", "PP-PicoDet"):
        assert name in tables.left_out_text()
    assert "python -m bench networks" in tables.networks_text([])


# What every table and chart but that of published accuracies can show.
WHOLE = [
    *COMPARED,
    row("mnn", 7.0),
    *(row(p, m, workload="fasternet_l") for p, m in (("ours", 40.0), ("openvino", 50.0))),
    *(
        row(
            workload=f"{n}_stage1_relu", channels=c, kind="chain", act="relu", gb_per_s=9.0,
            copy_gb_per_s=10.0, peak_gflop_per_s=200.0, session=f"r1/{n}",
        )
        for n, c in (("t0", 40), ("l", 192))
    ),
    *(
        row(p, m, workload=f"fasternet_{n}_step", kind="training", session=f"r1/{n} step")
        for n in ("t0", "s")
        for p, m in (("eager_channels_last", 200.0), ("ours", 100.0))
    ),
]  # fmt: skip


def slower(rows):
    """The same in a later run on a machine of a third of the speed."""
    return [
        dataclasses.replace(
            r,
            run="r2",
            session=r.session.replace("r1", "r2") + " r2",
            date="2026-02-03T04:05:06Z",
            commit="def",
            median_ms=3 * r.median_ms,
            p20_ms=3 * r.p20_ms,
            p80_ms=3 * r.p80_ms,
            round_medians_ms=tuple(3 * t for t in r.round_medians_ms),
            gflop_per_s=r.gflop_per_s / 3,
            peak_share=r.peak_share / 3,
        )
        for r in rows
    ]


def drawn(rows, folder):
    return {file.stem: file.read_bytes() for file in plot.draw(rows, folder, ["svg"])}


@pytest.mark.slow
def test_times_side_by_side_are_of_one_run(tmp_path):
    """A later run of a part changes no table and no chart, one of everything all of them."""
    timed = {n: make for n, make in pages.TABLES.items() if n not in ("left-out", "errors")}
    before = {name: make(WHOLE) for name, make in timed.items()}
    charts = drawn(WHOLE, tmp_path / "before")
    assert len(charts) == 6
    part = [
        r
        for r in WHOLE
        if r.ok and re.match(r"fasternet_t0(_step)?$|t0_stage1|.*_96x56$", r.workload)
    ]
    assert {r.kind for r in part} == {r.kind for r in WHOLE}
    rows = [*WHOLE, *slower(part)]
    assert {name: make(rows) for name, make in timed.items()} == before
    assert drawn(rows, tmp_path / "part") == charts
    rows = [*WHOLE, *slower(r for r in WHOLE if r.ok)]
    after = {name: make(rows) for name, make in timed.items()}
    ratios = {"rivals", "conclusions"}  # which a machine's speed does not change
    assert {name for name in timed if after[name] == before[name]} == ratios
    again = drawn(rows, tmp_path / "whole")
    assert not [name for name in charts if again[name] == charts[name]]


def test_a_run_of_the_goals_leaves_the_networks_together(tmp_path):
    """It has more providers of the FasterNets and of MobileNetV2, and no other network."""
    goals = [r for r in WHOLE if r.kind == "network" and r.ok and "mobilev" not in r.workload]
    goals = slower(r for r in goals if r.workload != "edgenext_xx_small")
    goals += slower([row(p, 30.0) for p in ("eager_nchw", "torch_compile", "ours_fast")])
    goals += slower([row("mnn", 2.5, workload="mobilenetv2_100")])
    rows = [*WHOLE, *goals]
    table = lines_of(tables.networks_text(rows))
    assert table["**FasterNet-T0**"][3:5] == ["4.00", "fasternet_kernels"]
    assert table["MobileNetV2"][3:] == ["3.00", "OpenVINO", "0.75x (0.75 to 0.75) (T0)"]
    for make in (tables.networks_text, tables.rivals_text, tables.conclusions_text):
        assert make(rows) == make(WHOLE)
    charts, after = (drawn(r, tmp_path / f"{len(r)}") for r in (WHOLE, rows))
    assert after["accuracy_threads1"] == charts["accuracy_threads1"]
    # What shows FasterNet by every provider is of the run that has most of them.
    assert "| fasternet_t0 | 90.00 | 90.00 |" in report.readme_text(rows)
    assert after["latency_batch1_threads1"] != charts["latency_batch1_threads1"]


def test_operators_and_conclusions():
    text = tables.operators_text(COMPARED)
    assert (
        "| PConv, split and cat | fasternet_kernels | 1.00 (1000) | 1.00 (1000) | - | - |" in text
    )
    assert "| dense 3x3 | the paper, i9-9900X, eager | 35.67 |" in text
    assert "| PConv + 1x1 here | 1.33x (1.33 to 1.33) |" in text
    claims = lines_of(tables.conclusions_text(COMPARED))
    viT = claims["FasterNet-T0 is faster than MobileViT-XXS"]
    assert (viT[0], viT[-1]) == ("3.35x", "holds; less than published")
    assert claims["FasterNet-T0 is faster than MobileNetV2"][-1] == "does not hold"
    assert claims["FasterNet-L is faster than Swin-B"][-1] == "not measured"
    flops = claims["PConv does more FLOPS than depthwise, 96x56x56"]
    assert flops[1:3] == ["0.50x (0.50 to 0.50)", "2.00x (2.00 to 2.00)"]
    assert flops[3] == "only with these kernels; less than published"
    assert "python -m bench operators" in tables.operators_text([])


@pytest.mark.parametrize(
    "general, ours, words",
    [
        (None, None, "not measured"),
        ((1.2, 1.1, 1.3), (1.5, 1.4, 1.6), "holds"),
        ((1.2, 1.1, 1.3), None, "holds"),
        ((1.05, 1.01, 1.08), (1.5, 1.4, 1.6), "holds; less than published"),
        ((0.8, 0.7, 0.9), (1.5, 1.4, 1.6), "only with these kernels"),
        ((0.8, 0.7, 0.9), (1.05, 1.01, 1.08), "only with these kernels; less than published"),
        ((1.1, 0.9, 1.3), (1.5, 1.4, 1.6), "holds with these kernels; undecided without"),
        (None, (1.5, 1.4, 1.6), "holds with these kernels; others not measured"),
        ((0.8, 0.7, 0.9), (0.9, 0.8, 0.95), "does not hold"),
        ((1.05, 0.95, 1.2), (0.9, 0.8, 0.95), "undecided: the interval holds 1"),
        (None, (1.1, 0.9, 1.3), "undecided: the interval holds 1"),
    ],
)
def test_verdicts(general, ours, words):
    """Of the claim of being 1.1 times faster."""
    intervals = (None if i is None else stats.Interval(*i) for i in (general, ours))
    assert tables.verdict(*intervals, 1.1) == words


def test_published_figures():
    """Every network has an accuracy and a cost, every figure a source."""
    figures = published.read()
    names = [f"fasternet_{n}" for n in workloads.NETWORKS] + [s.name for s in zoo.SYSTEMS]
    for name in names:
        assert 60 < figures.number(name, "top1") < 90
        assert 0.1 < figures.number(name, "gmacs") < 20
    assert all(figure.source.startswith("arXiv ") for figure in figures.figures.values())
    assert set(figures.subjects("top1")) == set(names)
    found = workloads.all_workloads()
    for subject in figures.subjects("mmacs"):
        macs = found[subject].flops(1) / MAC / 1e6
        assert figures.number(subject, "mmacs") == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize("name", ["mobileone_s0", "edgenext_xx_small", "shufflenet_v2_x1_5"])
def test_networks_of_others(name):
    """They are what was published, and an exporter reads them."""
    try:
        zoo.import_timm()
    except ImportError as error:
        pytest.skip(str(error))
    workload = workloads.find(name)
    assert workload.flops(1) == pytest.approx(workload.about_flops(1), rel=0.05)
    assert not any("ours" in provider for provider in workload.providers)


def test_a_network_that_cannot_be_exported_costs_its_own_row(monkeypatch, tmp_path):
    """Its row says why, no process is asked, and the network beside it is measured."""
    if reason := available("onnxruntime"):
        pytest.skip(reason)

    class Unexportable(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.lstsq(x[0, 0], x[0, 0]).solution[None]

    def contender(name, make):
        readers = workloads.ONNX_READERS
        shape = (3, 16, 16)
        workload = workloads.Workload(name, "network", shape, "", make, readers, False)
        process = FakeProcess(session._exact(workload, 1, "fp32").astype(np.float32))
        return session.Contender(workload, "onnxruntime", "fp32", [process])

    monkeypatch.setattr(session, "CACHE", tmp_path)

    def fine():
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())

    both = [contender("bad", Unexportable), contender("good", fine)]
    for one in both:
        one.prepare(session.Task(one.workload.name, 1, 1, "fp32", tmp_path / "unused.npy"))
    bad, good = both
    assert "linalg_lstsq" in bad.status
    assert bad.burst(session.QUICK, 1, streams=False) == ()
    assert good.status == "ok"


def test_tables():
    lines = report.readme_text(SYNTHETIC).splitlines()
    header = next(line for line in lines if line.startswith("|"))
    labels = ["eager, channels_last", "MNN", "fasternet_kernels"]
    assert header == f"|  | {' | '.join(labels)} | fasternet_kernels over the best other |"
    t0, large, mobilenet = [line for line in lines if line.startswith(("| f", "| m"))][:3]
    assert (
        t0 == "| fasternet_t0 | 2.00 | **0.80** | 1.00 | 0.80x (0.80 to 0.80) |"
    )  # a loss is shown
    assert large.startswith("| fasternet_l |")
    assert mobilenet == "| mobilenetv2_100 | - | **3.00** | - | - |"


def test_a_gradient_that_is_off_shows(tmp_path):
    """A step in which one weight's gradient is 1 % off does not pass for the same training."""
    found = training._model

    def model(plain, provider):
        made = found(plain, provider)
        weight = next(p for p in made.parameters() if p.shape[-1] == 3)  # of a PConv
        weight.register_hook(lambda grad: grad * 1.01)
        return made

    task = tmp_path / "exact.npy", "t0", 4, 64, torch.get_num_threads()
    training.Trainer("float64").answer(*task)
    right = training.Trainer("ours").prepare(*task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_model", model)
        wrong = training.Trainer("ours").prepare(*task)
    assert right[0] <= training.GATE["gelu"] < wrong[0]


@pytest.mark.slow
def test_a_training_step(tmp_path):
    """Measured, written, judged and shown; what is wrong, or does not run, gets no number."""
    path = tmp_path / "rows.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(training.LABELS, "unheard_of", "a provider that does not start")
        ((title, rows, saved),) = training.measure(
            path,
            "run",
            [("t0", 4)],
            ["eager_channels_last", "ours", "unheard_of"],
            size=64,
            quick=True,
        )
        text = training.session_text(title, rows, saved)
        patch.setitem(training.GATE, "gelu", 0.0)
        ((_, gated, _),) = training.measure(
            path.with_name("gated.csv"), "run", [("t0", 4)], ["ours"], size=64, quick=True
        )
    assert not gated[0].ok and gated[0].median_ms is None and gated[0].error_rel_l2 < 1e-5
    eager, ours, wrong = rows
    assert "batch 4" in title and "saves" in text and "a provider that does not start" in text
    assert eager.ok and ours.ok and not wrong.ok and wrong.median_ms is None
    assert saved["ours"] < saved["eager_channels_last"]
    read = results.read(path)
    assert [r.provider for r in read] == [r.provider for r in rows]
    line = training.table_text(read).splitlines()[-1]
    assert line.startswith("| T0, batch 4, ") and line.endswith(" | - |")
    assert f", {eager.vs_ours:.2f}x (" in line
    assert "Not measured" in training.table_text([])
    # That batch is no goal; the same rows with the goal's are judged.
    goal = [dataclasses.replace(r, batch=16) for r in read]
    verdict = next(v for v in training.judge(goal) if "T0" in v.what and "eager" in v.what)
    assert verdict.value == str(report.compare(goal[0], goal[1]))
    assert all(v.met is None for v in training.judge(read))


@pytest.mark.slow
def test_a_training_provider_that_dies(tmp_path, monkeypatch):
    """While it is timed: that costs its own numbers only."""
    found = session.Process.request

    def request(process, command, *arguments):
        if command == "burst" and "ours" in process.log.name:
            process.process.kill()
            process.process.wait()
        return found(process, command, *arguments)

    monkeypatch.setattr(session.Process, "request", request)
    providers = ["eager_channels_last", "ours"]
    ((_, (eager, ours), _),) = training.measure(
        tmp_path / "rows.csv", "run", [("t0", 4)], providers, size=64, quick=True
    )
    assert eager.ok and eager.median_ms > 0 and eager.vs_ours is None
    assert "died with status -9" in ours.status and ours.median_ms is None


def marked(*names):
    return "".join(
        f"above {n}\n<!-- {n}: generated by `python -m bench readme` -->\nof before\n"
        f"<!-- {n}: end -->\nbelow {n}\n"
        for n in names
    )


def test_pages_are_written_between_their_marks(tmp_path):
    (tmp_path / "docs").mkdir()
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "page.md"
    readme.write_text(marked("speed", "chart"))
    page.write_text(marked("left-out", "chart-accuracy", "chart-roofline"))
    for _ in range(2):
        pages.update(COMPARED, tmp_path)
        text = readme.read_text()
        assert text.startswith("above speed\n<!-- speed: generated")
        assert text.endswith("<!-- chart: end -->\nbelow chart\n")
        assert "of before" not in text + page.read_text()
        assert "(docs/charts/accuracy_threads1.svg)" in text
        assert "(charts/accuracy_threads1.svg)" in page.read_text()
        assert "No chart yet" in page.read_text()  # of chains
    assert text.count("| fasternet_t0 |") == 1
    drawn = {file.name for file in (tmp_path / "docs" / "charts").iterdir()}
    assert {"accuracy_threads1.svg", "speedup_threads1.svg"} <= drawn
    for wrong, why in (
        (marked("speed").replace("<!-- speed: end -->", ""), "lacks its first or its last line"),
        (marked("speed").replace(": generated by", ": made by"), "lacks its first or its last"),
        (marked("sped"), "no generated block 'sped'"),
    ):
        readme.write_text(wrong)
        with pytest.raises(ValueError, match=f"README.md: .*{why}"):
            pages.update(COMPARED, tmp_path)
        assert readme.read_text() == wrong


@pytest.fixture(scope="module")
def committed():
    """The rows of the fullest CSV, and what they draw."""
    fullest = results.fullest_file()
    rows = results.calmest(results.read(fullest)) if fullest else []
    return rows, plot.figures(rows) if rows else {}


@pytest.mark.parametrize("path", pages.page_files(results.ROOT), ids=lambda path: path.name)
def test_pages_are_what_the_results_say(path, committed):
    rows, charts = committed
    page = path.read_text(encoding="utf-8")
    folder = "docs/charts" if path.name == "README.md" else "charts"
    same = pages.with_blocks(page, rows, list(charts), folder)
    assert same == page, "run python -m bench readme"


def test_committed_charts_are_what_the_results_say(committed, tmp_path):
    """Byte for byte where the same matplotlib drew them, the same words where another did."""
    import matplotlib

    _, charts = committed
    for file in sorted((results.ROOT / pages.FOLDER).glob("*.svg")):
        assert file.stem in charts, "run python -m bench readme"
        (again,) = plot.save({file.stem: charts[file.stem]}, tmp_path, ["svg"])
        drawn, shown = (f.read_text(encoding="utf-8") for f in (again, file))
        if f"Matplotlib v{matplotlib.__version__}," not in shown:
            drawn, shown = (sorted(re.findall("<!-- (.*) -->", text)) for text in (drawn, shown))
            assert shown, f"{file.name} has no words"
        assert drawn == shown, "run python -m bench readme"


def test_charts(tmp_path):
    rows = [
        *SYNTHETIC,
        *(
            row(workload=f"{n}_stage1_relu", channels=c, kind="chain", act="relu", peak_share=0.9)
            for n, c in (("t0", 40), ("l", 192))
        ),
    ]
    files = plot.draw(rows, tmp_path)
    names = {"latency_batch1_threads1", "latency_batch1_threads2", "peak_share_threads1"}
    names |= {"speedup_threads1", "speedup_threads2"}
    assert {f.name for f in files} == {f"{n}.{end}" for n in names for end in ("svg", "png")}
    assert all(f.stat().st_size > 5_000 for f in files)
    again = plot.draw(rows, tmp_path / "again")
    assert files[0].read_bytes() == again[0].read_bytes()
    with pytest.raises(ValueError, match="no results to draw"):
        plot.draw([], tmp_path)


def test_every_peer_has_a_provider():
    assert set(PEERS) < set(PROVIDERS)
    colours = [provider.colour for provider in PROVIDERS.values()]
    assert len(set(colours)) == len(colours)


# ---- The machine ---------------------------------------------------------------------------------


def test_fma_peak():
    runtime = pytest.importorskip("fasternet_runtime")
    assert runtime.fma_peak(seconds=1e-3) > 1e8
    for seconds in (0, -1, 11, float("nan")):
        with pytest.raises(ValueError, match="fma_peak: seconds is"):
            runtime.fma_peak(seconds)


def test_models_of_chains_have_no_drop_path():
    """A chain is built as for inference: nothing random in it."""
    block = workloads.find("t0_stage4_gelu").build()[0]
    assert isinstance(block, models.Block)
    assert isinstance(block.drop_path, torch.nn.Identity)
