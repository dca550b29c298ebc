"""Linear layers that commute with a finite group, in the Fourier basis of the channels, and what goes between them.

By Schur's lemma a linear map that commutes with the group takes copies of a real irrep to copies of the same irrep, and
between two copies it is a number: real, complex or quaternionic as the irrep is of type 1, 2 or 4 (`Irrep.endo`). So
the dense matrix falls into blocks, one an irrep, and an irrep of dimension d uses its block d / endo times over. For
C copies of the regular representation that is Σ_k (d_k C / e_k)² e_k free numbers where a dense layer has (|G| C)²,
and Σ_k d_k³ C² / e_k multiplications a token (C² Σ d_k³ / e_k: 2 times fewer for Z_2, 3.6 for S_3, 5.33 for D_4).

Shape suffixes: B batch, N positions, T tokens (all leading axes as one), G order of the group, C copies of its regular
representation, D width; of a run of like irreps: K irreps, d dimension, e type, r = d / e, m copies, n = e m, O and I
for n_out and n_in; L letters, Y kinds of letters.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._blocks import block_linear, block_linear_reference
from .groups import Element, PermutationGroup
from .irreps import Irrep, Representation, fourier

# --- runs of like irreps --------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Consecutive irreps of one dimension and type, with as many copies each."""

    irreps: tuple[Irrep, ...]
    dimension: int
    endo: int
    copies_in: int
    copies_out: int
    start_in: int
    start_out: int

    @property
    def repeats(self) -> int:
        return self.dimension // self.endo


def _runs(source: Representation, target: Representation) -> list[_Run]:
    """The irreps that both have, in runs; each is one stack of weights."""
    runs: list[_Run] = []
    places = {irrep.number: part for irrep, part in target.blocks}
    for irrep, part_in in source.blocks:
        if irrep.number not in places:
            continue
        d, part_out = irrep.dimension, places[irrep.number]
        copies_in, copies_out = source.copies[irrep.number], target.copies[irrep.number]
        if runs:
            last, size = runs[-1], len(runs[-1].irreps) * d
            if last[1:5] == (d, irrep.endo, copies_in, copies_out) and (part_in.start, part_out.start) == (
                last.start_in + size * copies_in,
                last.start_out + size * copies_out,
            ):
                runs[-1] = last._replace(irreps=(*last.irreps, irrep))
                continue
        runs.append(_Run((irrep,), d, irrep.endo, copies_in, copies_out, part_in.start, part_out.start))
    return runs


# --- coordinates ----------------------------------------------------------------------------------------------------


