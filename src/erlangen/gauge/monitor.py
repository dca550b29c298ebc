r"""What a training run does in the gauge directions of its heads, and how far it has come on what is invariant.

A pair (A, B) of a head counts only as AᵀB (`HeadPair`). The change (U, W) of a step has a part along the orbit,
(Ω A, −Ωᵀ B), that changes no product: the vertical part. Gradient flow has none, and keeps Q = A Aᵀ − B Bᵀ of each
head (of a rotary plane: |q|² − |k|²) where it was. A momentum from older points, a preconditioner, weight decay and
rounding do put a part there, and Q drifts. What a run has learned is neither: it is how far the products have moved.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ._pairs import HeadPair, free_sectors, head_pairs, parameters_by_name
from ._vertical import _split, vertical

QUANTITIES = ("vertical_share", "charge_drift", "orbit_distance", "stored_distance")


class GaugeMonitor:
    """Watches the heads of a model that is being trained.

    Call `before_step` and `after_step` around a step of the optimiser, and `read` when the numbers are wanted. Only
    these three cost anything: a copy of the pairs of heads before the step, and small products after it.

    A model with unlearned biases (`erlangen.breaking`) is watched too: the directions are then those in which its
    function would not change without them.

    Args:
        model: one whose layout is known, with its weights as they are at the start; they are copied. Wrappers of
            compile and DDP are seen through.
        sectors: "qk", "vo" or both. None: all that have a continuous gauge, and `notes` says what was left out.

    Attributes:
        notes: what is not watched, and why, in sentences.

    Raises:
        TypeError: no layout is known for the model.
        ValueError: a sector without a continuous gauge was asked for; weights that are not here as a whole.
    """

    def __init__(self, model: nn.Module, sectors: Collection[str] | None = None) -> None:
        self.notes: tuple[str, ...] = ()
        if sectors is None:
            sectors = free_sectors(model)
            if "qk" not in sectors:
                self.notes = (
                    "Queries and keys are not watched: they are normalised, which leaves no linear gauge between them.",
                )
        self._model = model
        self._pairs = head_pairs(model, sectors, broken=True)
        self._start = self._copy()
        self._before: dict[str, Tensor] | None = None
        self._energies: list[tuple[Tensor, Tensor]] | None = None

    def _copy(self) -> dict[str, Tensor]:
        parameters = parameters_by_name(self._model)
        return {name: parameters[name].detach().clone() for pair in self._pairs for name in pair.names}

    @torch.no_grad()
    def before_step(self) -> None:
        """Copy the weights before a step that is to be measured."""
        self._before = self._copy()

    @torch.no_grad()
    def after_step(self) -> None:
        """Measure the step since `before_step`; nothing if that was not called, or the step was measured already."""
        if self._before is None:
            return
        before, self._before = self._before, None
        parameters = parameters_by_name(self._model)
        change = {name: parameters[name].detach().double() - old.double() for name, old in before.items()}
        self._energies = []
        for pair in self._pairs:
            factors, moved = _factors(pair, before), _factors(pair, change)
            along = vertical(*factors, *moved, rotary=pair.rotary)
            self._energies.append((_energy(*along), _energy(*moved)))

    @torch.no_grad()
    def read(self) -> dict[str, Any]:
        """The numbers of the newest measured step and of the weights as they are, JSON-ready.

        Returns:
            "layers" -> layer, as text -> sector -> quantity -> one number a key/value head (a group of query heads has
            one gauge), and each quantity of the whole model. Quantities:

            - "vertical_share": part of the squared size of the measured step that lies along the orbit, in the
              Frobenius metric; 0 of a head that did not move. Of the whole model: of the step on all pairs together.
              None, and left out of the layers, until a step was measured;
            - "charge_drift": size of Q − Q₀ over |A₀|² + |B₀|², with Q = A Aᵀ − B Bᵀ and the start written ₀;
            - "orbit_distance": size of P − P₀ over √(|P|² + |P₀|²), with the product P = Aᵀ B: what no gauge changes,
              at most √2;
            - "stored_distance": the same of (A, B), as it is stored.

            The last three are, of the whole model, means over heads.
        """
        parameters = parameters_by_name(self._model)
        now = {name: parameters[name].detach() for name in self._start}
        layers: dict[str, dict[str, dict[str, list[float]]]] = {}
        for number, pair in enumerate(self._pairs):
            found = _drift(pair, _factors(pair, self._start), _factors(pair, now))
            if self._energies is not None:
                found = {"vertical_share": _ratio(*self._energies[number]), **found}
            quantities = {name: values.tolist() for name, values in found.items()}
            layers.setdefault(str(pair.layer), {})[pair.sector] = quantities
        result: dict[str, Any] = {"vertical_share": None}
        if self._energies is not None:
            along, whole = (torch.stack([energies[i].sum() for energies in self._energies]).sum() for i in (0, 1))
            result["vertical_share"] = _ratio(along, whole).item()
        for name in QUANTITIES[1:]:
            heads = [value for sectors in layers.values() for found in sectors.values() for value in found[name]]
            result[name] = sum(heads) / len(heads)
        return {**result, "layers": layers}


def _factors(pair: HeadPair, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    first, second = pair.factors(lambda name: tensors[name])
    return first.double(), second.double()


def _energy(first: Tensor, second: Tensor) -> Tensor:
    """[heads]: |first|² + |second|²."""
    return first.flatten(1).square().sum(1) + second.flatten(1).square().sum(1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), 0.0)


def _blocks(pair: HeadPair, first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The factors, cut into those whose products are invariant each by itself.

    Returns:
        pairs [heads, blocks, rows, columns]: of rotary planes, complex and of one row each, and of all other rows. The
        product of a block is Σ_r first_rᵀ conj(second_r).
    """
    (q, a), (k, b) = _split(first, pair.rotary), _split(second, pair.rotary)
    blocks = []
    if q is not None and k is not None:
        blocks.append((q[..., None, :], k[..., None, :]))
    if a is not None and b is not None:
        blocks.append((a[:, None], b[:, None]))
    return blocks


