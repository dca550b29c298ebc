"""Small matrices: products that no precision setting touches, exponential, logarithm and polar factor.

An eigendecomposition has no gradient where eigenvalues repeat, which is at the identity and at each rotation. The
iterations here are rational functions of the entries, so that automatic differentiation through them is exact once
they have converged, at Jordan blocks and repeated singular values too. They stop when the whole batch has converged.
"""

import math

import numpy as np
import torch
from torch import Tensor

_NODES, _WEIGHTS = (torch.from_numpy(x / 2) for x in np.polynomial.legendre.leggauss(8))
_TAYLOR = [1 / math.factorial(k + 1) for k in range(15)]
_UNROLLED = 4
_SETTLE = (
    2  # steps more once the values have converged: the first derivative lags behind by one step, the second by two
)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b, term by term up to size 4: neither TF32 nor autocast can lower its precision, and a transpose of the product
    of transposes is bitwise the same."""
    if a.shape[-1] > _UNROLLED:
        return a @ b
    result = a[..., :, 0, None] * b[..., None, 0, :]
    for k in range(1, a.shape[-1]):
        result = result + a[..., :, k, None] * b[..., None, k, :]
    return result


def matvec(a: Tensor, v: Tensor) -> Tensor:
    """a v: [..., n, n] and [..., n] -> [..., n]."""
    return (a * v[..., None, :]).sum(-1)


def eye_like(a: Tensor) -> Tensor:
    return torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def determinant(a: Tensor) -> Tensor:
    """The determinant [...], expanded for n = 2 and 3."""
    if a.shape[-1] == 2:
        return a[..., 0, 0] * a[..., 1, 1] - a[..., 0, 1] * a[..., 1, 0]
    if a.shape[-1] == 3:
        return (a[..., 0] * torch.linalg.cross(a[..., 1], a[..., 2])).sum(-1)
    return torch.linalg.det(a)


def inverse(a: Tensor) -> Tensor:
    """The inverse [..., n, n], by the adjugate for n = 2; not finite where a is singular."""
    if a.shape[-1] == 2:
        return adjugate2(a) / determinant(a)[..., None, None]
    return torch.linalg.inv_ex(a).inverse


def adjugate2(a: Tensor) -> Tensor:
    """[[d, −b], [−c, a]] of [[a, b], [c, d]]."""
    row0 = torch.stack([a[..., 1, 1], -a[..., 0, 1]], -1)
    return torch.stack([row0, torch.stack([-a[..., 1, 0], a[..., 0, 0]], -1)], -2)


def _converged(deviation: Tensor) -> bool:
    """Whether no element of a batch is off by more than rounding (a NaN counts as converged: it will not improve)."""
    tolerance = 64 * torch.finfo(deviation.dtype).eps
    return not bool((deviation.detach().abs() > tolerance).any())


def _max_iterations(dtype: torch.dtype) -> int:
    """An eigenvalue at angle ε from the negative axis needs about log2(1/ε) steps of Newton's method, and ten more."""
    return 35 if dtype == torch.float32 else 65


def exp_and_phi1(x: Tensor) -> tuple[Tensor, Tensor]:
    """e^X and φ₁(X) = (e^X − I)/X: [..., n, n] each, by scaling and squaring of E = e^X − I and φ₁ together.

    φ₁ is a Taylor polynomial of degree 14 where |X| <= 1/2, and E(2X) = 2E + E², φ₁(2X) = φ₁(X)(I + E/2). Unlike
    ``torch.linalg.matrix_exp``, whose backward exponentiates a matrix that holds the incoming gradient: the larger that
    is the more it squares, and in float32 a gradient of 1e6 comes out wrong by several percent (torch 2.13).
    """
    eye = eye_like(x)
    size = x.detach().flatten(-2).norm(dim=-1)[..., None, None]
    doublings = torch.nan_to_num((2 * size).log2().ceil(), nan=0.0).clamp(0, 40)
    x = x * (-doublings).exp2()
    phi1 = _TAYLOR[-1] * eye
    for c in reversed(_TAYLOR[:-1]):
        phi1 = matmul(x, phi1) + c * eye
    excess = matmul(x, phi1)
    for k in range(int(doublings.max()) if doublings.numel() else 0):
        active = doublings > k
        phi1 = torch.where(active, phi1 + matmul(phi1, excess) / 2, phi1)
        excess = torch.where(active, 2 * excess + matmul(excess, excess), excess)
    return eye + excess, phi1


def square_root(a: Tensor) -> Tensor:
    """The principal square root [..., n, n], by the product form of the Denman–Beavers iteration, with scaling.

    Source: N. Higham, Functions of Matrices (SIAM 2008), equations 6.29 and 6.30.
    """
    n, eye = a.shape[-1], eye_like(a)
    m, x, settled = a, a, 0
    for _ in range(_max_iterations(a.dtype)):
        settled += _converged(m - eye)
        scale = determinant(m.detach()).abs() ** (-1 / (2 * n)) if not settled else torch.ones_like(m[..., 0, 0])
        scale = scale[..., None, None]
        m = m * scale.square()
        inverted = inverse(m)
        x = 0.5 * scale * matmul(x, eye + inverted)
        m = 0.5 * eye + 0.25 * (m + inverted)
        if settled == _SETTLE:
            break
    return x


def log(a: Tensor) -> Tensor:
    """The principal logarithm [..., n, n] of matrices without eigenvalues on the negative real axis.

    Inverse scaling and squaring: the volume is divided out, square roots are taken until the matrix is near the
    identity, element by element of the batch, and log(I + E) is the integral of E (I + s E)^-1 over s in [0, 1], by
    Gauss–Legendre quadrature with 8 nodes, which is the Padé approximant [8/8] (Higham, section 11.4). A matrix near
    the identity is not rooted at all and keeps its relative accuracy.
    """
    n, eye = a.shape[-1], eye_like(a)
    excess = a - eye
    volume = torch.linalg.slogdet(a.detach()).logabsdet / n  # any constant would do, so it has no gradient
    volume = torch.where(excess.detach().flatten(-2).norm(dim=-1) < 0.5, 0.0, volume)[..., None, None]
    excess = (-volume).exp() * excess + (-volume).expm1() * eye
    doublings = torch.zeros_like(volume)
    for _ in range(8):
        far = excess.detach().flatten(-2).norm(dim=-1)[..., None, None] > 0.5
        if not bool(far.any()):
            break
        root = square_root(torch.where(far, eye + excess, eye))
        excess = torch.where(far, root - eye, excess)
        doublings = doublings + far
    nodes, weights = (x.to(a)[:, None, None] for x in (_NODES + 0.5, _WEIGHTS))
    terms = matmul(inverse(eye + nodes * excess[..., None, :, :]), excess[..., None, :, :])
    return volume * eye + doublings.exp2() * (weights * terms).sum(-3)


def polar_rotation(a: Tensor) -> Tensor:
    """The orthogonal factor R of a = R S, S symmetric positive definite: [..., n, n], by Newton's iteration, scaled.

    Source: Higham, section 8.3. Its determinant has the sign of that of a.
    """
    n, eye = a.shape[-1], eye_like(a)
    r, settled = a, 0
    for _ in range(_max_iterations(a.dtype)):
        settled += _converged(matmul(r.mT, r) - eye)
        scale = determinant(r.detach()).abs() ** (-1 / n) if not settled else torch.ones_like(r[..., 0, 0])
        r = r * scale[..., None, None]
        r = 0.5 * (r + inverse(r).mT)
        if settled == _SETTLE:
            break
    return r
