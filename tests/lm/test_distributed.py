"""Two gloo processes against one, in float64: the same losses, and checkpoints that either can read."""

import json
import subprocess
from dataclasses import replace

import pytest

from erlangen import lm
from erlangen.lm import BreakingConfig

TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "erlangen", "train"]


def run_on_two(line, **options):
    result = subprocess.run([line[0], *TWO, *line[4:]], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr


def read(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(found, expected):
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    for a, b in zip(found, expected):
        for name in ("loss", "gradient_norm", "validation_loss", "validation_standard_error"):
            if name in b:
                assert a[name] == pytest.approx(b[name], abs=1e-10), (b["step"], name)
        for layer, sectors in b.get("charges", {}).items():
            for sector, heads in sectors.items():
                assert a["charges"][layer][sector] == pytest.approx(heads, abs=1e-9)


@pytest.mark.parametrize(
    ("parallel", "optimizer", "lr"), [("ddp", "ecd", 0.5), ("fsdp", "ecd", 0.5), ("fsdp", "adamw", 1e-3)]
)
def test_two_processes_equal_one_and_resume_on_one(small, command, parallel, optimizer, lr):
    """The draws of the broken model enter every loss, so equal losses mean equal draws on both ranks. ECD's step
    depends on a dot product over all parameters, so equal losses mean that it was reduced over the shards."""
    config = small(
        optimizer=optimizer, lr=lr, precision="float64", accumulation=2, breaking=BreakingConfig(enabled=True), steps=10
    )
    whole = lm.train(replace(config, out=config.out.with_name("whole")))
    # The first six steps on two processes, under the same schedule ...
    more = ["--precision", "float64", "--breaking.enabled", "--accumulation", "2", "--parallel", parallel]
    run_on_two([*command(replace(config, checkpoint_every=6)), *more])
    assert_same(read(config.out), whole.records)
    # ... and the last four on one, from what the two had written.
    newest = config.out / "step-00000010"
    assert newest.is_dir()
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    resumed = lm.resume(config.out)
    assert resumed.finished
    assert_same(resumed.records, whole.records)


def test_processes_agree_on_a_folder(small, command, tmp_path):
    line = command(small(steps=2))
    line[line.index("--out") : line.index("--out") + 2] = []
    run_on_two(line, cwd=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(list(folder.glob("step-*/*.safetensors"))) == 2
    assert lm.load(folder).config.dim == 16


def test_a_batch_that_does_not_divide(small, command):
    line = command(small(), "--batch-size", "5")
    result = subprocess.run([line[0], *TWO, *line[4:]], capture_output=True, text=True)
    assert result.returncode != 0 and "multiple of processes times accumulation" in result.stderr
