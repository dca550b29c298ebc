"""Two checkpoints of one architecture, averaged in one gauge: a folder beside them, of the same architecture.

Both are read a tensor at a time and never changed. The second is brought into the gauge of the first, layer by layer,
and averaged with it (`erlangen.gauge.merge`); the new folder is written as `rewriting` does it. Its ``merge.json`` says
what was matched with what, that the second model still was its own function after it was moved, and, if text was given,
the loss along the path between the two, with the merge and with the plain average of stored numbers.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erlangen.gauge._align_side import Using as Using
from erlangen.gauge._fingerprint import fingerprint
from erlangen.gauge._models import Model
from erlangen.gauge._weights import chunks
from erlangen.gauge.align import Matching, align_weights, expect_mergeable, match_weights
from erlangen.gauge.merge import merge_others, merge_weights, other_names

from . import _outputs
from . import _safetensors as files
from ._texts import check_causal, check_tokens, expect_one_tokenizer, loss, read_tokens
from .checkpoints import RECORD, TRANSFORMS, WRITING, Checkpoint, FolderWeights, Progress, named, other_files, rewriting
from .layouts import layout_of_config

MERGED = "merge.json"  # what `merge_folders` adds


@dataclass
class LossPath:
    """Loss on a text, on the way from the first model (weight 0) to the second (weight 1).

    Attributes:
        weights: from 0 to 1.
        losses: "none" (stored numbers averaged as they are) and the way of the merge -> mean cross-entropy of the next
            token at each weight, in nats. The ends are the two models themselves.
        num_tokens: that were predicted.
    """

    weights: list[float]
    losses: dict[str, list[float]]
    num_tokens: int

    def barrier(self, using: str) -> float:
        """How far the loss rises at most over the straight line between its ends; 0 where it never does."""
        losses = self.losses[using]
        return max(
            loss - ((1 - weight) * losses[0] + weight * losses[-1]) for weight, loss in zip(self.weights, losses)
        )


@dataclass
class MergeRecord:
    """What a merge of two folders did, and what was measured. H query heads, L layers.

    Attributes:
        kind: of model.
        first, second: the two folders.
        weight: of the second model.
        using: what the second model was moved by: "gauge", "orthogonal", "permutation" or "none".
        frame: of its residual stream: "same", "turned" or "permuted".
        heads: L times [H]: the head of the second model that stands at each place.
        neurons_moved: of each layer, how many hidden features stand at another place (of their expert, in a mixture);
            None where there are none.
        experts: of each layer, [experts]: the expert of the second model that stands at each place; None where there is
            no mixture.
        head_similarity: L times [H, H]: cosine of the products of every head of the first model (rows) with every one
            of the second (columns).
        similarity: of the two models, after every round of the search; it never falls.
        distance_before, distance_after: of the stored numbers, before and after the second model was moved: 0 for
            equal, 1 for unrelated. After: None where the outputs were not compared.
        averaged: tensors that belong to no head, neuron or norm, and were averaged as they are stored.
        notes: what was left and why, in sentences.
        output_difference: of the second model, the largest difference of an output before and after it was moved, all
            in float64; None where it was not measured, and `checked` says why.
        output_scale: root mean square of its outputs.
        checked: what outputs were compared on.
        path: loss on the given text; None without.
    """

    kind: str
    first: str
    second: str
    weight: float
    using: str
    frame: str = "same"
    heads: list[list[int]] = field(default_factory=list)
    neurons_moved: list[int | None] = field(default_factory=list)
    experts: list[list[int] | None] = field(default_factory=list)
    head_similarity: list[Tensor] = field(default_factory=list)
    similarity: list[float] = field(default_factory=list)
    distance_before: float = 0.0
    distance_after: float | None = None
    averaged: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    output_difference: float | None = None
    output_scale: float | None = None
    checked: str = "outputs were not compared"
    path: LossPath | None = None

    @property
    def heads_moved(self) -> list[int]:
        """Of each layer, how many heads stand at another place."""
        return [sum(head != place for place, head in enumerate(heads)) for heads in self.heads]

    @property
    def experts_moved(self) -> list[int | None]:
        """Of each layer, how many experts stand at another place; None where there is no mixture."""
        return [
            None if experts is None else sum(expert != place for place, expert in enumerate(experts))
            for experts in self.experts
        ]

    def barriers(self) -> dict[str, float]:
        """Way of merging -> how far the loss rises over the line between its ends; empty without text."""
        return {} if self.path is None else {using: self.path.barrier(using) for using in self.path.losses}

    def to_json(self) -> str:
        """All of it, as JSON."""
        values = dict(vars(self)) | {"head_similarity": [tensor.tolist() for tensor in self.head_similarity]}
        values["path"] = None if self.path is None else vars(self.path)
        values["barriers"] = self.barriers()
        return json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "MergeRecord":
        """The inverse of `to_json`."""
        values = json.loads(text)
        values.pop("barriers")
        values["head_similarity"] = [torch.tensor(rows, dtype=torch.float64) for rows in values["head_similarity"]]
        values["path"] = None if values["path"] is None else LossPath(**values["path"])
        return cls(**values)


# --- two folders ------------------------------------------------------------------------------------------------------


class _Renamed:
    """A checkpoint under the names of another: some write their tensors with a prefix, some without."""

    def __init__(self, checkpoint: Checkpoint, like: Checkpoint) -> None:
        self.checkpoint = checkpoint
        ours, theirs = checkpoint.layout.token_embedding, like.layout.token_embedding
        names = {name: name for name in checkpoint.names()}
        if ours != theirs and ours.endswith(theirs):
            prefix = ours.removesuffix(theirs)
            names = {name.removeprefix(prefix): name for name in names}
        elif ours != theirs and theirs.endswith(ours):
            prefix = theirs.removesuffix(ours)
            names = {prefix + name if prefix + name in like else name: name for name in names}
        self._names = names
        self.layout = layout_of_config(checkpoint.config, names=names)

    def names_once(self) -> list[str]:
        """As of `Checkpoint`."""
        once = set(self.checkpoint.names_once())
        return [name for name, stored in self._names.items() if stored in once]

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        return self.checkpoint[self._names[name]]

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        return self.checkpoint.rows(self._names[name], first, last)

    def shape(self, name: str) -> torch.Size:
        return self.checkpoint.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.checkpoint.dtype(self._names[name])


@dataclass(frozen=True)
class _Pair:
    """Two checkpoints that can be merged: `two` under the names of `one`, and the tensors that no layout speaks of."""

    one: Checkpoint
    two: _Renamed
    others: list[str]

    @classmethod
    def of(cls, a: Checkpoint, b: Checkpoint) -> "_Pair":
        """Put the two together.

        Raises:
            ValueError: they are not of one architecture and size, or one has a tensor that the other has not.
        """
        two = _Renamed(b, a)
        expect_mergeable(*(
            Model(str(folder), weights.layout, weights, list(weights.names_once()), config, None, folder)
            for folder, weights, config in ((a.folder, a, a.config), (b.folder, two, b.config))
        ))  # fmt: skip
        others, theirs = (other_names(weights.layout, weights.names_once()) for weights in (a, two))
        for names, weights, has, lacks in ((others, two, a, b), (theirs, a, b, a)):
            missing = [name for name in names if name not in weights]
            if missing:
                raise ValueError(
                    f"{has.folder} holds {named(missing)}, and {lacks.folder} does not: only models of one kind can "
                    "be merged"
                )
        for name in others:
            if a.shape(name) != two.shape(name):
                raise ValueError(
                    f"{name} has shape {list(a.shape(name))} in {a.folder} and {list(two.shape(name))} in {b.folder}: "
                    "only models of one size can be merged"
                )
        return cls(a, two, others)

    @property
    def num_bytes(self) -> int:
        """Of a merged model."""
        return sum(map(self.one.num_bytes, self.one.names()))

    def squares(self, name: str, other: Callable[[slice], Tensor]) -> tuple[float, float]:
        """Sums of squares of the difference between a tensor of the first and another, and of both."""
        apart = size = 0.0
        shape = self.one.shape(name)
        for rows in chunks(shape[0], shape.numel() // max(shape[0], 1)):
            one, two = self.one.rows(name, rows.start, rows.stop).double(), other(rows).double()
            apart += (one - two).square().sum().item()
            size += one.square().sum().item() + two.square().sum().item()
        return apart, size

    def distance(self) -> float:
        """Of the stored numbers: 0 for equal, 1 for unrelated."""
        apart = size = 0.0
        for name in self.one.layout.tensor_shapes():
            found = self.squares(name, lambda rows, name=name: self.two.rows(name, rows.start, rows.stop))
            apart, size = apart + found[0], size + found[1]
        return (apart / size) ** 0.5 if size else 0.0


class _Averaged:
    """Two checkpoints, their stored numbers averaged as they are read."""

    def __init__(self, a: Checkpoint, b: _Renamed, weight: float) -> None:
        self._a, self._b, self._weight = a, b, weight

    def __contains__(self, name: str) -> bool:
        return name in self._a

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        one = self._a.rows(name, first, last)
        if name not in self._b or not one.is_floating_point():
            return one
        return torch.lerp(one.double(), self._b.rows(name, first, last).double(), self._weight)

    def shape(self, name: str) -> torch.Size:
        return self._a.shape(name)


class _Moved:
    """The second checkpoint after it was moved, in float64."""

    def __init__(self, pair: _Pair, kept: files.Spool) -> None:
        self._pair, self._kept = pair, kept
        self._apart = self._size = 0.0

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        parts = chunks(len(tensor), tensor.numel() // max(len(tensor), 1))
        self.put_rows(name, ((part, tensor[part]) for part in parts))

    def put_rows(self, name: str, pieces: Iterable[tuple[slice, Tensor]]) -> None:
        """All rows of a tensor, a piece at a time."""
        self._kept.put_rows(name, torch.float64, self.shape(name), self._measured(name, pieces))

    def _measured(self, name: str, pieces: Iterable[tuple[slice, Tensor]]) -> Iterator[tuple[slice, Tensor]]:
        for part, rows in pieces:
            one, two = self._pair.one.rows(name, part.start, part.stop).double(), rows.double()
            self._apart += (one - two).square().sum().item()
            self._size += one.square().sum().item() + two.square().sum().item()
            yield part, two

    @property
    def distance(self) -> float:
        """Of its numbers from those of the first checkpoint."""
        return (self._apart / self._size) ** 0.5 if self._size else 0.0

    def __contains__(self, name: str) -> bool:
        return name in self._pair.two

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        return self._kept.rows(name, first, last) if name in self._kept else self._pair.two.rows(name, first, last)

    def shape(self, name: str) -> torch.Size:
        return self._pair.two.shape(name)


# --- the merge --------------------------------------------------------------------------------------------------------


class _Steps:
    """Progress over named phases of known weight, each of which counts its own steps."""

    def __init__(self, progress: Progress | None, phases: Mapping[str, int]) -> None:
        self._progress, self._phases = progress, phases
        self._total, self._before = sum(phases.values()), 0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[Progress]:
        """A phase: what to call with the number of its steps done and of all. At its end it is done, whatever was."""
        weight = self._phases[phase]

        def step(done: int, total: int) -> None:
            if self._progress is not None and total:
                self._progress(self._before + weight * min(done, total) // total, self._total)

        yield step
        if weight:
            step(1, 1)
        self._before += weight


def merge_folders(
    a: str | Path,
    b: str | Path,
    output: str | Path,
    weight: float = 0.5,
    *,
    using: Using = "gauge",
    inputs: Tensor | Mapping[str, Any] | None = None,
    text: str | Tensor | None = None,
    points: int = 11,
    check: bool = True,
    progress: Progress | None = None,
) -> MergeRecord:
    """Average two checkpoints in the gauge of the first, and write the result to another folder, a layer at a time.

    The new folder holds a model of the same architecture, in the dtype of the first, with everything that lay beside
    its weights, and ``merge.json``. At weight 1 it is the second model in the gauge of the first; ``gauge.json`` and
    ``gauge.safetensors`` then say how an adapter follows (`erlangen.gauge.Certificate`).

    Outputs and losses are computed with transformers, a map at a time. For the comparison of outputs the second model
    is kept in float64 for a while, beside the output; for the losses, one merged model at a time.

    Args:
        a, b: folders with ``config.json`` and safetensors, of one architecture, size and tokenizer. They stay as they
            are.
        output: the new folder; it must not exist.
        weight: of the second model, from 0 to 1.
        using: what the second may be moved by: "gauge", all that changes no output; "orthogonal", rotations of heads
            and of the residual stream, with permutations; "permutation", permutations alone; "none", it stays as it is.
        inputs: what outputs are compared on: token ids [B, N], or keyword arguments of the model. None: two sequences
            of random tokens, always the same.
        text: on which the loss is measured, all the way from one model to the other: a text, which the tokenizer in
            the first folder splits, or token ids, int64 [windows, N]. None: the loss is not measured.
        points: of that way, at equal distances; the weight of the merge is one more.
        check: compare the outputs of the second model before and after it is moved.
        progress: called with the number of steps done and of all.

    Raises:
        OSError: as of `Checkpoint` and `rewriting`; too little space for the losses.
        ImportError: text is given, and transformers is not installed.
        ValueError: likewise; a weight outside [0, 1]; folders of unlike architecture, size, tensors or tokenizers;
            numbers that are not finite; text for a model that does not predict next tokens, or that is too short;
            inputs that the model does not take.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"the weight of the second model must be from 0 to 1, received {weight}")
    if points < 2:
        raise ValueError(f"a path needs 2 points at least, received {points}")
    pair = _Pair.of(Checkpoint(a), Checkpoint(b))
    one, second, layout = pair.one, pair.two.checkpoint, pair.one.layout
    tokenizers = expect_one_tokenizer(one.folder, second.folder)
    if second.folder.resolve() in Path(output).resolve().parents:
        raise ValueError(f"{output} lies in {b}, which is read: choose a folder beside it")
    tokens, way = None, list[float]()
    if text is not None:
        check_causal(one.config, one.folder)
        tokens = read_tokens(one.folder, text) if isinstance(text, str) else text
        check_tokens(tokens, layout.vocab_size)
        way = sorted({*(place / (points - 1) for place in range(points)), float(weight)})
    arms, depth = list(dict.fromkeys(("none", using))), len(layout.layers)
    phases = {
        "outputs": depth * check, "ends": 2 * depth * bool(way), "search": 4 * depth, "merge": 2 * depth,
        "moved": 3 * depth * check, "path": (3 * len(arms) - 2) * depth * len(way[1:-1]),
    }  # fmt: skip
    steps, record = _Steps(progress, phases), MergeRecord(layout.kind, str(a), str(b), float(weight), using)

    with rewriting(one, output) as weights:
        before = None
        with steps("outputs"):
            if check:
                before, record.checked = _outputs_before(pair, weights, inputs)
        with steps("ends"):
            if tokens is not None:
                if _free(weights) < pair.num_bytes:
                    raise OSError(
                        f"the losses need {pair.num_bytes / 1e9:.2f} GB beside the output for a while, and the disk "
                        f"has {_free(weights) / 1e9:.2f} GB left: free some space, or give no text"
                    )
                ends = [loss(checkpoint, checkpoint.folder, tokens) for checkpoint in (one, second)]
                record.path = LossPath(
                    way, {arm: [ends[0], *way[1:-1], ends[1]] for arm in arms}, tokens[:, 1:].numel()
                )
        with steps("search") as step:
            matching = match_weights(layout, one, pair.two, using=using, progress=step)
        if matching.frame != "same" and (heads := one.heads()):
            raise ValueError(f"the frame of the residual stream is not free: {named(heads)} of {a} read it")
        _note(record, matching)
        record.distance_before = pair.distance()
        with steps("merge") as step:
            if weight == 1:
                spool = files.Spool(weights.folder / f"{TRANSFORMS}{WRITING}")
                found = align_weights(layout, one, pair.two, weights, matching, transforms=spool, progress=step)
                found.source, found.target = fingerprint(second.layout, second), fingerprint(layout, weights)
                (weights.folder / RECORD).write_text(found.to_json() + "\n", encoding="utf-8")
                spool.save(weights.folder / TRANSFORMS)
                record.notes += [note for note in found.leftover if note not in record.notes]
            else:
                record.notes += merge_weights(layout, one, pair.two, weights, weight, matching, progress=step)
            record.averaged = merge_others(layout, pair.others, one, pair.two, weights, weight)
        with steps("moved") as step:
            if before is not None:
                _compare_moved(pair, weights, matching, record, before, inputs, step)
        with steps("path") as step:
            if tokens is not None and record.path is not None:
                _losses(pair, weights, matching, record, tokens, step)
        weights.finish()
        record.notes += [tokenizers] if tokenizers else []
        _, left = other_files(one.folder)
        if left:
            record.notes.append(f"Left behind, for they hold other weights or states of training: {named(left)}.")
        (weights.folder / MERGED).write_text(record.to_json() + "\n", encoding="utf-8")
    return record


