"""Completing sequences of group elements: closed-form scores, a learned kernel on the same invariant, and vectors.

Protocol, fixed before the runs it reports:

- Groups: SE(2), SO(3), Aff(2), as in "Lie-Algebra Attention" (arXiv 2606.20547), and SE(3), Aff(3), which it left out.
- Task "sequence", the paper's: nine elements g_k = g_0 exp(k ξ), ‖ξ‖ uniform in [0.2, 0.4] (Frobenius norm of its
  matrix), direction uniform; one interior element is taken out and the rest is permuted. Find the missing one.
- Task "mixture", which no formula solves: two such sequences of seven with different ξ and starts, steps that vary by
  up to 30 %, noise of 0.02 a coordinate on every given element, an interior element missing in each, two random
  elements as distractors; all permuted. Find either of the missing ones.
- Arms. "formula": nothing learned; of all pairs it takes the one with the clearest hole half way and an element one
  step on, and answers with the midpoint g_i exp(½ w_ij). "closed form": attention with scores −‖w_ij‖²_λ / τ, λ and τ
  learned. "learned kernel": scores by a perceptron of 32 hidden units a head on w_ij = log(g_i⁻¹ g_j). "vectors": a
  transformer of two layers, width 32, on flattened matrices. The middle two share all else: four heads, one layer,
  token i proposes g_i exp(Σ_h C_h u_ih + f(u_i, s_i)) and says how sure it is, where u_ih = Σ_j α_ijh w_ij, s_i are
  averages of squared block norms with the same weights, and f is a perceptron of 64 hidden units. In the last arm token
  i proposes G_i + Δ_i. The answer is the proposal of the surest token, projected to the group where need be.
- Training: the same for all learned arms: 1024 sequences, Adam, 600 steps of 32, cosine schedule; loss
  Σ_i β_i min ‖log(ĝ_i⁻¹ g*)‖ over the missing elements, β the softmax of the confidences, to first order: the
  difference of tangent vectors at g_i for the middle two, ‖g*⁻¹ ĝ_i − 1‖_F for the vectors, whose proposals need not
  have a logarithm. Where a sequence lies in the group is drawn afresh on every step: the vectors need it, the others
  do not see it. One learning rate an arm, the best of three on the task "sequence" on SE(2), with 800
  steps and a seed the study does not use (`scan`).
- Measure: ‖log(ĝ⁻¹ g*)‖ to the nearest missing element on 128 fixed test sequences: their median, and their mean with
  errors cut at 10, which is also the error of an answer outside the group or the chart of its logarithm.
- Seeds 0 to 4; a seed sets initial weights, order and places; training and test sequences are the same for all. Rule:
  the mean over seeds of the paired difference of medians with its 95 % Student interval; a difference is called only
  where the interval leaves out zero.
- Beside it: parameters of the scores; how far an answer is from moving along when all elements are moved by h
  (‖(h out(g))⁻¹ out(h g) − 1‖_F, translations of 1000, scales of 100 and 1/100, in float32 and float64, 64 sequences);
  and the cocycle g_ik = g_ij g_jk, on the group and on logarithms.

Shape suffixes: B sequences, N given elements, T missing elements, H heads, G dimension of the algebra, K its blocks, m
size of the group's matrices (written twice).
"""

import importlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from erlangen import lie, report
from erlangen._extras import require

TASKS = ("sequence", "mixture")
GROUPS = ("SE2", "SO3", "Aff2", "SE3", "Aff3")
ARMS = ("formula", "closed form", "learned kernel", "vectors")
LEARNED = ARMS[1:]
LEARNING_RATES = {"closed form": 3e-2, "learned kernel": 3e-2, "vectors": 3e-3}
"""Learning rate of each learned arm, from benchmarks/results/lie_completion_learning_rates.csv."""
SCANNED = {"closed form": (3e-3, 1e-2, 3e-2), "learned kernel": (3e-3, 1e-2, 3e-2), "vectors": (1e-3, 3e-3, 1e-2)}
CEILING = 10.0
TRAIN_SEED, TEST_SEED, SCAN_SEED = 20_000, 10_000, 1000
LENGTH, MIXTURE_LENGTH = 9, 7
NUM_HEADS, HIDDEN = 4, 32

