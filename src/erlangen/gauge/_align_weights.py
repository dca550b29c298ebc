"""What belongs to what in two models: heads, hidden features, experts, and the frame of the residual stream.

A model b is brought to a model a in forms of which only orthogonal freedom is left (`_align_heads`, `_align_mlp`). The
search goes in turn over heads, hidden features and the frame of the residual stream, and each of these steps takes the
best there is with the others fixed: the sum of inner products never falls. Experts are matched by their scores and by
what they are as maps, before their features are (`_align_experts`); a match that brings less is not taken.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import _align_attention, _align_mlp
from ._align_attention import match_attention
from ._align_experts import ExpertsForm, ExpertsMatch, match_experts
from ._align_heads import AttentionForm, AttentionMatch
from ._align_mlp import MLPForm, NeuronMatch, match_neurons
from ._align_side import Progress, Side, Using, pairs_of_rows, unembedding_rows
from ._align_turns import polar
from ._assignment import matching as assigned
from ._canonical_residual import mean_free_basis
from ._fold import Frame
from ._weights import chunks, give_back
from .comparison import NEAR

_KEPT = 1 << 25  # numbers of two models up to which their forms stay in memory between rounds
_SETTLED = 1e-7  # share of the objective below which a round has brought nothing


# --- the frame --------------------------------------------------------------------------------------------------------


def frame_value(frame: Frame, overlap: Tensor) -> float:
    """⟨A, B Rᵀ⟩ for an overlap Aᵀ B [dim, dim]."""
    if frame.matrix is not None:
        return sum(torch.dot(row, other).item() for row, other in zip(frame.matrix, overlap))
    if frame.order is not None and frame.sign is not None:
        return (frame.sign * overlap[torch.arange(len(overlap)), frame.order]).sum().item()
    return overlap.trace().item()


def best_frame(overlap: Tensor, rotations: str) -> Frame:
    """The frame R of largest ⟨A, B Rᵀ⟩ for an overlap Aᵀ B [dim, dim]; exact but for long assignments."""
    dim = len(overlap)
    if rotations == "all":
        return Frame(matrix=polar(overlap))
    if rotations == "mean":
        basis = mean_free_basis(dim, overlap.device)
        return Frame(matrix=basis @ polar(basis.mT @ overlap @ basis) @ basis.mT + 1 / dim)
    place = torch.arange(dim)
    if rotations == "signed":
        order = assigned(overlap.abs())
        return Frame(order=order, sign=torch.where(overlap[place, order] < 0, -1.0, 1.0).double())
    found = []
    for sign in (1.0, -1.0):
        order = assigned(sign * overlap)
        found.append(Frame(order=order, sign=torch.full((dim,), sign, dtype=torch.float64)))
    return max(found, key=lambda frame: frame_value(frame, overlap))


def _table_overlap(a: Side, b: Side) -> tuple[Tensor, float]:
    """Overlap Aᵀ B of embeddings and unembedding, each over the sizes of both; and the distance of the embeddings."""
    dim, layout = a.layout.dim, a.layout
    whole = torch.zeros(dim, dim, dtype=torch.float64)

    def add(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
        overlap, sizes = torch.zeros(dim, dim, dtype=torch.float64), [0.0, 0.0]
        for one, two in pairs:
            overlap.addmm_(one.mT, two)
            sizes = [sizes[0] + one.square().sum().item(), sizes[1] + two.square().sum().item()]
        if min(sizes) > 0:
            whole.add_(overlap, alpha=1 / (sizes[0] * sizes[1]) ** 0.5)
        total = sum(sizes)
        return max(0.0, 1 - 2 * overlap.trace().item() / total) ** 0.5 if total else 0.0

    distance = add(pair for name in a.tables for pair in pairs_of_rows(a, b, name))
    unembedding = layout.unembedding
    if unembedding is not None:
        sizes = layout.vocab_size, dim
        add(
            (rows[0][1], rows[1][1])
            for rows in (unembedding_rows((a, b), unembedding, part) for part in chunks(*sizes))
        )
    return whole, distance


# --- the search -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Matching:
    """What belongs to what in two models.

    Attributes:
        using: what was looked for.
        frame: of the residual streams: "same", "turned" or "permuted".
        heads: of each layer, int64 [num_heads]: head of the second model that belongs to each of the first.
        neurons: of each layer, int64 [features] likewise; None for experts.
        experts: of each layer, the same for a mixture of experts; None where there is none.
        head_similarity: of each layer, [num_heads, num_heads]: cosines of the products of every head of the first with
            every one of the second, in one frame.
        similarity: the objective after each round; it never falls.
        notes: what was left and why, in sentences.
        residual: the frame: x of the second model is residual x in the first's.
        latents: of each layer, turns of its latents.
    """

    using: Using
    frame: str
    heads: tuple[Tensor, ...]
    neurons: tuple[Tensor | None, ...]
    head_similarity: tuple[Tensor, ...]
    similarity: tuple[float, ...]
    notes: tuple[str, ...]
    experts: tuple[ExpertsMatch | None, ...]
    residual: Frame = field(default_factory=Frame, repr=False)
    latents: tuple[dict[str, Tensor], ...] = field(default=(), repr=False)


class _Forms:
    """The forms of both models, kept in memory where they are small."""

    def __init__(self, a: Side, b: Side) -> None:
        self.sides = a, b
        size = 2 * sum(a.stored.shape(name).numel() for name in a.layout.tensor_shapes())
        self._keep = size <= _KEPT
        # Of large models, forms of heads and experts wait in float32 where that is what is stored; only orders and the
        # frame are found from them.
        whole = any(side.stored.dtype(name) == torch.float64 for side in (a, b) for name in a.layout.tensor_shapes())
        self._dtype = torch.float64 if self._keep or whole else torch.float32
        self._kept: dict[tuple[str, int], Any] = {}

    def _of(self, kind: str, number: int, make: Callable[[Side], Any]) -> Any:
        found = self._kept.get((kind, number))
        if found is None:
            first = make(self.sides[0])
            give_back()
            found = first, make(self.sides[1])
            give_back()
            if self._keep:
                self._kept[kind, number] = found
        return found

    def attention(self, number: int) -> tuple[AttentionForm, AttentionForm]:
        """Of the attention of one layer."""
        return self._of("attention", number, lambda side: side.attention_form(number, self._dtype))

    def mlp(self, number: int) -> tuple[MLPForm | None, MLPForm | None]:
        """Of the feed-forward part of one layer."""
        return self._of("mlp", number, lambda side: side.mlp_form(number, self._keep))

    def experts(self, number: int) -> tuple[ExpertsForm | None, ExpertsForm | None]:
        """Of the mixture of experts of one layer."""
        return self._of("experts", number, lambda side: side.experts_form(number, self._keep, self._dtype))


def _first_frame(a: Side, b: Side, using: Using) -> tuple[Frame, str, Tensor | float, str]:
    """The frame from which the search starts, what it is called, and why the residual stream is left where it is.

    With it what the tables add to every overlap of frames, [dim, dim]; or, where it stays, to the objective.
    """
    steps, frame = a.steps, Frame()
    tables, distance = _table_overlap(a, b)
    value = frame_value(frame, tables)
    if steps.rotations == "none":
        why = f"The frame of the residual stream is left: {steps.reason}." if using != "none" else ""
        return frame, "same", value, why
    found = best_frame(tables, steps.rotations)
    if frame_value(found, tables) > value and _is_turned(a, b, found, distance):
        return found, "turned" if found.matrix is not None else "permuted", tables, ""
    why = (
        f"The frame of the residual stream is kept: in it the embeddings are {distance:.2g} apart, and in no other "
        "half as far."
    )
    return frame, "same", value, why


def match(a: Side, b: Side, rounds: int, progress: Progress | None) -> Matching:
    """Look for what belongs to what."""
    layout, using = a.layout, a.using
    number = len(layout.layers)
    frame, kind, tables, why = _first_frame(a, b, using)
    give_back()
    notes = [why] if why else []
    forms = _Forms(a, b)
    by_head, by_neuron = (match_attention, _align_attention.frame_overlap), (match_neurons, _align_mlp.frame_overlap)
    attention: list[AttentionMatch | None] = [None] * number
    neurons: list[NeuronMatch | None] = [None] * number
    experts: list[ExpertsMatch | None] = [None] * number
    likeness: list[Tensor] = []
    history: list[float] = []
    for turn in range(rounds):
        overlap = tables.clone() if isinstance(tables, Tensor) else None
        total = tables if not isinstance(tables, Tensor) else frame_value(frame, tables)
        for layer in range(number):
            if using == "none":
                attention[layer] = AttentionMatch(torch.arange(layout.layers[layer].attention.num_heads))
            else:
                total += _match_part(forms.attention, by_head, layer, frame, attention, overlap)
                give_back()
                total += _match_part(forms.mlp, by_neuron, layer, frame, neurons, overlap)
                give_back()
                one, two = forms.experts(layer)
                if one is not None and two is not None:
                    experts[layer] = mixture = match_experts(one, two, frame, experts[layer], overlap)
                    total += mixture.value
            if progress is not None:
                progress(turn * number + layer + 1, rounds * number)
            give_back()
        settled = bool(history) and total - history[-1] <= _SETTLED * abs(total)
        history.append(total)
        if overlap is None or settled or turn + 1 == rounds:
            break
        better = best_frame(overlap, a.steps.rotations)
        if frame_value(better, overlap) - frame_value(frame, overlap) <= _SETTLED * abs(total):
            break
        frame = better
        del overlap, better
    if progress is not None:
        progress(rounds * number, rounds * number)
    for layer in range(number):
        one, two = forms.attention(layer)
        likeness.append(_align_attention.head_similarity(one, two, frame))
        if using == "gauge":
            notes += [
                f"Layer {layer} of the {which} model: {sentence}."
                for which, form in (("first", one), ("second", two))
                for sentence in form.low_rank
            ]
        del one, two
        give_back()
    if using != "none":
        notes += _left_out(b, forms)
    orders: list[Tensor | None] = []
    for layer, found_mlp in zip(layout.layers, neurons):
        if found_mlp is None:
            orders.append(None if layer.mlp is None else torch.arange(layer.mlp.up.width))
        else:
            orders.append(found_mlp.order)
    for layer, mixture in enumerate(layer.experts for layer in layout.layers):
        if mixture is not None and experts[layer] is None:
            experts[layer] = ExpertsMatch.in_place(mixture)
    return Matching(
        using=using,
        frame=kind,
        heads=tuple(found.heads for found in attention if found is not None),
        neurons=tuple(orders),
        head_similarity=tuple(likeness),
        similarity=tuple(history),
        notes=tuple(notes),
        experts=tuple(experts),
        residual=frame,
        latents=tuple(found.latents for found in attention if found is not None),
    )


def _match_part(
    forms: Callable[[int], tuple[Any, Any]],
    by: tuple[Callable[..., Any], Callable[..., None]],
    layer: int,
    frame: Frame,
    found: list[Any],
    overlap: Tensor | None,
) -> float:
    """Match the heads or the hidden features of a layer, and add to the overlap of frames; the value reached.

    Args:
        forms: gives those of both models; None for what a layer does not have.
        by: what matches them, and what adds to the overlap.
        layer, frame, overlap: as of `match`.
        found: of each layer, the match from which the value never falls; replaced.
    """
    one, two = forms(layer)
    if one is None or two is None:
        return 0.0
    found[layer] = by[0](one, two, found[layer], frame)
    if overlap is not None:
        by[1](one, two, found[layer], overlap)
    return found[layer].value


def _is_turned(a: Side, b: Side, frame: Frame, before: float) -> bool:
    """Whether another frame is worth it: the embeddings are far apart, or half as far in it."""
    if before > NEAR:
        return True
    difference = size = 0.0
    for name in a.tables:
        for one, two in pairs_of_rows(a, b, name):
            difference += (one - frame.apply(two)).square().sum().item()
            size += (one.square().sum() + two.square().sum()).item()
    return (difference / size) ** 0.5 < before / 2 if size else False


def _left_out(b: Side, forms: _Forms) -> list[str]:
    """What is not matched, in sentences."""
    notes = []
    for number, layer in enumerate(b.layout.layers):
        mixture = forms.experts(number)[1]
        if mixture is not None and mixture.fixed:
            notes.append(
                f"Layer {number}: experts keep their order, for some of the second model's have the same scores, and "
                "the first of them is taken."
            )
        if layer.mlp is not None and layer.mlp.activation == "prelu" and layer.mlp.slope is None:
            notes.append(f"Layer {number}: hidden features keep their order, for their slopes are not described.")
        attention = layer.attention
        plain = attention.rotary_dim < attention.head_dim
        if number == 0 and plain and isinstance(attention.qk_norm, tuple) and attention.qk_norm[0].gain:
            notes.append("The order of coordinates behind norms of queries and keys is left.")
    return notes
