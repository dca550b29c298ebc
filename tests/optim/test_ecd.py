import copy
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from ecd_reference import reference_step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import erlangen.optim.ecd as ecd_module
from erlangen.optim import ECD, EnergyError

SHAPES = [(5, 3), (7,), (2, 3, 4), ()]


def make(seed: int = 0, dtype: torch.dtype = torch.float64, shapes=SHAPES) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


def quartic(params: list[Tensor], offset: float = 0.3) -> Tensor:
    """A loss whose gradient is not along the position."""
    terms = [(p.square() * (1 + torch.arange(p.numel(), dtype=p.dtype).view(p.shape))).sum() for p in params]
    return sum(terms) / 20 + 0.1 * torch.cos(sum(p.sum() for p in params)) + offset


def backward(params: list[Tensor], offset: float = 0.3) -> Tensor:
    for p in params:
        p.grad = None
    loss = quartic(params, offset)
    loss.backward()
    return loss.detach()


def velocity(optimizer: ECD) -> list[Tensor]:
    return [optimizer.state[p]["momentum"] for group in optimizer.param_groups for p in group["params"]]


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(x.double().square().sum().item() for x in tensors))


def worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(actual, expected))


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize(("kick", "dot"), [("exact", "global"), ("euler", "global"), ("euler", "per_tensor")])
@pytest.mark.parametrize("weight_decay", [(0.0, 0.0), (0.05, 0.0), (0.02, 0.1)])
def test_agrees_with_the_equations(kick, dot, weight_decay, foreach):
    params = make()
    expected = [p.detach().clone() for p in params]
    rates = (0.7, 0.35)
    groups = [
        {"params": params[:2], "lr": rates[0], "weight_decay": weight_decay[0]},
        {"params": params[2:], "lr": rates[1], "weight_decay": weight_decay[1]},
    ]
    optimizer = ECD(groups, eta=40.0, F0=-1.5, kick=kick, dot=dot, foreach=foreach)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    expected_u = None
    for step in range(20):
        loss = backward(params)
        grads = [p.grad.clone() for p in params]
        lr = [rates[i >= 2] / (1 + 0.1 * step) for i in range(4)]
        wd = [weight_decay[i >= 2] for i in range(4)]
        expected, expected_u = reference_step(
            expected, grads, expected_u, loss.item(), lr=lr, eta=40.0, F0=-1.5, weight_decay=wd, kick=kick, dot=dot
        )
        optimizer.step(loss=loss)
        schedule.step()
        assert worst(params, expected) < 1e-12
        assert worst(velocity(optimizer), expected_u) < 1e-12


def test_the_comparison_sees_a_wrong_kick():
    params = make()
    start = [p.detach().clone() for p in params]
    optimizer = ECD(params, kick="euler")
    state = None
    for _ in range(3):
        loss = backward(params)
        grads = [p.grad.clone() for p in params]
        common = {"lr": [1.0] * 4, "eta": 100.0, "F0": 0.0, "weight_decay": [0.0] * 4, "kick": "exact"}
        start, state = reference_step(start, grads, state, loss.item(), **common)
        optimizer.step(loss=loss)
    assert worst(params, start) > 1e-4


