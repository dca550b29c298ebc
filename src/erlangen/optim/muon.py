"""Muon on the hidden matrices, AdamW on everything else, as one optimiser."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer

__all__ = ["MuonAdamW"]


class MuonAdamW(Optimizer):
    """``torch.optim.Muon`` for matrices and ``torch.optim.AdamW`` for the rest (Jordan et al. 2024; arXiv 2502.16982).

    A parameter goes to AdamW if it does not have exactly two dimensions or, when names are given, if a part of its name
    contains ``embedding`` or is ``head`` or ends in ``_head``: ``model.lm_head.weight`` does, ``multihead_attn.weight``
    does not. Without names every matrix goes to Muon, embeddings too: hand over ``model.named_parameters()``.

    Nesterov momentum is always on: without it ``torch.optim.Muon`` normalises the momentum buffer of a bfloat16
    parameter in place (torch 2.13).

    Args:
        params: tensors, param groups or named parameters; a group is divided in two.
        lr: for both; Muon's update is rescaled to the root mean square of an AdamW update (``"match_rms_adamw"``), so
            that one value suits both. Schedulers act on all groups.
        weight_decay: decoupled, for both.
        momentum: of Muon.
        ns_steps: Newton-Schulz iterations of Muon.
        betas: of AdamW.
        eps: of AdamW.

    State: that of the two optimisers, ``"momentum_buffer"`` or ``"exp_avg"``, ``"exp_avg_sq"`` and ``"step"``. Every
    param group has a key ``"algorithm"``, ``"muon"`` or ``"adamw"``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        # Never stepped as they are: they check the settings, hold the other defaults and do the arithmetic.
        blank = torch.zeros(1, 1)
        self._inner: dict[str, Optimizer] = {
            "muon": Muon(
                [blank],
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                ns_steps=ns_steps,
                adjust_lr_fn="match_rms_adamw",
            ),
            "adamw": AdamW([blank], lr=lr, weight_decay=weight_decay, betas=betas, eps=eps),
        }
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, divided into its part for Muon and its part for AdamW."""
        params = param_group["params"]
        entries = [params] if isinstance(params, torch.Tensor) else list(params)
        divided: dict[str, list[Any]] = {"muon": [], "adamw": []}
        for entry in entries:
            name: str = entry[0] if isinstance(entry, tuple) else ""
            tensor: torch.Tensor = entry[1] if isinstance(entry, tuple) else entry
            divided["muon" if tensor.dim() == 2 and not _is_outer(name) else "adamw"].append(entry)
        for algorithm, part in divided.items():
            if part:
                defaults = self._inner[algorithm].defaults
                super().add_param_group({**defaults, **param_group, "params": part, "algorithm": algorithm})
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``torch.optim.Optimizer.load_state_dict``."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share()
        for inner in self._inner.values():
            inner.step()
        return loss

    def _share(self) -> None:
        """Give the inner optimisers our groups and our state, the very same objects."""
        for algorithm, inner in self._inner.items():
            inner.param_groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            inner.state = self.state


def _is_outer(name: str) -> bool:
    return any("embedding" in part or part == "head" or part.endswith("_head") for part in name.split("."))
