"""The page of ``erlangen merge``."""

from pathlib import Path

import numpy as np

from erlangen import report
from erlangen.interop.merging import LossPath, MergeRecord

from ._gauge_page import MAX_HEADS, all_heads, matched_heads, sentences

_NAMES = {
    "none": "stored numbers",
    "permutation": "permutations",
    "orthogonal": "rotations",
    "gauge": "up to gauge",
}


def _cosines(record: MergeRecord) -> list[tuple[float, float]]:
    """Of each layer, the mean similarity of heads with those at the same place, and with those they were matched with.

    Similarities are of the common frame: before it was found, those of one place may have been still less alike.
    """
    found = []
    for heads, similarity in zip(record.heads, record.head_similarity):
        places = range(len(heads))
        found.append((float(similarity.diagonal().mean()), float(similarity[list(places), heads].mean())))
    return found


def layer_rows(record: MergeRecord) -> tuple[tuple[str, ...], list[tuple]]:
    """Headings, and a row a layer."""
    columns = ("Layer", "Alike in place", "Alike matched", "Heads moved", "Neurons moved")
    rows = zip(_cosines(record), record.heads_moved, record.neurons_moved)
    found = [(str(number), *alike, heads, neurons) for number, (alike, heads, neurons) in enumerate(rows)]
    if any(experts is not None for experts in record.experts):
        columns = (*columns, "Experts moved")
        found = [(*row, experts) for row, experts in zip(found, record.experts_moved)]
    return columns, found


def loss_rows(path: LossPath) -> tuple[tuple[str, ...], list[tuple]]:
    """Headings, and a row a point of the way; the last is how far the loss rises at most over the straight line."""
    columns = ("Weight of the second", *(_NAMES[arm] for arm in path.losses))
    rows = [(f"{weight:.3g}", *values) for weight, *values in zip(path.weights, *path.losses.values())]
    return columns, [*rows, ("rise over the line", *map(path.barrier, path.losses))]


def merge_summary(first: str, second: str, output: Path, record: MergeRecord) -> list[str]:
    """The answer in a few sentences."""
    if record.weight == 1:
        way = {
            "none": "as it is stored",
            "permutation": f"its heads and neurons in the order of `{first}`",
            "orthogonal": f"turned into the frame of `{first}`",
            "gauge": f"in the gauge of `{first}`",
        }[record.using]
        lines = [f"`{output}` has `{second}` ({record.kind}), {way}."]
    else:
        way = {
            "none": "as they are stored",
            "permutation": f"with the heads and neurons of `{second}` in the order of `{first}`",
            "orthogonal": f"with `{second}` turned into the frame of `{first}`",
            "gauge": f"in the gauge of `{first}`",
        }[record.using]
        lines = [
            f"`{output}` has the average of `{first}` and `{second}` ({record.kind}), {way}, with weight "
            f"{record.weight:.3g} of the second."
        ]
    before, after = record.distance_before, record.distance_after
    lines.append(
        f"Their stored numbers are {before:.3g} apart"
        + (f", and {after:.3g} after `{second}` was moved" if after is not None else "")
        + " (0 is equal, 1 unrelated)."
    )
    moved, heads = sum(record.heads_moved), sum(map(len, record.heads))
    neurons = [number for number in record.neurons_moved if number is not None]
    experts = [number for number in record.experts_moved if number is not None]
    if record.using != "none":
        frame = "" if record.frame == "same" else f" The residual stream was {record.frame} first."
        mixtures = f", {sum(experts):,} experts" if experts else ""
        lines.append(
            f"{moved:,} of {heads:,} heads{mixtures} and {sum(neurons):,} hidden neurons of `{second}` stand at "
            f"another place now.{frame}"
        )
    if record.output_difference is None:
        lines.append(f"The outputs of the moved model were not compared: {record.checked}.")
    else:
        lines.append(
            f"Moving it changed no output by more than {record.output_difference:.2g}, where their size is "
            f"{record.output_scale:.3g} (float64; {record.checked})."
        )
    if record.path is not None:
        barriers = record.barriers()
        lines.append(
            f"Between the two models the loss on the text rises over the straight line by {barriers['none']:.3g} nats "
            "at most when stored numbers are averaged"
            + (f", by {barriers[record.using]:.3g} nats in this merge." if record.using != "none" else ".")
        )
    return lines


