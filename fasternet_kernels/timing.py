"""Fair timing of several functions that do the same work.

A processor's clock, its temperature and its other tenants drift over seconds, so timing one
function after the other compares their moments as much as their code. Here the functions take turns
in bursts of a fraction of a second, in a new order each round. A pause goes before each burst,
because the idle threads of another runtime may spin for a while after their last call, and a
burst's first calls, which find cold caches, are dropped.
"""

from __future__ import annotations

import functools
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Ratio", "Timing", "burst", "interleave", "measure", "processor_name", "ratio"]


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one function: `rounds[r]` holds the samples of round r."""

    name: str
    rounds: tuple[tuple[float, ...], ...]

    @property
    def samples(self) -> tuple[float, ...]:
        """All samples, in the order they were taken."""
        return tuple(sample for samples in self.rounds for sample in samples)

    @property
    def median(self) -> float:
        """Median over all samples."""
        return self.percentile(50)

    @property
    def p20(self) -> float:
        """A fifth of the samples is faster."""
        return self.percentile(20)

    @property
    def p80(self) -> float:
        """A fifth of the samples is slower."""
        return self.percentile(80)

    @property
    def minimum(self) -> float:
        """The fastest sample."""
        return min(self.samples)

    def percentile(self, percent: float) -> float:
        """The given percentile of all samples, percent in [0, 100]."""
        return float(np.percentile(self.samples, percent))


@dataclass(frozen=True)
class Ratio:
    """How many times faster one function is than another, from the medians of each round."""

    median: float
    p20: float
    p80: float
    rounds: tuple[float, ...]


def measure(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 10,
    burst_seconds: float = 0.3,
    pause_seconds: float = 0.2,
    dropped_calls: int = 2,
    minimum_calls: int = 3,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Timing]:
    """Times functions against each other, in bursts that take turns.

    Compile, tune and check each function before: the first call of all is timed like any other, but
    for being among a burst's dropped calls. A function that starts work on another device must wait
    for it before it returns.

    Args:
        functions: name -> what to call, without arguments; its result is discarded.
        rounds: bursts of each function.
        burst_seconds: how long a burst samples at least.
        pause_seconds: idle time before each burst.
        dropped_calls: calls at the start of each burst that are not sampled.
        minimum_calls: samples of each burst at least, however slow the function.
        progress: called after each burst with bursts done, bursts in all, and the function's name.

    Returns:
        name -> `Timing`, in the order of `functions`.

    Raises:
        ValueError: `functions` is empty, or rounds or minimum_calls is below 1.
    """
    if not functions:
        raise ValueError("functions is empty: nothing to time")
    if rounds < 1 or minimum_calls < 1:
        raise ValueError(
            f"rounds and minimum_calls must be at least 1, got {rounds} and {minimum_calls}"
        )
    bursts = {
        name: functools.partial(burst, function, burst_seconds, dropped_calls, minimum_calls)
        for name, function in functions.items()
    }
    return interleave(bursts, rounds=rounds, pause_seconds=pause_seconds, progress=progress)


def interleave(
    bursts: Mapping[str, Callable[[], Sequence[float]]],
    *,
    rounds: int,
    pause_seconds: float,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Timing]:
    """Lets bursts take turns, in a new order each round; `measure` for anything that can sample.

    Args:
        bursts: name -> what takes one burst of samples, in seconds per call.
        rounds: bursts of each name.
        pause_seconds: idle time before each burst.
        progress: called after each burst with bursts done, bursts in all, and the name.

    Returns:
        name -> `Timing`, in the order of `bursts`.
    """
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in bursts}
    order = list(bursts)
    shuffle = random.Random(0).shuffle  # the same orders in every run
    done = 0
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            time.sleep(pause_seconds)
            samples[name].append(tuple(bursts[name]()))
            done += 1
            if progress is not None:
                progress(done, rounds * len(bursts), name)
    return {name: Timing(name, tuple(taken)) for name, taken in samples.items()}


def burst(
    function: Callable[[], object], seconds: float, dropped_calls: int, minimum_calls: int
) -> tuple[float, ...]:
    """Samples of one burst, in seconds per call.

    Args:
        function: what to call.
        seconds: how long to sample at least.
        dropped_calls: calls before, which are not sampled.
        minimum_calls: samples at least, however slow the function.
    """
    for _ in range(dropped_calls):
        function()
    clock = time.perf_counter
    samples = []
    start = clock()
    end = start + seconds
    while start < end or len(samples) < minimum_calls:
        function()
        now = clock()
        samples.append(now - start)
        start = now
    return tuple(samples)


def ratio(baseline: Timing, faster: Timing) -> Ratio:
    """How many times faster `faster` is than `baseline`.

    Each round gives one ratio, of the two medians of that round: both were taken within seconds of
    each other, so what drifts cancels. Above 1, `faster` deserves its name.

    Args:
        baseline: the one to be beaten.
        faster: the other, of the same `measure` call.

    Raises:
        ValueError: the two do not have equally many rounds.
    """
    rounds = tuple(
        float(np.median(b) / np.median(f))
        for b, f in zip(baseline.rounds, faster.rounds, strict=True)
    )
    p20, median, p80 = np.percentile(rounds, [20, 50, 80])
    return Ratio(median=float(median), p20=float(p20), p80=float(p80), rounds=rounds)


def processor_name() -> str:
    """What the processor calls itself, for the captions of tables and charts."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
