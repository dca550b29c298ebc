r"""What of a transformer's weights its norms and its residual stream make redundant, and how that is folded away.

A map that reads a norm sees γ ⊙ x̂ + β: its weight W and bias b count only as W diag(γ) and b + W β. Behind a layer norm
x̂ has no mean, so W diag(γ) counts only up to its rows' means. Where nothing but layer norms reads the residual stream,
what is written to it counts only up to its mean. After a norm of the sum (BERT) the gain stays: the stream itself
carries it on; but β goes into the biases of the readers and, for the stream, into the output bias of the branch.

Readers without a bias behind a layer norm with one: W (γ ⊙ x̂ + β) = (W diag(γ) C + W β 1ᵀ / d)(x̂ + 1), with C =
1 − 11ᵀ/d. So the norm gets gain 1 and bias 1, and the constant is kept on the mean, which x̂ does not have.

`Plan` says from a layout alone what may be done; `Reading` and `Writing` do it to rows in float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from . import forms
from ._weights import ReadWeights, Weights
from .layout import HeadLayout, Layer, ModelLayout, Norm, Projection


def attention_maps(attention: HeadLayout) -> dict[str, Projection]:
    """The slices of a layer's attention by name."""
    maps = {
        "query": attention.query,
        "key": attention.key,
        "value": attention.value,
        "output": attention.output,
    }
    if (latent := attention.latent) is not None:
        maps |= {
            "rotary_query": latent.rotary_query,
            "rotary_key": latent.rotary_key,
            "kv_latent": latent.kv_latent,
        }
        if latent.query_latent is not None:
            maps["query_latent"] = latent.query_latent
    return maps


def stream_readers(attention: HeadLayout) -> tuple[str, ...]:
    """Names of those maps that read the residual stream (through a norm)."""
    latent = attention.latent
    if latent is None:
        return ("query", "key", "value")
    queries = ("query", "rotary_query") if latent.query_latent is None else ("query_latent",)
    return (*queries, "kv_latent", "rotary_key")


def latent_readers(attention: HeadLayout) -> dict[str, tuple[Norm, tuple[str, ...]]]:
    """Latent -> its norm, and the maps that read it."""
    latent = attention.latent
    if latent is None:
        return {}
    found: dict[str, tuple[Norm, tuple[str, ...]]] = {"kv_latent": (latent.kv_norm, ("key", "value"))}
    if latent.query_latent is not None and latent.query_norm is not None:
        found["query_latent"] = (latent.query_norm, ("query", "rotary_query"))
    return found


@dataclass(frozen=True)
class Fold:
    """How what maps read is treated.

    Attributes:
        norm: what they read; None: the residual stream as it is.
        kind: "before": a norm at the head of a branch, whose gain is folded. "after": a norm of the sum, whose gain
            stays. "kept": nothing is folded.
        ones: the bias of the norm is kept on the mean, for the readers have no bias.
        scaled: the scale of the gain is free (norms of sums with eps = 0).
    """

    norm: Norm | None
    kind: Literal["before", "after", "kept"] = "kept"
    ones: bool = False
    scaled: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """What may be done to one layer.

    Attributes:
        attention, mlp: what the two branches read.
        attention_centred, mlp_centred: what they write counts only up to its mean.
    """

    attention: Fold
    mlp: Fold
    attention_centred: bool
    mlp_centred: bool


@dataclass(frozen=True)
class Plan:
    """What may be done to a model, from its layout.

    Attributes:
        layers: in order of depth.
        final: what the unembedding reads; None where there is none to fold into.
        centred: only layer norms read the sum of embeddings.
        shifts: a vector may be moved from the other embeddings to the token embedding.
        logit_shift: a constant added to all logits of a position is taken as invisible.
        residual_scale: the scale of the residual stream is free (every norm has eps = 0).
        embedding_scale: the scale of the sum of embeddings is free (a norm without eps reads it, and nothing else).
        rotations: what frame of the residual stream is free: "all", those that leave the mean ("mean"), signed
            permutations ("signed"), permutations and one sign ("permuted"), or "none", with the reason.
        notes: what is folded and what is left, in sentences.
    """

    layers: tuple[LayerPlan, ...]
    final: Fold | None
    centred: bool
    shifts: bool
    logit_shift: bool
    residual_scale: bool
    embedding_scale: bool
    rotations: Literal["all", "mean", "signed", "permuted", "none"]
    reason: str
    notes: tuple[str, ...]


def _norms(layer: Layer) -> list[Norm]:
    before = [layer.attention_norm, layer.mlp_norm]
    after = [layer.attention_out_norm, layer.mlp_out_norm, layer.attention_sum_norm, layer.mlp_sum_norm]
    return [norm for norm in before + after if norm is not None]


