"""Groups, tangent vectors that look for trouble, and tolerances, for the tests of erlangen.lie."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from erlangen.lie import GL, SE2, SE3, SO2, SO3, Aff2, Aff3, Group, Product, Sim2, Sim3, Translation

GROUPS: list[Group] = [
    *(SO2, SO3, SE2, SE3, Sim2, Sim3, Aff2, Aff3),
    *(GL(2), GL(3), GL(4), Translation(3), Product(SE2, SO3), Product(Sim3, Aff2)),
]
DTYPES = [torch.float32, torch.float64]
PI = math.pi
ANGLES = [0.0, 1e-8, 1e-7, 1e-5, 1e-3, 1e-2, 0.1, 0.3, 0.9, 1.1, 2.0, PI - 0.1, PI - 1e-3, PI - 1e-5, PI - 1e-7, PI]
SIZES = [0.0, 1e-8, 1e-6, 1e-3, 1e-1, 0.5, 1.0, 2.0]
SHIFTS = [0.0, 1e-8, 1e-3, 1.0, 1e3, 1e6]


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
