"""What the preferred direction causes: scale it, and look at attention and loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erlangen.gauge import head_layouts, unwrap
from erlangen.gauge.layout import Projection

from ._bias import NAME
from ._heads import Heads, batch_size, directions, observed
from ._tokens import TokenClasses

ALPHAS = (0.0, 0.5, 1.0, 2.0)


@contextmanager
def scaled_direction(
    model: nn.Module, alpha: float, *, heads: Sequence[tuple[int, int]] | None = None
) -> Iterator[None]:
    """In this context the preferred direction of some heads, learned and unlearned together, is alpha times as long.

    Weights are not touched: what is added to the queries goes through hooks, and comes off with them, also on an error.
    (Unlearned biases that are added after rotary positions are scaled in their buffer, whose numbers are put back.)
    With alpha = 1 nothing is hooked.

    Args:
        model: one with a preferred direction, to be run in evaluation mode, where unlearned biases are at their mean.
        alpha: 0 takes the direction away, 1 leaves it.
        heads: (layer, head) pairs; None: all.

    Raises:
        TypeError, ValueError: as of `key_prior`; or a pair names no head.
    """
    inner = unwrap(model)
    found, layouts = directions(inner), head_layouts(inner)
    chosen = [torch.zeros(layout.num_heads, dtype=torch.bool) for layout in layouts]
    for layer, head in _pairs(inner, heads):
        chosen[layer][head] = True
    breaking: Any = getattr(inner, NAME, None)
    with ExitStack() as stack:
        if alpha != 1.0:
            if any(direction.late for direction in found):
                stack.callback(_put_back, breaking.mean, breaking.mean.clone())
            for layer, (layout, direction) in enumerate(zip(layouts, found)):
                factor = chosen[layer].to(direction.learned)[:, None] * (alpha - 1.0)
                if direction.late and bool(chosen[layer].any()):
                    breaking.set_mean("query", layer, ((1.0 + factor) * direction.unlearned).flatten())
                if bool((factor * direction.before).any()):
                    hook = _Add(layout.query, factor * direction.before)
                    stack.callback(inner.get_submodule(layout.query.path).register_forward_hook(hook).remove)
        yield


@torch.no_grad()
def _put_back(buffer: Tensor, numbers: Tensor) -> None:
    buffer.copy_(numbers)


class _Add:
    """Forward hook of a query projection: adds a vector [H, D] to the queries in what it returns."""

    def __init__(self, projection: Projection, vector_HD: Tensor) -> None:
        self.projection, self.vector_HD = projection, vector_HD

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        row = torch.zeros(output.shape[-1], device=output.device, dtype=output.dtype)
        self.projection.put_head_biases(row, self.vector_HD)
        return output + row


def _pairs(model: nn.Module, heads: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    layouts = head_layouts(model)
    if heads is None:
        return [(layer, head) for layer, layout in enumerate(layouts) for head in range(layout.num_heads)]
    for layer, head in heads:
        if not 0 <= layer < len(layouts) or not 0 <= head < layouts[layer].num_heads:
            raise ValueError(
                f"there is no head {head} in layer {layer}: this model has {len(layouts)} layers of "
                f"{layouts[0].num_heads} heads, counted from 0"
            )
    if not heads:
        raise ValueError("name at least one head, as (layer, head), or None for all")
    return [(int(layer), int(head)) for layer, head in heads]


@dataclass(frozen=True, kw_only=True, eq=False)
class Steering:
    """Attention and loss of one text under directions of several lengths. Windows are pairs: they stand side by side.

    Attributes:
        alphas: the lengths, 1 the model's own.
        heads: the (layer, head) pairs that were scaled.
        classes: of the tokens.
        loss: float64 [A, W]: mean cross-entropy of a window, nats a token.
        class_loss: float64 [A, W, C]: its sum over the targets of a class.
        class_targets: int64 [W, C]: how many there are.
        attention: float64 [A, W, C]: share of attention that goes to keys of a class, mean over the scaled heads and
            the queries of a window (but the first, which has one key).
    """

    alphas: tuple[float, ...]
    heads: tuple[tuple[int, int], ...]
    classes: TokenClasses
    loss: Tensor
    class_loss: Tensor
    class_targets: Tensor
    attention: Tensor

    def class_loss_changes(self) -> Tensor:
        """float64 [A, W, C]: each window's share in the change of the mean loss of a class against alpha = 1.

        Their mean over windows is the change; NaN where no target is of the class.
        """
        changes = self.class_loss - self.class_loss[self.alphas.index(1.0)]
        return changes / self.class_targets.double().mean(0)


def steer(
    model: nn.Module,
    tokens: Tensor,
    classes: TokenClasses,
    *,
    alphas: Sequence[float] = ALPHAS,
    heads: Sequence[tuple[int, int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Steering:
    """Scale the preferred direction and measure what follows, through all layers.

    Args:
        model: a causal language model with a preferred direction; it is left as it was.
        tokens: int64 [W, T]. The loss is that of the last T − 1 tokens, each given those before it.
        classes: of these tokens.
        alphas: lengths of the direction; 1 is measured too if it is not among them.
        heads: (layer, head) pairs; None: all.
        progress: called with the runs of the model done, and all of them.

    Raises:
        TypeError, ValueError: as of `key_prior`; or a pair names no head, or the model returns no logits.
    """
    alphas = tuple(sorted({*map(float, alphas), 1.0}))
    inner = unwrap(model)
    pairs = _pairs(inner, heads)
    layouts = head_layouts(inner)
    step = batch_size(layouts[0].num_heads, tokens.shape[1])
    windows, length = tokens.shape
    num_classes = len(classes.names)
    loss = torch.zeros(len(alphas), windows, dtype=torch.float64)
    class_loss = torch.zeros(len(alphas), windows, num_classes, dtype=torch.float64)
    attention = torch.zeros(len(alphas), windows, num_classes, dtype=torch.float64)
    of_layer: dict[int, list[int]] = {}
    for layer, head in pairs:
        of_layer.setdefault(layer, []).append(head)
    number, first = 0, 0

    def each(heads: Heads) -> None:
        mine = of_layer[heads.layer.number]
        weights = heads.layer.attention(heads.logits(heads.query_BHTD))[:, mine, 1:]
        mass = weights.sum((1, 2)) / (length - 1)  # of each key, summed over heads
        members = classes.members[:, first : first + len(mass)].to(mass)
        attention[number, first : first + len(mass)] += torch.einsum("bj,cbj->bc", mass, members).double().cpu()

    calls = len(alphas) * -(-windows // step)
    for number, alpha in enumerate(alphas):
        # The scaling is hooked first, so that what is observed is scaled.
        with scaled_direction(inner, alpha, heads=pairs), observed(inner, each, sorted(of_layer)) as run:
            for done, first in enumerate(range(0, windows, step), 1):
                batch = tokens[first : first + step]
                found = _token_losses(run(batch), batch)
                loss[number, first : first + step] = found.mean(1)
                members = classes.members[:, first : first + step, 1:].double()
                class_loss[number, first : first + step] = torch.einsum("bt,cbt->bc", found, members)
                if progress is not None:
                    progress(number * calls // len(alphas) + done, calls)
    return Steering(
        alphas=alphas,
        heads=tuple(pairs),
        classes=classes,
        loss=loss,
        class_loss=class_loss,
        class_targets=classes.members[..., 1:].sum(-1).T,
        attention=attention / len(pairs),
    )


def _token_losses(output: Any, tokens: Tensor) -> Tensor:
    """Cross-entropy of all tokens but the first, float64 [B, T - 1] on the CPU."""
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple):
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise ValueError("this model returns no logits, so it has no loss: take the model with its language head")
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    targets = tokens[:, 1:].to(logits.device)
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").double().cpu()
