"""What the weights of a transformer come to, with the part that no output shows left out.

A norm is N(x) = x / rms(x), behind a projection that takes the mean off (P, of layer norms only), before a gain γ and a
bias β. So a map W, b that reads a norm comes to (W γ P) n + (b + W β) of n = N(P x), whatever the gain. Here a reading
map is its rows over n with that constant as one more column. A writing map loses the mean that layer norms would take
off, and is measured in units of the residual stream, whose scale the next norm takes out (eps is taken as 0). The value
biases, which attention passes on whole, are counted with the output bias. The key bias is left out where softmax cannot
see it: on coordinates that positions do not turn, without a soft cap and without QK-norm.

Scores are then sums of products of two factors, one of a query row and one of a key row, which are what is invariant:

    plain coordinates       qᵀ k                   real, over all plain coordinates of a head
    a rotary plane          q̄ kᵀ                   complex of rank one: its two rows are real and imaginary part
    with QK-norm            those of the rows with their gains, over the sizes of query and key, and qᵀ q and kᵀ k
    latent attention        those of the maps composed with the one that makes the latent, and latentᵀ latent

All numbers are float64. Shape suffixes: H query heads, G key/value heads, K width of a query, V width of a value, P
rotary planes, D width of the residual stream, E = D + 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .layout import MLP, Experts, HeadLayout, Layer, ModelLayout, Norm, Projection

CHUNK = 1 << 24  # numbers of a table in float64 at a time
_CLEAR = 1e-6  # square of a relative difference that squares and inner products give to nine digits


class Reads(Protocol):
    """A thing that tensors are read from by name."""

    def __contains__(self, name: str) -> bool: ...
    def __getitem__(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Rows:
    """Rows of an effective map, and how large the numbers were that each row was made of.

    Attributes:
        values: [.., rows, D or E].
        sizes: [.., rows]: at least the norms of the rows; larger where parts cancel.
    """

    values: Tensor
    sizes: Tensor

    def __getitem__(self, index: Tensor) -> "Rows":
        return Rows(self.values[:, index], self.sizes[:, index])

    def __truediv__(self, number: Tensor | float) -> "Rows":
        return Rows(self.values / number, self.sizes / number)

    def of_heads(self, heads: Tensor) -> "Rows":
        """Some of the heads, in an order."""
        return Rows(self.values[heads], self.sizes[heads])


@dataclass(frozen=True)
class Pair:
    """Two factors of a product: [heads, (planes,) width, columns] each; the left one is conjugated if complex."""

    left: Rows
    right: Rows

    def of_heads(self, heads: Tensor) -> "Pair":
        """Some of the heads, in an order."""
        return Pair(self.left.of_heads(heads), self.right.of_heads(heads))

    def rounding(self) -> Tensor:
        """[heads]: square of the product's error if every number is off by one part, at random."""
        return (self.left.sizes * self.right.sizes).square().flatten(1).sum(1)


@dataclass(frozen=True)
class Heads:
    """The invariants of one attention layer.

    Attributes:
        scores: the pairs of all H query heads that make the scores, by name.
        norms: with QK-norm, the pairs whose products are the squares of sizes of queries and keys.
        values: pairs of all query heads that take a normalised token to what is written for it.
        layer: pairs of the whole layer [1, ..]: latents, and QK-norms over all heads.
        constant: [D]: what the layer writes for any token.
        constant_rounding: square of its error, if every number is off by one part.
        spectra: [G, K] and [G, V]: singular values of the products of queries and keys (of a rotary plane: its size)
            and of values and outputs, those of a group together, descending.
        unit: what outputs were divided by.
    """

    scores: dict[str, Pair]
    norms: dict[str, Pair]
    values: Pair
    layer: dict[str, Pair]
    constant: Tensor
    constant_rounding: Tensor
    spectra: tuple[Tensor, Tensor]
    unit: float


