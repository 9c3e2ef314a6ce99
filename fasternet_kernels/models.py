"""FasterNet T0, T1, T2, S, M and L as plain PyTorch modules.

Source: "Run, Don't Walk: Chasing Higher FLOPS for Faster Neural Networks", arXiv 2303.03667.
Nothing here uses this library's operators: these are the networks that `accelerate` makes fast, and
the answers it is compared with. Parameters and buffers have the names that timm gives them, so
weights move freely between the two; `load_checkpoint` also reads the official repository's files.
"""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "FasterNet",
    "fasternet_l",
    "fasternet_m",
    "fasternet_s",
    "fasternet_t0",
    "fasternet_t1",
    "fasternet_t2",
    "fold_batch_norm",
    "load_checkpoint",
]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": lambda: nn.SiLU(inplace=True),
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "identity": nn.Identity,
}


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drops a sample's branch with `drop_prob`.

    Kept samples are divided by 1 - drop_prob, so the expectation does not change. In eval, the
    identity.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_prob must be in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, ...), any floating dtype; returns the same shape."""
        if not self.training or self.drop_prob == 0.0:
            return x
        keep_prob = 1.0 - self.drop_prob
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        return x * keep.div_(keep_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


class PartialConv(nn.Module):
    """A 3x3 convolution on the first dim // n_div channels; the others pass unchanged."""

    def __init__(self, dim: int, n_div: int):
        super().__init__()
        if n_div < 1 or dim // n_div < 1:
            raise ValueError(f"n_div must leave a channel to convolve: dim={dim}, n_div={n_div}")
        self.dim_conv = dim // n_div
        self.dim_untouched = dim - self.dim_conv
        self.partial_conv3 = nn.Conv2d(self.dim_conv, self.dim_conv, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, dim, H, W); returns the same shape."""
        convolved, untouched = x.split([self.dim_conv, self.dim_untouched], dim=1)
        return torch.cat([self.partial_conv3(convolved), untouched], dim=1)


class Block(nn.Module):
    """x + drop_path(layer_scale * mlp(partial_conv(x))), mlp: conv1x1, BatchNorm, act, conv1x1."""

    def __init__(
        self,
        dim: int,
        n_div: int,
        mlp_ratio: float,
        drop_path: float,
        layer_scale_init_value: float,
        act: str,
    ):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            ACTIVATIONS[act](),
            nn.Conv2d(hidden, dim, 1, bias=False),
        )
        self.spatial_mixing = PartialConv(dim, n_div)
        if layer_scale_init_value > 0:
            self.layer_scale = nn.Parameter(torch.full((dim,), float(layer_scale_init_value)))
        else:
            self.layer_scale = None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, dim, H, W); returns the same shape."""
        branch = self.mlp(self.spatial_mixing(x))
        if self.layer_scale is not None:
            branch = self.layer_scale[:, None, None] * branch
        return x + self.drop_path(branch)


