"""The dial, against the isotypic parts as sums over the group with dense matrices."""

import copy
import functools

import numpy as np
import pytest
import torch
from finite_cases import UNLIKE_ORBITS, WINDOW_GROUPS, permutation_matrices, some_elements

from erlangen.finite import (
    cyclic,
    dihedral,
    klein,
    quaternion,
    reversal,
    reverse_complement,
    symmetric,
)
from erlangen.finite.irreps import Representation
from erlangen.finite.linear import EquivariantLinear
from erlangen.finite.partial import PartialBias, PartialLinear, unit_interval


@pytest.fixture(params=WINDOW_GROUPS, ids=repr)
def group(request):
    return request.param


def representations(group):
    """Input and output: different, with some irreps more than once, and in the output one that is absent."""
    count = len(group.irreps)
    return (
        Representation(group, [1 + k % 2 for k in range(count)]),
        Representation(group, [2 - k % 2 if k != 1 or count == 2 else 0 for k in range(count)]),
    )


def random_linear(group, generator, **options):
    layer = PartialLinear(group, *representations(group), generator=generator, **options).double()
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        if layer.bias is not None:
            layer.bias.normal_(generator=generator)
    layer.set_gamma(torch.rand(len(layer.channels), generator=generator))
    return layer


def random_bias(group, generator, **options):
    layer = PartialBias(group, 2, std=1.0, generator=generator, **options).double()
    layer.set_gamma(torch.rand(len(layer.channels), generator=generator))
    return layer


def orbit_of(layer, value):
    """Each element of the group applied to a weight, dense matrices on both sides: [G, ...]."""
    group = layer.group
    if isinstance(layer, PartialLinear):
        out = torch.stack([layer.target.matrix(h) for h in range(group.order)])
        inn = torch.stack([layer.source.matrix(h) for h in range(group.order)])
        return out @ value @ inn.mT
    moves = torch.from_numpy(permutation_matrices(group.positions))[:, None]
    return moves @ value @ moves.mT


def part(layer, value, irrep):
    """The character formula."""
    chi = irrep.character[layer.group.class_of]
    return irrep.dimension / (chi @ chi) * torch.einsum("h,h...->...", torch.from_numpy(chi), orbit_of(layer, value))


def applied(layer):
    return layer() if isinstance(layer, PartialBias) else layer.weight_and_bias()[0]


@functools.cache
def made_once(make, group):
    return make(group, torch.Generator().manual_seed(5))


@pytest.fixture(params=[random_linear, random_bias])
def layer(request, group):
    return copy.deepcopy(made_once(request.param, group))


# of each kind of irrep, with letters, and of orbits that are not alike: for what does not depend on the group
few_groups = pytest.mark.parametrize(
    "group", [symmetric(3), cyclic(5), quaternion(), reverse_complement(6), UNLIKE_ORBITS], ids=repr
)


def test_parts_are_those_of_the_character_formula(layer):
    free = layer.bias if isinstance(layer, PartialBias) else layer.weight
    layer.set_gamma(0.0)
    strict = applied(layer)
    torch.testing.assert_close(strict, part(layer, free, layer.group.irreps[0]), rtol=0, atol=1e-12)
    total = strict
    for irrep in layer.channels:
        layer.set_gamma(0.0)
        layer.set_gamma({irrep.name: 1.0})
        found = applied(layer) - strict
        torch.testing.assert_close(found, part(layer, free, irrep), rtol=0, atol=1e-11)
        total = total + found
    torch.testing.assert_close(total, free, rtol=0, atol=1e-12)  # no irrep is forgotten
    layer.set_gamma(1.0)
    torch.testing.assert_close(applied(layer), free, rtol=0, atol=1e-12)


