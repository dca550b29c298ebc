"""The key prior: which keys the preferred direction of a head favours, whatever the query.

With b = learned query bias + mean of the unlearned one, every query is (content + b), and key j gets the logit
s_j = scale · b · k_j from b alone: a prior over keys, by which its attention weight is multiplied with
exp(s_j − mean s) before the softmax normalises. See arXiv 2601.22257 for the idea that this makes heads readable.

Where this differs from the code published with the paper: keys are those that attention sees on a text (residual
stream, norm, learned key bias, QK-norm, positions), not projections of raw token embeddings; b has its learned part;
effects are logits of occurrences in the text, not cosines over the vocabulary; each effect stands beside two nulls; and
`steer` measures what b causes. See docs/key-prior.md.

Shape suffixes: L layers, H heads, C classes, W windows, T tokens of a window, D width of a head, S sides of the
positions on which something is added to the queries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from erlangen.gauge import head_layouts, unwrap

from ._heads import Heads, batch_size, directions, observed
from ._key_prior_nulls import MIN_WINDOWS, normal_p_value, sphere_p_value
from ._key_prior_steer import Steering as Steering
from ._key_prior_steer import scaled_direction as scaled_direction
from ._key_prior_steer import steer as steer
from ._key_prior_sums import LayerSums, ratio
from ._tokens import TokenClasses as TokenClasses
from ._tokens import readable as readable
from ._tokens import token_classes as token_classes
from ._tokens import top_tokens as top_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyPrior:
    """What the preferred direction of every head gives the keys of a text.

    Logits are natural logarithms of factors on attention. A class is compared with all tokens but the first of each
    window: effect = mean logit of its occurrences − mean logit of those.

    Attributes:
        tokens: int64 [W, T].
        classes: of these tokens.
        logits: float32 [L, H, W, T]: s_j, the mean over the queries that see key j.
        lengths: float64 [L, H, 2]: of the learned bias and of the mean of the unlearned one.
        moved: float64 [L, H]: total variation distance between the attention with b and without, at the same residual
            stream, mean over queries (but the first, which has one key). 0: b does nothing, 1: all attention moves.
        attention, attention_without: float64 [L, H, C]: share of attention that goes to a class, mean over queries.
        distances: float64 [L, H, T]: mean of s over all pairs of a query and a key so many tokens before it; NaN where
            there is none. None where s does not depend on the query's position.
        head_dim: D.
        direction_deviation: float64 [L, H, C]: standard deviation of the effect for random directions of the length
            of b; their mean is zero.
        label_mean, label_deviation: float64 [L, H, C]: of the effect under permuted labels.
        spread: float64 [L, H]: standard deviation of s over tokens, the first ones aside.
        spread_ratio: float64 [L, H]: over its root mean square for random directions.
        spread_p: float64 [L, H]: share of random directions with a spread at least as large.
    """

    tokens: Tensor
    classes: TokenClasses
    logits: Tensor
    lengths: Tensor
    moved: Tensor
    attention: Tensor
    attention_without: Tensor
    distances: Tensor | None
    head_dim: int
    direction_deviation: Tensor
    label_mean: Tensor
    label_deviation: Tensor
    spread: Tensor
    spread_ratio: Tensor
    spread_p: Tensor

    @cached_property
    def baseline(self) -> Tensor:
        """float64 [L, H]: mean logit of all tokens but the first of each window."""
        return self.logits[..., 1:].double().mean((-2, -1))

    @cached_property
    def effects(self) -> Tensor:
        """float64 [L, H, C]: mean logit of a class less the baseline."""
        counts = self.classes.counts.double()
        sums = torch.einsum("lhwt,cwt->lhc", self.logits, self.classes.members.float()).double()
        return sums / counts - self.baseline[..., None]

    @property
    def direction_z(self) -> Tensor:
        """float64 [L, H, C]: effects in deviations of random directions; 0 where there is no direction."""
        return ratio(self.effects, self.direction_deviation)

    @property
    def direction_p(self) -> Tensor:
        """float64 [L, H, C]: probability of an effect at least as large for a random direction, two-sided.

        Exact where all of b is added on one side of the positions; else of the right variance.
        """
        return sphere_p_value(self.direction_z / self.head_dim**0.5, self.head_dim)

    @property
    def label_z(self) -> Tensor:
        """float64 [L, H, C]: effects in deviations of permuted labels; NaN where permuting changes nothing, as for
        classes of position, and for fewer than 8 windows."""
        if self.tokens.shape[0] < MIN_WINDOWS:
            return torch.full_like(self.effects, torch.nan)
        z = (self.effects - self.label_mean) / self.label_deviation
        position = torch.tensor([kind == "position" for kind in self.classes.kinds])
        return z.masked_fill(position | (self.label_deviation <= 1e-12 * self.spread[..., None]), torch.nan)

    @property
    def label_p(self) -> Tensor:
        """float64 [L, H, C]: two-sided p-value of `label_z`, which is close to normal for many windows."""
        return normal_p_value(self.label_z)

    @property
    def positions(self) -> Tensor:
        """float64 [L, H, T]: mean logit at each place of a window, less the baseline."""
        return self.logits.double().mean(2) - self.baseline[..., None]

    def enrichment(self, share: float = 0.05) -> tuple[Tensor, Tensor]:
        """How many times as frequent classes are among the keys of highest (of lowest) logits as in the text.

        Args:
            share: of the tokens (the first of each window aside) that count as highest and lowest.

        Returns:
            two float64 [L, H, C], 1 being chance.
        """
        flat = self.logits[..., 1:].flatten(2)
        number = max(1, round(share * flat.shape[-1]))
        members = self.classes.members[..., 1:].flatten(1).double()
        expected = members.mean(1)
        found = []
        for largest in (True, False):
            chosen = flat.topk(number, dim=-1, largest=largest).indices
            found.append(members.T[chosen].mean(-2) / expected)
        return found[0], found[1]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the logits of single tokens; lists in the order layer, head, class; NaN is None."""
        highest, lowest = self.enrichment()
        data: dict[str, Any] = {
            "num_layers": self.logits.shape[0],
            "num_heads": self.logits.shape[1],
            "head_dim": self.head_dim,
            "num_windows": self.tokens.shape[0],
            "window_length": self.tokens.shape[1],
            "classes": list(self.classes.names),
            "kinds": list(self.classes.kinds),
            "counts": self.classes.counts.tolist(),
            "note": self.classes.note,
            "length_learned": self.lengths[..., 0],
            "length_unlearned": self.lengths[..., 1],
            "enrichment_highest": highest,
            "enrichment_lowest": lowest,
            "factors": self.effects.exp(),
        }
        for name in (
            "moved", "effects", "direction_z", "direction_p", "label_z", "label_p", "attention", "attention_without",
            "spread", "spread_ratio", "spread_p", "positions", "distances",
        ):  # fmt: skip
            data[name] = getattr(self, name)
        return {name: _plain(value.tolist()) if isinstance(value, Tensor) else value for name, value in data.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if value != value else value  # NaN


def key_prior(
    model: nn.Module,
    tokens: Tensor,
    *,
    classes: TokenClasses | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> KeyPrior:
    """Measure the key prior of every head of a model on a text.

    The model is broken or not; of an unbroken one the learned query biases are the direction. It is run in evaluation
    mode, with the mean of unlearned biases, and left as it was. Where QK-norm stands between bias and attention, s is
    the part of the logit that b contributes at the norm that was measured, so that logit = content + s exactly; taking
    b away would change the norm too, which `steer` measures. Under rotary positions, s of a bias that is added before
    them depends on the query's position. A soft cap applies after s is added. Everything is computed in float32, or in
    float64 for a model in float64.

    Args:
        model: a causal decoder whose head layouts are known (`erlangen.gauge.head_layouts`).
        tokens: int64 [W, T], windows of a text; T at least 8.
        classes: of these tokens (`token_classes`). None: classes of position and frequency.
        seed: of the random directions that spreads are compared with.
        progress: called with the windows done and all windows.

    Returns:
        what was found, on the CPU. It keeps 4 bytes for each token, layer and head.

    Raises:
        TypeError: the layouts of this class are unknown.
        ValueError: it has no preferred direction (no query biases, not broken), its attention is not causal or latent,
            or the tokens are not windows.
    """
    classes = token_classes(tokens) if classes is None else classes
    if classes.members.shape[1:] != tokens.shape:
        raise ValueError(
            f"the classes are of a text of shape {list(classes.members.shape[1:])}, and the tokens of shape "
            f"{list(tokens.shape)}: make them from these tokens"
        )
    inner = unwrap(model)
    layouts = head_layouts(inner)
    if len({(layout.num_heads, layout.head_dim) for layout in layouts}) > 1:
        raise ValueError("the layers of this model have heads of different numbers or widths; the key prior needs one")
    found = directions(inner)
    sums = [LayerSums(direction, classes, len(tokens), tokens.shape[1]) for direction in found]
    done = 0

    def each(heads: Heads) -> None:
        sums[heads.layer.number].add(heads, done)

    step = batch_size(layouts[0].num_heads, tokens.shape[1])
    with observed(model, each) as run:
        while done < len(tokens):
            run(tokens[done : done + step])
            done = min(len(tokens), done + step)
            if progress is not None:
                progress(done, len(tokens))
    lengths = []
    for direction in found:
        lengths.append(torch.stack([part.norm(dim=-1) for part in (direction.learned, direction.unlearned)], -1))
    parts = [one.finish(seed + number) for number, one in enumerate(sums)]
    return KeyPrior(
        tokens=tokens.cpu(),
        classes=classes,
        lengths=torch.stack(lengths).double().cpu(),
        head_dim=layouts[0].head_dim,
        **{name: _stacked([part[name] for part in parts]) for name in parts[0]},
    )


def _stacked(values: list[Any]) -> Any:
    if all(value is None for value in values):
        return None
    like = next(value for value in values if value is not None)
    return torch.stack([torch.full_like(like, torch.nan) if value is None else value for value in values])
