"""Canonical form of a layer's attention: queries against keys, values against output, and the order of heads.

Groups of heads (a key/value head with its query heads) are treated a few at a time in float64, and each is written back
in the stored dtype; what is ordered in the end are stored slices. A layer whose groups share something that is changed
(a latent, a free scale, constants) is treated as a whole.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import forms
from ._canonical_record import Record, finite
from ._fold import Heads, Reading, Writing, attention_maps, latent_readers, stored_gain, unseen_part
from ._weights import Weights, give_back
from .layout import HeadLayout, Layer, Norm, Projection


def _grouped(rows: Tensor, kv_heads: int) -> Tensor:
    """[heads, width, columns] -> [kv_heads, width, columns of all heads of the group]."""
    return rows.unflatten(0, (kv_heads, -1)).transpose(1, 2).flatten(2)


def _ungrouped(rows: Tensor, group: int) -> Tensor:
    """The inverse of `_grouped`."""
    return rows.unflatten(2, (group, -1)).transpose(1, 2).flatten(0, 1)


def _with_bias(heads: Heads, name: str) -> Tensor:
    """The rows of a map with the bias, if there is one, as one more column."""
    rows = heads.weights[name]
    return torch.cat([rows, heads.biases[name][..., None]], dim=-1) if name in heads.biases else rows


def _put_rows(heads: Heads, name: str, rows: Tensor) -> None:
    """Write what `_with_bias` gave."""
    if name in heads.biases:
        heads.weights[name], heads.biases[name] = rows[..., :-1], rows[..., -1]
    else:
        heads.weights[name] = rows


def _block_diagonal(first: Tensor, second: Tensor) -> Tensor:
    """[heads, a, a], [heads, b, b] -> [heads, a + b, a + b]."""
    a, b = first.shape[-1], second.shape[-1]
    whole = first.new_zeros(first.shape[0], a + b, a + b)
    whole[:, :a, :a], whole[:, a:, a:] = first, second
    return whole


@dataclass
class _HeadForms:
    """Some groups of heads of a layer's attention while they are brought into form.

    Attributes:
        attention: the layout of these heads alone.
        heads: their weights.
        dtype: the coarsest of the stored weights.
        where: how messages call it.
        first_head: key/value head of the layer with which its heads begin.
        sizes: name of a map -> [kv_heads], of its rows with their gains, before anything was taken off.
        left: name of a map -> [1, kv_heads or num_heads, width, width], what its slices were multiplied by.
        spectra: as of `Record`, before ordering.
        new_gains: of the norms of queries and keys, [1 or heads, width].
        taken_off: constants were taken off the values that the output map does not show.
        total: what the output was divided by, where a norm sets its size.
        form_query, form_key: with such norms, the factors of the form between them.
    """

    attention: HeadLayout
    heads: Heads
    dtype: torch.dtype
    where: str
    record: Record
    first_head: int
    sizes: dict[str, Tensor]
    left: dict[str, Tensor] = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    new_gains: tuple[Tensor, Tensor] | None = None
    taken_off: bool = False
    total: float = 1.0
    form_query: Tensor | None = None
    form_key: Tensor | None = None

    def free(self) -> None:
        """Let go of the weights, when they are written."""
        self.heads.weights.clear()
        self.heads.biases.clear()
        self.form_query = self.form_key = None

    def say(self, what: str, form: forms.PairForm | forms.TurnedForm, width: int) -> None:
        """Report what a form leaves open."""
        for head, first, last in form.blocks:
            self.record.leftover.append(
                f"{self.where}, head {self.first_head + head} (before ordering): {what} {first} to {last} have nearly "
                "equal singular values."
            )
        for head, rank in enumerate(form.rank.tolist()):
            if rank < width:
                self.record.leftover.append(
                    f"{self.where}, head {self.first_head + head} (before ordering): {what} have rank {rank} of "
                    f"{width}; the rest is set to zero."
                )

    def latents(self) -> None:
        """Turn latents to the principal axes of the maps that make them."""
        for name, (norm, readers) in latent_readers(self.attention).items():
            rows, factor = _with_bias(self.heads, name), 1.0
            if norm.eps == 0 and rows.norm() > 0:
                factor = rows.shape[1] ** 0.5 / rows.norm().item()
                rows = rows * factor
            form = forms.turned(rows, dtype=self.dtype)
            self.say(f"{name} axes", form, rows.shape[1])
            _put_rows(self.heads, name, form.rows)
            self.left[name] = factor * form.turn
            self.spectra[name] = form.spectrum
            for reader in readers:
                self.heads.weights[reader] = self.heads.weights[reader] @ form.turn[0].mT

    def rotary_part(self) -> None:
        """The rotary part of latent attention: one key for all heads."""
        latent = self.attention.latent
        if latent is None:
            return
        query, key = _with_bias(self.heads, "rotary_query"), _with_bias(self.heads, "rotary_key")
        form = forms.rotary_pair(_grouped(query, 1), key, latent.rotary.planes(query.device))
        self.say("rotary planes", form, query.shape[1])
        _put_rows(self.heads, "rotary_query", _ungrouped(form.first, self.attention.num_heads))
        _put_rows(self.heads, "rotary_key", form.second)
        self.left["rotary_query"], self.left["rotary_key"] = form.left, form.right
        self.spectra["rotary"] = _both_coordinates(form.spectrum, latent.rotary.planes(query.device))

    def query_key(self) -> None:
        """Queries against keys, without norms between."""
        attention, heads = self.attention, self.heads
        kv_heads, group, turned = attention.num_kv_heads, attention.group_size, attention.rotary_dim
        query, key = _grouped(_with_bias(heads, "query"), kv_heads), heads.weights["key"]
        width = attention.head_dim
        lefts, rights, spectra, firsts, seconds = [], [], [], [], []
        bias = heads.biases.get("key")
        if turned:
            assert attention.rotary is not None
            planes = attention.rotary.planes(key.device)
            second = key[:, :turned]
            if bias is not None:
                second = torch.cat([second, bias[:, :turned, None]], dim=-1)
            form = forms.rotary_pair(query[:, :turned], second, planes)
            self.say("rotary coordinates", form, turned)
            firsts.append(form.first)
            seconds.append(form.second if bias is not None else _padded(form.second, 1))
            lefts.append(form.left)
            rights.append(form.right)
            spectra.append(_both_coordinates(form.spectrum, planes))
        if turned < width:
            second = key[:, turned:]
            if bias is not None and attention.soft_cap is not None:
                second = torch.cat([second, bias[:, turned:, None]], dim=-1)
            sizes = (self.sizes["query"], self.sizes["key"])
            form = forms.balanced(query[:, turned:], second, dtype=self.dtype, repeats=group, sizes=sizes)
            self.say("query/key coordinates", form, width - turned)
            firsts.append(form.first)
            # Without a cap, a key bias on coordinates without positions adds the same to all scores of a query.
            kept = bias is not None and attention.soft_cap is not None
            seconds.append(form.second if kept else _padded(form.second, 1))
            lefts.append(form.left)
            rights.append(form.right)
            spectra.append(form.spectrum)
        both = torch.cat(seconds, dim=1)
        _put_rows(heads, "query", _ungrouped(torch.cat(firsts, dim=1), group))
        heads.weights["key"] = both[..., :-1]
        if bias is not None:
            heads.biases["key"] = both[..., -1]
        self.left["query"] = lefts[0] if len(lefts) == 1 else _block_diagonal(*lefts)
        self.left["key"] = rights[0] if len(rights) == 1 else _block_diagonal(*rights)
        self.spectra["query_key"] = torch.cat(spectra, dim=1)

    def normed_query_key(self, gains: tuple[Tensor, Tensor] | None, scaled: tuple[bool, bool]) -> None:
        """Queries against keys with norms between.

        Args:
            gains: of the two norms, [head_dim] or [heads · head_dim]; None: they have none.
            scaled: whether the scale of queries, and of keys, is free.
        """
        attention, heads = self.attention, self.heads
        kv_heads, group, turned, width = (
            attention.num_kv_heads,
            attention.group_size,
            attention.rotary_dim,
            attention.head_dim,
        )
        query, key = _with_bias(heads, "query"), _with_bias(heads, "key")
        factors = []
        for rows, free in ((query, scaled[0]), (key, scaled[1])):
            over = (1, 2) if attention.qk_norm_over == "head" else (0, 1, 2)
            size = (
                rows.square().sum(dim=over, keepdim=True).sqrt()
                / (width if attention.qk_norm_over == "head" else width * rows.shape[0]) ** 0.5
            )
            factor = torch.where(size > 0, 1 / size.where(size > 0, torch.ones_like(size)), 1.0)
            factors.append(factor.expand(rows.shape[0], 1, 1) if free else torch.ones_like(rows[:, :1, :1]))
        query, key = query * factors[0], key * factors[1]
        eye = torch.eye(width, dtype=query.dtype, device=query.device)
        turns: tuple[Tensor, Tensor]
        if gains is None:
            turn = eye.expand(kv_heads, width, width).clone()
            columns = query.shape[-1]
            if turned:
                assert attention.rotary is not None
                planes = attention.rotary.planes(key.device)
                form = forms.rotary_pair(_grouped(query, kv_heads)[:, :turned], key[:, :turned], planes, scales=False)
                turn[:, :turned, :turned] = form.left
            if turned < width:
                rest = torch.cat([_grouped(query, kv_heads), key], dim=-1)[:, turned:]
                parts = (columns,) * group + (key.shape[-1],)
                # Keys stand apart from queries, whatever their columns: a zero column more makes the sizes differ.
                rest = torch.cat([rest, rest.new_zeros(*rest.shape[:2], 1)], dim=-1)
                turned_form = forms.turned(rest, dtype=self.dtype, parts=(*parts[:-1], parts[-1] + 1))
                self.say("query/key coordinates", replace(turned_form, rank=torch.full((kv_heads,), width)), width)
                turn[:, turned:, turned:] = turned_form.turn
            query = turn.repeat_interleave(group, dim=0) @ query
            key = turn @ key
            turns = (turn.repeat_interleave(group, dim=0), turn)
            gain_query, gain_key = query.new_ones(1, width), key.new_ones(1, width)
        else:
            query, key, turns, gain_query, gain_key = self._gained(query, key, gains)
            self.new_gains = (gain_query, gain_key)
        _put_rows(heads, "query", query)
        _put_rows(heads, "key", key)
        self.left["query"], self.left["key"] = turns[0] * factors[0], turns[1] * factors[1]
        # The form between the norms, every head at the same scale.
        sizes = [rows.flatten(1).norm(dim=1).clamp_min(1e-300)[:, None, None] for rows in (query, key)]
        self.form_query = query / sizes[0] * gain_query[..., None]
        self.form_key = key / sizes[1] * gain_key[..., None]
        self.spectra["query_key"] = forms.product_spectrum(_grouped(self.form_query, kv_heads), self.form_key)

    def _gained(
        self, query: Tensor, key: Tensor, gains: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
        """Signs, and the exchange of gains between queries and keys.

        Returns:
            queries, keys, diagonal matrices [heads, width, width] of both, and the new gains [1 or heads, width].
        """
        attention = self.attention
        group, width = attention.group_size, attention.head_dim
        gain_query, gain_key = (gain.view(-1, width) for gain in gains)
        signs = [torch.where(gain < 0, -1.0, 1.0).double() for gain in (gain_query, gain_key)]
        query, key = query * signs[0][..., None], key * signs[1][..., None]
        gain_query, gain_key = gain_query.abs(), gain_key.abs()
        # Classes of coordinates that exchange together: the two of a plane, one alone elsewhere.
        label = torch.arange(width, device=query.device)
        planes = None if attention.rotary is None else attention.rotary.planes(query.device)
        if planes is not None:
            label[planes[:, 1]] = planes[:, 0]
        same = (label[:, None] == label[None]).double()

        def over_class(squares: Tensor) -> Tensor:
            return (squares @ same).sqrt()

        by_group = gain_query.square()
        if attention.qk_norm_over == "all":
            by_group = by_group.unflatten(0, (-1, group)).sum(dim=1)
        size_query, size_key = over_class(by_group), over_class(gain_key.square())
        alive = (size_query > 0) & (size_key > 0)
        factor = torch.where(alive, size_key / size_query.where(alive, torch.ones_like(size_query)), 1.0).sqrt()
        gain_key = gain_key / factor
        gain_query = gain_query * (
            factor.repeat_interleave(group, dim=0) if attention.qk_norm_over == "all" else factor
        )
        # One sign for each key/value head and class.
        stacked = _grouped(query, attention.num_kv_heads)
        joint = torch.zeros(*stacked.shape[:2], 2 * stacked.shape[2], dtype=stacked.dtype, device=stacked.device)
        joint[..., : stacked.shape[2]] = stacked
        if planes is not None:
            joint[:, planes[:, 0], stacked.shape[2] :] = stacked[:, planes[:, 1]]
        flip = forms.signs(joint)[:, label]
        query = query * flip.repeat_interleave(group, dim=0)[..., None]
        key = key * flip[..., None]
        diagonal_query = signs[0] * flip.repeat_interleave(group, dim=0)
        diagonal_key = signs[1] * flip
        return query, key, (diagonal_query.diag_embed(), diagonal_key.diag_embed()), gain_query, gain_key

    def _seen_constants(self, ones: bool, centred: bool) -> None:
        """Take off the constants of values what no output shows: the rest is the least in what heads give."""
        heads = self.heads
        constant = heads.weights["value"].sum(dim=-1) if ones else heads.biases["value"]
        off = unseen_part(heads.weights["output"], constant, centred)
        if off is None:
            return
        self.taken_off = True
        if ones:
            heads.weights["value"] = heads.weights["value"] - off[..., None] / heads.weights["value"].shape[-1]
        else:
            heads.biases["value"] = constant - off

    def value_output(self, free_scale: bool, ones: bool, centred: bool) -> None:
        """Values against output.

        Args:
            free_scale: a norm without eps divides the output by its size.
            ones: constants stand on the means of rows.
            centred: the mean of the output does not count.
        """
        attention, heads = self.attention, self.heads
        kv_heads, group = attention.num_kv_heads, attention.group_size
        if "output" not in heads.biases and (ones or "value" in heads.biases):
            self._seen_constants(ones, centred)
        value = _with_bias(heads, "value")
        output = _grouped(heads.weights["output"], kv_heads)
        sizes = (self.sizes["value"], self.sizes["output"])
        form = forms.balanced(value, output, dtype=self.dtype, sizes=sizes)
        self.say("value/output coordinates", form, attention.value_width)
        spectrum, factor = form.spectrum, 1.0
        total = spectrum.norm().item()
        if free_scale and total > 0:
            factor = total**-0.5
            spectrum = spectrum / total
            self.total = total
            if "output" in heads.biases:
                heads.biases["output"] = heads.biases["output"] / total
        _put_rows(heads, "value", form.first * factor)
        heads.weights["output"] = _ungrouped(form.second * factor, group)
        self.left["value"], self.left["output"] = form.left * factor, form.right * factor
        self.spectra["value_output"] = spectrum

    def strengths(self) -> tuple[Tensor, Tensor]:
        """[num_heads] each: the size of what a head gives, and of its scores; no gauge changes them."""
        heads, group = self.heads, self.attention.group_size
        query = heads.weights["query"] if self.form_query is None else self.form_query
        key = heads.weights["key"] if self.form_key is None else self.form_key
        if "query" in heads.biases and self.form_query is None:
            query = _with_bias(heads, "query")
        scores = self._scores(query, key.repeat_interleave(group, dim=0))
        values = heads.weights["value"].repeat_interleave(group, dim=0)
        return scores * forms.product_norms(heads.weights["output"], values), scores

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        """[num_heads]: the size of the form that makes the scores of each head."""
        attention, rotary = self.attention, self.attention.rotary
        turned = 0 if self.form_query is not None else attention.rotary_dim
        total = query.new_zeros(query.shape[0])
        if turned and rotary is not None:
            planes = rotary.planes(query.device)
            sizes = [forms.to_planes(rows[:, :turned], planes).abs().square().sum(dim=-1) for rows in (query, key)]
            total = total + (sizes[0] * sizes[1]).sum(dim=-1)
        if turned < attention.head_dim:
            total = total + forms.product_norms(query[:, turned:], key[:, turned:]).square()
        if "rotary_query" in self.heads.weights:
            total = total + self.heads.weights["rotary_query"].square().sum(dim=(1, 2))
        return total.sqrt()


def _padded(rows: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, columns))


def _both_coordinates(values: Tensor, planes: Tensor) -> Tensor:
    """[heads, planes] -> [heads, 2 planes]: the value of each plane at both its coordinates."""
    both = values.new_empty(values.shape[0], planes.numel())
    both[:, planes[:, 0]] = both[:, planes[:, 1]] = values
    return both


_AT_A_TIME = 1 << 19  # numbers of heads in float64: 4 MB, but one group at least
_BY_QUERY = ("query", "output", "rotary_query")
_SHARED = ("kv_latent", "query_latent", "rotary_key")


def _sizes(attention: HeadLayout, heads: Heads, reading: Reading) -> dict[str, Tensor]:
    """[kv_heads]: norms of queries, keys, values and outputs as they are stored, with the gain of what they read."""
    sizes = {}
    for name in ("query", "key", "value", "output"):
        rows = heads.weights[name]
        by_stream = name != "output" and attention.latent is None
        if by_stream and reading.fold.kind == "before" and reading.gain is not None:
            rows = rows * reading.gain
        squares = rows.square().sum(dim=(1, 2)).view(attention.num_kv_heads, -1).sum(dim=1)
        sizes[name] = squares.sqrt() if by_stream or name == "output" else torch.zeros_like(squares)
    return sizes


def _may_be_unseen(attention: HeadLayout, dim: int, centred: bool) -> bool:
    """Whether constants in the values of all heads are more than an output of so many coordinates can show."""
    return attention.num_kv_heads * attention.value_width > dim - centred


def _free_scales(attention: HeadLayout) -> tuple[bool, bool]:
    """Whether the scale of queries, and of keys, before a norm is free."""
    norms = attention.qk_norm
    return (norms[0].eps == 0, norms[1].eps == 0) if isinstance(norms, tuple) else (bool(norms), bool(norms))


def _groups(attention: HeadLayout, first: int, last: int) -> HeadLayout:
    """The layout of some key/value heads and their query heads."""
    group = attention.group_size

    def some(part: Projection, each: int) -> Projection:
        return replace(part, starts=part.starts[each * first : each * last])

    return replace(
        attention,
        num_heads=group * (last - first),
        num_kv_heads=last - first,
        query=some(attention.query, group),
        key=some(attention.key, 1),
        value=some(attention.value, 1),
        output=some(attention.output, group),
    )


def _some_gains(attention: HeadLayout, gains: tuple[Tensor, Tensor], first: int, last: int) -> tuple[Tensor, Tensor]:
    """The gains of queries' and keys' norms that those heads see."""
    if attention.qk_norm_over == "head":
        return gains
    group = attention.group_size
    query, key = (gain.view(-1, attention.head_dim) for gain in gains)
    return query[group * first : group * last].flatten(), key[first:last].flatten()


def _groups_at_a_time(layer: Layer, dim: int, ones: bool, centred: bool) -> int:
    """How many key/value heads are treated together: all of them where they share what is changed."""
    attention, out_norm = layer.attention, layer.attention_out_norm
    kv_heads = attention.num_kv_heads
    shared = attention.latent is not None or (out_norm is not None and out_norm.eps == 0)
    shared |= attention.qk_norm_over == "all" and any(_free_scales(attention))
    if not attention.output.bias and (ones or attention.value.bias):
        shared |= _may_be_unseen(attention, dim, centred)
    rows = (attention.num_heads + kv_heads) * (attention.head_dim + attention.value_width)
    return kv_heads if shared else min(max(_AT_A_TIME * kv_heads // (rows * dim), 1), kv_heads)


def _head_order(
    attention: HeadLayout, where: str, strength: Tensor, scores: Tensor, tolerance: float, record: Record
) -> tuple[Tensor, Tensor]:
    """The order of key/value heads and of query heads, new to old, largest first.

    Args:
        strength, scores: [num_heads], as of `_HeadForms.strengths`.
    """
    kv_heads, group = attention.num_kv_heads, attention.group_size

    def descending(what: str, keys: Tensor, second: Tensor) -> Tensor:
        order, ties = forms.descending(keys, second, tolerance)
        record.leftover.extend(f"{where}: {what} {one} and {two} are alike in size." for one, two in ties)
        return order

    strength, scores = strength.view(kv_heads, group), scores.view(kv_heads, group)
    inner = torch.stack(
        [descending(f"query heads of group {head}", strength[head], scores[head]) for head in range(kv_heads)]
    )
    kv_order = descending("key/value heads", strength.norm(dim=1), scores.norm(dim=1))
    return kv_order, (kv_order[:, None] * group + inner[kv_order]).flatten()


def _put_in_order(part: Projection, stored: dict[str, Tensor], order: Tensor, bias: bool) -> None:
    """Permute the slices of a map, as they are stored."""
    weight = stored[part.weight]
    part.put_heads(weight, part.heads(weight)[order])
    if bias and part.bias_name is not None:
        part.put_head_biases(stored[part.bias_name], part.head_biases(stored[part.bias_name])[order])


def canonical_attention(
    layer: Layer,
    number: int,
    weights: Weights,
    reading: Reading,
    writing: Writing,
    sort: bool,
    record: Record,
) -> None:
    """Bring the attention of one layer to canonical form.

    Args:
        layer, number: of the model.
        weights: read, and written.
        reading, writing: how what it reads and writes is folded.
        sort: heads by size; else they are kept in order.
        record: is told what was done.
    """
    attention, norms, where = layer.attention, layer.attention.qk_norm, f"Layer {number}"
    maps, group, out_norm = attention_maps(attention), attention.group_size, layer.attention_out_norm
    # Copies as they are stored; heads are written back into them when they are done.
    stored: dict[str, Tensor] = {}
    for part in maps.values():
        if part.weight not in stored:
            stored[part.weight] = finite(weights[part.weight], part.weight).clone()
        if part.bias_name is not None and part.bias_name not in stored:
            stored[part.bias_name] = weights[part.bias_name].clone()
    dtype = max((weights.dtype(part.weight) for part in maps.values()), key=lambda dtype: torch.finfo(dtype).eps)
    latent_gains = {name: stored_gain(weights, norm) for name, (norm, _) in latent_readers(attention).items()}
    gains = None
    if isinstance(norms, tuple):
        query_gain, key_gain = (stored_gain(weights, norm) for norm in norms)
        gains = None if query_gain is None or key_gain is None else (query_gain, key_gain)
        if min(norm.eps for norm in norms) > 0 and number == 0:
            record.folded.append("The scales of queries and keys are left: the eps of their norms is not 0.")
    ones = reading.fold.ones and attention.latent is None
    step = _groups_at_a_time(
        layer, attention.output.heads(stored[attention.output.weight]).shape[-1], ones, writing.centred
    )
    done: list[_HeadForms] = []
    moved: list[Tensor] = []
    sizes: list[tuple[Tensor, Tensor]] = []
    output_bias = None
    for first in range(0, attention.num_kv_heads, step):
        last = min(first + step, attention.num_kv_heads)
        some = attention if step == attention.num_kv_heads else _groups(attention, first, last)
        heads = Heads.read(stored, some)
        work = _HeadForms(some, heads, dtype, where, record, first, _sizes(some, heads, reading))
        heads.fold(some, reading, writing)
        if output_bias is not None:  # folded with the first heads
            heads.biases["output"] = output_bias
        heads.fold_latents(some, weights)
        constant = heads.fold_constants(some, ones)
        if constant is not None:
            moved.append(constant.clone())
        work.latents()
        if norms is False:
            work.query_key()
        else:
            of_some = None if gains is None else _some_gains(attention, gains, first, last)
            work.normed_query_key(of_some, _free_scales(attention))
        work.rotary_part()
        work.value_output(out_norm is not None and out_norm.eps == 0, ones, writing.centred)
        if sort:
            sizes.append(work.strengths())
        output_bias = heads.biases.get("output")
        heads.put(stored, some)
        work.free()
        del heads, constant
        give_back()  # pieces between what is kept of each group
        done.append(work)
    if sort:
        strength, scores = (torch.cat(found) for found in zip(*sizes))
        orders = _head_order(attention, where, strength, scores, forms.degeneracy_tolerance(dtype), record)
        for name, part in maps.items():
            if name not in _SHARED:
                _put_in_order(part, stored, orders[name in _BY_QUERY], bias=name != "output")
    else:
        device = stored[attention.query.weight].device
        orders = tuple(torch.arange(n, device=device) for n in (attention.num_kv_heads, attention.num_heads))
    kv_order, query_order = orders
    if attention.output.bias_name is not None and output_bias is not None:
        del stored[attention.output.bias_name]
        weights[attention.output.bias_name] = output_bias
    for name in list(stored):
        weights[name] = stored.pop(name)
    if gains is not None and isinstance(norms, tuple):
        _store_gains(attention, norms, weights, done, (query_order, kv_order), record)
    for norm, _ in latent_readers(attention).values():
        gain = stored_gain(weights, norm)
        if norm.weight is not None and gain is not None:
            weights[norm.weight] = torch.ones_like(gain) - norm.offset
    left = {name: torch.cat([work.left[name] for work in done]) for name in done[0].left}
    _record_attention(attention, maps, record, reading, writing, left, (kv_order, query_order), latent_gains)
    if moved:
        record.map_of(attention.output)["value_bias"] = record.keep(
            f"{attention.value.path}.value_bias", torch.cat(moved).repeat_interleave(group, dim=0)
        )
    if done[0].total != 1:
        record.map_of(attention.output)["total"] = done[0].total
    if any(work.taken_off for work in done):
        record.map_of(attention.output)["taken_off"] = True
    if attention.key.bias and norms is False and attention.soft_cap is None and number == 0:
        where = "" if not attention.rotary_dim else " (where positions do not turn)"
        if attention.rotary_dim < attention.head_dim:
            record.folded.append(f"Key biases{where} change no score against another: set to zero.")
    if number == 0 and attention.value.bias:
        record.folded.append(
            "Value biases moved into the output biases."
            if moved
            else "Value biases turn along with values: there is no output bias to move them into."
        )
    spectra = {name: torch.cat([work.spectra[name] for work in done]) for name in done[0].spectra}
    by_head = {name: spectra.pop(name)[kv_order].cpu() for name in ("query_key", "value_output")}
    record.spectra[number] = by_head | {name: tensor.cpu() for name, tensor in spectra.items()}


def _store_gains(
    attention: HeadLayout,
    norms: tuple[Norm, Norm],
    weights: Weights,
    done: list[_HeadForms],
    orders: tuple[Tensor, Tensor],
    record: Record,
) -> None:
    """Write the gains of queries' and keys' norms."""
    found = [work.new_gains for work in done if work.new_gains is not None]
    for norm, parts, order in zip(norms, zip(*found), orders):
        old = stored_gain(weights, norm)
        assert norm.weight is not None and old is not None
        old, gain = old.view(-1, attention.head_dim), parts[0]
        if attention.qk_norm_over == "all":
            old, gain = old[order], torch.cat(parts)[order]
            record.keep(f"{norm.path}.order", order)
        record.keep(f"{norm.path}.ratio", torch.where(old == 0, 0.0, gain / old))
        weights[norm.weight] = gain.flatten() - norm.offset


def _record_attention(
    attention: HeadLayout,
    maps: dict[str, Projection],
    record: Record,
    reading: Reading,
    writing: Writing,
    lefts: dict[str, Tensor],
    orders: tuple[Tensor, Tensor],
    latent_gains: dict[str, Tensor | None],
) -> None:
    by_latent = {name: source for source, (_, names) in latent_readers(attention).items() for name in names}
    for name, part in maps.items():
        order = None if name in _SHARED else orders[1] if name in _BY_QUERY else orders[0]
        left = lefts.get(name)
        if left is not None and left.shape[0] > 1:
            left = left[orders[0] if left.shape[0] == attention.num_kv_heads else orders[1]]
        record.slices(part, name, {"left": left, "order": order})
        if name == "output":
            record.writes(part, writing)
        elif name in by_latent:
            source = by_latent[name]
            gain = latent_gains[source]
            turn = record.keep(f"{maps[source].path}.{source}.turn", _unit(lefts[source][0]))
            found: dict[str, Any] = {"turn": turn}
            if gain is not None:
                found["gain"] = record.keep(f"{maps[source].path}.{source}.gain", gain)
            record.map_of(part)["latent"] = found
        else:
            record.reads(part, reading)


def _unit(turn: Tensor) -> Tensor:
    """The orthogonal matrix of which this is a multiple."""
    return turn / turn.square().sum(dim=-1).mean().sqrt()
