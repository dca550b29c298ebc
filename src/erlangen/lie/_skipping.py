"""Lie attention in tiles that leaves out what is far away, with a proof (`_neighbours`).

Poses, values and gradients are brought into the order of a tree, whatever their own: tables, with a row a leaf and
head. A tile is a block of queries, some leaves of the tree, with the leaves of keys that it cannot leave out, taken
from the table side by side; what it has for them in return is added to a table. Tiles of like size are computed
together. So the number of pairs that are computed grows as that of the poses, where these are spread out.

What a row weighs at least, for the proof: where queries are the keys it weighs 1 by itself; elsewhere the weights for a
few leaves nearby tell, and in the backward pass the sum of the row does. A row that is too far from all keys for that,
or sums to too little to be trusted, is done again by `Tiles`, without skipping.

Shape suffixes as in `_tiled`; further T tiles that are computed together, C leaves side by side, c slots of a leaf.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _tiled
from ._neighbours import Tree, in_batches, near_leaves, nearest_leaves
from ._tiled import Tiles
from ._workspace import Workspace

_GROUP = 2  # leaves of a block of queries
_NEAREST = 8  # leaves from which a row's weight is bounded from below
_MARGIN = 1e-3  # of the logarithm of such a bound, for its rounding


class SkippingTiles(Tiles):
    """One call that may leave out a share ``skip`` of each row's weight."""

    def __init__(self, *arguments: Any, skip: float, space: Workspace) -> None:
        super().__init__(*arguments, fused=False, space=space)
        self.share = skip
        self.weighs_one = self.key is self.query and self.mask is None  # every row, by itself
        self.symmetric = self.symmetric and self.mask is None
        positions = self.geometry.positions(self.query)
        self.slope = torch.cat([self.scale[:, k, None].expand(-1, x.shape[2]) for k, x in positions], 1).double()
        unit, leaf = self.slope.amin(0).rsqrt(), max(1, self.side // 16)
        self.keys = self.queries = Tree(torch.cat([x for _, x in positions], 2), unit, leaf)
        if self.key is not self.query:
            self.keys = Tree(torch.cat([x for _, x in self.geometry.positions(self.key)], 2), unit, leaf)
        self.span = min(_GROUP, self.queries.num_leaves)
        leaves = torch.arange(len(self.queries.slots), device=self.value.device)
        self.leaves_of = leaves.unflatten(0, (-1, self.span))  # each block of queries
        self.query_poses = self._table(self.queries, [self.query.flatten(1, 2)[..., None]], fill=True)
        self.key_poses = self.query_poses
        if self.key is not self.query:
            self.key_poses = self._table(self.keys, [self.key.flatten(1, 2)[..., None]], fill=True)
        side = self.span * self.queries.slots.shape[1]
        self.most = max(1, _tiled._ELEMENTS // (self.num_heads * side * self.keys.slots.shape[1]))

    # Tables

    def _table(self, tree: Tree, parts: Sequence[Tensor | None], fill: bool = False) -> Tensor:
        """What poses have, leaf by leaf, [B·L + 1, R, c, W]; the last row, of no leaf, is zero.

        Args:
            tree: of the poses.
            parts: to stand side by side, [B, R, N, part of W]; None for a one.
            fill: not to be zero too where a slot repeats a pose only to fill its leaf.
        """
        rows, num = next(part.shape[1:3] for part in parts if part is not None)
        index = tree.slots[:, None] + (self._batch_of(tree)[:, None] * (rows - 1) + self._arange(rows))[..., None] * num
        widths = [1 if part is None else part.shape[-1] for part in parts]
        table = self.value.new_zeros(len(tree.slots) + 1, *index.shape[1:], sum(widths))
        for part, to in zip(parts, table[:-1].split(widths, -1)):
            to.copy_(to.new_ones(()) if part is None else part.flatten(0, 2)[index])
        return table if fill else self._without_fill(table, tree)

    def _without_fill(self, table: Tensor, tree: Tree) -> Tensor:
        table[:-1].masked_fill_(tree.is_fill[:, None, :, None], 0.0)
        return table

    def _from_table(self, table: Tensor, tree: Tree) -> Tensor:
        """What each pose has, [B, R, N, W]."""
        rows, size = table.shape[1:3]
        place = tree.place.unflatten(0, (self.batch, -1))[:, None]
        index = (place // size * rows + self._arange(rows)[:, None]) * size + place % size
        return table.flatten(0, 2)[index]

    def _batch_of(self, tree: Tree) -> Tensor:
        return self._arange(self.batch).repeat_interleave(tree.num_leaves)

    def _arange(self, size: int) -> Tensor:
        return torch.arange(size, device=self.value.device)

    def _rows(self, table: Tensor, leaves: Tensor) -> Tensor:
        """Where the rows of leaves [T, C] stand in a table, [T·R·C]."""
        rows = table.shape[1]
        return (leaves[:, None] * rows + self._arange(rows)[:, None]).flatten()

    def _take(self, table: Tensor, leaves: Tensor, which: int) -> Tensor:
        """[T·R, C·c, W], in the memory of this number."""
        index, width = self._rows(table, leaves), table.shape[-1]
        out = self.memory(which, len(index), table.shape[2] * width)
        torch.index_select(table.flatten(0, 1).flatten(1), 0, index, out=out)
        return out.view(len(leaves) * table.shape[1], -1, width)

    def _add(self, table: Tensor, leaves: Tensor, found: Tensor) -> None:
        """Add [T·R, C·c, W]."""
        index = self._rows(table, leaves)
        table.flatten(0, 1).flatten(1).index_add_(0, index, found.reshape(len(index), -1))

    # Tiles

    def _tiles(self, log_least: Tensor | None) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Leaves of queries [T, C] and of keys, and whether they are the same; with symmetry, each pair once."""
        if self.symmetric:
            for leaves in self.leaves_of.split(max(1, self.most // self.span)):
                yield leaves, leaves, True
        block, leaf = near_leaves(self.queries, self.keys, self.span, self.slope, log_least, self.share, self.symmetric)
        for blocks, leaves in in_batches(block, leaf, len(self.leaves_of), self.most, len(self.keys.slots)):
            yield self.leaves_of[blocks], leaves, False

    def _weigh(self, queries: Tensor, keys: Tensor, keep: bool = False) -> tuple[Tensor, list[Tensor], tuple]:
        """The weights of a tile, [T·H, q, k], zero where they are masked; and its `PairGeometry.norms`."""
        heads = self.query.shape[1]
        query, key = (
            self._take(table, leaves, which).view(len(leaves), heads, table.shape[1] // heads, -1)
            for table, leaves, which in ((self.query_poses, queries, 2), (self.key_poses, keys, 3))
        )
        self.room.clear(self.value, (len(queries), heads, query.shape[-1], key.shape[-1]), keep)
        arrays, saved = self.geometry.norms(self.geometry.block(query, -1), self.geometry.block(key, -2), self.room)
        weights = self.exp_(self.scores(arrays))
        if self.mask is not None or self.causal:
            weights.unflatten(0, (-1, self.num_heads)).masked_fill_(~self._allowed(queries, keys), 0.0)
        return weights, arrays, saved

    def _allowed(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Which pairs may attend, bool [T, H or 1, q or 1, k]; anything for a leaf that is none."""
        query = self.queries.slots[queries].flatten(1)[:, None, :, None] % self.num_queries
        key = self.keys.slots[keys.clamp(max=len(self.keys.slots) - 1)].flatten(1)[:, None, None] % self.num_keys
        allowed = torch.ones((), dtype=torch.bool, device=self.value.device)
        if self.mask is not None:
            batch = (queries[:, 0] // self.queries.num_leaves)[:, None, None, None]
            head = self._arange(self.mask.shape[1])[:, None, None]
            allowed = self.mask.expand(self.batch, -1, -1, -1)[batch, head, query if self.mask.shape[2] > 1 else 0, key]
        return allowed & (key <= query + self.num_keys - self.num_queries) if self.causal else allowed

    # Forward

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        values = self._table(self.keys, [self.value.unflatten(0, (self.batch, -1)), None])
        log_least, unsure = (None, None) if self.weighs_one else self._least(values)
        sums = values.new_zeros(len(self.query_poses), self.num_heads, self.queries.slots.shape[1], self.width + 1)
        for queries, keys, same in self._tiles(log_least):
            weights = self._weigh(queries, keys)[0]
            self._add(sums, queries, torch.bmm(weights, self._take(values, keys, 4)))
            if self.symmetric and not same:
                self._add(sums, keys, self._product(weights.mT, self._take(values, queries, 5)))
        found = self._from_table(sums, self.queries)
        output, log_sum = found[..., :-1] / found[..., -1:], found[..., -1].log()
        wrong = ~(log_sum > self.limits.trusted).all(1)
        self._again(wrong if unsure is None else wrong | unsure, output, log_sum)
        return output, output.new_empty(*log_sum.shape, 0), log_sum

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b, out=self.memory(6, len(a), a.shape[1], b.shape[2]))

    def _least(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of what the rows of a block weigh at least, [I, H]; and the rows that this leaves out, [B, N]."""
        near = nearest_leaves(self.queries, self.keys, self.span, _NEAREST)
        step = max(1, self.most // near.shape[1])
        log_least, unsure = [], []
        for queries, keys in zip(self.leaves_of.split(step), near.split(step)):
            weights = self._weigh(queries, keys)[0]
            log_sum = torch.bmm(weights, self._take(values, keys, 4))[..., -1].log()
            log_sum = log_sum.unflatten(0, (-1, self.num_heads))  # [T, H, q]
            wrong = ~(log_sum > self.limits.trusted).all(1, keepdim=True)
            log_least.append(log_sum.double().masked_fill(wrong, math.inf).amin(-1))
            unsure.append(wrong.flatten())
        return torch.cat(log_least) - _MARGIN, torch.cat(unsure)[self.queries.place].unflatten(0, (self.batch, -1))

    def _again(self, wrong: Tensor, output: Tensor, log_sum: Tensor) -> None:
        """Without skipping, the blocks with rows that are wrong, [B, N]."""
        for b, rows in self._blocks_with(wrong):
            batch = slice(b, b + 1)
            found = self.forward_rows_with_maximum(batch, rows, self.cut(self.value[self.flat(batch)]))
            output[b, :, rows], log_sum[b, :, rows] = found[0], found[2][..., 0]

    def _blocks_with(self, rows: Tensor) -> Iterator[tuple[int, slice]]:
        if bool(rows.any()):
            for b in range(self.batch):
                yield from ((b, block) for block in self.blocks(self.num_queries) if bool(rows[b, block].any()))

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
        self.begin_backward(need_poses, need_scale)
        dot = (grad * output).sum(-1, keepdim=True)
        wrong = ~(log_sum > self.limits.trusted).all(1)
        log_least = None
        if not self.weighs_one:
            known = log_sum.double().masked_fill(wrong[:, None], math.inf)
            known = known.mT.flatten(0, 1)[self.queries.slots].unflatten(0, (-1, self.span))  # [I, leaves, c, H]
            log_least = known.flatten(1, 2).amin(1) - _MARGIN
        over = (-log_sum).exp().masked_fill(wrong[:, None], 0.0)[..., None]
        of_rows, of_keys = [grad * over, -dot * over], [self.value.unflatten(0, (self.batch, -1)), None]
        if self.symmetric:  # of both, and once more with the halves exchanged
            left = right = self._table(self.queries, of_rows + of_keys)
        else:
            left, right = self._table(self.queries, of_rows), self._table(self.keys, of_keys)
        del of_rows, over
        to_value = left.new_zeros(*right.shape[:-1], self.width)
        to_query = torch.zeros_like(self.query_poses)
        to_key = to_query if self.key is self.query else torch.zeros_like(self.key_poses)
        for queries, keys, same in self._tiles(log_least):
            weights, arrays, saved = self._weigh(queries, keys, keep=True)
            mine, theirs = self._take(left, queries, 4), self._take(right, keys, 5)
            self._add(to_value, keys, self._product(weights.mT, mine[..., : self.width]))
            if self.symmetric and not same:
                self._add(to_value, queries, torch.bmm(weights, theirs[..., : self.width]))
            elif self.symmetric:
                weights.mul_(0.5)  # each pair comes twice
            if not (need_poses or need_scale):
                continue
            if self.symmetric:
                mine = mine.roll(self.width + 1, -1)
            to_scores = torch.bmm(mine, theirs.mT, out=self.memory(1, *weights.shape)).mul_(weights)
            found = self.to_geometry(to_scores, arrays, saved)
            if found is not None:
                self._add(to_query, queries, found[0])
                self._add(to_key, keys, found[1])
        grads = self._from_table(to_value, self.keys)
        self.grad_query += self._from_table(to_query, self.queries).view_as(self.query)
        if to_key is not to_query:
            self.grad_key += self._from_table(to_key, self.keys).view_as(self.key)
        self._backward_again(wrong, grad, dot, log_sum, grads)
        to_keys = grads.new_empty(0) if to_key is to_query else self.grad_key
        return self.grad_query, to_keys, self.grad_scale, grads, grads.new_empty(0), grads.new_empty(0)

    def _backward_again(self, wrong: Tensor, grad: Tensor, dot: Tensor, log_sum: Tensor, to_value: Tensor) -> None:
        """Without skipping, of the rows [B, N] that are wrong."""
        for b, rows in self._blocks_with(wrong):
            batch, right = slice(b, b + 1), ~wrong[b, None, rows, None]
            values = self.cut(self.value[self.flat(batch)])
            found = [torch.zeros_like(value) for value in values]
            given = grad[b, :, rows].masked_fill(right, 0.0), dot[b, :, rows].masked_fill(right, 0.0)
            none = grad.new_empty(*given[0].shape[:2], 0)
            self.backward_rows(batch, rows, given[0], none, given[1], log_sum[b, :, rows, None], values, found)
            to_value[b] += torch.cat(found, 1)
