"""Irreps against character tables from the books, a second algorithm, and what defines them."""

import copy
import itertools
import math
import pickle
import time
from functools import cache

import numpy as np
import pytest
import torch
from finite_cases import F20, F21, IRREP_GROUPS, M11, SL23, group_id, left_translation

from erlangen.finite import (
    PermutationGroup,
    alternating,
    cyclic,
    dihedral,
    direct_product,
    klein,
    parse,
    quaternion,
    reverse_complement,
    symmetric,
)
from erlangen.finite import _splitting as splitting
from erlangen.finite._closed_forms import linear_irreps
from erlangen.finite.irreps import Representation, fourier, real_irreps

GOLDEN = (1 + math.sqrt(5)) / 2

# Classes as (size, order of elements); rows are real irreps: conjugate pairs added, quaternionic ones doubled.
# Conway et al., ATLAS of finite groups (1985); James and Liebeck, Representations and characters of groups (2001).
TABLES = {
    "C5": (
        cyclic(5),
        [(1, 1)] + 4 * [(1, 5)],
        [[1, 1, 1, 1, 1], [2, 1 / GOLDEN, -GOLDEN, -GOLDEN, 1 / GOLDEN], [2, -GOLDEN, 1 / GOLDEN, 1 / GOLDEN, -GOLDEN]],
    ),
    "Klein": (
        klein(),
        [(1, 1), (1, 2), (1, 2), (1, 2)],
        [[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]],
    ),
    "S3": (symmetric(3), [(1, 1), (3, 2), (2, 3)], [[1, 1, 1], [1, -1, 1], [2, 0, -1]]),
    "D4": (
        dihedral(4),
        [(1, 1), (1, 2), (2, 4), (2, 2), (2, 2)],
        [[1, 1, 1, 1, 1], [1, 1, 1, -1, -1], [1, 1, -1, 1, -1], [1, 1, -1, -1, 1], [2, -2, 0, 0, 0]],
    ),
    "Q8": (
        quaternion(),
        [(1, 1), (1, 2), (2, 4), (2, 4), (2, 4)],
        [[1, 1, 1, 1, 1], [1, 1, 1, -1, -1], [1, 1, -1, 1, -1], [1, 1, -1, -1, 1], [4, -4, 0, 0, 0]],
    ),
    "A4": (alternating(4), [(1, 1), (3, 2), (4, 3), (4, 3)], [[1, 1, 1, 1], [2, 2, -1, -1], [3, -1, 0, 0]]),
    "F20": (
        F20,
        [(1, 1), (4, 5), (5, 2), (5, 4), (5, 4)],
        [[1, 1, 1, 1, 1], [1, 1, 1, -1, -1], [2, 2, -2, 0, 0], [4, -1, 0, 0, 0]],
    ),
    "F21": (
        F21,
        [(1, 1), (3, 7), (3, 7), (7, 3), (7, 3)],
        [[1, 1, 1, 1, 1], [2, 2, 2, -1, -1], [6, -1, -1, 0, 0]],
    ),
    "S4": (
        symmetric(4),
        [(1, 1), (3, 2), (6, 2), (6, 4), (8, 3)],
        [[1, 1, 1, 1, 1], [1, 1, -1, -1, 1], [2, 2, 0, 0, -1], [3, -1, 1, -1, 0], [3, -1, -1, 1, 0]],
    ),
    "SL(2, 3)": (
        SL23,
        [(1, 1), (1, 2), (6, 4), (4, 3), (4, 3), (4, 6), (4, 6)],
        [
            [1, 1, 1, 1, 1, 1, 1],
            [2, 2, 2, -1, -1, -1, -1],
            [3, 3, -1, 0, 0, 0, 0],
            [4, -4, 0, -2, -2, 2, 2],
            [4, -4, 0, 1, 1, -1, -1],
        ],
    ),
    "A5": (
        alternating(5),
        [(1, 1), (15, 2), (20, 3), (12, 5), (12, 5)],
        [
            [1, 1, 1, 1, 1],
            [3, -1, 0, GOLDEN, 1 - GOLDEN],
            [3, -1, 0, 1 - GOLDEN, GOLDEN],
            [4, 0, 1, -1, -1],
            [5, 1, -1, 0, 0],
        ],
    ),
    "S5": (
        symmetric(5),
        [(1, 1), (10, 2), (15, 2), (20, 3), (20, 6), (30, 4), (24, 5)],
        [
            [1, 1, 1, 1, 1, 1, 1],
            [1, -1, 1, 1, -1, -1, 1],
            [4, 2, 0, 1, -1, 0, -1],
            [4, -2, 0, 1, 1, 0, -1],
            [5, 1, 1, -1, 1, -1, 0],
            [5, -1, 1, -1, -1, 1, 0],
            [6, 0, -2, 0, 0, 0, 1],
        ],
    ),
    "M11": (
        M11,
        [(1, 1), (165, 2), (440, 3), (990, 4), (1584, 5), (1320, 6), (990, 8), (990, 8), (720, 11), (720, 11)],
        [
            [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            [10, 2, 1, 2, 0, -1, 0, 0, -1, -1],
            [20, -4, 2, 0, 0, 2, 0, 0, -2, -2],
            [11, 3, 2, -1, 1, 0, -1, -1, 0, 0],
            [32, 0, -4, 0, 2, 0, 0, 0, -1, -1],
            [44, 4, -1, 0, -1, 1, 0, 0, 0, 0],
            [45, -3, 0, 1, 0, 0, -1, -1, 1, 1],
            [55, -1, 1, -1, 0, -1, 1, 1, 0, 0],
        ],
    ),
}


def is_character_table(irreps, group, classes, rows):
    """Whether characters are these up to the order of irreps, and of classes of one size and order."""
    own = [(len(c), int(group.element_orders[c[0]])) for c in group.conjugacy_classes]
    if sorted(own) != sorted(classes) or len(rows) != len(irreps):
        return False
    ours = np.stack([irrep.character for irrep in irreps])
    places = {kind: [k for k, c in enumerate(own) if c == kind] for kind in dict.fromkeys(classes)}
    wanted = {kind: [k for k, c in enumerate(classes) if c == kind] for kind in places}
    for choice in itertools.product(*(itertools.permutations(places[kind]) for kind in places)):
        columns = np.empty(len(own), int)
        for kind, chosen in zip(places, choice):
            columns[wanted[kind]] = chosen
        near = np.abs(ours[:, None, columns] - np.array(rows)).max(-1) < 1e-10
        if (near.sum(0) == 1).all() and (near.sum(1) == 1).all():
            return True
    return False


@pytest.mark.parametrize("name", TABLES)
def test_character_tables_of_the_books(name):
    group, classes, rows = TABLES[name]
    assert is_character_table(group.irreps, group, classes, rows)


@pytest.mark.parametrize("name", ["C5", "Q8", "S4", "A5"])
def test_a_wrong_character_table_is_told_from_the_right_one(name):
    group, classes, rows = TABLES[name]
    for k in range(1, len(rows)):
        wrong = np.array(rows, float)
        wrong[k, -1] += 1e-3
        assert not is_character_table(group.irreps, group, classes, wrong)
    assert not is_character_table(group.irreps, group, classes, [rows[0], *rows[:-1]])


@cache
def murnaghan_nakayama(partition, cycles):
    """The character of S_n of a partition at a cycle type: take off rim hooks (James and Kerber 1981, 2.4.7)."""
    if not cycles:
        return 1
    # on beta numbers a rim hook of length k is a step down by k onto a free number
    beta = [part + len(partition) - 1 - i for i, part in enumerate(partition)]
    total = 0
    for number in beta:
        lower = number - cycles[0]
        if lower < 0 or lower in beta:
            continue
        leg = sum(lower < other < number for other in beta)
        rest = sorted((other for other in beta if other != number), reverse=True)
        rest = sorted([*rest, lower], reverse=True)
        smaller = tuple(b - (len(rest) - 1 - i) for i, b in enumerate(rest))
        total += (-1) ** leg * murnaghan_nakayama(smaller, cycles[1:])
    return total


def partitions(n, largest):
    if n == 0:
        yield ()
    for first in range(min(n, largest), 0, -1):
        for rest in partitions(n - first, first):
            yield (first, *rest)


def cycle_type(positions):
    left, lengths = set(range(len(positions))), []
    while left:
        i, length = min(left), 0
        while i in left:
            left.remove(i)
            i, length = positions[i], length + 1
        lengths.append(length)
    return tuple(sorted(lengths, reverse=True))


@pytest.mark.parametrize("n", [4, 5, 6, 7])
def test_symmetric_groups_agree_with_murnaghan_and_nakayama(n):
    group = symmetric(n)
    start = time.perf_counter()
    irreps = real_irreps(group)
    assert time.perf_counter() - start < 10
    types = [cycle_type(group.positions[c[0]]) for c in group.conjugacy_classes]
    rows = np.array([[murnaghan_nakayama(p, t) for t in types] for p in partitions(n, n)])
    ours = np.stack([irrep.character for irrep in irreps])
    near = np.abs(ours[:, None] - rows).max(-1) < 1e-10
    assert (near.sum(0) == 1).all() and (near.sum(1) == 1).all()
    assert (ours == rows[near.argmax(1)]).all(), "integers are exact"
    assert {irrep.kind for irrep in irreps} == {"real"}


def test_names_kinds_and_multiplicities():
    def facts(group):
        return [(i.name, i.kind, i.multiplicity) for i in group.irreps]

    assert facts(cyclic(4)) == [("1", "real", 1), ("sign", "real", 1), ("2a", "complex", 1)]
    assert facts(cyclic(5)) == [("1", "real", 1), ("2a", "complex", 1), ("2b", "complex", 1)]
    assert facts(quaternion()) == [(k, "real", 1) for k in ("1", "1a", "1b", "1c")] + [("4a", "quaternionic", 1)]
    assert facts(symmetric(3)) == [("1", "real", 1), ("sign", "real", 0), ("2a", "real", 1)]
    assert facts(alternating(4)) == [("1", "real", 1), ("2a", "complex", 0), ("3a", "real", 1)]
    # the reversal of four positions is an even permutation: "sign" is then the only other irrep of dimension one
    assert facts(reverse_complement(4)) == [("1", "real", 2), ("sign", "real", 2)]
    assert facts(reverse_complement(5)) == [("1", "real", 3), ("sign", "real", 2)]
    assert [i.name for i in cyclic(60).irreps][-4:] == ["2z", "2aa", "2ab", "2ac"]
    # the first two-dimensional irrep of a ring of positions is the slowest wave
    assert np.allclose([i.character[1] for i in cyclic(9).irreps[1:]], 2 * np.cos(2 * np.pi * np.arange(1, 5) / 9))


@pytest.mark.parametrize("group", IRREP_GROUPS, ids=group_id)
def test_what_defines_irreps(group):
    irreps = group.irreps
    rng = np.random.default_rng(0)
    left, right = rng.integers(group.order, size=(2, 64))
    products = group.multiply(left, right)
    for number, irrep in enumerate(irreps):
        matrices, d = irrep.matrices, irrep.dimension
        assert irrep.number == number and matrices.shape == (group.order, d, d)
        assert np.abs(matrices[left] @ matrices[right] - matrices[products]).max() < 1e-12
        assert np.abs(matrices @ matrices.mT - np.eye(d)).max() < 1e-12
        assert np.abs(np.trace(matrices, axis1=1, axis2=2) - irrep.character[group.class_of]).max() < 1e-12
        assert irrep.endo == {"real": 1, "complex": 2, "quaternionic": 4}[irrep.kind]
        # irreducible: of all d^2 matrices, as many as the commutant's dimension are left by the average over the group
        assert round(np.square(irrep.character[group.class_of]).mean()) == irrep.endo
        twisted = irrep.matrix(group.elements[-1])  # by element, not by number
        assert np.array_equal(twisted, matrices[-1])
    assert sum(i.dimension**2 // i.endo for i in irreps) == group.order
    assert sum(i.dimension * i.multiplicity for i in irreps) == group.degree
    assert irreps[0].name == "1" and (irreps[0].character == 1).all()
    assert [i.dimension for i in irreps] == sorted(i.dimension for i in irreps)
    assert len({i.name for i in irreps}) == len(irreps)


@pytest.mark.parametrize("group", IRREP_GROUPS, ids=group_id)
def test_structure_is_a_copy_of_the_numbers(group):
    for irrep in group.irreps:
        units = irrep.structure
        assert units.shape == (irrep.endo, irrep.dimension, irrep.dimension)
        one = np.eye(irrep.dimension)
        assert (units[0] == one).all()
        for unit in units[1:]:
            assert (unit @ unit == -one).all() and (unit @ unit.T == one).all()
            assert np.abs(unit @ irrep.matrices - irrep.matrices @ unit).max() < 1e-12
        if irrep.kind == "quaternionic":
            _, j, k, l = units  # noqa: E741
            assert (j @ k == l).all() and (k @ j == -l).all()
            assert (k @ l == j).all() and (l @ j == k).all()


@pytest.mark.parametrize("group", [*IRREP_GROUPS, alternating(6)], ids=group_id)
def test_fourier_basis(group):
    basis, regular = fourier(group), Representation.regular(group)
    assert regular.dim == group.order
    assert np.abs(basis @ basis.T - np.eye(group.order)).max() < 1e-12
    for h in {*group.generator_numbers, group.order - 1}:
        moved = basis @ left_translation(group, h) @ basis.T
        assert np.abs(moved - regular.matrix(h).numpy()).max() < 1e-12


CLOSED = [cyclic(6), dihedral(4), dihedral(7), quaternion(), klein(), parse("direct_product(quaternion(), cyclic(3))")]


@pytest.mark.parametrize("group", CLOSED, ids=group_id)
def test_splitting_finds_what_the_closed_forms_say(group):
    """The two algorithms share no code but the linear characters; of those only the trivial one is given here."""
    representatives = np.array([c[0] for c in group.conjugacy_classes])
    models = splitting.split_irreps(group, linear_irreps(group)[:1])
    split = sorted((m.kind, *(m.character(representatives) + 0.0).round(9)) for m in models)
    closed = sorted((i.kind, *(i.character + 0.0).round(9)) for i in group.irreps)
    assert [row[0] for row in split] == [row[0] for row in closed]
    assert np.abs(np.array([row[1:] for row in split]) - np.array([row[1:] for row in closed])).max() < 1e-8
    numbers = np.arange(group.order)
    for model in models:
        matrices = model.matrices(numbers)
        generator = group.generator_numbers[0]
        assert np.abs(matrices[generator] @ matrices - matrices[group.multiply(generator, numbers)]).max() < 1e-12


def test_a_regular_action_of_many_points_is_split_through_its_classes():
    small = symmetric(6)
    group = PermutationGroup([small.table[s].tolist() for s in small.generator_numbers])
    assert group.degree == 720
    assert [i.dimension for i in group.irreps] == [i.dimension for i in small.irreps]
    assert [i.multiplicity for i in group.irreps] == [i.dimension for i in group.irreps]


def test_large_groups_in_closed_form():
    group = dihedral(2048)
    irreps = group.irreps
    assert len(irreps) == 4 + 1023 and {i.kind for i in irreps} == {"real"}
    waves = [i.matrix(group.generator_numbers[0])[0, 0] for i in irreps[4:]]
    assert np.allclose(waves, np.cos(2 * np.pi * np.arange(1, 1024) / 2048), rtol=0, atol=1e-15)


@pytest.mark.parametrize("make", [lambda: symmetric(5), lambda: SL23, lambda: dihedral(6)], ids=["S5", "SL23", "D6"])
def test_two_constructions_agree_bit_for_bit(make):
    first, second = real_irreps(make()), real_irreps(make())
    for a, b in zip(first, second):
        assert a.name == b.name and a.kind == b.kind
        assert (a.matrices == b.matrices).all() and (a.character == b.character).all()


def test_a_basis_belongs_to_its_subspace():
    """Another basis of the same subspace, as another LAPACK would give, leads to the same adapted basis."""
    rng = np.random.default_rng(0)
    space, _ = np.linalg.qr(rng.standard_normal((12, 5)))
    turned = space @ np.linalg.qr(rng.standard_normal((5, 5)))[0]
    bases = [splitting._adapted_basis(basis, [], "real") for basis in (space, turned)]
    assert np.abs(bases[0] - bases[1]).max() < 1e-12
    assert np.abs(bases[0] @ bases[0].T - space @ space.T).max() < 1e-12


def test_a_group_out_of_reach_says_how_far_it_got(monkeypatch):
    monkeypatch.setattr(splitting, "MAX_SPLIT_DIMENSION", 5)
    with pytest.raises(ValueError, match=r"dimension at most 5.*account for \d+ of its order 120"):
        real_irreps(symmetric(5))


# --- representations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [symmetric(3), quaternion(), cyclic(5), SL23], ids=group_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_act_is_the_matrix(group, dtype):
    generator = torch.Generator().manual_seed(0)
    representation = Representation(group, [(k + 2) % 3 for k in range(len(group.irreps))])
    assert representation.dim == sum(c * i.dimension for c, i in zip(representation.copies, group.irreps))
    x = torch.randn(2, 4, representation.dim, generator=generator, dtype=dtype)
    for h in (0, 1, group.order - 1):
        moved = representation.act(h, x)
        assert moved.dtype == dtype and moved.shape == x.shape
        expected = x.double() @ representation.matrix(h).T
        assert (moved.double() - expected).abs().max() < (1e-12 if dtype == torch.float64 else 2e-5)
        assert torch.equal(representation.act(group.elements[h], x), moved)
    a, b = 1, group.order - 1
    both = representation.matrix(a) @ representation.matrix(b)
    assert (both - representation.matrix(group.multiply(a, b))).abs().max() < 1e-12
    assert representation.matrix(1, torch.float32).dtype == torch.float32
    stop = 0
    for irrep, part in representation.blocks:
        assert part.start == stop and part.stop - stop == representation.copies[irrep.number] * irrep.dimension
        stop = part.stop
    assert stop == representation.dim


def test_representations_are_values():
    group = quaternion()
    regular = Representation.regular(group, 3)
    assert regular.copies == (3, 3, 3, 3, 3) and regular.dim == 24
    assert str(regular) == "3 x 1 + 3 x 1a + 3 x 1b + 3 x 1c + 3 x 4a"
    assert regular == Representation(quaternion(), [3] * 5) and hash(regular) == hash(Representation(group, [3] * 5))
    assert regular != Representation.regular(group, 2) and regular != Representation.regular(dihedral(4), 3)
    assert pickle.loads(pickle.dumps(regular)) == regular and copy.deepcopy(regular) is regular
    irrep = pickle.loads(pickle.dumps(group.irreps[4]))
    assert irrep.name == "4a" and irrep.group == group
    nothing = Representation(group, [0] * 5)
    assert nothing.dim == 0 and str(nothing) == "0" and nothing.act(1, torch.ones(2, 0)).shape == (2, 0)


def test_bad_input_is_explained():
    group = symmetric(3)
    for copies in ([1, 1], [1, 1, -1], [1, 1, 0.5], [True, 1, 1]):
        with pytest.raises(ValueError, match=r"one integer ≥ 0 for each of the 3 irreps \(1, sign, 2a\)"):
            Representation(group, copies)
    with pytest.raises(ValueError, match=r"copies is an integer ≥ 0, received -1"):
        Representation.regular(group, -1)
    regular = Representation.regular(group)
    with pytest.raises(ValueError, match=r"features are floating \[..., 6\], received \[2, 5\]"):
        regular.act(0, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"received \[6\] of torch.int64"):
        regular.act(0, torch.zeros(6, dtype=torch.int64))
    for h in (6, -1, True, 1.0):
        with pytest.raises(ValueError, match=r"elements are 0 to 5"):
            regular.matrix(h)
    with pytest.raises(ValueError, match=r"up to order 8192"):
        fourier(symmetric(8))


def test_products_of_wreaths_have_every_kind():
    group = direct_product(SL23, cyclic(3))
    assert {i.kind for i in group.irreps} == {"real", "complex", "quaternionic"}
