"""Times on a CUDA device, by its own events; in a dry run the same calls on the CPU, no times."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fasternet_kernels import timing

__all__ = ["Device", "Prepared"]

Call = Callable[[], object]
CACHE_BYTES = 256 << 20  # inputs that take turns add up to more than any L2
MOST_INPUTS = 32
SAMPLE_SECONDS = 2e-3  # of one sample at least: events tick in half microseconds


class Prepared:
    """Something to time.

    Attributes:
        call: starts one unit of work.
        units: calls of the op that a unit holds.
        refresh: before each sample, not timed.
    """

    def __init__(self, call: Call, units: int = 1, refresh: Call | None = None):
        self.call, self.units, self.refresh = call, units, refresh


class Device:
    """A GPU, or the CPU that stands in for it in a dry run."""

    def __init__(self, dry: bool):
        self.dry = dry
        self.kind = "cpu" if dry else "cuda"

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def inputs(self, x: Tensor) -> list[Tensor]:
        """Copies of ``x``, as many as no cache can hold."""
        count = 2 if self.dry else CACHE_BYTES // max(x.numel() * x.element_size(), 1) + 1
        return [x.clone() for _ in range(min(count, MOST_INPUTS))]

    def graph(self, call: Call, warmups: int = 3) -> Call:
        """The work of a call as a CUDA graph's replay. Its memory belongs to the graph."""
        if self.dry:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmups):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def rotating(
        self, function: Callable[[Tensor], object], x: Tensor, in_place: bool = False
    ) -> Prepared:
        """``function`` on copies of ``x`` one after the other, as one graph: cold caches and no
        time between launches.

        Where it changes its argument, the copies are made anew before each sample, so that nothing
        grows beyond the number format or fades to denormal numbers.
        """
        copies = self.inputs(x)

        def unit() -> None:
            for each in copies:
                function(each)

        def refresh() -> None:
            for each in copies:
                each.copy_(x)

        return Prepared(self.graph(unit), len(copies), refresh if in_place else None)

    def sample(self, prepared: Prepared, calls: int) -> float:
        """Seconds of one call of the op, mean of so many units."""
        if prepared.refresh is not None:
            prepared.refresh()
        if self.dry:
            prepared.call()
            return 0.0
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            prepared.call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / (calls * prepared.units)

    def measure(
        self, functions: Mapping[str, Prepared], rounds: int = 5, burst_seconds: float = 0.03
    ) -> dict[str, timing.Timing] | None:
        """Times functions in bursts that take turns; None in a dry run."""
        bursts = {}
        for name, prepared in functions.items():
            self.sample(prepared, 1)  # warm
            calls = 1
            if not self.dry and prepared.refresh is None:
                unit = max(self.sample(prepared, 1) * prepared.units, 1e-6)
                calls = max(1, round(SAMPLE_SECONDS / unit))
            bursts[name] = functools.partial(self._burst, prepared, calls, burst_seconds)
        if self.dry:
            return None
        return timing.interleave(bursts, rounds=rounds, pause_seconds=0.0)

    def _burst(self, prepared: Prepared, calls: int, seconds: float) -> list[float]:
        self.sample(prepared, 1)
        end = time.perf_counter() + seconds
        samples = []
        while time.perf_counter() < end or len(samples) < 3:
            samples.append(self.sample(prepared, calls))
        return samples
