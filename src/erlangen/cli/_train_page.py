"""The page of ``erlangen train``."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from erlangen import lm, report
from erlangen.lm.settings import to_dict

NAME = "report.html"

_POINTS = 300  # of a curve; a longer one is drawn as means of so many pieces
_ROWS = 12  # of the table of validations
_MAX_LAYERS = 40  # of the table of layers
_SECTORS = {
    "qk": "queries and keys", "vo": "values and outputs",
    "qk_affine": "queries and keys, with the mean bias", "vo_affine": "values and outputs, with the mean bias",
}  # fmt: skip
_REDUCED = {
    "none": "",
    "horizontal": ", its steps without their part in gauge directions",
    "dressed": ", its heads brought to balanced form now and then",
    "chart": ", its heads held in a chart",
    "invariant": ", its heads trained under the invariant metric",
}

Records = Sequence[Mapping[str, Any]]


def write_train_page(result: lm.TrainResult, config: lm.TrainConfig) -> Path:
    """Write ``report.html`` into the folder of a run, aside and then renamed.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    text = train_page(result.folder.name, config, result.records)
    path, aside = result.folder / NAME, result.folder / f".{NAME}.{os.getpid()}.tmp"
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def train_page(name: str, config: lm.TrainConfig, records: Records) -> str:
    """The HTML of a run.

    Args:
        name: of the run.
        config: of the run.
        records: its log, with at least one validation.
    """
    validations = [record for record in records if "validation_loss" in record]
    gauged = [record for record in validations if "gauge" in record]
    charged = [record for record in validations if "charges" in record]
    sections = [report.Section("Loss", _loss(records, validations, config))]
    if gauged:
        sections.append(report.Section("Gauge directions", _gauge(gauged, config)))
        sections.append(report.Section("Layer by layer", [_layers(gauged[-1])]))
    if charged:
        sections.append(report.Section("Noether charges", _charges(charged)))
    sections.append(report.Section("The run", [_settings(config)]))
    return report.page(f"Training run {name}", _summary(config, records, validations), sections)


# --- the answer -------------------------------------------------------------------------------------------------------


def _summary(config: lm.TrainConfig, records: Records, validations: Records) -> list[str]:
    last, first = validations[-1], validations[0]
    error = last["validation_standard_error"]
    spread = "" if error is None else f" ± {error:.4f}"
    broken = ", the symmetry of its heads broken" if config.breaking.enabled else ""
    steps = sum("loss" in record for record in records)
    lines = [
        f"A model trained by `{config.optimizer.name}`{broken}{_REDUCED[config.reduction.kind]}: {steps:,} steps of "
        f"{config.batch_size * config.model.context_length:,} tokens. Its loss on {last['validation_windows']:,} "
        f"windows that it did not see is {last['validation_loss']:.4f}{spread} nats a token, from "
        f"{first['validation_loss']:.4f} at step {first['step']}."
    ]
    if "gauge" in last:
        found = last["gauge"]
        what = "in which its function would not change without the biases" if config.breaking.enabled else (
            "in which its function does not change"
        )  # fmt: skip
        lines.append(
            f"Of the last step, {per_cent(found['vertical_share'])} of the squared size on heads went in directions "
            f"{what}. Since the start, the products of the heads have moved by {per_cent(found['orbit_distance'])} of "
            f"their size, and the numbers that are stored by {per_cent(found['stored_distance'])}."
        )
    return lines


def per_cent(share: float) -> str:
    """A share in words: two digits, and nothing below a thousandth of a per cent."""
    return "under 0.001 %" if 0 < share < 1e-5 else f"{100 * share:.2g} %"


# --- figures ----------------------------------------------------------------------------------------------------------


