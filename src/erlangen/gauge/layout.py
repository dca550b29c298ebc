"""Where a transformer keeps its weights: one description, of names, sizes and kinds, that every treatment reads.

`HeadLayout` describes the heads of one attention layer, `ModelLayout` what is around them (norms, feed-forward layers,
embeddings), as far as its symmetries depend on it. A layout holds no weights: it is made from a config alone, and
serves a model in memory and a checkpoint on disk alike. `model_layout` is the registry of models; whoever knows a class
describes it once.

Weights of linear maps are spoken of as [out, in], whatever way they are stored. "Rows" are outputs, "columns" inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

# Activations through which a positive scale goes unchanged.
_HOMOGENEOUS = ("relu", "leaky_relu", "prelu")

# --- parts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Slices of a linear map: one a head, or one alone.

    Several projections may name one map (fused queries, keys and values), each with its own slices.

    Attributes:
        path: of the linear map; its tensors are ``path + ".weight"`` and, with a bias, ``path + ".bias"``.
        starts: the first row (column, for side "in") of each slice.
        width: rows (columns) of a slice.
        side: whether the slices are of its outputs, or of its inputs (the output projection of attention).
        transposed: the weight is stored [in, out], as by GPT-2.
        bias: whether the map has a bias.
        stack: of maps that are stored as one tensor [maps, ..., ...], named ``path`` itself: which of them this is.
    """

    path: str
    starts: tuple[int, ...]
    width: int
    side: Literal["out", "in"] = "out"
    transposed: bool = False
    bias: bool = False
    stack: int | None = None

    @property
    def weight(self) -> str:
        """Name of the tensor that holds the weight."""
        return self.path if self.stack is not None else f"{self.path}.weight"

    @property
    def key(self) -> str:
        """A name of the map that no other has: its path, and its number where maps are stacked."""
        return self.path if self.stack is None else f"{self.path}.{self.stack}"

    @property
    def bias_name(self) -> str | None:
        """Name of the bias, if there is one."""
        return f"{self.path}.bias" if self.bias else None

    @property
    def _axis(self) -> int:
        return int((self.side == "in") != self.transposed)

    @property
    def _whole(self) -> slice | None:
        """The slices as one piece, where they follow each other."""
        first = self.starts[0]
        if self.starts == tuple(range(first, first + len(self.starts) * self.width, self.width)):
            return slice(first, first + len(self.starts) * self.width)
        return None

    def _index(self, device: torch.device) -> Tensor:
        starts = torch.tensor(self.starts, device=device)
        return (starts[:, None] + torch.arange(self.width, device=device)).flatten()

    def matrix(self, weight: Tensor) -> Tensor:
        """The matrix of this map in a stored weight: that itself, or one of a stack."""
        return weight if self.stack is None or weight.ndim == 2 else weight[self.stack]

    def heads(self, weight: Tensor) -> Tensor:
        """The slices of a stored weight (of a stack, or its matrix alone): [heads, width, other side of the map]."""
        weight = self.matrix(weight).movedim(self._axis, 0)
        whole = self._whole
        rows = weight[self._index(weight.device)] if whole is None else weight[whole]
        return rows.unflatten(0, (len(self.starts), self.width))

    def put_heads(self, weight: Tensor, heads: Tensor) -> None:
        """Write slices [heads, width, other side of the map] into a stored weight, in place."""
        rows, whole = heads.flatten(0, 1).to(weight.dtype), self._whole
        weight = self.matrix(weight).movedim(self._axis, 0)
        weight[self._index(weight.device) if whole is None else whole] = rows

    def head_biases(self, bias: Tensor) -> Tensor:
        """The slices of a stored bias: [heads, width]. Only for side "out"."""
        whole = self._whole
        rows = bias[self._index(bias.device)] if whole is None else bias[whole]
        return rows.unflatten(0, (len(self.starts), self.width))

    def put_head_biases(self, bias: Tensor, heads: Tensor) -> None:
        """Write slices [heads, width] into a stored bias, in place. Only for side "out"."""
        whole = self._whole
        bias[self._index(bias.device) if whole is None else whole] = heads.flatten().to(bias.dtype)


