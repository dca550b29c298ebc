"""Checkpoints shrunk on disk, a layer at a time: `shrink_folder`."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erlangen import _extras
from erlangen.gauge._fold import attention_maps
from erlangen.gauge._shrink_sectors import Moments
from erlangen.gauge.layout import ModelLayout, model_layout
from erlangen.gauge.shrink import (
    Keep,
    LayerShrink,
    Shrunk,
    check_options,
    conclude,
    measured_moments,
    shrink_layer,
    tell,
)

from . import _outputs, _texts
from . import _safetensors as files
from .checkpoints import (
    CONFIG,
    INDEX,
    SINGLE,
    Checkpoint,
    Progress,
    compared,
    named,
    new_folder,
    other_files,
    read_config,
)
from .layouts import SHRUNK

RECORD = "shrink.json"
# Keys of the config of a shrunk checkpoint: for its maps, and for how it is loaded.
MAPS, HOW = "erlangen_maps", "erlangen_how_to_load"
HOW_TO_LOAD = (
    "A shrunk checkpoint: run 'from erlangen.interop import shrunk' (pip install 'erlangen[hf]') before "
    "transformers.AutoModelForCausalLM.from_pretrained, or another auto class."
)
_SHRUNK = "erlangen.interop.shrunk"


def config_of(config: Mapping[str, Any], maps: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` of a shrunk checkpoint holds.

    Args:
        config: what it held before.
        maps: as of `erlangen.gauge.Shrunk`; where there are none, the config stays what it was.
    """
    if not maps:
        return dict(config)
    architectures = [f"Shrunk{name}" for name in config.get("architectures") or []]
    more = {"model_type": SHRUNK + config["model_type"], MAPS: dict(maps), HOW: HOW_TO_LOAD}
    return {**config, **more} | ({"architectures": architectures} if architectures else {})


class _Files:
    """The tensors of a folder, by name."""

    def __init__(self, opened: list[files.TensorFile]) -> None:
        self._places = {name: (file, entry) for file in opened for name, entry in file.entries.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        file, entry = self._places[name]
        return files.read(file.path, entry, first, last)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._places[name][1].shape)

    def sizes(self) -> tuple[int, int]:
        """How many weights, and bytes."""
        entries = [entry for _, entry in self._places.values()]
        weights = sum(torch.Size(entry.shape).numel() for entry in entries if entry.dtype in files.FLOATS)
        return weights, sum(entry.stop - entry.start for entry in entries)


def _gather(
    path: Path, entries: Mapping[str, tuple[files.TensorFile, files.Entry]], metadata: Mapping[str, str]
) -> files.TensorFile:
    """A new file of tensors that lie in others."""
    places = {name: (entry.dtype, entry.shape, entry.stop - entry.start) for name, (_, entry) in entries.items()}
    header, placed = files._header(places, metadata)
    with path.open("xb") as file:
        file.write(header)
        file.truncate(max([len(header), *(entry.stop for entry in placed.values())]))
    target = files.TensorFile(path, header, metadata, placed)
    sources = {source.path: source for source, _ in entries.values()}
    for source in sources.values():
        files.copy(source, target, [name for name, (other, _) in entries.items() if other.path == source.path])
    return target


