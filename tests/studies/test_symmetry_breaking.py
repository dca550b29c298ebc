"""The study of symmetry breaking: what is declared, its statistics restated, what theory says, and the page."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from here import execute_here

from erlangen import lm
from erlangen.lm.train import build_model, build_optimizer
from erlangen.studies import _runs, _tuned
from erlangen.studies import symmetry_breaking as study
from erlangen.studies.symmetry_breaking import arms, one_batch, optimizers, what_breaks
from erlangen.studies.symmetry_breaking.study import PARTS, cases, final_run, tuning_run, window_losses

pytest.importorskip("matplotlib", reason="the report needs matplotlib: pip install 'erlangen[report]'")
pytestmark = pytest.mark.xdist_group("symmetry_breaking")  # the run below is worth sharing


# What is declared


def test_a_case_of_two_parts_is_one_run_and_grids_are_shared(tmp_path):
    config = study.SymmetryBreakingConfig(out=tmp_path)
    declared = {part: cases(part) for part in PARTS}
    assert [len(declared[part]) for part in PARTS] == [16, 4, 40]
    assert len({case for part in PARTS for case in declared[part]}) == 46
    assert set(declared["one-batch"]) <= set(declared["optimizers"]) & set(declared["what-breaks"])
    tuned = tuning_run(config, "soap", "bare-both", 0.03)
    final = [final_run(config, "soap", "bare-both", 0.03, seed) for seed in range(5)]
    assert tuned.seed == _tuned.TUNING_SEED and [run.seed for run in final] == [0, 1, 2, 3, 4]
    assert replace(tuned, seed=0, out=final[0].out, eval_every=final[0].eval_every) == final[0]
    for size in arms.SIZES.values():
        assert set(size.rates) == set(arms.OPTIMIZERS)
        for low, middle, high in size.rates.values():
            assert 2.9 < middle / low < 3.5 and 2.9 < high / middle < 3.5
    often = final_run(config, "adamw", arms.BROKEN, 1e-3, 0)
    assert often.log_window_losses and often.steps / often.eval_every == 60 and often.eval_windows == 60 * 8


def test_a_cell_changes_only_what_it_is_named_for(tmp_path):
    config = study.SymmetryBreakingConfig(out=tmp_path)
    plain = final_run(config, "muon", "biased-none", 0.03, 0)
    for name, cell in arms.CELLS.items():
        run = final_run(config, "muon", name, 0.03, 0)
        assert name == cell.name and run.model.attention_bias == cell.learned
        assert replace(run, model=plain.model, breaking=plain.breaking, out=plain.out) == plain
        on = run.breaking
        assert (on.enabled and on.query_mean == 0.5) == cell.mean
        assert (on.enabled and on.query_std == (0.05, 0.15) and on.value_std == (0.05, 0.05)) == cell.noise
        assert not on.enabled or on.value_mean == 0
    assert arms.CELLS[arms.BROKEN].breaking == lm.BreakingConfig(enabled=True)


def test_the_half_life_of_the_second_moment_is_fixed_in_tokens(tmp_path):
    expected = math.log(0.5) / math.log(0.95) * 491_520
    for size in ("tiny", "124m"):
        run = final_run(study.SymmetryBreakingConfig(out=tmp_path, size=size), "adamw", arms.PLAIN, 1e-3, 0)
        per_step = run.batch_size * run.model.context_length
        assert run.optimizer.betas[0] == 0.9
        steps = math.log(0.5) / math.log(run.optimizer.betas[1])
        assert steps * per_step == pytest.approx(expected, rel=1e-9)


def test_the_published_recipe_is_unchanged_but_for_what_is_studied(tmp_path):
    config = study.SymmetryBreakingConfig(out=tmp_path, size="124m", corpus="shards")
    for optimizer, method in (("ecd-euler", "ecd"), ("sgdm-random", "sgdm"), ("soap", "soap"), ("adamw-95", "adamw")):
        published = lm.run_preset("symmetry-breaking-124m", method)
        run = final_run(config, optimizer, arms.BROKEN, published.optimizer.lr, published.seed)
        measured = ("evaluation", "eval_every", "eval_windows", "log_window_losses", "log_charges", "log_gauge",
                    "keep_checkpoints", "out")  # fmt: skip
        same = {name: getattr(published, name) for name in measured}
        same |= {"data": published.data, "breaking": replace(run.breaking, evaluate_with="last")}
        assert replace(run, **same) == published and run.data == replace(published.data, corpus="shards")
    assert final_run(config, "sgdm", arms.PLAIN, 0.03, 0).optimizer.initial_velocity_std == 0


@pytest.mark.parametrize("wrong", [{"part": "all-of-it"}, {"seeds": 0}, {"steps": 0}, {"size": "large"}])
def test_a_wrong_config_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        study.SymmetryBreakingConfig(**wrong)


# What theory says


@pytest.mark.parametrize("optimizer", arms.CELL_OPTIMIZERS)
def test_a_fixed_mean_beside_learned_biases_is_a_start_of_those(optimizer, tmp_path, text_file):
    config = replace(study.quick(tmp_path), corpus=str(text_file))
    run = tuning_run(config, optimizer, "biased-mean", 0.01)
    run = replace(run, model=replace(run.model, dim=16, context_length=16))
    found = what_breaks.same_as_a_start(lambda step: False, run, 8)
    assert found["same"] < 1e-12 and found["control"] > 1e-7


def records_of(charges):
    """A run a seed of SGD in each cell; charges by (cell, sector), zero or a number."""
    return [
        {"optimizer": optimizer, "arm": cell, "seed": seed, "loss": 1.0}
        | {sector: charges(cell, sector) for sector in study.study.SECTORS}
        | {f"{sector}_largest": charges(cell, sector) for sector in study.study.SECTORS}
        for optimizer, cell in cases("what-breaks")
        for seed in range(2)
    ]


def test_charges_are_read_by_the_limits():
    def of_theory(cell, sector):
        noise, mean = cell.endswith(("noise", "both")), cell.endswith("mean")
        return 1e-2 if noise or (mean and sector == "qk") else 1e-7

    rows = what_breaks.agreement(records_of(of_theory))
    asked = [row for row in rows if row["optimizer"] in what_breaks.FROM_REST]
    assert all(row["agrees"] for row in asked) and len(asked) == 2 * (8 * 2 + 3 * 2)
    assert all(row["agrees"] is None for row in rows if row not in asked)
    wrong = what_breaks.agreement(records_of(lambda cell, sector: 1e-2))
    assert {row["arm"] for row in wrong if row["agrees"] is False} == {
        "biased-none", "bare-none", "biased-mean", "bare-mean"
    }  # fmt: skip
    assert {row["found"] for row in what_breaks.agreement(records_of(lambda cell, sector: 1e-4))} == {"between"}


# The rule


def loss_records(part, draw):
    """Records of a part with losses [seeds] that ``draw(optimizer, cell)`` gives."""
    return [
        {"optimizer": optimizer, "arm": cell, "seed": seed, "loss": float(loss), "failure": None}
        for optimizer, cell in cases(part)
        for seed, loss in enumerate(draw(optimizer, cell))
    ]


def check_against_scipy(rows):
    stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle")
    p = [stats.ttest_1samp(row["difference"], 0).pvalue for row in rows]
    order = sorted(range(len(p)), key=p.__getitem__)
    for row, expected in zip(rows, p):
        adjusted = max(min(1.0, (len(p) - rank) * p[i]) for rank, i in enumerate(order) if p[i] <= expected)
        low, high = stats.t.interval(
            0.95, len(row["difference"]) - 1, row["difference"].mean(), stats.sem(row["difference"])
        )
        assert row["interval"] == pytest.approx((row["difference"].mean(), low, high), rel=1e-6)
        assert row["p"] == pytest.approx(expected, rel=1e-6, abs=1e-12) and row["holm"] == pytest.approx(adjusted)
        called = row["reading"].endswith("is better")
        assert called == (expected < 0.05) and row["reading"].startswith("a hint") == (called and adjusted >= 0.05)


def test_effects_by_hand():
    generator = np.random.default_rng(0)
    seeds = generator.normal(2.0, 0.1, 5)

    def draw(optimizer, cell):
        found = seeds + generator.normal(0, 0.01, 5)
        return found - 0.3 if cell.endswith(("noise", "both")) and optimizer == "sgdm" else found

    records = loss_records("what-breaks", draw)
    rows = what_breaks.compare(records)
    assert len(rows) == 35
    check_against_scipy(rows)
    loss = {(r["optimizer"], r["arm"], r["seed"]): r["loss"] for r in records}
    (noise,) = (r for r in rows if r["optimizer"] == "sgdm" and r["label"] == "noise, main effect")
    by_hand = [
        sum(
            (1 if cell.endswith(("noise", "both")) else -1) * loss["sgdm", cell, seed] / 4 for cell in arms.CELLS
        )
        for seed in range(5)
    ]  # fmt: skip
    np.testing.assert_allclose(noise["difference"], by_hand, rtol=0, atol=1e-12)
    assert noise["reading"] == "noise on is better"
    (simple,) = (r for r in rows if r["optimizer"] == "soap" and r["label"] == "bare-both − bare-none")
    for seed in range(5):
        expected = loss["soap", "bare-both", seed] - loss["soap", "bare-none", seed]
        assert simple["difference"][seed] == pytest.approx(expected)


def test_gaps_by_hand():
    generator = np.random.default_rng(1)
    base = generator.normal(2.0, 0.1, 5)

    def draw(optimizer, cell):
        found = base + generator.normal(0, 0.005, 5) + (0.5 if optimizer == "sgdm" else 0.0)
        return found - 0.2 if (optimizer, cell) == ("sgdm", arms.BROKEN) else found

    records = loss_records("optimizers", draw)
    rows = optimizers.compare(records)
    assert [sum(r["question"] == q for r in rows) for q in ("broken", "gap", "change")] == [8, 14, 7]
    check_against_scipy(rows)
    (change,) = (r for r in rows if r["question"] == "change" and r["optimizer"] == "sgdm")
    plain, broken = (r for r in rows if r["question"] == "gap" and r["optimizer"] == "sgdm")
    np.testing.assert_allclose(change["difference"], broken["difference"] - plain["difference"], atol=1e-12)
    assert change["interval"].mean == pytest.approx(-0.2, abs=0.02)
    assert "1 of 7 optimisers nearer" in optimizers.summary(rows)
    for record in records:
        if (record["optimizer"], record["arm"], record["seed"]) == ("soap", arms.PLAIN, 3):
            record["loss"] = math.inf
    fallen = [r for r in optimizers.compare(records) if "could not go on" in r["reading"]]
    assert {(r["optimizer"], r["question"]) for r in fallen} == {("soap", q) for q in ("broken", "gap", "change")}
    assert all(math.isnan(r["interval"].mean) for r in fallen) and len(fallen) == 3


# One batch, restated window by window


def synthetic(validations=7, windows=3, seeds=4):
    generator = np.random.default_rng(2)
    ease = generator.normal(0, 0.3, validations * windows)
    return {
        (optimizer, cell, seed): 3.0
        + ease
        - 0.1 * np.arange(validations)[:, None]
        + generator.normal(0, 0.1, (validations, validations * windows))
        + 0.05 * generator.normal()
        for optimizer, cell in cases("one-batch")
        for seed in range(seeds)
    }


def brute_force(losses, windows):
    one = []
    for t, row in enumerate(losses.tolist()):
        chosen = [row[t * windows + k] for k in range(windows)]
        one.append(sum(chosen) / windows)
    best = min(one)
    return one, best, one.index(best), sum(losses[-1].tolist()) / losses.shape[1]


def test_the_published_statistic_by_brute_force():
    runs, windows = synthetic(), 3
    for losses in runs.values():
        one, best, lowest, last = brute_force(losses, windows)
        said = one_batch.one_batch(losses, windows)
        np.testing.assert_allclose(said.one, one, atol=1e-12)
        assert (said.lowest, said.best, said.last) == (lowest, pytest.approx(best), pytest.approx(last))
        whole = sum(losses[lowest].tolist()) / losses.shape[1]
        assert said.easier == pytest.approx(whole - best)
    rows = {row["name"]: row for row in one_batch.compare(runs, windows, range(4))}
    assert len(rows) == 8 and [row["null"] for row in rows.values()] == [False] * 4 + [True] * 4
    row = rows["AdamW, broken − plain"]
    for seed in range(4):
        broken, plain = (brute_force(runs["adamw", cell, seed], windows) for cell in (arms.BROKEN, arms.PLAIN))
        assert row["one"][seed] == pytest.approx(broken[1] - plain[1])
        assert row["full"][seed] == pytest.approx(broken[3] - plain[3])
    low, high = row["interval"].low, row["interval"].high
    assert row["outside_one"] == sum(not low <= x <= high for x in row["one"]) / 4
    assert row["outside_full"] == sum(not low <= x <= high for x in row["full"]) / 4
    assert row["disagree"] == sum((a > 0) != (b > 0) for a, b in zip(row["one"], row["full"])) / 4
    null = rows["AdamW, plain, one seed − another"]
    assert len(null["one"]) == 6 and null["interval"] is None
    expected = (
        brute_force(runs["adamw", arms.PLAIN, 2], windows)[1] - brute_force(runs["adamw", arms.PLAIN, 3], windows)[1]
    )
    assert null["one"][-1] == pytest.approx(expected)


def test_an_easy_batch_is_the_lowest_of_every_run():
    runs, windows = synthetic(), 3
    plain = one_batch.lowest_batches(runs, windows)
    assert plain["share"] == max(
        sum(brute_force(losses, windows)[2] == batch for losses in runs.values()) for batch in range(7)
    ) / len(runs)
    for losses in runs.values():
        losses[:, 4 * windows : 5 * windows] -= 5.0
    found = one_batch.lowest_batches(runs, windows)
    assert (found["batch"], found["share"], found["distinct"]) == (4, 1.0, 1) and found["at"] == pytest.approx(5 / 7)
    assert found["easier"] == pytest.approx(plain["easier"] if plain["batch"] == 4 else 5.0 * 6 / 7, abs=1.0)


def test_signs_are_counted_where_there_is_one():
    runs = synthetic(seeds=4)
    for (_, cell, _), losses in runs.items():
        losses += 10.0 if cell == arms.BROKEN else 0.0
    row = one_batch.compare(runs, 3, range(4))[0]
    assert row["wrong_one"] == row["wrong_full"] == 0.0 and row["disagree"] == 0.0
    runs["adamw", arms.BROKEN, 1][:, :3] -= 30.0  # one easy batch turns the published difference of one seed
    turned = one_batch.compare(runs, 3, range(4))[0]
    assert turned["one"][1] < 0 < turned["one"][0] and turned["disagree"] >= 0.25


def test_batches_start_again_and_must_fit():
    losses = np.arange(5.0)[:, None] * 10 + np.arange(4.0)  # five validations, two batches of two
    assert one_batch.one_batch(losses, 2).one.tolist() == [0.5, 12.5, 20.5, 32.5, 40.5]
    with pytest.raises(ValueError, match="does not fit"):
        one_batch.one_batch(losses, 5)


# Memory


def test_state_is_counted(tmp_path):
    """Against the counts of the literature: two floats a parameter, one, and of a Shampoo basis two squares a side."""
    run = final_run(study.quick(tmp_path), "adamw", arms.PLAIN, 1e-3, 0)
    for name, expected in (("adamw", 2.0), ("sgdm", 1.0), ("ecd-exact", 1.0)):
        model = build_model(replace(run.model, vocab_size=16), run.breaking, seed=0)
        optimizer = build_optimizer(replace(arms.OPTIMIZERS[name], lr=1e-3), model)
        loss = model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1]
        loss.backward()
        optimizer.step(loss.item)
        size = sum(p.numel() for p in model.parameters())
        assert optimizers.state_floats(optimizer) == expected * size


# The page


@pytest.fixture(scope="module")
def ran(tmp_path_factory, text_file):
    """The three parts with fewer optimisers."""
    out = tmp_path_factory.mktemp("study")
    config = replace(study.quick(out), corpus=str(text_file), csv=out / "csv")
    few = {name: arms.OPTIMIZERS[name] for name in ("adamw", "ecd-euler")}
    with pytest.MonkeyPatch.context() as patch:
        for module in (_tuned, optimizers, what_breaks):
            patch.setattr(module, "execute", execute_here)
        for module in (study.study, optimizers):
            patch.setattr(module, "OPTIMIZERS", few)
        for module in (study.study, what_breaks):
            patch.setattr(module, "CELL_OPTIMIZERS", ("ecd-euler",))
        path = study.run(config)
        made = sorted(folder.name for folder in (out / "runs").iterdir())
        assert study.run(config) == path, "all is on disk"
    return config, path, made


def test_the_page_has_all_parts(ran):
    config, path, made = ran
    assert len(made) == 2 * (2 + 8) and made[0] == "adamw-biased-both-0"
    page, data = path.read_text(), json.loads((config.out / "symmetry_breaking.json").read_text())
    assert len(data["runs"]) == 20 and len(data["tuning"]) == 10
    losses = {(r["optimizer"], r["arm"], r["seed"]): r["loss"] for r in data["runs"]}
    assert all(f">{loss:.4f}<" in page for loss in losses.values())
    for text in ("What breaks what", "Optimisers", "One batch", "Holm", "<svg"):
        assert text in page
    for name in ("cells", "effects", "charges", "identity", "optimizers", "gaps", "one_batch", "one_batch_runs",
                 "one_batch_published", "runs"):  # fmt: skip
        assert (config.csv / f"symmetry_breaking_{name}.csv").stat().st_size > 100
    for name in ("effects_ecd-euler", "optimizers", "gaps", "one_batch", "one_batch_curves"):
        assert (config.csv / f"symmetry_breaking_{name}.svg").read_text().lstrip().startswith("<")
    with (config.csv / "symmetry_breaking_optimizers.csv").open() as file:
        state = {row["Optimiser"]: float(row["State, floats a parameter"]) for row in csv.DictReader(file)}
    assert state == {"AdamW": 2.0, "ECD, Euler kick": 1.0}


def test_windows_are_logged_as_the_losses_say(ran):
    config, _, _ = ran
    record = next(r for r in json.loads((config.out / "symmetry_breaking.json").read_text())["runs"])
    run = final_run(config, record["optimizer"], record["arm"], record["lr"], record["seed"])
    steps, losses = window_losses(run)
    assert steps == record["steps"][1:] and losses.shape == (2, 4)
    np.testing.assert_allclose(losses.mean(axis=1), record["validation"][1:], atol=1e-5)


def test_charges_of_a_run_are_as_predicted(ran):
    """Four steps from rest in float32: what is predicted to be zero is, and what is not is not."""
    config, _, _ = ran
    runs = json.loads((config.out / "symmetry_breaking.json").read_text())["runs"]
    for run in (r for r in runs if r["optimizer"] == "ecd-euler"):
        for sector, zero in what_breaks.predicted(arms.CELLS[run["arm"]]).items():
            assert (run[sector] is None) == (zero is None), (run["arm"], sector)
            if zero is not None:
                assert (run[f"{sector}_largest"] <= what_breaks.ZERO) == zero, (run["arm"], sector)


def test_a_run_that_fell_out_is_told(ran, monkeypatch):
    config, _, _ = ran
    failing = final_run(config, "adamw", arms.PLAIN, 1e-3, 9)
    monkeypatch.setattr(_runs, "failure", lambda run: "the loss is nan")
    monkeypatch.setattr(_tuned, "validations", lambda run: [{"step": 0, "validation_loss": 5.0,
                                                            "validation_standard_error": 0.1}])  # fmt: skip
    monkeypatch.setattr(_runs, "records", lambda run: [])
    found = study.study.read(failing)
    assert found["loss"] == math.inf and found["qk"] is None and found["failure"] == "the loss is nan"
