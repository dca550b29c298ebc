"""Which windows have a symmetry, and which symmetry windows have: with null distributions and false-discovery control.

The question is always how much more often letters agree with their images than they would if the letters of a window
were independent and alike distributed. `scan` asks it of single windows, by the energy that the group leaves as it is
(`nulls.py`); `discover` of all windows together, by their agreement with each element of a group (`_agreements.py`).

Shape suffixes: W windows, N positions, A letters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ._agreements import AgreementNulls, agreements_of, count_agreements, log_tail, spread_p_value
from ._elements import write_element
from ._letters import fit_frequencies, read_tokens
from .groups import PermutationGroup
from .nulls import EnergyNull, Orbits, energies_of, energy_null, false_discovery_rates
from .sequences import UNKNOWN

_SMALLEST = np.finfo(np.float64).tiny


# --- which windows have the symmetry ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """What `scan` found: one entry a window, in the order of sequences and starts."""

    sequence: np.ndarray
    """int64 [W]: number of the sequence."""
    start: np.ndarray
    """int64 [W]: its first position there, from 0."""
    energy: np.ndarray
    """float64 [W]: `invariant_energy`."""
    p: np.ndarray
    """float64 [W]: probability of so much energy, or more, if letters were independent."""
    q: np.ndarray
    """float64 [W]: false-discovery rate at which the window is a discovery."""
    frequencies: np.ndarray
    """float64 [A]: of the letters, under the null hypothesis."""
    null: EnergyNull
    """Distribution of the energy under it."""
    skipped: int
    """Number of windows left out since they hold unknown letters."""

    def discoveries(self, rate: float = 0.05) -> np.ndarray:
        """The windows found at a false-discovery rate: int64 numbers of entries, the most significant first."""
        found = np.flatnonzero(self.q <= rate)
        return found[np.lexsort((found, self.p[found]))]


def scan(
    tokens: ArrayLike | Sequence[ArrayLike],
    group: PermutationGroup,
    *,
    stride: int = 1,
    frequencies: ArrayLike | None = None,
    dependent: bool | None = None,
    samples: int = 100_000,
    seed: int = 0,
) -> Scan:
    """Test each window of some sequences for a symmetry.

    Short windows cannot be discoveries among many: a palindrome of k letters of uniform DNA has p = 4^(-k/2), times the
    number of windows. Where windows are aligned, pool them: `discover`.

    Args:
        tokens: one sequence, int [length], or several; `UNKNOWN` marks letters that are not known, and windows that
            hold one are left out.
        group: the symmetry; a window has as many letters as the group has positions.
        stride: from the start of a window to that of the next.
        frequencies: of the letters, [A], under the null hypothesis; None for those in these sequences.
        dependent: as in `false_discovery_rates`; None for True where windows overlap.
        samples, seed: as in `energy_null`, of which p-values are.

    Raises:
        ValueError: a sequence shorter than a window, tokens that are no letters of the group, a letter that occurs
            although its frequency is 0, or no window without unknown letters.
    """
    if stride < 1:
        raise ValueError(f"scan: stride must be at least 1, received {stride}")
    sequences = _read_sequences(tokens)
    length = group.degree
    for number, sequence in enumerate(sequences):
        if len(sequence) < length:
            raise ValueError(
                f"scan: a window of {group!r} is {length} long and cannot be longer than a sequence, received sequence "
                f"{number} of {len(sequence)} letters: leave it out, or take a smaller group"
            )
    joined = np.concatenate(sequences)
    known = joined[joined != UNKNOWN]
    if not len(known):
        raise ValueError("scan: all letters are unknown: give sequences with known ones")
    frequencies_A = fit_frequencies(known, group, frequencies)
    null = energy_null(group, frequencies_A, samples=samples, seed=seed)
    orbits = Orbits(group, len(frequencies_A))
    of_sequence, starts, energies, num_windows = [], [], [], 0
    for number, sequence in enumerate(sequences):
        windows_WN = np.lib.stride_tricks.sliding_window_view(sequence, length)[::stride]
        whole = np.flatnonzero((windows_WN != UNKNOWN).all(1))
        num_windows += len(windows_WN)
        of_sequence.append(np.full(len(whole), number))
        starts.append(whole * stride)
        energies.append(energies_of(windows_WN[whole], orbits))
    energy = np.concatenate(energies)
    if not len(energy):
        raise ValueError(f"scan: each of {num_windows} windows of {length} letters holds unknown ones: none is left")
    p = null.p_value(energy)
    return Scan(
        sequence=np.concatenate(of_sequence),
        start=np.concatenate(starts),
        energy=energy,
        p=p,
        q=false_discovery_rates(p, dependent=stride < length if dependent is None else dependent),
        frequencies=frequencies_A,
        null=null,
        skipped=num_windows - len(energy),
    )


def _read_sequences(tokens: ArrayLike | Sequence[ArrayLike]) -> list[np.ndarray]:
    """One sequence or several, as a list of int64 [length]."""
    several = isinstance(tokens, list | tuple) and len(tokens) > 0 and np.ndim(tokens[0]) == 1
    rows = tokens if several else np.atleast_2d(np.asarray(tokens))
    sequences = [read_tokens(row, "tokens") for row in rows]
    if not sequences or any(sequence.ndim != 1 for sequence in sequences):
        raise ValueError("scan: tokens must be a sequence [length] or several of them")
    return sequences


# --- which symmetry the windows have ----------------------------------------------------------------------------------


class ElementTest(NamedTuple):
    """One element of the candidate group in the table of `discover`."""

    element: str
    """As a group prints its generators: cycles of positions, then the letters that those of the alphabet become."""
    number: int
    """In the candidate group."""
    order: int
    """Least power that is the identity."""
    agreement: float
    """Share of all letters of all windows that stand where the element puts their images."""
    expected: float
    """The same, if letters were independent."""
    p: float
    """Probability of so much agreement, or more, if they were: exact, and no less than 2.2e-308."""
    p_spread: float
    """The same, judged by how much agreement differs from window to window; p itself if p > rate, or for one window."""
    q: float
    """False-discovery rate at which the element is a discovery, by the larger of the two."""
    accepted: bool
    """Whether q is at most the rate asked for."""


@dataclass(frozen=True)
class Discovery:
    """What `discover` found; printed as a table of its first 20 rows."""

    subgroup: PermutationGroup
    """All its elements, but the identity, were accepted."""
    table: tuple[ElementTest, ...]
    """One of each element and its inverse, whose agreements are equal; the most significant first."""
    unconfirmed: tuple[ElementTest, ...]
    """Elements that were accepted, yet generate with the subgroup elements that were not."""
    frequencies: np.ndarray
    """float64 [A]: of the letters, under the null hypothesis."""
    num_windows: int
    """Number of windows that were pooled."""

    def __str__(self) -> str:
        head = ("element", "order", "agreement", "expected", "p", "p_spread", "q", "accepted")
        rows = [
            (t.element, str(t.order), f"{t.agreement:.4f}", f"{t.expected:.4f}", f"{t.p:.2g}", f"{t.p_spread:.2g}",
             f"{t.q:.2g}", "yes" if t.accepted else "no")
            for t in self.table[:20]
        ]  # fmt: skip
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]
        rest = [f"and {len(self.table) - 20} more"] if len(self.table) > 20 else []
        return "\n".join([f"{self.num_windows} windows, subgroup of order {self.subgroup.order}", *lines, *rest])


def discover(
    windows: ArrayLike,
    candidate_group: PermutationGroup,
    *,
    frequencies: ArrayLike | None = None,
    rate: float = 0.05,
    dependent: bool = True,
) -> Discovery:
    """Find the subgroup of a candidate group that aligned windows respect.

    Each element is tested by its agreement, pooled over the windows, against its exact null distribution. (Along a
    cycle of positions the letters are a chain whose agreements are counted by a transfer matrix; cycles are independent
    and so are windows.) If the windows respect nothing, that is all, and exact.

    If they respect something, their letters are not independent, and two more rules keep other elements out. Windows
    abcabc agree with a shift by one twice wherever they agree once, so that the variance of their agreement is twice
    that of independent letters: an element must also pass a test by the spread that the windows show (normal, one
    sided). And mirrored windows abccba, with two equal letters in the middle, do agree a little with a shift by one. So
    the subgroup is not generated by all that was accepted. It is grown from the most significant element, by each next
    one unless that would bring in an element that was not accepted itself.

    The windows are taken to be independent: overlapping ones, or many copies of one, make p-values too small. With many
    windows a small excess of agreement is significant: judge it by ``agreement`` and ``expected``.

    Args:
        windows: tokens, int [W, N].
        candidate_group: of degree N.
        frequencies: of the letters, [A], under the null hypothesis; None for those in the windows, by which tests
            become slightly conservative (what composition explains of the agreement is taken away).
        rate: false-discovery rate, in (0, 1).
        dependent: as in `false_discovery_rates`; agreements of elements of one group depend on each other.

    Raises:
        ValueError: windows of another shape, without rows, or with tokens that are no letters of the group, such as
            unknown ones; a letter that occurs although its frequency is 0.
    """
    group = candidate_group
    windows_WN = read_tokens(windows, "windows")
    if windows_WN.ndim != 2 or windows_WN.shape[1] != group.degree or not len(windows_WN):
        raise ValueError(
            f"discover: windows of {group!r} must be [W, {group.degree}] with at least one row, received "
            f"{list(windows_WN.shape)}"
        )
    if not 0 < rate < 1:
        raise ValueError(f"discover: rate must be between 0 and 1, received {rate}")
    frequencies_A = fit_frequencies(windows_WN, group, frequencies)
    num_windows, num_letters = len(windows_WN), len(frequencies_A)
    everything = np.arange(group.order)
    tested = np.flatnonzero((everything > 0) & (everything <= np.asarray(group.inverse(everything))))
    totals = count_agreements(windows_WN, group, tested, num_letters)
    nulls = AgreementNulls(frequencies_A)
    log_p, expected = np.empty(len(tested)), np.empty(len(tested))
    tails: dict[tuple, float] = {}
    for place, number in enumerate(tested.tolist()):
        kind, probabilities = nulls(group.element(number))
        expected[place] = probabilities @ np.arange(len(probabilities)) / group.degree
        total = int(totals[place])
        if (kind, total) not in tails:
            tails[kind, total] = log_tail(probabilities, num_windows, total)
        log_p[place] = tails[kind, total]
    p = np.maximum(np.exp(log_p), _SMALLEST)
    p_spread = p.copy()
    for place in np.flatnonzero(p <= rate).tolist() if num_windows > 1 else ():
        counts_W = agreements_of(windows_WN, group.element(int(tested[place])), num_letters)
        p_spread[place] = spread_p_value(counts_W, group.degree * expected[place])
    worst = np.maximum(p, p_spread)
    q = false_discovery_rates(worst, dependent=dependent)
    # The logarithm still tells apart what is too small for p; then the larger share of letters goes first.
    order = np.lexsort((tested, -totals, log_p, worst))
    rows = [
        ElementTest(
            element=write_element(group.element(int(tested[place])), group.alphabet),
            number=int(tested[place]),
            order=int(group.element_orders[tested[place]]),
            agreement=float(totals[place] / windows_WN.size),
            expected=float(expected[place]),
            p=float(p[place]),
            p_spread=float(p_spread[place]),
            q=float(q[place]),
            accepted=bool(q[place] <= rate),
        )
        for place in order
    ]
    accepted = [row.number for row in rows if row.accepted]
    allowed = {0, *accepted, *(int(group.inverse(number)) for number in accepted)}
    numbers, generators = {0}, []
    for number in accepted:
        if number not in numbers:
            larger = _generate(group, [*generators, number], allowed)
            if larger is not None:
                numbers, generators = larger, [*generators, number]
    elements = [group.element(number) for number in generators or [0]]
    subgroup = PermutationGroup(
        [e.positions if e.letters is None else (e.positions, e.letters) for e in elements],
        letters=group.alphabet or group.num_letters or None,
    )
    return Discovery(
        subgroup=subgroup,
        table=tuple(rows),
        unconfirmed=tuple(row for row in rows if row.accepted and row.number not in numbers),
        frequencies=frequencies_A,
        num_windows=num_windows,
    )


def _generate(group: PermutationGroup, generators: list[int], allowed: set[int]) -> set[int] | None:
    """Numbers of the elements of a generated subgroup, or None as soon as one is not allowed."""
    found, todo = {0}, [0]
    while todo:
        element = todo.pop()
        for generator in generators:
            product = int(group.multiply(element, generator))
            if product not in allowed:
                return None
            if product not in found:
                found.add(product)
                todo.append(product)
    return found
