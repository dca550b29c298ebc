"""The study of averages: the text, two families by hand, kept models, barriers by hand, the control, the page."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from here import execute_here

from erlangen.lm import GPT
from erlangen.studies import _jobs
from erlangen.studies import merging as study
from erlangen.studies.merging import arms, models, results
from erlangen.studies.merging.study import kept_cells, model_jobs, model_path, path_jobs

DIM = 32

pytestmark = pytest.mark.xdist_group("merging")  # the models below are worth sharing
pytest.importorskip("transformers", reason="the family llama is of transformers")


@pytest.fixture(scope="module")
def text(text_file):
    return models.read_text(text_file, 8)


@pytest.fixture(scope="module")
def trained(text):
    """Two models of each family after a few steps."""
    how = {"dim": DIM, "steps": 30, "batch_size": 4, "lr": 1e-2}
    return {f: [models.train(f, text, seed=seed, **how) for seed in (0, 1)] for f in models.FAMILIES}


def test_the_last_tenth_is_held_out(text_file, text):
    whole = text_file.read_text()
    spelled = ["".join(text.vocabulary[int(token)] for token in window) for window in text.held_out]
    assert len(spelled) == 8 and all(len(window) == models.CONTEXT + 1 for window in spelled)
    cut = int(0.9 * len(whole))
    train = "".join(text.vocabulary[int(token)] for token in text.train.shards[0])
    assert train == whole[:cut] and all(window in whole[cut:] for window in spelled)
    counts = Counter(train)
    shares = {c: (counts[c] + 1) / (len(train) + len(text.vocabulary)) for c in text.vocabulary}
    expected = -np.mean([math.log(shares[c]) for window in spelled for c in window[1:]])
    assert models.unigram_loss(text) == pytest.approx(expected)


def test_there_is_no_text(tmp_path, monkeypatch):
    monkeypatch.setenv("ERLANGEN_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="ERLANGEN_DATA"):
        study.train_models(study.quick(tmp_path))


def test_the_families_are_what_the_protocol_says(text):
    """Parameters counted by hand."""
    d, vocabulary, layers = 128, len(text.vocabulary), 2
    gpt, llama = (models.build(family, vocabulary, d) for family in models.FAMILIES)
    block = 4 * (d * d + d) + 2 * d * 512 + 512 + d + 4 * d
    assert sum(p.numel() for p in gpt.parameters()) == (2 * vocabulary + 64) * d + layers * block + 2 * d
    assert isinstance(gpt, GPT) and gpt.head.weight is not gpt.token_embedding.weight
    block = 2 * d * d + 2 * d * 64 + 3 * d * 344 + 2 * d
    assert sum(p.numel() for p in llama.parameters()) == 2 * vocabulary * d + layers * block + d
    assert llama.lm_head.weight is not llama.model.embed_tokens.weight
    attention = llama.config
    assert (attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim) == (4, 2, 32)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_seed_is_a_model_and_training_learns(family, text, trained):
    first, second = trained[family]
    again = models.train(family, text, dim=DIM, seed=0, steps=30, batch_size=4, lr=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()) if a.ndim > 1)
    assert models.held_out_loss(first, text.held_out) < models.unigram_loss(text) + 0.1 < math.log(len(text.vocabulary))


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_loss_is_the_mean_over_characters(family, text, trained):
    model = trained[family][0]
    with torch.no_grad():
        logits = models.logits(model, text.held_out[:, :-1]).double().numpy()
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(logs, text.held_out[:, 1:, None].numpy(), -1).mean()
    assert models.held_out_loss(model, text.held_out, batch_size=3) == pytest.approx(expected, rel=1e-5)


def test_a_kept_model_comes_back_and_one_of_other_settings_is_refused(tmp_path, text):
    path, settings = tmp_path / "deep" / "x.safetensors", {"seed": 3, "lr": 0.1}
    assert not models.is_kept(path, settings)
    ticks = []
    how = {"family": "gpt", "dim": DIM, "seed": 3, "steps": 2, "batch_size": 2, "lr": 1e-2}
    models.keep(path, settings, lambda step: bool(ticks.append(step)), text=text, **how)
    assert ticks == [1, 2] and models.is_kept(path, settings) and [p.name for p in path.parent.iterdir()] == [path.name]
    again = models.train(text=text, **how)
    before = torch.get_rng_state()
    loaded = models.load(path, "gpt", len(text.vocabulary), DIM)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), again.parameters()))
    assert models.found(path)["loss"] == models.held_out_loss(again, text.held_out)
    with pytest.raises(ValueError, match="other settings"):
        models.is_kept(path, settings | {"lr": 0.2})
    with pytest.raises(KeyboardInterrupt):
        models.keep(tmp_path / "y", settings, lambda step: True, text=text, **how)
    assert not (tmp_path / "y").exists()


def test_barriers_by_hand():
    weights = np.linspace(0, 1, 5)
    assert arms.barrier(weights, np.array([1.0, 2.0, 4.0, 2.0, 3.0])) == pytest.approx(4.0 - 2.0)
    assert arms.barrier(weights, np.array([3.0, 2.6, 1.0, 1.6, 1.0])) == pytest.approx(0.1)
    assert arms.barrier(weights, np.array([3.0, 2.0, 1.0, 1.0, 1.0])) == 0.0, "a dip is no barrier"


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_naive_arm_averages_what_is_stored(family, text, trained):
    first, second = trained[family]
    before = [p.clone() for p in first.parameters()]
    merged, alignment = arms.between("naive", first, second)
    for name, parameter in merged["naive"](0.3).named_parameters():
        expected = 0.7 * first.get_parameter(name) + 0.3 * second.get_parameter(name)
        torch.testing.assert_close(parameter, expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), before)), "the models are left as they were"
    assert alignment.distance_before == pytest.approx(alignment.distance_after)


def every_path(first, second, windows):
    return {arm: r for using in arms.ALIGNED for arm, r in arms.measure_paths(using, first, second, windows, 3).items()}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_arm_ends_at_the_two_models(family, text, trained):
    found = every_path(*trained[family], text.held_out)
    ends = [models.held_out_loss(model, text.held_out) for model in trained[family]]
    assert set(found) == set(arms.ARMS)
    for arm, path in found.items():
        assert path["weights"] == [0.0, 0.5, 1.0] and path["end_error"] < 1e-4, arm
        assert [path["losses"][0], path["losses"][2]] == pytest.approx(ends, abs=1e-4)
        assert path["barrier"] == pytest.approx(max(0.0, path["losses"][1] - sum(ends) / 2), abs=1e-4)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_only_the_whole_gauge_finds_a_moved_copy(family, text, trained):
    """Wrong answers are seen: the arms that know less have a barrier between a model and itself."""
    model = trained[family][0]
    copy = models.moved_copy(model, seed=0)
    loss = models.held_out_loss(model, text.held_out)
    assert models.held_out_loss(copy, text.held_out) == pytest.approx(loss, abs=1e-4)
    found = every_path(model, copy, text.held_out)
    assert all(path["distance_before"] > 0.5 for path in found.values())
    for arm in ("gauge", "factors"):
        assert found[arm]["barrier"] < 1e-4 and found[arm]["distance_after"] < 1e-4, arm
    for arm in ("naive", "permutation"):
        assert found[arm]["barrier"] > 1e-2 and found[arm]["distance_after"] > 0.1, arm


def test_a_stopped_path_raises(text, trained):
    with pytest.raises(KeyboardInterrupt):
        arms.measure_paths("naive", *trained["gpt"], text.held_out, 3, lambda done: True)


@pytest.mark.parametrize(
    "wrong", [{"families": ("x",)}, {"families": ()}, {"pairs": 0}, {"dim": 12}, {"points": 2}, {"workers": 0}]
)
def test_a_wrong_config_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        study.MergeConfig(**wrong)


@pytest.fixture(scope="module")
def ran(tmp_path_factory, text_file):
    out = tmp_path_factory.mktemp("merging")
    config = replace(study.quick(out), text=text_file, families=("gpt",), csv=out / "csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("erlangen.studies.merging.study.execute", execute_here)
        assert len(study.train_models(config)) == 4
        assert not (config.out / "cells.jsonl").exists(), "training merges nothing"
        counts = []
        path = study.run(config, lambda *now: counts.append(now))
    assert counts == [(0, 4), (16, 16)], "what was trained is not trained again"
    return config, path


def test_the_page_has_all_numbers(ran):
    config, path = ran
    page, data = path.read_text(), json.loads((config.out / "merging.json").read_text())
    assert [(r["pairing"], r["arm"], r["seed"]) for r in data["paths"]] == [
        (pairing, arm, pair) for pairing in ("seeds", "copy") for arm in arms.ARMS for pair in (0, 1)
    ]
    for record in data["paths"]:
        for number in record["losses"]:
            assert f">{number:.4g}<" in page, record["key"]
    for model in data["models"]:
        assert f">{model['loss']:.4f}<" in page
    for text in ("Family gpt, barrier in nats a character: naive ", "95 %", "<svg", "moved copy"):
        assert text in page
    rows = {(r["first"], r["second"]): r for r in study.compare(config, data["paths"])}
    assert set(rows) == set(results.COMPARED)
    barriers = {(r["arm"], r["seed"]): r["barrier"] for r in data["paths"] if r["pairing"] == "seeds"}
    by_hand = sum(barriers["gauge", pair] - barriers["naive", pair] for pair in (0, 1)) / 2
    assert rows["gauge", "naive"]["interval"].mean == pytest.approx(by_hand)
    for name in ("models", "barriers", "differences", "control", "paths"):
        assert (config.csv / f"merging_{name}.csv").stat().st_size > 100
    assert len((config.csv / "merging_paths.csv").read_text().splitlines()) == 1 + len(data["paths"])
    assert (config.csv / "merging_paths.svg").read_text().lstrip().startswith("<")


def test_models_and_cells_are_taken_up_and_only_new_ones_run(ran, monkeypatch):
    config, _ = ran
    text = models.read_text(config.text, config.windows)
    more = replace(config, pairs=3)
    todo = [job.arguments[1:3] for job in model_jobs(more, text) if not job.finished]
    assert todo == [("gpt", 4), ("gpt", 5)]
    todo = [job.arguments[1:] for job in path_jobs(more, kept_cells(more)) if not job.finished]
    assert todo == [("gpt", pairing, 2, arm) for pairing in ("seeds", "copy") for arm in arms.ALIGNED]
    monkeypatch.setattr(_jobs, "ProcessPoolExecutor", None)
    trained, paths = study.measure(replace(config, pairs=1))
    assert len(trained) == 2 and len(paths) == 2 * len(arms.ARMS)
    with pytest.raises(ValueError, match="other settings"):
        study.run(replace(config, steps=9))
    with pytest.raises(ValueError, match="other settings"):
        study.run(replace(config, points=5))


def test_the_command_line_trains_only(ran, tmp_path, text_file):
    sizes = "--pairs 1 --dim 16 --steps 1 --batch-size 2 --windows 2 --workers 1 --families gpt --train-only"
    line = [sys.executable, "-W", "error", "-m", "erlangen.studies.merging", *sizes.split()]
    result = subprocess.run([*line, "--out", tmp_path, "--text", text_file], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(tmp_path / "models")
    config = replace(study.quick(tmp_path), families=("gpt",))
    assert all(model_path(config, "gpt", seed).exists() for seed in (0, 1))
    assert not list(tmp_path.glob("*.html"))
