"""Steps across the gauge only: of any optimiser with `horizontal`, and of `QuotientSGD` in every gauge alike."""

import copy

import pytest
import torch
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, NAdam, RMSprop

from erlangen import breaking, gauge, optim
from erlangen.gauge import _vertical, forms
from erlangen.gauge._pairs import free_sectors, head_pairs, parameters_by_name
from erlangen.lm import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "plain": {},
    "unbiased": {"attention_bias": False},
    "grouped": {"num_kv_heads": 2},
    "rotary": {"positions": "rotary"},
    "partly rotary": {"positions": "rotary", "rotary_fraction": 0.5, "num_kv_heads": 1},
    "qk-norm": {"qk_norm": True, "positions": "rotary", "mlp": "swiglu"},
}
every_model = pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)


def make(dtype=torch.float64, **fields):
    """A small model whose heads do something: their weights are larger than at the usual start, biases are not zero."""
    config = GPTConfig(vocab_size=16, context_length=8, num_layers=2, num_heads=4, dim=32, **fields)
    model = GPT(config, generator=torch.Generator().manual_seed(0)).to(dtype)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attention." in name:
                parameter += 0.15 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
    return model


def pairs_of(model):
    return head_pairs(model, free_sectors(model))


def weights(model):
    parameters = parameters_by_name(model)
    return [pair.factors(lambda name: parameters[name].detach().double().clone()) for pair in pairs_of(model)]


def gradients(model):
    parameters = parameters_by_name(model)
    return [pair.factors(lambda name: parameters[name].grad.double()) for pair in pairs_of(model)]


@torch.no_grad()
def turn(model, condition, seed=2):
    """Another gauge of the heads, and of nothing else: random matrices of a condition (1: rotations)."""
    random = torch.Generator().manual_seed(seed)
    parameters = parameters_by_name(model)

    def rotations(number, width):
        return torch.linalg.qr(torch.randn(number, width, width, generator=random, dtype=torch.float64))[0]

    for pair in pairs_of(model):
        first, second = pair.factors(lambda name: parameters[name].detach().double())
        heads, start = len(first), 0
        left = torch.zeros(heads, pair.width, pair.width, dtype=torch.float64)
        if pair.rotary is not None:
            start, planes = pair.rotary.dim, pair.rotary.planes()
            sizes, angles = torch.rand(2, heads, len(planes), generator=random, dtype=torch.float64)
            left[:, :start, :start] = forms.plane_matrices(torch.polar(condition ** (sizes - 0.5), 6 * angles), planes)
        if start < pair.width:
            width = pair.width - start
            sizes = torch.logspace(0.5, -0.5, width, base=condition, dtype=torch.float64)
            left[:, start:, start:] = (rotations(heads, width) * sizes) @ rotations(heads, width)
        right = torch.linalg.inv(left).mT
        pair.put(lambda name: parameters[name].detach(), left @ first, right @ second)
    return model


def batches(steps, seed=3):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(16, (4, 9), generator=random) for _ in range(steps)]


def backward(model, tokens):
    for parameter in model.parameters():
        parameter.grad = None
    loss = model(tokens[:, :-1], tokens[:, 1:])[1]
    loss.backward()
    return loss.detach()


def train(model, optimizer, steps=20, seed=3):
    """Losses before each step on fresh random batches, [steps]."""
    losses = []
    for tokens in batches(steps, seed):
        loss = backward(model, tokens)
        optimizer.step(lambda loss=loss: loss)
        losses.append(loss.double())
    return torch.stack(losses)


