"""The training loop: one for every optimiser, model and number of processes."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erlangen import breaking, gauge, optim

from . import checkpoint
from .config import GPTConfig
from .corpus import Corpus, load_corpus
from .distributed import World, world
from .logs import JsonLines, Tracker, find_tracker
from .model import GPT, at_least_float32
from .settings import BreakingConfig, OptimizerConfig, ReductionConfig, TrainConfig, from_dict, to_dict
from .tokenizers import load_tokenizer
from .windows import SequentialWindows, TrainingWindows, validation_windows


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why, what is safe and what to do."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run left behind.

    Attributes:
        folder: the run's folder.
        finished: False when it was stopped before its last step; it can be resumed.
        records: the log, one dict a line: "step" and either "loss" (training) or "validation_loss",
            "validation_standard_error", "validation_windows" and, where asked, "validation_first_window",
            "window_losses", "charges" and "gauge".
        model: the trained model, in evaluation mode.
    """

    folder: Path
    finished: bool
    records: list[dict[str, Any]]
    model: nn.Module

    @property
    def validation(self) -> list[dict[str, Any]]:
        """The validation records, in order."""
        return [record for record in self.records if "validation_loss" in record]


Progress = Callable[[int, Mapping[str, Any]], None]
"""Called after each step with the number of finished steps and the newest numbers."""


ReadingProgress = Callable[[int, int], None]
"""Called with the tokens read and the tokens wanted of a data set that is streamed."""


def build_model(config: GPTConfig, broken: BreakingConfig, *, seed: int) -> GPT:
    """A model with the initial weights that ``seed`` gives, broken if asked."""
    model = GPT(config, generator=torch.Generator().manual_seed(seed))
    if broken.enabled:
        breaking.break_symmetry(model, seed=seed, **broken.settings())
    return model


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, reduction: ReductionConfig | None = None, *, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimiser of a model: weight decay where `OptimizerConfig.decay` puts it, names handed over for those who
    need them; ``seed`` is that of a random initial velocity.

    A reduction of kind "invariant" trains the heads by `erlangen.gauge.QuotientSGD`, without weight decay, and leaves
    the rest to the optimiser. The other kinds are put on it by `reduce_optimizer`.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if reduction is None or reduction.kind != "invariant":
        return _create(config, named, seed)
    lr = _learning_rate(config) if reduction.lr is None else reduction.lr
    return gauge.QuotientSGD(
        model,
        lr=lr,
        momentum=reduction.momentum,
        sectors=gauge.free_sectors(model),
        rest=lambda named: _create(config, named, seed),
    )


def reduce_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, reduction: ReductionConfig) -> None:
    """Make an optimiser of a model keep out its gauge directions; "dressed" and "chart" move the weights to their
    representative at once.

    Where queries and keys are normalised, which leaves them no linear gauge, only values and outputs are treated.
    """
    if reduction.kind == "horizontal":
        gauge.horizontal(optimizer, model, sectors=gauge.free_sectors(model))
    elif reduction.kind == "dressed":
        gauge.dressed(optimizer, model, every=reduction.every, sectors=gauge.free_sectors(model))
    elif reduction.kind == "chart":
        gauge.charted(optimizer, model, sectors=gauge.free_sectors(model))


