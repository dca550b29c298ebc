"""The figures of ``erlangen explain`` that `erlangen.report` has not: many small maps, and classes against a null."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from erlangen._extras import require
from erlangen.report import figures

_WIDTH = 5.4  # inches, as of the other figures
_GREY, _BLUE, _ORANGE, _INK = "#cfd4da", "#0072b2", "#d55e00", "#222222"


def head_maps(values_CLH: Any, names: Sequence[str], marked_CLH: Any, *, label: str) -> str:
    """Layers × heads, one map a class, all on one scale: white at zero, blue above, orange below.

    Args:
        values_CLH: what is coloured.
        names: of the classes.
        marked_CLH: bool, cells that get a dot.
        label: of the scale.
    """
    matplotlib = require("matplotlib", "report")
    figure_module = require("matplotlib.figure", "report")
    colours = require("matplotlib.colors", "report")
    values, marked = np.asarray(values_CLH, dtype=np.float64), np.asarray(marked_CLH)
    number, layers, heads = values.shape
    columns = min(3, number)
    rows = -(-number // columns)
    limit = float(np.abs(values).max()) or 1.0
    diverging = colours.LinearSegmentedColormap.from_list("effect", [_ORANGE, "#ffffff", _BLUE])
    with matplotlib.rc_context():
        figures._configure(matplotlib)
        height = min(2.6, max(1.0, 1.5 * layers / heads)) + 0.45
        figure = figure_module.Figure(figsize=(_WIDTH, 0.75 + height * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[number:]:
            axes.set_visible(False)
        image = None
        for which, (axes, name) in enumerate(zip(grid.flat, names)):
            image = axes.pcolormesh(
                np.arange(heads + 1) - 0.5, np.arange(layers + 1) - 0.5, values[which],
                cmap=diverging, vmin=-limit, vmax=limit, edgecolors="#dddddd", linewidth=0.3,
            )  # fmt: skip
            y, x = np.nonzero(marked[which])
            axes.plot(x, y, "o", color=_INK, markersize=2.6, markeredgewidth=0)
            axes.set_ylim(layers - 0.5, -0.5)
            axes.set_title(name, fontweight="normal")
            axes.xaxis.set_major_locator(require("matplotlib.ticker", "report").MaxNLocator(6, integer=True))
            axes.yaxis.set_major_locator(require("matplotlib.ticker", "report").MaxNLocator(6, integer=True))
            for spine in axes.spines.values():
                spine.set_visible(False)
            # With the last row not full, the panel above the gap is the lowest of its column.
            if which + columns >= number:
                axes.set_xlabel("head")
                axes.tick_params(labelbottom=True)
            if which % columns == 0:
                axes.set_ylabel("layer")
        figure.colorbar(image, ax=grid, orientation="horizontal", shrink=0.7, aspect=30, pad=0.02, label=label)
        return figures._svg(figure)


@dataclass(frozen=True)
class ClassRow:
    """A class in one head: quantiles 5, 25, 75, 95 % and mean of its tokens, and where random directions put the mean
    in 95 of 100 cases."""

    name: str
    quantiles: Sequence[float]
    mean: float
    null: float
    stands_out: bool


def class_rows(rows: Sequence[ClassRow], *, x_label: str) -> str:
    """Distributions of classes, a row each, with the null of their means in grey."""
    matplotlib = require("matplotlib", "report")
    figure_module = require("matplotlib.figure", "report")
    with matplotlib.rc_context():
        figures._configure(matplotlib)
        figure = figure_module.Figure(figsize=(_WIDTH, 1.35 + 0.34 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=_INK, linewidth=0.8)
        for place, row in enumerate(rows):
            colour = _BLUE if row.stands_out and row.mean > 0 else _ORANGE if row.stands_out else "#7a828b"
            axes.fill_between([-row.null, row.null], place - 0.36, place + 0.36, color=_GREY, linewidth=0)
            low, first, third, high = row.quantiles
            axes.plot([low, high], [place, place], color=colour, linewidth=1)
            axes.plot([first, third], [place, place], color=colour, linewidth=3.5, solid_capstyle="butt")
            axes.plot([row.mean], [place], "D", color=colour, markersize=6, markeredgecolor="white")
        axes.set_yticks(range(len(rows)), [textwrap.fill(row.name, 18) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(x_label)
        axes.margins(x=0.03)
        axes.tick_params(axis="y", length=0)
        patch, line = require("matplotlib.patches", "report").Patch, require("matplotlib.lines", "report").Line2D
        figure.legend(
            handles=[
                line([], [], color="#7a828b", marker="D", linewidth=1, label="mean, and 90 % of tokens"),
                patch(color=_GREY, label="mean, 95 % of random directions"),
            ],
            loc="outside lower center",
            ncols=1,
        )
        return figures._svg(figure)
