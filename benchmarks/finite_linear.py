"""Equivariant linear layers against ``torch.nn.Linear`` of the same width, on CPU: forward, and forward + backward.

Channels are copies of the regular representation, in as out; the baseline is the dense layer in the same rounds, and
``ratio`` its inverse speed-up. ``config_json`` has the theoretical factor (fewer multiplications, see
``erlangen.finite.linear``), the measured one and their quotient, to be 0.8 or more.

python benchmarks/finite_linear.py --groups "reverse_complement(6)" "symmetric(3)" "dihedral(4)"
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from erlangen.bench import record
from erlangen.finite import PermutationGroup, parse
from erlangen.finite.linear import EquivariantLinear, EquivariantMLP

RESULTS = Path(__file__).parent / "results"


def theoretical(group: PermutationGroup) -> float:
    """How many times fewer multiplications than a dense layer."""
    return group.order**2 / sum(irrep.dimension**3 / irrep.endo for irrep in group.irreps)


def passes(layer: Callable, x: torch.Tensor) -> dict[str, Callable]:
    """Forward without, and forward + backward with gradients to the input and to all parameters."""
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(x.shape, generator=generator)
    leaf = x.clone().requires_grad_()
    parameters = [leaf, *layer.parameters()]

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return {"forward": forward, "forward + backward": lambda: torch.autograd.grad(layer(leaf), parameters, g)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", default=["reverse_complement(6)", "symmetric(3)", "dihedral(4)"])
    parser.add_argument("--channels", type=int, nargs="+", default=[512, 1024, 2048], help="to the nearest multiple")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mlp", action="store_true", help="also an MLP of fourfold width against the dense one")
    parser.add_argument("--out", type=Path, default=RESULTS / "finite_linear.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.groups:
        for channels in arguments.channels:
            run(parse(name), channels, arguments)


def run(group: PermutationGroup, channels: int, arguments: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    copies = max(1, round(channels / group.order))
    dim, factor = copies * group.order, theoretical(group)
    x = torch.randn(arguments.tokens, dim, generator=generator)
    pairs = {"linear": (EquivariantLinear(group, dim, dim, generator=generator), nn.Linear(dim, dim))}
    if arguments.mlp:
        dense = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        pairs["mlp"] = (EquivariantMLP(group, dim, 4 * dim, generator=generator), dense)
    rows = []
    for what, (layer, dense) in pairs.items():
        ours, theirs = passes(layer, x), passes(dense, x)
        for which in ours:
            calls = {f"equivariant {what}": ours[which], f"dense {what}": theirs[which]}
            timings = record.time_interleaved(calls, f"dense {what}", rounds=arguments.rounds)
            speedup = 1 / timings[f"equivariant {what}"].ratio
            print(
                f"{group!s:22s} {what:6s} dim={dim:5d} {which:18s} {speedup:5.2f} times as fast, "
                f"theory {factor:.2f}: {speedup / factor:.0%}",
                flush=True,
            )
            config = {
                "group": str(group), "copies": copies, "tokens": arguments.tokens, "pass": which,
                "theoretical": round(factor, 4), "speedup": round(speedup, 4),
                "of_theoretical": round(speedup / factor, 4),
            }  # fmt: skip
            rows += [
                record.timing_row(
                    "finite_linear", variant, f"dense {what}", timing, device="cpu", dtype="float32",
                    x_name="channels", x_value=dim, config=config,
                )
                for variant, timing in timings.items()
            ]  # fmt: skip
    record.write(arguments.out, rows)


if __name__ == "__main__":
    main()
