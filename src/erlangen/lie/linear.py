"""Groups of linear maps: rotations, scaled rotations, and all invertible maps.

Each also gives φ₁(X) = ∫₀¹ exp(s X) ds = (e^X − 1)/X and its inverse, applied to a vector: what the exponential and the
logarithm of the affine group above it do to the translation (``affine``). For rotations φ₁ is the left Jacobian of
SO(3).
"""

import math
from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from . import _matrix, _quaternion, _series
from ._base import Group
from ._matrix import adjugate2, eye_like, matmul, matvec


class Linear(Group):
    """A group of n×n matrices acting on R^n; m = n."""

    @abstractmethod
    def phi1(self, w: Tensor, u: Tensor) -> Tensor:
        """φ₁(hat(w)) u: [..., dim] and [..., n] -> [..., n]."""

    @abstractmethod
    def phi1_inverse(self, w: Tensor, u: Tensor) -> Tensor:
        """φ₁(hat(w))⁻¹ u: [..., dim] and [..., n] -> [..., n], for w in the image of the principal logarithm."""

    def log_affine(self, a: Tensor, t: Tensor, chart: str) -> Tensor:
        """Coordinates of the affine map x -> a x + t: [..., n, n] and [..., n] -> [..., dim + n], not validated."""
        w = self._log(a, chart)
        return torch.cat([w, self.phi1_inverse(w, t)], -1)

    def act(self, g: Tensor, points: Tensor) -> Tensor:
        """Move points, g p: [..., n, n] and [..., n] -> [..., n]."""
        self._require_elements(g)
        return matvec(g, points)

    def in_chart(self, g: Tensor, *, chart: str = "principal") -> Tensor:
        """Whether g is finite with a positive determinant: [..., n, n] -> bool [...]."""
        self._require_chart(chart)
        self._require_elements(g)
        g = g.detach()
        return torch.isfinite(g).flatten(-2).all(-1) & (_matrix.determinant(g) > 0)

    def _chart_rule(self, chart: str) -> str:
        return "with a positive determinant"


