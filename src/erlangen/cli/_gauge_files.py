"""What the three commands about the gauge share: folders of results, a bar, and what is said of numbers."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from erlangen.lm import GPT, load


def check_out(out: Path, name: str) -> None:
    """The folder for results is one, and holds none of something else.

    Raises:
        ValueError: it is a file, or holds files of these names that another program wrote.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: choose a folder")
    there = [file for file in (f"{name}.json", f"{name}.html") if (out / file).exists()]
    if there and not _is_ours(out / f"{name}.json", name):
        raise ValueError(f"{out} holds {' and '.join(there)} of something else: choose another --out")


def _is_ours(path: Path, name: str) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("command") == f"erlangen {name}"
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def progress_bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar while something is done, that takes the number of steps done and of all; nothing without a terminal."""
    bar = Progress(
        TextColumn(what), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def stdout() -> Console:
    """A console on what is the standard output now."""
    return Console(file=sys.stdout)


def say(console: Console, line: str) -> None:
    """A line as it is."""
    console.print(line.replace("`", ""), highlight=False, markup=False, soft_wrap=True)


def print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table in the terminal; what was not measured is a dash."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="right" if number else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        text = f"{value:.3g}"
        return f"{value:.1e}" if "e" in text else text
    return f"{value:,}" if isinstance(value, int) else str(value)


def opened(path: Path) -> Path | GPT:
    """A folder of Hugging Face as it is; the model of a run, or a checkpoint, of ``erlangen train``."""
    if (path / "checkpoint.json").is_file() or any(path.glob("step-*/checkpoint.json")):
        return load(path)
    return path
