"""What lies between two models whose parts are matched, written in the gauge of the first, a layer at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import _align_attention, _align_mlp
from ._align_blend import attention_tensors, blend_attention, blend_mlp, mlp_pieces, mlp_tensors
from ._align_experts import places
from ._align_heads import AttentionForm, AttentionMatch, kv_heads
from ._align_mlp import MLPForm, NeuronMatch, parts_of
from ._align_side import Progress, Side, pairs_of_rows, unembedding_rows
from ._align_weights import Matching
from ._canonical_heads import _BY_QUERY, _SHARED
from ._canonical_record import Record
from ._fold import Fold, Frame, Reading, Writing, attention_maps, latent_readers, stored_gain
from ._unfold import Unfold
from ._weights import chunks, give_back
from .layout import MLP, Layer, Norm, Projection

_MANY = 1 << 20  # numbers of a tensor that is large


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


def write(
    a: Side, b: Side, out: Any, weight: float, matching: Matching, record: Record | None, progress: Progress | None
) -> list[str]:
    """Write what lies between two models, in the first one's gauge: at weight 1 the second model itself.

    Args:
        a, b: the models.
        out: tensors are set in it by name, in float64.
        weight: of the second.
        matching: what belongs to what.
        record: is told what was done to the second; None: nobody is.
        progress: called with the number of layers done and of all.

    Returns:
        What could not be put back as the first model has it, in sentences.
    """
    layout, frame = a.layout, matching.residual
    written, notes = _Once(out), list[str]()
    if record is not None:
        for name, tensor in (("matrix", frame.matrix), ("order", frame.order), ("sign", frame.sign)):
            if tensor is not None:
                record.keep(f"residual.{name}", tensor)
    for name in a.tables:
        _write_table(a, b, name, frame, weight, written, record)
    give_back()
    for number in range(len(layout.layers)):
        _write_layer(a, b, number, weight, matching, written, record, notes)
        if progress is not None:
            progress(number + 1, len(layout.layers))
        give_back()
    _write_unembedding(a, b, frame, weight, written, record, notes)
    _write_kept(a, b, frame, weight, written)
    return list(dict.fromkeys(notes))


def _between(a: Tensor, b: Tensor, weight: float) -> Tensor:
    return b if weight == 1 else (1 - weight) * a + weight * b


def _write_table(
    a: Side, b: Side, name: str, frame: Frame, weight: float, written: _Once, record: Record | None
) -> None:
    new = torch.empty(a.stored.shape(name), dtype=_wide((a.stored.shape(name), a.stored.dtype(name))))
    for part, (one, two) in zip(chunks(*new.shape), pairs_of_rows(a, b, name)):
        new[part] = a.table_tensor(name, part, _between(one, frame.apply(two), weight)).to(new.dtype)
    written.put({name: new})
    if record is not None:
        token = name == a.layout.token_embedding
        writing = b.embeddings.token_writing if token else b.embeddings.writing
        writes = {"centred": writing.centred, "scale": b.table_scale / a.table_scale}
        record.maps[name] = {"weight": name, "bias": None, "transposed": True, "slices": [], "writes": writes}


def _wide(stored: Tensor | tuple[torch.Size, torch.dtype]) -> torch.dtype:
    """Of what is written: float64; of large tensors float32, where no more is stored."""
    shape, dtype = (stored.shape, stored.dtype) if isinstance(stored, Tensor) else stored
    return torch.float64 if shape.numel() < _MANY else torch.promote_types(dtype, torch.float32)


def _write_layer(
    a: Side,
    b: Side,
    number: int,
    weight: float,
    matching: Matching,
    written: _Once,
    record: Record | None,
    notes: list[str],
) -> None:
    step, frame = a.steps.layers[number], matching.residual
    readings, others = a.readings(number), b.readings(number)
    unfolds = []
    for reading, other in zip(readings, others):
        unfold = Unfold.of(reading, notes)
        if reading.fold.kind == "after" and reading.gain is not None and other.gain is not None:
            gain = _between(reading.gain / reading.scale, other.gain / other.scale, weight)
            unfold.unseen = replace(reading, gain=gain).unseen()
            written.put(unfold.tensors(gain))
        elif unfold.fold.ones and step.attention == step.mlp:
            unfold = unfold.plain  # read by both branches, of which each alone might want it so
        unfolds.append(unfold)
    biases = None if matching.using in ("none", "permutation") else a.layout.layers[number].joined_biases
    written.hold = biases or ()
    put = (number, weight, matching, written, record, notes)
    _write_attention(a, b, *put, readings[0], replace(others[0], frame=frame), unfolds[0])
    give_back()
    _write_mlp(a, b, *put, readings[1], replace(others[1], frame=frame), unfolds[1])
    if biases is not None:  # only their sum counts: the second is that of a
        output, down = biases
        own, held = a.weights[down].double(), written.held
        written.hold = ()
        written.put({output: held[output] + held[down] - own, down: own})


def _write_attention(
    a: Side,
    b: Side,
    number: int,
    weight: float,
    matching: Matching,
    written: _Once,
    record: Record | None,
    notes: list[str],
    reading: Reading,
    other: Reading,
    wanted: Unfold,
) -> None:
    layer, step, using = a.layout.layers[number], a.steps.layers[number], a.form_using
    scale = a.writing_scale(layer, 0, reading)
    one, two = a.attention_form(number), b.attention_form(number).in_frame(matching.residual)
    if matching.using == "none":
        found = AttentionMatch(matching.heads[number])
    else:
        found = _align_attention.turned(one, two, matching.heads[number], matching.latents[number])
    moved = two.moved_by(found)
    two.let_go()
    new = blend_attention(one, moved, weight, using)
    one.let_go()
    del moved
    tensors, chosen, unfold = attention_tensors(
        layer, a.weights, one, new, reading, wanted, scale, step.attention_centred, using, notes
    )
    new.let_go()
    written.put(tensors)
    _put_norm(unfold, wanted, written, notes)
    if record is not None:
        _record_attention(record, layer, (a, b), (one, two), found, other, unfold, (scale, chosen), number)


def _write_mlp(
    a: Side,
    b: Side,
    number: int,
    weight: float,
    matching: Matching,
    written: _Once,
    record: Record | None,
    notes: list[str],
    reading: Reading,
    other: Reading,
    wanted: Unfold,
) -> None:
    layer, order, frame = a.layout.layers[number], matching.neurons[number], matching.residual
    if layer.mlp is None or order is None:
        _write_mixture(a, b, number, weight, matching, written, record, notes, reading, other, wanted)
        return
    between = _FeedForward.of(a, b, number, layer.mlp, layer.mlp, order, frame, weight)
    unfold = _carried(wanted, between.readers(), a.form_using)
    tensors = between.tensors(unfold)
    written.put(tensors)
    del tensors
    _put_norm(unfold, wanted, written, notes)
    if record is not None:
        between.note(record, other, unfold)


def _carried(unfold: Unfold, pieces: Iterable[tuple[Tensor, Tensor, Tensor | None]], using: str) -> Unfold:
    """How a norm that is read is put back: with ones, where its bias would carry constants badly."""
    if not unfold.fold.ones or using == "permutation":
        return unfold
    return unfold if unfold.carries(pieces) else unfold.plain


@dataclass
class _FeedForward:
    """A feed-forward layer or expert between two models whose features are matched, some features at a time.

    Attributes:
        a, b, number: the models, and the layer.
        mlp, theirs: the layer or expert of the first model, and that of the second.
        order: int64 [features], of the second at each place.
        frame: of the second residual stream.
        weight: of the second.
        own, other: tensors of both as they are stored.
        forms: what makes forms of them.
        scales: what is divided out of what each writes.
        factors: map -> [features], by which rows of the second came to be those that are stored; once written.
    """

    a: Side
    b: Side
    number: int
    mlp: MLP
    theirs: MLP
    order: Tensor
    frame: Frame
    weight: float
    own: dict[str, Tensor]
    other: dict[str, Tensor]
    forms: tuple[Callable[..., MLPForm], Callable[..., MLPForm]]
    scales: tuple[float, float] = (1.0, 1.0)
    factors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, a: Side, b: Side, number: int, mlp: MLP, theirs: MLP, order: Tensor, frame: Frame, weight: float
    ) -> "_FeedForward":
        layer = a.layout.layers[number]
        scales = tuple(side.writing_scale(layer, 1, side.readings(number)[1]) for side in (a, b))
        forms = a.form_of(number, mlp), b.form_of(number, theirs)
        own, other = a.stored_parts(mlp), b.stored_parts(theirs)
        return cls(a, b, number, mlp, theirs, order, frame, weight, own, other, forms, (scales[0], scales[1]))

    def _pieces(self) -> Iterator[tuple[slice, MLPForm, MLPForm, MLPForm, NeuronMatch]]:
        """Which features; their forms in the first and in the second model, between both, and the signs."""
        dim = self.a.layout.dim
        for part in chunks(self.mlp.up.width, dim):
            first = self.forms[0](self.own, features=torch.arange(part.start, part.stop))
            second = self.forms[1](self.other, features=self.order[part]).in_frame(self.frame)
            match = _align_mlp.settled(first, second, torch.arange(part.stop - part.start))
            yield part, first, second, blend_mlp(first, second.moved_by(match), self.weight), match

    def readers(self) -> Iterator[tuple[Tensor, Tensor, None]]:
        """What reads a norm, as of `Unfold.carries`."""
        for part, first, _, new, _ in self._pieces():
            yield from mlp_pieces(self.mlp, self.own, part, first, new)

    def tensors(self, unfold: Unfold) -> dict[str, Tensor]:
        """As they are to be stored; after it the stored ones are forgotten."""
        step, using, factors = self.a.steps.layers[self.number], self.a.form_using, dict[str, list[Tensor]]()
        sizes = 1.0, 1.0
        tensors = {name: own.to(_wide(own), copy=True) for name, own in self.own.items()}
        for part, first, second, new, match in self._pieces():
            back = mlp_tensors(
                self.mlp, self.own, tensors, part, first, new, unfold, self.scales[0], step.mlp_centred, using
            )
            for name, factor in back.items():
                sign = 1.0 if name == "gate" else match.sign
                factors.setdefault(name, []).append(factor * sign * second.factors[name])
            sizes = first.size, second.size
        self.scales = self.scales[0] * sizes[0], self.scales[1] * sizes[1]
        self.factors = {name: torch.cat(found) for name, found in factors.items()}
        self.own, self.other = {}, {}
        return tensors

    def note(self, record: Record, reading: Reading, unfold: Unfold) -> None:
        """Note what became of the second model's, once the tensors are made."""
        writing = Writing(self.a.steps.layers[self.number].mlp_centred, self.frame, self.scales[1] / self.scales[0])
        for name, part in parts_of(self.theirs).items():
            record.slices(part, name, {"scale": self.factors[name], "order": self.order})
            if name == "down":
                record.writes(part, writing)
            else:
                _record_reading(record, part, reading, unfold)
            if self.theirs is not self.mlp:
                moved = parts_of(self.mlp)[name].key
                if moved != part.key:
                    record.map_of(part)["moved_to"] = moved


