"""Steps without their part along the gauge, for any optimiser.

The gradient of a model has no part along the gauge of its heads (`_vertical`); a step has one, from momentum that was
gathered at other weights, from preconditioners that see single numbers, from weight decay and from rounding. It changes
no output, to first order, and moves the weights along their orbit all the same.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._head_state import claim
from ._pairs import HeadPair, check_rank, head_pairs, parameters_by_name, trained_pairs
from ._vertical import Batch, batches, vertical


class _Projection:
    """The hooks of one optimiser."""

    name = "horizontal"

    def __init__(self, optimizer: Optimizer, model: nn.Module, pairs: tuple[HeadPair, ...]) -> None:
        claim(optimizer, self)
        self.parameters = parameters_by_name(model)
        self.pairs = pairs
        self.names = tuple(dict.fromkeys(name for pair in pairs for name in pair.names))
        self.before: dict[str, Tensor] = {}
        self.batches: tuple[Batch, ...] = ()
        self.handles = (
            optimizer.register_step_pre_hook(self.remember),
            optimizer.register_step_post_hook(self.project),
        )

    def _weight(self, name: str) -> Tensor:
        return self.parameters[name].detach()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def remember(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Keep the weights of the pairs, before a step."""
        with torch.no_grad():
            now = [self.parameters[name].detach() for name in self.names]
            kept = [self.before.get(name) for name in self.names]
            if any(old is None or (old.dtype, old.device) != (new.dtype, new.device) for old, new in zip(kept, now)):
                self.before = {name: tensor.clone() for name, tensor in zip(self.names, now)}
                self.batches = batches(self.pairs, self.parameters)
            else:
                torch._foreach_copy_(list(self.before.values()), now)

    def project(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Take back what the step moved along the gauge."""
        with torch.no_grad():
            for batch in self.batches:
                first, second = batch.factors(self.before.__getitem__)
                new_first, new_second = batch.factors(self._weight)
                d_first, d_second = new_first - first, new_second - second
                if not torch.stack([d_first.sum(), d_second.sum()]).isfinite().all():
                    layers = ", ".join(str(pair.layer) for pair in batch.pairs)
                    raise ValueError(
                        f"after this step weights of heads are not finite (sector {batch.pairs[0].sector}, among "
                        f"layers {layers}): it went astray. Go back to a checkpoint, and lower the learning rate"
                    )
                along_first, along_second = vertical(first, second, d_first, d_second, batch.rotary)
                batch.put(self._weight, new_first - along_first, new_second - along_second)


def horizontal(optimizer: Optimizer, model: nn.Module, sectors: Collection[str] = ("qk", "vo")) -> Optimizer:
    """Let an optimiser move the heads of a model across their gauge only, never along it.

    After each step, the part of the weights' change that is along the gauge of queries and keys, and of values and
    output, is taken back: the change becomes the shortest one (in the sum of squares) with the same effect on the
    products of the heads, to first order. That is the projection of the Frobenius metric, which rotations of a head do
    not change, but other factors do: two representatives of one function still take different paths, unless the
    optimiser is `QuotientSGD`.

    The gradient has no such part, so plain gradient descent stays as it is, up to rounding. What is taken back comes
    from momentum, from the preconditioners of Adam, Muon and the like, from weight decay (whose pull to balanced heads
    is all along the gauge) and from rounding.

    State and ``state_dict`` of the optimiser are as without: checkpoints go both ways. Memory: one copy of the weights
    of the heads. `release` removes it.

    Args:
        optimizer: any of ``torch.optim`` or `erlangen.optim`, of parameters of the model.
        model: one whose layout is known; wrappers of compile and DDP are seen through.
        sectors: "qk" (queries and keys), "vo" (values and output), or both.

    Returns:
        The same optimiser.

    Raises:
        TypeError: no layout is known for the model.
        ValueError: the optimiser owns parameters that are not of the model, moves only a part of a pair, moves none, or
            has a reduction already; queries and keys are normalised (their gauge is trivial: use ``("vo",)``); the
            model has unlearned biases; a head is not of full rank; weights are not whole, or not described.
    """
    pairs = trained_pairs(optimizer, model, head_pairs(model, sectors))
    check_rank(pairs, parameters_by_name(model))
    _Projection(optimizer, model, pairs)
    return optimizer
