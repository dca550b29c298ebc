"""Which items stand in a text, say that of the training: in full, or with the end of their prompt."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ._items import Item

END_WORDS = 8
"""Words and marks of the end of an item, the answer included, whose occurrence counts."""
_WORD = re.compile(r"\w+|[^\w\s]")
_KEY = 3


@dataclass(frozen=True)
class Contamination:
    """What of a family's items was found in a text."""

    full: tuple[bool, ...]
    """Of each item, whether its prompt and right answer are in the text."""
    end: tuple[bool, ...]
    """Whether its last words and marks with the right answer are."""


def contamination(items: Sequence[Item], text: str | Iterable[str]) -> Contamination:
    """Look for items in a text.

    Words and marks are compared, without regard to case and white space.

    Args:
        items: what was asked.
        text: one text, or several; an item is found within one of them.
    """
    wanted = [_WORD.findall(item.text.lower()) for item in items]
    ends: dict[tuple[str, ...], list[int]] = {}
    for number, found in enumerate(wanted):
        ends.setdefault(tuple(found[-_KEY:]), []).append(number)
    sizes = sorted({len(key) for key in ends})
    full, end = [False] * len(items), [False] * len(items)
    for part in [text] if isinstance(text, str) else text:
        there = _WORD.findall(part.lower())
        for size in sizes:
            for place, key in enumerate(zip(*(there[shift:] for shift in range(size))), size):
                for number in ends.get(key, ()):
                    item = wanted[number]
                    tail = item[-END_WORDS:]
                    end[number] = end[number] or there[max(0, place - len(tail)) : place] == tail
                    full[number] = full[number] or there[max(0, place - len(item)) : place] == item
    return Contamination(tuple(full), tuple(end))
