"""Gauge directions of pairs: against linear algebra on an explicit basis of them, and against closed forms."""

import numpy as np
import pytest
import scipy.linalg
import torch

from erlangen.gauge import Rotary, _vertical, forms

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, WIDTH, COLUMNS, OTHERS = 3, 6, 11, 8
POSITIONS = {
    "none": None,
    "rotary": Rotary(dim=6),
    "interleaved": Rotary(dim=6, pairs="interleaved"),
    "partly rotary": Rotary(dim=4),
    "partly interleaved": Rotary(dim=2, pairs="interleaved"),
}
every_position = pytest.mark.parametrize("rotary", POSITIONS.values(), ids=POSITIONS)
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-5}
every_dtype = pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items(), ids=["float64", "float32"])


def pairs(generator, dtype=torch.float64, condition=30.0):
    """A, B, and two like them; the factors are of some condition, and of other sizes."""

    def one(columns, condition=1.0):
        values = torch.randn(HEADS, WIDTH, columns, generator=generator, dtype=torch.float64)
        u, s, vh = torch.linalg.svd(values, full_matrices=False)
        spread = torch.logspace(0, -1, WIDTH, dtype=torch.float64) ** np.log10(condition)
        return ((u * (spread if condition > 1 else s)[..., None, :]) @ vh).to(dtype)

    return one(COLUMNS, condition), 3 * one(OTHERS, condition), one(COLUMNS), one(OTHERS)


def group_matrices(rotary):
    """A basis [number, WIDTH, WIDTH] of the Ω that commute with the positions: all, or 1 and i of each plane."""
    basis = []
    start = 0 if rotary is None else rotary.dim
    if rotary is not None:
        for one, two in rotary.planes().tolist():
            scale, turn = torch.zeros(WIDTH, WIDTH).double(), torch.zeros(WIDTH, WIDTH).double()
            scale[one, one] = scale[two, two] = 1
            turn[two, one], turn[one, two] = 1, -1
            basis += [scale, turn]
    for i in range(start, WIDTH):
        for j in range(start, WIDTH):
            matrix = torch.zeros(WIDTH, WIDTH).double()
            matrix[i, j] = 1
            basis.append(matrix)
    return torch.stack(basis)


def directions(first, second, rotary):
    """Every gauge direction of one head as a column: [all numbers of the head, number]."""
    basis = group_matrices(rotary)
    return torch.cat([(basis @ first).flatten(1), (-basis.mT @ second).flatten(1)], dim=1).mT


def flat(first, second):
    return torch.cat([first.flatten(), second.flatten()]).double()


def differs(one, two):
    """Relative difference of two pairs of tensors."""
    scale = torch.stack([part.double().norm() for part in two]).norm()
    return (torch.stack([(a.double() - b.double()).norm() for a, b in zip(one, two)]).norm() / scale).item()


def random_group(generator, rotary, condition=10.0):
    """Matrices [HEADS, WIDTH, WIDTH] of the group, and their inverse transposes."""
    left = torch.zeros(HEADS, WIDTH, WIDTH, dtype=torch.float64)
    start = 0 if rotary is None else rotary.dim
    if rotary is not None:
        planes = rotary.planes()
        sizes = torch.exp(torch.randn(HEADS, len(planes), generator=generator, dtype=torch.float64))
        angles = torch.rand(HEADS, len(planes), generator=generator, dtype=torch.float64) * 6
        left[:, :start, :start] = forms.plane_matrices(torch.polar(sizes, angles), planes)
    if start < WIDTH:
        u, _, vh = torch.linalg.svd(torch.randn(HEADS, WIDTH - start, WIDTH - start, generator=generator).double())
        left[:, start:, start:] = u * torch.logspace(0, -np.log10(condition), WIDTH - start).double() @ vh
    return left, torch.linalg.inv(left).mT


def position_matrix(rotary, angle):
    """What positions at some distance do to a head: [WIDTH, WIDTH]; another angle in every plane."""
    turn = torch.eye(WIDTH, dtype=torch.float64)
    if rotary is not None:
        planes = rotary.planes()
        angles = angle * torch.arange(1, len(planes) + 1)[None].double()
        turn[: rotary.dim, : rotary.dim] = forms.plane_matrices(torch.polar(torch.ones_like(angles), angles), planes)[0]
    return turn


