"""Distances of what is invariant, beside the rounding of the numbers that it was made of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._effective import Heads, Neurons, Pair, Rows, product_distances, product_sizes
from .comparison import Part


@dataclass
class Block:
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


def part_of(blocks: Sequence[Block], parameters: int) -> Part:
    """Blocks count alike."""
    mean = sum(block.relative() for block in blocks) / len(blocks)
    return Part(mean**0.5, max(block.excess() for block in blocks), parameters)


def product_block(a: Pair, b: Pair, units: tuple[float, float]) -> Block:
    error = units[0] ** 2 * a.rounding() + units[1] ** 2 * b.rounding()
    return Block(product_distances(a, b), product_sizes(a) + product_sizes(b), error)


def sum_blocks(blocks: Sequence[Block]) -> Block:
    """Of parts of one thing: squares add up."""
    return Block(
        torch.stack([block.difference for block in blocks]).sum(0),
        torch.stack([block.size for block in blocks]).sum(0),
        torch.stack([block.error for block in blocks]).sum(0),
    )


def stack_blocks(blocks: Sequence[Block]) -> Block:
    """Of parts of one thing, each with its own rounding."""
    return Block(
        torch.stack([block.difference for block in blocks]),
        torch.stack([block.size for block in blocks]),
        torch.stack([block.error for block in blocks]),
    )


def row_block(a: Tensor, b: Tensor, sizes: tuple[Tensor, Tensor], units: tuple[float, float]) -> Block:
    error = (units[0] * sizes[0]).square().sum() + (units[1] * sizes[1]).square().sum()
    return Block((a - b).square().sum(), a.square().sum() + b.square().sum(), error)


def attention_blocks(
    a: Heads, b: Heads, heads: Tensor, units: tuple[float, float]
) -> tuple[list[Block], list[Block], list[Block]]:
    """Of queries and keys, of values and outputs, each by head; and of what the layer has as a whole."""
    scores = [product_block(pair, b.scores[name].of_heads(heads), units) for name, pair in a.scores.items()]
    query_key = [sum_blocks(scores)]
    query_key += [product_block(pair, b.norms[name].of_heads(heads), units) for name, pair in a.norms.items()]
    values = [product_block(a.values, b.values.of_heads(heads), units)]
    whole = [product_block(pair, b.layer[name], units) for name, pair in a.layer.items()]
    error = units[0] ** 2 * a.constant_rounding + units[1] ** 2 * b.constant_rounding
    sizes = a.constant.square().sum() + b.constant.square().sum()
    if sizes:
        size = sizes + values[0].size.sum()
        whole.append(Block((a.constant - b.constant).square().sum(), size, torch.as_tensor(error)))
    return query_key, values, whole


def by_head(blocks: Sequence[Block]) -> Tensor:
    """[H] distances: blocks count alike."""
    tiny = torch.finfo(torch.float64).tiny
    return torch.stack([block.difference / block.size.clamp_min(tiny) for block in blocks]).mean(0).sqrt()


def neuron_blocks(a: Neurons, b: Neurons, match: Tensor, units: tuple[float, float]) -> tuple[list[Block], list]:
    """Of the neurons; and of what is written for any token."""

    def moved(rows: Rows) -> Rows:
        return Rows(rows.values[match], rows.sizes[match])

    up, down = moved(b.up), moved(b.down)
    if a.gate is not None and b.gate is not None:
        gate = moved(b.gate)
        product = (Pair(_single(x), _single(y)) for x, y in ((a.up, a.down), (up, down)))
        first, second = product
        blocks = [
            _total(product_block(first, second, units)),
            row_block(a.gate.values, gate.values, (a.gate.sizes, gate.sizes), units),
        ]
    else:
        blocks = [row_block(x.values, y.values, (x.sizes, y.sizes), units) for x, y in ((a.up, up), (a.down, down))]
    if a.slope is not None and b.slope is not None:
        blocks.append(row_block(a.slope, b.slope[match], (a.slope.abs(), b.slope.abs()), units))
    whole = []
    size = a.constant.square().sum() + b.constant.square().sum()
    if size:
        size = size + sum((side.values.square().sum() for side in (a.down, b.down)), torch.zeros(()).double())
        error = units[0] ** 2 * a.constant_rounding + units[1] ** 2 * b.constant_rounding
        whole.append(Block((a.constant - b.constant).square().sum(), size, error))
    return blocks, whole


def _single(rows: Rows) -> Rows:
    """Rows as factors of width one."""
    return Rows(rows.values[:, None], rows.sizes[:, None])


def _total(block: Block) -> Block:
    return Block(block.difference.sum(), block.size.sum(), block.error.sum())


def table_block(a: Iterable[Rows], b: Iterable[Rows], units: tuple[float, float]) -> Block:
    blocks = [row_block(x.values, y.values, (x.sizes, y.sizes), units) for x, y in zip(a, b)]
    return sum_blocks(blocks)
