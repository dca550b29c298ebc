"""Canonical form of whole models: the function is kept, and models that differ by a gauge move become equal."""

import copy
import json

import pytest
import tiny_transformers as tiny
import torch

from erlangen import breaking, gauge
from erlangen.gauge import _canonical_heads, moves
from erlangen.gauge._fold import plan
from erlangen.gauge._weights import ModuleWeights, PendingWeights
from erlangen.gauge.canonical import canonical_form
from erlangen.gauge.certificate import Certificate
from erlangen.gauge.moves import _Random
from erlangen.lm import GPT, GPTConfig

OURS = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "unbiased": {"attention_bias": False},
    "grouped": {"num_kv_heads": 2, "mlp": "swiglu"},
    "rotary": {"positions": "rotary", "tie_embeddings": False, "bias": False},
    "partly rotary": {"positions": "rotary", "rotary_fraction": 0.5, "num_kv_heads": 1},
    "qk-norm": {"qk_norm": True, "positions": "rotary", "mlp": "swiglu", "num_kv_heads": 2},
    "qk-norm, learned positions": {"qk_norm": True},
    "prelu": {"mlp": "prelu"},
}
TOKENS = torch.randint(37, (3, 12), generator=torch.Generator().manual_seed(5))


def make(name="plain", seed=0, dtype=torch.float64, **fields):
    generator = torch.Generator().manual_seed(seed)
    shape = {"vocab_size": 37, "context_length": 12, "num_layers": 2, "num_heads": 4, "dim": 16, "mlp_dim": 24}
    model = GPT(GPTConfig(**shape | OURS[name] | fields), generator=generator).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.to(dtype)


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens)[0].double()


def copied(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(model, other):
    """Over all parameters, relative to the largest entry of each."""
    other = other if isinstance(other, dict) else dict(other.named_parameters())
    return max(
        ((value - other[name]).abs().max() / value.abs().max().clamp_min(1e-3)).item()
        for name, value in copied(model).items()
    )


def moved(model, condition=10.0, seed=1, **options):
    return gauge.random_move(copy.deepcopy(model), condition, torch.Generator().manual_seed(seed), **options)


# --- our own models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [10.0, 1e4])
@pytest.mark.parametrize("name", OURS)
def test_models_that_differ_by_a_move_become_equal(name, condition):
    model = make(name)
    before, other = logits(model), moved(model, condition)
    # Rounding is at most that of numbers as large as the condition; 1e3 is for their sums.
    tolerance = 1e3 * condition * torch.finfo(torch.float64).eps
    assert largest_difference(model, other) > 1
    assert (logits(other) - before).abs().max() < tolerance
    certificate = gauge.canonicalize(model, check=False)
    gauge.canonicalize(other, check=False)
    assert certificate.leftover == []
    assert (logits(model) - before).abs().max() < 1e-12
    # The gaps of the spectra, at least a thousandth here, stand between rounding and singular vectors.
    assert largest_difference(model, other) < 1e2 * tolerance
    again = copied(model)
    gauge.canonicalize(model, check=False)
    assert largest_difference(model, again) < 1e-10


@pytest.mark.parametrize("name", ["plain", "untied", "grouped", "rotary"])
def test_with_the_residual_frame_and_the_shift_of_logits(name):
    options = {"residual": True, "logit_shift": True}
    model = make(name)
    before, other = logits(model).log_softmax(-1), moved(model, 100.0, **options)
    assert (logits(other).log_softmax(-1) - before).abs().max() < 1e-10
    gauge.canonicalize(model, check=False, **options)
    gauge.canonicalize(other, check=False, **options)
    assert (logits(model).log_softmax(-1) - before).abs().max() < 1e-12
    assert largest_difference(model, other) < 1e-8


def test_frames_are_left_unless_asked_for():
    model = make("untied")
    other = moved(model, residual=True)
    gauge.canonicalize(model, check=False)
    gauge.canonicalize(other, check=False)
    assert largest_difference(model, other) > 1e-2


def test_another_function_stays_another():
    model = make()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].attention.query.weight[0, 0] += 1e-4
    gauge.canonicalize(model, check=False)
    gauge.canonicalize(moved(other), check=False)
    gauge.canonicalize(other, check=False)
    assert largest_difference(model, other) > 1e-6


