"""Causal attention in bfloat16 on a CPU, as products of batches.

For short windows the tiles of `scaled_dot_product_attention` are small there, and most of its time is not spent in
products. Here a block of queries of all heads is one batched product, its softmax one pass over a buffer that stays in
cache, and probabilities are computed again in the backward pass, so memory grows with T and not with T².

Shape suffixes: B batch, H heads, K heads of keys and values, T tokens, D width of a head.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_QUERIES = 128  # of a block
_LONGEST = 1024  # beyond this the tiles of scaled_dot_product_attention are large enough


def causal_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """``scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=K < H)``, faster where this module can be.

    That is in bfloat16 (of the tensors or of autocast) on a CPU, up to 1,024 tokens, outside torch.compile and
    torch.func. Scores and softmax are in float32 and probabilities in bfloat16, as in the tiles it stands for.

    Args:
        q_BHTD: [B, H, T, D].
        k_BKTD, v_BKTD: [B, K, T, D], K a divisor of H.

    Returns:
        [B, H, T, D].
    """
    heads, kv_heads = q_BHTD.shape[1], k_BKTD.shape[1]
    if not _is_served(q_BHTD):
        return F.scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=kv_heads < heads)
    k_BHTD, v_BHTD = (
        x.repeat_interleave(heads // kv_heads, dim=1) if kv_heads < heads else x for x in (k_BKTD, v_BKTD)
    )
    return _Blocks.apply(*(x.to(torch.bfloat16) for x in (q_BHTD, k_BHTD, v_BHTD)))


def _is_served(q_BHTD: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if q_BHTD.device.type != "cpu" or q_BHTD.shape[2] > _LONGEST or q_BHTD.numel() == 0:
        return False
    autocast = torch.is_autocast_enabled("cpu") and q_BHTD.dtype != torch.float64
    return (torch.get_autocast_dtype("cpu") if autocast else q_BHTD.dtype) == torch.bfloat16


class _Buffers:
    """Memory for one block of queries after the other, and the mask of its last columns."""

    def __init__(self, q_HTD: Tensor, count: int) -> None:
        heads, tokens = q_HTD.shape[:2]
        size = min(_QUERIES, tokens)
        self.scores = torch.empty(heads * size * tokens)
        self.low = [torch.empty(heads * size * tokens, dtype=q_HTD.dtype) for _ in range(count)]
        self.mask = torch.full((size, size), -math.inf).triu(1)

    def probabilities(self, q_HTD: Tensor, k_HTD: Tensor, start: int, end: int) -> Tensor:
        """[H, end - start, end] of queries start to end, which see the keys before end; q, k in float32, q scaled."""
        shape = (len(q_HTD), end - start, end)
        scores = self.scores[: math.prod(shape)].view(shape)
        # `out` is what autocast leaves in float32.
        torch.bmm(q_HTD[:, start:end], k_HTD[:, :end].mT, out=scores)
        scores[:, :, start:] += self.mask[: end - start, : end - start]
        torch._softmax(scores, -1, False, out=scores)
        return self.low[0][: math.prod(shape)].view(shape).copy_(scores)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        ctx.save_for_backward(q_BHTD, k_BHTD, v_BHTD)
        y_BHTD = _heads_inside(q_BHTD)
        buffers = _Buffers(q_BHTD[0], count=1)
        for q, k, v, y in zip(q_BHTD, k_BHTD, v_BHTD, y_BHTD):
            wide_q, wide_k, v = q.float().mul_(q.shape[-1] ** -0.5), k.float(), v.contiguous()
            for start, end in _blocks(len(q[0])):
                p = buffers.probabilities(wide_q, wide_k, start, end)
                y[:, start:end] = torch.bmm(p, v[:, :end])
        return y_BHTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        inputs = ctx.saved_tensors
        grads = tuple(_heads_inside(x) for x in inputs)
        buffers = _Buffers(grad_BHTD[0], count=2)
        for q, k, v, grad, q_grad, k_grad, v_grad in zip(*inputs, grad_BHTD, *grads):
            scale = q.shape[-1] ** -0.5
            q, k, v, grad = (x.contiguous() for x in (q, k, v, grad))
            wide_q, wide_k = q.float().mul_(scale), k.float()
            k_sum, v_sum = torch.zeros_like(wide_k), torch.zeros_like(wide_k)
            for start, end in _blocks(len(q[0])):
                p = buffers.probabilities(wide_q, wide_k, start, end)
                v_sum[:, :end] += torch.bmm(p.mT, grad[:, start:end])
                s_grad = buffers.low[1][: p.numel()].view_as(p)
                torch.bmm(grad[:, start:end], v[:, :end].mT, out=s_grad)
                torch._softmax_backward_data(s_grad, p, -1, p.dtype, grad_input=s_grad)
                q_grad[:, start:end] = torch.bmm(s_grad, k[:, :end]).mul_(scale)
                k_sum[:, :end] += torch.bmm(s_grad.mT, q[:, start:end])
            k_grad.copy_(k_sum.mul_(scale))
            v_grad.copy_(v_sum)
        return grads


def _blocks(tokens: int) -> list[tuple[int, int]]:
    return [(start, min(start + _QUERIES, tokens)) for start in range(0, tokens, _QUERIES)]


def _heads_inside(x_BHTD: Tensor) -> Tensor:
    """Empty, of the same shape, laid out as [B, T, H, D]: what the linear maps around attention read and write."""
    return torch.empty_like(x_BHTD.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
