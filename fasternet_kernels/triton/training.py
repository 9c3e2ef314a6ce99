"""Training forward: the two halves of a layer with batch statistics.

    pw_stats          z = conv1x1(u, w_pw), u = x with its first C_partial channels convolved 3x3;
                      mean and m2 of each channel of z, as stored
    bn_act            act((z - mean) * scale + shift)
    act_pw_residual   x + sample_scale * layer_scale * conv1x1(bn_act(z), w_pw2)

Per pixel, with C_hidden = 2 C: pw_stats reads C elements and writes 2C, act_pw_residual reads 3C
and writes C; each makes 4 C^2 FLOP, the partial convolution 1.125 C^2 more. At 16 bits and C = 192
that is 164 FLOP per byte, under the 300 where the tensor cores of an H100 would be the limit.

Where the partial convolution runs. A program of pw_stats needs all C_partial convolved channels of
its pixels for each block of outputs. With one or two such blocks it convolves them itself, in
registers; with more, convolving again for each costs more than writing C / 4 channels once and
reading them back, and a first launch does that.

Statistics. A program walks `tiles_per_program` tiles of pixels and merges their (count, mean, m2)
in order by Chan's formula; a second, small kernel merges the programs. The split depends on shapes
and the kind of device alone and nothing is atomic, so the bits are the same on every run. Within a
tile the mean is taken twice, the second time of the deviations from the first: a mean of 1e4 beside
a standard deviation of 1 keeps its digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .common import (
    activation,
    cdiv,
    device,
    dot_precision,
    empty_image,
    in_format_of,
    launch,
    pixels,
    power_of_2,
)

PROGRAMS = 4  # for each multiprocessor, of a grid that walks over pixels
# In the interpreter one tile holds all columns: its time goes by the operation, not by the element.
ALL_COLUMNS = triton.knobs.runtime.interpret


# ---- Tiles ---------------------------------------------------------------------------------------


def block(size: int, most: int) -> int:
    """A power of two for ``size`` columns: the widest up to ``most``, or half of that where it
    leaves fewer columns computed in vain."""
    if ALL_COLUMNS:
        return power_of_2(size)
    wide = min(most, power_of_2(size))
    return wide // 2 if wide == most and cdiv(size, wide // 2) % 2 == 1 and size > wide else wide


def persistent(t: Tensor, rows: int, block_m: int, others: int, least: int = 1) -> tuple[int, int]:
    """(programs, tiles of each, at least ``least``) that walk ``rows`` rows, beside ``others``
    programs on the same rows. It depends on shapes and the kind of device alone, so the order of
    every sum does."""
    tiles = cdiv(rows, block_m)
    per_program = cdiv(tiles, max(1, PROGRAMS * device(t).multiprocessors // others))
    per_program = max(per_program, min(tiles, least))
    return cdiv(tiles, per_program), per_program


def rows_of(t: Tensor) -> int:
    return t.shape[0] * t.shape[2] * t.shape[3]


def round_up(n: int, multiple: int) -> int:
    return cdiv(n, multiple) * multiple


def vectors(*ts: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in ts]


def tap_weights(weight: Tensor) -> Tensor:
    """(3, 3, input, output) of a 3x3 weight, for :func:`pconv_rows`."""
    return weight.permute(2, 3, 1, 0).contiguous()


# ---- Kernels -------------------------------------------------------------------------------------


@triton.jit
def pconv_tile(
    x_ptr,
    w_ptr,
    start,
    n,
    rows,
    height,
    width,
    X_STRIDE: tl.constexpr,
    READABLE: tl.constexpr,
    C_PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The 3x3 convolution of BLOCK_M pixels from ``start``, its output channels ``n``, in float32.

    Of each pixel the first READABLE channels may be read, C_PARTIAL of them count: C_PARTIAL = 10
    would be read two at a time, and 16 with 6 masked are read eight at a time. The nine taps are
    unrolled: Triton has miscompiled a loop over them.
    """
    local = tl.arange(0, BLOCK_M)
    pixel = start + local
    column = pixel % width
    row = (pixel // width) % height
    x_ptr += tl.cast(start, tl.int64) * X_STRIDE
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in tl.static_range(9):
        down: tl.constexpr = tap // 3 - 1
        right: tl.constexpr = tap % 3 - 1
        inside = (
            (pixel < rows)
            & (row + down >= 0)
            & (row + down < height)
            & (column + right >= 0)
            & (column + right < width)
        )
        source = (local + down * width + right) * X_STRIDE
        for k0 in range(0, C_PARTIAL, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_ptr + source[:, None] + k[None, :],
                mask=inside[:, None] & (k < READABLE)[None, :],
                other=0.0,
            )
            if READABLE > C_PARTIAL:
                x = tl.where((k < C_PARTIAL)[None, :], x, 0.0)
            w = tl.load(
                w_ptr + (tap * C_PARTIAL + k)[:, None] * C_PARTIAL + n[None, :],
                mask=(k < C_PARTIAL)[:, None] & (n < C_PARTIAL)[None, :],
                other=0.0,
            )
            acc = tl.dot(x.to(w.dtype), w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def pconv_rows_kernel(
    x_ptr,
    w_ptr,
    add_ptr,
    y_ptr,
    rows,
    height,
    width,
    X_STRIDE: tl.constexpr,
    READABLE: tl.constexpr,
    ADD_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    Y_COLUMNS: tl.constexpr,
    C_PARTIAL: tl.constexpr,
    HAS_ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The convolved channels alone, plus ``add`` where it is there; columns from C_PARTIAL to
    Y_COLUMNS are zero."""
    start = tl.program_id(1) * BLOCK_M
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = pconv_tile(
        x_ptr,
        w_ptr,
        start,
        n,
        rows,
        height,
        width,
        X_STRIDE,
        READABLE,
        C_PARTIAL,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    local = tl.arange(0, BLOCK_M)[:, None]
    keep = (start + local < rows) & (n < Y_COLUMNS)[None, :]
    first = tl.cast(start, tl.int64)
    if HAS_ADD:
        add_ptr += first * ADD_STRIDE
        acc += tl.load(add_ptr + local * ADD_STRIDE + n[None, :], mask=keep, other=0.0).to(
            tl.float32
        )
    if Y_COLUMNS > C_PARTIAL:
        acc = tl.where((n < C_PARTIAL)[None, :], acc, 0.0)
    y_ptr += first * Y_STRIDE
    tl.store(y_ptr + local * Y_STRIDE + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def pw_stats_kernel(
    x_ptr,
    u_ptr,
    w_partial_ptr,
    w_ptr,
    z_ptr,
    partial_ptr,
    rows,
    height,
    width,
    tiles_per_program,
    X_STRIDE: tl.constexpr,
    READABLE: tl.constexpr,
    U_STRIDE: tl.constexpr,
    C: tl.constexpr,
    C_PARTIAL: tl.constexpr,
    C_OUT: tl.constexpr,
    FUSED: tl.constexpr,
    STATS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """z of tiles_per_program tiles of pixels and one block of outputs, and their (mean, m2).

    K has two segments, the convolved channels (made here if FUSED, else read from ``u``) and those
    of x from C_PARTIAL on: nothing is concatenated.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    local = tl.arange(0, BLOCK_M)
    dtype = w_ptr.dtype.element_ty
    w_ptr += n[None, :] * C
    mean = tl.zeros((BLOCK_N,), tl.float32)
    m2 = tl.zeros((BLOCK_N,), tl.float32)
    first = tl.program_id(1) * tiles_per_program
    for tile in range(first, tl.minimum(first + tiles_per_program, tl.cdiv(rows, BLOCK_M))):
        start = tile * BLOCK_M
        valid = (start + local < rows)[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if FUSED:
            p = tl.arange(0, BLOCK_P)
            u = pconv_tile(
                x_ptr,
                w_partial_ptr,
                start,
                p,
                rows,
                height,
                width,
                X_STRIDE,
                READABLE,
                C_PARTIAL,
                PRECISION,
                BLOCK_M,
                BLOCK_P,
                BLOCK_P,
            )
            u = tl.where((p < C_PARTIAL)[None, :], u, 0.0)
            w = tl.load(
                w_ptr + p[:, None], mask=(p < C_PARTIAL)[:, None] & (n < C_OUT)[None, :], other=0.0
            )
            acc = tl.dot(u.to(dtype), w, acc, input_precision=PRECISION)
        else:
            u_tile = u_ptr + tl.cast(start, tl.int64) * U_STRIDE
            for k0 in range(0, C_PARTIAL, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                u = tl.load(
                    u_tile + local[:, None] * U_STRIDE + k[None, :],
                    mask=valid & (k < U_STRIDE)[None, :],
                    other=0.0,
                )
                w = tl.load(
                    w_ptr + k[:, None],
                    mask=(k < C_PARTIAL)[:, None] & (n < C_OUT)[None, :],
                    other=0.0,
                )
                acc = tl.dot(u.to(dtype), w, acc, input_precision=PRECISION)
        x_tile = x_ptr + tl.cast(start, tl.int64) * X_STRIDE
        for k0 in range(C_PARTIAL // 16 * 16, C, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_tile + local[:, None] * X_STRIDE + k[None, :],
                mask=valid & (k < C)[None, :],
                other=0.0,
            )
            if C_PARTIAL % 16 != 0:
                x = tl.where((k >= C_PARTIAL)[None, :], x, 0.0)
            w = tl.load(
                w_ptr + k[:, None],
                mask=((k >= C_PARTIAL) & (k < C))[:, None] & (n < C_OUT)[None, :],
                other=0.0,
            )
            acc = tl.dot(x.to(dtype), w, acc, input_precision=PRECISION)

        z = acc.to(z_ptr.dtype.element_ty)
        z_tile = z_ptr + tl.cast(start, tl.int64) * C_OUT
        tl.store(z_tile + local[:, None] * C_OUT + n[None, :], z, mask=valid & (n < C_OUT)[None, :])
        if STATS:
            stored = z.to(tl.float32)
            count = tl.minimum(rows - start, BLOCK_M).to(tl.float32)
            about = tl.sum(tl.where(valid, stored, 0.0), 0) / count
            deviation = tl.where(valid, stored - about[None, :], 0.0)
            rest = tl.sum(deviation, 0) / count
            delta = about + rest - mean
            before = (start - first * BLOCK_M).to(tl.float32)
            share = count / (before + count)
            m2 += tl.sum(deviation * deviation, 0) - rest * rest * count
            m2 += delta * delta * before * share
            mean += delta * share
    if STATS:
        partial_ptr += tl.program_id(1) * 2 * C_OUT + n
        tl.store(partial_ptr, mean, mask=n < C_OUT)
        tl.store(partial_ptr + C_OUT, m2, mask=n < C_OUT)


@triton.jit
def merge_statistics_kernel(
    partial_ptr,
    mean_ptr,
    m2_ptr,
    programs,
    rows,
    rows_per_program,
    C_OUT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(mean, m2) of all programs: Chan's formula for many at once, taken about the first mean."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    partial_ptr += n[None, :]
    keep = (n < C_OUT)[None, :]
    about = tl.load(partial_ptr, mask=keep, other=0.0)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for s0 in range(0, programs, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)[:, None]
        there = keep & (s < programs)
        count = tl.minimum(rows - s * rows_per_program, rows_per_program).to(tl.float32)
        means = tl.load(partial_ptr + s * 2 * C_OUT, mask=there, other=0.0)
        total += tl.sum(tl.where(there, (means - about) * count, 0.0), 0)
    mean = about + (total / rows)[None, :]
    m2 = tl.zeros((BLOCK_N,), tl.float32)
    for s0 in range(0, programs, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)[:, None]
        there = keep & (s < programs)
        count = tl.minimum(rows - s * rows_per_program, rows_per_program).to(tl.float32)
        delta = tl.load(partial_ptr + s * 2 * C_OUT, mask=there, other=0.0) - mean
        squares = tl.load(partial_ptr + s * 2 * C_OUT + C_OUT, mask=there, other=0.0)
        m2 += tl.sum(tl.where(there, squares + delta * delta * count, 0.0), 0)
    tl.store(mean_ptr + n[None, :], mean, mask=keep)
    tl.store(m2_ptr + n, m2, mask=n < C_OUT)


@triton.jit
def load_vectors(mean_ptr, scale_ptr, shift_ptr, n, N: tl.constexpr):
    """(mean, scale, shift) of the channels ``n``, zero beyond N."""
    keep = n < N
    mean = tl.load(mean_ptr + n, mask=keep, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + n, mask=keep, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + n, mask=keep, other=0.0).to(tl.float32)
    return mean[None, :], scale[None, :], shift[None, :]


@triton.jit
def normalise(z, mean, scale, shift):
    """(z - mean, (z - mean) * scale + shift) in float32: subtracting first keeps a large mean's
    digits."""
    centred = z.to(tl.float32) - mean
    return centred, tl.fma(
        centred, tl.broadcast_to(scale, z.shape), tl.broadcast_to(shift, z.shape)
    )


@triton.jit
def bn_act_kernel(
    z_ptr,
    mean_ptr,
    scale_ptr,
    shift_ptr,
    a_ptr,
    rows,
    Z_STRIDE: tl.constexpr,
    C: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start = tl.program_id(1) * BLOCK_M
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    local = tl.arange(0, BLOCK_M)[:, None]
    keep = (start + local < rows) & (n < C)[None, :]
    first = tl.cast(start, tl.int64)
    mean, scale, shift = load_vectors(mean_ptr, scale_ptr, shift_ptr, n, C)
    z = tl.load(z_ptr + first * Z_STRIDE + local * Z_STRIDE + n[None, :], mask=keep, other=0.0)
    _, t = normalise(z, mean, scale, shift)
    a = activation(t, ACT).to(a_ptr.dtype.element_ty)
    tl.store(a_ptr + first * C + local * C + n[None, :], a, mask=keep)


@triton.jit
def act_pw_residual_kernel(
    x_ptr,
    z_ptr,
    mean_ptr,
    scale_ptr,
    shift_ptr,
    w_ptr,
    layer_ptr,
    sample_ptr,
    y_ptr,
    rows,
    image_pixels,
    X_STRIDE: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    C: tl.constexpr,
    C_HIDDEN: tl.constexpr,
    ACT: tl.constexpr,
    HAS_LAYER: tl.constexpr,
    HAS_SAMPLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of y: the activation is made of z on its way to the tensor cores."""
    start = tl.program_id(1) * BLOCK_M
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    local = tl.arange(0, BLOCK_M)
    valid = (start + local < rows)[:, None]
    first = tl.cast(start, tl.int64)
    z_ptr += first * Z_STRIDE
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, C_HIDDEN, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        z = tl.load(
            z_ptr + local[:, None] * Z_STRIDE + k[None, :],
            mask=valid & (k < C_HIDDEN)[None, :],
            other=0.0,
        )
        mean, scale, shift = load_vectors(mean_ptr, scale_ptr, shift_ptr, k, C_HIDDEN)
        _, t = normalise(z, mean, scale, shift)
        w = tl.load(
            w_ptr + n[None, :] * C_HIDDEN + k[:, None],
            mask=(k < C_HIDDEN)[:, None] & (n < C)[None, :],
            other=0.0,
        )
        acc = tl.dot(activation(t, ACT).to(w.dtype), w, acc, input_precision=PRECISION)
    if HAS_LAYER:
        acc *= tl.load(layer_ptr + n, mask=n < C, other=0.0).to(tl.float32)[None, :]
    if HAS_SAMPLE:
        sample = (start + local) // image_pixels
        scale = tl.load(sample_ptr + sample, mask=start + local < rows, other=0.0)
        acc *= scale.to(tl.float32)[:, None]
    keep = valid & (n < C)[None, :]
    x = tl.load(
        x_ptr + first * X_STRIDE + local[:, None] * X_STRIDE + n[None, :], mask=keep, other=0.0
    )
    y = (x.to(tl.float32) + acc).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + first * C + local[:, None] * C + n[None, :], y, mask=keep)


# ---- Launchers -----------------------------------------------------------------------------------


def pconv_rows(
    x: Tensor,
    taps: Tensor,
    readable: int,
    out: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """The 3x3 convolution of x's first channels, the only ones of the result.

    Args:
        x: an image; its channels from C_partial on do not matter.
        taps: (3, 3, C_partial, C_partial), kernel position, input, output.
        readable: how many channels of a pixel may be read.
        out: a channels_last image whose further channels stay as they are. None: a new one, the
            channels rounded up to a multiple of 8, the further ones zero.
        add: an image that is added, or None.
    """
    if add is not None:
        add, add_step = pixels(add)
    c_partial = taps.shape[2]
    columns = c_partial
    if out is None:
        columns = round_up(c_partial, 8)
        out = empty_image(x, columns, taps.dtype)
    x, x_step = pixels(x)
    rows, block_m = rows_of(x), 128
    block_n, block_k = block(columns, 128), block(c_partial, 64)
    launch(
        pconv_rows_kernel,
        (cdiv(columns, block_n), cdiv(rows, block_m)),
        x_ptr=x,
        w_ptr=taps,
        add_ptr=add,
        y_ptr=out,
        rows=rows,
        height=x.shape[2],
        width=x.shape[3],
        X_STRIDE=x_step,
        READABLE=readable,
        ADD_STRIDE=0 if add is None else add_step,
        Y_STRIDE=pixels(out)[1],
        Y_COLUMNS=columns,
        C_PARTIAL=c_partial,
        HAS_ADD=add is not None,
        PRECISION=dot_precision(taps.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=8 if block_n > 64 else 4,
        num_stages=3,
    )
    return out


def pconv_partial(x: Tensor, w_partial: Tensor) -> Tensor:
    """The convolved channels of ``x`` in the weight's dtype, padded by zeros to a multiple of 8."""
    readable = min(round_up(w_partial.shape[0], 8), x.shape[1])
    return pconv_rows(x, tap_weights(w_partial), readable)


def pconv_pointwise(
    x: Tensor, w_partial: Tensor, w_pw: Tensor, stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(z, mean, m2) with z channels_last; without ``stats`` z alone, of the same bits."""
    x, x_step = pixels(x)
    c, c_partial, c_out = x.shape[1], w_partial.shape[0], w_pw.shape[0]
    rows, block_m = rows_of(x), 128
    block_n, block_k, block_p = block(c_out, 128), block(c, 32), block(c_partial, 64)
    blocks = cdiv(c_out, block_n)
    fused = c_out <= 256 and c_partial <= 64
    u = None if fused else pconv_partial(x, w_partial)
    programs, tiles = persistent(x, rows, block_m, blocks)
    z = empty_image(x, c_out, w_pw.dtype)
    partial = x.new_empty((programs, 2, c_out), dtype=torch.float32) if stats else None
    launch(
        pw_stats_kernel,
        (blocks, programs),
        x_ptr=x,
        u_ptr=u,
        w_partial_ptr=tap_weights(w_partial) if fused else None,
        w_ptr=w_pw.contiguous(),
        z_ptr=z,
        partial_ptr=partial,
        rows=rows,
        height=x.shape[2],
        width=x.shape[3],
        tiles_per_program=tiles,
        X_STRIDE=x_step,
        READABLE=min(round_up(c_partial, 8), c),
        U_STRIDE=0 if fused else u.shape[1],
        C=c,
        C_PARTIAL=c_partial,
        C_OUT=c_out,
        FUSED=fused,
        STATS=stats,
        PRECISION=dot_precision(w_pw.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_P=block_p,
        num_warps=8 if block_n > 64 else 4,
        num_stages=3,
    )
    if not stats:
        return z, None, None
    mean, m2 = (x.new_empty(c_out, dtype=torch.float32) for _ in range(2))
    launch(
        merge_statistics_kernel,
        (cdiv(c_out, 16),),
        partial_ptr=partial,
        mean_ptr=mean,
        m2_ptr=m2,
        programs=programs,
        rows=rows,
        rows_per_program=tiles * block_m,
        C_OUT=c_out,
        BLOCK_S=64,
        BLOCK_N=16,
        num_warps=4,
        num_stages=3,
    )
    return z, mean, m2


def pw_stats(x: Tensor, w_partial: Tensor, w_pw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See the module. z in the memory format that x suggests, mean and m2 in float32."""
    if x.numel() == 0:
        return reference.pw_stats(x, w_partial, w_pw)
    z, mean, m2 = pconv_pointwise(x, w_partial, w_pw, stats=True)
    return in_format_of(z, x), mean, m2


def bn_act(z: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, act: str) -> Tensor:
    """See the module. In z's dtype and memory format."""
    if z.numel() == 0:
        return reference.bn_act(z, mean, scale, shift, act)
    mean, scale, shift = vectors(mean, scale, shift)
    source, step = pixels(z)
    c = z.shape[1]
    a = empty_image(z, c, z.dtype)
    rows, block_m, block_n = rows_of(z), 64, block(c, 128)
    launch(
        bn_act_kernel,
        (cdiv(c, block_n), cdiv(rows, block_m)),
        z_ptr=source,
        mean_ptr=mean,
        scale_ptr=scale,
        shift_ptr=shift,
        a_ptr=a,
        rows=rows,
        Z_STRIDE=step,
        C=c,
        ACT=act,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=8,
        num_stages=2,
    )
    return in_format_of(a, z)


def act_pw_residual(
    x: Tensor,
    z: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    w_pw2: Tensor,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    act: str,
) -> Tensor:
    """See the module. In the memory format of x and the wider dtype of x and z."""
    if x.numel() == 0:
        return reference.act_pw_residual(
            x, z, mean, scale, shift, w_pw2, layer_scale, sample_scale, act
        )
    (source, x_step), (hidden, z_step) = pixels(x), pixels(z)
    mean, scale, shift, layer, sample = vectors(mean, scale, shift, layer_scale, sample_scale)
    c, c_hidden = x.shape[1], z.shape[1]
    y = empty_image(x, c, torch.promote_types(x.dtype, z.dtype))
    rows, block_m = rows_of(x), 128
    block_n, block_k = block(c, 128), block(c_hidden, 32)
    launch(
        act_pw_residual_kernel,
        (cdiv(c, block_n), cdiv(rows, block_m)),
        x_ptr=source,
        z_ptr=hidden,
        mean_ptr=mean,
        scale_ptr=scale,
        shift_ptr=shift,
        w_ptr=w_pw2.contiguous(),
        layer_ptr=layer,
        sample_ptr=sample,
        y_ptr=y,
        rows=rows,
        image_pixels=x.shape[2] * x.shape[3],
        X_STRIDE=x_step,
        Z_STRIDE=z_step,
        C=c,
        C_HIDDEN=c_hidden,
        ACT=act,
        HAS_LAYER=layer is not None,
        HAS_SAMPLE=sample is not None,
        PRECISION=dot_precision(w_pw2.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=8 if block_n > 64 else 4,
        num_stages=3,
    )
    return in_format_of(y, x)


KERNELS = {"pw_stats": pw_stats, "bn_act": bn_act, "act_pw_residual": act_pw_residual}
