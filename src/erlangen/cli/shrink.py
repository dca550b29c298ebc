"""``erlangen shrink``: a checkpoint without the numbers that a gauge makes redundant."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import erlangen
from erlangen import report
from erlangen.interop.shrinking import shrink_folder

from . import _shrink_page as pages
from ._gauge_files import check_out, print_table, progress_bar, say, stdout
from .merge import read_text

_DESCRIPTION = """\
Store and compute less: write a checkpoint whose heads hold an identity block, which is neither stored nor multiplied.

  erlangen shrink gpt2 gpt2-shrunk
  erlangen shrink gpt2 out --keep 0.99 --text sample.txt    drop what carries 1 % of the energy, weighed on a text
  erlangen shrink gpt2 out --keep 48                        48 coordinates of each head

Without --keep the model computes what it did. How much is saved depends on the architecture: where positions turn
queries and keys, or norms stand between them, only values and outputs have a block. With --keep, directions that carry
little are left out, and the loss on the text is said before and after. The new folder loads in transformers after

  from erlangen.interop import shrunk

and shrink.json in it says what was done. Weights are read a layer at a time (with --text, once as a whole); the old
folder stays as it is. Prints tables, and writes shrink.html and shrink.json.

Ctrl-C stops at once, and nothing is left behind. No file is ever half written.
"""

NAME = "shrink"


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig:
    """What `erlangen shrink` is to write."""

    model: Annotated[Path, tyro.conf.Positional]
    """A folder of Hugging Face."""
    output: Annotated[Path, tyro.conf.Positional]
    """The new folder; it must not exist."""
    keep: int | float | None = None
    """A whole number: so many coordinates of each head. Between 0 and 1: that share of the energy."""
    text: Path | None = None
    """A file of text, by which directions are weighed and on which the loss is taken."""
    noise: float = 2.0
    """How much larger than in the balanced gauge the rounding of a head may become."""
    check: bool = True
    """Compare the outputs before and after."""
    out: Path = Path(NAME)
    """Folder for the report; that of an earlier call is replaced."""


def main(arguments: Sequence[str]) -> int:
    """Shrink a checkpoint; exit status 0."""
    config = tyro.cli(ShrinkConfig, args=list(arguments), prog="erlangen shrink", description=_DESCRIPTION)
    check_out(config.out, NAME)
    text = None if config.text is None else read_text(config.text)
    console = stdout()
    with progress_bar(console, "shrinking") as progress:
        found = shrink_folder(
            config.model,
            config.output,
            keep=config.keep,
            text=text,
            noise=config.noise,
            check=config.check,
            progress=progress,
        )
    name = config.model.resolve().name
    data = {"command": f"erlangen {NAME}", "version": erlangen.__version__, "config": config}
    data |= {"record": json.loads(found.to_json())}
    path = report.write_report(config.out, NAME, pages.shrink_page(name, config.output, found), data, {})
    print_table(console, "before and after", *pages.size_rows(found))
    print_table(console, "layer by layer", *pages.layer_rows(found))
    for line in pages.shrink_summary(name, config.output, found):
        say(console, line)
    say(console, f"the report: {path}")
    return 0
