"""Converters and files: against SciPy, and on real pose graphs and trajectories."""

import builtins
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from lie_cases import DTYPES, PI, assert_close, tangent
from scipy.spatial.transform import RigidTransform, Rotation

from erlangen.lie import SE2, SE3, SO3, convert

in_both_precisions = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


@pytest.fixture
def pose_data() -> Path:
    """The folder of real pose files."""
    if "ERLANGEN_DATA" not in os.environ:
        pytest.skip("ERLANGEN_DATA is not set: no real pose files")
    return Path(os.environ["ERLANGEN_DATA"]) / "pose"


@in_both_precisions
def test_quaternions_against_scipy(dtype):
    for angle in (0.0, 1e-7, 1e-3, 1.0, PI - 1e-6, PI):
        rotation = SO3.exp(tangent(SO3, 1, angle, 0, 0, dtype, batch=10))
        xyzw, wxyz = convert.matrix_to_quaternion_xyzw(rotation), convert.matrix_to_quaternion_wxyz(rotation)
        assert torch.equal(xyzw.roll(1, -1), wxyz) and (wxyz[:, 0] >= 0).all()
        assert_close(xyzw.norm(dim=-1), torch.ones(10), 1, 4)
        assert_close(convert.quaternion_xyzw_to_matrix(xyzw), rotation, 1, 16)
        assert_close(convert.quaternion_wxyz_to_matrix(-wxyz * 1.01), rotation, 1, 16)
        theirs = torch.from_numpy(Rotation.from_quat(xyzw.double().numpy()).as_matrix())
        assert_close(convert.quaternion_xyzw_to_matrix(xyzw), theirs, 1, 8)
        vector = convert.matrix_to_rotation_vector(rotation)
        assert_close(convert.rotation_vector_to_matrix(vector), rotation, 1, 16)


