"""The study of broken and reduced symmetry: what is declared, the rule by hand, runs that fail, the page."""

import json
import math
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from here import execute_here

from erlangen import breaking, gauge, lm, report
from erlangen.gauge._pairs import head_pairs, parameters_by_name
from erlangen.lm.checkpoint import checkpoints
from erlangen.studies import _jobs, _runs, tour_quotient
from erlangen.studies import break_or_reduce as study
from erlangen.studies._tuned import TUNING_SEED
from erlangen.studies.break_or_reduce import arms, results
from erlangen.studies.break_or_reduce.study import final_run, read, tuning_run

pytestmark = pytest.mark.xdist_group("break_or_reduce")  # the run below is worth sharing
pytest.importorskip("matplotlib", reason="the report needs matplotlib: pip install 'erlangen[report]'")


# What is declared


def test_every_arm_of_an_optimiser_has_the_same_grid_and_budget(tmp_path):
    config = study.BreakOrReduceConfig(out=tmp_path)
    assert len(config.cases) == len(set(config.cases)) == 36 and config.seeds == 5
    for size in arms.SIZES.values():
        assert set(size.rates) == set(arms.OPTIMIZERS) and not size.model.attention_bias
        for low, middle, high in size.rates.values():
            assert 2.9 < middle / low < 3.5 and 2.9 < high / middle < 3.5
    grids = {
        case: [tuning_run(config, *case, lr).optimizer.lr for lr in config.scale.rates[case[0]]]
        for case in config.cases
    }
    assert all(grids[optimizer, arm] == grids[optimizer, "plain"] for optimizer, arm in config.cases)


def test_tuning_and_final_runs_share_no_seed_and_differ_in_nothing_else(tmp_path):
    config = study.BreakOrReduceConfig(out=tmp_path)
    tuned = tuning_run(config, "soap", "dressed", 0.03)
    final = [final_run(config, "soap", "dressed", 0.03, seed) for seed in range(5)]
    assert tuned.seed == TUNING_SEED and [run.seed for run in final] == [0, 1, 2, 3, 4]
    assert replace(tuned, seed=0, out=final[0].out, eval_every=final[0].eval_every) == final[0]
    assert len({run.out for run in (tuned, *final)}) == 6


def test_an_arm_changes_only_what_it_is_named_for(tmp_path):
    config = study.BreakOrReduceConfig(out=tmp_path)
    plain = final_run(config, "muon", "plain", 0.03, 0)
    for arm in arms.ARMS:
        run = final_run(config, "muon", arm, 0.03, 0)
        assert replace(run, breaking=plain.breaking, reduction=plain.reduction, out=plain.out) == plain
        assert not (run.breaking.enabled and run.reduction.kind != "none")
        assert run.reduction.lr == (config.scale.head_rate if arm == "invariant" else None)
    assert final_run(config, "ecd-euler", "plain", 1.0, 0).optimizer.kick == "euler"
    published = lm.BreakingConfig()
    assert arms.NOISE.query_std == published.query_std and arms.NOISE.value_std == published.value_std
    assert arms.MEAN.query_mean == published.query_mean and arms.MEAN.value_mean == published.value_mean
    assert arms.NOISE.query_mean == 0 and arms.MEAN.query_std == arms.MEAN.value_std == (0.0, 0.0)


