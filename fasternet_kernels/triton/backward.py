"""Backward passes of the convolutions and of layers with batch statistics.

Notation of :mod:`fasternet_kernels.ops`; M = B * H * W pixels, u = pconv3x3(x). With
t = (z - mean) * scale + shift and a = act(t):

    da       = (grad * layer_scale) w_pw2 * sample_scale       of bn_act: grad itself
    dt       = da * act'(t)
    dz       = dt * scale;  dshift = sum dt;  dscale = sum dt * (z - mean);  dmean = -scale * dshift
    total    = dz + dmean / M + (z - mean) * 2 dm2             what reaches z with its statistics
    du       = total w_pw
    dx       = dy + the transposed 3x3 convolution of du's first C_partial channels | du's others
    dw_pw    = total' u;  dw_partial = du_partial' x shifted by each tap
    dw_pw2   = layer_scale * (grad * sample_scale)' a

Four kernels do most of it. ``dz_kernel`` makes da by tensor cores, and dt, dz and the sums over
pixels in its epilogue, so neither da nor a is ever in memory. ``du_kernel`` makes total on the way
to the tensor cores and adds dy at the end. ``weight_gradient_kernel`` is g' a over pixels, where a
may be an activation of z, two segments (u and x), shifted pixels or patches, made as it is loaded.
``pconv_dx_kernel`` is the transposed convolution, with the taps turned round. In wide layers
``total_kernel`` writes total once, where it would be made again for every block of columns. Stem
and merging layers have dx by ``patch_dx_kernel``, which makes total likewise.

dlayer_scale[c] is the sum of w_pw2[c, :] times the unscaled dw_pw2[c, :], since both are the sum
over pixels and hidden channels of grad a w: the projection itself is not needed. A patch
convolution's dscale is found in the same way.

Bytes of a block per pixel and element, C_hidden = 2 C: dz_kernel reads 3C and writes 2C, the two
weight gradients read 3C and 5C, du_kernel reads 5C and writes C, PConv's parts move C; 20C against
about 40C of separate passes. FLOP: 16 C^2 and PConv's.

Sums over pixels. Each program adds up its own pixels in order and writes one partial sum, and a
second kernel adds those, in order: nothing is atomic, so the bits are the same on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .block import matrix, sample_of
from .common import (
    activation,
    cdiv,
    check_reach,
    check_weight,
    config,
    device,
    dot_precision,
    empty_image,
    in_format_of,
    launch,
    pixels,
    power_of_2,
    round_up,
    vector,
)
from .patch import patch_place
from .pconv import convolve, place, taps_of
from .training import (
    block,
    convolved_head,
    load_vectors,
    normalise,
    patch_convolved,
    pconv_pointwise,
    persistent,
    project,
    rows_of,
    tile_of,
    tile_range,
    tiles,
    vectors,
)

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
# From this many channels on, `total` goes to memory once instead of being made again for every
# block of outputs.
WIDE = 256


# ---- Kernels -------------------------------------------------------------------------------------


@triton.jit
def act_gradient(da, t, ACT: tl.constexpr):
    """da times the derivative of the activation at t, at its kinks as PyTorch has it."""
    if ACT == "relu":
        da = tl.where(t <= 0.0, 0.0, da)
    elif ACT == "gelu":
        below = 0.5 * (1.0 + tl.erf(t * 0.7071067811865476))
        da = da * (below + t * 0.3989422804014327 * tl.exp(-0.5 * t * t))
    elif ACT == "gelu_tanh":
        # below = (1 + tanh(s / 2)) / 2 with s / 2 = sqrt(2 / pi) * (t + 0.044715 t^3)
        s = 1.5957691216057308 * (t + 0.044715 * t * t * t)
        below, above = 1.0 / (1.0 + tl.exp(-s)), 1.0 / (1.0 + tl.exp(s))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * t * t)
        da = da * (below + t * below * above * slope)
    elif ACT == "silu":
        below, above = 1.0 / (1.0 + tl.exp(-t)), 1.0 / (1.0 + tl.exp(t))
        da = da * (below + t * below * above)
    elif ACT == "hardswish":
        inner = tl.where(t >= 3.0, da, da * (t * (1.0 / 3.0) + 0.5))
        da = tl.where(t <= -3.0, 0.0, inner)
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
    return da


@triton.jit
def dz_kernel(
    grad_ptr,
    w_ptr,
    layer_ptr,
    sample_ptr,
    z_ptr,
    mean_ptr,
    scale_ptr,
    shift_ptr,
    dz_ptr,
    partial_ptr,
    rows,
    image_pixels,
    tiles_per_program,
    GRAD_STEP: tl.constexpr,
    Z_STEP: tl.constexpr,
    C: tl.constexpr,
    C_HIDDEN: tl.constexpr,
    ACT: tl.constexpr,
    PROJECT: tl.constexpr,
    HAS_LAYER: tl.constexpr,
    HAS_SAMPLE: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dz, and sums over pixels of dt and dt * (z - mean), of tiles_per_program tiles of pixels and
    one block of hidden channels. Without PROJECT the gradient is that of the activation."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    local = tl.arange(0, BLOCK_M)
    mean, scale, shift = load_vectors(mean_ptr, scale_ptr, shift_ptr, n, C_HIDDEN)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    first, end = tile_range(tl.program_id(1), rows, tiles_per_program, BLOCK_M)
    for tile in range(first, end):
        start = tl.cast(tile, tl.int64) * BLOCK_M
        valid = local < rows - start
        keep = valid[:, None] & (n < C_HIDDEN)[None, :]
        grad_tile = grad_ptr + start * GRAD_STEP
        if PROJECT:
            da = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k0 in range(0, C, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                g = tl.load(
                    grad_tile + local[:, None] * GRAD_STEP + k[None, :],
                    mask=valid[:, None] & (k < C)[None, :],
                    other=0.0,
                )
                if HAS_LAYER:
                    layer = tl.load(layer_ptr + k, mask=k < C, other=0.0).to(tl.float32)
                    g = g.to(tl.float32) * layer[None, :]
                w = tl.load(
                    w_ptr + k[:, None] * C_HIDDEN + n[None, :],
                    mask=(k < C)[:, None] & (n < C_HIDDEN)[None, :],
                    other=0.0,
                )
                da = tl.dot(g.to(w.dtype), w, da, input_precision=PRECISION)
        else:
            da = tl.load(
                grad_tile + local[:, None] * GRAD_STEP + n[None, :], mask=keep, other=0.0
            ).to(tl.float32)
        z_tile = z_ptr + start * Z_STEP
        z = tl.load(z_tile + local[:, None] * Z_STEP + n[None, :], mask=keep, other=0.0)
        centred, t = normalise(z, mean, scale, shift)
        if HAS_SAMPLE:
            image = sample_of(start, local, image_pixels)
            sample = tl.load(sample_ptr + image, mask=valid, other=0.0)
            da *= sample.to(tl.float32)[:, None]
        dt = act_gradient(da, t, ACT)
        if NEED_SUMS:
            dt = tl.where(keep, dt, 0.0)
            total += tl.sum(dt, 0)
            moment += tl.sum(tl.where(keep, dt * centred, 0.0), 0)
        if NEED_Z:
            dz = (dt * scale).to(dz_ptr.dtype.element_ty)
            dz_tile = dz_ptr + start * C_HIDDEN
            tl.store(dz_tile + local[:, None] * C_HIDDEN + n[None, :], dz, mask=keep)
    if NEED_SUMS:
        partial_ptr += tl.program_id(1) * 2 * C_HIDDEN + n
        tl.store(partial_ptr, total, mask=n < C_HIDDEN)
        tl.store(partial_ptr + C_HIDDEN, moment, mask=n < C_HIDDEN)


@triton.jit
def sum_kernel(
    partial_ptr,
    out_ptr,
    programs,
    N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum over the programs of rows of N partial sums."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for s0 in range(0, programs, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)[:, None]
        part = tl.load(
            partial_ptr + s * N + n[None, :],
            mask=(s < programs) & (n < N)[None, :],
            other=0.0,
        )
        total += tl.sum(part, 0)
    tl.store(out_ptr + n, total, mask=n < N)


@triton.jit
def add_statistics(dz, z, dmean_ptr, dm2_ptr, mean_ptr, rows, n, N: tl.constexpr):
    """total, from tiles of dz and z whose columns are the channels ``n``."""
    mean, dmean, dm2 = load_vectors(mean_ptr, dmean_ptr, dm2_ptr, n, N)
    return dz.to(tl.float32) + dmean * (1.0 / rows) + (z.to(tl.float32) - mean) * (2.0 * dm2)


@triton.jit
def load_total(
    g_ptr,
    z_ptr,
    dmean_ptr,
    dm2_ptr,
    mean_ptr,
    start,
    local,
    keep,
    rows,
    n,
    N: tl.constexpr,
    G_STEP: tl.constexpr,
    Z_STEP: tl.constexpr,
    STATS: tl.constexpr,
):
    """A tile of the gradient that begins at the row ``start``, total if STATS. What is not kept is
    anything then, but for zeros in columns beyond N."""
    g = tl.load(g_ptr + start * G_STEP + local[:, None] * G_STEP + n[None, :], mask=keep, other=0.0)
    if STATS:
        z = tl.load(
            z_ptr + start * Z_STEP + local[:, None] * Z_STEP + n[None, :], mask=keep, other=0.0
        )
        g = add_statistics(g, z, dmean_ptr, dm2_ptr, mean_ptr, rows, n, N)
    return g


@triton.jit
def store_dx(
    dx,
    dy_ptr,
    dx_ptr,
    start,
    local,
    valid,
    n,
    N: tl.constexpr,
    DY_STEP: tl.constexpr,
    DX_STEP: tl.constexpr,
    HAS_DY: tl.constexpr,
):
    """Stores a tile of dx, plus dy if there is one: rows from ``start`` on, channels ``n`` of N."""
    keep = valid & (n < N)[None, :]
    if HAS_DY:
        dy_ptr += start * DY_STEP
        dy = tl.load(dy_ptr + local[:, None] * DY_STEP + n[None, :], mask=keep, other=0.0)
        dx += dy.to(tl.float32)
    dx_ptr += start * DX_STEP
    dx = dx.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + local[:, None] * DX_STEP + n[None, :], dx, mask=keep)


@triton.jit
def pconv_dx_kernel(
    du_ptr,
    taps_ptr,
    dy_ptr,
    dx_ptr,
    rows,
    height,
    width,
    DU_STEP: tl.constexpr,
    DY_STEP: tl.constexpr,
    DX_STEP: tl.constexpr,
    TAP_STEP: tl.constexpr,
    C: tl.constexpr,
    C_PARTIAL: tl.constexpr,
    HAS_DY: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The first C_PARTIAL channels of dx: the convolution of du, C channels of which may be read,
    with the taps turned round, plus dy."""
    start, n = tile_of(C_PARTIAL, BLOCK_M, BLOCK_N)
    local = tl.arange(0, BLOCK_M)
    inside = local < rows - start
    row, column = place(start, local, height, width)
    dx = convolve(
        du_ptr + start * DU_STEP, taps_ptr, local, inside, row, column, n, height, width, C,
        C_PARTIAL, DU_STEP, TAP_STEP, BLOCK_M, BLOCK_N, BLOCK_K, VECTOR, PRECISION,
    )  # fmt: skip
    store_dx(
        dx, dy_ptr, dx_ptr, start, local, inside[:, None], n, C_PARTIAL, DY_STEP, DX_STEP, HAS_DY
    )


