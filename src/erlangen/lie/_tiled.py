"""Lie attention in linear memory: tiles of pairs, recomputed in the backward pass.

Forward and backward walk over tiles of queries × keys. In each the geometry of the pairs is computed once for all
heads that share their poses (`_geometry`), turned into weights, used, and dropped: nothing of size N × M is ever kept,
besides a mask that the caller brings. As in FlashAttention (Dao et al., arXiv 2205.14135) the backward pass needs the
logarithm of each row's normaliser only. What is different for a proximity kernel:

- Scores without content are at most 0, and 0 where a pose meets itself. So weights exp(s) need no maximum of the row:
  if a row's sum comes out too small to be trusted, that block of rows is done again with a running maximum.
- Where queries are the keys the scores are symmetric: a tile serves its transpose too, which halves everything but the
  products with the values; and the two products of the backward pass become one of twice the inner length.

Inside of torch.compile the arithmetic of a tile is compiled too (`_fused`). `_skipping` leaves out pairs that are far
away, and `_operator` makes an operator of torch of both.

Weights below exp(−80) of the largest possible (exp(−650) in float64) count as that, far below any rounding: denormal
numbers, and the exponential of −∞, are many times slower.

Shape suffixes: B batch, H heads, G heads of the geometry, N queries, M keys, D width of a value, K blocks of the
algebra, P numbers a packed pose. Inside of a tile batch and heads are one axis.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._base import outside_message
from ._fused import filled, fused_geometry
from ._geometry import ByLogarithm, pair_geometry
from ._workspace import Workspace
from .groups import parse

_ELEMENTS = 1 << 19  # of the weights of a tile


class _Limits(NamedTuple):
    negligible: float  # no score is taken to be below this
    trusted: float  # the smallest logarithm of a sum of weights exp(s) that they cannot have spoilt


_LIMITS = {torch.float32: _Limits(-80.0, -46.0), torch.float64: _Limits(-650.0, -460.0)}


class Tiles:
    """One call: its tensors, and the tiles that they fall into."""

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
        outside: str,
        causal: bool,
        check: bool,
        tangents: bool,
        *,
        fused: bool,
        space: Workspace,
    ) -> None:
        self.group, self.chart, self.outside, self.check = parse(group), chart, outside, check
        self.geometry = pair_geometry(self.group, chart, tangents)
        self.tangents = tangents
        self.fused = fused_geometry(group, chart) if fused and self.geometry.is_fast and not tangents else None
        # detached: a compiler would look for the gradients of what it is given
        self.query = query_BGPN.detach()
        self.key = self.query if key_BGPM is None else key_BGPM.detach()
        self.batch, self.num_heads, self.num_keys, self.width = value_BHMD.shape
        self.num_queries = query_BGPN.shape[-1]
        self.scale, self.slopes = scale_HK, (-scale_HK.detach()).T[..., None, None]
        self.space, self.room = space, space.room
        self._prepared: dict[tuple[int, int, int], Any] = {}
        self.value = value_BHMD.flatten(0, 1)
        self.content = None
        if content_query is not None and content_key is not None:
            root = content_query.shape[-1] ** -0.5
            self.content = (content_query.flatten(0, 1) * root, content_key.flatten(0, 1), root)
        self.causal = causal
        # A mask of keys only goes into the values and the sums, any other is applied to the weights.
        self.mask, self.symmetric = mask, False
        self.kept = None
        if key_BGPM is None and not causal and self.content is None and self.geometry.is_fast and not tangents:
            if mask is None:
                self.symmetric = True
            elif mask.shape[1] == mask.shape[2] == 1:
                self.symmetric = True
                kept = mask[:, 0, 0].to(value_BHMD.dtype).expand(self.batch, -1)
                self.kept = kept.repeat_interleave(self.num_heads, 0)[..., None]  # [B·H, M, 1]
        self.limits = _LIMITS[value_BHMD.dtype]
        self.side = self.geometry.tile if query_BGPN.shape[1] == 1 else min(self.geometry.tile, 128)
        tile = self.num_heads * min(self.side, self.num_queries) * min(self.side, self.num_keys)
        step = max(1, _ELEMENTS // max(1, tile))
        # all of one size: what is fused is fused for one
        self.batch_step = next(n for n in range(min(step, max(1, self.batch)), 0, -1) if max(1, self.batch) % n == 0)

    def batches(self) -> Iterator[slice]:
        for start in range(0, self.batch, self.batch_step):
            yield slice(start, min(start + self.batch_step, self.batch))

    def flat(self, batch: slice) -> slice:
        """The same part of a tensor whose batch and heads are one axis."""
        return slice(batch.start * self.num_heads, batch.stop * self.num_heads)

    def blocks(self, size: int) -> list[slice]:
        return [slice(a, min(a + self.side, size)) for a in range(0, size, self.side)]

    def cut(self, tensor: Tensor) -> list[Tensor]:
        """The blocks of [b·H, N, ...], each contiguous: products with strided ones go head by head."""
        return [tensor[:, block].contiguous() for block in self.blocks(tensor.shape[1])]

    def columns(self, rows: slice) -> list[slice]:
        """The blocks of keys that some query of the rows may see."""
        last = rows.stop + self.num_keys - self.num_queries if self.causal else self.num_keys
        return [block for block in self.blocks(self.num_keys) if block.start < last]

    def pairs(self) -> Iterator[tuple[int, slice, int, slice]]:
        """Blocks i <= j with their slices."""
        blocks = self.blocks(self.num_queries)
        for i, rows in enumerate(blocks):
            for j, columns in enumerate(blocks[i:], i):
                yield i, rows, j, columns

    def norms(self, batch: slice, rows: slice, columns: slice, *, keep: bool = False) -> tuple[list[Tensor], tuple]:
        """Those of `PairGeometry.norms`; the room is cleared for them. Fused tiles save the packed poses."""
        query, key = self._block(self.query, batch, rows, -1), self._block(self.key, batch, columns, -2)
        if self.fused is not None:
            return self.fused.norms(query, key), (query, key)
        sizes = [part.stop - part.start for part in (batch, rows, columns)]
        self.room.clear(self.value, (sizes[0], self.query.shape[1], *sizes[1:]), keep)
        return self.geometry.norms(query, key, self.room)

    def _block(self, packed: Tensor, batch: slice, part: slice, axis: int) -> Any:
        name = (batch.start, part.start, axis)
        if name not in self._prepared:
            block = packed[batch, ..., part]
            self._prepared[name] = self.geometry.block(block, axis) if self.fused is None else filled(block)
        return self._prepared[name]

    def scores(self, arrays: list[Tensor]) -> Tensor:
        """−Σ_k scale[h, k] arrays[k], [b·H, q, k]; lives until the next call."""
        first, *rest = self.slopes
        batch, _, *tile = arrays[0].shape
        result = self.memory(0, batch, self.num_heads, *tile)
        torch.mul(arrays[0], first, out=result)
        for slope, array in zip(rest, arrays[1:]):
            result.addcmul_(array, slope)
        return result.flatten(0, 1)

    def memory(self, which: int, *shape: int) -> Tensor:
        """A piece of the workspace."""
        return self.space.piece(which, self.value, shape)

    def sums(self, which: int, like: list[Tensor]) -> list[Tensor]:
        """Zeros of these shapes, in a piece of the workspace."""
        sizes = [x.numel() for x in like]
        return [part.view(x.shape) for part, x in zip(self.memory(which, sum(sizes)).zero_().split(sizes), like)]

    def add_content(self, scores: Tensor, batch: slice, rows: slice, columns: slice) -> None:
        if self.content is not None:
            flat = self.flat(batch)
            scores.baddbmm_(self.content[0][flat, rows], self.content[1][flat, columns].mT)

    def forbidden(self, batch: slice, rows: slice, columns: slice) -> Tensor | None:
        """Which pairs may not attend, bool [b, H or 1, q, k]; None for none."""
        allowed = None
        if self.mask is not None:
            mask = self.mask
            mask = mask[batch] if mask.shape[0] > 1 else mask
            mask = mask[..., rows, :] if mask.shape[2] > 1 else mask
            allowed = mask[..., columns]
        shift = self.num_keys - self.num_queries
        if self.causal and columns.stop - 1 > rows.start + shift:
            i = torch.arange(rows.start, rows.stop, device=self.value.device)
            j = torch.arange(columns.start, columns.stop, device=self.value.device)
            past = j <= i[:, None] + shift
            allowed = past[None, None] if allowed is None else allowed & past
        return None if allowed is None else ~allowed

    def hide(self, weights: Tensor, batch: slice, rows: slice, columns: slice, by: float) -> Tensor:
        """Put a number, 0 for weights or −inf for scores, where pairs may not attend; NaN where there is no score."""
        forbidden = self.forbidden(batch, rows, columns)
        view = weights.unflatten(0, (-1, self.num_heads))
        if not self.geometry.is_fast:
            inside = self.geometry.inside(self.query[batch, ..., rows], self.key[batch, ..., columns])
            if self.outside == "error":
                view.masked_fill_(~inside, math.nan)
            else:
                forbidden = ~inside if forbidden is None else forbidden | ~inside
        if forbidden is not None:
            view.masked_fill_(forbidden, by)
        return weights

    def weigh(
        self, batch: slice, rows: slice, columns: slice, *, keep: bool = False
    ) -> tuple[Tensor, list[Tensor], tuple]:
        """The weights exp(s) of a tile without content, [b·H, q, k], which live until the next; and its `norms`."""
        if self.fused is None:
            arrays, saved = self.norms(batch, rows, columns, keep=keep)
            return self.exp_(self.scores(arrays)), arrays, saved
        saved = self._block(self.query, batch, rows, -1), self._block(self.key, batch, columns, -2)
        slopes, least = self.slopes, self.limits.negligible
        weights, arrays = self.fused.weigh(*saved, slopes, least, partial(self.memory, 0))
        return weights.flatten(0, 1), arrays, saved

    def exp_(self, scores: Tensor) -> Tensor:
        return scores.clamp_(min=self.limits.negligible).exp_()

    # Forward

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output [B, H, N, D], mean tangent vectors [B, H, N, dim] (dim of 0 where not asked for), and the logarithm of
        the sum of weights [B, H, N], +inf for a row without any.
        """
        if self.check and not self.geometry.is_fast:
            self.expect_inside()
        output = self.value.new_empty(len(self.value), self.num_queries, self.width)
        tangent = output.new_empty(*output.shape[:2], self.group.dim if self.tangents else 0)
        log_sum = self.value.new_empty(len(self.value), self.num_queries)
        for batch in self.batches():
            flat = self.flat(batch)
            values = self.cut(self.value[flat])
            if self.symmetric and self._forward_symmetric(batch, values, output[flat], log_sum[flat]):
                continue
            for rows in self.blocks(self.num_queries):
                found = None if self.content is not None else self._forward_rows(batch, rows, values)
                if found is None:
                    found = self.forward_rows_with_maximum(batch, rows, values)
                output[flat, rows], tangent[flat, rows], log_sum[flat, rows, None] = found
        shape = (self.batch, self.num_heads)
        return output.unflatten(0, shape), tangent.unflatten(0, shape), log_sum.unflatten(0, shape)

    def is_trusted(self, log_sum: Tensor) -> bool:
        return bool((log_sum > self.limits.trusted).all())

    def _forward_symmetric(self, batch: slice, values: list[Tensor], output: Tensor, log_sum: Tensor) -> bool:
        """Fill output and log_sum; or find that a row has weights too small for this, and return False."""
        parts = self.sums(2, values)
        turned = self.sums(3, [v.mT for v in values])  # [b·H, D, n]: from tiles as transposes, a faster product
        totals = [torch.zeros_like(v[..., :1]) for v in values]
        kept = None if self.kept is None else self.cut(self.kept[self.flat(batch)])

        def add_total(weights: Tensor, i: int, j: int) -> None:
            if kept is None:
                totals[i].add_(weights.sum(-1, keepdim=True))
            else:
                totals[i].baddbmm_(weights, kept[j])

        for i, rows, j, columns in self.pairs():
            weights = self.weigh(batch, rows, columns)[0]
            parts[i].baddbmm_(weights, values[j])
            add_total(weights, i, j)
            if j > i:
                turned[j].baddbmm_(values[i].mT, weights)
                add_total(weights.mT, j, i)
        torch.log(torch.cat(totals, 1)[..., 0], out=log_sum)
        if not self.is_trusted(log_sum):
            return False
        for rows, part, other, total in zip(self.blocks(self.num_queries), parts, turned, totals):
            torch.div(part.add_(other.mT), total, out=output[:, rows])
        return True

    def _forward_rows(self, batch: slice, rows: slice, values: list[Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Output [b·H, q, D], tangent [b·H, q, dim or 0] and the logarithm of the sum of weights [b·H, q, 1]; None if
        they cannot be trusted.
        """
        part, tangent, total = self._zeros(batch, rows)
        for columns, value in zip(self.columns(rows), values):
            weights, _, saved = self.weigh(batch, rows, columns)
            self.hide(weights, batch, rows, columns, 0.0)
            total.add_(weights.sum(-1, keepdim=True))
            part.baddbmm_(weights, value)
            self._add_tangents(tangent, weights, saved)
        log_total = total.log()
        return (part.div_(total), tangent.div_(total), log_total) if self.is_trusted(log_total) else None

    def forward_rows_with_maximum(
        self, batch: slice, rows: slice, values: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `_forward_rows`, for scores of any size."""
        part, tangent, total = self._zeros(batch, rows)
        top = torch.full_like(total, -math.inf)
        for columns, value in zip(self.columns(rows), values):
            arrays, saved = self.norms(batch, rows, columns)
            scores = self.scores(arrays)
            self.add_content(scores, batch, rows, columns)
            self.hide(scores, batch, rows, columns, -math.inf)
            new = torch.maximum(top, scores.amax(-1, keepdim=True))
            finite = new.masked_fill(new == -math.inf, 0.0)
            weights = self.hide(self.exp_(scores.sub_(finite)), batch, rows, columns, 0.0)
            decay = (top - finite).exp()
            total.mul_(decay).add_(weights.sum(-1, keepdim=True))
            part.mul_(decay).baddbmm_(weights, value)
            self._add_tangents(tangent.mul_(decay), weights, saved)
            top = new
        empty = top == -math.inf
        log_total = (top + total.log()).masked_fill(empty, math.inf)
        total.masked_fill_(empty, 1.0)
        return part.div_(total), tangent.div_(total), log_total

    def _zeros(self, batch: slice, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        size = ((batch.stop - batch.start) * self.num_heads, rows.stop - rows.start)
        widths = (self.width, self.group.dim if self.tangents else 0, 1)
        part, tangent, total = (self.value.new_zeros(*size, width) for width in widths)
        return part, tangent, total

    def _add_tangents(self, to: Tensor, weights: Tensor, saved: tuple) -> None:
        """Add Σ_j weights_ij log(g_i⁻¹ g_j), [b·H, q, dim]."""
        if self.tangents:
            by_head = weights.unflatten(0, (-1, self.num_heads))
            to += torch.einsum("bhqk,bhqkc->bhqc", by_head, self._tangent(saved)).flatten(0, 1)

    def _tangent(self, saved: tuple) -> Tensor:
        return saved[-1].expand(-1, self.num_heads, -1, -1, -1)

    def expect_inside(self) -> None:
        """Raise a ValueError that counts the pairs outside the chart."""
        if self.outside != "error":
            return
        wrong = total = 0
        for batch in self.batches():
            for rows in self.blocks(self.num_queries):
                for columns in self.columns(rows):
                    inside = self.geometry.inside(self.query[batch, ..., rows], self.key[batch, ..., columns])
                    forbidden = self.forbidden(batch, rows, columns)
                    out = ~inside if forbidden is None else ~inside & ~forbidden
                    wrong += int(out.sum())
                    total += out.numel() if forbidden is None else int((~forbidden).expand_as(out).sum())
        if wrong:
            raise ValueError(outside_message(wrong, total, self.group, self.chart))

    # Backward

    def backward(
        self,
        grad: Tensor,
        grad_tangent: Tensor,
        output: Tensor,
        tangent: Tensor,
        log_sum: Tensor,
        need_poses: bool,
        need_scale: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of queries, keys, scale, values and content; empty where there is none."""
        self.begin_backward(need_poses, need_scale)
        dot = ((grad * output).sum(-1, keepdim=True) + (grad_tangent * tangent).sum(-1, keepdim=True)).flatten(0, 1)
        grad, grad_tangent, log_sum = grad.flatten(0, 1), grad_tangent.flatten(0, 1), log_sum.flatten(0, 1)
        for batch in self.batches():
            flat = self.flat(batch)
            if self.symmetric and self.is_trusted(log_sum[flat]):
                to_values = self._backward_symmetric(batch, grad[flat], dot[flat], log_sum[flat])
            else:
                values = self.cut(self.value[flat])
                to_values = [torch.zeros_like(v) for v in values]
                for rows in self.blocks(self.num_queries):
                    given = grad[flat, rows].contiguous(), grad_tangent[flat, rows], dot[flat, rows]
                    self.backward_rows(batch, rows, *given, log_sum[flat, rows, None], values, to_values)
            if to_values:
                torch.cat(to_values, 1, out=self.grad_value[flat])
        shape = (self.batch, self.num_heads)
        if self.content is None:
            content = (self.value.new_empty(0), self.value.new_empty(0))
        else:
            self.grad_content[0] *= self.content[2]
            content = (self.grad_content[0].unflatten(0, shape), self.grad_content[1].unflatten(0, shape))
        to_key = self.value.new_empty(0) if self.grad_key is self.grad_query else self.grad_key
        return self.grad_query, to_key, self.grad_scale, self.grad_value.unflatten(0, shape), content[0], content[1]

    def begin_backward(self, need_poses: bool, need_scale: bool) -> None:
        """Gradients of zero, to be added to."""
        self.need_poses, self.need_scale = need_poses, need_scale
        self.grad_query = torch.zeros_like(self.query)
        self.grad_key = self.grad_query if self.key is self.query else torch.zeros_like(self.key)
        self.grad_scale, self.grad_value = torch.zeros_like(self.scale), torch.zeros_like(self.value)
        self.grad_content = [] if self.content is None else [torch.zeros_like(c) for c in self.content[:2]]

    def _backward_symmetric(self, batch: slice, grad: Tensor, dot: Tensor, log_sum: Tensor) -> list[Tensor]:
        """With W = exp(s) and all of row i divided by its sum beforehand, the gradients of s_ij and of s_ji add up to
        W_ij (grad_i·v_j − dot_i + grad_j·v_i − dot_j), one product of vectors of i and j.
        """
        flat = self.flat(batch)
        over = (-log_sum).exp()[..., None]
        grad, dot, value = grad * over, dot * over, self.value[flat]
        kept = torch.ones_like(dot) if self.kept is None else self.kept[flat]
        left = self.cut(torch.cat([grad, value, -dot, kept], -1))
        right = self.cut(torch.cat([value, grad, kept, -dot], -1))
        grads = self.cut(grad)
        to_values, turned = self.sums(2, grads), self.sums(3, [g.mT for g in grads])
        for i, rows, j, columns in self.pairs():
            weights, arrays, saved = self.weigh(batch, rows, columns, keep=True)
            turned[j].baddbmm_(grads[i].mT, weights)
            if j > i:
                to_values[i].baddbmm_(weights, grads[j])
            else:
                weights.mul_(0.5)  # on the diagonal each pair comes twice
            if self.need_poses or self.need_scale:
                room = self.memory(1, *weights.shape)
                to_scores = torch.bmm(left[i], right[j].mT, out=room).mul_(weights)
                self._add_to_poses(self.to_geometry(to_scores, arrays, saved), batch, rows, columns)
        return [plain.add_(t.mT) for plain, t in zip(to_values, turned)]

    def backward_rows(
        self,
        batch: slice,
        rows: slice,
        grad: Tensor,
        grad_tangent: Tensor,
        dot: Tensor,
        log_sum: Tensor,
        values: list[Tensor],
        to_values: list[Tensor],
    ) -> None:
        flat = self.flat(batch)
        trusted = self.content is None and self.is_trusted(log_sum)
        if trusted:
            over = (-log_sum).exp()
            grad, grad_tangent, dot = grad * over, grad_tangent * over, dot * over
        by_head = grad_tangent.unflatten(0, (-1, self.num_heads))
        for columns, value, to_value in zip(self.columns(rows), values, to_values):
            if trusted:
                weights, arrays, saved = self.weigh(batch, rows, columns, keep=True)
            else:
                arrays, saved = self.norms(batch, rows, columns, keep=True)
                scores = self.scores(arrays)
                self.add_content(scores, batch, rows, columns)
                weights = self.exp_(scores.sub_(log_sum))
            self.hide(weights, batch, rows, columns, 0.0)
            to_value.baddbmm_(weights.mT, grad)
            if not (self.need_poses or self.need_scale or self.content is not None):
                continue
            to_scores = torch.bmm(grad, value.mT, out=self.memory(1, *weights.shape)).sub_(dot)
            to_tangent = None
            if self.tangents:
                to_scores += torch.einsum("bhqc,bhqkc->bhqk", by_head, self._tangent(saved)).flatten(0, 1)
                form = "bhqk,bhqc->bqkc" if self.query.shape[1] == 1 else "bhqk,bhqc->bhqkc"
                to_tangent = torch.einsum(form, weights.unflatten(0, (-1, self.num_heads)), by_head)
                to_tangent = to_tangent.reshape(saved[-1].shape)
            to_scores.mul_(weights)
            if self.content is not None:
                content_query, content_key, _ = self.content
                self.grad_content[0][flat, rows] += to_scores @ content_key[flat, columns]
                self.grad_content[1][flat, columns] += to_scores.mT @ content_query[flat, rows]
            if self.need_poses or self.need_scale:
                self._add_to_poses(self.to_geometry(to_scores, arrays, saved, to_tangent), batch, rows, columns)

    def _add_to_poses(self, found: tuple[Tensor, Tensor] | None, batch: slice, rows: slice, columns: slice) -> None:
        if found is not None:
            self.grad_query[batch, ..., rows] += found[0]
            self.grad_key[batch, ..., columns] += found[1]

    def to_geometry(
        self, to_scores: Tensor, arrays: list[Tensor], saved: tuple, to_tangent: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """From the gradients of the scores of a tile, and of its tangent vectors, to those of packed queries and keys,
        if they are needed, and of scale, which are added up.
        """
        shared = self.query.shape[1] == 1
        flat = to_scores.unflatten(0, (-1, self.num_heads)).flatten(2)  # [b, H, q·k]
        if self.need_scale:
            for k, array in enumerate(arrays):
                array = array.flatten(2)
                found = (flat @ array.mT)[..., 0] if shared else (flat * array).sum(-1)
                self.grad_scale[:, k] -= found.sum(0)
        if not self.need_poses:
            return None
        tile = arrays[0].shape
        if shared:
            to_norms = list((-self.scale.mT @ flat).unbind(1))
        else:
            to_norms = [flat * -self.scale[:, k, None] for k in range(len(arrays))]
        to_norms = [x.view(tile) for x in to_norms]
        if isinstance(self.geometry, ByLogarithm):
            return self.geometry.vjp(saved, to_norms, self.room, to_tangent)
        if self.fused is not None:
            query, key = saved
            return self.fused.vjp(query, key, to_norms)
        return self.geometry.vjp(saved, to_norms, self.room)
