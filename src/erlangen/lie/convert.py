"""To and from the poses of other libraries and files; the order of numbers is in each name.

Rotation vectors and SE(3) tangent vectors need no converter: ``SO3.exp`` takes a rotation vector, and the coordinates
of SE(3), rotation first, are the exponential coordinates of SciPy's ``RigidTransform``. Poses from quaternions and
translations: ``SE3.assemble(quaternion_xyzw_to_matrix(q), t)``.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from . import _quaternion
from .affine import Affine
from .groups import SE2, SE3, SO2, SO3

if TYPE_CHECKING:
    from scipy.spatial.transform import RigidTransform

_Number = TypeVar("_Number", int, float)

_SE3_TOLERANCE = 1e-3  # of rotation matrices in text: they are written with 4 digits or more
_QUATERNION_TOLERANCE = 1e-2


def quaternion_wxyz_to_matrix(quaternion_wxyz: Tensor) -> Tensor:
    """Rotations from quaternions, scalar first, of any length but zero: [..., 4] -> [..., 3, 3].

    Raises:
        ValueError: the last dimension is not 4, or a quaternion is zero or not finite.
    """
    q = quaternion_wxyz
    if q.shape[-1:] != (4,):
        raise ValueError(f"quaternions are [..., 4], received {list(q.shape)}")
    largest = q.detach().abs().amax(-1, keepdim=True)
    if not bool(((largest > 0) & largest.isfinite()).all()):
        raise ValueError("a quaternion is zero or not finite; it stands for no rotation")
    q = q / largest  # so that the length neither overflows nor underflows
    return _quaternion.to_matrix(q / q.norm(dim=-1, keepdim=True))


def quaternion_xyzw_to_matrix(quaternion_xyzw: Tensor) -> Tensor:
    """Rotations from quaternions, scalar last as in SciPy, ROS and g2o: see ``quaternion_wxyz_to_matrix``."""
    return quaternion_wxyz_to_matrix(quaternion_xyzw.roll(1, -1))


def matrix_to_quaternion_wxyz(rotation: Tensor) -> Tensor:
    """Unit quaternions with w >= 0, scalar first, of rotations: [..., 3, 3] -> [..., 4]."""
    SO3._require_elements(rotation)
    return _quaternion.from_matrix(rotation)


def matrix_to_quaternion_xyzw(rotation: Tensor) -> Tensor:
    """Unit quaternions with w >= 0, scalar last, of rotations: [..., 3, 3] -> [..., 4]."""
    return matrix_to_quaternion_wxyz(rotation).roll(-1, -1)


def rotation_vector_to_matrix(rotation_vector: Tensor) -> Tensor:
    """Rotations by |v| radians about v: [..., 3] -> [..., 3, 3]; ``SO3.exp``."""
    return SO3.exp(rotation_vector)


def matrix_to_rotation_vector(rotation: Tensor) -> Tensor:
    """Rotation vectors of length up to π: [..., 3, 3] -> [..., 3]; ``SO3.log``."""
    return SO3.log(rotation)


def se3_to_scipy(poses: Tensor) -> "RigidTransform":
    """SciPy's ``RigidTransform`` of elements of SE(3): [4, 4] or [N, 4, 4]. Its rotations are normalised by SciPy."""
    SE3.check(poses)
    return _rigid_transform().from_matrix(poses.detach().cpu().numpy())


def se3_from_scipy(transform: "RigidTransform") -> Tensor:
    """Elements of SE(3), float64, from a SciPy ``RigidTransform``: [4, 4] or [N, 4, 4]."""
    return torch.as_tensor(transform.as_matrix(), dtype=torch.float64)


def _rigid_transform() -> "type[RigidTransform]":
    try:
        from scipy.spatial.transform import RigidTransform
    except ImportError as error:
        raise ImportError("this needs SciPy 1.16 or newer: pip install 'scipy>=1.16'") from error
    return RigidTransform


@dataclass(frozen=True, kw_only=True)
class PoseGraph:
    """What a g2o file holds: V poses, known by their ids, and E measured relative poses between them.

    Attributes:
        group: SE2 or SE3.
        ids: [V] int64, in the order of the file. A file may have edges only, V = 0.
        poses: [V, m, m] float64.
        edges: [E, 2] int64, the ids of a and b.
        measurements: [E, m, m] float64, of ``group.relative(pose of a, pose of b)``.
        information_translation_first: [E, dim, dim] float64, inverse covariances in the coordinates of the file, which
            are **not** our tangent coordinates: x, y, θ or x, y, z and the vector part of the quaternion.
        fixed: [F] int64, ids of the poses held fixed.
    """

    group: Affine
    ids: Tensor
    poses: Tensor
    edges: Tensor
    measurements: Tensor
    information_translation_first: Tensor
    fixed: Tensor


