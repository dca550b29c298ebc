"""Diagnostics of a training run, against closed forms, dense products and moves of gauge."""

import json
import math
from itertools import pairwise

import head_moves
import pytest
import torch
from head_moves import VARIANTS, factors_of, make_gpt, move_heads
from torch import nn

from erlangen import breaking, gauge
from erlangen.gauge import _pairs
from erlangen.lm import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def descend(model, optimizer, monitor=None):
    optimizer.zero_grad()
    head_moves.loss_of(model, head_moves.some_tokens(model)).backward()
    if monitor is not None:
        monitor.before_step()
    optimizer.step()
    if monitor is not None:
        monitor.after_step()


def each_pair(model):
    for pair in _pairs.head_pairs(model):
        yield pair, *factors_of(model, pair), _pairs.parameters_by_name(model)


def products(pair, first, second):
    """What is invariant of each head, as dense matrices [heads, blocks, columns, other columns], complex."""
    turned = 0 if pair.rotary is None else pair.rotary.dim
    blocks = [first[:, turned:].mT.to(torch.complex128) @ second[:, turned:].to(torch.complex128)]
    for one, two in [] if pair.rotary is None else pair.rotary.planes().tolist():
        query, key = torch.complex(first[:, one], first[:, two]), torch.complex(second[:, one], second[:, two])
        blocks.append(torch.einsum("hi,hj->hij", query, key.conj()))
    return torch.stack(blocks, dim=1)


def assert_distances(model, found, old):
    """The distances of a reading are those of dense products."""
    for (pair, first, second, _), (_, first_0, second_0, _) in zip(each_pair(model), old, strict=True):
        now, start = (
            products(pair, first.double(), second.double()),
            products(pair, first_0.double(), second_0.double()),
        )
        sizes = [x.abs().square().sum(dim=(1, 2, 3)) for x in (now - start, now, start)]
        expected = (sizes[0] / (sizes[1] + sizes[2])).sqrt()
        torch.testing.assert_close(
            torch.tensor(found["layers"][str(pair.layer)][pair.sector]["orbit_distance"], dtype=torch.float64),
            expected, rtol=1e-8, atol=1e-12,
        )  # fmt: skip


# The vertical share


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-26), (torch.float32, 1e-7)])
def test_a_plain_gradient_step_has_no_share_and_adam_has(name, dtype, bound):
    model = make_gpt(dtype=dtype, **VARIANTS[name])
    monitor = gauge.GaugeMonitor(model)
    descend(model, torch.optim.SGD(model.parameters(), lr=1.0), monitor)
    assert monitor.read()["vertical_share"] < bound
    descend(model, torch.optim.Adam(model.parameters(), lr=1e-3), monitor)
    found = monitor.read()
    assert 1e-3 < found["vertical_share"] < 0.9
    shares = [x for s in found["layers"].values() for q in s.values() for x in q["vertical_share"]]
    assert len(shares) == 2 * 2 * model.config.kv_heads and all(0 < x < 1 for x in shares)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_share_of_a_step_of_known_parts(name):
    """A step of a gradient g and of Ω A, −Ωᵀ B along the orbit, which are orthogonal: |v|² / (|g|² + |v|²)."""
    model, generator = make_gpt(**VARIANTS[name]), torch.Generator().manual_seed(5)
    descend(model, torch.optim.SGD(model.parameters(), lr=0.0))
    monitor = gauge.GaugeMonitor(model)
    monitor.before_step()
    expected, parts = {}, torch.zeros(2, dtype=torch.float64)
    for pair, first, second, parameters in each_pair(model):
        g_first, g_second = pair.factors(lambda name, p=parameters: p[name].grad)
        size = (g_first.square().sum() + g_second.square().sum()).sqrt() / 10
        omega = size * head_moves.matrices(pair, len(first), generator)
        v_first, v_second = omega @ first, -omega.mT @ second
        pair.put(lambda name, p=parameters: p[name], first - g_first + v_first, second - g_second + v_second)
        along, across = (
            torch.stack([x.flatten(1).square().sum(1) for x in both]).sum(0)
            for both in ((v_first, v_second), (g_first, g_second))
        )
        expected[str(pair.layer), pair.sector] = (along / (along + across)).tolist()
        parts += torch.stack([along.sum(), along.sum() + across.sum()])
    monitor.after_step()
    found = monitor.read()
    for (layer, sector), shares in expected.items():
        assert found["layers"][layer][sector]["vertical_share"] == pytest.approx(shares, rel=1e-8)
        assert all(1e-4 < share < 0.9999 for share in shares)
    assert found["vertical_share"] == pytest.approx((parts[0] / parts[1]).item(), rel=1e-8)
    assert found["vertical_share"] != pytest.approx(sum(map(sum, expected.values())) / 16, rel=1e-3), (
        "no mean of shares"
    )