# --- mixtures of experts ----------------------------------------------------------------------------------------------


def _write_mixture(
    a: Side,
    b: Side,
    number: int,
    weight: float,
    matching: Matching,
    written: _Once,
    record: Record | None,
    notes: list[str],
    reading: Reading,
    other: Reading,
    wanted: Unfold,
) -> None:
    """An expert at a time."""
    using, experts = a.form_using, a.layout.layers[number].experts
    one, two, match = a.experts_form(number), b.experts_form(number), matching.experts[number]
    assert one is not None and two is not None and match is not None and experts is not None
    two = two.in_frame(matching.residual)

    def between(place: int | None) -> _FeedForward:
        mlp = theirs = experts.shared
        if place is not None:
            mlp, theirs = experts.experts[place], experts.experts[int(match.order[place])]
        assert mlp is not None and theirs is not None
        return _FeedForward.of(a, b, number, mlp, theirs, match.neurons_of(place), matching.residual, weight)

    router = experts.router
    scores = _between(one.scores, two.scores[match.order], weight) + one.unseen
    own = router.heads(a.weights[router.weight])[0]

    def readers() -> Iterator[tuple[Tensor, Tensor, None]]:
        yield scores[:, : a.layout.dim], own, None
        for place in places(experts):
            yield from between(place).readers()

    unfold = _carried(wanted, readers(), using)
    _write_router(a, router, scores, own, unfold, using, written)
    stacks: dict[str, Tensor] = {}
    for place in places(experts):
        found = between(place)
        tensors = found.tensors(unfold)
        for part in parts_of(found.mlp).values():
            if part.stack is not None and part.weight in tensors:
                if part.weight not in stacks:
                    stacks[part.weight] = torch.empty(a.stored.shape(part.weight), dtype=tensors[part.weight].dtype)
                stacks[part.weight][part.stack] = tensors.pop(part.weight)
        written.put(tensors)
        del tensors
        if record is not None:
            found.note(record, other, unfold)
        give_back()
    written.put(stacks)
    _put_norm(unfold, wanted, written, notes)
    if record is not None:
        record.slices(router, "router", {"scale": torch.ones(len(scores)).double(), "order": match.order})
        _record_reading(record, router, other, unfold)
        if experts.softmax and using != "permutation":
            record.map_of(router)["shifts"] = True


