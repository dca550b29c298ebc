"""The finite groups by name, and products of groups."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ._elements import is_int, say_order, shorten
from .groups import MAX_ORDER, PermutationGroup


def cyclic(n: int) -> PermutationGroup:
    """Rotations of n positions in a ring, order n: the generator sends i to i + 1."""
    _require_size("cyclic", n)
    return _named(f"cyclic({n})", [_rotation(n)])


def dihedral(n: int) -> PermutationGroup:
    """Rotations and reflections of n ≥ 3 positions in a ring, order 2n: the shift by one and the reversal."""
    if _require_size("dihedral", n) < 3:
        raise ValueError(
            f"dihedral(n) acts faithfully on n ≥ 3 positions, received {n}; use reversal(2) for order 2, or klein() "
            "for the dihedral group of order 4"
        )
    return _named(f"dihedral({n})", [_rotation(n), _reversal(n)])


def symmetric(n: int, *, max_order: int = MAX_ORDER) -> PermutationGroup:
    """All permutations of n positions, order n!: the shift by one and the swap of the first two."""
    _require_size("symmetric", n)
    _require_order(f"symmetric({n})", math.factorial(n), max_order)
    swap = [1, 0, *range(2, n)] if n > 1 else [0]
    return _named(f"symmetric({n})", [_rotation(n), swap] if n > 2 else [swap], max_order=max_order)


def alternating(n: int, *, max_order: int = MAX_ORDER) -> PermutationGroup:
    """All even permutations of n positions, order n!/2."""
    _require_size("alternating", n)
    _require_order(f"alternating({n})", max(1, math.factorial(n) // 2), max_order)
    if n < 3:
        generators = [list(range(n))]
    else:
        fixed = 1 - n % 2  # the cycle of an odd number of positions is even
        cycle = [*range(fixed), *(fixed + i for i in _rotation(n - fixed))]
        generators = [[1, 2, 0, *range(3, n)], cycle] if n > 3 else [[1, 2, 0]]
    return _named(f"alternating({n})", generators, max_order=max_order)


def reversal(n: int) -> PermutationGroup:
    """The window read backwards, order 2 (1 for n = 1); letters stay. See ``reverse_complement`` for DNA."""
    _require_size("reversal", n)
    return _named(f"reversal({n})", [_reversal(n)])


def klein() -> PermutationGroup:
    """Klein's four-group on 4 positions, regular: (0 1)(2 3) and (0 2)(1 3)."""
    return _named("klein()", [[1, 0, 3, 2], [2, 3, 0, 1]])


def quaternion() -> PermutationGroup:
    """The quaternion group on 8 positions 1, i, j, k, -1, -i, -j, -k, regular: multiplication by i and by j."""
    return _named("quaternion()", [[1, 4, 3, 6, 5, 0, 7, 2], [2, 7, 4, 1, 6, 3, 0, 5]])


def reverse_complement(length: int, alphabet: str = "ACGT") -> PermutationGroup:
    """The other strand: order reversed and letters complemented, order 2.

    Args:
        length: number of positions.
        alphabet: letters of DNA or RNA, upper or lower case, with IUPAC's ambiguity codes and ``-`` if wanted.

    Raises:
        ValueError: a letter without a complement in the alphabet.
    """
    _require_size("reverse_complement", length, "length")
    complement = _complement("reverse_complement", alphabet)
    extra = "" if alphabet == "ACGT" else f", {json.dumps(alphabet)}"
    return _named(f"reverse_complement({length}{extra})", [(_reversal(length), complement)], alphabet)


def inverted_repeat(arm: int, spacer: int, alphabet: str = "ACGT") -> PermutationGroup:
    """Two arms that are each other's reverse complement around a spacer that stays as it is, order 2.

    Args:
        arm: number of positions of one arm.
        spacer: number of positions between the arms: neither moved nor complemented.
        alphabet: as in :func:`reverse_complement`.

    Raises:
        ValueError: no arm, a negative spacer, or a letter without a complement in the alphabet.
    """
    _require_size("inverted_repeat", arm, "arm")
    _require_size("inverted_repeat", spacer, "spacer", least=0)
    complement = _complement("inverted_repeat", alphabet)
    n = 2 * arm + spacer
    in_spacer = [arm <= i < arm + spacer for i in range(n)]
    positions = [i if in_spacer[i] else n - 1 - i for i in range(n)]
    letters = [alphabet if in_spacer[i] else complement for i in range(n)]
    extra = "" if alphabet == "ACGT" else f", {json.dumps(alphabet)}"
    return _named(f"inverted_repeat({arm}, {spacer}{extra})", [(positions, letters)], alphabet)


