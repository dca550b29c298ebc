"""Are two models the same function, and if not, how far apart are they? Measured where a move of gauge shows nothing.

Numbers of two checkpoints may differ in every place while the function is the same: heads may be turned and stretched,
neurons rescaled, both put in another order, gains moved into maps, the residual stream turned. `compare` measures
distances of what is invariant under all of that (`erlangen.gauge._effective`): products of the two factors of a head,
of norms with what reads them, of embeddings in a common frame. What is discrete is matched: key/value heads, query
heads within their group, neurons.

A distance is ‖x − y‖ / √(‖x‖² + ‖y‖²): 0 for equal, 1 for unrelated. A similarity is 1 less its square.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._assignment import grouped_assignment
from ._distances import (
    Block,
    attention_blocks,
    by_head,
    neuron_blocks,
    part_of,
    row_block,
    stack_blocks,
    sum_blocks,
    table_block,
)
from ._effective import CHUNK, Effective
from ._matching import find_frame, head_similarity, match_neurons
from ._models import Model, Tensors, expect_alike, open_model
from .comparison import Comparison, LayerComparison, Part, together
from .layout import MLP, Layer, Projection

LIMIT = 4.0  # a difference of so many times the rounding of the stored numbers is one
_BUFFERS = re.compile(r"(^|\.)(attn\.(masked_)?bias|attention\.(masked_)?bias|inv_freq|position_ids)$")
_COPIES = re.compile(r"(^|\.)(lm_head|embed_out|predictions\.decoder|head)\.weight$")
# Keys of a config that change what the same weights compute.
_MEANING = re.compile(
    r"rope|rotary|scal|_act|activation|eps|softcap|sliding|window|layer_types|multiplier|position_embedding|causal"
    r"|num_experts_per_tok|norm_topk|topk|is_decoder|attn_reorder|residual"
)
_NO_MEANING = re.compile(r"initializer|_dropout|router_aux|upcast|max_window_layers|^max_position_embeddings$")

Progress = Callable[[int, int], None]


class _Recorder:
    """Weights that know what was read of them."""

    def __init__(self, weights: Tensors) -> None:
        self.weights = weights
        self.read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return self.weights[name]


@torch.no_grad()
def compare(a: Any, b: Any, *, inputs: Any = None, progress: Progress | None = None) -> Comparison:
    """Compare two models of one architecture, up to gauge. Nothing is changed.

    Gains and biases of norms count with the maps that read them, key biases only where softmax sees them, value biases
    with the output bias; the epsilon of norms is taken as 0. Heads are matched so that their similarity is largest,
    query heads within their key/value head; so are neurons. If the embeddings are far apart, the second residual stream
    is brought to the frame of the first, by the rotation that suits embeddings and unembeddings best (a permutation,
    with signs, where norms stand in the stream); only models with logits have that freedom. Experts are matched by
    their scores, within what groups of them allow, and compared as feed-forward layers. Poolers and other tensors that
    the layout does not speak of are compared as they are stored.

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
    first, second = open_model(a, "the first model"), open_model(b, "the second model")
    expect_alike(first, second)
    if inputs is not None and (first.module is None or second.module is None):
        raise ValueError("inputs need models in memory: load the folders first, or leave the inputs out")
    notes: list[str] = []
    units = (first.unit, second.unit)
    rows = _common_rows(first, second, notes)
    recorders = [_Recorder(model.weights) for model in (first, second)]
    one, two = (Effective(m.layout, recorder, rows) for m, recorder in zip((first, second), recorders))
    frame = find_frame(one, two, units, notes)
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
        distance=together(parts),
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


