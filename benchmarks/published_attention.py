"""Training throughput of our 124M model against a plain re-statement of the published one, in one run on one machine.

The re-statement is written from the description of the code published with arXiv 2601.22257, not from the code: one
linear map to queries, keys and values, learned biases, a bias ``mean + std * randn`` drawn in every layer in every
training forward and added to the queries and values, the whole score matrix with a mask and softmax, PReLU with a slope
a feature, float32 cross-entropy over all logits. Under torch.compile the draw of each layer breaks its graph, as the
published one does.

Both sides start from the same weights (checked: with the noise off, their logits agree), run in the same precision, see
the same tokens and take the same steps of the same optimiser, in interleaved rounds. A call is a whole step: forward,
backward, optimiser.

python benchmarks/published_attention.py --precision bfloat16 --context 512 --batch 8 --rounds 9
python benchmarks/published_attention.py --precision float32 --context 1024 --batch 4 --rounds 5 --compile
python benchmarks/published_attention.py --precision bfloat16 --memory     (peak memory of either side)
python benchmarks/published_attention.py --precision bfloat16 --profile    (where the time of either side goes)

"products" are the products with weights that either side has to make, forward and backward, layer by layer, and
nothing in between: no implementation with the same products takes less, so the time of the published side over it is
the throughput that could be reached.
"""

import argparse
import math
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erlangen import optim
from erlangen.bench import record
from erlangen.lm import GPT, GPTConfig, run_preset
from erlangen.lm.train import build_model, build_optimizer

RESULTS = Path(__file__).parent / "results"
PRESET = run_preset("symmetry-breaking-124m")
SIDES = ("published", "ours")


