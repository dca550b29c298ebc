"""Reading the records of a study: by seed, with errors, under the rule."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from erlangen import report


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a page: what it says in a sentence or two, its sections, and its tables by the name of their file."""

    summary: str
    sections: Sequence[report.Section]
    tables: Mapping[str, report.Table]


def by_seed(records: Iterable[Mapping[str, Any]], **where: Any) -> list[Mapping[str, Any]]:
    """The records that have these values, in order of their ``seed``."""
    chosen = [record for record in records if all(record[key] == value for key, value in where.items())]
    return sorted(chosen, key=lambda record: record["seed"])


def verdict(first: str, second: str, *intervals: report.Interval) -> str:
    """What the rule says of a difference, first minus second, where less is better.

    It is called only where each of the intervals leaves out zero, on the same side.
    """
    if not all(math.isfinite(interval.low) for interval in intervals):
        return "one seed: no interval"
    if all(interval.high < 0 for interval in intervals):
        return f"{first} is better"
    if all(interval.low > 0 for interval in intervals):
        return f"{second} is better"
    return "no difference shown"


def with_error(values: np.ndarray, mean: str = ".3g", error: str = ".2g") -> str:
    """Mean ± standard error over seeds, [seeds], in these formats."""
    found = report.mean_and_standard_error(values)
    return f"{found[0]:{mean}}" + (f"\u00a0±\u00a0{found[1]:{error}}" if math.isfinite(found[1]) else "")


def copy_tables(folder: Path | None, name: str, tables: Mapping[str, report.Table]) -> None:
    """Write ``<name>_<key>.csv`` for each table, if there is a folder to write to."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for key, table in tables.items():
            (folder / f"{name}_{key}.csv").write_text(table.csv())
