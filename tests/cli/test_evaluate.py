"""`erlangen evaluate` as a user meets it, and the loader behind it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from erlangen import lm
from erlangen.breaking import break_symmetry
from erlangen.cli import evaluate
from erlangen.cli._language_model import open_language_model

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'erlangen[report]'")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of two steps: a symmetric model, and a broken one."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("The dogs near the cat are old. A, B, C, D, E and so on.\n" * 200)
    for name, broken in (("symmetric", False), ("broken", True)):
        lm.train(
            lm.TrainConfig(
                data=lm.DataConfig(corpus=str(folder / "text.txt")),
                model=lm.GPTConfig(context_length=128, num_layers=2, num_heads=2, dim=16),
                breaking=lm.BreakingConfig(enabled=broken), steps=2, batch_size=2, eval_windows=2,
                log_gauge=False, out=folder / name,
            )
        )  # fmt: skip
    return folder


def call(*arguments):
    return evaluate.main([*map(str, arguments)])


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        call("--help")
    out = capsys.readouterr().out
    assert out.count("erlangen evaluate ") >= 5 and "Ctrl-C" in out and "lm_eval --include_path" in out


def test_two_runs_are_asked_and_compared(runs, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [runs / "symmetric", runs / "broken", "--items", 12, "--out", out, "--corpus", runs / "text.txt"]
    assert call(*arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "reasoning of symmetric" in said and "broken less symmetric" in said and "chance is" in said
    data = json.loads((out / "evaluate.json").read_text())
    assert data["command"] == "erlangen evaluate" and [row["name"] for row in data["models"]] == ["symmetric", "broken"]
    assert [row["family"] for row in data["comparison"]] == [*lm.reasoning.FAMILIES, "mean"]
    assert len(data["items"]) == sum(row["items"] for row in data["asked"].values()) >= 8 * 12
    assert {row["family"] for row in data["contamination"]} == {*lm.reasoning.FAMILIES}
    for number, model in enumerate(data["models"]):  # the table is that of the items
        for summary in model["summaries"][:-1]:
            items = [item for item in data["items"] if item["family"] == summary["family"]]
            right = [item["likelihoods"][number] for item in items]
            hits = [values.index(max(values)) == item["answer"] for values, item in zip(right, items)]
            assert summary["accuracy"]["mean"] == pytest.approx(sum(hits) / len(hits))
    text = (out / "evaluate.html").read_text()
    assert "<svg" in text and "<script" not in text and "nan" not in text.split("<h1>")[1].lower()
    for heading in ("What broken answers", "Item by item", "Kind by kind", "In the training text already"):
        assert heading in text
    # A rerun asks nothing and says the same.
    lines = (out / "evaluate.jsonl").read_text()
    assert call(*arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["models"] == data["models"]
    assert (out / "evaluate.jsonl").read_text() == lines


def test_a_stop_keeps_the_families_that_are_done(runs, tmp_path, capsys, monkeypatch):
    score, asked = lm.reasoning.score, []

    def stopped_at_the_third(model, reader, items, **options):
        asked.append(items.family)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return score(model, reader, items, **options)

    monkeypatch.setattr(lm.reasoning, "score", stopped_at_the_third)
    arguments = [runs / "broken", "--items", 8, "--out", tmp_path, "--families", "copy", "near", "numeric", "syntax"]
    assert call(*arguments) == 130
    assert "2 of 4 families" in capsys.readouterr().err and not (tmp_path / "evaluate.json").exists()
    with (tmp_path / "evaluate.jsonl").open("a") as file:
        file.write('{"key": "cut')  # as by a machine that stops
    assert call(*arguments) == 0
    assert asked == ["copy", "near", "numeric", "numeric", "syntax"]
    assert call(*arguments, "--seed", 1) == 0 and len(asked) == 9, "other questions are asked anew"


@pytest.mark.filterwarnings("ignore:builtin type")
def test_a_broken_model_without_its_biases_is_not_evaluated(tmp_path, runs):
    transformers = pytest.importorskip("transformers", reason="models of transformers: pip install 'erlangen[hf]'")
    pytest.importorskip("erlangen.interop.broken")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    config_of_family = config.to_dict() | {"architectures": ["GPT2LMHeadModel"]}
    model = break_symmetry(transformers.GPT2LMHeadModel(config)).eval()
    model.save_pretrained(tmp_path / "whole")
    opened = open_language_model(tmp_path / "whole", tokenizer="bytes", device="cpu")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(opened.logits(tokens), model(tokens).logits)
    assert opened.context_length == 128 and opened.beginning is None and not opened.model.training
    with pytest.raises(ValueError, match="holds no tokenizer"):
        open_language_model(tmp_path / "whole")

    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    biases = [name for name in tensors if "symmetry_breaking" in name]
    assert len(biases) >= 4
    shutil.copytree(tmp_path / "whole", tmp_path / "no biases")
    kept = {name: tensor for name, tensor in tensors.items() if name not in biases}
    save_file(kept, tmp_path / "no biases" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="symmetry_breaking"):
        call(tmp_path / "no biases", "--tokenizer", "bytes", "--out", tmp_path / "out")

    # Said to be of the family: by the name of its kind alone, and with a config that is the family's in every word.
    values = json.loads((tmp_path / "whole" / "config.json").read_text()) | {"model_type": "gpt2"}
    for name, told, message in (
        ("renamed", values, "unlearned biases"), ("plain", config_of_family, "also has symmetry_breaking"),
    ):  # fmt: skip
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(told))
        with pytest.raises(ValueError, match=message):
            call(tmp_path / name, "--tokenizer", "bytes", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists(), "and not numbers"


def test_a_run_without_its_biases_is_not_evaluated(tmp_path, runs):
    for name, change in (("no buffers", None), ("said symmetric", False)):
        shutil.copytree(runs / "broken", tmp_path / name)
        (checkpoint,) = (tmp_path / name).glob("step-*")
        if change is None:
            (file,) = checkpoint.glob("*.safetensors")
            tensors = load_file(file)
            save_file({key: tensor for key, tensor in tensors.items() if "symmetry_breaking" not in key}, file)
        else:
            meta = json.loads((checkpoint / "checkpoint.json").read_text())
            meta["config"]["breaking"]["enabled"] = change
            (checkpoint / "checkpoint.json").write_text(json.dumps(meta))
        with pytest.raises(lm.CheckpointError):
            call(tmp_path / name, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_asked_is_said(tmp_path, runs):
    with pytest.raises(FileNotFoundError, match="no folder"):
        call(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a checkpoint"):
        call(tmp_path)
    with pytest.raises(ValueError, match="or --harness"):
        call()
    with pytest.raises(ValueError, match="choose among"):
        call(runs / "broken", "--families", "logic", "--out", tmp_path)
    assert call("--harness", tmp_path / "tasks", "--items", 4, "--families", "copy") == 0
    assert (tmp_path / "tasks" / "erlangen_reasoning.yaml").is_file()
