"""The group axioms, the algebra, the charts and the validation, of each group in both precisions."""

import pickle

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from lie_cases import DTYPES, GROUPS, assert_close, cases, element, matrix_size, tangent

from erlangen.lie import GL, SE2, SE3, SO2, SO3, Aff2, Aff3, Product, Sim2, Sim3, Translation, parse

for_each_group = pytest.mark.parametrize("group", GROUPS, ids=str)
in_both_precisions = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
few = settings(max_examples=5, derandomize=True, deadline=None, database=None)


def test_assert_close_sees_an_error_and_a_nan():
    one = torch.ones(3)
    assert_close(one, one.double(), 1)
    with pytest.raises(AssertionError):
        assert_close(one + 1e-4, one.double(), 1)
    with pytest.raises(AssertionError):
        assert_close(one * float("nan"), one.double(), 1)


# --- axioms -----------------------------------------------------------------------------------------------------------


@for_each_group
@in_both_precisions
@few
@given(a=cases(), b=cases())
def test_group_axioms(group, dtype, a, b):
    x, y = element(group, **a, dtype=dtype), element(group, **b, dtype=dtype)
    z = element(group, **{**a, "seed": b["seed"] + 1}, dtype=dtype)
    size_x, size_y, size_z = map(matrix_size, (x, y, z))
    e = group.identity(dtype=dtype)
    assert_close(group.compose(x, e), x, size_x, 4)
    assert_close(group.compose(e, x), x, size_x, 4)
    left, right = group.compose(group.compose(x, y), z), group.compose(x, group.compose(y, z))
    assert_close(left, right, size_x * size_y * size_z, 32)
    inverse = group.inverse(x)
    condition = size_x * matrix_size(inverse)
    assert_close(group.compose(x, inverse), e.expand_as(x), condition)
    assert_close(group.compose(inverse, x), e.expand_as(x), condition)
    for closed in (x, group.compose(x, y), inverse):
        group.check(closed)


@for_each_group
@in_both_precisions
@few
@given(case=cases())
def test_exp_log_round_trip(group, dtype, case):
    x = element(group, **case, dtype=dtype)
    assert_close(group.exp(group.log(x)), x, matrix_size(x) ** 2, 256)


@for_each_group
@few
@given(case=cases())
def test_log_inverts_exp_below_half_a_turn(group, case):
    case["angle"] = min(case["angle"], 3.0)
    xi = tangent(group, **case, dtype=torch.float64)
    x = group.exp(xi)
    condition = matrix_size(x)[..., 0] * matrix_size(group.inverse(x))[..., 0]
    assert_close(group.log(x), xi, condition, 1024)


@for_each_group
@in_both_precisions
@few
@given(a=cases(), b=cases())
def test_relative_is_inverse_times_and_invariant(group, dtype, a, b):
    a["shift"] = b["shift"] = min(a["shift"], b["shift"], 1.0)
    h, x, y = element(group, **a, dtype=dtype), element(group, **b, dtype=dtype), element(group, **a, dtype=dtype)
    y = y.flip(0)
    relative = group.relative(x, y)
    inverse = group.inverse(x)
    scale = matrix_size(inverse) * matrix_size(x) * matrix_size(inverse) * matrix_size(y)
    assert_close(relative, group.compose(inverse, y), scale)
    moved = group.relative(group.compose(h, x), group.compose(h, y))
    condition = matrix_size(h) * matrix_size(group.inverse(h))
    assert_close(moved, relative, scale * condition**2, 256)


@for_each_group
@in_both_precisions
@few
@given(a=cases(shift=1.0), b=cases(shift=1.0))
def test_action(group, dtype, a, b):
    x, y = element(group, **a, dtype=dtype), element(group, **b, dtype=dtype)
    points = torch.randn(3, group.point_dim, generator=torch.Generator().manual_seed(0), dtype=dtype)
    scale = (matrix_size(x) * matrix_size(y))[..., 0] * 4
    assert_close(group.act(group.compose(x, y), points), group.act(x, group.act(y, points)), scale)
    cloud = points.expand(2, 3, -1).transpose(0, 1)
    assert_close(group.act(x[:, None], cloud)[:, 1], group.act(x, points), scale, 1)


@for_each_group
@in_both_precisions
@few
@given(a=cases(), b=cases(shift=1.0))
def test_adjoint(group, dtype, a, b):
    a["size"] = min(a["size"], 1.0)
    g, xi = element(group, **a, dtype=dtype), tangent(group, **b, dtype=dtype)
    moved = (group.adjoint(g) @ xi[..., None])[..., 0]
    inverse = group.inverse(g)
    scale = (matrix_size(g) * matrix_size(inverse))[..., 0] * (1 + xi.norm(dim=-1, keepdim=True))
    exact = g.double() @ group.hat(xi.double()) @ torch.linalg.inv(g.double())
    assert_close(group.hat(moved), exact, scale[..., None], 256)


