"""``erlangen channels``: one file in, a table, a page and its numbers out."""

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import erlangen
from erlangen import report

from . import _channels_page as pages
from ._channels_config import ChannelsConfig, Report
from ._channels_maps import Maps, measure_maps
from ._channels_windows import Windows, measure_motifs, measure_sequences

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

SEQUENCES, MOTIFS, MAPS = (".fa", ".fasta", ".fna", ".faa"), (".pfm",), (".npy", ".safetensors")
MARK = "erlangen channels"
MAX_SHARES = 1_000_000  # numbers of transfer matrices in the JSON
_SECONDS = 5  # between lines about the progress, where there is no terminal


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


# --- arguments and results ------------------------------------------------------------------------------------------


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
