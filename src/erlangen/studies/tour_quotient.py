"""The tour's fifth part: break the symmetry of heads, or reduce it?

Protocol, fixed before any run: the short form of `erlangen.studies.break_or_reduce`, its model and text. Five arms:
plain; broken by the published noise; steps without their part along the gauge; heads brought to balanced form every
ten steps; heads under the metric that no gauge changes. Two optimisers, SGD with momentum and AdamW, at the middle of
the study's grids, which suit the plain arm, if any. The tour's seeds; a sixth of the steps of part one. Measure: loss
at the last step on 64 fixed windows. Rule: that of part one, each arm against plain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from erlangen import report
from erlangen.lm import TrainConfig

from ._reading import Part, by_seed, verdict, with_error
from ._tuned import values
from .break_or_reduce.arms import SIZES, TITLES, run_config
from .break_or_reduce.results import LABELS, visible
from .break_or_reduce.study import QUANTITIES, read

ARMS = ("plain", "noise", "horizontal", "dressed", "invariant")
OPTIMIZERS = ("sgdm", "adamw")
_WINDOWS, _EVALUATIONS = 64, 4


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of this part."""

    optimizer: str
    arm: str
    seed: int
    config: TrainConfig


def declared_runs(*, out: Path, seeds: int, steps: int) -> list[Run]:
    """All runs, seed by seed, so that a tour cut short has compared like with like.

    Args:
        out: folder of the runs.
        seeds: of each arm.
        steps: of each run.
    """
    size = replace(SIZES["tiny"], eval_windows=_WINDOWS)
    return [
        Run(optimizer=optimizer, arm=arm, seed=seed, config=run_config(
            size, optimizer, arm, lr=size.rates[optimizer][1], seed=seed, steps=steps, evaluations=_EVALUATIONS,
            out=out / f"{optimizer}-{arm}-{seed}",
        ))
        for seed in range(seeds) for optimizer in OPTIMIZERS for arm in ARMS
    ]  # fmt: skip