def _stored(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors as they are stored: weights in the dtype of the checkpoint.

    Raises:
        ValueError: a number is beyond its range.
    """
    found = {}
    for name, tensor in tensors.items():
        new = tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor
        if new.is_floating_point() and new.numel() and not all(one.isfinite() for one in torch.aminmax(new)):
            raise ValueError(
                f"{name} would hold numbers up to {tensor.abs().max():.3g}, beyond the range of {dtype}: store the "
                "model in float32 or bfloat16 first"
            )
        found[name] = new
    return found


class _Assembly:
    """The shards of the new folder: what changed waits in a file of its own, for headers stand in front."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self._checkpoint, self._folder = checkpoint, folder
        self._spool = files.Spool(folder / ".spool")
        # Stored name of an old tensor -> names of those that stand in its place.
        self._instead: dict[str, list[str]] = {}

    def add(self, found: LayerShrink) -> None:
        """Take the new tensors of a layer."""
        checkpoint = self._checkpoint
        for name, tensor in found.tensors.items():
            self._put(name, _stored({name: tensor}, checkpoint.dtype(name)))
        for path, reduced in found.reduced.items():
            weight, bias = f"{path}.weight", f"{path}.bias"
            tensors = {f"{path}.{name}": tensor for name, tensor in reduced.tensors.items()}
            self._put(weight, _stored(tensors, checkpoint.dtype(weight)))
            if bias in checkpoint:
                self._instead.setdefault(self._checkpoint._places[bias][1], [])

    def _put(self, old: str, tensors: Mapping[str, Tensor]) -> None:
        self._instead[self._checkpoint._places[old][1]] = list(tensors)
        for name, tensor in tensors.items():
            self._spool[name] = tensor

    def write(self) -> _Files:
        """Make the shards, of the names they had, and their index."""
        checkpoint, spool = self._checkpoint, self._spool
        changed = spool.save(self._folder / ".changed")
        opened = []
        for old in checkpoint._files:
            entries: dict[str, tuple[files.TensorFile, files.Entry]] = {}
            for name, entry in old.entries.items():
                if name not in self._instead:
                    entries[name] = (old, entry)
                for new in self._instead.get(name, []):
                    entries[new] = (changed, changed.entries[new])
            opened.append(_gather(self._folder / old.path.name, entries, old.metadata))
        changed.path.unlink()
        found = _Files(opened)
        if checkpoint._files[0].path.name != SINGLE:
            index = json.loads((checkpoint.folder / INDEX).read_text(encoding="utf-8"))
            weights, total = found.sizes()
            sizes = index["metadata"] if isinstance(index.get("metadata"), dict) else {}
            for key, value in (("total_size", total), ("total_parameters", weights)):
                if key in sizes:
                    sizes[key] = value
            index["weight_map"] = {name: file.path.name for file in opened for name in file.entries}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return found


def _build(folder: Path, weights: _Files) -> nn.Module:
    """The shrunk model without its weights, but with its indices."""
    shrunk = import_module(_SHRUNK)
    values = read_config(folder)
    kind = values.pop("model_type").removeprefix(SHRUNK)
    [name, *_] = values.get("architectures") or ["ShrunkAutoModel"]
    config = shrunk.config_class(kind)(**values)
    config._attn_implementation = config._experts_implementation = "eager"
    base = getattr(shrunk.transformers, name.removeprefix("Shrunk"), None)
    if base is None:
        raise _outputs.Unreadable(f"transformers has no {name.removeprefix('Shrunk')}")
    with _outputs.without_weights():
        if base is shrunk.transformers.AutoModel:
            model = base.from_config(config)
        else:
            model = shrunk.model_class(base, kind)(config)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for path, module in model.named_modules():
        for name in [name for name, buffer in module._buffers.items() if buffer is not None]:
            full = f"{path}.{name}"
            stored = next((one for one in (full, prefix + full, full.removeprefix(prefix)) if one in weights), None)
            if stored is not None:
                module._buffers[name] = weights.rows(stored)
    return model.eval()


def _moments(checkpoint: Checkpoint, tokens: Tensor) -> dict[str, Moments]:
    """Moments of what the maps of a checkpoint read on tokens: the model is held in memory, in float32."""
    transformers: Any = _extras.require("transformers", "hf")
    model = transformers.AutoModel.from_pretrained(checkpoint.folder, dtype=torch.float32, local_files_only=True)
    layout: ModelLayout = model_layout(model)
    found = measured_moments(model, layout, tokens.split(1))
    moments = {}
    for ours, theirs in zip(checkpoint.layout.layers, layout.layers):
        for one, two in zip(attention_maps(ours.attention).values(), attention_maps(theirs.attention).values()):
            if two.path in found:
                moments[one.path] = found[two.path]
    return moments


def shrink_folder(
    folder: str | Path,
    output: str | Path,
    *,
    keep: Keep = None,
    text: str | Tensor | None = None,
    noise: float = 2.0,
    check: bool = True,
    progress: Progress | None = None,
) -> Shrunk:
    """Write a checkpoint that stores and multiplies less to another folder, a layer at a time.

    Beside the weights, ``shrink.json`` holds what was done. The new folder loads in transformers once
    `erlangen.interop.shrunk` is imported; its config says so.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``, or shards and their index. It stays as it is.
        output: the new folder; it must not exist.
        keep, noise: as of `erlangen.gauge.shrink`.
        text: by which directions are weighed, and on which outputs are compared and the loss is taken: a text, for the
            tokenizer of the folder, or token ids int64 [windows, N]. The model is then held in memory once.
        check: compare outputs before and after, in float64, float32 and bfloat16. Both checkpoints are run a map at a
            time; where transformers is not installed, or knows no such model, `Shrunk.checked` says so.
        progress: called with the number of steps done and of all.

    Raises:
        ImportError: a text is given, and transformers is not installed.
        OSError: as of `Checkpoint` and `new_folder`.
        ValueError: likewise; options as of `erlangen.gauge.shrink`; a text that is
            too short.
    """
    check_options(keep, noise)
    checkpoint = Checkpoint(folder)
    layout = checkpoint.layout
    tokens = None
    if text is not None:
        tokens = _texts.read_tokens(folder, text) if isinstance(text, str) else text
        _texts.check_tokens(tokens, layout.vocab_size)
    predicts = tokens is not None and _predicts(checkpoint)
    num_steps = len(layout.layers) + (2 * len(_outputs.DTYPES) + 2 * predicts) * check
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, num_steps)

    def run(weights: _outputs.Rows, where: Path, build: Any = None) -> tuple[dict[str, Tensor], float | None]:
        found = {}
        for name, dtype in _outputs.DTYPES.items():
            found[name] = _outputs.outputs(weights, where, given, dtype, build)
            step()
        if tokens is None or not predicts:
            return found, None
        value = _texts.loss(weights, where, tokens, build)
        step()
        return found, value

    given = _outputs.generated_inputs(checkpoint.config, layout.vocab_size) if tokens is None else tokens[:2]
    report, before = Shrunk(layout.kind), None
    with new_folder(checkpoint.folder, output, num_bytes=2 * checkpoint.file_bytes) as aside:
        if check:
            try:
                before = run(checkpoint, checkpoint.folder)
            except ImportError:
                report.checked += ": transformers is not installed (pip install 'erlangen[hf]')"
            except Exception as error:
                if tokens is not None:
                    raise ValueError(f"the model in {folder} cannot be run on this text ({error})") from error
                report.checked += f": {error}"
        moments = {} if tokens is None else _moments(checkpoint, tokens)
        assembly = _Assembly(checkpoint, aside)
        for number in range(len(layout.layers)):
            found = shrink_layer(layout, number, checkpoint, keep=keep, moments=moments, noise=noise)
            tell(report, number, found)
            assembly.add(found)
            del found
            files.give_back()
            step()
        weights = assembly.write()
        old = _Files(checkpoint._files).sizes()
        report.numbers, report.bytes = zip(old, weights.sizes())
        text = json.dumps(config_of(checkpoint.config, report.maps), indent=2, ensure_ascii=False) + "\n"
        (aside / CONFIG).write_text(text, encoding="utf-8")
        conclude(report, layout)
        _, left = other_files(checkpoint.folder)
        if left:
            report.notes.append(f"Left behind, for they hold other weights or states of training: {named(left)}.")
        if before is not None:
            build = (lambda where: _build(where, weights)) if report.maps else None
            outputs, after = run(weights, aside, build)
            checked = f"{list(given.shape)} token ids"
            for name, value in compared(before[0], outputs, checked).items():
                setattr(report, name, value)
            if before[1] is not None and after is not None:
                report.loss = (before[1], after)
        (aside / RECORD).write_text(report.to_json() + "\n", encoding="utf-8")
    return report


def _predicts(checkpoint: Checkpoint) -> bool:
    """Whether the model predicts next tokens."""
    try:
        _texts.check_causal(checkpoint.config, checkpoint.folder)
    except ValueError:
        return False
    return True
