"""Real irreducible representations of a finite group, and the channels that carry them.

Every irrep is given by real orthogonal matrices. Those that commute with all of them form the real numbers, the complex
numbers or the quaternions (Schur; Frobenius): the irrep's ``kind``, with ``endo`` = 1, 2 or 4 their dimension. The
regular representation contains an irrep of dimension d exactly d / endo times, so sum d^2 / endo is the group's order.

Irreps are computed, not looked up: in closed form if the group is abelian or has an abelian subgroup of index two
(cyclic, dihedral, quaternion groups, reversals, reverse complement, of any size), and otherwise by splitting
permutation representations and tensor products with random matrices that commute with the group
(``_closed_forms.py``, ``_splitting.py``). Names, order and matrices are the same at every construction.

The Fourier layout of channels: irreps in the order of ``group.irreps``; within one, [d, copies] flattened; h acts on
the coordinate, x -> x rho(h)^T.

Shapes: G order, K conjugacy classes, d dimension of an irrep.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ._closed_forms import ENDO, Kind, abelian_half, induced_irreps, linear_irreps
from ._splitting import Model, commutant_basis, split_irreps

if TYPE_CHECKING:
    from .groups import Element, PermutationGroup

MAX_FOURIER_ORDER = 8_192
_CHECKED_IRREPS = 600  # with more, character orthogonality (irreps^2 x classes) is left to the tests


class _Classes:
    """What all irreps of a group share."""

    def __init__(self, group: PermutationGroup):
        self.group = group
        self.representatives = np.array([numbers[0] for numbers in group.conjugacy_classes])
        self.weights = np.array([len(numbers) for numbers in group.conjugacy_classes]) / group.order

    @cached_property
    def fixed_positions(self) -> np.ndarray:
        """The character of the action on positions: [K]."""
        return self.group.permutation_character()

    def character(self, model: Model) -> np.ndarray:
        """[K]; integers are exact."""
        character = model.character(self.representatives)
        whole = np.rint(character)
        return np.where(np.abs(character - whole) < 1e-9, whole, character) + 0.0  # no -0


@dataclass(frozen=True, eq=False)
class Irrep:
    """A real irreducible representation; made by :func:`real_irreps`.

    Attributes:
        name: ``"1"`` is trivial; ``"sign"`` the signature of the position permutation, or where that is trivial the
            only other irrep of dimension one; else the dimension and a letter, ``"2a"``, ``"2b"``.
        number: its index in ``group.irreps``.
        dimension: d.
        kind: ``"real"``, ``"complex"`` or ``"quaternionic"``.
        group: whose irrep it is.
    """

    name: str
    number: int
    dimension: int
    kind: Kind
    group: PermutationGroup = field(repr=False)
    _model: Model = field(repr=False)
    _classes: _Classes = field(repr=False)

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple:
        return _irrep_of, (self.group, self.number)

    def __deepcopy__(self, memo: dict) -> Irrep:
        return self

    @property
    def endo(self) -> int:
        """Dimension of the commutant: 1, 2 or 4."""
        return ENDO[self.kind]

    @cached_property
    def character(self) -> np.ndarray:
        """Traces on ``group.conjugacy_classes``: [K]. The squared norm, over the group, is ``endo``."""
        return _read_only(self._classes.character(self._model))

    @cached_property
    def multiplicity(self) -> int:
        """How often it occurs in the representation on positions, as a real irrep."""
        shared = (self._classes.weights * self._classes.fixed_positions * self.character).sum()
        return round(float(shared) / self.endo)

    @cached_property
    def matrices(self) -> np.ndarray:
        """Of all elements by number: float64 [G, d, d]. Made when asked for, and kept."""
        return _read_only(self._model.matrices(np.arange(self.group.order)))

    def matrix(self, h: int | Element) -> np.ndarray:
        """Of one element, given by number or itself: float64 [d, d]."""
        if "matrices" in self.__dict__:
            return self.matrices[_number(self.group, h)]
        return self._model.matrices(np.array([_number(self.group, h)]))[0]

    @property
    def structure(self) -> np.ndarray:
        """A basis of the matrices that commute with all of the irrep's: float64 [endo, d, d].

        The identity; for the complex kind also J, J^2 = -1; for the quaternionic J, K and L = JK, Hamilton's units.
        Their entries are 0 and ±1: the basis of each irrep has been put in the order v, Jv, (Kv, Lv,) w, ...
        """
        return commutant_basis(self.kind, self.dimension)


def real_irreps(group: PermutationGroup) -> tuple[Irrep, ...]:
    """All real irreps: trivial first, then by dimension, then by character at the generators and at all classes.

    Checked as they are built: sum d^2 / endo is the order, there are as many as classes up to inversion, products of
    matrices are matrices of products and, up to 600 irreps, characters are orthogonal. Use ``group.irreps``, which
    keeps them.

    Raises:
        ValueError: the group is too large for the general method; it says how far it got.
    """
    classes = _Classes(group)
    models: list[Model] = list(linear_irreps(group))
    if not group.is_abelian:
        cosets = abelian_half(group)
        models = [*models, *induced_irreps(cosets)] if cosets else split_irreps(group, models)
    models = _in_order(models, classes)
    irreps = tuple(
        Irrep(name, number, model.dimension, model.kind, group, model, classes)
        for number, (name, model) in enumerate(zip(_names(group, models), models))
    )
    _verify(group, irreps, classes)
    return irreps


def _in_order(models: Sequence[Model], classes: _Classes) -> list[Model]:
    """By dimension, then by characters, the larger first: at the generators, then class by class.

    So the two-dimensional irreps of rings of positions come by frequency.
    """
    of_generators = classes.group.class_of[list(classes.group.generator_numbers)]
    everything = np.arange(len(classes.representatives))
    columns = classes.representatives[list(dict.fromkeys([*of_generators, *everything]))]

    def refine(tied: list[Model], start: int, stop: int) -> list[Model]:
        """Those equal up to class ``start``; most are told apart by a few classes more."""
        table = np.stack([model.character(columns[start:stop]) for model in tied])
        keys = np.column_stack([[model.dimension for model in tied], -table.round(9)])
        order = np.lexsort(keys.T[::-1])
        cuts = 1 + np.flatnonzero(np.diff(keys[order], axis=0).any(1))
        runs = [[tied[k] for k in run] for run in np.split(order, cuts)]
        more = stop < len(columns)
        return [m for run in runs for m in (refine(run, stop, 4 * stop) if more and len(run) > 1 else run)]

    return refine(list(models), 0, 16)


def _names(group: PermutationGroup, models: Sequence[Model]) -> list[str]:
    generators = np.array(group.generator_numbers)
    signature = np.array([_signature(group.position_map(int(g))) for g in generators])
    lines = [k for k, model in enumerate(models) if model.dimension == 1]
    if (signature == 1).all():
        sign = lines[1] if len(lines) == 2 else None
    else:
        sign = next(k for k in lines if np.abs(models[k].character(generators) - signature).max() < 1e-9)
    names, count = [], dict.fromkeys((model.dimension for model in models), 0)
    for k, model in enumerate(models):
        if k == 0 or k == sign:
            names.append("sign" if k else "1")
        else:
            names.append(f"{model.dimension}{_letters(count[model.dimension])}")
            count[model.dimension] += 1
    return names


def _signature(positions: np.ndarray) -> int:
    """The sign of a permutation: that of N less the number of its cycles."""
    labels, jump = np.arange(len(positions)), np.array(positions)
    for _ in range(len(positions).bit_length()):  # the smallest position on each cycle, by doubling
        labels = np.minimum(labels, labels[jump])
        jump = jump[jump]
    return 1 - 2 * ((len(positions) - len(np.unique(labels))) % 2)


def _letters(k: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    head, tail = divmod(k, 26)
    return (_letters(head - 1) if head else "") + chr(ord("a") + tail)


def _verify(group: PermutationGroup, irreps: Sequence[Irrep], classes: _Classes) -> None:
    inverses = group.class_of[np.asarray(group.inverse(classes.representatives))]
    own = int((inverses == np.arange(len(inverses))).sum())
    assert sum(irrep.dimension**2 // irrep.endo for irrep in irreps) == group.order
    assert 2 * len(irreps) == len(inverses) + own, "real irreps are as many as classes up to inversion"
    assert (irreps[0].character == 1).all()
    if len(irreps) > _CHECKED_IRREPS:
        return
    table = np.stack([irrep.character for irrep in irreps])
    gram = (table * classes.weights) @ table.T
    assert np.abs(gram - np.diag([irrep.endo for irrep in irreps])).max() < 1e-9, "characters are not orthogonal"
    generators = np.array(group.generator_numbers)
    others = np.arange(len(generators), 12 + len(generators)) * 7919 % group.order
    for (left, right), irrep in itertools.product([(generators, generators[::-1]), (others, others[::-1])], irreps):
        a, b, ab = (irrep._model.matrices(numbers) for numbers in (left, right, group.multiply(left, right)))
        assert np.abs(a @ b - ab).max() < 1e-11, f"{irrep.name} is no homomorphism"
        assert np.abs(a @ a.mT - np.eye(irrep.dimension)).max() < 1e-11, f"{irrep.name} is not orthogonal"
        for unit in irrep.structure[1:]:
            assert np.abs(a @ unit - unit @ a).max() < 1e-11, f"{irrep.name} does not commute with its structure"


def _irrep_of(group: PermutationGroup, number: int) -> Irrep:
    return group.irreps[number]


def _number(group: PermutationGroup, h: Any) -> int:
    if isinstance(h, tuple):
        return group.number(h)
    if isinstance(h, bool) or not isinstance(h, (int, np.integer)) or not 0 <= h < group.order:
        raise ValueError(f"{group!r}: elements are 0 to {group.order - 1}, or given as Element; received {h!r}")
    return int(h)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


# --- channels that carry a representation ----------------------------------------------------------------------------


class Representation:
    """Channels on which a group acts: ``copies[k]`` copies of ``group.irreps[k]``, in the Fourier layout.

    Equal to another with the same group and copies. Prints as ``"2 x 1 + 1 x 2a"``.

    Attributes:
        group: the group.
        copies: of each irrep, in the order of ``group.irreps``.
        dim: number of channels, sum of copies times dimension.
        blocks: (irrep, slice of its channels) of those with copies, in order.
    """

    def __init__(self, group: PermutationGroup, copies: Sequence[int]):
        """
        Raises:
            ValueError: ``copies`` are not integers ≥ 0, one for each irrep.
        """
        irreps = group.irreps
        values = list(copies)
        if len(values) != len(irreps) or any(
            isinstance(c, bool) or not isinstance(c, (int, np.integer)) or c < 0 for c in values
        ):
            names = ", ".join(irrep.name for irrep in irreps[:12]) + (", ..." if len(irreps) > 12 else "")
            raise ValueError(
                f"Representation: copies is one integer ≥ 0 for each of the {len(irreps)} irreps ({names}) of "
                f"{group!r}, received {len(values)}: {values[:12]}"
            )
        self.group = group
        self.copies = tuple(int(c) for c in values)
        self.blocks: tuple[tuple[Irrep, slice], ...]
        blocks, start = [], 0
        for irrep, count in zip(irreps, self.copies):
            if count:
                blocks.append((irrep, slice(start, start + count * irrep.dimension)))
                start += count * irrep.dimension
        self.blocks, self.dim = tuple(blocks), start

    @classmethod
    def regular(cls, group: PermutationGroup, copies: int = 1) -> Representation:
        """``copies`` copies of the regular representation: dim = copies * G; see :func:`fourier`.

        Raises:
            ValueError: ``copies`` is no integer ≥ 0.
        """
        if isinstance(copies, bool) or not isinstance(copies, (int, np.integer)) or copies < 0:
            raise ValueError(f"Representation.regular: copies is an integer ≥ 0, received {copies!r}")
        return cls(group, [int(copies) * irrep.dimension // irrep.endo for irrep in group.irreps])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Representation) and self.copies == other.copies and self.group == other.group

    def __hash__(self) -> int:
        return hash((self.group, self.copies))

    def __reduce__(self) -> tuple:
        return Representation, (self.group, self.copies)

    def __deepcopy__(self, memo: dict) -> Representation:
        return self  # it never changes, and modules that hold it are copied

    def __str__(self) -> str:
        return " + ".join(f"{self.copies[irrep.number]} x {irrep.name}" for irrep, _ in self.blocks) or "0"

    def __repr__(self) -> str:
        return f"<Representation {self}: {self.dim} channels of {self.group!r}>"

    def matrix(self, h: int | Element, dtype: torch.dtype = torch.float64) -> Tensor:
        """Of one element, given by number or itself: dense block-diagonal [dim, dim]."""
        number = _number(self.group, h)
        matrix = np.zeros((self.dim, self.dim))
        for irrep, part in self.blocks:
            matrix[part, part] = np.kron(irrep.matrix(number), np.eye(self.copies[irrep.number]))
        return torch.as_tensor(matrix, dtype=dtype)

    def act(self, h: int | Element, x: Tensor) -> Tensor:
        """``x @ matrix(h).T``, block by block: [..., dim] -> [..., dim].

        Raises:
            ValueError: a wrong number of channels, ``x`` is not floating, or there is no such element.
        """
        if x.dim() < 1 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(
                f"{self!r}.act: features are floating [..., {self.dim}], received {list(x.shape)} of {x.dtype}"
            )
        number = _number(self.group, h)
        parts = []
        for irrep, part in self.blocks:
            matrix = torch.as_tensor(np.array(irrep.matrix(number)), dtype=x.dtype, device=x.device)
            channels = x[..., part]
            parts.append((matrix @ channels.unflatten(-1, (irrep.dimension, -1))).flatten(-2))
        return torch.cat(parts, -1) if parts else x


def fourier(group: PermutationGroup) -> np.ndarray:
    """The orthogonal change of basis from the regular representation to its irreps: float64 [G, G].

    Functions on the group are columns, f[g] by number; h acts by (L_h f)(g) = f(h^-1 g). Then ``F @ f`` is in the
    layout of ``Representation.regular(group)``, and F L_h F^T is its ``matrix(h)``. Row (k, copy c, coordinate i) is
    sqrt(d / G) rho_k(g)[i, endo c]: the other columns of rho_k are the same functions again, up to signs.

    Raises:
        ValueError: the order is above 8,192, where the matrix takes half a gigabyte.
    """
    if group.order > MAX_FOURIER_ORDER:
        raise ValueError(
            f"fourier: the matrix [G, G] is made up to order {MAX_FOURIER_ORDER}, received {group!r}; "
            "the rows of one irrep are its matrices, irrep.matrices"
        )
    basis, start = np.empty((group.order, group.order)), 0
    everything = np.arange(group.order)
    for irrep in group.irreps:
        matrices = irrep.__dict__.get("matrices")
        if matrices is None:
            matrices = irrep._model.matrices(everything)
        rows = irrep.dimension**2 // irrep.endo
        columns = matrices[:, :, :: irrep.endo] * np.sqrt(irrep.dimension / group.order)
        basis[start : start + rows] = columns.transpose(1, 2, 0).reshape(rows, -1)
        start += rows
    sample = np.random.default_rng(0).standard_normal((group.order, 4))
    assert start == group.order and np.abs(basis.T @ (basis @ sample) - sample).max() < 1e-11, "F is not orthogonal"
    return basis
