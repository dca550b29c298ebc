"""What the key prior sums up over the windows of a text, for one layer.

Shape suffixes: B windows of a batch, H heads, C classes, T queries, J keys, D width of a head, S sides of the positions
on which something is added to the queries.
"""

from typing import Any

import torch
from torch import Tensor

from ._heads import Direction, Heads
from ._key_prior_nulls import permuted_labels, random_directions
from ._tokens import TokenClasses

# Random directions that the spread of a head is compared with; the classes have closed forms.
NUM_DIRECTIONS = 1000


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b > 0, a / b, 0.0)


class LayerSums:
    """What is summed up over the windows for one layer."""

    def __init__(self, direction: Direction, classes: TokenClasses, windows: int, length: int) -> None:
        self.direction, self.classes = direction, classes
        heads, width = direction.before.shape
        sides = [direction.before, direction.after]
        self.sides = [number for number, side in enumerate(sides) if bool(side.any())] or [0]
        self.direction_HSD = torch.stack([sides[number] for number in self.sides], 1).double().cpu()
        num_classes = len(classes.names)
        self.logits = torch.zeros(heads, windows, length)
        self.moved = torch.zeros(heads, dtype=torch.float64)
        self.masses = torch.zeros(2, heads, num_classes, dtype=torch.float64)
        self.key_sums = torch.zeros(heads, num_classes + 1, len(self.sides), width, dtype=torch.float64)
        size = len(self.sides) * width
        self.products = torch.zeros(heads, size, size, dtype=torch.float64)
        self.distances: Tensor | None = None
        self.visible: Tensor | None = None

    def add(self, heads: Heads, first: int) -> None:
        """The windows from number ``first`` on."""
        layer, query = heads.layer, heads.query_BHTD
        batch, length = query.shape[0], query.shape[2]
        seen = layer.visible(length, query.device)
        members = self.classes.members[:, first : first + batch].to(query)
        prior = heads.logits(heads.carried(self.direction)).expand(batch, -1, length, -1)  # s_ij
        number_J = seen.sum(0)
        self.logits[:, first : first + batch] = (
            ((prior * seen).sum(2) / number_J).transpose(0, 1).to(self.logits)  # the mean over queries
        )
        logits = heads.logits(query)
        attention, without = layer.attention(logits), layer.attention(logits - prior)
        self.moved += (0.5 * (attention - without).abs()[:, :, 1:].sum(-1)).sum((0, 2)).double().cpu()
        for which, weights in enumerate((attention, without)):
            mass = weights[:, :, 1:].sum(2)  # of each key [B, H, J]
            self.masses[which] += torch.einsum("bhj,cbj->hc", mass, members).double().cpu()
        keys = torch.stack([heads.carried_back()[side] for side in self.sides], 3)  # [B, H, J, S, D]
        weight = torch.cat([members, torch.ones_like(members[:1])])
        weight[-1, :, 0] = 0
        self.key_sums += torch.einsum("cbj,bhjsd->hcsd", weight, keys).double().cpu()
        flat = keys[:, :, 1:].flatten(3).transpose(0, 1).flatten(1, 2)  # [H, tokens, S * D]
        self.products += (flat.transpose(1, 2) @ flat).double().cpu()
        if heads.turn is not None and 0 in self.sides:
            distance = torch.arange(length, device=query.device)
            distance = (distance[:, None] - distance)[seen]
            sums = torch.zeros(query.shape[1], length, dtype=prior.dtype, device=query.device)
            sums.index_add_(1, distance, prior.sum(0)[:, seen])
            self.distances = sums.double().cpu() + (0 if self.distances is None else self.distances)
            self.visible = torch.bincount(distance, minlength=length).cpu()

    def finish(self, seed: int) -> dict[str, Any]:
        """The fields of `KeyPrior` for this layer."""
        _, windows, length = self.logits.shape
        width = self.direction_HSD.shape[-1]
        rows = windows * (length - 1)
        counts = torch.cat([self.classes.counts, torch.tensor([rows])]).double()
        means = self.key_sums / counts[:, None, None]
        contrasts = means[:, :-1] - means[:, -1:]  # [H, C, S, D]
        side_lengths = self.direction_HSD.norm(dim=-1)
        deviation = ((side_lengths[:, None] * contrasts.norm(dim=-1)).square().sum(-1) / width).sqrt()
        middle = means[:, -1].flatten(1)
        covariance = self.products / rows - middle[:, :, None] * middle[:, None]
        draws = random_directions(NUM_DIRECTIONS, side_lengths, width, seed).flatten(2)
        random = torch.einsum("nhd,hde,nhe->nh", draws, covariance, draws).clamp_min(0)
        logits = self.logits.double()
        spread = logits[..., 1:].flatten(1).std(-1, unbiased=False)
        centred = logits - logits[..., 1:].mean((1, 2), keepdim=True)
        label_mean, label_deviation = permuted_labels(centred, self.classes.members)
        distances = self.distances
        if distances is not None and self.visible is not None:
            pairs = (windows * self.visible).double()
            distances = torch.where(pairs > 0, distances / pairs.clamp_min(1), torch.nan)
        above = (random >= spread.square() * (1 - 1e-9)).sum(0)
        return {
            "logits": self.logits,
            "moved": self.moved / rows,
            "attention": self.masses[0] / rows,
            "attention_without": self.masses[1] / rows,
            "distances": distances,
            "direction_deviation": deviation,
            "label_mean": label_mean,
            "label_deviation": label_deviation,
            "spread": spread,
            "spread_ratio": ratio(spread, random.mean(0).sqrt()),
            "spread_p": (1 + above).double() / (1 + NUM_DIRECTIONS),
        }
