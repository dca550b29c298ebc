"""What is run: the cases of the three parts, the choice of learning rates, and the runs at the chosen ones."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from erlangen.lm import TrainConfig

from .. import _tuned
from .._jobs import Progress, at_least_one
from .._tuned import TUNING_SEED, Case, Plan, Records
from .arms import BROKEN, CELL_OPTIMIZERS, CELLS, OPTIMIZERS, PLAIN, SIZES, Size, SizeName, run_config

PartName = Literal["optimizers", "one-batch", "what-breaks"]
PARTS: tuple[PartName, ...] = ("optimizers", "one-batch", "what-breaks")
"""In the order in which they run: cut short, whole parts are there."""

ONE_BATCH_OPTIMIZERS = ("adamw", "ecd-euler")
EVALUATIONS = 4
SECTORS = ("qk", "vo", "qk_affine", "vo_affine")


@dataclass(frozen=True, kw_only=True)
class SymmetryBreakingConfig:
    """How much to run; the defaults are the protocol."""

    out: Path = Path("symmetry-breaking")
    """Folder of the report and of the runs. Finished runs found in it are not run again."""
    csv: Path | None = None
    """Folder for copies of the tables and figures, symmetry_breaking_*."""
    part: Literal["what-breaks", "optimizers", "one-batch", "all"] = "all"
    """One part, or all three."""
    size: SizeName = "tiny"
    """"tiny" for two cores and an hour; "124m", the published recipe, for a GPU; "seconds" to see that all runs."""
    corpus: str | None = None
    """Another corpus, named as in `erlangen train`; None for that of the size."""
    seeds: int = 5
    """Seeds at the chosen learning rates, from 0."""
    steps: int | None = None
    """Steps of each run; None for those of the size."""
    workers: int | None = None
    """Runs at a time, each on one thread; None for one a core, and one on a GPU."""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, received {self.size!r}")
        if self.part not in (*PARTS, "all"):
            raise ValueError(f"part must be one of {', '.join(PARTS)} or all, received {self.part!r}")
        at_least_one(self, "seeds", *(() if self.steps is None else ("steps",)))

    @property
    def scale(self) -> Size:
        """The size."""
        return SIZES[self.size]

    @property
    def parts(self) -> tuple[PartName, ...]:
        """Those asked for."""
        return PARTS if self.part == "all" else (self.part,)


def quick(out: Path) -> SymmetryBreakingConfig:
    """A size of seconds, to see that everything runs; its numbers say nothing."""
    return SymmetryBreakingConfig(out=out, size="seconds", seeds=2, workers=1)


def cases(part: PartName) -> list[Case]:
    """The cases of a part. Those that two parts have are run once."""
    if part == "what-breaks":
        return [(optimizer, cell) for optimizer in CELL_OPTIMIZERS for cell in CELLS]
    optimizers = ONE_BATCH_OPTIMIZERS if part == "one-batch" else tuple(OPTIMIZERS)
    return [(optimizer, cell) for optimizer in optimizers for cell in (PLAIN, BROKEN)]


def tuning_run(config: SymmetryBreakingConfig, optimizer: str, cell: str, lr: float) -> TrainConfig:
    """A run of the grid."""
    out = config.out / "tuning" / f"{optimizer}-{cell}-{lr:g}"
    return run_config(
        config.scale, optimizer, cell, lr=lr, seed=TUNING_SEED, out=out, evaluations=1, corpus=config.corpus,
        steps=config.steps,
    )  # fmt: skip


def final_run(config: SymmetryBreakingConfig, optimizer: str, cell: str, lr: float, seed: int) -> TrainConfig:
    """A run at the chosen rate. Those of the part on one batch validate once a batch and log every window."""
    often = (optimizer, cell) in cases("one-batch")
    return run_config(
        config.scale, optimizer, cell, lr=lr, seed=seed, out=config.out / "runs" / f"{optimizer}-{cell}-{seed}",
        evaluations=config.scale.batches if often else EVALUATIONS, corpus=config.corpus, steps=config.steps,
        window_losses=often,
    )  # fmt: skip


def read(run: TrainConfig) -> dict[str, Any]:
    """What the log of a finished run says.

    Returns:
        what `_tuned.read` does; and of each of `SECTORS` the relative charge at the end, its mean over layers and heads
        (None where it is not defined, or the run could not go on), and under ``<sector>_largest`` the largest.
    """
    found = _tuned.read(run)
    charges: dict[str, list[float]] = {}
    last = _tuned.validations(run)[-1]
    if found["failure"] is None:
        for sectors in last.get("charges", {}).values():
            for name, heads in sectors.items():
                charges.setdefault(name, []).extend(heads)
    for name in SECTORS:
        heads = charges.get(name)
        found[name] = float(np.mean(heads)) if heads else None
        found[f"{name}_largest"] = max(heads) if heads else None
    return found


def plan(config: SymmetryBreakingConfig, part: PartName) -> Plan:
    """All that a part tunes and runs."""
    return Plan(
        cases=cases(part),
        rates=config.scale.rates,
        tuning_run=functools.partial(tuning_run, config),
        final_run=functools.partial(final_run, config),
        seeds=config.seeds,
        workers=config.workers,
    )


def tune(config: SymmetryBreakingConfig, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Choose the rates of the parts asked for: `_tuned.tune`."""
    chosen = [record for part in config.parts for record in _tuned.tune(plan(config, part), progress)]
    return list({(record["optimizer"], record["arm"]): record for record in chosen}.values())


def measure(
    config: SymmetryBreakingConfig, part: PartName, progress: Progress | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run what a part declares and is not on disk yet: `_tuned.measure`, with the records of `read`.

    Raises:
        ValueError: the folder holds runs of other settings.
    """
    return _tuned.measure(plan(config, part), read, progress)


def window_losses(run: TrainConfig) -> tuple[list[int], np.ndarray]:
    """Held-out losses of a finished run, window by window.

    Returns:
        the steps, without the start, and the losses [steps, windows] in nats a token.
    """
    found = [record for record in _tuned.validations(run) if record["step"] > 0]
    return [record["step"] for record in found], np.array([record["window_losses"] for record in found])


def merged(*records: Records) -> list[dict[str, Any]]:
    """Records of several parts, each run once."""
    unique = {(r["optimizer"], r["arm"], r.get("seed")): dict(r) for part in records for r in part}
    return list(unique.values())
