"""Sequences of group elements with some taken out, and how far an answer is from what is missing.

Shape suffixes: B sequences, N given elements, T missing elements, G dimension of the algebra, m size of the group's
matrices (written twice).
"""

import torch
from torch import Tensor

from erlangen import lie

TASKS = ("sequence", "mixture")
GROUPS = ("SE2", "SO3", "Aff2", "SE3", "Aff3")
LENGTH, MIXTURE_LENGTH = 9, 7
CEILING = 10.0
TEST_SEED = 10_000


def unit_tangents(group: lie.Group, count: int, generator: torch.Generator) -> Tensor:
    """Random directions of the algebra, ‖hat(ξ)‖_F = 1: float64 [count, G]."""
    xi = torch.randn(count, group.dim, generator=generator, dtype=torch.float64)
    return xi / group.block_norms(xi).sum(-1, keepdim=True).sqrt()


def random_sequences(
    group: lie.Group, count: int, length: int, generator: torch.Generator, *, variation: float = 0.0
) -> Tensor:
    """Elements exp(t_k ξ) on one-parameter curves, t = 0 in the middle: float64 [count, length, m, m].

    Args:
        group: the group.
        count: curves.
        length: elements of each.
        generator: of the draws.
        variation: steps of t are 1 ± up to this.
    """
    size = 0.2 + 0.2 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    xi = size * unit_tangents(group, count, generator)
    step = 1 + variation * (2 * torch.rand(count, length, generator=generator, dtype=torch.float64) - 1)
    time_BN = step.cumsum(-1)
    time_BN = time_BN - time_BN[:, length // 2, None]
    return group.exp(time_BN[..., None] * xi[:, None])


def random_task(group: lie.Group, task: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences near the identity, with elements missing: given [B, N, m, m] and missing [B, T, m, m], float64.

    All relative poses are inside the principal chart: other sequences are drawn again.
    """
    given, missing, kept = [], [], 0
    while kept < count:
        draw = _sequence_task if task == "sequence" else _mixture_task
        given_BNmm, missing_BTmm = draw(group, count, generator)
        inside = group.in_chart(group.relative(given_BNmm[:, :, None], given_BNmm[:, None])).flatten(1).all(1)
        inside &= group.in_chart(group.relative(given_BNmm[:, :, None], missing_BTmm[:, None])).flatten(1).all(1)
        given.append(given_BNmm[inside])
        missing.append(missing_BTmm[inside])
        kept += int(inside.sum())
    given_BNmm = torch.cat(given)[:count]
    order = torch.rand(given_BNmm.shape[:2], generator=generator).argsort(-1)
    return given_BNmm[torch.arange(count)[:, None], order], torch.cat(missing)[:count]


def _remove(sequences: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Take interior elements out of each sequence: what stays, and what is missing."""
    batch, length = sequences.shape[:2]
    interior = 1 + torch.rand(batch, length - 2, generator=generator).argsort(-1)[:, :count]
    taken = torch.zeros(batch, length, dtype=torch.bool).scatter(1, interior, True)
    matrix = sequences.shape[-2:]
    return sequences[~taken].reshape(batch, length - count, *matrix), sequences[taken].reshape(batch, count, *matrix)


def _sequence_task(group: lie.Group, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return _remove(random_sequences(group, count, LENGTH, generator), 1, generator)


def _mixture_task(group: lie.Group, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def near(number: int) -> Tensor:
        xi = torch.randn(count, number, group.dim, generator=generator, dtype=torch.float64)
        return group.exp((0.5 * xi).clamp(-1, 1))

    first = random_sequences(group, count, MIXTURE_LENGTH, generator, variation=0.3)
    second = random_sequences(group, count, MIXTURE_LENGTH, generator, variation=0.3)
    given_first, missing_first = _remove(first, 1, generator)
    given_second, missing_second = _remove(group.compose(near(1), second), 1, generator)
    given = torch.cat([given_first, given_second, near(2)], 1)
    noise = 0.02 * torch.randn(*given.shape[:2], group.dim, generator=generator, dtype=torch.float64)
    return group.compose(given, group.exp(noise)), torch.cat([missing_first, missing_second], 1)


def test_set(group: lie.Group, task: str, size: int) -> tuple[Tensor, Tensor]:
    """The test sequences, each somewhere in the group: given [size, N, m, m] and missing [size, T, m, m], float64."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    given, missing = random_task(group, task, size, generator)
    place = group.random(size, generator=generator, dtype=torch.float64)[:, None]
    return group.compose(place, given), group.compose(place, missing)


def completion_error(group: lie.Group, answer: Tensor, missing: Tensor) -> Tensor:
    """‖log(ĝ⁻¹ g*)‖ to the nearest missing element, cut at 10: [B, m, m] and [B, T, m, m] -> [B].

    Outside the chart of the logarithm, where there is none, it is 10.
    """
    relative = group.relative(missing, answer[:, None])
    inside = group.in_chart(relative)
    relative = torch.where(inside[..., None, None], relative, torch.eye(group.matrix_size, dtype=relative.dtype))
    error = group.log_block_norms(relative, check=False).sum(-1).clamp(min=0).sqrt()
    return torch.where(inside, error.clamp(max=CEILING), CEILING).amin(-1)