def _free(weights: FolderWeights) -> int:
    """Bytes that the disk has left, once the output is written."""
    output = sum(file.path.stat().st_size for file in weights.checkpoint._files)
    return shutil.disk_usage(weights.folder).free - output


def _given(pair: "_Pair", inputs: Tensor | Mapping[str, Any] | None) -> Tensor | Mapping[str, Any]:
    config, vocab_size = pair.one.config, pair.one.layout.vocab_size
    return _outputs.generated_inputs(config, vocab_size) if inputs is None else inputs


def _outputs_before(
    pair: "_Pair", weights: FolderWeights, inputs: Tensor | Mapping[str, Any] | None
) -> tuple[files.Spool | None, str]:
    """Outputs of the second model in float64, on the disk, and what they were computed on; or None, and why."""
    why, second = "outputs were not compared", pair.two.checkpoint
    needed = 8 * sum(one.numel() for one in map(pair.one.shape, pair.one.layout.tensor_shapes()))
    if (free := _free(weights)) < needed:
        return None, f"{why}: that needs {needed / 1e9:.2f} GB for a while, and the disk has {free / 1e9:.2f} GB left"
    given = _given(pair, inputs)
    try:
        before = _outputs.outputs(second, second.folder, given, torch.float64)
    except ImportError:
        return None, f"{why}: transformers is not installed (pip install 'erlangen[hf]')"
    except Exception as error:
        if inputs is not None:
            raise ValueError(f"the model in {second.folder} does not take these inputs ({error})") from error
        return None, f"{why}: {error}"
    kept = files.Spool(weights.folder / f"outputs{WRITING}")
    kept["before"] = before
    return kept, f"{list(given.shape)} token ids" if isinstance(given, Tensor) else "the inputs given"


