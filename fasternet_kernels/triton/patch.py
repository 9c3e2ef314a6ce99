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
    in_format_of,
    launch,
    power_of_2,
)
from .layout import channels_inside


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
    """GATHER: rows of w are (C, KH, KW), else (KH, KW, C) and the channels of x are side by side.
    Grid: (tiles of patches * tiles of N,), those of N first."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = (tl.program_id(0) // TILES_N).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    inside = rows < M - first
    n = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = w.dtype.element_ty
    q = (first % (OH * OW)).to(tl.int32) + rows
    image = first // (OH * OW) + q // (OH * OW)
    patch = image * X_IMAGE + (q // OW % OH).to(tl.int64) * (KH * X_ROW)
    patch += (q % OW).to(tl.int64) * (KW * X_COLUMN)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if GATHER:
        for k0 in range(0, C * KH * KW, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            offset = (k // (KH * KW)).to(tl.int64) * X_CHANNEL + k // KW % KH * X_ROW
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
                v = tl.load(x + p * X_ROW + patch[:, None] + k[None, :], mask=mask, other=0.0)
                tile = weight_tile(w + p * KW * C, n, k, N, KW * C, W_STEP)
                acc = tl.dot(v.to(dtype), tile, acc, input_precision=PRECISION)
    y += first * N
    acc = epilogue(acc, scale, shift, n, N, "identity")
    mask = inside[:, None] & (n < N)[None, :]
    tl.store(y + rows[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=mask)


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
    batch, channels, height, width = x.shape
    c_out, out_height, out_width = rows.shape[0], height // kh, width // kw
    check_reach(x)
    gather = not channels_inside(channels)
    source = x if gather else dense(x, torch.channels_last)
    shape = (batch, c_out, out_height, out_width)
    y = torch.empty(shape, dtype=rows.dtype, device=x.device, memory_format=torch.channels_last)
    m = batch * out_height * out_width
    cfg = config("patch_conv", (c_out, m), rows.dtype, device(x))
    block_n = min(cfg["BLOCK_N"], power_of_2(c_out))
    launch(
        patch_kernel,
        (cdiv(m, cfg["BLOCK_M"]) * cdiv(c_out, block_n),),
        x=source,
        w=rows,
        scale=scale,
        shift=shift,
        y=y,
        M=m,
        OH=out_height,
        OW=out_width,
        X_IMAGE=source.stride(0),
        X_CHANNEL=source.stride(1),
        X_ROW=source.stride(2),
        N=c_out,
        C=channels,
        KH=kh,
        KW=kw,
        X_COLUMN=source.stride(3),
        W_STEP=rows.shape[1],
        GATHER=gather,
        BLOCK_M=cfg["BLOCK_M"],
        BLOCK_N=block_n,
        BLOCK_K=min(cfg["BLOCK_K"], power_of_2(kw * channels * (kh if gather else 1))),
        PRECISION=dot_precision(rows.dtype),
        num_warps=cfg["num_warps"],
        num_stages=cfg["num_stages"],
    )
    return y if channels_last else in_format_of(y, x)


def patch_conv(x, weight, scale, shift, channels_last: bool = False) -> Tensor:
    kh, kw = weight.shape[2:]
    ordered = weight.permute(0, 2, 3, 1) if channels_inside(weight.shape[1]) else weight
    return patch_conv_prepared(x, matrix(ordered), scale, shift, kh, kw, channels_last)


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
