r"""Dressing fields of tokens: frames made from them, in which they no longer show the frame that they came in.

Tokens X [tokens, dim] may be turned, X → X R with R in O(dim), if everything that reads and writes them turns along.
A dressing field is a frame u(X) with u(X R) = R⁻¹ u(X); the dressed tokens X u(X) are then invariant, and nothing is
lost: X u (X u)ᵀ = X Xᵀ (dressing field method: François and Ravera, arXiv 2602.18948). The frames differ in what they
look at, which decides where they can be used:

- "cholesky": Gram-Schmidt in the order of the tokens. The dressed tokens are the lower-triangular Cholesky factor of
  the Gram matrix, and row i depends on tokens up to i alone;
- "svd": the right singular vectors of all tokens, X u = U Σ. Every row depends on every token, so that a decoder that
  reads it reads the future;
- "weights": the right singular vectors of weights that read the stream and turn along with it (an embedding, stacked
  maps). The frame belongs to the model and not to the input.

`DRESSINGS` says of each what it may be used for, and what it does where tokens are dependent or singular values equal.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import forms

DressingKind = Literal["cholesky", "svd", "weights"]

_CHUNK = 64  # tokens that are looked at together once they are no longer all independent


@dataclass(frozen=True, kw_only=True)
class Dressing:
    """What is to be known of a kind of dressing.

    Attributes:
        causal: whether a dressed token depends on no later one.
        cache_safe: whether dressed tokens (and keys and values made from them) stay right as tokens are appended.
        freedom: what the kind leaves open.
        repeated: what it does at repeated, zero and otherwise dependent tokens.
        degenerate: what it does at equal singular values.
    """

    causal: bool
    cache_safe: bool
    freedom: str
    repeated: str
    degenerate: str


DRESSINGS: dict[str, Dressing] = {
    "cholesky": Dressing(
        causal=True,
        cache_safe=True,
        freedom="None on the span of the tokens: the k-th axis has a positive entry at the k-th independent token. "
        "Directions that no token has yet are free. The first tokens must stay: a window that slides takes its axes "
        "along.",
        repeated="A dependent token opens no axis. It keeps its coordinates on the axes that are open; gradients are "
        "those of a token that stays dependent.",
        degenerate="Not concerned: there are no singular values.",
    ),
    "svd": Dressing(
        causal=False,
        cache_safe=False,
        freedom="Signs, fixed by the sum of the cubes of a dressed column; directions that no token has are free.",
        repeated="The rank is lower, and the last columns are zero.",
        degenerate="A block of nearly equal singular values is turned as a whole against fixed vectors, one number a "
        "token; gradients are those of the block as a whole.",
    ),
    "weights": Dressing(
        causal=True,
        cache_safe=True,
        freedom="Signs, fixed by the sum of the cubes of a column of weights · frame. Nothing else: weights of low "
        "rank are refused.",
        repeated="Not concerned: tokens have no say in the frame.",
        degenerate="As for svd, with the rows of the weights in the place of tokens.",
    ),
}


@dataclass(frozen=True)
class DressingField:
    """A frame, and tokens in it. Shapes without the batch where tokens came without.

    Attributes:
        frame: [batch, dim, dim], orthonormal columns, those from ``rank`` on zero ([dim, dim] for weights).
        dressed: [batch, tokens, dim], tokens · frame.
        rank: int64 [batch], how many axes there are ([] for weights).
        blocks: (row of the batch, first, last) of singular values treated as equal, last included.
    """

    frame: Tensor
    dressed: Tensor
    rank: Tensor
    blocks: tuple[tuple[int, int, int], ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a nearby input may have otherwise, in words."""
        dim = self.frame.shape[-1]
        said = [
            f"row {row}: axes {first} to {last} have nearly equal singular values, and are turned as a block."
            for row, first, last in self.blocks
        ]
        said += [
            f"row {row}: rank {rank} of {dim}; the other axes are zero."
            for row, rank in enumerate(self.rank.reshape(-1).tolist())
            if rank < dim
        ]
        return tuple(said)


# --- Gram-Schmidt in the order of tokens ------------------------------------------------------------------------------


