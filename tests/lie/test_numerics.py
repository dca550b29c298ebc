"""Values and gradients of exp and log against independent oracles, where the formulas are 0/0 above all."""

import math
from functools import partial

import mpmath
import pytest
import roma
import scipy.linalg
import torch
from hypothesis import given, settings
from lie_cases import ANGLES, DTYPES, GROUPS, PI, assert_close, cases, element, has_shear, matrix_size, tangent

from erlangen.lie import GL, SE2, SE3, SO3, Aff2, Aff3, Product, Sim2, Sim3, _matrix, _series

for_each_group = pytest.mark.parametrize("group", GROUPS, ids=str)
in_both_precisions = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
few = settings(max_examples=4, derandomize=True, deadline=None, database=None)


# --- the scalar functions ---------------------------------------------------------------------------------------------


def of_root(function):
    """A function of θ as a function of x = θ²."""
    return lambda x: function(mpmath.sqrt(x))


SCALARS = [
    (_series.sin_ratio, of_root(lambda t: mpmath.sin(t) / t), 1.0, 8.5),
    (_series.sin_ratio, of_root(lambda t: mpmath.sin(t) / t), -1.0, -0.9),
    (_series.cos_ratio, of_root(lambda t: (1 - mpmath.cos(t)) / t**2), 1.0, 30.0),
    (_series.sin_defect, of_root(lambda t: (t - mpmath.sin(t)) / t**3), 1.0, 90.0),
    (_series.cot_defect, of_root(lambda t: (1 - t / 2 * mpmath.cot(t / 2)) / t**2), 1.0, 9.8),
    (_series.coth_half, of_root(lambda t: t / 2 * mpmath.coth(t / 2)), 1.0, 90.0),
    (_series.atan_ratio, of_root(lambda t: mpmath.atan(t) / t), 0.02, 1e6),
    (_series.atan_ratio, of_root(lambda t: mpmath.atan(t) / t), -0.0199, -0.015),
    (_series.asinh_ratio, of_root(lambda t: mpmath.asinh(t) / t), 0.08, 1e6),
    (_series.exp_ratio, lambda z: mpmath.expm1(z) / z, 1.0, 20.0),
    (_series.exp_ratio, lambda z: mpmath.expm1(z) / z, -1.0, -20.0),
    (_series.todd, lambda z: z / mpmath.expm1(z), 1.0, 20.0),
    (_series.todd, lambda z: z / mpmath.expm1(z), -1.0, -20.0),
]


@pytest.mark.parametrize(("function", "exact", "switch", "end"), SCALARS)
@in_both_precisions
def test_scalar_functions_and_their_derivatives(function, exact, switch, end, dtype):
    """Relative error of the value, and error of the first two derivatives, from 1e-16 over the switch to the end."""
    points = [switch * f for f in (1e-16, 1e-8, 1e-4, 1e-2, 0.3, 0.9, 0.99999, 1.0, 1.00001, 1.1)]
    points += [switch + (end - switch) * f for f in (0.1, 0.5, 1.0)]
    if abs(end) < abs(switch):
        points = [end * f for f in (1e-8, 1e-2, 0.5, 1.0)]
    x = torch.tensor(points, dtype=dtype, requires_grad=True)
    value = function(x)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    with mpmath.workdps(50):
        at = [mpmath.mpf(p) for p in x.detach().tolist()]
        step = mpmath.mpf(10) ** -12
        derivatives = [[float(mpmath.re(mpmath.diff(exact, p, n, h=step))) for p in at] for n in (1, 2)]
        exact_value = torch.tensor([float(mpmath.re(exact(p))) for p in at], dtype=torch.float64)
    tiny = torch.tensor([abs(p) < 1e-10 for p in points])  # there mpmath's own difference quotient ends
    assert_close(value, exact_value, exact_value.abs(), 24)
    for computed, reference, ulps in zip((first, second), derivatives, (64, 512)):
        reference = torch.tensor(reference, dtype=torch.float64)
        scale = (1 + exact_value.abs()) / x.detach().double().abs().clamp(min=abs(switch)) + reference.abs()
        assert_close(computed[~tiny], reference[~tiny], scale[~tiny], ulps)
        assert computed.isfinite().all()


