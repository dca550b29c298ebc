r"""The pairs of matrices of a model's heads, as its optimisers see them: read from parameters, and written back.

Queries and keys of a head, or its values and output, count only as a product AᵀB: A → M A, B → M⁻ᵀ B changes nothing
for any M of the group (`forms`). Changes of weights transform as the weights do, gradients as the other one:
g_A → M⁻ᵀ g_A, g_B → M g_B.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import forms
from .layout import HeadLayout, Projection, Rotary, model_layout, unwrap

SECTORS = ("qk", "vo")


@dataclass(frozen=True)
class HeadPair:
    """Queries against keys ("qk"), or values against output ("vo"), of one attention layer.

    Attributes:
        layer: its number.
        sector: "qk" or "vo".
        heads: the layout of the layer.
        first, second: the two projections; the query heads that share a key/value head belong to one pair.
    """

    layer: int
    sector: str
    heads: HeadLayout
    first: Projection
    second: Projection

    @property
    def width(self) -> int:
        """Rows of the two factors."""
        return self.first.width

    @property
    def rotary(self) -> Rotary | None:
        """Positions that cut the group of this pair down to a complex number a plane."""
        return self.heads.rotary if self.sector == "qk" else None

    @property
    def names(self) -> tuple[str, ...]:
        """The stored tensors that the pair is made of, in a fixed order."""
        of_first = (self.first.weight, _bias(self.first))
        of_second = (self.second.weight, _bias(self.second))
        return tuple(dict.fromkeys(name for name in (*of_first, *of_second) if name is not None))

    def factors(self, tensor: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        """A and B, each [key/value heads, width, columns]: the rows of the map and, as one more column, of its bias.

        The columns of the query heads of a group follow each other. May be views of what is stored.

        Args:
            tensor: name -> the stored tensor, or one of its shape (a gradient, a momentum, a change).
        """
        return self._read(tensor, self.first), self._read(tensor, self.second)

    def put(self, tensor: Callable[[str], Tensor], first: Tensor, second: Tensor) -> None:
        """Write A and B into stored tensors, in place.

        Args:
            tensor: name -> the tensor to be changed.
            first, second: of the shapes of `factors`.
        """
        with torch.no_grad():
            self._write(tensor, self.first, first)
            self._write(tensor, self.second, second)

    def _read(self, tensor: Callable[[str], Tensor], projection: Projection) -> Tensor:
        heads = projection.heads(tensor(projection.weight))
        if (bias := _bias(projection)) is not None:
            heads = torch.cat([heads, projection.head_biases(tensor(bias))[..., None]], dim=-1)
        kv_heads = self.heads.num_kv_heads
        if len(heads) == kv_heads:
            return heads
        return heads.unflatten(0, (kv_heads, -1)).transpose(1, 2).flatten(2)

    def _write(self, tensor: Callable[[str], Tensor], projection: Projection, factor: Tensor) -> None:
        per_group = len(projection.starts) // self.heads.num_kv_heads
        heads = factor.unflatten(2, (per_group, -1)).transpose(1, 2).flatten(0, 1)
        if (bias := _bias(projection)) is not None:
            projection.put_head_biases(tensor(bias), heads[..., -1])
            heads = heads[..., :-1]
        projection.put_heads(tensor(projection.weight), heads)


def _bias(projection: Projection) -> str | None:
    return projection.bias_name if projection.side == "out" else None


def free_sectors(model: nn.Module) -> tuple[str, ...]:
    """The sectors of a model that have a continuous gauge in every layer."""
    normed = any(layer.attention.qk_norm for layer in model_layout(model).layers)
    return ("vo",) if normed else SECTORS


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under each of its names; wrappers of compile and DDP are seen through."""
    return dict(unwrap(model).named_parameters(remove_duplicate=False))


