"""Presets of whole runs: the published protocol, number by number, and the fields that it needs."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from stopping import StopAfter

from erlangen import lm
from erlangen.cli._train_page import train_page
from erlangen.cli.train import parse
from erlangen.lm._shards import write_shard
from erlangen.lm.corpus import Tokens
from erlangen.lm.settings import BreakingConfig, DataConfig, OptimizerConfig, TrainConfig, from_dict, to_dict
from erlangen.lm.train import build_model, build_optimizer, window_losses
from erlangen.lm.windows import SequentialWindows

NAME = "symmetry-breaking-124m"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two GPT-2 shards to train on and one to validate on."""
    folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for name, size in (("edu_train_000001", 700), ("edu_train_000002", 500), ("edu_val_000000", 400)):
        write_shard(folder / f"{name}.bin", random.integers(0, 500, size), 50257)
    return folder


def tiny(shards, out, *more):
    """The preset at a size of nothing, through the command line."""
    line = ["--preset", NAME, "--data.corpus", str(shards), "--model.num-layers", "1", "--model.num-heads", "2",
            "--model.dim", "16", "--model.context-length", "8", "--steps", "7", "--eval-every", "2", "--eval-windows",
            "4", "--batch-size", "2", "--checkpoint-every", "100", "--device", "cpu", "--out", str(out),
            *more]  # fmt: skip
    return parse(line).config


@pytest.fixture
def corpus(shards):
    return lm.load_corpus(str(shards), "gpt2")  # shards need no vocabulary


# The protocol


def test_the_published_protocol_number_by_number():
    """The table of the protocol: model, data, budget, schedule, precision, validation, biases."""
    config = lm.run_preset(NAME)
    model = config.model
    assert (model.num_layers, model.num_heads, model.kv_heads, model.dim, model.hidden_dim) == (12, 12, 12, 768, 3072)
    assert (model.context_length, model.vocab_size, model.mlp, model.positions) == (512, 50304, "prelu", "learned")
    assert model.attention_bias and model.bias and model.tie_embeddings and not model.qk_norm
    with torch.device("meta"):
        assert sum(p.numel() for p in lm.GPT(model).parameters()) == 124_119_552
    data = config.data
    assert (data.corpus, data.tokenizer) == ("hf:HuggingFaceFW/fineweb-edu:sample-10BT", "gpt2")
    assert data.order == "sequential"
    tokens = config.steps * config.batch_size * model.context_length
    assert (config.steps, config.batch_size * model.context_length) == (122_071, 4096)
    assert 5e8 <= tokens < 5e8 + 4096 and config.accumulation == 1
    assert tokens < (1 - data.validation_fraction) * data.max_tokens, "no token is read twice"
    assert config.schedule == "constant" and config.warmup == 0 and config.clip is None
    assert {config.lr_factor(step) for step in (0, 1, 60_000, 122_070)} == {1.0}
    assert config.precision == "bfloat16" and config.tf32
    assert (config.eval_every, config.eval_windows, config.evaluation) == (1000, 8, "next")
    assert config.breaking == BreakingConfig(
        enabled=True, query_mean=0.5, query_std=(0.05, 0.15), value_mean=0.0, value_std=(0.05, 0.05), per_head=False,
        redraw="forward", evaluate_with="last",
    )  # fmt: skip
    assert config.reduction.kind == "none"


