"""Relational layers: formula by formula, O(d), Gram matrices against vectors, strips against plain operations."""

import math

import pytest
import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from erlangen.gauge import RelationalAttention, RelationalBlock, RelationalMLP, RelationalRMSNorm, _relational_stream
from erlangen.testing import assert_equivariant, assert_invariant, assert_low_precision

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small_strips(monkeypatch):
    """Strips that a handful of tokens crosses, with a rest."""
    monkeypatch.setattr(_relational_stream, "_ELEMENTS", {"cpu": 40})
    monkeypatch.setattr(_relational_stream, "_LEAST_ROWS", 3)


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def attention(generator, dim=5, num_heads=3, num_references=2, **options):
    layer = RelationalAttention(dim, num_heads, num_references, generator=generator, **options).double()
    with torch.no_grad():
        for number in (layer.plain, layer.cosine, layer.prior):
            number.normal_(generator=generator)
    return layer


def block(generator, dim=5, num_heads=2, num_references=2, **options):
    return RelationalBlock(dim, num_heads, num_references, generator=generator, **options).double()


def rotations(dim, generator, number=4):
    """Of both signs of the determinant."""
    out = torch.linalg.qr(normal(number, dim, dim, generator=generator)).Q
    out[::2, :, 0] *= -1
    return out


def gram_of(x, *references):
    vectors = torch.cat([*(r.detach().expand(len(x), -1, -1) for r in references), x], 1)
    return vectors @ vectors.mT


def assert_close(found, expected, tolerance=1e-12):
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= tolerance, f"{error:.2e}"


# The formula


