"""A feed-forward layer in a form that only the order of its hidden features, and signs, are left of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ._align_turns import inverse
from ._assignment import matching
from ._fold import Frame, Reading, Writing
from ._weights import chunks, give_back
from .layout import MLP

_LARGE = 2048  # hidden features beyond which similarities are computed in float32, and a part at a time
_TILE = 512  # columns of such a part, and half of its rows
_SAME = Frame()
_FLAT = 0.1  # slope below which a feature is not turned over: its inverse would be too large


@dataclass
class MLPForm:
    """A feed-forward layer of one model.

    Attributes:
        mlp: its layout.
        rows: "up", "down" and "gate" [features, columns], the bias of up and gate as the last column; empty where they
            are made as they are asked for.
        biased: maps whose last column is a bias.
        slope: [features], at most 1 in size, or None.
        down_bias: [dim], or None.
        signs: whether a feature's up and down may change sign together.
        factors: map -> [features] that its folded rows were multiplied by.
        balance: the part of the factors that a feature's own gauge takes back.
        flipped: features that were turned over, for their slope was beyond 1.
        size: what the output was divided by.
        ones: rows of up and gate have constants on their means (see `Fold`).
        dim: width of the residual stream.
        make: map and features -> their rows in float64, where these are not kept.
        squares: the sum of squares of all rows, where these are not kept.
    """

    mlp: MLP
    rows: dict[str, Tensor]
    biased: frozenset[str]
    slope: Tensor | None
    down_bias: Tensor | None
    signs: bool
    factors: dict[str, Tensor] = field(default_factory=dict)
    balance: dict[str, Tensor] = field(default_factory=dict)
    flipped: Tensor | None = None
    size: float = 1.0
    ones: bool = False
    dim: int = 0
    make: Callable[[str, Tensor | slice], Tensor] | None = None
    squares: float = 0.0

    @classmethod
    def of(
        cls,
        mlp: MLP,
        weights: Mapping[str, Tensor],
        reading: Reading,
        writing: Writing,
        using: str,
        *,
        features: Tensor | None = None,
        size: float = 1.0,
        dtype: torch.dtype = torch.float64,
        keep: bool = True,
    ) -> "MLPForm":
        """The form of stored weights; ``using`` as of `AttentionForm.of`.

        Args:
            mlp: the layer, or an expert.
            weights: its tensors as they are stored; of a stack, the matrix of this expert alone will do.
            features: int64, those that are wanted; None: all.
            size: what the output is divided by.
            dtype: of the rows, which are made in float64.
            keep: False: rows are not kept, but made from the weights as they are asked for.
        """
        folds = using != "permutation"
        features = torch.arange(mlp.up.width) if features is None else features
        rows: dict[str, Tensor] = {}
        biased = []
        for name, part in parts_of(mlp).items():
            biased += [name] if name != "down" and part.bias_name is not None else []
            columns = part.heads(weights[part.weight]).shape[2] + (name in biased)
            rows[name] = torch.empty(len(features), columns if keep else 1, dtype=dtype)
            for piece in chunks(len(features), columns):
                new = _folded(mlp, name, weights, features[piece], reading, writing, folds)
                rows[name][piece] = (new if keep else new.norm(dim=1, keepdim=True)).to(dtype)
        down_bias = None if mlp.down.bias_name is None else weights[mlp.down.bias_name].double()
        if down_bias is not None and folds:
            if reading.fold.kind == "after" and reading.bias is not None:
                down_bias = down_bias + reading.bias
            down_bias = writing.rows(down_bias)
        slope = None if mlp.slope is None else weights[mlp.slope].double()[features]
        ones = torch.ones(len(features), dtype=torch.float64)
        form = cls(mlp, rows, frozenset(biased), slope, down_bias, folds and mlp.gate is not None)
        form.ones, form.dim = folds and reading.fold.ones, mlp.down.heads(weights[mlp.down.weight]).shape[2]
        form.factors = dict.fromkeys(rows, ones)
        form.balance = dict.fromkeys(rows, ones)
        if using == "gauge":
            form._turn_over()
            if size != 1:
                form.size = size
                rows["down"].div_(size)
                form.down_bias = None if form.down_bias is None else form.down_bias / size
            form._balance()
        if not keep:  # rows of one column, their sizes, came to the same factors

            def make(name: str, features: Tensor | slice) -> Tensor:
                new = _folded(mlp, name, weights, features, reading, writing, folds)
                new = new * form.factors[name][features, None]
                return new / form.size if name == "down" else new

            form.squares = sum(values.square().sum().item() for values in rows.values())
            form.rows, form.make = {}, make
        return form

    def _multiply(self, name: str, factor: Tensor) -> None:
        self.rows[name].mul_(factor[:, None])
        self.factors[name] = self.factors[name] * factor

    def _turn_over(self) -> None:
        if self.slope is None:
            return
        self.flipped = self.slope.abs() > 1
        self._multiply("up", torch.where(self.flipped, -1.0, 1.0).double())
        self._multiply("down", torch.where(self.flipped, -self.slope, 1.0))
        self.slope = torch.where(
            self.flipped, 1 / self.slope.where(self.flipped, torch.ones_like(self.slope)), self.slope
        )

    def _balance(self) -> None:
        mlp = self.mlp
        if mlp.gate is None and not mlp.homogeneous:
            return
        names = ["up", "down", "gate"] if mlp.gate is not None and mlp.homogeneous else ["up", "down"]
        sizes = {name: self.rows[name].norm(dim=1).double() for name in names}
        product = torch.stack(list(sizes.values())).prod(dim=0)
        alive = product > 0
        goal = product ** (1 / len(names))
        for name in names:
            factor = torch.where(alive, goal / sizes[name].where(alive, torch.ones_like(goal)), 1.0)
            self._multiply(name, factor)
            self.balance[name] = factor

    def part(self, name: str, features: Tensor | slice) -> Tensor:
        """Rows of some features, [.., columns]."""
        return self.rows[name][features] if self.make is None else self.make(name, features)

    def part_in(self, name: str, features: Tensor | slice, frame: Frame) -> Tensor:
        """The same in another frame of the residual stream."""
        return in_frame(self.part(name, features), self.dim, self.ones and name != "down", frame)

    def square(self) -> float:
        """Sum of squares of all rows, in float64."""
        if self.make is not None:
            return self.squares
        return sum(torch.linalg.vector_norm(rows, dtype=torch.float64).item() ** 2 for rows in self.rows.values())

    def strengths(self) -> Tensor:
        """[features]: products of the sizes of the rows, but for a gate that no scale goes through."""
        sizes = [rows.norm(dim=1) for name, rows in self.rows.items() if name != "gate" or self.mlp.homogeneous]
        return torch.stack(sizes).prod(dim=0)

    def stream_rows(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The columns that a frame of the residual stream turns, and what stands on their mean besides."""
        return apart(self.rows[name], self.dim, self.ones and name != "down")

    def in_frame(self, frame: Frame) -> "MLPForm":
        """The same in another frame of the residual stream."""
        if frame.same:
            return self
        rows = {name: self.part_in(name, slice(None), frame) for name in self.rows}
        bias = None if self.down_bias is None else frame.apply(self.down_bias)
        return replace(self, rows=rows, down_bias=bias)

    def moved_by(self, match: "NeuronMatch") -> "MLPForm":
        """Its features in the order and with the signs of a match."""
        sign = match.sign[:, None]
        rows = {name: values[match.order] * (1 if name == "gate" else sign) for name, values in self.rows.items()}
        return replace(self, rows=rows, slope=None if self.slope is None else self.slope[match.order])

    def back(self, slope: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None]:
        """From a form to this model's own gauge: factors [features] of up, gate and down, and slopes.

        Args:
            slope: of that form.
        """
        factors = {name: 1 / factor for name, factor in self.balance.items()}
        if slope is not None and self.flipped is not None:
            flipped = self.flipped & (slope.abs() > _FLAT)
            factors["up"] = torch.where(flipped, -factors["up"], factors["up"])
            factors["down"] = torch.where(flipped, -slope * factors["down"], factors["down"])
            slope = torch.where(flipped, 1 / slope.where(flipped, torch.ones_like(slope)), slope)
        return factors, slope


