"""Files of safetensors, read and written a part at a time.

The format: 8 bytes, the length of a header in JSON (little endian); the header, name -> dtype, shape and place of the
bytes; then the bytes of the tensors, without gaps (https://huggingface.co/docs/safetensors). The library of that name
writes a file from tensors that are all in memory; here a file is made with its header alone, and tensors are put into
their places as they become ready. Plain reads and writes, not a memory map, so that a process holds what it asked for.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from erlangen.gauge._weights import give_back as give_back

CHUNK = 1 << 23  # bytes copied at a time
_MOST = 100_000_000  # bytes of a header, the limit of the format

# What tensors of weights may be; in their own words, and in torch's.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = FLOATS | {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
# Bits of an element, of dtypes that are carried along but never read as numbers too.
_BITS = {name: 8 * dtype.itemsize for name, dtype in _DTYPES.items()} | {
    "C64": 64, "U64": 64, "U32": 32, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: as the format names it, such as "BF16".
        shape: of the tensor.
        start, stop: its bytes, counted from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFile:
    """A file whose header has been read and agrees with its size.

    Attributes:
        path: of the file.
        header: its first bytes, up to those of the tensors.
        metadata: texts that the header holds besides.
        entries: its tensors by name, in the order of their bytes.
    """

    path: Path
    header: bytes
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]


def open_file(path: Path) -> TensorFile:
    """Read and check the header of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not in this format, was cut off, or its header contradicts itself.
    """
    size = path.stat().st_size
    foreign = f"{path} is not in the format of safetensors"
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or not 2 <= length <= _MOST:
            raise ValueError(f"{foreign}: it starts with no length of a header")
        text = file.read(length)
    if len(text) < length:
        raise ValueError(_cut_off(path, 8 + length, size) if text.startswith(b"{") else f"{foreign}: it has no header")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(name, fields, len(first) + length) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{foreign}: its header is damaged ({error})") from error
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    place = 8 + length
    for name, entry in entries.items():
        if entry.start != place:
            raise ValueError(f"{foreign}: the bytes of {name} do not follow those of the tensor before")
        place = entry.stop
    if place > size:
        raise ValueError(_cut_off(path, place, size))
    if place < size:
        raise ValueError(f"{path} has {size - place:,} bytes behind its last tensor: it is damaged, get it again")
    return TensorFile(path, first + text, metadata, entries)


def _cut_off(path: Path, expected: int, size: int) -> str:
    return f"{path} was cut off: its header speaks of {expected:,} bytes or more, it has {size:,}: get it again"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it names a tensor twice")
    return found


def _entry(name: str, fields: Mapping[str, Any], offset: int) -> Entry:
    dtype, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    if dtype not in _BITS:
        raise ValueError(f"{name} is of the unknown dtype {dtype}")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"the shape or place of {name} is not of natural numbers")
    if 8 * (stop - start) != prod(shape) * _BITS[dtype]:
        raise ValueError(f"{name} has {stop - start} bytes, which do not make {dtype} {list(shape)}")
    return Entry(dtype, shape, offset + start, offset + stop)


def dtype_of(entry: Entry) -> torch.dtype:
    """The dtype in torch's words.

    Raises:
        ValueError: numbers are not read from this dtype.
    """
    if entry.dtype not in _DTYPES:
        raise ValueError(f"tensors of dtype {entry.dtype} are carried along, their numbers are not read")
    return _DTYPES[entry.dtype]


def read(path: Path, entry: Entry, first: int = 0, last: int | None = None) -> Tensor:
    """A tensor of a file, or its rows from ``first`` up to ``last``."""
    shape = entry.shape
    start, stop = entry.start, entry.stop
    if shape:
        first, last, _ = slice(first, last).indices(shape[0])
        row = (stop - start) // max(shape[0], 1)
        start, stop, shape = start + first * row, start + last * row, (max(last - first, 0), *shape[1:])
    tensor = torch.empty(shape, dtype=dtype_of(entry))
    view, done = tensor.reshape(-1).view(torch.uint8).numpy().data, 0
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while done < stop - start:  # one call reads 2 GiB at most
            number = file.readinto(view[done:])
            if not number:
                raise ValueError(f"{path} became shorter while it was read")
            done += number
    return tensor


def _write(file: BinaryIO, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += file.write(data[done:])


def write(path: Path, entry: Entry, tensor: Tensor, first: int = 0) -> None:
    """Put a tensor of the entry's dtype into its place: all of it, or its rows from ``first`` on."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    row = (entry.stop - entry.start) // max(entry.shape[0], 1) if first else 0
    with path.open("r+b", buffering=0) as file:
        file.seek(entry.start + first * row)
        _write(file, data)


