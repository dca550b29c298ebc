"""How much of features, or of an attention map, lies in each isotypic channel of a group; and bases adapted to them.

P_k is the orthogonal projector on channel k: the sum of all copies of the real irrep k among what the group moves, the
positions in the first place, by P_h. The channels are orthogonal and complete, so the shares below sum to one exactly.
An attention map need not commute with the group: what it moves from channel l to channel k is T_kl.

Shape suffixes: N positions, D features, K channels, G order of the group, O orbits alike, M points of an orbit.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .groups import PermutationGroup
from .irreps import Irrep, Representation
from .projectors import Channels

MAX_ORBIT = 4096
"""Points of the largest orbit for which a basis of channels is computed: its matrix takes 128 MiB."""


def channel_energies(
    y: Tensor, group: PermutationGroup, *, letters: bool = False, representation: Representation | None = None
) -> Tensor:
    """Energies ‖P_k Y‖² of features in each channel; they sum to ‖Y‖².

    Three actions may be meant. By default the group moves positions, and each feature is decomposed by itself. With
    ``letters`` it moves letters as well, as in one-hot sequences. With a ``representation`` it moves features as those
    of our layers, h·Y = P_h Y B_hᵀ: then all energy of an equivariant layer is in the trivial channel if its input does
    not change under the group. This third one takes a pass over y for each element of the group.

    Args:
        y: [..., N, D], real.
        group: of degree N.
        letters: take positions and letters together, where D is the number of letters.
        representation: of the group on the D features.

    Returns:
        [..., K], in the order of ``group.channels(letters)``, or with a representation of ``group.irreps``;
        differentiable. Half precision is summed in float32.

    Raises:
        ValueError: shapes do not fit the group, or letters and a representation are given together.
    """
    y = _as_real("y", y)
    width = "D"
    if letters:
        if not group.num_letters or representation is not None:
            also = " and a representation" if representation is not None else ""
            raise ValueError(f"letters=True needs a group that moves letters, and no more; received {group!r}{also}")
        width = group.num_letters
    elif representation is not None:
        if representation.group != group:
            raise ValueError(f"the representation must be one of {group!r}, received one of {representation.group!r}")
        width = representation.dim
    if y.dim() < 2 or y.shape[-2] != group.degree or width not in ("D", y.shape[-1]):
        raise ValueError(
            f"y must have shape [..., N, D] = [..., {group.degree}, {width}] for {group!r}, received {list(y.shape)}"
        )
    if representation is None:
        return _channels(group, letters).energies(y)
    # ⟨Y, P_k Y⟩ with the character formula, from the correlation of Y with each h·Y.
    moved = (representation.act(h, group.permute(h, y)) for h in range(group.order))
    correlations = torch.stack([(y * hy).sum((-2, -1)) for hy in moved], dim=-1)
    characters, dimensions, endomorphisms = _character_table(group)
    formula = (dimensions / (endomorphisms * group.order))[:, None] * characters[:, group.class_of]
    return correlations @ torch.from_numpy(formula).to(y).mT


def channel_transfer(attention: Tensor, group: PermutationGroup) -> Tensor:
    """Shares T_kl = ‖P_k A P_l‖² / ‖A‖² of a map between positions: what it takes from channel l to channel k.

    They sum to 1. If A commutes with the group, T is diagonal; a diagonal T says that A maps each channel into itself.
    Any map will do, such as the attention of another library's model.

    Args:
        attention: [..., N, N], real: rows attend to columns.
        group: of degree N.

    Returns:
        [..., K, K], in the order of ``group.channels()``; differentiable. Half precision is summed in float32.

    Raises:
        ValueError: shapes do not fit the group, or a map is zero or not finite.
    """
    a = _as_real("attention", attention)
    if a.dim() < 2 or a.shape[-2:] != (group.degree, group.degree):
        raise ValueError(
            f"attention must have shape [..., N, N] with N = {group.degree} for {group!r}, received {list(a.shape)}; "
            "cut out the window that the group acts on"
        )
    total = a.square().sum((-2, -1))
    bad = ~(total.isfinite() & (total > 0))
    if bool(bad.any()):
        raise ValueError(
            f"an attention map must be finite and not zero, received {int(bad.sum())} that are not of {bad.numel()}"
        )
    numbers = [irrep.number for irrep in group.channels()]
    blocks = _position_blocks(group)
    labels = torch.from_numpy(np.concatenate([np.tile(b.labels, len(b.points)) for b in blocks]))
    onehot = (labels[:, None] == torch.tensor(numbers)).to(a)
    adapted = to_channels(to_channels(a, blocks).mT, blocks).mT
    return onehot.mT @ adapted.square() @ onehot / total[..., None, None]


def energy_table(
    y: Tensor, group: PermutationGroup, *, letters: bool = False, representation: Representation | None = None
) -> dict[str, float]:
    """Share of each channel, by its name, in the energy of features [..., N, D] taken together; the shares sum to 1.

    Arguments and errors are those of `channel_energies`.

    Raises:
        ValueError: the features are zero or not finite.
    """
    energies = channel_energies(y.detach(), group, letters=letters, representation=representation).double()
    energies = energies.reshape(-1, energies.shape[-1]).sum(0)
    total = float(energies.sum())
    if not 0 < total < float("inf"):
        raise ValueError(f"features must be finite and not all zero, received an energy of {total}")
    channels = group.channels(letters) if representation is None else group.irreps
    return {irrep.name: float(energy) / total for irrep, energy in zip(channels, energies)}


def transfer_table(attention: Tensor, group: PermutationGroup) -> dict[str, dict[str, float]]:
    """`channel_transfer` averaged over all maps [..., N, N], as ``table[to][from]`` by names of channels.

    Raises:
        ValueError: as `channel_transfer`.
    """
    names = [irrep.name for irrep in group.channels()]
    shares = channel_transfer(attention.detach(), group).double()
    shares = shares.reshape(-1, *shares.shape[-2:]).mean(0)
    return {to: {source: float(t) for source, t in zip(names, row)} for to, row in zip(names, shares)}


@lru_cache(maxsize=16)
def _channels(group: PermutationGroup, letters: bool) -> Channels:
    return Channels(group, letters=letters)


def _as_real(name: str, x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise ValueError(f"{name} must be real floating point, received {x.dtype}: convert it")
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- bases ----------------------------------------------------------------------------------------------------------


def isotypic_basis(
    group: PermutationGroup, traces: np.ndarray, average: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """A basis of an orthogonal representation R(h) of the group that is adapted to its isotypic parts.

    The sum Σ_h f(h) R(h) with f = Σ_k c_k d_k χ_k / (|G| ⟨χ_k, χ_k⟩) is Σ_k c_k P_k. With c_k = 1, 2, 3 ... over the
    irreps that occur, its eigenvectors are the basis and its eigenvalues name the parts. Rounding in the characters
    moves the eigenvalues alone, as any class function gives a matrix that commutes with the group.

    Args:
        group: the group.
        traces: trace of R on each conjugacy class, [number of classes].
        average: f on the elements [G] -> Σ_h f(h) R(h), [n, n].

    Returns:
        basis [n, n], orthonormal rows; and labels int64 [n], the number of the irrep that each row belongs to.
    """
    characters, dimensions, endomorphisms = _character_table(group)
    sizes = np.array([len(members) for members in group.conjugacy_classes], dtype=np.float64)
    multiplicities = characters @ (sizes * traces) / (group.order * endomorphisms)
    counts = np.rint(multiplicities).astype(np.int64)
    assert np.abs(multiplicities - counts).max() < 1e-6, "the traces are not those of a representation"
    present = np.flatnonzero(counts)
    scale = np.arange(1, len(present) + 1) * dimensions[present] / (group.order * endomorphisms[present])
    weights = (scale @ characters[present])[group.class_of]
    matrix = average(weights)
    # torch's, which keeps to the number of threads that torch was given
    values, vectors = (part.numpy() for part in torch.linalg.eigh(torch.from_numpy((matrix + matrix.T) / 2)))
    order = np.rint(values).astype(np.int64)
    assert np.abs(values - order).max() < 1e-6, "the characters and matrices of the group do not fit together"
    assert np.array_equal(np.bincount(order - 1, minlength=len(present)), (counts * dimensions)[present])
    return vectors.T, present[order - 1]


@lru_cache(maxsize=16)
def _character_table(group: PermutationGroup) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Characters of the real irreps [irreps, classes], their dimensions and dimensions of their commutants."""
    irreps: tuple[Irrep, ...] = group.irreps
    return (
        np.stack([irrep.character for irrep in irreps]),
        np.array([irrep.dimension for irrep in irreps]),
        np.array([irrep.endo for irrep in irreps]),
    )


