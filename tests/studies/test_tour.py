"""The tour, small, from the command line to the page."""

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from erlangen.studies import tour

pytestmark = pytest.mark.xdist_group("tour")  # the fixture below is worth sharing
pytest.importorskip("matplotlib", reason="the report needs matplotlib: pip install 'erlangen[report]'")


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """A tour of two seeds and six steps, interrupted once and taken up again."""
    out = tmp_path_factory.mktemp("tour")
    line = [sys.executable, "-m", "erlangen", "tour", "--out", str(out), "--steps", "6", "--seeds", "2"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while len(list(out.glob("runs/*/step-*"))) < 3:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped" in error and "Traceback" not in error
    assert not (out / "tour.html").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/step-00000006/checkpoint.json")}
    cells = (out / "lie" / "cells.jsonl").read_text()
    assert 0 < len(kept) < 16 and len(cells.splitlines()) > 1
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"the report: {out / 'tour.html'}" in result.stdout
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items()), "finished runs are kept"
    assert (out / "lie" / "cells.jsonl").read_text().startswith(cells), "finished cells are kept"
    return out


def test_the_report_holds_every_run(taken):
    data = json.loads((taken / "tour.json").read_text())
    assert {(r["optimizer"], r["arm"], r["seed"]) for r in data["runs"]} == {
        (o, a, s) for o in ("adamw", "sgdm", "soap", "ecd") for a in ("symmetric", "broken") for s in (0, 1)
    }
    page = (taken / "tour.html").read_text()
    for text in ("AdamW", "SGD with momentum", "SOAP", "ECD", "no difference shown", "95 %", "<svg"):
        assert text in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page
    seeds = (taken / "tour.seeds.csv").read_text().splitlines()
    assert len(seeds) == 1 + 8


def test_the_report_holds_the_part_on_motifs(taken):
    cells = [c for c in json.loads((taken / "tour.json").read_text())["finite"] if c["task"] == "palindrome"]
    arms = ("strict", "dial", "free", "augmentation", "post-hoc")
    assert {(c["arm"], c["seed"]) for c in cells} == {(arm, seed) for arm in arms for seed in (0, 1)}
    page = (taken / "tour.html").read_text()
    for text in ("Part three", "palindrome", "strict", "post-hoc"):
        assert text in page
    assert len((taken / "tour.finite_seeds.csv").read_text().splitlines()) > len(cells)


def test_the_report_holds_the_part_on_gauge(taken):
    scrambled, canonical, *others = json.loads((taken / "tour.json").read_text())["gauge"]
    assert scrambled["same_function"] and canonical["same_function"] and len(others) == 2
    assert scrambled["naive"] > 0.5 and scrambled["distance"] < 1e-10 and scrambled["output_difference"] < 1e-9
    assert scrambled["moved_difference"] > 1 and scrambled["canonical_difference"] < 1e-9
    assert not any(other["same_function"] for other in others) and all(other["distance"] > 1e-3 for other in others)
    for layer in scrambled["head_similarity"]:  # each head is found once, with its own copy
        found = [[value > 1 - 1e-9 for value in row] for row in layer]
        assert [sum(row) for row in found] == [1] * 4 == [sum(column) for column in zip(*found)]
    page = (taken / "tour.html").read_text()
    assert "Part four" in page and "the same function" in page


def test_the_report_holds_the_part_on_breaking_or_reducing(taken):
    runs = json.loads((taken / "tour.json").read_text())["quotient"]
    arms = ("plain", "noise", "horizontal", "dressed", "invariant")
    assert {(r["optimizer"], r["arm"], r["seed"]) for r in runs} == {
        (optimizer, arm, seed) for optimizer in ("sgdm", "adamw") for arm in arms for seed in (0, 1)
    }
    for run in runs:
        share = run["vertical_share"][-1]
        assert share < 1e-8 if run["arm"] == "horizontal" else 0 <= share <= 1
        if run["arm"] == "plain" and run["optimizer"] == "adamw":
            assert share > 1e-4, "AdamW's step has a part along the gauge"
    page = (taken / "tour.html").read_text()
    for text in ("Part five", ">horizontal</td>", ">invariant</td>"):
        assert text in page
    assert len((taken / "tour.quotient_seeds.csv").read_text().splitlines()) == 1 + len(runs)


