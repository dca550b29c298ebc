"""Moving all elements, and the cocycle: what should hold to rounding, and how far it does."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erlangen import lie

from .tasks import TEST_SEED, unit_tangents


def large_moves(group: lie.Group, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Large group elements by kind, float64 [count, m, m]."""
    base = group.random(count, generator=generator, dtype=torch.float64)
    moves = {"random": base}
    if "translation" in group.blocks:
        far = base.clone()
        direction = torch.randn(count, group.point_dim, generator=generator, dtype=torch.float64)
        far[:, :-1, -1] = 1e3 * direction / direction.norm(dim=-1, keepdim=True)
        moves["translation 1000"] = far
    if "scale" in group.blocks:
        for factor in (100.0, 0.01):
            scaled = base.clone()
            scaled[:, :-1, :-1] *= factor
            moves[f"scale {factor:g}"] = scaled
    return moves


def invariance_errors(
    group: lie.Group, complete: Callable[[Tensor], Tensor], given: Tensor, moves: Mapping[str, Tensor]
) -> dict[str, list[float]]:
    """‖(h out(g))⁻¹ out(h g) − 1‖_F by kind of move: median and largest; inf where there is no such number.

    Args:
        group: the group.
        complete: from given elements [B, N, m, m] to an answer [B, m, m].
        given: float32 or float64, which is the precision that is measured; the comparison is made in float64.
        moves: float64 [B, m, m] by kind.
    """
    still = complete(given).double()
    errors = {}
    for kind, h in moves.items():
        moved = complete((h[:, None] @ given.double()).to(given.dtype)).double()
        difference = torch.linalg.solve_ex(h @ still, moved).result - torch.eye(group.matrix_size, dtype=moved.dtype)
        size = difference.square().sum((-2, -1)).sqrt().nan_to_num(nan=math.inf)
        errors[kind] = [float(size.median()), float(size.max())]
    return errors


def cocycle(group: lie.Group, *, count: int = 256, seed: int = TEST_SEED) -> dict[str, Any]:
    """How far g_ik = g_ij g_jk holds on the group and on logarithms.

    Returns:
        ``group float32`` and ``group float64``: the largest relative error in the Frobenius norm; ``size``: ‖w‖ of the
        two factors; ``discrepancy``: median ‖w_ij + w_jk − w_ik‖ at each size; ``order``: its slope in the logarithms.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float64):
        a, b, c = group.random(3, count, generator=generator, dtype=dtype)
        whole, parts = group.relative(a, c), group.compose(group.relative(a, b), group.relative(b, c))
        error = (parts - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
        found[f"group {str(dtype).removeprefix('torch.')}"] = float(error.max())
    first, second = unit_tangents(group, count, generator), unit_tangents(group, count, generator)
    sizes = np.geomspace(1e-3, 0.1, 7)
    discrepancy = []
    for size in sizes:
        product = group.compose(group.exp(size * first), group.exp(size * second))
        gap = size * (first + second) - group.log(product)
        discrepancy.append(float(group.block_norms(gap).sum(-1).sqrt().median()))
    order = float(np.polyfit(np.log(sizes), np.log(discrepancy), 1)[0])
    return found | {"size": sizes.tolist(), "discrepancy": discrepancy, "order": order}
