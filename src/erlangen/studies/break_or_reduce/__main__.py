"""``python -m erlangen.studies.break_or_reduce``."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import tyro

from .._jobs import print_progress
from . import BreakOrReduceConfig, run, tune


@dataclass(frozen=True, kw_only=True)
class _CommandLine(BreakOrReduceConfig):
    tune_only: bool = False
    """Only choose the learning rates."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and print where its result is, or only choose its learning rates."""
    description = "The symmetry of heads broken, or reduced, or left alone, under six optimisers."
    line = tyro.cli(_CommandLine, args=arguments, prog="break_or_reduce", description=description)
    config = BreakOrReduceConfig(**{field.name: getattr(line, field.name) for field in fields(BreakOrReduceConfig)})
    if line.tune_only:
        for record in tune(config, print_progress()):
            print(f"{record['optimizer']} {record['arm']}: {record['rate']:g}")
    else:
        print(run(config, print_progress()))


if __name__ == "__main__":
    main()
