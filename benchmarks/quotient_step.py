"""What it costs to keep steps off the gauge, as a share of a training step.

A model of random weights, one forward and backward of a few thousand tokens at most, and one step of each optimiser, in
one run, interleaved. A training step has more tokens than that: its forward and backward are taken as proportional to
their number. What a treatment adds is the difference to the optimiser without it, and its share is that over the whole
step, optimiser included. "dressed" is brought to the balanced representative at every step, which is counted tenfold
less, as in the default of every tenth.

python benchmarks/quotient_step.py --preset tiny --vocab 256 --rounds 20
python benchmarks/quotient_step.py --preset 124m --vocab 50304 --context 1024 --rounds 7 --threads 2
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD, AdamW

from erlangen import gauge
from erlangen.bench import record
from erlangen.lm import GPT, preset

RESULTS = Path(__file__).parent / "results"
BASELINE = "forward and backward"
# Treatment -> the optimiser without it, and how often it is used.
TREATED = {
    "AdamW, horizontal": ("AdamW", 1.0),
    "AdamW, horizontal at balanced heads": ("AdamW", 1.0),
    "AdamW, dressed": ("AdamW", 0.1),
    "QuotientSGD": ("SGD", 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="124m", help="size of the model")
    parser.add_argument("--vocab", type=int, default=50304, help="size of the vocabulary")
    parser.add_argument("--positions", default="learned", choices=["learned", "rotary"])
    parser.add_argument("--context", type=int, default=128, help="tokens of the window that is timed")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a training step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "quotient_step.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = preset(
        arguments.preset, vocab_size=arguments.vocab, context_length=arguments.context, positions=arguments.positions
    )
    model = GPT(config, generator=torch.Generator().manual_seed(0)).to(arguments.device)
    tokens = torch.randint(arguments.vocab, (1, arguments.context + 1), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(arguments.device)

    def forward_and_backward() -> None:
        model(tokens[:, :-1], tokens[:, 1:])[1].backward()

    forward_and_backward()
    # Whatever changes the gauge has weights of its own; rates are so small that the others keep theirs.
    balanced, dressed, invariant = (copy.deepcopy(model) for _ in range(3))
    for one in (balanced, dressed, invariant):
        for parameter, other in zip(one.parameters(), model.parameters()):
            parameter.grad = other.grad
    gauge.dress(balanced)
    optimizers = {
        "SGD": SGD(model.parameters(), lr=1e-12, momentum=0.9),
        "AdamW": AdamW(model.parameters(), lr=1e-12),
        "AdamW, horizontal": gauge.horizontal(AdamW(model.parameters(), lr=1e-12), model),
        "AdamW, horizontal at balanced heads": gauge.horizontal(AdamW(balanced.parameters(), lr=1e-12), balanced),
        "AdamW, dressed": gauge.dressed(AdamW(dressed.parameters(), lr=1e-12), dressed, every=1),
        "QuotientSGD": gauge.QuotientSGD(invariant, lr=1e-12),
    }
    calls: dict[str, Callable[[], Any]] = {name: optimizer.step for name, optimizer in optimizers.items()}
    timings = record.time_interleaved({BASELINE: forward_and_backward, **calls}, BASELINE, rounds=arguments.rounds)
    settings = {
        "preset": arguments.preset, "vocab": arguments.vocab, "positions": arguments.positions,
        "context": arguments.context, "tokens_a_step": arguments.tokens,
    }  # fmt: skip
    passes = timings[BASELINE].median * arguments.tokens / arguments.context
    rows = []
    for name, timing in timings.items():
        details: dict[str, Any] = dict(settings)
        text = ""
        if name in TREATED:
            plain, often = TREATED[name]
            added = (timing.median - timings[plain].median) * often
            details["share_of_step"] = round(added / (passes + timings[plain].median), 5)
            text = f"   adds {added * 1e3:8.1f} ms, {100 * details['share_of_step']:.2f} % of a step"
        print(f"{name:36s} {timing.median * 1e3:9.1f} ms [{timing.q20 * 1e3:.1f}, {timing.q80 * 1e3:.1f}]{text}")
        rows.append(
            record.timing_row(
                "quotient_step", name, BASELINE, timing, device=arguments.device, dtype="float32",
                x_name="parameters", x_value=sum(p.numel() for p in model.parameters()), config=details,
            )
        )  # fmt: skip
    print(f"a step of {arguments.tokens} tokens: {passes:.2f} s of forward and backward, by proportion")
    record.write(arguments.out, rows)


if __name__ == "__main__":
    main()
