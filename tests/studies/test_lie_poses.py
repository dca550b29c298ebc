"""The study of trajectories: interpolation against SciPy, equivariance, the bootstrap, a quick run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import RigidTransform, Rotation, Slerp

from erlangen import lie
from erlangen.studies import _jobs, _training
from erlangen.studies import lie_poses as study


def trajectory(group, count, generator):
    """A smooth one: small turns, steps of about one."""
    xi = torch.zeros(count, group.dim, dtype=torch.float64)
    xi[:, list(group.blocks["rotation"])] = 0.1
    xi += 0.03 * torch.randn(count, group.dim, generator=generator, dtype=torch.float64)
    xi[:, -group.point_dim] += 1.0
    poses = [group.identity(dtype=torch.float64)]
    for step in group.exp(xi)[1:]:
        poses.append(group.compose(poses[-1], step))
    return torch.stack(poses)


def windows(group, poses, gap, count, generator):
    return study.Windows.at(poses, *study.random_windows(len(poses), gap, count, generator))


def test_the_geodesic_is_scipys(generator):
    first, second = lie.SE3.random(2, 20, generator=generator, dtype=torch.float64)
    fraction = torch.rand(20, generator=generator, dtype=torch.float64)
    ours = study.geodesic(lie.SE3, first, second, fraction)
    for a, b, t, found in zip(first.numpy(), second.numpy(), fraction.tolist(), ours.numpy()):
        a, b = RigidTransform.from_matrix(a), RigidTransform.from_matrix(b)
        expected = a * RigidTransform.from_exp_coords(t * (a.inv() * b).as_exp_coords())
        np.testing.assert_allclose(found, expected.as_matrix(), atol=1e-10)


def test_slerp_is_scipys_and_the_line_is_straight(generator):
    first, second = lie.SE3.random(2, 20, generator=generator, dtype=torch.float64)
    fraction = torch.rand(20, generator=generator, dtype=torch.float64)
    ours = study.slerp_linear(lie.SE3, first, second, fraction)
    for a, b, t, found in zip(first.numpy(), second.numpy(), fraction.tolist(), ours.numpy()):
        turns = Slerp([0, 1], Rotation.from_matrix(np.stack([a[:3, :3], b[:3, :3]])))
        np.testing.assert_allclose(found[:3, :3], turns(t).as_matrix(), atol=1e-10)
        np.testing.assert_allclose(found[:3, 3], (1 - t) * a[:3, 3] + t * b[:3, 3], atol=1e-12)


@pytest.mark.parametrize("group", [lie.SE2, lie.SE3], ids=str)
def test_interpolation_is_exact_on_a_constant_twist_and_nearly_on_a_changing_one(group, generator):
    xi = 0.2 * torch.randn(group.dim, generator=generator, dtype=torch.float64)
    time = torch.arange(30, dtype=torch.float64)[:, None]
    constant = windows(group, group.exp(time * xi), 3, 8, generator)
    for arm in ("geodesic", "cubic"):
        errors = study.pose_errors(constant.fixed(group, arm), constant.missing)
        assert errors["metres"].max() < 1e-9 and errors["degrees"].max() < 1e-6
    assert study.pose_errors(constant.fixed(group, "slerp + linear"), constant.missing)["metres"].max() > 1e-3
    changing = windows(group, group.exp(0.01 * time**2 * xi), 3, 8, generator)
    errors = {a: study.pose_errors(changing.fixed(group, a), changing.missing)["metres"].mean() for a in study.FIXED}
    assert errors["cubic"] < 0.2 * errors["geodesic"]


def test_errors_are_metres_and_degrees():
    truth = lie.SE3.identity(1, dtype=torch.float64)
    answer = lie.SE3.exp(torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64))
    answer[:, :3, 3] = torch.tensor([3.0, 0.0, 4.0])
    errors = study.pose_errors(answer, truth)
    assert errors["metres"].item() == pytest.approx(5.0) and errors["degrees"].item() == pytest.approx(np.degrees(0.5))


def test_windows_are_around_the_gap(generator):
    for gap in study.GAPS:
        given, missing = study.random_windows(60, gap, 200, generator)
        assert given.min() >= 0 and given.max() < 60
        beside = missing[:, None] - given
        assert (beside[:, : study.CONTEXT] > 0).all() and (beside[:, study.CONTEXT :] < 0).all()
        assert (given[:, study.CONTEXT] - given[:, study.CONTEXT - 1] == gap + 1).all()
    with pytest.raises(ValueError, match="longer"):
        study.random_windows(10, 7, 1, generator)


@pytest.mark.parametrize("group", [lie.SE2, lie.SE3], ids=str)
@pytest.mark.parametrize("arm", study.LEARNED)
def test_a_learned_arm_starts_at_the_geodesic_and_only_vectors_see_the_axes(group, arm, generator):
    poses = trajectory(group, 60, generator)
    here = windows(group, poses, 3, 6, generator)
    model = _training.seeded(0, lambda: study.PoseCompletion(group, arm))
    start = study.answer(model, here, 1.0)
    torch.testing.assert_close(start, here.fixed(group, "geodesic"), rtol=0, atol=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model = model.double()
    seen, features, _, _ = study.prepare(group, here, 1.0)
    seen, features = group.project(seen.double()), features.double()
    h = group.random(6, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        moved, still = model.propose(h[:, None] @ seen, features), model.propose(seen, features)
    assert (still - seen[:, -1]).abs().max() > 1e-3
    error = (moved - h @ still).abs().max()
    assert error > 1e-2 if arm == "vectors" else error < 1e-8


@pytest.mark.parametrize("arm", ["Lie attention", "vectors, own frame"])
def test_training_learns_what_the_geodesic_cannot(arm, generator, monkeypatch):
    """The frames swing to and fro, faster than a straight line from end to end of a gap can follow."""
    time = torch.arange(80, dtype=torch.float64)
    rotation = lie.SO2.exp(0.5 * (time / 2).sin()[:, None])
    poses = lie.SE2.assemble(rotation, torch.stack([time, 0.0 * time], -1))
    monkeypatch.setattr(study, "LEARNING_RATE", 1e-2)
    models, unit = study.train(lie.SE2, arm, poses, seeds=[0], steps=60, batch_size=16)
    here = windows(lie.SE2, poses, 3, 50, generator)
    learned = study.pose_errors(study.answer(models[0], here, unit), here.missing)["degrees"].mean()
    fixed = study.pose_errors(here.fixed(lie.SE2, "geodesic"), here.missing)["degrees"].mean()
    assert learned < 0.8 * fixed


def test_the_bootstrap_keeps_blocks_together():
    rng = np.random.default_rng(0)
    blocks = np.repeat(np.arange(10), 20)
    values = rng.normal(size=10)[blocks]
    interval = study.block_bootstrap(values, blocks)
    assert interval.mean == pytest.approx(values.mean())
    alone = study.block_bootstrap(values, np.arange(200))
    # 200 values that are 10 values 20 times: the honest interval is √20 wider than the naive one
    assert (interval.high - interval.low) / (alone.high - alone.low) == pytest.approx(np.sqrt(20), rel=0.25)


def test_a_missing_trajectory_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="ERLANGEN_DATA"):
        study.run(study.quick(tmp_path / "out", tmp_path))
    with pytest.raises(ValueError, match="trajectories"):
        study.PosesConfig(trajectories=("moon",))


def test_a_quick_run_from_end_to_end_is_taken_up_again(tmp_path, generator, monkeypatch):
    pytest.importorskip("matplotlib")
    nothing = torch.zeros(0, dtype=torch.int64)
    poses = trajectory(lie.SE2, 120, generator)
    graph = lie.convert.PoseGraph(
        group=lie.SE2, ids=torch.arange(len(poses)), poses=poses, edges=nothing.reshape(0, 2),
        measurements=torch.zeros(0, 3, 3, dtype=torch.float64),
        information_translation_first=torch.zeros(0, 3, 3, dtype=torch.float64), fixed=nothing,
    )  # fmt: skip
    lie.convert.write_g2o(tmp_path / "intel.g2o", graph)
    config = replace(study.quick(tmp_path / "out", tmp_path), csv=tmp_path / "csv")
    kept, seen = config.out / "cells.jsonl", []

    def stop(done, total):
        if len(kept.read_text().splitlines()) >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run(config, stop)
    first = kept.read_text()
    path = study.run(config, lambda *counts: seen.append(counts))
    assert seen[0][0] >= 3 and seen[-1] == (3 + 3 * 5,) * 2, "what was finished is not run again"
    assert kept.read_text().startswith(first)
    page = path.read_text()
    for text in ("intel", "geodesic", "95 %", "<svg"):
        assert text in page
    data = json.loads((config.out / "lie_poses.json").read_text())
    assert len(data["cells"]) == len(kept.read_text().splitlines()) - 1 == 3 + 3 * 2
    rows = (config.csv / "lie_poses_cells.csv").read_text().splitlines()
    assert len(rows) == 1 + len(study.GAPS) * len(data["cells"])
    monkeypatch.setattr(_jobs, "ProcessPoolExecutor", None)
    study.run(config)
    with pytest.raises(ValueError, match="other settings"):
        study.run(replace(config, windows=11))
