"""Unlearned biases: what is drawn, when, and what survives compile, checkpointing, copies and files."""

import copy

import pytest
import scipy.stats
import torch
from torch import nn

from erlangen import breaking
from erlangen.breaking._noise import mix, normal, stream
from erlangen.lm import GPT, GPTConfig


def make(seed=0, **fields):
    fields = {"vocab_size": 32, "context_length": 16, "num_layers": 2, "num_heads": 4, "dim": 32} | fields
    return GPT(GPTConfig(**fields), generator=torch.Generator().manual_seed(seed))


TOKENS = torch.randint(32, (3, 17), generator=torch.Generator().manual_seed(0))


def loss_of(model):
    return model(TOKENS[:, :-1], TOKENS[:, 1:])[1]


def gradients(model):
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


# The noise


def test_noise_is_standard_normal_and_independent():
    keys = stream(seed=7, size=400)
    draws = torch.stack([normal(keys, torch.tensor(n), torch.float64) for n in range(500)])
    assert scipy.stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = torch.corrcoef(draws.T)
    off = correlation[~torch.eye(400, dtype=torch.bool)]
    assert off.abs().max() < 6 / 500**0.5
    lagged = (draws[1:] * draws[:-1]).mean()
    assert abs(lagged) < 5 / draws.numel() ** 0.5
    assert torch.isfinite(draws).all()


