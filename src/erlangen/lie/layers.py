"""Layers whose tokens are poses, with features that do not transform: attention, and a pre-norm transformer.

Exactly equivariant under g → h g for each h of the group: features do not change, poses go to h times themselves.

Shape suffixes: B batch, N tokens, H heads, C width (dim), D width of a head, F width of the input features,
G dimension of the algebra, K blocks of the algebra, m size of the group's matrices (written twice).
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, get_args

import torch
from torch import Tensor, nn

from ._base import Group
from .attention import Outside, check_alike, expect_choice, expect_shape, replace_poses
from .groups import parse
from .values import lie_attention_tangent, move

FORMAT = "erlangen-lie-transformer"
VERSION = 1


class LieAttention(nn.Module):
    """Multi-head attention over poses (arXiv 2606.20547), with learned λ, τ and displacement a head.

    λ and τ are kept as logarithms, a displacement as a tangent vector. They start at λ = 1, τ from 1 to 256 in equal
    ratios (the heads see to different distances, in units of the poses) and no displacement. What a head passes on is
    the weighted sum of its values, and of the tangent vectors log(c_h⁻¹ g_i⁻¹ g_j): without the latter, tokens that
    carry nothing would see nothing. The pose moves by a learned linear map of both, zero at the start, so that the
    layer starts with poses that stay. (The paper's value path is not public; this one is ours.)

    Args:
        group: the group the poses belong to.
        num_heads: heads.
        dim: width of the features, a multiple of num_heads; None for poses that carry nothing.
        content: add query · key / √head_dim of the features to the scores.
        displacement: learn the pose, in its own frame, that a head looks for.
        update_poses: move the poses.
        causal: a token attends to itself and those before it.
        chart, outside: as in `lie_scores`.
    """

    def __init__(
        self,
        group: Group,
        num_heads: int,
        dim: int | None,
        *,
        content: bool = True,
        displacement: bool = False,
        update_poses: bool = False,
        causal: bool = False,
        chart: str = "principal",
        outside: Outside = "error",
    ) -> None:
        super().__init__()
        if num_heads < 1 or (dim is not None and (dim < 1 or dim % num_heads)):
            raise ValueError(f"num_heads must divide dim, received {num_heads} heads of {dim}")
        if dim is None and not update_poses:
            raise ValueError("attention without features has poses to give only: set update_poses=True, or dim")
        expect_choice(f"chart of {group}", chart, group.charts)
        expect_choice("outside", outside, get_args(Outside))
        self.group, self.num_heads, self.dim = group, num_heads, dim
        self.causal, self.chart, self.outside = causal, chart, outside
        self.log_block_weights = nn.Parameter(torch.zeros(num_heads, len(group.blocks)))
        self.log_temperature = nn.Parameter(torch.linspace(0.0, math.log(256.0), num_heads))
        self.displacement = nn.Parameter(torch.zeros(num_heads, group.dim)) if displacement else None
        self.query = nn.Linear(dim, dim) if dim and content else None
        self.key = nn.Linear(dim, dim) if dim and content else None
        self.value = nn.Linear(dim, dim) if dim else None
        mixed_dim = num_heads * group.dim + (dim or 0)
        self.output = nn.Linear(mixed_dim, dim) if dim else None
        self.pose_step = nn.Linear(mixed_dim, group.dim, bias=False) if update_poses else None
        if self.pose_step is not None:
            nn.init.zeros_(self.pose_step.weight)

    def forward(
        self, features: Tensor | None, poses: Tensor, mask: Tensor | None = None, *, check: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """What the tokens receive, and their poses after it.

        Args:
            features: [B, N, dim], invariant; None where the layer has no dim.
            poses: [B, N, m, m].
            mask: bool [B, N], false at padding, which may hold anything; None for none.
            check: as in `lie_scores`.

        Returns:
            features [B, N, dim], zero at padding (no residual is added), or None; and poses [B, N, m, m], those of the
            padding untouched.

        Raises:
            ValueError: shapes, dtypes or devices do not fit, a pose is not in the group, or outside the chart.
        """
        expect_shape("poses", poses, (None, None, *(self.group.matrix_size,) * 2), f"[B, N, m, m] of {self.group}")
        if (features is None) != (self.dim is None):
            wanted = "no features" if self.dim is None else f"features of width {self.dim}"
            raise ValueError(f"this layer was built for {wanted}, received {'none' if features is None else 'some'}")
        check_alike(poses=poses, features=features, parameters=self.log_temperature)
        keys = None
        clean = poses
        if mask is not None:
            _expect_mask(mask, poses)
            keys = mask[:, None, None]
            clean = _without_padding(poses, mask, self.group)
        query = key = value = None
        if features is not None:
            expect_shape("features", features, (*poses.shape[:2], self.dim), "[B, N, dim]")
            if mask is not None:
                features = features.masked_fill(~mask[..., None], 0.0)
            query, key, value = (
                self._heads(layer, features, poses.dtype) for layer in (self.query, self.key, self.value)
            )
        displacement = None if self.displacement is None else self.group.exp(self.displacement)
        if value is None:
            value = poses.new_empty(len(poses), self.num_heads, poses.shape[1], 0)
        received = lie_attention_tangent(
            clean,
            clean,
            value,
            group=self.group,
            block_weights=self.log_block_weights.exp(),
            temperature=self.log_temperature.exp(),
            displacement=displacement,
            content_query=query,
            content_key=key,
            causal=self.causal,
            mask=keys,
            chart=self.chart,
            outside=self.outside,
            check=check,
        )
        mixed = torch.cat([heads_BHND.transpose(1, 2).flatten(2) for heads_BHND in reversed(received)], dim=-1)
        if self.pose_step is not None:
            moved = move(clean, self.pose_step(mixed).to(poses.dtype), self.group)
            poses = moved if mask is None else torch.where(mask[..., None, None], moved, poses)
        if self.output is None:
            return None, poses
        output_BNC = self.output(mixed)
        return output_BNC if mask is None else output_BNC.masked_fill(~mask[..., None], 0.0), poses

    def _heads(self, layer: nn.Linear | None, features_BNC: Tensor, dtype: torch.dtype) -> Tensor | None:
        if layer is None:
            return None
        return layer(features_BNC).to(dtype).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _without_padding(poses: Tensor, mask: Tensor, group: Group) -> Tensor:
    """Poses [B, N, m, m] whose padding holds the first token's pose: as a query that brings no pair that was not there.

    Where all is padding it is the identity.
    """
    first = mask.int().argmax(-1)
    token = poses.detach()[torch.arange(len(poses), device=poses.device), first]
    token = replace_poses(token[:, None], mask.any(-1, keepdim=True), group)
    return torch.where(mask[..., None, None], poses, token)


def _expect_mask(mask: Tensor, poses: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, true where there is a token, received {mask.dtype}: convert it")
    expect_shape("mask", mask, tuple(poses.shape[:2]), "[B, N]")


@dataclass(frozen=True, kw_only=True)
class LieTransformerConfig:
    """The shape of a `LieTransformer`."""

    group: str
    """The group the poses belong to, as it prints: "SE2", "GL(3)" or "SE2 x SO3"."""
    feature_dim: int = 0
    """Width of the invariant input features; 0 for poses alone."""
    num_layers: int = 2
    """Blocks of attention and feed-forward layer."""
    num_heads: int = 4
    """Heads."""
    dim: int = 64
    """Width of the features; a head is dim / num_heads wide."""
    mlp_dim: int | None = None
    """Hidden width of the feed-forward layer: None for 4 * dim."""
    content: bool = True
    """Add query · key of the features to the scores."""
    displacement: bool = True
    """Learn the pose that a head looks for."""
    update_poses: bool = True
    """Move the poses in each block."""
    causal: bool = False
    """A token attends to itself and those before it."""
    chart: str = "principal"
    """"principal", or "polar", which is global on the groups that have it."""
    outside: Outside = "error"
    """What to do with pairs outside the principal chart: "error", or "mask" to let them not attend."""

    def __post_init__(self) -> None:
        group = parse(self.group)
        for name in ("num_layers", "num_heads", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, received {getattr(self, name)}")
        if self.feature_dim < 0:
            raise ValueError(f"feature_dim must be at least 0, received {self.feature_dim}")
        if self.mlp_dim is not None and self.mlp_dim < 1:
            raise ValueError(f"mlp_dim must be at least 1, received {self.mlp_dim}")
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim, received {self.num_heads} heads of {self.dim}")
        expect_choice(f"chart of {group}", self.chart, group.charts)
        expect_choice("outside", self.outside, get_args(Outside))


class LieBlock(nn.Module):
    """One pre-norm block: attention over the poses, then a feed-forward layer on the features."""

    def __init__(self, config: LieTransformerConfig) -> None:
        super().__init__()
        hidden_dim = config.mlp_dim or 4 * config.dim
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = LieAttention(
            parse(config.group),
            config.num_heads,
            config.dim,
            content=config.content,
            displacement=config.displacement,
            update_poses=config.update_poses,
            causal=config.causal,
            chart=config.chart,
            outside=config.outside,
        )
        self.mlp_norm = nn.LayerNorm(config.dim)
        self.mlp = nn.Sequential(nn.Linear(config.dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, config.dim))

    def forward(
        self, features_BNC: Tensor, poses: Tensor, mask: Tensor | None = None, *, check: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Features and poses after the block; arguments as in `LieAttention`."""
        received_BNC, poses = self.attention(self.attention_norm(features_BNC), poses, mask, check=check)
        features_BNC = features_BNC + received_BNC
        return features_BNC + self.mlp(self.mlp_norm(features_BNC)), poses


class LieTransformer(nn.Module):
    """A pre-norm transformer over poses: invariant features and equivariant poses out.

    Args:
        config: its shape.
        generator: of the initial weights. None: torch's global one.
    """

    def __init__(self, config: LieTransformerConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.group = parse(config.group)
        self.start = nn.Parameter(torch.empty(config.dim))  # what each token carries besides its input features
        self.input = nn.Linear(config.feature_dim, config.dim, bias=False) if config.feature_dim else None
        self.blocks = nn.ModuleList([LieBlock(config) for _ in range(config.num_layers)])
        self.norm = nn.LayerNorm(config.dim)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights again: N(0, 1 / fan in), divided by √(2 num_layers) where they write to the
        residual stream; biases 0. The geometry of `LieAttention` is not drawn.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith("pose_step"):
                writes = name.endswith(("attention.output", "mlp.2"))
                std = (module.in_features * (2 * self.config.num_layers if writes else 1)) ** -0.5
                module.weight.normal_(0.0, std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        self.start.normal_(0.0, 1.0, generator=generator)

    def forward(
        self, poses: Tensor, features: Tensor | None = None, mask: Tensor | None = None, *, check: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Features and poses of the tokens.

        Args:
            poses: [B, N, m, m], of the dtype of the weights.
            features: invariant [B, N, feature_dim]; None where the config has none.
            mask: bool [B, N], false at padding, which may hold anything; None for none.
            check: as in `lie_scores`.

        Returns:
            invariant features [B, N, dim], zero at padding; and poses [B, N, m, m], those of the padding untouched.

        Raises:
            ValueError: shapes, dtypes or devices do not fit, a pose is not in the group, or outside the chart.
        """
        feature_dim = self.config.feature_dim
        expect_shape("poses", poses, (None, None, *(self.group.matrix_size,) * 2), f"[B, N, m, m] of {self.group}")
        if mask is not None:
            _expect_mask(mask, poses)
        if (features is None) != (feature_dim == 0):
            raise ValueError(
                f"the config has feature_dim={feature_dim}, received {'no' if features is None else 'some'} features: "
                "build the model for what it is given"
            )
        check_alike(poses=poses, features=features, parameters=self.start)
        hidden_BNC = self.start.expand(*poses.shape[:2], -1)
        if self.input is not None and features is not None:
            expect_shape("features", features, (*poses.shape[:2], feature_dim), "[B, N, feature_dim]")
            if mask is not None:
                features = features.masked_fill(~mask[..., None], 0.0)
            hidden_BNC = hidden_BNC + self.input(features)
        for block in self.blocks:
            hidden_BNC, poses = block(hidden_BNC, poses, mask, check=check)
        hidden_BNC = self.norm(hidden_BNC)
        return hidden_BNC if mask is None else hidden_BNC.masked_fill(~mask[..., None], 0.0), poses

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and config to one safetensors file; written aside, then renamed.

        Raises:
            OSError: it cannot be written; what was there before is untouched.
        """
        from safetensors.torch import save_file

        path = Path(path)
        aside = path.with_name(path.name + ".writing")
        metadata = {"format": FORMAT, "version": str(VERSION), "config": json.dumps(asdict(self.config))}
        try:
            save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, aside, metadata)
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Self:
        """Read a model that `save` wrote, in the dtype it was saved in.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or not a model of ours.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no model {path}")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                # Copied, for they may be a view of the file, which others may overwrite.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}): save the model again") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a saved LieTransformer: it is of another program")
        if metadata.get("version") != str(VERSION):
            raise ValueError(f"{path} has format version {metadata.get('version')}, this Erlangen reads {VERSION}")
        try:
            with torch.device("meta"):  # draws nothing
                model = cls(LieTransformerConfig(**json.loads(metadata["config"])))
            model.load_state_dict(tensors, assign=True)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged, its weights do not fit its config ({error})") from error
        return model
