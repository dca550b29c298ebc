"""Where the models of Hugging Face's `transformers` keep their weights, from their configs alone.

A layout is a pure function of the mapping that ``config.json`` holds; `transformers` itself is not needed. Names and
shapes follow the classes of `transformers` 5. `erlangen.gauge.model_layout` finds its models and configs through
`register`.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from erlangen.gauge import (
    MLP,
    Experts,
    HeadLayout,
    LatentAttention,
    Layer,
    ModelLayout,
    Norm,
    Projection,
    Rotary,
    describes,
    rows,
)

# How the model_type of shrunk checkpoints, and of those with unlearned biases, begins.
SHRUNK, BROKEN = "erlangen_shrunk_", "erlangen_broken_"
# The norms of DeepSeek's latents are made without the config's eps.
_LATENT_EPS = 1e-6


class _Config:
    """A mapping whose numbers are checked as they are read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.kind = values["model_type"]

    def get(self, key: str, default: Any) -> Any:
        """A value, or the default where it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            received = "it is missing" if value is None else f"received {value!r}"
            raise ValueError(f"{key} of a {self.kind} config must be a positive integer: {received}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number that is not negative."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"{key} of a {self.kind} config must be a finite number >= 0, received {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{key} of a {self.kind} config must be true or false, received {value!r}")
        return value

    def head_sizes(self, dim: int, kv_heads: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Query heads, key/value heads and their width.

        Args:
            dim: width of the residual stream; without a head_dim, heads divide it.
            kv_heads, width: what the family takes where the config is silent; None: as many, dim / heads.
        """
        heads = self.size("num_attention_heads")
        kv_heads = self.size("num_key_value_heads", heads if kv_heads is None else kv_heads)
        if heads % kv_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads, received {kv_heads} and {heads} ({self.kind})"
            )
        if width is None and self.values.get("head_dim") is None:
            return heads, kv_heads, _per_head("num_attention_heads", heads, "hidden_size", dim)
        return heads, kv_heads, self.size("head_dim", width)

    def rotary(self, width: int, *, partial: float | None = None) -> Rotary:
        """Rotary positions of the first coordinates of a head.

        Args:
            width: of a head.
            partial: the share that is turned where the config is silent; None: the family turns all of them.
        """
        if partial is None:
            turned = width
        else:
            scaling = self.get("rope_parameters", {})
            if not isinstance(scaling, Mapping):
                raise ValueError(f"rope_parameters of a {self.kind} config must be a mapping, received {scaling!r}")
            share = _Config({"model_type": self.kind, **scaling}).get(
                "partial_rotary_factor", self.get("partial_rotary_factor", self.get("rotary_pct", partial))
            )
            turned = int(width * share) if isinstance(share, int | float) and 0 < share <= 1 else 0
        if turned < 2 or turned % 2:
            raise ValueError(
                f"rotary positions of a {self.kind} config must turn an even number of the {width} coordinates of a "
                f"head, and at least 2: they would turn {turned}; see head_dim and partial_rotary_factor"
            )
        return Rotary(dim=turned)


def _per_head(heads_key: str, heads: int, dim_key: str, dim: int) -> int:
    if dim % heads:
        raise ValueError(f"{heads_key} must divide {dim_key}, received {heads} heads for a width of {dim}")
    return dim // heads


@dataclass(frozen=True)
class _Frame:
    """What a family's function is given: the config, and how the model around the layers is held.

    Attributes:
        config: the mapping.
        prefix: of all names inside the base model.
        logits: whether there are logits (a base model has none).
        head: path of the untied map to the logits.
        names: of the tensors of a checkpoint; empty for a live model.
    """

    config: _Config
    prefix: str
    logits: bool
    head: str
    names: Container[str] = ()

    def model(self, *, dim: int, tied: bool, **parts: Any) -> ModelLayout:
        vocab_size = self.config.size("vocab_size")
        tied = self.config.flag("tie_word_embeddings", tied)
        unembedding = rows(self.head, 1, vocab_size) if self.logits and not tied else None
        return ModelLayout(
            kind=self.config.kind,
            dim=dim,
            vocab_size=vocab_size,
            unembedding=unembedding,
            tied=self.logits and tied,
            **parts,
        )

    def layers(self, key: str, path: str, layer: Callable[[str, int], Layer]) -> tuple[Layer, ...]:
        number = self.config.size(key)
        return tuple(layer(f"{self.prefix}{path}.{index}", index) for index in range(number))