def _create(config: OptimizerConfig, named: Iterable[tuple[str, nn.Parameter]], seed: int) -> torch.optim.Optimizer:
    settings, named = config.settings(), list(named)
    if config.initial_velocity_std:
        settings["seed"] = seed
    if config.weight_decay == 0.0 or config.decay == "all":
        return optim.create(config.name, named, **settings)
    groups = [
        {"params": [(name, parameter) for name, parameter in named if parameter.ndim >= 2]},
        {"params": [(name, parameter) for name, parameter in named if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return optim.create(config.name, [group for group in groups if group["params"]], **settings)


def _learning_rate(config: OptimizerConfig) -> float:
    return optim.OPTIMIZERS[config.name].settings["lr"] if config.lr is None else config.lr


def load(folder: str | Path) -> GPT:
    """The model of a run's folder (its newest checkpoint) or of one checkpoint folder, on the CPU, for evaluation.

    A model that was trained broken comes back broken: in evaluation it uses the mean of its biases.

    Raises:
        erlangen.lm.CheckpointError: there is no checkpoint, or it is damaged or foreign.
    """
    folder = Path(folder)
    found = checkpoint.checkpoints(folder)
    newest = found[-1] if found else folder
    meta = checkpoint.read_meta(newest)
    config: TrainConfig = from_dict(TrainConfig, meta["config"])
    model = build_model(config.model, config.breaking, seed=config.seed)
    if config.precision == "float64":
        model.double()
    checkpoint.load_model(newest, model)
    return model.eval()


def evaluate(
    model: nn.Module,
    windows: Tensor,
    *,
    batch_size: int = 32,
    world: World | None = None,
    precision: str = "float32",
) -> tuple[float, float]:
    """Mean loss over windows, and its standard error.

    Args:
        model: called as ``model(tokens)``, in evaluation mode while this lasts.
        windows: int64 [n, T + 1], the same on every process.
        batch_size: windows a forward.
        world: processes to share the work with.

    Returns:
        the mean over windows of their mean cross-entropy in nats a token, and the standard deviation over windows
        divided by √n (windows taken as independent); NaN for one window.
    """
    return _mean_and_error(window_losses(model, windows, batch_size=batch_size, world=world, precision=precision))


def _mean_and_error(losses: Tensor) -> tuple[float, float]:
    error = (losses.std() / math.sqrt(len(losses))).item() if len(losses) > 1 else math.nan
    return losses.mean().item(), error


@torch.no_grad()
def window_losses(
    model: nn.Module,
    windows: Tensor,
    *,
    batch_size: int = 32,
    world: World | None = None,
    precision: str = "float32",
) -> Tensor:
    """The mean cross-entropy of each window in nats a token, float64 [n]; arguments as for `evaluate`."""
    world = world or World(0, 1, next(model.parameters()).device)
    was_training = model.training
    model.eval()
    losses = torch.zeros(len(windows), dtype=torch.float64, device=world.device)
    mine = torch.arange(len(windows))[world.rank :: world.size]
    most = -(-len(windows) // world.size)
    try:
        for start in range(0, most, batch_size):
            index = mine[start : start + batch_size]
            # Sharded parameters need every process to run as many forwards: one that has run out repeats a window.
            batch = (windows[index] if len(index) else windows[:1]).to(world.device)
            with _autocast(world.device, precision):
                logits = model(batch[:, :-1])[0]
            loss = F.cross_entropy(at_least_float32(logits).flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            if len(index):
                losses[index] = loss.view(len(index), -1).double().mean(dim=1)
    finally:
        model.train(was_training)
    return world.sum(losses)


@contextmanager
def _last_draw(model: nn.Module, use: bool) -> Iterator[None]:
    """Have a broken model evaluate with its last training draw while this lasts, rather than with the mean."""
    biases = getattr(model, "symmetry_breaking", None)
    if not use or biases is None:
        yield
        return
    biases.evaluate_with = "last"
    try:
        yield
    finally:
        biases.evaluate_with = "mean"


@contextmanager
def _tf32(use: bool) -> Iterator[None]:
    if not use:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _autocast(device: torch.device, precision: str) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C stops at once. Outside the main thread, nobody sets it."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    config: TrainConfig,
    *,
    corpus: Corpus | None = None,
    progress: Progress | None = None,
    reading: ReadingProgress | None = None,
    tracker: Tracker | None = None,
) -> TrainResult:
    """Train a model from its first step.

    Args:
        config: the run.
        corpus: read already; None: what config.data says.
        progress: called after each step.
        reading: called while a data set is streamed, which can take long.
        tracker: used instead of the one config.track names.

    Raises:
        ValueError: the config, the corpus or the folder will not do.
        TrainingError: the run cannot go on (a loss that is not finite, say).
        erlangen.lm.CheckpointError: a checkpoint could not be written.
    """
    return _train(config, None, corpus, progress, reading, tracker)


def resume(
    folder: str | Path,
    *,
    corpus: Corpus | None = None,
    progress: Progress | None = None,
    reading: ReadingProgress | None = None,
    tracker: Tracker | None = None,
) -> TrainResult:
    """Go on with a run from its newest checkpoint; on CPU the losses are those of an uninterrupted run, bit for bit.

    Raises:
        erlangen.lm.CheckpointError: there is no checkpoint, or it is damaged or foreign.
        ValueError, TrainingError: as for `train`.
    """
    folder = Path(folder)
    found = checkpoint.checkpoints(folder)
    if not found:
        what = "holds no finished checkpoint" if folder.is_dir() else "does not exist"
        raise checkpoint.CheckpointError(f"cannot resume: {folder} {what}")
    try:
        config = from_dict(TrainConfig, checkpoint.read_meta(found[-1])["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(f"cannot resume from {found[-1]}: {error}") from error
    return _train(replace(config, out=folder), found[-1], corpus, progress, reading, tracker)


def _gauge_scalars(gauge_record: Mapping[str, Any]) -> dict[str, float]:
    """What `GaugeMonitor.read` gave, as one number a name: of the model, and of each sector of a layer (mean)."""
    scalars = {f"gauge/{name}": value for name, value in gauge_record.items() if isinstance(value, float)}
    for layer, sectors in gauge_record.get("layers", {}).items():
        for sector, quantities in sectors.items():
            for name, heads in quantities.items():
                scalars[f"gauge/{name}/{sector}/{layer}"] = sum(heads) / len(heads)
    return scalars


def _default_name(config: TrainConfig) -> str:
    symmetry = "-broken" if config.breaking.enabled else ""
    if config.reduction.kind != "none":
        symmetry = f"-{config.reduction.kind}"
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{config.optimizer.name}{symmetry}"


def _train(
    config: TrainConfig,
    from_checkpoint: Path | None,
    corpus: Corpus | None,
    progress: Progress | None,
    reading: ReadingProgress | None,
    tracker: Tracker | None,
) -> TrainResult:
    with world(config.device) as here:
        folder = Path(here.agree(str(config.out or Path("runs") / _default_name(config))))
        if from_checkpoint is None and checkpoint.checkpoints(folder):
            raise ValueError(f"{folder} holds a run already: resume it, or choose another folder")
        config = replace(config, out=folder)
        if config.batch_size % (here.size * config.accumulation):
            raise ValueError(
                f"batch_size must be a multiple of processes times accumulation = {here.size} * {config.accumulation}, "
                f"received {config.batch_size}"
            )
        if corpus is None:
            corpus = _read_corpus(config, here, reading)
        config = _with_vocabulary(config, corpus)
        run = _Run(config, corpus, here)
        if from_checkpoint is not None:
            run.load(from_checkpoint)
        run.open_logs(tracker)
        with stop_on_signal() as stop, _tf32(config.tf32 and here.device.type == "cuda"):
            try:
                run.loop(stop, progress)
            finally:
                run.close_logs()
        return TrainResult(
            folder=run.folder, finished=run.step == config.steps, records=run.records, model=run.model.eval()
        )


def _read_corpus(config: TrainConfig, here: World, reading: ReadingProgress | None) -> Corpus:
    data = config.data
    arguments: dict[str, Any] = {
        "validation_fraction": data.validation_fraction,
        "max_tokens": data.max_tokens,
        "text_field": data.text_field,
        "progress": reading,
    }
    if not here.is_first:  # the first process may have to download and write shards, which the others then read
        here.barrier()
    corpus = load_corpus(data.corpus, load_tokenizer(data.tokenizer), **arguments)
    if here.is_first:
        here.barrier()
    return corpus


def _with_vocabulary(config: TrainConfig, corpus: Corpus) -> TrainConfig:
    size = config.model.vocab_size
    if size is None:
        return replace(config, model=replace(config.model, vocab_size=-(-corpus.vocab_size // 64) * 64))
    if size < corpus.vocab_size:
        raise ValueError(
            f"the tokenizer {corpus.tokenizer_name} has {corpus.vocab_size} tokens and the model only {size}: "
            "leave vocab_size out, or make it as large"
        )
    return config


class _Run:
    """The state of one run: what a checkpoint holds, and the step that advances it."""

    def __init__(self, config: TrainConfig, corpus: Corpus, here: World) -> None:
        assert config.out is not None
        self.config, self.corpus, self.world = config, corpus, here
        self.folder = config.out
        self.step = 0
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, config.breaking, seed=config.seed)
        if config.precision == "float64":
            self.model.double()
        self.model.to(here.device)
        self.model.gradient_checkpointing = config.gradient_checkpointing
        self.wrapped = here.wrap(self.model, config.parallel, compile=config.compile)
        self.optimizer = build_optimizer(config.optimizer, self.model, config.reduction, seed=config.seed)
        self.monitor: gauge.GaugeMonitor | None = None
        if config.reduction.kind == "dressed":
            # The step is measured before it is dressed: what the optimiser did, not what a dressing takes back.
            self.optimizer.register_step_post_hook(lambda *_: self._measured())
        reduce_optimizer(self.optimizer, self.model, config.reduction)
        # Under fsdp no process has the weights as a whole.
        if config.log_gauge and not (here.size > 1 and config.parallel == "fsdp"):
            self.monitor = gauge.GaugeMonitor(self.model)
        self.lr = _learning_rate(config.optimizer)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        length = config.model.context_length
        if config.data.order == "sequential":
            self.windows = SequentialWindows(corpus.train, length)
        else:
            self.windows = TrainingWindows(corpus.train, length, seed=config.seed)
        self.validation: Tensor | SequentialWindows
        if config.evaluation == "next":
            self.validation = SequentialWindows(corpus.validation, length)
        else:
            self.validation = validation_windows(corpus.validation, length, config.eval_windows)
        self.saved_at: int | None = None
        self.records: list[dict[str, Any]] = []
        self.log: JsonLines | None = None
        self.tracker: Tracker | None = None

    # Saving and logging

    def load(self, path: Path) -> None:
        meta = checkpoint.load(path, model=self.model, optimizer=self.optimizer, world=self.world)
        if meta["corpus"] != self.corpus.train.fingerprint():
            raise ValueError(
                f"the corpus is not the one this run was trained on ({meta['corpus_name']}): put that one back, "
                "or start a new run"
            )
        self.step = self.saved_at = meta["step"]

    def save(self) -> None:
        if self.saved_at == self.step:
            return
        checkpoint.save(
            self.folder,
            step=self.step,
            model=self.model,
            optimizer=self.optimizer,
            extra={
                "config": to_dict(self.config),
                "corpus": self.corpus.train.fingerprint(),
                "corpus_name": self.corpus.name,
                "tokenizer": self.corpus.tokenizer_name,
                "torch": torch.__version__,
            },
            keep=self.config.keep_checkpoints,
            world=self.world,
        )
        self.saved_at = self.step

    def open_logs(self, tracker: Tracker | None) -> None:
        if not self.world.is_first:
            return
        self.tracker = tracker or find_tracker(self.config.track, self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(to_dict(self.config), indent=2) + "\n")
        # A run that left no checkpoint starts over, and so does its log.
        self.log = JsonLines(self.folder / "log.jsonl", keep_until=self.step if self.saved_at is not None else None)
        self.records = self.log.records
        if self.tracker is not None:
            self.tracker.init(project="erlangen", config=to_dict(self.config))

    def close_logs(self) -> None:
        if self.log is not None:
            self.log.close()
        if self.tracker is not None:
            self.tracker.finish()

    def write(self, record: Mapping[str, Any]) -> None:
        if self.log is not None:
            try:
                self.log.write(record)
            except OSError as error:
                raise TrainingError(
                    f"could not write {self.folder / 'log.jsonl'} ({error}): free some space and resume; "
                    f"{self._what_is_safe()}"
                ) from error
        if self.tracker is not None:
            scalars = {name: value for name, value in record.items() if isinstance(value, (int, float))}
            for layer, sectors in record.get("charges", {}).items():
                for sector, heads in sectors.items():
                    scalars[f"charge/{sector}/{layer}"] = sum(heads) / len(heads)
            scalars |= _gauge_scalars(record.get("gauge", {}))
            self.tracker.log(scalars, step=self.step)

    # Training

    def loop(self, stop: threading.Event, progress: Progress | None) -> None:
        config = self.config
        if self.step == 0:
            self.validate()
        while self.step < config.steps:
            record = self.advance()
            self.write(record)
            last = self.step == config.steps
            if self._validates(self.step):
                record = {**record, **self.validate()}
            if progress is not None:
                progress(self.step, record)
            stopping = self.world.sum(torch.tensor(float(stop.is_set()), device=self.world.device)).item() > 0
            if last or stopping or self.step % config.checkpoint_every == 0:
                self.save()
            if stopping:
                break

    def _validates(self, step: int) -> bool:
        return step == self.config.steps or step % self.config.eval_every == 0

    def _measured(self) -> None:
        if self.monitor is not None:
            self.monitor.after_step()

    def advance(self) -> dict[str, Any]:
        """One step of the optimiser."""
        config, started = self.config, time.perf_counter()
        self.model.train()
        self.wrapped.train()
        breaking.redraw(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        micro_batch = config.batch_size // config.accumulation
        share = micro_batch // self.world.size
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for i in range(config.accumulation):
            first = self.step * config.batch_size + i * micro_batch + self.world.rank * share
            batch = self._checked(self.windows.batch(first, share)).to(self.world.device)
            self.world.sync_gradients(self.wrapped, i == config.accumulation - 1)
            with _autocast(self.world.device, config.precision):
                loss = self.wrapped(batch[:, :-1], batch[:, 1:])[1]
            (loss / config.accumulation).backward()
            total += loss.detach() / (config.accumulation * self.world.size)
        loss = self.world.sum(total)
        value = loss.item()
        norm = self._gradient_norm()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise TrainingError(
                f"the loss is {value} and the gradient's norm {norm} at step {self.step + 1}: {self._what_is_safe()}; "
                "lower the learning rate, warm up longer or clip the gradient"
            )
        factor = config.lr_factor(self.step)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs):
            group["lr"] = base * factor
        if self.monitor is not None and self._validates(self.step + 1):
            self.monitor.before_step()
        try:
            self.optimizer.step(lambda: value)
        except ValueError as error:
            raise TrainingError(f"{error} (at step {self.step + 1}: {self._what_is_safe()})") from error
        self._measured()
        self.step += 1
        return {
            "step": self.step,
            "loss": value,
            "gradient_norm": norm,
            "lr": self.lr * factor,
            "tokens": self.step * config.batch_size * config.model.context_length,
            "seconds": round(time.perf_counter() - started, 4),
        }

    def validate(self) -> dict[str, Any]:
        """Validation loss, the charges, and what the last step did in gauge directions."""
        config, first = self.config, None
        if isinstance(self.validation, SequentialWindows):
            count = min(config.eval_windows, self.validation.windows_per_epoch)
            first = -(-self.step // config.eval_every) * count % self.validation.windows_per_epoch
            windows = self.validation.batch(first, count)
        else:
            windows = self.validation
        with _last_draw(self.model, config.breaking.evaluate_with == "last"):
            losses = window_losses(
                self.wrapped, windows, world=self.world, precision=config.precision,
                batch_size=max(1, config.batch_size // (config.accumulation * self.world.size)),
            )  # fmt: skip
        mean, error = _mean_and_error(losses)
        record: dict[str, Any] = {
            "step": self.step,
            "validation_loss": mean,
            "validation_standard_error": None if math.isnan(error) else error,
            "validation_windows": len(windows),
        }
        if first is not None:
            record["validation_first_window"] = first
        if config.log_window_losses:
            record["window_losses"] = [round(loss, 5) for loss in losses.tolist()]
        if config.log_charges and self.step:
            charges = gauge.charges(self.model, self.optimizer)
            record["charges"] = {str(layer): sectors for layer, sectors in charges.items()}
        if self.monitor is not None and self.step:
            record["gauge"] = self.monitor.read()
        self.write(record)
        return record

    def _gradient_norm(self) -> float:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        if self.config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip, norm)
        return norm.item()

    def _checked(self, batch: Tensor) -> Tensor:
        vocab_size = self.model.token_embedding.num_embeddings
        if int(batch.max()) >= vocab_size:
            raise ValueError(
                f"the corpus holds token {int(batch.max())}, beyond the model's vocabulary of {vocab_size}: "
                f"the shards were not made with the tokenizer {self.corpus.tokenizer_name}; name the one that made them"
            )
        return batch

    def _what_is_safe(self) -> str:
        if self.saved_at is None:
            return "no checkpoint was written yet"
        return f"the checkpoint of step {self.saved_at} in {self.folder} is safe"
