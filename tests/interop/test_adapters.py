"""LoRA adapters in another gauge of their base: exact, and refused where they do not belong."""

import json
import shutil
from functools import cache

import pytest
import torch
from checkpoint_cases import GPT2, LLAMA, answer, digest, families, tokens, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erlangen import gauge
from erlangen.interop import _outputs
from erlangen.interop.adapters import CONFIG, WEIGHTS, carry_adapter
from erlangen.interop.checkpoints import RECORD, TRANSFORMS, Checkpoint, canonicalize_folder
from erlangen.interop.merging import merge_folders

RANK, ALPHA = 3, 5.0
PLAIN = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "init_lora_weights": True}
# modules of the first layer, and of the ends
MODULES = {
    "llama": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
              "mlp.up_proj", "mlp.down_proj", "lm_head", "embed_tokens"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "qwen3": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    "phi3": ["self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "gpt_neox": ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h"],
    "deepseek_v2": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
}  # fmt: skip


def is_transposed(name):
    return ".c_" in name


def write_adapter(folder, base, modules, dtype=torch.float64, seed=0, **config):
    """An adapter of every map of a checkpoint whose path ends like one of the modules."""
    generator, tensors = torch.Generator().manual_seed(seed), {}

    def draw(*shape):
        return (0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    for name in Checkpoint(base).names():
        path = name.removesuffix(".weight")
        if not name.endswith(".weight") or not path.endswith(tuple(modules)):
            continue
        out, into = Checkpoint(base).shape(name)[:: -1 if is_transposed(path) else 1]
        prefix = f"base_model.model.{path}"
        if "embed" in path:
            tensors[f"{prefix}.lora_embedding_A"], tensors[f"{prefix}.lora_embedding_B"] = (
                draw(RANK, out),
                draw(into, RANK),
            )
        else:
            tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = draw(RANK, into), draw(out, RANK)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({**PLAIN, "target_modules": modules, **config}))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def merged(base, adapter, output):
    """A checkpoint with an adapter added, by PEFT's own arithmetic: W + scale B A, b + scale (bias of B)."""
    config, new = json.loads((adapter / CONFIG).read_text()), load_file(adapter / WEIGHTS)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    shutil.copytree(base, output)
    tensors = load_file(base / "model.safetensors")
    for name, outputs in new.items():
        path, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
        if kind == "B.weight":
            change = outputs @ new[name.replace("lora_B", "lora_A")]
            tensors[f"{path}.weight"] += scale * (change.T if is_transposed(path) else change)
        elif kind == "embedding_B":
            tensors[f"{path}.weight"] += scale * (outputs @ new[name.replace("embedding_B", "embedding_A")]).T
        elif kind == "B.bias" and f"{path}.bias" in tensors:
            tensors[f"{path}.bias"] += scale * outputs
        elif kind == "B.bias":
            assert not outputs.any()
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return output


def outputs(folder):
    return _outputs.outputs(Checkpoint(folder), folder, tokens(), torch.float64)


@cache
def model_of(name):
    pytest.importorskip("transformers")
    return families()[name]()