def _loss_figure(record: MergeRecord, path: LossPath) -> report.Figure:
    weights = np.array(path.weights)
    series = [report.Series(_NAMES[arm], weights, np.array(values)) for arm, values in path.losses.items()]
    ends = next(iter(path.losses.values()))
    series.append(report.Series("straight line", weights, (1 - weights) * ends[0] + weights * ends[-1]))
    return report.Figure(
        report.curves(series, x_label="weight of the second model", y_label="loss, nats per token", bands=False),
        f"Loss on the text between the two models; the merge has weight {record.weight:.3g}.",
        "Curves over the weight of the second model, that meet at both ends.",
    )


def _head_figures(record: MergeRecord) -> list[str | report.Figure | report.Table]:
    matched = [
        similarity[list(range(len(heads))), heads] for heads, similarity in zip(record.heads, record.head_similarity)
    ]
    body: list[str | report.Figure | report.Table] = [
        "A head counts through two products, of queries with keys and of values with outputs. Below is the cosine of "
        "those of the first model with those of the second, in one frame: 1 is the same up to size.",
        matched_heads(matched, "head of the first model"),
    ]
    layer = most_mixed(record)
    if len(record.heads[layer]) <= MAX_HEADS:
        which = f"Layer {layer}"
        if record.heads_moved[layer]:
            which += ", where most heads stood at another place"
        body.append(
            all_heads(
                record.head_similarity[layer],
                f"{which}: every head of the first model with every head of the second.",
            )
        )
    return body


def most_mixed(record: MergeRecord) -> int:
    """The layer with the most heads moved."""
    moved = record.heads_moved
    return moved.index(max(moved))


def _matching(record: MergeRecord) -> report.Table:
    columns, rows = layer_rows(record)
    return report.Table(
        columns, rows, "Heads and hidden neurons of the second model, matched with those of the first.",
        "Alike: mean cosine of the heads of a layer, with the head that stood at the same place and with the one that "
        "stands there now. Moved: matched with one at another place.",
        dict.fromkeys(columns[1:3], ".3f"),
    )  # fmt: skip


def merge_page(first: str, second: str, output: Path, record: MergeRecord) -> str:
    """The HTML of a merge."""
    sections = []
    if record.path is not None:
        columns, rows = loss_rows(record.path)
        sections.append(report.Section("The way between", [
            f"Mean cross-entropy of the next token over {record.path.num_tokens:,} tokens of the text. The ends are "
            "the two models themselves; what lies between is merged, once with the numbers as they are stored"
            + (", and once as this merge was made." if record.using != "none" else "."),
            _loss_figure(record, record.path),
            report.Table(
                columns, rows, "Loss between the two models, in nats per token.",
                "Rise over the line: the most by which the loss exceeds the straight line between its ends.",
                dict.fromkeys(columns[1:], ".4f"), emphasised=[len(rows) - 1],
            ),
        ]))  # fmt: skip
    sections.append(report.Section("What was matched", [*_head_figures(record), _matching(record)]))
    if len(record.similarity) > 1:
        rounds = np.arange(len(record.similarity))
        svg = report.curves(
            [report.Series("similarity of the models", rounds, record.similarity)],
            x_label="round of the search",
            y_label="similarity",
        )
        sections.append(report.Section("The search", [
            "Heads, neurons and the frame are found in turn, each the best for the others, until nothing improves.",
            report.Figure(svg, "Similarity of the two models after every round.", "A curve that never falls."),
        ]))  # fmt: skip
    sections.append(report.Section("What was left", sentences(record.notes, "Nothing: all of it was matched.")))
    averaged = sentences([f"`{name}`" for name in record.averaged], "")
    if record.averaged:
        sections.append(report.Section("Averaged as stored", [
            "These tensors belong to no head, neuron or norm that is known here.", *averaged,
        ]))  # fmt: skip
    files = f"`{output}` has the weights with everything that was beside those of `{first}`, and `merge.json`."
    if record.weight == 1:
        files += (
            " `gauge.json` and `gauge.safetensors` hold the transforms: with them an adapter of the second model "
            "follows (`Certificate.apply_to`)."
        )
    sections.append(report.Section("The files", [files]))
    return report.page(f"{first} and {second}, merged", merge_summary(first, second, output, record), sections)
