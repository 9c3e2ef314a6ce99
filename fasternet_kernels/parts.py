"""Finds FasterNet's parts by their structure, never their names, and proves what it found.

A block is a module with a 3x3 convolution on part of its channels and two 1x1 convolutions around
an activation; a patch convolution is one whose stride is its kernel, with its norm; a partial
convolution passes on the channels that its 3x3 convolution leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor, nn

from .modules import act_name
from .proof import agree, agree_in_buffers, copied, random_image, randomised_copy, seeded_run
from .swapped import RECORD, Refused, SwappedBlock, SwappedPatchConv, SwappedPConv, swap
from .training import NORMS


@dataclasses.dataclass(frozen=True)
class Match:
    """A module's structure, as one of the kinds that can be swapped."""

    mixin: type
    paths: dict[str, tuple[str, ...] | None]
    act: str
    shapes: list[tuple[int, int, int]]  # of images to prove it on


def _leaves(
    module: nn.Module, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """The modules without children below ``module``, in registration order."""
    for name, child in module._modules.items():
        if child is None:
            continue
        if child._modules:
            yield from _leaves(child, (*path, name))
        else:
            yield (*path, name), child


def _is_same_conv3x3(m: nn.Module) -> bool:
    return type(m) is nn.Conv2d and m.kernel_size == (3, 3) and m.in_channels == m.out_channels


def is_conv1x1(m: nn.Module) -> bool:
    return type(m) is nn.Conv2d and m.kernel_size == (1, 1)


def _check_plain(
    name: str, conv: nn.Conv2d, stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    if (
        conv.stride != stride
        or conv.padding != padding
        or conv.dilation != (1, 1)
        or conv.padding_mode != "zeros"
    ):
        raise Refused(
            f"{name} has stride {conv.stride}, padding {conv.padding}, dilation {conv.dilation}"
        )
    if conv.groups != 1:
        raise Refused(f"{name} has {conv.groups} groups")


def _own_parameters(module: nn.Module, leaves) -> list[tuple[tuple[str, ...], Tensor]]:
    """The parameters that containers (not leaves) hold directly."""
    owned = {id(p) for _, leaf in leaves for p in leaf.parameters(recurse=False)}
    return [
        (tuple(name.split(".")), p) for name, p in module.named_parameters() if id(p) not in owned
    ]


def match_block(module: nn.Module) -> Match | None:
    """The match of a module with a block's structure, None if it is something else altogether."""
    leaves = list(_leaves(module))
    partials = [(path, m) for path, m in leaves if _is_same_conv3x3(m)]
    pointwise = [(path, m) for path, m in leaves if is_conv1x1(m)]
    if len(partials) != 1 or len(pointwise) != 2:
        return None
    (partial_path, partial), ((pw1_path, pw1), (pw2_path, pw2)) = partials[0], pointwise
    if pw1.in_channels < partial.in_channels or (pw2.in_channels, pw2.out_channels) != (
        pw1.out_channels,
        pw1.in_channels,
    ):
        return None
    _check_plain("the 3x3 convolution", partial, (1, 1), (1, 1))
    _check_plain("the first 1x1 convolution", pw1, (1, 1), (0, 0))
    _check_plain("the second 1x1 convolution", pw2, (1, 1), (0, 0))
    if partial.bias is not None or pw2.bias is not None:
        raise Refused("the 3x3 or the second 1x1 convolution has a bias")
    order = [path for path, _ in leaves]
    between = leaves[order.index(pw1_path) + 1 : order.index(pw2_path)]
    norms = [(path, m) for path, m in between if isinstance(m, NORMS)]
    acts = [(path, m) for path, m in between if not isinstance(m, (*NORMS, nn.Identity))]
    if (
        len(norms) > 1
        or len(acts) > 1
        or (norms and acts and order.index(norms[0][0]) > order.index(acts[0][0]))
    ):
        raise Refused("between the 1x1 convolutions there is more than a norm and an activation")
    act = act_name(acts[0][1]) if acts else "identity"
    if act is None:
        raise Refused(f"the kernels do not know the activation {type(acts[0][1]).__name__}")
    used = {path for path, _ in [partials[0], *pointwise, *norms, *acts]}
    rest = [(path, m) for path, m in leaves if path not in used and type(m) is not nn.Identity]
    if any(next(m.parameters(), None) is not None for _, m in rest) or len(rest) > 1:
        raise Refused("it has other layers: " + ", ".join(type(m).__name__ for _, m in rest))
    if rest and not hasattr(rest[0][1], "drop_prob"):
        raise Refused(f"it has another layer: {type(rest[0][1]).__name__}")
    own = _own_parameters(module, leaves)
    if len(own) > 1 or (own and own[0][1].numel() != pw1.in_channels):
        raise Refused("it has other parameters: " + ", ".join(".".join(path) for path, _ in own))
    paths = {
        "partial": partial_path,
        "pw1": pw1_path,
        "norm": norms[0][0] if norms else None,
        "pw2": pw2_path,
        "layer_scale": own[0][0] if own else None,
        "drop_path": rest[0][0] if rest else None,
    }
    return Match(SwappedBlock, paths, act, [(pw1.in_channels, 3, 5), (pw1.in_channels, 4, 2)])


def match_patch_conv(module: nn.Module) -> Match | None:
    leaves = list(_leaves(module))
    if not leaves or len(leaves) > 2 or type(leaves[0][1]) is not nn.Conv2d:
        return None
    path, conv = leaves[0]
    norm = leaves[1] if len(leaves) == 2 else None
    if norm is not None and type(norm[1]) not in (*NORMS, nn.Identity):
        return None
    if min(conv.kernel_size) < 2 or conv.stride != conv.kernel_size or conv.padding != (0, 0):
        return None
    if conv.dilation != (1, 1) or conv.groups != 1 or _own_parameters(module, leaves):
        return None
    kh, kw = conv.kernel_size
    paths = {"conv": path, "norm": None if norm is None else norm[0]}
    shapes = [(conv.in_channels, 2 * kh + 1, 3 * kw), (conv.in_channels, kh, 2 * kw + kw - 1)]
    return Match(SwappedPatchConv, paths, "identity", shapes)


def match_pconv(module: nn.Module) -> Match | None:
    """The number of input channels stands nowhere in a partial convolution: it is one of the
    module's integers, or a sum. What accepts no input wider than its convolution is something else.
    """
    leaves = list(_leaves(module))
    if len(leaves) != 1 or not _is_same_conv3x3(leaves[0][1]) or _own_parameters(module, leaves):
        return None
    path, conv = leaves[0]
    c_partial = conv.in_channels
    numbers = [v for v in vars(module).values() if type(v) is int and v > 0]
    widths = sorted({v for v in (*numbers, *(c_partial + v for v in numbers)) if v > c_partial})
    widths += [n * c_partial for n in (4, 2, 3, 8) if n * c_partial not in widths]
    with randomised_copy(module) as twin:
        twin.eval()
        width = next((width for width in widths if _keeps_channels(twin, width)), None)
    if width is None:
        return None
    _check_plain("the 3x3 convolution", conv, (1, 1), (1, 1))
    if conv.bias is not None:
        raise Refused("the 3x3 convolution has a bias")
    return Match(SwappedPConv, {"partial": path}, "identity", [(width, 3, 5), (width, 4, 2)])


def _keeps_channels(module: nn.Module, width: int) -> bool:
    """Whether it turns images of that many channels into such."""
    try:
        y, _ = seeded_run(module, random_image(width, 3, 5), 0)
    except Exception:  # not the input's width
        return False
    return isinstance(y, Tensor) and y.dim() == 4 and y.shape[1] == width


def prove(module: nn.Module, match: Match) -> None:
    """Raises Refused unless copies of the module, one swapped and one not, agree in eval and in
    training mode, on inputs of the order of 1 and of 1000."""
    with randomised_copy(module) as theirs, copied(theirs) as ours:
        swap(ours, match.mixin, match.paths, match.act)
        if not ours.as_proved():  # it would run unfused, and prove nothing
            raise Refused("global module hooks are registered")
        ours.__dict__[RECORD].lean = True  # trains fused on every device
        for training in (False, True):
            theirs.train(training)
            ours.train(training)
            when = "in training mode" if training else "in eval mode"
            for seed, shape in enumerate(match.shapes):
                agree(ours, theirs, random_image(*shape) * 1000.0**seed, seed, when)
            agree_in_buffers(ours, theirs)
