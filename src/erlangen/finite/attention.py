"""Attention that is exactly equivariant under a finite group of permutations of its positions.

An element h moves features as X -> P_h X B_hᵀ: rows by its permutation, channels by C copies of the regular
representation, kept in the Fourier basis (`Representation.regular`). Three things make softmax attention commute with
that:

- the projections to q, k, v and back intertwine: they are `EquivariantLinear`;
- a group that moves the heads as well moves their position biases with them, so that a bias need not be symmetric.
  In the group basis, where a channel is a function on the group, the value at g belongs to a head (a, g) that sees
  position i as g sees it: its bias is b_a[σ_g⁻¹ i, σ_g⁻¹ j], with one free table b_a for all g;
- rotary positions turn by s(g) θ at g, where s(g) = −1 if g reverses the order of positions. Said otherwise: each
  rotary plane carries diag(1, s(h)), one even and one odd channel.

Shape suffixes: B batch, N positions, C copies of the regular representation, G order of the group, H heads,
A orbits of heads or parts of the channels (C = A R), R copies in one of them, D width of a head.
"""

import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .groups import Element, PermutationGroup
from .irreps import Representation
from .linear import EquivariantLinear, EquivariantMLP, EquivariantNorm, GroupBasis

Position = Literal["bias", "relative", "rotary", "none"]

MAX_BIAS_SCORES = 2**27
"""Largest num_heads · N² for which a free bias is built: half a gigabyte of float32."""

ROTARY_BASE = 10_000.0


class Line(NamedTuple):
    """How a group acts on positions that lie on a line or a ring: i -> b + s i."""

    signs: np.ndarray
    """int64 [G], s of each element: 1, or -1 where it reverses the order."""
    wraps: bool
    """Whether positions are counted modulo N."""


def acts_on_line(group: PermutationGroup) -> Line | None:
    """Signs of the elements if each acts on positions as i -> b + s i with s = ±1, or so modulo N; otherwise None.

    Without wrapping such a group is trivial or a reversal; with it, a group of rotations and reflections of a ring.
    What the group does to letters is free.
    """
    num_positions = group.degree
    if num_positions == 1:
        return Line(np.ones(group.order, dtype=np.int64), False)
    generators = np.array([element.positions for element in group.generators], dtype=np.int64)
    steps = np.diff(generators, axis=1)
    alike = steps == steps[:, :1]
    if not alike.all():
        steps = (steps + 1) % num_positions - 1  # -1, 0, ..., N - 2
        alike = steps == steps[:, :1]
        if not (alike.all() and np.isin(steps[:, 0], (-1, 1)).all()):
            return None
        wraps = True
    else:
        wraps = False
    first, second = (group.positions[:, i] for i in (0, 1))
    forward = (second - first) % num_positions == 1 if wraps else second > first
    return Line(np.where(forward, 1, -1), wraps)


