"""Are two models the same function, and if not, how far apart are they? Measured where a move of gauge shows nothing.

Numbers of two checkpoints may differ in every place while the function is the same: heads may be turned and stretched,
neurons rescaled, both put in another order, gains moved into maps, the residual stream turned. `compare` measures
distances of what is invariant under all of that (`erlangen.gauge._effective`): products of the two factors of a head,
of norms with what reads them, of embeddings in a common frame. What is discrete is matched: key/value heads, query
heads within their group, neurons.

A distance is ‖x − y‖ / √(‖x‖² + ‖y‖²): 0 for equal, 1 for unrelated. A similarity is 1 less its square.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ._assignment import EXACT, grouped_assignment, matching
from ._effective import CHUNK, Effective, Heads, Neurons, Pair, Rows, product_distances, product_inner, product_sizes
from ._weights import ModuleWeights
from .layout import HeadLayout, Layer, ModelLayout, Norm, Projection, model_layout

LIMIT = 4.0  # a difference of so many times the rounding of the stored numbers is one
ALIKE = 0.9  # cosine from which neurons at corresponding places are taken for each other
NEAR = 0.5  # distance of embeddings up to which two models have one frame
_ROUNDING = 16 * torch.finfo(torch.float64).eps  # of the comparison itself
_BUFFERS = re.compile(r"(^|\.)(attn\.(masked_)?bias|attention\.(masked_)?bias|inv_freq|position_ids)$")
_COPIES = re.compile(r"(^|\.)(lm_head|embed_out|predictions\.decoder|head)\.weight$")
# Keys of a config that change what the same weights compute.
_MEANING = re.compile(
    r"rope|rotary|scal|_act|activation|eps|softcap|sliding|window|layer_types|multiplier|position_embedding|causal"
    r"|num_experts_per_tok|norm_topk|topk|is_decoder|attn_reorder|residual"
)
_NO_MEANING = re.compile(r"initializer|_dropout|router_aux|upcast|max_window_layers")

Progress = Callable[[int, int], None]


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One part of the model, compared.

    Attributes:
        distance: 0 for equal, 1 for unrelated.
        excess: the difference over what rounding of the stored numbers would make of equal ones, at the worst place.
        parameters: how many of the first model it has.
    """

    distance: float
    excess: float
    parameters: int

    @property
    def similarity(self) -> float:
        """From 0 to 1."""
        return max(0.0, 1.0 - self.distance**2)


