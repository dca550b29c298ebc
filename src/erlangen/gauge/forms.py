r"""Canonical forms of the factors of a head: one representative for all that give the same product.

Every function works on a batch of heads, in float64, and never forms a product as wide as the model. The matrices are
[heads, width, columns]: the rows of a linear map, with whatever transforms along (a bias, the other query heads of a
group) as further columns.

A pair (A, B) stands for the scores Aᵀ B (queries and keys), or for the map Bᵀ A (values and output): nothing but the
product counts, and A → M A, B → M⁻ᵀ B changes nothing for any M of the group. What the group is decides the form:

- all of GL(width): the balanced form, from the singular values of the product, Aᵀ B = U Σ Vᵀ: A = √Σ Uᵀ, B = √Σ Vᵀ. It
  is the representative of least norm (the norm is then the nuclear norm of the product);
- rotary positions: one complex number for each plane, q → z q, k → k / z̄. Norms balanced, phase fixed;
- norms of queries and keys: rotations at most.

Left over are signs, phases, and rotations among equal singular values. A sign is fixed by making the sum of the cubes
of a row positive, a phase by making Σ |w|² w real and positive: smooth functions of the row, which rounding cannot flip
as it flips the choice of a largest entry. A block of singular values that are equal to a tolerance is turned so that
its overlap with fixed probe vectors is symmetric and positive; such blocks are reported, for a nearby model need not
have the same ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairForm:
    """A pair in canonical form.

    Attributes:
        first, second: [heads, width, columns].
        left, right: [heads, width, width], first = left · what came in, second likewise.
        spectrum: [heads, width], what no gauge changes, largest first (by plane under rotary positions, unsorted).
        blocks: (head, first, last) of singular values treated as equal, last included.
        rank: [heads], how many of the spectrum count as not zero.
    """

    first: Tensor
    second: Tensor
    left: Tensor
    right: Tensor
    spectrum: Tensor
    blocks: tuple[tuple[int, int, int], ...]
    rank: Tensor


def degeneracy_tolerance(dtype: torch.dtype) -> float:
    """Singular values nearer than this share of the largest one are taken as equal, in weights stored so."""
    return min(torch.finfo(dtype).eps ** 0.5, 1e-3)


def noise(dtype: torch.dtype) -> float:
    """Relative rounding below which a singular value counts as zero: of float32 at the coarsest."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def probe(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Fixed vectors without structure, float64 [rows, columns]."""
    index = torch.arange(1, rows + 1, dtype=torch.float64, device=device)
    frequency = torch.arange(1, columns + 1, dtype=torch.float64, device=device).sqrt()
    return (1e3 * torch.outer(index, frequency)).cos()


