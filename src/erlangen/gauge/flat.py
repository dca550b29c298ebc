r"""Flat directions: how many dimensions of a model's parameters change nothing that it returns.

What a model returns is constant along the orbits of its continuous symmetries. Their dimension, at generic parameters,
is counted here from the layout alone, sector by sector. It is the number of zero singular values of the Jacobian of the
outputs with respect to the parameters. The eps inside norms is taken as 0 (with one, a scale that a norm takes away is
not quite flat). What is returned is the probabilities of tokens, that is logits up to a constant, or the hidden states
where the layout has no logits. With masked language heads (BERT) the head itself is held fixed.

Notation: d width of the residual stream, h query heads, g key/value heads, k width of a head, v of a value, m hidden
features, V vocabulary. A norm is N(x) = γ ⊙ n(x) + β; a map reads it as W N(x) + c.

**What reads a norm** (``norm_gains``, ``norm_biases``, ``centring_reads``). The function depends on W diag(γ) and on W
β + c, for all R rows that read the norm. So γ is redundant (d), and β too where every row has a bias c (d). Values of
n(x) in a LayerNorm sum to 0, so W diag(γ) may grow by u 1ᵀ. A row with a bias c undoes what this does to W β; where
there is no β, nothing needs to be undone: R in all. A row without c under a LayerNorm with β cannot grow on its own,
but u 1ᵀ makes its W β any number at all, so that β is redundant after all (d). In both cases such a row has a free
*effective bias*.

**Heads** (``query_key``, ``value_output``). Put the queries of a group side by side: W_Q [k, a]; W_K is [k, b]. The
function depends on W_Qᵀ W_K, of rank r = min(k, a, b), so that k (a + b) − r (a + b − r) dimensions are redundant: k²
unless the head is wider than the stream. Values and output likewise. Rotary positions of distinct frequencies leave in
every plane one complex number, 2 dimensions; the coordinates that they do not turn have the square of their number.
QK-norm leaves a positive scale of each query and each key head, and the exchange of gains, query's times c and key's
over c: one a coordinate that is not turned, one a plane. Without learned gains the rotations that commute with
positions stand in the place of that exchange. One norm over all heads leaves two scales, and exchanges in each
key/value head.

**Biases of heads** (``key_bias``, ``value_bias``). A vector added to all keys of a head adds a constant to each query's
scores, which softmax ignores: one dimension a coordinate that positions do not turn; none with QK-norm or capped
scores. Each row of attention weights sums to 1, so a vector added to the values of a head adds a constant to the
residual stream. The output bias takes it back (g v), or that of a parallel feed-forward layer. Where there is no such
bias only the shifts that cancel among heads are free: g v less the dimensions of the stream that are seen.

**Latents** (multi-head latent attention: ``latent``, ``rotary_query_key``). A latent is γ ⊙ n(W x), n an RMS norm of
width r: γ is folded into what reads it (r), the latent may be turned (r (r − 1) / 2), W scaled (1). Heads without
positions are as above, with latents in the place of the stream; the rotary key is one for all heads, 2 dimensions a
plane.

**Feed-forward layers** (``mlp_scales``, ``router_shift``). The up row of a gated feature times s, its down column over
s: m. A positive scale of a row before a positively homogeneous activation: m. In a mixture of experts the same for each
expert; and a softmax that weighs experts ignores one vector added to all rows of the router (d, and 1 for its bias; one
of them is in ``centring_reads`` where its rows are).

**The residual stream** (``centring_writes``, ``shifts``). Where all norms that read it are LayerNorms, what is written
along 1 is not seen: one dimension a column and a bias of each map that writes, and a row of each embedding; not for a
token embedding that also makes the logits. A constant vector may pass between embeddings that are added (d for each
beyond the first), and between the biases of parallel branches (d); what the dimensions along 1 count already is left
out. If the token embedding also makes the logits, a constant vector in all its rows adds one number to all of them,
which softmax ignores unless logits are capped.

``logit_shift``: the same for an unembedding of its own (d, and 1 for a bias; one of them is in ``centring_reads`` where
its rows are). ``residual``: with such an unembedding, and norms before branches only, the frame of the stream may be
turned, d (d − 1) / 2, or that of the d − 1 dimensions a LayerNorm sees. Tied, the final gain (if there is one) cannot
be folded and its frame is fixed; hidden states that are returned fix it too. ``residual_scale``: embeddings and all
that is written times s (1); tied logits are restored by the final norm's gain.

**Norms after a branch** (Gemma-2, Gemma-3). Their gains are part of what is written, and not redundant. They fix the
frame of the stream (its scale passes through their gains) and take the scale of the map before them: ``branch_scale``,
1 each.

**Norms of sums** (BERT: x' = N(x + f(x)) after every branch and N(embeddings) at the start). The output of N is read by
f and is added to what f writes, so γ is not redundant; γ and β times s is, with f's reading over s and f's write times
s, since the next norm takes s away (``residual_scale``: 1 for each norm but the last, 1 for the embeddings). And β may
grow by any δ, with −W δ in the biases of f's first maps, −δ in the bias of its last (``norm_biases``: d for each norm
but the last). Rows that read count in ``centring_reads`` as above.

Generic also means a vocabulary that is not too small: layers that read tokens before any of them is mixed with another
(without positions, the first) are seen on V inputs only, and have more flat directions where V is less than what they
could tell apart.

Derived for this library. The tests prove every sector against ranks of Jacobians.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

from .layout import HeadLayout, Layer, ModelLayout, Norm, Projection, model_layout

SECTORS: Mapping[str, str] = MappingProxyType(
    {
        "query_key": "changes of basis of queries and keys",
        "value_output": "changes of basis of values and outputs",
        "rotary_query_key": "turns and scales of a rotary part that heads share",
        "latent": "gains, turns and scales of latents",
        "key_bias": "shifts of keys, which softmax ignores",
        "value_bias": "shifts of values, taken back by later biases",
        "mlp_scales": "scales of hidden features",
        "router_shift": "shifts of all scores of experts",
        "norm_gains": "gains, folded into what reads them",
        "norm_biases": "biases of norms, folded likewise",
        "centring_reads": "reading along 1, where LayerNorm leaves nothing",
        "centring_writes": "writing along 1, which LayerNorm takes off",
        "shifts": "constants passed between terms of a sum",
        "branch_scale": "scales that a norm after a branch takes off",
        "residual": "rotations of the residual stream",
        "residual_scale": "scales of the residual stream",
        "logit_shift": "shifts of all logits, which softmax ignores",
    }
)
"""The sectors, and what they are in a few words."""


@dataclass(frozen=True)
class FlatDirections:
    """How many dimensions of a model's parameters are redundant.

    Attributes:
        kind: of model.
        sectors: name -> dimensions, of all `SECTORS`; those that a model does not have are 0.
        parameters: of the model (of its encoder, where heads read hidden states); tied tensors count once.
    """

    kind: str
    sectors: Mapping[str, int]
    parameters: int

    @property
    def total(self) -> int:
        """All redundant dimensions."""
        return sum(self.sectors.values())

    @property
    def share(self) -> float:
        """Part of the parameters that is redundant."""
        return self.total / self.parameters

    def __str__(self) -> str:
        rows = [(name, count, SECTORS[name]) for name, count in self.sectors.items() if count]
        rows.append(("all", self.total, f"of {self.parameters:,} parameters"))
        lines = [
            f"{name:<16}  {count:>15,}  {100 * count / self.parameters:>8.4f} %  {words}" for name, count, words in rows
        ]
        return "\n".join([f"Flat directions of {self.kind}", *lines])


# --- formulas ---------------------------------------------------------------------------------------------------------


def _pair(width: int, first: int, second: int) -> int:
    """Redundant dimensions of A [width, first], B [width, second] of which AᵀB matters."""
    rank = min(width, first, second)
    return width * (first + second) - rank * (first + second - rank)


def _turns(size: int) -> int:
    """Dimension of O(size)."""
    return size * (size - 1) // 2


def _supported(layout: ModelLayout) -> bool:
    """Whether norms are norms of sums; raises where norms are placed as nowhere in the docstring above."""
    layers = layout.layers
    before = [norm for layer in layers for norm in (layer.attention_norm, layer.mlp_norm)]
    out = [norm for layer in layers for norm in (layer.attention_out_norm, layer.mlp_out_norm)]
    sums = [norm for layer in layers for norm in (layer.attention_sum_norm, layer.mlp_sum_norm)]
    if None not in before and not any(sums) and layout.embedding_norm is None and layout.final_norm is not None:
        kinds = {norm.kind for norm in [*before, layout.final_norm] if norm is not None}
        if len(kinds) > 1:
            raise ValueError(
                "flat directions are counted where the norms that read the residual stream are of one kind, received "
                f"{' and '.join(sorted(kinds))}: count those of this {layout.kind} model by the rank of a Jacobian"
            )
        return False
    biased = all(
        layer.mlp is not None
        and all(part is None or part.bias for part in (layer.mlp.up, layer.mlp.gate, layer.mlp.down))
        and all(part.bias for part in (layer.attention.query, layer.attention.key, layer.attention.value))
        and layer.attention.output.bias
        for layer in layers
    )
    learned = [layout.embedding_norm, *sums]
    full = all(norm is not None and norm.gain and norm.bias and norm.kind == "layer" for norm in learned)
    plain = not any(before) and not any(out) and layout.final_norm is None and layout.unembedding is None
    if full and biased and plain and not any(layer.parallel or layer.attention.latent for layer in layers):
        return True
    raise ValueError(
        "flat directions are counted for models whose layers have a norm before each branch and one at the end, or a "
        f"LayerNorm of each sum and of the embeddings, with biases throughout: the layout of this {layout.kind} model "
        "is neither, count its directions by the rank of a Jacobian"
    )


class _Counter:
    """Adds up the sectors of one layout."""

    def __init__(self, layout: ModelLayout) -> None:
        self.layout = layout
        self.sectors = dict.fromkeys(SECTORS, 0)
        self.sums = _supported(layout)
        # What is written along 1 is unseen if the norms that read the residual stream are LayerNorms.
        self.centred = layout.final_norm is None or layout.final_norm.kind == "layer"
        self.seen = layout.dim - self.centred

    def add(self, sector: str, count: int) -> None:
        self.sectors[sector] += count

    def count(self) -> dict[str, int]:
        layout = self.layout
        for number, layer in enumerate(layout.layers):
            if self.sums:
                before = layout.layers[number - 1].mlp_sum_norm if number else layout.embedding_norm
                attention_norm, mlp_norm = before, layer.attention_sum_norm
            else:
                attention_norm, mlp_norm = layer.attention_norm, layer.mlp_norm
            assert attention_norm is not None and mlp_norm is not None
            self.readings(layer, attention_norm, mlp_norm)
            self.heads(layer, attention_norm)
            self.feed_forward(layer)
            self.writes(layer.attention.output, layer.attention_out_norm)
            for mlp in layer.feed_forward:
                self.writes(mlp.down, layer.mlp_out_norm)
            self.parallel_biases(layer)
        self.embeddings()
        self.logits()
        self.stream()
        return self.sectors

    # --- parts of a layer ---

    def readings(self, layer: Layer, attention_norm: Norm, mlp_norm: Norm) -> None:
        heads, latent = layer.attention, layer.attention.latent
        if latent is None:
            attention = [heads.query, heads.key, heads.value]
        elif latent.query_latent is None:
            attention = [heads.query, latent.rotary_query, latent.kv_latent, latent.rotary_key]
        else:
            attention = [latent.query_latent, latent.kv_latent, latent.rotary_key]
        feed_forward = list(layer.feed_forward_readers)
        if layer.experts is not None and layer.mlp_out_norm is not None:
            raise ValueError("flat directions of experts are not counted where a norm of what they write follows")
        if attention_norm.path == mlp_norm.path:
            self.reading(attention_norm, attention + feed_forward)
        else:
            self.reading(attention_norm, attention)
            self.reading(mlp_norm, feed_forward)

    def reading(self, norm: Norm, projections: list[Projection]) -> int:
        """Count a norm with its readers; returns how many of their rows may grow along 1."""
        dim, all_biased = self.layout.dim, all(projection.bias for projection in projections)
        free = [part for part in projections if norm.kind == "layer" and (part.bias or not norm.bias)]
        rows = sum(len(part.starts) * part.width for part in free)
        self.add("centring_reads", rows)
        if norm.gain and not self.sums:
            self.add("norm_gains", dim)
        if norm.bias and (norm.kind == "layer" or all_biased):
            self.add("norm_biases", dim)
        return rows

    def heads(self, layer: Layer, norm: Norm) -> None:
        heads, latent = layer.attention, layer.attention.latent
        stream = self.layout.dim - (norm.kind == "layer")
        query_in, kv_in = stream, stream

        def biased(part: Projection) -> bool:
            """Whether it has a free effective bias."""
            return part.bias or (latent is None and norm.kind == "layer" and norm.bias)

        if latent is not None:
            query_in, kv_in = self.latents(heads, stream)
        query_side = heads.group_size * (query_in + biased(heads.query))
        planes, rest = heads.rotary_dim // 2, heads.head_dim - heads.rotary_dim
        kv_heads, shifts = heads.num_kv_heads, biased(heads.key) and heads.soft_cap is None
        if not heads.qk_norm:
            # A shift of keys that is not flat is one more column of their side.
            key_side = kv_in + (biased(heads.key) and not shifts)
            self.add("query_key", kv_heads * (2 * planes + _pair(rest, query_side, key_side)))
            self.add("key_bias", kv_heads * rest * shifts)
        else:
            over_all = heads.qk_norm_over == "all"
            self.add("query_key", 2 if over_all else heads.num_heads + kv_heads)
            exchange = planes + (rest if isinstance(heads.qk_norm, tuple) else _turns(rest))
            shared = isinstance(heads.qk_norm, tuple) and not over_all
            self.add("query_key", exchange * (1 if shared else kv_heads))
        out_norm, width = layer.attention_out_norm, heads.value_width
        seen = self.seen if out_norm is None else self.layout.dim - (out_norm.kind == "layer")
        self.add("value_output", kv_heads * _pair(width, kv_in, heads.group_size * seen))
        if biased(heads.value):
            taken = heads.output.bias or (layer.joined and layer.mlp is not None and layer.mlp.down.bias)
            self.add("value_bias", kv_heads * width if taken else max(0, kv_heads * width - seen))

    def latents(self, heads: HeadLayout, stream: int) -> tuple[int, int]:
        """Count the latents of an attention layer; returns the widths that queries, and keys and values, read."""
        latent = heads.latent
        assert latent is not None
        if heads.qk_norm or heads.rotary is not None:
            raise ValueError("flat directions of latent attention are counted without QK-norm and rotary heads")
        for part, norm in ((latent.query_latent, latent.query_norm), (latent.kv_latent, latent.kv_norm)):
            if part is None or norm is None:
                continue
            if norm.kind != "rms" or norm.bias or part.width > stream:
                raise ValueError(
                    "flat directions of latents are counted under RMS norms without biases, for latents at most as "
                    f"wide as the residual stream: received {norm} of a latent of width {part.width}"
                )
            self.add("latent", norm.gain * part.width + _turns(part.width) + 1)
        self.add("rotary_query_key", latent.rotary.dim)
        return stream if latent.query_latent is None else latent.query_latent.width, latent.kv_latent.width

    def feed_forward(self, layer: Layer) -> None:
        for mlp in layer.feed_forward:
            self.add("mlp_scales", mlp.up.width * ((mlp.gate is not None) + mlp.homogeneous))
        experts, norm = layer.experts, layer.mlp_norm
        if experts is not None and experts.softmax and norm is not None:
            bias = experts.router.bias
            self.add("router_shift", self.layout.dim + bias - (norm.kind == "layer" and (bias or not norm.bias)))

    def writes(self, projection: Projection, out_norm: Norm | None) -> None:
        """What a map writes along 1, and what a norm after it takes off."""
        unseen = self.centred
        if out_norm is not None:
            self.add("branch_scale", 1)
            self.add("centring_writes", out_norm.bias and self.centred)
            unseen = out_norm.kind == "layer"
        if unseen:
            self.add("centring_writes", len(projection.starts) * projection.width + projection.bias)

    def parallel_biases(self, layer: Layer) -> None:
        if layer.joined_biases is not None:
            self.add("shifts", self.seen)

    # --- the whole ---

    def embeddings(self) -> None:
        layout, final = self.layout, self.layout.final_norm
        others = list(layout.other_embeddings.values())
        # Tied logits are taken with γ ⊙ n(x) + β. Without γ and β nothing is along 1 there either; without γ alone,
        # what the embedding has along 1 makes up for any change of β, as in a map without a bias.
        unseen = self.centred and not layout.tied
        if self.centred and layout.tied and final is not None and not final.gain:
            unseen = not final.bias
            self.add("norm_biases", layout.dim * final.bias)
        self.add("centring_writes", sum(others) * self.centred + layout.vocab_size * unseen)
        # Embeddings whose rows may be shifted together; those whose shift along 1 is counted already.
        shifted = len(others) + (not layout.tied or layout.soft_cap is None)
        counted = len(others) * self.centred + (unseen and shifted > len(others))
        self.add("shifts", max(0, shifted * layout.dim - self.seen - counted))

    def logits(self) -> None:
        layout = self.layout
        if layout.unembedding is not None and layout.final_norm is not None:
            rows = self.reading(layout.final_norm, [layout.unembedding])
            if layout.soft_cap is None:
                self.add("logit_shift", layout.dim + layout.unembedding.bias - (rows > 0))

    def stream(self) -> None:
        layout = self.layout
        if self.sums:
            self.add("residual_scale", 2 * len(layout.layers) + (not layout.tied))
            return
        assert layout.final_norm is not None
        out = [norm for layer in layout.layers for norm in (layer.attention_out_norm, layer.mlp_out_norm)]
        out = [norm for norm in out if norm is not None]
        fixed = out if layout.unembedding is not None else [*out, layout.final_norm]
        if (layout.tied or layout.unembedding is not None) and not any(norm.gain for norm in fixed):
            layer_norm = self.centred or any(norm.kind == "layer" for norm in out)
            self.add("residual", _turns(layout.dim - layer_norm))
        if all(norm.gain for norm in out) and (not layout.tied or layout.final_norm.gain):
            self.add("residual_scale", 1)


def flat_directions(model: Any) -> FlatDirections:
    """Count the dimensions of a model's parameters that change nothing it returns.

    Args:
        model: a model in memory, its config (of Hugging Face: the object, or the mapping that ``config.json`` holds),
            or a `ModelLayout`.

    Returns:
        The count, sector by sector; printed, a table. It holds for generic parameters (no two heads that are equal, no
        matrix of deficient rank), with distinct rotary frequencies and no eps in norms.

    Raises:
        TypeError: nobody has described this class of model.
        ValueError: a config that cannot be read, or a layout that the count does not cover.
    """
    layout = model if isinstance(model, ModelLayout) else model_layout(model)
    sectors = _Counter(layout).count()
    parameters = sum(map(prod, layout.tensor_shapes().values()))
    return FlatDirections(layout.kind, MappingProxyType(sectors), parameters)
