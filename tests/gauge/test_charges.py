"""Noether charges: zero where the symmetry holds, and not where it is broken (research: invariants of a test)."""

import pytest
import torch

from erlangen import breaking, gauge
from erlangen.lm import GPT, GPTConfig
from erlangen.optim import ECD

VARIANTS = {
    "plain": {},
    "unbiased": {"attention_bias": False},
    "grouped": {"num_kv_heads": 2},
    "rotary": {"positions": "rotary"},
    "partly rotary": {"positions": "rotary", "rotary_fraction": 0.5, "num_kv_heads": 1},
    "qk-norm": {"qk_norm": True, "positions": "rotary", "mlp": "swiglu"},
}


def make(seed=0, **fields):
    config = GPTConfig(vocab_size=32, context_length=16, num_layers=2, num_heads=4, dim=32, **fields)
    return GPT(config, generator=torch.Generator().manual_seed(seed)).double()


def run(model, optimizer, steps=20):
    """Train on fresh minibatches; the largest charge of each sector over layers, heads and steps."""
    generator = torch.Generator().manual_seed(1)
    largest = {}
    for _ in range(steps):
        tokens = torch.randint(32, (4, 17), generator=generator)
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(lambda loss=loss: loss)
        for sectors in gauge.charges(model, optimizer).values():
            for sector, heads in sectors.items():
                largest[sector] = max([largest.get(sector, 0.0), *heads])
    return largest


def ecd(model, **settings):
    return ECD(model.parameters(), lr=0.5, eta=20.0, F0=0.0, **settings)


def sgdm(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("make_optimizer", [ecd, sgdm])
def test_symmetric_runs_keep_zero_charge(fields, make_optimizer):
    model = make(**fields)
    largest = run(model, make_optimizer(model))
    assert largest.keys() == {"qk", "vo"}
    assert max(largest.values()) < 1e-12


def test_euler_kick_keeps_zero_charge_too_with_the_global_dot_product():
    model = make()
    assert max(run(model, ecd(model, kick="euler")).values()) < 1e-12


def test_the_published_dot_product_leaks_charge():
    model = make()
    assert max(run(model, ecd(model, kick="euler", dot="per_tensor")).values()) > 1e-5


def test_a_random_turn_makes_charge():
    model = make()
    assert min(run(model, ecd(model, nu=0.1)).values()) > 1e-3


def test_adamw_does_not_conserve():
    model = make()
    assert min(run(model, torch.optim.AdamW(model.parameters(), lr=1e-3)).values()) > 1e-4


def broken(query_mean=0.0, query_std=0.0, value_mean=0.0, value_std=0.0, **fields):
    model = make(**fields)
    return breaking.break_symmetry(
        model, query_mean=query_mean, query_std=query_std, value_mean=value_mean, value_std=value_std
    )


@pytest.mark.parametrize("fields", [{}, {"positions": "rotary"}, {"num_kv_heads": 2}], ids=str)
def test_a_mean_alone_breaks_nothing_when_biases_are_learned(fields):
    model = broken(query_mean=0.5, value_mean=0.5, **fields)
    largest = run(model, ecd(model))
    assert max(largest["qk_affine"], largest["vo_affine"]) < 1e-12
    assert min(largest["qk"], largest["vo"]) > 1e-3


def test_a_mean_breaks_when_biases_are_not_learned():
    model = broken(query_mean=0.5, attention_bias=False)
    largest = run(model, ecd(model))
    assert largest.keys() == {"qk", "vo"}
    assert largest["qk"] > 1e-3
    assert largest["vo"] < 1e-12


def test_noise_breaks_the_sector_it_is_in():
    model = broken(query_mean=0.5, query_std=(0.05, 0.15))
    largest = run(model, ecd(model))
    assert largest["qk_affine"] > 1e-3
    assert largest["vo"] < 1e-12
    model = broken(value_std=0.05)
    largest = run(model, ecd(model))
    assert largest["qk"] < 1e-12
    assert largest["vo"] > 1e-4


def test_charge_is_the_angular_momentum_of_a_turn():
    """J has the value a hand-made velocity gives it: turning a head's queries with the generator A."""
    model = make(attention_bias=False)
    optimizer = sgdm(model)
    run(model, optimizer, steps=1)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"].zero_()
    weight = model.blocks[0].attention.query.weight
    head = weight.detach()[:8]
    turn = torch.zeros(8, 8, dtype=torch.float64)
    turn[0, 1], turn[1, 0] = 1.0, -1.0
    optimizer.state[weight]["momentum_buffer"][:8] = turn @ head
    moment = turn @ head @ head.mT
    expected = (moment - moment.mT).norm() / (2 * moment.norm())
    found = gauge.charges(model, optimizer)
    assert found[0]["qk"][0] == pytest.approx(expected.item(), abs=1e-12)
    assert found[0]["qk"][1:] == [0.0, 0.0, 0.0]
    assert found[1] == {"qk": [0.0] * 4, "vo": [0.0] * 4}


def test_errors():
    model = make()
    with pytest.raises(ValueError, match="take at least one step"):
        gauge.charges(model, sgdm(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="momentum"):
        run(model, optimizer, steps=1)
    with pytest.raises(TypeError, match="no layout is known for Linear"):
        gauge.charges(torch.nn.Linear(2, 2), optimizer)


def test_layout():
    layout = gauge.head_layouts(make(num_kv_heads=2, positions="rotary", rotary_fraction=0.5))[1]
    assert (layout.num_heads, layout.num_kv_heads, layout.head_dim, layout.rotary_dim) == (4, 2, 8, 4)
    assert layout.group_size == 2
    assert layout.query.path == "blocks.1.attention.query"
    ways = {
        "query": gauge.rows("q", 4, 8),
        "key": gauge.rows("k", 2, 8),
        "value": gauge.rows("v", 2, 8),
        "output": gauge.rows("o", 4, 8, side="in"),
    }
    gauge.HeadLayout(num_heads=4, num_kv_heads=2, head_dim=8, **ways)
    with pytest.raises(ValueError, match="divide"):
        gauge.HeadLayout(num_heads=4, num_kv_heads=3, head_dim=8, **ways)
    with pytest.raises(ValueError, match="rotary dim"):
        gauge.HeadLayout(num_heads=4, num_kv_heads=2, head_dim=8, **ways, rotary=gauge.Rotary(dim=3))
    with pytest.raises(ValueError, match="the key of this layout has 4 slices"):
        gauge.HeadLayout(num_heads=4, num_kv_heads=4, head_dim=8, **ways)