def test_adjoint_of_the_exponential_is_the_flow_of_the_bracket():
    for group in GROUPS:
        xi, eta = (tangent(group, seed, 1.0, 0.3, 1.0, torch.float64) for seed in (1, 2))
        step = 1e-6
        flow = (group.adjoint(group.exp(step * xi)) @ eta[..., None])[..., 0]
        bracket = group.hat(xi) @ group.hat(eta) - group.hat(eta) @ group.hat(xi)
        torch.testing.assert_close((flow - eta) / step, group.vee(bracket), rtol=1e-5, atol=2e-5)


# --- the algebra and its blocks ---------------------------------------------------------------------------------------


@for_each_group
def test_hat_vee_and_orthogonal_blocks(group):
    xi = torch.randn(5, group.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = group.hat(xi)
    assert x.shape == (5, group.matrix_size, group.matrix_size)
    assert_close(group.vee(x), xi, 1 + xi.abs(), 4)
    assert [i for indices in group.blocks.values() for i in indices] == list(range(group.dim))
    norms = group.block_norms(xi)
    for k, indices in enumerate(group.blocks.values()):
        alone = torch.zeros_like(xi)
        alone[:, indices] = xi[:, indices]
        assert_close(norms[:, k], group.hat(alone).square().sum((-2, -1)), norms[:, k], 16)
    assert_close(norms.sum(-1), x.square().sum((-2, -1)), norms.sum(-1), 16)


def test_blocks_and_order():
    assert list(SE2.blocks.items()) == [("rotation", (0,)), ("translation", (1, 2))]
    assert list(SE3.blocks) == ["rotation", "translation"]
    assert list(Sim3.blocks) == ["scale", "rotation", "translation"]
    assert list(Aff2.blocks) == ["scale", "rotation", "shear", "translation"]
    assert list(GL(3).blocks) == ["scale", "rotation", "shear"]
    assert list(Product(SO2, Translation(1)).blocks) == ["0.rotation", "1.translation"]
    sizes = {str(group): (group.dim, group.matrix_size) for group in GROUPS}
    assert (
        sizes["Sim2"] == (4, 3) and sizes["Sim3"] == (7, 4) and sizes["Aff3"] == (12, 4) and sizes["GL(4)"] == (16, 4)
    )
    assert sizes["SE2 x SO3"] == (6, 6)


@for_each_group
def test_scores_are_symmetric_in_every_chart(group):
    g = group.random(200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for chart in group.charts:
        norms = group.log_block_norms(g, chart=chart)
        assert_close(group.log_block_norms(group.inverse(g), chart=chart), norms, 1 + norms, 1e5)


# --- charts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [SO2, SO3, SE2, SE3, Sim2, Sim3], ids=str)
@in_both_precisions
def test_norms_are_continuous_across_half_a_turn(group, dtype):
    turn = tangent(group, 0, torch.pi, 0.3, 1.0, dtype)
    below, above = turn.clone(), turn.clone()
    indices = group.blocks["rotation"]
    step = 1e-6 if dtype == torch.float64 else 1e-4
    below[:, indices] *= 1 - step
    above[:, indices] *= 1 + step
    logs = [group.log(group.exp(xi)) for xi in (below, above)]
    assert (logs[0] - logs[1])[:, indices].norm(dim=-1).min() > 6  # the vector jumps
    norms = [group.log_block_norms(group.exp(xi)) for xi in (below, turn, above)]
    torch.testing.assert_close(norms[0], norms[2], rtol=0, atol=200 * step)
    torch.testing.assert_close(norms[0], norms[1], rtol=0, atol=200 * step)


def test_principal_chart_of_affine_groups():
    outside = torch.stack([torch.diag(torch.tensor(d)) for d in ([-1.0, -2.0], [-1.0, -1.0], [1.0, -1.0], [0.0, 1.0])])
    inside = torch.tensor([[[0.0, -1.0], [1.0, 0.0]], [[-0.9, -0.1], [0.1, -0.9]], [[1.0, 5.0], [0.0, 1.0]]])
    assert GL(2).in_chart(inside).all() and not GL(2).in_chart(outside).any()
    assert GL(2).in_chart(outside, chart="polar").tolist() == [True, True, False, False]
    block = torch.eye(3).repeat(4, 1, 1)
    block[:, :2, :2] = outside
    assert not GL(3).in_chart(block).any()
    assert GL(3).in_chart(block, chart="polar").tolist() == [True, True, False, False]
    pairs = Aff2.assemble(torch.cat([outside, inside]), torch.zeros(2))
    with pytest.raises(ValueError, match=r"Aff2.log: 4 of 7 .* principal chart.*in_chart, or use chart=\"polar\""):
        Aff2.log(pairs)
    with pytest.raises(ValueError, match=r"Aff2.log: 2 of 7 .* polar chart.*in_chart$"):
        Aff2.log(pairs, chart="polar")
    assert Aff2.log(pairs[4:]).isfinite().all()
    assert Aff2.log(pairs[:2], chart="polar").isfinite().all()


@for_each_group
def test_non_finite_and_improper_elements_are_outside(group):
    g = group.random(3, generator=torch.Generator().manual_seed(0))
    g[1, 0, -1] = float("nan")
    g[2, 0, -1] = float("inf")
    assert group.in_chart(g).tolist() == [True, False, False]
    for call in (group.log, group.log_block_norms):
        with pytest.raises(ValueError, match="2 of 3 elements are outside the principal chart"):
            call(g)
    assert group.log(g, check=False).shape == (3, group.dim)
    with pytest.raises(ValueError, match="not finite"):
        group.project(g)


def test_reflections_are_outside():
    for group, n in ((SO2, 2), (SE3, 3), (Sim2, 2), (Aff3, 3)):
        g = group.identity()
        g[n - 1, n - 1] = -1
        assert not group.in_chart(g)


def test_unknown_chart():
    with pytest.raises(ValueError, match=r"SE2 has the charts 'principal', received 'polar'"):
        SE2.log(SE2.identity(), chart="polar")
    with pytest.raises(ValueError, match=r"GL\(2\) has the charts 'principal', 'polar', received 'x'"):
        GL(2).in_chart(torch.eye(2), chart="x")


@pytest.mark.parametrize("n", [2, 3, 4])
def test_polar_chart_against_scipy(n):
    group, generator = GL(n), torch.Generator().manual_seed(n)
    g = torch.randn(20, n, n, generator=generator, dtype=torch.float64)
    g = g[torch.linalg.det(g) > 0.01]
    assert not group.in_chart(g).all()  # the principal chart does not hold them all
    xi = group.log(g, chart="polar")
    for x, coordinates in zip(g, xi):
        rotation, stretch = scipy.linalg.polar(x.numpy())
        expected = group.vee(torch.from_numpy(scipy.linalg.logm(rotation).real))
        expected = expected + group.vee(torch.from_numpy(scipy.linalg.logm(stretch).real))
        torch.testing.assert_close(coordinates, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("group", [Aff2, Aff3], ids=str)
def test_polar_translation_is_the_symmetric_one(group):
    g = group.random(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    linear, translation = group.split(g)
    for a, t, u in zip(linear, translation, group.log(g, chart="polar")[:, group.blocks["translation"]]):
        rotation, stretch = scipy.linalg.polar(a.numpy())
        expected = scipy.linalg.fractional_matrix_power(stretch, -0.5) @ rotation.T @ t.numpy()
        torch.testing.assert_close(u, torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


def test_polar_chart_of_a_product_is_that_of_the_factors_that_have_it():
    group = Product(SE2, Aff2)
    g = group.random(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = group.split(g)
    expected = torch.cat([SE2.log(a), Aff2.log(b, chart="polar")], -1)
    assert_close(group.log(g, chart="polar"), expected, 1, 1)


# --- names, shapes, draws ---------------------------------------------------------------------------------------------


@for_each_group
def test_printing_and_parsing(group):
    assert parse(str(group)) == group
    assert pickle.loads(pickle.dumps(group)) == group
    assert len({group, parse(str(group))}) == 1


def test_names():
    assert str(SE2) == "SE2" and str(GL(3)) == "GL(3)" and str(Product(SE2, SO3)) == "SE2 x SO3"
    assert Product(Product(SE2, SO3), SO2) == Product(SE2, Product(SO3, SO2)) != Product(SO2, SE2)
    for name in ("SE4", "GL", "GL(1)", "Translation(0)", "SE2 x ", ""):
        with pytest.raises(ValueError):
            parse(name)
    with pytest.raises(ValueError, match="two groups"):
        Product(SE2)


@for_each_group
@in_both_precisions
def test_identity_and_random(group, dtype):
    m = group.matrix_size
    assert group.identity().shape == (m, m) and group.identity(2, 3, dtype=dtype).shape == (2, 3, m, m)
    assert_close(group.log(group.identity(2, dtype=dtype)), torch.zeros(2, group.dim), 1, 0)
    draws = [group.random(50, 2, generator=torch.Generator().manual_seed(7), dtype=dtype) for _ in range(2)]
    assert torch.equal(*draws) and draws[0].dtype == dtype and draws[0].shape == (50, 2, m, m)
    group.check(draws[0])
    assert group.in_chart(draws[0]).all()
    assert group.log(torch.empty(0, m, m)).shape == (0, group.dim)


def test_random_rotations_are_uniform():
    """The mean of a uniform rotation is 0, with variance 1/n of each entry; 5 standard errors."""
    for group, n in ((SO2, 2), (SO3, 3)):
        g = group.random(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert g.mean(0).abs().max() < 5 * (1 / n / 20_000) ** 0.5


# --- validation -------------------------------------------------------------------------------------------------------


@for_each_group
@in_both_precisions
def test_check_and_project(group, dtype):
    generator = torch.Generator().manual_seed(1)
    g = group.random(8, generator=generator, dtype=dtype)
    projected = group.project(g)
    assert_close(projected, g, matrix_size(g))
    noisy = g + 0.05 * torch.randn(g.shape, generator=generator, dtype=dtype)
    if not str(group).startswith("GL"):
        with pytest.raises(
            ValueError, match=r"matrices are off the group: .* received a deviation of .*; call project"
        ):
            group.check(noisy)
    group.check(group.project(noisy))
    assert not group.project(noisy.requires_grad_()).requires_grad


@pytest.mark.parametrize("group", [SO2, SO3, Sim2, Sim3], ids=str)
def test_project_is_the_nearest(group):
    generator = torch.Generator().manual_seed(1)
    g = group.random(4, generator=generator, dtype=torch.float64)
    noisy = g + 0.1 * torch.randn(g.shape, generator=generator, dtype=torch.float64)
    if "translation" in group.blocks:
        noisy[:, -1], noisy[:, :-1, -1] = g[:, -1], 0
    nearest = group.project(noisy)
    distance = (nearest - noisy).square().sum((-2, -1))
    for _ in range(30):
        step = 0.05 * torch.randn(4, group.dim, generator=generator, dtype=torch.float64)
        other = group.compose(nearest, group.exp(step))
        assert ((other - noisy).square().sum((-2, -1)) >= distance).all()


@for_each_group
def test_wrong_shapes_and_dtypes(group):
    m, g = group.matrix_size, group.identity()
    for call in (group.log, group.inverse, group.check, group.project, group.in_chart, group.vee):
        with pytest.raises(ValueError, match=rf"matrices are \[\.\.\., {m}, {m}\], received \[{m}, {m + 1}\]"):
            call(torch.zeros(m, m + 1))
    for call in (group.exp, group.hat, group.block_norms):
        with pytest.raises(
            ValueError, match=rf"tangent vectors are \[\.\.\., {group.dim}\], received \[{group.dim + 1}\]"
        ):
            call(torch.zeros(group.dim + 1))
    with pytest.raises(ValueError, match=r"float32 or float64, received torch.bfloat16; cast"):
        group.log(g.bfloat16())
    with pytest.raises(ValueError, match=r"entries of .* are not finite"):
        group.check(g * float("nan"))


def test_check_names_the_rule():
    with pytest.raises(ValueError, match=r"1 of 2 .* g gᵀ is the identity and the determinant is positive"):
        SO3.check(torch.stack([torch.eye(3), -torch.eye(3)]))
    with pytest.raises(ValueError, match=r"invertible beyond rounding"):
        GL(2).check(torch.ones(2, 2))
    last_row = SE3.identity()
    last_row[3, 0] = 0.1
    with pytest.raises(ValueError, match=r"the last row is 0 ... 0 1"):
        SE3.check(last_row)
    with pytest.raises(ValueError, match=r"blocks off the diagonal are 0"):
        Product(SO2, SO2).check(torch.eye(4) + torch.ones(4, 4).triu(2) * 0.1)
    for group in (Sim2, GL(2), Aff3, SO3):
        with pytest.raises(ValueError, match=r"singular|zero"):
            group.project(torch.zeros(group.matrix_size, group.matrix_size))


def test_check_leaves_room_for_drift():
    step = SE3.exp(torch.tensor([0.3, -0.2, 0.1, 1.0, 2.0, 3.0]))
    g = SE3.identity()
    for _ in range(1000):
        g = SE3.compose(g, step)
    SE3.check(g)
