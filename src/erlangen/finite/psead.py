"""The layer of PSEAD (arXiv 2507.14908), with projectors that are projectors.

Shape suffixes: B batch, N positions, H heads, D width of a head, M channels (isotypic components).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import broadcast_mask, expect_features, move_mask
from .groups import Element, PermutationGroup


class PSEADAttention(nn.Module):
    """Attention in each isotypic channel of the positions, summed: Y = Σ_λ softmax(P_λQ (P_λK)ᵀ / √D) P_λV, then W_O.

    The group permutes the rows of the window and nothing else: a channel of features is a number, letters are not
    touched. Q, K, V = X W + b are split into heads; P_λ is the orthogonal projector onto the part of R^N that carries
    copies of the real irrep λ. This is the layer of the official code (HEAD bee029e, ``src/psead/attention.py``) with
    one correction: there P_λ = (d_λ / |G|) Σ_h χ_λ(h) ρ(h) with χ tabulated for C_2, C_4 and D_2 and drawn at random
    for every other group. Over the reals the sum must also be divided by ⟨χ_λ, χ_λ⟩ (1, 2 or 4), and χ_λ must be a
    character. Ours comes from `PermutationGroup.projectors`, which verifies what it builds. Its dropout is left out.

    What it is: equivariant, Y(P_h X) = P_h Y(X) for each h of the group; a baseline, and the paper's method.

    What it is not:

    - Not a decomposition of attention. softmax(QKᵀ)V has the scores P_λQ (P_μK)ᵀ of different channels too, and one
      softmax; here the cross terms are gone and each channel has a softmax of its own.
    - Not aware of direction. The projectors of the rotations C_n are symmetric circulants, so that the layer of C_n is
      equivariant under the reflections of D_n as well: a word and its reverse are treated alike. The projectors are
      the only sense of position it has.
    - Not attentive in the trivial channel of a transitive action: the rows of P_1 Q are all equal, the softmax is
      uniform, and the channel is the mean of V over the window.
    - Not closed by channel: A_λ P_λ V is sure to stay in channel λ only where λ has dimension 1. With more it leaks,
      unless elements that act on λ as −1 tell it from all others (the plane of D_4, the quaternions of Q_8).
    - Not cheaper than attention: each of the M channels has N² scores.

    `EquivariantAttention` is attention with this symmetry and without these limits.

    Args:
        group: acts on the N = group.degree positions of a window.
        dim: width of the features, a multiple of num_heads.
        num_heads: heads; the group does not move them.
        generator: of the initial weights, uniform in ±1/√dim as in `torch.nn.Linear`. None: torch's global one.

    Attributes:
        channels: the irreps of the M channels, in order.

    Raises:
        ValueError: num_heads does not divide dim.
    """

    def __init__(
        self, group: PermutationGroup, dim: int, num_heads: int = 1, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, received {num_heads} heads of dim {dim}")
        self.group, self.dim, self.num_heads = group, dim, num_heads
        self.channels = group.channels()
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        # Neither parameter nor buffer: module.float().double() would round a buffer to float32.
        self._projectors_MNN = group.projectors(torch.float64)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights and biases again."""
        for parameter in self.parameters():
            parameter.uniform_(-(self.dim**-0.5), self.dim**-0.5, generator=generator)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The layer's output.

        Args:
            x: [B, N, dim].
            mask: bool [B or 1, H or 1, N or 1, N], true where row i may attend to column j; None for all. It acts on
                the scores: rows that no one attends to still enter the others through the projectors.

        Returns:
            [B, N, dim].

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        return self.output(self._attend(x, mask).sum(2).transpose(1, 2).flatten(2))

    def channel_outputs(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The terms of the sum, A_λ P_λ V before W_O: [B, N, dim] -> [B, M, N, dim]. Arguments as in `forward`."""
        return self._attend(x, mask).permute(0, 2, 3, 1, 4).flatten(3)

    def contributions(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Each channel's share of Σ_λ ‖A_λ P_λ V‖², invariant under the group: [B, N, dim] -> [B, M].

        The official code returns constants in its place. The terms of a channel with dimension above 1 are not
        orthogonal to the others, so that the shares do not add up to ‖Y‖².
        """
        energy_BM = self.channel_outputs(x, mask).square().sum((2, 3))
        return energy_BM / energy_BM.sum(1, keepdim=True)

    def act_in(self, element: Element | int, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The input moved by an element: its rows permuted, and rows and columns of the mask where there is one."""
        moved = self.act_out(element, x)
        return moved if mask is None else (moved, move_mask(self.group, element, mask))

    def act_out(self, element: Element | int, y: Tensor) -> Tensor:
        """The output moved by an element: its rows permuted, its channels left alone."""
        return self.group.permute(element, y, dim=-2)

    def extra_repr(self) -> str:
        return f"{self.group}, dim={self.dim}, num_heads={self.num_heads}"

    def _attend(self, x_BNC: Tensor, mask: Tensor | None) -> Tensor:
        """A_λ P_λ V, [B, H, M, N, D]."""
        expect_features(x_BNC, self.group, self.dim)
        projectors_MNN = self._projectors_MNN.to(x_BNC.device)
        q, k, v = (
            torch.einsum("mij,bjhd->bhmid", projectors_MNN.to(y.dtype), y.unflatten(-1, (self.num_heads, -1)))
            for y in (self.query(x_BNC), self.key(x_BNC), self.value(x_BNC))
        )
        allowed = None
        if mask is not None:
            if mask.ndim != 4:
                raise ValueError(
                    f"mask must be bool [B or 1, H or 1, N or 1, N], received {list(mask.shape)}; there is no padding "
                    "here, as the projectors mix all positions of a window"
                )
            allowed = broadcast_mask(mask, x_BNC, self.num_heads)[:, :, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
