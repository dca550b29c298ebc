"""Permutation groups against sympy.combinatorics, brute force and what is known of the named ones."""

import copy
import itertools
import math
import pickle
import re
import tracemalloc

import numpy as np
import pytest
import torch
from finite_cases import F20, F21, M11
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.combinatorics import Permutation
from sympy.combinatorics import PermutationGroup as SympyGroup

from erlangen.finite import (
    Element,
    PermutationGroup,
    alternating,
    cyclic,
    dihedral,
    direct_product,
    inverted_repeat,
    klein,
    parse,
    quaternion,
    reversal,
    reverse_complement,
    symmetric,
    wreath_product,
)
from erlangen.finite._closure import automorphisms

NAMED = [
    cyclic(1),
    cyclic(6),
    dihedral(3),
    dihedral(6),
    symmetric(1),
    symmetric(2),
    symmetric(5),
    alternating(2),
    alternating(3),
    alternating(4),
    alternating(5),
    reversal(1),
    reversal(5),
    klein(),
    quaternion(),
    reverse_complement(1),
    reverse_complement(6),
    reverse_complement(3, "acgun"),
    inverted_repeat(2, 3),
    inverted_repeat(2, 0, "ACGU"),
    direct_product(cyclic(3), dihedral(4)),
    direct_product(cyclic(3), reverse_complement(4)),
    direct_product(reverse_complement(2), reversal(3)),
    wreath_product(cyclic(2), symmetric(3)),
    wreath_product(reverse_complement(2), cyclic(3)),
    wreath_product(klein(), reversal(3)),
]
MADE = [
    F21,
    F20,
    PermutationGroup([([0, 1, 2], "CGTA"), ([2, 1, 0], None)], "ACGT"),  # one generator changes letters only
    PermutationGroup([([0, 1], [[1, 0, 2], [0, 2, 1]])], 3),  # nothing but letters, at each position in its own way
    PermutationGroup([([0, 1, 2], {"L": "D", "D": "L"}), [1, 2, 0]], 'LD"'),
]
GROUPS = [pytest.param(group, id=group.name) for group in NAMED + MADE]


@st.composite
def permutation_groups(draw):
    """Random generators on up to 5 positions and 3 letters, the same for all positions or one map a position."""
    n, num_letters = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    positions, letters = st.permutations(range(n)), st.permutations(range(num_letters))
    if not num_letters:
        generators = draw(st.lists(positions, min_size=1, max_size=3))
    else:
        n = min(n, 3)
        maps = st.none() | letters | st.lists(letters, min_size=n, max_size=n)
        generators = draw(st.lists(st.tuples(st.permutations(range(n)), maps), min_size=1, max_size=2))
    return PermutationGroup(generators, num_letters)


def sympy_group(group):
    """The same group on points."""
    points = [group.point_map(h).tolist() for h in group.generator_numbers]
    return SympyGroup(*map(Permutation, points))