def by_hand(layer, tokens):
    """The update of each token and its weights, a number at a time."""
    d, m = layer.dim, layer.num_references
    vectors = layer.references.tolist() + tokens.tolist()
    numbers = [p.tolist() for p in (layer.plain, layer.cosine, layer.prior, layer.mix)]

    def dot(a, b):
        return sum(p * q for p, q in zip(a, b))

    def scalars(v):
        return [dot(v, r) / math.sqrt(d) for r in vectors[:m]]

    updates, weights = [], []
    for i in range(m, len(vectors)):
        update, rows = [0.0] * d, []
        last = i + 1 if layer.causal else len(vectors)
        for h, (a, b, p, c) in enumerate(zip(*numbers)):
            scores = []
            for j in range(last):
                g_ij, g_ii, g_jj = (dot(vectors[s], vectors[t]) for s, t in ((i, j), (i, i), (j, j)))
                lengths = math.sqrt((g_ii / d + layer.eps) * (g_jj / d + layer.eps))
                score = (a + b / lengths) * g_ij / math.sqrt(d) + p * g_jj / math.sqrt(d)
                if m:
                    s_i, s_j = scalars(vectors[i]), scalars(vectors[j])
                    form = layer.content[h].tolist()
                    score += sum(s_i[r] * form[r][t] * s_j[t] for r in range(m) for t in range(m)) / math.sqrt(m)
                scores.append(math.exp(score))
            row = [s / sum(scores) for s in scores] + [0.0] * (len(vectors) - last)
            rows.append(row)
            update = [u + c * sum(w * v[k] for w, v in zip(row, vectors)) for k, u in enumerate(update)]
        updates.append(update)
        weights.append(rows)
    return torch.tensor(updates, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64).transpose(0, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_references", [0, 2])
@pytest.mark.parametrize("impl", ["dense", "streaming"])
def test_the_layer_is_its_formula(impl, num_references, causal, generator, small_strips):
    layer = attention(generator, num_references=num_references, causal=causal, impl=impl)
    x = normal(1, 7, 5, generator=generator)
    update, weights = by_hand(layer, x[0])
    assert_close(layer.weights(x)[0], weights)
    assert_close(layer.update(x)[0], update)
    assert_close(layer(x)[0], x[0] + update)


def test_the_comparison_sees_a_wrong_answer(generator):
    layer = attention(generator)
    x = normal(1, 7, 5, generator=generator)
    update, _ = by_hand(layer, x[0])
    with torch.no_grad():
        layer.prior[1] += 1e-9
    with pytest.raises(AssertionError):
        assert_close(layer.update(x)[0], update)


@pytest.mark.parametrize("num_references", [0, 3])
def test_a_head_is_a_few_numbers(num_references):
    few, more = (RelationalAttention(64, heads, num_references) for heads in (1, 2))
    size = [sum(p.numel() for p in layer.parameters()) for layer in (few, more)]
    assert size[1] - size[0] == 4 + num_references**2
    assert size[0] == 4 + num_references**2 + 64 * num_references


# O(d)


def with_references(layer, name):
    return lambda x, references, *rest: functional_call(layer, {name: references}, (x, *rest))


def turn_all(matrix, x, references, *rest):
    return x @ matrix, references @ matrix, *rest


def turn(matrix, out):
    return out @ matrix


@pytest.mark.parametrize("impl", ["dense", "streaming"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [attention, block])
def test_turning_tokens_and_references_turns_the_output(kind, causal, impl, generator, small_strips):
    layer = kind(generator, causal=causal, impl=impl)
    name, inner = ("references", layer) if kind is attention else ("attention.references", layer.attention)
    mask = torch.rand(2, 9, generator=generator) < 0.8
    inputs = (normal(2, 9, 5, generator=generator), inner.references.detach(), mask)
    elements = rotations(5, generator)
    call = with_references(layer, name)
    assert_equivariant(call, None, inputs, elements=elements, act_in=turn_all, act_out=turn, tolerance=1e-12)

    def only_tokens(matrix, x, *rest):
        return x @ matrix, *rest

    with pytest.raises(AssertionError, match="not equivariant"):  # the references are part of what turns
        assert_equivariant(call, None, inputs, elements=elements, act_in=only_tokens, act_out=turn)


def test_weights_are_invariant_and_those_of_fixed_maps_are_not(generator):
    layer = attention(generator)
    inputs = (normal(2, 9, 5, generator=generator), layer.references.detach().clone())
    elements = rotations(5, generator)

    def weights(x, references):
        with torch.no_grad():
            layer.references.copy_(references)
        return layer.weights(x)

    assert_invariant(weights, None, inputs, elements=elements, act_in=turn_all, tolerance=1e-12)

    query, key = normal(2, 5, 3, generator=generator)

    def standard(x, references):
        return (x @ query @ (x @ key).mT / math.sqrt(3)).softmax(-1)

    with pytest.raises(AssertionError, match="not equivariant") as caught:
        assert_invariant(standard, None, inputs, elements=elements, act_in=turn_all)
    assert float(str(caught.value).split("max")[-1].split()[1]) > 0.1, "and by no small amount"


def test_mlp_and_norm_are_equivariant(generator):
    mlp = RelationalMLP(5, 2, generator=generator).double()
    inputs = (normal(2, 9, 5, generator=generator), normal(2, 5, generator=generator))
    elements = rotations(5, generator)
    assert_equivariant(mlp, None, inputs, elements=elements, act_in=turn_all, act_out=turn, tolerance=1e-12)
    norm = RelationalRMSNorm(5)
    assert_equivariant(norm, None, inputs[0], elements=elements, act_in=turn, act_out=turn, tolerance=1e-12)


def test_the_norm_is_that_of_torch(generator):
    x = normal(2, 9, 5, generator=generator)
    ours, theirs = RelationalRMSNorm(5, eps=1e-3), torch.nn.RMSNorm(5, eps=1e-3, elementwise_affine=False)
    assert_close(ours(x), theirs(x), 1e-15)
    gram = gram_of(x)
    square = gram.diagonal(dim1=-2, dim2=-1)
    assert_close(ours.gram(gram), 5 * gram / ((square + 5e-3)[:, None] * (square + 5e-3)[..., None]).sqrt(), 1e-14)


# Gram matrices


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [attention, block])
def test_layers_of_gram_matrices_are_layers_of_vectors(kind, causal, padded, generator):
    """Three layers with references of their own, one after another: all of them are in the matrix all along."""
    layers = [kind(generator, num_references=m, causal=causal) for m in (2, 3, 0)]
    x = normal(2, 9, 5, generator=generator)
    mask = torch.rand(2, 9, generator=generator) < 0.7 if padded else None
    references = [(layer if kind is attention else layer.attention).references for layer in layers]
    gram = gram_of(x, *references)
    places = [slice(0, 2), slice(2, 5), slice(0, 0)]
    for layer, place in zip(layers, places):
        x, gram = layer(x, mask), layer.gram(gram, mask, num_fixed=5, references=place)
        assert_close(gram, gram_of(x, *references))
    wrong = layers[0].gram(gram, mask, num_fixed=5, references=slice(1, 3))
    with pytest.raises(AssertionError):
        assert_close(wrong, gram_of(layers[0](x, mask), *references))


def test_mlp_of_gram_matrices(generator):
    mlp = RelationalMLP(5, 2, generator=generator).double()
    x, references = normal(2, 9, 5, generator=generator), normal(2, 5, generator=generator)
    mask = torch.rand(2, 9, generator=generator) < 0.7
    assert_close(mlp.gram(gram_of(x, references), mask), gram_of(mlp(x, references, mask), references))


# Strips


def run(layer, x, mask, impl, dtype=torch.float64):
    """Output and the gradient of everything."""
    layer.impl = impl
    layer = layer.to(dtype)
    layer.zero_grad()
    x = x.to(dtype, copy=True).requires_grad_()
    out = layer(x, mask)
    probe = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
    out.backward(probe + 0.3 * out.detach())
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.numel()}
    return {"output": out.detach(), "x": x.grad} | grads


