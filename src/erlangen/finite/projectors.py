"""The isotypic channels of positions: P_k projects on the sum of all copies of the real irrep k among them.

P_k = d / (G <chi, chi>) sum_h chi(h) P_h with the real character chi of k. The squared norm <chi, chi> = 1, 2, 4 for
the real, complex, quaternionic kind is part of the formula: without it, as in arXiv:2507.14908, P_k is no projector
unless k is of the real kind. The P_k are symmetric, idempotent, orthogonal to each other, sum to the identity and
commute with the group.

:func:`projectors` gives them as matrices. :class:`Channels` applies them without: in closed forms (see ``irreps.py``)
by a Fourier transform on each orbit of the abelian subgroup, otherwise by one small matrix for all orbits alike.

Shapes: G order, K channels, N positions, L letters, n = N or N L points, O orbits of a size, M points of an orbit,
D features, C columns, F characters of an abelian group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ._closed_forms import AbelianCharacters, Cosets, InducedIrrep, LinearIrrep
from .irreps import Irrep

if TYPE_CHECKING:
    from .groups import PermutationGroup

MAX_ENTRIES = 2**28  # of all projectors together: 2 GiB
_MAX_BLOCK_ENTRIES = 2**25  # of the matrices of one orbit; above, sums over the group
_CHUNK = 2**20  # entries of a temporary array
_TOLERANCE = 1e-12


class ProjectorErrors(NamedTuple):
    """Largest entries of what should vanish, of projectors P_k.

    Attributes:
        symmetric: P_k - P_k^T.
        idempotent: P_k P_k - P_k.
        orthogonal: P_k P_l, k ≠ l; of many large projectors, P_k P_l x for four normal vectors x.
        complete: sum_k P_k - 1.
        commuting: P_h P_k P_h^T - P_k, for generators h.
    """

    symmetric: float
    idempotent: float
    orthogonal: float
    complete: float
    commuting: float


def projectors(group: PermutationGroup, dtype: torch.dtype = torch.float64, letters: bool = False) -> Tensor:
    """The projectors on the channels that occur, ``group.channels(letters)``: [K, n, n], n = N or with letters N L.

    With letters, the point of letter a at position i is number i L + a. All five :func:`projector_errors` are verified
    to be at most 1e-12 in float64 before the result is rounded to ``dtype``.

    Raises:
        ValueError: letters of a group without, a dtype that is not floating, or more than 2^28 entries: use
            :class:`Channels`.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"projectors: dtype is a floating one, received {dtype}")
    channels = Channels(group, letters=letters)
    count, n = len(channels.irreps), channels.num_points
    if count * n * n > MAX_ENTRIES:
        raise ValueError(
            f"projectors: {count} matrices {n} x {n} of {group!r} have more than {MAX_ENTRIES} entries; "
            "Channels(group).apply(k, x) and .energies(x) do without them"
        )
    identity = torch.eye(n, dtype=torch.float64)
    result = torch.stack([channels.project_points(k, identity) for k in range(count)])
    errors = projector_errors(result, group, letters=letters)
    assert max(errors) <= _TOLERANCE, f"projectors of {group!r}: {errors}"
    return result.to(dtype)


def projector_errors(projectors: Tensor, group: PermutationGroup, letters: bool = False) -> ProjectorErrors:
    """How far matrices [K, n, n] are from orthogonal projectors that sum to the identity and commute with the group."""
    count, n, _ = projectors.shape
    identity = torch.eye(n, dtype=projectors.dtype, device=projectors.device)
    if count**2 * n**3 <= 2**31:
        probe = projectors
    else:
        generator = torch.Generator().manual_seed(0)
        probe = projectors @ torch.randn(n, 4, generator=generator, dtype=torch.float64).to(projectors)
    orthogonal = 0.0
    for k in range(count):
        others = projectors[k] @ probe.movedim(0, 1).flatten(1)
        others.unflatten(1, (count, -1))[:, k] = 0
        orthogonal = max(orthogonal, _largest(others))
    commuting = 0.0
    for h in group.generator_numbers:
        points = torch.from_numpy(group.point_map(h) if letters else group.position_map(h)).to(projectors.device)
        commuting = max(commuting, _largest(projectors[:, points][:, :, points] - projectors))
    return ProjectorErrors(
        symmetric=_largest(projectors - projectors.mT),
        idempotent=_largest(projectors @ projectors - projectors),
        orthogonal=orthogonal,
        complete=_largest(projectors.sum(0) - identity),
        commuting=commuting,
    )


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


