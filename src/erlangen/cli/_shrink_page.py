"""The page of ``erlangen shrink``."""

from pathlib import Path

import numpy as np
import torch

from erlangen import report
from erlangen.gauge.shrink import Shrunk

from ._gauge_page import sentences, spectra_figure

_MAX_LAYERS = 40  # rows of the table on the page
_WHAT = {"value_output": "values with outputs", "query_key": "queries with keys"}


def size_rows(found: Shrunk) -> tuple[tuple[str, ...], list[tuple]]:
    """Headings, and a row a quantity: before, after, and per cent saved."""
    quantities = {
        "Weights": found.numbers, "Bytes": found.bytes,
        "Multiplications a token in the maps of attention": found.multiplications,
    }  # fmt: skip
    rows = [
        (name, before, after, 100 * (1 - after / before) if before else None)
        for name, (before, after) in quantities.items()
    ]
    return ("", "Before", "After", "Less, %"), rows


def layer_rows(found: Shrunk) -> tuple[tuple[str, ...], list[tuple]]:
    """Headings, and a row a layer; columns in which nothing would stand are left out."""
    columns = (
        "Layer",
        "VO block",
        "VO rounding",
        "VO kept",
        "VO error, %",
        "QK block",
        "QK rounding",
        "QK kept",
        "QK error, %",
    )
    rows = []
    for number, sectors in found.layers.items():
        row: list = [str(number)]
        for name in _WHAT:
            sector = sectors[name]
            error = 100 * max(sector.error) if sector.spectrum else None
            row += [sector.block, sector.noise if sector.block else None, sum(sector.rank), error]
        rows.append(tuple(row))
    told = [place for place in range(len(columns)) if any(row[place] is not None for row in rows)]
    return tuple(columns[place] for place in told), [tuple(row[place] for place in told) for row in rows]


def shrink_summary(name: str, output: Path, found: Shrunk) -> list[str]:
    """The answer in a few sentences."""
    (before, after), (many, fewer) = found.bytes, found.multiplications
    lines = [
        f"`{name}` ({found.kind}) is in `{output}`, with {before - after:,} of {before:,} bytes less "
        f"({100 * (1 - after / before):.3g} %), and {100 * (1 - fewer / many):.3g} % fewer multiplications in the "
        "maps of attention."
    ]
    exact = found.max_logit_difference.get("float64")
    if exact is None:
        lines.append(f"Its outputs were not compared: {found.checked}.")
    else:
        own = [found.rounding.get(when, {}).get("bfloat16") for when in ("before", "after")]
        lines.append(
            f"In float64 no output moved by more than {exact:.2g}, where their size is {found.logit_scale:.3g} "
            f"({found.checked})."
        )
        if None not in own:
            lines.append(f"Its own rounding in bfloat16 was {own[0]:.2g}, and is {own[1]:.2g}.")
    if found.loss is not None:
        lines.append(f"The loss on the text was {found.loss[0]:.4f} nats a token, and is {found.loss[1]:.4f}.")
    return [*lines, *found.notes]


def shrink_page(name: str, output: Path, found: Shrunk) -> str:
    """The HTML of what was shrunk."""
    columns, rows = size_rows(found)
    sections = [
        report.Section("What is saved", [
            report.Table(
                columns, rows, "Sizes of the checkpoint and of its arithmetic.",
                "Bytes include the indices of the inputs that the blocks use. Other arithmetic (the products of "
                "attention, feed-forward layers, logits) is as it was.",
                {"Before": ",", "After": ",", "Less, %": ".3g"},
            ),
        ]),
    ]  # fmt: skip
    if found.max_logit_difference:
        differences = [
            (dtype, value, *(found.rounding.get(when, {}).get(dtype) for when in ("before", "after")))
            for dtype, value in found.max_logit_difference.items()
        ]
        headings = ("Computed in", "Largest difference", "Own rounding before", "Own rounding after")
        sections.append(report.Section("The outputs", [
            report.Table(
                headings, differences, "The largest difference of an output before and after.",
                f"The size of the outputs is {found.logit_scale:.3g}. The model's own rounding is the largest error of "
                "its outputs in that dtype against float64, with the old weights and with the new ones.",
                dict.fromkeys(headings[1:], ".2g"),
            ),
        ]))  # fmt: skip
    columns, rows = layer_rows(found)
    left = len(rows) - _MAX_LAYERS
    layers: list[str | report.Figure | report.Table] = [
        report.Table(
            columns, rows[:_MAX_LAYERS], "The heads of each layer: VO values with outputs, QK queries with keys.",
            "Block: width of the identity block, in every head. Rounding: how much larger than in the balanced gauge "
            "it is, in the worst head. Kept: coordinates of all key/value heads. Error: what was dropped of a product, "
            "in the worst head."
            + (f" And {left} more layers: they are in the JSON." if left > 0 else ""),
            {column: ".3g" for column in columns if "%" in column or "rounding" in column},
        )
    ]  # fmt: skip
    if len(found.layers) > 1:
        depth = np.array(list(found.layers))
        series = [
            report.Series(
                what,
                depth,
                np.array([_or_nan(sectors[key].noise, sectors[key].block) for sectors in found.layers.values()]),
            )
            for key, what in _WHAT.items()
            if any(sectors[key].block for sectors in found.layers.values())
        ]
        if series:
            layers.append(report.Figure(
                report.curves(series, x_label="layer", y_label="times that of the balanced gauge"),
                "Rounding of the worst head of each layer, over that of the balanced gauge.", "Curves over the depth.",
            ))  # fmt: skip
    sections.append(report.Section("Layer by layer", layers))
    for key, what in _WHAT.items():
        spectra = {
            number: torch.tensor(sectors[key].spectrum, dtype=torch.float64)
            for number, sectors in found.layers.items()
            if sectors[key].spectrum
        }
        if spectra:
            sections.append(report.Section(f"Spectra of {what}", [spectra_figure(spectra, what)]))
    sections.append(report.Section("What was done, and what was left", sentences(found.notes, "Nothing was saved.")))
    sections.append(report.Section("The files", [
        f"`{output}` has the weights with everything that was beside them, and `shrink.json`. It loads in transformers "
        "after `from erlangen.interop import shrunk`; `config.json` says so too.",
    ]))  # fmt: skip
    return report.page(f"{name}, shrunk", shrink_summary(name, output, found)[:4], sections)


def _or_nan(value: float | None, there: int) -> float:
    return value if there and value is not None else np.nan
