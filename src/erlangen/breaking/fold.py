"""Unlearned biases left in learned ones: what evaluation computes, as a plain model.

Evaluation uses the means, and a mean beside a learned bias is a learned bias of another value. For queries it is
b_q + m_Q. For values, the weights of attention sum to one over the tokens that are attended to, so that a constant m_V
comes out as it went in, and the output projection makes b_O + Σ_h W_O^h m_V of it, in which each query head h counts
with the value head that it reads. Where outputs have no bias, or rows may not sum to one, it is b_v + m_V.
"""

from dataclasses import is_dataclass, replace

import torch
from torch import Tensor, nn

from erlangen.gauge import HeadLayout, Projection, head_layouts

from ._bias import SymmetryBreaking, check_broken, restore
from ._families import family_of
from ._rotary import attention_path

# What the probability of dropping weights of attention is called in configs.
_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def _rows_sum_to_one(model: nn.Module, layout: HeadLayout) -> bool:
    """Whether the weights of attention always sum to one: there is no dropout of them, and no sink beside them."""
    config = getattr(model, "config", None)
    dropout = any(getattr(config, name, None) for name in _DROPOUT)
    return not dropout and not hasattr(model.get_submodule(attention_path(layout)), "sinks")


def _value_target(model: nn.Module, layout: HeadLayout) -> str | None:
    """Where the mean of the values goes: "output", "value", or None: neither has a bias that could take it."""
    if layout.output.bias and _rows_sum_to_one(model, layout):
        return "output"
    return "value" if layout.value.bias else None


def _check_late(breaking: SymmetryBreaking, layer: int, layout: HeadLayout, mean: Tensor) -> None:
    if not breaking.is_late(layer):
        return
    turned = mean.unflatten(0, (layout.num_heads, -1))[:, : layout.rotary_dim]
    if layout.qk_norm is not False and mean.any():
        raise ValueError(
            f'the queries of layer {layer} have a mean bias behind their norm (rotary="after"), which no bias of the '
            'projection can be: break the model with rotary="before", or with query_mean=0'
        )
    if turned.any():
        raise ValueError(
            f'the queries of layer {layer} have a mean bias behind their rotary positions (rotary="after") at '
            "coordinates that positions turn: before them it would be another vector at each position, which no bias "
            'of the projection can be. Break the model with rotary="before", or with query_mean=0'
        )


def _add_attention_biases(model: nn.Module, layouts: tuple[HeadLayout, ...]) -> None:
    """Give all projections of attention biases of 0, and the config the field that says so."""
    family, config = family_of(model), getattr(model, "config", None)
    if family is not None:
        setattr(config, family.attention_bias(model), True)
    elif is_dataclass(config) and hasattr(config, "attention_bias"):
        model.config = replace(config, attention_bias=True)  # pyrefly: ignore[bad-argument-type, bad-specialization]
    else:
        raise ValueError(
            f"a {type(model).__name__} has no switch that gives its attention projections biases: give them biases "
            "before the model is broken, or break it with means of 0"
        )
    for layout in layouts:
        for projection in (layout.query, layout.key, layout.value, layout.output):
            module = model.get_submodule(projection.path)
            if module._parameters.get("bias") is None:
                weight = module.get_parameter("weight")
                zeros = weight.new_zeros(weight.shape[int(projection.transposed)])
                module.register_parameter("bias", nn.Parameter(zeros, requires_grad=weight.requires_grad))


def _add_to_heads(model: nn.Module, projection: Projection, mean: Tensor) -> None:
    bias = model.get_parameter(f"{projection.path}.bias")
    heads = projection.head_biases(bias.detach()).double()
    projection.put_head_biases(bias, heads + mean.double().view_as(heads))


def _add_to_output(model: nn.Module, layout: HeadLayout, mean: Tensor) -> None:
    weight = layout.output.heads(model.get_parameter(layout.output.weight).detach()).double()
    values = mean.double().unflatten(0, (layout.num_kv_heads, -1)).repeat_interleave(layout.group_size, dim=0)
    bias = model.get_parameter(f"{layout.output.path}.bias")
    bias.copy_(bias.double() + torch.einsum("hdc,hd->c", weight, values))


@torch.no_grad()
def fold(model: nn.Module, *, add_biases: bool = False) -> nn.Module:
    """Leave the mean of the unlearned biases in learned ones, in place, and take them out: a plain model again.

    Its outputs are those that the broken model has in evaluation. The noise of training is gone.

    Args:
        model: a broken model.
        add_biases: give the attention projections biases of 0 first, as the config switch of the model's family does
            (``attention_bias=True``), if there is a mean that finds none.

    Returns:
        The same model, of its plain class.

    Raises:
        ValueError: the model is not broken, or wrapped; a mean has no bias to go to (see ``add_biases``), or its family
            has no switch for them; a mean is behind rotary positions or QK-norm (``rotary="after"``).
    """
    breaking = check_broken(model, "fold")
    layouts = head_layouts(model)
    homeless = []
    for layer, layout in enumerate(layouts):
        query, value = breaking.means(layer)
        _check_late(breaking, layer, layout, query)
        if query.any() and not layout.query.bias:
            homeless.append(f"the mean of the queries of layer {layer} ({layout.query.path})")
        if value.any() and _value_target(model, layout) is None:
            homeless.append(f"the mean of the values of layer {layer} ({layout.value.path})")
    if homeless and not add_biases:
        others = f" (nor have {len(homeless) - 1} others)" if len(homeless) > 1 else ""
        raise ValueError(
            f"{homeless[0]} has no learned bias to go to{others}: call fold(model, add_biases=True), which changes the "
            "architecture to that of attention_bias=True, or break the model with means of 0, whose noise leaves "
            "nothing to fold"
        )
    if homeless:
        _add_attention_biases(model, layouts)
        layouts = head_layouts(model)
    for layer, layout in enumerate(layouts):
        query, value = breaking.means(layer)
        if query.any():
            _add_to_heads(model, layout.query, query)
        if value.any() and _value_target(model, layout) == "output":
            _add_to_output(model, layout, value)
        elif value.any():
            _add_to_heads(model, layout.value, value)
    return restore(model)
