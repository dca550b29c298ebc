"""Canonical form: one representative for all weights that are the same function.

In this order: gains and biases of norms are folded into the maps that read them, and what layer norms take off is taken
off the weights; the frame of the residual stream is fixed, if asked; queries against keys and values against output are
brought to the forms of `forms`; scales that go through a feed-forward layer are balanced; heads and hidden features are
put in the order of quantities that no gauge changes. Whatever is a symmetry only up to the eps of a norm is left, and
said: nothing here changes the function.

All of it is computed in float64, a layer at a time, and written once in the stored dtype.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import forms
from ._fold import (
    Fold,
    Frame,
    Heads,
    LayerPlan,
    Plan,
    Reading,
    Writing,
    attention_maps,
    latent_readers,
    plan,
    stored_bias,
    stored_gain,
    unseen_constants,
)
from ._weights import ModuleWeights, PendingWeights, Weights
from .certificate import Certificate
from .layout import MLP, HeadLayout, Layer, ModelLayout, Norm, Projection, model_layout, unwrap
from .layout import rows as slices_of

_CHUNK = 1 << 18  # numbers of a matrix in float64 at a time: 2 MB, so that a few of them weigh little
_FOLDERS = "erlangen.interop.checkpoints"


# --- what was done ----------------------------------------------------------------------------------------------------


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
        transforms: float64 factors, by name (see `Certificate.apply_to`).
        maps: path of a linear map (or name of an embedding) -> how its weight was changed, in terms of those factors.
    """

    folded: list[str] = field(default_factory=list)
    spectra: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    leftover: list[str] = field(default_factory=list)
    transforms: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, dict[str, Any]] = field(default_factory=dict)

    def keep(self, name: str, tensor: Tensor) -> str:
        """Keep a factor; its name."""
        self.transforms[name] = tensor.detach().to("cpu", copy=True).contiguous()
        return name

    def map_of(self, part: Projection) -> dict[str, Any]:
        """What is known of a map."""
        return self.maps.setdefault(
            part.path,
            {"weight": part.weight, "bias": part.bias_name, "transposed": part.transposed, "slices": []},
        )

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
                entry[key] = self.keep(f"{part.path}.{name}.{key}", tensor)
        self.map_of(part)["slices"].append(entry)


# --- checks -----------------------------------------------------------------------------------------------------------


def check_weights(layout: ModelLayout, weights: Weights) -> None:
    """Every tensor that a layout names is there, in its shape and in floating point.

    Raises:
        ValueError: one is not; it is named.
    """
    for name, shape in layout.tensor_shapes().items():
        if name not in weights:
            raise ValueError(f"the layout of this {layout.kind} names a tensor {name}, which the weights do not have")
        found = tuple(weights.shape(name))
        if found != shape:
            raise ValueError(f"{name} must have the shape {shape} by the layout of this {layout.kind}, and has {found}")
        if weights.dtype(name) not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} is of dtype {weights.dtype(name)}: quantised weights have no exact canonical form, "
                "dequantise the model first"
            )


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite: a canonical form needs finite weights")
    return tensor