def test_the_law_of_partialness(layer):
    """The closed form is the mean over the group, to rounding."""
    closed = layer.equivariance_error()
    torch.testing.assert_close(layer.measured_error(), closed.detach(), rtol=1e-10, atol=0)
    value = applied(layer)
    mean = (orbit_of(layer, value) - value).square().flatten(1).sum(1).mean()
    if isinstance(layer, PartialLinear):
        bias = layer.weight_and_bias()[1]
        moved = torch.stack([layer.target.matrix(h) @ bias for h in range(layer.group.order)])
        mean = mean + (moved - bias).square().sum(1).mean()
    torch.testing.assert_close(mean, closed, rtol=1e-10, atol=0)
    torch.testing.assert_close(layer.channel_errors().sum(), closed, rtol=1e-12, atol=0)
    # At any other dials the same number is wrong.
    layer.set_gamma(layer.gamma.detach() * 0.9)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(layer.measured_error(), closed.detach(), rtol=1e-3, atol=0)


def test_at_zero_it_commutes_and_at_one_it_is_free(layer, generator):
    layer.set_gamma(0.0)
    value = applied(layer)
    assert (orbit_of(layer, value) - value).abs().max() < 1e-12
    assert layer.equivariance_error() == 0 and layer.measured_error() < 1e-24
    if isinstance(layer, PartialLinear):
        x = torch.randn(3, layer.in_dim, generator=generator, dtype=torch.float64)
        for h in some_elements(layer.group):
            moved = layer(layer.source.act(h, x))
            torch.testing.assert_close(moved, layer.target.act(h, layer(x)), rtol=0, atol=1e-12)
    layer.set_gamma(1.0)
    value = applied(layer)
    assert (orbit_of(layer, value) - value).abs().max() > 1e-2
    energies = layer.part_energies()
    total = sum(p.square().sum() for name, p in layer.named_parameters() if name != "dials")
    torch.testing.assert_close(energies.sum(), total, rtol=1e-12, atol=0)  # Parseval


@few_groups
def test_the_table(layer):
    rows = layer.table()
    assert [row["channel"] for row in rows] == ["1", *(irrep.name for irrep in layer.channels)]
    assert rows[0]["gamma"] == 1 and rows[0]["error"] == 0
    assert [row["gamma"] for row in rows[1:]] == layer.gamma.tolist()
    assert sum(row["error"] for row in rows) == pytest.approx(layer.measured_error().item(), rel=1e-10)
    values = layer.weight_and_bias() if isinstance(layer, PartialLinear) else (layer(),)
    assert sum(row["energy"] for row in rows) == pytest.approx(sum(v.detach().square().sum().item() for v in values))


