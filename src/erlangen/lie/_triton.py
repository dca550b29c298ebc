"""Lie attention on CUDA in Triton: the mathematics of `_tiled`, in float32, for the groups with formulas of their own.

A program takes a block of poses and a few heads, and walks over the poses they meet. Geometry is computed pair by pair
with broadcasts, never by expanding products, and once for the heads of a program where they share their poses: its 30
to 60 operations a pair are as many as those of a head of width 32 itself, so that four heads a program leave out about
a third of all arithmetic. The forward pass is that of FlashAttention-2 (Dao, arXiv 2307.08691): a running maximum, and
the logarithm of each row's normaliser kept. The backward pass computes the weights anew, in one pass for the queries
and one for the keys. Nothing is added atomically: what several programs contribute (poses that heads share, the scale)
comes out as one part a program and is summed by torch, so results repeat bit by bit.

Left undone: for self-attention the scores are symmetric, which `_tiled` uses and this does not.

What has run: all of it in Triton's interpreter, on CPU (TRITON_INTERPRET=1), against the float64 reference; and Triton
compiles it for compute capability 8.0 and 9.0. It has not run on a GPU yet, and the sizes of its blocks are chosen by
the registers that the assembler reports, not by timing.

The kernels are plain functions until the first call hands them to ``triton.jit``, so that importing this module does
not import Triton. Products and exponentials take what the interpreter has too; the arc sine is in the polynomials of
`_geometry`.

Shape suffixes: B batch, H heads, G heads of the geometry, N queries, M keys, D width of a value, E width of a content
key, K blocks of the algebra, P numbers a packed pose. In kernels, n and m are a block of queries and one of keys.
"""

import importlib.util
import math
import os
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._base import Group
from ._geometry import _Plane, _plane_polynomial, _Space, _space_polynomial, _Vectors, pair_geometry
from .groups import parse

if TYPE_CHECKING:
    import triton.language as tl  # pyrefly: ignore[missing-import]

_KERNELS: list[Any] = []


def _kernel(function: Any) -> Any:
    _KERNELS.append(function)
    return function


@cache
def _load() -> None:
    """Make every kernel one of ``triton.jit``. They see `tl`, and one another, through the names of this module."""
    import triton  # pyrefly: ignore[missing-import]

    globals()["tl"] = triton.language
    for function in _KERNELS:
        globals()[function.__name__] = triton.jit(function)


# Geometry. VECTORS is the number of coordinates of a translation, ANGLES 0, 2 or 3 the dimension that is rotated.


@_kernel
def _numbers(pointer, at, inside, stride, NUM: "tl.constexpr", AXIS: "tl.constexpr"):
    """The numbers of a block of packed poses, each with an axis for its partners."""
    numbers = ()
    for p in tl.static_range(NUM):
        x = tl.load(pointer + p * stride + at, mask=inside, other=0.0)
        numbers = numbers + (tl.expand_dims(x, AXIS),)  # noqa: RUF005
    return numbers


@_kernel
def _polynomial(COEFFICIENTS: "tl.constexpr", x):
    """By Horner's scheme."""
    NUM: "tl.constexpr" = len(COEFFICIENTS)
    result = x * COEFFICIENTS[NUM - 1] + COEFFICIENTS[NUM - 2]
    for i in tl.static_range(NUM - 2):
        result = result * x + COEFFICIENTS[NUM - 3 - i]
    return result


@_kernel
def _differences(q, k, FIRST: "tl.constexpr", VECTORS: "tl.constexpr", DISPLACED: "tl.constexpr"):
    """t_j − t_i, less the offset where there is one."""
    d = ()
    for c in tl.static_range(VECTORS):
        x = k[FIRST + c] - q[FIRST + c]
        if DISPLACED:
            x -= q[FIRST + VECTORS + c]
        d = d + (x,)  # noqa: RUF005
    return d


@_kernel
def _dot(a, b, NUM: "tl.constexpr"):
    result = a[0] * b[0]
    for c in tl.static_range(1, NUM):
        result += a[c] * b[c]
    return result