# --- families ---------------------------------------------------------------------------------------------------------


def _gpt2(frame: _Frame) -> ModelLayout:
    config, prefix = frame.config, frame.prefix
    if config.flag("add_cross_attention", False):
        raise ValueError("a gpt2 config with add_cross_attention = true has heads that no layout describes")
    dim, heads = config.size("n_embd"), config.size("n_head")
    width, hidden = _per_head("n_head", heads, "n_embd", dim), config.size("n_inner", 4 * dim)
    kind: dict[str, Any] = {"transposed": True, "bias": True}

    def norm(path: str) -> Norm:
        return Norm(path=path, kind="layer", eps=config.number("layer_norm_epsilon", 1e-5), bias=True)

    def layer(path: str, _: int) -> Layer:
        fused = f"{path}.attn.c_attn"
        return Layer(
            attention=HeadLayout(
                num_heads=heads,
                num_kv_heads=heads,
                head_dim=width,
                query=rows(fused, heads, width, **kind),
                key=rows(fused, heads, width, start=dim, **kind),
                value=rows(fused, heads, width, start=2 * dim, **kind),
                output=rows(f"{path}.attn.c_proj", heads, width, side="in", **kind),
            ),
            mlp=MLP(
                up=rows(f"{path}.mlp.c_fc", 1, hidden, **kind),
                down=rows(f"{path}.mlp.c_proj", 1, hidden, side="in", **kind),
                activation=config.get("activation_function", "gelu_new"),
            ),
            attention_norm=norm(f"{path}.ln_1"),
            mlp_norm=norm(f"{path}.ln_2"),
        )

    return frame.model(
        dim=dim,
        tied=True,
        token_embedding=f"{prefix}wte.weight",
        other_embeddings={f"{prefix}wpe.weight": config.size("n_positions", 1024)},
        layers=frame.layers("n_layer", "h", layer),
        final_norm=norm(f"{prefix}ln_f"),
    )


def _gpt_neox(frame: _Frame) -> ModelLayout:
    config, prefix = frame.config, frame.prefix
    dim, heads = config.size("hidden_size"), config.size("num_attention_heads")
    width, hidden = _per_head("num_attention_heads", heads, "hidden_size", dim), config.size("intermediate_size")
    bias = config.flag("attention_bias", True)

    def norm(path: str) -> Norm:
        return Norm(path=path, kind="layer", eps=config.number("layer_norm_eps", 1e-5), bias=True)

    def layer(path: str, _: int) -> Layer:
        def slices(place: int) -> Projection:
            # A head's query, key and value follow each other.
            start = place * width
            return rows(f"{path}.attention.query_key_value", heads, width, start=start, stride=3 * width, bias=bias)

        return Layer(
            attention=HeadLayout(
                num_heads=heads,
                num_kv_heads=heads,
                head_dim=width,
                query=slices(0),
                key=slices(1),
                value=slices(2),
                output=rows(f"{path}.attention.dense", heads, width, side="in", bias=bias),
                rotary=config.rotary(width, partial=0.25),
            ),
            mlp=MLP(
                up=rows(f"{path}.mlp.dense_h_to_4h", 1, hidden, bias=True),
                down=rows(f"{path}.mlp.dense_4h_to_h", 1, hidden, side="in", bias=True),
                activation=config.get("hidden_act", "gelu"),
            ),
            attention_norm=norm(f"{path}.input_layernorm"),
            mlp_norm=norm(f"{path}.post_attention_layernorm"),
            parallel=config.flag("use_parallel_residual", True),
        )

    return frame.model(
        dim=dim,
        tied=False,
        token_embedding=f"{prefix}embed_in.weight",
        other_embeddings={},
        layers=frame.layers("num_hidden_layers", "layers", layer),
        final_norm=norm(f"{prefix}final_layer_norm"),
    )


