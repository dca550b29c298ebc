"""Where an attention layer keeps its heads: one description that every treatment of heads reads."""

from dataclasses import dataclass
from functools import singledispatch

from torch import nn


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """The heads of one attention layer and the linear maps that hold their weights.

    The four projections are `torch.nn.Linear` modules, weight [out, in]. Query head h owns rows
    ``h * head_dim : (h + 1) * head_dim`` of the query weight (and as many columns of the output weight), key/value head
    likewise of key and value; query head h reads key/value head ``h // (num_heads // num_kv_heads)``.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key/value heads; divides num_heads.
        head_dim: width of a head.
        query, key, value, output: paths of the projections, as `torch.nn.Module.get_submodule` takes them.
        rotary_dim: the first rotary_dim coordinates of queries and keys are turned by the position, in the planes
            (i, i + rotary_dim / 2); 0 without rotary positions.
        qk_norm: whether queries and keys are brought to unit root mean square (without gains) before the score.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    query: str
    key: str
    value: str
    output: str
    rotary_dim: int = 0
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if min(self.num_heads, self.num_kv_heads, self.head_dim) < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                "a layout needs positive sizes and key/value heads that divide the query heads, "
                f"received {self.num_heads} query heads, {self.num_kv_heads} key/value heads of width {self.head_dim}"
            )
        if not 0 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_dim must be even and at most head_dim = {self.head_dim}, received {self.rotary_dim}"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and `DistributedDataParallel` wrappers."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


@singledispatch
def head_layouts(model: nn.Module) -> tuple[HeadLayout, ...]:
    """The head layouts of a model's attention layers, in order of depth.

    This is the registry of models: whoever knows a class describes it once,
    ``@head_layouts.register`` over a function of that class, and every treatment in this library works on it.

    Raises:
        TypeError: nobody has described this class.
    """
    inner = unwrap(model) if isinstance(model, nn.Module) else model
    if inner is not model:
        return head_layouts(inner)
    raise TypeError(
        f"no head layout is known for {type(model).__name__}: register one with erlangen.gauge.head_layouts.register"
    )