@pytest.mark.parametrize("name", ["rotary", "qk-norm"])
def test_a_general_matrix_is_no_move_where_positions_or_norms_stand_between(name):
    model = make(name, num_kv_heads=4)
    before = logits(model)
    attention = model.blocks[0].attention
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        for part, factor in ((attention.query, matrix), (attention.key, torch.linalg.inv(matrix).mT)):
            part.weight[:4] = factor @ part.weight[:4]
            part.bias[:4] = factor @ part.bias[:4]
    assert (logits(model) - before).abs().max() > 1e-4


def test_untied_on_request():
    model = make("grouped")
    before, table = logits(model), model.token_embedding.weight
    certificate = gauge.canonicalize(model, untie=True, residual=True)
    assert (logits(model) - before).abs().max() < 1e-12
    assert model.head.weight is not table and model.token_embedding.weight is table
    assert model.config.tie_embeddings is False
    assert "residual.matrix" in certificate.transforms
    gram = table.detach().mT @ table.detach()
    # The columns are orthogonal, but for the basis of vectors without a mean in which they are written.
    values = torch.linalg.eigvalsh(gram).flip(0)[:-1]
    from erlangen.gauge._canonical_residual import mean_free_basis

    basis = mean_free_basis(16, table.device)
    assert torch.allclose(basis.mT @ gram @ basis, values.diag(), atol=1e-10)


def test_canonical_weights():
    model = make("rotary")
    certificate = gauge.canonicalize(model, logit_shift=True)
    block = model.blocks[0]
    assert torch.allclose(block.attention_norm.weight, torch.ones(16).double())
    assert block.attention.query.weight.sum(dim=1).abs().max() < 1e-12
    assert block.attention.output.weight.sum(dim=0).abs().max() < 1e-12
    assert model.token_embedding.weight.sum(dim=1).abs().max() < 1e-12
    assert model.head.weight.sum(dim=0).abs().max() < 1e-12
    value = block.attention.value.weight.unflatten(0, (4, 4)).detach()
    bias = block.attention.value.bias.detach()
    assert bias.abs().max() == 0
    spectrum = certificate.spectra[0]["value_output"]
    assert torch.allclose(value @ value.mT, spectrum.diag_embed(), atol=1e-12)
    assert torch.all(spectrum[:, :-1] >= spectrum[:, 1:])


def test_spectra_are_those_of_the_products():
    model = make("unbiased", bias=False)
    other = copy.deepcopy(model)
    spectra = gauge.canonicalize(model, check=False, order="kept").spectra
    for layer, block in enumerate(other.blocks):
        gain = block.attention_norm.weight
        parts = [(part.weight * gain).unflatten(0, (4, 4)) for part in (block.attention.query, block.attention.key)]
        query, key = (part - part.mean(dim=-1, keepdim=True) for part in parts)
        expected = torch.linalg.svdvals(query.mT @ key)[:, :4]
        assert torch.allclose(spectra[layer]["query_key"], expected.detach(), rtol=1e-10)


def test_order():
    model = make()
    kept = copy.deepcopy(model)
    gauge.canonicalize(kept, order="kept", check=False)
    certificate = gauge.canonicalize(model, check=False)
    sizes = certificate.spectra[1]
    strength = sizes["query_key"].norm(dim=1) * sizes["value_output"].norm(dim=1)
    assert torch.all(strength[:-1] >= strength[1:])
    features = model.blocks[0].mlp.up.weight.detach(), kept.blocks[0].mlp.up.weight.detach()
    assert not torch.allclose(*features)
    assert torch.allclose(*(part.norm(dim=1).sort().values for part in features))
    with pytest.raises(ValueError, match='"sorted" or "kept"'):
        gauge.canonicalize(model, order="random")


