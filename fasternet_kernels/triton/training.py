"""Training forward: the two halves of a layer with batch statistics.

    pw_stats          z = conv1x1(u, w_pw), u = x with its first C_partial channels convolved 3x3;
                      mean and m2 of each channel of z, as stored
    patch_stats       the same of z = conv(x, w), stride = kernel: stem and merging layers
    bn_act            act((z - mean) * scale + shift)
    act_pw_residual   x + sample_scale * layer_scale * conv1x1(bn_act(z), w_pw2)

Per pixel, with C_hidden = 2 C: pw_stats reads C elements and writes 2C, act_pw_residual reads 3C
and writes C; each makes 4 C^2 FLOP, the partial convolution 1.125 C^2 more. At 16 bits and C = 192
that is 164 FLOP per byte, under the 300 where the tensor cores of an H100 would be the limit.

Where the partial convolution runs. A program of pw_stats needs all C_partial convolved channels of
its pixels for each block of outputs. With one or two such blocks it convolves them itself, in
registers; with more, convolving again for each costs more than writing C / 4 channels once and
reading them back, and a first launch does that.

Tiles are in tuning/. On consumer GPUs, which have 99 KB of shared memory for a program, as on the
others three stages of operands at 16 bits in tiles of 128 x 128 x 32 take 60 KB.

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
from .block import matrix, sample_of, weight_tile
from .common import (
    activation,
    cdiv,
    config,
    device,
    dot_precision,
    empty_image,
    empty_of_size,
    in_format_of,
    launch,
    pixels,
    power_of_2,
    round_up,
    vector,
)
from .patch import patch_arguments, patch_depth, patch_product, patch_rows
from .pconv import convolve, convolve_into, place, taps_of

PROGRAMS = 4  # for each multiprocessor, of a grid that walks over pixels
# In the interpreter one tile holds all columns: its time goes by the operation, not by the element.
ALL_COLUMNS = triton.knobs.runtime.interpret
MOST_ELEMENTS = 2**20  # of a tensor in Triton
MOST_COLUMNS = 2**10


# ---- Tiles ---------------------------------------------------------------------------------------


def block(size: int, most: int, rows: int = MOST_COLUMNS) -> int:
    """A power of two for ``size`` columns of a tile: the widest up to ``most``, or 64 for 128 where
    it leaves fewer columns computed in vain. ``rows``: most of the tile."""
    if ALL_COLUMNS:
        return power_of_2(min(size, MOST_ELEMENTS // rows))
    wide = min(most, power_of_2(size))
    return 64 if size > wide == 128 and cdiv(size, 64) % 2 == 1 else wide


def tiles(op: str, n: int, k: int, image: Tensor, dtype: torch.dtype) -> dict:
    """The tile of a product (pixels of ``image``, k) x (k, n), or for a weight's gradient n x k, as
    arguments of a launch: that of tuning/, no wider than it has to be."""
    tile = config(op, (n, k, rows_of(image)), dtype, device(image))
    most_n, most_k = tile["BLOCK_N"], tile["BLOCK_K"]
    if ALL_COLUMNS:
        most_n = most_k = MOST_COLUMNS
    return tile | {
        "BLOCK_N": power_of_2(min(n, most_n)),
        "BLOCK_K": power_of_2(min(k, most_k)),
    }


def persistent(t: Tensor, rows: int, block_m: int, others: int, least: int = 1) -> tuple[int, int]:
    """(programs, tiles of each, at least ``least``) that walk ``rows`` rows, beside ``others``
    programs on the same rows. It depends on shapes and the kind of device alone, so the order of
    every sum does."""
    count = cdiv(rows, block_m)
    per_program = cdiv(count, max(1, PROGRAMS * device(t).multiprocessors // others))
    per_program = max(per_program, min(count, least))
    return cdiv(count, per_program), per_program


def rows_of(t: Tensor) -> int:
    return t.shape[0] * t.shape[2] * t.shape[3]


def vectors(*ts: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in ts]


# ---- Kernels -------------------------------------------------------------------------------------


@triton.jit
def tile_of(N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first row, in 64 bits, columns) of this program's tile: those of the same rows run side by
    side, on one axis of the grid because the others end at 65535."""
    blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    start = tl.cast(tile // blocks, tl.int64) * BLOCK_M
    return start, tile % blocks * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def tile_range(program, rows, tiles_per_program, BLOCK_M: tl.constexpr):
    """(first, end) of the tiles of pixels that a program walks."""
    first = program * tiles_per_program
    return first, tl.minimum(first + tiles_per_program, (rows - 1) // BLOCK_M + 1)


@triton.jit
def store_and_join(
    z_ptr,
    acc,
    mean,
    m2,
    start,
    begin,
    inside,
    rows,
    local,
    n,
    N: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Stores the tile of z that begins at the row ``start``. (mean, m2) of the program's rows, the
    first of which is ``begin``, up to this tile's end, by those up to its start."""
    z = acc.to(z_ptr.dtype.element_ty)
    tl.store(
        z_ptr + start * N + local[:, None] * N + n[None, :],
        z,
        mask=inside[:, None] & (n < N)[None, :],
    )
    if STATS:
        stored = z.to(tl.float32)
        count = tl.minimum(rows - start, BLOCK_M).to(tl.float32)
        about = tl.sum(tl.where(inside[:, None], stored, 0.0), 0) / count
        about = about.to(z.dtype).to(tl.float32)  # then 16-bit values deviate from it exactly
        deviation = tl.where(inside[:, None], stored - about[None, :], 0.0)
        rest = tl.sum(deviation, 0) / count
        delta = about + rest - mean
        before = (start - begin).to(tl.float32)
        share = count / (before + count)
        m2 += tl.sum(deviation * deviation, 0) - rest * rest * count
        m2 += delta * delta * before * share
        mean += delta * share
    return mean, m2


@triton.jit
def store_statistics(partial_ptr, mean, m2, n, N: tl.constexpr):
    """A program's (mean, m2), for merge_statistics_kernel."""
    partial_ptr += tl.program_id(1) * 2 * N + n
    tl.store(partial_ptr, mean, mask=n < N)
    tl.store(partial_ptr + N, m2, mask=n < N)


@triton.jit
def pw_stats_kernel(
    x_ptr,
    u_ptr,
    taps_ptr,
    w_ptr,
    z_ptr,
    partial_ptr,
    rows,
    height,
    width,
    tiles_per_program,
    X_STEP: tl.constexpr,
    TAP_STEP: tl.constexpr,
    C: tl.constexpr,
    C_PARTIAL: tl.constexpr,
    C_OUT: tl.constexpr,
    HEAD: tl.constexpr,
    FUSED: tl.constexpr,
    STATS: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """z of tiles_per_program tiles of pixels and one block of outputs, and their (mean, m2).

    K has two segments, the first HEAD channels of u (made here if FUSED, else read) and those of x
    from there on: nothing is concatenated. Grid: (blocks of outputs, programs).
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    local = tl.arange(0, BLOCK_M)
    dtype = w_ptr.dtype.element_ty
    mean = tl.zeros((BLOCK_N,), tl.float32)
    m2 = tl.zeros((BLOCK_N,), tl.float32)
    first, end = tile_range(tl.program_id(1), rows, tiles_per_program, BLOCK_M)
    begin = tl.cast(first, tl.int64) * BLOCK_M
    for tile in range(first, end):
        start = tl.cast(tile, tl.int64) * BLOCK_M
        inside = local < rows - start
        x_tile = x_ptr + start * X_STEP
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if FUSED:
            row, column = place(start, local, height, width)
            p = tl.arange(0, BLOCK_P)
            head = convolve(
                x_tile, taps_ptr, local, inside, row, column, p, height, width, C, C_PARTIAL,
                X_STEP, TAP_STEP, BLOCK_M, BLOCK_P, BLOCK_P, VECTOR, PRECISION,
            ).to(dtype)  # fmt: skip
            if BLOCK_P > C_PARTIAL:
                own = tl.load(
                    x_tile + local[:, None] * X_STEP + p[None, :],
                    mask=inside[:, None] & (p < C)[None, :],
                    other=0.0,
                )
                head = tl.where((p < C_PARTIAL)[None, :], head, own.to(dtype))
            head_w = weight_tile(w_ptr, n, p, C_OUT, C, C)
            acc = tl.dot(head, head_w, acc, input_precision=PRECISION)
        else:
            u_tile = u_ptr + start * HEAD
            for k0 in range(0, HEAD, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                u = tl.load(
                    u_tile + local[:, None] * HEAD + k[None, :],
                    mask=inside[:, None] & (k < HEAD)[None, :],
                    other=0.0,
                )
                w = weight_tile(w_ptr, n, k, C_OUT, HEAD, C)
                acc = tl.dot(u, w, acc, input_precision=PRECISION)
        for k0 in range(HEAD, C, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_tile + local[:, None] * X_STEP + k[None, :],
                mask=inside[:, None] & (k < C)[None, :],
                other=0.0,
            )
            w = weight_tile(w_ptr, n, k, C_OUT, C, C)
            acc = tl.dot(x.to(dtype), w, acc, input_precision=PRECISION)

        mean, m2 = store_and_join(
            z_ptr, acc, mean, m2, start, begin, inside, rows, local, n, C_OUT, STATS, BLOCK_M
        )
    if STATS:
        store_statistics(partial_ptr, mean, m2, n, C_OUT)


@triton.jit
def patch_stats_kernel(
    x,
    w,
    z_ptr,
    partial_ptr,
    M,
    OH,
    OW,
    X_IMAGE,
    X_CHANNEL,
    X_ROW,
    tiles_per_program,
    N: tl.constexpr,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    X_COLUMN: tl.constexpr,
    W_STEP: tl.constexpr,
    GATHER: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As pw_stats_kernel, of patches: z is their product with w. Grid: (blocks of outputs,
    programs)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    local = tl.arange(0, BLOCK_M)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    m2 = tl.zeros((BLOCK_N,), tl.float32)
    first, end = tile_range(tl.program_id(1), M, tiles_per_program, BLOCK_M)
    begin = tl.cast(first, tl.int64) * BLOCK_M
    for tile in range(first, end):
        start = tl.cast(tile, tl.int64) * BLOCK_M
        inside = local < M - start
        acc = patch_product(
            x, w, start, local, inside, n, OH, OW, X_IMAGE, X_CHANNEL, X_ROW, N, C, KH, KW,
            X_COLUMN, W_STEP, GATHER, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        mean, m2 = store_and_join(
            z_ptr, acc, mean, m2, start, begin, inside, M, local, n, N, STATS, BLOCK_M
        )
    if STATS:
        store_statistics(partial_ptr, mean, m2, n, N)


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
        begin = s.to(tl.int64) * rows_per_program
        count = tl.minimum(rows - begin, rows_per_program).to(tl.float32)
        means = tl.load(partial_ptr + s * 2 * C_OUT, mask=there, other=0.0)
        total += tl.sum(tl.where(there, (means - about) * count, 0.0), 0)
    mean = about + (total / rows)[None, :]
    m2 = tl.zeros((BLOCK_N,), tl.float32)
    for s0 in range(0, programs, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)[:, None]
        there = keep & (s < programs)
        begin = s.to(tl.int64) * rows_per_program
        count = tl.minimum(rows - begin, rows_per_program).to(tl.float32)
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
    Z_STEP: tl.constexpr,
    C: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start, n = tile_of(C, BLOCK_M, BLOCK_N)
    local = tl.arange(0, BLOCK_M)[:, None]
    keep = (local < rows - start) & (n < C)[None, :]
    mean, scale, shift = load_vectors(mean_ptr, scale_ptr, shift_ptr, n, C)
    z = tl.load(z_ptr + start * Z_STEP + local * Z_STEP + n[None, :], mask=keep, other=0.0)
    _, t = normalise(z, mean, scale, shift)
    a = activation(t, ACT).to(a_ptr.dtype.element_ty)
    tl.store(a_ptr + start * C + local * C + n[None, :], a, mask=keep)


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
    X_STEP: tl.constexpr,
    Z_STEP: tl.constexpr,
    C: tl.constexpr,
    C_HIDDEN: tl.constexpr,
    ACT: tl.constexpr,
    HAS_X: tl.constexpr,
    HAS_LAYER: tl.constexpr,
    HAS_SAMPLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of y: the activation is made of z on its way to the tensor cores."""
    start, n = tile_of(C, BLOCK_M, BLOCK_N)
    local = tl.arange(0, BLOCK_M)
    inside = local < rows - start
    valid = inside[:, None]
    z_ptr += start * Z_STEP
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, C_HIDDEN, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        z = tl.load(
            z_ptr + local[:, None] * Z_STEP + k[None, :],
            mask=valid & (k < C_HIDDEN)[None, :],
            other=0.0,
        )
        mean, scale, shift = load_vectors(mean_ptr, scale_ptr, shift_ptr, k, C_HIDDEN)
        _, t = normalise(z, mean, scale, shift)
        w = weight_tile(w_ptr, n, k, C, C_HIDDEN, C_HIDDEN)
        acc = tl.dot(activation(t, ACT).to(w.dtype), w, acc, input_precision=PRECISION)
    if HAS_LAYER:
        acc *= tl.load(layer_ptr + n, mask=n < C, other=0.0).to(tl.float32)[None, :]
    if HAS_SAMPLE:
        sample = sample_of(start, local, image_pixels)
        scale = tl.load(sample_ptr + sample, mask=inside, other=0.0)
        acc *= scale.to(tl.float32)[:, None]
    keep = valid & (n < C)[None, :]
    if HAS_X:
        x_ptr += start * X_STEP
        x = tl.load(x_ptr + local[:, None] * X_STEP + n[None, :], mask=keep, other=0.0)
        acc += x.to(tl.float32)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + start * C + local[:, None] * C + n[None, :], y, mask=keep)


# ---- Launchers -----------------------------------------------------------------------------------


def convolved_head(x: Tensor, step: int, w_partial: Tensor) -> Tensor:
    """The first channels of pconv3x3(x) in the weight's dtype: the convolved ones, and x's up to a
    multiple of 16, so that what follows reads both at addresses fit for wide loads."""
    channels = min(x.shape[1], round_up(w_partial.shape[0], 16))
    u = empty_image(x, channels, w_partial.dtype)
    convolve_into(u, x, step, taps_of(w_partial))
    return u


def pconv_pointwise(
    x: Tensor, w_partial: Tensor, w_pw: Tensor, stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(z, mean, m2) with z channels_last; without ``stats`` z alone, of the same bits."""
    x, step = pixels(x)
    c, c_partial, c_out, dtype = x.shape[1], w_partial.shape[0], w_pw.shape[0], w_pw.dtype
    rows = rows_of(x)
    tile = tiles("pw_stats", c_out, c, x, dtype)
    blocks = cdiv(c_out, tile["BLOCK_N"])
    fused = c_out <= 256 and c_partial <= 64
    block_p = power_of_2(c_partial)
    u = None if fused else convolved_head(x, step, w_partial)
    taps = taps_of(w_partial) if fused else None
    programs, of_each = persistent(x, rows, tile["BLOCK_M"], blocks)
    z = empty_image(x, c_out, dtype)
    partial = x.new_empty((programs, 2, c_out), dtype=torch.float32) if stats else None
    launch(
        pw_stats_kernel,
        (blocks, programs),
        x_ptr=x,
        u_ptr=u,
        taps_ptr=taps,
        w_ptr=matrix(w_pw),
        z_ptr=z,
        partial_ptr=partial,
        rows=rows,
        height=x.shape[2],
        width=x.shape[3],
        tiles_per_program=of_each,
        X_STEP=step,
        TAP_STEP=taps.shape[2] if fused else 0,
        C=c,
        C_PARTIAL=c_partial,
        C_OUT=c_out,
        HEAD=block_p if fused else u.shape[1],
        FUSED=fused,
        STATS=stats,
        VECTOR=vector(x.dtype),
        PRECISION=dot_precision(dtype),
        BLOCK_P=block_p,
        **tile,
    )
    return z, *_merged(partial, rows, of_each * tile["BLOCK_M"])


def patch_convolved(
    x: Tensor, weight: Tensor, stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As :func:`pconv_pointwise`, with z the convolution of patches."""
    kh, kw = weight.shape[2:]
    arguments = patch_arguments(x, patch_rows(weight), kh, kw)
    c_out = weight.shape[0]
    z = empty_of_size(x, (c_out, arguments["OH"], arguments["OW"]), weight.dtype)
    rows = rows_of(z)
    tile = tiles("patch_stats", c_out, patch_depth(x.shape[1], kh, kw), z, weight.dtype)
    blocks = cdiv(c_out, tile["BLOCK_N"])
    programs, of_each = persistent(x, rows, tile["BLOCK_M"], blocks)
    partial = x.new_empty((programs, 2, c_out), dtype=torch.float32) if stats else None
    launch(
        patch_stats_kernel,
        (blocks, programs),
        **arguments,
        z_ptr=z,
        partial_ptr=partial,
        tiles_per_program=of_each,
        STATS=stats,
        **tile,
    )
    return z, *_merged(partial, rows, of_each * tile["BLOCK_M"])


def _merged(
    partial: Tensor | None, rows: int, rows_per_program: int
) -> tuple[Tensor | None, Tensor | None]:
    """(mean, m2) of all ``rows``, from those of each program."""
    if partial is None:
        return None, None
    programs, _, c_out = partial.shape
    mean, m2 = (partial.new_empty(c_out) for _ in range(2))
    block_n = block(c_out, 16)
    launch(
        merge_statistics_kernel,
        (cdiv(c_out, block_n),),
        partial_ptr=partial,
        mean_ptr=mean,
        m2_ptr=m2,
        programs=programs,
        rows=rows,
        rows_per_program=rows_per_program,
        C_OUT=c_out,
        BLOCK_S=64,
        BLOCK_N=block_n,
        num_warps=4,
        num_stages=3,
    )
    return mean, m2


def pw_stats(x: Tensor, w_partial: Tensor, w_pw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See the module. z in the memory format that x suggests, mean and m2 in float32."""
    if x.numel() == 0:
        return reference.pw_stats(x, w_partial, w_pw)
    z, mean, m2 = pconv_pointwise(x, w_partial, w_pw, stats=True)
    return in_format_of(z, x), mean, m2


def patch_stats(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See the module. z channels_last, mean and m2 in float32."""
    if x.numel() == 0:
        return reference.patch_stats(x, weight)
    return patch_convolved(x, weight, stats=True)


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
        (cdiv(c, block_n) * cdiv(rows, block_m),),
        z_ptr=source,
        mean_ptr=mean,
        scale_ptr=scale,
        shift_ptr=shift,
        a_ptr=a,
        rows=rows,
        Z_STEP=step,
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
    y = empty_image(x, x.shape[1], torch.promote_types(x.dtype, z.dtype))
    project(y, x, z, mean, scale, shift, w_pw2, layer_scale, sample_scale, act)
    return in_format_of(y, x)


def project(
    y: Tensor,
    x: Tensor | None,
    z: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    w_pw2: Tensor,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    act: str,
) -> None:
    """Writes act_pw_residual to the channels_last ``y``, without x the branch alone."""
    (x, x_step), (z, z_step) = (None, 0) if x is None else pixels(x), pixels(z)
    mean, scale, shift, layer, sample = vectors(mean, scale, shift, layer_scale, sample_scale)
    c, c_hidden, rows = y.shape[1], z.shape[1], rows_of(z)
    tile = tiles("act_pw_residual", c, c_hidden, z, w_pw2.dtype)
    launch(
        act_pw_residual_kernel,
        (cdiv(c, tile["BLOCK_N"]) * cdiv(rows, tile["BLOCK_M"]),),
        x_ptr=x,
        z_ptr=z,
        mean_ptr=mean,
        scale_ptr=scale,
        shift_ptr=shift,
        w_ptr=matrix(w_pw2),
        layer_ptr=layer,
        sample_ptr=sample,
        y_ptr=y,
        rows=rows,
        image_pixels=z.shape[2] * z.shape[3],
        X_STEP=x_step,
        Z_STEP=z_step,
        C=c,
        C_HIDDEN=c_hidden,
        ACT=act,
        HAS_X=x is not None,
        HAS_LAYER=layer is not None,
        HAS_SAMPLE=sample is not None,
        PRECISION=dot_precision(w_pw2.dtype),
        **tile,
    )


KERNELS = {
    "pw_stats": pw_stats,
    "patch_stats": patch_stats,
    "bn_act": bn_act,
    "act_pw_residual": act_pw_residual,
}
