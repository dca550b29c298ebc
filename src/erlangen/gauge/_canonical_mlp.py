"""Canonical form of feed-forward layers: scales that go through them, the order of hidden features, and of experts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import forms
from ._canonical_record import Record, finite
from ._experts import alike_scores, by_group, maps_of, matrices_of, replace_experts
from ._fold import Reading, Writing
from ._weights import ReadWeights, Weights, chunks
from .layout import MLP, Experts, Layer, Norm


@dataclass
class _Neurons:
    """Sizes and signs of the hidden features of a feed-forward layer, [features]."""

    up: Tensor
    gate: Tensor
    down: Tensor
    sign: Tensor
    second: Tensor

    @property
    def strength(self) -> Tensor:
        """Product of the sizes; that of a gate that is not there is 1."""
        return self.up * self.down * self.gate


def _measure(
    mlp: MLP,
    old: dict[str, Tensor],
    biases: dict[str, Tensor],
    reading: Reading,
    writing: Writing,
    slope: Tensor | None,
) -> _Neurons:
    features = mlp.up.width
    device = old["up"].device
    found = _Neurons(*(torch.ones(features, dtype=torch.float64, device=device) for _ in range(5)))
    for part in chunks(features, old["up"].shape[1]):
        up = old["up"][part].double()
        up = _joined(reading.rows(up), biases.get("up"), reading.constant(up), part)
        down = writing.rows(old["down"][part].double())
        if slope is not None:
            # A slope beyond 1 belongs to the feature of opposite sign.
            turned = slope[part].abs() > 1
            up = torch.where(turned[:, None], -up, up)
            down = torch.where(turned[:, None], -slope[part, None] * down, down)
        found.up[part], found.down[part] = up.norm(dim=1), down.norm(dim=1)
        if mlp.gate is not None:
            gate = old["gate"][part].double()
            found.gate[part] = _joined(reading.rows(gate), biases.get("gate"), reading.constant(gate), part).norm(dim=1)
            found.sign[part] = forms.signs(up)
        fixed = forms.probe(max(up.shape[1], down.shape[1]), 1, device)[:, 0]
        tiny = torch.finfo(torch.float64).tiny
        found.second[part] = found.sign[part] * (up @ fixed[: up.shape[1]]) / found.up[part].clamp_min(tiny)
    return found


def _joined(rows: Tensor, bias: Tensor | None, constant: Tensor | None, part: slice) -> Tensor:
    """Rows with their bias as one more column."""
    if bias is None:
        return rows
    column = bias[part] if constant is None else bias[part] + constant
    return torch.cat([rows, column[:, None]], dim=1)


@dataclass
class _Form:
    """What becomes of the hidden features of a feed-forward layer.

    Attributes:
        factors: map -> [features], of the rows in the old order.
        order: new feature -> old.
        slope: of a PReLU, in the old order.
        total: what the output was divided by.
        dead, ties: how many features give nothing, and how many pairs of them are alike in size.
    """

    factors: dict[str, Tensor]
    order: Tensor
    slope: Tensor | None = None
    total: float = 1.0
    dead: int = 0
    ties: int = 0


def _settle(
    mlp: MLP, sizes: _Neurons, dtype: torch.dtype, sort: bool, slope: Tensor | None = None, out_norm: Norm | None = None
) -> _Form:
    """Balance the features, and order them by size."""
    ones = torch.ones_like(sizes.up)
    factors = {"up": ones, "gate": ones, "down": ones}
    gate_scales = mlp.gate is not None and mlp.homogeneous
    strength, dead = sizes.strength, 0
    if mlp.gate is not None or mlp.homogeneous:
        alive = (sizes.up > 0) & (sizes.down > 0) & ((sizes.gate > 0) | torch.tensor(not gate_scales))
        goal = strength ** (1 / 3) if gate_scales else (sizes.up * sizes.down).sqrt()

        def towards(size: Tensor, live: Tensor = alive) -> Tensor:
            return torch.where(live, goal / size.where(live, torch.ones_like(size)), 0.0)

        factors = {"up": towards(sizes.up) * sizes.sign, "down": towards(sizes.down) * sizes.sign, "gate": ones}
        if gate_scales:
            factors["gate"] = towards(sizes.gate)
        dead = int((~alive).sum())
    total = 1.0
    if out_norm is not None and out_norm.eps == 0:
        # The size of the output is free: one more scale, shared by the sides that a feature's scale balances.
        total = strength.norm().item() or 1.0
        share = total ** (-1 / 3 if gate_scales else -0.5 if mlp.gate is not None or mlp.homogeneous else -1)
        scaled = ("up", "down", "gate") if gate_scales else ("up", "down")
        for name in scaled if mlp.gate is not None or mlp.homogeneous else ("down",):
            factors[name] = factors[name] * share
    if slope is not None:
        turned = slope.abs() > 1
        factors["up"] = torch.where(turned, -factors["up"], factors["up"])
        factors["down"] = torch.where(turned, -slope * factors["down"], factors["down"])
        slope = torch.where(turned, 1 / slope.where(turned, ones), slope)
    order, ties = torch.arange(mlp.up.width, device=sizes.up.device), []
    if sort and (mlp.activation != "prelu" or slope is not None):
        order, ties = forms.descending(strength, sizes.second, forms.degeneracy_tolerance(dtype))
    return _Form(factors, order, slope, total, dead, len(ties))


def _rewritten(
    mlp: MLP,
    weight: str,
    stored: Tensor,
    form: _Form,
    reading: Reading,
    writing: Writing,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A stored matrix in the new form, and what its rows give to the constant that a norm adds, map -> [features]."""
    new, constants = stored.clone(), dict[str, Tensor]()
    for name, part in maps_of(mlp).items():
        if part.weight != weight:
            continue
        old, rows, factor = part.heads(stored)[0], part.heads(new)[0], form.factors[name][form.order]
        treat = writing.rows if name == "down" else reading.rows
        moved = []
        for chunk in chunks(*rows.shape):
            rows[chunk] = (factor[chunk, None] * treat(old[form.order[chunk]].double())).to(rows.dtype)
            if name != "down":
                moved.append(reading.constant(old[chunk].double()))
        if moved and moved[0] is not None:
            constants[name] = torch.cat([constant for constant in moved if constant is not None])
    return new, constants


