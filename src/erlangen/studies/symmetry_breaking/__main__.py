"""``python -m erlangen.studies.symmetry_breaking``."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import tyro

from .._jobs import print_progress
from . import SymmetryBreakingConfig, run, tune


@dataclass(frozen=True, kw_only=True)
class _CommandLine(SymmetryBreakingConfig):
    tune_only: bool = False
    """Only choose the learning rates."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and print where its result is, or only choose its learning rates."""
    description = "What breaks the symmetry of heads, what it does to optimisers, and what one batch says of it."
    line = tyro.cli(_CommandLine, args=arguments, prog="symmetry_breaking", description=description)
    config = SymmetryBreakingConfig(
        **{field.name: getattr(line, field.name) for field in fields(SymmetryBreakingConfig)}
    )
    if line.tune_only:
        for record in tune(config, print_progress()):
            print(f"{record['optimizer']} {record['arm']}: {record['rate']:g}")
    else:
        print(run(config, print_progress()))


if __name__ == "__main__":
    main()
