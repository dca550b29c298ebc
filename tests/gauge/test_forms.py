"""Canonical forms of pairs: invariance under every move of the group, and not under others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erlangen.gauge import forms

EPS = torch.finfo(torch.float64).eps


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conditioned(heads, width, condition, seed=0):
    """Matrices of a condition, and their inverse transposes."""
    left, right = torch.linalg.qr(normal(heads, width, width, seed=seed)).Q, torch.linalg.qr(normal(width, width)).Q
    values = torch.logspace(0.5, -0.5, width, base=condition, dtype=torch.float64)
    return (left * values) @ right, (left / values) @ right


def product(first, second):
    return first.mT @ second


def assert_forms(form, other, tolerance):
    assert (form.first - other.first).abs().max() < tolerance
    assert (form.second - other.second).abs().max() < tolerance
    assert (form.spectrum - other.spectrum).abs().max() < tolerance


@settings(max_examples=20, deadline=None)
@given(
    width=st.integers(1, 6),
    columns=st.integers(1, 9),
    other=st.integers(1, 9),
    seed=st.integers(0, 1000),
    exponent=st.sampled_from([0, 2, 4]),
)
def test_balanced_form_is_one_for_all_pairs_with_the_same_product(width, columns, other, seed, exponent):
    first, second = normal(3, width, columns, seed=seed), normal(3, width, other, seed=seed + 1)
    form = forms.balanced(first, second, dtype=torch.float64)
    size = form.spectrum.max()
    matrix, inverse = conditioned(3, width, 10.0**exponent, seed=seed)
    moved = forms.balanced(matrix @ first, inverse @ second, dtype=torch.float64)
    noise = 100 * width * 10**exponent * EPS * size
    assert (product(form.first, form.second) - product(first, second)).abs().max() < 100 * width * EPS * size
    assert (product(moved.first, moved.second) - product(first, second)).abs().max() < noise
    assert (form.first @ form.first.mT - form.second @ form.second.mT).abs().max() < 1e-12 * size
    if not form.blocks and not moved.blocks and torch.equal(form.rank, moved.rank):
        # A singular vector moves by the noise over its gap, and √σ by the noise over √σ.
        values = form.spectrum[:, : int(form.rank.min())]
        gaps = (values[:, :-1] - values[:, 1:]).min().item() if values.shape[1] > 1 else size.item()
        assert_forms(form, moved, 10 * noise * (size.sqrt() / min(gaps, values.min().item()) + 1))


def test_balanced_form_is_the_svd_of_the_product():
    first, second = normal(1, 4, 7), normal(1, 4, 9, seed=1)
    expected = torch.linalg.svdvals(product(first, second))[:, :4]
    form = forms.balanced(first, second, dtype=torch.float64)
    assert torch.allclose(form.spectrum, expected, rtol=1e-12)
    # Least norm on the orbit: the nuclear norm of the product.
    size = 0.5 * (form.first.square().sum() + form.second.square().sum())
    assert size == pytest.approx(expected.sum().item(), rel=1e-12)
    assert torch.allclose(form.left @ first, form.first, atol=1e-12)
    assert torch.allclose(form.right @ second, form.second, atol=1e-12)


def test_balanced_form_sees_another_product():
    first, second = normal(1, 4, 7), normal(1, 4, 9, seed=1)
    changed = second.clone()
    changed[0, 0, 0] += 1e-6
    form, other = (forms.balanced(first, b, dtype=torch.float64) for b in (second, changed))
    assert (form.second - other.second).abs().max() > 1e-8


def test_pairs_of_low_rank_are_zero_beyond_it():
    first, second = normal(2, 5, 8), normal(2, 5, 9, seed=1)
    first[0, 3:] = first[0, :2]
    first[1] = 0
    form = forms.balanced(first, second, dtype=torch.float64)
    assert form.rank.tolist() == [3, 0]
    matrix, inverse = conditioned(2, 5, 1e4)
    moved = forms.balanced(matrix @ first, inverse @ second, dtype=torch.float64)
    assert moved.rank.tolist() == [3, 0]
    assert_forms(form, moved, 1e-8)
    assert form.first[0, 3:].abs().max() == form.second[0, 3:].abs().max() == form.first[1].abs().max() == 0
    assert torch.allclose(product(form.first, form.second), product(first, second), atol=1e-12)


@pytest.mark.parametrize("repeats", [1, 2])
def test_equal_singular_values_are_turned_to_one_representative(repeats):
    turn, other = torch.linalg.qr(normal(10, 10)).Q, torch.linalg.qr(normal(9, 9, seed=1)).Q
    values = torch.tensor([3.0, 2.0, 2.0, 2.0 - 1e-12, 1.0], dtype=torch.float64)
    first, second = (values.sqrt()[:, None] * turn[:5])[None], (values.sqrt()[:, None] * other[:5])[None]
    form = forms.balanced(first, second, dtype=torch.float64, repeats=repeats)
    assert form.blocks == ((0, 1, 3),)
    matrix, inverse = conditioned(1, 5, 100.0)
    moved = forms.balanced(matrix @ first, inverse @ second, dtype=torch.float64, repeats=repeats)
    assert_forms(form, moved, 1e-10)
    again = forms.balanced(form.first, form.second, dtype=torch.float64, repeats=repeats)
    assert_forms(form, again, 1e-10)
    # The singular vectors themselves are not reproducible there: what the block is turned against is needed.
    plain = [torch.linalg.svd(a.mT @ b).U[0, :, 1] for a, b in ((first, second), (matrix @ first, inverse @ second))]
    assert min((plain[0] - plain[1]).norm(), (plain[0] + plain[1]).norm()) > 1e-3
    # The order of equal parts has no say.
    if repeats == 2:
        swapped = forms.balanced(first.roll(5, dims=-1), second, dtype=torch.float64, repeats=2)
        assert (swapped.first.roll(5, dims=-1) - form.first).abs().max() < 1e-10


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_rotary_form(pairs):
    from erlangen.gauge import Rotary

    planes = Rotary(dim=6, pairs=pairs).planes()
    first, second = normal(3, 6, 8), normal(3, 6, 9, seed=1)
    number = torch.polar(normal(3, 3, seed=2).exp(), normal(3, 3, seed=3))
    matrix, inverse = forms.plane_matrices(number, planes), forms.plane_matrices(1 / number.conj(), planes)
    form = forms.rotary_pair(first, second, planes)
    assert_forms(form, forms.rotary_pair(matrix @ first, inverse @ second, planes), 1e-12)
    assert torch.allclose(form.left @ first, form.first, atol=1e-12)
    # Scores at every distance of positions are what they were.
    turn = forms.plane_matrices(torch.polar(torch.ones(3, dtype=torch.float64), normal(3, seed=4)), planes)
    assert torch.allclose(form.first.mT @ turn @ form.second, first.mT @ turn @ second, atol=1e-12)
    # A general matrix is no symmetry: the form changes, as the scores do.
    matrix, inverse = conditioned(3, 6, 10.0)
    other = forms.rotary_pair(matrix @ first, inverse @ second, planes)
    assert (other.first - form.first).abs().max() > 0.1
    assert not torch.allclose((matrix @ first).mT @ turn @ inverse @ second, first.mT @ turn @ second, atol=0.1)


def test_dead_planes_are_zero():
    planes = torch.tensor([[0, 1], [2, 3]])
    first, second = normal(1, 4, 5), normal(1, 4, 5, seed=1)
    second[:, 2:] = 0
    form = forms.rotary_pair(first, second, planes)
    assert form.rank.tolist() == [2]
    assert form.first[:, 2:].abs().max() == 0
    assert torch.isfinite(form.right).all()


def test_rows_under_rotations():
    rows, turn = normal(2, 4, 9), torch.linalg.qr(normal(2, 4, 4, seed=1)).Q
    form, moved = forms.turned(rows, dtype=torch.float64), forms.turned(turn @ rows, dtype=torch.float64)
    assert (form.rows - moved.rows).abs().max() < 1e-13
    assert torch.allclose(form.turn @ rows, form.rows, atol=1e-13)
    assert torch.allclose(form.turn @ form.turn.mT, torch.eye(4, dtype=torch.float64), atol=1e-13)


def test_signs_and_phases():
    rows = normal(50, 7)
    assert torch.equal(forms.signs(-rows), -forms.signs(rows))
    assert torch.equal(forms.signs(torch.zeros(1, 3)), torch.ones(1))
    # Where the cubes cancel, the first of the largest entries decides.
    assert forms.signs(torch.tensor([[-1.0, 1.0]])).tolist() == [-1.0]
    values = torch.complex(rows, normal(50, 7, seed=1))
    turn = torch.polar(torch.ones(50, dtype=torch.float64), normal(50, seed=2))
    assert torch.allclose(forms.phases(turn[:, None] * values), turn * forms.phases(values), atol=1e-10)
    assert torch.equal(forms.phases(torch.zeros(1, 3, dtype=torch.complex128)).real, torch.ones(1).double())


def test_product_norms_and_spectra():
    first, second = normal(3, 4, 6), normal(3, 4, 5, seed=1)
    whole = product(first, second)
    assert torch.allclose(forms.product_norms(first, second), whole.flatten(1).norm(dim=1))
    assert torch.allclose(forms.product_spectrum(first, second), torch.linalg.svdvals(whole)[:, :4])


def test_order():
    keys = torch.tensor([1.0, 3.0, 3.0, 2.0])
    order, ties = forms.descending(keys, torch.tensor([0.0, 1.0, 2.0, 0.0]), 1e-6)
    assert order.tolist() == [2, 1, 3, 0]
    assert ties == []
    order, ties = forms.descending(keys, torch.tensor([1.0, 2.0, 2.0, 0.0]), 1e-6)
    assert sorted(order.tolist()[:2]) == [1, 2]
    assert ties == [(0, 1)]
