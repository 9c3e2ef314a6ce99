"""PConv as other people's models have it: small re-creations of the code that `accelerate` meets.

The classes keep the structure, the call order and the odd habits of their originals (a forward set
per instance, an in-place slice, a bias left by folding), not their size. Below them: random weights
and the comparison of two networks.
"""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from cases import assert_right, generator
from torch import Tensor, nn

# ---- The official repository ---------------------------------------------------------------------


class DropPath(nn.Module):
    """Stochastic depth as timm has it."""

    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        random_tensor = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        if keep_prob > 0.0:
            random_tensor.div_(keep_prob)
        return x * random_tensor


class Partial_conv3(nn.Module):
    """The official module: `forward` is an attribute of the instance."""

    def __init__(self, dim, n_div=4, forward="split_cat"):
        super().__init__()
        self.dim_conv3 = dim // n_div
        self.dim_untouched = dim - self.dim_conv3
        self.partial_conv3 = nn.Conv2d(self.dim_conv3, self.dim_conv3, 3, 1, 1, bias=False)
        self.forward = {
            "slicing": self.forward_slicing,
            "slicing_in_place": self.forward_slicing_in_place,
            "split_cat": self.forward_split_cat,
        }[forward]

    def forward_slicing(self, x):
        x = x.clone()
        x[:, : self.dim_conv3, :, :] = self.partial_conv3(x[:, : self.dim_conv3, :, :])
        return x

    def forward_slicing_in_place(self, x):
        """A re-implementation's default: no clone, so that a residual reads the changed x."""
        x[:, : self.dim_conv3, :, :] = self.partial_conv3(x[:, : self.dim_conv3, :, :])
        return x

    def forward_split_cat(self, x):
        x1, x2 = torch.split(x, [self.dim_conv3, self.dim_untouched], dim=1)
        x1 = self.partial_conv3(x1)
        return torch.cat((x1, x2), 1)


class MLPBlock(nn.Module):
    """The official block; layer_scale sets its forward per instance as well."""

    def __init__(
        self,
        dim,
        n_div=4,
        mlp_ratio=2.0,
        drop_path=0.0,
        layer_scale=0.0,
        act=nn.ReLU,
        forward="split_cat",
    ):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            act(),
            nn.Conv2d(hidden, dim, 1, bias=False),
        )
        self.spatial_mixing = Partial_conv3(dim, n_div, forward)
        if layer_scale > 0:
            self.layer_scale = nn.Parameter(layer_scale * torch.ones(dim))
            self.forward = self.forward_layer_scale
        else:
            self.forward = self.forward

    def forward(self, x):
        shortcut = x
        x = self.spatial_mixing(x)
        return shortcut + self.drop_path(self.mlp(x))

    def forward_layer_scale(self, x):
        shortcut = x
        x = self.spatial_mixing(x)
        return shortcut + self.drop_path(self.layer_scale.unsqueeze(-1).unsqueeze(-1) * self.mlp(x))


class BasicStage(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(x)


class PatchEmbed(nn.Module):
    def __init__(self, in_channels, dim, norm=nn.BatchNorm2d):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, 4, 4, bias=False)
        self.norm = norm(dim)

    def forward(self, x):
        return self.norm(self.proj(x))


class PatchMerging(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 2, 2, bias=False)
        self.norm = nn.BatchNorm2d(2 * dim)

    def forward(self, x):
        return self.norm(self.reduction(x))


class OfficialFasterNet(nn.Module):
    """Stages and merging layers take turns in `stages`; the head is a Sequential and a Linear."""

    def __init__(self, dim=24, depths=(1, 2), features=False, **block):
        super().__init__()
        self.patch_embed = PatchEmbed(3, dim)
        stages = []
        for i, depth in enumerate(depths):
            width = dim << i
            stages.append(BasicStage(*(MLPBlock(width, **block) for _ in range(depth))))
            if i + 1 < len(depths):
                stages.append(PatchMerging(width))
        self.stages = nn.Sequential(*stages)
        if features:
            for i in range(len(depths)):
                self.add_module(f"norm{2 * i}", nn.BatchNorm2d(dim << i))
            self.forward = self.forward_det
        else:
            self.avgpool_pre_head = nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(dim << (len(depths) - 1), 40, 1, bias=False),
                block.get("act", nn.ReLU)(),
            )
            self.head = nn.Linear(40, 11)
            self.forward = self.forward_cls

    def forward_cls(self, x):
        x = self.patch_embed(x)
        x = self.stages(x)
        x = self.avgpool_pre_head(x)
        x = torch.flatten(x, 1)
        return self.head(x)

    def forward_det(self, x):
        x = self.patch_embed(x)
        outs = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index % 2 == 0:
                outs.append(getattr(self, f"norm{index}")(x))
        return outs


