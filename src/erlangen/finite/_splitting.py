"""Real irreps of any finite group, by splitting permutation representations and tensor products.

A self-adjoint matrix that commutes with a representation has the irreps as its eigenspaces, if it is a generic one.
Such a matrix is the average of a random one over the group, and a stabiliser chain makes the average exact and cheap:
every element is a product u_1 u_2 ... of one representative from each level of the chain, so the average over the group
is the averages over the levels in turn. Representations are split in the order of their dimension: the actions on the
orbits of points, on conjugacy classes, and the products of irreps found, until sum d^2 / dim(commutant) is the order.
By Burnside and Brauer's theorem the products of a faithful representation contain every irrep. Characters say, before
a representation is split, whether there is anything new in it.

Shapes: G order, K conjugacy classes, H elements asked for, U representatives on a level, D dimension of a
representation, d of an irrep.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ._closed_forms import ENDO, Kind

if TYPE_CHECKING:
    from .groups import PermutationGroup

MAX_SPLIT_DIMENSION = 3_000


class Model(Protocol):
    """What an irrep must be able to compute."""

    @property
    def dimension(self) -> int: ...
    @property
    def kind(self) -> Kind: ...
    def matrices(self, numbers: np.ndarray) -> np.ndarray: ...
    def character(self, numbers: np.ndarray) -> np.ndarray: ...


def commutant_basis(kind: str, dimension: int) -> np.ndarray:
    """The matrices that commute with an irrep: [1, 2 or 4, d, d], orthogonal, multiplying as 1; 1, i; or 1, i, j, k.

    All our irreps have their basis in the order v, Jv, (Kv, Lv,) w, Jw, ..., so these are the same for all of a kind.
    """
    j = np.array([[0, -1], [1, 0]])
    k = np.array([[0, 0, -1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, -1, 0, 0]])
    if kind == "real":
        units = np.ones((1, 1, 1))
    elif kind == "complex":
        units = np.stack([np.eye(2), j])
    else:
        j = np.kron(np.eye(2), j)
        units = np.stack([np.eye(4), j, k, j @ k])
    return np.kron(np.eye(dimension // units.shape[1])[None], units)


def uniform(seed: int, *shape: int) -> np.ndarray:
    """Numbers in [-1, 1) from the raw stream of PCG64, which numpy promises never to change (its distributions may)."""
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return ((raw >> 11) * 2.0**-52 - 1).reshape(shape)


class Chain:
    """Every element as a product of representatives of the levels of a stabiliser chain.

    Attributes:
        transversals: numbers of the representatives, for each level; the first is the identity.
    """

    def __init__(self, group: PermutationGroup, orbits: Sequence[np.ndarray]):
        """``orbits``: of the points. Orbits under conjugation serve too, where those of the points are larger."""
        self.group = group
        self.transversals: list[np.ndarray] = []
        self._levels: list[tuple[np.ndarray, np.ndarray]] = []  # image of the level's base point [G]; index of an image
        # small orbits first, for short levels; the action on a class by conjugation is one more kind of orbit
        columns = [(len(orbit), 0, int(point)) for orbit in orbits for point in orbit]
        columns += [(len(c), 1, int(x)) for c in group.conjugacy_classes[1:] for x in c[:4]]
        remaining = np.arange(group.order)
        for size, kind, base in sorted(columns, key=lambda column: column[:2]):
            if len(remaining) == 1:
                break
            if size == 1:
                continue
            images = self._images(kind, base, remaining)
            if (images == images[0]).all():
                continue
            values, first = np.unique(images, return_index=True)
            order = np.argsort(remaining[first])  # the identity comes first, whatever the number of its image
            lookup = np.full(max(group.order, group.points.shape[1]), -1)
            lookup[values[order]] = np.arange(len(values))
            self.transversals.append(remaining[first][order])
            self._levels.append((self._images(kind, base, np.arange(group.order)), lookup))
            remaining = remaining[images == images[0]]
        assert np.prod([len(u) for u in self.transversals], dtype=np.int64) == group.order

    def _images(self, kind: int, base: int, numbers: np.ndarray) -> np.ndarray:
        if kind == 0:
            return self.group.points[numbers, base]
        return np.asarray(self.group.multiply(self.group.multiply(numbers, base), self.group.inverse(numbers)))

    def factors(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Indices of the representatives whose product each element is: [H] -> a list of [H], one a level."""
        factors = []
        for (images, lookup), transversal in zip(self._levels, self.transversals):
            factors.append(lookup[images[numbers]])
            numbers = np.asarray(self.group.multiply(self.group.inverse(transversal[factors[-1]]), numbers))
        return factors


