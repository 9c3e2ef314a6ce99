"""Who computes a workload: one function for each way to run it.

Each takes a `Task` and returns something to call that reads the images anew and returns the answer
as an array. All do the same work: BatchNorm is folded (eager, and what is exported) or frozen
(torch.compile), weights are prepared beforehand, images lie in memory in the layout that the
provider likes best, everything is float32 unless the task says otherwise, and as many threads are
used as the task says. Runs inside a process of its own: see worker.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

__all__ = ["PEERS", "PROVIDERS", "Provider", "Task", "available"]

Call = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a worker is to prepare.

    Attributes:
        workload: a name of bench.workloads.
        batch: images per call.
        threads: that the call may use.
        dtype: "fp32" or "bf16".
        images: .npy file of float32 images (batch, C, H, W).
        onnx: the exported network with BatchNorm folded, for the providers that read one.
        alone: False where other processes run beside this one, one on each processor.
    """

    workload: str
    batch: int
    threads: int
    dtype: str
    images: Path
    onnx: Path | None = None
    alone: bool = True


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to run a workload.

    Attributes:
        label: for tables and charts.
        colour: for charts; all of them from a palette that colour-blind readers can tell apart.
        prepare: from a task to the call that is timed.
        packages: that must be importable.
        reads_onnx: whether it takes `Task.onnx` and not the eager module.
        dtypes: it can run.
    """

    label: str
    colour: str
    prepare: Callable[[Task], Call]
    packages: tuple[str, ...] = ("torch",)
    reads_onnx: bool = False
    dtypes: tuple[str, ...] = ("fp32",)


# ---- torch ---------------------------------------------------------------------------------------


def _eager(task: Task, channels_last: bool) -> Call:
    import torch

    from fasternet_kernels import models

    module, x = _torch_task(task)
    module = models.fold_batch_norm(module.float()).to(x.dtype)
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)

    def call() -> np.ndarray:
        with torch.inference_mode():
            return _array(module(x))

    return call


def _eager_nchw(task: Task) -> Call:
    return _eager(task, channels_last=False)


def _eager_channels_last(task: Task) -> Call:
    return _eager(task, channels_last=True)


def _torch_compile(task: Task) -> Call:
    """Inductor with freezing. Given the folded network on channels_last images: of folded and not,
    NCHW and channels_last, that was the fastest on T0.
    """
    import torch
    import torch._inductor.config as inductor

    from fasternet_kernels import models

    module, x = _torch_task(task)
    module = models.fold_batch_norm(module).to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    compiled = torch.compile(module)
    # The number of threads is written into the generated code.
    with torch.inference_mode(), inductor.patch({"freezing": True, "cpp.threads": task.threads}):
        compiled(x)

    def call() -> np.ndarray:
        with torch.inference_mode():
            return _array(compiled(x))

    return call


def _ours(task: Task, **options: bool) -> Call:
    """A network as a user runs it, by `accelerate`; a chain or an operator by its ops on packed
    weights, as the network's plan runs them.
    """
    import torch

    import fasternet_kernels as fk
    from bench import workloads

    if not fk.library.status().loaded:
        raise RuntimeError(f"the compiled kernels are not loaded: {fk.library.status().reason}")
    module, x = _torch_task(task)
    x = x.to(memory_format=torch.channels_last)
    if workloads.find(task.workload).kind == "network":
        run = fk.accelerate(module, **options)
        if not any(row.kind == "network" and row.swapped for row in fk.report(run).rows):
            raise RuntimeError("accelerate left the network as it was")
    else:
        run = _packed_ops(module, **options)

    def call() -> np.ndarray:
        with torch.inference_mode():
            return _array(run(x))

    return call


def _ours_fast(task: Task) -> Call:
    return _ours(task, fast=True)


def _packed_ops(module, **options: bool) -> Callable:
    """The library's ops for a chain of blocks, a single operator or several layers of one, weights
    folded and packed.
    """
    import torch
    from torch import nn

    import fasternet_kernels as fk
    from bench import workloads
    from fasternet_kernels import models
    from fasternet_kernels.modules import act_name

    ops = torch.ops.fasternet_kernels
    dtype = next(module.parameters()).dtype
    vector = torch.float32

    def pack(*layers):
        shifts = [
            None if layer.bias is None else layer.bias.detach().to(vector) for layer in layers
        ]
        weights = [layer.weight.detach() for layer in layers]
        return ops.pack(weights, [None] * len(layers), shifts, **options)

    if isinstance(module, workloads.Layers):
        return _in_turn([_packed_ops(layer, **options) for layer in module])
    folded = models.fold_batch_norm(module.float())
    for layer in folded.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data = layer.weight.data.to(dtype)  # shifts stay in float32, as ours do

    if isinstance(folded, workloads.Slicing) and not folded.clone:
        weight = folded.partial_conv3.weight.detach()
        return lambda x: fk.pconv3x3_(x, weight)
    if isinstance(folded, models.PartialConv):
        weight = folded.partial_conv3.weight.detach()
        return lambda x: ops.pconv3x3.default(x, weight, **options)
    if isinstance(folded, models.PatchEmbed | models.PatchMerging):
        conv = folded.proj if isinstance(folded, models.PatchEmbed) else folded.reduction
        packed, c_out, (kh, kw) = pack(conv), conv.out_channels, conv.kernel_size
        return lambda x: ops.patch_conv_packed.default(x, packed, c_out, kh, kw, True)
    if isinstance(folded[0], nn.AdaptiveAvgPool2d):
        _, conv, act, _, fc = folded
        packed, act = pack(conv, fc), act_name(act)
        return lambda x: ops.head_packed.default(x, packed, conv.out_channels, fc.out_features, act)
    if isinstance(folded[0], models.PartialConv):
        partial, conv, _, act = folded
        packed, act = pack(partial.partial_conv3, conv), act_name(act)
        return lambda x: ops.pconv_pw_packed.default(
            x, packed, partial.dim_conv, conv.out_channels, act, **options
        )

    def packed_block(block):
        pw1, _, act, pw2 = block.mlp
        packed = pack(block.spatial_mixing.partial_conv3, pw1, pw2)
        arguments = packed, block.spatial_mixing.dim_conv, pw1.out_channels, None, act_name(act)
        return lambda x: ops.block_packed.default(x, *arguments, **options)

    return _in_turn([packed_block(block) for block in folded])


def _in_turn(calls: list[Callable]) -> Callable:
    def run(x):
        for call in calls:
            x = call(x)
        return x

    return run


def _torch_task(task: Task):
    """(module, images) of the task's dtype; torch uses the task's threads from here on."""
    import torch

    from bench import workloads

    torch.set_num_threads(task.threads)
    dtype = workloads.DTYPES[task.dtype]
    module = workloads.find(task.workload).build().to(dtype)
    return module, torch.from_numpy(np.load(task.images)).to(dtype)


def _array(y) -> np.ndarray:
    import torch

    return (y.float() if y.dtype == torch.bfloat16 else y).numpy()


# ---- The runtimes that read ONNX -----------------------------------------------------------------


def _onnxruntime(task: Task) -> Call:
    """All graph optimisations, and the default spinning of its threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(task.onnx), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: np.load(task.images)}
    return lambda: session.run(None, feed)[0]


