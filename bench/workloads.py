"""What is computed: whole networks, chains of blocks, single operators, ten layers of one operator.

Every workload is a plain eager module with random weights, the same ones in every process, under
which each layer matters to the answer. FLOPs are those of the direct method, two for a
multiply-add, whatever method a provider uses.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import published, zoo
from fasternet_kernels import models

__all__ = [
    "DTYPES",
    "LAYERS",
    "MAPS",
    "NETWORKS",
    "Layers",
    "Slicing",
    "Workload",
    "all_workloads",
    "find",
    "images",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NETWORKS = {"t0": 40, "t1": 64, "t2": 96, "s": 128, "m": 144, "l": 192}  # channels of stage 1
OWN_ACT = dict.fromkeys(NETWORKS, "relu") | {"t0": "gelu", "t1": "gelu"}
IMAGE_SIZE = 224
# Who can run what: the library knows its own networks only, and BatchNorm is folded by those that
# read an exported network themselves.
EAGER = ("eager_nchw", "eager_channels_last")
ONNX_READERS = ("onnxruntime", "openvino", "mnn")
NOT_OURS = (*EAGER, "torch_compile", *ONNX_READERS)
CHAIN_BLOCKS = 4  # weights of their own each: a single block's would stay in a cache
STAGES = 4
LAYERS = 10  # of one operator, as in Table 1 of arXiv 2303.03667
MAPS = ((96, 56), (192, 28), (384, 14), (768, 7))  # channels, pixels on a side


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row's work.

    Attributes:
        name: unique, and the seed of weights and images.
        kind: "network", "chain", "operator" or "layers".
        shape: of one image: (C, H, W).
        act: of the blocks, or "".
        make: builds the module, untrained.
        providers: who can run it; None means everybody.
        foldable: whether `models.fold_batch_norm` knows its structure.
        gmacs: published multiply-adds of one image in 1e9, an estimate without building it.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    act: str
    make: Callable[[], nn.Module]
    providers: tuple[str, ...] | None = None
    foldable: bool = True
    gmacs: float | None = None

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
        # What others wrote may compute with numbers while it is built, which meta tensors refuse.
        with torch.device("meta" if self.foldable else "cpu"):
            module = self.make().eval().to("meta")
        x = torch.empty(1, *self.shape, device="meta")
        maps = 0
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for part in module if self.kind in ("chain", "layers") else [module]:
                maps += x.numel()
                x = part(x)
                maps += x.numel()
        return counter.get_total_flops(), sum(p.numel() for p in module.parameters()), maps

    def flops(self, batch: int) -> int:
        """FLOPs of one call: direct method, two for a multiply-add, convolutions and GEMMs only."""
        return self._cost[0] * batch

    def about_flops(self, batch: int) -> float:
        """The same, where published as published: an estimate that builds no large network."""
        return self.flops(batch) if self.gmacs is None else 2e9 * self.gmacs * batch

    def traffic(self, batch: int) -> int | None:
        """Elements that one call has to move: weights once, and of an operator, of each block of a
        chain or of each layer what comes in and what goes out. None for a network, whose maps may
        stay in caches.
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
    found = [*_networks(), *_chains(), *_operators(), *_layers()]
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
    figures = published.read()
    others = [
        Workload(
            system.name,
            "network",
            (3, system.size, system.size),
            "",
            system.make,
            ONNX_READERS,
            foldable=False,
            gmacs=figures.number(system.name, "gmacs"),
        )
        for system in zoo.SYSTEMS
        if system.name != "mobilenetv2_100"
    ]
    mobilenet = Workload("mobilenetv2_100", "network", image, "relu6", _mobilenet, NOT_OURS)
    return [*ours, mobilenet, *others]


def _mobilenet() -> nn.Module:
    """timm's MobileNetV2, each BatchNorm behind its convolution and apart from the activation that
    timm computes in the same module, so that it can be folded."""
    timm = zoo.import_timm()
    model = timm.create_model("mobilenetv2_100", pretrained=False)
    for parent in list(model.modules()):
        pairs = itertools.pairwise(list(parent.named_children()))
        for (conv_name, conv), (norm_name, norm) in pairs:
            if isinstance(conv, nn.Conv2d) and isinstance(norm, timm.layers.BatchNormAct2d):
                plain = nn.BatchNorm2d(norm.num_features, norm.eps)
                setattr(parent, conv_name, nn.Sequential(conv, plain))
                setattr(parent, norm_name, norm.act)
    return model


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


# ---- Ten layers of one operator ------------------------------------------------------------------


class Layers(nn.Sequential):
    """Layers of the same shape, one after the other, each with weights of its own."""


class Slicing(models.PartialConv):
    """A partial convolution that writes into a slice, of a clone or of what it was given.

    The clone is what a residual needs. Without it an input is overwritten, so the first of several
    layers clones.
    """

    def __init__(self, dim: int, n_div: int, clone: bool):
        super().__init__(dim, n_div)
        self.clone = clone

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, dim, H, W); returns the same shape."""
        y = x.clone() if self.clone else x
        y[:, : self.dim_conv] = self.partial_conv3(y[:, : self.dim_conv])
        return y


def _layers() -> list[Workload]:
    def conv(channels: int, groups: int) -> nn.Module:
        return nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)

    def pointwise(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, channels, 1, bias=False), nn.Identity(), nn.Identity()]

    makers: dict[str, tuple[Callable[[int, int], nn.Module], tuple[str, ...]]] = {
        "conv3x3": (lambda c, _: conv(c, 1), EAGER),
        "gconv3x3": (lambda c, _: conv(c, 16), EAGER),
        "dwconv3x3": (lambda c, _: conv(c, c), (*EAGER, "onnxruntime", "openvino")),
        "pconv3x3": (
            lambda c, _: models.PartialConv(c, 4),
            (*EAGER, "onnxruntime", "openvino", "ours"),
        ),
        "pconv3x3_slicing": (lambda c, _: Slicing(c, 4, clone=True), EAGER),
        "pconv3x3_inplace": (lambda c, i: Slicing(c, 4, clone=i == 0), (*EAGER, "ours")),
        "pconv_pw": (
            lambda c, _: nn.Sequential(models.PartialConv(c, 4), *pointwise(c)),
            (*EAGER, "torch_compile", "onnxruntime", "openvino", "ours"),
        ),
        "dwconv_pw": (
            lambda c, _: nn.Sequential(conv(c, c), *pointwise(c)),
            (*EAGER, "torch_compile", "onnxruntime", "openvino"),
        ),
    }

    def layers(maker: Callable[[int, int], nn.Module], channels: int) -> nn.Module:
        return Layers(*(maker(channels, index) for index in range(LAYERS)))

    return [
        Workload(
            f"{name}_{channels}x{side}",
            "layers",
            (channels, side, side),
            "",
            functools.partial(layers, maker, channels),
            providers,
        )
        for channels, side in MAPS
        for name, (maker, providers) in makers.items()
    ]


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
