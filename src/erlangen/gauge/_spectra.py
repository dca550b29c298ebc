"""What the heads of a model are like: their spectra, and how far their weights are from the balanced gauge."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import forms
from ._effective import Effective, Pair, Reads
from .layout import ModelLayout


@dataclass(frozen=True, eq=False)
class HeadSpectra:
    """The key/value heads of one layer, each with its query heads. G key/value heads.

    Attributes:
        query_key, value_output: [G, width] float64, singular values that no gauge changes, descending; of a rotary
            plane, its size; with QK-norm, of the form between the norms. Norms are folded in.
        query_key_imbalance, value_output_imbalance: [G], half the squares of the factors over the sum of the spectrum:
            1 in the balanced gauge, where it is least. None with QK-norm, and with latents.
        rank_query_key, rank_value_output: [G], how many singular values are not zero, by the rounding of the dtype.
        near_equal: pairs of neighbouring singular values that the dtype hardly tells apart, of both spectra.
    """

    query_key: Tensor
    value_output: Tensor
    query_key_imbalance: Tensor | None
    value_output_imbalance: Tensor | None
    rank_query_key: Tensor
    rank_value_output: Tensor
    near_equal: int


def head_spectra(
    layout: ModelLayout, weights: Reads, dtype: torch.dtype, progress: Callable[[int, int], None] | None = None
) -> list[HeadSpectra]:
    """The heads of all layers, a layer at a time.

    Args:
        layout: of the model.
        weights: its tensors by name: `weights[name]`.
        dtype: in which they are stored.
        progress: called with the number of layers done, and of all.

    Raises:
        ValueError: weights that are not finite.
    """
    effective = Effective(layout, weights)
    result = []
    for number in range(len(layout.layers)):
        if progress is not None:
            progress(number, len(layout.layers))
        result.append(_layer_spectra(effective, number, dtype))
    return result


def _layer_spectra(effective: Effective, number: int, dtype: torch.dtype) -> HeadSpectra:
    heads, attention = effective.heads(number), effective.layout.layers[number].attention
    query_key, value_output = heads.spectra
    group, has_planes = attention.group_size, "rotary" in heads.scores
    query_key_imbalance = value_output_imbalance = None
    if attention.latent is None:
        if not attention.qk_norm:
            query_key_imbalance = _imbalance(list(heads.scores.values()), [1.0] * len(heads.scores), group, query_key)
        value_output_imbalance = _imbalance([heads.values], [heads.unit], group, value_output * heads.unit)
    ranks = [(values > forms.noise(dtype) * values[:, :1]).sum(1) for values in (query_key, value_output)]
    tolerance = forms.degeneracy_tolerance(dtype)
    spectra = [(value_output, ranks[1])] if has_planes else [(query_key, ranks[0]), (value_output, ranks[1])]
    runs = [run for values, rank in spectra for run in forms.near_equal(values, tolerance, rank)]
    return HeadSpectra(
        query_key=query_key,
        value_output=value_output,
        query_key_imbalance=query_key_imbalance,
        value_output_imbalance=value_output_imbalance,
        rank_query_key=ranks[0],
        rank_value_output=ranks[1],
        near_equal=sum(last - first for _, first, last in runs),
    )


def _imbalance(pairs: list[Pair], units: list[float], group: int, spectrum: Tensor) -> Tensor:
    """[G]: the sum of halves of squares of both factors, over that of singular values."""
    total = torch.zeros(len(spectrum), dtype=torch.float64)
    for pair, unit in zip(pairs, units):
        left = (unit * pair.left.values).abs().square().flatten(1).sum(1).unflatten(0, (-1, group)).sum(1)
        right = pair.right.values.abs().square().flatten(1).sum(1)[::group]
        total = total + (left + right) / 2
    return total / spectrum.sum(1).clamp_min(torch.finfo(torch.float64).tiny)