def direct_product(a: PermutationGroup, b: PermutationGroup, *, max_order: int = MAX_ORDER) -> PermutationGroup:
    """Both groups on a grid: position (i, j), numbered i b.degree + j, goes to (a's image of i, b's image of j).

    Letters are changed by the one, or by both if they have the same letters and change them in ways that commute.

    Raises:
        ValueError: different letters, changes of letters that do not commute or not independent, or too large.
    """
    _require_groups("direct_product", a, b)
    text = f"direct_product({a}, {b})"
    if a.num_letters and b.num_letters and (a.alphabet, a.num_letters) != (b.alphabet, b.num_letters):
        raise ValueError(
            f"direct_product: both groups change the same letters, received {a.alphabet or a.num_letters!r} and "
            f"{b.alphabet or b.num_letters!r}"
        )
    _require_order(text, a.order * b.order, max_order)
    source = a if a.num_letters else b
    generators = []
    for group, first in ((a, True), (b, False)):
        for g in group.generators:
            positions, maps = np.array(g.positions), group.letter_map(group.number(g))
            i, j = np.divmod(np.arange(a.degree * b.degree), b.degree)
            moved = positions[i] * b.degree + j if first else i * b.degree + positions[j]
            letters = None if maps is None else maps[i if first else j].tolist()
            generators.append((moved.tolist(), letters))
    product = _named(text, generators, source.alphabet or source.num_letters, max_order=max_order)
    numbers_a = np.array(product.generator_numbers[: len(a.generators)])
    numbers_b = np.array(product.generator_numbers[len(a.generators) :])
    commute = product.multiply(numbers_a[:, None], numbers_b) == product.multiply(numbers_b, numbers_a[:, None])
    if product.order != a.order * b.order or not commute.all():
        raise ValueError(
            f"direct_product: the two groups change letters in ways that do not commute or are not independent: "
            f"together they make order {product.order}, not {a.order} x {b.order}"
        )
    return product


def wreath_product(a: PermutationGroup, b: PermutationGroup, *, max_order: int = MAX_ORDER) -> PermutationGroup:
    """b permutes blocks, and a acts in each block on its own: order a.order^b.degree b.order.

    Position i of block j is number j a.degree + i. Letters, if any, are a's.

    Raises:
        ValueError: b has letters, or the product is too large.
    """
    _require_groups("wreath_product", a, b)
    text = f"wreath_product({a}, {b})"
    if b.num_letters:
        raise ValueError(f"wreath_product: b permutes blocks and has no letters of its own, received {b!r}")
    _require_order(text, a.order**b.degree * b.order, max_order)
    n = a.degree * b.degree
    stay = np.arange(a.num_letters)
    generators = []
    for orbit in b.orbits:  # a acts in one block of each orbit, b carries it to the others
        block = slice(int(orbit[0]) * a.degree, (int(orbit[0]) + 1) * a.degree)
        for g in a.generators:
            positions = np.arange(n)
            positions[block] = block.start + np.array(g.positions)
            letters = None
            if a.num_letters:
                letters = np.tile(stay, (n, 1))
                letters[block] = a._maps_NL(a.number(g))
                letters = letters.tolist()
            generators.append((positions.tolist(), letters))
    j, i = np.divmod(np.arange(n), a.degree)
    generators += [((np.array(g.positions)[j] * a.degree + i).tolist(), None) for g in b.generators]
    return _named(text, generators, a.alphabet or a.num_letters, max_order=max_order)


NAMED: dict[str, Callable[..., PermutationGroup]] = {
    function.__name__: function
    for function in (
        cyclic,
        dihedral,
        symmetric,
        alternating,
        reversal,
        klein,
        quaternion,
        reverse_complement,
        inverted_repeat,
        direct_product,
        wreath_product,
    )
}


def _require_size(name: str, n: Any, parameter: str = "n", least: int = 1) -> int:
    if not is_int(n) or n < least:
        raise ValueError(f"{name}: {parameter} is an integer, at least {least}, received {n!r}")
    return int(n)


def _require_order(text: str, order: int, max_order: int) -> None:
    if order > max_order:
        raise ValueError(f"{shorten(text)}: the order is {say_order(order)}, more than max_order {max_order}")


def _require_groups(name: str, *groups: Any) -> None:
    for group in groups:
        if not isinstance(group, PermutationGroup):
            raise ValueError(f"{name}: takes two groups, received {group!r}")


_COMPLEMENTS: dict[str, str] = dict(zip("ACGTRYKMBVDHSWN-", "TGCAYRMKVBHDSWN-"))


def _complement(name: str, alphabet: Any) -> str:
    """The complements of the letters, in order."""
    if not isinstance(alphabet, str):
        raise ValueError(f"{name}: alphabet is a string such as 'ACGT', received {alphabet!r}")
    images = []
    for letter in alphabet:
        image = "A" if letter in "Uu" else _COMPLEMENTS.get(letter.upper(), "")
        if image == "T" and "U" in alphabet.upper():
            image = "U"
        image = image.lower() if letter.islower() else image
        if not image or image not in alphabet:
            raise ValueError(
                f"{name}: {letter!r} has no complement in the alphabet {alphabet!r}; for pairs of your own say "
                "PermutationGroup([(positions, {'A': 'T', 'T': 'A'})], letters=alphabet)"
            )
        if image in images:
            raise ValueError(f"{name}: two letters of the alphabet {alphabet!r} have the complement {image!r}")
        images.append(image)
    return "".join(images)


def _rotation(n: int) -> list[int]:
    return [(i + 1) % n for i in range(n)]


def _reversal(n: int) -> list[int]:
    return list(range(n - 1, -1, -1))


def _named(text: str, generators: Sequence, letters: str | int | None = None, **options: Any) -> PermutationGroup:
    group = PermutationGroup(generators, letters, **options)
    group._text = text
    return group
