"""``erlangen compare``: two checkpoints, up to gauge."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import erlangen
from erlangen import report
from erlangen.gauge import compare

from . import _gauge_page as pages
from ._gauge_files import check_out, opened, print_table, progress_bar, say, stdout

_DESCRIPTION = """\
Are two checkpoints the same function, and if not, how far apart are they, layer by layer and head by head?

  erlangen compare base fine-tuned               two folders of Hugging Face, with config.json and safetensors
  erlangen compare run-1 run-2                   two runs of erlangen train
  erlangen compare mine suspect --out evidence   somewhere else

Two checkpoints may differ in every number and compute the same: heads turned and stretched, neurons rescaled, both in
another order, gains of norms moved into maps, the residual stream turned. Distances here do not see that: 0 is the same
function, 1 is unrelated. Heads are matched with heads, neurons with neurons; the distance of the stored numbers stands
beside. Prints a table, and writes compare.html and compare.json.

Ctrl-C stops at once, and nothing is written. No file is ever half written.
"""

NAME = "compare"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What `erlangen compare` is to compare."""

    first: Annotated[Path, tyro.conf.Positional]
    """A folder of Hugging Face, or a run of `erlangen train`."""
    second: Annotated[Path, tyro.conf.Positional]
    """Another, of the same architecture and size."""
    out: Path = Path(NAME)
    """Folder for the results; those of an earlier call are replaced."""


def main(arguments: Sequence[str]) -> int:
    """Compare two checkpoints; exit status 0, whatever comes of it."""
    config = tyro.cli(CompareConfig, args=list(arguments), prog="erlangen compare", description=_DESCRIPTION)
    check_out(config.out, NAME)
    console = stdout()
    with progress_bar(console, "comparing") as progress:
        result = compare(opened(config.first), opened(config.second), progress=progress)
    names = config.first.resolve().name, config.second.resolve().name
    page = pages.compare_page(*names, result)
    data = {"command": f"erlangen {NAME}", "version": erlangen.__version__, "config": config, **result.to_json()}
    path = report.write_report(config.out, NAME, page, data, {})
    short = ("layer", "QK", "VO", "MLP", "rest", "stored numbers", "heads moved", "neurons moved")
    print_table(console, "distances by layer", short, pages.layer_rows(result)[1])
    for line in pages.compare_summary(*names, result):
        say(console, line)
    say(console, f"the report: {path}")
    return 0
