"""How many times faster, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Interval", "speedup"]

RESAMPLES = 10_000


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x ({self.low:.2f} to {self.high:.2f})"


def speedup(slower: Sequence[float], faster: Sequence[float]) -> Interval:
    """How many times faster `faster` is than `slower`.

    Both hold a round's median each, of the same rounds in the same order. A round's two bursts were
    taken within seconds of each other, so what drifts cancels in their ratio. The estimate is the
    median of those ratios; its interval, the percentile bootstrap over rounds. The seed is fixed:
    the same rounds give the same interval.

    Raises:
        ValueError: no rounds, or not equally many.
    """
    if len(slower) != len(faster) or not len(slower):
        raise ValueError(f"{len(slower)} and {len(faster)} rounds: expected as many, at least one")
    ratios = np.asarray(slower, dtype=np.float64) / np.asarray(faster, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return Interval(float(np.median(ratios)), float(low), float(high))
