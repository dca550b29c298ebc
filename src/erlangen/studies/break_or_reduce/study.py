"""What is run: cases, the choice of learning rates, and the runs at the chosen ones."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from erlangen.lm import TrainConfig

from .. import _tuned
from .._jobs import Progress, at_least_one
from .._tuned import TUNING_SEED, Case, Plan
from .arms import ARMS, OPTIMIZERS, SIZES, Size, SizeName, run_config

TUNING_EVALUATIONS, EVALUATIONS = 1, 8
QUANTITIES = ("vertical_share", "charge_drift", "orbit_distance", "stored_distance")


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
    def cases(self) -> list[Case]:
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


def read(run: TrainConfig) -> dict[str, Any]:
    """What the log of a finished run says.

    Returns:
        what `_tuned.read` does; ``gauge_steps`` and, of the same length, each of `erlangen.gauge.GaugeMonitor`'s
        quantities of the whole model.
    """
    watched = [record for record in _tuned.validations(run) if "gauge" in record]
    return _tuned.read(run) | {
        "gauge_steps": [record["step"] for record in watched],
        **{name: [record["gauge"][name] for record in watched] for name in QUANTITIES},
    }


def plan(config: BreakOrReduceConfig) -> Plan:
    """All that is tuned and run."""
    return Plan(
        cases=config.cases,
        rates=config.scale.rates,
        tuning_run=functools.partial(tuning_run, config),
        final_run=functools.partial(final_run, config),
        seeds=config.seeds,
        workers=config.workers,
    )


def tune(config: BreakOrReduceConfig, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Run the grid and choose a rate for each optimiser and arm: `_tuned.tune`."""
    return _tuned.tune(plan(config), progress)


def measure(
    config: BreakOrReduceConfig, progress: Progress | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run what is declared and not on disk yet: `_tuned.measure`.

    Returns:
        the records of `tune`; and one a run at the chosen rates, those of `read`.
    """
    return _tuned.measure(plan(config), read, progress)
