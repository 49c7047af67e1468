"""Linear layers, fused with the norm before them and the operation on their outputs."""

# ruff: noqa: N803 - constexpr parameters are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl

from neo_export.kernels.programs.shared import (
    arrived_last,
    let_next_begin,
    moments,
    wait_for_earlier,
)

__all__ = ["project"]


@triton.jit
def _tile(
    weight, n, k, end, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, BY_INPUT: tl.constexpr
):
    """Weights [n, k] with k < `end`, as stored; `k` counts halves, bytes, or 4-bit pairs."""
    stride: tl.constexpr = K // 2 if BITS == 4 else K
    inside = (n < N)[:, None] & (k < tl.minimum(end, stride))[None, :]
    if BY_INPUT:
        return tl.load(weight + k[None, :] * N + n[:, None], mask=inside, other=0)
    return tl.load(weight + n[:, None] * stride + k[None, :], mask=inside, other=0)


@triton.jit
def _scales(
    scales, n, start, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr
):
    """Scales of a tile whose inputs begin at `start`, float32 [n, BLOCK_K / GROUP]."""
    g = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
    inside = (n < N)[:, None] & (g < K // GROUP)[None, :]
    return tl.load(scales + n[:, None] * (K // GROUP) + g[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def _weighed(x, scale, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """`x` [n, k] with each element times the scale of its group."""
    blocks: tl.constexpr = BLOCK_K // GROUP
    width: tl.constexpr = x.shape[1] // blocks
    by_block = tl.reshape(x, [BLOCK_N, blocks, width]) * scale[:, :, None]
    return tl.reshape(by_block, [BLOCK_N, x.shape[1]])


@triton.jit
def _inputs(x, r, k, rows, mean, spread, gamma, beta, K: tl.constexpr, NORM: tl.constexpr):
    """Inputs `k` of the rows `r`, float32 [r, k]; with `NORM` (one row only) normalized."""
    if r.shape[0] == 1:  # one-dimensional, or it would be loaded once per output
        found = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    else:
        inside = (r < rows)[:, None] & (k < K)[None, :]
        found = tl.load(x + r[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.load(gamma + k, mask=k < K, other=0.0).to(tl.float32)
        shift = tl.load(beta + k, mask=k < K, other=0.0).to(tl.float32)
        found = (found - mean) * spread * scale[None, :] + shift[None, :]
    return found


@triton.jit
def _finish(
    y,
    r,
    n,
    rows,
    bias,
    out,
    keys,
    values,
    position_ids,
    length,
    N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    END: tl.constexpr,
):
    """Apply the operation `END` to the sums `y` [r, n] and store the result. See `project`."""
    inside = (r < rows)[:, None] & (n < N)[None, :]
    if END == "qkv":
        width: tl.constexpr = N // 3
        tl.store(out + r[:, None] * width + n[None, :], y, mask=inside & (n < width)[None, :])
        position = tl.load(position_ids + r, mask=r < rows, other=0)
        part = n % width
        row_start = r.to(tl.int64)[:, None] * (width // HEAD_DIM) + (part // HEAD_DIM)[None, :]
        place = (row_start * length + position[:, None]) * HEAD_DIM + (part % HEAD_DIM)[None, :]
        half = y.to(keys.dtype.element_ty)
        tl.store(keys + place, half, mask=inside & ((n >= width) & (n < 2 * width))[None, :])
        tl.store(values + place, half, mask=inside & (n >= 2 * width)[None, :])
    else:
        place = r[:, None] * N + n[None, :]
        if END != "logits":
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if END == "gelu":  # GPT-Neo's gelu_new: tanh(z) = 2 sigmoid(2z) - 1
            y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
        if END == "residual":
            y += tl.load(out + place, mask=inside, other=0.0)
        tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def project(
    x,
    weight,
    scales,
    gamma,
    beta,
    bias,
    out,
    keys,
    values,
    position_ids,
    parts,
    counters,
    rows,
    length,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BY_INPUT: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    END: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A linear layer with the operations before and after it. Grid: (ceil(N / BLOCK_N), SPLITS).

    weight      BITS 16: half, [K, N] with BY_INPUT, else [N, K]. BITS 8 and 4: MatMulNBits's
                uint8 [N, K / GROUP, GROUP * BITS / 8] with `scales` [N, K / GROUP]; the zero point
                is 2^(BITS - 1)
    x           half [rows, K]; with NORM (ROWS 1 only) the residual stream, to be normalized
    END         "qkv": queries to `out`, float32; keys and values to the cache, half [rows, heads,
                length, HEAD_DIM], at each row's position. "residual": sums plus `bias`, added to
                `out`, float32. "gelu": GELU of the sums plus `bias` to `out`, half. "logits": sums
                to `out`, float32
    parts       float32 [ceil(N / BLOCK_N), SPLITS, ROWS, BLOCK_N]
    counters    int32 [ceil(N / BLOCK_N)]

    One row is multiplied elementwise as the weights arrive; several rows use the tensor cores.
    """
    let_next_begin(PDL)
    column, split = tl.program_id(0), tl.program_id(1)
    n, r = column * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, ROWS)
    span: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    step: tl.constexpr = BLOCK_K // 2 if BITS == 4 else BLOCK_K
    begin = split * span
    k, last = tl.arange(0, step), (begin + span) * step // BLOCK_K
    tile = _tile(weight, n, begin * step // BLOCK_K + k, last, N, K, BITS, BY_INPUT)
    wait_for_earlier(PDL)
    mean, spread = 0.0, 0.0
    if NORM:
        h = tl.arange(0, WIDTH_BLOCK)
        mean, spread = moments(tl.load(x + h, mask=h < K, other=0.0), h, K, EPSILON)
    if ROWS == 1:
        sums = tl.zeros([BLOCK_N, step], tl.float32)
    else:
        sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(begin, begin + span, BLOCK_K):
        now = tile
        # Prefetch the next tile while this one is used.
        then = (start + BLOCK_K) * step // BLOCK_K + k
        tile = _tile(weight, n, then, last, N, K, BITS, BY_INPUT)
        if BITS == 4:
            even = _inputs(x, r, start + 2 * k, rows, mean, spread, gamma, beta, K, NORM)
            odd = _inputs(x, r, start + 2 * k + 1, rows, mean, spread, gamma, beta, K, NORM)
            low, high = (now & 15).to(tl.float32) - 8.0, (now >> 4).to(tl.float32) - 8.0
            scale = _scales(scales, n, start, N, K, BLOCK_K, GROUP)
            if ROWS == 1:
                sums += _weighed(even * low + odd * high, scale, BLOCK_N, BLOCK_K, GROUP)
            else:
                half = x.dtype.element_ty
                low = _weighed(low, scale, BLOCK_N, BLOCK_K, GROUP).to(half)
                high = _weighed(high, scale, BLOCK_N, BLOCK_K, GROUP).to(half)
                sums += tl.dot(even.to(half), tl.trans(low))
                sums += tl.dot(odd.to(half), tl.trans(high))
        else:
            given = _inputs(x, r, start + k, rows, mean, spread, gamma, beta, K, NORM)
            number = now.to(tl.float32)
            if BITS == 8:
                scale = _scales(scales, n, start, N, K, BLOCK_K, GROUP)
                number = _weighed(number - 128.0, scale, BLOCK_N, BLOCK_K, GROUP)
            if ROWS == 1:
                sums += given * number
            else:
                half = x.dtype.element_ty
                sums += tl.dot(given.to(half), tl.trans(number.to(half)))
    if ROWS == 1:  # noqa: SIM108 - different shapes: Triton needs an if statement
        total = tl.sum(sums, 1)[None, :]
    else:
        total = sums
    if SPLITS == 1:
        _finish(total, r, n, rows, bias, out, keys, values, position_ids, length, N, HEAD_DIM, END)
    else:
        c = tl.arange(0, BLOCK_N)
        part = parts + column * SPLITS * ROWS * BLOCK_N + r[:, None] * BLOCK_N + c[None, :]
        tl.store(part + split * ROWS * BLOCK_N, total)
        if arrived_last(counters + column, SPLITS):
            whole = tl.zeros([ROWS, BLOCK_N], tl.float32)
            for other in range(SPLITS):
                whole += tl.load(part + other * ROWS * BLOCK_N, cache_modifier=".cg")
            _finish(
                whole, r, n, rows, bias, out, keys, values, position_ids, length, N, HEAD_DIM, END
            )
            tl.store(counters + column, 0)
