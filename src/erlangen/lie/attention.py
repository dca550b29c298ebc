"""Attention between elements of a matrix Lie group, scored by the logarithm of the relative pose.

The score of pose g_i for pose g_j is −‖log(g_i⁻¹ g_j)‖²_λ / τ: a proximity kernel that moving all poses by one h
leaves as it is, because (h g_i)⁻¹ (h g_j) = g_i⁻¹ g_j (Musialski, "Lie-Algebra Attention", arXiv 2606.20547). What is
not in the paper: the displacement c_h of a head, with which it looks for a pose ahead of it or beside it instead of for
its own; content scores; masks; the polar chart; and what happens outside the chart.

Shape suffixes: B batch, H heads (1 where they share), N queries, M keys, D width of a value, E width of a content key,
K blocks of the algebra, m size of the group's matrices (written twice).
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ._base import Group, outside_message
from ._geometry import ByLogarithm, pair_geometry
from ._operator import tiled_attention
from ._triton import triton_attention

Outside = Literal["error", "mask"]

IMPLEMENTATIONS = ("auto", "reference", "tiled", "triton")


def lie_scores(
    query: Tensor,
    key: Tensor,
    *,
    group: Group,
    block_weights: Tensor,
    temperature: Tensor,
    displacement: Tensor | None = None,
    chart: str = "principal",
    outside: Outside = "error",
    check: bool = True,
) -> Tensor:
    """Dense scores −Σ_b block_weights[h, b] ‖hat(log(c_h⁻¹ q⁻¹ k))_b‖_F² / temperature[h] (arXiv 2606.20547).

    Differentiable, twice, in every argument; finite gradients at coincident poses and at half a turn. The gradient of
    poses is tangent to the group (``Group.project_tangent``): no part of it points at matrices that are no poses.

    Args:
        query: poses [B, N, m, m], or [B, H, N, m, m] for a set of poses a head; float32 or float64, as all others.
        key: poses [B, M, m, m] or [B, H, M, m, m].
        group: the group the poses belong to.
        block_weights: λ, positive [H, len(group.blocks)], in the order of ``group.blocks``.
        temperature: τ, positive [H].
        displacement: c, poses [H, m, m]: head h scores highest where ``key = query @ displacement[h]``.
        chart: "principal", the logarithm; or "polar", which is global on the groups that have it.
        outside: what to do with a relative pose outside the principal chart: "error", or "mask", which gives −inf.
        check: look at the values: are the poses in the group, the weights positive, the pairs in the chart? It waits
            for the device. Never done under ``torch.compile``. Unlooked at, a pair outside the chart scores NaN with
            ``outside="error"``.

    Returns:
        [B, H, N, M].

    Raises:
        ValueError: shapes, dtypes or devices do not fit; λ or τ is not positive; a pose is not in the group; pairs are
            outside the chart and ``outside="error"``.
    """
    inputs = Inputs(query, key, group, block_weights, temperature, displacement, chart, outside, check)
    scores_BHNM, allowed_BHNM = _dense_scores(inputs)
    return scores_BHNM if allowed_BHNM is None else scores_BHNM.masked_fill(~allowed_BHNM, -math.inf)


def lie_weights(
    query: Tensor,
    key: Tensor,
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
) -> Tensor:
    """The attention weights of :func:`lie_attention`, dense.

    Args:
        query, key, group, block_weights, temperature, displacement, chart, outside, check: as in :func:`lie_scores`.
        content_query: [B, H, N, E]; adds ``content_query · content_key / √E`` to the scores.
        content_key: [B, H, M, E].
        causal: query i sees the keys up to i + M − N: the last query sees them all. (SDPA's ``is_causal`` aligns the
            first query with the first key instead; for M = N it is the same.)
        mask: bool [B or 1, H or 1, N or 1, M], true where the query may attend. A key that no query may attend is
            never looked at, so a padded one may hold anything, a NaN too; and so is a query that may attend no key.

    Returns:
        [B, H, N, M]; a row sums to 1, or is zero, with zero gradients, if it may attend nothing.

    Raises:
        ValueError: as :func:`lie_scores`; or mask or content do not fit.
    """
    return dense_weights(
        Inputs(
            query, key, group, block_weights, temperature, displacement, chart, outside, check,
            content_query, content_key, causal, mask,
        )
    )  # fmt: skip


def lie_attention(
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
    skip: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Attention with the scores of :func:`lie_scores`: the output is invariant when one h moves all poses.

    Args:
        query, key, group, block_weights, temperature, displacement, chart, outside, check: as in :func:`lie_scores`.
            Pass one tensor as query and key where they are the same: the scores are symmetric then, which saves time.
        value: payload [B, H, M, D] that does not transform with the poses; see ``values`` for payloads that do.
        content_query, content_key, causal, mask: as in :func:`lie_weights`.
        skip: ε, the share of each query's weight that may be left out, for speed: what is too far away to matter, as
            far as its translation proves. Each output is off by at most ε (max value − min value). For groups with a
            rotation and a translation, or one of them (SE2, SE3, Translation, products), without content, in tiles.
            It pays where poses are spread out further than the heads see; tokens may come in any order.
        impl: "reference" computes the dense scores with plain operations and can be differentiated twice; "tiled" needs
            memory for a few tiles of pairs only and is one operator to ``torch.compile``, inside of which its tiles are
            fused, for groups that have formulas of their own (twice as fast in space); "triton" is the same in
            kernels for CUDA, float32, on SO2, SE2, SO3, SE3 and Translation(n); "auto" is "tiled", save for groups that
            have no formulas of their own there while all pairs are few (at most 512 × 512 a head), and under the
            transforms of ``torch.func``, which only "reference" knows. No explicit choice falls back to another.

    Returns:
        [B, H, N, D]; zero, with zero gradients, for a query that may attend nothing.

    Raises:
        ValueError: as :func:`lie_weights`; or the value does not fit, or there is no such implementation.
        RuntimeError: a second derivative is asked of "tiled" or "triton"; or Triton cannot run here.
    """
    expect_choice("impl", impl, IMPLEMENTATIONS)
    inputs = Inputs(
        query, key, group, block_weights, temperature, displacement, chart, outside, check,
        content_query, content_key, causal, mask,
    )  # fmt: skip
    value = inputs.checked_value(value)
    impl = inputs.chosen(impl)
    if skip:
        _expect_skippable(skip, impl, inputs)
    if impl == "reference":
        return dense_weights(inputs) @ value
    return tiled(inputs, value, skip=skip, triton=impl == "triton")[0]


