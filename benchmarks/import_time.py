"""Time of `import erlangen`, of all its families, and of torch alone, each in a fresh interpreter.

python benchmarks/import_time.py
"""

import argparse
import subprocess
import sys
from pathlib import Path

from erlangen.bench import record

RESULTS = Path(__file__).parent / "results"

CASES = {
    "torch": "import torch",
    "torch, erlangen": "import torch, erlangen",
    "torch, erlangen and every family": (
        "import torch, erlangen as er; er.lm, er.breaking, er.gauge, er.optim, er.testing, er.report"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "import_time.csv")
    arguments = parser.parse_args()

    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    calls = {name: lambda code=code: run(code) for name, code in CASES.items()}
    timings = record.time_interleaved(calls, "torch", rounds=arguments.rounds)
    for name, timing in timings.items():
        beyond = (timing.median - timings["torch"].median) * 1e3
        print(f"{name:34} {timing.median * 1e3:7.0f} ms, {beyond:+.0f} ms beyond torch")
    record.write(
        arguments.out,
        [record.timing_row("import_time", name, "torch", t, device="cpu", dtype="") for name, t in timings.items()],
    )


if __name__ == "__main__":
    main()
