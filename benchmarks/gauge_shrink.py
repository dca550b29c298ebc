"""What shrinking saves, what it costs in low precision, and how long the maps of attention take.

Perplexity: small models are trained on text (bytes of tiny Shakespeare), shrunk, and evaluated on held-out text in
float32 and bfloat16: as trained, with the identity block as `shrink` chooses it, with a block as wide as the heads in
jointly chosen columns, and with one in the first columns. Then with directions dropped, weighed by the weights alone
and by inputs.

Rounding: eight models of each kind, seeds 1 to 8, on all held-out text: how far bfloat16 takes the loss from that in
float32 (nats a byte, without sign), as trained, shrunk, and with the block in the first columns. Rule, fixed before the
run: shrinking is worse than the model's own rounding where the 95 % Student interval of the paired difference, over
seeds, lies above zero.

Time: the maps that hold a block, in the shapes of known models, dense and reduced, in one interleaved run: columns that
all heads share (one product), and columns of each head's own (a product a head, batched).

python benchmarks/gauge_shrink.py
"""

import argparse
import copy
import json
import math
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from erlangen import gauge, report
from erlangen.bench import record
from erlangen.gauge import _shrink_sectors as sectors
from erlangen.gauge._reduced import ReducedLinear, Rows, reduce_rows
from erlangen.lm import GPT, GPTConfig

RESULTS = Path(__file__).parent / "results"
CONTEXT = 64
SIZES = {"dim": 128, "num_heads": 4, "num_layers": 2, "context_length": CONTEXT, "vocab_size": 256}
MODELS = {
    "gpt2-like": {"positions": "learned", "mlp": "gelu"},
    "llama-like": {"positions": "rotary", "mlp": "swiglu", "num_kv_heads": 2, "bias": False, "attention_bias": False},
}
# name -> inputs, heads, width of a head, tokens: the map that holds the block
SHAPES = {
    "values, GPT-2": (768, 12, 64, 1024),
    "values, Llama-3-8B": (4096, 8, 128, 256),
    "values, Gemma-2-2B": (2304, 4, 256, 256),
    "keys and values, DeepSeek-V2-Lite": (512, 32, 128, 512),
}


# --- perplexity -------------------------------------------------------------------------------------------------------


def read_text(path: Path, most: int | None = 300) -> tuple[Tensor, Tensor]:
    """Bytes for training, and windows [N, CONTEXT + 1] of held-out text, at most so many."""
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    cut = int(0.9 * len(data))
    rest = data[cut:]
    number = len(rest) // (CONTEXT + 1)
    return data[:cut], rest[: number * (CONTEXT + 1)].view(-1, CONTEXT + 1)[:most]


def train(config: dict, data: Tensor, steps: int, seed: int) -> GPT:
    """A model after so many steps, with the learning rate brought to zero."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(GPTConfig(**SIZES, **config), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        at = torch.randint(len(data) - CONTEXT - 1, (16,), generator=generator)
        batch = torch.stack([data[i : i + CONTEXT + 1] for i in at.tolist()])
        loss = model(batch[:, :-1], batch[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits(model: GPT, windows: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits in float32, of a copy of the model in a dtype."""
    cast = copy.deepcopy(model).to(dtype)
    return torch.cat([cast(part[:, :-1])[0].float() for part in windows.split(100)])


def perplexity(found: Tensor, windows: Tensor) -> float:
    """Of next bytes."""
    return math.exp(F.cross_entropy(found.flatten(0, 1), windows[:, 1:].flatten()).item())


def row(variant: str, baseline: str, metric: str, unit: str, value: float, dtype: str, config: dict) -> dict:
    return {
        "benchmark": "gauge_shrink", "variant": variant, "baseline": baseline, "metric": metric, "unit": unit,
        "median": f"{value:.6g}", "device": "cpu", "dtype": dtype, "config_json": json.dumps(config, sort_keys=True),
    }  # fmt: skip


