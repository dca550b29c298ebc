"""Which head, which neuron and which frame of one model belongs to which of another."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._assignment import EXACT, matching
from ._distances import table_block
from ._effective import Effective, Heads, Neurons, Pair, Rows, product_inner, product_sizes
from ._models import kind_of
from .comparison import NEAR

ALIKE = 0.9  # cosine from which neurons at corresponding places are taken for each other


def _cosines(inner: Tensor, sizes: tuple[Tensor, Tensor]) -> Tensor:
    """[n, m]: 2 ⟨x, y⟩ / (‖x‖² + ‖y‖²)."""
    total = sizes[0][:, None] + sizes[1][None, :]
    return 2 * inner / total.clamp_min(torch.finfo(torch.float64).tiny)


def head_similarity(a: Heads, b: Heads) -> Tensor:
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


def _overlap(a: Iterator[Rows], b: Iterator[Rows], dim: int) -> Tensor:
    """[D, D]: bᵀ a, over the sizes of both."""
    total, sizes = torch.zeros(dim, dim, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for x, y in zip(a, b):
        first, second = x.values[:, :dim], y.values[:, :dim]
        total += second.mT @ first
        sizes += torch.stack([first.square().sum(), second.square().sum()])
    return total / sizes.prod().sqrt().clamp_min(torch.finfo(torch.float64).tiny)


def find_frame(a: Effective, b: Effective, units: tuple[float, float], notes: list[str]) -> str:
    """Bring the second residual stream into the frame of the first, if it is in another. By the embeddings."""

    def distance() -> float:
        token = a.layout.token_embedding, b.layout.token_embedding
        return table_block(a.table(token[0]), b.table(token[1]), units).relative() ** 0.5

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
            kind_of(norm) != "layer"
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
