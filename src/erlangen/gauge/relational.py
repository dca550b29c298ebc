"""Layers made of relations between tokens only: their Gram matrix, and that with learned reference vectors.

Rotating all tokens and references by one Q of O(d) leaves the numbers G_ij = x_i·x_j as they are, so weights that are
functions of G alone are invariant, and a layer that adds vectors with such weights is equivariant. Such a layer maps
Gram matrices to Gram matrices: X' = T X~ gives G' = T G~ Tᵀ, where X~ holds the references, which are read and never
written, and the tokens. Every layer here has both forms: ``forward`` works on tokens and never stores G, ``gram`` works
on G alone. The idea is of François & Ravera, "Toward Manifest Relationality in Transformers via Symmetry Reduction"
(arXiv 2602.18948). The forms are ours: they are what scalars times vectors allow ("Scalars are universal", Villar et
al., arXiv 2106.06610), with scores that are dot products of features, so that they can be computed in strips.

Order: in a Gram matrix, as in weights, the fixed vectors come first and the tokens after them.

Shape suffixes: B batch, H heads, N tokens, R references, M = R + N, K = fixed vectors and tokens, D width of a token.
"""

import torch
from torch import Tensor, nn

from ._relational_stream import streamed_mix

IMPLEMENTATIONS = ("auto", "dense", "streaming")
_DENSE_ELEMENTS = 1 << 18  # weights of a call, below which plain operations are quicker


