"""How symmetric a window is, and how symmetric it would be **if its letters were independent and alike distributed**.

That null hypothesis has no other structure, so to refuse it says: more symmetric than random letters. It does not say
what made them so: repeats, for one, are symmetric in many ways.

The statistic of a window x of N letters, one-hot, so that ‖x‖² = N, is its *invariant energy* under a group,
‖P₁x‖²/‖x‖². P₁ averages over the orbits of (position, letter) points, so the energy is Σ n_o²/|o| / N where n_o of the
window's points lie in orbit o. It costs the same for a group of any order.

Null distributions are exact wherever they can be enumerated. Letters in different orbits of positions are independent,
so those of the orbits are convolved; within an orbit the numbers n_o are enumerated. For reverse complement of even N
this gives energy = (1 + m/(N/2))/2 with m ~ Bin(N/2, Σ_a p_a p_ā). The middle letter of odd N never agrees with its
image, so there energy = (1 + 2m/N)/2 with m ~ Bin((N - 1)/2, Σ_a p_a p_ā), and is less than 1.

Shape suffixes: W windows, N positions, A letters.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ._enumeration import components
from ._letters import chunks, letter_maps_of, num_letters_of, read_frequencies, read_tokens
from .groups import PermutationGroup

_TIE = 1e-9  # energies as near as this are equal: what differs by rounding is counted as at least as extreme
_MAX_STATES = 200_000  # of the numbers n_o in one orbit of positions
_MAX_PAIRS = 4_000_000  # of values met in one convolution


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
    tokens = read_tokens(windows, "windows")
    if tokens.ndim < 1 or tokens.shape[-1] != group.degree:
        raise ValueError(
            f"invariant_energy: windows of {group!r} must be [..., {group.degree}], received {list(tokens.shape)}"
        )
    num_letters = num_letters_of(tokens, group, None)
    return energies_of(tokens.reshape(-1, group.degree), Orbits(group, num_letters)).reshape(tokens.shape[:-1])


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
    frequencies_A = read_frequencies(frequencies, group)
    if samples < 1:
        raise ValueError(f"energy_null: samples must be at least 1, received {samples}")
    orbits = Orbits(group, len(frequencies_A))
    exact = _enumerate(orbits, frequencies_A)
    if exact is not None:
        return EnergyNull(*exact, samples=None)
    generator = np.random.default_rng(seed)
    energies = []
    for size in chunks(samples, group.degree):
        energies.append(
            energies_of(generator.choice(len(frequencies_A), (size, group.degree), p=frequencies_A), orbits)
        )
    values, numbers = np.unique(np.concatenate(energies), return_counts=True)
    return EnergyNull(values, numbers / samples, samples)


class Orbits:
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
            letters = letter_maps_of(element, degree, num_letters)
            images.append((np.asarray(element.positions)[:, None] * num_letters + letters).ravel())
        labels = np.unique(components(images), return_inverse=True)[1]
        self.labels = labels.reshape(degree, num_letters)
        self.sizes = np.bincount(labels)
        self.positions = group.orbits


def energies_of(windows_WN: np.ndarray, orbits: Orbits) -> np.ndarray:
    """The invariant energy of each window: float64 [W]."""
    num_windows, degree = windows_WN.shape
    num_orbits = len(orbits.sizes)
    energies, start = np.empty(num_windows), 0
    for size in chunks(num_windows, num_orbits + degree):
        labels_WN = orbits.labels[np.arange(degree), windows_WN[start : start + size]]
        cells = (labels_WN + num_orbits * np.arange(size)[:, None]).ravel()
        counts = np.bincount(cells, minlength=size * num_orbits).reshape(size, num_orbits)
        energies[start : start + size] = (np.square(counts) / orbits.sizes).sum(1) / degree
        start += size
    return energies


def _enumerate(orbits: Orbits, frequencies_A: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
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
