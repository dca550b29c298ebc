"""Models of `transformers` whose symmetry is broken: importing this module makes their folders known to auto classes.

    from erlangen.interop import broken
    model = AutoModelForCausalLM.from_pretrained(folder)

A broken model is of a class derived from its own, and its config has a ``model_type`` of its own, "erlangen_broken_"
before that of the family; ``erlangen_breaking`` in it holds the arguments of `erlangen.breaking.break_symmetry`. What
its ``save_pretrained`` writes is an error to everybody else: an auto class does not know the model_type, and a class of
the family, asked by name, finds words in the place of a number of its config.
"""

import copy
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from erlangen import _extras
from erlangen.breaking import SymmetryBreaking, break_symmetry
from erlangen.breaking._bias import NAME

from ._derived import Derived, carry_conversion, register
from .layouts import _FAMILIES, BROKEN

transformers: Any = _extras.require("transformers", "hf")

# Its heads have no unlearned biases (see break_symmetry).
FAMILIES = tuple(kind for kind in _FAMILIES if kind != "deepseek_v2")
# Fields of the config: the arguments, and the number that words stand for in a file.
SETTINGS, SIZE = "erlangen_breaking", "erlangen_hidden_size"
HOW_TO_LOAD = (
    "this model has unlearned biases: import erlangen.interop.broken, then load it with AutoModelForCausalLM or "
    "another auto class, never with the class of its family"
)
# Families whose attention projections have biases with attention_bias=True, and none without.
_SWITCHED = ("llama", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox")


@cache
def config_class(kind: str) -> type:
    """The class of configs of broken checkpoints of a family."""
    base = transformers.CONFIG_MAPPING[kind]
    # A field that every class needs to build anything.
    field = base.attribute_map.get("hidden_size", "hidden_size")

    def to_json_file(self: Any, json_file_path: Any, use_diff: bool = True) -> None:
        base.to_json_file(self, json_file_path, use_diff)
        path = Path(json_file_path)
        values = json.loads(path.read_text(encoding="utf-8"))
        values[SIZE], values[field] = getattr(self, field), HOW_TO_LOAD
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def from_dict(cls: Any, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        values = dict(config_dict)
        if SIZE in values:
            values[field] = values.pop(SIZE)
        return super(derived, cls).from_dict(values, **kwargs)  # pyrefly: ignore[invalid-argument]

    fields = {
        "model_type": BROKEN + kind, "to_json_file": to_json_file, "from_dict": classmethod(from_dict),
        "__module__": __name__, "__doc__": f"{base.__name__} of a model with unlearned biases.",
    }  # fmt: skip
    derived = type(f"Broken{base.__name__}", (base,), fields)
    return derived


@cache
def model_class(base: type, kind: str) -> type:
    """The class of broken models that belongs to one of `transformers`."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        settings = getattr(config, SETTINGS, None)
        if settings is None:
            raise ValueError(f"a {type(config).__name__} needs {SETTINGS}, the arguments of break_symmetry")
        values: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        break_symmetry(self, **values)

    def init_weights(self: Any, module: nn.Module) -> None:
        if isinstance(module, SymmetryBreaking):
            module.reset()
        else:
            base._init_weights(self, module)  # pyrefly: ignore[missing-attribute]

    def from_pretrained(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        above: Any = super(derived, cls)  # pyrefly: ignore[invalid-argument]
        model, said = above.from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(key for key in said["missing_keys"] if key.startswith(f"{NAME}."))
        if missing:
            raise ValueError(
                f"the checkpoint lacks {', '.join(missing)}: without its unlearned biases it would be evaluated as "
                "another model. Save it again from the broken model"
            )
        return (model, said) if output_loading_info else model

    fields = {
        "__init__": init, "_init_weights": init_weights, "from_pretrained": classmethod(from_pretrained),
        "config_class": config_class(kind), "__module__": __name__,
        "__doc__": f"{base.__name__} with unlearned biases.",
        # The Trainer looks up by it how labels are shifted.
        "_get_name": lambda self: base.__name__,
    }  # fmt: skip
    carry_conversion(base.__name__, f"Broken{base.__name__}")
    derived = type(f"Broken{base.__name__}", (base,), fields)
    return derived


def _change_config(model: nn.Module, cls: type, settings: dict[str, Any] | None) -> None:
    """Put a copy of a model's config, of another class, in its place in all modules that hold it."""
    old: Any = model.config
    new = copy.deepcopy(old)
    new.__class__ = cls
    # What was read from a file beside that of the class.
    new.__dict__.pop("model_type", None)
    if settings is None:
        delattr(new, SETTINGS)
    else:
        setattr(new, SETTINGS, settings)
    for module in model.modules():
        for name, value in module.__dict__.items():
            if value is old:
                module.__dict__[name] = new


class _Transformers:
    """What `erlangen.breaking` asks of models of transformers."""

    def check(self, model: nn.Module) -> None:
        """A model that nobody could load again is not broken."""
        live: Any = model
        kind = live.config.model_type.removeprefix(BROKEN)
        if kind not in FAMILIES:
            raise ValueError(
                f"models of the kind {kind!r} are not known to erlangen.interop.broken, so this one could not be "
                f"loaded again after save_pretrained; known are {', '.join(FAMILIES)}"
            )

    def broken(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        """Give the model its derived class, and a config of its own (the old one may be another model's too)."""
        live: Any = model
        kind = live.config.model_type
        if kind.startswith(BROKEN):
            return
        _change_config(model, config_class(kind), dict(settings))
        live.__class__ = model_class(type(model), kind)

    def plain(self, model: nn.Module) -> None:
        """Give the model its own class and the config that belongs to it."""
        live: Any = model
        kind = live.config.model_type.removeprefix(BROKEN)
        _change_config(model, transformers.CONFIG_MAPPING[kind], None)
        live.__class__ = type(model).__mro__[1]

    def attention_bias(self, model: nn.Module) -> str:
        """The field that gives attention biases."""
        live: Any = model
        kind = live.config.model_type.removeprefix(BROKEN)
        if kind not in _SWITCHED:
            raise ValueError(
                f"models of the kind {kind} have no switch for biases of their attention projections, so a folded one "
                "could not be saved as one of its family: keep it broken (it is saved and loaded so), or break it with "
                "means of 0, whose noise leaves nothing to fold"
            )
        return "attention_bias"


FAMILY = _Transformers()
register(Derived(BROKEN, "Broken", config_class, model_class), FAMILIES)
