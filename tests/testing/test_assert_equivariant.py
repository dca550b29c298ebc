"""The equivariance tester sees what is wrong, and passes what is right."""

import pytest
import torch
from torch import nn

from erlangen.testing import ErrorRow, ErrorTable, assert_equivariant, assert_invariant


class Cyclic:
    """The cyclic shifts of n positions."""

    def __init__(self, n):
        self.elements = tuple((tuple((i + s) % n for i in range(n)), None) for s in range(n))


class Rotations:
    """SO(3), sampled."""

    def random(self, *batch, generator=None, dtype=None):
        a = torch.randn(*batch, 3, 3, generator=generator, dtype=dtype)
        return torch.linalg.matrix_exp(a - a.mT)


def shift(element, x):
    return x[..., list(element[0]), :]


def rotate(element, *tensors):
    moved = tuple(x @ element.mT for x in tensors)
    return moved if len(moved) > 1 else moved[0]


class CircularConvolution(nn.Module):
    """[B, N, C] -> [B, N, C], with the actions an Erlangen module has."""

    def __init__(self, channels, padding_mode="circular"):
        super().__init__()
        self.convolution = nn.Conv1d(channels, channels, 3, padding=1, padding_mode=padding_mode)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.convolution(x.mT).mT)

    def act_in(self, element, x):
        return shift(element, x)

    act_out = act_in


class DeepSets(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.each, self.all = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, x):
        return self.each(x) + self.all(x.mean(-2, keepdim=True))


@pytest.fixture
def x(generator):
    return torch.randn(2, 6, 4, generator=generator)


@pytest.fixture
def points(generator):
    return torch.randn(5, 3, generator=generator)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


@pytest.fixture(autouse=True)
def seeded_weights():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_a_circular_convolution_passes_and_is_not_touched(x):
    module = CircularConvolution(4)
    table = assert_equivariant(module, Cyclic(6), x)
    assert len(table.rows) == 6
    assert table.max_relative < 1e-13
    assert module.training
    assert module.convolution.weight.dtype == torch.float32


def test_zero_padding_fails_with_the_table_in_the_message(x):
    with pytest.raises(AssertionError, match=r"not equivariant.*\n.*relative[\s\S]*g\[1\][\s\S]*max"):
        assert_equivariant(CircularConvolution(4, "zeros"), Cyclic(6), x)


def test_a_permutation_equivariant_layer_passes(x, generator):
    elements = [(tuple(torch.randperm(6, generator=generator).tolist()), None) for _ in range(3)]
    assert_equivariant(DeepSets(4), None, x, act_in=shift, act_out=shift, elements=elements)


def test_a_layer_that_marks_a_position_fails(x):
    layer = DeepSets(4)

    def marked(x):
        y = layer.double()(x)
        return torch.cat([y[..., :1, :] * 2, y[..., 1:, :]], -2)

    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(marked, Cyclic(6), x, act_in=shift, act_out=shift)


@pytest.mark.parametrize("wrong", [lambda g, y: y, lambda g, y: torch.roll(y, 1, -2)])
def test_a_wrong_action_fails(x, wrong):
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(CircularConvolution(4), Cyclic(6), x, act_out=wrong)


def test_an_error_of_float32_size_fails(x):
    layer, bump = DeepSets(4).double(), torch.zeros(6, 1, dtype=torch.float64)
    bump[2] = 1e-6
    with pytest.raises(AssertionError, match=r"above 1e-10"):
        assert_equivariant(lambda x: layer(x) + bump, Cyclic(6), x, act_in=shift, act_out=shift)
    assert_equivariant(lambda x: layer(x) + bump, Cyclic(6), x, act_in=shift, act_out=shift, tolerance=1e-4)


def test_a_module_that_rounds_to_float32_fails_and_is_told_why(x):
    layer = DeepSets(4)
    with pytest.raises(AssertionError, match=r"output is torch\.float32"):
        assert_equivariant(lambda x: layer(x.float()).cos(), Cyclic(6), x, act_in=shift, act_out=shift, tolerance=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_outputs_fail(x, bad):
    def module(x):
        return torch.where(x > 0.5, bad, x)

    with pytest.raises(AssertionError, match="not finite"):
        assert_equivariant(module, Cyclic(6), x, act_in=shift, act_out=shift)


def test_a_wrong_shape_fails(x):
    with pytest.raises(AssertionError, match=r"shapes \[\(2, 6, 4\)\] and .* \[\(2, 5, 4\)\]"):
        assert_equivariant(DeepSets(4), Cyclic(6), x, act_in=shift, act_out=lambda g, y: y[:, 1:])


def test_squared_norm_is_invariant_under_rotations(points):
    table = assert_invariant(lambda v: (v**2).sum(-1), Rotations(), points, act_in=rotate, num_elements=5)
    assert len(table.rows) == 5
    assert_invariant(lambda v: (v**2).sum(), Rotations(), points[:1], act_in=rotate)


def test_a_norm_of_another_power_is_not_invariant(points):
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_invariant(lambda v: (v**4).sum(-1), Rotations(), points, act_in=rotate)


def test_several_inputs_and_outputs(points):
    def module(a, b):
        return torch.linalg.cross(a, b), (a * b).sum(-1), None

    def act_out(element, output):
        return rotate(element, output[0]), output[1], None

    inputs = (points, points.roll(1, 0))
    assert_equivariant(module, Rotations(), inputs, act_in=rotate, act_out=act_out)
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(module, Rotations(), inputs, act_in=rotate, act_out=lambda g, y: y)
    with pytest.raises(TypeError, match="as many inputs"):
        assert_equivariant(module, Rotations(), inputs, act_in=lambda g, a, b: a, act_out=act_out)


def test_a_module_that_works_in_place_is_given_fresh_inputs(points):
    kept = points.clone()
    assert_equivariant(lambda v: v.mul_(2), Rotations(), points, act_in=rotate, act_out=rotate)
    assert torch.equal(points, kept)


def zeros(module):
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def only_bias(module):
    nn.init.zeros_(module.each.weight)
    nn.init.zeros_(module.all.weight)
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (zeros(DeepSets(4)), "is zero"),
        (only_bias(DeepSets(4)), "does not depend on the inputs"),
        (lambda x: x, "returns its inputs"),
        (lambda x: torch.ones(2, 6, 1, dtype=x.dtype), "does not depend on the inputs"),
        (lambda x: x.detach().argmax(-2, keepdim=True) * 0 + 7, "does not depend on the inputs"),
        (lambda x: (2 * x, torch.zeros(3)), "output 1 is zero"),
    ],
)
def test_a_module_that_passes_trivially_is_refused(x, module, reason):
    def act_out(element, y):
        return (shift(element, y[0]), y[1]) if isinstance(y, tuple) else shift(element, y) if y.shape[-2] == 6 else y

    with pytest.raises(AssertionError, match=f"proves nothing: .*{reason}"):
        assert_equivariant(module, Cyclic(6), x, act_in=shift, act_out=act_out)
    assert_equivariant(module, Cyclic(6), x, act_in=shift, act_out=act_out, allow_trivial=True)


