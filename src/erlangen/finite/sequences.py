"""Sequences and motifs from files: FASTA and position frequency matrices; and how well a motif fits its other strand.

Shape suffixes: N positions, L letters.
"""

import gzip
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

UNKNOWN = -1
"""The token of a letter that is allowed but not known, such as the N of DNA."""


class Record(NamedTuple):
    """One sequence of a FASTA file."""

    name: str
    """The header, without its ``>``."""
    tokens: np.ndarray
    """int64 [N]: numbers of letters in the alphabet, or ``UNKNOWN``."""


class Motif(NamedTuple):
    """One position frequency matrix of DNA."""

    name: str
    """The header, without its ``>``."""
    counts: np.ndarray
    """float64 [N, 4]: of each position, how often A, C, G and T were seen there."""


def encode(text: str, alphabet: str = "ACGT", *, unknown: str = "") -> np.ndarray:
    """Letters as numbers: int64 [N], the place of each letter in the alphabet.

    Small letters, by which files mark repeats, are read as capitals, where the alphabet has capitals only.

    Args:
        text: the letters.
        alphabet: different letters.
        unknown: letters that become ``UNKNOWN``, such as ``"N"``.

    Raises:
        ValueError: a letter that is in neither, an alphabet that repeats a letter, or a letter in both.
    """
    return _encode(text, _codes(alphabet, unknown), alphabet, unknown, "encode")


def read_fasta(path: str | os.PathLike[str], alphabet: str = "ACGT", *, unknown: str = "") -> tuple[Record, ...]:
    """Read the sequences of a FASTA file, plain or compressed (``.gz``), in their order.

    Args:
        path: the file.
        alphabet: as in `encode`.
        unknown: as in `encode`; ``""`` for an error at any letter outside the alphabet.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no FASTA file, is damaged, or holds a letter outside the alphabet; with file and line.
    """
    codes = _codes(alphabet, unknown)
    records: list[Record] = []
    name, header, parts = "", 0, []

    def finish() -> None:
        if not parts:
            raise ValueError(f"{path}:{header}: the sequence {name!r} has no letters: give it some, or leave it out")
        records.append(Record(name, np.concatenate(parts)))

    for number, line in _lines(path):
        if line.startswith(">"):
            if header:
                finish()
            name, header, parts = line[1:].strip(), number, []
        elif not header:
            raise ValueError(f"{path}:{number}: a FASTA file begins with a header '>name', received {_short(line)!r}")
        else:
            parts.append(_encode(line, codes, alphabet, unknown, f"{path}:{number}"))
    if not header:
        raise ValueError(f"{path} holds no sequence: a FASTA file has a header '>name' and letters below it")
    finish()
    return tuple(records)


def read_pfm(path: str | os.PathLike[str]) -> tuple[Motif, ...]:
    """Read position frequency matrices of DNA, plain or compressed (``.gz``), in their order.

    The format is that of JASPAR's matrices as GimmeMotifs ships them: a header ``>name``, then a line a position with
    its four counts (or frequencies) in the order A C G T. Lines that begin with ``#`` are comments.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not of this format, or holds numbers that are no counts; with file and line.
    """
    motifs: list[Motif] = []
    name, header, rows = "", 0, []

    def finish() -> None:
        if not rows:
            raise ValueError(f"{path}:{header}: the motif {name!r} has no rows: give it some, or leave it out")
        motifs.append(Motif(name, np.array(rows)))

    for number, line in _lines(path):
        if line.startswith("#"):
            continue
        if line.startswith(">"):
            if header:
                finish()
            name, header, rows = line[1:].strip(), number, []
        elif not header:
            raise ValueError(f"{path}:{number}: a motif begins with a header '>name', received {_short(line)!r}")
        else:
            try:
                row = [float(word) for word in line.split()]
            except ValueError:
                row = []
            if len(row) != 4 or not all(0 <= count < math.inf for count in row) or not sum(row):
                raise ValueError(
                    f"{path}:{number}: a row of a motif is four counts, A C G T, not negative and not all zero, "
                    f"received {_short(line)!r}"
                )
            rows.append(row)
    if not header:
        raise ValueError(f"{path} holds no motif: it has a header '>name' and rows of four counts below it")
    finish()
    return tuple(motifs)