def _charge(first: Tensor, second: Tensor) -> Tensor:
    return first @ first.mH - second @ second.mH


def _product_square(first: Tensor, second: Tensor) -> Tensor:
    """[heads]: squared sizes of the products of blocks, without the products."""
    return ((first @ first.mH) * (second @ second.mH).conj()).real.flatten(1).sum(1).clamp_min(0)


def _difference_square(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """[heads]: squared sizes of the differences of the products of blocks.

    The difference is itself a product, of (A − A₀ over A₀) with (B over B − B₀): nothing of the size of P cancels.
    Where its two parts cancel each other, as after a mere move of gauge, triangular factors keep the digits.
    """
    first = torch.cat([new[0] - old[0], old[0]], dim=-2)
    second = torch.cat([new[1], new[1] - old[1]], dim=-2)
    result = _product_square(first, second)
    rows = old[0].shape[-2]
    parts = _product_square(first[..., :rows, :], second[..., :rows, :])
    parts = parts + _product_square(first[..., rows:, :], second[..., rows:, :])
    if len(close := torch.nonzero(result < 1e-6 * parts).flatten()):
        r_first, r_second = (torch.linalg.qr(part[close].mH, mode="r").R for part in (first, second))
        result[close] = (r_first @ r_second.mH).abs().square().flatten(1).sum(1)
    return result


def _drift(pair: HeadPair, start: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Quantities of the way from the start, [heads] each."""
    zero = start[0].new_zeros(len(start[0]))
    charge, distance, product = zero, zero, zero
    for old, new in zip(_blocks(pair, *start), _blocks(pair, *now)):
        charge = charge + (_charge(*new) - _charge(*old)).abs().square().flatten(1).sum(1)
        distance = distance + _difference_square(old, new)
        product = product + _product_square(*old) + _product_square(*new)
    size = _energy(*start)
    moved = _energy(now[0] - start[0], now[1] - start[1])
    return {
        "charge_drift": _ratio(charge.sqrt(), size),
        "orbit_distance": _ratio(distance, product).sqrt(),
        "stored_distance": _ratio(moved, size + _energy(*now)).sqrt(),
    }
