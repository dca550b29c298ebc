"""The tour's third part: motifs that training never saw, with a symmetry that it did; and the strands of real DNA.

Protocol, fixed before any run: that of `erlangen.studies.finite_motifs`, of which this is one case, the task
"palindrome", with the tour's seeds and number of steps.

Where the folder ``dna`` of ``ERLANGEN_DATA`` has them, a strict and a free model of the same kind are trained besides,
on the middle 48 letters of the NANOG binding sites (ENCODE, human embryonic stem cells) and of about as many other
places, one seed, as many steps; chromosomes 1 and 2 are held out. It is an audit of strands, not a comparison.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erlangen import report
from erlangen.finite.sequences import read_fasta

from . import finite_motifs
from ._jobs import Cells, Job, Progress, Tick, execute
from ._reading import Part, by_seed, with_error
from .finite_motifs import results
from .finite_motifs.arms import ARMS, score, train
from .finite_motifs.study import LEARNING_RATES, makes
from .finite_motifs.tasks import ARM, LENGTH, both_strands, random_data, spell

TASK, DNA = "palindrome", "dna"
DNA_ARMS, DNA_LENGTH = ("strict", "free"), 48


def declared_config(*, out: Path, seeds: int, steps: int) -> finite_motifs.MotifConfig:
    """The declared case of the study; its cells are kept in ``out``."""
    return finite_motifs.MotifConfig(out=out, tasks=(TASK,), seeds=seeds, steps=steps)


def dna_folder() -> Path | None:
    """The folder with the NANOG files, if it is there."""
    folder = Path(os.environ.get("ERLANGEN_DATA", "data")) / "dna"
    names = (f"nanog_{label}_{split}.fa" for label in ("positives", "negatives") for split in ("train", "test"))
    return folder if all((folder / name).exists() for name in names) else None


def declared_jobs(config: finite_motifs.MotifConfig, cells: Cells) -> list[Job]:
    """The jobs of the study's case, and the audit of real DNA if its files are there."""
    jobs = finite_motifs.declared_jobs(config, cells)
    folder = dna_folder()
    if folder is not None:
        finished = all(f"{DNA}/{arm}/0" in cells.records for arm in DNA_ARMS)
        steps = len(DNA_ARMS) * config.steps
        jobs.insert(0, Job(work=_audit, arguments=(config, folder), steps=steps, finished=finished, keep=cells.add))
    return jobs


