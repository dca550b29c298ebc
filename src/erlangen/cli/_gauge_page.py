"""The pages of ``erlangen audit``, ``compare`` and ``canonicalize``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from erlangen import report
from erlangen.gauge import Certificate, Comparison, FlatDirections
from erlangen.gauge.flat import SECTORS

if TYPE_CHECKING:
    from .audit import Audit

MAX_HEADS = 12  # columns of a heat map
_MAX_ROWS = 40
_MAX_CURVES = 6
_MAX_LINES = 40
_ENERGY = 0.9


def _some(number: int, at_most: int) -> list[int]:
    """Numbers from 0 on, evenly spread, with the first and the last."""
    if number <= at_most:
        return list(range(number))
    return sorted({round(place) for place in np.linspace(0, number - 1, at_most)})


def spectra_figure(
    layers: Mapping[int, Tensor], what: str, x_label: str = "number of the singular value"
) -> report.Figure:
    """Spectra over their largest value, of some layers, each the mean over its heads."""
    numbers = [sorted(layers)[place] for place in _some(len(layers), _MAX_CURVES)]
    series = []
    for number in numbers:
        values = layers[number].sort(dim=1, descending=True).values.numpy()
        largest = np.maximum(values[:, :1], np.finfo(np.float64).tiny)
        series.append(report.Series(f"layer {number}", np.arange(1, values.shape[1] + 1), values / largest))
    svg = report.curves(series, x_label=x_label, y_label="share of the largest", bands=len(numbers) > 1)
    return report.Figure(
        svg,
        f"Spectra of {what}: singular values over the largest of a head, the mean of the heads of a layer.",
        "Falling curves, one a layer.",
    )


# --- audit ------------------------------------------------------------------------------------------------------------


def sector_rows(flat: FlatDirections) -> list[tuple[str, int, float]]:
    """What the symmetry is, dimensions, and per cent of the parameters; the last row is all of them."""
    rows = [(SECTORS[name], count, 100 * count / flat.parameters) for name, count in flat.sectors.items() if count]
    return [*rows, ("all", flat.total, 100 * flat.share)]


def _needed(spectrum: Tensor) -> float:
    """Mean over heads of how many singular values hold nine tenths of the energy."""
    energy = spectrum.square()
    shares = energy.cumsum(1) / energy.sum(1, keepdim=True).clamp_min(1e-300)
    return float((shares < _ENERGY).sum(1).add(1).clamp_max(spectrum.shape[1]).double().mean())


def _condition(spectrum: Tensor, rank: Tensor) -> float:
    """Of the worst head, the largest over the least singular value that is not zero."""
    last = spectrum.gather(1, (rank - 1).clamp_min(0)[:, None])[:, 0]
    return float((spectrum[:, 0] / last.clamp_min(1e-300)).where(rank > 0, spectrum[:, 0] * 0 + 1).max())


def head_rows(result: "Audit") -> tuple[tuple[str, ...], list[tuple]]:
    """Headings, and a row a layer."""
    columns = (
        "Layer", "QK imbalance", "VO imbalance", "QK condition", "VO condition", "QK 90 %", "VO 90 %", "Deficient",
        "Near equal",
    )  # fmt: skip
    rows = []
    for number, layer in enumerate(result.heads):
        imbalances = [
            None if values is None else float(values.max())
            for values in (layer.query_key_imbalance, layer.value_output_imbalance)
        ]
        deficient = (layer.rank_query_key < layer.query_key.shape[1]) | (
            layer.rank_value_output < layer.value_output.shape[1]
        )
        rows.append((
            str(number), *imbalances, _condition(layer.query_key, layer.rank_query_key),
            _condition(layer.value_output, layer.rank_value_output), _needed(layer.query_key),
            _needed(layer.value_output), int(deficient.sum()), layer.near_equal,
        ))  # fmt: skip
    return columns, rows


def audit_summary(result: "Audit") -> list[str]:
    """The answer in a few sentences."""
    flat, lines = result.flat, []
    if flat is not None:
        lines.append(
            f"`{result.name}` ({result.layout.kind}): {flat.total:,} of {flat.parameters:,} dimensions of its "
            f"parameters, {100 * flat.share:.4g} %, change nothing that it computes."
        )
    else:
        lines.append(
            f"`{result.name}` ({result.layout.kind}): redundant dimensions were not counted. {result.uncounted}."
        )
    if not result.heads:
        lines.append("There are no weights here: what the heads are like was not measured.")
        return lines
    for what, name in (("queries and keys", "query_key_imbalance"), ("values and outputs", "value_output_imbalance")):
        every = [values for layer in result.heads if (values := getattr(layer, name)) is not None]
        if every:
            middle = float(np.median(np.concatenate([values.numpy() for values in every])))
            worst = max(float(values.max()) for values in every)
            lines.append(
                f"Factors of {what} hold {middle:.3g} times the squares of the balanced gauge (median), "
                f"{worst:.3g} times in the worst head."
            )
    _, rows = head_rows(result)
    deficient = sum(row[-2] for row in rows)
    lines.append(
        f"{deficient} of {sum(len(layer.query_key) for layer in result.heads):,} key/value heads are of deficient rank."
        if deficient
        else "No head is of deficient rank."
    )
    return lines


def audit_page(result: "Audit") -> str:
    """The HTML of an audit."""
    sections = []
    if result.flat is not None:
        sections.append(report.Section("What is redundant", [
            "Moves along these directions change numbers, and no output. Counted from the config, for parameters in "
            "general position, with the epsilon of norms taken as 0.",
            report.Table(
                ("Symmetry", "Dimensions", "Of the parameters, %"), sector_rows(result.flat),
                "Redundant dimensions by symmetry.",
                formats={"Dimensions": ",d", "Of the parameters, %": ".4g"},
                emphasised=[len(sector_rows(result.flat)) - 1],
            ),
        ]))  # fmt: skip
    if result.heads:
        columns, rows = head_rows(result)
        query_key = {number: layer.query_key for number, layer in enumerate(result.heads)}
        value_output = {number: layer.value_output for number, layer in enumerate(result.heads)}
        sections.append(report.Section("Spectra", [
            "A head counts only through two products, of queries with keys and of values with outputs. Their singular "
            "values are its own: no gauge changes them, once gains of norms are folded in. Under rotary positions "
            "those of queries and keys are the sizes of the planes.",
            spectra_figure(query_key, "queries with keys"),
            spectra_figure(value_output, "values with outputs"),
        ]))  # fmt: skip
        sections.append(report.Section("The stored factors", [
            report.Table(
                columns, rows, "What the heads are like, layer by layer; of imbalance and condition, the worst head.",
                "Imbalance: half the sum of squares of both factors over the sum of singular values; 1 in the balanced "
                "gauge, where it is least, and which `erlangen canonicalize` writes. Condition: the largest singular "
                f"value over the least. 90 %: how many singular values hold {100 * _ENERGY:.0f} % of the energy, "
                "mean over heads. Deficient: heads with singular values of 0. Near equal: pairs that can hardly be "
                f"told apart in {str(result.dtype).removeprefix('torch.')}.",
                dict.fromkeys(columns[1:7], ".3g"),
            ),
        ]))  # fmt: skip
    return report.page(f"Audit of {result.name}", audit_summary(result), sections)


# --- compare ----------------------------------------------------------------------------------------------------------


def layer_rows(result: Comparison) -> tuple[tuple[str, ...], list[tuple]]:
    """Headings, and a row a layer, and one for each part beside the layers."""
    columns = ("Layer", "Query-key", "Value-output", "MLP", "Rest", "Stored numbers", "Heads moved", "Neurons moved")
    rows: list[tuple] = []
    for number, layer in enumerate(result.layers):
        parts = [part and part.distance for part in (layer.query_key, layer.value_output, layer.mlp, layer.rest)]
        rows.append((str(number), *parts, layer.naive, layer.num_heads_moved, layer.num_neurons_moved))
    return columns, rows


def compare_summary(first: str, second: str, result: Comparison) -> list[str]:
    """The answer in a few sentences."""
    naive = "" if result.naive_distance is None else f" The stored numbers are {result.naive_distance:.3g} apart."
    lines = [
        f"`{first}` and `{second}`: {result.verdict[0].lower()}{result.verdict[1:]}",
        f"Distance up to gauge {result.distance:.3g}, similarity {result.similarity:.6g} (0 and 1 are the same "
        f"function, 1 and 0 unrelated).{naive}",
    ]
    moved = sum(layer.num_heads_moved for layer in result.layers)
    heads = sum(len(layer.heads) for layer in result.layers)
    if moved:
        lines.append(f"{moved:,} of {heads:,} heads were matched with one at another place.")
    if result.frame != "same":
        lines.append(f"The residual stream of `{second}` was {result.frame} into the frame of `{first}` first.")
    return [*lines, *result.notes]


def matched_heads(layers: Sequence[Tensor], x_label: str) -> report.Figure:
    """Similarity of matched heads [H], a row a layer."""
    numbers = _some(len(layers), _MAX_ROWS)
    values = np.stack([layers[n].numpy() for n in numbers])
    columns, more = [str(head) for head in range(values.shape[1])], ""
    if values.shape[1] > MAX_HEADS:
        values = np.quantile(values, np.linspace(0, 1, 11), axis=1).T
        columns = ["least", *(f"{10 * i} %" for i in range(1, 10)), "most"]
        x_label, more = "heads, from the least similar to the most", " Deciles over the heads of a layer."
    svg = report.heat_map(
        values, [f"layer {n}" for n in numbers], columns, x_label=x_label, y_label="", cell=_similarity
    )
    return report.Figure(
        svg, f"Similarity of each head with the one it was matched with; 1 is the same.{more}", "Coloured cells."
    )


def _similarity(value: float) -> str:
    text = f"{value:.2f}"
    return {"1.00": "1", "0.00": "0", "-0.00": "0"}.get(text, text.replace("0.", ".", 1).replace("-", "\N{MINUS SIGN}"))


def all_heads(similarity: Tensor, caption: str) -> report.Figure:
    """Similarity [H, H] of all heads of two models."""
    labels = [str(head) for head in range(len(similarity))]
    svg = report.heat_map(
        similarity.numpy(), labels, labels, x_label="head of the second model", y_label="head of the first",
        cell=_similarity,
    )  # fmt: skip
    return report.Figure(svg, caption, "A matrix of coloured cells, one a pair of heads.")


def compare_page(first: str, second: str, result: Comparison) -> str:
    """The HTML of a comparison."""
    columns, rows = layer_rows(result)
    depth = np.arange(len(result.layers))
    naive = [np.nan if layer.naive is None else layer.naive for layer in result.layers]
    series = [report.Series("up to gauge", depth, [layer.distance for layer in result.layers])]
    series += [report.Series("stored numbers", depth, naive)] if np.isfinite(naive).any() else []
    others = [(name.replace("`", ""), part.distance, part.similarity) for name, part in result.embeddings.items()]
    sections = [
        report.Section("Layer by layer", [
            "A distance is `‖x − y‖ / √(‖x‖² + ‖y‖²)`: 0 for the same, 1 for unrelated. Up to gauge, x and y are "
            "products and other quantities that no symmetry of the model changes; heads and neurons are matched "
            "first, query heads within those that share a key.",
            report.Figure(
                report.curves(series, x_label="layer", y_label="distance", log_y=True),
                "Distance of the layers, up to gauge and of the stored numbers.", "Two curves over the depth.",
            ),
            report.Table(
                columns, rows, "Distances up to gauge by layer and part, and that of the stored numbers.",
                "Rest: constants, gains that no map takes in, latents. Moved: matched with one at another place.",
                dict.fromkeys(columns[1:6], ".2g"),
            ),
            report.Table(
                ("Part", "Distance", "Similarity"), others, "What stands beside the layers.",
                formats={"Distance": ".2g", "Similarity": ".6g"},
            ),
        ]),
    ]  # fmt: skip
    worst = max(
        depth.tolist(), key=lambda n: result.layers[n].query_key.distance + result.layers[n].value_output.distance
    )
    matched = [layer.head_similarity[list(range(len(layer.heads))), list(layer.heads)] for layer in result.layers]
    heads: list[str | report.Figure | report.Table] = [matched_heads(matched, "head of the first model")]
    if len(result.layers[worst].heads) <= MAX_HEADS:
        heads.append(all_heads(
            result.layers[worst].head_similarity,
            f"Layer {worst}, the one that differs most in its heads: similarity of every head with every other.",
        ))  # fmt: skip
    sections.append(report.Section("Heads", heads))
    spectra = result.layers[worst].spectra
    figures: list[str | report.Figure | report.Table] = []
    for name, what in (("query_key", "queries with keys"), ("value_output", "values with outputs")):
        a, b = spectra[name].numpy()
        x = np.arange(1, a.shape[1] + 1)
        pair = [report.Series(_model_name(first, second, 0), x, a, "first")]
        pair.append(report.Series(_model_name(first, second, 1), x, b, "second"))
        figures.append(report.Figure(
            report.curves(pair, x_label="number of the singular value", y_label="singular value"),
            f"Layer {worst}: spectra of {what} of both models, mean over heads.", "Two falling curves.",
        ))  # fmt: skip
    sections.append(report.Section("Spectra", figures))
    return report.page(f"{first} and {second}", compare_summary(first, second, result), sections)


def _model_name(first: str, second: str, which: int) -> str:
    name = (first, second)[which]
    if first == second:
        name = ("first", "second")[which]
    return name if len(name) <= 28 else name[:27] + "…"


# --- canonicalize -----------------------------------------------------------------------------------------------------


def certificate_rows(certificate: Certificate) -> tuple[tuple[str, ...], list[tuple]]:
    """Headings, and a row a dtype."""
    columns = ("Computed in", "Largest difference", "Of the size, %", "Own rounding before", "Own rounding after")
    rows = []
    for name, value in certificate.max_logit_difference.items():
        share = 100 * value / certificate.logit_scale if certificate.logit_scale else None
        own = [certificate.rounding.get(when, {}).get(name) for when in ("before", "after")]
        rows.append((name, value, share, *own))
    return columns, rows


def canonicalize_summary(name: str, output: Path, certificate: Certificate) -> list[str]:
    """The answer in a few sentences."""
    lines = [f"`{name}` ({certificate.kind}) is in canonical form in `{output}`."]
    exact = certificate.max_logit_difference.get("float64")
    if exact is None:
        return [*lines, f"Its outputs were not compared: {certificate.checked}."]
    lines.append(
        f"In float64 no output moved by more than {exact:.2g}, where their size is {certificate.logit_scale:.3g} "
        f"({certificate.checked})."
    )
    return lines


def sentences(lines: Sequence[str], none: str) -> list[str | report.Figure | report.Table]:
    """Some of the sentences, and how many more there are; or what is said where there are none."""
    if not lines:
        return [none]
    left = len(lines) - _MAX_LINES
    return [*lines[:_MAX_LINES], *([f"And {left} more: they are in the JSON."] if left > 0 else [])]


def canonicalize_page(name: str, output: Path, certificate: Certificate) -> str:
    """The HTML of a certificate."""
    columns, rows = certificate_rows(certificate)
    sections = []
    if rows:
        sections.append(report.Section("Nothing changed", [
            report.Table(
                columns, rows, "The largest difference of an output before and after.",
                "The model's own rounding is the largest error of its outputs in that dtype against float64, with the "
                "old weights and with the new ones: a difference of that size is none of the function. Weights are "
                "stored in their old dtype, so the difference in float64 holds one more rounding of them.",
                dict.fromkeys(columns[1:], ".2g"),
            ),
        ]))  # fmt: skip
    sections.append(report.Section("What was done", sentences(certificate.folded, "Nothing was folded.")))
    sections.append(report.Section("What is left open", [
        "Where singular values are equal, or heads are of deficient rank, a model a little beside this one may look "
        "otherwise in canonical form.",
        *sentences(certificate.leftover, "No head or neuron is: each has its place and its numbers."),
    ]))  # fmt: skip
    for key, what in (("query_key", "queries with keys"), ("value_output", "values with outputs")):
        layers = {number: spectra[key] for number, spectra in certificate.spectra.items() if key in spectra}
        if layers:
            sections.append(report.Section(f"Spectra of {what}", [spectra_figure(layers, what)]))
    sections.append(report.Section("The files", [
        f"`{output}` has the weights with everything that was beside them, `gauge.json` the certificate and "
        "`gauge.safetensors` the transforms: with them an adapter or the state of an optimiser follows "
        "(`Certificate.apply_to`).",
    ]))  # fmt: skip
    return report.page(f"Canonical form of {name}", canonicalize_summary(name, output, certificate), sections)