# --- degenerate heads -------------------------------------------------------------------------------------------------


def test_heads_of_low_rank():
    model = make()
    attention = model.blocks[0].attention
    with torch.no_grad():
        attention.key.weight[2] = attention.key.weight[3]
        attention.key.weight[1] = 2 * attention.key.weight[3]
        attention.value.weight[4:8] = 0
    before, other = logits(model), moved(model, 1e3)
    certificate = gauge.canonicalize(model, check=False)
    assert len(gauge.canonicalize(other, check=False).leftover) == len(certificate.leftover) == 2
    assert any("rank 2 of 4" in line for line in certificate.leftover)
    assert any("rank 0 of 4" in line for line in certificate.leftover)
    assert (logits(model) - before).abs().max() < 1e-12
    assert largest_difference(model, other) < 1e-7
    with pytest.raises(ValueError, match="set to zero"):
        certificate.apply_to("blocks.0.attention.key", torch.ones(16, 16))


def test_equal_singular_values():
    model = make("unbiased", bias=False)
    attention = model.blocks[0].attention
    with torch.no_grad():
        model.blocks[0].attention_norm.weight.fill_(1)
        for part in (attention.query, attention.key):
            rows = part.weight[:4] - part.weight[:4].mean(dim=1, keepdim=True)
            part.weight[:4] = torch.linalg.qr(rows.mT).Q.mT
    before, other = logits(model), moved(model, 100.0)
    certificate = gauge.canonicalize(model, check=False)
    gauge.canonicalize(other, check=False)
    assert any("nearly equal" in line for line in certificate.leftover)
    assert (logits(model) - before).abs().max() < 1e-12
    assert largest_difference(model, other) < 1e-8


