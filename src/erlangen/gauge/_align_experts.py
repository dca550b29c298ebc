"""A mixture of experts in form, one expert at a time, and which expert of another belongs to which.

Which expert is which is told by what no order or scale of its hidden features changes: its row of the router, less what
a softmax does not see, and a sketch of the map Σ (up p)(gate q) down over its features, at fixed vectors p and q and
written on fixed directions. Then the features of experts that belong to each other are matched (`_align_mlp`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import forms
from ._align_mlp import MLPForm, NeuronMatch, apart, frame_overlap, in_frame, match_neurons, settled
from ._assignment import grouped_assignment
from ._experts import alike_scores
from ._fold import Frame
from ._weights import chunks, give_back
from .layout import Experts

_VECTORS = 16  # pairs of vectors that a sketch takes
_DIRECTIONS = 64  # on which it is written


@dataclass
class ExpertsForm:
    """A mixture of experts of one model.

    Attributes:
        experts: its layout.
        scores: [experts, columns], folded rows of the router, its bias as the last column; less the unseen ones.
        unseen: [columns]: what a softmax does not see, the mean of the rows; zeros where nothing is folded.
        fixed: whether experts keep their places, for two have the same scores.
        load: number of an expert, or None for what always takes part -> its form, in the model's own frame.
        frame: to which the forms are brought.
        ones: as of `MLPForm`.
        kept: forms that stay in memory; None: none does.
    """

    experts: Experts
    scores: Tensor
    unseen: Tensor
    fixed: bool
    load: Callable[[int | None], MLPForm]
    frame: Frame = field(default_factory=Frame)
    ones: bool = False
    kept: dict[int | None, MLPForm] | None = None

    def own(self, expert: int | None) -> MLPForm:
        """The form of an expert, or of what always takes part (None), in the model's own frame."""
        if self.kept is None:
            return self.load(expert)
        if expert not in self.kept:
            self.kept[expert] = self.load(expert)
        return self.kept[expert]

    def in_frame(self, frame: Frame) -> "ExpertsForm":
        """The same in another frame of the residual stream; of a form in the model's own."""
        return replace(self, scores=in_frame(self.scores, self.dim, self.ones, frame), frame=frame)

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.scores.shape[1] - self.experts.router.bias

    def sketches(self) -> Tensor:
        """[experts, numbers]: of each expert, of size 1 or 0; equal for experts that are one function."""
        sizes = (_VECTORS, _VECTORS, _DIRECTIONS)
        vectors = forms.probe(self.dim, sum(sizes)).split(sizes, dim=1)
        found = []
        for number in range(len(self.experts.experts)):
            form = self.own(number)
            up, gate, down = (
                _products(form, name, self.frame, columns) for name, columns in zip(("up", "gate", "down"), vectors)
            )
            assert up is not None and down is not None
            found.append(((up if gate is None else up * gate).mT @ down).flatten())
            if self.kept is None:
                del form
                give_back()
        return _units(torch.stack(found))


def _products(form: MLPForm, name: str, frame: Frame, columns: Tensor) -> Tensor | None:
    """[features, columns]: rows of a form in a frame times columns; these are turned, for they are fewer."""
    if name not in form.rows:
        return None
    rows, constant = form.stream_rows(name)
    if frame.matrix is not None:
        turned = frame.matrix.mT @ columns
    elif frame.order is not None and frame.sign is not None:
        turned = torch.empty_like(columns)
        turned[frame.order] = frame.sign[:, None] * columns
    else:
        turned = columns
    found = torch.cat([rows[part].double() @ turned for part in chunks(*rows.shape)])
    return found if constant is None else found + constant.double() * columns.sum(dim=0)


