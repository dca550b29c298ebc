"""The optimisers, the cells of the 2 × 2 × 2, the sizes with their grids, and the run that each case is."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from erlangen import lm
from erlangen.lm import BreakingConfig, DataConfig, GPTConfig, OptimizerConfig, TrainConfig

PUBLISHED = BreakingConfig(enabled=True, query_mean=0.5, query_std=(0.05, 0.15), value_mean=0.0, value_std=(0.05, 0.05))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One of the 2 × 2 × 2: what the attention has."""

    learned: bool
    """Learned biases of query, key, value and output."""
    mean: bool
    """The fixed mean of the unlearned query bias."""
    noise: bool
    """The noise of the unlearned query and value biases."""

    @property
    def name(self) -> str:
        """ "biased" with learned biases or "bare" without, and which of the unlearned parts are on."""
        parts = {(False, False): "none", (True, False): "mean", (False, True): "noise", (True, True): "both"}
        return f"{'biased' if self.learned else 'bare'}-{parts[self.mean, self.noise]}"

    @property
    def breaking(self) -> BreakingConfig:
        """The unlearned biases: the published ones, less what is off."""
        if not (self.mean or self.noise):
            return BreakingConfig()
        off = (0.0, 0.0)
        return replace(
            PUBLISHED,
            query_mean=PUBLISHED.query_mean if self.mean else 0.0,
            query_std=PUBLISHED.query_std if self.noise else off,
            value_std=PUBLISHED.value_std if self.noise else off,
        )


_SWITCH = (True, False)
CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (Cell(learned=a, mean=b, noise=c) for a in _SWITCH for b in _SWITCH[::-1] for c in _SWITCH[::-1])
}
PLAIN, BROKEN = "biased-none", "biased-both"
"""The two cells of the parts on optimisers and on one batch: learned biases, without and with the published ones."""

OPTIMIZERS: dict[str, OptimizerConfig] = {
    "adamw": OptimizerConfig(name="adamw"),
    "adamw-95": OptimizerConfig(name="adamw", betas=(0.9, 0.95)),
    "sgdm": OptimizerConfig(name="sgdm", momentum=0.95, nesterov=False, initial_velocity_std=0.0),
    "sgdm-random": OptimizerConfig(name="sgdm", momentum=0.95, nesterov=False, initial_velocity_std=0.1),
    "soap": OptimizerConfig(name="soap"),
    "muon": OptimizerConfig(name="muon"),
    "ecd-euler": OptimizerConfig(name="ecd", kick="euler"),
    "ecd-exact": OptimizerConfig(name="ecd", kick="exact"),
}
"""Of "adamw", the decay of the second moment is `second_moment_decay`."""

TITLES = {
    "adamw": "AdamW", "adamw-95": "AdamW, β₂ 0.95", "sgdm": "SGD with momentum",
    "sgdm-random": "SGD, random velocity", "soap": "SOAP", "muon": "Muon", "ecd-euler": "ECD, Euler kick",
    "ecd-exact": "ECD, exact kick",
}  # fmt: skip
CELL_OPTIMIZERS = ("adamw", "sgdm", "soap", "muon", "ecd-euler")
"""Those of the 2 × 2 × 2."""

REFERENCE_TOKENS, REFERENCE_DECAY = 491_520, 0.95
"""Tokens a step of the common recipe of GPT-2 small, and its decay of the second moment."""


def second_moment_decay(tokens_per_step: int) -> float:
    """AdamW's β₂ with the half-life, in tokens, of 0.95 at 491,520 tokens a step: 6.6 million tokens.

    The rule of Marek et al. (arXiv 2507.07101): β₂ = 0.95^(tokens a step / 491,520).
    """
    return REFERENCE_DECAY ** (tokens_per_step / REFERENCE_TOKENS)


def half_life(decay: float, tokens_per_step: int) -> float:
    """Tokens after which a moment has forgotten half."""
    return tokens_per_step * math.log(0.5) / math.log(decay)