class Rotations(Linear):
    """SO(n), n = 2 or 3, and with ``scaled`` the group of positive multiples of rotations, under Sim(n).

    The rotation angle comes from atan2 in the plane, and from the quaternion in space: never from a trace.
    """

    def __init__(self, n: int, *, scaled: bool = False):
        basis = {"rotation": rotation_basis(n)}
        if scaled:
            basis = {"scale": np.eye(n)[None], **basis}
        super().__init__(f"CO{n}" if scaled else f"SO{n}", n, basis)
        self._scaled = scaled

    def _split(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-scale [...], rotation vector [..., 1 or 3] and its squared length [...]."""
        omega = w[..., 1:] if self._scaled else w
        scale = w[..., 0] if self._scaled else torch.zeros_like(w[..., 0])
        return scale, omega, omega.square().sum(-1)

    def _series_in_rotation(self, omega: Tensor, u: Tensor, zeroth: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """(zeroth + first ω̂ + second ω̂²) u."""
        if self.point_dim == 2:
            once = omega * torch.stack([-u[..., 1], u[..., 0]], -1)
            twice = -omega.square() * u
        else:
            once = torch.linalg.cross(omega, u)
            twice = torch.linalg.cross(omega, once)
        return zeroth[..., None] * u + first[..., None] * once + second[..., None] * twice

    def exp(self, xi: Tensor) -> Tensor:
        """Rodrigues' formula: [..., dim] -> [..., n, n]."""
        self._require_tangent(xi)
        scale, omega, x = self._split(xi)
        skew = (omega[..., None, None] * torch.as_tensor(self._rotations(), dtype=xi.dtype, device=xi.device)).sum(-3)
        sine, cosine = (f(x)[..., None, None] for f in (_series.sin_ratio, _series.cos_ratio))
        rotation = eye_like(skew) + sine * skew + cosine * matmul(skew, skew)
        return scale.exp()[..., None, None] * rotation if self._scaled else rotation

    def _rotations(self) -> np.ndarray:
        return self._basis[self._slices["rotation"]]

    def _log(self, g: Tensor, chart: str) -> Tensor:
        if not self._scaled:
            return rotation_vector(g)
        excess = g - eye_like(g)
        n = self.point_dim
        # squared scale |g|²/n, and what it exceeds one by without cancellation
        square = g.square().sum((-2, -1)) / n
        square_excess = (2 * excess.diagonal(dim1=-2, dim2=-1).sum(-1) + excess.square().sum((-2, -1))) / n
        scale = _series.log_from_one(square, square_excess) / 2
        return torch.cat([scale[..., None], rotation_vector(g, square.sqrt())], -1)

    def phi1(self, w: Tensor, u: Tensor) -> Tensor:
        scale, omega, x = self._split(w)
        if self._scaled:
            parts = _series.exp_ratio_complex(scale, x)
        else:
            parts = torch.ones_like(x), _series.cos_ratio(x), _series.sin_defect(x)
        return self._series_in_rotation(omega, u, *parts)

    def phi1_inverse(self, w: Tensor, u: Tensor) -> Tensor:
        scale, omega, x = self._split(w)
        if self._scaled:
            parts = _series.todd(scale), _series.todd_complex(scale, x)[1], _series.todd_axis(scale, x)
        else:
            parts = torch.ones_like(x), torch.full_like(x, -0.5), _series.cot_defect(x)
        return self._series_in_rotation(omega, u, *parts)

    def inverse(self, g: Tensor) -> Tensor:
        """The transpose (over the squared scale): [..., n, n] -> [..., n, n]."""
        self._require_elements(g)
        if not self._scaled:
            return g.mT
        return g.mT / (g.square().sum((-2, -1), keepdim=True) / self.point_dim)

    def random(
        self,
        *batch: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        n = self.point_dim
        normal = torch.randn(*batch, 4, generator=generator, dtype=dtype, device=device)
        if n == 2:
            c, s = (normal[..., :2] / normal[..., :2].norm(dim=-1, keepdim=True)).unbind(-1)
            rotation = torch.stack([c, -s, s, c], -1).unflatten(-1, (2, 2))
        else:
            rotation = _quaternion.to_matrix(normal / normal.norm(dim=-1, keepdim=True))
        if not self._scaled:
            return rotation
        scale = torch.randn(*batch, 1, 1, generator=generator, dtype=dtype, device=device)
        return (scale / 2).exp() * rotation

    def project_tangent(self, g: Tensor, x: Tensor) -> Tensor:
        self._require_elements(g)
        seen = matmul(g.mT, x)
        if not self._scaled:
            return matmul(g, (seen - seen.mT) / 2)
        square = g.square().sum((-2, -1), keepdim=True) / self.point_dim
        trace = seen.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        return matmul(g, (seen - seen.mT) / 2 + trace * eye_like(g)) / square

    def project(self, matrix: Tensor) -> Tensor:
        """The nearest (scaled) rotation, by the singular value decomposition: [..., n, n], detached."""
        self._require_elements(matrix)
        matrix = require_finite(self, matrix)
        u, singular, vh = torch.linalg.svd(matrix)
        signs = torch.ones_like(singular)
        signs[..., -1] = _matrix.determinant(matmul(u, vh)).sign()
        rotation = matmul(u * signs[..., None, :], vh)
        scale = (singular * signs).mean(-1)
        if bool((scale <= singular[..., 0] * torch.finfo(matrix.dtype).eps).any()):
            raise ValueError(f"{self}.project: a matrix is zero, or nearest to scale zero; it has no nearest element")
        return scale[..., None, None] * rotation if self._scaled else rotation

    def _deviation(self, g: Tensor) -> tuple[Tensor, str]:
        gram = matmul(g.mT, g)
        square = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        if self._scaled:
            gram = gram / square
        deviation = (gram - eye_like(g)).abs().flatten(-2).amax(-1)
        deviation = torch.where(_matrix.determinant(g) > 0, deviation, torch.inf)
        rule = "g gᵀ is a multiple of the identity" if self._scaled else "g gᵀ is the identity"
        return deviation, f"{rule} and the determinant is positive"


class GeneralLinear(Linear):
    """GL(n), n >= 2: all invertible matrices; the charts cover (parts of) those of positive determinant.

    The principal chart holds the matrices without eigenvalues on the negative real axis, which not even all matrices of
    positive determinant are: diag(−1, −2) has no real logarithm. The ``"polar"`` chart is global on positive
    determinants for n = 2 and 3: a = R S with a rotation R and a symmetric positive definite S, coordinates log R and
    log S. It is as left-invariant as any function of ``relative``. (For n >= 4 a rotation R with an eigenvalue −1 is
    outside.) On the affine group its translation coordinate is S^(−1/2) Rᵀ t: the choice for which ``block_norms`` of g
    and of its inverse agree, as they do in the principal chart.

    ``log`` has a closed form for n = 2. For n >= 3 it is an iteration that looks at the batch (see ``_matrix``), and so
    is ``exp``: they break the graph of ``torch.compile``. An eigenvalue at an angle ε from the negative axis costs it a
    factor 1/ε² in accuracy (1/ε is the condition of the problem), so its principal chart ends at ε = 4 sqrt(eps of the
    dtype), 1.4e-3 in float32.
    """

    charts = ("principal", "polar")

    def __init__(self, n: int):
        if n < 2:
            raise ValueError(f"GL(n) needs n >= 2, received {n}")
        basis = {"scale": np.eye(n)[None], "rotation": rotation_basis(n), "shear": shear_basis(n)}
        super().__init__(f"GL({n})", n, basis)

    def exp(self, xi: Tensor) -> Tensor:
        """The matrix exponential: [..., dim] -> [..., n, n]."""
        self._require_tangent(xi)
        # the scale apart, so that the rest has determinant 1 and a small result keeps its digits
        without_scale = torch.cat([torch.zeros_like(xi[..., :1]), xi[..., 1:]], -1)
        return xi[..., :1, None].exp() * _matrix.exp_and_phi1(self.hat(without_scale))[0]

    def in_chart(self, g: Tensor, *, chart: str = "principal") -> Tensor:
        """Whether g is finite, of positive determinant, and for the principal chart without eigenvalues <= 0."""
        inside = super().in_chart(g, chart=chart)
        g = torch.where(inside[..., None, None], g.detach(), eye_like(g))
        if self.point_dim == 2:
            if chart == "polar":
                return inside
            half_trace, discriminant = _trace_and_discriminant(g)
            return inside & ((half_trace > 0) | (discriminant < 0))
        if chart == "polar":
            if self.point_dim == 3:
                return inside
            g = _matrix.polar_rotation(g)
        values = torch.linalg.eigvals(g)
        margin = 4 * torch.finfo(g.dtype).eps ** 0.5 * values.abs()
        return inside & ~((values.real <= 0) & (values.imag.abs() <= margin)).any(-1)

    def _chart_rule(self, chart: str) -> str:
        if chart == "principal":
            return "of positive determinant without eigenvalues on the negative real axis"
        return "of positive determinant" + (
            " whose orthogonal polar factor has no eigenvalue -1" if self.point_dim > 3 else ""
        )

    def _log(self, g: Tensor, chart: str) -> Tensor:
        if chart == "polar":
            return self._log_polar(g)[0]
        return _log2(g) if self.point_dim == 2 else self.vee(_matrix.log(g))

    def log_affine(self, a: Tensor, t: Tensor, chart: str) -> Tensor:
        if chart == "principal":
            return super().log_affine(a, t, chart)
        w, rotation, root_inverse = self._log_polar(a)
        return torch.cat([w, matvec(root_inverse, matvec(rotation.mT, t))], -1)

    def _log_polar(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates of a = R S, and R and S^(−1/2)."""
        if self.point_dim == 2:
            return _log_polar2(a)
        rotation = _matrix.polar_rotation(a)
        stretch = matmul(rotation.mT, a)
        log_stretch = _matrix.log((stretch + stretch.mT) / 2)
        w = self.vee(log_stretch)
        if self.point_dim == 3:
            omega = rotation_vector(rotation)
        else:
            omega = self.vee(_matrix.log(rotation))[..., self._slices["rotation"]]
        w = torch.cat([w[..., :1], omega, w[..., self._slices["shear"]]], -1)
        return w, rotation, _matrix.exp_and_phi1(-log_stretch / 2)[0]

    def phi1(self, w: Tensor, u: Tensor) -> Tensor:
        return matvec(_matrix.exp_and_phi1(self.hat(w))[1], u)

    def phi1_inverse(self, w: Tensor, u: Tensor) -> Tensor:
        if self.point_dim > 2:
            return torch.linalg.solve_ex(_matrix.exp_and_phi1(self.hat(w))[1], u[..., None]).result[..., 0]
        # X = a I + N with N² = −x I, so that φ₁(X)⁻¹ is a combination of I and N
        scale, theta, p, q = w.unbind(-1)
        first, second = _series.todd_complex(scale, theta.square() - p.square() - q.square())
        nu = torch.stack([p * u[..., 0] + (q - theta) * u[..., 1], (q + theta) * u[..., 0] - p * u[..., 1]], -1)
        return first[..., None] * u + second[..., None] * nu

    def inverse(self, g: Tensor) -> Tensor:
        """The inverse: [..., n, n] -> [..., n, n]; not finite where g is singular."""
        self._require_elements(g)
        return _matrix.inverse(g)

    def random(
        self,
        *batch: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        xi = torch.randn(*batch, self.dim, generator=generator, dtype=dtype, device=device) / 2
        length = self.block_norms(xi).sum(-1, keepdim=True).sqrt()
        return self.exp(xi * (3 / length).clamp(max=1))

    def project_tangent(self, g: Tensor, x: Tensor) -> Tensor:
        """x itself: all matrices are tangent."""
        self._require_elements(g)
        return x

    def project(self, matrix: Tensor) -> Tensor:
        """The matrix itself, which must be invertible: [..., n, n], detached."""
        self._require_elements(matrix)
        matrix = require_finite(self, matrix)
        if bool(torch.isinf(self._deviation(matrix)[0]).any()):
            raise ValueError(f"{self}.project: a matrix is singular to rounding; no invertible one is nearest")
        return matrix.clone()

    def _deviation(self, g: Tensor) -> tuple[Tensor, str]:
        singular = torch.linalg.svdvals(g)
        invertible = singular[..., -1] > 4 * torch.finfo(g.dtype).eps * singular[..., 0]
        return torch.where(invertible, 0.0, torch.inf).to(g), "g is invertible beyond rounding"


def rotation_basis(n: int) -> np.ndarray:
    """The skew-symmetric matrices, of squared norm 2: [n(n−1)/2, n, n], about x, y, z for n = 3."""
    pairs = [(1, 2), (2, 0), (0, 1)] if n == 3 else [(i, j) for i in range(n) for j in range(i + 1, n)]
    basis = np.zeros((len(pairs), n, n))
    for k, (i, j) in enumerate(pairs):
        basis[k, j, i], basis[k, i, j] = 1, -1
    return basis


def shear_basis(n: int) -> np.ndarray:
    """The symmetric matrices without trace, of squared norm 2: the diagonal ones first, [n(n+1)/2 − 1, n, n]."""
    basis = []
    for k in range(1, n):
        diagonal = np.array([1.0] * k + [-k] + [0.0] * (n - k - 1))
        basis.append(np.diag(diagonal * math.sqrt(2 / (k * (k + 1)))))
    for i in range(n):
        for j in range(i + 1, n):
            symmetric = np.zeros((n, n))
            symmetric[i, j] = symmetric[j, i] = 1
            basis.append(symmetric)
    return np.stack(basis)


def rotation_vector(matrix: Tensor, scale: Tensor | None = None) -> Tensor:
    """The rotation vector of a (scaled) rotation: [..., n, n] -> [..., 1] (n = 2) or [..., 3], length up to π.

    In space 2 φ v/|v| of the unit quaternion (w, v), with φ = atan2(|v|, w) taken as 2 atan(|v|/(1 + w)).
    """
    if matrix.shape[-1] == 2:
        sine = matrix[..., 1, 0] - matrix[..., 0, 1]
        return torch.atan2(sine, matrix[..., 0, 0] + matrix[..., 1, 1])[..., None]
    q = _quaternion.from_matrix(matrix, scale)
    v, denominator = q[..., 1:], 1 + q[..., 0]
    tangent_square = v.square().sum(-1) / denominator.square()
    return (4 * _series.atan_ratio(tangent_square) / denominator)[..., None] * v


def require_finite(group: Group, matrix: Tensor) -> Tensor:
    """The matrix, detached; a ValueError if an entry is not finite."""
    matrix = matrix.detach()
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{group}.project: {int((~torch.isfinite(matrix)).sum())} entries are not finite")
    return matrix


def _trace_and_discriminant(a: Tensor) -> tuple[Tensor, Tensor]:
    """m = tr a/2 and δ = m² − det a, without the cancellation: the eigenvalues are m ± sqrt δ."""
    difference = (a[..., 0, 0] - a[..., 1, 1]) / 2
    return (a[..., 0, 0] + a[..., 1, 1]) / 2, difference.square() + a[..., 0, 1] * a[..., 1, 0]


def _log_determinant2(a: Tensor) -> tuple[Tensor, Tensor]:
    """det a and ln det a of 2×2 matrices, accurate near the identity."""
    determinant = _matrix.determinant(a)
    e, f = a[..., 0, 0] - 1, a[..., 1, 1] - 1
    return determinant, _series.log_from_one(determinant, e + f + e * f - a[..., 0, 1] * a[..., 1, 0])


def _log2(a: Tensor) -> Tensor:
    """The principal logarithm of 2×2 matrices: [..., 2, 2] -> scale, rotation and two shears [..., 4].

    log a = ½ ln det a · I + b (a − m I), with b = ln((m + √δ)/√det)/√δ at real eigenvalues m ± √δ, atan2(√−δ, m)/√−δ
    at complex ones, and 2 atanh(r)/√δ, r = √δ/(√det + m), a series in r², where they nearly meet.
    """
    m, delta = _trace_and_discriminant(a)
    determinant, log_determinant = _log_determinant2(a)
    root = determinant.sqrt()
    real, near = delta > 0, (m > 0) & (delta.abs() < 0.02 * (root + m).square())
    denominator = torch.where(near, root + m, 1.0)
    b_near = 2 * _series.atan_ratio(torch.where(near, -delta, 0.0) / denominator.square()) / denominator
    far = torch.where(near, 1.0, delta).abs().sqrt()
    b_complex = torch.atan2(far, torch.where(near | real, 0.0, m)) / far
    b_real = ((torch.where(near | ~real, 1.0, m) + far) / root).log() / far
    b = torch.where(near, b_near, torch.where(real, b_real, b_complex))
    n = [a[..., 1, 0] - a[..., 0, 1], a[..., 0, 0] - a[..., 1, 1], a[..., 0, 1] + a[..., 1, 0]]
    return torch.stack([log_determinant / 2, *(b * x / 2 for x in n)], -1)


def _log_polar2(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Polar coordinates of 2×2 matrices (scale, rotation, two shears), and R and S^(−1/2), a = R S.

    As a map of the complex plane a is z -> α z + β z̄; R turns by the argument of α, and S has stretches
    √det e^(±y), with sinh y = |β|/√det.
    """
    determinant, log_determinant = _log_determinant2(a)
    root = determinant.sqrt()
    alpha_re, alpha_im = a[..., 0, 0] + a[..., 1, 1], a[..., 1, 0] - a[..., 0, 1]
    size = (alpha_re.square() + alpha_im.square()).sqrt()  # 2|α| >= 2√det
    c, s = alpha_re / size, alpha_im / size
    rotation = torch.stack([c, -s, s, c], -1).unflatten(-1, (2, 2))
    beta_re, beta_im = (a[..., 0, 0] - a[..., 1, 1]) / 2, (a[..., 0, 1] + a[..., 1, 0]) / 2
    shear = torch.stack([c * beta_re + s * beta_im, c * beta_im - s * beta_re], -1)
    ratio = _series.asinh_ratio(shear.square().sum(-1) / determinant) / root
    w = torch.cat(
        [torch.stack([log_determinant / 2, torch.atan2(alpha_im, alpha_re)], -1), ratio[..., None] * shear], -1
    )
    p, q, half = shear[..., 0], shear[..., 1], size / 2
    stretch = torch.stack([half + p, q, q, half - p], -1).unflatten(-1, (2, 2))
    root_inverse = adjugate2(stretch) / root[..., None, None] + eye_like(a)
    return w, rotation, root_inverse / (size + 2 * root).sqrt()[..., None, None]
