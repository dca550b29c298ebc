"""Partial symmetry as a calibrated dial: W(γ) = W₁ + Σ_k γ_k W_k.

W₁, W_k are the isotypic parts of a free weight W under the action of the group on weights, h·W = B'_h W B_h⁻¹ of a
linear map, P_h b P_hᵀ of a bias of attention: orthogonal, with sum W. W₁ commutes with the group. A dial is γ_k in
[0, 1], one for each non-trivial irrep k that occurs: with all at 0 the layer is equivariant, with all at 1 it is free.
The parts are orthogonal and h·W runs over a whole orbit, so that exactly

    mean over h of ‖h·W(γ) − W(γ)‖² = 2 ‖W(γ)‖² − 2 ‖W₁‖² = 2 Σ_k γ_k² ‖W_k‖².

This error, and not γ alone, says how far a layer is from symmetric: γ_k W_k does not change if γ_k is halved and W_k
doubled. It is differentiable, so that a multiple of it may be added to the loss. Σ_k γ_k ‖W_k‖ instead, a group lasso,
closes the dials that the task has no use for exactly.

Shape suffixes: B batch, N positions, D features in, E features out, H heads, K dials, G order of the group;
of a run of like irreps: P irreps, C copies, d dimension; M points of an orbit on pairs, O orbits alike.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .channels import isotypic_basis, orbit_blocks
from .groups import PermutationGroup
from .irreps import Irrep, Representation
from .linear import _representation

Dials = float | Sequence[float] | Mapping[str, float] | Tensor


class _Inward(torch.autograd.Function):
    """Clamp to [0, 1]. At a bound, or beyond, the gradient passes only if following it downhill leads inwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dials: Tensor) -> Tensor:
        return dials.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (dials,) = ctx.saved_tensors
        (gradient,) = grad_outputs
        outwards = ((dials <= 0) & (gradient > 0)) | ((dials >= 1) & (gradient < 0))
        return gradient.masked_fill(outwards, 0.0)


def unit_interval(dials: Tensor) -> Tensor:
    """Dials as learned, clamped to [0, 1], with the gradient of projected descent.

    A sigmoid never reaches 0 or 1, which are the two cases that mean something exactly, and a plain clamp has no
    gradient beyond them, so that a dial that stepped over a bound stays there. Here both bounds are reached and left.
    """
    return _Inward.apply(dials)


