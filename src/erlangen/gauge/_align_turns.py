"""What may still turn within a head once its form is fixed, and the best turn of one head towards another."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._fold import Frame
from .layout import Rotary

_OPEN = 1e-12  # share of the largest singular value below which a direction is open
_WIDE = 512  # width from which a polar factor is found by inverses
_STEPS = 30  # of them, at most
_STEEP = 1e10  # condition beyond which it is found from singular vectors all the same


@dataclass(frozen=True)
class Turns:
    """A group of orthogonal matrices [width, width], a product over blocks of coordinates.

    Attributes:
        width: of a slice.
        whole: coordinates that turn together, by all rotations and reflections: int64 [n], or None.
        planes: pairs of coordinates, each turned by an angle of its own: int64 [n, 2], or None.
        flips: classes of coordinates that change sign together: int64 [width], the class of each; or None. Where no
            block holds a coordinate, it stays.
    """

    width: int
    whole: Tensor | None = None
    planes: Tensor | None = None
    flips: Tensor | None = None

    @classmethod
    def fixed(cls, width: int) -> "Turns":
        """The identity alone."""
        return cls(width)

    @classmethod
    def all(cls, width: int) -> "Turns":
        """All of O(width)."""
        return cls(width, whole=torch.arange(width))

    @classmethod
    def beside_positions(cls, width: int, rotary: Rotary | None) -> "Turns":
        """Angles on the planes that positions turn, O(n) on the rest."""
        if rotary is None or not rotary.dim:
            return cls.all(width)
        whole = torch.arange(rotary.dim, width) if rotary.dim < width else None
        return cls(width, whole=whole, planes=rotary.planes())

    @classmethod
    def signs(cls, width: int, rotary: Rotary | None) -> "Turns":
        """Signs, one for both coordinates of a plane."""
        label = torch.arange(width)
        if rotary is not None and rotary.dim:
            planes = rotary.planes()
            label[planes[:, 1]] = planes[:, 0]
        return cls(width, flips=label)

    def _angle_parts(self, overlap: Tensor) -> tuple[Tensor, Tensor]:
        assert self.planes is not None
        one, two = self.planes.unbind(1)
        return (
            overlap[..., one, one] + overlap[..., two, two],
            overlap[..., two, one] - overlap[..., one, two],
        )

    def _class_sums(self, overlap: Tensor) -> Tensor:
        """[..., width]: the sum over each class, at the place of its label."""
        assert self.flips is not None
        diagonal = overlap.diagonal(dim1=-2, dim2=-1)
        return torch.zeros_like(diagonal).index_add(-1, self.flips, diagonal)

    def gain(self, overlap: Tensor) -> Tensor:
        """The largest ⟨A, O B⟩ over the turns O, for overlaps A Bᵀ [..., width, width] -> [...]."""
        if self.flips is not None:
            return self._class_sums(overlap).abs().sum(dim=-1)
        total = overlap.new_zeros(overlap.shape[:-2])
        if self.whole is None and self.planes is None:
            return overlap.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        if self.whole is not None:
            part = overlap[..., self.whole[:, None], self.whole]
            total = total + torch.linalg.svdvals(part).sum(dim=-1)
        if self.planes is not None:
            cosine, sine = self._angle_parts(overlap)
            total = total + torch.hypot(cosine, sine).sum(dim=-1)
        return total

    def best(self, overlap: Tensor) -> Tensor:
        """The turn O of largest ⟨A, O B⟩, for overlaps A Bᵀ [..., width, width]."""
        turn = torch.eye(self.width, dtype=overlap.dtype).expand(overlap.shape).clone()
        if self.flips is not None:
            sums = self._class_sums(overlap)[..., self.flips]
            return torch.where(sums < 0, -1.0, 1.0).to(overlap.dtype).diag_embed()
        if self.whole is not None:
            turn[..., self.whole[:, None], self.whole] = polar(overlap[..., self.whole[:, None], self.whole])
        if self.planes is not None:
            cosine, sine = self._angle_parts(overlap)
            size = torch.hypot(cosine, sine)
            alive = size > 0
            size = size.where(alive, torch.ones_like(size))
            cosine, sine = torch.where(alive, cosine / size, 1.0), torch.where(alive, sine / size, 0.0)
            one, two = self.planes.unbind(1)
            turn[..., one, one] = turn[..., two, two] = cosine
            turn[..., two, one], turn[..., one, two] = sine, -sine
        return turn

    def product_inner(self, first: Tensor, second: Tensor) -> Tensor:
        """⟨A₁ᵀ A₂, B₁ᵀ B₂⟩ from the overlaps A₁ B₁ᵀ and A₂ B₂ᵀ, [..., width, width] each; planes count one by one."""
        if self.planes is None:
            return (first * second).sum(dim=(-2, -1))
        one, two = self._angle_parts(first), self._angle_parts(second)
        total = (one[0] * two[0] + one[1] * two[1]).sum(dim=-1)
        if self.whole is not None:
            index = self.whole[:, None], self.whole
            total = total + (first[(..., *index)] * second[(..., *index)]).sum(dim=(-2, -1))
        return total


def inverse(frame: Frame) -> Frame:
    """The change of frame that undoes another."""
    if frame.matrix is not None:
        return Frame(matrix=frame.matrix.mT)
    if frame.order is not None and frame.sign is not None:
        order = frame.order.argsort()
        return Frame(order=order, sign=frame.sign[order])
    return frame


def polar(overlap: Tensor) -> Tensor:
    """The orthogonal matrix O of largest trace of Oᵀ · overlap, [..., n, n].

    Where the overlap leaves directions open, those stay as near as may be to where they were.
    """
    if overlap.ndim == 2 and len(overlap) >= _WIDE:
        found = _polar_by_inverses(overlap)
        if found is not None:
            return found
    u, values, vh = torch.linalg.svd(overlap)
    largest = values[..., :1].clamp_min(torch.finfo(overlap.dtype).tiny)
    if (values <= _OPEN * largest).any():
        eye = torch.eye(overlap.shape[-1], dtype=overlap.dtype)
        u, _, vh = torch.linalg.svd(overlap + _OPEN * largest[..., None] * eye)
    return u @ vh


def _polar_by_inverses(matrix: Tensor) -> Tensor | None:
    """The polar factor of a matrix [n, n], in less memory than its singular vectors take.

    Newton's iteration X -> (γ X + X⁻ᵀ / γ) / 2 with scales γ (Higham, Computing the polar decomposition, 1986).

    Returns:
        None where the matrix is too near to a singular one.
    """
    found, root, excess = matrix.clone(), len(matrix) ** 0.5, torch.inf
    for step in range(_STEPS):
        other, singular = torch.linalg.inv_ex(found)
        sizes = found.norm().item(), other.norm().item()
        if singular.item() or (not step and sizes[0] * sizes[1] > _STEEP):
            return None
        scale = (sizes[1] / sizes[0]) ** 0.5 if excess > 0.01 else 1.0
        found.mul_(scale / 2).add_(other.mT, alpha=0.5 / scale)
        del other
        if excess < 1e-12:  # the mean of (s² − 1) / 2 over singular values s, before this step; steps are quadratic
            return found
        excess = found.norm().item() / root - 1
    return None