@in_both_precisions
def test_complex_functions(dtype):
    """(e^ζ − 1)/ζ and ζ/(e^ζ − 1) by parts, on a grid over the switches."""
    grid_a = [-8.0, -1.2, -0.8, -0.3, -1e-4, 0.0, 1e-8, 1e-3, 0.3, 0.8, 1.2, 8.0]
    grid_t = [1e-6, 1e-3, 0.2, 0.49, 0.51, 0.9, 1.1, 2.0, 3.1]
    a, t = (x.flatten() for x in torch.meshgrid(torch.tensor(grid_a), torch.tensor(grid_t), indexing="ij"))
    a, x = a.to(dtype), t.to(dtype) ** 2
    exp_parts, axis = _series.exp_ratio_complex(a, x), _series.todd_axis(a, x)
    turning, split = _series.todd_complex(a, x), _series.todd_complex(a, -x)
    with mpmath.workdps(60):
        exact = []
        for a_k, x_k in zip(a.tolist(), x.tolist()):
            alpha, theta = mpmath.mpf(a_k) + mpmath.mpf("1e-40"), mpmath.sqrt(mpmath.mpf(x_k))
            zeta = mpmath.mpc(alpha, theta)
            e, f = (lambda z: mpmath.expm1(z) / z), (lambda z: z / mpmath.expm1(z))
            upper, lower = f(alpha + theta + mpmath.mpf("1e-41")), f(alpha - theta + mpmath.mpf("1e-41"))
            numbers = [e(alpha), e(zeta).imag / theta, (e(alpha) - e(zeta).real) / theta**2]
            numbers += [f(zeta).real, f(zeta).imag / theta, (f(alpha) - f(zeta).real) / theta**2]
            numbers += [(upper + lower) / 2, (upper - lower) / (2 * theta)]
            exact.append([float(number) for number in numbers])
    exact = torch.tensor(exact, dtype=torch.float64).T
    growth = 1 + a.double().exp()
    for computed, reference in zip(exp_parts, exact[:3]):
        assert_close(computed, reference, growth, 16)
    size = 1 + torch.maximum(-a.double(), torch.zeros(()))
    for computed, reference in zip((*turning, axis), exact[3:6]):
        assert_close(computed, reference, size, 16)
    for computed, reference in zip(split, exact[6:]):
        assert_close(computed, reference, size + t.double(), 32)


# --- against SciPy and roma -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:logm result may be inaccurate")
@for_each_group
@few
@given(case=cases())
def test_exp_and_log_against_scipy(group, case):
    """SciPy's own expm is off by 2e-11 in a matrix of size 40, and logm loses digits towards the negative axis."""
    case["shift"], case["angle"] = min(case["shift"], 1.0), min(case["angle"], PI - 1e-3)
    xi = tangent(group, **case, dtype=torch.float64)
    x = group.exp(xi)
    for algebra, matrix, coordinates in zip(group.hat(xi), x, group.log(x)):
        scale = float(matrix_size(matrix)) * float(matrix_size(group.inverse(matrix)))
        assert_close(matrix, torch.from_numpy(scipy.linalg.expm(algebra.numpy())), scale, 1e5)
        assert_close(group.hat(coordinates), torch.from_numpy(scipy.linalg.logm(matrix.numpy()).real), scale, 1e6)


@in_both_precisions
def test_rotations_against_roma(dtype):
    for angle in ANGLES:
        vector = tangent(SO3, 5, angle, 0, 0, dtype, batch=20)
        rotation = SO3.exp(vector)
        assert_close(rotation, roma.rotvec_to_rotmat(vector.double()), 1, 64)
        theirs = roma.rotmat_to_rotvec(rotation.double())
        ours = SO3.log(rotation)
        sign = torch.where((ours.double() * theirs).sum(-1, keepdim=True) < 0, -1.0, 1.0) if angle > 3.14 else 1.0
        assert_close(ours, sign * theirs, 1, 64)  # of roma, 5e-15


# --- float32 against float64 ------------------------------------------------------------------------------------------


