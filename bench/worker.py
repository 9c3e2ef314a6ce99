"""The process in which one provider lives: python -m bench.worker FD PROVIDER

It answers requests (command, arguments) on the connection FD with ("ok", result) or ("error",
reason). A process for each provider keeps the thread pools of one out of the bursts of another, and
a crash costs one provider's rows only. "machine" in place of a provider measures the machine;
"training:" before one, its training steps.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

from bench.providers import PROVIDERS, Task

COPY_BYTES = 256 << 20  # of source and of target: together more than the caches that servers have


class Worker:
    """What a request's command names."""

    def __init__(self, provider: str):
        from fasternet_kernels import timing  # and with it torch, which Machine does without

        self.timing = timing
        self.provider = PROVIDERS[provider]
        self.calls: dict[str, Callable[[], np.ndarray]] = {}

    def prepare(self, key: str, task: Task) -> tuple[np.ndarray, float]:
        """Makes ready what `key` will stand for; returns its answer and about how long it takes."""
        call = self.provider.prepare(task)
        for _ in range(2):
            start = time.perf_counter()
            answer = call()
            seconds = time.perf_counter() - start
            if seconds > 1:
                break
        self.calls[key] = call
        return np.array(answer, dtype=np.float32), seconds

    def burst(self, key: str, seconds: float, dropped: int, minimum: int) -> tuple[float, ...]:
        return self.timing.burst(self.calls[key], seconds, dropped, minimum)

    def forget(self, key: str) -> None:
        self.calls.pop(key, None)
        if "torch" in sys.modules:
            sys.modules["torch"].compiler.reset()
        gc.collect()


class Machine:
    """The limits that shares are taken of."""

    def __init__(self):
        self.pair: tuple[np.ndarray, np.ndarray] | None = None

    def peak(self, seconds: float, threads: int) -> tuple[float, ...]:
        """Seconds for 1e9 operations of float32 multiply-adds, several samples."""
        import fasternet_runtime

        fasternet_runtime.set_num_threads(threads)
        samples = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or not samples:
            samples.append(1e9 / fasternet_runtime.fma_peak())
        return tuple(samples)

    def copy(self, threads: int) -> float:
        """Bytes read and written per second by `threads` copies of large arrays at once."""
        if self.pair is None:
            source = np.ones(COPY_BYTES, np.uint8)  # touched: pages that nobody wrote share one
            self.pair = source, np.zeros_like(source)
        source, target = (np.array_split(array, threads) for array in self.pair)
        rates = []
        for _ in range(3):
            copies = [threading.Thread(target=np.copyto, args=p) for p in zip(target, source)]
            start = time.perf_counter()
            for one in copies:
                one.start()
            for one in copies:
                one.join()
            rates.append(2 * COPY_BYTES / (time.perf_counter() - start))
        return float(np.median(rates))


def serve(connection: Connection, target: object) -> None:
    """Answers requests until the other side hangs up."""
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        try:
            reply = "ok", getattr(target, command)(*arguments)
        except Exception as error:  # a provider may fail in any way; it then has no number
            lines = str(error).strip().splitlines() or [""]
            reply = "error", f"{type(error).__name__}: {lines[0]}".rstrip(": ")
        connection.send(reply)


def _die_with_parent() -> None:
    """A stopped process cannot see that its parent has gone: let the kernel end it."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _target(name: str) -> object:
    if name == "machine":
        return Machine()
    if name.startswith("training:"):
        from bench.training import Trainer

        return Trainer(name.removeprefix("training:"))
    return Worker(name)


def main(argv: list[str]) -> None:
    """Serves one provider on the connection with the given file descriptor."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    connection = Connection(int(argv[0]))
    serve(connection, _target(argv[1]))
    os._exit(0)  # without the destructors of the runtimes, some of which hang or crash


if __name__ == "__main__":
    main(sys.argv[1:])