class EquivariantAttention(nn.Module):
    """Multi-head self-attention, exactly equivariant under X -> P_h X B_hᵀ; the output moves as the input does.

    One softmax over positions, through `torch.nn.functional.scaled_dot_product_attention`. How the group acts on heads
    follows from their number:

    - num_heads a multiple of the order |G|: the group permutes the heads, h takes head (a, g) to (a, hg), numbered
      a |G| + g. Biases and rotary positions keep their direction. Also taken if both are possible.
    - otherwise head_dim = dim / num_heads a multiple of |G|: each head carries a whole representation and stays where
      it is. A bias is then the same on all pairs of positions that the group takes to each other
      (`PermutationGroup.orbitals`), so that it cannot tell the group from its 2-closure: where that is larger, a
      warning says so.

    Positions:

    - ``"bias"``: a free table of N × N numbers an orbit of heads, or one number an orbital and head. Any group.
    - ``"relative"``: a table by j − i, with its sign (modulo N where the group wraps); of whole heads by |j − i| if
      the group reverses. Only for groups whose elements act on positions as i -> b ± i, without wrapping (reversal,
      reverse complement) or modulo N (cyclic, dihedral).
    - ``"rotary"``: for the same groups. Planes are pairs of copies: an even number of copies a head, which means an
      even head_dim if the group permutes the heads, and a multiple of 2 |G| if it does not. Frequencies are those of
      RoPE (arXiv 2104.09864) on a line, and multiples of 2π / N on a ring.
    - ``"none"``: all positions are alike; the layer is equivariant under every permutation of them.

    For long windows take "rotary": the bias kinds hold num_heads · N² scores at once.

    Args:
        group: acts on the N = group.degree positions.
        dim: width of the features, a multiple of |G|: C = dim / |G| copies of the regular representation.
        num_heads: heads, see above; dim must be a multiple of it.
        position: see above.
        generator: of the initial weights; biases of positions are N(0, 0.02²). None: torch's global one.

    Attributes:
        permutes_heads: whether the group permutes the heads.
        representation: of the channels, of input and output.

    Raises:
        ValueError: dim, num_heads, group and position do not fit together.
    """

    def __init__(
        self,
        group: PermutationGroup,
        dim: int,
        num_heads: int,
        *,
        position: Position = "bias",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        copies = expect_dim(group, dim)
        if position not in get_args(Position):
            raise ValueError(f"position must be one of {', '.join(get_args(Position))}, received {position!r}")
        order, num_positions = group.order, group.degree
        if num_heads < 1 or dim % num_heads or (num_heads % order and dim // num_heads % order):
            raise ValueError(
                f"the group of order {order} needs num_heads a multiple of {order} that divides dim (it permutes the "
                f"heads), or dim / num_heads a multiple of {order} (each head carries a whole representation); "
                f"received dim {dim} and {num_heads} heads, of width {_ratio(dim, num_heads)}"
            )
        self.group, self.dim, self.num_heads, self.position = group, dim, num_heads, position
        self.head_dim = dim // num_heads
        self.permutes_heads = num_heads % order == 0
        self.representation = Representation.regular(group, copies)
        self._num_parts = num_heads // order if self.permutes_heads else num_heads
        part_copies = copies // self._num_parts

        line = acts_on_line(group) if position in ("relative", "rotary") else None
        if line is None and position in ("relative", "rotary"):
            raise ValueError(
                f"position={position!r} needs a group whose elements all act on positions as i -> b + i or b - i, on a "
                f"line (reversal, reverse complement) or modulo N (cyclic, dihedral); {group} does not: use "
                "position='bias', for any group, or 'none'"
            )
        if position == "bias" and num_heads * num_positions**2 > MAX_BIAS_SCORES:
            raise ValueError(
                f"position='bias' holds num_heads · N² = {num_heads} · {num_positions}² numbers, above the limit of "
                f"{MAX_BIAS_SCORES}: use position='rotary' (or 'relative') for long windows"
            )
        if position == "rotary" and part_copies % 2:
            multiple, heads = (2, "permuted heads") if self.permutes_heads else (2 * order, "whole heads")
            raise ValueError(
                f"position='rotary' pairs copies into planes: with {heads} of {group}, head_dim must be a multiple of "
                f"{multiple}, received {self.head_dim} (dim {dim}, {num_heads} heads)"
            )

        self.qkv = EquivariantLinear(group, dim, 3 * dim, generator=generator)
        self.output = EquivariantLinear(group, dim, dim, generator=generator)
        self.group_basis = GroupBasis(group)

        self._line = line
        if line is not None:
            self.register_buffer("_signs", torch.from_numpy(line.signs), persistent=False)
        self.bias = None
        if position == "bias" and self.permutes_heads:
            self.bias = nn.Parameter(torch.empty(self._num_parts, num_positions, num_positions))
            self.register_buffer("_moved_back", _moved_back(group), persistent=False)
        elif position == "bias":
            group.check_two_closed()
            labels = group.orbitals()
            self.bias = nn.Parameter(torch.empty(num_heads, int(labels.max()) + 1))
            self.register_buffer("_labels", torch.from_numpy(labels.astype(np.int64)), persistent=False)
        elif position == "relative" and line is not None:
            # What is free of a displacement j - i in -(N - 1) ... N - 1, numbered from 0.
            displacement = np.arange(1 - num_positions, num_positions)
            if line.wraps:
                displacement %= num_positions
            if not self.permutes_heads and (line.signs < 0).any():
                displacement = np.minimum(displacement, num_positions - displacement) if line.wraps else displacement
                displacement = np.abs(displacement)
            labels = displacement - displacement.min()
            self.bias = nn.Parameter(torch.empty(self._num_parts, int(labels.max()) + 1))
            self.register_buffer("_labels", torch.from_numpy(labels), persistent=False)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights again."""
        self.qkv.reset_parameters(generator)
        self.output.reset_parameters(generator)
        if self.bias is not None:
            self.bias.normal_(0.0, 0.02, generator=generator)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the positions receive; no residual is added.

        Args:
            x: [B, N, dim], channels in the Fourier basis.
            mask: bool [B, N], false at padding, which may hold anything; or bool [B or 1, H or 1, N or 1, N], true
                where row i may attend to column j. None for all. The layer is equivariant if the group moves x and
                mask together, see `act_in`; a row that may attend to nothing receives nothing but biases.

        Returns:
            [B, N, dim], zero at padding.

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        expect_features(x, self.group, self.dim)
        allowed = None if mask is None else broadcast_mask(mask, x, self.num_heads)
        padding = None if mask is None or mask.ndim != 2 else ~mask[..., None]
        if padding is not None:
            x = x.masked_fill(padding, 0.0)
        qkv_BNCG = self.group_basis.to_group(self.qkv(x))
        q, k, v = qkv_BNCG.unflatten(2, (3, self._num_parts, -1)).unbind(2)  # each [B, N, A, R, G]
        if self.position == "rotary":
            q, k = self._turn(q), self._turn(k)
        scores, alone = self.position_bias(), None
        if allowed is not None:
            # Not every kernel gives zero to a row that may attend to nothing.
            alone = ~allowed.any(-1, keepdim=True)
            allowed = allowed | alone
        if scores is not None:
            scores = scores.to(q.dtype)[None]
            scores = scores if allowed is None else scores.masked_fill(~allowed, -math.inf)
        mixed = F.scaled_dot_product_attention(
            self._to_heads(q), self._to_heads(k), self._to_heads(v), attn_mask=allowed if scores is None else scores
        )
        if alone is not None:
            mixed = mixed.masked_fill(alone, 0.0)
        y = self.output(self.group_basis.to_fourier(self._from_heads(mixed)))
        return y if padding is None else y.masked_fill(padding, 0.0)

    def position_bias(self) -> Tensor | None:
        """What positions add to the scores, [H, N, N] (rows attend to columns); None for "rotary" and "none"."""
        if self.bias is None:
            return None
        if self.position == "relative":
            num_positions = self.group.degree
            # Row i of a window of the displacements starts at that of 0 - i, so windows are taken from the last.
            forward_ANN = self.bias[:, self._labels].unfold(-1, num_positions, 1).flip(-2)
            if not self.permutes_heads:
                return forward_ANN
            both = torch.stack([forward_ANN.mT, forward_ANN], dim=1)  # j - i and i - j change places
            return both[:, (self._signs + 1) // 2].flatten(0, 1)
        if self.permutes_heads:
            rows, columns = self._moved_back[:, :, None], self._moved_back[:, None, :]
            return self.bias[:, rows, columns].flatten(0, 1)
        return self.bias[:, self._labels]

    def act_in(self, element: Element | int, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The input moved by an element: P_h x B_hᵀ, and the mask by `act_on_mask` where there is one."""
        moved = self.act_out(element, x)
        return moved if mask is None else (moved, self.act_on_mask(element, mask))

    def act_out(self, element: Element | int, y: Tensor) -> Tensor:
        """The output moved by an element: P_h y B_hᵀ."""
        return act_on_features(self.representation, element, y)

    def act_on_mask(self, element: Element | int, mask: Tensor) -> Tensor:
        """A mask moved by an element: its positions, and its heads if the group permutes them."""
        mask = move_mask(self.group, element, mask)
        if mask.ndim == 4 and mask.shape[1] > 1 and self.permutes_heads:
            order = self.group.order
            number = self.group.number(element) if isinstance(element, tuple) else element
            images = self.group.multiply(number, np.arange(order))  # a head at g goes to hg
            sources = torch.from_numpy(np.argsort(images)).to(mask.device)
            mask = mask.unflatten(1, (-1, order)).index_select(2, sources).flatten(1, 2)
        return mask

    def extra_repr(self) -> str:
        heads = "permuted" if self.permutes_heads else "whole"
        return f"{self.group}, dim={self.dim}, num_heads={self.num_heads} ({heads}), position={self.position!r}"

    def _turn(self, x_BNARG: Tensor) -> Tensor:
        """Rotary positions: copies r and r + R/2 of a part are the two axes of a plane, turned by s(g) θ_r i at g."""
        line = self._line
        assert line is not None
        num_positions, num_planes = x_BNARG.shape[1], x_BNARG.shape[3] // 2
        dtype = torch.promote_types(x_BNARG.dtype, torch.float32)
        place = torch.arange(num_positions, device=x_BNARG.device)
        plane = torch.arange(num_planes, device=x_BNARG.device)
        if line.wraps:
            # Whole turns a ring, from 1 to N // 2 in equal steps; counted in integers, so that a ring closes exactly.
            turns = 1 + plane * (num_positions // 2 - 1) // max(num_planes - 1, 1)
            angle_NR = (place[:, None] * turns % num_positions).to(dtype) * (2 * math.pi / num_positions)
        else:
            # From the middle, where reversal is a change of sign without rounding.
            frequency = torch.exp(plane.to(dtype) * (-math.log(ROTARY_BASE) / num_planes))
            angle_NR = (place.to(dtype) - (num_positions - 1) / 2)[:, None] * frequency
        cos = angle_NR.cos()[:, None, :, None].to(x_BNARG.dtype)
        sin = (angle_NR.sin()[:, None, :, None] * self._signs).to(x_BNARG.dtype)
        first, second = x_BNARG.chunk(2, dim=3)
        return torch.cat([cos * first - sin * second, sin * first + cos * second], dim=3)

    def _to_heads(self, x_BNARG: Tensor) -> Tensor:
        """[B, N, A, R, G] -> [B, H, N, D]."""
        if self.permutes_heads:
            return x_BNARG.permute(0, 2, 4, 1, 3).flatten(1, 2)
        return x_BNARG.transpose(1, 2).flatten(3)

    def _from_heads(self, x_BHND: Tensor) -> Tensor:
        """[B, H, N, D] -> [B, N, C, G], the inverse of `_to_heads`."""
        if self.permutes_heads:
            return x_BHND.unflatten(1, (-1, self.group.order)).permute(0, 3, 1, 4, 2).flatten(2, 3)
        return x_BHND.unflatten(3, (-1, self.group.order)).transpose(1, 2).flatten(2, 3)


class EquivariantBlock(nn.Module):
    """One pre-norm block, x + attention(norm(x)) and then x + MLP(norm(x)), exactly equivariant.

    Args:
        group, dim, num_heads, position: as in `EquivariantAttention`.
        hidden_dim: hidden width of the MLP, a multiple of the group's order; None for 4 dim.
        generator: of the initial weights. None: torch's global one.

    Raises:
        ValueError: as `EquivariantAttention`, or hidden_dim is no multiple of the order.
    """

    def __init__(
        self,
        group: PermutationGroup,
        dim: int,
        num_heads: int,
        *,
        position: Position = "bias",
        hidden_dim: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        expect_dim(group, hidden_dim, "hidden_dim")
        self.group, self.dim = group, dim
        self.attention = EquivariantAttention(group, dim, num_heads, position=position, generator=generator)
        self.attention_norm = EquivariantNorm(self.attention.representation)
        self.mlp_norm = EquivariantNorm(self.attention.representation)
        self.mlp = EquivariantMLP(group, dim, hidden_dim, generator=generator)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features after the block, [B, N, dim]; arguments and errors as in `EquivariantAttention.forward`.

        Padding in a mask [B, N] may hold anything on the way in and is zero on the way out.
        """
        expect_features(x, self.group, self.dim)
        padding = None
        if mask is not None and mask.ndim == 2:
            expect_padding(mask, x)
            padding = ~mask[..., None]
            x = x.masked_fill(padding, 0.0)
        x = x + self.attention(self.attention_norm(x), mask)
        x = x + self.mlp(self.mlp_norm(x))
        return x if padding is None else x.masked_fill(padding, 0.0)

    def act_in(self, element: Element | int, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The input moved by an element, as in `EquivariantAttention`."""
        return self.attention.act_in(element, x, mask)

    def act_out(self, element: Element | int, y: Tensor) -> Tensor:
        """The output moved by an element, P_h y B_hᵀ."""
        return self.attention.act_out(element, y)

    def act_on_mask(self, element: Element | int, mask: Tensor) -> Tensor:
        """A mask moved by an element, as in `EquivariantAttention`."""
        return self.attention.act_on_mask(element, mask)


class EquivariantPool(nn.Module):
    """Attention pooling over positions that keeps the channels' representation: pool(P_h X B_hᵀ) = pool(X) B_hᵀ.

    The scores are a linear map of the features into the regular representation: h takes head (a, g) to (a, hg). To
    them comes a free preference for positions, which head (a, g) sees as g does: b_a[σ_g⁻¹ i]. So a pool may look at
    the start of a reversed window with one head, and at its end with the head's mirror image.

    Args:
        group: acts on the N = group.degree positions.
        dim: width of the features, a multiple of num_heads.
        num_heads: heads, a multiple of the group's order; None for the order.
        generator: of the initial weights. None: torch's global one.

    Raises:
        ValueError: dim, num_heads and group do not fit together.
    """

    def __init__(
        self,
        group: PermutationGroup,
        dim: int,
        num_heads: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        copies = expect_dim(group, dim)
        order = group.order
        num_heads = order if num_heads is None else num_heads
        if num_heads < 1 or num_heads % order or dim % num_heads:
            raise ValueError(
                f"num_heads must be a multiple of the group's order {order} that divides dim {dim}, "
                f"received {num_heads}"
            )
        if num_heads * group.degree > MAX_BIAS_SCORES:
            raise ValueError(
                f"the pool holds num_heads · N = {num_heads} · {group.degree} scores, above the limit of "
                f"{MAX_BIAS_SCORES}: use fewer heads, or a smaller group"
            )
        self.group, self.dim, self.num_heads = group, dim, num_heads
        self.representation = Representation.regular(group, copies)
        num_parts = num_heads // order
        self.score = EquivariantLinear(group, dim, num_heads, generator=generator)
        self.value = EquivariantLinear(group, dim, dim, generator=generator)
        self.output = EquivariantLinear(group, dim, dim, generator=generator)
        self.group_basis = GroupBasis(group)
        self.bias = nn.Parameter(torch.empty(num_parts, group.degree))
        self.register_buffer("_moved_back", _moved_back(group), persistent=False)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights again."""
        for layer in (self.score, self.value, self.output):
            layer.reset_parameters(generator)
        self.bias.normal_(0.0, 0.02, generator=generator)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The pooled features.

        Args:
            x: [B, N, dim], channels in the Fourier basis.
            mask: bool [B, N], false at padding, which may hold anything; None for none. It moves with x.

        Returns:
            [B, dim], channels in the Fourier basis. Without any position to pool, the values are zero.

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        expect_features(x, self.group, self.dim)
        if mask is not None:
            expect_padding(mask, x)
            x = x.masked_fill(~mask[..., None], 0.0)
        bias_NAG = self.bias[:, self._moved_back].permute(2, 0, 1)
        score_BNAG = self.group_basis.to_group(self.score(x))
        score_BNAG = score_BNAG + bias_NAG.to(score_BNAG.dtype)
        if mask is not None:
            score_BNAG = score_BNAG.masked_fill(~mask[..., None, None], torch.finfo(score_BNAG.dtype).min)
        weight_BNAG = score_BNAG.softmax(1)
        if mask is not None:
            weight_BNAG = weight_BNAG * mask[..., None, None]
        value_BNCG = self.group_basis.to_group(self.value(x))
        value_BNARG = value_BNCG.unflatten(2, (self.num_heads // self.group.order, -1))
        pooled_BARG = torch.einsum("bnag,bnarg->barg", weight_BNAG.to(value_BNARG.dtype), value_BNARG)
        return self.output(self.group_basis.to_fourier(pooled_BARG.flatten(1, 2)))

    def act_in(self, element: Element | int, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The input moved by an element: P_h x B_hᵀ, and the mask's positions where there is one."""
        moved = act_on_features(self.representation, element, x)
        return moved if mask is None else (moved, self.act_on_mask(element, mask))

    def act_out(self, element: Element | int, y: Tensor) -> Tensor:
        """The output moved by an element: y B_hᵀ."""
        return self.representation.act(element, y)

    def act_on_mask(self, element: Element | int, mask: Tensor) -> Tensor:
        """A mask moved by an element."""
        return move_mask(self.group, element, mask)

    def extra_repr(self) -> str:
        return f"{self.group}, dim={self.dim}, num_heads={self.num_heads}"


class InvariantPool(nn.Module):
    """Attention pooling to features that the group leaves alone: pool(P_h X B_hᵀ) = pool(X).

    An `EquivariantPool`, then GELU on its values at each element of the group and their mean over the group, then a
    linear map. The nonlinearity comes before the mean because a mean alone would keep nothing but the trivial channels.

    Args:
        group, dim, num_heads: as in `EquivariantPool`.
        out_dim: width of the output, any; None for the number of copies dim / |G|.
        generator: of the initial weights. None: torch's global one.

    Raises:
        ValueError: as in `EquivariantPool`, or out_dim is below 1.
    """

    def __init__(
        self,
        group: PermutationGroup,
        dim: int,
        out_dim: int | None = None,
        num_heads: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        copies = expect_dim(group, dim)
        out_dim = copies if out_dim is None else out_dim
        if out_dim < 1:
            raise ValueError(f"out_dim must be at least 1, received {out_dim}")
        self.group, self.dim = group, dim
        self.pool = EquivariantPool(group, dim, num_heads, generator=generator)
        self.output = nn.Linear(copies, out_dim)
        with torch.no_grad():
            for parameter in self.output.parameters():
                parameter.uniform_(-(copies**-0.5), copies**-0.5, generator=generator)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, dim] -> [B, out_dim]; arguments and errors as in `EquivariantPool.forward`."""
        pooled_BCG = self.pool.group_basis.to_group(self.pool(x, mask))
        return self.output(F.gelu(pooled_BCG).mean(-1))

    def act_in(self, element: Element | int, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The input moved by an element: P_h x B_hᵀ, and the mask's positions where there is one."""
        return self.pool.act_in(element, x, mask)

    def act_out(self, element: Element | int, y: Tensor) -> Tensor:
        """The output itself, whatever the element."""
        return y


# --- shared -----------------------------------------------------------------------------------------------------------


def act_on_features(representation: Representation, element: Element | int, x: Tensor) -> Tensor:
    """P_h x B_hᵀ: rows permuted, channels moved by the representation."""
    return representation.group.permute(element, representation.act(element, x), dim=-2)


def move_mask(group: PermutationGroup, element: Element | int, mask: Tensor) -> Tensor:
    """A mask [B, N], or one whose last two axes are rows (or 1) and columns, with its positions permuted."""
    if mask.ndim > 2 and mask.shape[-2] > 1:
        mask = group.permute(element, mask, dim=-2)
    return group.permute(element, mask, dim=-1)


def expect_dim(group: PermutationGroup, dim: int, name: str = "dim") -> int:
    """The number of copies of the regular representation that make up dim."""
    if dim < 1 or dim % group.order:
        raise ValueError(
            f"{name} must be a multiple of the group's order, so that channels carry copies of its regular "
            f"representation: received {dim} for {group} of order {group.order}"
        )
    return dim // group.order


def expect_features(x: Tensor, group: PermutationGroup, dim: int) -> None:
    if x.ndim != 3 or tuple(x.shape[1:]) != (group.degree, dim) or not x.is_floating_point():
        raise ValueError(
            f"features must be floating [B, N, dim] with N = {group.degree} positions of the group and dim = {dim}, "
            f"received {list(x.shape)} of {x.dtype}"
        )


def expect_padding(mask: Tensor, x: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise ValueError(
            f"the mask of padding must be bool [B, N] = {list(x.shape[:2])}, true where there is a token, received "
            f"{list(mask.shape)} of {mask.dtype}"
        )


def broadcast_mask(mask: Tensor, x: Tensor, num_heads: int) -> Tensor:
    """A mask of padding [B, N] or of pairs [B or 1, H or 1, N or 1, N] as the latter, validated."""
    if mask.ndim == 2:
        expect_padding(mask, x)
        return mask[:, None, None, :]
    batch, num_positions = x.shape[:2]
    allowed = ((1, batch), (1, num_heads), (1, num_positions), (num_positions,))
    if mask.dtype != torch.bool or mask.ndim != 4 or any(size not in ok for size, ok in zip(mask.shape, allowed)):
        raise ValueError(
            f"mask must be bool, [B, N] = [{batch}, {num_positions}] (padding) or [B or 1, H or 1, N or 1, N] with "
            f"B = {batch}, H = {num_heads}, N = {num_positions}, received {list(mask.shape)} of {mask.dtype}"
        )
    return mask


def _moved_back(group: PermutationGroup) -> Tensor:
    """int64 [G, N]: σ_g⁻¹ i."""
    return torch.from_numpy(np.argsort(group.positions, axis=1))


def _ratio(dim: int, num_heads: int) -> str:
    return f"{dim} / {num_heads}" if num_heads < 1 or dim % num_heads else str(dim // num_heads)