def position_matrices(pair):
    """What positions do to a head, at two distances: matrices [width, width]."""
    found = [torch.eye(pair.width, dtype=torch.float64)]
    if pair.rotary is not None:
        angles = torch.arange(1, pair.rotary.dim // 2 + 1)[None].double()
        planes = forms.plane_matrices(torch.polar(torch.ones_like(angles), angles), pair.rotary.planes())[0]
        found.append(torch.block_diag(planes, torch.eye(pair.width - pair.rotary.dim, dtype=torch.float64)))
    return found


def products(model):
    """Of all pairs; under positions, at two distances."""
    return [
        first.mT @ matrix @ second
        for pair, (first, second) in zip(pairs_of(model), weights(model))
        for matrix in position_matrices(pair)
    ]


def differs(some, others):
    """Relative difference of two lists of tensors."""
    apart = sum((a.double() - b.double()).square().sum() for a, b in zip(some, others))
    return (apart / sum(b.double().square().sum() for b in others)).sqrt().item()


def test_the_comparisons_see_a_wrong_answer():
    model, other = make(), make()
    assert differs(products(model), products(other)) == 0
    assert differs(products(model), products(turn(make(), 10.0))) < 1e-13
    with torch.no_grad():
        other.blocks[0].attention.key.weight[0, 0] += 1e-7
    assert differs(products(model), products(other)) > 1e-9
    assert differs(list(model.parameters()), list(turn(make(), 10.0).parameters())) > 0.1


@every_model
def test_turning_heads_changes_no_function(fields):
    tokens = batches(1)[0][:, :-1]
    model = make(**fields)
    assert (model(tokens)[0] - turn(make(**fields), 10.0)(tokens)[0]).abs().max() < 1e-12


# --- what gradients do by themselves ---


@every_model
def test_gradients_are_horizontal(fields):
    model = make(**fields)
    backward(model, batches(1)[0])
    for pair, ab, g in zip(pairs_of(model), weights(model), gradients(model)):
        assert _vertical.vertical_share(*ab, *g, pair.rotary).max().sqrt() < 1e-14


def charges(model):
    return [first @ first.mT - second @ second.mT for first, second in weights(model)]


def descend(model, lr, steps, **settings):
    """Gradient descent on one batch."""
    optimizer, tokens = SGD(model.parameters(), lr=lr, **settings), batches(1)[0]
    for _ in range(steps):
        backward(model, tokens)
        optimizer.step()
    return model


def test_charges_drift_with_the_step():
    start = charges(make())
    drifts = [differs(charges(descend(make(), 0.04 / number, 2 * number)), start) for number in (1, 2, 4)]
    assert drifts[0] > 1e-6
    assert drifts[0] / drifts[1] == pytest.approx(2, rel=0.1)
    assert drifts[1] / drifts[2] == pytest.approx(2, rel=0.05)


def test_charges_fall_under_weight_decay():
    lr, decay, steps = 0.02, 0.2, 100
    ratio = [
        (after * before).sum() / before.square().sum()
        for after, before in zip(charges(descend(make(), lr, steps, weight_decay=decay)), charges(make()))
    ]
    expected = torch.tensor(-2 * decay * lr * steps).exp().item()
    assert expected < 0.5
    assert torch.stack(ratio).tolist() == pytest.approx([expected] * len(ratio), rel=0.02)


def test_rotary_planes_keep_their_charge_and_nothing_else():
    def of_planes(model):
        found, whole = [], []
        for pair, (first, second) in zip(pairs_of(model), weights(model)):
            if pair.sector == "qk":
                gram = first @ first.mT - second @ second.mT
                whole.append(gram)
                diagonal = gram.diagonal(dim1=-2, dim2=-1)
                found.append(diagonal[:, pair.rotary.planes()].sum(dim=-1))
        return found, whole

    (start, all_start), (end, all_end) = (
        of_planes(model)
        for model in (make(positions="rotary"), descend(make(positions="rotary"), 0.05, 60))
    )  # fmt: skip
    assert differs(end, start) < 1e-3
    assert differs(all_end, all_start) > 30 * differs(end, start)


# --- horizontal ---

OPTIMIZERS = {
    "sgd": lambda named: SGD(named, lr=0.1),
    "sgdm": lambda named: optim.create("sgdm", named, lr=0.1, weight_decay=0.05),
    "adam": lambda named: Adam(named, lr=3e-3),
    "adamw": lambda named: AdamW(named, lr=3e-3, weight_decay=0.5),
    "rmsprop": lambda named: RMSprop(named, lr=1e-3),
    "adagrad": lambda named: Adagrad(named, lr=1e-2),
    "nadam": lambda named: NAdam(named, lr=3e-3),
    "muon": lambda named: optim.create("muon", named, lr=3e-3),
    "ecd": lambda named: optim.create("ecd", named, lr=0.5),
    "ecd euler": lambda named: optim.create("ecd", named, lr=0.5, kick="euler"),
    "soap": lambda named: optim.create("soap", named, lr=3e-3),
}
every_optimizer = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)


def changed(model, optimizer, tokens):
    """Weights of the pairs before a step, and what it changed them by."""
    before = weights(model)
    loss = backward(model, tokens)
    optimizer.step(lambda: loss)
    return before, [(a - c, b - d) for (a, b), (c, d) in zip(weights(model), before)]