class _Constant:
    """A constant of float64, handed out in the dtype and on the device of another tensor.

    It is no buffer because ``module.float().double()`` would leave a buffer with the rounding of float32.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values = np.ascontiguousarray(values)
        self._kept: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.as_tensor(self.values, dtype=x.dtype, device=x.device)
        key = (x.dtype, x.device)
        if key not in self._kept:
            self._kept[key] = torch.as_tensor(self.values, dtype=x.dtype, device=x.device)
        return self._kept[key]


# --- layers ---------------------------------------------------------------------------------------------------------


class EquivariantLinear(nn.Module):
    """A linear layer on channels that commutes with the group: y = W x + b with B'_h W = W B_h, b fixed by all B'_h.

    Block-diagonal in the Fourier basis, see above; all such maps can be reached, and no weight is tied to another.
    Weights start normal with variance 1 / (e_k m_in,k) so that each channel of the output has unit variance if the
    channels of the input do; the bias, on the copies of the trivial irrep alone, starts at zero.

    Source: Schur's lemma over the reals, ⊕_k M_{m_out,k × m_in,k}(D_k) with D_k = R, C or H.

    Args:
        group: the group.
        in_dim, out_dim: how it acts on the channels: a `Representation`, or their number, a multiple of the order |G|,
            for copies of the regular representation.
        bias: add a bias.
        generator: of the initial weights; None: torch's global one.

    Attributes:
        source, target: the two representations.
        weights: one tensor [K, e, m_out, m_in] for each run of K like irreps that both representations have: real
            weights (e = 1), or the parts of complex (2) or quaternionic ones (4) along `Irrep.structure`.
        bias: [m_out of the trivial irrep], or None.

    Raises:
        ValueError: a number of channels that is no multiple of the order, a representation of another group.
    """

    def __init__(
        self,
        group: PermutationGroup,
        in_dim: int | Representation,
        out_dim: int | Representation,
        bias: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.source = _representation(group, in_dim, "in_dim")
        self.target = _representation(group, out_dim, "out_dim")
        self.in_dim, self.out_dim = self.source.dim, self.target.dim
        self._runs = _runs(self.source, self.target)
        self._places = (
            [run.start_in for run in self._runs],
            [run.start_out for run in self._runs],
            [run.repeats for run in self._runs],
        )
        self.weights = nn.ParameterList(
            torch.empty(len(run.irreps), run.endo, run.copies_out, run.copies_in) for run in self._runs
        )
        num_invariant = self.target.copies[0] if bias else 0
        self.bias = nn.Parameter(torch.empty(num_invariant)) if num_invariant else None
        # The algebra acts on the coordinates e at a time, in each e by the same units: see `Irrep.structure`.
        self._units = [
            _Constant(run.irreps[0].structure[:, : run.endo, : run.endo]) if run.endo > 1 else None
            for run in self._runs
        ]
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew: see the class."""
        for weight in self.weights:
            _, endo, _, copies_in = weight.shape
            weight.normal_(0.0, (endo * copies_in) ** -0.5, generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., out_dim].

        Raises:
            ValueError: the last axis is not in_dim.
        """
        if x.shape[-1:] != (self.in_dim,):
            raise ValueError(
                f"EquivariantLinear({self.extra_repr()}) takes features [..., {self.in_dim}], received {list(x.shape)}"
            )
        return self._map(x, self.bias)

    def weight_matrix(self) -> Tensor:
        """The dense weight [out_dim, in_dim], as of ``nn.Linear``."""
        like = self.weights[0] if len(self.weights) else torch.empty(0)
        return self._map(torch.eye(self.in_dim, dtype=like.dtype, device=like.device), None).mT.contiguous()

    def act_in(self, element: Element | int, x: Tensor) -> Tensor:
        """The input [B, N, in_dim] moved by an element: P_h x B_hᵀ."""
        return _act(self.source, element, x)

    def act_out(self, element: Element | int, y: Tensor) -> Tensor:
        """The output [B, N, out_dim] moved by an element: P_h y B'_hᵀ."""
        return _act(self.target, element, y)

    def extra_repr(self) -> str:
        return f"{self.group}, in_dim={self.in_dim}, out_dim={self.out_dim}, bias={self.bias is not None}"

    def _map(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weights = [self._dense(index) for index in range(len(self._runs))]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
            bias = None if bias is None else bias.to(dtype)
        x_TD = x.reshape(-1, self.in_dim)
        # torch.func (grad, vmap, ...) takes plain operations only, no operator of a library (torch 2.13)
        plain = torch._C._functorch.peek_interpreter_stack() is not None and not torch.compiler.is_compiling()
        product = block_linear_reference if plain else block_linear
        y_TD = product(x_TD, weights, bias, *self._places, self.out_dim)
        return y_TD.reshape(*x.shape[:-1], self.out_dim)

    def _dense(self, index: int) -> Tensor:
        """Weights as matrices on coordinates and copies: [K, e m_out, e m_in]."""
        weight, constant = self.weights[index], self._units[index]
        if constant is None:
            return weight[:, 0]
        return torch.einsum("uab,kuoi->kaobi", constant.like(weight), weight).flatten(3, 4).flatten(1, 2)


class GroupBasis(nn.Module):
    """The Fourier transform on the group, between channels and functions on the group; no parameters.

    Channels [..., |G| C] that carry C copies of the regular representation, for any C, are C functions on the group:
    the element h takes the value at g to h g. Copy j C + c of irrep k belongs to function c, where j counts the
    d_k / e_k copies in one regular representation. On those values pointwise functions, and whatever else commutes with
    permuting them, are equivariant.

    Args:
        group: the group; its order is at most a few hundred in practice, as a transform takes |G|² C multiplications.
    """

    def __init__(self, group: PermutationGroup) -> None:
        super().__init__()
        self.group = group
        self._fourier = _Constant(fourier(group))  # rows: irreps, in each the coordinates, for each the copies

    def to_group(self, x: Tensor) -> Tensor:
        """[..., |G| C] -> [..., C, |G|], whose memory is laid out as [..., |G|, C].

        Raises:
            ValueError: the last axis is no multiple of the order.
        """
        order = self.group.order
        if x.shape[-1] == 0 or x.shape[-1] % order:
            raise ValueError(
                f"channels are copies of the regular representation of {self.group}, a multiple of {order} of them, "
                f"received {list(x.shape)}"
            )
        copies = x.shape[-1] // order
        return self._apply_matrix(self._fourier.like(x).mT, x.unflatten(-1, (order, copies))).mT

    def to_fourier(self, x: Tensor) -> Tensor:
        """[..., C, |G|] -> [..., |G| C], the inverse of `to_group`.

        Raises:
            ValueError: the last axis is not as long as the order.
        """
        if x.dim() < 2 or x.shape[-1] != self.group.order:
            raise ValueError(
                f"functions on {self.group} are [..., C, {self.group.order}], received {list(x.shape)}"
            )  # fmt: skip
        return self._apply_matrix(self._fourier.like(x), x.mT).flatten(-2)

    def _apply_matrix(self, matrix: Tensor, x: Tensor) -> Tensor:
        """A matrix [G, G] times each of [..., G, C]. One product a token: to gather C columns of all takes longer."""
        batch = x.reshape(-1, *x.shape[-2:])
        return torch.bmm(matrix.expand(len(batch), *matrix.shape), batch).reshape(x.shape)


class EquivariantNorm(nn.Module):
    """RMS norm over all channels, with one gain for each copy of each irrep: x / rms(x) · gain.

    No mean is subtracted. Elements act by orthogonal matrices, which keep the RMS, and by one and the same matrix on
    each copy, which its gain commutes with.

    Args:
        representation: how the group acts on the channels.
        eps: added to the mean square; None for the smallest relative step of the dtype.
    """

    def __init__(self, representation: Representation, *, eps: float | None = None) -> None:
        super().__init__()
        self.representation, self.eps = representation, eps
        copy_of_channel, count = [], 0
        for irrep, _ in representation.blocks:
            copies = representation.copies[irrep.number]
            numbers = torch.arange(count, count + copies).expand(1, irrep.dimension, copies)
            copy_of_channel.append(numbers.flatten(-3))
            count += copies
        self.gain = nn.Parameter(torch.ones(count))
        self.register_buffer("_copy_of_channel", torch.cat(copy_of_channel), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim].

        Raises:
            ValueError: the last axis is not the dim of the representation.
        """
        dim = self.representation.dim
        if x.shape[-1:] != (dim,):
            raise ValueError(f"EquivariantNorm takes features [..., {dim}], received {list(x.shape)}")
        return F.rms_norm(x, (dim,), self.gain[self._copy_of_channel], self.eps)

    def act_in(self, element: Element | int, x: Tensor) -> Tensor:
        """Input [B, N, dim] moved by an element: P_h x B_hᵀ."""
        return _act(self.representation, element, x)

    act_out = act_in

    def extra_repr(self) -> str:
        return f"{self.representation.group}, dim={self.representation.dim}"


class EquivariantMLP(nn.Module):
    """Linear layer, GELU on functions on the group, linear layer.

    Args:
        group: the group.
        dim: channels in and out, a multiple of the order |G|: copies of the regular representation.
        hidden: channels between, another multiple.
        generator: of the initial weights; None: torch's global one.

    Raises:
        ValueError: dim or hidden is no multiple of the order.
    """

    def __init__(
        self, group: PermutationGroup, dim: int, hidden: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.group = group
        inside = _representation(group, hidden, "hidden")
        self.expand = EquivariantLinear(group, _representation(group, dim, "dim"), inside, generator=generator)
        self.group_basis = GroupBasis(group)
        self.contract = EquivariantLinear(group, inside, self.expand.source, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        values = F.gelu(self.group_basis.to_group(self.expand(x)))
        return self.contract(self.group_basis.to_fourier(values))

    def act_in(self, element: Element | int, x: Tensor) -> Tensor:
        """Input [B, N, dim] moved by an element: P_h x B_hᵀ."""
        return self.expand.act_in(element, x)

    def act_out(self, element: Element | int, y: Tensor) -> Tensor:
        """Output [B, N, dim] moved by an element: P_h y B_hᵀ."""
        return self.contract.act_out(element, y)


class EquivariantEmbedding(nn.Module):
    """Letters to features, so that moved and changed letters give moved features: emb(h tokens) = P_h emb(tokens) B_hᵀ.

    A letter has one vector wherever it stands, except that positions at which the group changes letters differently
    (the arms and the spacer of an inverted repeat) have tables of their own. h takes the vector of one letter to that
    of another, or of the same one: so an orbit of letters has one free vector, in the part of the channels that all
    elements fix which fix its first letter. With reverse complement, the vectors of A and C are free and those of T
    and G follow. Letters that the group leaves alone go to copies of the trivial irrep, and their other channels are
    zero until a layer that knows positions fills them.

    Args:
        group: acts on N = group.degree positions and on letters.
        dim: how it acts on channels: a `Representation`, or a number as in `EquivariantLinear`.
        num_letters: L; needed for a group that knows no letters, which leaves them alone.
        generator: of the initial weights, N(0, 1) each; None: torch's global one.

    Attributes:
        weights: for each irrep that can be reached, [free numbers a copy, copies].

    Raises:
        ValueError: no number of letters, or another than the group's; dim as in `EquivariantLinear`; nothing can be
            reached, so that all features would be zero.
    """

    def __init__(
        self,
        group: PermutationGroup,
        dim: int | Representation,
        num_letters: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_letters is None:
            num_letters = group.num_letters
        if num_letters < 1 or group.num_letters not in (0, num_letters):
            raise ValueError(
                f"num_letters is that of the group, {group.num_letters or 'none here, so it must be given'}; "
                f"received {num_letters} for {group}"
            )
        self.group, self.num_letters = group, num_letters
        self.representation = _representation(group, dim, "dim")
        kinds_N, moved_GY = _kinds_of_letters(group, num_letters)
        self.register_buffer("_first_row_N", torch.from_numpy(kinds_N * num_letters), persistent=False)
        self._bases: list[_Constant | None] = []
        self.weights = nn.ParameterList()
        for irrep, _ in self.representation.blocks:
            basis = _letter_basis(irrep, moved_GY)
            self._bases.append(_Constant(basis) if basis.size else None)
            if basis.size:
                self.weights.append(torch.empty(basis.shape[2], self.representation.copies[irrep.number]))
        if not len(self.weights):
            raise ValueError(
                f"no irrep of the representation of {group} has a vector for a letter: without letters that the group "
                "changes there must be copies of the trivial irrep"
            )
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew, N(0, 1)."""
        for weight in self.weights:
            weight.normal_(generator=generator)

    def table(self) -> Tensor:
        """The vectors [Y, dim] of all letters, those of positions of the first kind first."""
        like = self.weights[0]
        num_kinds = len(self._first_row_N.unique()) * self.num_letters
        weights, parts = iter(self.weights), []
        for (_, part), basis in zip(self.representation.blocks, self._bases):
            if basis is None:
                parts.append(like.new_zeros(num_kinds, part.stop - part.start))
            else:
                parts.append(torch.einsum("ydf,fm->ydm", basis.like(like), next(weights)).flatten(1))
        return torch.cat(parts, -1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Integers [B, N] (or [..., N]), letters 0 to L - 1 -> [B, N, dim].

        Raises:
            ValueError: not integers, not N of them, or letters outside of that range.
        """
        if tokens.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            raise ValueError(f"tokens must be integers, received {tokens.dtype}")
        if tokens.shape[-1:] != (self.group.degree,):
            raise ValueError(
                f"tokens must be [..., {self.group.degree}] for {self.group}, received {list(tokens.shape)}"
            )
        if not torch.compiler.is_compiling() and bool(((tokens < 0) | (tokens >= self.num_letters)).any()):
            raise ValueError(
                f"letters are 0 to {self.num_letters - 1}, received {int(tokens.min())} to {int(tokens.max())}"
            )
        return F.embedding(tokens.long() + self._first_row_N, self.table())

    def act_in(self, element: Element | int, tokens: Tensor) -> Tensor:
        """Tokens moved and changed by an element."""
        return self.group.act_on_tokens(_number(self.group, element), tokens)

    def act_out(self, element: Element | int, y: Tensor) -> Tensor:
        """Features [B, N, dim] moved by an element: P_h y B_hᵀ."""
        return _act(self.representation, element, y)

    def extra_repr(self) -> str:
        return f"{self.group}, num_letters={self.num_letters}, dim={self.representation.dim}"


def _kinds_of_letters(group: PermutationGroup, num_letters: int) -> tuple[np.ndarray, np.ndarray]:
    """The kind of each position, int64 [N], and where each element takes each (kind, letter), int64 [G, Y].

    Positions are of one kind if each element changes the letters at both alike. Then it takes both to positions that
    are again of one kind, because what g does to letters at h(i) is what g h does at i after undoing what h does there.
    """
    order, num_positions = group.order, group.degree
    maps_GNL = group.letter_maps
    if maps_GNL is None:
        return np.zeros(num_positions, dtype=np.int64), np.tile(np.arange(num_letters), (order, 1))
    columns = np.ascontiguousarray(np.asarray(maps_GNL).swapaxes(0, 1).reshape(num_positions, -1))
    _, first, kinds_N = np.unique(columns, axis=0, return_index=True, return_inverse=True)
    kinds_N = kinds_N.reshape(-1).astype(np.int64)
    kinds_moved = kinds_N[np.asarray(group.positions)[:, first]]  # [G, kinds]
    moved = kinds_moved[:, :, None] * num_letters + np.asarray(maps_GNL)[:, first]
    return kinds_N, moved.reshape(order, -1).astype(np.int64)


def _letter_basis(irrep: Irrep, moved_GY: np.ndarray) -> np.ndarray:
    """A basis [Y, d, F] of the maps v from letters to the irrep with v(h y) = ρ(h) v(y)."""
    num_kinds = moved_GY.shape[1]
    bases, seen = [], np.zeros(num_kinds, dtype=bool)
    for y in range(num_kinds):
        if seen[y]:
            continue
        orbit, carriers = np.unique(moved_GY[:, y], return_index=True)
        seen[orbit] = True
        fixing = np.flatnonzero(moved_GY[:, y] == y)
        mean = np.mean([irrep.matrix(int(h)) for h in fixing], axis=0)  # projects onto what they fix
        values, vectors = np.linalg.eigh((mean + mean.T) / 2)
        fixed = vectors[:, values > 0.5]
        basis = np.zeros((num_kinds, irrep.dimension, fixed.shape[1]))
        for point, h in zip(orbit, carriers):
            basis[point] = np.asarray(irrep.matrix(int(h))) @ fixed
        bases.append(basis)
    return np.concatenate(bases, 2)


def _number(group: PermutationGroup, element: Element | int) -> int:
    return int(element) if isinstance(element, (int, np.integer)) else group.number(element)


def _act(representation: Representation, element: Element | int, x: Tensor) -> Tensor:
    """P_h x B_hᵀ: rows moved by the permutation, channels by the representation."""
    group = representation.group
    number = _number(group, element)
    return group.permute(number, representation.act(number, x), dim=-2)


def _representation(group: PermutationGroup, dim: int | Representation, name: str) -> Representation:
    if isinstance(dim, Representation):
        if dim.group != group:
            raise ValueError(f"{name} is a representation of {dim.group}, the layer is for {group}: give one group")
        return dim
    if dim < 1 or dim % group.order:
        raise ValueError(
            f"{name} as a number must be a multiple of the order {group.order} of {group}, for copies of the regular "
            f"representation; received {dim}. For other channels give a Representation(group, copies)"
        )
    return Representation.regular(group, dim // group.order)
