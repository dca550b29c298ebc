"""Dressed representatives: the function stays, the state goes along, and no gauge is seen by any optimiser."""

import copy

import pytest
import torch
from head_moves import (
    OPTIMIZERS,
    VARIANTS,
    factors_of,
    loaded,
    logits_of,
    loss_of,
    make_gpt,
    matrices,
    move_heads,
    same,
    soap,
    some_tokens,
    train,
)

from erlangen import breaking, gauge, optim
from erlangen.gauge import _head_state, _pairs

# --- the function stays -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["balanced", "identity"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dressing_keeps_the_function(variant, kind):
    model = move_heads(make_gpt(**VARIANTS[variant]))
    tokens, pairs = some_tokens(model), _pairs.head_pairs(model)
    expected, before = logits_of(model, tokens), [factors_of(model, pair) for pair in pairs]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert gauge.dressed(optimizer, model, kind=kind) is optimizer
    assert same(logits_of(model, tokens), expected, 1e-12)
    assert not same(factors_of(model, pairs[0])[0], before[0][0], 1e-2)
    for pair, factors in zip(pairs, before):
        form = gauge.dress_heads(*factors, kind, rotary=pair.rotary)
        assert same(factors_of(model, pair)[0], form.first, 1e-12)
        assert same(factors_of(model, pair)[1], form.second, 1e-12)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "phi3", "gemma2", "deepseek_v2"])
def test_foreign_models_keep_their_function(name):
    pytest.importorskip("transformers")
    tiny = pytest.importorskip("tiny_transformers")
    model, tokens = tiny.make(name), tiny.some_tokens()
    with torch.no_grad():
        expected = tiny.outputs(model, tokens)
    optimizer = gauge.dressed(torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0), model, every=1)
    loss = tiny.outputs(model, tokens).square().mean()
    loss.backward()
    optimizer.step()  # fused, transposed and grouped state goes along
    with torch.no_grad():
        assert same(tiny.outputs(model, tokens), expected, 1e-9)
    kept = {n: optimizer.state[p]["exp_avg"] / 0.1 for n, p in model.named_parameters() if p in optimizer.state}
    optimizer.zero_grad()
    tiny.outputs(model, tokens).square().mean().backward()
    for pair in _pairs.head_pairs(model):
        for tensor in pair.names:
            gradient = model.get_parameter(tensor).grad
            assert (kept[tensor] - gradient).abs().max() <= 1e-7 * gradient.abs().max() + 1e-12


def test_equal_singular_values_are_dressed_like_any_others():
    """Queries and keys whose products are multiples of rotations: every direction is as good as another."""
    model = make_gpt(attention_bias=False)
    with torch.no_grad():
        for block in model.blocks:
            torch.nn.init.orthogonal_(block.attention.query.weight, generator=torch.Generator().manual_seed(1))
            torch.nn.init.orthogonal_(block.attention.key.weight, generator=torch.Generator().manual_seed(2))
    move_heads(model)
    tokens = some_tokens(model)
    expected = logits_of(model, tokens)
    optimizer = gauge.dressed(torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0), model, every=1)
    first, _ = factors_of(model, _pairs.head_pairs(model)[0])
    assert same(first @ first.mT, torch.eye(8, dtype=torch.float64).expand(4, -1, -1), 1e-12)
    train(model, optimizer, 3)
    assert same(logits_of(model, tokens), expected, 1e-12)
    assert same(factors_of(model, _pairs.head_pairs(model)[0])[0], first, 1e-12)


def test_float32_keeps_the_function_to_rounding():
    model = move_heads(make_gpt(dtype=torch.float32))
    tokens = some_tokens(model)
    expected = logits_of(model, tokens)
    optimizer = gauge.dressed(torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0), model, every=1)
    train(model, optimizer, 3)
    assert same(logits_of(model, tokens), expected, 2e-5)


