"""The whole contract of a matrix Lie group.

Groups are stateless objects. Elements are matrices ``[..., m, m]``, tangent vectors (coordinates in the Lie algebra)
are ``[..., dim]``, points are ``[..., n]``; ``...`` is any batch shape, and batch shapes broadcast. Everything is
float32 or float64 and differentiable, twice, with respect to the entries of the matrices.

**Tangent order, the same for all groups: scale, rotation, shear, translation**, whichever of them the group has; so the
rotation comes first in SE(2) and SE(3), as in SciPy's ``RigidTransform`` and unlike g2o. The basis is orthogonal in the
Frobenius product of ``hat``: scale is the identity matrix (squared norm n), each rotation and shear matrix has squared
norm 2, each translation 1. An angle is in radians, a scale is a natural logarithm.

Charts: ``"principal"`` is the principal logarithm. Groups of general linear maps also have ``"polar"``, see ``GL``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from ._matrix import matmul


class Group(ABC):
    """A matrix Lie group; printed by its name, equal to another if the names are.

    Attributes:
        name: as printed, such as ``"SE2"``; :func:`erlangen.lie.parse` reads it back.
        dim: number of coordinates of a tangent vector.
        matrix_size: m, of the matrices [m, m].
        point_dim: n, of the points the group acts on.
        blocks: name of each block of the algebra -> indices into a tangent vector, in order.
        charts: the charts that ``log`` knows.
    """

    charts: tuple[str, ...] = ("principal",)

    def __init__(self, name: str, point_dim: int, blocks: Mapping[str, np.ndarray]):
        """``blocks`` gives the basis of the algebra: name -> [size of block, m, m], with equal norms in a block."""
        self.name = name
        self.point_dim = point_dim
        self._basis = np.concatenate(list(blocks.values()))
        self.dim, self.matrix_size = self._basis.shape[:2]
        self._slices: dict[str, slice] = {}
        self._block_scales: list[float] = []
        start = 0
        for block, basis in blocks.items():
            self._slices[block] = slice(start, start + len(basis))
            self._block_scales.append(float(np.square(basis[0]).sum()))
            start += len(basis)
        self.blocks: Mapping[str, tuple[int, ...]] = MappingProxyType(
            {block: tuple(range(part.start, part.stop)) for block, part in self._slices.items()}
        )

    def __repr__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Group) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __reduce__(self) -> tuple:
        from .groups import parse

        return parse, (self.name,)

    # --- the algebra ------------------------------------------------------------------------------------------------

    def hat(self, xi: Tensor) -> Tensor:
        """The matrix of a tangent vector: [..., dim] -> [..., m, m]."""
        self._require_tangent(xi)
        return (xi[..., None, None] * torch.as_tensor(self._basis, dtype=xi.dtype, device=xi.device)).sum(-3)

    def vee(self, x: Tensor) -> Tensor:
        """The inverse of ``hat``: [..., m, m] -> [..., dim]; off the algebra, of the nearest matrix on it."""
        self._require_shape(x)
        dual = self._basis / np.square(self._basis).sum((1, 2), keepdims=True)
        return (x[..., None, :, :] * torch.as_tensor(dual, dtype=x.dtype, device=x.device)).sum((-2, -1))

    def block_norms(self, xi: Tensor) -> Tensor:
        """Squared Frobenius norm of each block of ``hat(xi)``: [..., dim] -> [..., number of blocks]."""
        self._require_tangent(xi)
        parts = [
            scale * xi[..., part].square().sum(-1) for scale, part in zip(self._block_scales, self._slices.values())
        ]
        return torch.stack(parts, -1)

    # --- exponential and charts -------------------------------------------------------------------------------------

    @abstractmethod
    def exp(self, xi: Tensor) -> Tensor:
        """The exponential of ``hat(xi)``: [..., dim] -> [..., m, m]."""

    @abstractmethod
    def in_chart(self, g: Tensor, *, chart: str = "principal") -> Tensor:
        """Whether ``log`` is defined at each element: [..., m, m] -> bool [...]. Non-finite elements are outside.

        Rotations are inside up to and including half a turn, where ``log`` gives one of its two values.
        """

    def log(self, g: Tensor, *, chart: str = "principal", check: bool = True) -> Tensor:
        """Coordinates of an element: [..., m, m] -> [..., dim].

        Args:
            g: elements of the group. Membership is not verified: see ``check`` and ``project``.
            chart: ``"principal"``, so that ``exp(log(g)) = g``, or ``"polar"`` where the group has it.
            check: verify that all elements are in the chart, which waits for the device. Without it the result at an
                element outside is unspecified.

        Raises:
            ValueError: a wrong shape, an unknown chart, or elements outside the chart.
        """
        self._require_chart(chart)
        self._require_elements(g)
        if check:
            inside = self.in_chart(g, chart=chart)
            if not bool(inside.all()):
                raise ValueError(
                    f"{self}.log: {int((~inside).sum())} of {inside.numel()} elements are outside the {chart} chart, "
                    f"which holds the finite matrices {self._chart_rule(chart)}; leave them out with in_chart"
                    + (', or use chart="polar"' if chart != "polar" and "polar" in self.charts else "")
                )
        return self._log(g, chart)

    def log_block_norms(self, g: Tensor, *, chart: str = "principal", check: bool = True) -> Tensor:
        """``block_norms(log(g))``: [..., m, m] -> [..., number of blocks].

        Continuous at half a turn, where ``log`` jumps from one value to its negative: each formula behind ``log`` is
        even in the rotation, up to that sign. Smooth at the identity. Arguments and errors are those of ``log``.
        """
        return self.block_norms(self.log(g, chart=chart, check=check))

    @abstractmethod
    def _log(self, g: Tensor, chart: str) -> Tensor:
        """``log`` without validation."""

    @abstractmethod
    def _chart_rule(self, chart: str) -> str:
        """What an element of the chart is, to end the sentence 'the finite matrices ...'."""

    # --- the group --------------------------------------------------------------------------------------------------

    def compose(self, a: Tensor, b: Tensor) -> Tensor:
        """The product a b: [..., m, m] each. Exact to float32 whatever the precision set for matrix products."""
        self._require_elements(a)
        self._require_elements(b)
        return matmul(a, b)

    @abstractmethod
    def inverse(self, g: Tensor) -> Tensor:
        """The inverse, by the group's own formula: [..., m, m] -> [..., m, m]."""

    def relative(self, a: Tensor, b: Tensor) -> Tensor:
        """``inverse(a) b``: [..., m, m] each.

        Translations are subtracted before anything else, so that two poses a metre apart keep full relative accuracy a
        thousand kilometres from the origin.
        """
        return self.compose(self.inverse(a), b)

    def identity(
        self, *batch: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """The identity, repeated: [*batch, m, m], in the default dtype unless another is given."""
        return torch.eye(self.matrix_size, dtype=dtype, device=device).repeat(*batch, 1, 1)

    @abstractmethod
    def random(
        self,
        *batch: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Random elements inside the principal chart: [*batch, m, m].

        Rotations are uniform. Translations and logarithms of scales are normal, with standard deviations 1 and 1/2.
        Elements of GL are exponentials of normal tangent vectors of standard deviation 1/2, shortened to Frobenius norm
        3 where they are longer, so that ``log`` gives the vector back.
        """

    def adjoint(self, g: Tensor) -> Tensor:
        """The matrix [..., dim, dim] with ``adjoint(g) @ xi = vee(g hat(xi) inverse(g))``."""
        basis = torch.as_tensor(self._basis, dtype=g.dtype, device=g.device)
        moved = matmul(matmul(g[..., None, :, :], basis), self.inverse(g)[..., None, :, :])
        return self.vee(moved).mT

    @abstractmethod
    def act(self, g: Tensor, points: Tensor) -> Tensor:
        """Move points: [..., m, m] and [..., n] -> [..., n]. For a cloud [..., P, n] give ``g[..., None, :, :]``."""

    # --- validation -------------------------------------------------------------------------------------------------

    @abstractmethod
    def project(self, matrix: Tensor) -> Tensor:
        """The nearest element (in the Frobenius norm of the linear part): [..., m, m] -> [..., m, m], detached.

        Raises:
            ValueError: a wrong shape, a non-finite entry, or a matrix without a nearest element.
        """

    @abstractmethod
    def project_tangent(self, g: Tensor, x: Tensor) -> Tensor:
        """The matrix nearest to x (in the Frobenius norm) among those tangent to the group at g: [..., m, m] each.

        It is g hat(ξ) for some ξ. Of a gradient with respect to the entries of g, what it removes depends on how a
        function happens to be continued to matrices off the group.
        """

    def check(self, g: Tensor) -> None:
        """Raise unless each matrix is an element of the group, up to ``8 sqrt(eps)`` of its dtype (relative).

        The tolerance, 3e-3 in float32 and 1.2e-7 in float64, leaves room for the drift of thousands of products. It is
        relative to the scale of the linear part and, in the last row, to the length of the translation.

        Raises:
            ValueError: a wrong shape or dtype, a non-finite entry, a singular matrix, or one off the group.
        """
        self._require_elements(g)
        if not bool(torch.isfinite(g).all()):
            raise ValueError(f"{self}: {int((~torch.isfinite(g)).sum())} entries of {tuple(g.shape)} are not finite")
        g = g.detach()
        deviation, rule = self._deviation(g)
        tolerance = 8 * torch.finfo(g.dtype).eps ** 0.5
        if deviation.numel() and not bool((deviation <= tolerance).all()):
            raise ValueError(
                f"{self}: {int((~(deviation <= tolerance)).sum())} of {deviation.numel()} matrices are off the group: "
                f"{rule}, up to {tolerance:.1e}, received a deviation of {float(deviation.max()):.1e}; call project"
            )

    @abstractmethod
    def _deviation(self, g: Tensor) -> tuple[Tensor, str]:
        """How far each matrix is off the group, relative to its own size: [...], inf if singular; and the rule."""

    def _require_shape(self, g: Tensor) -> None:
        m = self.matrix_size
        if g.shape[-2:] != (m, m):
            raise ValueError(f"{self}: matrices are [..., {m}, {m}], received {list(g.shape)}")

    def _require_elements(self, g: Tensor) -> None:
        self._require_shape(g)
        if g.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{self}: elements are float32 or float64, received {g.dtype}; cast them first")

    def _require_tangent(self, xi: Tensor) -> None:
        if xi.shape[-1:] != (self.dim,):
            raise ValueError(f"{self}: tangent vectors are [..., {self.dim}], received {list(xi.shape)}")

    def _require_chart(self, chart: str) -> None:
        if chart not in self.charts:
            raise ValueError(f"{self} has the charts {', '.join(map(repr, self.charts))}, received {chart!r}")


def outside_message(
    count: int, total: int, group: Group, chart: str, advice: str = 'outside="mask" to leave them out'
) -> str:
    """What to tell somebody whose relative poses are outside the chart."""
    if chart != "polar" and "polar" in group.charts:
        advice = f'chart="polar" or {advice}'
    return f"relative poses must lie in the {chart} chart of {group}, {count} of {total} pairs do not: use {advice}"
