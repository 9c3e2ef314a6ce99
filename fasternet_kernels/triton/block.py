"""PConv with the 1x1 convolution behind it, and the whole FasterNet block.

    u = x with u[:, :Cp] = conv3x3(x[:, :Cp])        a = act((u W1^T) * scale + shift)
    y = x + sample_scale * layer_scale * (a W2^T)

Fused (``block_kernel``, ``pconv_pw_kernel``): a program has BLOCK_M pixels. It convolves their
first channels, puts the result in place of x's, and keeps u as a tuple of matrix operands whose
widths cover C with little waste: the first is the next power of two of C_partial, so that u and x
meet inside of it, and no product is computed on masked channels. Then it goes over the hidden
channels, BLOCK_H at a time: product, scale, shift, activation, and for the block the second product
onto accumulators as wide as C. So x is read once (taps and residual hit the caches), y written
once, and nothing else crosses memory: 2 * C elements a pixel, and the weights once. But each
program reads the weights again through L2: 4 * C * C_hidden * BLOCK_M FLOPs for 2 * C * C_hidden
weights.

Split (``gemm_kernel``), where a program's accumulators would not fit into registers (large C) or
where there are too few pixels to give every multiprocessor a program: PConv to a scratch, then each
1x1 convolution as a product cut in both directions. The hidden tensor crosses memory.

Which of the two, and the tiles, are in tuning/. The residual is added in float32 before the one
rounding at the end; u and a are rounded to the weights' dtype, as operands have to be.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    activation,
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
    pixels,
    power_of_2,
    round_up,
    rounded_act,
    vector,
    zero_pieces,
)
from .pconv import convolve, convolve_into, place, taps_of

# ---- Device functions ----------------------------------------------------------------------------


@triton.jit
def weight_tile(w, n, k, N: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr):
    """The (k, n) tile of the weight of N rows of K."""
    mask = (n < N)[:, None] & (k < K)[None, :]
    return tl.trans(tl.load(w + n[:, None] * STEP + k[None, :], mask=mask, other=0.0))


@triton.jit
def mixed_operands(
    x,
    taps,
    rows,
    inside,
    row,
    column,
    H,
    W,
    C: tl.constexpr,
    CP: tl.constexpr,
    STEP: tl.constexpr,
    TAP_STEP: tl.constexpr,
    K_WIDTHS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_TAP: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """u of BLOCK_M pixels: a tuple of operands as wide as K_WIDTHS say."""
    dtype = taps.dtype.element_ty
    k = piece_columns(K_WIDTHS, 0)
    acc = convolve(
        x, taps, rows, inside, row, column, k, H, W, C, CP, STEP, TAP_STEP,
        BLOCK_M, K_WIDTHS[0], BLOCK_TAP, VECTOR, PRECISION,
    )  # fmt: skip
    operands = ()
    for i in tl.static_range(len(K_WIDTHS)):
        k = piece_columns(K_WIDTHS, i)
        if i == 0 and K_WIDTHS[0] == CP:
            own = acc.to(dtype)
        else:
            mask = inside[:, None] & (k < C)[None, :]
            own = tl.load(x + rows[:, None] * STEP + k[None, :], mask=mask, other=0.0).to(dtype)
            if i == 0:
                own = tl.where((k < CP)[None, :], acc.to(dtype), own)
        operands = operands + (own,)
    return operands


@triton.jit
def hidden_tile(
    operands,
    w1,
    scale,
    shift,
    n,
    C: tl.constexpr,
    CH: tl.constexpr,
    W1_STEP: tl.constexpr,
    K_WIDTHS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """act((u W1^T) * scale + shift) for the hidden channels ``n``, in float32."""
    z = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for i in tl.static_range(len(K_WIDTHS)):
        w = weight_tile(w1, n, piece_columns(K_WIDTHS, i), CH, C, W1_STEP)
        z = tl.dot(operands[i], w, z, input_precision=PRECISION)
    return epilogue(z, scale, shift, n, CH, ACT)


@triton.jit
def epilogue(z, scale, shift, n, N: tl.constexpr, ACT: tl.constexpr):
    """act(z * scale + shift), for vectors or None over columns ``n``."""
    if scale is not None:
        z *= tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        z += tl.load(shift + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return activation(z, ACT)


@triton.jit
def sample_of(first, rows, HW):
    """The images of the pixels first + rows: 64 bits for the first, 32 for the others."""
    return first // HW + ((first % HW).to(tl.int32) + rows) // HW


@triton.jit
def add_residual(
    acc,
    x,
    layer_scale,
    sample_scale,
    first,
    rows,
    inside,
    n,
    HW,
    STEP: tl.constexpr,
    C: tl.constexpr,
):
    """x + sample_scale * layer_scale * acc in float32 for the pixels first + rows, channels ``n``;
    ``x`` points at the first, the scales may be None."""
    if layer_scale is not None:
        acc *= tl.load(layer_scale + n, mask=n < C, other=0.0).to(tl.float32)[None, :]
    if sample_scale is not None:
        sample = sample_of(first, rows, HW)
        acc *= tl.load(sample_scale + sample, mask=inside, other=0.0).to(tl.float32)[:, None]
    mask = inside[:, None] & (n < C)[None, :]
    own = tl.load(x + rows[:, None] * STEP + n[None, :], mask=mask, other=0.0)
    return own.to(tl.float32) + acc


# ---- Fused kernels -------------------------------------------------------------------------------


@triton.jit
def pconv_pw_kernel(
    x,
    taps,
    w1,
    scale,
    shift,
    a,
    M,
    H,
    W,
    C: tl.constexpr,
    CP: tl.constexpr,
    CH: tl.constexpr,
    STEP: tl.constexpr,
    TAP_STEP: tl.constexpr,
    W1_STEP: tl.constexpr,
    K_WIDTHS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_TAP: tl.constexpr,
    VECTOR: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a = act((u W1^T) * scale + shift). Grid: (tiles of pixels,)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    inside = rows < M - first
    row, column = place(first, rows, H, W)
    operands = mixed_operands(
        x + first * STEP, taps, rows, inside, row, column, H, W, C, CP, STEP, TAP_STEP,
        K_WIDTHS, BLOCK_M, BLOCK_TAP, VECTOR, PRECISION,
    )  # fmt: skip
    a += first * CH
    for h in range(0, CH, BLOCK_H):
        n = h + tl.arange(0, BLOCK_H)
        z = hidden_tile(
            operands, w1, scale, shift, n, C, CH, W1_STEP, K_WIDTHS, BLOCK_M, BLOCK_H, ACT,
            PRECISION,
        )  # fmt: skip
        tl.store(
            a + rows[:, None] * CH + n[None, :],
            z.to(a.dtype.element_ty),
            mask=inside[:, None] & (n < CH)[None, :],
        )


@triton.jit
def block_kernel(
    x,
    taps,
    w1,
    w2,
    scale,
    shift,
    layer_scale,
    sample_scale,
    y,
    M,
    H,
    W,
    C: tl.constexpr,
    CP: tl.constexpr,
    CH: tl.constexpr,
    STEP: tl.constexpr,
    TAP_STEP: tl.constexpr,
    W1_STEP: tl.constexpr,
    W2_STEP: tl.constexpr,
    K_WIDTHS: tl.constexpr,
    N_WIDTHS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_TAP: tl.constexpr,
    VECTOR: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The block. Grid: (tiles of pixels,)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    inside = rows < M - first
    row, column = place(first, rows, H, W)
    x += first * STEP
    operands = mixed_operands(
        x, taps, rows, inside, row, column, H, W, C, CP, STEP, TAP_STEP, K_WIDTHS, BLOCK_M,
        BLOCK_TAP, VECTOR, PRECISION,
    )  # fmt: skip
    acc = zero_pieces(BLOCK_M, N_WIDTHS)
    for h in range(0, CH, BLOCK_H):
        hidden = h + tl.arange(0, BLOCK_H)
        z = hidden_tile(
            operands, w1, scale, shift, hidden, C, CH, W1_STEP, K_WIDTHS, BLOCK_M, BLOCK_H, ACT,
            PRECISION,
        )  # fmt: skip
        a = z.to(w2.dtype.element_ty)
        new = ()
        for i in tl.static_range(len(N_WIDTHS)):
            w = weight_tile(w2, piece_columns(N_WIDTHS, i), hidden, C, CH, W2_STEP)
            new = new + (tl.dot(a, w, acc[i], input_precision=PRECISION),)
        acc = new

    y += first * C
    for i in tl.static_range(len(N_WIDTHS)):
        n = piece_columns(N_WIDTHS, i)
        mask = inside[:, None] & (n < C)[None, :]
        result = add_residual(
            acc[i], x, layer_scale, sample_scale, first, rows, inside, n, H * W, STEP, C
        )
        tl.store(y + rows[:, None] * C + n[None, :], result.to(y.dtype.element_ty), mask=mask)


# ---- Split ---------------------------------------------------------------------------------------


@triton.jit
def gemm_kernel(
    head,
    tail,
    w,
    scale,
    shift,
    x,
    layer_scale,
    sample_scale,
    y,
    M,
    HW,
    N: tl.constexpr,
    K: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = act((A w^T) * scale + shift), or x + sample_scale * layer_scale * (A w^T) if there is x.

    The first HEAD columns of A, all or a multiple of BLOCK_K, are those of ``head``, the others
    those of ``tail``, which has all. Grid: (tiles of pixels * tiles of N,), those of N first.
    """
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = (tl.program_id(0) // TILES_N).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    inside = rows < M - first
    n = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = w.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HEAD > 0:
        head += first * HEAD
        for k0 in range(0, HEAD, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            mask = inside[:, None] & (k < HEAD)[None, :]
            a = tl.load(head + rows[:, None] * HEAD + k[None, :], mask=mask, other=0.0)
            tile = weight_tile(w, n, k, N, K, W_STEP)
            acc = tl.dot(a.to(dtype), tile, acc, input_precision=PRECISION)
    if HEAD < K:
        tail += first * TAIL_STEP
        for k0 in range(HEAD, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            mask = inside[:, None] & (k < K)[None, :]
            a = tl.load(tail + rows[:, None] * TAIL_STEP + k[None, :], mask=mask, other=0.0)
            tile = weight_tile(w, n, k, N, K, W_STEP)
            acc = tl.dot(a.to(dtype), tile, acc, input_precision=PRECISION)
    mask = inside[:, None] & (n < N)[None, :]
    if x is None:
        acc = epilogue(acc, scale, shift, n, N, ACT)
    else:
        acc = add_residual(
            acc, x + first * STEP, layer_scale, sample_scale, first, rows, inside, n, HW, STEP, N
        )
    y += first * N
    tl.store(y + rows[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), mask=mask)


def gemm(
    y: Tensor,
    a: Tensor,
    a_step: int,
    w: Tensor,
    k: int,
    *,
    head: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "identity",
    x: Tensor | None = None,
    step: int = 0,
    layer_scale: Tensor | None = None,
    sample_scale: Tensor | None = None,
    pixels_per_sample: int = 1,
) -> None:
    """Launches :func:`gemm_kernel`.

    Args:
        y: the output, dense rows of N.
        a: rows of ``k``, ``a_step`` apart; the first columns may be ``head``'s instead.
        w: (N, at least k), dense.
        head: dense rows of the first columns.
        x, step: the residual and the distance of its rows.
    """
    n = w.shape[0]
    m = y.numel() // n
    cfg = config("gemm", (n, k, m), w.dtype, device(y))
    launch(
        gemm_kernel,
        (cdiv(n, cfg["BLOCK_N"]) * cdiv(m, cfg["BLOCK_M"]),),
        head=head,
        tail=a,
        w=w,
        scale=scale,
        shift=shift,
        x=x,
        layer_scale=layer_scale,
        sample_scale=sample_scale,
        y=y,
        M=m,
        HW=pixels_per_sample,
        N=n,
        K=k,
        HEAD=0 if head is None else head.shape[1],
        TAIL_STEP=a_step,
        W_STEP=w.shape[1],
        STEP=step,
        BLOCK_M=cfg["BLOCK_M"],
        BLOCK_N=cfg["BLOCK_N"],
        BLOCK_K=cfg["BLOCK_K"],
        ACT=rounded_act(act, w.dtype),
        PRECISION=dot_precision(w.dtype),
        num_warps=cfg["num_warps"],
        num_stages=cfg["num_stages"],
    )


# ---- Launchers -----------------------------------------------------------------------------------
# Weights arrive as the kernels read them: taps as taps_of() makes them, w1 and w2 as matrices of
# rows that may be padded.


def _fused_config(op: str, x: Tensor, taps: Tensor, c_hidden: int) -> dict | None:
    """The configuration of the fused kernel, or None if the split one is better: where the table
    says so for that width, or fewer than half of the multiprocessors would have a program."""
    batch, channels, height, width = x.shape
    m = batch * height * width
    on = device(x)
    cfg = config(op, (channels, c_hidden, m), taps.dtype, on)
    if channels > cfg["most_channels"]:
        return None
    return None if 2 * cdiv(m, cfg["BLOCK_M"]) < on.multiprocessors else cfg


def _fused_arguments(x: Tensor, step: int, taps: Tensor, w1: Tensor, cfg: dict) -> dict:
    batch, channels, height, width = x.shape
    c_partial = taps.shape[1]
    first = power_of_2(c_partial)
    return {
        "x": x,
        "taps": taps,
        "w1": w1,
        "M": batch * height * width,
        "H": height,
        "W": width,
        "C": channels,
        "CP": c_partial,
        "CH": w1.shape[0],
        "STEP": step,
        "TAP_STEP": taps.shape[2],
        "W1_STEP": w1.shape[1],
        "K_WIDTHS": pieces(channels, first=first),
        "BLOCK_M": cfg["BLOCK_M"],
        "BLOCK_H": cfg["BLOCK_H"],
        "BLOCK_TAP": min(first, cfg["BLOCK_TAP"]),
        "VECTOR": vector(x.dtype),
        "PRECISION": dot_precision(w1.dtype),
        "num_warps": cfg["num_warps"],
        "num_stages": cfg["num_stages"],
    }


def _split_pconv_pw(a: Tensor, x: Tensor, step: int, taps, w1, scale, shift, act: str) -> None:
    channels, c_partial = x.shape[1], taps.shape[1]
    # The scratch holds whole steps of the product's loop, so that none has columns of both.
    m = a.numel() // a.shape[1]
    step_k = config("gemm", (a.shape[1], channels, m), w1.dtype, device(x))["BLOCK_K"]
    u = empty_image(x, min(round_up(c_partial, step_k), channels), w1.dtype)
    convolve_into(u, x, step, taps)
    gemm(a, x, step, w1, channels, head=u, scale=scale, shift=shift, act=act)


def pconv_pw_prepared(x, taps, w1, scale, shift, act: str) -> Tensor:
    pixel_x, step = pixels(x)
    a = empty_image(x, w1.shape[0], w1.dtype)
    cfg = _fused_config("pconv_pw", x, taps, w1.shape[0])
    if cfg is None:
        _split_pconv_pw(a, pixel_x, step, taps, w1, scale, shift, act)
    else:
        batch, _, height, width = x.shape
        launch(
            pconv_pw_kernel,
            (cdiv(batch * height * width, cfg["BLOCK_M"]),),
            **_fused_arguments(pixel_x, step, taps, w1, cfg),
            scale=scale,
            shift=shift,
            a=a,
            ACT=rounded_act(act, w1.dtype),
        )
    return in_format_of(a, x)


def block_prepared(x, taps, w1, w2, scale, shift, layer_scale, sample_scale, act: str) -> Tensor:
    pixel_x, step = pixels(x)
    batch, channels, height, width = x.shape
    y = empty_image(x, channels, torch.promote_types(x.dtype, w1.dtype))
    cfg = _fused_config("block", x, taps, w1.shape[0])
    if cfg is None:
        c_hidden = w1.shape[0]
        a = empty_image(x, c_hidden, w1.dtype)
        _split_pconv_pw(a, pixel_x, step, taps, w1, scale, shift, act)
        gemm(
            y, a, c_hidden, w2, c_hidden, x=pixel_x, step=step, layer_scale=layer_scale,
            sample_scale=sample_scale, pixels_per_sample=height * width,
        )  # fmt: skip
    else:
        launch(
            block_kernel,
            (cdiv(batch * height * width, cfg["BLOCK_M"]),),
            **_fused_arguments(pixel_x, step, taps, w1, cfg),
            w2=w2,
            scale=scale,
            shift=shift,
            layer_scale=layer_scale,
            sample_scale=sample_scale,
            y=y,
            W2_STEP=w2.shape[1],
            N_WIDTHS=pieces(channels),
            ACT=rounded_act(act, w1.dtype),
        )
    return in_format_of(y, x)


def matrix(weight: Tensor) -> Tensor:
    """A 1x1 or linear weight as dense rows."""
    check_weight(weight)
    return weight.reshape(weight.shape[0], -1).contiguous()


def pconv_pw(x, w_partial, w_pw, scale, shift, act: str, fast: bool = False) -> Tensor:
    return pconv_pw_prepared(x, taps_of(w_partial), matrix(w_pw), scale, shift, act)


def block(
    x,
    w_partial,
    w_pw1,
    w_pw2,
    scale,
    shift,
    layer_scale,
    sample_scale,
    act: str,
    fast: bool = False,
) -> Tensor:
    return block_prepared(
        x, taps_of(w_partial), matrix(w_pw1), matrix(w_pw2), scale, shift, layer_scale,
        sample_scale, act,
    )  # fmt: skip


KERNELS = {"pconv_pw": pconv_pw, "block": block}
