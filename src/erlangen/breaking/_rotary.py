r"""The turns that rotary positions make, seen from outside, and query biases that are added after them.

The published order adds b to a query that is turned already, R_i q + b. What enters the turn is all that can be
reached without touching a model's attention, so R_i^{-1} b is added there: R_i (q + R_i^{-1} b) = R_i q + b. A turn in
the plane (x, y) is (c x − s y, c y + s x); its inverse divides the transposed turn by c² + s², which is 1 unless a
model scales its tables (YaRN).

Shape suffixes: B batch (1 where positions are the same in all sequences), T tokens, H heads, D width of a head,
P planes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from erlangen.gauge import HeadLayout, Projection, head_layouts, unwrap
from erlangen.gauge.layout import Rotary

if TYPE_CHECKING:
    from ._bias import SymmetryBreaking


class Turn(NamedTuple):
    """Cosine and sine of the angle of every plane, both [B, T, P]; times a scale where a model has one."""

    cos: Tensor
    sin: Tensor


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary) -> Tensor:
    """x [..., D] with its planes turned; cos and sin [..., P] broadcast against it."""
    turned, rest = x[..., : rotary.dim], x[..., rotary.dim :]
    half = rotary.pairs == "half"
    first, second = turned.chunk(2, dim=-1) if half else (turned[..., ::2], turned[..., 1::2])
    first, second = first * cos - second * sin, second * cos + first * sin
    turned = torch.cat([first, second], dim=-1) if half else torch.stack([first, second], dim=-1).flatten(-2)
    return torch.cat([turned, rest.expand(*turned.shape[:-1], rest.shape[-1])], dim=-1)


def _inverse(turn: Turn) -> Turn:
    scale = turn.cos.square() + turn.sin.square()
    return Turn(turn.cos / scale, -turn.sin / scale)


def turn(x_BHTD: Tensor, turn: Turn, rotary: Rotary) -> Tensor:
    """Queries or keys as rotary positions turn them; coordinates beyond ``rotary.dim`` stay."""
    return _rotate(x_BHTD, turn.cos[:, None], turn.sin[:, None], rotary)


def unturn(x_BHTD: Tensor, turn: Turn, rotary: Rotary) -> Tensor:
    """The inverse of `turn`."""
    back = _inverse(turn)
    return _rotate(x_BHTD, back.cos[:, None], back.sin[:, None], rotary)


def attention_path(layout: HeadLayout) -> str:
    """Path of the attention module: the parent of its query projection."""
    return layout.query.path.rpartition(".")[0]


def _turn_of_call(args: tuple, kwargs: dict[str, Any], rotary: Rotary) -> Turn:
    """The turn in the arguments of one call of an attention module.

    Models of transformers hand (cos, sin) [B, T, rotary.dim], each angle twice; `erlangen.lm` a module that has them as
    [longest, P].
    """
    values = (*args, *kwargs.values())
    for value in values:
        if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
            cos, sin = value
            if cos.shape[-1] == rotary.dim:
                places = slice(rotary.dim // 2) if rotary.pairs == "half" else slice(None, None, 2)
                cos, sin = cos[..., places], sin[..., places]
            return Turn(cos, sin) if cos.ndim == 3 else Turn(cos[None], sin[None])
        if isinstance(value, nn.Module) and hasattr(value, "cos") and hasattr(value, "sin"):
            length = next(part for part in values if isinstance(part, Tensor)).shape[-2]
            return Turn(value.get_buffer("cos")[None, :length], value.get_buffer("sin")[None, :length])
    raise TypeError(
        "an attention module was called without a table of its rotary positions (position_embeddings=(cos, sin)): "
        'take rotary="before" for this model'
    )


@contextmanager
def recorded_turns(model: nn.Module) -> Iterator[dict[int, Turn]]:
    """The turns of the forward that is run inside: layer -> `Turn`, without layers that turn nothing."""
    model = unwrap(model)
    turns: dict[int, Turn] = {}
    handles = []
    try:
        for layer, layout in enumerate(head_layouts(model)):
            if layout.rotary is not None:

                def record(
                    module: nn.Module, args: tuple, kwargs: dict, layer: int = layer, rotary: Rotary = layout.rotary
                ) -> None:
                    turns[layer] = _turn_of_call(args, kwargs, rotary)

                module = model.get_submodule(attention_path(layout))
                handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
        yield turns
    finally:
        for handle in handles:
            handle.remove()


# --- a bias after the turn --------------------------------------------------------------------------------------------


def is_late(layout: HeadLayout) -> bool:
    """Whether a bias after the positions is another one than a bias of the projection."""
    return layout.rotary is not None or layout.qk_norm is not False


class _Late:
    """The query bias of one layer on its way through a call of its attention module; what three hooks share.

    Objects, not closures, so that a deep copy has biases and turns of its own.
    """

    def __init__(self, breaking: "SymmetryBreaking", layer: int, layout: HeadLayout) -> None:
        self.breaking, self.layer = breaking, layer
        self.num_heads, self.rotary, self.query = layout.num_heads, layout.rotary, layout.query
        self.turn: Turn | None = None

    def bias_BTHD(self, training: bool) -> Tensor:
        """R^{-1} b, or b where there are no rotary positions; B and T are 1 then."""
        mean = not training and self.breaking.evaluate_with == "mean"
        bias_HD = self.breaking.bias("query", self.layer, mean=mean).unflatten(0, (self.num_heads, -1))
        if self.rotary is None:
            return bias_HD[None, None]
        assert self.turn is not None
        back = _inverse(self.turn)
        return _rotate(bias_HD.to(back.cos.dtype), back.cos[:, :, None], back.sin[:, :, None], self.rotary)


class LateHook:
    """Base of the hooks, by which they are found again."""

    def __init__(self, late: _Late) -> None:
        self.late = late


class _Enter(LateHook):
    """Forward pre-hook of the attention module: keeps the turn of this call."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.late.rotary is not None:
            self.late.turn = _turn_of_call(args, kwargs, self.late.rotary)