def signs(rows: Tensor) -> Tensor:
    """±1 for each row [..., columns] -> [...]: the sign that makes the sum of its cubes positive.

    Where the cubes cancel to a millionth, the first of the largest entries decides. 1 for a row of zeros.
    """
    scaled = rows / rows.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    cubes = scaled**3
    total = cubes.sum(dim=-1)
    largest = scaled.gather(-1, scaled.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    decides = torch.where(total.abs() > 1e-6 * cubes.abs().sum(dim=-1), total, largest)
    return torch.where(decides < 0, -1.0, 1.0)


def phases(rows: Tensor) -> Tensor:
    """Complex numbers of modulus 1, one a row: complex [..., columns] -> [...], w of Σ |row|² row = |…| w.

    Where the sum cancels to a millionth, the first of the largest entries decides. 1 for a row of zeros.
    """
    size = rows.abs()
    scaled = rows / size.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
    cubes = scaled * scaled.abs() ** 2
    total = cubes.sum(dim=-1)
    largest = scaled.gather(-1, size.argmax(dim=-1, keepdim=True)).squeeze(-1)
    decides = torch.where(total.abs() > 1e-6 * cubes.abs().sum(dim=-1), total, largest)
    return torch.where(decides == 0, 1.0 + 0.0j, decides / decides.abs().clamp_min(torch.finfo(size.dtype).tiny))


def near_equal(values: Tensor, tolerance: float, rank: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Runs of near-equal values: (row, first, last) in descending values [rows, n] of which the first rank[row] count.

    Args:
        tolerance: relative to the largest value of the row.
    """
    close = (values[:, :-1] - values[:, 1:]) < tolerance * values[:, :1]
    counted = torch.arange(1, values.shape[1], device=values.device) < rank[:, None]
    found = []
    for row, flags in enumerate((close & counted).tolist()):
        start = None
        for i, flag in enumerate([*flags, False]):
            if flag and start is None:
                start = i
            elif not flag and start is not None:
                found.append((row, start, i))
                start = None
    return tuple(found)


def procrustes(overlap: Tensor) -> Tensor:
    """The rotation O [m, m] that makes O · overlap symmetric and positive, for an overlap [m, m]."""
    u, _, vh = torch.linalg.svd(overlap)
    return (u @ vh).mT


def triangle(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rowsᵀ = Q R: Q [heads, columns, width], R [heads, width, width]. Too few columns are filled up with zeros."""
    width, columns = rows.shape[-2:]
    if columns < width:
        rows = torch.nn.functional.pad(rows, (0, width - columns))
    q, r = torch.linalg.qr(rows.mT)
    return q[:, :columns], r


def _turn_blocks(
    blocks: tuple[tuple[int, int, int], ...], rows: Tensor, parts: tuple[int, ...], along: tuple[Tensor, ...]
) -> None:
    """Turn every block against the probe, in place.

    Args:
        blocks: as of `near_equal`.
        rows: [heads, width, columns], what overlaps with the probe.
        parts: sizes of the pieces of the columns; pieces of equal size are summed, so that their order has no say.
        along: further matrices [heads, width, ...] that turn along.
    """
    for head, first, last in blocks:
        part = slice(first, last + 1)
        sums: dict[int, Tensor] = {}
        for piece in rows[head, part].split(list(parts), dim=-1):
            size = piece.shape[-1]
            sums[size] = sums[size] + piece if size in sums else piece
        overlap = torch.cat(list(sums.values()), dim=-1)
        turn = procrustes(overlap @ probe(overlap.shape[-1], last + 1 - first, rows.device))
        for tensor in (rows, *along):
            tensor[head, part] = turn @ tensor[head, part]


def balanced(
    first: Tensor,
    second: Tensor,
    *,
    dtype: torch.dtype,
    repeats: int = 1,
    sizes: tuple[Tensor, Tensor] | None = None,
) -> PairForm:
    """The balanced form of pairs under GL(width).

    Singular values below the rounding of the pair as it came are set to zero: no M leads to the form then, but the
    product stays what it was.

    Args:
        first: float64 [heads, width, columns].
        second: float64 [heads, width, other columns].
        dtype: of the stored weights; decides what counts as equal and as zero.
        repeats: how many parts of equal size, in any order, the columns of ``first`` are made of (query heads).
        sizes: [heads] each, of the numbers that ``first`` and ``second`` were made from, where parts of those
            cancelled: rounding is relative to them.
    """
    width, columns = first.shape[-2:]
    (q_first, r_first), (q_second, r_second) = triangle(first), triangle(second)
    u, spectrum, vh = torch.linalg.svd(r_first @ r_second.mT)
    size_first, size_second = torch.linalg.matrix_norm(r_first, 2), torch.linalg.matrix_norm(r_second, 2)
    if sizes is not None:
        size_first, size_second = torch.maximum(size_first, sizes[0]), torch.maximum(size_second, sizes[1])
    size = size_first * size_second
    kept = spectrum > (4 * width**0.5 * noise(dtype) * size)[:, None]
    spectrum = torch.where(kept, spectrum, 0.0)
    root, inverse = spectrum.sqrt()[..., None], (torch.where(kept, spectrum, 1.0).rsqrt() * kept)[..., None]
    new_first, new_second = root * (q_first @ u).mT, root * (q_second @ vh.mT).mT
    left, right = inverse * (vh @ r_second), inverse * (u.mT @ r_first)
    flip = signs(new_first)[..., None]
    new_first, new_second, left, right = flip * new_first, flip * new_second, flip * left, flip * right
    rank = kept.sum(dim=-1)
    blocks = near_equal(spectrum, degeneracy_tolerance(dtype), rank)
    _turn_blocks(blocks, new_first, (columns // repeats,) * repeats, (new_second, left, right))
    return PairForm(new_first, new_second, left, right, spectrum, blocks, rank)


def to_planes(rows: Tensor, planes: Tensor) -> Tensor:
    """[..., width, columns] -> complex [..., planes, columns]: first coordinate + i · second."""
    return torch.complex(rows[..., planes[:, 0], :], rows[..., planes[:, 1], :])


def from_planes(values: Tensor, planes: Tensor) -> Tensor:
    """The inverse of `to_planes`, for planes that use every coordinate."""
    rows = values.real.new_empty(*values.shape[:-2], planes.numel(), values.shape[-1])
    rows[..., planes[:, 0], :], rows[..., planes[:, 1], :] = values.real, values.imag
    return rows


def plane_matrices(numbers: Tensor, planes: Tensor) -> Tensor:
    """Multiplication by complex numbers as matrices: complex [..., planes] -> [..., 2 planes, 2 planes]."""
    matrix = numbers.real.new_zeros(*numbers.shape[:-1], planes.numel(), planes.numel())
    one, two = planes.unbind(1)
    matrix[..., one, one] = matrix[..., two, two] = numbers.real
    matrix[..., two, one] = numbers.imag
    matrix[..., one, two] = -numbers.imag
    return matrix


def rotary_pair(first: Tensor, second: Tensor, planes: Tensor, *, scales: bool = True) -> PairForm:
    """The form of pairs under rotary positions: one complex number a plane.

    Args:
        first, second: float64 [heads, width, columns], queries and keys.
        planes: int64 [width / 2, 2].
        scales: False where norms of queries and keys leave only the phases.
    """
    a, b = to_planes(first, planes), to_planes(second, planes)
    size_a, size_b = torch.linalg.vector_norm(a, dim=-1), torch.linalg.vector_norm(b, dim=-1)
    number = phases(a).conj()
    alive = (size_a > 0) & (size_b > 0)
    if scales:
        ratio = torch.where(alive, size_b, 1.0) / torch.where(alive, size_a, 1.0)
        number = number * torch.where(alive, ratio.sqrt(), 0.0)
    inverse = torch.where(number == 0, 0.0, 1 / torch.where(number == 0, 1.0 + 0.0j, number).conj())
    return PairForm(
        from_planes(number[..., None] * a, planes),
        from_planes(inverse[..., None] * b, planes),
        plane_matrices(number, planes),
        plane_matrices(inverse, planes),
        size_a * size_b,
        (),
        2 * alive.sum(dim=-1),
    )


@dataclass(frozen=True)
class TurnedForm:
    """Rows in canonical form under rotations.

    Attributes:
        rows: [heads, width, columns], orthogonal to each other, largest first.
        turn: [heads, width, width], orthogonal: rows = turn · what came in.
        spectrum: [heads, width], their norms.
        blocks, rank: as of `PairForm`.
    """

    rows: Tensor
    turn: Tensor
    spectrum: Tensor
    blocks: tuple[tuple[int, int, int], ...]
    rank: Tensor


def turned(rows: Tensor, *, dtype: torch.dtype, parts: tuple[int, ...] | None = None) -> TurnedForm:
    """The form of rows under O(width): their principal axes.

    Args:
        rows: float64 [heads, width, columns].
        dtype: of the stored weights.
        parts: sizes of the pieces of the columns; pieces of equal size may come in any order.
    """
    width, columns = rows.shape[-2:]
    q, r = triangle(rows)
    u, spectrum, turn = torch.linalg.svd(r)
    kept = spectrum > 4 * width**0.5 * noise(dtype) * spectrum[:, :1]
    spectrum = torch.where(kept, spectrum, 0.0)
    new = spectrum[..., None] * (q @ u).mT
    flip = signs(new)[..., None]
    new, turn = flip * new, flip * turn
    rank = kept.sum(dim=-1)
    blocks = near_equal(spectrum, degeneracy_tolerance(dtype), rank)
    _turn_blocks(blocks, new, parts or (columns,), (turn,))
    return TurnedForm(new, turn, spectrum, blocks, rank)


def product_spectrum(first: Tensor, second: Tensor) -> Tensor:
    """Singular values [heads, width] of firstᵀ second, for [heads, width, columns] each, without the product."""
    return torch.linalg.svdvals(triangle(first)[1] @ triangle(second)[1].mT)


def product_norms(first: Tensor, second: Tensor) -> Tensor:
    """|firstᵀ second|, for [..., width, columns] each -> [...], without the product."""
    return ((first @ first.mT) * (second @ second.mT)).sum(dim=(-2, -1)).clamp_min(0).sqrt()


def descending(keys: Tensor, second: Tensor, tolerance: float) -> tuple[Tensor, list[tuple[int, int]]]:
    """An order by descending keys; runs of near-equal keys are ordered by a second one.

    Args:
        keys, second: [n].
        tolerance: keys nearer than this share of themselves are near-equal.

    Returns:
        int64 [n], and the pairs of neighbours in it that are near-equal in both keys.
    """
    if keys.numel() < 2:
        return torch.zeros(keys.numel(), dtype=torch.int64, device=keys.device), []
    values, order = keys.sort(descending=True, stable=True)
    close = (values[:-1] - values[1:]) <= tolerance * values[:-1].abs()
    if not close.any():
        return order, []
    run = torch.cat([torch.zeros(1, dtype=torch.int64, device=keys.device), (~close).long().cumsum(0)])
    by_second = second[order].argsort(descending=True, stable=True)
    order = order[by_second[run[by_second].argsort(stable=True)]]
    ordered = second[order]
    scale = second.abs().amax()
    tied = ((ordered[:-1] - ordered[1:]).abs() <= tolerance * scale) & (run[1:] == run[:-1])
    return order, [(i, i + 1) for i in tied.nonzero().flatten().tolist()]
