"""Shrunk checkpoints in `transformers`: importing this module makes them known to its auto classes.

    from erlangen.interop import shrunk
    model = AutoModelForCausalLM.from_pretrained(folder)

A shrunk checkpoint has a ``model_type`` of its own, "erlangen_shrunk_" before that of the family, so that nobody takes
its tensors for those of the family; ``erlangen_maps`` in its config says which linear maps are `ReducedLinear`, and of
what sizes. Its classes are those of the family, derived, with these maps in the place of the dense ones.
"""

from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from erlangen import _extras
from erlangen.gauge._reduced import ReducedLinear
from erlangen.gauge.shrink import Shrunk, reduce_maps

from ._derived import Derived, carry_conversion, register
from .layouts import _FAMILIES, SHRUNK
from .shrinking import HOW, HOW_TO_LOAD, MAPS

FAMILIES = tuple(_FAMILIES)
transformers: Any = _extras.require("transformers", "hf")


@cache
def config_class(kind: str) -> type:
    """The class of configs of shrunk checkpoints of a family."""
    base = transformers.CONFIG_MAPPING[kind]
    fields = {"model_type": SHRUNK + kind, "__module__": __name__, "__doc__": f"{base.__name__} of a shrunk model."}
    return type(f"Shrunk{base.__name__}", (base,), fields)


@cache
def model_class(base: type, kind: str) -> type:
    """The class of shrunk models that belongs to one of `transformers`."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        reduce_maps(self, getattr(config, MAPS, {}))

    fields = {
        "__init__": init, "config_class": config_class(kind), "__module__": __name__,
        "__doc__": f"{base.__name__} with the maps of a shrunk checkpoint.",
    }  # fmt: skip
    carry_conversion(base.__name__, f"Shrunk{base.__name__}")
    return type(f"Shrunk{base.__name__}", (base,), fields)


def save(model: nn.Module, folder: str | Path, report: Shrunk) -> None:
    """Write a model of `transformers` that was shrunk in memory as a folder that loads again.

    Args:
        model: after `erlangen.gauge.shrink`. It is of the derived class from then on.
        folder: as of its ``save_pretrained``.
        report: what `erlangen.gauge.shrink` returned.

    Raises:
        ValueError: the model is not of a family that is known here, or not shrunk.
    """
    live: Any = model
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if not any(isinstance(module, ReducedLinear) for module in model.modules()):
        raise ValueError("the model is not shrunk: call erlangen.gauge.shrink on it first, or its own save_pretrained")
    if kind in FAMILIES:
        values = {key: value for key, value in live.config.to_dict().items() if key != "model_type"}
        live.config = config_class(kind)(**values, **{MAPS: report.maps, HOW: HOW_TO_LOAD})
        live.__class__ = model_class(type(model), kind)
    elif not kind.startswith(SHRUNK):
        raise ValueError(f"a {type(model).__name__} is not of a family that is known here: {', '.join(FAMILIES)}")
    live.save_pretrained(folder)


register(Derived(SHRUNK, "Shrunk", config_class, model_class), FAMILIES)
