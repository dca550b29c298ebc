"""Products with blocks on the diagonal, each used several times over: a reference, and an operator with its gradients.

Shape suffixes: T tokens, D width; of one stack of weights: K weights, O and I for n_out and n_in, r pieces for each.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def block_linear_reference(
    x_TD: Tensor,
    weights_KOI: list[Tensor],
    bias: Tensor | None,
    starts_in: list[int],
    starts_out: list[int],
    repeats: list[int],
    width: int,
) -> Tensor:
    """Products with blocks on the diagonal, written plainly: [T, D] -> [T, width].

    A stack of K weights [n_out, n_in], each used r times, takes K r pieces of n_in columns that follow each other, from
    starts_in on, to K r pieces of n_out columns from starts_out on. Columns of the result that belong to no piece are
    zero. The bias is added to the first columns.
    """
    pieces, reached = [], 0
    for weight, start_in, start_out, r in zip(weights_KOI, starts_in, starts_out, repeats):
        k, n_out, n_in = weight.shape
        x = x_TD[:, start_in : start_in + k * r * n_in].unflatten(1, (k, r, n_in))
        pieces += [x_TD.new_zeros(len(x_TD), start_out - reached), torch.einsum("tkri,koi->tkro", x, weight).flatten(1)]
        reached = start_out + k * r * n_out
    y = torch.cat([*pieces, x_TD.new_zeros(len(x_TD), width - reached)], 1)
    return y if bias is None else y + F.pad(bias, (0, width - len(bias)))


@torch.library.custom_op("erlangen::block_linear", mutates_args=())
def block_linear(
    x_TD: Tensor,
    weights_KOI: list[Tensor],
    bias: Tensor | None,
    starts_in: list[int],
    starts_out: list[int],
    repeats: list[int],
    width: int,
) -> Tensor:
    """As `block_linear_reference`, without a pass over the activations besides the products themselves.

    Each product reads columns of x and writes columns of the result where they are; slices and a concatenation would
    cost as much as the products from 1,000 channels down.
    """
    columns = sum(len(weight) * r * weight.shape[1] for weight, r in zip(weights_KOI, repeats))
    y_TD = (x_TD.new_empty if columns == width else x_TD.new_zeros)(len(x_TD), width)
    for weight, start_in, start_out, r in zip(weights_KOI, starts_in, starts_out, repeats):
        k, n_out, n_in = weight.shape
        inputs = x_TD[:, start_in : start_in + k * r * n_in].unflatten(1, (k * r, n_in)).transpose(0, 1)
        outputs = y_TD[:, start_out : start_out + k * r * n_out].unflatten(1, (k * r, n_out)).transpose(0, 1)
        weight = weight.mT if r == 1 else weight.mT[:, None].expand(k, r, n_in, n_out).flatten(0, 1)
        if bias is not None and start_out == 0 and len(bias) == n_out:  # a product that adds beats a sum afterwards
            torch.addmm(bias, inputs[0], weight[0], out=outputs[0])
            inputs, outputs, weight, bias = inputs[1:], outputs[1:], weight[1:], None
        if len(weight):
            torch.bmm(inputs, weight, out=outputs)
    if bias is not None:
        y_TD[:, : len(bias)] += bias
    return y_TD


@block_linear.register_fake
def _(x_TD, weights_KOI, bias, starts_in, starts_out, repeats, width):
    return x_TD.new_empty(len(x_TD), width)


@torch.library.custom_op("erlangen::block_linear_weights", mutates_args=())
def _block_linear_weights(
    g_TD: Tensor,
    x_TD: Tensor,
    inner: list[int],
    outer: list[int],
    starts_in: list[int],
    starts_out: list[int],
    repeats: list[int],
    counts: list[int],
) -> list[Tensor]:
    """Gradients of the weights, [K, n_out, n_in] each: Σ_t g_t x_tᵀ over tokens and repeats."""
    weights = []
    for n_in, n_out, start_in, start_out, r, k in zip(inner, outer, starts_in, starts_out, repeats, counts):
        # A product with a long inner axis and a small result is faster in parts (and rounds less).
        parts = 8 if len(x_TD) % 8 == 0 and len(x_TD) >= 1024 and max(n_in, n_out) <= 128 else 1
        sums = x_TD.new_empty(k, r * parts, n_out, n_in)
        for index in range(k * r):
            g = g_TD[:, start_out + index * n_out :][:, :n_out].unflatten(0, (parts, -1))
            x = x_TD[:, start_in + index * n_in :][:, :n_in].unflatten(0, (parts, -1))
            torch.bmm(g.mT, x, out=sums[index // r, index % r * parts :][:parts])
        weights.append(sums.sum(1) if r * parts > 1 else sums[:, 0].clone())
    return weights


@_block_linear_weights.register_fake
def _(g_TD, x_TD, inner, outer, starts_in, starts_out, repeats, counts):
    return [x_TD.new_empty(k, n_out, n_in) for n_in, n_out, k in zip(inner, outer, counts)]


def _save_block_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x_TD, weights_KOI, bias, ctx.starts_in, ctx.starts_out, ctx.repeats, _ = inputs
    ctx.save_for_backward(x_TD, *weights_KOI)
    ctx.bias_size = None if bias is None else len(bias)


def _block_linear_backward(ctx: Any, g_TD: Tensor) -> tuple:
    x_TD, *weights = ctx.saved_tensors
    places = (ctx.starts_in, ctx.starts_out, ctx.repeats)
    g_x, g_weights, g_bias = None, [None] * len(weights), None
    if ctx.needs_input_grad[0]:
        turned = [weight.mT for weight in weights]
        g_x = block_linear(g_TD, turned, None, ctx.starts_out, ctx.starts_in, ctx.repeats, x_TD.shape[1])
    if any(ctx.needs_input_grad[1]):
        sizes = [[weight.shape[axis] for weight in weights] for axis in (2, 1, 0)]
        g_weights = _block_linear_weights(g_TD, x_TD, sizes[0], sizes[1], *places, sizes[2])
    if ctx.bias_size is not None and ctx.needs_input_grad[2]:
        g_bias = g_TD[:, : ctx.bias_size].sum(0)
    return g_x, g_weights, g_bias, None, None, None, None


def _save_weights(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    g_TD, x_TD, _, _, ctx.starts_in, ctx.starts_out, ctx.repeats, _ = inputs
    ctx.save_for_backward(g_TD, x_TD)


def _weights_backward(ctx: Any, h_weights: list[Tensor]) -> tuple:
    g_TD, x_TD = ctx.saved_tensors
    h_g = block_linear(x_TD, h_weights, None, ctx.starts_in, ctx.starts_out, ctx.repeats, g_TD.shape[1])
    turned = [h.mT for h in h_weights]
    h_x = block_linear(g_TD, turned, None, ctx.starts_out, ctx.starts_in, ctx.repeats, x_TD.shape[1])
    return h_g, h_x, None, None, None, None, None, None


block_linear.register_autograd(_block_linear_backward, setup_context=_save_block_linear)
_block_linear_weights.register_autograd(_weights_backward, setup_context=_save_weights)
