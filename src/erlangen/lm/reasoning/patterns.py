"""Sequences to go on with, of numbers and of letters.

The rules of a family are a closed set. A sequence is asked only if every rule of the set that fits the terms shown
gives the same next term: by these rules it has one continuation.
"""

import string
from collections.abc import Callable, Sequence
from random import Random

from ._items import Item

Terms = Sequence[int]
Rule = Callable[[Terms, int], int | None]
_NO_MODULUS = 1 << 40  # numbers stay far below


def _differences(terms: Terms, modulus: int, lag: int = 1) -> list[int]:
    return [(terms[i] - terms[i - lag]) % modulus for i in range(lag, len(terms))]


def _constant_step(terms: Terms, modulus: int) -> int | None:
    steps = set(_differences(terms, modulus))
    return (terms[-1] + steps.pop()) % modulus if len(terms) >= 3 and len(steps) == 1 and steps != {0} else None


def _ratio(terms: Terms, modulus: int) -> int | None:
    if len(terms) < 3 or 0 in terms or len({*terms}) == 1:
        return None
    first, second = terms[0], terms[1]
    if any(terms[i] * first != terms[i - 1] * second for i in range(1, len(terms))):
        return None
    following, rest = divmod(terms[-1] * second, first)
    return following if rest == 0 else None


def _sum_of_two(terms: Terms, modulus: int) -> int | None:
    if len(terms) < 4 or any(terms[i] != terms[i - 1] + terms[i - 2] for i in range(2, len(terms))):
        return None
    return terms[-1] + terms[-2]


def _growing_step(terms: Terms, modulus: int) -> int | None:
    steps = _differences(terms, modulus)
    growth = set(_differences(steps, modulus))
    if len(terms) < 4 or len(growth) != 1 or growth == {0}:
        return None
    return (terms[-1] + steps[-1] + growth.pop()) % modulus


def _two_steps(terms: Terms, modulus: int) -> int | None:
    steps = _differences(terms, modulus)
    if len(terms) < 5 or any(steps[i] != steps[i - 2] for i in range(2, len(steps))):
        return None
    return (terms[-1] + steps[-2]) % modulus


def _two_sequences(terms: Terms, modulus: int) -> int | None:
    steps = _differences(terms, modulus, lag=2)
    if len(terms) < 6 or any(steps[i] != steps[i - 2] for i in range(2, len(steps))):
        return None
    return (terms[-2] + steps[-2]) % modulus


def _cycle(period: int) -> Rule:
    def rule(terms: Terms, modulus: int) -> int | None:
        if len(terms) < 2 * period or any(terms[i] != terms[i - period] for i in range(period, len(terms))):
            return None
        return terms[-period]

    return rule


NUMERIC: dict[str, Rule] = {
    "constant step": _constant_step, "ratio": _ratio, "sum of two": _sum_of_two, "growing step": _growing_step,
    "two steps": _two_steps, "cycle of 2": _cycle(2), "cycle of 3": _cycle(3),
}  # fmt: skip
ALPHABETIC: dict[str, Rule] = {
    "constant step": _constant_step, "growing step": _growing_step, "two sequences": _two_sequences,
    "cycle of 2": _cycle(2), "cycle of 3": _cycle(3),
}  # fmt: skip


def continuations(terms: Terms, rules: dict[str, Rule], modulus: int = _NO_MODULUS) -> set[int]:
    """The next terms that the rules give which fit; one number, if the sequence is unambiguous."""
    return {found for rule in rules.values() if (found := rule(terms, modulus)) is not None}


def _go_on(start: int, steps: Sequence[int]) -> list[int]:
    terms = [start]
    for step in steps:
        terms.append(terms[-1] + step)
    return terms


def _numbers(rng: Random, kind: str) -> list[int]:
    """Terms of a kind, the answer last."""
    if kind == "arithmetic":
        return _go_on(rng.randint(1, 60), [rng.randint(1, 12)] * rng.randint(4, 5))
    if kind == "countdown":
        return _go_on(rng.randint(20, 99), [-rng.randint(1, 12)] * rng.randint(4, 5))
    if kind == "geometric":
        first, ratio, count = rng.randint(1, 12), rng.randint(2, 4), rng.randint(4, 5)
        terms = [first * ratio**power for power in range(count)]
        return terms if rng.random() < 0.7 else terms[::-1]
    if kind == "fibonacci":
        terms = [rng.randint(1, 9), rng.randint(1, 9)]
        for _ in range(rng.randint(4, 5)):
            terms.append(terms[-1] + terms[-2])
        return terms
    if kind == "growing":
        first, growth = rng.randint(1, 6), rng.randint(1, 4)
        return _go_on(rng.randint(1, 20), [first + growth * i for i in range(rng.randint(4, 5))])
    if kind == "two steps":
        steps = rng.sample(range(1, 10), 2)
        return _go_on(rng.randint(1, 30), [steps[i % 2] for i in range(rng.randint(5, 6))])
    period = rng.randint(2, 3)
    terms = rng.sample(range(1, 100), period)
    return [terms[i % period] for i in range(2 * period + rng.randint(1, period))]


