"""An element of a finite group, and the forms in which it is written and read."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ._enumeration import cycles_of

LetterMap = tuple[int, ...] | tuple[tuple[int, ...], ...]


class Element(NamedTuple):
    """An element of a group, written out.

    Attributes:
        positions: position i goes to ``positions[i]``.
        letters: None without letters; letter a becomes ``letters[a]``, or, where the map depends on the position,
            ``letters[i][a]`` if it stands at position i.
    """

    positions: tuple[int, ...]
    letters: LetterMap | None = None


def read_letters(letters: str | int | None) -> tuple[str | None, int]:
    if letters is None or (is_int(letters) and letters == 0):
        return None, 0
    if isinstance(letters, str):
        repeated = sorted({a for a in letters if letters.count(a) > 1})
        if not letters or repeated:
            raise ValueError(
                f"PermutationGroup: an alphabet has one letter or more, each once, received {letters!r}"
                + (f" with {''.join(repeated)!r} repeated" if repeated else "")
            )
        return letters, len(letters)
    if is_int(letters) and letters > 0:
        return None, int(letters)
    raise ValueError(
        f"PermutationGroup: letters is an alphabet such as 'ACGT', a number of letters or None, received {letters!r}"
    )


def read_generator(generator: Any, k: int | None, alphabet: str | None, num_letters: int) -> Element:
    """One generator, written out; ``k`` is its place among them, None for an element that is looked up."""
    what = "element" if k is None else f"generator {k}"
    is_pair = (
        isinstance(generator, tuple | list) and len(generator) == 2 and generator and not is_int(generator[0])
    ) or isinstance(generator, Element)
    positions, letters = generator if is_pair else (generator, None)
    positions = _read_permutation(positions, None, f"PermutationGroup: {what}", "positions")
    if not num_letters:
        if letters is not None:
            raise ValueError(
                f"PermutationGroup: {what} changes letters, {letters!r}, but the group has none; say letters='ACGT', "
                "or the number of letters"
            )
        return Element(positions, None)
    return Element(positions, _read_letter_maps(letters, len(positions), what, alphabet, num_letters))


def write_element(element: Element, alphabet: str | None) -> str:
    """Cycles of positions, then the letters that those of the alphabet become: ``(0 3)(1 2) "TGCA"``."""

    def text(letter_map: Any) -> str | list[int]:
        return "".join(alphabet[a] for a in letter_map) if alphabet else list(letter_map)

    cycles = (cycle for cycle in cycles_of(element.positions) if len(cycle) > 1)
    positions = "".join(f"({' '.join(map(str, cycle))})" for cycle in cycles) or "()"
    letters = element.letters
    if letters is None or letters == tuple(range(len(letters))):
        return positions
    nested = isinstance(letters[0], tuple)
    return f"{positions} {json.dumps([text(m) for m in letters] if nested else text(letters))}"


def _read_letter_maps(letters: Any, degree: int, what: str, alphabet: str | None, num_letters: int) -> LetterMap:
    if letters is None or isinstance(letters, str | Mapping):
        return _read_letter_map(letters, what, alphabet, num_letters)
    letters = _as_list(letters, f"PermutationGroup: letters of {what}")
    if all(is_int(a) or (isinstance(a, str) and len(a) == 1 < num_letters) for a in letters):
        return _read_letter_map(letters, what, alphabet, num_letters)
    if len(letters) != degree:
        raise ValueError(
            f"PermutationGroup: {what} has {degree} positions, so letter maps are one for all or {degree}, one a "
            f"position, received {len(letters)}: {shorten(repr(letters))}"
        )
    maps = tuple(_read_letter_map(m, f"{what}, position {i}", alphabet, num_letters) for i, m in enumerate(letters))
    return maps if any(m != maps[0] for m in maps) else maps[0]


def _read_letter_map(letters: Any, what: str, alphabet: str | None, num_letters: int) -> tuple[int, ...]:
    what = f"PermutationGroup: letters of {what}"

    def index(letter: Any) -> int:
        if isinstance(letter, str) and alphabet is not None and len(letter) == 1 and letter in alphabet:
            return alphabet.index(letter)
        if is_int(letter) and 0 <= letter < num_letters:
            return int(letter)
        raise ValueError(f"{what}: {letter!r} is outside the letters {alphabet or f'0 to {num_letters - 1}'!r}")

    if letters is None:
        return tuple(range(num_letters))
    if isinstance(letters, Mapping):
        images = list(range(num_letters))
        for letter, image in letters.items():
            images[index(letter)] = index(image)
        if sorted(images) != list(range(num_letters)):
            raise ValueError(
                f"{what}: two letters become the same one in {letters!r}; every letter that another one becomes needs "
                "an entry of its own, as in {'A': 'T', 'T': 'A'}"
            )
        return tuple(images)
    images = list(letters) if isinstance(letters, str) else _as_list(letters, what)
    return _read_permutation([index(a) for a in images], num_letters, what, "letters", letters)


def _read_permutation(values: Any, size: int | None, what: str, kind: str, shown: Any = None) -> tuple[int, ...]:
    shown = values if shown is None else shown
    if isinstance(values, str | Mapping):
        raise ValueError(f"{what}: {kind} are a sequence of integers, received {shown!r}")
    values = _as_list(values, what)
    size = len(values) if size is None else size
    if not size or not all(is_int(i) for i in values) or sorted(values) != list(range(size)):
        rule = f"a permutation of 0 to {size - 1}" if size else "at least one position"
        raise ValueError(f"{what}: {kind} are {rule}, each exactly once, received {shorten(repr(shown))}")
    return tuple(int(i) for i in values)


def _as_list(values: Any, what: str) -> list:
    try:
        return values.tolist() if isinstance(values, np.ndarray | Tensor) else list(values)
    except TypeError:
        raise ValueError(f"{what}: expected a sequence, received {values!r}") from None


def is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def say_order(order: int) -> str:
    return str(order) if order < 10**15 else f"about 10^{math.log10(order):.0f}"


def shorten(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
