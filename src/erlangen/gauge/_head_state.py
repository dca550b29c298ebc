r"""What an optimiser keeps of the heads of a model, carried along when those heads change their numbers.

A pair (A, B) of a head counts only as AᵀB (`_pairs`). In the numbers A' = L A, B' = R B with R = L⁻ᵀ it is the same
function, and

- sums of gradients are gradients: g_A' = R g_A, g_B' = L g_B, exactly;
- velocities of weights (the momentum of RMSprop, which is made of steps) follow the weights: u_A' = L u_A;
- averages of squares of gradients do not follow from those in other numbers. Taken for variances of independent
  numbers they become v_A' = (R ∘ R) v_A, v_B' = (L ∘ L) v_B: exact where L is a permutation, signs or scales, and an
  approximation where it mixes rows;
- SOAP's average of G Gᵀ over the side of the heads becomes N (G Gᵀ) Nᵀ, exactly. Its eigenbasis Q becomes O Q with the
  rotation O nearest to N, and the squares, which are in that basis, follow as variances: exact where N is a rotation.
  What it keeps for the other side stays as it is;
- the velocity of ECD is carried as a gradient, and all of it rescaled to the length that it had.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._fingerprint import fingerprint
from ._pairs import HeadPair, check_rank, head_pairs, parameters_by_name, trained_pairs
from ._weights import ModuleWeights
from .layout import Projection, model_layout

# Names under which optimisers keep sums of gradients, sums of their squares, what has no coordinates, and SOAP's lists.
SUMS = ("momentum_buffer", "momentum", "exp_avg", "grad_avg")
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
_COUNTS = ("step", "mu_product")
_SIDES = ("gram", "basis")


@dataclass(frozen=True)
class Move:
    """A change of the numbers of one pair.

    Attributes:
        pair: of which.
        left, right: float64 [key/value heads, width, width]: A' = left A, B' = right B, right = left⁻ᵀ.
    """

    pair: HeadPair
    left: Tensor
    right: Tensor


def read(pair: HeadPair, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The factors of a pair in float64, copied."""
    first, second = pair.factors(lambda name: tensors[name].detach())
    whole = torch.contiguous_format
    return (
        first.to(torch.float64, copy=True, memory_format=whole),
        second.to(torch.float64, copy=True, memory_format=whole),
    )


def check_state(optimizer: Optimizer) -> None:
    """Everything that an optimiser keeps has a known meaning.

    Raises:
        ValueError: it keeps something else, which is named.
    """
    for state in optimizer.state.values():
        unknown = sorted(str(key) for key in state if key not in {*SUMS, *SQUARES, *_COUNTS, *_SIDES})
        if unknown:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {', '.join(unknown)}, and what becomes of it when heads change "
                "their numbers is not known: use an optimiser that keeps first and second moments "
                f"({', '.join((*SUMS, *SQUARES))})"
            )


def _kept(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], pair: HeadPair, key: str
) -> dict[str, Tensor] | None:
    """A kind of state of the tensors of a pair, zeros where there is none; None if there is none at all."""
    found: dict[str, Tensor] = {}
    for name in pair.names:
        parameter = parameters[name]
        value = parameter.grad if key == "gradient" else optimizer.state.get(parameter, {}).get(key)
        if isinstance(value, Tensor):
            found[name] = value
    if not found:
        return None
    return {name: found[name] if name in found else torch.zeros_like(parameters[name]) for name in pair.names}


def first_moments(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], pair: HeadPair
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """The gradients of a pair and the sums of gradients that an optimiser keeps; True: made of steps, not of gradients.

    RMSprop's momentum is of that kind.
    """
    states = [optimizer.state.get(parameters[name], {}) for name in pair.names]
    for key in ("gradient", *SUMS):
        if (tensors := _kept(optimizer, parameters, pair, key)) is not None:
            yield tensors, key == "momentum_buffer" and any("square_avg" in state for state in states)


def squares(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], pair: HeadPair
) -> Iterator[dict[str, Tensor]]:
    """The averages of squares of gradients of a pair, where they are of its own numbers (SOAP's are not)."""
    for key in SQUARES:
        if (tensors := _kept(optimizer, parameters, pair, key)) is not None and not by_side(
            optimizer, parameters, pair
        ):
            yield tensors


def by_side(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], pair: HeadPair) -> bool:
    """Whether the squares of a pair are kept in a basis for each side of a matrix (SOAP)."""
    return any("basis" in optimizer.state.get(parameters[name], {}) for name in pair.names)


def carry(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], moves: Iterable[Move]) -> None:
    """Carry gradients and the state of an optimiser along, in place. The weights themselves are left alone."""
    check_state(optimizer)
    with steady_velocity(optimizer):
        for move in moves:
            _carry_one(optimizer, parameters, move)


def _carry_one(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], move: Move) -> None:
    pair, left, right = move.pair, move.left, move.right

    def put(tensors: Mapping[str, Tensor], of_first: Tensor, of_second: Tensor) -> None:
        first, second = read(pair, tensors)
        pair.put(lambda name: tensors[name], of_first @ first, of_second @ second)

    for tensors, velocity in first_moments(optimizer, parameters, pair):
        put(tensors, *((left, right) if velocity else (right, left)))
    for tensors in squares(optimizer, parameters, pair):
        put(tensors, right.square(), left.square())
    if by_side(optimizer, parameters, pair):
        for projection, matrix in ((pair.first, right), (pair.second, left)):
            for name in (projection.weight, projection.bias_name if projection.side == "out" else None):
                if name is not None and (state := optimizer.state.get(parameters[name])):
                    _carry_sides(state, projection, matrix)