def _swiglu(path: str, hidden: int, activation: str, bias: bool = False) -> MLP:
    return MLP(
        up=rows(f"{path}.up_proj", 1, hidden, bias=bias),
        gate=rows(f"{path}.gate_proj", 1, hidden, bias=bias),
        down=rows(f"{path}.down_proj", 1, hidden, side="in", bias=bias),
        activation=activation,
    )


def _separate_heads(
    path: str, sizes: tuple[int, int, int], qkv_bias: bool, output_bias: bool, **more: Any
) -> HeadLayout:
    heads, kv_heads, width = sizes
    return HeadLayout(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        query=rows(f"{path}.q_proj", heads, width, bias=qkv_bias),
        key=rows(f"{path}.k_proj", kv_heads, width, bias=qkv_bias),
        value=rows(f"{path}.v_proj", kv_heads, width, bias=qkv_bias),
        output=rows(f"{path}.o_proj", heads, width, side="in", bias=output_bias),
        **more,
    )


def _fused_heads(path: str, sizes: tuple[int, int, int], rotary: Rotary | None) -> HeadLayout:
    """Queries, keys and values one after the other in one map."""
    heads, kv_heads, width = sizes
    fused = f"{path}.qkv_proj"
    return HeadLayout(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        query=rows(fused, heads, width),
        key=rows(fused, kv_heads, width, start=heads * width),
        value=rows(fused, kv_heads, width, start=(heads + kv_heads) * width),
        output=rows(f"{path}.o_proj", heads, width, side="in"),
        rotary=rotary,
    )


def _fused_swiglu(path: str, hidden: int, activation: str) -> MLP:
    """Gate and up one after the other in one map."""
    return MLP(
        gate=rows(f"{path}.gate_up_proj", 1, hidden),
        up=rows(f"{path}.gate_up_proj", 1, hidden, start=hidden),
        down=rows(f"{path}.down_proj", 1, hidden, side="in"),
        activation=activation,
    )


def _llama_like(frame: _Frame) -> ModelLayout:
    """Llama, Mistral, Qwen2, Qwen3 and Phi-3: RMS norms, rotary positions, grouped keys, gated feed-forward layers."""
    config, prefix, kind = frame.config, frame.prefix, frame.config.kind
    dim, hidden = config.size("hidden_size"), config.size("intermediate_size")
    sizes = config.head_sizes(dim, kv_heads=8 if kind == "mistral" else None, width=128 if kind == "qwen3" else None)
    if kind == "qwen2":
        qkv_bias, output_bias = True, False
    else:
        qkv_bias = output_bias = kind in ("llama", "qwen3") and config.flag("attention_bias", False)
    mlp_bias = kind == "llama" and config.flag("mlp_bias", False)
    fused = kind == "phi3"
    eps = config.number("rms_norm_eps", 1e-5 if fused else 1e-6)
    rotary = config.rotary(sizes[2], partial=1.0) if fused else config.rotary(sizes[2])
    activation = config.get("hidden_act", "silu")

    def norm(path: str) -> Norm:
        return Norm(path=path, kind="rms", eps=eps)

    def layer(path: str, _: int) -> Layer:
        heads, mlp = f"{path}.self_attn", f"{path}.mlp"
        qk_norm = (norm(f"{heads}.q_norm"), norm(f"{heads}.k_norm")) if kind == "qwen3" else False
        return Layer(
            attention=_fused_heads(heads, sizes, rotary)
            if fused
            else _separate_heads(heads, sizes, qkv_bias, output_bias, rotary=rotary, qk_norm=qk_norm),
            mlp=_fused_swiglu(mlp, hidden, activation) if fused else _swiglu(mlp, hidden, activation, mlp_bias),
            attention_norm=norm(f"{path}.input_layernorm"),
            mlp_norm=norm(f"{path}.post_attention_layernorm"),
        )

    return frame.model(
        dim=dim,
        tied=False,
        token_embedding=f"{prefix}embed_tokens.weight",
        other_embeddings={},
        layers=frame.layers("num_hidden_layers", "layers", layer),
        final_norm=norm(f"{prefix}norm"),
    )