def _write_router(
    a: Side, router: Projection, scores: Tensor, own: Tensor, unfold: Unfold, using: str, written: _Once
) -> None:
    """The rows of a router as they are stored, from those in form [experts, columns]."""
    rows, bias = (scores, None) if router.bias_name is None else (scores[:, :-1], scores[:, -1])
    if using != "permutation":
        rows = unfold.rows(rows, own)
        constant = unfold.constant(rows)
        bias = bias if bias is None or constant is None else bias - constant
    new = a.weights[router.weight].clone()
    router.put_heads(new, rows[None])
    tensors = {router.weight: new}
    if bias is not None and router.bias_name is not None:
        tensors[router.bias_name] = a.weights[router.bias_name].clone()
        router.put_head_biases(tensors[router.bias_name], bias[None])
    written.put(tensors)


def _put_norm(unfold: Unfold, wanted: Unfold, written: _Once, notes: list[str]) -> None:
    """Write a norm at the head of a branch."""
    norm = unfold.fold.norm
    if norm is None or unfold.fold.kind != "before":
        return
    if unfold is not wanted:
        notes.append(f"{norm.path} has biases that would carry constants badly: its gains and biases are 1.")
    written.put(unfold.tensors(None))


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


def _record_attention(
    record: Record,
    layer: Layer,
    sides: tuple[Side, Side],
    both: tuple[AttentionForm, AttentionForm],
    found: AttentionMatch,
    reading: Reading,
    unfold: Unfold,
    written: tuple[float, Tensor | None],
    number: int,
) -> None:
    attention, (one, two), (scale, chosen) = layer.attention, both, written
    by_latent = {name: source for source, (_, names) in latent_readers(attention).items() for name in names}
    norms = {source: norm for source, (norm, _) in latent_readers(attention).items()}
    maps, group = attention_maps(attention), attention.group_size
    kv = kv_heads(found.heads, attention.num_kv_heads)
    for name, part in maps.items():
        order = None if name in _SHARED else found.heads if name in _BY_QUERY else kv
        record.slices(part, name, {"left": two.total_left(name, found, one), "order": order})
        entry = record.map_of(part)
        if name == "output":
            divided = sides[1].writing_scale(layer, 0, reading) * two.size / (scale * one.size)
            centred = sides[1].steps.layers[number].attention_centred
            record.writes(part, Writing(centred, reading.frame, divided))
            if two.moved is not None:
                by_query = two.moved.repeat_interleave(group, dim=0)
                entry["value_bias"] = record.keep(f"{attention.value.path}.value_bias", by_query)
            if chosen is not None:
                by_query = chosen.repeat_interleave(group, dim=0)
                entry["value_constant"] = record.keep(f"{attention.value.path}.value_constant", by_query)
                if not attention.output.bias:
                    entry["taken_off"] = True
        elif name in by_latent:
            source = by_latent[name]
            gains = [None if norm.weight is None else stored_gain(side.weights, norm) for side, norm in
                     zip(sides, (norms[source],) * 2)]  # fmt: skip
            turn = found.latents.get(source)
            width = attention_maps(attention)[source].width
            latent: dict[str, Any] = {
                "turn": record.keep(
                    f"{maps[source].path}.{source}.turn",
                    torch.eye(width, dtype=torch.float64) if turn is None else turn,
                )
            }
            folds = sides[0].using in ("gauge", "orthogonal")
            if gains[1] is not None and folds:
                latent["gain"] = record.keep(f"{maps[source].path}.{source}.gain", gains[1])
            entry["latent"] = latent
            own = Unfold.of(Reading(Fold(replace(norms[source], kind="rms"), "before"), gains[0]), [])
            if own.gain is not None and folds:
                entry["unfolds"] = {"gain": record.keep(f"{maps[source].path}.{source}.unfolded", own.gain), "scale": 1}
        else:
            _record_reading(record, part, reading, unfold)