def measure(config: finite_motifs.MotifConfig, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Run what is declared and not on disk yet: the records of `finite_motifs.measure`, and of the audit."""
    cells = finite_motifs.kept_cells(config)
    execute(declared_jobs(config, cells), workers=config.workers, progress=progress)
    return [*finite_motifs.measure(config), *(r for r in cells.records.values() if r["task"] == DNA)]


def dna_windows(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """The middle letters of all places of a split, int64 [B, 48], and which of them NANOG binds, float32 [B]."""
    parts = []
    for label in ("negatives", "positives"):
        tokens = [record.tokens for record in read_fasta(folder / f"nanog_{label}_{split}.fa", unknown="N")]
        middles = [t[(len(t) - DNA_LENGTH) // 2 :][:DNA_LENGTH] for t in tokens if len(t) >= DNA_LENGTH]
        parts.append(torch.tensor([middle.tolist() for middle in middles if middle.min() >= 0]))
    labels = torch.arange(2.0).repeat_interleave(torch.tensor([len(part) for part in parts]))
    return torch.cat(parts), labels


def _audit(tick: Tick, config: finite_motifs.MotifConfig, folder: Path) -> list[dict[str, Any]]:
    windows, tests = dna_windows(folder, "train"), both_strands(TASK, *dna_windows(folder, "test"))
    records = []
    for number, arm in enumerate(DNA_ARMS):
        model = train(
            arm, windows, seed=0, steps=config.steps, batch_size=config.batch_size, lr=LEARNING_RATES[arm],
            tick=lambda step, before=number * config.steps: tick(before + step),
        )  # fmt: skip
        for name in makes(arm):
            found = score(model, tests, both=name == "post-hoc")
            records.append({"key": f"{DNA}/{name}/0", "task": DNA, "arm": name, "seed": 0, "test": found})
    return records


def part(config: finite_motifs.MotifConfig, records: Sequence[Mapping[str, Any]]) -> Part:
    """Part three of the page, of the records of `measure`; without those of the audit, it says so."""
    audit, records = by_seed(records, task=DNA), by_seed(records, task=TASK)
    comparison = results.compare(config, records)
    arms_table, costs, seeds_table = _arms_table(config, records), results.cost_table(records), _seeds_table(records)
    dials = with_error(results.mean_share(records, TASK), ".2f", ".2f")
    example = random_data(TASK, 0, train_size=2, test_size=1).train[0]
    start = LENGTH // 2 - ARM
    decoy, palindrome = (
        " ".join((text[:start], text[start : LENGTH // 2], text[LENGTH // 2 : -start], text[-start:]))
        for text in map(spell, example)
    )
    tables = {"finite_arms": arms_table, "finite_seeds": seeds_table, "finite_costs": costs}
    sections = [
        report.Section("Part three: motifs never seen, a symmetry seen before", [
            "DNA has two strands, and one read backwards with A and T, C and G exchanged is the other: a group of two "
            f"elements. Windows of {LENGTH} letters have in their middle two arms of {ARM}: the second is the reverse "
            "complement of the first, a palindrome such as restriction enzymes bind, or the same letters in a wrong "
            "order. Tell which. Training knows 32 palindromes; testing asks for others. A twentieth of the arms' "
            f"letters is replaced by chance. Wrong order: `{decoy}`. Palindrome: `{palindrome}`.",
            "Five arms of one width and depth. Strict: equivariant layers, so that both strands have the same answer. "
            "Dial: the same with dense layers whose part that breaks the symmetry has a learned factor from 0 to 1. "
            "Free: a plain transformer. Augmentation: the free one, shown each window from a random strand. Post-hoc: "
            f"the free one, averaged over both strands afterwards. {config.seeds} seeds, each with its own motifs, "
            f"windows and weights; {config.steps} steps of {config.batch_size} on {config.train_size} windows.",
            "The rule was fixed before the runs: the share of wrong labels, seed by seed, and a difference is called "
            "only where its 95 % interval leaves out zero.",
        ]),
        report.Section("Who knows an unseen palindrome?", [
            arms_table,
            results.forest(comparison, TASK),
            f"With learned dials, {dials} of the squared weights break the symmetry, mean over layers and seeds; it is "
            "one eighth at the start, and 0 in the strict arm.",
            costs,
        ]),
    ]  # fmt: skip
    if audit:
        tables["finite_dna"] = _dna_table(audit)
        body: list[Any] = [
            f"Does a place of {DNA_LENGTH} letters bind NANOG, a protein of embryonic stem cells? Nothing says which "
            "strand to read. One seed, chromosomes 1 and 2 held out; so few letters and steps are far from what the "
            "data allow. What to look at is how often the answer depends on the strand.",
            tables["finite_dna"],
        ]
    else:
        body = ["No files `nanog_*.fa` in the folder `dna` of ERLANGEN_DATA: real DNA is left out."]
    sections.append(report.Section("Both strands of real DNA", body))
    sections.append(report.Section("Every seed of part three", [seeds_table]))
    calls = "; ".join(
        f"{r['first']} against {r['second']}: {r['verdict']}"
        for r in comparison
        if r["test"] == "unseen" and r["first"] == "strict"
    )
    return Part(
        summary=f"Palindromes of DNA that training never saw. On these, {calls}.", sections=sections, tables=tables
    )


def _arms_table(config: finite_motifs.MotifConfig, records: Sequence[Mapping[str, Any]]) -> report.Table:
    rows_of = results.compare(config, records)
    comparison = {r["second"]: r for r in rows_of if (r["first"], r["test"]) == ("strict", "unseen")}
    rows = []
    for arm in ARMS:
        errors = (with_error(100 * results.values(records, TASK, arm, t, "error"), ".1f", ".1f") for t in results.TESTS)
        row = comparison.get(arm, {"interval": None, "verdict": ""})
        changes = (float(results.values(records, TASK, arm, "unseen", key).mean()) for key in ("invariance", "flips"))
        rows.append((arm, *errors, row["interval"], row["verdict"], *changes))
    return report.Table(
        ("Arm", "Error, unseen, %", "Error, seen, %", "Strict − this", "Reading", "|logit(x) − logit(hx)|", "Flips"),
        rows,
        "Wrong labels on windows with unseen and with seen motifs, mean over seeds ± standard error of that mean; "
        "paired differences of the share of wrong labels on unseen motifs, with 95 % intervals; and what the other "
        "strand changes: the logit, and the label.",
        "Guessing is wrong in 50 %. The dial is compared in the study itself.",
        {"Strict − this": "+.3f", "|logit(x) − logit(hx)|": ".2g", "Flips": ".1%"},
    )


def _seeds_table(records: Sequence[Mapping[str, Any]]) -> report.Table:
    measures = [(test, key) for test in results.TESTS for key in ("error", "log_loss")]
    return report.Table(
        ("Arm", "Seed", *(f"{key.replace('_', ' ')}, {test}" for test, key in measures)),
        [
            (arm, r["seed"], *(r[test][key] for test, key in measures))
            for arm in ARMS
            for r in by_seed(records, arm=arm)
        ],
        "Every seed: share of wrong labels, and log loss in nats.",
        formats={"Seed": "d"} | {f"{key.replace('_', ' ')}, {test}": ".3f" for test, key in measures},
    )


def _dna_table(audit: Sequence[Mapping[str, Any]]) -> report.Table:
    found = {r["arm"]: r["test"] for r in audit}
    keys = ("error", "log_loss", "invariance", "flips")
    return report.Table(
        ("Arm", "Error", "Log loss", "|logit(x) − logit(hx)|", "Flips"),
        [(arm, *(found[arm][key] for key in keys)) for arm in (*DNA_ARMS, "post-hoc")],
        "Held-out places of real DNA, each read from both strands.",
        formats={"Error": ".1%", "Log loss": ".3f", "|logit(x) − logit(hx)|": ".2g", "Flips": ".1%"},
    )
