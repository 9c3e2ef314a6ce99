"""Patch convolutions (stem and merging layers: the stride is the kernel) and the head.

    y[b, i, j, n] = (sum over k = (c, p, q) of  x[b, c, i*kh + p, j*kw + q] * w[n, k]) * scale[n]
                    + shift[n]

A product of M = B * (H // kh) * (W // kw) patches by N outputs with K = C * kh * kw. Each pixel is
in one patch, so nothing is read twice but by the programs of other tiles of N. Bytes: x once, y
once, the weights; FLOPs: 2 * M * N * K. The merging layers' x is channels_last, and a patch is kh
runs of kw * C elements. The stem's has 3 channels and comes in any layout: its patches are gathered
element by element where they are, without a copy in another layout; in NCHW kw elements are a run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import dense
from .block import epilogue, gemm, matrix, weight_tile
from .common import (
    cdiv,
    check_reach,
    config,
    device,
    dot_precision,
    empty_of_size,
    in_format_of,
    launch,
    power_of_2,
)
from .layout import channels_inside


@triton.jit
def patch_place(first, rows, OH, OW):
    """(image, in 64 bits, row, column) of the outputs first + rows."""
    q = (first % (OH * OW)).to(tl.int32) + rows
    return first // (OH * OW) + q // (OH * OW), q // OW % OH, q % OW


@triton.jit
def patch_product(
    x,
    w,
    first,
    rows,
    inside,
    n,
    OH,
    OW,
    X_IMAGE,
    X_CHANNEL,
    X_ROW,
    N: tl.constexpr,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    X_COLUMN: tl.constexpr,
    W_STEP: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The patches first + rows times the weights of the outputs ``n``, in float32. GATHER: rows of
    w are (C, KH, KW), else (KH, KW, C) and the channels of x are side by side."""
    dtype = w.dtype.element_ty
    x_row = tl.cast(X_ROW, tl.int64)
    image, row, column = patch_place(first, rows, OH, OW)
    patch = image * X_IMAGE + row * (KH * x_row) + column.to(tl.int64) * (KW * X_COLUMN)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if GATHER:
        for k0 in range(0, C * KH * KW, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            offset = (k // (KH * KW)).to(tl.int64) * X_CHANNEL + k // KW % KH * x_row
            offset += k % KW * X_COLUMN
            mask = inside[:, None] & (k < C * KH * KW)[None, :]
            v = tl.load(x + patch[:, None] + offset[None, :], mask=mask, other=0.0)
            tile = weight_tile(w, n, k, N, C * KH * KW, W_STEP)
            acc = tl.dot(v.to(dtype), tile, acc, input_precision=PRECISION)
    else:
        for p in tl.static_range(KH):
            for k0 in range(0, KW * C, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                mask = inside[:, None] & (k < KW * C)[None, :]
                v = tl.load(x + p * x_row + patch[:, None] + k[None, :], mask=mask, other=0.0)
                tile = weight_tile(w + p * KW * C, n, k, N, KW * C, W_STEP)
                acc = tl.dot(v.to(dtype), tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def patch_kernel(
    x,
    w,
    scale,
    shift,
    y,
    M,
    OH,
    OW,
    X_IMAGE,
    X_CHANNEL,
    X_ROW,
    N: tl.constexpr,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    X_COLUMN: tl.constexpr,
    W_STEP: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (tiles of patches * tiles of N,), those of N first."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = (tl.program_id(0) // TILES_N).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    inside = rows < M - first
    n = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = patch_product(
        x, w, first, rows, inside, n, OH, OW, X_IMAGE, X_CHANNEL, X_ROW, N, C, KH, KW, X_COLUMN,
        W_STEP, GATHER, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    y += first * N
    acc = epilogue(acc, scale, shift, n, N, "identity")
    mask = inside[:, None] & (n < N)[None, :]
    tl.store(y + rows[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=mask)


def patch_rows(weight: Tensor) -> Tensor:
    """A weight as rows in the order of :func:`channels_inside`."""
    return matrix(weight.permute(0, 2, 3, 1) if channels_inside(weight.shape[1]) else weight)


def patch_arguments(x: Tensor, rows: Tensor, kh: int, kw: int) -> dict:
    """The arguments of :func:`patch_product` but for the tile's, and ``M``.

    Args:
        rows: of :func:`patch_rows`, or such rows with a padding.
    """
    batch, channels, height, width = x.shape
    check_reach(x)
    gather = not channels_inside(channels)
    source = x if gather else dense(x, torch.channels_last)
    return {
        "x": source,
        "w": rows,
        "M": batch * (height // kh) * (width // kw),
        "OH": height // kh,
        "OW": width // kw,
        "X_IMAGE": source.stride(0),
        "X_CHANNEL": source.stride(1),
        "X_ROW": source.stride(2),
        "N": rows.shape[0],
        "C": channels,
        "KH": kh,
        "KW": kw,
        "X_COLUMN": source.stride(3),
        "W_STEP": rows.shape[1],
        "GATHER": gather,
        "PRECISION": dot_precision(rows.dtype),
    }


def patch_depth(channels: int, kh: int, kw: int) -> int:
    """How many of K the loop of :func:`patch_product` goes over."""
    return kw * channels * (1 if channels_inside(channels) else kh)


def patch_conv_prepared(
    x: Tensor,
    rows: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    kh: int,
    kw: int,
    channels_last: bool,
) -> Tensor:
    """The patch convolution with a weight as rows in the order of :func:`channels_inside`."""
    arguments = patch_arguments(x, rows, kh, kw)
    m, c_out = arguments["M"], arguments["N"]
    y = empty_of_size(x, (c_out, arguments["OH"], arguments["OW"]), rows.dtype)
    cfg = config("patch_conv", (c_out, m), rows.dtype, device(x))
    block_n = min(cfg["BLOCK_N"], power_of_2(c_out))
    launch(
        patch_kernel,
        (cdiv(m, cfg["BLOCK_M"]) * cdiv(c_out, block_n),),
        **arguments,
        scale=scale,
        shift=shift,
        y=y,
        BLOCK_M=cfg["BLOCK_M"],
        BLOCK_N=block_n,
        BLOCK_K=min(cfg["BLOCK_K"], power_of_2(patch_depth(x.shape[1], kh, kw))),
        num_warps=cfg["num_warps"],
        num_stages=cfg["num_stages"],
    )
    return y if channels_last else in_format_of(y, x)


def patch_conv(x, weight, scale, shift, channels_last: bool = False) -> Tensor:
    kh, kw = weight.shape[2:]
    return patch_conv_prepared(x, patch_rows(weight), scale, shift, kh, kw, channels_last)


def head_prepared(x, w_conv, conv_vectors, w_fc, fc_vectors, act: str) -> Tensor:
    """The head: two products of B rows, with vectors (scale or None, shift or None). The mean over
    the pixels is PyTorch's: one read of x, to which fusion would add nothing."""
    batch, channels = x.shape[:2]
    pooled = x.to(w_conv.dtype).mean((2, 3))
    a = pooled.new_empty((batch, w_conv.shape[0]))
    scale, shift = conv_vectors
    gemm(a, pooled, channels, w_conv, channels, scale=scale, shift=shift, act=act)
    y = pooled.new_empty((batch, w_fc.shape[0]))
    scale, shift = fc_vectors
    gemm(y, a, a.shape[1], w_fc, a.shape[1], scale=scale, shift=shift)
    return y


def head(x, w_conv, b_conv, w_fc, b_fc, act: str) -> Tensor:
    return head_prepared(x, matrix(w_conv), (None, b_conv), matrix(w_fc), (None, b_fc), act)


KERNELS = {"patch_conv": patch_conv, "head": head}
