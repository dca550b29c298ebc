"""Normal numbers as a pure function of (seed, draw, coordinate).

A counter-based generator rather than `torch.Generator`, because everything that is asked of the draws then holds by
construction: they are the same on every rank and device, a checkpoint holds them in one integer, a copied model has
its own stream, and `torch.compile(fullgraph=True)` traces them (a Generator breaks the graph).
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """A bijective hash of 32-bit integers held in int64, after the two-round multiply–xorshift ("lowbias32") form.

    Both multipliers are below 2³¹, so that no product overflows int64.
    """
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def stream(seed: int, size: int) -> Tensor:
    """The keys of ``size`` independent coordinates, int64 [size]; hand them to `normal`."""
    low = mix(torch.tensor(seed & _MASK))
    high = mix(torch.tensor((seed >> 32) & _MASK) ^ low)
    return mix(mix(torch.arange(size)) ^ high)


def normal(keys: Tensor, draw: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers of one draw.

    Args:
        keys: int64 [...], from `stream`.
        draw: int64 [], the number of the draw, below 2³².
        dtype: a floating dtype of the result.

    Returns:
        [...] in ``dtype``: the inverse error function of 23 random bits, centred between grid points, so at most
        5.2 in size and never infinite.
    """
    bits = mix(keys ^ mix(draw & _MASK)) >> 9
    wide = torch.promote_types(dtype, torch.float32)
    uniform = (bits.to(wide) + 0.5) * 2.0**-22 - 1.0
    return (torch.erfinv(uniform) * math.sqrt(2.0)).to(dtype)
