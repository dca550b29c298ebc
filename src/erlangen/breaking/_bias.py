"""Unlearned query and value biases, put into a model in place."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erlangen.gauge import HeadLayout, head_layouts, unwrap

from ._noise import normal, stream

NAME = "symmetry_breaking"


class SymmetryBreaking(nn.Module):
    """The unlearned biases of all layers of one model; the submodule ``model.symmetry_breaking``.

    One bias is mean + std ⊙ N(0, 1), drawn for each layer on its own and shared by its heads unless ``per_head``. All
    of it is in buffers, so a checkpoint holds the means, the deviations and the number of draws, and a model without
    breaking refuses to load them. In evaluation the mean is used.

    Where this differs from the code published with the paper: the draw is a function of (seed, number of the draw)
    rather than of the global generator, evaluation uses the mean always (there: the last training draw), and the bias
    is added to what the projection returns, before QK-norm and rotary positions (there: after rotary), so that the
    mean can be folded into the projection.
    """

    def __init__(
        self,
        layouts: tuple[HeadLayout, ...],
        *,
        query_mean: float,
        query_std: float | tuple[float, float],
        value_mean: float,
        value_std: float | tuple[float, float],
        per_head: bool,
        seed: int,
        redraw: Literal["forward", "step"],
    ) -> None:
        super().__init__()
        self.redraw_every = redraw
        self._slices: dict[tuple[str, int], slice] = {}
        heads = {"query": [x.num_heads for x in layouts], "value": [x.num_kv_heads for x in layouts]}
        moments = {"query": (query_mean, query_std), "value": (value_mean, value_std)}
        means, stds, keys = [], [], []
        position = 0
        for which, (mean, std) in moments.items():
            low, high = std if isinstance(std, tuple) else (std, std)
            for layer, layout in enumerate(layouts):
                num_heads, head_dim = heads[which][layer], layout.head_dim
                size = num_heads * head_dim
                start = sum(len(x) for x in keys)
                self._slices[which, layer] = slice(start, start + size)
                means.append(torch.full((size,), mean))
                stds.append(torch.linspace(low, high, head_dim).repeat(num_heads))
                # Heads that share one vector share its keys, and so its draws.
                own = size if per_head else head_dim
                keys.append(torch.arange(position, position + own).repeat(size // own))
                position += own
        self.register_buffer("mean", torch.cat(means))
        self.register_buffer("std", torch.cat(stds))
        self.register_buffer("keys", stream(seed, position)[torch.cat(keys)])
        self.register_buffer("num_draws", torch.zeros((), dtype=torch.int64))
        self.register_buffer("current", self.mean.clone(), persistent=False)

    @torch.no_grad()
    def redraw(self) -> None:
        """Draw new biases for all layers; they hold until the next draw."""
        self.num_draws.add_(1)
        self.current.copy_(self.mean + self.std * normal(self.keys, self.num_draws, self.std.dtype))

    def bias(self, which: Literal["query", "value"], layer: int, *, mean: bool = False) -> Tensor:
        """The bias of a layer's queries (or values), [num_heads * head_dim] ([num_kv_heads * head_dim])."""
        return (self.mean if mean else self.current)[self._slices[which, layer]]

    def means(self, layer: int) -> tuple[Tensor, Tensor]:
        """The mean query and value bias of a layer."""
        return self.bias("query", layer, mean=True), self.bias("value", layer, mean=True)

    def extra_repr(self) -> str:
        return f"num_layers={len(self._slices) // 2}, redraw={self.redraw_every!r}"


class _Redraw:
    """Forward pre-hook of the whole model. A class, not a closure, so that a deep copy draws from its own biases."""

    def __init__(self, breaking: SymmetryBreaking) -> None:
        self.breaking = breaking

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if module.training:
            self.breaking.redraw()


class _BrokenLinear(nn.Linear):
    """A projection with an unlearned bias beside its learned one.

    A projection becomes one by a change of class, as in `torch.distributed.fsdp.fully_shard`: its parameters, hooks and
    names stay. The two biases are added to each other before they meet the activations, so that breaking costs no pass
    over them.
    """

    # (biases, "query" or "value", layer): a plain attribute of a tuple, so that the biases are no submodule twice.
    _unlearned: tuple[SymmetryBreaking, Literal["query", "value"], int]

    def forward(self, input: Tensor) -> Tensor:
        breaking, which, layer = self._unlearned
        bias = breaking.bias(which, layer, mean=not self.training).to(self.weight.dtype)
        return F.linear(input, self.weight, bias if self.bias is None else self.bias + bias)


