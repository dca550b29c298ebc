"""What is run: sizes, the cells of the study, and the scan of learning rates."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erlangen import lie, report

from .._jobs import Cells, Job, Progress, Tick, at_least_one, execute
from .arms import LEARNED, InvariantCompletion, VectorCompletion, count_parameters, formula, train
from .checks import invariance_errors, large_moves
from .tasks import CEILING, GROUPS, TASKS, TEST_SEED, completion_error, random_task, test_set

LEARNING_RATES = {"closed form": 3e-2, "learned kernel": 3e-2, "vectors": 3e-3}
"""Learning rate of each learned arm, from benchmarks/results/lie_completion_learning_rates.csv."""
SCANNED = {"closed form": (3e-3, 1e-2, 3e-2), "learned kernel": (3e-3, 1e-2, 3e-2), "vectors": (1e-3, 3e-3, 1e-2)}
TRAIN_SEED, SCAN_SEED = 20_000, 1000


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """How much to run; the defaults are the protocol."""

    out: Path = Path("lie_completion")
    """Folder of the report. Finished cells found in its cells.jsonl are not run again."""
    csv: Path | None = None
    """Folder for copies of the tables, lie_completion_*.csv."""
    tasks: tuple[str, ...] = TASKS
    """Tasks: sequence, mixture."""
    groups: tuple[str, ...] = GROUPS
    """Groups, by name."""
    mixture_groups: tuple[str, ...] | None = None
    """Groups of the task mixture, which costs more; None for all of the groups."""
    seeds: int = 5
    """Seeds of each learned arm."""
    steps: int = 600
    """Steps of training."""
    batch_size: int = 32
    """Sequences a step."""
    train_size: int = 1024
    """Training sequences, the same for all arms and seeds."""
    test_size: int = 128
    """Test sequences of a task and group, the same for all seeds."""
    workers: int | None = None
    """Processes, each on one thread; None for one a core."""

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks must be of {', '.join(TASKS)}, received {', '.join(unknown) or 'none'}")
        if not self.groups:
            raise ValueError("groups must name at least one group, received none")
        for group in (*self.groups, *(self.mixture_groups or ())):
            lie.parse(group)
        at_least_one(self, "seeds", "steps", "batch_size", "train_size", "test_size")

    @property
    def cases(self) -> list[tuple[str, str]]:
        """The tasks and groups to run."""
        groups = {"sequence": self.groups, "mixture": self.mixture_groups or self.groups}
        return [(task, group) for task in self.tasks for group in groups[task]]

    @property
    def case_groups(self) -> list[str]:
        """The groups of the cases, each once."""
        return list(dict.fromkeys(group for _, group in self.cases))


def quick(out: Path) -> CompletionConfig:
    """A size of seconds, to see that everything runs; its numbers say nothing."""
    return CompletionConfig(
        out=out, groups=("SE2", "SO3"), seeds=2, steps=8, batch_size=8, train_size=16, test_size=8, workers=1
    )


# The cells


def _invariance(group: lie.Group, model: Any, given: Tensor) -> dict[str, dict[str, list[float]]]:
    moves = large_moves(group, len(given), torch.Generator().manual_seed(TEST_SEED + 1))
    found = {}
    for dtype in (torch.float32, torch.float64):
        complete: Callable[[Tensor], Tensor] = model
        if isinstance(model, (InvariantCompletion, VectorCompletion)):
            complete = model.to(dtype).complete
        found[str(dtype).removeprefix("torch.")] = invariance_errors(group, complete, given.to(dtype), moves)
    return found


def _errors(group: lie.Group, answer: Tensor, missing: Tensor) -> dict[str, float | int]:
    error = completion_error(group, answer, missing)
    return {"median": float(error.median()), "mean": float(error.mean()), "outside": int((error >= CEILING).sum())}


def _learned_cells(
    tick: Tick, config: CompletionConfig, task: str, name: str, arm: str, seeds: list[int]
) -> list[dict[str, Any]]:
    """Some seeds of one learned arm."""
    group = lie.parse(name)
    given, missing = random_task(group, task, config.train_size, torch.Generator().manual_seed(TRAIN_SEED))
    test_given, test_missing = test_set(group, task, config.test_size)
    started = time.perf_counter()
    models = train(
        group, arm, given, missing, seeds=seeds, steps=config.steps, batch_size=config.batch_size,
        lr=LEARNING_RATES[arm], tick=tick,
    )  # fmt: skip
    seconds = (time.perf_counter() - started) / len(seeds)
    records = []
    for seed, model in zip(seeds, models):
        answer = model.complete(test_given.float()).double()
        records.append(
            {"key": f"{task}/{name}/{arm}/{seed}", "task": task, "group": name, "arm": arm, "seed": seed}
            | _errors(group, answer, test_missing)
            | count_parameters(model)
            | {"seconds": seconds, "invariance": _invariance(group, model, test_given[:64])}
            | {"first_answer": answer[0].tolist()}
        )
    return records


def _fixed_cells(tick: Tick, config: CompletionConfig, task: str, name: str) -> list[dict[str, Any]]:
    """What needs no seed: the formula, and how far the nearest given element is."""
    group = lie.parse(name)
    given, missing = test_set(group, task, config.test_size)

    def complete(poses: Tensor) -> Tensor:
        return formula(group, poses)

    answer = complete(given)
    spacing = torch.stack([completion_error(group, given[:, i], missing) for i in range(given.shape[1])]).amin(0)
    record = {"key": f"{task}/{name}/formula/0", "task": task, "group": name, "arm": "formula", "seed": 0}
    return [
        record
        | _errors(group, answer, missing)
        | {"score_parameters": 0, "parameters": 0, "spacing": float(spacing.median())}
        | {"invariance": _invariance(group, complete, given[:64]), "first_answer": answer[0].tolist()}
    ]


def _settings(config: CompletionConfig) -> dict[str, Any]:
    """What the cells depend on, apart from which of them there are."""
    names = ("steps", "batch_size", "train_size", "test_size")
    return {"study": "lie_completion", "learning_rates": LEARNING_RATES, **{n: getattr(config, n) for n in names}}


def kept_cells(config: CompletionConfig) -> Cells:
    """The cells of earlier runs.

    Raises:
        ValueError: the folder holds cells of other settings.
    """
    return Cells(config.out / "cells.jsonl", _settings(config))


def declared_jobs(config: CompletionConfig, cells: Cells) -> list[Job]:
    """All jobs; what they make is added to the cells."""
    jobs = []
    for task, name in config.cases:
        finished = not cells.missing(f"{task}/{name}/formula", 1)
        jobs.append(Job(work=_fixed_cells, arguments=(config, task, name), finished=finished, keep=cells.add))
        for arm in LEARNED:
            seeds = cells.missing(f"{task}/{name}/{arm}", config.seeds)
            arguments = (config, task, name, arm, seeds)
            jobs.append(
                Job(work=_learned_cells, arguments=arguments, steps=config.steps, finished=not seeds, keep=cells.add)
            )
    return jobs


def measure(config: CompletionConfig, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Run what is declared and not on disk yet.

    Returns:
        a record a cell: task, group, arm and seed; ``median`` and ``mean`` of the error, and ``outside``, how many
        are at the ceiling; parameters; ``invariance``, by precision and kind of move the median and the largest error;
        ``first_answer``, that to the first test sequence, which cells of earlier versions do not have; of learned arms
        ``seconds``, of the formula ``spacing``, the median distance to the nearest given element.

    Raises:
        ValueError: the folder holds cells of other settings.
    """
    cells = kept_cells(config)
    execute(declared_jobs(config, cells), workers=config.workers, progress=progress)
    return [r for r in cells.records.values() if (r["task"], r["group"]) in config.cases and r["seed"] < config.seeds]


