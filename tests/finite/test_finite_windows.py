"""Windows along a sequence, against loops over the windows."""

import pytest
import torch
from torch import nn

from erlangen.finite import cyclic, reversal
from erlangen.finite.attention import EquivariantAttention
from erlangen.finite.partial import PartialBias, PartialLinear
from erlangen.finite.windows import Windows

B, D = 2, 4


class Mixing(nn.Module):
    """A layer that tells positions of a window apart, and their neighbours."""

    def __init__(self, length, out_dim, generator):
        super().__init__()
        self.position = torch.randn(length, length, generator=generator, dtype=torch.float64)
        self.channel = torch.randn(D, out_dim, generator=generator, dtype=torch.float64)

    def forward(self, x):
        return torch.tanh(self.position @ x @ self.channel)


def loop(module, x, length, starts, gates=None, *, keep=False):
    """One window at a time; ``starts`` and ``gates`` a list for each sequence."""
    rows = []
    for b, sequence in enumerate(x):
        parts = [[] for _ in sequence]
        for w, start in enumerate(starts[b]):
            window = sequence[start : start + length]
            given = module(window[None])[0]
            if gates is not None:
                given = gates[b][w] * given + (1 - gates[b][w]) * window
            for i in range(length):
                parts[start + i].append(given[i])
        rows.append(torch.stack([sum(p) / len(p) if p else sequence[i] for i, p in enumerate(parts)]))
        assert keep or all(parts)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("length", "stride", "num_positions", "starts"),
    [
        (4, 4, 12, [0, 4, 8]),
        (4, 2, 10, [0, 2, 4, 6]),
        (4, 3, 11, [0, 3, 6, 7]),  # a last window where the others leave one position over
        (4, 1, 6, [0, 1, 2]),
        (4, None, 9, [0, 4, 5]),
        (5, 3, 5, [0]),
    ],
)
@pytest.mark.parametrize("out_dim", [D, 7])
def test_overlap_add_is_a_loop(length, stride, num_positions, starts, out_dim, generator):
    module = Mixing(length, out_dim, generator)
    windows = Windows(module, length, stride)
    x = torch.randn(B, num_positions, D, generator=generator, dtype=torch.float64)
    assert windows.starts(num_positions).tolist() == starts
    expected = loop(module, x, length, [starts] * B)
    torch.testing.assert_close(windows(x), expected, rtol=0, atol=1e-14)
    if out_dim == D:
        gates = torch.rand(B, len(starts), generator=generator, dtype=torch.float64)
        expected = loop(module, x, length, [starts] * B, gates)
        torch.testing.assert_close(windows(x, gates=gates), expected, rtol=0, atol=1e-14)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(windows(x, gates=gates.flip(0)), expected, rtol=0, atol=1e-14)


def test_gather_is_a_loop_and_leaves_the_rest_alone(generator):
    module = Mixing(3, D, generator)
    windows = Windows(module, 3, mode="gather")
    x = torch.randn(B, 10, D, generator=generator, dtype=torch.float64)
    starts = torch.tensor([[6, 0, 1], [4, 4, 7]])
    y = windows(x, starts)
    torch.testing.assert_close(y, loop(module, x, 3, starts.tolist(), keep=True), rtol=0, atol=1e-14)
    assert torch.equal(y[0, 4:6], x[0, 4:6]) and torch.equal(y[1, :4], x[1, :4])
    gates = torch.rand(3, generator=generator, dtype=torch.float64)
    expected = loop(module, x, 3, starts.tolist(), [gates] * B, keep=True)
    torch.testing.assert_close(windows(x, starts, gates), expected, rtol=0, atol=1e-14)
    both = windows(x, torch.tensor([6, 0]))
    torch.testing.assert_close(both, loop(module, x, 3, [[6, 0]] * B, keep=True), rtol=0, atol=1e-14)
    assert windows(x, torch.zeros(0, dtype=torch.int64)) is x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_identity_gives_the_identity(dtype, generator):
    x = torch.randn(B, 700, D, generator=generator).to(dtype)
    # A position is in up to 189 windows, which no sum in bfloat16 would survive.
    windows = Windows(nn.Identity(), 512, 1)
    gates = torch.rand(B, 189, generator=generator).to(dtype)
    for y in (windows(x), windows(x, gates=gates)):
        assert y.dtype == dtype
        rounding = 189 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        torch.testing.assert_close(y, x, rtol=max(rounding, torch.finfo(dtype).eps), atol=0)
    assert torch.equal(Windows(nn.Identity(), 7, 7)(x), x)


