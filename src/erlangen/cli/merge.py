"""``erlangen merge``: two checkpoints averaged in one gauge."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import erlangen
from erlangen import report
from erlangen.interop.merging import Using, merge_folders

from . import _merge_page as pages
from ._gauge_files import check_out, print_table, progress_bar, say, stdout

_DESCRIPTION = """\
Average two checkpoints of one architecture: the second is brought into the gauge of the first, then both are averaged.

  erlangen merge base-math base-code merged
  erlangen merge base-math base-code merged --weight 0.3           nearer to the first
  erlangen merge base-math base-code merged --text held-out.txt    with the loss all the way from one to the other
  erlangen merge base-math base-code moved --weight 1              the second model itself, in the gauge of the first

Two models may have learned the same in other numbers: heads and neurons in another order, turned and stretched. The
plain average of such numbers is neither model. Here heads and neurons are matched first, and of heads the products are
averaged, cut back to the width of a head. Whether the merge is any good depends on the two models: a text shows the
loss on the way, beside that of the plain average. The new folder loads in transformers as the first did; merge.json in
it says what was done. Weights are read a layer at a time; both folders stay as they are. Prints tables, and writes
merge.html and merge.json.

Ctrl-C stops at once, and nothing is left behind. No file is ever half written.
"""

NAME = "merge"


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """What `erlangen merge` is to write."""

    first: Annotated[Path, tyro.conf.Positional]
    """A folder of Hugging Face."""
    second: Annotated[Path, tyro.conf.Positional]
    """Another, of the same architecture, size and tokenizer."""
    output: Annotated[Path, tyro.conf.Positional]
    """The new folder; it must not exist."""
    weight: float = 0.5
    """Of the second model, from 0 to 1."""
    using: Using = "gauge"
    """What the second model may be moved by: all that changes no output, rotations, permutations, or nothing."""
    text: Path | None = None
    """A file of text, on which the loss is measured between the two models."""
    points: int = 11
    """Of the way between them, at which the loss is measured."""
    check: bool = True
    """Compare the outputs of the second model before and after it is moved."""
    out: Path = Path(NAME)
    """Folder for the report; that of an earlier call is replaced."""


def main(arguments: Sequence[str]) -> int:
    """Merge two checkpoints; exit status 0."""
    config = tyro.cli(MergeConfig, args=list(arguments), prog="erlangen merge", description=_DESCRIPTION)
    check_out(config.out, NAME)
    text = None if config.text is None else read_text(config.text)
    console = stdout()
    with progress_bar(console, "merging") as progress:
        record = merge_folders(
            config.first,
            config.second,
            config.output,
            config.weight,
            using=config.using,
            text=text,
            points=config.points,
            check=config.check,
            progress=progress,
        )
    names = config.first.resolve().name, config.second.resolve().name
    data = {"command": f"erlangen {NAME}", "version": erlangen.__version__, "config": config}
    data |= {"record": json.loads(record.to_json())}
    path = report.write_report(config.out, NAME, pages.merge_page(*names, config.output, record), data, {})
    print_table(console, "matched, layer by layer", *pages.layer_rows(record))
    if record.path is not None:
        print_table(console, "loss on the text, in nats", *pages.loss_rows(record.path))
    for line in pages.merge_summary(*names, config.output, record):
        say(console, line)
    say(console, f"the report: {path}")
    return 0


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or a folder.
    """
    if path.is_dir():
        raise ValueError(f"--text {path} is a folder: name a file of text")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not text in UTF-8 ({error.reason} at byte {error.start})") from error
