"""Questions whose answer stands in the prompt, or follows from it: retrieval, inference, copy.

Every candidate occurs in the prompt, and as often as the answer; which one is asked for, and the order of the premises,
are drawn, so that neither a word nor a place in the prompt is favoured. In copy the words of the list are all
candidates or drawn from; those that the second pass has reached already occur once more than the answer.
"""

import itertools
from collections.abc import Sequence
from random import Random

from . import _words as words
from ._items import Item
from .patterns import _choice

DISTANCES = (1, 2, 4, 8, 16, 32)
"""Sentences between a fact and its question, in far retrieval."""


def _facts(rng: Random, kind: str, count: int) -> tuple[list[str], list[str], list[str]]:
    """Facts, the questions about them and the answers."""
    names = [name.capitalize() for name in rng.sample(words.NAMES, count)]
    if kind == "has":
        values, facts = rng.sample(words.OBJECTS, count), "{} has the {}."
        questions = "{} has the"
    elif kind == "lives":
        values, facts = rng.sample(words.CITIES, count), "{} lives in {}."
        questions = "{} lives in"
    else:
        values, facts = [str(digit) for digit in rng.sample(range(10), count)], "{} = {},"
        questions = "{} ="
    return (
        [facts.format(name, value) for name, value in zip(names, values)],
        [questions.format(name) for name in names],
        values,
    )


def near(rng: Random) -> list[Item]:
    """``Dax has the coin. Wug has the lamp. Dax has the``"""
    kind, count = rng.choice(("has", "lives", "equals")), rng.randint(2, 4)
    facts, questions, values = _facts(rng, kind, count)
    asked = rng.randrange(count)
    prompt = " ".join([*facts, questions[asked]])
    wrong = values[:asked] + values[asked + 1 :]
    return [_choice(rng, "near", kind, prompt, values[asked], wrong, facts=count, asked=asked)]


def far(rng: Random) -> list[Item]:
    """``Dax has the coin. Wug has the lamp. The old cat ran. The shy hen sat. Dax has the``"""
    kind, count, distance = rng.choice(("has", "lives")), rng.randint(2, 3), rng.choice(DISTANCES)
    facts, questions, values = _facts(rng, kind, count)
    asked = rng.randrange(count)
    pool = [f"The {a} {b} {c}." for a in words.ADJECTIVES for b in words.ANIMALS for c in words.VERBS]
    prompt = " ".join([*facts, *rng.sample(pool, distance), questions[asked]])
    wrong = values[:asked] + values[asked + 1 :]
    return [_choice(rng, "far", kind, prompt, values[asked], wrong, facts=count, asked=asked, distance=distance)]


_ORDERS = (("taller", "shorter", "tallest", "shortest"), ("older", "younger", "oldest", "youngest"),
           ("faster", "slower", "fastest", "slowest"))  # fmt: skip


def _order(rng: Random) -> Item:
    """``Wug is taller than Zop. Wug is shorter than Dax. The tallest is``"""
    names = [name.capitalize() for name in rng.sample(words.NAMES, 3)]
    more, less, most, least = rng.choice(_ORDERS)
    premises = [
        f"{a} is {more} than {b}." if rng.random() < 0.5 else f"{b} is {less} than {a}."
        for a, b in itertools.pairwise(names)
    ]
    rng.shuffle(premises)
    top = rng.random() < 0.5
    answer, wrong = (names[0], names[-1]) if top else (names[-1], names[0])  # the one between is named twice
    prompt = " ".join([*premises, f"The {most if top else least} is"])
    return _choice(rng, "inference", "order", prompt, answer, [wrong])


def _classes(rng: Random, depth: int, last: Sequence[str], article: str, kind: str) -> Item:
    """``Every dax is a wug. Every fep is a tov. Zop is a dax. So Zop is a``; deeper, over classes between."""
    count = len(last)
    made_up = rng.sample([name for name in words.NAMES if name not in last], count * depth + 1)
    who = made_up.pop().capitalize()
    chains = [[*made_up[depth * i : depth * (i + 1)], last[i]] for i in range(count)]
    premises = []
    for chain in chains:
        for place, (lower, higher) in enumerate(itertools.pairwise(chain)):
            is_last = place == depth - 1
            premises.append(f"Every {lower} is {article if is_last else 'a '}{higher}.")
    asked = rng.randrange(count)
    premises.append(f"{who} is a {chains[asked][0]}.")
    rng.shuffle(premises)
    prompt = " ".join([*premises, f"So {who} is{' ' + article.strip() if article else ''}"])
    wrong = [value for place, value in enumerate(last) if place != asked]
    return _choice(rng, "inference", kind, prompt, last[asked], wrong, depth=depth, rules=count)


def inference(rng: Random) -> list[Item]:
    """An order of three, a syllogism, or a property that a class hands down."""
    kind = rng.choice(("order", "syllogism", "inheritance"))
    if kind == "order":
        return [_order(rng)]
    count = rng.randint(2, 3)
    if kind == "syllogism":
        return [_classes(rng, 1, rng.sample(words.NAMES, count), "a ", kind)]
    return [_classes(rng, rng.randint(1, 2), rng.sample(words.COLOURS, count), "", kind)]


def copy(rng: Random) -> list[Item]:
    """``kite drum coin kite drum``"""
    pools: dict[str, Sequence[str]] = {
        "words": words.OBJECTS, "made-up words": words.NAMES, "symbols": words.SYMBOLS,
        "numbers": [str(number) for number in range(10, 100)],
    }  # fmt: skip
    kind = rng.choice(list(pools))
    length, repeats = rng.randint(3, 8), rng.randint(1, 2)
    values = rng.sample(pools[kind], length)
    place = rng.randrange(1, length)
    wrong = rng.sample(values[:place] + values[place + 1 :], min(3, length - 1))
    prompt = " ".join([*values * repeats, *values[:place]])
    return [_choice(rng, "copy", kind, prompt, values[place], wrong, length=length, repeats=repeats, place=place)]