def test_the_report_holds_the_part_on_poses(taken):
    cells = json.loads((taken / "tour.json").read_text())["lie"]
    assert {(c["task"], c["group"], c["arm"], c["seed"]) for c in cells} == {
        ("sequence", "SE2", arm, seed)
        for arm, seeds in {"formula": 1, "closed form": 2, "learned kernel": 2, "vectors": 2}.items()
        for seed in range(seeds)
    }
    assert len((taken / "lie" / "cells.jsonl").read_text().splitlines()) == 1 + len(cells), "nothing is run twice"
    page = (taken / "tour.html").read_text()
    for text in ("Part two", "have 7 steps of 32", ">missing</text>", ">learned kernel</text>", "Moving all poses"):
        assert text in page
    assert len((taken / "tour.lie_seeds.csv").read_text().splitlines()) == 1 + len(cells)
    with (taken / "tour.lie_arms.csv").open() as file:
        rows = {row["Arm"]: row for row in csv.DictReader(file)}
    median = {(c["arm"], c["seed"]): c["median"] for c in cells}
    by_hand = sum(median["closed form", seed] - median["vectors", seed] for seed in (0, 1)) / 2
    assert float(rows["vectors"]["Closed form − this mean"]) == pytest.approx(by_hand)
    assert rows["closed form"]["Closed form − this mean"] == ""
    assert float(rows["formula"]["Median error"]) == pytest.approx(median["formula", 0], rel=0.05)
    with (taken / "tour.lie_invariance.csv").open() as file:
        far = {row["Arm"]: float(row["1000 away, float64"]) for row in csv.DictReader(file)}
    assert far["closed form"] < 1e-8 < 1 < far["vectors"]


def test_cells_of_another_size_are_not_taken_for_these(taken):
    with pytest.raises(ValueError, match="other settings"):
        tour.tour(tour.TourConfig(out=taken, steps=12, seeds=2))


def test_the_table_says_what_the_runs_say(taken):
    runs = {(r["optimizer"], r["arm"], r["seed"]): r for r in json.loads((taken / "tour.json").read_text())["runs"]}
    comparison = tour.compare(list(runs.values()))
    for optimizer, row in comparison.items():
        by_hand = [
            runs[optimizer, "broken", seed]["validation"][-1] - runs[optimizer, "symmetric", seed]["validation"][-1]
            for seed in (0, 1)
        ]
        assert row["interval"].mean == pytest.approx(sum(by_hand) / 2)
        # Student's t at 97.5 % for one degree of freedom is 12.706
        half = 12.706204736 * abs(by_hand[0] - by_hand[1]) / 2
        assert row["interval"].high - row["interval"].mean == pytest.approx(half, rel=1e-6)


def test_the_symmetric_arms_of_sgdm_and_ecd_conserve_their_charges(taken):
    for run in json.loads((taken / "tour.json").read_text())["runs"]:
        if run["optimizer"] in ("sgdm", "ecd"):
            largest = max(run["qk"] + run["vo"])
            assert largest < 1e-5 if run["arm"] == "symmetric" else largest > 1e-4


def test_verdicts():
    def verdict(differences):
        results = [
            {"optimizer": optimizer, "arm": arm, "seed": seed, "validation": [3.0 + (arm == "broken") * difference]}
            for optimizer in tour.LEARNING_RATES
            for arm in tour.ARMS
            for seed, difference in enumerate(differences)
        ]
        return tour.compare(results)["adamw"]["verdict"]

    assert verdict([-0.10, -0.11, -0.12]) == "broken is better"
    assert verdict([0.10, 0.11, 0.12]) == "symmetric is better"
    assert verdict([0.10, -0.11, 0.02]) == "no difference shown"
    assert verdict([0.10]) == "one seed: no interval"


def test_runs_of_other_settings_are_not_taken_for_these(taken):
    config = tour.TourConfig(out=taken, steps=6, seeds=2)
    run = tour.declared_runs(config)[0]
    assert tour.is_finished(run.config)
    with pytest.raises(ValueError, match="other settings"):
        tour.is_finished(replace(run.config, warmup=3))


def test_errors():
    with pytest.raises(ValueError, match="seeds"):
        tour.TourConfig(seeds=0)
    with pytest.raises(ValueError, match="workers"):
        tour.TourConfig(workers=0)
