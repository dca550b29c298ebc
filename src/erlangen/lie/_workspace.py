"""Memory that tiles of attention use one after the other, and calls too."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Room:
    """Memory for the arrays of one tile, used again for the next.

    The allocator would give a large array back to the system each time, and touching its pages anew takes longer than
    the arithmetic does; and the fewer arrays are in use, the more of them stay in the cache.
    """

    def __init__(self) -> None:
        self._memory: list[Tensor] = []
        self._shape: tuple[int, ...] = ()

    def clear(self, like: Tensor, shape: tuple[int, ...], keep: bool) -> None:
        """Start anew, with arrays of this shape. Without ``keep``, what is let go is used again within the tile."""
        if shape != self._shape:
            size = math.prod(shape)
            self._memory = [array for array in self._memory if array.numel() >= size]
            self._mine = [array[:size].view(shape) for array in self._memory]
        self._like, self._shape, self._keep = like, shape, keep
        self._free = self._mine[::-1]

    def __call__(self) -> Tensor:
        """An array [B, G, Q, K] of unspecified contents."""
        if not self._free:
            self._memory.append(memory_like(self._like, math.prod(self._shape)))
            self._mine.append(self._memory[-1].view(self._shape))
            return self._mine[-1]
        return self._free.pop()

    def let_go(self, *arrays: Tensor) -> None:
        """Say that ``norms`` needs these no longer; `vjp` may."""
        if not self._keep:
            self._free.extend(arrays)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self._memory)


def memory_like(like: Tensor, size: int) -> Tensor:
    """A tensor [size] of unspecified contents, which may be used outside of ``torch.inference_mode`` too."""
    with torch.inference_mode(False):
        return like.new_empty(size)


class Workspace:
    """Memory that tiles use one after the other: a `Room` for the geometry, and pieces by number for the rest."""

    def __init__(self) -> None:
        self.room = Room()
        self._pieces: dict[int, Tensor] = {}

    def piece(self, which: int, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of unspecified contents, that lives until the next of this number."""
        size = math.prod(shape)
        if which not in self._pieces or self._pieces[which].numel() < size:
            self._pieces[which] = memory_like(like, size)
        return self._pieces[which][:size].view(shape)

    @property
    def num_bytes(self) -> int:
        return self.room.num_bytes + sum(piece.nbytes for piece in self._pieces.values())


_KEPT_BYTES = 1 << 25
_kept = threading.local()


@contextmanager
def workspace(like: Tensor) -> Iterator[Workspace]:
    """That of the last call of this thread and dtype, on a CPU: what goes back to the system has to be mapped anew,
    page by page. At most 32 MB are kept, for each.
    """
    kept = vars(_kept) if like.device.type == "cpu" else {}
    mine = kept.pop(str(like.dtype), None) or Workspace()
    try:
        yield mine
    finally:
        if mine.num_bytes <= _KEPT_BYTES:
            kept[str(like.dtype)] = mine
