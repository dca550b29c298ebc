"""Mixtures of experts: their order, their tensors in stacks and one by one, and what is no move of theirs."""

import copy
from dataclasses import replace

import pytest
import tiny_transformers as tiny
import torch
from layout_interpreter import Constants, interpret

from erlangen import gauge
from erlangen.gauge import MLP, Experts, moves, rows
from erlangen.gauge._experts import replace_experts
from erlangen.gauge.canonical import canonical_form
from erlangen.interop import layout_of_config

GROUPED = "deepseek_v2 grouped experts"


class Tensors(dict):
    """Tensors by name, in their own dtype."""

    def __setitem__(self, name, tensor):
        super().__setitem__(name, tensor.to(self[name].dtype).clone() if name in self else tensor)

    def shape(self, name):
        return self[name].shape

    def dtype(self, name):
        return self[name].dtype


def stacked(path, number, width):
    kind = {"stack": number}
    return MLP(
        gate=rows(f"{path}.gate_up", 1, width, **kind),
        up=rows(f"{path}.gate_up", 1, width, start=width, **kind),
        down=rows(f"{path}.down", 1, width, side="in", **kind),
        activation="silu",
    )


def apart(path, number, width):
    return MLP(
        gate=rows(f"{path}.{number}.gate", 1, width),
        up=rows(f"{path}.{number}.up", 1, width),
        down=rows(f"{path}.{number}.down", 1, width, side="in"),
        activation="silu",
    )


def toy(expert, *, number=6, width=3, seed=0, **options):
    """A decoder of one layer with experts, and its tensors."""
    layout = gauge.model_layout(tiny.make("llama", num_hidden_layers=1))
    (layer,) = layout.layers
    mixture = Experts(
        router=rows("router", 1, number),
        experts=tuple(expert("experts", place, width) for place in range(number)),
        **options,
    )
    layout = replace(layout, layers=(replace(layer, mlp=None, experts=mixture),))
    generator = torch.Generator().manual_seed(seed)
    tensors = Tensors()
    for name, shape in layout.tensor_shapes().items():
        draw = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors[name] = 1 + 0.3 * draw.clamp(-2, 2) if "norm" in name else 0.7 * draw
    return layout, tensors


def outputs(layout, tensors, **constants):
    return interpret(layout, tensors, tiny.some_tokens(8), Constants(**constants))


def difference(layout, tensors, other, **constants):
    return (outputs(layout, tensors, **constants) - outputs(layout, other, **constants)).abs().max().item()


def canonical(layout, tensors, **options):
    new = Tensors({name: tensor.clone() for name, tensor in tensors.items()})
    return new, canonical_form(layout, new, **options)


def moved(layout, tensors, seed=1, condition=10.0, **options):
    new = Tensors({name: tensor.clone() for name, tensor in tensors.items()})
    moves.move(layout, new, condition, torch.Generator().manual_seed(seed), **options)
    return new


def furthest(tensors, other):
    return max((tensors[name] - other[name]).abs().max().item() for name in tensors)


# --- the order of experts ---------------------------------------------------------------------------------------------

PLACES = {
    "one group": ({}, {}),
    "groups": ({"groups": 3}, {"chosen_groups": 2}),
    "other scores": ({"softmax": False}, {}),
}


@pytest.mark.parametrize("expert", [stacked, apart])
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("condition", [10.0, 1e4])
def test_moved_mixtures_become_equal(name, expert, condition):
    options, constants = PLACES[name]
    layout, tensors = toy(expert, **options)
    other = moved(layout, tensors, condition=condition, residual=True)
    # Rounding is at most that of numbers as large as the condition; 1e3 is for their sums.
    tolerance = 1e3 * condition * torch.finfo(torch.float64).eps
    assert furthest(tensors, other) > 0.5 and difference(layout, tensors, other, **constants) < tolerance
    (one, record), (two, second) = (canonical(layout, part, residual=True) for part in (tensors, other))
    assert record.leftover == []
    assert difference(layout, tensors, one, **constants) < 1e-12 and furthest(one, two) < tolerance
    assert furthest(canonical(layout, two, residual=True)[0], two) < 1e-12
    orders = [found.transforms["router.router.order"].tolist() for found in (record, second)]
    assert orders[0] != orders[1], "the move has changed no places"
    # Rows of a softmax have no mean, others keep theirs.
    assert (one["router.weight"].mean(dim=0).abs().max() < 1e-14) == options.get("softmax", True)


