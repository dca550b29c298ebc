"""Broken models of transformers in folders: they come back as they were, and nobody takes them for plain ones."""

import json
import shutil

import pytest
import torch
from checkpoint_cases import answer, families, tokens
from safetensors.torch import load_file, save_file

import erlangen as er
from erlangen import interop
from erlangen.gauge import flat_directions, head_layouts

transformers = pytest.importorskip("transformers")
from erlangen.interop import broken  # noqa: E402  (needs transformers)

NAMES = (
    "gpt2",
    "gpt2 base",
    "gpt_neox",
    "llama tied",
    "mistral",
    "qwen3",
    "phi3",
    "gemma3",
    "bert for masked language",
)


def auto_class(model):
    name = type(model).__name__
    if name.endswith("ForMaskedLM"):
        return transformers.AutoModelForMaskedLM
    return transformers.AutoModelForCausalLM if "LM" in name else transformers.AutoModel


def make_plain(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return families()[name]()


def make(name, **settings):
    """A broken model after two draws."""
    model = er.breaking.break_symmetry(make_plain(name), **{"seed": 3, "value_mean": 0.2} | settings)
    for _ in range(2):
        answer(model.train(), tokens())
    return model.eval()


def load(model, folder, **options):
    loaded, said = auto_class(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(said.values()), said
    return loaded.eval()


@pytest.mark.parametrize("name", NAMES)
def test_families(name, tmp_path):
    settings = {"rotary": "after", "per_head": True} if name in ("gpt_neox", "qwen3") else {}
    model = make(name, **settings)
    model.save_pretrained(tmp_path, max_shard_size="6KB" if name == "mistral" else "1GB")
    new = load(model, tmp_path)
    assert type(new) is type(model) and type(new).__name__.startswith("Broken")
    assert torch.equal(answer(new, tokens()), answer(model, tokens()))
    # the draws go on where they were, and the last one is in force
    assert new.symmetry_breaking.num_draws == 2 == model.symmetry_breaking.num_draws
    assert new.symmetry_breaking.settings == model.symmetry_breaking.settings
    assert torch.equal(new.symmetry_breaking.current, model.symmetry_breaking.current)
    for part in (model, new):
        part.symmetry_breaking.redraw()
        part.symmetry_breaking.evaluate_with = "last"
    assert torch.equal(answer(new, tokens()), answer(model, tokens()))
    # what comes back is taken out like what went in
    plain = make_plain(name)
    er.breaking.restore(new)
    assert type(new) is type(plain) and new.config.model_type == plain.config.model_type
    new.save_pretrained(tmp_path / "plain")
    again = auto_class(plain).from_pretrained(tmp_path / "plain").eval()
    assert type(again) is type(plain) and torch.equal(answer(again, tokens()), answer(plain, tokens()))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_nobody_takes_it_for_a_plain_model(name, tmp_path, monkeypatch):
    model = make(name)
    plain, kind = type(families()[name]()), f"erlangen_broken_{name}"
    model.save_pretrained(tmp_path / "broken")
    for options in ({}, {"attn_implementation": "eager", "dtype": torch.float32}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(Exception, match=r"has unlearned biases: import erlangen\.interop\.broken, then load it"):
            plain.from_pretrained(tmp_path / "broken", **options)
    # as where the module was not imported
    with monkeypatch.context() as patch:
        patch.delitem(transformers.CONFIG_MAPPING._extra_content, kind)
        with pytest.raises(ValueError, match=kind):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "broken")
    for treat in (interop.layout_of_config, flat_directions):
        with pytest.raises(ValueError, match=rf"a {name} with unlearned biases .*fold or restore"):
            treat(json.loads((tmp_path / "broken" / "config.json").read_text()))
    with pytest.raises(ValueError, match="with unlearned biases"):
        er.gauge.canonicalize(tmp_path / "broken", tmp_path / "canonical")
    # a folder that lost its biases
    shutil.copytree(tmp_path / "broken", tmp_path / "lost")
    tensors = load_file(tmp_path / "lost" / "model.safetensors")
    del tensors["symmetry_breaking.mean"]
    save_file(tensors, tmp_path / "lost" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks symmetry_breaking\.mean"):
        load(model, tmp_path / "lost")


def test_it_goes_on_as_a_model_of_transformers(tmp_path):
    config = families()["gpt2"]().config
    model, other = (transformers.GPT2LMHeadModel(config) for _ in range(2))
    assert interop.break_symmetry(model, seed=1) is model
    assert other.config.model_type == config.model_type == "gpt2", "a config that models share is left alone"
    assert model.transformer.config is model.config is model.transformer.h[0].attn.config
    assert head_layouts(model) == head_layouts(other)
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    low = load(model, tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    assert low.symmetry_breaking.keys.dtype == low.symmetry_breaking.num_draws.dtype == torch.int64
    # heads of another kind on the same body, and a new model of the same config
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base.symmetry_breaking.mean, model.symmetry_breaking.mean)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.n_embd == 16 and loaded.to_dict()["n_embd"] == 16
    fresh = transformers.AutoModelForCausalLM.from_config(loaded)
    assert fresh.symmetry_breaking.num_draws == 0
    assert torch.equal(fresh.symmetry_breaking.keys, model.symmetry_breaking.keys)
    assert torch.equal(fresh.symmetry_breaking.current, fresh.symmetry_breaking.mean)
    # a state dict alone, as the Trainer resumes from
    answer(model.train(), tokens())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.symmetry_breaking.current, model.symmetry_breaking.current)
    known = transformers.AutoModelForCausalLM._model_mapping[type(loaded)]
    assert known.__name__ == type(fresh).__name__, "as pipelines ask"
    assert transformers.PreTrainedConfig.from_json_file(tmp_path / "config.json").transformers_version


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma3"])
def test_a_folded_model_is_one_of_its_family(name, tmp_path):
    model = make(name)
    expected = answer(model, tokens())
    interop.fold(model, add_biases=name != "gpt2")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == families()[name]().config.model_type and not any("erlangen" in key for key in config)
    new = load(model, tmp_path)
    assert type(new).__module__.startswith("transformers.") and new.config.to_dict().get("attention_bias", True)
    assert (answer(new, tokens()) - expected).abs().max() < 1e-5 * expected.abs().max()
    # and stays one when it is trained on
    new(input_ids=tokens()).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())


def test_kinds_that_could_not_be_loaded_are_refused():
    model = families()["gpt2"]()
    model.config.__class__ = type("Foreign", (type(model.config),), {"model_type": "foreign"})
    with pytest.raises(ValueError, match=r"kind 'foreign' are not known to erlangen\.interop\.broken"):
        broken.FAMILY.check(model)