def measure(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the logs of finished runs say: optimizer, arm, seed, and what `break_or_reduce.study.read` gives."""
    return [{"optimizer": r.optimizer, "arm": r.arm, "seed": r.seed} | read(r.config) for r in runs]


def compare(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each arm against plain: optimizer, arm, ``difference`` a seed, ``interval`` and ``verdict``."""
    rows = []
    for optimizer in OPTIMIZERS:
        plain = values(records, optimizer, "plain")
        for arm in ARMS[1:]:
            difference = values(records, optimizer, arm) - plain
            interval = report.paired_interval(difference)
            rows.append(
                {"optimizer": optimizer, "arm": arm, "difference": difference, "interval": interval}
                | {"verdict": verdict(arm, "plain", interval)}
            )
    return rows


def part(records: Sequence[Mapping[str, Any]]) -> Part:
    """Part five of the page, of the records of `measure`."""
    comparison, steps = compare(records), records[0]["steps"][-1]
    results, seeds = _results_table(records, comparison), _seeds_table(records)
    rates = ", ".join(f"{TITLES[o]} {by_seed(records, optimizer=o, arm='plain')[0]['lr']:g}" for o in OPTIMIZERS)
    size = SIZES["tiny"]
    sections = [
        report.Section("Part five: break or reduce?", [
            "What a head can be moved by without any change to what it computes can be broken, as in part one, or "
            "taken out of training. Three ways to take it out: of each step the part along these directions is removed "
            "(horizontal); every ten steps each head is brought to one chosen form, and the optimiser's memory with it "
            "(dressed); or the heads are trained under a metric that makes the whole run independent of the form that "
            "they start in (invariant).",
            f"{len(records)} transformers as in part one, but without biases in attention, {steps} steps each; "
            f"{len(by_seed(records, optimizer=OPTIMIZERS[0], arm='plain'))} seeds an arm. One learning rate an "
            f"optimiser, the middle of the study's grid ({rates}); that of the heads of the invariant arm is "
            f"{size.head_rate:g}. The study itself tunes each arm on its own and has six optimisers: "
            "`docs/break-or-reduce.md`.",
            results,
            *(
                report.Figure(
                    report.intervals(
                        [
                            report.IntervalRow(f"{r['arm']} − plain", *r["interval"], points=tuple(r["difference"]))
                            for r in comparison if r["optimizer"] == optimizer
                        ],
                        x_label="difference of validation losses (nats a byte)",
                        title=TITLES[optimizer],
                    ),
                    f"{TITLES[optimizer]}: each arm minus plain, mean, 95 % interval, each seed. Left of zero the arm "
                    "is better.",
                    f"Forest plot of the arms against plain under {TITLES[optimizer]}.",
                )
                for optimizer in OPTIMIZERS
            ),
        ]),
        report.Section("Where the steps went", [
            "A plain gradient has no part along the gauge. Momentum, AdamW's preconditioner and weight decay put one "
            "into the step, and the charges of the heads drift with it. The invariant arm measures steps otherwise: "
            "what is shortest for it has a part along the gauge here, where lengths are those of the stored numbers.",
            *(_curves(records, name) for name in ("vertical_share", "charge_drift")),
        ]),
        report.Section("Every run of part five", [seeds]),
    ]  # fmt: skip
    shown = [
        f"{TITLES[r['optimizer']]}, {r['verdict']} than {'plain' if r['interval'].high < 0 else r['arm']}"
        for r in comparison
        if r["verdict"].endswith("is better")
    ]
    return Part(
        summary="The symmetry of heads broken or reduced, against plain training: "
        f"{len(shown)} of {len(comparison)} differences shown{': ' * bool(shown)}{'; '.join(shown)}.",
        sections=sections,
        tables={"quotient": results, "quotient_seeds": seeds},
    )


def _results_table(records: Sequence[Mapping[str, Any]], comparison: Sequence[Mapping[str, Any]]) -> report.Table:
    found = {(r["optimizer"], r["arm"]): r for r in comparison}
    rows = []
    for optimizer in OPTIMIZERS:
        for arm in ARMS:
            row = found.get((optimizer, arm))
            rows.append((
                TITLES[optimizer], arm, with_error(values(records, optimizer, arm), ".3f", ".3f"),
                row["interval"] if row else None, row["verdict"] if row else "",
            ))  # fmt: skip
    return report.Table(
        ("Optimiser", "Arm", "Loss", "Arm − plain", "Reading"),
        rows,
        "Validation loss at the last step, nats a byte: mean over seeds ± standard error, and the paired difference "
        "from plain with its 95 % interval.",
        f"With few seeds the intervals are wide, and {len(comparison)} are looked at together.",
        {"Arm − plain": "+.3f"},
    )


def _seeds_table(records: Sequence[Mapping[str, Any]]) -> report.Table:
    return report.Table(
        ("Optimiser", "Arm", "Seed", "Loss", *LABELS.values()),
        [
            (TITLES[r["optimizer"]], r["arm"], r["seed"], r["loss"], *(r[name][-1] for name in QUANTITIES))
            for r in records
        ],
        "Every run: validation loss at the last step; the heads at the end, all together.",
        formats={"Seed": "d", "Loss": ".4f"} | dict.fromkeys(LABELS.values(), ".2g"),
    )


def _curves(records: Sequence[Mapping[str, Any]], name: str) -> report.Figure:
    panels = {
        TITLES[optimizer]: [
            report.Series(arm, runs[0]["gauge_steps"], visible(np.array([r[name] for r in runs], dtype=float)))
            for arm in ARMS
            if (runs := by_seed(records, optimizer=optimizer, arm=arm))
        ]
        for optimizer in OPTIMIZERS
    }
    label = LABELS[name]
    return report.Figure(
        report.small_multiples(panels, x_label="step", y_label=label, log_y=True),
        f"{label[0].upper()}{label[1:]}: mean over seeds, a band of ± one standard error, every seed thin.",
        f"Curves of the {label}, one panel an optimiser, a curve for each arm.",
    )
