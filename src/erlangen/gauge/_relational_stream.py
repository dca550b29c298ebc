"""Relational attention in linear memory: strips of the Gram matrix, used for all heads and dropped, as one operator.

Heads of a relational layer share their tokens: they differ in numbers, not in features. So a strip of G = X Xᵀ, some
queries against all keys, is computed once for all heads; their scores are linear in it, their weights meet in one strip
T = Σ_h c_h α^h, and that meets the tokens once. These are two products of n² d whatever the number of heads, and five
in the backward pass, which makes the strips again and needs nothing of the forward pass but its inputs. A strip has a
bounded number of elements until that would be less than `_LEAST_ROWS` rows, so memory is O(n d + n H), never O(n²).
(Attention that keeps nothing of size n²: Dao et al., arXiv 2205.14135. A strip holds whole rows, so no running maximum
is needed.)

Shape suffixes: B batch, H heads, N tokens, M keys (references first, then the tokens), D width of a token,
R references, F = 3 numbers of a pair that the scores are linear in: G_ij, u_i u_j G_ij and v_j. In a strip: b, q, k.
"""

import torch
from torch import Tensor

_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 22}  # of a strip, for each head
_LEAST_ROWS = 32

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class _Strips:
    """One call: its tensors, and the strips that its rows fall into."""

    def __init__(
        self,
        keys_BMD: Tensor,
        scale_BM: Tensor,
        value_BM: Tensor,
        features_BMR: Tensor | None,
        content_HRR: Tensor | None,
        numbers_HF: Tensor,
        mix_H: Tensor,
        hidden_BM: Tensor | None,
        num_references: int,
        causal: bool,
    ) -> None:
        # detached: these are made into others in place
        self.keys, self.scale, self.value = keys_BMD.detach(), scale_BM.detach(), value_BM.detach()
        self.features, self.content = features_BMR, content_HRR
        self.numbers, self.mix, self.hidden = numbers_HF, mix_H, hidden_BM
        self.first, self.causal = num_references, causal
        self.batch, self.num_keys, self.dim = keys_BMD.shape
        self.num_heads = len(mix_H)
        self.num_tokens = self.num_keys - num_references
        self.rooms: dict[str, Tensor] = {}

    def strips(self) -> list[tuple[slice, slice, int]]:
        """(batch, rows of the keys that are the queries, how many keys they may see at most)."""
        if not self.num_tokens or not self.batch:
            return []
        room = _ELEMENTS.get(self.keys.device.type, _ELEMENTS["cpu"])
        num_rows = min(self.num_tokens, max(_LEAST_ROWS, room // self.num_keys))
        step = max(1, room // (num_rows * self.num_keys)) if num_rows == self.num_tokens else 1
        found = []
        for b in range(0, self.batch, step):
            for start in range(self.first, self.num_keys, num_rows):
                stop = min(start + num_rows, self.num_keys)
                rows = slice(start, stop)
                found.append((slice(b, min(b + step, self.batch)), rows, stop if self.causal else self.num_keys))
        return found

    def room(self, name: str, planes: int, batch: slice, rows: slice, num_keys: int) -> Tensor:
        """Memory for a strip, [b, planes, q, k], the same for all of a call: what was in it is overwritten."""
        shape = (batch.stop - batch.start, planes, rows.stop - rows.start)
        size = shape[0] * shape[1] * shape[2]
        if name not in self.rooms:  # no strip has more rows than the first; causal ones grow in keys
            self.rooms[name] = self.keys.new_empty(size * self.num_keys)
        return self.rooms[name][: size * num_keys].view(*shape, num_keys)

    def pairs(self, batch: slice, rows: slice, num_keys: int) -> Tensor:
        """What the scores are linear in, [b, F, q, k]."""
        pairs = self.room("pairs", 3, batch, rows, num_keys)
        gram, scaled, values = pairs.unbind(1)
        torch.bmm(self.keys[batch, rows], self.keys[batch, :num_keys].mT, out=gram)
        torch.mul(gram, self.scale[batch, None, :num_keys], out=scaled).mul_(self.scale[batch, rows, None])
        values.copy_(self.value[batch, None, :num_keys])
        return pairs

    def weights(self, pairs: Tensor, batch: slice, rows: slice) -> Tensor:
        """α, [b, H, q, k]."""
        size, _, num_rows, num_keys = pairs.shape
        scores = self.room("scores", self.num_heads, batch, rows, num_keys)
        torch.bmm(self.numbers.expand(size, -1, -1), pairs.flatten(2), out=scores.flatten(2))
        if self.features is not None:
            by_head = scores.view(size, -1, num_keys)
            by_head.baddbmm_(self.pulled_queries(batch, rows), self.features[batch, :num_keys].mT)
        if self.hidden is not None:
            # A finite number, so that a row whose keys are all hidden has weights, and not NaN.
            hidden = self.hidden[batch, None, None, :num_keys]
            scores.masked_fill_(hidden, torch.finfo(scores.dtype).min / 2)
        if self.causal:
            later = torch.ones(num_rows, num_rows, dtype=torch.bool, device=scores.device).triu_(1)
            scores[..., rows].masked_fill_(later, -torch.inf)
        return torch.softmax(scores, -1, out=self.room("weights", self.num_heads, batch, rows, num_keys))

    def pulled_queries(self, batch: slice, rows: slice) -> Tensor:
        """W_hᵀ s_i, [b, H·q, R]."""
        assert self.features is not None and self.content is not None
        return (self.features[batch, None, rows] @ self.content).flatten(1, 2)

    def mix_into(self, out: Tensor, weights: Tensor) -> None:
        """Write T to [b, 1, q, k]."""
        torch.bmm(self.mix.expand(len(weights), 1, -1), weights.flatten(2), out=out.flatten(2))

    def forward(self) -> Tensor:
        output = self.keys.new_empty(self.batch, self.num_tokens, self.dim)
        for batch, rows, num_keys in self.strips():
            mixed = self.room("mixed", 1, batch, rows, num_keys)
            self.mix_into(mixed, self.weights(self.pairs(batch, rows, num_keys), batch, rows))
            tokens = slice(rows.start - self.first, rows.stop - self.first)
            torch.bmm(mixed[:, 0], self.keys[batch, :num_keys], out=output[batch, tokens])
        return output

    def backward(self, grad_BND: Tensor) -> _Gradients:
        """Gradients of keys, scale, value, features, content, numbers and mix; empty for what there is not."""
        to_keys, to_scale, to_value, to_numbers, to_mix = (
            torch.zeros_like(t) for t in (self.keys, self.scale, self.value, self.numbers, self.mix)
        )
        to_features, to_content = (
            self.keys.new_empty(0) if t is None else torch.zeros_like(t) for t in (self.features, self.content)
        )
        mixed_numbers_HF = self.numbers * self.mix[:, None]
        for batch, rows, num_keys in self.strips():
            grad = grad_BND[batch, rows.start - self.first : rows.stop - self.first]
            keys, queries = self.keys[batch, :num_keys], self.keys[batch, rows]
            pairs = self.pairs(batch, rows, num_keys)
            weights = self.weights(pairs, batch, rows)
            size, num_rows = queries.shape[:2]
            received = self.room("received", 1, batch, rows, num_keys)
            torch.bmm(grad, keys.mT, out=received[:, 0])
            found = self.room("found", 4, batch, rows, num_keys)  # T, and gradients of the pairs
            self.mix_into(found[:, :1], weights)
            # c_h times this is the gradient of the scores, whose memory it takes
            to_scores = torch.mul(weights, received, out=self.room("scores", self.num_heads, batch, rows, num_keys))
            mean = to_scores.sum(-1, keepdim=True)
            to_scores.addcmul_(weights, mean, value=-1.0)
            to_mix += mean.sum((0, 2, 3))
            flat = to_scores.flatten(2)
            to_numbers += (flat @ pairs.flatten(2).mT).sum(0)
            torch.bmm(mixed_numbers_HF.T.expand(size, -1, -1), flat, out=found[:, 1:].flatten(2))
            if self.features is not None and self.content is not None:
                by_head = (to_scores.flatten(1, 2) @ self.features[batch, :num_keys]).unflatten(1, (-1, num_rows))
                by_head *= self.mix[:, None, None]
                to_content += (self.features[batch, None, rows].mT @ by_head).sum(0)
                to_features[batch, rows] += (by_head @ self.content.mT).sum(1)
                pulled = self.pulled_queries(batch, rows) * self.mix.repeat_interleave(num_rows)[:, None]
                to_features[batch, :num_keys].baddbmm_(to_scores.flatten(1, 2).mT, pulled)
            _, to_gram, to_scaled, to_values = found.unbind(1)
            to_value[batch, :num_keys] += to_values.sum(1)
            # Of u_i u_j G_ij: first what G receives, then what u_i does, then u_j
            to_scaled *= self.scale[batch, None, :num_keys]
            to_gram.addcmul_(to_scaled, self.scale[batch, rows, None])
            to_scaled *= pairs[:, 0]
            to_scale[batch, rows] += to_scaled.sum(-1)
            of_key = (self.scale[batch, None, rows] @ to_scaled)[:, 0]
            to_scale[batch, :num_keys] += of_key / self.scale[batch, :num_keys]
            # Tᵀ grad + to_gramᵀ X: one product of twice the inner length, as each passes over all keys
            both = torch.cat([grad, queries], 1)
            to_keys[batch, :num_keys].baddbmm_(found[:, :2].flatten(1, 2).mT, both)
            to_keys[batch, rows].baddbmm_(to_gram, keys)
        to_numbers *= self.mix[:, None]
        return to_keys, to_scale, to_value, to_features, to_content, to_numbers, to_mix


@torch.library.custom_op("erlangen::relational_mix", mutates_args=())
def _mix(
    keys: Tensor,
    scale: Tensor,
    value: Tensor,
    features: Tensor | None,
    content: Tensor | None,
    numbers: Tensor,
    mix: Tensor,
    hidden: Tensor | None,
    num_references: int,
    causal: bool,
) -> Tensor:
    with torch.autocast(keys.device.type, enabled=False):
        return _Strips(
            keys, scale, value, features, content, numbers, mix, hidden, num_references, causal
        ).forward()  # fmt: skip


@_mix.register_fake
def _(keys, scale, value, features, content, numbers, mix, hidden, num_references, causal):
    return keys.new_empty(keys.shape[0], keys.shape[1] - num_references, keys.shape[2])


@torch.library.custom_op("erlangen::relational_mix_backward", mutates_args=())
def _mix_backward(
    grad: Tensor,
    keys: Tensor,
    scale: Tensor,
    value: Tensor,
    features: Tensor | None,
    content: Tensor | None,
    numbers: Tensor,
    mix: Tensor,
    hidden: Tensor | None,
    num_references: int,
    causal: bool,
) -> _Gradients:
    with torch.autocast(keys.device.type, enabled=False):
        return _Strips(
            keys, scale, value, features, content, numbers, mix, hidden, num_references, causal
        ).backward(grad)  # fmt: skip


@_mix_backward.register_fake
def _(grad, keys, scale, value, features, content, numbers, mix, hidden, num_references, causal):
    given = (keys, scale, value, features, content, numbers, mix)
    return tuple(keys.new_empty(0) if t is None else torch.empty_like(t) for t in given)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, num_references, causal = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = (num_references, causal)


def _backward(ctx, grad):
    grads = _mix_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad)), None, None, None


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        'the streaming relational attention has no second derivative: use impl="dense" for double gradients'
    )


