"""Store and multiply less: what the gauge of heads makes redundant, taken out of a model for good.

A key/value head of width k is its products only, of queries with keys and of values with outputs. In a gauge where k
columns of the keys (or values) are an identity block, k² numbers a head need be neither stored nor multiplied. The
model computes what it did: `ReducedLinear` takes the place of the linear maps concerned, everything else stays. With
``keep``, directions that carry little are left out as well, and the error is said.

An identity block in the first k columns ruins models in low precision. The columns are chosen, one set for all heads of
a layer (then what is left is one dense product), and only as many as rounding allows.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._fold import Fold, Heads, Reading, attention_maps, latent_readers, plan
from ._outputs import compared, generated_inputs, outputs
from ._reduced import Reduced, ReducedLinear, Rows, reduce_inputs, reduce_rows
from ._shrink_sectors import Moments, Truncation, check_keep, identity_block, kept, truncation
from ._weights import ModuleWeights, ReadWeights
from .canonical import check_weights
from .layout import HeadLayout, Layer, ModelLayout, Projection, model_layout, unwrap

SECTORS = ("value_output", "query_key")
Keep = int | float | Mapping[str, int | float] | None
Inputs = Tensor | Mapping[str, Any]

# --- what is reported -------------------------------------------------------------------------------------------------


@dataclass
class Sector:
    """What was saved of the products of one layer: values with outputs, or queries with keys. G key/value heads.

    Attributes:
        block: width of the identity block: so many numbers in each of so many columns a head are not stored.
        noise: how much larger than in the balanced gauge rounding is, in the worst head; None without a block.
        condition: of the matrices that lead to the block, the worst head's; None without one.
        rank: [G], coordinates of a head that are kept.
        error: [G], the size of what was dropped over that of the product, for inputs as they were measured (without
            any: as norms make them).
        spectrum: [G][width], singular values of the product for those inputs; empty where nothing was truncated.
        left: why it was left as it was, or a part of it; empty where it was not.
    """

    block: int = 0
    noise: float | None = None
    condition: float | None = None
    rank: list[int] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    spectrum: list[list[float]] = field(default_factory=list)
    left: str = ""


@dataclass
class Shrunk:
    """What `shrink` did to a model, and that its outputs are what they were.

    Attributes:
        kind: of model.
        layers: by number, sector -> what was saved.
        numbers: (before, after) of all weights of the model.
        bytes: (before, after) of all its weights, indices included.
        multiplications: (before, after), a token, of the projections of attention.
        maps: path of each map that was replaced -> its sizes, from which `ReducedLinear.of_plan` makes it.
        notes: what was done and what was left, in sentences.
        max_logit_difference, logit_scale, rounding, checked: as of `Certificate`.
        loss: (before, after), mean cross-entropy of the next token in nats, on a text that was given for a folder.
    """

    kind: str
    layers: dict[int, dict[str, Sector]] = field(default_factory=dict)
    numbers: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] = (0, 0)
    multiplications: tuple[int, int] = (0, 0)
    maps: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list)
    max_logit_difference: dict[str, float] = field(default_factory=dict)
    logit_scale: float = 0.0
    rounding: dict[str, dict[str, float]] = field(default_factory=dict)
    checked: str = "outputs were not compared"
    loss: tuple[float, float] | None = None

    def to_json(self) -> str:
        """All of it as JSON."""
        layers = {
            str(number): {name: vars(one) for name, one in found.items()} for number, found in self.layers.items()
        }
        return json.dumps(vars(self) | {"layers": layers}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Shrunk":
        """The inverse of `to_json`."""
        values = json.loads(text)
        values["layers"] = {
            int(number): {name: Sector(**one) for name, one in found.items()}
            for number, found in values["layers"].items()
        }
        for name in ("numbers", "bytes", "multiplications", "loss"):
            values[name] = values[name] and tuple(values[name])
        return cls(**values)

    def __str__(self) -> str:
        lines = [f"a {self.kind} with {len(self.layers)} layers, shrunk"]
        for what, (before, after) in (
            ("numbers", self.numbers),
            ("bytes", self.bytes),
            ("multiplications of attention maps, a token", self.multiplications),
        ):
            share = 100 * (1 - after / before) if before else 0.0
            lines.append(f"  {what}: {before:,} -> {after:,} ({share:.3g} % less)")
        if self.max_logit_difference:
            lines.append(f"largest difference of an output (size {self.logit_scale:.3g}; {self.checked}):")
            for name, value in self.max_logit_difference.items():
                own = [self.rounding.get(when, {}).get(name) for when in ("before", "after")]
                rounding = "" if None in own else f"   rounding of the model itself {own[0]:.2g}, now {own[1]:.2g}"
                lines.append(f"  {name:9}{value:10.2g}{rounding}")
        else:
            lines.append(self.checked)
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


# --- a layer ----------------------------------------------------------------------------------------------------------


@dataclass
class LayerShrink:
    """What becomes of the tensors of one layer.

    Attributes:
        sectors: what was saved.
        reduced: path of a map -> what replaces it.
        tensors: name -> new numbers, float64, in the old shape.
        multiplications: (before, after), of the maps concerned and those beside them in the same layer.
    """

    sectors: dict[str, Sector]
    reduced: dict[str, Reduced] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    multiplications: tuple[int, int] = (0, 0)


def _why_not(attention: HeadLayout) -> str:
    """Why queries and keys have no identity block, or none on all their coordinates."""
    if attention.qk_norm:
        return "norms of queries and keys leave no change of basis between them"
    turned = attention.rotary_dim
    if turned == attention.head_dim:
        return "rotary positions leave one complex number a plane, 2 numbers of which the saving is not worth its cost"
    return f"rotary positions turn {turned} of the {attention.head_dim} coordinates of a head" if turned else ""


class _Layer:
    """One layer's attention while it is shrunk.

    Attributes:
        heads: in float64. Rows that are not computed become 0.
        absorbed: the output bias has changed.
        alive: name of a map -> bool [slices, width], the coordinates that are computed, or read.
        blocks: name of a map -> (first coordinate, rank of each head, columns) of an identity block.
    """

    def __init__(
        self, layer: Layer, weights: ReadWeights, reading: Reading, moments: Mapping[str, Moments], noise: float
    ) -> None:
        self.attention, self.weights, self.noise = layer.attention, weights, noise
        self.maps = attention_maps(layer.attention)
        for name in dict.fromkeys(name for part in self.maps.values() for name in (part.weight, part.bias_name)):
            if name is not None and not weights[name].sum().isfinite():
                raise ValueError(f"{name} holds numbers that are not finite: such weights have nothing to keep")
        heads = Heads.read(weights, layer.attention)
        # Of weights in float64, what was read are views.
        self.heads = Heads(*({name: x.clone() for name, x in found.items()} for found in (heads.weights, heads.biases)))
        norms = {name: norm for norm, names in latent_readers(layer.attention).values() for name in names}
        self.moments: dict[str, Moments] = {}
        for name in ("query", "key", "value"):
            rows, path = self.heads.weights[name], self.maps[name].path
            read = Reading.of(weights, Fold(norms[name], "before")) if name in norms else reading
            self.moments[name] = moments.get(path) or Moments.behind(read, rows.shape[-1], rows.device)
        self.absorbed = False
        self.alive: dict[str, Tensor] = {}
        self.blocks: dict[str, tuple[int, list[int], Tensor]] = {}

    def _stacked(self, rows: Tensor) -> Tensor:
        """[num_heads, width, columns] -> [kv_heads, width, columns of the group]."""
        return rows.unflatten(0, (self.attention.num_kv_heads, -1)).transpose(1, 2).flatten(2)

    def _with_bias(self, name: str, start: int = 0) -> Tensor:
        """Rows of a map from a coordinate on, with the bias as one more column."""
        rows, bias = self.heads.weights[name], self.heads.biases.get(name)
        return (rows if bias is None else torch.cat([rows, bias[..., None]], dim=-1))[:, start:]

    def _put(self, name: str, start: int, rows: Sequence[Tensor], alike: int = 1) -> None:
        """Write what `_with_bias` gave, changed, head by head; coordinates that are no more are 0.

        Args:
            rows: one a key/value head, [rank, columns]; of ``alike`` query heads side by side.
        """
        weight, bias = self.heads.weights[name], self.heads.biases.get(name) if name != "output" else None
        alive = self.alive.setdefault(name, torch.ones(weight.shape[:2], dtype=torch.bool, device=weight.device))
        for head, several in enumerate(rows):
            for number, one in enumerate(several.chunk(alike, dim=-1)):
                place, stop = head * alike + number, start + one.shape[0]
                weight[place, start:] = 0
                weight[place, start:stop] = one[:, : weight.shape[-1]]
                alive[place, stop:] = False
                if bias is not None:
                    bias[place, start:] = 0
                    bias[place, start:stop] = one[:, -1]

    def _sizes(self, name: str) -> Tensor:
        """Of what the columns of `_with_bias` read."""
        sizes = self.moments[name].sizes()
        return torch.cat([sizes, sizes.new_ones(1)]) if name in self.heads.biases else sizes

    def _spread(self, name: str, start: int, constant: bool) -> Tensor:
        """Rows over a root of the covariance of what they read; with their mean as one more column, if it counts."""
        rows, bias = self.heads.weights[name][:, start:], self.heads.biases.get(name)
        spread = self.moments[name].spread(rows)
        if not constant:
            return spread
        mean = self.moments[name].constant(rows, None if bias is None else bias[:, start:])
        return torch.cat([spread, mean[..., None]], dim=-1)

    def _block(
        self,
        sector: Sector,
        name: str,
        start: int,
        pair: tuple[list[Tensor], list[Tensor]],
        sizes: tuple[Tensor, Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Give a pair an identity block in the rows of a map; the pair, as it was where there can be none."""
        inputs = self.heads.weights[name].shape[-1]
        ranks = [rows.shape[0] for rows in pair[0]]
        if min(ranks) == 0 or inputs < 2:
            return pair
        found = identity_block(*pair, sizes, inputs, self.noise)
        sector.noise = max(found.noise)
        if found.columns is None:
            sector.left = f"no inputs make an identity block without rounding growing more than {self.noise:g} times"
            return pair
        sector.block, sector.condition = found.columns.numel(), max(found.condition)
        self.blocks[name] = (start, ranks, found.columns)
        return found.first, found.second

    def value_output(self, keep: int | float | None) -> Sector:
        """Values against outputs."""
        attention, heads = self.attention, self.heads
        kv_heads, width, group = attention.num_kv_heads, attention.value_width, attention.group_size
        sector = Sector(rank=[width] * kv_heads, error=[0.0] * kv_heads)
        output = self._stacked(heads.weights["output"])
        first, second = list(self._with_bias("value")), list(output)
        if keep is not None:
            # Weights of attention sum to 1: the mean of what is dropped goes into the output bias, if there is one.
            absorbed = "output" in heads.biases
            found = truncation(self._spread("value", 0, not absorbed), output)
            masks = _choose(sector, found.spectrum, keep)
            matrices = [(found.first[head, mask], found.second[head, mask]) for head, mask in enumerate(masks)]
            self.absorbed = absorbed
            if absorbed:
                mean = self.moments["value"].constant(heads.weights["value"], heads.biases.get("value"))
                for head, (one, two) in enumerate(matrices):
                    lost = mean[head] @ output[head] - (one @ mean[head]) @ (two @ output[head])
                    heads.biases["output"] = heads.biases["output"] + lost.unflatten(0, (group, -1)).sum(dim=0)
            first = [one @ rows for (one, _), rows in zip(matrices, first)]
            second = [two @ rows for (_, two), rows in zip(matrices, second)]
        sizes = (self._sizes("value"), output.new_ones(output.shape[-1]))
        first, second = self._block(sector, "value", 0, (first, second), sizes)
        if keep is not None or "value" in self.blocks:
            self._put("value", 0, first)
            self._put("output", 0, second, group)
        return sector

    def query_key(self, keep: int | float | None) -> Sector:
        """Queries against keys."""
        attention, group = self.attention, self.attention.group_size
        kv_heads, width, turned = attention.num_kv_heads, attention.head_dim, attention.rotary_dim
        sector = Sector(rank=[width] * kv_heads, error=[0.0] * kv_heads, left=_why_not(attention))
        if attention.qk_norm:
            return sector
        key, query = self._with_bias("key", turned), self._stacked(self._with_bias("query", turned))
        first, second = list(key), list(query)
        if keep is not None:
            found: Truncation | None = None
            spectrum = self._plane_spectrum()
            if turned < width:
                # Without a cap a constant in the keys adds the same to all scores of a query.
                found = truncation(
                    self._spread("key", turned, attention.soft_cap is not None),
                    self._stacked(self._spread("query", turned, True)),
                )
                spectrum = torch.cat([spectrum, found.spectrum], dim=1)
            masks = _choose(sector, spectrum, keep, turned)
            if turned:
                self._drop_planes(masks[:, :turned])
            if found is not None:
                first = [found.first[head, mask] @ key[head] for head, mask in enumerate(masks[:, turned:])]
                second = [found.second[head, mask] @ query[head] for head, mask in enumerate(masks[:, turned:])]
        if turned < width:
            sizes = (self._sizes("key"), self._sizes("query").repeat(group))
            first, second = self._block(sector, "key", turned, (first, second), sizes)
            if keep is not None or "key" in self.blocks:
                self._put("key", turned, first)
                self._put("query", turned, second, group)
        return sector

    def _plane_spectrum(self) -> Tensor:
        """[kv_heads, rotary_dim]: the size of the scores of each plane, twice: for both its coordinates.

        The bias of a plane counts with what it reads: positions turn it.
        """
        attention, key = self.attention, self.heads.weights["key"]
        if attention.rotary is None or not attention.rotary_dim:
            return key.new_zeros(attention.num_kv_heads, 0)
        planes = attention.rotary.planes(key.device)
        rows = (self._stacked(self._spread("query", 0, True)), self._spread("key", 0, True))
        one, two = (values.square().sum(dim=-1)[:, planes].sum(dim=-1) for values in rows)
        return (one * two).sqrt().repeat_interleave(2, dim=1)

    def _drop_planes(self, mask: Tensor) -> None:
        """Leave planes out; ``mask`` bool [kv_heads, rotary_dim], in the order of `_plane_spectrum`."""
        assert self.attention.rotary is not None
        planes = self.attention.rotary.planes(mask.device).flatten()
        for name, number in (("key", 1), ("query", self.attention.group_size)):
            weight, bias = self.heads.weights[name], self.heads.biases.get(name)
            alive = self.alive.setdefault(name, torch.ones(weight.shape[:2], dtype=torch.bool, device=mask.device))
            alive[:, planes] = mask.repeat_interleave(number, dim=0)
            self.heads.weights[name] = weight * alive[..., None]
            if bias is not None:
                self.heads.biases[name] = bias * alive

    # --- what becomes of the tensors ---

    def result(self, sectors: dict[str, Sector]) -> LayerShrink:
        """New tensors, and maps that are replaced."""
        found = LayerShrink(sectors)
        before = after = 0
        for path in dict.fromkeys(part.path for part in self.maps.values()):
            parts = {name: part for name, part in self.maps.items() if part.path == path}
            some = next(iter(parts.values()))
            numbers = self.weights.shape(some.weight).numel()
            before, after = before + numbers, after + numbers
            changed = {name for name in parts if name in self.alive}
            if some.side == "in" and some.bias_name is not None and self.absorbed:
                found.tensors[some.bias_name] = self.heads.biases["output"]
            if not changed:
                continue
            reduced = self._of_inputs(some, found) if some.side == "in" else self._of_rows(parts, found)
            if reduced is None:
                continue
            found.reduced[path] = reduced
            after -= numbers
            after += sum(tensor.numel() for name, tensor in reduced.tensors.items() if name.endswith("weight"))
            for name in (some.weight, some.bias_name):
                if name is not None:
                    found.tensors.pop(name, None)
        found.multiplications = (before, after)
        return found

    def _of_inputs(self, part: Projection, found: LayerShrink) -> Reduced | None:
        """The output map, if not every coordinate of values is there; else its new numbers are noted."""
        weight = self.weights[part.weight].to(torch.float64, copy=True)
        part.put_heads(weight, self.heads.weights["output"])
        found.tensors[part.weight] = weight
        alive = self.alive["output"]
        if alive.all():
            return None
        weight = weight.mT if part.transposed else weight
        read = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        read[part._index(weight.device)] = alive.flatten()
        return reduce_inputs(weight, read.nonzero().flatten(), self.heads.biases.get("output"))

    def _of_rows(self, parts: Mapping[str, Projection], found: LayerShrink) -> Reduced | None:
        """A map of queries, keys or values, or of several of them; None, and its new numbers, where none is saved."""
        some = next(iter(parts.values()))
        weight = self.weights[some.weight].to(torch.float64, copy=True)
        bias = None if some.bias_name is None else self.weights[some.bias_name].to(torch.float64, copy=True)
        device = weight.device
        for name, part in parts.items():
            part.put_heads(weight, self.heads.weights[name])
            if bias is not None:
                part.put_head_biases(bias, self.heads.biases[name])
        found.tensors[some.weight] = weight
        if some.bias_name is not None and bias is not None:
            found.tensors[some.bias_name] = bias
        weight = weight.mT if some.transposed else weight
        dense = torch.ones(weight.shape[0], dtype=torch.bool, device=device)
        claims = []
        for name, part in parts.items():
            if name in self.alive:
                dense[part._index(device)] = self.alive[name].flatten()
            if name in self.blocks:
                start, ranks, columns = self.blocks[name]
                # Heads of one rank stay together; else rows beyond the block follow behind those of all heads.
                width = ranks[0] if min(ranks) == max(ranks) else columns.numel()
                starts = torch.tensor(part.starts, device=device) + start
                places = (starts[:, None] + torch.arange(width, device=device)).flatten()
                more = [starts[head] + torch.arange(width, rank, device=device) for head, rank in enumerate(ranks)]
                places = torch.cat([places, *more])
                dense[places] = False
                rows_bias = None if bias is None else bias[places]
                claims.append(Rows(places, weight[places], rows_bias, columns, len(ranks), width))
        places = dense.nonzero().flatten()
        claims.append(Rows(places, weight[places], None if bias is None else bias[places]))
        return reduce_rows(weight.shape[0], weight.shape[1], claims)


