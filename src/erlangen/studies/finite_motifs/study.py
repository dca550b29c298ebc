"""What is run: sizes, the cells of the study, and the scan of learning rates."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erlangen import report

from .._jobs import Cells, Job, Progress, Tick, at_least_one, execute
from .arms import ARMS, PENALTY, TRAINED, dial_values, score, train
from .tasks import TASKS, random_data

LEARNING_RATES = {"strict": 1e-2, "dial": 1e-2, "free": 3e-3, "augmentation": 3e-3}
"""Learning rate of each trained arm, from benchmarks/results/finite_motifs_learning_rates.csv."""
SCANNED = (1e-3, 3e-3, 1e-2)
SCAN_SEED = 1000


@dataclass(frozen=True, kw_only=True)
class MotifConfig:
    """How much to run; the defaults are the protocol."""

    out: Path = Path("finite_motifs")
    """Folder of the report. Finished cells found in its cells.jsonl are not run again."""
    csv: Path | None = None
    """Folder for copies of the tables, finite_motifs_*.csv."""
    tasks: tuple[str, ...] = TASKS
    """Tasks: palindrome, strand."""
    seeds: int = 5
    """Seeds of each arm; a seed draws motifs, windows and initial weights."""
    steps: int = 400
    """Steps of training."""
    batch_size: int = 32
    """Windows a step."""
    train_size: int = 2048
    """Training windows."""
    test_size: int = 512
    """Test windows with seen motifs, and as many with unseen ones; each is read from both strands."""
    workers: int | None = None
    """Processes, each on one thread; None for one a core."""

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks must be of {', '.join(TASKS)}, received {', '.join(unknown) or 'none'}")
        at_least_one(self, "seeds", "steps", "batch_size", "train_size", "test_size")


def quick(out: Path) -> MotifConfig:
    """A size of seconds, to see that everything runs; its numbers say nothing."""
    return MotifConfig(out=out, seeds=2, steps=2, batch_size=8, train_size=16, test_size=8, workers=1)


def makes(arm: str) -> tuple[str, ...]:
    """The arms that come of training one: the average over both strands is of the free model."""
    return (arm, "post-hoc") if arm == "free" else (arm,)


def _cell(tick: Tick, config: MotifConfig, task: str, arm: str, seed: int) -> list[dict[str, Any]]:
    """One seed of one trained arm; of the free one also its average over both strands."""
    data = random_data(task, seed, train_size=config.train_size, test_size=config.test_size)
    started = time.perf_counter()
    model = train(
        arm, data.train, seed=seed, steps=config.steps, batch_size=config.batch_size, lr=LEARNING_RATES[arm], tick=tick
    )
    seconds = time.perf_counter() - started
    records = []
    for name in makes(arm):
        records.append(
            {"key": f"{task}/{name}/{seed}", "task": task, "arm": name, "seed": seed}
            | {test: score(model, windows, both=name == "post-hoc") for test, windows in data.tests.items()}
            | {"parameters": sum(p.numel() for p in model.parameters()), "seconds": seconds}
            | {"dials": dial_values(model)}
        )
    return records


def _settings(config: MotifConfig) -> dict[str, Any]:
    """What the cells depend on, apart from which of them there are."""
    names = ("steps", "batch_size", "train_size", "test_size")
    rates = {"learning_rates": LEARNING_RATES, "penalty": PENALTY}
    return {"study": "finite_motifs", **rates, **{n: getattr(config, n) for n in names}}


def kept_cells(config: MotifConfig) -> Cells:
    """The cells of earlier runs.

    Raises:
        ValueError: the folder holds cells of other settings.
    """
    return Cells(config.out / "cells.jsonl", _settings(config))


def declared_jobs(config: MotifConfig, cells: Cells) -> list[Job]:
    """All jobs, seed by seed, so that a study cut short has compared like with like; results go to the cells."""
    return [
        Job(
            work=_cell, arguments=(config, task, arm, seed), steps=config.steps, keep=cells.add,
            finished=all(f"{task}/{name}/{seed}" in cells.records for name in makes(arm)),
        )
        for seed in range(config.seeds) for task in config.tasks for arm in TRAINED
    ]  # fmt: skip


def measure(config: MotifConfig, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Run what is declared and not on disk yet.

    Returns:
        a record a cell: task, arm and seed; what `arms.score` gives on the windows with ``seen`` and ``unseen`` motifs;
        ``parameters``; ``seconds`` of training, those of the free model for its average; ``dials``, what
        `arms.dial_values` gives.

    Raises:
        ValueError: the folder holds cells of other settings.
    """
    cells = kept_cells(config)
    execute(declared_jobs(config, cells), workers=config.workers, progress=progress)
    chosen = [r for r in cells.records.values() if r["task"] in config.tasks and r["seed"] < config.seeds]
    return sorted(chosen, key=lambda r: (config.tasks.index(r["task"]), ARMS.index(r["arm"]), r["seed"]))


# The scan of learning rates


def scan(config: MotifConfig, progress: Progress | None = None) -> Path:
    """The scan of learning rates of the protocol, to a CSV file; returns its path."""
    cells = Cells(config.out / "scan.jsonl", _settings(config) | {"learning_rates": SCANNED})
    cases = {f"{arm}/{lr:g}": (config, arm, lr) for arm in TRAINED for lr in SCANNED}
    jobs = [
        Job(work=_scan_cell, arguments=case, steps=config.steps, finished=key in cells.records, keep=cells.add)
        for key, case in cases.items()
    ]
    execute(jobs, workers=config.workers, progress=progress)
    path = (config.csv or config.out) / "finite_motifs_learning_rates.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [cells.records[key] for key in cases]
    columns = [name for name in records[0] if name != "key"]
    path.write_text(report.Table(columns, [[r[c] for c in columns] for r in records], "").csv())
    return path


def _scan_cell(tick: Tick, config: MotifConfig, arm: str, lr: float) -> list[dict[str, Any]]:
    task = "palindrome"
    data = random_data(task, SCAN_SEED, train_size=config.train_size, test_size=config.test_size)
    model = train(arm, data.train, seed=SCAN_SEED, steps=config.steps, batch_size=config.batch_size, lr=lr, tick=tick)
    found = {f"{test}_{k}": v for test in data.tests for k, v in score(model, data.tests[test]).items()}
    return [{"key": f"{arm}/{lr:g}", "task": task, "arm": arm, "seed": SCAN_SEED, "lr": lr, **found}]
