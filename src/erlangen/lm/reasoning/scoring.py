"""Asking a model: the log-likelihood of every candidate, in batches.

A candidate is scored by the joint encoding of prompt and candidate. The tokens after the longest common beginning of
the encodings of the prompt alone and with every candidate are the answer's, so the boundary is a boundary of tokens in
each of them, and the scores of one item are log-likelihoods of whole texts, less one common term. The sum over tokens
decides: it is the likelihood of the text. The choice by log-likelihood a byte is reported beside it; it can differ
where candidates differ in length, as in pairs only.

Sequences are filled on the right, behind everything a causal model looks at.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from erlangen.lm.tokenizers import Tokenizer

from .items import FAMILIES, Item, check_families, make_items
from .results import Answer, FamilyResult

_MOST_LOGITS = 1 << 25  # of a batch


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """An item in tokens: every text whole, and where the answers begin."""

    texts: tuple[tuple[int, ...], ...]
    start: int


@dataclass(frozen=True)
class Reader:
    """A tokenizer and a context: what can be asked, and how it is encoded."""

    tokenizer: Tokenizer
    """As of `adapt_tokenizer`."""
    context_length: int
    """Longest sequence, in tokens."""
    beginning: int | None = None
    """A token in front of every text."""

    def encode(self, item: Item) -> Encoded:
        """The tokens of an item, which may be too many.

        Raises:
            ValueError: the tokenizer loses symbols of the item.
        """
        for candidate in item.candidates:
            _check_round_trip(self.tokenizer, item, item.prompt + candidate)
        front = () if self.beginning is None else (self.beginning,)
        texts = [(*front, *self.tokenizer.encode(item.prompt + end).tolist()) for end in item.candidates]
        start = _common([(*front, *self.tokenizer.encode(item.prompt).tolist()), *texts])
        if start == 0 or min(map(len, texts)) <= start:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name} has no token boundary between prompt and answer of the family "
                f"{item.family!r} ({item.text!r}): leave the family out, or give a beginning token"
            )
        return Encoded(texts=tuple(texts), start=start)

    def fits(self, item: Item) -> bool:
        """Whether every text of the item is within the context; ValueError as of `encode`."""
        return max(map(len, self.encode(item).texts)) <= self.context_length


@dataclass(frozen=True)
class FamilyItems:
    """What is asked of a family."""

    family: str
    items: Sequence[Item]
    too_long: int
    """Drafts that were not asked because a context was too short for them."""


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning."""
    same = (len({*column}) == 1 for column in zip(*sequences))
    return next((place for place, equal in enumerate(same) if not equal), min(map(len, sequences)))


def _check_round_trip(tokenizer: Tokenizer, item: Item, text: str) -> None:
    back = tokenizer.decode(tokenizer.encode(text))
    if "".join(back.split()) == "".join(text.split()):
        return
    lost = sorted({symbol for symbol in text if not symbol.isspace() and symbol not in _back(tokenizer, symbol)})
    symbols = " ".join(lost) if lost else f"those of {text!r}, which becomes {back!r}"
    raise ValueError(
        f"the tokenizer {tokenizer.name} cannot write symbols that the family {item.family!r} needs: {symbols}; leave "
        "the family out"
    )


def _back(tokenizer: Tokenizer, symbol: str) -> str:
    """What comes back of one symbol between spaces; names of control tokens do not count."""
    found = tokenizer.decode(tokenizer.encode(f" {symbol}")).split()
    return "".join(part for part in found if len(part) == 1)


def adapt_tokenizer(tokenizer: Any) -> Tokenizer:
    """A tokenizer of `transformers` in the way of `erlangen.lm`; others as they are.

    Control tokens spelled out in a text are text, and nothing is put in front or behind.
    """
    return _Foreign(tokenizer) if hasattr(tokenizer, "convert_tokens_to_ids") else tokenizer


