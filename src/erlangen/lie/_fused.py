"""The arithmetic of a tile compiled by torch.compile, for calls that are compiled themselves.

Plain operators take each array of a tile through memory once an operation, some 40 times in space; the compiler keeps a
pair in registers from poses to weight. It is the same code, `PairGeometry.norms` and `vjp`, so the same formulas.
Compiling takes some seconds a group and pass, so it is done only where the caller compiles: `lie_attention` inside of
``torch.compile``, with any backend.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._geometry import PairGeometry, pair_geometry
from ._workspace import Room
from .groups import parse


class _Registers(Room):
    """Room that the compiler finds: a new array each time."""

    def __init__(self, like: Tensor, shape: tuple[int, ...]) -> None:
        self._like, self._shape = like, shape

    def __call__(self) -> Tensor:
        return self._like.new_empty(self._shape)

    def let_go(self, *arrays: Tensor) -> None:
        pass


class FusedGeometry:
    """What a tile needs of a geometry that has formulas, each compiled into one piece.

    A compiled piece is for tiles of one shape; so blocks of poses are filled up to a power of two with repetitions of
    the last. What goes beyond torch's ``recompile_limit`` is done with plain operators.
    """

    def __init__(self, geometry: PairGeometry) -> None:
        self.geometry = geometry
        self.weigh_full, self.norms_full, self.vjp_full = (_Compiled(f) for f in (self._weigh, self._norms, self._vjp))

    def norms(self, query: "Filled", key: "Filled") -> list[Tensor]:
        """An array [B, G, q, k] for each block of the algebra."""
        return [array[..., : query.size, : key.size] for array in self.norms_full(query.packed, key.packed)]

    def weigh(
        self, query: "Filled", key: "Filled", slopes: Tensor, negligible: float, room: Callable[..., Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """exp of the scores, cut below, [B, H, q, k], with the arrays.

        Args:
            query, key: packed poses.
            slopes: of the scores, [K, H, 1, 1].
            negligible: no score is taken to be below.
            room: gives memory of a shape.
        """
        weights = room(len(query.packed), slopes.shape[1], query.packed.shape[-1], key.packed.shape[-1])
        arrays = self.weigh_full(query.packed, key.packed, slopes, negligible, weights)
        wanted = (..., slice(query.size), slice(key.size))
        return weights[wanted], [array[wanted] for array in arrays]

    def vjp(self, query: "Filled", key: "Filled", grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients of packed queries and keys, given those of the arrays, which it computes again."""
        more = (0, key.packed.shape[-1] - key.size, 0, query.packed.shape[-1] - query.size)
        grads = [pad(grad, more) for grad in grads] if any(more) else grads
        to_query, to_key = self.vjp_full(query.packed, key.packed, grads)
        return to_query[..., : query.size], to_key[..., : key.size]

    def _pairs(self, query: Tensor, key: Tensor) -> tuple[list[Tensor], tuple, Room]:
        room = _Registers(query, (*query.shape[:2], query.shape[-1], key.shape[-1]))
        return *self.geometry.norms(self.geometry.block(query, -1), self.geometry.block(key, -2), room), room

    def _norms(self, query: Tensor, key: Tensor) -> list[Tensor]:
        return self._pairs(query, key)[0]

    def _weigh(self, query: Tensor, key: Tensor, slopes: Tensor, negligible: float, weights: Tensor) -> list[Tensor]:
        arrays = self._norms(query, key)
        scores = arrays[0] * slopes[0]
        for array, slope in zip(arrays[1:], slopes[1:]):
            scores = scores + array * slope
        weights.copy_(scores.clamp(min=negligible).exp())
        return arrays

    def _vjp(self, query: Tensor, key: Tensor, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        _, saved, room = self._pairs(query, key)
        return self.geometry.vjp(saved, grads, room)


class Filled(NamedTuple):
    """A block of packed poses [B, G, P, n], n filled up, and how many poses there are."""

    packed: Tensor
    size: int


def filled(packed: Tensor) -> Filled:
    """Packed poses filled up to a power of two, at least 16."""
    size = packed.shape[-1]
    missing = max(16, 1 << (size - 1).bit_length()) - size
    last = packed[..., -1:].expand(-1, -1, -1, missing)
    return Filled((torch.cat([packed, last], -1) if missing else packed).contiguous(), size)


@cache
def fused_geometry(group: str, chart: str) -> FusedGeometry:
    """That of a group, by its name."""
    return FusedGeometry(pair_geometry(parse(group), chart))


class _Compiled:
    """A function compiled; as it is, after a warning, where there is nothing to compile with."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.compiled = function, torch.compile(function, fullgraph=True, dynamic=False)
        self.works, self.calls = True, 0

    def __call__(self, *arguments: Any) -> Any:
        if self.works:
            try:
                result = self.compiled(*arguments)
                self.calls += 1
                return result
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                pass  # torch has logged it; this call is done with plain operators, below
            except torch._dynamo.exc.BackendCompilerFailed as error:
                self.works = False
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(f"tiles of lie_attention are not compiled, and slower: {reason}", stacklevel=2)
        return self.function(*arguments)
