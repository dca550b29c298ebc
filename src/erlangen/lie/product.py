"""Direct products, as block-diagonal matrices."""

import numpy as np
import torch
from torch import Tensor

from ._base import Group
from .linear import require_finite


class Product(Group):
    """The direct product of groups, which act side by side: ``Product(a, b)`` prints as ``"a x b"``.

    Matrices are block-diagonal, tangent vectors and points are joined in order. The blocks are named by the position
    of their factor, ``"0.rotation"``, ``"1.translation"``. A product among the factors is opened, so that products are
    associative. It has the polar chart if a factor has it, the other factors then keep their principal one.
    """

    def __init__(self, *factors: Group):
        if len(factors) < 2:
            raise ValueError(f"Product needs two groups or more, received {len(factors)}")
        opened = [part for group in factors for part in (group.factors if isinstance(group, Product) else (group,))]
        self.factors: tuple[Group, ...] = tuple(opened)
        total = sum(group.matrix_size for group in opened)
        blocks: dict[str, np.ndarray] = {}
        start = 0
        for k, group in enumerate(opened):
            end = start + group.matrix_size
            for block, part in group._slices.items():
                blocks[f"{k}.{block}"] = np.pad(group._basis[part], ((0, 0), *[(start, total - end)] * 2))
            start = end
        super().__init__(" x ".join(map(str, opened)), sum(group.point_dim for group in opened), blocks)
        if any("polar" in group.charts for group in opened):
            self.charts = ("principal", "polar")

    def split(self, g: Tensor) -> tuple[Tensor, ...]:
        """The element of each factor."""
        self._require_elements(g)
        parts, start = [], 0
        for group in self.factors:
            end = start + group.matrix_size
            parts.append(g[..., start:end, start:end])
            start = end
        return tuple(parts)

    def assemble(self, *parts: Tensor) -> Tensor:
        """The block-diagonal matrices of one element of each factor."""
        batch = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))
        rows, start = [], 0
        for part in parts:
            size = part.shape[-1]
            row = part.expand(*batch, size, size)
            rows.append(torch.nn.functional.pad(row, (start, self.matrix_size - start - size)))
            start += size
        return torch.cat(rows, -2)

    def _each_chart(self, chart: str) -> list[str]:
        return [chart if chart in group.charts else "principal" for group in self.factors]

    def exp(self, xi: Tensor) -> Tensor:
        self._require_tangent(xi)
        parts = xi.split([group.dim for group in self.factors], -1)
        return self.assemble(*(group.exp(part) for group, part in zip(self.factors, parts)))

    def _log(self, g: Tensor, chart: str) -> Tensor:
        charts = self._each_chart(chart)
        return torch.cat([group._log(part, c) for group, part, c in zip(self.factors, self.split(g), charts)], -1)

    def in_chart(self, g: Tensor, *, chart: str = "principal") -> Tensor:
        """Whether the element of each factor is in its chart and all else finite: [..., m, m] -> bool [...]."""
        self._require_chart(chart)
        charts = self._each_chart(chart)
        inside = [group.in_chart(part, chart=c) for group, part, c in zip(self.factors, self.split(g), charts)]
        return torch.stack([torch.isfinite(g.detach()).flatten(-2).all(-1), *inside]).all(0)

    def _chart_rule(self, chart: str) -> str:
        rules = (f"{group}: {group._chart_rule(c)}" for group, c in zip(self.factors, self._each_chart(chart)))
        return "of " + "; ".join(rules)

    def compose(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self.factors, self.split(a), self.split(b))
        return self.assemble(*(group.compose(x, y) for group, x, y in pairs))

    def inverse(self, g: Tensor) -> Tensor:
        return self.assemble(*(group.inverse(part) for group, part in zip(self.factors, self.split(g))))

    def relative(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self.factors, self.split(a), self.split(b))
        return self.assemble(*(group.relative(x, y) for group, x, y in pairs))

    def random(
        self,
        *batch: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        return self.assemble(
            *(group.random(*batch, generator=generator, dtype=dtype, device=device) for group in self.factors)
        )

    def act(self, g: Tensor, points: Tensor) -> Tensor:
        parts = points.split([group.point_dim for group in self.factors], -1)
        moved = [group.act(x, p) for group, x, p in zip(self.factors, self.split(g), parts)]
        return torch.cat(moved, -1)

    def project_tangent(self, g: Tensor, x: Tensor) -> Tensor:
        parts = zip(self.factors, self.split(g), self.split(x))
        return self.assemble(*(group.project_tangent(a, b) for group, a, b in parts))

    def project(self, matrix: Tensor) -> Tensor:
        """The nearest element of each factor to its diagonal block: [..., m, m], detached."""
        self._require_elements(matrix)
        matrix = require_finite(self, matrix)
        return self.assemble(*(group.project(part) for group, part in zip(self.factors, self.split(matrix))))

    def _deviation(self, g: Tensor) -> tuple[Tensor, str]:
        parts = self.split(g)
        each = [group._deviation(part) for group, part in zip(self.factors, parts)]
        between = (g - self.assemble(*parts)).abs().flatten(-2).amax(-1)
        scale = self.assemble(*parts).abs().flatten(-2).amax(-1)
        rules = "; ".join(f"{group}: {rule}" for group, (_, rule) in zip(self.factors, each))
        return torch.stack([between / scale, *(d for d, _ in each)]).amax(0), f"blocks off the diagonal are 0; {rules}"
