"""Classes of the tokens of a text: what they are, how frequent they are, where they stand.

Classes are of occurrences, not of entries of a vocabulary: a token that a text does not have belongs to none, and
whether "the" is a word depends on what stands beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Articles, pronouns, prepositions, conjunctions, auxiliaries and particles of English.
_WORDS = """
    a an the this that these those each every either neither both all any some no none such other another
    i me my mine you your yours he him his she her hers it its we us our ours they them their theirs
    who whom whose which what thou thee thy thine ye myself himself herself itself themselves yourself
    and or but nor so yet if then else than because though although unless until while when where whether as
    of in on at by to from with without into onto upon over under up down out off about above below after before
    between among through during against toward towards for per via
    am is are was were be been being do does did done have has had having will would shall should can could may might
    must not never there here how why very too also just only even still more most less least
    's 't 're 've 'll 'd 'm
"""
_FUNCTION_WORDS = frozenset(_WORDS.split())
_VOWELS = frozenset("aeiouAEIOU")


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenClasses:
    """Classes of the tokens of a text; a token may be in several, of different kinds.

    The first token of each window is in the class "first" alone: models make of it what they like, whatever it says.

    Attributes:
        names: of the classes that occur.
        kinds: "position", "frequency", or "token" (what it is), for each class.
        members: bool [C, W, T].
        note: what could not be told apart, or nothing.
        pieces: token -> its text, where tokens were decoded.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    members: Tensor
    note: str = ""
    pieces: dict[int, str]

    @property
    def counts(self) -> Tensor:
        """Occurrences of each class, int64 [C]."""
        return self.members.flatten(1).sum(1)


