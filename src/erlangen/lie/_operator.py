"""`lie_attention` in tiles as one operator of torch, with a backward pass that is another."""

from typing import Any

import torch
from torch import Tensor

from ._base import Group
from ._geometry import pair_geometry
from ._skipping import SkippingTiles
from ._tiled import Tiles
from ._workspace import Workspace, workspace
from .groups import parse


def _tiles(
    query: Tensor, key: Tensor | None, scale: Tensor, value: Tensor, *settings: Any, skip: float, fused: bool,
    space: Workspace,
) -> Tiles:  # fmt: skip
    if skip > 0 and min(query.shape[-1], len(value), value.shape[2]) > 0:
        return SkippingTiles(query, key, scale, value, *settings, skip=skip, space=space)
    return Tiles(query, key, scale, value, *settings, fused=fused, space=space)


@torch.library.custom_op("erlangen::lie_attention", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    value: Tensor,
    content_query: Tensor | None,
    content_key: Tensor | None,
    mask: Tensor | None,
    group: str,
    chart: str,
    outside: str,
    causal: bool,
    check: bool,
    tangents: bool,
    skip: float,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with workspace(value) as space:
        return _tiles(
            query, key, scale, value, content_query, content_key, mask, group, chart, outside, causal, check, tangents,
            skip=skip, fused=fused, space=space,
        ).forward()  # fmt: skip


@_attend.register_fake
def _(
    query, key, scale, value, content_query, content_key, mask,
    group, chart, outside, causal, check, tangents, skip, fused,
):  # fmt: skip
    shape = (*value.shape[:2], query.shape[-1])
    dim = parse(group).dim if tangents else 0
    return value.new_empty(*shape, value.shape[-1]), value.new_empty(*shape, dim), value.new_empty(*shape)


@torch.library.custom_op("erlangen::lie_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    grad_tangent: Tensor,
    output: Tensor,
    tangent: Tensor,
    log_sum: Tensor,
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    value: Tensor,
    content_query: Tensor | None,
    content_key: Tensor | None,
    mask: Tensor | None,
    group: str,
    chart: str,
    outside: str,
    causal: bool,
    tangents: bool,
    skip: float,
    fused: bool,
    need_poses: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with workspace(value) as space:
        return _tiles(
            query, key, scale, value, content_query, content_key, mask, group, chart, outside, causal, False, tangents,
            skip=skip, fused=fused, space=space,
        ).backward(grad, grad_tangent, output, tangent, log_sum, need_poses, need_scale)  # fmt: skip


@_attend_backward.register_fake
def _(
    grad, grad_tangent, output, tangent, log_sum, query, key, scale, value, content_query, content_key, mask,
    group, chart, outside, causal, tangents, skip, fused, need_poses, need_scale,
):  # fmt: skip
    likely = (key, scale, value, content_query, content_key)
    return torch.empty_like(query), *(value.new_empty(0) if x is None else torch.empty_like(x) for x in likely)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, group, chart, outside, causal, _, tangents, skip, fused = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.settings = (group, chart, outside, causal, tangents, skip, fused)


def _backward(ctx, grad, grad_tangent, _):
    needs = ctx.needs_input_grad
    grads = _attend_backward(
        grad.contiguous(), grad_tangent.contiguous(), *ctx.saved_tensors, *ctx.settings, needs[0] or needs[1], needs[2]
    )
    return *(g if need else None for g, need in zip(grads, needs)), *(None,) * 9


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        'the tiled lie_attention has no second derivative: use impl="reference", which is dense, for double gradients'
    )


_attend.register_autograd(_backward, setup_context=_setup_context)
_attend_backward.register_autograd(_no_second_derivative)


def tiled_attention(
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    value: Tensor,
    *,
    group: Group,
    chart: str,
    content_query: Tensor | None = None,
    content_key: Tensor | None = None,
    mask: Tensor | None = None,
    outside: str = "error",
    causal: bool = False,
    check: bool = True,
    tangents: bool = False,
    skip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention in tiles.

    Args:
        query: packed poses [B, G, P, N] (``PairGeometry.pack_query``), G of 1 or H.
        key: packed poses [B, G, P, M]; None where the queries are the keys.
        scale: λ/τ, [H, K].
        value: [B, H, M, D], finite also where the mask hides it.
        content_query, content_key, mask, outside, causal, check: as in `lie_attention`.
        tangents: give the mean tangent vectors too; the packing is that of the geometry with tangents then.
        skip: ε, the share of a row's weight that may be left out; for geometries that have positions, without content.

    Returns:
        [B, H, N, D], and [B, H, N, dim] (or of width 0).
    """
    factors = scale.new_tensor(pair_geometry(group, chart, tangents).factors)
    output, tangent, _ = _attend(
        query.contiguous(), None if key is None else key.contiguous(), scale * factors, value.contiguous(),
        content_query, content_key, mask, str(group), chart, outside, causal, check,
        tangents, skip, torch.compiler.is_compiling(),
    )  # fmt: skip
    return output, tangent