@for_each_group
@settings(max_examples=6, derandomize=True, deadline=None, database=None)
@given(case=cases())
def test_float32_keeps_its_digits(group, case):
    """Values and gradients at the same float32 matrix. The error of a logarithm is that of its input, at most a few
    roundings times the condition of the matrix and the size of the coordinates."""
    case["angle"] = min(case["angle"], PI - 1e-3)  # beyond, rounding alone carries the input over half a turn
    case["size"] = min(case["size"], 1.0)
    low = element(group, **case, dtype=torch.float32).requires_grad_()
    high = low.detach().double().requires_grad_()
    for chart in group.charts:
        norms = [group.log_block_norms(x, chart=chart) for x in (low, high)]
        linear = group.block_norms(torch.ones(group.dim))  # shape only
        condition = (matrix_size(high) * matrix_size(group.inverse(high.detach())))[..., 0].clamp(max=1e30)
        if any("translation" in block for block in group.blocks):
            translation = high.detach()[..., : group.matrix_size - 1, -1].norm(dim=-1, keepdim=True)
            condition = condition / (1 + translation) ** 2 * 16
        scale = (1 + norms[1]) * condition.clamp(min=1)
        assert_close(norms[0], norms[1].detach(), scale.detach() + 0 * linear, 256)
        gradients = [torch.autograd.grad(value.sum(), x)[0] for value, x in zip(norms, (low, high))]
        bound = gradients[1].abs().amax((-2, -1), keepdim=True) + scale.detach().amax(-1)[..., None, None]
        assert_close(gradients[0], gradients[1], bound * condition[..., None], 2048)


@pytest.mark.parametrize("group", [SE2, SE3, Sim2, Sim3, Aff2, Aff3], ids=str)
@pytest.mark.parametrize("offset", [1e3, 1e4, 1e6])
def test_relative_translation_keeps_its_digits_far_from_the_origin(group, offset):
    """Two poses a unit apart, thousands from the origin: the difference is exact in float32 (Sterbenz), so the relative
    pose and its logarithm are those of the same two poses at the origin."""
    n, generator = group.point_dim, torch.Generator().manual_seed(0)
    a, b = (group.random(50, generator=generator) for _ in range(2))
    direction = torch.randn(50, n, generator=generator)
    a[:, :n, n] = offset * direction / direction.norm(dim=-1, keepdim=True)
    b[:, :n, n] = a[:, :n, n] + torch.randn(50, n, generator=generator)
    exact = group.relative(a.double(), b.double())
    relative = group.relative(a, b)
    scale = matrix_size(exact) * matrix_size(group.inverse(group.relative(a.double(), b.double())))
    assert_close(relative, exact, matrix_size(exact), 64)
    naive = group.compose(group.inverse(a), b)
    assert (naive - exact).abs().max() > 10 * (relative - exact).abs().max()
    inside = group.in_chart(exact)
    assert_close(group.log(relative[inside]), group.log(exact[inside]), scale[inside][..., 0], 256)


# --- derivatives ------------------------------------------------------------------------------------------------------

SMOOTH_ANGLES = [0.0, 1e-8, 1e-4, 1e-2, 0.56, 2.0, PI - 1e-2]


def log_and_norms(group, chart="principal"):
    def function(g):
        xi = group.log(g, chart=chart, check=False)
        return torch.cat([xi, group.block_norms(xi)], -1)

    return function


@for_each_group
def test_gradients_against_finite_differences(group):
    """With respect to each entry of the matrix, off the group too."""
    for k, angle in enumerate(SMOOTH_ANGLES):
        size = (0.0, 0.3, 1e-8)[k % 3]
        g = group.exp(tangent(group, k, angle, size, 0.7, torch.float64, batch=1)).requires_grad_()
        for chart in group.charts:
            assert torch.autograd.gradcheck(
                log_and_norms(group, chart), g, eps=1e-7, atol=2e-5, rtol=1e-5, fast_mode=True
            )


@for_each_group
def test_gradients_of_exp_against_finite_differences(group):
    for k, angle in enumerate([0.0, 1e-8, 1e-2, 0.9, 2.0, PI]):
        xi = tangent(group, k, angle, 0.3 if k % 2 else 0.0, 0.7, torch.float64, batch=1).requires_grad_()
        assert torch.autograd.gradcheck(group.exp, xi, eps=1e-6, atol=1e-6, fast_mode=True)


@for_each_group
def test_double_gradients_against_finite_differences(group):
    for angle, size in ((0.0, 0.0), (1e-5, 1e-5), (2.0, 0.5)):
        g = group.exp(tangent(group, 1, angle, size, 0.7, torch.float64, batch=1)).requires_grad_()
        xi = tangent(group, 1, angle, size, 0.7, torch.float64, batch=1).requires_grad_()
        for chart in group.charts:
            norms = partial(group.log_block_norms, chart=chart, check=False)
            assert torch.autograd.gradgradcheck(norms, g, eps=1e-7, atol=2e-4, fast_mode=True)
        assert torch.autograd.gradgradcheck(group.exp, xi, eps=1e-6, atol=1e-5, fast_mode=True)


