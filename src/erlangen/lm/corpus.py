"""Corpora: training and validation tokens from source code, text files, token shards or a Hugging Face data set."""

import glob
import hashlib
import itertools
import json
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from erlangen._extras import require
from erlangen.lm._shards import is_shard, open_shard, write_aside, write_shard
from erlangen.lm.tokenizers import Tokenizer, load_tokenizer

# fingerprint() reads every token of up to this many (a few seconds), and samples larger sets.
_FULLY_HASHED = 2**26
_BLOCK = 4096
_BLOCKS = 64
# A Hugging Face data set is kept in steps of this many tokens: the most that a stopped download loses.
_TOKENS_PER_STEP = 10_000_000
_HF_MAX_TOKENS = 100_000_000
_TOKENS_PER_REPORT = 100_000
# The complete library has about 12 MB without its tests; packages with a part of it are no corpus.
_STDLIB_BYTES = 4_000_000


class Tokens:
    """An ordered set of 1-D integer arrays, in memory or memory-mapped: the shards.

    Args:
        shards: 1-D arrays of non-negative integers. Empty ones are dropped.

    Raises:
        ValueError: an array is not 1-D, not of integers, or has a negative one.
    """

    def __init__(self, shards: Iterable[np.ndarray]):
        self.shards = tuple(shard for shard in shards if len(shard))
        for shard in self.shards:
            if shard.ndim != 1 or shard.dtype.kind not in "iu":
                raise ValueError(f"a shard is a 1-D array of integers, got shape {shard.shape} of {shard.dtype}")
            if shard.dtype.kind == "i" and shard.min() < 0:
                raise ValueError(f"tokens are not negative, got {shard.min()}: check what made the array")

    def __len__(self) -> int:
        """Number of tokens of all shards."""
        return sum(len(shard) for shard in self.shards)

    def __repr__(self) -> str:
        return f"Tokens({len(self):,} tokens in {len(self.shards)} shards)"

    @cached_property
    def max_token(self) -> int:
        """The largest token, -1 if there is none. Reads all tokens, once; NumPy reads a memory map page by page."""
        return max((int(shard.max()) for shard in self.shards), default=-1)

    def fingerprint(self) -> str:
        """16 hexadecimal digits of a SHA-256 of the content: equal on all machines and for all integer types.

        It covers the length of each shard and, of up to 2²⁶ tokens, every token. Of a larger set it covers 64 blocks
        of 4096 tokens in each shard, evenly spaced from its first token to its last: another data set, another order
        of shards or a damaged end is seen, a change of single tokens in the middle may not be.
        """
        digest = hashlib.sha256()
        everything = len(self) <= _FULLY_HASHED
        for shard in self.shards:
            digest.update(f"{len(shard)};".encode())
            step = 2**20
            blocks = (shard[i : i + step] for i in range(0, len(shard), step)) if everything else _sample(shard)
            for block in blocks:
                digest.update(block.astype("<u4").tobytes())
        return digest.hexdigest()[:16]

    def split(self, count: int) -> tuple["Tokens", "Tokens"]:
        """The first ``count`` tokens and the others, as views."""
        head, tail = [], []
        for shard in self.shards:
            cut = min(max(count, 0), len(shard))
            head.append(shard[:cut])
            tail.append(shard[cut:])
            count -= cut
        return Tokens(head), Tokens(tail)


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokens to train on and to validate on, and the tokenizer that made them.

    Attributes:
        name: what the reports call it.
        train: training tokens, at least one.
        validation: validation tokens, at least one.
        tokenizer_name: ``Tokenizer.name``.
        vocab_size: one more than the largest token the tokenizer can make. A sample of the tokens is checked against
            it here; ``Tokens.max_token`` is the full check.

    Raises:
        ValueError: a split is empty, or a sampled token is not below ``vocab_size``.
    """

    name: str
    train: Tokens
    validation: Tokens
    tokenizer_name: str
    vocab_size: int

    def __post_init__(self):
        for split, tokens in (("training", self.train), ("validation", self.validation)):
            if not len(tokens):
                raise ValueError(
                    f"a corpus needs training and validation tokens, but {self.name} has no {split} tokens: give more "
                    f"text or another validation_fraction"
                )
            largest = max(int(block.max()) for shard in tokens.shards for block in _sample(shard))
            if largest >= self.vocab_size:
                raise ValueError(
                    f"the tokens of {self.name} are not from tokenizer {self.tokenizer_name!r}: it has "
                    f"{self.vocab_size} tokens, but token {largest} was found; give the tokenizer that made them"
                )


def load_corpus(
    source: str = "stdlib",
    tokenizer: str | Tokenizer = "bytes",
    *,
    validation_fraction: float = 0.1,
    max_tokens: int | None = None,
    cache: Path | None = None,
    text_field: str = "text",
    split: str = "train",
    progress: Callable[[int, int], Any] | None = None,
) -> Corpus:
    """Load a corpus and split it into training and validation tokens.

    Each document of a collection (a folder, a data set) is followed by the tokenizer's ``end_of_text`` token, or by
    an empty line if it has none.

    Args:
        source: one of

            - ``"stdlib"``: the source text of Python's own standard library, without its tests; on every machine,
              and fixed by the version of Python and its packaging. Split by file, like a folder.
            - the path of a text file (UTF-8): split at a line end.
            - the path of a folder: all text files below it, sorted by relative path, without binary and hidden ones.
              A file is for validation by the hash of its relative path, so that it stays on its side when others
              come and go. If the folder itself holds ``.bin`` shards, those.
            - the path of one ``.bin`` shard, or a pattern (``"data/fineweb_train_*.bin"``) of several: tokens in the
              format of llm.c, memory-mapped in the order of their names. Shards with "val" in their file name are for
              validation; without any, the last tokens are.
            - ``"hf:NAME"`` or ``"hf:NAME:CONFIG"``: a data set of the Hugging Face hub, or a local folder that
              ``datasets.load_dataset`` can read. It is streamed and kept as shards in ``cache``. A stopped download
              goes on from the shards that are complete, a finished one needs no network. Every k-th document is for
              validation. Remove the folder in the cache to have a newer state of a data set of the hub. Ranks of one
              job should not all download: let one of them finish first.
        tokenizer: as for :func:`~erlangen.lm.tokenizers.load_tokenizer`, or a tokenizer. For shards, the one that
            made them.
        validation_fraction: share of the text, files, tokens or documents that is for validation.
        max_tokens: use at most so many tokens, training and validation together. For ``hf:`` it bounds the download
            and is 100 million unless set.
        cache: folder for downloads; ``$ERLANGEN_CACHE`` or ``~/.cache/erlangen`` unless set.
        text_field: for ``hf:``, the field of a document that holds its text.
        split: for ``hf:``, the split of the data set to read.
        progress: for ``hf:``, called as ``progress(done_tokens, total_tokens)`` while it downloads.

    Raises:
        FileNotFoundError: the source does not exist or cannot be reached.
        ValueError: an argument is out of range; a file is not text or not a shard; there is no text; a split is
            empty; the tokens are not of the tokenizer.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is between 0 and 1, both excluded, got {validation_fraction}")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens is at least 2, one to train on and one to validate on, got {max_tokens}")
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    path = Path(source).expanduser()
    if source.startswith("hf:"):
        name = source
        dataset = _HuggingFace(source, split, text_field, tokenizer, validation_fraction, max_tokens, cache)
        train, validation = dataset.load(progress)
    elif source == "stdlib":
        name = f"stdlib-{platform.python_version()}"
        train, validation = _documents(_stdlib(), tokenizer, validation_fraction)
    elif path.is_dir() and (shards := sorted(_only_files(path.glob("*.bin")))) and any(map(is_shard, shards)):
        name = path.resolve().name
        train, validation = _shards(shards, validation_fraction)
    elif path.is_dir():
        name = path.resolve().name
        texts = dict(_texts(path, _files(path)))
        if not texts:
            raise ValueError(f"a folder needs a UTF-8 text file or a .bin shard, but {path} has none: check the path")
        if len(texts) == 1:
            train, validation = _one_text(next(iter(texts.values())), tokenizer, validation_fraction)
        else:
            train, validation = _documents(texts, tokenizer, validation_fraction)
    elif path.is_file() and path.suffix == ".bin":
        name = path.name
        train, validation = _shards([path], validation_fraction)
    elif path.is_file():
        name = path.name
        text = _read_text(path)
        if text is None:
            raise ValueError(
                f"a text file is UTF-8 without NUL bytes, but {path} is not: convert it, or check the path"
            )
        if not text:
            raise ValueError(f"a corpus needs text, but {path} is empty: give a file with text")
        train, validation = _one_text(text, tokenizer, validation_fraction)
    elif shards := sorted(_only_files(map(Path, glob.glob(str(path)))), key=lambda shard: (shard.name, shard)):
        name = path.name
        train, validation = _shards(shards, validation_fraction)
    else:
        raise FileNotFoundError(
            f"there is no corpus {source!r}: a source is 'stdlib', 'hf:NAME', or the path of a text file, of a folder "
            f"or of .bin shards (a pattern may match several)"
        )
    if max_tokens is not None and (total := len(train) + len(validation)) > max_tokens:
        kept = max_tokens * len(train) // total
        train, validation = train.split(kept)[0], validation.split(max_tokens - kept)[0]
    return Corpus(
        name=name,
        train=train,
        validation=validation,
        tokenizer_name=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
    )