def token_classes(tokens: Tensor, decode: Callable[[Any], str] | None = None) -> TokenClasses:
    """The classes of a text.

    Args:
        tokens: int64 [W, T], windows.
        decode: text of a sequence of tokens, such as ``tokenizer.decode``. None: classes of position and frequency
            alone.

    Classes of position: first; early and late, the first and the last quarter of the others. Classes of frequency: the
    most frequent tokens, which together are a third of the text, the next third, and the rest. Classes of what a token
    is: newline, blank, punctuation, digits, function words, other words (lower case, Capitalised, UPPER CASE), parts of
    words, and mixtures. Where every token is one character: vowels, consonants and capitals in the place of words.

    Raises:
        ValueError: tokens are not [W, T] with T of at least 8.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 8 or tokens.shape[0] < 1 or tokens.is_floating_point():
        raise ValueError(f"tokens must be windows [W, T] of at least 8 token numbers, received {list(tokens.shape)}")
    tokens = tokens.cpu()
    classes = {"first": ("position", _positions(tokens, 0, 1))}
    quarter = max(1, (tokens.shape[1] - 1) // 4)
    classes["early"] = ("position", _positions(tokens, 1, 1 + quarter))
    classes["late"] = ("position", _positions(tokens, tokens.shape[1] - quarter, tokens.shape[1]))
    note, pieces = "", {}
    if decode is not None:
        pieces = _pieces(tokens, decode)
        labels, note = _labels(tokens, pieces)
        for name in sorted(set(labels.values()), key=_ORDER.index):
            classes[name] = ("token", torch.zeros(tokens.shape, dtype=torch.bool))
        for (row, column), name in labels.items():
            classes[name][1][row, column] = True
    for name, members in _bands(tokens).items():
        classes[name] = ("frequency", members)
    rest = torch.ones(tokens.shape, dtype=torch.bool)
    rest[:, 0] = False
    found = {name: (kind, x if name == "first" else x & rest) for name, (kind, x) in classes.items()}
    found = {name: (kind, x) for name, (kind, x) in found.items() if bool(x.any())}
    return TokenClasses(
        names=tuple(found),
        kinds=tuple(kind for kind, _ in found.values()),
        members=torch.stack([x for _, x in found.values()]),
        note=note,
        pieces=pieces,
    )


def _positions(tokens: Tensor, start: int, end: int) -> Tensor:
    members = torch.zeros(tokens.shape, dtype=torch.bool)
    members[:, start:end] = True
    return members


def _bands(tokens: Tensor) -> dict[str, Tensor]:
    """Thirds of the text by the frequency of its tokens; a token is in the band in which the middle of its share is."""
    unique, inverse, counts = tokens.unique(return_inverse=True, return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    middle = (counts[order].cumsum(0) - counts[order] / 2) / counts.sum()
    band = torch.empty_like(unique)
    band[order] = (3 * middle).long().clamp_max(2)
    return {name: band[inverse] == number for number, name in enumerate(("frequent", "less frequent", "rare"))}


def _pieces(tokens: Tensor, decode: Callable[[Any], str]) -> dict[int, str]:
    """The text of each token as it stands inside a text: decoders drop the blank before a first word."""
    pieces = {}
    for token in tokens.unique().tolist():
        alone, twice = decode([token]), decode([token, token])
        pieces[token] = twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone
    return pieces


_ORDER = (
    "newline", "blank", "punctuation", "digits", "function words", "vowels", "consonants", "capitals", "words",
    "Capitalised", "UPPER CASE", "parts of words", "other",
)  # fmt: skip


def _labels(tokens: Tensor, pieces: dict[int, str]) -> tuple[dict[tuple[int, int], str], str]:
    """What every token is, by (window, place), and what could not be told."""
    if max(len(piece) for piece in pieces.values()) <= 1:
        kinds = {token: _character(piece) for token, piece in pieces.items()}
        rows = enumerate(tokens.tolist())
        note = (
            "The tokens of this tokenizer are single characters, so that no token is a word: there are no function "
            "words here, and case is that of letters."
        )
        return {(row, i): kinds[token] for row, window in rows for i, token in enumerate(window)}, note
    found = {}
    for row, window in enumerate(tokens.tolist()):
        texts = [pieces[token] for token in window]
        for i, text in enumerate(texts):
            before = texts[i - 1] if i else ""
            after = texts[i + 1] if i + 1 < len(texts) else ""
            found[row, i] = _token(text, _joins(before[-1:]) and _joins(text[:1]), after[:1].isalnum())
    return found, ""


def _joins(character: str) -> bool:
    return character.isalnum() or character in ("'", "’", "_")


def _shared(text: str) -> str | None:
    """What letters are not needed for."""
    if "\N{REPLACEMENT CHARACTER}" in text or not text:
        return "other"
    if text.isspace():
        return "newline" if "\n" in text or "\r" in text else "blank"
    core = text.strip()
    if not any(character.isalnum() for character in core):
        return "punctuation" if core.isprintable() else "other"
    return "digits" if all(character.isdigit() for character in core) else None


def _character(text: str) -> str:
    shared = _shared(text)
    if shared is not None:
        return shared
    if not text.isalpha():
        return "other"
    return "capitals" if text.isupper() else "vowels" if text in _VOWELS else "consonants"


def _token(text: str, continues: bool, goes_on: bool) -> str:
    """The class of a token; ``continues``: it goes on with a word, ``goes_on``: the next token may go on with it."""
    shared = _shared(text)
    if shared is not None:
        return shared
    core = text.strip()
    if not goes_on and core.casefold().replace("’", "'") in _FUNCTION_WORDS and (not continues or core[0] in "'’"):
        return "function words"
    letters = core.strip("'’")
    if continues:
        return "parts of words"
    if not letters.isalpha():
        return "other"
    if letters.isupper() and len(letters) > 1:
        return "UPPER CASE"
    return "Capitalised" if letters[0].isupper() else "words"


def readable(text: str) -> str:
    """A token as it can be shown: blanks and line ends visible."""
    return text.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")


def top_tokens(
    tokens: Tensor, values: Tensor, *, min_count: int, number: int
) -> tuple[Sequence[tuple[int, int, float]], Sequence[tuple[int, int, float]]]:
    """The tokens of highest and of lowest mean value, the extreme ones first: (token, occurrences, mean).

    Args:
        tokens, values: of the same shape.
        min_count: tokens of fewer occurrences are left out.
        number: how many of each, at most.
    """
    unique, inverse, counts = tokens.cpu().flatten().unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, inverse, values.cpu().double().flatten())
    kept = (counts >= min_count).nonzero()[:, 0]
    rows = [(int(unique[i]), int(counts[i]), float(sums[i] / counts[i])) for i in kept.tolist()]
    rows.sort(key=lambda row: (-row[2], row[0]))
    return rows[:number], rows[::-1][:number]
