"""The page of the benchmark of Lie attention: plots, floors and every number."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erlangen import report

from ._lie_case import GEOMETRY_FLOPS, PASSES, YARDSTICK

Result = Mapping[str, Any]
FLOOR = "floor"


def write_page(config: Any, results: Sequence[Result], threads: int) -> Path:
    """Write ``lie_attention.html`` and its data.

    Args:
        config: the `LieBenchConfig`.
        results: of `erlangen.bench.lie`, all groups, passes, sizes, variants and metrics.
        threads: CPU threads.

    Returns:
        The path of the page.
    """
    groups = list(dict.fromkeys(r["group"] for r in results))
    sizes = sorted({r["size"] for r in results})
    variants = list(dict.fromkeys(r["variant"] for r in results))
    sections = [
        report.Section("Time", [
            report.Figure(
                _plot(results, groups, variants, "time", "ms"),
                "Median time against N. The floor is the least that the arithmetic and the memory traffic can take.",
                "Curves of time against the number of poses, on logarithmic axes, a panel a group and pass.",
            ),
        ]),
        report.Section("Memory", [
            report.Figure(
                _plot(results, groups, variants, "peak_memory", "MB"),
                "Peak memory above the inputs against N. The floor is what the pass returns, with the sums of the rows "
                "that its backward needs.",
                "Curves of peak memory against the number of poses, on logarithmic axes, a panel a group and pass.",
            ),
        ]),
        report.Section("The floor", _floor(results, groups, sizes[-1])),
        report.Section("Every number", [_table(results, group, which) for group in groups for which in PASSES]),
    ]  # fmt: skip
    if any(r["skipped"] for r in results):
        sections.append(report.Section("What was skipped", [_skipped(results)]))
    shape = f"batch {config.batch_size}, {config.num_heads} heads of width {config.head_dim}, {config.dtype}"
    where = f"{config.device}, {threads} threads" if config.device == "cpu" else config.device
    summary = [
        f"Self-attention between poses that all heads share, beside `scaled_dot_product_attention` on the same values: "
        f"{shape}; {where}; {config.rounds} rounds, all variants of a size in turn in each.",
        *(_headline(results, group) for group in groups),
    ]
    page = report.page("Lie attention: time and memory", summary, sections)
    return report.write_report(config.out, "lie_attention", page, {"config": config, "results": results}, {})


def _where(results: Sequence[Result], **about: Any) -> list[Result]:
    return [r for r in results if all(r[name] == value for name, value in about.items())]


def _headline(results: Sequence[Result], group: str) -> str:
    """The ratios at the largest size that has any."""
    parts = []
    for which in PASSES:
        found = [r for r in _where(results, group=group, which=which, metric="time", baseline=YARDSTICK) if r["ratio"]]
        found = [r for r in found if r["variant"] not in (YARDSTICK, FLOOR)]
        if found:
            size = max(r["size"] for r in found)
            ratios = [f"{r['variant']} {_three_digits(r['ratio'])}" for r in found if r["size"] == size]
            parts.append(f"{which} at N = {size}, {', '.join(ratios)}")
    return f"Time on {group}, as a multiple of SDPA's: {'; '.join(parts)}." if parts else ""


def _plot(results: Sequence[Result], groups: Sequence[str], variants: Sequence[str], metric: str, unit: str) -> str:
    panels = {}
    for group in groups:
        for which in PASSES:
            panels[f"{group}, {which}"] = series = []
            for variant in variants:
                found = _where(results, group=group, which=which, metric=metric, variant=variant)
                points = [(r["size"], r["median"]) for r in found if r["median"] is not None]
                if points:
                    series.append(report.Series(variant, *zip(*points), group=variant))
    name = {"time": "time", "peak_memory": "memory"}[metric]
    return report.small_multiples(panels, x_label="N", y_label=f"{name} ({unit})", log_x=True, log_y=True)


def _floor(results: Sequence[Result], groups: Sequence[str], size: int) -> list[str | report.Table]:
    floors = _where(results, size=size, metric="time", variant=FLOOR)
    rows = []
    for floor in floors:
        about = {name: floor[name] for name in ("group", "which", "size", "metric")}
        others = [r for r in _where(results, **about) if r["median"] and r["variant"] not in (YARDSTICK, FLOOR)]
        best = min(others, key=lambda r: r["median"], default=None)
        name, time = (best["variant"], best["median"]) if best else ("none", None)
        cost = floor["cost"]
        rows.append((
            f"{floor['group']}, {floor['which']}", cost["flops"] / 1e9, cost["exps"] / 1e6, cost["traffic"] / 1e6,
            floor["median"], name, time, time and time / floor["median"],
        ))  # fmt: skip
    rates = floors[-1]["per_second"]
    columns = ("Case", "Gflop", "10⁶ exp", "MB moved", "Floor, ms", "Fastest", "Its time, ms", "Times the floor")
    counted = ", ".join(f"{g} {GEOMETRY_FLOPS[g]}" for g in groups if g in GEOMETRY_FLOPS) or "none"
    missing = [g for g in groups if g not in GEOMETRY_FLOPS]
    return [
        "What the arithmetic needs if nothing is skipped. The scores are symmetric, so geometry, scores and "
        "exponentials are those of N (N + 1) / 2 pairs, the geometry once for all heads; weights times values are N² "
        f"pairs. Flops of a pair: geometry {counted}{f' ({missing} not counted)' if missing else ''}; a score two a "
        "block of the algebra, and one exponential; weights times values two a coordinate. The backward pass makes the "
        "scores again, has twice the products and twice the geometry, and four flops a block between.",
        f"What this machine does in the best rounds: {rates['matmul'] / 1e9:.3g} GFLOP/s in a matrix "
        f"product, {rates['exp'] / 1e9:.3g}·10⁹ exponentials a second, {rates['copy'] / 1e9:.3g} GB/s in a copy. "
        "On a CPU flops and exponentials share their units, so their times add up; elsewhere the longer counts. Either "
        "is compared with the time to move inputs and outputs once, and the longer is the floor.",
        report.Table(
            columns,
            rows,
            f"The floor at N = {size}, and the fastest variant there.",
            "A variant that skips may come below it.",
            dict.fromkeys(columns[1:5] + columns[6:], _three_digits),
        ),
    ]  # fmt: skip


def _table(results: Sequence[Result], group: str, which: str) -> report.Table:
    rows = []
    times = [r for r in _where(results, group=group, which=which, metric="time") if r["median"] is not None]
    for time in times:
        about = {name: time[name] for name in ("group", "which", "size", "variant")}
        (memory,) = _where(results, **about, metric="peak_memory")
        ratio = _spread(time, "ratio_") if time["baseline"] == YARDSTICK != time["variant"] else None
        rows.append((time["size"], time["variant"], _spread(time), ratio, memory["median"]))
    return report.Table(
        ("N", "Variant", "Time, ms", "Times SDPA", "Memory, MB"),
        rows,
        f"{group}, {which}: median time and its 20–80 % spread; ratio to SDPA in the same rounds; peak memory.",
        formats=dict.fromkeys(("Time, ms", "Times SDPA", "Memory, MB"), _three_digits),
    )


def _three_digits(cell: float | report.Interval) -> str:
    if isinstance(cell, report.Interval):
        return f"{_three_digits(cell.mean)} [{_three_digits(cell.low)}, {_three_digits(cell.high)}]"
    return f"{cell:.3g}" if cell < 1000 else f"{cell:.0f}"


def _spread(row: Result, prefix: str = "") -> report.Interval | float:
    middle, low, high = row["ratio" if prefix else "median"], row[f"{prefix}q20"], row[f"{prefix}q80"]
    return middle if low is None else report.Interval(middle, low, high)


def _skipped(results: Sequence[Result]) -> report.Table:
    sizes: dict[tuple[str, ...], list[int]] = {}
    for r in results:
        if r["skipped"]:
            sizes.setdefault((r["variant"], r["group"], r["which"], r["skipped"]), []).append(r["size"])
    return report.Table(
        ("Variant", "Group", "Pass", "From N", "Reason"),
        [(*key[:3], min(found), key[3]) for key, found in sizes.items()],
        "What was not measured from which N on, and why.",
    )