class _Foreign:
    def __init__(self, tokenizer: Any) -> None:
        self._read = tokenizer
        self.name = f"hf:{getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"
        self.vocab_size = max(tokenizer.get_vocab().values(), default=0) + 1
        self.end_of_text: int | None = tokenizer.eos_token_id

    def encode(self, text: str) -> np.ndarray:
        found = self._read(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return np.asarray(
            found, np.uint8 if self.vocab_size <= 2**8 else np.uint16 if self.vocab_size <= 2**16 else np.uint32
        )

    def decode(self, tokens: Any) -> str:
        tokens = np.asarray(tokens).tolist()
        return self._read.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def beginning_of(tokenizer: Any) -> int | None:
    """The token that a tokenizer of `transformers` puts in front of every text, or None."""
    if not hasattr(tokenizer, "convert_tokens_to_ids"):
        return None
    first = tokenizer("a")["input_ids"][:1]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    return first[0] if first and first != bare and first[0] == tokenizer.bos_token_id else None


def next_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of a model that returns a tuple whose first is the logits, or has them as ``.logits``."""
    found = model(tokens)
    if hasattr(found, "logits"):
        return found.logits
    return found[0] if isinstance(found, (tuple, list)) else found


def make_suite(
    readers: Iterable[Reader], *, families: Sequence[str] = FAMILIES, num_items: int = 500, seed: int = 0
) -> list[FamilyItems]:
    """Items of each family that every one of the readers can read.

    Raises:
        ValueError: as of `make_items` and `Reader.encode`.
    """
    readers = list(readers)

    def fits(item: Item) -> bool:
        return all(reader.fits(item) for reader in readers)

    return [
        FamilyItems(family, *make_items(family, num_items, seed=seed, fits=fits))
        for family in check_families(tuple(families))
    ]


@torch.no_grad()
def score(
    model: nn.Module,
    reader: Reader,
    asked: FamilyItems,
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> FamilyResult:
    """Ask a model the items of a family.

    Args:
        model: causal, called with int64 tokens [B, T] on its device; in evaluation mode while this lasts.
        reader: the model's tokenizer and context.
        asked: what to ask.
        batch_size: sequences a forward, at most.
        progress: called with the sequences done and all.

    Raises:
        ValueError: an item does not fit the context, or a log-likelihood is not finite.
    """
    encoded = [reader.encode(item) for item in asked.items]
    longest = max(len(text) for item in encoded for text in item.texts)
    if longest > reader.context_length:
        raise ValueError(
            f"an item of the family {asked.family!r} takes {longest} tokens, and the context {reader.context_length}: "
            "make the items for this reader, with make_suite"
        )
    # Candidates of one token are read off one forward over their common prompt.
    wanted: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for number, item in enumerate(encoded):
        for place, text in enumerate(item.texts):
            wanted.setdefault(text[:-1], []).append((number, place))
    found: dict[tuple[int, int], tuple[float, bool]] = {}
    was_training = model.training
    model.eval()
    try:
        for done, batch in _batches(model, list(wanted), batch_size):
            logits_BTV = next_logits(model, batch)
            for row, inputs in enumerate(list(wanted)[done : done + len(batch)]):
                for number, place in wanted[inputs]:
                    found[number, place] = _likelihood(
                        logits_BTV[row], encoded[number].texts[place], encoded[number].start
                    )
            if progress is not None:
                progress(done + len(batch), len(wanted))
    finally:
        model.train(was_training)
    answers = []
    for number, item in enumerate(asked.items):
        values = [found[number, place] for place in range(len(item.candidates))]
        if not np.isfinite([value for value, _ in values]).all():
            raise ValueError(
                f"the model gives a log-likelihood that is not finite to {item.text!r}: it cannot be scored"
            )
        answers.append(Answer(tuple(value for value, _ in values), greedy=values[item.answer][1]))
    lengths = [len(text) for item in encoded for text in item.texts]
    return FamilyResult(asked.family, tuple(asked.items), tuple(answers), asked.too_long, min(lengths), max(lengths))


def _batches(model: nn.Module, sequences: list[tuple[int, ...]], batch_size: int):
    """Batches in order, each with the number of its first sequence, filled on the right with token 0."""
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, received {batch_size}")
    device = next(model.parameters()).device
    live: Any = model
    vocabulary = getattr(getattr(live, "config", None), "vocab_size", None) or 1
    done = 0
    while done < len(sequences):
        count, longest = 0, 0
        for sequence in sequences[done : done + batch_size]:
            longest = max(longest, len(sequence))
            if count and (count + 1) * longest * vocabulary > _MOST_LOGITS:
                break
            count += 1
        batch = torch.zeros(count, max(map(len, sequences[done : done + count])), dtype=torch.int64)
        for row, sequence in zip(batch, sequences[done : done + count]):
            row[: len(sequence)] = torch.tensor(sequence)
        yield done, batch.to(device)
        done += count


def _likelihood(logits_TV: Tensor, text: tuple[int, ...], start: int) -> tuple[float, bool]:
    """Log-likelihood in nats of a text from token ``start`` on, and whether each of these tokens is the likeliest."""
    logits_AV = logits_TV[start - 1 : len(text) - 1]
    logits_AV = logits_AV.to(torch.promote_types(logits_AV.dtype, torch.float32))
    answer_A = torch.tensor(text[start:], device=logits_AV.device)
    chosen_A = logits_AV.gather(1, answer_A[:, None])[:, 0]
    value = (chosen_A - logits_AV.logsumexp(1)).sum(dtype=torch.float64)
    return value.item(), bool((logits_AV.argmax(1) == answer_A).all())


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    *,
    families: Sequence[str] = FAMILIES,
    num_items: int = 500,
    seed: int = 0,
    context_length: int | None = None,
    batch_size: int = 64,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, FamilyResult]:
    """Ask a model everything.

    Args:
        model: a causal language model that returns logits [B, T, V] of int64 tokens [B, T], as ``(logits, ...)`` (ours)
            or with ``.logits`` (`transformers`).
        tokenizer: of `erlangen.lm.load_tokenizer`, or one of `transformers`.
        families: which, in order.
        num_items: items a family, at least.
        seed: of the items.
        context_length: longest sequence, in tokens. None: what the model's config says.
        batch_size: sequences a forward, at most.
        progress: called with the family, the sequences done and all.

    Raises:
        ValueError: the tokenizer lacks symbols, the context is too short, or as of `score`.
    """
    config: Any = getattr(model, "config", None)
    for name in ("context_length", "max_position_embeddings"):
        context_length = context_length or getattr(config, name, None)
    if context_length is None:
        raise ValueError("the model's config names no longest sequence: pass context_length")
    reader = Reader(adapt_tokenizer(tokenizer), context_length, beginning_of(tokenizer))
    results: dict[str, FamilyResult] = {}
    for family in check_families(tuple(families)):
        (asked,) = make_suite([reader], families=[family], num_items=num_items, seed=seed)
        told: Mapping[str, Any] = {} if progress is None else {"progress": _of_family(progress, family)}
        results[family] = score(model, reader, asked, batch_size=batch_size, **told)
    return results


def _of_family(progress: Callable[[str, int, int], None], family: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(family, done, total)