def _loss(records: Records, validations: Records, config: lm.TrainConfig) -> list[str | report.Figure | report.Table]:
    training = [record for record in records if "loss" in record]
    series = []
    if len(training) > 1:
        x = np.array([record["step"] for record in training], dtype=np.float64)
        y = np.array([record["loss"] for record in training], dtype=np.float64)
        pieces = min(_POINTS, len(x))
        means = [np.array([piece.mean() for piece in np.array_split(values, pieces)]) for values in (x, y)]
        series.append(report.Series("training", means[0], means[1]))
    if len(validations) > 1:
        series.append(report.Series("validation", *_columns(validations, lambda record: record["validation_loss"])))
    body: list[str | report.Figure | report.Table] = []
    if config.evaluation == "next":
        body.append(
            "Each validation is on the next windows of the held-out text, so that its loss is also that of another "
            "text: the lowest one names an easy text as much as a good step."
        )
    if series:
        thinned = f" Each point of the training loss is a mean over {len(training) / _POINTS:.0f} or so steps." * (
            len(training) > _POINTS
        )
        body.append(report.Figure(
            report.curves(series, x_label="step", y_label="nats a token"),
            f"Loss on the batch of each step, and on the validation windows.{thinned}",
            "Curves of the training and the validation loss over the steps.",
        ))  # fmt: skip
    shown = _thin(validations)
    rows = [
        (str(r["step"]), r["validation_loss"], r["validation_standard_error"], _part(r, "vertical_share"),
         _part(r, "charge_drift"), _part(r, "orbit_distance"))
        for r in shown
    ]  # fmt: skip
    columns = ("Step", "Validation loss", "Standard error", "Along gauge, %", "Charge drift, %", "Products moved, %")
    kept = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    note = "" if len(shown) == len(validations) else (
        f"{len(shown)} of {len(validations)} validations; all are in `log.jsonl`."
    )  # fmt: skip
    table = report.Table(
        [columns[i] for i in kept], [[row[i] for i in kept] for row in rows], "The validations.", note,
        {columns[i]: ".4f" if i in (1, 2) else ".2g" for i in kept[1:]},
    )  # fmt: skip
    return [*body, table]


def _gauge(gauged: Records, config: lm.TrainConfig) -> list[str | report.Figure | report.Table]:
    body: list[str | report.Figure | report.Table] = []
    if config.model.qk_norm:
        body.append(
            "Queries and keys are normalised, which leaves them no linear gauge: only values and outputs count."
        )
    if config.breaking.enabled:
        body.append(
            "The symmetry is broken: the directions are those in which the function would not change without the "
            "unlearned biases."
        )
    if config.reduction.kind == "dressed":
        body.append(
            "Steps are measured before they are dressed: they show what the optimiser does, and the drift what the "
            "last dressing left."
        )
    if config.reduction.kind == "invariant":
        body.append(
            "Shares are of the Frobenius metric, to compare runs with each other. The steps of this run have no part "
            "along the gauge in the invariant metric, and one in this."
        )
    sectors = [sector for sector in _SECTORS if sector in next(iter(gauged[-1]["gauge"]["layers"].values()))]
    if len(gauged) < 2:
        return [*body, "There was one validation, which is in the table above."]

    def series(name: str, group: str = "") -> list[report.Series]:
        found = []
        for sector in sectors:
            steps, values = _columns(gauged, lambda r, s=sector: _mean(r["gauge"]["layers"], s, name))
            if name != "vertical_share":  # nothing has moved yet at step 0
                steps, values = np.concatenate([[0.0], steps]), np.concatenate([[0.0], values])
            found.append(report.Series(_SECTORS[sector], steps, values, group))
        return found

    body.append(report.Figure(
        report.curves(series("vertical_share"), x_label="step", y_label="share of the step", log_y=True),
        "Share of the squared size of a step that lies along the gauge orbit: mean over the heads of all layers, "
        "at the steps before a validation. Plain gradients have none: what they show is rounding.",
        "Curves of the share over the steps, one for queries and keys and one for values and outputs.",
    ))  # fmt: skip
    body.append(report.Figure(
        report.curves(series("charge_drift"), x_label="step", y_label="relative to the start"),
        "Drift of Q = AAᵀ − BBᵀ of a head since the start, over |A|² + |B|² at the start: mean over heads. Gradient "
        "flow keeps Q where it was.",
        "Curves of the drift over the steps, by sector.",
    ))  # fmt: skip
    body.append(report.Figure(
        report.curves(
            [*series("orbit_distance", "products"), *series("stored_distance", "as stored")], x_label="step",
            y_label="relative distance",
        ),
        "Distance from the start: of the products AᵀB, which no gauge changes, and of the numbers as they are stored; "
        "|x − x₀| over √(|x|² + |x₀|²), mean over heads.",
        "Curves of both distances over the steps, by sector.",
    ))  # fmt: skip
    return body


