"""One of two models that are brought together: its weights as they are read, folded, in form."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ._align_experts import ExpertsForm, experts_form
from ._align_heads import AttentionForm
from ._align_mlp import MLPForm
from ._canonical_heads import _groups_at_a_time
from ._canonical_record import finite
from ._canonical_residual import Embeddings, embeddings_of, residual_scale
from ._experts import maps_of
from ._fold import Fold, Frame, Plan, Reading, Writing, attention_maps, plan
from ._unfold import mean_of
from ._weights import ReadWeights, chunks, give_back
from .layout import MLP, Layer, ModelLayout, Projection

Using = Literal["gauge", "orthogonal", "permutation", "none"]
USING: tuple[Using, ...] = ("gauge", "orthogonal", "permutation", "none")
Progress = Callable[[int, int], None]
_PART = 512  # hidden features at a time


class _OnCPU:
    """Weights on the CPU as they are stored; ``double``: in float64.

    Raises:
        ValueError: a tensor holds numbers that are not finite.
    """

    def __init__(self, weights: ReadWeights, double: bool) -> None:
        self._weights, self._double = weights, double
        self._last: tuple[str, Tensor] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._weights[name].detach().cpu()
        return finite(tensor, name).double() if self._double else tensor

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of a matrix as they are stored; of a file, only these are read."""
        read = getattr(self._weights, "rows", None)
        if read is not None:
            found = read(name, first, last)
        else:
            if self._last is None or self._last[0] != name:
                self._last = name, self._weights[name].detach()
            found = self._last[1][first:last]
        return finite(found.detach().cpu(), name)

    def matrix(self, part: Projection) -> Tensor:
        """The matrix of a map; of a stack, no more than that is read."""
        if part.stack is None:
            return self[part.weight]
        rows = self.rows(part.weight, part.stack, part.stack + 1)[0]
        return rows.double() if self._double else rows

    def shape(self, name: str) -> torch.Size:
        return self._weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._weights.dtype(name)


class _OneByOne(Mapping[str, Tensor]):
    """As `Side.stored_parts`, of which the matrix that was asked for last stays in memory."""

    def __init__(self, side: "Side", mlp: MLP) -> None:
        self._side, self._parts = side, {part.weight: part for part in maps_of(mlp).values()}
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._side.weights[name]
        if self._last is None or self._last[0] != name:
            self._last = None
            give_back()
            self._last = name, finite(self._side.stored.matrix(self._parts[name]), name)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def steps_of(layout: ModelLayout, using: Using) -> Plan:
    """What may be folded, and which frames are free: without folding, only orders of coordinates."""
    steps = plan(layout)
    if using in ("gauge", "orthogonal"):
        return steps
    layers = tuple(
        replace(step, attention=Fold(step.attention.norm), mlp=Fold(step.mlp.norm), attention_centred=False,
                mlp_centred=False)
        for step in steps.layers
    )  # fmt: skip
    rotations = steps.rotations
    if using == "none":
        rotations = "none"
    elif rotations in ("all", "mean"):
        rotations = "signed" if rotations == "all" else "permuted"
    return replace(
        steps,
        layers=layers,
        final=None if steps.final is None else Fold(steps.final.norm),
        centred=False,
        shifts=False,
        residual_scale=False,
        embedding_scale=False,
        rotations=rotations,
        notes=(),
    )


