"""PReLU with one slope a feature (He et al., arXiv 1502.01852), in few passes over memory.

`torch.nn.functional.prelu` computes the same and has a fast forward; its backward pass on a CPU takes one element at a
time. Shape suffix F: features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

_CHUNK = 2**17  # numbers


def prelu(x: Tensor, slope_F: Tensor) -> Tensor:
    """x where it is positive, slope · x elsewhere; at 0 the derivative is that of the left side.

    Args:
        x: floating [..., F].
        slope_F: floating [F], taken in the dtype of x.
    """
    if torch.compiler.is_compiling():  # which fuses it
        return torch.where(x > 0, x, slope_F.to(x.dtype) * x)
    return _PReLU.apply(x, slope_F.to(x.dtype))


class _PReLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, slope_F: Tensor) -> Tensor:  # type: ignore[override]
        return F.prelu(x.reshape(-1, x.shape[-1]), slope_F).view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, slope_F = ctx.saved_tensors
        batched = any(is_functorch_wrapped_tensor(y) or is_legacy_batchedtensor(y) for y in (grad, x, slope_F))
        if grad.device.type == "cpu" and not (batched or torch.is_grad_enabled()):
            return _gradients(grad, x, slope_F)
        right = torch.ops.aten.threshold_backward(grad, x, 0)
        left = grad - right
        slope_grad_F = (left * x).sum(tuple(range(x.ndim - 1)))
        return torch.addcmul(right, left, slope_F), slope_grad_F

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor, slope_tangent_F: Tensor) -> Tensor:  # type: ignore[override]
        x, slope_F = ctx.saved_tensors
        return torch.where(x > 0, x_tangent, slope_F * x_tangent + slope_tangent_F * x)


def _gradients(grad: Tensor, x: Tensor, slope_F: Tensor) -> tuple[Tensor, Tensor]:
    """Those of `_PReLU`, a few rows at a time in memory that stays in a CPU's cache."""
    features = x.shape[-1]
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = max(1, _CHUNK // features)
    left_buffer = x.new_empty(rows, features)
    slope_grad_F = torch.zeros_like(slope_F, dtype=torch.promote_types(x.dtype, torch.float32))
    for out, above, below in zip(*(y.reshape(-1, features).split(rows) for y in (x_grad, grad, x))):
        left = left_buffer[: len(below)]
        torch.ops.aten.threshold_backward.grad_input(above, below, 0, grad_input=out)
        torch.sub(above, out, out=left)
        out.addcmul_(left, slope_F)
        slope_grad_F += left.mul_(below).sum(0, dtype=slope_grad_F.dtype)
    return x_grad, slope_grad_F.to(slope_F.dtype)