def _openvino(task: Task) -> Call:
    """Pinned to float32 arithmetic, with the latency hint and one stream."""
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": task.threads,
        "NUM_STREAMS": 1,
    }
    if not task.alone:
        # Each process would pin its thread to the same processor.
        options["ENABLE_CPU_PINNING"] = False
    compiled = openvino.Core().compile_model(str(task.onnx), "CPU", options)
    request = compiled.create_infer_request()
    x = np.load(task.images)
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))

    def call() -> np.ndarray:
        request.infer()
        return request.get_output_tensor().data

    call.images = x  # the tensor only borrows its memory
    return call


def _mnn(task: Task) -> Call:
    """CPU backend, precision high: float32 throughout.

    Converted by the compiled module that the package ships. Its Python converter is never called:
    importing it installs packages and reports usage over the network.
    """
    import _tools
    import MNN

    path = task.onnx.with_suffix(".mnn")
    if not path.exists():
        partial = path.with_suffix(f".mnn{os.getpid()}")
        arguments = ["mnnconvert", "-f", "ONNX", "--modelFile", str(task.onnx)]
        _tools.mnnconvert([*arguments, "--MNNModel", str(partial), "--bizCode", "bench"])
        partial.rename(path)
    interpreter = MNN.Interpreter(str(path))
    session = interpreter.createSession(
        {"backend": "CPU", "precision": "high", "numThread": task.threads}
    )
    x = np.load(task.images)
    source, result = interpreter.getSessionInput(session), interpreter.getSessionOutput(session)
    y = np.empty(result.getShape(), np.float32)
    images, answer = _mnn_tensor(x), _mnn_tensor(y)

    def call() -> np.ndarray:
        source.copyFrom(images)
        interpreter.runSession(session)
        result.copyToHostTensor(answer)
        return answer.getNumpyData()

    call.arrays = x, y  # the tensors only borrow their memory
    return call


def _mnn_tensor(array: np.ndarray):
    import MNN

    layout = MNN.Tensor_DimensionType_Caffe  # NCHW
    return MNN.Tensor(array.shape, MNN.Halide_Type_Float, array, layout)


# ---- The list ------------------------------------------------------------------------------------

# Colours: Okabe and Ito's palette.
PROVIDERS = {
    "eager_nchw": Provider("eager, NCHW", "#999999", _eager_nchw, dtypes=("fp32", "bf16")),
    "eager_channels_last": Provider(
        "eager, channels_last", "#56B4E9", _eager_channels_last, dtypes=("fp32", "bf16")
    ),
    "torch_compile": Provider("torch.compile", "#E69F00", _torch_compile),
    "onnxruntime": Provider(
        "ONNX Runtime", "#009E73", _onnxruntime, ("onnxruntime", "onnx"), reads_onnx=True
    ),
    "openvino": Provider("OpenVINO", "#CC79A7", _openvino, ("openvino", "onnx"), reads_onnx=True),
    "mnn": Provider("MNN", "#F0E442", _mnn, ("MNN", "_tools", "onnx"), reads_onnx=True),
    "ours": Provider("fasternet_kernels", "#0072B2", _ours, dtypes=("fp32", "bf16")),
    "ours_fast": Provider("fasternet_kernels, fast", "#D55E00", _ours_fast),
}
PEERS = ("torch_compile", "onnxruntime", "openvino", "mnn")


@functools.cache
def available(name: str) -> str:
    """Why a provider cannot run on this machine; "" if it can."""
    for package in PROVIDERS[name].packages:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(package) is not None:
                continue
        return f"{package} is not installed"
    return ""
