"""The rule, the tables and the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from erlangen import report
from erlangen._extras import require

from .._jobs import Progress
from .._reading import by_seed, copy_tables, verdict, with_error
from .arms import ARMS, TRAINED
from .study import MotifConfig, measure

Records = Sequence[Mapping[str, Any]]
TESTS = ("unseen", "seen")
PAIRS = (
    ("strict", "free"),
    ("strict", "augmentation"),
    ("strict", "post-hoc"),
    ("dial", "free"),
    ("dial", "strict"),
)


def run(config: MotifConfig, progress: Progress | None = None) -> Path:
    """Run what is declared and not on disk yet, and write the report.

    Returns:
        the path of the HTML file; JSON and CSV lie beside it.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the folder holds cells of other settings.
    """
    require("matplotlib", "report")
    return _write_report(config, measure(config, progress))


def compare(config: MotifConfig, records: Records) -> list[dict[str, Any]]:
    """The paired differences of the rule: task, test, first, second, difference a seed, intervals, verdict."""
    rows = []
    for task in config.tasks:
        for test in TESTS:
            for first, second in PAIRS:
                errors, losses = (
                    values(records, task, first, test, key) - values(records, task, second, test, key)
                    for key in ("error", "log_loss")
                )
                interval = report.paired_interval(errors)
                rows.append(
                    {"task": task, "test": test, "first": first, "second": second, "difference": errors}
                    | {"interval": interval, "log_loss": report.paired_interval(losses)}
                    | {"verdict": verdict(first, second, interval)}
                )
    return rows


def values(records: Records, task: str, arm: str, test: str, key: str) -> np.ndarray:
    """A measure on the windows with ``test`` motifs: [seeds]."""
    return np.array([r[test][key] for r in by_seed(records, task=task, arm=arm)], dtype=float)


# Tables


def tables(config: MotifConfig, records: Records) -> dict[str, report.Table]:
    """All tables of the report, by the name of their file."""
    return {
        "errors": error_table(config, records),
        "differences": _difference_table(config, records),
        "invariance": _invariance_table(config, records),
        "costs": cost_table(records),
        "dials": _dial_table(config, records),
        "cells": _cell_table(records),
    }


def error_table(config: MotifConfig, records: Records) -> report.Table:
    """Errors and log losses by task and arm."""
    rows = []
    for task in config.tasks:
        for arm in ARMS:
            errors = (with_error(100 * values(records, task, arm, test, "error"), ".1f", ".1f") for test in TESTS)
            losses = (with_error(values(records, task, arm, test, "log_loss"), ".3f", ".3f") for test in TESTS)
            rows.append((task, arm, *errors, *losses))
    return report.Table(
        ("Task", "Arm", *(f"Error, {test}, %" for test in TESTS), *(f"Log loss, {test}" for test in TESTS)),
        rows,
        "Wrong labels in per cent and log loss in nats, on windows with unseen and with seen motifs: mean over seeds ± "
        "standard error of that mean.",
        "Guessing has an error of 50 % and a log loss of 0.693. On the task strand that is the least that an invariant "
        "model can have.",
    )


def _difference_table(config: MotifConfig, records: Records) -> report.Table:
    rows = compare(config, records)
    keys = ("task", "test", "first", "second", "interval", "verdict", "log_loss")
    return report.Table(
        ("Task", "Motifs", "First", "Second", "First − second", "Reading", "Log loss, first − second"),
        [[r[key] for key in keys] for r in rows],
        "Paired differences of the share of wrong labels, and of log losses, with 95 % Student intervals over seeds.",
        f"A seed draws motifs, windows and initial weights. {len(rows)} intervals are looked at together: one in "
        "twenty leaves out zero by chance.",
        {"First − second": "+.3f", "Log loss, first − second": "+.3f"},
    )


def _invariance_table(config: MotifConfig, records: Records) -> report.Table:
    measures = [(test, key) for key in ("invariance", "flips") for test in TESTS]
    rows = [
        (task, arm, *(float(values(records, task, arm, *which).mean()) for which in measures))
        for task in config.tasks
        for arm in ARMS
    ]
    differences, flips = ([f"{what}, {test}" for test in TESTS] for what in ("|logit(x) − logit(hx)|", "Label changes"))
    return report.Table(
        ("Task", "Arm", *differences, *flips),
        rows,
        "What reading the other strand changes: mean over windows and seeds of |logit(x) − logit(hx)|, in float32, and "
        "share of windows whose label changes.",
        formats=dict.fromkeys(differences, ".2g") | dict.fromkeys(flips, ".1%"),
    )


def cost_table(records: Records) -> report.Table:
    """Parameters and seconds by arm."""
    rows = []
    for arm in TRAINED:
        cells = [r for r in records if r["arm"] == arm]
        rows.append((arm, cells[0]["parameters"], float(np.median([r["seconds"] for r in cells]))))
    return report.Table(
        ("Arm", "Parameters", "Training, s"),
        rows,
        "Parameters, and median time of training on one thread while every core is busy, which is no benchmark.",
        "Width and depth are the same. Post-hoc is the free model, read twice for each answer.",
        {"Training, s": ".1f"},
    )


def _dial_table(config: MotifConfig, records: Records) -> report.Table:
    rows = []
    for task in config.tasks:
        cells = by_seed(records, task=task, arm="dial")
        for layer in cells[0]["dials"]:
            both = (np.array([cell["dials"][layer][key] for cell in cells]) for key in ("gamma", "share"))
            rows.append((task, layer, *(with_error(found, ".3f", ".3f") for found in both)))
    return report.Table(
        ("Task", "Layer", "γ", "Share that breaks the symmetry"),
        rows,
        "The dials after training, from γ = 0.5: mean over seeds ± standard error of that mean.",
        "γ alone depends on the size of what it multiplies. The share is that of ‖W(γ)‖² which does not commute with "
        "the group: about one half for a free weight without preference, and one eighth at the start.",
    )


def mean_share(records: Records, task: str) -> np.ndarray:
    """The mean over layers of the share that breaks the symmetry: [seeds]."""
    cells = by_seed(records, task=task, arm="dial")
    return np.array([np.mean([dial["share"] for dial in cell["dials"].values()]) for cell in cells])


def _cell_table(records: Records) -> report.Table:
    measures = ("error", "log_loss", "invariance", "flips")
    return report.Table(
        ("Task", "Arm", "Seed", *(f"{key.replace('_', ' ')}, {test}" for test in TESTS for key in measures), "Seconds"),
        [
            (r["task"], r["arm"], r["seed"], *(r[test][key] for test in TESTS for key in measures), r["seconds"])
            for r in records
        ],
        "Every cell.",
    )


# The report


def forest(comparison: Records, task: str) -> report.Figure:
    """The paired differences of one task."""
    rows = [
        report.IntervalRow(f"{r['first']} − {r['second']}\n{r['test']}", *r["interval"], points=tuple(r["difference"]))
        for r in comparison
        if r["task"] == task
    ]
    return report.Figure(
        report.intervals(rows, x_label="difference of the shares of wrong labels"),
        f"Task {task}: mean, 95 % interval, each seed. Left of zero the first is better.",
        f"Forest plot of the paired differences of the task {task}.",
    )


def _summary(config: MotifConfig, records: Records, comparison: Records) -> list[str]:
    """What the rule says: a paragraph for each task."""
    paragraphs = []
    for task in config.tasks:
        calls = {
            test: ". ".join(
                f"{r['first'].capitalize()} against {r['second']}: {r['verdict']}"
                for r in comparison
                if (r["task"], r["test"]) == (task, test)
            )
            for test in TESTS
        }
        share = with_error(mean_share(records, task), ".2f", ".2f")
        paragraphs.append(
            f"Task {task}, unseen motifs. {calls['unseen']}. Seen motifs. {calls['seen']}. Share of the weights that "
            f"breaks the symmetry, with learned dials: {share}."
        )
    return paragraphs


def _write_report(config: MotifConfig, records: Records) -> Path:
    every, comparison = tables(config, records), compare(config, records)
    sections = [
        report.Section("What was run", [
            f"Tasks: {', '.join(config.tasks)}. {config.seeds} seeds an arm, {config.steps} steps of "
            f"{config.batch_size}, {config.train_size} training windows, {config.test_size} test windows with seen "
            "motifs and as many with unseen ones, each read from both strands. The protocol is the docstring of "
            "`erlangen.studies.finite_motifs`.",
        ]),
        report.Section("Errors", [every["errors"]]),
        report.Section("Differences", [*(forest(comparison, task) for task in config.tasks), every["differences"]]),
        report.Section("The other strand", [every["invariance"]]),
        report.Section("What the dials learned", [every["dials"]]),
        report.Section("Parameters and time", [every["costs"]]),
        report.Section("Every cell", [every["cells"]]),
    ]  # fmt: skip
    html = report.page("Unseen motifs with a symmetry seen before", _summary(config, records, comparison), sections)
    path = report.write_report(config.out, "finite_motifs", html, {"config": config, "cells": records}, every)
    copy_tables(config.csv, "finite_motifs", every)
    return path
