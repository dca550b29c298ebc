"""A decoder transformer, GPT-style, pre-norm.

Shape suffixes: B batch, T tokens, C width (dim), H query heads, K key/value heads, D width of a head, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from erlangen.gauge import MLP as MLPLayout
from erlangen.gauge import HeadLayout, Layer, ModelLayout, Norm, describes, rows
from erlangen.gauge import Rotary as RotaryLayout

from ._attention import causal_attention
from ._cross_entropy import linear_cross_entropy
from ._prelu import prelu
from .config import GPTConfig


def at_least_float32(x: Tensor) -> Tensor:
    """Losses are taken in float32 when the logits are of lower precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Rotary(nn.Module):
    """Rotary positions (Su et al., arXiv 2104.09864) on the first rotary_dim coordinates, planes (i, i + half)."""

    def __init__(self, rotary_dim: int, context_length: int, base: float) -> None:
        super().__init__()
        half = rotary_dim // 2
        frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle_TD = torch.outer(torch.arange(context_length, dtype=torch.float64), frequency)
        self.register_buffer("cos", angle_TD.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", angle_TD.sin().to(torch.get_default_dtype()), persistent=False)

    def forward(self, x_BHTD: Tensor) -> Tensor:
        half = self.cos.shape[-1]
        cos, sin = self.cos[: x_BHTD.shape[-2]], self.sin[: x_BHTD.shape[-2]]
        # Under autocast x may be low precision; the turn is taken in the precision of the table.
        first, second, rest = x_BHTD.split([half, half, x_BHTD.shape[-1] - 2 * half], dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHTD.dtype)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


class Attention(nn.Module):
    """Causal self-attention, with grouped keys when num_kv_heads < num_heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        self.head_dim, self.qk_norm = config.head_dim, config.qk_norm
        kv_dim, bias = config.kv_heads * config.head_dim, config.attention_bias
        self.query = nn.Linear(config.dim, config.dim, bias=bias)
        self.key = nn.Linear(config.dim, kv_dim, bias=bias)
        self.value = nn.Linear(config.dim, kv_dim, bias=bias)
        self.output = nn.Linear(config.dim, config.dim, bias=bias)

    def forward(self, x_BTC: Tensor, rotary: Rotary | None = None) -> Tensor:
        q_BHTD = self.query(x_BTC).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k_BKTD = self.key(x_BTC).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v_BKTD = self.value(x_BTC).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        if self.qk_norm:
            q_BHTD, k_BKTD = F.rms_norm(q_BHTD, (self.head_dim,)), F.rms_norm(k_BKTD, (self.head_dim,))
        if rotary is not None:
            q_BHTD, k_BKTD = rotary(q_BHTD), rotary(k_BKTD)
        y_BHTD = causal_attention(q_BHTD, k_BKTD, v_BKTD)
        return self.output(y_BHTD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Feed-forward layer: GELU, SwiGLU, or PReLU with one learned slope a feature."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        self.up = nn.Linear(config.dim, config.hidden_dim, bias=config.bias)
        if self.kind == "swiglu":
            self.gate = nn.Linear(config.dim, config.hidden_dim, bias=config.bias)
        elif self.kind == "prelu":
            self.slope = nn.Parameter(torch.empty(config.hidden_dim))
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        hidden = self.up(x_BTC)
        if self.kind == "swiglu":
            hidden = F.silu(self.gate(x_BTC)) * hidden
        elif self.kind == "prelu":
            hidden = prelu(hidden, self.slope)
        else:
            hidden = F.gelu(hidden)
        return self.down(hidden)


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, bias=config.bias)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.dim, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, rotary: Rotary | None = None) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), rotary)
        return x_BTC + self.mlp(self.mlp_norm(x_BTC))


class Head(nn.Linear):
    """The map to logits; called with targets, it returns their mean cross-entropy too, made together with them."""

    def forward(self, x_BTC: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        if targets is None:
            return super().forward(x_BTC)
        logits_NV, loss = linear_cross_entropy(x_BTC.flatten(0, 1), self.weight, targets.flatten())
        return logits_NV.view(*targets.shape, -1), loss


class GPT(nn.Module):
    """A decoder transformer.

    Weights start from N(0, 0.02²), those that write to the residual stream from N(0, 0.02² / (2 num_layers)), biases
    from 0, PReLU slopes from N(0.2, 1) (as in the code published with arXiv 2601.22257).

    Args:
        config: its shape; vocab_size must be given.
        generator: of the initial weights. None: torch's global one.

    Attributes:
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: GPTConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("GPT needs the size of its vocabulary: set GPTConfig(vocab_size=...)")
        self.config = config
        self.gradient_checkpointing = False
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.context_length, config.dim)
            self.rotary = None
        else:
            self.rotary = Rotary(config.rotary_dim, config.context_length, config.rotary_base)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.norm = nn.LayerNorm(config.dim, bias=config.bias)
        self.head = Head(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights again."""
        residual_std = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("slope"):
                parameter.normal_(0.2, 1.0, generator=generator)
            elif parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                writes = name.endswith(("attention.output.weight", "mlp.down.weight"))
                parameter.normal_(0.0, residual_std if writes else 0.02, generator=generator)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits of the next token, and the mean cross-entropy when targets are given.

        Args:
            tokens: int64 [B, T], T at most context_length.
            targets: int64 [B, T], or None; positions of target -100 do not count.

        Returns:
            logits [B, T, V] and the loss [] in nats, or None.

        Raises:
            ValueError: the sequence is longer than the context.
        """
        if tokens.shape[-1] > self.config.context_length:
            raise ValueError(
                f"a sequence has at most context_length = {self.config.context_length} tokens, "
                f"received {tokens.shape[-1]}: shorten it, or build the model with a longer context"
            )
        x_BTC = self.token_embedding(tokens)
        if self.rotary is None:
            x_BTC = x_BTC + self.position_embedding.weight[: tokens.shape[-1]]
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x_BTC = checkpoint(block, x_BTC, self.rotary, use_reentrant=False)
            else:
                x_BTC = block(x_BTC, self.rotary)
        x_BTC = self.norm(x_BTC)
        return (self.head(x_BTC), None) if targets is None else self.head(x_BTC, targets)

    @torch.inference_mode()
    def generate(
        self, tokens: Tensor, num_tokens: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue sequences, in evaluation mode, one token at a time over the last context_length tokens.

        Args:
            tokens: int64 [B, T], T at least 1.
            num_tokens: how many to add.
            temperature: of the sampling; 0 takes the most likely token.
            generator: of the sampling, on the tokens' device.

        Returns:
            int64 [B, T + num_tokens].
        """
        was_training = self.training
        self.eval()
        try:
            for _ in range(num_tokens):
                logits_BV = self(tokens[:, -self.config.context_length :])[0][:, -1]
                if temperature > 0:
                    probabilities = (logits_BV.float() / temperature).softmax(dim=-1)
                    choice = torch.multinomial(probabilities, 1, generator=generator)
                else:
                    choice = logits_BV.argmax(dim=-1, keepdim=True)
                tokens = torch.cat([tokens, choice], dim=1)
        finally:
            self.train(was_training)
        return tokens


@describes(GPT)
def layout(model: GPT) -> ModelLayout:
    """Where a model keeps its weights."""
    config = model.config
    heads, kv_heads, width = config.num_heads, config.kv_heads, config.head_dim
    eps = model.norm.eps

    def norm(path: str) -> Norm:
        return Norm(path=path, kind="layer", eps=eps, bias=config.bias)

    def layer(path: str) -> Layer:
        attention = HeadLayout(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=width,
            query=rows(f"{path}.attention.query", heads, width, bias=config.attention_bias),
            key=rows(f"{path}.attention.key", kv_heads, width, bias=config.attention_bias),
            value=rows(f"{path}.attention.value", kv_heads, width, bias=config.attention_bias),
            output=rows(f"{path}.attention.output", heads, width, side="in", bias=config.attention_bias),
            rotary=RotaryLayout(dim=config.rotary_dim) if config.rotary_dim else None,
            qk_norm=config.qk_norm,
        )
        hidden = config.hidden_dim
        mlp = MLPLayout(
            up=rows(f"{path}.mlp.up", 1, hidden, bias=config.bias),
            gate=rows(f"{path}.mlp.gate", 1, hidden, bias=config.bias) if config.mlp == "swiglu" else None,
            down=rows(f"{path}.mlp.down", 1, hidden, side="in", bias=config.bias),
            activation={"swiglu": "silu"}.get(config.mlp, config.mlp),
            slope=f"{path}.mlp.slope" if config.mlp == "prelu" else None,
        )
        return Layer(
            attention=attention,
            mlp=mlp,
            attention_norm=norm(f"{path}.attention_norm"),
            mlp_norm=norm(f"{path}.mlp_norm"),
        )

    return ModelLayout(
        kind="erlangen",
        dim=config.dim,
        vocab_size=model.head.out_features,
        token_embedding="token_embedding.weight",
        other_embeddings={} if model.rotary is not None else {"position_embedding.weight": config.context_length},
        layers=tuple(layer(f"blocks.{number}") for number in range(config.num_layers)),
        final_norm=norm("norm"),
        unembedding=None if config.tie_embeddings else rows("head", 1, model.head.out_features),
        tied=config.tie_embeddings,
    )