def _common_rows(a: Model, b: Model, notes: list[str]) -> list[int]:
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
    attention, latent = layer.attention, layer.attention.latent

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
    maps = [*layer.feed_forward_readers, *(mlp.down for mlp in layer.feed_forward)]
    return query_key, value_output, sum(of(part, dim) for part in maps), latents


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
    similarity = head_similarity(a, b)
    heads = grouped_assignment(similarity, attention.group_size)
    query_key, value_output, whole = attention_blocks(a, b, heads, units)
    num_query_key, num_value_output, num_mlp, num_rest = _num_weights(layer, dim)
    experts = _match_experts(number, one, two)
    pairs = _feed_forward_pairs(layer, two.layout.layers[number], experts)
    blocks, constant, moved = [], [], 0
    for first, second in pairs:
        neurons, others = one.neurons(number, first), two.neurons(number, second)
        match = match_neurons(neurons, others)
        moved += int((match != torch.arange(len(match))).sum())
        found, constants = neuron_blocks(neurons, others, match, units)
        blocks.append(found)
        constant += constants
    mlp_blocks = [stack_blocks(same) for same in zip(*blocks)]
    if experts is not None:
        mlp_blocks.append(_score_block(number, one, two, experts, units))
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
        query_key=part_of(query_key, num_query_key),
        value_output=part_of(value_output, num_value_output),
        mlp=part_of(mlp_blocks, num_mlp),
        rest=part_of(whole, num_rest + dim * (len(whole) - len(a.layer))) if whole else None,
        heads=tuple(heads.tolist()),
        experts=None if experts is None else tuple(experts.tolist()),
        query_key_distances=by_head(query_key),
        value_output_distances=by_head(value_output),
        head_similarity=similarity,
        num_neurons_moved=moved,
        spectra=spectra,
        naive=(difference / size) ** 0.5 if size else None,
    )


def _match_experts(number: int, one: Effective, two: Effective) -> Tensor | None:
    """int64 [experts]: for each expert of a mixture, that of the other whose scores are most like it."""
    first, second = (side.layout.layers[number].experts for side in (one, two))
    if first is None or second is None:
        return None
    rows = [side.scores(number, experts).values for side, experts in ((one, first), (two, second))]
    tiny = torch.finfo(torch.float64).tiny
    units = [row / row.norm(dim=1, keepdim=True).clamp_min(tiny) for row in rows]
    return grouped_assignment(units[0] @ units[1].mT, len(first.experts) // first.groups)


def _feed_forward_pairs(first: Layer, second: Layer, experts: Tensor | None) -> list[tuple[MLP, MLP]]:
    """Feed-forward layers that belong to each other."""
    a, b = first.feed_forward, second.feed_forward
    places = [] if experts is None else experts.tolist()
    return [(part, b[places[i] if i < len(places) else i]) for i, part in enumerate(a)]


def _score_block(number: int, one: Effective, two: Effective, chosen: Tensor, units: tuple[float, float]) -> Block:
    first, second = (side.layout.layers[number].experts for side in (one, two))
    assert first is not None and second is not None
    a, b = one.scores(number, first), two.scores(number, second).of_heads(chosen)
    return row_block(a.values, b.values, (a.sizes, b.sizes), units)


def _gain_blocks(a: Tensor | None, b: Tensor | None, units: tuple[float, float]) -> list[Block]:
    if a is None or b is None:
        return []
    return [row_block(x, y, (x.norm(), y.norm()), units) for x, y in zip(a, b)]


def _compare_ends(a: Effective, b: Effective, units: tuple[float, float]) -> dict[str, Part]:
    """Embeddings and unembeddings."""
    dim = a.layout.dim
    tables = (
        (a.layout.token_embedding, *a.layout.other_embeddings),
        (b.layout.token_embedding, *b.layout.other_embeddings),
    )
    parts = {}
    for number, (first, second) in enumerate(zip(*tables)):
        block = table_block(a.table(first), b.table(second), units)
        parts[first if number else "embedding"] = part_of([block], a.num_rows[first] * dim)
    rest: list[Block] = []
    offsets = a.table_offset(), b.table_offset()
    if offsets[0] is not None and offsets[1] is not None:
        # One token and one position have this in common: it counts by their size.
        block = table_block([offsets[0]], [offsets[1]], units)
        rest.append(Block(block.difference, block.size + 2 * dim, block.error))
    rest += _gain_blocks(a.embedding_gains(), b.embedding_gains(), units)
    rest += _gain_blocks(a.output_gains(), b.output_gains(), units)
    if rest:
        parts["offsets and gains"] = part_of(rest, dim * len(rest))
    if a.has_logits and b.has_logits:
        block = table_block(a.output_table(), b.output_table(), units)
        parts["unembedding"] = part_of([block], a.vocabulary * dim)
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


def _naive(a: Model, b: Model) -> dict[str, tuple[float, float]]:
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
    a: Model, b: Model, recorders: Sequence[_Recorder], naive: Mapping[str, tuple[float, float]], notes: list[str]
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
        Block(*(torch.tensor(value) for value in (*naive[name], (a.unit**2 + b.unit**2) * naive[name][1])))
        for name in names
    ]
    part = part_of([sum_blocks(blocks)], sum(a.weights.shape(name).numel() for name in names))
    return Part(part.distance, max(block.excess() for block in blocks), part.parameters)


def _unlike_settings(a: Model, b: Model) -> list[str]:
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
