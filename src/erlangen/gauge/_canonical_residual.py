"""Canonical form of what stands at the two ends of a model: embeddings, the frame of the residual stream, logits."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import forms
from ._canonical_record import Record, finite
from ._fold import Fold, Frame, Plan, Reading, Writing
from ._weights import ReadWeights, Weights, rewrite_table, table_rows
from .layout import ModelLayout


def _column_mean(weights: ReadWeights, name: str) -> Tensor:
    """Mean of the rows, in float64."""
    total = sum((rows.double().sum(dim=0) for _, rows in table_rows(weights, name)), start=torch.zeros(()))
    return total / weights.shape(name)[0]


def mean_free_basis(dim: int, device: torch.device) -> Tensor:
    """float64 [dim, dim - 1]: orthonormal columns without a mean (Helmert)."""
    index = torch.arange(1, dim, dtype=torch.float64, device=device)
    basis = torch.ones(dim, dim - 1, dtype=torch.float64, device=device).triu()
    basis[torch.arange(1, dim), torch.arange(dim - 1)] = -index
    return basis / (index * (index + 1)).sqrt()


@dataclass(frozen=True)
class Embeddings:
    """What is added to and taken off the embeddings before anything else.

    Attributes:
        means: name of a further embedding -> the mean of its rows, moved to the token embedding.
        added: [dim] to each row of the token embedding.
        writing: of further embeddings (centred, frame, scale).
        token_writing: of the token embedding.
    """

    means: Mapping[str, Tensor]
    added: Tensor
    writing: Writing
    token_writing: Writing

    def token_rows(self, rows: Tensor) -> Tensor:
        """Rows of the token embedding, float64, in the new form."""
        return self.token_writing.rows(rows + self.added)


def embeddings_of(layout: ModelLayout, weights: ReadWeights, steps: Plan) -> Embeddings:
    device = next(iter(table_rows(weights, layout.token_embedding)))[1].device
    added = torch.zeros(layout.dim, dtype=torch.float64, device=device)
    means: dict[str, Tensor] = {}
    if steps.shifts:
        for name in layout.other_embeddings:
            means[name] = _column_mean(weights, name)
            added = added + means[name].to(added.device)
    writing = Writing(steps.centred)
    if steps.centred and layout.tied:
        added = added - added.mean()
        if steps.logit_shift:
            added = added - _column_mean(weights, layout.token_embedding).mean()
    return Embeddings(means, added, writing, Writing(steps.centred and not layout.tied))


def residual_frame(layout: ModelLayout, weights: Weights, steps: Plan, embeddings: Embeddings, record: Record) -> Frame:
    """The frame in which the columns of the token embedding are orthogonal, largest first (or, where only signed
    permutations are allowed, ordered by their norms)."""
    table, dim, device = layout.token_embedding, layout.dim, embeddings.added.device
    rows, dtype = weights.shape(table)[0], weights.dtype(table)
    tolerance = forms.degeneracy_tolerance(dtype)

    def parts() -> Iterator[tuple[slice, Tensor]]:
        for part, chunk in table_rows(weights, table):
            yield part, embeddings.token_rows(finite(chunk, table).double())

    if steps.rotations in ("signed", "permuted"):
        squares, cubes, sizes = (torch.zeros(dim, dtype=torch.float64, device=device) for _ in range(3))
        for _, chunk in parts():
            squares += chunk.square().sum(dim=0)
            cubes += (chunk**3).sum(dim=0)
            sizes += chunk.abs().sum(dim=0)
        order, ties = forms.descending(squares.sqrt(), sizes, tolerance)
        record.leftover += [f"Residual stream: coordinates {a} and {b} are alike in size." for a, b in ties]
        total = cubes.sum() if steps.rotations == "permuted" else cubes[order]
        return Frame(order=order, sign=torch.where(total < 0, -1.0, 1.0).double().expand(dim))
    basis = None if steps.rotations == "all" else mean_free_basis(dim, device)
    width = dim if basis is None else dim - 1
    triangle = torch.zeros(0, width, dtype=torch.float64, device=device)
    for _, chunk in parts():
        chunk = chunk if basis is None else chunk @ basis
        triangle = torch.linalg.qr(torch.cat([triangle, chunk]), mode="r").R
    _, spectrum, axes = torch.linalg.svd(triangle, full_matrices=True)
    spectrum = torch.nn.functional.pad(spectrum, (0, width - spectrum.numel()))
    rank = int((spectrum > 4 * width**0.5 * forms.noise(dtype) * spectrum[0]).sum())
    if rank < width:
        record.leftover.append(
            f"Residual stream: the token embedding has rank {rank} of {width}; the frame of the rest is not fixed."
        )
    blocks = forms.near_equal(spectrum[None], tolerance, torch.tensor([rank], device=device))
    cubes = torch.zeros(width, dtype=torch.float64, device=device)
    overlaps = [torch.zeros(last + 1 - first, last + 1 - first, dtype=torch.float64) for _, first, last in blocks]
    for part, chunk in parts():
        chunk = (chunk if basis is None else chunk @ basis) @ axes.mT
        cubes += (chunk / spectrum[0]).pow(3).sum(dim=0)
        for (_, first, last), overlap in zip(blocks, overlaps):
            fixed = forms.probe(rows, last + 1 - first, device)[part]
            overlap += (chunk[:, first : last + 1].mT @ fixed).to(overlap.device)
    axes = torch.where(cubes < 0, -1.0, 1.0)[:, None] * axes
    for (_, first, last), overlap in zip(blocks, overlaps):
        flip = torch.where(cubes[first : last + 1] < 0, -1.0, 1.0)[:, None]
        axes[first : last + 1] = forms.procrustes(flip * overlap.to(axes.device)) @ axes[first : last + 1]
        record.leftover.append(f"Residual stream: axes {first} to {last} have nearly equal singular values.")
    matrix = axes if basis is None else basis @ axes @ basis.mT + 1 / dim
    return Frame(matrix=matrix)


def _write_table(weights: Weights, name: str, treat: Callable[[Tensor], Tensor]) -> None:
    rewrite_table(weights, name, lambda _, rows: treat(finite(rows, name).double()))


def write_embeddings(layout: ModelLayout, weights: Weights, embeddings: Embeddings, record: Record) -> None:
    for name in layout.other_embeddings:
        mean = embeddings.means.get(name)

        def treat(rows: Tensor, mean: Tensor | None = mean) -> Tensor:
            return embeddings.writing.rows(rows if mean is None else rows - mean)

        _write_table(weights, name, treat)
        record.maps[name] = _table_map(name, embeddings.writing)
    _write_table(weights, layout.token_embedding, embeddings.token_rows)
    record.maps[layout.token_embedding] = _table_map(layout.token_embedding, embeddings.token_writing)


def _table_map(name: str, writing: Writing) -> dict[str, Any]:
    # The rows of a table are what a map writes: stored as a map's [in, out].
    writes = {"centred": writing.centred, "scale": writing.scale}
    return {"weight": name, "bias": None, "transposed": True, "slices": [], "writes": writes}


def write_unembedding(layout: ModelLayout, weights: Weights, steps: Plan, frame: Frame, record: Record) -> None:
    part, fold = layout.unembedding, steps.final
    if part is None:
        return
    reading = Reading.of(weights, Fold(None) if fold is None else fold, frame)
    mean = None
    if steps.logit_shift:
        name = part.weight
        mean = weights[name].double().mean(dim=1) if part.transposed else _column_mean(weights, name)
    constants = []

    def treat(_: slice, rows: Tensor) -> Tensor:
        rows = finite(rows, part.weight).double()
        rows = rows if mean is None else rows - mean
        constants.append(reading.constant(rows))
        return reading.rows(rows)

    if part.transposed:
        weights[part.weight] = treat(slice(None), weights[part.weight].T).T
    else:
        rewrite_table(weights, part.weight, treat)
    if part.bias_name is not None:
        bias = weights[part.bias_name].double()
        bias = bias - bias.mean() if steps.logit_shift else bias
        if constants[0] is not None:
            bias = bias + torch.cat([constant for constant in constants if constant is not None])
        weights[part.bias_name] = bias
    record.reads(part, reading)
    record.map_of(part)
    reading.store(weights)


def residual_scale(layout: ModelLayout, weights: ReadWeights, embeddings: Embeddings) -> float:
    """Root mean square of the token embedding in its new form."""
    name = layout.token_embedding
    total = sum(embeddings.token_rows(rows.double()).square().sum().item() for _, rows in table_rows(weights, name))
    return (total / weights.shape(name).numel()) ** 0.5 or 1.0
