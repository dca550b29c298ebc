"""What is run: sizes, models to train, paths to measure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._jobs import Cells, Job, Progress, Tick, at_least_one, execute
from . import models
from .arms import ALIGNED, ARMS, makes, measure_paths
from .models import FAMILIES, Text, read_text

PAIRINGS = ("seeds", "copy")
"""Two seeds, and the control: a model and a moved copy of itself."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How much to run; the defaults are the protocol."""

    out: Path = Path("merging")
    """Folder of the report. Models and finished cells found in it are not made again."""
    csv: Path | None = None
    """Folder for copies of the tables, merging_*.csv."""
    text: Path | None = None
    """Text to learn; None for text/tinyshakespeare.txt of ERLANGEN_DATA."""
    families: tuple[str, ...] = FAMILIES
    """Families of models: gpt, llama."""
    pairs: int = 5
    """Pairs of models a family; pair p is of the seeds 2p and 2p + 1."""
    dim: int = 128
    """Width of the models, in four heads."""
    steps: int = 800
    """Steps of training."""
    batch_size: int = 16
    """Windows a step."""
    points: int = 11
    """Merge weights, even from 0 to 1."""
    windows: int = 256
    """Held-out windows."""
    workers: int | None = None
    """Processes, each on one thread; None for one a core."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.families if name not in FAMILIES]
        if unknown or not self.families:
            raise ValueError(f"families must be of {', '.join(FAMILIES)}, received {', '.join(unknown) or 'none'}")
        at_least_one(self, "pairs", "dim", "steps", "batch_size", "windows")
        if self.dim % (2 * models.NUM_HEADS):
            raise ValueError(f"dim must be a multiple of {2 * models.NUM_HEADS}, received {self.dim}")
        if self.points < 3:
            raise ValueError(f"points must be at least 3, both ends and one between them, received {self.points}")


def quick(out: Path) -> MergeConfig:
    """A size of seconds, to see that everything runs; its numbers say nothing."""
    return MergeConfig(out=out, pairs=2, dim=16, steps=2, batch_size=2, points=3, windows=2, workers=1)


# The models


def model_path(config: MergeConfig, family: str, seed: int) -> Path:
    """Where a model is kept."""
    return config.out / "models" / f"{family}-{seed}.safetensors"


def model_settings(config: MergeConfig, family: str, seed: int, vocab_size: int) -> dict[str, Any]:
    """What a model depends on, and the windows that its loss is of."""
    return {
        "study": "merging", "family": family, "seed": seed, "steps": config.steps, "batch_size": config.batch_size,
        "lr": models.LEARNING_RATE, "weight_decay": models.WEIGHT_DECAY, "windows": config.windows,
        "dim": config.dim, "layers": models.NUM_LAYERS, "heads": models.NUM_HEADS, "kv_heads": models.NUM_KV_HEADS,
        "hidden": models.hidden_dim(family, config.dim), "context": models.CONTEXT, "vocab_size": vocab_size,
    }  # fmt: skip


def model_jobs(config: MergeConfig, text: Text) -> list[Job]:
    """A job a model, pair by pair, so that a study cut short has as many pairs of each family.

    Raises:
        ValueError: the folder holds models of other settings.
    """
    jobs = []
    for seed in range(2 * config.pairs):
        for family in config.families:
            path, settings = (
                model_path(config, family, seed),
                model_settings(config, family, seed, len(text.vocabulary)),
            )
            done = models.is_kept(path, settings)
            jobs.append(Job(work=_train, arguments=(config, family, seed, settings), steps=config.steps, finished=done))
    return jobs


def _train(tick: Tick, config: MergeConfig, family: str, seed: int, settings: dict[str, Any]) -> None:
    how = {"dim": config.dim, "steps": config.steps, "batch_size": config.batch_size, "lr": models.LEARNING_RATE}
    text = read_text(config.text, config.windows)
    models.keep(model_path(config, family, seed), settings, tick, text=text, family=family, seed=seed, **how)


def train_models(config: MergeConfig, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Train the models that are not kept yet.

    Returns:
        a record a model: family, seed, ``loss`` held out, ``unigram`` (that of the frequencies of characters),
        ``parameters``, ``seconds``.

    Raises:
        FileNotFoundError: there is no text.
        ValueError: the folder holds models of other settings.
    """
    text = read_text(config.text, config.windows)
    execute(model_jobs(config, text), workers=config.workers, progress=progress)
    unigram = models.unigram_loss(text)
    records = []
    for family in config.families:
        size = sum(p.numel() for p in models.build(family, len(text.vocabulary), config.dim).parameters())
        for seed in range(2 * config.pairs):
            kept = models.found(model_path(config, family, seed))
            records.append({"family": family, "seed": seed, "unigram": unigram, "parameters": size, **kept})
    return records


# The paths


def _settings(config: MergeConfig) -> dict[str, Any]:
    """What the cells depend on, apart from which of them there are and from the models."""
    names = ("steps", "batch_size", "points", "windows")
    return {"study": "merging", "learning_rate": models.LEARNING_RATE, **{n: getattr(config, n) for n in names}}


def kept_cells(config: MergeConfig) -> Cells:
    """The cells of earlier runs.

    Raises:
        ValueError: the folder holds cells of other settings.
    """
    return Cells(config.out / "cells.jsonl", _settings(config))


def path_jobs(config: MergeConfig, cells: Cells) -> list[Job]:
    """A job an alignment, pair by pair; results go to the cells."""
    return [
        Job(
            work=_paths, arguments=(config, family, pairing, pair, arm), steps=config.points * len(makes(arm)),
            finished=all(f"{family}/{pairing}/{made}/{pair}" in cells.records for made in makes(arm)), keep=cells.add,
        )
        for pair in range(config.pairs) for pairing in PAIRINGS for family in config.families for arm in ALIGNED
    ]  # fmt: skip


def _paths(tick: Tick, config: MergeConfig, family: str, pairing: str, pair: int, arm: str) -> list[dict[str, Any]]:
    text = read_text(config.text, config.windows)
    first, second = (
        models.load(model_path(config, family, seed), family, len(text.vocabulary), config.dim)
        for seed in (2 * pair, 2 * pair + 1)
    )
    if pairing == "copy":
        second = models.moved_copy(first, seed=pair)
    found = measure_paths(arm, first, second, text.held_out, config.points, tick)
    return [
        {"key": f"{family}/{pairing}/{made}/{pair}", "family": family, "pairing": pairing, "arm": made, "seed": pair}
        | record
        for made, record in found.items()
    ]


def measure(config: MergeConfig, progress: Progress | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train and merge what is declared and not on disk yet.

    Returns:
        the records of `train_models`; and one a path: family, pairing, arm, ``seed`` (the number of the pair) and what
        `arms.measure_paths` gives.

    Raises:
        FileNotFoundError: there is no text.
        ValueError: the folder holds models or cells of other settings.
    """
    trained = train_models(config, progress)
    cells = kept_cells(config)
    execute(path_jobs(config, cells), workers=config.workers, progress=progress)
    chosen = [r for r in cells.records.values() if r["family"] in config.families and r["seed"] < config.pairs]
    order = {"family": config.families, "pairing": PAIRINGS, "arm": ARMS}
    return trained, sorted(chosen, key=lambda r: (*(o.index(r[k]) for k, o in order.items()), r["seed"]))