def test_a_head_that_does_not_move_has_no_share():
    model = make_gpt()
    monitor = gauge.GaugeMonitor(model)
    assert monitor.read()["vertical_share"] is None
    monitor.before_step()
    monitor.after_step()
    found = monitor.read()
    assert found["vertical_share"] == 0.0 and found["layers"]["0"]["qk"]["vertical_share"] == [0.0] * 4


def test_a_step_is_measured_once():
    """What comes after the measurement, and steps that nobody watches, do not count."""
    model = make_gpt()
    monitor, optimizer = gauge.GaugeMonitor(model), torch.optim.Adam(model.parameters(), lr=1e-2)
    descend(model, optimizer, monitor)
    first = monitor.read()
    move_heads(model)
    monitor.after_step()
    descend(model, optimizer)
    second = monitor.read()
    assert second["vertical_share"] == first["vertical_share"]
    assert second["stored_distance"] > first["stored_distance"]


# The way from the start


@pytest.mark.parametrize("name", VARIANTS)
def test_moves_of_gauge_keep_the_orbit_and_training_leaves_it(name):
    model = make_gpt(**VARIANTS[name])
    monitor = gauge.GaugeMonitor(model)
    start = list(each_pair(model))
    move_heads(model)
    found = monitor.read()
    assert found["orbit_distance"] < 1e-12
    assert found["stored_distance"] > 0.2 and found["charge_drift"] > 0.05
    assert_distances(model, found, start)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        descend(model, optimizer)
    found = monitor.read()
    assert 1e-2 < found["orbit_distance"] < 1.0
    assert_distances(model, found, start)