def _gemma(frame: _Frame) -> ModelLayout:
    """Gemma and the text models of Gemma-2 and Gemma-3: norms whose gain is 1 + weight, in the latter two after each
    branch as well.
    """
    config, prefix = frame.config, frame.prefix
    dim, hidden = config.size("hidden_size"), config.size("intermediate_size")
    first = config.kind == "gemma"
    sizes = config.head_sizes(dim, kv_heads=16 if first else 4, width=256)
    eps, bias = config.number("rms_norm_eps", 1e-6), config.flag("attention_bias", False)
    rotary = config.rotary(sizes[2])
    second = config.kind == "gemma2"
    activation = config.get("hidden_act" if first else "hidden_activation", "gelu_pytorch_tanh")
    # A cap that is absent from a config is the family's; one that is null is off.
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} if second else {}
    score_cap, logit_cap = (
        config.number(key, 0.0) if key in config.values else caps.get(key, 0.0)
        for key in ("attn_logit_softcapping", "final_logit_softcapping")
    )
    # transformers reads the cap of scores in Gemma-2 alone.
    score_cap = score_cap if second else 0.0

    def norm(path: str) -> Norm:
        return Norm(path=path, kind="rms", eps=eps, offset=1.0)

    def layer(path: str, _: int) -> Layer:
        heads = f"{path}.self_attn"
        qk_norm = False if first or second else (norm(f"{heads}.q_norm"), norm(f"{heads}.k_norm"))
        more: dict[str, Any] = {"rotary": rotary, "qk_norm": qk_norm, "soft_cap": score_cap or None}
        return Layer(
            attention=_separate_heads(heads, sizes, bias, bias, **more),
            mlp=_swiglu(f"{path}.mlp", hidden, activation),
            attention_norm=norm(f"{path}.input_layernorm"),
            attention_out_norm=None if first else norm(f"{path}.post_attention_layernorm"),
            mlp_norm=norm(f"{path}.post_attention_layernorm" if first else f"{path}.pre_feedforward_layernorm"),
            mlp_out_norm=None if first else norm(f"{path}.post_feedforward_layernorm"),
        )

    return frame.model(
        dim=dim,
        tied=True,
        token_embedding=f"{prefix}embed_tokens.weight",
        other_embeddings={},
        layers=frame.layers("num_hidden_layers", "layers", layer),
        final_norm=norm(f"{prefix}norm"),
        soft_cap=logit_cap or None,
    )


def _bert(frame: _Frame) -> ModelLayout:
    config, prefix = frame.config, frame.prefix
    if config.flag("add_cross_attention", False):
        raise ValueError("a bert config with add_cross_attention = true has heads that no layout describes")
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise ValueError(f"position_embedding_type of a bert config must be 'absolute', received {positions!r}")
    dim, heads = config.size("hidden_size"), config.size("num_attention_heads")
    width, hidden = _per_head("num_attention_heads", heads, "hidden_size", dim), config.size("intermediate_size")
    embeddings = f"{prefix}embeddings"

    def norm(path: str) -> Norm:
        return Norm(path=f"{path}.LayerNorm", kind="layer", eps=config.number("layer_norm_eps", 1e-12), bias=True)

    def layer(path: str, _: int) -> Layer:
        return Layer(
            attention=HeadLayout(
                num_heads=heads,
                num_kv_heads=heads,
                head_dim=width,
                query=rows(f"{path}.attention.self.query", heads, width, bias=True),
                key=rows(f"{path}.attention.self.key", heads, width, bias=True),
                value=rows(f"{path}.attention.self.value", heads, width, bias=True),
                output=rows(f"{path}.attention.output.dense", heads, width, side="in", bias=True),
            ),
            mlp=MLP(
                up=rows(f"{path}.intermediate.dense", 1, hidden, bias=True),
                down=rows(f"{path}.output.dense", 1, hidden, side="in", bias=True),
                activation=config.get("hidden_act", "gelu"),
            ),
            attention_sum_norm=norm(f"{path}.attention.output"),
            mlp_sum_norm=norm(f"{path}.output"),
        )

    return ModelLayout(
        kind=config.kind,
        dim=dim,
        vocab_size=config.size("vocab_size"),
        # A head of masked language reads the hidden states through a transform of its own; it is left as it is.
        tied=frame.logits and config.flag("tie_word_embeddings", True),
        token_embedding=f"{embeddings}.word_embeddings.weight",
        other_embeddings={
            f"{embeddings}.position_embeddings.weight": config.size("max_position_embeddings", 512),
            f"{embeddings}.token_type_embeddings.weight": config.size("type_vocab_size", 2),
        },
        embedding_norm=norm(embeddings),
        layers=frame.layers("num_hidden_layers", "encoder.layer", layer),
    )