def read_g2o(path: str | os.PathLike[str]) -> PoseGraph:
    """Read a pose graph: VERTEX_SE2, EDGE_SE2, or VERTEX_SE3:QUAT, EDGE_SE3:QUAT, and FIX.

    Quaternions are normalised. Blank lines and lines that begin with # are skipped.

    Raises:
        ValueError: with file and line, of a line that is malformed, of another kind or another group than the first, of
            a quaternion further than 1% from unit length, or of an id given twice; or a file without poses and edges.
    """
    path = Path(path)
    group: Affine | None = None
    vertices: dict[int, list[float]] = {}
    edges: list[list[int]] = []
    measured: list[list[float]] = []
    fixed: list[int] = []
    for line, words in _lines(path):
        tag, words = words[0], words[1:]
        if tag == "FIX":
            fixed += _numbers(path, line, words, int)
            continue
        if tag not in _G2O:
            raise ValueError(f"{path}:{line}: {tag} is not supported; there are FIX, {', '.join(_G2O)}")
        found, num_ids, num_values = _G2O[tag]
        if group not in (None, found):
            raise ValueError(f"{path}:{line}: {tag} is of {found}, but the lines before are of {group}")
        group = found
        if len(words) != num_ids + num_values:
            raise ValueError(f"{path}:{line}: {tag} has {num_ids + num_values} numbers, received {len(words)}")
        ids = _numbers(path, line, words[:num_ids], int)
        values = _numbers(path, line, words[num_ids:], float)
        if group == SE3:
            length = sum(x * x for x in values[3:7]) ** 0.5
            if not abs(length - 1) <= _QUATERNION_TOLERANCE:
                raise ValueError(f"{path}:{line}: the quaternion has length {length:.6g}; it should be 1")
        if num_ids == 2:
            edges.append(ids)
            measured.append(values)
        elif ids[0] in vertices:
            raise ValueError(f"{path}:{line}: vertex {ids[0]} is given twice")
        else:
            vertices[ids[0]] = values
    if group is None:
        raise ValueError(f"{path}: there is no vertex and no edge")
    num_values, dim = _G2O[f"VERTEX_{_SUFFIX[group]}"][2], group.dim
    upper = torch.triu_indices(dim, dim)
    values = _tensor(measured, num_values + upper.shape[1])
    information = torch.zeros(len(edges), dim, dim, dtype=torch.float64)
    information[:, upper[0], upper[1]] = values[:, num_values:]
    information[:, upper[1], upper[0]] = values[:, num_values:]
    return PoseGraph(
        group=group,
        ids=torch.tensor(list(vertices), dtype=torch.int64),
        poses=_poses_from_numbers(group, _tensor(list(vertices.values()), num_values)),
        edges=torch.tensor(edges, dtype=torch.int64).reshape(-1, 2),
        measurements=_poses_from_numbers(group, values[:, :num_values]),
        information_translation_first=information,
        fixed=torch.tensor(fixed, dtype=torch.int64),
    )


def write_g2o(path: str | os.PathLike[str], graph: PoseGraph) -> None:
    """Write a pose graph, with all digits of float64; the file appears when it is complete.

    Raises:
        ValueError: a group other than SE2 and SE3, poses off the group, or shapes that do not agree.
    """
    group, num_vertices, num_edges = graph.group, len(graph.ids), len(graph.edges)
    if group not in _SUFFIX:
        raise ValueError(f"g2o holds poses of SE2 and SE3, received {group}")
    shapes = {
        "poses": (graph.poses, (num_vertices, group.matrix_size, group.matrix_size)),
        "edges": (graph.edges, (num_edges, 2)),
        "measurements": (graph.measurements, (num_edges, group.matrix_size, group.matrix_size)),
        "information_translation_first": (graph.information_translation_first, (num_edges, group.dim, group.dim)),
    }
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} should be {list(shape)}, received {list(tensor.shape)}")
    group.check(graph.poses)
    group.check(graph.measurements)
    suffix, upper = _SUFFIX[group], torch.triu_indices(group.dim, group.dim)
    information = graph.information_translation_first[:, upper[0], upper[1]].double()
    poses = _numbers_from_poses(group, graph.poses)
    measured = torch.cat([_numbers_from_poses(group, graph.measurements), information], -1)
    lines = [f"VERTEX_{suffix} {i} {_text(row)}" for i, row in zip(graph.ids.tolist(), poses.tolist())]
    lines += [f"FIX {i}" for i in graph.fixed.tolist()]
    lines += [f"EDGE_{suffix} {a} {b} {_text(row)}" for (a, b), row in zip(graph.edges.tolist(), measured.tolist())]
    _write(Path(path), lines)


