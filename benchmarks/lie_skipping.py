"""Certified skipping against the number of poses: time, pairs, and the proven error beside the measured one.

Poses spread evenly, one a cell, in no order; heads whose scores fall to −1 at a distance of 1 to 2. Time of forward and
of forward + backward (gradients to poses, λ, τ and values) of ``lie_attention(..., skip=ε)``. Beside it what does not
depend on the machine: the pairs a query whose geometry is computed (half of them serve their transposes too, which
counts as two), and the least number of pairs a query that all but ε of its weight is in, mean and widest head. Errors
are measured on 128 queries against all pairs in float64: with skipping, and without (cross-attention in tiles), the
rounding of float32. Proven is ε (max value − min value), for what skipping adds.

python benchmarks/lie_skipping.py --group SE2 --sizes 2048 4096 8192 16384 32768 65536
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from erlangen import lie
from erlangen.bench import record
from erlangen.lie._skipping import SkippingTiles

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", default="SE2")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--spacing", type=float, default=1.0, help="width of the cell a pose has to itself")
    parser.add_argument("--shares", type=float, nargs="+", default=[1e-3, 1e-6], help="ε")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "lie_skipping.csv")
    arguments = parser.parse_args()
    for size in arguments.sizes:
        run(lie.parse(arguments.group), size, arguments)


def run(group: lie.Group, size: int, arguments: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    num_heads, width = 8, 32
    poses = group.random(1, size, generator=generator)
    side = arguments.spacing * size ** (1 / group.point_dim)
    poses[..., :-1, -1] = side * torch.rand(1, size, group.point_dim, generator=generator)
    value = torch.randn(1, num_heads, size, width, generator=generator)
    weights = torch.ones(num_heads, len(group.blocks))
    temperature = torch.linspace(1.0, 4.0, num_heads)
    leaves = [x.requires_grad_() for x in (poses.clone(), value.clone(), weights.clone(), temperature.clone())]

    def attend(p: torch.Tensor, v: torch.Tensor, w: torch.Tensor, t: torch.Tensor, share: float) -> torch.Tensor:
        return lie.lie_attention(
            p, p, v, group=group, block_weights=w, temperature=t, check=False, skip=share, impl="tiled"
        )

    def both(share: float) -> None:
        torch.autograd.grad(attend(*leaves, share).sum(), leaves)

    sample = torch.randint(size, (128,), generator=generator)
    exact, needed = all_pairs(poses, sample, value, group, weights, temperature, arguments.shares)
    plain = lie.lie_attention(
        poses[:, sample], poses, value, group=group, block_weights=weights, temperature=temperature, check=False,
        impl="tiled",
    )  # fmt: skip
    rounding = float((plain - exact).abs().max())
    for share in arguments.shares:
        with count_pairs() as pairs:
            found = attend(poses, value, weights, temperature, share)
        error = float((found[:, :, sample] - exact).abs().max())
        proven = share * float(value.max() - value.min())
        calls = {
            "forward": lambda share=share: attend(poses, value, weights, temperature, share),
            "forward + backward": lambda share=share: both(share),
        }
        timings = record.time_interleaved(calls, "forward", rounds=arguments.rounds, warmup=1)
        rows = []
        for name, timing in timings.items():
            config = {"group": str(group), "pass": name, "share": share, "spacing": arguments.spacing,
                      "num_heads": num_heads, "head_dim": width}  # fmt: skip
            row = record.timing_row(
                "lie_skipping", f"skip={share:g}", "forward", timing, device="cpu", dtype="float32",
                x_name="N", x_value=size, config=config,
            )  # fmt: skip
            rows.append(row)
            print(f"{group} N={size:6d} skip={share:g} {name:20s} {timing.median:8.3f} s", flush=True)
        counts = {"pairs_per_query": sum(pairs) / size, "needed_mean_head": needed[share].mean().item(),
                  "needed_widest_head": needed[share].max().item()}  # fmt: skip
        errors = {"measured_error": error, "error_without_skipping": rounding, "proven_error": proven}
        for metric, found in (errors | counts).items():
            rows.append(
                {"benchmark": "lie_skipping", "variant": f"skip={share:g}", "metric": metric, "x_name": "N",
                 "x_value": size, "median": f"{found:.3g}", "device": "cpu", "dtype": "float32",
                 "config_json": json.dumps({"group": str(group), "share": share, "spacing": arguments.spacing})}
            )  # fmt: skip
        print(
            f"{group} N={size:6d} skip={share:g} error {error:.1e}, without {rounding:.1e}, proven {proven:.1e}",
            flush=True,
        )
        print(f"{group} N={size:6d} skip={share:g} {json.dumps(counts)}", flush=True)
        record.write(arguments.out, rows)


@contextmanager
def count_pairs() -> Iterator[list[int]]:
    """A list of the pairs of each tile that is computed, each with its transpose where it serves that too."""
    plain, pairs = SkippingTiles._tiles, []

    def counted(self: SkippingTiles, log_least: torch.Tensor | None) -> Iterator[tuple]:
        for queries, keys, same in plain(self, log_least):
            each = self.queries.slots.shape[1] * self.keys.slots.shape[1] * len(queries)
            pairs.append(each * queries.shape[1] * keys.shape[1] * (2 if self.symmetric and not same else 1))
            yield queries, keys, same

    SkippingTiles._tiles = counted
    try:
        yield pairs
    finally:
        SkippingTiles._tiles = plain


def all_pairs(
    poses: torch.Tensor, sample: torch.Tensor, value: torch.Tensor, group: lie.Group, weights: torch.Tensor,
    temperature: torch.Tensor, shares: list[float],
) -> tuple[torch.Tensor, dict[float, torch.Tensor]]:  # fmt: skip
    """In float64, of some queries: outputs [1, H, n, D]; and for each share the least number of keys that have all but
    that share of the weight of a query, mean over queries, [H].
    """
    outputs, counts = [], {share: [] for share in shares}
    for part in sample.split(8):
        rows = lie.lie_weights(
            poses[:, part].double(), poses.double(), group=group, block_weights=weights.double(),
            temperature=temperature.double(), check=False,
        )  # fmt: skip
        outputs.append(rows @ value.double())
        left_out = rows[0].sort(-1).values.cumsum(-1)
        for share in shares:
            counts[share].append((left_out > share).sum(-1).double())
    return torch.cat(outputs, 2), {share: torch.cat(found, 1).mean(1) for share, found in counts.items()}


if __name__ == "__main__":
    main()