def _choose(sector: Sector, spectrum: Tensor, keep: int | float, turned: int = 0) -> Tensor:
    """Which coordinates are kept, bool [kv_heads, width]; the sector is told.

    Args:
        turned: how many of the first coordinates are those of planes, two by two, which stay or go together.
    """
    masks = torch.stack([kept(values, keep, turned) for values in spectrum])
    total = torch.linalg.vector_norm(spectrum, dim=1)
    dropped = torch.linalg.vector_norm(torch.where(masks, 0.0, spectrum), dim=1)
    sector.rank = masks.sum(dim=1).tolist()
    sector.error = (dropped / total.where(total > 0, torch.ones_like(total))).tolist()
    sector.spectrum = spectrum.sort(dim=1, descending=True).values.tolist()
    return masks


def shrink_layer(
    layout: ModelLayout,
    number: int,
    weights: ReadWeights,
    *,
    keep: Keep = None,
    moments: Mapping[str, Moments] | None = None,
    noise: float = 2.0,
) -> LayerShrink:
    """Shrink the attention of one layer; nothing is written.

    Args:
        layout: of the model.
        number: of the layer.
        weights: read.
        keep, noise: as of `shrink`.
        moments: path of a map -> moments of what it reads; of others, what norms say of it.
    """
    layer, fold = layout.layers[number], plan(layout).layers[number].attention
    work = _Layer(layer, weights, Reading.of(weights, fold), moments or {}, noise)
    sectors = {}
    for name, treat in zip(SECTORS, (work.value_output, work.query_key)):
        sectors[name] = treat(keep.get(name) if isinstance(keep, Mapping) else keep)
    return work.result(sectors)