def test_a_fixed_mean_leaves_the_moves_that_keep_it(generator):
    """The protocol's count: of the k² directions of queries and keys those k are broken that move the mean."""
    fields = {name: getattr(arms.MEAN, name) for name in ("query_mean", "query_std", "value_mean", "value_std")}
    config = lm.GPTConfig(
        vocab_size=16, context_length=6, num_layers=1, num_heads=2, dim=8, attention_bias=False, positions="learned"
    )
    tokens = torch.randint(16, (3, 6), generator=generator)

    def difference(keeps_mean):
        torch.manual_seed(0)
        model = breaking.break_symmetry(lm.GPT(config), **fields).double().eval()
        before = model(tokens)[0]
        (pair,) = head_pairs(model, ("qk",), broken=True)
        parameters = parameters_by_name(model)
        width = pair.width
        mean = torch.full((width,), arms.MEAN.query_mean, dtype=torch.float64)
        move = torch.eye(width, dtype=torch.float64) + 0.3 * torch.randn(
            width, width, dtype=torch.float64, generator=generator
        )
        if keeps_mean:
            move = move - torch.outer(move @ mean - mean, mean) / mean.dot(mean)
            torch.testing.assert_close(move @ mean, mean)
        first, second = pair.factors(lambda name: parameters[name].detach())
        pair.put(lambda name: parameters[name], move @ first, torch.linalg.inv(move).mT @ second)
        return (model(tokens)[0] - before).abs().max().item()

    assert difference(keeps_mean=True) < 1e-12
    assert difference(keeps_mean=False) > 1e-4


@pytest.mark.parametrize(
    "wrong",
    [{"optimizers": ("adam",)}, {"optimizers": ()}, {"seeds": 0}, {"steps": 0}, {"size": "large"}, {"workers": 0}],
)
def test_a_wrong_config_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        study.BreakOrReduceConfig(**wrong)


# The rule


def records_of(losses):
    """Records of cases: (optimizer, arm) -> loss a seed."""
    return [
        {"optimizer": optimizer, "arm": arm, "seed": seed, "loss": loss}
        for (optimizer, arm), found in losses.items()
        for seed, loss in enumerate(found)
    ]


def test_the_rule_by_hand():
    stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle")
    config = study.BreakOrReduceConfig(optimizers=("sgdm", "adamw"))
    generator = np.random.default_rng(0)
    base = generator.normal(2.0, 0.1, 5)
    spread = np.array([-0.02, -0.01, 0.0, 0.01, 0.02])
    losses = {
        ("sgdm", "plain"): base, ("sgdm", "noise"): base + 0.5 + 0.01 * spread, ("sgdm", "mean"): base + spread,
        ("sgdm", "horizontal"): base - 0.025 - spread, ("sgdm", "dressed"): base,
        ("sgdm", "invariant"): base - 0.5 + 0.03 * spread,
        **{("adamw", arm): base + generator.normal(0, 0.01, 5) for arm in arms.ARMS},
    }  # fmt: skip
    rows = study.compare(config, records_of(losses))
    assert len(rows) == 16
    p = [stats.ttest_1samp(row["difference"], 0).pvalue if row["difference"].any() else 1.0 for row in rows]
    order = sorted(range(16), key=p.__getitem__)
    for row, expected in zip(rows, p):
        adjusted = max(min(1.0, (16 - rank) * p[i]) for rank, i in enumerate(order) if p[i] <= expected)
        first, second = (np.array(losses[row["optimizer"], row[side]]) for side in ("first", "second"))
        np.testing.assert_array_equal(row["difference"], first - second)
        assert row["p"] == pytest.approx(expected, rel=1e-6, abs=1e-12) and row["holm"] == pytest.approx(adjusted)
        called = row["reading"].endswith("is better")
        assert called == (expected < 0.05) and row["reading"].startswith("a hint") == (called and adjusted >= 0.05)
    readings = {(r["optimizer"], r["first"], r["second"]): r["reading"] for r in rows}
    marks = {row[0]: row[1] for row in results._overview_table(config, records_of(losses)).rows}
    assert marks["noise − plain"] == "+0.500\u00a0●" and marks["horizontal − plain"] == "−0.025\u00a0○"
    assert readings["sgdm", "noise", "plain"] == "plain is better"
    assert readings["sgdm", "noise", "invariant"] == "invariant is better"
    assert readings["sgdm", "mean", "plain"] == readings["sgdm", "dressed", "plain"] == "no difference shown"
    assert readings["sgdm", "horizontal", "plain"] == "a hint: horizontal is better", "alone it is, not among 16"


