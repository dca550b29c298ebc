"""Gradient descent on what the heads of a model compute, not on how their weights write it down."""

from collections.abc import Callable, Collection
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer

from ._pairs import HeadPair, check_rank, head_pairs, parameters_by_name, trained_pairs
from ._vertical import Batch, InvariantMetric, batches, equal_norms, invariant_metric
from .layout import unwrap

_OURS = "quotient"  # key of a param group: whether its parameters are those of pairs

Named = list[tuple[str, nn.Parameter]]


class QuotientSGD(Optimizer):
    r"""Gradient descent with momentum in a metric that no gauge of the heads changes.

    With (A, B) queries and keys of a head, or values and output (`erlangen.gauge.forms`), F the gradient of the loss
    with respect to the product Aᵀ B, and s = |Aᵀ B| / √width,

        g = (B Fᵀ, A F)                                             what backward gives
        p ← momentum · p + g + weight_decay · (B Bᵀ A, A Aᵀ B) / s,   made horizontal: A p_Aᵀ = p_B Bᵀ
        A ← A − lr s (B Bᵀ)⁻¹ p_A,   B ← B − lr s (A Aᵀ)⁻¹ p_B,       then |A| = |B| by one number a head.

    Every line goes along with A → M A, B → M⁻ᵀ B, so two models of the same function stay so through training, whatever
    their gauge, up to rounding: of the square of the condition of a factor. This is the metric of Mishra, Adithya
    Apuroop, Sepulchre (arXiv 1211.1550), horizontal in closed form; s is ours. At balanced heads whose singular values
    are all equal the step is that of ``torch.optim.SGD``, decay included, so that learning rates compare. In others it
    is longer along small singular values: heads that are badly conditioned want a smaller learning rate.

    Under rotary positions the group is one complex number a plane, and so is all of this: q ← q − lr |q| / |k| p_q, and
    norms are made equal by plane. Coordinates that positions do not turn are as above.

    Everything else is left to another optimiser. Its param groups follow ours and its state is part of ours, so that
    schedulers, ``zero_grad`` and ``state_dict`` see one optimiser. Numbers of a fused weight that no pair holds
    (queries and keys, with sectors=("vo",)) get plain gradient descent with the same settings.

    Args:
        model: its trained parameters are the optimiser's.
        lr: of the pairs; a step of SGD at balanced heads.
        momentum: of the pairs.
        weight_decay: of the pairs, in the gradient as that of SGD; the velocity gets weight_decay · (A, B).
        sectors: "qk" (queries and keys), "vo" (values and output), or both; the other goes to the rest.
        rest: makes the optimiser of all other parameters from a list of (name, parameter). None: ``torch.optim.SGD``
            with the same three settings.

    State: ``"momentum_buffer"`` of the parameters of pairs, a sum of gradients as that of SGD, unless momentum is 0.
    Every param group has a key ``"quotient"``: True for the first, which is that of the pairs.

    Attributes:
        rest: the other optimiser; None where nothing is left for it. Not to be stepped by itself.

    Raises:
        TypeError: no layout is known for the model.
        ValueError: a setting is out of its range; what `horizontal` refuses; ``rest`` owns other parameters than it was
            given, or is LBFGS, which evaluates the loss many times a step. In a step: a head has become singular, or is
            not finite; its layer and number are named, and nothing was changed.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        sectors: Collection[str] = ("qk", "vo"),
        rest: Callable[[Named], Optimizer] | None = None,
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0 and 0 <= momentum < 1):
            raise ValueError(
                "lr and weight_decay are at least 0 and momentum is in [0, 1), received "
                f"lr {lr}, weight_decay {weight_decay}, momentum {momentum}"
            )
        self._parameters = parameters_by_name(model)
        trained = [entry for entry in unwrap(model).named_parameters() if entry[1].requires_grad]
        if not trained:
            raise ValueError("no parameter of this model requires a gradient")
        everything = SGD([parameter for _, parameter in trained], lr=0.0)
        self._pairs = trained_pairs(everything, model, head_pairs(model, sectors))
        check_rank(self._pairs, self._parameters)
        self._batches = batches(self._pairs, self._parameters)
        names = dict.fromkeys(name for pair in self._pairs for name in pair.names)
        owned = {id(self._parameters[name]) for name in names}
        self._others = _outside(self._pairs, self._parameters)
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self.rest: Optimizer | None = None
        self.gauge_reduction = _Itself()
        super().__init__([entry for entry in trained if id(entry[1]) in owned], {**settings, _OURS: True})
        left = [entry for entry in trained if id(entry[1]) not in owned]
        if left:
            self.rest = SGD(left, **settings) if rest is None else rest(left)
            _check_rest(self.rest, left)
            for group in self.rest.param_groups:
                group[_OURS] = False
            self.param_groups.extend(self.rest.param_groups)
            self.state.update(self.rest.state)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: the parameters are those of the model.

        Raises:
            ValueError: always, once the optimiser is made.
        """
        if self.param_groups:
            raise ValueError("QuotientSGD has the parameters of its model, and takes no others: make it anew")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``torch.optim.Optimizer.load_state_dict``."""
        groups = state_dict["param_groups"]
        if [group.get(_OURS) for group in groups] != [group[_OURS] for group in self.param_groups]:
            raise ValueError("this is not the state of a QuotientSGD with the same parameter groups")
        super().load_state_dict(state_dict)
        if self.rest is None:
            return
        # Once more by the other optimiser itself, which may keep its state in another precision.
        theirs = [group for group in groups if not group[_OURS]]
        keys = set(chain.from_iterable(group["params"] for group in theirs))
        state = {key: value for key, value in state_dict["state"].items() if key in keys}
        self.rest.load_state_dict({**state_dict, "state": state, "param_groups": theirs})
        self.param_groups = [self.param_groups[0], *self.rest.param_groups]
        self.state.update(self.rest.state)
        self._share()

    def _share(self) -> None:
        """Give the other optimiser our groups and our state, the very same objects."""
        if self.rest is not None:
            self.rest.param_groups = [group for group in self.param_groups if not group[_OURS]]
            self.rest.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both; returns the closure's loss, which the other optimiser gets too."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = tuple(pair for pair in self._pairs if any(self._gradient(name) is not None for name in pair.names))
        groups = self._batches if len(moved) == len(self._pairs) else batches(moved, self._parameters)
        # Whatever can fail comes first.
        metrics = [invariant_metric(*batch.factors(self._weight), batch.rotary, dtype=batch.dtype) for batch in groups]
        if metrics and torch.cat([metric.singular for metric in metrics]).any():
            for batch, metric in zip(groups, metrics):
                for head in metric.singular.nonzero().flatten().tolist():
                    raise ValueError(
                        f"{batch.name(head)}: a factor is singular or not finite, and has no invariant metric; nothing "
                        "was changed. Lower the learning rate, or leave the sector out"
                    )
        if self.rest is not None:
            self._share()
            self.rest.step() if closure is None else self.rest.step(lambda: cast(float, loss))
        group = self.param_groups[0]
        lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        for name, mask in self._others.items():
            self._plain(name, mask, lr, momentum, decay)
        for batch, metric in zip(groups, metrics):
            self._move(batch, metric, lr, momentum, decay)
        return loss

    def _weight(self, name: str) -> Tensor:
        return self._parameters[name].detach()

    def _gradient(self, name: str) -> Tensor | None:
        return self._parameters[name].grad

    def _gradient_or_zeros(self, name: str) -> Tensor:
        gradient = self._parameters[name].grad
        return torch.zeros_like(self._weight(name)) if gradient is None else gradient

    def _buffer(self, name: str) -> Tensor:
        state = self.state[self._parameters[name]]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(self._weight(name))
        return state["momentum_buffer"]

    def _move(self, batch: Batch, metric: InvariantMetric, lr: float, momentum: float, decay: float) -> None:
        pair = first, second = batch.factors(self._weight)
        of_first, of_second = batch.factors(self._gradient_or_zeros)
        if decay:
            more = metric.decay(first, second)
            of_first, of_second = of_first.add(more[0], alpha=decay), of_second.add(more[1], alpha=decay)
        if momentum:
            kept = batch.factors(self._buffer)
            of_first, of_second = of_first.add(kept[0], alpha=momentum), of_second.add(kept[1], alpha=momentum)
            of_first, of_second = metric.horizontal(of_first, of_second, pair)
        velocity = metric.velocity(of_first, of_second)
        first, second = first.sub(velocity[0], alpha=lr), second.sub(velocity[1], alpha=lr)
        scale = equal_norms(first, second, batch.rotary)
        batch.put(self._weight, scale * first, second / scale)
        if momentum:
            batch.put(self._buffer, of_first / scale, scale * of_second)

    def _plain(self, name: str, mask: Tensor, lr: float, momentum: float, decay: float) -> None:
        """Gradient descent for numbers of a fused weight that are of no pair."""
        weight, gradient = self._weight(name), self._gradient(name)
        if gradient is None:
            return
        total = gradient[mask].add(weight[mask], alpha=decay)
        if momentum:
            buffer = self._buffer(name)
            total = total.add(buffer[mask], alpha=momentum)
            buffer[mask] = total
        weight[mask] -= lr * total


class _Itself:
    """What says of a `QuotientSGD` that its heads are treated already."""

    name = "QuotientSGD"

    def remove(self) -> None:
        raise ValueError("QuotientSGD is a quotient by itself and nothing can be taken off it: make another optimiser")


def _outside(pairs: tuple[HeadPair, ...], parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Where tensors of pairs hold numbers that are of no pair: name -> mask.

    Raises:
        ValueError: two pairs hold the same numbers.
    """
    counts: dict[int, Tensor] = {}
    for pair in pairs:
        ones = {name: torch.zeros_like(parameters[name], dtype=torch.float32) for name in pair.names}
        pair.put(ones.__getitem__, *(torch.ones_like(part) for part in pair.factors(ones.__getitem__)))
        for name, one in ones.items():
            counts[id(parameters[name])] = counts[id(parameters[name])] + one if id(parameters[name]) in counts else one
            if (counts[id(parameters[name])] > 1).any():
                raise ValueError(
                    f"{name} is shared by several layers: its heads are of several pairs at once, whose metrics differ"
                )
    names = dict.fromkeys(name for pair in pairs for name in pair.names)
    masks = {name: counts[id(parameters[name])] == 0 for name in names}
    return {name: mask for name, mask in masks.items() if mask.any()}


def _check_rest(rest: Optimizer, given: Named) -> None:
    if isinstance(rest, LBFGS):
        raise ValueError("LBFGS evaluates the loss many times a step, which only one optimiser can do: choose another")
    expected = {id(parameter) for _, parameter in given}
    for group in rest.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in expected:
                raise ValueError(
                    f"the optimiser that rest made owns a parameter of shape {list(parameter.shape)} that it was not "
                    "given: make it of the parameters in its argument only"
                )
