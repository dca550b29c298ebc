"""What is run: cases, the choice of learning rates, and the runs at the chosen ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from erlangen.lm import TrainConfig

from .. import _runs
from .._jobs import Progress, at_least_one, execute
from .arms import ARMS, OPTIMIZERS, SIZES, Size, SizeName, run_config

TUNING_SEED = 1000
TUNING_EVALUATIONS, EVALUATIONS = 1, 8
QUANTITIES = ("vertical_share", "charge_drift", "orbit_distance", "stored_distance")
Rates = Mapping[tuple[str, str], float]
"""The learning rate of each optimiser and arm."""


@dataclass(frozen=True, kw_only=True)
class BreakOrReduceConfig:
    """How much to run; the defaults are the protocol."""

    out: Path = Path("break-or-reduce")
    """Folder of the report and of the runs. Finished runs found in it are not run again."""
    csv: Path | None = None
    """Folder for copies of the tables and figures, break_or_reduce_*."""
    size: SizeName = "tiny"
    """"tiny" for two cores and an hour; "124m", the shape of GPT-2 small, for a GPU; "seconds" to see that all runs."""
    corpus: str | None = None
    """Another corpus, named as in `erlangen train`; None for that of the size."""
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    """Some of the optimisers."""
    seeds: int = 5
    """Seeds at the chosen learning rates, from 0."""
    steps: int | None = None
    """Steps of each run; None for those of the size."""
    workers: int | None = None
    """Runs at a time, each on one thread; None for one a core, and one on a GPU."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.optimizers if name not in OPTIMIZERS]
        if unknown or not self.optimizers:
            raise ValueError(f"optimizers must be of {', '.join(OPTIMIZERS)}, received {', '.join(unknown) or 'none'}")
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, received {self.size!r}")
        at_least_one(self, "seeds", *(() if self.steps is None else ("steps",)))

    @property
    def scale(self) -> Size:
        """The size, with the corpus and the steps asked for."""
        size = SIZES[self.size]
        if self.corpus is not None:
            size = replace(size, data=replace(size.data, corpus=self.corpus))
        return size if self.steps is None else replace(size, steps=self.steps)

    @property
    def cases(self) -> list[tuple[str, str]]:
        """Every optimiser and arm."""
        return [(optimizer, arm) for optimizer in self.optimizers for arm in ARMS]


def quick(out: Path) -> BreakOrReduceConfig:
    """A size of seconds, to see that everything runs; its numbers say nothing."""
    return BreakOrReduceConfig(out=out, size="seconds", optimizers=("sgdm", "adamw"), seeds=2, workers=1)


def tuning_run(config: BreakOrReduceConfig, optimizer: str, arm: str, lr: float) -> TrainConfig:
    """A run of the grid."""
    size, out = config.scale, config.out / "tuning" / f"{optimizer}-{arm}-{lr:g}"
    return run_config(
        size, optimizer, arm, lr=lr, seed=TUNING_SEED, steps=size.steps, out=out, evaluations=TUNING_EVALUATIONS
    )


def final_run(config: BreakOrReduceConfig, optimizer: str, arm: str, lr: float, seed: int) -> TrainConfig:
    """A run at the chosen rate."""
    size, out = config.scale, config.out / "runs" / f"{optimizer}-{arm}-{seed}"
    return run_config(size, optimizer, arm, lr=lr, seed=seed, steps=size.steps, out=out, evaluations=EVALUATIONS)


def _validation(run: TrainConfig) -> list[dict[str, Any]]:
    return [record for record in _runs.records(run) if "validation_loss" in record]


def last_loss(run: TrainConfig) -> float:
    """The held-out loss at the last step; infinite for a run that could not go on."""
    return math.inf if _runs.failure(run) is not None else _validation(run)[-1]["validation_loss"]


def read(run: TrainConfig) -> dict[str, Any]:
    """What the log of a finished run says.

    Returns:
        ``lr``; ``loss`` (`last_loss`); ``failure``, why it could not go on, or None; ``steps`` and ``validation``,
        lists; ``standard_error`` of the last; ``gauge_steps`` and, of the same length, each of
        `erlangen.gauge.GaugeMonitor`'s quantities of the whole model; ``milliseconds``, the median time of a step.
    """
    validation, seconds = _validation(run), [r["seconds"] for r in _runs.records(run) if "seconds" in r]
    watched = [record for record in validation if "gauge" in record]
    return {
        "lr": run.optimizer.lr,
        "loss": last_loss(run),
        "failure": _runs.failure(run),
        "steps": [record["step"] for record in validation],
        "validation": [record["validation_loss"] for record in validation],
        "standard_error": validation[-1]["validation_standard_error"],
        "gauge_steps": [record["step"] for record in watched],
        **{name: [record["gauge"][name] for record in watched] for name in QUANTITIES},
        "milliseconds": 1e3 * float(np.median(seconds)) if seconds else None,
    }


def _execute(config: BreakOrReduceConfig, runs: Sequence[TrainConfig], progress: Progress | None) -> None:
    workers = 1 if config.workers is None and config.scale.device != "cpu" else config.workers
    execute(_runs.jobs(runs, log_only=True), workers=workers, progress=progress)


def tune(config: BreakOrReduceConfig, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Run the grid and choose a rate for each optimiser and arm.

    Returns:
        a record a case: optimizer, arm, ``rates`` [3], ``losses`` [3] (infinite for a run that could not go on),
        ``rate``, that of the lowest loss (the smaller of two that are equal), and ``edge``, whether it is the first or
        last of the grid.

    Raises:
        ValueError: the folder holds runs of other settings.
    """
    size = config.scale
    _execute(
        config,
        [tuning_run(config, optimizer, arm, lr) for optimizer, arm in config.cases for lr in size.rates[optimizer]],
        progress,
    )
    chosen = []
    for optimizer, arm in config.cases:
        rates = size.rates[optimizer]
        losses = [last_loss(tuning_run(config, optimizer, arm, lr)) for lr in rates]
        rate = rates[int(np.argmin(losses))]
        found = {"rates": list(rates), "losses": losses, "rate": rate, "edge": rate in (rates[0], rates[-1])}
        chosen.append({"optimizer": optimizer, "arm": arm} | found)
    return chosen


def measure(
    config: BreakOrReduceConfig, progress: Progress | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run what is declared and not on disk yet.

    Returns:
        the records of `tune`; and one a run at the chosen rates, those of `read`.

    Raises:
        ValueError: the folder holds runs of other settings.
    """
    tuned = tune(config, progress)
    rates: Rates = {(record["optimizer"], record["arm"]): record["rate"] for record in tuned}
    cases = [(*case, seed) for seed in range(config.seeds) for case in config.cases]  # cut short, like stays with like
    runs = [final_run(config, optimizer, arm, rates[optimizer, arm], seed) for optimizer, arm, seed in cases]
    _execute(config, runs, progress)
    records = [
        {"optimizer": optimizer, "arm": arm, "seed": seed} | read(run)
        for (optimizer, arm, seed), run in zip(cases, runs)
    ]
    order = config.cases
    return tuned, sorted(records, key=lambda r: (order.index((r["optimizer"], r["arm"])), r["seed"]))