class PublishedAttention(nn.Module):
    """Attention as described in arXiv 2601.22257's code: noise drawn here, the score matrix in full."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.output = nn.Linear(config.dim, config.dim)
        size, breaking = config.head_dim, PRESET.breaking
        self.register_buffer("query_mean", torch.full((size,), breaking.query_mean))
        self.register_buffer("query_std", torch.linspace(*breaking.query_std, size))
        self.register_buffer("value_mean", torch.full((size,), breaking.value_mean))
        self.register_buffer("value_std", torch.linspace(*breaking.value_std, size))
        self.register_buffer("query_bias", self.query_mean.clone())
        self.register_buffer("value_bias", self.value_mean.clone())
        mask = torch.ones(config.context_length, config.context_length).tril()
        self.register_buffer("mask", mask.view(1, 1, *mask.shape))

    @torch.compiler.disable
    @torch.no_grad()
    def sample(self) -> None:
        self.query_bias = self.query_mean + self.query_std * torch.randn_like(self.query_std)
        self.value_bias = self.value_mean + self.value_std * torch.randn_like(self.value_std)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        if self.training:
            self.sample()
        q, k, v = self.qkv(x).split(C, dim=2)
        q, k, v = (y.view(B, T, self.num_heads, self.head_dim).transpose(1, 2) for y in (q, k, v))
        q = q + self.query_bias.expand(1, self.num_heads, 1, -1)
        v = v + self.value_bias.expand(1, self.num_heads, 1, -1)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(self.head_dim))
        scores = scores.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        return self.output(y.transpose(1, 2).contiguous().view(B, T, C))


class PublishedMLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.hidden_dim)
        self.slope = nn.Parameter(torch.empty(config.hidden_dim))
        self.down = nn.Linear(config.hidden_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(torch.where(hidden >= 0, hidden, self.slope * hidden))


class PublishedBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = PublishedAttention(config)
        self.mlp_norm = nn.LayerNorm(config.dim)
        self.mlp = PublishedMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class PublishedGPT(nn.Module):
    """The whole model, with the weights of one of ours."""

    def __init__(self, ours: GPT) -> None:
        super().__init__()
        config = ours.config
        assert config.vocab_size is not None
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position_embedding = nn.Embedding(config.context_length, config.dim)
        self.blocks = nn.ModuleList(PublishedBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight
        weights = {k: v for k, v in ours.state_dict().items() if not k.startswith("symmetry_breaking.")}
        for layer in range(config.num_layers):
            for kind in ("weight", "bias"):
                parts = [weights.pop(f"blocks.{layer}.attention.{name}.{kind}") for name in ("query", "key", "value")]
                weights[f"blocks.{layer}.attention.qkv.{kind}"] = torch.cat(parts)
        missing, unexpected = self.load_state_dict(weights, strict=False)
        assert not unexpected and not {name for name in missing if name in dict(self.named_parameters())}

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def models(context: int, num_layers: int) -> dict[str, nn.Module]:
    """Both sides with the same weights, in training mode."""
    config = replace(PRESET.model, context_length=context, num_layers=num_layers)
    ours = build_model(config, PRESET.breaking, seed=0)
    sides: dict[str, nn.Module] = {"published": PublishedGPT(ours), "ours": ours}
    tokens = torch.randint(config.vocab_size or 0, (1, 65), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # in evaluation both use the mean of the biases
        first, second = (sides[name].eval()(tokens[:, :-1], tokens[:, 1:])[0] for name in SIDES)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    for model in sides.values():
        model.train()
    return sides


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, precision: str) -> None:
    """One training step."""
    model.zero_grad(set_to_none=True)
    low = torch.autocast(tokens.device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
    with low:
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
    loss.backward()
    optimizer.step(lambda: loss.item())


def weight_products(num_tokens: int, layers: int, precision: str, device: str) -> Callable[[], None]:
    """Every product of activations with a weight in a step, and the two of its backward pass; results are dropped."""
    config = PRESET.model
    shapes = [(config.dim, 3 * config.dim), (config.dim, config.dim), (config.dim, config.hidden_dim),
              (config.hidden_dim, config.dim)] * layers + [(config.dim, config.vocab_size or 0)]  # fmt: skip
    options = {"dtype": getattr(torch, precision), "device": device}
    weights = [torch.randn(n_out, n_in, **options) for n_in, n_out in shapes]
    sizes = sorted({size for shape in shapes for size in shape})
    activations = {size: torch.randn(num_tokens, size, **options) for size in sizes}

    @torch.no_grad()
    def call() -> None:
        for weight, (n_in, n_out) in zip(weights, shapes):
            F.linear(activations[n_in], weight)
            activations[n_out] @ weight
            activations[n_out].mT @ activations[n_in]

    return call


def memory(arguments: argparse.Namespace) -> None:
    """Print the peak resident memory of two steps of each side, in a process of its own."""
    for side in SIDES:
        line = [sys.executable, __file__, "--peak-of", side, "--precision", arguments.precision, "--context",
                str(arguments.context), "--batch", str(arguments.batch), "--layers", str(arguments.layers),
                "--optimizer", arguments.optimizer]  # fmt: skip
        done = subprocess.run(line, check=True, capture_output=True, text=True)
        print(f"{side:12} peak {done.stdout.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--context", type=int, default=512, help="tokens a window")
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--optimizer", choices=tuple(optim.OPTIMIZERS), default="ecd", help="its published settings")
    parser.add_argument("--compile", action="store_true", help="compile both models")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, and write nothing")
    parser.add_argument("--memory", action="store_true", help="print peak memory, and write nothing")
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "published_attention.csv")
    arguments = parser.parse_args()
    if arguments.memory:
        memory(arguments)
        return
    sides = models(arguments.context, arguments.layers)
    if arguments.peak_of:
        sides = {arguments.peak_of: sides[arguments.peak_of]}
    shape = (arguments.batch, arguments.context + 1)
    tokens = torch.randint(50257, shape, generator=torch.Generator().manual_seed(0)).to(arguments.device)
    settings = run_preset("symmetry-breaking-124m", arguments.optimizer).optimizer
    calls: dict[str, Callable[[], None]] = {}
    for name, model in sides.items():
        model.to(arguments.device)
        optimizer = build_optimizer(settings, model)
        if arguments.compile:
            model.compile()
        calls[name] = lambda m=model, o=optimizer: step(m, o, tokens, arguments.precision)
    if arguments.peak_of:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(2):
            calls[arguments.peak_of]()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{peak / 2**20:.2f} GiB, {(peak - before) / 2**20:.2f} above that before the first step")
        return
    if arguments.profile:
        for name in SIDES:
            calls[name]()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                calls[name]()
            print(name, profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=22), sep="\n")
        return
    num_tokens = arguments.batch * arguments.context
    calls["products"] = weight_products(num_tokens, arguments.layers, arguments.precision, arguments.device)
    timings = record.time_interleaved(calls, "published", rounds=arguments.rounds, warmup=1)
    rows = []
    for name, timing in timings.items():
        print(
            f"{name:32} {timing.median * 1e3:9.1f} ms [{timing.q20 * 1e3:.1f}, {timing.q80 * 1e3:.1f}]   throughput "
            f"{1 / timing.ratio:.3f} [{1 / timing.ratio_q80:.3f}, {1 / timing.ratio_q20:.3f}]"
        )
        rows.append(record.timing_row(
            "published_attention", name, "published", timing, device=arguments.device, dtype=arguments.precision,
            x_name="context", x_value=arguments.context,
            config={"batch": arguments.batch, "layers": arguments.layers, "optimizer": arguments.optimizer,
                    "compile": arguments.compile},
        ))  # fmt: skip
    record.write(arguments.out, rows)


if __name__ == "__main__":
    main()
