"""Training runs of `erlangen.lm` as jobs: stopped, found again and gone on with."""

import functools
import json
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from erlangen import lm
from erlangen.lm import DataConfig, TrainConfig
from erlangen.lm.checkpoint import checkpoints
from erlangen.lm.logs import read_jsonl
from erlangen.lm.settings import from_dict, to_dict

from ._jobs import Job, Tick

_FAILURE = "failure.json"


@functools.cache
def corpus(data: DataConfig) -> lm.Corpus:
    """What a run reads, once a process.

    Raises:
        ValueError, FileNotFoundError: it cannot be read.
    """
    return lm.load_corpus(
        data.corpus,
        lm.load_tokenizer(data.tokenizer),
        validation_fraction=data.validation_fraction,
        max_tokens=data.max_tokens,
        text_field=data.text_field,
    )


def jobs(configs: Sequence[TrainConfig], *, log_only: bool = False) -> list[Job]:
    """A job a run.

    Args:
        configs: each with a folder of its own.
        log_only: the logs are all that is wanted. The checkpoints of a run are removed at its end, and a run that
            cannot go on (`erlangen.lm.TrainingError`, as of a loss that is not finite) is finished too: `failure`.

    Raises:
        ValueError: another run is in the folder of one.
    """
    return [
        Job(work=_work, arguments=(config, log_only), steps=config.steps, finished=is_finished(config))
        for config in configs
    ]


def _work(tick: Tick, config: TrainConfig, log_only: bool) -> None:
    """Run, or go on with, one run in a worker. Told to stop, it leaves a checkpoint."""
    assert config.out is not None

    def progress(step: int, record: Mapping[str, Any]) -> None:
        if tick(step):
            os.kill(os.getpid(), signal.SIGTERM)  # which the loop hears; a second SIGINT would cut the step short

    try:
        if checkpoints(config.out):
            result = lm.resume(config.out, corpus=corpus(config.data), progress=progress)
        else:
            result = lm.train(config, corpus=corpus(config.data), progress=progress)
    except lm.TrainingError as error:
        if not log_only or isinstance(error.__cause__, OSError):  # a full disk says nothing of the run
            raise
        (config.out / _FAILURE).write_text(json.dumps({"reason": str(error)}) + "\n")
    else:
        if not result.finished:
            raise KeyboardInterrupt
    if log_only:
        for folder in checkpoints(config.out):
            shutil.rmtree(folder)


def _folder(config: TrainConfig) -> Path:
    assert config.out is not None
    return config.out


def failure(config: TrainConfig) -> str | None:
    """Why a run could not go on; None if it did."""
    path = _folder(config) / _FAILURE
    return json.loads(path.read_text())["reason"] if path.exists() else None


def records(config: TrainConfig) -> list[dict[str, Any]]:
    """The log of a run."""
    return read_jsonl(_folder(config) / "log.jsonl")


def is_finished(config: TrainConfig) -> bool:
    """Whether this very run is on disk, whole, or as far as it could go.

    Raises:
        ValueError: another run is there.
    """
    folder = _folder(config)
    path = folder / "config.json"
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    if config.model.vocab_size is None:  # the tokenizer's
        config = replace(config, model=replace(config.model, vocab_size=found["model"]["vocab_size"]))
    # What a run of an older version does not name has the default that it ran with.
    if to_dict(from_dict(TrainConfig, found)) != to_dict(config):
        raise ValueError(f"{folder} holds a run with other settings: remove {folder.parent} or choose another folder")
    if failure(config) is not None:
        return True
    return (folder / "log.jsonl").exists() and any(
        record["step"] == config.steps and "validation_loss" in record for record in records(config)
    )
