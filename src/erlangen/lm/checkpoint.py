"""Checkpoints: written aside, then renamed; read by any number of processes; no pickle anywhere.

A checkpoint is a folder ``step-00000500`` with

- ``*.safetensors``: every tensor (weights, buffers, optimiser state, random states), sharded as the run was, through
  `torch.distributed.checkpoint`, which puts the shards together for whatever world reads them;
- ``checkpoint.json``: the rest: the step, the config of the run, and the tree of the optimiser's state with the names
  of its tensors.

While it is written the folder is called ``step-00000500.writing``; the rename is the last thing that happens.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import World

FORMAT = "erlangen-checkpoint"
VERSION = 1
_WRITING, _REMOVING = ".writing", ".removing"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message says what to do."""


def pack(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A tree of dicts, lists, tuples, sets, numbers, strings and tensors as JSON; its tensors go to ``tensors``."""
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach()
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {"dict": [[key, pack(value, f"{name}.{key}", tensors)] for key, value in tree.items()]}
    for kind in (list, tuple, set):
        if isinstance(tree, kind):
            return {kind.__name__: [pack(value, f"{name}.{i}", tensors) for i, value in enumerate(tree)]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return {"value": tree}
    raise TypeError(f"{name} is a {type(tree).__name__}, which a checkpoint cannot hold")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    ((kind, content),) = packed.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {key: unpack(value, tensors) for key, value in content}
        case "list" | "tuple" | "set":
            return {"list": list, "tuple": tuple, "set": set}[kind](unpack(value, tensors) for value in content)
        case "value":
            return content
    raise CheckpointError(f"a checkpoint of version {VERSION} holds no {kind!r}")


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors by name; a tied one once, under its first name."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[f"model.{name}"] = tensor.detach()
    return tensors


def _remove_unfinished(folder: Path) -> None:
    for left in folder.glob("step-*"):
        if left.suffix in (_WRITING, _REMOVING):
            shutil.rmtree(left, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint; one that is half removed no longer has the name of a checkpoint."""
    going = path.with_name(path.name + _REMOVING)
    os.replace(path, going)
    shutil.rmtree(going)


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit())


