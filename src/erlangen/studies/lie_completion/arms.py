"""The arms: the formula, attention in closed form and with a learned kernel, and the vectors.

Shape suffixes: B sequences, N given elements, T missing elements, H heads, G dimension of the algebra, K its blocks, m
size of the group's matrices (written twice).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from erlangen import lie

from .._jobs import Tick
from .._training import VectorBlock, fit, seeded

ARMS = ("formula", "closed form", "learned kernel", "vectors")
LEARNED = ARMS[1:]
NUM_HEADS, HIDDEN = 4, 32


def formula(group: lie.Group, given: Tensor) -> Tensor:
    """The missing element without learning: the midpoint of the pair with the clearest hole, [B, N, m, m] -> [B, m, m].

    A pair scores (d(g_i exp(½ w)) − min(d(g_i exp(−½ w)), d(g_i exp(3⁄2 w)))) / (½ ‖w‖), where w = log(g_i⁻¹ g_j) and
    d is the distance ‖log‖ to the nearest given element. On a sequence with equal steps the two neighbours of the gap,
    and no other pair, score 1.
    """
    num = given.shape[1]
    first, second = torch.triu_indices(num, num, 1)
    start = given[:, first]
    between = group.relative(start, given[:, second])
    inside = group.in_chart(between)
    identity = group.identity(dtype=given.dtype)
    w = group.log(torch.where(inside[..., None, None], between, identity), check=False)

    def distance(fraction: float) -> tuple[Tensor, Tensor]:
        at = group.compose(start, group.exp(fraction * w))
        relative = group.relative(at[:, :, None], given[:, None])
        near = group.in_chart(relative)
        relative = torch.where(near[..., None, None], relative, identity)
        lengths = group.log_block_norms(relative, check=False).sum(-1).sqrt()
        return at, torch.where(near, lengths, math.inf).amin(-1)

    middle, hole = distance(0.5)
    onward = torch.minimum(distance(-0.5)[1], distance(1.5)[1])
    half = 0.5 * group.block_norms(w).sum(-1).sqrt()
    score = torch.where(inside & (half > 0), (hole - onward) / half.clamp(min=1e-30), -math.inf)
    return middle[torch.arange(len(given)), score.nan_to_num(nan=-math.inf).argmax(-1)]


class ClosedFormScore(nn.Module):
    """Scores −Σ_b λ_hb ‖w_b‖² / τ_h, those of `lie.lie_scores`."""

    def __init__(self, group: lie.Group, num_heads: int) -> None:
        super().__init__()
        self.log_block_weights = nn.Parameter(torch.zeros(num_heads, len(group.blocks)))
        self.log_temperature = nn.Parameter(torch.linspace(math.log(0.05), math.log(5.0), num_heads))

    def forward(self, w_BNNG: Tensor, norms_BNNK: Tensor) -> Tensor:
        """Scores [B, H, N, N] of tangent vectors w_ij and their squared block norms."""
        scale_HK = (self.log_block_weights - self.log_temperature[:, None]).exp()
        return -(norms_BNNK @ scale_HK.mT).movedim(-1, 1)


class LearnedKernel(nn.Module):
    """Scores by a perceptron G -> 32 -> 1 of each head."""

    def __init__(self, group: lie.Group, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, group.dim, HIDDEN).uniform_(-1, 1) * group.dim**-0.5)
        self.bias = nn.Parameter(torch.empty(num_heads, 1, HIDDEN).uniform_(-1, 1) * group.dim**-0.5)
        self.output = nn.Parameter(torch.empty(num_heads, HIDDEN, 1).uniform_(-1, 1) * HIDDEN**-0.5)
        self.output_bias = nn.Parameter(torch.zeros(num_heads, 1, 1))

    def forward(self, w_BNNG: Tensor, norms_BNNK: Tensor) -> Tensor:
        """Scores [B, H, N, N] of tangent vectors w_ij; the norms are not used."""
        hidden_HPF = (w_BNNG.flatten(0, 2) @ self.weight + self.bias).relu()
        score_HP1 = hidden_HPF @ self.output + self.output_bias
        return score_HP1.reshape(-1, *w_BNNG.shape[:3]).movedim(0, 1)


class InvariantCompletion(nn.Module):
    """One layer of attention over tangent vectors, and the shared equivariant read-out."""

    def __init__(self, group: lie.Group, kernel: str) -> None:
        super().__init__()
        self.group = group
        self.score = (ClosedFormScore if kernel == "closed form" else LearnedKernel)(group, NUM_HEADS)
        self.mean = nn.Linear(NUM_HEADS * group.dim, group.dim, bias=False)
        self.readout = nn.Sequential(
            nn.Linear(NUM_HEADS * (group.dim + len(group.blocks)), 64), nn.GELU(), nn.Linear(64, group.dim + 1)
        )

    def propose(self, seen_BNNF: Tensor) -> tuple[Tensor, Tensor]:
        """Proposed motions of each token in its own frame [B, N, G], and confidences [B, N], of what `look` gives."""
        w_BNNG, norms_BNNK = seen_BNNF.split([self.group.dim, len(self.group.blocks)], -1)
        weights_BHNN = self.score(w_BNNG, norms_BNNK).softmax(-1)
        mean_BNHF = weights_BHNN.transpose(1, 2) @ seen_BNNF
        u = mean_BNHF[..., : self.group.dim].flatten(2)
        out = self.readout(mean_BNHF.flatten(2))
        return self.mean(u) + out[..., :-1], out[..., -1]

    def forward(self, seen_BNNF: Tensor, targets_BNTG: Tensor) -> Tensor:
        """The loss of the protocol, in the algebra; targets are the missing elements as each token sees them."""
        xi_BNG, confidence_BN = self.propose(seen_BNNF)
        error_BNT = (self.group.block_norms(xi_BNG[:, :, None] - targets_BNTG).sum(-1) + 1e-8).sqrt()
        return expected_error(error_BNT, confidence_BN)

    @torch.no_grad()
    def complete(self, given: Tensor) -> Tensor:
        """The answer, [B, N, m, m] -> [B, m, m]."""
        xi_BNG, confidence_BN = self.propose(look(self.group, given))
        surest, rows = confidence_BN.argmax(-1), torch.arange(len(given))
        return self.group.compose(given[rows, surest], self.group.exp(xi_BNG[rows, surest]))


class VectorCompletion(nn.Module):
    """A transformer on flattened matrices; each token proposes its own matrix plus a correction."""

    def __init__(self, group: lie.Group) -> None:
        super().__init__()
        self.group = group
        size = group.matrix_size**2
        self.input = nn.Linear(size, HIDDEN)
        self.layers = nn.ModuleList(VectorBlock(HIDDEN, NUM_HEADS) for _ in range(2))
        self.output = nn.Linear(HIDDEN, size + 1)

    def propose(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Proposed matrices [B, N, m, m], and confidences [B, N]."""
        hidden = self.input(given.flatten(2))
        for layer in self.layers:
            hidden = layer(hidden)
        out = self.output(hidden)
        return given + out[..., :-1].unflatten(-1, given.shape[-2:]), out[..., -1]

    def forward(self, given: Tensor, missing: Tensor, inverse: Tensor) -> Tensor:
        """The loss of the protocol, ‖g*⁻¹ ĝ − 1‖_F; ``inverse`` is of the missing elements."""
        proposals, confidence_BN = self.propose(given)
        difference = inverse[:, None] @ (proposals[:, :, None] - missing[:, None])
        return expected_error((difference.square().sum((-2, -1)) + 1e-8).sqrt(), confidence_BN)

    @torch.no_grad()
    def complete(self, given: Tensor) -> Tensor:
        """The answer, [B, N, m, m] -> [B, m, m]; of an affine group perhaps with a linear part that is no element."""
        proposals, confidence_BN = self.propose(given)
        return to_group(self.group, proposals[torch.arange(len(given)), confidence_BN.argmax(-1)])


