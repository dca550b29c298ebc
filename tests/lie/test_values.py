"""The value paths against loops over scipy's matrix logarithm, and against means found without it."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from lie_cases import (
    LOGM_MAY_WARN,
    act_on_poses,
    assert_near,
    far_elements,
    near,
    outside_chart,
    score_options,
)
from scipy.spatial.transform import Rotation

from erlangen.lie import GL, SE2, SE3, SO2, SO3, Aff2
from erlangen.lie.attention import lie_weights
from erlangen.lie.values import lie_mean_tangent, lie_mean_update, lie_transport
from erlangen.testing import assert_equivariant, assert_invariant

B, H, N, M, P = 2, 2, 3, 4, 2

pytestmark = LOGM_MAY_WARN


@pytest.fixture
def scene(group, generator):
    """Weights, queries and keys."""
    weights = torch.rand(B, H, N, M, generator=generator, dtype=torch.float64).softmax(-1)
    return weights, near(group, B, N, generator=generator), near(group, B, M, generator=generator)


def oracle_log(group, query, key):
    return group.vee(torch.from_numpy(scipy.linalg.logm(np.linalg.solve(query, key)).real)).numpy()


def test_mean_tangents_and_steps_are_loops_over_logm(group, scene, generator):
    weights, query, key = scene
    expected = np.zeros((B, H, N, group.dim))
    for b, h, i, j in np.ndindex(B, H, N, M):
        expected[b, h, i] += weights[b, h, i, j].item() * oracle_log(group, query[b, i].numpy(), key[b, j].numpy())
    assert_near(lie_mean_tangent(weights, query, key, group), expected)

    displacement = near(group, H, generator=generator, spread=0.1)
    displaced = np.zeros((B, H, N, group.dim))
    for b, h, i, j in np.ndindex(B, H, N, M):
        frame = query[b, i].numpy() @ displacement[h].numpy()
        displaced[b, h, i] += weights[b, h, i, j].item() * oracle_log(group, frame, key[b, j].numpy())
    assert_near(lie_mean_tangent(weights, query, key, group, displacement=displacement), displaced)

    step_H = torch.rand(H, generator=generator, dtype=torch.float64)
    step_HGG = torch.randn(H, group.dim, group.dim, generator=generator, dtype=torch.float64)
    cases = [
        (1.0, expected.sum(1)),
        (0.25, 0.25 * expected.sum(1)),
        (step_H, np.einsum("h,bhng->bng", step_H, expected)),
        (step_HGG, np.einsum("hij,bhnj->bni", step_HGG, expected)),
    ]
    for step, tangent in cases:
        moved = lie_mean_update(weights, query, key, group, step)
        for b, i in np.ndindex(B, N):
            xi = group.hat(torch.from_numpy(tangent[b, i])).numpy()
            assert_near(moved[b, i], query[b, i].numpy() @ scipy.linalg.expm(xi), 1e-9)


def test_the_comparison_sees_a_wrong_update(generator):
    weights = torch.rand(1, 1, N, M, generator=generator, dtype=torch.float64).softmax(-1)
    query, key = near(SE2, 1, N, generator=generator), near(SE2, 1, M, generator=generator)
    moved = lie_mean_update(weights, query, key, SE2)
    for wrong in (lie_mean_update(weights, query, key, SE2, 1 + 1e-8), moved.flip(1), query):
        with pytest.raises(AssertionError):
            assert_near(wrong, moved)


def test_poses_a_head(generator):
    weights = torch.rand(B, H, N, M, generator=generator, dtype=torch.float64).softmax(-1)
    query, key = near(SE2, B, H, N, generator=generator), near(SE2, B, H, M, generator=generator)
    together = lie_mean_tangent(weights, query, key, SE2)
    for h in range(H):
        alone = lie_mean_tangent(weights[:, h : h + 1], query[:, h], key[:, h], SE2)
        torch.testing.assert_close(together[:, h : h + 1], alone)


def karcher(group, poses, start, steps=60):
    weights = torch.full((1, 1, 1, poses.shape[0]), 1 / poses.shape[0], dtype=torch.float64)
    mean = start[None, None]
    for _ in range(steps):
        mean = lie_mean_update(weights, mean, poses[None], group)
    return mean[0, 0]


def test_iterated_it_is_the_intrinsic_mean_of_rotations(generator):
    """The least sum of squared angles, found by scipy's minimiser over rotation vectors."""
    poses = near(SO3, 6, generator=generator)
    rotations = Rotation.from_matrix(poses.numpy())

    def sum_of_squares(vector):
        return float(((Rotation.from_rotvec(vector).inv() * rotations).magnitude() ** 2).sum())

    best = scipy.optimize.minimize(
        sum_of_squares, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 0}
    )
    # A minimiser of values sees the place of a minimum to the root of the precision of a value.
    assert_near(karcher(SO3, poses, poses[0]), Rotation.from_rotvec(best.x).as_matrix(), 1e-6)


