"""The training loop, through the calls and the processes a user starts."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from stopping import StopAfter

from erlangen import lm
from erlangen.lm import BreakingConfig, GPTConfig, OptimizerConfig, checkpoint
from erlangen.lm.logs import read_jsonl
from erlangen.lm.settings import TrainConfig, from_dict, to_dict
from erlangen.lm.windows import validation_windows

TIMES = {"seconds"}


def losses(records):
    """The records less their timings, which no two runs share."""
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


# What a run does


def test_learns_and_logs(small):
    seen = []
    config = small(steps=60, lr=1e-2, clip=1.0, warmup=5)
    result = lm.train(config, progress=lambda step, record: seen.append(step))
    assert result.finished and seen == list(range(1, 61))
    first, last = result.validation[0], result.validation[-1]
    assert first["step"] == 0 and first["validation_loss"] == pytest.approx(math.log(256), abs=0.5)
    assert last["step"] == 60 and last["validation_loss"] < 3.2
    assert last["validation_windows"] == 16 and 0 < last["validation_standard_error"] < 0.2
    assert set(last["charges"]) == {"0", "1"} and set(last["charges"]["0"]) == {"qk", "vo"}
    lines = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    assert lines == result.records
    assert lines[1].keys() == {"step", "loss", "gradient_norm", "lr", "tokens", "seconds"}
    assert from_dict(TrainConfig, json.loads((config.out / "config.json").read_text())).steps == 60


def test_validation_is_the_mean_over_all_windows_and_its_standard_error(small):
    config = small()
    corpus = lm.load_corpus(config.data.corpus)
    windows = validation_windows(corpus.validation, 16, None)
    model = lm.GPT(replace(config.model, vocab_size=256)).double()
    found = lm.evaluate(model, windows, batch_size=7)
    each = torch.stack([model(w[None, :-1], w[None, 1:])[1] for w in windows]).detach()
    assert found[0] == pytest.approx(each.mean().item(), rel=1e-12)
    assert found[1] == pytest.approx((each.std() / len(each) ** 0.5).item(), rel=1e-10)
    assert model.training


def test_a_run_repeats_and_seeds_differ(small):
    runs = [losses(lm.train(small(out=name, seed=seed)).records) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert runs[0] == runs[1]
    assert all(a["loss"] != b["loss"] for a, b in zip(runs[0], runs[2]) if "loss" in a)


@pytest.mark.parametrize("is_broken", [False, True])
def test_accumulation_changes_only_the_draws(small, is_broken):
    """Four micro-batches are one batch; with redraw="step" also for a broken model, with "forward" not."""

    def run(out, accumulation, redraw="step"):
        broken = BreakingConfig(enabled=is_broken, redraw=redraw)
        config = small(out=out, precision="float64", accumulation=accumulation, breaking=broken)
        return [record["loss"] for record in lm.train(config).records if "loss" in record]

    whole, parts = run("whole", 1), run("parts", 4)
    assert whole == pytest.approx(parts, abs=1e-12)
    if is_broken:
        assert run("forward", 4, redraw="forward") != pytest.approx(parts, abs=1e-6)


def test_schedules():
    def course(**fields):
        config = TrainConfig(steps=10, **fields)
        return [config.lr_factor(step) for step in range(10)]

    assert course(schedule="constant", warmup=2) == [0.5] + [1.0] * 9
    linear = course(schedule="linear", warmup=0, final_lr=0.0)
    assert linear == pytest.approx([1 - 0.1 * i for i in range(10)])
    cosine = course(schedule="cosine", warmup=2, final_lr=0.1)
    assert cosine[1] == 1.0 and cosine[2] == 1.0
    assert cosine[6] == pytest.approx(0.55) and sorted(cosine[2:], reverse=True) == cosine[2:]


def test_the_schedule_reaches_the_optimizer(small):
    rates = [r["lr"] for r in lm.train(small(steps=8, warmup=4, schedule="linear", final_lr=0.0)).records if "lr" in r]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_clipping_bounds_the_step(small):
    plain = small(optimizer="sgdm", lr=1.0, steps=1, precision="float64")
    moved = []
    for config in (plain, replace(plain, clip=1e-3, out=plain.out.with_name("clipped"))):
        start = lm.train(replace(config, steps=1, optimizer=OptimizerConfig(name="sgdm", lr=0.0),
                                 out=config.out.with_name(config.out.name + "0"))).model  # fmt: skip
        end = lm.train(config).model
        moved.append(math.sqrt(sum((a - b).pow(2).sum().item() for a, b in zip(start.parameters(), end.parameters()))))
    assert moved[1] == pytest.approx(1e-3, rel=1e-6) and moved[0] > 10 * moved[1]


@pytest.mark.parametrize("optimizer", ["sgdm", "soap", "ecd", "muon"])
def test_every_optimizer_trains_in_bfloat16_autocast(small, optimizer):
    result = lm.train(small(optimizer=optimizer, lr=None, precision="bfloat16", steps=6))
    assert math.isfinite(result.validation[-1]["validation_loss"])
    assert next(result.model.parameters()).dtype == torch.float32
    assert "charges" in result.validation[-1]


def test_a_streamed_data_set_shows_its_progress(small, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="streaming needs datasets: pip install 'erlangen[data]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ERLANGEN_CACHE", str(tmp_path / "cache"))
    documents = tmp_path / "documents"
    documents.mkdir()
    lines = [json.dumps({"text": f"document {i}: a group acts on a head. " * 5}) for i in range(400)]
    (documents / "part.jsonl").write_text("\n".join(lines))
    seen = []
    config = small(steps=2)
    config = replace(config, data=replace(config.data, corpus=f"hf:{documents}", max_tokens=30_000))
    result = lm.train(config, reading=lambda done, total: seen.append((done, total)))
    assert result.finished and seen and seen[-1][1] == 30_000 and seen[-1][0] >= 29_000


# Stopping and going on


@pytest.mark.parametrize(
    ("optimizer", "is_broken"), [("adamw", True), ("sgdm", False), ("soap", True), ("ecd", True), ("muon", False)]
)
def test_resumed_equals_uninterrupted(small, optimizer, is_broken):
    fields = {"optimizer": optimizer, "lr": None, "breaking": BreakingConfig(enabled=is_broken)}
    whole = lm.train(small(out="whole", **fields))
    stopped = lm.train(small(out="parts", **fields), progress=StopAfter(7))
    assert not stopped.finished and stopped.records[-1]["step"] == 7
    resumed = lm.resume(stopped.folder)
    assert resumed.finished
    assert losses(resumed.records) == losses(whole.records)
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()):
        assert torch.equal(a, b)


def wait_for(condition, process, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_killed_process_resumes_bit_for_bit(small, command, number):
    """Killed at no chosen moment, most likely while a checkpoint is written: one is written after every step."""
    config = small(steps=60, checkpoint_every=1, breaking=BreakingConfig(enabled=True))
    whole = lm.train(replace(config, out=config.out.with_name("whole"), checkpoint_every=60))
    line = command(config, "--breaking.enabled")
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(checkpoint.checkpoints(config.out)) == 2, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130 and f"--resume {config.out}" in out
    step = int(checkpoint.checkpoints(config.out)[-1].name[5:])
    assert step < 60
    subprocess.run([sys.executable, "-m", "erlangen", "train", "--resume", str(config.out)],
                   check=True, capture_output=True)  # fmt: skip
    assert losses(read_jsonl(config.out / "log.jsonl")) == losses(whole.records)
    assert {path.suffix for path in config.out.glob("step-*")} == {""}


def test_a_half_written_checkpoint_is_never_seen(small):
    whole = lm.train(small(out="whole"))
    stopped = lm.train(small(out="parts"), progress=StopAfter(8))
    halves = [stopped.folder / name for name in ("step-00000011.writing", "step-00000010.removing")]
    for half in halves:
        half.mkdir()
        (half / "checkpoint.json").write_text('{"format": "erl')
    assert losses(lm.resume(stopped.folder).records) == losses(whole.records)
    assert not any(half.exists() for half in halves)


def test_old_checkpoints_go(small):
    result = lm.train(small(keep_checkpoints=2))
    assert [path.name for path in checkpoint.checkpoints(result.folder)] == ["step-00000008", "step-00000012"]


def test_load_gives_the_trained_model_back(small):
    config = small(breaking=BreakingConfig(enabled=True), model=GPTConfig(context_length=16, num_layers=2, num_heads=2,
                   dim=16, mlp="prelu", positions="rotary"))  # fmt: skip
    result = lm.train(config)
    tokens = torch.arange(16)[None]
    for folder in (result.folder, result.folder / "step-00000012"):
        model = lm.load(folder)
        assert hasattr(model, "symmetry_breaking") and not model.training
        assert torch.equal(model(tokens)[0], result.model(tokens)[0])


def test_a_checkpoint_holds_no_pickle(small):
    result = lm.train(small())
    suffixes = {path.suffix for path in result.folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".safetensors"}


# Trackers


class Recorder:
    def __init__(self):
        self.calls = []

    def init(self, *, project, config):
        self.calls.append(("init", project, config["steps"]))

    def log(self, data, *, step):
        self.calls.append(("log", step, dict(data)))

    def finish(self):
        self.calls.append(("finish",))


def test_a_tracker_of_three_methods_hears_everything(small):
    tracker = Recorder()
    lm.train(small(steps=5), tracker=tracker)
    assert tracker.calls[0] == ("init", "erlangen", 5) and tracker.calls[-1] == ("finish",)
    logged = [call for call in tracker.calls if call[0] == "log"]
    assert [call[1] for call in logged if "loss" in call[2]] == [1, 2, 3, 4, 5]
    assert "charge/qk/1" in logged[-1][2]


def test_tensorboard(small):
    pytest.importorskip("tensorboard")
    result = lm.train(small(steps=2, track="tensorboard"))
    assert list((result.folder / "tensorboard").glob("events*"))


# Bad input


def test_bad_configs(small):
    with pytest.raises(ValueError, match="steps must be at least 1"):
        small(steps=0)
    with pytest.raises(ValueError, match="multiple of accumulation"):
        small(accumulation=3)
    with pytest.raises(ValueError, match="warmup"):
        small(warmup=100)
    with pytest.raises(ValueError, match="share of the learning rate"):
        small(final_lr=2.0)
    with pytest.raises(ValueError, match="clip"):
        small(clip=0.0)
    with pytest.raises(ValueError, match="device must be"):
        lm.train(small(device="abacus"))
    with pytest.raises(ValueError, match="adamw"):  # the library names those there are
        lm.train(small(optimizer="adamww"))
    with pytest.raises(ValueError, match="eta"):
        lm.train(replace(small(), optimizer=OptimizerConfig(name="adamw", eta=3.0)))
    with pytest.raises(ValueError, match="track must be"):
        lm.train(small(track="no_such_module"))
    with pytest.raises(ValueError, match="it needs init, log and finish"):
        lm.train(small(out="other", track="json"))


def test_from_dict_refuses_what_it_does_not_know():
    values = to_dict(TrainConfig())
    assert from_dict(TrainConfig, json.loads(json.dumps(values))) == TrainConfig()
    with pytest.raises(ValueError, match="no field speed"):
        from_dict(TrainConfig, {"speed": 1})
    with pytest.raises(ValueError, match="schedule cannot be 'often'"):
        from_dict(TrainConfig, {"schedule": "often"})
    with pytest.raises(ValueError, match="steps cannot be"):
        from_dict(TrainConfig, {"steps": "many"})


def test_a_tokenizer_that_does_not_match(small):
    config = small(model=GPTConfig(vocab_size=100, context_length=16, num_layers=1, num_heads=1, dim=8))
    with pytest.raises(ValueError, match="256 tokens and the model only 100"):
        lm.train(config)


def test_a_folder_that_holds_a_run(small):
    lm.train(small(steps=1))
    with pytest.raises(ValueError, match="holds a run already"):
        lm.train(small(steps=1))


def test_a_loss_that_is_not_finite(small):
    config = small(optimizer="sgdm", lr=1e12, steps=50, checkpoint_every=1)
    with pytest.raises(lm.TrainingError, match=r"at step \d+: the checkpoint of step \d+ in .* is safe; lower the"):
        lm.train(config)
    newest = lm.load(config.out)
    assert all(torch.isfinite(p).all() for p in newest.parameters())


def test_a_bound_above_the_loss(small):
    config = replace(small(), optimizer=OptimizerConfig(name="ecd", F0=100.0))
    with pytest.raises(lm.TrainingError, match=r"F0.*at step 1: no checkpoint was written yet"):
        lm.train(config)


def test_damaged_and_foreign_checkpoints(small, tmp_path):
    result = lm.train(small())
    newest = checkpoint.checkpoints(result.folder)[-1]
    with pytest.raises(lm.CheckpointError, match="does not exist"):
        lm.resume(tmp_path / "nowhere")
    with pytest.raises(lm.CheckpointError, match="holds no finished checkpoint"):
        lm.resume(tmp_path)
    with pytest.raises(lm.CheckpointError, match=r"has no checkpoint\.json"):
        lm.load(tmp_path)
    meta = (newest / "checkpoint.json").read_text()
    for text, message in (
        (meta[: len(meta) // 2], "is damaged"),
        ('{"format": "pt"}', "of another program"),
        (meta.replace('"version": 1', '"version": 99'), "format version 99"),
    ):
        (newest / "checkpoint.json").write_text(text)
        with pytest.raises(lm.CheckpointError, match=message):
            lm.resume(result.folder)
    (newest / "checkpoint.json").write_text(meta)
    (shard,) = newest.glob("*.safetensors")
    content = shard.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a safetensors file at all" * 10):
        shard.write_bytes(damaged)
        with pytest.raises(lm.CheckpointError, match="is damaged or incomplete"):
            lm.resume(result.folder)
    shard.unlink()
    with pytest.raises(lm.CheckpointError, match="is damaged or incomplete"):
        lm.resume(result.folder)


def test_a_checkpoint_of_another_model(small):
    result = lm.train(small())
    newest = checkpoint.checkpoints(result.folder)[-1]
    shape = {"vocab_size": 256, "context_length": 16, "num_heads": 2}
    with pytest.raises(lm.CheckpointError, match="has shape"):
        checkpoint.load_model(newest, lm.GPT(GPTConfig(num_layers=2, dim=8, **shape)))
    with pytest.raises(lm.CheckpointError, match=r"also holds model\.blocks\.1"):
        checkpoint.load_model(newest, lm.GPT(GPTConfig(num_layers=1, dim=16, **shape)))


def test_another_corpus_is_refused_on_resume(small, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("some text of mine, again and again.\n" * 500)
    config = small()
    config = replace(config, data=replace(config.data, corpus=str(text)))
    result = lm.train(config, progress=StopAfter(5))
    text.write_text("some other text, again and again.\n" * 500)
    with pytest.raises(ValueError, match="not the one this run was trained on"):
        lm.resume(result.folder)


def run_on_a_full_disk(line):
    """The command line, in a process that may not make a file larger than 40 kB."""
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000));"
        "from erlangen.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run([line[0], "-c", limited, *line[3:]], capture_output=True, text=True)


def test_a_full_disk_while_saving(small, command):
    """One sentence, and nothing half-written."""
    config = small()
    result = run_on_a_full_disk(command(config))
    assert result.returncode == 2
    assert "could not write checkpoint" in result.stderr and "free some space" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(config.out.glob("step-*"))


def test_a_full_disk_while_logging(small, command):
    """The checkpoints of a very small model fit; its log soon does not."""
    config = small(steps=600, checkpoint_every=50, optimizer="sgdm")
    result = run_on_a_full_disk(command(config, "--model.dim", "4", "--model.num-layers", "1"))
    assert result.returncode == 2, result.stdout
    assert "log.jsonl" in result.stderr and "free some space and resume; the checkpoint of step" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    resumed = lm.resume(config.out)
    assert resumed.finished and [r["step"] for r in resumed.records if "loss" in r] == list(range(1, 601))


def test_a_compiled_run_is_the_same_run(small):
    torch._dynamo.reset()
    broken = BreakingConfig(enabled=True)
    model = replace(small().model, num_layers=1)
    eager, compiled = (
        lm.train(small(out=name, steps=3, compile=name == "compiled", breaking=broken, model=model))
        for name in ("eager", "compiled")
    )
    for a, b in zip(eager.records, compiled.records):
        for name in ("loss", "validation_loss"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), abs=1e-5)


def test_the_command_line_ends_in_one_sentence(small, command, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    short = tmp_path / "short.txt"
    short.write_text("too short\n")
    config = small()
    for corpus in (tmp_path / "missing.txt", empty, short):
        line = command(replace(config, data=replace(config.data, corpus=str(corpus))))
        result = subprocess.run(line, capture_output=True, text=True)
        assert result.returncode == 2, corpus
        assert result.stderr.startswith("erlangen train: ") and len(result.stderr.splitlines()) == 1
    shown = subprocess.run([*line, "--traceback"], capture_output=True, text=True)
    assert "Traceback" in shown.stderr