def _experts(path: str, number: int, hidden: int, activation: str, names: Container[str]) -> tuple[MLP, ...]:
    """Experts with maps of their own, as in checkpoints, or in two stacks, as in models of transformers 5."""
    if f"{path}.0.gate_proj.weight" in names:
        return tuple(_swiglu(f"{path}.{expert}", hidden, activation) for expert in range(number))
    return tuple(
        MLP(
            gate=rows(f"{path}.gate_up_proj", 1, hidden, stack=expert),
            up=rows(f"{path}.gate_up_proj", 1, hidden, start=hidden, stack=expert),
            down=rows(f"{path}.down_proj", 1, hidden, side="in", stack=expert),
            activation=activation,
        )
        for expert in range(number)
    )


def _expert_groups(config: _Config, num_experts: int) -> int:
    """How many groups of experts the router of a DeepSeek-V2 chooses from first."""
    scores, method = config.get("scoring_func", "softmax"), config.get("topk_method", "greedy")
    if scores != "softmax" or method not in ("greedy", "group_limited_greedy"):
        raise ValueError(
            "the router of a deepseek_v2 config must have scoring_func 'softmax' and topk_method 'greedy' or "
            f"'group_limited_greedy', received {scores!r} and {method!r}"
        )
    groups = config.size("n_group") if method == "group_limited_greedy" else 1
    if num_experts % groups:
        raise ValueError(f"n_group must divide n_routed_experts, received {groups} and {num_experts} (deepseek_v2)")
    return groups


