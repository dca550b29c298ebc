"""The preferred directions of small models: how sharp they are, what they move, and whether another run finds the same.

    python benchmarks/key_prior.py --corpus tinyshakespeare.txt

Protocol, fixed before the runs. A byte-pair vocabulary of 1,024 tokens made from the text; 3 layers of 4 heads, width
96, context 128; AdamW at 0.003, 40 steps of warm-up, 400 steps of 16 windows; seeds 0 to 4, each with the published
biases ("broken") and without ("plain"; both have learned biases). 64 held-out windows of 128 tokens go through
`erlangen explain`, trained and, of the broken models, untrained too. A row a model:

- share of attention that the directions move, mean over heads and in the head where it is largest;
- cells (layer, head, class of token) with p < 0.05 against random directions, of which chance gives one in twenty,
  and those beyond both nulls after Holm's correction;
- the loss without the directions less that with them: mean over windows and 95 % interval;
- the class with the sharpest head (smallest p), that head's factor on its attention, and the length of the directions.

Read across seeds, broken less plain: means with Student's interval over the five pairs. Which class is sharpest is
called stable if four of five seeds have the same.
"""

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from erlangen import lm, report
from erlangen.cli._explain_page import cells, loss_change, strongest
from erlangen.cli.explain import ExplainConfig, Explanation, explain
from erlangen.lm import checkpoint
from erlangen.studies import _runs
from erlangen.studies._jobs import execute, print_progress

RESULTS = Path(__file__).parent / "results"
SEEDS = range(5)
ARMS = {"broken": lm.BreakingConfig(enabled=True), "plain": lm.BreakingConfig()}


def vocabulary(text: Path, path: Path) -> Path:
    """A byte-pair tokenizer of the text, as a JSON file."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train(
        [str(text)], tokenizers.trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, show_progress=False)
    )
    made.save(str(path))
    return path


def run_config(arm: str, seed: int, *, corpus: Path, tokenizer: Path, steps: int, out: Path) -> lm.TrainConfig:
    """The run of a model; one step at a rate of zero stands for none."""
    return lm.TrainConfig(
        data=lm.DataConfig(corpus=str(corpus), tokenizer=str(tokenizer)),
        model=lm.GPTConfig(num_layers=3, num_heads=4, dim=96, context_length=128),
        optimizer=lm.OptimizerConfig(name="adamw", lr=0.003 if steps > 1 else 0.0),
        breaking=ARMS[arm],
        steps=steps,
        warmup=min(40, steps - 1),
        batch_size=16,
        seed=seed,
        eval_every=steps,
        eval_windows=64,
        checkpoint_every=steps,
        keep_checkpoints=1,
        log_gauge=False,
        device="cpu",
        out=out,
    )


def row(found: Explanation) -> dict[str, Any]:
    """What is kept of one model."""
    prior, counts, loss = found.prior, cells(found), loss_change(found.steering, 0.0)
    layer, head = strongest(prior)
    asked = [number for number, kind in enumerate(prior.classes.kinds) if kind != "position"]
    sharpest = min(asked, key=lambda number: float(prior.direction_p[layer, head, number]))
    return {
        "moved": f"{prior.moved.mean():.4f}",
        "moved_most": f"{prior.moved.max():.4f}",
        "cells": counts["cells"],
        "direction": counts["direction"],
        "both_holm": counts["both_holm"],
        "loss_change": f"{loss.mean:.5f}",
        "loss_low": f"{loss.low:.5f}",
        "loss_high": f"{loss.high:.5f}",
        "sharpest": prior.classes.names[sharpest],
        "head": f"{layer}.{head}",
        "factor": f"{prior.effects[layer, head, sharpest].exp():.3f}",
        "p": f"{prior.direction_p[layer, head, sharpest]:.1e}",
        "length_learned": f"{prior.lengths[..., 0].mean():.3f}",
        "length_unlearned": f"{prior.lengths[..., 1].mean():.3f}",
    }


def differences(rows: list[dict[str, Any]]) -> None:
    """Print broken less plain over seeds."""
    for name in ("moved", "direction", "both_holm", "loss_change"):
        values = {arm: np.array([float(r[name]) for r in rows if r["arm"] == arm]) for arm in ARMS}
        print(f"{name}: broken less plain {report.paired_interval(values['broken'] - values['plain']):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="a text file")
    parser.add_argument("--steps", type=int, default=400, help="steps of a run; another number is another protocol")
    parser.add_argument(
        "--runs", type=Path, help="folder of the runs, kept and gone on with (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "key_prior.csv")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.runs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = vocabulary(arguments.corpus, folder / "bpe1024.json")
        steps = {"broken": arguments.steps, "plain": arguments.steps, "untrained": 1}
        models = {
            (arm, seed): run_config(
                "plain" if arm == "plain" else "broken", seed, corpus=arguments.corpus, tokenizer=tokenizer,
                steps=steps[arm], out=folder / f"{arm}-{seed}",
            )
            for arm in steps for seed in SEEDS
        }  # fmt: skip
        execute(_runs.jobs(list(models.values())), progress=print_progress())
        rows = []
        for (arm, seed), config in models.items():
            assert config.out is not None and checkpoint.checkpoints(config.out)
            found = explain(ExplainConfig(model=config.out, windows=64), lambda done, total: None)
            rows.append({"arm": arm, "seed": seed, **row(found)})
            print(*rows[-1].values())
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    differences(rows)


if __name__ == "__main__":
    main()
