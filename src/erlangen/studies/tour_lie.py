"""The tour's second part: who finds the missing pose of a sequence.

Protocol, fixed before any run: that of `erlangen.studies.lie_completion`, of which this is one case, the task
"sequence" on SE(2), with the tour's seeds instead of five. At the tour's own number of steps all sizes are those of the
study. The picture shows the first test sequence, the answers of all seeds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from erlangen import lie, report

from . import lie_completion
from ._reading import Part, by_seed, with_error
from .lie_completion.arms import ARMS, LEARNED
from .lie_completion.tasks import CEILING, LENGTH, test_set

TASK, GROUP = "sequence", "SE2"
PRECISIONS = ("float32", "float64")

Cells = Mapping[str, Sequence[Mapping[str, Any]]]
"""The records of each arm, in order of the seed."""


def declared_config(*, out: Path, seeds: int, steps: int) -> lie_completion.CompletionConfig:
    """The declared case of the study; its cells are kept in ``out``."""
    return lie_completion.CompletionConfig(out=out, tasks=(TASK,), groups=(GROUP,), seeds=seeds, steps=steps)


def part(config: lie_completion.CompletionConfig, records: Sequence[Mapping[str, Any]]) -> Part:
    """Part two of the page, of the records of `lie_completion.measure`."""
    cells = {arm: by_seed(records, arm=arm) for arm in ARMS}
    comparison = {row["second"]: row for row in lie_completion.compare(config, records)}
    arms_table, invariance_table = _arms_table(cells, comparison), _invariance_table(cells)
    (spacing,) = (cell["spacing"] for cell in cells["formula"])
    sections = [
        report.Section("Part two: attention between poses", [
            "A pose g is a place and a heading, an element of the group SE(2). Attention between poses scores pose i "
            "for pose j by the length of log(g_i⁻¹ g_j), the motion that leads from one to the other: when all poses "
            f"are moved together, nothing changes. The task: {LENGTH} poses, each reached from the last by the same "
            "motion; an inner one is taken out, the others are shuffled; find the missing one. An error is the length "
            "of the motion from the answer to the truth, a turn of one radian counting as √2.",
            "Four arms. The formula learns nothing: it looks for the pair of poses with a hole half way. The closed "
            "form and the learned kernel are the same model of one attention layer, but for its scores: minus the "
            "squared length, its parts weighted by learned numbers, or a perceptron on the logarithm. The vectors are "
            f"a transformer on flattened matrices. All learned arms have {config.steps} steps of {config.batch_size} "
            f"on {config.train_size} sequences; {config.seeds} seeds. The rule was fixed before the runs: the median "
            f"error on {config.test_size} fixed test sequences, seed by seed, and a difference is called only where "
            "its 95 % interval leaves out zero.",
            report.Figure(
                _picture(config, cells),
                "The first test sequence, an arrow a pose, and the answers of all seeds. A right answer is inside the "
                "ring, along its arrow.",
                "A row of arrows with a ring where one is missing, and the arrows of the answers near it or away.",
            ),
        ]),
        report.Section("Who finds the missing pose?", [
            arms_table,
            report.Figure(
                report.intervals(
                    [
                        report.IntervalRow(f"closed form −\n{a}", *row["interval"], points=tuple(row["difference"]))
                        for a, row in comparison.items() if a != "formula"
                    ],
                    x_label="difference of the median errors",
                ),
                "Difference of median errors: mean, 95 % interval, each seed. Left of zero the closed form is better.",
                "Forest plot of the paired differences in the table above.",
            ),
            "This task has an exact answer without learning: the midpoint of the two neighbours of the gap, which the "
            "formula finds to rounding. So the learned arms show what training makes of their architecture, not that "
            f"it is needed. The nearest given pose is {spacing:.2f} away, which an answer should beat.",
        ]),
        report.Section("Moving all poses", [
            "Move all poses by one h, and the answer should move along. By construction it does in the first three "
            "arms, to the rounding of the poses. The vectors have to learn it from sequences that training puts "
            "somewhere else on every step; never as far away as 1000.",
            invariance_table,
        ]),
        report.Section("Every seed of part two", [seeds_table := _seeds_table(cells)]),
    ]  # fmt: skip
    calls = "; ".join(f"against the {arm}: {comparison[arm]['verdict']}" for arm in ("learned kernel", "vectors"))
    return Part(
        summary=f"Attention between poses, asked for the missing one of a sequence. The closed form {calls}. A formula "
        "without learning solves this task exactly.",
        sections=sections,
        tables={"lie_arms": arms_table, "lie_invariance": invariance_table, "lie_seeds": seeds_table},
    )


def _arms_table(cells: Cells, comparison: Mapping[str, Mapping[str, Any]]) -> report.Table:
    rows = []
    for arm in ARMS:
        error = with_error(np.array([cell["median"] for cell in cells[arm]]), ".2g" if arm == "formula" else ".3g")
        row = comparison.get(arm, {"interval": None, "verdict": ""})
        rows.append((arm, error, row["interval"], row["verdict"], cells[arm][0]["score_parameters"]))
    whole = ", ".join(f"{arm} {cells[arm][0]['parameters']:,}" for arm in LEARNED)
    return report.Table(
        ("Arm", "Median error", "Closed form − this", "Reading", "Parameters of the scores"),
        rows,
        "Median error ‖log(ĝ⁻¹ g*)‖, mean over seeds ± standard error of that mean; and paired differences, with their "
        "95 % intervals.",
        "Training and test sequences are the same for all seeds: the intervals are about training, not about the "
        "choice of sequences. The formula has no seed: its one error is taken from each. Parameters of the whole "
        f"models: {whole}.",
        {"Closed form − this": "+.3f"},
    )


def _invariance_table(cells: Cells) -> report.Table:
    kinds = {"random": "random move", "translation 1000": "1000 away"}
    columns = [f"{title}, {precision}" for title in kinds.values() for precision in PRECISIONS]
    rows = [
        (
            arm,
            *(
                float(np.median([cell["invariance"][precision][kind][0] for cell in cells[arm]]))
                for kind in kinds
                for precision in PRECISIONS
            ),
        )
        for arm in ARMS
    ]
    return report.Table(
        ("Arm", *columns),
        rows,
        "How far the answer is from moving along, ‖(h out(g))⁻¹ out(h g) − 1‖: median over sequences and seeds.",
        formats=dict.fromkeys(columns, ".0e"),
    )


def _seeds_table(cells: Cells) -> report.Table:
    return report.Table(
        ("Arm", "Seed", "Median error", "Mean error", "Errors cut"),
        [(arm, *(cell[key] for key in ("seed", "median", "mean", "outside"))) for arm in ARMS for cell in cells[arm]],
        f"Every seed: median and mean error, each error cut at {CEILING:g}, and how many were.",
        formats={"Median error": ".3g", "Mean error": ".3g"},
    )


def _picture(config: lie_completion.CompletionConfig, cells: Cells) -> str:
    given, missing = test_set(lie.parse(GROUP), TASK, config.test_size)

    def arrows(label: str, poses: Any, kind: Literal["answer", "given", "truth"] = "answer") -> report.Arrows:
        poses = np.asarray(poses, dtype=np.float64)
        return report.Arrows(label, poses[:, 0, 2], poses[:, 1, 2], np.arctan2(poses[:, 1, 0], poses[:, 0, 0]), kind)

    answers = [arrows(arm, [cell["first_answer"] for cell in cells[arm]]) for arm in (*LEARNED, "formula")]
    return report.arrows(
        [arrows("given", given[0], "given"), arrows("missing", missing[0], "truth"), *answers], x_label="x", y_label="y"
    )
