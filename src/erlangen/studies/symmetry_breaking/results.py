"""The report: the parts in their order, written anew after each, so that what is finished can be read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erlangen import report
from erlangen._extras import require

from .._jobs import Progress
from .._reading import Part, copy_tables
from .._tuned import Records, finite
from . import one_batch, optimizers, what_breaks
from .study import SECTORS, PartName, SymmetryBreakingConfig, measure, merged


def run(config: SymmetryBreakingConfig, progress: Progress | None = None) -> Path:
    """Run what is declared and not on disk yet, and write the report after each part.

    Returns:
        the path of the HTML file; JSON, CSV and the figures lie beside it.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the folder holds runs of other settings.
    """
    require("matplotlib", "report")
    parts: dict[PartName, tuple[Part, dict[str, report.Figure]]] = {}
    tuned: Records = []
    records: Records = []
    path = config.out / "symmetry_breaking.html"
    for name in config.parts:
        chosen, found = measure(config, name, progress)
        tuned, records = merged(tuned, chosen), merged(records, found)
        if name == "optimizers":
            parts[name] = optimizers.part(config, chosen, found, optimizers.measure_cost(config, progress))
        elif name == "one-batch":
            parts[name] = one_batch.part(config, found)
        else:
            identity = what_breaks.measure_identity(config, progress)
            parts[name] = what_breaks.part(config, chosen, found, identity)
        path = write(config, parts, tuned, records)
    return path


def _run_table(records: Records) -> report.Table:
    return report.Table(
        ("Optimiser", "Cell", "Seed", "Learning rate", "Loss", "Standard error", *SECTORS, "Why it could not go on"),
        [
            (
                r["optimizer"], r["arm"], r["seed"], r["lr"], finite(r["loss"]), r["standard_error"],
                *(r[sector] for sector in SECTORS), r["failure"] or "",
            )
            for r in records
        ],
        "Every run: held-out loss at the last step with its standard error over windows, and the relative charges, "
        "mean over layers and heads.",
        formats={"Learning rate": "g", "Loss": ".4f", "Standard error": ".4f"} | dict.fromkeys(SECTORS, ".1e"),
    )  # fmt: skip


def write(
    config: SymmetryBreakingConfig,
    parts: Mapping[PartName, tuple[Part, Mapping[str, report.Figure]]],
    tuned: Records,
    records: Records,
) -> Path:
    """Write the page, the tables and the figures of the parts that are there."""
    tables = {key: table for part, _ in parts.values() for key, table in part.tables.items()}
    tables["runs"] = _run_table(records)
    run = config.scale.recipe("adamw")
    model, steps = run.model, run.steps if config.steps is None else config.steps
    sections = [
        report.Section("What was run", [
            f"A transformer of {model.num_layers} layers, {model.num_heads} heads and width {model.dim}, {steps} steps "
            f"of {run.batch_size} windows of {model.context_length} tokens of {config.corpus or run.data.corpus}; "
            f"three learning rates a case on one seed, then {config.seeds} seeds at the best; "
            f"{config.scale.eval_windows} fixed held-out windows. The protocol is the docstring of "
            "`erlangen.studies.symmetry_breaking`.",
        ]),
        *(section for part, _ in parts.values() for section in part.sections),
        report.Section("Every run", [tables["runs"]]),
    ]  # fmt: skip
    html = report.page("Symmetry breaking", [part.summary for part, _ in parts.values()], sections)
    data: dict[str, Any] = {"config": config, "tuning": tuned, "runs": records}
    path = report.write_report(config.out, "symmetry_breaking", html, data, tables)
    copy_tables(config.csv, "symmetry_breaking", tables)
    for folder in (config.out, config.csv):
        if folder is not None:
            for _, figures in parts.values():
                for name, figure in figures.items():
                    (folder / f"symmetry_breaking_{name}.svg").write_text(figure.svg)
    return path