def perplexities(name: str, text: Path, steps: int, seed: int) -> list[dict]:
    """Rows of one model."""
    data, windows = read_text(text)
    model = train(MODELS[name], data, steps, seed)
    at = torch.randint(len(data) - CONTEXT, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    sample = torch.stack([data[i : i + CONTEXT] for i in at])
    exact = logits(model, windows, torch.float64)
    rows = []
    first_columns = mock.patch.object(sectors, "joint_pivots", lambda bases, number: torch.arange(number))
    variants = {"as trained": None, "shrunk": {}, "block as wide as heads": {"noise": math.inf}}
    variants |= {"block in the first columns": {"noise": math.inf}}
    for keep in (24, 16, 8):
        variants |= {f"{keep} coordinates": {"keep": keep}}
        variants |= {f"{keep} coordinates, by inputs": {"keep": keep, "inputs": sample}}
    for variant, options in variants.items():
        new, config = copy.deepcopy(model), {"model": name, "steps": steps, "seed": seed}
        if options is not None:
            with first_columns if "first" in variant else nullcontext():
                found = gauge.shrink(new, **options, check=False)
            config |= {"numbers": found.numbers, "bytes": found.bytes, "multiplications": found.multiplications}
            blocks = [sector for each in found.layers.values() for sector in each.values() if sector.block]
            config |= {"block": [sector.block for sector in blocks]}
            config |= {"noise": round(max((sector.noise or 0) for sector in blocks), 2)}
        for dtype in (torch.float32, torch.bfloat16) if "coordinates" not in variant else (torch.float32,):
            of = logits(new, windows, dtype)
            label = str(dtype).removeprefix("torch.")
            config[f"error_{label}"] = float(
                f"{(of - exact).square().mean().sqrt() / exact.square().mean().sqrt():.3g}"
            )
            value = perplexity(of, windows)
            names = (f"{name}: {variant}", f"{name}: as trained")
            rows.append(row(*names, "perplexity", "", value, label, dict(config)))
            print(f"{name:11s} {variant:26s} {label:9s} perplexity {value:.5f}", config[f"error_{label}"], flush=True)
    return rows


def rounding(name: str, text: Path, steps: int, seeds: range) -> list[dict]:
    """One row a seed, and one of the differences, for a kind of model."""
    rows = []
    first_columns = mock.patch.object(sectors, "joint_pivots", lambda bases, number: torch.arange(number))
    found: dict[str, list[float]] = {"as trained": [], "shrunk": [], "block in the first columns": []}
    for seed in seeds:
        data, windows = read_text(text, None)
        model = train(MODELS[name], data, steps, seed)
        exact = math.log(perplexity(logits(model, windows, torch.float32), windows))
        for variant, values in found.items():
            new = copy.deepcopy(model)
            if variant != "as trained":
                first = variant != "shrunk"
                with first_columns if first else nullcontext():
                    gauge.shrink(new, noise=math.inf if first else 2.0, check=False)
            off = abs(math.log(perplexity(logits(new, windows, torch.bfloat16), windows)) - exact)
            values.append(off)
            config = {"model": name, "steps": steps, "seed": seed, "windows": len(windows)}
            names = (f"{name}: {variant}, seed {seed}", f"{name}: as trained, seed {seed}")
            rows.append(row(*names, "rounding", "nats", off, "bfloat16", config))
            print(f"{name:11s} seed {seed} {variant:26s} {off:.2e} nats from float32", flush=True)
    for variant in ("shrunk", "block in the first columns"):
        differences = np.subtract(found[variant], found["as trained"])
        mean, low, high = report.paired_interval(differences)
        config = {"model": name, "steps": steps, "seeds": list(seeds), "rule": "worse where the interval is above 0"}
        made = row(
            f"{name}: {variant}", f"{name}: as trained", "rounding, difference", "nats", mean, "bfloat16", config
        )
        rows.append(made | {"q20": f"{low:.3g}", "q80": f"{high:.3g}"})
        print(f"{name:11s} {variant:26s} {mean:+.2e} [{low:+.2e}, {high:+.2e}] more than as trained", flush=True)
    return rows


# --- time -------------------------------------------------------------------------------------------------------------


class OwnColumns(torch.nn.Module):
    """The same map with columns of each head's own: gathered for every head, and one batched product."""

    def __init__(self, weight: Tensor, columns: Tensor) -> None:
        super().__init__()
        heads, width, inputs = weight.shape
        rest = torch.ones(heads, inputs, dtype=torch.bool).scatter_(1, columns, False)
        self.columns, self.rest = columns.flatten(), rest.nonzero()[:, 1]
        self.heads, self.width = heads, width
        self.weight = torch.stack([rows[:, mask] for rows, mask in zip(weight, rest)])

    def forward(self, x: Tensor) -> Tensor:
        start = x.index_select(-1, self.columns).view(-1, self.heads, self.width).transpose(0, 1)
        rest = x.index_select(-1, self.rest).view(x.shape[0], self.heads, -1).transpose(0, 1)
        return torch.baddbmm(start, rest, self.weight.mT).transpose(0, 1).flatten(1)


def maps_of(inputs: int, heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ReducedLinear, OwnColumns, int]:
    """A dense weight, and the two reduced maps that stand for it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(heads, width, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    ones, one = weight.new_ones(inputs), weight.new_ones(width)
    second = list(torch.eye(width, dtype=torch.float64).expand(heads, -1, -1))
    block = sectors.identity_block(list(weight), second, (ones, one), inputs, 2.0)
    assert block.columns is not None
    places = torch.arange(heads * width)
    claim = Rows(places, torch.cat(block.first), None, block.columns, heads, width)
    reduced = reduce_rows(heads * width, inputs, [claim])
    assert reduced is not None
    own = torch.stack([sectors.joint_pivots([torch.linalg.qr(rows.mT).Q.mT], width) for rows in weight])
    shaped = torch.stack([torch.linalg.solve(rows[:, columns], rows) for rows, columns in zip(weight, own)])
    dense = weight.flatten(0, 1).to(dtype)
    return dense, reduced.module(dtype, weight.device), OwnColumns(shaped.to(dtype), own), block.columns.numel()


@torch.no_grad()
def times(name: str, rounds: int, dtype: torch.dtype) -> list[dict]:
    """Rows of one shape."""
    inputs, heads, width, tokens = SHAPES[name]
    dense, reduced, own, block = maps_of(inputs, heads, width, dtype)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.allclose(own(x), x @ _dense_own(own, inputs).mT, rtol=1e-2, atol=1e-2)
    calls = {"dense": lambda: F.linear(x, dense), "shared columns": lambda: reduced(x), "own columns": lambda: own(x)}
    timings = record.time_interleaved(calls, "dense", rounds=rounds)
    stored = {
        "dense": dense.numel(),
        "shared columns": sum(part.weight.numel() for part in reduced.parts),
        "own columns": own.weight.numel(),
    }
    rows = []
    for variant, timing in timings.items():
        config = {"map": name, "inputs": inputs, "heads": heads, "width": width, "tokens": tokens,
                  "multiplications": stored[variant], "block": block if "shared" in variant else width}  # fmt: skip
        if variant == "dense":
            del config["block"]
        span = f"({timing.ratio_q20:.3f} to {timing.ratio_q80:.3f})"
        share = stored[variant] / stored["dense"]
        print(
            f"{name:34s} {variant:15s} {1e3 * timing.median:8.2f} ms {timing.ratio:.3f} {span} {share:.3f}", flush=True
        )
        rows.append(
            record.timing_row(
                "gauge_shrink", f"{name}: {variant}", f"{name}: dense", timing, device="cpu",
                dtype=str(dtype).removeprefix("torch."), x_name="tokens", x_value=tokens, config=config,
            )
        )  # fmt: skip
    return rows


def _dense_own(own: OwnColumns, inputs: int) -> Tensor:
    weight = own.weight.new_zeros(own.heads, own.width, inputs)
    rest, columns = own.rest.view(own.heads, 1, -1), own.columns.view(own.heads, own.width)
    weight.scatter_(2, rest.expand(-1, own.width, -1), own.weight)
    weight.scatter_(2, columns[..., None].mT.expand(-1, own.width, -1), torch.eye(own.width).to(weight).expand_as(
        weight[:, :, : own.width]))  # fmt: skip
    return weight.flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["perplexity", "rounding", "time"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--text", type=Path, default=Path("../shared/data/text/tinyshakespeare.txt"))
    parser.add_argument("--steps", type=int, default=500, help="of training, a model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "gauge_shrink.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if "time" in arguments.parts:
        for name in SHAPES:
            record.write(arguments.out, times(name, arguments.rounds, torch.float32))
    if "rounding" in arguments.parts:
        for name in MODELS:
            record.write(arguments.out, rounding(name, arguments.text, arguments.steps, range(1, 9)))
    if "perplexity" in arguments.parts:
        for name in MODELS:
            record.write(arguments.out, perplexities(name, arguments.text, arguments.steps, arguments.seed))


if __name__ == "__main__":
    main()