@pytest.mark.parametrize("chunk", [3, 2**18])
def test_large_tensors_are_done_in_pieces(chunk, monkeypatch):
    monkeypatch.setattr(ecd_module, "_CPU_CHUNK", chunk)
    params, other = make(), make()
    optimizer = ECD(params, weight_decay=0.1)
    expected, u = [p.detach().clone() for p in other], None
    for _ in range(4):
        loss = backward(params)
        wd = {"weight_decay": [0.1] * 4, "lr": [1.0] * 4}
        grads = [p.grad.clone() for p in params]
        expected, u = reference_step(expected, grads, u, loss.item(), eta=100.0, F0=0.0, kick="exact", **wd)
        optimizer.step(loss=loss)
    assert worst(params, expected) < 1e-12


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    eta=st.floats(0.5, 1e4),
    V=st.sampled_from([1e-6, 1.0, 1e6]),
    against=st.sampled_from([0.0, 1.0, 1e-3, 1e-9]),
)
def test_exact_kick_keeps_the_speed_and_the_step_length(seed, exponent, dtype, eta, V, against):
    params = make(seed, dtype, [(11, 3), (5,)])
    for p in params:
        p.data.zero_()
    optimizer = ECD(params, lr=0.5, eta=eta)
    generator = torch.Generator().manual_seed(seed + 1)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    for step in range(4):
        for p in params:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if step and against:  # almost straight uphill, where the formula cancels
                noise = noise * against + 10 * optimizer.state[p]["momentum"].double()
            p.grad = (noise * 10.0**exponent).to(dtype)
        before = [p.detach().clone() for p in params]
        optimizer.step(loss=V)
        assert abs(norm(velocity(optimizer)) - 1) < tolerance
        moved = norm([p.detach() - q for p, q in zip(params, before)])
        assert abs(moved * math.sqrt(eta) / 0.5 - 1) < 4 * tolerance


def test_flipping_the_velocity_retraces_the_path():
    params = make()
    optimizer = ECD(params, lr=0.3, eta=20.0)
    path = []
    for _ in range(10):
        path.append([p.detach().clone() for p in params])
        optimizer.step(loss=backward(params))
    # A step is kick, then drift; backwards it is drift, then kick: one drift by hand shifts the order.
    for p in params:
        optimizer.state[p]["momentum"].neg_()
        p.data.add_(optimizer.state[p]["momentum"], alpha=0.3 / math.sqrt(20.0))
    for position in reversed(path[:-1]):
        optimizer.step(loss=backward(params))
        assert worst([p.detach() for p in params], position) < 1e-10


def rotated_run(make_optimizer, rotation: Tensor | None) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    data = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    R = torch.eye(6, dtype=torch.float64) if rotation is None else rotation
    p = torch.nn.Parameter(R @ weight)
    optimizer = make_optimizer([p])
    for _ in range(5):
        optimizer.zero_grad()
        z = R.mT @ p
        loss = (torch.tanh(data @ z.mT) - 0.3).square().sum() + 0.1
        loss.backward()
        optimizer.step(lambda loss=loss: loss)
    return R.mT @ p.detach()


