"""The layer of PSEAD: its values, its symmetry, its limits, and what the official code gets wrong."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from finite_cases import LAYER_GROUPS, permutation_matrices, some_elements

from erlangen.finite import (
    PermutationGroup,
    alternating,
    cyclic,
    dihedral,
    klein,
    quaternion,
    reversal,
    symmetric,
)
from erlangen.finite.psead import PSEADAttention
from erlangen.testing import assert_equivariant, assert_low_precision

B, DIM, HEADS = 2, 8, 2


def build(group, generator, num_heads=HEADS, scale=2.0):
    """In float64, with scores large enough for a softmax that is far from uniform."""
    layer = PSEADAttention(group, DIM, num_heads, generator=generator).double().requires_grad_(False)
    with torch.no_grad():
        layer.query.weight.mul_(scale)
        layer.key.weight.mul_(scale)
    return layer


def features(group, generator):
    return torch.randn(B, group.degree, DIM, generator=generator, dtype=torch.float64)


def by_loops(layer, x, projectors, mask=None):
    """The published forward pass, with any projectors [M, N, N], one window, head and channel at a time.

    Returns the output [B, N, dim] and the terms of the sum [B, M, N, dim].
    """
    width = layer.dim // layer.num_heads
    terms = torch.zeros(len(x), len(projectors), *x.shape[1:], dtype=x.dtype)
    for b, head, m in itertools.product(range(len(x)), range(layer.num_heads), range(len(projectors))):
        part = slice(head * width, (head + 1) * width)
        q, k, v = (projectors[m].to(x) @ linear(x[b])[:, part] for linear in (layer.query, layer.key, layer.value))
        for i in range(x.shape[1]):
            scores = torch.stack([(q[i] * k[j]).sum() / math.sqrt(width) for j in range(x.shape[1])])
            if mask is not None:
                scores = scores.masked_fill(~mask[b, head, i], -math.inf)
            for weight, row in zip(scores.softmax(0), v):
                terms[b, m, i, part] += weight * row
    return layer.output(terms.sum(1)), terms


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [dihedral(4), quaternion(), reversal(5)], ids=str)
def test_values_are_loops(group, generator):
    layer = build(group, generator)
    x = features(group, generator)
    mask = torch.rand(B, HEADS, group.degree, group.degree, generator=generator) < 0.7
    mask |= torch.eye(group.degree, dtype=torch.bool)
    with torch.no_grad():
        for allowed in (None, mask):
            expected, terms = by_loops(layer, x, group.projectors(), allowed)
            torch.testing.assert_close(layer(x, allowed), expected, rtol=0, atol=1e-13)
            torch.testing.assert_close(layer.channel_outputs(x, allowed), terms, rtol=0, atol=1e-13)
            energy = terms.square().sum((2, 3))
            shares = layer.contributions(x, allowed)
            torch.testing.assert_close(shares, energy / energy.sum(1, keepdim=True), rtol=0, atol=1e-13)
        wrong = group.projectors().flip(0)[:-1]
        assert (by_loops(layer, x, wrong)[0] - layer(x)).abs().max() > 1e-3


@pytest.mark.parametrize("group", LAYER_GROUPS, ids=str)
def test_it_is_equivariant(group, generator):
    layer = build(group, generator)
    x = features(group, generator)
    options = {"elements": some_elements(group), "tolerance": 1e-12}
    assert_equivariant(layer, group, x, **options)
    mask = torch.rand(B, HEADS, group.degree, group.degree, generator=generator) < 0.7
    assert_equivariant(layer, group, [x, mask], **options)
    assert_equivariant(layer, group, [x, mask[:1, :1, :1]], **options)

    def gradient(x, direction):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad((layer(x) * direction).sum(), x)[0]

    def act(element, *tensors):
        moved = tuple(group.permute(element, tensor) for tensor in tensors)
        return moved if len(moved) > 1 else moved[0]

    assert_equivariant(gradient, group, [x, features(group, generator)], act_in=act, act_out=act, **options)
    share = layer.contributions(x)
    for h in range(group.order):
        torch.testing.assert_close(layer.contributions(layer.act_in(h, x)), share, rtol=0, atol=1e-12)


def test_a_group_that_it_does_not_have_fails(generator):
    layer = build(cyclic(5), generator)
    swap = PermutationGroup([[1, 0, 2, 3, 4]])
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(
            layer, swap, features(swap, generator), act_in=swap.permute, act_out=swap.permute, tolerance=1e-3
        )


def test_float32_is_as_good_as_the_loops_in_float32(generator):
    group = dihedral(5)
    layer = build(group, generator).float()
    x = features(group, generator).float()
    with torch.no_grad():
        candidate, low = layer(x), by_loops(layer, x, group.projectors())[0]
        reference = by_loops(layer.double(), x.double(), group.projectors())[0]
    assert_low_precision(candidate, low, reference)
    # Rounded to float32 and back, the projectors are still exact.
    assert_equivariant(layer, group, x, num_elements=group.order, tolerance=1e-12)


def test_errors(generator):
    for dim, heads in [(8, 3), (8, 0), (0, 1)]:
        with pytest.raises(ValueError, match="num_heads must divide dim"):
            PSEADAttention(cyclic(4), dim, heads)
    layer = PSEADAttention(cyclic(4), 8, 2, generator=generator)
    for shape in [(2, 5, 8), (2, 4, 6), (4, 8)]:
        with pytest.raises(ValueError, match=r"\[B, N, dim\]"):
            layer(torch.zeros(shape))
    for mask in (torch.ones(2, 1, 4, 4), torch.ones(2, 3, 4, 4, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask"):
            layer(torch.zeros(2, 4, 8), mask)


# --- what it is not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [cyclic(6), dihedral(5), symmetric(4), reversal(6), quaternion()], ids=str)
def test_its_sum_is_not_attention(group, generator):
    """The channels of attention itself do add up to it, as they should."""
    layer = build(group, generator)
    x = features(group, generator)
    q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
    attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    sum_of_channels = layer.channel_outputs(x).sum(1)
    assert (sum_of_channels - attention).norm() > 0.1 * attention.norm()
    parts = torch.einsum("mij,bjd->bmid", group.projectors(), attention)
    torch.testing.assert_close(parts.sum(1), attention, rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [3, 5, 6, 8])
def test_it_is_blind_to_direction(n, generator):
    """Built for rotations, it is equivariant under reflections too."""
    rotations, both = cyclic(n), dihedral(n)
    layer = build(rotations, generator)
    x = features(rotations, generator)
    options = {"act_in": both.permute, "act_out": both.permute, "num_elements": 2 * n}
    assert_equivariant(layer, both, x, tolerance=1e-12, **options)
    if n > 3:  # but not under every permutation: S₃ is D₃
        swap = [1, 0, *range(2, n)]
        assert (layer(x[:, swap])[:, swap] - layer(x)).abs().max() > 1e-3


@pytest.mark.parametrize("group", [cyclic(5), dihedral(4), alternating(4), quaternion()], ids=str)
def test_the_trivial_channel_is_the_mean(group, generator):
    """On a transitive group the channel's softmax is uniform whatever the content."""
    layer = build(group, generator, scale=30.0)
    x = features(group, generator)
    assert layer.channels[0].dimension == 1
    expected = layer.value(x).mean(1, keepdim=True).expand(-1, group.degree, -1)
    torch.testing.assert_close(layer.channel_outputs(x)[:, 0], expected, rtol=0, atol=1e-13)
    # Not so with two orbits: the reversal of six positions has three.
    group = reversal(6)
    layer, x = build(group, generator), features(group, generator)
    mean = layer.value(x).mean(1, keepdim=True)
    assert (layer.channel_outputs(x)[:, 0] - mean).abs().max() > 1e-2


