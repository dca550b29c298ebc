"""Time and peak memory of relational attention against the number of tokens, dense and in strips.

One layer of width 64 with 4 heads on one sequence, float32, forward and forward + backward, with and without 8
references; standard attention of torch (`scaled_dot_product_attention`, 4 heads of width 16) as yardstick. All are
timed in turn in each round. Memory is the peak of a process of its own above its inputs; what needs more than the limit
gets a row that says so. The floor is the tokens themselves, N · dim · 4 bytes. The last lines are slopes of log memory
and log time against log N between the two largest sizes: 1 is linear.

python benchmarks/relational_attention.py --sizes 1024 2048 4096 8192 16384
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from erlangen.bench import record
from erlangen.bench._lie_memory import peak_memory
from erlangen.gauge import RelationalAttention

RESULTS = Path(__file__).parent / "results"
FORWARD, BOTH = "forward", "forward + backward"
VARIANTS = ("sdpa", "dense", "streaming")


@dataclass(frozen=True)
class Case:
    variant: str
    size: int
    num_references: int
    causal: bool
    threads: int
    dim: int = 64
    num_heads: int = 4
    device: str = "cpu"

    def passes(self) -> dict[str, Callable[[], object]]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, self.size, self.dim, generator=generator).requires_grad_()
        layer = RelationalAttention(
            self.dim, self.num_heads, self.num_references, causal=self.causal, generator=generator,
            impl="dense" if self.variant == "sdpa" else self.variant,
        )  # fmt: skip

        def forward() -> torch.Tensor:
            if self.variant == "sdpa":
                heads = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                return F.scaled_dot_product_attention(heads, heads, heads, is_causal=self.causal)
            return layer(x)

        def inference() -> None:
            with torch.no_grad():
                forward()

        def both() -> None:
            x.grad = None
            layer.zero_grad()
            forward().sum().backward()

        return {FORWARD: inference, BOTH: both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--references", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--rounds", type=int, default=5, help="0 to measure memory only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=8.0, help="GB that a case may take")
    parser.add_argument("--out", type=Path, default=RESULTS / "relational_attention.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: dict[tuple[int, str, str, str], dict[int, float]] = {}
    for num_references in arguments.references:
        for size in arguments.sizes:
            cases = {v: Case(v, size, num_references, arguments.causal, arguments.threads) for v in VARIANTS}
            memory = {v: peak_memory(case, arguments.limit * 1e9) for v, case in cases.items()}
            for which in (FORWARD, BOTH):
                fitting = [v for v in VARIANTS if not isinstance(memory[v][which], str)]
                calls = {v: cases[v].passes()[which] for v in fitting}
                timings = {}
                if arguments.rounds:
                    timings = record.time_interleaved(calls, "sdpa", rounds=arguments.rounds, warmup=1)
                rows = []
                for variant, case in cases.items():
                    name, about = (num_references, which, variant), {"device": "cpu", "dtype": "float32"}
                    about |= {"x_name": "tokens", "x_value": size}
                    said = {"variant", "size", "threads", "device"}  # in fields of their own
                    config = {key: value for key, value in asdict(case).items() if key not in said}
                    config |= {"pass": which, "floor_bytes": 4 * size * case.dim}
                    row = {"benchmark": "relational_attention", "variant": variant, "metric": "peak_memory"}
                    row |= {"unit": "MB", "rounds": 1, **about}
                    peak = memory[variant][which]
                    shown = str(peak)
                    if isinstance(peak, str):
                        config["not_run"] = peak
                    elif peak is not None:
                        row["median"] = f"{peak / 1e6:.4g}"
                        shown = f"{peak / 1e6:9.1f} MB"
                        found.setdefault((*name, "memory"), {})[size] = peak
                    rows.append({**row, "config_json": json.dumps(config, sort_keys=True)})
                    if variant in timings:
                        timing = timings[variant]
                        found.setdefault((*name, "time"), {})[size] = timing.median
                        rows.append(
                            record.timing_row("relational_attention", variant, "sdpa", timing, **about, config=config)
                        )
                        shown += f" {1e3 * timing.median:9.1f} ms"
                    print(f"references {num_references} N {size:6d} {which:18s} {variant:10s} {shown}", flush=True)
                record.write(arguments.out, rows)
    for (num_references, which, variant, what), values in found.items():
        if len(values) > 1:
            (a, x), (b, y) = sorted(values.items())[-2:]
            if x > 0 and y > 0:
                print(f"references {num_references} {which:18s} {variant:10s} {what:6s} N {a} to {b}: "
                      f"slope {math.log(y / x) / math.log(b / a):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
