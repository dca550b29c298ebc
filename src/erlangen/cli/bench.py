"""``erlangen bench``."""

import sys
from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from erlangen.bench.lie import LieBenchConfig, run

_USAGE = """\
usage: erlangen bench NAME [options]

  lie    time and peak memory of attention between poses against their number

  erlangen bench NAME --help    options and an example
"""

_LIE = """\
Time and peak memory of attention between poses against their number, forward and backward, beside SDPA on the same
values and the least that the arithmetic allows. Writes rows in CSV and a page with plots.

  erlangen bench lie                                            to 8192 poses on SE(2) and SE(3)
  erlangen bench lie --groups SE2 --sizes 512 2048 --rounds 30  fewer sizes, narrower spread
  erlangen bench lie --variants tiled triton --device cuda

Ctrl-C keeps what was measured: the same call goes on from there.
"""


def main(arguments: Sequence[str]) -> int:
    """Run a benchmark; exit status 0, 2 for one that is not there, 130 for one that was stopped."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if name != "lie":
        print(f"erlangen bench: there is no benchmark {name!r}: choose lie", file=sys.stderr)
        return 2
    config = tyro.cli(LieBenchConfig, args=list(arguments[1:]), prog="erlangen bench lie", description=_LIE)
    console = Console(file=sys.stdout)
    bar = Progress(
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip

    def progress(what: str, done: int, total: int) -> None:
        bar.update(task, description=what, completed=done, total=total)
        if not console.is_terminal:
            console.print(f"{done}/{total} {what}", highlight=False, soft_wrap=True)

    try:
        with bar:
            task = bar.add_task("", total=None)
            path = run(config, progress=progress)
    except KeyboardInterrupt:
        console.print(f"stopped; {config.out} keeps what was measured, the same call goes on", soft_wrap=True)
        return 130
    console.print(f"the report: {path}", highlight=False, soft_wrap=True)
    return 0