def _carry_sides(state: dict[str, Any], projection: Projection, matrix: Tensor) -> None:
    """SOAP: the Gram matrix, basis and squares of the side of one tensor on which the heads are."""
    kept = state["exp_avg_sq"]
    axis = projection._axis if kept.ndim > 1 else 0
    whole = _on_all_rows(projection, matrix, kept.shape[axis])
    gram, basis = state["gram"][axis], state["basis"][axis]
    in_basis = whole
    if gram is not None:
        u, _, vh = torch.linalg.svd(matrix)
        old = basis.double()
        new = _on_all_rows(projection, u @ vh, kept.shape[axis]) @ old
        in_basis = new.mT @ whole @ old
        gram.copy_(whole @ gram.double() @ whole.mT)
        basis.copy_(new)
    carried = torch.tensordot(in_basis.square(), kept.double().movedim(axis, 0), dims=1)
    kept.copy_(carried.movedim(0, axis))


def _on_all_rows(projection: Projection, matrix: Tensor, size: int) -> Tensor:
    """[key/value heads, width, width] as one matrix over all rows of a map; 1 where no head is."""
    whole = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    rows = projection._index(matrix.device).view(len(projection.starts), projection.width)
    heads = matrix.repeat_interleave(len(rows) // len(matrix), dim=0)
    whole[rows[:, :, None], rows[:, None, :]] = heads
    return whole


@contextmanager
def steady_velocity(optimizer: Optimizer) -> Iterator[None]:
    """What is done inside leaves the length of ECD's velocity, over all parameters, as it was."""
    velocities = [state["momentum"] for state in optimizer.state.values() if isinstance(state.get("momentum"), Tensor)]

    def length() -> Tensor:
        return torch.stack([torch.linalg.vector_norm(v, dtype=torch.float64).cpu() for v in velocities]).norm()

    before = length() if velocities else None
    yield
    if before is not None:
        ratio = float(before / length().clamp_min(1e-300))
        for velocity in velocities if ratio != 1.0 else ():
            velocity.mul_(ratio)


# --- one way of treating the heads at an optimiser --------------------------------------------------------------------


def claim(optimizer: Optimizer, reduction: Any) -> None:
    """Note on an optimiser that its heads are treated.

    Args:
        optimizer: which.
        reduction: who does; with a ``name`` and a method ``remove``.

    Raises:
        ValueError: they are treated already.
    """
    present = getattr(optimizer, "gauge_reduction", None)
    if present is not None:
        raise ValueError(
            f"the heads of this optimiser are treated already, by {present.name}: one way at a time. Take that off "
            "first, with erlangen.gauge.release(optimizer)"
        )
    optimizer.gauge_reduction = reduction  # type: ignore[attr-defined]


class Reduction:
    """Hooks on an optimiser that keep the heads of a model in chosen numbers.

    Subclasses say which with `settle`, and register their own hooks. At the start the heads are settled, and what they
    were before is kept until the first step: a state that is loaded meanwhile belongs to them.

    Attributes:
        pairs: those that the optimiser moves.
        parameters: of the model, by name.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, sectors: Collection[str]) -> None:
        claim(optimizer, self)
        try:
            self._begin(optimizer, model, sectors)
        except BaseException:
            optimizer.gauge_reduction = None  # type: ignore[attr-defined]
            raise

    def _begin(self, optimizer: Optimizer, model: nn.Module, sectors: Collection[str]) -> None:
        self.optimizer, self.model = optimizer, model
        self.pairs = trained_pairs(optimizer, model, head_pairs(model, sectors))
        self.parameters = parameters_by_name(model)
        check_rank(self.pairs, self.parameters)
        check_state(optimizer)
        names = dict.fromkeys(name for pair in self.pairs for name in pair.names)
        before = {name: self.parameters[name].detach().clone() for name in names}
        self.settle()
        self._start: tuple[dict[str, Tensor], str] | None = (before, self._fingerprint())
        self.handles = [
            optimizer.register_load_state_dict_post_hook(lambda _: self.loaded()),
            optimizer.register_step_pre_hook(lambda _, args, kwargs: self.before_step(args, kwargs)),
            optimizer.register_step_post_hook(lambda *_: self.after_step()),
        ]

    @property
    def name(self) -> str:
        """Of the function that the user called."""
        raise NotImplementedError

    def settle(self) -> None:
        """Bring the heads, with gradients and state, into the chosen numbers."""
        raise NotImplementedError

    def before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Called before a step; may replace its arguments."""
        self._start = None
        return None

    def after_step(self) -> None:
        """Called after a step."""

    def loaded(self) -> None:
        """Called when a state was loaded: it is of the weights as they were before, or of others still to be loaded."""
        if self._start is not None and self._fingerprint() == self._start[1]:
            with torch.no_grad():
                for name, tensor in self._start[0].items():
                    self.parameters[name].copy_(tensor)
        self._start = None

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def _fingerprint(self) -> str:
        return fingerprint(model_layout(self.model), ModuleWeights(self.model))


def release(optimizer: Optimizer) -> Optimizer:
    """Take off what `horizontal`, `dressed` or `charted` put on an optimiser; weights and state stay as they are.

    Returns:
        The same optimiser.

    Raises:
        ValueError: there is nothing to take off.
    """
    reduction = getattr(optimizer, "gauge_reduction", None)
    if reduction is None:
        raise ValueError("nothing treats the heads of this optimiser: there is nothing to take off")
    reduction.remove()
    optimizer.gauge_reduction = None  # type: ignore[attr-defined]
    return optimizer
