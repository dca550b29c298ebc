"""Random gauge moves: other weights of the same function.

Every symmetry that a layout leaves is used: factors of queries and keys, and of values and output; what a norm's gain
and bias exchange with the maps that read it; what layer norms take off; scales through feed-forward layers; shifts of
biases and of the scores of experts; orders of heads, hidden features and experts; on request the frame of the residual
stream. A symmetry that holds only up to the eps of a norm is none, and is not used.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import forms
from ._canonical_residual import mean_free_basis
from ._experts import alike_scores, by_group, maps_of, replace_experts
from ._fold import (
    Fold,
    Frame,
    Heads,
    Plan,
    Reading,
    Writing,
    attention_maps,
    latent_readers,
    plan,
    stored_gain,
    unseen_constants,
)
from ._weights import ModuleWeights, PendingWeights, Weights
from .canonical import check_weights, out_norm_in_frame
from .layout import MLP, Experts, HeadLayout, Layer, ModelLayout, Norm, model_layout


class _Random:
    """Random numbers, float64, drawn on the CPU.

    Args:
        condition: of the matrices; scales lie within its square root and the inverse.
        generator: None: torch's global one.
        device: where they are needed.
    """

    def __init__(self, condition: float, generator: torch.Generator | None, device: torch.device) -> None:
        self.condition, self.generator, self.device = condition, generator, device
        self.draws_on = torch.device("cpu") if generator is None else generator.device

    def normal(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64, device=self.draws_on)
        return values.to(self.device)

    def scales(self, *shape: int) -> Tensor:
        """Positive numbers, even in the logarithm."""
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64, device=self.draws_on)
        return torch.exp(math.log(self.condition) * (values.to(self.device) - 0.5))

    def signs(self, *shape: int) -> Tensor:
        return torch.where(self.normal(*shape) < 0, -1.0, 1.0).double()

    def rotations(self, number: int, width: int) -> Tensor:
        """Orthogonal [number, width, width]."""
        q, r = torch.linalg.qr(self.normal(number, width, width))
        return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None]

    def matrices(self, number: int, width: int) -> tuple[Tensor, Tensor]:
        """[number, width, width] of the condition asked for, and their inverse transposes."""
        left, right = self.rotations(number, width), self.rotations(number, width)
        exponent = torch.linspace(0.5, -0.5, width, dtype=torch.float64, device=self.device)
        values = torch.exp(math.log(self.condition) * exponent) if width > 1 else self.scales(1)
        return (left * values) @ right, (left / values) @ right

    def phases(self, number: int, width: int) -> Tensor:
        """Complex numbers of modulus 1, [number, width]."""
        angles = 2 * math.pi * torch.rand(number, width, generator=self.generator, dtype=torch.float64)
        return torch.polar(torch.ones_like(angles), angles).to(self.device)

    def order(self, number: int) -> Tensor:
        return torch.randperm(number, generator=self.generator, device=self.draws_on).to(self.device)


class _Unfold:
    """A norm that is read, folded and given random numbers again."""

    def __init__(self, reading: Reading, random: _Random, numbers: int) -> None:
        self.reading, self.random = reading, random
        fold, norm = reading.fold, reading.fold.norm
        self.gain = self.bias = None
        self.scale = 1.0
        if norm is None or fold.kind == "kept":
            return
        if fold.kind == "before":
            self.gain = random.scales(numbers) * random.signs(numbers) if norm.gain else None
        elif fold.scaled:
            self.scale = random.scales(1).item()
        if norm.bias:
            self.bias = random.normal(numbers)
            if fold.ones:
                gain = torch.ones_like(self.bias) if self.gain is None else self.gain
                self.bias = gain * random.scales(numbers)

    def rows(self, rows: Tensor, constant_shift: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """New rows [..., dim] for those that are stored, and what is to be added to their biases [...].

        Args:
            rows: as they are stored.
            constant_shift: [...], added to what the rows give to a constant input, where biases have no other place.
        """
        fold, norm = self.reading.fold, self.reading.fold.norm
        new = self.reading.rows(rows)
        if norm is None or fold.kind == "kept":
            return new, None
        gain = new.new_ones(new.shape[-1]) if self.gain is None else self.gain
        free = self.random.normal(*rows.shape[:-1]) * rows.square().mean().sqrt()
        if fold.kind == "before":
            if fold.ones and self.bias is not None:
                constant = new.sum(dim=-1)
                new = new - new.mean(dim=-1, keepdim=True)
                if constant_shift is not None:
                    constant = constant + constant_shift
                ratio = self.bias / gain
                free = (constant - new @ ratio) / ratio.sum()
                return (new + free[..., None]) / gain, None
            if norm.kind == "layer":
                new = new + free[..., None]
            new = new / gain
        else:
            unseen = self.reading.unseen()
            new = new / self.scale
            if unseen is not None:
                new = new + free[..., None] * unseen.sum(dim=0)
        constant = self.reading.constant(rows)
        if constant is None or self.bias is None:
            return new, None
        return new, constant - new @ self.bias

    def output_bias(self, bias: Tensor, writing: Writing) -> Tensor:
        """The output bias of the branch that reads. A stream behind a norm of sums carries the norm's bias on."""
        if self.reading.fold.kind != "after" or self.reading.bias is None or self.bias is None:
            return writing.rows(bias)
        return writing.rows(bias + self.reading.bias) - self.bias

    def store(self, weights: Weights) -> None:
        """Write the norm."""
        fold, norm = self.reading.fold, self.reading.fold.norm
        self.reading.store(weights)
        if norm is None or fold.kind == "kept":
            return
        if norm.weight is not None:
            if self.gain is not None:
                weights[norm.weight] = self.gain - norm.offset
            elif self.reading.gain is not None and fold.kind == "after":
                weights[norm.weight] = self.reading.gain / self.reading.scale * self.scale - norm.offset
        if norm.bias_name is not None and self.bias is not None:
            weights[norm.bias_name] = self.bias

    @property
    def stream_scale(self) -> float:
        """What the writer of the same branch is divided by (norms of sums)."""
        return self.reading.scale / self.scale if self.reading.fold.kind == "after" else 1.0


