"""Which windows have a symmetry, and which symmetry windows have: with null distributions and false-discovery control.

The question is always how much more often letters agree with their images than they would **if the letters of a window
were independent and alike distributed**. That null hypothesis has no other structure, so to refuse it says: more
symmetric than random letters. It does not say what made them so: repeats, for one, are symmetric in many ways.

Two statistics of a window x of N letters, one-hot, so that ‖x‖² = N:

* *agreement* with an element h: ⟨x, hx⟩/N, the share of letters that stand where h puts their images;
* *invariant energy* of a group: ‖P₁x‖²/‖x‖², the mean agreement over its elements. P₁ averages over the orbits of
  (position, letter) points, so the energy is Σ n_o²/|o| / N where n_o of the window's points lie in orbit o. It costs
  the same for a group of any order.

Null distributions are exact wherever they can be enumerated. Letters in different orbits of positions are independent,
so those of the orbits are convolved; within an orbit the numbers n_o are enumerated. For reverse complement of even N
this gives energy = (1 + m/(N/2))/2 with m ~ Bin(N/2, Σ_a p_a p_ā). The middle letter of odd N never agrees with its
image, so there energy = (1 + 2m/N)/2 with m ~ Bin((N - 1)/2, Σ_a p_a p_ā), and is less than 1.

Shape suffixes: W windows, N positions, A letters, G elements.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .groups import Element, PermutationGroup
from .sequences import UNKNOWN

_SMALLEST = np.finfo(np.float64).tiny
_TIE = 1e-9  # energies as near as this are equal: what differs by rounding is counted as at least as extreme
_MAX_STATES = 200_000  # of the numbers n_o in one orbit of positions
_MAX_PAIRS = 4_000_000  # of values met in one convolution
_CHUNK = 4_000_000  # numbers held at a time


# --- energies and their null ------------------------------------------------------------------------------------------


def invariant_energy(windows: ArrayLike, group: PermutationGroup) -> np.ndarray:
    """‖P₁x‖²/‖x‖² of one-hot windows x: the share of a window that the group leaves as it is.

    Args:
        windows: tokens, int [..., N] with N the group's degree.
        group: acts on positions and, where it has letters, on these.

    Returns:
        float64 [...], at least 1/|G| (no letter agrees with any image) and at most 1 (exactly symmetric).

    Raises:
        ValueError: another length, or tokens that are no letters of the group.
    """
    tokens = _tokens(windows, "windows")
    if tokens.ndim < 1 or tokens.shape[-1] != group.degree:
        raise ValueError(
            f"invariant_energy: windows of {group!r} must be [..., {group.degree}], received {list(tokens.shape)}"
        )
    num_letters = _num_letters(tokens, group, None)
    return _energy(tokens.reshape(-1, group.degree), _Orbits(group, num_letters)).reshape(tokens.shape[:-1])


@dataclass(frozen=True)
class EnergyNull:
    """The distribution of the invariant energy of a window of independent letters; see `energy_null`."""

    values: np.ndarray
    """float64 [values]: the energies that occur, ascending."""
    probabilities: np.ndarray
    """float64 [values]: of each."""
    samples: int | None
    """Number of windows it was drawn from; None where it is exact."""

    def p_value(self, energy: ArrayLike) -> np.ndarray:
        """Probability of an energy as large or larger: [...] -> float64 [...].

        Of a sampled distribution (1 + windows as large or larger) / (1 + samples), which is never 0 and valid for any
        number of samples (Phipson and Smyth 2010, doi 10.2202/1544-6115.1585).
        """
        tail = np.append(np.cumsum(self.probabilities[::-1])[::-1], 0.0)
        p = tail[np.searchsorted(self.values, np.asarray(energy, dtype=np.float64) - _TIE)]
        if self.samples is not None:
            p = (1 + np.rint(p * self.samples)) / (1 + self.samples)
        return np.minimum(p, 1.0)


def energy_null(
    group: PermutationGroup, frequencies: ArrayLike, *, samples: int = 100_000, seed: int = 0
) -> EnergyNull:
    """The distribution of `invariant_energy` if the letters of a window are independent with these frequencies.

    Exact where it can be enumerated in moderate memory: any group on a few dozen positions with few letters, and any
    length where orbits are small, as for reverse complement. Otherwise sampled.

    Args:
        group: the group.
        frequencies: [A], not negative, with sum 1; A is the group's number of letters if it has letters.
        samples: number of windows to draw where it cannot be enumerated.
        seed: of the draws.

    Raises:
        ValueError: frequencies that are none, or of another number of letters; fewer than one sample.
    """
    frequencies_A = _frequencies(frequencies, group)
    if samples < 1:
        raise ValueError(f"energy_null: samples must be at least 1, received {samples}")
    orbits = _Orbits(group, len(frequencies_A))
    exact = _enumerate(orbits, frequencies_A)
    if exact is not None:
        return EnergyNull(*exact, samples=None)
    generator = np.random.default_rng(seed)
    energies = []
    for size in _chunks(samples, group.degree):
        energies.append(_energy(generator.choice(len(frequencies_A), (size, group.degree), p=frequencies_A), orbits))
    values, numbers = np.unique(np.concatenate(energies), return_counts=True)
    return EnergyNull(values, numbers / samples, samples)


class _Orbits:
    """Orbits of a group on the points (position, letter), by number.

    Attributes:
        labels: int64 [N, A], the orbit of each point.
        sizes: int64 [number of orbits], of points.
        positions: the positions of each orbit of positions.
    """

    def __init__(self, group: PermutationGroup, num_letters: int):
        degree = group.degree
        images = []
        for element in group.generators:
            letters = _letter_maps(element, degree, num_letters)
            images.append((np.asarray(element.positions)[:, None] * num_letters + letters).ravel())
        labels = _components(images, degree * num_letters)
        self.labels = labels.reshape(degree, num_letters)
        self.sizes = np.bincount(labels)
        of_position = _components([np.asarray(element.positions) for element in group.generators], degree)
        self.positions = [np.flatnonzero(of_position == number) for number in range(of_position.max() + 1)]


def _components(images: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Number of the orbit of each point under permutations of them: int64 [size], orbits by their first point."""
    labels = np.full(size, -1, dtype=np.int64)
    steps = [image.tolist() for image in images]
    number = 0
    for start in range(size):
        if labels[start] >= 0:
            continue
        labels[start], todo = number, [start]
        while todo:
            point = todo.pop()
            for step in steps:
                if labels[step[point]] < 0:
                    labels[step[point]] = number
                    todo.append(step[point])
        number += 1
    return labels


