"""The ops on packed weights: for inference, where what depends on the weights alone is done once.

A pack (:mod:`fasternet_kernels.triton.layout`) holds them as the kernels read them; these launchers
take views of it and go on as the ops on raw weights do. If x has another dtype than the pack, as
under autocast, the weights are rounded to x's on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import ACTS, BLOCK, EMIT, HEAD, PATCH_CONV
from .block import block_prepared, pconv_pw_prepared
from .common import check_weight
from .layout import Section, channels_inside, rows_of, sections, size, vectors_of
from .patch import head_prepared, patch_conv_prepared


def pack(
    weights: list[Tensor],
    scales: list[Tensor | None],
    shifts: list[Tensor | None],
    fast: bool = False,
) -> Tensor:
    dtype = weights[0].dtype
    shapes = [w.shape for w in weights]
    out = torch.zeros(size(shapes, dtype), dtype=dtype, device=weights[0].device)
    for section, weight, scale, shift in zip(sections(shapes, dtype), weights, scales, shifts):
        packed_scale, packed_shift = vectors_of(out, section)
        packed_scale.fill_(1) if scale is None else packed_scale.copy_(scale)
        if shift is not None:
            packed_shift.copy_(shift)
        if section.partial:
            weight = weight.permute(2, 3, 0, 1)
        elif weight.dim() == 4 and channels_inside(weight.shape[1]):
            weight = weight.permute(0, 2, 3, 1)
        rows_of(out, section)[:, : section.columns] = weight.reshape(section.rows, -1)
    return out


def _rows(packed: Tensor, section: Section, x: Tensor) -> Tensor:
    """The section's rows in x's dtype; of PConv's 3x3 as (9, C_out, padded C_in)."""
    rows = rows_of(packed, section)
    check_weight(rows)
    if section.partial:
        rows = rows.view(9, section.outputs, section.step)
    return rows.to(x.dtype)


def pconv_pw_packed(x, packed, c_partial: int, c_out: int, act: str, fast: bool = False) -> Tensor:
    shapes = [(c_partial, c_partial, 3, 3), (c_out, x.shape[1], 1, 1)]
    partial, pw = sections(shapes, packed.dtype)
    return pconv_pw_prepared(
        x, _rows(packed, partial, x), _rows(packed, pw, x), *vectors_of(packed, pw), act
    )


def block_packed(
    x, packed, c_partial: int, c_hidden: int, sample_scale, act: str, fast: bool = False
) -> Tensor:
    c = x.shape[1]
    shapes = [(c_partial, c_partial, 3, 3), (c_hidden, c, 1, 1), (c, c_hidden, 1, 1)]
    partial, pw1, pw2 = sections(shapes, packed.dtype)
    taps, w1, w2 = (_rows(packed, section, x) for section in (partial, pw1, pw2))
    layer_scale, _ = vectors_of(packed, pw2)
    scale, shift = vectors_of(packed, pw1)
    return block_prepared(x, taps, w1, w2, scale, shift, layer_scale, sample_scale, act)


def patch_conv_packed(
    x, packed, c_out: int, kh: int, kw: int, channels_last: bool = False
) -> Tensor:
    (section,) = sections([(c_out, x.shape[1], kh, kw)], packed.dtype)
    rows = _rows(packed, section, x)
    return patch_conv_prepared(x, rows, *vectors_of(packed, section), kh, kw, channels_last)


def head_packed(x, packed, c_mid: int, c_out: int, act: str) -> Tensor:
    conv, fc = sections([(c_mid, x.shape[1], 1, 1), (c_out, c_mid, 1, 1)], packed.dtype)
    w_conv, w_fc = _rows(packed, conv, x), _rows(packed, fc, x)
    return head_prepared(x, w_conv, vectors_of(packed, conv), w_fc, vectors_of(packed, fc), act)


def network(x: Tensor, packs: list[Tensor], plan: list[int], fast: bool = False) -> list[Tensor]:
    # One launch after the other: a CUDA graph around it is what saves the time between them.
    outputs = []
    remaining = iter(packs)
    for i in range(0, len(plan), 5):
        kind, a, b, c, act = plan[i : i + 5]
        if kind == PATCH_CONV:
            x = patch_conv_packed(x, next(remaining), a, b, c, channels_last=True)
        elif kind == BLOCK:
            x = block_packed(x, next(remaining), a, b, None, ACTS[act])
        elif kind == HEAD:
            outputs.append(head_packed(x, next(remaining), a, b, ACTS[act]))
        elif kind == EMIT:
            outputs.append(x.clone(memory_format=torch.channels_last))
    return outputs


KERNELS = {
    "pack": pack,
    "pconv_pw_packed": pconv_pw_packed,
    "block_packed": block_packed,
    "patch_conv_packed": patch_conv_packed,
    "head_packed": head_packed,
    "network": network,
}
