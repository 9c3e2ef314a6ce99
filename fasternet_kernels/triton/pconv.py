"""Partial convolution: a 3x3 convolution of the first C_partial channels (stride 1, zero padding 1,
no bias), the others passed through; out of place and in place.

    u[m, n] = sum over taps t, channels k < C_partial of  x[m + offset(t), k] * w[t, n, k]

A program computes BLOCK_M pixels by BLOCK_N channels: for each tap a product of the shifted pixels
with that tap's weights, pixels outside the image masked to zero. The taps are unrolled: Triton has
miscompiled a flattened tap loop at 8 warps (pytorch/pytorch#173068). Channels beyond C_partial are
masked in registers, not in the load, so that loads stay 16 bytes wide for any C_partial.

Bytes: the C_partial channels are read once from memory (8 of 9 taps hit the caches) and written
once; out of place the other channels are copied as well. FLOPs: 18 * C_partial^2 per pixel.

In place, without a race. Programs share halos: the output of a pixel overwrites what a neighbour
reads. So two launches:

1. ``copy_borders`` writes the pixels at the inner borders of all tiles (first and last row of each,
   first and last column where tiles do not span the width) to a scratch tensor. It reads x only.
2. ``in_place_kernel``: each program owns a tile of TILE_H x TILE_W pixels. A tap reads its pixel
   from x if the tile has it, else from the scratch: a pixel outside the tile that one of its taps
   reaches is next to it, so it lies on the border of its own tile, and all borders were copied. The
   pixels of a tile are thus read and written by one program only, and the scratch is written by
   none. Within the program a barrier after the last load stands before the first store, so no warp
   overwrites what another has yet to read. The launches are ordered by the stream.

The scratch is 2 of TILE_H rows, and 2 of TILE_W columns of images wider than a tile: no clone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import cuda
from .common import (
    cdiv,
    check_weight,
    config,
    device,
    dot_precision,
    empty_image,
    in_format_of,
    launch,
    piece_columns,
    pieces,
    pixel_step,
    pixels,
    power_of_2,
    round_up,
    vector,
    zero_pieces,
)


def taps_of(weight: Tensor) -> Tensor:
    """An OIHW weight as (9, O, I), kernel position first, I padded with zeros to 16 bytes."""
    check_weight(weight)
    c_out, c_in = weight.shape[:2]
    padded = round_up(c_in, vector(weight.dtype))
    taps = weight.permute(2, 3, 0, 1).reshape(9, c_out, c_in)
    if padded == c_in:
        return taps.contiguous()
    out = weight.new_zeros(9, c_out, padded)
    out[:, :, :c_in] = taps
    return out


# ---- Device functions ----------------------------------------------------------------------------


@triton.jit
def tap_weights(taps, t, n, k, CP: tl.constexpr, TAP_STEP: tl.constexpr):
    """The (k, n) weights of the tap ``t``. Rows are zeros from CP to TAP_STEP."""
    w = tl.load(
        taps + t * CP * TAP_STEP + n[:, None] * TAP_STEP + k[None, :],
        mask=(n < CP)[:, None] & (k < TAP_STEP)[None, :],
        other=0.0,
    )
    return tl.trans(w)


@triton.jit
def partial_columns(v, k, CP: tl.constexpr, VECTOR: tl.constexpr):
    """``v`` with zeros from column CP on. A load by columns has done that where CP is whole
    vectors."""
    if CP % VECTOR != 0:
        v = tl.where((k < CP)[None, :], v, 0.0)
    return v


@triton.jit
def partial_limit(C: tl.constexpr, CP: tl.constexpr, VECTOR: tl.constexpr):
    """How many columns of x are loaded for CP: whole vectors if x has them."""
    return min(C, (CP + VECTOR - 1) // VECTOR * VECTOR)


@triton.jit
def convolve(
    x,
    taps,
    rows,
    inside,
    row,
    column,
    n,
    H,
    W,
    C: tl.constexpr,
    CP: tl.constexpr,
    STEP: tl.constexpr,
    TAP_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The convolution of BLOCK_M pixels, channels ``n``, in float32. ``x`` points at the program's
    first pixel, ``rows`` are its pixels, which are at (row, column) of an image."""
    LIMIT: tl.constexpr = partial_limit(C, CP, VECTOR)
    dtype = taps.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for t in tl.static_range(9):
        dy = t // 3 - 1
        dx = t % 3 - 1
        valid = inside & (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
        source = x + (dy * W + dx) * STEP + rows[:, None] * STEP
        for k0 in range(0, CP, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            mask = valid[:, None] & (k < LIMIT)[None, :]
            v = tl.load(source + k[None, :], mask=mask, other=0.0).to(dtype)
            v = partial_columns(v, k, CP, VECTOR)
            w = tap_weights(taps, t, n, k, CP, TAP_STEP)
            acc = tl.dot(v, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def place(first, rows, H, W):
    """(row, column) in their images of the pixels first + rows."""
    p = (first % (H * W)).to(tl.int32) + rows
    return (p // W) % H, p % W


# ---- Out of place --------------------------------------------------------------------------------


@triton.jit
def pconv_kernel(
    x,
    taps,
    u,
    M,
    H,
    W,
    C: tl.constexpr,
    CP: tl.constexpr,
    STEP: tl.constexpr,
    TAP_STEP: tl.constexpr,
    U_STEP: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes STORED channels of u: C of them, or what a following product reads of u rather than
    of x. Grid: (tiles of pixels, tiles of C_partial, and one program more to copy where there is
    something left to copy)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    inside = rows < M - first
    x += first * STEP
    u += first * U_STEP
    CONVOLVED: tl.constexpr = (CP + BLOCK_N - 1) // BLOCK_N
    if tl.program_id(1) < CONVOLVED:
        row, column = place(first, rows, H, W)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = convolve(
            x, taps, rows, inside, row, column, n, H, W, C, CP, STEP, TAP_STEP,
            BLOCK_M, BLOCK_N, BLOCK_K, VECTOR, PRECISION,
        )  # fmt: skip
        mask = inside[:, None] & (n < STORED)[None, :]
        result = acc.to(taps.dtype.element_ty).to(u.dtype.element_ty)
        if CP % BLOCK_N != 0 and STORED > CP:  # the last tile has untouched channels
            own = tl.load(x + rows[:, None] * STEP + n[None, :], mask=mask, other=0.0)
            result = tl.where((n < CP)[None, :], result, own.to(u.dtype.element_ty))
        tl.store(u + rows[:, None] * U_STEP + n[None, :], result, mask=mask)
    else:
        for k0 in range(CONVOLVED * BLOCK_N, STORED, 64):
            k = k0 + tl.arange(0, 64)
            mask = inside[:, None] & (k < STORED)[None, :]
            own = tl.load(x + rows[:, None] * STEP + k[None, :], mask=mask)
            tl.store(u + rows[:, None] * U_STEP + k[None, :], own.to(u.dtype.element_ty), mask=mask)


def convolve_into(u: Tensor, x: Tensor, step: int, taps: Tensor) -> None:
    """Writes the first channels of PConv's output, as many as the channels_last image ``u`` has.

    Args:
        u: (B, stored, H, W), dense, C_partial <= stored <= C.
        x: (B, C, H, W) with pixels ``step`` apart.
        taps: of :func:`taps_of`.
    """
    batch, channels, height, width = x.shape
    c_partial, stored = taps.shape[1], u.shape[1]
    m = batch * height * width
    cfg = config("pconv", (c_partial, m), taps.dtype, device(x))
    block_n = min(power_of_2(c_partial), cfg["BLOCK_N"])
    convolved = cdiv(c_partial, block_n)
    launch(
        pconv_kernel,
        (cdiv(m, cfg["BLOCK_M"]), convolved + (stored > convolved * block_n)),
        x=x,
        taps=taps,
        u=u,
        M=m,
        H=height,
        W=width,
        C=channels,
        CP=c_partial,
        STEP=step,
        TAP_STEP=taps.shape[2],
        U_STEP=stored,
        STORED=stored,
        BLOCK_M=cfg["BLOCK_M"],
        BLOCK_N=block_n,
        BLOCK_K=min(power_of_2(c_partial), cfg["BLOCK_K"]),
        VECTOR=vector(x.dtype),
        PRECISION=dot_precision(taps.dtype),
        num_warps=cfg["num_warps"],
        num_stages=cfg["num_stages"],
    )


def _pconv(x: Tensor, weight: Tensor) -> Tensor:
    pixel_x, step = pixels(x)
    u = empty_image(x, x.shape[1], x.dtype)
    convolve_into(u, pixel_x, step, taps_of(weight))
    return in_format_of(u, x)


def pconv3x3(x: Tensor, weight: Tensor, fast: bool = False) -> Tensor:
    return _pconv(x, weight)


# ---- In place ------------------------------------------------------------------------------------
# The scratch of one image is pixels: rows first (tile of rows, first or last row, column); then, if
# tiles do not span the width, columns (tile of columns, first or last column, row).


@triton.jit
def copy_borders(
    x,
    scratch,
    H,
    W,
    ROWS,
    PIXELS,
    TILES,
    CP: tl.constexpr,
    STEP: tl.constexpr,
    SCRATCH_STEP: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Copies the border pixels of all tiles; the first ROWS of the scratch's PIXELS are in rows.
    Grid: (images * TILES of the scratch's pixels,)."""
    image = (tl.program_id(0) // TILES).to(tl.int64)
    p = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    line = p // W
    row = tl.minimum((line // 2) * TILE_H + (line % 2) * (TILE_H - 1), H - 1)
    column = p % W
    q = p - ROWS
    line = q // H
    row = tl.where(q < 0, row, q % H)
    line_column = tl.minimum((line // 2) * TILE_W + (line % 2) * (TILE_W - 1), W - 1)
    column = tl.where(q < 0, column, line_column)
    source = (row.to(tl.int64) * W + column) * STEP
    x += image * H * W * STEP
    scratch += image * PIXELS * SCRATCH_STEP
    for k0 in range(0, CP, BLOCK_C):
        k = k0 + tl.arange(0, BLOCK_C)
        mask = (p < PIXELS)[:, None] & (k < CP)[None, :]
        v = tl.load(x + source[:, None] + k[None, :], mask=mask)
        tl.store(scratch + p[:, None] * SCRATCH_STEP + k[None, :], v, mask=mask)


@triton.jit
def in_place_kernel(
    x,
    scratch,
    taps,
    H,
    W,
    ROWS,
    PIXELS,
    TILES_H,
    TILES_W,
    C: tl.constexpr,
    CP: tl.constexpr,
    STEP: tl.constexpr,
    SCRATCH_STEP: tl.constexpr,
    TAP_STEP: tl.constexpr,
    WIDTHS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    SPANS_WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Overwrites one tile; see the top of the file. Grid: (images * TILES_H * TILES_W,)."""
    LIMIT: tl.constexpr = partial_limit(C, CP, VECTOR)
    BLOCK_M: tl.constexpr = TILE_H * TILE_W
    dtype = taps.dtype.element_ty
    tile_column = tl.program_id(0) % TILES_W
    tile_row = tl.program_id(0) // TILES_W % TILES_H
    image = (tl.program_id(0) // TILES_W // TILES_H).to(tl.int64)
    p = tl.arange(0, BLOCK_M)
    r, c = p // TILE_W, p % TILE_W
    row, column = tile_row * TILE_H + r, tile_column * TILE_W + c
    x += ((image * H + tile_row * TILE_H) * W + tile_column * TILE_W) * STEP
    scratch += image * PIXELS * SCRATCH_STEP
    own = (r * W + c) * STEP

    acc = zero_pieces(BLOCK_M, WIDTHS)
    for t in tl.static_range(9):
        dy = t // 3 - 1
        dx = t % 3 - 1
        valid = (row < H) & (row + dy >= 0) & (row + dy < H)
        valid = valid & (column < W) & (column + dx >= 0) & (column + dx < W)
        rows_in_tile = (r + dy >= 0) & (r + dy < TILE_H)
        in_tile = rows_in_tile & (c + dx >= 0) & (c + dx < TILE_W)
        from_x = valid & in_tile
        from_scratch = valid & (in_tile == 0)
        source = x + (dy * W + dx) * STEP + own[:, None]
        # The last row of the tile above is line 2 * tile_row - 1 of the scratch, the first row of
        # the tile below 2 * tile_row + 2; columns likewise.
        border = (2 * tile_row + tl.where(r + dy < 0, -1, 2)) * W + column + dx
        if not SPANS_WIDTH:
            line = 2 * tile_column + tl.where(c + dx < 0, -1, 2)
            border = tl.where(rows_in_tile, ROWS + line * H + row + dy, border)
        border_source = scratch + border[:, None] * SCRATCH_STEP
        for k0 in range(0, CP, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            mask = from_x[:, None] & (k < LIMIT)[None, :]
            v = tl.load(source + k[None, :], mask=mask, other=0.0)
            # The tap in the middle stays in the tile, and so do those beside it in a wide tile.
            if t != 4 and not (SPANS_WIDTH and t // 3 == 1):
                mask = from_scratch[:, None] & (k < SCRATCH_STEP)[None, :]
                other = tl.load(border_source + k[None, :], mask=mask, other=0.0)
                v = tl.where(from_scratch[:, None], other, v)
            v = partial_columns(v.to(dtype), k, CP, VECTOR)
            new = ()
            for i in tl.static_range(len(WIDTHS)):
                w = tap_weights(taps, t, piece_columns(WIDTHS, i), k, CP, TAP_STEP)
                new = new + (tl.dot(v, w, acc[i], input_precision=PRECISION),)
            acc = new

    tl.debug_barrier()  # all warps have read
    own_mask = (row < H) & (column < W)
    for i in tl.static_range(len(WIDTHS)):
        n = piece_columns(WIDTHS, i)
        tl.store(
            x + own[:, None] + n[None, :],
            acc[i].to(dtype).to(x.dtype.element_ty),
            mask=own_mask[:, None] & (n < CP)[None, :],
        )


def _tile(width: int, block_m: int) -> tuple[int, int]:
    """(TILE_H, TILE_W): as wide as the image if that wastes little, at least 16 of a wide one."""
    if width <= 8:
        columns = power_of_2(width, least=1)
    else:
        columns = min((64, 32, 16), key=lambda c: (cdiv(width, c) * c, -c))
    columns = min(columns, block_m)
    return block_m // columns, columns


def pconv3x3_(x: Tensor, weight: Tensor) -> None:
    batch, channels, height, width = x.shape
    c_partial = weight.shape[0]
    step = pixel_step(x)
    cfg = config("pconv_in_place", (c_partial, batch * height * width), weight.dtype, device(x))
    if cfg.get("cuda") and x.is_cuda and cuda.pconv3x3_(x, weight):
        return  # measured to be the faster one for this shape
    tile_h, tile_w = _tile(width, cfg["BLOCK_M"])
    tiles_h, tiles_w = cdiv(height, tile_h), cdiv(width, tile_w)
    rows = 2 * tiles_h * width
    scratch_pixels = rows + (2 * tiles_w * height if tiles_w > 1 else 0)
    scratch_step = round_up(c_partial, vector(x.dtype))
    too_wide = c_partial > cfg["most_channels"]  # for a program to hold all of a tile's results
    too_large = max(scratch_pixels * scratch_step, tile_h * width * (step or 0)) >= 2**31
    if step is None or too_wide or too_large:
        # Other layouts, and what exceeds a tile: the convolved channels are made beside, copied in.
        partial = x[:, :c_partial]
        partial.copy_(_pconv(partial, weight))
        return
    scratch = torch.empty((batch, scratch_pixels, scratch_step), dtype=x.dtype, device=x.device)
    shared = {
        "x": x,
        "scratch": scratch,
        "H": height,
        "W": width,
        "ROWS": rows,
        "PIXELS": scratch_pixels,
        "CP": c_partial,
        "STEP": step,
        "SCRATCH_STEP": scratch_step,
        "TILE_H": tile_h,
        "TILE_W": tile_w,
    }
    taps = taps_of(weight)
    if tiles_h > 1 or tiles_w > 1:
        tiles = cdiv(scratch_pixels, 64)
        launch(
            copy_borders,
            (batch * tiles,),
            **shared,
            TILES=tiles,
            BLOCK=64,
            BLOCK_C=min(power_of_2(c_partial), 64),
            num_warps=4,
            num_stages=1,
        )
    launch(
        in_place_kernel,
        (batch * tiles_h * tiles_w,),
        **shared,
        TILES_H=tiles_h,
        TILES_W=tiles_w,
        taps=taps,
        C=channels,
        TAP_STEP=taps.shape[2],
        WIDTHS=pieces(c_partial),
        SPANS_WIDTH=tiles_w == 1,
        BLOCK_K=min(power_of_2(c_partial), cfg["BLOCK_K"]),
        VECTOR=vector(x.dtype),
        PRECISION=dot_precision(weight.dtype),
        num_warps=cfg["num_warps"],
        num_stages=cfg["num_stages"],
    )


KERNELS = {
    "pconv3x3": pconv3x3,
    "pconv3x3_": pconv3x3_,
}