def test_a_stack_and_tensors_of_their_own_are_treated_alike():
    layout, tensors = toy(stacked, groups=2)
    separate, _ = toy(apart, groups=2)
    single = Tensors({name: tensor for name, tensor in tensors.items() if "experts" not in name})
    for place in range(6):
        gate, up = tensors["experts.gate_up"][place].chunk(2)
        names = {"gate": gate, "up": up, "down": tensors["experts.down"][place]}
        for part, tensor in names.items():
            single[f"experts.{place}.{part}.weight"] = tensor
    one, two = canonical(layout, tensors)[0], canonical(separate, single)[0]
    for place in range(6):
        gate, up = one["experts.gate_up"][place].chunk(2)
        for part, tensor in {"gate": gate, "up": up, "down": one["experts.down"][place]}.items():
            assert torch.equal(two[f"experts.{place}.{part}.weight"], tensor)


def test_experts_leave_their_group_with_it_or_not_at_all():
    """Two experts that change places across groups are another function; the moves never do that."""
    layout, tensors = toy(stacked, groups=3)
    constants = {"chosen_groups": 1}
    for across, legal in (((1, 0, 2, 3, 4, 5), True), ((2, 3, 0, 1, 4, 5), True), ((2, 1, 0, 3, 4, 5), False)):
        other = Tensors({name: tensor.clone() for name, tensor in tensors.items()})
        for name in ("router.weight", "experts.gate_up", "experts.down"):
            other[name] = tensors[name][list(across)]
        assert (difference(layout, tensors, other, **constants) < 1e-12) == legal
    for seed in range(5):
        other = moved(layout, tensors, seed)
        assert difference(layout, tensors, other, **constants) < 1e-11


def test_experts_of_the_same_scores_keep_their_order():
    """Which of the two is chosen depends on the place alone."""
    layout, tensors = toy(stacked)
    tensors["router.weight"][4] = tensors["router.weight"][1]
    one, record = canonical(layout, tensors)
    assert any("experts are kept in order" in line for line in record.leftover)
    assert record.transforms["router.router.order"].tolist() == list(range(6))
    assert (one["router.weight"][4] == one["router.weight"][1]).all()
    other = moved(layout, tensors)
    gaps = torch.cdist(other["router.weight"], other["router.weight"]) + 9 * torch.eye(6)
    assert divmod(int(gaps.argmin()), 6) == (1, 4)


def test_equal_experts_are_said():
    layout, tensors = toy(stacked)
    for name in ("experts.gate_up", "experts.down"):
        tensors[name][:] = tensors[name][:1]
    one, record = canonical(layout, tensors)
    two, _ = canonical(layout, moved(layout, tensors))
    # Experts that are copies are put in the order of their scores, which differ.
    assert record.leftover == [] and furthest(one, two) < 1e-9
    tensors["router.weight"][2] = -tensors["router.weight"][5]
    layout = with_experts(layout, softmax=False)
    assert any("1 pairs of experts" in line for line in canonical(layout, tensors)[1].leftover)


def with_experts(layout, **options):
    (layer,) = layout.layers
    return replace(layout, layers=(replace(layer, experts=replace(layer.experts, **options)),))


# --- one expert at a time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", [stacked, apart])
def test_places_are_taken_along_cycles(expert):
    layout, tensors = toy(expert)
    mixture = layout.layers[0].experts
    for order in ([3, 4, 5, 0, 2, 1], [1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]):
        new, seen = Tensors({name: tensor.clone() for name, tensor in tensors.items()}), []

        def treat(place, stored, seen=seen):
            seen.append(place)
            return {name: 2 * matrix for name, matrix in stored.items()}

        replace_experts(mixture, new, torch.tensor(order), treat)
        assert sorted(seen) == list(range(6))
        for place, source in enumerate(order):
            for target, origin in zip(
                (mixture.experts[place].up, mixture.experts[place].down),
                (mixture.experts[source].up, mixture.experts[source].down),
            ):
                expected = 2 * origin.heads(tensors[origin.weight])
                assert torch.equal(target.heads(new[target.weight]), expected)


def test_layouts_of_checkpoints_and_models_name_the_same_numbers():
    model = tiny.make(GROUPED)
    config = {**model.config.to_dict(), "architectures": ["DeepseekV2ForCausalLM"]}
    live = gauge.model_layout(model)
    names = {f"model.layers.1.mlp.experts.{n}.{part}_proj.weight" for n in range(6) for part in ("gate", "up", "down")}
    names |= live.tensor_shapes().keys()
    stored = layout_of_config(config, names=names)
    assert names - {name for name in names if name.endswith(("gate_up_proj", "experts.down_proj"))} == (
        stored.tensor_shapes().keys()
    )
    assert live.layers[1].experts.groups == stored.layers[1].experts.groups == 3
    assert gauge.flat_directions(live) == gauge.flat_directions(stored)
    for wrong in ({"n_group": 4}, {"topk_method": "noaux_tc"}, {"scoring_func": "sigmoid"}, {"n_group": None}):
        with pytest.raises(ValueError, match=r"n_group|topk_method"):
            layout_of_config(config | wrong)


