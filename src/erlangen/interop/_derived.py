"""Classes derived from those of `transformers`, with a ``model_type`` of their own, found by its auto classes.

Shared by shrunk and by broken checkpoints: what is done to a family's models is done in the ``__init__`` of a derived
class, and the ``model_type`` of its config keeps everybody else from taking its tensors for those of the family.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from erlangen import _extras

# Auto classes of transformers under which derived classes are found.
_AUTO = (
    "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForPreTraining",
    "AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering",
    "AutoModelForMultipleChoice", "AutoModelForNextSentencePrediction",
)  # fmt: skip

transformers: Any = _extras.require("transformers", "hf")


@dataclass(frozen=True)
class Derived:
    """One way to derive classes.

    Attributes:
        prefix: of the model_type.
        name: what names of classes begin with.
        config_class: kind -> class of configs.
        model_class: (class of transformers, kind) -> class of models.
    """

    prefix: str
    name: str
    config_class: Callable[[str], type]
    model_class: Callable[[type, str], type]


def carry_conversion(name: str, derived: str) -> None:
    """What transformers does to names and tensors of checkpoints of a class or kind, it does to derived ones too."""
    conversions = import_module("transformers.conversion_mapping")
    mapping = conversions.get_checkpoint_conversion_mapping(name)
    if mapping is not None:
        conversions.register_checkpoint_conversion_mapping(derived, mapping)


class _Found:
    """Stands for a derived class in an auto class, which makes it when it is asked for."""

    def __init__(self, auto: str, kind: str, derived: Derived) -> None:
        self._auto, self._kind, self._derived = auto, kind, derived
        # Pipelines look for the name of the class among those that an auto class knows.
        names = getattr(transformers, auto)._model_mapping._model_mapping
        self.__name__ = f"{derived.name}{names.get(kind, kind)}"

    def _class(self) -> Any:
        base, mapping = transformers.CONFIG_MAPPING[self._kind], getattr(transformers, self._auto)._model_mapping
        if base not in mapping:
            raise ValueError(f"{self._auto} of transformers has no model of the kind {self._kind}")
        return self._derived.model_class(mapping[base], self._kind)

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        return self._class().from_pretrained(*args, **kwargs)

    def _from_config(self, config: Any, **kwargs: Any) -> Any:
        return self._class()._from_config(config, **kwargs)


def register(derived: Derived, kinds: Iterable[str]) -> None:
    """Make derived checkpoints of families known to the auto classes; done once, when their module is imported."""
    for kind in kinds:
        config = derived.config_class(kind)
        transformers.AutoConfig.register(derived.prefix + kind, config)
        for auto in _AUTO:
            getattr(transformers, auto).register(config, _Found(auto, kind, derived))
        carry_conversion(kind, derived.prefix + kind)
