"""Queries and keys of a model on its real residual stream, a layer at a time, through hooks.

What a layer's projections return is captured, and norm and positions are applied here as the layer applies them, so
that nothing depends on which attention kernel the model runs. The preferred direction of a head is what is added to
every query: b = learned query bias + mean of the unlearned one. With QK-norm of gain g and rotary positions R_i, the
query at position i is q_i = R_i (g ⊙ x_i / ρ_i) + b', where x_i = W h_i + b is what the projection returns, ρ_i its
measured root mean square, and b' an unlearned bias that is added after the positions. So b arrives as J_i b + b' with
J_i = R_i diag(g) / ρ_i, and a key gets the logit scale · (J_i b + b') · k_j from it.

Shape suffixes: B windows, H query heads, K key heads, T tokens (queries), J tokens (keys), D width of a head.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from erlangen.gauge import HeadLayout, Norm, head_layouts, unwrap

from ._bias import NAME
from ._rotary import Turn, _rotate, _turn_of_call, attention_path, is_late
from ._rotary import turn as turned


@dataclass(frozen=True, kw_only=True)
class Direction:
    """The preferred direction of every head of a layer, float [H, D] each; zeros where there is none.

    Attributes:
        learned: the learned bias.
        unlearned: the mean of the unlearned one.
        late: whether the unlearned one is added after norm and positions.
    """

    learned: Tensor
    unlearned: Tensor
    late: bool

    @property
    def before(self) -> Tensor:
        """What is added before norm and positions."""
        return self.learned if self.late else self.learned + self.unlearned

    @property
    def after(self) -> Tensor:
        """What is added after them."""
        return self.unlearned if self.late else torch.zeros_like(self.learned)


def directions(model: nn.Module) -> list[Direction]:
    """The preferred direction of every layer, in the dtype of the weights, at least float32.

    Raises:
        TypeError, ValueError: the layouts of the model are unknown; it has no direction: neither learned query biases
            nor broken symmetry, or all of them are zero.
    """
    model = unwrap(model)
    breaking: Any = getattr(model, NAME, None)
    found, any_bias = [], breaking is not None
    for layer, layout in enumerate(head_layouts(model)):
        projection = layout.query
        module: Any = model.get_submodule(projection.path)
        weight = module.weight
        kind = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        learned = torch.zeros(layout.num_heads, layout.head_dim, **kind)
        unlearned = learned.clone()
        if projection.bias:
            any_bias = True
            learned += projection.head_biases(module.bias.detach()).to(learned)
        if breaking is not None:
            unlearned += breaking.bias("query", layer, mean=True).detach().reshape(learned.shape).to(learned)
        found.append(Direction(learned=learned, unlearned=unlearned, late=_late(breaking, layout)))
    if not any_bias:
        raise ValueError(
            f"a {type(model).__name__} without query biases has no preferred direction: its symmetry is not broken and "
            "its query projections have no learned bias. Break it (erlangen.breaking.break_symmetry), or take a model "
            "with query biases"
        )
    if not any(bool(direction.before.any() or direction.after.any()) for direction in found):
        raise ValueError("all query biases of this model are zero, so its heads prefer no direction: train it first")
    return found


def _late(breaking: Any, layout: HeadLayout) -> bool:
    return breaking is not None and getattr(breaking, "rotary", "before") == "after" and is_late(layout)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What does not change from text to text in a layer."""

    number: int
    layout: HeadLayout
    module: nn.Module
    scale: float
    window: int | None

    @classmethod
    def of(cls, model: nn.Module, number: int, layout: HeadLayout) -> "Layer":
        """Read a layer of a model.

        Raises:
            ValueError: attention of a kind that is not computed here.
        """
        if layout.latent is not None:
            raise ValueError("the key prior of multi-head latent attention is not defined here: take another model")
        module: Any = model.get_submodule(attention_path(layout))
        if getattr(module, "is_causal", True) is False or getattr(module, "is_decoder", True) is False:
            raise ValueError(f"{type(module).__name__} sees both sides; the key prior is defined for causal attention")
        scale = getattr(module, "scaling", None)
        config: Any = getattr(model, "config", None)
        window = getattr(module, "sliding_window", None)
        kind = getattr(config, "model_type", "")
        if window is None and kind.endswith(("mistral", "phi3")):
            window = config.sliding_window  # these have no attribute of the layer
        return cls(
            number=number,
            layout=layout,
            module=module,
            scale=1 / math.sqrt(layout.head_dim) if scale is None else float(scale),
            window=window,
        )

    def visible(self, length: int, device: torch.device) -> Tensor:
        """bool [T, J]: which keys a query sees."""
        position = torch.arange(length, device=device)
        distance = position[:, None] - position
        return (distance >= 0) & (distance < (length if self.window is None else self.window))

    def attention(self, logits_BHTJ: Tensor) -> Tensor:
        """Attention weights of logits [..., T, J]."""
        cap = self.layout.soft_cap
        if cap is not None:
            logits_BHTJ = cap * (logits_BHTJ / cap).tanh()
        hidden = ~self.visible(logits_BHTJ.shape[-1], logits_BHTJ.device)
        return logits_BHTJ.masked_fill(hidden, -math.inf).softmax(dim=-1)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Queries and keys of one layer for one batch.

    Attributes:
        layer: which.
        query_BHTD: as attention sees them.
        key_BHTD: as attention sees them, one for each query head.
        stretch_BHT: 1 / ρ_i, what QK-norm multiplies queries with; None without.
        gain_HD: the gain of QK-norm; None without.
        turn: of the positions; None without.
    """

    layer: Layer
    query_BHTD: Tensor
    key_BHTD: Tensor
    stretch_BHT: Tensor | None
    gain_HD: Tensor | None
    turn: Turn | None

    def logits(self, query_BHTD: Tensor) -> Tensor:
        """[B, H, T, J] of these queries, or of a direction that was carried to them."""
        return self.layer.scale * (query_BHTD @ self.key_BHTD.transpose(-1, -2))

    def carried(self, direction: Direction) -> Tensor:
        """J_i b + b', what a direction adds to the queries: [B or 1, H, T or 1, D]."""
        added_BHTD = direction.before[None, :, None].to(self.query_BHTD)
        if self.gain_HD is not None:
            added_BHTD = added_BHTD * self.gain_HD[:, None]
        if self.stretch_BHT is not None:
            added_BHTD = added_BHTD * self.stretch_BHT[..., None]
        rotary = self.layer.layout.rotary
        if self.turn is not None and rotary is not None:
            added_BHTD = turned(added_BHTD, self.turn, rotary)
        return added_BHTD + direction.after[None, :, None].to(added_BHTD)

    def carried_back(self) -> tuple[Tensor, Tensor]:
        """The keys as a direction meets them: [B, H, J, D] before norm and positions, and after them.

        The first is scale times the mean of J_iᵀ k_j over the queries i that see key j, so that the mean logit that a
        direction gives the key is before · first + after · second.
        """
        key_BHJD = self.layer.scale * self.key_BHTD
        seen_TJ = self.layer.visible(key_BHJD.shape[2], key_BHJD.device).to(key_BHJD.dtype)
        share_TJ = seen_TJ / seen_TJ.sum(0)

        def mean_over_queries(x: Tensor) -> Tensor:
            return torch.einsum("...tx,tj->...jx", x, share_TJ)

        stretch = None if self.stretch_BHT is None else self.stretch_BHT[..., None]
        whole = key_BHJD if stretch is None else key_BHJD * mean_over_queries(stretch)
        rotary = self.layer.layout.rotary
        if self.turn is not None and rotary is not None:
            cos, sin = (x[:, None] if stretch is None else x[:, None] * stretch for x in self.turn)
            back = _rotate(key_BHJD, mean_over_queries(cos), -mean_over_queries(sin), rotary)  # the transposed turn
            whole = torch.cat([back[..., : rotary.dim], whole[..., rotary.dim :]], dim=-1)
        if self.gain_HD is not None:
            whole = whole * self.gain_HD[:, None]
        return whole, key_BHJD