def _in_frame(rows: Tensor, frame: Frame, reading: Reading) -> Tensor:
    """Folded rows in a frame; constants that stand on their means stay there."""
    if not reading.fold.ones:
        return frame.apply(rows)
    constant = rows.mean(dim=-1, keepdim=True)
    return frame.apply(rows - constant) + constant


def _write_unembedding(
    a: Side, b: Side, frame: Frame, weight: float, written: _Once, record: Record | None, notes: list[str]
) -> None:
    part = a.layout.unembedding
    if part is None:
        return
    readings = a.final_reading(), replace(b.final_reading(), frame=frame)
    wanted = unfold = Unfold.of(readings[0], notes)

    def pieces() -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        for piece in chunks(a.layout.vocab_size, a.layout.dim):
            (raw, one), (other, two) = unembedding_rows((a, b), part, piece)
            yield piece, _between(one, _in_frame(two, frame, readings[1]), weight), raw, other

    if not unfold.carries((rows, raw, None) for _, rows, raw, _ in pieces()):
        unfold = unfold.plain
    stored = a.stored[part.weight]
    new = stored.to(_wide(stored), copy=True)
    del stored
    rows, constants = part.heads(new)[0], []
    for piece, folded, raw, other in pieces():
        stored = unfold.rows(folded, raw)
        rows[piece] = stored.to(new.dtype)
        found = [reading.constant(values) for reading, values in zip(readings, (raw, other))]
        taken = unfold.constant(stored)
        if found[0] is not None and found[1] is not None and taken is not None:
            constants.append(_between(found[0], found[1], weight) - taken)
    tensors = {part.weight: new}
    if part.bias_name is not None:
        bias = _between(a.weights[part.bias_name], b.weights[part.bias_name], weight)
        tensors[part.bias_name] = bias + torch.cat(constants) if constants else bias
    written.put(tensors)
    _put_norm(unfold, wanted, written, notes)
    if record is not None:
        _record_reading(record, part, readings[1], unfold)
        record.map_of(part)


