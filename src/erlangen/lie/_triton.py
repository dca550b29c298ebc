"""Lie attention on CUDA in Triton: the mathematics of `_tiled`, in float32, for the groups with formulas of their own.

A program takes a block of poses and one or two heads, and walks over the poses they meet. The geometry of a pair comes
from broadcasts, never from expanded products, and once for the heads of a program that share their poses. For SE(3) it
takes some 80 operations, as many as a head of width 32 does beside it: two heads a program save a quarter of the
forward pass, all of eight would save nearly half, but the registers do not hold their outputs. The forward pass is that
of FlashAttention-2 (Dao, arXiv 2307.08691): a running maximum, and the logarithm of each row's normaliser kept. The
backward pass computes the weights anew, once for the queries and once for the keys. Nothing is added atomically: what
several programs contribute (to poses that heads share, to the scale) comes out in parts that torch sums, so that
results repeat bit by bit.

Left undone: for self-attention the scores are symmetric, which `_tiled` uses and this does not; mean tangent vectors;
skipping; products of groups.

What has run: all of it in Triton's interpreter, on CPU (TRITON_INTERPRET=1), against the float64 reference; and Triton
3.5 and 3.9 compile it for compute capability 8.0, 3.9 for 9.0 too. It has not run on a GPU yet: the sizes of blocks
come from the registers that the assembler reports (none spilt at width 32, a few at 64), not from timing, and products
with values are true float32 ("ieee"), without tensor cores.

The kernels are plain functions until the first call hands them to ``triton.jit``, so that importing this module does
not import Triton. They keep to what the interpreter has too.

Shape suffixes: B batch, H heads, G heads of the geometry, N queries, M keys, D width of a value, E width of a content
key, K blocks of the algebra, P numbers a packed pose. In kernels, n and m are a block of queries and one of keys.
"""

# ruff: noqa: RUF005 (Triton adds tuples; it knows no stars)

from __future__ import annotations  # what kernels are annotated with is not there until the first call

import importlib.util
import math
import os
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._base import Group
from ._geometry import _Plane, _Space, _Vectors, pair_geometry
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
def _numbers(pointer, at, inside, stride, NUM: tl.constexpr, AXIS: tl.constexpr):
    """The numbers of a block of packed poses, each with an axis for its partners."""
    numbers = ()
    for p in tl.static_range(NUM):
        x = tl.load(pointer + p * stride + at, mask=inside, other=0.0)
        numbers = numbers + (tl.expand_dims(x, AXIS),)
    return numbers


@_kernel
def _full(NUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WITH: tl.constexpr):
    """As many blocks, or vectors without columns, of one number."""
    if COLUMNS == 0:
        one = tl.full([ROWS], WITH, tl.float32)
    else:
        one = tl.full([ROWS, COLUMNS], WITH, tl.float32)
    result = ()
    for _i in tl.static_range(NUM):
        result = result + (one,)
    return result


@_kernel
def _polynomial(COEFFICIENTS: tl.constexpr, x):
    """By Horner's scheme."""
    NUM: tl.constexpr = len(COEFFICIENTS)
    result = x * COEFFICIENTS[NUM - 1] + COEFFICIENTS[NUM - 2]
    for i in tl.static_range(NUM - 2):
        result = result * x + COEFFICIENTS[NUM - 3 - i]
    return result


@_kernel
def _differences(q, k, FIRST: tl.constexpr, VECTORS: tl.constexpr, DISPLACED: tl.constexpr):
    """t_j − t_i, less the offset where there is one."""
    d = ()
    for c in tl.static_range(VECTORS):
        x = k[FIRST + c] - q[FIRST + c]
        if DISPLACED:
            x -= q[FIRST + VECTORS + c]
        d = d + (x,)
    return d


@_kernel
def _dot(a, b, NUM: tl.constexpr):
    result = a[0] * b[0]
    for c in tl.static_range(1, NUM):
        result += a[c] * b[c]
    return result


