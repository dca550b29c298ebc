"""Between two models: one is brought into the other's gauge, and what no gauge changes is averaged.

Weights are averaged in a form in which only orders and rotations are free and are settled between the two (see
`align`). Of a head that means the products of queries and keys, and of values and output: their mean has up to twice
the width of a head, and is cut to the nearest product that has it. The merge is a model of the same architecture.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ._align_side import Progress, Using
from ._align_weights import Matching
from ._align_write import write
from ._weights import ModuleWeights, PendingWeights, ReadWeights
from .align import Alignment, align, other_names, sides
from .layout import ModelLayout, model_layout, unwrap


def expect_weight(weight: float) -> float:
    """A share of the second model.

    Raises:
        ValueError: it is not from 0 to 1.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"the weight of the second model lies between 0 and 1, received {weight}")
    return float(weight)


def merge_weights(
    layout: ModelLayout,
    a: ReadWeights,
    b: ReadWeights,
    out: Any,
    weight: float,
    matching: Matching,
    *,
    progress: Progress | None = None,
) -> list[str]:
    """Write the weights between two models, in the gauge of the first, a layer at a time.

    Args:
        layout: of both models.
        a, b: their tensors, as they are stored: no aligned copy is needed.
        out: a mapping in which every tensor of the layout is set once, in float64; large ones in float32 where no more
            is stored, or as ``out`` keeps them where it has ``dtype``; tables some rows at a time where it has
            ``put_rows``.
        weight: of the second, from 0 to 1. At 0 what is written are the tensors of a.
        matching: of `erlangen.gauge.align.match_weights`.
        progress: called with the number of layers done and of all.

    Returns:
        What could not be put back as the first model has it, in sentences.

    Raises:
        ValueError: a weight outside [0, 1], weights that contradict the layout or are not finite.
    """
    weight = expect_weight(weight)
    first, second = sides(layout, a, b, matching.using)
    if weight == 0:
        for name in layout.tensor_shapes():
            out[name] = a[name]
        return []
    return write(first, second, out, weight, matching, None, progress)


def merge_others(
    layout: ModelLayout, names: Iterable[str], a: ReadWeights, b: ReadWeights, out: Any, weight: float
) -> list[str]:
    """Write tensors that a layout does not speak of (poolers) between two models, as they are stored.

    Args:
        layout: of both models.
        names: of all tensors; those of the layout are passed over.
        a, b, out, weight: as of `merge_weights`.

    Returns:
        Names of those that were averaged.

    Raises:
        ValueError: a tensor that only one model has, or in another shape, or one without floating point (quantised, or
            of indices) that is not the same in both.
    """
    weight = expect_weight(weight)
    averaged = []
    for name in other_names(layout, names):
        if name not in a or name not in b or a.shape(name) != b.shape(name):
            raise ValueError(f"{name} must be in both models, in one shape: there is nothing to average it with")
        one = a[name]
        if not one.dtype.is_floating_point:
            if not torch.equal(one.cpu(), b[name].cpu()):
                raise ValueError(f"{name} is of dtype {one.dtype} and not the same in both: it has no mean")
            out[name] = one
            continue
        out[name] = (1 - weight) * one.double().cpu() + weight * b[name].double().cpu()
        averaged.append(name)
    return averaged


def between(alignment: Alignment, weight: float) -> nn.Module:
    """The model between two that were aligned: a copy of the first with other numbers.

    Args:
        alignment: of the two.
        weight: of the second, from 0 to 1. 0 gives the numbers of the first, 1 the function of the second.

    Raises:
        ValueError: a weight outside [0, 1].
    """
    weight = expect_weight(weight)
    a, b = alignment.first, alignment.second
    first, second = ModuleWeights(a), ModuleWeights(b)
    layout = model_layout(a)
    model = copy.deepcopy(unwrap(a))
    pending = PendingWeights(ModuleWeights(model))
    merge_weights(layout, first, second, pending, weight, alignment.matching)
    known = layout.tensor_shapes()
    names = [name for name in first if not any(other in first and first.same(name, other) for other in known)]
    merge_others(layout, names, first, second, pending, weight)
    pending.commit()
    return model


def merge(
    a: nn.Module,
    b: nn.Module,
    weight: float = 0.5,
    *,
    using: Using = "gauge",
    rounds: int = 30,
) -> nn.Module:
    """The model between two, of their own architecture. Neither is changed.

    The second is brought into the first one's gauge (see `align`). Then everything linear is averaged, and of heads the
    products; norms, biases and means are put back as the first has them. Tensors of which no symmetry is known are
    averaged as they are stored.

    Args:
        a: the first model. Its class, config, dtype and device are those of the merge.
        b: the second.
        weight: of the second, from 0 to 1. 0 gives the numbers of the first, 1 the function of the second.
        using, rounds: as of `align`. Only "gauge" averages products; the others average the factors of heads.

    Raises:
        TypeError: no layout is known for a model.
        ValueError: a weight outside [0, 1], and what `align` raises.
    """
    expect_weight(weight)
    return between(align(a, b, using=using, rounds=rounds), weight)


@dataclass(frozen=True, eq=False)
class Barrier:
    """The loss along the path between two models.

    Attributes:
        weights: of the second model, from 0 to 1.
        losses: of the model at each.
        alignment: of the two.
    """

    weights: tuple[float, ...]
    losses: tuple[float, ...]
    alignment: Alignment = field(repr=False)

    @property
    def excesses(self) -> tuple[float, ...]:
        """Of the loss at each weight over the line between those of the two models."""
        first, last = self.losses[0], self.losses[-1]
        return tuple(loss - (1 - t) * first - t * last for t, loss in zip(self.weights, self.losses))

    @property
    def barrier(self) -> float:
        """The largest excess; at least 0, for at both ends there is none."""
        return max(self.excesses)


def barrier(
    a: nn.Module,
    b: nn.Module,
    loss: Callable[[nn.Module], float],
    weights: int | Sequence[float] = 11,
    *,
    using: Using = "gauge",
    rounds: int = 30,
) -> Barrier:
    """The loss along the path of merges from one model to another.

    Args:
        a, b: the models.
        loss: of a model; called with every model of the path in turn.
        weights: how many points, evenly from 0 to 1; or the weights, which rise from 0 to 1.
        using, rounds: as of `align`.

    Raises:
        TypeError: no layout is known for a model.
        ValueError: weights that do not rise from 0 to 1, and what `align` raises.
    """
    points: Sequence[float] = [] if isinstance(weights, int) else list(weights)
    if isinstance(weights, int) and weights > 1:
        points = [i / (weights - 1) for i in range(weights)]
    if len(points) < 2 or points[0] != 0 or points[-1] != 1 or sorted(points) != points:
        raise ValueError(
            f"a path needs at least two weights that rise from 0 to 1, or their number; received {weights}"
        )
    alignment = align(a, b, using=using, rounds=rounds)
    path = tuple(float(point) for point in points)
    return Barrier(path, tuple(float(loss(between(alignment, point))) for point in path), alignment)
