"""What the studies on Lie groups train with: seeds side by side, and the block of the vectors' transformer."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._jobs import Tick


def seeded(seed: int, make: Callable[[], Any]) -> Any:
    """What ``make`` gives with torch's global generator at the seed; it is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def fit(
    models: Sequence[nn.Module],
    draw: Callable[[int], tuple[Tensor, ...]],
    *,
    steps: int,
    lr: float,
    tick: Tick | None = None,
) -> None:
    """Train models of one shape side by side, in place: Adam, 5 % warm-up, cosine schedule to zero.

    Each takes the steps that it would take alone; together they cost little more than one.

    Args:
        models: their ``forward`` gives the loss of a batch.
        draw: the index of a model -> its next batch.
        steps, lr: of Adam.
        tick: called after each step.

    Raises:
        KeyboardInterrupt: ``tick`` said to stop before the last step.
    """
    parameters, buffers = torch.func.stack_module_state(list(models))

    def loss(weights: dict[str, Tensor], *batch: Tensor) -> Tensor:
        return torch.func.functional_call(models[0], (weights, buffers), batch)

    losses = torch.func.vmap(loss)
    optimizer = torch.optim.Adam(list(parameters.values()), lr=lr, fused=True)
    warmup = max(1, steps // 20)
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / warmup) * decay
        batch = [torch.stack(parts) for parts in zip(*(draw(index) for index in range(len(models))))]
        optimizer.zero_grad()
        losses(parameters, *batch).sum().backward()
        optimizer.step()
        if tick is not None and tick(step + 1) and step + 1 < steps:
            raise KeyboardInterrupt
    for index, model in enumerate(models):
        model.load_state_dict({name: value[index].detach() for name, value in parameters.items()}, strict=False)
        model.eval()


class VectorBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key = nn.Linear(dim, 2 * dim)
        self.value, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Features [B, N, C] after the block."""
        normed = self.attention_norm(x_BNC)
        projected = torch.cat([self.query_key(normed), self.value(normed)], -1)
        query, key, value = projected.unflatten(-1, (3, self.num_heads, -1)).movedim(2, 0).transpose(-3, -2)
        weights_BHNN = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        x_BNC = x_BNC + self.output((weights_BHNN @ value).transpose(1, 2).flatten(2))
        return x_BNC + self.mlp(self.mlp_norm(x_BNC))