def fuse_conv_bn(model: nn.Module) -> nn.Module:
    """As the official repository folds: the convolution gets a bias, the norm is an Identity."""
    model.eval()
    for module in list(model.modules()):
        for (conv, first), (norm, second) in itertools.pairwise(list(module.named_children())):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(module, conv, nn.utils.fusion.fuse_conv_bn_eval(first, second))
                setattr(module, norm, nn.Identity())
    return model


# ---- The forks of Ultralytics --------------------------------------------------------------------


class Conv(nn.Module):
    """Convolution, norm, SiLU; `fuse` leaves a convolution with a bias and no norm."""

    default_act = nn.SiLU()  # one instance for the whole program, as upstream

    def __init__(self, c1, c2, k=1, s=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = self.default_act if act is True else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))

    def fuse(self):
        self.conv = nn.utils.fusion.fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
        del self.bn
        self.forward = self.forward_fuse


class FasterBlock(nn.Module):
    """`Faster_Block`: mlp is [Conv(1x1, norm, SiLU), Conv2d], `adjust_channel` if widths differ."""

    def __init__(
        self, inc, dim, n_div=4, mlp_ratio=2, drop_path=0.0, layer_scale=0.0, forward="split_cat"
    ):
        super().__init__()
        self.mlp_ratio = mlp_ratio
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(Conv(dim, hidden, 1), nn.Conv2d(hidden, dim, 1, bias=False))
        self.spatial_mixing = Partial_conv3(dim, n_div, forward)
        self.adjust_channel = Conv(inc, dim, 1) if inc != dim else None
        if layer_scale > 0:
            self.layer_scale = nn.Parameter(layer_scale * torch.ones(dim))
            self.forward = self.forward_layer_scale

    def forward(self, x):
        if self.adjust_channel is not None:
            x = self.adjust_channel(x)
        shortcut = x
        x = self.spatial_mixing(x)
        return shortcut + self.drop_path(self.mlp(x))

    def forward_layer_scale(self, x):
        shortcut = x
        x = self.spatial_mixing(x)
        return shortcut + self.drop_path(self.layer_scale.unsqueeze(-1).unsqueeze(-1) * self.mlp(x))


class C2fFaster(nn.Module):
    """A 1x1, n blocks whose outputs are all kept, their concatenation, a 1x1."""

    def __init__(self, c1, c2, n=2, **block):
        super().__init__()
        self.c = c2 // 2
        self.cv1 = Conv(c1, 2 * self.c, 1)
        self.cv2 = Conv((2 + n) * self.c, c2, 1)
        self.m = nn.ModuleList(FasterBlock(self.c, self.c, **block) for _ in range(n))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Residual(nn.Module):
    """A block as a Sequential, the residual around it."""

    def __init__(self, dim=24):
        super().__init__()
        self.body = nn.Sequential(
            Partial_conv3(dim),
            nn.Conv2d(dim, 2 * dim, 1, bias=False),
            nn.BatchNorm2d(2 * dim),
            nn.SiLU(),
            nn.Conv2d(2 * dim, dim, 1, bias=False),
        )

    def forward(self, x):
        return x + self.body(x)


class PConvNet(nn.Module):
    """Single partial convolutions between other layers: no block to be found."""

    def __init__(self, dim=24, n_div=4, forward="split_cat"):
        super().__init__()
        self.stem = Conv(3, dim, 3, 2)
        self.first = Partial_conv3(dim, n_div, forward)
        self.second = Partial_conv3(dim, n_div, forward)
        self.norm = nn.BatchNorm2d(dim)
        self.out = nn.Conv2d(dim, 10, 3, padding=1)

    def forward(self, x):
        return self.out(F.relu(self.norm(self.second(self.first(self.stem(x))))))


# ---- What is something else ----------------------------------------------------------------------


class InlineBlock(nn.Module):
    """A block that holds the 3x3 itself, so that nothing of it can be swapped alone.

    Each argument makes it something that is no FasterNet block.
    """

    def __init__(
        self,
        dim=24,
        n_div=4,
        conv_bias=False,
        act=nn.ReLU,
        inner=False,
        residual=True,
        in_place=False,
        out_bias=False,
    ):
        super().__init__()
        self.cp = dim // n_div
        self.residual, self.in_place = residual, in_place
        self.conv = nn.Conv2d(self.cp, self.cp, 3, padding=1, bias=conv_bias)
        self.inner = nn.Sequential(nn.BatchNorm2d(self.cp), nn.SiLU()) if inner else None
        self.pw1 = nn.Conv2d(dim, 2 * dim, 1, bias=False)
        self.norm = nn.BatchNorm2d(2 * dim)
        self.act = act()
        self.pw2 = nn.Conv2d(2 * dim, dim, 1, bias=out_bias)

    def forward(self, x):
        convolved = self.conv(x[:, : self.cp])
        if self.inner is not None:
            convolved = self.inner(convolved)
        if self.in_place:
            x[:, : self.cp] = convolved
            u = x
        else:
            u = torch.cat((convolved, x[:, self.cp :]), 1)
        y = self.pw2(self.act(self.norm(self.pw1(u))))
        return x + y if self.residual else y