# --- runs do not see the gauge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_runs_from_two_gauges_are_one(name):
    def run(moved):
        model = make_gpt(**VARIANTS["grouped"])
        if moved:
            move_heads(model)
        return train(model, gauge.dressed(OPTIMIZERS[name](model), model, every=3), 8)

    assert same(run(True), run(False), 1e-9)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon", "ecd"])
def test_plain_runs_from_two_gauges_are_not_one(name):
    losses = [train(model, OPTIMIZERS[name](model), 4) for model in (make_gpt(), move_heads(make_gpt()))]
    assert not same(losses[1], losses[0], 1e-5)


@pytest.mark.parametrize("kind", ["balanced", "identity"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_adam_does_not_see_the_gauge_of_any_model(variant, kind):
    losses = []
    for moved in (False, True):
        model = make_gpt(**VARIANTS[variant])
        if moved:
            move_heads(model)
        losses.append(train(model, gauge.dressed(OPTIMIZERS["adamw"](model), model, every=3, kind=kind), 7))
    assert same(losses[1], losses[0], 1e-9)


def test_soap_runs_and_its_function_is_kept():
    """SOAP takes any basis where a Gram matrix has no rank, so that it sees even rounding: no two runs are one."""
    model = make_gpt()
    plain, losses = copy.deepcopy(model), train(model, gauge.dressed(soap(model), model, every=3), 10)
    assert losses.isfinite().all() and losses[-3:].mean() < losses[:3].mean()
    assert same(losses, train(plain, soap(plain), 10), 0.02)


# --- what goes along --------------------------------------------------------------------------------------------------


def gradients(model, tokens):
    model.zero_grad()
    loss_of(model, tokens).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "make, key, factor",
    [
        (lambda model: torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9), "momentum_buffer", 1.0),
        (lambda model: torch.optim.AdamW(model.parameters(), lr=0.0), "exp_avg", 0.1),
    ],
    ids=["sgd", "adamw"],
)
def test_momentum_is_the_gradient_in_the_new_numbers(make, key, factor, variant):
    model = make_gpt(**VARIANTS[variant])
    optimizer = gauge.dressed(make(model), model, every=2)
    move_heads(model)
    tokens = some_tokens(model)
    before = gradients(model, tokens)
    optimizer.param_groups[0]["steps_dressed"] = 1  # this step is followed by a dressing
    optimizer.step()
    carried = {name: optimizer.state[parameter][key] / factor for name, parameter in model.named_parameters()}
    own = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    after = gradients(model, tokens)
    for name, gradient in after.items():
        assert (carried[name] - gradient).abs().max() <= 1e-11 * gradient.abs().max() + 1e-14
        assert (own[name] - gradient).abs().max() <= 1e-11 * gradient.abs().max() + 1e-14
    assert not same(before["blocks.0.attention.query.weight"], after["blocks.0.attention.query.weight"], 1e-2)


def test_the_velocity_of_ecd_keeps_its_length_and_points_along_the_gradient():
    model = make_gpt()
    optimizer = gauge.dressed(optim.create("ecd", model.parameters(), lr=1e-9), model, every=2)
    move_heads(model)
    tokens = some_tokens(model)
    loss_of(model, tokens).backward()
    optimizer.param_groups[0]["steps_dressed"] = 1
    optimizer.step(loss=loss_of(model, tokens).item())
    after = gradients(model, tokens)
    carried = torch.cat([optimizer.state[p]["momentum"].flatten() for p in model.parameters()])
    expected = -torch.cat([after[name].flatten() for name, _ in model.named_parameters()])
    assert float(carried.norm()) == pytest.approx(1.0, abs=1e-12)
    assert same(carried, expected / expected.norm(), 1e-7)


def move_of(model, pair, seed=0):
    matrix = matrices(pair, pair.heads.num_kv_heads, torch.Generator().manual_seed(seed))
    return _head_state.Move(pair, matrix, torch.linalg.inv(matrix).mT)


def carry_with_weights(optimizer, model, moves):
    parameters = _pairs.parameters_by_name(model)
    for move in moves:
        first, second = factors_of(model, move.pair)
        move.pair.put(lambda name: parameters[name], move.left @ first, move.right @ second)
    _head_state.carry(optimizer, parameters, moves)


