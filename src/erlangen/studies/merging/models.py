"""The models that are merged: two families, the text they learn, their training, and their files.

Shape suffixes: B windows, T tokens, V vocabulary.
"""

import copy
import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from erlangen import gauge
from erlangen._extras import require
from erlangen.lm import GPT, GPTConfig
from erlangen.lm.corpus import Tokens
from erlangen.lm.windows import TrainingWindows, validation_windows

from .._jobs import Tick
from .._training import seeded

FAMILIES = ("gpt", "llama")
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, CONTEXT = 2, 4, 2, 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
"""Of matrices and tables only."""
TRAIN_SHARE = 0.9
TEXT = "tinyshakespeare.txt"


class Text(NamedTuple):
    """A text in characters: its vocabulary, and windows of it."""

    vocabulary: str
    train: Tokens
    held_out: Tensor
    """Evenly spaced windows of the last tenth, int64 [B, T + 1]."""


def read_text(path: Path | None, windows: int) -> Text:
    """The text of the study; the last tenth is held out.

    Args:
        path: a UTF-8 file; None for the one in the folder text of ``ERLANGEN_DATA``.
        windows: how many of the part held out.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is too short for one window.
    """
    if path is None:
        path = Path(os.environ.get("ERLANGEN_DATA", "data")) / "text" / TEXT
    if not path.exists():
        raise FileNotFoundError(f"there is no text {path}: set ERLANGEN_DATA, or name a text file")
    text = path.read_text(encoding="utf-8")
    vocabulary = "".join(sorted(set(text)))
    number = {character: index for index, character in enumerate(vocabulary)}
    tokens = np.array([number[character] for character in text], np.uint32)
    train, held_out = Tokens([tokens]).split(int(TRAIN_SHARE * len(tokens)))
    return Text(vocabulary, train, validation_windows(held_out, CONTEXT, windows))


def hidden_dim(family: str, dim: int) -> int:
    """Width of the feed-forward layers: 4 dim, or 8/3 dim up to a multiple of 8 where they are gated."""
    return 4 * dim if family == "gpt" else -(-8 * dim // 24) * 8


def build(family: str, vocab_size: int, dim: int) -> nn.Module:
    """A model of a family, with fresh weights from torch's global generator.

    Raises:
        ImportError: transformers is missing, for the family "llama".
    """
    if family == "gpt":
        return GPT(
            GPTConfig(
                vocab_size=vocab_size, context_length=CONTEXT, dim=dim, num_layers=NUM_LAYERS, num_heads=NUM_HEADS,
                mlp_dim=hidden_dim(family, dim), tie_embeddings=False,
            )
        )  # fmt: skip
    transformers = require("transformers", "hf")
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, max_position_embeddings=CONTEXT, hidden_size=dim, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS, num_key_value_heads=NUM_KV_HEADS, intermediate_size=hidden_dim(family, dim),
        tie_word_embeddings=False, use_cache=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def logits(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """[B, T, V]."""
    return model(tokens_BT)[0] if isinstance(model, GPT) else model(input_ids=tokens_BT).logits


def cross_entropy(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean loss over windows int64 [B, T + 1], in nats a character."""
    return F.cross_entropy(logits(model, windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor, batch_size: int = 64) -> float:
    """Mean loss over windows int64 [B, T + 1], in nats a character."""
    parts = windows.split(batch_size)
    return sum(cross_entropy(model, part).item() * len(part) for part in parts) / len(windows)


def unigram_loss(text: Text) -> float:
    """Loss on the part held out of the frequencies of characters, counted on the part to train on (+1 for each)."""
    counts = np.bincount(np.concatenate(text.train.shards), minlength=len(text.vocabulary)) + 1.0
    log_share = torch.from_numpy(np.log(counts / counts.sum()))
    return -float(log_share[text.held_out[:, 1:]].mean())


def train(
    family: str, text: Text, *, dim: int, seed: int, steps: int, batch_size: int, lr: float, tick: Tick | None = None
) -> nn.Module:
    """Train a model in float32: AdamW, 5 % warm-up, cosine schedule to zero, gradients clipped to norm 1.

    Args:
        family: one of `FAMILIES`.
        text: what to learn.
        dim: width of the model.
        seed: of initial weights and order of windows.
        steps, batch_size, lr: of AdamW.
        tick: called after each step.

    Raises:
        KeyboardInterrupt: ``tick`` said to stop before the last step.
    """
    model = seeded(seed, lambda: build(family, len(text.vocabulary), dim))
    windows = TrainingWindows(text.train, CONTEXT, seed=seed)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if (p.ndim < 2) == vectors], "weight_decay": 0.0 if vectors else WEIGHT_DECAY}
        for vectors in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)
    warmup = max(1, steps // 20)
    model.train()
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * decay
        optimizer.zero_grad()
        cross_entropy(model, windows.batch(step * batch_size, batch_size)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if tick is not None and tick(step + 1) and step + 1 < steps:
            raise KeyboardInterrupt
    return model.eval()


def moved_copy(model: nn.Module, *, seed: int) -> nn.Module:
    """The same function in other numbers: heads, neurons, norms and the residual stream moved along the gauge."""
    generator = torch.Generator().manual_seed(seed)
    return gauge.random_move(copy.deepcopy(model), 10.0, generator, permute=True, residual=True)


# Models that are kept


def keep(path: Path, settings: dict[str, Any], tick: Tick, *, text: Text, family: str, seed: int, **how: Any) -> None:
    """Train a model and write it to a file with its settings and held-out loss; aside first, then renamed."""
    started = time.perf_counter()
    model = train(family, text, seed=seed, tick=tick, **how)
    found = {"loss": held_out_loss(model, text.held_out), "seconds": time.perf_counter() - started}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".writing")
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, aside, {"settings": json.dumps(settings), "found": json.dumps(found)})
    os.replace(aside, path)


def is_kept(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a file has the model.

    Raises:
        ValueError: it has one of other settings.
    """
    if not path.exists():
        return False
    if _metadata(path)["settings"] != json.loads(json.dumps(settings)):
        raise ValueError(f"{path} holds a model of other settings: remove it or choose another folder")
    return True


def load(path: Path, family: str, vocab_size: int, dim: int) -> nn.Module:
    """A model that was kept, in evaluation mode; torch's global generator is left as it was."""
    model = seeded(0, lambda: build(family, vocab_size, dim))
    model.load_state_dict(load_file(path))
    return model.eval()


def found(path: Path) -> dict[str, float]:
    """``loss`` on the windows held out, and ``seconds`` of training, of a model that was kept."""
    return _metadata(path)["found"]


def _metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return {name: json.loads(value) for name, value in file.metadata().items()}