def _deepseek_v2(frame: _Frame) -> ModelLayout:
    config, prefix = frame.config, frame.prefix
    dim, heads = config.size("hidden_size"), config.size("num_attention_heads")
    if config.size("num_key_value_heads", heads) != heads:
        raise ValueError(
            f"num_key_value_heads of a deepseek_v2 config must equal num_attention_heads = {heads}, "
            f"received {config.size('num_key_value_heads', heads)}: its keys are made a head each from one latent"
        )
    width, turned = config.size("qk_nope_head_dim", 128), config.size("qk_rope_head_dim", 64)
    value_width, kv_rank = config.size("v_head_dim", 128), config.size("kv_lora_rank", 512)
    # Null says that queries read the residual stream.
    query_rank = config.size("q_lora_rank", 1536) if config.values.get("q_lora_rank", 1536) is not None else None
    eps, bias = config.number("rms_norm_eps", 1e-6), config.flag("attention_bias", False)
    mlp_bias, activation = config.flag("mlp_bias", False), config.get("hidden_act", "silu")
    hidden, expert_width = config.size("intermediate_size", 11008), config.size("moe_intermediate_size", 1407)
    num_experts, shared_width = config.size("n_routed_experts", 64), config.size("n_shared_experts", 2) * expert_width
    groups = _expert_groups(config, num_experts)
    rotary = Rotary(dim=config.rotary(turned).dim, pairs="interleaved")
    dense = config.get("first_k_dense_replace", 0)
    if isinstance(dense, bool) or not isinstance(dense, int) or dense < 0:
        raise ValueError(f"first_k_dense_replace of a deepseek_v2 config must be an integer >= 0, received {dense!r}")
    if config.get("moe_layer_freq", 1) != 1:
        raise ValueError(
            f"moe_layer_freq of a deepseek_v2 config must be 1, received {config.values['moe_layer_freq']!r}"
        )

    def norm(path: str, eps: float = eps) -> Norm:
        return Norm(path=path, kind="rms", eps=eps)

    def experts(path: str) -> Experts:
        return Experts(
            router=rows(f"{path}.gate", 1, num_experts),
            experts=_experts(f"{path}.experts", num_experts, expert_width, activation, frame.names),
            shared=_swiglu(f"{path}.shared_experts", shared_width, activation, mlp_bias),
            groups=groups,
        )

    def layer(path: str, index: int) -> Layer:
        at = f"{path}.self_attn"
        # A head's slices follow each other: without and with positions; key and value.
        query, pair, stride = (
            f"{at}.q_proj" if query_rank is None else f"{at}.q_b_proj",
            width + turned,
            width + value_width,
        )
        latent = LatentAttention(
            rotary_query=rows(query, heads, turned, start=width, stride=pair),
            rotary_key=rows(f"{at}.kv_a_proj_with_mqa", 1, turned, start=kv_rank, bias=bias),
            kv_latent=rows(f"{at}.kv_a_proj_with_mqa", 1, kv_rank, bias=bias),
            kv_norm=norm(f"{at}.kv_a_layernorm", _LATENT_EPS),
            rotary=rotary,
            query_latent=None if query_rank is None else rows(f"{at}.q_a_proj", 1, query_rank, bias=bias),
            query_norm=None if query_rank is None else norm(f"{at}.q_a_layernorm", _LATENT_EPS),
        )
        return Layer(
            attention=HeadLayout(
                num_heads=heads,
                num_kv_heads=heads,
                head_dim=width,
                value_dim=value_width,
                query=rows(query, heads, width, stride=pair),
                key=rows(f"{at}.kv_b_proj", heads, width, stride=stride),
                value=rows(f"{at}.kv_b_proj", heads, value_width, start=width, stride=stride),
                output=rows(f"{at}.o_proj", heads, value_width, side="in", bias=bias),
                latent=latent,
            ),
            mlp=_swiglu(f"{path}.mlp", hidden, activation, mlp_bias) if index < dense else None,
            experts=experts(f"{path}.mlp") if index >= dense else None,
            attention_norm=norm(f"{path}.input_layernorm"),
            mlp_norm=norm(f"{path}.post_attention_layernorm"),
        )

    return frame.model(
        dim=dim,
        tied=False,
        token_embedding=f"{prefix}embed_tokens.weight",
        other_embeddings={},
        layers=frame.layers("num_hidden_layers", "layers", layer),
        final_norm=norm(f"{prefix}norm"),
    )