class Channels:
    """The channels of positions, or with ``letters`` of (position, letter) points, without any [n, n] matrix.

    Attributes:
        group: the group.
        letters: whether letters move too.
        irreps: of the channels, ``group.channels(letters)``.
        num_points: n, N or N L.
    """

    def __init__(self, group: PermutationGroup, letters: bool = False):
        """
        Raises:
            ValueError: ``letters`` of a group without.
        """
        if letters and not group.num_letters:
            raise ValueError(f"Channels: letters=True needs a group that moves letters, received {group!r}")
        self.group = group
        self.letters = bool(letters)
        self.irreps: tuple[Irrep, ...] = group.channels(letters)
        self.num_points = group.degree * (group.num_letters if letters else 1)
        self._generators = [group.point_map(h) if letters else group.position_map(h) for h in group.generator_numbers]
        models = [irrep._model for irrep in group.irreps]
        closed = all(isinstance(model, LinearIrrep | InducedIrrep) for model in models)
        self._parts: _Parts = _Frequencies(self) if closed else _Blocks(self)

    def __repr__(self) -> str:
        return f"<Channels {', '.join(irrep.name for irrep in self.irreps)} of {self.group!r}>"

    def apply(self, k: int | Irrep, x: Tensor) -> Tensor:
        """P_k x, for the channel of that index in ``irreps`` or that irrep: [..., N, D], or with letters [..., N, L].

        Raises:
            ValueError: a wrong shape, ``x`` is not floating, or there is no such channel.
        """
        if isinstance(k, Irrep):
            found = [i for i, irrep in enumerate(self.irreps) if (irrep.group, irrep.number) == (k.group, k.number)]
            if not found:
                raise ValueError(f"{self!r}: irrep {k.name} of {k.group!r} is not among the channels")
            k = found[0]
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 0 <= k < len(self.irreps):
            raise ValueError(f"{self!r}: channels are numbered 0 to {len(self.irreps) - 1}, received {k!r}")
        return self.project_points(int(k), self._points(x)).reshape(x.shape)

    def energies(self, x: Tensor) -> Tensor:
        """Squared norms of P_k x: [..., N, D], or with letters [..., N, L] -> [..., K]. They sum to that of x.

        Raises:
            ValueError: a wrong shape, or ``x`` is not floating.
        """
        points = self._points(x)
        columns = points.reshape(-1, *points.shape[-2:]).movedim(1, 0)  # [n, B, D]
        energies = self._parts.energies(columns.flatten(1))  # [K, B D]
        return energies.unflatten(1, columns.shape[1:]).sum(2).T.reshape(*x.shape[:-2], -1)

    def project_points(self, k: int, x: Tensor) -> Tensor:
        """P_k x for x [..., n, D]: with letters, the points of all positions and letters on one axis."""
        return self._parts.apply(k, x)

    def _points(self, x: Tensor) -> Tensor:
        degree, letters = self.group.degree, self.group.num_letters
        wanted = f"[..., {degree}, {letters if self.letters else 'D'}]"
        fits = x.dim() >= 2 and x.shape[-2] == degree and (not self.letters or x.shape[-1] == letters)
        if not fits or not x.is_floating_point():
            raise ValueError(f"{self!r}: features are floating {wanted}, received {list(x.shape)} of {x.dtype}")
        return x.flatten(-2)[..., None] if self.letters else x


class _Parts(Protocol):
    def apply(self, k: int, x: Tensor) -> Tensor: ...
    def energies(self, x: Tensor) -> Tensor: ...


# --- closed forms ----------------------------------------------------------------------------------------------------


class _Orbits:
    """Orbits of points, gathered by size.

    Attributes:
        order: points in the order of size of orbit, orbit: [n].
        inverse: place of each point in ``order``: [n].
        spans: (slice of ``order``, O, M) for each size.
    """

    def __init__(self, orbits: list[np.ndarray]):
        orbits = sorted(orbits, key=len)
        self.order = np.concatenate(orbits)
        self.inverse = np.argsort(self.order)
        sizes, counts = np.unique([len(orbit) for orbit in orbits], return_counts=True)
        stops = np.cumsum(sizes * counts)
        self.spans = [(slice(b - o * m, b), int(o), int(m)) for m, o, b in zip(sizes, counts, stops)]


