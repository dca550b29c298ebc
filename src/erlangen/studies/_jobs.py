"""Running the jobs of a study: several at a time, stopped and taken up again.

A job is a function that a worker process calls. What it makes is kept where the next run finds it: in `Cells`, or in
files of its own.
"""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erlangen.lm.train import stop_on_signal

Progress = Callable[[int, int], None]
"""Called several times a second with the steps done and the steps there are, over all jobs."""

Tick = Callable[[int], bool]
"""What a job calls after each step, with the number of its steps so far: whether it has to stop now."""


def at_least_one(config: Any, *names: str) -> None:
    """Check the numbers of a config; ``workers`` may be None besides.

    Raises:
        ValueError: one is below 1.
    """
    for name in (*names, "workers"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, received {value}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Work for one process, on one thread."""

    work: Callable[..., Any]
    """Called as ``work(tick, *arguments)``, by its name. When `Tick` says so it puts by what it can and raises
    KeyboardInterrupt."""
    arguments: tuple[Any, ...] = ()
    steps: int = 1
    """Its share of the progress."""
    finished: bool = False
    """Done by an earlier run: not run again."""
    keep: Callable[[Any], None] | None = None
    """Called in this process with what the work returned."""


def execute(jobs: Sequence[Job], *, workers: int | None = None, progress: Progress | None = None) -> None:
    """Run the jobs that are not finished, in this order, several at a time.

    Ctrl-C or SIGTERM stops all of them after their current step, and so does an error in one or in ``progress``. What
    the others had finished by then is kept.

    Args:
        jobs: all of them.
        workers: processes; None for one a core.
        progress: told how far all of them are.

    Raises:
        KeyboardInterrupt: stopped.
    """
    total = sum(job.steps for job in jobs)
    before = sum(job.steps for job in jobs if job.finished)
    todo = [job for job in jobs if not job.finished]
    context = multiprocessing.get_context("spawn")
    steps, stop = context.RawArray("q", max(1, len(todo))), context.Event()

    def show() -> None:
        if progress is not None:
            progress(before + sum(steps), total)

    show()
    if not todo:
        return
    workers = min(workers or os.cpu_count() or 1, len(todo))
    with stop_on_signal() as told, ProcessPoolExecutor(workers, context, _start, (steps, stop)) as pool:
        pending: dict[Future[Any], int] = {
            pool.submit(_work, number, job.work, job.arguments): number for number, job in enumerate(todo)
        }

        def take(future: Future[Any]) -> None:
            number = pending.pop(future)
            result, job = future.result(), todo[number]
            if job.keep is not None:
                job.keep(result)
            steps[number] = job.steps

        try:
            while pending:
                done = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED).done
                for future in sorted(done, key=pending.__getitem__):
                    take(future)
                show()
                if told.is_set():
                    raise KeyboardInterrupt
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            for future in list(pending):
                if not future.cancelled() and future.exception() is None:
                    take(future)
            if told.is_set():
                raise KeyboardInterrupt from None  # also where the signal went to the workers as well, and ended them
            raise


class _Worker:
    """What a worker process shares with the one that started it."""

    steps: Any
    stop: Any


def _start(steps: Any, stop: Any) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes: the one that started us says when
    _Worker.steps, _Worker.stop = steps, stop


def _work(number: int, work: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    def tick(step: int) -> bool:
        _Worker.steps[number] = step
        return _Worker.stop.is_set()

    if _Worker.stop.is_set():
        raise KeyboardInterrupt
    return work(tick, *arguments)


class Cells:
    """Finished cells of a study, in JSON lines, with the settings they belong to in the first.

    Args:
        path: the file; made with its folder if it is not there. A line that was cut short is dropped.
        settings: what must agree for the cells to be of this study.

    Raises:
        ValueError: the file holds cells of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        expected = json.loads(json.dumps(settings))
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        if whole and whole[0] != expected:
            raise ValueError(f"{path} holds cells of other settings: remove it or choose another folder")
        self.records = {record["key"]: record for record in whole[1:]}
        aside = path.with_name(path.name + ".writing")
        aside.write_text("".join(json.dumps(line) + "\n" for line in [expected, *self.records.values()]))
        os.replace(aside, path)

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Keep records, each by its ``key``."""
        for record in records:
            self.records[record["key"]] = dict(record)
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def missing(self, prefix: str, count: int) -> list[int]:
        """The seeds below ``count`` without a record ``<prefix>/<seed>``."""
        return [seed for seed in range(count) if f"{prefix}/{seed}" not in self.records]


def print_progress() -> Progress:
    """A progress that prints a line a percent, of each part of a study anew."""
    shown = (0, -1)

    def progress(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // total
        if total != shown[0] or percent > shown[1]:
            shown = (total, percent)
            print(f"{percent} % of {total} steps", flush=True)

    return progress
