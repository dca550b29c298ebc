r"""The way back from folded weights: norms, biases and means as another model stores them.

`_fold` takes out of the weights what no output shows: gains and biases of norms, means that layer norms take off. Here
the numbers of a model put them back: its gain is divided out of the rows, W = (F + m 1ᵀ) diag(γ)⁻¹, its bias off their
constants, b = b_F − W β, and the means m are those that its own rows have.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._fold import Fold, Reading, stored_gain
from ._weights import ReadWeights
from .layout import Norm

_LARGE = 2.0  # times larger than others rows may become so that a norm keeps its bias
_SMALL = 1e-6  # share of the largest gain below which a gain is not divided by


@dataclass
class Unfold:
    """A norm that is read, with the numbers with which it is stored.

    Attributes:
        fold: how it is treated.
        gain, bias: as they are to be stored, float64 [dim] or None.
        scale: of the gain of a norm of sums, multiplied back.
        unseen: orthonormal directions [n, dim] that a map behind a norm of sums cannot see, or None.
    """

    fold: Fold
    gain: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    unseen: Tensor | None = None

    @classmethod
    def of(cls, reading: Reading, notes: list[str]) -> "Unfold":
        """With the numbers of a model, of which ``reading`` is made. ``notes`` hears what cannot be put back."""
        fold, norm = reading.fold, reading.fold.norm
        if norm is None or fold.kind == "kept":
            return cls(fold)
        if fold.kind == "after":
            return cls(fold, None, reading.bias, reading.scale)
        gain, bias = reading.gain, reading.bias
        if gain is not None and bool((gain.abs() <= _SMALL * gain.abs().max()).any()):
            notes.append(f"{norm.path} has gains near 0, by which nothing can be divided: its gains are 1.")
            if fold.ones and bias is not None:
                bias = torch.ones_like(bias)
            gain = torch.ones_like(gain)
        return cls(fold, gain, bias)

    @property
    def plain(self) -> "Unfold":
        """The same with gain and bias 1, where constants stand on means: they carry any constant."""
        ones = None if self.bias is None else torch.ones_like(self.bias)
        return replace(self, gain=None if self.gain is None else ones, bias=ones)

    def carries(self, pieces: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> bool:
        """Whether the norm's bias carries the constants of rows without making the rows large.

        Args:
            pieces: arguments of `rows`.
        """
        if not self.fold.ones or self.bias is None:
            return True
        sizes = torch.zeros(3, dtype=torch.float64)
        for folded, own, constant in pieces:
            new = self.rows(folded, own, constant)
            sizes += torch.stack([part.square().sum() for part in (new, folded, own)])
        return bool(sizes[0] <= _LARGE**2 * sizes[1:].max())

    def rows(self, folded: Tensor, own: Tensor | None = None, constant: Tensor | None = None) -> Tensor:
        """Rows [..., dim] as they are stored, from folded ones.

        Args:
            folded: as `Reading.rows` gives them.
            own: stored rows of the model to whose numbers they go, in whose means and unseen parts they are left; None:
                without.
            constant: [...], what the rows are to give to a constant input, where constants stand on means; None: what
                the folded ones give.
        """
        fold, norm = self.fold, self.fold.norm
        if norm is None or fold.kind == "kept":
            return folded
        if fold.kind == "after":
            rows = folded / self.scale
            if own is not None and self.unseen is not None:
                rows = rows + (own @ self.unseen.mT) @ self.unseen
            return rows
        gain = folded.new_ones(folded.shape[-1]) if self.gain is None else self.gain
        if fold.ones and self.bias is not None:
            constant = folded.sum(dim=-1) if constant is None else constant
            centred = folded - folded.mean(dim=-1, keepdim=True)
            ratio = self.bias / gain
            free = (constant - centred @ ratio) / ratio.sum()
            return (centred + free[..., None]) / gain
        if norm.kind == "layer" and own is not None:
            folded = folded + (own * gain).mean(dim=-1, keepdim=True)
        return folded / gain

    def constant(self, rows: Tensor) -> Tensor | None:
        """What the norm's bias adds to the bias [...] of a map with these stored rows. None: nothing."""
        if self.bias is None or self.fold.ones or self.fold.kind == "kept":
            return None
        return rows @ self.bias

    def tensors(self, gain: Tensor | None) -> dict[str, Tensor]:
        """The norm's tensors as they are to be stored.

        Args:
            gain: of a norm of sums, with its scale taken out.
        """
        fold, norm, found = self.fold, self.fold.norm, {}
        if norm is None or fold.kind == "kept":
            return found
        stored = self.gain if fold.kind == "before" else None if gain is None else gain * self.scale
        if norm.weight is not None and stored is not None:
            found[norm.weight] = stored - norm.offset
        if norm.bias_name is not None and self.bias is not None:
            found[norm.bias_name] = self.bias
        return found


def mean_of(rows: Tensor, own: Tensor, centred: bool) -> Tensor:
    """Rows that are written, without a mean, with that of other rows where it does not count."""
    return rows + own.mean(dim=-1, keepdim=True) if centred else rows


def latent_gain(weights: ReadWeights, norm: Norm, notes: list[str]) -> Tensor | None:
    """The gain of a latent's norm by which readers can be divided; None: ones."""
    gain = stored_gain(weights, norm)
    if gain is not None and bool((gain.abs() <= _SMALL * gain.abs().max()).any()):
        notes.append(f"{norm.path} has gains near 0, by which nothing can be divided: its gains are 1.")
        return None
    return gain
