"""A linear map that stores and multiplies less than a dense one: `ReducedLinear`, and how it is put together.

Rows of a map that read the same inputs may hold an identity block: row i of every head is 1 at input ``order[i]`` and 0
at the other chosen inputs. Those numbers are neither stored nor multiplied: the chosen inputs are added to the product
of the others. Rows that are zero are not computed, and inputs that nothing reads are not read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Part(nn.Module):
    """Rows with an identity block: of ``heads`` times ``width`` rows, the first ``block`` of each ``width`` hold it.

    All other rows are 0 there. Shapes: weight [rows, in_features - block]; order int32 [in_features], the chosen inputs
    first.
    """

    order: Tensor | None

    def __init__(self, in_features: int, rows: int, heads: int, width: int, block: int, **kind: Any) -> None:
        super().__init__()
        self.heads, self.width, self.block = heads, width, block
        self.weight = nn.Parameter(torch.empty(rows, in_features - block, **kind))
        order = torch.arange(in_features, dtype=torch.int32, device=kind.get("device")) if block else None
        self.register_buffer("order", order)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in_features] -> [..., rows]"""
        if self.order is None:
            return F.linear(x, self.weight, bias)
        rows = x.index_select(-1, self.order).reshape(-1, x.shape[-1])
        chosen, rest = rows[:, : self.block], rows[:, self.block :]
        size = self.heads * self.width
        if self.weight.dtype.itemsize >= 4:
            product = F.linear(rest, self.weight, bias)
            blocks = product[:, :size].unflatten(1, (self.heads, self.width))[..., : self.block]
            blocks += chosen[:, None]
        else:
            # One product that starts from the chosen inputs: in low precision it is rounded once, as in a dense map.
            start = F.pad(chosen, (0, self.width - self.block)).repeat(1, self.heads)
            start = F.pad(start, (0, self.weight.shape[0] - size))
            start = start if bias is None else start + bias
            product = torch.addmm(start, rest, self.weight.mT)
        return product.view(*x.shape[:-1], self.weight.shape[0])

    def dense(self) -> Tensor:
        """[rows, in_features]"""
        if self.order is None:
            return self.weight.detach().clone()
        dense = self.weight.new_zeros(self.weight.shape[0], self.order.numel())
        dense[:, self.order[self.block :].long()] = self.weight.detach()
        first = torch.arange(self.heads * self.width, device=dense.device)
        first = first.view(self.heads, self.width)[:, : self.block].flatten()
        dense[first, self.order[: self.block].long().repeat(self.heads)] = 1
        return dense


class ReducedLinear(nn.Module):
    """The linear map x -> x Wᵀ + b, of whose weight [out_features, in_features] only a part is stored and multiplied.

    It takes the place of an `nn.Linear`, or of the transposed linear map of GPT-2. Its gradients are exact: those of
    the numbers that it stores. `dense` gives the weight of the map as a whole.

    Args:
        in_features, out_features: of the map that it stands for.
        parts: (rows, heads, width, block) of each group of rows: the first ``heads * width`` of ``rows`` are heads, and
            the first ``block`` rows of a head hold the identity block.
        num_inputs: how many of the inputs are read; None: all.
        placed: rows are not in the order of the outputs, or some outputs are 0.
        bias: whether there is a bias (of the rows that are computed).

    Shapes: parts.i.weight [rows, num_inputs - block], parts.i.order int32 [num_inputs], bias [all rows], inputs int32
    [num_inputs] and places int32 [all rows]: the output of each row.
    """

    inputs: Tensor | None
    places: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        parts: Sequence[tuple[int, int, int, int]],
        *,
        num_inputs: int | None = None,
        placed: bool = False,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        read = in_features if num_inputs is None else num_inputs
        self.parts = nn.ModuleList([_Part(read, *part, **kind) for part in parts])
        self.num_rows = [part[0] for part in parts]
        self.bias = nn.Parameter(torch.empty(sum(self.num_rows), **kind)) if bias else None
        ints: dict[str, Any] = {"device": device, "dtype": torch.int32}
        self.register_buffer("inputs", None if num_inputs is None else torch.arange(num_inputs, **ints))
        self.register_buffer("places", torch.arange(sum(self.num_rows), **ints) if placed else None)

    def extra_repr(self) -> str:
        """Sizes, for the description of a model."""
        stored = sum(part.weight.numel() for part in self._parts())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"stored={stored} of {self.in_features * self.out_features}"
        )

    def _parts(self) -> list[_Part]:
        return [part for part in self.parts if isinstance(part, _Part)]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]"""
        if self.inputs is not None:
            x = x.index_select(-1, self.inputs)
        biases = [None] * len(self.num_rows) if self.bias is None else self.bias.split(self.num_rows)
        products = [part(x, bias) for part, bias in zip(self._parts(), biases)]
        y = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        if self.places is None:
            return y
        return y.new_zeros(*y.shape[:-1], self.out_features).index_copy(-1, self.places.long(), y)

    @torch.no_grad()
    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Weight [out_features, in_features] and bias [out_features] of the map that it stands for."""
        rows = torch.cat([part.dense() for part in self._parts()])
        if self.inputs is not None:
            read, rows = rows, rows.new_zeros(rows.shape[0], self.in_features)
            rows[:, self.inputs.long()] = read
        if self.places is None:
            return rows, None if self.bias is None else self.bias.detach().clone()
        weight = rows.new_zeros(self.out_features, self.in_features)
        weight[self.places.long()] = rows
        if self.bias is None:
            return weight, None
        bias = rows.new_zeros(self.out_features)
        bias[self.places.long()] = self.bias
        return weight, bias

    @classmethod
    def of_plan(cls, plan: Mapping[str, Any], **kind: Any) -> "ReducedLinear":
        """An empty one, from what `Reduced.plan` holds.

        Raises:
            ValueError: the plan does not describe such a map.
        """
        try:
            sizes = {key: plan[key] for key in ("in_features", "out_features")}
            parts = [(int(rows), int(heads), int(width), int(block)) for rows, heads, width, block in plan["parts"]]
            more = {key: plan.get(key, default) for key, default in (("num_inputs", None), ("placed", False))}
            return cls(**sizes, parts=parts, **more, bias=plan["bias"], **kind)
        except (KeyError, TypeError) as error:
            raise ValueError(f"a shrunk map is described by its sizes and parts, received {plan!r}") from error


