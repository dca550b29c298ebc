"""Training in dressed representatives: heads brought to one gauge again and again, the optimiser's state along.

Momentum, preconditioners, weight decay and rounding move the weights of a head along its gauge, where the loss does not
change. `dressed` undoes that every few steps. Between two dressings the optimiser is as it was; at a dressing the
function of the model stays, and what the optimiser keeps goes along (`_head_state` says how, and how exactly).

Runs of the same function in two gauges start from the same representative, and stay the same for every optimiser, Adam
among them: what is left of the gauge is the choice of the representative, which is the same for both.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._head_state import Move, Reduction, carry, check_state, read
from ._pairs import SECTORS
from .dressed_heads import HeadKind, _dress

_COUNT = "steps_dressed"  # key of the first param group: how many steps were taken


class _Dressed(Reduction):
    name = "dressed"

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, every: int, kind: HeadKind, sectors: Collection[str]
    ) -> None:
        self.every, self.kind = every, kind
        self.late = False  # a state was loaded whose weights were never dressed
        super().__init__(optimizer, model, sectors)
        optimizer.param_groups[0].setdefault(_COUNT, 0)

    def settle(self) -> None:
        check_state(self.optimizer)
        moves = []
        for pair in self.pairs:
            first, second = read(pair, self.parameters)
            if not (first.isfinite().all() and second.isfinite().all()):
                continue  # the run has diverged, and is not helped by an error here
            dtype = self.parameters[pair.first.weight].dtype
            form = _dress(first, second, self.kind, pair.rotary, dtype, None, f"layer {pair.layer}, {pair.sector}")
            # A head that is losing rank in training would lose it for good: it waits in its numbers.
            whole = (form.rank == pair.width)[:, None, None]
            one = torch.eye(pair.width, dtype=first.dtype, device=first.device)
            pair.put(self._stored, torch.where(whole, form.first, first), torch.where(whole, form.second, second))
            moves.append(Move(pair, torch.where(whole, form.left, one), torch.where(whole, form.right, one)))
        carry(self.optimizer, self.parameters, moves)

    def before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().before_step(args, kwargs)
        if self.late:
            self.settle()
            self.late = False

    def after_step(self) -> None:
        group = self.optimizer.param_groups[0]
        group[_COUNT] = group.get(_COUNT, 0) + 1
        if group[_COUNT] == 1:
            check_state(self.optimizer)  # at once, not only when the first dressing is due
        if group[_COUNT] % self.every == 0:
            self.settle()

    def loaded(self) -> None:
        group = self.optimizer.param_groups[0]
        if group.get(_COUNT) == 0:
            return  # a start like ours
        super().loaded()
        self.late = _COUNT not in group
        group.setdefault(_COUNT, 0)

    def _stored(self, name: str) -> Tensor:
        return self.parameters[name].detach()


def dressed(
    optimizer: Optimizer,
    model: nn.Module,
    every: int = 10,
    kind: HeadKind = "balanced",
    sectors: Collection[str] = SECTORS,
) -> Optimizer:
    """Keep the heads of a model in a dressed representative while an optimiser trains it.

    Heads are dressed at once and after every so many steps. Their function does not change by it; computed in float64
    and stored in the parameters' dtype. First moments go along exactly, squares of gradients as if their numbers were
    independent. Gradients that are there go along too. A head that loses full rank in training is left as it is until
    it has it again.

    The number of steps is kept in the optimiser's first param group, so that a run goes on as it would have: make the
    optimiser, call this, load weights and state, in whatever order. The state loads into an optimiser without this too.

    Args:
        optimizer: any that keeps first and second moments by names of torch: SGD, Adam and its kin, RMSprop, Adagrad,
            Muon, and all of `erlangen.optim`.
        model: one whose layout is known. Wrappers of compile and DDP are seen through.
        every: steps between two dressings.
        kind: "balanced" (heads of least norm) or "identity" (an identity block), as of `dress_heads`.
        sectors: "qk" (queries and keys), "vo" (values and output), or both.

    Returns:
        The same optimiser. `release` takes this off.

    Raises:
        TypeError: no layout is known for the model.
        ValueError: the optimiser is treated already; it owns parameters that are not of the model, or only a part of a
            pair; a head without full rank, which is named; a sector without a continuous gauge; a model with unlearned
            biases; weights that are not here as a whole; state whose meaning is not known (found out at the first step
            if there is none yet); ``every`` below 1.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every is a number of steps, at least 1, received {every!r}")
    _Dressed(optimizer, model, every, kind, sectors)
    return optimizer