class PartialConv2d(nn.Conv2d):
    """The inpainting layer of the same name: a convolution that counts valid pixels."""

    def forward(self, x, mask=None):
        if mask is None:
            mask = torch.ones_like(x[:, :1])
        weight = torch.ones(1, 1, *self.kernel_size, dtype=x.dtype)
        valid = F.conv2d(mask, weight, None, self.stride, self.padding)
        return super().forward(x * mask) * (9.0 / (valid + 1e-8)) * valid.clamp(0, 1)


class Inpainting(nn.Module):
    """A block in which the inpainting layer takes the place of the 3x3."""

    def __init__(self, dim=24):
        super().__init__()
        self.conv = PartialConv2d(dim // 4, dim // 4, 3, padding=1, bias=False)
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, 2 * dim, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(2 * dim, dim, 1, bias=False),
        )

    def forward(self, x):
        c = self.conv.in_channels
        return x + self.mlp(torch.cat((self.conv(x[:, :c]), x[:, c:]), 1))


class SHSA(nn.Module):
    """SHViT's single-head self-attention on part of the channels, split and joined like PConv's."""

    def __init__(self, dim=24, qk_dim=8):
        super().__init__()
        self.scale = qk_dim**-0.5
        self.qk_dim, self.pdim = qk_dim, dim // 4
        self.pre_norm = nn.GroupNorm(1, self.pdim)
        self.qkv = nn.Conv2d(self.pdim, 2 * qk_dim + self.pdim, 1)
        self.proj = nn.Sequential(nn.ReLU(), nn.Conv2d(dim, dim, 1))

    def forward(self, x):
        b, c, h, w = x.shape
        x1, x2 = torch.split(x, [self.pdim, c - self.pdim], dim=1)
        q, k, v = (
            self.qkv(self.pre_norm(x1))
            .flatten(2)
            .split([self.qk_dim, self.qk_dim, self.pdim], dim=1)
        )
        attention = (q.transpose(-2, -1) @ k * self.scale).softmax(dim=-1)
        x1 = (v @ attention.transpose(-2, -1)).reshape(b, self.pdim, h, w)
        return x + self.proj(torch.cat((x1, x2), dim=1))


