"""Completing real trajectories: attention over poses against interpolation.

Protocol, fixed before the runs it reports:

- Data: intel (SE(2), 1728 poses) and parking-garage (SE(3), 1661) of the SE-Sync collection, the estimates of the
  vertices in the order of the file; KITTI odometry 00 (SE(3), 4541), ground truth. In the folder ``pose`` of
  ``ERLANGEN_DATA``. Trained on the first 70 % of a trajectory, tested on the last 30 %; no window crosses the border.
- Task: 1, 3 or 7 consecutive poses are missing; the four before and the four after are given, with their times; find
  one of the missing, at a known time. 120 test windows for each length of gap, the same for all; they overlap.
- Not learned: "geodesic" g_a exp(t log(g_a⁻¹ g_b)) between the poses beside the gap; "slerp + linear", rotation and
  position apart; "cubic", Lagrange's polynomial through two poses on either side, in the tangent space at the geodesic
  answer.
- Learned, all starting at the geodesic answer x and correcting it: "Lie attention", a `lie.LieTransformer` (two
  layers, four heads, width 32, no displacement) over the eight given poses and x, with the time of each from the
  missing one as features; "vectors", a transformer of the same size on matrices in the axes of the world, the origin
  moved to x, each batch turned at random, whose answer is x plus a correction, projected to the group; "vectors, own
  frame", the same on x⁻¹ g, whose answer is x exp(ξ): an invariant model too.
- Training: 300 steps of 32 windows, Adam, 3e-3 for all (not tuned), cosine schedule; loss ‖g*⁻¹ ĝ − 1‖_F with lengths
  in units of the median step of the training part. Seeds 0 to 4: initial weights and order.
- Measure: mean over test windows of the error of position in metres and of rotation in degrees; medians beside it.
  Rule: the difference of two arms has two 95 % intervals, Student's over seeds (what training leaves open) and a
  bootstrap over blocks of 30 poses of the test part (what the trajectory leaves open, errors averaged over seeds). A
  difference is called only where both leave out zero.

Shape suffixes: B windows, C given poses, G dimension of the algebra, m size of the group's matrices (written twice).
"""

import importlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from erlangen import lie, report
from erlangen._extras import require
from erlangen.lie.layers import LieTransformer, LieTransformerConfig

from ._jobs import Cells, Job, Progress, Tick, at_least_one, execute, print_progress
from ._reading import by_seed, copy_tables, verdict, with_error
from ._training import VectorBlock, fit, seeded

FILES = {"intel": "intel.g2o", "parking-garage": "parking-garage.g2o", "kitti_00": "kitti_00_gt.txt"}
GAPS = (1, 3, 7)
CONTEXT = 4
FIXED = ("geodesic", "slerp + linear", "cubic")
LEARNED = ("Lie attention", "vectors", "vectors, own frame")
ARMS = (*FIXED, *LEARNED)
LEARNING_RATE = 3e-3
DIM, NUM_HEADS = 32, 4
BLOCK = 30
MEASURES = {"metres": "position, m", "degrees": "rotation, degrees"}
PAIRS = tuple(("Lie attention", second) for second in ARMS if second != "Lie attention")