def save_model(name, folder, dtype=torch.float64):
    model_of(name).to(dtype).save_pretrained(folder)
    return folder


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MODULES, "llama kept"])
def test_a_carried_adapter_is_the_same_change_of_the_same_function(name, tmp_path):
    options, name = {"residual": "kept" not in name}, name.removesuffix(" kept")
    base = save_model(name, tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, MODULES[name], use_rslora=name == "qwen3")
    certificate = canonicalize_folder(base, tmp_path / "moved", check=False, **options)
    before = digest(adapter)
    done = carry_adapter(adapter, tmp_path / "new", base=base, moved=tmp_path / "moved")
    assert digest(adapter) == before
    assert set(done.ranks.values()) == {RANK}
    old = outputs(base)
    expected = outputs(merged(base, adapter, tmp_path / "merged"))
    found = outputs(merged(tmp_path / "moved", tmp_path / "new", tmp_path / "new-merged"))
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()
    # as it was, it is of no use in the new gauge
    wrong = outputs(merged(tmp_path / "moved", adapter, tmp_path / "wrong"))
    assert (wrong - expected).abs().max() > 0.1 * (expected - old).abs().max() > 1e-3
    assert bool(done.biases) == (name in ("gpt2", "gpt_neox"))
    config = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert config.get("lora_bias", False) == bool(done.biases)
    assert config["base_model_name_or_path"] == str(tmp_path / "moved")
    assert config["target_modules"] == MODULES[name]
    assert f"{len(done.ranks)} maps of rank 3" in str(done)
    # factor by factor it is the merged change, carried
    old_factors, new_factors = load_file(adapter / WEIGHTS), load_file(tmp_path / "new" / WEIGHTS)
    for key in (key for key in old_factors if key.endswith("lora_B.weight")):
        path = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        change, new = (part[key] @ part[key.replace("lora_B", "lora_A")] for part in (old_factors, new_factors))
        change, new = (change.T, new.T) if is_transposed(path) else (change, new)
        assert torch.allclose(certificate.apply_to(path, change), new, rtol=1e-10, atol=1e-12)


def test_stored_in_their_own_precision(tmp_path):
    base = write(tmp_path / "base", LLAMA)
    canonicalize_folder(base, tmp_path / "moved", check=False)
    adapter = write_adapter(tmp_path / "adapter", base, ["q_proj", "down_proj"], torch.bfloat16)
    carry_adapter(adapter, tmp_path / "new", base=base, moved=tmp_path / "moved")
    exact = write_adapter(tmp_path / "exact", base, ["q_proj", "down_proj"])
    tensors = {name: tensor.double() for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, exact / WEIGHTS, {"format": "pt"})
    carry_adapter(exact, tmp_path / "new-exact", base=base, moved=tmp_path / "moved")
    expected = load_file(tmp_path / "new-exact" / WEIGHTS)
    for name, tensor in load_file(tmp_path / "new" / WEIGHTS).items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[name].bfloat16())


def test_biases_of_adapters_go_along(tmp_path):
    base = save_model("gpt2", tmp_path / "base")
    canonicalize_folder(base, tmp_path / "moved", check=False)
    adapter = write_adapter(tmp_path / "adapter", base, MODULES["gpt2"], lora_bias=True)
    tensors = load_file(adapter / WEIGHTS)
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        tensors[name.replace("weight", "bias")] = torch.linspace(-1, 1, tensors[name].shape[0], dtype=torch.float64)
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    carry_adapter(adapter, tmp_path / "new", base=base, moved=tmp_path / "moved")
    expected = outputs(merged(base, adapter, tmp_path / "merged"))
    found = outputs(merged(tmp_path / "moved", tmp_path / "new", tmp_path / "new-merged"))
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


def test_untied_on_the_way(tmp_path):
    base = save_model("llama tied", tmp_path / "base")
    canonicalize_folder(base, tmp_path / "moved", check=False, untie=True, residual=True)
    adapter = write_adapter(tmp_path / "adapter", base, ["embed_tokens", "v_proj"])
    carry_adapter(adapter, tmp_path / "new", base=base, moved=tmp_path / "moved")
    # PEFT changes a tied embedding where it is read, and not the logits: so does the untied model.
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    expected = outputs(merged(base, adapter, tmp_path / "merged"))
    found = outputs(merged(tmp_path / "moved", tmp_path / "new", tmp_path / "new-merged"))
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


def test_a_base_that_is_stored_without_its_head(tmp_path):
    """GPT-2 is published so: its adapters name ``transformer.h.0``, and the folder ``h.0``."""
    base = save_model("gpt2 base", tmp_path / "base")
    canonicalize_folder(base, tmp_path / "moved", check=False)
    adapter = write_adapter(tmp_path / "adapter", base, MODULES["gpt2"])
    carry_adapter(adapter, tmp_path / "one", base=base, moved=tmp_path / "moved")
    tensors, inside = load_file(adapter / WEIGHTS), "base_model.model.transformer."
    save_file({key.replace("base_model.model.", inside): v for key, v in tensors.items()}, adapter / WEIGHTS)
    carry_adapter(adapter, tmp_path / "two", base=base, moved=tmp_path / "moved")
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    assert {key.replace("base_model.model.", inside) for key in one} == two.keys()
    assert all(torch.equal(value, two[key.replace("base_model.model.", inside)]) for key, value in one.items())


