"""Mixtures of experts in another's gauge: which expert is which, what keeps its place, and what lies between two."""

import copy
from itertools import pairwise

import pytest
import tiny_transformers as tiny
import torch
from test_experts import GROUPED, PLACES, Tensors, apart, difference, furthest, moved, stacked, toy

from erlangen import gauge
from erlangen.gauge.align import align_weights, match_weights
from erlangen.gauge.merge import merge_weights


def aligned(layout, tensors, other, **options):
    """The other in the gauge of the first, and the match."""
    found, matching = Tensors(), match_weights(layout, tensors, other, **options)
    align_weights(layout, tensors, other, found, matching)
    return found, matching


def rearranged(layout, tensors, order, seed=0):
    """Experts in an order, the features of each in an order of its own: a permutation and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    new = Tensors({name: tensor.clone() for name, tensor in tensors.items()})
    for name in ("router.weight", "experts.gate_up", "experts.down"):
        new[name] = tensors[name][order]
    for expert in range(len(order)):
        features = torch.randperm(3, generator=generator)
        new["experts.gate_up"][expert] = new["experts.gate_up"][expert][torch.cat([features, 3 + features])]
        new["experts.down"][expert] = new["experts.down"][expert][:, features]
    return new


# --- a moved copy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", [stacked, apart])
@pytest.mark.parametrize("name", PLACES)
def test_a_moved_copy_comes_back(name, expert):
    options, constants = PLACES[name]
    layout, tensors = toy(expert, **options)
    other = moved(layout, tensors, condition=1e3, residual=True)
    found, matching = aligned(layout, tensors, other)
    order = matching.experts[0].order
    assert matching.frame == "turned" and order.tolist() != list(range(6)) and matching.neurons == (None,)
    assert furthest(tensors, other) > 0.5 and furthest(tensors, found) < 1e-9
    assert difference(layout, found, other, **constants) < 1e-9
    # Halfway between a model and itself is the model.
    half = Tensors()
    merge_weights(layout, tensors, other, half, 0.5, matching)
    assert furthest(tensors, half) < 1e-9
    plain = Tensors()
    merge_weights(layout, tensors, other, plain, 0.5, match_weights(layout, tensors, other, using="none"))
    assert max((plain[key] - (tensors[key] + other[key]) / 2).abs().max() for key in plain) < 1e-15
    assert furthest(tensors, plain) > 0.5


@pytest.mark.parametrize("name", ["deepseek_v2 experts", GROUPED])
def test_a_moved_copy_comes_back_in_float32(name):
    pytest.importorskip("transformers")
    model = tiny.make(name).float()
    other = gauge.random_move(copy.deepcopy(model), 10.0, torch.Generator().manual_seed(1), residual=True)
    found = gauge.align(model, other)
    assert found.experts[0] is None and found.experts[1].tolist() != list(range(len(found.experts[1])))
    assert "experts moved" in str(found) and found.distance_after < 1e-6
    before, after = dict(model.named_parameters()), dict(found.model.named_parameters())
    assert {parameter.dtype for parameter in after.values()} == {torch.float32}
    assert max((after[key] - tensor).abs().max() / tensor.abs().max() for key, tensor in before.items()) < 1e-5
    merged = dict(found.merged(0.5).named_parameters())
    assert max((merged[key] - tensor).abs().max() / tensor.abs().max() for key, tensor in before.items()) < 1e-5


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("told_by", ["both", "scores", "maps"])
def test_which_expert_is_which(told_by, groups):
    """Scores and maps each tell it alone, the other being another model's; all in the order that was chosen."""
    layout, tensors = toy(stacked, groups=groups)
    _, unrelated = toy(stacked, seed=5)
    order = torch.tensor([4, 5, 1, 0, 2, 3])  # groups of two change places, and the experts of one of them
    source = Tensors({name: tensor.clone() for name, tensor in tensors.items()})
    for name in {"both": (), "scores": ("experts.gate_up", "experts.down"), "maps": ("router.weight",)}[told_by]:
        source[name] = unrelated[name]
    other = rearranged(layout, source, order)
    for using in ("gauge", "orthogonal", "permutation"):
        found, matching = aligned(layout, tensors, other, using=using)
        # What is at place order[i] of the second model belongs to expert i of the first.
        assert order[matching.experts[0].order].tolist() == list(range(6))
        assert difference(layout, found, other, chosen_groups=1) < 1e-11
        if told_by == "both":
            assert furthest(tensors, found) < 1e-11
        elif told_by == "maps":  # features are matched too
            assert all(
                (found[name] - tensors[name]).abs().max() < 1e-11 for name in ("experts.gate_up", "experts.down")
            )


