"""What `canonical_form` notes of its doings, and tensors taken in pieces."""

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._fold import Reading, Writing
from .layout import Projection


@dataclass
class Record:
    """What `canonical_form` did.

    Attributes:
        folded: what was folded and what was left, in sentences.
        spectra: layer -> {"query_key": [kv_heads, head_dim], "value_output": [kv_heads, value_dim]}, float64 singular
            values that no gauge changes, in the new order of heads. A rotary plane has one value, given for both its
            coordinates. With QK-norm: of the form between the norms. Latent attention: "rotary" beside, [1, dim].
        leftover: what a nearby model may have otherwise: equal singular values, ties in an order, directions set to
            zero.
        transforms: float64 factors, by name (see `Certificate.apply_to`). Given a mapping that puts them on the
            disk, they do not stay in memory.
        maps: key of a linear map (or name of an embedding) -> how its weight was changed, in terms of those factors;
            of experts, "moved_to": the key of the place to which it went.
    """

    folded: list[str] = field(default_factory=list)
    spectra: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    leftover: list[str] = field(default_factory=list)
    transforms: MutableMapping[str, Tensor] = field(default_factory=dict)
    maps: dict[str, dict[str, Any]] = field(default_factory=dict)

    def keep(self, name: str, tensor: Tensor) -> str:
        """Keep a factor; its name."""
        self.transforms[name] = tensor.detach().to("cpu", copy=True).contiguous()
        return name

    def map_of(self, part: Projection) -> dict[str, Any]:
        """What is known of a map."""
        known = {"weight": part.weight, "bias": part.bias_name, "transposed": part.transposed, "slices": []}
        return self.maps.setdefault(part.key, known if part.stack is None else known | {"stack": part.stack})

    def reads(self, part: Projection, reading: Reading) -> None:
        """Note what a map reads."""
        fold, norm = reading.fold, reading.fold.norm
        if norm is None or (fold.kind == "kept" and reading.frame.same):
            return
        found: dict[str, Any] = {"kind": fold.kind, "ones": fold.ones, "norm": norm.kind, "scaled": fold.scaled}
        for name, tensor in (("gain", reading.gain), ("bias", reading.bias)):
            if tensor is not None and fold.kind != "kept":
                found[name] = self.keep(f"{norm.path}.{name}", tensor)
        self.map_of(part)["reads"] = found

    def writes(self, part: Projection, writing: Writing) -> None:
        """Note how what a map writes was treated."""
        self.map_of(part)["writes"] = {"centred": writing.centred, "scale": writing.scale}

    def slices(self, part: Projection, name: str, factors: dict[str, Tensor | None]) -> None:
        """Note what was done to the slices of a map: factors "left" [.., width, width], "order", "scale"."""
        entry: dict[str, Any] = {"starts": list(part.starts), "width": part.width, "side": part.side}
        for key, tensor in factors.items():
            if tensor is not None:
                entry[key] = self.keep(f"{part.key}.{name}.{key}", tensor)
        self.map_of(part)["slices"].append(entry)


def finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor, which must hold finite values."""
    if tensor.numel() and not all(number.isfinite() for number in torch.aminmax(tensor)):
        raise ValueError(f"{name} holds values that are not finite: a canonical form needs finite weights")
    return tensor