class PartialSymmetry(nn.Module, ABC):
    """A free parameter with a dial for each non-trivial isotypic part. See `PartialLinear` and `PartialBias`.

    Attributes:
        group: the group.
        channels: the non-trivial irreps that occur, in order; a dial each.
        names: of the parts: the trivial irrep's, then those of ``channels``.
        dials: the dials as stored, [K]; a parameter if they are learned. Use ``gamma``.
    """

    dials: Tensor

    def __init__(self, group: PermutationGroup) -> None:
        super().__init__()
        self.group = group

    def _register_dials(self, occurring: set[int], gamma: Dials, learned: bool, like: Tensor) -> None:
        """A dial for each non-trivial one of the irreps whose numbers are given, on the device of ``like``."""
        irreps = self.group.irreps
        self.channels: tuple[Irrep, ...] = tuple(irreps[k] for k in sorted(occurring - {0}))
        self.names = tuple(irrep.name for irrep in (irreps[0], *self.channels))
        self._part_of = np.zeros(len(irreps), dtype=np.int64)  # number of an irrep -> of the part
        self._part_of[[irrep.number for irrep in self.channels]] = np.arange(1, len(self.channels) + 1)
        dials = like.detach().new_zeros(len(self.channels))
        if learned:
            self.dials = nn.Parameter(dials)
        else:
            self.register_buffer("dials", dials)
        self.set_gamma(gamma)
        self._bases_to(like)

    # The bases follow the parameters, but from float64: a layer made in float32 and moved to float64 is exact there.
    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._bases_to(self.dials)
        return self

    @abstractmethod
    def _bases_to(self, like: Tensor) -> None:
        """Make the bases again with the dtype and on the device of ``like``."""

    @property
    def gamma(self) -> Tensor:
        """The dials [K] in [0, 1], differentiable if they are learned."""
        return unit_interval(self.dials)

    @torch.no_grad()
    def set_gamma(self, gamma: Dials) -> None:
        """Set the dials: one number for all, K numbers, or a mapping by name, which leaves the others as they are.

        Raises:
            ValueError: a number outside [0, 1], a wrong number of them, or a name of no dial.
        """
        dials = self.dials.detach().clone()
        if isinstance(gamma, Mapping):
            for name, value in gamma.items():
                if name not in self.names[1:]:
                    raise ValueError(f"gamma has a dial for each of {', '.join(self.names[1:])}, received {name!r}")
                dials[self.names.index(name) - 1] = value
        else:
            given = torch.as_tensor(gamma, dtype=dials.dtype, device=dials.device)
            if given.dim() > 1 or (given.dim() == 1 and len(given) != len(dials)):
                raise ValueError(
                    f"gamma must be one number, or one for each of the {len(dials)} dials "
                    f"({', '.join(self.names[1:])}), received shape {list(given.shape)}"
                )
            dials[:] = given
        if not dials.is_meta and not bool(((dials >= 0) & (dials <= 1)).all()):
            raise ValueError(f"gamma must be from 0 (strict) to 1 (free), received {gamma}")
        self.dials.copy_(dials)

    def _factors(self) -> Tensor:
        """1 and the dials, [1 + K]: the factor of each part."""
        gamma = self.gamma
        return torch.cat([gamma.new_ones(1), gamma])

    @abstractmethod
    def part_energies(self) -> Tensor:
        """‖W_k‖² of each part as if all dials were at 1: [1 + K], in the order of ``names``. Differentiable."""

    def channel_errors(self) -> Tensor:
        """2 γ_k² ‖W_k‖² of each dial, [K]; their sum is the equivariance error. Differentiable."""
        return 2 * self.gamma.square() * self.part_energies()[1:]

    def equivariance_error(self) -> Tensor:
        """Mean over the group of ‖h·W − W‖² of what the layer applies, in closed form; a differentiable scalar."""
        return self.channel_errors().sum()

    @abstractmethod
    def measured_error(self) -> Tensor:
        """The same mean by applying each element of the group to what the layer applies; slow. A scalar."""

    def table(self) -> list[dict[str, str | float]]:
        """A row for each part: its name as ``channel``, ``gamma``, ``energy`` ‖γ_k W_k‖² and ``error`` it brings."""
        with torch.no_grad():
            factors = self._factors()
            energies = factors.square() * self.part_energies()
            errors = torch.cat([energies.new_zeros(1), self.channel_errors()])
        return [
            {"channel": name, "gamma": float(factor), "energy": float(energy), "error": float(error)}
            for name, factor, energy, error in zip(self.names, factors, energies, errors)
        ]

    def _sum_by_part(self, squares: Tensor, labels: Tensor) -> Tensor:
        """Sum squares by part: same shapes -> [1 + K]."""
        sums = squares.new_zeros(1 + len(self.channels))
        return sums.index_add(0, labels.flatten(), squares.flatten())


class _Run(NamedTuple):
    """Consecutive irreps of a representation of one dimension and as many copies."""

    start: int
    irreps: list[Irrep]
    copies: int
    dimension: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.irreps), self.dimension, self.copies

    @property
    def stop(self) -> int:
        return self.start + len(self.irreps) * self.copies * self.dimension


def _runs(representation: Representation) -> list[_Run]:
    runs: list[_Run] = []
    for irrep, part in representation.blocks:
        copies = (part.stop - part.start) // irrep.dimension
        if copies == 0:
            continue
        if runs and (runs[-1].copies, runs[-1].dimension) == (copies, irrep.dimension):
            runs[-1].irreps.append(irrep)
        else:
            runs.append(_Run(part.start, [irrep], copies, irrep.dimension))
    return runs


