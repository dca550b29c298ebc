"""``python -m erlangen.studies.finite_motifs``."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import tyro

from .._jobs import print_progress
from . import MotifConfig, run, scan


@dataclass(frozen=True, kw_only=True)
class _CommandLine(MotifConfig):
    scan_learning_rates: bool = False
    """Make the scan of learning rates instead, on seeds that the study does not use."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, or the scan, and print where its result is."""
    description = "Unseen motifs with the symmetry of seen ones: strict, with dials, free, augmentation, post-hoc."
    line = tyro.cli(_CommandLine, args=arguments, prog="finite_motifs", description=description)
    # Not the subclass: processes that are spawned do not import the __main__ of a package, where it is.
    config = MotifConfig(**{field.name: getattr(line, field.name) for field in fields(MotifConfig)})
    print((scan if line.scan_learning_rates else run)(config, print_progress()))


if __name__ == "__main__":
    main()
