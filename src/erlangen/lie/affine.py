"""Groups with translations: a group of linear maps and the translations it acts on, as matrices [[A, t], [0, 1]].

With X = hat(w) the linear part of the algebra, exp(w, u) = (e^X, φ₁(X) u) and log(A, t) = (log A, φ₁(log A)⁻¹ t).
"""

import numpy as np
import torch
from torch import Tensor

from ._base import Group
from ._matrix import eye_like, matmul, matvec
from .linear import Linear, require_finite


class Affine(Group):
    """The semidirect product of a linear group with translations; m = n + 1, dim = dim of the linear group + n.

    SE(n) over rotations, Sim(n) over scaled rotations, Aff(n) over GL(n), whose charts it has (see ``GeneralLinear``
    for the translation in the polar one).
    """

    def __init__(self, name: str, linear: Linear):
        n = linear.point_dim
        blocks = {
            block: np.pad(linear._basis[part], ((0, 0), (0, 1), (0, 1))) for block, part in linear._slices.items()
        }
        super().__init__(name, n, {**blocks, "translation": translation_basis(n)})
        self.linear = linear
        self.charts = linear.charts

    def assemble(self, linear: Tensor, translation: Tensor) -> Tensor:
        """The matrices of x -> A x + t: [..., n, n] and [..., n] -> [..., m, m]."""
        return assemble(linear, translation)

    def split(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Linear part [..., n, n] and translation [..., n]."""
        self._require_elements(g)
        n = self.point_dim
        return g[..., :n, :n], g[..., :n, n]

    def exp(self, xi: Tensor) -> Tensor:
        self._require_tangent(xi)
        w, u = xi[..., : self.linear.dim], xi[..., self.linear.dim :]
        return assemble(self.linear.exp(w), self.linear.phi1(w, u))

    def _log(self, g: Tensor, chart: str) -> Tensor:
        return self.linear.log_affine(*self.split(g), chart)

    def in_chart(self, g: Tensor, *, chart: str = "principal") -> Tensor:
        """Whether the linear part is in the chart and the translation finite: [..., m, m] -> bool [...]."""
        linear, translation = self.split(g)
        return self.linear.in_chart(linear, chart=chart) & torch.isfinite(translation.detach()).all(-1)

    def _chart_rule(self, chart: str) -> str:
        return f"whose linear part is {self.linear._chart_rule(chart)}".replace("is with", "has")

    def compose(self, a: Tensor, b: Tensor) -> Tensor:
        linear_a, translation_a = self.split(a)
        linear_b, translation_b = self.split(b)
        return assemble(matmul(linear_a, linear_b), matvec(linear_a, translation_b) + translation_a)

    def inverse(self, g: Tensor) -> Tensor:
        linear, translation = self.split(g)
        inverted = self.linear.inverse(linear)
        return assemble(inverted, -matvec(inverted, translation))

    def relative(self, a: Tensor, b: Tensor) -> Tensor:
        linear_a, translation_a = self.split(a)
        linear_b, translation_b = self.split(b)
        inverted = self.linear.inverse(linear_a)
        return assemble(matmul(inverted, linear_b), matvec(inverted, translation_b - translation_a))

    def random(
        self,
        *batch: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        linear = self.linear.random(*batch, generator=generator, dtype=dtype, device=device)
        return assemble(linear, torch.randn(*batch, self.point_dim, generator=generator, dtype=dtype, device=device))

    def act(self, g: Tensor, points: Tensor) -> Tensor:
        linear, translation = self.split(g)
        return matvec(linear, points) + translation

    def project_tangent(self, g: Tensor, x: Tensor) -> Tensor:
        linear, _ = self.split(g)
        n = self.point_dim
        return without_last_row(self.linear.project_tangent(linear, x[..., :n, :n]), x[..., :n, n])

    def project(self, matrix: Tensor) -> Tensor:
        """The nearest linear part, with the translation as it is: [..., m, m], detached."""
        linear, translation = self.split(require_finite(self, matrix))
        return assemble(self.linear.project(linear), translation)

    def _deviation(self, g: Tensor) -> tuple[Tensor, str]:
        linear, translation = self.split(g)
        deviation, rule = self.linear._deviation(linear)
        last = g[..., -1, :] - eye_like(g)[-1]
        last_row = last.abs().amax(-1) / (1 + translation.norm(dim=-1))
        return torch.maximum(deviation, last_row), f"the last row is 0 ... 0 1 and of the linear part {rule}"


class Translation(Group):
    """The vectors R^n, as matrices [[I, t], [0, 1]]; one block, "translation"."""

    def __init__(self, n: int):
        if n < 1:
            raise ValueError(f"Translation(n) needs n >= 1, received {n}")
        super().__init__(f"Translation({n})", n, {"translation": translation_basis(n)})

    def exp(self, xi: Tensor) -> Tensor:
        self._require_tangent(xi)
        eye = torch.eye(self.point_dim, dtype=xi.dtype, device=xi.device)
        return assemble(eye.expand(*xi.shape[:-1], -1, -1), xi)

    def _log(self, g: Tensor, chart: str) -> Tensor:
        return g[..., :-1, -1]

    def in_chart(self, g: Tensor, *, chart: str = "principal") -> Tensor:
        """Whether the translation is finite: [..., m, m] -> bool [...]."""
        self._require_chart(chart)
        self._require_elements(g)
        return torch.isfinite(g.detach()).flatten(-2).all(-1)

    def _chart_rule(self, chart: str) -> str:
        return "of the group"

    def compose(self, a: Tensor, b: Tensor) -> Tensor:
        self._require_elements(a)
        self._require_elements(b)
        return self.exp(a[..., :-1, -1] + b[..., :-1, -1])

    def inverse(self, g: Tensor) -> Tensor:
        self._require_elements(g)
        return self.exp(-g[..., :-1, -1])

    def relative(self, a: Tensor, b: Tensor) -> Tensor:
        self._require_elements(a)
        self._require_elements(b)
        return self.exp(b[..., :-1, -1] - a[..., :-1, -1])

    def random(
        self,
        *batch: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        return self.exp(torch.randn(*batch, self.point_dim, generator=generator, dtype=dtype, device=device))

    def act(self, g: Tensor, points: Tensor) -> Tensor:
        self._require_elements(g)
        return points + g[..., :-1, -1]

    def project_tangent(self, g: Tensor, x: Tensor) -> Tensor:
        self._require_elements(g)
        return without_last_row(torch.zeros_like(x[..., :-1, :-1]), x[..., :-1, -1])

    def project(self, matrix: Tensor) -> Tensor:
        """The translation of the matrix: [..., m, m], detached."""
        self._require_elements(matrix)
        return self.exp(require_finite(self, matrix)[..., :-1, -1])

    def _deviation(self, g: Tensor) -> tuple[Tensor, str]:
        rest = torch.cat([g[..., :-1], g[..., -1:, -1:].expand(*g.shape[:-1], 1)], -1) - eye_like(g)
        scale = 1 + g[..., :-1, -1].norm(dim=-1)
        deviation = torch.maximum(
            rest[..., :-1, :-1].abs().flatten(-2).amax(-1), rest[..., -1, :].abs().amax(-1) / scale
        )
        return deviation, "the linear part is the identity and the last row is 0 ... 0 1"


def translation_basis(n: int) -> np.ndarray:
    """Unit matrices of the last column: [n, n + 1, n + 1]."""
    basis = np.zeros((n, n + 1, n + 1))
    basis[range(n), range(n), n] = 1
    return basis


def without_last_row(linear: Tensor, translation: Tensor) -> Tensor:
    """[[A, t], [0, 0]]: [..., n, n] and [..., n] -> [..., n + 1, n + 1]."""
    return torch.nn.functional.pad(torch.cat([linear, translation[..., None]], -1), (0, 0, 0, 1))


def assemble(linear: Tensor, translation: Tensor) -> Tensor:
    """[[A, t], [0, 1]]: [..., n, n] and [..., n] -> [..., n + 1, n + 1]."""
    batch = torch.broadcast_shapes(linear.shape[:-2], translation.shape[:-1])
    n = linear.shape[-1]
    top = torch.cat([linear.expand(*batch, n, n), translation[..., None].expand(*batch, n, 1)], -1)
    bottom = torch.zeros_like(top[..., :1, :])
    bottom[..., -1] = 1
    return torch.cat([top, bottom], -2)
