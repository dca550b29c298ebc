"""Text for checkpoints: whether two tokenizers are one, the tokens of a text, and the loss on them."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erlangen import _extras

from . import _outputs

NUM_WINDOWS, WINDOW = 32, 256  # of a text: how many pieces at most, and how many tokens each
_LOGITS = 1 << 28  # bytes of logits in float64 that are held at a time
_CAUSAL = ("ForCausalLM", "LMHeadModel")

# Files of tokenizers: JSON of all of it, and the older ones, of which it has several.
_TOKENIZER = "tokenizer.json"
_VOCABULARIES = ("vocab.txt", "merges.txt", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")


# --- tokenizers -------------------------------------------------------------------------------------------------------


def _read_tokenizer(path: Path) -> dict[str, Any]:
    """What of a ``tokenizer.json`` decides which tokens a text becomes; not how they are padded, cut and wrapped."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model = dict(values["model"])
        merges = model.get("merges") or []
        model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        added = {token["content"]: token["id"] for token in values.get("added_tokens") or []}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it must hold the JSON of a tokenizer ({error})") from error
    steps = {name: values.get(name) for name in ("normalizer", "pre_tokenizer")}
    return {"vocab": model.pop("vocab", None), "merges": model.pop("merges"), "added tokens": added, **steps} | {
        "model": {name: value for name, value in model.items() if name in ("type", "unk_token", "unk_id")}
    }


def expect_one_tokenizer(a: Path, b: Path) -> str | None:
    """Two folders split text into the same tokens; a sentence if that cannot be seen, for want of files.

    Raises:
        ValueError: they do not; the file and what differs in it are named.
    """
    have = [{name for name in (_TOKENIZER, *_VOCABULARIES) if (folder / name).is_file()} for folder in (a, b)]
    both = have[0] & have[1]
    hint = "tokens of one number would have two meanings: merge models of one tokenizer"
    if _TOKENIZER in both:
        first, second = (_read_tokenizer(folder / _TOKENIZER) for folder in (a, b))
        for what in first:
            if first[what] != second[what]:
                raise ValueError(f"{_TOKENIZER} of {a} and of {b} differ in {_difference(what, first, second)}: {hint}")
        return None
    for name in sorted(both):
        if not _same(a / name, b / name):
            raise ValueError(f"{name} of {a} and of {b} differ: {hint}")
    if both:
        return None
    if have[0] and have[1]:
        raise ValueError(
            f"the tokenizers of {a} ({', '.join(sorted(have[0]))}) and of {b} ({', '.join(sorted(have[1]))}) have no "
            "file in common, so they cannot be compared: save both with transformers, as tokenizer.json"
        )
    without = [str(folder) for folder, names in zip((a, b), have) if not names]
    verb = "has" if len(without) == 1 else "have"
    return f"Tokenizers were not compared: {' and '.join(without)} {verb} none."


def _same(one: Path, two: Path) -> bool:
    """Whether two files say the same: JSON in any layout, lines of text with any ends."""
    if one.read_bytes() == two.read_bytes():
        return True
    if one.suffix not in (".json", ".txt"):
        return False
    try:
        texts = [path.read_text(encoding="utf-8") for path in (one, two)]
        return texts[0] == texts[1] or (one.suffix == ".json" and json.loads(texts[0]) == json.loads(texts[1]))
    except ValueError as error:
        raise ValueError(f"{one} or {two} is damaged ({error}): get it again") from error


def _difference(what: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    one, two = first[what], second[what]
    if isinstance(one, dict) and isinstance(two, dict):
        keys = [key for key in {**one, **two} if one.get(key) != two.get(key)]
        return f"{what}, such as {keys[0]!r} ({one.get(keys[0])} and {two.get(keys[0])})"
    if isinstance(one, list) and isinstance(two, list):
        place = next((place for place, pair in enumerate(zip(one, two)) if pair[0] != pair[1]), min(len(one), len(two)))
        pair = [values[place] if place < len(values) else "nothing" for values in (one, two)]
        return f"{what}, such as number {place} ({pair[0]} and {pair[1]})"
    return what


# --- loss -------------------------------------------------------------------------------------------------------------


def read_tokens(folder: str | Path, text: str) -> Tensor:
    """int64 [windows, N]: pieces of a text, of up to 256 tokens (of the model's positions, if those are fewer).

    Of a long text, 32 pieces evenly spread over it. No token stands for the beginning of a text.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the folder has no tokenizer that transformers can read; the text is too short.
    """
    folder = Path(folder)
    transformers = _extras.require("transformers", "hf")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:
        raise ValueError(f"{folder} has no tokenizer that transformers can read ({error}): give token ids") from error
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    limits = [config.get(name) for name in ("max_position_embeddings", "n_positions")]
    length = min([WINDOW, len(tokens), *(limit for limit in limits if isinstance(limit, int))])
    if length < 2:
        raise ValueError(f"a loss needs a text of 2 tokens at least, received one of {len(tokens)}")
    number = len(tokens) // length
    chosen = min(number, NUM_WINDOWS)
    starts = [length * (place * number // chosen) for place in range(chosen)]
    return torch.tensor([tokens[start : start + length] for start in starts])


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raises ValueError if these are no windows of token ids."""
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
        raise ValueError(
            f"text must be a string or token ids, int64 [windows, N] with N of 2 at least; received {tokens.dtype} "
            f"{list(tokens.shape)}"
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(
            f"token ids must be from 0 to {vocab_size - 1}, received {int(tokens.min())} to {int(tokens.max())}"
        )


def check_causal(config: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError if the model of a config does not predict next tokens."""
    [name, *_] = config.get("architectures") or ["AutoModel"]
    if not name.endswith(_CAUSAL):
        raise ValueError(f"a loss needs a model that predicts next tokens, and {folder} holds a {name}: give no text")


def loss(
    weights: _outputs.Rows, folder: Path, tokens: Tensor, build: Callable[[Path], nn.Module] | None = None
) -> float:
    """Mean cross-entropy of the next token in nats, computed in float32, a map at a time.

    Args:
        weights: the tensors of a checkpoint.
        folder: where its ``config.json`` is.
        tokens: int64 [windows, N].
        build: as of `outputs`.

    Raises:
        ImportError, ValueError: as of `outputs`; a loss that is no finite number.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    step = max(1, _LOGITS // (8 * tokens.shape[1] * config["vocab_size"]))
    total = 0.0
    for part in tokens.split(step):
        logits = _outputs.outputs(weights, folder, part, torch.float32, build)
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    if not math.isfinite(total):
        raise ValueError(f"the loss of the model with the config of {folder} is {total} on this text, no finite number")
    return total / tokens[:, 1:].numel()
