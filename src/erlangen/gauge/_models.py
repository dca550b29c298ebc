"""Two models to be treated together: opened from memory or from folders, and expected to be of one architecture."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ._weights import ModuleWeights
from .layout import HeadLayout, Layer, ModelLayout, Norm, model_layout

_ROUNDING = 16 * torch.finfo(torch.float64).eps  # of what is done with the numbers


class Tensors(Protocol):
    def __contains__(self, name: str) -> bool: ...
    def __getitem__(self, name: str) -> Tensor: ...
    def shape(self, name: str) -> torch.Size: ...
    def dtype(self, name: str) -> torch.dtype: ...


@dataclass
class Model:
    """A model as it is compared."""

    name: str
    layout: ModelLayout
    weights: Tensors
    names: list[str]
    config: Mapping[str, Any]
    module: nn.Module | None
    folder: Path | None
    unit: float = field(init=False)  # relative error of a stored number, with that of the comparison

    def __post_init__(self) -> None:
        dtypes = {self.weights.dtype(name) for name in self.names}
        eps = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)
        self.unit = (eps**2 / 4 + _ROUNDING**2) ** 0.5


def open_model(model: Any, name: str) -> Model:
    if isinstance(model, (str, Path)):
        checkpoint = import_module("erlangen.interop.checkpoints").Checkpoint(model)
        names = list(checkpoint.names())
        return Model(str(model), checkpoint.layout, checkpoint, names, checkpoint.config, None, Path(model))
    if not isinstance(model, nn.Module):
        raise TypeError(f"compare takes models and folders of checkpoints, received a {type(model).__name__}")
    weights = ModuleWeights(model)
    module = weights.module
    config = getattr(module, "config", None)
    if is_dataclass(config) and not isinstance(config, type):
        values = asdict(config)
    else:
        to_dict = getattr(config, "to_dict", None)
        values = to_dict() if callable(to_dict) else {}
    return Model(name, model_layout(module), weights, list(weights), values, module, None)


def kind_of(norm: Norm | None) -> str | None:
    return None if norm is None else norm.kind


def _attention_shape(attention: HeadLayout) -> dict[str, Any]:
    return {
        "query heads": attention.num_heads,
        "key/value heads": attention.num_kv_heads,
        "width of a query": attention.head_dim,
        "width of a value": attention.value_width,
        "coordinates that positions turn": attention.rotary_dim,
        "QK-norm": attention.qk_norm_over if attention.qk_norm else None,
        "soft cap": attention.soft_cap,
        "latent attention": attention.latent is not None,
    }


def _layer_shape(layer: Layer) -> dict[str, Any]:
    mlp = layer.mlp
    names = ("attention_norm", "mlp_norm", "attention_out_norm", "mlp_out_norm", "attention_sum_norm", "mlp_sum_norm")
    shape = _attention_shape(layer.attention)
    shape["feed-forward layer"] = None if mlp is None else (mlp.up.width, mlp.activation, mlp.gate is not None)
    experts = layer.experts
    if experts is not None:
        kinds = [(part.up.width, part.activation, part.gate is not None) for part in experts.parts[-2:]]
        shape["experts"] = (len(experts.experts), experts.groups, experts.softmax, experts.shared is None, *kinds)
    shape["norms"] = tuple(kind_of(getattr(layer, name)) for name in names)
    shape["parallel branches"] = layer.parallel
    return shape


def expect_alike(a: Model, b: Model) -> None:
    def refuse(what: str, first: Any, second: Any) -> None:
        raise ValueError(
            f"only models of one architecture and size can be compared; {a.name} has {what} {first}, "
            f"{b.name} has {second}"
        )

    one, two = a.layout, b.layout
    shapes = [
        {
            "width": layout.dim,
            "number of layers": len(layout.layers),
            "embeddings besides that of tokens:": len(layout.other_embeddings),
            "norm of the embeddings": kind_of(layout.embedding_norm),
            "final norm": kind_of(layout.final_norm),
            "soft cap of the logits": layout.soft_cap,
        }
        for layout in (one, two)
    ]
    for what in shapes[0]:
        if shapes[0][what] != shapes[1][what]:
            refuse(what, shapes[0][what], shapes[1][what])
    for number, (first, second) in enumerate(zip(one.layers, two.layers)):
        first_shape, second_shape = _layer_shape(first), _layer_shape(second)
        for what in first_shape:
            if first_shape[what] != second_shape[what]:
                refuse(f"in layer {number} as {what}", first_shape[what], second_shape[what])
