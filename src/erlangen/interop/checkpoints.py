"""Checkpoints in Hugging Face's format: read a tensor at a time, and written anew beside the old.

`Checkpoint` is a folder with ``config.json`` and ``model.safetensors``, or shards with an index. It reads headers only,
proves them against the layout of the config, and hands out tensors as they are asked for. `rewriting` makes another
folder from one: the same shards and names, tensors put into place as they are ready, all other files carried along. It
is written under a name of its own, and renamed when every byte is on the disk. Nothing is unpickled.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from erlangen.gauge._fingerprint import fingerprint
from erlangen.gauge._fold import plan
from erlangen.gauge._weights import table_rows
from erlangen.gauge.canonical import canonical_form, compared
from erlangen.gauge.certificate import Certificate

from . import _outputs
from . import _safetensors as files
from .layouts import layout_of_config

# Of a checkpoint; what `canonicalize_folder` adds; how a folder is called while it is written.
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
RECORD, TRANSFORMS = "gauge.json", "gauge.safetensors"
WRITING = ".writing"
Progress = Callable[[int, int], None]

_LARGE = 1 << 20  # numbers of a tensor before whose reading freed memory is given back

# Files that hold weights, in this format or another. A copy of them would be of the old numbers.
_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml", ".ot",
    ".npz", ".tflite", ".mlmodel", ".pdparams",
}  # fmt: skip
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
# Buffers that older checkpoints hold: causal masks, frequencies and numbers of positions.
_BUFFERS = re.compile(
    r"(^|\.)(attn\.(masked_)?bias|attention\.(masked_)?bias|rotary_emb\.inv_freq|embeddings\.position_ids)$"
)
# Maps that read the last hidden states: poolers and classifiers.
_HEADS = re.compile(r"(^|\.)(pooler|score|classifier|qa_outputs|cls)\.")
_QUANTISED = re.compile(r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|quant_state.*|weight_scale(_inv)?)$")
# Second names under which the token embedding, and the bias of logits, are stored.
_COPIES = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
_COPIED_BIAS = ("cls.predictions.bias", "cls.predictions.decoder.bias")


def named(names: list[str]) -> str:
    """Some of the names, and how many more there are."""
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")


# --- reading ----------------------------------------------------------------------------------------------------------


class Checkpoint:
    """A folder of Hugging Face, opened: its config, its layout, and its tensors by name, read when they are asked for.

    It is a mapping from names to tensors (as stored, in memory of their own) as far as reading goes: ``name in
    checkpoint``, ``checkpoint[name]``, `shape`, `dtype`. Names are those that `layout` uses; LayerNorm's older names
    ``gamma`` and ``beta`` are found under ``weight`` and ``bias``.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``, or shards and their index.

    Attributes:
        folder: as given.
        config: what ``config.json`` holds.
        layout: of the model that the config describes.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: a file cannot be read.
        ValueError: it holds no such checkpoint; a file is damaged, cut off or missing; the config is of an unknown
            architecture or of quantised weights; tensors are missing, not known, quantised, or of other shapes than the
            config says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self._files = _tensor_files(self.folder)
        self._places = {name: (number, name) for number, file in enumerate(self._files) for name in file.entries}
        for name in list(self._places):
            new = re.sub(r"(LayerNorm|layer_norm)\.(gamma|beta)$", _modern_name, name)
            if new != name:
                self._places[new] = self._places.pop(name)
        self.layout = layout_of_config(self.config, names=self._places)
        self._copies = self._check()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r}, {self.layout.kind}, {len(self._places)} tensors)"

    def names(self) -> list[str]:
        """Names of all its tensors, in the order in which they are stored."""
        return list(self._places)

    def names_once(self) -> list[str]:
        """Those of them that hold weights of their own: no buffers, and no second copies of a tensor."""
        copies = set(self._copies.values())
        return [name for name in self._places if name not in copies and not _BUFFERS.search(name)]

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name)

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows of a tensor (of its first dimension), without the others being read."""
        file, entry = self._entry(name)
        return files.read(file.path, entry, first, last)

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor."""
        return torch.Size(self._entry(name)[1].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return files.dtype_of(self._entry(name)[1])

    @property
    def file_bytes(self) -> int:
        """Size of the files that hold the weights."""
        return sum(file.path.stat().st_size for file in self._files)

    def num_bytes(self, name: str) -> int:
        """Size of a tensor, as it is stored."""
        entry = self._entry(name)[1]
        return entry.stop - entry.start

    def _entry(self, name: str) -> tuple[files.TensorFile, files.Entry]:
        if name not in self._places:
            raise KeyError(f"{self.folder} holds no tensor {name}")
        number, stored = self._places[name]
        return self._files[number], self._files[number].entries[stored]

    def _check(self) -> dict[str, str]:
        """Compare the tensors with the layout; returns the copies of tensors, name -> name of the copy."""
        expected = self.layout.tensor_shapes()
        there = f"{self.folder} does not hold the {self.layout.kind} model that its {CONFIG} describes"
        quantised = [name for name in self._places if _QUANTISED.search(name)]
        quantised += [
            name
            for name in expected
            if name in self._places and self._entry(name)[1].dtype not in files.FLOATS and name not in quantised
        ]
        if quantised:
            dtype = self._entry(quantised[0])[1].dtype
            raise ValueError(
                f"{self.folder} holds quantised weights ({named(quantised)}; {dtype}): their steps leave no room for "
                "an exact change of basis: dequantise the model first, into float32 or bfloat16"
            )
        missing = [name for name in expected if name not in self._places]
        if missing:
            raise ValueError(f"{there}: {named(missing)} {'is' if len(missing) == 1 else 'are'} missing")
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise ValueError(
                    f"{there}: {name} must have shape {list(shape)}, received {list(self.shape(name))}: the config or "
                    "the weights are of another model"
                )
        rest = [name for name in self._places if name not in expected and not _BUFFERS.search(name)]
        copies = self._find_copies(rest)
        rest = [name for name in rest if name not in copies.values()]
        if self.layout.unembedding is None or self.layout.final_norm is None:
            rest = [name for name in rest if not _HEADS.search(name)]
        rest += [name for name in self._places if "cls.predictions.transform" in name and not self._has_decoder()]
        if rest:
            raise ValueError(
                f"{there}: it also holds {named(rest)}, whose part in the model is not known: take "
                f"{'it' if len(rest) == 1 else 'them'} out, or correct the config"
            )
        return copies

    def _has_decoder(self) -> bool:
        """Whether the head of masked language finds its last map: the token embedding, or one of its own."""
        return self.layout.tied or "cls.predictions.decoder.weight" in self._places

    def _find_copies(self, names: list[str]) -> dict[str, str]:
        copies = {}
        pairs = [(self.layout.token_embedding, name) for name in names if name in _COPIES and self.layout.tied]
        pairs += [_COPIED_BIAS] if _COPIED_BIAS[0] in self._places and _COPIED_BIAS[1] in names else []
        for name, copy in pairs:
            if self.shape(name) != self.shape(copy) or not self._equal(name, copy):
                raise ValueError(
                    f"{self.folder / CONFIG} says that {copy} is {name} (tie_word_embeddings), but both are stored and "
                    "they differ: set tie_word_embeddings to false"
                )
            copies[name] = copy
        return copies

    def _equal(self, name: str, other: str) -> bool:
        rows = self.shape(name)[0]
        step = max(1, files.CHUNK * rows // max(1, self.num_bytes(name)))
        return all(
            torch.equal(self.rows(name, first, first + step), self.rows(other, first, first + step))
            for first in range(0, rows, step)
        )

    def heads(self) -> list[str]:
        """Tensors of poolers and classifiers, which read the last hidden states; no layout speaks of them."""
        known = self.layout.tensor_shapes()
        return [name for name in self._places if name not in known and _HEADS.search(name)]


def _modern_name(match: re.Match) -> str:
    return f"{match[1]}.{'weight' if match[2] == 'gamma' else 'bias'}"


def read_config(folder: str | Path) -> dict[str, Any]:
    """What the ``config.json`` of a folder holds.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no folder, or has no config that can be read.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: name a folder with {CONFIG} and {SINGLE}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: name the folder with {CONFIG} and {SINGLE} that it lies in")
    path = folder / CONFIG
    if not path.is_file():
        adapter = (folder / "adapter_config.json").exists()
        what = "it is an adapter: merge it into its base model first" if adapter else "name a folder of Hugging Face"
        raise ValueError(f"{folder} has no {CONFIG}: {what}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, received {type(config).__name__}")
    return config


def _tensor_files(folder: Path) -> list[files.TensorFile]:
    """The opened shards of a folder, in the order of their names."""
    if (folder / SINGLE).is_file():
        return [files.open_file(folder / SINGLE)]
    index = folder / INDEX
    if not index.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        found = f"; it has {named(pickles)}, which is not read because unpickling runs code" if pickles else ""
        raise ValueError(
            f"{folder} has no {SINGLE} and no {INDEX}{found}. Convert it where you trust it: "
            "transformers.AutoModel.from_pretrained(folder).save_pretrained(new_folder)"
        )
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: it must be JSON with a weight_map, name -> file") from error
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ValueError(f"{index} must name files that lie beside it, received {named([str(name) for name in names])}")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{index} names {named(absent)}, which {folder} does not hold: get the missing files")
    shards = [files.open_file(folder / name) for name in names]
    for shard in shards:
        said = {name for name, file in places.items() if file == shard.path.name}
        wrong = sorted(said ^ shard.entries.keys())
        if wrong:
            verb = "does not hold" if wrong[0] in said else "also holds"
            raise ValueError(f"{index} and {shard.path.name} disagree: the file {verb} {named(wrong)}")
    return shards


# --- writing ----------------------------------------------------------------------------------------------------------


class FolderWeights:
    """Tensors of a checkpoint, read from it until they are written, to another folder.

    Args:
        checkpoint: that is read.
        folder: where the shards are made, of the same names; it exists and is empty.
        added: name of a new tensor -> that of the one which it is a copy of; it is stored in the same shard, at the
            end. A second name under which the checkpoint already stores that tensor becomes a tensor of its own.
    """

    def __init__(self, checkpoint: Checkpoint, folder: Path, added: Mapping[str, str] | None = None) -> None:
        self.checkpoint, self.folder = checkpoint, folder
        self._sources = {name: source for name, source in (added or {}).items() if name not in checkpoint}
        self._copies = {name: copy for name, copy in checkpoint._copies.items() if copy not in (added or {})}
        homes = {name: checkpoint._places[source][0] for name, source in self._sources.items()}
        self._places = checkpoint._places | {name: (home, name) for name, home in homes.items()}
        self._files = []
        for number, file in enumerate(checkpoint._files):
            new = {
                name: (checkpoint.dtype(source), tuple(checkpoint.shape(source)))
                for name, source in self._sources.items()
                if homes[name] == number
            }
            self._files.append(files.create(folder / file.path.name, file, new))
        self._written: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name)

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows of a tensor (of its first dimension), without the others being read."""
        if first == 0 and last is None and name in self and self.shape(name).numel() >= _LARGE:
            files.give_back()
        if name in self._written:
            file, entry = self._entry(name)
            return files.read(file.path, entry, first, last)
        return self.checkpoint.rows(self._sources.get(name, name), first, last)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        _, entry = self._entry(name)
        if tuple(tensor.shape) != entry.shape:
            raise ValueError(f"{name} has shape {list(entry.shape)}, received {list(tensor.shape)}")
        self._put(name, 0, tensor)
        self._written.add(name)
        if name in self._copies:
            self[self._copies[name]] = tensor

    def put_rows(self, name: str, pieces: Iterable[tuple[slice, Tensor]]) -> None:
        """Replace all rows of a tensor (of its first dimension), a piece at a time, in order.

        Until the last one is written, rows are read as they were; so a piece may be made from the same rows.
        """
        for part, rows in pieces:
            self._put(name, part.start, rows)
        self._written.add(name)
        if name in self._copies:
            self.put_rows(self._copies[name], table_rows(self, name))

    def _put(self, name: str, first: int, rows: Tensor) -> None:
        file, entry = self._entry(name)
        cast = rows.detach().to(device="cpu", dtype=files.dtype_of(entry))
        if cast.numel() and not all(number.isfinite() for number in torch.aminmax(cast)):
            raise ValueError(
                f"{name} would hold numbers up to {rows.abs().max():.3g}, beyond the range of {entry.dtype}: store "
                "the model in float32 or bfloat16 first"
            )
        files.write(file.path, entry, cast, first)

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor."""
        return torch.Size(self._entry(name)[1].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return files.dtype_of(self._entry(name)[1])

    def _entry(self, name: str) -> tuple[files.TensorFile, files.Entry]:
        if name not in self._places:
            raise KeyError(f"{self.checkpoint.folder} holds no tensor {name}")
        number, stored = self._places[name]
        return self._files[number], self._files[number].entries[stored]

    def finish(self) -> None:
        """Copy the tensors that were not written."""
        for name, source in self._sources.items():
            if name not in self._written:
                self[name] = self.checkpoint[source]
        for number, (old, new) in enumerate(zip(self.checkpoint._files, self._files)):
            rest = [name for name, (home, _) in self._places.items() if home == number and name not in self._written]
            files.copy(old, new, [self._places[name][1] for name in rest])
            self._written.update(rest)


@contextmanager
def rewriting(
    checkpoint: Checkpoint,
    output: str | Path,
    *,
    added: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Iterator[FolderWeights]:
    """Make another folder from a checkpoint; in the context its tensors are changed, after it the folder is there.

    Args:
        checkpoint: that is read, and stays as it is.
        output: the new folder.
        added: new tensors, as in `FolderWeights`.
        config: keys of ``config.json`` that get another value.

    Raises:
        OSError, ValueError: as of `new_folder`.
    """
    more = sum(checkpoint.num_bytes(name) for name in (added or {}).values())
    with new_folder(checkpoint.folder, output, num_bytes=checkpoint.file_bytes + more) as aside:
        if config:
            text = json.dumps({**checkpoint.config, **config}, indent=2, ensure_ascii=False) + "\n"
            (aside / CONFIG).write_text(text, encoding="utf-8")
        weights = FolderWeights(checkpoint, aside, added)
        if checkpoint._files[0].path.name != SINGLE:
            _write_index(checkpoint, weights)
        yield weights
        weights.finish()


@contextmanager
def new_folder(folder: Path, output: str | Path, *, num_bytes: int) -> Iterator[Path]:
    """Make a folder beside another one; in the context it is filled, after it it is there.

    All files that hold no weights are carried along, and so are the folders that ``modules.json`` of
    sentence-transformers names. If the context is left by an error or Ctrl-C, nothing is left behind.

    Args:
        folder: that is read, and stays as it is.
        output: the new folder.
        num_bytes: that it needs for weights.

    Yields:
        Where it is, until it is renamed.

    Raises:
        FileExistsError: the output exists, or another process is writing it.
        OSError: it cannot be written; there is too little space on the disk.
        ValueError: the output lies in the folder that is read.
    """
    output, source = Path(output), folder.resolve()
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"{output} exists: choose another folder, nothing is overwritten")
    if source in output.resolve().parents:
        raise ValueError(f"{output} lies in {folder}, which is read: choose a folder beside it")
    carried, _ = other_files(folder)
    needed = num_bytes + sum((source / name).stat().st_size for name in carried)
    free = shutil.disk_usage(next(parent for parent in output.resolve().parents if parent.exists())).free
    if free < needed:
        raise OSError(
            f"{output} needs {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left: free some space"
        )
    aside = output.with_name(output.name + WRITING)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.mkdir()
    except FileExistsError as error:
        raise FileExistsError(
            f"{aside} exists: another process writes {output}, or one was killed while it did; then remove it"
        ) from error
    try:
        for name in carried:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, aside / name)
        yield aside
        files.to_disk([*aside.rglob("*"), aside])
        if output.exists():
            raise FileExistsError(f"{output} has come into being meanwhile: choose another folder")
        aside.rename(output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    files.to_disk([output.parent])


def _write_index(checkpoint: Checkpoint, weights: FolderWeights) -> None:
    text = (checkpoint.folder / INDEX).read_text(encoding="utf-8")
    if weights._sources:
        index = json.loads(text)
        sizes = index["metadata"] if isinstance(index.get("metadata"), dict) else {}
        for name in weights._sources:
            index["weight_map"][name] = weights._entry(name)[0].path.name
            for key, size in (("total_size", weights.dtype(name).itemsize), ("total_parameters", 1)):
                if key in sizes:
                    sizes[key] += size * weights.shape(name).numel()
        text = json.dumps(index, indent=2) + "\n"
    (weights.folder / INDEX).write_text(text, encoding="utf-8")


def other_files(folder: Path) -> tuple[list[str], list[str]]:
    """Paths of the files beside the weights: those carried along to a new folder, and those left (other weights)."""
    modules = set()
    if (folder / "modules.json").is_file():
        try:
            parts = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
            modules = {part["path"] for part in parts} - {""}
        except (ValueError, KeyError, TypeError):
            pass  # not the modules.json of sentence-transformers
    ours = {SINGLE, INDEX}
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        ours |= set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    carried, left = [], []
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in (".git", ".cache", "__pycache__"))
        for name in sorted(names):
            relative = (Path(path) / name).relative_to(folder)
            if str(relative) in ours or str(relative) in (RECORD, TRANSFORMS):
                continue
            weights = relative.suffix in _WEIGHTS or name.endswith((".bin.index.json", ".safetensors.index.json"))
            part_of_model = len(relative.parts) > 1 and relative.parts[0] in modules
            (left if weights and not part_of_model else carried).append(str(relative))
    return carried, left


# --- canonical form ---------------------------------------------------------------------------------------------------


def canonicalize_folder(
    folder: str | Path,
    output: str | Path,
    *,
    order: Literal["sorted", "kept"] = "sorted",
    residual: bool = False,
    untie: bool = False,
    logit_shift: bool = False,
    inputs: Tensor | Mapping[str, Any] | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> Certificate:
    """Write the canonical form of a checkpoint to another folder, a layer at a time.

    Beside the weights, ``gauge.json`` holds the certificate and ``gauge.safetensors`` its transforms. Outputs are
    compared with transformers, if it is installed: both checkpoints are run a map at a time, so that neither has to fit
    into memory; where it is not, or knows no such model, the certificate says so in `Certificate.checked`. The factors
    go to the disk layer by layer, and `Certificate.transforms` reads each from there when it is asked for.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``, or shards and their index. It stays as it is.
        output: the new folder; it must not exist.
        order, residual, untie, logit_shift, inputs, check: as of `erlangen.gauge.canonicalize`. With ``untie`` the new
            config says ``tie_word_embeddings: false``, and the unembedding is stored behind the token embedding.
        progress: called with the number of steps done and of all.

    Raises:
        OSError: as of `Checkpoint` and `rewriting`.
        ValueError: likewise; ``residual`` where the frame is not free or heads read it; ``untie`` where nothing is
            tied; inputs that the model does not take.
    """
    checkpoint = Checkpoint(folder)
    layout, added, config = checkpoint.layout, {}, {}
    if untie:
        if not layout.tied:
            raise ValueError(f"untie needs logits that are taken with the token embedding; those of {folder} are not")
        config = {"tie_word_embeddings": False}
        layout = layout_of_config({**checkpoint.config, **config}, names=checkpoint.names())
        if layout.unembedding is None:
            raise ValueError(f"untie is not known for a {layout.kind}: its logits are made by a head of its own")
        added = {layout.unembedding.weight: layout.token_embedding}
    heads = checkpoint.heads()
    if residual and heads:
        raise ValueError(f"the frame of the residual stream is not free: {named(heads)} of {folder} read it")
    num_steps = len(layout.layers) + 2 * check * len(_outputs.DTYPES)
    done = 0

    def step(*_: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, num_steps)

    def run(weights: Checkpoint | FolderWeights, found: files.Spool) -> None:
        shifted = plan(layout, logit_shift=logit_shift).logit_shift
        for name, dtype in _outputs.DTYPES.items():
            x = _outputs.outputs(weights, weights.folder, given, dtype)
            found[name] = x.sub_(x.mean(dim=-1, keepdim=True)) if shifted else x
            step()

    given = _outputs.generated_inputs(checkpoint.config, layout.vocab_size) if inputs is None else inputs
    reason = "outputs were not compared"
    with rewriting(checkpoint, output, added=added, config=config) as weights:
        # On the disk, for the logits of all dtypes may be larger than a layer.
        before, after = (files.Spool(weights.folder / f"outputs-{when}{WRITING}") for when in ("before", "after"))
        if check:
            try:
                run(checkpoint, before)
                reason = ""
            except ImportError:
                reason += ": transformers is not installed (pip install 'erlangen[hf]')"
            except Exception as error:
                if inputs is not None:
                    raise ValueError(f"the model in {folder} does not take these inputs ({error})") from error
                reason += f": {error}"
        factors = files.Spool(weights.folder / f"{TRANSFORMS}{WRITING}")
        record = canonical_form(
            layout, weights, order=order, residual=residual, logit_shift=logit_shift, transforms=factors, progress=step
        )
        weights.finish()
        certificate = Certificate(layout.kind, checked=reason, **vars(record))
        certificate.source = fingerprint(checkpoint.layout, checkpoint)
        certificate.target = fingerprint(layout, weights)
        _, left = other_files(checkpoint.folder)
        if left:
            certificate.folded.append(f"Left behind, for they hold other weights or states of training: {named(left)}.")
        if not reason:
            run(weights, after)
            sizes = f"{list(given.shape)} token ids" if isinstance(given, Tensor) else "the inputs given"
            for name, value in compared(before, after, sizes).items():
                setattr(certificate, name, value)
        before.remove()
        after.remove()
        (weights.folder / RECORD).write_text(certificate.to_json() + "\n", encoding="utf-8")
        factors.save(weights.folder / TRANSFORMS)
    certificate.transforms = files.Tensors(files.open_file(Path(output) / TRANSFORMS))
    return certificate
