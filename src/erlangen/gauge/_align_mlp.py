"""A feed-forward layer in a form that only the order of its hidden features, and signs, are left of."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ._assignment import matching
from ._fold import Frame, Reading, Writing
from ._weights import ReadWeights, chunks
from .layout import MLP, Layer

_LARGE = 2048  # hidden features beyond which similarities are computed in float32
_FLAT = 0.1  # slope below which a feature is not turned over: its inverse would be too large


@dataclass
class MLPForm:
    """A feed-forward layer of one model.

    Attributes:
        mlp: its layout.
        rows: "up", "down" and "gate" [features, columns], the bias of up and gate as the last column.
        biased: maps whose last column is a bias.
        slope: [features], at most 1 in size, or None.
        down_bias: [dim], or None.
        signs: whether a feature's up and down may change sign together.
        factors: map -> [features] that its folded rows were multiplied by.
        balance: the part of the factors that a feature's own gauge takes back.
        flipped: features that were turned over, for their slope was beyond 1.
        size: what the output was divided by.
        ones: rows of up and gate have constants on their means (see `Fold`).
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

    @classmethod
    def of(cls, layer: Layer, weights: ReadWeights, reading: Reading, writing: Writing, using: str) -> "MLPForm":
        """The form of stored weights in float64; ``using`` as of `AttentionForm.of`."""
        mlp, folds = layer.mlp, using != "permutation"
        assert mlp is not None
        rows: dict[str, Tensor] = {}
        biased = []
        for name, part in parts_of(mlp).items():
            raw = part.heads(weights[part.weight])[0]
            if name == "down":
                rows[name] = writing.rows(raw) if folds else raw
                continue
            new = reading.rows(raw) if folds else raw
            if part.bias_name is not None:
                bias = part.head_biases(weights[part.bias_name])[0]
                constant = reading.constant(raw) if folds else None
                bias = bias if constant is None else bias + constant
                new = torch.cat([new, bias[:, None]], dim=1)
                biased.append(name)
            rows[name] = new
        down_bias = None if mlp.down.bias_name is None else weights[mlp.down.bias_name].double()
        if down_bias is not None and folds:
            if reading.fold.kind == "after" and reading.bias is not None:
                down_bias = down_bias + reading.bias
            down_bias = writing.rows(down_bias)
        slope = None if mlp.slope is None else weights[mlp.slope].double()
        ones = torch.ones(mlp.up.width, dtype=torch.float64)
        form = cls(mlp, rows, frozenset(biased), slope, down_bias, folds and mlp.gate is not None)
        form.ones = folds and reading.fold.ones
        form.factors = dict.fromkeys(rows, ones)
        form.balance = dict.fromkeys(rows, ones)
        if using == "gauge":
            form._turn_over()
            out = layer.mlp_out_norm
            if out is not None and out.eps == 0:
                form._take_size()
            form._balance()
        return form

    def _multiply(self, name: str, factor: Tensor) -> None:
        self.rows[name] = self.rows[name] * factor[:, None]
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
        sizes = {name: self.rows[name].norm(dim=1) for name in names}
        product = torch.stack(list(sizes.values())).prod(dim=0)
        alive = product > 0
        goal = product ** (1 / len(names))
        for name in names:
            factor = torch.where(alive, goal / sizes[name].where(alive, torch.ones_like(goal)), 1.0)
            self._multiply(name, factor)
            self.balance[name] = factor

    def _take_size(self) -> None:
        sizes = [rows.norm(dim=1) for name, rows in self.rows.items() if name != "gate" or self.mlp.homogeneous]
        self.size = torch.stack(sizes).prod(dim=0).norm().item() or 1.0
        self.rows["down"] = self.rows["down"] / self.size
        if self.down_bias is not None:
            self.down_bias = self.down_bias / self.size

    def stream_rows(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The columns that a frame of the residual stream turns, and what stands on their mean besides."""
        rows = self.rows[name][:, : self.rows["down"].shape[1]]
        if not self.ones or name == "down":
            return rows, None
        constant = rows.mean(dim=1, keepdim=True)
        return rows - constant, constant

    def in_frame(self, frame: Frame) -> "MLPForm":
        """The same in another frame of the residual stream."""
        if frame.same:
            return self
        rows = {}
        for name, values in self.rows.items():
            turned, constant = self.stream_rows(name)
            turned = frame.apply(turned) if constant is None else frame.apply(turned) + constant
            rows[name] = torch.cat([turned, values[:, turned.shape[1] :]], dim=1)
        bias = None if self.down_bias is None else frame.apply(self.down_bias)
        return replace(self, rows=rows, down_bias=bias)

    def moved_by(self, match: "NeuronMatch") -> "MLPForm":
        """Its features in the order and with the signs of a match."""
        sign = match.sign[:, None]
        rows = {name: values[match.order] * (1 if name == "gate" else sign) for name, values in self.rows.items()}
        return replace(self, rows=rows, slope=None if self.slope is None else self.slope[match.order])

    def let_go(self) -> None:
        """Forget the weights; what they were multiplied by stays."""
        self.rows = {}

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
    sizes = [sum(rows.square().sum().item() for rows in form.rows.values()) for form in (a, b)]
    return 1 / (sizes[0] * sizes[1]) ** 0.5 if min(sizes) > 0 else 0.0


def _likeness(products: dict[str, Tensor], signs: bool) -> Tensor:
    both = products["up"] + products["down"]
    both = both.abs() if signs else both
    return both + products["gate"] if "gate" in products else both


def settled(a: MLPForm, b: MLPForm, order: Tensor) -> NeuronMatch:
    """An order with its best signs, and the value reached."""
    products = {name: (rows * b.rows[name][order]).sum(dim=1) for name, rows in a.rows.items()}
    sign = torch.ones_like(products["up"])
    if a.signs:
        sign = torch.where(products["up"] + products["down"] < 0, -1.0, 1.0).double()
    return NeuronMatch(order, sign, _weight(a, b) * _likeness(products, a.signs).sum().item())


def match_neurons(a: MLPForm, b: MLPForm, start: NeuronMatch | None = None) -> NeuronMatch:
    """Match the hidden features of b, in a's frame of the residual stream, with those of a.

    Args:
        start: a match from which the value never falls; None: features as they stand.
    """
    features = a.mlp.up.width
    match = settled(a, b, torch.arange(features) if start is None else start.order)
    if a.mlp.activation == "prelu" and a.slope is None:
        return match  # their slopes are not described, and would stay behind
    dtype = torch.float64 if features <= _LARGE else torch.float32
    similarity = torch.empty(features, features, dtype=dtype)
    casted = {name: rows.to(dtype) for name, rows in b.rows.items()}
    for part in chunks(features, features):
        products = {name: rows[part].to(dtype) @ casted[name].mT for name, rows in a.rows.items()}
        similarity[part] = _likeness(products, a.signs)
    found = settled(a, b, matching(similarity))
    return found if found.value > match.value else match


def frame_overlap(a: MLPForm, b: MLPForm) -> Tensor:
    """[dim, dim]: Σ Bᵀ A over the rows of a and of the matched b."""
    dim = a.rows["down"].shape[1]
    pairs = [(a.stream_rows(name)[0], b.stream_rows(name)[0]) for name in a.rows]
    return _weight(a, b) * sum((two.mT @ one for one, two in pairs), torch.zeros(dim, dim, dtype=torch.float64))
