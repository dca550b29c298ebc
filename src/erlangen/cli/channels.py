"""``erlangen channels``.

Shape suffixes: W windows, N positions of a window, A letters, M attention maps, K channels.
"""

import csv
import json
import os
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import erlangen
from erlangen import report
from erlangen.finite.channels import channel_energies, channel_transfer
from erlangen.finite.discovery import energy_null, false_discovery_rates, invariant_energy, strand_correlation
from erlangen.finite.groups import PermutationGroup, parse, reverse_complement
from erlangen.finite.sequences import UNKNOWN, Motif, Record, read_fasta, read_pfm

from . import _channels_page as pages

_DESCRIPTION = """\
How much of sequences, motifs or attention maps lies in each channel of a group of permutations.

  erlangen channels peaks.fa                                     windows of 20, reverse complement
  erlangen channels genome.fa.gz --window 36 --fdr 0.01          longer windows, fewer false discoveries
  erlangen channels peaks.fa --group "inverted_repeat(6, 3)"     arms of 6 around a spacer of 3
  erlangen channels proteins.fa --alphabet ACDEFGHIKLMNPQRSTVWY --unknown X --group cyclic --window 30
  erlangen channels JASPAR2022.pfm                               each motif as a whole
  erlangen channels attention.npy                                maps [.., N, N] under reversal
  erlangen channels attention.safetensors --group "dihedral(6)"  windows of 6 along the diagonal

Sequences (.fa, .fasta, .fna, .faa) and motifs (.pfm), each also as .gz: the energy that the group leaves as it is, with
p-values against independent letters (exact for reverse complement) and false-discovery rates. Attention maps (.npy,
.safetensors): how much goes from each channel to each other. Prints a table, and writes channels.html, channels.json
and channels.csv.

Ctrl-C stops measuring and writes what was measured; a second one stops at once. No file is ever half written.
"""

DEFAULT_WINDOW = 20
SEQUENCES, MOTIFS, MAPS = (".fa", ".fasta", ".fna", ".faa"), (".pfm",), (".npy", ".safetensors")
MARK = "erlangen channels"
NUM_SAMPLES = 50_000  # of columns, for the null of motifs
NUM_POOLED = 20_000  # windows whose channels are measured
MAX_POINTS = 1_024  # positions times letters up to which they are
MAX_ROWS = 1_000_000  # windows in the CSV
MAX_SHARES = 1_000_000  # numbers of transfer matrices in the JSON
_CHUNK = 1_000_000  # numbers held at a time
_SECONDS = 5  # between lines about the progress, where there is no terminal

Report = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ChannelsConfig:
    """What `erlangen channels` is to measure."""

    file: Annotated[Path, tyro.conf.Positional]
    """Sequences, motifs or attention maps; the ending says which."""
    group: str | None = None
    """A group with its size, "dihedral(6)"; a name alone, which --window gives its size; or generators in cycles,
    "(0 3)(1 2)", ';' between them. Unless given, reverse_complement, and reversal for attention maps."""
    window: int | None = None
    """Positions of a window. Unless given: those of the group; with a name alone, 20 for sequences, and a motif or map
    as a whole."""
    stride: int = 1
    """From the start of a window to that of the next."""
    fdr: float = 0.05
    """False-discovery rate: of the windows called found, the share that may be by chance."""
    alphabet: str | None = None
    """The letters of sequences; unless given, those of the group, or ACGT."""
    unknown: str = "N"
    """Letters that stand for any; windows that hold one are left out."""
    out: Path = Path("channels")
    """Folder for the results; those of an earlier call are replaced."""


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


@dataclass(frozen=True)
class Maps:
    """Transfer of attention maps between channels."""

    group: PermutationGroup
    group_text: str
    labels: Sequence[str]
    indices: Sequence[tuple[int, ...]]
    """Of each map, its place among the leading dimensions."""
    transfer: np.ndarray
    """float64 [M, K, K]: the mean over a map's windows; shares from column to row."""
    commuting: np.ndarray
    """float64 [M]: the share that commutes with the group."""
    channels: Sequence[Mapping[str, Any]]
    num_windows: int
    """Of each map."""
    size: int
    total: int

    @property
    def stopped(self) -> bool:
        return len(self.labels) < self.total


