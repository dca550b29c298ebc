"""The tour: one page on what is done with symmetries here, in five parts that take minutes.

Part one, small transformers on real text, with and without symmetry breaking, under four optimisers. Protocol, fixed
before any run:

- Data: the Python standard library's source, as bytes; a tenth or so of its files held out.
- Model: 2 layers, 4 heads, width 64, context 64, learned biases everywhere (as in the code published with the paper).
- Arms: symmetric, and broken with the published biases (query mean 0.5, deviation 0.05 to 0.15; value mean 0,
  deviation 0.05; drawn on every forward, the mean in evaluation).
- Optimisers: AdamW, SGD with momentum, SOAP, ECD (exact kick). One learning rate each, the best of a scan over both
  arms on a seed the tour does not use (benchmarks/tour_learning_rates.py); no clipping, cosine schedule.
- Seeds 0, 1, 2 for each of the eight arms. A seed sets initial weights, order of the data and draws of the biases, so
  that the two arms of an optimiser form pairs.
- Measure: loss at the last step on one fixed set of windows. Rule: the mean over seeds of (broken − symmetric) with
  its 95 % Student interval; a difference is called only where the interval leaves out zero.

Part two, attention between poses: `erlangen.studies.tour_lie`. Part three, motifs that were never seen and the other
strand: `erlangen.studies.tour_finite`. Part four, a model of part one in other numbers: `erlangen.studies.tour_gauge`.
Part five, the symmetry of heads broken or reduced: `erlangen.studies.tour_quotient`.
"""

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import erlangen
from erlangen import lm, report
from erlangen._extras import require
from erlangen.lm import BreakingConfig, DataConfig, GPTConfig, OptimizerConfig, TrainConfig
from erlangen.lm.settings import OptimizerName, to_dict
from erlangen.optim import OPTIMIZERS

from . import _runs, finite_motifs, lie_completion, tour_finite, tour_gauge, tour_lie, tour_quotient
from ._jobs import Progress, at_least_one
from ._jobs import execute as execute_jobs
from ._reading import Part, by_seed, verdict, with_error
from ._runs import is_finished as is_finished

LEARNING_RATES: dict[OptimizerName, float] = {"adamw": 3e-3, "sgdm": 0.1, "soap": 3e-2, "ecd": 3.0}
"""Learning rate of each optimiser, from the scan in benchmarks/results/tour_learning_rates.csv."""

TITLES = {"adamw": "AdamW", "sgdm": "SGD with momentum", "soap": "SOAP", "ecd": "ECD"}
ARMS = ("symmetric", "broken")