def test_the_comparison_sees_a_wrong_answer(generator):
    first, second, *_ = pairs(generator)
    assert differs((first, second), (first, second)) == 0
    assert differs((first * (1 + 1e-9), second), (first, second)) > 1e-11


# --- the Frobenius metric ---


def test_sylvester_is_that_of_scipy(generator):
    first, second, d_first, d_second = pairs(generator)
    right = d_first @ first.mT - second @ d_second.mT
    omega = _vertical.sylvester(first @ first.mT, second @ second.mT, right, 2e-16)
    for head in range(HEADS):
        a, b = (second[head] @ second[head].mT).numpy(), (first[head] @ first[head].mT).numpy()
        expected = scipy.linalg.solve_sylvester(a, b, right[head].numpy())
        assert np.abs(omega[head].numpy() - expected).max() < 1e-12 * np.abs(expected).max()


@every_position
@every_dtype
def test_it_is_the_projection_on_the_gauge_directions(rotary, dtype, tolerance, generator):
    first, second, d_first, d_second = pairs(generator, dtype)
    along = _vertical.vertical(first, second, d_first, d_second, rotary)
    share = _vertical.vertical_share(first, second, d_first, d_second, rotary)
    for head in range(HEADS):
        columns = directions(first[head].double(), second[head].double(), rotary)
        change = flat(d_first[head], d_second[head])
        expected = columns @ torch.linalg.lstsq(columns, change, driver="gelsd").solution
        assert (flat(along[0][head], along[1][head]) - expected).norm() < 30 * tolerance * change.norm()
        assert abs(share[head].item() - (expected.norm() / change.norm()).item() ** 2) < 30 * tolerance
    assert share.dtype == torch.float64


@every_position
@every_dtype
def test_projection(rotary, dtype, tolerance, generator):
    first, second, d_first, d_second = pairs(generator, dtype)
    along = _vertical.vertical(first, second, d_first, d_second, rotary)
    across = (d_first - along[0], d_second - along[1])
    assert differs((d_first, d_second), across) > 0.1, "there was something to take away"
    again = _vertical.vertical(first, second, *across, rotary)
    assert differs((across[0] - again[0], across[1] - again[1]), across) < 30 * tolerance, "idempotent"
    assert differs(_vertical.vertical(first, second, *along, rotary), along) < 30 * tolerance
    # The product changes by as much, to first order: its tangent lies in the other part. Under positions, the score of
    # every distance must stay.
    for angle in (0.0, 1.1):
        turn = position_matrix(rotary, angle).to(dtype)
        tangent = along[0].mT @ turn @ second + first.mT @ turn @ along[1]
        assert tangent.norm() < 10 * tolerance * (d_first.mT @ second).norm()


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-9])
def test_balanced_pairs_need_no_eigenvectors(spread, generator, monkeypatch):
    first, second, d_first, d_second = pairs(generator)
    form = forms.balanced(first, second, dtype=torch.float64)
    # Near-equal and equal singular values, too.
    sizes = 1 + spread * torch.linspace(1, 0, WIDTH, dtype=torch.float64)
    first = sizes.sqrt()[:, None] * torch.nn.functional.normalize(form.first, dim=-1)
    second = sizes.sqrt()[:, None] * torch.nn.functional.normalize(form.second, dim=-1)
    expected = [
        columns @ torch.linalg.lstsq(columns, flat(d_first[head], d_second[head]), driver="gelsd").solution
        for head in range(HEADS)
        for columns in [directions(first[head], second[head], None)]
    ]

    def refuse(*_):
        raise AssertionError("no eigenvectors are needed")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    along = _vertical.vertical(first, second, d_first, d_second)
    for head in range(HEADS):
        assert (flat(along[0][head], along[1][head]) - expected[head]).norm() < 1e-12 * expected[head].norm()
    with pytest.raises(AssertionError, match="no eigenvectors"):
        _vertical.vertical(first * (1 + 1e-6), second, d_first, d_second)