def test_zero_is_an_equivariant_linear_layer(group, generator):
    """Any equivariant weight is left as it is by all dials, and strict weights are all of them."""
    given, wanted = representations(group)
    strict = EquivariantLinear(group, given, wanted, generator=generator).double()
    with torch.no_grad():
        for parameter in strict.parameters():
            parameter.normal_(generator=generator)
    layer = PartialLinear(group, given, wanted, gamma=0.0).double()
    with torch.no_grad():
        layer.weight.copy_(strict.weight_matrix())
        layer.bias.copy_(strict(torch.zeros(given.dim, dtype=torch.float64)))
    x = torch.randn(4, given.dim, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(layer(x), strict(x), rtol=0, atol=1e-12)
    assert layer.part_energies()[1:].sum() < 1e-24
    # Their numbers of free parameters agree: the rank of W -> W_1.
    rank = sum(int((labels == 0).sum() * run) for (_, labels), run in zip(layer._blocks, copies_of_blocks(layer)))
    free = sum(p.numel() for name, p in strict.named_parameters() if "bias" not in name)
    assert rank == free


def copies_of_blocks(layer):
    return [row.copies * column.copies for row in layer._output_runs for column in layer._input_runs]


def test_regular_representations(generator):
    """In blocks of like irreps, with fewer and with more copies than a block is large."""
    group = dihedral(6)
    for copies in (1, 3):
        layer = PartialLinear(group, 12 * copies, 12 * copies, generator=generator).double()
        layer.set_gamma(torch.rand(len(layer.channels), generator=generator))
        weight = layer.weight_and_bias()[0]
        expected = part(layer, layer.weight, group.irreps[0])
        for irrep, gamma in zip(layer.channels, layer.gamma):
            expected = expected + gamma * part(layer, layer.weight, irrep)
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_activations_keep_their_variance(gamma, generator):
    for group in (reverse_complement(6), dihedral(4), quaternion()):
        dim = 24 * group.order
        layer = PartialLinear(group, dim, dim, gamma=gamma, generator=generator)
        x = torch.randn(2000, dim, generator=generator)
        variance = layer(x).var(0).mean().item()
        assert variance == pytest.approx(1, abs=0.1), (group, variance)


@few_groups
def test_gradients(layer, generator):
    """Of what is applied and of the error, with respect to weights and dials; all dials are reached."""
    for function in (applied, lambda layer: layer.equivariance_error()):
        layer.zero_grad()
        function(layer).square().sum().backward()
        assert layer.dials.grad.abs().min() > 0
    names = [name for name, _ in layer.named_parameters()]

    def call(*values):
        return torch.func.functional_call(copy_of, dict(zip(names, values)))

    copy_of = Applied(layer)
    names = [f"layer.{name}" for name in names]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(call, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, values, fast_mode=True, atol=1e-4, check_undefined_grad=False)


class Applied(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        return applied(self.layer), self.layer.equivariance_error()


def test_dials_reach_their_bounds_and_leave_them():
    dials = torch.tensor([-0.5, -0.5, 0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 2.0], requires_grad=True)
    slopes = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0])
    value = unit_interval(dials)
    assert value.tolist() == [0, 0, 0, 0, 0.5, 1, 1, 1, 1]
    (value * slopes).sum().backward()
    assert dials.grad.tolist() == [0, -1, 0, -1, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("start", [0.5, 1.0])
def test_the_dials_are_learned(start, generator):
    """The target has the sign channel closed and the other open; with the group lasso the parts γ_k W_k end so."""
    group = symmetric(3)
    target = PartialLinear(group, 6, 6, bias=False, gamma=1.0, generator=generator)
    target.set_gamma({"sign": 0.0})
    layer = PartialLinear(group, 6, 6, bias=False, gamma=start, generator=generator)
    x = torch.randn(256, 6, generator=generator)
    wanted = target(x).detach()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.06)
    for _ in range(150):
        optimizer.zero_grad()
        lasso = (layer.gamma * layer.part_energies()[1:].sqrt()).sum()
        ((layer(x) - wanted).square().mean() + 0.01 * lasso).backward()
        optimizer.step()
    parts = dict(zip(layer.names[1:], (layer.gamma.square() * layer.part_energies()[1:]).tolist()))
    assert parts["sign"] < 1e-4 < 1 < parts["2a"]
    torch.testing.assert_close(layer.equivariance_error(), target.equivariance_error(), rtol=0.1, atol=0)


def test_set_dials_are_not_learned(group, generator):
    layer = PartialBias(group, gamma=0.25, learned=False)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert set(layer.state_dict()) == {"bias", "dials"}
    layer.set_gamma({layer.names[-1]: 1.0})
    assert layer.gamma.tolist() == [0.25] * (len(layer.channels) - 1) + [1.0]
    layer.set_gamma(np.zeros(len(layer.channels)))
    layer.set_gamma([0.5] * len(layer.channels))
    assert layer.gamma.tolist() == [0.5] * len(layer.channels)


def test_a_bias_at_zero_is_a_bias_of_orbitals(group, generator):
    layer = PartialBias(group, 3, gamma=0.0, std=1.0, generator=generator).double()
    labels = torch.from_numpy(np.asarray(group.orbitals()).astype(np.int64))
    for label in labels.unique():
        values, free = layer()[:, labels == label], layer.bias[:, labels == label]
        torch.testing.assert_close(values, free.mean(1, keepdim=True).expand_as(values), rtol=0, atol=1e-13)


def test_a_reversal_has_two_parts(generator):
    """By hand: the even part of a bias stays, the odd part has the dial."""
    layer = PartialBias(reversal(4), gamma=0.25, std=1.0, generator=generator).double()
    b = layer.bias
    even, odd = (b + b.flip(1, 2)) / 2, (b - b.flip(1, 2)) / 2
    torch.testing.assert_close(layer(), even + 0.25 * odd, rtol=0, atol=1e-14)
    torch.testing.assert_close(layer.equivariance_error(), 2 / 16 * odd.square().sum(), rtol=1e-12, atol=0)