def test_a_tiny_way_keeps_its_digits():
    """A millionth of a step, after a move of gauge that is as large as the weights."""
    model = make_gpt()
    monitor = gauge.GaugeMonitor(model)
    start = list(each_pair(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-9 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double())
    small = monitor.read()["orbit_distance"]
    assert 1e-10 < small < 1e-7
    move_heads(model)
    found = monitor.read()
    assert found["orbit_distance"] == pytest.approx(small, rel=1e-4)
    assert_distances(model, found, start)


def test_the_comparison_sees_a_wrong_distance():
    model = make_gpt(positions="rotary")
    monitor, start = gauge.GaugeMonitor(model), list(each_pair(make_gpt(positions="rotary")))
    with torch.no_grad():  # no symmetry of rotary heads: the first two coordinates of each change places
        for block in model.blocks:
            for weight in (block.attention.query.weight, block.attention.key.weight):
                heads = weight.view(4, 8, 32)
                heads[:, [0, 1]] = heads[:, [1, 0]]
    found = monitor.read()
    assert found["orbit_distance"] > 0.05
    assert_distances(model, found, start)
    found["layers"]["1"]["qk"]["orbit_distance"][2] *= 1 + 1e-6
    with pytest.raises(AssertionError):
        assert_distances(model, found, start)


def test_weight_decay_takes_the_charge_away_as_it_must():
    """c (A, B) has the charge c² Q: the drift is (1 − c²) |Q₀| over |A₀|² + |B₀|²; the distance of products
    (1 − c²) over √(1 + c⁴), that of numbers (1 − c) over √(1 + c²)."""
    for fields in VARIANTS.values():
        model, c = make_gpt(**fields), 0.8
        monitor, expected = gauge.GaugeMonitor(model), {}
        for pair, first, second, _ in each_pair(model):
            turned = 0 if pair.rotary is None else pair.rotary.dim
            charge = first @ first.mT - second @ second.mT
            mask = torch.ones_like(charge[0])
            mask[:turned] = mask[:, :turned] = 0
            square = (charge * mask).square().sum(dim=(1, 2))
            for one, two in [] if pair.rotary is None else pair.rotary.planes().tolist():
                square = square + (charge[:, one, one] + charge[:, two, two]).square()
            size = first.square().sum(dim=(1, 2)) + second.square().sum(dim=(1, 2))
            expected[str(pair.layer), pair.sector] = ((1 - c**2) * square.sqrt() / size).tolist()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(c)
        found = monitor.read()
        for (layer, sector), drifts in expected.items():
            assert found["layers"][layer][sector]["charge_drift"] == pytest.approx(drifts, rel=1e-10)
        assert found["orbit_distance"] == pytest.approx((1 - c**2) / math.sqrt(1 + c**4), rel=1e-10)
        assert found["stored_distance"] == pytest.approx((1 - c) / math.sqrt(1 + c**2), rel=1e-10)


@pytest.mark.parametrize("name", ["plain", "partly rotary"])
def test_halving_the_step_halves_the_drift(name):
    """Gradient flow keeps Q; descent misses it by the order of its step."""

    def drift(steps):
        model = make_gpt(**VARIANTS[name])
        monitor, optimizer = gauge.GaugeMonitor(model), torch.optim.SGD(model.parameters(), lr=0.1 / steps)
        for _ in range(steps):
            descend(model, optimizer)
        return monitor.read()["charge_drift"]

    drifts = [drift(steps) for steps in (8, 16, 32)]
    assert drifts[0] > 1e-9
    assert [a / b for a, b in pairwise(drifts)] == pytest.approx([2.0, 2.0], rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    """The numbers of the weights as they are: those of the same weights in float64."""
    model, exact = make_gpt(dtype=dtype), make_gpt()
    exact.load_state_dict(model.state_dict())
    monitors = [gauge.GaugeMonitor(m) for m in (model, exact)]
    for m, monitor in zip((model, exact), monitors):
        monitor.before_step()
        if m is model:
            with torch.no_grad():
                for parameter in m.parameters():
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
                    parameter.add_(1e-2 * noise.to(dtype))
        else:
            exact.load_state_dict(model.state_dict())
        monitor.after_step()
    found, expected = (monitor.read() for monitor in monitors)
    for name in ("vertical_share", "charge_drift", "orbit_distance", "stored_distance"):
        assert found[name] == pytest.approx(expected[name], rel=1e-10)


# Models


def test_heads_of_zeros():
    """Output maps that start from zero, as many models have them: no NaN, and all of the product is new."""
    model = make_gpt()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.output.weight.zero_()
            block.attention.value.weight[:8].zero_()
            block.attention.value.bias[:8].zero_()
    monitor = gauge.GaugeMonitor(model)
    found = monitor.read()
    assert found["orbit_distance"] == found["stored_distance"] == found["charge_drift"] == 0.0
    descend(model, torch.optim.SGD(model.parameters(), lr=0.1), monitor)
    found = monitor.read()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["layers"]["0"]["vo"]["orbit_distance"][1:] == pytest.approx([1.0] * 3)
    assert found["vertical_share"] < 1e-20


def test_a_broken_model_is_watched():
    """The gradient of a broken model is along what was gauge."""
    model = breaking.break_symmetry(make_gpt(attention_bias=False), seed=1)
    monitor = gauge.GaugeMonitor(model)
    descend(model, torch.optim.SGD(model.parameters(), lr=0.1), monitor)
    found = monitor.read()
    assert found["vertical_share"] > 1e-8 and found["stored_distance"] > 0


def test_queries_and_keys_that_are_normalised_are_left_out():
    model = make_gpt(qk_norm=True)
    monitor = gauge.GaugeMonitor(model)
    descend(model, torch.optim.SGD(model.parameters(), lr=0.1), monitor)
    assert set(monitor.read()["layers"]["0"]) == {"vo"} and monitor.read()["vertical_share"] < 1e-26
    assert len(monitor.notes) == 1 and "normalised" in monitor.notes[0]
    assert gauge.GaugeMonitor(make_gpt()).notes == ()


def test_fused_and_transposed_maps():
    tiny = pytest.importorskip("tiny_transformers")
    pytest.importorskip("transformers")
    model = tiny.make("gpt2")
    monitor = gauge.GaugeMonitor(model)
    monitor.before_step()
    move_heads(model)
    monitor.after_step()
    found = monitor.read()
    assert found["orbit_distance"] < 1e-12 and found["stored_distance"] > 0.1 and found["vertical_share"] > 0.5


def test_only_the_sectors_that_were_asked_for():
    found = gauge.GaugeMonitor(make_gpt(), sectors=["qk"]).read()
    assert [set(sectors) for sectors in found["layers"].values()] == [{"qk"}, {"qk"}]


def test_bad_input():
    with pytest.raises(TypeError, match="no layout is known for Linear"):
        gauge.GaugeMonitor(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="sectors must be of qk, vo, received mlp"):
        gauge.GaugeMonitor(make_gpt(), sectors=["mlp"])
    with pytest.raises(ValueError, match=r'normalised.*sectors=\("vo",\)'):
        gauge.GaugeMonitor(make_gpt(qk_norm=True), sectors=["qk"])
    with torch.device("meta"):
        empty = GPT(GPTConfig(vocab_size=32, context_length=8, num_layers=1, num_heads=2, dim=8))
    with pytest.raises(ValueError, match="on the meta device"):
        gauge.GaugeMonitor(empty)