@triton.jit
def total_kernel(
    dz_ptr,
    z_ptr,
    dmean_ptr,
    dm2_ptr,
    mean_ptr,
    total_ptr,
    rows,
    DZ_STEP: tl.constexpr,
    Z_STEP: tl.constexpr,
    C_HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """total as a tensor."""
    start, n = tile_of(C_HIDDEN, BLOCK_M, BLOCK_N)
    local = tl.arange(0, BLOCK_M)
    keep = (local < rows - start)[:, None] & (n < C_HIDDEN)[None, :]
    total = load_total(
        dz_ptr, z_ptr, dmean_ptr, dm2_ptr, mean_ptr, start, local, keep, rows, n, C_HIDDEN, DZ_STEP,
        Z_STEP, True,
    )  # fmt: skip
    total_ptr += start * C_HIDDEN
    total = total.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + local[:, None] * C_HIDDEN + n[None, :], total, mask=keep)


@triton.jit
def du_kernel(
    dz_ptr,
    z_ptr,
    dmean_ptr,
    dm2_ptr,
    mean_ptr,
    w_ptr,
    dy_ptr,
    du_ptr,
    dx_ptr,
    rows,
    DZ_STEP: tl.constexpr,
    Z_STEP: tl.constexpr,
    DY_STEP: tl.constexpr,
    DU_STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
    C_PARTIAL: tl.constexpr,
    C_HIDDEN: tl.constexpr,
    STATS: tl.constexpr,
    HAS_DY: tl.constexpr,
    NEED_X: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of du: the first C_PARTIAL channels to ``du``, padded by zeros to DU_STEP, and all
    of them plus dy to dx, where pconv_dx_kernel then replaces the first: a store that began at
    C_PARTIAL = 10 could not be wide."""
    start, n = tile_of(COLUMNS, BLOCK_M, BLOCK_N)
    local = tl.arange(0, BLOCK_M)
    valid = (local < rows - start)[:, None]
    du = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, C_HIDDEN, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        keep = valid & (k < C_HIDDEN)[None, :]
        g = load_total(
            dz_ptr, z_ptr, dmean_ptr, dm2_ptr, mean_ptr, start, local, keep, rows, k, C_HIDDEN,
            DZ_STEP, Z_STEP, STATS,
        )  # fmt: skip
        w = tl.load(
            w_ptr + k[:, None] * C + n[None, :],
            mask=(k < C_HIDDEN)[:, None] & (n < C)[None, :],
            other=0.0,
        )
        du = tl.dot(g.to(w.dtype), w, du, input_precision=PRECISION)
    du_ptr += start * DU_STEP
    partial = tl.where((n < C_PARTIAL)[None, :], du, 0.0).to(du_ptr.dtype.element_ty)
    tl.store(
        du_ptr + local[:, None] * DU_STEP + n[None, :],
        partial,
        mask=valid & (n < DU_STEP)[None, :],
    )
    if NEED_X:
        store_dx(du, dy_ptr, dx_ptr, start, local, valid, n, C, DY_STEP, C, HAS_DY)


@triton.jit
def patch_begin(
    first,
    rows,
    height,
    width,
    OH,
    OW,
    CHANNELS: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STEP: tl.constexpr,
):
    """Where in a dense image, pixels STEP apart, the patches of the outputs first + rows begin."""
    image, row, column = patch_place(first, rows, OH, OW)
    pixel = (row * KH) * width + column * KW
    return image * (height * width) * CHANNELS + pixel.to(tl.int64) * STEP


@triton.jit
def patch_offset(k, width, CHANNELS: tl.constexpr, KW: tl.constexpr, STEP: tl.constexpr):
    """Where in a patch k = tap * CHANNELS + channel is, with the channels side by side."""
    tap = k // CHANNELS
    pixel = tap // KW * width + tap % KW
    return pixel.to(tl.int64) * STEP + k % CHANNELS


@triton.jit
def weight_gradient_kernel(
    g_ptr,
    z_ptr,
    dmean_ptr,
    dm2_ptr,
    g_mean_ptr,
    sample_ptr,
    a_ptr,
    u_ptr,
    mean_ptr,
    scale_ptr,
    shift_ptr,
    partial_ptr,
    rows,
    image_pixels,
    height,
    width,
    out_height,
    out_width,
    tiles_per_program,
    N: tl.constexpr,
    K: tl.constexpr,
    G_COLUMNS: tl.constexpr,
    G_STEP: tl.constexpr,
    Z_STEP: tl.constexpr,
    A_STEP: tl.constexpr,
    U_STEP: tl.constexpr,
    STATS: tl.constexpr,
    HAS_SAMPLE: tl.constexpr,
    OPERAND: tl.constexpr,
    ACT: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The part of g' a that tiles_per_program tiles of pixels give to one tile of (N, K).

    g is (M, N), of G_COLUMNS that may be read: total if STATS, times a scale of each image if
    HAS_SAMPLE. a is (M, K), by OPERAND: "act", act(bn(z)), z at ``a_ptr``; "pconv", the channels of
    u, as many as it has, then those of x at ``a_ptr``; "taps", the pixels around each one,
    k = tap * CHANNELS + channel; "patches", the pixels of its patch, likewise, the rows of g being
    those of the smaller image.
    Grid: (blocks of K, blocks of N, programs).
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    local = tl.arange(0, BLOCK_M)
    tap = k // CHANNELS
    channel = k % CHANNELS
    down = tap // KERNEL_WIDTH
    right = tap % KERNEL_WIDTH
    if OPERAND == "patches":
        within = patch_offset(k, width, CHANNELS, KERNEL_WIDTH, A_STEP)
        if not CHANNELS_LAST:
            within += channel.to(tl.int64) * (height * width - 1)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    first, end = tile_range(tl.program_id(2), rows, tiles_per_program, BLOCK_M)
    for tile in range(first, end):
        start = tl.cast(tile, tl.int64) * BLOCK_M
        inside = local < rows - start
        valid = inside[:, None]

        keep = valid & (n < G_COLUMNS)[None, :]
        g = load_total(
            g_ptr, z_ptr, dmean_ptr, dm2_ptr, g_mean_ptr, start, local, keep, rows, n, N, G_STEP,
            Z_STEP, STATS,
        )  # fmt: skip
        if STATS:
            g = tl.where(keep, g, 0.0)
        if HAS_SAMPLE:
            image = sample_of(start, local, image_pixels)
            sample = tl.load(sample_ptr + image, mask=inside, other=0.0)
            g = g.to(tl.float32) * sample.to(tl.float32)[:, None]

        keep = valid & (k < K)[None, :]
        if OPERAND == "act":
            a = tl.load(
                a_ptr + start * A_STEP + local[:, None] * A_STEP + k[None, :],
                mask=keep,
                other=0.0,
            )
            mean, scale, shift = load_vectors(mean_ptr, scale_ptr, shift_ptr, k, K)
            _, t = normalise(a, mean, scale, shift)
            a = tl.where(keep, activation(t, ACT), 0.0)
        elif OPERAND == "pconv":
            u = tl.load(
                u_ptr + start * U_STEP + local[:, None] * U_STEP + k[None, :],
                mask=valid & (k < U_STEP)[None, :],
                other=0.0,
            )
            a = tl.load(
                a_ptr + start * A_STEP + local[:, None] * A_STEP + k[None, :],
                mask=keep,
                other=0.0,
            )
            a = tl.where((k < U_STEP)[None, :], u.to(DTYPE), a.to(DTYPE))
        elif OPERAND == "taps":
            row, column = place(start, local, height, width)
            row = row[:, None] + (down - 1)[None, :]
            column = column[:, None] + (right - 1)[None, :]
            keep &= (row >= 0) & (row < height) & (column >= 0) & (column < width)
            source = local[:, None] + ((down - 1) * width + right - 1)[None, :]
            a = tl.load(
                a_ptr + start * A_STEP + source * A_STEP + channel[None, :],
                mask=keep,
                other=0.0,
            )
        else:
            patch = patch_begin(
                start, local, height, width, out_height, out_width, CHANNELS, KERNEL_HEIGHT,
                KERNEL_WIDTH, A_STEP,
            )  # fmt: skip
            a = tl.load(a_ptr + patch[:, None] + within[None, :], mask=keep, other=0.0)
        acc = tl.dot(tl.trans(g.to(DTYPE)), a.to(DTYPE), acc, input_precision=PRECISION)
    partial_ptr += tl.cast(tl.program_id(2), tl.int64) * N * K
    tl.store(
        partial_ptr + n[:, None] * K + k[None, :],
        acc,
        mask=(n < N)[:, None] & (k < K)[None, :],
    )


@triton.jit
def sum_weight_kernel(
    partial_ptr,
    dw_ptr,
    programs,
    SIZE: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A weight's gradient of SIZE elements from its partial sums: in its rows of K,
    k = tap * CHANNELS + channel stays in channels_last memory and else becomes
    channel * taps + tap."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for s0 in range(0, programs, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)[:, None]
        part = tl.load(
            partial_ptr + tl.cast(s, tl.int64) * SIZE + i[None, :],
            mask=(s < programs) & (i < SIZE)[None, :],
            other=0.0,
        )
        total += tl.sum(part, 0)
    place = i
    if not CHANNELS_LAST:
        k = i % K
        place = i - k + k % CHANNELS * (K // CHANNELS) + k // CHANNELS
    tl.store(dw_ptr + place, total.to(dw_ptr.dtype.element_ty), mask=i < SIZE)


@triton.jit
def patch_dx_kernel(
    g_ptr,
    z_ptr,
    dmean_ptr,
    dm2_ptr,
    mean_ptr,
    w_ptr,
    scale_ptr,
    dx_ptr,
    rows,
    height,
    width,
    out_height,
    out_width,
    N: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    G_STEP: tl.constexpr,
    Z_STEP: tl.constexpr,
    STATS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx of a convolution of patches: each pixel of g, total if STATS, gives the K = taps *
    channels of its own."""
    start, k = tile_of(K, BLOCK_M, BLOCK_K)
    local = tl.arange(0, BLOCK_M)
    valid = (local < rows - start)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        g = load_total(
            g_ptr, z_ptr, dmean_ptr, dm2_ptr, mean_ptr, start, local, valid & (n < N)[None, :],
            rows, n, N, G_STEP, Z_STEP, STATS,
        )  # fmt: skip
        if HAS_SCALE:
            scale = tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)
            g = g.to(tl.float32) * scale[None, :]
        w = tl.load(
            w_ptr + n[:, None] * K + k[None, :],
            mask=(n < N)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        acc = tl.dot(g.to(w.dtype), w, acc, input_precision=PRECISION)
    patch = patch_begin(
        start, local, height, width, out_height, out_width, CHANNELS, KERNEL_HEIGHT, KERNEL_WIDTH,
        CHANNELS,
    )  # fmt: skip
    within = patch_offset(k, width, CHANNELS, KERNEL_WIDTH, CHANNELS)
    tl.store(
        dx_ptr + patch[:, None] + within[None, :],
        acc.to(dx_ptr.dtype.element_ty),
        mask=valid & (k < K)[None, :],
    )


# ---- Launchers of one kernel ---------------------------------------------------------------------


def _results(like: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients for an op's return: an empty tensor stands for one that was not asked for."""
    return tuple(like.new_empty(0) if g is None else g for g in grads)


def _weight_gradient(
    g: Tensor,
    a: Tensor,
    weight: Tensor,
    operand: str,
    *,
    need_weight: bool = True,
    factor: Tensor | None = None,
    need_factor: bool = False,
    u: Tensor | None = None,
    bn: tuple[Tensor, Tensor, Tensor] = (None, None, None),
    act: str = "identity",
    statistics: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    sample: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(the weight's gradient, its factor's gradient), None where not needed.

    Args:
        g: the gradient of the convolution's output, further channels allowed, times ``factor``.
        a, operand, u, bn, act: the convolution's input, see weight_gradient_kernel.
        weight: PyTorch's; the result has its shape, dtype and memory format.
        factor: (C_out) that multiplied the convolution's output, or None.
        statistics: (z, dmean, dm2, mean) that g is completed by, or None.
        sample: (B) that multiplies g, or None.
    """
    check_weight(weight)
    n = weight.shape[0]
    channels, kernel_height, kernel_width = weight.shape[1:]
    k = channels * kernel_height * kernel_width
    channels_last = True
    g, g_step = pixels(g)
    if operand == "patches" and a.is_contiguous():
        check_reach(a)
        a_step, channels_last = 1, False
    else:
        a, a_step = pixels(a)
        if operand == "patches" and a_step != channels:
            a, a_step = reference.dense(a, torch.channels_last), channels
    z, dmean, dm2, mean = statistics or (None,) * 4
    if statistics:
        z, z_step = pixels(z)
        dmean, dm2, mean = vectors(dmean, dm2, mean)
    bn = vectors(*bn)
    gathered = operand in ("taps", "patches")  # whose addresses take registers
    tile = tiles("weight_gradient_gather" if gathered else "weight_gradient", n, k, g, weight.dtype)
    # A thread has at least 16 bytes to load.
    tile["BLOCK_M"] = max(tile["BLOCK_M"], 1024 // tile["BLOCK_N"])
    rows, blocks = rows_of(g), (cdiv(n, tile["BLOCK_N"]), cdiv(k, tile["BLOCK_K"]))
    programs, of_each = persistent(g, rows, tile["BLOCK_M"], 2 * blocks[0] * blocks[1], least=8)
    partial = g.new_empty((programs, n, k), dtype=torch.float32)
    launch(
        weight_gradient_kernel,
        (blocks[1], blocks[0], programs),
        g_ptr=g,
        z_ptr=z,
        dmean_ptr=dmean,
        dm2_ptr=dm2,
        g_mean_ptr=mean,
        sample_ptr=sample,
        a_ptr=a,
        u_ptr=u,
        mean_ptr=bn[0],
        scale_ptr=bn[1],
        shift_ptr=bn[2],
        partial_ptr=partial,
        rows=rows,
        image_pixels=g.shape[2] * g.shape[3],
        height=a.shape[2],
        width=a.shape[3],
        out_height=g.shape[2],
        out_width=g.shape[3],
        tiles_per_program=of_each,
        N=n,
        K=k,
        G_COLUMNS=g.shape[1],
        G_STEP=g_step,
        Z_STEP=z_step if statistics else 0,
        A_STEP=a_step,
        U_STEP=0 if u is None else u.shape[1],
        STATS=statistics is not None,
        HAS_SAMPLE=sample is not None,
        OPERAND=operand,
        ACT=act,
        CHANNELS=channels,
        KERNEL_HEIGHT=kernel_height,
        KERNEL_WIDTH=kernel_width,
        CHANNELS_LAST=channels_last,
        DTYPE=TRITON_DTYPES[weight.dtype],
        PRECISION=dot_precision(weight.dtype),
        **tile,
    )
    # Before the factor in float32.
    dtype = weight.dtype if factor is None else torch.float32
    order = reference.memory_format(weight)
    total = torch.empty(weight.shape, dtype=dtype, device=g.device, memory_format=order)
    at_once = power_of_2(min(programs, 16), least=1)
    size = block(n * k, 256, rows=at_once)
    launch(
        sum_weight_kernel,
        (cdiv(n * k, size),),
        partial_ptr=partial,
        dw_ptr=total,
        programs=programs,
        SIZE=n * k,
        K=k,
        CHANNELS=channels,
        CHANNELS_LAST=order == torch.channels_last,
        BLOCK_S=at_once,
        BLOCK=size,
        num_warps=4,
        num_stages=2,
    )
    if factor is None:
        return total, None
    dw = None
    if need_weight:
        dw = reference.like((total * factor[:, None, None, None]).to(weight.dtype), weight)
    if not need_factor:
        return dw, None
    return dw, (total * weight).flatten(1).sum(1, dtype=torch.float32).to(factor.dtype)


def _dz(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    act: str,
    need_z: bool,
    need_sums: bool,
    w_pw2: Tensor | None = None,
    layer: Tensor | None = None,
    sample: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dz channels_last, sums over pixels of dt and dt * (z - mean) as (2, C_hidden)), None where
    not needed."""
    (grad, grad_step), (z, z_step) = pixels(grad), pixels(z)
    mean, scale, shift, layer, sample = vectors(mean, scale, shift, layer, sample)
    c, c_hidden, rows = grad.shape[1], z.shape[1], rows_of(z)
    project = w_pw2 is not None
    tile = tiles("dz", c_hidden, c, z, z.dtype)
    blocks = cdiv(c_hidden, tile["BLOCK_N"])
    programs, of_each = persistent(z, rows, tile["BLOCK_M"], blocks)
    dz = empty_image(z, c_hidden, z.dtype) if need_z else None
    partial = z.new_empty((programs, 2, c_hidden), dtype=torch.float32) if need_sums else None
    launch(
        dz_kernel,
        (blocks, programs),
        grad_ptr=grad,
        w_ptr=matrix(w_pw2) if project else None,
        layer_ptr=layer,
        sample_ptr=sample,
        z_ptr=z,
        mean_ptr=mean,
        scale_ptr=scale,
        shift_ptr=shift,
        dz_ptr=dz,
        partial_ptr=partial,
        rows=rows,
        image_pixels=z.shape[2] * z.shape[3],
        tiles_per_program=of_each,
        GRAD_STEP=grad_step,
        Z_STEP=z_step,
        C=c,
        C_HIDDEN=c_hidden,
        ACT=act,
        PROJECT=project,
        HAS_LAYER=layer is not None,
        HAS_SAMPLE=sample is not None,
        NEED_Z=need_z,
        NEED_SUMS=need_sums,
        PRECISION=dot_precision(z.dtype),
        **tile,
    )
    sums = z.new_empty((2, c_hidden), dtype=torch.float32) if need_sums else None
    if need_sums:
        block_n = block(2 * c_hidden, 16)
        launch(
            sum_kernel,
            (cdiv(2 * c_hidden, block_n),),
            partial_ptr=partial,
            out_ptr=sums,
            programs=programs,
            N=2 * c_hidden,
            BLOCK_S=64,
            BLOCK_N=block_n,
            num_warps=4,
            num_stages=2,
        )
    return dz, sums


def _pconv_dx(du: Tensor, weight: Tensor, dx: Tensor, dy: Tensor | None = None) -> None:
    """Writes the first channels of ``dx``: the transposed convolution of du's, plus dy's."""
    du, du_step = pixels(du)
    dy, dy_step = (None, 0) if dy is None else pixels(dy)
    c_partial, rows = weight.shape[0], rows_of(du)
    taps = taps_of(weight.flip(2, 3).transpose(0, 1))
    cfg = config("pconv", (c_partial, rows), weight.dtype, device(du))
    block_m, block_n = cfg["BLOCK_M"], min(power_of_2(c_partial), cfg["BLOCK_N"])
    launch(
        pconv_dx_kernel,
        (cdiv(c_partial, block_n) * cdiv(rows, block_m),),
        du_ptr=du,
        taps_ptr=taps,
        dy_ptr=dy,
        dx_ptr=dx,
        rows=rows,
        height=du.shape[2],
        width=du.shape[3],
        DU_STEP=du_step,
        DY_STEP=dy_step,
        DX_STEP=dx.shape[1],
        TAP_STEP=taps.shape[2],
        C=du.shape[1],
        C_PARTIAL=c_partial,
        HAS_DY=dy is not None,
        VECTOR=vector(du.dtype),
        PRECISION=dot_precision(weight.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=min(power_of_2(c_partial), cfg["BLOCK_K"]),
        num_warps=cfg["num_warps"],
        num_stages=cfg["num_stages"],
    )


def _pconv_pointwise_backward(
    dz: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    x: Tensor,
    w_partial: Tensor,
    w_pw: Tensor,
    need_x: bool,
    need_partial: bool,
    need_pw: bool,
    dy: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx plus dy in x's memory format, dw_partial, dw_pw) of conv1x1(pconv3x3(x)), None where not
    needed.

    Args:
        dz: (B, C_hidden, H, W). statistics: (z, dmean, dm2, mean) that complete it, or None.
    """
    if not (need_x or need_partial or need_pw):
        return None, None, None
    image, image_step = pixels(x)
    dz, dz_step = pixels(dz)
    c, c_partial, c_hidden, rows = x.shape[1], w_partial.shape[0], w_pw.shape[0], rows_of(x)
    if statistics and c >= WIDE:
        dz, dz_step, statistics = _total(dz, *statistics, w_pw.dtype), c_hidden, None
    dx = dw_partial = dw_pw = None
    if need_x or need_partial:
        z, dmean, dm2, mean = statistics or (None,) * 4
        if statistics:
            z, z_step = pixels(z)
            dmean, dm2, mean = vectors(dmean, dm2, mean)
        if need_x and dy is not None:
            dy, dy_step = pixels(dy)
        else:
            dy = None
        du = empty_image(x, round_up(c_partial, 8), w_pw.dtype)
        dx = empty_image(x, c, x.dtype) if need_x else None
        columns = max(c, du.shape[1]) if need_x else du.shape[1]
        tile = tiles("du", columns, c_hidden, x, w_pw.dtype)
        launch(
            du_kernel,
            (cdiv(columns, tile["BLOCK_N"]) * cdiv(rows, tile["BLOCK_M"]),),
            dz_ptr=dz,
            z_ptr=z,
            dmean_ptr=dmean,
            dm2_ptr=dm2,
            mean_ptr=mean,
            w_ptr=matrix(w_pw),
            dy_ptr=dy,
            du_ptr=du,
            dx_ptr=dx,
            rows=rows,
            DZ_STEP=dz_step,
            Z_STEP=z_step if statistics else 0,
            DY_STEP=0 if dy is None else dy_step,
            DU_STEP=du.shape[1],
            COLUMNS=columns,
            C=c,
            C_PARTIAL=c_partial,
            C_HIDDEN=c_hidden,
            STATS=statistics is not None,
            HAS_DY=dy is not None,
            NEED_X=need_x,
            PRECISION=dot_precision(w_pw.dtype),
            **tile,
        )
        if need_x:
            _pconv_dx(du, w_partial, dx, dy)
            dx = in_format_of(dx, x)
        if need_partial:
            dw_partial, _ = _weight_gradient(du, image, w_partial, "taps")
    if need_pw:
        u = convolved_head(image, image_step, w_partial)
        dw_pw, _ = _weight_gradient(dz, image, w_pw, "pconv", u=u, statistics=statistics)
    return dx, dw_partial, dw_pw


def _total(dz, z, dmean, dm2, mean, dtype: torch.dtype) -> Tensor:
    (dz, dz_step), (z, z_step) = pixels(dz), pixels(z)
    dmean, dm2, mean = vectors(dmean, dm2, mean)
    c, rows, block_m, block_n = z.shape[1], rows_of(z), 64, block(z.shape[1], 128)
    total = empty_image(z, c, dtype)
    launch(
        total_kernel,
        (cdiv(c, block_n) * cdiv(rows, block_m),),
        dz_ptr=dz,
        z_ptr=z,
        dmean_ptr=dmean,
        dm2_ptr=dm2,
        mean_ptr=mean,
        total_ptr=total,
        rows=rows,
        DZ_STEP=dz_step,
        Z_STEP=z_step,
        C_HIDDEN=c,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=8,
        num_stages=2,
    )
    return total


def _patch_dx(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    statistics: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """dx of a convolution of patches, in x's dtype and memory format.

    Args:
        g: the gradient of its output, times ``scale`` (C_out) if there is one.
        statistics: (z, dmean, dm2, mean) that complete g, or None.
    """
    n, c, kernel_height, kernel_width = weight.shape
    height, width = x.shape[2:]
    g, g_step = pixels(g)
    z, dmean, dm2, mean = statistics or (None,) * 4
    if statistics:
        z, z_step = pixels(z)
    dmean, dm2, mean, scale = vectors(dmean, dm2, mean, scale)
    dx = empty_image(x, c, x.dtype)
    if height % kernel_height or width % kernel_width:
        dx.zero_()
    k = c * kernel_height * kernel_width
    rows, tile = rows_of(g), tiles("patch_dx", k, n, g, weight.dtype)
    block_m, block_n, block_k = tile["BLOCK_M"], tile["BLOCK_K"], tile["BLOCK_N"]
    launch(
        patch_dx_kernel,
        (cdiv(k, block_k) * cdiv(rows, block_m),),
        g_ptr=g,
        z_ptr=z,
        dmean_ptr=dmean,
        dm2_ptr=dm2,
        mean_ptr=mean,
        w_ptr=matrix(weight.permute(0, 2, 3, 1)),
        scale_ptr=scale,
        dx_ptr=dx,
        rows=rows,
        height=height,
        width=width,
        out_height=g.shape[2],
        out_width=g.shape[3],
        N=n,
        K=k,
        CHANNELS=c,
        KERNEL_WIDTH=kernel_width,
        KERNEL_HEIGHT=kernel_height,
        G_STEP=g_step,
        Z_STEP=z_step if statistics else 0,
        STATS=statistics is not None,
        HAS_SCALE=scale is not None,
        PRECISION=dot_precision(weight.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )
    return in_format_of(dx, x)


# ---- The ops -------------------------------------------------------------------------------------


def pconv3x3_backward(grad, x_partial, weight, output_mask):
    if grad.numel() == 0:
        return reference.pconv3x3_backward(grad, x_partial, weight, output_mask)
    need_x, need_weight = output_mask
    dx = dw = None
    if need_x:
        dx = empty_image(grad, grad.shape[1], grad.dtype).copy_(grad)
        _pconv_dx(grad, weight, dx)
        dx = in_format_of(dx, grad)
    if need_weight:
        dw, _ = _weight_gradient(grad, x_partial, weight, "taps")
    return _results(grad, dx, dw)


def pw_stats_backward(
    dz, dmean, dm2, x, z, mean, w_partial, w_pw, output_mask, dy=None
) -> tuple[Tensor, ...]:
    if x.numel() == 0:
        return reference.pw_stats_backward(
            dz, dmean, dm2, x, z, mean, w_partial, w_pw, output_mask, dy
        )
    statistics = z, dmean, dm2, mean
    return _results(
        dz, *_pconv_pointwise_backward(dz, statistics, x, w_partial, w_pw, *output_mask, dy)
    )


def patch_stats_backward(
    dz, dmean, dm2, x, z, mean, weight, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    if dz.numel() == 0:
        return reference.patch_stats_backward(dz, dmean, dm2, x, z, mean, weight, output_mask)
    need_x, need_weight = output_mask
    statistics = z, dmean, dm2, mean
    if need_x and weight.shape[0] >= WIDE:
        dz, statistics = _total(dz, *statistics, weight.dtype), None
    dx = dw = None
    if need_x:
        dx = _patch_dx(dz, x, weight, statistics=statistics)
    if need_weight:
        dw, _ = _weight_gradient(dz, x, weight, "patches", statistics=statistics)
    return _results(dz, dx, dw)


def bn_act_backward(
    grad, z, mean, scale, shift, act: str, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    if z.numel() == 0:
        return reference.bn_act_backward(grad, z, mean, scale, shift, act, output_mask)
    need_z, *need = output_mask
    dz = sums = None
    if any(output_mask):
        dz, sums = _dz(grad, z, mean, scale, shift, act, need_z, any(need))
    return _results(grad, *_from_sums(dz, sums, z, mean, scale, shift, *need))


def _from_sums(dz, sums, z, mean, scale, shift, need_mean, need_scale, need_shift):
    """(dz, dmean, dscale, dshift) from what _dz returns."""
    return (
        None if dz is None else in_format_of(dz, z),
        (-scale * sums[0]).to(mean.dtype) if need_mean else None,
        sums[1].to(scale.dtype) if need_scale else None,
        sums[0].to(shift.dtype) if need_shift else None,
    )


def act_pw_residual_backward(
    grad, z, mean, scale, shift, w_pw2, layer_scale, sample_scale, act: str, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    if z.numel() == 0:
        return reference.act_pw_residual_backward(
            grad, z, mean, scale, shift, w_pw2, layer_scale, sample_scale, act, output_mask
        )
    need_z, *need, need_pw2, need_layer, need_sample = output_mask
    dz = sums = dw_pw2 = dlayer = dsample = None
    if need_z or any(need):
        dz, sums = _dz(
            grad,
            z,
            mean,
            scale,
            shift,
            act,
            need_z,
            any(need),
            w_pw2,
            layer_scale,
            sample_scale,
        )
    if need_sample:
        # Nobody trains it: a plain product of the gradient and the branch will do.
        branch = empty_image(grad, grad.shape[1], torch.float32)
        project(branch, None, z, mean, scale, shift, w_pw2, layer_scale, None, act)
        dsample = branch.mul_(grad).sum((1, 2, 3), dtype=torch.float64).to(sample_scale.dtype)
    if need_pw2 or need_layer:
        (sample,) = vectors(sample_scale)
        dw_pw2, dlayer = _weight_gradient(
            grad,
            z,
            w_pw2,
            "act",
            need_weight=need_pw2,
            factor=layer_scale,
            need_factor=need_layer,
            bn=(mean, scale, shift),
            act=act,
            sample=sample,
        )
    grads = _from_sums(dz, sums, z, mean, scale, shift, *need)
    return _results(grad, *grads, dw_pw2, dlayer, dsample)


def bn_act_recompute_backward(
    grad, x, mean, scale, shift, w_partial, w, act: str, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    if grad.numel() == 0:
        return reference.bn_act_recompute_backward(
            grad, x, mean, scale, shift, w_partial, w, act, output_mask
        )
    if w_partial is None:
        z = patch_convolved(x, w, stats=False)[0]
    else:
        z = in_format_of(pconv_pointwise(x, w_partial, w, stats=False)[0], x)
    return z, *bn_act_backward(grad, z, mean, scale, shift, act, output_mask)


def act_pw_residual_recompute_backward(
    grad,
    x,
    mean,
    scale,
    shift,
    w_partial,
    w_pw1,
    w_pw2,
    layer_scale,
    sample_scale,
    act: str,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    if grad.numel() == 0:
        return reference.act_pw_residual_recompute_backward(
            grad,
            x,
            mean,
            scale,
            shift,
            w_partial,
            w_pw1,
            w_pw2,
            layer_scale,
            sample_scale,
            act,
            output_mask,
        )
    z = in_format_of(pconv_pointwise(x, w_partial, w_pw1, stats=False)[0], x)
    return z, *act_pw_residual_backward(
        grad, z, mean, scale, shift, w_pw2, layer_scale, sample_scale, act, output_mask
    )


def _scale_and_shift(z: Tensor, scale: Tensor | None, shift: Tensor | None):
    """z * scale + shift as a batch norm (mean, scale, shift)."""
    zeros = z.new_zeros(z.shape[1], dtype=torch.float32)
    return (
        zeros,
        torch.ones_like(zeros) if scale is None else scale,
        zeros if shift is None else shift,
    )


def pconv_pw_backward(
    grad, x, w_partial, w_pw, scale, shift, act: str, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    if grad.numel() == 0:
        return reference.pconv_pw_backward(grad, x, w_partial, w_pw, scale, shift, act, output_mask)
    *convolution, need_scale, need_shift = output_mask
    z, _, _ = pconv_pointwise(x, w_partial, w_pw, stats=False)
    bn = _scale_and_shift(z, scale, shift)
    dz, _, dscale, dshift = bn_act_backward(
        grad, z, *bn, act, [any(convolution), False, need_scale, need_shift]
    )
    grads = _pconv_pointwise_backward(dz, None, x, w_partial, w_pw, *convolution, None)
    return *_results(grad, *grads), dscale, dshift


def block_backward(
    grad,
    x,
    w_partial,
    w_pw1,
    w_pw2,
    scale,
    shift,
    layer_scale,
    sample_scale,
    act: str,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    if grad.numel() == 0:
        return reference.block_backward(
            grad,
            x,
            w_partial,
            w_pw1,
            w_pw2,
            scale,
            shift,
            layer_scale,
            sample_scale,
            act,
            output_mask,
        )
    need_x, need_partial, need_pw1, need_pw2, need_scale, need_shift, *others = output_mask
    convolution = need_x, need_partial, need_pw1
    z, _, _ = pconv_pointwise(x, w_partial, w_pw1, stats=False)
    mask = [any(convolution), False, need_scale, need_shift, need_pw2, *others]
    dz, _, dscale, dshift, dw_pw2, dlayer, dsample = act_pw_residual_backward(
        grad, z, *_scale_and_shift(z, scale, shift), w_pw2, layer_scale, sample_scale, act, mask
    )
    dx, dw_partial, dw_pw1 = _results(
        grad, *_pconv_pointwise_backward(dz, None, x, w_partial, w_pw1, *convolution, grad)
    )
    return dx, dw_partial, dw_pw1, dw_pw2, dscale, dshift, dlayer, dsample


def patch_conv_backward(
    grad, x, weight, scale, shift, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    if grad.numel() == 0:
        return reference.patch_conv_backward(grad, x, weight, scale, shift, output_mask)
    need_x, need_weight, need_scale, need_shift = output_mask
    dx = dw = dscale = dshift = None
    if need_x:
        dx = _patch_dx(grad, x, weight, scale=scale)
    if need_weight or need_scale:
        dw, dscale = _weight_gradient(
            grad,
            x,
            weight,
            "patches",
            need_weight=need_weight,
            factor=scale,
            need_factor=need_scale,
        )
    if need_shift:
        dshift = grad.sum((0, 2, 3), dtype=torch.float32).to(shift.dtype)
    return _results(grad, dx, dw, dscale, dshift)


KERNELS = {
    "pconv3x3_backward": pconv3x3_backward,
    "pw_stats_backward": pw_stats_backward,
    "patch_stats_backward": patch_stats_backward,
    "bn_act_backward": bn_act_backward,
    "bn_act_recompute_backward": bn_act_recompute_backward,
    "act_pw_residual_backward": act_pw_residual_backward,
    "act_pw_residual_recompute_backward": act_pw_residual_recompute_backward,
    "pconv_pw_backward": pconv_pw_backward,
    "block_backward": block_backward,
    "patch_conv_backward": patch_conv_backward,
}
