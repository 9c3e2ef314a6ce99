"""The measuring sections of `make gpu`, each in a process of its own: see gpu.py."""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasternet_kernels as fk
from bench import gpu, gpu_report, gpu_tune, providers, workloads
from bench.calls import DTYPES, TRAINING_BATCH
from bench.gpu_rows import CHECKED_IMAGES, Contender, Session, Work
from bench.gpu_timing import Device, Prepared
from bench.workloads import IMAGE_SIZE, OWN_ACT, STAGES, Workload
from fasternet_kernels import models

__all__ = ["run"]

PAPER = ((96, 56), (192, 28), (384, 14), (768, 7))  # channels and side in the paper's Table 1
ORDER = ("t0", "l", "s", "t1", "t2", "m")  # the ones that matter most first


def run(section: str, args: argparse.Namespace) -> int:
    """Runs one section until its time is up; returns the exit status."""
    device = Device(args.dry_run)
    torch.backends.cudnn.benchmark = True  # the fastest convolution that it has
    session = Session(device, args.out / "gpu.csv", args.run, args.seconds or 1e9)
    name, *networks = section.split()
    SECTIONS[name](session, *networks or [args.out])
    if session.left_out:
        print(f"left out for want of time: {'; '.join(session.left_out)}")
        return gpu.UNFINISHED
    return 0


def op(device: Device, name: str) -> Callable:
    """An op as it runs on the GPU: in a dry run its Triton kernel, interpreted."""
    if device.dry:
        from fasternet_kernels.triton import kernel

        return kernel(name)
    return getattr(torch.ops.fasternet_kernels, name).default


# ---- Peaks ---------------------------------------------------------------------------------------


