"""Tunes the Triton kernels on this GPU and writes the tables that their launchers read.

A launcher asks for a configuration by kernel, shape and precision; the table's nearest row answers.
Here the calls of the networks' stages are made, what they ask for is noted, and the configurations
around the table's answer are timed. The fastest becomes a row for exactly that shape. For the
in-place PConv the kernel of csrc/cuda is timed as well, and "cuda" stands in the row where it wins.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from bench import offline
from bench.calls import TRAINING, TRAINING_BATCH, Call
from bench.gpu_timing import Device, Prepared

__all__ = ["tune"]

GAIN = 0.97  # a configuration has to be so much faster than the table's answer to take its place
NETWORKS = ("t0", "l", "s", "t1", "t2", "m")
OPS = ("block", "pconv3x3_", "pconv3x3", "patch_conv", "pconv_pw")
Key = tuple[str, tuple[int, ...], str]  # kernel, shape, precision


def _plan(dry: bool) -> Iterator[Call]:
    """The calls, the ones that matter most first."""
    if dry:
        yield Call("pconv3x3_", "t0", 1, 1, "fp16", side=4)
        yield Call("pconv3x3_backward", "t0", 1, 1, "fp16", side=4)
        return
    first, others = NETWORKS[:2], NETWORKS[2:]
    large = ((OPS, 256), (TRAINING, TRAINING_BATCH))
    for names, work in ((first, large), (others, large), (NETWORKS, ((OPS, 1), (OPS, 32)))):
        for ops, batch in work:
            for name, op, stage in itertools.product(names, ops, (1, 2, 3, 4)):
                yield Call(op, name, stage, batch, "bf16")


@contextlib.contextmanager
def _answering(answers: dict[Key, dict], asked: dict[Key, dict]) -> Iterator[None]:
    """Launchers get `answers` for the keys there, else the table's; `asked` gets what they ask
    for."""
    from fasternet_kernels.triton import common

    table = common._nearest

    def nearest(op, shape, kind, capability):
        key = op, tuple(shape), kind
        config = answers.get(key) or table(op, shape, kind, capability)
        asked[key] = config
        return config

    with mock.patch.object(common, "_nearest", nearest):
        yield


def candidates(config: dict) -> list[dict]:
    """The configuration and its neighbours: one block halved or doubled, other numbers of warps and
    of pipeline stages."""
    found = [config]
    for name, value in config.items():
        if name.startswith("BLOCK"):
            others = [value // 2, value * 2]
        elif name == "num_warps":
            others = [4, 8]
        elif name == "num_stages":
            others = [1, 2, 3, 4]
        else:
            continue
        least = 16 if name.startswith("BLOCK") else 1
        found += [{**config, name: v} for v in others if v != value and v >= least]
    return found


def _gpu(device: Device) -> offline.Gpu:
    if device.dry:
        return offline.GPUS[9, 0]
    p = torch.cuda.get_device_properties(0)
    return offline.Gpu(
        p.name, (p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin
    )


def _compile_ahead(trials: list[tuple[Call, Key, dict]], gpu: offline.Gpu) -> None:
    """Compiles what the trials will launch into Triton's cache, on all processors."""
    todo, seen = [], set()
    for call, wanted, config in trials:
        with _answering({wanted: config}, {}), contextlib.suppress(Exception):
            for launch in offline.record(call, gpu):
                key = offline.key(launch, gpu.capability)
                if key not in seen:
                    seen.add(key)
                    todo.append(offline.Kernel(gpu, launch, (call,)))
    failed = sum(bool(binary.error) for binary in offline.binaries(todo))
    print(f"compiled {len(todo)} kernels ahead, {failed} failed", flush=True)


def _prepare(device: Device, call: Call) -> Prepared:
    from bench.gpu_sections import op

    x, *rest = call.arguments(device.kind)
    function = op(device, call.op)
    return device.rotating(lambda t: function(t, *rest), x, in_place=call.op.endswith("_"))