class PartialLinear(PartialSymmetry):
    """A linear layer with a dial from equivariant to free, for each isotypic part of its weight.

    ``weight`` is dense, as of ``nn.Linear``, whose weights may be copied here, or those of
    `EquivariantLinear.weight_matrix`; what is applied is W(γ). The parts are found between each two irreps of source
    and target, which all copies share. So a forward pass takes about d d' multiplications for each entry of the weight
    on top of those of a dense layer, whatever the order of the group, and none with `to_linear`. A bias is decomposed
    like a column of the weight that comes from an invariant input, and counts in the energies and errors.

    Args:
        group: the group.
        in_dim, out_dim: how it acts on the channels, as of `EquivariantLinear`: a `Representation`, or their number,
            a multiple of the order |G|, for copies of the regular representation.
        bias: add a bias.
        gamma: where the dials start, from 0, equivariant, to 1, free: a number, one for each, or a mapping by name. A
            dial that is learned from 0 opens only if the part it scales happens to point the right way: start above.
        learned: learn the dials; otherwise they stay until ``set_gamma``.
        generator: of the initial weights. None: torch's global one.

    Attributes:
        source, target: the two representations.
        weight: [out_dim, in_dim], free.
        bias: [out_dim], free; or None.

    Raises:
        ValueError: dims that are no multiple of the order, a representation of another group, or no channels; or gamma
            does not fit.
    """

    def __init__(
        self,
        group: PermutationGroup,
        in_dim: int | Representation,
        out_dim: int | Representation,
        bias: bool = True,
        *,
        gamma: Dials = 0.5,
        learned: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(group)
        self.source = _representation(group, in_dim, "in_dim")
        self.target = _representation(group, out_dim, "out_dim")
        self.in_dim, self.out_dim = self.source.dim, self.target.dim
        if not self.in_dim or not self.out_dim:
            raise ValueError(f"PartialLinear needs channels in and out, received {self.in_dim} and {self.out_dim}")
        self._input_runs, self._output_runs = _runs(self.source), _runs(self.target)
        # Basis [P, Q, dd', dd'] and labels [P, Q, dd'] of the weights between each two irreps of two runs.
        self._splits: list[tuple[np.ndarray, np.ndarray]] = []
        occurring: set[int] = set()
        for row in self._output_runs:
            for column in self._input_runs:
                pairs = [[_split_pair(group, p, q) for q in column.irreps] for p in row.irreps]
                bases = np.array([[pair[0] for pair in line] for line in pairs])
                labels = np.array([[pair[1] for pair in line] for line in pairs])
                self._splits.append((bases, labels))
                occurring |= set(labels.ravel().tolist())
        if bias:
            occurring |= {irrep.number for run in self._output_runs for irrep in run.irreps}
        self.weight = nn.Parameter(torch.empty(self.out_dim, self.in_dim))
        self.bias = nn.Parameter(torch.empty(self.out_dim)) if bias else None
        self._register_dials(occurring, gamma, learned, self.weight)
        self.reset_parameters(generator)

    def extra_repr(self) -> str:
        learned = isinstance(self.dials, nn.Parameter)
        return (
            f"{self.group}, in_dim={self.in_dim}, out_dim={self.out_dim}, bias={self.bias is not None}, "
            f"{len(self.channels)} dials, learned={learned}"
        )

    def _bases_to(self, like: Tensor) -> None:
        self._blocks = [
            (torch.from_numpy(bases).to(like), torch.from_numpy(self._part_of[labels]).to(like.device))
            for bases, labels in self._splits
        ]
        parts = [
            np.full(run.copies * run.dimension, self._part_of[irrep.number])
            for run in self._output_runs
            for irrep in run.irreps
        ]
        self._bias_parts = torch.from_numpy(np.concatenate(parts)).to(like.device)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights again; the dials stay.

        The parts with dials are those of a free weight, N(0, 1 / in_dim). The equivariant part is stronger than
        that, as much as keeps the variance of activations at the present dials. The bias is zero.
        """
        self.weight.normal_(0.0, self.in_dim**-0.5, generator=generator)
        if self.bias is not None:
            self.bias.zero_()
        factors = self._factors()
        strict = self._weight(torch.cat([factors[:1], torch.zeros_like(factors[1:])]))
        scales, blocks = [], iter(self._blocks)
        for row in self._output_runs:
            wanted = row.dimension * self.in_dim  # numbers behind the channels of a copy, [P] below
            open_ = self.weight.new_zeros(len(row.irreps))
            trivial = self.weight.new_zeros(len(row.irreps))
            for column in self._input_runs:
                _, labels = next(blocks)
                trivial += column.copies * (labels == 0).sum((1, 2))
                open_ += column.copies * (factors[labels].square() * (labels != 0)).sum((1, 2))
            scale = torch.where(trivial > 0, ((wanted - open_).clamp(min=0) / trivial.clamp(min=1)).sqrt(), 1.0)
            scales.append(scale.repeat_interleave(row.copies * row.dimension))
        self.weight.add_((torch.cat(scales) - 1)[:, None] * strict)

    def _coordinates(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The weight between each two runs: [P, Q, C C', d d'], with its basis and labels."""
        found, blocks = [], iter(self._blocks)
        for row in self._output_runs:
            for column in self._input_runs:
                part = self.weight[row.start : row.stop, column.start : column.stop]
                part = part.unflatten(1, column.shape).unflatten(0, row.shape)  # [P, d, C, Q, d', C']
                part = part.permute(0, 3, 2, 5, 1, 4).flatten(4, 5).flatten(2, 3)
                found.append((part, *next(blocks)))
        return found

    def _weight(self, factors: Tensor) -> Tensor:
        """Σ_k factor_k W_k."""
        parts = iter(self._coordinates())
        rows = []
        for row in self._output_runs:
            columns = []
            for column in self._input_runs:
                part, bases, labels = next(parts)
                factor = factors[labels]
                if bases.shape[-1] == 1:
                    part = part * factor[..., None]
                elif part.shape[2] < bases.shape[-1]:  # few copies
                    part = ((part @ bases.mT) * factor[..., None, :]) @ bases
                else:
                    part = part @ ((bases * factor[..., None]).mT @ bases)
                part = part.unflatten(3, (row.dimension, column.dimension)).unflatten(2, (row.copies, column.copies))
                columns.append(part.permute(0, 4, 2, 1, 5, 3).flatten(3, 5).flatten(0, 2))
            rows.append(torch.cat(columns, dim=1))
        return torch.cat(rows)

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """What the layer applies: W(γ) [out_dim, in_dim] and the bias [out_dim] or None, differentiable."""
        factors = self._factors()
        return self._weight(factors), None if self.bias is None else self.bias * factors[self._bias_parts]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] -> [..., output dim].

        Raises:
            ValueError: the channels do not carry the input representation.
        """
        if x.shape[-1:] != (self.in_dim,):
            raise ValueError(
                f"PartialLinear({self.extra_repr()}) takes features [..., {self.in_dim}], received {list(x.shape)}"
            )
        return F.linear(x, *self.weight_and_bias())

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The layer at its present dials as an ordinary ``nn.Linear`` that shares nothing with it."""
        weight, bias = self.weight_and_bias()
        linear = nn.Linear(self.in_dim, self.out_dim, bias=bias is not None, device=weight.device, dtype=weight.dtype)
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
        return linear

    def part_energies(self) -> Tensor:
        energies = self._factors().new_zeros(1 + len(self.channels))
        for part, bases, labels in self._coordinates():
            energies = energies + self._sum_by_part((part @ bases.mT).square().sum(2), labels)
        if self.bias is not None:
            energies = energies + self._sum_by_part(self.bias.square(), self._bias_parts)
        return energies

    @torch.no_grad()
    def measured_error(self) -> Tensor:
        weight, bias = self.weight_and_bias()
        total = weight.new_zeros(())
        for h in range(self.group.order):
            moved = self.target.act(h, self.source.act(h, weight).mT).mT
            total += (moved - weight).square().sum()
            if bias is not None:
                total += (self.target.act(h, bias) - bias).square().sum()
        return total / self.group.order