def test_gradcheck_sees_a_wrong_gradient():
    """The same check fails on a logarithm whose gradient is zeroed at small angles, as is common."""

    def cut(g):
        sine = g[..., 1, 0]
        return torch.where(sine.abs() < 1e-3, sine.detach(), torch.atan2(sine, g[..., 0, 0]))

    g = SE2.exp(torch.tensor([[1e-4, 0.0, 0.0]], dtype=torch.float64)).requires_grad_()
    with pytest.raises(RuntimeError, match="Jacobian"):
        torch.autograd.gradcheck(cut, g, eps=1e-7, atol=2e-5)


@for_each_group
@in_both_precisions
@few
@given(case=cases())
def test_derivatives_are_finite(group, dtype, case):
    """First and second, at half a turn and at the identity too."""
    g = element(group, **case, dtype=dtype).requires_grad_()
    for chart in group.charts:
        norms = group.log_block_norms(g, chart=chart)
        (first,) = torch.autograd.grad(norms.sum() + group.log(g, chart=chart).sum(), g, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum() if first.requires_grad else norms.sum(), g)
        assert norms.isfinite().all() and first.isfinite().all()
        if case["shift"] <= 1e3:  # the square of a squared norm of 1e6 is beyond float32
            assert second.isfinite().all()


@pytest.mark.parametrize("angle", [0.0, 1e-7, 1e-4, 1.0, PI - 1e-2, PI - 1e-4, PI - 1e-6, PI])
@in_both_precisions
def test_derivative_of_the_squared_angle(angle, dtype):
    """Along its own axis the squared norm 2 θ² of a rotation has the derivative 4 θ; at π one of the two sides."""
    axis = tangent(SO3, 3, 1.0, 0, 0, torch.float64)
    g = SO3.exp(angle * axis).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(SO3.log_block_norms(g).sum(), g)
    slope = (gradient * (g.detach() @ SO3.hat(axis.to(dtype)))).sum((-2, -1))
    if angle > PI - 1e-6:
        slope = slope.abs()
    assert_close(slope.detach(), torch.full((3,), 4 * angle, dtype=torch.float64), 4 * PI, 64)


def test_at_the_identity_the_hessian_is_the_metric():
    """log_block_norms(exp(ξ)) = block_norms(ξ) to all orders, so twice the weights on the diagonal."""
    for group in (SE3, Sim2, Aff2, Aff3):
        zero = torch.zeros(group.dim, dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(
            lambda xi, group=group: group.log_block_norms(group.exp(xi)).sum(), zero
        )
        basis = group.hat(torch.eye(group.dim, dtype=torch.float64))
        assert_close(hessian, 2 * torch.diag(basis.square().sum((-2, -1))), 1, 64)


# --- repeated eigenvalues, Jordan blocks, eigenvalue one --------------------------------------------------------------

CORNERS = {
    "identity": [[1.0, 0.0], [0.0, 1.0]],
    "shear": [[1.0, 3.0], [0.0, 1.0]],
    "tiny shear": [[1.0, 1e-7], [0.0, 1.0]],
    "Jordan block": [[2.0, 1.0], [0.0, 2.0]],
    "nearly a Jordan block": [[2.0, 1.0], [1e-9, 2.0]],
    "eigenvalue one": [[1.0, 0.0], [0.0, 5.0]],
    "eigenvalue nearly one": [[1 + 1e-7, 0.5], [0.0, 5.0]],
    "eigenvalue one, rotated": [[3.0, 2.0], [2.0, 3.0]],
    "inverse eigenvalues": [[2.0, 1.0], [0.0, 0.5]],
    "multiple": [[0.5, 0.0], [0.0, 0.5]],
    "quarter turn": [[0.0, -1.0], [1.0, 0.0]],
    "scaled turn": [[-1.0, -2.0], [2.0, -1.0]],
    "nearly half a turn": [[-1.0, -1e-3], [1e-3, -1.0]],
    "stretched": [[1e3, 0.0], [0.0, 1e-3]],
    "stretched more and turned": [[2000.0, -1.0], [3.0, 1.0]],
}


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("n", [2, 3])
def test_affine_corners(name, n):
    """Against mpmath with 60 digits, values in both precisions, gradients against differences."""
    group = Aff2 if n == 2 else Aff3
    if n == 3 and name == "nearly half a turn":
        return  # see test_iterated_logarithm_near_half_a_turn
    linear = torch.eye(n, dtype=torch.float64)
    linear[:2, :2] = torch.tensor(CORNERS[name], dtype=torch.float64)
    g = group.assemble(linear, torch.arange(1, n + 1, dtype=torch.float64) / 2)
    with mpmath.workdps(60):
        # a perturbation far below float64 parts the eigenvalues, which mpmath's logarithm wants distinct
        matrix = mpmath.matrix(g.tolist())
        for i in range(n):
            for j in range(n + 1):
                matrix[i, j] += mpmath.mpf(10) ** -40 * ((3 * i + 5 * j) % 7)
        rows = mpmath.logm(matrix).tolist()
        exact = torch.tensor([[float(mpmath.re(x)) for x in row] for row in rows], dtype=torch.float64)
    condition = float(torch.linalg.cond(linear))
    xi = group.log(g)
    if name != "nearly half a turn":  # mpmath takes its square roots past the negative axis there
        assert_close(group.hat(xi), exact, 1 + exact.abs().max(), 32 * condition)
    low = g.float()
    assert_close(group.log(low), group.log(low.double()), 1 + exact.abs().max(), 32 * condition)
    assert_close(group.exp(xi), g, 1 + g.abs().max(), 64 * condition)
    for chart in group.charts:
        for dtype in DTYPES:
            x = g.to(dtype).requires_grad_()
            (first,) = torch.autograd.grad(group.log_block_norms(x, chart=chart).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), x)
            assert first.isfinite().all() and second.isfinite().all()
        if condition < 100:
            x = g.clone().requires_grad_()
            function = log_and_norms(group, chart)
            assert torch.autograd.gradcheck(function, x, eps=1e-7, atol=1e-4, rtol=1e-4, fast_mode=True)


