"""Shrinking: the same function in fewer numbers, and the best of it where some are dropped."""

import copy
import itertools

import pytest
import tiny_transformers as tiny
import torch
from torch import nn

from erlangen import gauge
from erlangen.gauge import _shrink_sectors as sectors
from erlangen.gauge._outputs import outputs
from erlangen.gauge._reduced import ReducedLinear, Rows, reduce_inputs, reduce_rows
from erlangen.gauge.shrink import SECTORS, Shrunk, measured_moments
from erlangen.lm import GPT, GPTConfig

EVERY = float("inf")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gpt(seed=0, scale=10.0, **fields):
    """A small GPT in float64, its numbers large enough that attention is not flat."""
    sizes = {"vocab_size": 17, "dim": 24, "num_heads": 4, "num_layers": 2, "context_length": 12, "mlp": "gelu"}
    generator = torch.Generator().manual_seed(seed)
    model = GPT(GPTConfig(**sizes | fields), generator=generator).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            elif "embedding" not in name:
                parameter.mul_(scale)
    return model


TOKENS = torch.randint(17, (3, 10), generator=torch.Generator().manual_seed(5))
GPTS = {
    "learned positions": {"positions": "learned", "tie_embeddings": True},
    "untied, biased": {"positions": "learned", "tie_embeddings": False, "bias": True, "attention_bias": True},
    "rotary, grouped": {"positions": "rotary", "num_kv_heads": 2},
    "norms of queries and keys": {"positions": "learned", "qk_norm": True, "num_kv_heads": 2},
    "partial rotary, biased": {"positions": "rotary", "rotary_fraction": 0.5, "attention_bias": True, "bias": True},
}


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens)[0]


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def saved_numbers(layout):
    """What an identity block in the keys and one in the values of every head leave out."""
    total = 0
    for layer in layout.layers:
        heads = layer.attention
        plain = 0 if heads.qk_norm else heads.head_dim - heads.rotary_dim
        inputs = heads.value.heads(torch.empty(layout.tensor_shapes()[heads.value.weight])).shape[-1]
        total += heads.num_kv_heads * (min(heads.value_width, inputs - 1) * heads.value_width + plain**2)
    return total


# --- nothing is lost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GPTS)
@pytest.mark.parametrize("noise", [EVERY, 1.5])
def test_logits_of_our_models_stay(name, noise):
    model = gpt(**GPTS[name])
    before, layout = logits(model), gauge.model_layout(model)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    found = gauge.shrink(model, noise=noise, check=False)
    assert distance(logits(model), before) < 1e-12
    assert found.numbers == (numbers, sum(parameter.numel() for parameter in model.parameters()))
    if noise == EVERY:
        assert (
            numbers - found.numbers[1] == saved_numbers(layout) == found.multiplications[0] - found.multiplications[1]
        )
    else:
        assert all(sector.noise <= noise for each in found.layers.values() for sector in each.values() if sector.block)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_families_of_transformers(name):
    pytest.importorskip("transformers")
    model = tiny.make(name)
    tokens, layout = tiny.some_tokens(), gauge.model_layout(model)
    with torch.no_grad():
        before = tiny.outputs(model, tokens)
        found = gauge.shrink(model, noise=EVERY, check=False)
        assert distance(tiny.outputs(model, tokens), before) < 1e-12
    assert found.multiplications[0] - found.multiplications[1] == saved_numbers(layout)
    assert found.numbers[0] - found.numbers[1] == saved_numbers(layout)


def test_a_wrong_number_shows():
    model = gpt(**GPTS["learned positions"])
    exact = gauge.shrink(copy.deepcopy(model))
    assert exact.max_logit_difference["float64"] < 1e-12 * exact.logit_scale
    before = logits(model)
    gauge.shrink(model, check=False)
    with torch.no_grad():
        model.get_submodule("blocks.1.attention.value").parts[0].weight[3, 5] += 1e-6
    assert distance(logits(model), before) > 1e-9


