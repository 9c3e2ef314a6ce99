"""What is computed: whole networks, chains of blocks, single operators.

Every workload is a plain eager module with random weights, the same ones in every process, under
which each layer matters to the answer. FLOPs are those of the direct method, two for a
multiply-add, whatever method a provider uses.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fasternet_kernels import models

__all__ = ["DTYPES", "NETWORKS", "Workload", "all_workloads", "find", "images"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NETWORKS = {"t0": 40, "t1": 64, "t2": 96, "s": 128, "m": 144, "l": 192}  # channels of stage 1
OWN_ACT = dict.fromkeys(NETWORKS, "relu") | {"t0": "gelu", "t1": "gelu"}
IMAGE_SIZE = 224
CHAIN_BLOCKS = 4  # weights of their own each: a single block's would stay in a cache
STAGES = 4


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row's work.

    Attributes:
        name: unique, and the seed of weights and images.
        kind: "network", "chain" or "operator".
        shape: of one image: (C, H, W).
        act: of the blocks, or "".
        make: builds the module, untrained.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    act: str
    make: Callable[[], nn.Module]

    def build(self) -> nn.Module:
        """The module in eval mode, with the same random weights in every process."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            module = self.make()
            _randomise(module)
        return module.eval()

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    @functools.cached_property
    def _cost(self) -> tuple[int, int, int]:
        """(FLOPs of one image, elements of weights, elements that one image's maps have)."""
        with torch.device("meta"):
            module = self.make().eval()
            x = torch.empty(1, *self.shape)
        maps = 0
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for part in module if self.kind == "chain" else [module]:
                maps += x.numel()
                x = part(x)
                maps += x.numel()
        return counter.get_total_flops(), sum(p.numel() for p in module.parameters()), maps

    def flops(self, batch: int) -> int:
        """FLOPs of one call: direct method, two for a multiply-add, convolutions and GEMMs only."""
        return self._cost[0] * batch

    def traffic(self, batch: int) -> int | None:
        """Elements that one call has to move: weights once, and of an operator or of each block of
        a chain what comes in and what goes out. None for a network, whose maps may stay in caches.
        """
        _, weights, maps = self._cost
        return None if self.kind == "network" else weights + maps * batch


def images(workload: Workload, batch: int) -> Tensor:
    """Random float32 images (batch, C, H, W); the first ones are the same for every batch."""

    def image(index: int) -> Tensor:
        generator = torch.Generator().manual_seed(workload.seed + index)
        return torch.randn(workload.shape, generator=generator)

    return torch.stack([image(index) for index in range(batch)])


def find(name: str) -> Workload:
    """The workload of that name.

    Raises:
        ValueError: there is none; the message lists a few.
    """
    try:
        return all_workloads()[name]
    except KeyError:
        known = ", ".join(list(all_workloads())[:4])
        raise ValueError(f"no workload {name!r}; there are {known} and more") from None


@functools.cache
def all_workloads() -> dict[str, Workload]:
    """name -> workload, of every kind."""
    found = [*_networks(), *_chains(), *_operators()]
    return {workload.name: workload for workload in found}


def _networks() -> list[Workload]:
    image = (3, IMAGE_SIZE, IMAGE_SIZE)
    ours = [
        Workload(
            f"fasternet_{name}",
            "network",
            image,
            OWN_ACT[name],
            getattr(models, f"fasternet_{name}"),
        )
        for name in NETWORKS
    ]
    return [*ours, Workload("mobilenetv2_100", "network", image, "relu6", _mobilenet)]


def _mobilenet() -> nn.Module:
    """timm's MobileNetV2, each BatchNorm behind its convolution and apart from the activation that
    timm computes in the same module, so that it can be folded."""
    timm = _import_timm()
    model = timm.create_model("mobilenetv2_100", pretrained=False)
    for parent in list(model.modules()):
        pairs = itertools.pairwise(list(parent.named_children()))
        for (conv_name, conv), (norm_name, norm) in pairs:
            if isinstance(conv, nn.Conv2d) and isinstance(norm, timm.layers.BatchNormAct2d):
                plain = nn.BatchNorm2d(norm.num_features, norm.eps)
                setattr(parent, conv_name, nn.Sequential(conv, plain))
                setattr(parent, norm_name, norm.act)
    return model


