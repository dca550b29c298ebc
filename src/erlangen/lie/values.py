"""What attention does with the poses it attends to. All of it is exactly left-equivariant.

Whatever stands to the right of g_i is made of relative poses g_i⁻¹ g_j, which do not change when one h moves all poses.
So a tangent vector or a payload in the frame of token i is invariant, and g_i exp(…) goes to h g_i exp(…). A payload
that does not transform at all is the plain output of `lie_attention`.

The tangent vector w_ij = log(g_i⁻¹ g_j) jumps where the logarithm has a cut (half a turn), unlike its norm.

Shape suffixes: B batch, H heads (1 where they share), N queries, M keys, G dimension of the algebra, P payload vectors,
n width of a payload vector, m size of the group's matrices (written twice).
"""

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from ._base import Group
from ._matrix import matvec
from .attention import (
    IMPLEMENTATIONS,
    Inputs,
    Outside,
    check_alike,
    dense_weights,
    expect_choice,
    expect_displacement,
    expect_inside,
    expect_shape,
    pose_heads,
    relative_poses,
    replace_poses,
    tiled,
)
from .product import Product

Payload = Literal["vectors", "points"]


def lie_mean_tangent(
    weights: Tensor,
    query: Tensor,
    key: Tensor,
    group: Group,
    *,
    displacement: Tensor | None = None,
    chart: str = "principal",
    check: bool = True,
) -> Tensor:
    """Weighted sum Σ_j weights_ij log(c_h⁻¹ q_i⁻¹ k_j) of each head: where the attended poses lie, seen from the query.

    Args:
        weights: [B, H, N, M], from `lie_weights` for instance; float32 or float64, as the poses.
        query: poses [B, N, m, m], or [B, H, N, m, m] for a set of poses a head.
        key: poses [B, M, m, m] or [B, H, M, m, m].
        group: the group the poses belong to.
        displacement: c, poses [H, m, m], to see them from ``query @ displacement[h]``.
        chart: "principal", the logarithm; or "polar", which is global on the groups that have it.
        check: look for pairs outside the principal chart, which waits for the device; never under ``torch.compile``.
            A pair outside it gives NaN when it is not looked at, unless its weights are 0.

    Returns:
        Tangent vectors [B, H, N, group.dim]; they do not change when one h moves all poses.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a pair of non-zero weight is outside the principal chart.
    """
    relative_BHNMmm = _relative(weights, query, key, group, displacement)
    expect_choice(f"chart of {group}", chart, group.charts)
    inside_BHNM, counts_BHNM, invalid_BHNM = group.in_chart(relative_BHNMmm, chart=chart), weights != 0, None
    if check and not torch.compiler.is_compiling():
        expect_inside(inside_BHNM, counts_BHNM, group, chart, "weights of zero for them")
    else:
        invalid_BHNM = ~inside_BHNM & counts_BHNM
    relative_BHNMmm = replace_poses(relative_BHNMmm, inside_BHNM, group)
    with torch.autocast(weights.device.type, enabled=False):
        tangent_BHNMG = group.log(relative_BHNMmm, chart=chart, check=False)
        if invalid_BHNM is not None:
            tangent_BHNMG = tangent_BHNMG.masked_fill(invalid_BHNM[..., None], torch.nan)
        return (weights[..., None, :] @ tangent_BHNMG)[..., 0, :]