def plan(layout: ModelLayout, *, logit_shift: bool = False) -> Plan:
    """What may be done to a model with this layout.

    Args:
        layout: of the model.
        logit_shift: take a constant added to all logits of a position as invisible (as softmax does).
    """
    notes: list[str] = []
    readers: dict[str, list[Projection]] = {}
    for layer in layout.layers:
        maps = attention_maps(layer.attention)
        if layer.attention_norm is not None:
            readers.setdefault(layer.attention_norm.path, []).extend(maps[n] for n in stream_readers(layer.attention))
        if layer.mlp_norm is not None:
            readers.setdefault(layer.mlp_norm.path, []).extend(layer.feed_forward_readers)
    if layout.final_norm is not None and layout.unembedding is not None:
        readers.setdefault(layout.final_norm.path, []).append(layout.unembedding)

    def before(norm: Norm) -> Fold:
        biased = all(part.bias for part in readers[norm.path])
        if norm.bias and not biased and norm.kind == "rms":
            notes.append(f"{norm.path} is left as it is: its bias has nowhere to go.")
            return Fold(norm)
        return Fold(norm, "before", ones=norm.bias and not biased)

    layers = []
    source = layout.embedding_norm
    for layer in layout.layers:
        maps = attention_maps(layer.attention)

        def branch(norm: Norm | None, after: Norm | None, inputs: list[Projection], output: Projection, goal):
            if norm is not None:
                return before(norm)
            if after is None or not inputs:
                return Fold(after)
            if not (all(part.bias for part in inputs) and output.bias and after.bias):
                notes.append(f"{after.path} is left as it is: not every map behind it has a bias.")
                return Fold(after)
            return Fold(after, "after", scaled=goal is not None and goal.eps == 0)

        attention = branch(
            layer.attention_norm,
            source,
            [maps[name] for name in stream_readers(layer.attention)],
            layer.attention.output,
            layer.attention_sum_norm,
        )
        mlp = layer.mlp
        feed = branch(
            layer.mlp_norm,
            layer.attention_sum_norm,
            [] if mlp is None else list(layer.feed_forward_readers),
            layer.attention.output if mlp is None else mlp.down,
            layer.mlp_sum_norm,
        )
        source = layer.mlp_sum_norm
        layers.append((layer, attention, feed))
    before_all = all(
        layer.attention_norm is not None
        and layer.mlp_norm is not None
        and layer.attention_sum_norm is None
        and layer.mlp_sum_norm is None
        for layer in layout.layers
    )
    before_all = before_all and layout.final_norm is not None and layout.embedding_norm is None
    stream = [norm for layer in layout.layers for norm in (layer.attention_norm, layer.mlp_norm)] + [layout.final_norm]
    centred = before_all and all(norm is not None and norm.kind == "layer" for norm in stream)
    logits = layout.tied or layout.unembedding is not None
    shift = logit_shift and logits and layout.soft_cap is None

    def writes(out: Norm | None, total: Norm | None) -> bool:
        if out is not None:
            return out.kind == "layer"
        return centred or (total is not None and total.kind == "layer")

    layer_plans = tuple(
        LayerPlan(
            attention,
            feed,
            writes(layer.attention_out_norm, layer.attention_sum_norm),
            writes(layer.mlp_out_norm, layer.mlp_sum_norm),
        )
        for layer, attention, feed in layers
    )
    final = None
    if layout.final_norm is not None:
        if layout.unembedding is not None:
            final = before(layout.final_norm)
        else:
            why = "the token embedding that reads it is also the embedding" if layout.tied else "it is the output"
            notes.append(f"{layout.final_norm.path} is left as it is: {why}.")
    embedding_centred = centred or (layout.embedding_norm is not None and layout.embedding_norm.kind == "layer")
    folded = sum(fold.kind != "kept" for pair in layer_plans for fold in (pair.attention, pair.mlp))
    folded += final is not None and final.kind != "kept"
    if folded:
        what = "gains and biases" if before_all else "biases"
        notes.insert(0, f"{folded} norms: {what} folded into the maps that read them.")
    if embedding_centred:
        notes.append("Means that layer norms take off are taken off the weights.")
    mixtures = [layer.experts for layer in layout.layers if layer.experts is not None and layer.experts.softmax]
    if mixtures:
        notes.append(f"{len(mixtures)} mixtures of experts: what softmax does not see is taken off their scores.")
    if layout.other_embeddings and (not layout.tied or shift):
        notes.append("The mean of further embeddings is moved to the token embedding.")

    all_norms = [norm for layer in layout.layers for norm in _norms(layer)] + [layout.final_norm]
    in_stream = [norm for norm in stream if norm is not None]
    out_norms = [norm for layer in layout.layers for norm in (layer.attention_out_norm, layer.mlp_out_norm)]
    carried = [norm for norm in [*out_norms, layout.final_norm if layout.tied else None] if norm is not None]
    settled = all(norm.eps == 0 for norm in in_stream)
    scale = before_all and settled and all(norm.gain for norm in carried)
    if before_all and not scale:
        why = "a norm that would carry it has no gain" if settled else "the eps of its norms is not 0"
        notes.append(f"The scale of the residual stream is left: {why}.")
    kept = [fold.norm for pair in layer_plans for fold in (pair.attention, pair.mlp) if fold.kind == "kept"]
    kept += [norm for layer in layout.layers for norm in (layer.attention_out_norm, layer.mlp_out_norm) if norm]
    if final is not None and final.kind == "kept":
        kept.append(final.norm)
    reason = ""
    rotations: Literal["all", "mean", "signed", "permuted", "none"] = "none"
    if not logits:
        reason = "the model has no logits: its output is the residual stream itself"
    elif not before_all:
        reason = "norms of the sum carry their gains along the residual stream"
    elif any(norm is not None and norm.kind == "layer" for norm in all_norms):
        exact = not layout.tied and not kept and centred
        rotations = "mean" if exact else "permuted"
    else:
        rotations = "all" if not layout.tied and not kept else "signed"
    return Plan(
        layers=layer_plans,
        final=final,
        centred=embedding_centred,
        shifts=not layout.tied or shift,
        logit_shift=shift,
        residual_scale=scale,
        embedding_scale=layout.embedding_norm is not None and layout.embedding_norm.eps == 0 and not layout.tied,
        rotations=rotations,
        reason=reason,
        notes=tuple(notes),
    )