# --- models in memory -------------------------------------------------------------------------------------------------


def measured_moments(model: nn.Module, layout: ModelLayout, inputs: Inputs | Sequence[Inputs]) -> dict[str, Moments]:
    """The moments of what the maps of queries, keys and values read while a model computes.

    Args:
        model: on which they are measured, in evaluation mode.
        layout: of it.
        inputs: as of `shrink`.

    Returns:
        path of a map -> its moments.
    """
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    same: dict[str, str] = {}
    handles = []

    def watch(paths: list[str]) -> None:
        last: list[tuple[str, Tensor]] = []

        def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                if last and last[0][1] is args[0] and last[0][0] != path:
                    same[path] = last[0][0]
                    return
                last[:] = [(path, args[0])]
                x = args[0].detach().double().flatten(0, -2)
                total, products, number = sums.get(path, (x.new_zeros(()), x.new_zeros(()), 0))
                sums[path] = (total + x.sum(dim=0), products + x.mT @ x, number + x.shape[0])

            return add

        for path in paths:
            handles.append(model.get_submodule(path).register_forward_pre_hook(hook(path)))

    for layer in layout.layers:
        maps = attention_maps(layer.attention)
        watch(list(dict.fromkeys(maps[name].path for name in ("query", "key", "value"))))
    was_training = model.training
    try:
        model.eval()
        with torch.no_grad():
            for batch in [inputs] if isinstance(inputs, Tensor | Mapping) else inputs:
                _ = model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    found = {path: Moments.of_sums(*values) for path, values in sums.items()}
    return found | {path: found[other] for path, other in same.items()}


