"""The arms: ways to put two models together, and the loss on the way from one to the other."""

import copy
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from erlangen import gauge

from .._jobs import Tick
from .models import held_out_loss

ARMS = ("naive", "permutation", "orthogonal", "factors", "gauge")
ALIGNED: dict[str, Literal["none", "permutation", "orthogonal", "gauge"]] = {
    "naive": "none", "permutation": "permutation", "orthogonal": "orthogonal", "gauge": "gauge",
}  # fmt: skip
"""The arms that have an alignment of their own, and what `erlangen.gauge.align` calls it; "factors" has the last."""

Merged = Callable[[float], nn.Module]
"""The model at a merge weight."""


@torch.no_grad()
def average(first: nn.Module, second: nn.Module, weight: float) -> nn.Module:
    """A copy of the first model with (1 − weight) times its numbers and weight times the second's."""
    merged = copy.deepcopy(first)
    others = dict(second.named_parameters())
    for name, parameter in merged.named_parameters():
        parameter.mul_(1 - weight).add_(others[name], alpha=weight)
    return merged


def makes(arm: str) -> tuple[str, ...]:
    """The arms that come of the alignment of one."""
    return ("factors", "gauge") if arm == "gauge" else (arm,)


def between(arm: str, first: nn.Module, second: nn.Module) -> tuple[dict[str, Merged], gauge.Alignment]:
    """What the arms of one alignment make of two models at a merge weight, and the alignment."""
    alignment = gauge.align(first, second, using=ALIGNED[arm])
    found: dict[str, Merged] = {arm: alignment.merged}
    if arm == "naive":
        found[arm] = lambda weight: average(first, second, weight)
    if arm == "gauge":
        found["factors"] = lambda weight: average(first, alignment.model, weight)
    return found, alignment


def barrier(weights: np.ndarray, losses: np.ndarray) -> float:
    """The largest excess of losses [points] over the line between the first and the last, at least 0."""
    return float(np.max(losses - ((1 - weights) * losses[0] + weights * losses[-1]), initial=0.0))


def measure_paths(
    arm: str, first: nn.Module, second: nn.Module, windows: Tensor, points: int, tick: Tick | None = None
) -> dict[str, dict[str, Any]]:
    """Merge two models at weights from 0 to 1 and measure each, for the arms of one alignment.

    Args:
        arm: one of `ALIGNED`.
        first, second: of one family.
        windows: held out, int64 [B, T + 1].
        points: how many weights, both ends with them.
        tick: called after each loss.

    Returns:
        for each arm that it `makes`: ``weights`` and ``losses`` [points]; ``barrier``; ``end_error``, by how much the
        losses at the ends differ from those of the two models; ``distance_before`` and ``distance_after`` of stored
        numbers, and ``frame``, as in `erlangen.gauge.align`; ``seconds`` of aligning.

    Raises:
        KeyboardInterrupt: ``tick`` said to stop.
    """
    started = time.perf_counter()
    merged, alignment = between(arm, first, second)
    common = {
        "distance_before": alignment.distance_before, "distance_after": alignment.distance_after,
        "frame": alignment.frame, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    ends = np.array([held_out_loss(model, windows) for model in (first, second)])
    weights = np.linspace(0.0, 1.0, points)
    records, done = {}, 0
    for made in makes(arm):
        losses = []
        for weight in weights.tolist():
            losses.append(held_out_loss(merged[made](weight), windows))
            done += 1
            if tick is not None and tick(done):
                raise KeyboardInterrupt
        error = float(np.abs(np.array(losses)[[0, -1]] - ends).max())
        found = {"barrier": barrier(weights, np.array(losses)), "end_error": error}
        records[made] = {"weights": weights.tolist(), "losses": losses, **found, **common}
    return records