def rows(path: str, heads: int, width: int, *, start: int = 0, stride: int | None = None, **kind: Any) -> Projection:
    """A projection whose slices are ``stride`` (unless given: width) apart."""
    stride = width if stride is None else stride
    return Projection(path=path, starts=tuple(start + stride * head for head in range(heads)), width=width, **kind)


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A normalisation over the residual stream, or a part of it.

    Attributes:
        path: its tensors are ``path + ".weight"`` and ``path + ".bias"``.
        kind: "layer" takes the mean off before it divides, "rms" does not.
        eps: added to the mean square.
        gain: whether there is a learned gain.
        offset: what is added to the stored gain (1 in Gemma, where the gain is 1 + weight).
        bias: whether there is a learned bias.
    """

    path: str
    kind: Literal["layer", "rms"]
    eps: float
    gain: bool = True
    offset: float = 0.0
    bias: bool = False

    @property
    def weight(self) -> str | None:
        """Name of the gain, if there is one."""
        return f"{self.path}.weight" if self.gain else None

    @property
    def bias_name(self) -> str | None:
        """Name of the bias, if there is one."""
        return f"{self.path}.bias" if self.bias else None


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions of queries and keys.

    Attributes:
        dim: how many coordinates are turned, from the first on; the others are not.
        pairs: the planes: (i, i + dim / 2) for "half" (Hugging Face's layout), (2 i, 2 i + 1) for "interleaved".
    """

    dim: int
    pairs: Literal["half", "interleaved"] = "half"

    def planes(self, device: torch.device | None = None) -> Tensor:
        """int64 [dim / 2, 2]: the two coordinates of each plane."""
        first = torch.arange(self.dim // 2, device=device)
        if self.pairs == "half":
            return torch.stack([first, first + self.dim // 2], dim=1)
        return torch.stack([2 * first, 2 * first + 1], dim=1)


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """What multi-head latent attention (DeepSeek-V2) has besides heads.

    The layout's query, key and value are the parts without positions: rows of maps that read a latent. Their scores are
    added to those of a second, rotary part with one key for all heads.

    Attributes:
        rotary_query: [num_heads] slices of the same map as the queries.
        rotary_key: one slice of the map that makes the latent of keys and values.
        query_norm: of the latent that queries read; None where they read the residual stream.
        kv_norm: of the latent that keys and values read.
        query_latent, kv_latent: the maps that make the latents; None as query_norm.
        rotary: of the second part.
    """

    rotary_query: Projection
    rotary_key: Projection
    kv_latent: Projection
    kv_norm: Norm
    rotary: Rotary
    query_latent: Projection | None = None
    query_norm: Norm | None = None


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """The heads of one attention layer.

    Query head h reads key/value head ``h // group_size``.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key/value heads; divides num_heads.
        head_dim: width of a query or key.
        query, key, value: their slices, side "out".
        output: one slice of inputs a query head, side "in".
        value_dim: width of a value; None: head_dim.
        rotary: rotary positions, if any.
        qk_norm: RMS norm of queries and keys, before the positions: with learned gains (two norms, of queries and of
            keys), without (True), or none (False).
        qk_norm_over: one norm a head ("head"), or one over all heads together ("all").
        soft_cap: scores s become soft_cap · tanh(s / soft_cap); None: no cap.
        latent: multi-head latent attention; None for the ordinary kind.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    value_dim: int | None = None
    rotary: Rotary | None = None
    qk_norm: tuple[Norm, Norm] | bool = False
    qk_norm_over: Literal["head", "all"] = "head"
    soft_cap: float | None = None
    latent: LatentAttention | None = None

    def __post_init__(self) -> None:
        if min(self.num_heads, self.num_kv_heads, self.head_dim) < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                "a layout needs positive sizes and key/value heads that divide the query heads, "
                f"received {self.num_heads} query heads, {self.num_kv_heads} key/value heads of width {self.head_dim}"
            )
        if not 0 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(
                f"the rotary dim must be even and at most head_dim = {self.head_dim}, received {self.rotary_dim}"
            )
        kv_heads, value_dim = self.num_kv_heads, self.value_width
        expected = {
            "query": (self.query, self.num_heads, self.head_dim, "out"),
            "key": (self.key, kv_heads, self.head_dim, "out"),
            "value": (self.value, kv_heads, value_dim, "out"),
            "output": (self.output, self.num_heads, value_dim, "in"),
        }
        for name, (part, heads, width, side) in expected.items():
            if (len(part.starts), part.width, part.side) != (heads, width, side):
                raise ValueError(
                    f"the {name} of this layout has {heads} slices of width {width} on the {side} side, received "
                    f"{len(part.starts)} of width {part.width} on the {part.side} side"
                )

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def value_width(self) -> int:
        """Width of a value."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def rotary_dim(self) -> int:
        """Coordinates of queries and keys that positions turn."""
        return 0 if self.rotary is None else self.rotary.dim


@dataclass(frozen=True, kw_only=True)
class MLP:
    """One feed-forward layer: down(activation(up x)), or down(activation(gate x) · up x) where there is a gate.

    Attributes:
        up, gate, down: one slice each: of outputs for up and gate, of inputs for down.
        activation: its name.
        slope: name of the learned slopes of a "prelu", one a hidden feature (they go with the features).
    """

    up: Projection
    down: Projection
    activation: str
    gate: Projection | None = None
    slope: str | None = None

    @property
    def homogeneous(self) -> bool:
        """Whether a positive scale goes through the activation unchanged."""
        return self.activation in _HOMOGENEOUS


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts: feed-forward layers, some of which a router chooses for each token and weighs.

    The scores are linear, and which experts are chosen depends on them alone. Routers with more numbers than that (a
    correction added for the choice) are not described.

    Attributes:
        router: one slice, of a row an expert.
        experts: what is chosen from: alike, and without biases.
        shared: what always takes part, as one feed-forward layer; None: nothing.
        groups: how many groups of experts that follow each other the router chooses from before it chooses experts.
        softmax: whether weights and choice are those of a softmax over all experts, which does not see what is added
            to all scores. False for other scores, such as sigmoids.
    """

    router: Projection
    experts: tuple[MLP, ...]
    shared: MLP | None = None
    groups: int = 1
    softmax: bool = True

    def __post_init__(self) -> None:
        kinds = {(part.up.width, part.activation, part.gate is None) for part in self.experts}
        plain = all(
            part.slope is None and not any(map_.bias for map_ in (part.up, part.down, part.gate) if map_ is not None)
            for part in self.experts
        )
        if len(kinds) != 1 or not plain:
            raise ValueError("the experts of a mixture must be alike, at least one, without biases and slopes")
        number = len(self.experts)
        if (len(self.router.starts), self.router.width, self.router.side) != (1, number, "out"):
            raise ValueError(f"the router of {number} experts has one slice of {number} rows, received {self.router}")
        if self.groups < 1 or number % self.groups:
            raise ValueError(f"groups of experts must divide them, received {self.groups} groups of {number} experts")

    @property
    def parts(self) -> tuple[MLP, ...]:
        """The feed-forward layers, with that which always takes part at the end."""
        return self.experts if self.shared is None else (*self.experts, self.shared)

    @property
    def readers(self) -> tuple[Projection, ...]:
        """The maps that read the residual stream (through a norm)."""
        return (self.router, *(part for mlp in self.parts for part in (mlp.up, mlp.gate) if part is not None))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One transformer layer.

    Attributes:
        attention: its heads.
        mlp: its feed-forward layer; None for a mixture of experts.
        experts: that mixture.
        attention_norm, mlp_norm: norms of what attention and feed-forward layer read. One norm of both, in a layer
            whose branches are parallel, is named twice.
        attention_out_norm, mlp_out_norm: norms of what a branch writes, before it is added (Gemma-2, Gemma-3).
        attention_sum_norm, mlp_sum_norm: norms of the sum, after a branch is added (BERT).
        parallel: both branches read the same residual stream (GPT-NeoX).
    """

    attention: HeadLayout
    mlp: MLP | None
    experts: Experts | None = None
    attention_norm: Norm | None = None
    mlp_norm: Norm | None = None
    attention_out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None
    attention_sum_norm: Norm | None = None
    mlp_sum_norm: Norm | None = None
    parallel: bool = False

    def __post_init__(self) -> None:
        if (self.mlp is None) == (self.experts is None):
            raise ValueError("a layer has either an mlp or experts")

    @property
    def feed_forward(self) -> tuple[MLP, ...]:
        """Its feed-forward layer, or all those of its mixture of experts."""
        return (self.mlp,) if self.mlp is not None else self.experts.parts if self.experts is not None else ()

    @property
    def feed_forward_readers(self) -> tuple[Projection, ...]:
        """The maps of the feed-forward part that read the residual stream (through a norm)."""
        if self.mlp is None:
            return () if self.experts is None else self.experts.readers
        return tuple(part for part in (self.mlp.up, self.mlp.gate) if part is not None)

    @property
    def joined(self) -> bool:
        """Whether what the branches write is added up before anything reads it."""
        return self.parallel and self.attention_out_norm is None and self.mlp_out_norm is None

    @property
    def joined_biases(self) -> tuple[str, str] | None:
        """Names of the output biases of attention and of the feed-forward layer, where only their sum counts."""
        output, down = self.attention.output.bias_name, None if self.mlp is None else self.mlp.down.bias_name
        return (output, down) if self.joined and output is not None and down is not None else None


@dataclass(frozen=True, kw_only=True)
class ModelLayout:
    """A transformer.

    Attributes:
        kind: of model, as in a config's ``model_type``.
        dim: width of the residual stream.
        vocab_size: rows of the token embedding.
        token_embedding: name of that tensor, [vocab_size, dim].
        layers: in order of depth.
        other_embeddings: names of further embeddings that are added (learned positions, token types) with their rows.
        embedding_norm: of the sum of embeddings (BERT).
        final_norm: before the logits.
        unembedding: the map to the logits, one slice of vocab_size rows. None: there are no logits (an encoder), or
            they are taken with the token embedding.
        tied: the logits are taken with the token embedding.
        soft_cap: of the logits; None: no cap.
    """

    kind: str
    dim: int
    vocab_size: int
    token_embedding: str
    layers: tuple[Layer, ...]
    other_embeddings: Mapping[str, int]
    embedding_norm: Norm | None = None
    final_norm: Norm | None = None
    unembedding: Projection | None = None
    tied: bool = False
    soft_cap: float | None = None

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and stored shape of every tensor that this layout speaks of."""
        shapes: dict[str, tuple[int, ...]] = {self.token_embedding: (self.vocab_size, self.dim)}
        shapes.update({name: (rows, self.dim) for name, rows in self.other_embeddings.items()})

        def put_norm(norm: Norm | None, width: int) -> None:
            if norm is not None:
                shapes.update({name: (width,) for name in (norm.weight, norm.bias_name) if name is not None})

        def put(projection: Projection | None, other: int) -> None:
            """The map of a projection, as far as its slices reach; ``other``: the size of its other side."""
            if projection is not None:
                size = max(projection.starts) + projection.width
                *stack, first, second = shapes.get(projection.weight, (0, 0))
                size = max(size, second if projection._axis else first)
                if projection.stack is not None:
                    stack = [max([projection.stack + 1, *stack])]
                shapes[projection.weight] = (*stack, other, size) if projection._axis else (*stack, size, other)
                if projection.bias_name is not None:
                    shapes[projection.bias_name] = (size if projection.side == "out" else other,)

        put_norm(self.embedding_norm, self.dim)
        for layer in self.layers:
            heads, latent = layer.attention, layer.attention.latent
            query_in = kv_in = self.dim
            if latent is not None:
                kv_in = latent.kv_latent.width
                query_in = self.dim if latent.query_latent is None else latent.query_latent.width
                for projection in (latent.query_latent, latent.kv_latent, latent.rotary_key):
                    put(projection, self.dim)
                put(latent.rotary_query, query_in)
                put_norm(latent.query_norm, query_in)
                put_norm(latent.kv_norm, kv_in)
            put(heads.query, query_in)
            put(heads.key, kv_in)
            put(heads.value, kv_in)
            put(heads.output, self.dim)
            if isinstance(heads.qk_norm, tuple):
                for norm, number in zip(heads.qk_norm, (heads.num_heads, heads.num_kv_heads)):
                    put_norm(norm, heads.head_dim * (number if heads.qk_norm_over == "all" else 1))
            for mlp in layer.feed_forward:
                for projection in (mlp.gate, mlp.up, mlp.down):
                    put(projection, self.dim)
                if mlp.slope is not None:
                    shapes[mlp.slope] = (mlp.up.width,)
            if layer.experts is not None:
                put(layer.experts.router, self.dim)
            put_norm(layer.attention_norm, self.dim)
            put_norm(layer.mlp_norm, self.dim)
            put_norm(layer.attention_out_norm, self.dim)
            put_norm(layer.mlp_out_norm, self.dim)
            put_norm(layer.attention_sum_norm, self.dim)
            put_norm(layer.mlp_sum_norm, self.dim)
        put_norm(self.final_norm, self.dim)
        put(self.unembedding, self.dim)
        return shapes


# --- the registry of models -------------------------------------------------------------------------------------------

_DESCRIPTIONS: dict[type, Callable[[Any], ModelLayout]] = {}
# Top packages of foreign classes -> the module that describes them, loaded on first need; its ``register`` adds them.
_ADAPTERS = {"transformers": "erlangen.interop.layouts"}


def describes(cls: type) -> Callable[[Callable[[Any], ModelLayout]], Callable[[Any], ModelLayout]]:
    """Decorator of a function that makes the layout of models of a class (and its subclasses)."""

    def register(function: Callable[[Any], ModelLayout]) -> Callable[[Any], ModelLayout]:
        _DESCRIPTIONS[cls] = function
        return function

    return register


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and `DistributedDataParallel` wrappers."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def model_layout(model: Any) -> ModelLayout:
    """The layout of a model, or of the model that a config describes.

    Args:
        model: a model in memory (wrappers of compile and DDP are seen through), its config, or the mapping that a
            ``config.json`` of Hugging Face holds.

    Raises:
        TypeError: nobody has described this class.
        ValueError: a config of Hugging Face that nobody has described, or one whose numbers contradict each other.
    """
    inner = unwrap(model) if isinstance(model, nn.Module) else model
    if isinstance(inner, Mapping):
        return import_module(_ADAPTERS["transformers"]).layout_of_config(inner)
    for attempt in range(2):
        for cls in type(inner).__mro__:
            if cls in _DESCRIPTIONS:
                return _DESCRIPTIONS[cls](inner)
        if attempt == 0:
            for package in {cls.__module__.partition(".")[0] for cls in type(inner).__mro__} & _ADAPTERS.keys():
                import_module(_ADAPTERS[package]).register()
    name = type(inner).__name__
    raise TypeError(f"no layout is known for {name}: describe it with erlangen.gauge.describes({name})")


def head_layouts(model: Any) -> tuple[HeadLayout, ...]:
    """The head layouts of a model's attention layers, in order of depth. Arguments and errors as of `model_layout`."""
    return tuple(layer.attention for layer in model_layout(model).layers)
