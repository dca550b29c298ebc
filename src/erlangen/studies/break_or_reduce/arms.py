"""The arms and the optimisers, the sizes with their grids of learning rates, and the run that each case is."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from erlangen.lm import PRESETS, BreakingConfig, DataConfig, GPTConfig, OptimizerConfig, ReductionConfig, TrainConfig

NONE = BreakingConfig()
NOISE = BreakingConfig(enabled=True, query_mean=0.0, query_std=(0.05, 0.15), value_mean=0.0, value_std=(0.05, 0.05))
MEAN = BreakingConfig(enabled=True, query_mean=0.5, query_std=(0.0, 0.0), value_mean=0.0, value_std=(0.0, 0.0))

ARMS: dict[str, tuple[BreakingConfig, ReductionConfig]] = {
    "plain": (NONE, ReductionConfig()),
    "noise": (NOISE, ReductionConfig()),
    "mean": (MEAN, ReductionConfig()),
    "horizontal": (NONE, ReductionConfig(kind="horizontal")),
    "dressed": (NONE, ReductionConfig(kind="dressed", every=10)),
    "invariant": (NONE, ReductionConfig(kind="invariant", momentum=0.9)),
}
"""What is done with the symmetry of the heads. The learning rate of the heads of "invariant" is that of the size."""

OPTIMIZERS: dict[str, OptimizerConfig] = {
    "sgdm": OptimizerConfig(name="sgdm"),
    "ecd-exact": OptimizerConfig(name="ecd", kick="exact"),
    "ecd-euler": OptimizerConfig(name="ecd", kick="euler"),
    "adamw": OptimizerConfig(name="adamw"),
    "soap": OptimizerConfig(name="soap"),
    "muon": OptimizerConfig(name="muon"),
}
TITLES = {
    "sgdm": "SGD with momentum", "ecd-exact": "ECD, exact kick", "ecd-euler": "ECD, Euler kick", "adamw": "AdamW",
    "soap": "SOAP", "muon": "Muon",
}  # fmt: skip

SizeName = Literal["tiny", "124m", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model, what it reads and how long, and the rates that are tried."""

    model: GPTConfig
    data: DataConfig = field(default_factory=DataConfig)
    rates: dict[str, tuple[float, float, float]]
    """Of each optimiser, for every arm."""
    head_rate: float
    """Of the heads, in the arm "invariant"."""
    steps: int
    batch_size: int
    accumulation: int = 1
    eval_windows: int = 256
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"


_SMALL_RATES = {
    "sgdm": (0.03, 0.1, 0.3), "ecd-exact": (0.3, 1.0, 3.0), "ecd-euler": (0.3, 1.0, 3.0),
    "adamw": (1e-3, 3e-3, 1e-2), "soap": (1e-2, 3e-2, 1e-1), "muon": (1e-2, 3e-2, 1e-1),
}  # fmt: skip

SIZES: dict[SizeName, Size] = {
    "tiny": Size(
        model=GPTConfig(context_length=64, num_layers=2, num_heads=4, dim=64, attention_bias=False),
        rates=_SMALL_RATES,
        head_rate=0.03,
        steps=400,
        batch_size=16,
    ),
    "124m": Size(
        model=replace(PRESETS["124m"], attention_bias=False),
        data=DataConfig(corpus="hf:HuggingFaceFW/fineweb-edu:sample-10BT", tokenizer="gpt2", max_tokens=150_000_000),
        rates={
            "sgdm": (0.03, 0.1, 0.3), "ecd-exact": (0.3, 1.0, 3.0), "ecd-euler": (0.3, 1.0, 3.0),
            "adamw": (3e-4, 1e-3, 3e-3), "soap": (1e-3, 3e-3, 1e-2), "muon": (3e-4, 1e-3, 3e-3),
        },
        head_rate=0.03,
        steps=2000,
        batch_size=64,
        accumulation=4,
        precision="bfloat16",
        device="auto",
    ),
    "seconds": Size(
        model=GPTConfig(context_length=8, num_layers=1, num_heads=2, dim=8, attention_bias=False),
        rates=_SMALL_RATES,
        head_rate=0.03,
        steps=3,
        batch_size=2,
        eval_windows=4,
    ),
}  # fmt: skip


def run_config(
    size: Size, optimizer: str, arm: str, *, lr: float, seed: int, steps: int, out: Path, evaluations: int
) -> TrainConfig:
    """The run of one case.

    Args:
        size: of the model, with what it reads.
        optimizer: a key of `OPTIMIZERS`.
        arm: a key of `ARMS`.
        lr: learning rate of the optimiser.
        seed: of initial weights, order of the data and draws.
        steps: of the optimiser.
        out: folder of the run.
        evaluations: how often the held-out loss is measured, the last step with them.
    """
    breaking, reduction = ARMS[arm]
    if reduction.kind == "invariant":
        reduction = replace(reduction, lr=size.head_rate)
    return TrainConfig(
        data=size.data,
        model=size.model,
        optimizer=replace(OPTIMIZERS[optimizer], lr=lr),
        breaking=breaking,
        reduction=reduction,
        steps=steps,
        batch_size=size.batch_size,
        accumulation=size.accumulation,
        warmup=steps // 20,
        precision=size.precision,
        device=size.device,
        seed=seed,
        eval_every=-(-steps // evaluations),
        eval_windows=size.eval_windows,
        log_charges=False,
        checkpoint_every=steps,
        keep_checkpoints=1,
        out=out,
    )
