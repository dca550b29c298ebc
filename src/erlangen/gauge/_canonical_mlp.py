"""Canonical form of a feed-forward layer: scales that go through it, and the order of hidden features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import forms
from ._canonical_record import Record, finite
from ._fold import Reading, Writing
from ._weights import Weights, chunks
from .layout import MLP, Layer


@dataclass
class _Neurons:
    """Sizes and signs of the hidden features of a feed-forward layer, [features]."""

    up: Tensor
    gate: Tensor
    down: Tensor
    sign: Tensor
    second: Tensor


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


def canonical_feed_forward(
    layer: Layer, number: int, weights: Weights, reading: Reading, writing: Writing, sort: bool, record: Record
) -> None:
    mlp = layer.mlp
    if mlp is None:
        return
    parts = {name: part for name, part in (("up", mlp.up), ("gate", mlp.gate), ("down", mlp.down)) if part is not None}
    stored = {part.weight: finite(weights[part.weight], part.weight) for part in parts.values()}
    # [features, dim]: views of the stored tensors
    old = {name: part.heads(stored[part.weight])[0] for name, part in parts.items()}
    biases = {
        name: parts[name].head_biases(weights[bias].double())[0]
        for name in ("up", "gate")
        if name in parts and (bias := parts[name].bias_name) is not None
    }
    slope = None if mlp.slope is None else weights[mlp.slope].double()
    sizes = _measure(mlp, old, biases, reading, writing, slope)
    dtype = max((weights.dtype(part.weight) for part in parts.values()), key=lambda dtype: torch.finfo(dtype).eps)
    ones = torch.ones_like(sizes.up)
    factors = {"up": ones, "gate": ones, "down": ones}
    gate_scales = mlp.gate is not None and mlp.homogeneous
    strength = sizes.up * sizes.down * (sizes.gate if mlp.gate is not None else 1)
    if mlp.gate is not None or mlp.homogeneous:
        alive = (sizes.up > 0) & (sizes.down > 0) & ((sizes.gate > 0) | torch.tensor(not gate_scales))
        goal = strength ** (1 / 3) if gate_scales else (sizes.up * sizes.down).sqrt()

        def towards(size: Tensor, live: Tensor = alive) -> Tensor:
            return torch.where(live, goal / size.where(live, torch.ones_like(size)), 0.0)

        factors = {"up": towards(sizes.up) * sizes.sign, "down": towards(sizes.down) * sizes.sign, "gate": ones}
        if gate_scales:
            factors["gate"] = towards(sizes.gate)
        dead = int((~alive).sum())
        if dead:
            record.leftover.append(
                f"Layer {number}: {dead} hidden features give nothing; what is left of them is zero."
            )
    out_norm, total = layer.mlp_out_norm, 1.0
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
    order = torch.arange(mlp.up.width, device=sizes.up.device)
    movable = mlp.activation != "prelu" or slope is not None
    if sort and movable:
        order, ties = forms.descending(strength, sizes.second, forms.degeneracy_tolerance(dtype))
        if ties:
            record.leftover.append(f"Layer {number}: {len(ties)} pairs of hidden features are alike in size.")
    elif sort:
        record.leftover.append(
            f"Layer {number}: hidden features are kept in order, for their slopes are not described."
        )
    # A tensor at a time, for each is copied; up and gate may be parts of one.
    for weight in stored:
        new = stored[weight].clone()
        for name, part in parts.items():
            if part.weight != weight:
                continue
            rows, factor = part.heads(new)[0], factors[name][order]
            treat = writing.rows if name == "down" else reading.rows
            for chunk in chunks(*rows.shape):
                values = treat(old[name][order[chunk]].double())
                rows[chunk] = (factor[chunk, None] * values).to(rows.dtype)
            if name in biases and part.bias_name is not None:
                bias, moved = biases[name], []
                for chunk in chunks(*rows.shape):
                    constant = reading.constant(old[name][chunk].double())
                    moved.append(bias[chunk] if constant is None else bias[chunk] + constant)
                whole = weights[part.bias_name].double().clone()
                part.put_head_biases(whole, (factor * torch.cat(moved)[order])[None])
                weights[part.bias_name] = whole
            record.slices(part, name, {"scale": factor, "order": order})
            if name == "down":
                record.writes(part, writing)
            else:
                record.reads(part, reading)
        weights[weight] = new
        del new
    if mlp.down.bias_name is not None:
        bias = weights[mlp.down.bias_name].double()
        if reading.fold.kind == "after" and reading.bias is not None:
            bias = bias + reading.bias
        weights[mlp.down.bias_name] = writing.rows(bias) / total
    if total != 1:
        record.map_of(mlp.down)["total"] = total
    if mlp.slope is not None and slope is not None:
        weights[mlp.slope] = slope[order]
