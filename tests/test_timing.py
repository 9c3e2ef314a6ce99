"""fasternet_kernels.timing: turns, dropped calls, statistics."""

import time

import pytest

from fasternet_kernels import timing


def test_measure_interleaves_and_drops_first_calls():
    calls = []
    seen = []
    results = timing.measure(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        rounds=3,
        burst_seconds=0,
        pause_seconds=0,
        dropped_calls=2,
        minimum_calls=4,
        progress=lambda done, total, name: seen.append((done, total, name)),
    )
    assert list(results) == ["a", "b"]
    assert [len(samples) for samples in results["a"].rounds] == [4, 4, 4]
    assert len(calls) == 2 * 3 * (2 + 4)
    bursts = [calls[i : i + 6] for i in range(0, len(calls), 6)]
    assert all(len(set(burst)) == 1 for burst in bursts)
    assert all({bursts[i][0], bursts[i + 1][0]} == {"a", "b"} for i in (0, 2, 4))
    assert [(done, total) for done, total, _ in seen] == [(i + 1, 6) for i in range(6)]
    assert [name for _, _, name in seen] == [burst[0] for burst in bursts]


def test_measure_measures():
    results = timing.measure(
        {"fast": lambda: time.sleep(0.001), "slow": lambda: time.sleep(0.004)},
        rounds=3,
        burst_seconds=0.02,
        pause_seconds=0,
    )
    assert 0.001 <= results["fast"].minimum <= results["fast"].median
    assert results["slow"].minimum >= 0.004
    assert timing.ratio(results["slow"], results["fast"]).median > 1.5


def test_statistics():
    result = timing.Timing("x", ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)))
    assert result.samples == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert (result.minimum, result.p20, result.median, result.p80) == (1.0, 2.0, 3.5, 5.0)


def test_ratio_compares_round_by_round():
    """A machine that halves its speed between rounds does not change the ratio."""
    slow = timing.Timing("slow", ((3.0,), (6.0,), (12.0,)))
    fast = timing.Timing("fast", ((1.0,), (2.0,), (4.0,)))
    result = timing.ratio(slow, fast)
    assert (result.median, result.p20, result.p80) == (3.0, 3.0, 3.0)
    assert result.rounds == (3.0, 3.0, 3.0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="functions is empty"):
        timing.measure({})
    with pytest.raises(ValueError, match="at least 1, got 0 and 3"):
        timing.measure({"a": lambda: None}, rounds=0)
    with pytest.raises(ValueError, match="zip"):
        timing.ratio(timing.Timing("a", ((1.0,),)), timing.Timing("b", ((1.0,), (2.0,))))
