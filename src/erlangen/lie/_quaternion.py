"""Unit quaternions, scalar first: w, x, y, z."""

import torch
from torch import Tensor


def from_matrix(matrix: Tensor, scale: Tensor | None = None) -> Tensor:
    """The quaternion with w >= 0 of a rotation, or of ``scale`` times one: [..., 3, 3] -> [..., 4].

    Each column of 4 q qᵀ is linear in the matrix. The one with the largest diagonal entry is at least twice as long as
    a unit vector, so dividing by its length is safe, and no square root is taken of a difference (the four branches of
    Shepperd's method in one).
    """
    m = matrix
    s = torch.ones_like(m[..., 0, 0]) if scale is None else scale
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    diagonal = torch.stack([s + xx + yy + zz, s + xx - yy - zz, s - xx + yy - zz, s - xx - yy + zz], -1)
    entries = [
        *(diagonal[..., 0], wx, wy, wz),
        *(wx, diagonal[..., 1], xy, xz),
        *(wy, xy, diagonal[..., 2], yz),
        *(wz, xz, yz, diagonal[..., 3]),
    ]
    columns = torch.stack(entries, -1).unflatten(-1, (4, 4))
    best = diagonal.argmax(-1)[..., None, None].expand(*diagonal.shape[:-1], 1, 4)
    column = columns.gather(-2, best).squeeze(-2)
    q = column / column.norm(dim=-1, keepdim=True)
    return torch.where(q[..., :1] < 0, -q, q)


def to_matrix(quaternion: Tensor) -> Tensor:
    """The rotation of a unit quaternion: [..., 4] -> [..., 3, 3]."""
    w, x, y, z = quaternion.unbind(-1)
    entries = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """The product a b: [..., 4] each, broadcast."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        -1,
    )