# --- precision and the certificate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    model = make("grouped", dtype=dtype)
    certificate = gauge.canonicalize(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    name = str(dtype).removeprefix("torch.")
    # Weights rounded once more cost no more than a few times what computing in that precision costs anyway.
    assert certificate.max_logit_difference[name] < 4 * certificate.rounding["before"][name]
    # In float64 nothing is left but that rounding.
    assert 0 < certificate.max_logit_difference["float64"] < 4 * certificate.rounding["before"][name]


def test_certificate():
    model = make("partly rotary")
    before = copy.deepcopy(model)
    certificate = gauge.canonicalize(model, inputs=TOKENS)
    found = certificate.max_logit_difference
    assert found["float64"] == pytest.approx((logits(model) - logits(before)).abs().max().item(), abs=1e-14)
    assert 1e-9 < found["float32"] < 1e-4 < found["bfloat16"] < 1
    assert certificate.logit_scale == pytest.approx(logits(before).square().mean().sqrt().item())
    assert certificate.rounding["before"]["float32"] > 0
    assert "3, 12" in str(certificate) and "bfloat16" in str(certificate)
    again = Certificate.from_json(certificate.to_json(), certificate.transforms)
    assert json.loads(again.to_json()) == json.loads(certificate.to_json())
    assert gauge.canonicalize(model, check=False).max_logit_difference == {}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("order", ["sorted", "kept"])
def test_heads_a_few_at_a_time_are_the_heads_all_at_once(name, order, monkeypatch):
    found = []
    for numbers in (1, 1 << 30):
        monkeypatch.setattr(_canonical_heads, "_AT_A_TIME", numbers)
        model = make(name)
        found.append((model, gauge.canonicalize(model, order=order, check=False)))
    (pieces, one), (whole, other) = found
    # The arithmetic is the same; the products of batches of matrices may be summed in another order.
    assert largest_difference(pieces, whole) < 1e-11
    assert one.maps == other.maps and one.folded == other.folded and sorted(one.leftover) == sorted(other.leftover)
    assert one.transforms.keys() == other.transforms.keys()
    for key, tensor in one.transforms.items():
        assert torch.allclose(tensor, other.transforms[key], rtol=1e-9, atol=1e-11), key
    for layer, spectra in one.spectra.items():
        for key, tensor in spectra.items():
            assert torch.allclose(tensor, other.spectra[layer][key], rtol=1e-9, atol=1e-11), key


def test_heads_that_share_something_are_treated_together(monkeypatch):
    monkeypatch.setattr(_canonical_heads, "_AT_A_TIME", 1)
    read, sizes = _canonical_heads.Heads.read, []

    def counting(weights, attention):
        sizes.append(attention.num_kv_heads)
        return read(weights, attention)

    monkeypatch.setattr(_canonical_heads.Heads, "read", counting)
    gauge.canonicalize(make(num_layers=1), check=False)
    assert sizes == [1, 1, 1, 1]
    sizes.clear()
    gauge.canonicalize(tiny.make("deepseek_v2").double(), check=False)
    assert set(sizes) == {2}


def test_the_certificate_sees_a_broken_treatment(monkeypatch):
    from erlangen.gauge import canonical

    form = canonical.canonical_form

    def broken(layout, weights, **options):
        record = form(layout, weights, **options)
        weights["blocks.0.mlp.up.weight"] = 1.01 * weights["blocks.0.mlp.up.weight"]
        return record

    monkeypatch.setattr(canonical, "canonical_form", broken)
    assert gauge.canonicalize(make()).max_logit_difference["float64"] > 1e-5


@pytest.mark.parametrize("name", OURS)
def test_changes_of_weights_are_carried_along(name):
    """Old weights with a change, and canonical weights with the change carried along, are the same function."""
    model, options = make(name), {"residual": True, "untie": OURS[name].get("tie_embeddings", True)}
    changed = copy.deepcopy(model)
    certificate = gauge.canonicalize(model, check=False, **options)
    generator = torch.Generator().manual_seed(3)
    for path in sorted(certificate.maps):
        entry, old, new = certificate.maps[path], copy.deepcopy(changed), copy.deepcopy(model)
        if options["untie"] and path in ("token_embedding.weight", "head"):
            continue  # where they were one tensor, a change of one of the two is none of the old model
        if name == "unbiased" and path.endswith("attention.output"):
            with pytest.raises(ValueError, match="no output bias"):
                certificate.apply_to(path, torch.zeros(16, 16))
            continue
        delta = 0.1 * torch.randn(model.get_parameter(entry["weight"]).shape, generator=generator).double()
        with torch.no_grad():
            old.get_parameter(entry["weight"]).add_(delta)
            new.get_parameter(entry["weight"]).add_(certificate.apply_to(path, delta))
            for bias, shift in certificate.bias_shifts(path, delta).items():
                new.get_parameter(bias).add_(shift)
        assert (logits(old) - logits(changed)).abs().max() > 1e-4, path
        assert (logits(old) - logits(new)).abs().max() < 1e-11, path
    with pytest.raises(ValueError, match="no map that was treated"):
        certificate.apply_to("blocks.7", torch.zeros(2, 2))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_errors_leave_the_model_as_it_was():
    model = make()
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[0, 0] = float("nan")
    before = copied(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.down\.weight holds values that are not finite"):
        gauge.canonicalize(model, check=False)
    assert all(torch.equal(value, before[name]) for name, value in copied(model).items() if "down" not in name)
    with pytest.raises(ValueError, match="no output folder"):
        gauge.canonicalize(model, "somewhere")
    with pytest.raises(ValueError, match="give the output folder"):
        gauge.canonicalize("somewhere")
    with pytest.raises(TypeError, match="a model or a folder"):
        gauge.canonicalize(3)
    with pytest.raises(TypeError, match="no layout is known for Linear"):
        gauge.canonicalize(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="untie"):
        gauge.canonicalize(make("untied"), untie=True)
    with pytest.raises(ValueError, match="condition"):
        gauge.random_move(make(), 0.5)
    with pytest.raises(ValueError, match="meta device"):
        gauge.canonicalize(make().to("meta"))
    layout = gauge.model_layout(make(dim=32))
    with pytest.raises(ValueError, match="must have the shape"):
        canonical_form(layout, ModuleWeights(make()))


def test_moves_are_reproducible():
    model = make()
    assert largest_difference(moved(model), moved(model)) == 0
    assert largest_difference(moved(model), moved(model, seed=2)) > 0.1
    kept = moved(model, permute=False)
    order = gauge.canonicalize(kept, order="kept", check=False), gauge.canonicalize(model, order="kept", check=False)
    assert largest_difference(kept, model) < 1e-10, order


# --- models of transformers -------------------------------------------------------------------------------------------


def _options(model):
    return {"residual": plan(gauge.model_layout(model)).rotations != "none"}


@pytest.mark.parametrize("name", tiny.MODELS)
def test_models_of_transformers(name):
    pytest.importorskip("transformers")
    model = tiny.make(name)
    tokens, options = tiny.some_tokens(), _options(model)
    with torch.no_grad():
        before = tiny.outputs(model, tokens)
        other = moved(model, 30.0, **options)
        assert (tiny.outputs(other, tokens) - before).abs().max() < 1e-10
        gauge.canonicalize(model, check=False, **options)
        gauge.canonicalize(other, check=False, **options)
        assert (tiny.outputs(model, tokens) - before).abs().max() < 1e-11
    assert largest_difference(model, other) < 1e-7


def test_certificate_of_a_model_of_transformers():
    pytest.importorskip("transformers")
    model = tiny.make("qwen3").float()
    certificate = gauge.canonicalize(model.double())
    assert certificate.max_logit_difference["float64"] < 1e-12
    experts = gauge.canonicalize(tiny.make("deepseek_v2 experts"))
    assert experts.max_logit_difference["float64"] < 1e-12
    assert any("1 mixtures of experts: what softmax does not see" in line for line in experts.folded)


def without_eps(name, patch):
    """A model of one layer without eps in any norm, and a layout that says so."""
    model_class, config_class, fields = tiny.MODELS[name]
    no_eps = {"num_hidden_layers": 1, "rms_norm_eps": 0.0, "layer_norm_eps": 0.0}
    no_eps = {"n_layer": 1, "layer_norm_epsilon": 0.0} if "gpt2" in name else no_eps
    if name.startswith("deepseek"):
        # Quadratic forms of latents need more tokens than they have numbers.
        no_eps |= {
            "hidden_size": 6,
            "kv_lora_rank": 4,
            "vocab_size": 24,
            "first_k_dense_replace": int("experts" not in name),
        }
        no_eps |= {"q_lora_rank": None if "lite" in name else 4}
        patch.setattr("erlangen.interop.layouts._LATENT_EPS", 0.0)
    patch.setitem(tiny.MODELS, name, (model_class, config_class, fields | no_eps))
    return tiny.without_eps(tiny.make(name))


DEEPSEEK = ["deepseek_v2", "deepseek_v2 lite", "deepseek_v2 experts"]


@pytest.mark.parametrize("name", ["gpt2", "gpt2 base", "llama", "qwen3", "gemma2", "gpt_neox in turn", *DEEPSEEK])
def test_every_flat_direction_is_fixed(name, monkeypatch):
    """Steps along null vectors of the Jacobian, which no formula here knows of, lead to the same canonical form."""
    pytest.importorskip("transformers")
    model = without_eps(name, monkeypatch)
    layout = gauge.model_layout(model)
    steps, has_logits = plan(layout), "base" not in name
    tokens = tiny.some_tokens(24, 6, vocab_size=layout.vocab_size)
    names = [key for key, _ in model.named_parameters()]
    sizes = [model.get_parameter(key).numel() for key in names]
    start = torch.cat([model.get_parameter(key).detach().flatten() for key in names])

    def function(values):
        parameters = {k: v.view_as(model.get_parameter(k)) for k, v in zip(names, values.split(sizes))}
        with tiny.InFloat64():
            found = torch.func.functional_call(model, parameters, (tokens,))
        found = found.logits.log_softmax(-1) if has_logits else found.last_hidden_state
        return found.flatten()

    jacobian = torch.func.jacrev(function, chunk_size=256)(start)
    # Outputs outnumber parameters, so the null space is of the map and not of the sample.
    assert jacobian.shape[0] > 1.2 * jacobian.shape[1]
    values, vectors = torch.linalg.eigh(jacobian.mT @ jacobian)
    null = vectors[:, values < 1e-13 * values[-1]]
    assert null.shape[1] > 50
    if name in DEEPSEEK:
        assert null.shape[1] == gauge.flat_directions(model).total
    direction = null @ torch.randn(null.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    forms, step = [], 1e-6
    options = {"logit_shift": has_logits, "residual": steps.rotations in ("all", "mean")}
    for size in (0.0, step):
        with torch.no_grad():
            for key, value in zip(names, (start + size * direction / direction.norm()).split(sizes)):
                model.get_parameter(key).copy_(value.view_as(model.get_parameter(key)))
        canonical = copy.deepcopy(model)
        gauge.canonicalize(canonical, check=False, **options)
        forms.append(copied(canonical))
    change = max((forms[0][key] - forms[1][key]).abs().max().item() for key in names)
    # A direction that is left shows as a change of a hundredth of the step; curvature and rounding as less.
    assert change < 1e-4 * step


class _Near(_Random):
    """In the place of random numbers far from the identity, those near to it; twice the same but for the sign."""

    step = 0.0

    def normal(self, *shape):
        return self.step * super().normal(*shape)

    def scales(self, *shape):
        return self.normal(*shape).exp()

    def signs(self, *shape):
        return torch.ones(shape, dtype=torch.float64)

    def rotations(self, number, width):
        values = self.normal(number, width, width)
        return torch.matrix_exp(values - values.mT)

    def matrices(self, number, width):
        values = self.normal(number, width, width)
        return torch.matrix_exp(values), torch.matrix_exp(-values.mT)

    def phases(self, number, width):
        angles = self.normal(number, width)
        return torch.polar(torch.ones_like(angles), angles)


@pytest.mark.parametrize("name", DEEPSEEK)
def test_moves_reach_every_flat_direction(name, monkeypatch):
    """The moves near the identity span as many dimensions as are counted (and as the Jacobian has null vectors)."""
    pytest.importorskip("transformers")
    model = without_eps(name, monkeypatch)
    layout, weights = gauge.model_layout(model), ModuleWeights(model)
    options = {"logit_shift": True, "residual": plan(layout).rotations in ("all", "mean")}
    gauge.canonicalize(model, check=False, **options)  # gains of 1 and no means: what moves near 1 start from
    monkeypatch.setattr(moves, "_Random", _Near)
    count = gauge.flat_directions(model).total

    def at(step, seed):
        monkeypatch.setattr(_Near, "step", step)
        pending = PendingWeights(weights)
        moves.move(layout, pending, 2.0, torch.Generator().manual_seed(seed), permute=False, **options)
        return torch.cat([pending[key].flatten() for key in layout.tensor_shapes()])

    assert (at(0.0, 0) - at(1e-4, 0)).abs().max() > 1e-5
    tangents = torch.stack([at(1e-4, seed) - at(-1e-4, seed) for seed in range(count + 10)])
    values = torch.linalg.svdvals(tangents)
    values = values / values[0]
    # Differences of second order are 1e-8 of the first.
    assert values[count - 1] > 1e-5 and values[count] < 1e-7, values[count - 3 : count + 3]


def test_unlearned_biases_are_not_overlooked():
    model = breaking.break_symmetry(make())
    before = copied(model)
    for treat in (gauge.canonicalize, gauge.random_move, lambda broken: gauge.compare(broken, make())):
        with pytest.raises(ValueError, match="unlearned biases"):
            treat(model)
    assert all(torch.equal(value, before[name]) for name, value in copied(model).items())
    gauge.canonicalize(breaking.restore(model))