def shrink(
    model: nn.Module,
    *,
    keep: Keep = None,
    inputs: Inputs | Sequence[Inputs] | None = None,
    noise: float = 2.0,
    check: bool = True,
) -> Shrunk:
    """Take redundant numbers of attention out of a model, in place: it stores and multiplies less.

    Nothing is changed before all is computed. Linear maps are replaced by `ReducedLinear`, which stores fewer numbers,
    and other weights of the same heads get new numbers. Parameters that an optimiser holds are replaced too: make it
    after. Feed-forward layers have nothing to save.

    Args:
        model: a model whose layout is known (a wrapper of compile is seen through).
        keep: None: all of the function. A whole number: so many coordinates of each key/value head. A number between
            0 and 1: as few as hold that share of the energy (of the squares of the singular values). A mapping gives
            it by sector ("value_output", "query_key"). Under rotary positions, planes are dropped as a whole; behind
            norms of queries and keys, nothing is.
        inputs: what directions are weighed by, and what outputs are compared on: token ids [B, T], keyword arguments
            of the model, or several of these. None: inputs of unit size behind the norms, and random tokens.
        noise: how much larger than in the balanced gauge the rounding of a head may become: the identity block has as
            many columns as that allows. Infinity: as many as there are coordinates (a million is never passed).
        check: compare outputs before and after, in float64, float32 and bfloat16.

    Raises:
        TypeError: no layout is known for the model.
        ValueError: a model that is shrunk already or held by a data-parallel wrapper; weights that contradict the
            layout, are missing, quantised, sharded or not finite; ``keep`` that is neither rank nor share; no inputs.
    """
    check_options(keep, noise)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "a data-parallel wrapper holds the parameters it was made with: shrink the model, then wrap it"
        )
    model = unwrap(model)
    if any(isinstance(module, ReducedLinear) for module in model.modules()):
        raise ValueError("this model is shrunk already: shrink the one that it came from, with the options you want")
    layout, weights = model_layout(model), ModuleWeights(model)
    check_weights(layout, weights)
    if inputs is not None and len(inputs) == 0:
        raise ValueError("there are no inputs to measure on: give token ids [B, T], or None")
    given = inputs if isinstance(inputs, Tensor | Mapping) or inputs is None else inputs[0]
    shown = generated_inputs(model, layout, weights[layout.token_embedding].device) if given is None else given
    before = outputs(model, shown, False) if check else None
    moments = None if inputs is None else measured_moments(model, layout, inputs)
    report, sizes = Shrunk(layout.kind), sizes_of(model)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, ReducedLinear] = {}
    for number in range(len(layout.layers)):
        found = shrink_layer(layout, number, weights, keep=keep, moments=moments, noise=noise)
        tell(report, number, found)
        for name, tensor in found.tensors.items():
            tensors[name] = finite(tensor, name).to(weights.dtype(name))
        for path, reduced in found.reduced.items():
            for name, tensor in reduced.tensors.items():
                finite(tensor, f"{path}.{name}")
            weight = weights[f"{path}.weight"]
            modules[path] = reduced.module(weight.dtype, weight.device)
    for name, tensor in tensors.items():
        weights[name] = tensor
    for path, module in modules.items():
        put_module(model, path, module)
    report.numbers, report.bytes = zip(sizes, sizes_of(model))
    conclude(report, layout)
    if before is not None:
        checked = f"{tuple(shown.shape)} token ids" if isinstance(shown, Tensor) else "the inputs given"
        for name, value in compared(before, outputs(model, shown, False), checked).items():
            setattr(report, name, value)
    return report


