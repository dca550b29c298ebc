"""Cases at their best learning rate: a grid on one seed, then other seeds at the rate that won.

A study says which cases it has and what the runs of each are; the choice, the runs and their logs are read here.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from erlangen import report
from erlangen.lm import TrainConfig

from . import _runs
from ._jobs import Progress, execute
from ._reading import by_seed, verdict

TUNING_SEED = 1000
SIGNIFICANCE = 0.05
Case = tuple[str, str]
"""An optimiser and an arm."""

Rates = Mapping[Case, float]
"""The learning rate of each case."""

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is tuned and run."""

    cases: Sequence[Case]
    rates: Mapping[str, Sequence[float]]
    """The grid of each optimiser, for all its arms."""
    tuning_run: Callable[[str, str, float], TrainConfig]
    """Of an optimiser, an arm and a learning rate; its seed is `TUNING_SEED`."""
    final_run: Callable[[str, str, float, int], TrainConfig]
    """Of an optimiser, an arm, a learning rate and a seed."""
    seeds: int
    """Seeds at the chosen rates, from 0."""
    workers: int | None = None
    """Runs at a time; None for one a core, and one on a GPU."""


def execute_runs(runs: Sequence[TrainConfig], workers: int | None, progress: Progress | None) -> None:
    """Run what is not on disk yet, and keep the logs.

    Raises:
        ValueError: the folder of one holds another run.
    """
    if workers is None and any(run.device != "cpu" for run in runs):
        workers = 1
    execute(_runs.jobs(runs, log_only=True), workers=workers, progress=progress)


