"""A language model to ask questions of: a run of ``erlangen train``, or a folder of Hugging Face, with its tokenizer.

Loading is strict. A checkpoint with a tensor too many or too few is an error: a broken model without its unlearned
biases, or with activations of another kind, computes numbers that look like any others and mean nothing.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erlangen import lm
from erlangen._extras import require
from erlangen.lm import checkpoint
from erlangen.lm.reasoning import Reader, adapt_tokenizer, beginning_of, next_logits
from erlangen.lm.settings import TrainConfig, from_dict
from erlangen.lm.tokenizers import Tokenizer, load_tokenizer

# For models whose config names no longest sequence.
_CONTEXT_LENGTH = 2048
# Files of which a folder of Hugging Face has one at least when it holds a tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
)  # fmt: skip
_SHOWN = 4  # names of tensors in a message


@dataclass(frozen=True)
class LanguageModel:
    """A model in evaluation mode, and how to speak to it."""

    name: str
    """The last part of its path."""
    model: nn.Module
    """On its device."""
    tokenizer: Tokenizer
    context_length: int
    """Longest sequence, in tokens."""
    beginning: int | None
    """The token that its tokenizer puts in front of every text, or None."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.model.parameters()).dtype

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of the next token, [B, T, V], of int64 [B, T] tokens on the model's device; gradients flow."""
        return next_logits(self.model, tokens)

    @property
    def reader(self) -> Reader:
        """What can be asked of it."""
        return Reader(self.tokenizer, self.context_length, self.beginning)


def open_language_model(
    path: str | Path, *, tokenizer: str | Path | None = None, device: str = "auto"
) -> LanguageModel:
    """Load a model for evaluation.

    Half precision is computed in float32 on the CPU, and as it is stored elsewhere.

    Args:
        path: a run of ``erlangen train`` or one of its checkpoints, or a folder of a causal model of `transformers`
            (broken and shrunk ones included).
        tokenizer: "bytes", "gpt2", a tokenizers JSON file or a folder of Hugging Face. None: the model's own.
        device: "auto", "cpu", "cuda" or another name of `torch`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no language model, its tensors are not those its config asks for, it has no tokenizer, or
            the tokenizer has more tokens than the model.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: name a run of erlangen train or a folder of a model")
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if (folder / "checkpoint.json").is_file() or any(folder.glob("step-*/checkpoint.json")):
        found = _open_run(folder, tokenizer)
    elif (folder / "config.json").is_file():
        found = _open_transformers(folder, tokenizer, where)
    else:
        raise ValueError(
            f"{folder} holds neither a checkpoint of erlangen train nor a config.json: name a run, or a folder of a "
            "model of transformers"
        )
    vocabulary = _vocabulary(found.model)
    if found.tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"the tokenizer {found.tokenizer.name} has {found.tokenizer.vocab_size} tokens, the model {folder} "
            f"{vocabulary}: name the tokenizer that the model was trained with"
        )
    found.model.to(where)
    return found


def _vocabulary(model: nn.Module) -> int:
    live: Any = model
    return (
        live.token_embedding.num_embeddings
        if isinstance(model, lm.GPT)
        else live.get_input_embeddings().weight.shape[0]
    )


def _open_run(folder: Path, tokenizer: str | Path | None) -> LanguageModel:
    found = checkpoint.checkpoints(folder)
    meta = checkpoint.read_meta(found[-1] if found else folder)
    config: TrainConfig = from_dict(TrainConfig, meta["config"])
    model = lm.load(folder)
    return LanguageModel(
        name=folder.resolve().name,
        model=model,
        tokenizer=_tokenizer(config.data.tokenizer if tokenizer is None else tokenizer)[0],
        context_length=model.config.context_length,
        beginning=None,
    )


def _open_transformers(folder: Path, tokenizer: str | Path | None, device: torch.device) -> LanguageModel:
    transformers: Any = require("transformers", "hf")
    for module in ("shrunk", "broken"):  # they make models of their kinds known to the auto classes
        import_module(f"erlangen.interop.{module}")
    if tokenizer is None:
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise ValueError(f"{folder} holds no tokenizer: name one with --tokenizer (bytes, gpt2 or a path)")
        tokenizer = folder
    read, beginning = _tokenizer(tokenizer)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers and its hub raise many kinds
        raise ValueError(f"{folder} does not load as a causal model of transformers: {error}") from error
    _check_loaded(folder, info)
    if device.type == "cpu" and model.dtype in (torch.float16, torch.bfloat16):
        model.float()
    model.config.use_cache = False
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or _CONTEXT_LENGTH
    return LanguageModel(folder.resolve().name, model.eval(), read, int(longest), beginning)


def _check_loaded(folder: Path, info: dict[str, Any]) -> None:
    """Nothing was missing, left over, or of another shape."""
    wrong = {
        "has no": info.get("missing_keys"),
        "also has": info.get("unexpected_keys"),
        "has of another shape": info.get("mismatched_keys"),
    }
    said = [f"{what} {_names(found)}" for what, found in wrong.items() if found]
    if not said and info.get("error_msgs"):
        said = [" ".join(map(str, info["error_msgs"]))]
    if said:
        raise ValueError(
            f"{folder} is not the checkpoint that its config.json describes: it {', and '.join(said)}; nothing is "
            "evaluated without its own weights and biases, so mend the folder or write it again"
        )


def _names(found: Any) -> str:
    names = sorted(str(item[0]) if isinstance(item, (tuple, list)) else str(item) for item in found)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _tokenizer(spec: str | Path) -> tuple[Tokenizer, int | None]:
    """A tokenizer, and the token it puts in front of every text."""
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        return load_tokenizer(str(spec)), None
    transformers: Any = require("transformers", "hf")
    try:
        read = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the many classes raise
        raise ValueError(
            f"the tokenizer in {folder} does not load ({type(error).__name__}: {error}): name one with --tokenizer"
        ) from error
    return adapt_tokenizer(read), beginning_of(read)