def _header(
    places: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """The header of tensors that lie one behind the other, name -> dtype, shape and bytes; and their entries."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, (dtype, shape, length) in places.items():
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + length]}
        place += length
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    entries = {name: _entry(name, table[name], len(header)) for name in places}
    return header, entries


def create(path: Path, source: TensorFile, added: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> TensorFile:
    """A new file with the header of another, byte for byte unless tensors are added at its end; its tensors are zero.

    Raises:
        FileExistsError: it is there.
    """
    header, entries = source.header, dict(source.entries)
    if added:
        places = {name: (entry.dtype, entry.shape, entry.stop - entry.start) for name, entry in entries.items()}
        places |= {name: (_NAMES[d], tuple(s), d.itemsize * prod(s)) for name, (d, s) in added.items()}
        header, entries = _header(places, source.metadata)
    with path.open("xb") as file:
        file.write(header)
        file.truncate(max([len(header), *(entry.stop for entry in entries.values())]))
    return TensorFile(path, header, source.metadata, entries)


def copy(source: TensorFile, target: TensorFile, names: Iterable[str]) -> None:
    """Copy the bytes of tensors from one file into another."""
    buffer = memoryview(bytearray(CHUNK))
    with source.path.open("rb", buffering=0) as reading, target.path.open("r+b", buffering=0) as writing:
        for name in names:
            entry, rest = source.entries[name], source.entries[name].stop - source.entries[name].start
            reading.seek(entry.start)
            writing.seek(target.entries[name].start)
            while rest:
                number = reading.readinto(buffer[: min(rest, CHUNK)])
                if not number:
                    raise ValueError(f"{source.path} became shorter while it was copied")
                _write(writing, buffer[:number])
                rest -= number


class Tensors(Mapping[str, Tensor]):
    """The tensors of a file by name, each read when it is asked for; nothing of them stays in memory."""

    def __init__(self, file: TensorFile) -> None:
        self.file = file

    def __getitem__(self, name: str) -> Tensor:
        return read(self.file.path, self.file.entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.entries)

    def __len__(self) -> int:
        return len(self.file.entries)

    def __repr__(self) -> str:
        return f"Tensors({str(self.file.path)!r}, {len(self)} tensors)"


class Spool(MutableMapping[str, Tensor]):
    """Tensors by name that go to the disk as they are set, and are read from there.

    The header of a file lists all its tensors and stands in front of them, so they wait in a file of their own until
    `save`.

    Args:
        path: of that file; `save` and `remove` remove it.

    Raises:
        FileExistsError: it is there.
    """

    def __init__(self, path: Path) -> None:
        path.open("xb").close()
        self._path, self._entries, self._size = path, dict[str, Entry](), 0

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name)

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows of a tensor (of its first dimension), without the others being read."""
        return read(self._path, self._entries[name], first, last)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        entry = self._place(name, tensor.dtype, tensor.shape)
        write(self._path, entry, tensor.detach().cpu())
        self._entries[name] = entry

    def put_rows(
        self, name: str, dtype: torch.dtype, shape: torch.Size, pieces: Iterable[tuple[slice, Tensor]]
    ) -> None:
        """Set a tensor some rows at a time (of its first dimension), all of them."""
        entry = self._place(name, dtype, shape)
        for part, rows in pieces:
            write(self._path, entry, rows.detach().to(device="cpu", dtype=dtype), part.start)
        self._entries[name] = entry

    def _place(self, name: str, dtype: torch.dtype, shape: torch.Size) -> Entry:
        """Where a tensor is, or will be."""
        key, entry = (_NAMES[dtype], tuple(shape)), self._entries.get(name)
        if entry is None or (entry.dtype, entry.shape) != key:
            entry = Entry(*key, self._size, self._size + dtype.itemsize * shape.numel())
            self._size = entry.stop
        return entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def save(self, path: Path) -> TensorFile:
        """Make a file of all tensors, and remove their own; nothing is set or read here after that.

        Raises:
            FileExistsError: it is there.
        """
        places = {name: (entry.dtype, entry.shape, entry.stop - entry.start) for name, entry in self._entries.items()}
        header, entries = _header(places, {"format": "pt"})
        with path.open("xb") as file:
            file.write(header)
            file.truncate(max([len(header), *(entry.stop for entry in entries.values())]))
        saved = TensorFile(path, header, {"format": "pt"}, entries)
        copy(TensorFile(self._path, b"", {}, self._entries), saved, entries)
        self.remove()
        return saved

    def remove(self) -> None:
        """Remove the file; nothing is set or read here after that."""
        self._path.unlink()


def to_disk(paths: Iterable[Path]) -> None:
    """Return when files and folders are on the disk, not in its cache only."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
