"""``erlangen audit``: how much of a model is redundant, and in what gauge its heads are."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import erlangen
from erlangen import report
from erlangen.gauge import FlatDirections, HeadSpectra, ModelLayout, flat_directions, head_spectra, model_layout
from erlangen.interop import layout_of_config
from erlangen.interop.checkpoints import CONFIG, Checkpoint, read_config

from . import _gauge_page as pages
from ._gauge_files import check_out, opened, print_table, progress_bar, say, stdout

_DESCRIPTION = """\
How many dimensions of a model's parameters change nothing it computes, and what its heads are like.

  erlangen audit Llama-3.2-1B                  a folder of Hugging Face, with config.json and safetensors
  erlangen audit config.json                   a config alone: what is redundant, without the heads
  erlangen audit run                           what erlangen train wrote
  erlangen audit gpt2 --out reports/gpt2       somewhere else

Counts the redundant dimensions by symmetry, exactly, from the config. With weights: spectra of every head that no
symmetry changes, how far the stored factors are from the balanced gauge, how well conditioned the heads are, and which
are of deficient rank. Weights are read a layer at a time, and left as they are. Prints tables, and writes audit.html
and audit.json.

Ctrl-C stops at once, and nothing is written. No file is ever half written.
"""

NAME = "audit"


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """What `erlangen audit` is to measure."""

    model: Annotated[Path, tyro.conf.Positional]
    """A folder of Hugging Face, a config.json, or a run of `erlangen train`."""
    out: Path = Path(NAME)
    """Folder for the results; those of an earlier call are replaced."""


@dataclass(frozen=True)
class Audit:
    """What was found."""

    name: str
    layout: ModelLayout
    flat: FlatDirections | None
    uncounted: str
    """Why nothing was counted, if nothing was."""
    dtype: torch.dtype | None
    heads: Sequence[HeadSpectra]
    """Of each layer; none without weights."""


def main(arguments: Sequence[str]) -> int:
    """Audit a model; exit status 0."""
    config = tyro.cli(AuditConfig, args=list(arguments), prog="erlangen audit", description=_DESCRIPTION)
    check_out(config.out, NAME)
    console = stdout()
    with progress_bar(console, "reading heads") as progress:
        result = audit(config.model, progress)
    page = pages.audit_page(result)
    path = report.write_report(config.out, NAME, page, _data(result), {})
    if result.flat is not None:
        title = f"redundant dimensions of {result.name}"
        print_table(console, title, ("symmetry", "dimensions", "%"), pages.sector_rows(result.flat))
    if result.heads:
        _, rows = pages.head_rows(result)
        short = ("layer", "imbalance QK", "imbalance VO", "condition QK", "condition VO", "deficient", "near equal")
        print_table(console, "heads by layer", short, [(*row[:5], *row[7:]) for row in rows])
    for line in pages.audit_summary(result):
        say(console, line)
    say(console, f"the report: {path}")
    return 0


def audit(path: Path, progress: Callable[[int, int], None]) -> Audit:
    """Audit a folder, or a config alone.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no model that is known; the text says what to do.
    """
    weights: Any = None
    model = opened(path)
    if isinstance(model, torch.nn.Module):
        layout, weights = model_layout(model), dict(model.named_parameters(remove_duplicate=False))
    elif path.is_file():
        layout = layout_of_config(_config(path))
    elif path.is_dir() and (path / CONFIG).is_file() and not any(path.glob("*.safetensors*")):
        layout = layout_of_config(read_config(path))
    else:
        weights = Checkpoint(path)
        layout = weights.layout
    flat, why = None, ""
    try:
        flat = flat_directions(layout)
    except ValueError as error:
        why = str(error)
    heads: list[HeadSpectra] = []
    dtype = None
    if weights is not None:
        dtype = weights[layout.layers[0].attention.query.weight].dtype
        heads = head_spectra(layout, weights, dtype, progress)
    return Audit(path.resolve().name, layout, flat, why, dtype, heads)


def _config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): name a folder of Hugging Face, or its {CONFIG}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, received {type(values).__name__}")
    return values


def _data(result: Audit) -> dict[str, Any]:
    flat = result.flat
    data: dict[str, Any] = {"command": f"erlangen {NAME}", "version": erlangen.__version__, "model": result.name}
    data |= {"kind": result.layout.kind, "num_layers": len(result.layout.layers), "uncounted": result.uncounted}
    data |= {"dtype": None if result.dtype is None else str(result.dtype).removeprefix("torch.")}
    if flat is not None:
        data |= {"total": flat.total, "share": flat.share, "parameters": flat.parameters}
        data |= {"sectors": dict(flat.sectors)}
    data["layers"] = [vars(layer) for layer in result.heads]
    return data