def _folded(
    mlp: MLP,
    name: str,
    weights: Mapping[str, Tensor],
    features: Tensor | slice,
    reading: Reading,
    writing: Writing,
    folds: bool,
) -> Tensor:
    """Rows of some features of a map in float64, folded, with the bias of up and gate as the last column."""
    part = parts_of(mlp)[name]
    raw = part.heads(weights[part.weight])[0][features].double()
    rows = raw if not folds else writing.rows(raw) if name == "down" else reading.rows(raw)
    if name == "down" or part.bias_name is None:
        return rows
    bias = part.head_biases(weights[part.bias_name])[0][features].double()
    constant = reading.constant(raw) if folds else None
    return torch.cat([rows, (bias if constant is None else bias + constant)[:, None]], dim=1)


def apart(rows: Tensor, dim: int, ones: bool) -> tuple[Tensor, Tensor | None]:
    """The columns [.., dim] of rows that a frame of the residual stream turns, and what stands on their mean besides.

    Args:
        rows: [.., dim], or with a bias as one more column.
        dim: width of the residual stream.
        ones: as of `MLPForm`.
    """
    rows = rows[:, :dim]
    if not ones:
        return rows, None
    constant = rows.mean(dim=1, keepdim=True)
    return rows - constant, constant


def in_frame(rows: Tensor, dim: int, ones: bool, frame: Frame) -> Tensor:
    """The same rows in another frame of the residual stream; arguments as of `apart`."""
    if frame.same:
        return rows
    new = torch.empty_like(rows)
    for part in chunks(*rows.shape):
        turned, constant = apart(rows[part].double(), dim, ones)
        turned = frame.apply(turned) if constant is None else frame.apply(turned) + constant
        new[part, :dim], new[part, dim:] = turned.to(rows.dtype), rows[part, dim:]
    return new