# --- from a config ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    """One kind of config.

    Attributes:
        layout: makes the layout.
        prefix: of the base model's names inside a model with a head.
        token_embedding: its name in the base model.
        logits: whether a config that names no class is of a model with logits.
        heads: paths under which checkpoints keep the map to the logits; the first is that of a live model.
    """

    layout: Callable[[_Frame], ModelLayout]
    prefix: str
    token_embedding: str
    logits: bool = True
    heads: tuple[str, ...] = ("lm_head",)


_LLAMA = _Family(_llama_like, "model.", "embed_tokens.weight")
_FAMILIES = {
    "bert": _Family(_bert, "bert.", "embeddings.word_embeddings.weight", logits=False),
    "deepseek_v2": _Family(_deepseek_v2, "model.", "embed_tokens.weight"),
    "gemma": _Family(_gemma, "model.", "embed_tokens.weight"),
    "gemma2": _Family(_gemma, "model.", "embed_tokens.weight"),
    "gemma3_text": _Family(_gemma, "model.", "embed_tokens.weight"),
    "gpt2": _Family(_gpt2, "transformer.", "wte.weight"),
    "gpt_neox": _Family(_gpt_neox, "gpt_neox.", "embed_in.weight", heads=("lm_head", "embed_out")),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}

_Role = Literal["logits", "states", "base"]

# How the names of classes end, and what such a model gives: logits taken with the token embedding or an unembedding;
# hidden states, read by heads of its own; hidden states, as the base model without a prefix.
_CLASSES: dict[str, _Role] = {
    "ForCausalLM": "logits",
    "LMHeadModel": "logits",
    "ForMaskedLM": "logits",
    "ForPreTraining": "logits",
    "ForSequenceClassification": "states",
    "ForTokenClassification": "states",
    "ForQuestionAnswering": "states",
    "ForMultipleChoice": "states",
    "ForNextSentencePrediction": "states",
    "Model": "base",
}


def _role(config: Mapping[str, Any], family: _Family) -> _Role:
    architectures = config.get("architectures")
    if not architectures:
        return "logits" if family.logits else "base"
    name = architectures[0] if isinstance(architectures, list | tuple) and len(architectures) == 1 else None
    if isinstance(name, str) and not name.endswith("DoubleHeadsModel"):
        for ending, role in _CLASSES.items():
            if name.endswith(ending):
                return role
    raise ValueError(
        f"architectures of a config must name one class that ends in one of {', '.join(_CLASSES)} (and is not a "
        f"DoubleHeadsModel), received {architectures!r}"
    )


def layout_of_config(
    config: Mapping[str, Any], *, prefix: str | None = None, names: Container[str] | None = None
) -> ModelLayout:
    """The layout of the model that a config of Hugging Face describes.

    Args:
        config: what ``config.json`` holds. ``architectures`` says whether the model returns logits or hidden states;
            where it is missing, decoders return logits and BERT hidden states.
        prefix: of the base model's names ("model." in LlamaForCausalLM, "" in LlamaModel). None: found among
            ``names``, or what the class has.
        names: of the tensors that a checkpoint holds. Names that differ between checkpoints of one family are taken
            from here: the prefix, Pythia's ``embed_out`` for the ``lm_head`` of a live model, and experts with maps of
            their own for the stacks of a live model.

    Raises:
        ValueError: a config of an architecture that is not described here, one whose numbers are missing or contradict
            each other (the key is named), one of quantised weights.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind.startswith(SHRUNK):
        raise ValueError(
            f"a {kind.removeprefix(SHRUNK)} that is shrunk (model_type {kind!r}) has no weights to be moved any more: "
            "take the checkpoint that it came from"
        )
    if isinstance(kind, str) and kind.startswith(BROKEN):
        raise ValueError(
            f"a {kind.removeprefix(BROKEN)} with unlearned biases (model_type {kind!r}) is more than its weights: "
            "load it (after import erlangen.interop.broken), call erlangen.breaking.fold or restore, and save it"
        )
    if kind not in _FAMILIES:
        parts = " Its text model alone may be (save that by itself)." if "text_config" in config else ""
        raise ValueError(
            f"no layout is known for model_type {kind!r}; known are {', '.join(_FAMILIES)}.{parts} Describe a live "
            "model with erlangen.gauge.describes(its class), as a function that returns a ModelLayout"
        )
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"this {kind} config has a quantization_config: rounded integer weights have no exact gauge form. "
            "Dequantise the model first (transformers: model.dequantize()) and save it"
        )
    family = _FAMILIES[kind]
    role = _role(config, family)
    if prefix is None:
        prefix = "" if role == "base" else family.prefix
        if names is not None:
            choices = (prefix, "", family.prefix)
            prefix = next((choice for choice in choices if choice + family.token_embedding in names), prefix)
    head = next((path for path in family.heads if names is not None and f"{path}.weight" in names), family.heads[0])
    return family.layout(_Frame(_Config(config), prefix, role == "logits", head, () if names is None else names))


# --- from a live model ------------------------------------------------------------------------------------------------


def register() -> None:
    """Make the models and configs of `transformers` (which must be installed) known to `model_layout`."""
    transformers = import_module("transformers")

    @describes(transformers.PreTrainedModel)
    def layout_of_model(model: Any) -> ModelLayout:
        # A class of the user's own is what the class of transformers it derives from is.
        cls = next(cls for cls in type(model).__mro__ if cls.__module__.partition(".")[0] == "transformers")
        # Unlearned biases stand beside weights that are where they were.
        kind = model.config.model_type.removeprefix(BROKEN)
        config = {**model.config.to_dict(), "architectures": [cls.__name__], "model_type": kind}
        base = model.base_model is model
        return layout_of_config(config, prefix="" if base else f"{model.base_model_prefix}.")

    @describes(transformers.PretrainedConfig)
    def layout_of_pretrained_config(config: Any) -> ModelLayout:
        return layout_of_config(config.to_dict())
