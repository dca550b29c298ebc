"""The rule, the tables and the report."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from erlangen import lie, report
from erlangen._extras import require

from .._jobs import Progress
from .._reading import by_seed, copy_tables, verdict, with_error
from .arms import ARMS, LEARNED, NUM_HEADS
from .checks import cocycle
from .study import CompletionConfig, measure
from .tasks import CEILING

Records = Sequence[Mapping[str, Any]]
PAIRS = (("closed form", "learned kernel"), ("closed form", "vectors"), ("closed form", "formula"))


def run(config: CompletionConfig, progress: Progress | None = None) -> Path:
    """Run what is declared and not on disk yet, and write the report.

    Returns:
        the path of the HTML file; JSON and CSV lie beside it.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the folder holds cells of other settings.
    """
    require("matplotlib", "report")
    records = measure(config, progress)
    return _write_report(config, records, {name: cocycle(lie.parse(name)) for name in config.case_groups})


def compare(config: CompletionConfig, records: Records) -> list[dict[str, Any]]:
    """The paired differences of the rule: task, group, first, second, difference a seed, interval, verdict."""
    rows = []
    for task, group in config.cases:
        for first, second in PAIRS:
            difference = _values(records, task, group, first) - _values(records, task, group, second)
            interval = report.paired_interval(difference)
            rows.append(
                {"task": task, "group": group, "first": first, "second": second, "difference": difference}
                | {"interval": interval, "verdict": verdict(first, second, interval)}
            )
    return rows


def _values(records: Records, task: str, group: str, arm: str, key: str = "median") -> np.ndarray:
    """[seeds]."""
    return np.array([r[key] for r in by_seed(records, task=task, group=group, arm=arm)], dtype=float)


# Tables


def tables(
    config: CompletionConfig, records: Records, cocycles: Mapping[str, Mapping[str, Any]]
) -> dict[str, report.Table]:
    """All tables of the report, by the name of their file.

    Args:
        config: what was run.
        records: from `measure`.
        cocycles: `checks.cocycle` by group.
    """
    return {
        "errors": _error_table(config, records),
        "means": _mean_table(config, records),
        "differences": _difference_table(config, records),
        "parameters": _parameter_table(config, records),
        "invariance": _invariance_table(config, records),
        "cocycle": _cocycle_table(cocycles),
        "cells": _cell_table(records),
    }


def _error_table(config: CompletionConfig, records: Records) -> report.Table:
    rows = []
    for task, group in config.cases:
        (fixed,) = by_seed(records, task=task, group=group, arm="formula")
        learned = (with_error(_values(records, task, group, arm)) for arm in LEARNED)
        rows.append((task, group, fixed["spacing"], fixed["median"], *learned))
    return report.Table(
        ("Task", "Group", "Nearest given", *ARMS),
        rows,
        "Median error ‖log(ĝ⁻¹ g*)‖: mean over seeds ± standard error of that mean.",
        "Nearest given: median distance from a missing element to the nearest given one, which an answer should beat.",
        {"Nearest given": ".3g", "formula": ".2g"},
    )


def _mean_table(config: CompletionConfig, records: Records) -> report.Table:
    rows = []
    for task, group in config.cases:
        (fixed,) = _values(records, task, group, "formula", "mean")
        learned = (with_error(_values(records, task, group, arm, "mean")) for arm in LEARNED)
        rows.append((task, group, fixed, *learned))
    return report.Table(
        ("Task", "Group", *ARMS),
        rows,
        f"Mean error, each cut at {CEILING:g}: mean over seeds ± standard error of that mean.",
        formats={"formula": ".2g"},
    )


def _difference_table(config: CompletionConfig, records: Records) -> report.Table:
    return report.Table(
        ("Task", "Group", "First", "Second", "First − second", "Reading"),
        [
            (r["task"], r["group"], r["first"], r["second"], r["interval"], r["verdict"])
            for r in compare(config, records)
        ],
        "Paired differences of the median error, with 95 % Student intervals over seeds.",
        "The formula has no seed: its one error is taken from each. Training and test sequences are the same for all "
        "seeds, so the intervals are about training, not about the choice of sequences.",
        {"First − second": "+.3g"},
    )


def _parameter_table(config: CompletionConfig, records: Records) -> report.Table:
    sizes = {(r["group"], r["arm"]): r for r in records if r["arm"] in LEARNED}
    return report.Table(
        ("Group", *(f"{arm}{what}" for arm in LEARNED for what in ("", ", all")), "Learned kernel / closed form"),
        [
            (
                group,
                *(sizes[group, arm][key] for arm in LEARNED for key in ("score_parameters", "parameters")),
                sizes[group, "learned kernel"]["score_parameters"] / sizes[group, "closed form"]["score_parameters"],
            )
            for group in config.case_groups
        ],
        f"Parameters of the scores of {NUM_HEADS} heads (of the vectors: query and key projections), and of the "
        "whole model.",
        "λ and τ count as published; only λ / τ matters, so one a head is redundant.",
        {"Learned kernel / closed form": ".1f"},
    )


def _invariance_table(config: CompletionConfig, records: Records) -> report.Table:
    rows = []
    for task, group in config.cases:
        cells = {arm: by_seed(records, task=task, group=group, arm=arm) for arm in ARMS}
        for kind in cells["formula"][0]["invariance"]["float32"]:
            for precision in ("float32", "float64"):
                found = {a: np.array([r["invariance"][precision][kind] for r in cells[a]]) for a in ARMS}
                medians = {arm: float(np.median(values[:, 0])) for arm, values in found.items()}
                both = (number for arm in ARMS for number in (medians[arm], float(found[arm][:, 1].max())))
                orders = math.log10(medians["vectors"] / medians["closed form"]) if medians["closed form"] > 0 else None
                rows.append((task, group, kind, precision, *both, orders))
    return report.Table(
        ("Task", "Group", "Move", "Precision", *(f"{arm}{what}" for arm in ARMS for what in ("", ", worst")), "Orders"),
        rows,
        "How far the answer is from moving along, ‖(h out(g))⁻¹ out(h g) − 1‖_F: median over sequences (and seeds), "
        "and the worst.",
        "Orders: of magnitude between the medians of vectors and closed form. A worst case far above the median is an "
        "answer that rounding switched from one proposal to another of nearly the same confidence.",
        {c: ".1e" for arm in ARMS for c in (arm, f"{arm}, worst")} | {"Orders": ".1f"},
    )


def _cocycle_table(cocycles: Mapping[str, Mapping[str, Any]]) -> report.Table:
    return report.Table(
        ("Group", "On the group, float32", "On the group, float64", "Order on logarithms"),
        [(g, c["group float32"], c["group float64"], c["order"]) for g, c in cocycles.items()],
        "The cocycle g_ik = g_ij g_jk: largest relative error over 256 random triples; and the order p of "
        "‖w_ij + w_jk − w_ik‖ ~ size^p for factors of size 0.001 to 0.1.",
        "Order 2: logarithms add up to first order only.",
        {"On the group, float32": ".1e", "On the group, float64": ".1e", "Order on logarithms": ".3f"},
    )


def _cell_table(records: Records) -> report.Table:
    keys = ("task", "group", "arm", "seed", "median", "mean", "outside", "score_parameters", "parameters")
    columns = ("Task", "Group", "Arm", "Seed", "Median error", "Mean error", "At the ceiling", "Score parameters")
    ordered = sorted(records, key=lambda r: (r["task"], r["group"], ARMS.index(r["arm"]), r["seed"]))
    return report.Table((*columns, "Parameters"), [[r[key] for key in keys] for r in ordered], "Every cell.")


# The report


def _forest(comparison: Records, task: str, second: str) -> report.Figure:
    rows = [
        report.IntervalRow(r["group"], *r["interval"], points=tuple(r["difference"]))
        for r in comparison
        if r["task"] == task and r["second"] == second
    ]
    return report.Figure(
        report.intervals(rows, x_label=f"median error, closed form − {second}"),
        f"Task {task}: closed form against {second}; mean, 95 % interval, each seed. Left of zero the closed form "
        "is better.",
        f"Forest plot of paired differences by group for the task {task}.",
    )


def _summary(config: CompletionConfig, comparison: Records) -> list[str]:
    """What the rule says of the closed form: a paragraph for each other arm."""
    paragraphs = []
    for _, second in PAIRS:
        calls = []
        for task in config.tasks:
            groups: dict[str, list[str]] = {}
            for row in comparison:
                if (row["task"], row["second"]) == (task, second):
                    groups.setdefault(row["verdict"], []).append(row["group"])
            calls += [f"Task {task}: " + "; ".join(f"{call} on {', '.join(found)}" for call, found in groups.items())]
        paragraphs.append(f"Closed form against {second}. " + ". ".join(calls) + ".")
    return paragraphs


def _write_report(config: CompletionConfig, records: Records, cocycles: Mapping[str, Mapping[str, Any]]) -> Path:
    every, comparison = tables(config, records, cocycles), compare(config, records)
    curve = report.curves(
        [report.Series(g, np.log10(c["size"]), np.array([c["discrepancy"]])) for g, c in cocycles.items()],
        x_label="log₁₀ of the size of both factors", y_label="‖w_ij + w_jk − w_ik‖", log_y=True,
    )  # fmt: skip
    on = {task: ", ".join(group for t, group in config.cases if t == task) for task in config.tasks}
    sections = [
        report.Section("What was run", [
            f"{'. '.join(f'Task {task} on {groups}' for task, groups in on.items())}. {config.seeds} seeds an "
            f"arm, {config.steps} steps of {config.batch_size}, {config.train_size} training and "
            f"{config.test_size} test sequences. The protocol is the docstring of `erlangen.studies.lie_completion`.",
        ]),
        report.Section("Errors", [every["errors"], every["means"]]),
        report.Section("Differences", [
            *(_forest(comparison, task, second) for task in config.tasks for second in ("learned kernel", "vectors")),
            every["differences"],
        ]),
        report.Section("Parameters of the scores", [every["parameters"]]),
        report.Section("Moving all elements", [every["invariance"]]),
        report.Section("The cocycle", [
            report.Figure(curve, "What is missing from the sum of two logarithms.", "Straight lines of slope two."),
            every["cocycle"],
        ]),
        report.Section("Every cell", [every["cells"]]),
    ]  # fmt: skip
    html = report.page("Completing sequences of group elements", _summary(config, comparison), sections)
    path = report.write_report(config.out, "lie_completion", html, {"config": config, "cells": records}, every)
    copy_tables(config.csv, "lie_completion", every)
    return path
