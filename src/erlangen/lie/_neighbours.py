"""Which keys may be left out of a row of attention: a tree of boxes around poses, and a search with a proof.

Poses are put into the leaves of a k-d tree, all of one size, by cutting at the median of the longest side of a box
(Bentley 1975). A score is at most −Σ_n slope[h, n] gap_n², with the gaps between two boxes along each coordinate, so
boxes bound the weights of all pairs between them. The search goes down the tree of the keys, for all blocks of queries
at once, and drops what lies far away, first whole nodes and then leaves:

- A row weighs at least ``least``, which is known beforehand. A pair may be dropped on the way down if it weighs at most
  a share ε/(4 M) of that; so all of those together weigh at most ε/4 of the row.
- The leaves that are left are sorted into buckets by their bounds, and the lowest buckets are dropped as long as what
  they may weigh adds up to at most ¾ ε.

Where a pair serves its transpose too, only leaves behind a block are looked at, and dropping one costs the rows of
both: both have to agree. Bounds and sums are in float64; a bound is a little higher than it had to be, for the rounding
of the scores. A bound that is not a number drops nothing.

Shape suffixes: B batch, H heads, G heads of the geometry, n coordinates, N poses, L leaves of one element of the batch,
c slots of a leaf, I blocks of queries, E pairs of a block and a leaf.
"""

import math

import torch
from torch import Tensor

_FAN = 8  # nodes of the search have this many children
_CHUNK = 512  # blocks that are searched for at once: bounds the memory of it
_BUCKETS = 48
_ROUNDING = 1e-4  # of a score, relative


class Tree:
    """Poses in the leaves of a k-d tree, those of one element of the batch after those of another.

    Attributes:
        slots: which pose stands in a slot of a leaf, counted through the batch, int64 [B·L, c].
        is_fill: bool [B·L, c], true where a slot repeats a pose of another only to fill its leaf.
        place: where a pose stands, in slots counted through all leaves, int64 [B·N].
        num_leaves: L, a power of two.
    """

    def __init__(self, where: Tensor, unit: Tensor, leaf: int) -> None:
        """
        Args:
            where: positions, float64 [B, G, n, N].
            unit: of each coordinate, [n]; sides of boxes are compared in these.
            leaf: the most slots of a leaf.
        """
        batch, _, _, num = where.shape
        levels = max(0, math.ceil(math.log2(num / leaf)))
        self.num_leaves = 1 << levels
        size = -(-num // self.num_leaves)
        entry = torch.arange(size << levels, device=where.device) * num // (size << levels)  # every pose, some twice
        fill = entry == entry.roll(1)
        fill[0] = False
        points = (where.mean(1) / unit[:, None]).mT[:, entry]  # [B, slots, n]
        order = torch.arange(len(entry), device=where.device).expand(batch, -1)
        for _ in range(levels):
            axis = (points.amax(1) - points.amin(1)).argmax(-1)
            along = points.gather(2, axis[:, None, None].expand(-1, points.shape[1], 1))[..., 0]
            sort = along.argsort(1)
            points = points.gather(1, sort[..., None].expand_as(points)).unflatten(1, (2, -1)).flatten(0, 1)
            order = order.gather(1, sort).unflatten(1, (2, -1)).flatten(0, 1)
        first = torch.arange(batch, device=where.device).repeat_interleave(self.num_leaves)[:, None] * num
        self.slots, self.is_fill = entry[order] + first, fill[order]
        real = ~self.is_fill.flatten()
        self.place = torch.empty(batch * num, dtype=torch.int64, device=where.device)
        self.place[self.slots.flatten()[real]] = real.nonzero()[:, 0]
        inside = where.permute(0, 3, 1, 2).flatten(0, 1)[self.slots]  # [B·L, c, G, n]
        self._low, self._high = inside.amin(1), inside.amax(1)

    def boxes(self, span: int) -> tuple[Tensor, Tensor]:
        """Lowest and highest coordinates [B·L/span, G, n] of each so many leaves."""
        return self._low.unflatten(0, (-1, span)).amin(1), self._high.unflatten(0, (-1, span)).amax(1)


def upper_bounds(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], slope: Tensor) -> Tensor:
    """What no score between two boxes is above, [E, H].

    Args:
        queries, keys: lowest and highest coordinates of boxes, [E, G, n].
        slope: [H, n].
    """
    gap = torch.maximum(keys[0] - queries[1], queries[0] - keys[1]).clamp_(min=0)
    return (gap.square_() * slope).sum(-1).mul_(_ROUNDING - 1)