def test_a_case_with_a_run_that_failed_is_reported_and_not_compared():
    config = study.BreakOrReduceConfig(optimizers=("sgdm",))
    losses = {("sgdm", arm): [2.0, 2.1, 2.2] for arm in arms.ARMS} | {("sgdm", "noise"): [2.5, math.inf, math.inf]}
    rows = {(r["first"], r["second"]): r for r in study.compare(config, records_of(losses))}
    assert rows["noise", "plain"]["reading"] == "no interval: 2 of 3 runs of noise could not go on"
    assert math.isnan(rows["noise", "plain"]["interval"].mean) and math.isnan(rows["noise", "plain"]["holm"])
    assert rows["mean", "plain"]["reading"] == "no difference shown"


def test_the_lowest_loss_chooses_and_edges_are_told(tmp_path, monkeypatch):
    config = study.BreakOrReduceConfig(out=tmp_path, optimizers=("sgdm",))
    low, middle, high = config.scale.rates["sgdm"]
    found = {
        "plain": (2.0, 1.9, 2.1), "noise": (1.8, 1.9, math.inf), "mean": (2.0, 2.0, 2.0),
        "horizontal": (math.inf, 1.9, math.inf), "dressed": (2.0, 1.9, 1.8), "invariant": (math.inf,) * 3,
    }  # fmt: skip
    monkeypatch.setattr("erlangen.studies._tuned.execute", lambda jobs, **_: None)
    monkeypatch.setattr(
        "erlangen.studies._tuned.last_loss",
        lambda run: found[run.out.name.split("-")[1]][(low, middle, high).index(run.optimizer.lr)],
    )
    chosen = {r["arm"]: (r["rate"], r["edge"]) for r in study.tune(config)}
    assert chosen == {
        "plain": (middle, False), "noise": (low, True), "mean": (low, True), "horizontal": (middle, False),
        "dressed": (high, True), "invariant": (low, True),
    }  # fmt: skip


# Runs


def never(step):
    return False


def small(tmp_path, text_file, **fields):
    size = replace(arms.SIZES["seconds"], data=lm.DataConfig(corpus=str(text_file)))
    fields = {"optimizer": "sgdm", "arm": "plain", "lr": 0.1, "seed": 0, "steps": 3} | fields
    return arms.run_config(size, out=tmp_path / "run", evaluations=3, **fields)


def test_a_run_leaves_its_log_and_no_checkpoint(tmp_path, text_file):
    run = small(tmp_path, text_file)
    assert not _runs.is_finished(run)
    (job,) = _runs.jobs([run], log_only=True)
    job.work(never, *job.arguments)
    assert _runs.is_finished(run) and not checkpoints(run.out) and _runs.failure(run) is None
    found = read(run)
    assert found["steps"] == [0, 1, 2, 3] and found["gauge_steps"] == [1, 2, 3]
    assert found["loss"] == found["validation"][-1] and found["milliseconds"] > 0
    assert all(len(found[name]) == 3 for name in ("vertical_share", "charge_drift", "orbit_distance"))
    with pytest.raises(ValueError, match="other settings"):
        _runs.jobs([replace(run, seed=1)])


def test_a_run_that_diverges_is_finished_and_infinitely_bad(tmp_path, text_file):
    run = small(tmp_path, text_file, lr=1e30)
    (job,) = _runs.jobs([run], log_only=True)
    job.work(never, *job.arguments)
    assert _runs.is_finished(run) and not checkpoints(run.out)
    found = read(run)
    assert found["loss"] == math.inf and "loss is" in found["failure"] and len(found["validation"]) >= 1
    (job,) = _runs.jobs([replace(run, out=tmp_path / "other")])
    with pytest.raises(lm.TrainingError, match="loss is"):
        job.work(never, *job.arguments)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_a_stopped_run_goes_on_where_it_was(tmp_path, text_file):
    whole = small(tmp_path, text_file, optimizer="adamw", arm="dressed", lr=3e-3, steps=6)
    cut = replace(whole, out=tmp_path / "cut")
    for run in (whole, cut):
        (job,) = _runs.jobs([run], log_only=True)
        if run is cut:
            with pytest.raises(KeyboardInterrupt):
                job.work(lambda step: step == 3, *job.arguments)
            assert checkpoints(run.out) and not _runs.is_finished(run)
        job.work(never, *job.arguments)
        assert _runs.is_finished(run) and not checkpoints(run.out)
    logs = [[r | {"seconds": None} for r in _runs.records(run)] for run in (whole, cut)]
    assert logs[0] == logs[1]


