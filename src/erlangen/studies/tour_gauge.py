"""The tour's fourth part: a model of part one, its weights scrambled by a move of gauge, recognised.

The model is that of part one which AdamW trained, symmetric, seed 0. A random move of every continuous symmetry and of
the order of heads and neurons (`erlangen.gauge.random_move`, matrices of condition 100) changes nearly every number and
nothing that it computes. The stored numbers and `erlangen.gauge.compare` each say how far the two are apart; so they do
of the model and its twin that another optimiser trained from the same weights, and one of another seed. Nothing here is
a study: there is one model, and no rule.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erlangen import gauge, lm, report

from ._reading import Part

CONDITION = 100.0
_TOKENS = (4, 64)  # of text, on which outputs are compared


@torch.no_grad()
def measure(runs: Mapping[str, Path], text: torch.Tensor) -> list[dict[str, Any]]:
    """Compare the first model with itself moved, with its canonical form, and with each of the others.

    Args:
        runs: folders of finished runs by what to call their models; the first is the one that is moved.
        text: tokens, int64 [B, T], to run the models on.

    Returns:
        a record a comparison: "name", "naive", "distance", "similarity", "same_function", "output_difference",
        "output_scale" and "head_similarity" [layers, heads, heads]; that of the move has "canonical_difference" and
        "moved_difference" too, the largest difference of a parameter between the two canonical forms and between the
        two models, and "redundant", the flat directions by sector.
    """
    (first, folder), *others = runs.items()
    model = lm.load(folder).double().eval()
    moved = copy.deepcopy(model)
    gauge.random_move(moved, condition=CONDITION, generator=torch.Generator().manual_seed(0))
    canonical, canonical_moved = copy.deepcopy(model), copy.deepcopy(moved)
    for one in (canonical, canonical_moved):
        gauge.canonicalize(one, check=False)
    candidates = {f"{first}, scrambled": moved, f"{first}, in its canonical form": canonical}
    candidates |= {name: lm.load(path).double().eval() for name, path in others}
    records = [_record(name, model, other, text) for name, other in candidates.items()]
    flat = gauge.flat_directions(model)
    records[0] |= {
        "moved_difference": _largest_difference(model, moved),
        "canonical_difference": _largest_difference(canonical, canonical_moved),
        "redundant": {name: count for name, count in flat.sectors.items() if count},
        "parameters": flat.parameters,
    }
    return records


def _record(name: str, model: torch.nn.Module, other: torch.nn.Module, text: torch.Tensor) -> dict[str, Any]:
    comparison = gauge.compare(model, other, inputs=text)
    return {
        "name": name,
        "naive": comparison.naive_distance,
        "distance": comparison.distance,
        "similarity": comparison.similarity,
        "same_function": comparison.same_function,
        "output_difference": comparison.output_difference,
        "output_scale": comparison.output_scale,
        "head_similarity": [layer.head_similarity.tolist() for layer in comparison.layers],
    }


def _largest_difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a.parameters(), b.parameters()))


def text_of(corpus: lm.Corpus) -> torch.Tensor:
    """The beginning of the held-out text, int64."""
    batch, length = _TOKENS
    beginning, _ = corpus.validation.split(batch * length)
    return torch.from_numpy(np.concatenate(beginning.shards).astype(np.int64)).view(batch, length)


def part(records: Sequence[Mapping[str, Any]]) -> Part:
    """Part four of the page."""
    scrambled = records[0]
    table = report.Table(
        ("Compared with", "Stored numbers", "Up to gauge", "Similarity", "Same function?", "Outputs differ by"),
        [
            (
                record["name"], record["naive"], record["distance"], record["similarity"],
                "yes" if record["same_function"] else "no", record["output_difference"],
            )
            for record in records
        ],
        "How far models are from the one that AdamW trained, seed 0: distance of the stored numbers, distance up to "
        "gauge (0 for the same function, 1 for unrelated), and the largest difference of a logit on held-out text.",
        f"The logits' root mean square is {scrambled['output_scale']:.2f}. All in float64.",
        {"Stored numbers": ".3g", "Up to gauge": ".2g", "Similarity": ".4f", "Outputs differ by": ".2g"},
    )  # fmt: skip
    total = sum(scrambled["redundant"].values())
    redundant = report.Table(
        ("Symmetry", "Dimensions"),
        [(name.replace("_", " "), count) for name, count in scrambled["redundant"].items()],
        f"Directions in which the {scrambled['parameters']:,} parameters of this model can move and change nothing: "
        f"{total:,} dimensions, {100 * total / scrambled['parameters']:.2f} %.",
        formats={"Dimensions": ",d"},
    )
    figures = []
    for record in (scrambled, records[-1]):
        layers = record["head_similarity"]
        heads = len(layers[0])
        labels = [f"{layer}.{head}" for layer in range(len(layers)) for head in range(heads)]
        values = [
            [
                layers[row // heads][row % heads][column % heads] if row // heads == column // heads else float("nan")
                for column in range(len(labels))
            ]
            for row in range(len(labels))
        ]
        figures.append(
            report.Figure(
                report.heat_map(values, labels, labels, x_label=record["name"], y_label="seed 0", cell=".2f"),
                f"Similarity of heads (layer.head) up to gauge: the model and {record['name']}. Heads of different "
                "layers are not compared.",
                f"Heat map of head similarities with {record['name']}.",
            )
        )
    sections = [
        report.Section("Part four: the same function in other numbers", [
            "Two checkpoints can be one function with different numbers: a head's queries and keys may be turned and "
            "stretched together, its values and output likewise, gains may sit in a norm or in the map that reads it, "
            "heads and neurons may be in any order. The model that AdamW trained (symmetric, seed 0) is moved at "
            f"random along all of that, by matrices of condition {CONDITION:g}: its numbers change by up to "
            f"{scrambled['moved_difference']:.2g}. Brought to canonical form, the model and its scrambled copy agree "
            f"to {scrambled['canonical_difference']:.1g} in every parameter.",
            table,
            redundant,
        ]),
        report.Section("Which head is which?", figures),
    ]  # fmt: skip
    word = "the same function" if scrambled["same_function"] else "another function"
    summary = (
        f"A trained model, its weights scrambled by a move of gauge: by the stored numbers {scrambled['naive']:.2g} "
        f"away (unrelated models are 1 apart), up to gauge {word}, {scrambled['distance']:.1g} away."
    )
    return Part(summary=summary, sections=sections, tables={"gauge": table, "gauge_redundant": redundant})
