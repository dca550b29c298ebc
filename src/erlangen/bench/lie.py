"""Time and peak memory of Lie attention against the number of poses.

Self-attention between N poses that all heads share, against `scaled_dot_product_attention` on the same values: forward,
and forward + backward with gradients to poses, λ, τ and values. Poses are spread out with constant density, so that
the region grows with their number; λ is 1, and τ goes from 1 to 4 over the heads.

- Time: at each size all variants are called in turn, in an order shuffled every round, and so are a matrix product, an
  exponential and a copy, from whose best rates the floor is made (`least_cost`). Ratios to SDPA are those of the
  same rounds. What is compiled is compiled before.
- Memory: each case in a process of its own, above its inputs. It may take ``memory_limit`` and what is free.
- A variant that cannot run at a size is not tried at larger ones.

Rows go into ``lie_attention.csv`` as they are found, in the schema of `record`; a second call with the same settings,
code and folder goes on from there. What was skipped has a row without a number and the reason in its ``config_json``.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from erlangen import lie
from erlangen._extras import require

from . import record
from ._lie_case import PASSES, YARDSTICK, Case, Pass, Probes, Rates, Variant, least_cost
from ._lie_memory import peak_memory
from ._lie_page import write_page

BENCHMARK = "lie_attention"
FLOOR = "floor"
RATES = {"matmul": "GFLOP/s", "exp": "10⁹/s", "copy": "GB/s"}
NUMBERS = ("q20", "median", "q80", "ratio", "ratio_q20", "ratio_q80")
NOT_MEASURED = "peak memory is read and reset in /proc, which is not possible here"

Progress = Callable[[str, int, int], None]
"""Called with what is measured now, how many measurements are done, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class LieBenchConfig:
    """What to measure."""

    groups: tuple[str, ...] = ("SE2", "SE3")
    """Groups of the poses, by name."""
    sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    """Numbers of poses N."""
    variants: tuple[Variant, ...] = ("dense", "tiled", "compiled-tiled", "tiled-skipping", "triton")
    """Implementations, beside SDPA. "compiled-dense" takes a minute a size to compile."""
    num_heads: int = 8
    head_dim: int = 32
    batch_size: int = 1
    dtype: Literal["float32", "float64"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None
    """CPU threads; as many as torch takes if not given."""
    rounds: int = 10
    """Timed calls of each variant."""
    spacing: float = 1.0
    """Width of the cell that each pose has to itself, where a head's score falls to −1 at a distance of 1 to 2."""
    skip: float = 1e-6
    """Share of a row's weight that "tiled-skipping" may leave out."""
    memory_limit: float = 4.0
    """GB that a variant may take beside its inputs; where it would take more it is skipped."""
    out: Path = Path("runs/bench-lie")
    """Folder for the rows, and the page with the plots."""

    def check(self) -> None:
        """Raise a ValueError that says what is wrong, if anything is."""
        for name in ("groups", "sizes"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one")
        for name in ("num_heads", "head_dim", "batch_size", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, received {value}")
        if min(self.sizes) < 1:
            raise ValueError(f"sizes must be at least 1, received {min(self.sizes)}")
        for name in ("spacing", "memory_limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, received {getattr(self, name):g}")
        if not 0 <= self.skip < 1:
            raise ValueError(f"skip must be at least 0 and below 1, received {self.skip:g}")
        for group in self.groups:
            lie.parse(group)
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, received {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda is not there: torch finds no CUDA device")


class Key(NamedTuple):
    """What a row is about; ``which`` is the pass."""

    group: str
    which: str
    size: int
    variant: str
    metric: str


def run(config: LieBenchConfig, *, progress: Progress | None = None) -> Path:
    """Measure what is not there yet and write the page.

    Args:
        config: what to measure, and where to keep it.
        progress: told what is measured now.

    Returns:
        The path of the page, ``<out>/lie_attention.html``.

    Raises:
        ImportError: there is no matplotlib to draw the page with.
        ValueError: a setting is wrong, or ``<out>/lie_attention.csv`` has another header.
    """
    config.check()
    require("matplotlib", "report")
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        bench = _Bench(config, progress or (lambda *_: None))
        bench.measure()
        return write_page(config, bench.results(), torch.get_num_threads())
    finally:
        torch.set_num_threads(before)


class _Bench:
    """One call of `run`: the rows that are there, and how those that are not are made."""

    def __init__(self, config: LieBenchConfig, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.path = config.out / f"{BENCHMARK}.csv"
        self.groups, self.sizes = tuple(dict.fromkeys(config.groups)), tuple(sorted(set(config.sizes)))
        self.variants = (YARDSTICK, *dict.fromkeys(config.variants))
        self.settings = {
            name: getattr(config, name) for name in ("num_heads", "head_dim", "batch_size", "spacing", "skip")
        }
        self.common = {
            "benchmark": BENCHMARK,
            "x_name": "N",
            "device": torch.cuda.get_device_name() if config.device == "cuda" else "cpu",
            "dtype": config.dtype,
        }
        self.skipped: dict[tuple[str, str, Pass], str] = {}  # (group, variant, pass) -> why
        self.rows: dict[Key, Mapping[str, str]] = {}
        same = {**self.common, **record.provenance()}
        for row in record.read(self.path):
            settings = json.loads(row["config_json"])
            if all(row[k] == str(v) for k, v in same.items()) and settings.items() >= self.settings.items():
                self._take(row)

    def measure(self) -> None:
        """Everything that is not there, small sizes first."""
        self.done, self.total = 0, len(self.sizes) * len(self.groups) * (len(self.variants) + len(PASSES))
        probes = Probes(self.config.dtype, self.config.device)
        for size in self.sizes:
            for group in self.groups:
                for variant in self.variants:
                    self._memory(self._case(group, size, variant))
                    self.done += 1
                for which in PASSES:
                    self._time(group, size, which, probes)
                    self.done += 1
        self._floors()
        self.progress("done", self.total, self.total)

    def _case(self, group: str, size: int, variant: Any) -> Case:
        return Case(
            variant=variant, group=group, size=size, **self.settings, dtype=self.config.dtype,
            device=self.config.device, threads=torch.get_num_threads(),
        )  # fmt: skip

    def _memory(self, case: Case) -> None:
        """Rows of the peak memory of a case; what turns out not to run is skipped from here on."""
        keys = {which: Key(case.group, which, case.size, case.variant, "peak_memory") for which in PASSES}
        reasons = {which: self.skipped.get((case.group, case.variant, which)) or case.unable() for which in PASSES}
        if any(reasons[which] is None and not self._is_number(keys[which]) for which in PASSES):
            self.progress(f"memory, {case.group}, N = {case.size}, {case.variant}", self.done, self.total)
            for which, found in peak_memory(case, self.config.memory_limit * 1e9).items():
                if isinstance(found, str):
                    reasons[which] = reasons[which] or found
                elif found is None:
                    self._skip(keys[which], "MB", NOT_MEASURED)
                else:
                    self._keep({keys[which]: {"unit": "MB", "median": f"{found / 1e6:.4g}", "rounds": 1}})
        for which, reason in reasons.items():
            if reason is not None:
                self.skipped[case.group, case.variant, which] = reason
                self._skip(keys[which], "MB", reason)

    def _time(self, group: str, size: int, which: Pass, probes: Probes) -> None:
        """Rows of the time of all variants of one cell, from one interleaved run, and of the rates in it."""
        keys = {variant: Key(group, which, size, variant, "time") for variant in self.variants}
        for variant in self.variants:
            if (reason := self.skipped.get((group, variant, which))) is not None:
                self._skip(keys.pop(variant), "ms", reason)
        needed = [*keys.values(), *(Key(group, which, size, name, "rate") for name in RATES)]
        if all(self._is_number(key) and int(self.rows[key]["rounds"]) == self.config.rounds for key in needed):
            return
        self.progress(f"time, {group}, N = {size}, {which}", self.done, self.total)
        if any(variant.startswith("compiled") for variant in keys):
            torch.compiler.reset()  # else one function would be compiled for too many sizes
        calls = {variant: self._case(group, size, variant).passes()[which] for variant in keys}
        baseline = YARDSTICK if YARDSTICK in calls else "matmul"
        timings = record.time_interleaved(calls | probes.calls, baseline, rounds=self.config.rounds, warmup=2)
        rows: dict[Key, Mapping[str, Any]] = {
            key: record.timing_row(BENCHMARK, variant, baseline, timings[variant], device="", dtype="")
            for variant, key in keys.items()
        }
        rates = probes.rates({name: timings[name].q20 for name in probes.calls})
        for name, unit in RATES.items():
            row = {"unit": unit, "median": f"{rates[name] / 1e9:.4g}", "rounds": self.config.rounds}
            rows[Key(group, which, size, name, "rate")] = row
        self._keep(rows)

    def _floors(self) -> None:
        """Rows of the floors, from the best rates of all cells: a slow spell of the machine does not lift them."""
        cells = list(product(self.groups, PASSES, self.sizes))
        best = {name: max(float(self.rows[Key(*cell, name, "rate")]["median"]) for cell in cells) for name in RATES}
        rates = Rates(**{name: 1e9 * value for name, value in best.items()})
        rows: dict[Key, Mapping[str, Any]] = {}
        for group, which, size in cells:
            cost = least_cost(self._case(group, size, YARDSTICK), which)
            seconds = rates.seconds(cost, self.config.device)
            time: dict[str, Any] = {"unit": "ms", "median": f"{seconds * 1e3:.4g}", "rounds": self.config.rounds}
            if self._is_number(key := Key(group, which, size, YARDSTICK, "time")):
                time |= {"baseline": YARDSTICK, "ratio": f"{seconds * 1e3 / float(self.rows[key]['median']):.4g}"}
            time["config"] = {"cost": asdict(cost), "per_second": asdict(rates)}
            memory = {"unit": "MB", "median": f"{cost.memory / 1e6:.4g}", "rounds": 1}
            for metric, row in (("time", time), ("peak_memory", memory)):
                key = Key(group, which, size, FLOOR, metric)
                if key not in self.rows or any(self.rows[key][n] != row.get(n, "") for n in ("median", "ratio")):
                    rows[key] = row
        self._keep(rows)

    def results(self) -> list[dict[str, Any]]:
        """The rows asked for, in order: what each is about, its numbers, None for those that it has not."""
        results = []
        for group, which, size in product(self.groups, PASSES, self.sizes):
            for variant, metric in product((*self.variants, FLOOR), ("time", "peak_memory")):
                key = Key(group, which, size, variant, metric)
                row = self.rows[key]
                numbers = {name: float(row[name]) if row[name] else None for name in NUMBERS}
                config = json.loads(row["config_json"])
                more = {name: config.get(name) for name in ("skipped", "cost", "per_second")}
                results.append({**key._asdict(), "baseline": row["baseline"], **numbers, **more})
        return results

    def _is_number(self, key: Key) -> bool:
        return key in self.rows and self.rows[key]["median"] != ""

    def _skip(self, key: Key, unit: str, reason: str) -> None:
        known = self.rows.get(key)
        if known is None or json.loads(known["config_json"]).get("skipped") != reason:
            self._keep({key: {"unit": unit, "config": {"skipped": reason}}})

    def _keep(self, rows: Mapping[Key, Mapping[str, Any]]) -> None:
        whole = []
        for key, row in rows.items():
            config = {**self.settings, "group": key.group, "pass": key.which, **row.get("config", {})}
            about = {"variant": key.variant, "metric": key.metric, "x_value": key.size}
            about["config_json"] = json.dumps(config, sort_keys=True)
            whole.append({k: v for k, v in row.items() if k != "config"} | self.common | about)
        record.write(self.path, whole)
        for row in whole:
            self._take({name: str(row.get(name, "")) for name in record.FIELDS})

    def _take(self, row: Mapping[str, str]) -> None:
        config = json.loads(row["config_json"])
        self.rows[Key(config["group"], config["pass"], int(row["x_value"]), row["variant"], row["metric"])] = row