# The scan of learning rates


def scan(config: CompletionConfig, progress: Progress | None = None) -> Path:
    """The scan of learning rates of the protocol, to a CSV file; returns its path."""
    cells = Cells(config.out / "scan.jsonl", _settings(config) | {"learning_rates": SCANNED})
    cases = {f"sequence/{arm}/{lr:g}": (config, arm, lr) for arm in LEARNED for lr in SCANNED[arm]}
    jobs = [
        Job(work=_scan_cell, arguments=case, steps=config.steps, finished=key in cells.records, keep=cells.add)
        for key, case in cases.items()
    ]
    execute(jobs, workers=config.workers, progress=progress)
    path = (config.csv or config.out) / "lie_completion_learning_rates.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [cells.records[key] for key in cases]
    columns = [name for name in records[0] if name != "key"]
    path.write_text(report.Table(columns, [[r[c] for c in columns] for r in records], "").csv())
    return path


def _scan_cell(tick: Tick, config: CompletionConfig, arm: str, lr: float) -> list[dict[str, Any]]:
    task = "sequence"
    group = lie.parse("SE2")
    given, missing = random_task(group, task, config.train_size, torch.Generator().manual_seed(SCAN_SEED))
    test = random_task(group, task, config.test_size, torch.Generator().manual_seed(SCAN_SEED + 1))
    place = group.random(config.test_size, generator=torch.Generator().manual_seed(SCAN_SEED), dtype=torch.float64)
    test_given, test_missing = (group.compose(place[:, None], elements) for elements in test)
    (model,) = train(
        group, arm, given, missing, seeds=[SCAN_SEED], steps=config.steps, batch_size=config.batch_size, lr=lr,
        tick=tick,
    )  # fmt: skip
    found = _errors(group, model.complete(test_given.float()).double(), test_missing)
    return [
        {"key": f"{task}/{arm}/{lr:g}", "task": task, "group": "SE2", "arm": arm, "seed": SCAN_SEED, "lr": lr, **found}
    ]
