"""What the effect of a preferred direction on classes of keys would be by chance, in closed form.

Two questions, two nulls. Random directions: a vector of the same length, uniform over the directions of the head's
space, in the place of b, for the same keys. Permuted labels: the classes of one window put on the tokens of another,
for the same logits; positions stay, and so does what neighbours share.
"""

import math

import torch
from torch import Tensor

# Fewer windows have too few permutations for a normal approximation.
MIN_WINDOWS = 8


def sphere_p_value(cosine: Tensor, dim: int) -> Tensor:
    """P(|cos| ≥ |cosine|) for the angle between a given vector and a uniformly random direction in dim dimensions.

    √(dim − 1) · cot of that angle is Student's t with dim − 1 degrees of freedom; the sum is that of Abramowitz and
    Stegun, 26.7.3 and 26.7.4.
    """
    degrees = dim - 1
    if degrees == 0:
        return torch.ones_like(cosine)
    sine = cosine.abs().clamp_max(1.0)  # of the angle θ with t = √ν tan θ
    theta, square = sine.asin(), 1 - sine.square()
    odd = degrees % 2
    term = square.sqrt() if odd else torch.ones_like(sine)
    total = torch.zeros_like(sine)
    for power in range(odd, degrees - 1, 2):
        total = total + term
        term = term * square * (power + 1) / (power + 2)
    total = total * sine
    inside = (theta + total) * 2 / math.pi if odd else total
    return (1 - inside).clamp(0, 1)


def permuted_labels(logits_HWT: Tensor, members_CWT: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [H, C] of the mean logit of a class, when the labels of windows are permuted.

    The sum over windows of M[π(w), w], with M[v, w] the sum over the places of window w that have the class in window
    v, has these two moments for a uniform permutation π (Hoeffding 1951). The deviation is zero where all windows have
    the class in the same places.
    """
    windows = logits_HWT.shape[1]
    members = members_CWT.to(logits_HWT.dtype)
    sums = torch.einsum("cvt,hwt->hcvw", members, logits_HWT)
    counts = members.sum((1, 2)).clamp_min(1)
    grand = sums.mean((-2, -1))
    residual = sums - sums.mean(-1, keepdim=True) - sums.mean(-2, keepdim=True) + grand[..., None, None]
    variance = residual.square().sum((-2, -1)) / max(1, windows - 1)
    return windows * grand / counts, variance.sqrt() / counts


def normal_p_value(z: Tensor) -> Tensor:
    """Two-sided p-value of a standard normal number."""
    return torch.special.erfc(z.abs() / math.sqrt(2))


def random_directions(number: int, lengths_HS: Tensor, dim: int, seed: int) -> Tensor:
    """float64 [number, H, S, dim]: uniform directions of given lengths."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(number, *lengths_HS.shape, dim, generator=generator, dtype=torch.float64)
    return draws / draws.norm(dim=-1, keepdim=True) * lengths_HS[..., None]