@lru_cache(maxsize=256)
def _split_pair(group: PermutationGroup, row: Irrep, column: Irrep) -> tuple[np.ndarray, np.ndarray]:
    """Basis and labels of the matrices [d, d'] under W -> ρ(h) W ρ'(h)ᵀ, flattened."""
    d, e = row.dimension, column.dimension
    left, right = row.matrices.reshape(-1, d * d), column.matrices.reshape(-1, e * e)

    def average(weights: np.ndarray) -> np.ndarray:
        return (left.T @ (weights[:, None] * right)).reshape(d, d, e, e).transpose(0, 2, 1, 3).reshape(d * e, d * e)

    return isotypic_basis(group, row.character * column.character, average)


class PartialBias(PartialSymmetry):
    """A free bias b [H, N, N] of attention for each pair of positions, with a dial from tied to free for each part.

    The group acts as b -> P_h b P_hᵀ on each head. At γ = 0 a bias is the same on all pairs of one orbital, as
    `PermutationGroup.orbitals` numbers them. The parts are found orbital by orbital: a pass takes as many
    multiplications for each pair as its orbital has pairs (or twice that).

    Args:
        group: acts on N = group.degree positions; what it does to letters plays no part.
        num_heads: H.
        gamma, learned: as of `PartialLinear`.
        std: the bias starts as N(0, std²). At 0 a dial at 0 would have no gradient, and never open.
        generator: of the initial bias. None: torch's global one.

    Raises:
        ValueError: no heads, gamma does not fit, or an orbital has more pairs than a basis is computed for.
    """

    def __init__(
        self,
        group: PermutationGroup,
        num_heads: int = 1,
        *,
        gamma: Dials = 0.5,
        learned: bool = True,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, received {num_heads}")
        super().__init__(group)
        n, positions = group.degree, group.positions.astype(np.int64)
        self._splits = orbit_blocks(group, n * n, lambda h, pair: positions[h, pair // n] * n + positions[h, pair % n])
        self.num_heads, self.std = num_heads, std
        self.bias = nn.Parameter(torch.empty(num_heads, n, n))
        occurring = {int(k) for block in self._splits for k in block.labels}
        self._register_dials(occurring, gamma, learned, self.bias)
        self.reset_parameters(generator)

    def extra_repr(self) -> str:
        learned = isinstance(self.dials, nn.Parameter)
        return f"{self.group}, num_heads={self.num_heads}, {len(self.channels)} dials, learned={learned}"

    def _bases_to(self, like: Tensor) -> None:
        self._blocks = [
            (
                torch.from_numpy(block.points).to(like.device),
                torch.from_numpy(block.basis).to(like),
                torch.from_numpy(self._part_of[block.labels]).to(like.device),
            )
            for block in self._splits
        ]
        places = np.argsort(np.concatenate([block.points.ravel() for block in self._splits]))
        self._places = torch.from_numpy(places).to(like.device)  # of each pair among the orbits, block after block

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial bias again; the dials stay."""
        self.bias.normal_(0.0, self.std, generator=generator)

    def forward(self) -> Tensor:
        """b(γ): [H, N, N], rows attend to columns."""
        flat, factors = self.bias.flatten(1), self._factors()
        parts = []
        for points, basis, labels in self._blocks:
            coordinates_HOM = flat[:, points] @ basis.mT
            parts.append(((coordinates_HOM * factors[labels]) @ basis).flatten(1))
        return torch.cat(parts, dim=1)[:, self._places].view_as(self.bias)

    def part_energies(self) -> Tensor:
        flat = self.bias.flatten(1)
        energies = self._factors().new_zeros(1 + len(self.channels))
        for points, basis, labels in self._blocks:
            energies = energies + self._sum_by_part((flat[:, points] @ basis.mT).square().sum((0, 1)), labels)
        return energies

    @torch.no_grad()
    def measured_error(self) -> Tensor:
        bias = self()
        total = bias.new_zeros(())
        for h in range(self.group.order):
            moved = self.group.permute(h, self.group.permute(h, bias, dim=-2), dim=-1)
            total += (moved - bias).square().sum()
        return total / self.group.order