def morton_order(poses: Tensor, group: Group) -> Tensor:
    """The order of poses along a space-filling curve (Morton's) through their positions: int64 [..., N].

    Neighbours in this order are neighbours in space, for the most part: ``order = morton_order(poses, group)``, then
    ``poses[order]``. ``skip`` of `lie_attention` does not need it: it sorts for itself.

    Args:
        poses: [..., N, m, m].
        group: one whose elements move a point, the origin: not the rotations alone.

    Raises:
        ValueError: the group has no translations.
    """
    if not any(block.split(".")[-1] == "translation" for block in group.blocks):
        raise ValueError(f"{group} has no translations, and so no positions to put into an order")
    points = group.act(poses.detach(), poses.new_zeros(group.point_dim)).double()
    low, high = points.amin(-2, keepdim=True), points.amax(-2, keepdim=True)
    bits = min(16, 62 // group.point_dim)
    cell = ((points - low) / (high - low).amax(-1, keepdim=True).clamp(min=1e-300) * (2**bits - 1)).long()
    code = torch.zeros_like(cell[..., 0])
    for bit in range(bits):
        for axis in range(group.point_dim):
            code |= ((cell[..., axis] >> bit) & 1) << (bit * group.point_dim + axis)
    return code.argsort(-1)


class Inputs:
    """The arguments of a call, seen to be right, with whatever stands where nobody looks made harmless."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        group: Group,
        block_weights: Tensor,
        temperature: Tensor,
        displacement: Tensor | None,
        chart: str,
        outside: Outside,
        check: bool,
        content_query: Tensor | None = None,
        content_key: Tensor | None = None,
        causal: bool = False,
        mask: Tensor | None = None,
    ) -> None:
        expect_choice(f"chart of {group}", chart, group.charts)
        expect_choice("outside", outside, get_args(Outside))
        self.group, self.chart, self.outside, self.causal, self.mask = group, chart, outside, causal, mask
        self.check = check and not torch.compiler.is_compiling()
        expect_shape("block_weights", block_weights, (None, len(group.blocks)), f"[H, blocks of {group}]")
        self.num_heads = block_weights.shape[0]
        check_alike(
            query=query, key=key, block_weights=block_weights, temperature=temperature, displacement=displacement
        )
        expect_shape("temperature", temperature, (self.num_heads,), "[H]")
        expect_displacement(displacement, self.num_heads, group)
        # With a mask the poses that nobody looks at differ, unless it is one of keys, which all queries look past.
        of_keys = mask is None or (mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1 and not causal)
        self.same = query is key and of_keys
        query_BHNmm, key_BHMmm = pose_heads(query, key, group, self.num_heads)
        self.batch, self.num_queries, self.num_keys = len(query), query_BHNmm.shape[2], key_BHMmm.shape[2]
        _expect_mask(mask, (self.batch, self.num_heads, self.num_queries, self.num_keys))
        queries_BHN, keys_BHM = _looked_at(mask, causal, self.num_queries, self.num_keys, query.device)
        self.content = self._content(query, content_query, content_key, queries_BHN, keys_BHM)
        self.query, self.key = (
            _along(replace_poses(query_BHNmm, queries_BHN, group), group),
            _along(replace_poses(key_BHMmm, keys_BHM, group), group),
        )
        self.displacement = None if displacement is None else _along(displacement, group)
        if self.check:
            for name, tensor in (("block_weights", block_weights), ("temperature", temperature)):
                if not ((tensor > 0) & tensor.isfinite()).all():
                    wrong = tensor[~((tensor > 0) & tensor.isfinite())][0].item()
                    raise ValueError(
                        f"{name} must be positive and finite, received {wrong:g}: learn its logarithm and pass the exp"
                    )
            group.check(self.query)
            if not self.same:
                group.check(self.key)
            if displacement is not None:
                group.check(displacement)
        self.scale_HK = block_weights / temperature[:, None]

    def checked_value(self, value: Tensor) -> Tensor:
        """The value, seen to fit, and zero where it stands at a key that nobody attends to."""
        check_alike(query=self.query, value=value)
        expect_shape("value", value, (self.batch, self.num_heads, self.num_keys, None), "[B, H, M, D]")
        # 0 · NaN is NaN: what stands at a padded key must not come in with weight 0
        return value if self.mask is None else value.masked_fill(~self.mask.any(-2)[..., None], 0.0)

    def chosen(self, impl: str, tangents: bool = False) -> str:
        """The implementation that "auto" stands for, or the one that was asked for."""
        if impl != "auto":
            return impl
        if torch.compiler.is_compiling():
            return "tiled"
        # torch.func (grad, vmap, ...) takes plain operations only, no operator of a library (torch 2.13)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "reference"
        few = self.num_queries * self.num_keys <= 512**2
        slow = tangents or not pair_geometry(self.group, self.chart).is_fast
        return "reference" if few and slow else "tiled"

    def _content(
        self,
        query: Tensor,
        content_query: Tensor | None,
        content_key: Tensor | None,
        queries_BHN: Tensor | None,
        keys_BHM: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        if content_query is None and content_key is None:
            return None
        if content_query is None or content_key is None:
            missing = "content_query" if content_query is None else "content_key"
            raise ValueError(f"a content score needs content_query and content_key, received no {missing}: give both")
        check_alike(query=query, content_query=content_query, content_key=content_key)
        shape = (self.batch, self.num_heads, self.num_queries, None)
        expect_shape("content_query", content_query, shape, "[B, H, N, E]")
        width = content_query.shape[-1]
        expect_shape("content_key", content_key, (*shape[:2], self.num_keys, width), "[B, H, M, E]")
        if queries_BHN is not None:
            content_query = content_query.masked_fill(~queries_BHN[..., None], 0.0)
        if keys_BHM is not None:
            content_key = content_key.masked_fill(~keys_BHM[..., None], 0.0)
        return content_query, content_key


def _expect_skippable(skip: float, impl: str, inputs: Inputs) -> None:
    group = inputs.group
    if not 0 <= skip < 1:
        raise ValueError(f"skip must be a share of at least 0 and below 1, received {skip:g}")
    if inputs.content is not None:
        raise ValueError("content scores have no bound, so nothing can be skipped: pass skip=0, or no content")
    if impl != "tiled":
        raise ValueError('only tiles can be skipped: pass impl="tiled", or skip=0')
    pairs = pair_geometry(group, inputs.chart)
    if not pairs.is_fast or "translation" not in " ".join(group.blocks):
        raise ValueError(
            f"{group} has no bound of its scores by translations: pass skip=0; SE2, SE3, Translation(n) and products "
            "of these and rotations have one"
        )


def tiled(
    inputs: Inputs, value: Tensor, tangents: bool = False, skip: float = 0.0, triton: bool = False
) -> tuple[Tensor, Tensor]:
    """Output [B, H, N, D], and mean tangent vectors [B, H, N, dim] if they are asked for (Triton has none)."""
    pairs = pair_geometry(inputs.group, inputs.chart, tangents)
    with torch.autocast(value.device.type, enabled=False):
        query = pairs.pack_query(inputs.query, inputs.displacement)
        key = None
        if not inputs.same or inputs.displacement is not None:
            key = pairs.pack_key(inputs.key)
            heads = max(query.shape[1], key.shape[1])
            query, key = query.expand(-1, heads, -1, -1), key.expand(-1, heads, -1, -1)
        content_query, content_key = inputs.content or (None, None)
        if triton:
            output = triton_attention(
                query,
                key,
                inputs.scale_HK,
                value,
                group=inputs.group,
                chart=inputs.chart,
                content_query=content_query,
                content_key=content_key,
                mask=inputs.mask,
                causal=inputs.causal,
            )
            return output, output.new_empty(0)
        output, tangent = tiled_attention(
            query,
            key,
            inputs.scale_HK,
            value,
            group=inputs.group,
            chart=inputs.chart,
            content_query=content_query,
            content_key=content_key,
            mask=inputs.mask,
            outside=inputs.outside,
            causal=inputs.causal,
            check=inputs.check,
            tangents=tangents,
            skip=skip,
        )
        if isinstance(pairs, ByLogarithm) and tangents:
            tangent = pairs.in_body(tangent, inputs.query, inputs.displacement)
        return output, tangent


def dense_weights(inputs: Inputs) -> Tensor:
    """The attention weights [B, H, N, M]."""
    scores_BHNM, allowed_BHNM = _dense_scores(inputs)
    if inputs.content is not None:
        content_query, content_key = inputs.content
        scores_BHNM = scores_BHNM + content_query @ content_key.mT / math.sqrt(content_query.shape[-1])
    if allowed_BHNM is None:
        return scores_BHNM.softmax(dim=-1)
    # A row of −inf only would give NaN: it keeps its finite scores in the softmax and loses its weights after it.
    empty_BHN1 = ~allowed_BHNM.any(-1, keepdim=True)
    scores_BHNM = scores_BHNM.masked_fill(~(allowed_BHNM | empty_BHN1), -math.inf)
    return scores_BHNM.softmax(dim=-1).masked_fill(empty_BHN1, 0.0)


def _dense_scores(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Scores [B, H, N, M], 0 for the pairs that are not allowed; and the pairs that are, None for all."""
    group, chart, scale_HK = inputs.group, inputs.chart, inputs.scale_HK
    allowed_BHNM = _allowed(inputs.mask, inputs.causal, inputs.num_queries, inputs.num_keys, scale_HK.device)
    with torch.autocast(scale_HK.device.type, enabled=False):  # low precision would lose the small rotations
        relative_BHNMmm = relative_poses(inputs.query, inputs.key, group, inputs.displacement)
        inside_BHNM = group.in_chart(relative_BHNMmm, chart=chart)
        invalid_BHNM = None
        if inputs.outside == "mask":
            allowed_BHNM = inside_BHNM if allowed_BHNM is None else allowed_BHNM & inside_BHNM
        elif inputs.check:
            expect_inside(inside_BHNM, allowed_BHNM, group, chart, 'outside="mask" to leave them out')
        else:
            invalid_BHNM = ~inside_BHNM if allowed_BHNM is None else ~inside_BHNM & allowed_BHNM
        relative_BHNMmm = replace_poses(relative_BHNMmm, allowed_BHNM, group)
        norms_BHNMK = group.log_block_norms(relative_BHNMmm, chart=chart, check=False)
        # One product a block, not a matrix product, whose precision (TF32) is the user's to lower.
        terms = (norms_BHNMK[..., k] * scale_HK[:, None, None, k] for k in range(scale_HK.shape[1]))
        scores_BHNM = -sum(terms, start=norms_BHNMK.new_zeros(()))
        if invalid_BHNM is not None:
            scores_BHNM = scores_BHNM.masked_fill(invalid_BHNM, math.nan)
    return scores_BHNM, allowed_BHNM


class _TangentGradient(torch.autograd.Function):
    """The identity on poses, whose gradient is brought to the tangent space of the group."""

    generate_vmap_rule = True

    @staticmethod
    def forward(poses: Tensor, group: Group) -> Tensor:
        return poses.view_as(poses)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Group], output: Tensor) -> None:
        poses, ctx.group = inputs
        ctx.save_for_backward(poses)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        (poses,) = ctx.saved_tensors
        return ctx.group.project_tangent(poses, grads[0]), None