def read_kitti(path: str | os.PathLike[str]) -> Tensor:
    """Read poses of KITTI's odometry benchmark, a 3×4 matrix [R | t] a line: [N, 4, 4] float64, elements of SE(3).

    The rotations of such files have about 7 digits; each is replaced by the nearest rotation.

    Raises:
        ValueError: with file and line, of a line that is malformed or further than 1e-3 from a rotation; or no line.
    """
    path = Path(path)
    numbers, rows = [], []
    for line, words in _lines(path):
        if len(words) != 12:
            raise ValueError(f"{path}:{line}: a pose has 12 numbers, received {len(words)}")
        numbers.append(line)
        rows.append(_numbers(path, line, words, float))
    if not rows:
        raise ValueError(f"{path}: there is no pose")
    matrix = torch.tensor(rows, dtype=torch.float64).unflatten(-1, (3, 4))
    rotation, translation = matrix[..., :3], matrix[..., 3]
    deviation, _ = SO3._deviation(rotation)
    worst = int(deviation.argmax())
    if deviation[worst] > _SE3_TOLERANCE:
        raise ValueError(f"{path}:{numbers[worst]}: not a rotation: R Rᵀ is off the identity by {deviation[worst]:.1e}")
    return SE3.assemble(SO3.project(rotation), translation)


def write_kitti(path: str | os.PathLike[str], poses: Tensor) -> None:
    """Write [N, 4, 4] elements of SE(3), a 3×4 matrix a line, with all digits; the file appears when it is complete.

    Raises:
        ValueError: a wrong shape, or poses off the group.
    """
    if poses.dim() != 3:
        raise ValueError(f"poses are [N, 4, 4], received {list(poses.shape)}")
    SE3.check(poses)
    _write(Path(path), [_text(row) for row in poses[:, :3].flatten(1).double().tolist()])


# tag -> group, number of ids, number of values
_G2O: dict[str, tuple[Affine, int, int]] = {
    "VERTEX_SE2": (SE2, 1, 3),
    "EDGE_SE2": (SE2, 2, 3 + 6),
    "VERTEX_SE3:QUAT": (SE3, 1, 7),
    "EDGE_SE3:QUAT": (SE3, 2, 7 + 21),
}
_SUFFIX = {SE2: "SE2", SE3: "SE3:QUAT"}


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and words of each line that has any, comments apart."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            words = line.split()
            if words and not words[0].startswith("#"):
                yield number, words


def _numbers(path: Path, line: int, words: list[str], kind: Callable[[str], _Number]) -> list[_Number]:
    try:
        values = [kind(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{path}:{line}: {error}") from None
    if not all(abs(value) < float("inf") for value in values):
        raise ValueError(f"{path}:{line}: a number is not finite")
    return values


def _tensor(rows: list[list[float]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, width)


def _poses_from_numbers(group: Affine, numbers: Tensor) -> Tensor:
    if group == SE2:
        return SE2.assemble(SO2.exp(numbers[:, 2:]), numbers[:, :2])
    return SE3.assemble(quaternion_xyzw_to_matrix(numbers[:, 3:]), numbers[:, :3])


def _numbers_from_poses(group: Affine, poses: Tensor) -> Tensor:
    linear, translation = group.split(poses.double())
    rotation = SO2.log(linear) if group == SE2 else matrix_to_quaternion_xyzw(linear)
    return torch.cat([translation, rotation], -1)


def _text(row: list[float]) -> str:
    return " ".join(map(repr, row))


def _write(path: Path, lines: list[str]) -> None:
    """Write under another name, then rename."""
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(part, path)
