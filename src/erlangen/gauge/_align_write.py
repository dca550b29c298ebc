"""What lies between two models whose parts are matched, written in the gauge of the first, a layer at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import _align_mlp
from ._align_attention import Scale, turned_in_place
from ._align_blend import Back, HeadsBack, blend_attention, blend_mlp, mlp_pieces, mlp_tensors
from ._align_experts import places
from ._align_heads import AttentionForm, AttentionMatch, each_head, kv_heads
from ._align_mlp import MLPForm, NeuronMatch, parts_of
from ._align_side import Progress, Side, pairs_of_rows, unembedding_rows
from ._align_weights import Matching
from ._canonical_heads import _BY_QUERY, _SHARED
from ._canonical_record import Record
from ._experts import maps_of
from ._fold import Fold, Reading, Writing, attention_maps, latent_readers, stored_gain
from ._unfold import Unfold
from ._weights import ReadWeights, chunks, give_back
from .layout import MLP, Experts, Norm, Projection

_MANY = 1 << 20  # numbers of a tensor that is large
_FORMS = 4  # forms that are made of the same hidden features, and so what their number is divided by


class _Once:
    """What is written, with the names; some tensors are held back."""

    def __init__(self, out: Any) -> None:
        self.out, self.names = out, set[str]()
        self.hold: tuple[str, ...] = ()
        self.held: dict[str, Tensor] = {}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name in self.hold:
                self.held[name] = tensor
            elif name not in self.names:
                self.out[name] = tensor
                self.names.add(name)

    def put_rows(self, name: str, stored: ReadWeights, pieces: Iterable[tuple[slice, Tensor]]) -> None:
        """The same of a matrix, some rows at a time, of the shape of a stored one."""
        put = getattr(self.out, "put_rows", None)
        if put is not None:
            put(name, pieces)
            self.names.add(name)
            return
        new = torch.empty(stored.shape(name), dtype=self.wide(name, stored.shape(name), stored.dtype(name)))
        for part, rows in pieces:
            new[part] = rows.to(new.dtype)
        self.put({name: new})

    def wide(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.dtype:
        """Of what is made of a stored tensor: float64; of a large one float32, or as it is kept where that is known."""
        if shape.numel() < _MANY:
            return torch.float64
        kept = getattr(self.out, "dtype", None)
        return torch.promote_types(dtype, torch.float32 if kept is None else kept(name))


def write(
    a: Side, b: Side, out: Any, weight: float, matching: Matching, record: Record | None, progress: Progress | None
) -> list[str]:
    """Write what lies between two models, in the first one's gauge: at weight 1 the second model itself.

    Args:
        a, b: the models.
        out: tensors are set in it by name, in float64; large ones in float32 where no more is stored, or as ``out``
            keeps them where it has ``dtype``; tables some rows at a time where it has ``put_rows`` (`Weights`).
        weight: of the second.
        matching: what belongs to what.
        record: is told what was done to the second; None: nobody is.
        progress: called with the number of layers done and of all.

    Returns:
        What could not be put back as the first model has it, in sentences.
    """
    writer = _Writer(a, b, weight, matching, _Once(out), record)
    frame, number = matching.residual, len(a.layout.layers)
    if record is not None:
        for name, tensor in (("matrix", frame.matrix), ("order", frame.order), ("sign", frame.sign)):
            if tensor is not None:
                record.keep(f"residual.{name}", tensor)
    for name in a.tables:
        writer.table(name)
    give_back()
    for layer in range(number):
        writer.layer(layer)
        if progress is not None:
            progress(layer + 1, number)
        give_back()
    writer.unembedding()
    writer.kept()
    return list(dict.fromkeys(writer.notes))


def _between(a: Tensor, b: Tensor, weight: float) -> Tensor:
    return b if weight == 1 else (1 - weight) * a + weight * b


@dataclass
class _Branch:
    """One of the two branches of a layer, and what it reads.

    Attributes:
        number: of the layer.
        which: 0 attention, 1 feed-forward.
        reading, other: the norm that is read, of the first model and of the second in its frame.
        wanted: how that of the first is put back.
    """

    number: int
    which: int
    reading: Reading
    other: Reading
    wanted: Unfold


@dataclass
class _Writer:
    """What writes.

    Attributes:
        a, b, weight, matching, record: as of `write`.
        written: what was.
        notes: what could not be put back.
    """

    a: Side
    b: Side
    weight: float
    matching: Matching
    written: _Once
    record: Record | None
    notes: list[str] = field(default_factory=list)

    def between(self, one: Tensor, two: Tensor) -> Tensor:
        return _between(one, two, self.weight)

    def table(self, name: str) -> None:
        """An embedding."""
        a, b, frame = self.a, self.b, self.matching.residual
        rows = (
            (part, a.table_tensor(name, part, self.between(one, frame.apply(two))))
            for part, (one, two) in zip(chunks(*a.stored.shape(name)), pairs_of_rows(a, b, name))
        )
        self.written.put_rows(name, a.stored, rows)
        if self.record is not None:
            token = name == a.layout.token_embedding
            writing = b.embeddings.token_writing if token else b.embeddings.writing
            writes = {"centred": writing.centred, "scale": b.table_scale / a.table_scale}
            self.record.maps[name] = {
                "weight": name, "bias": None, "transposed": True, "slices": [], "writes": writes,
            }  # fmt: skip

    def layer(self, number: int) -> None:
        """Both branches of a layer."""
        a, written, step = self.a, self.written, self.a.steps.layers[number]
        branches = []
        for which, (reading, other) in enumerate(zip(a.readings(number), self.b.readings(number))):
            unfold = Unfold.of(reading, self.notes)
            if reading.fold.kind == "after" and reading.gain is not None and other.gain is not None:
                gain = self.between(reading.gain / reading.scale, other.gain / other.scale)
                unfold.unseen = replace(reading, gain=gain).unseen()
                written.put(unfold.tensors(gain))
            elif unfold.fold.ones and step.attention == step.mlp:
                unfold = unfold.plain  # read by both branches, of which each alone might want it so
            other = replace(other, frame=self.matching.residual)
            branches.append(_Branch(number, which, reading, other, unfold))
        biases = None if self.matching.using in ("none", "permutation") else a.layout.layers[number].joined_biases
        written.hold = biases or ()
        self._attention(branches[0])
        give_back()
        self._feed_forward(branches[1])
        if biases is not None:  # only their sum counts: the second is that of a
            output, down = biases
            own, held = a.weights[down].double(), written.held
            written.hold = ()
            written.put({output: held[output] + held[down] - own, down: own})

    def _attention(self, branch: _Branch) -> None:
        between = _Attention.of(self, branch)
        unfold = self._carried(branch.wanted, between.readers())
        self.written.put(between.tensors(unfold))
        self._put_norm(unfold, branch.wanted)
        if self.record is not None:
            between.note(self.record, unfold)

    def _feed_forward(self, branch: _Branch) -> None:
        layer, order = self.a.layout.layers[branch.number], self.matching.neurons[branch.number]
        if layer.mlp is None or order is None:
            assert layer.experts is not None
            self._mixture(branch, layer.experts)
            return
        between = _FeedForward.of(self, branch, layer.mlp, layer.mlp, order)
        unfold = self._carried(branch.wanted, between.readers())
        self.written.put(between.tensors(unfold))
        self._put_norm(unfold, branch.wanted)
        if self.record is not None:
            between.note(self.record, unfold)

    def _carried(self, unfold: Unfold, pieces: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> Unfold:
        """How a norm that is read is put back: with ones, where its bias would carry constants badly."""
        if not unfold.fold.ones or self.a.form_using == "permutation":
            return unfold
        return unfold if unfold.carries(pieces) else unfold.plain

    def _put_norm(self, unfold: Unfold, wanted: Unfold) -> None:
        """Write a norm at the head of a branch."""
        norm = unfold.fold.norm
        if norm is None or unfold.fold.kind != "before":
            return
        if unfold is not wanted:
            self.notes.append(f"{norm.path} has biases that would carry constants badly: its gains and biases are 1.")
        self.written.put(unfold.tensors(None))

    def _mixture(self, branch: _Branch, experts: Experts) -> None:
        """An expert at a time."""
        a, number, written = self.a, branch.number, self.written
        one, two, match = a.experts_form(number), self.b.experts_form(number), self.matching.experts[number]
        assert one is not None and two is not None and match is not None
        two = two.in_frame(self.matching.residual)

        def between(place: int | None) -> _FeedForward:
            mlp = theirs = experts.shared
            if place is not None:
                mlp, theirs = experts.experts[place], experts.experts[int(match.order[place])]
            assert mlp is not None and theirs is not None
            return _FeedForward.of(self, branch, mlp, theirs, match.neurons_of(place))

        router = experts.router
        scores = self.between(one.scores, two.scores[match.order]) + one.unseen
        own = router.heads(a.weights[router.weight])[0]

        def readers() -> Iterator[tuple[Tensor, Tensor, None]]:
            yield scores[:, : a.layout.dim], own, None
            for place in places(experts):
                yield from between(place).readers()

        unfold = self._carried(branch.wanted, readers())
        self._router(router, scores, own, unfold)
        stacks: dict[str, Tensor] = {}
        for place in places(experts):
            found = between(place)
            tensors = found.tensors(unfold)
            for part in parts_of(found.mlp).values():
                if part.stack is not None and part.weight in tensors:
                    if part.weight not in stacks:
                        shape = a.stored.shape(part.weight)
                        dtype = written.wide(part.weight, shape, a.stored.dtype(part.weight))
                        stacks[part.weight] = torch.empty(shape, dtype=dtype)
                    stacks[part.weight][part.stack] = tensors.pop(part.weight)
            written.put(tensors)
            del tensors
            if self.record is not None:
                found.note(self.record, unfold)
            del found
            give_back()
        written.put(stacks)
        self._put_norm(unfold, branch.wanted)
        if self.record is not None:
            self.record.slices(router, "router", {"scale": torch.ones(len(scores)).double(), "order": match.order})
            _record_reading(self.record, router, branch.other, unfold)
            if experts.softmax and a.form_using != "permutation":
                self.record.map_of(router)["shifts"] = True

    def _router(self, router: Projection, scores: Tensor, own: Tensor, unfold: Unfold) -> None:
        """The rows of a router as they are stored, from those in form [experts, columns]."""
        rows, bias = (scores, None) if router.bias_name is None else (scores[:, :-1], scores[:, -1])
        if self.a.form_using != "permutation":
            rows = unfold.rows(rows, own)
            constant = unfold.constant(rows)
            bias = bias if bias is None or constant is None else bias - constant
        new = self.a.weights[router.weight].clone()
        router.put_heads(new, rows[None])
        tensors = {router.weight: new}
        if bias is not None and router.bias_name is not None:
            tensors[router.bias_name] = self.a.weights[router.bias_name].clone()
            router.put_head_biases(tensors[router.bias_name], bias[None])
        self.written.put(tensors)

    def unembedding(self) -> None:
        """The map to the logits, where it has a tensor of its own."""
        a, b, part = self.a, self.b, self.a.layout.unembedding
        if part is None:
            return
        readings = a.final_reading(), replace(b.final_reading(), frame=self.matching.residual)
        wanted = unfold = Unfold.of(readings[0], self.notes)
        constants = []

        def pieces() -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
            for piece in chunks(a.layout.vocab_size, a.layout.dim):
                (raw, one), (other, two) = unembedding_rows((a, b), part, piece)
                yield piece, self.between(one, _in_frame(two, readings[1])), raw, other

        if not unfold.carries((rows, raw, None) for _, rows, raw, _ in pieces()):
            unfold = unfold.plain

        def stored() -> Iterator[tuple[slice, Tensor]]:
            for piece, folded, raw, other in pieces():
                rows = unfold.rows(folded, raw)
                found = [reading.constant(values) for reading, values in zip(readings, (raw, other))]
                taken = unfold.constant(rows)
                if found[0] is not None and found[1] is not None and taken is not None:
                    constants.append(self.between(found[0], found[1]) - taken)
                yield piece, rows

        name = part.weight
        if part.transposed or a.stored.shape(name)[0] != a.layout.vocab_size:
            stored_rows = a.stored[name]
            new = stored_rows.to(self.written.wide(name, stored_rows.shape, stored_rows.dtype), copy=True)
            del stored_rows
            rows = part.heads(new)[0]
            for piece, values in stored():
                rows[piece] = values.to(new.dtype)
            self.written.put({name: new})
        else:
            self.written.put_rows(name, a.stored, stored())
        if part.bias_name is not None:
            bias = self.between(a.weights[part.bias_name], b.weights[part.bias_name])
            self.written.put({part.bias_name: bias + torch.cat(constants) if constants else bias})
        self._put_norm(unfold, wanted)
        if self.record is not None:
            _record_reading(self.record, part, readings[1], unfold)
            self.record.map_of(part)

    def kept(self) -> None:
        """Norms that are not folded, and whatever else the layout names, between the two."""
        a, b, layout, frame = self.a, self.b, self.a.layout, self.matching.residual
        norms: dict[str, tuple[Norm, float]] = {}
        for layer in layout.layers:
            for norm in (layer.attention_out_norm, layer.mlp_out_norm):
                if norm is not None:
                    norms[norm.path] = norm, a.scale / b.scale
            for norm in (layer.attention_norm, layer.mlp_norm, layer.attention_sum_norm, layer.mlp_sum_norm):
                if norm is not None:
                    norms.setdefault(norm.path, (norm, 1.0))
        tied = b.scale / a.scale if layout.tied else 1.0
        for norm, factor in ((layout.embedding_norm, 1.0), (layout.final_norm, tied)):
            if norm is not None:
                norms.setdefault(norm.path, (norm, factor))
        for norm, factor in norms.values():
            if norm.weight is not None:
                one, two = (side.weights[norm.weight] + norm.offset for side in (a, b))
                gain = self.between(one, frame.permute(two) * factor)
                self.written.put({norm.weight: gain - norm.offset})
            if norm.bias_name is not None:
                one, two = (side.weights[norm.bias_name] for side in (a, b))
                self.written.put({norm.bias_name: self.between(one, frame.apply(two) * factor)})
        for name in layout.tensor_shapes():
            if name not in self.written.names:
                self.written.put({name: self.between(a.weights[name], b.weights[name])})


def _to_write(writer: _Writer, own: dict[str, Tensor], matrices: Iterable[Projection]) -> dict[str, Tensor]:
    """What is to be written, a copy of stored tensors; of matrices no other is kept, and they are rewritten in place.

    Their numbers are the same in the dtype in which they are written, and no slice is read again once it is written.
    """
    names, found = {part.weight for part in matrices}, {}
    for name in own:
        found[name] = own[name].to(writer.written.wide(name, own[name].shape, own[name].dtype), copy=True)
        if name in names:
            own[name] = found[name]
            give_back()
    return found


# --- attention --------------------------------------------------------------------------------------------------------


@dataclass
class _Attention:
    """A layer's attention between two models whose heads are matched, some heads at a time.

    Attributes:
        writer, branch: what it is part of.
        heads: int64 [num_heads], of the second at each place.
        forms: what makes forms of heads.
        own, other: tensors of both as they are stored.
        new: of those of the first, what is to be written.
        back: how heads go back.
        lefts: map -> what slices of the second came to be multiplied by, of the heads so far; once written.
        moved, chosen: as of `AttentionForm` and `HeadsBack`, likewise.
        size: what is divided out of what the second writes, over that of the first.
    """

    writer: _Writer
    branch: _Branch
    heads: Tensor
    forms: tuple[Callable[..., AttentionForm], Callable[..., AttentionForm]]
    own: dict[str, Tensor]
    new: dict[str, Tensor]
    other: dict[str, Tensor]
    back: Back
    lefts: dict[str, list[Tensor]] = field(default_factory=dict)
    moved: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    size: float = 1.0

    @classmethod
    def of(cls, writer: _Writer, branch: _Branch) -> "_Attention":
        a, b, number = writer.a, writer.b, branch.number
        layer, centred = a.layout.layers[number], a.steps.layers[number].attention_centred
        scale = a.writing_scale(layer, 0, branch.reading)
        back = Back(branch.reading, branch.wanted, scale, centred, a.form_using, a.weights)
        forms, own = (a.form_of_heads(number), b.form_of_heads(number)), a.stored_heads(number)
        new = _to_write(writer, own, attention_maps(layer.attention).values())
        return cls(writer, branch, writer.matching.heads[number], forms, own, new, b.stored_heads(number), back)

    def _pieces(self) -> Iterator[tuple[AttentionForm, AttentionForm, AttentionMatch, HeadsBack]]:
        """Forms of some heads in the first and in the second model, how they match, and what is between on its way."""
        writer, number = self.writer, self.branch.number
        matching = writer.matching
        for heads in writer.a.blocks(number):
            options = {"output_bias": not heads[0]}
            one = self.forms[0](self.own, heads=heads, **options)
            two = self.forms[1](self.other, heads=self.heads[heads], **options).in_frame(matching.residual)
            match = AttentionMatch(torch.arange(len(heads)))
            if matching.using != "none":
                match = turned_in_place(one, two, matching.latents[number], Scale.of(one, two))
            moved = two.moved_by(match)
            two.let_go()
            new = blend_attention(one, moved, writer.weight, self.back.using)
            one.let_go()
            del moved
            give_back()
            yield one, two, match, HeadsBack.of(self.own, one, new, self.back, writer.notes)
            del new
            give_back()

    def readers(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """What reads a norm, as of `Unfold.carries`."""
        for *_, heads in self._pieces():
            yield from heads.readers()

    def tensors(self, unfold: Unfold) -> dict[str, Tensor]:
        """As they are to be stored; after it the stored ones are forgotten."""
        writer, number = self.writer, self.branch.number
        layer, folds = writer.a.layout.layers[number], self.back.using != "permutation"
        attention, norms, bias = layer.attention, dict[str, list[Tensor]](), None
        tensors = self.new
        for one, two, match, heads in self._pieces():
            if heads.output_bias is not None:
                bias = heads.output_bias if bias is None else bias + heads.output_bias
            heads.put(tensors, unfold)
            for name, tensor in heads.norms.items():
                norms.setdefault(name, []).append(tensor)
            self.moved += [] if two.moved is None else [two.moved]
            self.chosen += [] if heads.chosen is None else [heads.chosen]
            self.size = two.size / one.size
            if writer.record is not None:
                for name in heads.heads.weights:
                    left = two.total_left(name, match, one)
                    left = left if len(left) > 1 else each_head(left, one.attention.num_kv_heads)
                    self.lefts.setdefault(name, []).append(left)
            del one, two, heads
        name = attention.output.bias_name
        if bias is not None and name is not None:
            tensors[name] = self.back.written_bias(bias, self.own[name], unfold) if folds else bias
        for name, found in norms.items():
            whole = len(found) > 1 and attention.qk_norm_over == "all"
            tensors[name] = torch.cat(found) if whole else found[0]
        self.own, self.new, self.other = {}, {}, {}
        return tensors

    def note(self, record: Record, unfold: Unfold) -> None:
        """Note what became of the second model's, once the tensors are made."""
        a, b, number, reading = self.writer.a, self.writer.b, self.branch.number, self.branch.other
        layer = a.layout.layers[number]
        attention, maps = layer.attention, attention_maps(layer.attention)
        latents = self.writer.matching.latents[number]
        norms = {source: norm for source, (norm, _) in latent_readers(attention).items()}
        by_latent = {name: source for source, (_, names) in latent_readers(attention).items() for name in names}
        group, kv = attention.group_size, kv_heads(self.heads, attention.num_kv_heads)
        for name, part in maps.items():
            left = torch.cat(self.lefts[name])
            left = left[:1] if (left == left[0]).all() else left
            order = None if name in _SHARED else self.heads if name in _BY_QUERY else kv
            record.slices(part, name, {"left": left, "order": order})
            entry = record.map_of(part)
            if name == "output":
                divided = b.writing_scale(layer, 0, reading) * self.size / self.back.scale
                record.writes(part, Writing(b.steps.layers[number].attention_centred, reading.frame, divided))
                # The first in the second model's own order of heads, the other as they stand in the end.
                for key, found, at in (("value_bias", self.moved, kv.argsort()), ("value_constant", self.chosen, None)):
                    if found:
                        constants = torch.cat(found) if at is None else torch.cat(found)[at]
                        by_query = constants.repeat_interleave(group, dim=0)
                        entry[key] = record.keep(f"{attention.value.path}.{key}", by_query)
                if self.chosen and not attention.output.bias:
                    entry["taken_off"] = True
            elif name in by_latent:
                source = by_latent[name]
                norm, turn = norms[source], latents.get(source)
                gains = [None if norm.weight is None else stored_gain(side.weights, norm) for side in (a, b)]
                width, folds = maps[source].width, a.using in ("gauge", "orthogonal")
                turn = torch.eye(width, dtype=torch.float64) if turn is None else turn
                latent: dict[str, Any] = {"turn": record.keep(f"{maps[source].path}.{source}.turn", turn)}
                if gains[1] is not None and folds:
                    latent["gain"] = record.keep(f"{maps[source].path}.{source}.gain", gains[1])
                entry["latent"] = latent
                own = Unfold.of(Reading(Fold(replace(norm, kind="rms"), "before"), gains[0]), [])
                if own.gain is not None and folds:
                    kept = record.keep(f"{maps[source].path}.{source}.unfolded", own.gain)
                    entry["unfolds"] = {"gain": kept, "scale": 1}
            else:
                _record_reading(record, part, reading, unfold)