def test_the_momentum_of_rmsprop_moves_the_function_as_before():
    model = make_gpt(**VARIANTS["partly rotary"])
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9)
    train(model, optimizer, 3)
    parameters = _pairs.parameters_by_name(model)

    def motion(pair):
        first, second = factors_of(model, pair)
        steps = {name: optimizer.state[parameters[name]]["momentum_buffer"] for name in pair.names}
        of_first, of_second = factors_of(model, pair, steps)
        return of_first.mT @ second + first.mT @ of_second

    pairs = _pairs.head_pairs(model)
    before = [motion(pair) for pair in pairs]
    carry_with_weights(optimizer, model, [move_of(model, pair) for pair in pairs])
    for pair, expected in zip(pairs, before):
        assert same(motion(pair), expected, 1e-12)


def test_squares_follow_permutations_signs_and_scales_exactly():
    """Adam in the new numbers gathers what was carried; where rows mix it is the variance of independent numbers."""
    model = make_gpt()
    moved, pairs = copy.deepcopy(model), _pairs.head_pairs(model)
    generator, moves = torch.Generator().manual_seed(0), []
    for pair in pairs:
        scales = torch.rand(4, 8, generator=generator, dtype=torch.float64) + 0.5
        scales *= torch.where(torch.rand(4, 8, generator=generator) < 0.5, -1.0, 1.0)
        order = torch.stack([torch.randperm(8, generator=generator) for _ in range(4)])
        matrix = torch.diag_embed(scales).gather(1, order[..., None].expand(-1, -1, 8))
        moves.append(_head_state.Move(pair, matrix, torch.linalg.inv(matrix).mT))
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.0) for m in (model, moved)]
    carry_with_weights(optimizers[1], moved, moves)
    for m, optimizer in zip((model, moved), optimizers):
        train(m, optimizer, 3)
    carry_with_weights(optimizers[0], model, moves)
    for (name, parameter), other in zip(model.named_parameters(), moved.parameters()):
        for key in ("exp_avg", "exp_avg_sq"):
            found, expected = optimizers[0].state[parameter][key], optimizers[1].state[other][key]
            assert (found - expected).abs().max() <= 1e-10 * expected.abs().max() + 1e-16, name


