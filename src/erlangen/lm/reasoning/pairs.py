"""Minimal pairs: two texts that differ in one word or in the order of words, of which one is right.

The two texts share their beginning, which is the prompt; likelihoods of the whole texts differ as those of what follows
it. Items come in blocks in which the same continuations are right equally often, for the same last words of the prompt
where the rule is about words before them: what looks at the continuation alone, or at the noun that stands nearest,
scores one half.
"""

from collections.abc import Sequence
from random import Random

from . import _words as words
from ._items import Item


def _block(rng: Random, family: str, kind: str, candidates: Sequence[str], prompts: Sequence[tuple[str, int]]):
    """Items of one pair of candidates; each prompt with the place of the right one."""
    turned = rng.random() < 0.5
    shown = tuple(f" {text}" for text in (candidates[::-1] if turned else candidates))
    return [
        Item(
            family=family, kind=kind, prompt=prompt, candidates=shown,
            answer=1 - answer if turned else answer,
        )
        for prompt, answer in prompts
    ]  # fmt: skip


def negation(rng: Random) -> list[Item]:
    """What is denied is not the answer, wherever it stands."""
    kind, name = rng.choice(("colour", "holds", "opposite")), rng.choice(words.NAMES).capitalize()
    if kind == "colour":
        pair = rng.sample(words.COLOURS, 2)
        said = [
            (sentences, answer)
            for answer in (0, 1)
            for sentences in (
                f"{name} is not {pair[1 - answer]}. {name} is {pair[answer]}.",
                f"{name} is {pair[answer]}. {name} is not {pair[1 - answer]}.",
            )
        ]
        return _block(rng, "negation", kind, pair, [(f"{text} The colour of {name} is", a) for text, a in said])
    if kind == "holds":
        pair, box = rng.sample(words.OBJECTS, 2), rng.choice(("box", "bag", "jar", "tin", "pot"))
        said = [
            (sentences, answer)
            for answer in (0, 1)
            for sentences in (
                f"The {box} of {name} holds not a {pair[1 - answer]} but a {pair[answer]}.",
                f"The {box} of {name} holds a {pair[answer]}, not a {pair[1 - answer]}.",
            )
        ]
        return _block(rng, "negation", kind, pair, [(f"{text} The {box} holds a", a) for text, a in said])
    pair = rng.choice(list(words.OPPOSITES))
    what = f"The {rng.choice(words.OPPOSITES[pair])} of {name} is"
    prompts = [
        (f"{what} {'not ' * denied}{pair[place]}. {what}", place ^ denied) for place in (0, 1) for denied in (0, 1)
    ]
    return _block(rng, "negation", kind, pair, prompts)


_NOUNS = (
    "dog", "cat", "boy", "girl", "bird", "horse", "farmer", "singer", "doctor", "driver", "king", "nurse", "actor",
    "guard", "pilot",
)  # fmt: skip
_MEN, _WOMEN = ("boy", "king", "man", "uncle", "monk"), ("girl", "queen", "lady", "aunt", "nun")
_PLURALS = {"man": "men", "lady": "ladies"}
_VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
_PREPOSITIONS = ("near", "behind", "beside", "above", "below")
_SEEN = ("saw", "knew", "met", "heard", "found")
_HURT = ("hurt", "saw", "blamed", "praised", "washed")


def _plural(noun: str) -> str:
    return _PLURALS.get(noun, noun + "s")


def _numbers(noun: str) -> tuple[str, str]:
    return noun, _plural(noun)


def syntax(rng: Random) -> list[Item]:
    """Agreement across a noun of the other number, reflexives, determiners, the order of words in questions."""
    kind = rng.choice(("agreement", "relative clause", "reflexive number", "reflexive gender", "determiner", "order"))
    first, second = rng.sample(_NOUNS, 2)
    if kind in ("agreement", "relative clause"):
        between = rng.choice(_PREPOSITIONS), rng.choice(_SEEN)
        prompts = [
            (f"The {a} {between[0]} the {b}" if kind == "agreement" else f"The {a} that the {b} {between[1]}", number)
            for number, a in enumerate(_numbers(first))
            for b in _numbers(second)
        ]
        return _block(rng, "syntax", kind, rng.choice(_VERBS), prompts)
    if kind == "reflexive number":
        people = rng.choice((_MEN, _WOMEN))
        (first, second), verb = rng.sample(people, 2), rng.choice(_HURT)
        prompts = [
            (f"The {a} {where} the {b} {verb}", number)
            for where in (rng.choice(_PREPOSITIONS),)
            for number, a in enumerate(_numbers(first))
            for b in _numbers(second)
        ]
        return _block(rng, "syntax", kind, ("himself" if people is _MEN else "herself", "themselves"), prompts)
    if kind == "reflexive gender":
        he, she, where, verb = rng.choice(_MEN), rng.choice(_WOMEN), rng.choice(_PREPOSITIONS), rng.choice(_HURT)
        others = rng.choice(_MEN), rng.choice(_WOMEN)
        prompts = [
            (f"The {subject} {where} the {other} {verb}", gender)
            for gender, subject in enumerate((he, she))
            for other in others
        ]
        return _block(rng, "syntax", kind, ("himself", "herself"), prompts)
    if kind == "determiner":
        described = " ".join(rng.sample(words.ADJECTIVES, rng.randint(1, 3)))
        start, (one, many) = rng.choice(_SEEN), rng.choice((("this", "these"), ("that", "those")))
        prompts = [(f"We {start} {word} {described}", number) for number, word in enumerate((one, many))]
        # With the full stop, lest one be a beginning of the other.
        return _block(rng, "syntax", kind, [f"{noun}." for noun in _numbers(first)], prompts)
    who, verb = rng.choice(words.NAMES).capitalize(), rng.choice(("was", "is"))
    where = rng.choice(("where", "how", "who"))
    prompts = [(f"{who} asked {where}", 0), (f"{who} asked: {where}", 1)]
    return _block(rng, "syntax", kind, (f"the {first} {verb}", f"{verb} the {first}"), prompts)
