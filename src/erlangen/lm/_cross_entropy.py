"""Logits and their cross-entropy; in low precision without their gradient, or all of them in float32, in memory.

Shape suffixes: N positions, C width, V vocabulary, W part of a vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100

# Logits in float32 at a time: what stays in a CPU's cache, elsewhere what fills the device.
_CPU_CHUNK = 2**18
_CHUNK = 2**26
# Gradients of logits at a time: few enough not to matter beside the logits, enough for fast products.
_GRADIENTS = 2**25


def linear_cross_entropy(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``F.linear(x, weight)`` and their mean cross-entropy [] in nats, in float32 or wider.

    The loss and all gradients are those of ``F.cross_entropy(logits.float(), targets)``, and gradients may come to both
    results. For logits of lower precision than float32 (theirs or autocast's), outside torch.compile and torch.func,
    softmax and loss are taken a few rows at a time; the gradient of the logits is made for a part of the vocabulary,
    multiplied and forgotten.

    Args:
        x_NC: floating [N, C].
        weight_VC: floating [V, C].
        targets_N: int64 [N]; those that are -100 do not count.

    Returns:
        logits [N, V] and the loss [].
    """
    if not _is_served(x_NC):
        logits_NV = F.linear(x_NC, weight_VC)
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        return logits_NV, F.cross_entropy(logits_NV.to(wide), targets_N)
    device = x_NC.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_NC.dtype
    return _LinearCrossEntropy.apply(x_NC.to(dtype), weight_VC, targets_N)


def _is_served(x_NC: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    device = x_NC.device.type
    autocast = torch.is_autocast_enabled(device) and x_NC.dtype != torch.float64
    return (torch.get_autocast_dtype(device) if autocast else x_NC.dtype).itemsize < 4


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        low_VC = weight_VC.to(x_NC.dtype)
        logits_NV = F.linear(x_NC, low_VC)
        counts_N = targets_N != IGNORED
        index_N = targets_N.clamp_min(0)
        buffer = _wide(logits_NV)
        log_norm_N = torch.cat([_log_norm(_fill(buffer, part)) for part in logits_NV.split(_rows(logits_NV))])
        chosen_N = logits_NV.gather(1, index_N[:, None])[:, 0].float()
        weights_N = counts_N / counts_N.sum()
        ctx.save_for_backward(x_NC, low_VC, logits_NV, index_N, log_norm_N, weights_N)
        ctx.set_materialize_grads(False)
        ctx.weight_dtype = weight_VC.dtype
        return logits_NV, torch.where(counts_N, (log_norm_N - chosen_N) * weights_N, 0.0 * weights_N).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logits_grad_NV: Tensor | None, grad: Tensor | None) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x_NC, low_VC, logits_NV, index_N, log_norm_N, weights_N = ctx.saved_tensors
        weights_N = weights_N * (0.0 if grad is None else grad)
        x_grad_NC = torch.zeros_like(x_NC, dtype=torch.float32)
        weight_grad_VC = torch.empty_like(low_VC, dtype=ctx.weight_dtype)
        size = max(1, _GRADIENTS // max(1, len(x_NC)))
        memory = x_NC.new_empty(len(x_NC) * min(size, len(low_VC)))
        for start in range(0, len(low_VC), size):
            part = slice(start, min(start + size, len(low_VC)))
            logits_NW = logits_NV[:, part]
            grad_NW = memory[: logits_NW.numel()].view_as(logits_NW)
            more_NW = None if logits_grad_NV is None else logits_grad_NV[:, part]
            _gradient(grad_NW, logits_NW, index_N - start, log_norm_N, weights_N, more_NW)
            x_grad_NC += grad_NW @ low_VC[part]
            weight_grad_VC[part] = grad_NW.mT @ x_NC
        return x_grad_NC.to(x_NC.dtype), weight_grad_VC, None


def _gradient(
    out_NW: Tensor, logits_NW: Tensor, index_N: Tensor, log_norm_N: Tensor, weights_N: Tensor, more_NW: Tensor | None
) -> None:
    """Write the gradient of some logits: (softmax - one-hot of the targets) * weights, and more if there is any."""
    width = logits_NW.shape[1]
    inside_N = (index_N >= 0) & (index_N < width)
    hot_N1 = -inside_N[:, None].float()
    index_N1 = index_N[:, None].clamp(0, width - 1)
    buffer = _wide(logits_NW)
    parts = (x.split(_rows(logits_NW)) for x in (out_NW, logits_NW, index_N1, hot_N1, log_norm_N, weights_N))
    start = 0
    for out, logits, index, hot, log_norm, weights in zip(*parts):
        share = _fill(buffer, logits).sub_(log_norm[:, None]).exp_()
        share.scatter_add_(1, index, hot).mul_(weights[:, None])
        if more_NW is not None:
            share += more_NW[start : start + len(out)]
        out.copy_(share)
        start += len(out)


def _rows(logits_NV: Tensor) -> int:
    """How many rows are taken at a time."""
    return max(1, (_CPU_CHUNK if logits_NV.device.type == "cpu" else _CHUNK) // logits_NV.shape[1])


def _wide(logits_NV: Tensor) -> Tensor:
    """Empty float32 memory for that: one for all parts, as fresh memory costs more than the arithmetic."""
    return torch.empty(min(_rows(logits_NV), len(logits_NV)), logits_NV.shape[1], device=logits_NV.device)


def _fill(buffer: Tensor, part: Tensor) -> Tensor:
    return buffer[: len(part)].copy_(part)


def _log_norm(logits_NV: Tensor) -> Tensor:
    """Their logsumexp [N], in their own memory."""
    largest_N1 = logits_NV.amax(dim=1, keepdim=True)
    return logits_NV.sub_(largest_N1).exp_().sum(dim=1).log_().add_(largest_N1[:, 0])