def test_other_files_and_copies_of_the_base(tmp_path):
    base = write(tmp_path / "base", LLAMA)
    canonicalize_folder(base, tmp_path / "moved", check=False)
    adapter = write_adapter(tmp_path / "adapter", base, ["embed_tokens"])
    (adapter / "README.md").write_text("what it is for")
    (adapter / "optimizer.pt").write_text("moments of the old gauge")
    # PEFT stores the table that an adapter of an embedding changes beside it
    tensors, name = load_file(adapter / WEIGHTS), "base_model.model.model.embed_tokens.base_layer.weight"
    tensors[name] = Checkpoint(base)["model.embed_tokens.weight"]
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    done = carry_adapter(adapter, tmp_path / "new", base=base, moved=tmp_path / "moved")
    assert done.dropped == (name,) and name not in load_file(tmp_path / "new" / WEIGHTS)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    tensors[name] = tensors[name] + 1
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="was trained or resized"):
        carry_adapter(adapter, tmp_path / "other", base=base, moved=tmp_path / "moved")


# PEFT 0.21 asks transformers by an older name, and takes the bias of an adapter for a shard of a matrix.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore:.*have invalid shape.*")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_peft_agrees(tmp_path):
    """PEFT itself makes an adapter, and loads the carried one onto the moved base."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    for name, modules in (
        ("gpt2", MODULES["gpt2"]),
        ("llama", MODULES["llama"]),
        ("gpt_neox", MODULES["gpt_neox"]),
    ):
        root = tmp_path / name
        base = save_model(name, root / "base", torch.float32)

        def load(folder):
            return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = peft.LoraConfig(
                r=3, target_modules=modules, fan_in_fan_out=name == "gpt2", init_lora_weights=False
            )
            model = peft.get_peft_model(load(base), config).eval()
        expected, plain = answer(model, tokens()), answer(load(base), tokens())
        model.save_pretrained(root / "adapter")
        canonicalize_folder(base, root / "moved", check=False, residual=True)
        done = carry_adapter(root / "adapter", root / "new", base=base, moved=root / "moved")
        # the tables that PEFT stores whole would put the old gauge back
        assert len(done.dropped) == (2 if name == "llama" else 0)
        found = peft.PeftModel.from_pretrained(load(root / "moved"), root / "new").eval()
        size = (expected - plain).abs().max()
        assert (answer(found, tokens()) - expected).abs().max() < 1e-4 * size
        wrong = peft.PeftModel.from_pretrained(load(root / "moved"), root / "adapter").eval()
        assert (answer(wrong, tokens()) - expected).abs().max() > 0.1 * size
        # and what PEFT saves again says itself where it belongs
        found.save_pretrained(root / "resaved")
        with pytest.raises(ValueError, match="whose weights are not those of"):
            carry_adapter(root / "resaved", root / "twice", base=base, moved=root / "moved")


# --- certificates of other kinds --------------------------------------------------------------------------------------


def test_a_certificate_in_memory_will_do(tmp_path):
    base = save_model("llama", tmp_path / "base")
    model = type(model_of("llama")).from_pretrained(base, dtype=torch.float64)
    certificate = gauge.canonicalize(model, check=False)
    canonicalize_folder(base, tmp_path / "moved", check=False)
    adapter = write_adapter(tmp_path / "adapter", base, ["q_proj", "o_proj"])
    carry_adapter(adapter, tmp_path / "one", base=base, moved=certificate)
    carry_adapter(adapter, tmp_path / "two", base=base, moved=tmp_path / "moved")
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_into_the_gauge_of_another_model(name, tmp_path):
    """An adapter of b, and b aligned with a: the merge of weight 1."""
    b = save_model(name, tmp_path / "b")
    a = write(tmp_path / "a", json.loads((b / "config.json").read_text()), other_numbers(b))
    merge_folders(a, b, tmp_path / "aligned", 1.0, check=False)
    adapter = write_adapter(tmp_path / "adapter", b, MODULES[name])
    carry_adapter(adapter, tmp_path / "new", base=b, moved=tmp_path / "aligned")
    expected = outputs(merged(b, adapter, tmp_path / "merged"))
    found = outputs(merged(tmp_path / "aligned", tmp_path / "new", tmp_path / "new-merged"))
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
    assert (outputs(merged(tmp_path / "aligned", adapter, tmp_path / "wrong")) - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="made from other weights"):
        carry_adapter(adapter, tmp_path / "other", base=a, moved=tmp_path / "aligned")


def other_numbers(folder):
    generator, tensors = torch.Generator().manual_seed(7), load_file(folder / "model.safetensors")
    return {k: v + 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in tensors.items()}


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, its canonical form, and an adapter of it."""
    root = tmp_path_factory.mktemp("adapters")
    base = write(root / "base", LLAMA)
    canonicalize_folder(base, root / "moved", check=False)
    write_adapter(root / "adapter", base, ["q_proj", "o_proj"])
    return root