def tune(plan: Plan, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Run the grid and choose a rate for each case.

    Returns:
        a record a case: optimizer, arm, ``rates`` [n], ``losses`` [n] (infinite for a run that could not go on),
        ``rate``, that of the lowest loss (the smaller of two that are equal), and ``edge``, whether it is the first or
        last of the grid.

    Raises:
        ValueError: the folder holds runs of other settings.
    """
    execute_runs(
        [plan.tuning_run(optimizer, arm, lr) for optimizer, arm in plan.cases for lr in plan.rates[optimizer]],
        plan.workers,
        progress,
    )
    chosen = []
    for optimizer, arm in plan.cases:
        rates = plan.rates[optimizer]
        losses = [last_loss(plan.tuning_run(optimizer, arm, lr)) for lr in rates]
        rate = rates[int(np.argmin(losses))]
        found = {"rates": list(rates), "losses": losses, "rate": rate, "edge": rate in (rates[0], rates[-1])}
        chosen.append({"optimizer": optimizer, "arm": arm} | found)
    return chosen


def measure(
    plan: Plan, read: Callable[[TrainConfig], dict[str, Any]], progress: Progress | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run what is declared and not on disk yet.

    Args:
        plan: what is declared.
        read: what is wanted of the log of a finished run.
        progress: told how far the grid is, then the runs.

    Returns:
        the records of `tune`; and one a run at the chosen rates: optimizer, arm, seed and what ``read`` gives.

    Raises:
        ValueError: the folder holds runs of other settings.
    """
    tuned = tune(plan, progress)
    rates: Rates = {(record["optimizer"], record["arm"]): record["rate"] for record in tuned}
    cases = [(*case, seed) for seed in range(plan.seeds) for case in plan.cases]  # cut short, like stays with like
    runs = [plan.final_run(optimizer, arm, rates[optimizer, arm], seed) for optimizer, arm, seed in cases]
    execute_runs(runs, plan.workers, progress)
    records = [
        {"optimizer": optimizer, "arm": arm, "seed": seed} | read(run)
        for (optimizer, arm, seed), run in zip(cases, runs)
    ]
    order = list(plan.cases)
    return tuned, sorted(records, key=lambda r: (order.index((r["optimizer"], r["arm"])), r["seed"]))


# Logs


def validations(run: TrainConfig) -> list[dict[str, Any]]:
    """The validation records of a run."""
    return [record for record in _runs.records(run) if "validation_loss" in record]


def last_loss(run: TrainConfig) -> float:
    """The held-out loss at the last step; infinite for a run that could not go on."""
    return math.inf if _runs.failure(run) is not None else validations(run)[-1]["validation_loss"]


def read(run: TrainConfig) -> dict[str, Any]:
    """What the log of a finished run says.

    Returns:
        ``lr``; ``loss`` (`last_loss`); ``failure``, why it could not go on, or None; ``steps`` and ``validation``,
        lists; ``standard_error`` of the last; ``milliseconds``, the median time of a step.
    """
    validation, seconds = validations(run), [r["seconds"] for r in _runs.records(run) if "seconds" in r]
    return {
        "lr": run.optimizer.lr,
        "loss": last_loss(run),
        "failure": _runs.failure(run),
        "steps": [record["step"] for record in validation],
        "validation": [record["validation_loss"] for record in validation],
        "standard_error": validation[-1]["validation_standard_error"],
        "milliseconds": 1e3 * float(np.median(seconds)) if seconds else None,
    }


def values(records: Records, optimizer: str, arm: str, key: str = "loss") -> np.ndarray:
    """A number of a case, by seed [seeds]; of a list, its last."""
    chosen = [r[key] for r in by_seed(records, optimizer=optimizer, arm=arm)]
    return np.array([(v[-1] if v else math.nan) if isinstance(v, list) else v for v in chosen], dtype=float)


# The rule


def compared(differences: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Comparisons read together.

    Args:
        differences: of each, ``first`` and ``second``, names; ``difference`` [seeds], first minus second, less is
            better; and ``stopped``, how many runs could not go on by the name of the side.

    Returns:
        those, with ``interval`` (95 %, Student), ``p``, ``holm`` (p adjusted for all) and ``reading``. Where a run
        could not go on the differences and the first three are NaN.
    """
    rows: list[dict[str, Any]] = []
    for row in differences:
        row = dict(row)
        if any(row["stopped"].values()):
            nothing = np.full(len(row["difference"]), np.nan)
            row |= {"difference": nothing, "interval": report.Interval(*[math.nan] * 3), "p": math.nan}
        else:
            row |= {
                "interval": report.paired_interval(row["difference"]),
                "p": report.paired_p_value(row["difference"]),
            }
        rows.append(row)
    for row, adjusted in zip(rows, report.holm([row["p"] for row in rows])):
        row |= {"holm": adjusted, "reading": _reading(row, adjusted)}
    return rows


def stopped(losses: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many runs of each side could not go on."""
    return {name: int(np.isinf(found).sum()) for name, found in losses.items()}


def _reading(row: Mapping[str, Any], adjusted: float) -> str:
    fallen = [f"{count} of {len(row['difference'])} runs of {arm}" for arm, count in row["stopped"].items() if count]
    if fallen:
        return f"no interval: {' and '.join(fallen)} could not go on"
    called = verdict(row["first"], row["second"], row["interval"])
    return f"a hint: {called}" if called.endswith("is better") and adjusted >= SIGNIFICANCE else called


# Tables


def finite(value: float) -> float | None:
    """A number that can be written, or None."""
    return value if math.isfinite(value) else None


def mark(row: Mapping[str, Any]) -> str | None:
    """The mean of a comparison with ● where it is called and ○ where it is a hint; None where there is none."""
    if not math.isfinite(row["interval"].mean):
        return None
    called, hint = row["reading"].endswith("is better"), row["reading"].startswith("a hint")
    sign = "\u00a0○" if hint else "\u00a0●" if called else ""
    return f"{row['interval'].mean:+.3f}{sign}".replace("-", "−")


def tuning_table(tuned: Records, titles: Mapping[str, str]) -> report.Table:
    """The grid, its losses and the choice."""
    return report.Table(
        ("Optimiser", "Arm", "Rates", "Loss, low rate", "Loss, middle rate", "Loss, high rate", "Chosen",
         "At the edge"),
        [
            (
                titles[r["optimizer"]], r["arm"], ", ".join(f"{rate:g}" for rate in r["rates"]),
                *(finite(loss) for loss in r["losses"]), r["rate"], "yes" if r["edge"] else "no",
            )
            for r in tuned
        ],
        "The choice of learning rates, on one seed that is not used again: held-out loss at the last step, nats a "
        "token. An empty cell is a run that could not go on. Where the choice is at the edge of the grid, a better "
        "rate may lie beyond it.",
        formats={f"Loss, {which} rate": ".4f" for which in ("low", "middle", "high")} | {"Chosen": "g"},
    )  # fmt: skip


def forest(rows: Records, x_label: str, title: str) -> report.Figure:
    """Comparisons, a row each."""
    drawn = [
        report.IntervalRow(
            r.get("label") or f"{r['first']} − {r['second']}", *r["interval"], points=tuple(r["difference"])
        )
        for r in rows
    ]
    return report.Figure(
        report.intervals(drawn, x_label=x_label, title=title),
        f"{title}: mean, 95 % interval, each seed. Left of zero the first is better.",
        f"Forest plot of the paired differences under {title}.",
    )
