"""One model in another's gauge: the same function, with stored numbers as near to the other's as the gauge allows.

`align` brings a copy of one model to another: heads, hidden features and experts in their order, factors of heads
turned and scaled to theirs, the residual stream in their frame, norms, biases and means as they store them. What it
returns still computes what it computed. `match_weights` and `align_weights` do the same to tensors by name, a layer at
a time.
"""

import copy
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._align_side import USING as USING
from ._align_side import Progress, Side, Using, steps_of
from ._align_weights import Matching as Matching
from ._align_weights import match
from ._align_write import write
from ._canonical_record import Record
from ._fingerprint import fingerprint
from ._models import Model, expect_alike, open_model
from ._weights import ModuleWeights, PendingWeights, ReadWeights
from .canonical import check_weights
from .certificate import Certificate
from .compare import _unlike_settings
from .layout import ModelLayout, unwrap

# --- what was done ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Alignment:
    """A model in another's gauge.

    Attributes:
        model: a copy of the second model: its function, in the first one's gauge.
        matching: what belongs to what.
        distance_before, distance_after: of the stored numbers of the two, √(Σ (a − b)² / Σ (a² + b²)): 0 for equal
            ones, 1 for unrelated ones.
        notes: what was left, and why.
        record: how each weight was changed.
        first: the first model, as it was given.
        second: the second model, as it was given.
    """

    model: nn.Module
    matching: Matching
    distance_before: float
    distance_after: float
    notes: tuple[str, ...]
    record: Certificate = field(repr=False)
    first: nn.Module = field(repr=False)
    second: nn.Module = field(repr=False)

    @property
    def using(self) -> str:
        """What the alignment was looked for among."""
        return self.matching.using

    @property
    def frame(self) -> str:
        """Of the residual streams: "same", or the second one's was "turned" or "permuted"."""
        return self.matching.frame

    @property
    def heads(self) -> tuple[Tensor, ...]:
        """Of each layer, int64 [num_heads]: the head of the second model that stands at each place."""
        return self.matching.heads

    @property
    def neurons(self) -> tuple[Tensor | None, ...]:
        """Of each layer, int64 [features] likewise; None for a mixture of experts."""
        return self.matching.neurons

    @property
    def experts(self) -> tuple[Tensor | None, ...]:
        """Of each layer, int64 [experts] likewise, of a mixture; None where there is none."""
        return tuple(None if found is None else found.order for found in self.matching.experts)

    @property
    def head_similarity(self) -> tuple[Tensor, ...]:
        """Of each layer, [num_heads, num_heads]: cosines of the products of the heads of both, in one frame."""
        return self.matching.head_similarity

    @property
    def similarity(self) -> tuple[float, ...]:
        """The objective after each round of the search; it never falls."""
        return self.matching.similarity

    def apply_to(self, path: str, delta: Tensor) -> Tensor:
        """Carry a change of a weight of the second model into the aligned one (see `Certificate.apply_to`)."""
        return self.record.apply_to(path, delta)

    def bias_shifts(self, path: str, delta: Tensor) -> dict[str, Tensor]:
        """What that change adds to biases of the aligned model (see `Certificate.bias_shifts`)."""
        return self.record.bias_shifts(path, delta)

    def merged(self, weight: float) -> nn.Module:
        """The model between the two: see `erlangen.gauge.merge`.

        Args:
            weight: of the second, from 0 to 1.
        """
        from .merge import between  # which aligns first, and so is above this module

        return between(self, weight)

    def __str__(self) -> str:
        experts = [order for order in self.experts if order is not None]
        moved, exchanged = (
            sum(int((order != torch.arange(len(order))).sum()) for order in orders) for orders in (self.heads, experts)
        )
        of_experts = f" and {exchanged} of {sum(map(len, experts))} experts" if experts else ""
        lines = [
            f"aligned by {self.using}: stored numbers {self.distance_before:.3g} apart before, "
            f"{self.distance_after:.3g} after",
            f"frame of the residual stream: {self.frame}; {moved} of {sum(map(len, self.heads))} heads{of_experts} "
            "moved",
        ]
        return "\n".join([*lines, *self.notes])


# --- weights ----------------------------------------------------------------------------------------------------------


def expect_using(using: str) -> None:
    """The name of a kind of alignment.

    Raises:
        ValueError: it is none.
    """
    if using not in USING:
        raise ValueError(f"using must be one of {', '.join(map(repr, USING))}, received {using!r}")


def expect_mergeable(a: Model, b: Model) -> None:
    """Two models between which there are others: of one architecture, size, vocabulary, and with the same settings.

    Raises:
        ValueError: they are not; what differs is named.
    """
    expect_alike(a, b)
    one, two = a.layout, b.layout

    def refuse(what: str, first: Any, second: Any) -> None:
        raise ValueError(f"models to be aligned need the same {what}; {a.name} has {first}, {b.name} has {second}")

    if one.vocab_size != two.vocab_size:
        refuse("vocabulary", f"{one.vocab_size} tokens", f"{two.vocab_size}")
    if dict(one.other_embeddings) != dict(two.other_embeddings):
        refuse("further embeddings (positions, token types)", dict(one.other_embeddings), dict(two.other_embeddings))
    if one.tied != two.tied:
        tied = "tied to the embedding", "a tensor of their own"
        refuse("map to the logits", tied[not one.tied], tied[not two.tied])
    shapes = one.tensor_shapes(), two.tensor_shapes()
    unlike = [
        name for name in sorted(shapes[0].keys() | shapes[1].keys()) if shapes[0].get(name) != shapes[1].get(name)
    ]
    if unlike:
        name = unlike[0]
        refuse("tensors", f"{name} of shape {shapes[0].get(name)}", f"{shapes[1].get(name)}")
    settings = _unlike_settings(a, b)
    if settings:
        raise ValueError(
            f"models to be aligned need the same settings, or one set of weights means two functions; of {a.name} and "
            f"{b.name}: {'; '.join(settings)}"
        )
    if one != two:
        raise ValueError(
            f"models to be aligned need the same layout; {a.name} and {b.name} store their weights differently, or "
            "their norms have another eps"
        )
    for model in (a, b):
        check_weights(model.layout, model.weights)  # ty: ignore


