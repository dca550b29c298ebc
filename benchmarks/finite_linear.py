"""Equivariant layers against dense ones of the same width, on CPU: forward, and forward + backward.

"linear" is `EquivariantLinear` against ``torch.nn.Linear``, "block" a whole `EquivariantBlock` (attention and a
feed-forward layer of fourfold width) against the same block of dense maps. Channels are copies of the regular
representation, a multiple of 8, in as out; the baseline is the dense layer in the same rounds, and ``ratio`` the
inverse speed-up. ``config_json`` has the theoretical factor of the linear maps (fewer multiplications, see
``erlangen.finite.linear``), the measured one and their quotient.

"dense linear as one block" is the dense map through the same products as the equivariant layer, which in float32 are
convolutions that oneDNN makes and not the matrix products of ``torch.nn.Linear``, which MKL makes: what is saved in
multiplications is the quotient of its ratio and the equivariant one.

A fresh result of 32 MB or more costs the system a page fault for each 4 kB of it, as long as the C library gives freed
memory back at once. By default the benchmark starts itself again with settings of glibc that keep it (what a caching
allocator does on a GPU), for both sides; with ``--memory returned`` it does not.

python benchmarks/finite_linear.py --groups "reverse_complement(6)" "symmetric(3)" "dihedral(4)"
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erlangen.bench import record
from erlangen.finite import EquivariantBlock, PermutationGroup, parse
from erlangen.finite.linear import EquivariantLinear

RESULTS = Path(__file__).parent / "results"
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 34), "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}


class DenseBlock(nn.Module):
    """The dense twin of `EquivariantBlock`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        heads = [
            part(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        ]
        x = x + self.output(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


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
    parser.add_argument("--channels", type=int, nargs="+", default=[512, 1024, 2048], help="to a multiple of 8 copies")
    parser.add_argument("--block-channels", type=int, default=1024, help="blocks are measured up to so many")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", nargs="+", choices=("linear", "block"), default=["linear", "block"])
    parser.add_argument(
        "--memory", choices=("kept", "returned"), default="kept", help="what the C library does with it"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "finite_linear.csv")
    arguments = parser.parse_args()
    if arguments.memory == "kept" and not KEEP.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(arguments.threads)
    for name in arguments.groups:
        for tokens in arguments.tokens:
            for channels in arguments.channels:
                run(parse(name), channels, tokens, arguments)


def run(group: PermutationGroup, channels: int, tokens: int, arguments: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(0)
    copies = 8 * max(1, round(channels / group.order / 8))
    dim, factor = copies * group.order, theoretical(group)
    x = torch.randn(tokens // group.degree, group.degree, dim, generator=generator)
    pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
    if "linear" in arguments.layers:
        pairs["linear"] = EquivariantLinear(group, dim, dim, generator=generator), nn.Linear(dim, dim)
    if "block" in arguments.layers and channels <= arguments.block_channels:
        heads = group.order * max(1, round(copies / 64))  # about 64 wide, and as many as the group permutes
        while copies * group.order % heads or copies % (heads // group.order):
            heads -= group.order
        pairs["block"] = EquivariantBlock(group, dim, heads, generator=generator), DenseBlock(dim, heads)
    one_block = EquivariantLinear(parse("cyclic(1)"), dim, dim, generator=generator)
    rows = []
    cases = {what: (passes(layer, x), passes(dense, x)) for what, (layer, dense) in pairs.items()}
    for what, (ours, theirs) in cases.items():
        for which in ours:
            calls = {f"equivariant {what}": ours[which], f"dense {what}": theirs[which]}
            if what == "linear":
                calls["dense linear as one block"] = passes(one_block, x)[which]
            timings = record.time_interleaved(calls, f"dense {what}", rounds=arguments.rounds)
            speedup = 1 / timings[f"equivariant {what}"].ratio
            print(
                f"{group!s:22s} {what:6s} tokens={tokens:5d} dim={dim:5d} {which:18s} {speedup:5.2f} times as fast, "
                f"theory {factor:.2f}: {speedup / factor:.0%}"
                + "".join(f"; as one block {1 / timings[name].ratio:.2f}" for name in list(calls)[2:]),
                flush=True,
            )
            config = {
                "group": str(group), "copies": copies, "tokens": x[..., 0].numel(), "pass": which,
                "memory": arguments.memory,
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
