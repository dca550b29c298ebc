"""The attention of a layer in a form that only rotations and orders are left of: matched, turned, averaged, put back.

Rows are folded (`_fold`) and, in the full gauge, balanced (`forms`): what is then free for queries and keys, and for
values and output, is orthogonal (`Turns`), and a head of one model is turned towards a head of another by Procrustes.
The average of two models is taken of what no turn changes: of the products, by the best product of the same width.

Shapes: H query heads, G key/value heads, R = H / G, K width of a query, V width of a value. Rows are [slices, width,
columns], with the bias, if there is one, as the last column.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import forms
from ._align_turns import Turns
from ._fold import (
    Frame,
    Heads,
    Reading,
    Writing,
    attention_maps,
    latent_readers,
    stored_gain,
    stream_readers,
    unseen_part,
)
from ._weights import ReadWeights, give_back
from .layout import HeadLayout, Layer, Projection

_BY_QUERY = ("query", "output", "rotary_query")
_PLANES = 8  # rotary planes that are balanced at a time
_AT_A_TIME = 1 << 20  # numbers of heads in float64 that are compared at a time: 8 MB, but one group at least


def stacked(rows: Tensor, groups: int) -> Tensor:
    """[H, width, columns] -> [G, width, R · columns]."""
    return rows.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)


def unstacked(rows: Tensor, groups: int, heads: int) -> Tensor:
    """The inverse of `stacked`."""
    return rows.unflatten(2, (heads // groups, -1)).transpose(1, 2).flatten(0, 1)


def each_head(factor: Tensor, slices: int) -> Tensor:
    """[n, ...] for n of the slices' groups -> one a slice."""
    return factor.repeat_interleave(slices // factor.shape[0], dim=0)


def kv_heads(heads: Tensor, groups: int) -> Tensor:
    """The key/value heads that go with query heads."""
    size = len(heads) // groups
    return heads.view(groups, size)[:, 0] // size


def some_heads(attention: HeadLayout, heads: Tensor) -> HeadLayout:
    """The layout of some query heads and their key/value heads, in an order that keeps groups together."""
    groups, latent = len(heads) // attention.group_size, attention.latent
    kv = kv_heads(heads, groups)

    def some(part: Projection, order: Tensor) -> Projection:
        return replace(part, starts=tuple(part.starts[head] for head in order.tolist()))

    return replace(
        attention,
        num_heads=len(heads),
        num_kv_heads=groups,
        query=some(attention.query, heads),
        key=some(attention.key, kv),
        value=some(attention.value, kv),
        output=some(attention.output, heads),
        latent=None if latent is None else replace(latent, rotary_query=some(latent.rotary_query, heads)),
    )


@dataclass
class AttentionForm:
    """The attention of one layer of one model, or some of its heads.

    Attributes:
        attention: its layout.
        dim: width of the residual stream.
        heads: rows by map (see `attention_maps`), in form; float64, or float32 while they wait to be compared.
        biased: maps whose last column is a bias.
        output_bias: [dim], folded, or None.
        left: map -> [n, width, width] that its folded rows were multiplied by, n = 1, G or H.
        back: map -> [n, width, width]: from the form to this model's own gauge.
        query_key, value_output: what is free to turn.
        gains: of norms of queries and keys, without signs and exchanged evenly, [1 or heads, K]; None: there are none.
        gain_left: what they were multiplied by.
        moved: constants that went from the values to the output bias, [G, V]; None: none.
        size: what the output was divided by.
        ones: the rows of maps that read the stream have constants on their means (see `Fold`).
        numbers: of its key/value heads among those of the layer.
        low_rank: sentences about heads of low rank.
    """

    attention: HeadLayout
    dim: int
    heads: dict[str, Tensor]
    biased: frozenset[str]
    output_bias: Tensor | None
    query_key: Turns
    value_output: Turns
    left: dict[str, Tensor] = field(default_factory=dict)
    back: dict[str, Tensor] = field(default_factory=dict)
    gains: tuple[Tensor, Tensor] | None = None
    gain_left: tuple[Tensor, Tensor] | None = None
    moved: Tensor | None = None
    size: float = 1.0
    ones: bool = False
    numbers: tuple[int, ...] = ()
    low_rank: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        layer: Layer,
        weights: ReadWeights | Mapping[str, Tensor],
        norms: ReadWeights,
        reading: Reading,
        writing: Writing,
        using: str,
        dtype: torch.dtype,
        *,
        heads: Tensor | None = None,
        output_bias: bool = True,
    ) -> "AttentionForm":
        """The form of stored weights.

        Args:
            layer: of the model.
            weights: its tensors as they are stored.
            norms: the same of the norms of queries, keys and latents.
            reading, writing: how what is read and written is folded.
            using: "gauge", "orthogonal" or "permutation".
            dtype: the coarsest in which the weights are stored.
            heads: int64, query heads that are wanted, groups kept together; None: all. A layer whose groups share
                something that is changed has to be treated as a whole (see `_canonical_heads`).
            output_bias: False: only what heads add to it is taken. Of the parts of a layer, one has it.
        """
        order = torch.arange(layer.attention.num_heads) if heads is None else heads
        attention = some_heads(layer.attention, order)
        read = Heads.read(weights, attention)
        moved = None
        if using != "permutation":
            read.fold(attention, reading, writing)
        if not output_bias and "output" in read.biases:
            read.biases["output"] = torch.zeros_like(read.biases["output"])
        if using != "permutation":
            read.fold_latents(attention, norms)
            ones = reading.fold.ones and attention.latent is None
            moved = read.fold_constants(attention, ones)
            if moved is None and "output" not in read.biases:
                _take_off_unseen(read, ones, writing.centred)
        bias = read.biases.pop("output", None)
        rows = {
            name: torch.cat([values, read.biases[name][..., None]], dim=-1) if name in read.biases else values
            for name, values in read.weights.items()
        }
        read.weights.clear()
        width, rotary = attention.head_dim, attention.rotary
        gained = isinstance(attention.qk_norm, tuple) and all(norm.gain for norm in attention.qk_norm)
        if using == "permutation":
            turns = Turns.fixed(width), Turns.fixed(attention.value_width)
        else:
            query_key = Turns.signs(width, rotary) if gained else Turns.beside_positions(width, rotary)
            turns = query_key, Turns.all(attention.value_width)
        dim = rows["output"].shape[-1]
        form = cls(attention, dim, rows, frozenset(read.biases), bias, *turns, moved=moved)
        form.numbers = tuple(kv_heads(order, attention.num_kv_heads).tolist())
        form.ones = reading.fold.ones and using != "permutation"
        if gained:
            form._take_gains(norms, using, order)
        if using == "gauge":
            form._scale_normed(layer)
            form._balance(dtype)
        for name in rows:
            eye = torch.eye(rows[name].shape[1], dtype=torch.float64)[None]
            form.left.setdefault(name, eye)
            form.back.setdefault(name, eye)
        return form

    @classmethod
    def joined(cls, parts: Iterable["AttentionForm"], attention: HeadLayout, dtype: torch.dtype) -> "AttentionForm":
        """The heads of a whole layer to be compared, from parts that are made one at a time and forgotten.

        Args:
            parts: the heads of a layer, in order.
            attention: its layout.
            dtype: in which they wait.
        """
        maps = attention_maps(attention)
        whole, heads, done, said = None, dict[str, Tensor](), dict.fromkeys(maps, 0), list[str]()
        for part in parts:
            for name, rows in part.heads.items():
                if whole is None:
                    heads[name] = torch.empty(len(maps[name].starts), *rows.shape[1:], dtype=dtype)
                heads[name][done[name] : done[name] + len(rows)] = rows
                done[name] += len(rows)
            said += part.low_rank
            part.let_go()
            whole = part
            give_back()
        assert whole is not None
        return replace(whole, attention=attention, heads=heads, low_rank=said)

    # --- making it ----------------------------------------------------------------------------------------------------

    def _multiply(self, name: str, left: Tensor, back: Tensor) -> None:
        """Multiply the rows of a map, [n, width, width]."""
        rows = self.heads[name]
        self.heads[name] = each_head(left, len(rows)) @ rows
        self._note(name, left, back)

    def _note(self, name: str, left: Tensor, back: Tensor) -> None:
        if name in self.left:
            number = max(len(left), len(self.left[name]))
            left = each_head(left, number) @ each_head(self.left[name], number)
            back = each_head(self.back[name], number) @ each_head(back, number)
        self.left[name], self.back[name] = left, back

    def _take_gains(self, weights: ReadWeights, using: str, order: Tensor) -> None:
        """Gains of queries' and keys' norms: their signs to the rows, and exchanged evenly."""
        attention = self.attention
        assert isinstance(attention.qk_norm, tuple)
        stored = [stored_gain(weights, norm) for norm in attention.qk_norm]
        gains = [gain.view(-1, attention.head_dim) for gain in stored if gain is not None]
        if attention.qk_norm_over == "all":
            gains = [gains[0][order], gains[1][list(self.numbers)]]
        if using == "permutation":
            self.gains = gains[0], gains[1]
            self.gain_left = torch.ones_like(gains[0]), torch.ones_like(gains[1])
            return
        lefts = [torch.where(gain < 0, -1.0, 1.0).double() for gain in gains]
        for name, sign in zip(("query", "key"), lefts):
            self._multiply(name, sign.diag_embed(), sign.diag_embed())
        gains = [gain.abs() for gain in gains]
        if using == "gauge":
            label = self.query_key.flips
            assert label is not None
            same = (label[:, None] == label[None]).double()
            squares = gains[0].square()
            if attention.qk_norm_over == "all":
                squares = squares.unflatten(0, (-1, attention.group_size)).sum(dim=1)
            sizes = (squares @ same).sqrt(), (gains[1].square() @ same).sqrt()
            alive = (sizes[0] > 0) & (sizes[1] > 0)
            factor = torch.where(alive, sizes[1] / sizes[0].where(alive, torch.ones_like(sizes[0])), 1.0).sqrt()
            factors = each_head(factor, len(gains[0])), 1 / factor
            gains = [gain * factor for gain, factor in zip(gains, factors)]
            lefts = [left * factor for left, factor in zip(lefts, factors)]
        self.gains, self.gain_left = (gains[0], gains[1]), (lefts[0], lefts[1])

    def _scale_normed(self, layer: Layer) -> None:
        """Scales that norms without eps take out: of queries and keys, of latents, of the output."""
        attention, norms = self.attention, self.attention.qk_norm
        free = {"query": bool(norms), "key": bool(norms)}
        if isinstance(norms, tuple):
            free = {"query": norms[0].eps == 0, "key": norms[1].eps == 0}
        for name in (name for name, is_free in free.items() if is_free):
            rows = self.heads[name]
            over = (1, 2) if attention.qk_norm_over == "head" else (0, 1, 2)
            self._scale(name, rows.square().mean(dim=over, keepdim=True).sqrt())
        for name, (norm, _) in latent_readers(attention).items():
            if norm.eps == 0:
                self._scale(name, self.heads[name].square().mean().sqrt().view(1, 1, 1))
        out = layer.attention_out_norm
        if out is not None and out.eps == 0:
            self.size = self._product_size() or 1.0
            self.heads["output"] = self.heads["output"] / self.size
            if self.output_bias is not None:
                self.output_bias = self.output_bias / self.size

    def _scale(self, name: str, size: Tensor) -> None:
        size = torch.where(size > 0, size, 1.0)
        eye = torch.eye(self.heads[name].shape[1], dtype=torch.float64)
        self._multiply(name, eye / size, eye * size)

    def _product_size(self) -> float:
        value, output = self.heads["value"], self.heads["output"]
        return forms.product_norms(each_head(value, len(output)), output).norm().item()

    def _balance(self, dtype: torch.dtype) -> None:
        """Bring factors into balance."""
        attention, heads, latent = self.attention, self.heads, self.attention.latent
        groups, number = attention.num_kv_heads, attention.num_heads
        if attention.qk_norm is False:
            self._balance_scores(dtype)
            give_back()
        if latent is not None:
            query, key, planes = heads["rotary_query"], heads["rotary_key"], latent.rotary.planes()
            form = forms.rotary_pair(stacked(query, 1), key, planes)
            heads["rotary_query"], heads["rotary_key"] = unstacked(form.first, 1, number), form.second
            self._note_pair("rotary_query", "rotary_key", form.left, form.right, form.left.abs().sum(dim=-1) > 0)
        form = forms.balanced(heads.pop("value"), stacked(heads.pop("output"), groups), dtype=dtype)
        heads["value"], heads["output"] = form.first, unstacked(form.second, groups, number)
        self._say(form, "values and output", attention.value_width)
        alive = (form.rank == attention.value_width)[:, None].expand(groups, attention.value_width)
        self._note_pair("value", "output", form.left, form.right, alive)

    def _balance_scores(self, dtype: torch.dtype) -> None:
        attention, heads = self.attention, self.heads
        groups, number, turned = attention.num_kv_heads, attention.num_heads, attention.rotary_dim
        query, key = stacked(heads.pop("query"), groups), heads.pop("key")
        whole = torch.eye(attention.head_dim, dtype=torch.float64).repeat(groups, 1, 1)
        left, right, new_query, new_key = whole.clone(), whole.clone(), torch.empty_like(query), torch.empty_like(key)
        alive = torch.ones(groups, attention.head_dim, dtype=torch.bool)
        if turned:
            assert attention.rotary is not None
            for planes in attention.rotary.planes().split(_PLANES):
                at, own = planes.flatten(), torch.arange(planes.numel()).view(-1, 2)
                form = forms.rotary_pair(query[:, at], key[:, at], own)
                new_query[:, at], new_key[:, at] = form.first, form.second
                left[:, at[:, None], at], right[:, at[:, None], at] = form.left, form.right
                alive[:, at] = form.left.abs().sum(dim=-1) > 0
        if turned < attention.head_dim:
            repeats = attention.group_size
            form = forms.balanced(query[:, turned:], key[:, turned:], dtype=dtype, repeats=repeats)
            new_query[:, turned:], new_key[:, turned:] = form.first, form.second
            left[:, turned:, turned:], right[:, turned:, turned:] = form.left, form.right
            self._say(form, "queries and keys", attention.head_dim - turned)
            alive[:, turned:] = (form.rank == attention.head_dim - turned)[:, None]
        del query, key
        heads["query"], heads["key"] = unstacked(new_query, groups, number), new_key
        self._note_pair("query", "key", left, right, alive)

    def _note_pair(self, first: str, second: str, left: Tensor, right: Tensor, alive: Tensor) -> None:
        """Note factors of which one is the other's inverse transpose, on the coordinates [n, width] that are alive."""
        eye = torch.eye(left.shape[-1], dtype=torch.float64)
        back_first = torch.where(alive[:, None, :], right.mT, eye)
        back_second = torch.where(alive[:, None, :], left.mT, eye)
        self._note(first, left, back_first)
        self._note(second, right, back_second)

    def _say(self, form: forms.PairForm, what: str, width: int) -> None:
        for head, rank in zip(self.numbers, form.rank.tolist()):
            if rank < width:
                self.low_rank.append(f"the {what} of key/value head {head} have rank {rank} of {width}")

    # --- moving it ----------------------------------------------------------------------------------------------------

    def blocks(self) -> tuple[Tensor, ...]:
        """Its query heads, int64, some groups at a time; all of them where they share latents."""
        attention = self.attention
        heads = torch.arange(attention.num_heads)
        if attention.latent is not None:
            return (heads,)
        size = sum(rows[0].numel() * (attention.group_size if name in _BY_QUERY else 1)
                   for name, rows in self.heads.items())  # fmt: skip
        return heads.split(attention.group_size * max(_AT_A_TIME // size, 1))

    def some(self, heads: Tensor) -> "AttentionForm":
        """Some query heads and their key/value heads in float64, groups kept together; only to be compared."""
        attention = some_heads(self.attention, heads)
        kv = kv_heads(heads, attention.num_kv_heads)
        orders = dict.fromkeys(_BY_QUERY, heads) | dict.fromkeys(("key", "value"), kv)
        rows = {name: (values[orders[name]] if name in orders else values).double()
                for name, values in self.heads.items()}  # fmt: skip
        return replace(self, attention=attention, heads=rows)

    def square(self, name: str) -> float:
        """Sum of squares of the rows of a map, in float64."""
        return sum(rows.double().square().sum().item() for rows in self.heads[name])

    @property
    def stream(self) -> tuple[str, ...]:
        """The maps whose first ``dim`` columns are of the residual stream."""
        return (*stream_readers(self.attention), "output")

    def stream_rows(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The columns of a map that a frame of the residual stream turns, and what stands on their mean besides."""
        rows = self.heads[name][..., : self.dim]
        if not self.ones or name == "output":
            return rows, None
        constant = rows.mean(dim=-1, keepdim=True)
        return rows - constant, constant

    def in_frame(self, frame: Frame) -> "AttentionForm":
        """The same in another frame of the residual stream."""
        if frame.same:
            return self
        heads = dict(self.heads)
        for name in self.stream:
            rows, constant = self.stream_rows(name)
            framed = frame.apply(rows) if constant is None else frame.apply(rows) + constant
            heads[name] = torch.cat([framed, heads[name][..., self.dim :]], dim=-1)
        bias = None if self.output_bias is None else frame.apply(self.output_bias)
        return replace(self, heads=heads, output_bias=bias)

    def with_latents(self, turns: dict[str, Tensor]) -> "AttentionForm":
        """The same with latents turned, [width, width] each."""
        if not turns:
            return self
        heads, readers = dict(self.heads), latent_readers(self.attention)
        for name, turn in turns.items():
            heads[name] = turn @ heads[name]
            width = turn.shape[0]
            for reader in readers[name][1]:
                rows = heads[reader]
                heads[reader] = torch.cat([rows[..., :width] @ turn.mT, rows[..., width:]], dim=-1)
        return replace(self, heads=heads)

    def moved_by(self, match: "AttentionMatch") -> "AttentionForm":
        """Its heads in the order and the turns of a match (latents turned too)."""
        form = self.with_latents(match.latents)
        kv = kv_heads(match.heads, self.attention.num_kv_heads)
        heads = {}
        for name, rows in form.heads.items():
            order = match.heads if name in _BY_QUERY else kv if name in ("key", "value") else torch.arange(len(rows))
            turn = None if name in match.latents else match.turn_of(name)  # latents are turned already
            heads[name] = rows[order] if turn is None else each_head(turn, len(order)) @ rows[order]
        gains = form.gains
        if gains is not None and self.attention.qk_norm_over == "all":
            gains = gains[0][match.heads], gains[1][kv]
        return replace(form, heads=heads, gains=gains)

    def let_go(self) -> None:
        """Forget the weights; what they were multiplied by stays."""
        self.heads = {}

    def total_left(self, name: str, match: "AttentionMatch", goal: "AttentionForm") -> Tensor:
        """[n, width, width]: what the folded slices of a map, in their new order, come to be multiplied by."""
        left, back, turn = self.left[name], goal.back[name], match.turn_of(name)
        slices = len(attention_maps(self.attention)[name].starts)
        if len(left) > 1:
            order = match.heads if name in _BY_QUERY else kv_heads(match.heads, self.attention.num_kv_heads)
            left = each_head(left, slices)[order]
        number = max(len(left), len(back), 1 if turn is None else len(turn))
        left = each_head(left, number) if turn is None else each_head(turn, number) @ each_head(left, number)
        return each_head(back, number) @ left


def _take_off_unseen(heads: Heads, ones: bool, centred: bool) -> None:
    """Take off, in place, the constants of values that no output shows."""
    if not ones and "value" not in heads.biases:
        return
    rows = heads.weights["value"]
    off = unseen_part(heads.weights["output"], rows.sum(dim=-1) if ones else heads.biases["value"], centred)
    if off is not None and ones:
        heads.weights["value"] = rows - off[..., None] / rows.shape[-1]
    elif off is not None:
        heads.biases["value"] = heads.biases["value"] - off


@dataclass
class AttentionMatch:
    """What brings the attention of one model to that of another.

    Attributes:
        heads: int64 [H]: head of the second model at each place.
        query_key, value_output: turns [G, K, K] and [G, V, V], or None: none.
        rotary: turn [1, width, width] of the rotary part of latent attention, or None.
        latents: turns of latents.
        value: of the objective, reached.
    """

    heads: Tensor
    query_key: Tensor | None = None
    value_output: Tensor | None = None
    rotary: Tensor | None = None
    latents: dict[str, Tensor] = field(default_factory=dict)
    value: float = 0.0

    def of(self, places: Tensor, size: int) -> "AttentionMatch":
        """The turns of heads at some places, in that order, latents left alone; ``size``: heads of a group."""
        groups = kv_heads(places, len(places) // size)
        query_key, value_output = (
            turn if turn is None else turn[groups] for turn in (self.query_key, self.value_output)
        )
        return AttentionMatch(torch.arange(len(places)), query_key, value_output, self.rotary)

    def turn_of(self, name: str) -> Tensor | None:
        """[n, width, width] of the slices of a map, or None."""
        if name in ("query", "key"):
            return self.query_key
        if name in ("value", "output"):
            return self.value_output
        if name in ("rotary_query", "rotary_key"):
            return self.rotary
        return self.latents[name][None] if name in self.latents else None