def changed(folders, tmp_path, tensors=None, **config):
    """The adapter with other settings and tensors."""
    folder = shutil.copytree(folders / "adapter", tmp_path / "adapter")
    old = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**old, **config}))
    if tensors is not None:
        save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "VERA"}, "an adapter of kind VERA: only LORA"),
        ({"use_dora": True}, "norms change with the gauge"),
        ({"use_qalora": True}, "pools the inputs"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "used several times"),
        ({"trainable_token_indices": [3]}, "rows of the embedding"),
        ({"modules_to_save": ["lm_head"]}, r"holds whole modules \(lm_head\)"),
        ({"bias": "lora_only"}, 'bias="lora_only"'),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ],
)
def test_other_kinds_of_adapters(config, said, folders, tmp_path):
    adapter = changed(folders, tmp_path, **config)
    with pytest.raises(ValueError, match=said):
        carry_adapter(adapter, tmp_path / "new", base=folders / "base", moved=folders / "moved")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(16)}, "is not known"),
        ({"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(3, 16)}, "only one of lora_A"),
        (
            {
                "base_model.model.model.router.lora_A.weight": torch.ones(3, 16),
                "base_model.model.model.router.lora_B.weight": torch.ones(16, 3),
            },
            "does not know model.router",
        ),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(3, 17)}, "16 x 17.*16 x 16"),
        (
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)},
            r"\[16, 3\] and \[2, 16\]",
        ),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.full((3, 16), torch.nan)}, "finite"),
    ],
)
def test_other_tensors(tensors, said, folders, tmp_path):
    adapter = changed(folders, tmp_path, tensors)
    with pytest.raises(ValueError, match=said):
        carry_adapter(adapter, tmp_path / "new", base=folders / "base", moved=folders / "moved")
    assert not (tmp_path / "new").exists()


def test_another_gauge_is_refused(folders, tmp_path):
    base, moved, adapter = folders / "base", folders / "moved", folders / "adapter"
    stranger = write(tmp_path / "stranger", LLAMA, None)
    tensors = load_file(stranger / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, stranger / "model.safetensors")
    with pytest.raises(ValueError, match="made from other weights than those in"):
        carry_adapter(adapter, tmp_path / "new", base=stranger, moved=moved)
    with pytest.raises(ValueError, match="made from other weights than those in"):
        carry_adapter(adapter, tmp_path / "new", base=moved, moved=moved)
    trained = shutil.copytree(moved, tmp_path / "trained")
    tensors = load_file(trained / "model.safetensors")
    save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, trained / "model.safetensors")
    with pytest.raises(ValueError, match="trained or replaced since"):
        carry_adapter(adapter, tmp_path / "new", base=base, moved=trained)
    # an adapter that was carried says so, and is not carried twice
    carry_adapter(adapter, tmp_path / "new", base=base, moved=moved)
    with safe_open(tmp_path / "new" / WEIGHTS, "pt") as file:
        mark = file.metadata()["erlangen_gauge"]
    now = Checkpoint(moved)
    assert mark == json.loads((moved / RECORD).read_text())["target"] and len(mark) == 32 and now
    with pytest.raises(ValueError, match="the gauge of the moved model already"):
        carry_adapter(tmp_path / "new", tmp_path / "twice", base=base, moved=moved)
    # but on, from the base that it belongs to now; and not from there by another road
    canonicalize_folder(moved, tmp_path / "further", check=False, residual=True)
    carry_adapter(tmp_path / "new", tmp_path / "next", base=moved, moved=tmp_path / "further")
    with pytest.raises(ValueError, match="another gauge than that of"):
        carry_adapter(tmp_path / "next", tmp_path / "twice", base=base, moved=moved)
    # one without a mark is asked for the name of its base
    named = changed(folders, tmp_path, base_model_name_or_path=str(moved))
    with pytest.raises(ValueError, match="whose weights are not those of"):
        carry_adapter(named, tmp_path / "twice", base=base, moved=moved)
    assert not (tmp_path / "twice").exists()