def _note(mlp: MLP, form: _Form, reading: Reading, writing: Writing, record: Record) -> None:
    for name, part in maps_of(mlp).items():
        record.slices(part, name, {"scale": form.factors[name][form.order], "order": form.order})
        if name == "down":
            record.writes(part, writing)
        else:
            record.reads(part, reading)


def _dtype(mlp: MLP, weights: ReadWeights) -> torch.dtype:
    """The coarsest dtype of its maps."""
    dtypes = [weights.dtype(part.weight) for part in maps_of(mlp).values()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _views(mlp: MLP, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[features, dim] of each map: views of stored matrices, whose numbers must be finite."""
    for name, tensor in stored.items():
        finite(tensor, name)
    return {name: part.heads(stored[part.weight])[0] for name, part in maps_of(mlp).items()}


def _biases(mlp: MLP, weights: ReadWeights) -> dict[str, Tensor]:
    return {
        name: part.head_biases(weights[part.bias_name].double())[0]
        for name, part in maps_of(mlp).items()
        if name != "down" and part.bias_name is not None
    }


def canonical_feed_forward(
    layer: Layer, number: int, weights: Weights, reading: Reading, writing: Writing, sort: bool, record: Record
) -> None:
    """The feed-forward part of a layer."""
    where = f"Layer {number}"
    if layer.mlp is not None:
        _single(layer.mlp, layer.mlp_out_norm, where, weights, reading, writing, sort, record)
    if layer.experts is not None:
        if layer.experts.shared is not None:
            _single(layer.experts.shared, None, where, weights, reading, writing, sort, record)
        _mixture(layer.experts, where, weights, reading, writing, sort, record)


def _single(
    mlp: MLP,
    out_norm: Norm | None,
    where: str,
    weights: Weights,
    reading: Reading,
    writing: Writing,
    sort: bool,
    record: Record,
) -> None:
    stored = matrices_of(mlp, weights)
    biases = _biases(mlp, weights)
    slope = None if mlp.slope is None else weights[mlp.slope].double()
    sizes = _measure(mlp, _views(mlp, stored), biases, reading, writing, slope)
    form = _settle(mlp, sizes, _dtype(mlp, weights), sort, slope, out_norm)
    if form.dead:
        record.leftover.append(f"{where}: {form.dead} hidden features give nothing; what is left of them is zero.")
    if form.ties:
        record.leftover.append(f"{where}: {form.ties} pairs of hidden features are alike in size.")
    if sort and mlp.activation == "prelu" and slope is None:
        record.leftover.append(f"{where}: hidden features are kept in order, for their slopes are not described.")
    # A tensor at a time, for each is copied; up and gate may be parts of one.
    for weight, matrix in stored.items():
        new, constants = _rewritten(mlp, weight, matrix, form, reading, writing)
        weights[weight] = new
        del new
        for name, part in maps_of(mlp).items():
            if part.weight == weight and name in biases and part.bias_name is not None:
                moved = biases[name] + constants.get(name, 0)
                whole = weights[part.bias_name].double().clone()
                part.put_head_biases(whole, (form.factors[name] * moved)[form.order][None])
                weights[part.bias_name] = whole
    _note(mlp, form, reading, writing, record)
    if mlp.down.bias_name is not None:
        bias = weights[mlp.down.bias_name].double()
        if reading.fold.kind == "after" and reading.bias is not None:
            bias = bias + reading.bias
        weights[mlp.down.bias_name] = writing.rows(bias) / form.total
    if form.total != 1:
        record.map_of(mlp.down)["total"] = form.total
    if mlp.slope is not None and form.slope is not None:
        weights[mlp.slope] = form.slope[form.order]


# --- mixtures of experts ----------------------------------------------------------------------------------------------


@dataclass
class _Left:
    """What is left of the experts of a layer: in how many of them features are dead or alike."""

    dead: list[int] = field(default_factory=list)
    ties: list[int] = field(default_factory=list)


def _mixture(
    experts: Experts, where: str, weights: Weights, reading: Reading, writing: Writing, sort: bool, record: Record
) -> None:
    rows, bias = _router_rows(experts, weights, reading)
    sizes = []
    for mlp in experts.experts:
        sizes.append(_measure(mlp, _views(mlp, matrices_of(mlp, weights)), {}, reading, writing, None))
    order = torch.arange(len(sizes), device=rows.device)
    if sort:
        order = _order(experts, where, rows, bias, sizes, weights, record)
    left = _Left()

    def treat(expert: int, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        mlp = experts.experts[expert]
        form = _settle(mlp, sizes[expert], _dtype(mlp, weights), sort)
        left.dead += [expert] * bool(form.dead)
        left.ties += [expert] * bool(form.ties)
        _note(mlp, form, reading, writing, record)
        return {name: _rewritten(mlp, name, matrix, form, reading, writing)[0] for name, matrix in stored.items()}

    replace_experts(experts, weights, order, treat)
    for place, expert in enumerate(order.tolist()):
        if place != expert:
            target = maps_of(experts.experts[place])
            for name, part in maps_of(experts.experts[expert]).items():
                record.map_of(part)["moved_to"] = target[name].key
    if left.dead:
        record.leftover.append(
            f"{where}: hidden features of {len(left.dead)} experts give nothing; what is left of them is zero."
        )
    if left.ties:
        record.leftover.append(f"{where}: hidden features of {len(left.ties)} experts are alike in size.")
    router = experts.router
    new = weights[router.weight].clone()
    router.put_heads(new, _seen(experts, rows)[order][None])
    weights[router.weight] = new
    if router.bias_name is not None and bias is not None:
        weights[router.bias_name] = _seen(experts, bias)[order]
    record.slices(router, "router", {"scale": torch.ones_like(rows[:, 0]), "order": order})
    record.reads(router, reading)
    if experts.softmax:
        record.map_of(router)["shifts"] = True


def _router_rows(experts: Experts, weights: ReadWeights, reading: Reading) -> tuple[Tensor, Tensor | None]:
    """The rows [experts, dim] of a router with what it reads folded, and its bias [experts], in float64."""
    router = experts.router
    raw = router.heads(finite(weights[router.weight], router.weight))[0].double()
    if router.bias_name is None:
        return reading.rows(raw), None
    bias, constant = weights[router.bias_name].double(), reading.constant(raw)
    return reading.rows(raw), bias if constant is None else bias + constant


def _seen(experts: Experts, rows: Tensor) -> Tensor:
    """Rows (or biases) of the router without what a softmax does not see."""
    return rows - rows.mean(dim=0) if experts.softmax else rows


def _order(
    experts: Experts,
    where: str,
    rows: Tensor,
    bias: Tensor | None,
    sizes: list[_Neurons],
    weights: ReadWeights,
    record: Record,
) -> Tensor:
    """Groups by size, largest first, and so the experts of each group; of experts alike, by their scores."""
    whole = rows if bias is None else torch.cat([rows, bias[:, None]], dim=1)
    dtype = weights.dtype(experts.router.weight)
    if alike_scores(whole, dtype):
        record.leftover.append(
            f"{where}: experts are kept in order, for some have the same scores, and the first of them is taken."
        )
        return torch.arange(len(rows), device=rows.device)
    dtype = max((dtype, _dtype(experts.experts[0], weights)), key=lambda dtype: torch.finfo(dtype).eps)
    tolerance = forms.degeneracy_tolerance(dtype)
    strength = torch.stack([size.strength.norm() for size in sizes]).unflatten(0, (experts.groups, -1))
    scores = _seen(experts, whole).norm(dim=1).unflatten(0, (experts.groups, -1))
    inner, ties = [], 0
    for sizes_of_group, scores_of_group in zip(strength, scores):
        order, pairs = forms.descending(sizes_of_group, scores_of_group, tolerance)
        inner.append(order)
        ties += len(pairs)
    groups, pairs = forms.descending(strength.norm(dim=1), scores.norm(dim=1), tolerance)
    ties += len(pairs)
    if ties:
        record.leftover.append(f"{where}: {ties} pairs of experts, or of groups of them, are alike in size.")
    return by_group(experts, groups, torch.stack(inner))
