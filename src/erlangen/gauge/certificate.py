"""What a canonicalisation did, what it measured, and how to carry further tensors along."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ._fold import Fold, Frame, Reading, Writing
from .layout import Norm

_NUMBERS = ("float64", "float32", "bfloat16")


def _nowhere_zero(gain: Tensor, weight: str) -> Tensor:
    if (gain == 0).any():
        raise ValueError(
            f"the gain of the norm that {weight} reads is zero in places: there the old weights have no gradient, and "
            "the new ones have one that cannot be known from it"
        )
    return gain


def _expect_size(entry: Mapping[str, Any], what: str, received: int, expected: int) -> None:
    if received != expected:
        raise ValueError(f"{entry['weight']} has {expected} {what}, and what is to be carried along has {received}")


def _dual_rows(reading: Reading, rows: Tensor, weight: str) -> Tensor:
    """What `Reading.rows` does, to gradients [..., dim] instead of rows: its inverse transpose."""
    fold = reading.fold
    if fold.kind == "before" and fold.norm is not None:
        ratio = reading.bias
        if reading.gain is not None:
            gain = _nowhere_zero(reading.gain, weight)
            rows, ratio = rows / gain, None if ratio is None else ratio / gain
        if fold.ones and ratio is not None:
            # rows(w) = w diag(gain) C + (w · bias) 1 / dim. Of a gradient g + q 1 without a mean in g, the transpose is
            # (g + q bias / gain) diag(gain).
            total = ratio.sum()
            if total.abs() <= 1e-12 * ratio.abs().sum():
                raise ValueError(f"the bias of the norm that {weight} reads adds up to nothing: no gradient follows it")
            constant = (rows.sum(dim=-1) / total)[..., None]
            rows = rows - constant * ratio
            return reading.frame.apply(rows - rows.mean(dim=-1, keepdim=True)) + constant
        if fold.norm.kind == "layer":
            rows = rows - rows.mean(dim=-1, keepdim=True)
    elif fold.kind == "after":
        unseen = reading.unseen()
        if unseen is not None:
            rows = rows - (rows @ unseen.mT) @ unseen
        rows = rows / reading.scale
    return reading.frame.apply(rows)


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
            hidden features, "gain" and "bias" of norms that were folded, "turn" of a latent, "ratio" of the gains of
            a norm of queries or keys (new to old), "residual.matrix" or "residual.order" and "residual.sign" of the
            residual stream. `apply_to` puts them together.
        maps: path -> the names of the factors of that map; of maps that are stacked in one tensor, path and number.
            Where experts have changed places, "moved_to" is the path at which a map is now.
        source, target: fingerprints of the weights before and after: a hash of the names, shapes and dtypes of the
            tensors and of a sample of their numbers. What was made for other weights is refused by them.
    """

    kind: str
    max_logit_difference: dict[str, float] = field(default_factory=dict)
    logit_scale: float = 0.0
    rounding: dict[str, dict[str, float]] = field(default_factory=dict)
    checked: str = "outputs were not compared"
    folded: list[str] = field(default_factory=list)
    spectra: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    leftover: list[str] = field(default_factory=list)
    transforms: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    maps: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    source: str = ""
    target: str = ""

    # --- carrying tensors along ---

    def _frame(self) -> Frame:
        return Frame(*(self.transforms.get(f"residual.{name}") for name in ("matrix", "order", "sign")))

    def _map(self, path: str) -> dict[str, Any]:
        path = path.removesuffix(".weight") if path not in self.maps else path
        if path not in self.maps:
            raise ValueError(f"{path} is no map that was treated: choose one of {', '.join(sorted(self.maps))}")
        return self.maps[path]

    def _of_bias(self, name: str) -> dict[str, Any] | None:
        """The map whose bias this is, or would be."""
        return self.maps.get(name.removesuffix(".bias")) if name.endswith(".bias") else None

    def _reading(self, entry: Mapping[str, Any]) -> Reading | None:
        reads = entry.get("reads")
        if reads is None:
            return None
        norm = Norm(path="", kind=reads["norm"], eps=0.0)
        fold = Fold(norm, reads["kind"], ones=reads["ones"], scaled=reads["scaled"])
        gain, bias = (self.transforms[reads[name]] if name in reads else None for name in ("gain", "bias"))
        return Reading(fold, gain, bias, self._frame())

    def _slices(self, entry: Mapping[str, Any], rows: Tensor, side: str, dual: bool) -> Tensor:
        """Treat the slices of [outputs or inputs, ...]."""
        new = rows.clone()
        covered = sum(len(part["starts"]) * part["width"] for part in entry["slices"] if part["side"] == side)
        _expect_size(entry, f"{side}puts", rows.shape[0], covered or rows.shape[0])
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
                factor = 1 / scale if dual else scale
                new[index] = factor.view(-1, *[1] * (rows.ndim - 1)) * rows[index][order]
                continue
            blocks = rows[index] if order is None else rows[index][order]
            if left is not None:
                if not (torch.linalg.matrix_rank(left) == width).all():
                    raise ValueError(
                        f"{entry['weight']} has directions that were set to zero (a head of low rank): no linear map "
                        "carries a change of them along"
                    )
                left = torch.linalg.inv(left).mT if dual else left
                left = left.repeat_interleave(len(starts) // left.shape[0], dim=0)
                blocks = torch.einsum("sij,sj...->si...", left, blocks)
            new[index] = blocks
        return new

    # A change of a weight [out, in] goes to L · change · R. Of its dual, a gradient, the factors are inverted and
    # transposed. What a change of the weight gives to a constant input, change · k, goes into the bias.

    def _left(self, entry: Mapping[str, Any], rows: Tensor, dual: bool = False) -> Tensor:
        """L · rows, for rows [out, ...]."""
        if "writes" in entry:
            writing = Writing(entry["writes"]["centred"], self._frame(), entry["writes"]["scale"])
            if dual:
                writing = replace(writing, scale=1 / writing.scale)
            rows = writing.rows(rows.movedim(0, -1)).movedim(-1, 0)
        if "shifts" in entry:
            rows = rows - rows.mean(dim=0)
        return self._slices(entry, rows, "out", dual)

    def _right(self, entry: Mapping[str, Any], rows: Tensor, dual: bool = False) -> Tensor:
        """rows · R, for rows [n, in]."""
        reading = self._reading(entry)
        if reading is not None:
            of_norm = reading.gain if reading.gain is not None else reading.bias
            _expect_size(entry, "inputs", rows.shape[1], rows.shape[1] if of_norm is None else of_norm.numel())
            rows = _dual_rows(reading, rows, entry["weight"]) if dual else reading.rows(rows)
        if "latent" in entry:
            latent = entry["latent"]
            if "gain" in latent:
                gain = self.transforms[latent["gain"]]
                rows = rows / _nowhere_zero(gain, entry["weight"]) if dual else rows * gain
            rows = rows @ self.transforms[latent["turn"]].mT
        return self._unfold(entry, self._slices(entry, rows.T, "in", dual).T, dual)

    def _unfold(self, entry: Mapping[str, Any], rows: Tensor, dual: bool) -> Tensor:
        """Of weights that went on into the norms of another model: rows [n, in], divided by its gain."""
        back = entry.get("unfolds")
        if back is None:
            return rows
        gain, bias = (self.transforms[back[name]] if name in back else None for name in ("gain", "bias"))
        rows = rows * back["scale"] if dual else rows / back["scale"]
        if bias is not None and entry.get("reads", {}).get("ones", False):
            # The constant that stood on the mean of a row, w · 1, is now what it gives to bias / gain.
            ratio = bias if gain is None else bias / gain
            mean = rows.mean(dim=-1, keepdim=True)
            if dual:
                rows = rows - mean + mean * ratio
            else:
                centred = rows - mean
                rows = centred + (rows.sum(dim=-1) - centred @ ratio)[:, None] / ratio.sum()
        return rows if gain is None else rows * gain if dual else rows / gain

    def _taken(self, entry: Mapping[str, Any], inputs: int) -> Tensor | None:
        """[in], in the new gauge: what a map gives to this constant is taken off its bias. None: nothing."""
        if entry["bias"] is None:
            return None
        if "value_constant" in entry:
            return self._scattered(entry, self.transforms[entry["value_constant"]], inputs)
        back = entry.get("unfolds", {})
        return self.transforms[back["bias"]] if "bias" in back and not entry["reads"]["ones"] else None

    def _scattered(self, entry: Mapping[str, Any], values: Tensor, inputs: int) -> Tensor:
        """Values [slices, width] of the slices of the inputs, [in]."""
        part = next(part for part in entry["slices"] if part["side"] == "in")
        index = torch.tensor(part["starts"])[:, None] + torch.arange(part["width"])
        constant = torch.zeros(inputs, dtype=torch.float64)
        constant[index] = values
        return constant

    def _constant(self, entry: Mapping[str, Any], inputs: int) -> Tensor | None:
        """k [in]. None: nothing goes into the bias."""
        if entry["bias"] is None:
            return None
        reading = self._reading(entry)
        if reading is not None:
            return reading.bias if reading.fold.kind != "kept" and not reading.fold.ones else None
        if "value_bias" not in entry:
            return None
        return self._scattered(entry, self.transforms[entry["value_bias"]], inputs)

    def _bias(self, entry: Mapping[str, Any], change: Tensor, dual: bool = False) -> Tensor:
        """A change of the bias [out]: as the outputs, but for the scale of a branch that lies in its inputs."""
        total = entry.get("total", 1.0)
        return self._left(entry, change, dual) * (total if dual else 1 / total)

    def _matrix(self, entry: Mapping[str, Any], change: Tensor) -> Tensor:
        """float64 [out, in] of what has the shape of a weight as it is stored."""
        rows = change.detach().cpu().double()
        if rows.ndim != 2:
            raise ValueError(
                f"what is carried along with {entry['weight']} must be a matrix, received shape {list(rows.shape)}"
            )
        return rows.T if entry["transposed"] else rows

    def apply_to(self, path: str, delta: Tensor) -> Tensor:
        """Carry a change of a weight or bias (a merged LoRA adapter, an update) into the new gauge.

        The new model plus the result is the same function as the old model plus the change, when the biases are
        changed by `bias_shifts` too (nothing, where norms have no biases). Changes of several tensors may be carried
        one by one. A gradient, and an average of gradients such as the momentum of an optimiser, is no change: it is
        carried by `apply_to_gradient`; the two agree where every factor is orthogonal.

        Args:
            path: of a linear map, with or without ``.weight``; the name of an embedding; or that of a map's bias. The
                result is for the map that ``maps`` calls "moved_to", if it does: an expert that has changed places.
            delta: of its weight, in the shape in which that is stored, or of the bias.

        Returns:
            float64, on the CPU, in the same shape.

        Raises:
            ValueError: the map was not treated, the shape is not that of its weight, or a part of it was set to zero.
        """
        of_bias = self._of_bias(path)
        if of_bias is not None:
            return self._bias(of_bias, delta.detach().cpu().double())
        entry = self._treated(path)
        rows = self._right(entry, self._left(entry, self._matrix(entry, delta)))
        return (rows.T if entry["transposed"] else rows).contiguous()

    def apply_to_factors(self, path: str, outputs: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Carry a change of a weight that is a product outputs · inputs, factor by factor: its rank is kept.

        Args:
            path: as of `apply_to`.
            outputs: [out, rank], lora_B of an adapter.
            inputs: [rank, in], lora_A. Both of the weight as a map, whatever way it is stored.

        Returns:
            The two factors in the new gauge, float64 on the CPU, and what `bias_shifts` says of their product.

        Raises:
            ValueError: as of `apply_to`.
        """
        entry = self._treated(path)
        outputs, inputs = outputs.detach().cpu().double(), inputs.detach().cpu().double()
        new_outputs, new_inputs = self._left(entry, outputs).contiguous(), self._right(entry, inputs).contiguous()
        shift = None
        constant, taken = self._constant(entry, inputs.shape[1]), self._taken(entry, inputs.shape[1])
        if constant is not None:
            shift = self._bias(entry, outputs @ (inputs @ constant))
        if taken is not None:
            shift = (0 if shift is None else shift) - new_outputs @ (new_inputs @ taken)
        return new_outputs, new_inputs, {} if shift is None else {entry["bias"]: shift}

    def _treated(self, path: str) -> dict[str, Any]:
        entry = self._map(path)
        if "taken_off" in entry:
            raise ValueError(
                f"constants were taken off the values that {entry['weight']} did not show; with a change of it they "
                "would count, and there is no output bias to put them into"
            )
        return entry

    def bias_shifts(self, path: str, delta: Tensor) -> dict[str, Tensor]:
        """What a change of a weight adds to biases in the new gauge, where a bias was folded through that weight.

        Args:
            path, delta: as of `apply_to`.

        Returns:
            name of a bias -> float64, to be added; empty where no bias is concerned, and for changes of biases.
        """
        if self._of_bias(path) is not None:
            return {}
        entry = self._map(path)
        rows = self._matrix(entry, delta)
        shift = None
        constant, taken = self._constant(entry, rows.shape[1]), self._taken(entry, rows.shape[1])
        if constant is not None:
            shift = self._bias(entry, rows @ constant)
        if taken is not None:
            shift = (0 if shift is None else shift) - self._right(entry, self._left(entry, rows)) @ taken
        return {} if shift is None else {entry["bias"]: shift}

    def apply_to_gradient(self, path: str, gradient: Tensor, bias: Tensor | None = None) -> Tensor:
        """Carry a gradient with respect to a weight or bias, or an average of such gradients, into the new gauge.

        Gradients are dual to changes: the pairing ⟨new gradient, carried change⟩ = ⟨gradient, change⟩ holds for all
        changes of weights and biases together, shifts of biases included. The gradient of a function of the old
        weights becomes, exactly, the gradient of the same function with respect to the new weights. Where a norm takes
        a mean off, a gradient has no part along it; what other averages have there (of gradients at other weights) is
        dropped.

        Args:
            path: as of `apply_to`.
            gradient: in the shape in which the weight (or bias) is stored.
            bias: the gradient with respect to the bias of the same map, in the old gauge; needed where `bias_shifts`
                would give something.

        Returns:
            float64, on the CPU, in the same shape.

        Raises:
            ValueError: as of `apply_to`; ``bias`` is needed and missing; a gain that was folded has zeros, behind which
                the old weights have no gradient and the new ones have.
        """
        of_bias = self._of_bias(path)
        if of_bias is not None:
            return self._bias(of_bias, gradient.detach().cpu().double(), dual=True)
        entry = self._treated(path)
        rows = self._matrix(entry, gradient)
        constant, taken = self._constant(entry, rows.shape[1]), self._taken(entry, rows.shape[1])
        if bias is None and (constant is not None or taken is not None):
            raise ValueError(
                f"a constant was folded through {entry['weight']} into {entry['bias']}: give the gradient with respect "
                "to that bias too"
            )
        of_bias = None if bias is None else bias.detach().cpu().double()
        if constant is not None and of_bias is not None:
            rows = rows - torch.outer(of_bias, constant)
        rows = self._right(entry, self._left(entry, rows, dual=True), dual=True)
        if taken is not None and of_bias is not None:
            rows = rows + torch.outer(self._bias(entry, of_bias, dual=True), taken)
        return (rows.T if entry["transposed"] else rows).contiguous()

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
        return cls(**values, transforms=transforms)

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
