"""Gradients and the state of optimisers in a new gauge, against what backward gives there."""

import copy
import json

import pytest
import tiny_transformers as tiny
import torch

from erlangen import gauge, optim
from erlangen.gauge._fingerprint import fingerprint
from erlangen.gauge._fold import plan
from erlangen.gauge._weights import ModuleWeights
from erlangen.gauge.carry import carry_gradients, carry_optimizer
from erlangen.gauge.certificate import Certificate
from erlangen.lm import GPT, GPTConfig

OURS = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "grouped": {"num_kv_heads": 2, "mlp": "swiglu"},
    "rotary": {"positions": "rotary", "tie_embeddings": False, "bias": False},
    "partly rotary": {"positions": "rotary", "rotary_fraction": 0.5, "num_kv_heads": 1},
    "qk-norm": {"qk_norm": True, "positions": "rotary", "mlp": "swiglu", "num_kv_heads": 2},
    "prelu": {"mlp": "prelu"},
}
THEIRS = (
    "gpt2", "gpt2 base", "gpt_neox", "llama biased", "llama tied", "qwen2", "qwen3", "phi3", "gemma2", "gemma3",
    "deepseek_v2", "deepseek_v2 experts", "deepseek_v2 grouped experts",
)  # fmt: skip
# Of sums of a few thousand products, relative to the largest entry.
ROUNDING = 1e-11