_mix.register_autograd(_backward, setup_context=_setup_context)
_mix_backward.register_autograd(_no_second_derivative)


def streamed_mix(
    keys_BMD: Tensor,
    scale_BM: Tensor,
    value_BM: Tensor,
    features_BMR: Tensor,
    content_HRR: Tensor | None,
    numbers_HF: Tensor,
    mix_H: Tensor,
    hidden_BM: Tensor | None,
    *,
    causal: bool,
) -> Tensor:
    """Σ_h c_h α^h X~, [B, N, D], with α^h the softmax over keys of (a_h + b_h u_i u_j) G_ij + p_h v_j + s_iᵀ W_h s_j.

    Args:
        keys_BMD: X~, the references and after them the tokens, finite everywhere.
        scale_BM: u > 0.
        value_BM: v.
        features_BMR: s, one number a reference.
        content_HRR: W; None without references.
        numbers_HF: a, b and p of each head.
        mix_H: c.
        hidden_BM: keys that no token reads, unless it would read none; None for none.
        causal: token i reads the references and tokens up to itself.

    Errors: second derivatives raise a RuntimeError.
    """
    features = None if content_HRR is None else features_BMR
    num_references = features_BMR.shape[-1]
    return _mix(
        keys_BMD, scale_BM, value_BM, features, content_HRR, numbers_HF, mix_H, hidden_BM, num_references, causal
    )
