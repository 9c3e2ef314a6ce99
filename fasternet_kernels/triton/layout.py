"""The pack of a layer's weights on CUDA: one flat tensor of the weights' own dtype.

For each weight: its scale and its shift as float32 (1 and 0 where there are none), then its rows,
each padded with zeros to 16 bytes. A 1x1 or linear weight has a row of C_in for each output. A 3x3
that comes first among several is PConv's, which has neither scale nor shift of its own: 9 * C_out
rows, kernel position first. A patch convolution has rows in the order of :func:`channels_inside`.
Scales stay beside the weights, which so keep their bits. Every section begins at 16 bytes.

No triton in this file: the fake of ``pack`` needs the size.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Section:
    """Where in a pack a weight is, in elements."""

    rows: int
    columns: int  # of a row, without padding
    step: int  # from row to row
    outputs: int
    begin: int  # of scale and shift
    weight: int  # of the rows
    end: int
    partial: bool  # PConv's 3x3


def vector(dtype: torch.dtype) -> int:
    """Elements in 16 bytes, the widest load."""
    return 16 // dtype.itemsize


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def channels_inside(c_in: int) -> bool:
    """Whether a patch convolution's row is (kh, kw, C_in), for channels_last images; of few
    channels, as images have, it is (C_in, kh, kw)."""
    return c_in >= 16


def sections(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Section]:
    """The sections of a pack of weights of shapes (N, C, kh, kw) or (N, C)."""
    found = []
    end = 0
    for i, shape in enumerate(shapes):
        partial = i == 0 and len(shapes) > 1 and tuple(shape[2:]) == (3, 3)
        n = shape[0]
        rows, columns = (9 * n, shape[1]) if partial else (n, math.prod(shape[1:]))
        begin = end
        step = round_up(columns, vector(dtype))
        vectors = round_up(n, 4) * 4 // dtype.itemsize  # of float32, in elements of the pack
        weight = begin + 2 * vectors
        end = weight + rows * step
        found.append(Section(rows, columns, step, n, begin, weight, end, partial))
    return found


def size(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> int:
    """Elements of a pack."""
    return sections(shapes, dtype)[-1].end


def vectors_of(pack: Tensor, section: Section) -> tuple[Tensor, Tensor]:
    """(scale, shift) in the pack, as views in float32."""
    both = pack[section.begin : section.weight].view(torch.float32).view(2, -1)
    return both[0, : section.outputs], both[1, : section.outputs]


def rows_of(pack: Tensor, section: Section) -> Tensor:
    """The weight in the pack, as a view (rows, step)."""
    return pack[section.weight : section.end].view(section.rows, section.step)