@dataclass(frozen=True)
class Neurons:
    """The invariants of one feed-forward layer, a row a hidden neuron.

    Attributes:
        up, gate, down: reading and writing rows; up and down are balanced where a scale goes through the neuron.
        constant: [D]: what is written for any token.
        constant_rounding: as of `Heads`.
        slope: [rows], learned slopes of the activation.
    """

    up: Rows
    gate: Rows | None
    down: Rows
    constant: Tensor
    constant_rounding: Tensor
    slope: Tensor | None


class Effective:
    """Effective maps of a model.

    Args:
        layout: of the model.
        weights: its tensors.
        rows: how many rows of each embedding count, of tokens and of the others in their order; None: all.
    """

    def __init__(self, layout: ModelLayout, weights: Reads, rows: Sequence[int] | None = None) -> None:
        self.layout, self.weights = layout, weights
        names = (layout.token_embedding, *layout.other_embeddings)
        sizes = (layout.vocab_size, *layout.other_embeddings.values()) if rows is None else rows
        self.num_rows = dict(zip(names, sizes))
        self.vocabulary = self.num_rows[layout.token_embedding]
        self.frame: Tensor | None = None  # [D, D]: rows of this model times it are rows of the other
        # The norms that stand in the stream itself, in front of each branch.
        self.stream: list[tuple[Norm | None, Norm | None]] = []
        previous = layout.embedding_norm
        for layer in layout.layers:
            before = previous
            previous = layer.attention_sum_norm or previous
            self.stream.append((before, previous))
            previous = layer.mlp_sum_norm or previous
        self.last = previous
        readers = [norm for layer in layout.layers for norm in (layer.attention_norm, layer.mlp_norm)]
        readers.append(layout.final_norm)
        self.centred = all(norm is not None and norm.kind == "layer" for norm in readers)
        self.has_logits = layout.tied or layout.unembedding is not None
        self.pre_norm = all(norm is not None for norm in readers) and layout.embedding_norm is None
        # No gain stands in the stream, so that it may be turned as a whole.
        self.turns = self.pre_norm and not any(
            layer.attention_out_norm or layer.mlp_out_norm or layer.attention_sum_norm or layer.mlp_sum_norm
            for layer in layout.layers
        )
        start = layout.embedding_norm
        self.table_centred = self.centred if start is None else start.kind == "layer"
        self.means: dict[str, Tensor] = {}
        if layout.other_embeddings:
            for name in (layout.token_embedding, *layout.other_embeddings):
                total = sum((chunk.sum(0) for chunk in self._chunks(name)), torch.zeros(layout.dim).double())
                self.means[name] = total / self.num_rows[name]
        size = sum(float(chunk.square().sum()) for chunk in self._table_chunks(layout.token_embedding))
        self.table_scale = (size / self.num_rows[layout.token_embedding] / layout.dim) ** 0.5 or 1.0
        self.scale = self.table_scale if start is None else self._rms(self.gain(start))

    # --- vectors ----------------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        """A tensor in float64, on the CPU.

        Raises:
            ValueError: it holds numbers that are not finite.
        """
        return finite(self.weights[name].detach().to("cpu", torch.float64), name)

    def matrix(self, part: Projection) -> Tensor:
        """The matrix of a map, as `tensor`; of a stack, no more than that."""
        return finite(part.matrix(self.weights[part.weight]).detach().to("cpu", torch.float64), part.weight)

    def gain(self, norm: Norm | None) -> Tensor:
        """[D]: of a norm of the residual stream, ones without one."""
        if norm is None or norm.weight is None:
            return torch.ones(self.layout.dim, dtype=torch.float64)
        return self.tensor(norm.weight) + norm.offset

    def bias(self, norm: Norm | None) -> Tensor:
        """[D]: of a norm, zeros without one."""
        if norm is None or norm.bias_name is None:
            return torch.zeros(self.layout.dim, dtype=torch.float64)
        return self.tensor(norm.bias_name)

    @staticmethod
    def _rms(vector: Tensor) -> float:
        return float(vector.square().mean().sqrt()) or 1.0

    def _projection_bias(self, projection: Projection) -> Tensor | None:
        return None if projection.bias_name is None else self.tensor(projection.bias_name)

    def in_frame(self, rows: Tensor) -> Tensor:
        """Rows [.., D or E] in the frame of the other model."""
        if self.frame is None:
            return rows
        dim = self.layout.dim
        return torch.cat([rows[..., :dim] @ self.frame, rows[..., dim:]], dim=-1)

    # --- tables -----------------------------------------------------------------------------------------------------

    def _chunks(self, name: str) -> Iterator[Tensor]:
        table, step = self.weights[name], max(1, CHUNK // self.layout.dim)
        rows = self.num_rows[name]
        for first in range(0, rows, step):
            yield finite(table[first : min(first + step, rows)].detach().to("cpu", torch.float64), name)

    def _table_chunks(self, name: str) -> Iterator[Tensor]:
        for chunk in self._chunks(name):
            if name in self.means:
                chunk = chunk - self.means[name]
            yield chunk - chunk.mean(-1, keepdim=True) if self.table_centred else chunk

    def table(self, name: str) -> Iterator[Rows]:
        """Row chunks of an embedding, as the stream sees it."""
        for raw, chunk in zip(self._chunks(name), self._table_chunks(name)):
            sizes = raw.norm(dim=-1) / self.table_scale
            yield Rows(self.in_frame(chunk / self.table_scale), sizes)

    def table_offset(self) -> Rows | None:
        """The mean over all tables together, where a constant may go from one to the other."""
        if not self.means:
            return None
        total = torch.stack(list(self.means.values()))
        mean = total.sum(0)
        size = total.norm(dim=-1).sum() / self.table_scale
        mean = mean - mean.mean() if self.table_centred else mean
        return Rows(self.in_frame(mean / self.table_scale)[None], size[None])

    def output_table(self) -> Iterator[Rows]:
        """Row chunks of the map to the logits, over the last norm; less what softmax does not see."""
        layout, norm = self.layout, self.layout.final_norm or self.last
        gain, shift = self.gain(norm), self.bias(norm)
        centred = norm is not None and norm.kind == "layer"
        unembedding = layout.unembedding
        step = max(1, CHUNK // layout.dim)
        biases = torch.zeros(self.vocabulary, dtype=torch.float64)
        if unembedding is None:
            weight = self.weights[layout.token_embedding]
        else:
            weight = unembedding.heads(self.weights[unembedding.weight])[0]
            stored = self._projection_bias(unembedding)
            if stored is not None:
                biases = unembedding.head_biases(stored)[0][: self.vocabulary]

        def chunks() -> Iterator[tuple[Tensor, Tensor]]:
            for first in range(0, self.vocabulary, step):
                last = min(first + step, self.vocabulary)
                raw = finite(weight[first:last].detach().to("cpu", torch.float64), "the unembedding")
                constant = biases[first:last] + raw @ shift
                scaled = raw * gain
                sizes = (scaled.square().sum(-1) + (biases[first:last].abs() + raw.abs() @ shift.abs()).square()).sqrt()
                scaled = scaled - scaled.mean(-1, keepdim=True) if centred else scaled
                yield torch.cat([scaled, constant[:, None]], dim=-1), sizes

        mean = torch.zeros(layout.dim + 1, dtype=torch.float64)
        if layout.soft_cap is None:
            mean = sum((values.sum(0) for values, _ in chunks()), mean) / self.vocabulary
        for values, sizes in chunks():
            yield Rows(self.in_frame(values - mean), sizes)

    # --- maps that read and write ----------------------------------------------------------------------------------

    def read(self, projection: Projection, norm: Norm | None) -> Rows:
        """A reading map over a norm of the residual stream: [heads, width, E]."""
        weight = projection.heads(self.matrix(projection))
        stored = self._projection_bias(projection)
        bias = weight.new_zeros(weight.shape[:2]) if stored is None else projection.head_biases(stored)
        shift = self.bias(norm)
        scaled = weight * self.gain(norm)
        sizes = (scaled.square().sum(-1) + (bias.abs() + weight.abs() @ shift.abs()).square()).sqrt()
        if norm is not None and norm.kind == "layer":
            scaled = scaled - scaled.mean(-1, keepdim=True)
        return Rows(self.in_frame(torch.cat([scaled, (bias + weight @ shift)[..., None]], dim=-1)), sizes)

    def _read_latent(self, projection: Projection, norm: Norm, latent: Rows) -> Rows:
        """A map that reads a normalised latent, composed with the one that makes it, whose size the norm takes out.

        Over n and the constant of the latent, with the constant of the map itself as the last column: [heads, width,
        E + 1].
        """
        weight = projection.heads(self.tensor(projection.weight))
        gain = weight.new_ones(weight.shape[-1]) if norm.weight is None else self.tensor(norm.weight) + norm.offset
        stored = self._projection_bias(projection)
        constant = weight.new_zeros(weight.shape[:2]) if stored is None else projection.head_biases(stored)
        if norm.bias_name is not None:
            constant = constant + weight @ self.tensor(norm.bias_name)
        made, size, scaled = latent.values[0], latent.values.norm(), weight * gain
        values = torch.cat([scaled @ (made / size), constant[..., None]], dim=-1)
        sizes = (scaled.square() @ latent.sizes[0].square()).sqrt() / size
        return Rows(values, torch.maximum(sizes, values.norm(dim=-1)))

    def write_scale(self, number: int, branch: int) -> float:
        """Unit of what a branch (0 attention, 1 feed-forward) writes."""
        layer = self.layout.layers[number]
        sum_norm = (layer.attention_sum_norm, layer.mlp_sum_norm)[branch]
        return self.scale if sum_norm is None else self._rms(self.gain(self.stream[number][branch]))

    def _write(self, values: Tensor, layer: Layer, branch: int) -> Tensor:
        """Rows [.., D] of what a branch writes, before its size, without what the next norm takes off."""
        sum_norm = (layer.attention_sum_norm, layer.mlp_sum_norm)[branch]
        out_norm = (layer.attention_out_norm, layer.mlp_out_norm)[branch]
        if out_norm is not None:
            values = values - values.mean(-1, keepdim=True) if out_norm.kind == "layer" else values
            return values * torch.where(self.gain(out_norm) < 0, -1.0, 1.0).double()
        if self.centred if sum_norm is None else sum_norm.kind == "layer":
            return values - values.mean(-1, keepdim=True)
        return values

    def gains(self, number: int, branch: int) -> Tensor | None:
        """[rows, D]: the gains and biases of a branch that no map takes in; None where there are none."""
        layer = self.layout.layers[number]
        sum_norm = (layer.attention_sum_norm, layer.mlp_sum_norm)[branch]
        out_norm = (layer.attention_out_norm, layer.mlp_out_norm)[branch]
        rows = []
        if out_norm is not None:
            bias = self.bias(out_norm)
            bias = bias - bias.mean() if self.centred else bias
            frame = None if self.frame is None else self.frame.abs()
            gain = self.gain(out_norm).abs()
            rows += [gain if frame is None else gain @ frame, self.in_frame(bias)]
        elif sum_norm is not None:
            gain = self.gain(self.stream[number][branch])
            rows.append(gain if self.frame is None else gain @ self.frame.abs())
        return torch.stack(rows) / self.write_scale(number, branch) if rows else None

    def embedding_gains(self) -> Tensor | None:
        """[2, D]: gain and bias of a norm of the embeddings in front of pre-norm layers; None without one."""
        norm = self.layout.embedding_norm
        if norm is None or any(layer.attention_sum_norm for layer in self.layout.layers):
            return None
        bias = self.bias(norm)
        return torch.stack([self.gain(norm), bias - bias.mean() if self.centred else bias]) / self.scale

    def output_gains(self) -> Tensor | None:
        """[2, D]: gain and bias of the last norm, where hidden states are the output."""
        if self.has_logits:
            return None
        norm = self.layout.final_norm or self.last
        return torch.stack([self.gain(norm), self.bias(norm)])

    # --- attention ----------------------------------------------------------------------------------------------------

    def heads(self, number: int) -> Heads:
        """The invariants of an attention layer."""
        layer = self.layout.layers[number]
        attention = layer.attention
        norm = layer.attention_norm or self.stream[number][0]
        query, key, value, whole = self._queries_keys_values(attention, norm)
        scores: dict[str, Pair] = {}
        norms: dict[str, Pair] = {}
        if attention.qk_norm:
            query, key = self._normalised(attention, query, key, norms, whole)
        groups = torch.arange(attention.num_heads) // attention.group_size
        rotary = attention.rotary
        first_plain = attention.rotary_dim
        spectrum: list[Tensor] = []
        for name, turned_query, turned_key in self._turned(attention, norm, query, key):
            pair = Pair(turned_query, turned_key.of_heads(groups % len(turned_key.values)))
            scores[name] = pair
            stacked = turned_query.values.abs().square().sum((-2, -1)).unflatten(0, (attention.num_kv_heads, -1)).sum(1)
            spectrum.append((stacked * turned_key.values.abs().square().sum((-2, -1))).sqrt())
        if first_plain < attention.head_dim:
            plain = torch.arange(attention.head_dim)
            if rotary is not None:
                plain = plain[~torch.isin(plain, rotary.planes().flatten())]
            plain_query, plain_key = query[plain], key[plain]
            if attention.soft_cap is None and not attention.qk_norm:
                values = plain_key.values.clone()
                values[..., -1] = 0
                plain_key = Rows(values, plain_key.sizes)
            pair = Pair(plain_query, plain_key.of_heads(groups))
            scores["plain"] = pair
            spectrum.append(self._singular_values(plain_query.values, plain_key.values, attention.num_kv_heads))
        outputs = attention.output.heads(self.tensor(attention.output.weight))
        sizes = outputs.norm(dim=-1)
        written = self._write(outputs, layer, 0)
        constant_rows = torch.einsum("hvd,hv->hd", written, value.values[groups][..., -1])
        bias = self._projection_bias(attention.output)
        sum_norm = layer.attention_sum_norm
        shifts = [] if bias is None else [bias]
        if sum_norm is not None:
            shifts.append(self.bias(self.stream[number][0]))
        if layer.parallel and layer.mlp is not None and layer.mlp_out_norm is None:
            down = self._projection_bias(layer.mlp.down)
            shifts += [] if down is None else [down]  # the two branches write at one place
        constant = constant_rows.sum(0)
        for shift in shifts:
            constant = constant + self._write(shift, layer, 0)
        value_sizes = value.sizes[groups]
        error = (sizes.square() * value_sizes.square()).sum() + sum(shift.square().sum() for shift in shifts)
        plain_values = value.values[groups].clone()
        plain_values[..., -1] = 0
        values = Pair(Rows(self.in_frame(written), sizes), Rows(plain_values, value_sizes))
        if layer.attention_out_norm is not None:
            unit = float((product_sizes(values).sum() + constant.square().sum()).sqrt()) or 1.0
        else:
            unit = self.write_scale(number, 0)
        values = Pair(values.left / unit, values.right)
        spectra = (
            torch.cat(spectrum, dim=-1).sort(dim=-1, descending=True).values,
            self._singular_values(values.left.values, value.values[..., :-1], attention.num_kv_heads),
        )
        return Heads(scores, norms, values, whole, self.in_frame(constant / unit), error / unit**2, spectra, unit)

    def _queries_keys_values(
        self, attention: HeadLayout, norm: Norm | None
    ) -> tuple[Rows, Rows, Rows, dict[str, Pair]]:
        latent = attention.latent
        if latent is None:
            return (
                self.read(attention.query, norm),
                self.read(attention.key, norm),
                self.read(attention.value, norm),
                {},
            )
        kv = self.read(latent.kv_latent, norm)
        whole = {"latent of keys": self._gram(kv)}
        if latent.query_latent is None or latent.query_norm is None:
            query = self.read(attention.query, norm)
        else:
            made = self.read(latent.query_latent, norm)
            whole["latent of queries"] = self._gram(made)
            query = self._read_latent(attention.query, latent.query_norm, made)
        key = self._read_latent(attention.key, latent.kv_norm, kv)
        value = self._read_latent(attention.value, latent.kv_norm, kv)
        return query, key, value, whole

    @staticmethod
    def _gram(rows: Rows) -> Pair:
        unit = rows.values.norm()
        flat = Rows(rows.values.flatten(0, -2)[None], rows.sizes.flatten()[None]) / unit
        return Pair(flat, flat)

    def _normalised(
        self,
        attention: HeadLayout,
        query: Rows,
        key: Rows,
        norms_of_heads: dict[str, Pair],
        whole: dict[str, Pair],
    ) -> tuple[Rows, Rows]:
        """Queries and keys over their sizes, with gains, for scores; their Gram matrices go into the mappings."""
        groups = torch.arange(attention.num_heads) // attention.group_size
        norms = (None, None) if isinstance(attention.qk_norm, bool) else attention.qk_norm
        results = []
        for name, rows, norm in (("query", query, norms[0]), ("key", key, norms[1])):
            if attention.qk_norm_over == "head":
                unit = rows.values.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)[:, None]
                rows = Rows(rows.values / unit[..., None], rows.sizes / unit)
                every = rows if name == "query" else rows.of_heads(groups)
                norms_of_heads[name] = Pair(every, every)
            else:
                whole[f"norm of {name}"] = self._gram(rows)
                rows = rows / rows.values.norm()
            if norm is not None and norm.weight is not None:
                gain = self.tensor(norm.weight) + norm.offset
                gain = gain.view(-1, rows.values.shape[-2])
                rows = Rows(rows.values * gain[..., None], rows.sizes * gain.abs())
            results.append(rows)
        return results[0], results[1]

    def _turned(
        self, attention: HeadLayout, norm: Norm | None, query: Rows, key: Rows
    ) -> Iterator[tuple[str, Rows, Rows]]:
        """Rotary parts of queries and keys as complex rows [heads, planes, 1, E]."""
        if attention.rotary is not None and attention.rotary.dim:
            planes = attention.rotary.planes()
            yield "rotary", _complex(query, planes), _complex(key, planes)
        latent = attention.latent
        if latent is not None:
            planes = latent.rotary.planes()
            if latent.query_latent is None or latent.query_norm is None:
                rotary_query = self.read(latent.rotary_query, norm)
            else:
                q = self.read(latent.query_latent, norm)
                rotary_query = self._read_latent(latent.rotary_query, latent.query_norm, q)
            yield "rotary", _complex(rotary_query, planes), _complex(self.read(latent.rotary_key, norm), planes)

    @staticmethod
    def _singular_values(left: Tensor, right: Tensor, groups: int) -> Tensor:
        """[G, width]: of the product of the left factors of a group, side by side, with the right one."""
        stacked = left.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
        first = torch.linalg.qr(stacked.mT, mode="r").R
        second = torch.linalg.qr(right.mT, mode="r").R
        return torch.linalg.svdvals(first @ second.mT)

    # --- feed-forward layers -----------------------------------------------------------------------------------------

    def neurons(self, number: int, mlp: MLP) -> Neurons:
        """The invariants of a feed-forward layer, or of one of a mixture of experts."""
        layer = self.layout.layers[number]
        norm = layer.mlp_norm or self.stream[number][1]
        up = self.read(mlp.up, norm)
        gate = None if mlp.gate is None else self.read(mlp.gate, norm)
        raw = mlp.down.heads(self.matrix(mlp.down))
        sizes = raw.norm(dim=-1)
        down = Rows(self._write(raw, layer, 1), sizes)
        bias = self._projection_bias(mlp.down)
        with_attention = layer.parallel and layer.mlp_out_norm is None and layer.experts is None
        shifts = [] if bias is None or with_attention else [bias]
        if layer.mlp_sum_norm is not None:
            shifts.append(self.bias(self.stream[number][1]))
        constant = torch.zeros(self.layout.dim, dtype=torch.float64)
        for shift in shifts:
            constant = constant + self._write(shift, layer, 1)
        up, down = Rows(up.values[0], up.sizes[0]), Rows(down.values[0], down.sizes[0])
        gate = None if gate is None else Rows(gate.values[0], gate.sizes[0])
        up_norms, down_norms = up.values.norm(dim=-1), down.values.norm(dim=-1)
        if layer.mlp_out_norm is not None and layer.experts is None:
            unit = float(((up_norms * down_norms).square().sum() + constant.square().sum()).sqrt()) or 1.0
        else:
            unit = self.write_scale(number, 1)
        down = Rows(self.in_frame(down.values / unit), down.sizes / unit)
        if mlp.gate is not None or mlp.homogeneous:
            balance = (down.values.norm(dim=-1) / up_norms).sqrt()
            balance = torch.where(torch.isfinite(balance) & (balance > 0), balance, torch.ones_like(balance))
            up = Rows(up.values * balance[:, None], up.sizes * balance)
            down = Rows(down.values / balance[:, None], down.sizes / balance)
        rounding = torch.as_tensor(sum((float(shift.square().sum()) for shift in shifts), 0.0)) / unit**2
        slope = None if mlp.slope is None else self.tensor(mlp.slope)
        return Neurons(up, gate, down, self.in_frame(constant / unit), rounding, slope)

    def scores(self, number: int, experts: Experts) -> Rows:
        """The rows [experts, E] of a router, without what a softmax does not see."""
        layer = self.layout.layers[number]
        rows = self.read(experts.router, layer.mlp_norm or self.stream[number][1])
        values, sizes = rows.values[0], rows.sizes[0]
        return Rows(values - values.mean(dim=0) if experts.softmax else values, sizes)


def finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor.

    Raises:
        ValueError: it holds numbers that are not finite.
    """
    if not tensor.sum().isfinite():
        raise ValueError(f"{name} holds numbers that are not finite: such weights have no invariants")
    return tensor