def check_options(keep: Keep, noise: float) -> None:
    """Check ``keep`` and ``noise`` of `shrink`.

    Raises:
        ValueError: keep is neither rank nor share, or noise is below 1.
    """
    check_keep(keep, SECTORS)
    if isinstance(noise, bool) or not noise >= 1:
        raise ValueError(f"noise is a factor of at least 1 by which rounding may grow, received {noise}")


def put_module(model: nn.Module, path: str, module: ReducedLinear) -> None:
    """Replace a linear map of a model, in its mode, trained or not as it was."""
    parent, _, name = path.rpartition(".")
    old = model.get_submodule(path)
    module.train(old.training)
    for parameter in module.parameters():
        parameter.requires_grad_(any(other.requires_grad for other in old.parameters()))
    setattr(model.get_submodule(parent), name, module)


def reduce_maps(model: nn.Module, maps: Mapping[str, Any]) -> None:
    """Put empty reduced maps into a model, in place: it then takes the state dict of a shrunk one.

    Args:
        model: of the architecture that was shrunk.
        maps: path of a map -> its sizes, as of `erlangen.gauge.Shrunk`. Paths may begin with the name of the base model
            or not, whichever of the two this model is.

    Raises:
        ValueError: the model has no such map.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = dict(model.named_modules())
    for path, sizes in maps.items():
        found = next((name for name in (path, path.removeprefix(prefix), prefix + path) if name in modules), None)
        if found is None:
            raise ValueError(f"a {type(model).__name__} has no linear map {path} to be replaced by a shrunk one")
        weight = modules[found].get_parameter("weight")
        put_module(model, found, ReducedLinear.of_plan(sizes, device=weight.device, dtype=weight.dtype))


def finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor, which must hold finite numbers."""
    if tensor.is_floating_point() and tensor.numel() and not tensor.sum().isfinite():
        raise ValueError(f"{name} would hold numbers that are not finite: the weights of its layer have such")
    return tensor


