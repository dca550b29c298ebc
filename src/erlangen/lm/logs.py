"""Where a run's numbers go: a JSONL file, the terminal, and any tracker of three methods."""

import errno
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from erlangen._extras import require


class Tracker(Protocol):
    """What a tracker must have. The modules wandb and trackio have it as they are."""

    def init(self, *, project: str, config: Mapping[str, Any]) -> Any: ...

    def log(self, data: Mapping[str, Any], *, step: int) -> Any: ...

    def finish(self) -> Any: ...


class TensorBoard:
    """Scalars for TensorBoard, written to ``folder``."""

    def __init__(self, folder: Path) -> None:
        require("tensorboard", "track")
        self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder))

    def init(self, *, project: str, config: Mapping[str, Any]) -> None:
        self._writer.add_text(project, f"```json\n{json.dumps(config, indent=2)}\n```")

    def log(self, data: Mapping[str, Any], *, step: int) -> None:
        for name, value in data.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


def find_tracker(name: str, folder: Path) -> Tracker | None:
    """The tracker a config names.

    Raises:
        ValueError: there is no such module, or it lacks one of the three methods.
        ImportError: TensorBoard is not installed.
    """
    if name == "none":
        return None
    if name == "tensorboard":
        return TensorBoard(folder / "tensorboard")
    try:
        module: Any = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"track must be 'none', 'tensorboard' or an installed module such as wandb, received {name!r}"
        ) from error
    missing = [method for method in ("init", "log", "finish") if not callable(getattr(module, method, None))]
    if missing:
        raise ValueError(f"the tracker {name!r} has no {' and no '.join(missing)}: it needs init, log and finish")
    return module


class JsonLines:
    """One JSON object a line, each given to the system whole and at once.

    Args:
        path: of the file.
        keep_until: keep the lines that are there up to this step, and drop the later ones; None drops all.
    """

    def __init__(self, path: Path, *, keep_until: int | None) -> None:
        found = read_jsonl(path) if keep_until is not None and path.exists() else []
        self.records = [record for record in found if record["step"] <= keep_until]
        aside = path.with_name(path.name + ".writing")
        aside.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        os.replace(aside, path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(record) + "\n").encode()
        if os.write(self._file, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.records.append(dict(record))

    def close(self) -> None:
        os.close(self._file)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; a last line cut off in the middle (a killed run) is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