# --- text -------------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str | None:
    """The text of a file, line ends as they are; None if it is not UTF-8 or, as git has it, starts with NUL bytes."""
    with open(path, "rb") as file:
        content = file.read(8000)
        if b"\0" in content:
            return None
        content += file.read()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _files(root: Path, skipped_folders: Callable[[str], bool] = lambda name: False) -> list[Path]:
    """All files below ``root`` but hidden ones, sorted by relative path."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not (name.startswith(".") or skipped_folders(name))]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


def _texts(root: Path, files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """(relative path, text) of the files that have any."""
    for path in files:
        if text := _read_text(path):
            yield path.relative_to(root).as_posix(), text


def _stdlib() -> dict[str, str]:
    root = Path(sysconfig.get_path("stdlib"))

    def skipped(name: str) -> bool:
        # config-* holds the settings of this machine's build.
        names = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        return name in names or name.startswith("config-")

    # So does _sysconfigdata; distributions and users add sitecustomize and usercustomize.
    machine = re.compile(r"_sysconfigdata.*|sitecustomize\.py|usercustomize\.py")
    files = [path for path in _files(root, skipped) if path.suffix == ".py" and not machine.fullmatch(path.name)]
    texts = dict(_texts(root, files))
    if (size := sum(map(len, texts.values()))) < _STDLIB_BYTES:
        raise ValueError(
            f"corpus 'stdlib' needs the source files of Python's standard library, but {root} has only {size} "
            f"characters of them: install the complete library (on Debian libpython3-stdlib), or give a text file"
        )
    return texts


def _documents(texts: dict[str, str], tokenizer: Tokenizer, validation_fraction: float) -> tuple[Tokens, Tokens]:
    """Split whole files: those whose hash is in the lowest ``validation_fraction``, at least one on either side."""

    def position(relative: str) -> float:
        digest = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    by_position = sorted(texts, key=lambda relative: (position(relative), relative))
    count = sum(position(relative) < validation_fraction for relative in by_position)
    chosen = set(by_position[: min(max(count, 1), len(by_position) - 1)])
    separator = _separator(tokenizer)
    train, validation = [], []
    for relative, text in texts.items():
        (validation if relative in chosen else train).extend((tokenizer.encode(text), separator))
    return Tokens([np.concatenate(train)]), Tokens([np.concatenate(validation)])


def _one_text(text: str, tokenizer: Tokenizer, validation_fraction: float) -> tuple[Tokens, Tokens]:
    """Split at the first line end after 1 - ``validation_fraction`` of the characters, or else the last before it."""
    target = round(len(text) * (1 - validation_fraction))
    cut = text.find("\n", target) + 1
    if cut in (0, len(text)):
        cut = text.rfind("\n", 0, target) + 1 or target
    return Tokens([tokenizer.encode(text[:cut])]), Tokens([tokenizer.encode(text[cut:])])


def _separator(tokenizer: Tokenizer) -> np.ndarray:
    """What follows each document of a collection."""
    like = tokenizer.encode("\n\n")
    return like if tokenizer.end_of_text is None else np.array([tokenizer.end_of_text], like.dtype)


# --- shards -----------------------------------------------------------------------------------------------------------


def _only_files(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.is_file()]


def _shards(paths: list[Path], validation_fraction: float) -> tuple[Tokens, Tokens]:
    shards = [(path, open_shard(path)) for path in paths]
    train = Tokens(tokens for path, tokens in shards if "val" not in path.name)
    validation = Tokens(tokens for path, tokens in shards if "val" in path.name)
    if not len(train):
        raise ValueError(
            f"shards with 'val' in their name are for validation, and {paths[0]} leaves none to train on: "
            f"give the training shards too, or rename it"
        )
    if len(validation):
        return train, validation
    return train.split(len(train) - round(len(train) * validation_fraction))


# --- Hugging Face data sets -------------------------------------------------------------------------------------------


class _HuggingFace:
    """A data set as shards in a folder of the cache, written in steps.

    A step is at most one training and one validation shard, and ends with a document. The folder's corpus.json names
    the shards of each step and the number of documents read so far. It is replaced when both shards are in place, so
    that whatever it names is complete; what it does not name does not exist for us.
    """

    def __init__(
        self,
        source: str,
        split: str,
        text_field: str,
        tokenizer: Tokenizer,
        validation_fraction: float,
        max_tokens: int | None,
        cache: Path | None,
    ):
        self.dataset: str = source.removeprefix("hf:")
        self.config: str | None = None
        if not Path(self.dataset).expanduser().exists() and ":" in self.dataset:
            self.dataset, _, self.config = self.dataset.rpartition(":")
        if not self.dataset or self.config == "":
            raise ValueError(f"a Hugging Face source is 'hf:NAME' or 'hf:NAME:CONFIG', got {source!r}")
        folder = Path(self.dataset).expanduser()
        files: list[Any] = []
        if folder.is_dir():
            self.dataset = str(folder.resolve())
            for path in _files(folder):
                status = path.stat()
                files.append([path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns])
        self.split, self.text_field, self.tokenizer = split, text_field, tokenizer
        self.max_tokens = _HF_MAX_TOKENS if max_tokens is None else max_tokens
        # The decimal that was written, not its binary neighbour: 0.1 means each tenth document.
        self.fraction = Fraction(str(validation_fraction))
        self.identity = {
            "format": 1,
            "dataset": self.dataset,
            "config": self.config,
            "files": files,
            "split": split,
            "text_field": text_field,
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "validation_fraction": str(self.fraction),
            "max_tokens": self.max_tokens,
        }
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]
        label = re.sub(r"[^A-Za-z0-9.-]+", "_", Path(self.dataset).name) or "data"
        root = cache or Path(os.environ.get("ERLANGEN_CACHE") or "~/.cache/erlangen")
        self.folder = Path(root).expanduser() / "corpora" / f"{label}-{key}"

    def load(self, progress: Callable[[int, int], Any] | None) -> tuple[Tokens, Tokens]:
        steps, complete = self._read_manifest()
        if not complete:
            steps = self._download(steps, progress or (lambda done, total: None))
        train = Tokens(open_shard(self.folder / step["train"]) for step in steps if step["train"])
        validation = Tokens(open_shard(self.folder / step["val"]) for step in steps if step["val"])
        return train, validation

    def _read_manifest(self) -> tuple[list[dict[str, Any]], bool]:
        """The steps up to the first that was damaged since, and whether they are the whole corpus."""
        try:
            manifest = json.loads((self.folder / "corpus.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return [], False
        steps = list(itertools.takewhile(self._is_intact, manifest["steps"]))
        return steps, manifest["complete"] and len(steps) == len(manifest["steps"])

    def _is_intact(self, step: dict[str, Any]) -> bool:
        try:
            sizes = [len(open_shard(self.folder / step[kind])) for kind in ("train", "val") if step[kind]]
        except (OSError, ValueError):
            return False
        return sum(sizes) == step["tokens"]

    def _write_manifest(self, steps: list[dict[str, Any]], complete: bool) -> None:
        manifest = {**self.identity, "complete": complete, "steps": steps}
        write_aside(self.folder / "corpus.json", json.dumps(manifest, indent=1).encode())

    def _download(self, steps: list[dict[str, Any]], progress: Callable[[int, int], Any]) -> list[dict[str, Any]]:
        first = steps[-1]["documents"] if steps else 0
        done = reported = sum(step["tokens"] for step in steps)
        pending: dict[str, list[np.ndarray]] = {"train": [], "val": []}
        num_pending = 0
        separator = _separator(self.tokenizer)

        def keep(documents: int) -> None:
            nonlocal num_pending
            if not num_pending:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            step: dict[str, Any] = {"documents": documents, "tokens": num_pending, "train": None, "val": None}
            for kind, arrays in pending.items():
                if arrays and len(tokens := np.concatenate(arrays)):
                    step[kind] = f"{kind}_{len(steps):06d}.bin"
                    write_shard(self.folder / step[kind], tokens, self.tokenizer.vocab_size)
                arrays.clear()
            num_pending = 0
            steps.append(step)
            self._write_manifest(steps, complete=False)

        progress(done, self.max_tokens)
        index = first - 1
        # A stop between the last step and the manifest that says "complete" leaves nothing to read.
        if done < self.max_tokens:
            for index, text in enumerate(self._stream(first), first):
                kind = "val" if self._for_validation(index) else "train"
                for part in (self.tokenizer.encode(text), separator) if text else ():
                    part = part[: self.max_tokens - done]
                    pending[kind].append(part)
                    num_pending += len(part)
                    done += len(part)
                if num_pending >= _TOKENS_PER_STEP:
                    keep(index + 1)
                if done - reported >= _TOKENS_PER_REPORT:
                    progress(done, self.max_tokens)
                    reported = done
                if done >= self.max_tokens:
                    break
        keep(index + 1)
        if not done:
            raise ValueError(
                f"a corpus needs text, but split {self.split!r} of data set {self.dataset!r} has none in its field "
                f"{self.text_field!r}: choose another split or text_field"
            )
        self._write_manifest(steps, complete=True)
        progress(done, self.max_tokens)
        return steps

    def _for_validation(self, index: int) -> bool:
        """Document 1 and then every k-th, 1 / k being the fraction: ⌈i·f⌉ steps up at document i."""
        p, q = self.fraction.numerator, self.fraction.denominator
        return -(-index * p // q) > -(-(index - 1) * p // q)

    def _stream(self, first: int) -> Iterator[str]:
        """The texts of the documents from number ``first`` on."""
        datasets = require("datasets", "data")
        try:
            documents = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=True)
        except Exception as error:  # the hub, the network, the format of the files: each raises its own
            kind = FileNotFoundError if isinstance(error, OSError) else ValueError
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise kind(
                f"could not open split {self.split!r} of data set {self.dataset!r}"
                + (f" with config {self.config!r}" if self.config else "")
                + f" ({reason}): check the source and split, and the network if the data set is on the hub"
            ) from error
        for index, document in enumerate(documents.skip(first), first):
            text = document.get(self.text_field)
            if not isinstance(text, str):
                fields = ", ".join(sorted(key for key, value in document.items() if isinstance(value, str)))
                raise ValueError(
                    f"text_field names a field that holds text, but document {index} of data set {self.dataset!r} has "
                    f"{type(text).__name__} in {self.text_field!r}: its fields with text are {fields or 'none'}"
                )
            yield text


# --- shared -----------------------------------------------------------------------------------------------------------


def _sample(shard: np.ndarray) -> list[np.ndarray]:
    """Up to 64 blocks of 4096 tokens, evenly spaced from the first token of the shard to its last."""
    starts = np.unique(np.linspace(0, max(len(shard) - _BLOCK, 0), _BLOCKS).astype(np.int64))
    return [shard[start : start + _BLOCK] for start in starts.tolist()]