def near_leaves(
    queries: Tree, keys: Tree, group: int, slope: Tensor, log_least: Tensor | None, share: float, half: bool
) -> tuple[Tensor, Tensor]:
    """Blocks of queries with the leaves of keys that they cannot leave out, int32 [E] each, the blocks in order.

    Args:
        queries, keys: their trees.
        group: so many leaves are a block of queries.
        slope: float64 [H, n].
        log_least: logarithms of what the rows of a block weigh at least, float64 [I, H]; None where that is 1.
        share: ε.
        half: queries are the keys, and the leaves of a block and before it are not wanted.
    """
    if log_least is None and keys.boxes(1)[0].shape[1] == 1:
        slope = slope.amin(0, keepdim=True)  # no head's bounds are higher
    per_batch = queries.num_leaves // group
    device = queries.slots.device
    spans = [1]
    while keys.num_leaves > _FAN * spans[0]:
        spans.insert(0, spans[0] * _FAN)
    levels = [(span, keys.boxes(span)) for span in spans]
    size = keys.slots.shape[1]
    lowest = math.log(share / (4 * size * keys.num_leaves))
    low, high = queries.boxes(group)
    found = []
    for blocks in torch.arange(len(low), device=device).split(_CHUNK):
        top = keys.num_leaves // spans[0]
        i = blocks.repeat_interleave(top)
        j = ((blocks // per_batch)[:, None] * top + torch.arange(top, device=device)).flatten()
        excess = i
        for span, (key_low, key_high) in levels:
            if span != spans[0]:
                i = i.repeat_interleave(_FAN)
                j = (j[:, None] * _FAN + torch.arange(_FAN, device=device)).flatten()
            if half:
                behind = (j + 1) * span > (i + 1) * group
                i, j = i[behind], j[behind]
            bounds = upper_bounds((low[i], high[i]), (key_low[j], key_high[j]), slope)
            excess = (bounds if log_least is None else bounds - log_least[i]).amax(-1)
            kept = ~(excess <= lowest)
            i, j, excess = i[kept], j[kept], excess[kept]
        # The share of a row that a key may weigh is exp(excess). Above ε it cannot be dropped.
        bucket = (excess - lowest) * (_BUCKETS / (math.log(share) - lowest))
        bucket = bucket.nan_to_num(nan=_BUCKETS, posinf=_BUCKETS).clamp_(0, _BUCKETS)
        found.append((i.int(), j.int(), bucket.to(torch.uint8), excess))
    block, leaf, bucket, excess = (torch.cat(parts) for parts in zip(*found))
    may_weigh = excess.exp().nan_to_num_(nan=math.inf)
    to_block = _sums(block, bucket, may_weigh * size, len(low))
    if half:
        to_leaf = _sums(leaf, bucket, may_weigh * (size * group), len(keys.slots))
        allowed = _allowed(to_leaf + to_block.repeat_interleave(group, 0), share)
        allowed = allowed.unflatten(0, (-1, group)).amin(1)
        kept = bucket >= torch.minimum(allowed[block], allowed[leaf // group])
    else:
        kept = bucket >= _allowed(to_block, share)[block]
    return block[kept], leaf[kept]


def _sums(row: Tensor, bucket: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Sums of weights in each row and bucket, [rows, buckets], without the last bucket, which is for what must stay."""
    where = row.long() * (_BUCKETS + 1) + bucket
    sums = torch.zeros(rows * (_BUCKETS + 1), dtype=weight.dtype, device=weight.device)
    return sums.index_add_(0, where, weight).unflatten(0, (rows, -1))[:, :-1]


def _allowed(sums: Tensor, share: float) -> Tensor:
    """How many of its lowest buckets a row may drop."""
    return (sums.cumsum(-1) <= 0.75 * share * (1 - 1e-9)).sum(-1)


def nearest_leaves(queries: Tree, keys: Tree, group: int, num: int) -> Tensor:
    """Some leaves of keys near each block of queries, int64 [I, at most G · num], each once; as many as are missing are
    B·L, which is no leaf. They need not be the nearest.
    """
    per_batch = queries.num_leaves // group
    (low, high), device = queries.boxes(group), queries.slots.device
    centre = (low + high)[:, :, None] / 2  # [I, G, 1, n]
    blocks = torch.arange(len(low), device=device)
    span = keys.num_leaves
    j = (blocks // per_batch)[:, None, None].expand(-1, low.shape[1], 1)
    heads = torch.arange(low.shape[1], device=device)[:, None]
    while span > 1:
        fan = min(span, _FAN)
        span //= fan
        j = (j[..., None] * fan + torch.arange(fan, device=device)).flatten(2)
        key_low, key_high = keys.boxes(span)
        gap = torch.maximum(key_low[j, heads] - centre, centre - key_high[j, heads])
        # of boxes that hold the centre, the one whose sides are far from it
        distance = gap.clamp(min=0).square().sum(-1) + 1e-6 * gap.square().sum(-1)
        j = j.gather(2, distance.topk(min(num, j.shape[2]), -1, largest=False).indices)
    j = j.flatten(1).sort(-1).values
    return torch.cat([j[:, :1], j[:, 1:].masked_fill(j[:, 1:] == j[:, :-1], len(keys.slots))], -1)


def in_batches(block: Tensor, leaf: Tensor, blocks: int, most: int, filler: int) -> list[tuple[Tensor, Tensor]]:
    """The leaves of each block side by side, in batches of like length.

    Args:
        block, leaf: as from ``near_leaves``.
        blocks: I.
        most: the most leaves of a batch, all of its blocks together; a block that has more comes several times.
        filler: stands where a block has fewer leaves than its batch.

    Returns:
        pairs of blocks [T] and leaves [T, C], int64.
    """
    count = torch.bincount(block, minlength=blocks)
    parts = -(-count // most)
    length = (-(-count // parts.clamp(min=1))).clamp(min=1)  # as even as can be
    device, block = block.device, block.long()
    rank = torch.arange(len(block), device=device) - (count.cumsum(0) - count)[block]
    row, column = (parts.cumsum(0) - parts)[block] + rank // length[block], rank % length[block]
    of_row = torch.arange(blocks, device=device).repeat_interleave(parts)
    sizes = torch.bincount(row, minlength=len(of_row))
    order = sizes.argsort(descending=True, stable=True)
    of_row, sizes = of_row[order], sizes[order]
    starts = torch.empty_like(sizes)
    starts[order] = sizes.cumsum(0) - sizes
    in_order = torch.empty_like(block)
    in_order[starts[row] + column] = leaf.long()
    widths, batches, start, entry = sizes.tolist(), [], 0, 0
    while start < len(widths):
        width = widths[start]
        stop = min(start + max(1, most // width), len(widths))
        filled = torch.arange(width, device=device) < sizes[start:stop, None]
        end = entry + sum(widths[start:stop])
        table = filled.new_full(filled.shape, filler, dtype=torch.int64)
        table[filled] = in_order[entry:end]
        batches.append((of_row[start:stop], table))
        start, entry = stop, end
    return batches