def _units(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


@dataclass
class ExpertsMatch:
    """Which expert of one mixture belongs to which of another, and which of their hidden features.

    Attributes:
        order: int64 [experts]: expert of the second model at each place.
        neurons: of each place, int64 [features] likewise.
        shared: of what always takes part; None: there is nothing.
        value: of the objective, reached.
    """

    order: Tensor
    neurons: tuple[Tensor, ...]
    shared: Tensor | None
    value: float = 0.0

    @classmethod
    def in_place(cls, experts: Experts) -> "ExpertsMatch":
        """Everything as it stands."""
        number, same = len(experts.experts), torch.arange(experts.experts[0].up.width)
        shared = None if experts.shared is None else torch.arange(experts.shared.up.width)
        return cls(torch.arange(number), (same,) * number, shared)

    def neurons_of(self, place: int | None) -> Tensor:
        """int64 [features]: of the expert at a place, or of what always takes part (None)."""
        found = self.shared if place is None else self.neurons[place]
        assert found is not None
        return found

    @property
    def num_neurons_moved(self) -> int:
        """Hidden features that stand at another place of their expert."""
        orders = [*self.neurons, *([] if self.shared is None else [self.shared])]
        return sum(int((order != torch.arange(len(order))).sum()) for order in orders)


def places(experts: Experts) -> list[int | None]:
    """Numbers of the experts, and None for what always takes part, if anything does."""
    return [*range(len(experts.experts)), *([] if experts.shared is None else [None])]


def _order(a: ExpertsForm, b: ExpertsForm) -> Tensor:
    """int64 [experts]: the expert of b, in the frame of a, that is most like each of a."""
    number = len(a.experts.experts)
    if b.fixed:
        return torch.arange(number)
    likeness = torch.zeros(number, number, dtype=torch.float64)
    rows = [form.scores - form.scores.mean(dim=0) if form.experts.softmax else form.scores for form in (a, b)]
    for one, two in (map(_units, rows), (form.sketches() for form in (a, b))):
        likeness += one @ two.mT
    return grouped_assignment(likeness, number // a.experts.groups)


def match_experts(
    a: ExpertsForm, b: ExpertsForm, frame: Frame, start: ExpertsMatch | None = None, overlap: Tensor | None = None
) -> ExpertsMatch:
    """Match the experts of b, in its own frame, with those of a; the value is the mean of what `match_neurons` gives.

    Args:
        a, b: the forms.
        frame: in which b is matched.
        start: a match from which the value never falls; None: experts and features as they stand.
        overlap: [dim, dim], to which the overlap of frames is added.
    """
    turned = b.in_frame(frame)
    order = _order(a, turned)
    plain = ExpertsMatch.in_place(a.experts) if start is None else start
    found, added = _match_in(a, b, turned, order, start, overlap is not None)
    if not torch.equal(order, plain.order):
        stay = _walk(a, b, turned, plain.order, lambda place, one, two: settled(one, two, plain.neurons_of(place)))
        if stay[0].value > found.value:
            found, added = _match_in(a, b, turned, plain.order, start, overlap is not None)
    if overlap is not None and added is not None:
        overlap += added
    return found


def _match_in(
    a: ExpertsForm, b: ExpertsForm, turned: ExpertsForm, order: Tensor, start: ExpertsMatch | None, overlaps: bool
) -> tuple[ExpertsMatch, Tensor | None]:
    """Match the features, experts in a given order."""

    def match(place: int | None, one: MLPForm, two: MLPForm) -> NeuronMatch:
        known = start is not None and (place is None or bool(start.order[place] == order[place]))
        before = settled(one, two, start.neurons_of(place)) if known and start is not None else None
        return match_neurons(one, two, before)

    return _walk(a, b, turned, order, match, overlaps)


def _walk(
    a: ExpertsForm,
    b: ExpertsForm,
    turned: ExpertsForm,
    order: Tensor,
    match: Callable[[int | None, MLPForm, MLPForm], NeuronMatch],
    overlaps: bool = False,
) -> tuple[ExpertsMatch, Tensor | None]:
    """All experts in turn; the match, and the overlap Σ Aᵀ B of frames [dim, dim]."""
    number = len(order)
    orders: dict[int | None, Tensor] = {}
    two = turned.scores[order]
    size = (a.scores.norm() * two.norm()).item()
    value = (a.scores * two).sum().item() / size if size else 0.0
    total = torch.zeros(a.dim, a.dim, dtype=torch.float64) if overlaps else None
    if total is not None and size:
        total += apart(a.scores, a.dim, a.ones)[0].mT @ apart(b.scores[order], b.dim, b.ones)[0] / size
    for place in places(a.experts):
        share = 1.0 if place is None else 1 / number
        one, own = a.own(place), b.own(None if place is None else int(order[place]))
        found = match(place, one, own.in_frame(turned.frame))
        orders[place] = found.order
        value += share * found.value
        if total is not None:
            frame_overlap(one, own, found, total, share)
        if a.kept is None:
            del one, own
            give_back()
    shared = orders.pop(None, None)
    return ExpertsMatch(order, tuple(orders.values()), shared, value), total


def experts_form(
    experts: Experts,
    scores: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    load: Callable[[int | None], MLPForm],
    *,
    folds: bool,
    ones: bool,
    keep: bool,
) -> ExpertsForm:
    """The form of a mixture.

    Args:
        experts: its layout.
        scores: [experts, dim], rows of the router in form.
        bias: [experts], or None.
        dtype: in which the router is stored.
        load, ones: as of `ExpertsForm`.
        folds: whether what a softmax does not see is taken off.
        keep: whether forms of experts stay in memory.
    """
    rows = scores if bias is None else torch.cat([scores, bias[:, None]], dim=1)
    fixed = alike_scores(rows, dtype)
    unseen = rows.mean(dim=0) if folds and experts.softmax else torch.zeros_like(rows[0])
    return ExpertsForm(experts, rows - unseen, unseen, fixed, load, ones=ones, kept={} if keep else None)
