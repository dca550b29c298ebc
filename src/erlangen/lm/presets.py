"""Whole runs by name: the sizes of `erlangen.lm.PRESETS`, and the protocol of arXiv 2601.22257.

"symmetry-breaking-124m" is the protocol of the code published with "Symmetry Breaking in Transformers for Efficient and
Interpretable Training" (github.com/evasilverstein/symmetry-breaking-files), with the published settings of each
optimiser. "symmetry-breaking-124m-sound" is the run that we recommend in its place: the same data, number of tokens and
size. docs/training.md explains each difference, and where the letter of the protocol cannot be kept.
"""

from dataclasses import replace

from erlangen import optim

from .config import PRESETS, GPTConfig
from .settings import BreakingConfig, DataConfig, OptimizerConfig, OptimizerName, TrainConfig

RUN_PRESETS: tuple[str, ...] = (*PRESETS, "symmetry-breaking-124m", "symmetry-breaking-124m-sound")
"""The names that `run_preset` takes."""

_SHAPE = GPTConfig(vocab_size=50304, context_length=512, num_layers=12, num_heads=12, dim=768, mlp="prelu")

# Of 600 million tokens the runs read 500 million: five shards of 100 million to train on and one to validate on fit.
_DATA = DataConfig(
    corpus="hf:HuggingFaceFW/fineweb-edu:sample-10BT",
    tokenizer="gpt2",
    max_tokens=600_000_000,
    validation_fraction=0.01,
    order="sequential",
)

_BROKEN = BreakingConfig(
    enabled=True,
    query_mean=0.5,
    query_std=(0.05, 0.15),
    value_mean=0.0,
    value_std=(0.05, 0.05),
    per_head=False,
    redraw="forward",
    evaluate_with="last",
)

# For Muon there are no published settings: these are of the library, as are those of the sound run.
_PUBLISHED: dict[str, OptimizerConfig] = {
    "ecd": OptimizerConfig(
        name="ecd", lr=1.0, weight_decay=0.0, decay="all", eta=100.0, F0=2.0, nu=0.0, kick="euler", dot="per_tensor"
    ),
    "adamw": OptimizerConfig(name="adamw", lr=1e-4, weight_decay=0.01, decay="all", betas=(0.9, 0.95)),
    "sgdm": OptimizerConfig(
        name="sgdm", lr=0.03, weight_decay=0.0, decay="all", momentum=0.95, nesterov=True, initial_velocity_std=0.1
    ),
    "soap": OptimizerConfig(name="soap", lr=3e-4, weight_decay=0.01, decay="all", betas=(0.95, 0.95)),
    "muon": OptimizerConfig(name="muon", lr=1e-3, weight_decay=0.1, decay="matrices", momentum=0.95),
}

# A half-life of 6.6 million tokens, that of 0.95 at 491,520 tokens a step, at our 32,768 (arXiv 2507.07101).
_BETA2 = 0.9966

_SOUND: dict[str, OptimizerConfig] = {
    "ecd": OptimizerConfig(name="ecd", lr=1.0, weight_decay=0.0, eta=100.0, F0=0.0, nu=0.0, kick="exact", dot="global"),
    "adamw": OptimizerConfig(name="adamw", lr=6e-4, weight_decay=0.1, betas=(0.9, _BETA2)),
    "sgdm": OptimizerConfig(
        name="sgdm", lr=0.03, weight_decay=0.0, momentum=0.95, nesterov=True, initial_velocity_std=0.0
    ),
    "soap": OptimizerConfig(name="soap", lr=1e-3, weight_decay=0.01, betas=(0.95, _BETA2)),
    "muon": OptimizerConfig(name="muon", lr=1e-3, weight_decay=0.1, momentum=0.95, betas=(0.9, _BETA2)),
}


def run_preset(name: str, optimizer: OptimizerName | None = None) -> TrainConfig:
    """A whole run by name; `dataclasses.replace` changes it.

    Args:
        name: one of `RUN_PRESETS`. A size ("tiny", "small", "medium", "124m") is a run of the defaults with a model of
            that size.
        optimizer: its settings in that run. None: ECD in the protocol and its sound version, AdamW at a size.

    Raises:
        ValueError: no preset, or no optimiser, has this name.
    """
    if name not in RUN_PRESETS:
        raise ValueError(f"no preset is called {name!r}: choose one of {', '.join(RUN_PRESETS)}")
    if optimizer is not None and optimizer not in optim.OPTIMIZERS:
        raise ValueError(f"no optimiser is called {optimizer!r}: choose one of {', '.join(optim.OPTIMIZERS)}")
    if name in PRESETS:
        return TrainConfig(model=PRESETS[name], optimizer=OptimizerConfig(name=optimizer or "adamw"))
    published = TrainConfig(
        data=_DATA,
        model=_SHAPE,
        optimizer=_PUBLISHED[optimizer or "ecd"],
        breaking=_BROKEN,
        steps=122_071,
        batch_size=8,
        schedule="constant",
        precision="bfloat16",
        tf32=True,
        seed=42,
        eval_every=1000,
        eval_windows=8,
        evaluation="next",
        checkpoint_every=10_000,
    )
    if name == "symmetry-breaking-124m":
        return published
    return replace(
        published,
        data=replace(_DATA, order="shuffled"),
        model=replace(_SHAPE, mlp="gelu"),
        optimizer=_SOUND[optimizer or "ecd"],
        breaking=replace(_BROKEN, evaluate_with="mean"),
        steps=15_259,
        batch_size=64,
        accumulation=8,
        schedule="cosine",
        warmup=300,
        clip=1.0,
        tf32=False,
        seed=0,
        eval_every=500,
        eval_windows=2048,
        evaluation="fixed",
        log_window_losses=True,
        checkpoint_every=1000,
    )
