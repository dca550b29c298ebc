"""Unlearned query and value biases, put into a model in place."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erlangen.gauge import HeadLayout, Projection, head_layouts, rows, unwrap

from ._families import family_of
from ._noise import normal, stream
from ._rotary import add_late_hooks, is_late, remove_late_hooks

NAME = "symmetry_breaking"
Which = Literal["query", "value"]


class SymmetryBreaking(nn.Module):
    """The unlearned biases of all layers of one model; the submodule ``model.symmetry_breaking``.

    One bias is mean + std ⊙ N(0, 1), drawn for each layer on its own and shared by its heads unless ``per_head``. All
    of it is in buffers, so a checkpoint holds the means, the deviations and the number of draws, and a model without
    breaking refuses to load them. A map has one stretch of these buffers, in the order of its rows: where it is fused,
    the rows of its keys are 0.

    Where this differs from the code published with the paper: the draw is a function of (seed, number of the draw)
    rather than of the global generator, evaluation uses the mean (there: the last training draw for the validation
    loss), and the bias is added to what the projection returns, before QK-norm and rotary positions (there: after
    rotary), so that the mean can be folded into the projection. Both published choices can be had.

    Attributes:
        settings: the arguments of `break_symmetry`.
        evaluate_with: "mean", or "last" for the last training draw.
    """

    def __init__(
        self,
        layouts: tuple[HeadLayout, ...],
        num_rows: Mapping[str, int],
        *,
        query_mean: float,
        query_std: float | tuple[float, float],
        value_mean: float,
        value_std: float | tuple[float, float],
        per_head: bool,
        seed: int,
        redraw: Literal["forward", "step"],
        rotary: Literal["before", "after"],
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "query_mean": query_mean, "query_std": query_std, "value_mean": value_mean, "value_std": value_std,
            "per_head": per_head, "seed": seed, "redraw": redraw, "rotary": rotary,
        }  # fmt: skip
        self.evaluate_with: Literal["mean", "last"] = "mean"
        self._late = tuple(rotary == "after" and is_late(layout) for layout in layouts)
        self._stretches: dict[str, slice] = {}
        self._parts: dict[tuple[str, int], tuple[slice, Projection]] = {}
        size = 0
        for which in ("query", "value"):
            for layer, layout in enumerate(layouts):
                projection: Projection = getattr(layout, which)
                if which == "query" and self._late[layer]:
                    # Not a part of its map: it is added elsewhere.
                    projection = rows(f"late.{layer}", layout.num_heads, layout.head_dim)
                if projection.path not in self._stretches:
                    length = num_rows.get(projection.path, len(projection.starts) * projection.width)
                    self._stretches[projection.path] = slice(size, size + length)
                    size += length
                self._parts[which, layer] = (self._stretches[projection.path], projection)
        means, stds, keys = torch.zeros(size), torch.zeros(size), torch.zeros(size, dtype=torch.int64)
        position = 0
        moments = {"query": (query_mean, query_std), "value": (value_mean, value_std)}
        for (which, _), (stretch, projection) in self._parts.items():
            mean, std = moments[which]
            low, high = std if isinstance(std, tuple) else (std, std)
            heads, width = len(projection.starts), projection.width
            projection.put_head_biases(means[stretch], torch.full((heads, width), mean))
            projection.put_head_biases(stds[stretch], torch.linspace(low, high, width).repeat(heads, 1))
            # Heads that share one vector share its keys, and so its draws.
            own = heads * width if per_head else width
            key = torch.arange(position, position + own).repeat(heads * width // own)
            projection.put_head_biases(keys[stretch], key.unflatten(0, (heads, width)))
            position += own
        self.register_buffer("mean", means)
        self.register_buffer("std", stds)
        self.register_buffer("keys", stream(seed, position)[keys])
        self.register_buffer("num_draws", torch.zeros((), dtype=torch.int64))
        self.register_buffer("current", self.mean.clone(), persistent=False)
        self.register_load_state_dict_post_hook(_after_load)

    @property
    def redraw_every(self) -> Literal["forward", "step"]:
        """What draws: each training forward, or `redraw`."""
        return self.settings["redraw"]

    @property
    def rotary(self) -> Literal["before", "after"]:
        """Which side of rotary positions the query biases are added on."""
        return self.settings["rotary"]

    @torch.no_grad()
    def redraw(self) -> None:
        """Draw new biases for all layers; they hold until the next draw."""
        self.num_draws.add_(1)
        self._draw()

    def _draw(self) -> None:
        self.current.copy_(self.mean + self.std * normal(self.keys, self.num_draws, self.std.dtype))

    @torch.no_grad()
    def reset(self) -> None:
        """Bring the biases in force back to those of the last draw (the mean, before the first)."""
        if self.num_draws > 0:
            self._draw()
        else:
            self.current.copy_(self.mean)

    def in_force(self, training: bool) -> Tensor:
        """All biases as a forward adds them: the draw in training, the mean (or the last draw) in evaluation."""
        return self.current if training or self.evaluate_with == "last" else self.mean

    def stretch(self, path: str) -> slice | None:
        """The part of the buffers that is added to what the map at a path returns; None: nothing is."""
        return self._stretches.get(path)

    def is_late(self, layer: int) -> bool:
        """Whether the query bias of a layer is added after QK-norm and rotary positions, and not to the projection."""
        return self._late[layer]

    def bias(self, which: Which, layer: int, *, mean: bool = False) -> Tensor:
        """The bias of a layer's queries (or values), head by head: [num_heads * head_dim] ([num_kv_heads * ...])."""
        stretch, projection = self._parts[which, layer]
        return projection.head_biases((self.mean if mean else self.current)[stretch]).flatten()

    @torch.no_grad()
    def set_mean(self, which: Which, layer: int, mean: Tensor) -> None:
        """Give the queries (or values) of a layer another mean, of the shape that `bias` returns."""
        stretch, projection = self._parts[which, layer]
        projection.put_head_biases(self.mean[stretch], mean.unflatten(0, (len(projection.starts), projection.width)))

    def means(self, layer: int) -> tuple[Tensor, Tensor]:
        """The mean query and value bias of a layer."""
        return self.bias("query", layer, mean=True), self.bias("value", layer, mean=True)

    def extra_repr(self) -> str:
        return f"num_layers={len(self._late)}, redraw={self.redraw_every!r}, rotary={self.rotary!r}"