def test_noise_extremes_are_finite():
    """The two ends of the 23 random bits give the largest numbers, and none is infinite."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        values = normal(stream(0, 200_000), torch.tensor(1), dtype)
        assert torch.isfinite(values).all() and values.abs().max() <= 5.3


def test_mix_is_a_bijection_on_a_sample():
    hashed = mix(torch.arange(1_000_000))
    assert hashed.unique().numel() == 1_000_000
    assert hashed.min() >= 0 and hashed.max() < 2**32


def test_seeds_draws_and_coordinates_differ():
    a = normal(stream(1, 64), torch.tensor(1), torch.float64)
    for b in (
        normal(stream(2, 64), torch.tensor(1), torch.float64),
        normal(stream(1 + 2**32, 64), torch.tensor(1), torch.float64),
        normal(stream(1, 64), torch.tensor(2), torch.float64),
    ):
        assert not (a == b).any()


# What is drawn


def record_biases(model, steps):
    """The (query, value) bias of each layer, seen from outside: the output of a projection minus its linear map."""
    seen = []

    def hook(module, args, output):
        seen[-1].append((output - nn.functional.linear(args[0], module.weight, module.bias))[0, 0].detach())

    handles = [
        getattr(block.attention, name).register_forward_hook(hook)
        for block in model.blocks
        for name in ("query", "value")
    ]
    for _ in range(steps):
        seen.append([])
        loss_of(model)
    for handle in handles:
        handle.remove()
    return seen


def test_defaults_are_the_published_ones():
    model = breaking.break_symmetry(make().double(), seed=3)
    draws = record_biases(model, 400)
    query = torch.stack([step[0] for step in draws]).unflatten(1, (4, 8))
    value = torch.stack([step[1] for step in draws]).unflatten(1, (4, 8))
    assert torch.allclose(query, query[:, :1].expand_as(query), atol=1e-12), "one vector for all heads of a layer"
    other_layer = torch.stack([step[2] for step in draws]).unflatten(1, (4, 8))
    assert (query[:, 0] - other_layer[:, 0]).abs().min() > 0, "each layer draws on its own"
    error = 4 / 400**0.5
    std = torch.linspace(0.05, 0.15, 8).double()
    assert ((query[:, 0].mean(0) - 0.5).abs() < error * std).all()
    assert ((query[:, 0].std(0) / std - 1).abs() < 0.2).all()
    assert (value[:, 0].mean(0).abs() < error * 0.05).all()
    assert ((value[:, 0].std(0) / 0.05 - 1).abs() < 0.2).all()


def test_per_head_vectors_differ():
    model = breaking.break_symmetry(make(num_kv_heads=2), per_head=True)
    ((query, value, *_),) = record_biases(model, 1)
    assert query.unflatten(0, (4, 8)).std(0).min() > 0
    assert value.shape == (16,) and (value[:8] != value[8:]).all()


def test_evaluation_uses_the_mean():
    model = breaking.break_symmetry(make().double(), query_mean=0.25, value_mean=-0.5)
    loss_of(model)
    model.eval()
    for step in record_biases(model, 2):
        torch.testing.assert_close(step[0], torch.full((32,), 0.25, dtype=torch.float64))
        torch.testing.assert_close(step[1], torch.full((32,), -0.5, dtype=torch.float64))


def test_evaluation_may_use_the_last_draw():
    """The published validation does; the draw is found again from its number."""
    model = breaking.break_symmetry(make().double(), seed=2)
    loss_of(model)
    (drawn,) = record_biases(model, 1)
    model.eval().symmetry_breaking.evaluate_with = "last"
    twin = breaking.break_symmetry(make(seed=1).double(), seed=9).eval()
    twin.load_state_dict(model.state_dict())
    twin.symmetry_breaking.evaluate_with = "last"
    for part in (model, twin):
        for found, expected in zip(record_biases(part, 1)[0], drawn):
            torch.testing.assert_close(found, expected)
    twin.symmetry_breaking.evaluate_with = "mean"
    torch.testing.assert_close(record_biases(twin, 1)[0][0], torch.full((32,), 0.5, dtype=torch.float64))


def test_a_mean_can_be_changed_by_layer():
    model = breaking.break_symmetry(make(num_kv_heads=2).double()).eval()
    mean = torch.linspace(-1, 1, 16, dtype=torch.float64)
    model.symmetry_breaking.set_mean("value", 1, mean)
    (found,) = record_biases(model, 1)
    torch.testing.assert_close(found[3], mean)
    torch.testing.assert_close(found[1], torch.zeros(16, dtype=torch.float64))
    assert torch.equal(model.symmetry_breaking.means(1)[1], mean)


def test_deterministic_under_a_seed_and_untouched_by_the_global_generator():
    first = breaking.break_symmetry(make(), seed=5)
    a = [loss_of(first).item() for _ in range(3)]
    torch.manual_seed(99)
    second = breaking.break_symmetry(make(), seed=5)
    state = torch.get_rng_state()
    assert [loss_of(second).item() for _ in range(3)] == a
    assert torch.equal(torch.get_rng_state(), state)
    assert [loss_of(breaking.break_symmetry(make(), seed=6)).item()] != a[:1]
    assert len(set(a)) == 3, "a fresh draw each forward"


def test_mean_equals_a_learned_bias_that_starts_there():
    """A fixed mean beside learned biases is the same run as learned biases that start at the mean, to rounding."""

    def run(model, steps=30):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for _ in range(steps):
            loss = loss_of(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    injected = breaking.break_symmetry(make().double(), query_std=0.0, value_mean=0.5, value_std=0.0)
    learned = make().double()
    for block in learned.blocks:
        nn.init.constant_(block.attention.query.bias, 0.5)
        nn.init.constant_(block.attention.value.bias, 0.5)
    a, b = run(injected), run(learned)
    assert a[0] - a[-1] > 0.5, "the runs go somewhere"
    assert max(abs(x - y) for x, y in zip(a, b)) < 1e-12


# When


def test_a_recomputed_forward_sees_the_same_draw():
    plain = breaking.break_symmetry(make().double(), seed=2)
    recomputing = breaking.break_symmetry(make().double(), seed=2)
    recomputing.gradient_checkpointing = True
    for _ in range(3):
        a, b = gradients(plain), gradients(recomputing)
        assert a[0] == b[0]
        for x, y in zip(a[1], b[1]):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_one_draw_a_step_when_asked():
    model = breaking.break_symmetry(make(), redraw="step")
    at_rest = loss_of(model).item()
    breaking.redraw(model)
    first = [loss_of(model).item() for _ in range(3)]
    breaking.redraw(model)
    second = [loss_of(model).item() for _ in range(3)]
    assert len({at_rest, *first, *second}) == 3
    other = breaking.break_symmetry(make(), redraw="forward")
    count = other.symmetry_breaking.num_draws.item()
    breaking.redraw(other)
    breaking.redraw(make())
    assert other.symmetry_breaking.num_draws.item() == count, "a model that draws by itself is left alone"


# What survives


def test_state_dict_holds_the_draws():
    model = breaking.break_symmetry(make(), seed=4)
    for _ in range(5):
        loss_of(model)
    twin = breaking.break_symmetry(make(seed=1), seed=8)
    twin.load_state_dict(model.state_dict())
    assert [loss_of(twin).item() for _ in range(3)] == [loss_of(model).item() for _ in range(3)]
    with pytest.raises(RuntimeError, match="symmetry_breaking"):
        make().load_state_dict(model.state_dict())


def test_a_deep_copy_has_its_own_draws():
    model = breaking.break_symmetry(make(), seed=4)
    twin = copy.deepcopy(model)
    expected = [loss_of(model).item() for _ in range(3)]
    assert twin.symmetry_breaking.num_draws.item() == 0
    assert [loss_of(twin).item() for _ in range(3)] == expected


MODERN = {"positions": "rotary", "rotary_fraction": 0.5, "qk_norm": True, "num_kv_heads": 2, "mlp": "swiglu"}


@pytest.mark.parametrize(
    ("fields", "is_broken", "backend"),
    [
        ({}, False, "aot_eager"),
        ({}, True, "aot_eager"),
        ({"mlp": "prelu"}, True, "aot_eager"),
        (MODERN, False, "aot_eager"),
        (MODERN | {"num_layers": 1}, True, "inductor"),
    ],
    ids=str,
)
def test_compiles_without_a_graph_break(fields, is_broken, backend):
    torch._dynamo.reset()
    model = make(**fields).double()
    if is_broken:
        breaking.break_symmetry(model, seed=1)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    for _ in range(3):
        model.zero_grad()
        compiled.zero_grad()
        expected, found = loss_of(model), loss_of(compiled)
        torch.testing.assert_close(found, expected)
        expected.backward()
        found.backward()
        for a, b in zip(model.parameters(), compiled.parameters()):
            torch.testing.assert_close(b.grad, a.grad)
    torch.testing.assert_close(loss_of(compiled.eval()), loss_of(model.eval()))


def test_bfloat16_autocast_keeps_the_projections_in_bfloat16():
    model = breaking.break_symmetry(make())
    seen = []
    model.blocks[0].attention.output.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model)
    assert seen == [torch.bfloat16]


def test_restore_is_the_inverse():
    model = make()
    plain = loss_of(model).item()
    names = list(model.state_dict())
    breaking.break_symmetry(model)
    assert loss_of(model).item() != plain
    assert breaking.restore(model) is model
    assert loss_of(model).item() == plain
    assert list(model.state_dict()) == names
    assert {type(module) for module in model.modules()} == {type(module) for module in make().modules()}
    breaking.break_symmetry(model)


def test_errors():
    model = breaking.break_symmetry(make())
    with pytest.raises(ValueError, match="broken already"):
        breaking.break_symmetry(model)
    with pytest.raises(ValueError, match="before it is compiled"):
        breaking.break_symmetry(torch.compile(make()))
    with pytest.raises(ValueError, match="not broken"):
        breaking.restore(make())
    with pytest.raises(ValueError, match="query_std"):
        breaking.break_symmetry(make(), query_std=-1.0)
    with pytest.raises(ValueError, match="redraw"):
        breaking.break_symmetry(make(), redraw="epoch")
    with pytest.raises(TypeError, match="no layout"):
        breaking.break_symmetry(nn.Linear(2, 2))
    replaced = make()
    replaced.blocks[1].attention.value = nn.Bilinear(32, 32, 32)
    with pytest.raises(TypeError, match="value projection of layer 1 is a Bilinear"):
        breaking.break_symmetry(replaced)
    assert not hasattr(replaced, "symmetry_breaking"), "a refused model is left alone"