def test_quaternions_that_stand_for_nothing():
    for bad in ([0.0, 0.0, 0.0, 0.0], [float("nan"), 0.0, 0.0, 1.0], [float("inf"), 0.0, 0.0, 1.0]):
        with pytest.raises(ValueError, match="zero or not finite"):
            convert.quaternion_xyzw_to_matrix(torch.tensor([bad, [0.0, 0.0, 0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"\[\.\.\., 4\], received \[3\]"):
        convert.quaternion_wxyz_to_matrix(torch.ones(3))
    tiny = torch.tensor([0.0, 1e-30, 0.0, 1e-30])
    assert_close(convert.quaternion_xyzw_to_matrix(tiny), SO3.exp(torch.tensor([0.0, PI / 2, 0.0])), 1, 8)


def test_scipy_rigid_transform():
    xi = torch.cat([tangent(SE3, k, angle, 0, 3.0, torch.float64) for k, angle in enumerate((0, 1e-5, 1.0, 3.0))])
    theirs = RigidTransform.from_exp_coords(xi.numpy())
    assert_close(SE3.exp(xi), torch.from_numpy(theirs.as_matrix()), 10, 16)
    assert_close(SE3.log(SE3.exp(xi)), torch.from_numpy(theirs.as_exp_coords()), 10, 64)
    ours = convert.se3_to_scipy(SE3.exp(xi))
    assert np.allclose(ours.as_matrix(), theirs.as_matrix(), atol=1e-13)
    assert_close(convert.se3_from_scipy(ours), SE3.exp(xi), 10, 16)
    assert convert.se3_from_scipy(ours[0]).shape == (4, 4)


def test_scipy_is_asked_for_by_name(monkeypatch):
    real = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ImportError, match=r"pip install 'scipy>=1\.16'"):
        convert.se3_to_scipy(SE3.identity())


# --- files ------------------------------------------------------------------------------------------------------------

COUNTS = {
    "intel.g2o": (SE2, 1728, 2512),
    "MIT.g2o": (SE2, 808, 827),
    "kitti_00.g2o": (SE2, 0, 4677),
    "smallGrid3D.g2o": (SE3, 125, 297),
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_pose_graphs(pose_data, tmp_path, name):
    graph = convert.read_g2o(pose_data / name)
    group, num_vertices, num_edges = COUNTS[name]
    assert (graph.group, len(graph.ids), len(graph.edges)) == (group, num_vertices, num_edges)
    group.check(graph.poses)
    group.check(graph.measurements)
    information = graph.information_translation_first
    assert torch.equal(information, information.mT) and torch.linalg.eigvalsh(information).min() > 0
    convert.write_g2o(tmp_path / name, graph)
    again = convert.read_g2o(tmp_path / name)
    assert torch.equal(again.information_translation_first, information) and torch.equal(again.edges, graph.edges)
    assert torch.equal(again.ids, graph.ids)
    assert_close(again.poses, graph.poses, 1 + graph.poses.abs(), 8)
    assert_close(again.measurements, graph.measurements, 1 + graph.measurements.abs(), 8)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_measurements_are_relative_poses(pose_data):
    """Along the odometry the vertices of parking-garage were initialised from the measurements."""
    graph = convert.read_g2o(pose_data / "parking-garage.g2o")
    index = {i: k for k, i in enumerate(graph.ids.tolist())}
    a, b = (torch.tensor([index[i] for i in column]) for column in graph.edges.T.tolist())
    odometry = b == a + 1
    residual = SE3.log(SE3.relative(graph.measurements, SE3.relative(graph.poses[a], graph.poses[b])))[odometry]
    assert residual.norm(dim=-1).median() < 0.1
    wrong = SE3.log(SE3.relative(graph.measurements, SE3.relative(graph.poses[b], graph.poses[a])))[odometry]
    assert wrong.norm(dim=-1).median() > 1


def test_real_trajectory(pose_data, tmp_path):
    poses = convert.read_kitti(pose_data / "kitti_00_gt.txt")
    assert poses.shape == (4541, 4, 4)
    SE3.check(poses)
    raw = torch.from_numpy(np.loadtxt(pose_data / "kitti_00_gt.txt", max_rows=100)).unflatten(-1, (3, 4))
    assert (poses[:100, :3] - raw).abs().max() < 2e-6
    convert.write_kitti(tmp_path / "out.txt", poses)
    assert_close(convert.read_kitti(tmp_path / "out.txt"), poses, 1, 8)


GOOD = "VERTEX_SE2 0 1 2 0.5\n# comment\n\nVERTEX_SE2 1 0 0 0\nFIX 0\nEDGE_SE2 0 1 1 0 0 1 0 0 1 0 1\n"
VERTEX3, EDGE3 = "VERTEX_SE3:QUAT 0 0 0 0 0 0 0 ", "EDGE_SE3:QUAT 0 1 0 0 0 0 0 0 1 " + " ".join(["1"] * 20)


def test_small_pose_graph(tmp_path):
    path = tmp_path / "good.g2o"
    path.write_text(GOOD)
    graph = convert.read_g2o(path)
    assert graph.ids.tolist() == [0, 1] and graph.edges.tolist() == [[0, 1]] and graph.fixed.tolist() == [0]
    assert_close(SE2.log(graph.poses[0])[0], torch.tensor(0.5), 1, 4)
    assert graph.poses[0, :2, 2].tolist() == [1, 2]
    path.write_text(VERTEX3 + "1.005\n")
    assert torch.equal(convert.read_g2o(path).poses[0], torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "VERTEX_SE2 2 0 0\n", r"bad.g2o:7: VERTEX_SE2 has 4 numbers, received 3"),
        (GOOD + "VERTEX_SE2 1 0 0 0\n", r"bad.g2o:7: vertex 1 is given twice"),
        (GOOD + "VERTEX_SE2 x 0 0 0\n", r"bad.g2o:7: invalid literal for int"),
        (GOOD + "VERTEX_SE2 2 0 y 0\n", r"bad.g2o:7: could not convert string to float"),
        (GOOD + "VERTEX_SE2 2 0 nan 0\n", r"bad.g2o:7: a number is not finite"),
        (GOOD + "VERTEX_XY 2 0 0\n", r"bad.g2o:7: VERTEX_XY is not supported; there are FIX, VERTEX_SE2"),
        (GOOD + VERTEX3 + "1\n", r"bad.g2o:7: VERTEX_SE3:QUAT is of SE3, but the lines before are of SE2"),
        (VERTEX3 + "0\n", r"bad.g2o:1: the quaternion has length 0; it should be 1"),
        (VERTEX3 + "1.2\n", r"bad.g2o:1: the quaternion has length 1.2; it should be 1"),
        (EDGE3 + "\n", r"bad.g2o:1: EDGE_SE3:QUAT has 30 numbers, received 29"),
        ("# nothing\n", r"bad.g2o: there is no vertex and no edge"),
    ],
)
def test_malformed_pose_graphs(tmp_path, text, message):
    (tmp_path / "bad.g2o").write_text(text)
    with pytest.raises(ValueError, match=message):
        convert.read_g2o(tmp_path / "bad.g2o")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0 0 0 0 1 0 0 0 0 1 0\n1 2 3\n", r"bad.txt:2: a pose has 12 numbers, received 3"),
        ("1 0 0 0 0 1 0 0 0 0 1 z\n", r"bad.txt:1: could not convert"),
        ("1 0 0 0 0 1 0 0 0 0 1 0\n\n1 0 0 0 0 1 0 0 0 0 1.1 0\n", r"bad.txt:3: not a rotation: .* 2.1e-01"),
        ("1 0 0 0 0 1 0 0 0 0 -1 0\n", r"bad.txt:1: not a rotation"),
        ("\n", r"bad.txt: there is no pose"),
    ],
)
def test_malformed_trajectories(tmp_path, text, message):
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        convert.read_kitti(tmp_path / "bad.txt")


def test_writers_refuse_what_is_off_the_group(tmp_path):
    with pytest.raises(ValueError, match="call project"):
        convert.write_kitti(tmp_path / "x.txt", 2 * torch.eye(4)[None])
    with pytest.raises(ValueError, match=r"\[N, 4, 4\], received \[4, 4\]"):
        convert.write_kitti(tmp_path / "x.txt", torch.eye(4))
    (tmp_path / "good.g2o").write_text(GOOD)
    graph = convert.read_g2o(tmp_path / "good.g2o")
    wrong = convert.PoseGraph(**{**vars(graph), "edges": graph.edges[:0]})
    with pytest.raises(ValueError, match=r"measurements should be \[0, 3, 3\], received \[1, 3, 3\]"):
        convert.write_g2o(tmp_path / "x.g2o", wrong)
    assert not (tmp_path / "x.g2o").exists() and not (tmp_path / "x.txt").exists()