class OrbitBlock(NamedTuple):
    """Orbits on which the group acts in the same way, point by point, and the channels of any of them."""

    points: np.ndarray
    """int64 [O, M], the points of each orbit; the group permutes the M columns, the same way for each row."""
    basis: np.ndarray
    """[M, M], orthonormal rows adapted to the channels."""
    labels: np.ndarray
    """int64 [M], the number of the irrep of each row of ``basis``."""


def orbit_blocks(
    group: PermutationGroup, num_points: int, image: Callable[[int | np.ndarray, np.ndarray], np.ndarray]
) -> tuple[OrbitBlock, ...]:
    """The channels of a permutation action, orbit by orbit; each point is in one orbit of one block.

    Args:
        group: the group.
        num_points: how many points it acts on.
        image: numbers of elements and of points (arrays that broadcast) -> numbers of the images.

    Raises:
        ValueError: an orbit has more than `MAX_ORBIT` points.
    """
    points = np.arange(num_points)
    first = points.copy()  # smallest point of the orbit
    # The stabiliser of each point, as a sum of random numbers of 64 bits; verified below.
    stabiliser = np.zeros(num_points, dtype=np.uint64)
    tags = np.random.default_rng(0).integers(1, 2**63, size=group.order, dtype=np.uint64)
    for h in range(group.order):
        moved = image(h, points)
        np.minimum(first, moved, out=first)
        stabiliser[moved == points] += tags[h]
    # The base of an orbit is the first of its points with the smallest tag; orbits alike have bases with equal ones.
    ranked = np.lexsort((points, stabiliser, first))
    bases = ranked[np.unique(first[ranked], return_index=True)[1]]
    blocks = []
    elements = np.arange(group.order)
    for tag in np.unique(stabiliser[bases]):
        alike = bases[stabiliser[bases] == tag]
        orbit, transversal = np.unique(image(elements, alike[0]), return_index=True)
        size = len(orbit)
        if size > MAX_ORBIT:
            raise ValueError(
                f"{group!r} has an orbit of {size} points, above the limit of {MAX_ORBIT} for which a basis of "
                "channels is computed: take a smaller window or group"
            )
        members = image(transversal[None, :], alike[:, None])
        columns = np.arange(size)
        for h in group.generator_numbers:
            shuffle = np.searchsorted(orbit, image(h, orbit))
            assert np.array_equal(image(h, members), members[:, shuffle]), "orbits are not alike"
        local = np.searchsorted(orbit, image(elements[:, None], orbit[None, :]))
        fixed = (local == columns).sum(1).astype(np.float64)
        traces = fixed[[members_of_class[0] for members_of_class in group.conjugacy_classes]]

        def average(weights: np.ndarray, local: np.ndarray = local, size: int = size) -> np.ndarray:
            flat = (local * size + np.arange(size)).ravel()
            return np.bincount(flat, np.repeat(weights, size), minlength=size * size).reshape(size, size)

        blocks.append(OrbitBlock(members, *isotypic_basis(group, traces, average)))
    return tuple(blocks)


@lru_cache(maxsize=16)
def _position_blocks(group: PermutationGroup) -> tuple[OrbitBlock, ...]:
    return orbit_blocks(group, group.degree, lambda h, i: group.positions[h, i])


def to_channels(x: Tensor, blocks: tuple[OrbitBlock, ...]) -> Tensor:
    """Coordinates of x [..., N, D] in the bases of the blocks, block after block, orbit after orbit: [..., N, D]."""
    parts = []
    for block in blocks:
        basis = torch.from_numpy(block.basis).to(x)
        orbits = x[..., torch.from_numpy(block.points).to(x.device), :]  # [..., O, M, D]
        parts.append((basis @ orbits).flatten(-3, -2))
    return torch.cat(parts, dim=-2)
