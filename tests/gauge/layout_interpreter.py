"""A transformer run from its layout alone: tensors by name, and nothing else of the model. Slow and plain, float64."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass
class Constants:
    """What a layout does not hold, as no symmetry depends on it."""

    score_scale: float | None = None  # None: 1 / sqrt(width of a query)
    embedding_scale: float = 1.0
    rotary_bases: tuple[float, ...] = (10.0,)  # by layer, the last repeated
    causal: bool = True
    chosen_experts: int = 2
    chosen_groups: int = 1


def interpret(layout, tensors, tokens, constants=None, types=None):
    """Logits [B, T, vocabulary] of a layout whose tensors are given by name, or hidden states where there are none."""
    constants = constants or Constants()
    length = tokens.shape[1]

    def norm(x, n):
        if n is None:
            return x
        if n.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + n.eps).sqrt()
        if n.gain:
            x = x * (tensors[n.weight] + n.offset)
        return x + tensors[n.bias_name] if n.bias else x

    def read(x, projection):
        """[B, slices, T, width]"""
        heads = projection.heads(tensors[projection.weight])
        y = torch.einsum("btc,hwc->bhtw", x, heads)
        return y + projection.head_biases(tensors[projection.bias_name])[:, None] if projection.bias else y

    def write(y, projection):
        """[B, slices, T, width] to [B, T, dim]"""
        x = torch.einsum("bhtw,hwc->btc", y, projection.heads(tensors[projection.weight]))
        return x + tensors[projection.bias_name] if projection.bias else x

    def turn(x, rotary, base):
        angle = torch.outer(
            torch.arange(length).double(), base ** (-torch.arange(rotary.dim // 2).double() * 2 / rotary.dim)
        )
        first, second = rotary.planes().unbind(1)
        y = x.clone()
        y[..., first] = x[..., first] * angle.cos() - x[..., second] * angle.sin()
        y[..., second] = x[..., second] * angle.cos() + x[..., first] * angle.sin()
        return y

    def attention(x, heads, base):
        latent, more, kv_in, width = heads.latent, 0.0, x, heads.head_dim
        query_in = x
        if latent is not None:
            if latent.query_latent is not None:
                query_in = norm(read(x, latent.query_latent)[:, 0], latent.query_norm)
            kv_in = norm(read(x, latent.kv_latent)[:, 0], latent.kv_norm)
            width += latent.rotary.dim
            query, key = read(query_in, latent.rotary_query), read(x, latent.rotary_key)
            more = turn(query, latent.rotary, base) @ turn(key, latent.rotary, base).mT
        query, key, value = read(query_in, heads.query), read(kv_in, heads.key), read(kv_in, heads.value)

        def normed(x, n):
            over_all = heads.qk_norm_over == "all"
            flat = x.transpose(1, 2).flatten(2) if over_all else x
            if n is True:
                flat = flat / flat.square().mean(-1, keepdim=True).sqrt()
            else:
                flat = norm(flat, n)
            return flat.unflatten(-1, (x.shape[1], x.shape[3])).transpose(1, 2) if over_all else flat

        if heads.qk_norm:
            norms = (True, True) if heads.qk_norm is True else heads.qk_norm
            query, key = normed(query, norms[0]), normed(key, norms[1])
        if heads.rotary is not None:
            query, key = turn(query, heads.rotary, base), turn(key, heads.rotary, base)
        key, value = (part.repeat_interleave(heads.group_size, dim=1) for part in (key, value))
        scale = width**-0.5 if constants.score_scale is None else constants.score_scale
        scores = (query @ key.mT + more) * scale
        if heads.soft_cap is not None:
            scores = heads.soft_cap * (scores / heads.soft_cap).tanh()
        if constants.causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        return write(scores.softmax(-1) @ value, heads.output)

    def feed_forward(x, mlp):
        hidden, act = read(x, mlp.up), ACTIVATIONS[mlp.activation]
        return write(act(hidden) if mlp.gate is None else act(read(x, mlp.gate)) * hidden, mlp.down)

    def mixture(x, experts):
        """Every expert for every token; those that are not chosen with weight 0."""
        scores = read(x, experts.router)[:, 0]
        weights = scores.softmax(-1) if experts.softmax else scores.sigmoid()
        by_group = weights.unflatten(-1, (experts.groups, -1))
        best = by_group.amax(-1).topk(constants.chosen_groups if experts.groups > 1 else 1, dim=-1).indices
        open_groups = torch.zeros_like(by_group[..., 0]).scatter(-1, best, 1.0)
        allowed = (by_group * open_groups[..., None]).flatten(-2)
        chosen = allowed.topk(constants.chosen_experts, dim=-1).indices
        weights = weights * torch.zeros_like(weights).scatter(-1, chosen, 1.0)
        each = torch.stack([feed_forward(x, expert) for expert in experts.experts], dim=-2)
        written = (weights[..., None] * each).sum(-2)
        return written if experts.shared is None else written + feed_forward(x, experts.shared)

    x = tensors[layout.token_embedding][tokens] * constants.embedding_scale
    others = list(layout.other_embeddings)
    if others:
        x = x + tensors[others[0]][:length]
    if len(others) > 1:
        x = x + tensors[others[1]][types]
    x = norm(x, layout.embedding_norm)
    for number, layer in enumerate(layout.layers):
        base = constants.rotary_bases[min(number, len(constants.rotary_bases) - 1)]
        written = norm(attention(norm(x, layer.attention_norm), layer.attention, base), layer.attention_out_norm)
        between = norm(x + written, layer.attention_sum_norm)
        read_by_mlp = x if layer.parallel else between
        normed_x = norm(read_by_mlp, layer.mlp_norm)
        written = feed_forward(normed_x, layer.mlp) if layer.experts is None else mixture(normed_x, layer.experts)
        written = norm(written, layer.mlp_out_norm)
        x = norm(between + written, layer.mlp_sum_norm)
    x = norm(x, layout.final_norm)
    if layout.tied:
        logits = x @ tensors[layout.token_embedding].mT
    elif layout.unembedding is not None:
        logits = read(x, layout.unembedding)[:, 0]
    else:
        return x
    return logits if layout.soft_cap is None else layout.soft_cap * (logits / layout.soft_cap).tanh()
