"""Part three, what one batch says: the published statistic, recomputed from the losses of every held-out window.

The published number of a run is the lowest of its validation losses, each on one batch, the next one each time. Here
every validation has the losses of all windows of a fixed held-out set, so that both are known: at validation t the loss
on batch t, and the loss on the whole set.

Shapes: T validations, B windows of a batch; a run is [T, T·B]: validations, windows in their order.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from erlangen import report

from .._reading import Part
from .._tuned import Records
from .arms import BROKEN, PLAIN, TITLES
from .study import ONE_BATCH_OPTIMIZERS, SymmetryBreakingConfig, cases, final_run, window_losses

Runs = Mapping[tuple[str, str, int], np.ndarray]
"""Losses [validations, windows] by optimiser, cell and seed."""

PUBLISHED = (
    ("Runs whose lowest batch is the same one", "6 of 6"),
    ("How much easier that batch is than its neighbours, nats", "0.85"),
    ("Deviation over batches of the difference of two runs, nats", "0.09 to 0.13"),
    ("ECD, biases on − off, lowest batch, GELU, means of 3 seeds, nats", "−0.014 to −0.027"),
    ("AdamW, biases on − off, lowest batch, GELU, one seed, nats", "−0.026"),
    ("ECD, query biases on − off, averaged validation, 2 seeds, nats", "−0.078"),
    ("AdamW, query biases on − off, averaged validation, 2 seeds, nats", "+0.001"),
)
"""Of the published logs, as our notes on them have it."""


@dataclass(frozen=True, kw_only=True)
class OneBatch:
    """What one run says.

    Attributes:
        one: [T], at validation t the loss on batch t.
        full: [T], the loss on the whole set.
        lowest: index of the lowest of ``one``; of two that are equal the first.
        easier: by how much the batch of the lowest is easier than the whole set, at that validation.
    """

    one: np.ndarray
    full: np.ndarray
    lowest: int
    easier: float

    @property
    def best(self) -> float:
        """The published number."""
        return float(self.one[self.lowest])

    @property
    def last(self) -> float:
        """The loss on the whole set at the end."""
        return float(self.full[-1])


def one_batch(losses: np.ndarray, windows: int) -> OneBatch:
    """The published statistic of a run.

    Args:
        losses: [validations, windows of the set].
        windows: of a batch. Validation t, from 0, has the t-th batch of the set, from its start again when it is used
            up; windows left over at the end of the set are not used for batches.

    Raises:
        ValueError: the set has no whole batch.
    """
    times, count = losses.shape
    whole = count // windows
    if not whole:
        raise ValueError(f"a batch of {windows} windows does not fit into a set of {count}")
    batches = losses[:, : whole * windows].reshape(times, whole, windows).mean(axis=2)
    index = np.arange(times)
    one, full = batches[index, index % whole], losses.mean(axis=1)
    lowest = int(one.argmin())
    return OneBatch(one=one, full=full, lowest=lowest, easier=float(full[lowest] - one[lowest]))


def batch_differences(first: np.ndarray, second: np.ndarray, windows: int) -> np.ndarray:
    """Differences of two runs at their last validation, on every batch of the set: [batches]."""
    difference = first[-1] - second[-1]
    whole = len(difference) // windows
    return difference[: whole * windows].reshape(whole, windows).mean(axis=1)


def pairs(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The comparisons: what is compared with what, as pairs of runs.

    Returns:
        of each: ``name``, ``null`` (whether both runs are of one case, so that there is nothing to find), ``pairs``,
        and ``independent``, whether no run is in two of them.
    """
    found: list[dict[str, Any]] = []
    for optimizer in ONE_BATCH_OPTIMIZERS:
        paired = [((optimizer, BROKEN, s), (optimizer, PLAIN, s)) for s in seeds]
        name = f"{TITLES[optimizer]}, broken − plain"
        found.append({"name": name, "null": False, "pairs": paired, "independent": True})
    first, second = ONE_BATCH_OPTIMIZERS[::-1]
    for cell, word in ((PLAIN, "plain"), (BROKEN, "broken")):
        paired = [((first, cell, s), (second, cell, s)) for s in seeds]
        name = f"{TITLES[first]} − {TITLES[second]}, {word}"
        found.append({"name": name, "null": False, "pairs": paired, "independent": True})
    for optimizer, cell in cases("one-batch"):
        paired = [((optimizer, cell, a), (optimizer, cell, b)) for a, b in combinations(seeds, 2)]
        name = f"{TITLES[optimizer]}, {'broken' if cell == BROKEN else 'plain'}, one seed − another"
        found.append({"name": name, "null": True, "pairs": paired, "independent": False})
    return [comparison for comparison in found if comparison["pairs"]]


