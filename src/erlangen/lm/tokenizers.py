"""Tokenizers: text to arrays of small unsigned integers, and back.

Three kinds: UTF-8 bytes, the GPT-2 vocabulary (tiktoken), and any JSON file of the ``tokenizers`` library. Control
tokens spelled out in a text, such as ``<|endoftext|>``, are encoded as the ordinary text they are.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from erlangen._extras import require

# Longer texts are encoded in pieces of about this many characters.
_PIECE = 1 << 18
# A cut between two pieces is tried on this many characters either side of it.
_AROUND = 512
_CUTS_TRIED = 16
# Before the line end, not after it: GPT-2's pattern cuts a run of white space by what follows the run, and nothing in
# it looks back.
_LINE_END = re.compile(r"(?<=\S)\r?\n")
# What published vocabularies call the token between two documents, in the order we look for it.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class Tokenizer(Protocol):
    """What the library needs from a tokenizer; an object of your own with these members will do."""

    @property
    def name(self) -> str:
        """What identifies the tokenizer: two tokenizers of one name give the same tokens."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest token."""
        ...

    @property
    def end_of_text(self) -> int | None:
        """The token that ends a document, or None: documents then end in an empty line."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """The tokens of ``text``: 1-D, of the smallest of uint8, uint16 and uint32 that holds ``vocab_size`` tokens."""
        ...

    def decode(self, tokens: ArrayLike) -> str:
        """The text of ``tokens``; bytes that are no UTF-8 become U+FFFD."""
        ...


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that ``spec`` names.

    Args:
        spec: ``"bytes"`` (UTF-8, 256 tokens), ``"gpt2"`` (50,257 tokens; the vocabulary is looked for at the first
            text, so that shards made elsewhere can be trained on without it), or the path of a JSON file of the
            ``tokenizers`` library.

    Raises:
        FileNotFoundError: no such file; or, at the first text, no vocabulary of GPT-2 and no network to get it.
        ValueError: the file is not a tokenizer, or ``spec`` is none of the three.
    """
    if spec == "bytes":
        return _ByteTokenizer()
    if spec == "gpt2":
        return _Gpt2Tokenizer()
    path = Path(spec).expanduser()
    if path.is_file():
        return _JsonTokenizer(path)
    if path.is_dir():
        raise ValueError(f"a tokenizer is one JSON file, but {path} is a folder: name the tokenizer.json inside it")
    if path.suffix == ".json" or len(path.parts) > 1:
        raise FileNotFoundError(f"there is no tokenizer file {path}: check the path, or use 'bytes' or 'gpt2'")
    raise ValueError(f"a tokenizer is 'bytes', 'gpt2' or the path of a tokenizers JSON file, got {spec!r}")


class _ByteTokenizer:
    name = "bytes"
    vocab_size = 256
    end_of_text = None

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.frombuffer(text.encode("utf-8"), np.uint8)
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the byte tokenizer needs text that UTF-8 can write, but character {error.start} is a lone "
                f"surrogate: replace it"
            ) from error

    def decode(self, tokens: ArrayLike) -> str:
        return _checked(tokens, self).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class _Gpt2Tokenizer:
    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256

    @cached_property
    def _encoding(self) -> Any:
        tiktoken = require("tiktoken", "data")
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network layer raises
            raise FileNotFoundError(
                f"the gpt2 vocabulary is not on this machine and could not be fetched ({type(error).__name__}): "
                f"connect to the network once, or set TIKTOKEN_CACHE_DIR to a folder that has it"
            ) from error

    def encode(self, text: str) -> np.ndarray:
        return _encode_in_pieces(text, self._encoding.encode_ordinary, self.vocab_size)

    def decode(self, tokens: ArrayLike) -> str:
        return self._encoding.decode(_checked(tokens, self).tolist())


class _JsonTokenizer:
    def __init__(self, path: Path):
        library = require("tokenizers", "data")
        content = path.read_bytes()
        try:
            self._tokenizer = library.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"{path} is not a tokenizer of the tokenizers library: give a file that its Tokenizer.save wrote"
            ) from error
        # A file may carry the settings of its model's input: they would cut or fill a corpus.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(
                f"a tokenizer has at least one token, but the vocabulary of {path} is empty: train it first"
            )
        self.name = f"json:{hashlib.sha256(content).hexdigest()[:12]}:{path.name}"
        self.vocab_size: int = max(vocabulary.values()) + 1  # ids may have gaps
        self.end_of_text: int | None = next((vocabulary[name] for name in _END_OF_TEXT if name in vocabulary), None)

    def _encode_piece(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, text: str) -> np.ndarray:
        return _encode_in_pieces(text, self._encode_piece, self.vocab_size)

    def decode(self, tokens: ArrayLike) -> str:
        return self._tokenizer.decode(_checked(tokens, self).tolist(), skip_special_tokens=False)


def _encode_in_pieces(text: str, encode: Callable[[str], Sequence[int]], vocab_size: int) -> np.ndarray:
    """The tokens of ``text``, with the lists of Python integers of one piece at a time in memory."""
    dtype = np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.uint32
    return np.concatenate([np.asarray(encode(piece), dtype) for piece in _pieces(text, encode)])


def _pieces(text: str, encode: Callable[[str], Sequence[int]]) -> Iterator[str]:
    """Cut ``text`` at line ends where the tokens of the two sides are those of the whole.

    For the pattern of GPT-2 every line end after a visible character is such a place. Other tokenizers may join
    punctuation to the line end, or put a mark in front of each text: a cut is used only if the characters around it
    are encoded alike together and apart, and a tokenizer that fails this everywhere gets the text in one piece.
    """
    start = 0
    while len(text) - start > _PIECE:
        cut = start + _PIECE
        for _ in range(_CUTS_TRIED):
            match = _LINE_END.search(text, cut)
            if match is None:
                cut = len(text)
                break
            cut = match.start()
            left, right = text[max(start, cut - _AROUND) : cut], text[cut : cut + _AROUND]
            if [*encode(left), *encode(right)] == list(encode(left + right)):
                break
            cut = match.end()
        else:
            cut = len(text)
        yield text[start:cut]
        start = cut
    if start < len(text) or not text:
        yield text[start:]


def _checked(tokens: ArrayLike, tokenizer: Tokenizer) -> np.ndarray:
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"decode takes a 1-D array of integers, got shape {array.shape} of {array.dtype}: pass one row"
        )
    if array.size and not 0 <= array.min() <= array.max() < tokenizer.vocab_size:
        raise ValueError(
            f"tokens of {tokenizer.name!r} are from 0 to {tokenizer.vocab_size - 1}, got {array.min()} to "
            f"{array.max()}: decode with the tokenizer that made them"
        )
    return array
