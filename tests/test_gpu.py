"""The kernels on a GPU: what interpreter and compiler alone cannot show. `make gpu` runs it.

With FASTERNET_GPU_DRY_RUN=1 the same tests run on the CPU, the ops by Triton's interpreter, at tiny
shapes: then it is the tests that are tried, not the kernels.
"""

import copy
import functools
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import assert_right, double

import fasternet_kernels as fk
from bench.calls import BACKWARD, DTYPES, INFERENCE, TRAINING, Call
from bench.gpu_sections import op
from bench.gpu_timing import Device
from fasternet_kernels import cuda, models, reference, triton

DRY = bool(os.environ.get("FASTERNET_GPU_DRY_RUN"))
DEVICE = Device(DRY)
OPS = [name for name in (*INFERENCE, *TRAINING) if any(name in f for f in triton.FAMILIES.values())]

pytestmark = pytest.mark.skipif(
    not DRY and not torch.cuda.is_available(), reason="torch finds no CUDA device"
)


def tensors(result) -> list:
    """The tensors that an op returned, but for the empty ones that nobody asked for."""
    found = [result] if isinstance(result, torch.Tensor) else list(result)
    return [t for t in found if t.numel()]


def shapes():
    """(network, stage, side): the channels of every stage on images of a few tiles."""
    if DRY:
        return [("t0", 1, 4)]
    sides = {1: 56, 2: 28, 3: 14, 4: 7}
    return [(name, stage, sides[stage]) for name in ("t0", "t2", "m", "l") for stage in sides]


@pytest.mark.parametrize("dtype", ["fp16"] if DRY else list(DTYPES))
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_parity(name, dtype, shape):
    network, stage, side = shape
    if name == "head" and stage != 4 and not DRY:
        pytest.skip("a head stands after the last stage")
    if DRY and name == "head":
        pytest.skip("a dry run, and 1000 classes")
    args = Call(name, network, stage, 1 if DRY else 3, dtype, side=side).arguments(DEVICE.kind)
    compare(name, op(DEVICE, name), args)


def compare(name, function, args):
    """One op against float64; eager PyTorch on this device is the rival."""
    plain = getattr(reference, name)
    exact_args, rival_args = double(copy.deepcopy(args)), copy.deepcopy(args)
    before = copy.deepcopy(args)
    got, exact = function(*args), plain(*exact_args)
    in_place = name.endswith("_")
    if in_place:
        got, exact = args[0], exact_args[0]

    @functools.cache
    def rival():
        result = plain(*rival_args)
        return tensors(rival_args[0] if in_place else result)

    for i, (a, b) in enumerate(zip(tensors(got), tensors(exact), strict=True)):
        assert_right(a.cpu(), b.cpu(), lambda i=i: rival()[i].cpu(), what=f"{name}, output {i}")
    for i, (a, b) in enumerate(zip(args, before)):
        if isinstance(a, torch.Tensor) and not (in_place and i == 0):
            assert torch.equal(a, b), f"{name} changed its argument {i}"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("batch", [1, 37])
@pytest.mark.parametrize("shape", [("t0", 1, 56), ("t1", 1, 55), ("m", 1, 28), ("l", 1, 7)])
def test_cuda_pconv_in_place(dtype, batch, shape):
    """csrc/cuda's kernel, whether or not the tuning table asks for it."""
    reason = "a dry run" if DRY else cuda.unavailable()
    if reason:
        pytest.skip(reason)
    network, stage, side = shape
    args = Call("pconv3x3_", network, stage, batch, dtype, side=side).arguments(DEVICE.kind)

    def function(x, weight):
        assert cuda.pconv3x3_(x, weight)

    compare("pconv3x3_", function, args)


@pytest.mark.skipif(DRY, reason="on the CPU test_ops.py does it")
@pytest.mark.parametrize("name", [name for name in OPS if name not in BACKWARD])
def test_opcheck(name):
    args = Call(name, "t0", 2, 2, "fp32", side=7).arguments(DEVICE.kind)
    torch.library.opcheck(getattr(torch.ops.fasternet_kernels, name).default, args)