def make(name="plain", seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    shape = {"vocab_size": 37, "context_length": 12, "num_layers": 2, "num_heads": 4, "dim": 16, "mlp_dim": 24}
    model = GPT(GPTConfig(**shape | OURS[name] | fields), generator=generator).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if parameter.ndim == 1 and name == "prelu":
                parameter.mul_(3)  # slopes beyond 1 too
    return model


def loss_of(model, seed=0):
    """A function of the outputs, another one for every seed."""
    if isinstance(model, GPT):
        tokens = torch.randint(37, (3, 12), generator=torch.Generator().manual_seed(seed))
        out = model(tokens)[0].log_softmax(-1)
    else:
        out = tiny.outputs(model, tiny.some_tokens(seed=seed))
        out = out.log_softmax(-1) if out.shape[-1] == 11 else out
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 3 + (out * weights).mean()


def gradients_of(model, seed=0):
    model.zero_grad(set_to_none=True)
    loss_of(model, seed).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def disagreement(found, expected):
    """The largest, relative to the largest entry of each tensor, or 1e-4 of that of all (for what nothing shows)."""
    assert found.keys() == expected.keys()
    sizes = {name: value.abs().max().item() for name, value in expected.items()}
    floor = 1e-4 * max(sizes.values())
    return max(((found[n].double() - v).abs().max().item() / max(sizes[n], floor)) for n, v in expected.items())


# --- gradients --------------------------------------------------------------------------------------------------------


def check_gradients(model, **options):
    old = gradients_of(model)
    certificate = gauge.canonicalize(model, check=False, **options)
    expected = gradients_of(model)
    assert disagreement(carry_gradients(model, certificate, old), expected) < ROUNDING
    # and this is no small matter: as they were, or carried like changes, they are others
    assert disagreement(old, expected) > 1e-2
    as_changes = dict(carry_gradients(model, certificate, old))
    for path, entry in certificate.maps.items():
        if "stack" not in entry:
            as_changes[entry["weight"]] = certificate.apply_to(path, old[entry["weight"]])
    assert disagreement(as_changes, expected) > 1e-2


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_gradients_of_our_models(name, residual):
    check_gradients(make(name), residual=residual)


@pytest.mark.parametrize("name", THEIRS)
def test_gradients_of_models_of_transformers(name):
    pytest.importorskip("transformers")
    model = tiny.make(name)
    check_gradients(model, residual=plan(gauge.model_layout(model)).rotations != "none")


@pytest.mark.parametrize("name", ["plain", "rotary", "qk-norm"])
def test_gradients_pair_with_changes(name):
    """The pairing with a change of any weight and bias is what it was, shifts of biases included."""
    model = make(name)
    old = gradients_of(model)
    certificate = gauge.canonicalize(model, check=False, residual=True)
    new = gradients_of(model)
    generator = torch.Generator().manual_seed(1)
    for path, entry in certificate.maps.items():
        names = [name for name in (entry["weight"], entry["bias"]) if name is not None]
        change = {name: torch.randn(old[name].shape, generator=generator, dtype=torch.float64) for name in names}
        moved = {
            name: certificate.apply_to(path if tensor.ndim == 2 else name, tensor) for name, tensor in change.items()
        }
        for bias, shift in certificate.bias_shifts(path, change[entry["weight"]]).items():
            moved[bias] = moved[bias] + shift
        before = sum((old[name] * change[name]).sum() for name in names)
        after = sum((new[name] * moved[name]).sum() for name in names)
        size = sum(old[name].norm() * change[name].norm() for name in names)
        assert (before - after).abs() < 1e-12 * size, path
        assert before.abs() > 1e-4 * size, path


def test_a_norm_without_eps_behind_a_branch():
    """Its branch has a free size, and the bias of its output is divided by it."""
    pytest.importorskip("transformers")
    with pytest.MonkeyPatch.context() as patch:
        model_class, config_class, fields = tiny.MODELS["gemma2"]
        fields = fields | {"attention_bias": True, "rms_norm_eps": 0.0}
        patch.setitem(tiny.MODELS, "gemma2", (model_class, config_class, fields))
        model = tiny.without_eps(tiny.make("gemma2"))
    old = copy.deepcopy(model)
    certificate = gauge.canonicalize(model, check=False)
    tokens, generator = tiny.some_tokens(), torch.Generator().manual_seed(1)
    for path in ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.down_proj"):
        for name in (f"{path}.weight", f"{path}.bias"):
            if name not in dict(model.named_parameters()):
                continue
            one, two = copy.deepcopy(old), copy.deepcopy(model)
            change = 0.1 * torch.randn(one.get_parameter(name).shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                before = tiny.outputs(one, tokens)
                one.get_parameter(name).add_(change)
                two.get_parameter(name).add_(certificate.apply_to(name, change))
                for bias, shift in certificate.bias_shifts(name, change).items():
                    two.get_parameter(bias).add_(shift)
                assert (tiny.outputs(one, tokens) - before).abs().max() > 1e-4, name
                assert (tiny.outputs(one, tokens) - tiny.outputs(two, tokens)).abs().max() < 1e-11, name


@pytest.mark.parametrize("name", ["plain", "rotary", "their bert", "their deepseek_v2"])
def test_alignments_carry_the_same_things(name):
    """Changes factor by factor, and gradients, of a model that went on into the norms of another."""
    if name.startswith("their"):
        pytest.importorskip("transformers")
        first, second = (tiny.make(name.removeprefix("their "), seed) for seed in (0, 1))
    else:
        first, second = make(name), make(name, seed=1)
    aligned = gauge.align(first, second, rounds=2)
    old, new = gradients_of(second), gradients_of(aligned.model)
    generator = torch.Generator().manual_seed(1)
    for path, entry in aligned.record.maps.items():
        weight, bias = entry["weight"], entry["bias"]
        found = aligned.record.apply_to_gradient(path, old[weight], old.get(bias))
        assert disagreement({path: found}, {path: new[weight]}) < 1e3 * ROUNDING, path
        out, into = old[weight].shape[:: -1 if entry["transposed"] else 1]
        factors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((out, 2), (2, into))]
        changes = [factors, aligned.record.apply_to_factors(path, *factors)[:2]]
        products = [(a @ b).T if entry["transposed"] else a @ b for a, b in changes]
        assert torch.allclose(aligned.apply_to(path, products[0]), products[1], rtol=1e-10, atol=1e-10), path
        shifts = aligned.record.apply_to_factors(path, *factors)[2]
        expected = aligned.bias_shifts(path, products[0])
        assert shifts.keys() == expected.keys()
        assert all(torch.allclose(shift, expected[key], rtol=1e-10, atol=1e-10) for key, shift in shifts.items())
        before = (old[weight] * products[0]).sum()
        after = (new[weight] * products[1]).sum() + sum((new[key] * shift).sum() for key, shift in shifts.items())
        assert (before - after).abs() < 1e-11 * old[weight].norm() * products[0].norm(), path


def test_gradients_that_cannot_follow():
    model = make()
    old = gradients_of(model)
    other = copy.deepcopy(model)
    certificate = gauge.canonicalize(model, check=False)
    with pytest.raises(ValueError, match="are not those that the certificate speaks of"):
        carry_gradients(other, certificate, old)
    bias, weight = "blocks.0.attention.query.bias", "blocks.0.attention.query.weight"
    with pytest.raises(ValueError, match=rf"the gradient of \S+ cannot be carried: the same of {bias} is needed"):
        carry_gradients(model, certificate, {name: value for name, value in old.items() if name != bias})
    with pytest.raises(ValueError, match="needed too"):
        carry_gradients(model, certificate, {"blocks.0.attention_norm.weight": old["blocks.0.attention_norm.weight"]})
    with pytest.raises(ValueError, match="give the gradient with respect to that bias too"):
        certificate.apply_to_gradient(weight, old[weight])
    for wrong, said in ((torch.zeros(16, 17), "16 inputs"), (torch.zeros(17, 16), "16 outputs"), (bias, "a matrix")):
        with pytest.raises(ValueError, match=said):
            certificate.apply_to(weight, wrong if isinstance(wrong, torch.Tensor) else old[wrong])
    with pytest.raises(ValueError, match="no such parameter"):
        carry_gradients(model, certificate, {"blocks.9.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"has shape \[3\]"):
        carry_gradients(model, certificate, {bias: torch.zeros(3)})
    blind = Certificate(**{**vars(certificate), "target": ""})
    with pytest.raises(ValueError, match="canonicalise the model again"):
        carry_gradients(model, blind, old)
    with pytest.raises(ValueError, match="no canonical form"):
        carry_gradients(model, Certificate(**{**vars(certificate), "spectra": {}}), old)
    # what was one tensor and is two
    model = make()
    old = gradients_of(model)
    certificate = gauge.canonicalize(model, check=False, untie=True)
    with pytest.raises(ValueError, match="known only as a sum"):
        carry_gradients(model, certificate, old)


def test_behind_a_gain_of_zero_nothing_is_known():
    model = make()
    with torch.no_grad():
        model.blocks[0].attention_norm.weight[3] = 0
    old = gradients_of(model)
    certificate = gauge.canonicalize(model, check=False)
    with pytest.raises(ValueError, match=r"attention\.\w+\.weight reads is zero in places"):
        carry_gradients(model, certificate, old)


def test_heads_of_low_rank_and_norms_of_sums_have_no_gradients():
    model = make()
    with torch.no_grad():
        model.blocks[0].attention.value.weight[4:8] = 0
    old = gradients_of(model)
    certificate = gauge.canonicalize(model, check=False)
    with pytest.raises(ValueError, match="set to zero"):
        carry_gradients(model, certificate, old)
    pytest.importorskip("transformers")
    bert = tiny.make("bert")
    old = gradients_of(bert)
    certificate = gauge.canonicalize(bert, check=False)
    with pytest.raises(ValueError, match="norm of sums"):
        carry_gradients(bert, certificate, old)
    # all else follows
    expected = {name: value for name, value in gradients_of(bert).items() if not name.endswith("LayerNorm.weight")}
    rest = {name: value for name, value in old.items() if name in expected}
    assert disagreement(carry_gradients(bert, certificate, rest), expected) < ROUNDING


# --- optimisers -------------------------------------------------------------------------------------------------------


def optimizer_of(name, model, **settings):
    return optim.create(name, model.named_parameters(), **settings)


def step(model, optimizer, seed):
    optimizer.zero_grad()
    loss = loss_of(model, seed)
    loss.backward()
    optimizer.step(**({"loss": loss} if isinstance(optimizer, optim.ECD) else {}))
    optimizer.zero_grad()


def buffers(model, optimizer, key):
    found = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    return {name: state[key].clone() for name, state in found.items() if key in state}


@pytest.mark.parametrize("name", OURS)
def test_momentum_is_what_the_new_gauge_would_have_added_up(name):
    """Steps of length 0 add up gradients at one point: there, before and after."""
    model = make(name)
    optimizer = optimizer_of("sgdm", model, lr=0.0)
    for seed in range(4):
        step(model, optimizer, seed)
    certificate = gauge.canonicalize(model, check=False)
    expected = optimizer_of("sgdm", model, lr=0.0)
    for seed in range(4):
        step(model, expected, seed)
    done = carry_optimizer(optimizer, model, certificate)
    assert set(done.carried) == dict(model.named_parameters()).keys() and done.reset == ()
    key = "momentum_buffer"
    assert disagreement(buffers(model, optimizer, key), buffers(model, expected, key)) < ROUNDING


@pytest.mark.parametrize(("condition", "same"), [(1.0, True), (10.0, False)])
@pytest.mark.parametrize("name", ["sgdm", "ecd"])
def test_the_next_step_is_the_same_function_where_factors_are_orthogonal(name, condition, same):
    """Only there: in another metric, the steepest descent is another."""
    pytest.importorskip("transformers")
    model = tiny.make("llama")
    gauge.canonicalize(model, check=False)
    gauge.random_move(model, condition, torch.Generator().manual_seed(1))
    other = copy.deepcopy(model)
    # Steps so small that the factors stay what they are; ECD's do not add up at lr = 0.
    optimizers = [optimizer_of(name, one, lr=0.0 if name == "sgdm" else 1e-6) for one in (model, other)]
    for seed in range(3):
        for one, optimizer in zip((model, other), optimizers):
            step(one, optimizer, seed)
    carry_optimizer(optimizers[1], other, gauge.canonicalize(other, check=False))
    before = loss_of(model, 9).item()
    for one, optimizer in zip((model, other), optimizers):
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        step(one, optimizer, 3)
    change = abs(loss_of(model, 9).item() - before)
    difference = abs(loss_of(model, 9).item() - loss_of(other, 9).item())
    assert change > 1e-5
    assert (difference < (1e-8 if name == "sgdm" else 1e-3) * change) == same


def test_the_velocity_of_ecd_keeps_its_length():
    model = make("grouped")
    optimizer = optimizer_of("ecd", model, lr=0.01)
    for seed in range(3):
        step(model, optimizer, seed)
    old = buffers(model, optimizer, "momentum")
    certificate = gauge.canonicalize(model, check=False)
    carry_optimizer(optimizer, model, certificate)
    new = buffers(model, optimizer, "momentum")
    expected = carry_gradients(model, certificate, old)
    lengths = [sum(u.square().sum() for u in found.values()).sqrt().item() for found in (old, new, expected)]
    assert lengths[:2] == pytest.approx([1, 1], abs=1e-12) and abs(lengths[2] - 1) > 0.01
    assert disagreement(new, {name: u / lengths[2] for name, u in expected.items()}) < ROUNDING
    step(model, optimizer, 5)


def test_muon_keeps_its_momentum_and_adam_beside_it_starts_anew():
    pytest.importorskip("transformers")
    model = tiny.make("llama")
    optimizer, key = optimizer_of("muon", model, lr=0.0), "momentum_buffer"
    for seed in range(3):
        step(model, optimizer, seed)
    certificate = gauge.canonicalize(model, check=False, residual=True)
    old = {name: state.clone() for name, state in buffers(model, optimizer, key).items()}
    with pytest.raises(ValueError, match=r"MuonAdamW cannot follow.*squares of gradients.*second_moments"):
        carry_optimizer(optimizer, model, certificate)
    assert disagreement(buffers(model, optimizer, key), old) == 0
    done = carry_optimizer(optimizer, model, certificate, second_moments="reset")
    expected = optimizer_of("muon", model, lr=0.0)
    for seed in range(3):
        step(model, expected, seed)
    assert set(done.carried) == old.keys() and len(done.carried) == 15
    assert "lm_head.weight" in done.reset and "model.norm.weight" in done.reset
    assert disagreement(buffers(model, optimizer, key), buffers(model, expected, key)) < ROUNDING
    assert buffers(model, optimizer, "exp_avg") == {}
    step(model, optimizer, 5)


def test_averages_of_another_kind_do_not_mix():
    """The momentum of a weight behind a norm with a bias needs that of its bias by the same rule."""
    model = make()
    optimizer = optimizer_of("muon", model, lr=0.0)
    step(model, optimizer, 0)
    done = carry_optimizer(optimizer, model, gauge.canonicalize(model, check=False), second_moments="reset")
    # Nothing is folded through these; through all others something that needs the gradient of a bias, which Adam has.
    assert done.carried == ("blocks.0.mlp.down.weight", "blocks.1.mlp.down.weight")
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "momentum": 0.9},
        {"params": [p for p in model.parameters() if p.ndim == 1], "momentum": 0.5},
    ]
    sgd = torch.optim.SGD(groups, lr=0.0)
    step(model, sgd, 0)
    with pytest.raises(ValueError, match=r"the same of blocks\.0\.\S+\.bias is needed too"):
        carry_optimizer(sgd, model, gauge.canonicalize(model, check=False))


@pytest.mark.parametrize("name", ["adamw", "soap"])
def test_second_moments_are_refused_or_reset(name):
    model = make("rotary")
    optimizer = optimizer_of(name, model)
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    certificate = gauge.canonicalize(model, check=False)
    with pytest.raises(ValueError, match=r"squares of gradients in other coordinates.*second_moments=\"reset\""):
        carry_optimizer(optimizer, model, certificate)
    assert len(optimizer.state) == len(list(model.parameters()))
    with pytest.raises(ValueError, match='"refuse" or "reset"'):
        carry_optimizer(optimizer, model, certificate, second_moments="keep")
    done = carry_optimizer(optimizer, model, certificate, second_moments="reset")
    assert done.carried == () and len(done.reset) == len(list(model.parameters())) and not optimizer.state
    step(model, optimizer, 2)


def test_what_is_not_of_this_gauge_is_refused():
    model = make("rotary")
    optimizer = optimizer_of("sgdm", model)
    step(model, optimizer, 0)
    stranger = copy.deepcopy(model)
    certificate = gauge.canonicalize(model, check=False)
    with pytest.raises(ValueError, match="not of this model"):
        carry_optimizer(optimizer_of("sgdm", stranger), model, certificate)
    with pytest.raises(ValueError, match="not those that the certificate speaks of"):
        carry_optimizer(optimizer_of("sgdm", stranger), stranger, certificate)
    carry_optimizer(optimizer, model, certificate)
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="carried to this gauge already"):
        carry_optimizer(optimizer, model, certificate)
    # also after a checkpoint of the run
    again = optimizer_of("sgdm", model)
    again.load_state_dict(state)
    with pytest.raises(ValueError, match="carried to this gauge already"):
        carry_optimizer(again, model, certificate)
    step(model, optimizer, 1)
    with pytest.raises(ValueError, match="or were trained since"):
        carry_optimizer(optimizer, model, certificate)
    # and into the next gauge it may go
    carry_optimizer(optimizer, model, gauge.canonicalize(model, check=False))
    for group in optimizer.param_groups:
        optimizer.state[group["params"][0]]["row_norms"] = torch.ones(3)
    with pytest.raises(ValueError, match="SGD keeps row_norms"):
        carry_optimizer(optimizer, model, gauge.canonicalize(model, check=False, residual=True))