def test_iterated_logarithm_near_half_a_turn():
    """For n >= 3 an eigenvalue at ε from the negative axis costs 1/ε²; the chart ends before all are lost."""
    for angle in (1e-1, 1e-2, 1e-3, 1e-6):
        xi = torch.tensor([0.0, 0.0, 0.0, PI - angle] + [0.0] * 5, dtype=torch.float64)
        g = GL(3).exp(xi)
        assert_close(GL(3).log(g), xi, 1, 64 / angle**2)
        assert bool(GL(3).in_chart(g.float())) == (angle > 1.4e-3)
    assert not GL(3).in_chart(GL(3).exp(torch.tensor([0.0, 0.0, 0.0, PI - 1e-8] + [0.0] * 5, dtype=torch.float64)))


def test_matrix_logarithm_and_polar_factor_of_larger_matrices():
    generator = torch.Generator().manual_seed(0)
    a = torch.linalg.matrix_exp(0.4 * torch.randn(4, 6, 6, generator=generator, dtype=torch.float64))
    for x, logarithm, rotation in zip(a, _matrix.log(a), _matrix.polar_rotation(a)):
        torch.testing.assert_close(logarithm, torch.from_numpy(scipy.linalg.logm(x.numpy())), rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(rotation, torch.from_numpy(scipy.linalg.polar(x.numpy())[0]), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(_matrix.square_root(a @ a) @ _matrix.square_root(a @ a), a @ a, rtol=1e-9, atol=1e-9)


def test_batches_do_not_mix():
    """Iterations that look at the batch give an element the same result in company as alone."""
    g = torch.cat([GL(3).identity(1), GL(3).random(6, generator=torch.Generator().manual_seed(0))]).double()
    g = torch.cat([g, g[1:2] * 1e5])
    for chart in ("principal", "polar"):
        together = GL(3).log(g, chart=chart)
        alone = torch.cat([GL(3).log(x[None], chart=chart) for x in g])
        assert_close(together, alone, 1 + alone.abs(), 64)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [Aff2, Product(SE2, Sim3)], ids=str)
def test_closed_forms_trace_without_a_break(group):
    g = group.random(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def norms(a, b):
        return group.log_block_norms(group.relative(a, b), check=False)

    compiled = torch.compile(norms, fullgraph=True, backend="eager")
    assert_close(compiled(g, g.flip(0)), norms(g, g.flip(0)), 1 + norms(g, g.flip(0)), 16)


def test_has_shear_and_angles_mean_what_they_say():
    assert has_shear(Aff2) and not has_shear(SE3)
    assert math.isclose(float(SO3.log(SO3.exp(tangent(SO3, 0, 0.9, 0, 0, torch.float64))).norm(dim=-1)[0]), 0.9)