@dataclass(frozen=True, eq=False)
class LayerComparison:
    """One layer, compared. H query heads, G key/value heads, K and V widths of a query and a value.

    Attributes:
        query_key, value_output: over all heads, each with the one it was matched with.
        mlp: of the feed-forward layer; None where it is not described.
        rest: what no head or neuron has: constants, gains that no map takes in, latents. None if there is nothing.
        heads: [H]: the head of the second model that each head of the first was matched with.
        query_key_distances, value_output_distances: [H], of the matched heads.
        head_similarity: [H, H], of every head of the first with every one of the second.
        num_neurons_moved: hidden neurons that were matched with one at another place.
        spectra: "query_key" [2, G, K] and "value_output" [2, G, V]: singular values of both models, in the order of the
            first one's heads.
        naive: distance of the stored numbers; None where the two have no tensor of one name and shape.
    """

    query_key: Part
    value_output: Part
    mlp: Part | None
    rest: Part | None
    heads: tuple[int, ...]
    query_key_distances: Tensor
    value_output_distances: Tensor
    head_similarity: Tensor
    num_neurons_moved: int
    spectra: dict[str, Tensor]
    naive: float | None

    @property
    def parts(self) -> dict[str, Part]:
        """Those that there are, by name."""
        parts = {"query_key": self.query_key, "value_output": self.value_output, "mlp": self.mlp, "rest": self.rest}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def distance(self) -> float:
        """Over all parts."""
        return _together(self.parts.values())

    @property
    def similarity(self) -> float:
        """From 0 to 1."""
        return max(0.0, 1.0 - self.distance**2)

    @property
    def num_heads_moved(self) -> int:
        """Heads that were matched with one at another place."""
        return sum(head != other for head, other in enumerate(self.heads))


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two models, compared.

    Attributes:
        distance: over all parts, each as its number of parameters: 0 for one function up to gauge, 1 for unrelated.
        same_function: whether every difference is one that the rounding of the stored numbers explains.
        layers: in order of depth.
        embeddings: parts by name: "embedding", other tables, "unembedding", "output".
        naive: distance of the stored numbers of each tensor that both have, by name.
        naive_distance: over all of them; None if there is none.
        frame: of the residual streams: "same"; "turned", or "permuted" if the second model had to be first.
        frame_matrix: [dim, dim] float64: rows of the second model times it are rows of the first; None if the same.
        notes: what else one should know, in sentences.
        output_difference: largest absolute difference of the outputs on given inputs; None without inputs.
        output_scale: root mean square of the first model's outputs on them.
    """

    distance: float
    same_function: bool
    layers: tuple[LayerComparison, ...]
    embeddings: dict[str, Part]
    naive: dict[str, float]
    naive_distance: float | None
    frame: str
    frame_matrix: Tensor | None
    notes: tuple[str, ...]
    output_difference: float | None = None
    output_scale: float | None = None

    @property
    def similarity(self) -> float:
        """From 0 to 1; 1 for one function up to gauge."""
        return max(0.0, 1.0 - self.distance**2)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.same_function:
            return "The two models are the same function, up to rounding."
        if self.distance < NEAR:
            return f"The two models are related, and not the same function: {100 * self.distance:.3g} % apart."
        return f"The two models are not related by any gauge move known here: {100 * self.distance:.3g} % apart."

    def to_json(self) -> dict[str, Any]:
        """All of it but the frame's matrix, in the types that JSON has."""

        def part(value: Part | None) -> dict[str, Any] | None:
            return None if value is None else {"similarity": value.similarity, **vars(value)}

        layers = []
        for layer in self.layers:
            numbers: dict[str, Any] = {"distance": layer.distance, "similarity": layer.similarity, "naive": layer.naive}
            numbers |= {name: part(value) for name, value in layer.parts.items()}
            numbers |= {"heads": list(layer.heads), "num_neurons_moved": layer.num_neurons_moved}
            numbers |= {"query_key_distances": layer.query_key_distances.tolist()}
            numbers |= {"value_output_distances": layer.value_output_distances.tolist()}
            numbers |= {"head_similarity": layer.head_similarity.tolist()}
            numbers |= {"spectra": {name: values.tolist() for name, values in layer.spectra.items()}}
            layers.append(numbers)
        result: dict[str, Any] = {"distance": self.distance, "similarity": self.similarity}
        result |= {"same_function": self.same_function, "verdict": self.verdict, "frame": self.frame}
        result |= {"naive_distance": self.naive_distance, "output_difference": self.output_difference}
        result |= {"output_scale": self.output_scale, "notes": list(self.notes), "layers": layers}
        result |= {"embeddings": {name: part(value) for name, value in self.embeddings.items()}, "naive": self.naive}
        # A move that stores infinities has no place in JSON.
        return json.loads(json.dumps(result), parse_constant=lambda _: None)

    def __str__(self) -> str:
        header = ("", "query-key", "value-output", "mlp", "rest", "stored", "moved")
        rows: list[tuple[str, ...]] = [header]
        for number, layer in enumerate(self.layers):
            cells = [layer.parts[name].distance if name in layer.parts else None for name in _LAYER_PARTS]
            moved = [f"{layer.num_heads_moved} heads"] if layer.num_heads_moved else []
            moved += [f"{layer.num_neurons_moved} neurons"] if layer.num_neurons_moved else []
            rows.append((f"layer {number}", *map(_short, (*cells, layer.naive)), ", ".join(moved)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = [
            "  ".join(text.ljust(width) if place in (0, 6) else text.rjust(width) for place, (text, width) in
                      enumerate(zip(row, widths))).rstrip()
            for row in rows
        ]  # fmt: skip
        lines += [f"{name}: {_short(part.distance)}" for name, part in self.embeddings.items()]
        naive = "" if self.naive_distance is None else f"; of the stored numbers: {_short(self.naive_distance)}"
        lines.append(f"distance: {_short(self.distance)} (similarity {self.similarity:.6g}){naive}")
        if self.output_difference is not None:
            lines.append(f"outputs differ by at most {self.output_difference:.3g}, of {self.output_scale:.3g}")
        return "\n".join([*lines, self.verdict, *self.notes])


_LAYER_PARTS = ("query_key", "value_output", "mlp", "rest")


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _together(parts: Iterable[Part]) -> float:
    parts = list(parts)
    total = sum(part.parameters for part in parts)
    return (sum(part.distance**2 * part.parameters for part in parts) / total) ** 0.5 if total else 0.0


# --- what is compared -------------------------------------------------------------------------------------------------


class _Tensors(Protocol):
    def __contains__(self, name: str) -> bool: ...
    def __getitem__(self, name: str) -> Tensor: ...
    def shape(self, name: str) -> torch.Size: ...
    def dtype(self, name: str) -> torch.dtype: ...


class _Recorder:
    """Weights that know what was read of them."""

    def __init__(self, weights: _Tensors) -> None:
        self.weights = weights
        self.read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return self.weights[name]


@dataclass
class _Model:
    """A model as it is compared."""

    name: str
    layout: ModelLayout
    weights: _Tensors
    names: list[str]
    config: Mapping[str, Any]
    module: nn.Module | None
    folder: Path | None
    unit: float = field(init=False)  # relative error of a stored number, with that of the comparison

    def __post_init__(self) -> None:
        dtypes = {self.weights.dtype(name) for name in self.names}
        eps = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)
        self.unit = (eps**2 / 4 + _ROUNDING**2) ** 0.5


def _open(model: Any, name: str) -> _Model:
    if isinstance(model, (str, Path)):
        checkpoint = import_module("erlangen.interop.checkpoints").Checkpoint(model)
        names = list(checkpoint.names())
        return _Model(str(model), checkpoint.layout, checkpoint, names, checkpoint.config, None, Path(model))
    if not isinstance(model, nn.Module):
        raise TypeError(f"compare takes models and folders of checkpoints, received a {type(model).__name__}")
    weights = ModuleWeights(model)
    module = weights.module
    config = getattr(module, "config", None)
    if is_dataclass(config) and not isinstance(config, type):
        values = asdict(config)
    else:
        to_dict = getattr(config, "to_dict", None)
        values = to_dict() if callable(to_dict) else {}
    return _Model(name, model_layout(module), weights, list(weights), values, module, None)


def _kind(norm: Norm | None) -> str | None:
    return None if norm is None else norm.kind


def _attention_shape(attention: HeadLayout) -> dict[str, Any]:
    return {
        "query heads": attention.num_heads,
        "key/value heads": attention.num_kv_heads,
        "width of a query": attention.head_dim,
        "width of a value": attention.value_width,
        "coordinates that positions turn": attention.rotary_dim,
        "QK-norm": attention.qk_norm_over if attention.qk_norm else None,
        "soft cap": attention.soft_cap,
        "latent attention": attention.latent is not None,
    }


def _layer_shape(layer: Layer) -> dict[str, Any]:
    mlp = layer.mlp
    names = ("attention_norm", "mlp_norm", "attention_out_norm", "mlp_out_norm", "attention_sum_norm", "mlp_sum_norm")
    shape = _attention_shape(layer.attention)
    shape["feed-forward layer"] = None if mlp is None else (mlp.up.width, mlp.activation, mlp.gate is not None)
    shape["norms"] = tuple(_kind(getattr(layer, name)) for name in names)
    shape["parallel branches"] = layer.parallel
    return shape


def _expect_alike(a: _Model, b: _Model) -> None:
    def refuse(what: str, first: Any, second: Any) -> None:
        raise ValueError(
            f"only models of one architecture and size can be compared; {a.name} has {what} {first}, "
            f"{b.name} has {second}"
        )

    one, two = a.layout, b.layout
    shapes = [
        {
            "width": layout.dim,
            "number of layers": len(layout.layers),
            "embeddings besides that of tokens:": len(layout.other_embeddings),
            "norm of the embeddings": _kind(layout.embedding_norm),
            "final norm": _kind(layout.final_norm),
            "soft cap of the logits": layout.soft_cap,
        }
        for layout in (one, two)
    ]
    for what in shapes[0]:
        if shapes[0][what] != shapes[1][what]:
            refuse(what, shapes[0][what], shapes[1][what])
    for number, (first, second) in enumerate(zip(one.layers, two.layers)):
        first_shape, second_shape = _layer_shape(first), _layer_shape(second)
        for what in first_shape:
            if first_shape[what] != second_shape[what]:
                refuse(f"in layer {number} as {what}", first_shape[what], second_shape[what])


# --- distances --------------------------------------------------------------------------------------------------------


@dataclass
class _Block:
    """A difference: squares of its size, of the sizes of both sides, and of what rounding makes of equal ones."""

    difference: Tensor
    size: Tensor
    error: Tensor

    def relative(self) -> float:
        size = float(self.size.sum())
        return min(2.0, float(self.difference.sum()) / size) if size else 0.0

    def excess(self) -> float:
        tiny = torch.finfo(torch.float64).tiny
        return float((self.difference / self.error.clamp_min(tiny)).max().sqrt()) if self.difference.any() else 0.0


def _part(blocks: Sequence[_Block], parameters: int) -> Part:
    """Blocks count alike."""
    mean = sum(block.relative() for block in blocks) / len(blocks)
    return Part(mean**0.5, max(block.excess() for block in blocks), parameters)


def _product_block(a: Pair, b: Pair, units: tuple[float, float]) -> _Block:
    error = units[0] ** 2 * a.rounding() + units[1] ** 2 * b.rounding()
    return _Block(product_distances(a, b), product_sizes(a) + product_sizes(b), error)


def _sum_blocks(blocks: Sequence[_Block]) -> _Block:
    """Of parts of one thing: squares add up."""
    return _Block(
        torch.stack([block.difference for block in blocks]).sum(0),
        torch.stack([block.size for block in blocks]).sum(0),
        torch.stack([block.error for block in blocks]).sum(0),
    )


def _row_block(a: Tensor, b: Tensor, sizes: tuple[Tensor, Tensor], units: tuple[float, float]) -> _Block:
    error = (units[0] * sizes[0]).square().sum() + (units[1] * sizes[1]).square().sum()
    return _Block((a - b).square().sum(), a.square().sum() + b.square().sum(), error)


def _cosines(inner: Tensor, sizes: tuple[Tensor, Tensor]) -> Tensor:
    """[n, m]: 2 ⟨x, y⟩ / (‖x‖² + ‖y‖²)."""
    total = sizes[0][:, None] + sizes[1][None, :]
    return 2 * inner / total.clamp_min(torch.finfo(torch.float64).tiny)


def _head_similarity(a: Heads, b: Heads) -> Tensor:
    """[H, H]: the mean of those of scores (and sizes of queries and keys) and of values."""

    def of(first: Sequence[Pair], second: Sequence[Pair]) -> Tensor:
        inner = torch.stack([product_inner(x, y) for x, y in zip(first, second)]).sum(0)
        sizes = [torch.stack([product_sizes(x) for x in side]).sum(0) for side in (first, second)]
        return _cosines(inner, (sizes[0], sizes[1]))

    scores = of(list(a.scores.values()), list(b.scores.values()))
    if a.norms:
        norms = [of([a.norms[name]], [b.norms[name]]) for name in a.norms]
        scores = (scores + torch.stack(norms).mean(0)) / 2
    return (scores + of([a.values], [b.values])) / 2


def _attention_blocks(
    a: Heads, b: Heads, heads: Tensor, units: tuple[float, float]
) -> tuple[list[_Block], list[_Block], list[_Block]]:
    """Of queries and keys, of values and outputs, each by head; and of what the layer has as a whole."""
    scores = [_product_block(pair, b.scores[name].of_heads(heads), units) for name, pair in a.scores.items()]
    query_key = [_sum_blocks(scores)]
    query_key += [_product_block(pair, b.norms[name].of_heads(heads), units) for name, pair in a.norms.items()]
    values = [_product_block(a.values, b.values.of_heads(heads), units)]
    whole = [_product_block(pair, b.layer[name], units) for name, pair in a.layer.items()]
    error = units[0] ** 2 * a.constant_rounding + units[1] ** 2 * b.constant_rounding
    sizes = a.constant.square().sum() + b.constant.square().sum()
    if sizes:
        size = sizes + values[0].size.sum()
        whole.append(_Block((a.constant - b.constant).square().sum(), size, torch.as_tensor(error)))
    return query_key, values, whole


def _by_head(blocks: Sequence[_Block]) -> Tensor:
    """[H] distances: blocks count alike."""
    tiny = torch.finfo(torch.float64).tiny
    return torch.stack([block.difference / block.size.clamp_min(tiny) for block in blocks]).mean(0).sqrt()


# --- neurons ----------------------------------------------------------------------------------------------------------


def _directions(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1, eps=torch.finfo(torch.float64).tiny)


def _neuron_features(neurons: Neurons) -> list[Tensor]:
    rows = [neurons.up, neurons.down, *([] if neurons.gate is None else [neurons.gate])]
    return [_directions(part.values).float() for part in rows]


def _neuron_similarity(cosines: Sequence[Tensor]) -> Tensor:
    """Of a neuron with a gate, up and down may change sign together."""
    up, down = cosines[:2]
    return (cosines[2] + up * down) / 2 if len(cosines) > 2 else (up + down) / 2


def match_neurons(a: Neurons, b: Neurons) -> Tensor:
    """int64 [n]: for each hidden neuron of a layer, the one of another layer that is most like it.

    Neurons at one place, then those at one place in the order of their sizes, are taken for each other if they are
    alike. The others are matched exactly if they are few (`EXACT`), by best pairs in turn if they are not.
    """
    first, second = _neuron_features(a), _neuron_features(b)
    keys = []
    for neurons in (a, b):
        key = neurons.up.values.norm(dim=-1) * neurons.down.values.norm(dim=-1)
        keys.append(key if neurons.gate is None else key * neurons.gate.values.norm(dim=-1))
    size = len(keys[0])
    result = torch.full((size,), -1, dtype=torch.int64)
    taken = torch.zeros(size, dtype=torch.bool)

    def take(rows: Tensor, columns: Tensor) -> None:
        cosines = [(x[rows] * y[columns]).sum(-1) for x, y in zip(first, second)]
        alike = _neuron_similarity(cosines) > ALIKE
        result[rows[alike]] = columns[alike]
        taken[columns[alike]] = True

    def left() -> tuple[Tensor, Tensor]:
        return torch.nonzero(result < 0).flatten(), torch.nonzero(~taken).flatten()

    take(torch.arange(size), torch.arange(size))
    rows, columns = left()
    take(rows[keys[0][rows].argsort()], columns[keys[1][columns].argsort()])
    rows, columns = left()
    if len(rows) > 8 * EXACT:
        # One pass over all pairs, a part at a time: best pairs that choose each other.
        best = torch.empty(len(rows), dtype=torch.int64)
        highest = torch.full((len(columns),), -torch.inf)
        chosen = torch.zeros(len(columns), dtype=torch.int64)
        for start in range(0, len(rows), 1024):
            part = rows[start : start + 1024]
            similarity = _neuron_similarity([x[part] @ y[columns].mT for x, y in zip(first, second)])
            best[start : start + 1024] = similarity.argmax(dim=1)
            peak, place = similarity.max(dim=0)
            chosen = torch.where(peak > highest, place + start, chosen)
            highest = torch.maximum(peak, highest)
        mutual = chosen[best] == torch.arange(len(rows))
        result[rows[mutual]] = columns[best[mutual]]
        taken[columns[best[mutual]]] = True
        rows, columns = left()
        rows, columns = rows[keys[0][rows].argsort()], columns[keys[1][columns].argsort()]
        result[rows] = columns
    elif len(rows):
        similarity = _neuron_similarity([x[rows] @ y[columns].mT for x, y in zip(first, second)])
        result[rows] = columns[matching(similarity)]
    return result


def _neuron_blocks(a: Neurons, b: Neurons, match: Tensor, units: tuple[float, float]) -> tuple[list[_Block], list]:
    """Of the neurons; and of what is written for any token."""

    def moved(rows: Rows) -> Rows:
        return Rows(rows.values[match], rows.sizes[match])

    up, down = moved(b.up), moved(b.down)
    if a.gate is not None and b.gate is not None:
        gate = moved(b.gate)
        product = (Pair(_single(x), _single(y)) for x, y in ((a.up, a.down), (up, down)))
        first, second = product
        blocks = [
            _total(_product_block(first, second, units)),
            _row_block(a.gate.values, gate.values, (a.gate.sizes, gate.sizes), units),
        ]
    else:
        blocks = [_row_block(x.values, y.values, (x.sizes, y.sizes), units) for x, y in ((a.up, up), (a.down, down))]
    if a.slope is not None and b.slope is not None:
        blocks.append(_row_block(a.slope, b.slope[match], (a.slope.abs(), b.slope.abs()), units))
    whole = []
    size = a.constant.square().sum() + b.constant.square().sum()
    if size:
        size = size + sum((side.values.square().sum() for side in (a.down, b.down)), torch.zeros(()).double())
        error = units[0] ** 2 * a.constant_rounding + units[1] ** 2 * b.constant_rounding
        whole.append(_Block((a.constant - b.constant).square().sum(), size, error))
    return blocks, whole


def _single(rows: Rows) -> Rows:
    """Rows as factors of width one."""
    return Rows(rows.values[:, None], rows.sizes[:, None])


def _total(block: _Block) -> _Block:
    return _Block(block.difference.sum(), block.size.sum(), block.error.sum())


# --- tables and frames ------------------------------------------------------------------------------------------------


def _table_block(a: Iterable[Rows], b: Iterable[Rows], units: tuple[float, float]) -> _Block:
    blocks = [_row_block(x.values, y.values, (x.sizes, y.sizes), units) for x, y in zip(a, b)]
    return _sum_blocks(blocks)


def _overlap(a: Iterator[Rows], b: Iterator[Rows], dim: int) -> Tensor:
    """[D, D]: bᵀ a, over the sizes of both."""
    total, sizes = torch.zeros(dim, dim, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for x, y in zip(a, b):
        first, second = x.values[:, :dim], y.values[:, :dim]
        total += second.mT @ first
        sizes += torch.stack([first.square().sum(), second.square().sum()])
    return total / sizes.prod().sqrt().clamp_min(torch.finfo(torch.float64).tiny)


def _find_frame(a: Effective, b: Effective, units: tuple[float, float], notes: list[str]) -> str:
    """Bring the second residual stream into the frame of the first, if it is in another. By the embeddings."""

    def distance() -> float:
        token = a.layout.token_embedding, b.layout.token_embedding
        return _table_block(a.table(token[0]), b.table(token[1]), units).relative() ** 0.5

    before = distance()
    if before <= NEAR or not (a.has_logits and b.has_logits):
        return "same"
    dim = a.layout.dim
    names = zip((a.layout.token_embedding, *a.layout.other_embeddings),
                (b.layout.token_embedding, *b.layout.other_embeddings))  # fmt: skip
    overlap = sum((_overlap(a.table(x), b.table(y), dim) for x, y in names), torch.zeros(dim, dim).double())
    overlap = overlap + _overlap(a.output_table(), b.output_table(), dim)
    if a.turns and b.turns:
        if a.centred:  # the direction of ones stays
            overlap = overlap + torch.full_like(overlap, 1.0 / dim)
        left, values, right = torch.linalg.svd(overlap)
        frame, kind = left @ right, "turned"
        open_directions = int((values < 1e-9 * values[0]).sum())
        if open_directions:
            notes.append(
                f"The embeddings leave {open_directions} directions of the residual stream open: what the frame is "
                "there was not found."
            )
    else:
        signs = all(
            _kind(norm) != "layer"
            for layer in a.layout.layers
            for norm in (layer.attention_norm, layer.mlp_norm, layer.attention_sum_norm, layer.mlp_sum_norm)
        )
        place = matching((overlap.abs() if signs else overlap).mT)
        frame, kind = torch.zeros(dim, dim, dtype=torch.float64), "permuted"
        entries = overlap[place, torch.arange(dim)]
        frame[place, torch.arange(dim)] = torch.where((entries < 0) & torch.tensor(signs), -1.0, 1.0).double()
    b.frame = frame
    if distance() < before / 2:
        return kind
    b.frame = None
    if notes and notes[-1].startswith("The embeddings leave"):
        notes.pop()
    return "same"


# --- the whole --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(a: Any, b: Any, *, inputs: Any = None, progress: Progress | None = None) -> Comparison:
    """Compare two models of one architecture, up to gauge. Nothing is changed.

    Gains and biases of norms count with the maps that read them, key biases only where softmax sees them, value biases
    with the output bias; the epsilon of norms is taken as 0. Heads are matched so that their similarity is largest,
    query heads within their key/value head; so are neurons. If the embeddings are far apart, the second residual stream
    is brought to the frame of the first, by the rotation that suits embeddings and unembeddings best (a permutation,
    with signs, where norms stand in the stream); only models with logits have that freedom. Experts, poolers and other
    tensors that the layout does not speak of are compared as they are stored.

    Models of other vocabularies or context lengths are compared on what both have. Weights are taken layer by layer
    into float64 on the CPU.

    Args:
        a, b: models in memory, or folders of checkpoints in Hugging Face's format.
        inputs: tokens to run both models on, as a check beside: int64 [B, T], or a mapping of what the models take.
            Both must be in memory; they are run as they are, in evaluation mode.
        progress: called with the number of layers done, and of all.

    Raises:
        TypeError: what is given is neither, or its layout is unknown.
        ValueError: models of different shapes; a folder that holds no such checkpoint; numbers that are not finite.
        OSError: a folder cannot be read.
    """
    first, second = _open(a, "the first model"), _open(b, "the second model")
    _expect_alike(first, second)
    if inputs is not None and (first.module is None or second.module is None):
        raise ValueError("inputs need models in memory: load the folders first, or leave the inputs out")
    notes: list[str] = []
    units = (first.unit, second.unit)
    rows = _common_rows(first, second, notes)
    recorders = [_Recorder(model.weights) for model in (first, second)]
    one, two = (Effective(m.layout, recorder, rows) for m, recorder in zip((first, second), recorders))
    frame = _find_frame(one, two, units, notes)
    naive = _naive(first, second)
    layers = []
    for number in range(len(first.layout.layers)):
        if progress is not None:
            progress(number, len(first.layout.layers))
        layers.append(_compare_layer(number, one, two, units, recorders[0], naive))
    embeddings = _compare_ends(one, two, units)
    others = _compare_others(first, second, recorders, naive, notes)
    embeddings |= {"others": others} if others is not None else {}
    if progress is not None:
        progress(len(layers), len(layers))
    parts = [part for layer in layers for part in layer.parts.values()] + list(embeddings.values())
    same = all(part.excess <= LIMIT for part in parts)
    unlike = _unlike_settings(first, second)
    if one.has_logits != two.has_logits:
        unlike.append("one has logits, the other has hidden states as its output")
    if unlike:
        notes.append(f"What the same weights would compute differs: {'; '.join(unlike)}.")
    ratio = one.scale / two.scale
    if same and not 0.99 < ratio < 1.01 and one.pre_norm:
        notes.append(
            f"The residual stream of the second model is {1 / ratio:.4g} times that of the first: the same function as "
            "far as the epsilon of norms may be neglected."
        )
    difference = scale = None
    if inputs is not None and first.module is not None and second.module is not None:
        x, y = (_outputs(module, inputs) for module in (first.module, second.module))
        if x.shape != y.shape:
            raise ValueError(f"the models give outputs of shapes {list(x.shape)} and {list(y.shape)} for these inputs")
        difference, scale = float((x - y).abs().max()), float(x.square().mean().sqrt())
    total = [sum(values) for values in zip(*naive.values())]
    return Comparison(
        distance=_together(parts),
        same_function=same and not unlike and not any(note.startswith(_ONLY) for note in notes),
        layers=tuple(layers),
        embeddings=embeddings,
        naive={name: (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0 for name, squares in naive.items()},
        naive_distance=(total[0] / total[1]) ** 0.5 if total and total[1] else None,
        frame=frame,
        frame_matrix=two.frame,
        notes=tuple(notes),
        output_difference=difference,
        output_scale=scale,
    )


_ONLY = "Only "


def _common_rows(a: _Model, b: _Model, notes: list[str]) -> list[int]:
    """Rows of the embeddings that both have."""
    result = []
    tables = [
        [("tokens", m.layout.vocab_size), *(("positions or types", n) for n in m.layout.other_embeddings.values())]
        for m in (a, b)
    ]
    for (what, first), (_, second) in zip(*tables):
        if first != second:
            notes.append(f"{_ONLY}the first {min(first, second):,} {what} were compared, of {first:,} and {second:,}.")
        result.append(min(first, second))
    return result


def _num_weights(layer: Layer, dim: int) -> tuple[int, int, int, int]:
    """Numbers in the maps of queries and keys, of values and outputs, of the feed-forward layer, and of latents."""
    attention, latent, mlp = layer.attention, layer.attention.latent, layer.mlp

    def of(projection: Projection, other: int) -> int:
        return len(projection.starts) * projection.width * other

    query_reads = kv_reads = dim
    latents = 0
    query_key = 0
    if latent is not None:
        kv_reads = latent.kv_latent.width
        query_reads = dim if latent.query_latent is None else latent.query_latent.width
        latents = of(latent.kv_latent, dim) + (0 if latent.query_latent is None else of(latent.query_latent, dim))
        query_key = of(latent.rotary_query, query_reads) + of(latent.rotary_key, dim)
    query_key += of(attention.query, query_reads) + of(attention.key, kv_reads)
    value_output = of(attention.value, kv_reads) + of(attention.output, dim)
    maps = () if mlp is None else (mlp.up, mlp.down, mlp.gate)
    return query_key, value_output, sum(of(part, dim) for part in maps if part is not None), latents


def _compare_layer(
    number: int,
    one: Effective,
    two: Effective,
    units: tuple[float, float],
    recorder: _Recorder,
    naive: Mapping[str, tuple[float, float]],
) -> LayerComparison:
    layer, dim = one.layout.layers[number], one.layout.dim
    attention = layer.attention
    before, recorder.read = recorder.read, set()
    a, b = one.heads(number), two.heads(number)
    similarity = _head_similarity(a, b)
    heads = grouped_assignment(similarity, attention.group_size)
    query_key, value_output, whole = _attention_blocks(a, b, heads, units)
    num_query_key, num_value_output, num_mlp, num_rest = _num_weights(layer, dim)
    mlp, moved = None, 0
    neurons, others = one.neurons(number), two.neurons(number)
    if neurons is not None and others is not None:
        match = match_neurons(neurons, others)
        moved = int((match != torch.arange(len(match))).sum())
        blocks, constant = _neuron_blocks(neurons, others, match, units)
        mlp = _part(blocks, num_mlp)
        whole += constant
    for branch in (0, 1):
        whole += _gain_blocks(one.gains(number, branch), two.gains(number, branch), units)
    groups = heads.view(attention.num_kv_heads, -1)[:, 0] // attention.group_size
    spectra = {
        name: torch.stack([x, y[groups]])
        for name, x, y in zip(("query_key", "value_output"), a.spectra, b.spectra)
    }  # fmt: skip
    squares = [naive[name] for name in recorder.read if name in naive]
    difference, size = (sum(values) for values in zip(*squares)) if squares else (0.0, 0.0)
    recorder.read |= before
    return LayerComparison(
        query_key=_part(query_key, num_query_key),
        value_output=_part(value_output, num_value_output),
        mlp=mlp,
        rest=_part(whole, num_rest + dim * (len(whole) - len(a.layer))) if whole else None,
        heads=tuple(heads.tolist()),
        query_key_distances=_by_head(query_key),
        value_output_distances=_by_head(value_output),
        head_similarity=similarity,
        num_neurons_moved=moved,
        spectra=spectra,
        naive=(difference / size) ** 0.5 if size else None,
    )


def _gain_blocks(a: Tensor | None, b: Tensor | None, units: tuple[float, float]) -> list[_Block]:
    if a is None or b is None:
        return []
    return [_row_block(x, y, (x.norm(), y.norm()), units) for x, y in zip(a, b)]


def _compare_ends(a: Effective, b: Effective, units: tuple[float, float]) -> dict[str, Part]:
    """Embeddings and unembeddings."""
    dim = a.layout.dim
    tables = (
        (a.layout.token_embedding, *a.layout.other_embeddings),
        (b.layout.token_embedding, *b.layout.other_embeddings),
    )
    parts = {}
    for number, (first, second) in enumerate(zip(*tables)):
        block = _table_block(a.table(first), b.table(second), units)
        parts[first if number else "embedding"] = _part([block], a.num_rows[first] * dim)
    rest: list[_Block] = []
    offsets = a.table_offset(), b.table_offset()
    if offsets[0] is not None and offsets[1] is not None:
        # One token and one position have this in common: it counts by their size.
        block = _table_block([offsets[0]], [offsets[1]], units)
        rest.append(_Block(block.difference, block.size + 2 * dim, block.error))
    rest += _gain_blocks(a.embedding_gains(), b.embedding_gains(), units)
    rest += _gain_blocks(a.output_gains(), b.output_gains(), units)
    if rest:
        parts["offsets and gains"] = _part(rest, dim * len(rest))
    if a.has_logits and b.has_logits:
        block = _table_block(a.output_table(), b.output_table(), units)
        parts["unembedding"] = _part([block], a.vocabulary * dim)
    return parts


# --- the numbers as they are stored -----------------------------------------------------------------------------------


def _differences(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Square of the difference, and sum of squares, a part at a time."""
    difference = size = 0.0
    for x, y in zip(_flat(a).split(CHUNK), _flat(b).split(CHUNK)):
        x, y = (part.detach().to("cpu", torch.float64) for part in (x, y))
        difference += float((x - y).square().sum())
        size += float(x.square().sum() + y.square().sum())
    return difference, size


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)


def _naive(a: _Model, b: _Model) -> dict[str, tuple[float, float]]:
    """Square of the difference and sum of squares, of each tensor of one name and shape."""
    return {
        name: _differences(a.weights[name], b.weights[name])
        for name in a.names
        if name in b.weights
        and a.weights.shape(name) == b.weights.shape(name)
        and a.weights.dtype(name).is_floating_point
        and not _BUFFERS.search(name)
    }


def _compare_others(
    a: _Model, b: _Model, recorders: Sequence[_Recorder], naive: Mapping[str, tuple[float, float]], notes: list[str]
) -> Part | None:
    """Tensors that no treatment of the layout has read, as they are stored."""
    left = [
        {
            name
            for name in set(model.names) - recorder.read
            if not _BUFFERS.search(name)
            and not (_COPIES.search(name) and model.layout.tied)
            and model.weights.dtype(name).is_floating_point
        }
        for model, recorder in zip((a, b), recorders)
    ]
    names = sorted(left[0] & left[1] & naive.keys())
    alone = sorted((left[0] ^ left[1]) | ((left[0] & left[1]) - naive.keys()))
    if alone:
        notes.append(
            f"{_ONLY}one model has, or in that shape: {', '.join(alone[:3])}{' ...' if len(alone) > 3 else ''}."
        )
    if not names:
        return None
    notes.append(f"Compared as they are stored: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}.")
    blocks = [
        _Block(*(torch.tensor(value) for value in (*naive[name], (a.unit**2 + b.unit**2) * naive[name][1])))
        for name in names
    ]
    part = _part([_sum_blocks(blocks)], sum(a.weights.shape(name).numel() for name in names))
    return Part(part.distance, max(block.excess() for block in blocks), part.parameters)


def _unlike_settings(a: _Model, b: _Model) -> list[str]:
    """Settings of two configs of Hugging Face, or of our own, that change what weights compute."""
    result = []
    if a.config and b.config:
        for key in sorted(a.config.keys() & b.config.keys()):
            if _MEANING.search(key) and not _NO_MEANING.search(key) and a.config[key] != b.config[key]:
                result.append(f"{key} is {a.config[key]} and {b.config[key]}")
    return result


def _outputs(module: nn.Module, inputs: Any) -> Tensor:
    """Logits, or else hidden states, in float64 on the CPU."""
    was_training = module.training
    module.eval()
    try:
        result = module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
    finally:
        module.train(was_training)
    for name in ("logits", "last_hidden_state"):
        result = getattr(result, name, result)
    result = result[0] if isinstance(result, tuple) else result
    return result.detach().to("cpu", torch.float64)
