"""The pairs of a model's heads: what they read is what is stored, and moving them changes nothing."""

import pytest
import torch
from head_moves import make_gpt, matrices
from torch import nn

from erlangen import breaking
from erlangen.gauge import _pairs

tiny = pytest.importorskip("tiny_transformers")
TOKENS = tiny.some_tokens()
NORMED = {"qwen3", "gemma3"}


@pytest.mark.parametrize("name", tiny.MODELS)
def test_moving_the_pairs_of_any_model_keeps_its_function(name):
    pytest.importorskip("transformers")
    model, generator = tiny.make(name), torch.Generator().manual_seed(1)
    sectors = _pairs.free_sectors(model)
    assert sectors == (("vo",) if name in NORMED else ("qk", "vo"))
    pairs, parameters = _pairs.head_pairs(model, sectors), _pairs.parameters_by_name(model)
    assert [(pair.layer, pair.sector) for pair in pairs] == [(layer, s) for layer in range(2) for s in sectors]
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        expected = tiny.outputs(model, TOKENS)
    for pair in pairs:
        first, second = pair.factors(lambda name: before[name])
        assert first.shape[:2] == second.shape[:2] == (pair.heads.num_kv_heads, pair.width)
        pair.put(lambda name: parameters[name], first, second)
        assert all(torch.equal(parameters[name], tensor) for name, tensor in before.items())
    for pair in pairs:
        first, second = pair.factors(lambda name: before[name])
        matrix = matrices(pair, len(first), generator)
        pair.put(lambda name: parameters[name], matrix @ first, torch.linalg.inv(matrix).mT @ second)
        assert any(not torch.allclose(parameters[name], before[name]) for name in pair.names)
    with torch.no_grad():
        torch.testing.assert_close(tiny.outputs(model, TOKENS), expected, rtol=1e-8, atol=1e-8)


def test_a_matrix_outside_the_group_is_seen():
    model = make_gpt(positions="rotary")
    parameters, tokens = _pairs.parameters_by_name(model), torch.arange(8)[None]
    pair = _pairs.head_pairs(model)[0]
    expected = model(tokens)[0]
    first, second = (factor.clone() for factor in pair.factors(lambda name: parameters[name].detach()))
    matrix = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pair.put(lambda name: parameters[name], matrix @ first, torch.linalg.inv(matrix).mT @ second)
    assert (model(tokens)[0] - expected).abs().max() > 1e-6


def test_full_rank_is_checked_by_head():
    model = make_gpt(positions="rotary", rotary_fraction=0.5, num_kv_heads=2)
    pairs, parameters = _pairs.head_pairs(model), _pairs.parameters_by_name(model)
    _pairs.check_rank(pairs, parameters)
    with torch.no_grad():  # one plane of the keys of head 1: coordinates 1 and 1 + 2
        key = model.blocks[1].attention.key
        key.weight[[8 + 1, 8 + 3]] = key.bias[[8 + 1, 8 + 3]] = 0.0
    with pytest.raises(ValueError, match="qk pair of layer 1, head 1, has not full rank"):
        _pairs.check_rank(pairs, parameters)


def test_what_is_refused():
    with pytest.raises(ValueError, match="queries and keys of layer 0 are normalised"):
        _pairs.head_pairs(make_gpt(qk_norm=True))
    assert len(_pairs.head_pairs(make_gpt(qk_norm=True), ("vo",))) == 2
    with pytest.raises(ValueError, match="sectors must be of qk, vo, received ov"):
        _pairs.head_pairs(make_gpt(), ("ov",))
    with pytest.raises(TypeError, match="no layout is known for Linear"):
        _pairs.head_pairs(nn.Linear(2, 2))
    broken = breaking.break_symmetry(make_gpt())
    with pytest.raises(ValueError, match="unlearned biases"):
        _pairs.head_pairs(broken)
    assert len(_pairs.head_pairs(broken, broken=True)) == 4
    fused = make_gpt()
    fused.blocks[0].attention.query = nn.Sequential(fused.blocks[0].attention.query)
    with pytest.raises(ValueError, match=r"names a tensor blocks.0.attention.query.weight, which the model does not"):
        _pairs.head_pairs(fused)
    other = make_gpt()
    other.blocks[0].attention.query = nn.Linear(32, 16)
    with pytest.raises(ValueError, match=r"must have the shape \(32, 32\)"):
        _pairs.head_pairs(other)


def test_what_an_optimiser_has_to_own():
    model = make_gpt()
    pairs = _pairs.head_pairs(model)
    everything = torch.optim.SGD(model.parameters())
    assert _pairs.trained_pairs(everything, model, pairs) == pairs
    with pytest.raises(ValueError, match=r"a parameter of shape \[3\] that is not of this model"):
        _pairs.trained_pairs(torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(3))]), model, pairs)
    part = [p for name, p in model.named_parameters() if name != "blocks.1.attention.key.bias"]
    with pytest.raises(ValueError, match=r"part of the qk pair of layer 1, not blocks.1.attention.key.bias"):
        _pairs.trained_pairs(torch.optim.SGD(part), model, pairs)
    first = torch.optim.SGD(model.blocks[0].parameters())
    assert _pairs.trained_pairs(first, model, pairs) == pairs[:2]
    with pytest.raises(ValueError, match="moves none of the pairs"):
        _pairs.trained_pairs(torch.optim.SGD(model.norm.parameters()), model, pairs)
