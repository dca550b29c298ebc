"""Training without the gauge directions of heads: every kind, through the calls that a user makes."""

import json
import math
import subprocess
from dataclasses import replace

import pytest
import torch
from stopping import StopAfter

from erlangen import gauge, lm
from erlangen.lm import BreakingConfig, GPTConfig, OptimizerConfig, ReductionConfig
from erlangen.lm.settings import TrainConfig, from_dict, to_dict
from erlangen.lm.train import build_model, build_optimizer, reduce_optimizer

KINDS = ("horizontal", "dressed", "chart", "invariant")
QUANTITIES = {"vertical_share", "charge_drift", "orbit_distance", "stored_distance"}
pytestmark = pytest.mark.usefixtures("one_thread")


def without_times(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def train(config, kind, **fields):
    reduction = ReductionConfig(kind=kind, every=3, **fields)
    return lm.train(replace(config, reduction=reduction, out=config.out.with_name(kind), checkpoint_every=100))


def losses(result):
    return [record["loss"] for record in result.records if "loss" in record]


# What each kind does to a run


def test_what_the_log_says_of_each_kind(small):
    """AdamW in float64: what each kind is for is what the log shows of it."""
    config = small(precision="float64", steps=12, eval_every=6, lr=3e-3)
    found = {kind: train(config, kind).validation[-1]["gauge"] for kind in ("none", *KINDS)}
    for record in found.values():
        assert set(record) == {*QUANTITIES, "layers"} and set(record["layers"]) == {"0", "1"}
        assert set(record["layers"]["1"]["vo"]) == QUANTITIES
        assert all(len(heads) == 2 for heads in record["layers"]["1"]["vo"].values())
        assert 1e-3 < record["orbit_distance"] < 1.5
    assert found["none"]["vertical_share"] > 1e-3 and found["dressed"]["vertical_share"] > 1e-3
    assert found["horizontal"]["vertical_share"] < 1e-24
    assert found["dressed"]["charge_drift"] < 1e-14 < 1e-3 < found["none"]["charge_drift"]
    assert found["horizontal"]["charge_drift"] < found["none"]["charge_drift"] / 3


def test_plain_gradient_descent_is_horizontal_already(small):
    """Without momentum the projection does nothing, so that the runs are equal up to rounding."""
    config = small(optimizer="sgdm", precision="float64", steps=8, log_charges=False)
    config = replace(config, optimizer=OptimizerConfig(name="sgdm", lr=0.1, momentum=0.0))
    plain, projected = (train(config, kind) for kind in ("none", "horizontal"))
    assert losses(projected) == pytest.approx(losses(plain), rel=1e-12)
    assert plain.validation[-1]["gauge"]["vertical_share"] < 1e-24


def test_the_first_loss_is_that_of_the_plain_run(small):
    """Dressing and charts move the weights at once, and change no output."""
    config = small(precision="float64", steps=2, optimizer="sgdm", lr=0.1)
    first = {kind: losses(train(config, kind)) for kind in ("none", *KINDS)}
    for kind in KINDS:
        assert first[kind][0] == pytest.approx(first["none"][0], rel=1e-12), kind
    assert len({round(values[1], 9) for values in first.values()}) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["sgdm", "adamw", "soap", "ecd", "muon"])
