"""What `erlangen bench lie` measures: memory in processes of their own, and the floors."""

import pytest
import torch

from erlangen import lie
from erlangen.bench._lie_case import PASSES, Case, Probes, Rates, least_cost
from erlangen.bench._lie_memory import peak_memory
from erlangen.bench.lie import LieBenchConfig


def case(variant, size, **changes):
    about = {"group": "SE2", "num_heads": 4, "head_dim": 8, "batch_size": 1, "spacing": 1.0, "skip": 1e-6}
    about |= {"dtype": "float32", "device": "cpu", "threads": 1}
    return Case(variant=variant, size=size, **(about | changes))


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="figures are those of x86-64 Linux")
def test_memory_of_dense_grows_with_the_square_and_of_tiled_does_not():
    small, large = 192, 768
    dense, tiled = ([peak_memory(case(v, n, num_heads=2), 1e9) for n in (small, large)] for v in ("dense", "tiled"))
    for which in PASSES:
        assert dense[1][which] > 8 * dense[0][which], (which, dense)
        assert dense[1][which] > 2 * 2 * large**2 * 4, "scores and weights of 2 heads in float32"
        assert tiled[1][which] < 8 * tiled[0][which], (which, tiled)
        assert tiled[1][which] < dense[1][which] / 4


def test_what_does_not_fit_or_does_not_run_is_said():
    assert set(peak_memory(case("dense", 512), 2e6).values()) == {"it needs more than the limit of 0.002 GB"}
    reasons = peak_memory(case("tiled", 64, group="Aff2"), 1e9)
    assert set(reasons) == set(PASSES)
    assert all("must lie in the principal chart of Aff2" in reason for reason in reasons.values()), reasons


def test_gradients_are_those_of_poses_weights_temperature_and_values():
    for variant in ("dense", "tiled"):
        output = case(variant, 17).passes()["forward"]()
        assert output.shape == (1, 4, 17, 8) and not output.requires_grad
        gradients = case(variant, 17).passes()["forward + backward"]()
        assert [tuple(g.shape) for g in gradients] == [(1, 17, 3, 3), (4, 2), (4,), (1, 4, 17, 8)]
        assert all(g.abs().max() > 0 for g in gradients)
    assert all(g.shape == (1, 4, 17, 8) for g in case("sdpa", 17).passes()["forward + backward"]())


def test_variants_compute_the_same():
    expected = case("dense", 40, dtype="float64").passes()
    for variant in ("tiled", "tiled-skipping"):
        found = case(variant, 40, dtype="float64", skip=1e-12).passes()
        torch.testing.assert_close(found["forward"](), expected["forward"]())
        for a, b in zip(found["forward + backward"](), expected["forward + backward"]()):
            torch.testing.assert_close(a, b)


def test_poses_that_are_near_are_near_in_order():
    places = case("tiled", 2000).poses(lie.SE2)[0, :, :-1, -1]
    assert places.diff(dim=0).norm(dim=-1).median() < 2 < (places - places.flip(0)).norm(dim=-1).median()


@pytest.mark.parametrize("group", ["SE2", "SE3"])
def test_poses_keep_their_density(group):
    group = lie.parse(group)
    axes = group.matrix_size - 1
    for size in (100, 3000):
        places = case("tiled", size, spacing=2.0).poses(group)[0, :, :-1, -1]
        side = 2.0 * size ** (1 / axes)
        assert places.min() >= 0 and places.max() <= side
        assert (places.amax(0) - places.amin(0)).min() > 0.9 * side


def test_floor_by_hand():
    """SE2, N = 3, two heads of width 4: six pairs, nine products."""
    small = case("tiled", 3, num_heads=2, head_dim=4)
    forward, both = (least_cost(small, which) for which in PASSES)
    assert forward.flops == 6 * (20 + 2 * 2 * 2) + 9 * 2 * 2 * 4
    assert forward.exps == 12
    assert forward.memory == 4 * 2 * 3 * 4
    assert forward.traffic == 4 * (2 * 24 + 3 * 9 + 2 * 3)
    assert both.flops == 2 * 6 * 28 + 6 * (40 + 4 * 2 * 2) + 3 * 144
    assert both.exps == 24
    assert both.memory == 4 * (24 + 6 + 24 + 27 + 6)


def test_floor_is_the_longer_of_arithmetic_and_traffic():
    cost = least_cost(case("tiled", 100), "forward")
    rates = Rates(matmul=cost.flops, exp=cost.exps / 2, copy=cost.traffic / 2.5)
    assert rates.seconds(cost, "cpu") == pytest.approx(3.0)
    assert rates.seconds(cost, "cuda") == pytest.approx(2.5)


def test_rates_are_work_over_time():
    probes = Probes("float32", "cpu")
    rates = probes.rates(dict.fromkeys(probes.calls, 0.5))
    assert rates == {"matmul": 4 * 1024**3, "exp": 2 * 8 * 2**17, "copy": 4 * 4 * 2**23}
    for call in probes.calls.values():
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ()}, "sizes is empty"),
        ({"sizes": (64, 0)}, "sizes must be at least 1, received 0"),
        ({"groups": ("SE9",)}, "no group is called 'SE9'"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"memory_limit": 0.0}, "memory_limit must be positive"),
        ({"spacing": float("nan")}, "spacing must be positive"),
        ({"skip": 1.0}, "skip must be at least 0 and below 1"),
        ({"device": "tpu"}, "device must be cpu or cuda, received"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        LieBenchConfig(**options).check()
