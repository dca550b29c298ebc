"""How often the letters of windows agree with their images under single elements, and how often by chance.

The *agreement* of a window x of N letters with an element h is ⟨x, hx⟩/N, the share of letters that stand where h puts
their images. Along a cycle of positions the letters are a chain, whose agreements are counted by a transfer matrix;
cycles are independent, and so are windows.

Shape suffixes: W windows, N positions, A letters, G elements, P points, L positions of a cycle.
"""

import math
from collections import Counter

import numpy as np

from ._elements import Element
from ._enumeration import cycles_of
from ._letters import chunks, letter_maps_of
from .groups import PermutationGroup


def count_agreements(
    windows_WN: np.ndarray, group: PermutationGroup, numbers: np.ndarray, num_letters: int
) -> np.ndarray:
    """Number of letters, of all windows, that stand where each element puts their images: int64 [numbers].

    How often letter b stands at j where a stands at i is counted once for all elements.
    """
    degree = group.degree
    num_points = degree * num_letters
    place = np.arange(degree)
    totals = np.zeros(len(numbers), dtype=np.int64)
    if num_points > 8192:  # the table of pairs would take half a gigabyte
        for index, number in enumerate(numbers.tolist()):
            totals[index] = agreements_of(windows_WN, group.element(number), num_letters).sum()
        return totals
    pairs, start = np.zeros((num_points, num_points)), 0
    for size in chunks(len(windows_WN), num_points):
        points_WP = np.zeros((size, num_points))
        np.put_along_axis(points_WP, windows_WN[start : start + size] + num_letters * place, 1.0, axis=1)
        pairs += points_WP.T @ points_WP
        start += size
    start = 0
    for size in chunks(len(numbers), num_points):
        chosen = numbers[start : start + size]
        letters_GNA = np.arange(num_letters) if group.letter_maps is None else group.letter_maps[chosen]
        points_GP = (group.positions[chosen][:, :, None] * num_letters + letters_GNA).reshape(size, num_points)
        totals[start : start + size] = np.rint(pairs[np.arange(num_points), points_GP].sum(1))
        start += size
    return totals


def agreements_of(windows_WN: np.ndarray, element: Element, num_letters: int) -> np.ndarray:
    """Number of letters of each window that stand where one element puts their images: int64 [W]."""
    degree = windows_WN.shape[1]
    images_WN = letter_maps_of(element, degree, num_letters)[np.arange(degree), windows_WN]
    return np.count_nonzero(windows_WN[:, np.asarray(element.positions)] == images_WN, axis=1)


def spread_p_value(counts_W: np.ndarray, expected: float) -> float:
    """Of the mean of independent counts against what is expected, by their own standard deviation."""
    excess, deviation = counts_W.mean() - expected, counts_W.std(ddof=1)
    if deviation == 0:
        return 0.0 if excess > 0 else 1.0
    return 0.5 * math.erfc(excess / deviation * math.sqrt(len(counts_W) / 2))


class AgreementNulls:
    """Null distributions of the agreement of single elements with one window; each kind is computed once."""

    def __init__(self, frequencies_A: np.ndarray):
        self.frequencies_A = frequencies_A
        self._cycles: dict[tuple, np.ndarray] = {}
        self._kinds: dict[tuple, np.ndarray] = {}

    def __call__(self, element: Element) -> tuple[tuple, np.ndarray]:
        """The element's kind, and the probabilities [N + 1] of 0, ..., N agreeing letters."""
        positions = element.positions
        letters = letter_maps_of(element, len(positions), len(self.frequencies_A)).tolist()
        kinds = Counter(tuple(tuple(letters[i]) for i in cycle) for cycle in cycles_of(positions))
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


def log_tail(probabilities: np.ndarray, number: int, total: int) -> float:
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
