"""Squared block norms of log(g_i⁻¹ g_j) for all pairs of a tile, and their gradients, written out by hand.

What `_tiled` needs of a group. A geometry packs poses into a few numbers each (in plain, differentiable operations,
once a pose), and from those computes, for a tile of pairs, an array for each block of the algebra and the gradient
that comes back through it. Differences of translations are taken pair by pair: expanding |t_i − t_j|² into products
loses all digits of float32 far from the origin.

The formulas, with θ the angle of the relative rotation and d = t_j − t_i:

- SO(2), SE(2): θ is the difference of two angles, wrapped; ‖rotation‖² = 2 θ², ‖translation‖² = G |d|² with
  G = (θ/2)² / sin²(θ/2).
- SO(3), SE(3): (w, m) = q_j q_i* of the unit quaternions, y = 2 sin²(θ/4) = |m|² / (1 + |w|), in [0, 1], and
  2 asin²(√(y/2)) = y (1 + y Q(y)), so that ‖rotation‖² = 16 y (1 + y Q); ‖translation‖² = G |d|² − H (m·d)² with
  G = 2 (1 + y Q)/(2 − y) and H = (G − 1)/|m|² = (1 + 2 Q)/(2 − y)². All of it is smooth on [0, π].

Q and G are polynomials, Chebyshev interpolants on the whole interval, to rounding of the dtype. Any other group goes
through its own logarithm, differentiated by `torch.func.vjp` tile by tile: slower, and as frugal with memory.

Shape suffixes: B batch, G heads of the geometry (1 where they share it, the same for queries and keys), P numbers a
pose, Q and K queries and keys of a
tile. Numbers come before poses, [B, G, P, N], so that a row of a tile is contiguous.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, reduce
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _quaternion
from ._base import Group
from ._workspace import Room
from .affine import Affine, Translation
from .linear import Rotations
from .product import Product


class PairGeometry(ABC):
    """The pairwise norms of one group in one chart.

    Attributes:
        factors: what ``norms`` leaves out: the squared norm of block k is factors[k] times its array.
        sizes: P of a pose, and of a query with a displacement.
        tile: how many poses on a side of a tile use the caches well.
        is_fast: whether the formulas are written out; then all relative poses are in the chart.
    """

    factors: tuple[float, ...]
    sizes: tuple[int, int]
    tile = 256
    is_fast = True

    @abstractmethod
    def pack_query(self, pose: Tensor, displacement: Tensor | None) -> Tensor:
        """[B, G, N, m, m], and [H, m, m] or None -> [B, G or H, P, N]. Differentiable."""

    @abstractmethod
    def pack_key(self, pose: Tensor) -> Tensor:
        """[B, G, M, m, m] -> [B, G, P, M]; that of a query without displacement. Differentiable."""

    def block(self, packed: Tensor, axis: int) -> Any:
        """Some packed poses [B, G, P, n] in the form that ``norms`` takes: queries for axis −1, keys for axis −2."""
        return Block(packed, axis)

    @abstractmethod
    def norms(self, query: Any, key: Any, room: Room) -> tuple[list[Tensor], tuple]:
        """An array [B, G, Q, K] for each block of the algebra, and what ``vjp`` needs, which is of use only if the room
        was cleared to keep it. All of it lives until the room is cleared again.
        """

    @abstractmethod
    def vjp(self, saved: tuple, grads: list[Tensor], room: Room) -> tuple[Tensor, Tensor]:
        """Gradients of the packed queries and keys, given those of the arrays. It overwrites what was saved."""

    def positions(self, packed: Tensor) -> list[tuple[int, Tensor]]:
        """Indices of blocks k, and positions [B, G, n, N] of the packed poses: array k of two of them is no less than
        the squared distance between their positions. Empty where there is no such block.
        """
        return []

    def inside(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether each pair is in the chart, bool [B, G, Q, K]; only where not ``is_fast``."""
        raise NotImplementedError


class Block:
    """Packed poses, number by number: of queries [B, G, n, 1], of keys [B, G, 1, n]."""

    def __init__(self, packed: Tensor, axis: int) -> None:
        self.packed = packed
        self.numbers = [x.unsqueeze(axis) for x in packed.unbind(-2)]


