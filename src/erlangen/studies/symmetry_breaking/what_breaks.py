"""Part one, what breaks what: learned biases × the fixed mean × the noise, in charges and in loss."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from erlangen import breaking, report
from erlangen.gauge import head_layouts
from erlangen.lm import GPT, TrainConfig
from erlangen.lm.train import build_model, build_optimizer
from erlangen.lm.windows import TrainingWindows

from .. import _runs
from .._jobs import Cells, Job, Progress, Tick, execute
from .._reading import Part, by_seed, with_error
from .._tuned import TUNING_SEED, Records, compared, finite, forest, mark, stopped, tuning_table, values
from .arms import CELL_OPTIMIZERS, CELLS, TITLES, Cell
from .study import SECTORS, SymmetryBreakingConfig, cases, tuning_run

ZERO, BROKEN_FROM = 1e-5, 1e-3
"""Relative charges up to the first are zero in float32; from the second on they are broken."""

FROM_REST = ("sgdm", "ecd-euler")
"""Optimisers for which theory says what the charges are: their motion is invariant, and starts with charge zero."""

_SWITCHES = {"learned": "learned biases", "mean": "fixed mean", "noise": "noise"}
_SIMPLE = (
    ("biased-noise", "biased-none"),
    ("biased-mean", "biased-none"),
    ("biased-both", "biased-none"),
    ("bare-both", "bare-none"),
)


# What theory says


def predicted(cell: Cell) -> dict[str, bool | None]:
    """Whether each charge of `SECTORS` stays zero, under an optimiser of `FROM_REST`; None where it is not defined.

    The mean moves the charge of queries and keys and leaves the affine one, which a learned bias makes; the noise moves
    all. Values have a noise and no mean.
    """
    affine = cell.learned and (cell.mean or cell.noise)
    return {
        "qk": not (cell.mean or cell.noise),
        "vo": not cell.noise,
        "qk_affine": not cell.noise if affine else None,
        "vo_affine": not cell.noise if affine else None,
    }


def agreement(records: Records) -> list[dict[str, Any]]:
    """The predictions beside what was measured, over all seeds, layers and heads.

    Returns:
        a row for each optimiser, cell and sector that is defined: ``predicted`` (zero or broken; None where theory is
        silent), ``mean`` over seeds, layers and heads, ``largest``, ``found`` (zero, broken or between, None where
        every run fell out) and ``agrees``.
    """
    rows = []
    for optimizer, cell in cases("what-breaks"):
        expected = predicted(CELLS[cell])
        runs = by_seed(records, optimizer=optimizer, arm=cell)
        for sector in SECTORS:
            if expected[sector] is None:
                continue
            means = [r[sector] for r in runs if r[sector] is not None]
            largest = max((r[f"{sector}_largest"] for r in runs if r[sector] is not None), default=None)
            found = None
            if largest is not None:
                found = "zero" if largest <= ZERO else "broken" if min(means) >= BROKEN_FROM else "between"
            said = ("zero" if expected[sector] else "broken") if optimizer in FROM_REST else None
            rows.append(
                {"optimizer": optimizer, "arm": cell, "sector": sector, "predicted": said,
                 "mean": float(np.mean(means)) if means else None, "largest": largest, "found": found,
                 "agrees": None if said is None or found is None else said == found}
            )  # fmt: skip
    return rows


# A fixed mean, and a learned bias that starts there


def _losses(run: TrainConfig, *, start: float, broken: bool, steps: int) -> list[float]:
    corpus = _runs.corpus(run.data)
    device = "cuda" if run.device != "cpu" and torch.cuda.is_available() else "cpu"
    size = -(-corpus.vocab_size // 64) * 64 if run.model.vocab_size is None else run.model.vocab_size
    breaks = run.breaking if broken else replace(run.breaking, enabled=False)
    model = build_model(replace(run.model, vocab_size=size), breaks, seed=run.seed).double().to(device).train()
    if start:
        _start_query_biases(model, start)
    optimizer = build_optimizer(run.optimizer, model, seed=run.seed)
    windows = TrainingWindows(corpus.train, run.model.context_length, seed=run.seed)
    losses: list[float] = []
    for step in range(steps):
        batch = windows.batch(step * run.batch_size, run.batch_size).to(device)
        breaking.redraw(model)
        optimizer.zero_grad(set_to_none=True)
        loss = model(batch[:, :-1], batch[:, 1:])[1]
        loss.backward()
        losses.append(loss.item())
        optimizer.step(lambda: losses[-1])
    return losses


def _start_query_biases(model: GPT, value: float) -> None:
    with torch.no_grad():
        for layout in head_layouts(model):
            name = layout.query.bias_name
            assert name is not None
            bias = model.get_parameter(name)
            layout.query.put_head_biases(bias, torch.full_like(layout.query.head_biases(bias), value))


def same_as_a_start(tick: Tick, run: TrainConfig, steps: int) -> dict[str, Any]:
    """A fixed mean beside a learned bias, against a learned bias that starts at that mean, in float64.

    Args:
        tick: called once.
        run: of the cell "biased-mean"; its schedule is not used.
        steps: of both.

    Returns:
        ``same`` and ``control``: the largest difference of the training losses of the first from those of the second,
        and from those of a learned bias that starts at zero.
    """
    fixed = _losses(run, start=0.0, broken=True, steps=steps)
    started = _losses(run, start=run.breaking.query_mean, broken=False, steps=steps)
    plain = _losses(run, start=0.0, broken=False, steps=steps)
    tick(1)
    return {"same": _largest_difference(fixed, started), "control": _largest_difference(fixed, plain)}


def _largest_difference(first: list[float], second: list[float]) -> float:
    return float(np.abs(np.array(first) - np.array(second)).max())


def measure_identity(config: SymmetryBreakingConfig, progress: Progress | None = None) -> list[dict[str, Any]]:
    """`same_as_a_start` of every optimiser of the part, at the lowest rate of its grid; kept.

    Returns:
        a record each: optimizer, ``same`` and ``control``.
    """
    steps = config.scale.identity_steps
    settings = {"size": config.size, "corpus": config.corpus, "steps": steps}
    cells = Cells(config.out / "identity.jsonl", json.loads(json.dumps(settings)))
    jobs = []
    for optimizer in CELL_OPTIMIZERS:
        run = tuning_run(config, optimizer, "biased-mean", config.scale.rates[optimizer][0])
        run = replace(run, seed=TUNING_SEED)

        def keep(found: Mapping[str, Any], optimizer: str = optimizer) -> None:
            cells.add([{"key": optimizer, "optimizer": optimizer} | dict(found)])

        jobs.append(Job(work=same_as_a_start, arguments=(run, steps), finished=optimizer in cells.records, keep=keep))
    execute(jobs, workers=config.workers, progress=progress)
    return [cells.records[optimizer] for optimizer in CELL_OPTIMIZERS]


# What it does to the loss


def compare(records: Records) -> list[dict[str, Any]]:
    """The comparisons of the part, read together: for each optimiser three main effects and four pairs of cells.

    Returns:
        of `_tuned.compared`, with ``optimizer`` and ``label``. A main effect is the mean of the four cells that have
        it on, less the mean of the four that have it off.
    """
    rows: list[dict[str, Any]] = []
    for optimizer in CELL_OPTIMIZERS:
        loss = {cell: values(records, optimizer, cell) for cell in CELLS}
        with np.errstate(invalid="ignore"):
            for switch, title in _SWITCHES.items():
                on = [loss[name] for name, cell in CELLS.items() if getattr(cell, switch)]
                off = [loss[name] for name, cell in CELLS.items() if not getattr(cell, switch)]
                rows.append(
                    {"optimizer": optimizer, "first": f"{title} on", "second": f"{title} off",
                     "label": f"{title}, main effect", "stopped": stopped(loss),
                     "difference": np.mean(on, axis=0) - np.mean(off, axis=0)}
                )  # fmt: skip
            for first, second in _SIMPLE:
                rows.append(
                    {"optimizer": optimizer, "first": first, "second": second, "label": f"{first} − {second}",
                     "stopped": stopped({c: loss[c] for c in (first, second)}),
                     "difference": loss[first] - loss[second]}
                )  # fmt: skip
    return compared(rows)


# Tables


def _overview_table(rows: Records) -> report.Table:
    labels = list(dict.fromkeys(row["label"] for row in rows))
    found = {(row["label"], row["optimizer"]): row for row in rows}
    return report.Table(
        ("Effect", *(TITLES[optimizer] for optimizer in CELL_OPTIMIZERS)),
        [(label, *(mark(found[label, optimizer]) for optimizer in CELL_OPTIMIZERS)) for label in labels],
        "Effects on the held-out loss, nats a token, mean over seeds: below zero it helps. "
        f"● holds for all {len(rows)} together at 5 % (Holm); ○ a hint: its 95 % interval leaves out zero, which one "
        "in twenty does by chance.",
    )


def _loss_table(config: SymmetryBreakingConfig, records: Records) -> report.Table:
    seeds = [f"Seed {seed}" for seed in range(config.seeds)]
    rows = []
    for optimizer, cell in cases("what-breaks"):
        losses = values(records, optimizer, cell)
        mean = with_error(losses, ".4f", ".4f") if np.isfinite(losses).all() else "–"
        rate = by_seed(records, optimizer=optimizer, arm=cell)[0]["lr"]
        rows.append((TITLES[optimizer], cell, rate, mean, *(finite(loss) for loss in losses.tolist())))
    return report.Table(
        ("Optimiser", "Cell", "Learning rate", "Loss", *seeds),
        rows,
        "Held-out loss at the last step on the fixed set, nats a token: mean over seeds ± standard error, and each "
        "seed. A cell is named by its learned biases (biased, bare) and its unlearned ones (none, mean, noise, both).",
        formats={"Learning rate": "g"} | dict.fromkeys(seeds, ".4f"),
    )


_SECTOR_TITLES = {
    "qk": "query–key", "vo": "value–output", "qk_affine": "query–key, affine", "vo_affine": "value–output, affine",
}  # fmt: skip


def _charge_table(rows: Records) -> report.Table:
    return report.Table(
        ("Optimiser", "Cell", "Charge", "Predicted", "Mean", "Largest", "Found", "Agrees"),
        [
            (
                TITLES[r["optimizer"]], r["arm"], _SECTOR_TITLES[r["sector"]], r["predicted"] or "–", r["mean"],
                r["largest"], r["found"], {None: "–", True: "yes", False: "no"}[r["agrees"]],
            )
            for r in rows
        ],
        "Relative charges of the heads at the last step: mean and largest over seeds, layers and heads. Zero: at most "
        f"{ZERO:g} everywhere. Broken: the mean of every run at least {BROKEN_FROM:g}. Theory speaks for SGD with "
        "momentum and ECD, from rest and without weight decay; for the others it is silent.",
        formats={"Mean": ".1e", "Largest": ".1e"},
    )  # fmt: skip


def _identity_table(identity: Records, steps: int) -> report.Table:
    return report.Table(
        ("Optimiser", "Fixed mean − bias that starts there", "Fixed mean − bias that starts at zero"),
        [(TITLES[r["optimizer"]], r["same"], r["control"]) for r in identity],
        f"Largest difference of the training losses over {steps} steps in float64, learned biases on, no noise.",
        formats={"Fixed mean − bias that starts there": ".1e", "Fixed mean − bias that starts at zero": ".1e"},
    )


def summary(rows: Records, charges: Records) -> str:
    """What the rule says of the loss, and how often theory was right."""
    asked = [r for r in charges if r["agrees"] is not None]
    called = [r for r in rows if r["reading"].endswith("is better")]
    hints = [r for r in called if r["reading"].startswith("a hint")]
    words = "; ".join(f"{TITLES[r['optimizer']]}, {r['label']}: {r['interval']:+.3f}" for r in called if r not in hints)
    return (
        f"What breaks what: {sum(r['agrees'] for r in asked)} of {len(asked)} charges are as predicted. Of {len(rows)} "
        f"effects on the loss {len(called) - len(hints)} are differences and {len(hints)} hints"
        + (f": {words}." if words else ".")
    )


def part(
    config: SymmetryBreakingConfig, tuned: Records, records: Records, identity: Records
) -> tuple[Part, dict[str, report.Figure]]:
    """What the page says of it, and its figures by name."""
    rows, charges = compare(records), agreement(records)
    figures = {
        f"effects_{optimizer}": forest(
            [row for row in rows if row["optimizer"] == optimizer],
            "difference of held-out losses, nats a token",
            TITLES[optimizer],
        )
        for optimizer in CELL_OPTIMIZERS
    }
    tables = {
        "effects_overview": _overview_table(rows),
        "effects": report.Table(
            ("Optimiser", "Effect", "Difference", "p", "p, Holm", "Reading"),
            [(TITLES[r["optimizer"]], r["label"], *(r[k] for k in ("interval", "p", "holm", "reading"))) for r in rows],
            "Paired differences of the held-out losses, with 95 % Student intervals over seeds.",
            formats={"Difference": "+.4f", "p": ".2g", "p, Holm": ".2g"},
        ),
        "cells": _loss_table(config, records),
        "charges": _charge_table(charges),
        "identity": _identity_table(identity, config.scale.identity_steps),
        "cells_tuning": tuning_table(tuned, TITLES),
    }
    section = report.Section("What breaks what", [
        "Learned biases of attention on or off, the fixed mean of the unlearned query bias on or off, the noise of the "
        "unlearned query and value biases on or off.",
        tables["effects_overview"], *figures.values(), tables["charges"], tables["identity"], tables["cells"],
        tables["effects"], tables["cells_tuning"],
    ])  # fmt: skip
    return Part(summary=summary(rows, charges), sections=[section], tables=tables), figures