SizeName = Literal["tiny", "124m", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """What every run of a size shares, and the rates that are tried."""

    recipe: Callable[[str], TrainConfig]
    """Of a key of `OPTIMIZERS`: the run, before the cell, the rate, the seed, the validations and the folder."""
    rates: Mapping[str, tuple[float, float, float]]
    """The grid of each optimiser, for all its cells."""
    batches: int
    """Validations of a run of the part on one batch, the first step's not among them; a batch for each."""
    batch_windows: int
    """Windows of a held-out batch. The fixed held-out set is all the batches."""
    timing_rounds: int
    """Steps of each case that are timed."""
    identity_steps: int
    """Steps over which a fixed mean is compared with a learned bias that starts there."""

    @property
    def eval_windows(self) -> int:
        """Windows of the fixed held-out set."""
        return self.batches * self.batch_windows


_SMALL_RATES = {
    "adamw": (3e-4, 1e-3, 3e-3), "adamw-95": (3e-4, 1e-3, 3e-3), "sgdm": (0.03, 0.1, 0.3),
    "sgdm-random": (0.03, 0.1, 0.3), "soap": (3e-3, 1e-2, 3e-2), "muon": (1e-2, 3e-2, 1e-1),
    "ecd-euler": (0.3, 1.0, 3.0), "ecd-exact": (0.3, 1.0, 3.0),
}  # fmt: skip


def _small(model: GPTConfig, steps: int, batch_size: int) -> Callable[[str], TrainConfig]:
    def recipe(optimizer: str) -> TrainConfig:
        return TrainConfig(
            data=DataConfig(), model=model, optimizer=OPTIMIZERS[optimizer], steps=steps, batch_size=batch_size,
            warmup=steps // 20, device="cpu",
        )  # fmt: skip

    return recipe


def _published(optimizer: str) -> TrainConfig:
    """The published recipe at 124M, with the published settings of each optimiser beside those that name it here."""
    preset = lm.run_preset("symmetry-breaking-124m", OPTIMIZERS[optimizer].name)
    method = preset.optimizer
    if optimizer == "sgdm":
        method = replace(method, initial_velocity_std=0.0)
    elif optimizer == "ecd-exact":  # which has no product of each tensor by itself
        method = replace(method, kick="exact", dot=None)
    return replace(preset, optimizer=method)


SIZES: dict[SizeName, Size] = {
    "tiny": Size(
        recipe=_small(GPTConfig(context_length=64, num_layers=2, num_heads=4, dim=64), steps=240, batch_size=16),
        rates=_SMALL_RATES,
        batches=60,
        batch_windows=8,
        timing_rounds=30,
        identity_steps=40,
    ),
    "124m": Size(
        recipe=_published,
        rates={
            "adamw": (1e-4, 3e-4, 1e-3), "adamw-95": (1e-4, 3e-4, 1e-3), "sgdm": (0.01, 0.03, 0.1),
            "sgdm-random": (0.01, 0.03, 0.1), "soap": (3e-4, 1e-3, 3e-3), "muon": (3e-4, 1e-3, 3e-3),
            "ecd-euler": (0.3, 1.0, 3.0), "ecd-exact": (0.1, 0.3, 1.0),
        },
        batches=122,
        batch_windows=8,
        timing_rounds=30,
        identity_steps=5,
    ),
    "seconds": Size(
        recipe=_small(GPTConfig(context_length=8, num_layers=1, num_heads=2, dim=8), steps=4, batch_size=2),
        rates=_SMALL_RATES,
        batches=2,
        batch_windows=2,
        timing_rounds=2,
        identity_steps=3,
    ),
}  # fmt: skip


def run_config(
    size: Size,
    optimizer: str,
    cell: str,
    *,
    lr: float,
    seed: int,
    out: Path,
    evaluations: int,
    corpus: str | None = None,
    steps: int | None = None,
    window_losses: bool = False,
) -> TrainConfig:
    """The run of one case.

    Args:
        size: of the model, with what it reads.
        optimizer: a key of `OPTIMIZERS`.
        cell: a key of `CELLS`.
        lr: learning rate.
        seed: of initial weights, order of the data, draws and the random velocity.
        out: folder of the run.
        evaluations: how often the held-out loss is measured, the last step with them.
        corpus: another corpus; None for that of the size.
        steps: of the optimiser; None for those of the size.
        window_losses: log the loss of every held-out window.
    """
    base, here = size.recipe(optimizer), CELLS[cell]
    steps = base.steps if steps is None else steps
    method = replace(base.optimizer, lr=lr)
    if optimizer == "adamw":
        decay = second_moment_decay(base.batch_size * base.model.context_length)
        method = replace(method, betas=(0.9 if method.betas is None else method.betas[0], decay))
    return replace(
        base,
        data=base.data if corpus is None else replace(base.data, corpus=corpus),
        model=replace(base.model, attention_bias=here.learned),
        optimizer=method,
        breaking=here.breaking,
        steps=steps,
        warmup=base.warmup * steps // base.steps,
        seed=seed,
        evaluation="fixed",
        eval_every=-(-steps // evaluations),
        eval_windows=size.eval_windows,
        log_window_losses=window_losses,
        log_charges=True,
        log_gauge=False,
        keep_checkpoints=1,
        out=out,
    )
