"""What a canonicalisation did, what it measured, and how to carry further tensors along."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._fold import Fold, Frame, Reading, Writing
from .layout import Norm

_NUMBERS = ("float64", "float32", "bfloat16")


@dataclass
class Certificate:
    """What was done to a model, and that its outputs are what they were.

    Attributes:
        kind: of model.
        max_logit_difference: largest difference of a logit (of a hidden state, in a model without logits) before and
            after, computed in "float64", "float32" and "bfloat16". Weights stored in low precision are rounded to it
            again, which the numbers include. Empty where nothing was compared; `checked` says why.
        logit_scale: root mean square of the logits, to judge them by.
        rounding: {"before": ..., "after": ...}: largest error of the model's own logits in "float32" and "bfloat16"
            against float64, with the old weights and with the new ones.
        checked: what the outputs were compared on.
        folded: what was folded and what was left, in sentences.
        spectra: layer -> {"query_key": [kv_heads, head_dim], "value_output": [kv_heads, value_dim]}: singular values
            that no gauge changes, in the new order of heads.
        leftover: what a nearby model may have otherwise: equal singular values, ties in an order, directions of rank
            0 that are set to zero.
        transforms: the factors by which weights were multiplied, float64. Names end in what they are: "left" [slices,
            width, width] of the slices of a map, "order" int64 (new slice or feature -> old), "scale" [features] of
            hidden features, "gain" and "bias" of norms that were folded, "turn" of a latent, "residual.matrix" or
            "residual.order" and "residual.sign" of the residual stream. `apply_to` puts them together.
        maps: path -> the names of the factors of that map.
    """

    kind: str
    max_logit_difference: dict[str, float] = field(default_factory=dict)
    logit_scale: float = 0.0
    rounding: dict[str, dict[str, float]] = field(default_factory=dict)
    checked: str = "outputs were not compared"
    folded: list[str] = field(default_factory=list)
    spectra: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    leftover: list[str] = field(default_factory=list)
    transforms: dict[str, Tensor] = field(default_factory=dict, repr=False)
    maps: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    # --- carrying tensors along ---

    def _frame(self) -> Frame:
        return Frame(*(self.transforms.get(f"residual.{name}") for name in ("matrix", "order", "sign")))

    def _map(self, path: str) -> dict[str, Any]:
        path = path.removesuffix(".weight") if path not in self.maps else path
        if path not in self.maps:
            raise ValueError(f"{path} is no map that was treated: choose one of {', '.join(sorted(self.maps))}")
        return self.maps[path]

    def _reading(self, entry: Mapping[str, Any]) -> Reading | None:
        reads = entry.get("reads")
        if reads is None:
            return None
        norm = Norm(path="", kind=reads["norm"], eps=0.0)
        fold = Fold(norm, reads["kind"], ones=reads["ones"], scaled=reads["scaled"])
        gain, bias = (self.transforms[reads[name]] if name in reads else None for name in ("gain", "bias"))
        return Reading(fold, gain, bias, self._frame())

    def _slices(self, entry: Mapping[str, Any], rows: Tensor, side: str) -> Tensor:
        """Treat the slices of [outputs or inputs, ...]."""
        new = rows.clone()
        for part in entry["slices"]:
            if part["side"] != side:
                continue
            width, starts = part["width"], torch.tensor(part["starts"])
            order, left, scale = (
                self.transforms[part[name]] if name in part else None for name in ("order", "left", "scale")
            )
            index = starts[:, None] + torch.arange(width)
            if scale is not None and order is not None:
                if (scale == 0).any():
                    raise ValueError(
                        f"{entry['weight']} has hidden features that were set to zero: nothing acts on them"
                    )
                index = index[0]
                new[index] = scale.view(-1, *[1] * (rows.ndim - 1)) * rows[index][order]
                continue
            blocks = rows[index] if order is None else rows[index][order]
            if left is not None:
                left = left.repeat_interleave(len(starts) // left.shape[0], dim=0)
                if not (torch.linalg.matrix_rank(left) == width).all():
                    raise ValueError(
                        f"{entry['weight']} has directions that were set to zero (a head of low rank): no linear map "
                        "carries a change of them along"
                    )
                blocks = torch.einsum("sij,sj...->si...", left, blocks)
            new[index] = blocks
        return new

    def apply_to(self, path: str, delta: Tensor) -> Tensor:
        """Carry a change of a weight (a merged LoRA adapter, a moment of an optimiser) into the new gauge.

        The canonical model plus the result is the same function as the old model plus the change, when the biases are
        changed by `bias_shifts` too (nothing, where norms have no biases).

        Args:
            path: of a linear map, with or without ``.weight``, or the name of an embedding.
            delta: of its weight, in the shape in which that is stored.

        Returns:
            float64, on the CPU, in the same shape.

        Raises:
            ValueError: the map was not treated, the shape is not that of its weight, or a part of it was set to zero.
        """
        entry = self._map(path)
        rows = delta.detach().cpu().double()
        if "taken_off" in entry:
            raise ValueError(
                f"constants were taken off the values that {entry['weight']} did not show; with a change of it they "
                "would count, and there is no output bias to put them into"
            )
        if rows.ndim != 2:
            raise ValueError(f"the change of {entry['weight']} must be a matrix, received one of shape {rows.shape}")
        rows = rows.T if entry["transposed"] else rows
        reading = self._reading(entry)
        if reading is not None:
            rows = reading.rows(rows)
        if "latent" in entry:
            latent = entry["latent"]
            if "gain" in latent:
                rows = rows * self.transforms[latent["gain"]]
            rows = rows @ self.transforms[latent["turn"]].mT
        if "writes" in entry:
            writing = Writing(entry["writes"]["centred"], self._frame(), entry["writes"]["scale"])
            rows = writing.rows(rows.T).T
        rows = self._slices(entry, rows, "out")
        rows = self._slices(entry, rows.T, "in").T
        return (rows.T if entry["transposed"] else rows).contiguous()

    def bias_shifts(self, path: str, delta: Tensor) -> dict[str, Tensor]:
        """What a change of a weight adds to biases in the new gauge, where a bias was folded through that weight.

        Args:
            path, delta: as of `apply_to`.

        Returns:
            name of a bias -> float64, to be added; empty where no bias is concerned.
        """
        entry = self._map(path)
        rows = delta.detach().cpu().double()
        rows = rows.T if entry["transposed"] else rows
        shifts: dict[str, Tensor] = {}
        reading = self._reading(entry)
        if reading is not None and entry["bias"] is not None:
            constant = reading.constant(rows)
            if constant is not None:
                shifts[entry["bias"]] = self._slices(entry, constant, "out")
        if "value_bias" in entry and entry["bias"] is not None:
            part = next(part for part in entry["slices"] if part["side"] == "in")
            index = torch.tensor(part["starts"])[:, None] + torch.arange(part["width"])
            constant = torch.einsum("dsw,sw->d", rows[:, index], self.transforms[entry["value_bias"]])
            writing = Writing(entry["writes"]["centred"], self._frame(), entry["writes"]["scale"])
            shifts[entry["bias"]] = writing.rows(constant)
        return shifts

    # --- reading and writing ---

    def to_json(self) -> str:
        """Everything but the transforms, as JSON."""
        values = {key: value for key, value in vars(self).items() if key not in ("transforms", "spectra")}
        values["spectra"] = {
            str(layer): {name: tensor.tolist() for name, tensor in spectra.items()}
            for layer, spectra in self.spectra.items()
        }
        return json.dumps(values, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, transforms: Mapping[str, Tensor]) -> "Certificate":
        """The inverse of `to_json`, with the transforms from where they are kept."""
        values = json.loads(text)
        values["spectra"] = {
            int(layer): {name: torch.tensor(rows, dtype=torch.float64) for name, rows in spectra.items()}
            for layer, spectra in values["spectra"].items()
        }
        return cls(**values, transforms=dict(transforms))

    def __str__(self) -> str:
        lines = [f"canonical form of a {self.kind} with {len(self.spectra)} layers"]
        if self.max_logit_difference:
            lines.append(f"largest difference of an output (size {self.logit_scale:.3g}; {self.checked}):")
            for name in _NUMBERS:
                if name not in self.max_logit_difference:
                    continue
                own = [self.rounding.get(when, {}).get(name) for when in ("before", "after")]
                rounding = "" if None in own else f"   rounding of the model itself {own[0]:.2g}, now {own[1]:.2g}"
                lines.append(f"  {name:9}{self.max_logit_difference[name]:10.2g}{rounding}")
        else:
            lines.append(self.checked)
        for title, sentences in (("done", self.folded), ("left open", self.leftover)):
            lines.append(f"{title}:")
            lines += [f"  {sentence}" for sentence in sentences[:12]] or ["  nothing"]
            if len(sentences) > 12:
                lines.append(f"  and {len(sentences) - 12} more")
        return "\n".join(lines)