def save(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any],
    keep: int,
    world: World,
) -> Path:
    """Write checkpoint ``folder/step-XXXXXXXX`` and remove all but the ``keep`` newest. A collective.

    Raises:
        CheckpointError: it could not be written (a full disk, say); what was there before is untouched.
    """
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter
    from torch.distributed.checkpoint import save as save_shards

    tensors = _model_tensors(model)
    packed_optimizer = pack(optimizer.state_dict(), "optimizer", tensors)
    tensors[f"random.{world.rank}"] = torch.get_rng_state()
    if world.device.type == "cuda":
        tensors[f"random.cuda.{world.rank}"] = torch.cuda.get_rng_state()
    final = folder / f"step-{step:08d}"
    aside = folder / (final.name + _WRITING)
    if world.is_first:
        _remove_unfinished(folder)
    world.barrier()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    error = None
    try:
        aside.mkdir(parents=True, exist_ok=True)
        writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
        with _alone_is_fine():
            save_shards(tensors, storage_writer=writer, no_dist=world.size == 1)
        if world.is_first:
            meta = {"format": FORMAT, "version": VERSION, "step": step, "optimizer": packed_optimizer, **extra}
            (aside / "checkpoint.json").write_text(json.dumps(meta))
            _to_disk(aside)
    except (Exception, CheckpointException) as caught:  # the latter is a BaseException only
        error = caught
    failed = world.sum(torch.tensor(float(error is not None), device=world.device)).item() > 0
    if failed:
        if world.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        before = checkpoints(folder)
        rest = f"{before[-1]} is intact" if before else "no earlier one exists"
        raise CheckpointError(
            f"could not write checkpoint {final} ({_reason(error)}): free some space or choose another folder; {rest}"
        ) from error
    if world.is_first:
        if final.exists():
            _remove(final)
        os.replace(aside, final)
        for old in checkpoints(folder)[:-keep]:
            _remove(old)
    world.barrier()
    return final


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """torch.distributed.checkpoint warns that it works for one process, which is what was asked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _to_disk(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: BaseException | None) -> str:
    """The innermost cause, in one line."""
    failures = getattr(error, "failures", None)
    if failures:  # CheckpointException of torch.distributed: rank -> (exception, traceback)
        error = next(iter(failures.values()))[0]
    return " ".join(str(error if error is not None else "another process failed").split())[:300]


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """What ``checkpoint.json`` says.

    Raises:
        CheckpointError: it is missing, damaged, or not ours.
    """
    path = checkpoint / "checkpoint.json"
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{checkpoint} is not an Erlangen checkpoint: it has no checkpoint.json") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({_reason(error)}): remove {checkpoint} and use another") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{checkpoint} is not an Erlangen checkpoint: its checkpoint.json is of another program")
    if meta.get("version") != VERSION:
        raise CheckpointError(
            f"{checkpoint} has format version {meta.get('version')}, this Erlangen reads version {VERSION}"
        )
    return meta


def _read_tensors(checkpoint: Path, build: Callable[[Any], dict[str, Tensor]], world_size: int) -> dict[str, Tensor]:
    """Fill, in place, the tensors that ``build`` makes from the checkpoint's own description of its tensors."""
    from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader
    from torch.distributed.checkpoint import load as load_shards

    damaged = f"{checkpoint} is damaged or incomplete: remove it and use the one before"
    try:
        saved = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    except Exception as error:
        raise CheckpointError(f"{damaged} ({_reason(error)})") from error
    tensors = build(saved)
    for name, tensor in tensors.items():
        if name not in saved:
            raise CheckpointError(f"{damaged} (it has no tensor {name})")
        size = getattr(saved[name], "size", None)
        if size != tensor.size():
            raise CheckpointError(
                f"{checkpoint} does not fit this model: {name} has shape {tuple(size or ())} there and "
                f"{tuple(tensor.shape)} here"
            )
    try:
        with _alone_is_fine():
            load_shards(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=world_size == 1)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{damaged} ({_reason(error)})") from error
    return tensors


def load_model(checkpoint: Path, model: nn.Module) -> None:
    """Read a checkpoint's weights and buffers into a plain (unsharded) model of the same shape, in place.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    _read_tensors(checkpoint, lambda saved: _matching_model(checkpoint, model, saved), world_size=1)


def _matching_model(checkpoint: Path, model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = _model_tensors(model)
    extra = sorted(name for name in saved if name.startswith("model.") and name not in tensors)
    if extra:
        raise CheckpointError(f"{checkpoint} does not fit this model: it also holds {', '.join(extra[:3])}")
    return tensors


def load(checkpoint: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """Read a checkpoint into a model (sharded or not) and its optimiser, in place; the world may have another size.

    Returns:
        what ``checkpoint.json`` says.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    meta = read_meta(checkpoint)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def build(saved: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors = _matching_model(checkpoint, model, saved)
        for name, description in saved.items():
            if name.startswith("optimizer."):
                tensors[name] = _like(name, description, parameters)
            elif name in (f"random.{world.rank}", f"random.cuda.{world.rank}"):
                tensors[name] = torch.zeros(description.size, dtype=description.properties.dtype)
        return tensors

    tensors = _read_tensors(checkpoint, build, world.size)
    optimizer.load_state_dict(unpack(meta["optimizer"], tensors))
    if f"random.{world.rank}" in tensors:
        torch.set_rng_state(tensors[f"random.{world.rank}"])
    if f"random.cuda.{world.rank}" in tensors and world.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"random.cuda.{world.rank}"])
    return meta


def _like(name: str, description: Any, parameters: list[Tensor]) -> Tensor:
    """An empty tensor for optimiser state: sharded as its parameter when it has the parameter's shape."""
    dtype = description.properties.dtype
    part = name.split(".")  # optimizer.state.<index of the parameter>....
    if part[1] == "state" and part[2].isdigit() and int(part[2]) < len(parameters):
        parameter = parameters[int(part[2])]
        if parameter.shape == description.size and hasattr(parameter, "full_tensor"):
            return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(description.size, dtype=dtype)
