"""The tour: small transformers on real text, with and without symmetry breaking, under four optimisers.

Protocol, fixed before any run:

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
"""

import json
import math
import multiprocessing
import os
import platform
import queue
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import erlangen
from erlangen import lm, report
from erlangen._extras import require
from erlangen.lm import BreakingConfig, DataConfig, GPTConfig, OptimizerConfig, TrainConfig
from erlangen.lm.checkpoint import checkpoints
from erlangen.lm.logs import read_jsonl
from erlangen.lm.settings import OptimizerName, to_dict
from erlangen.lm.train import stop_on_signal
from erlangen.optim import OPTIMIZERS

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
    """Steps of each run."""
    workers: int | None = None
    """Runs at a time, each on one thread; None for one a core."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, received {getattr(self, name)}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, received {self.workers}")


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


Progress = Callable[[int, int], None]
"""Called with the steps done and the steps there are, over all runs."""


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


class _Worker:
    """What a worker process keeps between runs."""

    steps: Any
    stop: Any
    corpora: ClassVar[dict[str, lm.Corpus]] = {}


def _worker_start(steps: Any, stop: Any) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop; a run in progress hears Ctrl-C itself
    _Worker.steps, _Worker.stop = steps, stop


def _work(config: TrainConfig) -> bool:
    """Run, or go on with, one run in a worker; whether it finished."""
    assert config.out is not None
    if _Worker.stop.is_set():
        return False
    source = config.data.corpus
    if source not in _Worker.corpora:
        _Worker.corpora[source] = lm.load_corpus(source)

    def progress(step: int, record: Mapping[str, Any]) -> None:
        _Worker.steps.put((str(config.out), step))
        if _Worker.stop.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    if checkpoints(config.out):
        return lm.resume(config.out, corpus=_Worker.corpora[source], progress=progress).finished
    return lm.train(config, corpus=_Worker.corpora[source], progress=progress).finished


def is_finished(config: TrainConfig) -> bool:
    """Whether this very run is on disk, whole.

    Raises:
        ValueError: another run is there.
    """
    assert config.out is not None
    path = config.out / "config.json"
    if not path.exists():
        return False
    expected = json.loads(json.dumps(to_dict(replace(config, model=replace(config.model, vocab_size=256)))))
    if json.loads(path.read_text()) != expected:
        raise ValueError(
            f"{config.out} holds a run with other settings: remove {config.out.parent} or choose another folder"
        )
    log = config.out / "log.jsonl"
    return log.exists() and any(
        record["step"] == config.steps and "validation_loss" in record for record in read_jsonl(log)
    )


def execute(configs: Sequence[TrainConfig], *, workers: int | None = None, progress: Progress | None = None) -> None:
    """Run every config that is not on disk yet, several at a time, each on one thread.

    Ctrl-C or SIGTERM stops the runs after their current step; what they wrote is found again by the next call.
    """
    total = sum(config.steps for config in configs)
    todo = [config for config in configs if not is_finished(config)]
    done = {str(config.out): 0 for config in todo}
    before = total - sum(config.steps for config in todo)
    context = multiprocessing.get_context("spawn")
    steps, stop = context.Queue(), context.Event()
    workers = min(workers or os.cpu_count() or 1, max(1, len(todo)))
    with stop_on_signal() as told, ProcessPoolExecutor(workers, context, _worker_start, (steps, stop)) as pool:
        pending: set[Future[bool]] = {pool.submit(_work, config) for config in todo}
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                while True:
                    try:
                        name, step = steps.get_nowait()
                    except queue.Empty:
                        break
                    done[name] = step
                if progress is not None:
                    progress(before + sum(done.values()), total)
                if told.is_set() or not all(future.result() for future in finished):
                    raise KeyboardInterrupt
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


# Reading


def _read(run: Run) -> dict[str, Any]:
    assert run.config.out is not None
    records = read_jsonl(run.config.out / "log.jsonl")
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
    """[seeds, ...], in order of the seed."""
    chosen = sorted((r for r in results if r["optimizer"] == optimizer and r["arm"] == arm), key=lambda r: r["seed"])
    return np.array([r[key] for r in chosen], dtype=float)


def _verdict(interval: report.Interval) -> str:
    if not math.isfinite(interval.low):
        return "one seed: no interval"
    if interval.high < 0:
        return "broken is better"
    if interval.low > 0:
        return "broken is worse"
    return "no difference shown"


def compare(results: Sequence[Mapping[str, Any]]) -> dict[OptimizerName, dict[str, Any]]:
    """For each optimiser: final losses of both arms, and the paired difference with its interval."""
    comparison: dict[OptimizerName, dict[str, Any]] = {}
    for optimizer in LEARNING_RATES:
        final = {arm: _select(results, optimizer, arm, "validation")[:, -1] for arm in ARMS}
        difference = final["broken"] - final["symmetric"]
        comparison[optimizer] = {
            **{arm: report.mean_and_standard_error(final[arm]) for arm in ARMS},
            "final": final,
            "difference": difference,
            "interval": report.paired_interval(difference),
        }
    return comparison


# Reporting


def _with_error(mean: float, error: float) -> str:
    return f"{mean:.3f}" if not math.isfinite(error) else f"{mean:.3f}\u00a0±\u00a0{error:.3f}"


def _results_table(comparison: Mapping[OptimizerName, Mapping[str, Any]]) -> report.Table:
    rows = [
        (
            TITLES[optimizer],
            _with_error(*row["symmetric"]),
            _with_error(*row["broken"]),
            row["interval"],
            _verdict(row["interval"]),
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


def write_report(config: TourConfig, results: Sequence[Mapping[str, Any]], seconds: float) -> Path:
    """The HTML report, with JSON and CSV beside it."""
    comparison = compare(results)
    results_table, seeds_table = _results_table(comparison), _seeds_table(comparison)
    optimizers_table = _optimizers_table(results)
    first = run_config("adamw", "broken", seed=0, steps=config.steps, out=config.out)
    model, broken = first.model, first.breaking
    parameters = sum(p.numel() for p in lm.GPT(replace(model, vocab_size=256)).parameters())
    spread = float(np.mean([result["standard_error"] for result in results]))
    tokens = first.batch_size * model.context_length * config.steps
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, erlangen {erlangen.__version__}"
    )
    sections = [
        report.Section("What was run", [
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
        report.Section("How to read this", [
            "These models are small and their training short: the tour shows the instruments, not a verdict on models "
            "of other sizes. One learning rate an optimiser was chosen on another seed, from a scan over both arms "
            "(`benchmarks/results/tour_learning_rates.csv`). Optimisers are not ranked here: their scans were coarse.",
            f"Made by `erlangen tour --seeds {config.seeds} --steps {config.steps}` in {seconds:.0f} s on {machine}. "
            "The logs of all runs are in the folder `runs` beside this file.",
        ]),
    ]  # fmt: skip
    verdicts = "; ".join(f"{TITLES[optimizer]}: {_verdict(row['interval'])}" for optimizer, row in comparison.items())
    html = report.page(
        "A tour of symmetry breaking",
        [f"Small transformers on real text, with and without a preferred direction in their heads. {verdicts}."],
        sections,
    )
    return report.write_report(
        config.out,
        "tour",
        html,
        {"config": to_dict(config), "seconds": seconds, "machine": machine, "runs": list(results)},
        {"results": results_table, "seeds": seeds_table, "optimizers": optimizers_table},
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
    runs = declared_runs(config)
    execute([run.config for run in runs], workers=config.workers, progress=progress)
    return write_report(config, [_read(run) for run in runs], time.monotonic() - started)