def test_a_tensor_that_became_two_starts_anew():
    model = make("grouped")
    optimizer = optimizer_of("sgdm", model)
    step(model, optimizer, 0)
    certificate = gauge.canonicalize(model, check=False, untie=True)
    with pytest.raises(ValueError, match=r"head\.weight was the same tensor"):
        carry_optimizer(optimizer, model, certificate)
    done = carry_optimizer(optimizer, model, certificate, second_moments="reset")
    assert "token_embedding.weight" in done.reset and "blocks.0.mlp.up.weight" in done.carried


def test_heads_of_low_rank_start_anew():
    model = make("rotary", attention_bias=True, bias=True)
    with torch.no_grad():
        model.blocks[0].attention.value.weight[4:8] = 0
        model.blocks[0].attention.value.bias[4:8] = 0
    optimizer = optimizer_of("sgdm", model, lr=0.0)
    step(model, optimizer, 0)
    certificate = gauge.canonicalize(model, check=False)
    done = carry_optimizer(optimizer, model, certificate, second_moments="reset")
    value, norm = "blocks.0.attention.value", "blocks.0.attention_norm"
    output = "blocks.0.attention.output.weight"
    # the norm that they read goes with them
    assert set(done.reset) == {f"{value}.weight", f"{value}.bias", output, f"{norm}.weight", f"{norm}.bias"}
    assert (
        disagreement(
            buffers(model, optimizer, "momentum_buffer"),
            {name: found for name, found in gradients_of(model).items() if name not in done.reset},
        )
        < ROUNDING
    )


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_fingerprints():
    model = make()
    layout, weights = gauge.model_layout(model), ModuleWeights(model)
    own = fingerprint(layout, weights)
    assert own == fingerprint(layout, ModuleWeights(make()))
    assert own != fingerprint(layout, ModuleWeights(make(seed=1)))
    assert own != fingerprint(layout, ModuleWeights(copy.deepcopy(model).float()))
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-12 + parameter.view(-1)[-1].abs() * 1e-12
        assert fingerprint(layout, weights) != own, name
        with torch.no_grad():
            parameter.copy_(kept)
    assert fingerprint(layout, weights) == own
    # A sample: what lies between its rows is not seen.
    with torch.no_grad():
        model.token_embedding.weight[1] += 1
    assert fingerprint(layout, weights) == own


def test_certificates_name_both_ends():
    model = make("untied")
    layout = gauge.model_layout(model)
    source = fingerprint(layout, ModuleWeights(model))
    certificate = gauge.canonicalize(model, check=False)
    target = fingerprint(layout, ModuleWeights(model))
    assert (certificate.source, certificate.target) == (source, target) and source != target
    again = Certificate.from_json(certificate.to_json(), certificate.transforms)
    assert (again.source, again.target) == (source, target)
    # those of older versions name none
    old = {key: value for key, value in json.loads(certificate.to_json()).items() if key not in ("source", "target")}
    assert Certificate.from_json(json.dumps(old), certificate.transforms).source == ""
