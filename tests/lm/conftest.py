"""A small corpus and a small run, shared by the tests of training."""

import random
import sys
from dataclasses import replace

import pytest

from erlangen.lm import DataConfig, GPTConfig, OptimizerConfig, TrainConfig


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Forty thousand characters of sentences with some structure to learn."""
    generator = random.Random(0)
    words = ["the", "group", "acts", "on", "a", "head", "and", "turns", "it", "by", "some", "angle"]
    lines = [" ".join(generator.choices(words, k=8)) + ".\n" for _ in range(1000)]
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(lines))
    return path


@pytest.fixture
def small(text_file, tmp_path):
    """A function that makes the config of a run of a few seconds."""

    def make(out="run", optimizer="adamw", lr=1e-3, **fields):
        config = TrainConfig(
            data=DataConfig(corpus=str(text_file)),
            model=GPTConfig(context_length=16, num_layers=2, num_heads=2, dim=16),
            optimizer=OptimizerConfig(name=optimizer, lr=lr),
            steps=12,
            batch_size=4,
            eval_every=5,
            eval_windows=16,
            checkpoint_every=4,
            out=tmp_path / out,
        )
        return replace(config, **fields)

    return make


@pytest.fixture
def command():
    """A function that gives the command line of a small run."""

    def make(config, *more):
        """The command line of a run; every option that differs from the defaults."""
        return [
            sys.executable, "-m", "erlangen", "train", "--out", str(config.out), "--data.corpus", config.data.corpus,
            "--model.context-length", "16", "--model.num-layers", "2", "--model.num-heads", "2", "--model.dim", "16",
            "--steps", str(config.steps), "--batch-size", "4", "--eval-every", "5", "--eval-windows", "16",
            "--checkpoint-every", str(config.checkpoint_every), "--optimizer.name", config.optimizer.name,
            "--optimizer.lr", str(config.optimizer.lr), *more,
        ]  # fmt: skip

    return make