def assert_same(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name in expected:
        error = (found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1)
        assert error <= tolerance, f"{name}: {error:.2e}"


CASES = [(m, causal, padded) for m in (0, 2) for causal in (False, True) for padded in (False, True)]


@pytest.mark.parametrize("shape", [(2, 11), (5, 3), (1, 1), (2, 16)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_strips_give_the_values_and_gradients_of_plain_operations(case, shape, generator, small_strips):
    m, causal, padded = case
    layer = attention(generator, num_references=m, causal=causal)
    x = normal(*shape, 5, generator=generator)
    mask = torch.rand(*shape, generator=generator) < 0.6 if padded else None
    assert_same(run(layer, x, mask, "streaming"), run(layer, x, mask, "dense"))


def test_every_gradient_is_looked_at(generator, small_strips):
    layer = attention(generator)
    x = normal(2, 11, 5, generator=generator)
    expected, found = run(layer, x, None, "dense"), run(layer, x, None, "streaming")
    assert set(expected) == {"output", "x", "plain", "cosine", "prior", "mix", "references", "content"}
    for name in expected:
        assert expected[name].abs().max() > 1e-3, "it is not zero, which any strip could give"
        wrong = found | {name: found[name] * (1 + 1e-6)}
        with pytest.raises(AssertionError, match=name):
            assert_same(wrong, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case, generator, small_strips):
    m, causal, padded = case
    layer = attention(generator, num_references=m, causal=causal)
    x = normal(2, 40, 5, generator=generator)
    mask = torch.rand(2, 40, generator=generator) < 0.6 if padded else None
    exact = run(layer, x, mask, "dense")
    plain, found = (run(layer, x, mask, impl, torch.float32) for impl in ("dense", "streaming"))
    assert_low_precision(found, plain, exact, ratio=10.0)  # sums in another order: a reference may be lucky


def test_gradcheck(generator, small_strips):
    layer = attention(generator, 3, 2, 2, causal=True)
    mask = torch.tensor([[True, True, True, False]])
    names = [name for name, _ in layer.named_parameters()]
    leaves = [normal(1, 4, 3, generator=generator), *(p.detach().clone() for p in layer.parameters())]
    for leaf in leaves:
        leaf.requires_grad_()

    def call(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters)), (x, mask))

    layer.impl = "streaming"
    assert torch.autograd.gradcheck(call, leaves)
    with pytest.raises(RuntimeError, match='impl="dense"'):
        torch.autograd.gradgradcheck(call, leaves)
    layer.impl = "dense"
    assert torch.autograd.gradgradcheck(call, leaves)


def operator_arguments(generator, m, causal):
    leaves = [
        normal(2, m + 7, 5, generator=generator),
        normal(2, m + 7, generator=generator).abs() + 0.1,
        normal(2, m + 7, generator=generator),
        normal(2, m + 7, m, generator=generator) if m else None,
        normal(3, m, m, generator=generator) if m else None,
        normal(3, 3, generator=generator),
        normal(3, generator=generator),
    ]
    hidden = torch.rand(2, m + 7, generator=generator) < 0.3 if m else None
    return *(None if leaf is None else leaf.clone().requires_grad_() for leaf in leaves), hidden, m, causal


@pytest.mark.parametrize("m", [0, 2])
def test_opcheck(m, generator):
    torch.library.opcheck(torch.ops.erlangen.relational_mix.default, operator_arguments(generator, m, bool(m)))


def test_the_layer_compiles_whole(generator):
    layer = block(generator, causal=True, impl="streaming")
    x = normal(2, 9, 5, generator=generator)
    torch._dynamo.reset()
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        out = call(x, torch.ones(2, 9, dtype=torch.bool))
        out.square().sum().backward()
        results.append({"output": out.detach()} | {name: p.grad.clone() for name, p in layer.named_parameters()})
    assert_same(*results)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("causal", [False, True])
def test_strips_hold_no_more_than_they_say(causal, generator, monkeypatch):
    monkeypatch.setattr(_relational_stream, "_ELEMENTS", {"cpu": 1 << 10})
    _, _, _, _, content, numbers, mix, _, m, _ = operator_arguments(generator, 2, causal)
    tensors = (normal(1, *shape, generator=generator).abs() for shape in ((602, 5), (602,), (602,), (602, 2)))
    heads = (t.detach() for t in (content, numbers, mix))
    strips = _relational_stream._Strips(*tensors, *heads, None, m, causal)
    with Largest() as largest:
        strips.forward()
        strips.backward(normal(1, 600, 5, generator=generator))
    assert largest.size <= 4 * 602 * _relational_stream._LEAST_ROWS < 600 * 600 / 4
    with Largest() as largest:
        torch.zeros(600, 600)[:2].neg()
    assert largest.size == 600 * 600, "the meter works"


# What must not happen


@pytest.mark.parametrize("impl", ["dense", "streaming"])
@pytest.mark.parametrize("kind", [attention, block])
def test_a_causal_token_knows_nothing_of_later_ones(kind, impl, generator, small_strips):
    layer = kind(generator, causal=True, impl=impl)
    x = normal(2, 11, 5, generator=generator)
    before = layer(x)
    for first in (1, 4, 10):
        changed = x.clone()
        changed[:, first:] = 3 * normal(2, 11 - first, 5, generator=generator)
        after = layer(changed)
        assert torch.equal(after[:, :first], before[:, :first])
        assert not torch.equal(after[:, first:], before[:, first:])


@pytest.mark.parametrize("impl", ["dense", "streaming"])
@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize("kind", [attention, block])
def test_padding_may_hold_anything(kind, m, impl, generator, small_strips):
    layer = kind(generator, num_references=m, impl=impl)
    x = normal(3, 8, 5, generator=generator)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[0, 5:], mask[1, 2], mask[2] = False, False, False  # the last one is all padding
    spoilt = x.masked_fill(~mask[..., None], math.nan).requires_grad_()
    out = layer(spoilt, mask)
    assert_close(out[:1, :5], layer(x[:1, :5]), 1e-13)
    assert_close(out[1:2, [0, 1, 3, 4, 5, 6, 7]], layer(x[1:2, [0, 1, 3, 4, 5, 6, 7]]), 1e-13)
    assert not out[~mask].count_nonzero()
    out.square().sum().backward()
    assert spoilt.grad.isfinite().all() and not spoilt.grad[~mask].count_nonzero()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [0, 2])
