"""Token shards in the format of llm.c: a header of 256 little-endian int32, then the tokens.

The header holds (magic, version, number of tokens); the rest of it is zero. Two magics are in use:

    ======== ======= ======= ==========================================
    magic    version tokens  written by
    ======== ======= ======= ==========================================
    20240520 1       uint16  llm.c ``dev/data``, GPT-2 vocabulary
    20240801 7       uint32  llm.c ``dev/data``, Llama 3 vocabulary
    ======== ======= ======= ==========================================

Source: https://github.com/karpathy/llm.c, ``dev/data/data_common.py``.
"""

import os
from pathlib import Path

import numpy as np

_HEADER = np.dtype("<i4")
_HEADER_LENGTH = 256
_HEADER_BYTES = _HEADER_LENGTH * _HEADER.itemsize
_TOKENS_OF = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
_HEADER_OF = {dtype: header for header, dtype in _TOKENS_OF.items()}


def is_shard(path: Path) -> bool:
    """Whether the file starts with the header of a shard."""
    return _read_header(path)[:2] in _TOKENS_OF


def open_shard(path: Path) -> np.ndarray:
    """The tokens of one shard, memory-mapped: uint16 or uint32, as the header says.

    Raises:
        ValueError: no such header, a count that is not positive, or a size that is not what the header says.
    """
    magic, version, count = _read_header(path)
    dtype = _TOKENS_OF.get((magic, version))
    if dtype is None:
        raise ValueError(
            f"a .bin shard starts with the llm.c header (magic 20240520 version 1, or magic 20240801 version 7), but "
            f"{path} starts with magic {magic} version {version}: write it again with that header"
        )
    if count <= 0:
        raise ValueError(f"a .bin shard holds at least one token, but the header of {path} says {count}: remove it")
    size, expected = path.stat().st_size, _HEADER_BYTES + count * dtype.itemsize
    if size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        raise ValueError(
            f"{path} is {state}: {count} tokens of {dtype.itemsize} bytes make a file of {expected} bytes, "
            f"but it has {size}: fetch or write it again"
        )
    # A plain view: slices of numpy's memmap class are several times slower to make.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=_HEADER_BYTES, shape=(count,)))


def write_shard(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Write ``tokens`` as one shard, aside and then renamed: nobody ever sees half of it."""
    dtype = np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")
    header = np.zeros(_HEADER_LENGTH, _HEADER)
    header[:3] = (*_HEADER_OF[dtype], len(tokens))
    write_aside(path, header.tobytes(), tokens.astype(dtype).tobytes())


def write_aside(path: Path, *parts: bytes) -> None:
    """Write ``parts`` to a file beside ``path``, and rename it to ``path`` once it is on the disk."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _read_header(path: Path) -> tuple[int, int, int]:
    """(magic, version, count), all zero for a file that is too short to have a header."""
    with open(path, "rb") as file:
        head = file.read(_HEADER_BYTES)
    if len(head) < _HEADER_BYTES:
        return 0, 0, 0
    magic, version, count = np.frombuffer(head, _HEADER, count=3).tolist()
    return magic, version, count