_NUMERIC_KINDS = ("arithmetic", "countdown", "geometric", "fibonacci", "growing", "two steps", "cycle")


def numeric(rng: Random) -> list[Item]:
    """``3, 6, 9, 12,`` and four numbers of as many digits to choose from."""
    kind = rng.choice(_NUMERIC_KINDS)
    *terms, answer = _numbers(rng, kind)
    if min(*terms, answer) < 1 or max(*terms, answer) > 999 or continuations(terms, NUMERIC) != {answer}:
        return []
    step, digits = terms[-1] - terms[-2], len(str(answer))
    near = {answer + by for by in (-10, -2, -1, 1, 2, 10, step, -step)} | {terms[-1], terms[-2], terms[-1] + step}
    wrong = sorted(x for x in near if x > 0 and x != answer and len(str(x)) == digits)
    if len(wrong) < 3:
        return []
    prompt = "".join(f" {term}," for term in terms)[1:]
    return [_choice(rng, "numeric", kind, prompt, str(answer), map(str, rng.sample(wrong, 3)), shown=len(terms))]


def _letters(rng: Random, kind: str) -> list[int]:
    start = rng.randrange(26)
    if kind == "step":
        return _go_on(start, [1] * rng.randint(3, 6))
    if kind == "skip":
        return _go_on(start, [rng.randint(2, 6)] * rng.randint(4, 5))
    if kind == "backward":
        return _go_on(start, [-rng.randint(1, 4)] * rng.randint(4, 5))
    if kind == "growing":
        return _go_on(start, [rng.randint(0, 1) + i for i in range(rng.randint(4, 5))])
    if kind == "doubled":
        step, count = rng.randint(1, 3), rng.randint(7, 8)
        return [start + step * (i // 2) for i in range(count)]
    if kind == "interleaved":
        other, steps = rng.randrange(26), (rng.choice((-2, -1, 1, 2)), rng.choice((-2, -1, 1, 2)))
        return [(start, other)[i % 2] + steps[i % 2] * (i // 2) for i in range(rng.randint(7, 8))]
    period = rng.randint(2, 3)
    terms = rng.sample(range(26), period)
    return [terms[i % period] for i in range(2 * period + rng.randint(1, period))]


_ALPHABETIC_KINDS = ("step", "skip", "backward", "growing", "doubled", "interleaved", "cycle")


def alphabetic(rng: Random) -> list[Item]:
    """``X, Y, Z, A,`` and four letters to choose from; after Z comes A."""
    kind = rng.choice(_ALPHABETIC_KINDS)
    *terms, answer = (term % 26 for term in _letters(rng, kind))
    if continuations(terms, ALPHABETIC, 26) != {answer}:
        return []
    step = terms[-1] - terms[-2]
    near = {(answer + by) % 26 for by in (-2, -1, 1, 2, step, -step)} | {terms[-1], terms[-2]}
    alphabet = rng.choice((string.ascii_uppercase, string.ascii_lowercase))
    prompt = "".join(f" {alphabet[term]}," for term in terms)[1:]
    wrong = (alphabet[place] for place in rng.sample(sorted(near - {answer}), 3))
    wraps = any(abs(b - a) > 13 for a, b in zip(terms, [*terms[1:], answer]))
    return [_choice(rng, "alphabetic", kind, prompt, alphabet[answer], wrong, shown=len(terms), wraps=wraps)]


def _choice(rng: Random, family: str, kind: str, prompt: str, answer: str, wrong, **parameters) -> Item:
    """An item with its candidates in a random order."""
    candidates = [answer, *wrong]
    rng.shuffle(candidates)
    return Item(
        family=family, kind=kind, prompt=prompt, candidates=tuple(f" {word}" for word in candidates),
        answer=candidates.index(answer), parameters=parameters,
    )  # fmt: skip
