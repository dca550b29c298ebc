"""The arms: ways to put two models together, and the loss on the way from one to the other."""

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from erlangen import gauge

from .._jobs import Tick
from .models import held_out_loss

ARMS = ("naive", "permutation", "orthogonal", "factors", "gauge")


@torch.no_grad()
def average(first: nn.Module, second: nn.Module, weight: float) -> nn.Module:
    """A copy of the first model with (1 − weight) times its numbers and weight times the second's."""
    merged = copy.deepcopy(first)
    others = dict(second.named_parameters())
    for name, parameter in merged.named_parameters():
        parameter.mul_(1 - weight).add_(others[name], alpha=weight)
    return merged


def between(arm: str, first: nn.Module, second: nn.Module) -> tuple[Callable[[float], nn.Module], "gauge.Alignment"]:
    """What an arm makes of two models at a merge weight, and how it aligned them."""
    using = {"naive": "none", "factors": "gauge"}.get(arm, arm)
    alignment = gauge.align(first, second, using=using)
    if arm in ("naive", "factors"):
        other = second if arm == "naive" else alignment.model
        return lambda weight: average(first, other, weight), alignment
    return alignment.merged, alignment


def barrier(weights: np.ndarray, losses: np.ndarray) -> float:
    """The largest excess of losses [points] over the line between the first and the last, at least 0."""
    return float(np.max(losses - ((1 - weights) * losses[0] + weights * losses[-1]), initial=0.0))


def measure_path(
    arm: str, first: nn.Module, second: nn.Module, windows: Tensor, points: int, tick: Tick | None = None
) -> dict[str, Any]:
    """Merge two models at weights from 0 to 1 and measure each.

    Args:
        arm: one of `ARMS`.
        first, second: of one family.
        windows: held out, int64 [B, T + 1].
        points: how many weights, both ends with them.
        tick: called after each.

    Returns:
        ``weights`` and ``losses`` [points]; ``barrier``; ``end_error``, by how much the losses at the ends differ from
        those of the two models; ``distance_before`` and ``distance_after`` of stored numbers, and ``frame``, as in
        `erlangen.gauge.align`; ``seconds`` of aligning.

    Raises:
        KeyboardInterrupt: ``tick`` said to stop.
    """
    started = time.perf_counter()
    at, alignment = between(arm, first, second)
    seconds = time.perf_counter() - started
    weights = np.linspace(0.0, 1.0, points)
    losses = []
    for done, weight in enumerate(weights, 1):
        losses.append(held_out_loss(at(float(weight)), windows))
        if tick is not None and tick(done) and done < points:
            raise KeyboardInterrupt
    ends = [abs(losses[at] - held_out_loss(model, windows)) for at, model in ((0, first), (-1, second))]
    return {
        "weights": weights.tolist(), "losses": losses, "barrier": barrier(weights, np.array(losses)),
        "end_error": max(ends), "distance_before": alignment.distance_before,
        "distance_after": alignment.distance_after, "frame": alignment.frame, "seconds": seconds,
    }  # fmt: skip
