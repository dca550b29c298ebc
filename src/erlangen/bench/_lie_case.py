"""One case of the benchmark of Lie attention: its tensors, what is called, and the least it can cost.

Shape suffixes: B batch, H heads, N poses, D width of a value, K blocks of the algebra, m size of the group's matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from erlangen import lie

Pass = Literal["forward", "forward + backward"]
PASSES: tuple[Pass, ...] = ("forward", "forward + backward")

Variant = Literal["dense", "compiled-dense", "tiled", "compiled-tiled", "tiled-skipping", "triton"]
YARDSTICK = "sdpa"

GEOMETRY_FLOPS = {"SE2": 20, "SE3": 60}
"""Operations for the squared block norms of one relative pose, all heads together; other groups are not counted."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A variant at a size. Its inputs are a function of the other fields, the same for all variants."""

    variant: Variant | Literal["sdpa"]
    group: str
    size: int
    num_heads: int
    head_dim: int
    batch_size: int
    spacing: float
    skip: float
    dtype: str
    device: str
    threads: int

    def unable(self) -> str | None:
        """Why the variant cannot run here, known without trying; None if it may."""
        if self.variant == "triton" and self.device != "cuda":
            return f"it runs on CUDA only, this is {self.device}"
        return None

    def passes(self) -> dict[Pass, Callable[[], Any]]:
        """What is measured: the call under ``no_grad``, and the call with its gradients to all inputs."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, getattr(torch, self.dtype))

        shape = (self.batch_size, self.num_heads, self.size, self.head_dim)
        value, grad = normal(*shape), normal(*shape)
        if self.variant == YARDSTICK:
            leaves = [normal(*shape), normal(*shape), value]
            attend: Callable[..., Tensor] = scaled_dot_product_attention
        else:
            group = lie.parse(self.group)
            poses = self.poses(group).to(value)
            temperature = value.new_tensor([4.0 ** (h / max(1, self.num_heads - 1)) for h in range(self.num_heads)])
            leaves = [poses, value.new_ones(self.num_heads, len(group.blocks)), temperature, value]
            attend = self._attend(group)
        for leaf in leaves:
            leaf.requires_grad_()

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(*leaves)

        return {
            "forward": forward,
            "forward + backward": lambda: torch.autograd.grad(attend(*leaves), leaves, grad),
        }

    def _attend(self, group: lie.Group) -> Callable[..., Tensor]:
        options: dict[str, Any] = {
            "impl": "reference" if "dense" in self.variant else "triton" if self.variant == "triton" else "tiled"
        }
        if self.variant == "tiled-skipping":
            options["skip"] = self.skip

        def attend(poses: Tensor, block_weights: Tensor, temperature: Tensor, value: Tensor) -> Tensor:
            return lie.lie_attention(
                poses, poses, value, group=group, block_weights=block_weights, temperature=temperature, **options
            )

        return torch.compile(attend, fullgraph=True, dynamic=False) if self.variant.startswith("compiled") else attend

    def poses(self, group: lie.Group) -> Tensor:
        """[B, N, m, m] float64: translations uniform in a box of as many unit cells as poses, a cell ``spacing`` wide.

        Sorted along a space-filling curve, for whoever skips what is far away; the others do not mind.
        """
        generator = torch.Generator().manual_seed(1)
        poses = group.random(self.batch_size, self.size, generator=generator, dtype=torch.float64)
        if "translation" in group.blocks:
            axes = len(group.blocks["translation"])
            side = self.spacing * self.size ** (1 / axes)
            places = torch.rand(self.batch_size, self.size, axes, generator=generator, dtype=torch.float64)
            poses[..., :axes, -1] = side * places
            poses = poses.take_along_dim(lie.morton_order(poses, group)[..., None, None], 1)
        return poses


@dataclass(frozen=True)
class Cost:
    """The least that a pass has to do.

    Attributes:
        flops: additions and multiplications.
        exps: exponentials.
        traffic: bytes of the inputs and outputs, each moved once.
        memory: bytes that it has to hold beside its inputs: output, row sums and gradients.
    """

    flops: float
    exps: float
    traffic: float
    memory: float


def least_cost(case: Case, which: Pass) -> Cost:
    """What attention between poses costs at least, if nothing is skipped.

    The scores are symmetric, so geometry, scores and exponentials are counted for N (N + 1) / 2 pairs; the products
    with the values for N² of them. A pair takes ``GEOMETRY_FLOPS`` for all heads, and a head 2K flops and one
    exponential for its score, 2D for weights times values. The backward pass does all but that product again, has
    twice the products and twice the geometry, and 4K flops a pair and head between the two.
    """
    group = lie.parse(case.group)
    m, blocks = group.matrix_size, len(group.blocks)
    number = torch.finfo(getattr(torch, case.dtype)).bits // 8
    geometry = GEOMETRY_FLOPS.get(case.group, 0)
    pairs = case.batch_size * case.size * (case.size + 1) / 2
    products = 2 * case.head_dim * case.num_heads * case.batch_size * case.size**2
    scores = pairs * (geometry + 2 * blocks * case.num_heads)
    values = case.batch_size * case.num_heads * case.size * case.head_dim
    rows = case.batch_size * case.num_heads * case.size
    inputs = values + case.batch_size * case.size * m * m + case.num_heads * (blocks + 1)
    forward = Cost(scores + products, pairs * case.num_heads, number * (inputs + values), number * values)
    if which == "forward":
        return forward
    back = pairs * (2 * geometry + 4 * blocks * case.num_heads) + 2 * products
    return Cost(
        forward.flops + scores + back,
        2 * forward.exps,
        number * (3 * inputs + 3 * values),  # inputs twice, their gradients; the output out and in again, its gradient
        number * (values + rows + inputs),
    )


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second: flops of a matrix product, exponentials, and bytes copied (read + write)."""

    matmul: float
    exp: float
    copy: float

    def seconds(self, cost: Cost, device: str) -> float:
        """The least time for a cost. A CPU does flops and exponentials in the same units, so one after the other."""
        arithmetic = (cost.flops / self.matmul, cost.exps / self.exp)
        together = sum(arithmetic) if device == "cpu" else max(arithmetic)
        return max(together, cost.traffic / self.copy)


class Probes:
    """Calls whose times are those rates: a matrix product, exponentials of a tile, a copy of a large array."""

    repeats = 8

    def __init__(self, dtype: str, device: str) -> None:
        small = device == "cpu"
        self.side, self.tile, self.length = (1024, 1 << 17, 1 << 23) if small else (4096, 1 << 24, 1 << 26)

        def ones(*shape: int) -> Tensor:
            return torch.ones(*shape, dtype=getattr(torch, dtype), device=device)

        a, b, c = (ones(self.side, self.side) for _ in range(3))
        tile, exps = ones(self.tile), ones(self.tile)
        source, target = ones(self.length), ones(self.length)
        self.number = source.element_size()
        self.calls: dict[str, Callable[[], Any]] = {
            "matmul": lambda: torch.mm(a, b, out=c),
            "exp": lambda: [torch.exp(tile, out=exps) for _ in range(self.repeats)],  # of what stays in a cache
            "copy": lambda: target.copy_(source),
        }

    def rates(self, seconds: dict[str, float]) -> dict[str, float]:
        """Work a second of each call, from the seconds that it took."""
        work = {
            "matmul": 2 * self.side**3,
            "exp": self.repeats * self.tile,
            "copy": 2 * self.length * self.number,
        }
        return {name: work[name] / seconds[name] for name in work}
