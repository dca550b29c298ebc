"""Products with blocks on the diagonal, each used several times over: a reference, and one with gradients by hand.

Shape suffixes: T tokens, D width; of one stack of weights: K weights, O and I for n_out and n_in, r pieces for each.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# It means nothing to a kernel of one pixel, but torch leaves the undilated one to oneDNN on several threads only.
_DILATION = 2


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

    Inside of torch.compile it is one operator. Elsewhere it is an autograd function: wrapping an operator takes as long
    as the products of some hundred tokens.
    """
    if torch.compiler.is_compiling():
        return block_linear_operator(x_TD, weights_KOI, bias, starts_in, starts_out, repeats, width)
    return _BlockLinear.apply(x_TD, bias, starts_in, starts_out, repeats, width, *weights_KOI)


# --- products -------------------------------------------------------------------------------------------------------


def _pieces(x_TD: Tensor, start: int, count: int, size: int) -> Tensor:
    """Columns from start on, as [count, T, size]."""
    return x_TD[:, start : start + count * size].unflatten(1, (count, size)).transpose(0, 1)


def _convolves(x_TD: Tensor, n_in: int, n_out: int) -> bool:
    """Whether a convolution of width 1 is the faster product.

    For float32 on a CPU torch hands it to oneDNN and matrix products to MKL, which does not use all of the vector units
    of a processor of another make. Few tokens or narrow blocks do not make up for what a convolution prepares.
    """
    wide_enough = len(x_TD) >= 256 and min(n_in, n_out) >= 32
    return (
        wide_enough
        and x_TD.device.type == "cpu"
        and x_TD.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )


def _image(x_TD: Tensor, k: int, r: int) -> Tensor:
    """[T, k r n] as the input of a convolution in k groups, [1, k n, T r, 1] with channels last."""
    pixels = x_TD.unflatten(1, (k, r, -1)).transpose(1, 2).flatten(2).flatten(0, 1)
    return pixels[None, :, None].permute(0, 3, 1, 2)


def _convolved(x_TD: Tensor, weight_KOI: Tensor, bias: Tensor | None, r: int) -> Tensor:
    """Products of one stack, as [T, K, r, n_out]; the bias is added to the first columns (r = 1)."""
    k, n_out, n_in = weight_KOI.shape
    if bias is not None:
        bias = F.pad(bias, (0, k * n_out - len(bias)))
    image = F.conv2d(_image(x_TD, k, r), weight_KOI.reshape(k * n_out, n_in, 1, 1), bias, dilation=_DILATION, groups=k)
    return image.permute(0, 2, 3, 1).reshape(-1, r, k, n_out).transpose(1, 2)


