"""What ``erlangen channels`` is asked to measure, and the group that this means."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from erlangen.finite import PermutationGroup, parse

CHUNK = 1_000_000  # numbers held at a time

Report = Callable[[int, int], None]
"""Is told how many windows or maps are done, and of how many."""


@dataclass(frozen=True, kw_only=True)
class ChannelsConfig:
    """What `erlangen channels` is to measure."""

    file: Annotated[Path, tyro.conf.Positional]
    """Sequences, motifs or attention maps; the ending says which."""
    group: str | None = None
    """A group with its size, "dihedral(6)"; a name alone, which --window gives its size; or generators in cycles,
    "(0 3)(1 2)", ';' between them. Unless given, reverse_complement, and reversal for attention maps."""
    window: int | None = None
    """Positions of a window. Unless given: those of the group; with a name alone, 20 for sequences, and a motif or map
    as a whole."""
    stride: int = 1
    """From the start of a window to that of the next."""
    fdr: float = 0.05
    """False-discovery rate: of the windows called found, the share that may be by chance."""
    alphabet: str | None = None
    """The letters of sequences; unless given, those of the group, or ACGT."""
    unknown: str = "N"
    """Letters that stand for any; windows that hold one are left out."""
    out: Path = Path("channels")
    """Folder for the results; those of an earlier call are replaced."""


def is_name(text: str) -> bool:
    """Whether a group is given by a name alone, whose size is the window."""
    return bool(re.fullmatch(r"[a-z_]+", text)) and text not in ("klein", "quaternion")


def read_group(text: str, window: int | None, alphabet: str | None) -> PermutationGroup:
    """The group that ``--group`` and ``--window`` say."""
    text = text.strip()
    if text in ("klein", "quaternion"):
        text += "()"
    if is_name(text):
        letters = f", {json.dumps(alphabet)}" if text == "reverse_complement" and alphabet not in (None, "ACGT") else ""
        return parse(f"{text}({window}{letters})")
    if text.startswith("("):
        if window is None:
            raise ValueError(f"the generators {text!r} need a --window, the number of positions that they permute")
        letters = f", {json.dumps(alphabet or 'ACGT')}" if '"' in text else ""
        return parse(f"group({window}{letters}: {text})")
    return parse(text)


def expect_degree(config: ChannelsConfig, group: PermutationGroup) -> None:
    if config.window not in (None, group.degree):
        raise ValueError(f"{group!r} does not fit a --window of {config.window}: leave one of them out")
    if config.alphabet and group.alphabet and config.alphabet != group.alphabet:
        raise ValueError(f"{group!r} has the letters {group.alphabet!r}, received --alphabet {config.alphabet!r}")
