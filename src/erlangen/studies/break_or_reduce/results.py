"""The rule, the tables and the report."""

from pathlib import Path
from typing import Any

import numpy as np

from erlangen import report
from erlangen._extras import require

from .._jobs import Progress
from .._reading import by_seed, copy_tables, with_error
from .._tuned import SIGNIFICANCE, Records, compared, finite, forest, mark, stopped, tuning_table, values
from .arms import ARMS, TITLES
from .study import QUANTITIES, BreakOrReduceConfig, measure

COMPARED = (
    *((arm, "plain") for arm in ARMS if arm != "plain"),
    *(("noise", arm) for arm in ("horizontal", "dressed", "invariant")),
)
LABELS = {
    "vertical_share": "share along the gauge",
    "charge_drift": "drift of the charge",
    "orbit_distance": "distance up to gauge",
    "stored_distance": "distance as stored",
}


def run(config: BreakOrReduceConfig, progress: Progress | None = None) -> Path:
    """Run what is declared and not on disk yet, and write the report.

    Returns:
        the path of the HTML file; JSON, CSV and the figures lie beside it.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the folder holds runs of other settings.
    """
    require("matplotlib", "report")
    return _write_report(config, *measure(config, progress))


def compare(config: BreakOrReduceConfig, records: Records) -> list[dict[str, Any]]:
    """The comparisons of the rule.

    Returns:
        a row each: optimizer, first, second, ``difference`` (first minus second) a seed, ``interval`` (95 %, Student),
        ``p``, ``holm`` (p adjusted for all rows), and ``reading``. Where a run could not go on the three are NaN.
    """
    differences = []
    for optimizer in config.optimizers:
        for first, second in COMPARED:
            losses = {arm: values(records, optimizer, arm) for arm in (first, second)}
            row = {"optimizer": optimizer, "first": first, "second": second, "stopped": stopped(losses)}
            with np.errstate(invalid="ignore"):
                differences.append(row | {"difference": losses[first] - losses[second]})
    return compared(differences)


# Tables


def tables(config: BreakOrReduceConfig, tuned: Records, records: Records) -> dict[str, report.Table]:
    """All tables of the report, by the name of their file."""
    return {
        "overview": _overview_table(config, records),
        "tuning": tuning_table(tuned, TITLES),
        "losses": _loss_table(config, records),
        "differences": _difference_table(config, records),
        "gauge": _gauge_table(config, records),
        "runs": _run_table(records),
    }


def _loss_table(config: BreakOrReduceConfig, records: Records) -> report.Table:
    rows = []
    for optimizer, arm in config.cases:
        losses = values(records, optimizer, arm)
        mean = with_error(losses, ".4f", ".4f") if np.isfinite(losses).all() else "–"
        time = float(np.median(values(records, optimizer, arm, "milliseconds")))
        rate = by_seed(records, optimizer=optimizer, arm=arm)[0]["lr"]
        rows.append((TITLES[optimizer], arm, rate, mean, *(finite(loss) for loss in losses.tolist()), time))
    seeds = [f"Seed {seed}" for seed in range(config.seeds)]
    return report.Table(
        ("Optimiser", "Arm", "Learning rate", "Loss", *seeds, "Step, ms"),
        rows,
        "Held-out loss at the last step, nats a token: mean over seeds ± standard error of that mean, and each seed; "
        "median time of a step on one thread of a machine that was busy otherwise, which is no benchmark.",
        formats={"Learning rate": "g", "Step, ms": ".1f"} | dict.fromkeys(seeds, ".4f"),
    )


def _overview_table(config: BreakOrReduceConfig, records: Records) -> report.Table:
    found = {(r["first"], r["second"], r["optimizer"]): r for r in compare(config, records)}

    return report.Table(
        ("First − second", *(TITLES[optimizer] for optimizer in config.optimizers)),
        [
            (f"{first} − {second}", *(mark(found[first, second, optimizer]) for optimizer in config.optimizers))
            for first, second in COMPARED
        ],
        "Differences of the held-out losses, nats a token, mean over seeds: below zero the first is better. "
        f"● holds for all {len(found)} comparisons together at {100 * SIGNIFICANCE:g} % (Holm); ○ a hint: its 95 % "
        "interval leaves out zero, which one in twenty does by chance.",
    )


def _difference_table(config: BreakOrReduceConfig, records: Records) -> report.Table:
    rows = compare(config, records)
    return report.Table(
        ("Optimiser", "Compared", "Difference", "p", "p, Holm", "Reading"),
        [
            (
                TITLES[r["optimizer"]], f"{r['first']} − {r['second']}",
                *(r[key] for key in ("interval", "p", "holm", "reading")),
            )
            for r in rows
        ],
        "Paired differences of the held-out losses, with 95 % Student intervals over seeds.",
        f"{len(rows)} intervals are looked at together: one in twenty leaves out zero by chance, which is then called "
        f"a hint. A difference is called where it holds for all together at {100 * SIGNIFICANCE:g} % (Holm).",
        {"Difference": "+.4f", "p": ".2g", "p, Holm": ".2g"},
    )  # fmt: skip


def _whole(records: Records) -> Records:
    """The records of runs that went on to the end."""
    return [record for record in records if record["failure"] is None]


def _gauge_table(config: BreakOrReduceConfig, records: Records) -> report.Table:
    records = _whole(records)
    return report.Table(
        ("Optimiser", "Arm", *(f"{label[0].upper()}{label[1:]}" for label in LABELS.values())),
        [
            (
                TITLES[optimizer], arm,
                *(with_error(values(records, optimizer, arm, name), ".2g", ".1g") for name in QUANTITIES),
            )
            for optimizer, arm in config.cases
        ],
        "Heads at the end: share of the last step that lies along the gauge (of a broken model: along what was one), "
        "drift of the charges since the start, and how far the heads are from the start, up to gauge and as stored. "
        "Mean over seeds ± standard error; without runs that could not go on.",
    )  # fmt: skip