class RelationalAttention(nn.Module):
    """X' = X + Σ_h c_h α^h X~, with weights α^h = softmax_j f_h that depend on the Gram matrix of X~ = [R; X] only.

    The score of head h is a dot product of features of i and of j:

        f_h(i, j) = (a_h + b_h √(d/G_ii) √(d/G_jj)) G_ij/√d + p_h G_jj/√d + s_iᵀ W_h s_j/√m,    s_i = R x_i/√d,

    an inner product, a cosine, what a key is worth to everyone, and with m references a content term. With p = −a/2
    and b = 0 it is a distance, −a |x_i − x_j|²/(2 √d), up to what the softmax does not see. In the cosines ``eps`` is
    added to G_ii/d.

    A head is four numbers without references, and m² more with them, beside m d for the references of the layer. A
    standard head's query and key maps come to k (2 d − k) numbers: see ``docs/relational.md`` for what that costs.

    Args:
        dim: width d of a token.
        num_heads: heads; they share their tokens, so any number will do.
        num_references: m, learned vectors that every token reads, and none writes.
        causal: token i reads the references and tokens up to itself.
        eps: added to the mean square of a token, in the cosines.
        impl: "dense" keeps the weights of all pairs and can be differentiated twice; "streaming" needs O(N d) memory;
            "auto" takes the dense one for small inputs.
        generator: of the initial numbers. None: torch's global one.

    Raises:
        ValueError: a size is out of range, or there is no such implementation.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_references: int = 0,
        *,
        causal: bool = False,
        eps: float = 1e-6,
        impl: str = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _expect_sizes(dim, num_references, eps)
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, received {num_heads}")
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, received {impl!r}")
        self.dim, self.num_heads, self.num_references = dim, num_heads, num_references
        self.causal, self.eps, self.impl = causal, eps, impl
        self.plain = nn.Parameter(torch.empty(num_heads))
        self.cosine = nn.Parameter(torch.empty(num_heads))
        self.prior = nn.Parameter(torch.empty(num_heads))
        self.mix = nn.Parameter(torch.empty(num_heads))
        self.references = nn.Parameter(torch.empty(num_references, dim))
        self.content = nn.Parameter(torch.empty(num_heads, num_references, num_references)) if num_references else None
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial numbers again: scores are of order 1 where tokens have a mean square of 1."""
        for number in (self.plain, self.cosine):
            number.normal_(0.0, self.dim**-0.5, generator=generator)
        self.prior.zero_()
        self.mix.normal_(0.0, self.num_heads**-0.5, generator=generator)
        self.references.normal_(0.0, 1.0, generator=generator)
        if self.content is not None:
            self.content.normal_(0.0, self.num_references**-0.5, generator=generator)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, {self.num_references}, causal={self.causal}, impl={self.impl!r}"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """X' = X + Σ_h c_h α^h X~.

        Args:
            x: [B, N, dim], of the parameters' dtype, float32 or float64.
            mask: bool [B, N], false at padding, which may hold anything; None for none.

        Returns:
            [B, N, dim], zero at padding.

        Raises:
            ValueError: shape, dtype or device do not fit.
        """
        x = _tokens(x, mask, self.dim, self.plain)
        return x + self._update(x, mask)

    def update(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Σ_h c_h α^h X~ alone, [B, N, dim]; as `forward` otherwise."""
        return self._update(_tokens(x, mask, self.dim, self.plain), mask)

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """α, [B, H, N, num_references + N]: what each token reads, the references first. As `forward` otherwise."""
        x = _tokens(x, mask, self.dim, self.plain)
        with torch.autocast(x.device.type, enabled=False):
            keys = torch.cat([self.references.expand(len(x), -1, -1), x], 1)
            square, features = keys.square().sum(-1), keys @ self.references.mT
            return self._weights(x @ keys.mT, square, features, mask)

    def gram(
        self, gram: Tensor, mask: Tensor | None = None, *, num_fixed: int | None = None, references: slice | None = None
    ) -> Tensor:
        """G' = T G Tᵀ: what `forward` does to the Gram matrix, computed from that matrix and the heads' numbers alone.

        It stores [B, H, N, K] and takes K³ operations, so it is for few tokens and for checks.

        Args:
            gram: [B, K, K], of fixed vectors, which are read and never written, and after them the tokens.
            mask: bool [B, N]; as in `forward`.
            num_fixed: how many fixed vectors there are. Default: the references of this layer alone.
            references: which of these are the references of this layer. Default: the first ``num_references``.

        Returns:
            [B, K, K], of the same fixed vectors and the new tokens.

        Raises:
            ValueError: shape, dtype or device do not fit, or there are not so many references.
        """
        fixed, references = _fixed(num_fixed, references, self.num_references)
        gram = _clean_gram(gram, mask, fixed, self.plain)
        return _congruence(gram, self._mixing(gram, mask, fixed, references), fixed)

    def _mixing(self, gram_BKK: Tensor, mask: Tensor | None, fixed: int, references: slice) -> Tensor:
        """The matrix [B, N, K] that makes the updates of the tokens from all vectors."""
        keys = [*range(fixed)[references], *range(fixed, gram_BKK.shape[-1])]
        square = gram_BKK.diagonal(dim1=-2, dim2=-1)[:, keys]
        weights = self._weights(gram_BKK[:, fixed:, keys], square, gram_BKK[:, keys, :fixed][..., references], mask)
        found = torch.einsum("h,bhnm->bnm", self.mix, weights)
        if mask is not None:
            found = found.masked_fill(~mask[..., None], 0.0)
        return gram_BKK.new_zeros(len(gram_BKK), found.shape[1], gram_BKK.shape[-1]).index_add(
            -1, torch.tensor(keys, device=found.device), found
        )

    def _update(self, x: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            keys = torch.cat([self.references.expand(len(x), -1, -1), x], 1)
            square, features = keys.square().sum(-1), keys @ self.references.mT
            is_small = len(x) * self.num_heads * x.shape[1] * keys.shape[1] <= _DENSE_ELEMENTS
            if self.impl == "dense" or (self.impl == "auto" and is_small):
                weights = self._weights(x @ keys.mT, square, features, mask)
                update = torch.einsum("h,bhnm->bnm", self.mix, weights) @ keys
            else:
                scale, content, numbers, hidden = self._terms(square, mask)
                root = self.dim**-0.5
                update = streamed_mix(
                    keys, scale, square, features * root, content, numbers, self.mix, hidden, causal=self.causal
                )
            return update if mask is None else update.masked_fill(~mask[..., None], 0.0)

    def _terms(self, square_BM: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """√(d/G_jj), W/√m, what G_ij, the cosines and G_jj are multiplied by, [H, 3], and keys that are padding."""
        scale = (square_BM / self.dim + self.eps).rsqrt()
        content = None if self.content is None else self.content * self.num_references**-0.5
        numbers = torch.stack([self.plain, self.cosine, self.prior], -1) * self.dim**-0.5
        hidden = None if mask is None else nn.functional.pad(~mask, (self.num_references, 0))
        return scale, content, numbers, hidden

    def _weights(self, gram_BNM: Tensor, square_BM: Tensor, features_BMR: Tensor, mask: Tensor | None) -> Tensor:
        """α, [B, H, N, M], of inner products of tokens with keys, squares of the keys, and products with references."""
        scale, content, numbers, hidden = self._terms(square_BM, mask)
        first = self.num_references
        scaled = gram_BNM * scale[:, None] * scale[:, first:, None]
        plain, cosine, prior = numbers[..., None, None].unbind(1)
        scores = plain * gram_BNM[:, None] + cosine * scaled[:, None] + prior * square_BM[:, None, None]
        if content is not None:
            features = features_BMR[:, None] * self.dim**-0.5
            scores = scores + features[:, :, first:] @ content @ features.mT
        if hidden is not None:
            # A finite number, so that a row whose keys are all hidden has weights, and not NaN.
            scores = scores.masked_fill(hidden[:, None, None], torch.finfo(scores.dtype).min / 2)
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(first + 1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores.softmax(-1)


class RelationalRMSNorm(nn.Module):
    """x_i → x_i / √(|x_i|²/d + eps): RMSNorm without gain; a gain a coordinate would not be O(d)-equivariant.

    Args:
        dim: width d of a token.
        eps: added to the mean square.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        _expect_sizes(dim, 0, eps)
        self.dim, self.eps = dim, eps

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] → [..., dim].

        Raises:
            ValueError: the width is another.
        """
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape [..., {self.dim}], received {list(x.shape)}")
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()

    def gram(self, gram: Tensor, *, num_fixed: int = 0) -> Tensor:
        """d G_ij / √((G_ii + eps d) (G_jj + eps d)); arguments as in `RelationalAttention.gram`. The fixed vectors keep
        their lengths.
        """
        fixed, _ = _fixed(num_fixed, None, 0)
        gram = _clean_gram(gram, None, fixed, None)
        scale = self._scale(gram, fixed)
        return gram * scale[..., None] * scale[..., None, :]

    def _scale(self, gram_BKK: Tensor, fixed: int) -> Tensor:
        square = gram_BKK.diagonal(dim1=-2, dim2=-1)[:, fixed:]
        return nn.functional.pad((square / self.dim + self.eps).rsqrt(), (fixed, 0), value=1.0)


class RelationalMLP(nn.Module):
    """x_i → x_i + φ_0(x_i) x_i + Σ_r φ_r(x_i) R_r, φ a feed-forward network of the numbers |x_i|²/d and x_i·R_r/√d.

    The references are given at the call, for they are those of the attention. Without any it changes lengths only.

    Args:
        dim: width d of a token.
        num_references: m.
        hidden_dim: hidden width of φ. Default: 4 (1 + m).
        generator: of the initial weights. None: torch's global one.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_references: int = 0,
        hidden_dim: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _expect_sizes(dim, num_references, 0.0)
        if hidden_dim is not None and hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, received {hidden_dim}")
        self.dim, self.num_references = dim, num_references
        hidden_dim = hidden_dim or 4 * (1 + num_references)
        self.up, self.down = nn.Linear(1 + num_references, hidden_dim), nn.Linear(hidden_dim, 1 + num_references)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights again, N(0, 1 / fan in); the biases of the hidden numbers N(0, 1), the others 0."""
        for layer in (self.up, self.down):
            layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
        self.up.bias.normal_(0.0, 1.0, generator=generator)
        self.down.bias.zero_()

    def forward(self, x: Tensor, references: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Tokens with what the network adds.

        Args:
            x: [B, N, dim], of the parameters' dtype.
            references: [num_references, dim]; None where the layer has none.
            mask: bool [B, N], false at padding; None for none.

        Returns:
            [B, N, dim], zero at padding.

        Raises:
            ValueError: shape, dtype or device do not fit.
        """
        x = _tokens(x, mask, self.dim, self.up.weight)
        return x + self._update(x, references, mask)

    def update(self, x: Tensor, references: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """What the network adds alone, [B, N, dim]; as `forward` otherwise."""
        return self._update(_tokens(x, mask, self.dim, self.up.weight), references, mask)

    def gram(
        self, gram: Tensor, mask: Tensor | None = None, *, num_fixed: int | None = None, references: slice | None = None
    ) -> Tensor:
        """What `forward` does to the Gram matrix; as `RelationalAttention.gram`."""
        fixed, references = _fixed(num_fixed, references, self.num_references)
        gram = _clean_gram(gram, mask, fixed, self.up.weight)
        return _congruence(gram, self._mixing(gram, mask, fixed, references), fixed)

    def _mixing(self, gram_BKK: Tensor, mask: Tensor | None, fixed: int, references: slice) -> Tensor:
        square = gram_BKK.diagonal(dim1=-2, dim2=-1)[:, fixed:]
        found = self._coefficients(square, gram_BKK[:, fixed:, :fixed][..., references], mask)
        own = nn.functional.pad(found[..., 0].diag_embed(), (fixed, 0))
        places = torch.arange(fixed, device=found.device)[references]
        return own.index_add(-1, places, found[..., 1:])

    def _update(self, x: Tensor, references: Tensor | None, mask: Tensor | None) -> Tensor:
        if references is None:
            references = x.new_empty(0, self.dim)
        if references.shape != (self.num_references, self.dim):
            raise ValueError(
                f"references must have shape [{self.num_references}, {self.dim}], received {list(references.shape)}: "
                "pass those of the attention, and build both layers with as many"
            )
        with torch.autocast(x.device.type, enabled=False):
            found = self._coefficients(x.square().sum(-1), x @ references.mT, mask)
            return found[..., :1] * x + found[..., 1:] @ references

    def _coefficients(self, square_BN: Tensor, products_BNR: Tensor, mask: Tensor | None) -> Tensor:
        """φ, [B, N, 1 + R]."""
        numbers = torch.cat([square_BN[..., None] / self.dim, products_BNR * self.dim**-0.5], -1)
        found = self.down(nn.functional.gelu(self.up(numbers)))
        return found if mask is None else found.masked_fill(~mask[..., None], 0.0)


class RelationalBlock(nn.Module):
    """A pre-norm block: X + attention(norm(X)), then X + MLP(norm(X)), all relational, with one set of references.

    Args:
        dim, num_heads, num_references, causal, eps, impl: as in `RelationalAttention`.
        hidden_dim: as in `RelationalMLP`.
        generator: of the initial numbers. None: torch's global one.

    Raises:
        ValueError: a size is out of range, or there is no such implementation.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_references: int = 0,
        *,
        hidden_dim: int | None = None,
        causal: bool = False,
        eps: float = 1e-6,
        impl: str = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.norm = RelationalRMSNorm(dim, eps)
        self.attention = RelationalAttention(
            dim, num_heads, num_references, causal=causal, eps=eps, impl=impl, generator=generator
        )
        self.mlp = RelationalMLP(dim, num_references, hidden_dim, generator=generator)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, dim] → [B, N, dim]; arguments, zeros at padding and errors as in `RelationalAttention`."""
        x = _tokens(x, mask, self.attention.dim, self.attention.plain)
        x = x + self.attention.update(self.norm(x), mask)
        return x + self.mlp.update(self.norm(x), self.attention.references, mask)

    def gram(
        self, gram: Tensor, mask: Tensor | None = None, *, num_fixed: int | None = None, references: slice | None = None
    ) -> Tensor:
        """What `forward` does to the Gram matrix; as `RelationalAttention.gram`."""
        fixed, references = _fixed(num_fixed, references, self.attention.num_references)
        gram = _clean_gram(gram, mask, fixed, self.attention.plain)
        for part in (self.attention, self.mlp):
            scale = self.norm._scale(gram, fixed)
            normed = gram * scale[..., None] * scale[..., None, :]
            gram = _congruence(gram, part._mixing(normed, mask, fixed, references) * scale[..., None, :], fixed)
        return gram


def _congruence(gram_BKK: Tensor, update_BNK: Tensor, fixed: int) -> Tensor:
    """T G Tᵀ, where T adds the update to the tokens."""
    move = torch.eye(gram_BKK.shape[-1], dtype=gram_BKK.dtype, device=gram_BKK.device)
    move = move + nn.functional.pad(update_BNK, (0, 0, fixed, 0))
    return move @ gram_BKK @ move.mT


def _expect_sizes(dim: int, num_references: int, eps: float) -> None:
    if dim < 1:
        raise ValueError(f"dim must be at least 1, received {dim}")
    if num_references < 0:
        raise ValueError(f"num_references must be at least 0, received {num_references}")
    if eps < 0:
        raise ValueError(f"eps must be at least 0, received {eps}")


def _expect_alike(name: str, tensor: Tensor, parameter: Tensor) -> None:
    if (tensor.dtype, tensor.device) != (parameter.dtype, parameter.device) or tensor.dtype not in (
        torch.float32,
        torch.float64,
    ):
        raise ValueError(
            f"{name} and the parameters must both be float32, or both float64, on one device, received {tensor.dtype} "
            f"on {tensor.device} and {parameter.dtype} on {parameter.device}: convert with .to()"
        )


def _expect_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"mask must be bool [B, N] = {list(shape)}, true where there is a token, received {mask.dtype} "
            f"{list(mask.shape)}"
        )


def _tokens(x: Tensor, mask: Tensor | None, dim: int, parameter: Tensor) -> Tensor:
    """The tokens, checked, with zeros at padding."""
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"x must have shape [B, N, dim] with dim of {dim}, received {list(x.shape)}")
    _expect_alike("x", x, parameter)
    if mask is None:
        return x
    _expect_mask(mask, x.shape[:2])
    return x.masked_fill(~mask[..., None], 0.0)


def _fixed(num_fixed: int | None, references: slice | None, num_references: int) -> tuple[int, slice]:
    fixed = num_references if num_fixed is None else num_fixed
    references = slice(num_references) if references is None else references
    if fixed < 0 or len(range(fixed)[references]) != num_references:
        raise ValueError(
            f"the layer has {num_references} references, but num_fixed={fixed} and references={references} give "
            f"{len(range(max(fixed, 0))[references])}: say which of the fixed vectors are its own"
        )
    return fixed, references


def _clean_gram(gram: Tensor, mask: Tensor | None, fixed: int, parameter: Tensor | None) -> Tensor:
    """The Gram matrix, checked, with zeros at padding."""
    if gram.ndim != 3 or gram.shape[1] != gram.shape[2] or gram.shape[1] < fixed:
        raise ValueError(
            f"gram must have shape [B, K, K], of {fixed} fixed vectors and then the tokens, received {list(gram.shape)}"
        )
    _expect_alike("gram", gram, gram if parameter is None else parameter)
    if mask is None:
        return gram
    _expect_mask(mask, (gram.shape[0], gram.shape[1] - fixed))
    hidden = nn.functional.pad(~mask, (fixed, 0))
    return gram.masked_fill(hidden[:, None] | hidden[..., None], 0.0)
