"""The completion study: the formula, the measure, equivariance of the arms, cells that are kept, a quick run."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import scipy.linalg
import torch

from erlangen import lie
from erlangen.lie.attention import lie_scores
from erlangen.studies import _jobs, _training
from erlangen.studies import lie_completion as study
from erlangen.studies.lie_completion import arms, checks, tasks
from erlangen.studies.lie_completion.study import LEARNING_RATES, SCANNED

GROUPS = [lie.parse(name) for name in tasks.GROUPS]


@pytest.fixture(params=GROUPS, ids=str)
def group(request):
    return request.param


def test_the_formula_solves_the_task_without_noise(group, generator):
    given, missing = tasks.random_task(group, "sequence", 6, generator)
    place = group.random(6, generator=generator, dtype=torch.float64)[:, None]
    given, missing = group.compose(place, given), group.compose(place, missing)
    assert tasks.completion_error(group, arms.formula(group, given), missing).max() < 1e-10


def test_the_formula_does_not_solve_the_mixture(generator):
    given, missing = tasks.random_task(lie.SE2, "mixture", 6, generator)
    assert tasks.completion_error(lie.SE2, arms.formula(lie.SE2, given), missing).median() > 1e-3


def test_the_task_is_the_declared_one(group, generator):
    """Scipy's logarithm finds the constant step, and the missing element is in the interior and nowhere given."""
    given, missing = tasks.random_task(group, "sequence", 3, generator)
    assert given.shape[1] == tasks.LENGTH - 1 and missing.shape[1] == 1
    for elements, lost in zip(given.numpy(), missing[:, 0].numpy()):
        logs = [scipy.linalg.logm(scipy.linalg.solve(lost, g)).real for g in elements]
        sizes = sorted(float((log**2).sum() ** 0.5) for log in logs)
        step = sizes[0]
        assert 0.2 <= step <= 0.4 and sizes[1] == pytest.approx(step, rel=1e-6), "two neighbours at one step"
        assert all(size / step == pytest.approx(round(size / step), abs=1e-5) for size in sizes)
    mixed, lost = tasks.random_task(group, "mixture", 3, generator)
    assert mixed.shape[1] == 2 * (tasks.MIXTURE_LENGTH - 1) + 2 and lost.shape[1] == 2


def test_the_measure_is_the_norm_of_scipys_logarithm(group, generator):
    answer = group.random(4, generator=generator, dtype=torch.float64)
    near = group.exp(0.3 * torch.randn(4, 2, group.dim, generator=generator, dtype=torch.float64))
    missing = group.compose(answer[:, None], near)
    expected = [min(float((scipy.linalg.logm(m.numpy()).real ** 2).sum() ** 0.5) for m in pair) for pair in near]
    assert tasks.completion_error(group, answer, missing).tolist() == pytest.approx(expected, rel=1e-6)


def test_the_measure_outside_of_the_chart():
    """A reflection has no logarithm in the group, and a very distant answer is cut."""
    missing = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1, 1)
    answer = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    answer[0, 0, 0] = -1.0
    answer[1, 0, 2] = 50.0
    assert tasks.completion_error(lie.Aff2, answer, missing).tolist() == [tasks.CEILING] * 2