@every_optimizer
def test_steps_are_horizontal_and_move_the_products_as_before(build):
    model = make(positions="rotary", rotary_fraction=0.5, num_kv_heads=2)
    optimizer = build(list(model.named_parameters()))
    train(model, optimizer, steps=3, seed=4)
    twin = copy.deepcopy(model)
    other = gauge.horizontal(build(list(twin.named_parameters())), twin)
    for each in (other, optimizer):  # loading casts a state of NAdam
        each.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tokens = batches(1)[0]
    before, plain = changed(model, optimizer, tokens)
    _, straight = changed(twin, other, tokens)
    for pair, ab, d, h in zip(pairs_of(model), before, plain, straight):
        share = _vertical.vertical_share(*ab, *d, pair.rotary).sqrt()
        assert _vertical.vertical_share(*ab, *h, pair.rotary).sqrt().max() < 1e-11
        # What is gone is the vertical part and no more: products move alike, to first order in the step.
        for matrix in position_matrices(pair):
            tangents = [d.mT @ matrix @ ab[1] + ab[0].mT @ matrix @ e for d, e in (d, h)]
            assert differs([tangents[1]], [tangents[0]]) < 1e-12
        if build is not OPTIMIZERS["sgd"]:
            assert share.max() > 1e-5, "there was something to take away"
    # State and other parameters are as without.
    for one, two in zip(optimizer.state_dict()["state"].values(), other.state_dict()["state"].values()):
        assert one.keys() == two.keys()
        tensors = [[x for x in state.values() if isinstance(x, torch.Tensor)] for state in (one, two)]
        assert all(torch.equal(a, b) for a, b in zip(*tensors))
    assert torch.equal(model.token_embedding.weight, twin.token_embedding.weight)


def test_horizontal_stops_the_drift_of_adam():
    drifts = []
    for treat in (lambda optimizer, model: optimizer, gauge.horizontal):
        model = make()
        start = charges(model)
        train(model, treat(Adam(model.parameters(), lr=3e-3), model), steps=30)
        drifts.append(differs(charges(model), start))
    assert drifts[0] > 0.02
    assert drifts[1] < drifts[0] / 5, drifts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_horizontal_in_low_precision(dtype):
    """What is left is the rounding of the weights themselves."""
    model = make(dtype)
    optimizer = gauge.horizontal(Adam(model.parameters(), lr=3e-3), model)
    train(model, optimizer, steps=3)
    before, change = changed(model, optimizer, batches(1)[0])
    rounding = torch.finfo(dtype).eps
    for pair, ab, d in zip(pairs_of(model), before, change):
        share = _vertical.vertical_share(*ab, *d, pair.rotary).sqrt()
        size = torch.stack([part.flatten(1).norm(dim=1) for part in ab]).norm(dim=0)
        moved = torch.stack([part.flatten(1).norm(dim=1) for part in d]).norm(dim=0)
        assert (share * moved < rounding * size).all()
    assert change[0][0].abs().max() > 1e-4


def test_lbfgs_runs_under_horizontal():
    model, tokens = make(), batches(1)[0]
    optimizer = gauge.horizontal(LBFGS(model.parameters(), lr=0.1, max_iter=4), model)
    losses = []
    for _ in range(3):
        before = weights(model)
        losses.append(optimizer.step(lambda: backward(model, tokens)).item())
        change = [(a - c, b - d) for (a, b), (c, d) in zip(weights(model), before)]
        for ab, d in zip(before, change):
            assert _vertical.vertical_share(*ab, *d).sqrt().max() < 1e-10
    assert losses[2] < losses[0]


def test_horizontal_comes_off_and_leaves_the_state_as_it_was():
    model, plain = make(), make()
    settings = {"lr": 3e-3, "weight_decay": 0.1}
    optimizer = gauge.horizontal(AdamW(model.parameters(), **settings), model)
    train(model, optimizer, steps=2)
    # A state goes both ways.
    other = AdamW(plain.parameters(), **settings)
    plain.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    gauge.release(optimizer)
    for one, two in ((model, optimizer), (plain, other)):
        train(one, two, steps=2, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))
    gauge.horizontal(optimizer, model)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    train(model, optimizer, steps=1)


# --- QuotientSGD by itself ---

RESTS = {
    "default": None,
    "adamw": lambda named: AdamW(named, lr=1e-3),
    **{name: OPTIMIZERS[name] for name in ("sgdm", "muon", "ecd", "soap")},
}
every_rest = pytest.mark.parametrize("rest", RESTS.values(), ids=RESTS)