def test_sectors_that_have_no_block_say_why():
    whys = {
        "rotary, grouped": "rotary positions leave one complex number a plane",
        "norms of queries and keys": "norms of queries and keys leave no change of basis",
        "partial rotary, biased": "rotary positions turn 2 of the 6 coordinates",
    }
    for name, why in whys.items():
        model = gpt(**GPTS[name])
        query = model.get_parameter("blocks.0.attention.query.weight").detach().clone()
        found = gauge.shrink(model, check=False)
        assert why in found.layers[0]["query_key"].left and any(why in note for note in found.notes)
        assert found.layers[0]["value_output"].block > 0 == len(found.layers[0]["value_output"].left)
        if "partial" not in name:
            assert torch.equal(model.get_parameter("blocks.0.attention.query.weight"), query)
            assert found.layers[0]["query_key"].block == 0


def test_heads_of_low_rank():
    model = gpt(**GPTS["untied, biased"])
    with torch.no_grad():
        for name in ("value", "key"):
            weight = model.get_submodule("blocks.0.attention").get_submodule(name).weight
            weight[2:6] = weight[:1] * torch.arange(4)[:, None]
    before = logits(model)
    gauge.shrink(model, noise=EVERY, check=False)
    assert distance(logits(model), before) < 1e-11


def test_what_else_a_model_has_is_kept():
    model = gpt(**GPTS["rotary, grouped"]).float().train()
    model.get_submodule("blocks.0.attention.value").requires_grad_(False)
    found = gauge.shrink(model)
    frozen, free = (model.get_submodule(f"blocks.{number}.attention.value") for number in range(2))
    assert isinstance(frozen, ReducedLinear) and frozen.training and model.training
    assert not any(p.requires_grad for p in frozen.parameters()) and all(p.requires_grad for p in free.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert found.max_logit_difference.keys() == {"float64", "float32", "bfloat16"}
    assert found.max_logit_difference["float64"] < 1e-5 * found.logit_scale
    # the record survives JSON, and a state dict goes into a model that was prepared by it
    again = Shrunk.from_json(found.to_json())
    assert again == found and str(again) == str(found)
    new = gpt(seed=9, **GPTS["rotary, grouped"]).float()
    gauge.reduce_maps(new, again.maps)
    new.load_state_dict(model.state_dict())
    assert torch.equal(logits(new), logits(model))
    with pytest.raises(ValueError, match="has no linear map"):
        gauge.reduce_maps(gpt(num_layers=1), again.maps)


# --- the module -------------------------------------------------------------------------------------------------------


def reduced(bias=True, alike=True):
    """A map of 3 heads of 4 rows (the last of 3, if not alike), 2 rows behind them and 2 outputs that are zero."""
    weight, columns = draw(16, 10), torch.tensor([7, 2, 4])
    lengths = [4, 4, 4 if alike else 3]
    starts = [0, 6, 10]
    places = [torch.arange(start, start + length) for start, length in zip(starts, lengths)]
    for rows in places:
        weight[rows[:3][:, None], columns] = torch.eye(3, dtype=torch.float64)
        weight[rows[3:][:, None], columns] = 0
    order = torch.cat(places if alike else [*(rows[:3] for rows in places), *(rows[3:] for rows in places)])
    plain = torch.tensor([4, 14])
    zero = sorted(set(range(16)) - set(order.tolist()) - set(plain.tolist()))
    weight[zero] = 0
    offset = draw(16, seed=1) if bias else None
    if offset is not None:
        offset[zero] = 0
    claims = [
        Rows(order, weight[order], None if offset is None else offset[order], columns, 3, 4 if alike else 3),
        Rows(plain, weight[plain], None if offset is None else offset[plain]),
    ]
    found = reduce_rows(16, 10, claims)
    return found.module(torch.float64, torch.device("cpu")), weight, offset


@pytest.mark.parametrize(("bias", "alike"), list(itertools.product([True, False], [True, False])))
def test_a_reduced_map_is_the_dense_one(bias, alike):
    module, weight, offset = reduced(bias, alike)
    dense, dense_bias = module.dense()
    assert torch.equal(dense, weight) and (offset is None or torch.equal(dense_bias, offset))
    stored = sum(tensor.numel() for name, tensor in module.state_dict().items() if name.endswith("weight"))
    assert stored == (12 if alike else 11) * 7 + 2 * 10 < weight.numel()
    for shape in ((10,), (5, 10), (2, 3, 10)):
        x = draw(*shape, seed=2).requires_grad_()
        reference = x.detach().clone().requires_grad_()
        whole = weight.clone().requires_grad_()
        grad = draw(*shape[:-1], 16, seed=3)
        y, expected = module(x), nn.functional.linear(reference, whole, offset)
        assert y.shape == expected.shape and torch.allclose(y, expected, atol=1e-13)
        module.zero_grad()
        y.backward(grad)
        expected.backward(grad)
        assert torch.allclose(x.grad, reference.grad, atol=1e-13)
        part, order = module.parts[0], module.parts[0].order.long()
        rows = module.places[: part.weight.shape[0]].long()
        assert torch.allclose(part.weight.grad, whole.grad[rows][:, order[3:]], atol=1e-13)
        if bias:
            assert torch.allclose(module.bias.grad, grad.flatten(0, -2).sum(0)[module.places.long()] if x.ndim > 1
                                  else grad[module.places.long()], atol=1e-13)  # fmt: skip
    assert torch.autograd.gradcheck(module, (draw(2, 10).requires_grad_(),))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), module(x))
    again = ReducedLinear.of_plan(_plan(module))
    again.double().load_state_dict(module.state_dict())
    assert torch.equal(again(x), module(x))


