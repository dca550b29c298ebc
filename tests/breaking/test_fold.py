"""A folded model is a plain one, and computes what the broken one computes in evaluation."""

import copy

import pytest
import torch
from small_gpt import TOKENS, at_random, make

from erlangen import breaking
from erlangen.lm import GPT


def logits(model):
    return model.eval()(TOKENS)[0].detach()


MODERN = {"positions": "rotary", "rotary_fraction": 0.5, "num_kv_heads": 2, "mlp": "swiglu"}


@pytest.mark.parametrize(
    "fields",
    [{}, MODERN, MODERN | {"qk_norm": True, "attention_bias": False}, {"bias": False, "num_kv_heads": 1}],
    ids=str,
)
def test_ours(fields):
    model = at_random(breaking.break_symmetry(make(**fields)))
    with_biases = model.config.attention_bias
    model(TOKENS)  # a draw, which is not what is folded
    drawn = model(TOKENS)[0].detach()
    expected, keys = logits(model), list(make(**fields).state_dict())
    if not with_biases:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(
            ValueError, match=r"queries of layer 0 .* \(nor have 3 others\): call fold\(model, add_biases"
        ):
            breaking.fold(model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert breaking.fold(model, add_biases=not with_biases) is model
    assert (logits(model) - expected).abs().max() < 1e-12 < 1e-3 < (drawn - expected).abs().max()
    assert not hasattr(model, "symmetry_breaking") and not model._forward_pre_hooks
    if with_biases:
        assert list(model.state_dict()) == keys
    # it is the model of its config
    twin = GPT(model.config).double()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))
    assert model.config.attention_bias
    with pytest.raises(ValueError, match="nothing to fold"):
        breaking.fold(model)


def test_a_wrong_fold_shows():
    """The comparison above fails when one coordinate of one mean is lost, or a draw is folded for the mean."""
    for which in ("query", "value"):
        model = at_random(breaking.break_symmetry(make(**MODERN)))
        expected = logits(model)
        mean = model.symmetry_breaking.bias(which, 1, mean=True)
        mean[-1] = 0.0
        model.symmetry_breaking.set_mean(which, 1, mean)
        assert (logits(breaking.fold(model)) - expected).abs().max() > 1e-6


def test_values_go_where_the_design_says():
    model = at_random(breaking.break_symmetry(make(num_kv_heads=2)), ["value"])
    attention = model.blocks[1].attention
    _, mean = model.symmetry_breaking.means(1)
    before = {name: tensor.clone() for name, tensor in attention.state_dict().items()}
    # query heads 0 and 1 read value head 0, 2 and 3 read value head 1
    expected = before["output.bias"] + before["output.weight"] @ mean.view(2, 1, 8).expand(2, 2, 8).flatten()
    breaking.fold(model)
    assert torch.allclose(attention.output.bias, expected, rtol=0, atol=1e-14)
    assert torch.equal(attention.value.bias, before["value.bias"])


def test_noise_alone_leaves_nothing_to_fold():
    for settings in ({}, {"rotary": "after"}):
        plain = make(attention_bias=False, **MODERN)
        model = breaking.break_symmetry(copy.deepcopy(plain), query_mean=0.0, **settings)
        model(TOKENS)
        breaking.fold(model)
        assert torch.equal(logits(model), logits(plain)) and model.config == plain.config


def test_behind_rotary_positions_only_what_is_not_turned_folds():
    model = breaking.break_symmetry(make(**MODERN), rotary="after", query_mean=0.0)
    mean = torch.zeros(4, 8, dtype=torch.float64)
    mean[:, 4:] = 0.3  # positions turn the first half
    model.symmetry_breaking.set_mean("query", 1, mean.flatten())
    expected = logits(model)
    turned = copy.deepcopy(model)
    assert (logits(breaking.fold(model)) - expected).abs().max() < 1e-12
    turned.symmetry_breaking.set_mean("query", 1, mean.flatten() + 1e-3)
    with pytest.raises(ValueError, match="layer 1 have a mean bias behind their rotary positions"):
        breaking.fold(turned)
    assert hasattr(turned, "symmetry_breaking")


# --- models of transformers -------------------------------------------------------------------------------------------

BIASED = ("gpt2", "gpt_neox", "qwen2", "llama biased", "bert")
SWITCHED = ("llama", "qwen3", "gemma", "gemma2", "gemma3", "gpt_neox in turn")
WITHOUT = ("mistral", "phi3")


@pytest.mark.parametrize("name", BIASED + SWITCHED)
def test_families(name):
    tiny = pytest.importorskip("tiny_transformers")
    pytest.importorskip("transformers")
    plain = tiny.make(name)
    model = at_random(breaking.break_symmetry(tiny.make(name)))
    tokens = tiny.some_tokens()
    tiny.outputs(model.train(), tokens)
    expected = tiny.outputs(model.eval(), tokens)
    assert (expected - tiny.outputs(plain, tokens)).abs().max() > 1e-3
    if name in SWITCHED:
        with pytest.raises(ValueError, match="add_biases=True"):
            breaking.fold(model)
        assert hasattr(model, "symmetry_breaking") and not model.config.attention_bias
    breaking.fold(model, add_biases=name in SWITCHED)
    assert (tiny.outputs(model, tokens) - expected).abs().max() < 1e-12
    assert type(model) is type(plain) and type(model.config) is type(plain.config)
    if name in SWITCHED:
        assert model.config.attention_bias
    else:
        assert list(model.state_dict()) == list(plain.state_dict())
        assert model.config.to_dict() == plain.config.to_dict()


@pytest.mark.parametrize("name", WITHOUT)
def test_families_without_a_switch_say_so(name):
    tiny = pytest.importorskip("tiny_transformers")
    pytest.importorskip("transformers")
    model = at_random(breaking.break_symmetry(tiny.make(name)))
    with pytest.raises(ValueError, match=f"of the kind {name} have no switch .* keep it broken"):
        breaking.fold(model, add_biases=True)
    assert hasattr(model, "symmetry_breaking")
    noisy = breaking.break_symmetry(tiny.make(name), query_mean=0.0)
    assert torch.equal(
        tiny.outputs(breaking.fold(noisy), tiny.some_tokens()), tiny.outputs(tiny.make(name), tiny.some_tokens())
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_rows_that_do_not_sum_to_one(dropout):
    """Dropout of attention weights scales what a value bias comes out as: the mean stays with the values then."""
    tiny = pytest.importorskip("tiny_transformers")
    pytest.importorskip("transformers")
    model = at_random(breaking.break_symmetry(tiny.make("gpt2", attn_pdrop=dropout), query_mean=0.0), ["value"])
    attention = model.transformer.h[0].attn
    output, fused = attention.c_proj.bias.clone(), attention.c_attn.bias.clone()
    breaking.fold(model)
    assert torch.equal(attention.c_proj.bias, output) == bool(dropout)
    assert torch.equal(attention.c_attn.bias, fused) != bool(dropout)
    assert torch.equal(attention.c_attn.bias[:16], fused[:16]), "nothing on queries and keys"
