"""What a training run is made of: one dataclass, saved beside its results and read back to resume."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .config import GPTConfig

OptimizerName = Literal["adamw", "sgdm", "soap", "ecd", "muon"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the model reads."""

    corpus: str = "stdlib"
    """A text file, a directory, "stdlib" (the Python standard library's source), "hf:NAME[:CONFIG]" (a Hugging Face
    data set, streamed), or .bin shards (a file, a directory or a quoted glob)."""
    tokenizer: str = "bytes"
    """"bytes", "gpt2", or the path of a tokenizers JSON file. For .bin shards: the one that made them."""
    validation_fraction: float = 0.1
    """Share of the corpus held out."""
    max_tokens: int | None = None
    """Stop reading the corpus after so many tokens."""
    order: Literal["shuffled", "sequential"] = "shuffled"
    """Windows of an epoch in a random order, or one after another as they stand in the corpus: a batch is then
    batch_size * context_length contiguous tokens."""
    text_field: str = "text"
    """The field of a Hugging Face data set that holds the text."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser. A field left at None takes the optimiser's own default; one it does not have is an error."""

    name: OptimizerName = "adamw"
    """AdamW, SGD with momentum, SOAP, energy-conserving descent, or Muon."""
    lr: float | None = None
    """Learning rate, before the schedule."""
    weight_decay: float | None = None
    """Weight decay, of the parameters that `decay` names."""
    decay: Literal["matrices", "all"] = "matrices"
    """What weight decay is on: matrices (embeddings included), or biases, norms and slopes too."""
    betas: tuple[float, float] | None = None
    """AdamW, SOAP: decay of the first and second moment."""
    momentum: float | None = None
    """SGDM, Muon: decay of the momentum."""
    nesterov: bool | None = None
    """SGDM: look ahead along the momentum."""
    initial_velocity_std: float | None = None
    """SGDM: deviation of the momentum's coordinates at the start; 0 starts from rest."""
    eta: float | None = None
    """ECD: how strongly low loss is preferred."""
    F0: float | None = None
    """ECD: a bound that the loss stays above."""
    nu: float | None = None
    """ECD: size of the random turn after each step."""
    kick: Literal["exact", "euler"] | None = None
    """ECD: the norm-preserving kick, or the published one."""
    dot: Literal["global", "per_tensor"] | None = None
    """ECD, Euler kick: product of velocity and gradient over all parameters, or over each by itself, as published."""

    def settings(self) -> dict[str, Any]:
        """The fields that were given, as `erlangen.optim.create` takes them: less the name and `decay`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None and name not in ("name", "decay")}


@dataclass(frozen=True, kw_only=True)
class BreakingConfig:
    """Unlearned query and value biases (`erlangen.breaking.break_symmetry`)."""

    enabled: bool = False
    """Break the rotational symmetry of the heads."""
    query_mean: float = 0.5
    """Mean of every coordinate of the query bias."""
    query_std: tuple[float, float] = (0.05, 0.15)
    """Its deviation, at the first and the last coordinate of a head."""
    value_mean: float = 0.0
    """Mean of every coordinate of the value bias."""
    value_std: tuple[float, float] = (0.05, 0.05)
    """Its deviation, at the first and the last coordinate of a head."""
    per_head: bool = False
    """A vector of its own for each head, rather than one shared by the heads of a layer."""
    redraw: Literal["forward", "step"] = "forward"
    """Draw on every training forward, or once a step of the optimiser."""
    evaluate_with: Literal["mean", "last"] = "mean"
    """Validate during training with the mean of the biases, or with the last draw, as published. A model that is
    loaded uses the mean."""

    def settings(self) -> dict[str, Any]:
        """The arguments of `erlangen.breaking.break_symmetry`, less the seed."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if name not in ("enabled", "evaluate_with")}