def _plan(module):
    return {
        "in_features": 10, "out_features": 16, "bias": module.bias is not None, "placed": True,
        "parts": [[part.weight.shape[0], part.heads, part.width, part.block] for part in module.parts],
    }  # fmt: skip


@pytest.mark.parametrize(("bias", "alike"), [(True, False), (False, True)])
def test_a_reduced_map_in_low_precision(bias, alike):
    """There the product starts from the chosen inputs; values and gradients, against the dense map."""
    module = reduced(bias, alike)[0].bfloat16()
    weight, offset = module.dense()
    x = draw(40, 10).bfloat16().requires_grad_()
    grad = draw(40, 16, seed=1).bfloat16()
    module(x).backward(grad)
    exact = nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    plain = nn.functional.linear(x, weight, offset)
    error, own = ((y.double() - exact).square().mean().sqrt() for y in (module(x), plain))
    assert error < 2 * own
    assert torch.allclose(x.grad.double(), grad.double() @ weight.double(), atol=0.1)
    part = module.parts[0]
    expected = grad.double()[:, module.places[: part.weight.shape[0]].long()].T @ x.double()[:, part.order[3:].long()]
    assert torch.allclose(part.weight.grad.double(), expected, atol=0.2)


def test_a_reduced_map_under_autocast():
    module = reduced()[0].float()
    x = draw(5, 10).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16 and (y - module(x)).abs().max() < 0.03 * y.abs().max()
    assert module(x[:0]).shape == (0, 16)


def test_a_map_of_some_inputs():
    weight, bias, inputs = draw(5, 9), draw(5), torch.tensor([1, 2, 8])
    module = reduce_inputs(weight, inputs, bias).module(torch.float64, torch.device("cpu"))
    seen = torch.zeros_like(weight)
    seen[:, inputs] = weight[:, inputs]
    assert torch.equal(module.dense()[0], seen)
    x = draw(4, 9, seed=1)
    assert torch.allclose(module(x), x @ seen.T + bias, atol=1e-13)
    assert "stored=15 of 45" in repr(module)