def network():
    torch.manual_seed(0)
    model = models.fasternet_t0(num_classes=10, drop_path_rate=0.0)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
            torch.nn.init.normal_(part.bias, std=0.2)
    return model.to(memory_format=torch.channels_last)


def images(batch=4):
    side = 32 if DRY else 96
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
    return x.to(DEVICE.kind).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_network(dtype):
    if DRY and dtype == "fp16":
        pytest.skip("a dry run")
    model, x = network().eval().to(DTYPES[dtype]), images().to(DTYPES[dtype])
    exact = copy.deepcopy(model).double().to(DEVICE.kind)(x.double())
    model = model.to(DEVICE.kind)
    with torch.no_grad():
        rival = model(x)
        got = fk.accelerate(copy.deepcopy(model))(x)
    assert_right(got.cpu(), exact.detach().cpu(), rival.cpu(), what="logits")


def gradients(model, x, target, autocast=None):
    """The loss and all gradients in one vector."""
    with torch.autocast(DEVICE.kind, autocast, enabled=autocast is not None):
        loss = F.cross_entropy(model(x), target)
    loss.backward()
    return torch.cat([loss.detach().reshape(1), *(p.grad.flatten() for p in model.parameters())])


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_training_step(dtype, lean):
    if DRY and (dtype == "fp16" or lean):
        pytest.skip("a dry run")
    base, x = network().train(), images(8)
    target = torch.arange(8, device=DEVICE.kind)
    autocast = None if dtype == "fp32" else DTYPES[dtype]
    exact = gradients(copy.deepcopy(base).double().to(DEVICE.kind), x.double(), target)
    base = base.to(DEVICE.kind)
    rival = gradients(copy.deepcopy(base), x, target, autocast)
    got = gradients(fk.accelerate(copy.deepcopy(base), lean=lean), x, target, autocast)
    assert_right(got.cpu(), exact.cpu(), rival.cpu(), what="loss and gradients")


def test_graph_capture():
    """Captured once, replayed on other images: the same bits as a plain call."""
    model = fk.accelerate(network().eval().to(DEVICE.kind))
    x, other = images(), images().flip(0)
    with torch.inference_mode():
        y = {}

        def call():
            y["captured"] = model(x)

        replay = DEVICE.graph(call)
        x.copy_(other)
        replay()
        DEVICE.synchronize()
        assert torch.equal(y["captured"], model(other))


def test_graph_capture_of_a_training_step():
    model = fk.accelerate(network().train().to(DEVICE.kind))
    x, target = images(), torch.arange(4, device=DEVICE.kind)
    loss = {}

    def call():
        model.zero_grad(set_to_none=False)
        loss["captured"] = F.cross_entropy(model(x), target)
        loss["captured"].backward()

    replay = DEVICE.graph(call)
    replay()
    DEVICE.synchronize()
    assert torch.isfinite(loss["captured"]).item()


def test_compile_fullgraph():
    model, x = network().eval().to(DEVICE.kind), images()
    accelerated = fk.accelerate(copy.deepcopy(model))
    compiled = torch.compile(
        accelerated, fullgraph=True, backend="aot_eager" if DRY else "inductor"
    )
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert_right(compiled(x).cpu(), exact.cpu(), model(x).cpu(), what="logits")


def test_same_bits_every_time():
    args = Call("block", "t0", 1, 1 if DRY else 8, "fp16", side=4 if DRY else 56).arguments(
        DEVICE.kind
    )
    block = op(DEVICE, "block")
    assert torch.equal(block(*args), block(*args))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    if DRY:
        import gpu_small_case

        gpu_small_case.main(dry=True)
        return
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("no compute-sanitizer here")
    script = pathlib.Path(__file__).with_name("gpu_small_case.py")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
    # Without torch's cache an access beyond a tensor is one beyond its allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    output = done.stdout[-2000:] + done.stderr[-500:]
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device or its driver")
    assert done.returncode == 0, output
