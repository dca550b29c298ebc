"""Defects that other libraries have or had, each as a test that we do not share it."""

import pytest
import torch
from lie_cases import DTYPES, PI, assert_close, tangent

from erlangen.lie import GL, SE2, SE3, SO2, SO3, Aff2, Aff3, Group, Sim2, Sim3

in_both_precisions = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
for_each_named_group = pytest.mark.parametrize("group", [SO2, SO3, SE2, SE3, Sim2, Sim3, Aff2, Aff3, GL(3)], ids=str)


def gradient(function, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


@for_each_named_group
@in_both_precisions
def test_gradient_at_the_identity(group: Group, dtype):
    """kornia #4404, jaxlie #9, theseus #108: NaN. The derivative of log at the identity is vee."""
    xi = torch.zeros(group.dim, dtype=dtype)
    assert_close(gradient(lambda x: group.log(group.exp(x)), xi), torch.ones(group.dim), 1, 4)
    assert_close(gradient(lambda g: group.log_block_norms(g), group.identity(dtype=dtype)), group.hat(xi), 1, 0)


@pytest.mark.parametrize("group", [SO2, SO3, SE2, SE3, Sim2, Sim3], ids=str)
@in_both_precisions
def test_gradient_at_half_a_turn(group: Group, dtype):
    """kornia #4404: NaN; acos of a trace: infinite."""
    g = group.exp(tangent(group, 0, PI, 0.2, 1.0, dtype))
    exact = group.identity(3, dtype=dtype)
    exact[:, :2, :2] = -torch.eye(2, dtype=dtype)
    for x in (g, exact):
        for function in (group.log, group.log_block_norms):
            derivative = gradient(function, x)
            assert derivative.isfinite().all() and derivative.abs().max() < 1e3


@in_both_precisions
def test_log_of_half_a_turn(dtype):
    """pytorch3d #188: 4244 at π; #262, #413 and PyPose #172: 0 at π; pinocchio #1647: the axis' sign."""
    signs = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    axis = (signs.double() / signs.double().norm(dim=-1, keepdim=True)).to(dtype)
    for angle in (PI, PI - 1e-7, PI - 1e-5, PI - 1e-3):
        rotation = SO3.exp(angle * axis)
        vector = SO3.log(rotation)
        assert_close(vector.norm(dim=-1), torch.full((5,), angle, dtype=torch.float64), 1, 16)
        assert_close(SO3.exp(vector), rotation, 1, 16)
        if angle < PI - 1e-6:
            assert_close(vector, angle * axis.double(), 1, 32)
    assert_close(SO3.log(torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=dtype))).abs(), PI * axis[-1].double(), 1, 4)


@pytest.mark.parametrize("angle", [2e-7, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 0.1, 0.5])
@pytest.mark.parametrize("group", [SE2, SE3, Sim3], ids=str)
def test_small_angle_coefficients_in_float32(group: Group, angle):
    """PyPose 0.9.5: the backward of SE3.Log off by 0.136 at 2e-7 and 8.5e-4 at 1e-4; lietorch: (1 − cos θ)/θ² off by
    100% below 1e-4; jaxlie: the translation off by 1.5e-3 at 3e-3. Here float32 against float64, value and gradient."""
    xi = tangent(group, 1, angle, angle, 2.3, torch.float32, batch=20)
    assert_close(group.exp(xi), group.exp(xi.double()), 2.3, 4)
    g = group.exp(xi)
    assert_close(group.log(g), group.log(g.double()), 2.3, 8)
    for function in (group.exp, lambda x: group.log_block_norms(group.exp(x))):
        assert_close(gradient(function, xi), gradient(function, xi.double()), 2 * 2.3**2, 32)


@in_both_precisions
def test_round_trips(dtype):
    """pytorch3d #1609: exp ∘ log off by 17 in the sum; gtsam #780, #2099: Taylor terms of log near 0 and π."""
    for angle in (0.0, 1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 0.3, 1.0, 3.0, PI - 1e-2, PI - 1e-3, PI - 1e-4, PI):
        for group in (SE3, Sim3):
            g = group.exp(tangent(group, 2, angle, 0.3, 10.0, dtype, batch=20))
            assert_close(group.exp(group.log(g)), g, 10, 32)


@in_both_precisions
def test_similarities_with_large_tangents(dtype):
    """PyPose: the Jacobians of Sim(3) are series cut at order 5 or 6; lietorch: a term lost to a stray semicolon."""
    for angle in (0.0, 1.0, 3.1):
        for size in (0.5, 2.0, 5.0, -5.0):
            xi = tangent(Sim3, 3, angle, size, 10.0, dtype)
            g = Sim3.exp(xi)
            exact = torch.linalg.matrix_exp(Sim3.hat(xi.double()))
            assert_close(g, exact, exact.abs().amax(), 32)
            assert_close(Sim3.log(g), xi, 10 * (1 + exact.abs().amax()), 64)


@in_both_precisions
def test_translation_is_not_treated_as_the_logarithm(dtype):
    """A score with R_iᵀ(t_j − t_i) for log drops V⁻¹: at 2 rad |V⁻¹ τ|² = G |τ|² with G = 1/sin² 1."""
    g = SE2.assemble(SO2.exp(torch.tensor([[2.0]], dtype=dtype)), torch.tensor([[3.0, 4.0]], dtype=dtype))
    expected = 25 / torch.sin(torch.tensor(1.0, dtype=torch.float64)) ** 2
    assert_close(SE2.log_block_norms(g)[0, 1], expected, expected, 8)


@pytest.mark.parametrize("chart", ["principal", "polar"])
@in_both_precisions
def test_repeated_eigenvalues(chart, dtype):
    """torch.linalg.eig and svd: NaN gradients where eigenvalues or singular values repeat (pytorch #23133, #47599)."""
    matrices = [torch.eye(3), 2 * torch.eye(3), torch.diag(torch.tensor([2.0, 2.0, 3.0]))]
    matrices += [torch.eye(3) + torch.diag(torch.ones(2), 1), SO3.exp(torch.tensor([0.3, 0.2, 0.1]))]
    g = torch.stack(matrices).to(dtype)
    for function in (GL(3).log, GL(3).log_block_norms):
        derivative = gradient(lambda x, f=function: f(x, chart=chart), g)
        exact = gradient(lambda x, f=function: f(x, chart=chart), g.double())
        assert_close(derivative, exact, 1 + exact.abs(), 256)


def test_gradient_of_exp_does_not_depend_on_the_size_of_the_loss():
    """torch 2.13's matrix_exp in float32: gradients of 1e6 are off by percents, as they set the number of squarings."""
    xi = tangent(Aff3, 0, 0.3, 0.1, 1.0, torch.float32)
    small, large = (gradient(lambda x, c=c: c * Aff3.exp(x), xi) for c in (1.0, 2.0**20))
    assert torch.equal(large, small * 2.0**20)


@for_each_named_group
def test_small_angles_do_not_vanish(group: Group):
    """ssik #199: acos of a trace is 0 below 2e-8 in float64, and below 3e-4 in float32."""
    for dtype, angle in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        xi = torch.zeros(group.dim, dtype=dtype)
        xi[group.blocks["rotation"][-1]] = angle
        rotation = group.blocks["rotation"]
        assert_close(group.log(group.exp(xi))[rotation,], xi[rotation,], angle, 8)
