"""Equivariant layers against dense layers averaged over the group."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from erlangen.finite import named
from erlangen.finite._blocks import block_linear, block_linear_operator, block_linear_reference
from erlangen.finite.irreps import Representation
from erlangen.finite.linear import (
    EquivariantEmbedding,
    EquivariantLinear,
    EquivariantMLP,
    EquivariantNorm,
    GroupBasis,
)
from erlangen.testing import assert_equivariant, assert_low_precision

GROUPS = [
    *(named.cyclic(n) for n in range(2, 8)),
    *(named.dihedral(n) for n in (3, 4, 6)),
    named.symmetric(3),
    named.symmetric(4),
    named.alternating(4),
    named.alternating(5),
    named.klein(),
    named.quaternion(),
    named.reversal(5),
    named.reverse_complement(6),
    named.direct_product(named.cyclic(2), named.cyclic(3)),
    named.direct_product(named.cyclic(3), named.symmetric(3)),  # an irrep of dimension 4 and complex type
]
SMALL = [group for group in GROUPS if group.order <= 24]
LETTERS = [named.reverse_complement(6), named.inverted_repeat(2, 3), named.inverted_repeat(3, 2)]


def mixed(group):
    """Two representations that are not regular: irreps missing on either side, unequal copies."""
    count = len(group.irreps)
    source, target = ([(k + shift) % 3 for k in range(count)] for shift in (1, 2))
    return Representation(group, source), Representation(group, target)


def randomise(layer, generator):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return layer


@functools.cache
def matrices(representation):
    """Of all elements: [G, dim, dim]."""
    return torch.stack([representation.matrix(h) for h in range(representation.group.order)])


def projected(weight, source, target):
    """The dense twin: the mean over the group of B'_hᵀ W B_h, the equivariant map nearest to W."""
    return (matrices(target).mT @ weight @ matrices(source)).mean(0)


def commutator(weight, source, target):
    return float((matrices(target) @ weight - weight @ matrices(source)).abs().max())


def num_equivariant_maps(source, target):
    """dim Hom_G = <χ_source, χ_target>, from traces of dense matrices."""
    traces = (matrices(one).diagonal(dim1=1, dim2=2).sum(1) for one in (source, target))
    return float(torch.stack(list(traces)).prod(0).mean())


# --- EquivariantLinear ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("regular", [True, False], ids=["regular", "mixed"])
def test_the_weight_is_a_generic_matrix_that_commutes(group, regular, generator):
    copies = (1, 1) if group.order > 24 else (2, 3)
    source, target = (Representation.regular(group, c) for c in copies) if regular else mixed(group)
    layer = randomise(EquivariantLinear(group, source, target).double(), generator)
    weight = layer.weight_matrix().detach()
    assert weight.shape == (target.dim, source.dim)
    assert commutator(weight, source, target) <= 1e-12
    torch.testing.assert_close(projected(weight, source, target), weight, rtol=0, atol=1e-12)
    assert sum(w.numel() for w in layer.weights) == round(num_equivariant_maps(source, target))
    if layer.bias is not None:
        assert len(layer.bias) == round(
            num_equivariant_maps(Representation(group, [1] + [0] * (len(group.irreps) - 1)), target)
        )