@every_position
@every_dtype
def test_singular_pairs_have_a_least_solution(rotary, dtype, tolerance, generator):
    first, second, d_first, d_second = pairs(generator, dtype, condition=2.0)
    # Both factors of the first head miss the same two directions, the second head is zero, the third misses them once.
    first[0, [0, 3]] = second[0, [0, 3]] = 0
    first[1] = second[1] = 0
    first[2, [1, 4]] = 0
    along = _vertical.vertical(first, second, d_first, d_second, rotary)
    assert all(part.isfinite().all() for part in along)
    assert along[0][1].abs().max() == along[1][1].abs().max() == 0
    for head in range(HEADS):
        columns = directions(first[head].double(), second[head].double(), rotary)
        change = flat(d_first[head], d_second[head])
        solved = torch.linalg.lstsq(columns, change, rcond=1e-7, driver="gelsd").solution
        assert (flat(along[0][head], along[1][head]) - columns @ solved).norm() < 10 * tolerance * change.norm()
    share = _vertical.vertical_share(first, second, 0 * d_first, 0 * d_second, rotary)
    assert share.tolist() == [0, 0, 0]


# --- the invariant metric ---


def random_function(generator, rotary):
    """What a pair computes at two distances, as a function of it; and gradients of a random function of that."""
    turns = [position_matrix(rotary, angle) for angle in (0.0, 0.7)]
    weights = [torch.randn(HEADS, COLUMNS, OTHERS, generator=generator).double() for _ in turns]

    def products(first, second):
        return [first.mT @ turn @ second for turn in turns]

    def gradient(first, second):
        first, second = first.clone().requires_grad_(), second.clone().requires_grad_()
        value = sum((w * p.sin()).sum() for w, p in zip(weights, products(first, second)))
        return torch.autograd.grad(value, (first, second))

    return products, gradient


@every_position
def test_the_step_does_not_depend_on_the_gauge(rotary, generator):
    first, second, *_ = pairs(generator)
    products, gradient = random_function(generator, rotary)
    left, right = random_group(generator, rotary)
    steps, plain = [], []
    for a, b in ((first, second), (left @ first, right @ second)):
        u, w = _vertical.invariant_metric(a, b, rotary).velocity(*gradient(a, b))
        steps.append(products(a - 0.1 * u, b - 0.1 * w))
        u, w = gradient(a, b)
        plain.append(products(a - 0.1 * u, b - 0.1 * w))
    assert differs(steps[0], products(first, second)) > 1e-2
    assert differs(*steps) < 1e-12
    assert differs(*plain) > 1e-2, "the plain gradient's step does"


@every_position
def test_the_velocity_is_the_gradient_in_the_metric(rotary, generator):
    """By an explicit matrix of the metric, over all numbers of a head; also for what is not a gradient."""
    first, second, p_first, p_second = pairs(generator)
    found = _vertical.invariant_metric(first, second, rotary)
    velocity = found.velocity(p_first, p_second)
    straight = found.horizontal(p_first, p_second, (first, second))
    velocity_straight = found.velocity(*straight)
    start = 0 if rotary is None else rotary.dim
    for head in range(HEADS):
        a, b = first[head], second[head]
        of_first, of_second = torch.zeros(2, WIDTH, WIDTH, dtype=torch.float64)
        for one, two in [] if rotary is None else rotary.planes().tolist():
            q, k = a[[one, two]].norm(), b[[one, two]].norm()
            for row in (one, two):
                of_first[row, row], of_second[row, row] = k / q, q / k
        rest_a, rest_b = a[start:], b[start:]
        if start < WIDTH:
            scale = (rest_a.mT @ rest_b).norm() / (WIDTH - start) ** 0.5
            of_first[start:, start:], of_second[start:, start:] = rest_b @ rest_b.mT / scale, rest_a @ rest_a.mT / scale
        lowered = (of_first @ velocity[0][head], of_second @ velocity[1][head])
        assert differs(lowered, (p_first[head], p_second[head])) < 1e-11
        # Horizontal: the velocity's nearest, in the metric, to the gauge directions is zero, and what was taken away
        # is a combination of them.
        columns = directions(a, b, rotary)
        metric = torch.block_diag(
            torch.kron(of_first, torch.eye(COLUMNS).double()), torch.kron(of_second, torch.eye(OTHERS).double())
        )
        v = flat(velocity[0][head], velocity[1][head])
        omega = torch.linalg.solve(columns.mT @ metric @ columns, columns.mT @ metric @ v)
        expected = v - columns @ omega
        assert (flat(velocity_straight[0][head], velocity_straight[1][head]) - expected).norm() < 1e-10 * v.norm()


