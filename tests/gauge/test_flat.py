"""Counts of flat directions against ranks of Jacobians, and against the numbers of known models."""

from dataclasses import replace

import pytest
import torch

from erlangen import gauge
from erlangen.gauge import MLP, Experts, HeadLayout, Layer, ModelLayout, Norm, Rotary, rows
from erlangen.lm import GPT, GPTConfig

# --- known models -----------------------------------------------------------------------------------------------------

GPT2 = {"model_type": "gpt2", "vocab_size": 50257}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
KNOWN = {
    "GPT-2": (GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12}, 1_347_353, 124_439_808),
    "GPT-2 XL": (GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 11_215_521, 1_557_611_200),
    "Llama-2-7B": (
        LLAMA | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
        25_917_441,
        6_738_415_616,
    ),
    "Llama-3-8B": (LLAMA, 13_342_721, 8_030_261_248),
    "Llama-3-70B": (
        LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
        47_738_881,
        70_553_706_496,
    ),
    "Llama-3.2-1B": (
        LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
        729_089,
        1_235_814_400,
    ),
    "Qwen3-8B": (
        LLAMA | {"model_type": "qwen3", "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936},
        13_854_369,
        8_190_735_360,
    ),
    "Mistral-7B": (LLAMA | {"model_type": "mistral", "vocab_size": 32000}, 13_342_721, 7_241_732_096),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_models(name):
    config, total, parameters = KNOWN[name]
    flat = gauge.flat_directions(config)
    assert (flat.total, flat.parameters) == (total, parameters)
    assert flat.share == total / parameters


def test_sectors_of_known_models():
    qwen = gauge.flat_directions(KNOWN["Qwen3-8B"][0]).sectors
    assert (qwen["query_key"], qwen["value_output"], qwen["residual"]) == (3_744, 4_718_592, 8_386_560)
    gpt2 = gauge.flat_directions(KNOWN["GPT-2"][0]).sectors
    assert (gpt2["query_key"], gpt2["value_output"], gpt2["key_bias"], gpt2["residual"]) == (589_824, 589_824, 9216, 0)
    lite = gauge.flat_directions(
        {
            "model_type": "deepseek_v2",
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "vocab_size": 102400,
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 1408,
        }
    )
    assert lite.sectors["query_key"] == lite.sectors["value_output"] == 7_077_888
    assert lite.parameters == 15_706_484_224


def test_it_prints_as_a_table():
    text = str(gauge.flat_directions(KNOWN["GPT-2"][0]))
    assert "key_bias" in text and "9,216" in text and "1,347,353" in text and "1.0827 %" in text
    assert "latent" not in text


# --- Jacobians --------------------------------------------------------------------------------------------------------


def nullity(function, parameters, vocab_size, *, length=6, seed=5):
    """Zero singular values of the Jacobian of a function of tokens, and the gap between them and the others.

    Rows are random combinations of the outputs for one sequence each, more of them than there are parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    size = sum(parameter.numel() for parameter in parameters)
    blocks = []
    while sum(map(len, blocks)) < 1.2 * size + 40:
        y = function(torch.randint(vocab_size, (1, length), generator=generator)).flatten()
        directions = torch.randn(min(40, len(y) // 2), len(y), dtype=y.dtype, generator=generator)
        gradients = torch.autograd.grad(
            y, parameters, directions, is_grads_batched=True, allow_unused=True, materialize_grads=True
        )
        blocks.append(torch.cat([gradient.flatten(1) for gradient in gradients], dim=1))
    values = torch.linalg.svdvals(torch.cat(blocks))
    values = values / values[0]
    rank = int((values > 1e-12).sum())
    return size - rank, values[rank - 1].item(), values[rank].item() if rank < size else 0.0


def assert_counted(flat, function, parameters, vocab_size):
    found, smallest, zero = nullity(function, parameters, vocab_size)
    assert smallest > 1e-10 and zero < 1e-14, f"no gap: {smallest:.1e}, {zero:.1e}"
    assert flat.total == sum(flat.sectors.values()) == found


def randomise(named_parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in named_parameters:
            draw = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            gain = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.3 * draw.clamp(-2, 2) if gain else draw * (0.5 if parameter.ndim == 1 else 0.7))


OURS = {
    "GPT-2": {},
    "untied": {"tie_embeddings": False},
    "rotary": {"positions": "rotary"},
    "rotary, swiglu, untied": {"positions": "rotary", "tie_embeddings": False, "mlp": "swiglu"},
    "partly rotary": {"positions": "rotary", "rotary_fraction": 0.5},
    "one key head, unbiased": {"num_kv_heads": 1, "bias": False},
    "attention unbiased": {"attention_bias": False},
    "attention unbiased, grouped": {"attention_bias": False, "num_heads": 4, "num_kv_heads": 2},
    "norms unbiased, untied": {"bias": False, "tie_embeddings": False},
    "no bias, untied": {"bias": False, "attention_bias": False, "tie_embeddings": False},
    "qk-norm": {"qk_norm": True},
    "qk-norm, partly rotary, grouped": {
        "qk_norm": True,
        "positions": "rotary",
        "rotary_fraction": 0.5,
        "num_kv_heads": 1,
    },
    "prelu": {"mlp": "prelu"},
    "prelu, rotary, untied, unbiased": {"mlp": "prelu", "positions": "rotary", "tie_embeddings": False, "bias": False},
}


@pytest.mark.parametrize("name", OURS)
def test_our_models(name):
    shape = {"vocab_size": 11, "dim": 8, "num_heads": 2, "num_layers": 1, "context_length": 6, "mlp_dim": 6}
    model = GPT(GPTConfig(**shape | {"rotary_base": 10.0} | OURS[name])).double()
    randomise(model.named_parameters())
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.0
    flat = gauge.flat_directions(model)
    assert flat.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert_counted(flat, lambda tokens: model(tokens)[0].log_softmax(-1), list(model.parameters()), 11)


ROPE = {"rope_type": "default", "rope_theta": 10.0}
PARTLY = {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}
TWO = {"num_hidden_layers": 2}
# Quadratic forms of latents need more tokens than they have numbers; likewise the parallel feed-forward layer.
LATENT = {"hidden_size": 6, "kv_lora_rank": 4, "q_lora_rank": 4, "vocab_size": 24}
FOREIGN = {
    "gpt2": {"n_layer": 2, "n_inner": 3},
    "gpt2 untied": {},
    "gpt2 base": {},
    "gpt_neox": PARTLY | {"vocab_size": 30, "intermediate_size": 3},
    "gpt_neox tied": PARTLY | TWO | {"vocab_size": 16, "intermediate_size": 3, "tie_word_embeddings": True},
    "gpt_neox attention unbiased": PARTLY | {"vocab_size": 30, "intermediate_size": 3, "attention_bias": False},
    "gpt_neox in turn": PARTLY,
    "llama": {},
    "llama with wide heads": {"head_dim": 10, "num_attention_heads": 2, "num_key_value_heads": 1},
    "llama with relu": {"hidden_act": "relu"},
    "llama biased": {},
    "llama tied": TWO | {"intermediate_size": 4},
    "llama base": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": PARTLY,
    "gemma2": {"num_key_value_heads": 1, "num_attention_heads": 2},
    "gemma2 biased": {"attention_bias": True},
    "gemma2 untied": {},
    "gemma3": {},
    "bert": TWO | {"intermediate_size": 3},
    "bert masked": {},
    "deepseek_v2": LATENT,
    "deepseek_v2 lite": LATENT | {"q_lora_rank": None},
    "deepseek_v2 experts": LATENT | {"first_k_dense_replace": 0},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_models_of_transformers(name):
    pytest.importorskip("transformers")
    from tiny_transformers import MODELS, make, outputs, without_eps

    base = max((known for known in MODELS if name.startswith(known)), key=len)
    family = name.split()[0]
    fields = {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}
    if family not in ("gpt2", "bert"):
        fields["rope_parameters"] = ROPE
    if family == "gemma3":
        fields["rope_parameters"] = {"full_attention": ROPE, "sliding_attention": ROPE}
    model = without_eps(make(base, **fields | FOREIGN[name]))
    layout = gauge.model_layout(model)
    shapes = layout.tensor_shapes()
    # Heads that read hidden states are held fixed.
    parameters = [tensor for key, tensor in model.named_parameters() if key in shapes]

    def function(tokens):
        types = None
        if family == "bert":
            seed = int((tokens * torch.arange(1, tokens.shape[1] + 1)).sum())
            types = torch.randint(2, tokens.shape, generator=torch.Generator().manual_seed(seed))
        y = outputs(model, tokens, types)
        return y.log_softmax(-1) if layout.tied or layout.unembedding is not None else y

    flat = gauge.flat_directions(model)
    assert flat.parameters == sum(parameter.numel() for parameter in parameters)
    assert_counted(flat, function, parameters, layout.vocab_size)
    assert gauge.flat_directions(layout) == flat


def test_a_wrong_count_is_seen():
    """Eps in norms is what the count takes as 0: with it, a scale less is flat."""
    model = GPT(GPTConfig(vocab_size=11, dim=8, num_heads=2, num_layers=1, context_length=6, mlp_dim=6)).double()
    randomise(model.named_parameters())
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.1
    flat = gauge.flat_directions(model)
    found, *_ = nullity(lambda tokens: model(tokens)[0].log_softmax(-1), list(model.parameters()), 11)
    assert found == flat.total - flat.sectors["residual_scale"]


# --- layouts that no family has, run by the interpreter of layouts ----------------------------------------------------


def made_up(
    *,
    kind="rms",
    norm_bias=False,
    gain=True,
    qk_gain=None,
    over="head",
    turned=0,
    heads=2,
    kv_heads=2,
    bias=False,
    output_bias=False,
    soft_cap=None,
    logit_cap=None,
    parallel=False,
    shared=False,
    out_kind=None,
    out_bias=False,
    activation="silu",
    gated=True,
    tied=False,
    head_bias=False,
    others=0,
    width=4,
    logits=True,
    experts=0,
    softmax=True,
    router_bias=False,
):
    """One layer of a decoder, dim 8."""

    def norm(path, kind=kind, bias=norm_bias, gain=gain):
        return Norm(path=path, kind=kind, eps=0.0, gain=gain, bias=bias)

    qk_norm = {
        None: False,
        False: True,
        True: (Norm(path="q_norm", kind="rms", eps=0.0), Norm(path="k_norm", kind="rms", eps=0.0)),
    }[qk_gain]
    attention = HeadLayout(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        query=rows("query", heads, width, bias=bias),
        key=rows("key", kv_heads, width, bias=bias),
        value=rows("value", kv_heads, width, bias=bias),
        output=rows("output", heads, width, side="in", bias=output_bias),
        rotary=Rotary(dim=turned, pairs="interleaved") if turned else None,
        qk_norm=qk_norm,
        qk_norm_over=over,
        soft_cap=soft_cap,
    )

    def mlp(path, width, bias, output_bias):
        return MLP(
            up=rows(f"{path}up", 1, width, bias=bias),
            gate=rows(f"{path}gate", 1, width, bias=bias) if gated else None,
            down=rows(f"{path}down", 1, width, side="in", bias=output_bias),
            activation=activation,
        )

    layer = Layer(
        attention=attention,
        mlp=None if experts else mlp("", 5, bias, output_bias),
        experts=Experts(
            router=rows("router", 1, experts, bias=router_bias),
            experts=tuple(mlp(f"{number}.", 3, False, False) for number in range(experts)),
            shared=mlp("shared.", 2, bias, output_bias) if experts > 3 else None,
            softmax=softmax,
        )
        if experts
        else None,
        attention_norm=norm("attention_norm"),
        mlp_norm=norm("attention_norm" if shared else "mlp_norm"),
        attention_out_norm=norm("attention_out_norm", out_kind, out_bias) if out_kind else None,
        mlp_out_norm=norm("mlp_out_norm", out_kind, out_bias) if out_kind else None,
        parallel=parallel,
    )
    return ModelLayout(
        kind="made up",
        dim=8,
        vocab_size=16,
        token_embedding="tokens.weight",
        layers=(layer,),
        other_embeddings={"positions.weight": 6} if others else {},
        final_norm=norm("final_norm"),
        unembedding=rows("head", 1, 16, bias=head_bias) if logits and not tied else None,
        tied=tied,
        soft_cap=logit_cap,
    )


LN = {"kind": "layer"}
MADE_UP = {
    "no positions": {"kv_heads": 1},
    "capped scores, biases": {"bias": True, "output_bias": True, "soft_cap": 3.0},
    "capped logits": {"logit_cap": 5.0, "others": 1},
    "capped logits, tied": {"logit_cap": 5.0, "tied": True, "others": 1},
    "capped logits, tied, LayerNorm": LN | {"logit_cap": 5.0, "tied": True, "others": 1, "norm_bias": True},
    "one norm of both branches": LN | {"parallel": True, "shared": True, "norm_bias": True, "bias": True, "others": 1},
    "parallel, biases": {"parallel": True, "bias": True, "output_bias": True, "others": 1},
    "parallel, LayerNorm, biases": LN | {"parallel": True, "bias": True, "output_bias": True, "others": 1},
    "norms of all heads": {"qk_gain": True, "over": "all", "heads": 4, "width": 2},
    "norms of all heads, rotary": {"qk_gain": True, "over": "all", "turned": 2},
    "norms of all heads without gains": {"qk_gain": False, "over": "all", "turned": 2, "width": 5, "kv_heads": 1},
    "qk-norm with gains, partly rotary": {"qk_gain": True, "turned": 2, "bias": True},
    "no gains": {"gain": False, "tied": True, "others": 1},
    "no gains, tied, LayerNorm": LN | {"gain": False, "tied": True, "others": 1},
    "no gains, tied, LayerNorm with bias": LN | {"gain": False, "tied": True, "others": 1, "norm_bias": True},
    "no gains, tied, LayerNorm, capped logits": LN | {"gain": False, "tied": True, "others": 1, "logit_cap": 5.0},
    "no gains, untied, LayerNorm": LN | {"gain": False, "others": 1},
    "out norms": LN | {"out_kind": "layer", "out_bias": True, "output_bias": True, "others": 1},
    "out norms without gains": {"gain": False, "out_kind": "rms", "others": 1},
    "out LayerNorms without gains": {"gain": False, "out_kind": "layer", "others": 1},
    "RMS out norms of a centred stream": LN | {"out_kind": "rms", "norm_bias": True, "others": 1},
    "bias of logits": {"head_bias": True},
    "bias of logits, LayerNorm": LN | {"head_bias": True},
    "bias of logits, LayerNorm with bias": LN | {"head_bias": True, "norm_bias": True},
    "gated relu": {"activation": "relu", "others": 1},
    "relu": {"activation": "relu", "gated": False, "bias": True, "others": 1},
    "wide heads": {"width": 10, "others": 1, "heads": 1, "kv_heads": 1},
    "wide heads, biases": LN
    | {"width": 10, "others": 1, "kv_heads": 1, "bias": True, "output_bias": True, "norm_bias": True},
    "value biases without output bias": {"bias": True, "heads": 3, "kv_heads": 3, "others": 1},
    "experts": {"experts": 4, "others": 1, "bias": True, "output_bias": True},
    "experts of relu, without what they share": {"experts": 3, "others": 1, "activation": "relu"},
    "experts without gates": {"experts": 3, "others": 1, "gated": False, "router_bias": True},
    "experts with other scores": {"experts": 3, "others": 1, "softmax": False, "router_bias": True},
    "experts behind a LayerNorm": LN | {"experts": 3, "others": 1},
    "experts behind a LayerNorm with bias": LN | {"experts": 3, "others": 1, "norm_bias": True},
    "experts behind a LayerNorm, biased scores": LN
    | {"experts": 4, "others": 1, "norm_bias": True, "router_bias": True},
    "hidden states": LN | {"logits": False, "others": 1, "norm_bias": True},
}


@pytest.mark.parametrize("name", MADE_UP)
def test_layouts_that_no_family_has(name):
    from layout_interpreter import interpret

    layout = made_up(**MADE_UP[name])
    tensors = {
        key: torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        for key, shape in layout.tensor_shapes().items()
    }
    randomise(tensors.items())

    def function(tokens):
        y = interpret(layout, tensors, tokens)
        return y.log_softmax(-1) if layout.tied or layout.unembedding is not None else y

    assert_counted(gauge.flat_directions(layout), function, list(tensors.values()), layout.vocab_size)


# --- what is not counted ----------------------------------------------------------------------------------------------


def test_what_is_not_counted_is_refused():
    layout = made_up()
    (layer,) = layout.layers
    for wrong in (
        replace(layout, final_norm=None),
        replace(layout, embedding_norm=layout.final_norm),
        replace(layout, layers=(replace(layer, mlp_norm=None),)),
        replace(layout, layers=(replace(layer, attention_sum_norm=layer.mlp_norm),)),
    ):
        with pytest.raises(ValueError, match="rank of a Jacobian"):
            gauge.flat_directions(wrong)
    with pytest.raises(ValueError, match="one kind, received layer and rms"):
        gauge.flat_directions(replace(layout, final_norm=replace(layout.final_norm, kind="layer")))
    with pytest.raises(TypeError, match="describes"):
        gauge.flat_directions(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="latent of width 1536"):
        gauge.flat_directions(
            {
                "model_type": "deepseek_v2",
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "vocab_size": 8,
                "first_k_dense_replace": 1,
            }
        )