def test_every_optimizer_trains(small, optimizer, kind):
    fields = {"lr": 0.05} if kind == "invariant" else {}
    config = small(optimizer=optimizer, lr=None, steps=4, eval_every=4, eval_windows=4)
    result = train(replace(config, model=replace(config.model, num_layers=1)), kind, **fields)
    assert result.finished and math.isfinite(result.validation[-1]["validation_loss"])
    assert "charges" in result.validation[-1] and "gauge" in result.validation[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_other_models(small, kind):
    """Rotary and grouped heads; and normalised queries and keys, of which values and outputs are left."""
    shape = {"context_length": 16, "num_layers": 2, "num_heads": 4, "dim": 32}
    config = small(steps=4, eval_every=4, optimizer="sgdm", lr=0.03)
    grouped = GPTConfig(positions="rotary", rotary_fraction=0.5, num_kv_heads=2, attention_bias=False, **shape)
    normed = GPTConfig(qk_norm=True, positions="rotary", **shape)
    for number, (model, sectors) in enumerate(((grouped, {"qk", "vo"}), (normed, {"vo"}))):
        result = train(replace(config, model=model, out=config.out.with_name(str(number)) / "run"), kind)
        assert set(result.validation[-1]["gauge"]["layers"]["0"]) == sectors


# The learning rate of the heads


def test_the_heads_have_a_rate_of_their_own(small):
    config = small(optimizer="adamw", lr=1e-3)
    model = build_model(replace(config.model, vocab_size=256), BreakingConfig(), seed=0)
    for given, expected in ((None, 1e-3), (0.2, 0.2)):
        optimizer = build_optimizer(config.optimizer, model, ReductionConfig(kind="invariant", lr=given, momentum=0.8))
        assert isinstance(optimizer, gauge.QuotientSGD)
        rates = {group["lr"] for group in optimizer.param_groups if group["quotient"]}
        assert rates == {expected}
        assert {group["lr"] for group in optimizer.param_groups if not group["quotient"]} == {1e-3}
        assert {group["momentum"] for group in optimizer.param_groups if group["quotient"]} == {0.8}
    named = OptimizerConfig(name="sgdm")
    optimizer = build_optimizer(named, model, ReductionConfig(kind="invariant"))
    assert {group["lr"] for group in optimizer.param_groups} == {0.03}, "the optimiser's own default"


def test_the_schedule_moves_both_rates(small):
    config = small(steps=4, warmup=4, schedule="constant", optimizer="sgdm", lr=0.1)
    result = train(config, "invariant", lr=0.0)
    assert [r["lr"] for r in result.records if "lr" in r] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert result.validation[-1]["gauge"]["orbit_distance"] < 1e-6, "heads at rate 0 stay where they are"


def test_invariant_runs_do_not_know_the_gauge(small):
    """The steps of a run from other numbers of the same function: the same losses, where AdamW's differ."""
    config = small(precision="float64").model
    tokens = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(0))

    def run(kind, moved):
        model = build_model(replace(config, vocab_size=256), BreakingConfig(), seed=0).double()
        if moved:
            for block in model.blocks:  # values times 3, outputs over 3
                for name, factor in (("value", 3.0), ("output", 1 / 3)):
                    getattr(block.attention, name).weight.data.mul_(factor)
                block.attention.value.bias.data.mul_(3.0)
        reduction = ReductionConfig(kind=kind)
        optimizer = build_optimizer(OptimizerConfig(name="adamw", lr=1e-2), model, reduction)
        reduce_optimizer(optimizer, model, reduction)
        found = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(tokens[:, :-1], tokens[:, 1:])[1]
            loss.backward()
            optimizer.step(lambda loss=loss: loss.item())
            found.append(loss.item())
        return found

    for kind in ("invariant", "dressed", "chart"):
        assert run(kind, True) == pytest.approx(run(kind, False), rel=1e-9), kind
    assert run("none", True) != pytest.approx(run("none", False), rel=1e-5)


# Stopping and going on


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "ecd"])
def test_resumed_equals_uninterrupted(small, kind, optimizer):
    """Stopped at step 7, where the next dressing is two steps away; the log of the gauge is part of what is equal."""
    fields = {"optimizer": optimizer, "lr": None, "reduction": ReductionConfig(kind=kind, every=3)}
    fields |= {"eval_every": 4, "checkpoint_every": 100, "steps": 10}
    whole = lm.train(small(out="whole", **fields))
    stopped = lm.train(small(out="parts", **fields), progress=StopAfter(7))
    assert not stopped.finished and stopped.records[-1]["step"] == 7
    resumed = lm.resume(stopped.folder)
    assert resumed.finished
    assert without_times(resumed.records) == without_times(whole.records)
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_two_processes_equal_one(small, command):
    config = small(precision="float64", steps=6, reduction=ReductionConfig(kind="dressed", every=4))
    whole = lm.train(replace(config, out=config.out.with_name("whole")))
    line = command(config, "--precision", "float64", "--reduction.kind", "dressed", "--reduction.every", "4")
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "erlangen", "train"]
    subprocess.run([line[0], *two, *line[4:]], check=True, capture_output=True, text=True)
    found = [json.loads(text) for text in (config.out / "log.jsonl").read_text().splitlines()]
    for a, b in zip(found, whole.records, strict=True):
        for name in ("loss", "validation_loss"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), abs=1e-10)
        if "gauge" in b:
            assert a["gauge"]["orbit_distance"] == pytest.approx(b["gauge"]["orbit_distance"], abs=1e-9)