def test_zero_repeated_and_huge_tokens(m, dtype, generator, small_strips):
    layer = attention(generator, num_references=m, causal=True)
    x = normal(2, 9, 5, generator=generator)
    x[:, 2:4], x[:, 5] = 0.0, x[:, 1]
    x[1, 7] = 1e4  # scores of 1e8
    dense, found = (run(layer, x, None, impl, dtype) for impl in ("dense", "streaming"))
    assert all(value.isfinite().all() for value in found.values())
    assert_same(found, dense, 1e-12 if dtype == torch.float64 else 1e-4)
    repeated = RelationalAttention(5, 2, m, generator=generator).double().weights(x[:1])
    assert_close(repeated[..., m + 1], repeated[..., m + 5], 1e-14)  # what is the same token weighs the same


@pytest.mark.parametrize("impl", ["dense", "streaming", "auto"])
@pytest.mark.parametrize("shape", [(2, 0), (0, 3)], ids=str)
def test_nothing(shape, impl, generator):
    layer = attention(generator, impl=impl)
    x = torch.zeros(*shape, 5, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    out.sum().backward()


def test_auto_is_dense_for_few_tokens_and_streams_many(generator, monkeypatch):
    calls = []
    real = _relational_stream.streamed_mix
    monkeypatch.setattr(
        "erlangen.gauge.relational.streamed_mix", lambda *a, **k: calls.append(a[0].shape[1]) or real(*a, **k)
    )
    layer = attention(generator, num_heads=4)
    for size in (8, 400):
        layer(normal(1, size, 5, generator=generator))
    assert calls == [402]


def test_autocast_does_not_lower_the_precision(generator):
    layer = block(generator, impl="streaming").float()
    x = normal(2, 9, 5, generator=generator).float()
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(x) - plain).abs().max() < 1e-5


