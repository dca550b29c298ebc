"""Optimisers by name, with the defaults of the field."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.optim import SGD, AdamW, Optimizer

from . import _shards
from .ecd import ECD
from .muon import MuonAdamW
from .soap import SOAP

__all__ = ["OPTIMIZERS", "OptimizerInfo", "create"]


@dataclass(frozen=True)
class OptimizerInfo:
    """What ``create`` knows of an optimiser.

    Attributes:
        summary: one line for help texts.
        settings: the names it takes, with their defaults.
        state_floats: how many floats of state there are for each parameter, in words.
        build: called with the parameters and every setting.
    """

    summary: str
    settings: Mapping[str, Any]
    state_floats: str
    build: Callable[..., Optimizer]


def _sgdm(params: Iterable[Any], *, initial_velocity_std: float, seed: int, **settings: Any) -> Optimizer:
    if not 0 <= initial_velocity_std < math.inf:
        raise ValueError(f"initial_velocity_std is a finite number, at least 0, not {initial_velocity_std}")
    optimizer = SGD(params, **settings)
    if initial_velocity_std:
        everything = [param for group in optimizer.param_groups for param in group["params"]]
        for index, param in enumerate(everything):
            velocity = torch.zeros_like(param, memory_format=torch.preserve_format)
            source = _shards.generator(param.device, seed, index, _shards.shard_index(param))
            with torch.no_grad():
                _shards.local(velocity).normal_(std=initial_velocity_std, generator=source)
            optimizer.state[param]["momentum_buffer"] = velocity.detach()
    return optimizer


OPTIMIZERS: Mapping[str, OptimizerInfo] = MappingProxyType(
    {
        "adamw": OptimizerInfo(
            "Adam with decoupled weight decay (arXiv 1711.05101)",
            MappingProxyType({"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "foreach": None}),
            "2",
            AdamW,
        ),
        "sgdm": OptimizerInfo(
            "stochastic gradient descent with momentum; initial_velocity_std > 0 starts the momentum at random",
            MappingProxyType(
                {
                    "lr": 0.03,
                    "momentum": 0.95,
                    "nesterov": False,
                    "weight_decay": 0.0,
                    "initial_velocity_std": 0.0,
                    "seed": 0,
                    "foreach": None,
                }
            ),
            "1",
            _sgdm,
        ),
        "soap": OptimizerInfo(
            "Adam in the eigenbasis of Shampoo (arXiv 2409.11321)",
            MappingProxyType(
                {
                    "lr": 3e-3,
                    "betas": (0.95, 0.95),
                    "shampoo_beta": 0.95,
                    "eps": 1e-8,
                    "weight_decay": 0.01,
                    "precondition_frequency": 10,
                    "max_precond_dim": 10000,
                }
            ),
            "2, and 2 (m/n + n/m) for a matrix of shape (m, n)",
            SOAP,
        ),
        "ecd": OptimizerInfo(
            "Energy Conserving Descent, q = 1 (arXiv 2501.18419); its step needs the loss",
            MappingProxyType(
                {
                    "lr": 1.0,
                    "eta": 100.0,
                    "F0": 0.0,
                    "nu": 0.0,
                    "weight_decay": 0.0,
                    "kick": "exact",
                    "dot": "global",
                    "seed": 0,
                    "foreach": None,
                }
            ),
            "1",
            ECD,
        ),
        "muon": OptimizerInfo(
            "orthogonalised momentum on hidden matrices, AdamW on the rest; wants named parameters",
            MappingProxyType(
                {
                    "lr": 1e-3,
                    "weight_decay": 0.1,
                    "momentum": 0.95,
                    "ns_steps": 5,
                    "betas": (0.9, 0.95),
                    "eps": 1e-8,
                }
            ),
            "1 on hidden matrices, 2 elsewhere",
            MuonAdamW,
        ),
    }
)


def create(name: str, params: Iterable[Any], **settings: Any) -> Optimizer:
    """Build an optimiser.

    Args:
        name: a key of ``OPTIMIZERS``.
        params: tensors, param-group dicts, or pairs of a name and a tensor (``model.named_parameters()``).
        **settings: any of ``OPTIMIZERS[name].settings``; the others keep the value given there.

    Raises:
        ValueError: no such optimiser, or it has no such setting.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimiser {name!r}{_suggest(name, OPTIMIZERS)}; there are {', '.join(OPTIMIZERS)}")
    info = OPTIMIZERS[name]
    for key in settings:
        if key not in info.settings:
            raise ValueError(
                f"{name} has no setting {key!r}{_suggest(key, info.settings)}; it takes {', '.join(info.settings)}"
            )
    return info.build(params, **{**info.settings, **settings})


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