def test_a_dense_map_is_not_replaced():
    assert reduce_rows(4, 3, [Rows(torch.arange(4), draw(4, 3))]) is None
    with pytest.raises(ValueError, match="described by its sizes"):
        ReducedLinear.of_plan({"in_features": 3})


# --- the identity block -----------------------------------------------------------------------------------------------


def heads(number=4, width=6, inputs=30, seed=0):
    return draw(number, width, inputs, seed=seed), draw(number, width, 20, seed=seed + 1)


def explicit_noise(first, second):
    """√(Σ ‖aᵢ‖² ‖bᵢ‖²) / ‖Aᵀ B‖"""
    return (first.square().sum(1) @ second.square().sum(1)).sqrt() / (first.T @ second).norm()


def test_blocks_keep_products_and_their_noise_is_as_said():
    first, second = heads()
    ones = torch.ones(30, dtype=torch.float64), torch.ones(20, dtype=torch.float64)
    for limit in (EVERY, 2.0, 1.1):
        found = sectors.identity_block(list(first), list(second), ones, 30, limit)
        size = found.columns.numel()
        for head in range(4):
            one, two = found.first[head], found.second[head]
            assert torch.allclose(one.T @ two, first[head].T @ second[head], atol=1e-10)
            assert torch.equal(one[:, found.columns], torch.eye(6, size, dtype=torch.float64))
            assert abs(explicit_noise(one, two) - found.noise[head]) < 1e-9
        assert max(found.noise) <= limit
    assert size < 6  # the strictest limit has fewer columns


def test_heads_that_share_no_inputs_have_no_block():
    first, second = heads(2)
    first[0, :, 15:], first[1, :, :15] = 0, 0
    ones = torch.ones(30, dtype=torch.float64), torch.ones(20, dtype=torch.float64)
    found = sectors.identity_block(list(first), list(second), ones, 30, 100.0)
    assert found.columns is None and torch.equal(torch.stack(found.first), first)
    assert found.noise[0] == pytest.approx(explicit_noise(first[0], second[0]).item())


def test_noise_is_one_in_the_balanced_form():
    from erlangen.gauge.forms import balanced

    form = balanced(*heads(), dtype=torch.float64)
    for one, two in zip(form.first, form.second):
        assert explicit_noise(one, two) == pytest.approx(1.0)


def test_sizes_of_inputs_count():
    """Inputs of a thousandth of the size are not chosen, though their weights are as large."""
    first, second = heads()
    sizes = torch.ones(30, dtype=torch.float64)
    sizes[:15] = 1e-3
    found = sectors.identity_block(list(first), list(second), (sizes, sizes.new_ones(20)), 30, EVERY)
    assert found.columns.min() >= 15
    assert torch.allclose(found.first[1].T @ found.second[1], first[1].T @ second[1], atol=1e-9)


def test_pivots_are_greedy_in_the_product_over_heads():
    bases = [torch.linalg.qr(rows.T).Q.T for rows in heads(3, 4, 9)[0]]
    chosen = sectors.joint_pivots(bases, 4).tolist()
    for step in range(4):
        volumes = []
        for column in range(9):
            some = [*chosen[:step], column]
            volumes.append(sum(torch.linalg.svdvals(basis[:, some]).log().sum().item() for basis in bases))
        free = [column for column in range(9) if column not in chosen[:step]]
        assert chosen[step] == max(free, key=volumes.__getitem__)


def rounded_error(first, second, x):
    """Relative error of what heads give, when weights and values are rounded to bfloat16."""

    def rounded(tensor):
        return tensor.bfloat16().double()

    exact = torch.einsum("nd,hkd,hkc->nhc", x, first, second)
    found = torch.einsum(
        "nhk,hkc->nhc", rounded(torch.einsum("nd,hkd->nhk", rounded(x), rounded(first))), rounded(second)
    )
    return ((found - exact).norm(dim=(0, 2)) / exact.norm(dim=(0, 2))).max().item()