# Settings, logs and trackers


def test_runs_from_before_there_were_reductions_load(small):
    values = json.loads(json.dumps(to_dict(small())))
    for name in ("reduction", "log_gauge"):
        del values[name]
    config = from_dict(TrainConfig, values)
    assert config.reduction == ReductionConfig() and config.reduction.kind == "none"
    again = from_dict(TrainConfig, json.loads(json.dumps(to_dict(small(reduction=ReductionConfig(kind="chart"))))))
    assert again.reduction.kind == "chart"


def test_the_log_of_the_gauge_can_be_left_out(small):
    """And costs nothing then; what is trained is the same."""
    with_log, without = (lm.train(small(out=str(log), log_gauge=log, steps=5)) for log in (True, False))
    assert "gauge" not in without.validation[-1] and "gauge" in with_log.validation[-1]
    assert losses(with_log) == losses(without)


def test_a_broken_run_logs_what_was_gauge(small):
    record = lm.train(small(breaking=BreakingConfig(enabled=True), steps=3)).validation[-1]["gauge"]
    assert record["vertical_share"] > 0


def test_a_tracker_hears_of_the_gauge(small):
    class Recorder:
        def __init__(self):
            self.logged = []

        def init(self, **_): ...

        def log(self, data, *, step):
            self.logged.append((step, dict(data)))

        def finish(self): ...

    tracker = Recorder()
    result = lm.train(small(steps=3), tracker=tracker)
    step, scalars = tracker.logged[-1]
    assert step == 3 and all(isinstance(value, (int, float)) for value in scalars.values())
    record = result.validation[-1]["gauge"]
    assert scalars["gauge/vertical_share"] == record["vertical_share"]
    heads = record["layers"]["1"]["vo"]["charge_drift"]
    assert scalars["gauge/charge_drift/vo/1"] == pytest.approx(sum(heads) / len(heads))
    assert not any(name.startswith("gauge") for name in tracker.logged[0][1]), "no step was measured at step 0"


def test_the_name_of_a_run_says_its_reduction(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = lm.train(replace(small(steps=1), out=None, reduction=ReductionConfig(kind="horizontal")))
    assert result.folder.name.endswith("-adamw-horizontal")


def test_bad_settings(small):
    for fields, message in (
        ({"every": 0}, "reduction.every counts steps and must be at least 1, received 0"),
        ({"kind": "invariant", "lr": -1.0}, "reduction.lr must be a finite number"),
        ({"kind": "invariant", "lr": math.nan}, "reduction.lr must be a finite number"),
        ({"kind": "horizontal", "lr": 0.1}, "kind 'horizontal' has none of its own"),
        ({"momentum": 1.0}, "reduction.momentum must be at least 0 and less than 1, received 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            ReductionConfig(**fields)
    reduction = ReductionConfig(kind="dressed")
    with pytest.raises(ValueError, match="choose breaking or reduction 'dressed', not both"):
        small(breaking=BreakingConfig(enabled=True), reduction=reduction)
    with pytest.raises(ValueError, match=r"needs whole heads on every process.*use parallel 'ddp'"):
        small(parallel="fsdp", reduction=reduction)
    with pytest.raises(ValueError, match="kind cannot be 'vertical'"):
        from_dict(ReductionConfig, {"kind": "vertical"})
    with pytest.raises(ValueError, match="adamw"):
        lm.train(small(optimizer="adamww", reduction=ReductionConfig(kind="invariant")))
