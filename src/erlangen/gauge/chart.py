r"""Training in a chart of the quotient: of every head only the numbers that its function depends on.

In the gauge in which ``width`` columns of A are the identity, a pair (A, B) has nothing left that could be changed
without changing AᵀB (`dressed_heads`). `charted` brings heads there and holds the block: of (p + q) k numbers of a head
(p - k + q) k move. The columns are chosen so that no entry of A is above 2; when one has grown beyond 4, the head goes
to another chart, and what the optimiser keeps goes along:

- a sum of gradients in a chart is that of all numbers without those of the block. The latter follow, for a gradient is
  horizontal: g_A Aᵀ = B g_Bᵀ. So it is completed, carried (`_head_state`) and cut to the new block: exactly the
  gradient in the new chart. A velocity is carried, and what it does to the block is taken off along the gauge;
- squares are completed and carried as variances of independent numbers;
- SOAP keeps squares in a basis of its own: its first moment starts from zero at entries that were in the block.

Under rotary positions the block is one complex entry 1 of the queries in every plane, and the identity in the
coordinates that are not turned.

A run does not depend on the gauge in which it starts, whatever the optimiser: the same function has the same chart. It
does depend on the chart: an optimiser's metric, and with it its steps, is of the numbers it sees. Those are not of one
size: entries of A are of order 1, those of B are products of weights.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import forms
from ._head_state import (
    SUMS,
    Move,
    Reduction,
    by_side,
    carry,
    check_state,
    first_moments,
    read,
    squares,
    steady_velocity,
)
from ._pairs import SECTORS, HeadPair
from .dressed_heads import _dress
from .layout import Rotary

_LARGEST = 4.0  # of an entry of A before its head changes the chart

# --- the block --------------------------------------------------------------------------------------------------------
# Its entries have one order everywhere: coordinates that positions turn, then the square of the others, row by row.


def _rest(width: int, rotary: Rotary | None) -> slice:
    """The coordinates that positions do not turn."""
    return slice(0 if rotary is None else rotary.dim, width)


def _places(pivots: Tensor, columns: int, rotary: Rotary | None) -> Tensor:
    """Where the entries of the block are in A [width · columns]: int64 [heads, entries]."""
    rows = _rest(pivots.shape[1], rotary)
    row = columns * torch.arange(rows.stop, device=pivots.device)
    turned = row[: rows.start] + pivots[:, : rows.start]
    return torch.cat([turned, (row[rows, None] + pivots[:, None, rows]).flatten(1)], dim=1)


def _identity(width: int, rotary: Rotary | None, device: torch.device) -> Tensor:
    """What the entries of the block are held at: [entries]."""
    rows = _rest(width, rotary)
    turned = torch.zeros(rows.start, device=device)
    if rotary is not None:
        turned[rotary.planes(device)[:, 0]] = 1.0
    return torch.cat([turned, torch.eye(rows.stop - rows.start, device=device).flatten()])


def _along(matrix: Tensor, rotary: Rotary | None, sign: int = -1) -> Tensor:
    """The derivative along A → (1 + Ω) A, from its matrix [heads, width, width], as entries of the block.

    A number of a plane turns and scales both coordinates at once, so that their parts add up (squares: sign 1).
    """
    rows = _rest(matrix.shape[-1], rotary)
    turned = matrix.new_zeros(matrix.shape[0], rows.start)
    if rotary is not None:
        one, two = rotary.planes(matrix.device).unbind(1)
        turned[:, one] = matrix[:, one, one] + matrix[:, two, two]
        turned[:, two] = matrix[:, two, one] + sign * matrix[:, one, two]
    return torch.cat([turned, matrix[:, rows, rows].flatten(1)], dim=1)


def _motion(entries: Tensor, width: int, rotary: Rotary | None) -> Tensor:
    """The Ω [heads, width, width] that moves the block by these entries."""
    rows = _rest(width, rotary)
    motion = entries.new_zeros(len(entries), width, width)
    if rotary is not None:
        planes = rotary.planes(entries.device)
        numbers = torch.complex(entries[:, planes[:, 0]], entries[:, planes[:, 1]])
        motion[:, : rows.start, : rows.start] = forms.plane_matrices(numbers, planes)
    motion[:, rows, rows] = entries[:, rows.start :].unflatten(1, (rows.stop - rows.start, -1))
    return motion


def find_pivots(first: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """Columns of A that are columns of the identity, to the bit.

    Args:
        first: [heads, width, columns].
        rotary: as of `erlangen.gauge.dress_heads`.

    Returns:
        int64 [heads, width] as of `erlangen.gauge.HeadDressing.pivots`, and bool [heads]: whether a head has them all.
    """
    rows = _rest(first.shape[1], rotary)
    found = torch.zeros(first.shape, dtype=torch.bool, device=first.device)
    rest = first[:, rows]
    found[:, rows] = (rest == 1) & ((rest != 0).sum(dim=1, keepdim=True) == 1)
    if rotary is not None:
        one, two = rotary.planes(first.device).unbind(1)
        found[:, one] = found[:, two] = (first[:, one] == 1) & (first[:, two] == 0)
    return found.to(torch.uint8).argmax(dim=2), found.any(dim=2).all(dim=1)


# --- the optimiser ----------------------------------------------------------------------------------------------------


class _Charted(Reduction):
    name = "charted"

    def __init__(self, optimizer: Optimizer, model: nn.Module, sectors: Collection[str]) -> None:
        self.pivots: dict[tuple[int, str], Tensor] = {}
        self.held: dict[tuple[int, str], list[tuple[str, tuple[Tensor, ...], Tensor]]] = {}
        super().__init__(optimizer, model, sectors)

    def settle(self) -> None:
        check_state(self.optimizer)
        for pair in self.pairs:
            pivots, whole = find_pivots(pair.factors(self._stored)[0], pair.rotary)
            self._choose(pair, pivots)
            if not whole.all():
                self._change(pair, ~whole)

    def before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        super().before_step(args, kwargs)
        if not self._intact():
            self.settle()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._clear_gradients()
            return None

        def cleared() -> Any:
            loss = closure()
            self._clear_gradients()
            return loss

        if "closure" in kwargs:
            return args, kwargs | {"closure": cleared}
        return (args[0], cleared, *args[2:]), kwargs

    def after_step(self) -> None:
        check_state(self.optimizer)
        for pair in self.pairs:
            self._hold(pair)
        grown = [self._grown(pair) for pair in self.pairs]
        if torch.cat(grown).any():
            for pair, heads in zip(self.pairs, grown):
                if heads.any():
                    self._change(pair, heads, trained=True)

    def _stored(self, name: str) -> Tensor:
        return self.parameters[name].detach()

    def _entries(self) -> Iterator[tuple[str, tuple[Tensor, ...], Tensor]]:
        for pair in self.pairs:
            yield from self.held[pair.layer, pair.sector]

    def _intact(self) -> bool:
        same = [(self._stored(name)[places] == values).all() for name, places, values in self._entries()]
        return bool(torch.stack(same).all())

    def _grown(self, pair: HeadPair) -> Tensor:
        largest = [factor.abs().amax(dim=(1, 2)) for factor in pair.factors(self._stored)]
        return (largest[0] > _LARGEST) & largest[0].isfinite() & largest[1].isfinite()  # not where a run has diverged

    def _clear_gradients(self) -> None:
        for name, places, _ in self._entries():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient[places] = 0.0

    def _hold(self, pair: HeadPair) -> None:
        """The block is the identity, and no first moment moves it."""
        with torch.no_grad():
            for name, places, values in self.held[pair.layer, pair.sector]:
                self._stored(name)[places] = values
                state = self.optimizer.state.get(self.parameters[name], {})
                moments = [state[key] for key in SUMS if isinstance(state.get(key), Tensor)]
                for moment in moments:
                    if moment[places].any():
                        with steady_velocity(self.optimizer):
                            moment[places] = 0.0

    def _choose(self, pair: HeadPair, pivots: Tensor) -> None:
        """Take these columns for the block, and note where in the stored tensors it is."""
        offset, numbers, tensors = 0, dict[str, Tensor](), list[tuple[str, int, int]]()
        for name in pair.names:
            parameter = self.parameters[name]
            every = torch.arange(offset, offset + parameter.numel(), device=parameter.device)
            numbers[name] = every.view(parameter.shape)
            tensors.append((name, offset, offset + parameter.numel()))
            offset += parameter.numel()
        first = pair.factors(lambda name: numbers[name])[0]
        places = first.flatten(1).gather(1, _places(pivots, first.shape[2], pair.rotary)).flatten()
        values = _identity(pair.width, pair.rotary, pivots.device).repeat(len(pivots))
        self.pivots[pair.layer, pair.sector] = pivots
        held = self.held[pair.layer, pair.sector] = []
        for name, start, stop in tensors:
            here = (places >= start) & (places < stop)
            if here.any():
                parameter = self.parameters[name]
                where = torch.unravel_index(places[here] - start, parameter.shape)
                held.append((name, where, values[here].to(parameter.dtype)))

    def _change(self, pair: HeadPair, heads: Tensor, *, trained: bool = False) -> None:
        """Bring these heads [heads] into a chart of their own; trained: they were in one, and so was the state."""
        first, second = read(pair, self.parameters)
        dtype, where = self.parameters[pair.first.weight].dtype, f"layer {pair.layer}, {pair.sector}"
        # In a chart no head can fail, and only those that leave theirs need a new one.
        index = heads.nonzero().flatten() if trained else torch.arange(len(heads), device=heads.device)
        form = _dress(first[index], second[index], "identity", pair.rotary, dtype, None, where)
        assert form.pivots is not None
        if trained:
            self._complete(pair, first, second)

        def at_heads(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(heads.view(-1, *[1] * (old.ndim - 1)), old.index_copy(0, index, new), old)

        pair.put(self._stored, at_heads(form.first, first), at_heads(form.second, second))
        self._choose(pair, at_heads(form.pivots, self.pivots[pair.layer, pair.sector]))
        same = torch.eye(pair.width, dtype=first.dtype, device=first.device).expand(len(first), -1, -1)
        move = Move(pair, at_heads(form.left, same), at_heads(form.right, same))
        carry(self.optimizer, self.parameters, [move])
        self._settle_state(pair)

    def _complete(self, pair: HeadPair, first: Tensor, second: Tensor) -> None:
        """Gradients of all numbers from those in the chart: g_A Aᵀ = B g_Bᵀ gives those of the block."""
        places = _places(self.pivots[pair.layer, pair.sector], first.shape[2], pair.rotary)

        def put(tensors: dict[str, Tensor], complete: Callable[[Tensor, Tensor], Tensor]) -> None:
            of_first, of_second = read(pair, tensors)
            entries = complete(of_first, of_second)
            of_first.view(len(entries), -1).scatter_(1, places, entries)
            pair.put(lambda name: tensors[name], of_first, of_second)

        def gradient(of_first: Tensor, of_second: Tensor) -> Tensor:
            return _along(second @ of_second.mT - of_first @ first.mT, pair.rotary)

        def square(of_first: Tensor, of_second: Tensor) -> Tensor:
            return _along(second.square() @ of_second.mT + of_first @ first.square().mT, pair.rotary, sign=1)

        if by_side(self.optimizer, self.parameters, pair):
            return
        for tensors, velocity in first_moments(self.optimizer, self.parameters, pair):
            if not velocity:
                put(tensors, gradient)
        for tensors in squares(self.optimizer, self.parameters, pair):
            put(tensors, square)

    def _settle_state(self, pair: HeadPair) -> None:
        """Nothing in the state moves the block: a gradient leaves it out, a velocity moves along the gauge instead."""
        first, second = read(pair, self.parameters)
        places = _places(self.pivots[pair.layer, pair.sector], first.shape[2], pair.rotary)
        with steady_velocity(self.optimizer):
            for tensors, velocity in first_moments(self.optimizer, self.parameters, pair):
                of_first, of_second = read(pair, tensors)
                entries = of_first.flatten(1).gather(1, places)
                if velocity:
                    motion = _motion(entries, pair.width, pair.rotary)
                    of_first, of_second = of_first - motion @ first, of_second + motion.mT @ second
                of_first.view(len(entries), -1).scatter_(1, places, 0.0)
                pair.put(lambda name, tensors=tensors: tensors[name], of_first, of_second)
        for tensors in squares(self.optimizer, self.parameters, pair):
            of_first, of_second = read(pair, tensors)
            of_first.view(len(of_first), -1).scatter_(1, places, 0.0)
            pair.put(lambda name, tensors=tensors: tensors[name], of_first, of_second)


def charted(optimizer: Optimizer, model: nn.Module, sectors: Collection[str] = SECTORS) -> Optimizer:
    """Let an optimiser move only numbers of the heads of a model that their function depends on.

    Heads are brought to the gauge with an identity block at once, without a change of their function. At each step the
    gradients of the block are set to zero, and what the step does to the block all the same (weight decay, Muon) is
    undone: its numbers are 0 and 1 to the bit. A gradient that is clipped before the step still has it.

    The block is found from the weights when others were loaded; state and weights may be loaded in whatever order after
    this call, and the state loads into an optimiser without this too.

    Args:
        optimizer: any that keeps first and second moments by names of torch: SGD, Adam and its kin, RMSprop, Adagrad,
            Muon, and all of `erlangen.optim`.
        model: one whose layout is known. Wrappers of compile and DDP are seen through.
        sectors: "qk" (queries and keys), "vo" (values and output), or both.

    Returns:
        The same optimiser. `release` takes this off.

    Raises:
        TypeError: no layout is known for the model.
        ValueError: the optimiser is treated already; it owns parameters that are not of the model, or only a part of a
            pair; a head without full rank, which is named; a sector without a continuous gauge; a model with unlearned
            biases; weights that are not here as a whole; state whose meaning is not known (found out at the first step
            if there is none yet).
    """
    _Charted(optimizer, model, sectors)
    return optimizer