def parts_of(mlp: MLP) -> dict:
    """The maps of a feed-forward layer by name."""
    named = (("up", mlp.up), ("gate", mlp.gate), ("down", mlp.down))
    return {name: part for name, part in named if part is not None}


@dataclass
class NeuronMatch:
    """Which hidden feature of one layer belongs to which of another.

    Attributes:
        order: int64 [features]: feature of the second model at each place.
        sign: [features], of its up and down.
        value: of the objective, reached.
    """

    order: Tensor
    sign: Tensor
    value: float = 0.0


def _weight(a: MLPForm, b: MLPForm) -> float:
    sizes = a.square(), b.square()
    return 1 / (sizes[0] * sizes[1]) ** 0.5 if min(sizes) > 0 else 0.0


def settled(a: MLPForm, b: MLPForm, order: Tensor, frame: Frame = _SAME) -> NeuronMatch:
    """An order with its best signs, and the value reached; ``frame``: in which b is looked at."""
    back, products = inverse(frame), dict[str, Tensor]()
    for name in parts_of(a.mlp):
        products[name] = torch.empty(len(order), dtype=torch.float64)
        for part in chunks(len(order), a.dim):
            one, two = a.part_in(name, part, back).double(), b.part(name, order[part]).double()
            products[name][part] = (one * two).sum(dim=1)
    sign = torch.ones_like(products["up"])
    if a.signs:
        sign = torch.where(products["up"] + products["down"] < 0, -1.0, 1.0).double()
    return NeuronMatch(order, sign, _weight(a, b) * _likeness(products, a.signs).sum().item())