def test_moved_to_float64_it_is_exact(group, generator):
    """The bases follow from float64; those of float32 would leave 1e-7."""
    given, wanted = representations(group)
    linear = PartialLinear(group, given, wanted, gamma=0.0, generator=generator).double()
    bias = PartialBias(group, gamma=0.0, std=1.0, generator=generator).double()
    for layer in (linear, bias):
        value = applied(layer)
        assert value.dtype == torch.float64 and (orbit_of(layer, value) - value).abs().max() < 1e-12
    x = torch.randn(3, given.dim, generator=generator)
    single = linear.float()
    for h in some_elements(group):
        moved = single(given.act(h, x))
        torch.testing.assert_close(moved, wanted.act(h, single(x)), rtol=0, atol=1e-4)
    single.set_gamma(0.5)
    torch.testing.assert_close(single.measured_error(), single.equivariance_error().detach(), rtol=1e-5, atol=0)


@few_groups
def test_copies_states_and_other_devices(layer):
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(applied(twin), applied(layer), rtol=0, atol=0)
    twin.set_gamma(0.0)
    assert layer.gamma.abs().max() > 0
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(applied(twin), applied(layer), rtol=0, atol=0)
    with torch.device("meta"):
        if isinstance(layer, PartialLinear):
            empty = PartialLinear(layer.group, layer.source, layer.target).double()
        else:
            empty = PartialBias(layer.group, 2).double()
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    torch.testing.assert_close(applied(empty), applied(layer), rtol=0, atol=0)


@few_groups
def test_as_an_ordinary_layer(group, generator):
    layer = random_linear(group, generator)
    x = torch.randn(2, 3, layer.in_dim, generator=generator, dtype=torch.float64)
    linear = layer.to_linear()
    torch.testing.assert_close(linear(x), layer(x), rtol=0, atol=1e-13)
    assert linear.weight.data_ptr() != layer.weight.data_ptr()
    without = random_linear(group, generator, bias=False)
    assert without.bias is None and without.to_linear().bias is None
    torch.testing.assert_close(without.measured_error(), without.equivariance_error().detach(), rtol=1e-10, atol=0)


def test_it_compiles_whole(generator):
    layer = PartialLinear(symmetric(3), 6, 6, generator=generator)
    x = torch.randn(3, layer.in_dim, generator=generator)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    (grads,) = torch.autograd.grad(compiled(x).square().sum(), layer.dials)
    torch.testing.assert_close(grads, torch.autograd.grad(layer(x).square().sum(), layer.dials)[0])


def test_errors(generator):
    group = cyclic(4)
    with pytest.raises(ValueError, match="out_dim"):
        PartialLinear(group, 4, Representation.regular(klein()))
    with pytest.raises(ValueError, match="in_dim"):
        PartialLinear(group, 6, 4)
    with pytest.raises(ValueError, match="PartialLinear needs channels in and out, received 4 and 0"):
        PartialLinear(group, 4, Representation(group, [0] * len(group.irreps)))
    layer = PartialLinear(group, 4, 4)
    with pytest.raises(ValueError, match=r"takes features \[\.\.\., 4\], received \[2, 5\]"):
        layer(torch.zeros(2, 5))
    for wrong in (1.5, -0.1, float("nan"), {"sign": 2.0}):
        with pytest.raises(ValueError, match=r"gamma must be from 0 \(strict\) to 1 \(free\)"):
            layer.set_gamma(wrong)
    assert layer.gamma.tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"gamma has a dial for each of sign, 2a, received '3'"):
        layer.set_gamma({"3": 0.0})
    with pytest.raises(ValueError, match=r"one for each of the 2 dials \(sign, 2a\), received shape \[3\]"):
        layer.set_gamma([0.0] * 3)
    with pytest.raises(ValueError, match="num_heads must be at least 1, received 0"):
        PartialBias(group, 0)