def strand_correlation(counts: ArrayLike, *, complement: Sequence[int] = (3, 2, 1, 0)) -> float:
    """How well a motif agrees with itself on the other strand, at the shift where it does best.

    Pearson's correlation of the letter frequencies of the motif with those of its reverse complement, over the
    positions where the two overlap; the largest over all shifts with an overlap of at least 70 % of the motif, and of
    6 positions. Of the definitions we tried it is the one under which JASPAR 2022 has 562 of its 1984 motifs of 6 or
    more positions at .8 or above, and 250 at .95, as our notes on the data say.

    Args:
        counts: [N, A] with N at least 6, of each position how often each letter was seen there.
        complement: the letter that pairs with each letter; of A C G T unless given.

    Returns:
        from -1 to 1; 1 for a reverse-complement palindrome.

    Raises:
        ValueError: another shape, numbers that are no counts, or a complement that is not its own inverse.
    """
    motif_NA = np.asarray(counts, dtype=np.float64)
    pairs = np.asarray(complement)
    num_letters = len(pairs)
    if motif_NA.ndim != 2 or motif_NA.shape[1] != num_letters or len(motif_NA) < 6:
        raise ValueError(
            f"strand_correlation: counts must be [N, {num_letters}] with at least 6 positions, received "
            f"{list(motif_NA.shape)}"
        )
    if not np.isfinite(motif_NA).all() or (motif_NA < 0).any() or not motif_NA.sum(1).all():
        raise ValueError("strand_correlation: counts must be finite, not negative, and not all zero at a position")
    if sorted(pairs.tolist()) != list(range(num_letters)) or (pairs[pairs] != np.arange(num_letters)).any():
        raise ValueError(f"strand_correlation: complement must be a pairing of letters, received {list(complement)}")
    length = len(motif_NA)
    forward_NA = motif_NA / motif_NA.sum(1, keepdims=True)
    reverse_NA = forward_NA[::-1, pairs]
    overlap = max(6, -(-7 * length // 10))
    best = -1.0
    for shift in range(overlap - length, length - overlap + 1):
        a = forward_NA[max(0, shift) : length + min(0, shift)]
        b = reverse_NA[max(0, -shift) : length - max(0, shift)]
        a, b = a - a.mean(), b - b.mean()
        norm = math.sqrt(np.square(a).sum() * np.square(b).sum())
        best = max(best, float((a * b).sum()) / norm if norm else 0.0)
    return best


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank."""
    with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rb") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                text = line.decode().strip()
                if text:
                    yield number, text
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not text in UTF-8 ({error}): is it compressed, or binary?") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: damaged, or not compressed by gzip ({error})") from error


def _codes(alphabet: str, unknown: str) -> dict[str, int]:
    both = alphabet + unknown
    if not alphabet or len(set(both)) < len(both):
        raise ValueError(
            f"the letters of an alphabet, and those of unknown, must be different, received alphabet={alphabet!r} and "
            f"unknown={unknown!r}"
        )
    codes = {letter: number for number, letter in enumerate(alphabet)} | dict.fromkeys(unknown, UNKNOWN)
    return codes | {letter.lower(): code for letter, code in codes.items()} if both == both.upper() else codes


def _encode(text: str, codes: dict[str, int], alphabet: str, unknown: str, where: str) -> np.ndarray:
    try:
        return np.array([codes[letter] for letter in text], dtype=np.int64)
    except KeyError:
        place = next(place for place, letter in enumerate(text) if letter not in codes)
        extra = text[place].upper() if alphabet == alphabet.upper() else text[place]
        allowed = f"the letters are those of {alphabet!r}" + (f" and, as unknown, of {unknown!r}" if unknown else "")
        raise ValueError(
            f"{where}: {allowed}, received {text[place]!r} at place {place} (from 0) of {_short(text)!r}: correct it, "
            f"or allow it with unknown={unknown + extra!r}"
        ) from None


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."