class PatchEmbed(nn.Module):
    """The stem, a convolution of non-overlapping patches, then BatchNorm.

    (B, in_channels, H, W) -> (B, dim, H // patch_size, W // patch_size).
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class PatchMerging(nn.Module):
    """Between stages: (B, dim, H, W) -> (B, 2 dim, H // 2, W // 2), a convolution and BatchNorm."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 2, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class Stage(nn.Module):
    """Merging (but in the first stage), then blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block]):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)  # first, as in timm: optimisers number parameters
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class FasterNet(nn.Module):
    """FasterNet (arXiv 2303.03667).

    Args:
        in_channels: channels of the image.
        num_classes: outputs of the classifier; 0 leaves it out: the network returns what would be
            its input, (B, feature_dim).
        embed_dim: channels C of the first stage; each later stage has twice as many.
        depths: blocks per stage.
        mlp_ratio: hidden channels of a block / its channels.
        n_div: a block convolves its first C // n_div channels.
        feature_dim: channels between the global pool and the classifier.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, from 0 at the first block to this at the last.
        layer_scale_init_value: start of each block's per-channel scale; 0 means there is none.
        act: "relu", "gelu" (erf), "gelu_tanh", "silu", "hardswish" or "identity".
        features_only: no head; forward returns the list of the stages' outputs.
        feature_norm: with features_only, a BatchNorm on each output, as in the official detection
            backbones.

    Attributes:
        channels: channels of each stage's output, for a detection neck.
        strides: image pixels per output pixel of each stage.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 2, 8, 2),
        mlp_ratio: float = 2.0,
        n_div: int = 4,
        feature_dim: int = 1280,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        layer_scale_init_value: float = 0.0,
        act: str = "relu",
        features_only: bool = False,
        feature_norm: bool = False,
    ):
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
        if not depths or min(depths) < 1:
            raise ValueError(f"depths must name at least one block for each stage, got {depths!r}")
        if feature_norm and not features_only:
            raise ValueError(
                "feature_norm is for features_only=True: a classifier has no such layers"
            )
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")

        self.num_classes = num_classes
        self.features_only = features_only
        self.channels = tuple(embed_dim * 2**i for i in range(len(depths)))
        self.strides = tuple(4 * 2**i for i in range(len(depths)))

        self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size=4)
        drop_path_rates = iter(
            torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        )
        self.stages = nn.Sequential()
        for i, (dim, depth) in enumerate(zip(self.channels, depths, strict=True)):
            blocks = [
                Block(dim, n_div, mlp_ratio, next(drop_path_rates), layer_scale_init_value, act)
                for _ in range(depth)
            ]
            self.stages.append(Stage(PatchMerging(dim // 2) if i > 0 else nn.Identity(), blocks))

        if features_only:
            norms = [
                nn.BatchNorm2d(dim) if feature_norm else nn.Identity() for dim in self.channels
            ]
            self.feature_norms = nn.ModuleList(norms)
        else:
            self.global_pool = nn.AdaptiveAvgPool2d(1)
            self.conv_head = nn.Conv2d(self.channels[-1], feature_dim, 1, bias=False)
            self.act = ACTIVATIONS[act]()
            self.flatten = nn.Flatten(1)
            self.dropout = nn.Dropout(drop_rate)
            self.classifier = nn.Linear(feature_dim, num_classes) if num_classes else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> last stage's output, (B, channels[-1], H // 32, W // 32)."""
        return self.stages(self.patch_embed(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last stage's output -> logits (B, num_classes), or the classifier's input."""
        x = self.dropout(self.flatten(self.act(self.conv_head(self.global_pool(x)))))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(B, in_channels, H, W) -> logits (B, num_classes), or the list of the stages' outputs."""
        if not self.features_only:
            return self.forward_head(self.forward_features(x))
        x = self.patch_embed(x)
        features = []
        for stage, norm in zip(self.stages, self.feature_norms, strict=True):
            x = stage(x)
            features.append(norm(x))
        return features


def _fasternet(
    defaults: dict[str, Any], num_classes: int, features_only: bool, kwargs: dict[str, Any]
) -> FasterNet:
    return FasterNet(num_classes=num_classes, features_only=features_only, **{**defaults, **kwargs})


def fasternet_t0(num_classes: int = 1000, features_only: bool = False, **kwargs: Any) -> FasterNet:
    """FasterNet-T0: 40 channels, GELU, 3.9 M parameters. kwargs: `FasterNet`'s arguments."""
    defaults = {"embed_dim": 40, "depths": (1, 2, 8, 2), "drop_path_rate": 0.0, "act": "gelu"}
    return _fasternet(defaults, num_classes, features_only, kwargs)


def fasternet_t1(num_classes: int = 1000, features_only: bool = False, **kwargs: Any) -> FasterNet:
    """FasterNet-T1: 64 channels, GELU, 7.6 M parameters. kwargs: `FasterNet`'s arguments."""
    defaults = {"embed_dim": 64, "depths": (1, 2, 8, 2), "drop_path_rate": 0.02, "act": "gelu"}
    return _fasternet(defaults, num_classes, features_only, kwargs)


def fasternet_t2(num_classes: int = 1000, features_only: bool = False, **kwargs: Any) -> FasterNet:
    """FasterNet-T2: 96 channels, ReLU, 15.0 M parameters. kwargs: `FasterNet`'s arguments."""
    defaults = {"embed_dim": 96, "depths": (1, 2, 8, 2), "drop_path_rate": 0.05, "act": "relu"}
    return _fasternet(defaults, num_classes, features_only, kwargs)


def fasternet_s(num_classes: int = 1000, features_only: bool = False, **kwargs: Any) -> FasterNet:
    """FasterNet-S: 128 channels, ReLU, 31.1 M parameters. kwargs: `FasterNet`'s arguments."""
    defaults = {"embed_dim": 128, "depths": (1, 2, 13, 2), "drop_path_rate": 0.1, "act": "relu"}
    return _fasternet(defaults, num_classes, features_only, kwargs)


def fasternet_m(num_classes: int = 1000, features_only: bool = False, **kwargs: Any) -> FasterNet:
    """FasterNet-M: 144 channels, ReLU, 53.5 M parameters. kwargs: `FasterNet`'s arguments."""
    defaults = {"embed_dim": 144, "depths": (3, 4, 18, 3), "drop_path_rate": 0.2, "act": "relu"}
    return _fasternet(defaults, num_classes, features_only, kwargs)


def fasternet_l(num_classes: int = 1000, features_only: bool = False, **kwargs: Any) -> FasterNet:
    """FasterNet-L: 192 channels, ReLU, 93.4 M parameters. kwargs: `FasterNet`'s arguments."""
    defaults = {"embed_dim": 192, "depths": (3, 4, 18, 3), "drop_path_rate": 0.3, "act": "relu"}
    return _fasternet(defaults, num_classes, features_only, kwargs)


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of `model`, in eval mode, with each BatchNorm2d that follows a Conv2d folded into it.

    What a careful user does before inference, and so the fair thing to compare with. "Follows"
    means the next child of the same parent: right for FasterNet, not proved for other networks.

    Args:
        model: a FasterNet of this module or of timm.

    Returns:
        A new module; `model` is unchanged. Its convolutions have biases: other state_dict keys.
    """
    folded = copy.deepcopy(model).eval()
    for parent in list(folded.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, nn.utils.fusion.fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return folded


# ---- Checkpoints ---------------------------------------------------------------------------------

_HEAD_PREFIXES = ("conv_head.", "classifier.")
# What wrapped the network when it was saved: DataParallel, a Lightning module, torch.compile.
_WRAPPER_PREFIXES = ("module.", "model.", "_orig_mod.")


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Loads a FasterNet checkpoint into `model`, in place.

    Reads timm's files and the official repository's, for classification and (into a model with
    feature_norm=True) for detection. Only tensors are read: a .safetensors file, or anything else
    with `torch.load(weights_only=True)`. The weights may lie under "state_dict" or "model", and all
    names may begin with "module.", "model." or "_orig_mod."; of a detector's weights, those under
    "backbone." are taken. A model without a head, or without a classifier, ignores the
    checkpoint's. Feature norms keep their values when the checkpoint has none, as when ImageNet
    weights start a detector.

    Args:
        model: a `FasterNet`, or any module with timm's FasterNet keys; accelerated or not, on any
            device, of any dtype.
        path: the file.

    Returns:
        `model`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a .safetensors file, and the package safetensors is not installed.
        ValueError: the file is not a checkpoint of tensors, or keys are missing, unexpected, or of
            another shape. The message names them. Nothing has been loaded then.
    """
    state = _timm_keys(_strip_prefixes(_read_tensors(path)))
    target = model.state_dict()
    for prefix in _HEAD_PREFIXES:
        if not any(key.startswith(prefix) for key in target):
            state = {key: value for key, value in state.items() if not key.startswith(prefix)}
    if not any(key.startswith("feature_norms.") for key in state):
        state |= {key: value for key, value in target.items() if key.startswith("feature_norms.")}

    problems = [
        _list_keys("missing", [key for key in target if key not in state]),
        _list_keys("unexpected", [key for key in state if key not in target]),
        _list_keys(
            "of another shape",
            [
                f"{key} (checkpoint {tuple(value.shape)}, model {tuple(target[key].shape)})"
                for key, value in state.items()
                if key in target and value.shape != target[key].shape
            ],
        ),
    ]
    if any(problems):
        hint = ""
        if any(key.startswith("feature_norms.") for key in state.keys() - target.keys()):
            hint = "; a detection backbone's norms need a model built with feature_norm=True"
        found = "; ".join(filter(None, problems))
        raise ValueError(f"{path} does not fit {type(model).__name__}: {found}{hint}")
    model.load_state_dict(state)
    return model


def _read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The mapping of tensors in a file, itself or under "state_dict" or "model"."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {os.fspath(path)}")
    if os.fspath(path).endswith(".safetensors"):
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"reading {path} needs the package safetensors") from error
        try:
            content = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # the unpickler raises whatever a strange file leads it to
            raise ValueError(
                f"{path} cannot be read as a file of tensors only: {_first_line(error)}"
            ) from error

    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"{path} holds {_describe(content)}, expected a mapping of names to tensors"
        )
    strange = [
        f"{key!r} ({_describe(value)})"
        for key, value in content.items()
        if not isinstance(value, Tensor)
    ]
    if strange:
        raise ValueError(f"{path} holds more than tensors: {_some(strange)}")
    return dict(content)


def _strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes what wrappers put before every key, and all but a detector's backbone."""
    while prefix := next(
        (p for p in _WRAPPER_PREFIXES if all(key.startswith(p) for key in state)), None
    ):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    if any(key.startswith("backbone.") for key in state):
        state = {
            key.removeprefix("backbone."): value
            for key, value in state.items()
            if key.startswith("backbone.")
        }
    return state


def _timm_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the official repository's keys to timm's; other keys stay.

    There, `stages` alternates stages (0, 2, 4, 6) and merging layers (1, 3, 5), the head is
    avgpool_pre_head and head, and detection backbones normalise the stages' outputs with norm0,
    norm2, norm4 and norm6.
    """
    official = re.compile(r"stages\.\d+\.(reduction|norm)\.|avgpool_pre_head\.|head\.|norm\d+\.")
    if not any(official.match(key) for key in state):
        return state

    def rename(key: str) -> str:
        if match := re.fullmatch(r"stages\.(\d*[13579])\.((?:reduction|norm)\..+)", key):
            return f"stages.{(int(match[1]) + 1) // 2}.downsample.{match[2]}"
        if match := re.fullmatch(r"stages\.(\d*[02468])\.(blocks\..+)", key):
            return f"stages.{int(match[1]) // 2}.{match[2]}"
        if match := re.fullmatch(r"norm(\d*[02468])\.(.+)", key):
            return f"feature_norms.{int(match[1]) // 2}.{match[2]}"
        if match := re.fullmatch(r"avgpool_pre_head\.1\.(.+)", key):
            return f"conv_head.{match[1]}"
        if match := re.fullmatch(r"head\.(.+)", key):
            return f"classifier.{match[1]}"
        return key

    return {rename(key): value for key, value in state.items()}


def _some(items: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _list_keys(kind: str, keys: Sequence[str]) -> str:
    return f"{len(keys)} {kind}: {_some(keys)}" if keys else ""


def _describe(value: object) -> str:
    return (
        "an empty mapping"
        if isinstance(value, Mapping) and not value
        else f"a {type(value).__name__}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
