"""Cross-entropy of low-precision logits in float32, without all of them in float32.

Shape suffixes: N positions, V vocabulary.
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


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Mean cross-entropy [] in nats, in float32 or the logits' dtype if that is wider.

    The loss and its gradient are those of ``F.cross_entropy(logits_NV.float(), targets_N)``. For logits of lower
    precision than float32, outside torch.compile (which does as well by itself), both are computed a few rows at a
    time, and nothing but the logits and their gradient is ever as large as they are.

    Args:
        logits_NV: floating [N, V].
        targets_N: int64 [N]; those that are -100 do not count.
    """
    if logits_NV.dtype.itemsize >= 4 or torch.compiler.is_compiling():
        return F.cross_entropy(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), targets_N)
    return _RowByRow.apply(logits_NV, targets_N)


class _RowByRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        size = _CPU_CHUNK if logits_NV.device.type == "cpu" else _CHUNK
        ctx.rows = max(1, size // logits_NV.shape[1])
        counts_N = targets_N != IGNORED
        index_N = targets_N.clamp_min(0)
        log_norm_N = torch.cat([rows.float().logsumexp(dim=1) for rows in logits_NV.split(ctx.rows)])
        chosen_N = logits_NV.gather(1, index_N[:, None])[:, 0].float()
        weights_N = counts_N / counts_N.sum()
        ctx.save_for_backward(logits_NV, index_N, log_norm_N, weights_N)
        return torch.where(counts_N, (log_norm_N - chosen_N) * weights_N, 0.0 * weights_N).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits_NV, index_N, log_norm_N, weights_N = ctx.saved_tensors
        weights_N = weights_N * grad
        gradient_NV = torch.empty_like(logits_NV)
        parts = (x.split(ctx.rows) for x in (gradient_NV, logits_NV, index_N, log_norm_N, weights_N))
        for out, logits, index, log_norm, weights in zip(*parts):
            share = logits.float().sub_(log_norm[:, None]).exp_()
            share.scatter_add_(1, index[:, None], share.new_full((len(index), 1), -1.0))
            out.copy_(share.mul_(weights[:, None]))
        return gradient_NV, None
