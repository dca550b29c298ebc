r"""What of a pair of factors need not be stored: directions of little weight, and an identity block.

A pair (A, B) of `forms` counts only as its product. A gauge in which some columns of A hold an identity block saves
those numbers: rows 0 … m − 1 of A are 1 and 0 at m chosen inputs, the other rows are 0 there. For m = width that is the
whole gauge, width² numbers a head.

One set of inputs serves all heads of a layer, so that the rest is one dense product. It is chosen as by a QR with
pivoting, jointly: each next column is the one with the largest product, over heads, of what the columns before leave of
it. Inputs that are chosen last are those that a head can hardly tell from the others, and there rounding grows; so as
many are taken as rounding allows. With A = Q scaled to orthonormal rows over inputs of unit size, rounding grows over
that of the balanced form by √(Σᵢ ‖Aᵢ‖² ‖Bᵢ‖²) / ‖Aᵀ B‖, which is 1 there.

Truncation is the best one of the product as inputs of the given second moments see it (after Eckart and Young; for
attention Wong et al., arXiv 2505.12942).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import forms
from ._fold import Reading

# Of the largest size of an input: what counts as no smaller, where the choice of inputs weighs them.
_LEAST_SIZE = 1e-3
# Growth of rounding that is never allowed: of float64 it would leave ten digits.
_MOST_NOISE = 1e6


@dataclass(frozen=True)
class Moments:
    """The first and second moments of what a map reads.

    Attributes:
        mean: [in_features].
        root: [in_features, n], a root of the covariance, root rootᵀ; None: it is that behind a norm.
        gain: [in_features], of that norm.
        centred: it takes the mean off.
    """

    mean: Tensor
    root: Tensor | None = None
    gain: Tensor | None = None
    centred: bool = False

    @classmethod
    def behind(cls, reading: Reading, dim: int, device: torch.device) -> "Moments":
        """What follows from a norm alone: gain · x + bias, with x of unit size in every direction that it leaves."""
        norm, bias = reading.fold.norm, reading.bias
        mean = torch.zeros(dim, dtype=torch.float64, device=device) if bias is None else bias
        return cls(mean, gain=reading.gain, centred=norm is not None and norm.kind == "layer")

    @classmethod
    def of_sums(cls, total: Tensor, products: Tensor, number: int) -> "Moments":
        """From the sum of inputs [in_features], that of their products [in_features, in_features], and their number."""
        mean = total / number
        values, axes = torch.linalg.eigh(products / number - torch.outer(mean, mean))
        return cls(mean, root=axes * values.clamp_min(0).sqrt())

    def spread(self, rows: Tensor) -> Tensor:
        """Rows [..., in_features] over a root of the covariance: [..., n]."""
        if self.root is not None:
            return rows @ self.root
        if self.gain is not None:
            rows = rows * self.gain
        return rows - rows.mean(dim=-1, keepdim=True) if self.centred else rows

    def constant(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """[...]: the mean of rows x + bias."""
        return rows @ self.mean if bias is None else rows @ self.mean + bias

    def sizes(self) -> Tensor:
        """[in_features]: root mean squares of the inputs, none much smaller than the largest."""
        if self.root is not None:
            squares = self.root.square().sum(dim=-1)
        else:
            squares = torch.ones_like(self.mean) if self.gain is None else self.gain.square()
        sizes = (squares + self.mean.square()).sqrt()
        return sizes.clamp_min(_LEAST_SIZE * sizes.amax()).clamp_min(torch.finfo(sizes.dtype).tiny)


# --- truncation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truncation:
    """What is kept of the pairs of a layer.

    Attributes:
        first, second: [heads, width, width]: rows of the first and second factor are multiplied by the first rank[head]
            rows of these.
        spectrum: [heads, width], singular values of the product as the inputs see it.
    """

    first: Tensor
    second: Tensor
    spectrum: Tensor


def truncation(first: Tensor, second: Tensor) -> Truncation:
    """The balanced form of pairs whose columns are weighted by what the inputs are.

    Args:
        first, second: float64 [heads, width, columns], spread over the inputs.
    """
    r_first, r_second = forms.triangle(first)[1], forms.triangle(second)[1]
    u, spectrum, vh = torch.linalg.svd(r_first @ r_second.mT)
    size = torch.linalg.matrix_norm(r_first) * torch.linalg.matrix_norm(r_second)
    alive = spectrum > torch.finfo(spectrum.dtype).eps * spectrum.shape[-1] * size[:, None]
    inverse = (torch.where(alive, spectrum, 1.0).rsqrt() * alive)[..., None]
    return Truncation(inverse * (vh @ r_second), inverse * (u.mT @ r_first), torch.where(alive, spectrum, 0.0))


def kept(spectrum: Tensor, keep: int | float, turned: int = 0) -> Tensor:
    """Which of the values of one head are kept: bool [n], at least one.

    Args:
        spectrum: [n].
        keep: how many at most (int), or the least share of the sum of squares (float).
        turned: the first so many belong to planes, two by two, which stay or go together.
    """
    energy = spectrum.square()
    planes, single = energy[:turned].view(-1, 2).sum(dim=1), energy[turned:]
    values = torch.cat([planes, single]).tolist()
    widths = [2] * len(planes) + [1] * len(single)
    order = sorted(range(len(values)), key=lambda place: (-values[place] / widths[place], place))
    mask, number, held, total = torch.zeros_like(spectrum, dtype=torch.bool), 0, 0.0, sum(values)
    for place in order:
        enough = held >= keep * total * (1 - 1e-12) if isinstance(keep, float) else number + widths[place] > keep
        if number and enough:
            break
        first = 2 * place if place < len(planes) else turned + place - len(planes)
        mask[first : first + widths[place]] = True
        number, held = number + widths[place], held + values[place]
    return mask


def check_keep(keep: int | float | Mapping[str, int | float] | None, sectors: Iterable[str]) -> None:
    """What is to be kept is a rank or a share, for all sectors or by their names.

    Raises:
        ValueError: it is not.
    """
    if isinstance(keep, Mapping):
        unknown = keep.keys() - set(sectors)
        if unknown:
            raise ValueError(f"keep is given for {', '.join(sorted(sectors))}, received {', '.join(sorted(unknown))}")
    for value in keep.values() if isinstance(keep, Mapping) else [keep]:
        rank = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        share = isinstance(value, float) and 0 < value < 1
        if value is not None and not rank and not share:
            raise ValueError(
                "keep is a rank (a whole number of at least 1) or a share of the energy (between 0 and 1), "
                f"received {value!r}; None keeps everything"
            )


# --- the identity block -----------------------------------------------------------------------------------------------


def joint_pivots(bases: Sequence[Tensor], number: int) -> Tensor:
    """Columns that are far from each other in every head at once: int64 [number], the best first.

    Args:
        bases: one a head, [rank, columns], with orthonormal rows.
        number: at most the least rank.
    """
    width, columns = max(basis.shape[0] for basis in bases), bases[0].shape[1]
    rows = bases[0].new_zeros(len(bases), width, columns)
    for head, basis in enumerate(bases):
        rows[head, : basis.shape[0]] = basis
    left = rows.square().sum(dim=1)  # what the chosen columns leave of each
    axes = rows.new_zeros(len(bases), number, width)
    chosen = torch.zeros(number, dtype=torch.int64, device=rows.device)
    taken = torch.zeros(columns, dtype=torch.bool, device=rows.device)
    for step in range(number):
        score = left.clamp_min(torch.finfo(left.dtype).tiny).log().sum(dim=0).masked_fill(taken, -torch.inf)
        column = int(score.argmax())
        chosen[step], taken[column] = column, True
        new, before = rows[:, :, column], axes[:, :step]
        for _ in range(2):
            new = new - (before.mT @ (before @ new[..., None]))[..., 0]
        new = new / torch.linalg.vector_norm(new, dim=-1, keepdim=True).clamp_min(torch.finfo(new.dtype).tiny)
        axes[:, step] = new
        left = left - (new[:, None] @ rows)[:, 0].square()
    return chosen


@dataclass(frozen=True)
class Block:
    """Pairs of a layer in a gauge with an identity block.

    Attributes:
        first, second: one a head, [rank, columns].
        columns: int64 [block], those of ``first`` that hold it; None: there is none.
        noise: [heads], how much larger rounding is than in the balanced form.
        condition: [heads], of the matrices that lead to the block.
    """

    first: list[Tensor]
    second: list[Tensor]
    columns: Tensor | None
    noise: list[float]
    condition: list[float]


def identity_block(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    sizes: tuple[Tensor, Tensor],
    inputs: int,
    noise: float,
) -> Block:
    """Give the pairs of a layer an identity block, as large as rounding allows.

    Args:
        first, second: one a head, float64 [rank, columns].
        sizes: of what the columns of both read, [columns] each.
        inputs: the block lies in the first so many columns of ``first`` (a bias has a column too).
        noise: the largest growth of rounding that is allowed.
    """
    size = sizes[0]
    bases, others = [], []
    for one, two in zip(first, second):
        basis, triangle = torch.linalg.qr((one * size).mT)
        bases.append(basis.mT)
        others.append(triangle @ two)
    most = min(min(basis.shape[0] for basis in bases), inputs - 1)
    order = joint_pivots([basis[:, :inputs] for basis in bases], most)
    grams = [other * sizes[1] @ (other * sizes[1]).mT for other in others]
    # Products are quick in multiples of 8.
    step, limit = 8 if most >= 64 else max(1, most // 16), min(noise * (1 + 1e-9), _MOST_NOISE)
    for number in [*range(most, 1, -step), 1]:
        columns = order[:number]
        if max(_noise(basis[:, columns], gram) for basis, gram in zip(bases, grams)) <= limit:
            break
    else:
        sums = [
            ((one * size).square().sum(dim=1) * (two * sizes[1]).square().sum(dim=1)).sum()
            for one, two in zip(first, second)
        ]
        stored = [float((total / gram.trace()).sqrt()) for total, gram in zip(sums, grams)]
        return Block(list(first), list(second), None, stored, [1.0] * len(bases))
    new_first, new_second, conditions = [], [], []
    for basis, other in zip(bases, others):
        chosen = basis[:, columns]
        axes, triangle = torch.linalg.qr(chosen, mode="complete")
        rest = axes[:, number:]
        inverse = torch.linalg.solve_triangular(triangle[:number], axes[:, :number].mT, upper=True)
        rows = torch.cat([inverse, rest.mT]) @ basis / size
        scale = torch.cat([size[columns], size.new_ones(rest.shape[1])])[:, None]
        rows = rows * scale
        rows[:, columns] = torch.eye(rows.shape[0], number, dtype=rows.dtype, device=rows.device)
        new_first.append(rows)
        new_second.append(torch.cat([chosen, rest], dim=1).mT @ other / scale)
        conditions.append(float(torch.linalg.cond(chosen)))
    found = [_noise(basis[:, columns], gram) for basis, gram in zip(bases, grams)]
    return Block(new_first, new_second, columns, found, conditions)


def _noise(chosen: Tensor, gram: Tensor) -> float:
    """How much rounding grows when the chosen columns [rank, block] become an identity block.

    Args:
        gram: [rank, rank], of the second factor, with the first one orthonormal.
    """
    number = chosen.shape[1]
    axes, triangle = torch.linalg.qr(chosen, mode="complete")
    diagonal = triangle[:number].diagonal().abs()
    total = gram.trace()
    if total <= 0:
        return 1.0
    if diagonal.min() < 1 / _MOST_NOISE:  # rows of the basis have norm 1
        return torch.inf
    inverse = torch.linalg.solve_triangular(triangle[:number], axes[:, :number].mT, upper=True)
    block = inverse.square().sum(dim=1) @ ((chosen.mT @ gram) * chosen.mT).sum(dim=1)
    rest = axes[:, number:]
    return float(((block + (rest * (gram @ rest)).sum()) / total).sqrt())
