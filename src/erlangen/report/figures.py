"""The figures of a report, as SVG text. Same data, same bytes.

Drawn small (about 520 px) with large letters, so that they can still be read when a phone shrinks them to 340 px.
Colour tells labels apart, line style tells groups apart; the colours are Okabe and Ito's, without their yellow, which
is too light on white.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from .._extras import require
from .statistics import mean_and_standard_error

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333", "#8c6bb1")
_STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_INK, _MUTED, _GRID = "#222222", "#666666", "#dddddd"
_WIDTH = 5.4  # inches of 72 points
_FEW_SEEDS = 8
_MAX_COLUMNS = 12
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_RC = {
    "svg.hashsalt": "erlangen",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # measured with this one, which all matplotlib has; the page's own font replaces it
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "text.color": _INK,
    "text.usetex": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "path.simplify": True,
}


@dataclass(frozen=True, eq=False)
class Series:
    """Curves of one label: ``x`` of shape [n], ``y`` of shape [seeds, n] (or [n]: one seed).

    Values that are not finite are left out. ``group`` chooses the line style, in the order in which groups appear.
    """

    label: str
    x: Any
    y: Any
    group: str = ""

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """``x`` [n] and ``y`` [seeds, n] as float64, with NaN for what is not finite."""
        x, y = (np.asarray(values, dtype=np.float64) for values in (self.x, self.y))
        y = np.atleast_2d(y)
        if x.ndim != 1 or y.ndim != 2 or y.shape[1] != len(x) or len(y) == 0:
            raise ValueError(f"series {self.label!r}: x must be [n] and y [seeds, n]; received {x.shape} and {y.shape}")
        return x, np.where(np.isfinite(y), y, np.nan)


@dataclass(frozen=True, eq=False)
class Arrows:
    """Places in the plane with a direction, of one label: ``x``, ``y`` and ``angle`` (radians) of shape [n].

    Those that are not finite are left out. ``kind`` is how they are drawn: "answer" in a colour of its own, "given" in
    grey, "truth" in black with a ring around.
    """

    label: str
    x: Any
    y: Any
    angle: Any
    kind: Literal["answer", "given", "truth"] = "answer"

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``x``, ``y`` and ``angle`` as float64 [n], the finite ones."""
        parts = [np.asarray(values, dtype=np.float64) for values in (self.x, self.y, self.angle)]
        if any(part.ndim != 1 or len(part) != len(parts[0]) for part in parts):
            shapes = ", ".join(str(part.shape) for part in parts)
            raise ValueError(f"arrows {self.label!r}: x, y and angle must be [n] each; received {shapes}")
        keep = np.isfinite(parts).all(axis=0)
        return parts[0][keep], parts[1][keep], parts[2][keep]


class IntervalRow(NamedTuple):
    """A row of :func:`intervals`: a mean, its confidence interval (infinite if undefined) and each seed's value."""

    label: str
    mean: float
    low: float
    high: float
    points: Sequence[float] = ()


def curves(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    bands: bool = True,
) -> str:
    """Mean over seeds with a band of ± one standard error; each seed as a thin line when there are at most eight.

    The mean is drawn where all seeds have a value: a seed that diverged ends it rather than leaving it.

    Args:
        series: what to draw; a label has one colour in all its groups.
        x_label: label of the x axis.
        y_label: label of the y axis, with its unit.
        title: a title inside the figure.
        log_x: a logarithmic x axis, marked at values of the series.
        log_y: a logarithmic y axis. Zeros are drawn on a floor below the smallest value, which the label states.
        bands: draw the bands.

    Returns:
        The SVG.
    """
    panels = {title: series}
    return _panels(panels, x_label=x_label, y_label=y_label, title="", log_x=log_x, log_y=log_y, bands=bands, columns=1)