def test_the_closed_form_scores_are_the_librarys(group, generator):
    score = arms.ClosedFormScore(group, 3).double()
    with torch.no_grad():
        score.log_block_weights.normal_(0.0, 0.3, generator=generator)
    given, _ = tasks.random_task(group, "mixture", 1, generator)
    given = given[:, :5]
    seen = arms.look(group, given)
    ours = score(seen[..., : group.dim], seen[..., group.dim :])
    theirs = lie_scores(
        given, given, group=group, block_weights=score.log_block_weights.exp(), temperature=score.log_temperature.exp()
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arm", arms.ARMS)
def test_who_is_equivariant(group, arm, generator):
    given, _ = tasks.random_task(group, "sequence", 4, generator)
    moves = checks.large_moves(group, 4, generator)

    def errors(dtype):
        if arm == "formula":
            return checks.invariance_errors(group, lambda g: arms.formula(group, g), given.to(dtype), moves)
        model = _training.seeded(0, lambda: arms.build(group, arm)).to(dtype)
        return checks.invariance_errors(group, model.complete, given.to(dtype), moves)

    medians = {kind: median for kind, (median, _) in errors(torch.float64).items()}
    if arm == "vectors":
        assert min(medians.values()) > 1e-2, "the tester sees an arm that is not equivariant"
    else:
        assert max(medians.values()) < 1e-8
        assert errors(torch.float32)["random"][0] < 1e-3


def test_the_score_has_the_published_number_of_parameters():
    counts = {a: arms.count_parameters(arms.build(lie.SE2, a))["score_parameters"] for a in arms.LEARNED}
    assert counts["closed form"] == 3 * arms.NUM_HEADS and counts["learned kernel"] == 161 * arms.NUM_HEADS
    assert counts["vectors"] == 2 * 2 * (arms.HIDDEN**2 + arms.HIDDEN)


def test_seeds_trained_together_are_those_trained_alone(generator):
    """To a hundredth of how far they move: Adam makes steps of full size out of gradients that are rounding alone, as
    that of a bias that softmax does not see.
    """
    given, missing = tasks.random_task(lie.SE2, "sequence", 16, generator)
    for arm in arms.LEARNED:
        size = {"steps": 5, "batch_size": 4, "lr": 1e-3}
        together = arms.train(lie.SE2, arm, given, missing, seeds=[0, 1], **size)
        alone = arms.train(lie.SE2, arm, given, missing, seeds=[1], **size)
        fresh = _training.seeded(1, lambda arm=arm: arms.build(lie.SE2, arm))
        parameters = [dict(model.named_parameters()) for model in (*together, *alone, fresh)]
        unseen = {name for name in parameters[0] if name.endswith(("output_bias", "query_key.bias"))}
        for name in parameters[0].keys() - unseen:
            assert not torch.equal(parameters[2][name], parameters[3][name]), f"{name} was not trained"
        other, same, expected, start = (
            torch.cat([x.detach().flatten() for name, x in found.items() if name not in unseen]) for found in parameters
        )
        moved = (expected - start).norm()
        assert (same - expected).norm() <= 0.01 * moved, arm
        assert (other - expected).norm() > moved, "the comparison sees another seed"


def test_training_learns(generator):
    given, missing = tasks.random_task(lie.SE2, "sequence", 128, generator)
    (model,) = arms.train(lie.SE2, "closed form", given, missing, seeds=[0], steps=150, batch_size=32, lr=3e-2)
    error = tasks.completion_error(lie.SE2, model.complete(given.float()).double(), missing).median()
    untrained = _training.seeded(0, lambda: arms.build(lie.SE2, "closed form"))
    before = tasks.completion_error(lie.SE2, untrained.complete(given.float()).double(), missing).median()
    assert error < 0.5 * before


def test_the_cocycle(group):
    found = checks.cocycle(group, count=32)
    assert found["group float64"] < 1e-12 and found["group float32"] < 1e-3
    assert found["order"] == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(
    "wrong", [{"tasks": ("x",)}, {"tasks": ()}, {"groups": ()}, {"groups": ("E8",)}, {"seeds": 0}, {"workers": 0}]
)
def test_a_wrong_config_is_refused(wrong):
    with pytest.raises(ValueError):
        study.CompletionConfig(**wrong)


def test_a_quick_run_from_end_to_end_is_taken_up_again(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    config = replace(study.quick(tmp_path / "out"), groups=("SE2",), csv=tmp_path / "csv")
    kept, seen = config.out / "cells.jsonl", []

    def stop(done, total):
        if len(kept.read_text().splitlines()) >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run(config, stop)
    assert not (config.out / "lie_completion.html").exists()
    first = kept.read_text()
    path = study.run(config, lambda *counts: seen.append(counts))
    assert seen[0][0] > 1 and seen[-1] == (2 * (1 + 3 * 8),) * 2, "what was finished is not run again"
    assert kept.read_text().startswith(first)
    num_cells = 2 * (1 + 3 * 2)
    assert len(kept.read_text().splitlines()) == 1 + num_cells
    page = path.read_text()
    for text in ("Closed form against formula. Task sequence:", "Task mixture:", "learned kernel", "95 %", "<svg"):
        assert text in page
    data = json.loads((config.out / "lie_completion.json").read_text())
    assert len(data["cells"]) == num_cells
    rows = (config.csv / "lie_completion_cells.csv").read_text().splitlines()
    assert len(rows) == 1 + num_cells
    formula = next(r for r in data["cells"] if (r["task"], r["arm"]) == ("sequence", "formula"))
    _, missing = tasks.test_set(lie.SE2, "sequence", config.test_size)
    answer = torch.tensor(formula["first_answer"], dtype=torch.float64)
    torch.testing.assert_close(answer, missing[0, 0], rtol=0, atol=1e-10)

    before = kept.read_text()
    records = study.measure(replace(config, tasks=("sequence",), seeds=3))
    assert [r["seed"] for r in records if r["arm"] == "vectors"] == [0, 1, 2]
    added = [json.loads(line)["key"] for line in kept.read_text().removeprefix(before).splitlines()]
    assert sorted(added) == sorted(f"sequence/SE2/{arm}/2" for arm in arms.LEARNED), "only the new seed is run"

    # Cells of a version that did not keep the first answer are taken up as well.
    lines = [json.loads(line) for line in before.splitlines()]
    assert all(line.pop("first_answer") for line in lines[1:])
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(_jobs, "ProcessPoolExecutor", None)
    study.run(config)
    with pytest.raises(ValueError, match="other settings"):
        study.run(replace(config, steps=9))


def test_the_mixture_can_have_groups_of_its_own():
    config = study.CompletionConfig(groups=("SE2", "SO3"), mixture_groups=("SE2",))
    assert config.cases == [("sequence", "SE2"), ("sequence", "SO3"), ("mixture", "SE2")]


def test_the_scan_tries_each_declared_rate(tmp_path):
    config = replace(study.quick(tmp_path), steps=2)
    rows = study.scan(config).read_text().splitlines()
    assert rows[0].startswith("task,group,arm,seed,lr,median")
    tried = [(row.split(",")[2], float(row.split(",")[4])) for row in rows[1:]]
    assert tried == [(arm, rate) for arm in arms.LEARNED for rate in SCANNED[arm]]
    assert all(LEARNING_RATES[arm] in SCANNED[arm] for arm in arms.LEARNED)


@pytest.mark.parametrize("module", ["lie_completion", "lie_poses"])
def test_the_command_line_has_help(module):
    line = [sys.executable, "-W", "error", "-m", f"erlangen.studies.{module}", "--help"]
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == 0 and "--seeds" in result.stdout, result.stderr
