r"""Dressed heads: the pair of a head multiplied by a matrix made from the pair itself, so that no gauge is seen.

A dressing field of the group A → M A, B → M⁻ᵀ B is a matrix u(A, B) with u(M A, M⁻ᵀ B) = u(A, B) M⁻¹. The dressed pair
u A, u⁻ᵀ B then is the same for every member of an orbit, and gives the same function (dressing field method: François
and Ravera, arXiv 2602.18948). Two matrices do this for all of GL(width):

- "balanced": from the singular values of the product, AᵀB = U Σ Vᵀ, u A = √Σ Uᵀ. It is the representative of least
  norm. Signs, and rotations among equal singular values, are left over and settled by a rule (`forms`);
- "identity": u = (A restricted to ``width`` columns)⁻¹, so that u A has the identity there. Nothing is left over, as
  long as the columns are chosen from what no gauge changes. They are the pivots of an orthonormal basis of the rows of
  A, exchanged until no entry of u A is above 2.

Two others that suggest themselves do not: (A Aᵀ)^{-1/2} A (polar) changes under all but rotations, which it does not
take away, and the triangular factor of A (QR) under all but triangular matrices.

Under rotary positions the group is a complex number a plane (and GL of the coordinates that are not turned); the two
kinds are the balanced norms with a fixed phase, and one complex entry of the query equal to 1.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from . import forms
from ._pairs import SECTORS, HeadPair, head_pairs, parameters_by_name
from .layout import Rotary

HeadKind = Literal["balanced", "identity"]

_BOUND = 2.0  # of the entries beside the identity
_TIE = 1e-9  # sizes nearer than this share of themselves are equal, and the first is taken


@dataclass(frozen=True, kw_only=True)
class HeadDressing:
    """What heads were multiplied by. All float64.

    Attributes:
        left, right: [heads, width, width]: A' = left A, B' = right B; right is the inverse transpose of left. Both have
            zero rows where a direction that the product does not have was set to zero.
        rank: int64 [heads], how many directions are not zero.
        spectrum: [heads, width], of "balanced": singular values of the product (under rotary positions |q| |k| of a
            plane, at both its coordinates). No gauge changes them.
        pivots: int64 [heads, width], of "identity": column of A' that is a column of the identity. Both coordinates of
            a rotary plane name one column, whose entry is 1 in the first and 0 in the second.
        blocks: (head, first, last) of singular values treated as equal, last included.
        leftover: what a nearby pair may have otherwise, in words. Empty: nothing.
    """

    left: Tensor
    right: Tensor
    rank: Tensor
    spectrum: Tensor | None
    pivots: Tensor | None
    blocks: tuple[tuple[int, int, int], ...]
    leftover: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DressedHeads(HeadDressing):
    """A dressed pair.

    Attributes:
        first, second: float64 [heads, width, columns].
    """

    first: Tensor
    second: Tensor


@dataclass(frozen=True, kw_only=True)
class DressedPair(HeadDressing):
    """What a pair of a model was multiplied by. Gradients with respect to A go with ``right``, to B with ``left``.

    Attributes:
        pair: where it is.
    """

    pair: HeadPair


# --- the identity block ---------------------------------------------------------------------------------------------


def _first_largest(sizes: Tensor) -> Tensor:
    """[..., n] -> [...]: index of the first of the largest."""
    return (sizes >= (1 - _TIE) * sizes.amax(dim=-1, keepdim=True)).to(torch.uint8).argmax(dim=-1)


def _columns(rows: Tensor, pivots: Tensor) -> Tensor:
    """[heads, width, columns], [heads, n] -> [heads, width, n]."""
    return rows.gather(2, pivots[:, None, :].expand(-1, rows.shape[1], -1))


def _pivoted(basis: Tensor) -> Tensor:
    """Pivots [heads, width] of orthonormal rows [heads, width, columns]: the longest column, without the ones before.

    Lengths of columns, and angles between them, are the same for every orthonormal basis of the rows.
    """
    heads, width, _ = basis.shape
    directions = basis.new_zeros(heads, width, width)
    # Squares of lengths, and what is taken off them: they add up to at least 1, so the largest is no remainder.
    squares, found = basis.square().sum(dim=1), []
    for step in range(width):
        found.append(_first_largest(squares))
        direction = _columns(basis, found[-1][:, None])
        for _ in range(2):
            direction = direction - directions @ (directions.mT @ direction)
        direction = direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        directions[..., step] = direction[..., 0]
        squares = squares - (direction.mT @ basis)[:, 0].square()
    return torch.stack(found, dim=1)


def _exchanged(basis: Tensor, pivots: Tensor) -> Tensor:
    """Pivots exchanged until no entry beside the identity is above the bound: each exchange multiplies |det| by it."""
    pivots = pivots.clone()
    entries = torch.linalg.solve(_columns(basis, pivots), basis)
    heads, _, columns = entries.shape
    every = torch.arange(heads, device=basis.device)
    while True:
        sizes = entries.abs().flatten(1)
        change = sizes.amax(dim=1) > _BOUND
        if not change.any():
            return pivots
        at = _first_largest(sizes)
        row, column = at // columns, at % columns
        value = torch.where(change, entries[every, row, column], 1.0)
        difference = entries[every, :, column].clone()
        difference[every, row] -= 1
        step = difference[:, :, None] * (entries[every, row] / value[:, None])[:, None, :]
        entries = entries - step * change[:, None, None]
        pivots[every, row] = torch.where(change, column, pivots[every, row])


def _name(where: str, head: int) -> str:
    return f"{where}, head {head}" if where else f"head {head}"


def _refuse_low_rank(values: Tensor, limit: float, where: str, first_row: int, what: str) -> None:
    """values: [heads, n], largest first."""
    low = values[:, -1] <= limit * values[:, 0]
    if low.any():
        head = int(low.nonzero()[0])
        rank = int((values[head] > limit * values[head, 0]).sum())
        raise ValueError(
            f"{_name(where, head)}: {what} have rank {rank} of {values.shape[1]} (rows from {first_row}), and no "
            'multiple of them has the identity as a block. Use kind="balanced", which sets the rest to zero'
        )


def _identity_block(
    first: Tensor, second: Tensor, dtype: torch.dtype, pivots: Tensor | None, where: str, offset: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A', B', left, right, pivots under GL(width)."""
    width = first.shape[1]
    basis, triangle = forms.triangle(first)  # firstᵀ = basis · triangle
    basis, limit = basis.mT, 4 * width**0.5 * forms.noise(dtype)
    _refuse_low_rank(torch.linalg.svdvals(triangle), limit, where, offset, "the rows of the first factor")
    if pivots is None:
        pivots = _exchanged(basis, _pivoted(basis))
    else:
        least = torch.linalg.svdvals(_columns(basis, pivots))[:, -1]
        if (least <= limit).any():
            head = int((least <= limit).nonzero()[0])
            raise ValueError(
                f"{_name(where, head)}: the columns {pivots[head].tolist()} of the first factor are dependent, and "
                "cannot become the identity: let the columns be chosen (pivots=None)"
            )
    new_first = torch.linalg.solve(_columns(basis, pivots), basis)
    block = _columns(first, pivots)
    new_first.scatter_(2, pivots[:, None, :].expand(-1, width, -1), torch.eye(width).to(first).expand_as(block))
    return new_first, block.mT @ second, torch.linalg.inv(block), block.mT, pivots


