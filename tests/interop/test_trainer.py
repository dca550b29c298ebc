"""Broken models in transformers.Trainer: trained, logged, saved, loaded, generated from, compiled, resumed."""

import copy
import json
import math

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'erlangen[hf]'")
pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'erlangen[hf]'")

from trainer_cases import arguments, build, checkpoint_layers, on_two_processes, ragged_run, train, windows
from transformers import AutoModelForCausalLM, Trainer

import erlangen as er
from erlangen.interop import broken
from erlangen.interop import trainer as parts

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch's own, where a scheduler and a data loader run without an accelerator
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
assert broken.FAMILIES

RATES = {"ecd": 1.0, "adamw": 1e-2, "sgdm": 0.1, "soap": 1e-2, "muon": 1e-2}


def values(trainer, name):
    return [record[name] for record in trainer.state.log_history if name in record]


def charges(trainer):
    return torch.tensor([values(trainer, f"charge/{sector}/{layer}") for sector in ("qk", "vo") for layer in (0, 1)])


@pytest.fixture(scope="module", params=["llama-ecd", "gpt2-adamw"])
def trained(request, tmp_path_factory, one_thread):
    """The trainer of a finished run, its folder, the model loaded from there, and tokens."""
    family, name = request.param.split("-")
    model = er.breaking.break_symmetry(build(family), seed=1)
    folder = tmp_path_factory.mktemp(family)
    trainer = train(model, name, folder, lr=RATES[name], steps=50, logging_steps=10)
    trainer.save_model(folder / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    return trainer, loaded, windows(2)[0]["input_ids"][None]


def test_loss_falls_and_charges_are_logged(trained):
    trainer, _, _ = trained
    losses = values(trainer, "loss")
    assert losses[-1] < losses[0] - 0.5 and losses[-1] < math.log(256) - 2
    assert charges(trainer).shape == (4, 5) and (charges(trainer) > 1e-3).all()


def test_loaded_model_is_the_trained_one(trained):
    trainer, loaded, tokens = trained
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(trainer.model(tokens).logits, loaded(tokens).logits)
    assert loaded.symmetry_breaking.num_draws == 50
    assert not torch.equal(loaded.symmetry_breaking.mean, torch.zeros_like(loaded.symmetry_breaking.mean))


@torch.no_grad()
def test_generation_with_a_cache_is_that_without(trained):
    _, model, tokens = trained
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found = model.generate(tokens[:, :8], use_cache=True, **greedy)
    assert torch.equal(found, model.generate(tokens[:, :8], use_cache=False, **greedy))
    expected = tokens[:, :8]
    for _ in range(12):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_causal(trained):
    _, model, tokens = trained
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 7) % 256
    before, after = model(tokens).logits, model(changed).logits
    assert torch.equal(before[:, :20], after[:, :20]) and not torch.allclose(before[:, 20:], after[:, 20:])


def test_compiled_without_a_graph_break():
    """A training step of the compiled model draws, and is that of the model itself."""
    model, tokens = er.breaking.break_symmetry(build("llama")), windows(1)[0]["input_ids"][None]
    eager, compiled = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    torch._dynamo.reset()
    loss, found = (
        nn.functional.cross_entropy(called(tokens[:, :-1]).logits.mT, tokens[:, 1:])
        for called in (eager, torch.compile(compiled, backend="eager", fullgraph=True))
    )
    loss.backward(), found.backward()
    assert found.item() == pytest.approx(loss.item(), abs=1e-6)
    assert compiled.symmetry_breaking.num_draws == 1
    for one, two in zip(eager.parameters(), compiled.parameters()):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing(family):
    model = er.breaking.break_symmetry(build(family).double()).train()
    tokens = torch.stack([window["input_ids"] for window in windows(4)])
    found = []
    for checkpointing in (False, True):
        one = copy.deepcopy(model)
        if checkpointing:
            checkpoint_layers(one)
        loss = one(tokens, labels=tokens).loss
        loss.backward()
        found.append((loss.item(), [p.grad for p in one.parameters()]))
    (loss, gradients), (other, others) = found
    assert other == pytest.approx(loss, abs=1e-12)
    for one, two in zip(gradients, others):
        torch.testing.assert_close(one, two)


def test_charges_of_a_plain_model_stay_zero(tmp_path):
    for name in ("ecd", "sgdm"):
        plain = train(build("llama"), name, tmp_path, lr=RATES[name], steps=6, every=3)
        assert charges(plain).shape == (4, 2) and (charges(plain) < 1e-5).all()


@pytest.mark.parametrize(("accumulation", "by_tokens"), [(1, True), (3, True), (3, False)])
def test_ecd_takes_the_loss_that_trainer_logs(tmp_path, accumulation, by_tokens):
    """Windows have different numbers of labels, so that the mean of batches is not that over tokens. Trainer takes one
    or the other, as the model knows of the batch's tokens or does not. There are evaluations between the steps."""
    data = windows(60, ragged=True)
    seen = []
    model = er.breaking.break_symmetry(build("llama"))
    checkpoint_layers(model)
    args = arguments(
        tmp_path, learning_rate=0.5, max_steps=4, gradient_accumulation_steps=accumulation, eval_strategy="steps",
        eval_steps=2, lr_scheduler_type="linear", warmup_steps=1,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=data, eval_dataset=data[:8], optimizer_cls_and_kwargs=parts.optimizer("ecd", args)
    )
    trainer.model_accepts_loss_kwargs = by_tokens
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda _, __, kwargs: seen.append(kwargs["loss"].item()))
    trainer.train()
    assert seen == pytest.approx(values(trainer, "loss"), abs=2e-5) and len(seen) == 4
    # One draw a training forward, none by evaluation, which uses the mean. Of three batches a step, the third step has
    # two: they end the epoch.
    draws = {1: 4, 3: 11}[accumulation]
    assert model.symmetry_breaking.num_draws == draws
    model.eval()
    with torch.no_grad():
        losses = [model(**{k: v[None] for k, v in window.items()}).loss * _labels(window) for window in data[:8]]
    expected = sum(losses) / sum(_labels(window) for window in data[:8])
    # Trainer's evaluation is a mean over batches of tokens' means; of one batch here.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert model.symmetry_breaking.num_draws == draws