def _complex(rows: Rows, planes: Tensor) -> Rows:
    """Rows [heads, width, E] of planes as complex ones, [heads, planes, 1, E]."""
    first, second = planes.unbind(1)
    values = torch.complex(rows.values[:, first], rows.values[:, second])
    sizes = (rows.sizes[:, first].square() + rows.sizes[:, second].square()).sqrt()
    return Rows(values[..., None, :], sizes[..., None])


def product_sizes(pair: Pair) -> Tensor:
    """[heads]: squares of the Frobenius norms of the products."""
    left, right = (rows.values @ rows.values.mH for rows in (pair.left, pair.right))
    return (left * right.conj()).real.flatten(1).sum(1).clamp_min(0)


def product_distances(a: Pair, b: Pair) -> Tensor:
    """[heads]: squares of the Frobenius norms of the differences of products, head by head.

    By squares and inner products where the difference is large enough for them (`_CLEAR`). Else the difference is taken
    as a product of factors of twice the width: by their triangular factors nothing of its size has to cancel. No matrix
    of the width of the stream is made.
    """
    sizes = product_sizes(a) + product_sizes(b)
    inner = ((a.left.values @ b.left.values.mH) * (a.right.values @ b.right.values.mH).conj()).real.flatten(1).sum(1)
    result = sizes - 2 * inner
    close = torch.nonzero(result < _CLEAR * sizes).flatten()
    if len(close):
        a, b = a.of_heads(close), b.of_heads(close)
        left = torch.linalg.qr(torch.cat([a.left.values, -b.left.values], dim=-2).mH, mode="r").R
        right = torch.linalg.qr(torch.cat([a.right.values, b.right.values], dim=-2).mH, mode="r").R
        result[close] = (left @ right.mH).abs().square().flatten(1).sum(1)
    return result.clamp_min(0)


def product_inner(a: Pair, b: Pair) -> Tensor:
    """[heads of a, heads of b]: inner products of the products, of every head with every other."""
    rows = []
    for head in range(len(a.left.values)):
        left = a.left.values[head] @ b.left.values.mH
        right = a.right.values[head] @ b.right.values.mH
        rows.append((left * right.conj()).real.flatten(1).sum(1))
    return torch.stack(rows)
