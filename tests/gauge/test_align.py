"""Alignment: a model moved along its gauge comes back to its own numbers, any other keeps its function."""

import copy
import itertools
import math

import pytest
import tiny_transformers as tiny
import torch
from layout_interpreter import interpret
from test_flat import MADE_UP, made_up

from erlangen import gauge
from erlangen.gauge import _align_attention, _align_heads, _align_mlp, _align_weights, _canonical_heads
from erlangen.gauge._align_turns import Turns, polar
from erlangen.gauge._align_weights import best_frame, frame_value
from erlangen.gauge._fold import plan
from erlangen.gauge.align import align_weights, match_weights, sides
from erlangen.gauge.moves import move
from erlangen.lm import GPT, GPTConfig

USING = ("gauge", "orthogonal", "permutation", "none")
OURS = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "unbiased": {"attention_bias": False},
    "grouped": {"num_kv_heads": 2, "mlp": "swiglu"},
    "rotary": {"positions": "rotary", "tie_embeddings": False, "bias": False, "mlp": "swiglu", "num_kv_heads": 2},
    "partly rotary": {"positions": "rotary", "rotary_fraction": 0.5, "num_kv_heads": 1},
    "qk-norm": {"qk_norm": True, "positions": "rotary", "mlp": "swiglu", "num_kv_heads": 2},
    "qk-norm, learned positions": {"qk_norm": True},
    "prelu": {"mlp": "prelu"},
}
TOKENS = torch.randint(37, (3, 12), generator=torch.Generator().manual_seed(5))


def make(name="tied", seed=0, dtype=torch.float64, **fields):
    generator = torch.Generator().manual_seed(seed)
    shape = {"vocab_size": 37, "context_length": 12, "num_layers": 2, "num_heads": 4, "dim": 16, "mlp_dim": 24}
    model = GPT(GPTConfig(**shape | OURS[name] | fields), generator=generator).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.to(dtype)


@torch.no_grad()
def logits(model):
    return model(TOKENS)[0].double()


def moved(model, condition=10.0, seed=1, **options):
    free = plan(gauge.model_layout(model)).rotations != "none"
    generator = torch.Generator().manual_seed(seed)
    return gauge.random_move(copy.deepcopy(model), condition, generator, **{"residual": free} | options)


def largest_difference(model, other):
    """Over all parameters, relative to the largest entry of each."""
    others = dict(other.named_parameters())
    return max(
        ((value - others[name]).abs().max() / value.abs().max().clamp_min(1e-3)).item()
        for name, value in model.named_parameters()
    )


# --- a copy that was moved comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_a_moved_copy_comes_back(name):
    model = make(name)
    copied = copy.deepcopy(model)
    other = moved(model)
    before = copy.deepcopy(other)
    assert largest_difference(model, other) > 0.5
    found = gauge.align(model, other)
    # What a gauge of condition 10, twice, makes of rounding in float64.
    assert largest_difference(model, found.model) < 1e-9
    assert (logits(found.model) - logits(other)).abs().max() < 1e-11
    assert found.distance_before > 0.5 and found.distance_after < 1e-9
    assert found.frame != "same"
    # Neither model is changed.
    assert largest_difference(copied, model) == 0 and largest_difference(before, other) == 0


@pytest.mark.parametrize("name", ["untied", "rotary", "qk-norm"])
def test_a_moved_copy_comes_back_in_float32(name):
    model = make(name, dtype=torch.float32)
    found = gauge.align(model, moved(model))
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.float32}
    assert largest_difference(model, found.model) < 1e-5
    assert found.distance_after < 1e-6


def test_bfloat16_is_kept_to_its_rounding():
    model = make("grouped", dtype=torch.bfloat16)
    found = gauge.align(model, moved(model))
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.bfloat16}
    # Two roundings to 8 bits, of numbers as far apart as the condition.
    assert found.distance_after < 10 * torch.finfo(torch.bfloat16).eps < found.distance_before / 10