def _rms(x: Tensor, norm: Norm | None, over: str) -> Tensor:
    """1 / root mean square [B, heads, T] of x [B, heads, T, D], over each head or over all together."""
    eps = torch.finfo(x.dtype).eps if norm is None else norm.eps
    dims = (-1,) if over == "head" else (1, -1)
    return (x.square().mean(dims, keepdim=True) + eps).rsqrt().expand(*x.shape[:3], 1)[..., 0]


def _normalised(x_BHTD: Tensor, norm: Norm | None, over: str, model: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
    """x after an RMS norm with its gain, 1 / ρ [B, H, T], and the gain [H, D]."""
    heads, width = x_BHTD.shape[1], x_BHTD.shape[-1]
    stretch = _rms(x_BHTD, norm, over)
    gain = None
    if norm is not None and norm.weight is not None:
        gain = model.get_parameter(norm.weight).detach().to(x_BHTD) + norm.offset
        gain = gain.reshape(-1, width).expand(heads, width)
    x_BHTD = x_BHTD * stretch[..., None]
    return (x_BHTD if gain is None else x_BHTD * gain[:, None]), stretch, gain


class _Recorder:
    """The hooks of one layer."""

    def __init__(self, model: nn.Module, layer: Layer, each: Callable[[Heads], None]) -> None:
        self.model, self.layer, self.each = model, layer, each
        self.outputs: dict[str, Tensor] = {}
        self.call: tuple[tuple, dict[str, Any]] = ((), {})

    def hooks(self, stack: ExitStack) -> None:
        """Put the hooks in; they go with the stack."""
        for path in {self.layer.layout.query.path, self.layer.layout.key.path}:
            projection = self.model.get_submodule(path)

            def keep(_: nn.Module, __: Any, output: Tensor, path: str = path) -> None:
                self.outputs[path] = output.detach()

            stack.callback(projection.register_forward_hook(keep).remove)
        stack.callback(self.layer.module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        stack.callback(self.layer.module.register_forward_hook(self._after).remove)

    def _before(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.call = (args, kwargs)

    def _after(self, *_: Any) -> None:
        layout = self.layer.layout
        parts = []
        for projection in (layout.query, layout.key):
            output = self.outputs[projection.path]
            output = output.to(torch.promote_types(output.dtype, torch.float32))
            starts = torch.tensor(projection.starts, device=output.device)[:, None]
            columns = starts + torch.arange(projection.width, device=output.device)
            parts.append(output[..., columns].transpose(1, 2))  # [B, T, H, D] -> [B, H, T, D]
        query, key = parts
        stretch = gain = turn = None
        if layout.qk_norm:
            norms = layout.qk_norm if isinstance(layout.qk_norm, tuple) else (None, None)
            query, stretch, gain = _normalised(query, norms[0], layout.qk_norm_over, self.model)
            key = _normalised(key, norms[1], layout.qk_norm_over, self.model)[0]
        if layout.rotary is not None:
            turn = Turn(*(x.to(query) for x in _turn_of_call(*self.call, layout.rotary)))
            query, key = turned(query, turn, layout.rotary), turned(key, turn, layout.rotary)
        breaking: Any = getattr(self.model, NAME, None)
        if _late(breaking, layout) and isinstance(layout.qk_norm, tuple):  # added to the norm's output, not seen here
            bias = breaking.bias("query", self.layer.number, mean=True).to(query)
            query = query + bias.reshape(1, layout.num_heads, 1, -1)
        self.outputs.clear()
        self.call = ((), {})
        key = key.repeat_interleave(layout.group_size, dim=1)
        self.each(Heads(layer=self.layer, query_BHTD=query, key_BHTD=key, stretch_BHT=stretch, gain_HD=gain, turn=turn))


@contextmanager
def observed(
    model: nn.Module, each: Callable[[Heads], None], layers: Sequence[int] | None = None
) -> Iterator[Callable[[Tensor], Any]]:
    """In this context a function that runs the model on tokens [B, T] without gradients, in evaluation mode.

    Args:
        model: of a known layout.
        each: called with the heads of every layer of each batch, in order of depth.
        layers: which layers; None: all.

    Raises:
        TypeError, ValueError: a model whose heads cannot be read.
    """
    inner = unwrap(model)
    layouts = head_layouts(inner)
    was_training = inner.training
    with ExitStack() as stack:
        for number in range(len(layouts)) if layers is None else layers:
            _Recorder(inner, Layer.of(inner, number, layouts[number]), each).hooks(stack)
        stack.callback(inner.train, was_training)
        inner.eval()
        breaking: Any = getattr(inner, NAME, None)
        if breaking is not None:  # the mean, also in a model that is validated with its last draw
            stack.callback(setattr, breaking, "evaluate_with", getattr(breaking, "evaluate_with", "mean"))
            breaking.evaluate_with = "mean"

        def run(tokens: Tensor) -> Any:
            with torch.no_grad():
                return inner(tokens.to(next(inner.parameters()).device))

        yield run


def batch_size(num_heads: int, length: int) -> int:
    """Windows a batch, so that a matrix of all pairs and heads of a layer has at most 2²³ numbers (or is of one)."""
    return max(1, min(64, 2**23 // (num_heads * length * length)))