def lie_attention_tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Group,
    block_weights: Tensor,
    temperature: Tensor,
    displacement: Tensor | None = None,
    content_query: Tensor | None = None,
    content_key: Tensor | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    chart: str = "principal",
    outside: Outside = "error",
    check: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`lie_attention`, and `lie_mean_tangent` of the same weights, which need not be kept for it.

    Args:
        all: as in `lie_attention`; a value of width 0 asks for the tangent vectors alone. "auto" is "tiled" for more
            than 512 × 512 pairs a head and under ``torch.compile``, else "reference".

    Returns:
        output [B, H, N, D] and tangent vectors [B, H, N, group.dim]; both invariant when one h moves all poses.

    Raises:
        ValueError, RuntimeError: as `lie_attention`.
    """
    expect_choice("impl", impl, [name for name in IMPLEMENTATIONS if name != "triton"])
    inputs = Inputs(
        query, key, group, block_weights, temperature, displacement, chart, outside, check,
        content_query, content_key, causal, mask,
    )  # fmt: skip
    value = inputs.checked_value(value)
    if inputs.chosen(impl, tangents=True) == "tiled":
        return tiled(inputs, value, tangents=True)
    weights = dense_weights(inputs)
    poses = inputs.query, inputs.key
    tangent = lie_mean_tangent(weights, *poses, group, displacement=inputs.displacement, chart=chart, check=check)
    return weights @ value, tangent


def lie_mean_update(
    weights: Tensor,
    query: Tensor,
    key: Tensor,
    group: Group,
    step: float | Tensor = 1.0,
    *,
    chart: str = "principal",
    check: bool = True,
) -> Tensor:
    """Poses q_i exp(Σ_h C_h Σ_j weights_ij log(q_i⁻¹ k_j)): each query moves towards the poses it attends to.

    With one head, step 1 and weights that sum to 1 this is one Karcher step; iterated with fixed weights it converges
    to the intrinsic mean (Pennec & Arsigny, "Exponential barycenters", 2012), for poses that are not too far apart.

    Args:
        weights, query, key, group, chart, check: as in :func:`lie_mean_tangent`; the query has no axis of heads.
        step: C: a number, a number a head [H], or a matrix a head [H, group.dim, group.dim]. Any linear map is
            equivariant. The heads add up: 1 / H takes their mean.

    Returns:
        Poses [B, N, m, m]; they go to h times themselves when h moves all poses.

    Raises:
        ValueError: as :func:`lie_mean_tangent`, or the step does not fit.
    """
    m, dim = group.matrix_size, group.dim
    expect_shape("query", query, (None, None, m, m), "[B, N, m, m]")
    tangent_BHNG = lie_mean_tangent(weights, query, key, group, chart=chart, check=check)
    if isinstance(step, Tensor) and step.ndim:
        check_alike(weights=weights, step=step)
        num_heads = weights.shape[1]
        expect_shape("step", step, (num_heads,) if step.ndim == 1 else (num_heads, dim, dim), "[H] or [H, dim, dim]")
        step_H11 = step[:, None, None]
        tangent_BHNG = tangent_BHNG * step_H11 if step.ndim == 1 else tangent_BHNG @ step.mT
    else:
        tangent_BHNG = tangent_BHNG * step
    return move(query, tangent_BHNG.sum(1), group)


def lie_transport(
    weights: Tensor, query: Tensor, key: Tensor, value: Tensor, group: Group, *, kind: Payload = "vectors"
) -> Tensor:
    """Payload Σ_j weights_ij ρ(q_i⁻¹ k_j) v_j: what the tokens carry in frames of their own, seen from the query's.

    The representation ρ is that of Miyato et al., "GTA" (arXiv 2310.10375), on the vectors or points the group acts on.
    Computed from relative poses, so that a common large translation costs no digits.

    Args:
        weights, query, key, group: as in :func:`lie_mean_tangent`.
        value: payload [B, H, M, P, n], in the frame of each key; n as in ``group.act``.
        kind: "vectors" turn and scale; "points" are translated too.

    Returns:
        [B, H, N, P, n], in the frame of each query; it does not change when one h moves all poses.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    relative_BHNMmm = _relative(weights, query, key, group)
    expect_choice("kind", kind, get_args(Payload))
    check_alike(weights=weights, value=value)
    batch, num_heads, _, num_keys = weights.shape
    expect_shape("value", value, (batch, num_heads, num_keys, None, group.point_dim), "[B, H, M, P, n]")
    with torch.autocast(weights.device.type, enabled=False):
        relative_BHNM1mm, value_BH1MPn = relative_BHNMmm[..., None, :, :], value[:, :, None]
        act = group.act if kind == "points" else partial(_act_on_vectors, group)
        seen_BHNMPn = act(relative_BHNM1mm, value_BH1MPn)
        return torch.einsum("bhnm,bhnmpi->bhnpi", weights, seen_BHNMPn)


def _act_on_vectors(group: Group, g: Tensor, vectors: Tensor) -> Tensor:
    """What ``group.act`` does to the difference of two points."""
    if isinstance(group, Product):
        parts = zip(group.factors, group.split(g), vectors.split([factor.point_dim for factor in group.factors], -1))
        return torch.cat([_act_on_vectors(*part) for part in parts], -1)
    return matvec(g[..., : group.point_dim, : group.point_dim], vectors)


def move(poses: Tensor, tangent: Tensor, group: Group) -> Tensor:
    """Poses g exp(ξ), in the precision of the poses whatever autocast says."""
    with torch.autocast(poses.device.type, enabled=False):
        return group.compose(poses, group.exp(tangent))


def _relative(weights: Tensor, query: Tensor, key: Tensor, group: Group, displacement: Tensor | None = None) -> Tensor:
    """Relative poses [B, H or 1, N, M, m, m] that fit the weights."""
    check_alike(weights=weights, query=query, key=key, displacement=displacement)
    expect_shape("weights", weights, (None, None, None, None), "[B, H, N, M]")
    num_heads = weights.shape[1]
    query_BHNmm, key_BHMmm = pose_heads(query, key, group, num_heads)
    full = (query_BHNmm.shape[0], num_heads, query_BHNmm.shape[2], key_BHMmm.shape[2])
    expect_shape("weights", weights, full, "[B, H, N, M]")
    expect_displacement(displacement, num_heads, group)
    with torch.autocast(weights.device.type, enabled=False):
        return relative_poses(query_BHNmm, key_BHMmm, group, displacement)