def _merged(
    weights_KOI: list[Tensor], starts_in: list[int], starts_out: list[int], repeats: list[int]
) -> Tensor | None:
    """The stacks as one of groups as wide as the widest block, narrow blocks side by side on a group's diagonal.

    None: they do not follow each other, do not fill groups, or it would take over half as many multiplications again.
    """
    wide_out, wide_in = (max(weight.shape[axis] for weight in weights_KOI) for axis in (1, 2))
    side_by_side, needed, reached = [], 0, (0, 0)
    for weight, start_in, start_out, r in zip(weights_KOI, starts_in, starts_out, repeats):
        k, n_out, n_in = weight.shape
        m = wide_out // n_out
        if (start_in, start_out) != reached or (m * n_out, m * n_in) != (wide_out, wide_in) or k * r % m:
            return None
        reached = (start_in + k * r * n_in, start_out + k * r * n_out)
        needed += k * r * n_out * n_in
        side_by_side.append(m)
    number = reached[1] // wide_out
    if 2 * number * wide_out * wide_in > 3 * needed:
        return None
    merged, first = weights_KOI[0].new_zeros(number, wide_out, wide_in), 0
    for weight, r, m in zip(weights_KOI, repeats, side_by_side):
        k, n_out, n_in = weight.shape
        groups = merged[first : first + k * r // m].view(k * r // m, m, n_out, m, n_in)
        groups.diagonal(dim1=1, dim2=3).copy_(weight.repeat_interleave(r, 0).unflatten(0, (-1, m)).permute(0, 2, 3, 1))
        first += k * r // m
    return merged


def _product(
    x_TD: Tensor,
    weights_KOI: list[Tensor],
    bias: Tensor | None,
    starts_in: list[int],
    starts_out: list[int],
    repeats: list[int],
    width: int,
) -> Tensor:
    """Matrix products read columns of x and write columns of the result where they are; slices and a concatenation
    would cost as much as the products from 1,000 channels down. A convolution is so much faster that it may be copied.
    """
    if len(weights_KOI) > 1 and _convolves(
        x_TD, *(max(weight.shape[axis] for weight in weights_KOI) for axis in (2, 1))
    ):
        merged = _merged(weights_KOI, starts_in, starts_out, repeats)
        if merged is not None:
            weights_KOI, starts_in, starts_out, repeats = [merged], [0], [0], [1]
    columns = sum(len(weight) * r * weight.shape[1] for weight, r in zip(weights_KOI, repeats))
    y_TD = (x_TD.new_empty if columns == width else x_TD.new_zeros)(len(x_TD), width)
    for weight, start_in, start_out, r in zip(weights_KOI, starts_in, starts_out, repeats):
        k, n_out, n_in = weight.shape
        convolves, own = _convolves(x_TD, n_in, n_out), None
        fits = bias is not None and (len(bias) == n_out or (convolves and len(bias) < k * n_out))
        if fits and (start_out, r) == (0, 1):
            own, bias = bias, None  # a product that adds it beats a sum afterwards
        if convolves:
            product = _convolved(x_TD[:, start_in : start_in + k * r * n_in], weight, own, r)
            if k * r * n_out == width:
                y_TD = product.flatten(1)
            else:
                y_TD[:, start_out : start_out + k * r * n_out].unflatten(1, (k, r, n_out)).copy_(product)
            continue
        inputs, outputs = _pieces(x_TD, start_in, k * r, n_in), _pieces(y_TD, start_out, k * r, n_out)
        weight = weight.mT if r == 1 else weight.mT[:, None].expand(k, r, n_in, n_out).flatten(0, 1)
        if own is not None:
            torch.addmm(own, inputs[0], weight[0], out=outputs[0])
            inputs, outputs, weight = inputs[1:], outputs[1:], weight[1:]
        if len(weight):
            torch.bmm(inputs, weight, out=outputs)
    if bias is not None:
        y_TD[:, : len(bias)] += bias
    return y_TD


def _weight_gradients(
    g_TD: Tensor,
    x_TD: Tensor,
    inner: list[int],
    outer: list[int],
    counts: list[int],
    starts_in: list[int],
    starts_out: list[int],
    repeats: list[int],
) -> list[Tensor]:
    """Gradients of the weights, [K, n_out, n_in] each: Σ_t g_t x_tᵀ over tokens and repeats."""
    found = []
    for n_in, n_out, k, start_in, start_out, r in zip(inner, outer, counts, starts_in, starts_out, repeats):
        if k == 1 and _convolves(x_TD, n_in, n_out):  # of several groups it is slower than matrix products
            images = (
                _image(x_TD[:, start_in : start_in + r * n_in], 1, r),
                _image(g_TD[:, start_out : start_out + r * n_out], 1, r),
            )
            sums = torch.nn.grad.conv2d_weight(images[0], (n_out, n_in, 1, 1), images[1], dilation=_DILATION)
            found.append(sums.reshape(1, n_out, n_in))
            continue
        sums = _pieces(g_TD, start_out, k * r, n_out).mT @ _pieces(x_TD, start_in, k * r, n_in)
        found.append(sums if r == 1 else sums.unflatten(0, (k, r)).sum(1))
    return found


def _back(
    ctx: Any, g_TD: Tensor, product: Callable[..., Tensor], weight_gradients: Callable[..., list[Tensor]], needs: list
) -> tuple[Tensor | None, list, Tensor | None]:
    """Gradients of x, of the weights and of the bias, as far as they are needed, by functions that have gradients."""
    x_TD, *weights = ctx.saved_tensors
    g_x, g_weights, g_bias = None, [None] * len(weights), None
    if needs[0]:
        turned = [weight.mT for weight in weights]
        g_x = product(g_TD, turned, None, ctx.starts_out, ctx.starts_in, ctx.repeats, x_TD.shape[1])
    if needs[1]:
        sizes = [[weight.shape[axis] for weight in weights] for axis in (2, 1, 0)]
        g_weights = weight_gradients(g_TD, x_TD, *sizes, ctx.starts_in, ctx.starts_out, ctx.repeats)
    if ctx.bias_size is not None and needs[2]:
        g_bias = g_TD[:, : ctx.bias_size].sum(0)
    return g_x, g_weights, g_bias


def _back_of_weights(ctx: Any, h_weights: list[Tensor], product: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of g and x, given those of the gradients of the weights."""
    g_TD, x_TD = ctx.saved_tensors
    h_g = product(x_TD, h_weights, None, ctx.starts_in, ctx.starts_out, ctx.repeats, g_TD.shape[1])
    turned = [h.mT for h in h_weights]
    return h_g, product(g_TD, turned, None, ctx.starts_out, ctx.starts_in, ctx.repeats, x_TD.shape[1])


# --- autograd functions ---------------------------------------------------------------------------------------------


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, bias, starts_in, starts_out, repeats, width, *weights_KOI):
        ctx.save_for_backward(x_TD, *weights_KOI)
        ctx.starts_in, ctx.starts_out, ctx.repeats = starts_in, starts_out, repeats
        ctx.bias_size = None if bias is None else len(bias)
        return _product(x_TD, list(weights_KOI), bias, starts_in, starts_out, repeats, width)

    @staticmethod
    def backward(ctx, g_TD):  # type: ignore[override]
        needs = [ctx.needs_input_grad[0], any(ctx.needs_input_grad[6:]), ctx.needs_input_grad[1]]
        g_x, g_weights, g_bias = _back(ctx, g_TD, block_linear, _BlockLinearWeights.apply, needs)
        return g_x, g_bias, None, None, None, None, *g_weights


class _BlockLinearWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g_TD, x_TD, inner, outer, counts, starts_in, starts_out, repeats):
        ctx.save_for_backward(g_TD, x_TD)
        ctx.starts_in, ctx.starts_out, ctx.repeats = starts_in, starts_out, repeats
        return tuple(_weight_gradients(g_TD, x_TD, inner, outer, counts, starts_in, starts_out, repeats))

    @staticmethod
    def backward(ctx, *h_weights):
        return *_back_of_weights(ctx, list(h_weights), block_linear), None, None, None, None, None, None


# --- operators, for torch.compile -----------------------------------------------------------------------------------


@torch.library.custom_op("erlangen::block_linear", mutates_args=())
def block_linear_operator(
    x_TD: Tensor,
    weights_KOI: list[Tensor],
    bias: Tensor | None,
    starts_in: list[int],
    starts_out: list[int],
    repeats: list[int],
    width: int,
) -> Tensor:
    """`block_linear` as an operator of torch."""
    return _product(x_TD, weights_KOI, bias, starts_in, starts_out, repeats, width)


@block_linear_operator.register_fake
def _(x_TD, weights_KOI, bias, starts_in, starts_out, repeats, width):
    return x_TD.new_empty(len(x_TD), width)


@torch.library.custom_op("erlangen::block_linear_weights", mutates_args=())
def _weights_operator(
    g_TD: Tensor,
    x_TD: Tensor,
    inner: list[int],
    outer: list[int],
    counts: list[int],
    starts_in: list[int],
    starts_out: list[int],
    repeats: list[int],
) -> list[Tensor]:
    """`_weight_gradients` as an operator of torch."""
    return _weight_gradients(g_TD, x_TD, inner, outer, counts, starts_in, starts_out, repeats)


@_weights_operator.register_fake
def _(g_TD, x_TD, inner, outer, counts, starts_in, starts_out, repeats):
    return [x_TD.new_empty(k, n_out, n_in) for n_in, n_out, k in zip(inner, outer, counts)]


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x_TD, weights_KOI, bias, ctx.starts_in, ctx.starts_out, ctx.repeats, _ = inputs
    ctx.save_for_backward(x_TD, *weights_KOI)
    ctx.bias_size = None if bias is None else len(bias)


def _backward(ctx: Any, g_TD: Tensor) -> tuple:
    needs = [ctx.needs_input_grad[0], any(ctx.needs_input_grad[1]), ctx.needs_input_grad[2]]
    return *_back(ctx, g_TD, block_linear_operator, _weights_operator, needs), None, None, None, None


def _save_weights(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    g_TD, x_TD, _, _, _, ctx.starts_in, ctx.starts_out, ctx.repeats = inputs
    ctx.save_for_backward(g_TD, x_TD)


def _backward_of_weights(ctx: Any, h_weights: list[Tensor]) -> tuple:
    return *_back_of_weights(ctx, h_weights, block_linear_operator), None, None, None, None, None, None


block_linear_operator.register_autograd(_backward, setup_context=_save)
_weights_operator.register_autograd(_backward_of_weights, setup_context=_save_weights)
