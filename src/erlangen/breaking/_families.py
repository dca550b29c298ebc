"""What a library of foreign models wants to know when one of its models is broken, made plain, or given biases.

`breaking` works on modules alone. A library whose models carry a config that is saved beside their weights registers
here what has to happen to it, by the name of its top package; the module that knows is loaded on first need.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from torch import nn

# Top packages of foreign classes -> the module that has a `Family` named FAMILY.
_ADAPTERS = {"transformers": "erlangen.interop.broken"}


class Family(Protocol):
    """What is done to the models of one library."""

    def check(self, model: nn.Module) -> None:
        """Raise ValueError for a model that could not be saved once it is broken."""

    def broken(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        """Called after unlearned biases were put in, with the arguments of `break_symmetry`."""

    def plain(self, model: nn.Module) -> None:
        """Called after they were taken out."""

    def attention_bias(self, model: nn.Module) -> str:
        """What the config field is called that gives the attention projections biases.

        Raises ValueError, in words, where the family has none.
        """


def family_of(model: nn.Module) -> Family | None:
    """The library's part for a model, or None."""
    for cls in type(model).__mro__:
        adapter = _ADAPTERS.get(cls.__module__.partition(".")[0])
        if adapter is not None:
            return import_module(adapter).FAMILY
    return None
