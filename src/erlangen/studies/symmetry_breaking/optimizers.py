"""Part two, optimisers with and without the published biases: losses, gaps to AdamW, memory and time of a step."""

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erlangen import breaking, report
from erlangen.lm import TrainConfig
from erlangen.lm.train import build_model, build_optimizer
from erlangen.lm.windows import TrainingWindows

from .. import _runs
from .._jobs import Cells, Job, Progress, Tick, execute
from .._reading import Part, by_seed
from .._tuned import Records, compared, finite, forest, stopped, tuning_table, values
from .arms import BROKEN, OPTIMIZERS, PLAIN, TITLES, half_life, second_moment_decay
from .study import SymmetryBreakingConfig, cases, tuning_run

REFERENCE = "adamw"


def compare(records: Records) -> list[dict[str, Any]]:
    """The comparisons of the part, read together.

    Returns:
        of `_tuned.compared`, for each optimiser: ``question`` "broken" (broken − plain); and for each but AdamW "gap"
        (optimiser − AdamW, both plain, then both broken) and "change" (the second gap − the first).
    """
    loss = {(o, c): values(records, o, c) for o, c in cases("optimizers")}
    rows: list[dict[str, Any]] = []

    def add(question: str, optimizer: str, first: str, second: str, plus: list, minus: list) -> None:
        fallen = stopped({f"{TITLES[o]}, {'broken' if c == BROKEN else 'plain'}": loss[o, c] for o, c in plus + minus})
        with np.errstate(invalid="ignore"):
            difference = sum(loss[case] for case in plus) - sum(loss[case] for case in minus)
        rows.append(
            {"question": question, "optimizer": optimizer, "first": first, "second": second, "stopped": fallen,
             "difference": difference}
        )  # fmt: skip

    for optimizer in OPTIMIZERS:
        add("broken", optimizer, "broken", "plain", [(optimizer, BROKEN)], [(optimizer, PLAIN)])
    for optimizer in OPTIMIZERS:
        if optimizer == REFERENCE:
            continue
        name, reference = TITLES[optimizer], TITLES[REFERENCE]
        for cell, word in ((PLAIN, "plain"), (BROKEN, "broken")):
            add("gap", optimizer, f"{name}, {word}", f"{reference}, {word}", [(optimizer, cell)], [(REFERENCE, cell)])
        add(
            "change", optimizer, "the gap when both are broken", "the gap when both are plain",
            [(optimizer, BROKEN), (REFERENCE, PLAIN)], [(REFERENCE, BROKEN), (optimizer, PLAIN)],
        )  # fmt: skip
    return compared(rows)


# Memory and time