@every_position
def test_gradients_are_horizontal_and_momentum_is_made_so(rotary, generator):
    first, second, p_first, p_second = pairs(generator)
    _, gradient = random_function(generator, rotary)
    metric = _vertical.invariant_metric(first, second, rotary)
    plain = gradient(first, second)
    assert differs(metric.horizontal(*plain, (first, second)), plain) < 1e-13
    assert _vertical.vertical_share(first, second, *plain, rotary).max().sqrt() < 1e-14
    straight = metric.horizontal(p_first, p_second, (first, second))
    assert differs(straight, (p_first, p_second)) > 1e-2
    assert differs(metric.horizontal(*straight, (first, second)), straight) < 1e-12


@every_position
def test_at_equal_singular_values_it_is_the_plain_gradient(rotary, generator):
    _, _, p_first, p_second = pairs(generator)
    first = 0.3 * torch.linalg.qr(torch.randn(HEADS, COLUMNS, WIDTH, generator=generator).double())[0].mT
    second = 0.3 * torch.linalg.qr(torch.randn(HEADS, OTHERS, WIDTH, generator=generator).double())[0].mT
    metric = _vertical.invariant_metric(first, second, rotary)
    assert differs(metric.velocity(p_first, p_second), (p_first, p_second)) < 1e-13
    assert differs(metric.decay(first, second), (first, second)) < 1e-13


@every_position
@every_dtype
def test_decay_is_the_momentum_of_the_pair_itself(rotary, dtype, tolerance, generator):
    first, second, *_ = pairs(generator, dtype)
    metric = _vertical.invariant_metric(first, second, rotary)
    # Solved and multiplied by a gram: its condition is the square of the factor's.
    assert differs(metric.velocity(*metric.decay(first, second)), (first, second)) < 1e3 * tolerance


@every_position
def test_singular_heads_are_seen(rotary, generator):
    first, second, *_ = pairs(generator)
    assert not _vertical.invariant_metric(first, second, rotary).singular.any()
    part = [0, 3]  # a plane of "half", and two rows of the others
    if rotary is not None:
        part = rotary.planes()[0].tolist()
    first[1, part] = 0
    second[2, 0, 0] = torch.nan
    assert _vertical.invariant_metric(first, second, rotary).singular.tolist() == [False, True, True]


def test_singular_up_to_rounding_counts_as_singular(generator):
    first, second, *_ = pairs(generator, torch.float32, condition=2.0)
    first[1, 2] = first[1, 1] * (1 + 1e-7)
    assert _vertical.invariant_metric(first, second).singular.tolist() == [False, True, False]
    near = first.double()
    near[1, 2] = near[1, 1] + 1e-4 * second[1, 1, 0]
    near[1, 2, 0] += 1e-4
    assert not _vertical.invariant_metric(near, second.double()).singular.any()


@every_position
def test_norms_are_made_equal(rotary, generator):
    first, second, *_ = pairs(generator)
    first[1] = 0
    scale = _vertical.equal_norms(first, second, rotary)
    assert (scale[1] == 1).all()
    new_first, new_second = scale * first, second / scale
    start = 0 if rotary is None else rotary.dim
    for head in (0, 2):
        for one, two in [] if rotary is None else rotary.planes().tolist():
            part = [one, two]
            assert torch.allclose(new_first[head, part].norm(), new_second[head, part].norm(), rtol=1e-13)
            assert scale[head, one] == scale[head, two]
        if start < WIDTH:
            assert torch.allclose(new_first[head, start:].norm(), new_second[head, start:].norm(), rtol=1e-13)
            assert len(scale[head, start:].unique()) == 1