@_kernel
def _norms(
    q, k, ANGLES: "tl.constexpr", VECTORS: "tl.constexpr", DISPLACED: "tl.constexpr", POLYNOMIAL: "tl.constexpr"
):
    """As `PairGeometry.norms`: an array for each block of the algebra, and what `_pair_gradients` needs."""
    if ANGLES == 0:
        d = _differences(q, k, 0, VECTORS, DISPLACED)
        arrays = (_dot(d, d, VECTORS),)
        saved = (d,)
    elif ANGLES == 2:
        turn = k[0] - q[0]
        turn -= tl.floor(turn + 0.5)
        x = turn * turn
        if VECTORS == 0:
            arrays = (x,)
            saved = (turn,)
        else:
            d = _differences(q, k, 1, VECTORS, DISPLACED)
            square = _dot(d, d, VECTORS)
            stretch = _polynomial(POLYNOMIAL, x)
            arrays = (x, square * stretch)
            saved = (turn, x, d, square, stretch)
    else:
        w = q[0] * k[0] + q[1] * k[1] + q[2] * k[2] + q[3] * k[3]
        m = (
            q[0] * k[1] - q[1] * k[0] + q[2] * k[3] - q[3] * k[2],
            q[0] * k[2] - q[2] * k[0] + q[3] * k[1] - q[1] * k[3],
            q[0] * k[3] - q[3] * k[0] + q[1] * k[2] - q[2] * k[1],
        )
        cosine = tl.abs(w) + 1.0
        y = _dot(m, m, 3) / cosine
        series = _polynomial(POLYNOMIAL, y)
        ratio = y * series + 1.0
        if VECTORS == 0:
            arrays = (y * ratio,)
            saved = (w, m, cosine, y, series, ratio)
        else:
            d = _differences(q, k, 4, VECTORS, DISPLACED)
            square = _dot(d, d, 3)
            along = _dot(m, d, 3)
            rest = 1.0 / (2.0 - y)
            stretch = ratio * rest
            bend = (series + 0.5) * rest * rest
            arrays = (y * ratio, square * stretch - along * along * bend)
            saved = (w, m, cosine, y, series, ratio, d, square, along, rest, stretch, bend)
    return arrays, saved


@_kernel
def _scaled(a, by, NUM: "tl.constexpr"):
    result = ()
    for c in tl.static_range(NUM):
        result = result + (a[c] * by,)  # noqa: RUF005
    return result


@_kernel
def _combined(a, by_a, b, by_b, NUM: "tl.constexpr"):
    result = ()
    for c in tl.static_range(NUM):
        result = result + (a[c] * by_a + b[c] * by_b,)  # noqa: RUF005
    return result


@_kernel
def _pair_gradients(saved, grads, ANGLES: "tl.constexpr", VECTORS: "tl.constexpr", SLOPE: "tl.constexpr"):
    """From gradients of the arrays to those, for each pair, of the difference of angles, or w and m; and of d."""
    if ANGLES == 0:
        result = _scaled(saved[0], 2.0 * grads[0], VECTORS)
    elif ANGLES == 2:
        turn = saved[0]
        if VECTORS == 0:
            result = (2.0 * turn * grads[0],)
        else:
            x, d, square, stretch = saved[1], saved[2], saved[3], saved[4]
            grad_x = grads[0] + square * grads[1] * _polynomial(SLOPE, x)
            result = (2.0 * turn * grad_x,) + _scaled(d, 2.0 * stretch * grads[1], VECTORS)  # noqa: RUF005
    else:
        w, m, cosine, y, series, ratio = saved[0], saved[1], saved[2], saved[3], saved[4], saved[5]
        slope = _polynomial(SLOPE, y)
        bent = series + y * slope
        grad_y = (ratio + y * bent) * grads[0]
        if VECTORS > 0:
            d, square, along, rest, stretch, bend = saved[6], saved[7], saved[8], saved[9], saved[10], saved[11]
            grad_y += square * grads[1] * (bent + ratio * rest) * rest
            grad_y -= along * along * grads[1] * (slope * rest * rest + 2.0 * bend * rest)
        grad_y = grad_y / cosine
        grad_w = tl.where(w < 0, y * grad_y, -y * grad_y)
        if VECTORS == 0:
            result = (grad_w,) + _scaled(m, 2.0 * grad_y, 3)  # noqa: RUF005
        else:
            grad_along = -2.0 * along * bend * grads[1]
            grad_m = _combined(m, 2.0 * grad_y, d, grad_along, 3)
            grad_d = _combined(d, 2.0 * stretch * grads[1], m, grad_along, 3)
            result = (grad_w,) + grad_m + grad_d  # noqa: RUF005
    return result


