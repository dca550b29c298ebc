"""A short name for the numbers of a model, so that what belongs to one gauge is not applied in another."""

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from .layout import ModelLayout

# Of a tensor, as many rows and as many numbers of each, evenly spaced and with both ends.
_ROWS, _COLUMNS = 16, 64


class Tensors(Protocol):
    """Weights by name, in memory or on disk."""

    def __getitem__(self, name: str) -> Tensor: ...
    def shape(self, name: str) -> torch.Size: ...
    def dtype(self, name: str) -> torch.dtype: ...


def _spaced(number: int, most: int) -> list[int]:
    """At most so many of the indices 0 … number - 1."""
    if number <= most:
        return list(range(number))
    return [i * (number - 1) // (most - 1) for i in range(most)]


def fingerprint(layout: ModelLayout, weights: Tensors) -> str:
    """A hash of the tensors that a layout names: their names, shapes, dtypes, and a fixed sample of their numbers.

    The sample is 16 rows of every tensor and 64 numbers of each row, evenly spaced (all of them, where there are
    fewer), so that of a large checkpoint little is read. Models that differ only between those numbers have one
    fingerprint: it tells gauges and trainings apart, and is no proof against somebody who means to deceive. The same
    numbers in another dtype have another fingerprint.

    Args:
        layout: of the model.
        weights: its tensors; of those that have a method ``rows(name, first, last)``, only these rows are read.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    read = getattr(weights, "rows", None)
    for name in sorted(layout.tensor_shapes()):
        shape = tuple(weights.shape(name))
        digest.update(f"{name} {list(shape)} {weights.dtype(name)}\n".encode())
        if len(shape) < 2:
            sample = weights[name].reshape(1, -1)
        elif read is None:
            tensor = weights[name]
            sample = tensor[torch.tensor(_spaced(shape[0], _ROWS), device=tensor.device)].flatten(1)
        else:
            sample = torch.cat([read(name, row, row + 1).flatten(1) for row in _spaced(shape[0], _ROWS)])
        columns = torch.tensor(_spaced(sample.shape[1], _COLUMNS), device=sample.device)
        numbers = (sample[:, columns] + 0).cpu().contiguous()  # -0.0 counts as 0.0
        digest.update(numbers.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