def _peaks(session: Session, out: Path) -> None:
    """A large copy, bytes read and written; large products of random matrices."""
    device = session.device
    size = 1 << 12 if device.dry else 1 << 30
    source = torch.randn(size // 4, device=device.kind)
    to = torch.empty_like(source)
    work = Work("peak", "copy", (1, 1, 1, size), "", mbyte=2 * size / 1e6)
    session.measure(work, {"torch": Contender(lambda: Prepared(lambda: to.copy_(source)))})
    n = 32 if device.dry else 8192
    for name in DTYPES:
        a, b = (torch.randn(n, n, device=device.kind).to(DTYPES[name]) for _ in range(2))
        work = Work("peak", name, (1, 1, n, n), name, gflop=2 * n**3 / 1e9)
        multiply = functools.partial(_multiply, a, b)
        session.measure(work, {"torch": Contender(functools.partial(Prepared, multiply))})


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """In float32 as convolutions are by default: TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        return a @ b
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# ---- Operators -----------------------------------------------------------------------------------


def _operators(session: Session, out: Path) -> None:
    """PConv beside the convolutions that the paper compares it with, at its Table 1 shapes."""
    device = session.device
    plan = [(32, "bf16"), (32, "fp16"), (32, "fp32"), (256, "bf16")]
    for batch, dtype in [(1, "fp32"), (1, "fp16")] if device.dry else plan:
        for channels, side in ((40, 4),) if device.dry else PAPER:
            shape = (batch, channels, side, side)
            session.measure(
                Work("operator", f"conv_{channels}x{side}", shape, dtype),
                _operator_contenders(device, shape, DTYPES[dtype]),
                seconds=3.0,
            )


def _operator_contenders(device: Device, shape, dtype: torch.dtype) -> dict[str, Contender]:
    batch, c, side, _ = shape
    cp, pixels, size = c // 4, batch * side * side, dtype.itemsize
    torch.manual_seed(0)
    x = torch.randn(shape, device=device.kind).to(dtype).to(memory_format=torch.channels_last)
    few = x[:CHECKED_IMAGES]

    def weight(out_channels: int, in_channels: int) -> Tensor:
        w = torch.randn(out_channels, in_channels, 3, 3, device=device.kind)
        return (w * (9 * in_channels) ** -0.5).to(dtype)

    def conv(w: Tensor, groups: int, layout=torch.channels_last, cudnn: bool = False) -> Contender:
        w = w.contiguous(memory_format=layout)
        image = x.contiguous(memory_format=layout)
        options = {"padding": 1, "groups": groups}

        def function(t: Tensor) -> Tensor:
            if cudnn and not device.dry:
                return torch.cudnn_convolution(
                    t, w, [1, 1], [1, 1], [1, 1], groups, True, False, dtype == torch.float32
                )
            return F.conv2d(t, w, **options)

        return Contender(
            lambda: device.rotating(function, image),
            lambda: function(image)[:CHECKED_IMAGES],
            lambda: F.conv2d(few.double(), w.double(), **options),
            gflop=2 * pixels * 9 * c * c / groups / 1e9,
            mbyte=2 * pixels * c * size / 1e6,
            profile=True,
        )

    w_partial = weight(cp, cp)
    whole = {"gflop": 2 * pixels * 9 * cp * cp / 1e9, "mbyte": 2 * pixels * c * size / 1e6}
    part = whole | {"mbyte": 2 * pixels * cp * size / 1e6}

    def exact() -> Tensor:
        u = few.double()
        return torch.cat((F.conv2d(u[:, :cp], w_partial.double(), padding=1), u[:, cp:]), 1)

    def split_cat(t: Tensor) -> Tensor:
        return torch.cat((F.conv2d(t[:, :cp], w_partial, padding=1), t[:, cp:]), 1)

    def slicing(t: Tensor) -> Tensor:
        t = t.clone()
        t[:, :cp] = F.conv2d(t[:, :cp], w_partial, padding=1)
        return t

    def out_of_place(function: Callable[[Tensor], Tensor]) -> Contender:
        return Contender(
            lambda: device.rotating(function, x),
            lambda: function(x)[:CHECKED_IMAGES],
            exact,
            profile=True,
            **whole,
        )

    def in_place(function: Callable[[Tensor], object]) -> Contender:
        def answer() -> Tensor:
            t = x.clone()
            function(t)
            return t[:CHECKED_IMAGES]

        return Contender(
            lambda: device.rotating(function, x, in_place=True), answer, exact, profile=True, **part
        )

    def cuda(t: Tensor) -> None:
        from fasternet_kernels import cuda

        if device.dry:
            op(device, "pconv3x3_")(t, w_partial)
        elif not cuda.pconv3x3_(t, w_partial):
            raise RuntimeError(cuda.unavailable() or "not for these arguments")

    def copying(source: Tensor) -> Contender:
        to = torch.empty_like(source)
        mbyte = 2 * source.numel() * size / 1e6
        return Contender(lambda: device.rotating(to.copy_, source), mbyte=mbyte)

    pconv, pconv_ = op(device, "pconv3x3"), op(device, "pconv3x3_")
    depthwise, groups = weight(c, 1), 4 if device.dry else 16
    return {
        "dense": conv(weight(c, c), 1),
        "grouped": conv(weight(c, c // groups), groups),
        "depthwise_nchw": conv(depthwise, c, torch.contiguous_format),
        "depthwise": conv(depthwise, c),
        "depthwise_cudnn": conv(depthwise, c, cudnn=True),
        "pconv_split_cat": out_of_place(split_cat),
        "pconv_slicing": out_of_place(slicing),
        "ours": out_of_place(lambda t: pconv(t, w_partial, False)),
        "ours_in_place": in_place(lambda t: pconv_(t, w_partial)),
        "ours_in_place_cuda": in_place(cuda),
        "copy_all": copying(x),
        "copy_partial": copying(x.flatten()[: pixels * cp]),
    }


# ---- Blocks and networks -------------------------------------------------------------------------


def _inputs(device: Device, work: Workload, batch: int, dtype: torch.dtype) -> Tensor:
    channels, side, _ = work.shape
    if device.dry:
        side = 32 if work.kind == "network" else 4
    torch.manual_seed(work.seed)
    x = torch.randn(batch, channels, side, side, device=device.kind).to(dtype)
    return x.to(memory_format=torch.channels_last)


def _module_contenders(
    device: Device, work: Workload, x: Tensor, names: tuple[str, ...]
) -> dict[str, Contender]:
    """Ways to run an eval module on ``x``."""
    base = work.build()

    @functools.cache
    def exact() -> Tensor:
        with torch.inference_mode():
            module = copy.deepcopy(base).to(x.dtype).double().to(device.kind)
            return module(x[:CHECKED_IMAGES].double())

    def module() -> nn.Module:
        made = copy.deepcopy(base).to(x.dtype).to(device.kind)
        return made.to(memory_format=torch.channels_last)

    @functools.cache
    def function(name: str) -> Callable[[Tensor], Tensor]:
        if name.startswith("ours"):
            if work.kind == "network":
                return fk.accelerate(module())
            return providers._packed_ops(module())
        folded = models.fold_batch_norm(module().float()).to(x.dtype)
        folded = folded.to(memory_format=torch.channels_last)
        if name == "eager":
            return folded
        mode = "max-autotune" if name == "max_autotune" else "reduce-overhead"
        return folded if device.dry else torch.compile(folded, mode=mode)

    def call(name: str) -> Tensor:
        with torch.inference_mode():
            return function(name)(x)

    def prepare(name: str) -> Prepared:
        run = functools.partial(call, name)
        return Prepared(device.graph(run) if name == "ours_graph" else run)

    return {
        name: Contender(
            functools.partial(prepare, name), lambda n=name: call(n)[:CHECKED_IMAGES].clone(), exact
        )
        for name in names
    }


def _module_work(work: Workload, x: Tensor, dtype: str) -> Work:
    batch = x.shape[0]
    elements = work.traffic(batch) or 0
    gflop = work.flops(batch) / 1e9
    return Work(work.kind, work.name, tuple(x.shape), dtype, gflop, elements * x.itemsize / 1e6)


def _blocks(session: Session, out: Path) -> None:
    device = session.device
    plan = [
        (batch, dtype, name, stage)
        for batch, dtype in ((256, "bf16"), (32, "bf16"), (1, "bf16"), (32, "fp32"))
        for name in ORDER
        for stage in range(1, STAGES + 1)
    ]
    for batch, dtype, name, stage in [(1, "fp32", "t0", 1)] if device.dry else plan:
        work = workloads.find(f"{name}_stage{stage}_{OWN_ACT[name]}")
        x = _inputs(device, work, batch, DTYPES[dtype])
        contenders = _module_contenders(device, work, x, ("eager", "ours", "ours_graph"))
        session.measure(_module_work(work, x, dtype), contenders, seconds=2.0)


def _network_plan(device: Device) -> list[tuple[int, str, str, tuple[str, ...]]]:
    """(batch, dtype, network, providers), the ones that matter most first."""
    names = ("eager", "compile", "ours", "ours_graph")
    if device.dry:
        return [(1, "fp32", "t0", names)]
    plan = [(batch, "bf16", name) for batch in (256, 1, 32) for name in ORDER]
    plan += [(256, "fp32", "t0"), (256, "fp16", "t0")]
    # Last, and alone: it may take longer than all the rest.
    autotuned = [(256, "bf16", name, ("max_autotune",)) for name in ("t0", "l")]
    return [(*row, names) for row in plan] + autotuned


def _networks(session: Session, out: Path) -> None:
    device = session.device
    for batch, dtype, name, names in _network_plan(device):
        work = workloads.find(f"fasternet_{name}")
        x = _inputs(device, work, batch, DTYPES[dtype])
        contenders = _module_contenders(device, work, x, names)
        session.measure(_module_work(work, x, dtype), contenders, seconds=8.0)
        torch._dynamo.reset()


def _compile(session: Session, network: str) -> None:
    """Fills torch.compile's cache on disk for `networks`: mostly work for the processors."""
    device = session.device
    for batch, dtype, name, names in _network_plan(device):
        if name != network:
            continue
        work = workloads.find(f"fasternet_{name}")
        x = _inputs(device, work, batch, DTYPES[dtype])
        for provider in ("compile", "max_autotune"):
            if provider in names:
                try:
                    contender = _module_contenders(device, work, x, (provider,))[provider]
                    contender.answer()
                except Exception as error:  # the section itself will say so in its row
                    print(f"compile {name}: {error}", file=sys.stderr)
        torch._dynamo.reset()


# ---- Training ------------------------------------------------------------------------------------


def _training(session: Session, out: Path) -> None:
    """One step of SGD, bfloat16 by autocast: forward, loss, backward, update."""
    device = session.device
    for name in ("t0",) if device.dry else ORDER:
        batch, side = (2, 32) if device.dry else (TRAINING_BATCH, IMAGE_SIZE)
        work = workloads.find(f"fasternet_{name}")
        x = torch.randn(batch, 3, side, side, device=device.kind)
        x = x.to(memory_format=torch.channels_last)
        target = torch.randint(1000, (batch,), device=device.kind)
        gflop = 0.0 if device.dry else 3 * work.flops(batch) / 1e9
        contenders = {
            way: Contender(functools.partial(_training_step, device, work, x, target, way))
            for way in ("eager", "ours", "ours_lean")
        }
        session.measure(
            Work("training", work.name, tuple(x.shape), "bf16", gflop), contenders, seconds=6.0
        )


def _training_step(device: Device, work: Workload, x: Tensor, target: Tensor, way: str) -> Prepared:
    model = work.build().to(device.kind).to(memory_format=torch.channels_last).train()
    if way != "eager":
        model = fk.accelerate(model, lean=way == "ours_lean")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.kind, torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()

    return Prepared(step)


# ---- The rest ------------------------------------------------------------------------------------


def _tune(session: Session, out: Path) -> None:
    begin = time.monotonic()
    gpu_tune.tune(session.device, out / "tuning", session.seconds_left)
    print(f"tuned in {time.monotonic() - begin:.0f} s")


def _summary(session: Session, out: Path) -> None:
    text = gpu_report.text(list(session.rows.values()), out)
    (out / "summary.txt").write_text(text)
    print(text)


SECTIONS = {
    "peaks": _peaks,
    "tune": _tune,
    "operators": _operators,
    "blocks": _blocks,
    "networks": _networks,
    "compile": _compile,
    "training": _training,
    "summary": _summary,
}