class Pinwheel(nn.Module):
    """Another PConv: four padded strips of all channels."""

    def __init__(self, dim=24, k=3):
        super().__init__()
        self.pad = nn.ModuleList(
            nn.ZeroPad2d(p) for p in ((k, 0, 1, 0), (0, k, 0, 1), (0, 1, k, 0), (1, 0, 0, k))
        )
        self.cw = nn.Conv2d(dim, dim // 4, (1, k))
        self.ch = nn.Conv2d(dim, dim // 4, (k, 1))
        self.cat = nn.Conv2d(dim, dim, 2)

    def forward(self, x):
        y = [
            conv(pad(x))
            for pad, conv in zip(self.pad, (self.cw, self.cw, self.ch, self.ch), strict=True)
        ]
        return self.cat(torch.cat(y, 1))


class Bottleneck(nn.Module):
    """ResNet's: the same kinds of convolutions, in another order."""

    def __init__(self, dim=24):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim // 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim // 4)
        self.conv2 = nn.Conv2d(dim // 4, dim // 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim // 4)
        self.conv3 = nn.Conv2d(dim // 4, dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(dim)

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(x + self.bn3(self.conv3(y)))


class BasicBlock(nn.Module):
    """3x3 convolutions of all channels: no 1x1, nothing partial."""

    def __init__(self, dim=24):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)

    def forward(self, x):
        return F.relu(x + self.conv2(F.relu(self.bn1(self.conv1(x)))))


# ---- Weights and comparisons ---------------------------------------------------------------------


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that keep a signal's size; norms whose statistics and affine parameters matter."""
    g = generator(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if p.dim() > 1:
                    p.normal_(0.0, p[0].numel() ** -0.5, generator=g)
                elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and name == "weight":
                    p.uniform_(0.5, 1.5, generator=g)
                else:
                    p.uniform_(-0.5, 0.5, generator=g)
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.uniform_(-0.5, 0.5, generator=g)
                module.running_var.uniform_(0.5, 1.5, generator=g)
    return model


def as_list(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def channels_last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def rivals(plain: nn.Module, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Eager PyTorch in both memory formats."""
    return [
        (copy.deepcopy(plain), x.contiguous()),
        (channels_last(plain), x.contiguous(memory_format=torch.channels_last)),
    ]


def relative(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """(L2 norm, maximum) of the error, over those of `exact`."""
    error = got.double() - exact
    l2, peak = exact.norm().clamp_min(1e-300), exact.abs().amax().clamp_min(1e-300)
    return float(error.norm() / l2), float(error.abs().amax() / peak)


def assert_close(
    got: Tensor,
    exact: Tensor,
    eager: list[Tensor],
    what: str,
    computed_in: torch.dtype | None = None,
    layers: int = 1,
) -> None:
    """`cases.assert_right`, where eager makes enough sense to be a rival.

    In float64 eager is itself the reference: allowed is twice the distance between its two memory
    formats, if that is more than 1e-13 for each of the `layers` that a result has passed.
    `computed_in` is autocast's dtype.
    """
    assert got.dtype == eager[0].dtype, f"{what}: dtype {got.dtype}, eager has {eager[0].dtype}"
    if got.dtype == torch.float64:
        assert got.shape == exact.shape, what
        allowed = [
            max(1e-13 * layers, *(2 * e for e in eager_errors))
            for eager_errors in zip(*(relative(e, exact) for e in eager), strict=True)
        ]
        for norm, error, limit in zip(("L2", "peak"), relative(got, exact), allowed, strict=True):
            assert error <= limit, f"{what}: relative {norm} error {error:.1e} in float64"
        return
    # A rival without half of its digits would let anything pass.
    half = torch.finfo(computed_in or got.dtype).eps ** 0.5
    for e in eager:
        assert relative(e, exact)[0] < half, f"{what}: eager is no rival in {got.dtype}"
    assert_right(got, exact, *eager, what=what)


def call(model: nn.Module, x: Tensor):
    return model(x)


def assert_agree(
    fast: nn.Module, plain: nn.Module, x: Tensor, what: str = "output", run=call, computed_in=None
) -> list[Tensor]:
    """Holds `run(fast, x)` to the criterion; `plain` is the same network, never accelerated.

    `run` returns a tensor or several. It is given copies of `plain`, which itself stays as it is.
    Returns what `fast` gave.
    """
    with torch.no_grad():
        exact = as_list(run(copy.deepcopy(plain).double(), x.double()))
        eager = [as_list(run(model, x)) for model, x in rivals(plain, x)]
    got = as_list(run(fast, x))
    assert len(got) == len(exact) > 0
    for i, (g, e) in enumerate(zip(got, exact, strict=True)):
        assert_close(
            g.detach(), e.detach(), [r[i].detach() for r in eager], f"{what} {i}", computed_in
        )
    return got


def step(
    model: nn.Module, x: Tensor, seed: int = 0, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """One forward and backward: outputs, gradients, and buffers afterwards, by name.

    The loss weighs each output element at random, so that no gradient cancels; eighths are exact in
    every dtype. What the model draws is what `seed` gives.
    """
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        outputs = as_list(model(x))
    weights = [
        torch.randint(-8, 9, y.shape, generator=generator(i)) / 8 for i, y in enumerate(outputs)
    ]
    torch.autograd.backward(outputs, [w.to(y.dtype) for w, y in zip(weights, outputs, strict=True)])
    result = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    gradients = [("x", x.grad), *((n, p.grad) for n, p in model.named_parameters())]
    result |= {f"gradient of {n}": g for n, g in gradients if g is not None}
    return result | {n: b.detach().clone() for n, b in model.named_buffers()}


def graph(*outputs):
    """All nodes of the autograd graph behind ``outputs``."""
    seen, nodes = set(), [y.grad_fn for y in outputs]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [n for n, _ in node.next_functions]
    return seen


def layer_nodes(*outputs):
    """How many nodes of autograd the layers behind ``outputs`` are."""
    return sum(type(node).__name__ == "_LayersBackward" for node in graph(*outputs))


def assert_same_step(
    fast: nn.Module, plain: nn.Module, x: Tensor, seed: int = 0, autocast: torch.dtype | None = None
) -> None:
    """Holds a step of `fast` to the criterion: outputs, every gradient, every buffer.

    `plain` stays as it is.
    """
    exact = step(copy.deepcopy(plain).double(), x.double(), seed)
    eager = [step(model, image, seed, autocast) for model, image in rivals(plain, x)]
    got = step(fast, x, seed, autocast)
    assert list(got) == list(eager[0])
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in plain.modules())
    for name, e in exact.items():
        if e.is_floating_point():
            assert_close(got[name], e, [r[name] for r in eager], name, autocast, layers)
        else:
            assert torch.equal(got[name], e), name