@pytest.mark.parametrize("name", ["deepseek_v2 experts", GROUPED])
def test_moved_models_become_equal(name):
    """The whole model, at the largest condition: experts at their places, their features, and their scores."""
    pytest.importorskip("transformers")
    condition = 1e4
    tolerance = 1e3 * condition * torch.finfo(torch.float64).eps
    model = tiny.make(name)
    other = gauge.random_move(copy.deepcopy(model), condition, torch.Generator().manual_seed(3), residual=True)
    before, tokens = copy.deepcopy(other), tiny.some_tokens()
    for one in (model, other):
        gauge.canonicalize(one, check=False, residual=True)
    assert furthest(*(dict(one.named_parameters()) for one in (model, other))) < tolerance
    assert furthest(*(dict(one.named_parameters()) for one in (model, before))) > 0.5
    with torch.no_grad():
        assert (tiny.outputs(other, tokens) - tiny.outputs(before, tokens)).abs().max() < tolerance
    # One number of one expert makes two models of it.
    with torch.no_grad():
        before.get_parameter("model.layers.1.mlp.experts.down_proj")[1, 2, 1] += 1e-3
    gauge.canonicalize(before, check=False, residual=True)
    assert furthest(*(dict(one.named_parameters()) for one in (model, before))) > 1e-5


# --- comparison, and what is carried along ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseek_v2 experts", GROUPED])
def test_experts_are_recognised(name):
    pytest.importorskip("transformers")
    model = tiny.make(name)
    other = gauge.random_move(copy.deepcopy(model), 30.0, torch.Generator().manual_seed(3), residual=True)
    result = gauge.compare(model, other)
    assert result.same_function and result.distance < 1e-11 and result.frame == "turned"
    assert result.layers[0].experts is None and sorted(result.layers[1].experts) == list(
        range(len(result.layers[1].experts))
    )
    assert result.layers[1].experts != tuple(sorted(result.layers[1].experts))
    assert result.to_json()["layers"][1]["experts"] == list(result.layers[1].experts)
    back = gauge.compare(other, model).layers[1].experts
    assert [back[place] for place in result.layers[1].experts] == list(range(len(back)))
    # One number of one expert, or of the router, is seen.
    for part in ("experts.down_proj", "experts.gate_up_proj", "gate.weight", "shared_experts.up_proj.weight"):
        changed = copy.deepcopy(other)
        with torch.no_grad():
            changed.get_parameter(f"model.layers.1.mlp.{part}").flatten()[5] += 1e-6
        result = gauge.compare(model, changed)
        assert not result.same_function and result.layers[1].mlp.distance > 1e-10
        assert result.layers[0].mlp.distance < 1e-11


def test_changes_of_experts_are_carried_to_their_new_places():
    pytest.importorskip("transformers")
    model = tiny.make(GROUPED)
    before = copy.deepcopy(model)
    certificate = gauge.canonicalize(model, check=False, residual=True)
    tokens = tiny.some_tokens()
    keys = [key for key in certificate.maps if ".mlp.experts." in key or key.endswith("mlp.gate")]
    assert len(keys) == 13 and any("moved_to" in certificate.maps[key] for key in keys)
    generator = torch.Generator().manual_seed(2)
    for key in keys:
        entry = certificate.maps[key]
        target = certificate.maps[entry.get("moved_to", key)]
        old, new = copy.deepcopy(before), copy.deepcopy(model)
        weights = [part.get_parameter(entry["weight"]) for part in (old, new)]
        if "stack" in entry:
            weights = [weight[place] for weight, place in zip(weights, (entry["stack"], target["stack"]))]
        delta = 0.02 * torch.randn(weights[0].shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            weights[0].add_(delta)
            weights[1].add_(certificate.apply_to(key, delta))
            expected, found = (tiny.outputs(part, tokens) for part in (old, new))
            assert (found - expected).abs().max() < 1e-11, key
            assert (expected - tiny.outputs(before, tokens)).abs().max() > 1e-5, key


# --- bad input --------------------------------------------------------------------------------------------------------


def test_mixtures_that_contradict_themselves():
    layout, _ = toy(stacked)
    (layer,) = layout.layers
    mixture = layer.experts
    with pytest.raises(ValueError, match="one slice of 6 rows"):
        replace(mixture, router=rows("router", 1, 5))
    with pytest.raises(ValueError, match="4 groups of 6 experts"):
        replace(mixture, groups=4)
    with pytest.raises(ValueError, match="must be alike"):
        replace(mixture, experts=(*mixture.experts[:5], stacked("experts", 5, 2)))
    with pytest.raises(ValueError, match="must be alike"):
        replace(mixture, experts=())
    with pytest.raises(ValueError, match="either an mlp or experts"):
        replace(layer, mlp=mixture.experts[0])
    with pytest.raises(ValueError, match="norm of what they write"):
        gauge.flat_directions(replace(layout, layers=(replace(layer, mlp_out_norm=layer.mlp_norm),)))
