"""Charts: the block is the identity to the bit, nothing else is held, and no optimiser sees the gauge of the start."""

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

from erlangen import gauge
from erlangen.gauge import _pairs, chart


def charted(model, optimizer):
    assert gauge.charted(optimizer, model) is optimizer
    return optimizer.gauge_reduction


def sgd(model, lr=0.0):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def block_of(pair, first, pivots):
    """The entries of the block, by a loop: (row, column) -> value, for each head."""
    turned = 0 if pair.rotary is None else pair.rotary.dim
    blocks = []
    for head in range(len(first)):
        block = {}
        for row in range(pair.width):
            rows = range(row, row + 1) if row < turned else range(turned, pair.width)
            for other in rows:
                block[other, int(pivots[head, row])] = first[head, other, pivots[head, row]].item()
        blocks.append(block)
    return blocks


def expect_identity(model, reduction):
    for pair in reduction.pairs:
        first = pair.factors(lambda name: model.get_parameter(name).detach())[0]
        pivots = reduction.pivots[pair.layer, pair.sector]
        planes = [] if pair.rotary is None else pair.rotary.planes().tolist()
        of_row = {row: plane for plane in planes for row in plane}
        for head, block in enumerate(block_of(pair, first, pivots)):
            for (row, column), value in block.items():
                if row in of_row:
                    assert value == float(row == of_row[row][0])
                else:
                    assert value == float(column == int(pivots[head, row]))


# --- the chart --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_charts_keep_the_function(variant):
    model = move_heads(make_gpt(**VARIANTS[variant]))
    tokens = some_tokens(model)
    expected = logits_of(model, tokens)
    reduction = charted(model, sgd(model))
    assert same(logits_of(model, tokens), expected, 1e-11)
    expect_identity(model, reduction)
    for pair in reduction.pairs:
        assert factors_of(model, pair)[0].abs().max() <= 2.0 + 1e-9


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "phi3"])
def test_foreign_models_keep_their_function(name):
    pytest.importorskip("transformers")
    tiny = pytest.importorskip("tiny_transformers")
    model, tokens = tiny.make(name), tiny.some_tokens()
    with torch.no_grad():
        expected = tiny.outputs(model, tokens)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    reduction = charted(model, optimizer)
    tiny.outputs(model, tokens).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert same(tiny.outputs(model, tokens), expected, 1e-9)
    expect_identity(model, reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "soap"])
def test_the_block_is_exact_all_along(name, dtype):
    model = make_gpt(dtype=dtype, **VARIANTS["partly rotary"])
    optimizer = (OPTIMIZERS | {"soap": soap})[name](model)
    reduction = charted(model, optimizer)
    losses = []
    for step in range(4):
        losses.append(train(model, optimizer, 1, first=step))
        expect_identity(model, reduction)
    assert torch.cat(losses).isfinite().all()
    if "ecd" in name and "euler" not in name:
        length = sum(state["momentum"].double().square().sum() for state in optimizer.state.values())
        assert float(length) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("variant", ["unbiased", "rotary", "partly rotary"])
def test_only_the_numbers_of_the_quotient_move(variant):
    """(p + q) k - k² numbers a head under GL, (p + q) k - k under numbers a plane: all of these, and no other."""
    model = make_gpt(**VARIANTS[variant])
    optimizer = OPTIMIZERS["adamw"](model)
    reduction = charted(model, optimizer)
    before = [factors_of(model, pair) for pair in reduction.pairs]
    train(model, optimizer, 1)
    for pair, (first, second) in zip(reduction.pairs, before):
        turned = 0 if pair.rotary is None else pair.rotary.dim
        moved = [(new != old).sum().item() for new, old in zip(factors_of(model, pair), (first, second))]
        free = len(first) * (turned + (pair.width - turned) ** 2)
        assert moved == [first.numel() - free, second.numel()]


def test_pivots_are_found_in_the_numbers():
    generator = torch.Generator().manual_seed(0)
    rotary = gauge.Rotary(dim=4)
    for positions in (None, rotary):
        first, second = torch.randn(2, 3, 6, 11, generator=generator, dtype=torch.float64)
        form = gauge.dress_heads(first, second, "identity", rotary=positions)
        pivots, whole = chart.find_pivots(form.first, positions)
        assert whole.all() and torch.equal(pivots, form.pivots)
        broken = form.first.clone()
        broken[1, 5, pivots[1, 5]] += 1e-15
        assert chart.find_pivots(broken, positions)[1].tolist() == [True, False, True]
        assert not chart.find_pivots(first, positions)[1].any()