@torch.no_grad()
def isotropic(model, size=0.4):
    """Heads whose two factors have orthogonal rows of one length."""
    random, parameters = torch.Generator().manual_seed(4), parameters_by_name(model)
    for pair in pairs_of(model):
        factors = []
        for part in pair.factors(lambda name: parameters[name].detach()):
            rows = torch.randn(part.shape, generator=random, dtype=torch.float64)
            factors.append(size * torch.linalg.qr(rows.mT)[0].mT)
        pair.put(lambda name: parameters[name].detach(), *factors)
    return model


@every_model
def test_at_balanced_heads_a_step_is_that_of_sgd(fields):
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}
    ours, plain = isotropic(make(**fields)), isotropic(make(**fields))
    start = products(ours)
    for model, optimizer in (
        (ours, gauge.QuotientSGD(ours, **settings, sectors=free_sectors(ours))),
        (plain, SGD(plain.parameters(), **settings)),
    ):
        backward(model, batches(1)[0])
        optimizer.step()
    assert differs(products(ours), start) > 1e-3
    assert differs(products(ours), products(plain)) < 1e-13
    heads = {name for pair in pairs_of(ours) for name in pair.names}
    for (name, one), two in zip(ours.named_parameters(), plain.parameters()):
        assert name in heads or torch.equal(one, two)


