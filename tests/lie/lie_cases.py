"""Groups, tangent vectors that look for trouble, and tolerances, for the tests of erlangen.lie."""

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from erlangen.lie import GL, SE2, SE3, SO2, SO3, Aff2, Aff3, Group, Product, Sim2, Sim3, Translation

GROUPS: list[Group] = [
    *(SO2, SO3, SE2, SE3, Sim2, Sim3, Aff2, Aff3),
    *(GL(2), GL(3), GL(4), Translation(3), Product(SE2, SO3), Product(Sim3, Aff2)),
]
POINT_GROUPS: list[Group] = [SO2, SE2, SO3, SE3, Sim2, Sim3, GL(2), Aff2, Aff3, Translation(2)]
"""Those that act on points of one space, for the tests of attention and of the value paths."""
DTYPES = [torch.float32, torch.float64]
PI = math.pi
ANGLES = [0.0, 1e-8, 1e-7, 1e-5, 1e-3, 1e-2, 0.1, 0.3, 0.9, 1.1, 2.0, PI - 0.1, PI - 1e-3, PI - 1e-5, PI - 1e-7, PI]
SIZES = [0.0, 1e-8, 1e-6, 1e-3, 1e-1, 0.5, 1.0, 2.0]
SHIFTS = [0.0, 1e-8, 1e-3, 1.0, 1e3, 1e6]

# scipy's logm warns from 1000 roundings on, some 1e-13, which is what we take its error to be.
LOGM_MAY_WARN = pytest.mark.filterwarnings("ignore:logm result may be inaccurate:RuntimeWarning")


def has_shear(group: Group) -> bool:
    return any("shear" in block for block in group.blocks)


def tangent(
    group: Group, seed: int, angle: float, size: float, shift: float, dtype: torch.dtype, batch: int = 3
) -> Tensor:
    """Tangent vectors with the rotation ``angle`` (radians), scale and shear of ``size``, translations of ``shift``.

    With a shear, angles stop at π − 0.1: the logarithm of a matrix with two nearly negative eigenvalues has no digits.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for block, indices in group.blocks.items():
        direction = torch.randn(batch, len(indices), generator=generator, dtype=torch.float64)
        direction = direction / direction.norm(dim=-1, keepdim=True)
        kind = block.split(".")[-1]
        if kind == "rotation":
            # the largest angle of a rotation matrix is its spectral norm, below this norm of coordinates
            parts.append(direction * (min(angle, PI - 0.1) if has_shear(group) else angle))
        else:
            parts.append(direction * (shift if kind == "translation" else size))
    return torch.cat(parts, -1).to(dtype)


def cases(**fixed: float) -> st.SearchStrategy[dict]:
    """Keyword arguments of ``tangent``, apart from group and dtype."""
    free = {
        "angle": st.sampled_from(ANGLES),
        "size": st.sampled_from(SIZES),
        "shift": st.sampled_from(SHIFTS),
        "seed": st.integers(0, 2**16),
    }
    return st.fixed_dictionaries({name: st.just(fixed[name]) if name in fixed else free[name] for name in free})


def element(group: Group, seed: int, angle: float, size: float, shift: float, dtype: torch.dtype) -> Tensor:
    return group.exp(tangent(group, seed, angle, size, shift, dtype))


def near(
    group: Group,
    *batch: int,
    generator: torch.Generator,
    spread: float = 0.4,
    most: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Poses exp(ξ), ξ normal with deviation ``spread``, cut at ``most``.

    Near enough for relative poses to lie in the principal chart: at the seeds of the tests, and for ``most`` of 0.6 in
    the groups that Hypothesis draws.
    """
    xi = spread * torch.randn(*batch, group.dim, generator=generator, dtype=torch.float64)
    return group.exp(xi.clamp(-most, most)).to(dtype)


def far_elements(group: Group, generator: torch.Generator, count: int = 4) -> Tensor:
    """Elements with translations of 1e3 and, where the group scales, scales of 1e2 and 1e-2."""
    elements = group.exp(torch.randn(count, group.dim, generator=generator, dtype=torch.float64).clamp(-1, 1))
    n = group.point_dim
    elements[:, :n, n:] *= 1e3
    if "scale" in group.blocks:
        scale = torch.tensor([1e2, 1e-2], dtype=torch.float64).repeat(count // 2)
        elements[:, :n, :n] *= scale[:, None, None]
    return elements


def turn(group: Group, angle: float) -> Tensor:
    """The element that turns by ``angle`` (radians) about one axis in every rotation of the group."""
    xi = torch.zeros(group.dim, dtype=torch.float64)
    for block, indices in group.blocks.items():
        if block.split(".")[-1] == "rotation":
            xi[indices[0]] = angle
    return group.exp(xi)


def outside_chart(group: Group) -> Tensor:
    """diag(−1, −2) has a positive determinant and no real logarithm."""
    element = torch.eye(group.matrix_size, dtype=torch.float64)
    element[0, 0], element[1, 1] = -1.0, -2.0
    return element


def score_options(group: Group, generator: torch.Generator, heads: int, dtype: torch.dtype = torch.float64) -> dict:
    """The group, positive block weights and temperatures, as keyword arguments of the scores."""
    weights = 0.5 + torch.rand(heads, len(group.blocks), generator=generator, dtype=torch.float64)
    temperature = 0.5 + torch.rand(heads, generator=generator, dtype=torch.float64)
    return {"group": group, "block_weights": weights.to(dtype), "temperature": temperature.to(dtype)}


def act_on_poses(element: Tensor, query: Tensor, key: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """One element moves queries and keys, and nothing else: ``act_in`` of the equivariance tests."""
    return element @ query, element @ key, *rest


def assert_near(actual: Tensor, expected: Tensor | np.ndarray, tolerance: float = 1e-10) -> None:
    """Same shape and entries, to an absolute tolerance; NaN fails.

    scipy's logm and ours are each good to some 1e-13 of matrices of size 1.
    """
    expected = np.asarray(expected)
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {expected.shape}"
    error = np.abs(actual.detach().numpy() - expected).max()
    assert error <= tolerance, f"error {error:.3e}, at most {tolerance:.0e}"


def assert_close(actual: Tensor, expected: Tensor, scale: Tensor | float, ulps: float = 64) -> None:
    """``|actual − expected| <= ulps · eps · scale``, entry by entry; eps of the dtype of ``actual``; NaN fails."""
    error = (actual.double() - expected.double()).abs()
    bound = ulps * torch.finfo(actual.dtype).eps * torch.as_tensor(scale, dtype=torch.float64)
    assert bool((error <= bound).all()), (
        f"error {float(error.max()):.3e}, {float((error / bound).max()):.3g} times the bound {float(bound.max()):.3e}"
    )


def matrix_size(x: Tensor) -> Tensor:
    """Largest entry of each matrix, at least 1: [..., 1, 1]."""
    return x.detach().abs().flatten(-2).amax(-1).clamp(min=1)[..., None, None]
