"""``erlangen train``."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from erlangen import lm
from erlangen.lm.settings import from_dict

from ._train_page import per_cent, write_train_page

_DESCRIPTION = """\
Train a language model.

  erlangen train                                          a tiny byte model on the standard library's source
  erlangen train --data.corpus book.txt --steps 2000      on a text of yours
  erlangen train --optimizer.name ecd --breaking.enabled  energy-conserving descent, head symmetry broken
  erlangen train --reduction.kind horizontal              no step in directions that change nothing
  erlangen train --preset 124m --data.corpus hf:HuggingFaceFW/fineweb-edu:sample-10BT --data.tokenizer gpt2
  erlangen train --preset symmetry-breaking-124m          the published protocol; ...-sound: the one to use instead
  erlangen train --resume runs/NAME                       go on with a stopped run
  torchrun --nproc-per-node 2 -m erlangen train --parallel fsdp ...

Ctrl-C stops after the current step and writes a checkpoint; a second one stops at once. After its last step a run
writes report.html beside its log.
"""


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train a language model."""

    preset: Literal["tiny", "small", "medium", "124m", "symmetry-breaking-124m", "symmetry-breaking-124m-sound"] = (
        "tiny"
    )
    """Size of the model, or a whole run; the defaults below are those of the preset and of --optimizer.name."""
    resume: Path | None = None
    """Go on with the run in this folder, with the options it was started with."""
    config: Annotated[lm.TrainConfig, tyro.conf.arg(name="")] = field(default_factory=lm.TrainConfig)


def _value(option: str, arguments: Sequence[str]) -> str | None:
    """What the arguments say of an option; it decides the defaults of the others."""
    found = None
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            found = arguments[i + 1]
        elif argument.startswith(f"{option}="):
            found = argument.partition("=")[2]
    return found


def parse(arguments: Sequence[str]) -> TrainCommand:
    """The command that the arguments spell."""
    name, optimizer = _value("--preset", arguments) or "tiny", _value("--optimizer.name", arguments)
    try:
        config = lm.run_preset(name, optimizer)  # pyrefly: ignore[bad-argument-type]
    except ValueError:  # a name that there is not, which the parser reports
        config = lm.TrainConfig()
    return tyro.cli(
        TrainCommand, args=list(arguments), default=TrainCommand(config=config), prog="erlangen train",
        description=_DESCRIPTION,
    )  # fmt: skip


class Reporter:
    """A progress bar on a terminal; elsewhere a line at each validation."""

    def __init__(self, console: Console, steps: int | None) -> None:
        self.console = console
        self.steps = steps
        self.live = console.is_terminal
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        self.task = self.bar.add_task("training", total=steps)

    def reading(self, done: int, total: int) -> None:
        """Show how much of a streamed data set has been read."""
        self.bar.update(self.task, completed=done, total=total, description="reading, tokens")

    def __call__(self, step: int, record: Mapping[str, Any]) -> None:
        self.bar.update(self.task, completed=step, total=self.steps, description=f"loss {record['loss']:.4f}")
        if "validation_loss" in record:
            error = record["validation_standard_error"]
            spread = "" if error is None else f" ± {error:.4f}"
            self.console.print(
                f"step {step}: loss {record['loss']:.4f}, validation {record['validation_loss']:.4f}{spread}"
                + _gauge_words(record.get("gauge")),
                highlight=False,
                soft_wrap=True,
            )


def _gauge_words(found: Mapping[str, Any] | None) -> str:
    """What a validation says of the gauge directions, to go on its line."""
    if found is None:
        return ""
    share, drift, distance = (per_cent(found[name]) for name in ("vertical_share", "charge_drift", "orbit_distance"))
    return f"; along gauge {share}, charge drift {drift}, products moved {distance}"


def _write_page(result: lm.TrainResult, console: Console) -> None:
    """Write the page of a finished run; that it cannot be written is no failure of the run."""
    try:
        config = from_dict(lm.TrainConfig, json.loads((result.folder / "config.json").read_text()))
        path = write_train_page(result, config)
    except (ImportError, OSError) as error:
        console.print(f"no report was written: {error}", highlight=False, soft_wrap=True)
        return
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


def main(arguments: Sequence[str]) -> int:
    """Train or resume; exit status 0, or 130 for a run that was stopped and can be resumed."""
    command = parse(arguments)
    first = int(os.environ.get("RANK", 0)) == 0
    console = Console(file=sys.stdout, quiet=not first)
    total = None if command.resume else command.config.steps
    reporter = Reporter(console, total)
    with reporter.bar if first else nullcontext():
        if command.resume is not None:
            result = lm.resume(command.resume, progress=reporter, reading=reporter.reading)
        else:
            result = lm.train(command.config, progress=reporter, reading=reporter.reading)
    if not result.finished:
        console.print(f"stopped; go on with: erlangen train --resume {result.folder}", highlight=False, soft_wrap=True)
        return 130
    if first:
        _write_page(result, console)
    console.print(f"done: {result.folder}", highlight=False, soft_wrap=True)
    return 0
