"""``erlangen canonicalize``: a checkpoint in canonical form, and the certificate that nothing changed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import erlangen
from erlangen import report
from erlangen.interop.checkpoints import canonicalize_folder

from . import _gauge_page as pages
from ._gauge_files import check_out, print_table, progress_bar, say, stdout

_DESCRIPTION = """\
Write the canonical form of a checkpoint: the same function, with every number settled.

  erlangen canonicalize Llama-3.2-1B Llama-3.2-1B-canonical
  erlangen canonicalize Llama-3-8B out --residual      the frame of the residual stream as well
  erlangen canonicalize gpt2 out --untie --residual    with an unembedding of its own, where the two were tied
  erlangen canonicalize gpt2 out --order kept          heads and neurons stay where they are

The new folder loads in transformers as the old one did; gauge.json in it says what was done, gauge.safetensors holds
the transforms, so that adapters and optimisers can follow. Outputs before and after are compared in float64, float32
and bfloat16, if transformers is installed. Two checkpoints that differ by any such move get the same numbers, up to
rounding. Weights are read a layer at a time; the old folder stays as it is. Prints the certificate, and writes
canonicalize.html and canonicalize.json.

Ctrl-C stops at once, and nothing is left behind. No file is ever half written.
"""

NAME = "canonicalize"


@dataclass(frozen=True, kw_only=True)
class CanonicalizeConfig:
    """What `erlangen canonicalize` is to write."""

    model: Annotated[Path, tyro.conf.Positional]
    """A folder of Hugging Face."""
    output: Annotated[Path, tyro.conf.Positional]
    """The new folder; it must not exist."""
    residual: bool = False
    """Also bring the residual stream to a canonical frame."""
    untie: bool = False
    """Give a model whose logits are taken with the token embedding an unembedding of its own."""
    order: Literal["sorted", "kept"] = "sorted"
    """Of heads and neurons: by their size, or as it is."""
    check: bool = True
    """Compare the outputs before and after."""
    out: Path = Path(NAME)
    """Folder for the report; that of an earlier call is replaced."""


def main(arguments: Sequence[str]) -> int:
    """Write a canonical form; exit status 0."""
    config = tyro.cli(CanonicalizeConfig, args=list(arguments), prog="erlangen canonicalize", description=_DESCRIPTION)
    check_out(config.out, NAME)
    console = stdout()
    with progress_bar(console, "writing") as progress:
        certificate = canonicalize_folder(
            config.model,
            config.output,
            order=config.order,
            residual=config.residual,
            untie=config.untie,
            check=config.check,
            progress=progress,
        )
    name = config.model.resolve().name
    data = {"command": f"erlangen {NAME}", "version": erlangen.__version__, "config": config}
    data |= {"certificate": json.loads(certificate.to_json())}
    path = report.write_report(config.out, NAME, pages.canonicalize_page(name, config.output, certificate), data, {})
    columns, rows = pages.certificate_rows(certificate)
    if rows:
        print_table(console, "outputs before and after", columns, rows)
    for line in pages.canonicalize_summary(name, config.output, certificate):
        say(console, line)
    say(console, f"the report: {path}")
    return 0
