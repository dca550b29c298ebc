"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv 2409.11321)."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._shards import is_dtensor
from ._state import WideStateOptimizer, state_dtype

__all__ = ["SOAP"]


class SOAP(WideStateOptimizer):
    """SOAP (arXiv 2409.11321, algorithm 3), in eager PyTorch.

    For each dimension i of a parameter, of size n_i, it keeps the moving average ``L_i`` (n_i, n_i) of the Gram matrix
    of the gradient along that dimension and an orthogonal ``Q_i`` near its eigenvectors, which one step of orthogonal
    iteration follows every ``precondition_frequency`` steps. Adam's second moment lives in the basis of the Q, its
    first moment in the original one, as in the authors' code (github.com/nikhilvyas/SOAP). As there, the first step
    with a gradient only sets up the preconditioner and moves nothing, a parameter of one dimension gets plain Adam, and
    weight decay is decoupled.

    It replaces HeavyBall's SOAP (3.2), which runs under ``torch.compile`` unless a setting of its whole module is
    changed, raises on float64 parameters, takes the gradients away, warns when a scheduler changes lr, keeps pickled
    bytes in its state and in eager mode takes twice the time.

    Args:
        params: tensors, param groups or named parameters. Real, dense, not sharded.
        lr: learning rate, per group; schedulers may change it at any step.
        betas: decay of the first and second moment.
        shampoo_beta: decay of the Gram matrices.
        eps: added to the root of the second moment.
        weight_decay: decoupled, ``Θ ← (1 − lr wd) Θ``.
        precondition_frequency: steps between two updates of the eigenbases.
        max_precond_dim: a dimension larger than this keeps the identity as its basis.

    State: ``"step"``, a number; ``"exp_avg"`` and ``"exp_avg_sq"``, tensors like the parameter; ``"gram"`` and
    ``"basis"``, lists of a matrix or None for each dimension. The dtype is that of the parameter or float32 if that is
    wider, and loading a state keeps it: a resumed run repeats the other bit for bit.

    Raises:
        ValueError: a setting is out of its range; a parameter is sparse, complex or a DTensor (the preconditioner needs
            whole matrices).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and max_precond_dim >= 0):
            raise ValueError("lr, eps, weight_decay and max_precond_dim are at least 0")
        if not all(0 <= beta < 1 for beta in (*betas, shampoo_beta)):
            raise ValueError(f"betas and shampoo_beta are in [0, 1), not {betas} and {shampoo_beta}")
        if precondition_frequency < 1:
            raise ValueError(f"precondition_frequency is at least 1, not {precondition_frequency}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_grad = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, param in with_grad:
            if param.is_complex() or param.grad.layout is not torch.strided or is_dtensor(param):
                raise ValueError("SOAP takes real, dense parameters that are not sharded")
        for group, param in with_grad:
            self._step_one(group, param)
        return loss

    def _step_one(self, group: dict[str, Any], param: Tensor) -> None:
        assert param.grad is not None
        state = self.state[param]
        grad = param.grad.to(state_dtype(param))
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(grad, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(grad, memory_format=torch.preserve_format)
            used = [param.dim() > 1 and 1 < size <= group["max_precond_dim"] for size in param.shape]
            state["gram"] = [grad.new_zeros(size, size) if use else None for size, use in zip(param.shape, used)]
            _update_gram(state["gram"], grad, group["shampoo_beta"])
            state["basis"] = [None if gram is None else torch.linalg.eigh(gram)[1].flip(1) for gram in state["gram"]]
            return
        state["step"] += 1
        beta1, beta2 = group["betas"]
        exp_avg, exp_avg_sq, basis = state["exp_avg"], state["exp_avg_sq"], state["basis"]
        exp_avg.lerp_(grad, 1 - beta1)
        projected = _project(grad, basis)
        exp_avg_sq.mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
        scale = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        direction = _project(exp_avg, basis).div_(exp_avg_sq.sqrt().add_(group["eps"]))
        direction = _project(direction, [None if Q is None else Q.mT for Q in basis])
        wide = param.to(grad.dtype)  # the parameter itself unless it has low precision
        wide.add_(direction, alpha=-group["lr"] * scale).mul_(1 - group["lr"] * group["weight_decay"])
        if wide is not param:
            param.copy_(wide)
        _update_gram(state["gram"], grad, group["shampoo_beta"])
        if state["step"] % group["precondition_frequency"] == 0:
            state["exp_avg_sq"] = _update_basis(state["gram"], basis, exp_avg_sq)


def _project(tensor: Tensor, basis: list[Tensor | None]) -> Tensor:
    """Multiply each dimension of ``tensor`` by the columns of its basis: ``Q_1ᵀ G Q_2`` for a matrix G."""
    for Q in basis:  # contracts the first dimension and puts it last, so that all have had their turn at the end
        tensor = tensor.movedim(0, -1) if Q is None else torch.tensordot(tensor, Q, dims=([0], [0]))
    return tensor.clone() if all(Q is None for Q in basis) else tensor


def _update_gram(grams: list[Tensor | None], grad: Tensor, beta: float) -> None:
    for dim, gram in enumerate(grams):
        if gram is not None:
            rows = grad.movedim(dim, 0).flatten(1)
            gram.lerp_(rows @ rows.mT, 1 - beta)


def _update_basis(grams: list[Tensor | None], basis: list[Tensor | None], exp_avg_sq: Tensor) -> Tensor:
    """One orthogonal iteration of each basis, in place, columns sorted by eigenvalue; ``exp_avg_sq`` in that order."""
    for dim, (gram, Q) in enumerate(zip(grams, basis)):
        if gram is None or Q is None:
            continue
        image = gram @ Q
        order = (Q * image).sum(0).argsort(descending=True, stable=True)
        exp_avg_sq = exp_avg_sq.index_select(dim, order)
        basis[dim] = torch.linalg.qr(image.index_select(1, order))[0]
    return exp_avg_sq