def _cuda(device: Device, call: Call) -> Callable[[], Prepared]:
    from fasternet_kernels import cuda

    def prepare() -> Prepared:
        x, weight = call.arguments(device.kind)
        if device.dry or not cuda.pconv3x3_(x.clone(), weight):
            raise RuntimeError(cuda.unavailable() or "not for these arguments")
        return device.rotating(lambda t: cuda.pconv3x3_(t, weight), x, in_place=True)

    return prepare


def _time(device: Device, prepare: dict[str, Callable[[], Prepared]]) -> dict[str, float]:
    """Seconds of each that runs at all."""
    made = {}
    for name, make in prepare.items():
        with contextlib.suppress(Exception):  # too much shared memory, for one
            made[name] = make()
    times = device.measure(made, rounds=3, burst_seconds=0.01) if made else None
    if times is None:
        return dict.fromkeys(made, 0.0)
    return {name: taken.median for name, taken in times.items()}


def tune(device: Device, folder: Path, seconds: float) -> None:
    """Tunes as much as there is time for and writes the tables to ``folder``; outside a dry run
    also to the package, so that what is measured afterwards uses them.

    Args:
        seconds: for all of it. A table is written after each shape.
    """
    from fasternet_kernels.triton import common

    end = time.monotonic() + seconds
    gpu = _gpu(device)
    table = json.loads(json.dumps(common._table(gpu.capability)))
    source = next(
        path
        for path in sorted((Path(common.__file__).parent / "tuning").glob("*.json"))
        if json.loads(path.read_text())["capabilities"] == table["capabilities"]
    )
    # What the calls ask for; nothing is launched yet, for the compilers are forked from here.
    wanted: dict[Key, tuple[Call, dict]] = {}
    for call in _plan(device.dry):
        asked: dict[Key, dict] = {}
        with _answering({}, asked):
            offline.record(call, gpu)
        for key, config in asked.items():
            wanted.setdefault(key, (call, config))
    room = 3 if device.dry else max(8, round(seconds))  # shapes that a second each is left for
    wanted = dict(list(wanted.items())[:room])
    if not device.dry:
        _compile_ahead(
            [(call, key, c) for key, (call, config) in wanted.items() for c in candidates(config)],
            gpu,
        )
    for key, (call, config) in wanted.items():
        if time.monotonic() > end:
            print("no time for more")
            break
        kernel, shape, kind = key
        best = _best(device, call, key, config)
        row = {"shape": list(shape), "precision": kind, "config": best}
        table[kernel] = [
            r for r in table[kernel] if (r["shape"], r["precision"]) != (list(shape), kind)
        ] + [row]
        print(f"{kernel} {shape} {kind}: {best}", flush=True)
        for to in (folder,) if device.dry else (folder, source.parent):
            to.mkdir(parents=True, exist_ok=True)
            write_table(to / source.name, table)


def _best(device: Device, call: Call, key: Key, config: dict) -> dict:
    trials = candidates(config)[: 2 if device.dry else None]

    def prepare(trial: dict) -> Callable[[], Prepared]:
        def make() -> Prepared:
            with _answering({key: trial}, {}):
                return _prepare(device, call)  # a graph: what it launches is settled here

        return make

    ways = {str(i): prepare(trial) for i, trial in enumerate(trials)}
    if call.op == "pconv3x3_":
        ways["cuda"] = _cuda(device, call)
    times = _time(device, ways)
    if "0" not in times:
        return config
    name = min(times, key=times.get)
    if times[name] >= GAIN * times["0"]:
        name = "0"
    return {**config, "cuda": True} if name == "cuda" else trials[int(name)]


def write_table(path: Path, table: dict) -> None:
    """A table as JSON, one row a line."""
    parts = [f'  "capabilities": {json.dumps(table["capabilities"])}']
    for kernel, rows in table.items():
        if kernel != "capabilities":
            lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
            parts.append(f'  "{kernel}": [\n{lines}\n  ]')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