@_kernel
def _to_query(g, k, ANGLES: "tl.constexpr", VECTORS: "tl.constexpr"):
    """Gradients of the packed queries, without those of an offset, which are the same as the translations'."""
    result = ()
    if ANGLES == 2:
        result = (-tl.sum(g[0], 1),)
    elif ANGLES == 3:
        result = (
            tl.sum(g[0] * k[0] + g[1] * k[1] + g[2] * k[2] + g[3] * k[3], 1),
            tl.sum(g[0] * k[1] - g[1] * k[0] - g[2] * k[3] + g[3] * k[2], 1),
            tl.sum(g[0] * k[2] + g[1] * k[3] - g[2] * k[0] - g[3] * k[1], 1),
            tl.sum(g[0] * k[3] - g[1] * k[2] + g[2] * k[1] - g[3] * k[0], 1),
        )
    FIRST: "tl.constexpr" = len(g) - VECTORS
    for c in tl.static_range(VECTORS):
        result = result + (-tl.sum(g[FIRST + c], 1),)  # noqa: RUF005
    return result


@_kernel
def _to_key(g, q, ANGLES: "tl.constexpr", VECTORS: "tl.constexpr"):
    """Gradients of the packed keys."""
    result = ()
    if ANGLES == 2:
        result = (tl.sum(g[0], 0),)
    elif ANGLES == 3:
        result = (
            tl.sum(g[0] * q[0] - g[1] * q[1] - g[2] * q[2] - g[3] * q[3], 0),
            tl.sum(g[0] * q[1] + g[1] * q[0] + g[2] * q[3] - g[3] * q[2], 0),
            tl.sum(g[0] * q[2] - g[1] * q[3] + g[2] * q[0] + g[3] * q[1], 0),
            tl.sum(g[0] * q[3] + g[1] * q[2] - g[2] * q[1] + g[3] * q[0], 0),
        )
    FIRST: "tl.constexpr" = len(g) - VECTORS
    for c in tl.static_range(VECTORS):
        result = result + (tl.sum(g[FIRST + c], 0),)  # noqa: RUF005
    return result


# Attention


@_kernel
def _block(pointer, at, num, width, WIDTH: "tl.constexpr"):
    """Rows of a matrix [num, width], zeros beyond it."""
    column = tl.arange(0, WIDTH)
    inside = (at < num)[:, None] & (column < width)[None, :]
    return tl.load(pointer + at.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0)


@_kernel
def _store_block(pointer, block, at, num, width, WIDTH: "tl.constexpr"):
    column = tl.arange(0, WIDTH)
    inside = (at < num)[:, None] & (column < width)[None, :]
    tl.store(pointer + at.to(tl.int64)[:, None] * width + column[None, :], block, mask=inside)


