"""Memory that `canonicalize` and `merge` of folders take, with experts and without, beside the largest layer.

Random weights in made-up shapes: of a DeepSeek-V2 (one dense layer, then mixtures of 16 experts and what they share),
and of a Llama with grouped keys. Each folder is treated in a process of its own, after a small folder of the same kind
has been, which brings in libraries and their workspace. Memory is the largest resident size (VmHWM of
/proc/self/status; getrusage would count what the parent had) less the resident size just before the call.

"Largest" is the largest layer (one decoder layer, with all its experts) or table as it is stored: ``ratio`` is memory
over that. ``config_json`` has the bytes of it and of the largest expert.

python benchmarks/gauge_memory.py --shapes experts dense --dtypes bfloat16 float32
"""

import argparse
import json
import multiprocessing
import re
import tempfile
import time
from functools import cache
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from erlangen.bench import record
from erlangen.interop import layout_of_config

RESULTS = Path(__file__).parent / "results"
IDS = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
EXPERTS = IDS | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 1024,
    "intermediate_size": 2816, "moe_intermediate_size": 704, "n_routed_experts": 16, "n_shared_experts": 2,
    "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "first_k_dense_replace": 1,
    "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 8, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32, "v_head_dim": 64, "kv_lora_rank": 256, "q_lora_rank": 512, "vocab_size": 16000,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
DENSE = IDS | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 16000,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 100,
}  # fmt: skip
SHAPES = {
    "experts": (EXPERTS, SMALL | {"moe_intermediate_size": 32, "n_routed_experts": 4, "qk_nope_head_dim": 16,
                                  "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 24}),
    "dense": (DENSE, SMALL | {"num_key_value_heads": 2, "head_dim": 16}),
}  # fmt: skip
WAYS = ("canonicalize", "merge")


@cache
def shapes_of(shape: str, small: bool = False) -> dict[str, tuple[int, ...]]:
    """Tensors of a checkpoint, experts each with its own."""
    config, names = config_of(shape, small), set()
    if "n_routed_experts" in config:
        names = {f"model.layers.{n}.mlp.experts.0.gate_proj.weight" for n in range(config["num_hidden_layers"])}
    return layout_of_config(config, names=names).tensor_shapes()


def config_of(shape: str, small: bool = False) -> dict:
    """Of a folder."""
    config, less = SHAPES[shape]
    return config | less if small else config


def write_folder(folder: Path, shape: str, dtype: torch.dtype, share: float = 0.0, small: bool = False) -> None:
    """Random weights, a shard a layer; ``share``: what is added of another seed."""
    folder.mkdir(parents=True)
    config = config_of(shape, small) | {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    shards: dict[str, list[str]] = {}
    shapes = shapes_of(shape, small)
    for name in shapes:
        found = re.search(r"layers\.\d+", name)
        shards.setdefault(found[0] if found else name, []).append(name)
    places = {}
    for number, names in enumerate(shards.values()):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        both = [torch.Generator().manual_seed(2 * number + which) for which in (0, 1)]
        for name in names:
            first, second = (torch.randn(shapes[name], generator=generator) for generator in both)
            tensors[name] = (float("norm" in name) + 0.03 * (first + share * second)).to(dtype)
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def sizes(shape: str, itemsize: int) -> dict[str, int]:
    """Bytes of the largest layer or table, and of the largest expert, as stored."""
    layers: dict[str, int] = {}
    experts: dict[str, int] = {}
    for name, size in shapes_of(shape).items():
        numbers = prod(size) * itemsize
        layer, expert = (re.search(pattern, name) for pattern in (r"layers\.\d+\.", r".*\.experts\.\d+\."))
        key = layer[0] if layer else name
        layers[key] = layers.get(key, 0) + numbers
        if expert:
            experts[expert[0]] = experts.get(expert[0], 0) + numbers
    return {"largest_bytes": max(layers.values()), "expert_bytes": max(experts.values(), default=0)}


def status(key: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def treat(way: str, folders: list[str], threads: int, check: bool, answer) -> None:
    """In a process of its own: bytes over those before, and seconds. Small folders first, then large ones."""
    from erlangen.interop.checkpoints import canonicalize_folder
    from erlangen.interop.merging import merge_folders

    torch.set_num_threads(threads)
    small, a, b, output = folders

    def run(first: str, second: str, out: str) -> None:
        if way == "canonicalize":
            canonicalize_folder(first, out, check=check)
        else:
            merge_folders(first, second, out, check=check)

    run(small, small, f"{output}-small")
    before, start = status("VmRSS"), time.perf_counter()
    run(a, b, output)
    answer.put((status("VmHWM") - before, time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument("--check", action="store_true", help="compare outputs too, as the command line does")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "gauge_memory.csv")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    for shape in arguments.shapes:
        for name in arguments.dtypes:
            dtype = getattr(torch, name)
            with tempfile.TemporaryDirectory() as scratch:
                folders = [str(Path(scratch) / part) for part in ("small", "a", "b")]
                write_folder(Path(folders[0]), shape, dtype, small=True)
                write_folder(Path(folders[1]), shape, dtype)
                write_folder(Path(folders[2]), shape, dtype, share=0.3)
                about = sizes(shape, dtype.itemsize)
                for way in arguments.ways:
                    answer = context.Queue()
                    out = str(Path(scratch) / f"out-{way}")
                    process = context.Process(
                        target=treat, args=(way, [*folders, out], arguments.threads, arguments.check, answer)
                    )
                    process.start()
                    grown, seconds = answer.get()
                    process.join()
                    ratio = grown / about["largest_bytes"]
                    found = about | {"peak_bytes": grown, "seconds": round(seconds, 1), "check": arguments.check}
                    print(f"{shape:8s} {name:9s} {way:12s} {ratio:6.2f} of the largest", json.dumps(found), flush=True)
                    rows.append({
                        "benchmark": "gauge_memory", "variant": f"{way} {shape}", "baseline": "largest layer or table",
                        "metric": "peak_memory", "unit": "MB", "median": f"{grown / 1e6:.4g}", "ratio": f"{ratio:.3g}",
                        "rounds": 1, "device": "cpu", "dtype": name, "config_json": json.dumps(found, sort_keys=True),
                    })  # fmt: skip
    record.write(arguments.out, rows)


if __name__ == "__main__":
    main()
