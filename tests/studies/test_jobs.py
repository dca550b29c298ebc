"""Jobs run, are kept and are stopped; cells come back; the rule is read."""

import json
import math
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from erlangen.report import Interval
from erlangen.studies import _jobs, _reading
from erlangen.studies._jobs import Cells, Job, execute


def double(tick, number):
    assert torch.get_num_threads() == 1
    tick(1)
    return 2 * number


def endless(tick, path):
    """Until told to stop; then it writes down how far it came."""
    path.write_text("begun")
    step = 1
    while not tick(step):
        step += 1
        time.sleep(0.01)
    path.write_text(str(step))
    raise KeyboardInterrupt


def fail(tick, begun=None):
    """Once the other has begun."""
    while begun is not None and not begun.exists():
        time.sleep(0.01)
    raise ValueError("this job fails")


def test_jobs_are_run_once_and_kept_and_progress_counts_all_of_them():
    kept, seen = [], []
    jobs = [
        Job(work=fail, finished=True, steps=7),
        *(Job(work=double, arguments=(number,), steps=2, keep=kept.append) for number in range(3)),
    ]
    execute(jobs, workers=1, progress=lambda *counts: seen.append(counts))
    assert kept == [0, 2, 4]
    assert seen[0] == (7, 13) and seen[-1] == (13, 13) and seen == sorted(seen)


def test_nothing_to_do_starts_no_process(monkeypatch):
    monkeypatch.setattr(_jobs, "ProcessPoolExecutor", None)
    seen = []
    execute([Job(work=fail, finished=True)], progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 1)]


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "progress"])
def test_a_stop_ends_jobs_after_their_step_and_keeps_what_is_finished(how, tmp_path):
    kept, path = [], tmp_path / "stopped"
    jobs = [
        Job(work=double, arguments=(1,), keep=kept.append),
        Job(work=endless, arguments=(path,), steps=10**6, keep=kept.append),
        Job(work=double, arguments=(2,), keep=kept.append),
    ]

    def progress(done, total):
        assert total == 10**6 + 2
        if done > 2:  # the endless one has begun
            if how == "progress":
                raise ZeroDivisionError
            os.kill(os.getpid(), getattr(signal, how))

    with pytest.raises(ZeroDivisionError if how == "progress" else KeyboardInterrupt):
        execute(jobs, workers=1, progress=progress)
    assert kept == [2], "the first job is kept, the last was not begun"
    assert 1 <= int(path.read_text()) < 3000
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_in_a_job_stops_the_others_and_is_raised(tmp_path):
    path = tmp_path / "stopped"
    with pytest.raises(ValueError, match="this job fails"):
        execute([Job(work=endless, arguments=(path,)), Job(work=fail, arguments=(path,))], workers=2)
    assert int(path.read_text()) >= 1, "it was told to stop and did"


def test_cells_are_kept_and_a_cut_line_is_dropped(tmp_path):
    path = tmp_path / "cells.jsonl"
    cells = Cells(path, {"steps": 1})
    cells.add([{"key": "a/0", "x": 1.5}, {"key": "a/2", "x": 0}])
    assert cells.missing("a", 4) == [1, 3] and cells.missing("b", 1) == [0]
    with path.open("a") as file:
        file.write('{"key": "b", "x"')
    again = Cells(path, {"steps": 1})
    assert again.records == {"a/0": {"key": "a/0", "x": 1.5}, "a/2": {"key": "a/2", "x": 0}}
    again.add([{"key": "b", "x": 2}])
    assert set(Cells(path, {"steps": 1}).records) == {"a/0", "a/2", "b"}
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 4
    with pytest.raises(ValueError, match="other settings"):
        Cells(path, {"steps": 2})


def test_numbers_below_one_are_refused():
    _jobs.at_least_one(SimpleNamespace(seeds=1, workers=None), "seeds")
    with pytest.raises(ValueError, match="seeds"):
        _jobs.at_least_one(SimpleNamespace(seeds=0, workers=None), "seeds")
    with pytest.raises(ValueError, match="workers"):
        _jobs.at_least_one(SimpleNamespace(seeds=1, workers=0), "seeds")


def test_progress_is_printed_once_a_percent(capsys):
    progress = _jobs.print_progress()
    for done in (0, 1, 9, 10, 10, 1000):
        progress(done, 1000)
    progress(50, 500)  # the next part of a study
    expected = [*(f"{p} % of 1000 steps" for p in (0, 1, 100)), "10 % of 500 steps"]
    assert capsys.readouterr().out.splitlines() == expected


def test_verdicts():
    below, above, across = Interval(-1, -2, -0.5), Interval(1, 0.5, 2), Interval(0, -1, 1)
    infinite = Interval(1, -math.inf, math.inf)
    for intervals, expected in {
        (below,): "a is better", (above,): "b is better", (across,): "no difference shown",
        (infinite,): "one seed: no interval",
        (below, below): "a is better", (above, above): "b is better", (below, above): "no difference shown",
        (below, across): "no difference shown", (across, below): "no difference shown",
        (infinite, below): "one seed: no interval",
    }.items():  # fmt: skip
        assert _reading.verdict("a", "b", *intervals) == expected


def test_records_are_found_by_what_they_say_in_order_of_the_seed():
    records = [{"arm": arm, "seed": seed} for arm in "ab" for seed in (2, 0, 1)]
    assert _reading.by_seed(records, arm="b") == [{"arm": "b", "seed": seed} for seed in range(3)]


def test_a_mean_has_its_error_where_there_is_one():
    assert _reading.with_error([1.0, 3.0]) == "2\u00a0±\u00a01"
    assert _reading.with_error([1.25], ".1f") == "1.2"