def head_pairs(model: nn.Module, sectors: Collection[str] = SECTORS, *, broken: bool = False) -> tuple[HeadPair, ...]:
    """The pairs of a model, layer by layer.

    Args:
        model: one whose layout is known.
        sectors: "qk", "vo" or both.
        broken: take a model with unlearned biases too, for which these pairs are no symmetry.

    Raises:
        TypeError: no layout is known.
        ValueError: no such sector; a sector without a continuous gauge; unlearned biases; a tensor of the layout that
            the model does not have, not as a whole, or not in floating point.
    """
    unknown = sorted(set(sectors) - set(SECTORS))
    if unknown or not sectors:
        raise ValueError(f"sectors must be of {', '.join(SECTORS)}, received {', '.join(unknown) or 'none'}")
    layout, parameters = model_layout(model), parameters_by_name(model)
    if not broken and getattr(unwrap(model), "symmetry_breaking", None) is not None:
        raise ValueError(
            "this model has unlearned biases (erlangen.breaking.break_symmetry), with which turning its heads is no "
            "symmetry: take them out first, with erlangen.breaking.restore"
        )
    pairs = []
    for number, layer in enumerate(layout.layers):
        heads = layer.attention
        if "qk" in sectors:
            if heads.qk_norm:
                raise ValueError(
                    f"queries and keys of layer {number} are normalised, which leaves no linear gauge between them: "
                    'leave them out, with sectors=("vo",)'
                )
            pairs.append(HeadPair(number, "qk", heads, heads.query, heads.key))
        if "vo" in sectors:
            pairs.append(HeadPair(number, "vo", heads, heads.value, heads.output))
    shapes = layout.tensor_shapes()
    for name in dict.fromkeys(name for pair in pairs for name in pair.names):
        _check_tensor(layout.kind, name, shapes[name], parameters)
    return tuple(pairs)


def _check_tensor(kind: str, name: str, shape: tuple[int, ...], parameters: dict[str, nn.Parameter]) -> None:
    if name not in parameters:
        raise ValueError(
            f"the layout of this {kind} names a tensor {name}, which the model does not have: its maps were replaced "
            "or fused in a way that the layout does not describe. Describe the model with erlangen.gauge.describes"
        )
    parameter = parameters[name]
    if parameter.is_meta or hasattr(parameter, "full_tensor"):
        state = "on the meta device" if parameter.is_meta else "sharded"
        raise ValueError(f"weights must be in memory as a whole, and {name} is {state}: load or gather it first")
    if tuple(parameter.shape) != shape:
        raise ValueError(
            f"{name} must have the shape {shape} by the layout of this {kind}, and has {tuple(parameter.shape)}"
        )
    if parameter.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} is of dtype {parameter.dtype}: quantised weights are not optimised in place")


def trained_pairs(
    optimizer: torch.optim.Optimizer, model: nn.Module, pairs: Sequence[HeadPair]
) -> tuple[HeadPair, ...]:
    """Those pairs that an optimiser moves.

    Raises:
        ValueError: it owns a parameter that is not of the model; it moves only a part of a pair, whose gauge the rest
            then fixes; it moves none.
    """
    parameters = parameters_by_name(model)
    known = {id(parameter) for parameter in parameters.values()}
    owned = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise ValueError(
                    f"the optimiser owns a parameter of shape {list(parameter.shape)} that is not of this model: "
                    "give it parameters of the model only, and others to an optimiser of their own"
                )
            if parameter.requires_grad:
                owned.add(id(parameter))
    moved = []
    for pair in pairs:
        still = [name for name in pair.names if id(parameters[name]) not in owned]
        if still and len(still) < len(pair.names):
            raise ValueError(
                f"the optimiser moves only a part of the {pair.sector} pair of layer {pair.layer}, not "
                f"{', '.join(still)}: train all of it or nothing, or leave the sector out"
            )
        if not still:
            moved.append(pair)
    if not moved:
        raise ValueError("the optimiser moves none of the pairs of heads of this model")
    return tuple(moved)


def check_rank(pairs: Sequence[HeadPair], parameters: dict[str, nn.Parameter]) -> None:
    """Every head has a product of full rank.

    Raises:
        ValueError: one has not; its layer and number are named.
    """
    for pair in pairs:
        dtype = parameters[pair.first.weight].dtype
        first, second = (factor.double() for factor in pair.factors(lambda name: parameters[name].detach()))
        rotated = 0 if pair.rotary is None else pair.rotary.dim
        spectra = []
        if pair.rotary is not None:
            planes = pair.rotary.planes(first.device)
            spectra.append(forms.rotary_pair(first[:, :rotated], second[:, :rotated], planes).spectrum)
        if rotated < pair.width:
            spectra.append(forms.product_spectrum(first[:, rotated:], second[:, rotated:]))
        spectrum = torch.cat(spectra, dim=1)
        size = torch.linalg.matrix_norm(first, 2) * torch.linalg.matrix_norm(second, 2)
        low = spectrum.amin(dim=1) <= 4 * pair.width**0.5 * forms.noise(dtype) * size
        if low.any():
            head = int(low.nonzero()[0])
            raise ValueError(
                f"the {pair.sector} pair of layer {pair.layer}, head {head}, has not full rank (least value "
                f"{float(spectrum[head].min()):.2g} beside {float(spectrum[head].max()):.2g}): its orbit is not closed "
                "and has no quotient there. Start from weights that are not zero, or leave the sector out"
            )