def small_multiples(
    panels: Mapping[str, Sequence[Series]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    bands: bool = True,
    columns: int = 2,
) -> str:
    """One panel of :func:`curves` for each entry, on the same axes and with one legend."""
    return _panels(
        panels, x_label=x_label, y_label=y_label, title=title, log_x=log_x, log_y=log_y, bands=bands, columns=columns
    )


def intervals(rows: Sequence[IntervalRow], *, x_label: str, title: str = "") -> str:
    """Paired differences, one row each: mean, confidence interval and every seed, with the line at zero marked.

    An interval that excludes zero is drawn in colour, one that includes it in grey. Where the interval is infinite (one
    seed) the row says ``n = 1``. Rows whose mean is not finite say ``no value``.
    """
    rows = [IntervalRow(*row) for row in rows]
    matplotlib = require("matplotlib", "report")
    figure_module = require("matplotlib.figure", "report")
    with matplotlib.rc_context():
        _configure(matplotlib)
        labels = [textwrap.fill(row.label, 22) for row in rows]
        heights = [0.42 + 0.2 * label.count("\n") for label in labels]
        figure = figure_module.Figure(figsize=(_WIDTH, 0.95 + 0.3 * bool(title) + sum(heights)), layout="constrained")
        axes = figure.subplots()
        centres = np.cumsum(heights) - np.array(heights) / 2
        axes.axvline(0, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for centre, row in zip(centres, rows):
            points = np.asarray(row.points, dtype=np.float64)
            points = points[np.isfinite(points)]
            # Fixed offsets, so that equal values do not hide one another and the figure is repeatable.
            offsets = 0.09 * (np.arange(len(points)) % 3 - 1)
            axes.plot(
                points, centre + offsets, "o", color=_MUTED, alpha=0.55, markersize=4, markeredgewidth=0, zorder=2
            )
            note = ""
            if not math.isfinite(row.mean):
                note = "no value"
            elif math.isfinite(row.low) and math.isfinite(row.high):
                colour = _COLOURS[0] if row.low > 0 or row.high < 0 else "#8a8a8a"
                axes.plot([row.low, row.high], [centre, centre], color=colour, linewidth=2.5, zorder=3)
                axes.plot([row.mean], [centre], "D", color=colour, markersize=6.5, zorder=4)
            else:
                note = "n = 1"
                axes.plot([row.mean], [centre], "D", color="white", markeredgecolor=_MUTED, markersize=6.5, zorder=4)
            if note:
                axes.annotate(
                    note, (1, centre), xycoords=("axes fraction", "data"), ha="right", va="center", color=_MUTED
                )
        axes.set_ylim(sum(heights), 0)
        axes.set_yticks(centres, labels)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.08)
        axes.grid(axis="x", color=_GRID, linewidth=0.6)
        axes.locator_params(axis="x", nbins=6)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(x_label)
        axes.set_title(title)
        return _svg(figure)


def arrows(groups: Sequence[Arrows], *, x_label: str, y_label: str) -> str:
    """A map: an arrow of one length at each place, on axes of equal scale. What comes first lies below."""
    everything = [group.arrays() for group in groups]
    if not sum(x.size for x, _, _ in everything):
        raise ValueError("there is no arrow to draw: no place is finite")
    wide, high = np.ptp(np.concatenate([places[:2] for places in everything], axis=1), axis=1)
    matplotlib = require("matplotlib", "report")
    figure_module = require("matplotlib.figure", "report")
    colours = iter(_COLOURS * len(groups))
    with matplotlib.rc_context():
        _configure(matplotlib)
        height = 1.2 + 4.2 * min(1.0, max(0.35, high / max(wide, 1e-9)))  # labels and legend, and the map
        figure = figure_module.Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots()
        for group, (x, y, angle) in zip(groups, everything):
            colour = {"given": "#9a9a9a", "truth": _INK}.get(group.kind) or next(colours)
            look = {"color": colour, "linestyle": "", "label": group.label}
            if group.kind == "truth":
                axes.plot(x, y, "o", markersize=14, markerfacecolor="none", markeredgewidth=1.6, **look)
            else:
                axes.plot(x, y, "o", markersize=5.5, markeredgewidth=0, **look)
            axes.quiver(
                x, y, np.cos(angle), np.sin(angle), color=colour, units="inches", scale_units="inches", scale=3.2,
                width=0.022, headwidth=4.5, headlength=5, headaxislength=4.5,
            )  # fmt: skip
        axes.set_aspect("equal", adjustable="datalim")
        axes.margins(0.12)
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.legend(loc="outside lower center", ncols=3, handletextpad=0.2)
        return _svg(figure)


def heat_map(
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    x_label: str = "",
    y_label: str = "",
    title: str = "",
    cell: str | Callable[[float], str] = ".2g",
) -> str:
    """A matrix as coloured cells, each with its number; the first row is on top.

    Colour goes in equal steps from white at zero to blue at the largest size of a value, and to orange where values are
    negative. Cells that are not finite are grey and marked with a dash.

    Args:
        values: [rows, columns].
        rows: a label for each row.
        columns: a label for each column; at most twelve, as the numbers of more could not be read on a phone.
        x_label: what the columns are.
        y_label: what the rows are.
        title: a title inside the figure.
        cell: how to write the numbers: a format specification or a function.

    Returns:
        The SVG.

    Raises:
        ValueError: no cells, labels of another number than rows and columns, or too many columns.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape != (len(rows), len(columns)) or not array.size:
        raise ValueError(
            f"values must be [rows, columns] = [{len(rows)}, {len(columns)}] with at least one cell; "
            f"received {list(array.shape)}"
        )
    if len(columns) > _MAX_COLUMNS:
        raise ValueError(
            f"a heat map has at most {_MAX_COLUMNS} columns, so that its numbers can be read; received {len(columns)}: "
            "merge some, or leave them out"
        )
    finite = np.isfinite(array)
    largest = float(np.abs(array[finite]).max(initial=0.0)) or 1.0
    colours_RC3 = np.full((*array.shape, 3), 0.93)
    for sign, colour in ((1, _COLOURS[0]), (-1, _COLOURS[1])):
        chosen = finite & (array * sign >= 0)
        depth = np.abs(array[chosen])[:, None] / largest
        colours_RC3[chosen] = 1 - depth * (1 - np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]))
    # Weights of the eye for red, green and blue: dark cells have white numbers.
    dark = colours_RC3 @ np.array([0.2126, 0.7152, 0.0722]) < 0.55
    how = cell if callable(cell) else lambda value: format(value, cell).replace("-", "\N{MINUS SIGN}")
    texts = [[how(float(v)) if ok else "\N{EN DASH}" for v, ok in zip(*row)] for row in zip(array, finite)]

    matplotlib = require("matplotlib", "report")
    figure_module = require("matplotlib.figure", "report")
    patches = require("matplotlib.patches", "report")
    row_labels = [textwrap.fill(label, 16) for label in rows]
    left = 0.3 + 0.095 * max(len(line) for label in row_labels for line in label.split("\n")) + 0.25 * bool(y_label)
    side = min((_WIDTH - left) / len(columns), 1.2)  # inches
    height = max(0.34, min(side, 0.5), 0.04 + 0.18 * max(label.count("\n") + 1 for label in row_labels))
    width = max(left + side * len(columns), 2.8)  # a few columns do not become wide slabs
    column_labels = [textwrap.fill(label, 16) for label in columns]
    longest = max(len(line) for label in column_labels for line in label.split("\n"))
    lines = max(label.count("\n") + 1 for label in column_labels)
    slanted = 0.095 * longest > 0.95 * side
    below = (0.2 * lines + 0.07 * longest if slanted else 0.12 + 0.18 * lines) + 0.3 * bool(x_label) + 0.3 * bool(title)
    size = min(10.5, 72 * 0.92 * side / (0.62 * max(len(text) for row in texts for text in row)))
    with matplotlib.rc_context():
        _configure(matplotlib)
        figure = figure_module.Figure(figsize=(width, height * len(rows) + below + 0.1), layout="constrained")
        axes = figure.subplots()
        for i, row in enumerate(texts):
            for j, text in enumerate(row):
                axes.add_patch(patches.Rectangle((j, i), 1, 1, facecolor=colours_RC3[i, j], edgecolor=_GRID))
                colour = "white" if dark[i, j] else _INK
                axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=colour, fontsize=size)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        tilt = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        axes.set_xticks(np.arange(len(columns)) + 0.5, column_labels, **tilt)
        axes.set_yticks(np.arange(len(rows)) + 0.5, row_labels)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(title, loc="left")
        return _svg(figure)


def _panels(
    panels: Mapping[str, Sequence[Series]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    log_x: bool,
    log_y: bool,
    bands: bool,
    columns: int,
) -> str:
    matplotlib = require("matplotlib", "report")
    figure_module = require("matplotlib.figure", "report")
    everything = [one for series in panels.values() for one in series]
    if not everything:
        raise ValueError("there is no series to draw")
    labels = list(dict.fromkeys(one.label for one in everything))
    groups = list(dict.fromkeys(one.group for one in everything))
    style_of = {one.label: _STYLES[groups.index(one.group) % len(_STYLES)] for one in everything}
    if len({(one.label, one.group) for one in everything}) == len(labels) == len(groups):
        legend_groups: list[str] = []  # each label is a group of its own: one entry shows colour and style
    else:
        legend_groups, style_of = (groups if len(groups) > 1 else []), {}
    lowest, highest, clipped = _log_range(everything) if log_y else (None, None, False)
    columns = min(columns, len(panels))
    num_rows = -(-len(panels) // columns)
    # A legend column is as wide as its longest label; a letter takes about 0.085 inch, the line and gaps 0.55.
    longest = max(len(text) for text in (*labels, *legend_groups))
    legend_columns = max(1, min(4, int(_WIDTH / (0.55 + 0.085 * longest))))
    legend_rows = -(-len(labels) // legend_columns) + -(-len(legend_groups) // legend_columns)
    panel_height = 3.1 if columns == 1 else 2.2

    with matplotlib.rc_context():
        _configure(matplotlib)
        height = panel_height * num_rows + 0.22 * legend_rows + 0.4 + 0.3 * bool(title)
        figure = figure_module.Figure(figsize=(_WIDTH, height), layout="constrained")
        grid = figure.subplots(num_rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (name, series) in zip(grid.flat, panels.items()):
            for one in series:
                index = labels.index(one.label)
                _draw(axes, one, index, _STYLES[groups.index(one.group) % len(_STYLES)], lowest, bands)
            axes.set_title(name, loc="left" if len(panels) > 1 else "center")
            axes.grid(color=_GRID, linewidth=0.6)
            axes.margins(x=0.02)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        if lowest is not None and highest is not None:
            _log_axis(grid[0, 0], lowest, highest, clipped)
            if clipped:
                y_label += f"\n(below {_power(math.log10(lowest))} drawn as 0)"
        if log_x:
            _log_x_axis(grid[0, 0], everything, at_most=8 if columns == 1 else 4)
        elif all(np.issubdtype(np.asarray(one.x).dtype, np.integer) for one in everything):
            ticker = require("matplotlib.ticker", "report")
            grid[0, 0].xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
        for row in grid:
            row[0].set_ylabel(y_label)
        for column in range(columns):  # the last panel of a column shows the x axis
            axes = grid[(len(panels) - 1 - column) // columns, column]
            axes.set_xlabel(x_label)
            axes.tick_params(labelbottom=True)
        if title:
            figure.suptitle(title, fontsize=11, fontweight="bold")
        _legend(figure, labels, legend_groups, style_of, legend_columns)
        return _svg(figure)


def _draw(axes: Any, series: Series, index: int, style: Any, floor: float | None, bands: bool) -> None:
    x, y = series.arrays()
    mean, error = mean_and_standard_error(y)
    low, high = mean - error, mean + error
    if floor is not None:
        y, mean, low, high = (np.maximum(values, floor) for values in (y, mean, low, high))  # NaN stays NaN
    colour = _COLOURS[index % len(_COLOURS)]
    marker = "" if len(x) > 1 else "o"
    if 1 < len(y) <= _FEW_SEEDS:
        for seed in y:
            axes.plot(*_finite(x, seed), color=colour, linestyle=style, linewidth=0.6, alpha=0.45, marker=marker)
    if bands and len(y) > 1:
        drawn = np.isfinite(low)
        axes.fill_between(x, low, high, where=drawn, color=colour, alpha=0.16, linewidth=0)
    axes.plot(
        *_finite(x, mean), color=colour, linestyle=style, linewidth=1.8, marker=marker or _marker(index), **_EVERY
    )


_EVERY = {"markersize": 4.5, "markevery": 0.2}


def _marker(index: int) -> str:
    """Colours repeat after eight labels; a marker then tells them apart."""
    return ("", "o", "s", "^", "v")[index // len(_COLOURS) % 5]


def _finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = np.isfinite(x) & np.isfinite(y)
    return x[keep], y[keep]


def _log_range(series: Iterable[Series]) -> tuple[float, float, bool]:
    """The lowest and highest value of a logarithmic axis, and whether values below the lowest are drawn on it.

    They are if there are zeros, or values more than 18 decades below the highest, which only rounding can make.
    """
    values = np.concatenate([one.arrays()[1].ravel() for one in series])
    values = values[np.isfinite(values)]
    if (values < 0).any():
        raise ValueError(f"a logarithmic axis has no place for negative values; the smallest is {values.min():g}")
    positive = values[values > 0]
    if len(positive) == 0:
        return 1e-17, 1.0, True
    highest = positive.max()
    lowest = max(positive.min(), highest * 1e-18)
    if lowest <= values.min():
        return lowest, highest, False
    return 10.0 ** (math.floor(math.log10(lowest)) - 1), highest, True


def _log_axis(axes: Any, lowest: float, highest: float, clipped: bool) -> None:
    ticker = require("matplotlib.ticker", "report")
    axes.set_yscale("log")
    low, high = math.log10(lowest), math.log10(highest)
    margin = 0.05 * (high - low or 1)
    axes.set_ylim(10 ** (low - margin), 10 ** (high + margin))
    if high - low < 0.3:  # less than a factor of two: the digits of a linear axis say more
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6))
        axes.yaxis.set_major_formatter(ticker.ScalarFormatter(useOffset=False))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        return
    # Whole powers, at most eight and counted from the top; within two decades other digits as well.
    top, step = math.floor(high), max(1, math.ceil((high - low) / 7))
    if high - low > 2:
        ticks = {10.0**power: _power(power) for power in range(top, math.ceil(low) - 1, -step)}
    else:
        digits = (1, 2, 5) if high - low > 0.9 else (1, 1.5, 2, 3, 4, 5, 6, 8)
        values = (digit * 10.0**power for power in range(math.floor(low), top + 1) for digit in digits)
        ticks = {value: f"{value:.3g}" for value in values if low - margin <= math.log10(value) <= high + margin}
    if clipped:
        ticks = {lowest: "0"} | {value: text for value, text in ticks.items() if value > 5 * lowest}
    axes.yaxis.set_major_locator(ticker.FixedLocator(list(ticks)))
    axes.yaxis.set_major_formatter(ticker.FixedFormatter(list(ticks.values())))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _log_x_axis(axes: Any, series: Iterable[Series], at_most: int) -> None:
    ticker = require("matplotlib.ticker", "report")
    values = np.unique(np.concatenate([one.arrays()[0] for one in series]))
    if values[0] <= 0:
        raise ValueError(f"a logarithmic x axis has no place for {values[0]:g}: its values must be positive")
    axes.set_xscale("log")
    ticks = values[:: -(-len(values) // at_most)]
    axes.xaxis.set_major_locator(ticker.FixedLocator(ticks))
    axes.xaxis.set_major_formatter(ticker.FixedFormatter([f"{value:g}" for value in ticks]))
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def _power(exponent: float) -> str:
    return "10" + str(round(exponent)).translate(_SUPERSCRIPTS)


def _legend(
    figure: Any, labels: Sequence[str], groups: Sequence[str], style_of: Mapping[str, Any], columns: int
) -> None:
    line = require("matplotlib.lines", "report").Line2D
    entries = [
        line(
            [],
            [],
            color=_COLOURS[i % len(_COLOURS)],
            linestyle=style_of.get(label, "-"),
            linewidth=2.2,
            marker=_marker(i),
            markersize=4.5,
            label=label,
        )
        for i, label in enumerate(labels)
        if label or len(labels) > 1
    ]
    columns = min(columns, max(len(entries), len(groups)))
    space = line([], [], alpha=0, label=" ")
    rows = [entries[start : start + columns] for start in range(0, len(entries), columns)]
    if groups:
        styles = [
            line([], [], color=_MUTED, linewidth=1.8, linestyle=_STYLES[i % len(_STYLES)], label=group or "all")
            for i, group in enumerate(groups)
        ]
        rows += [styles[start : start + columns] for start in range(0, len(styles), columns)]
    if not rows:
        return
    # matplotlib fills a legend by columns; we want rows, with the groups on rows of their own.
    padded = [row + [space] * (columns - len(row)) for row in rows]
    handles = [row[column] for column in range(columns) for row in padded]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=2.4)


def _configure(matplotlib: Any) -> None:
    matplotlib.rcdefaults()  # a user's own settings must not change the report
    matplotlib.rcParams.update(_RC)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    nothing: dict[str, None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # no XML declaration, no DOCTYPE: the SVG stands inside HTML
    # A hundredth of a point is enough for the eye, and halves the file.
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    return text.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif").strip() + "\n"