def test_equivariant_under_rotations_of_the_weights():
    generator = torch.Generator().manual_seed(4)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]

    def gap(make_optimizer):
        return worst([rotated_run(make_optimizer, rotation)], [rotated_run(make_optimizer, None)])

    assert gap(lambda ps: ECD(ps, lr=0.5)) < 1e-12
    assert gap(lambda ps: ECD(ps, lr=0.5, kick="euler")) < 1e-11
    assert gap(lambda ps: torch.optim.AdamW(ps, lr=0.05)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kick", ["exact", "euler"])
def test_a_resumed_run_repeats_bit_for_bit(dtype, kick):
    def run(save_at: int | None) -> list[Tensor]:
        params = make(dtype=dtype)
        settings = {"nu": 0.3, "kick": kick, "weight_decay": 0.01}
        optimizer = ECD(params, **settings)
        for step in range(20):
            if step == save_at:
                saved = copy.deepcopy(optimizer.state_dict())
                params = [torch.nn.Parameter(p.detach().clone()) for p in params]
                optimizer = ECD(params, **settings)
                optimizer.load_state_dict(saved)
            optimizer.step(loss=backward(params))
        return [p.detach() for p in params] + velocity(optimizer)

    assert all(torch.equal(a, b) for a, b in zip(run(None), run(7)))


def test_state_is_one_tensor_in_at_least_float32():
    params = make(dtype=torch.bfloat16)
    optimizer = ECD(params)
    start = [p.detach().clone() for p in params]
    for _ in range(5):
        optimizer.step(loss=backward(params))
    for p in params:
        assert list(optimizer.state[p]) == ["momentum"]
        assert optimizer.state[p]["momentum"].dtype == torch.float32
        assert optimizer.state[p]["momentum"].shape == p.shape
    assert abs(norm(velocity(optimizer)) - 1) < 1e-6
    assert 0.3 < norm([p.detach() - q for p, q in zip(params, start)]) < 0.6


def test_bounces_have_their_own_random_numbers():
    def run(nu: float, seed: int) -> tuple[list[Tensor], ECD]:
        params = make()
        optimizer = ECD(params, nu=nu, seed=seed)
        for _ in range(3):
            optimizer.step(loss=backward(params))
        return [p.detach() for p in params], optimizer

    before = torch.get_rng_state()
    calm, _ = run(0.0, 0)
    one, optimizer = run(0.5, 0)
    assert torch.equal(before, torch.get_rng_state())
    assert worst(one, calm) > 1e-4
    assert worst(one, run(0.5, 1)[0]) > 1e-4
    assert worst(one, run(0.5, 0)[0]) == 0
    assert abs(norm(velocity(optimizer)) - 1) < 1e-12


def test_no_random_generator_without_bounces(monkeypatch):
    monkeypatch.setattr(ecd_module._shards, "generator", lambda *key: pytest.fail("a generator was made"))
    params = make()
    ECD(params).step(loss=backward(params))


def test_euler_bounce_keeps_the_length():
    lengths = []
    for nu in (0.0, 2.0):
        params = make()
        optimizer = ECD(params, nu=nu, kick="euler")
        optimizer.step(loss=backward(params))
        for p in params:  # another direction, so that the kick lengthens u
            optimizer.state[p]["momentum"].copy_(torch.ones_like(p))
            p.data.fill_(0.5)
        optimizer.step(loss=backward(params))
        lengths.append(norm(velocity(optimizer)))
    assert lengths[0] > 1.01
    assert abs(lengths[1] / lengths[0] - 1) < 1e-12


@pytest.mark.parametrize("loss", [0.5, 0.2, math.nan, math.inf])
def test_a_bad_loss_changes_nothing(loss):
    params = make()
    optimizer = ECD(params, F0=0.5)
    backward(params)
    before = [p.detach().clone() for p in params]
    with pytest.raises(EnergyError, match=r"choose F0 below the lowest|not finite"):
        optimizer.step(loss=loss)
    assert worst(params, before) == 0
    assert not optimizer.state
    assert optimizer.param_groups[0]["step"] == 0


def test_a_bad_gradient_changes_nothing():
    params = make()
    optimizer = ECD(params)
    optimizer.step(loss=backward(params))
    before = [p.detach().clone() for p in params]
    for bad in (math.nan, math.inf):
        for kick in ("exact", "euler"):
            optimizer.param_groups[0]["kick"] = kick
            backward(params)
            params[0].grad[0, 0] = bad
            with pytest.raises(EnergyError, match="gradient is not finite"):
                optimizer.step(loss=1.0)
    assert worst(params, before) == 0


def test_errors_say_what_to_do():
    params = make()
    for settings_, message in [
        ({"lr": -1.0}, "lr is at least 0"),
        ({"eta": 0.0}, "eta is positive"),
        ({"nu": -0.1}, "nu is at least 0"),
        ({"weight_decay": math.nan}, "weight_decay is a finite number"),
        ({"F0": math.inf}, "F0 is a finite number"),
        ({"kick": "leapfrog"}, "kick is one of exact, euler"),
        ({"dot": "local"}, "dot is one of global, per_tensor"),
        ({"dot": "per_tensor"}, "the exact kick has dot='global'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ECD(params, **settings_)
    with pytest.raises(ValueError, match="eta is one setting for all parameters"):
        ECD([{"params": params[:1], "eta": 3.0}, {"params": params[1:]}])
    optimizer = ECD(params)
    backward(params)
    with pytest.raises(ValueError, match=r"call step\(loss=loss\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="not both"):
        optimizer.step(lambda: 1.0, loss=1.0)
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense"):
        ECD(embedding.parameters()).step(loss=1.0)
    single = torch.nn.Parameter(torch.ones(1))
    single.grad = torch.ones(1)
    with pytest.raises(ValueError, match="at least two"):
        ECD([single]).step(loss=1.0)
    params = make(dtype=torch.float32)
    optimizer = ECD(params, kick="euler")
    optimizer.step(loss=backward(params))
    for p in params:
        p.grad = 1e30 * p.detach()
    with pytest.raises(EnergyError, match="overflows"):
        optimizer.step(loss=1e-15)


def test_a_step_at_lr_zero_only_makes_the_state():
    params = make()
    optimizer = ECD(params, lr=0.0)
    backward(params)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert worst(params, before) == 0
    assert norm(velocity(optimizer)) == 0
    optimizer.param_groups[0]["lr"] = 1.0
    other = make()
    fresh = ECD(other)
    optimizer.step(loss=backward(params))
    fresh.step(loss=backward(other))
    assert worst(params, other) == 0


def test_parameters_without_gradient():
    params = make()
    optimizer = ECD(params)
    loss = backward(params)
    params[1].grad = None
    untouched = params[1].detach().clone()
    optimizer.step(loss=loss)
    assert torch.equal(params[1], untouched)
    assert params[1] not in optimizer.state
    optimizer.step(loss=backward(params))
    loss = backward(params)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step(loss=loss)
    assert not torch.equal(params[1], before)
    assert abs(norm(velocity(optimizer)) - 1) < 1e-12


def test_memory_layouts_agree():
    plain = make(shapes=[(4, 6), (3, 4, 5, 6)])
    laid = [
        torch.nn.Parameter(plain[0].detach().t().contiguous().t()),
        torch.nn.Parameter(plain[1].detach().to(memory_format=torch.channels_last)),
    ]
    strided = torch.nn.Parameter(torch.zeros(4, 12, dtype=torch.float64)[:, ::2].detach())
    strided.data.copy_(plain[0].detach())
    runs = [plain, laid, [strided, make(shapes=[(4, 6), (3, 4, 5, 6)])[1]]]
    for params in runs:
        optimizer = ECD(params, lr=0.3)
        for _ in range(3):
            optimizer.step(loss=backward(params))
    assert worst(runs[1], plain) < 1e-13
    assert worst(runs[2], plain) < 1e-13


FSDP = """
    import sys, math, torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    from erlangen.lm.distributed import leave
    from erlangen.optim import ECD

    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3, bias=False)).double()

    data = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for settings in ({}, {"kick": "euler", "weight_decay": 0.1}, {"weight_decay": 0.1}):
        alone, sharded = model(), model()
        for layer in (sharded[0], sharded[2], sharded):
            fully_shard(layer, mesh=mesh)
        one = ECD(alone.parameters(), lr=0.5, **settings)
        two = ECD(sharded.parameters(), lr=0.5, **settings)
        for step in range(6):
            one.zero_grad(), two.zero_grad()
            loss = (alone(data) - 1).square().mean()
            loss.backward()
            one.step(loss=loss)
            # Each process has half of the batch and its own loss.
            loss = (sharded(data[4 * rank : 4 * rank + 4]) - 1).square().mean()
            loss.backward()
            two.step(loss=loss)
        for p, q in zip(alone.parameters(), sharded.parameters()):
            assert (p - q.full_tensor()).abs().max() < 1e-12
            assert two.state[q]["momentum"].placements == q.placements
            u = two.state[q]["momentum"].full_tensor()
            assert (one.state[p]["momentum"] - u).abs().max() < 1e-12

    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    saved = get_optimizer_state_dict(sharded, two)
    again = ECD(sharded.parameters(), lr=0.5, **settings)
    set_optimizer_state_dict(sharded, again, saved)
    for p in sharded.parameters():
        assert torch.equal(again.state[p]["momentum"].to_local(), two.state[p]["momentum"].to_local())
    assert again.param_groups[0]["step"] == 6

    noisy = ECD(sharded.parameters(), lr=0.5, nu=1.0)
    for _ in range(2):
        noisy.zero_grad()
        loss = (sharded(data) - 1).square().mean()
        loss.backward()
        noisy.step(loss=loss)
    u = torch.cat([noisy.state[p]["momentum"].full_tensor().flatten() for p in sharded.parameters()])
    assert abs(u.norm() - 1) < 1e-12
    leave()
"""


def test_sharded_parameters_move_as_whole_ones(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(FSDP))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