@pytest.mark.parametrize("group", [SE2, SE3, Aff2], ids=str)
def test_iterated_it_is_the_exponential_barycentre(group, generator):
    """Σ_j log(mean⁻¹ g_j) = 0, by scipy's logm; from wherever one starts."""
    poses = near(group, 6, generator=generator, spread=0.3)
    mean = karcher(group, poses, poses[0])
    residual = sum(oracle_log(group, mean.numpy(), pose.numpy()) for pose in poses)
    assert np.abs(residual).max() < 1e-11
    assert_near(karcher(group, poses, poses[3]), mean.numpy(), 1e-11)


@pytest.mark.parametrize("kind", ["vectors", "points"])
def test_transport_is_a_loop_over_matrix_products(group, scene, generator, kind):
    weights, query, key = scene
    n, m = group.point_dim, group.matrix_size
    value = torch.randn(B, H, M, P, n, generator=generator, dtype=torch.float64)
    expected, q, k = np.zeros((B, H, N, P, n)), query.numpy(), key.numpy()
    for b, h, i, j, p in np.ndindex(B, H, N, M, P):
        homogeneous = np.zeros(m)
        homogeneous[:n] = value[b, h, j, p]
        homogeneous[n:] = kind == "points"
        expected[b, h, i, p] += weights[b, h, i, j].item() * np.linalg.solve(q[b, i], k[b, j] @ homogeneous)[:n]
    assert_near(lie_transport(weights, query, key, value, group, kind=kind), expected)


def test_a_common_large_translation_costs_transport_no_digits(generator):
    """In float32, poses 1e4 from the origin on a grid of 2⁻⁸, so that rounding them costs nothing."""
    weights = torch.rand(1, 1, N, M, generator=generator).softmax(-1)
    query, key = (near(SE2, 1, n, generator=generator).float() for n in (N, M))
    value = torch.randn(1, 1, M, P, 2, generator=generator)
    for poses in (query, key):
        poses[..., :2, 2] = (poses[..., :2, 2] * 256).round() / 256
    expected = lie_transport(weights, query, key, value, SE2, kind="points")
    for poses in (query, key):
        poses[..., :2, 2] += 1e4
    torch.testing.assert_close(
        lie_transport(weights, query, key, value, SE2, kind="points"), expected, rtol=0, atol=1e-5
    )


def test_all_value_paths_are_equivariant(group, scene, generator):
    weights, query, key = scene
    elements = far_elements(group, generator)
    assert_equivariant(
        lambda q, k: lie_mean_update(weights, q, k, group, 0.3),
        None,
        (query, key),
        act_in=act_on_poses,
        act_out=lambda element, poses: element @ poses,
        elements=elements,
    )
    value = torch.randn(B, H, M, P, group.point_dim, generator=generator, dtype=torch.float64)
    for kind in ("vectors", "points"):
        assert_invariant(
            lambda q, k, v, kind=kind: lie_transport(weights, q, k, v, group, kind=kind),
            None,
            (query, key, value),
            act_in=act_on_poses,
            elements=elements,
            allow_trivial=str(group).startswith("Translation") and kind == "vectors",
        )


def test_an_update_in_the_world_is_not_equivariant(generator):
    weights = torch.rand(1, 1, N, N, generator=generator, dtype=torch.float64).softmax(-1)
    poses = near(SE2, 1, N, generator=generator)

    def in_the_world(q):
        return SE2.compose(SE2.exp(lie_mean_tangent(weights, q, q, SE2)[:, 0]), q)

    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(
            in_the_world,
            None,
            poses,
            act_in=lambda element, q: element @ q,
            act_out=lambda element, q: element @ q,
            elements=far_elements(SE2, generator),
        )