# What torch and the library call the settings, against the table of optimisers.
PUBLISHED = {
    "ecd": {"lr": 1.0, "eta": 100.0, "F0": 2.0, "nu": 0.0, "weight_decay": 0.0, "kick": "euler", "dot": "per_tensor"},
    "adamw": {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.01, "eps": 1e-8},
    "sgdm": {"lr": 0.03, "momentum": 0.95, "nesterov": True, "weight_decay": 0.0, "dampening": 0},
    "soap": {"lr": 3e-4, "betas": (0.95, 0.95), "weight_decay": 0.01, "precondition_frequency": 10,
             "max_precond_dim": 10000},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_settings_reach_every_parameter(name):
    config = lm.run_preset(NAME, name)
    assert config == replace(lm.run_preset(NAME), optimizer=config.optimizer)
    model = build_model(lm.GPTConfig(vocab_size=64, num_layers=1, dim=16), config.breaking, seed=0)
    optimizer = build_optimizer(config.optimizer, model, seed=config.seed)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        assert {key: group[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    if name == "sgdm":
        velocity = torch.cat([state["momentum_buffer"].flatten() for state in optimizer.state.values()])
        assert velocity.std().item() == pytest.approx(0.1, rel=0.05)


def test_the_sound_run():
    """The same tokens as published; validation on a million; a half-life of the second moment in tokens."""
    config, published = lm.run_preset(f"{NAME}-sound", "adamw"), lm.run_preset(NAME)
    context = config.model.context_length
    assert abs(config.steps * config.batch_size - published.steps * published.batch_size) < config.batch_size
    assert config.eval_windows * context >= 1_000_000 and config.evaluation == "fixed"
    assert config.data == replace(published.data, order="shuffled")
    assert config.model == replace(published.model, mlp="gelu")
    assert config.breaking == replace(published.breaking, evaluate_with="mean")
    assert config.optimizer.betas is not None
    assert config.optimizer.betas[1] == pytest.approx(0.95 ** (config.batch_size * context / 491_520), abs=1e-4)
    assert (config.schedule, config.clip) == ("cosine", 1.0) and config.warmup > 0
    ecd = lm.run_preset(f"{NAME}-sound").optimizer
    assert (ecd.kick, ecd.dot, ecd.F0) == ("exact", "global", 0.0)
    for name in ("ecd", "adamw", "sgdm", "soap", "muon"):
        optimizer = lm.run_preset(f"{NAME}-sound", name).optimizer
        assert optimizer.name == name and optimizer.decay == "matrices" and not optimizer.initial_velocity_std


def test_names_that_there_are_not():
    with pytest.raises(ValueError, match="no preset is called 'large'"):
        lm.run_preset("large")
    with pytest.raises(ValueError, match="no optimiser is called 'adam'"):
        lm.run_preset("tiny", "adam")
    for name, shape in lm.PRESETS.items():
        assert lm.run_preset(name) == TrainConfig(model=shape)


# The command line


def test_options_override_the_preset_and_the_optimiser_its_settings(capsys):
    config = parse(["--preset", NAME, "--optimizer.name=adamw", "--optimizer.lr", "0.5", "--seed", "1"]).config
    expected = lm.run_preset(NAME, "adamw")
    assert config == replace(expected, seed=1, optimizer=replace(expected.optimizer, lr=0.5))
    with pytest.raises(SystemExit):
        parse(["--preset", NAME, "--optimizer.name", "sgdm", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Steps of the optimiser. (default: 122071)" in text
    assert "Learning rate, before the schedule. (default: 0.03)" in text
    config = parse(["--preset", NAME, "--optimizer.name", "adamw", "--optimizer.eta", "3"]).config
    with pytest.raises(ValueError, match="adamw has no setting 'eta'"):
        build_optimizer(config.optimizer, torch.nn.Linear(2, 2))


@pytest.mark.parametrize("optimizer", ["ecd", "sgdm"])
def test_the_preset_runs_on_shards(shards, corpus, tmp_path, optimizer):
    """Batches are contiguous text, validations walk through the held-out text, in order and around."""
    seen = []
    model_tokens = lm.GPT.forward

    def forward(self, tokens, targets=None):
        if self.training:
            seen.append(tokens.clone())
        return model_tokens(self, tokens, targets)

    config = tiny(shards, tmp_path / "run", "--optimizer.name", optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.GPT, "forward", forward)
        result = lm.train(config)
    read = torch.stack(seen).flatten()
    first = torch.from_numpy(corpus.train.shards[0].astype(np.int64))
    assert torch.equal(read, first[: len(read)]) and len(read) == 7 * 2 * 8
    windows = [(r["step"], r["validation_first_window"], r["validation_windows"]) for r in result.validation]
    assert windows == [(0, 0, 4), (2, 4, 4), (4, 8, 4), (6, 12, 4), (7, 16, 4)]
    assert "an easy text as much as a good step" in train_page("run", config, result.records)


# The fields, each by itself


def test_sequential_windows():
    tokens = Tokens([np.arange(10), np.arange(100, 103), np.arange(200, 209)])
    windows = SequentialWindows(tokens, 4)
    assert windows.windows_per_epoch == 4
    expected = [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [200, 201, 202, 203, 204], [204, 205, 206, 207, 208]]
    assert windows.batch(0, 4).tolist() == expected
    assert windows.batch(3, 6).tolist() == [expected[i % 4] for i in range(3, 9)]
    assert torch.equal(windows.batch(10**12, 5), torch.cat([windows.batch(10**12 + i, 1) for i in range(5)]))
    with pytest.raises(ValueError, match="first >= 0"):
        windows.batch(-1, 2)
    with pytest.raises(ValueError, match="longest shard has 10"):
        SequentialWindows(tokens, 10)


def test_resuming_the_protocol_is_exact(shards, tmp_path):
    """Sequential order, the next held-out windows, the last draw: none of it is lost by a stop."""
    more = ("--optimizer.name", "sgdm", "--log-window-losses")
    whole = lm.train(tiny(shards, tmp_path / "whole", *more))
    stopped = lm.train(tiny(shards, tmp_path / "parts", *more), progress=StopAfter(3))
    resumed = lm.resume(stopped.folder)
    timeless = [[{k: v for k, v in record.items() if k != "seconds"} for record in r.records] for r in (whole, resumed)]
    assert timeless[0] == timeless[1] and resumed.finished


def test_window_losses_are_logged(shards, tmp_path):
    config = replace(tiny(shards, tmp_path / "run"), precision="float64", log_window_losses=True, evaluation="fixed")
    result = lm.train(config)
    last = result.validation[-1]
    assert len(last["window_losses"]) == 4 and "validation_first_window" not in last
    assert sum(last["window_losses"]) / 4 == pytest.approx(last["validation_loss"], abs=1e-5)


@pytest.mark.parametrize("biases", ["mean", "last"])
def test_validation_uses_the_mean_or_the_last_draw(shards, corpus, tmp_path, biases):
    """Against a model whose biases are put into its learned ones by hand."""
    config = replace(tiny(shards, tmp_path / "run"), precision="float64")
    config = replace(config, breaking=replace(config.breaking, evaluate_with=biases))
    result = lm.train(config)
    model, breaking = result.model, result.model.symmetry_breaking
    assert breaking.evaluate_with == "mean", "the switch is for the validation alone"
    windows = SequentialWindows(corpus.validation, 8).batch(result.validation[-1]["validation_first_window"], 4)
    plain = lm.GPT(model.config).double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("symmetry_breaking.")})
    plain.eval()
    attention = plain.blocks[0].attention
    with torch.no_grad():
        attention.query.bias += breaking.bias("query", 0, mean=biases == "mean")
        attention.value.bias += breaking.bias("value", 0, mean=biases == "mean")
    found = result.validation[-1]["validation_loss"]
    assert window_losses(plain, windows).mean().item() == pytest.approx(found, abs=1e-12)
    difference = abs(window_losses(model, windows).mean().item() - found)
    assert difference < 1e-12 if biases == "mean" else difference > 1e-9, "what is returned uses the mean"


def test_decay_on_all_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))

    def decayed(decay):
        optimizer = build_optimizer(OptimizerConfig(name="adamw", weight_decay=0.3, decay=decay), model)
        return sum(len(group["params"]) for group in optimizer.param_groups if group["weight_decay"] == 0.3)

    assert decayed("matrices") == 1 and decayed("all") == 4


def test_a_random_velocity_depends_on_the_seed():
    def velocity(seed, **settings):
        optimizer = build_optimizer(OptimizerConfig(name="sgdm", **settings), torch.nn.Linear(4, 4), seed=seed)
        return [state["momentum_buffer"] for state in optimizer.state.values()]

    assert velocity(0) == []
    first, second, again = (velocity(seed, initial_velocity_std=0.1)[0] for seed in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_settings_that_an_optimiser_does_not_have():
    for config, name in (
        (OptimizerConfig(name="adamw", initial_velocity_std=0.1), "initial_velocity_std"),
        (OptimizerConfig(name="adamw", dot="per_tensor"), "dot"),
        (OptimizerConfig(name="ecd", dot="per_tensor"), "kick='euler'"),  # the exact kick has no such product
    ):
        with pytest.raises(ValueError, match=name):
            build_optimizer(config, torch.nn.Linear(2, 2))


def test_a_config_from_before_these_fields_is_read():
    old = json.loads(json.dumps(to_dict(TrainConfig())))
    for section, names in (
        (old, ("tf32", "evaluation", "log_window_losses")), (old["data"], ("order",)),
        (old["optimizer"], ("initial_velocity_std", "dot", "decay")), (old["breaking"], ("evaluate_with",)),
    ):  # fmt: skip
        for name in names:
            del section[name]
    assert from_dict(TrainConfig, old) == TrainConfig()
    assert {field.name for field in fields(DataConfig)} - set(old["data"]) == {"order"}
