"""``python -m erlangen.studies.lie_completion``."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import tyro

from .._jobs import print_progress
from . import CompletionConfig, run, scan


@dataclass(frozen=True, kw_only=True)
class _CommandLine(CompletionConfig):
    scan_learning_rates: bool = False
    """Make the scan of learning rates instead, on one seed that the study does not use."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, or the scan, and print where its result is."""
    description = "Complete sequences of group elements: closed-form scores, a learned kernel, vectors."
    line = tyro.cli(_CommandLine, args=arguments, prog="lie_completion", description=description)
    # Not the subclass: processes that are spawned do not import the __main__ of a package, where it is.
    config = CompletionConfig(**{field.name: getattr(line, field.name) for field in fields(CompletionConfig)})
    print((scan if line.scan_learning_rates else run)(config, print_progress()))


if __name__ == "__main__":
    main()