def _along(poses: Tensor, group: Group) -> Tensor:
    return _TangentGradient.apply(poses, group) if poses.requires_grad else poses


def _looked_at(
    mask: Tensor | None, causal: bool, num_queries: int, num_keys: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Which queries may attend something, bool [B or 1, H or 1, N or 1], and which keys are attended; None for all."""
    shift = num_keys - num_queries
    if mask is None:
        queries = torch.arange(num_queries, device=device)[None, None] + shift >= 0 if causal and shift < 0 else None
        return queries, None
    if causal and mask.shape[2] == num_queries:
        mask = mask & _past(num_queries, num_keys, mask.device)
    elif causal:
        last = torch.arange(num_queries, device=device) + shift
        some = mask[:, :, 0].cummax(-1).values[..., last.clamp(min=0)]
        return some & (last >= 0), mask.any(-2)
    return mask.any(-1), mask.any(-2)


def _past(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def _expect_mask(mask: Tensor | None, full: tuple[int, int, int, int]) -> None:
    if mask is None:
        return
    fits = mask.ndim == 4 and all(a in (1, b) for a, b in zip(mask.shape, full)) and mask.shape[-1] == full[-1]
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"mask must be bool [B or 1, H or 1, N or 1, M] for [B, H, N, M] = {list(full)}, received "
            f"{mask.dtype} {list(mask.shape)}: true is where a query may attend; a padding mask [B, M] is "
            "mask[:, None, None, :]"
        )


def _allowed(mask: Tensor | None, causal: bool, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
    """Which pairs may attend, bool [B or 1, H or 1, N or 1, M]; None for all."""
    if not causal:
        return mask
    past_NM = _past(num_queries, num_keys, device)
    return past_NM[None, None] if mask is None else mask & past_NM


def pose_heads(query: Tensor, key: Tensor, group: Group, num_heads: int) -> tuple[Tensor, Tensor]:
    """Query and key poses with an axis of heads, of length 1 where the heads share them.

    Raises:
        ValueError: they are not poses of this group, or of another batch or number of heads.
    """
    m, poses = group.matrix_size, []
    for name, pose in (("query", query), ("key", key)):
        if pose.ndim not in (4, 5) or pose.shape[-2:] != (m, m):
            raise ValueError(
                f"{name} must hold matrices of {group}: [B, N, {m}, {m}] or [B, H, N, {m}, {m}], received "
                f"{list(pose.shape)}: pass the group the poses belong to"
            )
        pose = pose[:, None] if pose.ndim == 4 else pose
        if pose.shape[0] != query.shape[0] or pose.shape[1] not in (1, num_heads):
            raise ValueError(
                f"{name} must have the batch of the query and one set of poses or one a head: batch {query.shape[0]} "
                f"and 1 or {num_heads} heads, received {list(pose.shape[:2])}: expand it"
            )
        poses.append(pose)
    return poses[0], poses[1]


def relative_poses(
    query_BHNmm: Tensor, key_BHMmm: Tensor, group: Group, displacement_Hmm: Tensor | None = None
) -> Tensor:
    """c_h⁻¹ q⁻¹ k for all pairs: [B, H, N, M, m, m], H of 1 where nothing differs between heads."""
    relative_BHNMmm = group.relative(query_BHNmm[:, :, :, None], key_BHMmm[:, :, None])
    if displacement_Hmm is None:
        return relative_BHNMmm
    return group.compose(group.inverse(displacement_Hmm)[:, None, None], relative_BHNMmm)


def replace_poses(poses: Tensor, keep: Tensor | None, group: Group) -> Tensor:
    """Poses [B, H or 1, ..., m, m] with the identity where ``keep`` [B or 1, H or 1, ...] is false for each head.

    Before the logarithm, not after it: a gradient of zero times an infinite slope would be NaN.
    """
    if keep is None:
        return poses
    if poses.shape[1] == 1:
        keep = keep.any(1, keepdim=True)
    return torch.where(keep[..., None, None], poses, group.identity(dtype=poses.dtype, device=poses.device))


def expect_displacement(displacement: Tensor | None, num_heads: int, group: Group) -> None:
    """Raise a ValueError unless the displacement is None or holds a matrix a head."""
    if displacement is not None:
        m = group.matrix_size
        expect_shape("displacement", displacement, (num_heads, m, m), "[H, m, m]")


def expect_inside(inside: Tensor, looked_at: Tensor | None, group: Group, chart: str, advice: str) -> None:
    """Raise a ValueError that counts the pairs, among those looked at, outside the chart."""
    wrong = ~inside if looked_at is None else ~inside & looked_at
    count = int(wrong.sum())
    if count:
        total = wrong.numel() if looked_at is None else int(looked_at.expand_as(wrong).sum())
        raise ValueError(outside_message(count, total, group, chart, advice))


def check_alike(**tensors: Tensor | None) -> None:
    """Raise a ValueError unless all tensors are float32, or all float64, on one device."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    kinds = {(tensor.dtype, tensor.device) for tensor in given.values()}
    if len(kinds) > 1 or next(iter(kinds))[0] not in (torch.float32, torch.float64):
        received = ", ".join(f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in given.items())
        raise ValueError(
            f"all tensors must be float32, or all float64, and on one device, received {received}: convert with .to()"
        )


def expect_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """Raise a ValueError unless the tensor has this shape; None fits any length."""
    if tensor.ndim != len(shape) or any(b is not None and a != b for a, b in zip(tensor.shape, shape)):
        wanted = ", ".join("any" if b is None else str(b) for b in shape)
        raise ValueError(f"{name} must have shape {meaning} = [{wanted}], received {list(tensor.shape)}")


def expect_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise a ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, received {value!r}")