class _Frequencies:
    """Projectors from characters of an abelian group A: the whole group, or half of it.

    On an orbit of A with a first point o, a character f that is trivial where A fixes o is the function f(a) at a o,
    and the projector on f is f times the mean of conj(f) x over the orbit; P_a multiplies f by conj(f(a)). The channel
    of an irrep is the sum over its characters; if these extend from A to all of A and t A, of (x + f(t) P_t x) / 2.
    One of each pair of conjugate characters is kept, with weight 2.
    """

    def __init__(self, channels: Channels):
        group = channels.group
        models = [irrep._model for irrep in group.irreps]
        cosets = next((model.cosets for model in models if isinstance(model, InducedIrrep)), None)
        linear = next(model.characters for model in models if isinstance(model, LinearIrrep))
        characters = cosets.characters if cosets else linear
        moves = [group.point_map(a) if channels.letters else group.position_map(a) for a in characters.generators]
        orbits, exponents = _orbits_with_words(moves, channels.num_points)
        self._orbits = _Orbits(orbits)
        self._words = exponents[self._orbits.order]
        self._source = None  # of P_t x
        if cosets:
            points = group.point_map(cosets.t) if channels.letters else group.position_map(cosets.t)
            self._source = np.argsort(points)[self._orbits.order]
        # f occurs on an orbit if it is trivial on these words, which fix its first point (Schreier's generators)
        loops = [np.zeros((0, 1 + exponents.shape[1]), np.int64)]
        orbit_of = np.empty(channels.num_points, np.int64)
        for number, orbit in enumerate(sorted(orbits, key=len)):
            orbit_of[orbit] = number
        for s, points in enumerate(moves):
            words = exponents - exponents[points]
            words[:, s] += 1
            loops.append(np.column_stack([orbit_of, words]))
        loops = np.unique(np.concatenate(loops), axis=0)
        self._loops = loops[loops[:, 1:].any(1)]
        self._num_orbits = len(orbits)
        self._orbit_of = orbit_of[self._orbits.order]

        # one row for each character kept: its channel, its phases on A's generators, their unit, its phase at t
        self._rows = [self._rows_of(k, irrep, cosets, characters) for k, irrep in enumerate(channels.irreps)]
        self._first = [rows[0] for rows in self._rows]
        self._second = [rows[1] for rows in self._rows if len(rows) > 1]

    @staticmethod
    def _rows_of(k: int, irrep: Irrep, cosets: Cosets | None, own: AbelianCharacters) -> list[_Row]:
        model = irrep._model
        if isinstance(model, InducedIrrep):
            is_signs = model.kind == "real" and not (2 * model.frequency % own.exponent).any()
            weight = 1 if is_signs else 2
            pair = is_signs or model.kind == "complex"
            kept = [model.frequency, model.conjugate] if pair else [model.frequency]
            return [_Row(k, weight, frequency, own, None) for frequency in kept]
        assert isinstance(model, LinearIrrep)
        phases = model.characters.coordinates[list(own.generators)] @ model.frequency % model.characters.exponent
        at_t = None
        if cosets:
            phase = model.characters.coordinates[cosets.t] @ model.frequency
            at_t = float(model.characters.cos(phase)), float(model.characters.sin(phase))
        return [_Row(k, 1 if model.kind == "real" else 2, phases, model.characters, at_t)]

    def _waves(self, rows: list[_Row]) -> tuple[np.ndarray, np.ndarray]:
        """Cosine and sine of characters at the sorted points, zero on orbits where they do not occur: [F, n] each."""
        cos, sin = np.empty((2, len(rows), len(self._words)))
        for f, row in enumerate(rows):
            phases = self._words @ row.frequency
            cos[f], sin[f] = row.characters.cos(phases), row.characters.sin(phases)
            wrong = self._loops[(self._loops[:, 1:] @ row.frequency % row.characters.exponent) != 0, 0]
            if len(wrong):
                defined = np.ones(self._num_orbits)
                defined[wrong] = 0
                cos[f] *= defined[self._orbit_of]
                sin[f] *= defined[self._orbit_of]
        return cos, sin

    def apply(self, k: int, x: Tensor) -> Tensor:
        """[..., n, D] -> [..., n, D]."""
        real = x.index_select(-2, _index(self._orbits.order, x))
        total = torch.zeros_like(real)
        for row in self._rows[k]:
            cos_1n, sin_1n = (torch.from_numpy(wave).to(x) for wave in self._waves([row]))
            y_real, y_imag = real, torch.zeros_like(real)
            if row.at_t is not None:
                moved = x.index_select(-2, _index(self._source, x))
                y_real, y_imag = (real + row.at_t[0] * moved) / 2, row.at_t[1] / 2 * moved
            parts = []
            for span, count, size in self._orbits.spans:
                cos, sin = (wave[0, span].reshape(count, size, 1) for wave in (cos_1n, sin_1n))
                a, b = (y[..., span, :].unflatten(-2, (count, size)) for y in (y_real, y_imag))
                mean_real = (cos * a + sin * b).mean(-2, keepdim=True)
                mean_imag = (cos * b - sin * a).mean(-2, keepdim=True)
                parts.append((mean_real * cos - mean_imag * sin).flatten(-3, -2))
            total = total + row.weight * torch.cat(parts, -2)
        return total.index_select(-2, _index(self._orbits.inverse, x))

    def energies(self, x: Tensor) -> Tensor:
        """[n, C] -> [K, C]."""
        energies = self._energies_of(self._first, x)
        if self._second:
            numbers = torch.tensor([row.channel for row in self._second], device=x.device)
            energies = energies.index_add(0, numbers, self._energies_of(self._second, x))
        return energies

    def _energies_of(self, rows: list[_Row], x: Tensor) -> Tensor:
        real = x.index_select(0, _index(self._orbits.order, x))
        size = max(1, _CHUNK // max(len(x), self._num_orbits * x.shape[1]))
        chunks = []
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            waves = [torch.from_numpy(wave).to(x) for wave in self._waves(chunk)]
            energy = x.new_zeros(len(chunk), x.shape[1])
            moved = None
            if any(row.at_t is not None for row in chunk):
                moved = x.index_select(0, _index(self._source, x))
            # the coefficient is own * that of x + (cos_t + i sin_t) * that of P_t x
            factors = [
                (1.0, 0.0, 0.0) if row.at_t is None else (0.5, row.at_t[0] / 2, row.at_t[1] / 2) for row in chunk
            ]
            own, cos_t, sin_t = torch.tensor(factors, dtype=x.dtype, device=x.device).T[..., None]
            for span, count, points in self._orbits.spans:
                cos, sin = (wave[:, span].unflatten(1, (count, points)).movedim(1, 0) for wave in waves)  # [O, F, M]
                y = real[span].unflatten(0, (count, points))  # [O, M, C]
                a, b = cos @ y, -(sin @ y)
                if moved is not None:
                    z = moved[span].unflatten(0, (count, points))
                    c, d = cos @ z, -(sin @ z)
                    a, b = own * a + cos_t * c - sin_t * d, own * b + cos_t * d + sin_t * c
                energy = energy + (a.square() + b.square()).sum(0) / points
            weights = torch.tensor([row.weight for row in chunk]).to(x)
            chunks.append(weights[:, None] * energy)
        return torch.cat(chunks)


class _Row(NamedTuple):
    channel: int
    weight: int
    frequency: np.ndarray
    characters: AbelianCharacters
    at_t: tuple[float, float] | None


def _orbits_with_words(moves: list[np.ndarray], num_points: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Orbits of commuting permutations, and how often each is applied to get from the first point there: [n, R]."""
    exponents = np.full((num_points, len(moves)), 0)
    seen = np.zeros(num_points, bool)
    orbits = []
    for first in range(num_points):
        if seen[first]:
            continue
        seen[first] = True
        orbit = np.array([first])
        for s, points in enumerate(moves):
            # what the earlier permutations reach, moved by this one until it comes back
            images = points[orbit]
            layers, step = [orbit], 0
            while not seen[images[0]]:
                step += 1
                seen[images] = True
                exponents[images] = exponents[orbit]
                exponents[images, s] = step
                layers.append(images)
                images = points[images]
            orbit = np.concatenate(layers)
        orbits.append(orbit)
    return orbits, exponents


# --- general groups --------------------------------------------------------------------------------------------------


class _Blocks:
    """One matrix for all orbits alike and each channel; for an orbit too large for that, sums over the group."""

    def __init__(self, channels: Channels):
        group = channels.group
        self._scale = np.array([i.dimension / (i.endo * group.order) for i in channels.irreps])
        self._class_of = group.class_of
        self._characters = np.stack([irrep.character for irrep in channels.irreps])
        images = group.points if channels.letters else group.positions
        alike: dict[tuple, list[np.ndarray]] = {}
        local = np.empty(channels.num_points, np.int64)
        for orbit in _orbits_of(channels._generators):
            local[orbit] = np.arange(len(orbit))
            alike.setdefault(tuple(tuple(local[g[orbit]]) for g in channels._generators), []).append(orbit)
        # orbits [O, M], their matrices [K, M, M] if small, and images of the first of them [G, M]
        self._kinds: list[tuple[np.ndarray, np.ndarray | None, np.ndarray]] = []
        for orbits in alike.values():
            local[orbits[0]] = np.arange(len(orbits[0]))
            first = local[images[:, orbits[0]]]
            small = len(channels.irreps) * first.shape[1] ** 2 <= _MAX_BLOCK_ENTRIES
            self._kinds.append((np.stack(orbits), self._matrices(first) if small else None, first))
        order = np.concatenate([orbits.reshape(-1) for orbits, _, _ in self._kinds])
        self._inverse = np.argsort(order)

    def _matrices(self, images: np.ndarray) -> np.ndarray:
        """The character formula, by counts of the elements of a class that take j to i: images [G, M] -> [K, M, M]."""
        size = images.shape[1]
        columns, num_classes = np.arange(size), self._characters.shape[1]
        members = np.argsort(self._class_of, kind="stable")
        starts = np.searchsorted(self._class_of[members], np.arange(num_classes + 1))
        matrices = np.zeros((len(self._characters), size * size))
        step = max(1, _CHUNK // (size * size))
        for first in range(0, num_classes, step):
            last = min(first + step, num_classes)
            numbers = members[starts[first] : starts[last]]
            entries = (self._class_of[numbers, None] - first) * size * size + images[numbers] * size + columns
            counts = np.bincount(entries.reshape(-1), minlength=(last - first) * size * size)
            matrices += self._characters[:, first:last] @ counts.reshape(last - first, -1).astype(float)
        return (self._scale[:, None] * matrices).reshape(-1, size, size)

    def apply(self, k: int, x: Tensor) -> Tensor:
        """[..., n, D] -> [..., n, D]."""
        parts = []
        for orbits, matrices, images in self._kinds:
            y = x.index_select(-2, _index(orbits.reshape(-1), x)).unflatten(-2, orbits.shape)
            if matrices is not None:
                parts.append((torch.from_numpy(matrices[k]).to(x) @ y).flatten(-3, -2))
                continue
            weights = self._characters[k][self._class_of]
            total = torch.zeros_like(y)
            for h in np.flatnonzero(weights):
                total = total + float(weights[h]) * y.index_select(-2, _index(np.argsort(images[h]), x))
            parts.append((float(self._scale[k]) * total).flatten(-3, -2))
        return torch.cat(parts, -2).index_select(-2, _index(self._inverse, x))

    def energies(self, x: Tensor) -> Tensor:
        """[n, C] -> [K, C]."""
        return torch.stack([self.apply(k, x).square().sum(0) for k in range(len(self._scale))])


def _orbits_of(generators: list[np.ndarray]) -> list[np.ndarray]:
    """The orbits of points under permutations, each in the order in which they reach it from its first point."""
    seen = np.zeros(len(generators[0]), bool)
    orbits = []
    for first in range(len(seen)):
        if seen[first]:
            continue
        seen[first] = True
        orbit = [first]
        for point in orbit:  # grows while we walk along it
            for points in generators:
                image = int(points[point])
                if not seen[image]:
                    seen[image] = True
                    orbit.append(image)
        orbits.append(np.array(orbit))
    return orbits


def _index(places: np.ndarray | None, x: Tensor) -> Tensor:
    return torch.as_tensor(places, device=x.device)
