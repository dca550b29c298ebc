"""`erlangen shrink` as a user meets it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from erlangen.cli import main

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'erlangen[report]'")

GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4,
    "n_positions": 16, "vocab_size": 64, "layer_norm_epsilon": 1e-5, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SHAPES = {
    "ln_1.weight": (32,), "ln_1.bias": (32,), "attn.c_attn.weight": (32, 96), "attn.c_attn.bias": (96,),
    "attn.c_proj.weight": (32, 32), "attn.c_proj.bias": (32,), "ln_2.weight": (32,), "ln_2.bias": (32,),
    "mlp.c_fc.weight": (32, 128), "mlp.c_fc.bias": (128,), "mlp.c_proj.weight": (128, 32), "mlp.c_proj.bias": (32,),
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """A folder with a GPT-2 of two layers, and a tokenizer of letters where there is a library for it."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"wte.weight": (64, 32), "wpe.weight": (16, 32), "ln_f.weight": (32,), "ln_f.bias": (32,)}
    shapes |= {f"h.{layer}.{name}": shape for layer in range(2) for name, shape in SHAPES.items()}
    weights = {f"transformer.{name}": 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights |= {name: 1 + tensor for name, tensor in weights.items() if "ln_" in name and name.endswith("weight")}
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GPT2))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def call(*arguments):
    return main([*map(str, arguments)])


def page(path):
    text = path.read_text()
    assert "<svg" in text and "<script" not in text and "http" not in text.replace("http://www.w3.org", "")
    assert "nan" not in text.split("<h1>")[1].lower()
    return text


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        call("shrink", "--help")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.count("erlangen shrink ") >= 3 and "Ctrl-C" in out and "from erlangen.interop import shrunk" in out


def test_shrink_writes_a_checkpoint_and_a_report(model, tmp_path, capsys):
    before, out = (model / "model.safetensors").read_bytes(), tmp_path / "out"
    assert call("shrink", model, tmp_path / "new", "--noise", "inf", "--out", out) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (model / "model.safetensors").read_bytes() == before
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    # keys and values of 4 heads of 8 in 2 layers: 2 · 2 · 4 · 64 numbers
    weights = sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
    assert weights == len(before_numbers(model)) - 1024
    assert f"{len(before_numbers(model)):,}" in said and f"{weights:,}" in said and "tiny (gpt2) is in" in said
    data = json.loads((out / "shrink.json").read_text())
    assert data["command"] == "erlangen shrink" and data["record"]["numbers"][1] == weights
    assert data["record"]["multiplications"] == [2 * 4 * 32 * 32, 2 * 4 * 32 * 32 - 1024]
    assert json.loads((tmp_path / "new" / "shrink.json").read_text()) == data["record"]
    text = page(out / "shrink.html")
    for word in ("What is saved", "Layer by layer", "VO block", "from erlangen.interop import shrunk"):
        assert word in text
    assert call("shrink", model, tmp_path / "second", "--out", out, "--no-check") == 0, "over what was there"
    assert "outputs were not compared" in capsys.readouterr().out


def before_numbers(folder):
    return torch.cat([tensor.flatten() for tensor in load_file(folder / "model.safetensors").values()])


def test_keep_with_a_text(model, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({letter: number for number, letter in enumerate("?abcdefgh ")}, unk_token="?")
    )
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?").save_pretrained(model)
    sample = tmp_path / "sample.txt"
    sample.write_text("a bad cab had a bag " * 40)
    out = tmp_path / "out"
    assert call("shrink", model, tmp_path / "new", "--keep", "0.9", "--text", sample, "--out", out) == 0
    said = " ".join(capsys.readouterr().out.split())
    record = json.loads((out / "shrink.json").read_text())["record"]
    assert f"{record['loss'][0]:.4f} nats a token" in said and record["loss"][0] != record["loss"][1]
    for sectors in record["layers"].values():
        for sector in sectors.values():
            assert max(sector["error"]) ** 2 <= 0.1 + 1e-9 and sum(sector["rank"]) < 32
    text = page(out / "shrink.html")
    assert "Spectra of values with outputs" in text and "of the size is dropped at most" in text


@pytest.mark.parametrize(("arguments", "message"), [
    (["--keep", "0"], "keep is a rank"),
    (["--keep", "1.5"], "keep is a rank"),
    (["--noise", "0.1"], "noise is a factor"),
    (["--text", "absent.txt"], "absent.txt"),
])  # fmt: skip
def test_bad_options(model, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert call("shrink", model, tmp_path / "new", *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("erlangen shrink: ") and message in said and said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"tiny"}


def test_nothing_is_overwritten(model, tmp_path, capsys):
    assert call("shrink", model, model, "--out", tmp_path / "out") == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    (tmp_path / "shrink.html").write_text("mine")
    assert call("shrink", model, tmp_path / "new", "--out", tmp_path) == 2
    assert "of something else" in capsys.readouterr().err and (tmp_path / "shrink.html").read_text() == "mine"