def test_gates_are_learned(generator):
    """Two windows out of four hold what the layer must change; the gates find them and close at the others."""
    x = torch.randn(64, 12, D, generator=generator, dtype=torch.float64)
    windows = Windows(Mixing(3, D, generator), 3, num_gates=4).double()
    assert windows.gates.tolist() == [1.0] * 4
    torch.testing.assert_close(windows(x), Windows(windows.module, 3)(x), rtol=0, atol=1e-14)
    wanted = Windows(windows.module, 3)(x, gates=torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD(windows.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (windows(x) - wanted).square().mean(0).sum().backward()
        optimizer.step()
    assert windows.gates.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_gradients(generator):
    windows = Windows(Mixing(4, D, generator), 4, 3)
    x = torch.randn(B, 9, D, generator=generator, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, g: windows(x, gates=g), (x, gates), fast_mode=True)


class Tied(nn.Module):
    """Mixes positions by a tied table: equivariant under the group of its window."""

    def __init__(self, group, generator):
        super().__init__()
        self.bias = PartialBias(group, gamma=0.0, learned=False, std=1.0, generator=generator)
        self.value = PartialLinear(group, 2 * group.order, 2 * group.order, gamma=0.0, learned=False)

    def forward(self, x):
        return self.bias()[0] @ self.value(x)


@pytest.mark.parametrize("kind", ["tied", "attention"])
def test_the_group_acts_inside_each_window(kind, generator):
    group = cyclic(5)
    if kind == "tied":
        module = Tied(group, generator).double()
        representation = module.value.source
    else:
        module = EquivariantAttention(group, 10, 5, generator=generator).double()
        representation = module.representation
    windows = Windows(module, 5)
    x = torch.randn(B, 15, representation.dim, generator=generator, dtype=torch.float64)

    def act(h, x, window):
        """Move one window only."""
        inside = slice(5 * window, 5 * window + 5)
        x = x.clone()
        x[:, inside] = representation.act(h, group.permute(h, x[:, inside]))
        return x

    for h in range(group.order):
        torch.testing.assert_close(windows(act(h, x, 1)), act(h, windows(x), 1), rtol=0, atol=1e-12)
    overlapping = Windows(module, 5, 2)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(overlapping(act(1, x, 1)), act(1, overlapping(x), 1), rtol=0, atol=1e-3)


def test_a_reversal_of_the_whole_sequence(generator):
    group = reversal(4)
    module = Tied(group, generator).double()
    representation = module.value.source

    def reverse(x):
        return representation.act(1, x.flip(1))

    x = torch.randn(B, 10, representation.dim, generator=generator, dtype=torch.float64)
    even, uneven = Windows(module, 4, 2), Windows(module, 4, 4)
    torch.testing.assert_close(even(reverse(x)), reverse(even(x)), rtol=0, atol=1e-12)
    assert (uneven(reverse(x)) - reverse(uneven(x))).abs().max() > 1e-3  # 4 does not divide 10 - 4: as documented


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "add"}, r"mode must be one of overlap-add, gather, received 'add'"),
        ({"length": 0}, r"length must be at least 1"),
        ({"stride": 6}, r"stride must be from 1 to length = 5.*received 6"),
        ({"stride": 0}, r"stride must be from 1 to length = 5"),
        ({"stride": 2, "mode": "gather"}, r'stride belongs to mode="overlap-add"'),
        ({"num_gates": 0}, r"num_gates must be at least 1"),
        ({"length": 6}, r"must move length = 6 positions, received module.bias of .*, which moves 5"),
    ],
)
def test_errors_of_construction(arguments, message, generator):
    with pytest.raises(ValueError, match=message):
        Windows(**{"module": Tied(cyclic(5), generator), "length": 5} | arguments)


def test_errors_name_the_module_itself(generator):
    with pytest.raises(ValueError, match=r"received module of .*, which moves 5"):
        Windows(PartialBias(cyclic(5)), 6)


def test_errors_of_the_call(generator):
    x = torch.zeros(B, 9, D)
    windows = Windows(nn.Identity(), 4, 3, num_gates=3)
    with pytest.raises(ValueError, match=r"x must have shape \[B, M, D\], received \[9, 4\]"):
        windows(x[0])
    with pytest.raises(ValueError, match=r"a window must not be longer than the sequence.*length = 4 and 3 positions"):
        windows(x[:, :3])
    with pytest.raises(ValueError, match=r"as many windows as learned gates: received 2 windows and num_gates = 3"):
        windows(x[:, :7])
    with pytest.raises(ValueError, match=r"places the windows itself, received some starts"):
        windows(x, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"gates must have shape \[W\] = \[3\] or \[B, W\] = \[2, 3\], received \[4\]"):
        windows(x, gates=torch.zeros(4))
    with pytest.raises(ValueError, match=r"gates must be from 0 to 1, received values from 0 to 2"):
        windows(x, gates=torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match=r"gates must be from 0 to 1"):
        windows(x, gates=torch.tensor([0.0, 1.0, torch.nan]))
    with pytest.raises(ValueError, match=r"must keep the number of features.*received 7 for 4"):
        Windows(nn.Linear(D, 7), 4, num_gates=3)(x)
    with pytest.raises(ValueError, match=r"the module must map .* = \[6, 4, 4\] to .*received \[6, 3, 4\]"):
        Windows(nn.AvgPool2d((2, 1), stride=1), 4, 3)(x)
    gather = Windows(nn.Identity(), 4, mode="gather")
    with pytest.raises(ValueError, match="needs starts, received no starts"):
        gather(x)
    with pytest.raises(ValueError, match="caller's"):
        gather.starts(9)
    for starts in (torch.tensor([-1]), torch.tensor([0, 6])):
        with pytest.raises(ValueError, match=r"starts must be from 0 to M - length = 5"):
            gather(x, starts)
    with pytest.raises(ValueError, match=r"starts must be integers, received torch.float32"):
        gather(x, torch.tensor([0.0]))
    with pytest.raises(ValueError, match=r"starts must have shape \[W\] or \[B, W\] with B = 2, received \[3, 1\]"):
        gather(x, torch.zeros(3, 1, dtype=torch.int64))