class _Leave(LateHook):
    """Forward hook of the attention module: lets go of the turn."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.late.turn = None


class _AfterProjection(LateHook):
    """Forward hook of the query projection, where nothing stands between it and the turn."""

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        query: Projection = self.late.query
        bias_BTC = self.late.bias_BTHD(module.training).flatten(2).to(output.dtype)
        if output.shape[-1] != bias_BTC.shape[-1]:
            whole = bias_BTC.new_zeros(*bias_BTC.shape[:-1], output.shape[-1])
            bias_BTC = whole.index_copy(-1, query._index(output.device), bias_BTC)
        return output + bias_BTC


class _AfterNorm(LateHook):
    """Forward hook of the norm of queries, whose output is [B, T, H, D] or [B, H, T, D], or [B, T, H D]."""

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        bias = self.late.bias_BTHD(module.training).to(output.dtype)
        if output.ndim == 3:
            return output + bias.flatten(2)
        heads = self.late.num_heads
        # A view of the projection's output has its heads inside of its tokens, whichever of the two comes first.
        heads_first = output.shape[1] == heads and (output.shape[2] != heads or args[0].stride(1) < args[0].stride(2))
        return output + (bias.transpose(1, 2) if heads_first else bias)


def add_late_hooks(model: nn.Module, breaking: "SymmetryBreaking", layer: int, layout: HeadLayout) -> None:
    """Have the query bias of a layer added after its positions."""
    late = _Late(breaking, layer, layout)
    attention = model.get_submodule(attention_path(layout))
    attention.register_forward_pre_hook(_Enter(late), with_kwargs=True)
    attention.register_forward_hook(_Leave(late))
    if isinstance(layout.qk_norm, tuple):
        model.get_submodule(layout.qk_norm[0].path).register_forward_hook(_AfterNorm(late))
    else:
        model.get_submodule(layout.query.path).register_forward_hook(_AfterProjection(late))


def remove_late_hooks(module: nn.Module) -> None:
    """Take the hooks of `add_late_hooks` off a module."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, LateHook)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