@pytest.mark.parametrize("group", LAYER_GROUPS, ids=str)
def test_channels_are_closed_only_in_dimension_one(group, generator):
    """An irrep of higher dimension keeps its channel where a central −1 tells it from the rest:
    with Q also V changes sign, and A does not."""
    layer = build(group, generator)
    x = features(group, generator)
    lone = group in (dihedral(4), quaternion())
    for irrep, projector, y in zip(layer.channels, group.projectors(), layer.channel_outputs(x).unbind(1)):
        leak = float((y - projector @ y).square().sum() / y.square().sum())
        assert (leak < 1e-28) == (irrep.dimension == 1 or lone)
        assert leak < 1e-28 or leak > 1e-6


# --- what the official code gets wrong ------------------------------------------------------------
# Restated: P_λ = (d_λ / |G|) Σ_h χ_λ(h) ρ(h) on the n positions, with characters that are tabulated for C_2, C_4 and
# D_2, and otherwise a row of ones and a row of random signs, one for each element but the identity.


def published(group, dimensions, characters):
    """Projectors by the published formula: dimensions [M], characters [M, G]."""
    scale = np.array(dimensions)[:, None] / group.order * np.array(characters, dtype=np.float64)
    return torch.from_numpy(np.einsum("mg,gij->mij", scale, permutation_matrices(group.positions)))


def official(group, seed):
    """What the official code does for a group that is not in its table."""
    signs = np.random.default_rng(seed).choice([-1, 1], size=group.order)
    signs[0] = 1
    return published(group, [1, 1], [np.ones(group.order), signs])


def failures(group, projectors):
    """Largest errors of idempotence, completeness and of commuting with the group."""
    matrices = torch.from_numpy(permutation_matrices(group.positions))
    idempotence = (projectors @ projectors - projectors).abs().max()
    completeness = (projectors.sum(0) - torch.eye(group.degree, dtype=torch.float64)).abs().max()
    commuting = max((p @ projectors - projectors @ p).abs().max() for p in matrices)
    return [float(error) for error in (idempotence, completeness, commuting)]


