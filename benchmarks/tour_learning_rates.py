"""The scan that chose the tour's learning rates: four rates an optimiser, both arms, a seed of its own.

    python benchmarks/tour_learning_rates.py

Rule: the rate with the lowest mean over the two arms of the validation loss at the last step.
"""

import argparse
import json
import tempfile
from pathlib import Path

from erlangen.bench import record
from erlangen.lm.logs import read_jsonl
from erlangen.studies.tour import ARMS, execute, run_config

RESULTS = Path(__file__).parent / "results"

SEED = 1000
GRID = {
    "adamw": (1e-3, 3e-3, 1e-2, 3e-2),
    "sgdm": (0.01, 0.03, 0.1, 0.3),
    "soap": (1e-3, 3e-3, 1e-2, 3e-2),
    "ecd": (0.1, 0.3, 1.0, 3.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "tour_learning_rates.csv")
    parser.add_argument("--steps", type=int, default=500, help="steps of each run, as in the tour")
    parser.add_argument("--runs", type=Path, help="folder of the runs, kept (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.runs or Path(temporary)
        cases = [
            (optimizer, lr, arm, run_config(optimizer, arm, seed=SEED, steps=arguments.steps, lr=lr,
                                            out=folder / f"{optimizer}-{lr:g}-{arm}"))
            for optimizer, rates in GRID.items() for lr in rates for arm in ARMS
        ]  # fmt: skip
        execute([config for *_, config in cases], progress=lambda done, total: print(f"{done}/{total}", end="\r"))
        rows = []
        for optimizer, lr, arm, config in cases:
            last = read_jsonl(config.out / "log.jsonl")[-1]
            rows.append({
                "benchmark": "tour_learning_rates", "variant": f"{optimizer} {arm}", "metric": "validation_loss",
                "unit": "nats/byte", "x_name": "lr", "x_value": lr, "median": f"{last['validation_loss']:.4f}",
                "rounds": 1, "device": "cpu", "dtype": "float32",
                "config_json": json.dumps({"seed": SEED, "steps": arguments.steps}),
            })  # fmt: skip
        record.write(arguments.out, rows)


if __name__ == "__main__":
    main()
