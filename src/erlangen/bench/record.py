"""Timing, and the one CSV schema that every benchmark of the project writes."""

import csv
import io
import json
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import erlangen

FIELDS = (
    "benchmark",
    "variant",
    "baseline",
    "metric",
    "unit",
    "x_name",
    "x_value",
    "q20",
    "median",
    "q80",
    "ratio",
    "ratio_q20",
    "ratio_q80",
    "rounds",
    "threads",
    "device",
    "dtype",
    "torch_version",
    "erlangen_version",
    "commit",
    "timestamp",
    "config_json",
)


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one callable, and its ratio to the baseline of the same rounds.

    Attributes:
        q20, median, q80: quantiles over the rounds, in seconds.
        ratio: median over the baseline's median.
        ratio_q20, ratio_q80: quantiles of the ratio within each round, which drift of the machine hardly touches.
        rounds: number of rounds.
    """

    q20: float
    median: float
    q80: float
    ratio: float
    ratio_q20: float
    ratio_q80: float
    rounds: int


def quantile(values: Sequence[float], fraction: float) -> float:
    """The ``fraction`` quantile of ``values``, linear between neighbours."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]], baseline: str, *, rounds: int = 20, warmup: int = 2
) -> dict[str, Timing]:
    """Time several callables in turn, so that a slow spell of the machine falls on all of them.

    Each round calls every one once, in an order shuffled anew (by a fixed seed), so that none is always run after the
    same other. With a GPU the device is synchronised around each call.

    Args:
        calls: name to callable.
        baseline: the name in ``calls`` that ratios refer to.
        rounds: timed rounds.
        warmup: rounds before those, not timed.

    Raises:
        ValueError: ``baseline`` is not in ``calls``, or ``rounds`` < 1.
    """
    if baseline not in calls:
        raise ValueError(f"the baseline {baseline!r} is not among {', '.join(calls)}")
    if rounds < 1:
        raise ValueError(f"rounds is at least 1, not {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    order = random.Random(0)
    for index in range(warmup + rounds):
        for name in order.sample(names, len(names)):
            _synchronise()
            start = time.perf_counter()
            calls[name]()
            _synchronise()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    reference = seconds[baseline]
    timings = {}
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, reference)]
        median = statistics.median(values)
        timings[name] = Timing(
            quantile(values, 0.2),
            median,
            quantile(values, 0.8),
            median / statistics.median(reference),
            quantile(ratios, 0.2),
            quantile(ratios, 0.8),
            rounds,
        )
    return timings


def timing_row(
    benchmark: str,
    variant: str,
    baseline: str,
    timing: Timing,
    *,
    device: str,
    dtype: str,
    x_name: str = "",
    x_value: float | str = "",
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A row in milliseconds for ``write``."""
    return {
        "benchmark": benchmark,
        "variant": variant,
        "baseline": baseline,
        "metric": "time",
        "unit": "ms",
        "x_name": x_name,
        "x_value": x_value,
        "q20": f"{timing.q20 * 1e3:.4g}",
        "median": f"{timing.median * 1e3:.4g}",
        "q80": f"{timing.q80 * 1e3:.4g}",
        "ratio": f"{timing.ratio:.4g}",
        "ratio_q20": f"{timing.ratio_q20:.4g}",
        "ratio_q80": f"{timing.ratio_q80:.4g}",
        "rounds": timing.rounds,
        "device": device,
        "dtype": dtype,
        "config_json": json.dumps(dict(config or {}), sort_keys=True),
    }


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a CSV file, made with its header if it is not there. Versions, threads and time are filled in.

    Args:
        path: the file.
        rows: keys out of ``FIELDS``; what is missing is left empty.

    Raises:
        ValueError: a key is not in ``FIELDS``, or the header of the file differs from ``FIELDS``; nothing is written.
    """
    common = {**provenance(), "timestamp": datetime.now(UTC).isoformat(timespec="seconds")}
    for row in rows:
        unknown = sorted(set(row) - set(FIELDS))
        if unknown:
            raise ValueError(f"a row has fields that are not in the schema: {', '.join(unknown)}")
    before = _text(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n", restval="")
    if not before:
        writer.writeheader()
    elif not before.endswith("\n"):
        text.write("\n")
    writer.writerows({**common, **row} for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        file.write(text.getvalue())  # at once: a process that is stopped leaves whole rows


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file that ``write`` made, none if it is not there. A row that was cut short is left out.

    Raises:
        ValueError: the header of the file differs from ``FIELDS``.
    """
    rows = []
    for line in _text(path).splitlines()[1:]:
        values = next(csv.reader([line]))
        if len(values) == len(FIELDS) and line.count('"') % 2 == 0:
            rows.append(dict(zip(FIELDS, values)))
    return rows


def provenance() -> dict[str, Any]:
    """The fields of a row that say which code made it, and with how many threads."""
    return {
        "threads": torch.get_num_threads(),
        "torch_version": torch.__version__,
        "erlangen_version": erlangen.__version__,
        "commit": _commit(),
    }


def _text(path: Path) -> str:
    text = path.read_text() if path.exists() else ""
    header = text.partition("\n")[0]
    if text and header != ",".join(FIELDS):
        raise ValueError(f"{path} has another header, {header}: move it away, or write to another file")
    return text


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@cache
def _commit() -> str:
    """The short hash of the commit, with ``+`` if files differ from it; empty where this file is in no repository."""
    here = Path(__file__)
    try:
        for text in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--exclude=*", "--dirty=+"]):
            done = subprocess.run(["git", *text], cwd=here.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