def _likeness(products: Mapping[str, Tensor], signs: bool) -> Tensor:
    both = products["up"] + products["down"]
    both = both.abs() if signs else both
    return both + products["gate"] if "gate" in products else both


def match_neurons(a: MLPForm, b: MLPForm, start: NeuronMatch | None = None, frame: Frame = _SAME) -> NeuronMatch:
    """Match the hidden features of b with those of a.

    Args:
        start: a match from which the value never falls; None: features as they stand.
        frame: in which b is looked at.
    """
    if a.make is None:
        b, frame = b.in_frame(frame), _SAME
    features = a.mlp.up.width
    match = settled(a, b, torch.arange(features) if start is None else start.order, frame)
    if a.mlp.activation == "prelu" and a.slope is None:
        return match  # their slopes are not described, and would stay behind
    order = _best_order(a, b, features, inverse(frame))
    if torch.equal(order, match.order):
        return match
    found = settled(a, b, order, frame)
    return found if found.value > match.value else match


def _best_order(a: MLPForm, b: MLPForm, features: int, back: Frame) -> Tensor:
    """As `_assignment.matching` of the similarities, of which no more than `_LARGE` rows and columns are made at once.

    What chooses each other of all that is left is taken in turn, until so few are left.
    """
    order = torch.full((features,), -1, dtype=torch.int64)
    rows = columns = torch.arange(features)
    while len(rows) > _LARGE:
        best, peaks = torch.empty_like(rows), torch.zeros_like(columns)
        highest = torch.full((len(columns),), -torch.inf)
        for start in range(0, len(rows), 2 * _TILE):
            part = slice(start, start + 2 * _TILE)
            similarity = _similarity(a, b, rows[part], columns, back)
            best[part] = similarity.argmax(dim=1)
            peak, place = similarity.max(dim=0)
            peaks = torch.where(peak > highest, place + start, peaks)
            highest = torch.maximum(peak, highest)
            del similarity
        mutual = peaks[best] == torch.arange(len(rows))
        if not mutual.any():
            break
        order[rows[mutual]] = columns[best[mutual]]
        left = torch.ones(len(columns), dtype=torch.bool)
        left[best[mutual]] = False
        rows, columns = rows[~mutual], columns[left]
    if len(rows) > _LARGE:  # only ties are left
        order[rows] = columns
    elif len(rows):
        order[rows] = columns[matching(_similarity(a, b, rows, columns, back))]
    return order


def _similarity(a: MLPForm, b: MLPForm, rows: Tensor, columns: Tensor, back: Frame) -> Tensor:
    """Likeness of features of a, brought to the frame of b, with features of b; of large layers in float32."""
    dtype = torch.float64 if a.mlp.up.width <= _LARGE else torch.float32
    found = torch.zeros(len(rows), len(columns), dtype=dtype)
    for name in ("up", "down", "gate"):
        if name not in parts_of(a.mlp):
            continue
        if name == "gate" and a.signs:
            found.abs_()
        give_back()
        one = torch.cat([a.part_in(name, part, back).to(dtype) for part in rows.split(_TILE)])
        for start in range(0, len(columns), _TILE):
            part = slice(start, start + _TILE)
            found[:, part].addmm_(one, b.part(name, columns[part]).to(dtype).mT)
    return found


def frame_overlap(a: MLPForm, b: MLPForm, match: NeuronMatch, overlap: Tensor, share: float = 1.0) -> None:
    """Add Σ Aᵀ B over the rows of a and of the matched b, weighted, to an overlap [dim, dim]."""
    share = share * _weight(a, b)
    for name in parts_of(a.mlp):
        for part in chunks(len(match.order), a.dim):
            one, two = a.part(name, part).double(), b.part(name, match.order[part]).double()
            two = two if name == "gate" else two * match.sign[part, None]
            one, two = (apart(values, a.dim, a.ones and name != "down")[0] for values in (one, two))
            overlap.addmm_(one.mT, two, alpha=share)
