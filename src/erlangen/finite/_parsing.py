"""A group from its string."""

import json
from collections.abc import Callable
from typing import Any

from .groups import PermutationGroup
from .named import NAMED


def parse(text: str) -> PermutationGroup:
    """The group of a string, as ``str`` writes it: a named group, ``"wreath_product(cyclic(2), symmetric(3))"``, or
    generators as cycles, with their letters: ``'group(4, "ACGT": (0 3)(1 2) "TGCA"; (0 2)(1 3))'``.

    Raises:
        ValueError: the string is not of this form, or the group refuses its arguments.
    """
    if not isinstance(text, str):
        raise ValueError(f"parse: text is a string, received {text!r}")
    reader = _Reader(text)
    group = reader.group()
    reader.end()
    return group


class _Reader:
    """Reads a group from left to right."""

    def __init__(self, text: str):
        self.text = text
        self.place = 0

    def fail(self, expected: str) -> ValueError:
        return ValueError(
            f"parse({self.text!r}): expected {expected} at character {self.place}, received "
            f"{self.text[self.place : self.place + 20]!r}; named groups are {', '.join(NAMED)}, others are written "
            "'group(3: (0 1 2); (0 1))'"
        )

    def peek(self) -> str:
        while self.text[self.place : self.place + 1].isspace():
            self.place += 1
        return self.text[self.place : self.place + 1]

    def take(self, symbol: str) -> bool:
        if found := self.peek() == symbol:
            self.place += 1
        return found

    def require(self, symbol: str) -> None:
        if not self.take(symbol):
            raise self.fail(repr(symbol))

    def word(self, accept: Callable[[str], bool]) -> str:
        self.peek()
        start = self.place
        while self.place < len(self.text) and accept(self.text[self.place]):
            self.place += 1
        return self.text[start : self.place]

    def integer(self) -> int:
        digits = self.word(lambda c: c in "0123456789")
        if not digits:
            raise self.fail("a number")
        return int(digits)

    def value(self) -> Any:
        """A JSON string or list."""
        self.peek()
        try:
            value, self.place = json.JSONDecoder().raw_decode(self.text, self.place)
        except json.JSONDecodeError:
            raise self.fail("a string or a list of letters") from None
        return value

    def end(self) -> None:
        if self.peek():
            raise self.fail("the end")

    def group(self) -> PermutationGroup:
        start = self.place
        name = self.word(lambda c: c.isalpha() or c == "_")
        if name != "group" and name not in NAMED:
            self.place = start
            raise self.fail("the name of a group")
        self.require("(")
        if name == "group":
            return self.generated()
        arguments = []
        while not self.take(")"):
            if arguments and not self.take(","):
                raise self.fail("',' or ')'")
            character = self.peek()
            arguments.append(
                self.integer() if character.isdigit() else self.value() if character == '"' else self.group()
            )
        try:
            return NAMED[name](*arguments)
        except TypeError:
            raise ValueError(f"parse({self.text!r}): {name} does not take the arguments {arguments}") from None

    def generated(self) -> PermutationGroup:
        degree = self.integer()
        letters = None
        if self.take(","):
            letters = self.value() if self.peek() == '"' else self.integer()
        self.require(":")
        generators = [self.generator(degree)]
        while self.take(";"):
            generators.append(self.generator(degree))
        self.require(")")
        return PermutationGroup(generators, letters)

    def generator(self, degree: int) -> tuple[list[int], Any]:
        positions = list(range(degree))
        self.require("(")
        seen: set[int] = set()
        while True:
            cycle = []
            while not self.take(")"):
                cycle.append(self.integer())
            if len(set(cycle)) < len(cycle) or seen & set(cycle) or any(i >= degree for i in cycle):
                raise self.fail(f"disjoint cycles of positions 0 to {degree - 1}, before the cycle that ended")
            seen |= set(cycle)
            for here, there in zip(cycle, [*cycle[1:], *cycle[:1]]):
                positions[here] = there
            if not self.take("("):
                return positions, self.value() if self.peek() in ('"', "[") and self.peek() else None