@dataclass(frozen=True, kw_only=True)
class PosesConfig:
    """How much to run; the defaults are the protocol."""

    out: Path = Path("lie_poses")
    """Folder of the report. Finished cells found in its cells.jsonl are not run again."""
    csv: Path | None = None
    """Folder for copies of the tables, lie_poses_*.csv."""
    data: Path | None = None
    """Folder of the trajectories; None for the folder pose of ERLANGEN_DATA."""
    trajectories: tuple[str, ...] = tuple(FILES)
    """Trajectories: intel, parking-garage, kitti_00."""
    seeds: int = 5
    """Seeds of each learned arm."""
    steps: int = 300
    """Steps of training."""
    batch_size: int = 32
    """Windows a step."""
    windows: int = 120
    """Test windows for each length of gap."""
    workers: int | None = None
    """Processes, each on one thread; None for one a core."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.trajectories if name not in FILES]
        if unknown or not self.trajectories:
            raise ValueError(f"trajectories must be of {', '.join(FILES)}, received {', '.join(unknown) or 'none'}")
        at_least_one(self, "seeds", "steps", "batch_size", "windows")


def quick(out: Path, data: Path | None = None) -> PosesConfig:
    """A size of seconds, to see that everything runs; its numbers say nothing."""
    return PosesConfig(
        out=out, data=data, trajectories=("intel",), seeds=2, steps=5, batch_size=4, windows=10, workers=1
    )


# The task


def load(name: str, folder: Path | None) -> tuple[lie.Group, Tensor]:
    """The group of a trajectory and its poses, float64 [N, m, m].

    Raises:
        FileNotFoundError: the file is not there.
    """
    if folder is None:
        folder = Path(os.environ.get("ERLANGEN_DATA", "data")) / "pose"
    path = folder / FILES[name]
    if not path.exists():
        raise FileNotFoundError(f"there is no trajectory {path}: set ERLANGEN_DATA, or give the folder of the files")
    if path.suffix == ".g2o":
        graph = lie.convert.read_g2o(path)
        return graph.group, graph.poses
    return lie.SE3, lie.convert.read_kitti(path)


def random_windows(length: int, gap: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where to look: indices of the given poses [count, 8], and of the missing one [count]."""
    span = 2 * CONTEXT + gap
    if length < span:
        raise ValueError(f"a gap of {gap} needs {span} poses, received {length}: use a longer trajectory")
    start = torch.randint(length - span + 1, (count, 1), generator=generator)
    before = torch.arange(CONTEXT)
    given = start + torch.cat([before, CONTEXT + gap + before])
    return given, start[:, 0] + CONTEXT + torch.randint(gap, (count,), generator=generator)


def geodesic(group: lie.Group, first: Tensor, second: Tensor, fraction: Tensor) -> Tensor:
    """g_a exp(t log(g_a⁻¹ g_b)): [..., m, m] twice and [...] -> [..., m, m]."""
    return group.compose(first, group.exp(fraction[..., None] * group.log(group.relative(first, second))))


def slerp_linear(group: lie.Group, first: Tensor, second: Tensor, fraction: Tensor) -> Tensor:
    """Rotation by the shortest turn and position by a straight line, each at constant speed; shapes as `geodesic`."""
    rotations = lie.SO2 if group == lie.SE2 else lie.SO3
    answer = first + fraction[..., None, None] * (second - first)
    answer[..., :-1, :-1] = geodesic(rotations, first[..., :-1, :-1], second[..., :-1, :-1], fraction)
    return answer


def cubic(group: lie.Group, around: Tensor, times: Tensor, time_missing: Tensor) -> Tensor:
    """Lagrange's cubic through four poses, in the tangent space at the geodesic answer between the inner two.

    Args:
        group: the group.
        around: poses [..., 4, m, m], two before and two after.
        times: [..., 4].
        time_missing: [...].

    Returns:
        [..., m, m]; it goes to h times itself when one h moves all poses.
    """
    fraction = (time_missing - times[..., 1]) / (times[..., 2] - times[..., 1])
    centre = geodesic(group, around[..., 1, :, :], around[..., 2, :, :], fraction)
    tangent = group.log(group.relative(centre[..., None, :, :], around))
    total = torch.zeros_like(tangent[..., 0, :])
    for k in range(4):
        weight = torch.ones_like(time_missing)
        for j in range(4):
            if j != k:
                weight = weight * (time_missing - times[..., j]) / (times[..., k] - times[..., j])
        total = total + weight[..., None] * tangent[..., k, :]
    return group.compose(centre, group.exp(total))


@dataclass(frozen=True, eq=False)
class Windows:
    """A batch: given poses [B, 8, m, m], their times [B, 8], the missing pose [B, m, m] and its time [B]; float64."""

    given: Tensor
    times: Tensor
    missing: Tensor
    time_missing: Tensor

    @staticmethod
    def at(poses: Tensor, given: Tensor, missing: Tensor) -> "Windows":
        """Those at the indices of `random_windows`."""
        return Windows(poses[given], given.double(), poses[missing], missing.double())

    def fixed(self, group: lie.Group, arm: str) -> Tensor:
        """The answer of an arm of `FIXED`."""
        inner = slice(CONTEXT - 2, CONTEXT + 2)
        if arm == "cubic":
            return cubic(group, self.given[:, inner], self.times[:, inner], self.time_missing)
        before, after = self.times[:, CONTEXT - 1], self.times[:, CONTEXT]
        interpolate = geodesic if arm == "geodesic" else slerp_linear
        fraction = (self.time_missing - before) / (after - before)
        return interpolate(group, self.given[:, CONTEXT - 1], self.given[:, CONTEXT], fraction)


