"""Seconds to bring a checkpoint to canonical form, folder to folder, by its size; and the memory that takes.

Random weights in the shapes of GPT-2 (12 layers of 768, 24 of 1024, 36 of 1280) and of a Llama with grouped keys, each
written as a folder of Hugging Face and canonicalised without the comparison of outputs, in a process of its own. Memory
is the peak resident size of that process over what it had before, beside the largest layer as stored. Seconds are given
for 100M parameters, and for 100M of those that are in layers: tables take less.

python benchmarks/gauge_canonicalize.py --sizes 124M 355M
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch

from erlangen.bench import record

RESULTS = Path(__file__).parent / "results"
GPT2 = {"124M": (12, 768, 12), "355M": (24, 1024, 16), "774M": (36, 1280, 20)}
LLAMA = {"llama-160M": (12, 768, 12, 4), "llama-1B": (16, 2048, 32, 8)}


def write_model(size: str, folder: Path) -> tuple[int, int, int]:
    """Write random weights; returns their number, that in layers, and the bytes of the largest layer or table."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if size in GPT2:
        layers, dim, heads = GPT2[size]
        model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=dim, n_head=heads))
        blocks, table = model.transformer.h, model.transformer.wte
    else:
        layers, dim, heads, kv_heads = LLAMA[size]
        model = LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=layers, hidden_size=dim, num_attention_heads=heads, num_key_value_heads=kv_heads,
                intermediate_size=4 * dim, vocab_size=32_000,
            )
        ).to(torch.bfloat16)  # fmt: skip
        blocks, table = model.model.layers, model.model.embed_tokens
    model.save_pretrained(folder, max_shard_size="1GB")
    sizes = [sum(p.numel() * p.element_size() for p in part.parameters()) for part in (blocks[0], table)]
    in_layers = sum(p.numel() for p in blocks.parameters())
    return sum(p.numel() for p in model.parameters()), in_layers, max(sizes)


def peak() -> int:
    """Bytes, the largest resident size so far (getrusage would count what the parent had)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def canonicalise(folder: str, output: str, threads: int, answer) -> None:
    """In a process of its own: seconds, and bytes over those at the start."""
    from erlangen.interop.checkpoints import canonicalize_folder

    torch.set_num_threads(threads)
    torch.linalg.svd(torch.eye(4, dtype=torch.float64))  # the library is loaded
    before = peak()
    start = time.perf_counter()
    canonicalize_folder(folder, output, check=False)
    seconds = time.perf_counter() - start
    answer.put((seconds, peak() - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", choices=[*GPT2, *LLAMA], default=["124M", "355M", "llama-160M", "llama-1B"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "gauge_canonicalize.csv")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    torch.set_num_threads(arguments.threads)
    rows = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            parameters, in_layers, largest = write_model(size, Path(scratch) / "in")
            seconds, peaks = [], []
            for number in range(arguments.rounds):
                answer = context.Queue()
                output = str(Path(scratch) / f"out{number}")
                process = context.Process(
                    target=canonicalise, args=(str(Path(scratch) / "in"), output, arguments.threads, answer)
                )
                process.start()
                one = answer.get()
                process.join()
                seconds.append(one[0])
                peaks.append(one[1])
        q20, median, q80 = (record.quantile(seconds, fraction) for fraction in (0.2, 0.5, 0.8))
        timing = record.Timing(q20, median, q80, 1.0, 1.0, 1.0, arguments.rounds)
        config = {"size": size, "largest_layer_bytes": largest, "peak_bytes": max(peaks),
                  "seconds_per_100M": round(1e8 * median / parameters, 3),
                  "seconds_per_100M_in_layers": round(1e8 * median / in_layers, 3)}  # fmt: skip
        print(f"{size:11s} {parameters:13,} parameters {median:6.2f} s", json.dumps(config), flush=True)
        rows.append(
            record.timing_row(
                "gauge_canonicalize", size, size, timing, device="cpu", dtype="float32" if size in GPT2 else "bfloat16",
                x_name="parameters", x_value=parameters, config=config,
            )
        )  # fmt: skip
    record.write(arguments.out, rows)


if __name__ == "__main__":
    main()
