"""Networks of other papers, from timm and torchvision, with random weights.

Each stands beside the FasterNet of about its published accuracy: the two are measured in turns, so
how they compare is a ratio of rounds. Sizes and forms are those for which the accuracy was
published: MobileViT and EdgeNeXt read 256 x 256 pixels, and what is trained with branches that
merge afterwards is merged.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import types

import torch
from torch import nn

__all__ = ["SYSTEMS", "System", "import_timm"]


@dataclasses.dataclass(frozen=True)
class System:
    """A network of another paper.

    Attributes:
        name: in its library, in the CSV and in published.csv.
        label: for tables and charts.
        beside: the FasterNet that it is compared with, "t0" to "l".
        size: pixels on a side.
        library: "timm" or "torchvision".
        merge: whether it has branches to merge before inference.
    """

    name: str
    label: str
    beside: str
    size: int = 224
    library: str = "timm"
    merge: bool = False

    def make(self) -> nn.Module:
        """The network in eval mode, untrained.

        Raises:
            ImportError: its library is not installed.
        """
        timm = import_timm()
        if self.library == "torchvision":
            models = importlib.import_module("torchvision.models")
            return getattr(models, self.name)(weights=None).eval()
        # Attention as plain matrix products, and no scripted activations: what exporters read.
        with timm.layers.set_layer_config(exportable=True, scriptable=False):
            timm.layers.set_fused_attn(False)
            model = timm.create_model(self.name, pretrained=False, exportable=True).eval()
        if self.merge:
            model = timm.utils.reparameterize_model(model)
        _open_scales(model)
        return model


def _open_scales(model: nn.Module) -> None:
    """Raises layer scales, which start so small that the branches behind them would not matter."""
    for parameter in model.parameters():
        value = float(parameter.detach().flatten()[0])
        if 0 < value <= 1e-4 and bool((parameter == value).all()):
            nn.init.constant_(parameter, 0.5)


SYSTEMS = (
    System("mobilenetv2_100", "MobileNetV2", "t0"),
    System("shufflenet_v2_x1_5", "ShuffleNetV2 x1.5", "t0", library="torchvision"),
    System("mobilevit_xxs", "MobileViT-XXS", "t0", size=256),
    System("edgenext_xx_small", "EdgeNeXt-XXS", "t0", size=256),
    System("mobileone_s0", "MobileOne-S0", "t0", merge=True),
    System("ghostnet_100", "GhostNet x1.0", "t0"),
    System("repghostnet_100", "RepGhostNet x1.0", "t0", merge=True),
    System("fbnetc_100", "FBNet-C", "t0"),
    System("mobilenetv3_large_100", "MobileNetV3-L", "t0"),
    System("ghostnetv2_100", "GhostNetV2 x1.0", "t0"),
    System("mobilevit_xs", "MobileViT-XS", "t1", size=256),
    System("edgenext_x_small", "EdgeNeXt-XS", "t1", size=256),
    System("ghostnet_130", "GhostNet x1.3", "t1"),
    System("mobileone_s1", "MobileOne-S1", "t1", merge=True),
    System("ghostnetv3_100", "GhostNetV3 x1.0", "t1", merge=True),
    System("poolformer_s12", "PoolFormer-S12", "t2"),
    System("mobileone_s3", "MobileOne-S3", "t2", merge=True),
    System("edgenext_small", "EdgeNeXt-S", "t2", size=256),
    System("efficientformer_l1", "EfficientFormer-L1", "t2"),
    System("resnet50", "ResNet50", "s"),
    System("swin_tiny_patch4_window7_224", "Swin-T", "s"),
    System("convnext_tiny", "ConvNeXt-T", "s"),
    System("nextvit_small", "Next-ViT-S", "m"),
    System("convnext_base", "ConvNeXt-B", "l"),
    System("swin_base_patch4_window7_224", "Swin-B", "l"),
)


@functools.cache
def import_timm() -> types.ModuleType:
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
