"""Which head of one layer's attention belongs to which of another's, and how each is turned towards it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import Tensor

from ._align_heads import AttentionForm, AttentionMatch, kv_heads
from ._align_turns import Turns, polar
from ._assignment import assignment
from ._fold import latent_readers

_SMALL_GROUP = 3  # query heads of a group up to which all their orders are tried
_SWEEPS = 20  # alternations of heads, latents and the rotary part of latent attention
_TINY = torch.finfo(torch.float64).tiny


def _weight(a: AttentionForm, b: AttentionForm, names: Iterable[str]) -> float:
    """One over the sizes of both, so that kinds of weights count alike."""
    sizes = [sum(form.heads[name].square().sum().item() for name in names) for form in (a, b)]
    return 1 / (sizes[0] * sizes[1]) ** 0.5 if min(sizes) > 0 else 0.0


@dataclass(frozen=True)
class Scale:
    """What each kind of weights counts."""

    query_key: float
    value_output: float
    rotary: float
    latents: dict[str, float]

    @classmethod
    def of(cls, a: AttentionForm, b: AttentionForm) -> "Scale":
        rotary = _weight(a, b, ("rotary_query", "rotary_key")) if "rotary_key" in a.heads else 0.0
        latents = {name: _weight(a, b, (name,)) for name in latent_readers(a.attention)}
        return cls(_weight(a, b, ("query", "key")), _weight(a, b, ("value", "output")), rotary, latents)

    def of_map(self, name: str) -> float:
        if name in ("query", "key"):
            return self.query_key
        if name in ("value", "output"):
            return self.value_output
        return self.rotary if name in ("rotary_query", "rotary_key") else self.latents[name]


def _overlaps(a: Tensor, b: Tensor) -> Tensor:
    """[n, width, columns], [m, width, columns] -> [n, m, width, width]: a bᵀ of every slice with every other."""
    flat = a.flatten(0, 1) @ b.flatten(0, 1).mT
    return flat.unflatten(0, a.shape[:2]).unflatten(2, b.shape[:2]).transpose(1, 2)


def head_similarity(a: AttentionForm, b: AttentionForm) -> Tensor:
    """[H, H]: cosines of the products of every head with every other, the mean of scores and of values."""
    groups = torch.arange(a.attention.num_heads) // a.attention.group_size

    def products(x: AttentionForm, y: AttentionForm, pair: tuple[str, str], turns: Turns, own: bool) -> Tensor:
        by_query, by_group = pair
        found = []
        for head, group in enumerate(groups.tolist()):
            others, their = (slice(head, head + 1), groups[head : head + 1]) if own else (slice(None), groups)
            one = _overlaps(x.heads[by_query][head : head + 1], y.heads[by_query][others])[0]
            two = _overlaps(x.heads[by_group][group : group + 1], y.heads[by_group][their])[0]
            found.append(turns.product_inner(one, two))
        return torch.stack(found)

    total = torch.zeros(len(groups), len(groups), dtype=torch.float64)
    score_turns = Turns.beside_positions(a.attention.head_dim, a.attention.rotary)
    value_turns = Turns.all(a.attention.value_width)
    for pair, turns in ((("query", "key"), score_turns), (("output", "value"), value_turns)):
        first, second = products(a, a, pair, turns, True), products(b, b, pair, turns, True)
        sizes = (first[:, 0].clamp_min(0)[:, None] * second[:, 0].clamp_min(0)[None]).sqrt()
        total += products(a, b, pair, turns, False) / sizes.clamp_min(_TINY)
    return total / 2


# --- turns, heads being given ----------------------------------------------------------------------------------------


def _matched_overlap(a: AttentionForm, b: AttentionForm, heads: Tensor, by_query: str, by_group: str) -> Tensor:
    """[G, width, width]: over a group, of the rows of both maps, heads of b in an order."""
    groups = a.attention.num_kv_heads
    first = (a.heads[by_query] @ b.heads[by_query][heads].mT).unflatten(0, (groups, -1)).sum(dim=1)
    return first + a.heads[by_group] @ b.heads[by_group][kv_heads(heads, groups)].mT


def _rotary_overlap(a: AttentionForm, b: AttentionForm, heads: Tensor) -> Tensor:
    total = (a.heads["rotary_query"] @ b.heads["rotary_query"][heads].mT).sum(dim=0, keepdim=True)
    return total + a.heads["rotary_key"] @ b.heads["rotary_key"].mT


def _rotary_turns(a: AttentionForm) -> Turns | None:
    latent = a.attention.latent
    if latent is None:
        return None
    width = latent.rotary_key.width
    fixed = a.value_output.whole is None
    return Turns.fixed(width) if fixed else Turns.beside_positions(width, latent.rotary)


def turned(
    a: AttentionForm, b: AttentionForm, heads: Tensor, latents: dict[str, Tensor], scale: Scale | None = None
) -> AttentionMatch:
    """The best turns for given heads and latents, with the value that is reached."""
    scale, rotary = Scale.of(a, b) if scale is None else scale, _rotary_turns(a)
    b = b.with_latents(latents)
    scores = _matched_overlap(a, b, heads, "query", "key")
    values = _matched_overlap(a, b, heads, "output", "value")
    value = scale.query_key * a.query_key.gain(scores).sum().item()
    value += scale.value_output * a.value_output.gain(values).sum().item()
    match = AttentionMatch(heads, a.query_key.best(scores), a.value_output.best(values), None, latents)
    if rotary is not None:
        overlap = _rotary_overlap(a, b, heads)
        match.rotary = rotary.best(overlap)
        value += scale.rotary * rotary.gain(overlap).sum().item()
    for name, weight in scale.latents.items():
        value += weight * (a.heads[name] * b.heads[name]).sum().item()
    match.value = value
    return match


def _latent_turns(a: AttentionForm, b: AttentionForm, match: AttentionMatch | None, scale: Scale) -> dict[str, Tensor]:
    """The best turns of latents; with a match, over the heads that read them too."""
    if a.value_output.whole is None:
        return {}
    matched = b if match is None else b.moved_by(replace(match, latents={}))
    found = {}
    for name, (_, readers) in latent_readers(a.attention).items():
        overlap = scale.latents[name] * (a.heads[name][0] @ b.heads[name][0].mT)
        width = overlap.shape[0]
        for reader in readers if match is not None else ():
            one, two = (form.heads[reader][..., :width].flatten(0, 1) for form in (a, matched))
            overlap = overlap + scale.of_map(reader) * (one.mT @ two)
        found[name] = polar(overlap)
    return found


# --- heads -----------------------------------------------------------------------------------------------------------


def _inner_order(
    a: AttentionForm, scores: Tensor, keys: Tensor, outputs: Tensor, values: Tensor, fixed: Tensor, start: Tensor
) -> tuple[Tensor, float]:
    """The order of the query heads of a group of b that suits one of a best, and the value it gives.

    Args:
        scores, outputs: overlaps of query heads [R, R, K, K] and [R, R, V, V], weighted.
        keys, values: of the key/value heads [K, K] and [V, V], weighted.
        fixed: [R, R], what a pair adds besides.
        start: an order from which it is never worse.
    """
    group = scores.shape[0]
    place = torch.arange(group)

    def value_of(orders: Tensor) -> Tensor:
        """[number] of orders [number, R]."""
        one = scores[place, orders].sum(dim=1) + keys
        two = outputs[place, orders].sum(dim=1) + values
        return a.query_key.gain(one) + a.value_output.gain(two) + fixed[place, orders].sum(dim=1)

    if group <= _SMALL_GROUP:
        orders = torch.tensor(list(permutations(range(group))))
        reached = value_of(orders)
        best = int(reached.argmax())
        return orders[best], reached[best].item()
    likeness = a.query_key.product_inner(scores, keys.expand_as(scores))
    likeness = likeness + a.value_output.product_inner(outputs, values.expand_as(outputs))
    candidates = [start, assignment(likeness)]
    best, highest = start, -torch.inf
    for order in candidates:
        for _ in range(_SWEEPS):
            value = value_of(order[None])[0].item()
            if value <= highest:
                break
            best, highest = order, value
            one = a.query_key.best(scores[place, order].sum(dim=0) + keys)
            two = a.value_output.best(outputs[place, order].sum(dim=0) + values)
            order = assignment((scores * one).sum(dim=(-2, -1)) + (outputs * two).sum(dim=(-2, -1)) + fixed)
    return best, highest


def _best_heads(a: AttentionForm, b: AttentionForm, current: AttentionMatch, scale: Scale) -> Tensor:
    """The order of heads of b that suits a best, groups kept together; latents of b are turned already."""
    attention = a.attention
    groups, size, number = attention.num_kv_heads, attention.group_size, attention.num_heads
    fixed = torch.zeros(number, number, dtype=torch.float64)
    if current.rotary is not None:
        query = current.rotary @ b.heads["rotary_query"]
        fixed = scale.rotary * (a.heads["rotary_query"].flatten(1) @ query.flatten(1).mT)
    kv = kv_heads(current.heads, groups)
    totals = torch.empty(groups, groups, dtype=torch.float64)
    inner: list[list[Tensor]] = []
    for i in range(groups):
        of_group, whole = slice(i * size, (i + 1) * size), slice(i, i + 1)
        scores = scale.query_key * _overlaps(a.heads["query"][of_group], b.heads["query"])
        keys = scale.query_key * _overlaps(a.heads["key"][whole], b.heads["key"])[0]
        outputs = scale.value_output * _overlaps(a.heads["output"][of_group], b.heads["output"])
        values = scale.value_output * _overlaps(a.heads["value"][whole], b.heads["value"])[0]
        if size == 1:
            totals[i] = a.query_key.gain(scores[0] + keys) + a.value_output.gain(outputs[0] + values) + fixed[i]
            inner.append([torch.zeros(1, dtype=torch.int64)] * groups)
            continue
        orders = []
        for j in range(groups):
            part = slice(j * size, (j + 1) * size)
            start = current.heads[of_group] - j * size if kv[i] == j else torch.arange(size)
            order, totals[i, j] = _inner_order(
                a, scores[:, part], keys[j], outputs[:, part], values[j], fixed[of_group, part], start
            )
            orders.append(order)
        inner.append(orders)
    chosen = assignment(totals).tolist()
    return torch.cat([j * size + inner[i][j] for i, j in enumerate(chosen)])


def match_attention(a: AttentionForm, b: AttentionForm, start: AttentionMatch | None = None) -> AttentionMatch:
    """Match the attention of b, in a's frame of the residual stream, with that of a.

    Args:
        start: a match from which the value never falls; None: the heads as they stand, and latents by what makes them.
    """
    scale = Scale.of(a, b)
    if start is None:
        place = torch.arange(a.attention.num_heads)
        match = turned(a, b, place, _latent_turns(a, b, None, scale), scale)
    else:
        match = turned(a, b, start.heads, start.latents, scale)
    for _ in range(_SWEEPS if a.attention.latent is not None else 1):
        found = match
        heads = _best_heads(a, b.with_latents(match.latents), match, scale)
        if not torch.equal(heads, match.heads):
            other = turned(a, b, heads, match.latents, scale)
            found = other if other.value > match.value else match
        if found.latents:
            other = turned(a, b, found.heads, _latent_turns(a, b, found, scale), scale)
            found = other if other.value > found.value else found
        improved = found.value - match.value
        match = found
        if improved <= 1e-12 * abs(match.value):
            break
    return match


def frame_overlap(a: AttentionForm, b: AttentionForm) -> Tensor:
    """[dim, dim]: Σ Bᵀ A over the rows of a and of the matched b, each kind weighted."""
    scale, dim = Scale.of(a, b), a.dim
    total = torch.zeros(dim, dim, dtype=torch.float64)
    for name in a.stream:
        one, two = (form.stream_rows(name)[0].flatten(0, 1) for form in (a, b))
        total += scale.of_map(name) * (two.mT @ one)
    return total