@pytest.mark.parametrize("group", SMALL, ids=str)
def test_no_parameter_is_wasted_or_missing(group, generator):
    """The weight matrices of unit parameters are independent and span the image of the group average."""
    source, target = mixed(group)
    layer = EquivariantLinear(group, source, target, bias=False).double()
    jacobian = []
    for weight in layer.weights:
        for index in range(weight.numel()):
            for other in layer.weights:
                nn.init.zeros_(other)
            weight.data.view(-1)[index] = 1.0
            jacobian.append(layer.weight_matrix().detach().flatten())
    if not jacobian:
        assert num_equivariant_maps(source, target) == pytest.approx(0, abs=1e-9)
        return
    jacobian = torch.stack(jacobian)
    assert torch.linalg.matrix_rank(jacobian) == len(jacobian)
    dense = projected(torch.randn(target.dim, source.dim, generator=generator, dtype=torch.float64), source, target)
    basis = torch.linalg.qr(jacobian.mT).Q
    torch.testing.assert_close(basis @ (basis.mT @ dense.flatten()), dense.flatten(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_equivariant_as_a_layer(group, generator):
    copies = (1, 1) if group.order > 24 else (2, 3)
    layer = EquivariantLinear(group, *(c * group.order for c in copies), generator=generator)
    randomise(layer, generator)
    x = torch.randn(2, group.degree, layer.in_dim, generator=generator)
    assert_equivariant(layer, group, x, tolerance=1e-12)


def test_what_does_not_commute_is_seen(generator):
    """Wrong answers: one entry changed, a dense layer, a bias off the trivial irrep, channels out of place."""
    group = named.dihedral(4)
    layer = randomise(EquivariantLinear(group, 16, 16).double(), generator)
    x = torch.randn(2, group.degree, 16, generator=generator, dtype=torch.float64)
    weight = layer.weight_matrix().detach()
    for i, j, commutes in ((0, 1, True), (0, 2, False), (8, 9, False), (15, 15, False)):  # trivial to trivial is free
        wrong = weight.clone()
        wrong[i, j] += 1e-9
        assert (commutator(wrong, layer.source, layer.target) <= 1e-12) == commutes
    for wrong in (
        lambda y: F.linear(y, torch.randn(16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)),
        lambda y: layer(y) + 1e-6,
        lambda y: layer(y).roll(1, -1),
    ):
        with pytest.raises(AssertionError):
            assert_equivariant(wrong, group, x, act_in=layer.act_in, act_out=layer.act_out, tolerance=1e-12)


@pytest.mark.parametrize("group", SMALL, ids=str)
@pytest.mark.parametrize("regular", [True, False], ids=["regular", "mixed"])
def test_values_and_gradients_are_those_of_the_dense_twin(group, regular, generator):
    source, target = (Representation.regular(group, c) for c in (2, 3)) if regular else mixed(group)
    layer = randomise(EquivariantLinear(group, source, target).double(), generator)
    x = torch.randn(3, 5, source.dim, generator=generator, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 5, target.dim, generator=generator, dtype=torch.float64)
    parameters = list(layer.parameters())
    y = layer(x)
    grads = torch.autograd.grad(y, [x, *parameters], g, materialize_grads=True)

    weight = layer.weight_matrix()
    bias = F.pad(layer.bias, (0, target.dim - len(layer.bias))) if layer.bias is not None else torch.zeros(target.dim)
    expected = torch.einsum("...i,oi->...o", x, weight) + bias
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    # The gradient of the dense twin P(W), through weight_matrix, whose own linearity the test above has measured.
    expected_grads = torch.autograd.grad(expected, [x, *parameters], g, materialize_grads=True)
    for actual, wanted in zip(grads, expected_grads):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-11)
    # The gradient with respect to x is that of the averaged dense matrix too.
    dense = projected(weight.detach(), source, target)
    torch.testing.assert_close(grads[0], g @ dense, rtol=0, atol=1e-11)


@pytest.mark.parametrize("group", SMALL, ids=str)
def test_float32(group, generator):
    layer = EquivariantLinear(group, 2 * group.order, 3 * group.order, generator=generator)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(64, layer.in_dim, generator=generator)
    weight = exact.weight_matrix().detach().float()
    assert_low_precision(layer(x).detach(), F.linear(x, weight), exact(x.double()).detach())


@pytest.mark.parametrize("group", SMALL, ids=str)
def test_variance_is_kept_in_every_block(group, generator):
    """The mean square of each row of the weight matrix, times unit variance in: 1 up to the sampling error."""
    source = Representation.regular(group, max(4, 96 // group.order))
    layer = EquivariantLinear(group, source, source, generator=generator).double()
    squares = layer.weight_matrix().detach().square().sum(1)
    for irrep, part in layer.target.blocks:
        copies = layer.target.copies[irrep.number]
        # copies rows of e · copies numbers N(0, 1 / (e copies)): χ², relative deviation sqrt(2 / count)
        deviation = (2 / (irrep.endo * copies**2)) ** 0.5
        assert abs(float(squares[part].mean()) - 1) <= 5 * deviation, irrep.name
    assert layer.bias is not None and not layer.bias.any()


@pytest.mark.parametrize("product", [block_linear, block_linear_operator], ids=["function", "operator"])
def test_products_of_blocks_are_the_reference(product, generator):
    """Blocks with gaps, blocks used twice, a bias; and the second derivative, by finite differences."""
    weights = [
        torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in ((2, 3, 2), (1, 2, 4))
    ]
    x = torch.randn(7, 20, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    places = ([1, 10], [2, 15], [2, 2], 21)  # columns 1 to 8 and 10 to 17 -> 2 to 13 and 15 to 18
    leaves = [x, *weights, bias]

    def apply(function, x, *rest):
        return function(x, list(rest[:2]), rest[2], *places)

    y, expected = (apply(function, *leaves) for function in (product, block_linear_reference))
    torch.testing.assert_close(y, expected)
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    for actual, wanted in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g)):
        torch.testing.assert_close(actual, wanted)
    for leaf, wanted in zip(leaves, torch.autograd.grad(apply(block_linear_reference, *leaves), leaves, g)):
        alone = [other if other is leaf else other.detach() for other in leaves]
        torch.testing.assert_close(torch.autograd.grad(apply(product, *alone), leaf, g)[0], wanted)
    torch.autograd.gradgradcheck(lambda *leaves: apply(product, *leaves), leaves, fast_mode=True)
    if product is block_linear_operator:
        torch.library.opcheck(product, (x, weights, bias, *places))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("places", [([0, 160], [0, 128], [2, 2], 256), ([1, 81], [5, 70], [1, 4], 391), None], ids=str)
def test_products_of_many_tokens_are_the_reference(places, threads, generator):
    """In float32 on a CPU they are convolutions: one of all stacks, or each its own, with gaps; and a single stack."""
    sizes = [(2, 32, 40), (1, 64, 80)]
    if places is None:
        sizes, places = [(2, 64, 64)], ([0], [0], [1], 128)
    weights = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    x = torch.randn(300, 410, generator=generator, dtype=torch.float64)
    leaves = [x, *weights, torch.randn(sizes[0][1], generator=generator, dtype=torch.float64)]
    g = torch.randn(300, places[-1], generator=generator, dtype=torch.float64)

    def results(function, dtype):
        own = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        y = function(own[0], own[1:-1], own[-1], *places)
        return [y, *torch.autograd.grad(y, own, g.to(dtype))]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for function in (block_linear, block_linear_operator):
            for actual, wanted in zip(results(function, torch.float32), results(block_linear_reference, torch.float64)):
                assert (actual.double() - wanted).abs().max() <= 1e-4 * wanted.abs().max()
                assert (actual.double() - wanted.flip(-1)).abs().max() > 0.1 * wanted.abs().max()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("group", [named.dihedral(4), named.alternating(4)], ids=str)
def test_other_ways_to_call_it(group, generator):
    """Function transforms, autocast, strided input, an empty batch, one vector; the layer copied and loaded."""
    layer = randomise(EquivariantLinear(group, 2 * group.order, group.order).double(), generator)
    x = torch.randn(5, 3, layer.in_dim, generator=generator, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(torch.vmap(layer)(x), y)
    torch.testing.assert_close(layer(x.mT.contiguous().mT), y)
    torch.testing.assert_close(layer(x[0, 0]), y[0, 0])
    assert layer(x[:0]).shape == (0, 3, layer.out_dim)
    jacobian = torch.func.jacrev(layer)(x[0, 0])
    torch.testing.assert_close(jacobian, layer.weight_matrix())
    other = EquivariantLinear(group, 2 * group.order, group.order).double()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), y, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = copy.deepcopy(layer).float()(x.float())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), y, rtol=0.05, atol=0.2)


