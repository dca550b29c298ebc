"""Certified skipping against the number of poses: time, and the proven error beside the measured one.

Poses spread evenly, one a unit cell, in Morton's order; heads whose scores fall to −1 at a distance of 1 to 2. Time of
forward and of forward + backward (gradients to poses, λ, τ and values) of ``lie_attention(..., skip=ε)``. The error is
measured on 512 queries, against the same queries without skipping (cross-attention in tiles, float32), and proven by
ε (max value − min value).

python benchmarks/lie_skipping.py --group SE2 --sizes 2048 4096 8192 16384 32768 65536
"""

import argparse
import json
from pathlib import Path

import torch

from erlangen import lie
from erlangen.bench import record

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
    poses = poses[:, lie.morton_order(poses[0], group)].contiguous()
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

    sample = torch.randint(size, (512,), generator=generator)
    exact = lie.lie_attention(
        poses[:, sample], poses, value, group=group, block_weights=weights, temperature=temperature, check=False,
        impl="tiled",
    )  # fmt: skip
    for share in arguments.shares:
        error = float((attend(poses, value, weights, temperature, share)[:, :, sample] - exact).abs().max())
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
        for metric, found in (("measured_error", error), ("proven_error", proven)):
            rows.append(
                {"benchmark": "lie_skipping", "variant": f"skip={share:g}", "metric": metric, "x_name": "N",
                 "x_value": size, "median": f"{found:.3g}", "device": "cpu", "dtype": "float32",
                 "config_json": json.dumps({"group": str(group), "share": share, "spacing": arguments.spacing})}
            )  # fmt: skip
        print(f"{group} N={size:6d} skip={share:g} error {error:.1e}, proven {proven:.1e}", flush=True)
        record.write(arguments.out, rows)


if __name__ == "__main__":
    main()
