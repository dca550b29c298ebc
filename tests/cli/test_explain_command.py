"""`erlangen explain` as a user meets it."""

import json

import pytest
import torch

from erlangen import lm
from erlangen.cli.explain import ExplainConfig, explain, main

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'erlangen[report]'")

WORDS = "The king is dead, and 7 days later a queen\nrules: who'd have thought it? NO ONE did. "


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(WORDS * 60)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """A run of two steps, broken, with rotary positions."""
    folder = tmp_path_factory.mktemp("runs") / "broken"
    config = lm.TrainConfig(
        data=lm.DataConfig(corpus=str(text), validation_fraction=0.5),
        model=lm.GPTConfig(num_layers=2, num_heads=2, dim=16, context_length=16, positions="rotary"),
        breaking=lm.BreakingConfig(enabled=True),
        steps=2, batch_size=2, eval_windows=2, log_charges=False, log_gauge=False, out=folder,
    )  # fmt: skip
    lm.train(config)
    return folder


def call(*arguments):
    return main([*map(str, arguments)])


def test_explain_a_run_on_what_it_was_validated_on(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(run, "--windows", "16", "--heads", "1.0", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "newline" in printed and "held-out part of story.txt" in printed and "Without the directions" in printed
    text = (out / "explain.html").read_text()
    assert "<svg" in text and "<script" not in text and "http" not in text.replace("http://www.w3.org", "")
    assert ">nan<" not in text.split("<h1>")[1].lower()
    for heading in ("By class", "What chance gives", "What the directions cause", "Positions", "Head 1.0 in depth"):
        assert f"<h2>{heading}</h2>" in text
    assert "single characters" in text and "from the key to the query" in text

    data = json.loads((out / "explain.json").read_text())
    assert data["command"] == "erlangen explain" and data["num_windows"] == 16
    vowels = data["classes"].index("vowels")
    assert len(data["effects"][1][0]) == len(data["classes"]) and data["factors"][1][0][vowels] > 0
    assert data["length_unlearned"][0][0] == pytest.approx(0.5 * 8**0.5)
    one = data["steering"]["alphas"].index(1.0)
    assert data["steering"]["loss_change"][one] == {"mean": 0, "low": 0, "high": 0}
    assert [(head["layer"], head["head"]) for head in data["heads"]] == [(1, 0)]
    favoured = data["heads"][0]["tokens"]["highest"]
    assert all(row["count"] >= 20 for row in favoured) and favoured[0]["factor"] >= favoured[-1]["factor"]


def test_ctrl_c_leaves_nothing(run, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("erlangen.cli.explain.steer", stopped)
    with pytest.raises(KeyboardInterrupt):
        call(run, "--windows", "8", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_explain_a_folder_of_transformers(text, tmp_path):
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=256, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
        )
        model = transformers.GPT2LMHeadModel(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "gpt2")
    folder, out = tmp_path / "gpt2", tmp_path / "out"
    with pytest.raises(ValueError, match="give one with --text"):
        call(folder, "--tokenizer", "bytes", "--out", out)
    assert not out.exists()
    result = explain(ExplainConfig(model=folder, tokenizer="bytes", text=text, windows=8), lambda done, total: None)
    prior = result.prior
    assert prior.distances is None and prior.tokens.shape == (8, 32) and result.text == "story.txt"
    assert (prior.lengths[..., 0] > 0).all() and not prior.lengths[..., 1].any()


def test_errors(run, text, tmp_path):
    short, out = tmp_path / "short.txt", tmp_path / "out"
    short.write_text("brief")
    other = tmp_path / "page.txt"
    other.write_bytes(b"\xff\xfe\x00")
    for arguments, said in (
        ((run, "--text", short), "short.txt has 5 tokens, and one window takes 17"),
        ((run, "--text", other), "is not UTF-8 text"),
        ((run, "--heads", "7.0"), "7.0 is not there: broken has 2 layers of 2 heads"),
        ((run, "--heads", "x"), "takes LAYER.HEAD"),
        ((run, "--length", "99"), "more than the context"),
        ((tmp_path / "none",), "no folder"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            call(*arguments, "--out", out)
    with pytest.raises(SystemExit):  # tyro prints what is wrong
        call(run, "--windows", "1", "--out", out)
    assert not out.exists()
    with pytest.raises(ValueError, match="is a file: choose a folder"):
        call(run, "--out", short)


def test_a_model_without_direction(tmp_path, text):
    config = lm.TrainConfig(
        data=lm.DataConfig(corpus=str(text)),
        model=lm.GPTConfig(num_layers=1, num_heads=2, dim=16, context_length=16, attention_bias=False),
        steps=1, batch_size=2, eval_windows=2, log_charges=False, log_gauge=False, out=tmp_path / "plain",
    )  # fmt: skip
    lm.train(config)
    with pytest.raises(ValueError, match="no preferred direction"):
        call(tmp_path / "plain", "--out", tmp_path / "out")


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        call("--help")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.count("erlangen explain ") >= 3 and "Ctrl-C" in out
