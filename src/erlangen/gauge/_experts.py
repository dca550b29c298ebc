"""Experts of a mixture: the order that is free, and their tensors replaced one expert at a time."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import forms
from ._weights import ReadWeights, Weights
from .layout import MLP, Experts


def maps_of(mlp: MLP) -> dict:
    """The maps of a feed-forward layer by name."""
    named = (("up", mlp.up), ("gate", mlp.gate), ("down", mlp.down))
    return {name: part for name, part in named if part is not None}


def matrices_of(mlp: MLP, weights: ReadWeights | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored matrices of a feed-forward layer by the names of their tensors."""
    return {part.weight: part.matrix(weights[part.weight]) for part in maps_of(mlp).values()}


def alike_scores(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether two rows [experts, ...] of a router are the same: which of the two is chosen is a matter of place."""
    far = torch.cdist(rows[None], rows[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
    far.fill_diagonal_(torch.inf)
    return bool((far <= 8 * forms.noise(dtype) * rows.norm(dim=1).max()).any())


def by_group(experts: Experts, groups: Tensor, inner: Tensor) -> Tensor:
    """int64 [experts]: an order of groups [groups], and of the experts of each [groups, experts of a group]."""
    size = len(experts.experts) // experts.groups
    return (groups[:, None] * size + inner[groups]).flatten()


def replace_experts(
    experts: Experts,
    weights: Weights,
    order: Tensor,
    treat: Callable[[int, dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    """Put expert order[i] in place i, treated. Of experts with tensors of their own, two at most are in memory.

    Args:
        experts: of which mixture.
        weights: read and written.
        order: int64 [experts].
        treat: number of an expert, and its stored matrices by name -> new ones by the same names.
    """
    stacks = {
        part.weight: weights[part.weight]
        for mlp in experts.experts
        for part in maps_of(mlp).values()
        if part.stack is not None
    }
    new = {name: tensor.clone() for name, tensor in stacks.items()}

    def load(expert: int) -> dict[str, Tensor]:
        mlp = experts.experts[expert]
        names = {part.weight for part in maps_of(mlp).values()}
        return matrices_of(mlp, {name: stacks[name] if name in stacks else weights[name] for name in names})

    def put(place: int, expert: int, tensors: Mapping[str, Tensor]) -> None:
        target = maps_of(experts.experts[place])
        names = {part.weight: target[name] for name, part in maps_of(experts.experts[expert]).items()}
        for name, tensor in treat(expert, dict(tensors)).items():
            part = names[name]
            if part.stack is None:
                weights[part.weight] = tensor
            else:
                new[part.weight][part.stack] = tensor

    # Along cycles of the order: only the first expert of one has to be kept until its new place is free.
    places, done = order.tolist(), set[int]()
    for first in range(len(places)):
        if first in done:
            continue
        held, place = load(first), first
        while place not in done:
            done.add(place)
            expert = places[place]
            put(place, expert, held if expert == first else load(expert))
            place = expert
    for name, tensor in new.items():
        weights[name] = tensor