@_kernel
def _norms(q, k, ANGLES: tl.constexpr, VECTORS: tl.constexpr, DISPLACED: tl.constexpr, POLYNOMIAL: tl.constexpr):
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
            over = 1.0 / (2.0 - y)
            stretch = ratio * over
            bend = (series + 0.5) * over * over
            arrays = (y * ratio, square * stretch - along * along * bend)
            saved = (w, m, cosine, y, series, ratio, d, square, along, over, stretch, bend)
    return arrays, saved


@_kernel
def _scaled(a, by, NUM: tl.constexpr):
    result = ()
    for c in tl.static_range(NUM):
        result = result + (a[c] * by,)
    return result


@_kernel
def _combined(a, by_a, b, by_b, NUM: tl.constexpr):
    result = ()
    for c in tl.static_range(NUM):
        result = result + (a[c] * by_a + b[c] * by_b,)
    return result


@_kernel
def _pair_gradients(saved, grads, ANGLES: tl.constexpr, VECTORS: tl.constexpr, SLOPE: tl.constexpr):
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
            result = (2.0 * turn * grad_x,) + _scaled(d, 2.0 * stretch * grads[1], VECTORS)
    else:
        w, m, cosine, y, series, ratio = saved[0], saved[1], saved[2], saved[3], saved[4], saved[5]
        slope = _polynomial(SLOPE, y)
        bent = series + y * slope
        grad_y = (ratio + y * bent) * grads[0]
        if VECTORS == 0:
            grad_y = grad_y / cosine
            rest = _scaled(m, 2.0 * grad_y, 3)
        else:
            d, square, along, over, stretch, bend = saved[6], saved[7], saved[8], saved[9], saved[10], saved[11]
            grad_y += square * grads[1] * (bent + ratio * over) * over
            grad_y -= along * along * grads[1] * (slope * over * over + 2.0 * bend * over)
            grad_y = grad_y / cosine
            grad_along = -2.0 * along * bend * grads[1]
            rest = _combined(m, 2.0 * grad_y, d, grad_along, 3)
            rest = rest + _combined(d, 2.0 * stretch * grads[1], m, grad_along, 3)
        result = (tl.where(w < 0, y * grad_y, -y * grad_y),) + rest
    return result


@_kernel
def _to_query(g, k, ANGLES: tl.constexpr, VECTORS: tl.constexpr):
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
    FIRST: tl.constexpr = len(g) - VECTORS
    for c in tl.static_range(VECTORS):
        result = result + (-tl.sum(g[FIRST + c], 1),)
    return result


@_kernel
def _to_key(g, q, ANGLES: tl.constexpr, VECTORS: tl.constexpr):
    """Gradients of the packed keys, from a tile whose rows are keys."""
    result = ()
    if ANGLES == 2:
        result = (tl.sum(g[0], 1),)
    elif ANGLES == 3:
        result = (
            tl.sum(g[0] * q[0] - g[1] * q[1] - g[2] * q[2] - g[3] * q[3], 1),
            tl.sum(g[0] * q[1] + g[1] * q[0] + g[2] * q[3] - g[3] * q[2], 1),
            tl.sum(g[0] * q[2] - g[1] * q[3] + g[2] * q[0] + g[3] * q[1], 1),
            tl.sum(g[0] * q[3] + g[1] * q[2] - g[2] * q[1] + g[3] * q[0], 1),
        )
    FIRST: tl.constexpr = len(g) - VECTORS
    for c in tl.static_range(VECTORS):
        result = result + (tl.sum(g[FIRST + c], 1),)
    return result


# Attention


@_kernel
def _block(pointer, at, num, width, WIDTH: tl.constexpr):
    """Rows of a matrix [num, width], zeros beyond it."""
    column = tl.arange(0, WIDTH)
    inside = (at < num)[:, None] & (column < width)[None, :]
    return tl.load(pointer + at.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0)