def _labels(window):
    return (window["labels"][1:] != -100).sum()


def test_one_draw_a_step_makes_accumulation_exact(tmp_path):
    def losses(batch, accumulation):
        model = er.breaking.break_symmetry(build("llama"), redraw="step")
        trainer = train(
            model, "ecd", tmp_path, lr=0.5, steps=4, callbacks=[parts.RedrawCallback()], logging_steps=1,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        assert model.symmetry_breaking.num_draws == 4
        return values(trainer, "loss")

    assert losses(2, 4) == pytest.approx(losses(8, 1), abs=1e-5)


@pytest.mark.parametrize("name", er.optim.OPTIMIZERS)
def test_resumed_run_repeats_the_losses(tmp_path, name):
    def run(resume, steps=4):
        model = er.breaking.break_symmetry(build("llama"))
        return train(
            model, name, tmp_path, lr=RATES[name], steps=steps, resume=resume, save_strategy="steps", save_steps=2,
            logging_steps=1, lr_scheduler_type="linear", warmup_steps=1, weight_decay=0.01,
        )  # fmt: skip

    whole = run(False)
    resumed = run(str(tmp_path / "checkpoint-2"))
    assert len(values(whole, "loss")) == 4 and values(whole, "loss") == values(resumed, "loss")
    for one, two in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(one, two)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weight_decay_is_where_trainer_has_it(tmp_path, family):
    model, args = build(family), arguments(tmp_path, learning_rate=0.1, weight_decay=0.3)
    expected = Trainer(model, args).create_optimizer()
    made = Trainer(model, args, optimizer_cls_and_kwargs=parts.optimizer("adamw", args)).create_optimizer()
    for one, two in zip(expected.param_groups, made.param_groups):
        assert {id(p) for p in one["params"]} == {id(p) for p in two["params"]}
        assert one["weight_decay"] == two["weight_decay"] and two["lr"] == 0.1
    made = Trainer(model, args, optimizer_cls_and_kwargs=parts.optimizer("muon", args, lr=2.0)).create_optimizer()
    outer = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for group in made.param_groups:
        assert group["lr"] == 2.0
        if group["algorithm"] == "muon":
            assert not outer & {id(p) for p in group["params"]}
            assert len(group["params"]) == (14 if family == "llama" else 8)


def test_label_smoothing_shifts_the_labels_of_broken_models_too(tmp_path):
    quiet = dict.fromkeys(("query_mean", "query_std", "value_mean", "value_std"), 0.0)
    models = build("llama"), er.breaking.break_symmetry(build("llama"), **quiet)
    one, two = (
        train(model, "adamw", tmp_path, lr=0.01, steps=2, logging_steps=1, label_smoothing_factor=0.1)
        for model in models
    )
    assert values(one, "loss") == pytest.approx(values(two, "loss"), abs=1e-5)


def test_what_cannot_be_had_is_refused_in_words(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        parts.optimizer("adam", args)
    with pytest.raises(ValueError, match="ecd has no setting 'betas'"):
        parts.optimizer("ecd", args, betas=(0.9, 0.9))
    with pytest.raises(ValueError, match="bf16"):
        args.fp16 = True
        parts.optimizer("ecd", args)
    with pytest.raises(ValueError, match="saw no loss"):
        train(build("llama"), "ecd", tmp_path, lr=1.0, steps=1, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="at least 1"):
        parts.ChargeCallback(None, every=0)

    class FullyShardedDataParallel(nn.Module):
        """By the name that the callback looks for."""

    callback = parts.ChargeCallback(None)
    with pytest.raises(ValueError, match="FSDP2"):
        callback.on_train_begin(arguments(tmp_path), None, None, model=nn.Sequential(FullyShardedDataParallel()))
    with pytest.raises(TypeError):
        callback.on_train_begin(arguments(tmp_path), None, None, model=nn.Linear(2, 2))


def test_without_momentum_it_warns_once_and_goes_on(tmp_path):
    args = arguments(tmp_path, optim="sgd", max_steps=3, learning_rate=0.1)
    trainer = Trainer(build("llama"), args, train_dataset=windows(24))
    trainer.add_callback(parts.ChargeCallback(trainer, every=1))
    with pytest.warns(UserWarning, match="no charges are logged") as caught:
        trainer.train()
    assert len([w for w in caught if "charges" in str(w.message)]) == 1 and trainer.state.global_step == 3


def test_two_processes_equal_one(tmp_path):
    """Equal losses mean equal draws, equal gradients and, for ECD, the mean of the two losses."""
    on_two_processes(ragged_run, tmp_path, batch_size=4)
    ragged_run(tmp_path / "one", batch_size=8)
    one, two, other = (json.loads((tmp_path / name / "log.json").read_text()) for name in ("one", "0", "1"))
    assert two["draws"] == other["draws"] == one["draws"] == 5
    assert two["last"] == other["last"], "both ranks hold one model"
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-5) and len(one["losses"]) == 5
    assert two["charges"] == pytest.approx(one["charges"], abs=1e-3)
    assert two["last"] == pytest.approx(one["last"], abs=2e-5)