def test_compiled_without_a_break(generator):
    group = named.alternating(4)
    layer = EquivariantLinear(group, 24, 24, generator=generator)
    x = torch.randn(4, 24, generator=generator, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), layer(x)
    torch.testing.assert_close(y, expected)
    leaves = [x, *layer.parameters()]
    for actual, wanted in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)):
        torch.testing.assert_close(actual, wanted)


def test_linear_says_what_is_wrong():
    group = named.cyclic(3)
    with pytest.raises(
        ValueError, match=r"in_dim as a number must be a multiple of the order 3.*received 4.*Representation"
    ):
        EquivariantLinear(group, 4, 6)
    with pytest.raises(ValueError, match="out_dim as a number must be a multiple"):
        EquivariantLinear(group, 6, 0)
    with pytest.raises(ValueError, match="out_dim is a representation of"):
        EquivariantLinear(group, 6, Representation.regular(named.cyclic(4), 1))
    with pytest.raises(ValueError, match=r"takes features \[\.\.\., 6\], received \[2, 7\]"):
        EquivariantLinear(group, 6, 3)(torch.zeros(2, 7))


# --- GroupBasis, norm, MLP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_group_basis_permutes_values(group, generator):
    """(h f)(g) = f(h⁻¹ g) for channels moved by h: an exact isometry, for any number of copies."""
    copies = 3
    basis, representation = GroupBasis(group), Representation.regular(group, copies)
    x = torch.randn(2, 2, representation.dim, generator=generator, dtype=torch.float64)
    values = basis.to_group(x)
    assert values.shape == (2, 2, copies, group.order)
    torch.testing.assert_close(basis.to_fourier(values), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(values.square().sum((-1, -2)), x.square().sum(-1), rtol=1e-12, atol=0)
    for h in range(0, group.order, max(1, group.order // 5)):
        moved = basis.to_group(representation.act(h, x))
        there = np.asarray(group.multiply(h, np.arange(group.order)))
        torch.testing.assert_close(moved[..., there], values, rtol=0, atol=1e-12)
        if h:
            assert float((moved - values).abs().max()) > 0.1
    leaf = x.clone().requires_grad_()
    g = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad(basis.to_group(leaf), leaf, g)
    torch.testing.assert_close(grad, basis.to_fourier(g), rtol=0, atol=1e-12)  # the transpose is the inverse


def test_group_basis_says_what_is_wrong():
    basis = GroupBasis(named.cyclic(3))
    with pytest.raises(ValueError, match=r"a multiple of 3 of them, received \[2, 4\]"):
        basis.to_group(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\[\.\.\., C, 3\], received \[2, 4\]"):
        basis.to_fourier(torch.zeros(2, 4))


@pytest.mark.parametrize("group", SMALL, ids=str)
def test_norm_and_mlp_are_equivariant(group, generator):
    x = 3 * torch.randn(2, group.degree, 2 * group.order, generator=generator)
    norm = randomise(EquivariantNorm(Representation.regular(group, 2)), generator)
    assert_equivariant(norm, group, x, num_elements=3, tolerance=1e-12)
    mlp = randomise(EquivariantMLP(group, 2 * group.order, 3 * group.order), generator)
    assert_equivariant(mlp, group, x, num_elements=3, tolerance=1e-12)


def test_norm_is_rms_with_a_gain_a_copy(generator):
    group = named.dihedral(3)
    representation = Representation(group, [1, 0, 2])
    norm = EquivariantNorm(representation).double()
    assert norm.gain.shape == (3,)
    x = torch.randn(4, representation.dim, generator=generator, dtype=torch.float64)
    unit = norm(x)
    torch.testing.assert_close(unit.square().mean(-1), torch.ones(4, dtype=torch.float64))
    with torch.no_grad():
        norm.gain.copy_(torch.tensor([1.0, 1.0, 0.0]))
    assert sum(bool((norm(x)[:, i] == 0).all()) for i in range(5)) == 2  # the two coordinates of the last copy
    with pytest.raises(ValueError, match=r"takes features \[\.\.\., 5\], received \[4, 6\]"):
        norm(torch.zeros(4, 6))


def test_gelu_in_the_fourier_basis_is_seen_to_be_wrong(generator):
    group = named.dihedral(4)
    mlp = randomise(EquivariantMLP(group, 16, 32), generator).double()
    x = torch.randn(2, group.degree, 16, generator=generator, dtype=torch.float64)
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(
            lambda y: mlp.contract(F.gelu(mlp.expand(y))), group, x, act_in=mlp.act_in, act_out=mlp.act_out
        )


# --- EquivariantEmbedding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", LETTERS, ids=str)
@pytest.mark.parametrize("regular", [True, False], ids=["regular", "mixed"])
def test_embedding_of_moved_letters_is_moved(group, regular, generator):
    representation = Representation.regular(group, 3) if regular else Representation(group, [2, 3])
    embedding = EquivariantEmbedding(group, representation, generator=generator)
    tokens = torch.randint(group.num_letters, (5, group.degree), generator=generator)
    assert_equivariant(embedding, group, tokens, tolerance=1e-12)


def test_embedding_has_all_free_numbers(generator):
    """A and C are free and T and G follow; the spacer of an inverted repeat, which stays, has invariant vectors."""
    embedding = EquivariantEmbedding(named.reverse_complement(6), 8)
    assert sum(w.numel() for w in embedding.weights) == 2 * 8
    repeat = named.inverted_repeat(2, 3)
    embedding = EquivariantEmbedding(repeat, 8, generator=generator)
    assert sum(w.numel() for w in embedding.weights) == 2 * 8 + 4 * 4
    tokens = torch.randint(4, (1, repeat.degree), generator=generator)
    same = torch.zeros_like(tokens)
    y = embedding(same)[0]
    torch.testing.assert_close(y[0], y[1])  # both in an arm
    assert not torch.allclose(y[0], y[3])  # arm and spacer
    assert not torch.allclose(embedding(tokens + 1 - 2 * (tokens == 3)), embedding(tokens))


def test_embedding_for_letters_left_alone(generator):
    group = named.cyclic(5)
    embedding = EquivariantEmbedding(group, 10, num_letters=7, generator=generator)
    assert sum(w.numel() for w in embedding.weights) == 7 * 2
    tokens = torch.randint(7, (3, 5), generator=generator)
    assert_equivariant(embedding, group, tokens, tolerance=1e-12)
    _, trivial = embedding.representation.blocks[0]
    assert not embedding(tokens)[..., trivial.stop :].any()


def test_embedding_with_nothing_tied_is_seen_to_be_wrong(generator):
    group = named.reverse_complement(6)
    embedding, free = EquivariantEmbedding(group, 8), nn.Embedding(4, 8).double()
    tokens = torch.randint(4, (3, 6), generator=generator)
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(free, group, tokens, act_in=embedding.act_in, act_out=embedding.act_out)


def test_embedding_says_what_is_wrong():
    group = named.reverse_complement(6)
    embedding = EquivariantEmbedding(group, 8)
    with pytest.raises(ValueError, match="tokens must be integers"):
        embedding(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"tokens must be \[\.\.\., 6\]"):
        embedding(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="letters are 0 to 3, received 0 to 4"):
        embedding(torch.tensor([[0, 1, 2, 3, 4, 0]]))
    with pytest.raises(ValueError, match="num_letters is that of the group, 4; received 5"):
        EquivariantEmbedding(group, 8, num_letters=5)
    with pytest.raises(ValueError, match="must be given"):
        EquivariantEmbedding(named.cyclic(3), 6)
    with pytest.raises(ValueError, match="copies of the trivial irrep"):
        EquivariantEmbedding(named.cyclic(3), Representation(named.cyclic(3), [0, 2]), num_letters=4)