def test_a_full_disk_is_no_result(tmp_path, text_file, monkeypatch):
    run = small(tmp_path, text_file)

    def full(*args, **kwargs):
        raise lm.TrainingError("could not write") from OSError("no space left on device")

    monkeypatch.setattr(lm, "train", full)
    (job,) = _runs.jobs([run], log_only=True)
    with pytest.raises(lm.TrainingError, match="could not write"):
        job.work(never, *job.arguments)
    assert not _runs.is_finished(run)


@pytest.mark.parametrize("optimizer", arms.OPTIMIZERS)
def test_every_case_runs(optimizer, tmp_path, text_file):
    """Two steps of each arm; the reduced ones compute what plain does at the first step, and move otherwise."""
    first = {}
    for arm in arms.ARMS:
        run = replace(
            small(tmp_path, text_file, optimizer=optimizer, arm=arm, steps=2), out=tmp_path / arm, checkpoint_every=9
        )
        (job,) = _runs.jobs([run], log_only=True)
        job.work(never, *job.arguments)
        assert _runs.failure(run) is None
        log = _runs.records(run)
        first[arm] = next(record["loss"] for record in log if "loss" in record)
        assert math.isfinite(read(run)["loss"])
        if arm == "horizontal":
            assert read(run)["vertical_share"][-1] < 1e-8
    for arm in ("horizontal", "dressed", "invariant"):
        assert first[arm] == pytest.approx(first["plain"], abs=1e-5)
    assert first["mean"] != first["plain"]


# The page