@dataclass(frozen=True, kw_only=True)
class ReductionConfig:
    """How the gauge directions of the heads, in which the function does not change, are kept out of training."""

    kind: Literal["none", "horizontal", "dressed", "chart", "invariant"] = "none"
    """horizontal: the part of each step along the gauge is taken back;
    dressed: heads are brought to balanced form now and then, the optimiser's state along;
    chart: every head keeps an identity block that does not move;
    invariant: descent under a metric that no gauge changes trains the heads, the optimiser everything else."""
    every: int = 10
    """Dressed: steps between two dressings."""
    lr: float | None = None
    """Invariant: learning rate of the heads, before the schedule. None: the optimiser's."""
    momentum: float = 0.9
    """Invariant: decay of the momentum of the heads."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"reduction.every counts steps and must be at least 1, received {self.every}")
        if self.lr is not None and not 0.0 <= self.lr < math.inf:
            raise ValueError(
                f"reduction.lr must be a finite number, at least 0, or None for the optimiser's, received {self.lr}"
            )
        if self.lr is not None and self.kind != "invariant":
            raise ValueError(
                f"reduction.lr is the learning rate of the heads under kind 'invariant', and kind {self.kind!r} has "
                "none of its own: leave it out, or set optimizer.lr"
            )
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"reduction.momentum must be at least 0 and less than 1, received {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Two runs of one config on one machine give the same losses, bit for bit on CPU."""

    data: DataConfig = field(default_factory=DataConfig)
    model: GPTConfig = field(default_factory=GPTConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    breaking: BreakingConfig = field(default_factory=BreakingConfig)
    reduction: ReductionConfig = field(default_factory=ReductionConfig)
    steps: int = 1000
    """Steps of the optimiser."""
    batch_size: int = 16
    """Windows of context_length tokens a step, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches a step."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: int = 0
    """Steps over which the learning rate rises from 0."""
    final_lr: float = 0.1
    """Learning rate at the end, as a share of the largest."""
    clip: float | None = None
    """Largest norm of the gradient; None does not clip."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """float32, bfloat16 autocast over float32 weights, or float64."""
    tf32: bool = False
    """On a GPU, let products of float32 matrices round their factors to TF32 while the run lasts."""
    compile: bool = False
    """Compile the model with torch.compile."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: copies of the model, or shards of it."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""
    seed: int = 0
    """Of the initial weights, the order of the data and the draws of the biases."""
    eval_every: int = 100
    """Steps between two validations; the last step always has one."""
    eval_windows: int = 256
    """Validate on so many windows (or on all there are, if fewer)."""
    evaluation: Literal["fixed", "next"] = "fixed"
    """Validate on the same windows each time, or each time on the next ones of the held-out text, as published. Losses
    of different windows cannot be compared to a tenth of a nat."""
    log_window_losses: bool = False
    """Log at each validation the loss of every window, to five digits."""
    log_charges: bool = True
    """Log the Noether charges of the heads at each validation."""
    log_gauge: bool = True
    """Log at each validation how much of the step went in gauge directions, and how far the heads are from the start
    (`erlangen.gauge.GaugeMonitor`)."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; the end of the run and a stop always have one."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest ones."""
    track: str = "none"
    """"none", "tensorboard", or a module with wandb's init, log and finish, such as wandb or trackio."""
    out: Path | None = None
    """Folder of the run. None: runs/ and a name made of the time, the optimiser, the breaking and the reduction."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "eval_every", "eval_windows", "checkpoint_every",
                     "keep_checkpoints"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, received {getattr(self, name)}")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size must be a multiple of accumulation, received {self.batch_size} windows "
                f"in {self.accumulation} micro-batches"
            )
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup must lie between 0 and steps = {self.steps}, received {self.warmup}")
        if not 0.0 <= self.final_lr <= 1.0:
            raise ValueError(f"final_lr is a share of the learning rate, between 0 and 1, received {self.final_lr}")
        if self.clip is not None and not self.clip > 0.0:
            raise ValueError(f"clip must be positive, or None not to clip, received {self.clip}")
        if self.reduction.kind != "none":
            if self.breaking.enabled:
                raise ValueError(
                    "a model whose symmetry is broken has no gauge directions to keep out: choose breaking or "
                    f"reduction {self.reduction.kind!r}, not both"
                )
            if self.parallel == "fsdp":
                raise ValueError(
                    f"reduction {self.reduction.kind!r} needs whole heads on every process, and parallel 'fsdp' cuts "
                    "them up: use parallel 'ddp'"
                )

    def lr_factor(self, step: int) -> float:
        """The learning rate of a step (counted from 0), as a share of the largest."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        left = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1.0 - progress
        return self.final_lr + (1.0 - self.final_lr) * left


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON-ready values."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(config).items()
    }


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """A config dataclass from what `to_dict` gave (through JSON or not).

    Raises:
        ValueError: a field is unknown, or its value is not one the field takes.
    """
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
    return cls(**{name: _read(f"{cls.__name__}.{name}", hints[name], value) for name, value in values.items()})


def _read(name: str, hint: Any, value: Any) -> Any:
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _read(name, next(h for h in get_args(hint) if h is not type(None)), value)
    if origin is Literal:
        if value in get_args(hint):
            return value
    elif origin is tuple:
        return tuple(value)
    elif hint is Path:
        return Path(value)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint):
        return value
    raise ValueError(f"{name} cannot be {value!r}")
