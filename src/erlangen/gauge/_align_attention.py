"""Which head of one layer's attention belongs to which of another's, and how each is turned towards it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import Tensor

from ._align_heads import AttentionForm, AttentionMatch, each_head, kv_heads
from ._align_turns import Turns, inverse, polar
from ._assignment import assignment
from ._fold import Frame, latent_readers
from ._weights import give_back

_SMALL_GROUP = 3  # query heads of a group up to which all their orders are tried
_SWEEPS = 20  # alternations of heads, latents and the rotary part of latent attention
_TINY = torch.finfo(torch.float64).tiny
_SAME = Frame()


def _weight(a: AttentionForm, b: AttentionForm, names: tuple[str, ...]) -> float:
    """One over the sizes of both, so that kinds of weights count alike."""
    sizes = [sum(map(form.square, names)) for form in (a, b)]
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


def _own_products(form: AttentionForm, pair: tuple[str, str], turns: Turns) -> Tensor:
    """[H]: squares of the sizes of the products of heads."""
    found = []
    for heads in form.blocks():
        some = form.some(heads)
        by_query, by_group = (some.heads[name] @ some.heads[name].mT for name in pair)
        found.append(turns.product_inner(by_query, each_head(by_group, len(heads))))
        del some
        give_back()
    return torch.cat(found)


def head_similarity(a: AttentionForm, b: AttentionForm, frame: Frame = _SAME) -> Tensor:
    """[H, H]: cosines of the products of every head with every other, the mean of scores and of values.

    Args:
        a, b: the forms.
        frame: in which b is looked at.
    """
    attention, size = a.attention, a.attention.group_size
    kinds = (
        (("query", "key"), Turns.beside_positions(attention.head_dim, attention.rotary)),
        (("output", "value"), Turns.all(attention.value_width)),
    )
    found = torch.zeros(2, attention.num_heads, attention.num_heads, dtype=torch.float64)
    for mine in a.blocks():
        one = a.some(mine).in_frame(inverse(frame))
        for theirs in b.blocks():
            give_back()
            two = b.some(theirs)
            for kind, ((by_query, by_group), turns) in enumerate(kinds):
                for place, head in enumerate(mine.tolist()):
                    own, group = slice(place, place + 1), slice(place // size, place // size + 1)
                    first = _overlaps(one.heads[by_query][own], two.heads[by_query])[0]
                    second = _overlaps(one.heads[by_group][group], two.heads[by_group])[0]
                    found[kind, head, theirs] = turns.product_inner(first, each_head(second, len(theirs)))
            del two
        del one
    give_back()
    for kind, (pair, turns) in enumerate(kinds):
        first, second = (_own_products(form, pair, turns).clamp_min(0) for form in (a, b))
        found[kind] /= (first[:, None] * second[None]).sqrt().clamp_min(_TINY)
    return found.mean(dim=0)


# --- turns, heads being given ----------------------------------------------------------------------------------------


def _paired(
    a: AttentionForm, b: AttentionForm, heads: Tensor, frame: Frame
) -> Iterator[tuple[Tensor, AttentionForm, AttentionForm]]:
    """Some places at a time: these, the heads of a there in the frame of b, and the heads of b that belong to them."""
    for places in a.blocks():
        yield places, a.some(places).in_frame(inverse(frame)), b.some(heads[places])
        give_back()


def _matched_overlap(a: AttentionForm, b: AttentionForm, by_query: str, by_group: str) -> Tensor:
    """[G, width, width]: over a group, of the rows of both maps."""
    first = (a.heads[by_query] @ b.heads[by_query].mT).unflatten(0, (a.attention.num_kv_heads, -1)).sum(dim=1)
    return first + a.heads[by_group] @ b.heads[by_group].mT


def _rotary_overlap(a: AttentionForm, b: AttentionForm) -> Tensor:
    total = (a.heads["rotary_query"] @ b.heads["rotary_query"].mT).sum(dim=0, keepdim=True)
    return total + a.heads["rotary_key"] @ b.heads["rotary_key"].mT


def _rotary_turns(a: AttentionForm) -> Turns | None:
    latent = a.attention.latent
    if latent is None:
        return None
    width = latent.rotary_key.width
    fixed = a.value_output.whole is None
    return Turns.fixed(width) if fixed else Turns.beside_positions(width, latent.rotary)


def turned_in_place(a: AttentionForm, b: AttentionForm, latents: dict[str, Tensor], scale: Scale) -> AttentionMatch:
    """The best turns of the heads of b towards those of a, in one frame, head by head as they stand.

    Args:
        a, b: forms in float64.
        latents: turns of the latents of b.
        scale: what kinds of weights count; only the value that is reached depends on it.
    """
    rotary = _rotary_turns(a)
    b = b.with_latents(latents)
    scores = _matched_overlap(a, b, "query", "key")
    values = _matched_overlap(a, b, "output", "value")
    value = scale.query_key * a.query_key.gain(scores).sum().item()
    value += scale.value_output * a.value_output.gain(values).sum().item()
    heads = torch.arange(a.attention.num_heads)
    match = AttentionMatch(heads, a.query_key.best(scores), a.value_output.best(values), None, latents)
    if rotary is not None:
        overlap = _rotary_overlap(a, b)
        match.rotary = rotary.best(overlap)
        value += scale.rotary * rotary.gain(overlap).sum().item()
    for name, weight in scale.latents.items():
        value += weight * (a.heads[name] * b.heads[name]).sum().item()
    match.value = value
    return match


def turned(
    a: AttentionForm,
    b: AttentionForm,
    heads: Tensor,
    latents: dict[str, Tensor],
    scale: Scale | None = None,
    frame: Frame = _SAME,
) -> AttentionMatch:
    """The best turns for given heads and latents of b, which is looked at in a frame, with the value reached."""
    scale = Scale.of(a, b) if scale is None else scale
    parts = []
    for _, one, two in _paired(a, b, heads, frame):
        parts.append(turned_in_place(one, two, latents, scale))
        del one, two
    query_key, value_output = (
        torch.cat([turn for part in parts if (turn := part.turn_of(name)) is not None]) for name in ("query", "value")
    )
    value = sum(part.value for part in parts)
    return AttentionMatch(heads, query_key, value_output, parts[0].rotary, latents, value)


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


def _best_heads(
    a: AttentionForm, b: AttentionForm, current: AttentionMatch, scale: Scale, frame: Frame = _SAME
) -> Tensor:
    """The order of heads of b that suits a best, groups kept together; latents of b are turned already."""
    attention = a.attention
    groups, size, number = attention.num_kv_heads, attention.group_size, attention.num_heads
    fixed = torch.zeros(number, number, dtype=torch.float64)
    if current.rotary is not None:
        query = current.rotary @ b.heads["rotary_query"]
        fixed = scale.rotary * (a.heads["rotary_query"].flatten(1) @ query.flatten(1).mT)
    kv = kv_heads(current.heads, groups)
    totals = torch.empty(groups, groups, dtype=torch.float64)
    inner = torch.zeros(groups, groups, size, dtype=torch.int64)
    for mine in a.blocks():
        one = a.some(mine).in_frame(inverse(frame))
        for theirs in b.blocks():
            give_back()
            two, others = b.some(theirs), kv_heads(theirs, len(theirs) // size)
            for place, i in enumerate(kv_heads(mine, len(mine) // size).tolist()):
                own, whole = slice(place * size, (place + 1) * size), slice(place, place + 1)
                scores = scale.query_key * _overlaps(one.heads["query"][own], two.heads["query"])
                keys = scale.query_key * _overlaps(one.heads["key"][whole], two.heads["key"])[0]
                outputs = scale.value_output * _overlaps(one.heads["output"][own], two.heads["output"])
                values = scale.value_output * _overlaps(one.heads["value"][whole], two.heads["value"])[0]
                if size == 1:
                    gains = a.query_key.gain(scores[0] + keys) + a.value_output.gain(outputs[0] + values)
                    totals[i, others] = gains + fixed[i, others]
                    continue
                of_group = slice(i * size, (i + 1) * size)
                for at, j in enumerate(others.tolist()):
                    part = slice(at * size, (at + 1) * size)
                    start = current.heads[of_group] - j * size if kv[i] == j else torch.arange(size)
                    inner[i, j], totals[i, j] = _inner_order(
                        a, scores[:, part], keys[at], outputs[:, part], values[at],
                        fixed[of_group, j * size : (j + 1) * size], start,
                    )  # fmt: skip
    chosen = assignment(totals).tolist()
    return torch.cat([j * size + inner[i, j] for i, j in enumerate(chosen)])


def match_attention(
    a: AttentionForm, b: AttentionForm, start: AttentionMatch | None = None, frame: Frame = _SAME
) -> AttentionMatch:
    """Match the attention of b with that of a.

    Args:
        start: a match from which the value never falls; None: the heads as they stand, and latents by what makes them.
        frame: in which b is looked at.
    """
    if a.attention.latent is not None:
        a, frame = a.in_frame(inverse(frame)), _SAME
    scale = Scale.of(a, b)
    if start is None:
        place = torch.arange(a.attention.num_heads)
        match = turned(a, b, place, _latent_turns(a, b, None, scale), scale, frame)
    else:
        match = turned(a, b, start.heads, start.latents, scale, frame)
    for _ in range(_SWEEPS if a.attention.latent is not None else 1):
        found = match
        heads = _best_heads(a, b.with_latents(match.latents), match, scale, frame)
        if not torch.equal(heads, match.heads):
            other = turned(a, b, heads, match.latents, scale, frame)
            found = other if other.value > match.value else match
        if found.latents:
            other = turned(a, b, found.heads, _latent_turns(a, b, found, scale), scale, frame)
            found = other if other.value > found.value else found
        improved = found.value - match.value
        match = found
        if improved <= 1e-12 * abs(match.value):
            break
    return match


def frame_overlap(a: AttentionForm, b: AttentionForm, match: AttentionMatch, overlap: Tensor) -> None:
    """Add Σ Aᵀ B over the rows of a and of the matched b, each kind weighted, to an overlap [dim, dim]."""
    scale, size = Scale.of(a, b), a.attention.group_size
    for places, one, two in _paired(a, b.with_latents(match.latents), match.heads, _SAME):
        two = two.moved_by(match.of(places, size))
        for name in a.stream:
            first, second = (form.stream_rows(name)[0].flatten(0, 1) for form in (one, two))
            overlap.addmm_(first.mT, second, alpha=scale.of_map(name))
        del one, two