def pair_geometry(group: Group, chart: str, tangents: bool = False) -> PairGeometry:
    """The geometry of a group in a chart; if it has to give tangent vectors too, one of those `ByLogarithm`."""
    if tangents:
        plain = pair_geometry(group, chart)
        return _InTheWorld(group, plain) if isinstance(plain, _Plane | _Space) else ByLogarithm(group, chart)
    if isinstance(group, Product):
        parts = [pair_geometry(factor, c) for factor, c in zip(group.factors, group._each_chart(chart))]
        if all(part.is_fast for part in parts):
            return _Product(group, parts)
    elif chart == "principal":
        if isinstance(group, Translation):
            return _Vectors(group.point_dim)
        linear = group.linear if isinstance(group, Affine) else group
        if isinstance(linear, Rotations) and not linear._scaled:
            kind = _Plane if linear.point_dim == 2 else _Space
            return kind(isinstance(group, Affine))
    return ByLogarithm(group, chart)


# Translations


def _translations(pose: Tensor) -> Tensor:
    return pose[..., :-1, -1].mT


def _displaced(pose: Tensor, displacement: Tensor | None) -> list[Tensor]:
    """Translations [B, G, n, N], and with a displacement R_i t_c [B, H, n, N] beside them, never added to them: far
    from the origin it would be rounded away.
    """
    here = _translations(pose)
    if displacement is None:
        return [here]
    offset = (pose[..., :-1, :-1] * displacement[:, None, None, :-1, -1]).sum(-1).mT
    return [here.expand(-1, offset.shape[1], -1, -1), offset]


def _differences(query: list[Tensor], key: list[Tensor], room: Room) -> list[Tensor]:
    """t_j − t_i, less the offset where there is one; each [B, G, Q, K]."""
    d = [torch.sub(b, a, out=room()) for a, b in zip(query, key)]
    for x, offset in zip(d, query[len(key) :]):
        x -= offset
    return d


def _dot(a: list[Tensor], b: list[Tensor], out: Tensor) -> Tensor:
    torch.mul(a[0], b[0], out=out)
    for x, y in zip(a[1:], b[1:]):
        out.addcmul_(x, y)
    return out