@pytest.fixture(scope="module")
def ran(tmp_path_factory, text_file):
    out = tmp_path_factory.mktemp("study")
    config = replace(study.quick(out), corpus=str(text_file), optimizers=("sgdm",), steps=2, csv=out / "csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("erlangen.studies._tuned.execute", execute_here)
        counts = []
        path = study.run(config, lambda *now: counts.append(now))
    assert counts == [(18, 18), (12, 12)]
    return config, path


def test_the_page_has_all_numbers(ran):
    config, path = ran
    page, data = path.read_text(), json.loads((config.out / "break_or_reduce.json").read_text())
    assert [(r["arm"], r["seed"]) for r in data["runs"]] == [(arm, seed) for arm in arms.ARMS for seed in (0, 1)]
    losses = {(r["arm"], r["seed"]): r["loss"] for r in data["runs"]}
    for loss in losses.values():
        assert f">{loss:.4f}<" in page
    for case in data["tuning"]:
        assert case["rate"] == case["rates"][int(np.argmin(case["losses"]))]
        assert all(f">{loss:.4f}<" in page for loss in case["losses"])
        assert {r["lr"] for r in data["runs"] if r["arm"] == case["arm"]} == {case["rate"]}
    for row in data["comparison"]:
        by_hand = sum(losses[row["first"], seed] - losses[row["second"], seed] for seed in (0, 1)) / 2
        assert row["interval"]["mean"] == pytest.approx(by_hand, abs=1e-12)
    assert [(r["first"], r["second"]) for r in data["comparison"]] == list(results.COMPARED)
    for text in ("Break or reduce?", "95 %", "Holm", "<svg", "At the edge"):
        assert text in page
    for name in ("overview", "tuning", "losses", "differences", "gauge", "runs"):
        assert (config.csv / f"break_or_reduce_{name}.csv").stat().st_size > 100
    for name in ("losses", "vertical", "drift", "orbit", "forest_sgdm"):
        assert (config.csv / f"break_or_reduce_{name}.svg").read_text().lstrip().startswith("<")


def test_runs_are_taken_up_and_only_new_ones_run(ran, monkeypatch):
    config, _ = ran
    monkeypatch.setattr(_jobs, "ProcessPoolExecutor", None)
    _, records = study.measure(replace(config, seeds=1))
    assert len(records) == 6
    with pytest.raises(ValueError, match="other settings"):
        study.run(replace(config, steps=9))


def test_a_page_can_be_made_of_cases_that_failed(ran, tmp_path):
    config, _ = ran
    tuned, records = study.measure(config)
    for record in records:
        if record["arm"] == "invariant" and record["seed"] == 1:
            record.update(loss=math.inf, failure="the loss is nan", steps=[0], validation=[5.0], gauge_steps=[])
            record.update({name: [] for name in study.study.QUANTITIES}, milliseconds=None)
    tuned[-1]["losses"][2] = math.inf
    page = results._write_report(replace(config, out=tmp_path, csv=None), tuned, records).read_text()
    assert "1 of 2 runs of invariant could not go on" in page and "the loss is nan" in page


def test_the_command_line_chooses_rates(tmp_path, text_file):
    sizes = "--size seconds --steps 1 --workers 1 --optimizers sgdm --tune-only"
    line = [sys.executable, "-W", "error", "-m", "erlangen.studies.break_or_reduce", *sizes.split()]
    result = subprocess.run([*line, "--out", tmp_path, "--corpus", text_file], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [text.split(":")[0] for text in result.stdout.splitlines()[-6:]] == [f"sgdm {arm}" for arm in arms.ARMS]
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob("*.html"))


# The tour's part


def test_the_part_of_the_tour_reads_its_runs_by_hand(tmp_path):
    runs = tour_quotient.declared_runs(out=tmp_path, seeds=2, steps=100)
    assert len(runs) == 2 * 2 * 5 and [run.seed for run in runs] == [0] * 10 + [1] * 10
    generator = np.random.default_rng(0)
    records = [
        {
            "optimizer": run.optimizer, "arm": run.arm, "seed": run.seed, "lr": run.config.optimizer.lr,
            "loss": float(generator.normal(3, 0.1)), "steps": [0, 100], "gauge_steps": [50, 100],
            **{name: [0.1, 0.2] for name in study.study.QUANTITIES}, "milliseconds": 1.0,
        }
        for run in runs
    ]  # fmt: skip
    part = tour_quotient.part(records)
    loss = {(r["optimizer"], r["arm"], r["seed"]): r["loss"] for r in records}
    for row in tour_quotient.compare(records):
        by_hand = [loss[row["optimizer"], row["arm"], s] - loss[row["optimizer"], "plain", s] for s in (0, 1)]
        assert row["interval"].mean == pytest.approx(sum(by_hand) / 2)
    shown = sum(row["verdict"].endswith("is better") for row in tour_quotient.compare(records))
    assert f"{shown} of 8 differences shown" in part.summary and part.summary.count("is better") == shown
    worse = [r | {"loss": 4.0 + r["loss"] * 1e-6} if r["arm"] == "noise" else r | {"loss": 3.0} for r in records]
    assert tour_quotient.part(worse).summary.endswith(
        "2 of 8 differences shown: SGD with momentum, plain is better than noise; AdamW, plain is better than noise."
    )
    page = report.page("x", part.summary, part.sections)
    assert all(f">{value:.4f}<" in page for value in loss.values()) and "Part five" in page
    assert len(part.tables["quotient"].rows) == 10 and len(part.tables["quotient_seeds"].rows) == 20


def test_sectors_of_the_declared_model_are_whole():
    """Learned positions: every head has the full group, in both sectors."""
    model = lm.GPT(replace(arms.SIZES["seconds"].model, vocab_size=16))
    assert {(pair.sector, pair.rotary) for pair in head_pairs(model)} == {("qk", None), ("vo", None)}
    assert set(gauge.free_sectors(model)) == {"qk", "vo"}
