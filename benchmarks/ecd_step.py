"""Time of one optimiser step on the parameter shapes of GPT-2 124M: ECD and AdamW against SGD with momentum.

Baseline: ``torch.optim.SGD(momentum=0.95, foreach=True)``. Every optimiser has its own parameters and gradients; the
learning rates are so small that the parameters keep their size.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from erlangen.bench import record
from erlangen.optim import ECD

RESULTS = Path(__file__).parent / "results"

BASELINE = "sgd momentum foreach"


def gpt2_shapes(layers: int = 12, dim: int = 768, vocab: int = 50304, context: int = 512) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a GPT-2 with biases and a tied head."""
    shapes: list[tuple[int, ...]] = [(vocab, dim), (context, dim)]
    for _ in range(layers):
        shapes += [(dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
        shapes += [(dim,), (dim,), (4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    return [*shapes, (dim,), (dim,)]


def parameters(shapes: list[tuple[int, ...]], device: str) -> list[torch.nn.Parameter]:
    """Random float32 parameters with random gradients, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02).to(device))
        param.grad = torch.randn(shape, generator=generator).mul_(1e-4).to(device)
        params.append(param)
    return params


def main() -> None:
    """Run the benchmark and append its rows to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="timed rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="transformer blocks (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the parameters live (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "ecd_step.csv", help="CSV file to append to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    shapes = gpt2_shapes(layers=args.layers)
    make: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        BASELINE: lambda params: torch.optim.SGD(params, lr=1e-8, momentum=0.95, foreach=True),
        "ecd exact": lambda params: ECD(params, lr=1e-6, kick="exact"),
        "ecd euler": lambda params: ECD(params, lr=1e-6, kick="euler"),
        "ecd exact wd": lambda params: ECD(params, lr=1e-6, weight_decay=1e-4),
        "ecd exact foreach": lambda params: ECD(params, lr=1e-6, foreach=True),
        "sgd momentum fused": lambda params: torch.optim.SGD(params, lr=1e-8, momentum=0.95, fused=True),
        "adamw foreach": lambda params: torch.optim.AdamW(params, lr=1e-8, foreach=True),
    }

    def step(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        return (lambda: optimizer.step(loss=4.0)) if isinstance(optimizer, ECD) else optimizer.step

    calls = {name: step(build(parameters(shapes, args.device))) for name, build in make.items()}
    timings = record.time_interleaved(calls, BASELINE, rounds=args.rounds)

    num_params = sum(torch.Size(shape).numel() for shape in shapes)
    config = {"layers": args.layers, "dim": 768, "vocab": 50304, "context": 512, "biases": True}
    rows = []
    for name, timing in timings.items():
        print(
            f"{name:20s} {timing.median * 1e3:8.1f} ms   {timing.ratio:.2f} times the baseline "
            f"[{timing.ratio_q20:.2f}, {timing.ratio_q80:.2f}]"
        )
        row = record.timing_row(
            "ecd_step",
            name,
            BASELINE,
            timing,
            device=args.device,
            dtype="float32",
            x_name="num_params",
            x_value=num_params,
            config=config,
        )
        rows.append(row)
    record.write(args.out, rows)


if __name__ == "__main__":
    main()