def sizes_of(model: nn.Module) -> tuple[int, int]:
    """Weights of a model, and bytes of them and of the indices of shrunk maps."""
    numbers = sum(parameter.numel() for parameter in model.parameters())
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, ReducedLinear):
            total += sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    return numbers, total


def tell(report: Shrunk, number: int, found: LayerShrink) -> None:
    """Add a layer to a report."""
    report.layers[number] = found.sectors
    report.maps |= {path: reduced.plan for path, reduced in found.reduced.items()}
    before, after = report.multiplications
    report.multiplications = (before + found.multiplications[0], after + found.multiplications[1])


def conclude(report: Shrunk, layout: ModelLayout) -> None:
    """Say in sentences what was done, and what was left."""
    words = {"value_output": "Values and outputs", "query_key": "Queries and keys"}
    for name in SECTORS:
        sectors = [found[name] for found in report.layers.values()]
        blocks = [sector.block for sector in sectors if sector.block]
        if blocks:
            worst = max(sector.noise or 0.0 for sector in sectors if sector.block)
            span = f"{min(blocks)}" if min(blocks) == max(blocks) else f"{min(blocks)} to {max(blocks)}"
            report.notes.append(
                f"{words[name]}: an identity block of {span} columns in {len(blocks)} of {len(sectors)} layers; "
                f"rounding grows {worst:.2g} times at most over the balanced gauge."
            )
        for reason in dict.fromkeys(sector.left for sector in sectors if sector.left):
            where = [number for number, found in report.layers.items() if found[name].left == reason]
            some = "every layer" if len(where) == len(sectors) else f"{len(where)} layers, from {where[0]} on"
            verb = "some coordinates have no identity block" if blocks else "there is no identity block"
            report.notes.append(f"{words[name]}, {some}: {verb}: {reason}.")
        dropped = [sector for sector in sectors if sector.spectrum]
        if dropped:
            whole = sum(len(head) for sector in dropped for head in sector.spectrum)
            kept_ranks = sum(sum(sector.rank) for sector in dropped)
            worst = max(max(sector.error) for sector in dropped)
            report.notes.append(
                f"{words[name]}: {kept_ranks:,} of {whole:,} coordinates kept; of a product, {100 * worst:.3g} % of "
                "the size is dropped at most."
            )
    if any(layer.mlp is None for layer in layout.layers):
        report.notes.append("Mixtures of experts are left as they are.")
