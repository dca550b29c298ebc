"""Windows of sequences and motifs, each with its test: of ``erlangen channels``.

Shape suffixes: W windows, N positions of a window, A letters, C columns of motifs, S samples, K channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

from erlangen.finite import (
    UNKNOWN,
    Motif,
    PermutationGroup,
    Record,
    channel_energies,
    energy_null,
    false_discovery_rates,
    invariant_energy,
    read_fasta,
    read_pfm,
    reverse_complement,
    strand_correlation,
)

from ._channels_config import CHUNK, ChannelsConfig, Report, expect_degree, is_name, read_group

DEFAULT_WINDOW = 20
NUM_SAMPLES = 50_000  # of columns, for the null of motifs
NUM_POOLED = 20_000  # windows whose channels are measured
MAX_POINTS = 1_024  # positions times letters up to which they are
MAX_ROWS = 1_000_000  # windows in the CSV


@dataclass(frozen=True)
class Windows:
    """Windows of sequences or motifs, in their order, with the test of each."""

    kind: str
    """"sequences" or "motifs"."""
    group: PermutationGroup | None
    """Of all windows; None where each motif has its own."""
    group_text: str
    names: Sequence[str]
    lengths: Sequence[int]
    """Of the sequences or motifs."""
    source: np.ndarray
    """int64 [W]: number of the sequence or motif."""
    start: np.ndarray
    """int64 [W]."""
    length: np.ndarray
    """int64 [W]: positions of the window."""
    energy: np.ndarray
    """float64 [W]: the share in the trivial channel."""
    p: np.ndarray
    q: np.ndarray
    null_values: np.ndarray
    null_probabilities: np.ndarray
    """Distribution of the energy under the null hypothesis; of motifs, of all lengths together."""
    null_samples: int | None
    """Number of windows it was drawn from; None where it is exact."""
    frequencies: Mapping[str, float]
    skipped: int
    """Windows with unknown letters, or motifs without any preference."""
    too_short: int
    """Sequences or motifs shorter than a window."""
    total: int
    """Windows that were to be measured: more than [W] if it was stopped."""
    texts: Callable[[int], str]
    """Letters of a window, by its number here; of a motif, those that lead at each position."""
    channels: Sequence[Mapping[str, Any]] = ()
    """Of each channel its name, dimension and kind, the share of all windows, and that of independent letters."""
    num_pooled: int = 0
    strand: Sequence[float | None] | None = None
    """Of each motif, how well its other strand agrees with it; None where this is not about strands."""

    @property
    def stopped(self) -> bool:
        return len(self.energy) + self.skipped < self.total

    @cached_property
    def _order(self) -> np.ndarray:
        """Numbers of the windows, the most significant first."""
        return np.lexsort((-self.energy, self.p))

    def rows(self) -> np.ndarray:
        """Numbers of the windows that the CSV has, in their order: all, or as many of the most significant."""
        return np.sort(self._order[:MAX_ROWS])

    def best(self, number: int) -> list[int]:
        """The most significant windows, without those that overlap a better one."""
        chosen: list[int] = []
        taken: dict[int, list[tuple[int, int]]] = {}
        for w in map(int, self._order):
            first, last = int(self.start[w]), int(self.start[w] + self.length[w])
            others = taken.setdefault(int(self.source[w]), [])
            if all(last <= a or first >= b for a, b in others):
                others.append((first, last))
                chosen.append(w)
                if len(chosen) == number:
                    break
        return chosen


# --- sequences ------------------------------------------------------------------------------------------------------


def measure_sequences(config: ChannelsConfig, progress: Report) -> Windows:
    """Test every window of a FASTA file."""
    text = config.group or "reverse_complement"
    group = read_group(text, config.window or (DEFAULT_WINDOW if is_name(text) else None), config.alphabet)
    expect_degree(config, group)
    alphabet = config.alphabet or group.alphabet or "ACGT"
    if group.num_letters and group.num_letters != len(alphabet):
        raise ValueError(
            f"{group!r} changes {group.num_letters} letters, the alphabet {alphabet!r} has {len(alphabet)}"
        )
    length = group.degree
    unknown = "".join(letter for letter in config.unknown if letter not in alphabet)
    records = read_fasta(config.file, alphabet, unknown=unknown)
    long_enough = [record for record in records if len(record.tokens) >= length]
    if not long_enough:
        longest = max(len(record.tokens) for record in records)
        raise ValueError(
            f"a window of {length} positions is longer than every sequence of {config.file}, the longest of which has "
            f"{longest}: take a smaller --window or group"
        )
    known = np.concatenate([record.tokens for record in long_enough])
    numbers_A = np.bincount(known[known != UNKNOWN], minlength=len(alphabet))
    if not numbers_A.sum():
        raise ValueError(f"{config.file} has unknown letters only, those of {unknown!r}")
    frequencies_A = numbers_A / numbers_A.sum()
    null = energy_null(group, frequencies_A)
    total = sum((len(record.tokens) - length) // config.stride + 1 for record in long_enough)
    parts: list[tuple[np.ndarray, ...]] = []
    done = 0
    try:
        for source_W, start_W, windows_WN in _blocks(long_enough, length, config.stride):
            whole = (windows_WN != UNKNOWN).all(1)
            energy_W = invariant_energy(windows_WN[whole], group)
            parts.append((source_W[whole], start_W[whole], energy_W, np.array([len(whole)])))
            done += len(whole)
            progress(done, total)
    except KeyboardInterrupt:
        if not parts:
            raise
    source_W, start_W, energy_W, counts = (np.concatenate(column) for column in zip(*parts))
    if not len(energy_W):
        raise ValueError(f"each of {total} windows of {length} letters holds unknown letters: take a smaller --window")
    p_W = null.p_value(energy_W)

    def letters(w: int) -> str:
        tokens = long_enough[source_W[w]].tokens[start_W[w] : start_W[w] + length]
        return "".join(alphabet[token] for token in tokens)

    chosen = np.unique(np.linspace(0, len(energy_W) - 1, NUM_POOLED).astype(np.int64))
    pooled_WN = np.stack([long_enough[source_W[w]].tokens[start_W[w] : start_W[w] + length] for w in chosen])
    return Windows(
        kind="sequences",
        group=group,
        group_text=str(group),
        names=[record.name for record in long_enough],
        lengths=[len(record.tokens) for record in long_enough],
        source=source_W,
        start=start_W,
        length=np.full(len(energy_W), length),
        energy=energy_W,
        p=p_W,
        q=false_discovery_rates(p_W, dependent=config.stride < length),
        null_values=null.values,
        null_probabilities=null.probabilities,
        null_samples=null.samples,
        frequencies=dict(zip(alphabet, frequencies_A.tolist())),
        skipped=int(counts.sum()) - len(energy_W),
        too_short=len(records) - len(long_enough),
        total=total,
        texts=letters,
        channels=_pooled_channels(pooled_WN, group, frequencies_A),
        num_pooled=len(chosen),
    )


def _blocks(records: Sequence[Record], length: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Number of the sequence [W], start [W] and tokens [W, N] of all windows, some at a time, across sequences."""
    held: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    room = limit = max(1, CHUNK // length)
    for number, record in enumerate(records):
        windows_WN = np.lib.stride_tricks.sliding_window_view(record.tokens, length)[::stride]
        first = 0
        while first < len(windows_WN):
            rows_WN = windows_WN[first : first + room]
            starts = stride * np.arange(first, first + len(rows_WN))
            held.append((np.full(len(rows_WN), number), starts, rows_WN))
            first, room = first + len(rows_WN), room - len(rows_WN)
            if not room:
                yield _joined(held)
                held, room = [], limit
    if held:
        yield _joined(held)


def _joined(held: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sources, starts, windows = zip(*held)
    return np.concatenate(sources), np.concatenate(starts), np.concatenate(windows)


def _pooled_channels(
    windows_WN: np.ndarray, group: PermutationGroup, frequencies_A: np.ndarray
) -> list[dict[str, Any]]:
    """Share of one-hot windows in each channel, and what independent letters would have; none for large windows.

    Independent letters have mean m and a covariance S = ⊕_i (diag p - p pᵀ), which is the same at all positions, so
    E‖P_k x‖² = ‖P_k m‖² + tr(P_k S). The trace is that over the columns of S^(1/2), which P_k is applied to.
    """
    num_positions, num_letters = windows_WN.shape[1], len(frequencies_A)
    if num_positions * num_letters > MAX_POINTS:
        return []
    letters = bool(group.num_letters)
    counts_K: Any = 0.0
    for rows_WN in np.array_split(windows_WN, -(-windows_WN.size * num_letters // CHUNK)):
        onehot = torch.from_numpy(np.eye(num_letters)[rows_WN])
        counts_K = counts_K + channel_energies(onehot, group, letters=letters).sum(0)
    covariance_AA = np.diag(frequencies_A) - np.outer(frequencies_A, frequencies_A)
    values_A, vectors_AA = np.linalg.eigh(covariance_AA)
    root_AA = vectors_AA * np.sqrt(values_A.clip(min=0))
    columns = np.einsum("ij,ab->ibja", np.eye(num_positions), root_AA).reshape(-1, num_positions, num_letters)
    mean = np.broadcast_to(frequencies_A, (1, num_positions, num_letters))
    both = torch.from_numpy(np.concatenate([columns, mean]))
    expected_K = channel_energies(both, group, letters=letters).sum(0)
    return [
        {
            "name": irrep.name, "dimension": irrep.dimension, "kind": irrep.kind,
            "share": float(count) / windows_WN.size, "expected": float(expected) / num_positions,
        }
        for irrep, count, expected in zip(group.channels(letters), counts_K, expected_K)
    ]  # fmt: skip


# --- motifs ---------------------------------------------------------------------------------------------------------


def measure_motifs(config: ChannelsConfig, progress: Report) -> Windows:
    """Test every motif, or every window of one, of a file of position frequency matrices.

    Features are the frequencies less 1/4, so that positions without preference count for nothing. Under the null
    hypothesis the columns of a window are drawn at random from all those of the file.
    """
    text = config.group or "reverse_complement"
    fixed = None if config.window is None and is_name(text) else read_group(text, config.window, config.alphabet)
    if fixed:
        expect_degree(config, fixed)
    sample = fixed or read_group(text, 3, config.alphabet)
    if (config.alphabet or sample.alphabet or "ACGT") != "ACGT" or sample.num_letters not in (0, 4):
        raise ValueError(f"the letters of motifs are those of 'ACGT', received {sample!r}")
    motifs = read_pfm(config.file)
    profiles = [motif.counts / motif.counts.sum(1, keepdims=True) - 0.25 for motif in motifs]
    if fixed and all(len(profile) < fixed.degree for profile in profiles):
        raise ValueError(
            f"a window of {fixed.degree} positions is longer than every motif of {config.file}, the longest of which "
            f"has {max(map(len, profiles))}: take a smaller --window or group"
        )
    columns_CA = np.concatenate(profiles)

    @cache
    def of_length(length: int) -> tuple[PermutationGroup, np.ndarray]:
        """The group, and the energies of random columns in order."""
        group = fixed or read_group(text, length, config.alphabet)
        generator = np.random.default_rng(length)
        parts = []
        for size in _sizes(NUM_SAMPLES, length * 4):
            energies = _shares(columns_CA[generator.integers(len(columns_CA), size=(size, length))], group)
            parts.append(energies[np.isfinite(energies)])
        return group, np.sort(np.concatenate(parts))

    windows = [
        (number, start, length)
        for number, profile in enumerate(profiles)
        for length in [fixed.degree if fixed else len(profile)]
        for start in range(0, len(profile) - length + 1, config.stride)
    ]
    rows: list[tuple[int, int, int, float, float]] = []
    nulls: dict[int, int] = {}
    skipped = 0
    strand_numbers: list[float | None] = [None] * len(motifs)
    about_strands = sample.num_letters > 0 and (fixed or sample) == reverse_complement(sample.degree)
    try:
        for done, (number, start, length) in enumerate(windows, 1):
            group, null_S = of_length(length)
            energy = float(_shares(profiles[number][None, start : start + length], group)[0])
            if np.isfinite(energy):
                above = len(null_S) - int(np.searchsorted(null_S, energy - 1e-9))
                rows.append((number, start, length, energy, (1 + above) / (1 + len(null_S))))
                nulls[length] = nulls.get(length, 0) + 1
            else:
                skipped += 1
            if about_strands and not start and len(profiles[number]) >= 6:
                strand_numbers[number] = strand_correlation(motifs[number].counts)
            if done % 50 == 0 or done == len(windows):
                progress(done, len(windows))
    except KeyboardInterrupt:
        if not rows:
            raise
    if not rows:
        raise ValueError(f"{config.file} has no motif with a preference for a letter: there is nothing to measure")
    source, start, length, energy, p = (np.array(column) for column in zip(*rows))
    # Histogram of the nulls of all lengths, as often as windows have them.
    edges = np.linspace(0, 1, 41)
    mixed = sum(n * np.histogram(of_length(one)[1], edges)[0] / len(of_length(one)[1]) for one, n in nulls.items())
    counts_A = np.concatenate([motif.counts / motif.counts.sum(1, keepdims=True) for motif in motifs]).mean(0)
    return Windows(
        kind="motifs",
        group=fixed,
        group_text=str(fixed) if fixed else f"{text}(length of the motif)",
        names=[motif.name for motif in motifs],
        lengths=[len(profile) for profile in profiles],
        source=source,
        start=start,
        length=length,
        energy=energy,
        p=p,
        q=false_discovery_rates(p, dependent=bool(fixed) and config.stride < fixed.degree),
        null_values=(edges[1:] + edges[:-1]) / 2,
        null_probabilities=np.asarray(mixed) / len(rows),
        null_samples=NUM_SAMPLES,
        frequencies=dict(zip("ACGT", counts_A.tolist())),
        skipped=skipped,
        too_short=sum(len(profile) < fixed.degree for profile in profiles) if fixed else 0,
        total=len(windows),
        texts=lambda w: _leading(motifs[source[w]], int(start[w]), int(length[w])),
        strand=strand_numbers if about_strands else None,
    )


def _shares(profiles_WNA: np.ndarray, group: PermutationGroup) -> np.ndarray:
    """Share of the trivial channel [W]; NaN where there is nothing."""
    totals_W = np.square(profiles_WNA).sum((1, 2))
    energies_WK = channel_energies(torch.from_numpy(profiles_WNA), group, letters=bool(group.num_letters))
    return np.where(totals_W > 1e-12, energies_WK[:, 0].numpy() / np.where(totals_W > 1e-12, totals_W, 1.0), np.nan)


def _leading(motif: Motif, start: int, length: int) -> str:
    """The most frequent letter at each position, small where it has less than half."""
    rows = motif.counts[start : start + length] / motif.counts[start : start + length].sum(1, keepdims=True)
    return "".join(("ACGT" if row.max() >= 0.5 else "acgt")[row.argmax()] for row in rows)


def _sizes(number: int, width: int) -> list[int]:
    size = max(1, CHUNK // width)
    return [min(size, number - first) for first in range(0, number, size)]
