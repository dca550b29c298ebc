"""``erlangen tour``."""

import sys
from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from erlangen.studies.tour import TourConfig, tour

_DESCRIPTION = """\
Train small transformers, symmetric and broken, under four optimisers; look for missing poses with attention on a Lie
group; recognise motifs never seen, with and without the symmetry of the two strands; break the symmetry of heads, or
reduce it; and write one HTML report of all.

  erlangen tour                 about six minutes on two cores; writes tour/tour.html
  erlangen tour --seeds 10      narrower intervals; the runs there are already are kept

Ctrl-C is safe: the next call goes on from there. What takes seconds, a search for
poses or motifs in progress, starts over.
"""


def main(arguments: Sequence[str]) -> int:
    """Take the tour; exit status 0."""
    config = tyro.cli(TourConfig, args=list(arguments), prog="erlangen tour", description=_DESCRIPTION)
    console = Console(file=sys.stdout)
    bar = Progress(
        TextColumn("training"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    )  # fmt: skip
    shown = -1

    def progress(done: int, total: int) -> None:
        nonlocal shown
        bar.update(task, completed=done, total=total)
        tenth = 10 * done // total
        if not console.is_terminal and tenth > shown:
            shown = tenth
            console.print(f"{10 * tenth} % of {total} steps")

    with bar:
        task = bar.add_task("training", total=None)
        path = tour(config, progress=progress)
    console.print(f"the report: {path}", highlight=False, soft_wrap=True)
    return 0