def test_rounding_grows_as_said_and_the_first_columns_ruin_it():
    first, second = heads(12, 16, 192)
    x = draw(256, 192, seed=7)
    ones = torch.ones(192, dtype=torch.float64), torch.ones(20, dtype=torch.float64)
    found = sectors.identity_block(list(first), list(second), ones, 192, 2.0)
    own = rounded_error(first, second, x)
    ours = rounded_error(torch.stack(found.first), torch.stack(found.second), x)
    naive = torch.linalg.solve(first[:, :, :16], first)
    ruined = rounded_error(naive, first[:, :, :16].mT @ second, x)
    assert found.columns.numel() >= 12
    assert ours < 2 * own < 5 * own < ruined


def test_bfloat16_models_round_no_worse(monkeypatch):
    """Its own error of logits at most doubles (here: hardly grows); with the first columns it is far larger."""
    model = gpt(dim=64, num_heads=8, num_layers=2, positions="learned", scale=8.0).float()
    errors = {}
    tokens = torch.randint(17, (16, 12), generator=torch.Generator().manual_seed(3))
    for name, noise in (("ours", 2.0), ("first", EVERY)):
        shrunk = copy.deepcopy(model)
        if name == "first":
            monkeypatch.setattr(sectors, "joint_pivots", lambda bases, number: torch.arange(number))
        gauge.shrink(shrunk, noise=noise, check=False)
        errors[name] = outputs(shrunk, tokens, False)
    before = outputs(model, tokens, False)
    exact = before["float64"]
    assert distance(errors["ours"]["float64"], exact) < 1e-5
    own, ours, first = (
        (values["bfloat16"] - exact).square().mean().sqrt() for values in (before, errors["ours"], errors["first"])
    )
    assert ours < 1.5 * own and first > 3 * own


# --- truncation -------------------------------------------------------------------------------------------------------


def seen_inputs(model, path):
    """[tokens, inputs]: what a map reads, by a hook of our own."""
    rows = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, 1)))
    logits(model)
    handle.remove()
    return torch.cat(rows)