def look(group: lie.Group, given: Tensor, at: Tensor | None = None) -> Tensor:
    """What each element sees of the others, or of ``at``: log(g_i⁻¹ g_j) and its squared block norms, [B, N, M, G + K].

    Zero outside the principal chart. It does not change when one h moves all elements.
    """
    relative = group.relative(given[:, :, None], (given if at is None else at)[:, None])
    inside = group.in_chart(relative)[..., None]
    w = group.log(torch.where(inside[..., None], relative, group.identity(dtype=given.dtype)), check=False)
    return torch.cat([w, group.block_norms(w)], -1)


def to_group(group: lie.Group, matrix: Tensor) -> Tensor:
    """The nearest element; for groups of general linear maps only the last row is put right.

    Those are open in the matrices: nearly all matrices are elements or, of negative determinant, have no nearest one.
    """
    if "shear" not in group.blocks:
        return group.project(matrix)
    matrix = matrix.clone()
    matrix[..., -1, :] = torch.eye(group.matrix_size, dtype=matrix.dtype)[-1]
    return matrix


def expected_error(error_BNT: Tensor, confidence_BN: Tensor) -> Tensor:
    """Σ_i β_i min_t error_it, mean over the batch."""
    return (confidence_BN.softmax(-1) * error_BNT.amin(-1)).sum(-1).mean()


def build(group: lie.Group, arm: str) -> InvariantCompletion | VectorCompletion:
    """A learned arm, with fresh weights from torch's global generator."""
    return VectorCompletion(group) if arm == "vectors" else InvariantCompletion(group, arm)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of the scores (of the vectors: query and key projections), and of the whole."""
    score = sum(p.numel() for name, p in model.named_parameters() if name.startswith("score") or "query_key" in name)
    return {"score_parameters": score, "parameters": sum(p.numel() for p in model.parameters())}


def train(
    group: lie.Group,
    arm: str,
    given: Tensor,
    missing: Tensor,
    *,
    seeds: Sequence[int],
    steps: int,
    batch_size: int,
    lr: float,
    tick: Tick | None = None,
) -> list[Any]:
    """Train one arm once a seed, on float64 sequences near the identity, in float32.

    Args:
        group: the group.
        arm: one of `LEARNED`.
        given, missing: from `random_task`.
        seeds: each of initial weights, order and places.
        steps, batch_size, lr: of Adam.
        tick: called after each step.

    Raises:
        KeyboardInterrupt: ``tick`` said to stop.
    """
    models = [seeded(seed, lambda: build(group, arm)) for seed in seeds]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if arm != "vectors":
        seen, targets = look(group, given).float(), look(group, given, missing)[..., : group.dim].float()
    else:
        inverse = group.inverse(missing).float()
    given, missing = given.float(), missing.float()

    def draw(index: int) -> tuple[Tensor, ...]:
        generator = generators[index]
        rows = torch.randint(len(given), (batch_size,), generator=generator)
        if arm != "vectors":
            return seen[rows], targets[rows]
        place = group.random(batch_size, generator=generator, dtype=torch.float32)[:, None]
        return place @ given[rows], place @ missing[rows], inverse[rows] @ group.inverse(place)

    fit(models, draw, steps=steps, lr=lr, tick=tick)
    return models
