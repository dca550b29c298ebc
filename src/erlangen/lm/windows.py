"""Windows of tokens: shuffled or sequential ones to train on, a fixed set to validate on.

A window holds ``context_length + 1`` tokens: the first ``context_length`` are the inputs and the last
``context_length`` the targets. Neighbouring windows share one token, the last target of the one and the first input
of the other, so that each token is a target once. A window lies in one shard.

Shape suffixes: W windows, T = context_length + 1 tokens.
"""

import operator

import numpy as np
import torch

from erlangen.lm.corpus import Tokens


class TrainingWindows:
    """An endless stream of shuffled windows, each a pure function of its number in the stream.

    The stream is a sequence of epochs of ``windows_per_epoch`` windows. Each epoch draws, from
    ``np.random.default_rng((seed, epoch))``, an offset for every shard and then one permutation of all windows. In a
    shard of n tokens the windows start at ``offset + k * context_length`` for
    ``k = 0 .. max(1, n // context_length - 1) - 1``: one window fewer than would fit (where more than one would), so
    that the number of windows does not depend on the offset and every token is reached in some epoch. A shard
    shorter than one window is not used.

    A data position is one integer: workers can take any slices, in any order, and resuming at a number is exact
    (with one version of NumPy, whose generators may change between versions).

    Args:
        tokens: what to cut.
        context_length: number of inputs of a window.
        seed: non-negative.

    Raises:
        ValueError: ``context_length`` is not positive, ``seed`` is negative, or no shard has one window.
    """

    def __init__(self, tokens: Tokens, context_length: int, *, seed: int):
        lengths = _lengths(tokens, context_length)
        if seed < 0:
            raise ValueError(f"seed is a non-negative integer, got {seed}")
        self.context_length = context_length
        self.seed = seed
        self._shards = [shard for shard, length in zip(tokens.shards, lengths) if length > context_length]
        lengths = lengths[lengths > context_length]
        num_windows = np.maximum(1, lengths // context_length - 1)
        self._largest_offset = lengths - 1 - num_windows * context_length
        self._first_window = np.concatenate([[0], np.cumsum(num_windows)])
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def windows_per_epoch(self) -> int:
        """Number of windows of an epoch, the same for all epochs."""
        return int(self._first_window[-1])

    def batch(self, first: int, count: int) -> torch.Tensor:
        """Windows number ``first`` to ``first + count - 1`` of the stream: int64 [count, context_length + 1].

        Raises:
            ValueError: ``first`` is negative or ``count`` is not positive.
        """
        first, count = _checked(first, count)
        windows_WT = np.empty((count, self.context_length + 1), np.int64)
        done = 0
        while done < count:
            epoch, position = divmod(first + done, self.windows_per_epoch)
            offsets, permutation = self._shuffle(epoch)
            numbers = permutation[position : position + count - done]
            _gather(
                self._shards,
                self._first_window,
                offsets,
                numbers,
                windows_WT[done : done + len(numbers)],
            )
            done += len(numbers)
        return torch.from_numpy(windows_WT)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The offset of each shard and the permutation of the windows; those of the last epoch asked for are kept."""
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = None  # let the old permutation go before the new one is made
            rng = np.random.default_rng((self.seed, epoch))
            offsets = rng.integers(0, self._largest_offset, endpoint=True)
            dtype = np.int32 if self.windows_per_epoch < 2**31 else np.int64
            permutation = np.arange(self.windows_per_epoch, dtype=dtype)
            rng.shuffle(permutation)
            self._epoch = (epoch, offsets, permutation)
        return self._epoch[1:]


class SequentialWindows:
    """An endless stream of windows in the order of the corpus, each a pure function of its number in the stream.

    The windows of a shard start at multiples of ``context_length``, and shards follow one another, so that
    neighbouring windows are contiguous text; after the last window comes the first again. The tokens of a shard that
    do not fill a window are not used.

    Args:
        tokens: what to cut.
        context_length: number of inputs of a window.

    Raises:
        ValueError: ``context_length`` is not positive, or no shard has one window.
    """

    def __init__(self, tokens: Tokens, context_length: int):
        lengths = _lengths(tokens, context_length)
        self.context_length = context_length
        self._shards = tokens.shards
        self._first_window = np.concatenate([[0], np.cumsum((lengths - 1) // context_length)])

    @property
    def windows_per_epoch(self) -> int:
        """Number of windows of the corpus."""
        return int(self._first_window[-1])

    def batch(self, first: int, count: int) -> torch.Tensor:
        """Windows number ``first`` to ``first + count - 1`` of the stream: int64 [count, context_length + 1].

        Raises:
            ValueError: ``first`` is negative or ``count`` is not positive.
        """
        first, count = _checked(first, count)
        numbers = (first + np.arange(count)) % self.windows_per_epoch
        windows_WT = np.empty((count, self.context_length + 1), np.int64)
        _gather(self._shards, self._first_window, np.zeros(len(self._shards), np.int64), numbers, windows_WT)
        return torch.from_numpy(windows_WT)


def validation_windows(tokens: Tokens, context_length: int, max_windows: int | None) -> torch.Tensor:
    """A fixed set of windows: int64 [number of windows, context_length + 1].

    All windows that start at multiples of ``context_length`` in their shard when they are at most ``max_windows``
    (or that is None), else ``max_windows`` of them, evenly spaced.

    Raises:
        ValueError: ``context_length`` or ``max_windows`` is not positive, or no shard has one window.
    """
    lengths = _lengths(tokens, context_length)
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows is at least 1, or None for all windows, got {max_windows}")
    first_window = np.concatenate([[0], np.cumsum((lengths - 1) // context_length)])
    total = int(first_window[-1])
    count = total if max_windows is None else min(total, max_windows)
    numbers = (2 * np.arange(count) + 1) * total // (2 * count)  # the middles of `count` equal stretches
    windows_WT = np.empty((count, context_length + 1), np.int64)
    _gather(tokens.shards, first_window, np.zeros(len(lengths), np.int64), numbers, windows_WT)
    return torch.from_numpy(windows_WT)


def _checked(first: int, count: int) -> tuple[int, int]:
    first, count = operator.index(first), operator.index(count)
    if first < 0 or count < 1:
        raise ValueError(f"batch takes first >= 0 and count >= 1, got first={first} and count={count}")
    return first, count


def _lengths(tokens: Tokens, context_length: int) -> np.ndarray:
    if context_length < 1:
        raise ValueError(f"context_length is at least 1, got {context_length}")
    lengths = np.array([len(shard) for shard in tokens.shards], np.int64)
    if lengths.max(initial=0) <= context_length:
        raise ValueError(
            f"a window of context_length {context_length} takes {context_length + 1} consecutive tokens, but the "
            f"longest shard has {lengths.max(initial=0)}: use more data or a shorter context"
        )
    return lengths


def _gather(shards, first_window: np.ndarray, offsets: np.ndarray, numbers: np.ndarray, out_WT: np.ndarray) -> None:
    """Copy the windows ``numbers`` to the rows of ``out_WT``; window k of shard s is first_window[s] + k."""
    context_length = out_WT.shape[1] - 1
    of_shard = np.searchsorted(first_window, numbers, side="right") - 1
    starts = offsets[of_shard] + (numbers - first_window[of_shard]) * context_length
    for row_T, shard, start in zip(out_WT, of_shard.tolist(), starts.tolist()):
        row_T[:] = shards[shard][start : start + context_length + 1]
