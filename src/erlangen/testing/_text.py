"""What the tables of this package share: fixed-width text, and a maximum that does not lose a NaN."""

import math
from collections.abc import Iterable, Sequence


def fixed_width(header: Sequence[str], rows: Iterable[Sequence[str | float]]) -> str:
    """Lay out a table in columns: the first to the left, the others to the right, numbers as ``1.23e-16``."""
    lines = [list(header)] + [[cell if isinstance(cell, str) else f"{cell:.2e}" for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def worst(values: Iterable[float]) -> float:
    """The largest value, NaN if any is NaN (``max`` depends on the order then), 0 if there is none."""
    values = list(values)
    return math.nan if any(math.isnan(value) for value in values) else max(values, default=0.0)