def _letter_maps(element: Element, degree: int, num_letters: int) -> np.ndarray:
    """The letter that each letter becomes at each position: int64 [N, A]."""
    letters = np.arange(num_letters) if element.letters is None else np.asarray(element.letters)
    return np.broadcast_to(letters, (degree, num_letters))


def _energy(windows_WN: np.ndarray, orbits: _Orbits) -> np.ndarray:
    num_windows, degree = windows_WN.shape
    num_orbits = len(orbits.sizes)
    energies, start = np.empty(num_windows), 0
    for size in _chunks(num_windows, num_orbits + degree):
        labels_WN = orbits.labels[np.arange(degree), windows_WN[start : start + size]]
        cells = (labels_WN + num_orbits * np.arange(size)[:, None]).ravel()
        counts = np.bincount(cells, minlength=size * num_orbits).reshape(size, num_orbits)
        energies[start : start + size] = (np.square(counts) / orbits.sizes).sum(1) / degree
        start += size
    return energies


def _enumerate(orbits: _Orbits, frequencies_A: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Values and probabilities of the energy, or None if there are too many to enumerate.

    Energies are integers in units of 1/(N scale), with scale the least common multiple of the sizes of orbits.
    """
    degree = len(orbits.labels)
    scale = math.lcm(*np.unique(orbits.sizes).tolist())
    if scale * degree**2 > 2**62:
        return None
    kinds: Counter[tuple] = Counter()
    for positions in orbits.positions:
        used, labels_SA = np.unique(orbits.labels[positions], return_inverse=True)
        weights = tuple((scale // orbits.sizes[used]).tolist())
        labels_SA = labels_SA.reshape(len(positions), -1)
        chances_SK = np.zeros((len(positions), len(used)))
        np.add.at(chances_SK, (np.arange(len(positions))[:, None], labels_SA), frequencies_A)
        rows = sorted(map(tuple, chances_SK.tolist()))
        kinds[weights, tuple(rows)] += 1
    total = (np.zeros(1, dtype=np.int64), np.ones(1))
    for (weights, rows), number in sorted(kinds.items()):
        part = _orbit_distribution(np.array(weights), np.array(rows))
        while part is not None and number:
            if number % 2:
                total = _convolve(total, part)
                if total is None:
                    return None
            number //= 2
            part = _convolve(part, part) if number else part
        if part is None:
            return None
    values, probabilities = total
    return values / (degree * scale), probabilities


def _orbit_distribution(weights_K: np.ndarray, chances_SK: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Of Σ_k weights_k n_k² where each of S positions falls into class k with its chances and n_k counts them."""
    num_positions, num_classes = chances_SK.shape
    base = num_positions + 1
    # The last count is what is left of S, and need not be kept.
    if base ** (num_classes - 1) > 2**62 or math.comb(base - 2 + num_classes, num_classes - 1) > _MAX_STATES:
        return None
    units = np.array([base**k for k in range(num_classes - 1)] + [0], dtype=np.int64)
    states, probabilities = np.zeros(1, dtype=np.int64), np.ones(1)
    for chances_K in chances_SK:
        possible = chances_K > 0
        states, probabilities = _collect(
            states[:, None] + units[possible], probabilities[:, None] * chances_K[possible]
        )
    counts = states[:, None] // units[:-1] % base
    counts = np.column_stack([counts, num_positions - counts.sum(1)])
    return _collect(np.square(counts) @ weights_K, probabilities)


def _convolve(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    if len(a[0]) * len(b[0]) > _MAX_PAIRS:
        return None
    return _collect(a[0][:, None] + b[0], a[1][:, None] * b[1])


def _collect(values: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different values, ascending, and the sum of the probabilities of each."""
    values, places = np.unique(values.ravel(), return_inverse=True)
    return values, np.bincount(places.ravel(), probabilities.ravel())


# --- false discoveries ------------------------------------------------------------------------------------------------


def false_discovery_rates(p_values: ArrayLike, *, dependent: bool = False) -> np.ndarray:
    """The least false-discovery rate at which each of several tests is a discovery: p [tests] -> q [tests].

    To take those with q at most 0.05 keeps the expected share of false ones among them at 5 %, or below.

    Args:
        p_values: in [0, 1].
        dependent: False for tests that are independent or positively dependent (Benjamini and Hochberg 1995,
            doi 10.1111/j.2517-6161.1995.tb02031.x); True for any dependence, at the price of a factor
            1 + 1/2 + ... + 1/tests (Benjamini and Yekutieli 2001, doi 10.1214/aos/1013699998).

    Raises:
        ValueError: not a row of probabilities.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"false_discovery_rates: p_values must be [tests] in [0, 1], received {list(p.shape)}")
    ranks = np.arange(1, len(p) + 1)
    order = np.argsort(p, kind="stable")
    factor = len(p) * ((1 / ranks).sum() if dependent else 1.0)
    q = np.empty_like(p)
    q[order] = np.minimum.accumulate((p[order] * (factor / ranks))[::-1])[::-1]
    return np.minimum(q, 1.0)


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
    sequences = _sequences(tokens)
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
    frequencies_A = _fit_frequencies(known, group, frequencies)
    null = energy_null(group, frequencies_A, samples=samples, seed=seed)
    orbits = _Orbits(group, len(frequencies_A))
    of_sequence, starts, energies, num_windows = [], [], [], 0
    for number, sequence in enumerate(sequences):
        windows_WN = np.lib.stride_tricks.sliding_window_view(sequence, length)[::stride]
        whole = np.flatnonzero((windows_WN != UNKNOWN).all(1))
        num_windows += len(windows_WN)
        of_sequence.append(np.full(len(whole), number))
        starts.append(whole * stride)
        energies.append(_energy(windows_WN[whole], orbits))
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
    windows_WN = _tokens(windows, "windows")
    if windows_WN.ndim != 2 or windows_WN.shape[1] != group.degree or not len(windows_WN):
        raise ValueError(
            f"discover: windows of {group!r} must be [W, {group.degree}] with at least one row, received "
            f"{list(windows_WN.shape)}"
        )
    if not 0 < rate < 1:
        raise ValueError(f"discover: rate must be between 0 and 1, received {rate}")
    frequencies_A = _fit_frequencies(windows_WN, group, frequencies)
    num_windows, num_letters = len(windows_WN), len(frequencies_A)
    everything = np.arange(group.order)
    tested = np.flatnonzero((everything > 0) & (everything <= np.asarray(group.inverse(everything))))
    totals = _agreements(windows_WN, group, tested, num_letters)
    nulls = _AgreementNulls(frequencies_A)
    log_p, expected = np.empty(len(tested)), np.empty(len(tested))
    tails: dict[tuple, float] = {}
    for place, number in enumerate(tested.tolist()):
        kind, probabilities = nulls(group.element(number))
        expected[place] = probabilities @ np.arange(len(probabilities)) / group.degree
        total = int(totals[place])
        if (kind, total) not in tails:
            tails[kind, total] = _log_tail(probabilities, num_windows, total)
        log_p[place] = tails[kind, total]
    p = np.maximum(np.exp(log_p), _SMALLEST)
    p_spread = p.copy()
    for place in np.flatnonzero(p <= rate).tolist() if num_windows > 1 else ():
        counts_W = _agreements_of(windows_WN, group.element(int(tested[place])), num_letters)
        p_spread[place] = _spread_p_value(counts_W, group.degree * expected[place])
    worst = np.maximum(p, p_spread)
    q = false_discovery_rates(worst, dependent=dependent)
    # The logarithm still tells apart what is too small for p; then the larger share of letters goes first.
    order = np.lexsort((tested, -totals, log_p, worst))
    rows = [
        ElementTest(
            element=_describe(group.element(int(tested[place])), group.alphabet),
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


def _agreements(windows_WN: np.ndarray, group: PermutationGroup, numbers: np.ndarray, num_letters: int) -> np.ndarray:
    """Number of letters, of all windows, that stand where each element puts their images: int64 [numbers].

    How often letter b stands at j where a stands at i is counted once for all elements.
    """
    degree = group.degree
    num_points = degree * num_letters
    place = np.arange(degree)
    totals = np.zeros(len(numbers), dtype=np.int64)
    if num_points > 8192:  # the table of pairs would take half a gigabyte
        for index, number in enumerate(numbers.tolist()):
            totals[index] = _agreements_of(windows_WN, group.element(number), num_letters).sum()
        return totals
    pairs, start = np.zeros((num_points, num_points)), 0
    for size in _chunks(len(windows_WN), num_points):
        points_WP = np.zeros((size, num_points))
        np.put_along_axis(points_WP, windows_WN[start : start + size] + num_letters * place, 1.0, axis=1)
        pairs += points_WP.T @ points_WP
        start += size
    start = 0
    for size in _chunks(len(numbers), num_points):
        chosen = numbers[start : start + size]
        letters_GNA = np.arange(num_letters) if group.letter_maps is None else group.letter_maps[chosen]
        points_GP = (group.positions[chosen][:, :, None] * num_letters + letters_GNA).reshape(size, num_points)
        totals[start : start + size] = np.rint(pairs[np.arange(num_points), points_GP].sum(1))
        start += size
    return totals


def _agreements_of(windows_WN: np.ndarray, element: Element, num_letters: int) -> np.ndarray:
    """Number of letters of each window that stand where one element puts their images: int64 [W]."""
    degree = windows_WN.shape[1]
    images_WN = _letter_maps(element, degree, num_letters)[np.arange(degree), windows_WN]
    return np.count_nonzero(windows_WN[:, np.asarray(element.positions)] == images_WN, axis=1)


def _spread_p_value(counts_W: np.ndarray, expected: float) -> float:
    """Of the mean of independent counts against what is expected, by their own standard deviation."""
    excess, deviation = counts_W.mean() - expected, counts_W.std(ddof=1)
    if deviation == 0:
        return 0.0 if excess > 0 else 1.0
    return 0.5 * math.erfc(excess / deviation * math.sqrt(len(counts_W) / 2))


class _AgreementNulls:
    """Null distributions of the agreement of single elements with one window; each kind is computed once."""

    def __init__(self, frequencies_A: np.ndarray):
        self.frequencies_A = frequencies_A
        self._cycles: dict[tuple, np.ndarray] = {}
        self._kinds: dict[tuple, np.ndarray] = {}

    def __call__(self, element: Element) -> tuple[tuple, np.ndarray]:
        """The element's kind, and the probabilities [N + 1] of 0, ..., N agreeing letters."""
        positions = element.positions
        letters = _letter_maps(element, len(positions), len(self.frequencies_A)).tolist()
        kinds = Counter(tuple(tuple(letters[i]) for i in cycle) for cycle in _cycles(positions))
        kind = tuple(sorted(kinds.items()))
        if kind not in self._kinds:
            total = np.ones(1)
            for maps, number in kind:
                if maps not in self._cycles:
                    self._cycles[maps] = self._cycle(np.array(maps))
                part = self._cycles[maps]
                while number:
                    total = np.convolve(total, part) if number % 2 else total
                    number //= 2
                    part = np.convolve(part, part) if number else part
            self._kinds[kind] = total
        return kind, self._kinds[kind]

    def _cycle(self, maps_LA: np.ndarray) -> np.ndarray:
        """Probabilities of 0, ..., L agreements along a cycle of L positions, where maps[l] leads from l to l + 1.

        All terms are positive, so small probabilities keep their relative precision.
        """
        length, num_letters = maps_LA.shape
        chances_A = self.frequencies_A
        # of the first letter, the letter now, and the number of agreements
        table = np.zeros((num_letters, num_letters, length + 1))
        table[np.arange(num_letters), np.arange(num_letters), 0] = chances_A
        for step in range(length - 1):
            same_AA = maps_LA[step][:, None] == np.arange(num_letters)
            agree = (same_AA * chances_A).T @ table
            table = (~same_AA * chances_A).T @ table
            table[..., 1:] += agree[..., :-1]
        closing_AA = (maps_LA[-1][:, None] == np.arange(num_letters)).T
        probabilities = (table * ~closing_AA[..., None]).sum((0, 1))
        probabilities[1:] += (table * closing_AA[..., None]).sum((0, 1))[:-1]
        return probabilities


def _log_tail(probabilities: np.ndarray, number: int, total: int) -> float:
    """log P(S ≥ total), S the sum of ``number`` independent counts with the given probabilities of 0, 1, ...

    The distribution is tilted by exp(θk) until ``total`` is its mean, convolved by a Fourier transform, and tilted
    back, so that small probabilities are as precise as large ones. Values further from the mean than 6.3 times the
    range of a count times √number are left out: Hoeffding's inequality puts less than 2 exp(-80) there.
    """
    support = np.flatnonzero(probabilities > 0)
    low, high = int(support[0]), int(support[-1])
    if total <= number * low:
        return 0.0
    if total > number * high:
        return -math.inf
    log_chances = np.log(probabilities[support] / probabilities.sum())
    if total == number * high:
        return float(number * log_chances[-1])
    # Counts from 0, in steps of their greatest common divisor.
    unit = math.gcd(*(support - low).tolist())
    counts = (support - low) // unit
    target = -((number * low - total) // unit)
    target_mean = target / number

    def tilt(theta: float) -> tuple[np.ndarray, float]:
        exponents = log_chances + theta * counts
        largest = exponents.max()
        weights = np.exp(exponents - largest)
        return weights / weights.sum(), float(largest + math.log(weights.sum()))

    theta = 0.0
    chances, log_norm = tilt(0.0)
    mean = float(chances @ counts)
    if target_mean > mean:
        below, above = 0.0, 1.0
        while tilt(above)[0] @ counts < target_mean:
            below, above = above, 2 * above
        while True:  # until the mean of the sum is within one step of the target
            theta = (below + above) / 2
            chances, log_norm = tilt(theta)
            mean = float(chances @ counts)
            if abs(mean - target_mean) * number < 1 or theta in (below, above):
                break
            below, above = (theta, above) if mean < target_mean else (below, theta)
    span = int(counts[-1])
    reach = min(number * span, math.ceil(span * math.sqrt(40 * number)))
    size = 1 << (2 * reach + 1).bit_length()
    single = np.zeros(size)
    single[counts] = chances
    cyclic = np.maximum(np.fft.irfft(np.fft.rfft(single) ** number, size), 0.0)
    centre = round(number * mean)
    sums = np.arange(max(target, centre - reach), centre + reach + 1)
    tail = float((cyclic[sums % size] * np.exp(-theta * (sums - target))).sum())
    return min(0.0, math.log(tail) + number * log_norm - theta * target)


def _cycles(positions: Sequence[int]) -> list[list[int]]:
    seen, cycles = set(), []
    for start in range(len(positions)):
        if start not in seen:
            cycle, place = [], start
            while place not in seen:
                seen.add(place)
                cycle.append(place)
                place = positions[place]
            cycles.append(cycle)
    return cycles


def _describe(element: Element, alphabet: str | None) -> str:
    """As the group prints its generators, such as ``(0 3)(1 2) "TGCA"``."""
    moved = [cycle for cycle in _cycles(element.positions) if len(cycle) > 1]
    text = "".join(f"({' '.join(map(str, cycle))})" for cycle in moved) or "()"
    if element.letters is None:
        return text
    maps_NA = np.atleast_2d(np.asarray(element.letters))
    if (maps_NA == np.arange(maps_NA.shape[1])).all():
        return text
    maps = ["".join(alphabet[a] for a in row) if alphabet else row for row in maps_NA.tolist()]
    return f"{text} {json.dumps(maps[0] if len(maps) == 1 else maps)}"


# --- motifs -----------------------------------------------------------------------------------------------------------


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


# --- arguments --------------------------------------------------------------------------------------------------------


def _tokens(tokens: ArrayLike, what: str) -> np.ndarray:
    array = np.asarray(tokens)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} must be tokens, of an integer type, received {array.dtype}: encode the letters first")
    return array.astype(np.int64, copy=False)


def _sequences(tokens: ArrayLike | Sequence[ArrayLike]) -> list[np.ndarray]:
    """One sequence or several, as a list of int64 [length]."""
    several = isinstance(tokens, list | tuple) and len(tokens) > 0 and np.ndim(tokens[0]) == 1
    rows = tokens if several else np.atleast_2d(np.asarray(tokens))
    sequences = [_tokens(row, "tokens") for row in rows]
    if not sequences or any(sequence.ndim != 1 for sequence in sequences):
        raise ValueError("scan: tokens must be a sequence [length] or several of them")
    return sequences


def _num_letters(tokens: np.ndarray, group: PermutationGroup, given: int | None) -> int:
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


def _frequencies(frequencies: ArrayLike, group: PermutationGroup) -> np.ndarray:
    array = np.asarray(frequencies, dtype=np.float64)
    expected = group.num_letters or None
    if array.ndim != 1 or not len(array) or (expected and len(array) != expected):
        raise ValueError(f"frequencies of {group!r} must be [{expected or 'letters'}], received {list(array.shape)}")
    if not np.isfinite(array).all() or (array < 0).any() or abs(array.sum() - 1) > 1e-6:
        raise ValueError(f"frequencies must not be negative and have sum 1, received {array.tolist()}")
    return array / array.sum()


def _fit_frequencies(tokens: np.ndarray, group: PermutationGroup, frequencies: ArrayLike | None) -> np.ndarray:
    """The given frequencies, checked against the tokens, or those of the tokens: float64 [A]."""
    given_A = None if frequencies is None else _frequencies(frequencies, group)
    num_letters = _num_letters(tokens, group, None if given_A is None else len(given_A))
    numbers_A = np.bincount(tokens.ravel(), minlength=num_letters)
    if given_A is None:
        return numbers_A / numbers_A.sum()
    never = np.flatnonzero((given_A == 0) & (numbers_A > 0))
    if len(never):
        raise ValueError(
            f"letter {never[0]} occurs {numbers_A[never[0]]} times although its frequency is 0: give it a frequency"
        )
    return given_A


def _chunks(number: int, width: int) -> list[int]:
    """Sizes of the parts of ``number`` rows of some width that are worked on at a time."""
    size = max(1, _CHUNK // max(1, width))
    return [min(size, number - start) for start in range(0, number, size)]