@dataclass(frozen=True, kw_only=True)
class TourConfig:
    """How large a tour to take."""

    out: Path = Path("tour")
    """Folder of the report and of the runs. Finished runs found in it are not run again."""
    seeds: int = 3
    """Seeds for each arm."""
    steps: int = 500
    """Steps of each run of part one; those of part two are 6/5 as many, of part three 3/10, of part five 1/6."""
    workers: int | None = None
    """Runs at a time, each on one thread; None for one a core."""

    def __post_init__(self) -> None:
        at_least_one(self, "seeds", "steps")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the tour."""

    optimizer: OptimizerName
    arm: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        return f"{self.optimizer}-{self.arm}-{self.seed}"


def run_config(
    optimizer: OptimizerName, arm: str, *, seed: int, steps: int, out: Path, lr: float | None = None
) -> TrainConfig:
    """The declared configuration of one run."""
    return TrainConfig(
        data=DataConfig(corpus="stdlib"),
        model=GPTConfig(context_length=64, num_layers=2, num_heads=4, dim=64),
        optimizer=OptimizerConfig(name=optimizer, lr=LEARNING_RATES[optimizer] if lr is None else lr),
        breaking=BreakingConfig(enabled=arm == "broken"),
        steps=steps,
        batch_size=16,
        warmup=steps // 20,
        eval_every=max(1, steps // 12),
        eval_windows=256,
        checkpoint_every=max(1, steps),
        keep_checkpoints=1,
        device="cpu",
        seed=seed,
        out=out,
    )


def declared_runs(config: TourConfig) -> list[Run]:
    """All runs, seed by seed, so that a tour cut short has compared like with like."""
    return [
        Run(optimizer=optimizer, arm=arm, seed=seed, config=run_config(
            optimizer, arm, seed=seed, steps=config.steps, out=config.out / "runs" / f"{optimizer}-{arm}-{seed}"
        ))
        for seed in range(config.seeds)
        for optimizer in LEARNING_RATES
        for arm in ARMS
    ]  # fmt: skip


# Running


def execute(configs: Sequence[TrainConfig], *, workers: int | None = None, progress: Progress | None = None) -> None:
    """Run every config that is not on disk yet, several at a time, each on one thread."""
    execute_jobs(_runs.jobs(configs), workers=workers, progress=progress)


# Reading


def _read(run: Run) -> dict[str, Any]:
    records = _runs.records(run.config)
    validation = [record for record in records if "validation_loss" in record]
    charges = [record for record in validation if "charges" in record]

    def largest(sector: str) -> list[float]:
        """Over layers and heads; the affine charge where there is one: a mean beside learned biases breaks nothing."""
        return [
            max(max(sectors.get(f"{sector}_affine", sectors[sector])) for sectors in record["charges"].values())
            for record in charges
        ]

    return {
        "optimizer": run.optimizer,
        "arm": run.arm,
        "seed": run.seed,
        "steps": [record["step"] for record in validation],
        "validation": [record["validation_loss"] for record in validation],
        "standard_error": validation[-1]["validation_standard_error"],
        "charge_steps": [record["step"] for record in charges],
        "qk": largest("qk"),
        "vo": largest("vo"),
        "milliseconds": 1e3 * float(np.median([record["seconds"] for record in records if "seconds" in record])),
    }


def _select(results: Sequence[Mapping[str, Any]], optimizer: str, arm: str, key: str) -> np.ndarray:
    """[seeds, ...]."""
    return np.array([result[key] for result in by_seed(results, optimizer=optimizer, arm=arm)], dtype=float)


def compare(results: Sequence[Mapping[str, Any]]) -> dict[OptimizerName, dict[str, Any]]:
    """For each optimiser: final losses of both arms, and the paired difference with its interval."""
    comparison: dict[OptimizerName, dict[str, Any]] = {}
    for optimizer in LEARNING_RATES:
        final = {arm: _select(results, optimizer, arm, "validation")[:, -1] for arm in ARMS}
        difference = final["broken"] - final["symmetric"]
        comparison[optimizer] = {
            "final": final,
            "difference": difference,
            "interval": (interval := report.paired_interval(difference)),
            "verdict": verdict("broken", "symmetric", interval),
        }
    return comparison


# Reporting


def _results_table(comparison: Mapping[OptimizerName, Mapping[str, Any]]) -> report.Table:
    rows = [
        (
            TITLES[optimizer],
            *(with_error(row["final"][arm], ".3f", ".3f") for arm in ARMS),
            row["interval"],
            row["verdict"],
        )
        for optimizer, row in comparison.items()
    ]
    return report.Table(
        columns=("Optimiser", "Symmetric", "Broken", "Broken − symmetric", "Reading"),
        rows=rows,
        caption="Validation loss at the last step, nats a byte: mean over seeds ± standard error of that mean.",
        note=(
            "The difference is taken seed by seed, with its 95 % interval. With few seeds the intervals are wide, and "
            "four are looked at together."
        ),
        formats={"Broken − symmetric": "+.3f"},
    )


def _optimizers_table(results: Sequence[Mapping[str, Any]]) -> report.Table:
    rows = [
        (
            TITLES[optimizer],
            lr,
            OPTIMIZERS[optimizer].state_floats,
            *(float(np.median(_select(results, optimizer, arm, "milliseconds"))) for arm in ARMS),
        )
        for optimizer, lr in LEARNING_RATES.items()
    ]
    return report.Table(
        columns=("Optimiser", "Learning rate", "State, numbers a parameter", "Step, ms", "Step broken, ms"),
        rows=rows,
        caption="The optimisers: learning rate, memory beside the weights and gradients, and median time of a step.",
        note="Times are of whole steps on one thread each while every core is busy; they are no benchmark.",
        formats={"Learning rate": "g", "Step, ms": ".1f", "Step broken, ms": ".1f"},
    )


def _seeds_table(comparison: Mapping[OptimizerName, Mapping[str, Any]]) -> report.Table:
    rows = [
        (
            TITLES[optimizer],
            seed,
            row["final"]["symmetric"][seed],
            row["final"]["broken"][seed],
            row["difference"][seed],
        )
        for optimizer, row in comparison.items()
        for seed in range(len(row["difference"]))
    ]
    return report.Table(
        columns=("Optimiser", "Seed", "Symmetric", "Broken", "Difference"),
        rows=rows,
        caption="Every run: validation loss at the last step, nats a byte.",
        formats={"Seed": "d", "Symmetric": ".4f", "Broken": ".4f", "Difference": "+.4f"},
    )


def _panels(results: Sequence[Mapping[str, Any]], x: str, y: str) -> dict[str, list[report.Series]]:
    return {
        TITLES[optimizer]: [
            report.Series(arm, _select(results, optimizer, arm, x)[0], _select(results, optimizer, arm, y), group=arm)
            for arm in reversed(ARMS)
        ]
        for optimizer in LEARNING_RATES
    }


def _charge_figure(results: Sequence[Mapping[str, Any]], sector: str) -> str:
    panels = _panels(results, "charge_steps", sector)
    return report.small_multiples(panels, x_label="step", y_label="largest relative charge", log_y=True)


def breaking_part(config: TourConfig, results: Sequence[Mapping[str, Any]]) -> Part:
    """Part one of the page."""
    comparison = compare(results)
    results_table, seeds_table = _results_table(comparison), _seeds_table(comparison)
    optimizers_table = _optimizers_table(results)
    first = run_config("adamw", "broken", seed=0, steps=config.steps, out=config.out)
    model, broken = first.model, first.breaking
    parameters = sum(p.numel() for p in lm.GPT(replace(model, vocab_size=256)).parameters())
    spread = float(np.mean([result["standard_error"] for result in results]))
    tokens = first.batch_size * model.context_length * config.steps
    sections = [
        report.Section("Part one: breaking the symmetry of heads", [
            f"{len(results)} transformers of {parameters:,} parameters ({model.num_layers} layers, {model.num_heads} "
            f"heads, width {model.dim}, context {model.context_length}), each trained for {config.steps} steps on "
            f"{tokens:,} bytes of the Python standard library's source, half of them with the symmetry of their heads "
            f"broken. {config.seeds} seeds an arm; a seed fixes the initial weights, the order of the data and the "
            "draws, so the two arms of an optimiser are compared pair by pair.",
            "Rotating the queries and keys of a head together changes nothing a transformer computes. Breaking adds a "
            f"vector to the queries of each layer (mean {broken.query_mean:g}, deviation {broken.query_std[0]:g} to "
            f"{broken.query_std[1]:g}) and one to the values (deviation {broken.value_std[0]:g}), drawn afresh on "
            "every training step and never learned; in evaluation the mean is used.",
            "The rule was fixed before the runs: the loss at the last step, on one fixed set of held-out windows, "
            "broken minus symmetric, and a difference is called only where its 95 % interval leaves out zero.",
        ]),
        report.Section("Does breaking the symmetry help?", [
            results_table,
            report.Figure(
                report.intervals(
                    [
                        report.IntervalRow(TITLES[o], *row["interval"], points=tuple(row["difference"]))
                        for o, row in comparison.items()
                    ],
                    x_label="validation loss, broken − symmetric (nats a byte)",
                ),
                "Difference in final validation loss: mean, 95 % interval, each seed. Left of zero, breaking helps.",
                "Forest plot of the paired differences in the table above.",
            ),
            f"Each loss is itself measured to about ±{spread:.3f}, the standard error over the validation windows. The "
            "windows are the same for all runs, so most of it cancels in a difference.",
        ]),
        report.Section("Training", [
            report.Figure(
                report.small_multiples(
                    _panels(results, "steps", "validation"), x_label="step", y_label="validation loss (nats a byte)"
                ),
                "Validation loss during training: mean over seeds, a band of ± one standard error, every seed thin.",
                "Loss curves of the broken and the symmetric arm, one panel an optimiser.",
            ),
        ]),
        report.Section("The charges", [
            "Each rotation of a head has a conserved charge, its angular momentum in weight space. Momentum descent "
            "and ECD conserve it (here in 32-bit arithmetic, so at rounding, about 1e-7); AdamW and SOAP prefer axes "
            "and do not. The noise of a broken model drives the charge away from zero; its mean would not, since "
            "learned biases stand beside it.",
            report.Figure(
                _charge_figure(results, "qk"),
                "Query–key charge, the largest over layers and heads; for broken models the affine one.",
                "Query–key charges on a logarithmic axis, one panel an optimiser.",
            ),
            report.Figure(
                _charge_figure(results, "vo"),
                "Value–output charge, the same way.",
                "Value–output charges on a logarithmic axis, one panel an optimiser.",
            ),
        ]),
        report.Section("Every run", [seeds_table, optimizers_table]),
    ]  # fmt: skip
    verdicts = "; ".join(f"{TITLES[optimizer]}: {row['verdict']}" for optimizer, row in comparison.items())
    return Part(
        summary=f"Small transformers on real text, with and without a preferred direction in their heads. {verdicts}.",
        sections=sections,
        tables={"results": results_table, "seeds": seeds_table, "optimizers": optimizers_table},
    )


def write_report(
    config: TourConfig,
    results: Sequence[Mapping[str, Any]],
    poses: Sequence[Mapping[str, Any]],
    motifs: Sequence[Mapping[str, Any]],
    moved: Sequence[Mapping[str, Any]],
    reduced: Sequence[Mapping[str, Any]],
    seconds: float,
) -> Path:
    """The HTML report, with JSON and CSV beside it.

    Args:
        config: what was run.
        results: of the runs of part one.
        poses: records of part two, from `lie_completion.measure`.
        motifs: records of part three, from `tour_finite.measure`.
        moved: records of part four, from `tour_gauge.measure`.
        reduced: records of part five, from `tour_quotient.measure`.
        seconds: what this call took.
    """
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, erlangen {erlangen.__version__}"
    )
    parts = [
        breaking_part(config, results),
        tour_lie.part(_poses_config(config), poses),
        tour_finite.part(_motifs_config(config), motifs),
        tour_gauge.part(moved),
        tour_quotient.part(reduced),
    ]
    reading = report.Section("How to read this", [
        "These models are small and their training short: the tour shows the instruments, not a verdict on models "
        "of other sizes. In part one, one learning rate an optimiser was chosen on another seed, from a scan over both "
        "arms (`benchmarks/results/tour_learning_rates.csv`). Optimisers are not ranked here: their scans were coarse. "
        "In parts two and three the rates come from such scans too "
        "(`benchmarks/results/lie_completion_learning_rates.csv` and `finite_motifs_learning_rates.csv`), in "
        "part five they are the middle of a grid (`docs/break-or-reduce.md`).",
        f"Made by `erlangen tour --seeds {config.seeds} --steps {config.steps}` on {machine}; its last call took "
        f"{seconds:.0f} s. The logs of all runs are in the folders `runs`, `lie`, `finite` and `quotient` beside this "
        "file.",
    ])  # fmt: skip
    html = report.page(
        "A tour of symmetry in attention",
        [part.summary for part in parts],
        [*(section for part in parts for section in part.sections), reading],
    )
    return report.write_report(
        config.out,
        "tour",
        html,
        {
            "config": to_dict(config),
            "seconds": seconds,
            "machine": machine,
            "runs": results,
            "lie": poses,
            "finite": motifs,
            "gauge": moved,
            "quotient": reduced,
        },
        {key: table for part in parts for key, table in part.tables.items()},
    )


def _poses_config(config: TourConfig) -> lie_completion.CompletionConfig:
    return tour_lie.declared_config(out=config.out / "lie", seeds=config.seeds, steps=max(1, 6 * config.steps // 5))


def _motifs_config(config: TourConfig) -> finite_motifs.MotifConfig:
    return tour_finite.declared_config(
        out=config.out / "finite", seeds=config.seeds, steps=max(1, 3 * config.steps // 10)
    )


def _reduction_runs(config: TourConfig) -> list[tour_quotient.Run]:
    return tour_quotient.declared_runs(out=config.out / "quotient", seeds=config.seeds, steps=max(1, config.steps // 6))


def _models(config: TourConfig) -> tuple[dict[str, Path], torch.Tensor]:
    """Folders of the runs that part four compares, and the text."""
    runs = {"AdamW, seed 0": "adamw-symmetric-0", "SGD with momentum, seed 0": "sgdm-symmetric-0"}
    if config.seeds > 1:
        runs["AdamW, seed 1"] = "adamw-symmetric-1"
    return {name: config.out / "runs" / run for name, run in runs.items()}, tour_gauge.text_of(
        _runs.corpus(DataConfig(corpus="stdlib"))
    )


def tour(config: TourConfig, *, progress: Progress | None = None) -> Path:
    """Run what is declared and not on disk yet, and write the report.

    Returns:
        the path of the HTML file; JSON and CSV lie beside it.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the folder holds runs with other settings.
    """
    require("matplotlib", "report")
    started = time.monotonic()
    poses, motifs = _poses_config(config), _motifs_config(config)
    runs, reduced = declared_runs(config), _reduction_runs(config)
    declared = [
        *lie_completion.declared_jobs(poses, lie_completion.kept_cells(poses)),
        *tour_finite.declared_jobs(motifs, finite_motifs.kept_cells(motifs)),
    ]
    jobs = [
        *declared,
        *_runs.jobs([run.config for run in runs]),
        *_runs.jobs([run.config for run in reduced]),
    ]
    execute_jobs(jobs, workers=config.workers, progress=progress)
    measured = lie_completion.measure(poses), tour_finite.measure(motifs), tour_gauge.measure(*_models(config))
    return write_report(
        config,
        [_read(run) for run in runs],
        *measured,
        tour_quotient.measure(reduced),
        time.monotonic() - started,
    )