def _after_load(breaking: nn.Module, keys: Any) -> None:
    """The draw in force is that of the number that was loaded."""
    assert isinstance(breaking, SymmetryBreaking)
    breaking.reset()


class _Redraw:
    """Forward pre-hook of the whole model. A class, not a closure, so that a deep copy draws from its own biases."""

    def __init__(self, breaking: SymmetryBreaking) -> None:
        self.breaking = breaking

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if module.training:
            self.breaking.redraw()


class _Broken(nn.Module):
    """A projection with unlearned biases beside its learned one.

    A projection becomes one by a change of class, as in `torch.distributed.fsdp.fully_shard`: its parameters, hooks and
    names stay. The biases are added to each other before they meet the activations, so that breaking costs no pass over
    them.
    """

    weight: Any
    bias: Any
    _plain: type
    # (biases, the part of them, whether the weight is [in, out]): a plain attribute of a tuple, so that the biases are
    # no submodule twice.
    _unlearned: tuple[SymmetryBreaking, slice, bool]

    def forward(self, input: Tensor) -> Tensor:
        breaking, stretch, transposed = self._unlearned
        bias = breaking.in_force(self.training)[stretch].to(self.weight.dtype)
        weight = self.weight.T if transposed else self.weight
        return F.linear(input, weight, bias if self.bias is None else self.bias + bias)


class _BrokenLinear(_Broken, nn.Linear):
    _plain = nn.Linear


@cache
def _broken_class(plain: type) -> type:
    return _BrokenLinear if plain is nn.Linear else type(f"Broken{plain.__name__}", (_Broken, plain), {"_plain": plain})


def _check_std(name: str, std: float | tuple[float, float]) -> None:
    values = std if isinstance(std, tuple) else (std,)
    if len(values) not in (1, 2) or any(not 0 <= value < float("inf") for value in values):
        raise ValueError(f"{name} must be one deviation or a pair (first, last), none negative, received {std!r}")


def _check_whole(model: nn.Module) -> None:
    if unwrap(model) is not model:
        raise ValueError(
            "this model is compiled or wrapped: break, fold or restore the model itself, before it is compiled or "
            "wrapped for distributed training"
        )
    if any(cls.__module__.partition(".")[0] == "peft" for module in model.modules() for cls in type(module).__mro__):
        raise ValueError(
            "this model has adapters (peft) around its projections: break, fold or restore the model before adapters "
            "are put on it, or after they are merged and unloaded"
        )


def _is_plain_map(module: nn.Module, transposed: bool) -> bool:
    """A `torch.nn.Linear`, or a map [in, out] with a weight and a bias and nothing else (Conv1D of transformers)."""
    if not transposed:
        return type(module) is nn.Linear
    weight = module._parameters.get("weight")
    return (
        not isinstance(module, nn.Linear | _Broken)
        and module._parameters.keys() <= {"weight", "bias"}
        and not module._modules
        and not module._buffers
        and weight is not None
        and weight.ndim == 2
        and weight.is_floating_point()
    )