def assert_ours_passes(group):
    assert max(failures(group, group.projectors())) < 1e-12


def test_their_c4_is_not_idempotent():
    """The plane of C₄ is of complex type: without the ½ its projector is twice one, and the sum is no identity."""
    group = cyclic(4)
    turns = [tuple(element.positions).index(0) * -1 % 4 for element in group.elements]  # by how much each shifts
    table = [[1, 1, 1, 1], [1, -1, 1, -1], [2, 0, -2, 0]]
    projectors = published(group, [1, 1, 2], [[row[t] for t in turns] for row in table])
    torch.testing.assert_close(projectors[2] @ projectors[2], 2 * projectors[2], rtol=0, atol=1e-15)
    idempotence, completeness, _ = failures(group, projectors)
    assert idempotence == pytest.approx(1.0, abs=1e-12)
    assert completeness == pytest.approx(0.5, abs=1e-12)
    assert_ours_passes(group)
    # Twice the projector makes the scores of that channel four times too large; ours is half of it.
    plane = next(k for k, irrep in enumerate(group.channels()) if irrep.dimension == 2)
    torch.testing.assert_close(projectors[2], 2 * group.projectors()[plane], rtol=0, atol=1e-14)


@pytest.mark.parametrize("n, expected", [(3, 2 / 3), (5, 0.6), (6, 2 / 3)])
def test_their_cyclic_groups_are_not_complete(n, expected):
    """Part of the input is thrown away, another part at each construction."""
    group = cyclic(n)
    errors = [failures(group, official(group, seed))[1] for seed in range(8)]
    assert max(errors) == pytest.approx(expected, abs=1e-12)
    assert min(errors) > 0.3
    assert any(not torch.equal(official(group, 0), official(group, seed)) for seed in range(1, 8))
    assert_ours_passes(group)


@pytest.mark.parametrize("n", [3, 4])
def test_their_dihedral_groups_are_not_equivariant(n, generator):
    """Random signs are no class function, so that the "projectors" do not commute with the group."""
    group = dihedral(n)
    layer = build(group, generator)
    x = features(group, generator)
    worst = 0.0
    for seed in range(2):
        projectors = official(group, seed)

        def theirs(x, projectors=projectors):
            return by_loops(layer, x, projectors)[0]

        with torch.no_grad():
            for h in range(group.order):
                worst = max(worst, float((theirs(group.permute(h, x)) - group.permute(h, theirs(x))).abs().max()))
    assert worst > 1e-2
    assert_ours_passes(group)
    assert_equivariant(layer, group, x, num_elements=group.order, tolerance=1e-12)


def test_their_klein_group_on_two_points_has_empty_channels():
    """Four irreps on two positions, of which two have rank 0; ours gives the channels that there are."""
    on_two = PermutationGroup([[1, 0]])
    # Two rotations and two reflections i -> h - i of two points: each pair is the identity and the exchange.
    eye, flip = torch.eye(2).double(), torch.eye(2).double().flip(0)
    rho = [eye, flip, eye, flip]
    characters = [[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]
    ranks = [int(torch.linalg.matrix_rank(sum(c * r for c, r in zip(row, rho)) / 4)) for row in characters]
    assert ranks == [1, 0, 1, 0]
    assert [torch.linalg.matrix_rank(p).item() for p in on_two.projectors()] == [1, 1]
    assert [torch.linalg.matrix_rank(p).item() for p in klein().projectors()] == [1, 1, 1, 1]


@pytest.mark.parametrize("group", [cyclic(5), alternating(4), quaternion()], ids=str)
def test_real_characters_need_their_norm(group):
    """The published formula with true real characters, and with the missing 1, 2 or 4."""
    irreps = group.channels()
    characters = [irrep.character[group.class_of] for irrep in irreps]
    theirs = published(group, [irrep.dimension for irrep in irreps], characters)
    assert failures(group, theirs)[0] > 0.1 or all(irrep.kind == "real" for irrep in irreps)
    norms = np.array([np.square(character).mean() for character in characters])
    torch.testing.assert_close(theirs / torch.from_numpy(norms)[:, None, None], group.projectors(), rtol=0, atol=1e-12)


def test_contributions_depend_on_the_input(generator):
    """The official code returns the same random numbers for every input; ours see what is there."""
    group = reversal(6)
    layer = build(group, generator)
    with torch.no_grad():
        layer.value.bias.zero_()
    x = features(group, generator)
    even, odd = (layer.contributions(x + sign * x.flip(1)) for sign in (1, -1))
    assert layer.contributions(x).shape == (B, 2)
    assert (layer.contributions(x)[0] - layer.contributions(x)[1]).abs().max() > 1e-3
    torch.testing.assert_close(even, torch.tensor([[1.0, 0.0]]).double().expand(B, -1), rtol=0, atol=1e-14)
    torch.testing.assert_close(odd, torch.tensor([[0.0, 1.0]]).double().expand(B, -1), rtol=0, atol=1e-14)