# --- frames of the residual stream ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """A change of frame of the residual stream, x -> R x.

    Attributes:
        matrix: float64 [dim, dim], orthogonal; or None.
        order, sign: a signed permutation instead: new coordinate i is sign[i] times old coordinate order[i].
    """

    matrix: Tensor | None = None
    order: Tensor | None = None
    sign: Tensor | None = None

    @property
    def same(self) -> bool:
        """Whether it changes nothing."""
        return self.matrix is None and self.order is None

    def apply(self, rows: Tensor) -> Tensor:
        """rows Rᵀ, for rows [..., dim] that read the stream or write to it."""
        if self.matrix is not None:
            return rows @ self.matrix.mT
        if self.order is not None and self.sign is not None:
            return rows[..., self.order] * self.sign
        return rows

    def permute(self, gain: Tensor) -> Tensor:
        """A gain of a norm that stays, [dim]; signed permutations only."""
        return gain if self.order is None else gain[self.order]


# --- what maps read and write -----------------------------------------------------------------------------------------


def stored_gain(weights: ReadWeights, norm: Norm) -> Tensor | None:
    """The gain of a norm in float64, offset included."""
    return None if norm.weight is None else weights[norm.weight].double() + norm.offset


def stored_bias(weights: ReadWeights, norm: Norm) -> Tensor | None:
    """The bias of a norm in float64."""
    return None if norm.bias_name is None else weights[norm.bias_name].double()


@dataclass
class Reading:
    """What maps read, with the norm's numbers.

    Attributes:
        fold: how it is treated.
        gain, bias: of the norm, float64 [dim], or None.
        frame: of the residual stream.
    """

    fold: Fold
    gain: Tensor | None = None
    bias: Tensor | None = None
    frame: Frame = field(default_factory=Frame)

    @classmethod
    def of(cls, weights: ReadWeights, fold: Fold, frame: Frame | None = None) -> "Reading":
        """With the numbers of the norm as they are stored now."""
        norm, frame = fold.norm, Frame() if frame is None else frame
        if norm is None:
            return cls(fold, frame=frame)
        return cls(fold, stored_gain(weights, norm), stored_bias(weights, norm), frame)

    @property
    def scale(self) -> float:
        """What the gain of a norm of sums is divided by."""
        if not self.fold.scaled or self.gain is None:
            return 1.0
        size = self.gain.norm().item() / self.gain.numel() ** 0.5
        return size if size > 0 else 1.0

    def unseen(self) -> Tensor | None:
        """Orthonormal directions [n, dim] that a map behind a norm of sums cannot see."""
        if self.gain is None or self.fold.norm is None or self.fold.norm.kind != "layer":
            return None
        dead = self.gain == 0
        if dead.any():
            return torch.eye(dead.numel(), dtype=torch.float64, device=dead.device)[dead]
        inverse = self.gain.abs().amin() / self.gain
        return (inverse / inverse.norm())[None]

    def rows(self, rows: Tensor) -> Tensor:
        """The rows [..., dim] of a map, folded. Linear in them."""
        fold = self.fold
        if fold.kind == "before" and fold.norm is not None:
            constant = rows @ self.bias if fold.ones and self.bias is not None else None
            if self.gain is not None:
                rows = rows * self.gain
            if fold.norm.kind == "layer":
                rows = rows - rows.mean(dim=-1, keepdim=True)
            rows = self.frame.apply(rows)
            return rows if constant is None else rows + constant[..., None] / rows.shape[-1]
        if fold.kind == "after":
            unseen = self.unseen()
            if unseen is not None:
                rows = rows - (rows @ unseen.mT) @ unseen
            rows = rows * self.scale
        return self.frame.apply(rows)

    def constant(self, rows: Tensor) -> Tensor | None:
        """What is added to the bias [...] of a map with the unfolded rows [..., dim]. None: nothing."""
        fold = self.fold
        if self.bias is None or fold.ones or fold.kind == "kept":
            return None
        return rows @ self.bias

    def store(self, weights: Weights) -> None:
        """Write the norm as it is after folding."""
        norm, kind = self.fold.norm, self.fold.kind
        if norm is None:
            return
        if norm.weight is not None and self.gain is not None:
            if kind == "before":
                gain = torch.ones_like(self.gain)
            else:
                gain = self.frame.permute(self.gain) / self.scale
            weights[norm.weight] = gain - norm.offset
        if norm.bias_name is not None and self.bias is not None:
            if kind == "kept":
                weights[norm.bias_name] = self.frame.apply(self.bias)
            else:
                weights[norm.bias_name] = torch.full_like(self.bias, float(self.fold.ones))


@dataclass(frozen=True)
class Writing:
    """How what is written to the residual stream is treated.

    Attributes:
        centred: its mean is taken off.
        frame: of the residual stream.
        scale: it is divided by this.
    """

    centred: bool = False
    frame: Frame = field(default_factory=Frame)
    scale: float = 1.0

    def rows(self, rows: Tensor) -> Tensor:
        """Rows [..., dim], each of which is added to the stream with some weight. Linear in them."""
        if self.centred:
            rows = rows - rows.mean(dim=-1, keepdim=True)
        return self.frame.apply(rows) / self.scale


# --- a layer's attention ----------------------------------------------------------------------------------------------


@dataclass
class Heads:
    """The weights of one layer's attention in float64.

    Attributes:
        weights: by name (see `attention_maps`): [slices, width, other side of the map].
        biases: of those with a bias: [slices, width]; "output": [dim].
    """

    weights: dict[str, Tensor]
    biases: dict[str, Tensor]

    @classmethod
    def read(cls, weights: ReadWeights | Mapping[str, Tensor], attention: HeadLayout) -> "Heads":
        """As they are stored."""
        matrices: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        for name, part in attention_maps(attention).items():
            matrices[name] = part.heads(weights[part.weight]).double()
            if part.bias_name is not None:
                bias = weights[part.bias_name]
                biases[name] = (bias if part.side == "in" else part.head_biases(bias)).double()
        return cls(matrices, biases)

    def put(self, stored: Mapping[str, Tensor], attention: HeadLayout) -> None:
        """Write them into stored tensors, in place."""
        for name, part in attention_maps(attention).items():
            part.put_heads(stored[part.weight], self.weights[name])
            if part.bias_name is not None:
                bias = stored[part.bias_name]
                if part.side == "in":
                    bias.copy_(self.biases[name])
                else:
                    part.put_head_biases(bias, self.biases[name])

    def store(self, weights: Weights, attention: HeadLayout) -> None:
        """Write them: every tensor once."""
        parts = attention_maps(attention).values()
        names = {name: None for part in parts for name in (part.weight, part.bias_name) if name is not None}
        stored = {name: weights[name].clone() for name in names}
        self.put(stored, attention)
        for name, tensor in stored.items():
            weights[name] = tensor

    def fold(self, attention: HeadLayout, reading: Reading, writing: Writing) -> None:
        """Fold the norm that is read, and treat what is written, in place."""
        for name in stream_readers(attention):
            constant = reading.constant(self.weights[name])
            if constant is not None:
                self.biases[name] = self.biases[name] + constant
            self.weights[name] = reading.rows(self.weights[name])
        self.weights["output"] = writing.rows(self.weights["output"])
        if "output" in self.biases:
            bias = self.biases["output"]
            if reading.fold.kind == "after" and reading.bias is not None:
                bias = bias + reading.bias
            self.biases["output"] = writing.rows(bias)

    def fold_latents(self, attention: HeadLayout, weights: ReadWeights) -> None:
        """Fold the gains of the norms of latents into what reads them, in place."""
        for norm, names in latent_readers(attention).values():
            gain = stored_gain(weights, norm)
            if gain is not None:
                for name in names:
                    self.weights[name] = self.weights[name] * gain

    def fold_constants(self, attention: HeadLayout, ones: bool) -> Tensor | None:
        """Take out, in place, the constants of keys and values that count elsewhere or nowhere.

        The weights of attention sum to 1, so a constant in the values is one in the output: it goes into the output
        bias, if there is one. A constant in the keys adds the same to all scores of a query, which softmax does not
        see, except on coordinates that positions turn, behind a norm, or under a cap: elsewhere it is set to zero.

        Args:
            attention: the layout.
            ones: constants stand on the means of rows (see `Fold`).

        Returns:
            What was moved from the values to the output, [kv_heads, value_dim]; None: nothing could be.
        """
        turned, moved = attention.rotary_dim, None
        if "output" in self.biases and (ones or "value" in self.biases):
            constant = torch.zeros_like(self.weights["value"][..., 0])
            if "value" in self.biases:
                constant = self.biases["value"]
                self.biases["value"] = torch.zeros_like(constant)
            if ones:
                constant = constant + self.weights["value"].sum(dim=-1)
                self.weights["value"] = self.weights["value"] - self.weights["value"].mean(dim=-1, keepdim=True)
            by_query = constant.repeat_interleave(attention.group_size, dim=0)
            added = torch.einsum("hv,hvd->d", by_query, self.weights["output"])
            self.biases["output"] = self.biases["output"] + added
            moved = constant
        if attention.qk_norm is False and attention.soft_cap is None and turned < attention.head_dim:
            if "key" in self.biases:
                bias = self.biases["key"].clone()
                bias[:, turned:] = 0
                self.biases["key"] = bias
            if ones:
                key = self.weights["key"].clone()
                key[:, turned:] -= key[:, turned:].mean(dim=-1, keepdim=True)
                self.weights["key"] = key
        return moved


def unseen_constants(output: Tensor, kv_heads: int, centred: bool) -> Tensor | None:
    """Constants in the values that no output shows: orthonormal rows [n, kv_heads · value_dim].

    Where the values of all heads together are wider than the residual stream, some constants add up to nothing.

    Args:
        output: [num_heads, value_dim, dim].
        kv_heads: how many heads the values have.
        centred: the mean of the output does not count (it was taken off).

    Returns:
        None where every constant is seen.
    """
    summed = output.unflatten(0, (kv_heads, -1)).sum(dim=1).flatten(0, 1)
    seen = summed.shape[1] - centred
    if summed.shape[0] <= seen:
        return None
    left, values, _ = torch.linalg.svd(summed)
    rank = int((values > 1e-10 * values[0]).sum()) if values.numel() else 0
    return left[:, rank:].mT


def unseen_part(output: Tensor, constant: Tensor, centred: bool) -> Tensor | None:
    """The part of constants in the values that no output shows: without it they give the least.

    Args:
        output: [num_heads, value_dim, dim].
        constant: [kv_heads, value_dim].
        centred: as of `unseen_constants`.

    Returns:
        [kv_heads, value_dim], or None where every constant is seen.
    """
    kv_heads, size = len(constant), len(output) // len(constant)
    if constant.numel() <= output.shape[-1] - centred:
        return None
    basis, triangle = forms.triangle(output.unflatten(0, (kv_heads, size)).transpose(1, 2).flatten(2))
    rows = basis.mT.unflatten(2, (size, -1)).transpose(1, 2).flatten(0, 1)
    unseen = unseen_constants(rows, kv_heads, centred)
    if unseen is None:
        return None
    given = (triangle @ constant[..., None]).flatten()
    off = ((unseen @ given) @ unseen).view(*constant.shape, 1)
    return (torch.linalg.pinv(triangle) @ off)[..., 0]


def folded_heads(layout: ModelLayout, weights: Weights, layer: int) -> Heads:
    """The attention of a layer with norms folded and means taken off, in float64; nothing is written."""
    steps, attention = plan(layout).layers[layer], layout.layers[layer].attention
    heads = Heads.read(weights, attention)
    heads.fold(attention, Reading.of(weights, steps.attention), Writing(steps.attention_centred))
    heads.fold_latents(attention, weights)
    heads.fold_constants(attention, steps.attention.ones and attention.latent is None)
    return heads
