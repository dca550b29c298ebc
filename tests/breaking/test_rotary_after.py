"""rotary="after": against the models' own attention, with the bias added to queries that are turned already."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from small_gpt import TOKENS, at_random, make

from erlangen import breaking
from erlangen.breaking._rotary import recorded_turns, turn, unturn
from erlangen.gauge.layout import Rotary

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, "rope_theta": 100.0}


def biases(model, *, mean, heads):
    return [model.symmetry_breaking.bias("query", layer, mean=mean).view(heads, 1, -1) for layer in range(2)]


def with_bias_after(monkeypatch, model, per_layer):
    """Has the function that turns queries and keys of a family add to the queries, layer after layer."""
    module = sys.modules[
        type(model).__mro__[1].__module__ if "erlangen" in type(model).__module__ else type(model).__module__
    ]
    honest, calls = module.apply_rotary_pos_emb, []

    def after(query, key, cos, sin, **more):
        query, key = honest(query, key, cos, sin, **more)
        calls.append(1)
        return query + per_layer[(len(calls) - 1) % 2], key

    monkeypatch.setattr(module, "apply_rotary_pos_emb", after)


CASES = {
    "llama": {},
    "llama scaled": {"rope_parameters": YARN},
    "qwen3": {},
    "qwen3 square": {},
    "gemma3": {},
    "gpt_neox": {},
    "phi3": {},
}


@pytest.mark.parametrize("case", CASES)
def test_families(case, monkeypatch):
    tiny = pytest.importorskip("tiny_transformers")
    transformers = pytest.importorskip("transformers")
    name = case.split()[0]
    heads = 2 if name in ("gpt_neox", "phi3") else 4
    # as many tokens as heads: the axes of heads and tokens are as long as each other
    tokens = tiny.some_tokens(length=4 if "square" in case else 5)
    plain = tiny.make(name, **CASES[case])
    model = at_random(breaking.break_symmetry(copy.deepcopy(plain), rotary="after", value_std=0.0), ["query"])
    found = tiny.outputs(model, tokens)
    cached = []
    cache = transformers.DynamicCache(config=model.config)
    with tiny.InFloat64(), torch.no_grad():
        for place in range(tokens.shape[1]):
            cached.append(model(input_ids=tokens[:, place : place + 1], past_key_values=cache, use_cache=True).logits)
    trained = copy.deepcopy(model)
    drawn = tiny.outputs(trained.train(), tokens)
    if case == "llama scaled":
        with recorded_turns(model) as turns, tiny.InFloat64():
            model(input_ids=tokens)
        assert abs(turns[0].cos.square() + turns[0].sin.square() - 1).min() > 0.01, "tables of another scale"
    for result, mean in ((found, True), (drawn, False)):
        with monkeypatch.context() as patch:
            with_bias_after(patch, plain, biases(trained, mean=mean, heads=heads))
            expected = tiny.outputs(plain, tokens)
        assert (result - expected).abs().max() < 1e-12
    assert (torch.cat(cached, dim=1) - found).abs().max() < 1e-12
    before = breaking.break_symmetry(copy.deepcopy(plain), rotary="before", value_std=0.0)
    assert (tiny.outputs(at_random(before, ["query"]), tokens) - found).abs().max() > 1e-4, "the order matters"
    restored = breaking.restore(model)
    assert torch.equal(tiny.outputs(restored, tokens), tiny.outputs(plain, tokens))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in restored.modules())


@pytest.mark.parametrize(
    "fields", [{"positions": "rotary"}, {"positions": "rotary", "rotary_fraction": 0.5, "num_kv_heads": 2}], ids=str
)
def test_ours(fields, monkeypatch):
    plain = make(**fields)
    model = at_random(breaking.break_symmetry(copy.deepcopy(plain), rotary="after", value_std=0.0), ["query"])
    honest = F.scaled_dot_product_attention
    for training in (False, True):
        result = model.train(training)(TOKENS)[0]
        per_layer, calls = biases(model, mean=not training, heads=4), []

        def after(query, key, value, per_layer=per_layer, calls=calls, **more):
            calls.append(1)
            return honest(query + per_layer[len(calls) - 1], key, value, **more)

        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", after)
            expected = plain(TOKENS)[0]
        assert (result - expected).abs().max() < 1e-12
        # recomputation sees it as well
        model.gradient_checkpointing = True
        count = model.symmetry_breaking.num_draws.clone()
        again = copy.deepcopy(model)
        again.symmetry_breaking.num_draws.sub_(int(training))
        assert torch.equal(again(TOKENS)[0], result) and again.symmetry_breaking.num_draws == count
        again(TOKENS)[0].sum().backward()
        model.gradient_checkpointing = False


def test_without_rotary_positions_both_orders_are_one():
    models = [breaking.break_symmetry(make(), rotary=rotary, seed=3) for rotary in ("before", "after")]
    assert torch.equal(models[0](TOKENS)[0], models[1](TOKENS)[0])
    assert (breaking.fold(models[1]).eval()(TOKENS)[0] - models[0].eval()(TOKENS)[0]).abs().max() < 1e-12


def test_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match="norms its queries inside"):
        breaking.break_symmetry(make(positions="rotary", qk_norm=True), rotary="after")
    with pytest.raises(ValueError, match="rotary must be"):
        breaking.break_symmetry(make(), rotary="behind")
    model = breaking.break_symmetry(make(positions="rotary"), rotary="after")
    with pytest.raises(TypeError, match="without a table of its rotary positions"):
        model.blocks[0].attention(torch.zeros(1, 3, 32, dtype=torch.float64))


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_turn_and_its_inverse(pairs):
    """Against complex numbers, in tables of another scale."""
    generator = torch.Generator().manual_seed(0)
    rotary = Rotary(dim=6, pairs=pairs)
    x = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64)
    angle = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    factor = 1.3 * torch.polar(torch.ones_like(angle), angle)
    first, second = rotary.planes().unbind(1)
    expected = x.clone()
    turned = torch.complex(x[..., first], x[..., second]) * factor[:, None]
    expected[..., first], expected[..., second] = turned.real, turned.imag
    table = breaking._rotary.Turn(factor.real, factor.imag)
    assert (turn(x, table, rotary) - expected).abs().max() < 1e-14
    assert (unturn(turn(x, table, rotary), table, rotary) - x).abs().max() < 1e-14


def test_recorded_turns_are_those_of_the_call():
    model = make(positions="rotary", rotary_fraction=0.5)
    with recorded_turns(model) as turns:
        model(TOKENS[:, :7])
    assert set(turns) == {0, 1} and turns[0].cos.shape == (1, 7, 2)
    x = torch.randn(1, 4, 7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(turn(x, turns[1], Rotary(dim=4)), model.rotary(x))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with recorded_turns(make()) as none:
        pass
    assert none == {}