@_kernel
def _store_block(pointer, block, at, num, width, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    inside = (at < num)[:, None] & (column < width)[None, :]
    tl.store(pointer + at.to(tl.int64)[:, None] * width + column[None, :], block, mask=inside)


@_kernel
def _place(pid, num_blocks, num_heads, HEADS: tl.constexpr):
    """Which block of poses, batch entry and first head a program has."""
    groups = num_heads // HEADS
    rest = (pid // num_blocks).to(tl.int64)
    return pid % num_blocks, rest // groups, rest % groups * HEADS


@_kernel
def _products(a, b, BY_KEY: tl.constexpr):
    """Of each row of queries with each row of keys."""
    if BY_KEY:
        result = tl.dot(b, tl.trans(a), input_precision="ieee")
    else:
        result = tl.dot(a, tl.trans(b), input_precision="ieee")
    return result


@_kernel
def _scores(
    arrays, scale, content_query, content_key, mask, batch, head, num_heads, n, m, N, M, E, root,
    mask_b, mask_h, mask_n, mask_m,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WIDTH_E: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """Scores of one head for a tile, −∞ where a pair may not attend. Rows are queries, or keys with ``BY_KEY``."""
    K: tl.constexpr = len(arrays)
    scores = arrays[0] * -tl.load(scale + head * K)
    for k in tl.static_range(1, K):
        scores -= arrays[k] * tl.load(scale + head * K + k)
    if WIDTH_E > 0:
        a = _block(content_query + (batch * num_heads + head) * N * E, n, N, E, WIDTH_E)
        b = _block(content_key + (batch * num_heads + head) * M * E, m, M, E, WIDTH_E)
        scores += _products(a, b, BY_KEY) * root
    i = tl.expand_dims(n, 0 if BY_KEY else 1)
    j = tl.expand_dims(m, 1 if BY_KEY else 0)
    allowed = (i < N) & (j < M)
    if MASKED:
        at = i.to(tl.int64) * mask_n + j.to(tl.int64) * mask_m
        allowed &= tl.load(mask + batch * mask_b + head * mask_h + at, mask=allowed, other=0) != 0
    if CAUSAL:
        allowed &= j <= i + (M - N)
    return tl.where(allowed, scores, -float("inf"))


@_kernel
def _forward_kernel(
    query, key, scale, value, content_query, content_key, mask, output, log_sum,
    num_heads, N, M, D, E, root, mask_b, mask_h, mask_n, mask_m,
    PQ: tl.constexpr, PK: tl.constexpr, SHARED: tl.constexpr,
    ANGLES: tl.constexpr, VECTORS: tl.constexpr, POLYNOMIAL: tl.constexpr, SLOPE: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HEADS: tl.constexpr,
    WIDTH_D: tl.constexpr, WIDTH_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    block, batch, first = _place(tl.program_id(0), tl.cdiv(N, BLOCK_N), num_heads, HEADS)
    poses = batch if SHARED else batch * num_heads + first
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    q = _numbers(query + poses * PQ * N, n, n < N, N, PQ, 1)
    top = _full(HEADS, BLOCK_N, 0, -float("inf"))
    total = _full(HEADS, BLOCK_N, 0, 0.0)
    part = _full(HEADS, BLOCK_N, WIDTH_D, 0.0)
    end = M
    if CAUSAL:
        end = tl.minimum(M, tl.maximum(0, (block + 1) * BLOCK_N + M - N))
    for start in range(0, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        k = _numbers(key + poses * PK * M, m, m < M, M, PK, 0)
        arrays = _norms(q, k, ANGLES, VECTORS, PQ > PK, POLYNOMIAL)[0]
        tops = ()
        totals = ()
        parts = ()
        for h in tl.static_range(HEADS):
            scores = _scores(
                arrays, scale, content_query, content_key, mask, batch, first + h, num_heads, n, m, N, M, E, root,
                mask_b, mask_h, mask_n, mask_m, MASKED, CAUSAL, WIDTH_E, False,
            )  # fmt: skip
            high = tl.maximum(top[h], tl.max(scores, 1))
            finite = tl.where(high == -float("inf"), 0.0, high)
            weights = tl.exp(scores - finite[:, None])
            decay = tl.exp(top[h] - finite)
            v = _block(value + (batch * num_heads + first + h) * M * D, m, M, D, WIDTH_D)
            tops = tops + (high,)
            totals = totals + (total[h] * decay + tl.sum(weights, 1),)
            parts = parts + (part[h] * decay[:, None] + tl.dot(weights, v, input_precision="ieee"),)
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
    scores, value, grad, log_sum, dot, at, n, m, N, M, D, WIDTH_D: tl.constexpr, BY_KEY: tl.constexpr
):  # fmt: skip
    """Weights of one head for a tile, the gradients of its scores, and those of its output."""
    g = _block(grad + at * N * D, n, N, D, WIDTH_D)
    v = _block(value + at * M * D, m, M, D, WIDTH_D)
    total = tl.load(log_sum + at * N + n, mask=n < N, other=float("inf"))
    less = tl.load(dot + at * N + n, mask=n < N, other=0.0)
    weights = tl.exp(scores - tl.expand_dims(total, 0 if BY_KEY else 1))
    return weights, weights * (_products(g, v, BY_KEY) - tl.expand_dims(less, 0 if BY_KEY else 1)), g


@_kernel
def _add(a, b):
    NUM: tl.constexpr = len(a)
    result = ()
    for i in tl.static_range(NUM):
        result = result + (a[i] + b[i],)
    return result


@_kernel
def _query_kernel(
    query, key, scale, value, content_query, content_key, mask, grad, log_sum, dot,
    grad_query, grad_scale, grad_content,
    num_heads, N, M, D, E, root, mask_b, mask_h, mask_n, mask_m,
    PQ: tl.constexpr, PK: tl.constexpr, SHARED: tl.constexpr,
    ANGLES: tl.constexpr, VECTORS: tl.constexpr, POLYNOMIAL: tl.constexpr, SLOPE: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HEADS: tl.constexpr, NEED_POSES: tl.constexpr,
    WIDTH_D: tl.constexpr, WIDTH_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradients of queries [B, H / HEADS, PQ, N], of the scale [B, blocks, H, K], and of query contents."""
    K: tl.constexpr = (ANGLES > 0) + (VECTORS > 0)
    num_blocks = tl.cdiv(N, BLOCK_N)
    block, batch, first = _place(tl.program_id(0), num_blocks, num_heads, HEADS)
    poses = batch if SHARED else batch * num_heads + first
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    q = _numbers(query + poses * PQ * N, n, n < N, N, PQ, 1)
    to_poses = _full(PK, BLOCK_N, 0, 0.0)
    to_scale = _full(HEADS * K, BLOCK_N, 0, 0.0)
    to_content = _full(HEADS if WIDTH_E > 0 else 0, BLOCK_N, WIDTH_E, 0.0)
    end = M
    if CAUSAL:
        end = tl.minimum(M, tl.maximum(0, (block + 1) * BLOCK_N + M - N))
    for start in range(0, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        k = _numbers(key + poses * PK * M, m, m < M, M, PK, 0)
        arrays, saved = _norms(q, k, ANGLES, VECTORS, PQ > PK, POLYNOMIAL)
        to_norms = _full(K, BLOCK_N, BLOCK_M, 0.0)
        scales = ()
        contents = ()
        for h in tl.static_range(HEADS):
            at = batch * num_heads + first + h
            scores = _scores(
                arrays, scale, content_query, content_key, mask, batch, first + h, num_heads, n, m, N, M, E, root,
                mask_b, mask_h, mask_n, mask_m, MASKED, CAUSAL, WIDTH_E, False,
            )  # fmt: skip
            to_scores = _score_gradients(scores, value, grad, log_sum, dot, at, n, m, N, M, D, WIDTH_D, False)[1]
            more = ()
            for a in tl.static_range(K):
                scales = scales + (tl.sum(to_scores * arrays[a], 1),)
                more = more + (to_scores * -tl.load(scale + (first + h) * K + a),)
            to_norms = _add(to_norms, more)
            if WIDTH_E > 0:
                c = _block(content_key + at * M * E, m, M, E, WIDTH_E)
                contents = contents + (tl.dot(to_scores, c, input_precision="ieee"),)
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
    PQ: tl.constexpr, PK: tl.constexpr, SHARED: tl.constexpr,
    ANGLES: tl.constexpr, VECTORS: tl.constexpr, POLYNOMIAL: tl.constexpr, SLOPE: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HEADS: tl.constexpr, NEED_POSES: tl.constexpr,
    WIDTH_D: tl.constexpr, WIDTH_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradients of keys [B, H / HEADS, PK, M], of values, and of key contents."""
    K: tl.constexpr = (ANGLES > 0) + (VECTORS > 0)
    block, batch, first = _place(tl.program_id(0), tl.cdiv(M, BLOCK_M), num_heads, HEADS)
    poses = batch if SHARED else batch * num_heads + first
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k = _numbers(key + poses * PK * M, m, m < M, M, PK, 1)
    to_poses = _full(PK, BLOCK_M, 0, 0.0)
    to_value = _full(HEADS, BLOCK_M, WIDTH_D, 0.0)
    to_content = _full(HEADS if WIDTH_E > 0 else 0, BLOCK_M, WIDTH_E, 0.0)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(0, block * BLOCK_M - (M - N)) // BLOCK_N * BLOCK_N
    for start in range(begin, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        q = _numbers(query + poses * PQ * N, n, n < N, N, PQ, 0)
        arrays, saved = _norms(q, k, ANGLES, VECTORS, PQ > PK, POLYNOMIAL)
        to_norms = _full(K, BLOCK_M, BLOCK_N, 0.0)
        values = ()
        contents = ()
        for h in tl.static_range(HEADS):
            at = batch * num_heads + first + h
            scores = _scores(
                arrays, scale, content_query, content_key, mask, batch, first + h, num_heads, n, m, N, M, E, root,
                mask_b, mask_h, mask_n, mask_m, MASKED, CAUSAL, WIDTH_E, True,
            )  # fmt: skip
            weights, to_scores, g = _score_gradients(
                scores, value, grad, log_sum, dot, at, n, m, N, M, D, WIDTH_D, True
            )
            values = values + (tl.dot(weights, g, input_precision="ieee"),)
            if NEED_POSES:
                more = ()
                for a in tl.static_range(K):
                    more = more + (to_scores * -tl.load(scale + (first + h) * K + a),)
                to_norms = _add(to_norms, more)
            if WIDTH_E > 0:
                c = _block(content_query + at * N * E, n, N, E, WIDTH_E)
                contents = contents + (tl.dot(to_scores, c, input_precision="ieee"),)
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


class _Launch:
    """One call: its tensors, made contiguous, and what its kernels are compiled for."""

    def __init__(
        self,
        query_BGPN: Tensor,
        key_BGPM: Tensor | None,
        scale_HK: Tensor,
        value_BHMD: Tensor,
        content_query: Tensor | None,
        content_key: Tensor | None,
        mask: Tensor | None,
        group: str,
        chart: str,
        causal: bool,
    ) -> None:
        _expect_device(value_BHMD.device)
        _load()
        self.kind = _kind(group, chart)
        self.query = query_BGPN.contiguous()
        self.same = key_BGPM is None
        self.key = self.query if key_BGPM is None else key_BGPM.contiguous()
        self.scale, self.value = scale_HK.contiguous(), value_BHMD.contiguous()
        self.content = [None if c is None else c.contiguous() for c in (content_query, content_key)]
        self.batch, self.num_heads, self.num_keys, self.width = value_BHMD.shape
        self.num_queries, self.shared = query_BGPN.shape[-1], query_BGPN.shape[1] == 1
        self.content_width = 0 if content_query is None else content_query.shape[-1]
        self.mask, strides = None, (0, 0, 0, 0)
        if mask is not None:
            full = mask.expand(self.batch, self.num_heads, self.num_queries, self.num_keys)
            self.mask, strides = mask.view(torch.uint8), full.stride()
        self.sizes = (
            self.num_heads, self.num_queries, self.num_keys, self.width, self.content_width,
            max(1, self.content_width) ** -0.5, *strides,
        )  # fmt: skip
        wide = _padded(self.width) + (_padded(self.content_width) if self.content_width else 0)
        # Heads whose geometry is computed once: each has a block of its output in the registers.
        self.heads = 2 if self.shared and self.num_heads % 2 == 0 and wide <= 64 else 1
        self.constants = {
            "PQ": self.query.shape[2],
            "PK": self.key.shape[2],
            "SHARED": self.shared,
            "ANGLES": self.kind.angles,
            "VECTORS": self.kind.vectors,
            "POLYNOMIAL": self.kind.polynomial,
            "SLOPE": self.kind.slope,
            "MASKED": mask is not None,
            "CAUSAL": causal,
            "HEADS": self.heads,
            "WIDTH_D": _padded(self.width),
            "WIDTH_E": _padded(self.content_width) if self.content_width else 0,
        }

    def run(self, kernel: Any, tensors: list[Any], size: int, **constants: Any) -> None:
        """Start a program for each block of the queries, or keys, batch entry and block of heads."""
        num_programs = -(-size // _SIDE) * self.batch * (self.num_heads // self.heads)
        given = (self.query, self.key, self.scale, self.value, *self.content, self.mask, *tensors, *self.sizes)
        with torch.cuda.device_of(self.value):
            kernel[(num_programs,)](
                *given, **self.constants, **constants, BLOCK_N=_SIDE, BLOCK_M=_SIDE, num_warps=_WARPS,
                enable_fp_fusion=True,
            )  # fmt: skip

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output [B, H, N, D], and the logarithm of the sum of weights [B, H, N], +inf for a row without any."""
        shape = (self.batch, self.num_heads, self.num_queries)
        output, log_sum = self.value.new_zeros(*shape, self.width), self.value.new_full(shape, math.inf)
        if output.numel() and self.num_keys:
            self.run(_forward_kernel, [output, log_sum], self.num_queries)
        return output, log_sum

    def backward(
        self, grad: Tensor, output: Tensor, log_sum: Tensor, need_poses: bool, need_scale: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of queries, keys, scale, values and content; empty where there is none."""
        new = self.value.new_zeros
        content = [new(0) if c is None else torch.zeros_like(c) for c in self.content]
        groups, num_blocks = self.num_heads // self.heads, -(-self.num_queries // _SIDE)
        to_query = new(self.batch, groups, *self.query.shape[2:])
        to_key = new(self.batch, groups, *self.key.shape[2:])
        to_scale, to_value = new(self.batch, num_blocks, *self.scale.shape), torch.zeros_like(self.value)
        if output.numel() and self.num_keys:
            grad = grad.contiguous()
            given = [grad, log_sum.contiguous(), (grad * output).sum(-1)]
            if need_poses or need_scale or self.content_width:
                tensors = [*given, to_query, to_scale, content[0]]
                self.run(_query_kernel, tensors, self.num_queries, NEED_POSES=need_poses)
            tensors = [*given, to_key, to_value, content[1]]
            self.run(_key_kernel, tensors, self.num_keys, NEED_POSES=need_poses)
        if self.shared:
            to_query, to_key = to_query.sum(1, keepdim=True), to_key.sum(1, keepdim=True)
        if self.same:
            to_query, to_key = to_query + to_key, new(0)
        return to_query, to_key, to_scale.sum((0, 1)), to_value, content[0], content[1]


_SIDE, _WARPS = 32, 8  # of a block: the geometry holds some fifteen arrays of a tile in the registers


def _padded(width: int) -> int:
    """The next power of 2 that `tl.dot` takes."""
    return max(16, 1 << (width - 1).bit_length())


class _Kind(NamedTuple):
    """What the kernels need to know of a geometry."""

    angles: int
    vectors: int
    polynomial: tuple[float, ...]
    slope: tuple[float, ...]


def _expect_kind(group: Group, chart: str) -> None:
    """Raise a ValueError unless the kernels have formulas for the group in this chart."""
    if not isinstance(pair_geometry(group, chart), (_Vectors, _Plane, _Space)):
        raise ValueError(
            'impl="triton" has formulas for SO2, SE2, SO3, SE3 and Translation(n) in the principal chart, received '
            f'{group} in chart "{chart}": use impl="tiled", which takes every group'
        )


@cache
def _kind(group: str, chart: str) -> _Kind:
    geometry = pair_geometry(parse(group), chart)
    if isinstance(geometry, _Vectors):
        return _Kind(0, geometry.sizes[0], (), ())
    assert isinstance(geometry, (_Plane, _Space))
    angles = 2 if isinstance(geometry, _Plane) else 3
    return _Kind(angles, angles if geometry.affine else 0, *geometry.fits[torch.float32])


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def _expect_device(device: torch.device) -> None:
    """Raise a RuntimeError unless Triton is there and runs on this device."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError('impl="triton" needs the package triton, which is not installed: use impl="tiled"')
    if device.type != "cuda" and not _interpreted():
        raise RuntimeError(
            'impl="triton" runs on CUDA, and elsewhere only in the interpreter of Triton (TRITON_INTERPRET=1, slow), '
            f'received tensors on {device}: use impl="tiled"'
        )


@torch.library.custom_op("erlangen::lie_attention_triton", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    value: Tensor,
    content_query: Tensor | None,
    content_key: Tensor | None,
    mask: Tensor | None,
    group: str,
    chart: str,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    return _Launch(query, key, scale, value, content_query, content_key, mask, group, chart, causal).forward()


@_attend.register_fake
def _(query, key, scale, value, content_query, content_key, mask, group, chart, causal):
    batch, num_heads, _, width = value.shape
    return value.new_empty(batch, num_heads, query.shape[-1], width), value.new_empty(batch, num_heads, query.shape[-1])


@torch.library.custom_op("erlangen::lie_attention_triton_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    output: Tensor,
    log_sum: Tensor,
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    value: Tensor,
    content_query: Tensor | None,
    content_key: Tensor | None,
    mask: Tensor | None,
    group: str,
    chart: str,
    causal: bool,
    need_poses: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    launch = _Launch(query, key, scale, value, content_query, content_key, mask, group, chart, causal)
    return launch.backward(grad, output, log_sum, need_poses, need_scale)


@_attend_backward.register_fake
def _(
    grad, output, log_sum, query, key, scale, value, content_query, content_key, mask, group, chart, causal,
    need_poses, need_scale,
):  # fmt: skip
    likely = (query, key, scale, value, content_query, content_key)
    return tuple(value.new_empty(0 if x is None else x.shape) for x in likely)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, group, chart, causal = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.settings = (group, chart, causal)


def _backward(ctx, grad, _):
    output, log_sum, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads = _attend_backward(grad, output, log_sum, *tensors, *ctx.settings, needs[0] or needs[1], needs[2])
    return *(g if need else None for g, need in zip(grads, needs)), *(None,) * 4


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        'the Triton lie_attention has no second derivative: use impl="reference", which is dense, for double gradients'
    )


_attend.register_autograd(_backward, setup_context=_setup_context)
_attend_backward.register_autograd(_no_second_derivative)


def triton_attention(
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    value: Tensor,
    *,
    group: Group,
    chart: str,
    content_query: Tensor | None = None,
    content_key: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention in Triton: arguments and result as of `tiled_attention`.

    Raises:
        ValueError: there is no formula for the group in this chart, or the tensors are not float32.
        RuntimeError: Triton is not installed, or does not run on the tensors' device.
    """
    _expect_kind(group, chart)
    if value.dtype != torch.float32:
        raise ValueError(f'impl="triton" computes in float32, received {value.dtype}: use impl="tiled"')
    factors = scale.new_tensor(pair_geometry(group, chart).factors)
    return _attend(query, key, scale * factors, value, content_query, content_key, mask, str(group), chart, causal)[0]
