"""Between two layers in one form: the mean of what no gauge changes, and the way back into a model's own numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import forms
from ._align_attention import Scale, turned_in_place
from ._align_heads import AttentionForm, each_head, stacked, unstacked
from ._align_mlp import MLPForm, parts_of
from ._fold import Heads, Reading, latent_readers, stream_readers, unseen_constants
from ._unfold import Unfold, latent_gain, mean_of
from ._weights import ReadWeights
from .layout import MLP, HeadLayout


def mean_product(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], weight: float) -> tuple[Tensor, Tensor]:
    """The balanced factors of the best product of the same width to a mean of two products.

    (1 − t) A₁ᵀ A₂ + t B₁ᵀ B₂ is a product of width 2 k; it is cut to its k largest singular values, which no product of
    that width comes nearer to (Eckart and Young). No matrix as wide as the model is formed.

    Args:
        first: A₁ and B₁, [heads, k, columns]; complex where a product is of first ᵀ and the conjugate of second.
        second: A₂ and B₂, [heads, k, other columns].
        weight: t, from 0 to 1.
    """
    factors = []
    for a, b in (first, second):
        both = torch.cat([(1 - weight) ** 0.5 * a, weight**0.5 * b], dim=-2)
        missing = both.shape[-2] - both.shape[-1]
        factors.append((torch.nn.functional.pad(both, (0, max(missing, 0))), both.shape[-1]))
    (q_first, r_first), (q_second, r_second) = (torch.linalg.qr(both.mT) for both, _ in factors)
    u, values, vh = torch.linalg.svd(r_first @ r_second.mH)
    width = first[0].shape[-2]
    root = values[..., :width].sqrt()[..., None]
    new = (
        root * (q_first @ u[..., :width]).mT[..., : factors[0][1]],
        root * (q_second @ vh.mH[..., :width]).mT[..., : factors[1][1]],
    )
    return new


def _turned_products(attention: HeadLayout, a: AttentionForm, b: AttentionForm, weight: float) -> dict[str, Tensor]:
    groups, number, rotated = attention.num_kv_heads, attention.num_heads, attention.rotary_dim
    query = [stacked(form.heads["query"], groups) for form in (a, b)]
    key = [form.heads["key"] for form in (a, b)]
    new_query, new_key = torch.empty_like(query[0]), torch.empty_like(key[0])
    if rotated:
        assert attention.rotary is not None
        planes = attention.rotary.planes()
        one, two = ((rows[0][:, :rotated], rows[1][:, :rotated]) for rows in (query, key))
        new_query[:, :rotated], new_key[:, :rotated] = _mean_of_planes(one, two, planes, weight)
    if rotated < attention.head_dim:
        one, two = ((rows[0][:, rotated:], rows[1][:, rotated:]) for rows in (query, key))
        new_query[:, rotated:], new_key[:, rotated:] = mean_product(one, two, weight)
    return {"query": unstacked(new_query, groups, number), "key": new_key}


def _mean_of_planes(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], planes: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """`mean_product` of every plane by itself."""

    def plane_rows(rows: Tensor) -> Tensor:
        return forms.to_planes(rows, planes)[..., None, :]

    one, two = ((plane_rows(rows[0]), plane_rows(rows[1])) for rows in (first, second))
    new = mean_product(one, two, weight)
    return forms.from_planes(new[0][..., 0, :], planes), forms.from_planes(new[1][..., 0, :], planes)


def blend_attention(a: AttentionForm, b: AttentionForm, weight: float, using: str) -> AttentionForm:
    """Between the attention of a and that of b, which is matched with it and in its frame.

    Args:
        weight: of b, from 0 to 1.
        using: in the full gauge products are averaged and cut to the width of a head; otherwise the factors are.
    """
    if weight == 1:
        return replace(a, heads=b.heads, output_bias=b.output_bias, gains=b.gains)

    def between(x: Tensor, y: Tensor) -> Tensor:
        return (1 - weight) * x + weight * y

    attention, products = a.attention, ()
    if using == "gauge":
        products = ("value", "output", *(("query", "key") if attention.qk_norm is False else ()))
    heads = {name: between(rows, b.heads[name]) for name, rows in a.heads.items() if name not in products}
    bias = None if a.output_bias is None or b.output_bias is None else between(a.output_bias, b.output_bias)
    gains = None
    if a.gains is not None and b.gains is not None:
        gains = between(a.gains[0], b.gains[0]), between(a.gains[1], b.gains[1])
    if using != "gauge":
        return replace(a, heads=heads, output_bias=bias, gains=gains)
    groups, number = attention.num_kv_heads, attention.num_heads
    if attention.qk_norm is False:
        heads |= _turned_products(attention, a, b, weight)
    if attention.latent is not None:
        query = stacked(a.heads["rotary_query"], 1), stacked(b.heads["rotary_query"], 1)
        key = a.heads["rotary_key"], b.heads["rotary_key"]
        first, second = _mean_of_planes(query, key, attention.latent.rotary.planes(), weight)
        heads |= {"rotary_query": unstacked(first, 1, number), "rotary_key": second}
    outputs, values = (a.heads["output"], b.heads["output"]), (a.heads["value"], b.heads["value"])
    one, two = mean_product(values, (stacked(outputs[0], groups), stacked(outputs[1], groups)), weight)
    heads |= {"value": one, "output": unstacked(two, groups, number)}
    new = replace(a, heads=heads, output_bias=bias, gains=gains)
    latents = {name: torch.eye(heads[name].shape[1], dtype=torch.float64) for name in latent_readers(attention)}
    return new.moved_by(turned_in_place(a, new, latents, Scale.of(a, new)))


def blend_mlp(a: MLPForm, b: MLPForm, weight: float) -> MLPForm:
    """Between a feed-forward layer and another that is matched with it: the mean of every row."""

    def between(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return None if x is None or y is None else y if weight == 1 else (1 - weight) * x + weight * y

    rows = {name: between(values, b.rows[name]) for name, values in a.rows.items()}
    return replace(
        a,
        rows={name: values for name, values in rows.items() if values is not None},
        slope=between(a.slope, b.slope),
        down_bias=between(a.down_bias, b.down_bias),
    )


# --- the way back -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Back:
    """How what is in form goes back into the numbers of a model.

    Attributes:
        reading: the norm that is read, of the model.
        unfold: how it is put back.
        scale: what is divided out of what is written.
        centred: what is written counts only up to its mean.
        using: see `AttentionForm.of`.
        weights: of the model, in float64.
    """

    reading: Reading
    unfold: Unfold
    scale: float
    centred: bool
    using: str
    weights: ReadWeights

    def written_bias(self, bias: Tensor, own: Tensor, unfold: Unfold) -> Tensor:
        """An output bias [dim] as it is stored, from one in the scale of the model, with the mean of its own."""
        if unfold.fold.kind == "after" and unfold.bias is not None:
            bias = bias - unfold.bias
        return mean_of(bias - bias.mean() if self.centred else bias, own, self.centred)


@dataclass
class HeadsBack:
    """Heads of a layer on their way back.

    Attributes:
        attention: their layout.
        back: how they go.
        heads: their rows, in the gauge of the model but for the norm that is read.
        raw: those that the model stores.
        constants: map -> [slices, width]: what it is to give to a constant input.
        chosen: [G, V]: what the values give to it now, where that could be chosen; None: it could not.
        output_bias: [dim], what they add to the output bias, or None.
        norms: tensors of norms of queries, keys and latents.
    """

    attention: HeadLayout
    back: Back
    heads: Heads
    raw: Heads
    constants: dict[str, Tensor] = field(default_factory=dict)
    chosen: Tensor | None = None
    output_bias: Tensor | None = None
    norms: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, own: Mapping[str, Tensor], a: AttentionForm, new: AttentionForm, back: Back, notes: list[str]
    ) -> "HeadsBack":
        """On their way.

        Args:
            own: the stored tensors into whose gauge they go.
            a: the form of these.
            new: what goes back, in the same form and order.
            back: how.
            notes: hears what cannot be put back.
        """
        attention, heads = new.attention, Heads({}, {})
        for name, rows in new.heads.items():
            rows = each_head(a.back[name], len(rows)) @ rows
            if name in new.biased:
                rows, heads.biases[name] = rows[..., :-1], rows[..., -1]
            heads.weights[name] = rows
        found = cls(attention, back, heads, Heads.read(own, attention), output_bias=new.output_bias)
        if new.gains is not None and a.gain_left is not None and isinstance(attention.qk_norm, tuple):
            for norm, gain, left in zip(attention.qk_norm, new.gains, a.gain_left):
                assert norm.weight is not None
                found.norms[norm.weight] = (gain / left).flatten() - norm.offset
        if back.using == "permutation":
            return found
        size = a.size * back.scale
        heads.weights["output"] = heads.weights["output"] * size
        found.output_bias = None if new.output_bias is None else new.output_bias * size
        for norm, readers in latent_readers(attention).values():
            gain = latent_gain(back.weights, norm, notes)
            if gain is not None:
                heads.weights |= {reader: heads.weights[reader] / gain for reader in readers}
            if norm.weight is not None:
                width = heads.weights[readers[0]].shape[-1]
                found.norms[norm.weight] = (torch.ones(width).double() if gain is None else gain) - norm.offset
        found._choose_constants()
        if found.output_bias is not None and found.chosen is not None:
            by_query = found.chosen.repeat_interleave(attention.group_size, dim=0)
            found.output_bias = found.output_bias - torch.einsum("hv,hvd->d", by_query, heads.weights["output"])
        return found

    @property
    def _ones(self) -> bool:
        """Whether constants of the maps that read the stream stand on their means."""
        fold, reading = self.back.unfold.fold, self.back.reading
        return fold.ones and self.attention.latent is None and reading.bias is not None

    def _own_constants(self, name: str) -> Tensor | None:
        """[slices, width]: what a map of the model gives to a constant input."""
        rows, constant, back = self.raw.weights[name], self.raw.biases.get(name), self.back
        if name not in stream_readers(self.attention):
            return constant
        if back.unfold.fold.ones and back.reading.bias is not None:
            return rows @ back.reading.bias
        added = back.unfold.constant(rows)
        return constant if added is None or constant is None else constant + added

    def _choose_constants(self) -> None:
        """Constants of keys and values where the model has them, as far as that is free."""
        attention, heads, wanted = self.attention, self.heads, self.constants
        rotated = attention.rotary_dim
        for name in ("key", "value"):
            if self._ones:
                wanted[name] = heads.weights[name].sum(dim=-1)
            elif name in heads.biases:
                wanted[name] = heads.biases[name]
        own = {name: self._own_constants(name) for name in wanted}
        free_keys = attention.qk_norm is False and attention.soft_cap is None and rotated < attention.head_dim
        if free_keys and "key" in wanted and own["key"] is not None:
            wanted["key"] = torch.cat([wanted["key"][:, :rotated], own["key"][:, rotated:]], dim=1)
        if "value" not in wanted or own["value"] is None:
            return
        if self.output_bias is not None:
            self.chosen = wanted["value"] = own["value"]
            return
        unseen = unseen_constants(heads.weights["output"], attention.num_kv_heads, self.back.centred)
        if unseen is not None:
            off = (own["value"] - wanted["value"]).flatten()
            self.chosen = wanted["value"] = wanted["value"] + ((unseen @ off) @ unseen).view_as(own["value"])

    def readers(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """What reads the norm, as of `Unfold.carries`."""
        for name in stream_readers(self.attention):
            yield self.heads.weights[name], self.raw.weights[name], self.constants.get(name) if self._ones else None

    def put(self, tensors: Mapping[str, Tensor], unfold: Unfold) -> None:
        """Write them as they are stored, in place, but for the output bias; ``unfold``: the norm as it is put back."""
        attention, heads, raw = self.attention, self.heads, self.raw
        if self.back.using != "permutation":
            for name, piece in zip(stream_readers(attention), self.readers()):
                rows = unfold.rows(*piece)
                constant = unfold.constant(rows)
                heads.weights[name] = rows
                if name in heads.biases:
                    total = self.constants.get(name, heads.biases[name])
                    heads.biases[name] = total if constant is None else total - constant
            for name in ("key", "value"):  # readers of a latent, whose constants are their biases
                if name not in stream_readers(attention) and name in heads.biases:
                    heads.biases[name] = self.constants[name]
            heads.weights["output"] = mean_of(heads.weights["output"], raw.weights["output"], self.back.centred)
        if "output" in raw.biases:
            heads.biases["output"] = raw.biases["output"]
        heads.put(tensors, attention)


def mlp_tensors(
    mlp: MLP,
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    features: slice,
    a: MLPForm,
    new: MLPForm,
    back: Back,
) -> dict[str, Tensor]:
    """Put hidden features of a feed-forward layer or expert as they are stored into its tensors, in place.

    Args:
        mlp: the layer or expert.
        own: the tensors into whose gauge they go; of a stack, the matrix of this expert alone.
        tensors: of the same names, to be written; a matrix may be the same tensor, for only these features are read.
        features: which those are of which there are forms.
        a, new: the form of these tensors, and what goes back.
        back: how.

    Returns:
        The factors [features] with which they went back, of each map.
    """
    factors, slope = a.back(new.slope)
    unfold, size = back.unfold, a.size * back.scale
    for name, part in parts_of(mlp).items():
        rows, bias = new.rows[name] * factors[name][:, None], None
        raw = part.heads(own[part.weight])[0][features].double()
        if name in new.biased:
            rows, bias = rows[:, :-1], rows[:, -1]
        if back.using != "permutation":
            if name == "down":
                rows = mean_of(rows * size, raw, back.centred)
            else:
                rows = unfold.rows(rows, raw)
                constant = unfold.constant(rows)
                bias = bias if bias is None or constant is None else bias - constant
        target = tensors[part.weight]
        part.heads(target)[0][features] = rows.to(target.dtype)
        if bias is not None and part.bias_name is not None:
            part.head_biases(tensors[part.bias_name])[0][features] = bias
    if mlp.down.bias_name is not None and new.down_bias is not None:
        bias, stored = new.down_bias, own[mlp.down.bias_name]
        bias = bias if back.using == "permutation" else back.written_bias(bias * size, stored, unfold)
        tensors[mlp.down.bias_name].copy_(bias)
    if mlp.slope is not None and slope is not None:
        tensors[mlp.slope][features] = slope
    return factors


def mlp_pieces(
    mlp: MLP, own: Mapping[str, Tensor], features: slice, a: MLPForm, new: MLPForm
) -> Iterator[tuple[Tensor, Tensor, None]]:
    """What reads a norm, as of `Unfold.carries`; arguments as of `mlp_tensors`."""
    factors, _ = a.back(new.slope)
    for name, part in parts_of(mlp).items():
        if name != "down":
            rows = new.rows[name][:, :-1] if name in new.biased else new.rows[name]
            yield rows * factors[name][:, None], part.heads(own[part.weight])[0][features].double(), None