def _maps(model: nn.Module, layouts: tuple[HeadLayout, ...]) -> Iterator[tuple[str, nn.Module, bool]]:
    """Path, module and transposition of every map of queries or values, each once.

    Raises:
        TypeError: of a class that cannot be given biases.
    """
    seen = set()
    for layer, layout in enumerate(layouts):
        for which in ("query", "value"):
            projection: Projection = getattr(layout, which)
            module = model.get_submodule(projection.path)
            if not _is_plain_map(module, projection.transposed):
                kind = "map with a weight [in, out]" if projection.transposed else "torch.nn.Linear"
                raise TypeError(
                    f"the {which} projection of layer {layer} is a {type(module).__name__} (of "
                    f"{type(module).__module__}), not a plain {kind}: break the model before its layers are replaced, "
                    "quantised or wrapped"
                )
            if projection.path not in seen:
                seen.add(projection.path)
                yield projection.path, module, projection.transposed


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
    rotary: Literal["before", "after"] = "before",
) -> nn.Module:
    """Add unlearned query and value biases to every attention layer, in place.

    Break the model before it is compiled or wrapped for distributed training. The model then draws by itself; nothing
    in a training loop changes. `restore` takes the biases out again, `fold` leaves their means in learned biases.

    A model of `transformers` is of a derived class from then on, with a ``model_type`` of its own, so that its
    ``save_pretrained`` writes a folder that nobody takes for a plain one; `erlangen.interop.broken` loads it.

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
        rotary: "before" adds the query bias to what the projection returns, so that it can be folded. "after" adds it
            behind QK-norm and rotary positions, as published: it is then the same for a token at every position.

    Under gradient checkpointing a recomputed forward sees the draw of the latest forward of the model, which is its
    own unless two forwards run before one backward; use ``redraw="step"`` there.

    Returns:
        The same model.

    Raises:
        TypeError: the model's layouts are unknown, or a projection is not a plain linear map.
        ValueError: it is broken already, wrapped, has latent attention, or a number is out of range.
    """
    _check_whole(model)
    if hasattr(model, NAME):
        raise ValueError("this model's symmetry is broken already: call erlangen.breaking.restore(model) first")
    _check_std("query_std", query_std)
    _check_std("value_std", value_std)
    if redraw not in ("forward", "step"):
        raise ValueError(f"redraw must be 'forward' or 'step', received {redraw!r}")
    if rotary not in ("before", "after"):
        raise ValueError(f"rotary must be 'before' or 'after', received {rotary!r}")
    layouts = head_layouts(model)
    if any(layout.latent is not None for layout in layouts):
        raise ValueError(
            "multi-head latent attention (DeepSeek) has no unlearned biases here: its queries have a second part with "
            "positions, which a bias of the first part does not reach"
        )
    if rotary == "after" and any(layout.qk_norm is True for layout in layouts):
        raise ValueError(
            'rotary="after" needs a QK-norm that is a module, to add the bias behind it, and this model norms its '
            'queries inside of its attention: take rotary="before", or qk_norm=False'
        )
    maps = list(_maps(model, layouts))
    family = family_of(model)
    if family is not None:
        family.check(model)
    breaking = SymmetryBreaking(
        layouts,
        {path: module.get_parameter("weight").shape[int(transposed)] for path, module, transposed in maps},
        query_mean=query_mean,
        query_std=query_std,
        value_mean=value_mean,
        value_std=value_std,
        per_head=per_head,
        seed=seed,
        redraw=redraw,
        rotary=rotary,
    )
    parameter = next(model.parameters())
    breaking.to(device=parameter.device, dtype=parameter.dtype).train(model.training)
    model.add_module(NAME, breaking)
    if redraw == "forward":
        model.register_forward_pre_hook(_Redraw(breaking))
    for path, projection, transposed in maps:
        stretch = breaking.stretch(path)
        if stretch is not None:
            projection.__class__ = _broken_class(type(projection))
            projection.__dict__["_unlearned"] = (breaking, stretch, transposed)
    for layer, layout in enumerate(layouts):
        if breaking.is_late(layer):
            add_late_hooks(model, breaking, layer, layout)
    if family is not None:
        family.broken(model, breaking.settings)
    return model


def redraw(model: nn.Module) -> None:
    """Draw new biases in a model broken with ``redraw="step"``; nothing in one broken otherwise or not at all."""
    breaking = getattr(unwrap(model), NAME, None)
    if breaking is not None and breaking.redraw_every == "step":
        breaking.redraw()


def check_broken(model: nn.Module, to: str) -> SymmetryBreaking:
    """The unlearned biases of a model, which is not wrapped and has some.

    Raises:
        ValueError: it is, or has not.
    """
    _check_whole(model)
    if not hasattr(model, NAME):
        raise ValueError(f"this model's symmetry is not broken: there is nothing to {to}")
    return model.get_submodule(NAME)  # pyrefly: ignore[bad-return]


def restore(model: nn.Module) -> nn.Module:
    """Take the unlearned biases out of a broken model, in place; the inverse of `break_symmetry`.

    Raises:
        ValueError: the model is not broken, or wrapped.
    """
    check_broken(model, "restore")
    for module in model.modules():
        if isinstance(module, _Broken):
            del module.__dict__["_unlearned"]
            module.__class__ = module._plain  # pyrefly: ignore[bad-argument-type]
        remove_late_hooks(module)
    for key in [key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, _Redraw)]:
        del model._forward_pre_hooks[key]
    delattr(model, NAME)
    family = family_of(model)
    if family is not None:
        family.plain(model)
    return model
