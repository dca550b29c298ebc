"""``python -m erlangen.studies.merging``."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import tyro

from .._jobs import print_progress
from . import MergeConfig, run, train_models


@dataclass(frozen=True, kw_only=True)
class _CommandLine(MergeConfig):
    train_only: bool = False
    """Train the models and keep them; merge none."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and print where its result is, or only train its models."""
    description = "Averages of two language models, as stored and after alignment under more and more of their gauge."
    line = tyro.cli(_CommandLine, args=arguments, prog="merging", description=description)
    # Not the subclass: processes that are spawned do not import the __main__ of a package, where it is.
    config = MergeConfig(**{field.name: getattr(line, field.name) for field in fields(MergeConfig)})
    if line.train_only:
        train_models(config, print_progress())
        print(config.out / "models")
    else:
        print(run(config, print_progress()))


if __name__ == "__main__":
    main()