def _free_mean(rows: Tensor, centred: bool, random: _Random) -> Tensor:
    """Rows that are written, with random means where means are free."""
    if not centred:
        return rows
    return rows + (random.normal(*rows.shape[:-1]) * rows.square().mean().sqrt())[..., None]


def _query_key(attention: HeadLayout, heads: Heads, weights: Weights, random: _Random) -> tuple[Tensor, Tensor] | None:
    """Move queries against keys; new gains of their norms [heads or 1, head_dim], if they have any."""
    kv_heads, group, width = attention.num_kv_heads, attention.group_size, attention.head_dim
    turned, rotary = attention.rotary_dim, attention.rotary
    key = heads.weights["key"]
    planes = None if rotary is None else rotary.planes(key.device)
    eye = torch.eye(width, dtype=torch.float64, device=key.device).repeat(kv_heads, 1, 1)
    left, right = eye.clone(), eye.clone()
    norms, gains = attention.qk_norm, None
    if norms is False:
        if planes is not None:
            number = random.phases(kv_heads, turned // 2) * random.scales(kv_heads, turned // 2)
            left[:, :turned, :turned] = forms.plane_matrices(number, planes)
            right[:, :turned, :turned] = forms.plane_matrices(1 / number.conj(), planes)
        if turned < width:
            left[:, turned:, turned:], right[:, turned:, turned:] = random.matrices(kv_heads, width - turned)
        factor_query, factor_key = left, right
    else:
        stored = None if norms is True else [stored_gain(weights, norm) for norm in norms]
        if stored is None or stored[0] is None or stored[1] is None:
            if planes is not None:
                left[:, :turned, :turned] = forms.plane_matrices(random.phases(kv_heads, turned // 2), planes)
            if turned < width:
                left[:, turned:, turned:] = random.rotations(kv_heads, width - turned)
            right = left
            factor_query, factor_key = left, right
        else:
            label = torch.arange(width, device=key.device)
            if planes is not None:
                label[planes[:, 1]] = planes[:, 0]
            number = kv_heads if attention.qk_norm_over == "all" else 1
            exchange = (random.scales(number, width) * random.signs(number, width))[:, label]
            gain_query, gain_key = (gain.view(-1, width) for gain in stored if gain is not None)
            # Signs of a coordinate go through the norm, with the sign of its gain.
            inner = random.signs(2, width)
            gains = (
                gain_query * (exchange.repeat_interleave(group, dim=0) if number > 1 else exchange) * inner[0],
                gain_key / exchange * inner[1],
            )
            flip = random.signs(kv_heads, width)[:, label]
            factor_query, factor_key = (flip * inner[0]).diag_embed(), (flip * inner[1]).diag_embed()
        free = (True, True) if norms is True else tuple(norm.eps == 0 for norm in norms)
        whole = attention.qk_norm_over == "all"
        if free[1]:
            factor_key = factor_key * random.scales(1 if whole else kv_heads, 1, 1)
        factor_query = factor_query.repeat_interleave(group, dim=0)
        if free[0]:
            factor_query = factor_query * random.scales(1 if whole else attention.num_heads, 1, 1)
    if factor_query.shape[0] != attention.num_heads:
        factor_query = factor_query.repeat_interleave(group, dim=0)
    for name, factor in (("query", factor_query), ("key", factor_key)):
        heads.weights[name] = factor @ heads.weights[name]
        if name in heads.biases:
            heads.biases[name] = (factor @ heads.biases[name][..., None])[..., 0]
    if "key" in heads.biases and norms is False and attention.soft_cap is None and turned < width:
        shift = torch.zeros_like(heads.biases["key"])
        shift[:, turned:] = random.normal(kv_heads, width - turned) * heads.weights["key"].square().mean().sqrt()
        heads.biases["key"] = heads.biases["key"] + shift
    return gains


def _latents(attention: HeadLayout, heads: Heads, weights: Weights, random: _Random) -> None:
    """Move the latents of latent attention, and its rotary part."""
    for name, (norm, readers) in latent_readers(attention).items():
        width = heads.weights[name].shape[1]
        turn = random.rotations(1, width)
        scale = random.scales(1).item() if norm.eps == 0 else 1.0
        heads.weights[name] = scale * (turn @ heads.weights[name])
        if name in heads.biases:
            heads.biases[name] = scale * (heads.biases[name] @ turn[0].mT)
        gain = random.scales(width) * random.signs(width) if norm.gain else heads.weights[name].new_ones(width)
        for reader in readers:
            heads.weights[reader] = heads.weights[reader] @ turn[0].mT / gain
        if norm.weight is not None:
            weights[norm.weight] = gain - norm.offset
    latent = attention.latent
    if latent is not None:
        planes = latent.rotary.planes(random.device)
        number = random.phases(1, planes.shape[0]) * random.scales(1, planes.shape[0])
        for name, value in (("rotary_query", number), ("rotary_key", 1 / number.conj())):
            factor = forms.plane_matrices(value, planes)
            heads.weights[name] = factor @ heads.weights[name]
            if name in heads.biases:
                heads.biases[name] = (factor @ heads.biases[name][..., None])[..., 0]


def _value_output(attention: HeadLayout, heads: Heads, writing: Writing, random: _Random) -> None:
    """Move values against output, and the value bias against the output bias."""
    group = attention.group_size
    left, right = random.matrices(attention.num_kv_heads, attention.value_width)
    heads.weights["value"] = left @ heads.weights["value"]
    heads.weights["output"] = right.repeat_interleave(group, dim=0) @ heads.weights["output"]
    if "value" in heads.biases:
        heads.biases["value"] = (left @ heads.biases["value"][..., None])[..., 0]
        shift = _free_constants(attention, "value", heads, writing, random)
        if shift is not None:
            heads.biases["value"] = heads.biases["value"] + shift
        if "output" in heads.biases:
            shift = random.normal(*heads.biases["value"].shape) * heads.weights["value"].square().mean().sqrt()
            heads.biases["value"] = heads.biases["value"] + shift
            by_query = shift.repeat_interleave(group, dim=0)
            moved = torch.einsum("hv,hvd->d", by_query, heads.weights["output"])
            heads.biases["output"] = heads.biases["output"] - moved


def _attention(layer: Layer, weights: Weights, unfold: _Unfold, writing: Writing, random: _Random, permute: bool):
    attention = layer.attention
    heads = Heads.read(weights, attention)
    # Of the stream: folded, and unfolded with other numbers.
    fresh = Heads(dict(heads.weights), dict(heads.biases))
    fresh.fold(attention, Reading(Fold(None)), writing)
    for name in heads.weights:
        if name in _stream(attention):
            free = _free_constants(attention, name, fresh, writing, random)
            fresh.weights[name], added = unfold.rows(heads.weights[name], free)
            if added is not None:
                fresh.biases[name] = heads.biases[name] + added
    if "output" in fresh.biases:
        fresh.biases["output"] = unfold.output_bias(heads.biases["output"], writing)
    heads = fresh
    heads.fold_latents(attention, weights)
    _latents(attention, heads, weights, random)
    gains = _query_key(attention, heads, weights, random)
    _value_output(attention, heads, writing, random)
    out = layer.attention_out_norm
    if out is not None and out.eps == 0:
        factor = random.scales(1)
        heads.weights["output"] = heads.weights["output"] * factor
        if "output" in heads.biases:
            heads.biases["output"] = heads.biases["output"] * factor
    heads.weights["output"] = _free_mean(heads.weights["output"], writing.centred, random)
    if "output" in heads.biases:
        heads.biases["output"] = _free_mean(heads.biases["output"], writing.centred, random)
    if permute:
        group = attention.group_size
        kv_order = random.order(attention.num_kv_heads)
        inner = torch.stack([random.order(group) for _ in range(attention.num_kv_heads)])
        orders = {"key": kv_order, "value": kv_order}
        for name in ("query", "output", "rotary_query"):
            orders[name] = (kv_order[:, None] * group + inner).flatten()
        for name, order in orders.items():
            if name in heads.weights:
                heads.weights[name] = heads.weights[name][order]
            if name in heads.biases and name != "output":
                heads.biases[name] = heads.biases[name][order]
        if gains is not None and attention.qk_norm_over == "all":
            gains = (gains[0][orders["query"]], gains[1][kv_order])
    if gains is not None and isinstance(attention.qk_norm, tuple):
        for norm, gain in zip(attention.qk_norm, gains):
            assert norm.weight is not None
            weights[norm.weight] = gain.flatten() - norm.offset
    heads.store(weights, attention)


def _free_constants(attention: HeadLayout, name: str, heads: Heads, writing: Writing, random: _Random) -> Tensor | None:
    """Random constants [heads, width] in keys or values that change nothing."""
    kv_heads, turned = attention.num_kv_heads, attention.rotary_dim
    if attention.latent is not None:
        return None
    if name == "key" and attention.qk_norm is False and attention.soft_cap is None:
        shift = random.normal(kv_heads, attention.head_dim) * heads.weights["key"].square().mean().sqrt()
        shift[:, :turned] = 0
        return shift
    if name == "value" and "output" not in heads.biases:
        unseen = unseen_constants(heads.weights["output"], kv_heads, writing.centred)
        if unseen is not None:
            size = heads.weights["value"].square().mean().sqrt()
            return (size * random.normal(unseen.shape[0]) @ unseen).view(kv_heads, -1)
    return None


def _stream(attention: HeadLayout) -> tuple[str, ...]:
    by_latent = {name for _, names in latent_readers(attention).values() for name in names}
    return tuple(name for name in attention_maps(attention) if name != "output" and name not in by_latent)


def _feed_forward(layer: Layer, weights: Weights, unfold: _Unfold, writing: Writing, random: _Random, permute: bool):
    if layer.mlp is not None:
        out = layer.mlp_out_norm
        factor = random.scales(1).item() if out is not None and out.eps == 0 else 1.0
        _single(layer.mlp, weights, unfold, writing, random, permute, factor)
    if layer.experts is not None:
        if layer.experts.shared is not None:
            _single(layer.experts.shared, weights, unfold, writing, random, permute, 1.0)
        _mixture(layer.experts, weights, unfold, writing, random, permute)


def _factors(mlp: MLP, random: _Random) -> dict[str, Tensor]:
    """Scales and signs [features] that go through a feed-forward layer."""
    features = mlp.up.width
    scale = random.scales(features) if mlp.gate is not None or mlp.homogeneous else random.normal(features) * 0 + 1
    factors = {"up": scale, "down": 1 / scale, "gate": torch.ones_like(scale)}
    if mlp.gate is not None:
        sign = random.signs(features)
        factors["up"], factors["down"] = sign * factors["up"], sign * factors["down"]
        if mlp.homogeneous:
            through = random.scales(features)
            factors["gate"], factors["down"] = factors["gate"] * through, factors["down"] / through
    return factors


def _single(
    mlp: MLP, weights: Weights, unfold: _Unfold, writing: Writing, random: _Random, permute: bool, factor: float
) -> None:
    """Move a feed-forward layer; what it writes is multiplied by a factor."""
    features, factors = mlp.up.width, _factors(mlp, random)
    order = torch.arange(features, device=random.device)
    movable = mlp.activation != "prelu" or mlp.slope is not None
    if permute and movable:
        order = random.order(features)
        if mlp.slope is not None:
            slope = weights[mlp.slope].double()
            turned = (random.signs(features) < 0) & (slope.abs() > 1e-3)
            factors["up"] = torch.where(turned, -factors["up"], factors["up"])
            factors["down"] = torch.where(turned, -slope * factors["down"], factors["down"])
            weights[mlp.slope] = torch.where(turned, 1 / slope.where(turned, torch.ones_like(slope)), slope)[order]
    for name, part in maps_of(mlp).items():
        new = weights[part.weight].clone()
        rows, added = part.heads(new).double(), None
        if name == "down":
            rows = _free_mean(writing.rows(rows) * factor, writing.centred, random)
        else:
            rows, added = unfold.rows(rows)
        part.put_heads(new, (factors[name][:, None] * rows[0])[order][None])
        weights[part.weight] = new
        if part.bias_name is None:
            continue
        bias = weights[part.bias_name].double().clone()
        if name == "down":
            bias = unfold.output_bias(bias, writing) * factor
            bias = _free_mean(bias, writing.centred, random)
        else:
            values = part.head_biases(bias) + (0 if added is None else added)
            part.put_head_biases(bias, (factors[name] * values[0])[order][None])
        weights[part.bias_name] = bias


def _mixture(
    experts: Experts, weights: Weights, unfold: _Unfold, writing: Writing, random: _Random, permute: bool
) -> None:
    """Move a mixture of experts, but for what always takes part."""
    router = experts.router
    new = weights[router.weight].clone()
    rows = router.heads(new)[0].double()
    bias = None if router.bias_name is None else weights[router.bias_name].double()
    order = torch.arange(len(rows), device=random.device)
    whole = rows if bias is None else torch.cat([rows, bias[:, None]], dim=1)
    if permute and not alike_scores(whole, weights.dtype(router.weight)):
        inner = torch.stack([random.order(len(order) // experts.groups) for _ in range(experts.groups)])
        order = by_group(experts, random.order(experts.groups), inner)
    if experts.softmax:
        rows = rows + random.normal(rows.shape[1]) * rows.square().mean().sqrt()
    rows, added = unfold.rows(rows)
    router.put_heads(new, rows[order][None])
    weights[router.weight] = new
    if router.bias_name is not None and bias is not None:
        bias = bias if added is None else bias + added
        weights[router.bias_name] = (bias + random.normal(1) if experts.softmax else bias)[order]

    def treat(expert: int, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        mlp = experts.experts[expert]
        found, factors = {name: matrix.clone() for name, matrix in stored.items()}, _factors(mlp, random)
        places = random.order(mlp.up.width) if permute else torch.arange(mlp.up.width, device=random.device)
        if mlp.activation == "prelu":
            places = torch.arange(mlp.up.width, device=random.device)
        for name, part in maps_of(mlp).items():
            old = part.heads(found[part.weight]).double()
            if name == "down":
                moved = _free_mean(writing.rows(old), writing.centred, random)
            else:
                moved = unfold.rows(old)[0]
            part.put_heads(found[part.weight], (factors[name][:, None] * moved[0])[places][None])
        return found

    replace_experts(experts, weights, order, treat)


def _frame(layout: ModelLayout, steps: Plan, random: _Random) -> Frame:
    dim = layout.dim
    if steps.rotations == "all":
        return Frame(matrix=random.rotations(1, dim)[0])
    if steps.rotations == "mean":
        basis = mean_free_basis(dim, random.device)
        return Frame(matrix=basis @ random.rotations(1, dim - 1)[0] @ basis.mT + 1 / dim)
    sign = random.signs(dim) if steps.rotations == "signed" else random.signs(1).expand(dim)
    return Frame(order=random.order(dim), sign=sign)


def move(
    layout: ModelLayout,
    weights: Weights,
    condition: float = 10.0,
    generator: torch.Generator | None = None,
    *,
    permute: bool = True,
    residual: bool = False,
    logit_shift: bool = False,
) -> None:
    """A random gauge move of weights, in place. Arguments and errors as of `random_move`.

    Args:
        layout: of the model.
        weights: read and written.
    """
    if not 1 <= condition < math.inf:
        raise ValueError(f"the condition of a matrix is a finite number of at least 1, received {condition}")
    check_weights(layout, weights)
    steps = plan(layout, logit_shift=logit_shift)
    if residual and steps.rotations == "none":
        raise ValueError(f"the frame of the residual stream of this {layout.kind} is not free: {steps.reason}")
    table = weights[layout.token_embedding].double()
    random = _Random(condition, generator, table.device)
    dim = layout.dim
    frame = _frame(layout, steps, random) if residual else Frame()
    scale = random.scales(1).item() if steps.residual_scale else 1.0
    table_scale = random.scales(1).item() if steps.embedding_scale else scale
    # Embeddings: what is added to one is taken off the other.
    size = table.square().mean().sqrt()
    shift = torch.zeros(dim, dtype=torch.float64, device=table.device)
    for name in layout.other_embeddings:
        rows = weights[name].double()
        if steps.shifts:
            added = random.normal(dim) * size
            rows, shift = rows + added, shift - added
        weights[name] = _free_mean(Writing(steps.centred, frame, table_scale).rows(rows), steps.centred, random)
    if steps.centred and layout.tied and steps.logit_shift:
        shift = shift + random.normal(1) * size
    centred = steps.centred and not layout.tied
    weights[layout.token_embedding] = _free_mean(
        Writing(centred, frame, table_scale).rows(table + shift), centred, random
    )
    # Layers.
    for layer, step in zip(layout.layers, steps.layers):
        unfolds = {fold: _Unfold(Reading.of(weights, fold, frame), random, dim) for fold in (step.attention, step.mlp)}
        for fold, centred, out, treat in (
            (step.attention, step.attention_centred, layer.attention_out_norm, _attention),
            (step.mlp, step.mlp_centred, layer.mlp_out_norm, _feed_forward),
        ):
            divided = unfolds[fold].stream_scale if fold.kind == "after" else scale if out is None else 1.0
            treat(layer, weights, unfolds[fold], Writing(centred, frame, divided), random, permute)
            out_norm_in_frame(out, weights, frame, scale)
        if layer.joined_biases is not None:
            output, down = layer.joined_biases
            added = random.normal(dim) * weights[layer.attention.output.weight].double().square().mean().sqrt()
            weights[output] = weights[output].double() + added
            weights[down] = weights[down].double() - added
        for unfold in unfolds.values():
            if unfold.reading.fold.kind != "kept" or not frame.same:
                unfold.store(weights)
    _final(layout, weights, steps, frame, scale, random)


def _final(layout: ModelLayout, weights: Weights, steps: Plan, frame: Frame, scale: float, random: _Random) -> None:
    final, part = layout.final_norm, layout.unembedding
    if part is not None:
        unfold = _Unfold(Reading.of(weights, steps.final or Fold(None), frame), random, layout.dim)
        new = weights[part.weight].clone()
        rows = part.heads(new).double()
        if steps.logit_shift:
            rows = rows + random.normal(layout.dim) * rows.square().mean().sqrt()
        rows, added = unfold.rows(rows)
        part.put_heads(new, rows)
        weights[part.weight] = new
        if part.bias_name is not None:
            bias = weights[part.bias_name].double() + (0 if added is None else added[0])
            weights[part.bias_name] = bias + random.normal(1) if steps.logit_shift else bias
        if steps.final is not None and steps.final.kind != "kept":
            unfold.store(weights)
            return
    if final is not None:
        _kept_norm(final, weights, frame, scale if layout.tied else 1.0)


def _kept_norm(norm: Norm, weights: Weights, frame: Frame, scale: float) -> None:
    out_norm_in_frame(norm, weights, frame, 1 / scale)


def random_move(
    model: nn.Module,
    condition: float = 10.0,
    generator: torch.Generator | None = None,
    *,
    permute: bool = True,
    residual: bool = False,
    logit_shift: bool = False,
) -> Any:
    """Move a model along its gauge, in place: its weights change, its function does not.

    Computed in float64 and stored in the parameters' dtype: the function is kept up to that rounding, times the
    condition.

    Args:
        model: a model whose layout is known (wrappers of compile and DDP are seen through).
        condition: of the matrices by which heads are multiplied; scales lie within its square root and the inverse.
        generator: of the random numbers. None: torch's global one.
        permute: also change the order of heads, hidden features and experts.
        residual: also change the frame of the residual stream: a rotation where one is free, a (signed) permutation
            where not.
        logit_shift: also add a constant to all logits of a position, which softmax does not see.

    Returns:
        The model.

    Raises:
        TypeError: no layout is known for the model.
        ValueError: a condition below 1, weights that contradict the layout, ``residual`` where no frame is free.
    """
    weights = PendingWeights(ModuleWeights(model))
    options = {"permute": permute, "residual": residual, "logit_shift": logit_shift}
    move(model_layout(model), weights, condition, generator, **options)
    weights.commit()
    return model
