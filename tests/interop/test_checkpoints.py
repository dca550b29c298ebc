"""Checkpoint folders: what is read, what is refused, and that a rewritten folder is whole or not there."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from checkpoint_cases import BERT, GPT2, LLAMA, digest, random_tensors, write
from safetensors.torch import load_file, save_file

from erlangen.interop import checkpoints, layout_of_config
from erlangen.interop.checkpoints import INDEX, SINGLE, Checkpoint, rewriting


def load(folder):
    return {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 4])
def test_tensors_are_listed_and_read(tmp_path, num_shards):
    tensors = random_tensors(LLAMA, torch.bfloat16)
    checkpoint = Checkpoint(write(tmp_path / "in", LLAMA, tensors, num_shards))
    assert sorted(checkpoint.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert name in checkpoint and checkpoint.shape(name) == tensor.shape and checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint[name], tensor)
        assert checkpoint.num_bytes(name) == 2 * tensor.numel()
    assert "lm_head.bias" not in checkpoint
    with pytest.raises(KeyError, match="no tensor lm_head"):
        checkpoint["lm_head.bias"]
    assert torch.equal(checkpoint.rows("lm_head.weight", 3, 7), tensors["lm_head.weight"][3:7])
    assert checkpoint.layout.kind == "llama" and "llama" in repr(checkpoint)


def test_what_is_read_is_ones_own(tmp_path):
    checkpoint = Checkpoint(write(tmp_path / "in", LLAMA))
    before = digest(checkpoint.folder)
    checkpoint["model.norm.weight"].zero_()
    assert checkpoint["model.norm.weight"].any() and digest(checkpoint.folder) == before


def test_names_without_the_prefix_and_buffers_of_old_checkpoints(tmp_path):
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in random_tensors(GPT2).items()}
    buffers = {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    checkpoint = Checkpoint(write(tmp_path / "in", GPT2, tensors | buffers))
    assert checkpoint.layout.token_embedding == "wte.weight"
    with rewriting(checkpoint, tmp_path / "out"):
        pass
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / "in" / SINGLE).read_bytes()


def test_names_of_old_layer_norms(tmp_path):
    def old(name):
        if "LayerNorm" not in name:
            return name
        return name.replace("weight", "gamma") if name.endswith("weight") else name.replace("bias", "beta")

    tensors = random_tensors(BERT)
    checkpoint = Checkpoint(write(tmp_path / "in", BERT, {old(name): tensor for name, tensor in tensors.items()}))
    name = "encoder.layer.1.output.LayerNorm.weight"
    assert torch.equal(checkpoint[name], tensors[name])
    with rewriting(checkpoint, tmp_path / "out") as weights:
        weights[name] = 2 * weights[name]
        assert torch.equal(weights[name], 2 * tensors[name])
    stored = load(tmp_path / "out")
    assert torch.equal(stored[old(name)], 2 * tensors[name]) and name not in stored


# --- what is refused --------------------------------------------------------------------------------------------------


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(folder, change):
    tensors = load(folder)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "an adapter": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "merge it"),
    "a config that is not JSON": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "an unknown architecture": (lambda f: edit_config(f, model_type="mamba"), "mamba"),
    "a quantised config": (lambda f: edit_config(f, quantization_config={"bits": 4}), "quantization_config"),
    "heads that contradict": (lambda f: edit_config(f, num_key_value_heads=3), "num_key_value_heads"),
    "no weights": (lambda f: (f / SINGLE).unlink(), "no model.safetensors"),
    "pickled weights": (lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"), r"pytorch_model\.bin.*unpickling"),
    "weights cut off": (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-100]), "cut off"),
    "foreign weights": (lambda f: (f / SINGLE).write_bytes(b"PK" + bytes(1000)), "not in the format"),
    "a missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        r"model\.layers\.1\.mlp\.up_proj\.weight is missing",
    ),
    "a layer more than the config": (lambda f: edit_config(f, num_hidden_layers=1), r"layers\.1.* not known"),
    "a layer less than the config": (lambda f: edit_config(f, num_hidden_layers=3), r"layers\.2.* and 6 more are miss"),
    "a bias that is not known": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)})),
        r"q_proj\.bias",
    ),
    "a classifier on logits": (
        lambda f: edit_tensors(f, lambda t: t.update({"score.weight": torch.zeros(2, 16)})),
        r"score\.weight",
    ),
    "another width": (
        lambda f: edit_config(f, hidden_size=32),
        r"embed_tokens\.weight must have shape \[32, 32\], received \[32, 16\]",
    ),
    "a projection of another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(16, 16)})),
        r"k_proj\.weight must have shape \[8, 16\], received \[16, 16\]",
    ),
    "8-bit integers": (
        lambda f: edit_tensors(
            f, lambda t: t.update({"lm_head.weight": torch.zeros(32, 16, dtype=torch.int8)})
        ),
        r"quantised weights \(lm_head\.weight; I8\).*dequantise",
    ),
    "8-bit floats": (
        lambda f: edit_tensors(f, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)})),
        r"quantised weights \(lm_head\.weight; F8_E4M3\)",
    ),
    "packed integers": (
        lambda f: edit_tensors(
            f, lambda t: rename(t, "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.qweight")
        ),
        r"quantised weights \(model\.layers\.0\.mlp\.up_proj\.qweight",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_checkpoint_is_refused(damage, words, tmp_path):
    folder = write(tmp_path / "in", LLAMA)
    damage(folder)
    before = digest(folder)
    with pytest.raises(ValueError, match=words):
        checkpoints.canonicalize_folder(folder, tmp_path / "out", check=False)
    assert digest(folder) == before and not (tmp_path / "out").exists()


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


SHARDS_BROKEN = {
    "a missing shard": (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), r"model-00002-of-00003.*missing"),
    "an index without a map": (lambda f: (f / INDEX).write_text("{}"), "weight_map"),
    "an empty index": (lambda f: edit_index(f, dict.clear), "must name files"),
    "an index that leads elsewhere": (
        lambda f: edit_index(f, lambda m: m.update({"lm_head.weight": "../other.safetensors"})), "beside it"
    ),
    "an absent tensor": (
        lambda f: edit_index(f, lambda m: m.update({"more": "model-00001-of-00003.safetensors"})), "does not hold more"
    ),
    "a tensor that is not in the index": (
        lambda f: edit_index(f, lambda m: m.pop("lm_head.weight")), "also holds lm_head"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), SHARDS_BROKEN.values(), ids=SHARDS_BROKEN)
def test_shards_that_disagree_are_refused(damage, words, tmp_path):
    folder = write(tmp_path / "in", LLAMA, num_shards=3)
    damage(folder)
    with pytest.raises(ValueError, match=words):
        Checkpoint(folder)


def test_paths_that_are_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Checkpoint(tmp_path / "nowhere")
    folder = write(tmp_path / "in", LLAMA)
    with pytest.raises(ValueError, match="is a file"):
        Checkpoint(folder / SINGLE)


def test_a_second_copy_of_a_tied_embedding_is_kept_equal(tmp_path):
    config = LLAMA | {"tie_word_embeddings": True}
    tensors = random_tensors(config)
    table = tensors["model.embed_tokens.weight"]
    folder = write(tmp_path / "in", config, tensors | {"lm_head.weight": table.clone()})
    with rewriting(Checkpoint(folder), tmp_path / "out") as weights:
        weights["model.embed_tokens.weight"] = 2 * table
    found = load(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], 2 * table)
    assert torch.equal(found["model.embed_tokens.weight"], 2 * table)
    # a tensor of its own from now on, if that is asked for
    with rewriting(
        Checkpoint(folder), tmp_path / "own", added={"lm_head.weight": "model.embed_tokens.weight"}
    ) as weights:
        weights["model.embed_tokens.weight"] = 2 * table
    assert torch.equal(load(tmp_path / "own")["lm_head.weight"], table)
    write(tmp_path / "differs", config, tensors | {"lm_head.weight": table + 1})
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        Checkpoint(tmp_path / "differs")


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 4])
def test_only_what_was_written_changes(tmp_path, num_shards):
    folder = write(tmp_path / "in", LLAMA, random_tensors(LLAMA, torch.float16), num_shards)
    checkpoint, before = Checkpoint(folder), digest(folder)
    name = "model.layers.1.self_attn.q_proj.weight"
    with rewriting(checkpoint, tmp_path / "new" / "out") as weights:
        new = torch.linspace(-1, 1, weights.shape(name).numel(), dtype=torch.float64).view(weights.shape(name))
        weights[name] = new
        assert torch.equal(weights[name], new.half()) and weights.dtype(name) == torch.float16
        assert torch.equal(checkpoint[name], load(folder)[name])
        assert not (tmp_path / "new" / "out").exists()
    out = tmp_path / "new" / "out"
    old, found = load(folder), load(out)
    assert old.keys() == found.keys()
    assert [other for other in old if not torch.equal(old[other], found[other])] == [name]
    assert torch.equal(found[name], new.half())
    changed = checkpoint._files[checkpoint._places[name][0]].path.name
    assert {file for file, value in digest(out).items() if before[file] != value} == {changed}
    assert digest(folder) == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_new_tensor(tmp_path, num_shards):
    config = LLAMA | {"tie_word_embeddings": True, "über": "π"}
    folder = write(tmp_path / "in", config, num_shards=num_shards)
    table = "model.embed_tokens.weight"
    added, untied = {"lm_head.weight": table}, {"tie_word_embeddings": False}
    with rewriting(Checkpoint(folder), tmp_path / "out", added=added, config=untied) as weights:
        assert "lm_head.weight" in weights and weights.shape("lm_head.weight") == (32, 16)
        assert torch.equal(weights["lm_head.weight"], weights[table])
        weights[table] = -weights[table]
    old, new = load(folder), Checkpoint(tmp_path / "out")
    assert torch.equal(new[table], -old[table]) and torch.equal(new["lm_head.weight"], old[table])
    assert new.config == config | untied and new.layout.unembedding is not None
    if num_shards > 1:
        sizes = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]
        assert sizes["total_parameters"] == sum(tensor.numel() for tensor in load(tmp_path / "out").values())
        assert sizes["total_size"] == 4 * sizes["total_parameters"]


def test_wrong_tensors_are_not_written(tmp_path):
    checkpoint = Checkpoint(write(tmp_path / "in", LLAMA, random_tensors(LLAMA, torch.float16)))
    for wrong, words in (
        (torch.zeros(17), "has shape"),
        (torch.full((16,), 1e5), "beyond the range of F16"),
        (torch.full((16,), float("nan")), "beyond the range"),
    ):
        with pytest.raises(ValueError, match=words), rewriting(checkpoint, tmp_path / "out") as weights:
            weights["model.norm.weight"] = wrong
    with pytest.raises(KeyError), rewriting(checkpoint, tmp_path / "out") as weights:
        weights["lm_head.bias"] = torch.zeros(32)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_other_files_are_carried_along_and_other_weights_left(tmp_path):
    folder = write(tmp_path / "in", LLAMA)
    carried = ["tokenizer.json", "README.md", ".gitattributes", "1_Pooling/config.json", "2_Dense/model.safetensors"]
    left = ["pytorch_model.bin", "onnx/model.onnx", "original/consolidated.00.pth", "optimizer.pt",
            "consolidated.safetensors", "pytorch_model.bin.index.json"]  # fmt: skip
    for name in (*carried, *left, ".git/HEAD"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    certificate = checkpoints.canonicalize_folder(folder, tmp_path / "out", check=False)
    out = digest(tmp_path / "out")
    assert out.keys() == {
        *carried, "config.json", "modules.json", SINGLE, checkpoints.RECORD, checkpoints.TRANSFORMS
    }  # fmt: skip
    assert all(out[name] == digest(folder)[name] for name in (*carried, "config.json", "modules.json"))
    assert any("consolidated.safetensors" in line and "and 3 more" in line for line in certificate.folded)
    # once more: what the first call added is made anew
    again = checkpoints.canonicalize_folder(tmp_path / "out", tmp_path / "again", check=False)
    assert digest(tmp_path / "again").keys() == out.keys()
    assert not any("gauge" in line for line in again.folded)


def test_nothing_is_overwritten(tmp_path):
    checkpoint = Checkpoint(write(tmp_path / "in", LLAMA))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "busy.writing").mkdir()
    before = digest(tmp_path)
    for name, words in (
        ("in", "exists"), ("file", "exists"), ("empty", "exists"), ("dangling", "exists"), ("busy", "another process"),
    ):  # fmt: skip
        with pytest.raises(FileExistsError, match=words), rewriting(checkpoint, tmp_path / name):
            pass
    with pytest.raises(ValueError, match="lies in"), rewriting(checkpoint, tmp_path / "in" / "out"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(ValueError, match="lies in"), rewriting(checkpoint, tmp_path / "link" / "deep" / "out"):
        pass
    (tmp_path / "link").unlink()
    assert digest(tmp_path) == before and (tmp_path / "busy.writing").is_dir()


def test_a_full_disk(tmp_path, monkeypatch):
    checkpoint = Checkpoint(write(tmp_path / "in", LLAMA))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        with pytest.raises(OSError, match="free some space"), rewriting(checkpoint, tmp_path / "out"):
            pass
    monkeypatch.setattr(checkpoints.files, "write", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.canonicalize_folder(tmp_path / "in", tmp_path / "out", check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_half_way_leaves_nothing(tmp_path, error):
    folder = write(tmp_path / "in", LLAMA, num_shards=3)
    before = digest(folder)

    def progress(done, total):
        assert done <= total == 2 and (tmp_path / "out.writing").is_dir()
        if done == 1:
            raise error

    with pytest.raises(error):
        checkpoints.canonicalize_folder(folder, tmp_path / "out", check=False, progress=progress)
    assert digest(folder) == before and [path.name for path in tmp_path.iterdir()] == ["in"]


def test_ctrl_c_leaves_nothing(tmp_path):
    folder = write(tmp_path / "in", LLAMA)
    before = digest(folder)
    code = (
        "import sys, time\n"
        "from erlangen.interop.checkpoints import Checkpoint, rewriting\n"
        "with rewriting(Checkpoint(sys.argv[1]), sys.argv[2]) as weights:\n"
        "    weights['model.norm.weight'] = 2 * weights['model.norm.weight']\n"
        "    print('half way', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder, tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "half way\n"
    assert (tmp_path / "out.writing").is_dir() and not (tmp_path / "out").exists()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert digest(folder) == before and [path.name for path in tmp_path.iterdir()] == ["in"]


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from erlangen.interop import checkpoints
def peak():  # resource.getrusage would count what the parent had
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
small, large, out, *rest = sys.argv[1:]
checkpoints.canonicalize_folder(small, out + "-small", check=bool(rest))
before = peak()
checkpoints.canonicalize_folder(large, out, check=bool(rest))
print(peak() - before)
"""
SHAPE = LLAMA | {"hidden_size": 1024, "num_attention_heads": 16, "head_dim": 64, "num_hidden_layers": 3}
# Tables as large as a layer; without grouped keys attention is a third of it, and in float64 larger than the layer.
LARGE = {
    "grouped keys": {"num_key_value_heads": 4, "intermediate_size": 3584, "vocab_size": 14000},
    "no grouped keys": {"num_key_value_heads": 16, "intermediate_size": 2816, "vocab_size": 12000},
}
WORKSPACE = 40e6  # pieces of matrices in float64, and what libraries take for themselves; it does not grow


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is measured and given back otherwise elsewhere"
)
@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_peak_memory_is_less_than_twice_the_largest_layer(name, check, tmp_path):
    if check:  # outputs are compared too
        pytest.importorskip("transformers")
    config = SHAPE | LARGE[name] | {"dtype": "bfloat16"}
    small = write(tmp_path / "small", LLAMA)
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
        for name, shape in layout_of_config(config).tensor_shapes().items()
    }
    large = write(tmp_path / "large", config, tensors, num_shards=2)
    size = {name: 2 * tensor.numel() for name, tensor in tensors.items()}
    layer = sum(value for name, value in size.items() if ".layers.0." in name)
    bound = 2 * max(layer, size["lm_head.weight"]) + WORKSPACE
    assert bound < sum(size.values())
    assert growth(small, large, tmp_path / "out", check) <= bound


def growth(small, large, out, check=False):
    """Bytes that memory grows by while a large folder is written, after a small one was."""
    command = [sys.executable, "-c", MEASURE, small, large, out, *(["check"] if check else [])]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured otherwise elsewhere")
def test_peak_memory_does_not_grow_with_the_depth(tmp_path):
    """Few wide heads: the factors of a layer are larger than the layer itself, those of all layers beyond the bound."""
    shape = {"hidden_size": 512, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 256}
    config = LLAMA | shape | {"intermediate_size": 64, "num_hidden_layers": 20, "dtype": "bfloat16"}
    small = write(tmp_path / "small", LLAMA)
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
        for name, shape in layout_of_config(config).tensor_shapes().items()
    }
    large = write(tmp_path / "large", config, tensors)
    layer = sum(2 * tensor.numel() for name, tensor in tensors.items() if ".layers.0." in name)
    bound = 2 * layer + WORKSPACE
    grown = growth(small, large, tmp_path / "out")
    factors = (tmp_path / "out" / checkpoints.TRANSFORMS).stat().st_size
    assert grown <= bound < factors / 1.5, (grown, bound, factors)