def match_weights(
    layout: ModelLayout,
    a: ReadWeights,
    b: ReadWeights,
    *,
    using: Using = "gauge",
    rounds: int = 30,
    progress: Progress | None = None,
) -> Matching:
    """Look for what belongs to what in two sets of weights. Nothing is written.

    Args:
        layout: of both models.
        a, b: their tensors.
        using, rounds: as of `align`.
        progress: called with the number of layers looked at and of all in all rounds.

    Raises:
        ValueError: weights that contradict the layout or are not finite, a ``using`` that is none.
    """
    expect_using(using)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, received {rounds}")
    first, second = sides(layout, a, b, using)
    return match(first, second, rounds, progress)


def sides(layout: ModelLayout, a: ReadWeights, b: ReadWeights, using: Using) -> tuple[Side, Side]:
    """The two models, proved against their layout."""
    steps = steps_of(layout, using)
    for weights in (a, b):
        check_weights(layout, weights)
    return Side.of(layout, a, steps, using), Side.of(layout, b, steps, using)


def align_weights(
    layout: ModelLayout,
    a: ReadWeights,
    b: ReadWeights,
    out: Any,
    matching: Matching,
    *,
    transforms: MutableMapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Write the weights b, moved into the gauge of a.

    Args:
        layout: of both models.
        a, b: their tensors.
        out: a mapping in which every tensor of the layout is set once, in float64 (large ones in float32 where no more
            is stored, or, of weights that tell their dtypes, in these).
        matching: of `match_weights`.
        transforms: where the factors are kept, layer by layer; None: in memory.
        progress: called with the number of layers done and of all.

    Returns:
        How each weight was changed, without the fingerprints.
    """
    first, second = sides(layout, a, b, matching.using)
    record = Record() if transforms is None else Record(transforms=transforms)
    notes = write(first, second, out, 1.0, matching, record, progress)
    return Certificate(layout.kind, **vars(record) | {"leftover": [*matching.notes, *notes]})


def other_names(layout: ModelLayout, names: Iterable[str]) -> list[str]:
    """Names of tensors that the layout does not speak of."""
    known = layout.tensor_shapes()
    return [name for name in names if name not in known]


# --- models in memory -------------------------------------------------------------------------------------------------


def stored_distance(a: ModuleWeights, b: ModuleWeights, names: Iterable[str]) -> float:
    """√(Σ (a − b)² / Σ (a² + b²)) over tensors of both."""
    difference = size = 0.0
    for name in names:
        one, two = (weights[name].detach().cpu().double() for weights in (a, b))
        difference += (one - two).square().sum().item()
        size += (one.square().sum() + two.square().sum()).item()
    return (difference / size) ** 0.5 if size else 0.0


def align(
    a: nn.Module,
    b: nn.Module,
    *,
    using: Using = "gauge",
    rounds: int = 30,
    progress: Progress | None = None,
) -> Alignment:
    """Bring a copy of one model into the gauge of another. Neither is changed.

    The frame of the residual stream is kept where the embeddings of the two are near as they stand (at most 0.5 apart,
    as of two models trained on from one) and no other frame halves their distance.

    Args:
        a: the model in whose gauge the other is wanted.
        b: a model of the same architecture, sizes and vocabulary.
        using: "gauge": everything that leaves the function as it is: norms folded, heads balanced and turned, scales of
            hidden features, orders of heads, features and experts (within what groups of them allow), the frame of the
            residual stream. "orthogonal": the same but for the scales: heads are turned as they are stored.
            "permutation": orders only, of heads, features, experts, and, where the frame is free, coordinates of the
            residual stream. "none": b stays as it is.
        rounds: at most so many, over heads, hidden features and the frame. Where the frame is fixed one is enough.
        progress: called with the number of layers looked at and of all in all rounds.

    Returns:
        The aligned copy, in b's dtype and on its device, and what was done.

    Raises:
        TypeError: no layout is known for a model.
        ValueError: models of different architecture, width, depth, vocabulary or settings; weights that are quantised,
            sharded or not finite; a ``using`` that is none.
    """
    expect_using(using)
    one, two = open_model(a, "the first model"), open_model(b, "the second model")
    expect_mergeable(one, two)
    first, second = ModuleWeights(a), ModuleWeights(b)
    matching = match_weights(one.layout, first, second, using=using, rounds=rounds, progress=progress)
    model = copy.deepcopy(unwrap(b))
    aligned = ModuleWeights(model)
    pending = PendingWeights(aligned)
    record = align_weights(one.layout, first, second, pending, matching)
    pending.commit()
    record.source, record.target = (fingerprint(one.layout, weights) for weights in (second, aligned))
    names = list(one.layout.tensor_shapes())
    return Alignment(
        model,
        matching,
        stored_distance(first, second, names),
        stored_distance(first, aligned, names),
        tuple(record.leftover),
        record,
        a,
        b,
    )