@dataclass
class Side:
    """One of the two models.

    Attributes:
        layout, steps, using: of both.
        stored, weights: its tensors on the CPU, as stored and in float64.
        embeddings: what is added to and taken off its tables.
        scale, table_scale: of its residual stream, and of its embeddings, divided out.
    """

    layout: ModelLayout
    steps: Plan
    using: Using
    stored: _OnCPU
    weights: _OnCPU
    embeddings: Embeddings
    scale: float
    table_scale: float

    @classmethod
    def of(cls, layout: ModelLayout, weights: ReadWeights, steps: Plan, using: Using) -> "Side":
        stored = _OnCPU(weights, False)
        embeddings = embeddings_of(layout, stored, steps)
        scale = residual_scale(layout, stored, embeddings) if steps.residual_scale else 1.0
        table_scale = residual_scale(layout, stored, embeddings) if steps.embedding_scale else scale
        return cls(layout, steps, using, stored, _OnCPU(weights, True), embeddings, scale, table_scale)

    def writing_scale(self, layer: Layer, branch: int, reading: Reading) -> float:
        """What is divided out of what a branch (0 attention, 1 feed-forward) writes."""
        if self.using not in ("gauge", "orthogonal"):
            return 1.0
        if reading.fold.kind == "after":
            return reading.scale
        out_norm = (layer.attention_out_norm, layer.mlp_out_norm)[branch]
        return self.scale if out_norm is None else 1.0

    def readings(self, number: int) -> tuple[Reading, Reading]:
        """Of the norms that the two branches of a layer read."""
        step = self.steps.layers[number]
        return Reading.of(self.weights, step.attention), Reading.of(self.weights, step.mlp)

    def stored_heads(self, number: int) -> dict[str, Tensor]:
        """The tensors of a layer's attention by name: matrices as stored, the rest in float64."""
        attention = self.layout.layers[number].attention
        found = {}
        for part in attention_maps(attention).values():
            if part.weight not in found:
                found[part.weight] = finite(self.stored[part.weight], part.weight)
            if part.bias_name is not None:
                found[part.bias_name] = self.weights[part.bias_name]
        return found

    def blocks(self, number: int) -> tuple[Tensor, ...]:
        """Query heads of a layer, int64, as many at a time as are treated together."""
        layer, step = self.layout.layers[number], self.steps.layers[number]
        attention = layer.attention
        ones = step.attention.ones and attention.latent is None
        groups = _groups_at_a_time(layer, self.layout.dim, ones, step.attention_centred)
        return torch.arange(attention.num_heads).split(attention.group_size * groups)

    def form_of_heads(self, number: int) -> Callable[..., AttentionForm]:
        """What makes forms, in the model's own frame, of stored heads of a layer; takes options of `AttentionForm`."""
        layer, step, reading = self.layout.layers[number], self.steps.layers[number], self.readings(number)[0]
        dtypes = [self.stored.dtype(part.weight) for part in attention_maps(layer.attention).values()]
        dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        writing = Writing(step.attention_centred, Frame(), self.writing_scale(layer, 0, reading))

        def make(stored: Mapping[str, Tensor], **options: Any) -> AttentionForm:
            form = AttentionForm.of(layer, stored, self.weights, reading, writing, self.form_using, dtype, **options)
            give_back()
            return form

        return make

    def attention_form(self, number: int, dtype: torch.dtype = torch.float64) -> AttentionForm:
        """Of the attention of one layer, in the model's own frame, to be compared.

        Args:
            number: of the layer.
            dtype: in which heads wait; with latents, which few numbers make, it is float64.
        """
        make, stored = self.form_of_heads(number), self.stored_heads(number)
        attention = self.layout.layers[number].attention
        if dtype == torch.float64 or attention.latent is not None:
            return make(stored)
        return AttentionForm.joined((make(stored, heads=heads) for heads in self.blocks(number)), attention, dtype)

    def stored_parts(self, mlp: MLP) -> dict[str, Tensor]:
        """The tensors of a feed-forward layer or an expert by name: matrices as stored, the rest in float64."""
        found = {}
        for part in maps_of(mlp).values():
            found[part.weight] = finite(self.stored.matrix(part), part.weight)
            if part.bias_name is not None:
                found[part.bias_name] = self.weights[part.bias_name]
        if mlp.slope is not None:
            found[mlp.slope] = self.weights[mlp.slope]
        return found

    def form_of(self, number: int, mlp: MLP) -> Callable[..., MLPForm]:
        """What makes forms, in the model's own frame, of stored parts of a layer or expert; takes options of `MLPForm`.

        Args:
            number: of the layer.
            mlp: its feed-forward part, or one of its experts.
        """
        layer, step, reading = self.layout.layers[number], self.steps.layers[number], self.readings(number)[1]
        writing = Writing(step.mlp_centred, Frame(), self.writing_scale(layer, 1, reading))

        def make(stored: Mapping[str, Tensor], **options: Any) -> MLPForm:
            return MLPForm.of(mlp, stored, reading, writing, self.form_using, **options)

        norm = layer.mlp_out_norm
        if norm is None or norm.eps != 0 or layer.mlp is None or self.form_using != "gauge":
            return make
        stored, squares = self.stored_parts(mlp), 0.0
        for features in torch.arange(mlp.up.width).split(_PART):
            squares += make(stored, features=features).strengths().square().sum().item()
        return partial(make, size=squares**0.5 or 1.0)

    def mlp_form(self, number: int, keep: bool = True) -> MLPForm | None:
        """Of the feed-forward part of one layer, in the model's own frame; None for experts.

        Args:
            number: of the layer.
            keep: False: its rows are made as they are asked for, from one stored matrix at a time.
        """
        mlp = self.layout.layers[number].mlp
        if mlp is None:
            return None
        stored = self.stored_parts(mlp) if keep else _OneByOne(self, mlp)
        return self.form_of(number, mlp)(stored, keep=keep)

    def experts_form(self, number: int, keep: bool = False, dtype: torch.dtype = torch.float64) -> ExpertsForm | None:
        """Of the mixture of experts of one layer, in the model's own frame; None where there is none.

        Args:
            number: of the layer.
            keep: whether forms of its experts stay in memory.
            dtype: of their rows.
        """
        experts, reading = self.layout.layers[number].experts, self.readings(number)[1]
        if experts is None:
            return None
        router, folds = experts.router, self.form_using != "permutation"

        def load(expert: int | None) -> MLPForm:
            mlp = experts.shared if expert is None else experts.experts[expert]
            assert mlp is not None
            form = self.form_of(number, mlp)(self.stored_parts(mlp), dtype=dtype)
            give_back()
            return form

        raw = router.heads(self.weights[router.weight])[0]
        rows = reading.rows(raw) if folds else raw
        bias = None if router.bias_name is None else router.head_biases(self.weights[router.bias_name])[0]
        if bias is not None and folds:
            constant = reading.constant(raw)
            bias = bias if constant is None else bias + constant
        stored, ones = self.stored.dtype(router.weight), folds and reading.fold.ones
        return experts_form(experts, rows, bias, stored, load, folds=folds, ones=ones, keep=keep)

    @property
    def form_using(self) -> str:
        """What forms are made for: nothing is folded where nothing is looked for."""
        return "permutation" if self.using == "none" else self.using

    def table_rows(self, name: str, part: slice) -> Tensor:
        """Rows of an embedding, in form, in the model's own frame."""
        embeddings = self.embeddings
        rows = self.stored.rows(name, part.start, part.stop).double()
        if name == self.layout.token_embedding:
            return embeddings.token_rows(rows) / self.table_scale
        mean = embeddings.means.get(name)
        return embeddings.writing.rows(rows if mean is None else rows - mean) / self.table_scale

    def table_tensor(self, name: str, part: slice, rows: Tensor) -> Tensor:
        """Rows of an embedding, given in form, as this model stores them."""
        embeddings, own = self.embeddings, self.stored.rows(name, part.start, part.stop).double()
        token = name == self.layout.token_embedding
        shift = embeddings.added if token else -embeddings.means.get(name, torch.zeros(()))
        writing = embeddings.token_writing if token else embeddings.writing
        return mean_of(rows * self.table_scale, own + shift, writing.centred) - shift

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the embeddings."""
        return (self.layout.token_embedding, *self.layout.other_embeddings)

    def final_reading(self) -> Reading:
        """Of what the unembedding reads."""
        return Reading.of(self.weights, self.steps.final or Fold(None))


def pairs_of_rows(a: Side, b: Side, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    for part in chunks(*a.stored.shape(name)):
        yield a.table_rows(name, part), b.table_rows(name, part)


def unembedding_rows(sides: Iterable[Side], unembedding: Projection, part: slice) -> list[tuple[Tensor, Tensor]]:
    """For each model: raw and folded rows of the map to the logits."""
    found = []
    for side in sides:
        if unembedding.transposed:
            raw = finite(unembedding.heads(side.stored[unembedding.weight])[0][part], unembedding.weight).double()
        else:
            start = unembedding.starts[0]
            raw = side.stored.rows(unembedding.weight, start + part.start, start + part.stop).double()
        found.append((raw, side.final_reading().rows(raw)))
    return found