def _difference_gradients(grads: list[Tensor], displaced: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the packed translations, given those of the differences."""
    to_query = -torch.stack([g.sum(-1) for g in grads], -2)
    to_key = torch.stack([g.sum(-2) for g in grads], -2)
    return torch.cat([to_query, to_query], -2) if displaced else to_query, to_key


def _where(translations: Tensor, n: int) -> Tensor:
    """Positions of packed translations, float64: with the offset, where there is one. In float32 the sum would be
    rounded far from the origin, and a bound made of it would prove nothing.
    """
    translations = translations.double()
    return translations if translations.shape[-2] == n else translations[..., :n, :] + translations[..., n:, :]


class _Vectors(PairGeometry):
    """Translation(n): ‖d‖²."""

    factors = (1.0,)

    def __init__(self, n: int) -> None:
        self.sizes = (n, 2 * n)

    def positions(self, packed: Tensor) -> list[tuple[int, Tensor]]:
        return [(0, _where(packed, self.sizes[0]))]

    def pack_query(self, pose: Tensor, displacement: Tensor | None) -> Tensor:
        return torch.cat(_displaced(pose, displacement), -2)

    def pack_key(self, pose: Tensor) -> Tensor:
        return _translations(pose)

    def norms(self, query: Block, key: Block, room: Room) -> tuple[list[Tensor], tuple]:
        d = _differences(query.numbers, key.numbers, room)
        return [_dot(d, d, room())], (d, len(query.numbers) > len(d))

    def vjp(self, saved: tuple, grads: list[Tensor], room: Room) -> tuple[Tensor, Tensor]:
        d, displaced = saved
        twice = torch.mul(grads[0], 2, out=room())
        return _difference_gradients([x.mul_(twice) for x in d], displaced)


# Polynomials


Polynomial = tuple[float, ...]
"""Coefficients, the constant first."""


def _with_derivative(function: Callable[[np.ndarray], np.ndarray], high: float, degree: int) -> tuple[Polynomial, ...]:
    """The interpolant on [0, high], and that of the derivative, of one degree less."""
    exact = np.polynomial.Chebyshev.interpolate(function, 32, domain=[0, high])
    fits = (
        np.polynomial.Chebyshev.interpolate(f, d, domain=[0, high]).convert(kind=np.polynomial.Polynomial)
        for f, d in ((function, degree), (exact.deriv(), degree - 1))
    )
    return tuple(tuple(float(c) for c in fit.coef) for fit in fits)


def _plane_polynomials() -> dict[torch.dtype, tuple[Polynomial, ...]]:
    """G as a polynomial of the squared angle in turns, on [0, 1/4], and its derivative, to rounding of each dtype."""
    degrees = {torch.float32: 7, torch.float64: 15}
    return {dtype: _with_derivative(lambda x: np.sinc(np.sqrt(x)) ** -2, 0.25, n) for dtype, n in degrees.items()}


def _space_polynomials() -> dict[torch.dtype, tuple[Polynomial, ...]]:
    """Q(y) = (2 asin²(√z)/y − 1)/y, z = y/2, on [0, 1], and its derivative, to rounding of each dtype.

    From the series asin²(√z) = ½ Σ_n (4 z)ⁿ / (n² C(2n, n)), n from 1.
    """
    series = [2.0**n / (n * n * math.comb(2 * n, n)) for n in range(2, 70)]
    degrees = {torch.float32: 7, torch.float64: 21}
    return {
        dtype: _with_derivative(lambda y: np.polynomial.polynomial.polyval(y, series), 1.0, n)
        for dtype, n in degrees.items()
    }


@cache
def _scalars(numbers: Polynomial, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.tensor(c, dtype=dtype, device=device) for c in numbers]


def _fit(
    function: Callable[[np.ndarray], np.ndarray], high: float, single: int, double: int
) -> dict[torch.dtype, Polynomial]:
    """The interpolant on [0, high] of these degrees, for each dtype."""
    degrees = {torch.float32: single, torch.float64: double}
    return {dtype: _with_derivative(function, high, degree)[0] for dtype, degree in degrees.items()}


def _half_angle(y: np.ndarray) -> np.ndarray:
    """h of y = 2 sin²(h/2)."""
    return 2 * np.arcsin(np.sqrt(y / 2))


def _h_cot_h(h: np.ndarray) -> np.ndarray:
    return np.cos(h) / np.sinc(h / np.pi)


def _bend(h: np.ndarray) -> np.ndarray:
    """(1 − h cot h)/sin² h = (sin h − h cos h)/sin³ h, the numerator by its series, for h to π/2."""
    series = [(-1) ** (k + 1) * 2 * k / math.factorial(2 * k + 1) for k in range(1, 16)]
    return np.polynomial.polynomial.polyval(h * h, series) / np.sinc(h / np.pi) ** 3


def _horner(polynomial: Polynomial, x: Tensor) -> Tensor:
    result = x * polynomial[-1] + polynomial[-2]
    for c in reversed(polynomial[:-2]):
        result = result * x + c
    return result


def _evaluate(polynomial: Polynomial, x: Tensor, out: Tensor) -> Tensor:
    """The polynomial by Horner's scheme, one pass over the tile a coefficient."""
    if torch.compiler.is_compiling():
        return out.copy_(_horner(polynomial, x))
    coefficients = _scalars(polynomial, x.dtype, x.device)
    torch.addcmul(coefficients[-2], x, coefficients[-1], out=out)
    for c in reversed(coefficients[:-2]):
        torch.addcmul(c, out, x, out=out)
    return out


# Rotations


class _Plane(PairGeometry):
    """SO(2) and SE(2)."""

    fits = _plane_polynomials()

    def __init__(self, affine: bool) -> None:
        self.affine = affine
        self.factors = (8 * math.pi**2, 1.0) if affine else (8 * math.pi**2,)
        self.sizes = (3, 5) if affine else (1, 1)

    def positions(self, packed: Tensor) -> list[tuple[int, Tensor]]:
        return [(1, _where(packed[..., 1:, :], 2))] if self.affine else []

    def _turns(self, pose: Tensor) -> Tensor:
        sine, cosine = pose[..., 1, 0] - pose[..., 0, 1], pose[..., 0, 0] + pose[..., 1, 1]
        return (torch.atan2(sine, cosine) / (2 * math.pi))[..., None, :]

    def pack_query(self, pose: Tensor, displacement: Tensor | None) -> Tensor:
        turns = self._turns(pose)
        if displacement is not None:
            turns = turns + self._turns(displacement[:, None])
        return torch.cat([turns, *(_displaced(pose, displacement) if self.affine else ())], -2)

    def pack_key(self, pose: Tensor) -> Tensor:
        return torch.cat([self._turns(pose), *([_translations(pose)] if self.affine else ())], -2)

    def norms(self, query: Block, key: Block, room: Room) -> tuple[list[Tensor], tuple]:
        turn = torch.sub(key.numbers[0], query.numbers[0], out=room())
        x = torch.round(turn, out=room())
        turn.sub_(x)
        torch.mul(turn, turn, out=x)
        room.let_go(turn)
        if not self.affine:
            return [x], (turn,)
        d = _differences(query.numbers[1:], key.numbers[1:], room)
        square = _dot(d, d, room())
        room.let_go(*d)
        stretch = _evaluate(self.fits[x.dtype][0], x, room())
        return [x, torch.mul(square, stretch, out=room())], (turn, x, d, square, stretch, len(query.numbers) > 3)

    def vjp(self, saved: tuple, grads: list[Tensor], room: Room) -> tuple[Tensor, Tensor]:
        turn, *rest = saved
        if not self.affine:
            grad_turn = turn.mul_(grads[0]).mul_(2)
            return -grad_turn.sum(-1)[..., None, :], grad_turn.sum(-2)[..., None, :]
        x, d, square, stretch, displaced = rest
        slope = _evaluate(self.fits[x.dtype][1], x, room())
        grad_x = torch.addcmul(grads[0], square.mul_(grads[1]), slope, out=square)
        twice = stretch.mul_(grads[1]).mul_(2)
        to_query, to_key = _difference_gradients([c.mul_(twice) for c in d], displaced)
        grad_turn = turn.mul_(grad_x).mul_(2)
        return (
            torch.cat([-grad_turn.sum(-1)[..., None, :], to_query], -2),
            torch.cat([grad_turn.sum(-2)[..., None, :], to_key], -2),
        )


# The matrix of q ↦ q q_i*, row by row, made of the coordinates of q_i (w, x, y, z), and their signs.
_COORDINATES = ((0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0))
_SIGNS = ((1, 1, 1, 1), (-1, 1, -1, 1), (-1, 1, 1, -1), (-1, -1, 1, 1))


class _Space(PairGeometry):
    """SO(3) and SE(3)."""

    fits = _space_polynomials()

    def __init__(self, affine: bool) -> None:
        self.affine = affine
        self.factors = (16.0, 2.0) if affine else (16.0,)
        self.sizes = (7, 10) if affine else (4, 4)

    def positions(self, packed: Tensor) -> list[tuple[int, Tensor]]:
        # array 1 is half of the squared norm
        return [(1, _where(packed[..., 4:, :], 3) * 0.5**0.5)] if self.affine else []

    def _quaternions(self, pose: Tensor) -> Tensor:
        return _quaternion.from_matrix(pose[..., :3, :3])

    def pack_query(self, pose: Tensor, displacement: Tensor | None) -> Tensor:
        q = self._quaternions(pose)
        if displacement is not None:
            q = _quaternion.multiply(q, self._quaternions(displacement)[:, None])
            q = q / q.norm(dim=-1, keepdim=True)
        return torch.cat([q.mT, *(_displaced(pose, displacement) if self.affine else ())], -2)

    def pack_key(self, pose: Tensor) -> Tensor:
        return torch.cat([self._quaternions(pose).mT, *([_translations(pose)] if self.affine else ())], -2)

    def block(self, packed: Tensor, axis: int) -> "_SpaceBlock":
        return _SpaceBlock(packed, axis)

    def norms(self, query: "_SpaceBlock", key: "_SpaceBlock", room: Room) -> tuple[list[Tensor], tuple]:
        w, *m = query.products(key, room)
        y = _dot(m, m, room())
        cosine = torch.abs(w, out=room()).add_(1)
        room.let_go(w)
        y.div_(cosine)
        room.let_go(cosine)
        q = _evaluate(self.fits[y.dtype][0], y, room())
        ratio = torch.addcmul(query.one, y, q, out=room())
        saved = (query, key, w, m, cosine, y, q, ratio)
        rotation = torch.mul(y, ratio, out=room())
        if not self.affine:
            return [rotation], saved
        d = _differences(query.numbers[4:], key.numbers[4:], room)
        square, along = _dot(d, d, room()), _dot(m, d, room())
        room.let_go(*m, *d)
        rest = torch.sub(query.two, y, out=room()).reciprocal_()
        stretch = torch.mul(ratio, rest, out=room())
        # G |d|²/2 − (Q + ½) (m·d)²/(2 − y)²
        translation = torch.mul(square, stretch, out=room())
        bent = torch.mul(along, rest, out=room()).square_()
        translation.addcmul_(q, bent, value=-1).sub_(bent, alpha=0.5)
        return [rotation, translation], (*saved, d, square, along, rest, stretch)

    def vjp(self, saved: tuple, grads: list[Tensor], room: Room) -> tuple[Tensor, Tensor]:
        query, key, w, m, cosine, y, q, ratio, *more = saved
        d: list[Tensor] = []
        grad_d: list[Tensor] = []
        grad_along = y
        slope = _evaluate(self.fits[y.dtype][1], y, room())
        bend = torch.add(q, 0.5, out=room()) if self.affine else q
        bent = q.addcmul_(y, slope)  # Q + y Q', the derivative of ratio
        grad_y = torch.addcmul(ratio, y, bent, out=room()).mul_(grads[0])
        if self.affine:
            d, square, along, rest, stretch = more
            bend.mul_(rest).mul_(rest)
            grad = grads[1]
            # of stretch = ratio/(2 − y) and bend = (Q + ½)/(2 − y)², times rest = 1/(2 − y) in turn
            bent.addcmul_(ratio, rest).mul_(rest)
            grad_y.addcmul_(square.mul_(grad), bent)
            slope.mul_(rest).mul_(rest).addcmul_(bend, rest, value=2)
            grad_y.addcmul_(torch.mul(along, along, out=square).mul_(grad), slope, value=-1)
            grad_along = along.mul_(bend).mul_(grad).mul_(-2)
            twice = stretch.mul_(grad).mul_(2)
            grad_d = [torch.mul(x, twice, out=room()).addcmul_(z, grad_along) for x, z in zip(d, m)]
        grad_y.div_(cosine)  # cosine holds 1 + |w|, and y = |m|²/(1 + |w|)
        grad_w = w.sign_().mul_(grad_y).mul_(y).neg_()
        grad_y.mul_(2)
        grad_m = [x.mul_(grad_y) for x in m]
        for x, z in zip(grad_m, d):
            x.addcmul_(z, grad_along)
        to_query, to_key = query.quaternion_gradients([grad_w, *grad_m], key)
        if not self.affine:
            return to_query, to_key
        query_t, key_t = _difference_gradients(grad_d, len(query.numbers) > 7)
        return torch.cat([to_query, query_t], -2), torch.cat([to_key, key_t], -2)


class _SpaceBlock(Block):
    """Packed poses in space; of queries the matrices of q ↦ q q_i* too, if they are to be used as matrices.

    They are where that is fast and exact: on CPUs, unless torch is told to lower the precision of matrix products. A
    compiler does better with the numbers.
    """

    def __init__(self, packed: Tensor, axis: int) -> None:
        super().__init__(packed, axis)
        if axis == -1:
            self.one, self.two = packed.new_ones(()), packed.new_full((), 2.0)
        self.quaternions = self.rows = None
        if torch.compiler.is_compiling() or packed.device.type != "cpu":
            return
        if torch.get_float32_matmul_precision() == "highest":
            self.quaternions = packed[..., :4, :].contiguous()
            if axis == -1:
                self.coordinates = torch.tensor(_COORDINATES).flatten()
                self.signs = packed.new_tensor(_SIGNS).flatten()[:, None]
                entries = packed.index_select(-2, self.coordinates) * self.signs
                self.rows = [row.mT.contiguous() for row in entries.unflatten(-2, (4, 4)).unbind(-3)]

    def products(self, key: "_SpaceBlock", room: Room) -> list[Tensor]:
        """(w, m) = q_j q_i*, [B, G, Q, K] each."""
        found = []
        for r, (coordinates, signs) in enumerate(zip(_COORDINATES, _SIGNS)):
            out = room()
            found.append(out)
            if self.rows is not None and key.quaternions is not None:
                # matmul takes twice as long
                torch.bmm(self.rows[r].flatten(0, 1), key.quaternions.flatten(0, 1), out=out.flatten(0, 1))
                continue
            torch.mul(self.numbers[coordinates[0]] * signs[0], key.numbers[0], out=out)
            for c in range(1, 4):
                out.addcmul_(self.numbers[coordinates[c]], key.numbers[c], value=signs[c])
        return found

    def quaternion_gradients(self, grads: list[Tensor], key: "_SpaceBlock") -> tuple[Tensor, Tensor]:
        """Gradients of the quaternions of queries and keys, given those of (w, m)."""
        if self.rows is None:
            to_query, to_key = [[] for _ in range(4)], [[] for _ in range(4)]
            for grad, coordinates, signs in zip(grads, _COORDINATES, _SIGNS):
                for c in range(4):
                    to_query[coordinates[c]].append(grad * key.numbers[c] * signs[c])
                    to_key[c].append(grad * self.numbers[coordinates[c]] * signs[c])
            return (
                torch.stack([reduce(add, terms).sum(-1) for terms in to_query], -2),
                torch.stack([reduce(add, terms).sum(-2) for terms in to_key], -2),
            )
        keys = key.packed[..., :4, :].mT
        to_rows = torch.stack([(grad @ keys).mT for grad in grads], -3).flatten(-3, -2) * self.signs
        to_query = torch.zeros_like(self.packed[..., :4, :]).index_add_(-2, self.coordinates, to_rows)
        return to_query, torch.stack([row.mT @ grad for row, grad in zip(self.rows, grads)]).sum(0)


# Compositions


class _Product(PairGeometry):
    """Products of groups with formulas of their own."""

    def __init__(self, group: Product, parts: list[PairGeometry]) -> None:
        self.group, self.parts = group, parts
        self.factors = tuple(f for part in parts for f in part.factors)
        plain, displaced = zip(*(part.sizes for part in parts))
        self.sizes = (sum(plain), sum(displaced))

    def positions(self, packed: Tensor) -> list[tuple[int, Tensor]]:
        found, start = [], 0
        for part, numbers in zip(self.parts, self._split(packed)):
            found += [(start + k, where) for k, where in part.positions(numbers)]
            start += len(part.factors)
        return found

    def _split(self, packed: Tensor) -> tuple[Tensor, ...]:
        which = self.sizes.index(packed.shape[-2])
        return packed.split([part.sizes[which] for part in self.parts], -2)

    def pack_query(self, pose: Tensor, displacement: Tensor | None) -> Tensor:
        moved = [None] * len(self.parts) if displacement is None else self.group.split(displacement)
        packed = [g.pack_query(p, c) for g, p, c in zip(self.parts, self.group.split(pose), moved)]
        return torch.cat(packed, -2)

    def pack_key(self, pose: Tensor) -> Tensor:
        return torch.cat([g.pack_key(p) for g, p in zip(self.parts, self.group.split(pose))], -2)

    def block(self, packed: Tensor, axis: int) -> list[Any]:
        return [part.block(numbers, axis) for part, numbers in zip(self.parts, self._split(packed))]

    def norms(self, query: list[Any], key: list[Any], room: Room) -> tuple[list[Tensor], tuple]:
        arrays, saved = [], []
        for part, a, b in zip(self.parts, query, key):
            some, kept = part.norms(a, b, room)
            arrays += some
            saved.append(kept)
        return arrays, tuple(saved)

    def vjp(self, saved: tuple, grads: list[Tensor], room: Room) -> tuple[Tensor, Tensor]:
        to_query, to_key, start = [], [], 0
        for part, kept in zip(self.parts, saved):
            end = start + len(part.factors)
            a, b = part.vjp(kept, grads[start:end], room)
            to_query.append(a)
            to_key.append(b)
            start = end
        return torch.cat(to_query, -2), torch.cat(to_key, -2)


class ByLogarithm(PairGeometry):
    """Any group, through its own logarithm; it gives the tangent vectors too."""

    tile = 128
    is_fast = False

    def __init__(self, group: Group, chart: str) -> None:
        self.group, self.chart = group, chart
        self.factors = (1.0,) * len(group.blocks)
        self.sizes = (group.matrix_size**2, 2 * group.matrix_size**2)

    def pack_query(self, pose: Tensor, displacement: Tensor | None) -> Tensor:
        packed = self.pack_key(pose)
        if displacement is None:
            return packed
        inverse = self.pack_key(self.group.inverse(displacement)[None, :, None])
        num_heads, num = inverse.shape[1], packed.shape[-1]
        return torch.cat([packed.expand(-1, num_heads, -1, -1), inverse.expand(len(packed), -1, -1, num)], -2)

    def pack_key(self, pose: Tensor) -> Tensor:
        return pose.flatten(-2).mT

    def block(self, packed: Tensor, axis: int) -> Tensor:
        return packed

    def _relative(self, query: Tensor, key: Tensor) -> Tensor:
        m = self.group.matrix_size
        poses = query.mT.unflatten(-1, (-1, m, m))
        relative = self.group.relative(poses[..., :, None, 0, :, :], key.mT.unflatten(-1, (m, m))[..., None, :, :, :])
        return relative if poses.shape[-3] == 1 else self.group.compose(poses[..., :, None, 1, :, :], relative)

    def inside(self, query: Tensor, key: Tensor) -> Tensor:
        return self.group.in_chart(self._relative(query, key), chart=self.chart)

    def _log(self, query: Tensor, key: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """Block norms [B, G, Q, K, blocks], and the tangent vectors [B, G, Q, K, dim] that they are of, in these or in
        other axes: `in_body` turns them back.
        """
        relative = self._relative(query, key)
        eye = self.group.identity(dtype=relative.dtype, device=relative.device)
        relative = torch.where(inside[..., None, None], relative, eye)
        tangent = self.group.log(relative, chart=self.chart, check=False)
        return self.group.block_norms(tangent), tangent

    def in_body(self, tangent: Tensor, pose: Tensor, displacement: Tensor | None) -> Tensor:
        """Weighted sums of the tangent vectors of a query, [B, H, N, dim], as coordinates of the algebra.

        Args:
            tangent: what was summed.
            pose, displacement: of the queries, as in ``pack_query``.
        """
        return tangent

    def norms(self, query: Tensor, key: Tensor, room: Room) -> tuple[list[Tensor], tuple]:
        norms, tangent = self._log(query, key, self.inside(query, key))
        return list(norms.unbind(-1)), (query, key, tangent)

    def vjp(
        self, saved: tuple, grads: list[Tensor], room: Room, grad_tangent: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        query, key, tangent = saved
        inside = self.inside(query, key)
        pull = torch.func.vjp(lambda a, b: self._log(a, b, inside), query, key)[1]
        return pull((torch.stack(grads, -1), torch.zeros_like(tangent) if grad_tangent is None else grad_tangent))


class _InTheWorld(ByLogarithm):
    """SO(2), SE(2), SO(3), SE(3) with tangent vectors, by formulas and in the axes of the world.

    Of log(g_i⁻¹ g_j) = (ω, u) in the axes of pose i the world sees R_i ω, the rotation vector of q_j q_i*, and R_i u =
    V⁻¹ d, with d = t_j − t_i. So poses need be turned back once a query and not once a pair. With h half the angle of
    rotation:

    - in the plane V⁻¹ d = h cot h d − h J d, with J the quarter turn;
    - in space, with (w, m) = q_j q_i* and w made positive, ω = 2 (h/sin h) m and
      V⁻¹ d = h cot h d − ½ ω × d + (1 − h cot h)/sin² h (m·d) m.

    The coefficients are polynomials, of the square of h in the plane and of y = 2 sin²(h/2) in space.
    """

    is_fast = True
    plane_fits = _fit(lambda x: _h_cot_h(np.pi * np.sqrt(x)), 0.25, 8, 16)
    space_fits = tuple(
        _fit(function, 1.0, 11, 22)
        for function in (lambda y: 1 / np.sinc(_half_angle(y) / np.pi), lambda y: _bend(_half_angle(y)))
    )

    def __init__(self, group: Group, plain: "_Plane | _Space") -> None:
        self.group, self.plain = group, plain
        self.factors = (1.0,) * len(group.blocks)
        self.sizes = plain.sizes

    def pack_query(self, pose: Tensor, displacement: Tensor | None) -> Tensor:
        return self.plain.pack_query(pose, displacement)

    def pack_key(self, pose: Tensor) -> Tensor:
        return self.plain.pack_key(pose)

    def inside(self, query: Tensor, key: Tensor) -> Tensor:
        return query.new_ones((), dtype=torch.bool)

    def in_body(self, tangent: Tensor, pose: Tensor, displacement: Tensor | None) -> Tensor:
        n = self.group.point_dim
        rotation = pose[..., :n, :n]
        if displacement is not None:
            rotation = rotation @ displacement[:, None, :n, :n]
        if n == 2 and not self.plain.affine:
            return tangent
        if n == 2:
            return torch.cat([tangent[..., :1], (tangent[..., None, 1:] @ rotation)[..., 0, :]], -1)
        vectors = tangent.unflatten(-1, (-1, 3))  # rows, so that the product with R is Rᵀ on each
        return (vectors @ rotation).flatten(-2)

    def _log(self, query: Tensor, key: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        queries = [x[..., None] for x in query.unbind(-2)]
        keys = [x[..., None, :] for x in key.unbind(-2)]
        of_rotation = 1 if isinstance(self.plain, _Plane) else 4
        d = [b - a for a, b in zip(queries[of_rotation:], keys[of_rotation:])]
        if len(queries) > len(keys):
            d = [x - offset for x, offset in zip(d, queries[len(keys) :])]
        tangent = self._plane(keys[0] - queries[0], d) if of_rotation == 1 else self._space(queries, keys, d)
        tangent = torch.stack(tangent, -1)
        return self.group.block_norms(tangent), tangent

    def _plane(self, turn: Tensor, d: list[Tensor]) -> list[Tensor]:
        turn = turn - turn.round()
        if not d:
            return [2 * math.pi * turn]
        straight, h = _horner(self.plane_fits[turn.dtype], turn * turn), math.pi * turn
        return [2 * h, straight * d[0] + h * d[1], straight * d[1] - h * d[0]]

    def _space(self, queries: list[Tensor], keys: list[Tensor], d: list[Tensor]) -> list[Tensor]:
        w, *m = (
            reduce(add, (queries[e] * keys[c] * s for c, (e, s) in enumerate(zip(coordinates, signs))))
            for coordinates, signs in zip(_COORDINATES, _SIGNS)
        )
        side = torch.where(w < 0, -1.0, 1.0).to(w.dtype)
        m = [x * side for x in m]
        cosine = w.abs()
        y = reduce(add, (x * x for x in m)) / (1 + cosine)
        stretch = _horner(self.space_fits[0][y.dtype], y)
        omega = [2 * stretch * x for x in m]
        if not d:
            return omega
        straight = stretch * cosine
        along = _horner(self.space_fits[1][y.dtype], y) * reduce(add, (a * b for a, b in zip(m, d)))
        turned = [omega[(i + 1) % 3] * d[(i + 2) % 3] - omega[(i + 2) % 3] * d[(i + 1) % 3] for i in range(3)]
        return omega + [straight * a - 0.5 * b + along * c for a, b, c in zip(d, turned, m)]