@dataclass(frozen=True, eq=False)
class SplitIrrep:
    """An irrep by its matrices on the representatives of a chain.

    Attributes:
        tables: for each level, [U, d, d].
    """

    chain: Chain
    kind: Kind
    tables: list[np.ndarray]

    @property
    def dimension(self) -> int:
        return self.tables[0].shape[-1]

    def matrices(self, numbers: np.ndarray) -> np.ndarray:
        """[H] -> [H, d, d]."""
        first, *others = self.chain.factors(np.asarray(numbers))
        product = self.tables[0][first]
        for table, factor in zip(self.tables[1:], others):
            product = product @ table[factor]
        return product

    def character(self, numbers: np.ndarray) -> np.ndarray:
        """[H] -> [H]."""
        return np.trace(self.matrices(numbers), axis1=-2, axis2=-1)


# --- representations to split ----------------------------------------------------------------------------------------


class _Permutations:
    """The action on an orbit of points (kind 0), or by conjugation on a class of elements (kind 1)."""

    def __init__(self, chain: Chain, points: np.ndarray, kind: int, representatives: np.ndarray):
        self.dimension = len(points)
        lookup = np.zeros(int(points.max()) + 1, np.int64)
        lookup[points] = np.arange(len(points))

        def inverse_images(numbers: np.ndarray) -> np.ndarray:
            """[H] -> [H, D], the sources of the points."""
            if kind == 0:
                return np.argsort(lookup[chain.group.points[numbers[:, None], points]], axis=-1)
            inverse = np.asarray(chain.group.inverse(numbers))[:, None]
            conjugates = chain.group.multiply(chain.group.multiply(inverse, points), numbers[:, None])
            return lookup[np.asarray(conjugates)]

        self._inverse_images = inverse_images
        self._sources = [inverse_images(numbers) for numbers in chain.transversals]
        self._class_sources = inverse_images(representatives)

    def average(self, matrix: np.ndarray) -> np.ndarray:
        """The mean of U M U^T over the group: [D, D] -> [D, D]."""
        for sources in reversed(self._sources):
            total = np.zeros_like(matrix)
            for source in sources:
                total += matrix[source[:, None], source]
            matrix = total / len(sources)
        return matrix

    def restrict(self, basis: np.ndarray) -> list[np.ndarray]:
        """V^T U V for each representative of the chain, by levels: [D, d] -> list of [U, d, d]."""
        return [np.stack([basis.T @ basis[source] for source in sources]) for sources in self._sources]

    def class_traces(self, basis: np.ndarray) -> np.ndarray:
        """Traces on a subspace at a representative of each class: [D, d] -> [K]."""
        return np.array([np.vdot(basis, basis[source]) for source in self._class_sources])


class _Product:
    """The tensor product of two representations, D = d_1 d_2."""

    def __init__(self, chain: Chain, left: Model, right: Model, representatives: np.ndarray):
        self.dimension = left.dimension * right.dimension
        self._shape = left.dimension, right.dimension
        self._pairs = [(left.matrices(numbers), right.matrices(numbers)) for numbers in chain.transversals]
        self._class_pairs = left.matrices(representatives), right.matrices(representatives)

    def _act(self, left: np.ndarray, right: np.ndarray, x: np.ndarray) -> np.ndarray:
        """[d1, d1], [d2, d2], [D, C] -> [D, C]."""
        moved = left @ x.reshape(self._shape[0], -1)
        return (right @ moved.reshape(*self._shape, -1)).reshape(x.shape)

    def average(self, matrix: np.ndarray) -> np.ndarray:
        for lefts, rights in reversed(self._pairs):
            total = np.zeros_like(matrix)
            for left, right in zip(lefts, rights):
                total += self._act(left, right, np.ascontiguousarray(self._act(left, right, matrix).T)).T
            matrix = total / len(lefts)
        return matrix

    def restrict(self, basis: np.ndarray) -> list[np.ndarray]:
        return [
            np.stack([basis.T @ self._act(left, right, basis) for left, right in zip(lefts, rights)])
            for lefts, rights in self._pairs
        ]

    def class_traces(self, basis: np.ndarray) -> np.ndarray:
        return np.array([np.vdot(basis, self._act(left, right, basis)) for left, right in zip(*self._class_pairs)])


