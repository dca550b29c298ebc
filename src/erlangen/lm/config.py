"""The shape of a language model, and the named sizes."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

MLP = Literal["gelu", "swiglu", "prelu"]
Positions = Literal["learned", "rotary"]


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """A decoder transformer whose attention symmetry is visible in its fields."""

    vocab_size: int | None = None
    """Tokens in the vocabulary. None: the trainer takes the tokenizer's, rounded up to a multiple of 64."""
    context_length: int = 128
    """Longest sequence, in tokens."""
    num_layers: int = 4
    """Transformer blocks."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads: None for one a query head (MHA), 1 for MQA, between for GQA."""
    dim: int = 128
    """Width of the residual stream; a head is dim / num_heads wide."""
    mlp: MLP = "gelu"
    """Feed-forward layer: "gelu", "swiglu", or "prelu" with one learned slope a feature, drawn from N(0.2, 1)."""
    mlp_dim: int | None = None
    """Hidden width of the feed-forward layer: None for 4 * dim (swiglu: 8/3 * dim, up to a multiple of 8)."""
    positions: Positions = "learned"
    """Learned absolute positions, or rotary ones. Rotary positions cut the rotations of queries and keys."""
    rotary_fraction: float = 1.0
    """Share of head_dim that rotary positions turn."""
    rotary_base: float = 10_000.0
    """Longest rotary wavelength, in radians of the slowest plane."""
    qk_norm: bool = False
    """Bring queries and keys to unit root mean square, without gains, so that their rotations stay a symmetry."""
    attention_bias: bool = True
    """Learned biases of the query, key, value and output projections."""
    bias: bool = True
    """Learned biases of the norms and of the feed-forward layer."""
    tie_embeddings: bool = True
    """Use the token embedding as output head."""

    def __post_init__(self) -> None:
        for name in ("context_length", "num_layers", "num_heads", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, received {getattr(self, name)}")
        for name in ("vocab_size", "num_kv_heads", "mlp_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, received {value}")
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim, received {self.num_heads} heads of {self.dim}")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, received {self.kv_heads} for {self.num_heads} query heads"
            )
        for name, choices in (("mlp", get_args(MLP)), ("positions", get_args(Positions))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, received {getattr(self, name)!r}")
        if not 0.0 < self.rotary_fraction <= 1.0:
            raise ValueError(f"rotary_fraction must lie in (0, 1], received {self.rotary_fraction}")
        if self.positions == "rotary" and self.rotary_dim < 2:
            raise ValueError(
                f"rotary positions need at least 2 of the {self.head_dim} coordinates of a head: "
                f"raise rotary_fraction (now {self.rotary_fraction}) or the width of a head"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the feed-forward layer, resolved."""
        if self.mlp_dim is not None:
            return self.mlp_dim
        return -(-8 * self.dim // 24) * 8 if self.mlp == "swiglu" else 4 * self.dim

    @property
    def rotary_dim(self) -> int:
        """Coordinates of a head that rotary positions turn; even, 0 without rotary positions."""
        return 2 * int(self.head_dim * self.rotary_fraction / 2) if self.positions == "rotary" else 0


PRESETS: dict[str, GPTConfig] = {
    "tiny": GPTConfig(),
    "small": GPTConfig(num_layers=6, num_heads=6, dim=384, context_length=256),
    "medium": GPTConfig(num_layers=8, num_heads=8, dim=512, context_length=512),
    "124m": GPTConfig(num_layers=12, num_heads=12, dim=768, context_length=1024),
}
"""Named sizes; "124m" is the shape of GPT-2 small."""


def preset(name: str, **fields: Any) -> GPTConfig:
    """A named size, with fields replaced.

    Raises:
        ValueError: no preset has this name.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}: choose one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **fields)