# --- runs do not see the gauge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_runs_from_two_gauges_are_one(name):
    def run(moved):
        model = make_gpt(**VARIANTS["grouped"])
        if moved:
            move_heads(model)
        optimizer = OPTIMIZERS[name](model)
        charted(model, optimizer)
        return train(model, optimizer, 6)

    assert same(run(True), run(False), 1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adam_does_not_see_the_gauge_through_changes_of_the_chart(variant, monkeypatch):
    monkeypatch.setattr(chart, "_LARGEST", 1.0)  # columns are chosen anew at every step
    losses, changes = [], []
    for moved in (False, True):
        model = make_gpt(**VARIANTS[variant])
        if moved:
            move_heads(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
        reduction = charted(model, optimizer)
        seen = []
        for step in range(6):
            before = {key: pivots.clone() for key, pivots in reduction.pivots.items()}
            seen.append(train(model, optimizer, 1, first=step))
            changes.append(any(not torch.equal(before[key], pivots) for key, pivots in reduction.pivots.items()))
        expect_identity(model, reduction)
        losses.append(torch.cat(seen))
    assert same(losses[1], losses[0], 1e-9)
    assert any(changes)


# --- changes of the chart ---------------------------------------------------------------------------------------------


def in_a_bad_chart(variant, seed=0):
    """A model in charts whose columns are chosen badly."""
    model = make_gpt(seed, **VARIANTS[variant])
    generator, parameters = torch.Generator().manual_seed(seed), _pairs.parameters_by_name(model)
    for pair in _pairs.head_pairs(model):
        first, second = factors_of(model, pair)
        pivots = torch.stack([torch.randperm(32, generator=generator)[: pair.width] for _ in first])
        if pair.rotary is not None:
            one, two = pair.rotary.planes().unbind(1)
            pivots[:, two] = pivots[:, one]
        form = gauge.dress_heads(first, second, "identity", rotary=pair.rotary, pivots=pivots)
        pair.put(lambda name: parameters[name], form.first, form.second)
    return model


def pairs_changed(before, reduction):
    return [key for key, pivots in reduction.pivots.items() if not torch.equal(before[key], pivots)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sum_of_gradients_is_the_gradient_in_the_new_chart(variant):
    model = in_a_bad_chart(variant)
    optimizer, weights = sgd(model), copy.deepcopy(model.state_dict())
    reduction = charted(model, optimizer)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())  # found, not changed
    before, tokens = dict(reduction.pivots), some_tokens(model)
    loss_of(model, tokens).backward()
    optimizer.step()
    assert len(pairs_changed(before, reduction)) == 4
    assert same(logits_of(model, tokens), logits_of(in_a_bad_chart(variant), tokens), 1e-11)
    carried = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in model.named_parameters()}
    own = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss_of(model, tokens).backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    reduction._clear_gradients()
    for name, parameter in model.named_parameters():
        size = whole[name].abs().max()
        assert (carried[name] - parameter.grad).abs().max() <= 1e-9 * size + 1e-14, name
        assert (own[name] - parameter.grad).abs().max() <= 1e-9 * size + 1e-14, name
    name = "blocks.0.attention.query.weight"
    assert not same(whole[name], carried[name], 1e-3)  # the block's part would have been seen


@pytest.mark.parametrize("variant", ["plain", "partly rotary"])
def test_a_velocity_moves_the_function_as_before(variant):
    """RMSprop's momentum: the change of every product that it makes is the same in both charts."""
    model = in_a_bad_chart(variant)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.0, momentum=0.9)
    reduction = charted(model, optimizer)
    loss_of(model, some_tokens(model)).backward()
    optimizer.param_groups[0]["lr"] = 0.0
    largest, chart._LARGEST = chart._LARGEST, float("inf")
    try:
        optimizer.step()
    finally:
        chart._LARGEST = largest

    def motion(pair):
        first, second = factors_of(model, pair)
        steps = {name: optimizer.state[model.get_parameter(name)]["momentum_buffer"] for name in pair.names}
        of_first, of_second = factors_of(model, pair, steps)
        return of_first.mT @ second + first.mT @ of_second

    before, pivots = [motion(pair) for pair in reduction.pairs], dict(reduction.pivots)
    optimizer.zero_grad()
    reduction.after_step()
    assert len(pairs_changed(pivots, reduction)) == 4
    for pair, expected in zip(reduction.pairs, before):
        assert same(motion(pair), expected, 1e-9)


def test_squares_are_completed_as_variances_of_independent_numbers():
    """One head of a chart with k = 2 against draws: first completed, then carried, then cut."""
    model = in_a_bad_chart("unbiased")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.0, 0.0))
    reduction = charted(model, optimizer)
    loss_of(model, some_tokens(model)).backward()
    pair, head = reduction.pairs[0], 2
    first, second = factors_of(model, pair)
    pivots = reduction.pivots[0, "qk"][head]
    optimizer.zero_grad()
    optimizer.param_groups[0]["foreach"] = False
    generator = torch.Generator().manual_seed(0)
    for name in pair.names:
        parameter = model.get_parameter(name)
        squares = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": 0 * squares, "exp_avg_sq": squares}
    reduction._hold(pair)
    tensors = {name: optimizer.state[model.get_parameter(name)]["exp_avg_sq"] for name in pair.names}
    variances = [factor[head] for factor in factors_of(model, pair, tensors)]
    variances[0][:, pivots] = 0.0
    reduction.after_step()
    chosen = reduction.pivots[0, "qk"][head]
    assert set(chosen.tolist()) != set(pivots.tolist())
    number = 10_000
    of_first, of_second = (
        torch.randn(number, *v.shape, generator=generator, dtype=torch.float64) * v.sqrt() for v in variances
    )
    of_first[:, :, pivots] = second[head] @ of_second.mT - of_first @ first[head].mT
    left = torch.linalg.inv(first[head][:, chosen])
    # Independent again once completed, which is what carrying takes them for.
    completed, other = of_first.square().mean(dim=0), of_second.square().mean(dim=0)
    right = torch.linalg.inv(left).mT
    expected = right.square() @ completed, left.square() @ other
    expected[0][:, chosen] = 0.0
    tensors = {name: optimizer.state[model.get_parameter(name)]["exp_avg_sq"] for name in pair.names}
    for found, drawn in zip(factors_of(model, pair, tensors), expected):
        torch.testing.assert_close(found[head], drawn, rtol=0.1, atol=1e-12)