# --- embeddings and the frame of the residual stream ------------------------------------------------------------------


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(_CHUNK // max(columns, 1), 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _column_mean(table: Tensor) -> Tensor:
    """Mean of the rows, in float64."""
    total = sum((table[part].double().sum(dim=0) for part in _chunks(*table.shape)), start=torch.zeros(()))
    return total / table.shape[0]


def mean_free_basis(dim: int, device: torch.device) -> Tensor:
    """float64 [dim, dim - 1]: orthonormal columns without a mean (Helmert)."""
    index = torch.arange(1, dim, dtype=torch.float64, device=device)
    basis = torch.ones(dim, dim - 1, dtype=torch.float64, device=device).triu()
    basis[torch.arange(1, dim), torch.arange(dim - 1)] = -index
    return basis / (index * (index + 1)).sqrt()


@dataclass(frozen=True)
class _Embeddings:
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


def _embeddings(layout: ModelLayout, weights: Weights, steps: Plan) -> _Embeddings:
    table = weights[layout.token_embedding]
    added = torch.zeros(layout.dim, dtype=torch.float64, device=table.device)
    means: dict[str, Tensor] = {}
    if steps.shifts:
        for name in layout.other_embeddings:
            means[name] = _column_mean(weights[name])
            added = added + means[name].to(added.device)
    writing = Writing(steps.centred)
    if steps.centred and layout.tied:
        added = added - added.mean()
        if steps.logit_shift:
            added = added - _column_mean(table).mean()
    return _Embeddings(means, added, writing, Writing(steps.centred and not layout.tied))


def _residual_frame(
    layout: ModelLayout, weights: Weights, steps: Plan, embeddings: _Embeddings, record: Record
) -> Frame:
    """The frame in which the columns of the token embedding are orthogonal, largest first (or, where only signed
    permutations are allowed, ordered by their norms)."""
    table = weights[layout.token_embedding]
    rows, dim, tolerance = table.shape[0], layout.dim, forms.degeneracy_tolerance(table.dtype)

    def parts() -> Iterator[tuple[slice, Tensor]]:
        for part in _chunks(rows, dim):
            yield part, embeddings.token_rows(_finite(table[part], layout.token_embedding).double())

    if steps.rotations in ("signed", "permuted"):
        squares, cubes, sizes = (torch.zeros(dim, dtype=torch.float64, device=table.device) for _ in range(3))
        for _, chunk in parts():
            squares += chunk.square().sum(dim=0)
            cubes += (chunk**3).sum(dim=0)
            sizes += chunk.abs().sum(dim=0)
        order, ties = forms.descending(squares.sqrt(), sizes, tolerance)
        record.leftover += [f"Residual stream: coordinates {a} and {b} are alike in size." for a, b in ties]
        total = cubes.sum() if steps.rotations == "permuted" else cubes[order]
        return Frame(order=order, sign=torch.where(total < 0, -1.0, 1.0).double().expand(dim))
    basis = None if steps.rotations == "all" else mean_free_basis(dim, table.device)
    width = dim if basis is None else dim - 1
    triangle = torch.zeros(0, width, dtype=torch.float64, device=table.device)
    for _, chunk in parts():
        chunk = chunk if basis is None else chunk @ basis
        triangle = torch.linalg.qr(torch.cat([triangle, chunk]), mode="r").R
    _, spectrum, axes = torch.linalg.svd(triangle, full_matrices=True)
    spectrum = torch.nn.functional.pad(spectrum, (0, width - spectrum.numel()))
    rank = int((spectrum > 4 * width**0.5 * forms.noise(table.dtype) * spectrum[0]).sum())
    if rank < width:
        record.leftover.append(
            f"Residual stream: the token embedding has rank {rank} of {width}; the frame of the rest is not fixed."
        )
    blocks = forms.near_equal(spectrum[None], tolerance, torch.tensor([rank], device=table.device))
    cubes = torch.zeros(width, dtype=torch.float64, device=table.device)
    overlaps = [torch.zeros(last + 1 - first, last + 1 - first, dtype=torch.float64) for _, first, last in blocks]
    for part, chunk in parts():
        chunk = (chunk if basis is None else chunk @ basis) @ axes.mT
        cubes += (chunk / spectrum[0]).pow(3).sum(dim=0)
        for (_, first, last), overlap in zip(blocks, overlaps):
            fixed = forms.probe(rows, last + 1 - first, table.device)[part]
            overlap += (chunk[:, first : last + 1].mT @ fixed).to(overlap.device)
    axes = torch.where(cubes < 0, -1.0, 1.0)[:, None] * axes
    for (_, first, last), overlap in zip(blocks, overlaps):
        flip = torch.where(cubes[first : last + 1] < 0, -1.0, 1.0)[:, None]
        axes[first : last + 1] = forms.procrustes(flip * overlap.to(axes.device)) @ axes[first : last + 1]
        record.leftover.append(f"Residual stream: axes {first} to {last} have nearly equal singular values.")
    matrix = axes if basis is None else basis @ axes @ basis.mT + 1 / dim
    return Frame(matrix=matrix)


def _write_table(weights: Weights, name: str, treat: Callable[[Tensor], Tensor]) -> None:
    table = weights[name]
    new = torch.empty_like(table)
    for part in _chunks(*table.shape):
        new[part] = treat(_finite(table[part], name).double()).to(new.dtype)
    weights[name] = new


def _write_embeddings(layout: ModelLayout, weights: Weights, embeddings: _Embeddings, record: Record) -> None:
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


def _write_unembedding(layout: ModelLayout, weights: Weights, steps: Plan, frame: Frame, record: Record) -> None:
    part, fold = layout.unembedding, steps.final
    if part is None:
        return
    reading = Reading.of(weights, Fold(None) if fold is None else fold, frame)
    stored = weights[part.weight]
    new = stored.clone()
    # [vocab, dim], views of the stored tensors
    old_rows, new_rows = part.heads(stored)[0], part.heads(new)[0]
    mean = _column_mean(old_rows) if steps.logit_shift else None
    constants = []
    for rows in _chunks(*old_rows.shape):
        chunk = _finite(old_rows[rows], part.weight).double()
        chunk = chunk if mean is None else chunk - mean
        constants.append(reading.constant(chunk))
        new_rows[rows] = reading.rows(chunk).to(new.dtype)
    weights[part.weight] = new
    if part.bias_name is not None:
        bias = weights[part.bias_name].double()
        bias = bias - bias.mean() if steps.logit_shift else bias
        if constants[0] is not None:
            bias = bias + torch.cat([constant for constant in constants if constant is not None])
        weights[part.bias_name] = bias
    record.reads(part, reading)
    record.map_of(part)
    reading.store(weights)


# --- heads ------------------------------------------------------------------------------------------------------------


def _grouped(rows: Tensor, kv_heads: int) -> Tensor:
    """[heads, width, columns] -> [kv_heads, width, columns of all heads of the group]."""
    return rows.unflatten(0, (kv_heads, -1)).transpose(1, 2).flatten(2)


def _ungrouped(rows: Tensor, group: int) -> Tensor:
    """The inverse of `_grouped`."""
    return rows.unflatten(2, (group, -1)).transpose(1, 2).flatten(0, 1)


def _with_bias(heads: Heads, name: str) -> Tensor:
    """The rows of a map with the bias, if there is one, as one more column."""
    rows = heads.weights[name]
    return torch.cat([rows, heads.biases[name][..., None]], dim=-1) if name in heads.biases else rows


def _put_rows(heads: Heads, name: str, rows: Tensor) -> None:
    """Write what `_with_bias` gave."""
    if name in heads.biases:
        heads.weights[name], heads.biases[name] = rows[..., :-1], rows[..., -1]
    else:
        heads.weights[name] = rows


def _block_diagonal(first: Tensor, second: Tensor) -> Tensor:
    """[heads, a, a], [heads, b, b] -> [heads, a + b, a + b]."""
    a, b = first.shape[-1], second.shape[-1]
    whole = first.new_zeros(first.shape[0], a + b, a + b)
    whole[:, :a, :a], whole[:, a:, a:] = first, second
    return whole


@dataclass
class _HeadForms:
    """One layer's attention while it is brought into form.

    Attributes:
        heads: its weights.
        dtype: the coarsest of the stored weights.
        where: how messages call it.
        sizes: name of a map -> [kv_heads], of its rows with their gains, before anything was taken off.
        left: name of a map -> [1, kv_heads or num_heads, width, width], what its slices were multiplied by.
        spectra: as of `Record`, before ordering.
        new_gains: of the norms of queries and keys, [1 or heads, width].
        taken_off: constants were taken off the values that the output map does not show.
        form_query, form_key: with such norms, the factors of the form between them.
    """

    attention: HeadLayout
    heads: Heads
    dtype: torch.dtype
    where: str
    record: Record
    sizes: dict[str, Tensor]
    left: dict[str, Tensor] = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    new_gains: tuple[Tensor, Tensor] | None = None
    taken_off: bool = False
    form_query: Tensor | None = None
    form_key: Tensor | None = None

    def say(self, what: str, form: forms.PairForm | forms.TurnedForm, width: int) -> None:
        """Report what a form leaves open."""
        for head, first, last in form.blocks:
            self.record.leftover.append(
                f"{self.where}, head {head} (before ordering): {what} {first} to {last} have nearly equal singular "
                "values."
            )
        for head, rank in enumerate(form.rank.tolist()):
            if rank < width:
                self.record.leftover.append(
                    f"{self.where}, head {head} (before ordering): {what} have rank {rank} of {width}; the rest is "
                    "set to zero."
                )

    def latents(self) -> None:
        """Turn latents to the principal axes of the maps that make them."""
        for name, (norm, readers) in latent_readers(self.attention).items():
            rows, factor = _with_bias(self.heads, name), 1.0
            if norm.eps == 0 and rows.norm() > 0:
                factor = rows.shape[1] ** 0.5 / rows.norm().item()
                rows = rows * factor
            form = forms.turned(rows, dtype=self.dtype)
            self.say(f"{name} axes", form, rows.shape[1])
            _put_rows(self.heads, name, form.rows)
            self.left[name] = factor * form.turn
            self.spectra[name] = form.spectrum
            for reader in readers:
                self.heads.weights[reader] = self.heads.weights[reader] @ form.turn[0].mT

    def rotary_part(self) -> None:
        """The rotary part of latent attention: one key for all heads."""
        latent = self.attention.latent
        if latent is None:
            return
        query, key = _with_bias(self.heads, "rotary_query"), _with_bias(self.heads, "rotary_key")
        form = forms.rotary_pair(_grouped(query, 1), key, latent.rotary.planes(query.device))
        self.say("rotary planes", form, query.shape[1])
        _put_rows(self.heads, "rotary_query", _ungrouped(form.first, self.attention.num_heads))
        _put_rows(self.heads, "rotary_key", form.second)
        self.left["rotary_query"], self.left["rotary_key"] = form.left, form.right
        self.spectra["rotary"] = _both_coordinates(form.spectrum, latent.rotary.planes(query.device))

    def query_key(self) -> None:
        """Queries against keys, without norms between."""
        attention, heads = self.attention, self.heads
        kv_heads, group, turned = attention.num_kv_heads, attention.group_size, attention.rotary_dim
        query, key = _grouped(_with_bias(heads, "query"), kv_heads), heads.weights["key"]
        width = attention.head_dim
        lefts, rights, spectra, firsts, seconds = [], [], [], [], []
        bias = heads.biases.get("key")
        if turned:
            assert attention.rotary is not None
            planes = attention.rotary.planes(key.device)
            second = key[:, :turned]
            if bias is not None:
                second = torch.cat([second, bias[:, :turned, None]], dim=-1)
            form = forms.rotary_pair(query[:, :turned], second, planes)
            self.say("rotary coordinates", form, turned)
            firsts.append(form.first)
            seconds.append(form.second if bias is not None else _padded(form.second, 1))
            lefts.append(form.left)
            rights.append(form.right)
            spectra.append(_both_coordinates(form.spectrum, planes))
        if turned < width:
            second = key[:, turned:]
            if bias is not None and attention.soft_cap is not None:
                second = torch.cat([second, bias[:, turned:, None]], dim=-1)
            sizes = (self.sizes["query"], self.sizes["key"])
            form = forms.balanced(query[:, turned:], second, dtype=self.dtype, repeats=group, sizes=sizes)
            self.say("query/key coordinates", form, width - turned)
            firsts.append(form.first)
            # Without a cap, a key bias on coordinates without positions adds the same to all scores of a query.
            kept = bias is not None and attention.soft_cap is not None
            seconds.append(form.second if kept else _padded(form.second, 1))
            lefts.append(form.left)
            rights.append(form.right)
            spectra.append(form.spectrum)
        both = torch.cat(seconds, dim=1)
        _put_rows(heads, "query", _ungrouped(torch.cat(firsts, dim=1), group))
        heads.weights["key"] = both[..., :-1]
        if bias is not None:
            heads.biases["key"] = both[..., -1]
        self.left["query"] = lefts[0] if len(lefts) == 1 else _block_diagonal(*lefts)
        self.left["key"] = rights[0] if len(rights) == 1 else _block_diagonal(*rights)
        self.spectra["query_key"] = torch.cat(spectra, dim=1)

    def normed_query_key(self, gains: tuple[Tensor, Tensor] | None, scaled: tuple[bool, bool]) -> None:
        """Queries against keys with norms between.

        Args:
            gains: of the two norms, [head_dim] or [heads · head_dim]; None: they have none.
            scaled: whether the scale of queries, and of keys, is free.
        """
        attention, heads = self.attention, self.heads
        kv_heads, group, turned, width = (
            attention.num_kv_heads,
            attention.group_size,
            attention.rotary_dim,
            attention.head_dim,
        )
        query, key = _with_bias(heads, "query"), _with_bias(heads, "key")
        factors = []
        for rows, free in ((query, scaled[0]), (key, scaled[1])):
            over = (1, 2) if attention.qk_norm_over == "head" else (0, 1, 2)
            size = (
                rows.square().sum(dim=over, keepdim=True).sqrt()
                / (width if attention.qk_norm_over == "head" else width * rows.shape[0]) ** 0.5
            )
            factor = torch.where(size > 0, 1 / size.where(size > 0, torch.ones_like(size)), 1.0)
            factors.append(factor.expand(rows.shape[0], 1, 1) if free else torch.ones_like(rows[:, :1, :1]))
        query, key = query * factors[0], key * factors[1]
        eye = torch.eye(width, dtype=query.dtype, device=query.device)
        turns: tuple[Tensor, Tensor]
        if gains is None:
            turn = eye.expand(kv_heads, width, width).clone()
            columns = query.shape[-1]
            if turned:
                assert attention.rotary is not None
                planes = attention.rotary.planes(key.device)
                form = forms.rotary_pair(_grouped(query, kv_heads)[:, :turned], key[:, :turned], planes, scales=False)
                turn[:, :turned, :turned] = form.left
            if turned < width:
                rest = torch.cat([_grouped(query, kv_heads), key], dim=-1)[:, turned:]
                parts = (columns,) * group + (key.shape[-1],)
                # Keys stand apart from queries, whatever their columns: a zero column more makes the sizes differ.
                rest = torch.cat([rest, rest.new_zeros(*rest.shape[:2], 1)], dim=-1)
                turned_form = forms.turned(rest, dtype=self.dtype, parts=(*parts[:-1], parts[-1] + 1))
                self.say("query/key coordinates", replace(turned_form, rank=torch.full((kv_heads,), width)), width)
                turn[:, turned:, turned:] = turned_form.turn
            query = turn.repeat_interleave(group, dim=0) @ query
            key = turn @ key
            turns = (turn.repeat_interleave(group, dim=0), turn)
            gain_query, gain_key = query.new_ones(1, width), key.new_ones(1, width)
        else:
            query, key, turns, gain_query, gain_key = self._gained(query, key, gains)
            self.new_gains = (gain_query, gain_key)
        _put_rows(heads, "query", query)
        _put_rows(heads, "key", key)
        self.left["query"], self.left["key"] = turns[0] * factors[0], turns[1] * factors[1]
        # The form between the norms, every head at the same scale.
        sizes = [rows.flatten(1).norm(dim=1).clamp_min(1e-300)[:, None, None] for rows in (query, key)]
        self.form_query = query / sizes[0] * gain_query[..., None]
        self.form_key = key / sizes[1] * gain_key[..., None]
        self.spectra["query_key"] = forms.product_spectrum(_grouped(self.form_query, kv_heads), self.form_key)

    def _gained(
        self, query: Tensor, key: Tensor, gains: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        """Signs, and the exchange of gains between queries and keys.

        Returns:
            queries, keys, diagonal matrices [heads, width, width] of both, and the new gains [1 or heads, width].
        """
        attention = self.attention
        group, width = attention.group_size, attention.head_dim
        gain_query, gain_key = (gain.view(-1, width) for gain in gains)
        signs = [torch.where(gain < 0, -1.0, 1.0).double() for gain in (gain_query, gain_key)]
        query, key = query * signs[0][..., None], key * signs[1][..., None]
        gain_query, gain_key = gain_query.abs(), gain_key.abs()
        # Classes of coordinates that exchange together: the two of a plane, one alone elsewhere.
        label = torch.arange(width, device=query.device)
        planes = None if attention.rotary is None else attention.rotary.planes(query.device)
        if planes is not None:
            label[planes[:, 1]] = planes[:, 0]
        same = (label[:, None] == label[None]).double()

        def over_class(squares: Tensor) -> Tensor:
            return (squares @ same).sqrt()

        by_group = gain_query.square()
        if attention.qk_norm_over == "all":
            by_group = by_group.unflatten(0, (-1, group)).sum(dim=1)
        size_query, size_key = over_class(by_group), over_class(gain_key.square())
        alive = (size_query > 0) & (size_key > 0)
        factor = torch.where(alive, size_key / size_query.where(alive, torch.ones_like(size_query)), 1.0).sqrt()
        gain_key = gain_key / factor
        gain_query = gain_query * (
            factor.repeat_interleave(group, dim=0) if attention.qk_norm_over == "all" else factor
        )
        # One sign for each key/value head and class.
        stacked = _grouped(query, attention.num_kv_heads)
        joint = torch.zeros(*stacked.shape[:2], 2 * stacked.shape[2], dtype=stacked.dtype, device=stacked.device)
        joint[..., : stacked.shape[2]] = stacked
        if planes is not None:
            joint[:, planes[:, 0], stacked.shape[2] :] = stacked[:, planes[:, 1]]
        flip = forms.signs(joint)[:, label]
        query = query * flip.repeat_interleave(group, dim=0)[..., None]
        key = key * flip[..., None]
        diagonal_query = signs[0] * flip.repeat_interleave(group, dim=0)
        diagonal_key = signs[1] * flip
        return query, key, (diagonal_query.diag_embed(), diagonal_key.diag_embed()), gain_query, gain_key

    def _seen_constants(self, ones: bool, centred: bool) -> None:
        """Take off the constants of values what no output shows: the rest is the least in what heads give."""
        heads, kv_heads = self.heads, self.attention.num_kv_heads
        basis, triangle = forms.triangle(_grouped(heads.weights["output"], kv_heads))
        unseen = unseen_constants(_ungrouped(basis.mT, self.attention.group_size), kv_heads, centred)
        if unseen is None:
            return
        constant = heads.weights["value"].sum(dim=-1) if ones else heads.biases["value"]
        given = (triangle @ constant[..., None]).flatten()
        off = ((unseen @ given) @ unseen).view(*constant.shape, 1)
        off = (torch.linalg.pinv(triangle) @ off)[..., 0]
        self.taken_off = True
        if ones:
            heads.weights["value"] = heads.weights["value"] - off[..., None] / heads.weights["value"].shape[-1]
        else:
            heads.biases["value"] = constant - off

    def value_output(self, free_scale: bool, ones: bool, centred: bool) -> None:
        """Values against output.

        Args:
            free_scale: a norm without eps divides the output by its size.
            ones: constants stand on the means of rows.
            centred: the mean of the output does not count.
        """
        attention, heads = self.attention, self.heads
        kv_heads, group = attention.num_kv_heads, attention.group_size
        if "output" not in heads.biases and (ones or "value" in heads.biases):
            self._seen_constants(ones, centred)
        value = _with_bias(heads, "value")
        output = _grouped(heads.weights["output"], kv_heads)
        sizes = (self.sizes["value"], self.sizes["output"])
        form = forms.balanced(value, output, dtype=self.dtype, sizes=sizes)
        self.say("value/output coordinates", form, attention.value_width)
        spectrum, factor = form.spectrum, 1.0
        total = spectrum.norm().item()
        if free_scale and total > 0:
            factor = total**-0.5
            spectrum = spectrum / total
            if "output" in heads.biases:
                heads.biases["output"] = heads.biases["output"] / total
        _put_rows(heads, "value", form.first * factor)
        heads.weights["output"] = _ungrouped(form.second * factor, group)
        self.left["value"], self.left["output"] = form.left * factor, form.right * factor
        self.spectra["value_output"] = spectrum

    def order(self, sort: bool) -> tuple[Tensor, Tensor]:
        """The order of key/value heads and of query heads, new to old, largest first."""
        attention, heads = self.attention, self.heads
        kv_heads, group = attention.num_kv_heads, attention.group_size
        device = heads.weights["query"].device
        kv_order = torch.arange(kv_heads, device=device)
        inner = torch.arange(group, device=device).expand(kv_heads, group).clone()
        if sort:
            tolerance = forms.degeneracy_tolerance(self.dtype)
            query = heads.weights["query"] if self.form_query is None else self.form_query
            key = heads.weights["key"] if self.form_key is None else self.form_key
            if "query" in heads.biases and self.form_query is None:
                query = _with_bias(heads, "query")
            key_by_query = key.repeat_interleave(group, dim=0)
            value_by_query = heads.weights["value"].repeat_interleave(group, dim=0)
            scores = self._scores(query, key_by_query)
            outputs = forms.product_norms(heads.weights["output"], value_by_query)
            strength = (scores.square() * outputs.square()).view(kv_heads, group)
            for head in range(kv_heads):
                if group > 1:
                    inner[head], ties = forms.descending(
                        strength[head].sqrt(), scores.view(kv_heads, group)[head], tolerance
                    )
                    self._tied(f"query heads of group {head}", ties)
            kv_order, ties = forms.descending(
                strength.sum(dim=1).sqrt(), scores.view(kv_heads, group).square().sum(dim=1).sqrt(), tolerance
            )
            self._tied("key/value heads", ties)
        query_order = (kv_order[:, None] * group + inner[kv_order]).flatten()
        return kv_order, query_order

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        """[num_heads]: the size of the form that makes the scores of each head."""
        attention, rotary = self.attention, self.attention.rotary
        turned = 0 if self.form_query is not None else attention.rotary_dim
        total = query.new_zeros(query.shape[0])
        if turned and rotary is not None:
            planes = rotary.planes(query.device)
            sizes = [forms.to_planes(rows[:, :turned], planes).abs().square().sum(dim=-1) for rows in (query, key)]
            total = total + (sizes[0] * sizes[1]).sum(dim=-1)
        if turned < attention.head_dim:
            total = total + forms.product_norms(query[:, turned:], key[:, turned:]).square()
        if "rotary_query" in self.heads.weights:
            total = total + self.heads.weights["rotary_query"].square().sum(dim=(1, 2))
        return total.sqrt()

    def _tied(self, what: str, ties: list[tuple[int, int]]) -> None:
        for first, second in ties:
            self.record.leftover.append(f"{self.where}: {what} {first} and {second} are alike in size.")


def _padded(rows: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, columns))


def _both_coordinates(values: Tensor, planes: Tensor) -> Tensor:
    """[heads, planes] -> [heads, 2 planes]: the value of each plane at both its coordinates."""
    both = values.new_empty(values.shape[0], planes.numel())
    both[:, planes[:, 0]] = both[:, planes[:, 1]] = values
    return both


_BY_QUERY = ("query", "output", "rotary_query")
_SHARED = ("kv_latent", "query_latent", "rotary_key")


def _sizes(attention: HeadLayout, heads: Heads, reading: Reading) -> dict[str, Tensor]:
    """[kv_heads]: norms of queries, keys, values and outputs as they are stored, with the gain of what they read."""
    sizes = {}
    for name in ("query", "key", "value", "output"):
        rows = heads.weights[name]
        by_stream = name != "output" and attention.latent is None
        if by_stream and reading.fold.kind == "before" and reading.gain is not None:
            rows = rows * reading.gain
        squares = rows.square().sum(dim=(1, 2)).view(attention.num_kv_heads, -1).sum(dim=1)
        sizes[name] = squares.sqrt() if by_stream or name == "output" else torch.zeros_like(squares)
    return sizes


def _attention(
    layer: Layer,
    number: int,
    weights: Weights,
    reading: Reading,
    writing: Writing,
    sort: bool,
    record: Record,
) -> None:
    attention = layer.attention
    maps = attention_maps(attention)
    for part in maps.values():
        _finite(weights[part.weight], part.weight)
    heads = Heads.read(weights, attention)
    dtype = max((weights.dtype(part.weight) for part in maps.values()), key=lambda dtype: torch.finfo(dtype).eps)
    latent_gains = {name: stored_gain(weights, norm) for name, (norm, _) in latent_readers(attention).items()}
    sizes = _sizes(attention, heads, reading)
    heads.fold(attention, reading, writing)
    heads.fold_latents(attention, weights)
    ones = reading.fold.ones and attention.latent is None
    moved = heads.fold_constants(attention, ones)
    work = _HeadForms(attention, heads, dtype, f"Layer {number}", record, sizes)
    work.latents()
    norms = attention.qk_norm
    gains = None
    if norms is False:
        work.query_key()
    elif isinstance(norms, tuple):
        stored = [stored_gain(weights, norm) for norm in norms]
        if stored[0] is None or stored[1] is None:
            work.normed_query_key(None, (norms[0].eps == 0, norms[1].eps == 0))
        else:
            gains = (stored[0], stored[1])
            work.normed_query_key(gains, (norms[0].eps == 0, norms[1].eps == 0))
        if min(norm.eps for norm in norms) > 0 and number == 0:
            record.folded.append("The scales of queries and keys are left: the eps of their norms is not 0.")
    else:
        work.normed_query_key(None, (True, True))
    work.rotary_part()
    out_norm = layer.attention_out_norm
    work.value_output(out_norm is not None and out_norm.eps == 0, ones, writing.centred)
    kv_order, query_order = work.order(sort)
    for name in maps:
        if name in _SHARED:
            continue
        order = query_order if name in _BY_QUERY else kv_order
        heads.weights[name] = heads.weights[name][order]
        if name in heads.biases and name != "output":
            heads.biases[name] = heads.biases[name][order]
    if gains is not None and isinstance(norms, tuple):
        _store_gains(attention, norms, weights, work, (query_order, kv_order))
    heads.store(weights, attention)
    for norm, _ in latent_readers(attention).values():
        gain = stored_gain(weights, norm)
        if norm.weight is not None and gain is not None:
            weights[norm.weight] = torch.ones_like(gain) - norm.offset
    _record_attention(attention, maps, record, reading, writing, work, (kv_order, query_order), latent_gains)
    if moved is not None:
        record.map_of(attention.output)["value_bias"] = record.keep(
            f"{attention.value.path}.value_bias", moved.repeat_interleave(attention.group_size, dim=0)
        )
    if work.taken_off:
        record.map_of(attention.output)["taken_off"] = True
    if attention.key.bias and norms is False and attention.soft_cap is None and number == 0:
        where = "" if not attention.rotary_dim else " (where positions do not turn)"
        if attention.rotary_dim < attention.head_dim:
            record.folded.append(f"Key biases{where} change no score against another: set to zero.")
    if number == 0 and attention.value.bias:
        record.folded.append(
            "Value biases moved into the output biases."
            if moved is not None
            else "Value biases turn along with values: there is no output bias to move them into."
        )
    spectra = {name: work.spectra[name][kv_order].cpu() for name in ("query_key", "value_output")}
    extra = {name: tensor.cpu() for name, tensor in work.spectra.items() if name not in spectra}
    record.spectra[number] = spectra | extra


def _store_gains(
    attention: HeadLayout,
    norms: tuple[Norm, Norm],
    weights: Weights,
    work: _HeadForms,
    orders: tuple[Tensor, Tensor],
) -> None:
    """Write the gains of queries' and keys' norms."""
    assert work.new_gains is not None
    for norm, gain, order in zip(norms, work.new_gains, orders):
        gain = gain[order] if attention.qk_norm_over == "all" else gain
        assert norm.weight is not None
        weights[norm.weight] = gain.flatten() - norm.offset


def _record_attention(
    attention: HeadLayout,
    maps: dict[str, Projection],
    record: Record,
    reading: Reading,
    writing: Writing,
    work: _HeadForms,
    orders: tuple[Tensor, Tensor],
    latent_gains: dict[str, Tensor | None],
) -> None:
    by_latent = {name: source for source, (_, names) in latent_readers(attention).items() for name in names}
    for name, part in maps.items():
        order = None if name in _SHARED else orders[1] if name in _BY_QUERY else orders[0]
        left = work.left.get(name)
        if left is not None and left.shape[0] > 1:
            left = left[orders[0] if left.shape[0] == attention.num_kv_heads else orders[1]]
        record.slices(part, name, {"left": left, "order": order})
        if name == "output":
            record.writes(part, writing)
        elif name in by_latent:
            source = by_latent[name]
            gain = latent_gains[source]
            turn = record.keep(f"{maps[source].path}.{source}.turn", _unit(work.left[source][0]))
            found: dict[str, Any] = {"turn": turn}
            if gain is not None:
                found["gain"] = record.keep(f"{maps[source].path}.{source}.gain", gain)
            record.map_of(part)["latent"] = found
        else:
            record.reads(part, reading)


def _unit(turn: Tensor) -> Tensor:
    """The orthogonal matrix of which this is a multiple."""
    return turn / turn.square().sum(dim=-1).mean().sqrt()


# --- feed-forward layers ----------------------------------------------------------------------------------------------


@dataclass
class _Neurons:
    """Sizes and signs of the hidden features of a feed-forward layer, [features]."""

    up: Tensor
    gate: Tensor
    down: Tensor
    sign: Tensor
    second: Tensor


def _measure(
    mlp: MLP,
    old: dict[str, Tensor],
    biases: dict[str, Tensor],
    reading: Reading,
    writing: Writing,
    slope: Tensor | None,
) -> _Neurons:
    features = mlp.up.width
    device = old["up"].device
    found = _Neurons(*(torch.ones(features, dtype=torch.float64, device=device) for _ in range(5)))
    for part in _chunks(features, old["up"].shape[1]):
        up = old["up"][part].double()
        up = _joined(reading.rows(up), biases.get("up"), reading.constant(up), part)
        down = writing.rows(old["down"][part].double())
        if slope is not None:
            # A slope beyond 1 belongs to the feature of opposite sign.
            turned = slope[part].abs() > 1
            up = torch.where(turned[:, None], -up, up)
            down = torch.where(turned[:, None], -slope[part, None] * down, down)
        found.up[part], found.down[part] = up.norm(dim=1), down.norm(dim=1)
        if mlp.gate is not None:
            gate = old["gate"][part].double()
            found.gate[part] = _joined(reading.rows(gate), biases.get("gate"), reading.constant(gate), part).norm(dim=1)
            found.sign[part] = forms.signs(up)
        fixed = forms.probe(max(up.shape[1], down.shape[1]), 1, device)[:, 0]
        tiny = torch.finfo(torch.float64).tiny
        found.second[part] = found.sign[part] * (up @ fixed[: up.shape[1]]) / found.up[part].clamp_min(tiny)
    return found


def _joined(rows: Tensor, bias: Tensor | None, constant: Tensor | None, part: slice) -> Tensor:
    """Rows with their bias as one more column."""
    if bias is None:
        return rows
    column = bias[part] if constant is None else bias[part] + constant
    return torch.cat([rows, column[:, None]], dim=1)


def _feed_forward(
    layer: Layer, number: int, weights: Weights, reading: Reading, writing: Writing, sort: bool, record: Record
) -> None:
    mlp = layer.mlp
    if mlp is None:
        return
    parts = {name: part for name, part in (("up", mlp.up), ("gate", mlp.gate), ("down", mlp.down)) if part is not None}
    stored = {part.weight: _finite(weights[part.weight], part.weight) for part in parts.values()}
    # [features, dim]: views of the stored tensors
    old = {name: part.heads(stored[part.weight])[0] for name, part in parts.items()}
    biases = {
        name: parts[name].head_biases(weights[bias].double())[0]
        for name in ("up", "gate")
        if name in parts and (bias := parts[name].bias_name) is not None
    }
    slope = None if mlp.slope is None else weights[mlp.slope].double()
    sizes = _measure(mlp, old, biases, reading, writing, slope)
    dtype = max((weights.dtype(part.weight) for part in parts.values()), key=lambda dtype: torch.finfo(dtype).eps)
    ones = torch.ones_like(sizes.up)
    factors = {"up": ones, "gate": ones, "down": ones}
    gate_scales = mlp.gate is not None and mlp.homogeneous
    strength = sizes.up * sizes.down * (sizes.gate if mlp.gate is not None else 1)
    if mlp.gate is not None or mlp.homogeneous:
        alive = (sizes.up > 0) & (sizes.down > 0) & ((sizes.gate > 0) | torch.tensor(not gate_scales))
        goal = strength ** (1 / 3) if gate_scales else (sizes.up * sizes.down).sqrt()

        def towards(size: Tensor, live: Tensor = alive) -> Tensor:
            return torch.where(live, goal / size.where(live, torch.ones_like(size)), 0.0)

        factors = {"up": towards(sizes.up) * sizes.sign, "down": towards(sizes.down) * sizes.sign, "gate": ones}
        if gate_scales:
            factors["gate"] = towards(sizes.gate)
        dead = int((~alive).sum())
        if dead:
            record.leftover.append(
                f"Layer {number}: {dead} hidden features give nothing; what is left of them is zero."
            )
    out_norm, total = layer.mlp_out_norm, 1.0
    if out_norm is not None and out_norm.eps == 0:
        # The size of the output is free: one more scale, shared by the sides that a feature's scale balances.
        total = strength.norm().item() or 1.0
        share = total ** (-1 / 3 if gate_scales else -0.5 if mlp.gate is not None or mlp.homogeneous else -1)
        scaled = ("up", "down", "gate") if gate_scales else ("up", "down")
        for name in scaled if mlp.gate is not None or mlp.homogeneous else ("down",):
            factors[name] = factors[name] * share
    if slope is not None:
        turned = slope.abs() > 1
        factors["up"] = torch.where(turned, -factors["up"], factors["up"])
        factors["down"] = torch.where(turned, -slope * factors["down"], factors["down"])
        slope = torch.where(turned, 1 / slope.where(turned, ones), slope)
    order = torch.arange(mlp.up.width, device=sizes.up.device)
    movable = mlp.activation != "prelu" or slope is not None
    if sort and movable:
        order, ties = forms.descending(strength, sizes.second, forms.degeneracy_tolerance(dtype))
        if ties:
            record.leftover.append(f"Layer {number}: {len(ties)} pairs of hidden features are alike in size.")
    elif sort:
        record.leftover.append(
            f"Layer {number}: hidden features are kept in order, for their slopes are not described."
        )
    new = {name: tensor.clone() for name, tensor in stored.items()}
    for name, part in parts.items():
        rows, factor = part.heads(new[part.weight])[0], factors[name][order]
        treat = writing.rows if name == "down" else reading.rows
        for chunk in _chunks(*rows.shape):
            values = treat(old[name][order[chunk]].double())
            rows[chunk] = (factor[chunk, None] * values).to(rows.dtype)
        if name in biases and part.bias_name is not None:
            bias, moved = biases[name], []
            for chunk in _chunks(*rows.shape):
                constant = reading.constant(old[name][chunk].double())
                moved.append(bias[chunk] if constant is None else bias[chunk] + constant)
            whole = weights[part.bias_name].double().clone()
            part.put_head_biases(whole, (factor * torch.cat(moved)[order])[None])
            weights[part.bias_name] = whole
        record.slices(part, name, {"scale": factor, "order": order})
        if name == "down":
            record.writes(part, writing)
        else:
            record.reads(part, reading)
    for name, tensor in new.items():
        weights[name] = tensor
    if mlp.down.bias_name is not None:
        bias = weights[mlp.down.bias_name].double()
        if reading.fold.kind == "after" and reading.bias is not None:
            bias = bias + reading.bias
        weights[mlp.down.bias_name] = writing.rows(bias) / total
    if mlp.slope is not None and slope is not None:
        weights[mlp.slope] = slope[order]


def out_norm_in_frame(norm: Norm | None, weights: Weights, frame: Frame, scale: float) -> None:
    """A norm of what a branch writes, in the new frame and scale of the stream."""
    if norm is None:
        return
    gain, bias = stored_gain(weights, norm), stored_bias(weights, norm)
    if norm.weight is not None and gain is not None:
        weights[norm.weight] = frame.permute(gain) / scale - norm.offset
    if norm.bias_name is not None and bias is not None:
        weights[norm.bias_name] = frame.apply(bias) / scale


# --- the whole --------------------------------------------------------------------------------------------------------


def _residual_scale(layout: ModelLayout, weights: Weights, embeddings: _Embeddings) -> float:
    """Root mean square of the token embedding in its new form."""
    table = weights[layout.token_embedding]
    total = sum(embeddings.token_rows(table[part].double()).square().sum().item() for part in _chunks(*table.shape))
    return (total / table.numel()) ** 0.5 or 1.0


def canonical_form(
    layout: ModelLayout,
    weights: Weights,
    *,
    order: Literal["sorted", "kept"] = "sorted",
    residual: bool = False,
    logit_shift: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Record:
    """Bring weights to canonical form, tensor by tensor, a layer at a time.

    Args:
        layout: of the model.
        weights: read, and written. What fails part of the way leaves them half done: give a copy, or `PendingWeights`.
        order: "sorted": heads and hidden features by size, largest first; "kept": as they are.
        residual: also fix the frame of the residual stream.
        logit_shift: also take off what softmax does not see: a constant added to all logits of a position.
        progress: called with the number of layers done and of all.

    Returns:
        What was done.

    Raises:
        ValueError: a tensor is missing, of another shape than the layout's, quantised or not finite; ``residual`` where
            no frame is free.
    """
    if order not in ("sorted", "kept"):
        raise ValueError(f'order must be "sorted" or "kept", received {order!r}')
    check_weights(layout, weights)
    steps, record, sort = plan(layout, logit_shift=logit_shift), Record(), order == "sorted"
    record.folded += steps.notes
    if residual and steps.rotations == "none":
        raise ValueError(f"the frame of the residual stream of this {layout.kind} is not free: {steps.reason}")
    embeddings = _embeddings(layout, weights, steps)
    scale = _residual_scale(layout, weights, embeddings) if steps.residual_scale else 1.0
    frame = _residual_frame(layout, weights, steps, embeddings, record) if residual else Frame()
    table_scale = _residual_scale(layout, weights, embeddings) if steps.embedding_scale else scale
    if residual:
        kinds = {
            "all": "rotations",
            "mean": "rotations that leave the mean",
            "signed": "signed permutations of coordinates (a tied embedding, or norms that stay, leave no others)",
            "permuted": "permutations of coordinates (a tied embedding, or norms that stay, leave no others)",
        }
        record.folded.append(f"The frame of the residual stream is fixed: {kinds[steps.rotations]}.")
        for name, tensor in (("matrix", frame.matrix), ("order", frame.order), ("sign", frame.sign)):
            if tensor is not None:
                record.keep(f"residual.{name}", tensor)
    embeddings = replace(
        embeddings,
        writing=replace(embeddings.writing, frame=frame, scale=table_scale),
        token_writing=replace(embeddings.token_writing, frame=frame, scale=table_scale),
    )
    _write_embeddings(layout, weights, embeddings, record)
    for number, (layer, what) in enumerate(zip(layout.layers, steps.layers)):
        _layer(layer, number, what, weights, frame, scale, sort, record)
        if progress is not None:
            progress(number + 1, len(layout.layers))
    _write_unembedding(layout, weights, steps, frame, record)
    final = layout.final_norm
    if final is not None and (steps.final is None or steps.final.kind == "kept"):
        # Tied: the logits are taken with the embedding that was divided by the scale.
        gain, bias = stored_gain(weights, final), stored_bias(weights, final)
        tied_scale = scale if layout.tied else 1.0
        if final.weight is not None and gain is not None and (residual or tied_scale != 1):
            weights[final.weight] = frame.permute(gain) * tied_scale - final.offset
        if final.bias_name is not None and bias is not None and (residual or tied_scale != 1):
            weights[final.bias_name] = frame.apply(bias) * tied_scale
    return record


def _layer(
    layer: Layer,
    number: int,
    steps: LayerPlan,
    weights: Weights,
    frame: Frame,
    scale: float,
    sort: bool,
    record: Record,
) -> None:
    readings = {fold: Reading.of(weights, fold, frame) for fold in (steps.attention, steps.mlp)}
    for fold, centred, out_norm, treat in (
        (steps.attention, steps.attention_centred, layer.attention_out_norm, _attention),
        (steps.mlp, steps.mlp_centred, layer.mlp_out_norm, _feed_forward),
    ):
        reading = readings[fold]
        # A norm of the output sets its size: then its gain carries the scale of the stream.
        divided = reading.scale if fold.kind == "after" else scale if out_norm is None else 1.0
        treat(layer, number, weights, reading, Writing(centred, frame, divided), sort, record)
        out_norm_in_frame(out_norm, weights, frame, scale)
    for reading in readings.values():
        if reading.fold.kind != "kept" or not frame.same:
            reading.store(weights)


# --- models in memory -------------------------------------------------------------------------------------------------


class _InFloat64(TorchFunctionMode):
    """Casts to float32 inside a model (norms and softmaxes of transformers) become casts to float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.float:
            return Tensor.double(*args)
        if any(value is torch.float32 for value in (*args, *kwargs.values())):
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _output(model: nn.Module, inputs: Tensor | Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """Logits (or hidden states) of a copy of the model in a dtype, float64 on the CPU."""
    with torch.inference_mode(), _InFloat64() if dtype == torch.float64 else nullcontext():
        cast = copy.deepcopy(model).to(dtype).eval()
        config: Any = getattr(cast, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"  # the grouped kernel knows no float64
        found = cast(**inputs) if isinstance(inputs, Mapping) else cast(inputs)
    for name in ("logits", "last_hidden_state"):
        if hasattr(found, name):
            found = getattr(found, name)
    if isinstance(found, tuple):
        found = found[0]
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the outputs of a {type(model).__name__} could not be compared: a call gave a {type(found).__name__}, not "
            "a tensor, a tuple or an output with logits. Pass check=False, and compare them yourself"
        )
    return found.cpu().double()


def _generated_inputs(model: nn.Module, layout: ModelLayout, device: torch.device) -> Tensor:
    """int64 [2, T]: random tokens, always the same."""
    config, length = getattr(model, "config", None), 32
    for name in ("max_position_embeddings", "n_positions", "context_length"):
        limit = getattr(config, name, None)
        if isinstance(limit, int):
            length = min(length, limit)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(layout.vocab_size, (2, length), generator=generator).to(device)


_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def _outputs(model: nn.Module, inputs: Tensor | Mapping[str, Any], shifted: bool) -> dict[str, Tensor]:
    found = {name: _output(model, inputs, dtype) for name, dtype in _DTYPES.items()}
    return {name: x - x.mean(dim=-1, keepdim=True) if shifted else x for name, x in found.items()}


def compared(before: Mapping[str, Tensor], after: Mapping[str, Tensor], checked: str) -> dict[str, Any]:
    """The fields of a `Certificate` that say how outputs compare.

    Args:
        before, after: dtype ("float64", "float32", "bfloat16") -> outputs.
        checked: what they were computed on.
    """
    exact = before["float64"]
    return {
        "max_logit_difference": {name: (after[name] - before[name]).abs().max().item() for name in before},
        "logit_scale": exact.square().mean().sqrt().item(),
        "rounding": {
            when: {name: (x - values["float64"]).abs().max().item() for name, x in values.items() if name != "float64"}
            for when, values in (("before", before), ("after", after))
        },
        "checked": checked,
    }


def untied(layout: ModelLayout, unembedding: str) -> ModelLayout:
    """The layout of a model whose logits are taken with a tensor of their own, ``unembedding + ".weight"``."""
    return replace(layout, tied=False, unembedding=slices_of(unembedding, 1, layout.vocab_size))


def _tied_name(weights: ModuleWeights, layout: ModelLayout) -> str:
    """The other name of the token embedding."""
    table = layout.token_embedding
    others = [name for name in weights if name != table and weights.same(name, table)]
    if len(others) != 1 or not others[0].endswith(".weight"):
        raise ValueError(
            f"untie needs a model whose logits are taken with {table} under a second name, found {others or 'none'}"
        )
    return others[0]


def _untie(module: nn.Module, name: str, source: str) -> None:
    """Give a tied parameter a tensor of its own, and say so in the config."""
    path, _, last = name.rpartition(".")
    tied = module.get_parameter(source)
    setattr(module.get_submodule(path), last, nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad))
    config: Any = getattr(module, "config", None)
    if is_dataclass(config) and hasattr(config, "tie_embeddings"):
        untied_config: Any = replace(config, tie_embeddings=False)
        module.config = untied_config
    elif config is not None and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False


def canonicalize(
    model_or_folder: nn.Module | str | Path,
    output: str | Path | None = None,
    *,
    order: Literal["sorted", "kept"] = "sorted",
    residual: bool = False,
    untie: bool = False,
    logit_shift: bool = False,
    inputs: Tensor | Mapping[str, Any] | None = None,
    check: bool = True,
) -> Certificate:
    """Bring a model to canonical form: of all weights that are the same function, one representative.

    A model in memory is changed in place (its parameters keep their dtype and device; nothing is written before all is
    computed). A folder of Hugging Face is read, and another one written.

    Args:
        model_or_folder: a model whose layout is known (wrappers of compile and DDP are seen through), or a folder with
            ``config.json`` and safetensors.
        output: the folder to write, which must not exist; for a folder only.
        order: "sorted": heads and hidden features by size, largest first; "kept": as they are.
        residual: also fix the frame of the residual stream: rotations where it has no other use, permutations of
            coordinates where the embedding is tied.
        untie: give the logits a tensor of their own first, so that the frame is free. The model then has more
            parameters.
        logit_shift: also take off a constant added to all logits of a position. Softmax does not see it; without this
            the logits themselves stay what they were.
        inputs: what outputs are compared on: token ids [B, T], or keyword arguments of the model. None: two sequences
            of random tokens, always the same.
        check: compare outputs before and after, in float64, float32 and bfloat16.

    Raises:
        TypeError: no layout is known for the model.
        ValueError: weights that contradict the layout, are missing, quantised, sharded or not finite; ``residual``
            where no frame is free; ``untie`` where nothing is tied; an output folder for a model in memory, or none for
            a folder.
    """
    if isinstance(model_or_folder, str | Path):
        if output is None:
            raise ValueError("canonicalize writes a folder beside the one it reads: give the output folder")
        options = {"order": order, "residual": residual, "untie": untie, "logit_shift": logit_shift}
        return import_module(_FOLDERS).canonicalize_folder(
            model_or_folder, output, **options, inputs=inputs, check=check
        )
    if not isinstance(model_or_folder, nn.Module):
        raise TypeError(f"canonicalize needs a model or a folder, received a {type(model_or_folder).__name__}")
    if output is not None:
        raise ValueError("a model in memory is changed in place: give no output folder, and save it where you like")
    model = unwrap(model_or_folder)
    layout, stored = model_layout(model), ModuleWeights(model)
    added: dict[str, str] = {}
    if untie:
        if not layout.tied:
            raise ValueError("untie needs a model whose logits are taken with the token embedding; this one's are not")
        name = _tied_name(stored, layout)
        added[name] = layout.token_embedding
        layout = untied(layout, name.removesuffix(".weight"))
    weights = PendingWeights(stored, added)
    check_weights(layout, weights)
    device = stored[layout.token_embedding].device
    if inputs is None and check:
        inputs = _generated_inputs(model, layout, device)
    shifted = plan(layout, logit_shift=logit_shift).logit_shift
    before = _outputs(model, inputs, shifted) if check and inputs is not None else None
    record = canonical_form(layout, weights, order=order, residual=residual, logit_shift=logit_shift)
    for name, source in added.items():
        _untie(model, name, source)
        weights = weights.onto(ModuleWeights(model))
    weights.commit()
    certificate = Certificate(layout.kind, **vars(record))
    if before is not None and inputs is not None:
        sizes = f"{tuple(inputs.shape)} token ids" if isinstance(inputs, Tensor) else "the inputs given"
        after = _outputs(model, inputs, shifted)
        for name, value in compared(before, after, sizes).items():
            setattr(certificate, name, value)
    return certificate