def _import_timm():
    """The module timm, imported without torchvision's compiled operators.

    timm imports torchvision, which registers fakes for operators that its own library defines.
    Where that library does not fit the installed build of torch, as with many CPU builds, those
    registrations raise. Nothing here needs torchvision's operators, so they are skipped.
    """
    register_fake = torch.library.register_fake

    def register_known_fake(op, *args, **kwargs):
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    torch.library.register_fake = register_known_fake
    try:
        return importlib.import_module("timm")
    finally:
        torch.library.register_fake = register_fake


def _stages() -> list[tuple[str, int, int, int]]:
    """(network, stage from 1, channels, pixels on a side)."""
    return [
        (name, stage + 1, width << stage, IMAGE_SIZE // 4 >> stage)
        for name, width in NETWORKS.items()
        for stage in range(STAGES)
    ]


def _block(channels: int, act: str) -> nn.Module:
    return models.Block(channels, 4, 2.0, drop_path=0.0, layer_scale_init_value=0.0, act=act)


def _chains() -> list[Workload]:
    def make(channels: int, act: str) -> nn.Module:
        return nn.Sequential(*(_block(channels, act) for _ in range(CHAIN_BLOCKS)))

    return [
        Workload(
            f"{name}_stage{stage}_{act}",
            "chain",
            (channels, side, side),
            act,
            functools.partial(make, channels, act),
        )
        for name, stage, channels, side in _stages()
        for act in dict.fromkeys(["relu", OWN_ACT[name]])
    ]


def _operators() -> list[Workload]:
    def pconv_pw(channels: int, act: str) -> nn.Module:
        return nn.Sequential(
            models.PartialConv(channels, 4),
            nn.Conv2d(channels, 2 * channels, 1, bias=False),
            nn.BatchNorm2d(2 * channels),
            models.ACTIVATIONS[act](),
        )

    def head(channels: int, act: str) -> nn.Module:
        return nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, 1280, 1, bias=False),
            models.ACTIVATIONS[act](),
            nn.Flatten(1),
            nn.Linear(1280, 1000),
        )

    def operator(name, shape, act, make, *args) -> Workload:
        return Workload(name, "operator", shape, act, functools.partial(make, *args))

    found = []
    for name, stage, channels, side in _stages():
        act, shape = OWN_ACT[name], (channels, side, side)
        where = f"{name}_stage{stage}"
        found.append(operator(f"pconv3x3_{where}", shape, "", models.PartialConv, channels, 4))
        found.append(operator(f"pconv_pw_{where}", shape, act, pconv_pw, channels, act))
        if stage == 1:
            image = (3, IMAGE_SIZE, IMAGE_SIZE)
            found.append(
                operator(f"patch_conv_{where}", image, "", models.PatchEmbed, 3, channels, 4)
            )
        else:
            before = (channels // 2, 2 * side, 2 * side)
            found.append(
                operator(f"patch_conv_{where}", before, "", models.PatchMerging, channels // 2)
            )
        if stage == STAGES:
            found.append(operator(f"head_{name}", shape, act, head, channels, act))
    return found


def _randomise(module: nn.Module) -> None:
    """Weights and statistics under which every layer matters to the answer: as they are
    initialised for training, the blocks of a network contribute almost nothing.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="linear")
            if part.bias is not None:
                nn.init.normal_(part.bias, std=0.2)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    for part in module.modules():
        if isinstance(part, models.Block):  # a residual sum must not grow without bound
            with torch.no_grad():
                part.mlp[-1].weight.mul_(0.5)
