"""Tensors by name: what a treatment of weights reads and writes, in memory or on disk."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from .layout import unwrap

_CHUNK = 1 << 18  # numbers of a matrix in float64 at a time: 2 MB, so that a few of them weigh little


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """The rows of a matrix in pieces that are small in float64."""
    step = max(_CHUNK // max(columns, 1), 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class ReadWeights(Protocol):
    """A thing from which tensors are read by name."""

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> Tensor:
        """A tensor as it is stored. Not to be modified in place."""
        ...

    def shape(self, name: str) -> torch.Size: ...

    def dtype(self, name: str) -> torch.dtype: ...


class Weights(ReadWeights, Protocol):
    """A thing from which tensors are read by name, and to which they are written."""

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor by one of the same shape, which is cast to the stored dtype."""
        ...


def table_rows(weights: ReadWeights, name: str) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a matrix as they are stored, a piece at a time; weights that have ``rows`` read no more than that."""
    read = getattr(weights, "rows", None)
    for part in chunks(*weights.shape(name)):
        yield part, weights[name][part] if read is None else read(name, part.start, part.stop)


def rewrite_table(weights: Weights, name: str, treat: Callable[[slice, Tensor], Tensor]) -> None:
    """Replace the rows of a matrix, a piece at a time; weights that have ``put_rows`` write no more than that.

    Args:
        treat: which rows, and these as they are stored -> the new ones.
    """
    put = getattr(weights, "put_rows", None)
    if put is not None:
        put(name, ((part, treat(part, rows)) for part, rows in table_rows(weights, name)))
        return
    new = torch.empty_like(weights[name])
    for part, rows in table_rows(weights, name):
        new[part] = treat(part, rows).to(new.dtype)
    weights[name] = new


class ModuleWeights:
    """The parameters of a module (wrappers of compile and DDP are seen through), written in place.

    Args:
        module: what holds them. A parameter with several names (tied embeddings) is found under each.

    Raises:
        ValueError: parameters that are not here as a whole: sharded, or on the meta device; a model with unlearned
            biases, which are no parameters and would be overlooked.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = unwrap(module)
        if getattr(self.module, "symmetry_breaking", None) is not None:
            raise ValueError(
                "this model has unlearned biases beside its weights (erlangen.breaking.break_symmetry): take them out "
                "first, with erlangen.breaking.restore"
            )
        self._parameters = dict(self.module.named_parameters(remove_duplicate=False))
        for name, parameter in self._parameters.items():
            if parameter.is_meta or hasattr(parameter, "full_tensor"):
                state = "on the meta device" if parameter.is_meta else "sharded"
                raise ValueError(
                    f"weights must be in memory as a whole, and {name} is {state}: load or gather it first"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __getitem__(self, name: str) -> Tensor:
        return self._parameters[name].detach()

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        with torch.no_grad():
            self._parameters[name].copy_(tensor)

    def shape(self, name: str) -> torch.Size:
        return self._parameters[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._parameters[name].dtype

    def same(self, name: str, other: str) -> bool:
        """Whether two names are of one parameter."""
        return self._parameters[name] is self._parameters[other]


class PendingWeights:
    """Weights whose changes are kept aside until `commit`: before that, what lies underneath is as it was.

    Args:
        weights: what lies underneath.
        added: name of a tensor that is not there yet -> name of one of which it is a copy.
    """

    def __init__(self, weights: Weights, added: Mapping[str, str] | None = None) -> None:
        self._weights = weights
        self._added = dict(added or {})
        self._pending: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._added or name in self._weights

    def __getitem__(self, name: str) -> Tensor:
        if name in self._pending:
            return self._pending[name]
        return self._weights[self._added.get(name, name)]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        stored = self[name]
        self._pending[name] = tensor.to(device=stored.device, dtype=stored.dtype, copy=True)

    def shape(self, name: str) -> torch.Size:
        return self._weights.shape(self._added.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        return self._weights.dtype(self._added.get(name, name))

    def onto(self, weights: Weights) -> "PendingWeights":
        """The same changes, to be written to other weights."""
        moved = PendingWeights(weights)
        moved._pending = self._pending
        return moved

    def commit(self) -> None:
        """Write the changes."""
        for name, tensor in self._pending.items():
            self._weights[name] = tensor
        self._pending.clear()


@cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None


def give_back() -> None:
    """Let the C library of Linux return the memory that was freed; by itself it keeps pieces below 32 MB."""
    trim = _trim()
    if trim is not None:
        trim(0)