def test_a_constant_invariant_is_refused(points):
    with pytest.raises(AssertionError, match="does not depend"):
        assert_invariant(lambda v: (v * 0).sum(-1) + 3, Rotations(), points, act_in=rotate)


def test_inputs_that_no_element_moves_are_refused(x):
    with pytest.raises(AssertionError, match="no group element moves the inputs"):
        assert_equivariant(DeepSets(4), Cyclic(6), torch.ones_like(x), act_in=shift, act_out=shift)
    with pytest.raises(AssertionError, match="no group element moves the inputs"):
        assert_equivariant(DeepSets(4), Cyclic(1), x[:, :1], act_in=shift, act_out=shift)


def test_an_invariant_of_integers_needs_no_gradient():
    tokens = torch.tensor([[0, 1, 2, 3], [3, 3, 1, 0]])
    assert_invariant(
        lambda t: t.sort(-1).values, Cyclic(4), tokens, act_in=lambda g, t: t[:, list(g[0])], num_elements=3
    )


def test_an_invariant_that_depends_on_integers_alone_is_not_called_constant(x):
    def module(tokens, x):
        return tokens.double().pow(2).cumsum(-1)[:, -1:].expand(-1, 2) * torch.tensor([1.0, 2.0]) + 0 * x.sum()

    def act_in(element, tokens, x):
        return tokens[:, list(element[0])], shift(element, x)

    tokens = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 5, 1, 0, 0, 2]])
    assert_invariant(module, Cyclic(6), (tokens, x), act_in=act_in)


def test_a_large_group_is_sampled_repeatably_and_leaves_the_global_generator(x):
    group, module = Cyclic(6), CircularConvolution(4)
    state = torch.random.get_rng_state()
    tables = [assert_equivariant(module, group, x, num_elements=3) for _ in range(2)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert tables[0] == tables[1]
    assert len(tables[0].rows) == 3


def test_a_method_of_the_module_given_by_hand_acts_in_float64(points):
    class Rotated(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("frame", torch.linalg.qr(points[:3]).Q)

        def forward(self, v):
            return v * (v**2).sum(-1, keepdim=True)

        def act(self, element, v):
            assert self.frame.dtype == torch.float64
            return v @ element.mT

    module = Rotated()
    assert_equivariant(module, Rotations(), points, act_in=module.act, act_out=module.act)


def test_complex_parameters_are_widened(points):
    class Phase(nn.Module):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.tensor(0.3 + 0.4j))

        def forward(self, v):
            return self.phase * v

    assert_equivariant(Phase(), Rotations(), points, act_in=rotate, act_out=lambda g, y: y @ g.mT.to(y.dtype))


def test_what_is_missing_is_named(x):
    with pytest.raises(TypeError, match=r"DeepSets has no method act_in.*pass act_in="):
        assert_equivariant(DeepSets(4), Cyclic(6), x)
    with pytest.raises(TypeError, match=r"\.elements or \.random"):
        assert_equivariant(DeepSets(4), object(), x, act_in=shift, act_out=shift)
    with pytest.raises(ValueError, match="no group element"):
        assert_equivariant(DeepSets(4), None, x, act_in=shift, act_out=shift, elements=[])
    with pytest.raises(ValueError, match="num_elements"):
        assert_equivariant(DeepSets(4), Cyclic(6), x, act_in=shift, act_out=shift, num_elements=0)
    with pytest.raises(TypeError, match="must be a tensor"):
        assert_equivariant(lambda x: "no", Cyclic(6), x, act_in=shift, act_out=shift)


def test_the_table_reads_well_and_keeps_a_nan():
    table = ErrorTable((ErrorRow("g[0]", 1e-16, 2e-16), ErrorRow("g[1] (1, 0)", 3e-16, 1e-15)))
    assert str(table).splitlines() == [
        "element      absolute  relative",
        "g[0]         1.00e-16  2.00e-16",
        "g[1] (1, 0)  3.00e-16  1.00e-15",
        "max          3.00e-16  1.00e-15",
    ]
    nan = ErrorTable((ErrorRow("g[0]", float("nan"), 0.0), ErrorRow("g[1]", 1.0, 0.0)))
    assert nan.max_absolute != nan.max_absolute