REFUSED = {
    "dim must be at least 1": lambda: RelationalAttention(0, 1),
    "num_heads must be at least 1": lambda: RelationalAttention(4, 0),
    "num_references must be at least 0": lambda: RelationalBlock(4, 1, -1),
    "eps must be at least 0": lambda: RelationalRMSNorm(4, -1.0),
    "hidden_dim must be at least 1": lambda: RelationalMLP(4, 1, 0),
    "impl must be one of auto, dense, streaming": lambda: RelationalAttention(4, 1, impl="tiled"),
    "with dim of 4": lambda: RelationalAttention(4, 1)(torch.zeros(2, 3, 5)),
    r"x must have shape \[..., 4\]": lambda: RelationalRMSNorm(4)(torch.zeros(2, 3)),
    r"must both be float32.*bfloat16": lambda: RelationalAttention(4, 1)(torch.zeros(2, 3, 4).bfloat16()),
    r"must both be float32, or both float64": lambda: RelationalBlock(4, 1)(torch.zeros(2, 3, 4).double()),
    "mask must be bool": lambda: RelationalAttention(4, 1)(torch.zeros(2, 3, 4), torch.ones(2, 3)),
    r"\[B, N\] = \[2, 3\]": lambda: RelationalBlock(4, 1)(torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool)),
    "pass those of the attention": lambda: RelationalMLP(4, 2)(torch.zeros(2, 3, 4)),
    r"\[B, K, K\]": lambda: RelationalAttention(4, 1).gram(torch.zeros(2, 3, 4)),
    "of 2 fixed vectors": lambda: RelationalAttention(4, 1, 2).gram(torch.zeros(1, 1, 1)),
    "say which of the fixed vectors are its own": lambda: RelationalBlock(4, 1, 2).gram(
        torch.zeros(1, 4, 4), num_fixed=1
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


# Learning


def scattered(generator, batch, num_tokens=8, dim=6):
    """Tokens of very different lengths, and which other one is nearest to each."""
    lengths = normal(batch, num_tokens, 1, generator=generator).mul(0.6).exp()
    x = normal(batch, num_tokens, dim, generator=generator) * lengths
    distances = torch.cdist(x, x) + torch.eye(num_tokens) * 1e9
    return x, distances.argmin(-1)


def test_a_head_learns_which_token_is_nearest(generator):
    """It takes G_ij and G_jj together; what it learns is the distance, p = −a/2."""
    right = {}
    own = torch.eye(8, dtype=torch.bool)
    for knows_lengths in (True, False):
        layer = RelationalAttention(6, 1, generator=generator).double()
        with torch.no_grad():
            layer.cosine.zero_()
        trained = [layer.plain, layer.prior] if knows_lengths else [layer.plain]
        optimizer = torch.optim.Adam(trained, lr=0.1)
        for _ in range(150):
            x, nearest = scattered(generator, 32)
            others = layer.weights(x)[:, 0].masked_fill(own, 0.0) + 1e-300
            optimizer.zero_grad()
            (others.sum(-1).log() - others.gather(-1, nearest[..., None])[..., 0].log()).mean().backward()
            optimizer.step()
        x, nearest = scattered(generator, 256)
        found = layer.weights(x)[:, 0].masked_fill(own, 0.0).argmax(-1)
        right[knows_lengths] = (found == nearest).double().mean().item()
        if knows_lengths:
            assert abs(layer.prior / layer.plain + 0.5).item() < 0.03
    assert right[True] > 0.95 and right[False] < 0.5, right


def test_a_layer_learns_to_swap_partners_through_its_output(generator):
    """Each token becomes the one that is nearest to it; and so it does in a frame that training never saw."""
    layer = RelationalAttention(6, 8, generator=generator)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)

    def pairs(batch):
        centre = 3 * torch.randn(batch, 4, 1, 6, generator=generator)
        both = centre + torch.randn(batch, 4, 2, 6, generator=generator)
        return both.flatten(1, 2), both.flip(2).flatten(1, 2)

    for _ in range(300):
        x, partner = pairs(16)
        loss = (layer(x) - partner).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, partner = pairs(64)
    turned = rotations(6, generator, 1)[0].float()
    with torch.no_grad():
        loss = (layer(x) - partner).square().mean().item()
        elsewhere = (layer(x @ turned) - partner @ turned).square().mean().item()
    assert loss < 0.5 * (x - partner).square().mean().item()
    assert elsewhere == pytest.approx(loss, rel=1e-4)