@pytest.mark.parametrize("name", tiny.MODELS)
def test_moved_copies_of_foreign_models_come_back(name):
    pytest.importorskip("transformers")
    model = tiny.make(name)
    tokens = tiny.some_tokens()
    types = torch.zeros_like(tokens) if name.startswith("bert") else None
    other = moved(model)
    found = gauge.align(model, other)
    assert largest_difference(model, found.model) < 1e-9
    with torch.no_grad():
        difference = tiny.outputs(found.model, tokens, types) - tiny.outputs(other, tokens, types)
    assert difference.abs().max() < 1e-11


def test_another_function_does_not_come_back():
    model = make("rotary")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].attention.query.weight[0, 0] += 1e-3
    found = gauge.align(model, moved(other))
    assert 1e-5 < found.distance_after < 1e-3
    assert (logits(found.model) - logits(model)).abs().max() > 1e-5


def test_what_was_permuted_is_said():
    model = make("rotary", attention_bias=False)
    other = copy.deepcopy(model)
    order = torch.tensor([2, 3, 1, 0])  # groups change places, heads of the second one too
    features = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    attention, mlp = other.blocks[0].attention, other.blocks[0].mlp
    with torch.no_grad():
        attention.query.weight.copy_(attention.query.weight.view(4, 4, 16)[order].flatten(0, 1))
        for part in (attention.key, attention.value):
            part.weight.copy_(part.weight.view(2, 4, 16)[order[::2] // 2].flatten(0, 1))
        attention.output.weight.copy_(attention.output.weight.view(16, 4, 4)[:, order].flatten(1))
        mlp.down.weight.copy_(mlp.down.weight[:, features])
        for part in (mlp.up, mlp.gate):
            part.weight.copy_(part.weight[features])
    assert (logits(model) - logits(other)).abs().max() < 1e-12
    found = gauge.align(model, other)
    assert found.frame == "same"
    assert order[found.heads[0]].tolist() == [0, 1, 2, 3]
    assert features[found.neurons[0]].tolist() == list(range(24))
    assert found.heads[1].tolist() == [0, 1, 2, 3] and found.neurons[1].tolist() == list(range(24))
    assert found.head_similarity[0][torch.arange(4), found.heads[0]].min() > 1 - 1e-12
    assert found.head_similarity[0].argmax(dim=1).tolist() == found.heads[0].tolist()
    assert "aligned by gauge" in str(found) and "4 of 8 heads moved" in str(found)


# --- unrelated models keep their function -----------------------------------------------------------------------------


@pytest.mark.parametrize("using", USING)
@pytest.mark.parametrize("name", OURS)
def test_unrelated_models_keep_their_function(name, using):
    model, other = make(name), make(name, seed=7)
    found = gauge.align(model, other, using=using, rounds=2)
    expected = logits(other)
    assert (logits(found.model) - expected).abs().max() < 1e-9 * expected.abs().max()
    rises = [later - earlier for earlier, later in itertools.pairwise(found.similarity)]
    assert min(rises, default=0.0) > -1e-12
    if using == "none":
        assert found.distance_after == found.distance_before and found.frame == "same"
    else:
        assert found.distance_after < found.distance_before
        assert found.frame == ("turned" if name in ("untied", "rotary") and using != "permutation" else "permuted")


@pytest.mark.parametrize("name", [
    "gpt2 untied", "gpt_neox in turn", "qwen3", "gemma2", "bert masked", "deepseek_v2", "deepseek_v2 experts",
    "deepseek_v2 grouped experts",
])  # fmt: skip
def test_unrelated_foreign_models_keep_their_function(name):
    pytest.importorskip("transformers")
    model, other = tiny.make(name), tiny.make(name, seed=7)
    tokens = tiny.some_tokens()
    types = torch.zeros_like(tokens) if name.startswith("bert") else None
    with torch.no_grad():
        expected = tiny.outputs(other, tokens, types)
        for using in USING[:3]:
            found = gauge.align(model, other, using=using, rounds=2)
            difference = tiny.outputs(found.model, tokens, types) - expected
            assert difference.abs().max() < 1e-10 * expected.abs().max(), using


def test_the_gauge_finds_what_less_does_not():
    """A copy moved by a gauge that is neither orthogonal nor a permutation."""
    model = make("tied")
    other = moved(model, residual=False)
    distance = {using: gauge.align(model, other, using=using).distance_after for using in USING}
    assert distance["gauge"] < 1e-9
    assert min(distance[using] for using in USING[1:]) > 0.1


# --- steps of the search, each against all there is -------------------------------------------------------------------


def _turns(kind):
    rotary = gauge.Rotary(dim=4, pairs="half")
    return {
        "all": Turns.all(4),
        "planes": Turns.beside_positions(4, rotary),
        "partly": Turns.beside_positions(6, rotary),
        "signs": Turns.signs(6, rotary),
        "fixed": Turns.fixed(4),
    }[kind]


@pytest.mark.parametrize("kind", ["all", "planes", "partly", "signs", "fixed"])
def test_the_best_turn_is_the_best(kind):
    turns, generator = _turns(kind), torch.Generator().manual_seed(3)
    a, b = (torch.randn(5, turns.width, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    overlap = a @ b.mT
    turn = turns.best(overlap)
    eye = torch.eye(turns.width, dtype=torch.float64)
    assert (turn @ turn.mT - eye).abs().max() < 1e-14
    reached = (a * (turn @ b)).sum(dim=(1, 2))
    assert (reached - turns.gain(overlap)).abs().max() < 1e-12
    # No turn near by and no other sign does better.
    for _ in range(20):
        skew = torch.randn(5, turns.width, turns.width, generator=generator, dtype=torch.float64)
        other = turns.best(turn + 0.3 * skew)
        assert ((a * (other @ b)).sum(dim=(1, 2)) <= reached + 1e-12).all()
    if kind in ("planes", "partly"):
        angle = torch.tensor(0.7).double()
        rotation = eye.clone()
        rotation[0, 0] = rotation[2, 2] = angle.cos()
        rotation[2, 0], rotation[0, 2] = angle.sin(), -angle.sin()
        assert (turn @ rotation - rotation @ turn)[..., :4, :4].abs().max() < 1e-14  # positions do not see it


def test_polar_leaves_open_directions_where_they_are():
    overlap = torch.zeros(4, 4, dtype=torch.float64)
    overlap[0, 1], overlap[1, 0] = 2.0, 1.0
    expected = torch.eye(4, dtype=torch.float64)[[1, 0, 2, 3]]
    assert (polar(overlap) - expected).abs().max() < 1e-9


@pytest.mark.parametrize(("least", "near"), [(1e-1, 1e-12), (1e-6, 1e-8), (0.0, 1e-10)])
def test_the_polar_factor_of_a_wide_matrix(least, near):
    """From inverses, or, of one that has none, from singular vectors."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(520, 520, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    values = torch.linspace(1, least, 520, dtype=torch.float64)
    found, overlap = polar((u * values) @ v.mT), (u * values) @ v.mT
    assert (found @ found.mT - torch.eye(520)).abs().max() < 1e-12
    assert (found - u @ v.mT).abs().max() < near or not least
    assert (found * overlap).sum().item() == pytest.approx(values.sum().item(), rel=1e-12)


@pytest.mark.parametrize("name", ["untied", "rotary", "qk-norm", "unbiased"])
def test_a_part_at_a_time_is_as_all_at_once(name, monkeypatch):
    """Heads in groups, hidden features from stored rows, more of them than are compared at once; in a turned frame."""
    fields = {"mlp_dim": 48}
    first, other = make(name, **fields), moved(make(name, **fields))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double())
    expected = gauge.align(first, other)
    for module, limit, value in (
        (_align_weights, "_KEPT", 0), (_align_mlp, "_LARGE", 32), (_align_mlp, "_TILE", 8),
        (_align_heads, "_AT_A_TIME", 1), (_canonical_heads, "_AT_A_TIME", 1),
    ):  # fmt: skip
        monkeypatch.setattr(module, limit, value)
    found = gauge.align(first, other)
    assert found.frame == expected.frame
    assert all(torch.equal(*pair) for pair in zip(found.heads + found.neurons, expected.heads + expected.neurons))
    assert found.similarity == pytest.approx(expected.similarity, rel=1e-6)
    assert largest_difference(found.model, expected.model) < 1e-6
    for one, two in zip(found.head_similarity, expected.head_similarity):
        assert (one - two).abs().max() < 1e-6
    merged = [alignment.merged(0.4) for alignment in (found, expected)]
    assert largest_difference(*merged) < 1e-6


@pytest.mark.parametrize("rotations", ["all", "mean", "signed", "permuted"])
def test_the_best_frame(rotations):
    generator = torch.Generator().manual_seed(0)
    overlap = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    found = best_frame(overlap, rotations)
    rows = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    matrix = found.apply(torch.eye(4, dtype=torch.float64)).mT
    assert (matrix @ matrix.mT - torch.eye(4)).abs().max() < 1e-14
    assert frame_value(found, overlap) == pytest.approx((matrix * overlap).sum().item(), abs=1e-12)
    assert (found.apply(rows) - rows @ matrix.mT).abs().max() < 1e-14
    if rotations in ("signed", "permuted"):
        best = -math.inf
        for order in itertools.permutations(range(4)):
            values = overlap[torch.arange(4), torch.tensor(order)]
            best = max(best, values.abs().sum().item() if rotations == "signed" else values.sum().abs().item())
        assert frame_value(found, overlap) == pytest.approx(best)
    elif rotations == "mean":
        assert (matrix.sum(dim=1) - 1).abs().max() < 1e-14
    else:
        assert frame_value(found, overlap) == pytest.approx(torch.linalg.svdvals(overlap).sum().item())


@pytest.mark.parametrize(
    ("name", "fields"),
    [("tied", {}), ("rotary", {}), ("rotary", {"num_heads": 6, "dim": 24}), ("partly rotary", {})],
)
def test_heads_are_matched_as_by_trying_all_orders(name, fields):
    """Over every order that keeps groups together: of 4 heads, of 2 groups of 2 and of 3, of one of 4."""
    first, second = (make(name, seed=seed, **fields) for seed in (0, 7))
    layout = gauge.model_layout(first)
    weights = [gauge._weights.ModuleWeights(model) for model in (first, second)]
    a, b = (side.attention_form(0) for side in sides(layout, *weights, "gauge"))
    attention = layout.layers[0].attention
    size, groups = attention.group_size, attention.num_kv_heads
    best = -math.inf
    for outer in itertools.permutations(range(groups)):
        for inner in itertools.product(itertools.permutations(range(size)), repeat=groups):
            heads = [group * size + head for group, order in zip(outer, inner) for head in order]
            best = max(best, _align_attention.turned(a, b, torch.tensor(heads), {}).value)
    found = _align_attention.match_attention(a, b)
    if size <= 3:
        assert found.value == pytest.approx(best, rel=1e-12)
    else:
        assert 0.97 * best < found.value <= best * (1 + 1e-12)  # groups of 4 are searched from two starts
    again = _align_attention.match_attention(a, b, found)
    assert again.value >= found.value - 1e-12
    assert (_align_attention.turned(a, b, found.heads.flip(0), {}).value) < found.value


def test_neurons_are_matched_as_by_trying_all_orders():
    first, second = (make("rotary", seed=seed, mlp_dim=5) for seed in (0, 7))
    layout = gauge.model_layout(first)
    weights = [gauge._weights.ModuleWeights(model) for model in (first, second)]
    a, b = (side.mlp_form(0) for side in sides(layout, *weights, "gauge"))
    orders = [torch.tensor(order) for order in itertools.permutations(range(5))]
    best = max(_align_mlp.settled(a, b, order).value for order in orders)
    found = _align_mlp.match_neurons(a, b)
    assert found.value == pytest.approx(best, rel=1e-12)
    assert (found.sign.abs() == 1).all()


# --- what is carried along --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["untied", "unbiased", "rotary", "qk-norm"])
def test_changes_are_carried_into_the_aligned_model(name):
    model, other = make(name), make(name, seed=7)
    found = gauge.align(model, other, rounds=2)
    old, new = copy.deepcopy(other), copy.deepcopy(found.model)
    generator = torch.Generator().manual_seed(0)
    assert found.record.source != found.record.target
    paths = list(found.record.maps)
    assert {"token_embedding.weight", "blocks.1.attention.output", "blocks.0.mlp.down"} <= set(paths)
    for path in paths:
        if name == "unbiased" and path.endswith("attention.output"):
            with pytest.raises(ValueError, match="no output bias"):
                found.apply_to(path, torch.zeros(16, 16))
            continue
        weight = found.record.maps[path]["weight"]
        delta = 0.1 * torch.randn(old.get_parameter(weight).shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            old.get_parameter(weight).add_(delta)
            new.get_parameter(weight).add_(found.apply_to(path, delta))
            for bias, shift in found.bias_shifts(path, delta).items():
                new.get_parameter(bias).add_(shift)
        assert (logits(old) - logits(new)).abs().max() < 1e-11, path
    assert (logits(new) - logits(found.model)).abs().max() > 0.1


# --- degenerate weights -----------------------------------------------------------------------------------------------


def test_heads_of_low_rank():
    model, other = make("untied"), make("untied", seed=7)
    with torch.no_grad():
        model.blocks[0].attention.query.weight[:2] = 0
        model.blocks[0].attention.query.bias[:2] = 0
        other.blocks[1].attention.output.weight[:, :4] = 0
    found = gauge.align(model, other, rounds=3)
    expected = logits(other)
    assert (logits(found.model) - expected).abs().max() < 1e-11
    assert "Layer 0 of the first model: the queries and keys of key/value head 0 have rank 2 of 4." in found.notes
    assert any("Layer 1 of the second model: the values and output" in note for note in found.notes)


def test_gains_of_zero():
    model, other = make("untied"), make("untied", seed=7)
    with torch.no_grad():
        model.blocks[0].attention_norm.weight[3] = 0
    found = gauge.align(model, other, rounds=3)
    assert (logits(found.model) - logits(other)).abs().max() < 1e-11
    assert any("blocks.0.attention_norm has gains near 0" in note for note in found.notes)
    assert (found.model.blocks[0].attention_norm.weight == 1).all()


def test_dead_features_and_heads_of_zeros():
    model, other = make("rotary"), make("rotary", seed=7)
    with torch.no_grad():
        for one in (model, other):
            one.blocks[0].mlp.down.weight[:, 3] = 0
            one.blocks[0].attention.output.weight.zero_()
    found = gauge.align(model, other, rounds=3)
    assert (logits(found.model) - logits(other)).abs().max() < 1e-11
    assert all(parameter.isfinite().all() for parameter in found.model.parameters())


# --- layouts that no family has, run by the interpreter of layouts ----------------------------------------------------


class _Tensors(dict):
    """Tensors by name."""

    def shape(self, name):
        return self[name].shape

    def dtype(self, name):
        return self[name].dtype


def drawn(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = _Tensors()
    for name, shape in layout.tensor_shapes().items():
        gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        tensors[name] = 0.6 * torch.randn(shape, generator=generator, dtype=torch.float64) + gain
    return tensors


@pytest.mark.parametrize("name", MADE_UP)
def test_layouts_that_no_family_has(name):
    """Norms of all heads, norms of what is written, soft caps, parallel branches, eps = 0 throughout."""
    layout = made_up(**MADE_UP[name])
    first, second = drawn(layout, 0), drawn(layout, 1)
    tokens = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(0))
    other = _Tensors(first)
    free = plan(layout).rotations != "none"
    move(layout, other, 10.0, torch.Generator().manual_seed(3), residual=free)
    back, found = _Tensors(), match_weights(layout, first, other)
    align_weights(layout, first, other, back, found)
    expected = interpret(layout, first, tokens)
    assert (interpret(layout, other, tokens) - expected).abs().max() < 1e-11
    assert (interpret(layout, back, tokens) - expected).abs().max() < 1e-11
    difference = max(((back[key] - value).abs().max() / value.abs().max()).item() for key, value in first.items())
    if "wide heads" in name:
        # Wider than the residual stream: of a product of lower rank the factors do not come back, and that is said.
        assert any("have rank" in note for note in found.notes)
    else:
        assert difference < 1e-9
    expected = interpret(layout, second, tokens)
    align_weights(layout, first, second, back, match_weights(layout, first, second, rounds=1))
    assert (interpret(layout, back, tokens) - expected).abs().max() < 1e-9 * expected.abs().max()


# --- weights by name, and bad input -----------------------------------------------------------------------------------


def _read(model):
    return _Tensors({name: parameter.detach() for name, parameter in model.named_parameters()})


def test_weights_by_name_give_the_same_and_are_written_once():
    model, other = make("grouped"), make("grouped", seed=7)
    layout = gauge.model_layout(model)
    calls, written = [], {}

    class Out:
        def __setitem__(self, name, tensor):
            assert name not in written
            written[name] = tensor

    matching = match_weights(layout, _read(model), _read(other), progress=lambda *done: calls.append(done))
    assert calls[-1][0] == calls[-1][1] and calls == sorted(calls)
    kept = {}
    certificate = align_weights(layout, _read(model), _read(other), Out(), matching, transforms=kept)
    assert certificate.transforms is kept and kept
    assert set(written) == set(layout.tensor_shapes())
    expected = dict(gauge.align(model, other).model.named_parameters())
    assert max((tensor - expected[name]).abs().max().item() for name, tensor in written.items()) < 1e-12


def test_bad_input():
    model = make()
    with pytest.raises(ValueError, match="using must be one of 'gauge', 'orthogonal', 'permutation', 'none'"):
        gauge.align(model, model, using="rotation")
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        gauge.align(model, model, rounds=0)
    with pytest.raises(ValueError, match=r"the first model has width 16, the second model has 32"):
        gauge.align(model, make(dim=32))
    with pytest.raises(ValueError, match="number of layers 2, the second model has 3"):
        gauge.align(model, make(num_layers=3))
    with pytest.raises(ValueError, match="the same vocabulary; the first model has 37 tokens, the second model has 38"):
        gauge.align(model, make(vocab_size=38))
    with pytest.raises(ValueError, match="positions, token types"):
        gauge.align(model, make(context_length=13))
    with pytest.raises(ValueError, match="the same map to the logits"):
        gauge.align(model, make("untied"))
    with pytest.raises(ValueError, match="query heads"):
        gauge.align(model, make(num_heads=2))
    with pytest.raises(ValueError, match=r"rotary_base is 10000\.0 and 500\.0"):
        gauge.align(make("rotary"), make("rotary", rotary_base=500.0))
    with pytest.raises(TypeError, match="no layout is known for Linear"):
        gauge.align(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    broken = make(seed=3)
    with torch.no_grad():
        broken.blocks[1].mlp.down.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.down\.weight holds values that are not finite"):
        gauge.align(model, broken)
    with pytest.raises(ValueError, match="on the meta device"):
        gauge.align(model, make().to("meta"))