@every_model
def test_norms_are_equal_and_momentum_is_horizontal(fields):
    model = make(**fields)
    optimizer = gauge.QuotientSGD(model, lr=0.1, sectors=free_sectors(model))
    train(model, optimizer, steps=3)
    parameters = parameters_by_name(model)
    optimizer.param_groups[0]["lr"] = 0.0  # the momentum is made horizontal at the weights of the step
    train(model, optimizer, steps=1)
    for pair, (first, second) in zip(pairs_of(model), weights(model)):
        kept = pair.factors(lambda name: optimizer.state[parameters[name]]["momentum_buffer"])
        metric = _vertical.invariant_metric(first, second, pair.rotary)
        assert differs(metric.horizontal(*kept, (first, second)), kept) < 1e-12
        scale = _vertical.equal_norms(first, second, pair.rotary)
        assert (scale - 1).abs().max() < 1e-13


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@every_rest
def test_state_round_trips(rest, momentum):
    def build(model):
        return gauge.QuotientSGD(model, lr=0.1, momentum=momentum, weight_decay=0.01, rest=rest)

    one, two = make(torch.float32), make(torch.float32)
    optimizer, resumed = build(one), build(two)
    assert optimizer.param_groups[0]["quotient"] and not optimizer.param_groups[1]["quotient"]
    train(one, optimizer, steps=3)
    two.load_state_dict(one.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.rest.state is resumed.state
    assert [id(group) for group in resumed.rest.param_groups] == [id(group) for group in resumed.param_groups[1:]]
    assert torch.equal(train(one, optimizer, 3, seed=6), train(two, resumed, 3, seed=6))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    heads = {id(one.get_parameter(name)) for pair in pairs_of(one) for name in pair.names}
    assert any(id(parameter) in heads for parameter in optimizer.state) is (momentum > 0)


def test_schedulers_reach_both_and_the_loss_comes_back():
    model = make()
    optimizer = gauge.QuotientSGD(model, lr=0.1, rest=RESTS["ecd"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0)
    start = [parameter.clone() for parameter in model.parameters()]
    assert optimizer.step(lambda: backward(model, batches(1)[0])).item() > 0
    # Nothing moves at a rate of 0 but the gauge, which is of no account.
    heads = {name for pair in pairs_of(model) for name in pair.names}
    assert all(
        name in heads or torch.equal(a, b) for (name, a), b in zip(model.named_parameters(), start)
    )  # fmt: skip
    assert differs(products(model), products(make())) < 1e-13
    scheduler.step()
    optimizer.step(lambda: backward(model, batches(1)[0]))
    assert not torch.equal(model.token_embedding.weight, start[0])
    assert differs(products(model), products(make())) > 1e-4
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


class Fused(torch.nn.Module):
    """Weights of one layer whose queries, keys and values are one map."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(16, 16)
        self.qkv, self.output = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        self.up, self.down = torch.nn.Linear(16, 4, bias=False), torch.nn.Linear(4, 16, bias=False)


@gauge.describes(Fused)
def layout(model):
    query, key, value = (gauge.rows("qkv", 2, 8, start=16 * i, bias=True) for i in range(3))
    output = gauge.rows("output", 2, 8, side="in", bias=True)
    heads = gauge.HeadLayout(
        num_heads=2, num_kv_heads=2, head_dim=8, query=query, key=key, value=value, output=output
    )  # fmt: skip
    mlp = gauge.MLP(up=gauge.rows("up", 1, 4), down=gauge.rows("down", 1, 4, side="in"), activation="gelu")
    layer = gauge.Layer(attention=heads, mlp=mlp)
    return gauge.ModelLayout(
        kind="fused", dim=16, vocab_size=16, token_embedding="table.weight", layers=(layer,), other_embeddings={}
    )


@pytest.mark.parametrize(("sectors", "others"), [(("vo",), slice(0, 32)), (("qk",), slice(32, 48))])
def test_what_a_fused_weight_holds_besides_gets_gradient_descent(sectors, others):
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    random = torch.Generator().manual_seed(6)
    model = Fused().double()
    twin, turned = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():  # the pair in another gauge: twice and half as large
        pair = head_pairs(turned, sectors)[0]
        parameters = parameters_by_name(turned)
        first, second = pair.factors(lambda name: parameters[name].clone())
        pair.put(parameters.__getitem__, 2 * first, second / 2)
    optimizers = [gauge.QuotientSGD(one, **settings, sectors=sectors) for one in (model, turned)]
    optimizers.append(SGD(twin.parameters(), **settings))
    for step in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            twin.get_parameter(name).grad = parameter.grad.clone()
            turned.get_parameter(name).grad = parameter.grad.clone()
        if step == 0:  # then both have made their norms equal, and are in one gauge
            first, second = pair.factors(lambda name: parameters[name].grad.clone())
            pair.put(lambda name: parameters[name].grad, first / 2, 2 * second)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(model.table.weight, twin.table.weight)
    assert torch.equal(model.output.bias, twin.output.bias)
    for got, wanted in ((model.qkv.weight, twin.qkv.weight), (model.qkv.bias, twin.qkv.bias)):
        difference = (got - wanted).abs().flatten(1) if got.ndim > 1 else (got - wanted).abs()[:, None]
        assert difference[others].max() < 1e-15
        rest = torch.cat([difference[: others.start], difference[others.stop :]])
        assert (rest.amax(dim=1) > 1e-4).float().mean() > 0.4
    assert differs(list(model.parameters()), list(turned.parameters())) < 1e-13


# --- two gauges ---


def in_two_gauges(build, condition, fields=None, steps=12):
    """Largest difference of the losses of two runs in two gauges, and how far the products of one came."""
    losses, moved = [], 0.0
    for change in (lambda model: model, lambda model: turn(model, condition)):
        model = change(make(**(fields or {})))
        start = products(model)
        losses.append(train(model, build(model), steps))
        moved = differs(products(model), start)
    return ((losses[0] - losses[1]).abs() / losses[0]).max().item(), moved


@every_model
def test_the_invariant_metric_trains_alike_in_every_gauge(fields):
    def build(model):
        return gauge.QuotientSGD(
            model, lr=0.1, weight_decay=0.01, sectors=free_sectors(model), rest=lambda named: AdamW(named, lr=1e-3)
        )

    difference, moved = in_two_gauges(build, 10.0, fields)
    assert moved > 0.1
    assert difference < 1e-9


@pytest.mark.parametrize("treat", [lambda optimizer, model: optimizer, gauge.horizontal], ids=["alone", "horizontal"])
@pytest.mark.parametrize("name", ["sgdm", "ecd", "muon", "adam"])
def test_others_train_alike_under_rotations_at_most(name, treat, monkeypatch):
    # Torch's Muon orthogonalises in bfloat16, whose rounding would be all that is seen; and it leaves biases to Adam.
    def orthogonal(gradient, coefficients, steps, eps):
        x = gradient / gradient.norm()
        for _ in range(steps):
            gram = x @ x.mT
            x = coefficients[0] * x + (coefficients[1] * gram + coefficients[2] * gram @ gram) @ x
        return x

    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", orthogonal)

    def build(model):
        return treat(OPTIMIZERS[name](list(model.named_parameters())), model)

    (rotated, moved), (scaled, _) = (
        in_two_gauges(build, condition, {"attention_bias": name != "muon"}, steps=8) for condition in (1.0, 10.0)
    )
    assert moved > 3e-3
    assert scaled > 1e-4
    assert rotated > 1e-4 if name == "adam" else rotated < 1e-9


# --- what is refused ---

TREATMENTS = {
    "horizontal": lambda model, **settings: gauge.horizontal(Adam(model.parameters()), model, **settings),
    "QuotientSGD": lambda model, **settings: gauge.QuotientSGD(model, **settings),
}
every_treatment = pytest.mark.parametrize("treat", TREATMENTS.values(), ids=TREATMENTS)


@every_treatment
def test_refused_models(treat):
    with pytest.raises(ValueError, match=r"layer 0 are normalised"):
        treat(make(qk_norm=True))
    with pytest.raises(ValueError, match="sectors must be"):
        treat(make(), sectors=("ov",))
    with pytest.raises(TypeError, match="no layout is known for Linear"):
        treat(torch.nn.Linear(2, 2))
    broken = make()
    breaking.break_symmetry(broken, seed=0, query_std=0.1)
    with pytest.raises(ValueError, match="unlearned biases"):
        treat(broken)
    singular = make()
    with torch.no_grad():
        singular.blocks[1].attention.value.weight[8:10] = 0
        singular.blocks[1].attention.value.bias[8:10] = 0
    with pytest.raises(ValueError, match="vo pair of layer 1, head 1, has not full rank"):
        treat(singular)
    treat(singular, sectors=("qk",))
    frozen = make()
    frozen.blocks[0].attention.key.bias.requires_grad_(False)
    if treat is TREATMENTS["QuotientSGD"]:
        with pytest.raises(ValueError, match=r"only a part of the qk pair of layer 0, not .*key.bias"):
            treat(frozen)
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match=r"none of the pairs|no parameter of this model"):
        treat(frozen)


def test_refused_optimizers():
    model = make()
    with pytest.raises(ValueError, match="not of this model"):
        gauge.horizontal(Adam([*model.parameters(), torch.nn.Parameter(torch.zeros(2))]), model)
    named = [parameter for name, parameter in model.named_parameters() if "key.bias" not in name]
    with pytest.raises(ValueError, match="only a part of the qk pair of layer 0"):
        gauge.horizontal(Adam(named), model)
    gauge.horizontal(Adam(named), model, sectors=("vo",))
    optimizer = gauge.horizontal(Adam(model.parameters()), model)
    with pytest.raises(ValueError, match="treated already, by horizontal"):
        gauge.horizontal(optimizer, model)
    with pytest.raises(ValueError, match="treated already, by QuotientSGD"):
        gauge.horizontal(gauge.QuotientSGD(model), model)
    with pytest.raises(ValueError, match="nothing can be taken off"):
        gauge.release(gauge.QuotientSGD(model))
    with pytest.raises(ValueError, match="LBFGS evaluates the loss many times"):
        gauge.QuotientSGD(model, rest=lambda named: LBFGS([parameter for _, parameter in named]))
    with pytest.raises(ValueError, match="was not given"):
        gauge.QuotientSGD(model, rest=lambda named: Adam(model.parameters()))
    with pytest.raises(ValueError, match="takes no others"):
        gauge.QuotientSGD(model).add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match=r"momentum is in \[0, 1\), received lr 0.1, weight_decay 0.0, momentum 1.0"):
        gauge.QuotientSGD(model, lr=0.1, momentum=1.0)
    with pytest.raises(ValueError, match="not the state of a QuotientSGD"):
        gauge.QuotientSGD(model).load_state_dict(SGD(model.parameters(), lr=0.1).state_dict())


def test_a_head_that_becomes_singular_is_named_and_nothing_changes():
    model = make()
    optimizer = gauge.QuotientSGD(model, rest=RESTS["ecd"])
    train(model, optimizer, steps=2)
    with torch.no_grad():
        model.blocks[1].attention.key.weight[9] = model.blocks[1].attention.key.weight[10]
        model.blocks[1].attention.key.bias[9] = model.blocks[1].attention.key.bias[10]
    before = [parameter.clone() for parameter in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="layer 1, sector qk, head 1: a factor is singular or not finite"):
        optimizer.step(lambda: backward(model, batches(1)[0]))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    for one, two in zip(state["state"].values(), optimizer.state_dict()["state"].values()):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_what_the_other_optimiser_refuses_changes_nothing():
    model = make()
    optimizer = gauge.QuotientSGD(model, rest=lambda named: optim.create("ecd", named, F0=100.0))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(optim.EnergyError):
        optimizer.step(lambda: backward(model, batches(1)[0]))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_weights_that_are_not_finite_are_reported():
    model = make()
    optimizer = gauge.horizontal(SGD(model.parameters(), lr=0.1), model)
    backward(model, batches(1)[0])
    model.blocks[1].attention.value.weight.grad[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"not finite \(sector vo, among layers 0, 1\)"):
        optimizer.step()