def test_a_change_of_the_chart_makes_no_leap():
    """After it, a step of Adam is of the size of its learning rate everywhere: also where squares were not gathered."""
    model = in_a_bad_chart("plain")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    reduction = charted(model, optimizer)
    pivots = dict(reduction.pivots)
    train(model, optimizer, 1)
    assert pairs_changed(pivots, reduction)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 1, first=1)
    assert max((p - before[name]).abs().max().item() for name, p in model.named_parameters()) < 1e-3


# --- around a step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_name", [False, True])
def test_gradients_of_a_closure_are_cleared(by_name):
    model = make_gpt()
    optimizer, tokens = sgd(model, lr=0.01), some_tokens(model)
    reduction = charted(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        return loss

    loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    assert loss.item() > 0
    for name, places, values in reduction._entries():
        parameter = model.get_parameter(name)
        assert not optimizer.state[parameter]["momentum_buffer"][places].any()
        assert torch.equal(parameter.detach()[places], values)


@pytest.mark.parametrize("order", ["weights first", "state first", "weights before all"])
@pytest.mark.parametrize("name", ["adamw", "ecd"])
def test_a_resumed_run_goes_on_bit_for_bit(name, order):
    model = make_gpt()
    optimizer = OPTIMIZERS[name](model)
    charted(model, optimizer)
    train(model, optimizer, 4)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train(model, optimizer, 4, first=4)
    again = make_gpt()
    resumed = loaded(again, lambda model: gauge.charted(OPTIMIZERS[name](model), model), weights, state, order)
    assert torch.equal(train(again, resumed, 4, first=4), expected)


@pytest.mark.parametrize("order", ["weights first", "state first"])
def test_a_plain_run_goes_on_in_a_chart(order):
    """Loaded weights that are in no chart are brought into one, with their momentum, and the function is kept."""
    model = make_gpt()
    optimizer = sgd(model, lr=0.01)
    train(model, optimizer, 3)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    losses = []
    for moved in (False, True):
        source = copy.deepcopy(model)
        if moved:  # momentum belongs to the numbers: gathered again in these
            move_heads(source)
        again = make_gpt()
        resumed = sgd(again, lr=0.01)
        reduction = charted(again, resumed)
        if order == "weights first":
            again.load_state_dict(source.state_dict())
        if not moved:
            resumed.load_state_dict(copy.deepcopy(state))
        again.load_state_dict(source.state_dict())
        losses.append(train(again, resumed, 3, first=3))
        expect_identity(again, reduction)
    expected = loss_of(model, some_tokens(model, seed=3)).item()
    assert [float(loss[0]) for loss in losses] == pytest.approx([expected, expected], rel=1e-11)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_momentum_of_a_plain_run_is_cut_to_the_chart():
    model = move_heads(make_gpt())
    optimizer, tokens = sgd(model), some_tokens(model)
    loss_of(model, tokens).backward()
    optimizer.step()
    reduction = charted(model, optimizer)
    model.zero_grad()
    loss_of(model, tokens).backward()
    reduction._clear_gradients()
    for name, parameter in model.named_parameters():
        carried = optimizer.state[parameter]["momentum_buffer"]
        assert (carried - parameter.grad).abs().max() <= 1e-9 * parameter.grad.abs().max() + 1e-14, name


def test_release_lets_the_block_go():
    model = make_gpt()
    optimizer = sgd(model, lr=0.01)
    reduction = charted(model, optimizer)
    train(model, optimizer, 2)
    gauge.release(optimizer)
    train(model, optimizer, 1)
    with pytest.raises(AssertionError):
        expect_identity(model, reduction)


def test_the_matrices_of_the_tests_keep_the_function_and_others_do_not():
    model = make_gpt(**VARIANTS["partly rotary"])
    tokens, pair = some_tokens(model), _pairs.head_pairs(model)[0]
    expected = logits_of(model, tokens)
    assert same(logits_of(move_heads(copy.deepcopy(model)), tokens), expected, 1e-11)
    first, second = factors_of(model, pair)
    matrix = matrices(pair, len(first), torch.Generator().manual_seed(0))
    matrix[:, 0, 1] += 0.5  # of no plane
    parameters = _pairs.parameters_by_name(model)
    pair.put(lambda name: parameters[name], matrix @ first, torch.linalg.inv(matrix).mT @ second)
    assert not same(logits_of(model, tokens), expected, 1e-4)