def _run_table(records: Records) -> report.Table:
    return report.Table(
        ("Optimiser", "Arm", "Seed", "Learning rate", "Loss", *(LABELS[name] for name in QUANTITIES), "Step, ms",
         "Why it could not go on"),
        [
            (
                r["optimizer"], r["arm"], r["seed"], r["lr"], finite(r["loss"]),
                *(r[name][-1] if r[name] else None for name in QUANTITIES), r["milliseconds"], r["failure"] or "",
            )
            for r in records
        ],
        "Every run: the held-out loss at the last step, and the heads at the last measurement.",
        formats={"Learning rate": "g", "Loss": ".4f", "Step, ms": ".1f"},
    )  # fmt: skip


# The report


def visible(curve: np.ndarray) -> np.ndarray:
    """Values for a logarithmic axis: what is below 1e-8 is rounding, and drawn as zero."""
    return np.where(curve < 1e-8, 0.0, curve)


def _curves(records: Records, optimizer: str, x: str, y: str) -> list[report.Series]:
    """A series an arm, of runs that went on to the end."""
    series = []
    for arm in ARMS:
        runs = by_seed(_whole(records), optimizer=optimizer, arm=arm)
        if runs and runs[0][x]:
            series.append(report.Series(arm, runs[0][x], visible(np.array([r[y] for r in runs], dtype=float))))
    return series


def curves(config: BreakOrReduceConfig, records: Records, x: str, y: str, label: str, log_y: bool) -> report.Figure:
    """A quantity during training, a panel an optimiser."""
    panels = {TITLES[o]: _curves(records, o, x, y) for o in config.optimizers}
    return report.Figure(
        report.small_multiples(panels, x_label="step", y_label=label, log_y=log_y),
        f"{label[0].upper()}{label[1:]} during training: mean over seeds with a band of ± one standard error, without "
        "runs that could not go on.",
        f"Curves of the {label}, a panel for each optimiser, a curve for each arm.",
    )


def _summary(config: BreakOrReduceConfig, comparison: Records) -> list[str]:
    """What the rule says: how often, then by optimiser."""
    called = [r for r in comparison if r["reading"].endswith("is better")]
    hints = sum(r["reading"].startswith("a hint") for r in called)
    paragraphs = [
        f"{len(comparison)} comparisons: {len(called) - hints} differences, {hints} hints of one (intervals that leave "
        "out zero, but not for all comparisons together)."
    ]
    for optimizer in config.optimizers:
        rows = [r for r in called if r["optimizer"] == optimizer]
        found = (
            "; ".join(f"{r['first']} against {r['second']} {r['interval']:+.3f}, {r['reading']}" for r in rows)
            or "nothing is told apart"
        )
        paragraphs.append(f"{TITLES[optimizer]}: {found}.")
    return paragraphs


def _write_report(config: BreakOrReduceConfig, tuned: Records, records: Records) -> Path:
    every, comparison, size = tables(config, tuned, records), compare(config, records), config.scale
    figures = {
        "losses": curves(config, records, "steps", "validation", "held-out loss, nats a token", False),
        "vertical": curves(config, records, "gauge_steps", "vertical_share", LABELS["vertical_share"], True),
        "drift": curves(config, records, "gauge_steps", "charge_drift", LABELS["charge_drift"], True),
        "orbit": curves(config, records, "gauge_steps", "orbit_distance", LABELS["orbit_distance"], False),
    } | {
        f"forest_{optimizer}": forest(
            [row for row in comparison if row["optimizer"] == optimizer],
            "difference of held-out losses, nats a token",
            TITLES[optimizer],
        )
        for optimizer in config.optimizers
    }
    model = size.model
    sections = [
        report.Section("What was run", [
            f"A transformer of {model.num_layers} layers, {model.num_heads} heads and width {model.dim}, without "
            f"biases in attention, {size.steps} steps of {size.batch_size} windows of {model.context_length} tokens of "
            f"{size.data.corpus}: {len(config.cases)} cases, three learning rates each on one seed, then "
            f"{config.seeds} seeds at the best. The protocol is the docstring of `erlangen.studies.break_or_reduce`.",
        ]),
        report.Section("Differences", [
            every["overview"], *(figures[f"forest_{optimizer}"] for optimizer in config.optimizers), every["losses"],
        ]),
        report.Section("Training", [figures["losses"]]),
        report.Section("The heads", [
            "Moves of the heads along their gauge change nothing that a plain model computes. Here is how much of a "
            "step lies along them, in the stored numbers as they are, and how far the heads have come.",
            figures["vertical"], figures["drift"], figures["orbit"], every["gauge"],
        ]),
        report.Section("Learning rates", [every["tuning"]]),
        report.Section("Every comparison", [every["differences"]]),
        report.Section("Every run", [every["runs"]]),
    ]  # fmt: skip
    html = report.page("Break or reduce?", _summary(config, comparison), sections)
    data = {"config": config, "tuning": tuned, "runs": records, "comparison": comparison}
    path = report.write_report(config.out, "break_or_reduce", html, data, every)
    copy_tables(config.csv, "break_or_reduce", every)
    for folder in (config.out, config.csv):
        if folder is not None:
            for name, figure in figures.items():
                (folder / f"break_or_reduce_{name}.svg").write_text(figure.svg)
    return path
