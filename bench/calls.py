"""Calls of single ops at the shapes of the networks' stages, on any device: what offline.py
compiles, roofline.py reckons and gpu_tune.py tunes.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from bench.workloads import IMAGE_SIZE, NETWORKS, OWN_ACT, STAGES
from fasternet_kernels.reference import compute_dtype

__all__ = [
    "BACKWARD",
    "DTYPES",
    "FORWARD",
    "INFERENCE",
    "TRAINING",
    "TRAINING_BATCH",
    "Call",
    "calls",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INFERENCE = ("pconv3x3", "pconv3x3_", "pconv_pw", "block", "patch_conv", "head")
FORWARD = ("pw_stats", "patch_stats", "bn_act", "act_pw_residual")
BACKWARD = (
    "pconv3x3_backward",
    "pw_stats_backward",
    "patch_stats_backward",
    "bn_act_backward",
    "act_pw_residual_backward",
)
TRAINING = (*FORWARD, *BACKWARD)
TRAINING_BATCH = 128
PATCHES = ("patch_conv", "patch_stats", "patch_stats_backward")
N_DIV, MLP_RATIO = 4, 2
HEAD_WIDTH, CLASSES = 1280, 1000


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes:
        op: of torch.ops.fasternet_kernels.
        network: "t0" to "l"; with stage (from 1) it decides channels, image size and activation.
        batch: images.
        dtype: "fp32", "bf16" or "fp16".
        side: pixels on a side, by default the stage's own for images of 224 pixels.
    """

    op: str
    network: str
    stage: int
    batch: int
    dtype: str
    side: int = 0

    @property
    def name(self) -> str:
        return f"{self.op}_{self.network}_stage{self.stage}"

    @property
    def channels(self) -> int:
        return NETWORKS[self.network] << (self.stage - 1)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, C, H, W) of what comes in."""
        side = self.side or IMAGE_SIZE // 4 >> (self.stage - 1)
        if self.op in PATCHES:
            if self.stage == 1:
                return self.batch, 3, 4 * side, 4 * side
            return self.batch, self.channels // 2, 2 * side, 2 * side
        return self.batch, self.channels, side, side

    @property
    def act(self) -> str:
        return OWN_ACT[self.network]

    def arguments(self, device: str = "meta") -> tuple:
        """The op's arguments: random values of the order of one, weights that keep the variance."""
        dtype = DTYPES[self.dtype]
        image = functools.partial(_random, dtype=dtype, device=device)
        vector = functools.partial(_random, dtype=compute_dtype(dtype), device=device)
        batch, c, height, width = self.shape
        cp, hidden = max(c // N_DIV, 1), c * MLP_RATIO
        x = image(batch, c, height, width)
        w_partial = image(cp, cp, 3, 3, scale=(9 * cp) ** -0.5)
        w_pw1 = image(hidden, c, 1, 1, scale=c**-0.5)
        w_pw2 = image(c, hidden, 1, 1, scale=hidden**-0.5)
        scale, shift = vector(hidden), vector(hidden)
        wide = functools.partial(image, batch, hidden, height, width)  # such as z

        if self.op == "pconv3x3":
            return x, w_partial, False
        if self.op == "pconv3x3_":
            return x, w_partial
        if self.op == "pconv3x3_backward":
            return x, image(batch, cp, height, width), w_partial, [True, True]
        if self.op == "pconv_pw":
            return x, w_partial, w_pw1, scale, shift, self.act, False
        if self.op == "block":
            return x, w_partial, w_pw1, w_pw2, scale, shift, None, None, self.act, False
        if self.op in PATCHES:
            outputs = functools.partial(vector, self.channels)
            side = 4 if self.stage == 1 else 2
            weight = image(self.channels, c, side, side, scale=(c * side * side) ** -0.5)
            if self.op == "patch_conv":
                return x, weight, outputs(), outputs(), True
            if self.op == "patch_stats":
                return x, weight
            dz, z = (image(batch, self.channels, height // side, width // side) for _ in range(2))
            mask = [self.stage > 1, True]  # no gradient of images
            return dz, outputs(), outputs(), x, z, outputs(), weight, mask
        if self.op == "head":
            w_conv = image(HEAD_WIDTH, c, 1, 1, scale=c**-0.5)
            w_fc = image(CLASSES, HEAD_WIDTH, scale=HEAD_WIDTH**-0.5)
            return x, w_conv, None, w_fc, image(CLASSES), self.act
        if self.op == "pw_stats":
            return x, w_partial, w_pw1
        if self.op == "pw_stats_backward":
            z, mean = wide(), vector(hidden)
            grads = wide(), vector(hidden), vector(hidden)
            return *grads, x, z, mean, w_partial, w_pw1, [True, True, True], image(*self.shape)
        if self.op == "bn_act":
            return wide(), vector(hidden), scale, shift, self.act
        if self.op == "bn_act_backward":
            mask = [True, False, True, True]
            return wide(), wide(), vector(hidden), scale, shift, self.act, mask
        if self.op == "act_pw_residual":
            return x, wide(), vector(hidden), scale, shift, w_pw2, None, None, self.act
        if self.op == "act_pw_residual_backward":
            mask = [True, False, True, True, True, False, False]
            vectors = vector(hidden), scale, shift
            return x, wide(), *vectors, w_pw2, None, None, self.act, mask
        raise ValueError(f"no call of {self.op!r} is known")


def _random(
    *shape: int, dtype: torch.dtype, device: str, scale: float = 1.0, seed: int = 0
) -> Tensor:
    """Normal values, images in channels_last; on the meta device none."""
    if device == "meta":
        t = torch.empty(shape, dtype=dtype, device=device)
    else:
        generator = torch.Generator(device).manual_seed(seed + math.prod(shape))
        t = torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)
    return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t


def calls(
    ops: tuple[str, ...] = INFERENCE + TRAINING,
    networks: tuple[str, ...] = tuple(NETWORKS),
    batches: tuple[int, ...] = (1, 32, 256),
    dtypes: tuple[str, ...] = tuple(DTYPES),
    stages: tuple[int, ...] = tuple(range(1, STAGES + 1)),
) -> list[Call]:
    """Every call of those ops at those stages of those networks; of a head at the last only."""
    return [
        Call(op, network, stage, batch, dtype)
        for op in ops
        for network in networks
        for stage in stages
        if op != "head" or stage == STAGES
        for batch in batches
        for dtype in dtypes
    ]
