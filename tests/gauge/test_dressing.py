"""Dressing fields of tokens: invariance, causality, what happens at dependent tokens and equal singular values."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erlangen import testing
from erlangen.gauge import DRESSINGS, dressing, dressing_field

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = tuple(DRESSINGS)
SHAPES = [(1, 3), (4, 7), (6, 6), (15, 4), (150, 5)]
DTYPES = [torch.float64, torch.float32]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotation(dim, seed=0):
    return torch.linalg.qr(normal(dim, dim, seed=seed)).Q


def dressed_by(kind):
    """A function of tokens and weights, which turn together; only one kind looks at the weights."""
    return lambda x, weights: dressing(x, kind, weights=weights if kind == "weights" else None)


def plain_gram_schmidt(x, tolerance):
    """One token after the other: the oracle. Returns the dressed tokens and which tokens opened an axis."""
    tokens, dim = x.shape
    axes, opened = np.zeros((0, dim)), []
    dressed = np.zeros((tokens, dim))
    for i, token in enumerate(x):
        rest = token - axes.T @ (axes @ token)
        rest = rest - axes.T @ (axes @ rest)
        if np.linalg.norm(rest) > tolerance * np.linalg.norm(token) and len(axes) < dim:
            axes = np.vstack([axes, rest / np.linalg.norm(rest)])
            opened.append(i)
        dressed[i, : len(axes)] = axes @ token
    return dressed, opened


def changed_after(x, token, seed=5):
    """Other tokens from one on."""
    other = x.clone()
    other[..., token:, :] = normal(*other[..., token:, :].shape, seed=seed, dtype=x.dtype)
    return other


# --- invariance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "dim"), SHAPES)
def test_dressed_tokens_do_not_see_the_frame(kind, tokens, dim):
    x, weights = normal(2, tokens, dim), normal(2 * dim, dim, seed=1)
    turns = [rotation(dim, seed) for seed in range(4)]
    testing.assert_invariant(
        dressed_by(kind),
        None,
        (x, weights),
        act_in=lambda turn, x, weights: (x @ turn, weights @ turn),
        elements=[*turns, -torch.eye(dim, dtype=torch.float64)],
        tolerance=2e-12,
    )


def test_tokens_that_are_not_dressed_do():
    with pytest.raises(AssertionError, match="not equivariant"):
        testing.assert_invariant(
            lambda x: 2 * x, None, normal(5, 4), act_in=lambda turn, x: x @ turn, elements=[rotation(4)]
        )
    # Weights that stay behind are as good as none.
    with pytest.raises(AssertionError, match="not equivariant"):
        testing.assert_invariant(
            dressed_by("weights"),
            None,
            (normal(5, 4), normal(9, 4, seed=1)),
            act_in=lambda turn, x, weights: (x @ turn, weights),
            elements=[rotation(4)],
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "dim"), SHAPES)
def test_nothing_is_lost(kind, tokens, dim, dtype):
    x = normal(2, tokens, dim, dtype=dtype)
    weights = normal(2 * dim, dim, seed=1, dtype=dtype) if kind == "weights" else None
    field = dressing_field(x, kind, weights=weights)
    rounding = 50 * dim * torch.finfo(dtype).eps
    assert field.dressed.dtype == field.frame.dtype == dtype
    assert (field.dressed @ field.dressed.mT - x @ x.mT).abs().max() < rounding * 10
    assert (field.dressed - x @ field.frame).abs().max() < rounding
    rank = int(field.rank.max())
    assert rank == (dim if kind == "weights" else min(tokens, dim))
    gram = field.frame.mT @ field.frame
    expected = torch.diag((torch.arange(dim) < rank).to(dtype)).expand_as(gram)
    assert (gram - expected).abs().max() < rounding
    assert bool(field.notes) == (rank < dim)


def test_cholesky_is_the_cholesky_factor_of_the_gram_matrix():
    x = normal(5, 9)
    expected = scipy.linalg.cholesky((x @ x.T).numpy(), lower=True)
    found = dressing(x).numpy()
    assert np.abs(found[:, :5] - expected).max() < 1e-13
    assert (found[:, 5:] == 0).all()
    # The comparison sees another order of the tokens.
    assert np.abs(dressing(x.flip(0)).flip(0).numpy()[:, :5] - expected).max() > 0.1


def test_svd_is_u_times_sigma():
    x = normal(9, 5)
    u, values, _ = scipy.linalg.svd(x.numpy(), full_matrices=False)
    found = dressing(x, "svd").numpy()
    expected = u * values
    expected *= np.sign((expected**3).sum(axis=0))
    assert np.abs(found - expected).max() < 1e-13
    field = dressing_field(x, "weights", weights=normal(12, 5, seed=1))
    _, _, vh = scipy.linalg.svd(normal(12, 5, seed=1).numpy(), full_matrices=False)
    assert np.abs(np.abs(field.frame.numpy()) - np.abs(vh.T)).max() < 1e-13


def test_without_a_batch_it_is_the_same():
    x = normal(2, 6, 4)
    for kind in ("cholesky", "svd"):
        both = dressing_field(x, kind)
        one = dressing_field(x[1], kind)
        assert one.frame.shape == (4, 4) and one.rank.shape == ()
        assert (one.dressed - both.dressed[1]).abs().max() < 1e-14


# --- causality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "dim", "first"), [(4, 7, 2), (40, 8, 3), (40, 8, 20), (100, 100, 37), (200, 70, 68)]
)
def test_the_table_tells_the_truth_of_the_future(kind, tokens, dim, first, dtype):
    weights = normal(2 * dim, dim, seed=1, dtype=dtype)
    x = normal(2, tokens, dim, dtype=dtype)
    x[1, first - 1] = x[1, 0]  # one dependent token before, in one of two sequences
    before, after = (dressed_by(kind)(tokens, weights)[:, :first] for tokens in (x, changed_after(x, first)))
    change = (after - before).norm() / before.norm()
    assert (change == 0) == DRESSINGS[kind].causal
    if kind == "svd":
        assert change > 0.3, "most of a row, not rounding"


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_tells_the_truth_of_caches(kind):
    """Tokens that are appended leave what was dressed before as it was."""
    x, weights = normal(1, 30, 6), normal(9, 6, seed=1)
    x[0, 2] = x[0, 1]
    changes = [
        (dressed_by(kind)(x[:, :length], weights) - dressed_by(kind)(x, weights)[:, :length]).abs().max()
        for length in (1, 3, 10, 29)
    ]
    assert (max(changes) < 1e-13) == DRESSINGS[kind].cache_safe


def test_gradients_of_early_rows_do_not_reach_later_tokens():
    x = normal(1, 12, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(dressing(x)[:, :4].square().sum() + dressing(x)[:, 3, 0].sum(), x)
    assert gradient[:, 4:].abs().max() < 1e-14 * gradient.abs().max()


def test_what_would_leak_is_refused():
    with pytest.raises(ValueError, match=r'not causal.*reads the future.*kind="cholesky".*kind="weights"'):
        dressing(normal(4, 3), "svd", causal=True)
    assert dressing(normal(4, 3), "cholesky", causal=True).shape == (4, 3)
    assert dressing(normal(4, 3), "weights", weights=normal(4, 3), causal=True).shape == (4, 3)


# --- dependent tokens -----------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    dim=st.integers(1, 7),
    picks=st.lists(
        st.tuples(st.integers(0, 8), st.sampled_from([1.0, -2.0, 1e-30, 1e30, 0.0])), min_size=1, max_size=90
    ),
    seed=st.integers(0, 1000),
)
def test_dependent_tokens_against_one_at_a_time(dim, picks, seed):
    """Sequences of repeated, scaled and zero tokens, long enough for every path."""
    pool = normal(9, dim, seed=seed)
    x = torch.stack([scale * pool[index] for index, scale in picks])
    field = dressing_field(x)
    expected, opened = plain_gram_schmidt(x.numpy(), 1e-8)
    assert int(field.rank) == len(opened)
    sizes = np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    error = np.abs(field.dressed.numpy() - expected) / np.where(sizes == 0, 1, sizes)
    # Axes made of nearly dependent tokens are only as good as what is left of those.
    pivots = expected[opened, np.arange(len(opened))] / sizes[opened, 0]
    assert error.max() < 1e-13 / pivots.min(initial=1) ** 2
    assert (np.abs(field.dressed.numpy()[:, len(opened) :]) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dependent_token_opens_no_axis(dtype):
    x = normal(1, 6, 4, dtype=dtype)
    x[0, 1], x[0, 3] = 0, x[0, 0] - 2 * x[0, 2]
    field = dressing_field(x)
    assert field.rank.tolist() == [4]
    # Axes: tokens 0, 2, 4, 5. Above the diagonal of that staircase there is nothing, exactly.
    staircase = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert torch.equal(field.dressed[0] != 0, staircase.bool())
    assert (field.dressed @ field.dressed.mT - x @ x.mT).abs().max() < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearly_dependent_tokens_have_a_declared_limit(dtype):
    limit = torch.finfo(dtype).eps ** 0.5
    x = normal(3, 5, dtype=torch.float64)
    for share, rank in ((limit / 10, 2), (limit * 10, 3)):
        x[2] = x[0] + x[1] + share * (x[0] + x[1]).norm() * normal(5, seed=7) / normal(5, seed=7).norm()
        turned = (x @ rotation(5)).to(dtype)
        field, moved = dressing_field(x.to(dtype)), dressing_field(turned)
        assert int(field.rank) == int(moved.rank) == rank
        assert (field.dressed - moved.dressed).abs().max() < 100 * torch.finfo(dtype).eps ** 0.5 * (rank == 3) + 100 * (
            torch.finfo(dtype).eps
        ) + limit * (rank == 2)


@pytest.mark.parametrize("kind", ["cholesky", "svd"])
def test_zeros_and_nothing(kind):
    for x in (torch.zeros(2, 4, 3), torch.zeros(2, 0, 3), torch.zeros(0, 4, 3)):
        field = dressing_field(x, kind)
        assert field.dressed.shape == x.shape and field.frame.shape == (x.shape[0], 3, 3)
        assert field.rank.tolist() == [0] * x.shape[0] and (field.dressed == 0).all()
    # Padding changes nothing.
    x = normal(5, 3)
    padded = dressing(torch.cat([x, torch.zeros(4, 3, dtype=x.dtype)]), kind)
    assert (padded[:5] - dressing(x, kind)).abs().max() < 1e-14 and (padded[5:] == 0).all()


def test_huge_and_tiny_tokens():
    x = normal(6, 4)
    for scale in (1e-150, 1e150):
        for kind in ("cholesky", "svd"):
            assert (dressing(scale * x, kind) / scale - dressing(x, kind)).abs().max() < 1e-12


# --- equal singular values ------------------------------------------------------------------------------------------


def degenerate(values, tokens=9, dim=5, seed=0):
    u, v = torch.linalg.qr(normal(tokens, dim, seed=seed)).Q, rotation(dim, seed + 1)
    return (u * torch.tensor(values, dtype=torch.float64)) @ v


@pytest.mark.parametrize("kind", ["svd", "weights"])
@pytest.mark.parametrize(
    ("values", "blocks"),
    [
        ((3, 2, 2, 1, 0.5), ((0, 1, 2),)),
        ((2, 2, 2, 2, 2), ((0, 0, 4),)),
        ((3, 3, 2, 1, 1 - 1e-12), ((0, 0, 1), (0, 3, 4))),
        ((3, 2, 1, 1e-5, 1e-6), ()),
    ],
)
def test_equal_singular_values_are_turned_to_one_representative(kind, values, blocks):
    source = degenerate(values)
    x = source if kind == "svd" else normal(7, 5, seed=9)
    turn = rotation(5, 11)
    pair = [
        dressing_field(x @ r, kind, weights=source @ r if kind == "weights" else None)
        for r in (torch.eye(5, dtype=torch.float64), turn)
    ]
    assert pair[0].blocks == pair[1].blocks == blocks
    assert len(pair[0].notes) == len(blocks)
    limit = 1e-13 / min(1e-1, min(values)) if not blocks else 1e-12
    assert (pair[0].dressed - pair[1].dressed).abs().max() < limit * 10
    if blocks:  # single vectors of LAPACK are not reproducible there
        plain = [np.abs(scipy.linalg.svd((source @ r).numpy())[0][:, :5]) for r in (torch.eye(5).double(), turn)]
        assert np.abs(plain[0] - plain[1]).max() > 1e-3


def test_low_rank():
    x = degenerate((3, 2, 1, 0, 0))
    field = dressing_field(x, "svd")
    assert field.rank.tolist() == 3 and (field.dressed[:, 3:] == 0).all()
    assert field.notes == ("row 0: rank 3 of 5; the other axes are zero.",)
    with pytest.raises(ValueError, match=r"rank 3 of 5.*stack more maps"):
        dressing(normal(4, 5), "weights", weights=x)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "dim"), [(3, 5), (4, 4), (7, 3)])
def test_gradients_are_those_of_finite_differences(kind, tokens, dim):
    x, weights = normal(2, tokens, dim).requires_grad_(), normal(dim + 3, dim, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(dressed_by(kind), (x, weights))


@pytest.mark.parametrize("kind", ["svd", "weights"])
def test_gradients_at_equal_singular_values(kind):
    source = degenerate((3, 2, 2, 2, 1)).requires_grad_()
    x = normal(4, 5, seed=3)
    field = dressing_field(source if kind == "svd" else x, kind, weights=source if kind == "weights" else None)
    assert field.blocks == ((0, 1, 3),)
    # Steps that keep the values within the tolerance: the span of the block, and where the probe turns it, move.
    assert torch.autograd.gradcheck(
        lambda s: dressed_by(kind)(s if kind == "svd" else x, s),
        (source,),
        eps=1e-9,
        atol=1e-5,
    )


def test_the_plain_derivative_of_singular_vectors_is_not_finite_there():
    x = torch.eye(4, dtype=torch.float64).requires_grad_()
    (plain,) = torch.autograd.grad((torch.linalg.svd(x).Vh * normal(4, 4)).sum(), x)
    assert not plain.isfinite().all()
    (ours,) = torch.autograd.grad((dressing_field(x, "svd").frame * normal(4, 4)).sum(), x)
    assert ours.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["cholesky", "svd"])
def test_gradients_are_finite_everywhere(kind, dtype):
    first = normal(8, 4, dtype=dtype)
    first[3] = first[1]
    cases = [
        first,
        torch.zeros(8, 4, dtype=dtype),
        torch.ones(8, 4, dtype=dtype),
        torch.eye(4, dtype=dtype).repeat(2, 1),
        degenerate((1, 1, 1, 1), tokens=8, dim=4).to(dtype),
        degenerate((1, 1, 1e-5, 1e-9), tokens=8, dim=4).to(dtype),
    ]
    x = torch.stack(cases).requires_grad_()
    (gradient,) = torch.autograd.grad((dressing(x, kind) * normal(6, 8, 4, seed=2, dtype=dtype)).sum(), x)
    assert gradient.isfinite().all()
    assert gradient[0].abs().max() > 0.1


def test_gradients_at_repeated_tokens_are_those_of_a_token_that_stays_repeated():
    """Tokens made of fewer: x = C y. The derivative along y is exact."""
    copies = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0], [2, -1, 0], [0, 0, 1]], dtype=torch.float64)
    y = normal(3, 5).requires_grad_()
    assert int(dressing_field(copies @ y).rank) == 3
    assert torch.autograd.gradcheck(lambda y: dressing(copies @ y), (y,))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_turn_along(kind):
    turn, weights = rotation(4, 3), normal(9, 4, seed=1)
    found = []
    for r in (torch.eye(4, dtype=torch.float64), turn):
        x = (normal(6, 4) @ r).requires_grad_()
        loss = (dressed_by(kind)(x, weights @ r) * normal(6, 4, seed=2)).sum()
        found.append(torch.autograd.grad(loss, x)[0])
    assert (found[0] @ turn - found[1]).abs().max() < 1e-12
    assert (found[0] - found[1]).abs().max() > 0.1


def test_second_derivatives():
    x = normal(3, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(dressing, (x,))
    (gradient,) = torch.autograd.grad(dressing(x, "svd").pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- low precision, and what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(kind, dtype):
    x, weights = normal(2, 12, 5).to(dtype), normal(9, 5, seed=1).to(dtype)
    expected = dressed_by(kind)(x.double(), weights.double())
    found = dressed_by(kind)(x, weights)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < 30 * torch.finfo(dtype).eps * expected.abs().max()


def test_bad_input():
    x = normal(4, 3)
    with pytest.raises(ValueError, match="cholesky, svd, weights, received 'polar'"):
        dressing(x, "polar")
    with pytest.raises(ValueError, match=r"pass weights=\[rows, dim\], the embedding"):
        dressing(x, "weights")
    with pytest.raises(ValueError, match='have no say in kind="svd"'):
        dressing(x, "svd", weights=x)
    with pytest.raises(ValueError, match=r"\[rows, 3\] for tokens of dim 3, received \[4, 5\]"):
        dressing(x, "weights", weights=normal(4, 5))
    with pytest.raises(ValueError, match=r"received \[3\]"):
        dressing(x[0])
    with pytest.raises(ValueError, match=r"received \[1, 1, 4, 3\]"):
        dressing(x[None, None])
    with pytest.raises(ValueError, match=r"received \[4, 0\]"):
        dressing(x[:, :0])
    with pytest.raises(ValueError, match="not finite"):
        dressing(x / 0)
    with pytest.raises(TypeError, match="int64"):
        dressing(x.long())
    with pytest.raises(TypeError, match="complex128"):
        dressing(x + 1j)