Progress = Callable[[int, int], None]
"""Called with the cells done and the cells there are."""


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """How much to run; the defaults are the protocol."""

    out: Path = Path("lie_completion")
    """Folder of the report. Finished cells found in its cells.jsonl are not run again."""
    csv: Path | None = None
    """Folder for copies of the tables, lie_completion_*.csv."""
    tasks: tuple[str, ...] = TASKS
    """Tasks: sequence, mixture."""
    groups: tuple[str, ...] = GROUPS
    """Groups, by name."""
    mixture_groups: tuple[str, ...] | None = None
    """Groups of the task mixture, which costs more; None for all of the groups."""
    seeds: int = 5
    """Seeds of each learned arm."""
    steps: int = 600
    """Steps of training."""
    batch_size: int = 32
    """Sequences a step."""
    train_size: int = 1024
    """Training sequences, the same for all arms and seeds."""
    test_size: int = 128
    """Test sequences of a task and group, the same for all seeds."""
    workers: int | None = None
    """Processes, each on one thread; None for one a core."""

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise ValueError(f"tasks must be of {', '.join(TASKS)}, received {', '.join(unknown)}")
        for group in (*self.groups, *(self.mixture_groups or ())):
            lie.parse(group)
        for name in ("seeds", "steps", "batch_size", "train_size", "test_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, received {getattr(self, name)}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, received {self.workers}")


def declared_cases(config: CompletionConfig) -> list[tuple[str, str]]:
    """The tasks and groups to run."""
    groups = {"sequence": config.groups, "mixture": config.mixture_groups or config.groups}
    return [(task, group) for task in config.tasks for group in groups[task]]


def quick(out: Path) -> CompletionConfig:
    """A size of seconds, to see that everything runs; its numbers say nothing."""
    return CompletionConfig(
        out=out, groups=("SE2", "SO3"), seeds=2, steps=8, batch_size=8, train_size=16, test_size=8, workers=1
    )


# The tasks


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


def completion_error(group: lie.Group, answer: Tensor, missing: Tensor) -> Tensor:
    """‖log(ĝ⁻¹ g*)‖ to the nearest missing element, cut at 10: [B, m, m] and [B, T, m, m] -> [B].

    Outside the chart of the logarithm, where there is none, it is 10.
    """
    relative = group.relative(missing, answer[:, None])
    inside = group.in_chart(relative)
    relative = torch.where(inside[..., None, None], relative, torch.eye(group.matrix_size, dtype=relative.dtype))
    error = group.log_block_norms(relative, check=False).sum(-1).clamp(min=0).sqrt()
    return torch.where(inside, error.clamp(max=CEILING), CEILING).amin(-1)


# The arms


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


def fit(models: Sequence[nn.Module], draw: Callable[[int], tuple[Tensor, ...]], *, steps: int, lr: float) -> None:
    """Train models of one shape side by side, in place: Adam, 5 % warm-up, cosine schedule to zero.

    Each takes the steps that it would take alone; together they cost little more than one.

    Args:
        models: their ``forward`` gives the loss of a batch.
        draw: the index of a model -> its next batch.
        steps, lr: of Adam.
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
    for index, model in enumerate(models):
        model.load_state_dict({name: value[index].detach() for name, value in parameters.items()}, strict=False)
        model.eval()


def seeded(seed: int, make: Callable[[], Any]) -> Any:
    """What ``make`` gives with torch's global generator at the seed; it is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


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
) -> list[Any]:
    """Train one arm once a seed, on float64 sequences near the identity, in float32.

    Args:
        group: the group.
        arm: one of `LEARNED`.
        given, missing: from `random_task`.
        seeds: each of initial weights, order and places.
        steps, batch_size, lr: of Adam.
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

    fit(models, draw, steps=steps, lr=lr)
    return models


# Invariance and the cocycle


def large_moves(group: lie.Group, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Large group elements by kind, float64 [count, m, m]."""
    base = group.random(count, generator=generator, dtype=torch.float64)
    moves = {"random": base}
    if "translation" in group.blocks:
        far = base.clone()
        direction = torch.randn(count, group.point_dim, generator=generator, dtype=torch.float64)
        far[:, :-1, -1] = 1e3 * direction / direction.norm(dim=-1, keepdim=True)
        moves["translation 1000"] = far
    if "scale" in group.blocks:
        for factor in (100.0, 0.01):
            scaled = base.clone()
            scaled[:, :-1, :-1] *= factor
            moves[f"scale {factor:g}"] = scaled
    return moves


