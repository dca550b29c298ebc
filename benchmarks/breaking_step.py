"""Step time of a broken model against the plain one: forward and backward, in one run, interleaved.

"plain, a copy" is the control: its distance from "plain" is what this machine makes of two equal models. "what
breaking adds" times alone what a broken step does beside a plain one, the draw and its additions to the learned
biases; its ratio is the share of a plain step that they take.

python benchmarks/breaking_step.py --preset tiny --batch 16 --rounds 400
python benchmarks/breaking_step.py --preset 124m --vocab 50304 --context 512 --batch 1 --rounds 15
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import nn

from erlangen.bench import record
from erlangen.breaking import break_symmetry
from erlangen.lm import GPT, preset

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="size of the model")
    parser.add_argument("--vocab", type=int, default=256, help="size of the vocabulary")
    parser.add_argument("--context", type=int, help="tokens a window (default: the preset's)")
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--compile", action="store_true", help="compile both models")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "breaking_step.csv")
    arguments = parser.parse_args()
    config = preset(arguments.preset, vocab_size=arguments.vocab)
    context = arguments.context or config.context_length
    plain = GPT(config, generator=torch.Generator().manual_seed(0)).to(arguments.device)
    models: dict[str, nn.Module] = {
        "plain": plain,
        "broken": break_symmetry(copy.deepcopy(plain)),
        "plain, a copy": copy.deepcopy(plain),
    }
    tokens = torch.randint(
        arguments.vocab, (arguments.batch, context + 1), generator=torch.Generator().manual_seed(0)
    ).to(arguments.device)

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        model(tokens[:, :-1], tokens[:, 1:])[1].backward()

    if arguments.compile:
        for model in models.values():
            model.compile(fullgraph=True)
    breaking = models["broken"].get_submodule("symmetry_breaking")
    learned = torch.zeros(config.dim, device=arguments.device)

    def added() -> None:
        breaking.redraw()
        for layer in range(config.num_layers):
            for which in ("query", "value"):
                learned + breaking.bias(which, layer)

    timings = record.time_interleaved(
        {name: lambda model=model: step(model) for name, model in models.items()} | {"what breaking adds": added},
        "plain",
        rounds=arguments.rounds,
        warmup=3,
    )
    for name, timing in timings.items():
        print(
            f"{name:24} {timing.median * 1e3:9.2f} ms   ratio {timing.ratio:.4f} "
            f"[{timing.ratio_q20:.4f}, {timing.ratio_q80:.4f}]"
        )
    rows = [
        record.timing_row(
            "breaking_step", name, "plain", timing, device=arguments.device, dtype="float32",
            x_name="parameters", x_value=sum(p.numel() for p in plain.parameters()),
            config={"preset": arguments.preset, "batch": arguments.batch, "context": context,
                    "vocab": arguments.vocab, "compile": arguments.compile},
        )
        for name, timing in timings.items()
    ]  # fmt: skip
    record.write(arguments.out, rows)


if __name__ == "__main__":
    main()