def _note(record: MergeRecord, matching: Matching) -> None:
    """What was matched with what."""
    record.frame, record.similarity = matching.frame, [float(value) for value in matching.similarity]
    record.heads = [heads.tolist() for heads in matching.heads]
    record.experts = [None if found is None else found.order.tolist() for found in matching.experts]
    record.neurons_moved = [
        mixture.num_neurons_moved
        if mixture is not None
        else None
        if order is None
        else int((order != torch.arange(len(order))).sum())
        for order, mixture in zip(matching.neurons, matching.experts)
    ]
    record.head_similarity = [values.double() for values in matching.head_similarity]
    record.notes += matching.notes


def _compare_moved(
    pair: "_Pair",
    weights: FolderWeights,
    matching: Matching,
    record: MergeRecord,
    kept: files.Spool,
    inputs: Tensor | Mapping[str, Any] | None,
    step: Progress,
) -> None:
    """Move the second model aside, in float64, and see that it still is its own function."""
    folder = weights.folder / f"moved{WRITING}"
    folder.mkdir()
    moved = _Moved(pair, files.Spool(folder / "weights"))
    factors = files.Spool(folder / "factors")
    layout, second = pair.one.layout, pair.two.checkpoint
    align_weights(
        layout, pair.one, pair.two, moved, matching, transforms=factors,
        progress=lambda done, total: step(2 * done, 3 * total),
    )  # fmt: skip
    after = _outputs.outputs(moved, second.folder, _given(pair, inputs), torch.float64)
    before = kept["before"]
    record.output_scale = (torch.linalg.vector_norm(before) / before.numel() ** 0.5).item()
    record.output_difference = after.sub_(before).abs_().max().item()
    kept.remove()
    record.distance_after = moved.distance
    shutil.rmtree(folder)


def _losses(
    pair: "_Pair", weights: FolderWeights, matching: Matching, record: MergeRecord, tokens: Tensor, step: Progress
) -> None:
    """Losses between the two ends, of every way."""
    path, layout = record.path, pair.one.layout
    assert path is not None
    folder, one = weights.folder / f"path{WRITING}", pair.one
    folder.mkdir()
    aside = FolderWeights(one, folder)
    inner = path.weights[1:-1]
    for place, at in enumerate(inner, 1):
        for arm, losses in path.losses.items():
            if arm == "none":
                found = _Averaged(one, pair.two, at)
            elif at == record.weight:
                found = weights
            else:
                merge_weights(layout, one, pair.two, aside, at, matching)
                merge_others(layout, pair.others, one, pair.two, aside, at)
                found = aside
            losses[place] = loss(found, one.folder, tokens)
        step(place, len(inner))
    shutil.rmtree(folder)