def main(arguments: Sequence[str]) -> int:
    """Measure a file; exit status 0, or 130 if it was stopped, with what was measured until then written."""
    config = tyro.cli(ChannelsConfig, args=list(arguments), prog="erlangen channels", description=_DESCRIPTION)
    console = Console(file=sys.stdout)
    ending = _check(config)
    bar = Progress(
        TextColumn("measuring"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
    said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        bar.update(task, completed=done, total=total)
        if not console.is_terminal and time.monotonic() > said + _SECONDS:
            said = time.monotonic()
            console.print(f"{100 * done // total} % of {total:,}", highlight=False)

    measure: Callable[[ChannelsConfig, Report], Windows | Maps] = (
        measure_sequences if ending in SEQUENCES else measure_motifs if ending in MOTIFS else measure_maps
    )
    with bar:
        task = bar.add_task("", total=None)
        result = measure(config, progress)
    path = write(config, result)
    _say(console, config, result)
    what = "maps" if isinstance(result, Maps) else "windows"
    if result.stopped:
        done = len(result.labels) if isinstance(result, Maps) else len(result.energy) + result.skipped
        console.print(f"stopped after {done:,} of {result.total:,} {what}; these are in the report", highlight=False)
    console.print(f"the report: {path}", highlight=False, soft_wrap=True, markup=False)
    return 130 if result.stopped else 0


# --- sequences ------------------------------------------------------------------------------------------------------


def measure_sequences(config: ChannelsConfig, progress: Report) -> Windows:
    """Test every window of a FASTA file."""
    text = config.group or "reverse_complement"
    group = read_group(text, config.window or (DEFAULT_WINDOW if _is_name(text) else None), config.alphabet)
    _expect_degree(config, group)
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
    room = limit = max(1, _CHUNK // length)
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
    for rows_WN in np.array_split(windows_WN, -(-windows_WN.size * num_letters // _CHUNK)):
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
    fixed = None if config.window is None and _is_name(text) else read_group(text, config.window, config.alphabet)
    if fixed:
        _expect_degree(config, fixed)
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


# --- attention maps -------------------------------------------------------------------------------------------------


def measure_maps(config: ChannelsConfig, progress: Report) -> Maps:
    """The transfer matrices of every attention map of a file."""
    maps = list(read_maps(config.file))
    sizes = {get().shape[-1] for _, _, get in maps}
    text = config.group or "reversal"
    if _is_name(text) and config.window is None and len(sizes) > 1:
        raise ValueError(f"{config.file} has maps of sizes {', '.join(map(str, sorted(sizes)))}: give a --window")
    group = read_group(text, config.window or (min(sizes) if _is_name(text) else None), config.alphabet)
    _expect_degree(config, group)
    length = group.degree
    if length > min(sizes):
        raise ValueError(
            f"{group!r} has more positions than the maps of {config.file}, received {min(sizes)}: take a smaller group"
        )
    orbitals = group.orbitals().ravel()
    orbital_sizes = np.bincount(orbitals)
    labels, indices, transfers, commuting, num_windows = [], [], [], [], 0
    try:
        for label, index, get in maps:
            a_NN = get()
            energy = float(torch.linalg.vector_norm(a_NN)) ** 2
            if not 0 < energy < float("inf"):
                raise ValueError(f"an attention map must be finite and not all zero, received {label} of {config.file}")
            starts = range(0, len(a_NN) - length + 1, config.stride if length < len(a_NN) else 1)
            windows_WNN = [a_NN[start : start + length, start : start + length] for start in starts]
            windows_WNN = torch.stack([one for one in windows_WNN if one.any()] or windows_WNN[:1])
            parts = windows_WNN.split(max(1, _CHUNK // length**2))
            transfer_KK = sum(channel_transfer(part, group).sum(0) for part in parts) / len(windows_WNN)
            shares = []
            for one in windows_WNN.numpy():
                sums = np.bincount(orbitals, one.ravel())
                shares.append(float((np.square(sums) / orbital_sizes).sum() / np.square(one).sum()))
            num_windows = len(starts)
            labels.append(label)
            indices.append(index)
            transfers.append(np.asarray(transfer_KK))
            commuting.append(float(np.mean(shares)))
            progress(len(commuting), len(maps))
    except KeyboardInterrupt:
        if not commuting:
            raise
    done = len(commuting)
    channels = group.channels()
    mean_KK = np.mean(transfers[:done], axis=0)
    ranks = [irrep.dimension * irrep.multiplicity for irrep in channels]
    return Maps(
        group=group,
        group_text=str(group),
        labels=labels[:done],
        indices=indices[:done],
        transfer=np.stack(transfers[:done]),
        commuting=np.array(commuting),
        channels=[
            {
                "name": irrep.name, "dimension": irrep.dimension, "kind": irrep.kind,
                "multiplicity": irrep.multiplicity, "to": float(mean_KK[k].sum()), "from": float(mean_KK[:, k].sum()),
                "kept": float(mean_KK[k, k]), "kept_by_a_random_map": ranks[k] ** 2 / length**2,
            }
            for k, irrep in enumerate(channels)
        ],
        num_windows=num_windows,
        size=min(sizes),
        total=len(maps),
    )  # fmt: skip


def read_maps(path: Path) -> Iterator[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]]:
    """Label, index and a function that reads it in float64 [N, N], of each map of a file; nothing is unpickled.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not of its format, or holds what is no map [.., N, N] of real numbers.
    """
    if path.suffix.lower() == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no array of numbers in NumPy's format ({error})") from error
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{path} is an archive of arrays: save one array by np.save")
        tensors: dict[str, Any] = {"": array}
    else:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except SafetensorError as error:
            raise ValueError(f"{path} is not in the format of safetensors ({error})") from error
        if not tensors:
            raise ValueError(f"{path} holds no tensor")
    for name, tensor in tensors.items():
        what = f"{path}: {name}" if name else f"{path}"
        real = tensor.dtype.kind in "fiub" if isinstance(tensor, np.ndarray) else not tensor.is_complex()
        shape = tuple(tensor.shape)
        if len(shape) < 2 or shape[-1] != shape[-2] or 0 in shape or not real:
            raise ValueError(
                f"{what} must be attention maps, real numbers [.., N, N], received {tensor.dtype} {list(shape)}: save "
                "the maps alone"
            )
        for index in np.ndindex(*shape[:-2]):
            label = f"{name}[{', '.join(map(str, index))}]" if index else name or "map"

            def get(tensor: Any = tensor, index: tuple[int, ...] = index) -> torch.Tensor:
                found = tensor[index]
                return (
                    torch.from_numpy(np.array(found, np.float64)) if isinstance(found, np.ndarray) else found.double()
                )

            yield label, index, get


# --- arguments and results ------------------------------------------------------------------------------------------


def _is_name(text: str) -> bool:
    """Whether a group is given by a name alone, whose size is the window."""
    return bool(re.fullmatch(r"[a-z_]+", text)) and text not in ("klein", "quaternion")


def read_group(text: str, window: int | None, alphabet: str | None) -> PermutationGroup:
    """The group that ``--group`` and ``--window`` say."""
    text = text.strip()
    if text in ("klein", "quaternion"):
        text += "()"
    if _is_name(text):
        letters = f", {json.dumps(alphabet)}" if text == "reverse_complement" and alphabet not in (None, "ACGT") else ""
        return parse(f"{text}({window}{letters})")
    if text.startswith("("):
        if window is None:
            raise ValueError(f"the generators {text!r} need a --window, the number of positions that they permute")
        letters = f", {json.dumps(alphabet or 'ACGT')}" if '"' in text else ""
        return parse(f"group({window}{letters}: {text})")
    return parse(text)


def _expect_degree(config: ChannelsConfig, group: PermutationGroup) -> None:
    if config.window not in (None, group.degree):
        raise ValueError(f"{group!r} does not fit a --window of {config.window}: leave one of them out")
    if config.alphabet and group.alphabet and config.alphabet != group.alphabet:
        raise ValueError(f"{group!r} has the letters {group.alphabet!r}, received --alphabet {config.alphabet!r}")


def _sizes(number: int, width: int) -> list[int]:
    size = max(1, _CHUNK // width)
    return [min(size, number - first) for first in range(0, number, size)]


def _check(config: ChannelsConfig) -> str:
    """The ending of the file; errors that can be known before any work."""
    suffixes = [suffix.lower() for suffix in config.file.suffixes]
    ending = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
    allowed = (*SEQUENCES, *MOTIFS) if suffixes[-1:] == [".gz"] else (*SEQUENCES, *MOTIFS, *MAPS)
    if not config.file.exists():
        raise ValueError(f"{config.file} does not exist")
    if config.file.is_dir():
        raise ValueError(f"{config.file} is a folder: name a file in it")
    if ending not in allowed:
        raise ValueError(
            f"the ending of {config.file.name} does not say what it holds: sequences are {', '.join(SEQUENCES)}, "
            f"motifs {', '.join(MOTIFS)}, all also with .gz, attention maps {', '.join(MAPS)}"
        )
    for name, value in (("window", config.window), ("stride", config.stride)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, received {value}")
    if not 0 < config.fdr < 1:
        raise ValueError(f"--fdr must be between 0 and 1, received {config.fdr:g}")
    if config.out.exists() and not config.out.is_dir():
        raise ValueError(f"--out {config.out} is a file: choose a folder")
    there = [name for name in ("channels.json", "channels.csv", "channels.html") if (config.out / name).exists()]
    if there and not _is_ours(config.out / "channels.json"):
        raise ValueError(f"{config.out} holds {' and '.join(there)} of something else: choose another --out")
    return ending


def _is_ours(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("command") == MARK
    except (OSError, ValueError, AttributeError):
        return False


def write(config: ChannelsConfig, result: Windows | Maps) -> Path:
    """Write the three files, each aside and renamed; the page last. Returns its path."""
    if isinstance(result, Maps):
        page, header, rows = pages.maps_page(config, result), *_map_rows(result)
    else:
        page, header, rows = pages.windows_page(config, result), *_window_rows(result)
    config.out.mkdir(parents=True, exist_ok=True)
    aside = config.out / f".channels.csv.{os.getpid()}.tmp"
    try:
        with aside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)
        os.replace(aside, config.out / "channels.csv")
    finally:
        aside.unlink(missing_ok=True)
    return report.write_report(config.out, "channels", page, _data(config, result), {})


def _window_rows(result: Windows) -> tuple[tuple[str, ...], Iterator[tuple]]:
    chosen = result.rows()
    columns = [column[chosen].tolist() for column in (result.source, result.start, result.length)]
    for column in (
        result.energy,
        result.p,
        result.q,
    ):  # few of them differ, and to write numbers takes most of the time
        values, places = np.unique(column[chosen], return_inverse=True)
        texts = [repr(value) for value in values.tolist()]
        columns.append([texts[place] for place in places.tolist()])
    rows = zip(*columns)
    if result.strand is None:
        header = ("name", "start", "end", "energy", "p", "q")
        return header, ((result.names[s], a, a + n, e, p, q) for s, a, n, e, p, q in rows)
    strand = result.strand
    header = ("name", "start", "end", "energy", "p", "q", "strand_correlation")
    return header, ((result.names[s], a, a + n, e, p, q, strand[s]) for s, a, n, e, p, q in rows)


def _map_rows(result: Maps) -> tuple[tuple[str, ...], Iterator[tuple]]:
    header = ("map", "commuting", "channel", "dimension", "multiplicity", "to", "from", "kept")
    return header, (
        (label, share, c["name"], c["dimension"], c["multiplicity"], t[k].sum(), t[:, k].sum(), t[k, k])
        for label, share, t in zip(result.labels, result.commuting.tolist(), result.transfer)
        for k, c in enumerate(result.channels)
    )


def _data(config: ChannelsConfig, result: Windows | Maps) -> dict[str, Any]:
    data: dict[str, Any] = {"command": MARK, "version": erlangen.__version__, "config": config}
    data |= {"group": result.group_text, "stopped": result.stopped}
    if isinstance(result, Maps):
        data |= {"num_maps": len(result.labels), "num_windows_of_a_map": result.num_windows}
        data |= {"channels": result.channels, "commuting_mean": result.commuting.mean()}
        data |= {"transfer_mean": result.transfer.mean(0)}
        if result.transfer.size <= MAX_SHARES:
            data["maps"] = [
                {"map": label, "commuting": share, "transfer": transfer}
                for label, share, transfer in zip(result.labels, result.commuting, result.transfer)
            ]
        return data
    expected = float(result.null_values @ result.null_probabilities)
    data |= {"kind": result.kind, "num_sources": len(result.names), "num_windows": len(result.energy)}
    data |= {"num_windows_asked": result.total, "skipped": result.skipped, "too_short": result.too_short}
    data |= {"num_found": int((result.q <= config.fdr).sum()), "energy_mean": result.energy.mean()}
    data |= {"energy_expected": expected, "frequencies": result.frequencies, "channels": result.channels}
    null = {"samples": result.null_samples, "values": result.null_values, "probabilities": result.null_probabilities}
    best = [dict(zip(("name", "start", "end", "letters", "energy", "p", "q"), row)) for row in best_rows(result, 100)]
    return data | {"null": null, "best": best}


def best_rows(result: Windows, number: int) -> list[tuple]:
    """Name, start, end, letters, energy, p and q of the best windows that do not overlap."""
    rows = []
    for w in result.best(number):
        start, end = int(result.start[w]), int(result.start[w] + result.length[w])
        numbers = (float(result.energy[w]), float(result.p[w]), float(result.q[w]))
        rows.append((result.names[result.source[w]], start, end, result.texts(w), *numbers))
    return rows


def _say(console: Console, config: ChannelsConfig, result: Windows | Maps) -> None:
    """The result as a table."""
    lines = pages.summary(config, result)
    if isinstance(result, Maps):
        names, cells = pages.merged(result)
        table = Table("to \\ from", *(escape(name) for name in names), title="transfer, %")
        for name, row in zip(names, cells):
            table.add_row(escape(name), *(pages.percent(value) for value in row))
    else:
        table = Table(title=f"the best {'windows' if result.group else result.kind}")
        table.add_column("name", overflow="fold")
        table.add_column("place", no_wrap=True)
        table.add_column("letters", overflow="fold", min_width=10)
        for column in ("energy", "p", "q"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, start, end, text, energy, p, q in best_rows(result, 10):
            table.add_row(escape(name), f"{start}-{end}", text, f"{energy:.3f}", f"{p:.2g}", f"{q:.2g}")
    console.print(table)
    for line in lines:
        console.print(line.replace("`", ""), highlight=False, markup=False, soft_wrap=True)