@_kernel
def _place(pid, num_blocks, num_heads, HEADS: "tl.constexpr"):
    """Which block of poses, batch entry and first head a program has."""
    groups = num_heads // HEADS
    rest = (pid // num_blocks).to(tl.int64)
    return pid % num_blocks, rest // groups, rest % groups * HEADS


@_kernel
def _scores(
    arrays, scale, content_query, content_key, mask, batch, head, num_heads, n, m, N, M, E, root,
    mask_b, mask_h, mask_n, mask_m,
    MASKED: "tl.constexpr", CAUSAL: "tl.constexpr", WIDTH_E: "tl.constexpr",
):  # fmt: skip
    """Scores of one head for a tile, −∞ where a pair may not attend."""
    K: "tl.constexpr" = len(arrays)
    scores = arrays[0] * -tl.load(scale + head * K)
    for k in tl.static_range(1, K):
        scores -= arrays[k] * tl.load(scale + head * K + k)
    if WIDTH_E > 0:
        a = _block(content_query + (batch * num_heads + head) * N * E, n, N, E, WIDTH_E)
        b = _block(content_key + (batch * num_heads + head) * M * E, m, M, E, WIDTH_E)
        scores += tl.dot(a, tl.trans(b), input_precision="ieee") * root
    allowed = (n < N)[:, None] & (m < M)[None, :]
    if MASKED:
        at = n.to(tl.int64)[:, None] * mask_n + m.to(tl.int64)[None, :] * mask_m
        allowed &= tl.load(mask + batch * mask_b + head * mask_h + at, mask=allowed, other=0) != 0
    if CAUSAL:
        allowed &= m[None, :] <= n[:, None] + (M - N)
    return tl.where(allowed, scores, -float("inf"))


@_kernel
def _forward_kernel(
    query, key, scale, value, content_query, content_key, mask, output, log_sum,
    num_heads, N, M, D, E, root, mask_b, mask_h, mask_n, mask_m,
    PQ: "tl.constexpr", PK: "tl.constexpr", SHARED: "tl.constexpr",
    ANGLES: "tl.constexpr", VECTORS: "tl.constexpr", POLYNOMIAL: "tl.constexpr", SLOPE: "tl.constexpr",
    MASKED: "tl.constexpr", CAUSAL: "tl.constexpr", HEADS: "tl.constexpr",
    WIDTH_D: "tl.constexpr", WIDTH_E: "tl.constexpr", BLOCK_N: "tl.constexpr", BLOCK_M: "tl.constexpr",
):  # fmt: skip
    block, batch, first = _place(tl.program_id(0), tl.cdiv(N, BLOCK_N), num_heads, HEADS)
    poses = batch if SHARED else batch * num_heads + first
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    q = _numbers(query + poses * PQ * N, n, n < N, N, PQ, 1)
    top = ()
    total = ()
    part = ()
    for _ in tl.static_range(HEADS):
        top = top + (tl.full([BLOCK_N], -float("inf"), tl.float32),)  # noqa: RUF005
        total = total + (tl.zeros([BLOCK_N], tl.float32),)  # noqa: RUF005
        part = part + (tl.zeros([BLOCK_N, WIDTH_D], tl.float32),)  # noqa: RUF005
    end = M
    if CAUSAL:
        end = tl.minimum(M, tl.maximum(0, (block + 1) * BLOCK_N + M - N))
    for start in range(0, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        k = _numbers(key + poses * PK * M, m, m < M, M, PK, 0)
        arrays, _ = _norms(q, k, ANGLES, VECTORS, PQ > PK, POLYNOMIAL)
        tops = ()
        totals = ()
        parts = ()
        for h in tl.static_range(HEADS):
            scores = _scores(
                arrays, scale, content_query, content_key, mask, batch, first + h, num_heads, n, m, N, M, E, root,
                mask_b, mask_h, mask_n, mask_m, MASKED, CAUSAL, WIDTH_E,
            )  # fmt: skip
            high = tl.maximum(top[h], tl.max(scores, 1))
            finite = tl.where(high == -float("inf"), 0.0, high)
            weights = tl.exp(scores - finite[:, None])
            decay = tl.exp(top[h] - finite)
            v = _block(value + (batch * num_heads + first + h) * M * D, m, M, D, WIDTH_D)
            tops = tops + (high,)  # noqa: RUF005
            totals = totals + (total[h] * decay + tl.sum(weights, 1),)  # noqa: RUF005
            parts = parts + (part[h] * decay[:, None] + tl.dot(weights, v, input_precision="ieee"),)  # noqa: RUF005
        top = tops
        total = totals
        part = parts
    for h in tl.static_range(HEADS):
        at = batch * num_heads + first + h
        empty = total[h] == 0.0
        divisor = tl.where(empty, 1.0, total[h])
        _store_block(output + at * N * D, part[h] / divisor[:, None], n, N, D, WIDTH_D)
        tl.store(log_sum + at * N + n, tl.where(empty, float("inf"), top[h] + tl.log(divisor)), mask=n < N)


@_kernel
def _score_gradients(
    scores, value, grad, log_sum, dot, at, n, m, N, M, D, WIDTH_D: "tl.constexpr"
):  # fmt: skip
    """Weights of one head for a tile, the gradients of its scores, and those of its output."""
    g = _block(grad + at * N * D, n, N, D, WIDTH_D)
    v = _block(value + at * M * D, m, M, D, WIDTH_D)
    weights = tl.exp(scores - tl.load(log_sum + at * N + n, mask=n < N, other=float("inf"))[:, None])
    less = tl.load(dot + at * N + n, mask=n < N, other=0.0)[:, None]
    return weights, weights * (tl.dot(g, tl.trans(v), input_precision="ieee") - less), g


@_kernel
def _add(a, b):
    NUM: "tl.constexpr" = len(a)
    result = ()
    for i in tl.static_range(NUM):
        result = result + (a[i] + b[i],)  # noqa: RUF005
    return result


@_kernel
def _query_kernel(
    query, key, scale, value, content_query, content_key, mask, grad, log_sum, dot,
    grad_query, grad_scale, grad_content,
    num_heads, N, M, D, E, root, mask_b, mask_h, mask_n, mask_m,
    PQ: "tl.constexpr", PK: "tl.constexpr", SHARED: "tl.constexpr",
    ANGLES: "tl.constexpr", VECTORS: "tl.constexpr", POLYNOMIAL: "tl.constexpr", SLOPE: "tl.constexpr",
    MASKED: "tl.constexpr", CAUSAL: "tl.constexpr", HEADS: "tl.constexpr", NEED_POSES: "tl.constexpr",
    WIDTH_D: "tl.constexpr", WIDTH_E: "tl.constexpr", BLOCK_N: "tl.constexpr", BLOCK_M: "tl.constexpr",
):  # fmt: skip
    """Gradients of queries [B, H / HEADS, PQ, N], of the scale [B, blocks, H, K], and of query contents."""
    K: "tl.constexpr" = (ANGLES > 0) + (VECTORS > 0)
    num_blocks = tl.cdiv(N, BLOCK_N)
    block, batch, first = _place(tl.program_id(0), num_blocks, num_heads, HEADS)
    poses = batch if SHARED else batch * num_heads + first
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    q = _numbers(query + poses * PQ * N, n, n < N, N, PQ, 1)
    to_poses = ()
    if NEED_POSES:
        for _ in tl.static_range(PK):
            to_poses = to_poses + (tl.zeros([BLOCK_N], tl.float32),)  # noqa: RUF005
    to_scale = ()
    for _ in tl.static_range(HEADS * K):
        to_scale = to_scale + (tl.zeros([BLOCK_N], tl.float32),)  # noqa: RUF005
    to_content = ()
    if WIDTH_E > 0:
        for _ in tl.static_range(HEADS):
            to_content = to_content + (tl.zeros([BLOCK_N, WIDTH_E], tl.float32),)  # noqa: RUF005
    end = M
    if CAUSAL:
        end = tl.minimum(M, tl.maximum(0, (block + 1) * BLOCK_N + M - N))
    for start in range(0, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        k = _numbers(key + poses * PK * M, m, m < M, M, PK, 0)
        arrays, saved = _norms(q, k, ANGLES, VECTORS, PQ > PK, POLYNOMIAL)
        to_norms = ()
        for _ in tl.static_range(K):
            to_norms = to_norms + (tl.zeros([BLOCK_N, BLOCK_M], tl.float32),)  # noqa: RUF005
        scales = ()
        contents = ()
        for h in tl.static_range(HEADS):
            at = batch * num_heads + first + h
            scores = _scores(
                arrays, scale, content_query, content_key, mask, batch, first + h, num_heads, n, m, N, M, E, root,
                mask_b, mask_h, mask_n, mask_m, MASKED, CAUSAL, WIDTH_E,
            )  # fmt: skip
            _, to_scores, _ = _score_gradients(scores, value, grad, log_sum, dot, at, n, m, N, M, D, WIDTH_D)
            more = ()
            for a in tl.static_range(K):
                scales = scales + (tl.sum(to_scores * arrays[a], 1),)  # noqa: RUF005
                more = more + (to_scores * -tl.load(scale + (first + h) * K + a),)  # noqa: RUF005
            to_norms = _add(to_norms, more)
            if WIDTH_E > 0:
                b = _block(content_key + at * M * E, m, M, E, WIDTH_E)
                contents = contents + (tl.dot(to_scores, b, input_precision="ieee"),)  # noqa: RUF005
        to_scale = _add(to_scale, scales)
        if WIDTH_E > 0:
            to_content = _add(to_content, contents)
        if NEED_POSES:
            pairs = _pair_gradients(saved, to_norms, ANGLES, VECTORS, SLOPE)
            to_poses = _add(to_poses, _to_query(pairs, k, ANGLES, VECTORS))
    if NEED_POSES:
        target = grad_query + (batch * (num_heads // HEADS) + first // HEADS) * PQ * N + n
        for p in tl.static_range(PK):
            tl.store(target + p * N, to_poses[p], mask=n < N)
        if PQ > PK:
            for p in tl.static_range(VECTORS):
                tl.store(target + (PK + p) * N, to_poses[PK - VECTORS + p], mask=n < N)
    for h in tl.static_range(HEADS):
        for a in tl.static_range(K):
            place = ((batch * num_blocks + block) * num_heads + first + h) * K + a
            tl.store(grad_scale + place, -tl.sum(to_scale[h * K + a], 0))
        if WIDTH_E > 0:
            _store_block(grad_content + (batch * num_heads + first + h) * N * E, to_content[h] * root, n, N, E, WIDTH_E)


@_kernel
def _key_kernel(
    query, key, scale, value, content_query, content_key, mask, grad, log_sum, dot,
    grad_key, grad_value, grad_content,
    num_heads, N, M, D, E, root, mask_b, mask_h, mask_n, mask_m,
    PQ: "tl.constexpr", PK: "tl.constexpr", SHARED: "tl.constexpr",
    ANGLES: "tl.constexpr", VECTORS: "tl.constexpr", POLYNOMIAL: "tl.constexpr", SLOPE: "tl.constexpr",
    MASKED: "tl.constexpr", CAUSAL: "tl.constexpr", HEADS: "tl.constexpr", NEED_POSES: "tl.constexpr",
    WIDTH_D: "tl.constexpr", WIDTH_E: "tl.constexpr", BLOCK_N: "tl.constexpr", BLOCK_M: "tl.constexpr",
):  # fmt: skip
    """Gradients of keys [B, H / HEADS, PK, M], of values, and of key contents."""
    K: "tl.constexpr" = (ANGLES > 0) + (VECTORS > 0)
    block, batch, first = _place(tl.program_id(0), tl.cdiv(M, BLOCK_M), num_heads, HEADS)
    poses = batch if SHARED else batch * num_heads + first
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k = _numbers(key + poses * PK * M, m, m < M, M, PK, 0)
    to_poses = ()
    if NEED_POSES:
        for _ in tl.static_range(PK):
            to_poses = to_poses + (tl.zeros([BLOCK_M], tl.float32),)  # noqa: RUF005
    to_value = ()
    for _ in tl.static_range(HEADS):
        to_value = to_value + (tl.zeros([BLOCK_M, WIDTH_D], tl.float32),)  # noqa: RUF005
    to_content = ()
    if WIDTH_E > 0:
        for _ in tl.static_range(HEADS):
            to_content = to_content + (tl.zeros([BLOCK_M, WIDTH_E], tl.float32),)  # noqa: RUF005
    begin = 0
    if CAUSAL:
        begin = tl.maximum(0, block * BLOCK_M - (M - N)) // BLOCK_N * BLOCK_N
    for start in range(begin, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        q = _numbers(query + poses * PQ * N, n, n < N, N, PQ, 1)
        arrays, saved = _norms(q, k, ANGLES, VECTORS, PQ > PK, POLYNOMIAL)
        to_norms = ()
        for _ in tl.static_range(K):
            to_norms = to_norms + (tl.zeros([BLOCK_N, BLOCK_M], tl.float32),)  # noqa: RUF005
        values = ()
        contents = ()
        for h in tl.static_range(HEADS):
            at = batch * num_heads + first + h
            scores = _scores(
                arrays, scale, content_query, content_key, mask, batch, first + h, num_heads, n, m, N, M, E, root,
                mask_b, mask_h, mask_n, mask_m, MASKED, CAUSAL, WIDTH_E,
            )  # fmt: skip
            weights, to_scores, g = _score_gradients(scores, value, grad, log_sum, dot, at, n, m, N, M, D, WIDTH_D)
            values = values + (tl.dot(tl.trans(weights), g, input_precision="ieee"),)  # noqa: RUF005
            if NEED_POSES:
                more = ()
                for a in tl.static_range(K):
                    more = more + (to_scores * -tl.load(scale + (first + h) * K + a),)  # noqa: RUF005
                to_norms = _add(to_norms, more)
            if WIDTH_E > 0:
                a = _block(content_query + at * N * E, n, N, E, WIDTH_E)
                contents = contents + (tl.dot(tl.trans(to_scores), a, input_precision="ieee"),)  # noqa: RUF005
        to_value = _add(to_value, values)
        if WIDTH_E > 0:
            to_content = _add(to_content, contents)
        if NEED_POSES:
            pairs = _pair_gradients(saved, to_norms, ANGLES, VECTORS, SLOPE)
            to_poses = _add(to_poses, _to_key(pairs, q, ANGLES, VECTORS))
    if NEED_POSES:
        target = grad_key + (batch * (num_heads // HEADS) + first // HEADS) * PK * M + m
        for p in tl.static_range(PK):
            tl.store(target + p * M, to_poses[p], mask=m < M)
    for h in tl.static_range(HEADS):
        at = batch * num_heads + first + h
        _store_block(grad_value + at * M * D, to_value[h], m, M, D, WIDTH_D)
        if WIDTH_E > 0:
            _store_block(grad_content + at * M * E, to_content[h] * root, m, M, E, WIDTH_E)
