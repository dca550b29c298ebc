"""Tokens, letters and their frequencies, as users give them.

Shape suffixes: N positions, A letters.
"""

import numpy as np
from numpy.typing import ArrayLike

from ._elements import Element
from .groups import PermutationGroup
from .sequences import UNKNOWN

_CHUNK = 4_000_000  # numbers held at a time


def read_tokens(tokens: ArrayLike, what: str) -> np.ndarray:
    array = np.asarray(tokens)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} must be tokens, of an integer type, received {array.dtype}: encode the letters first")
    return array.astype(np.int64, copy=False)


def num_letters_of(tokens: np.ndarray, group: PermutationGroup, given: int | None) -> int:
    """The number of letters, of the group or given or of the tokens; tokens must be among them."""
    num_letters = group.num_letters or given or int(tokens.max(initial=0)) + 1
    wrong = (tokens < 0) | (tokens >= num_letters)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"tokens of {group!r} must be letters 0 to {num_letters - 1}, received {tokens[place]} at {place}"
            + (": leave unknown letters out" if tokens[place] == UNKNOWN else "")
        )
    return num_letters


def read_frequencies(frequencies: ArrayLike, group: PermutationGroup) -> np.ndarray:
    array = np.asarray(frequencies, dtype=np.float64)
    expected = group.num_letters or None
    if array.ndim != 1 or not len(array) or (expected and len(array) != expected):
        raise ValueError(f"frequencies of {group!r} must be [{expected or 'letters'}], received {list(array.shape)}")
    if not np.isfinite(array).all() or (array < 0).any() or abs(array.sum() - 1) > 1e-6:
        raise ValueError(f"frequencies must not be negative and have sum 1, received {array.tolist()}")
    return array / array.sum()


def fit_frequencies(tokens: np.ndarray, group: PermutationGroup, frequencies: ArrayLike | None) -> np.ndarray:
    """The given frequencies, checked against the tokens, or those of the tokens: float64 [A]."""
    given_A = None if frequencies is None else read_frequencies(frequencies, group)
    num_letters = num_letters_of(tokens, group, None if given_A is None else len(given_A))
    numbers_A = np.bincount(tokens.ravel(), minlength=num_letters)
    if given_A is None:
        return numbers_A / numbers_A.sum()
    never = np.flatnonzero((given_A == 0) & (numbers_A > 0))
    if len(never):
        raise ValueError(
            f"letter {never[0]} occurs {numbers_A[never[0]]} times although its frequency is 0: give it a frequency"
        )
    return given_A


def chunks(number: int, width: int) -> list[int]:
    """Sizes of the parts of ``number`` rows of some width that are worked on at a time."""
    size = max(1, _CHUNK // max(1, width))
    return [min(size, number - start) for start in range(0, number, size)]


def letter_maps_of(element: Element, degree: int, num_letters: int) -> np.ndarray:
    """The letter that each letter becomes at each position: int64 [N, A]."""
    letters = np.arange(num_letters) if element.letters is None else np.asarray(element.letters)
    return np.broadcast_to(letters, (degree, num_letters))