def test_experts_stay_in_their_groups():
    """The best partner of an expert may be in a group that belongs to another one: it is not taken."""
    layout, tensors = toy(stacked, groups=3)
    other = rearranged(layout, tensors, torch.tensor([2, 1, 0, 3, 4, 5]))
    found, matching = aligned(layout, tensors, other)
    order = matching.experts[0].order.view(3, 2)
    assert (order[:, 0] // 2 == order[:, 1] // 2).all()
    assert difference(layout, found, other, chosen_groups=1) < 1e-11
    assert difference(layout, tensors, other, chosen_groups=1) > 1e-3
    free, _ = toy(stacked)
    assert match_weights(free, tensors, other).experts[0].order.tolist() == [2, 1, 0, 3, 4, 5]


def test_experts_of_the_same_scores_keep_their_places():
    layout, tensors = toy(stacked)
    tensors["router.weight"][4] = tensors["router.weight"][1]
    other = rearranged(layout, tensors, torch.tensor([0, 1, 2, 3, 4, 5]))
    found, matching = aligned(layout, tensors, other)
    assert any("experts keep their order" in note for note in matching.notes)
    assert matching.experts[0].order.tolist() == list(range(6)) and furthest(tensors, found) < 1e-11
    # The first model's scores decide nothing.
    _, second = toy(stacked, seed=3)
    found, matching = aligned(layout, tensors, second)
    assert not any("experts keep their order" in note for note in matching.notes)
    assert difference(layout, found, second) < 1e-10


def test_the_objective_never_falls():
    layout, tensors = toy(stacked, groups=3)
    _, other = toy(stacked, groups=3, seed=2)
    for using in ("gauge", "orthogonal", "permutation"):
        found, matching = aligned(layout, tensors, other, using=using)
        history = matching.similarity
        assert len(history) > 1 and all(after >= before - 1e-12 for before, after in pairwise(history))
        assert difference(layout, found, other, chosen_groups=1) < 1e-10


# --- what follows -----------------------------------------------------------------------------------------------------


def test_changes_of_experts_follow():
    pytest.importorskip("transformers")
    model = tiny.make(GROUPED)
    other = tiny.make(GROUPED, seed=7)
    found, tokens = gauge.align(model, other, rounds=3), tiny.some_tokens(24)
    maps = found.record.maps
    keys = [key for key in maps if ".mlp.experts." in key or ".shared_experts." in key or key.endswith("mlp.gate")]
    assert len(keys) == 16 and any("moved_to" in maps[key] for key in keys)
    generator = torch.Generator().manual_seed(2)
    for key in keys[::3] + keys[-4:]:
        entry = maps[key]
        target = maps[entry.get("moved_to", key)]
        old, new = copy.deepcopy(other), copy.deepcopy(found.model)
        weights = [part.get_parameter(entry["weight"]) for part in (old, new)]
        if "stack" in entry:
            weights = [weight[place] for weight, place in zip(weights, (entry["stack"], target["stack"]))]
        delta = 0.02 * torch.randn(weights[0].shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            weights[0].add_(delta)
            weights[1].add_(found.apply_to(key, delta))
            expected, after = (tiny.outputs(part, tokens) for part in (old, new))
            assert (after - expected).abs().max() < 1e-10, key
            assert (expected - tiny.outputs(other, tokens)).abs().max() > 1e-6, key
