"""Merging: what no gauge changes is averaged, so that no gauge changes the merge."""

import copy
import itertools

import pytest
import tiny_transformers as tiny
import torch
from test_align import TOKENS, largest_difference, logits, make, moved

from erlangen import gauge
from erlangen.gauge._align_blend import blend_attention, mean_product
from erlangen.gauge._align_heads import stacked
from erlangen.gauge._weights import ModuleWeights, PendingWeights
from erlangen.gauge.align import match_weights, other_names, sides
from erlangen.gauge.forms import to_planes
from erlangen.gauge.merge import merge_others, merge_weights


def near(model, size=0.1, seed=9):
    """A copy with noise on all its weights."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(size * parameter.square().mean().sqrt() * noise)
    return other


def dense_best(mean, rank):
    """The nearest matrix of a rank, by a singular value decomposition of all of it."""
    u, values, vh = torch.linalg.svd(mean)
    values[..., rank:] = 0
    return u[..., : values.shape[-1]] * values[..., None, :] @ vh[..., : values.shape[-1], :]


# --- the mean of products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("columns", [(9, 12), (4, 12), (12, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_mean_product_is_the_nearest_of_its_width(weight, columns, dtype):
    generator = torch.Generator().manual_seed(0)
    width = 3
    first, second = (
        tuple(torch.randn(2, width, number, generator=generator, dtype=dtype) for _ in range(2)) for number in columns
    )
    mean = (1 - weight) * first[0].mT @ second[0].conj() + weight * first[1].mT @ second[1].conj()
    new = mean_product(first, second, weight)
    assert [part.shape for part in new] == [(2, width, number) for number in columns]
    product = new[0].mT @ new[1].conj()
    assert (product - dense_best(mean, width)).abs().max() < 1e-12
    # Balanced: both factors share the sizes evenly.
    sizes = [(part @ part.mH).diagonal(dim1=-2, dim2=-1).real for part in new]
    assert (sizes[0] - sizes[1]).abs().max() < 1e-12
    # The mean of the factors is another matrix, and farther off, for they are in no common gauge.
    factors = [(1 - weight) * part[0] + weight * part[1] for part in (first, second)]
    naive = factors[0].mT @ factors[1].conj()
    assert weight in (0, 1) or (naive - mean).norm() > 1.2 * (product - mean).norm()


@pytest.mark.parametrize("name", ["tied", "rotary", "partly rotary"])
def test_heads_of_a_merge_against_dense_products(name):
    first, second = make(name), make(name, seed=7)
    layout = gauge.model_layout(first)
    a, b = (side.attention_form(0) for side in sides(layout, ModuleWeights(first), ModuleWeights(second), "gauge"))
    new, weight = blend_attention(a, b, 0.3, "gauge"), 0.3
    attention = layout.layers[0].attention
    groups, rotated = attention.num_kv_heads, attention.rotary_dim

    def products(form):
        query, key = stacked(form.heads["query"], groups), form.heads["key"]
        found = {"values": form.heads["value"].mT @ stacked(form.heads["output"], groups)}
        if rotated < attention.head_dim:
            found["plain"] = query[:, rotated:].mT @ key[:, rotated:]
        if rotated:
            planes = attention.rotary.planes()
            one, two = (to_planes(rows[:, :rotated], planes) for rows in (query, key))
            found["rotary"] = one[..., :, None] @ two[..., None, :].conj()
        return found

    widths = {"values": attention.value_width, "plain": attention.head_dim - rotated, "rotary": 1}
    for kind, product in products(new).items():
        mean = (1 - weight) * products(a)[kind] + weight * products(b)[kind]
        best = dense_best(mean, widths[kind])
        assert (product - best).abs().max() < 1e-12 * best.abs().max() + 1e-13, kind
        assert (best - mean).abs().max() > 1e-3  # something was cut off
    # Biases take part: the last column of what has one.
    assert "query" in new.biased and new.heads["query"].shape[-1] == first.config.dim + 1


# --- merges of whole models -------------------------------------------------------------------------------------------

KINDS = ["tied", "untied", "unbiased", "grouped", "rotary", "partly rotary", "qk-norm"]


@pytest.mark.parametrize("name", KINDS)
def test_no_gauge_changes_a_merge(name):
    """Both models moved by different gauges, heads and features in other orders, the stream in other frames."""
    first = make(name)
    second = near(first)
    one, two = (gauge.merge(moved(first, seed=i), moved(second, seed=i + 1), 0.3, rounds=4) for i in (1, 3))
    expected = logits(one)
    assert (logits(two) - expected).abs().max() < 1e-9
    assert (logits(first) - expected).abs().max() > 1e-3
    # As they stand they share a frame, and it is kept; else the frame is the one that suits them best.
    kept = logits(gauge.merge(first, second, 0.3))
    apart = (logits(first) - logits(second)).abs().max()
    assert (kept - expected).abs().max() < (0.1 * apart if name in ("untied", "rotary") else 1e-9)
    # Of what knows less, none gives that.
    for using in ("orthogonal", "permutation", "none"):
        other = gauge.merge(moved(first, seed=1), moved(second, seed=2), 0.3, using=using, rounds=2)
        assert (logits(other) - expected).abs().max() > 1e-2, using


@pytest.mark.parametrize("name", KINDS)
def test_a_merge_with_a_moved_copy_is_the_model(name):
    model = make(name)
    other = moved(model)
    alignment = gauge.align(model, other)
    for weight in (0.0, 0.25, 1.0):
        merged = alignment.merged(weight)
        assert (logits(merged) - logits(model)).abs().max() < 1e-11
        assert largest_difference(model, merged) < 1e-9
    # The mean of the stored numbers is not.
    plain = gauge.merge(model, other, using="none")
    assert (logits(plain) - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize("using", ["gauge", "orthogonal", "permutation", "none"])
def test_the_ends_of_a_path(using):
    first, second = make("untied", dtype=torch.float32), make("untied", seed=7, dtype=torch.float32)
    alignment = gauge.align(first, second, using=using, rounds=3)
    assert all(torch.equal(*pair) for pair in zip(alignment.merged(0).parameters(), first.parameters()))
    scale = logits(second).abs().max()
    assert (logits(alignment.merged(1)) - logits(second)).abs().max() < 1e-5 * scale
    steps = [logits(alignment.merged(i / 6)) for i in range(7)]
    jumps = [(later - earlier).abs().max().item() for earlier, later in itertools.pairwise(steps)]
    assert max(jumps) < 0.5 * (steps[-1] - steps[0]).abs().max().item()  # no jump anywhere


def test_without_alignment_numbers_are_averaged_as_they_are_stored():
    first, second = make("grouped"), make("grouped", seed=7)
    merged = dict(gauge.merge(first, second, 0.25, using="none").named_parameters())
    others = dict(second.named_parameters())
    for name, value in first.named_parameters():
        assert (merged[name] - (0.75 * value + 0.25 * others[name])).abs().max() < 1e-15


def test_permutations_average_factors_in_a_common_order():
    first = make("rotary")
    other = gauge.random_move(copy.deepcopy(first), 1.0, torch.Generator().manual_seed(0), permute=True)
    found = gauge.align(first, other, using="permutation")
    names = dict(found.model.named_parameters())
    for name, value in gauge.merge(first, other, 0.25, using="permutation").named_parameters():
        expected = 0.75 * first.get_parameter(name) + 0.25 * names[name]
        assert (value - expected).abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_is_a_model_of_the_same_kind(dtype):
    first, second = make("tied", dtype=dtype), make("tied", seed=7, dtype=dtype)
    before = [copy.deepcopy(model.state_dict()) for model in (first, second)]
    merged = gauge.merge(first, second)
    assert type(merged) is type(first) and merged.config == first.config
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert {name: value.shape for name, value in merged.state_dict().items()} == {
        name: value.shape for name, value in first.state_dict().items()
    }
    assert not {id(parameter) for parameter in merged.parameters()} & {
        id(parameter) for parameter in first.parameters()
    }
    assert merged(TOKENS)[0].isfinite().all()
    for model, state in zip((first, second), before):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # The same numbers in float64 give the same merge, up to their rounding.
    wide = gauge.merge(first.double(), second.double())
    assert largest_difference(wide, merged.double()) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "qwen3", "gemma3", "bert masked", "deepseek_v2"])
def test_merges_of_foreign_models(name):
    pytest.importorskip("transformers")
    first = tiny.make(name)
    second = near(first, 0.02)
    tokens = tiny.some_tokens()
    types = torch.zeros_like(tokens) if name.startswith("bert") else None
    with torch.no_grad():
        merged = gauge.merge(first, moved(second), rounds=4)
        assert type(merged) is type(first)
        expected = tiny.outputs(merged, tokens, types)
        again = tiny.outputs(gauge.merge(moved(first, seed=2), moved(second, seed=3), rounds=4), tokens, types)
        ends = [tiny.outputs(model, tokens, types) for model in (first, second)]
    assert (again - expected).abs().max() < 1e-9
    # Near models: the merge is between them.
    half = (ends[0] + ends[1]) / 2
    assert (expected - half).abs().max() < 0.3 * (ends[0] - ends[1]).abs().max()
    if name == "gpt2":
        assert merged.lm_head.weight is merged.transformer.wte.weight


# --- the loss along the path ------------------------------------------------------------------------------------------


def loss(model):
    """Of the next token, on fixed ones."""
    values = torch.nn.functional.cross_entropy(model(TOKENS)[0][:, :-1].flatten(0, 1).double(), TOKENS[:, 1:].flatten())
    return values.item()


def test_the_barrier():
    model = make("rotary")
    with torch.no_grad():
        other = moved(model)
        seen = []

        def watched(one):
            seen.append(one)
            return loss(one)

        found = gauge.barrier(model, other, watched, 5)
        plain = gauge.barrier(model, other, loss, (0.0, 0.5, 1.0), using="none")
    assert found.weights == (0.0, 0.25, 0.5, 0.75, 1.0) and len(seen) == 5
    assert found.losses == pytest.approx([loss(model)] * 5, abs=1e-11)
    assert abs(found.barrier) < 1e-11
    assert found.alignment.distance_after < 1e-9
    # Between the two as they are stored, the loss is another.
    assert plain.weights == (0.0, 0.5, 1.0)
    line = (plain.losses[0] + plain.losses[-1]) / 2
    assert plain.excesses == pytest.approx((0.0, plain.losses[1] - line, 0.0))
    assert plain.barrier == max(plain.excesses) and abs(plain.excesses[1]) > 0.01


# --- weights by name --------------------------------------------------------------------------------------------------


def test_weights_by_name():
    first, second = make("rotary"), make("rotary", seed=7)
    layout = gauge.model_layout(first)
    weights = [ModuleWeights(model) for model in (first, second)]
    matching = match_weights(layout, *weights, rounds=2)
    written, calls = {}, []
    notes = merge_weights(layout, *weights, written, 0.5, matching, progress=lambda *done: calls.append(done))
    assert notes == [] and calls == [(1, 2), (2, 2)]
    expected = dict(gauge.merge(first, second, 0.5, rounds=2).named_parameters())
    assert set(written) == set(layout.tensor_shapes())
    assert max((tensor - expected[name]).abs().max().item() for name, tensor in written.items()) < 1e-15
    merge_weights(layout, *weights, written, 0.0, matching)
    assert all(torch.equal(tensor, weights[0][name]) for name, tensor in written.items())


class _Tensors(dict):
    def shape(self, name):
        return self[name].shape

    def dtype(self, name):
        return self[name].dtype


def test_tensors_that_no_layout_names():
    layout = gauge.model_layout(make())
    names = [*layout.tensor_shapes(), "pooler.weight", "positions"]
    assert other_names(layout, names) == ["pooler.weight", "positions"]
    first = _Tensors({"pooler.weight": torch.ones(2), "positions": torch.arange(3)})
    second = _Tensors({"pooler.weight": torch.zeros(2), "positions": torch.arange(3)})
    out = {}
    assert merge_others(layout, names, first, second, out, 0.25) == ["pooler.weight"]
    assert out["pooler.weight"].tolist() == [0.75, 0.75] and torch.equal(out["positions"], torch.arange(3))
    with pytest.raises(ValueError, match=r"positions is of dtype torch\.int64 and not the same in both"):
        merge_others(layout, names, first, _Tensors(second | {"positions": torch.zeros(3, dtype=torch.int64)}), {}, 0.5)
    with pytest.raises(ValueError, match=r"pooler\.weight must be in both models, in one shape"):
        merge_others(layout, names, first, _Tensors(positions=torch.arange(3)), {}, 0.5)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input():
    model, other = make(), make(seed=7)
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="lies between 0 and 1, received"):
            gauge.merge(model, other, weight)
    alignment = gauge.align(model, other)
    with pytest.raises(ValueError, match="lies between 0 and 1, received 2"):
        alignment.merged(2)
    layout, weights = gauge.model_layout(model), [ModuleWeights(one) for one in (model, other)]
    pending = PendingWeights(weights[0])
    with pytest.raises(ValueError, match="lies between 0 and 1, received -1"):
        merge_weights(layout, *weights, pending, -1, alignment.matching)
    with pytest.raises(ValueError, match="using must be one of"):
        gauge.merge(model, other, using="naive")
    with pytest.raises(ValueError, match="width 16, the second model has 32"):
        gauge.merge(model, make(dim=32))
    for points in (1, 0, (0.0,), (0.0, 0.5), (0.5, 1.0), (0.0, 0.7, 0.3, 1.0), (-1.0, 0.0, 1.0)):
        with pytest.raises(ValueError, match="rise from 0 to 1"):
            gauge.barrier(model, other, loss, points)
