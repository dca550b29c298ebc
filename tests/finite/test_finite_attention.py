"""Equivariant attention against loops over heads and positions, and its symmetry in float64."""

import copy
import functools
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from finite_cases import LAYER_GROUPS, some_elements
from torch import nn

from erlangen.finite import (
    PermutationGroup,
    alternating,
    cyclic,
    dihedral,
    direct_product,
    klein,
    quaternion,
    reversal,
    reverse_complement,
    symmetric,
)
from erlangen.finite.attention import (
    EquivariantAttention,
    EquivariantBlock,
    EquivariantPool,
    InvariantPool,
    acts_on_line,
)
from erlangen.testing import assert_equivariant, assert_invariant, assert_low_precision

B = 2
TOLERANCE = 1e-12

LINES = [cyclic(5), cyclic(6), dihedral(3), dihedral(4), klein(), reversal(5), reversal(4), reverse_complement(6)]
NOT_LINES = [symmetric(4), alternating(4), quaternion(), direct_product(cyclic(2), cyclic(3))]


def scramble(module, generator):
    """Generic parameters, in float64: no bias at zero, no gain at one."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module.requires_grad_(False)


def features(group, dim, generator, batch=B):
    return torch.randn(batch, group.degree, dim, generator=generator, dtype=torch.float64)


def sizes(group, permuted):
    """dim and num_heads: two orbits of heads of width 2, or three heads of two copies each."""
    return (4 * group.order, 2 * group.order) if permuted else (6 * group.order, 3)


def build(group, permuted, position, generator):
    dim, num_heads = sizes(group, permuted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the 2-closure, tested below
        layer = EquivariantAttention(group, dim, num_heads, position=position, generator=generator)
    assert layer.permutes_heads == (permuted or group.order in (1, 3))
    return scramble(layer, generator)


def padding_mask(group):
    """Two positions of padding in the first window, none in the second."""
    mask = torch.ones(B, group.degree, dtype=torch.bool)
    mask[0, :2] = False
    return mask


def pair_mask(layer, generator, heads=True):
    shape = (B, layer.num_heads if heads else 1, layer.group.degree, layer.group.degree)
    return torch.rand(shape, generator=generator) < 0.7


# --- the oracle -------------------------------------------------------------------------------------------------------


def dense(layer):
    """Weights [3, C, G, dim] and biases [3, C, G] of q, k, v in the group basis, and the output map [C, G] -> dim."""
    layer = copy.deepcopy(layer).double()
    order, dim = layer.group.order, layer.dim
    with torch.no_grad():
        zero, eye = torch.zeros(1, dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)
        qkv_bias = layer.group_basis.to_group(layer.qkv(zero))[0]
        qkv = (layer.group_basis.to_group(layer.qkv(eye)) - qkv_bias).permute(1, 2, 0)
        units = eye.unflatten(1, (-1, order))
        out_bias = layer.output(zero)[0]
        out = (layer.output(layer.group_basis.to_fourier(units)) - out_bias).T
    return qkv.unflatten(0, (3, -1)), qkv_bias.unflatten(0, (3, -1)), out, out_bias


line_of = functools.cache(acts_on_line)
orbitals_of = functools.cache(PermutationGroup.orbitals)


def position_score(layer, bias, part, g, i, j):
    """What positions i and j add to the score of part `part` at g, as the docstring says it."""
    group = layer.group
    if layer.position == "relative":
        sign, wraps = line_of(group).signs[g], line_of(group).wraps
        distance = j - i
        if layer.permutes_heads:
            distance = sign * distance
        elif (line_of(group).signs < 0).any():
            distance = abs(distance)
            distance = min(distance, group.degree - distance) if wraps else distance
            return bias[part, distance]
        return bias[part, distance % group.degree if wraps else distance + group.degree - 1]
    if layer.permutes_heads:
        back = np.argsort(group.positions[g])
        return bias[part, back[i], back[j]]
    return bias[part, orbitals_of(group)[i, j]]


def turned(layer, q_RG, position):
    """Rotary positions, one plane at a time; q_RG [R, G] of one part at one position."""
    line, num_positions, planes = line_of(layer.group), layer.group.degree, len(q_RG) // 2
    rows = q_RG.copy()
    for plane, g in itertools.product(range(planes), range(layer.group.order)):
        if line.wraps:
            turns = 1 + plane * (num_positions // 2 - 1) // max(planes - 1, 1)
            angle = 2 * math.pi * turns * position / num_positions
        else:
            angle = 10_000.0 ** (-plane / planes) * position
        c, s = math.cos(angle), math.sin(angle) * int(line.signs[g])
        x, y = q_RG[plane, g], q_RG[plane + planes, g]
        rows[plane, g], rows[plane + planes, g] = c * x - s * y, s * x + c * y
    return rows


def reference(layer, x, allowed=None):
    """Attention by loops over windows, heads and positions, in the dtype of x; allowed is bool [B, H, N, N]."""
    dtype = x.numpy().dtype
    weight, bias, out, out_bias = (tensor.numpy().astype(dtype) for tensor in dense(layer))
    order, num_positions = layer.group.order, layer.group.degree
    parts = layer.num_heads // order if layer.permutes_heads else layer.num_heads
    between = None if layer.bias is None else layer.bias.detach().numpy().astype(dtype)
    windows = []
    for b in range(len(x)):
        # of each position, queries, keys and values [3, A, R, G]
        tokens = [(weight @ x[b, i].numpy() + bias).reshape(3, parts, -1, order) for i in range(num_positions)]
        if layer.position == "rotary":
            for i, token in enumerate(tokens):
                for part, t in itertools.product(range(parts), range(2)):
                    token[t, part] = turned(layer, token[t, part], i)
        received = np.zeros((num_positions, parts, weight.shape[1] // parts, order), dtype)
        for part in range(parts):
            # The group elements that a head sees: one if the group permutes the heads, all if it does not.
            for members in [[g] for g in range(order)] if layer.permutes_heads else [list(range(order))]:
                head = part * order + members[0] if layer.permutes_heads else part
                for i in range(num_positions):
                    keep = [j for j in range(num_positions) if allowed is None or allowed[b, head, i, j]]
                    if not keep:
                        continue
                    scores = np.zeros(len(keep), dtype)
                    for place, j in enumerate(keep):
                        query, key = tokens[i][0, part][:, members], tokens[j][1, part][:, members]
                        scores[place] = (query * key).sum() / math.sqrt(query.size)
                        if between is not None:
                            scores[place] += position_score(layer, between, part, members[0], i, j)
                    weights = np.exp(scores - scores.max())
                    for w, j in zip(weights / weights.sum(), keep):
                        received[i, part][:, members] += w * tokens[j][2, part][:, members]
        windows.append(received.reshape(num_positions, -1) @ out.T + out_bias)
    return torch.from_numpy(np.stack(windows))


CASES = [
    (klein(), True, "relative"),
    (dihedral(3), True, "bias"),
    (quaternion(), False, "bias"),
    (reverse_complement(4), False, "bias"),
    (reversal(5), True, "relative"),
    (reversal(4), False, "relative"),
    (dihedral(4), True, "relative"),
    (dihedral(4), False, "relative"),
    (cyclic(4), False, "relative"),
    (reverse_complement(5), True, "rotary"),
    (reversal(4), False, "rotary"),
    (dihedral(4), True, "rotary"),
    (dihedral(3), False, "rotary"),
    (klein(), True, "none"),
    (klein(), False, "none"),
]


@pytest.mark.parametrize("group, permuted, position", CASES, ids=str)
def test_values_are_loops_over_heads_and_positions(group, permuted, position, generator):
    layer = build(group, permuted, position, generator)
    x = features(group, layer.dim, generator)
    with torch.no_grad():
        mask = pair_mask(layer, generator)
        mask[0, 0, 1] = False  # a row that attends to nothing
        mask[1] = True
        expected = reference(layer, x, mask)
        close = {"rtol": 0, "atol": 1e-12 * float(expected.abs().max())}
        torch.testing.assert_close(layer(x, mask), expected, **close)
        torch.testing.assert_close(layer(x[1:]), expected[1:], **close)

        padding = padding_mask(group)[:1]
        allowed = padding[:, None, None, :].expand(-1, layer.num_heads, group.degree, -1)
        expected = reference(layer, x[:1].masked_fill(~padding[..., None], 0.0), allowed)
        expected = expected.masked_fill(~padding[..., None], 0.0)
        garbage = x[:1].masked_fill(~padding[..., None], math.nan)
        torch.testing.assert_close(layer(garbage, padding), expected, rtol=0, atol=1e-11)


def test_the_oracle_sees_a_wrong_layer(generator):
    layer = build(dihedral(3), True, "bias", generator)
    x = features(layer.group, layer.dim, generator)
    expected = reference(layer, x)
    with torch.no_grad():
        layer.bias[0, 0, 1] += 1e-6
    assert (layer(x) - expected).abs().max() > 1e-9


@pytest.mark.parametrize("position", ["bias", "relative", "rotary"])
@pytest.mark.parametrize("permuted", [True, False], ids=["permuted", "whole"])
def test_float32_is_as_good_as_the_loops_in_float32(permuted, position, generator):
    layer = build(dihedral(3), permuted, position, generator)
    x = features(layer.group, layer.dim, generator, batch=1)
    layer32, x32 = copy.deepcopy(layer).float(), x.float()
    layer, x = copy.deepcopy(layer32).double(), x32.double()
    with torch.no_grad():
        assert_low_precision(layer32(x32), reference(layer32, x32), reference(layer, x))


# --- equivariance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("permuted", [True, False], ids=["permuted", "whole"])
@pytest.mark.parametrize(
    "group, position",
    [*((group, "bias") for group in LAYER_GROUPS), (symmetric(3), "none"), (reverse_complement(6), "none")],
    ids=str,
)
def test_attention_is_equivariant(group, permuted, position, generator):
    layer = build(group, permuted, position, generator)
    x = features(group, layer.dim, generator)
    assert_equivariant(layer, group, x, elements=some_elements(group), tolerance=TOLERANCE)
    masks = [padding_mask(group), pair_mask(layer, generator), pair_mask(layer, generator)[:, :, :1]]
    elements = some_elements(group, most=2)
    for mask in (*masks, pair_mask(layer, generator, heads=False)[:1]):
        assert_equivariant(layer, group, [x, mask], elements=elements, tolerance=TOLERANCE)


@pytest.mark.parametrize("group", LINES, ids=str)
@pytest.mark.parametrize("permuted", [True, False], ids=["permuted", "whole"])
@pytest.mark.parametrize("position", ["relative", "rotary"])
def test_attention_with_relative_and_rotary_positions_is_equivariant(group, permuted, position, generator):
    layer = build(group, permuted, position, generator)
    x = features(group, layer.dim, generator)
    assert_equivariant(layer, group, x, elements=some_elements(group), tolerance=TOLERANCE)
    # Positions matter: some permutation of them outside the group is seen.
    if group.order < math.factorial(group.degree):
        swap = [1, 0, *range(2, group.degree)]
        assert (layer(x[:, swap])[:, swap] - layer(x)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "group, position",
    [*((group, "rotary") for group in LINES if group != cyclic(6)), *((group, "bias") for group in NOT_LINES[1:])],
    ids=str,
)
def test_a_stack_of_blocks_and_its_gradients_are_equivariant(group, position, generator):
    dim = 2 * group.order
    blocks = nn.ModuleList(
        EquivariantBlock(group, dim, group.order, position=position, hidden_dim=dim, generator=generator)
        for _ in range(2)
    )
    for block in blocks:
        scramble(block, generator)
    mask = padding_mask(group)

    def move(element, tensor):
        block = blocks[0]
        return (block.act_on_mask if tensor.dtype == torch.bool else block.act_out)(element, tensor)

    def act(element, *tensors):
        moved = tuple(move(element, tensor) for tensor in tensors)
        return moved if len(moved) > 1 else moved[0]

    def run(x, mask=None):
        for block in blocks:
            x = block(x, mask)
        return x

    def gradient(x, direction, mask=None):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad((run(x, mask) * direction).sum(), x)[0]

    x, direction = features(group, dim, generator), features(group, dim, generator)
    options = {"act_in": act, "act_out": act, "elements": some_elements(group, most=2), "tolerance": TOLERANCE}
    assert_equivariant(run, group, x, **options)
    assert_equivariant(run, group, [x, mask], **options)
    assert_equivariant(gradient, group, [x, direction], **options)
    assert_equivariant(gradient, group, [x, direction, mask], **options)


@pytest.mark.parametrize("group", LAYER_GROUPS, ids=str)
def test_pools(group, generator):
    dim = 4 * group.order
    x, mask = features(group, dim, generator), padding_mask(group)
    keep = scramble(EquivariantPool(group, dim, 2 * group.order, generator=generator), generator)
    forget = scramble(InvariantPool(group, dim, 7, generator=generator), generator)
    everything = {"elements": some_elements(group), "tolerance": TOLERANCE}
    for inputs in (x, [x, mask]):
        assert_equivariant(keep, group, inputs, **everything)
        assert_invariant(forget, group, inputs, **everything)
    assert keep(x).shape == (B, dim)
    assert forget(x).shape == (B, 7)
    garbage = x.masked_fill(~mask[..., None], math.nan)
    assert torch.equal(keep(garbage, mask), keep(x, mask))
    # The invariant pool sees more than the trivial channels, which come first.
    others = x.clone()
    others[..., 4:] += 1.0
    assert (forget(others) - forget(x)).abs().max() > 1e-3
    # A pool may prefer positions, and does not see padding.
    shifted = x.roll(1, 1)
    if group.degree > 2:
        assert (keep(shifted) - keep(x)).abs().max() > 1e-3
    assert torch.isfinite(keep(x, torch.zeros_like(mask))).all()


def test_pool_values_are_loops(generator):
    group = dihedral(3)
    pool = scramble(EquivariantPool(group, 24, 12, generator=generator), generator)
    x = features(group, 24, generator)
    mask = padding_mask(group)
    with torch.no_grad():
        score = pool.group_basis.to_group(pool.score(x))  # [B, N, A, G]
        value = pool.group_basis.to_group(pool.value(x)).unflatten(2, (2, 2))
        pooled = torch.zeros(B, 2, 2, 6, dtype=torch.float64)
        for b, a, g in np.ndindex(B, 2, 6):
            back = np.argsort(group.positions[g])
            total = 0.0
            for i in range(3):
                if mask[b, i]:
                    weight = math.exp(score[b, i, a, g] + pool.bias[a, back[i]])
                    total += weight
                    pooled[b, a, :, g] += weight * value[b, i, a, :, g]
            pooled[b, a, :, g] /= total
        expected = pool.output(pool.group_basis.to_fourier(pooled.flatten(1, 2)))
    torch.testing.assert_close(pool(x, mask), expected, rtol=0, atol=1e-12)


def test_directional_biases_survive_a_reversal(generator):
    """Two heads that the reversal exchanges may look to opposite sides, which no bias tied on pairs can say."""
    group = reversal(6)
    layer = build(group, True, "bias", generator)
    bias = layer.position_bias()
    assert (bias[0] - bias[0].mT).abs().max() > 0.1
    torch.testing.assert_close(bias[1], bias[0].flip(0, 1), rtol=0, atol=0)
    tied = build(group, False, "bias", generator).position_bias()
    torch.testing.assert_close(tied, tied.flip(1, 2), rtol=0, atol=0)


# --- wrong answers ----------------------------------------------------------------------------------------------------


class FreeBias(EquivariantAttention):
    def position_bias(self):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.num_heads, self.group.degree, self.group.degree, generator=generator).double()


@pytest.mark.parametrize("permuted", [True, False], ids=["permuted", "whole"])
@pytest.mark.parametrize("group", [dihedral(4), reverse_complement(6), quaternion()], ids=str)
def test_what_breaks_the_symmetry_fails(group, permuted, generator):
    dim, num_heads = sizes(group, permuted)
    x = features(group, dim, generator)

    free = build(group, permuted, "bias", generator)
    free.qkv = nn.Linear(dim, 3 * dim).double()
    with torch.no_grad():
        free.qkv.weight.normal_(generator=generator)
    untied = scramble(FreeBias(group, dim, num_heads, generator=generator), generator)
    padded = build(group, permuted, "bias", generator)
    elements = some_elements(group, most=2)  # so few are enough to see it
    for layer, inputs, act_in in [
        (free, x, None),
        (untied, x, None),
        (padded, [x, padding_mask(group)], lambda e, x, mask: (padded.act_in(e, x), mask)),  # mask stays
    ]:
        with pytest.raises(AssertionError, match="not equivariant"):
            assert_equivariant(layer, group, inputs, act_in=act_in, elements=elements, tolerance=1e-3)


@pytest.mark.parametrize("group", [cyclic(6), dihedral(6), reversal(6)], ids=str)
def test_rotary_planes_must_carry_a_reflection(group, generator):
    """The error is rounding if q and k carry diag(1, s(h)) on a plane, and large if they carry
    nothing; the test is on plain rotary scores, and on the layer with the signs taken away."""
    line = acts_on_line(group)
    rotary = build(group, True, "rotary", generator)
    x = features(group, rotary.dim, generator)
    table = assert_equivariant(rotary, group, x, num_elements=group.order, tolerance=1e-13)
    assert table.max_relative < 1e-13
    reverses = bool((line.signs < 0).any())
    rotary._signs.fill_(1)
    if reverses:
        with pytest.raises(AssertionError, match="not equivariant"):
            assert_equivariant(rotary, group, x, num_elements=group.order, tolerance=1e-3)

    num_positions, planes = group.degree, 4
    q, k = torch.randn(2, num_positions, planes, 2, generator=generator, dtype=torch.float64)
    place = torch.arange(num_positions, dtype=torch.float64)[:, None]
    wave = torch.arange(1, planes + 1, dtype=torch.float64)
    angle = place * wave * 2 * math.pi / num_positions

    def scores(q, k):
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = torch.view_as_complex(q) * turn, torch.view_as_complex(k) * turn
        return (q @ k.mH).real

    def error(carry):
        worst = 0.0
        for number, sign in enumerate(line.signs):
            plane = torch.tensor([1.0, float(sign) if carry else 1.0], dtype=torch.float64)
            moved = scores(*(group.permute(number, y * plane, dim=0) for y in (q, k)))
            expected = group.permute(number, group.permute(number, scores(q, k), dim=0), dim=1)
            worst = max(worst, float((moved - expected).abs().max()))
        return worst

    assert error(carry=True) < 2e-14
    assert (error(carry=False) > 0.1) == reverses


def test_rotary_positions_on_a_ring_see_the_shift_on_the_ring():
    """Frequencies are whole turns a ring: the last position is as near to the first as the first to the second."""
    layer = EquivariantAttention(cyclic(7), 28, 7, position="rotary")
    ones = torch.ones(1, 7, 1, 4, 7)
    turned = layer._turn(ones)[0, :, 0, :, 0]
    scores = turned @ turned.mT
    torch.testing.assert_close(scores, scores.roll((1, 1), (0, 1)))
    assert scores[0].std() > 0.1


def test_lines():
    for group in LINES:
        line = acts_on_line(group)
        assert line.wraps == (group.order > 2)
        for sign, image in zip(line.signs, group.positions):
            step = np.diff(image)
            assert ((step - sign) % group.degree == 0).all() if line.wraps else (step == sign).all()
    assert all(acts_on_line(group) is None for group in NOT_LINES)
    assert acts_on_line(PermutationGroup([[1, 2, 0, 3]])) is None
    assert not acts_on_line(PermutationGroup([[1, 0]])).wraps
    assert not acts_on_line(PermutationGroup([[0]])).wraps


# --- 2-closure and bad input ------------------------------------------------------------------------------------------


def test_whole_heads_cannot_tell_a_group_from_its_two_closure():
    with pytest.warns(UserWarning, match="24"):
        EquivariantAttention(alternating(4), 24, 1)
    # Heads that the group permutes can, and without positions there is nothing to tell.
    EquivariantAttention(alternating(4), 24, 12)
    EquivariantAttention(alternating(4), 24, 1, position="none")
    EquivariantAttention(symmetric(4), 48, 1)


def test_permuted_heads_see_more_than_the_two_closure(generator):
    """Features that carry trivial channels: whole heads give A₄ the symmetry of S₄, permuted heads do not."""
    group, bigger = alternating(4), symmetric(4)
    odd = next(number for number, element in enumerate(bigger.elements) if element.positions == (1, 0, 2, 3))
    for permuted in (True, False):
        layer = build(group, permuted, "bias", generator)
        copies = layer.dim // group.order
        x = torch.zeros(1, 4, layer.dim, dtype=torch.float64)
        x[..., :copies] = torch.randn(1, 4, copies, generator=generator, dtype=torch.float64)
        error = (layer(x) - bigger.permute(odd, layer(bigger.permute(odd, x))))[..., :copies].abs().max()
        assert error > 1e-5 if permuted else error < 1e-12


def test_errors(generator):
    group = dihedral(4)
    for dim, heads, text in [
        (12, 4, "multiple of the group's order"),
        (16, 4, "dim / num_heads a multiple of 8"),
        (32, 0, "multiple of 8"),
        (32, 3, "permutes the"),
        (0, 1, "multiple of the group's order"),
    ]:
        with pytest.raises(ValueError, match=text):
            EquivariantAttention(group, dim, heads)
    with pytest.raises(ValueError, match="position must be one of"):
        EquivariantAttention(group, 16, 8, position="absolute")
    for other in NOT_LINES:
        for position in ("rotary", "relative"):
            with pytest.raises(ValueError, match="use position='bias'"):
                EquivariantAttention(other, other.order * 2, other.order, position=position)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 2"):
        EquivariantAttention(group, 24, 8, position="rotary")
    with pytest.raises(ValueError, match="head_dim must be a multiple of 16"):
        EquivariantAttention(group, 24, 3, position="rotary")
    with pytest.raises(ValueError, match="rotary"):
        EquivariantAttention(reversal(10_000), 4, 2)
    with pytest.raises(ValueError, match="hidden_dim must be a multiple"):
        EquivariantBlock(group, 16, 8, hidden_dim=20)
    with pytest.raises(ValueError, match="num_heads must be a multiple"):
        EquivariantPool(group, 32, 4)
    with pytest.raises(ValueError, match="out_dim"):
        InvariantPool(group, 32, 0)

    layer = EquivariantAttention(group, 16, 8, generator=generator)
    x = torch.randn(B, 4, 16, generator=generator)
    for wrong in (x[0], x[:, :3], x[..., :8], x.long()):
        with pytest.raises(ValueError, match=r"\[B, N, dim\]"):
            layer(wrong)
    for mask in (
        torch.ones(B, 4),
        torch.ones(B, 3, dtype=torch.bool),
        torch.ones(B, 4, 4, dtype=torch.bool),
        torch.ones(B, 3, 4, 4, dtype=torch.bool),
        torch.ones(3, 8, 4, 4, dtype=torch.bool),
    ):
        with pytest.raises(ValueError, match="mask"):
            layer(x, mask)
    with pytest.raises(ValueError, match="padding"):
        EquivariantPool(group, 16, 8)(x, torch.ones(B, 1, 4, 4, dtype=torch.bool))


def test_long_windows_need_no_table(generator):
    """Rotary positions on 1,024 positions hold nothing of the size of all pairs."""
    layer = EquivariantAttention(reverse_complement(1024), 8, 2, position="rotary", generator=generator)
    assert max(tensor.numel() for tensor in (*layer.parameters(), *layer.buffers())) < 1024
    x = torch.randn(1, 1024, 8, generator=generator)
    with torch.no_grad():
        moved, expected = layer(layer.act_in(1, x)), layer.act_out(1, layer(x))
    assert (moved - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_same_generator_gives_the_same_layer_and_its_state_loads():
    def make(seed):
        return EquivariantBlock(dihedral(3), 12, 6, generator=torch.Generator().manual_seed(seed))

    first, second, third = make(0), make(0), make(1)
    x = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first(x), second(x))
    assert not torch.equal(first(x), third(x))
    third.load_state_dict(first.state_dict())
    assert torch.equal(first(x), third(x))
