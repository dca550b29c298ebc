r"""Which part of a change of a pair is along its gauge, and the metric in which that does not depend on the gauge.

A pair (A, B) of rows [heads, width, columns] counts only as Aᵀ B. Along the gauge, A → M A, B → M⁻ᵀ B with
M = 1 + Ω, a change (U, W) is *vertical*: (Ω A, −Ωᵀ B). What is orthogonal to all of those is *horizontal*; which part
that is depends on the metric.

Frobenius. |U|² + |W|², as an optimiser counts that knows nothing of pairs. (U, W) is horizontal when U Aᵀ = B Wᵀ. The
vertical part belongs to the Ω of

    Ω (A Aᵀ) + (B Bᵀ) Ω = U Aᵀ − B Wᵀ,

solved by the eigenvectors of both grams, and without them where the pair is balanced, A Aᵀ = B Bᵀ = diag(s): then
Ω_ij = C_ij / (s_i + s_j). The gradient of a function of Aᵀ B is horizontal, for (g_A, g_B) = (B Fᵀ, A F).

Invariant. tr Uᵀ (B Bᵀ) U + tr Wᵀ (A Aᵀ) W (Mishra, Adithya Apuroop, Sepulchre, arXiv 1211.1550), which is the same in
every gauge. Here it is divided by the number s = |Aᵀ B| / √width, which no gauge changes: at a balanced pair whose
singular values are all equal it is the Frobenius metric, and learning rates compare with those of gradient descent. A
momentum p is a sum of gradients, so it is dual to changes; its velocity is

    U = s (B Bᵀ)⁻¹ p_A,    W = s (A Aᵀ)⁻¹ p_B,

horizontal when the charge K = p_A Aᵀ − B p_Bᵀ is zero. To make it so takes no equation to be solved:

    p_A → p_A − ½ K (A Aᵀ)⁻¹ A,    p_B → p_B + ½ Kᵀ (B Bᵀ)⁻¹ B.

Rotary positions leave of M one complex number a plane, q → z q, k → k / z̄. All of the above then holds with complex
numbers in the place of matrices, ω = (⟨q, u⟩ − ⟨w, k⟩) / (|q|² + |k|²) in the first metric and s = |q| |k| in the
second. Coordinates that positions do not turn have the matrices.

Rows are multiplied in their own precision, matrices of heads are solved in float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import forms
from ._pairs import HeadPair
from .layout import Rotary

# Numbers of a factor that are taken together: what stays near the caches of a CPU, what fills a GPU.
_MOST_ON_CPU, _MOST = 2**20, 2**24

# --- planes and the rest of a pair ------------------------------------------------------------------------------------


def _split(rows: Tensor, rotary: Rotary | None) -> tuple[Tensor | None, Tensor | None]:
    """Rows by planes, complex [heads, planes, columns], and the others [heads, rest, columns]; None for none."""
    if rotary is None or not rotary.dim:
        return None, rows
    planes = forms.to_planes(rows, rotary.planes(rows.device))
    return planes, rows[..., rotary.dim :, :] if rotary.dim < rows.shape[-2] else None


def _join(planes: Tensor | None, rest: Tensor | None, rotary: Rotary | None) -> Tensor:
    """The inverse of `_split`."""
    if planes is None or rotary is None:
        assert rest is not None
        return rest
    turned = forms.from_planes(planes, rotary.planes(planes.device))
    return turned if rest is None else torch.cat([turned, rest], dim=-2)


def _squares(rows: Tensor) -> Tensor:
    """Σ |row|² over columns, complex or real [..., columns] -> real [...]."""
    return torch.linalg.vector_norm(rows, dim=-1).square()


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """⟨first, second⟩ over columns, conjugate in the first."""
    return (first.conj() * second).sum(dim=-1)


# --- the Frobenius metric ---------------------------------------------------------------------------------------------


def _is_balanced(gram_first: Tensor, gram_second: Tensor, eps: float) -> bool:
    """Whether both grams are the same diagonal matrix, up to rounding, in all heads."""
    diagonal = gram_first.diagonal(dim1=-2, dim2=-1)
    scale = (diagonal[..., :, None] * diagonal[..., None, :]).sqrt()
    wanted = torch.diag_embed(diagonal)
    error = torch.maximum((gram_first - wanted).abs(), (gram_second - wanted).abs())
    return bool((error <= 64 * eps * scale).all())


def sylvester(gram_first: Tensor, gram_second: Tensor, right: Tensor, eps: float) -> Tensor:
    """The Ω of least norm with Ω gram_first + gram_second Ω = right.

    Args:
        gram_first, gram_second: float64 [heads, width, width], symmetric, no negative eigenvalues.
        right: float64 [heads, width, width]; where both grams are singular it must be in the range of the left side.
        eps: relative rounding of the grams. Sums of eigenvalues below width · eps of the largest count as zero.

    Returns:
        float64 [heads, width, width].
    """
    if _is_balanced(gram_first, gram_second, eps):
        left_basis = right_basis = None
        values_first = values_second = gram_first.diagonal(dim1=-2, dim2=-1)
    else:
        both, bases = torch.linalg.eigh(torch.cat([gram_first, gram_second]))
        (values_first, values_second), (right_basis, left_basis) = both.chunk(2), bases.chunk(2)
        right = left_basis.mT @ right @ right_basis
    total = values_second[..., :, None] + values_first[..., None, :]
    solvable = total > gram_first.shape[-1] * eps * total.amax(dim=(-2, -1), keepdim=True)
    omega = torch.where(solvable, right / torch.where(solvable, total, 1.0), 0.0)
    return omega if left_basis is None or right_basis is None else left_basis @ omega @ right_basis.mT


def vertical(
    first: Tensor, second: Tensor, d_first: Tensor, d_second: Tensor, rotary: Rotary | None = None
) -> tuple[Tensor, Tensor]:
    """The part of a change of pairs that is along their gauge, in the Frobenius metric.

    It does not change the products, to first order. Heads may be singular; zero where they have no gauge direction.

    Args:
        first, second: float32 or float64 [heads, width, columns] each; columns may differ.
        d_first, d_second: their changes.
        rotary: positions under which the pair lives.

    Returns:
        The vertical parts, shaped as the changes.
    """
    (q, a), (k, b) = _split(first, rotary), _split(second, rotary)
    (u, d_a), (w, d_b) = _split(d_first, rotary), _split(d_second, rotary)
    along_q = along_k = along_a = along_b = None
    if q is not None and k is not None and u is not None and w is not None:
        size = _squares(q) + _squares(k)
        number = _inner(q, u) - _inner(w, k)
        number = (number / torch.where(size > 0, size, 1.0))[..., None]
        along_q, along_k = number * q, -number.conj() * k
    if a is not None and b is not None and d_a is not None and d_b is not None:
        grams = ((a @ a.mT).double(), (b @ b.mT).double())
        omega = sylvester(*grams, (d_a @ a.mT - b @ d_b.mT).double(), torch.finfo(a.dtype).eps).to(a.dtype)
        along_a, along_b = omega @ a, -omega.mT @ b
    return _join(along_q, along_a, rotary), _join(along_k, along_b, rotary)


def _energy(first: Tensor, second: Tensor) -> Tensor:
    """Sums of squares of both, [heads], float64."""
    return first.double().square().sum(dim=(-2, -1)) + second.double().square().sum(dim=(-2, -1))


def vertical_share(
    first: Tensor, second: Tensor, d_first: Tensor, d_second: Tensor, rotary: Rotary | None = None
) -> Tensor:
    """The share of a change's squares that is along the gauge, in the Frobenius metric.

    Args: as of `vertical`.

    Returns:
        [heads], float64, from 0 to 1; 0 for a head that does not change.
    """
    along_first, along_second = vertical(first, second, d_first, d_second, rotary)
    along, everything = _energy(along_first, along_second), _energy(d_first, d_second)
    return torch.where(everything > 0, along / torch.where(everything > 0, everything, 1.0), 0.0)


# --- the invariant metric ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InvariantMetric:
    """The invariant metric at pairs (A, B), as matrices of heads.

    Attributes:
        rotary: as of the pairs.
        squares: real [heads, planes] each, |q|² and |k|² of planes; None without rotary positions.
        inverses: float64 [heads, rest, rest] each, (A Aᵀ)⁻¹ and (B Bᵀ)⁻¹; None where positions turn everything.
        scale: float64 [heads], s of that rest.
        singular: bool [heads], heads at which there is no such metric; their numbers mean nothing.
    """

    rotary: Rotary | None
    squares: tuple[Tensor, Tensor] | None
    inverses: tuple[Tensor, Tensor] | None
    scale: Tensor | None
    singular: Tensor

    def velocity(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """What a momentum (or a gradient) moves: both [heads, width, columns]."""
        (p, p_a), (r, p_b) = _split(first, self.rotary), _split(second, self.rotary)
        if self.squares is not None and p is not None and r is not None:
            ratio = (self.squares[0] / self.squares[1]).sqrt()[..., None]
            p, r = p * ratio, r / ratio
        if self.inverses is not None and self.scale is not None and p_a is not None and p_b is not None:
            of_first, of_second = (self.scale[:, None, None] * inverse for inverse in self.inverses)
            p_a, p_b = of_second.to(p_a.dtype) @ p_a, of_first.to(p_b.dtype) @ p_b
        return _join(p, p_a, self.rotary), _join(r, p_b, self.rotary)

    def horizontal(self, first: Tensor, second: Tensor, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A momentum without its charge: both [heads, width, columns], and the pair at which this metric is."""
        (p, p_a), (r, p_b) = _split(first, self.rotary), _split(second, self.rotary)
        (q, a), (k, b) = _split(pair[0], self.rotary), _split(pair[1], self.rotary)
        if self.squares is not None:
            assert p is not None and r is not None and q is not None and k is not None
            charge = (_inner(q, p) - _inner(r, k)) / 2
            p = p - (charge / self.squares[0])[..., None] * q
            r = r + (charge.conj() / self.squares[1])[..., None] * k
        if self.inverses is not None:
            assert p_a is not None and p_b is not None and a is not None and b is not None
            charge = (p_a @ a.mT - b @ p_b.mT).double() / 2
            p_a = p_a - (charge @ self.inverses[0]).to(a.dtype) @ a
            p_b = p_b + (charge.mT @ self.inverses[1]).to(b.dtype) @ b
        return _join(p, p_a, self.rotary), _join(r, p_b, self.rotary)

    def decay(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The momentum whose velocity is the pair (A, B) itself; at which this metric is."""
        (q, a), (k, b) = _split(first, self.rotary), _split(second, self.rotary)
        if self.squares is not None and q is not None and k is not None:
            ratio = (self.squares[0] / self.squares[1]).sqrt()[..., None]
            q, k = q / ratio, k * ratio
        if self.scale is not None and a is not None and b is not None:
            scale = self.scale[:, None, None]
            a, b = (((b @ b.mT).double() / scale).to(a.dtype) @ a, ((a @ a.mT).double() / scale).to(b.dtype) @ b)
        return _join(q, a, self.rotary), _join(k, b, self.rotary)


def _smallest_pivot(width: int, dtype: torch.dtype) -> float:
    """Pivots of a factor below this share of the largest one are zero, in weights of this dtype.

    The grams of rows are exact to float64, in which the square of a pivot must be seen.
    """
    return max(4 * width**0.5 * forms.noise(dtype), (width * torch.finfo(torch.float64).eps) ** 0.5)


def invariant_metric(
    first: Tensor, second: Tensor, rotary: Rotary | None = None, *, dtype: torch.dtype | None = None
) -> InvariantMetric:
    """The invariant metric at pairs.

    Args:
        first, second: float32 or float64 [heads, width, columns] each.
        rotary: positions under which the pair lives.
        dtype: of the stored weights, which decides what counts as singular; None: that of ``first``.
    """
    (q, a), (k, b) = _split(first, rotary), _split(second, rotary)
    dtype = first.dtype if dtype is None else dtype
    squares = inverses = scale = None
    singular = torch.zeros(first.shape[0], dtype=torch.bool, device=first.device)
    if q is not None and k is not None:
        squares = (_squares(q), _squares(k))
        for part in squares:
            singular |= ~((part > 0) & part.isfinite()).all(dim=-1)
    if a is not None and b is not None:
        wide_a, wide_b = a.double(), b.double()
        gram_first, gram_second = wide_a @ wide_a.mT, wide_b @ wide_b.mT
        scale = ((gram_first * gram_second).sum(dim=(-2, -1)).clamp_min(0) / a.shape[-2]).sqrt()
        factor, info = torch.linalg.cholesky_ex(torch.cat([gram_first, gram_second]))
        pivots = factor.diagonal(dim1=-2, dim2=-1)
        smallest = _smallest_pivot(a.shape[-2], dtype)
        bad = (info > 0) | ~(pivots.amin(dim=-1) > smallest * pivots.amax(dim=-1))
        singular |= bad.view(2, -1).any(dim=0)
        one = torch.eye(a.shape[-2], dtype=torch.float64, device=a.device)
        inverse = torch.cholesky_inverse(torch.where(bad[:, None, None], one, factor))
        inverses = (inverse[: len(a)], inverse[len(a) :])
    return InvariantMetric(rotary, squares, inverses, scale, singular)


def equal_norms(first: Tensor, second: Tensor, rotary: Rotary | None = None) -> Tensor:
    """Positive numbers c [heads, width, 1] with |c A| = |B / c| a head, or a plane and the rest of a head.

    1 where a part of the pair is zero.
    """
    squares = []
    for rows in (first, second):
        of_rows = _squares(rows)
        planes, rest = _split(rows, rotary)
        part = torch.zeros_like(of_rows)
        if planes is not None and rotary is not None:
            one, two = rotary.planes(rows.device).unbind(1)
            part[:, one] = part[:, two] = of_rows[:, one] + of_rows[:, two]
        if rest is not None:
            start = rows.shape[-2] - rest.shape[-2]
            part[:, start:] = of_rows[:, start:].sum(dim=-1, keepdim=True)
        squares.append(part)
    alive = (squares[0] > 0) & (squares[1] > 0)
    ratio = torch.where(alive, squares[1], 1.0) / torch.where(alive, squares[0], 1.0)
    return ratio.sqrt().sqrt()[..., None]


# --- pairs of a model, many heads together ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Pairs of one shape, whose heads are taken together.

    Attributes:
        pairs: some layers, one sector.
        dtype: of the stored weights.
    """

    pairs: tuple[HeadPair, ...]
    dtype: torch.dtype

    @property
    def rotary(self) -> Rotary | None:
        """Positions under which all of them live."""
        return self.pairs[0].rotary

    def factors(self, tensor: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        """A and B of all heads, [heads, width, columns], in float32 or wider. See `HeadPair.factors`."""
        both = [pair.factors(tensor) for pair in self.pairs]
        first, second = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*both))
        dtype = torch.promote_types(first.dtype, torch.float32)
        return first.to(dtype), second.to(dtype)

    def put(self, tensor: Callable[[str], Tensor], first: Tensor, second: Tensor) -> None:
        """Write A and B of all heads, in place. See `HeadPair.put`."""
        number = len(self.pairs)
        for pair, one, two in zip(self.pairs, first.chunk(number), second.chunk(number)):
            pair.put(tensor, one, two)

    def name(self, head: int) -> str:
        """Where the head of this number is in the model."""
        layer, head = divmod(head, self.pairs[0].heads.num_kv_heads)
        return f"layer {self.pairs[layer].layer}, sector {self.pairs[layer].sector}, head {head}"


def batches(pairs: Sequence[HeadPair], parameters: Mapping[str, Tensor]) -> tuple[Batch, ...]:
    """Pairs of the same shapes, dtype, device and positions together, as many as are not too large."""
    found: dict[tuple, list[list[HeadPair]]] = {}
    for pair in pairs:
        first, second = pair.factors(lambda name: parameters[name].detach())
        key = (first.shape, second.shape, first.dtype, first.device, pair.rotary)
        groups = found.setdefault(key, [[]])
        most = _MOST_ON_CPU if first.device.type == "cpu" else _MOST
        if (len(groups[-1]) + 1) * max(first.numel(), second.numel()) > most and groups[-1]:
            groups.append([])
        groups[-1].append(pair)
    return tuple(Batch(tuple(group), key[2]) for key, groups in found.items() for group in groups)