@pytest.mark.parametrize("group", [SE2, SO3, Aff2], ids=str)
@pytest.mark.parametrize("coincident", [False, True])
def test_gradients_and_second_gradients(group, coincident, generator):
    base = near(group, 1, 2, generator=generator)
    other = base if coincident else near(group, 1, 3, generator=generator)
    weights = torch.rand(1, 2, 2, other.shape[1], generator=generator, dtype=torch.float64, requires_grad=True)
    step = torch.randn(2, group.dim, group.dim, generator=generator, dtype=torch.float64, requires_grad=True)
    q, k = (torch.zeros(1, x.shape[1], group.dim, dtype=torch.float64, requires_grad=True) for x in (base, other))

    def update(weights, q, k, step):
        return lie_mean_update(weights, base @ group.exp(q), other @ group.exp(k), group, step)

    assert torch.autograd.gradcheck(update, (weights, q, k, step), fast_mode=True)
    assert torch.autograd.gradgradcheck(update, (weights, q, k, step), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("group", [GL(2), Aff2], ids=str)
def test_pairs_outside_the_chart_need_zero_weights(group, generator):
    query = near(group, 1, 1, generator=generator).requires_grad_()
    key = torch.cat([near(group, 1, 2, generator=generator, spread=0.2), query.detach() @ outside_chart(group)], dim=1)
    weights = torch.tensor([[[[0.25, 0.25, 0.5]]]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r'1 of 3 pairs do not: use chart="polar" or weights of zero'):
        lie_mean_update(weights, query, key, group)
    assert lie_mean_update(weights, query, key, group, check=False).isnan().any()
    assert lie_mean_tangent(weights, query, key, group, chart="polar").isfinite().all()
    weights[..., 2] = 0.0
    moved = lie_mean_update(weights, query, key, group)
    assert torch.equal(moved, lie_mean_update(weights[..., :2], query, key[:, :2], group))
    (gradient,) = torch.autograd.grad(moved.square().sum(), query)
    assert gradient.isfinite().all()
    weights = lie_weights(query, key, **score_options(group, generator, heads=1), outside="mask")
    assert weights[..., 2].item() == 0.0
    assert lie_mean_update(weights, query, key, group).isfinite().all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": torch.zeros(H, N, M).double()}, r"weights must have shape \[B, H, N, M\]"),
        ({"weights": torch.zeros(B, H, N, M + 1).double()}, r"weights must have shape .* = \[2, 2, 3, 4\]"),
        ({"weights": torch.zeros(B, H, N, M)}, r"float32, or all float64"),
        ({"group": SO2}, r"query must have shape|query must hold matrices of SO2"),
        ({"step": torch.ones(H + 1).double()}, r"step must have shape \[H\] or \[H, dim, dim\]"),
        ({"step": torch.ones(H, 2, 2).double()}, r"step must have shape"),
        ({"step": torch.ones(H)}, r"float32, or all float64.*step"),
        ({"chart": "other"}, r"chart of SE2 must be one of"),
    ],
)
def test_errors_say_what_is_wrong(changed, message, generator):
    arguments = {
        "weights": torch.full((B, H, N, M), 0.2, dtype=torch.float64),
        "query": near(SE2, B, N, generator=generator),
        "key": near(SE2, B, M, generator=generator),
        "group": SE2,
    }
    with pytest.raises(ValueError, match=message):
        lie_mean_update(**arguments | changed)


def test_errors_of_transport(generator):
    weights = torch.full((B, H, N, M), 0.2, dtype=torch.float64)
    query, key = near(SE2, B, N, generator=generator), near(SE2, B, M, generator=generator)
    value = torch.zeros(B, H, M, P, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"value must have shape \[B, H, M, P, n\] = \[2, 2, 4, any, 2\]"):
        lie_transport(weights, query, key, value[..., :1], SE2)
    with pytest.raises(ValueError, match="kind must be one of vectors, points, received 'planes'"):
        lie_transport(weights, query, key, value, SE2, kind="planes")


def test_two_quarter_turns_meet_half_way():
    quarter = SO2.exp(torch.tensor([math.pi / 2], dtype=torch.float64))
    poses = torch.stack([torch.eye(2, dtype=torch.float64), quarter])[None]
    weights = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    eighth = SO2.exp(torch.tensor([math.pi / 4], dtype=torch.float64))
    assert_near(lie_mean_update(weights, poses, poses, SO2), eighth.expand(1, 2, 2, 2).numpy(), 1e-15)
