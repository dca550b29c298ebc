"""State that is kept in more precision than the parameter it belongs to."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of the state of ``param``: its own, or float32 if that is more precise."""
    return torch.promote_types(param.dtype, torch.float32)


class WideStateOptimizer(Optimizer):
    """An optimiser whose state has ``state_dtype``: loading a state does not round it.

    ``torch.optim.Optimizer.load_state_dict`` casts every state tensor to the dtype of its parameter, which would round
    the float32 state of a bfloat16 parameter.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, keeping the dtype of each state tensor. See ``torch.optim.Optimizer.load_state_dict``."""
        super().load_state_dict(state_dict)
        for saved_group, group in zip(state_dict["param_groups"], self.param_groups):
            for key, param in zip(saved_group["params"], group["params"]):
                if key in state_dict["state"] and param.dtype != state_dtype(param):
                    self.state[param] = _copy(state_dict["state"][key], param.device)


def _copy(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device=device, copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item, device) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return type(value)(_copy(item, device) for item in value)  # pyrefly: ignore
    return value