def _charges(charged: Records) -> list[str | report.Figure | report.Table]:
    sectors = [sector for sector in _SECTORS if sector in next(iter(charged[-1]["charges"].values()))]
    if len(charged) < 2:
        rows = [(_SECTORS[sector], _mean(charged[-1]["charges"], sector)) for sector in sectors]
        return [report.Table(("Of", "Charge"), rows, "Angular momentum of the heads, relative, at the one validation.")]
    series = [
        report.Series(_SECTORS[s], *_columns(charged, lambda r, s=s: _mean(r["charges"], s))) for s in sectors
    ]  # fmt: skip
    return [report.Figure(
        report.curves(series, x_label="step", y_label="relative charge", log_y=True),
        "Angular momentum of the heads in the optimiser's momentum, over the largest that it can be: mean over heads. "
        "Optimisers whose motion does not depend on rotations keep it at zero.",
        "Curves of the charge over the steps, by sector.",
    )]  # fmt: skip


# --- tables -----------------------------------------------------------------------------------------------------------


def _layers(record: Mapping[str, Any]) -> report.Table:
    quantities = {
        "vertical_share": "along gauge, %", "charge_drift": "drift, %", "orbit_distance": "products moved, %",
    }  # fmt: skip
    layers = record["gauge"]["layers"]
    sectors = [sector for sector in ("qk", "vo") if sector in next(iter(layers.values()))]
    columns = ["Layer", *(f"{sector.upper()} {what}" for sector in sectors for what in quantities.values())]
    rows = [
        (number, *(_mean({number: found}, s, name, 100) for s in sectors for name in quantities))
        for number, found in list(layers.items())[:_MAX_LAYERS]
    ]
    left = len(layers) - _MAX_LAYERS
    return report.Table(
        columns, rows, f"Means over the heads of each layer, at step {record['step']}.",
        "QK: queries with keys. VO: values with outputs."
        + (f" And {left} more layers: they are in `log.jsonl`." if left > 0 else ""),
        dict.fromkeys(columns[1:], ".2g"),
    )  # fmt: skip


def _settings(config: lm.TrainConfig) -> report.Table:
    """Every setting that is not None, nested ones with a point in their name."""
    rows: list[tuple[str, str]] = []
    for name, value in to_dict(config).items():
        found = {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
        rows += [(f"`{key}`", str(inner)) for key, inner in found.items() if inner is not None]
    return report.Table(("Setting", "Value"), rows, "What the run was made of; the same is in `config.json`.")


# --- reading the log --------------------------------------------------------------------------------------------------


def _mean(layers: Mapping[str, Any], sector: str, name: str | None = None, factor: float = 1.0) -> float:
    """The mean of a sector over the heads of all layers; of one quantity, where there are several."""
    parts = [found[sector] if name is None else found[sector][name] for found in layers.values()]
    values = [value for heads in parts for value in heads]
    return factor * sum(values) / len(values)


def _part(record: Mapping[str, Any], name: str) -> float | None:
    """A quantity of the whole model, in per cent."""
    value = record.get("gauge", {}).get(name)
    return None if value is None else 100 * value


def _columns(records: Records, value: Callable[[Mapping[str, Any]], float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and a value of each record."""
    return np.array([float(record["step"]) for record in records]), np.array([value(record) for record in records])


def _thin(records: Records) -> list[Mapping[str, Any]]:
    """At most so many of them, evenly, the first and the last included."""
    if len(records) <= _ROWS:
        return list(records)
    return [records[math.floor(i * (len(records) - 1) / (_ROWS - 1))] for i in range(_ROWS)]
