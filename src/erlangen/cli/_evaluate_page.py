"""The page of ``erlangen evaluate``."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from erlangen import report
from erlangen.lm.reasoning import Comparison, Contamination, FamilyResult, Summary

MEAN = "mean"
_MOST_SHOWN = 90  # letters of an example


class Evaluated(Protocol):
    """What one model answered."""

    @property
    def name(self) -> str: ...
    @property
    def results(self) -> Mapping[str, FamilyResult]: ...
    @property
    def summaries(self) -> Sequence[Summary]: ...


@dataclass(frozen=True)
class Paired:
    """A comparison with its p-value adjusted after Holm for the number of families."""

    family: str
    difference: report.Interval
    better: int
    worse: int
    p: float
    adjusted_p: float


def paired(comparisons: Sequence[Comparison]) -> list[Paired]:
    """Adjust the p-values of the families; the mean over families has none."""
    asked = [comparison for comparison in comparisons if not math.isnan(comparison.p)]
    adjusted = dict(zip((c.family for c in asked), report.holm([c.p for c in asked])))
    return [
        Paired(c.family, report.Interval(*c.difference), c.better, c.worse, c.p, adjusted.get(c.family, math.nan))
        for c in comparisons
    ]


def family_rows(one: Evaluated, *, short: bool = False) -> tuple[tuple[str, ...], list[tuple]]:
    """Headings, and a row a family, and one for their mean."""
    columns = ("Family", "Items", "Accuracy, %", "Chance, %", "Per byte, %", "Top-1, %", "Answer loss, nats")
    if short:
        columns = ("family", "items", "accuracy, %", "chance", "a byte", "top-1", "loss")
    rows = []
    for summary in one.summaries:
        accuracy = report.Interval(*_points(summary.accuracy))
        shown: Any = f"{accuracy:.1f}" if short else accuracy
        rest = (100 * summary.chance, 100 * summary.accuracy_a_byte, 100 * summary.top1, summary.loss)
        rows.append((summary.family, summary.num_items, shown, *rest))
    return columns, rows


def paired_rows(compared: Sequence[Paired], *, short: bool = False) -> tuple[tuple[str, ...], list[tuple]]:
    """Headings, and a row a family."""
    columns = ("Family", "Difference, points", "Better", "Worse", "p", "p (Holm)")
    if short:
        columns = ("family", "points", "better", "worse", "p", "p (Holm)")
    rows = []
    for row in compared:
        points = report.Interval(*_points(row.difference))
        shown: Any = f"{points:+.1f}" if short else points
        p = (None, None) if math.isnan(row.p) else (row.p, row.adjusted_p)
        rows.append((row.family, shown, row.better, row.worse, *p))
    return columns, rows


def by_kind(one: Evaluated) -> list[dict[str, Any]]:
    """Accuracy of each kind of question, and of each distance of far retrieval."""
    found = []
    for family, result in one.results.items():
        labels = [item.kind for item in result.items]
        if family == "far":
            labels = [f"{item.parameters['distance']:>2} sentences between" for item in result.items]
        credits = result.credits
        for label in sorted({*labels}):
            chosen = [place for place, other in enumerate(labels) if other == label]
            chance = float(np.mean([result.items[place].chance for place in chosen]))
            example = result.items[chosen[0]]
            found.append({
                "family": family, "kind": label.strip(), "items": len(chosen),
                "accuracy": float(credits[chosen].mean()), "chance": chance,
                "example": f"{example.prompt} _", "answer": example.candidates[example.answer],
            })  # fmt: skip
    return found


def contamination_data(evaluated: Sequence[Evaluated], found: Mapping[str, Contamination]) -> list[dict[str, Any]]:
    """Of each family, what was found in the text, and the accuracies with and without it."""
    rows = []
    for family, there in found.items():
        clean = ~np.array(there.full) & ~np.array(there.end)
        credits = [one.results[family].credits for one in evaluated]
        rows.append({
            "family": family, "full": sum(there.full), "end": sum(there.end), "clean": int(clean.sum()),
            "accuracy": [float(values.mean()) for values in credits],
            "accuracy_clean": [float(values[clean].mean()) if clean.any() else None for values in credits],
        })  # fmt: skip
    return rows


def contamination_rows(
    evaluated: Sequence[Evaluated], found: Mapping[str, Contamination]
) -> tuple[tuple[str, ...], list[tuple]]:
    """Headings, and a row a family."""
    columns: list[str] = ["Family", "In full", "End of it", "Not there"]
    for one in evaluated:
        columns += [f"{one.name}, %", f"{one.name} without them, %"]
    rows = []
    for row in contamination_data(evaluated, found):
        cells: list[Any] = [row["family"], row["full"], row["end"], row["clean"]]
        for accuracy, clean in zip(row["accuracy"], row["accuracy_clean"]):
            cells += [100 * accuracy, None if clean is None else 100 * clean]
        rows.append(tuple(cells))
    return tuple(columns), rows


def evaluate_summary(evaluated: Sequence[Evaluated], compared: Sequence[Paired] | None) -> list[str]:
    """The answer in a few sentences."""
    lines = []
    for one in evaluated:
        *families, mean = one.summaries
        above = [summary.family for summary in families if summary.accuracy.low > summary.chance]
        below = [summary.family for summary in families if summary.accuracy.high < summary.chance]
        interval = report.Interval(*_points(mean.accuracy))
        line = (
            f"`{one.name}` answers {interval:.1f} % of {mean.num_items:,} questions, as the mean of {len(families)} "
            f"families; chance is {100 * mean.chance:.1f} %."
        )
        line += f" Above chance: {', '.join(above)}." if above else " No family is above chance."
        lines.append(line + (f" Below chance: {', '.join(below)}." if below else ""))
    if compared is not None:
        *families, mean = compared
        told = [row for row in families if row.adjusted_p < 0.05]
        points = report.Interval(*_points(mean.difference))
        lines.append(
            f"`{evaluated[1].name}` less `{evaluated[0].name}`: {points:+.1f} points in the mean. "
            + ("Families that differ (p below 0.05 after Holm): "
               + ", ".join(f"{row.family} ({100 * row.difference.mean:+.1f})" for row in told)
               if told else "No family differs (no p below 0.05 after Holm)")
            + "."
        )  # fmt: skip
    return lines


def _excess(one: Evaluated) -> report.Figure:
    rows = [report.IntervalRow(s.family, *_points(s.accuracy, s.chance)) for s in one.summaries]
    return report.Figure(
        report.intervals(rows, x_label="accuracy less chance, percentage points"),
        f"Accuracy of `{one.name}` above chance, which is the line at zero, with 95 % bootstrap intervals; in colour "
        "where the interval leaves chance out.",
        "A row a family with its interval, beside a line at the level of chance.",
    )


def evaluate_page(
    evaluated: Sequence[Evaluated],
    compared: Sequence[Paired] | None,
    found: Mapping[str, Contamination] | None,
) -> str:
    """The HTML of an evaluation."""
    sections = []
    for one in evaluated:
        columns, rows = family_rows(one)
        sections.append(report.Section(f"What {one.name} answers", [
            _excess(one),
            report.Table(
                columns, rows, f"The families, as `{one.name}` answers them.",
                "Accuracy: share of items whose right candidate has the highest log-likelihood, with a 95 % bootstrap "
                "interval over blocks of items. Per byte: the same, choosing by log-likelihood a byte. Top-1: the "
                "model would write the answer by itself. Answer loss: negative log-likelihood of the right answer.",
                dict.fromkeys(columns[2:6], ".1f") | {columns[6]: ".2f"}, emphasised=[len(rows) - 1],
            ),
        ]))  # fmt: skip
    if compared is not None:
        columns, rows = paired_rows(compared)
        figure = report.intervals(
            [report.IntervalRow(row.family, *_points(row.difference)) for row in compared],
            x_label=f"{evaluated[1].name} less {evaluated[0].name}, percentage points",
        )
        sections.append(report.Section("Item by item", [
            report.Figure(
                figure, "Paired differences of the accuracies, with 95 % bootstrap intervals.",
                "A row a family with its interval, beside a line at zero.",
            ),
            report.Table(
                columns, rows, f"`{evaluated[1].name}` less `{evaluated[0].name}`, on the same items.",
                "Better, worse: blocks of items in which the second model has more right than the first, and less. p: "
                "exact two-sided McNemar test over blocks; adjusted after Holm for the number of families.",
                {columns[1]: "+.1f", columns[4]: ".2g", columns[5]: ".2g"}, emphasised=[len(rows) - 1],
            ),
        ]))  # fmt: skip
    kinds = [by_kind(one) for one in evaluated]
    columns = ("Family", "Kind", "Items", *(f"{one.name}, %" for one in evaluated), "Chance, %", "Example", "Answer")
    rows = [
        (row["family"], row["kind"], row["items"], *(100 * own[place]["accuracy"] for own in kinds),
         100 * row["chance"], _short(row["example"]), row["answer"].strip())
        for place, row in enumerate(kinds[0])
    ]  # fmt: skip
    sections.append(report.Section("Kind by kind", [
        report.Table(
            columns, rows, "Accuracy of each kind of question, with an example.",
            "Far retrieval is told by the sentences between the facts and the question.",
            dict.fromkeys(columns[3:-2], ".1f"),
        )
    ]))  # fmt: skip
    if found is not None:
        columns, rows = contamination_rows(evaluated, found)
        sections.append(report.Section("In the training text already", [
            report.Table(
                columns, rows, "Questions that stand in the text.",
                "In full: prompt and right answer. End of it: the last eight words and marks, answer included. Without "
                "them: accuracy on the items of which neither was found.", dict.fromkeys(columns[4:], ".1f"),
            )
        ]))  # fmt: skip
    asked = [
        (family, len(result.items), result.shortest, result.longest, result.too_long)
        for family, result in evaluated[0].results.items()
    ]
    sections.append(report.Section("What was asked", [
        report.Table(
            ("Family", "Items", "Shortest, tokens", "Longest, tokens", "Too long"), asked,
            "Sizes of the questions, in tokens of the first model.",
            "Too long: drafts that did not fit the context, in whose place shorter ones were made.",
        )
    ]))  # fmt: skip
    names = " and ".join(one.name for one in evaluated)
    return report.page(f"Reasoning of {names}", evaluate_summary(evaluated, compared), sections)


def _points(values: Sequence[float], less: float = 0.0) -> tuple[float, float, float]:
    """A mean and its interval in percentage points."""
    mean, low, high = (100 * (value - less) for value in values)
    return mean, low, high


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else "… " + text[-_MOST_SHOWN:]
