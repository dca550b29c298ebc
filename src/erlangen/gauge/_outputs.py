"""What a model in memory computes before and after, in three precisions."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .layout import ModelLayout

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Float64(TorchFunctionMode):
    """Models of transformers compute norms, softmax and positions in float32; in this context, in float64."""

    _reading = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """In this context float32 is float32."""
        self._reading = True
        try:
            yield
        finally:
            self._reading = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._reading:
            func = Tensor.double if func is Tensor.float else func
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _output(model: nn.Module, inputs: Tensor | Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """Logits (or hidden states) of a copy of the model in a dtype, float64 on the CPU."""
    with torch.inference_mode(), Float64() if dtype == torch.float64 else nullcontext():
        cast = copy.deepcopy(model).to(dtype).eval()
        config: Any = getattr(cast, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"  # the grouped kernel knows no float64
        found = cast(**inputs) if isinstance(inputs, Mapping) else cast(inputs)
    for name in ("logits", "last_hidden_state"):
        if hasattr(found, name):
            found = getattr(found, name)
    if isinstance(found, tuple):
        found = found[0]
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the outputs of a {type(model).__name__} could not be compared: a call gave a {type(found).__name__}, not "
            "a tensor, a tuple or an output with logits. Pass check=False, and compare them yourself"
        )
    return found.cpu().double()


def generated_inputs(model: nn.Module, layout: ModelLayout, device: torch.device) -> Tensor:
    """int64 [2, T]: random tokens, always the same."""
    config, length = getattr(model, "config", None), 32
    for name in ("max_position_embeddings", "n_positions", "context_length"):
        limit = getattr(config, name, None)
        if isinstance(limit, int):
            length = min(length, limit)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(layout.vocab_size, (2, length), generator=generator).to(device)


def outputs(model: nn.Module, inputs: Tensor | Mapping[str, Any], shifted: bool) -> dict[str, Tensor]:
    """dtype -> what a model returns for the inputs; ``shifted``: less its mean, which softmax does not see."""
    found = {name: _output(model, inputs, dtype) for name, dtype in DTYPES.items()}
    return {name: x - x.mean(dim=-1, keepdim=True) if shifted else x for name, x in found.items()}


def compared(before: Mapping[str, Tensor], after: Mapping[str, Tensor], checked: str) -> dict[str, Any]:
    """The fields of a `Certificate` that say how outputs compare.

    Args:
        before, after: dtype ("float64", "float32", "bfloat16") -> outputs; each is asked for when it is needed, so that
            a mapping that reads from the disk has two of them in memory.
        checked: what they were computed on.
    """

    def largest(x: Tensor, y: Tensor) -> float:
        return (x - y).abs_().max().item()

    return {
        "max_logit_difference": {name: largest(after[name], before[name]) for name in before},
        "logit_scale": before["float64"].square().mean().sqrt().item(),
        "rounding": {
            when: {name: largest(values[name], values["float64"]) for name in values if name != "float64"}
            for when, values in (("before", before), ("after", after))
        },
        "checked": checked,
    }