def assert_is_a_group(group):
    """Axioms, numbering and all the ways to say one thing, by brute force over at most 60 elements."""
    numbers = np.arange(group.order)
    assert (group.points[0] == np.arange(group.points.shape[1])).all()
    assert len({tuple(p) for p in group.points.tolist()}) == group.order
    some = numbers[:: max(1, group.order // 60)]
    products = group.multiply(some[:, None], some)
    for a, row in zip(some, products):
        assert (group.points[row] == group.points[a][group.points[some]]).all()  # (ab)(x) = a(b(x))
    assert (group.multiply(numbers, group.inverse(numbers)) == 0).all()
    assert (group.multiply(group.inverse(numbers), numbers) == 0).all()
    assert (group.table[np.ix_(some, some)] == products).all()
    assert (group.multiply(some[:, None], some) == products).all()  # now from the table
    assert [group.number(e) for e in group.elements] == numbers.tolist()
    for k, (generator, number) in enumerate(zip(group.generators, group.generator_numbers)):
        assert group.elements[number] == generator and group.number(generator) == number, k
    for h in some.tolist():
        element = group.elements[h]
        assert group.element(h) == element
        assert (group.position_map(h) == group.positions[h]).all() and (group.positions[h] == element.positions).all()
        assert (group.point_map(h) == group.points[h]).all() and (group.point_map(element) == group.points[h]).all()
        if group.num_letters:
            assert (group.letter_map(h) == group.letter_maps[h]).all()
            assert (group.letter_maps[h] == np.array(element.letters)).all()
        else:
            assert group.letter_maps is None and group.letter_map(h) is None and element.letters is None


@pytest.mark.parametrize("group", GROUPS)
def test_axioms(group):
    assert_is_a_group(group)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(permutation_groups())
def test_axioms_of_random_groups(group):
    assert_is_a_group(group)
    assert parse(str(group)) == group and str(parse(str(group))) == str(group)
    assert sympy_group(group).order() == group.order


@pytest.mark.parametrize("group", GROUPS)
def test_structure_is_sympys(group):
    """Order, orbits, classes and orders of elements, whether abelian, whether transitive."""
    other = sympy_group(group)
    assert other.order() == group.order
    assert other.is_abelian == group.is_abelian
    classes = {frozenset(tuple(p.array_form) for p in c) for c in other.conjugacy_classes()}
    assert {frozenset(tuple(group.points[h].tolist()) for h in c) for c in group.conjugacy_classes} == classes
    element_orders = [Permutation(p).order() for p in group.points.tolist()]
    assert group.element_orders.tolist() == element_orders
    on_positions = SympyGroup(*(Permutation(list(g.positions)) for g in group.generators))
    assert {frozenset(orbit.tolist()) for orbit in group.orbits} == set(map(frozenset, on_positions.orbits()))
    assert group.is_transitive == (len(group.orbits) == 1)


@pytest.mark.parametrize("group", GROUPS)
def test_order_of_classes_and_orbits(group):
    classes = group.conjugacy_classes
    assert classes[0].tolist() == [0]
    keys = [(len(c), c[0]) for c in classes[1:]]
    assert keys == sorted(keys) and all((np.diff(c) > 0).all() for c in classes)
    for k, numbers in enumerate(classes):
        assert (group.class_of[numbers] == k).all()
    assert sorted(np.concatenate(classes).tolist()) == list(range(group.order))
    assert [o[0] for o in group.orbits] == sorted(o[0] for o in group.orbits)
    for letters, maps in ((False, group.positions), (True, group.points)):
        fixed = (maps == np.arange(maps.shape[1])).sum(1)
        assert (group.permutation_character(letters=letters)[group.class_of] == fixed).all()


@pytest.mark.parametrize(
    "group, order, num_classes",
    [
        (cyclic(12), 12, 12),
        (dihedral(7), 14, 5),
        (dihedral(8), 16, 7),
        (symmetric(6), 720, 11),
        (alternating(6), 360, 7),
        (alternating(7), 2520, 9),
        (quaternion(), 8, 5),
        (klein(), 4, 4),
        (F21, 21, 5),
        (F20, 20, 5),
        (M11, 7920, 10),
        (wreath_product(symmetric(3), symmetric(2)), 72, 9),
        (wreath_product(reverse_complement(2), symmetric(3)), 48, 10),
        (direct_product(alternating(4), reverse_complement(5)), 24, 8),
        (inverted_repeat(4, 3), 2, 2),
    ],
    ids=lambda value: value.name if isinstance(value, PermutationGroup) else str(value),
)
def test_known_orders_and_class_numbers(group, order, num_classes):
    assert group.order == order and len(group.conjugacy_classes) == num_classes


def test_quaternions_multiply_as_they_should():
    """ij = k, ji = -k, i² = j² = -1: on 1, i, j, k, -1, -i, -j, -k, each image of 1 names the element."""
    group = quaternion()
    i, j = group.generator_numbers

    def name(h):
        return ["1", "i", "j", "k", "-1", "-i", "-j", "-k"][group.positions[h, 0]]

    assert [name(i), name(j), name(group.multiply(i, j)), name(group.multiply(j, i))] == ["i", "j", "k", "-k"]
    assert name(group.multiply(i, i)) == name(group.multiply(j, j)) == "-1"
    assert sorted(group.element_orders.tolist()) == [1, 2, 4, 4, 4, 4, 4, 4]


def test_numbering_is_breadth_first():
    group = dihedral(4)
    assert group.generator_numbers == (1, 2)
    words = [()] + [w for n in range(1, 5) for w in itertools.product((0, 1), repeat=n)]
    first = {}
    for word in words:  # the last letter acts last
        points = tuple(range(4))
        for s in word:
            points = tuple(group.generators[s].positions[p] for p in points)
        first.setdefault(points, len(word))
    lengths = [first[e.positions] for e in group.elements]
    assert lengths == sorted(lengths) and len(first) == 8


# --- 2-closure -----------------------------------------------------------------------------------------------------


def brute_two_closure(group):
    """All permutations that keep the orbits on pairs, by trying each."""
    labels_NN = group.orbitals()
    all_PN = np.array(list(itertools.permutations(range(group.degree))))
    kept_P = (labels_NN[all_PN[:, :, None], all_PN[:, None, :]] == labels_NN).all((1, 2))
    return set(map(tuple, all_PN[kept_P].tolist()))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(permutation_groups(), st.data())
def test_two_closure_by_brute_force(group, data):
    expected = brute_two_closure(group)
    assert group.is_two_closed == (len(expected) == len(set(map(tuple, group.positions.tolist()))))
    closure = group.two_closure()
    assert {e.positions for e in closure.elements} == expected
    assert closure.is_two_closed and (closure.orbitals() == group.orbitals()).all()


@pytest.mark.parametrize("degree, num", [(6, 30), (7, 8)])
def test_two_closure_by_brute_force_on_more_positions(degree, num):
    rng = np.random.default_rng(0)
    orders = set()
    for _ in range(num):
        moved = rng.choice([3, 4, degree])  # a few positions a generator, so that not all groups are S_n
        generators = []
        for _ in range(2):
            images, where = np.arange(degree), rng.choice(degree, moved, replace=False)
            images[where] = images[rng.permutation(where)]
            generators.append(images)
        group = PermutationGroup(generators)
        closure = group.two_closure()
        assert {e.positions for e in closure.elements} == brute_two_closure(group)
        orders.add((group.order, closure.order))
    assert len(orders) > 5


def test_the_search_is_right_for_any_colouring():
    """Of random colourings, which orbitals are not: here partitions alone mislead, and each find must be verified."""
    rng = np.random.default_rng(0)
    orders = []
    for _ in range(60):
        colours = rng.integers(2, size=(5, 5)) * (rng.random() < 0.7)
        if rng.random() < 0.5:
            colours = np.maximum(colours, colours.T)
        np.fill_diagonal(colours, 2)
        expected = [p for p in itertools.permutations(range(5)) if (colours[np.ix_(p, p)] == colours).all()]
        order, found = automorphisms(colours, np.arange(5)[None])
        assert order == len(expected) == PermutationGroup([range(5), *found]).order
        assert {tuple(p.tolist()) for p in found} <= set(expected)
        orders.append(order)
    assert len(set(orders)) > 4


@pytest.mark.parametrize("group", GROUPS)
def test_orbitals(group):
    labels, expected, number = group.orbitals(), np.full((group.degree, group.degree), -1), 0
    for i, j in np.ndindex(*expected.shape):
        if expected[i, j] < 0:
            expected[group.positions[:, i], group.positions[:, j]] = number
            number += 1
    assert (labels == expected).all()
    labels[:] = -1
    assert (group.orbitals() == expected).all()  # a copy was given


@pytest.mark.parametrize(
    "group, order",
    [(alternating(4), 24), (alternating(5), 120), (F20, 120), (alternating(7), 5040)],
    ids=lambda value: str(value),
)
def test_attention_cannot_tell(group, order):
    assert group.two_closure().order == order and not group.is_two_closed
    with pytest.warns(UserWarning, match=f"order {group.order}, but its 2-closure has order {order}: pairwise"):
        assert not group.check_two_closed()


TWO_CLOSED = [cyclic(2), cyclic(7), cyclic(30), dihedral(3), dihedral(5), dihedral(40), F21, klein(), quaternion()]
TWO_CLOSED += [symmetric(3), symmetric(7), reversal(9), reverse_complement(8), inverted_repeat(3, 2)]
TWO_CLOSED += [wreath_product(cyclic(3), cyclic(4)), direct_product(cyclic(3), reverse_complement(4))]


@pytest.mark.parametrize("group", TWO_CLOSED, ids=str)
def test_two_closed(group):
    assert group.check_two_closed()  # warnings are errors here
    assert group.two_closure().order == group.order


def test_letters_alone_are_no_positions():
    """The 2-closure is about positions: elements that only change letters do not count."""
    group = PermutationGroup([([0, 1, 2], "TGCA"), ([1, 2, 0], None)], "ACGT")
    assert group.order == 6 and group.two_closure().order == 3 and group.is_two_closed


def independent_rings(k):
    """C3^k on (3^k - 1)/2 rings of 3 positions, independent in pairs; no two positions may be swapped alone."""
    words = [c for c in itertools.product(range(3), repeat=k) if any(c) and next(x for x in c if x) == 1]
    first = 3 * np.arange(len(words))[:, None]
    return PermutationGroup([(first + (np.arange(3) + turns) % 3).ravel() for turns in np.array(words).T[:, :, None]])


def test_a_large_two_closure():
    p = 53
    affine = PermutationGroup([[(i + 1) % p for i in range(p)], [2 * i % p for i in range(p)]])
    assert affine.order == p * (p - 1) and not affine.is_two_closed
    with pytest.raises(ValueError, match="the 2-closure has order about 10\\^70, more than max_order 50000"):
        affine.two_closure()
    with pytest.warns(UserWarning, match="about 10\\^70"):
        affine.check_two_closed()
    # Any two of the three pairs are swapped independently, all three are not.
    pairs = PermutationGroup([[1, 0, 3, 2, 4, 5], [1, 0, 2, 3, 5, 4]])
    assert pairs.order == 4 and pairs.two_closure().order == 8
    group = independent_rings(3)
    assert group.order == 3**3 and group._two_closure[0] == 3**13


# --- action --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_actions_are_homomorphisms_and_agree(group):
    """Tokens, one-hot letters and strings by loops over positions, and (ab)x = a(bx)."""
    n, num_letters = group.degree, group.num_letters
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(max(num_letters, 5 * (not num_letters)), (2, n), generator=rng)
    x = torch.randn(2, n, 3, generator=rng)
    some = range(0, group.order, max(1, group.order // 8))
    for a in some:
        element, moved, moved_x = group.elements[a], group.act_on_tokens(a, tokens), group.permute(a, x)
        matrix = torch.zeros(n, n)
        matrix[list(element.positions), range(n)] = 1
        torch.testing.assert_close(moved_x, matrix @ x, rtol=0, atol=0)
        torch.testing.assert_close(group.permute(a, x.mT, dim=-1), moved_x.mT, rtol=0, atol=0)
        torch.testing.assert_close(group.permute(element, x[0], dim=0), moved_x[0], rtol=0, atol=0)
        for b, i in np.ndindex(2, n):
            letter = int(tokens[b, i])
            if num_letters:
                maps = element.letters
                letter = maps[i][letter] if isinstance(maps[0], tuple) else maps[letter]
            assert moved[b, element.positions[i]] == letter
        for b in some:
            ab = group.multiply(a, b)
            assert (group.act_on_tokens(ab, tokens) == group.act_on_tokens(a, group.act_on_tokens(b, tokens))).all()
            assert (group.permute(ab, x) == group.permute(a, group.permute(b, x))).all()
        if num_letters:
            onehot = torch.nn.functional.one_hot(tokens, num_letters).double()
            expected = torch.nn.functional.one_hot(moved, num_letters).double()
            assert (group.act_on_onehot(a, onehot) == expected).all()
        if group.alphabet:
            text = "".join(group.alphabet[t] for t in tokens[0].tolist())
            assert group.translate(a, text) == "".join(group.alphabet[t] for t in moved[0].tolist())
    assert group.act_on_tokens(0, tokens.to(torch.int32)).dtype == torch.int32


def test_dna():
    group = reverse_complement(6)
    assert group.translate(1, "GATTAC") == "GTAATC"
    assert group.translate(1, "GAATTC") == "GAATTC"  # EcoRI's site is its own reverse complement
    assert reverse_complement(4, "ACGU").translate(1, "GGAU") == "AUCC"
    assert reverse_complement(4, "ACGTN").translate(1, "GNAT") == "ATNC"
    assert reverse_complement(5, "ACGTRYKMBVDHSWN-").translate(1, "RKBDS") == "SHVMY"
    assert inverted_repeat(2, 3).translate(1, "GATTTCC") == "GGTTTTC"
    assert reversal(4).translate(1, "GATX") == "XTAG"
    assert wreath_product(reverse_complement(2), cyclic(2)).translate(1, "GACC") == "TCCC"


def test_the_action_is_differentiable_and_keeps_the_type():
    group = dihedral(5)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    group.permute(3, x)[0].sum().backward()
    source = int(np.flatnonzero(group.positions[3] == 0)[0])
    assert x.grad[source].tolist() == [1, 1] and x.grad.sum() == 2
    assert group.permute(1, torch.zeros(5, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("group", GROUPS)
def test_channels_are_the_irreps_that_occur(group):
    """By multiplicities from characters on all elements: they fill the space, and no other irrep occurs."""
    for letters, maps in ((False, group.positions), (True, group.points)):
        fixed_G = (maps == np.arange(maps.shape[1])).sum(1)
        filled, occurring = 0, []
        for irrep in group.irreps:
            character_G = irrep.character[group.class_of]
            multiplicity = (character_G * fixed_G).sum() / (character_G**2).sum()
            assert abs(multiplicity - round(multiplicity)) < 1e-9
            filled += round(multiplicity) * irrep.dimension
            if round(multiplicity):
                occurring.append(irrep)
        assert list(group.channels(letters=letters)) == occurring and filled == maps.shape[1]


# --- text and identity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_prints_and_parses(group):
    assert parse(str(group)) == group and str(parse(str(group))) == str(group)
    plain = PermutationGroup(group.generators, group.alphabet or group.num_letters)
    assert str(plain).startswith("group(") and parse(str(plain)) == plain == group
    assert hash(plain) == hash(group) and str(group.order) in repr(group)
    again = pickle.loads(pickle.dumps(group))
    assert again == group and str(again) == str(group) and again.name == group.name
    assert copy.deepcopy(group) is group and copy.copy(group) is group


def test_text():
    assert str(PermutationGroup([([3, 2, 1, 0], "TGCA"), [1, 0, 2, 3]], "ACGT")) == (
        'group(4, "ACGT": (0 3)(1 2) "TGCA"; (0 1))'
    )
    assert str(PermutationGroup([([1, 0], [[1, 0], [0, 1]])], 2)) == "group(2, 2: (0 1) [[1, 0], [0, 1]])"
    assert str(PermutationGroup([range(3)])) == "group(3: ())"
    assert (
        str(direct_product(F21, reversal(2)))
        == "direct_product(group(7: (0 1 2 3 4 5 6); (1 2 4)(3 6 5)), reversal(2))"
    )
    assert parse(" wreath_product( cyclic( 2 ),\n klein ( ) ) ") == wreath_product(cyclic(2), klein())
    assert parse('inverted_repeat(2, 1, "ACGU")') == inverted_repeat(2, 1, "ACGU")
    assert F21.name == "F21" and parse(str(F21)) == F21
    assert repr(cyclic(4)) == "<PermutationGroup cyclic(4): order 4, 4 positions>"
    assert repr(reverse_complement(4)) == "<PermutationGroup reverse_complement(4): order 2, 4 positions, 4 letters>"


def test_equality_is_of_generators_and_letters():
    assert cyclic(4) == PermutationGroup([[1, 2, 3, 0]]) != PermutationGroup([[3, 0, 1, 2]])
    assert PermutationGroup([[1, 0]], 4) != PermutationGroup([[1, 0]], "ACGT") != PermutationGroup([[1, 0]])
    assert cyclic(4) != "cyclic(4)"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cyclic",
        "cyclic(",
        "cyclic(3",
        "cyclic(3))",
        "cyclic(3) x",
        "cyclic(-3)",
        "cyclic(3, 4)",
        "cyclic(cyclic(3))",
        "cube(3)",
        "reverse_complement(4, ACGT)",
        "group(3)",
        "group(3:)",
        "group(3: (0 1 3))",
        "group(3: (0 0))",
        "group(3: (0 1)(1 2))",
        "group(3: (0 1) TGCA)",
        'group(3: (0 1) "TGCA")',
        'group(3, "ACGT": (0 1) "TGC")',
        'group(3, "ACGT": (0 1) ["TGCA"])',
        'group(3, "ACGT": (0 1) ["TGCA"',
        "direct_product(cyclic(2))",
        "direct_product(cyclic(2), 3)",
        "dihedral(2)",
        "symmetric(9)",
        3,
    ],
)
def test_text_that_is_no_group(text):
    with pytest.raises(ValueError):
        parse(text)


def test_what_parse_expects():
    with pytest.raises(
        ValueError, match=re.escape("expected ',' or ')' at character 9, received 'x'; named groups are cyclic")
    ):
        parse("cyclic(3 x")


# --- forms of generators -------------------------------------------------------------------------------------------


def test_forms_of_generators():
    complement = [3, 2, 1, 0]
    expected = PermutationGroup([([2, 1, 0], complement)], "ACGT")
    forms = ["TGCA", list("TGCA"), tuple(complement), np.array(complement), torch.tensor(complement)]
    forms += [{"A": "T", "T": "A", "C": "G", "G": "C"}, {0: 3, 3: 0, "C": "G", 2: 1}]
    forms += [["TGCA"] * 3, ["TGCA", complement, dict(zip("ACGT", "TGCA"))], np.tile(complement, (3, 1))]
    for letters in forms:
        for positions in ([2, 1, 0], (2, 1, 0), np.array([2, 1, 0]), torch.tensor([2, 1, 0]), range(2, -1, -1)):
            for generator in ((positions, letters), [positions, letters]):
                assert PermutationGroup([generator], "ACGT") == expected
    assert PermutationGroup([Element((2, 1, 0), (3, 2, 1, 0))], "ACGT") == expected
    assert PermutationGroup([([1, 0], [None, "TGCA"])], "ACGT").generators[0].letters == ((0, 1, 2, 3), (3, 2, 1, 0))
    assert PermutationGroup([(1, 0)]) == PermutationGroup([[1, 0]]) == PermutationGroup([((1, 0), None)])
    assert PermutationGroup(np.array([[1, 0, 2], [0, 2, 1]])).order == 6


@pytest.mark.parametrize(
    "generators, letters, message",
    [
        ([], None, "one permutation or more, received []; for the trivial group give the identity"),
        ("10", None, "one permutation or more, received '10'"),
        ([[]], None, "generator 0: positions are at least one position"),
        (
            [[0, 0, 1]],
            None,
            "generator 0: positions are a permutation of 0 to 2, each exactly once, received [0, 0, 1]",
        ),
        ([[0, 1], [1, 2]], None, "generator 1: positions are a permutation of 0 to 1"),
        ([[1, 2, 3]], None, "generator 0: positions are a permutation"),
        ([[0.0, 1.0, 2.0]], None, "generator 0: positions are a permutation"),
        ([[True, False, 2]], None, "generator 0: positions are a permutation"),
        ([3, 4], None, "generator 0: expected a sequence, received 3"),
        (["102"], None, "generator 0: positions are a sequence of integers, received '102'"),
        ([[1, 0], [1, 0, 2]], None, "all generators permute the same positions, received generators of lengths [2, 3]"),
        ([([1, 0], "TGCA")], None, "generator 0 changes letters, 'TGCA', but the group has none; say letters='ACGT'"),
        ([([1, 0], "TGCX")], "ACGT", "letters of generator 0: 'X' is outside the letters 'ACGT'"),
        ([([1, 0], [3, 2, 1, 4])], 4, "letters of generator 0: 4 is outside the letters '0 to 3'"),
        ([([1, 0], "TGCA")], 4, "letters of generator 0: 'T' is outside the letters '0 to 3'"),
        ([([1, 0], "TGC")], "ACGT", "letters of generator 0: letters are a permutation of 0 to 3, each exactly once"),
        ([([1, 0], "TGCC")], "ACGT", "letters are a permutation of 0 to 3, each exactly once, received 'TGCC'"),
        ([([1, 0], {"A": "T"})], "ACGT", "two letters become the same one in {'A': 'T'}"),
        ([([1, 0], {"A": "U", "U": "A"})], "ACGT", "'U' is outside the letters 'ACGT'"),
        ([([1, 0], ["TGCA"] * 3)], "ACGT", "has 2 positions, so letter maps are one for all or 2, one a position"),
        ([([1, 0], ["TGCA", "TGCC"])], "ACGT", "letters of generator 0, position 1: letters are a permutation"),
        ([([1, 0], 5)], "ACGT", "letters of generator 0: expected a sequence, received 5"),
        ([[1, 0]], "ACGTA", "an alphabet has one letter or more, each once, received 'ACGTA' with 'A' repeated"),
        ([[1, 0]], "", "an alphabet has one letter or more"),
        ([[1, 0]], -1, "letters is an alphabet such as 'ACGT', a number of letters or None, received -1"),
        ([[1, 0]], 2.5, "letters is an alphabet such as 'ACGT'"),
    ],
)
def test_generators_that_are_none(generators, letters, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PermutationGroup(generators, letters)


def test_too_large():
    with pytest.raises(ValueError, match=re.escape("larger than max_order 50000: 50000 elements were found")):
        PermutationGroup(symmetric(3).generators[:1] and [[*range(1, 9), 0], [1, 0, *range(2, 9)]])
    with pytest.raises(ValueError, match="larger than max_order 5: 5 elements were found and the generators make more"):
        PermutationGroup([[1, 2, 3, 4, 5, 0]], max_order=5)
    assert PermutationGroup([[1, 2, 3, 4, 5, 0]], max_order=6).order == 6
    with pytest.raises(ValueError, match="max_order is an integer, at least 1, received 0"):
        PermutationGroup([[1, 0]], max_order=0)
    for make, order in (
        (lambda: symmetric(9), 362880),
        (lambda: alternating(9), 181440),
        (lambda: wreath_product(symmetric(4), symmetric(4)), 24**4 * 24),
        (lambda: direct_product(symmetric(6), symmetric(5)), 720 * 120),
    ):
        with pytest.raises(ValueError, match=f"the order is {order}, more than max_order 50000"):
            make()
    with pytest.raises(ValueError, match="symmetric\\(400\\): the order is about 10\\^869"):
        symmetric(400)
    assert symmetric(6, max_order=720).order == alternating(6, max_order=360).order * 2
    with pytest.raises(ValueError, match="a multiplication table is made up to order 5040; use multiply"):
        _ = M11.table
    with pytest.raises(ValueError, match="orbits of pairs are a matrix, positions by positions; at most 8192"):
        reversal(8193).orbitals()


def test_too_many_bytes(monkeypatch):
    monkeypatch.setattr("erlangen.finite._enumeration.MAX_BYTES", 500)
    assert cyclic(22).order == 22
    with pytest.raises(ValueError, match="larger than 256 MiB of elements: 21 elements were found"):
        cyclic(23)


def test_a_search_that_is_too_long(monkeypatch):
    monkeypatch.setattr("erlangen.finite._closure.SEARCH_STEPS", 0)
    with pytest.raises(ValueError, match="two_closure: undecided after 0 steps of search on 12 positions"):
        independent_rings(2).two_closure()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: cyclic(0), "cyclic: n is an integer, at least 1, received 0"),
        (lambda: cyclic(2.0), "cyclic: n is an integer, at least 1, received 2.0"),
        (lambda: dihedral(2), "dihedral(n) acts faithfully on n ≥ 3 positions, received 2"),
        (lambda: symmetric("3"), "symmetric: n is an integer"),
        (lambda: alternating(-1), "alternating: n is an integer"),
        (lambda: reversal(True), "reversal: n is an integer"),
        (lambda: reverse_complement(0), "reverse_complement: length is an integer, at least 1, received 0"),
        (lambda: reverse_complement(4, "ACG"), "reverse_complement: 'A' has no complement in the alphabet 'ACG'"),
        (lambda: reverse_complement(4, "ACGTU"), "two letters of the alphabet 'ACGTU' have the complement 'A'"),
        (lambda: reverse_complement(4, "ACGTX"), "'X' has no complement"),
        (lambda: reverse_complement(4, "ACgt"), "'A' has no complement"),
        (lambda: reverse_complement(4, 4), "reverse_complement: alphabet is a string such as 'ACGT', received 4"),
        (lambda: reverse_complement(4, "AATT"), "two letters of the alphabet 'AATT' have the complement 'T'"),
        (lambda: inverted_repeat(0, 2), "inverted_repeat: arm is an integer, at least 1, received 0"),
        (lambda: inverted_repeat(2, -1), "inverted_repeat: spacer is an integer, at least 0, received -1"),
        (lambda: direct_product(cyclic(2), 3), "direct_product: takes two groups, received 3"),
        (lambda: wreath_product("cyclic(2)", cyclic(2)), "wreath_product: takes two groups, received 'cyclic(2)'"),
        (
            lambda: wreath_product(cyclic(2), reverse_complement(2)),
            "wreath_product: b permutes blocks and has no letters",
        ),
        (
            lambda: direct_product(reverse_complement(2), reverse_complement(2, "ACGU")),
            "direct_product: both groups change the same letters, received 'ACGT' and 'ACGU'",
        ),
        (
            lambda: direct_product(PermutationGroup([([0], [1, 0, 2])], 3), PermutationGroup([([0], [0, 2, 1])], 3)),
            "do not commute or are not independent: together they make order 6, not 2 x 2",
        ),
        (
            lambda: direct_product(PermutationGroup([([0], [1, 0])], 2), PermutationGroup([([0], [1, 0])], 2)),
            "do not commute or are not independent: together they make order 2, not 2 x 2",
        ),
    ],
)
def test_named_groups_refuse(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_both_factors_may_change_letters_that_commute():
    product = direct_product(reverse_complement(2), reverse_complement(3))
    assert product.order == 4 and product.is_abelian
    assert product.translate(product.multiply(*product.generator_numbers), "AACGTC") == "CTGCAA"


def test_elements_that_are_not_there():
    group = reverse_complement(4)
    for element in (
        [1, 0, 2, 3],
        Element((3, 2, 1, 0), (0, 1, 2, 3)),
        [0, 1, 2],
        ([3, 2, 1, 0], ["TGCA"] * 3 + ["ACGT"]),
    ):
        with pytest.raises(ValueError, match="does not contain"):
            group.number(element)
    with pytest.raises(ValueError, match="PermutationGroup: element: positions are a permutation"):
        group.number([0, 0, 1, 2])
    for number in (2, -1, 1.0, "1", True, np.array([0, 2]), None):
        with pytest.raises(ValueError, match="elements are numbered 0 to 1, received"):
            group.multiply(0, number)
    with pytest.raises(ValueError, match="expected one element"):
        group.element(np.array([0, 1]))
    assert group.multiply(1, 1) == 0 and isinstance(group.multiply(1, 1), int) and isinstance(group.inverse(1), int)
    assert group.multiply(np.zeros((3, 1), int), np.zeros(2, int)).shape == (3, 2)
    assert group.number(([3, 2, 1, 0], ["TGCA"] * 4)) == 1  # the same, said a position at a time


def test_what_is_acted_on():
    group = reverse_complement(4)
    with pytest.raises(ValueError, match=re.escape("permute: dim -2 has 4 positions, received [2, 5, 3]")):
        group.permute(1, torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match=re.escape("permute: dim -2 has 4 positions, received [4]")):
        group.permute(1, torch.zeros(4))
    with pytest.raises(ValueError, match=re.escape("tokens are [..., 4], received [2, 5]")):
        group.act_on_tokens(1, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=re.escape("tokens are integers, received torch.float32")):
        group.act_on_tokens(1, torch.zeros(2, 4))
    for tokens in ([0, 1, 2, 4], [-1, 0, 0, 0]):
        with pytest.raises(ValueError, match="letters are 0 to 3, received"):
            group.act_on_tokens(1, torch.tensor(tokens))
    with pytest.raises(ValueError, match=re.escape("x is [..., 4 positions, 4 letters], received [4, 5]")):
        group.act_on_onehot(1, torch.zeros(4, 5))
    with pytest.raises(ValueError, match="without letters use permute"):
        reversal(4).act_on_onehot(1, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="a string has 4 letters, received 5"):
        group.translate(1, "GATTA")
    with pytest.raises(ValueError, match="'UX' is outside the alphabet 'ACGT'"):
        group.translate(1, "GUXU")
    with pytest.raises(ValueError, match="its letters are numbers; use act_on_tokens"):
        PermutationGroup([[1, 0]], 4).translate(1, "GA")
    with pytest.raises(ValueError, match="elements are numbered 0 to 1, received 2"):
        group.permute(2, torch.zeros(4, 1))


# --- size ----------------------------------------------------------------------------------------------------------


def test_windows_of_many_positions_are_frugal():
    """Order 2048 on 1024 positions: no [G, G] array, which would take as much as all elements even in bytes."""
    tracemalloc.start()
    ring, strands = dihedral(1024), reverse_complement(1024)
    assert ring.order == 2048 and len(ring.conjugacy_classes) == 512 + 3 and strands.order == 2
    numbers = np.arange(ring.order)
    assert (ring.multiply(numbers, ring.inverse(numbers)) == 0).all()
    assert ring.is_transitive and len(strands.orbits) == 512
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    rows = 2048 * 1024 * 2  # bytes
    assert held < 1.5 * rows and peak < 4 * rows
    turn, flip = ring.generator_numbers
    assert ring.multiply(ring.multiply(flip, turn), flip) == ring.inverse(turn)
    assert ring.element_orders[turn] == 1024 and math.lcm(*np.unique(ring.element_orders).tolist()) == 1024
    text = "ACGT" * 256
    assert strands.translate(1, text) == text  # ACGT is its own reverse complement


def test_keys_that_collide_are_drawn_again(monkeypatch):
    """Products are found by random sums over a base: sums that do not tell all elements apart are refused."""
    draw, seeds = np.random.default_rng, []

    class Zeros:
        def integers(self, *args, size, dtype):
            return np.zeros(size, dtype)

    def default_rng(seed):
        seeds.append(seed)
        return Zeros() if len(seeds) < 3 else draw(seed)

    monkeypatch.setattr(np.random, "default_rng", default_rng)
    assert_is_a_group(symmetric(4))
    assert seeds == [0, 1, 2]


def test_the_comparison_sees_a_wrong_product(monkeypatch):
    group = symmetric(3)
    assert_is_a_group(group)
    wrong = symmetric(3)
    monkeypatch.setattr(wrong, "multiply", lambda a, b: group.multiply(b, a))  # the other order of composition
    with pytest.raises(AssertionError):
        assert_is_a_group(wrong)