@dataclass
class Rows:
    """Some rows of a map, in float64.

    Attributes:
        places: int64 [rows], the output of each.
        weight: [rows, in_features].
        bias: [rows]; None: the map has none.
        columns: int64 [block], the inputs of the identity block.
        heads, width: in each ``width`` of the first ``heads * width`` rows, the first ``block`` hold it.
    """

    places: Tensor
    weight: Tensor
    bias: Tensor | None = None
    columns: Tensor | None = None
    heads: int = 0
    width: int = 0


@dataclass
class Reduced:
    """A map to be replaced by a `ReducedLinear`.

    Attributes:
        plan: its sizes, as JSON holds them.
        tensors: its tensors by name: weights in float64, indices int32.
    """

    plan: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def stored(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors as they are stored."""
        return {
            name: tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor
            for name, tensor in self.tensors.items()
        }

    def module(self, dtype: torch.dtype, device: torch.device) -> ReducedLinear:
        """The module itself."""
        module = ReducedLinear.of_plan(self.plan, dtype=dtype, device=device)
        module.load_state_dict(self.stored(dtype))
        return module


def reduce_rows(out_features: int, in_features: int, claims: list[Rows]) -> Reduced | None:
    """A map made of rows; outputs that no rows claim are 0.

    Returns:
        None where nothing is saved: one dense part that has every row.
    """
    blocks = [rows for rows in claims if rows.columns is not None and rows.columns.numel()]
    plain = [rows for rows in claims if rows.columns is None or not rows.columns.numel()]
    if plain:
        places = torch.cat([rows.places for rows in plain])
        order = places.argsort()
        biases = [rows.bias for rows in plain if rows.bias is not None]
        blocks.append(
            Rows(
                places[order],
                torch.cat([rows.weight for rows in plain])[order],
                torch.cat(biases)[order] if biases else None,
            )
        )
    blocks = sorted((rows for rows in blocks if rows.places.numel()), key=lambda rows: int(rows.places[0]))
    if len(blocks) == 1 and blocks[0].columns is None and blocks[0].places.numel() == out_features:
        return None
    parts, tensors = [], {}
    for number, rows in enumerate(blocks):
        weight, size = rows.weight, 0
        if rows.columns is not None:
            size = rows.columns.numel()
            chosen = torch.zeros(in_features, dtype=torch.bool, device=weight.device)
            chosen[rows.columns] = True
            rest = (~chosen).nonzero().flatten()
            tensors[f"parts.{number}.order"] = torch.cat([rows.columns, rest]).to(torch.int32)
            weight = weight[:, rest]
        tensors[f"parts.{number}.weight"] = weight
        parts.append([weight.shape[0], rows.heads, rows.width, size])
    places = torch.cat([rows.places for rows in blocks])
    biases = [rows.bias for rows in blocks if rows.bias is not None]
    if biases:
        tensors["bias"] = torch.cat(biases)
    placed = places.numel() < out_features or bool((places.diff() < 0).any())
    if placed:
        tensors["places"] = places.to(torch.int32)
    plan = {"in_features": in_features, "out_features": out_features, "parts": parts, "bias": bool(biases)}
    return Reduced(plan | ({"placed": True} if placed else {}), tensors)


def reduce_inputs(weight: Tensor, inputs: Tensor, bias: Tensor | None) -> Reduced:
    """A map [out, in] of which only some inputs (int64, ascending) count."""
    out_features, in_features = weight.shape
    plan = {
        "in_features": in_features, "out_features": out_features, "parts": [[out_features, 0, 0, 0]],
        "num_inputs": inputs.numel(), "bias": bias is not None,
    }  # fmt: skip
    tensors = {"parts.0.weight": weight[:, inputs], "inputs": inputs.to(torch.int32)}
    return Reduced(plan, tensors | ({} if bias is None else {"bias": bias}))