def test_squares_of_mixed_rows_are_variances_of_independent_numbers():
    model = make_gpt(attention_bias=False)
    pair, optimizer = _pairs.head_pairs(model)[0], torch.optim.Adam(model.parameters(), lr=0.0)
    train(model, optimizer, 1)
    key = model.blocks[0].attention.key.weight
    variances = optimizer.state[key]["exp_avg_sq"].view(4, 8, 32).clone()
    move = move_of(model, pair)
    carry_with_weights(optimizer, model, [move])
    draws = torch.randn(100_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = ((draws * variances[1, :, 5].sqrt()) @ move.left[1].mT).square().mean(dim=0)  # of a gradient of B
    torch.testing.assert_close(optimizer.state[key]["exp_avg_sq"].view(4, 8, 32)[1, :, 5], drawn, rtol=0.03, atol=0.0)


def test_soap_follows_rotations_exactly():
    """A step in rotated heads is the rotated step, before and after bases are updated. (Of biases SOAP is Adam.)"""
    model = make_gpt(attention_bias=False)
    optimizer = soap(model, eps=1e-3)  # where a Gram matrix has no rank, rounding has no say
    train(model, optimizer, 6)
    turned = copy.deepcopy(model)
    other = soap(turned, eps=1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pairs, moves = _pairs.head_pairs(model), []
    for pair in pairs:
        rotation, _ = torch.linalg.qr(matrices(pair, 4, torch.Generator().manual_seed(pair.layer)))
        moves.append(_head_state.Move(pair, rotation, rotation))
    carry_with_weights(other, turned, moves)
    assert not same(turned.blocks[0].attention.query.weight, model.blocks[0].attention.query.weight, 0.1)
    assert same(train(turned, other, 5, first=6), train(model, optimizer, 5, first=6), 1e-9)
    for pair in pairs:
        products = [first.mT @ second for first, second in (factors_of(turned, pair), factors_of(model, pair))]
        assert same(*products, 1e-8)


def test_the_gram_of_soap_follows_any_matrix():
    model = make_gpt()
    optimizer = soap(model)
    train(model, optimizer, 6)
    weight, pair = model.blocks[0].attention.query.weight, _pairs.head_pairs(model)[0]
    gram = optimizer.state[weight]["gram"][0].clone()
    move = move_of(model, pair)
    carry_with_weights(optimizer, model, [move])
    whole = torch.block_diag(*move.right)
    assert same(optimizer.state[weight]["gram"][0], whole @ gram @ whole.mT, 1e-12)
    basis = optimizer.state[weight]["basis"][0]
    assert same(basis.mT @ basis, torch.eye(32, dtype=torch.float64), 1e-12)


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, order",
    [
        ("adamw", "weights first"),
        ("adamw", "state first"),
        ("adamw", "weights before all"),
        ("muon", "weights first"),
        ("ecd", "weights first"),
        ("soap", "weights first"),
    ],
)
def test_a_resumed_run_goes_on_bit_for_bit(name, order):
    build = soap if name == "soap" else OPTIMIZERS[name]
    model = make_gpt()
    optimizer = gauge.dressed(build(model), model, every=3)
    train(model, optimizer, 4)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert state["param_groups"][0]["steps_dressed"] == 4
    expected = train(model, optimizer, 4, first=4)
    again = make_gpt()
    resumed = loaded(again, lambda model: gauge.dressed(build(model), model, every=3), weights, state, order)
    assert torch.equal(train(again, resumed, 4, first=4), expected)


@pytest.mark.parametrize("order", ["weights first", "state first"])
def test_the_state_of_a_plain_run_is_dressed_with_its_weights(order):
    """Heads and momentum of a run without dressing are both dressed before the next step."""
    model = make_gpt()
    optimizer = OPTIMIZERS["sgd"](model)
    train(model, optimizer, 4)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    losses = []
    for moved in (False, True):  # the same, from other numbers of the same run
        again = make_gpt()
        resumed = gauge.dressed(OPTIMIZERS["sgd"](again), again, every=3)
        if moved:
            source = make_gpt()
            source.load_state_dict(weights)
            carrier = OPTIMIZERS["sgd"](source)
            carrier.load_state_dict(copy.deepcopy(state))
            carry_with_weights(carrier, source, [move_of(source, pair) for pair in _pairs.head_pairs(source)])
            weights, state = source.state_dict(), carrier.state_dict()
        for what in ("weights", "state") if order == "weights first" else ("state", "weights"):
            if what == "weights":
                again.load_state_dict(weights)
            else:
                resumed.load_state_dict(copy.deepcopy(state))
        losses.append(train(again, resumed, 4, first=4))
    assert same(losses[1], losses[0], 1e-9)


def test_the_state_loads_into_a_plain_optimiser():
    model = make_gpt()
    optimizer = gauge.dressed(OPTIMIZERS["adamw"](model), model, every=100)
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    plain = OPTIMIZERS["adamw"](other)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(train(other, plain, 3, first=3), train(model, optimizer, 3, first=3))


def test_release_leaves_a_plain_optimiser():
    model = make_gpt()
    optimizer = gauge.dressed(OPTIMIZERS["adamw"](model), model, every=1)
    train(model, optimizer, 2)
    assert gauge.release(optimizer) is optimizer
    other = copy.deepcopy(model)
    plain = OPTIMIZERS["adamw"](other)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(train(other, plain, 3), train(model, optimizer, 3))
    assert optimizer.param_groups[0]["steps_dressed"] == 2
    with pytest.raises(ValueError, match="nothing to take off"):
        gauge.release(optimizer)
    gauge.dressed(optimizer, model)


# --- bad input, and heads that go wrong in a run ----------------------------------------------------------------------


def test_a_head_that_loses_rank_waits_and_a_diverged_one_is_left():
    model = make_gpt()
    optimizer = gauge.dressed(torch.optim.SGD(model.parameters(), lr=0.0), model, every=1)
    move_heads(model)
    with torch.no_grad():
        model.blocks[1].attention.key.weight[8:16] *= torch.tensor([0.0] + 7 * [1.0])[:, None]
        model.blocks[1].attention.key.bias[8] = 0.0
        model.blocks[0].attention.query.weight[0, 0] = float("nan")
    pairs = {(pair.layer, pair.sector): pair for pair in _pairs.head_pairs(model)}
    before = {key: factors_of(model, pair) for key, pair in pairs.items()}
    optimizer.step()
    first, second = factors_of(model, pairs[1, "qk"])
    assert torch.equal(first[1], before[1, "qk"][0][1]) and torch.equal(second[1], before[1, "qk"][1][1])
    assert not same(first[0], before[1, "qk"][0][0], 1e-2)
    torch.testing.assert_close(factors_of(model, pairs[0, "qk"]), before[0, "qk"], rtol=0, atol=0, equal_nan=True)
    assert not same(factors_of(model, pairs[0, "vo"])[0], before[0, "vo"][0], 1e-2)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("wrap", [gauge.dressed, gauge.charted])
def test_what_is_refused(wrap):
    model = make_gpt()
    optimizer = sgd(model)
    wrap(optimizer, model)
    with pytest.raises(ValueError, match=f"treated already, by {wrap.__name__}"):
        gauge.dressed(optimizer, model)
    with pytest.raises(ValueError, match=f"treated already, by {wrap.__name__}"):
        gauge.charted(optimizer, model)
    stranger = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="not of this model"):
        wrap(torch.optim.SGD([*model.parameters(), stranger], lr=0.1), model)
    queries = [parameter for name, parameter in model.named_parameters() if "query" not in name]
    with pytest.raises(ValueError, match="only a part of the qk pair of layer 0"):
        wrap(torch.optim.SGD(queries, lr=0.1), model)
    wrap(torch.optim.SGD(queries, lr=0.1), model, sectors=("vo",))
    with pytest.raises(ValueError, match="none of the pairs"):
        wrap(torch.optim.SGD(model.norm.parameters(), lr=0.1), model)
    normed = make_gpt(qk_norm=True)
    with pytest.raises(ValueError, match='sectors=\\("vo",\\)'):
        wrap(sgd(normed), normed)
    wrap(sgd(normed), normed, sectors=("vo",))
    broken = make_gpt()
    breaking.break_symmetry(broken, value_std=0.1)
    with pytest.raises(ValueError, match="unlearned biases"):
        wrap(sgd(broken), broken)
    with pytest.raises(TypeError, match="no layout is known for Linear"):
        wrap(sgd(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 2))
    dead = make_gpt()
    with torch.no_grad():
        dead.blocks[1].attention.output.weight[:, 16:24] = 0.0
    before = copy.deepcopy(dead.state_dict())
    with pytest.raises(ValueError, match="vo pair of layer 1, head 2, has not full rank"):
        wrap(sgd(dead), dead)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dead.state_dict().items())


@pytest.mark.parametrize("wrap", [gauge.dressed, gauge.charted])
@pytest.mark.parametrize("make", [torch.optim.Adadelta, torch.optim.Rprop, torch.optim.Adamax])
def test_unknown_state_is_named_at_the_first_step(wrap, make):
    model = make_gpt()
    optimizer = wrap(make(model.parameters()), model)
    with pytest.raises(ValueError, match=f"{make.__name__} keeps (acc_delta|prev, step_size|exp_inf), and what"):
        train(model, optimizer, 1)
    with pytest.raises(ValueError, match=f"{make.__name__} keeps"):
        wrap(gauge.release(optimizer), model)


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_every_is_a_number_of_steps(every):
    model = make_gpt()
    with pytest.raises(ValueError, match="every is a number of steps, at least 1"):
        gauge.dressed(sgd(model), model, every=every)