# --- hidden features --------------------------------------------------------------------------------------------------


@dataclass
class _FeedForward:
    """A feed-forward layer or expert between two models whose features are matched, some features at a time.

    Attributes:
        writer, branch: what it is part of.
        mlp, theirs: the layer or expert of the first model, and that of the second.
        order: int64 [features], of the second at each place.
        own, other: tensors of both as they are stored.
        new: of those of the first, what is to be written.
        forms: what makes forms of them.
        scales: what is divided out of what each writes.
        factors: map -> [features], by which rows of the second came to be those that are stored; once written.
    """

    writer: _Writer
    branch: _Branch
    mlp: MLP
    theirs: MLP
    order: Tensor
    own: dict[str, Tensor]
    new: dict[str, Tensor]
    other: dict[str, Tensor]
    forms: tuple[Callable[..., MLPForm], Callable[..., MLPForm]]
    scales: tuple[float, float]
    factors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, writer: _Writer, branch: _Branch, mlp: MLP, theirs: MLP, order: Tensor) -> "_FeedForward":
        a, b, number = writer.a, writer.b, branch.number
        layer = a.layout.layers[number]
        one, two = (side.writing_scale(layer, 1, reading) for side, reading in ((a, branch.reading), (b, branch.other)))
        forms, own = (a.form_of(number, mlp), b.form_of(number, theirs)), a.stored_parts(mlp)
        new = _to_write(writer, own, maps_of(mlp).values())
        return cls(writer, branch, mlp, theirs, order, own, new, b.stored_parts(theirs), forms, (one, two))

    def _pieces(self) -> Iterator[tuple[slice, MLPForm, MLPForm, MLPForm, NeuronMatch]]:
        """Which features; their forms in the first and in the second model, between both, and the signs."""
        frame, weight = self.writer.matching.residual, self.writer.weight
        for part in chunks(self.mlp.up.width, _FORMS * self.writer.a.layout.dim):
            first = self.forms[0](self.own, features=torch.arange(part.start, part.stop))
            second = self.forms[1](self.other, features=self.order[part]).in_frame(frame)
            match = _align_mlp.settled(first, second, torch.arange(part.stop - part.start))
            yield part, first, second, blend_mlp(first, second.moved_by(match), weight), match
            del first, second
            give_back()

    def readers(self) -> Iterator[tuple[Tensor, Tensor, None]]:
        """What reads a norm, as of `Unfold.carries`."""
        for part, first, _, new, _ in self._pieces():
            yield from mlp_pieces(self.mlp, self.own, part, first, new)

    def tensors(self, unfold: Unfold) -> dict[str, Tensor]:
        """As they are to be stored; after it the stored ones are forgotten."""
        a, factors, sizes = self.writer.a, dict[str, list[Tensor]](), (1.0, 1.0)
        centred = a.steps.layers[self.branch.number].mlp_centred
        back = Back(self.branch.reading, unfold, self.scales[0], centred, a.form_using, a.weights)
        tensors = self.new
        for part, first, second, new, match in self._pieces():
            found = mlp_tensors(self.mlp, self.own, tensors, part, first, new, back)
            for name, factor in found.items():
                sign = 1.0 if name == "gate" else match.sign
                factors.setdefault(name, []).append(factor * sign * second.factors[name])
            sizes = first.size, second.size
        self.scales = self.scales[0] * sizes[0], self.scales[1] * sizes[1]
        self.factors = {name: torch.cat(found) for name, found in factors.items()}
        self.own, self.new, self.other = {}, {}, {}
        return tensors

    def note(self, record: Record, unfold: Unfold) -> None:
        """Note what became of the second model's, once the tensors are made."""
        centred, frame = self.writer.a.steps.layers[self.branch.number].mlp_centred, self.writer.matching.residual
        writing = Writing(centred, frame, self.scales[1] / self.scales[0])
        for name, part in parts_of(self.theirs).items():
            record.slices(part, name, {"scale": self.factors[name], "order": self.order})
            if name == "down":
                record.writes(part, writing)
            else:
                _record_reading(record, part, self.branch.other, unfold)
            if self.theirs is not self.mlp:
                moved = parts_of(self.mlp)[name].key
                if moved != part.key:
                    record.map_of(part)["moved_to"] = moved


def _record_reading(record: Record, part: Projection, reading: Reading, unfold: Unfold) -> None:
    record.reads(part, reading)
    norm = unfold.fold.norm
    if norm is None or unfold.fold.kind == "kept":
        return
    back: dict[str, Any] = {"scale": unfold.scale}
    for name, tensor in (("gain", unfold.gain), ("bias", unfold.bias)):
        if tensor is not None:
            back[name] = record.keep(f"{norm.path}.unfolded.{name}", tensor)
    record.map_of(part)["unfolds"] = back


def _in_frame(rows: Tensor, reading: Reading) -> Tensor:
    """Folded rows in the frame of a reading; constants that stand on their means stay there."""
    if not reading.fold.ones:
        return reading.frame.apply(rows)
    constant = rows.mean(dim=-1, keepdim=True)
    return reading.frame.apply(rows - constant) + constant
