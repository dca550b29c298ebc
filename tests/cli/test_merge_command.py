"""`erlangen merge` as a user meets it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from erlangen.cli import main

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'erlangen[report]'")

GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4,
    "n_positions": 16, "vocab_size": 12, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHAPES = {
    "attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 64), "mlp.c_proj": (64, 16),
}  # fmt: skip
WORDS = ("a", "rose", "is", "the", "cat", "sat", "on", "mat")
TEXT = "a rose is a rose is a rose the cat sat on the mat " * 8


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.3 * torch.randn(shape, generator=generator)

    found = {"transformer.wte.weight": draw(12, 16), "transformer.wpe.weight": draw(16, 16)}
    found["lm_head.weight"] = draw(12, 16)
    norms = ["transformer.ln_f", *(f"transformer.h.{layer}.ln_{number}" for layer in range(2) for number in (1, 2))]
    found |= {f"{norm}.weight": 1 + draw(16) for norm in norms} | {f"{norm}.bias": draw(16) for norm in norms}
    for layer in range(2):
        for name, shape in SHAPES.items():
            found[f"transformer.h.{layer}.{name}.weight"] = draw(*shape)
            found[f"transformer.h.{layer}.{name}.bias"] = draw(shape[1])
    return found


def tensors(share=0.0):
    """Numbers of which a share are of another seed."""
    second = drawn(1)
    return {name: torch.lerp(tensor, second[name], share) for name, tensor in drawn(0).items()}


def moved(weights):
    """The same function: heads 0 and 2 exchanged, values of head 1 turned and stretched, neurons reversed."""
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    place = torch.arange(16).view(4, 4)[[2, 1, 0, 3]].flatten()
    layer = "transformer.h.0."
    fused, bias, output = (
        weights[layer + f"attn.{name}"] for name in ("c_attn.weight", "c_attn.bias", "c_proj.weight")
    )
    columns = torch.cat([16 * part + place for part in range(3)])
    weights[layer + "attn.c_attn.weight"], weights[layer + "attn.c_attn.bias"] = fused[:, columns], bias[columns]
    weights[layer + "attn.c_proj.weight"] = output[place].clone()
    turn = 2 * torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q
    for name in ("c_attn.weight", "c_attn.bias"):
        tensor = weights[layer + f"attn.{name}"]
        tensor[..., 36:40] = tensor[..., 36:40] @ turn
    weights[layer + "attn.c_proj.weight"][4:8] = turn.T / 4 @ weights[layer + "attn.c_proj.weight"][4:8]
    for name in ("c_fc.weight", "c_fc.bias"):
        weights[layer + f"mlp.{name}"] = weights[layer + f"mlp.{name}"].flip(-1)
    weights[layer + "mlp.c_proj.weight"] = weights[layer + "mlp.c_proj.weight"].flip(0)
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def folder(path, weights=None, tokenizer=True, **fields):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**GPT2, **fields}))
    save_file(tensors() if weights is None else weights, path / "model.safetensors", {"format": "pt"})
    if tokenizer:
        model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "a"}
        values = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
        empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
        (path / "tokenizer.json").write_text(json.dumps(values | empty))
        (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


def call(*arguments):
    return main([*map(str, arguments)])


def page(path):
    text = path.read_text()
    assert "<svg" in text and "<script" not in text and "http" not in text.replace("http://www.w3.org", "")
    assert "nan" not in text.split("<h1>")[1].lower()
    return text


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        call("merge", "--help")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.count("erlangen merge ") >= 3 and "Ctrl-C" in out and "--weight" in out and "permutation" in out
    assert call("--help") == 0 and "  merge  " in capsys.readouterr().out


def test_a_moved_copy_merges_into_the_model_itself(tmp_path, capsys):
    pytest.importorskip("transformers")
    base, other = folder(tmp_path / "base"), folder(tmp_path / "other", moved(tensors()))
    before = [(path / "model.safetensors").read_bytes() for path in (base, other)]
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out"
    options = ("--text", tmp_path / "text.txt", "--points", 3, "--out", out)
    assert call("merge", base, other, tmp_path / "merged", *options) == 0
    assert [(path / "model.safetensors").read_bytes() for path in (base, other)] == before
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of 8 heads and 64 hidden neurons of other stand at another place now" in said
    assert f"the report: {out / 'merge.html'}" in said and "rise over the line" in said
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in tensors().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-5)
    data = json.loads((out / "merge.json").read_text())
    record = data["record"]
    assert data["command"] == "erlangen merge" and data["config"]["weight"] == 0.5
    assert record["heads"] == [[2, 1, 0, 3], [0, 1, 2, 3]] and record["neurons_moved"] == [64, 0]
    assert record == json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert record["distance_after"] < 1e-5 < 0.1 < record["distance_before"]
    assert record["output_difference"] < 1e-5 * record["output_scale"]
    losses = record["path"]["losses"]
    assert max(losses["gauge"]) - min(losses["gauge"]) < 1e-5 < abs(losses["none"][1] - losses["none"][0])
    assert record["barriers"]["gauge"] == pytest.approx(0, abs=1e-5)
    text = page(out / "merge.html")
    for word in ("The way between", "What was matched", "head of the second model", "rise over the line", "The files"):
        assert word in text
    assert call("merge", base, other, tmp_path / "again", "--no-check", "--out", out) == 0, "over what was there"
    assert "were not compared" in capsys.readouterr().out
    assert "The way between" not in page(out / "merge.html")


@pytest.mark.parametrize("using", ["none", "permutation", "orthogonal", "gauge"])
@pytest.mark.parametrize("weight", [0, 0.25, 1])
def test_ways_and_weights(using, weight, tmp_path, capsys):
    base, other = folder(tmp_path / "base"), folder(tmp_path / "other", moved(tensors(0.2)))
    arguments = ("--using", using, "--weight", weight, "--no-check", "--out", tmp_path / "out")
    assert call("merge", base, other, tmp_path / "new", *arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert ("new has other (gpt2)" if weight == 1 else "the average of base and other (gpt2)") in said
    page(tmp_path / "out" / "merge.html")
    new = load_file(tmp_path / "new" / "model.safetensors")
    if weight == 0:
        assert all(torch.equal(new[name], tensor) for name, tensor in tensors().items())
    if using == "none":
        second = moved(tensors(0.2))
        for name, tensor in tensors().items():
            torch.testing.assert_close(new[name], torch.lerp(tensor, second[name], weight))
    assert (tmp_path / "new" / "gauge.safetensors").exists() == (weight == 1)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("base", "nowhere", "new"), "does not exist"),
        (("nowhere", "base", "new"), "does not exist"),
        (("base", "other", "base"), "exists"),
        (("base", "other", "other/inside"), "lies in"),
        (("base", "deep", "new"), "number of layers"),
        (("base", "unknown", "new"), "mamba"),
        (("base", "broken", "new", "--no-check"), "not finite"),
        (("base", "other", "new", "--weight", "1.5"), "0"),
        (("base", "tongue", "new"), "'rose'"),
        (("base", "other", "new", "--text", "nowhere.txt"), "nowhere.txt"),
        (("base", "other", "new", "--text", "base"), "is a folder"),
        (("base", "other", "new", "--text", "bytes.txt"), "not text in UTF-8"),
        (("base", "other", "new", "--text", "short.txt"), "2 tokens"),
        (("base", "other", "new", "--text", "text.txt", "--points", "1"), "2 points"),
        (("base", "other", "new", "--out", "text.txt"), "is a file: choose a folder"),
        (("base", "other", "new", "--out", "foreign"), "of something else"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, words, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "base")
    folder(tmp_path / "other", tensors(0.2))
    weights = tensors()
    folder(tmp_path / "deep", {name: tensor for name, tensor in weights.items() if ".h.1" not in name}, n_layer=1)
    weights["transformer.h.1.mlp.c_fc.weight"][0, 0] = torch.inf
    folder(tmp_path / "broken", weights)
    folder(tmp_path / "unknown", model_type="mamba")
    tongue = folder(tmp_path / "tongue") / "tokenizer.json"
    tongue.write_text(tongue.read_text().replace('"rose"', '"Rose"'))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "short.txt").write_text("rose")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "merge.json").write_text("{}")
    there = sorted(tmp_path.rglob("*"))
    assert call("merge", *arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not captured.out.strip()
    assert sorted(tmp_path.rglob("*")) == there, "nothing was written"


def test_ctrl_c_leaves_nothing(tmp_path, capsys, monkeypatch):
    base, other = folder(tmp_path / "base"), folder(tmp_path / "other", tensors(0.2))
    there = sorted(tmp_path.rglob("*"))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("erlangen.interop.merging.merge_weights", interrupted)
    assert call("merge", base, other, tmp_path / "new", "--no-check", "--out", tmp_path / "out") == 130
    assert "stopped" in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == there