def pose_errors(answer: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Errors of position (in the unit of the poses) and of rotation (degrees): [B, m, m] each -> [B] each."""
    size = truth.shape[-1] - 1
    rotations = lie.SO2 if size == 2 else lie.SO3
    turn = rotations.log(rotations.relative(truth[..., :-1, :-1], answer[..., :-1, :-1])).norm(dim=-1)
    return {"metres": (answer - truth)[..., :-1, -1].norm(dim=-1), "degrees": torch.rad2deg(turn)}


# The learned arms


def time_features(times: Tensor, time_missing: Tensor) -> Tensor:
    """Times of the given poses and of the missing one, seen from the missing one: [B, 9, 4]."""
    offset = torch.cat([times - time_missing[:, None], torch.zeros_like(time_missing)[:, None]], 1)
    asked = (offset == 0).to(offset.dtype)
    return torch.stack([offset / 8, offset.abs() / 8, asked, (1 - asked) / (offset + asked)], -1)


class PoseCompletion(nn.Module):
    """A learned arm: x, the geodesic answer, and a correction. Lengths are in units of a step."""

    def __init__(self, group: lie.Group, arm: str) -> None:
        super().__init__()
        self.group, self.arm = group, arm
        if arm == "Lie attention":
            shape = LieTransformerConfig(
                group=str(group), feature_dim=4, num_layers=2, num_heads=NUM_HEADS, dim=DIM, mlp_dim=2 * DIM,
                displacement=False,
            )  # fmt: skip
            self.transformer = LieTransformer(shape)
            return
        out_dim = group.dim if arm == "vectors, own frame" else group.matrix_size**2
        self.input = nn.Linear(group.matrix_size**2 + 4, DIM)
        self.layers = nn.ModuleList(VectorBlock(DIM, NUM_HEADS) for _ in range(2))
        self.output = nn.Linear(DIM, out_dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def propose(self, poses: Tensor, features: Tensor) -> Tensor:
        """The answer, for the vectors perhaps off the group: [B, 9, m, m] with x last and [B, 9, 4] -> [B, m, m]."""
        if self.arm == "Lie attention":
            return self.transformer(poses, features, check=False)[1][:, -1]
        start = poses[:, -1]
        if self.arm == "vectors, own frame":
            poses = self.group.relative(start[:, None], poses)
        hidden = self.input(torch.cat([poses.flatten(2), features], -1))
        for layer in self.layers:
            hidden = layer(hidden)
        out = self.output(hidden[:, -1])
        if self.arm == "vectors, own frame":
            return self.group.compose(start, self.group.exp(out))
        return start + out.unflatten(-1, start.shape[-2:])

    def forward(self, poses: Tensor, features: Tensor, missing: Tensor, inverse: Tensor) -> Tensor:
        """The loss of the protocol, ‖g*⁻¹ ĝ − 1‖_F, mean over the batch; ``inverse`` is of the missing poses."""
        difference = inverse @ (self.propose(poses, features) - missing)
        return (difference.square().sum((-2, -1)) + 1e-10).sqrt().mean()


def prepare(group: lie.Group, windows: Windows, unit: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input of the learned arms, float32: poses with x last, features, the missing pose; and the shift, float64.

    The origin is moved to x and lengths are divided by ``unit``: the axes of the world stay.
    """
    start = windows.fixed(group, "geodesic")
    shift = start[:, :-1, -1]
    poses = torch.cat([windows.given, start[:, None]], 1).clone()
    poses[..., :-1, -1] = (poses[..., :-1, -1] - shift[:, None]) / unit
    missing = windows.missing.clone()
    missing[..., :-1, -1] = (missing[..., :-1, -1] - shift) / unit
    return poses.float(), time_features(windows.times, windows.time_missing).float(), missing.float(), shift


@torch.no_grad()
def answer(model: PoseCompletion, windows: Windows, unit: float) -> Tensor:
    """The answer of a learned arm, float64 [B, m, m] in metres."""
    poses, features, _, shift = prepare(model.group, windows, unit)
    found = model.group.project(model.propose(poses, features).double())
    found[..., :-1, -1] = found[..., :-1, -1] * unit + shift
    return found


def train(
    group: lie.Group,
    arm: str,
    poses: Tensor,
    *,
    seeds: Sequence[int],
    steps: int,
    batch_size: int,
    tick: Tick | None = None,
) -> tuple[list[PoseCompletion], float]:
    """Train an arm of `LEARNED` on a trajectory, once a seed.

    Returns:
        the models, and the unit of length: the median step.

    Raises:
        KeyboardInterrupt: ``tick``, called after each step, said to stop.
    """
    unit = float((poses[1:] - poses[:-1])[:, :-1, -1].norm(dim=-1).median())
    models = [seeded(seed, lambda: PoseCompletion(group, arm)) for seed in seeds]
    batches = [_batches(group, arm, poses, unit, steps, batch_size, seed) for seed in seeds]
    drawn = [0] * len(models)

    def draw(index: int) -> tuple[Tensor, ...]:
        drawn[index] += 1
        return tuple(part[drawn[index] - 1] for part in batches[index])

    fit(models, draw, steps=steps, lr=LEARNING_RATE, tick=tick)
    return models, unit


def _batches(
    group: lie.Group, arm: str, poses: Tensor, unit: float, steps: int, batch_size: int, seed: int
) -> tuple[Tensor, ...]:
    """All batches of a run, [steps, batch_size, ...] each: made at once, which is quicker."""
    generator = torch.Generator().manual_seed(seed)
    count = steps * batch_size
    gaps = torch.randint(len(GAPS), (count,), generator=generator).bincount(minlength=len(GAPS)).tolist()
    drawn = [random_windows(len(poses), gap, number, generator) for gap, number in zip(GAPS, gaps)]
    order = torch.randperm(count, generator=generator)
    windows = Windows.at(poses, *(torch.cat(parts)[order] for parts in zip(*drawn)))
    seen, features, missing, _ = prepare(group, windows, unit)
    if arm == "vectors":
        turn = group.random(count, generator=generator, dtype=torch.float32)
        turn[:, :-1, -1] = 0.0
        seen, missing = turn[:, None] @ seen, turn @ missing
    parts = seen, features, missing, group.inverse(missing)
    return tuple(part.unflatten(0, (steps, batch_size)) for part in parts)


# Running


def _split(poses: Tensor) -> tuple[Tensor, Tensor]:
    border = int(0.7 * len(poses))
    return poses[:border], poses[border:]


def _test_windows(test: Tensor, count: int) -> dict[int, tuple[Windows, list[int]]]:
    """The windows of each gap, and the block of the trajectory that each is in."""
    found = {}
    for gap in GAPS:
        given, missing = random_windows(len(test), gap, count, torch.Generator().manual_seed(10_000 + gap))
        found[gap] = Windows.at(test, given, missing), (missing // BLOCK).tolist()
    return found


def _cells(tick: Tick, config: PosesConfig, name: str, arm: str, seeds: list[int]) -> list[dict[str, Any]]:
    """Some seeds of one arm on one trajectory; of an arm that is not learned there is one, 0."""
    group, poses = load(name, config.data)
    training, test = _split(poses)
    tests = _test_windows(test, config.windows)
    started = time.perf_counter()
    if arm in FIXED:
        answers = [lambda windows: windows.fixed(group, arm)]
        parameters = 0
    else:
        models, unit = train(
            group, arm, training, seeds=seeds, steps=config.steps, batch_size=config.batch_size, tick=tick
        )
        answers = [lambda windows, model=model: answer(model, windows, unit) for model in models]
        parameters = sum(p.numel() for p in models[0].parameters())
    seconds = (time.perf_counter() - started) / len(answers)
    records = []
    for seed, find in zip(seeds, answers):
        errors = {}
        for gap, (windows, blocks) in tests.items():
            found = pose_errors(find(windows), windows.missing)
            errors[str(gap)] = {"block": blocks} | {
                key: [float(f"{x:.6g}") for x in values.tolist()] for key, values in found.items()
            }
        record = {"key": f"{name}/{arm}/{seed}", "trajectory": name, "group": str(group), "arm": arm, "seed": seed}
        records.append(record | {"parameters": parameters, "seconds": seconds, "errors": errors})
    return records


def declared_jobs(config: PosesConfig, cells: Cells) -> list[Job]:
    """All jobs; what they make is added to the cells."""
    jobs = []
    for name in config.trajectories:
        for arm in ARMS:
            seeds = cells.missing(f"{name}/{arm}", 1 if arm in FIXED else config.seeds)
            steps = 1 if arm in FIXED else config.steps
            arguments = (config, name, arm, seeds)
            jobs.append(Job(work=_cells, arguments=arguments, steps=steps, finished=not seeds, keep=cells.add))
    return jobs


def measure(config: PosesConfig, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Run what is declared and not on disk yet.

    Returns:
        a record a cell: trajectory, group, arm and seed, parameters and seconds, and ``errors``: by gap the ``metres``
        and ``degrees`` of each test window, and the ``block`` of the trajectory it is in.

    Raises:
        FileNotFoundError: a trajectory is missing.
        ValueError: the folder holds cells of other settings.
    """
    for name in config.trajectories:
        load(name, config.data)
    settings = {"study": "lie_poses", "learning_rate": LEARNING_RATE}
    settings |= {name: getattr(config, name) for name in ("steps", "batch_size", "windows")}
    cells = Cells(config.out / "cells.jsonl", settings)
    execute(declared_jobs(config, cells), workers=config.workers, progress=progress)
    return [r for r in cells.records.values() if r["trajectory"] in config.trajectories and r["seed"] < config.seeds]


def run(config: PosesConfig, progress: Progress | None = None) -> Path:
    """Run what is declared and not on disk yet, and write the report.

    Returns:
        the path of the HTML file; JSON and CSV lie beside it.

    Raises:
        ImportError: matplotlib is missing.
        FileNotFoundError: a trajectory is missing.
        ValueError: the folder holds cells of other settings.
    """
    require("matplotlib", "report")
    return _write_report(config, measure(config, progress))


# Reading and reporting


def _errors(records: Sequence[Mapping[str, Any]], name: str, gap: int, arm: str, measure: str) -> np.ndarray:
    """[seeds, windows]."""
    return np.array([r["errors"][str(gap)][measure] for r in by_seed(records, trajectory=name, arm=arm)])


def block_bootstrap(
    values: np.ndarray, blocks: Sequence[int] | np.ndarray, *, draws: int = 2000, seed: int = 0
) -> report.Interval:
    """The mean of values and its 95 % bootstrap interval over whole blocks: what lies near one another stays together.

    Args:
        values: [n].
        blocks: [n], the block of each.
        draws: resamples.
        seed: of the resamples.
    """
    names, index = np.unique(np.asarray(blocks), return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    chosen = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    means = sums[chosen].sum(1) / counts[chosen].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return report.Interval(float(np.mean(values)), float(low), float(high))


def compare(config: PosesConfig, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lie attention against each other arm, by trajectory, gap and measure, with both intervals."""
    rows = []
    for name in config.trajectories:
        for gap in GAPS:
            blocks = next(r for r in records if r["trajectory"] == name)["errors"][str(gap)]["block"]
            for measure in MEASURES:
                for first, second in PAIRS:
                    difference = _errors(records, name, gap, first, measure) - _errors(
                        records, name, gap, second, measure
                    )
                    seeds = report.paired_interval(difference.mean(1))
                    windows = block_bootstrap(difference.mean(0), blocks)
                    rows.append(
                        {"trajectory": name, "gap": gap, "measure": measure, "second": second, "seeds": seeds}
                        | {"windows": windows, "points": difference.mean(1)}
                        | {"verdict": verdict(first, second, seeds, windows)}
                    )
    return rows


def _tables(config: PosesConfig, records: Sequence[Mapping[str, Any]]) -> dict[str, report.Table]:
    def table(measure: str, statistic: str) -> report.Table:
        reduce = np.mean if statistic == "Mean" else np.median
        return report.Table(
            ("Trajectory", "Gap", *ARMS),
            [
                (name, gap, *(with_error(reduce(_errors(records, name, gap, arm, measure), axis=1)) for arm in ARMS))
                for name in config.trajectories
                for gap in GAPS
            ],
            f"{statistic} error of {MEASURES[measure]}, over test windows; ± standard error over seeds.",
        )

    differences = report.Table(
        ("Trajectory", "Gap", "Error", "Lie attention minus", "Over seeds", "Over the trajectory", "Reading"),
        [
            (r["trajectory"], r["gap"], r["measure"], r["second"], r["seeds"], r["windows"], r["verdict"])
            for r in compare(config, records)
        ],
        "Differences of the mean error, with 95 % intervals: Student's over seeds, and a block bootstrap over the test "
        "part.",
        formats={"Over seeds": "+.3g", "Over the trajectory": "+.3g"},
    )
    cells = report.Table(
        (
            "Trajectory",
            "Group",
            "Arm",
            "Seed",
            "Parameters",
            "Gap",
            *(f"{s} {m}" for m in MEASURES for s in ("mean", "median")),
        ),
        [
            (
                *(r[key] for key in ("trajectory", "group", "arm", "seed", "parameters")),
                gap,
                *(float(f(r["errors"][str(gap)][m])) for m in MEASURES for f in (np.mean, np.median)),
            )
            for r in sorted(records, key=lambda r: (r["trajectory"], ARMS.index(r["arm"]), r["seed"]))
            for gap in GAPS
        ],
        "Every cell.",
    )
    tables = {f"{s.lower()}_{m}": table(m, s) for s in ("Mean", "Median") for m in MEASURES}
    return tables | {"differences": differences, "cells": cells}


def _write_report(config: PosesConfig, records: Sequence[Mapping[str, Any]]) -> Path:
    tables, comparison = _tables(config, records), compare(config, records)

    def forest(name: str, measure: str) -> report.Figure:
        rows = [
            report.IntervalRow(f"{r['second']}, gap {r['gap']}", *r["windows"], points=tuple(r["points"]))
            for r in comparison
            if r["trajectory"] == name and r["measure"] == measure and r["second"] in ("geodesic", "cubic")
        ]
        return report.Figure(
            report.intervals(rows, x_label=f"error of {MEASURES[measure]}: Lie attention − other"),
            f"{name}: mean, 95 % interval over the trajectory, each seed. Left of zero Lie attention is better.",
            f"Forest plot of the differences on {name} by baseline and gap.",
        )

    def panels(measure: str) -> str:
        return report.small_multiples(
            {
                name: [
                    report.Series(
                        arm,
                        np.array(GAPS),
                        np.stack([_errors(records, name, gap, arm, measure).mean(1) for gap in GAPS], 1),
                    )
                    for arm in ARMS
                ]
                for name in config.trajectories
            },
            x_label="missing poses", y_label=f"mean error of {MEASURES[measure]}", log_y=True,
        )  # fmt: skip

    def count(second: str) -> str:
        chosen = [r["verdict"] for r in comparison if r["second"] == second]
        better, worse = chosen.count("Lie attention is better"), chosen.count(f"{second} is better")
        open_cases = len(chosen) - better - worse
        return f"against {second}: better in {better}, worse in {worse}, no difference shown in {open_cases}"

    sections = [
        report.Section("What was run", [
            f"Trajectories {', '.join(config.trajectories)}; gaps of {', '.join(map(str, GAPS))} poses; {config.seeds} "
            f"seeds, {config.steps} steps of {config.batch_size}, {config.windows} test windows a gap. The protocol is "
            "the docstring of `erlangen.studies.lie_poses`.",
        ]),
        report.Section("Errors", [
            tables["mean_metres"], tables["mean_degrees"],
            *(report.Figure(panels(m), f"Mean error of {MEASURES[m]} by length of the gap.", "Errors by gap, a panel a "
              "trajectory.") for m in MEASURES),
            tables["median_metres"], tables["median_degrees"],
        ]),
        report.Section("Lie attention against the others", [
            *(forest(name, m) for name in config.trajectories for m in MEASURES), tables["differences"],
        ]),
        report.Section("Every cell", [tables["cells"]]),
    ]  # fmt: skip
    html = report.page(
        "Completing real trajectories",
        [
            f"Lie attention, {len(config.trajectories) * len(GAPS) * len(MEASURES)} cases (trajectory, gap, measure): "
            + "; ".join(count(second) for _, second in PAIRS)
            + "."
        ],
        sections,
    )
    path = report.write_report(config.out, "lie_poses", html, {"config": config, "cells": records}, tables)
    copy_tables(config.csv, "lie_poses", tables)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m erlangen.studies.lie_poses``."""
    import tyro

    description = "Complete real trajectories: Lie attention against interpolation and vectors."
    print(run(tyro.cli(PosesConfig, args=arguments, prog="lie_poses", description=description), print_progress()))


if __name__ == "__main__":
    importlib.import_module("erlangen.studies.lie_poses").main()  # by that name workers find the jobs