# --- splitting -------------------------------------------------------------------------------------------------------


class _Characters:
    """Class functions [K] and their products."""

    def __init__(self, group: PermutationGroup):
        classes = group.conjugacy_classes
        self.representatives = np.array([c[0] for c in classes])
        self.weights = np.array([len(c) for c in classes]) / group.order
        squares = group.multiply(self.representatives, self.representatives)
        self.class_of_square = group.class_of[squares]

    def inner(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """[..., K], [..., K] -> [...]."""
        return (self.weights * a * b).sum(-1)

    def kind(self, character: np.ndarray) -> Kind | None:
        """The kind of an irrep with this character, None if it is of no irrep.

        Squared norm and Frobenius-Schur indicator are (1, 1), (2, 0) and (4, -2); a sum of real irreps never has these.
        """
        norm = self.inner(character, character)
        indicator = (self.weights * character[self.class_of_square]).sum()
        expected: dict[Kind, tuple[int, int]] = {"real": (1, 1), "complex": (2, 0), "quaternionic": (4, -2)}
        near = [k for k, (n, i) in expected.items() if abs(norm - n) + abs(indicator - i) < 1e-6]
        return near[0] if near else None


def split_irreps(group: PermutationGroup, known: Sequence[Model]) -> list[Model]:
    """All irreps of a group, of which ``known`` are found already.

    Raises:
        ValueError: what is left would need a representation of dimension above 3,000.
    """
    orbits = _orbits(group)
    chain = Chain(group, orbits)
    functions = _Characters(group)
    models = list(known)
    characters = [model.character(functions.representatives) for model in models]
    found = sum(model.dimension**2 // ENDO[model.kind] for model in models)

    # candidates, smallest first; a product's are pushed when its second factor is found
    candidates: list[tuple[int, int, int, int]] = [(len(orbit), 0, k, 0) for k, orbit in enumerate(orbits)]
    candidates += [(len(c), 1, k, 0) for k, c in enumerate(group.conjugacy_classes)]
    heapq.heapify(candidates)
    paired = len(models)  # products of the known ones are known
    fixed = group.points[functions.representatives] == np.arange(group.points.shape[1])

    def remainder(character: np.ndarray) -> np.ndarray:
        table = np.stack(characters)
        multiplicities = np.rint(functions.inner(table, character) / functions.inner(table, table))
        return character - multiplicities @ table

    while found < group.order:
        if not candidates or candidates[0][0] > MAX_SPLIT_DIMENSION:
            raise ValueError(
                f"the irreps of a group must be parts of representations of dimension at most {MAX_SPLIT_DIMENSION}, "
                f"its actions on points and classes and products of its irreps: of {group!r} those account for "
                f"{found} of its order {group.order}; use a smaller group, or one that acts on fewer points"
            )
        _, kind, first, second = heapq.heappop(candidates)
        if kind == 0:
            character = fixed[:, orbits[first]].sum(1).astype(float)
        elif kind == 1:
            numbers = group.conjugacy_classes[first]
            representatives = functions.representatives[:, None]
            commute = group.multiply(representatives, numbers) == group.multiply(numbers, representatives)
            character = np.asarray(commute).sum(1).astype(float)
        else:
            character = characters[first] * characters[second]
        left = remainder(character)
        if functions.inner(left, left) < 0.5:
            continue
        if kind == 2:
            action = _Product(chain, models[first], models[second], functions.representatives)
        else:
            numbers = orbits[first] if kind == 0 else group.conjugacy_classes[first]
            action = _Permutations(chain, numbers, kind, functions.representatives)
        for model, new in _parts(action, chain, functions, characters, left):
            models.append(model)
            characters.append(new)
            found += model.dimension**2 // ENDO[model.kind]
        if found < group.order:
            table = np.stack(characters)
            norms = functions.inner(table, table)
            for k in range(paired, len(models)):
                products = table[: k + 1] * table[k]
                weights = (products * functions.weights) @ table.T / norms
                missing = np.abs(products - np.rint(weights) @ table).max(1) > 1e-6
                for j in np.flatnonzero(missing):
                    heapq.heappush(candidates, (models[j].dimension * models[k].dimension, 2, int(j), k))
            paired = len(models)
    return models


def _orbits(group: PermutationGroup) -> list[np.ndarray]:
    """Orbits of the points, each sorted, of more than one point."""
    seen = np.zeros(group.points.shape[1], bool)
    orbits = []
    for point in range(len(seen)):
        if not seen[point]:
            orbit = np.unique(group.points[:, point])
            seen[orbit] = True
            if len(orbit) > 1:
                orbits.append(orbit)
    return orbits


def _parts(
    action: _Permutations | _Product, chain: Chain, functions: _Characters, known: list[np.ndarray], left: np.ndarray
) -> list[tuple[SplitIrrep, np.ndarray]]:
    """The irreps in a representation that are not among the known ones, which leave the character ``left`` [K]."""
    size = action.dimension
    for seed in range(3):  # an unlucky draw has equal eigenvalues; none has been seen
        random = uniform(seed, size, size)
        values, vectors = np.linalg.eigh(action.average(random + random.T))
        cuts = np.flatnonzero(np.diff(values) > 1e-8 * np.abs(values).max()) + 1
        parts: list[tuple[np.ndarray, np.ndarray, Kind]] = []
        table, rest = np.stack(known), left
        for basis in np.split(vectors, cuts, axis=1):
            if basis.shape[1] > rest[0] + 0.5:
                continue
            character = action.class_traces(basis)
            kind = functions.kind(character)
            if kind is None or (functions.inner(table, character) > 0.5).any():
                continue
            parts.append((basis, character, kind))
            table = np.concatenate([table, character[None]])
            rest = rest - functions.inner(rest, character) / functions.inner(character, character) * character
            if functions.inner(rest, rest) < 0.5:
                break
        if functions.inner(rest, rest) < 0.5:
            break
    else:
        raise AssertionError(f"a representation of dimension {size} did not split")

    random = uniform(3, 2, size, size)
    units = [action.average(r - r.T) for r in random] if any(kind != "real" for *_, kind in parts) else []
    irreps = []
    for basis, _, kind in parts:
        basis = _adapted_basis(basis, units, kind)
        tables = [_polished(table, kind) for table in action.restrict(basis)]
        irrep = SplitIrrep(chain, kind, tables)
        irreps.append((irrep, irrep.character(functions.representatives)))
    return irreps


def _adapted_basis(basis: np.ndarray, averages: list[np.ndarray], kind: Kind) -> np.ndarray:
    """An orthonormal basis v, Jv, (Kv, Lv,) w, ... of a subspace that depends on the subspace alone: [D, d] -> [D, d].

    ``eigh`` returns some basis, which differs from one machine to the next; here each v is the projection of the
    coordinate vector that is longest there, the first of those equally long, so that weights learned in this basis mean
    the same everywhere. J and K come from the averages of two antisymmetric matrices.
    """
    d = basis.shape[1]
    units = [np.eye(d)]
    for average in averages[: {"real": 0, "complex": 1, "quaternionic": 2}[kind]]:
        unit = basis.T @ average @ basis
        unit = unit - unit.T
        for earlier in units[1:]:
            unit -= np.vdot(earlier, unit) / d * earlier
        units.append(unit * np.sqrt(d) / np.linalg.norm(unit))
    if kind == "quaternionic":
        units.append(units[1] @ units[2])
    chosen = np.zeros((0, d))
    for _ in range(d // len(units)):
        free = basis - (basis @ chosen.T) @ chosen
        lengths = np.square(free).sum(1)
        row = int(np.argmax(lengths > (1 - 1e-6) * lengths.max()))
        vector = free[row]
        vector = vector - chosen.T @ (chosen @ vector)
        vector /= np.linalg.norm(vector)
        chosen = np.concatenate([chosen, np.stack([unit @ vector for unit in units])])
    return basis @ chosen.T


def _polished(matrices: np.ndarray, kind: Kind) -> np.ndarray:
    """Matrices that nearly are orthogonal and commute with the commutant, made so to rounding: [U, d, d]."""
    units = commutant_basis(kind, matrices.shape[-1])
    matrices = np.mean([unit @ matrices @ unit.T for unit in units], axis=0)
    for _ in range(2):
        matrices = 1.5 * matrices - 0.5 * matrices @ (matrices.mT @ matrices)
    return matrices
