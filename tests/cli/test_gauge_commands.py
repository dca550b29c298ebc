"""`erlangen audit`, `canonicalize` and `compare` as a user meets them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from erlangen.cli import main

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'erlangen[report]'")

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": 32,
    "max_position_embeddings": 32, "tie_word_embeddings": False, "hidden_act": "silu", "head_dim": 4,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "float32", "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
}  # fmt: skip
REDUNDANT = {
    "query_key": 2 * 2 * 4, "value_output": 2 * 2 * 16, "mlp_scales": 2 * 24, "norm_gains": 5 * 16,
    "residual": 16 * 15 // 2, "residual_scale": 1, "logit_shift": 16,
}  # fmt: skip


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.3 * torch.randn(shape, generator=generator)

    result = {"model.embed_tokens.weight": draw(32, 16), "lm_head.weight": draw(32, 16)}
    result["model.norm.weight"] = 1 + draw(16)
    for layer in range(2):
        result |= {f"model.layers.{layer}.{name}.weight": draw(*shape) for name, shape in SHAPES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            result[f"model.layers.{layer}.{norm}.weight"] = 1 + draw(16)
    return result


def folder(path, weights=None, **fields):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**LLAMA, **fields}))
    save_file(tensors() if weights is None else weights, path / "model.safetensors", {"format": "pt"})
    return path


def moved(weights):
    """The same function: a gain folded, values turned, a plane of queries and keys stretched, a neuron negated."""
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    layer = "model.layers.0."
    gain = weights[layer + "input_layernorm.weight"].clone()
    for part in ("q", "k", "v"):
        weights[f"{layer}self_attn.{part}_proj.weight"] *= gain
    weights[layer + "input_layernorm.weight"].fill_(1.0)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1))).Q * 3
    values, output = weights[layer + "self_attn.v_proj.weight"], weights[layer + "self_attn.o_proj.weight"]
    values[:4] = turn @ values[:4]
    for head in (0, 1):
        place = slice(4 * head, 4 * head + 4)
        output[:, place] = output[:, place] @ torch.linalg.inv(turn)
    weights[layer + "self_attn.k_proj.weight"][[0, 2]] *= 5
    for head in (0, 1):
        weights[layer + "self_attn.q_proj.weight"][[4 * head, 4 * head + 2]] /= 5
    weights[layer + "mlp.up_proj.weight"][3] *= -2
    weights[layer + "mlp.down_proj.weight"][:, 3] /= -2
    return weights


def call(*arguments):
    return main([*map(str, arguments)])


def page(path):
    text = path.read_text()
    assert "<svg" in text and "<script" not in text and "http" not in text.replace("http://www.w3.org", "")
    assert "nan" not in text.split("<h1>")[1].lower().replace("unannounced", "")
    return text


@pytest.mark.parametrize("command", ["audit", "canonicalize", "compare"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(command, "--help")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.count(f"erlangen {command} ") >= 3 and "Ctrl-C" in out


# --- audit ------------------------------------------------------------------------------------------------------------


def test_audit_of_a_folder(tmp_path, capsys):
    path, out = folder(tmp_path / "llama"), tmp_path / "out"
    assert call("audit", path, "--out", out) == 0
    said = capsys.readouterr().out
    total, parameters = sum(REDUNDANT.values()), sum(tensor.numel() for tensor in tensors().values())
    assert f"{total} of {parameters:,} dimensions" in said and f"the report: {out / 'audit.html'}" in said
    data = json.loads((out / "audit.json").read_text())
    assert {name: count for name, count in data["sectors"].items() if count} == REDUNDANT
    assert data["command"] == "erlangen audit" and data["dtype"] == "float32"
    # Spectra, by the products themselves.
    weights = {name: tensor.double() for name, tensor in tensors().items()}
    layer = "model.layers.1."
    read = weights[layer + "self_attn.v_proj.weight"] * weights[layer + "input_layernorm.weight"]
    output = weights[layer + "self_attn.o_proj.weight"]
    scale = weights["model.embed_tokens.weight"].square().mean().sqrt()
    for group in (0, 1):
        values = read[4 * group : 4 * group + 4]
        heads = [output[:, 4 * head : 4 * head + 4] @ values for head in (2 * group, 2 * group + 1)]
        expected = torch.linalg.svdvals(torch.cat(heads))[:4]
        found = torch.tensor(data["layers"][1]["value_output"][group], dtype=torch.float64)
        torch.testing.assert_close(found * scale, expected)
        squares = values.square().sum() + output[:, 8 * group : 8 * group + 8].square().sum()
        imbalance = data["layers"][1]["value_output_imbalance"][group]
        assert imbalance == pytest.approx(float(squares / 2 / expected.sum()))
    text = page(out / "audit.html")
    for word in ("What is redundant", "Spectra", "rotations of the residual stream", "No head is of deficient rank"):
        assert word in text
    assert call("audit", path, "--out", out) == 0, "over what was there"


def test_audit_sees_deficient_heads_and_bad_gauges(tmp_path, capsys):
    weights = tensors()
    weights["model.layers.0.self_attn.v_proj.weight"][1] = weights["model.layers.0.self_attn.v_proj.weight"][0]
    weights["model.layers.1.self_attn.k_proj.weight"] *= 100
    path, out = folder(tmp_path / "llama", weights), tmp_path / "out"
    assert call("audit", path, "--out", out) == 0
    assert "1 of 4 key/value heads are of deficient rank" in " ".join(capsys.readouterr().out.split())
    layers = json.loads((out / "audit.json").read_text())["layers"]
    assert layers[0]["rank_value_output"] == [3, 4] and layers[1]["rank_value_output"] == [4, 4]
    assert max(layers[0]["query_key_imbalance"]) < 2 < 20 < min(layers[1]["query_key_imbalance"])


def test_audit_of_a_config_alone(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    assert call("audit", path, "--out", tmp_path / "out") == 0
    assert "There are no weights here" in capsys.readouterr().out
    data = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert data["total"] == sum(REDUNDANT.values()) and data["layers"] == []
    assert call("audit", tmp_path, "--out", tmp_path / "out") == 0, "the folder that it lies in"


# --- compare ----------------------------------------------------------------------------------------------------------


def test_compare_knows_a_moved_checkpoint(tmp_path, capsys):
    base, other, out = folder(tmp_path / "base"), folder(tmp_path / "other", moved(tensors())), tmp_path / "out"
    assert call("compare", base, other, "--out", out) == 0
    said = capsys.readouterr().out
    assert "base and other: the two models are the same function, up to rounding." in said
    data = json.loads((out / "compare.json").read_text())
    assert data["same_function"] and data["distance"] < 1e-6 and data["naive_distance"] > 0.1
    text = page(out / "compare.html")
    for word in ("Layer by layer", "head of the second", "same function", "Spectra"):
        assert word in text
    changed = moved(tensors())
    changed["model.layers.1.mlp.down_proj.weight"] += 0.01
    assert call("compare", base, folder(tmp_path / "third", changed), "--out", out) == 0
    assert "related, and not the same function" in capsys.readouterr().out
    layers = json.loads((out / "compare.json").read_text())["layers"]
    assert layers[0]["distance"] < 1e-6 < 1e-3 < layers[1]["mlp"]["distance"]
    assert layers[1]["query_key"]["distance"] < 1e-6


def test_runs_of_our_own(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a rose is a rose is a rose.\n" * 400)
    run = tmp_path / "run"
    options = ("--model.context-length", "16", "--model.num-layers", "1", "--model.dim", "32", "--steps", "2")
    assert call("train", "--data.corpus", text, *options, "--out", run) == 0
    assert call("compare", run, run, "--out", tmp_path / "out") == 0
    assert "same function" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["distance"] < 1e-12
    assert call("audit", run, "--out", tmp_path / "out") == 0
    assert "(erlangen)" in capsys.readouterr().out


# --- canonicalize -----------------------------------------------------------------------------------------------------


def test_canonicalize_writes_a_checkpoint_and_a_report(tmp_path, capsys):
    base, other = folder(tmp_path / "base"), folder(tmp_path / "other", moved(tensors()))
    before = (base / "model.safetensors").read_bytes()
    results = []
    for path in (base, other):
        new = path.with_name(path.name + "-canonical")
        assert call("canonicalize", path, new, "--out", tmp_path / f"report-{path.name}") == 0
        assert "is in canonical form" in capsys.readouterr().out
        results.append(load_file(new / "model.safetensors"))
    assert (base / "model.safetensors").read_bytes() == before
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=2e-5, atol=2e-5)
    text = page(tmp_path / "report-base" / "canonicalize.html")
    assert "What was done" in text and "Spectra of values with outputs" in text
    data = json.loads((tmp_path / "report-base" / "canonicalize.json").read_text())
    assert data["command"] == "erlangen canonicalize" and data["certificate"]["kind"] == "llama"
    if data["certificate"]["max_logit_difference"]:  # transformers is there
        assert data["certificate"]["max_logit_difference"]["float64"] < 1e-5
        assert "Nothing changed" in text
    out = tmp_path / "out"
    assert call("compare", base, tmp_path / "other-canonical", "--out", out) == 0
    assert "the same function" in capsys.readouterr().out
    assert call("audit", tmp_path / "base-canonical", "--out", out) == 0
    assert "1 times the squares of the balanced gauge (median), 1 times in the worst head" in " ".join(
        capsys.readouterr().out.split()
    )
    assert (
        call("canonicalize", base, tmp_path / "frame", "--residual", "--order", "kept", "--no-check", "--out", out) == 0
    )
    assert "were not compared" in capsys.readouterr().out
    assert call("compare", base, tmp_path / "frame", "--out", out) == 0
    assert "was turned into the frame" in capsys.readouterr().out


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("audit", "nowhere"), "does not exist"),
        (("audit", "text.json"), "is not JSON"),
        (("audit", "unknown"), "mamba"),
        (("audit", "base", "--out", "text.json"), "is a file: choose a folder"),
        (("audit", "base", "--out", "foreign"), "of something else"),
        (("compare", "base", "nowhere"), "does not exist"),
        (("compare", "base", "wide"), "number of layers 2"),
        (("compare", "base", "broken"), "not finite"),
        (("canonicalize", "base", "wide"), "exists"),
        (("canonicalize", "base", "base/inside"), "lies in"),
        (("canonicalize", "base", "new", "--untie"), "untie"),
        (("canonicalize", "nowhere", "new"), "does not exist"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "base")
    weights = tensors()
    one_layer = {name: tensor for name, tensor in weights.items() if "layers.1" not in name}
    folder(tmp_path / "wide", one_layer, num_hidden_layers=1)
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.inf
    folder(tmp_path / "broken", weights)
    folder(tmp_path / "unknown", model_type="mamba")
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "audit.json").write_text("{}")
    there = sorted(tmp_path.rglob("*"))
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not captured.out.strip()
    assert sorted(tmp_path.rglob("*")) == there, "nothing was written"


def test_ctrl_c_leaves_nothing(tmp_path, capsys, monkeypatch):
    path = folder(tmp_path / "base")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("erlangen.cli.compare.compare", interrupted)
    assert call("compare", path, path, "--out", tmp_path / "out") == 130
    assert "stopped" in capsys.readouterr().err and not (tmp_path / "out").exists()