def state_floats(optimizer: torch.optim.Optimizer) -> int:
    """Numbers that an optimiser keeps in tensors, counters of steps (one number each) aside."""

    def count(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() if value.ndim else 0
        if isinstance(value, Mapping):
            return sum(map(count, value.values()))
        return sum(map(count, value)) if isinstance(value, (list, tuple)) else 0

    return sum(map(count, optimizer.state.values()))


class _Stepper:
    """One model that is trained a step at a call."""

    def __init__(self, run: TrainConfig) -> None:
        corpus = _runs.corpus(run.data)
        device = "cuda" if run.device != "cpu" and torch.cuda.is_available() else "cpu"
        self.run, self.device, self.step = run, torch.device(device), 0
        size = -(-corpus.vocab_size // 64) * 64 if run.model.vocab_size is None else run.model.vocab_size
        self.model = build_model(replace(run.model, vocab_size=size), run.breaking, seed=run.seed).to(self.device)
        self.model.train()
        self.optimizer = build_optimizer(run.optimizer, self.model, seed=run.seed)
        self.windows = TrainingWindows(corpus.train, run.model.context_length, seed=run.seed)

    def __call__(self) -> float:
        """Seconds of a step: draw, forward, backward, and the optimiser's."""
        batch = self.windows.batch(self.step * self.run.batch_size, self.run.batch_size).to(self.device)
        self._wait()
        start = time.perf_counter()
        breaking.redraw(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        low = self.run.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if low else nullcontext():
            loss = self.model(batch[:, :-1], batch[:, 1:])[1]
        loss.backward()
        value = loss.item()
        self.optimizer.step(lambda: value)
        self._wait()
        self.step += 1
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def time_steps(tick: Tick, config: SymmetryBreakingConfig) -> list[dict[str, Any]]:
    """Time a step of every case in turn, round by round, each round in an order of its own, on one thread.

    Returns:
        a record a case: optimizer, arm, ``milliseconds`` [rounds], ``ratio`` [rounds] to AdamW without breaking in the
        same round, and ``state_floats``, floats of state a parameter.
    """
    chosen = cases("optimizers")
    rates = config.scale.rates
    steppers = {
        (o, c): _Stepper(tuning_run(config, o, c, rates[o][0])) for o, c in chosen
    }  # the lowest rate of a grid, so that no loss grows
    order, rounds = np.random.default_rng(0), config.scale.timing_rounds
    seconds: dict[tuple[str, str], list[float]] = {case: [] for case in chosen}
    for number in range(-2, rounds):
        for index in order.permutation(len(chosen)):
            taken = steppers[chosen[index]]()
            if number >= 0:
                seconds[chosen[index]].append(taken)
        if tick(max(0, number)):
            raise KeyboardInterrupt
    reference = np.array(seconds[REFERENCE, PLAIN])
    return [
        {
            "key": f"{optimizer}/{cell}",
            "optimizer": optimizer,
            "arm": cell,
            "milliseconds": (1e3 * np.array(seconds[optimizer, cell])).tolist(),
            "ratio": (np.array(seconds[optimizer, cell]) / reference).tolist(),
            "state_floats": state_floats(stepper.optimizer) / sum(p.numel() for p in stepper.model.parameters()),
        }
        for (optimizer, cell), stepper in steppers.items()
    ]


def measure_cost(config: SymmetryBreakingConfig, progress: Progress | None = None) -> list[dict[str, Any]]:
    """The records of `time_steps`, measured once, with nothing else of the study running."""
    settings = {"size": config.size, "corpus": config.corpus, "rounds": config.scale.timing_rounds}
    cells = Cells(config.out / "cost.jsonl", json.loads(json.dumps(settings)))
    job = Job(
        work=time_steps, arguments=(config,), steps=config.scale.timing_rounds, keep=cells.add,
        finished=len(cells.records) == len(cases("optimizers")),
    )  # fmt: skip
    execute([job], workers=1, progress=progress)
    return list(cells.records.values())


# Tables


def _cost(cost: Records, optimizer: str, cell: str) -> Mapping[str, Any]:
    return next(r for r in cost if (r["optimizer"], r["arm"]) == (optimizer, cell))


def _spread(numbers: list[float], how: str) -> str:
    low, middle, high = np.quantile(numbers, (0.2, 0.5, 0.8))
    return f"{middle:{how}} ({low:{how}}–{high:{how}})"


def _table(config: SymmetryBreakingConfig, records: Records, cost: Records) -> report.Table:
    rows = []
    for optimizer, cell in cases("optimizers"):
        losses, found = values(records, optimizer, cell), _cost(cost, optimizer, cell)
        interval = report.paired_interval(losses) if np.isfinite(losses).all() else None
        rows.append(
            (
                TITLES[optimizer], "broken" if cell == BROKEN else "plain",
                by_seed(records, optimizer=optimizer, arm=cell)[0]["lr"], interval,
                *(finite(loss) for loss in losses.tolist()), found["state_floats"],
                _spread(found["milliseconds"], ".1f"), _spread(found["ratio"], ".2f"),
            )
        )  # fmt: skip
    seeds = [f"Seed {seed}" for seed in range(config.seeds)]
    return report.Table(
        ("Optimiser", "Biases", "Learning rate", "Loss", *seeds, "State, floats a parameter", "Step, ms",
         "Step, AdamW plain = 1"),
        rows,
        "Held-out loss at the last step on the fixed set, nats a token: mean over seeds with its 95 % Student "
        "interval, and each seed. State as counted in the optimiser. A step on one thread, timed in turn with all "
        "others: median, and the quantiles at 20 and 80 % over rounds.",
        formats={"Learning rate": "g", "Loss": ".4f", "State, floats a parameter": ".2f"}
        | dict.fromkeys(seeds, ".4f"),
    )  # fmt: skip


_QUESTIONS = {
    "broken": "biases on, less off", "gap": "gap to AdamW", "change": "change of the gap by the biases",
}  # fmt: skip


def _comparison_table(rows: Records) -> report.Table:
    return report.Table(
        ("Question", "Optimiser", "Compared", "Difference", "p", "p, Holm", "Reading"),
        [
            (
                _QUESTIONS[r["question"]], TITLES[r["optimizer"]], f"{r['first']} − {r['second']}",
                *(r[key] for key in ("interval", "p", "holm", "reading")),
            )
            for r in rows
        ],
        "Paired differences of the held-out losses, nats a token, with 95 % Student intervals over seeds.",
        f"{len(rows)} intervals are looked at together. A difference is called where Holm's procedure over all of them "
        "rejects zero at 5 %; an interval that leaves out zero without that is called a hint.",
        {"Difference": "+.4f", "p": ".2g", "p, Holm": ".2g"},
    )  # fmt: skip


def summary(rows: Records) -> str:
    """What the rule says of the biases, and of the gap."""
    broken = [r for r in rows if r["question"] == "broken"]
    words = "; ".join(f"{TITLES[r['optimizer']]} {r['interval']:+.3f} ({r['reading']})" for r in broken)
    changes = [r for r in rows if r["question"] == "change"]
    closes = [r for r in changes if r["reading"].endswith("is better") and r["interval"].mean < 0]
    sure = sum(not r["reading"].startswith("a hint") for r in closes)
    return (
        f"Optimisers: the published biases on, less off: {words}. They bring {sure} of {len(changes)} optimisers "
        f"nearer to AdamW ({len(closes) - sure} hints)."
    )


def part(
    config: SymmetryBreakingConfig, tuned: Records, records: Records, cost: Records
) -> tuple[Part, dict[str, report.Figure]]:
    """What the page says of it, and its figures by name."""
    rows = compare(records)
    figures = {
        "optimizers": forest(
            [dict(r, label=TITLES[r["optimizer"]]) for r in rows if r["question"] == "broken"],
            "loss with the biases − loss without, nats a token",
            "Published biases, learned ones beside",
        ),
        "gaps": forest(
            [
                dict(r, label=f"{TITLES[r['optimizer']]}, {'broken' if 'broken' in r['first'] else 'plain'}")
                for r in rows
                if r["question"] == "gap"
            ],
            "loss − loss of AdamW, nats a token",
            "Gap to AdamW",
        ),
    }
    run = tuning_run(config, REFERENCE, PLAIN, 1e-3)
    per_step = run.batch_size * run.model.context_length
    decay = second_moment_decay(per_step)
    tables = {
        "optimizers": _table(config, records, cost),
        "gaps": _comparison_table(rows),
        "optimizers_tuning": tuning_table(tuned, TITLES),
    }
    section = report.Section("Optimisers", [
        f"Each optimiser with learned biases, without (plain) and with (broken) the published unlearned ones, at the "
        f"best of three rates. AdamW's β₂ is {decay:.6f}: a half-life of {half_life(decay, per_step):.3g} tokens at "
        f"{per_step} tokens a step.",
        tables["optimizers"], figures["optimizers"], figures["gaps"], tables["gaps"], tables["optimizers_tuning"],
    ])  # fmt: skip
    return Part(summary=summary(rows), sections=[section], tables=tables), figures