def _check_std(name: str, std: float | tuple[float, float]) -> None:
    values = std if isinstance(std, tuple) else (std,)
    if len(values) not in (1, 2) or any(not 0 <= value < float("inf") for value in values):
        raise ValueError(f"{name} must be one deviation or a pair (first, last), none negative, received {std!r}")


def break_symmetry(
    model: nn.Module,
    *,
    query_mean: float = 0.5,
    query_std: float | tuple[float, float] = (0.05, 0.15),
    value_mean: float = 0.0,
    value_std: float | tuple[float, float] = 0.05,
    per_head: bool = False,
    seed: int = 0,
    redraw: Literal["forward", "step"] = "forward",
) -> nn.Module:
    """Add unlearned query and value biases to every attention layer, in place.

    Break the model before it is compiled or wrapped for distributed training. The model then draws by itself; nothing
    in a training loop changes. `restore` takes the biases out again.

    Args:
        model: a model whose head layouts are known (`erlangen.gauge.head_layouts`).
        query_mean: mean of every coordinate of the query bias.
        query_std: its standard deviation: one number, or (first, last) for an even spacing over head_dim.
        value_mean, value_std: the same for the value bias.
        per_head: one vector a head, rather than one a layer shared by its heads.
        seed: of the draws. Two models with one seed see the same draws.
        redraw: "forward" draws on every training forward of the whole model, as published (so each micro-batch of an
            accumulated step has its own). "step" draws only when `redraw` is called: call it once before each
            optimiser step (the trainer of `erlangen.lm` does).

    Under gradient checkpointing a recomputed forward sees the draw of the latest forward of the model, which is its
    own unless two forwards run before one backward; use ``redraw="step"`` there.

    Returns:
        The same model.

    Raises:
        TypeError: the model's layouts are unknown, or a projection is not a `torch.nn.Linear`.
        ValueError: it is broken already, wrapped, or a number is out of range.
    """
    if unwrap(model) is not model:
        raise ValueError("break the model before it is compiled or wrapped: pass the model itself, then wrap it")
    if hasattr(model, NAME):
        raise ValueError("this model's symmetry is broken already: call erlangen.breaking.restore(model) first")
    _check_std("query_std", query_std)
    _check_std("value_std", value_std)
    if redraw not in ("forward", "step"):
        raise ValueError(f"redraw must be 'forward' or 'step', received {redraw!r}")
    layouts = head_layouts(model)
    projections = [
        (which, model.get_submodule(getattr(layout, which).path), layer)
        for layer, layout in enumerate(layouts)
        for which in ("query", "value")
    ]
    for which, projection, layer in projections:
        if type(projection) is not nn.Linear:
            raise TypeError(
                f"the {which} projection of layer {layer} is a {type(projection).__name__}, not a torch.nn.Linear: "
                "break the model before its layers are replaced"
            )
    breaking = SymmetryBreaking(
        layouts,
        query_mean=query_mean,
        query_std=query_std,
        value_mean=value_mean,
        value_std=value_std,
        per_head=per_head,
        seed=seed,
        redraw=redraw,
    )
    parameter = next(model.parameters())
    breaking.to(device=parameter.device, dtype=parameter.dtype).train(model.training)
    model.add_module(NAME, breaking)
    if redraw == "forward":
        model.register_forward_pre_hook(_Redraw(breaking))
    for which, projection, layer in projections:
        projection.__class__ = _BrokenLinear
        projection.__dict__["_unlearned"] = (breaking, which, layer)
    return model


def redraw(model: nn.Module) -> None:
    """Draw new biases in a model broken with ``redraw="step"``; nothing in one broken otherwise or not at all."""
    breaking = getattr(unwrap(model), NAME, None)
    if breaking is not None and breaking.redraw_every == "step":
        breaking.redraw()


def restore(model: nn.Module) -> nn.Module:
    """Take the unlearned biases out of a broken model, in place; the inverse of `break_symmetry`.

    Raises:
        ValueError: the model is not broken.
    """
    if not hasattr(model, NAME):
        raise ValueError("this model's symmetry is not broken: there is nothing to restore")
    for module in model.modules():
        if type(module) is _BrokenLinear:
            del module._unlearned
            module.__class__ = nn.Linear  # pyrefly: ignore[bad-argument-type]
    for key in [key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, _Redraw)]:
        del model._forward_pre_hooks[key]
    delattr(model, NAME)
    return model