def test_bad_folders(folders, tmp_path):
    base, moved, adapter = folders / "base", folders / "moved", folders / "adapter"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        carry_adapter(tmp_path / "nothing", tmp_path / "new", base=base, moved=moved)
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        carry_adapter(base, tmp_path / "new", base=base, moved=moved)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        carry_adapter(adapter, moved, base=base, moved=moved)
    with pytest.raises(ValueError, match="choose a folder beside it"):
        carry_adapter(adapter, adapter / "new", base=base, moved=moved)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        carry_adapter(adapter, tmp_path / "new", base=base, moved=tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no gauge\.json"):
        carry_adapter(adapter, tmp_path / "new", base=base, moved=base)
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / WEIGHTS).rename(pickled / "adapter_model.bin")
    with pytest.raises(ValueError, match="unpickling runs code"):
        carry_adapter(pickled, tmp_path / "new", base=base, moved=moved)
    for file, text in ((CONFIG, "{"), (CONFIG, "[]"), (WEIGHTS, "{")):
        broken = shutil.copytree(adapter, tmp_path / f"broken{file}{text}")
        (broken / file).write_text(text)
        with pytest.raises(ValueError):
            carry_adapter(broken, tmp_path / "new", base=base, moved=moved)
    cut = shutil.copytree(moved, tmp_path / "cut")
    (cut / TRANSFORMS).write_bytes((cut / TRANSFORMS).read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut off"):
        carry_adapter(adapter, tmp_path / "new", base=base, moved=cut)
    old = shutil.copytree(moved, tmp_path / "old")
    record = json.loads((old / RECORD).read_text())
    (old / RECORD).write_text(json.dumps({key: value for key, value in record.items() if key != "source"}))
    with pytest.raises(ValueError, match="no fingerprints"):
        carry_adapter(adapter, tmp_path / "new", base=base, moved=old)
    assert not list(tmp_path.glob("new*"))


def test_what_was_set_to_zero_takes_no_adapter(tmp_path):
    base = write(tmp_path / "base", LLAMA)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][:4] = 0
    save_file(tensors, base / "model.safetensors")
    canonicalize_folder(base, tmp_path / "moved", check=False)
    adapter = write_adapter(tmp_path / "adapter", base, ["v_proj"])
    with pytest.raises(ValueError, match="set to zero"):
        carry_adapter(adapter, tmp_path / "new", base=base, moved=tmp_path / "moved")


def test_embeddings_and_biases_do_not_go_together(tmp_path):
    base = write(tmp_path / "base", GPT2)
    canonicalize_folder(base, tmp_path / "moved", check=False)
    adapter = write_adapter(tmp_path / "adapter", base, ["attn.c_attn"])
    tensors = load_file(adapter / WEIGHTS)
    for kind, shape in (("A", (RANK, 32)), ("B", (16, RANK))):
        tensors[f"base_model.model.transformer.wte.lora_embedding_{kind}"] = torch.ones(shape)
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot combine with an adapter of an embedding \(transformer.wte\)"):
        carry_adapter(adapter, tmp_path / "new", base=base, moved=tmp_path / "moved")