def invariance_errors(
    group: lie.Group, complete: Callable[[Tensor], Tensor], given: Tensor, moves: Mapping[str, Tensor]
) -> dict[str, list[float]]:
    """‖(h out(g))⁻¹ out(h g) − 1‖_F by kind of move: median and largest; inf where there is no such number.

    Args:
        group: the group.
        complete: from given elements [B, N, m, m] to an answer [B, m, m].
        given: float32 or float64, which is the precision that is measured; the comparison is made in float64.
        moves: float64 [B, m, m] by kind.
    """
    still = complete(given).double()
    errors = {}
    for kind, h in moves.items():
        moved = complete((h[:, None] @ given.double()).to(given.dtype)).double()
        difference = torch.linalg.solve_ex(h @ still, moved).result - torch.eye(group.matrix_size, dtype=moved.dtype)
        size = difference.square().sum((-2, -1)).sqrt().nan_to_num(nan=math.inf)
        errors[kind] = [float(size.median()), float(size.max())]
    return errors


def cocycle(group: lie.Group, *, count: int = 256, seed: int = TEST_SEED) -> dict[str, Any]:
    """How far g_ik = g_ij g_jk holds on the group and on logarithms.

    Returns:
        ``group float32`` and ``group float64``: the largest relative error in the Frobenius norm; ``size``: ‖w‖ of the
        two factors; ``discrepancy``: median ‖w_ij + w_jk − w_ik‖ at each size; ``order``: its slope in the logarithms.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float64):
        a, b, c = group.random(3, count, generator=generator, dtype=dtype)
        whole, parts = group.relative(a, c), group.compose(group.relative(a, b), group.relative(b, c))
        error = (parts - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
        found[f"group {str(dtype).removeprefix('torch.')}"] = float(error.max())
    first, second = unit_tangents(group, count, generator), unit_tangents(group, count, generator)
    sizes = np.geomspace(1e-3, 0.1, 7)
    discrepancy = []
    for size in sizes:
        product = group.compose(group.exp(size * first), group.exp(size * second))
        gap = size * (first + second) - group.log(product)
        discrepancy.append(float(group.block_norms(gap).sum(-1).sqrt().median()))
    order = float(np.polyfit(np.log(sizes), np.log(discrepancy), 1)[0])
    return found | {"size": sizes.tolist(), "discrepancy": discrepancy, "order": order}


# Cells that are kept


class Cells:
    """Finished cells of a study, in JSON lines, with the settings they belong to in the first.

    Args:
        path: the file; made with its folder if it is not there. A line that was cut short is dropped.
        settings: what must agree for the cells to be of this study.

    Raises:
        ValueError: the file holds cells of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        expected = json.loads(json.dumps(settings))
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        if whole and whole[0] != expected:
            raise ValueError(f"{path} holds cells of other settings: remove it or choose another folder")
        self.records = {record["key"]: record for record in whole[1:]}
        aside = path.with_name(path.name + ".writing")
        aside.write_text("".join(json.dumps(line) + "\n" for line in [expected, *self.records.values()]))
        os.replace(aside, path)

    def add(self, record: Mapping[str, Any]) -> None:
        """Keep a record, by its ``key``."""
        self.records[record["key"]] = dict(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def execute(
    cells: Cells,
    jobs: Mapping[str, Sequence[Any]],
    *,
    workers: int | None,
    progress: Progress | None = None,
) -> None:
    """Run each job that is not among the cells, several at a time, each on one thread.

    Args:
        cells: what is there; what comes is added.
        jobs: name -> function and its arguments. It gives records, the last with the job's name as its key.
        workers: processes; 1 for this one, None for one a core.
        progress: called after each job.
    """
    todo = {name: job for name, job in jobs.items() if name not in cells.records}
    done = len(jobs) - len(todo)
    workers = min(workers or os.cpu_count() or 1, max(1, len(todo)))

    def keep(records: Iterable[Mapping[str, Any]]) -> None:
        nonlocal done
        for record in records:
            cells.add(record)
        done += 1
        if progress is not None:
            progress(done, len(jobs))

    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for work, *arguments in todo.values():
                keep(work(*arguments))
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        try:
            for future in as_completed([pool.submit(work, *arguments) for work, *arguments in todo.values()]):
                keep(future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


# Running


def _test_set(group: lie.Group, task: str, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(TEST_SEED)
    given, missing = random_task(group, task, size, generator)
    place = group.random(size, generator=generator, dtype=torch.float64)[:, None]
    return group.compose(place, given), group.compose(place, missing)


def _measure(
    group: lie.Group, complete: Callable[[Tensor], Tensor], given: Tensor, missing: Tensor
) -> dict[str, float | int]:
    error = completion_error(group, complete(given).double(), missing)
    return {"median": float(error.median()), "mean": float(error.mean()), "outside": int((error >= CEILING).sum())}


def _invariance(group: lie.Group, model: Any, given: Tensor) -> dict[str, dict[str, list[float]]]:
    moves = large_moves(group, len(given), torch.Generator().manual_seed(TEST_SEED + 1))
    found = {}
    for dtype in (torch.float32, torch.float64):
        complete: Callable[[Tensor], Tensor] = model
        if isinstance(model, (InvariantCompletion, VectorCompletion)):
            complete = model.to(dtype).complete
        found[str(dtype).removeprefix("torch.")] = invariance_errors(group, complete, given.to(dtype), moves)
    return found


def _learned_cells(config: CompletionConfig, task: str, name: str, arm: str) -> list[dict[str, Any]]:
    """All seeds of one learned arm."""
    group = lie.parse(name)
    given, missing = random_task(group, task, config.train_size, torch.Generator().manual_seed(TRAIN_SEED))
    test_given, test_missing = _test_set(group, task, config.test_size)
    started = time.perf_counter()
    models = train(
        group, arm, given, missing, seeds=range(config.seeds), steps=config.steps, batch_size=config.batch_size,
        lr=LEARNING_RATES[arm],
    )  # fmt: skip
    seconds = (time.perf_counter() - started) / config.seeds
    return [
        {"key": f"{task}/{name}/{arm}/{seed}", "task": task, "group": name, "arm": arm, "seed": seed}
        | _measure(group, lambda poses, model=model: model.complete(poses.float()), test_given, test_missing)
        | count_parameters(model)
        | {"seconds": seconds, "invariance": _invariance(group, model, test_given[:64])}
        for seed, model in enumerate(models)
    ]


def _fixed_cells(config: CompletionConfig, task: str, name: str) -> list[dict[str, Any]]:
    """What needs no seed: the formula, and how far the nearest given element is."""
    group = lie.parse(name)
    given, missing = _test_set(group, task, config.test_size)

    def complete(poses: Tensor) -> Tensor:
        return formula(group, poses)

    spacing = torch.stack([completion_error(group, given[:, i], missing) for i in range(given.shape[1])]).amin(0)
    record = {"key": f"{task}/{name}/formula/0", "task": task, "group": name, "arm": "formula", "seed": 0}
    return [
        record
        | _measure(group, complete, given, missing)
        | {"score_parameters": 0, "parameters": 0, "spacing": float(spacing.median())}
        | {"invariance": _invariance(group, complete, given[:64])}
    ]


def _settings(config: CompletionConfig) -> dict[str, Any]:
    """What the cells depend on, apart from which of them there are."""
    names = ("steps", "batch_size", "train_size", "test_size")
    return {"study": "lie_completion", "learning_rates": LEARNING_RATES, **{n: getattr(config, n) for n in names}}


def declared_jobs(config: CompletionConfig) -> dict[str, tuple[Any, ...]]:
    """All jobs, by the key of their last cell."""
    jobs: dict[str, tuple[Any, ...]] = {}
    for task, name in declared_cases(config):
        jobs[f"{task}/{name}/formula/0"] = (_fixed_cells, config, task, name)
        jobs |= {f"{task}/{name}/{a}/{config.seeds - 1}": (_learned_cells, config, task, name, a) for a in LEARNED}
    return jobs


def run(config: CompletionConfig, progress: Progress | None = None) -> Path:
    """Run what is declared and not on disk yet, and write the report.

    Returns:
        the path of the HTML file; JSON and CSV lie beside it.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the folder holds cells of other settings.
    """
    require("matplotlib", "report")
    cells = Cells(config.out / "cells.jsonl", _settings(config))
    execute(cells, declared_jobs(config), workers=config.workers, progress=progress)
    records = [
        record
        for record in cells.records.values()
        if (record["task"], record["group"]) in declared_cases(config) and record["seed"] < config.seeds
    ]
    return _write_report(config, records, {name: cocycle(lie.parse(name)) for name in config.groups})


def scan(config: CompletionConfig, progress: Progress | None = None) -> Path:
    """The scan of learning rates of the protocol, to a CSV file; returns its path."""
    cells = Cells(config.out / "scan.jsonl", _settings(config) | {"learning_rates": SCANNED})
    jobs = {f"sequence/{arm}/{lr:g}": (_scan_cells, config, arm, lr) for arm in LEARNED for lr in SCANNED[arm]}
    execute(cells, jobs, workers=config.workers, progress=progress)
    path = (config.csv or config.out) / "lie_completion_learning_rates.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [cells.records[key] for key in jobs]
    columns = [name for name in records[0] if name != "key"]
    path.write_text(report.Table(columns, [[r[c] for c in columns] for r in records], "").csv())
    return path


def _scan_cells(config: CompletionConfig, arm: str, lr: float) -> list[dict[str, Any]]:
    task = "sequence"
    group = lie.parse("SE2")
    given, missing = random_task(group, task, config.train_size, torch.Generator().manual_seed(SCAN_SEED))
    test = random_task(group, task, config.test_size, torch.Generator().manual_seed(SCAN_SEED + 1))
    place = group.random(config.test_size, generator=torch.Generator().manual_seed(SCAN_SEED), dtype=torch.float64)
    given_test, missing_test = (group.compose(place[:, None], elements) for elements in test)
    (model,) = train(
        group, arm, given, missing, seeds=[SCAN_SEED], steps=config.steps, batch_size=config.batch_size, lr=lr
    )
    found = _measure(group, lambda poses: model.complete(poses.float()), given_test, missing_test)
    return [
        {"key": f"{task}/{arm}/{lr:g}", "task": task, "group": "SE2", "arm": arm, "seed": SCAN_SEED, "lr": lr, **found}
    ]


# Reading and reporting


def verdict(interval: report.Interval, first: str, second: str) -> str:
    """What the rule says of a difference of errors, first minus second."""
    if not math.isfinite(interval.low):
        return "one seed: no interval"
    if interval.high < 0:
        return f"{first} is better"
    if interval.low > 0:
        return f"{second} is better"
    return "no difference shown"


def _values(records: Iterable[Mapping[str, Any]], task: str, group: str, arm: str, key: str = "median") -> np.ndarray:
    """[seeds], in order of the seed."""
    chosen = [r for r in records if (r["task"], r["group"], r["arm"]) == (task, group, arm)]
    return np.array([r[key] for r in sorted(chosen, key=lambda r: r["seed"])], dtype=float)


PAIRS = (("closed form", "learned kernel"), ("closed form", "vectors"), ("closed form", "formula"))


def compare(config: CompletionConfig, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The paired differences of the rule: task, group, first, second, difference a seed, interval, verdict."""
    rows = []
    for task, group in declared_cases(config):
        for first, second in PAIRS:
            difference = _values(records, task, group, first) - _values(records, task, group, second)
            interval = report.paired_interval(difference)
            rows.append(
                {"task": task, "group": group, "first": first, "second": second, "difference": difference}
                | {"interval": interval, "verdict": verdict(interval, first, second)}
            )
    return rows


def with_error(values: np.ndarray) -> str:
    """Mean ± standard error over seeds."""
    mean, error = report.mean_and_standard_error(values)
    return f"{mean:.3g}" if not math.isfinite(error) else f"{mean:.3g}\u00a0±\u00a0{error:.2g}"


def _tables(
    config: CompletionConfig, records: Sequence[Mapping[str, Any]], cocycles: Mapping[str, Mapping[str, Any]]
) -> dict[str, report.Table]:
    cases = declared_cases(config)
    fixed = {(r["task"], r["group"]): r for r in records if r["arm"] == "formula"}
    errors = report.Table(
        ("Task", "Group", "Nearest given", *(f"{arm}" for arm in ARMS)),
        [
            (
                task,
                group,
                fixed[task, group]["spacing"],
                fixed[task, group]["median"],
                *(with_error(_values(records, task, group, arm)) for arm in LEARNED),
            )
            for task, group in cases
        ],
        "Median error ‖log(ĝ⁻¹ g*)‖: mean over seeds ± standard error of that mean.",
        "Nearest given: median distance from a missing element to the nearest given one, which an answer should beat.",
        {"Nearest given": ".3g", "formula": ".2g"},
    )
    means = report.Table(
        ("Task", "Group", *ARMS),
        [
            (
                task,
                group,
                fixed[task, group]["mean"],
                *(with_error(_values(records, task, group, a, "mean")) for a in LEARNED),
            )
            for task, group in cases
        ],
        f"Mean error, each cut at {CEILING:g}: mean over seeds ± standard error of that mean.",
        formats={"formula": ".2g"},
    )
    comparison = compare(config, records)
    differences = report.Table(
        ("Task", "Group", "First", "Second", "First − second", "Reading"),
        [(r["task"], r["group"], r["first"], r["second"], r["interval"], r["verdict"]) for r in comparison],
        "Paired differences of the median error, with 95 % Student intervals over seeds.",
        "The formula has no seed: its one error is taken from each. Training and test sequences are the same for all "
        "seeds, so the intervals are about training, not about the choice of sequences.",
        {"First − second": "+.3g"},
    )
    sizes = {(r["group"], r["arm"]): r for r in records if r["arm"] in LEARNED}
    parameters = report.Table(
        ("Group", *(f"{arm}{what}" for arm in LEARNED for what in ("", ", all")), "Learned kernel / closed form"),
        [
            (
                group,
                *(sizes[group, arm][key] for arm in LEARNED for key in ("score_parameters", "parameters")),
                sizes[group, "learned kernel"]["score_parameters"] / sizes[group, "closed form"]["score_parameters"],
            )
            for group in config.groups
        ],
        f"Parameters of the scores of {NUM_HEADS} heads (of the vectors: query and key projections), and of the "
        "whole model.",
        "λ and τ count as published; only λ / τ matters, so one a head is redundant.",
        {"Learned kernel / closed form": ".1f"},
    )
    invariance_rows = []
    for task, group in cases:
        for kind in fixed[task, group]["invariance"]["float32"]:
            for precision in ("float32", "float64"):
                found = {
                    arm: np.array(
                        [
                            r["invariance"][precision][kind]
                            for r in records
                            if (r["task"], r["group"], r["arm"]) == (task, group, arm)
                        ]
                    )
                    for arm in ARMS
                }
                medians = {arm: float(np.median(values[:, 0])) for arm, values in found.items()}
                row = [task, group, kind, precision]
                for arm in ARMS:
                    row += [medians[arm], float(found[arm][:, 1].max())]
                orders = math.log10(medians["vectors"] / medians["closed form"]) if medians["closed form"] > 0 else None
                invariance_rows.append((*row, orders))
    invariance = report.Table(
        ("Task", "Group", "Move", "Precision", *(f"{arm}{what}" for arm in ARMS for what in ("", ", worst")), "Orders"),
        invariance_rows,
        "How far the answer is from moving along, ‖(h out(g))⁻¹ out(h g) − 1‖_F: median over sequences (and seeds), "
        "and the worst.",
        "Orders: of magnitude between the medians of vectors and closed form. A worst case far above the median is an "
        "answer that rounding switched from one proposal to another of nearly the same confidence.",
        {c: ".1e" for arm in ARMS for c in (arm, f"{arm}, worst")} | {"Orders": ".1f"},
    )
    chain = report.Table(
        ("Group", "On the group, float32", "On the group, float64", "Order on logarithms"),
        [(g, c["group float32"], c["group float64"], c["order"]) for g, c in cocycles.items()],
        "The cocycle g_ik = g_ij g_jk: largest relative error over 256 random triples; and the order p of "
        "‖w_ij + w_jk − w_ik‖ ~ size^p for factors of size 0.001 to 0.1.",
        "Order 2: logarithms add up to first order only.",
        {"On the group, float32": ".1e", "On the group, float64": ".1e", "Order on logarithms": ".3f"},
    )
    cells = report.Table(
        (
            "Task",
            "Group",
            "Arm",
            "Seed",
            "Median error",
            "Mean error",
            "At the ceiling",
            "Score parameters",
            "Parameters",
        ),
        [
            (
                *(r[key] for key in ("task", "group", "arm", "seed", "median", "mean", "outside")),
                r["score_parameters"],
                r["parameters"],
            )
            for r in sorted(records, key=lambda r: (r["task"], r["group"], ARMS.index(r["arm"]), r["seed"]))
        ],
        "Every cell.",
    )
    return {
        "errors": errors, "means": means, "differences": differences, "parameters": parameters,
        "invariance": invariance, "cocycle": chain, "cells": cells,
    }  # fmt: skip


def _write_report(
    config: CompletionConfig, records: Sequence[Mapping[str, Any]], cocycles: Mapping[str, Mapping[str, Any]]
) -> Path:
    tables = _tables(config, records, cocycles)
    comparison = compare(config, records)

    def forest(task: str, second: str) -> report.Figure:
        rows = [
            report.IntervalRow(r["group"], *r["interval"], points=tuple(r["difference"]))
            for r in comparison
            if r["task"] == task and r["second"] == second
        ]
        return report.Figure(
            report.intervals(rows, x_label=f"median error, closed form − {second}"),
            f"Task {task}: closed form against {second}; mean, 95 % interval, each seed. Left of zero the closed form "
            "is better.",
            f"Forest plot of paired differences by group for the task {task}.",
        )

    curve = report.curves(
        [report.Series(g, np.log10(c["size"]), np.array([c["discrepancy"]])) for g, c in cocycles.items()],
        x_label="log₁₀ of the size of both factors", y_label="‖w_ij + w_jk − w_ik‖", log_y=True,
    )  # fmt: skip
    sections = [
        report.Section("What was run", [
            f"{', '.join(f'{task} on {group}' for task, group in declared_cases(config))}; {config.seeds} seeds an "
            f"arm, {config.steps} steps of {config.batch_size}, {config.train_size} training and "
            f"{config.test_size} test sequences. The protocol is the docstring of `erlangen.studies.lie_completion`.",
        ]),
        report.Section("Errors", [tables["errors"], tables["means"]]),
        report.Section("Differences", [
            *(forest(task, second) for task in config.tasks for second in ("learned kernel", "vectors")),
            tables["differences"],
        ]),
        report.Section("Parameters of the scores", [tables["parameters"]]),
        report.Section("Moving all elements", [tables["invariance"]]),
        report.Section("The cocycle", [
            report.Figure(curve, "What is missing from the sum of two logarithms.", "Straight lines of slope two."),
            tables["cocycle"],
        ]),
        report.Section("Every cell", [tables["cells"]]),
    ]  # fmt: skip
    calls = "; ".join(
        f"{r['task']}, {r['group']}: {r['verdict']}" for r in comparison if r["second"] == "learned kernel"
    )
    html = report.page(
        "Completing sequences of group elements",
        [f"Closed-form scores against a learned kernel on the same invariant. {calls}."],
        sections,
    )
    path = report.write_report(config.out, "lie_completion", html, {"config": config, "cells": records}, tables)
    copy_tables(config.csv, "lie_completion", tables)
    return path


def copy_tables(folder: Path | None, name: str, tables: Mapping[str, report.Table]) -> None:
    """Write ``<name>_<key>.csv`` for each table, if there is a folder to write to."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for key, table in tables.items():
            (folder / f"{name}_{key}.csv").write_text(table.csv())


def print_progress(done: int, total: int) -> None:
    """A line a job."""
    print(f"{done} of {total} jobs", flush=True)


@dataclass(frozen=True, kw_only=True)
class _CommandLine(CompletionConfig):
    scan_learning_rates: bool = False
    """Make the scan of learning rates instead, on one seed that the study does not use."""


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m erlangen.studies.lie_completion``."""
    import tyro

    description = "Complete sequences of group elements: closed-form scores, a learned kernel, vectors."
    config = tyro.cli(_CommandLine, args=arguments, prog="lie_completion", description=description)
    print((scan if config.scan_learning_rates else run)(config, print_progress))


if __name__ == "__main__":
    importlib.import_module("erlangen.studies.lie_completion").main()  # by that name workers find the jobs