def compare(runs: Runs, windows: int, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What one batch says of a comparison, and what the whole set says.

    Args:
        runs: losses of every window.
        windows: of a batch.
        seeds: that all cases have.

    Returns:
        of each of `pairs` its name and null, ``one`` and ``full``, the differences of the published numbers and of the
        losses on the whole set at the end, a pair each; ``interval``, the 95 % Student interval of the mean of
        ``full`` (None for a null, whose pairs share runs); ``batch_deviation``, the deviation over the batches of the
        set of the difference of a pair at the end, mean over pairs; ``outside_one`` and ``outside_full``, the shares of
        single differences outside of that interval; ``wrong_one`` and ``wrong_full``, the shares of single differences
        that have not the sign of the mean of ``full`` (None where the interval holds zero, so that there is no sign);
        ``disagree``, the share of pairs in which ``one`` and ``full`` differ in sign.
    """
    said = {key: one_batch(losses, windows) for key, losses in runs.items()}
    rows = []
    for comparison in pairs(seeds):
        chosen = comparison["pairs"]
        one = np.array([said[a].best - said[b].best for a, b in chosen])
        full = np.array([said[a].last - said[b].last for a, b in chosen])
        deviations = [batch_differences(runs[a], runs[b], windows).std(ddof=1) for a, b in chosen]
        row: dict[str, Any] = {
            "name": comparison["name"], "null": comparison["null"], "one": one, "full": full,
            "batch_deviation": float(np.mean(deviations)), "disagree": float(np.mean(one * full < 0)),
            "interval": None, "outside_one": None, "outside_full": None, "wrong_one": None, "wrong_full": None,
        }  # fmt: skip
        if comparison["independent"]:
            interval = report.paired_interval(full)
            row["interval"] = interval
            for name, found in (("one", one), ("full", full)):
                row[f"outside_{name}"] = float(np.mean((found < interval.low) | (found > interval.high)))
                if interval.low > 0 or interval.high < 0:
                    row[f"wrong_{name}"] = float(np.mean(found * interval.mean < 0))
        rows.append(row)
    return rows


def lowest_batches(runs: Runs, windows: int) -> dict[str, Any]:
    """Where the lowest validation falls.

    Returns:
        ``runs``; ``batch``, the batch that is the lowest of most runs, from 0 (of two the first), and ``share`` of the
        runs; ``at``, its place in the run, from 0 to 1; ``easier``, mean over all runs of what the batch is easier than
        the whole set, when it comes; ``deviation``, the deviation over batches of that number (mean over runs); and
        ``distinct``, how many batches are the lowest of some run.
    """
    said = [one_batch(losses, windows) for losses in runs.values()]
    counted = Counter(found.lowest for found in said)
    batch, times = min(counted.items(), key=lambda item: (-item[1], item[0]))
    gaps = np.array([found.full - found.one for found in said])
    return {
        "runs": len(said),
        "batch": batch,
        "share": times / len(said),
        "at": (batch + 1) / gaps.shape[1],
        "easier": float(gaps[:, batch].mean()),
        "deviation": float(gaps.std(axis=1, ddof=1).mean()),
        "distinct": len(counted),
    }


def load(config: SymmetryBreakingConfig, records: Records) -> Runs:
    """The losses of every window, of the seeds that all cases finished."""
    found: dict[tuple[str, str, int], np.ndarray] = {}
    fallen = {
        r["seed"] for r in records if r["failure"] is not None and (r["optimizer"], r["arm"]) in cases("one-batch")
    }
    for r in records:
        key = (r["optimizer"], r["arm"], r["seed"])
        if key[:2] in cases("one-batch") and r["seed"] not in fallen:
            found[key] = window_losses(final_run(config, r["optimizer"], r["arm"], r["lr"], r["seed"]))[1]
    return found


# Tables and figures


def _share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.0f} %"


def _comparison_table(rows: Sequence[Mapping[str, Any]]) -> report.Table:
    return report.Table(
        ("Compared", "Pairs", "Whole set, mean", "Whole set, deviation", "One batch, mean", "One batch, deviation",
         "One batch, furthest", "Over batches, deviation", "One batch outside", "Whole set outside",
         "One batch, wrong sign", "Signs disagree"),
        [
            (
                r["name"], len(r["one"]), r["interval"] or float(r["full"].mean()), _deviation(r["full"]),
                float(r["one"].mean()), _deviation(r["one"]), float(np.abs(r["one"]).max()), r["batch_deviation"],
                _share(r["outside_one"]), _share(r["outside_full"]), _share(r["wrong_one"]), _share(r["disagree"]),
            )
            for r in rows
        ],
        "Differences of pairs of runs, nats a token. One batch: of the lowest validations, each on the next batch. "
        "Whole set: of the losses on all windows at the end, mean with its 95 % Student interval where pairs are "
        "independent.",
        "Over batches: deviation of the difference at the end from one batch of the set to another. Outside: share of "
        "single pairs outside of the interval of the whole set. Wrong sign: share of single pairs with another sign "
        "than the mean on the whole set, where its interval leaves out zero. Pairs of one case with two seeds have "
        "nothing to find: what they show is what chance makes.",
        dict.fromkeys(
            ("Whole set, mean", "One batch, mean"), "+.4f"
        ) | dict.fromkeys(
            ("Whole set, deviation", "One batch, deviation", "One batch, furthest", "Over batches, deviation"), ".4f"
        ),
    )  # fmt: skip


def _deviation(numbers: np.ndarray) -> float | None:
    return float(numbers.std(ddof=1)) if len(numbers) > 1 else None


def _run_table(runs: Runs, windows: int) -> report.Table:
    said = {key: one_batch(losses, windows) for key, losses in runs.items()}
    return report.Table(
        ("Optimiser", "Biases", "Seed", "Lowest batch", "Loss on it", "Easier by", "Whole set then",
         "Whole set, lowest", "Whole set, end"),
        [
            (
                TITLES[o], "broken" if c == BROKEN else "plain", s, found.lowest + 1, found.best, found.easier,
                float(found.full[found.lowest]), float(found.full.min()), found.last,
            )
            for (o, c, s), found in said.items()
        ],
        "Every run: which validation is the lowest, from 1, its loss, and the whole set at that time; nats a token.",
        formats=dict.fromkeys(
            ("Loss on it", "Easier by", "Whole set then", "Whole set, lowest", "Whole set, end"), ".4f"
        ),
    )  # fmt: skip


def _relation_table(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> report.Table:
    by_name = {r["name"]: r for r in rows}
    deviations = [r["batch_deviation"] for r in rows]
    ours = [
        f"{round(found['share'] * found['runs'])} of {found['runs']}",
        f"{found['easier']:.2f}",
        f"{min(deviations):.3f} to {max(deviations):.3f}",
    ]
    for optimizer in ("ecd-euler", "adamw"):
        ours.append(f"{by_name[f'{TITLES[optimizer]}, broken − plain']['one'].mean():+.3f}")
    for optimizer in ("ecd-euler", "adamw"):
        ours.append(f"{by_name[f'{TITLES[optimizer]}, broken − plain']['full'].mean():+.3f}")
    return report.Table(
        ("What", "Published logs", "Here"),
        [(what, published, here.replace("-", "−")) for (what, published), here in zip(PUBLISHED, ours)],
        "The published logs and ours. Sizes differ by orders: a batch of theirs has 4,096 neighbouring tokens, ours "
        "the windows named above, from places a little apart; what carries over is the mechanism, not the numbers. "
        "Ours in the last four rows: lowest batch (twice), then whole set at the end, mean over seeds, query and value "
        "biases.",
    )  # fmt: skip


def summary(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the numbers say."""
    nulls = np.concatenate([np.abs(r["one"]) for r in rows if r["null"]] or [np.zeros(0)])
    fulls = np.concatenate([np.abs(r["full"]) for r in rows if r["null"]] or [np.zeros(0)])
    chance = (
        f" Two seeds of one case differ by up to {nulls.max():.3f} in the lowest batch (median "
        f"{np.median(nulls):.3f}), and by up to {fulls.max():.3f} on the whole set (median {np.median(fulls):.3f})."
        if len(nulls)
        else ""
    )
    return (
        f"One batch: the lowest validation falls on batch {found['batch'] + 1} in "
        f"{round(found['share'] * found['runs'])} of {found['runs']} runs, which is {found['easier']:.2f} nats easier "
        f"than the whole set.{chance}"
    )


def part(config: SymmetryBreakingConfig, records: Records) -> tuple[Part, dict[str, report.Figure]]:
    """What the page says of it, and its figures by name."""
    runs, windows = load(config, records), config.scale.batch_windows
    if not runs:
        return Part(summary="One batch: no seed was finished by all cases.", sections=[], tables={}), {}
    seeds = sorted({seed for _, _, seed in runs})
    rows, found = compare(runs, windows, seeds), lowest_batches(runs, windows)
    steps = next(r["steps"][1:] for r in records if (r["optimizer"], r["arm"], r["seed"]) in runs)
    curves = {
        TITLES[o]: [
            report.Series(
                f"{word}, {which}", steps,
                np.array([getattr(one_batch(runs[o, c, s], windows), which_key) for s in seeds]),
            )
            for c, word in ((PLAIN, "plain"), (BROKEN, "broken"))
            for which, which_key in (("one batch", "one"), ("whole set", "full"))
        ]
        for o in ONE_BATCH_OPTIMIZERS
    }  # fmt: skip
    drawn = [
        report.IntervalRow(f"{r['name']}: {word}", *report.paired_interval(r[key]), points=tuple(r[key]))
        for r in rows
        if not r["null"]
        for key, word in (("full", "whole set"), ("one", "one batch"))
    ]
    chance = [
        report.IntervalRow(
            f"{r['name']}: {word}", float(np.mean(r[key])), *np.quantile(r[key], (0.025, 0.975)), points=tuple(r[key])
        )
        for r in rows
        if r["null"]
        for key, word in (("full", "whole set"), ("one", "one batch"))
    ]
    figures = {
        "one_batch_curves": report.Figure(
            report.small_multiples(curves, x_label="step", y_label="held-out loss, nats a token"),
            "The loss on the next batch, and on the whole set, at every validation: mean over seeds.",
            "Jagged curves of the loss on one batch around smooth ones of the loss on the whole set.",
        ),
        "one_batch": report.Figure(
            report.intervals(drawn, x_label="difference, nats a token", title="Lowest batch and whole set"),
            "Mean, 95 % Student interval and each seed, of the difference of the lowest batches and of the losses on "
            "the whole set at the end.",
            "Forest plot, for each comparison a row of the whole set and one of the lowest batch.",
        ),
    }  # fmt: skip
    if chance:
        figures["one_batch_chance"] = report.Figure(
            report.intervals(chance, x_label="difference, nats a token", title="Two seeds of one case"),
            "Mean and 95 % of the differences of two seeds of one case, and each pair: here is nothing to find.",
            "Forest plot of differences that chance makes.",
        )
    tables = {
        "one_batch": _comparison_table(rows),
        "one_batch_published": _relation_table(found, rows),
        "one_batch_runs": _run_table(runs, windows),
    }
    section = report.Section("One batch", [
        f"The published number of a run is the lowest of many validations, each on one batch, the next one each time. "
        f"Here it is computed again from {len(steps)} validations with the losses of all windows: a batch is "
        f"{windows} windows, the whole set {next(iter(runs.values())).shape[1]}.",
        f"Over the batches of a run the loss on the batch differs from that on the whole set by a deviation of "
        f"{found['deviation']:.3f} nats. The lowest validation falls on {found['distinct']} different batches in "
        f"{found['runs']} runs, most often on number {found['batch'] + 1}, at {100 * found['at']:.0f} % of training.",
        figures["one_batch_curves"], tables["one_batch"], figures["one_batch"],
        *([figures["one_batch_chance"]] if chance else []), tables["one_batch_published"], tables["one_batch_runs"],
    ])  # fmt: skip
    return Part(summary=summary(found, rows), sections=[section], tables=tables), figures
