"""``erlangen explain``: which keys the preferred direction of every head favours, by chance and by cause."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

import erlangen
from erlangen import report
from erlangen.breaking.key_prior import KeyPrior, Steering, key_prior, steer, token_classes
from erlangen.lm import Tokens, checkpoint, load_corpus
from erlangen.lm.settings import TrainConfig, from_dict
from erlangen.lm.windows import validation_windows

from . import _explain_page as pages
from ._gauge_files import check_out, print_table, progress_bar, say, stdout
from ._language_model import LanguageModel, open_language_model

_DESCRIPTION = """\
The key prior: the logit that the preferred direction of every head (learned query bias and the mean of the unlearned
one) gives each key of a text, whatever the query.

  erlangen explain runs/broken                        a run of erlangen train, on what it was validated on
  erlangen explain gpt2 --text book.txt               a folder of Hugging Face, on a text
  erlangen explain gpt2 --text book.txt --heads 5.1   with head 1 of layer 5 in depth, both counted from 0

Measured on the real residual stream, with norms, biases and positions: factors on attention by classes of tokens beside
what random directions and permuted labels give, the attention that is moved, and what happens to attention and loss
when the direction is taken away, halved and doubled. Prints a table, and writes explain.html and explain.json.

Ctrl-C stops at once, and nothing is written. No file is ever half written.
"""

NAME = "explain"
_LONGEST = 512  # tokens of a window, unless asked for
_MAX_DEPTH = 4


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """What `erlangen explain` is to measure."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run of `erlangen train`, one of its checkpoints, or a folder of Hugging Face."""
    text: Path | None = None
    """A UTF-8 text. None: the held-out part of what a run was trained on."""
    tokenizer: str | None = None
    """"bytes", "gpt2", or the path of a tokenizer. None: the model's own."""
    windows: int = 64
    """Windows of the text, evenly spread (all of them, if there are fewer)."""
    length: int | None = None
    """Tokens of a window. None: the model's context, at most 512."""
    heads: tuple[str, ...] = ()
    """Heads in depth, as LAYER.HEAD, counted from 0; at most four. None: one, chosen by the strongest effect."""
    min_count: int = 20
    """Leave tokens that occur less often out of the lists of tokens."""
    seed: int = 0
    """Of the random directions that spreads are compared with."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or another name of torch."""
    out: Path = Path(NAME)
    """Folder for the results; those of an earlier call are replaced."""

    def __post_init__(self) -> None:
        for name, least in (("windows", 2), ("min_count", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        if self.length is not None and self.length < 8:
            raise ValueError(f"--length must be at least 8 tokens, got {self.length}")
        if len(self.heads) > _MAX_DEPTH:
            raise ValueError(f"--heads takes at most {_MAX_DEPTH} heads, got {len(self.heads)}")


@dataclass(frozen=True)
class Explanation:
    """What was found."""

    name: str
    text: str
    prior: KeyPrior
    steering: Steering
    depth: tuple[tuple[int, int], ...]
    """Heads in depth: (layer, head)."""
    depth_steering: tuple[Steering, ...]
    """Each of them scaled alone."""
    min_count: int

    @property
    def adjusted(self) -> np.ndarray:
        """[L, H, C]: p-values against both nulls (the larger of the two), after Holm; NaN for classes of position."""
        both = torch.maximum(self.prior.direction_p, self.prior.label_p).numpy()
        asked = np.isfinite(both)
        out = np.full(both.shape, np.nan)
        out[asked] = report.holm(both[asked].tolist())
        return out


def main(arguments: Sequence[str]) -> int:
    """Explain a model; exit status 0."""
    config = tyro.cli(ExplainConfig, args=list(arguments), prog="erlangen explain", description=_DESCRIPTION)
    check_out(config.out, NAME)
    console = stdout()
    with progress_bar(console, "measuring") as progress:
        result = explain(config, progress)
    page = pages.explain_page(result)
    path = report.write_report(config.out, NAME, page, _data(config, result), {})
    _, rows = pages.class_rows(result)
    short = ("class of key", "text %", "least", "most", "head", "p < .05", "both", "att. %", "without")
    print_table(console, f"preferred directions of {result.name}: factors on attention by class", short, rows)
    for line in pages.summary(result):
        say(console, line)
    say(console, f"the report: {path}")
    return 0


def explain(config: ExplainConfig, progress: Callable[[int, int], None]) -> Explanation:
    """Measure a model on a text.

    Raises:
        OSError: the model or the text cannot be read.
        ValueError: the model is not known or has no preferred direction, or the text is too short; the text says what
            to do.
    """
    named = [_head(text) for text in config.heads]
    language = open_language_model(config.model, tokenizer=config.tokenizer, device=config.device)
    tokens, text = _tokens(config, language)
    classes = token_classes(tokens, language.tokenizer.decode)

    def stage(number: int, share: float) -> Callable[[int, int], None]:
        return lambda done, total: progress(round(1000 * (number + share * done / total)), 3000)

    prior = key_prior(language.model, tokens, classes=classes, seed=config.seed, progress=stage(0, 1.0))
    num_layers, num_heads = prior.moved.shape
    for layer, head in named:
        if layer >= num_layers or head >= num_heads:
            raise ValueError(
                f"--heads {layer}.{head} is not there: {language.name} has {num_layers} layers of {num_heads} heads, "
                "counted from 0"
            )
    depth = tuple(named) or (pages.strongest(prior),)
    steering = steer(language.model, tokens, classes, progress=stage(1, 1.0))
    alone = tuple(
        steer(language.model, tokens, classes, heads=[head], progress=stage(2, (number + 1) / len(depth)))
        for number, head in enumerate(depth)
    )
    return Explanation(language.name, text, prior, steering, depth, alone, config.min_count)


def _head(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    if match is None:
        raise ValueError(f"--heads takes LAYER.HEAD, such as 3.5, got {text!r}")
    return int(match[1]), int(match[2])


def _tokens(config: ExplainConfig, language: LanguageModel) -> tuple[Tensor, str]:
    """Windows [W, T] of the text, with what a text begins with in front, and the text's name."""
    length = min(language.context_length, _LONGEST) if config.length is None else config.length
    if length > language.context_length:
        raise ValueError(f"--length {length} is more than the context of {language.name}, {language.context_length}")
    if config.text is not None:
        read = language.tokenizer.encode(_read(config.text))
        source, name = Tokens([read]), config.text.name
    else:
        source, name = _validation(config, language)
    fits = length - (language.beginning is not None)
    longest = max((len(shard) for shard in source.shards), default=0)
    if longest <= fits:
        raise ValueError(
            f"{name} has {longest} tokens, and one window takes {fits + 1}: give a longer text or a shorter --length"
        )
    windows = validation_windows(source, fits, config.windows)[:, :fits]
    if len(windows) < 2:
        raise ValueError(f"{name} has one window of {fits} tokens, and two are the least: give a longer text")
    if language.beginning is not None:
        windows = torch.cat([torch.full((len(windows), 1), language.beginning), windows], dim=1)
    return windows, name


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: convert it, or check the path") from error
    if not text:
        raise ValueError(f"{path} is empty: give a file with text")
    return text


def _validation(config: ExplainConfig, language: LanguageModel) -> tuple[Tokens, str]:
    """What a run was validated on."""
    found = checkpoint.checkpoints(config.model)
    folder = found[-1] if found else config.model
    if not (folder / "checkpoint.json").is_file():
        raise ValueError(f"{config.model} does not say what text it was made from: give one with --text")
    data = from_dict(TrainConfig, checkpoint.read_meta(folder)["config"]).data
    if data.corpus.startswith("hf:"):
        raise ValueError(f"{config.model} was trained on {data.corpus}, which is not read here: give a --text")
    corpus = load_corpus(
        data.corpus, language.tokenizer, validation_fraction=data.validation_fraction, max_tokens=data.max_tokens
    )
    return corpus.validation, f"the held-out part of {corpus.name}"


def _data(config: ExplainConfig, result: Explanation) -> dict[str, Any]:
    prior = result.prior
    data: dict[str, Any] = {"command": f"erlangen {NAME}", "version": erlangen.__version__, "model": result.name}
    data |= {"text": result.text, "seed": config.seed, "min_count": config.min_count}
    data |= prior.to_dict()
    data["adjusted_p"] = result.adjusted
    data["cells"] = pages.cells(result)
    data["steering"] = _steering(result.steering)
    data["heads"] = [
        {"layer": layer, "head": head, "steering": _steering(alone), "tokens": pages.token_lists(result, layer, head)}
        for (layer, head), alone in zip(result.depth, result.depth_steering)
    ]
    return data


def _steering(steering: Steering) -> dict[str, Any]:
    return {
        "alphas": list(steering.alphas),
        "loss": steering.loss.mean(1),
        "loss_change": [pages.loss_change(steering, alpha) for alpha in steering.alphas],
        "class_loss_change": [
            [pages.class_loss_change(steering, alpha, name) for name in steering.classes.names]
            for alpha in steering.alphas
        ],
        "attention": steering.attention.mean(1),
    }