def _identity_planes(
    first: Tensor, second: Tensor, planes: Tensor, pivots: Tensor | None, where: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A', B', left, right, pivots under a complex number a plane."""
    a, b = forms.to_planes(first, planes), forms.to_planes(second, planes)
    size = a.abs()
    dead = size.amax(dim=-1) == 0
    if dead.any():
        head, plane = dead.nonzero()[0].tolist()
        raise ValueError(
            f"{_name(where, head)}: the queries of rotary plane {planes[plane].tolist()} are zero, and no multiple of "
            'them has an entry of 1. Use kind="balanced", which sets the keys of that plane to zero too'
        )
    column = _first_largest(size) if pivots is None else pivots[:, planes[:, 0]]
    number = a.gather(2, column[..., None])
    low = number.abs()[..., 0] <= forms.noise(torch.float64) * size.amax(dim=-1)
    if low.any():
        head, plane = low.nonzero()[0].tolist()
        raise ValueError(
            f"{_name(where, head)}: entry {int(column[head, plane])} of rotary plane {planes[plane].tolist()} is zero, "
            "and cannot become 1: let the entries be chosen (pivots=None)"
        )
    new = (a / number).scatter(2, column[..., None], torch.ones_like(number))
    both = column.new_empty(column.shape[0], planes.numel())
    both[:, planes[:, 0]] = both[:, planes[:, 1]] = column
    number = number[..., 0]
    return (
        forms.from_planes(new, planes),
        forms.from_planes(number.conj()[..., None] * b, planes),
        forms.plane_matrices(1 / number, planes),
        forms.plane_matrices(number.conj(), planes),
        both,
    )


# --- both kinds -----------------------------------------------------------------------------------------------------


def _check(first: Tensor, second: Tensor, kind: str, rotary: Rotary | None, pivots: Tensor | None) -> None:
    if kind not in ("balanced", "identity"):
        raise ValueError(
            f'heads are dressed as "balanced" or "identity", received {kind!r}. (Polar and QR factors of one matrix '
            "are no dressings of GL: they change with the gauge.)"
        )
    shapes = f"{list(first.shape)} and {list(second.shape)}"
    if first.ndim != 3 or second.ndim != 3 or first.shape[:2] != second.shape[:2] or 0 in (*first.shape, *second.shape):
        raise ValueError(
            f"a pair is two tensors [heads, width, columns] of the same heads and width, none empty, received {shapes}"
        )
    if not (first.is_floating_point() and second.is_floating_point()):
        raise TypeError(f"a pair must be real and in floating point, received {first.dtype} and {second.dtype}")
    if rotary is not None and rotary.dim > first.shape[1]:
        raise ValueError(f"positions turn {rotary.dim} coordinates, and the pair has {first.shape[1]} (of {shapes})")
    for name, factor in (("first", first), ("second", second)):
        if not factor.isfinite().all():
            raise ValueError(
                f"the {name} factor of the pair has entries that are not finite: there is nothing to dress"
            )
    if pivots is None:
        return
    if kind != "identity":
        raise ValueError('pivots are the columns of an identity block: pass kind="identity" with them')
    heads, width, columns = first.shape
    if pivots.shape != (heads, width) or pivots.dtype != torch.int64:
        raise ValueError(f"pivots must be int64 [{heads}, {width}], received {pivots.dtype} {list(pivots.shape)}")
    if pivots.min() < 0 or pivots.max() >= columns:
        raise ValueError(f"pivots are columns 0 to {columns - 1}, received {int(pivots.min())} to {int(pivots.max())}")
    if rotary is not None:
        one, two = rotary.planes(pivots.device).unbind(1)
        if not torch.equal(pivots[:, one], pivots[:, two]):
            raise ValueError("both coordinates of a rotary plane have one pivot, received different ones")


def _say(form: forms.PairForm, where: str, offset: int, width: int) -> list[str]:
    """What a balanced form leaves open."""
    said = [
        f"{_name(where, head)}: directions {offset + start} to {offset + end} have nearly equal singular values; they "
        "are turned against fixed vectors."
        for head, start, end in form.blocks
    ]
    said += [
        f"{_name(where, head)}: rows {offset} to {offset + width - 1} have rank {rank} of {width}; the rest is set to "
        "zero."
        for head, rank in enumerate(form.rank.tolist())
        if rank < width
    ]
    return said


def _dress(
    first: Tensor,
    second: Tensor,
    kind: str,
    rotary: Rotary | None,
    dtype: torch.dtype,
    pivots: Tensor | None,
    where: str = "",
) -> DressedHeads:
    """As `dress_heads`; ``where`` is what messages call the pair."""
    try:
        _check(first, second, kind, rotary, pivots)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None
    first, second = first.detach().double(), second.detach().double()
    heads, width, _ = first.shape
    turned = 0 if rotary is None else rotary.dim
    new_first, new_second = torch.empty_like(first), torch.empty_like(second)
    left, right = first.new_zeros(2, heads, width, width).unbind()
    rank = torch.full((heads,), width, device=first.device)
    numbers, chosen = first.new_empty(heads, width), torch.empty(heads, width, dtype=torch.int64, device=first.device)
    blocks, leftover = (), []
    for rows in (slice(0, turned), slice(turned, width)):
        size = rows.stop - rows.start
        if not size:
            continue
        a, b = first[:, rows], second[:, rows]
        planes = rotary.planes(first.device) if rotary is not None and rows.stop == turned else None
        if kind == "balanced":
            form = forms.balanced(a, b, dtype=dtype) if planes is None else forms.rotary_pair(a, b, planes)
            made = form.first, form.second, form.left, form.right
            rank -= size - form.rank
            if planes is None:
                numbers[:, rows] = form.spectrum
            else:
                numbers[:, planes[:, 0]] = numbers[:, planes[:, 1]] = form.spectrum
            blocks += tuple((head, rows.start + one, rows.start + two) for head, one, two in form.blocks)
            leftover += _say(form, where, rows.start, size)
        else:
            given = None if pivots is None else pivots[:, rows]
            if planes is None:
                *made, chosen[:, rows] = _identity_block(a, b, dtype, given, where, rows.start)
            else:
                *made, chosen[:, rows] = _identity_planes(a, b, planes, given, where)
        new_first[:, rows], new_second[:, rows], left[:, rows, rows], right[:, rows, rows] = made
    balanced = kind == "balanced"
    return DressedHeads(
        first=new_first,
        second=new_second,
        left=left,
        right=right,
        rank=rank,
        spectrum=numbers if balanced else None,
        pivots=None if balanced else chosen,
        blocks=blocks,
        leftover=tuple(leftover),
    )


def dress_heads(
    first: Tensor,
    second: Tensor,
    kind: HeadKind = "balanced",
    *,
    rotary: Rotary | None = None,
    dtype: torch.dtype = torch.float64,
    pivots: Tensor | None = None,
) -> DressedHeads:
    """The dressed pair of heads, the same for every pair of the orbit A → M A, B → M⁻ᵀ B. Computed in float64.

    Args:
        first, second: [heads, width, columns] each, of which AᵀB counts.
        kind: "balanced" or "identity", as above.
        rotary: positions that turn queries (first) and keys (second).
        dtype: of the stored weights; decides which singular values count as equal, and which as zero.
        pivots: int64 [heads, width], for "identity": the columns to take, as of `HeadDressing.pivots`. Given columns
            make the form a chart: the same for an orbit, but with entries of any size. None: chosen.

    Raises:
        TypeError: factors that are not in floating point.
        ValueError: shapes that make no pair, entries that are not finite, another kind; for "identity", a first factor
            of low rank, or given pivots that are dependent.
    """
    return _dress(first, second, kind, rotary, dtype, pivots)


def dress(model: nn.Module, kind: HeadKind = "balanced", sectors: Collection[str] = SECTORS) -> tuple[DressedPair, ...]:
    """Bring the heads of a model to their dressed representative, in place. Its function does not change.

    Only the gauge of heads is used: norms, biases of the output and the order of heads stay. Computed in float64,
    stored in the parameters' dtype.

    Args:
        model: one whose layout is known.
        kind: as of `dress_heads`.
        sectors: "qk" (queries and keys), "vo" (values and output), or both.

    Returns:
        For each layer and sector what its heads were multiplied by, so that what belongs to the weights can follow.

    Raises:
        TypeError: no layout is known for the model.
        ValueError: a sector without a continuous gauge (queries and keys that are normalised), unlearned biases,
            parameters that are not here as a whole, and what `dress_heads` refuses, with layer and head. Nothing is
            written then.
    """
    parameters = parameters_by_name(model)

    def stored(name: str) -> Tensor:
        return parameters[name].detach()

    done, new = [], []
    for pair in head_pairs(model, sectors):
        dtypes = [parameters[projection.weight].dtype for projection in (pair.first, pair.second)]
        coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        where = f"layer {pair.layer}, sector {pair.sector}"
        found = _dress(*pair.factors(stored), kind, pair.rotary, coarsest, None, where)
        new.append((found.first.to(dtypes[0]), found.second.to(dtypes[1])))
        done.append(
            DressedPair(
                pair=pair,
                left=found.left,
                right=found.right,
                rank=found.rank,
                spectrum=found.spectrum,
                pivots=found.pivots,
                blocks=found.blocks,
                leftover=found.leftover,
            )
        )
    for one, factors in zip(done, new):
        one.pair.put(stored, *factors)
    return tuple(done)
