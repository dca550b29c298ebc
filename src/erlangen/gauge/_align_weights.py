"""What belongs to what in two models: heads, hidden features, experts, and the frame of the residual stream.

A model b is brought to a model a in forms of which only orthogonal freedom is left (`_align_heads`, `_align_mlp`). The
search goes in turn over heads, hidden features and the frame of the residual stream, and each of these steps takes the
best there is with the others fixed: the sum of inner products never falls. Experts are matched by their scores and by
what they are as maps, before their features are (`_align_experts`); a match that brings less is not taken.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

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
        return (frame.matrix * overlap).sum().item()
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
    distance = 0.0

    def add(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
        nonlocal whole
        overlap, sizes = torch.zeros(dim, dim, dtype=torch.float64), [0.0, 0.0]
        for one, two in pairs:
            overlap += one.mT @ two
            sizes = [sizes[0] + one.square().sum().item(), sizes[1] + two.square().sum().item()]
        if min(sizes) > 0:
            whole = whole + overlap / (sizes[0] * sizes[1]) ** 0.5
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
        self.a, self.b = a, b
        size = 2 * sum(a.stored.shape(name).numel() for name in a.layout.tensor_shapes())
        self._keep = size <= _KEPT
        # Of large models, forms of hidden features wait in float32 where that is what is stored; only orders and the
        # frame are found from them.
        whole = any(side.stored.dtype(name) == torch.float64 for side in (a, b) for name in a.layout.tensor_shapes())
        self._dtype = torch.float64 if self._keep or whole else torch.float32
        self._attention: dict[int, tuple[AttentionForm, AttentionForm]] = {}
        self._mlp: dict[int, tuple[MLPForm | None, MLPForm | None]] = {}
        self._experts: dict[int, tuple[ExpertsForm | None, ExpertsForm | None]] = {}

    def attention(self, number: int) -> tuple[AttentionForm, AttentionForm]:
        """Of the attention of one layer."""
        found = self._attention.get(number)
        if found is None:
            found = self.a.attention_form(number), self.b.attention_form(number)
            if self._keep:
                self._attention[number] = found
        return found

    def mlp(self, number: int) -> tuple[MLPForm | None, MLPForm | None]:
        """Of the feed-forward part of one layer."""
        found = self._mlp.get(number)
        if found is None:
            found = self.a.mlp_form(number, self._dtype), self.b.mlp_form(number, self._dtype)
            if self._keep:
                self._mlp[number] = found
        return found

    def experts(self, number: int) -> tuple[ExpertsForm | None, ExpertsForm | None]:
        """Of the mixture of experts of one layer."""
        found = self._experts.get(number)
        if found is None:
            options = number, self._keep, self._dtype
            found = self.a.experts_form(*options), self.b.experts_form(*options)
            if self._keep:
                self._experts[number] = found
        return found


def match(a: Side, b: Side, rounds: int, progress: Progress | None) -> Matching:
    """Look for what belongs to what."""
    layout, steps, using = a.layout, a.steps, a.using
    number = len(layout.layers)
    notes: list[str] = []
    tables, distance = _table_overlap(a, b)
    frame, kind = Frame(), "same"
    free = steps.rotations != "none"
    if free:
        found = best_frame(tables, steps.rotations)
        gained = frame_value(found, tables) - frame_value(frame, tables)
        free = gained > 0 and _is_turned(a, b, found, distance)
        if free:
            frame, kind = found, "turned" if found.matrix is not None else "permuted"
        else:
            notes.append(
                f"The frame of the residual stream is kept: in it the embeddings are {distance:.2g} apart, and in no "
                "other half as far."
            )
    elif using != "none":
        notes.append(f"The frame of the residual stream is left: {steps.reason}.")
    forms = _Forms(a, b)
    attention: list[AttentionMatch | None] = [None] * number
    neurons: list[NeuronMatch | None] = [None] * number
    experts: list[ExpertsMatch | None] = [None] * number
    likeness: list[Tensor] = []
    history: list[float] = []
    for turn in range(rounds):
        total, overlap = frame_value(frame, tables), tables.clone()
        for layer in range(number):
            if using == "none":
                attention[layer] = AttentionMatch(torch.arange(layout.layers[layer].attention.num_heads))
            else:
                added = overlap if free else None
                total += _match_attention_of(forms, layer, frame, attention, added)
                give_back()
                total += _match_neurons_of(forms, layer, frame, neurons, added)
                total += _match_experts_of(forms, layer, frame, experts, added)
            if progress is not None:
                progress(turn * number + layer + 1, rounds * number)
            give_back()
        settled = bool(history) and total - history[-1] <= _SETTLED * abs(total)
        history.append(total)
        if not free or settled or turn + 1 == rounds:
            break
        better = best_frame(overlap, steps.rotations)
        if frame_value(better, overlap) - frame_value(frame, overlap) <= _SETTLED * abs(total):
            break
        frame = better
    if progress is not None:
        progress(rounds * number, rounds * number)
    for layer in range(number):
        one, two = forms.attention(layer)
        likeness.append(_align_attention.head_similarity(one, two.in_frame(frame)))
        give_back()
        if using == "gauge":
            for which, form in (("first", one), ("second", two)):
                notes += [f"Layer {layer} of the {which} model: {sentence}." for sentence in form.low_rank]
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


def _match_attention_of(
    forms: _Forms, layer: int, frame: Frame, found: list[AttentionMatch | None], overlap: Tensor | None
) -> float:
    """Match the attention of a layer, and add to the overlap of frames; the value reached."""
    one, two = forms.attention(layer)
    new = match_attention(one, two.in_frame(frame), found[layer])
    found[layer] = new
    if overlap is not None:
        overlap += _align_attention.frame_overlap(one, two.moved_by(new)).mT
    return new.value


def _match_neurons_of(
    forms: _Forms, layer: int, frame: Frame, found: list[NeuronMatch | None], overlap: Tensor | None
) -> float:
    """Match the hidden features of a layer likewise."""
    one, two = forms.mlp(layer)
    if one is None or two is None:
        return 0.0
    new = match_neurons(one, two.in_frame(frame), found[layer])
    found[layer] = new
    if overlap is not None:
        overlap += _align_mlp.frame_overlap(one, two, new).mT
    return new.value


def _match_experts_of(
    forms: _Forms, layer: int, frame: Frame, found: list[ExpertsMatch | None], overlap: Tensor | None
) -> float:
    """Match the experts of a layer likewise."""
    one, two = forms.experts(layer)
    if one is None or two is None:
        return 0.0
    new = match_experts(one, two, frame, found[layer], overlap)
    found[layer] = new
    return new.value


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