def products(model, number, first, second, width=6):
    """[heads, outputs or inputs of queries, inputs] of values with outputs, or of keys with queries; and of biases."""
    attention = model.get_submodule(f"blocks.{number}.attention")
    maps = [attention.get_submodule(name) for name in (first, second)]
    dense = [module.dense() if isinstance(module, ReducedLinear) else (module.weight, module.bias) for module in maps]
    (one, _), (two, _) = dense
    one = one.unflatten(0, (-1, width))
    two = two.T.unflatten(0, (-1, width)) if second == "output" else two.unflatten(0, (-1, width))
    group = two.shape[0] // one.shape[0]
    return (
        torch.einsum("hki,hko->hoi", one.repeat_interleave(group, 0), two)
        .detach()
        .unflatten(0, (-1, group))
        .flatten(1, 2)
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("rank", [1, 3])
def test_values_are_cut_as_the_inputs_see_them(kv_heads, rank):
    """Against the singular value decomposition of the whole product, over a root of the moments of the inputs."""
    model = gpt(positions="learned", num_kv_heads=kv_heads, attention_bias=False)
    x = seen_inputs(model, "blocks.0.attention.value")
    old = products(model, 0, "value", "output")
    found = gauge.shrink(model, keep={"value_output": rank}, inputs=TOKENS, check=False)
    new = products(model, 0, "value", "output")
    root = torch.linalg.cholesky(x.T @ x / len(x))  # no output bias here: the mean counts as the rest
    left, values, right = torch.linalg.svd(old @ root, full_matrices=False)
    best = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
    assert torch.allclose(new @ root, best, atol=1e-8)
    expected = (values[:, rank:].square().sum(1) / values.square().sum(1)).sqrt()
    sector = found.layers[0]["value_output"]
    assert torch.allclose(torch.tensor(sector.error, dtype=torch.float64), expected, atol=1e-8)
    assert sector.rank == [rank] * kv_heads and found.layers[0]["query_key"].error == [0.0] * kv_heads
    # rows that are dropped are neither stored nor multiplied
    value, output = (model.get_submodule(f"blocks.0.attention.{name}") for name in ("value", "output"))
    assert output.parts[0].weight.shape == (24, 4 * rank) and value.parts[0].weight.shape[0] == kv_heads * rank
    # the plain decomposition of the weights does worse on these inputs
    left, values, right = torch.linalg.svd(old, full_matrices=False)
    plain = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
    assert ((plain - old) @ root).norm() > ((new - old) @ root).norm()


def test_queries_and_keys_are_cut_as_the_inputs_see_them():
    model = gpt(positions="learned", attention_bias=False)
    x = seen_inputs(model, "blocks.0.attention.query")
    old = products(model, 0, "key", "query")  # [heads, inputs of queries, inputs of keys]
    gauge.shrink(model, keep={"query_key": 2}, inputs=TOKENS, check=False)
    new = products(model, 0, "key", "query")
    # a constant in the keys changes no weight of attention: only their covariance counts
    moments = (
        torch.linalg.cholesky(x.T @ x / len(x)),
        torch.linalg.cholesky(torch.cov(x.T, correction=0) + 1e-12 * torch.eye(24)),
    )
    spread = moments[0].T @ old @ moments[1]
    left, values, right = torch.linalg.svd(spread)
    best = (left[..., :2] * values[:, None, :2]) @ right[:, :2]
    assert torch.allclose(moments[0].T @ new @ moments[1], best, atol=1e-6)
    assert model.get_submodule("blocks.0.attention.query").parts[0].weight.shape == (8, 24)


def test_without_inputs_the_spectrum_is_the_invariant_one():
    model = gpt(positions="learned", attention_bias=True, bias=True)
    spectra = gauge.head_spectra(gauge.model_layout(model), gauge._weights.ModuleWeights(model), torch.float64)
    found = gauge.shrink(model, keep=3, check=False)
    for number, layer in enumerate(spectra):
        # values: the sum of outputs counts up to its mean only, which the invariant spectrum leaves out
        ours = torch.tensor(found.layers[number]["query_key"].spectrum, dtype=torch.float64)
        assert torch.allclose(ours, layer.query_key, rtol=1e-9)


def test_the_mean_of_what_is_dropped_goes_into_the_output_bias():
    model = gpt(positions="learned", attention_bias=True, bias=True)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.value.weight.zero_()
    before = logits(model)
    gauge.shrink(model, keep={"value_output": 1}, check=False)
    assert distance(logits(model), before) < 1e-12


def test_planes_are_dropped_as_a_whole_and_the_least_first():
    model = gpt(positions="rotary", num_heads=2, dim=16, num_kv_heads=1, attention_bias=False, bias=False)
    old = copy.deepcopy(model)
    found = gauge.shrink(model, keep={"query_key": 5}, check=False)
    key, query = (model.get_submodule(f"blocks.0.attention.{name}") for name in ("key", "query"))
    weights = [
        old.get_submodule(f"blocks.0.attention.{name}").weight.unflatten(0, (-1, 8)) for name in ("key", "query")
    ]
    gain = old.blocks[0].attention_norm.weight
    sizes = [(rows * gain - (rows * gain).mean(-1, keepdim=True)).square().sum((0, 2)) for rows in weights]
    planes = torch.stack([torch.arange(4), torch.arange(4, 8)], 1)
    strength = sizes[0][planes].sum(1) * sizes[1][planes].sum(1)
    kept = planes[strength.argsort(descending=True)[:2]].flatten().sort().values
    assert torch.equal(key.places.long(), kept)
    assert torch.equal(query.places.long(), torch.cat([kept, kept + 8]))
    assert found.layers[0]["query_key"].rank == [4]
    dense = torch.zeros(8, 16, dtype=torch.float64)
    dense[kept] = weights[0][0][kept]
    assert torch.equal(key.dense()[0], dense)


@pytest.mark.parametrize(("spectrum", "keep", "turned", "expected"), [
    ([4.0, 3.0, 2.0, 1.0], 2, 0, [0, 1]),
    ([1.0, 2.0, 3.0, 4.0], 9, 0, [0, 1, 2, 3]),
    ([3.0, 1.0, 1.0, 1.0], 0.75, 0, [0]),
    ([3.0, 1.0, 1.0, 1.0], 0.76, 0, [0, 1]),
    ([2.0, 2.0, 3.0, 1.0], 3, 2, [0, 1, 2]),
    ([2.0, 2.0, 3.0, 1.0], 2, 2, [2]),  # a plane needs two places
    ([2.0, 2.0, 1.0, 1.0], 1, 4, [0, 1]),  # one plane at least
    ([0.0, 0.0], 0.5, 0, [0]),
])  # fmt: skip
def test_what_is_kept(spectrum, keep, turned, expected):
    mask = sectors.kept(torch.tensor(spectrum, dtype=torch.float64), keep, turned)
    assert mask.nonzero().flatten().tolist() == expected


def test_heads_of_different_rank():
    model = gpt(positions="learned")
    with torch.no_grad():  # the first head has little to say in four coordinates
        model.blocks[0].attention.output.weight[:, 2:6] *= 1e-3
    before = logits(model)
    found = gauge.shrink(model, keep=0.999, noise=EVERY, check=False)
    ranks = found.layers[0]["value_output"].rank
    assert ranks[0] <= 3 < max(ranks) and distance(logits(model), before) < 0.1
    assert found.layers[0]["value_output"].block == min(ranks)
    for sector in (found.layers[0][name] for name in SECTORS):
        assert all(error**2 <= 0.001 * (1 + 1e-9) for error in sector.error)


def test_moments_are_those_of_the_inputs():
    model = gpt(positions="learned")
    layout = gauge.model_layout(model)
    found = measured_moments(model, layout, [TOKENS[:1], {"tokens": TOKENS[1:]}])
    for path in ("blocks.1.attention.query", "blocks.1.attention.key", "blocks.1.attention.value"):
        x = seen_inputs(model, path)
        assert torch.allclose(found[path].mean, x.mean(0))
        assert torch.allclose(found[path].root @ found[path].root.T, torch.cov(x.T, correction=0), atol=1e-12)
        assert torch.allclose(found[path].sizes(), x.square().mean(0).sqrt())
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, -1, 1.0, 0.0, True, "all", float("nan"), {"value_output": 0}, {"values": 2}])
def test_keep_is_a_rank_or_a_share(keep):
    with pytest.raises(ValueError, match="keep is"):
        gauge.shrink(gpt(), keep=keep)


@pytest.mark.parametrize("noise", [0.5, float("nan"), True])
def test_noise_is_a_factor(noise):
    with pytest.raises(ValueError, match="noise is a factor"):
        gauge.shrink(gpt(), noise=noise)


def test_models_that_cannot_be_shrunk():
    with pytest.raises(TypeError, match="no layout is known for Linear"):
        gauge.shrink(nn.Linear(2, 2))
    model = gpt()
    gauge.shrink(model, check=False)
    with pytest.raises(ValueError, match="shrunk already"):
        gauge.shrink(model)
    with pytest.raises(ValueError, match="no inputs to measure on"):
        gauge.shrink(gpt(), inputs=[])
    model = gpt()
    with torch.no_grad():
        model.get_parameter("blocks.1.attention.key.weight")[0, 0] = float("nan")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.key\.weight holds numbers that are not finite"):
        gauge.shrink(model, check=False)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(state.values(), model.state_dict().values()))
    assert not any(isinstance(module, ReducedLinear) for module in model.modules())
