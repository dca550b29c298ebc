"""The rule, the tables and the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from erlangen import report
from erlangen._extras import require

from .._jobs import Progress
from .._reading import by_seed, copy_tables, verdict, with_error
from .arms import ARMS
from .study import MergeConfig, measure

Records = Sequence[Mapping[str, Any]]
COMPARED = (
    ("permutation", "naive"),
    ("orthogonal", "permutation"),
    ("gauge", "orthogonal"),
    ("gauge", "naive"),
    ("gauge", "factors"),
)


def run(config: MergeConfig, progress: Progress | None = None) -> Path:
    """Run what is declared and not on disk yet, and write the report.

    Returns:
        the path of the HTML file; JSON, CSV and a figure of the paths lie beside it.

    Raises:
        FileNotFoundError: there is no text.
        ImportError: matplotlib is missing, or transformers for the family "llama".
        ValueError: the folder holds models or cells of other settings.
    """
    require("matplotlib", "report")
    return _write_report(config, *measure(config, progress))


def values(records: Records, family: str, arm: str, key: str = "barrier", pairing: str = "seeds") -> np.ndarray:
    """A measure of an arm, by pair: [pairs] or [pairs, points]."""
    return np.array([r[key] for r in by_seed(records, family=family, pairing=pairing, arm=arm)], dtype=float)


def compare(config: MergeConfig, records: Records) -> list[dict[str, Any]]:
    """The paired differences of the rule: family, first, second, difference a pair, interval, verdict."""
    rows = []
    for family in config.families:
        for first, second in COMPARED:
            difference = values(records, family, first) - values(records, family, second)
            interval = report.paired_interval(difference)
            rows.append(
                {"family": family, "first": first, "second": second, "difference": difference, "interval": interval}
                | {"verdict": verdict(first, second, interval)}
            )
    return rows


# Tables


def tables(config: MergeConfig, trained: Records, records: Records) -> dict[str, report.Table]:
    """All tables of the report, by the name of their file."""
    return {
        "models": _model_table(trained),
        "barriers": _barrier_table(config, records),
        "differences": _difference_table(config, records),
        "control": _control_table(config, records),
        "paths": _path_table(records),
    }


def _model_table(trained: Records) -> report.Table:
    return report.Table(
        ("Family", "Seed", "Held-out loss", "Loss of frequencies", "Parameters", "Training, s"),
        [(r["family"], r["seed"], r["loss"], r["unigram"], r["parameters"], r["seconds"]) for r in trained],
        "Every model: held-out loss in nats a character, beside that of the frequencies of characters; time of "
        "training on one thread of a machine that was busy otherwise, which is no benchmark.",
        formats={"Held-out loss": ".4f", "Loss of frequencies": ".4f", "Training, s": ".0f"},
    )


def _barrier_table(config: MergeConfig, records: Records) -> report.Table:
    rows = []
    for family in config.families:
        for arm in ARMS:
            barriers, losses = values(records, family, arm), values(records, family, arm, "losses")
            halfway = with_error(losses[:, losses.shape[1] // 2], ".3f", ".3f")
            distance = with_error(values(records, family, arm, "distance_after"), ".2f", ".2f")
            rows.append((family, arm, report.paired_interval(barriers), halfway, distance, *barriers.tolist()))
    pairs = [f"{2 * pair}, {2 * pair + 1}" for pair in range(config.pairs)]
    return report.Table(
        ("Family", "Arm", "Barrier", "Loss halfway", "Distance", *pairs),
        rows,
        "Barriers in nats a character: mean over pairs with its 95 % Student interval, and each pair by its seeds. "
        "Loss halfway, and relative distance of stored numbers once aligned (0 equal, 1 unrelated): mean over pairs ± "
        "standard error of that mean.",
        formats={"Barrier": ".3f"} | dict.fromkeys(pairs, ".3f"),
    )


def _difference_table(config: MergeConfig, records: Records) -> report.Table:
    rows = compare(config, records)
    keys = ("family", "first", "second", "interval", "verdict")
    return report.Table(
        ("Family", "First", "Second", "First − second", "Reading"),
        [[r[key] for key in keys] for r in rows],
        "Paired differences of the barriers, with 95 % Student intervals over pairs.",
        f"{len(rows)} intervals are looked at together: one in twenty leaves out zero by chance.",
        {"First − second": "+.3f"},
    )


def _control_table(config: MergeConfig, records: Records) -> report.Table:
    rows = []
    for family in config.families:
        for arm in ARMS:
            barriers = values(records, family, arm, pairing="copy")
            before, after = (
                float(values(records, family, arm, f"distance_{when}", "copy").max()) for when in ("before", "after")
            )
            rows.append((family, arm, report.paired_interval(barriers), float(barriers.max()), before, after))
    return report.Table(
        ("Family", "Arm", "Barrier", "Greatest barrier", "Distance before", "Distance after"),
        rows,
        "Control: a model and a copy of it, moved along the whole gauge. Barriers in nats a character, mean with its "
        "95 % Student interval, and the greatest; greatest relative distance of stored numbers, before and after.",
        formats={"Barrier": ".2g", "Greatest barrier": ".2g", "Distance before": ".2g", "Distance after": ".2g"},
    )


def _path_table(records: Records) -> report.Table:
    weights = [f"{weight:.3g}" for weight in records[0]["weights"]]
    measures = ("barrier", "end_error", "frame", "seconds")
    second = {"seeds": "another seed", "copy": "moved copy"}
    return report.Table(
        ("Family", "Second model", "Arm", "Pair", *weights, "Barrier", "Error of ends", "Frame", "Aligning, s"),
        [
            (r["family"], second[r["pairing"]], r["arm"], r["seed"], *r["losses"], *(r[key] for key in measures))
            for r in records
        ],
        "Every path: held-out loss at each merge weight, the barrier, and by how much the losses at the ends differ "
        "from those of the two models as they are stored.",
        formats={"Error of ends": ".1e", "Aligning, s": ".1f"},
    )


# The report


def paths(config: MergeConfig, records: Records, pairing: str = "seeds") -> report.Figure:
    """The loss along the paths, a panel a family."""
    panels = {
        family: [
            report.Series(arm, records[0]["weights"], values(records, family, arm, "losses", pairing)) for arm in ARMS
        ]
        for family in config.families
    }
    return report.Figure(
        report.small_multiples(panels, x_label="merge weight", y_label="held-out loss, nats", columns=1),
        "Held-out loss between two models: mean over pairs ± one standard error, thin lines for each pair.",
        "Loss against merge weight, a panel for each family, a curve for each arm.",
    )


def forest(comparison: Records, family: str) -> report.Figure:
    """The paired differences of one family."""
    rows = [
        report.IntervalRow(f"{r['first']} − {r['second']}", *r["interval"], points=tuple(r["difference"]))
        for r in comparison
        if r["family"] == family
    ]
    return report.Figure(
        report.intervals(rows, x_label="difference of barriers, nats"),
        f"Family {family}: mean, 95 % interval, each pair. Left of zero the first is better.",
        f"Forest plot of the paired differences of barriers of the family {family}.",
    )


def _summary(config: MergeConfig, records: Records, comparison: Records) -> list[str]:
    """What the rule says: a paragraph for each family."""
    paragraphs = []
    for family in config.families:
        means = ", ".join(f"{arm} {with_error(values(records, family, arm), '.3f', '.3f')}" for arm in ARMS)
        calls = ". ".join(
            f"{r['first'].capitalize()} against {r['second']}: {r['verdict']}"
            for r in comparison
            if r["family"] == family
        )
        paragraphs.append(f"Family {family}, barrier in nats a character: {means}. {calls}.")
    return paragraphs


def _write_report(config: MergeConfig, trained: Records, records: Records) -> Path:
    every, comparison, figure = tables(config, trained, records), compare(config, records), paths(config, records)
    forests = [forest(comparison, family) for family in config.families]
    sections = [
        report.Section("What was run", [
            f"Families: {', '.join(config.families)}. {2 * config.pairs} models each, {config.steps} steps of "
            f"{config.batch_size} windows; {config.pairs} pairs, {config.points} merge weights, {config.windows} "
            "held-out windows. The protocol is the docstring of `erlangen.studies.merging`.",
        ]),
        report.Section("Between two seeds", [figure, every["barriers"]]),
        report.Section("Differences", [*forests, every["differences"]]),
        report.Section("Control: a moved copy", [paths(config, records, "copy"), every["control"]]),
        report.Section("Every model", [every["models"]]),
        report.Section("Every path", [every["paths"]]),
    ]  # fmt: skip
    html = report.page("Between two language models", _summary(config, records, comparison), sections)
    data = {"config": config, "models": trained, "paths": records}
    path = report.write_report(config.out, "merging", html, data, every)
    copy_tables(config.csv, "merging", every)
    for folder in (config.out, config.csv):
        if folder is not None:
            (folder / "merging_paths.svg").write_text(figure.svg)
    return path