def _unit(x: Tensor) -> Tensor:
    """Tokens divided by their lengths; zero where they are. Lengths are taken as constants."""
    with torch.no_grad():
        size = x.abs().amax(dim=-1, keepdim=True)
        size = torch.where(size > 0, size, 1.0)
        length = torch.linalg.vector_norm(x / size, dim=-1, keepdim=True)
        length = torch.where(length > 0, length, 1.0)
    return x / size / length


def _opening(unit: Tensor, axes: int, tolerance: float) -> Tensor:
    """The tokens that open axes, in order: int64 [batch, axes], the number of tokens where there are no more.

    Token i opens one if what is left of it outside the span of those before is longer than the tolerance. Whether it
    does depends on tokens up to i alone: they are decided by one QR as far as all tokens are independent, and one by
    one from then on.

    Args:
        unit: [batch, tokens, dim], of length 1 or 0.
    """
    batch, tokens, _ = unit.shape
    basis, triangle = torch.linalg.qr(unit[:, :axes].mT)
    independent = (triangle.diagonal(dim1=-2, dim2=-1).abs() > tolerance).long().cumprod(dim=1)
    counted = independent.sum(dim=1)
    found = torch.where(independent > 0, torch.arange(axes, device=unit.device), tokens)
    if int(counted.min()) == axes:
        return found
    basis = basis * independent[:, None, :]
    every = torch.arange(batch, device=unit.device)
    after = counted - 1
    for start in range(int(counted.min()) // _CHUNK * _CHUNK, tokens, _CHUNK):
        rest = unit[:, start : start + _CHUNK]
        for _ in range(2):
            rest = rest - (rest @ basis) @ basis.mT
        position = torch.arange(start, start + rest.shape[1], device=unit.device)
        while True:
            fresh = (torch.linalg.vector_norm(rest, dim=-1) > tolerance) & (position > after[:, None])
            opens = fresh.any(dim=1) & (counted < axes)
            if not opens.any():
                break
            token = fresh.long().argmax(dim=1)
            direction = rest[every, token][:, None, :]
            direction = direction - (direction @ basis) @ basis.mT
            direction = torch.where(opens[:, None, None], _unit(direction), 0.0)
            for _ in range(2):
                rest = rest - (rest @ direction.mT) @ direction
            slot = counted.clamp(max=axes - 1)
            basis[every, :, slot] = torch.where(opens[:, None], direction[:, 0], basis[every, :, slot])
            found[every, slot] = torch.where(opens, position[token], found[every, slot])
            after = torch.where(opens, position[token], after)
            counted = counted + opens
        if int(counted.min()) == axes:
            break
    return found


def _gram_schmidt(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Frame [batch, dim, dim], dressed tokens and rank of tokens [batch, tokens, dim]."""
    tokens, dim = x.shape[1:]
    axes = min(tokens, dim)
    with torch.no_grad():
        found = _opening(_unit(x), axes, forms.degeneracy_tolerance(x.dtype))
        is_open = found < tokens
        at = torch.where(is_open, found, 0)[..., None].expand(-1, -1, dim)
    # Lengths have no say in the frame: columns of one length make a better triangle.
    opening = torch.where(is_open[..., None], _unit(x.gather(1, at)), 0.0).mT
    if not bool(is_open.all()):
        with torch.no_grad():
            filling = torch.linalg.qr(opening).Q
        opening = torch.where(is_open[:, None, :], opening, filling)
    basis, triangle = torch.linalg.qr(opening)
    with torch.no_grad():
        sign = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0) * is_open
        # What a token has on axes that open later is zero but for rounding, and would let later tokens through.
        seen = (found[:, None, :] <= torch.arange(tokens, device=x.device)[None, :, None]) & is_open[:, None, :]
    frame = basis * sign[:, None, :]
    dressed = torch.where(seen, x @ frame, 0.0)
    pad = (0, dim - axes)
    return torch.nn.functional.pad(frame, pad), torch.nn.functional.pad(dressed, pad), is_open.sum(dim=1)


# --- right singular vectors -------------------------------------------------------------------------------------------


class _RightVectors(torch.autograd.Function):
    """Right singular vectors [batch, dim, dim] and values [batch, dim], largest first, of [batch, rows, dim].

    The derivative turns no vectors of one group into each other: dV = V Ω with Ω_ij = (Vᵀ dC V)_ij / (s_j² − s_i²) for
    C = XᵀX and i, j of different groups. The span of a group is differentiated exactly, and nothing is divided by zero.
    Groups are runs of values nearer than a share of the largest, and the values that count as zero.
    """

    @staticmethod
    def forward(x: Tensor, tolerance: float, zero: float) -> tuple[Tensor, Tensor, Tensor]:
        dim = x.shape[-1]
        r = torch.linalg.qr(x, mode="r").R if x.shape[-2] > dim else x
        _, values, vectors = torch.linalg.svd(r, full_matrices=True)
        values = torch.nn.functional.pad(values, (0, dim - values.shape[-1]))
        largest = values[:, :1]
        kept = values > zero * largest
        apart = (values[:, :-1] - values[:, 1:] >= tolerance * largest) & kept[:, :-1]
        apart |= kept[:, :-1] & ~kept[:, 1:]
        group = torch.nn.functional.pad(apart.long().cumsum(dim=1), (1, 0))
        return vectors.mH, torch.where(kept, values, 0.0), group

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, _, _ = inputs
        vectors, values, group = output
        ctx.mark_non_differentiable(values, group)
        ctx.save_for_backward(x, vectors, values, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        x, vectors, values, group = ctx.saved_tensors
        largest = torch.where(values[:, :1] > 0, values[:, :1], 1.0)[..., None]
        values = values / largest[..., 0]
        same = group[:, :, None] == group[:, None, :]
        gap = (values[:, None, :] - values[:, :, None]) * (values[:, None, :] + values[:, :, None])
        weight = torch.where(same, 0.0, 1 / torch.where(same, 1.0, gap))
        turn = (vectors.mT @ grad_outputs[0]) * weight
        return ((x / largest) @ vectors) @ (turn + turn.mT) @ vectors.mT / largest, None, None


class _Polar(torch.autograd.Function):
    """The rotation O of M = O H with H symmetric and positive, [m, m]: dO = O ω with H ω + ω H = Oᵀ dM − dMᵀ O."""

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, values, vh = torch.linalg.svd(matrix)
        return u @ vh, values, vh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:  # pyrefly: ignore[bad-override]
        turn, values, vh = ctx.saved_tensors
        moment = turn.mT @ grad_outputs[0]
        total = values[:, None] + values
        dead = total <= torch.finfo(values.dtype).eps * values[0]
        skew = torch.where(dead, 0.0, (vh @ (moment - moment.mT) @ vh.mT) / torch.where(dead, 1.0, total))
        return turn @ (vh.mT @ skew @ vh)


def _principal_frame(x: Tensor) -> tuple[Tensor, Tensor, tuple[tuple[int, int, int], ...]]:
    """Frame [batch, dim, dim], rank and blocks of rows [batch, rows, dim]: their right singular vectors."""
    rows, dim = x.shape[-2:]
    tolerance = forms.degeneracy_tolerance(x.dtype)
    frame, values, _ = _RightVectors.apply(x, tolerance, max(rows, dim) * torch.finfo(x.dtype).eps)
    with torch.no_grad():
        rank = (values > 0).sum(dim=-1)
        sign = forms.signs((x @ frame).mT) * (values > 0)
        blocks = forms.near_equal(values, tolerance, rank)
    frame = frame * sign[:, None, :]
    if blocks:
        columns = [list(one.unbind(dim=-1)) for one in frame]
        for row, first, last in blocks:
            part = slice(first, last + 1)
            vectors = frame[row, :, part]
            overlap = (x[row] @ vectors).mT @ forms.probe(rows, last + 1 - first, x.device).to(x.dtype)
            columns[row][part] = (vectors @ _Polar.apply(overlap)[0]).unbind(dim=-1)
        frame = torch.stack([torch.stack(one, dim=-1) for one in columns])
    return frame, rank, blocks


# --- the public functions ---------------------------------------------------------------------------------------------


def _floating(name: str, tensor: Tensor, shape: str, dims: tuple[int, ...]) -> Tensor:
    """A checked tensor, in float32 at the least."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be real and in floating point, received {tensor.dtype}")
    if tensor.ndim not in dims or tensor.shape[-1] == 0:
        raise ValueError(f"{name} must be {shape}, received {list(tensor.shape)}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} have entries that are not finite: there is no frame to be made of them")
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def dressing_field(
    x: Tensor, kind: DressingKind = "cholesky", *, weights: Tensor | None = None, causal: bool = False
) -> DressingField:
    """The frame of tokens, and the tokens in it. Arguments and errors as of `dressing`."""
    if kind not in DRESSINGS:
        raise ValueError(f"kind must be one of {', '.join(DRESSINGS)}, received {kind!r}")
    if causal and not DRESSINGS[kind].causal:
        raise ValueError(
            f'kind="{kind}" is not causal: the frame is made of all tokens, so every dressed token depends on those '
            'after it, and a decoder that reads it reads the future. Use kind="cholesky", or kind="weights"'
        )
    if (kind == "weights") != (weights is not None):
        raise ValueError(
            'kind="weights" makes the frame of weights: pass weights=[rows, dim], the embedding or stacked maps that '
            "read the stream, which turn along with the tokens"
            if weights is None
            else f'weights have no say in kind="{kind}": leave them out, or use kind="weights"'
        )
    tokens = _floating("tokens", x, "[batch, tokens, dim] or [tokens, dim]", (2, 3))
    dim = x.shape[-1]
    rank_shape = x.shape[:-2]
    if weights is not None:
        weights = _floating("weights", weights, "[rows, dim]", (2,))
        if weights.shape[1] != dim:
            raise ValueError(f"weights must be [rows, {dim}] for tokens of dim {dim}, received {list(weights.shape)}")
        frame, rank, blocks = _principal_frame(weights[None])
        if int(rank) < dim:
            raise ValueError(
                f"weights of shape {list(weights.shape)} have rank {int(rank)} of {dim}, and no frame of the whole "
                "stream comes from them: stack more maps that read it"
            )
        frame, rank_shape = frame[0].to(tokens.dtype), ()
        dressed = tokens @ frame
    else:
        whole = tokens if tokens.ndim == 3 else tokens[None]
        if whole.numel() == 0:
            frame, dressed = whole.new_zeros(whole.shape[0], dim, dim), whole
            rank, blocks = torch.zeros(whole.shape[0], dtype=torch.int64, device=x.device), ()
        elif kind == "cholesky":
            (frame, dressed, rank), blocks = _gram_schmidt(whole), ()
        else:
            frame, rank, blocks = _principal_frame(whole)
            dressed = whole @ frame
        frame, dressed = frame.reshape(*x.shape[:-2], dim, dim), dressed.reshape(x.shape)
    return DressingField(frame.to(x.dtype), dressed.to(x.dtype), rank.reshape(rank_shape), blocks)


def dressing(
    x: Tensor, kind: DressingKind = "cholesky", *, weights: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Tokens in a frame of their own: the same whatever rotation (or reflection) they were turned by.

    Computed in the dtype of the tokens, float32 at the least. Gradients are finite at dependent tokens and at equal
    singular values; those of "svd" and "weights" can be taken once. Tokens that are padding should be zero: they open
    no axis and stay zero.

    Args:
        x: [batch, tokens, dim] or [tokens, dim].
        kind: "cholesky", "svd" or "weights", as above; `DRESSINGS` says more of each.
        weights: [rows, dim], for "weights": they must turn along with the tokens, W → W R.
        causal: refuse a kind that lets a dressed token depend on later ones.

    Returns:
        The dressed tokens, of the same shape and dtype.

    Raises:
        TypeError: tokens or weights that are not in floating point.
        ValueError: shapes, another kind, entries that are not finite; ``causal`` with "svd"; "weights" without weights,
            or with weights whose rank is below dim.
    """
    return dressing_field(x, kind, weights=weights, causal=causal).dressed