def _write_kept(a: Side, b: Side, frame: Frame, weight: float, written: _Once) -> None:
    """Norms that are not folded, and whatever else the layout names, between the two."""
    layout = a.layout
    norms: dict[str, tuple[Norm, float]] = {}
    for layer in layout.layers:
        for norm in (layer.attention_out_norm, layer.mlp_out_norm):
            if norm is not None:
                norms[norm.path] = norm, a.scale / b.scale
        for norm in (layer.attention_norm, layer.mlp_norm, layer.attention_sum_norm, layer.mlp_sum_norm):
            if norm is not None:
                norms.setdefault(norm.path, (norm, 1.0))
    for norm, factor in ((layout.embedding_norm, 1.0), (layout.final_norm, b.scale / a.scale if layout.tied else 1.0)):
        if norm is not None:
            norms.setdefault(norm.path, (norm, factor))
    for norm, factor in norms.values():
        if norm.weight is not None:
            one, two = (side.weights[norm.weight] + norm.offset for side in (a, b))
            gain = _between(one, frame.permute(two) * factor, weight)
            written.put({norm.weight: gain - norm.offset})
        if norm.bias_name is not None:
            one, two = (side.weights[norm.bias_name] for side in (a, b))
            written.put({norm.bias_name: _between(one, frame.apply(two) * factor, weight)})
    for name in layout.tensor_shapes():
        if name not in written.names:
            written.put({name: _between(a.weights[name], b.weights[name], weight)})
