"""Scores and attention against an oracle that knows scipy's matrix logarithm and Python loops only."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lie_cases import (
    DTYPES,
    LOGM_MAY_WARN,
    POINT_GROUPS,
    act_on_poses,
    assert_near,
    far_elements,
    near,
    outside_chart,
    score_options,
    turn,
)

from erlangen.lie import GL, SE2, SE3, SO2, SO3, Aff2, Sim2
from erlangen.lie.attention import lie_attention, lie_scores, lie_weights
from erlangen.testing import assert_invariant, assert_low_precision

B, H, N, M, D = 2, 3, 5, 7, 4

pytestmark = LOGM_MAY_WARN


def settings_of(group, generator, heads=H, dtype=torch.float64):
    return score_options(group, generator, heads, dtype)


def arguments_of(generator):
    return {
        "query": near(SE2, B, N, generator=generator),
        "key": near(SE2, B, M, generator=generator),
        "value": torch.randn(B, H, M, D, generator=generator, dtype=torch.float64),
        **settings_of(SE2, generator),
    }


def converted(options, dtype):
    return {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def logm_block_norms(relative, group):
    """Squared Frobenius norms of the blocks of logm, one a block of the group."""
    log = scipy.linalg.logm(relative)
    assert np.abs(log.imag).max() < 1e-10
    n = group.point_dim
    linear = log.real[:n, :n]
    scale = np.trace(linear) / n * np.eye(n)
    parts = {
        "rotation": (linear - linear.T) / 2,
        "scale": scale,
        "shear": (linear + linear.T) / 2 - scale,
        "translation": log.real[:n, n:],
    }
    return [float((parts[name] ** 2).sum()) for name in group.blocks]


def oracle_scores(query, key, group, block_weights, temperature, displacement=None):
    """[B, H, N, M], pair by pair; query and key with an axis of heads."""
    scores = np.zeros((len(query), len(temperature), query.shape[2], key.shape[2]))
    norms = {}  # heads that share their poses share the logarithm
    for b, h, i, j in np.ndindex(*scores.shape):
        q, k = (x[b, h % x.shape[1], n].numpy() for x, n in ((query, i), (key, j)))
        c = np.eye(len(q)) if displacement is None else displacement[h].numpy()
        pair = (q.tobytes(), k.tobytes(), c.tobytes())
        if pair not in norms:
            norms[pair] = logm_block_norms(np.linalg.solve(c, np.linalg.solve(q, k)), group)
        scores[b, h, i, j] = -sum(w * x for w, x in zip(block_weights[h].tolist(), norms[pair])) / temperature[h].item()
    return scores


def oracle_attention(scores, value, allowed):
    """Softmax and average, row by row."""
    out = np.zeros((*scores.shape[:3], value.shape[-1]))
    for b, h, i in np.ndindex(*scores.shape[:3]):
        keys = [j for j in range(scores.shape[3]) if allowed[b, h, i, j]]
        if keys:
            top = max(scores[b, h, i, j] for j in keys)
            weights = [math.exp(scores[b, h, i, j] - top) for j in keys]
            out[b, h, i] = sum(w * value[b, h, j].numpy() for w, j in zip(weights, keys)) / sum(weights)
    return out


@pytest.mark.parametrize(
    ("group", "per_head"), [*((group, False) for group in POINT_GROUPS), (SE2, True), (Aff2, True)], ids=str
)
def test_scores_and_output_are_those_of_the_oracle(group, per_head, generator):
    batch = (1, H) if per_head else (B,)
    query, key = near(group, *batch, N, generator=generator), near(group, *batch, M, generator=generator)
    value = torch.randn(batch[0], H, M, D, generator=generator, dtype=torch.float64)
    options = settings_of(group, generator)
    expected = oracle_scores(*(x if per_head else x[:, None] for x in (query, key)), **options)
    assert_near(lie_scores(query, key, **options), expected)
    allowed = np.ones(expected.shape, dtype=bool)
    assert_near(lie_attention(query, key, value, **options), oracle_attention(expected, value, allowed))


@pytest.mark.parametrize("wrong", ["weights", "temperature", "order", "sign", "one entry", "nan", "shape"])
def test_the_comparison_with_the_oracle_sees_wrong_answers(wrong, generator):
    query, key = near(SE2, 1, N, generator=generator), near(SE2, 1, M, generator=generator)
    options = settings_of(SE2, generator)
    expected = oracle_scores(query[:, None], key[:, None], **options)
    if wrong == "weights":
        options["block_weights"] = options["block_weights"].flip(1)
    elif wrong == "temperature":
        options["temperature"] = options["temperature"].flip(0)
    scores = lie_scores(query, key, **options)
    if wrong == "order":
        scores = scores.flip(-1)
    elif wrong == "sign":
        scores = -scores
    elif wrong == "one entry":
        scores[0, 1, 2, 3] += 1e-8
    elif wrong == "nan":
        scores[0, 1, 2, 3] = math.nan
    elif wrong == "shape":
        scores = scores[:, :, :, :1]
    with pytest.raises(AssertionError):
        assert_near(scores, expected)


@pytest.mark.parametrize("group", [SE2, SO3, Aff2], ids=str)
def test_everything_at_once_is_the_oracle(group, generator):
    """Displacement, content, a mask for each head, causal, and poses a head for the keys only."""
    query, key = (
        near(group, B, N, generator=generator, spread=0.3),
        near(group, B, H, M, generator=generator, spread=0.3),
    )
    value = torch.randn(B, H, M, D, generator=generator, dtype=torch.float64)
    content = [torch.randn(B, H, n, 6, generator=generator, dtype=torch.float64) for n in (N, M)]
    options = settings_of(group, generator) | {"displacement": near(group, H, generator=generator, spread=0.3)}
    mask = torch.rand(B, H, N, M, generator=generator) < 0.6
    mask[0, 0, 2] = False
    scores = oracle_scores(query[:, None].expand(-1, H, -1, -1, -1), key, **options)
    for b, h, i, j in np.ndindex(*scores.shape):
        scores[b, h, i, j] += float(content[0][b, h, i] @ content[1][b, h, j]) / math.sqrt(6)
    allowed = mask.numpy().copy()
    for i, j in itertools.product(range(N), range(M)):
        allowed[:, :, i, j] &= j <= i + M - N
    out = lie_attention(
        query, key, value, **options, content_query=content[0], content_key=content[1], mask=mask, causal=True
    )
    assert_near(out, oracle_attention(scores, value, allowed))


@pytest.mark.parametrize(("num_queries", "num_keys"), [(4, 4), (2, 5), (5, 2)])
def test_causal_is_aligned_to_the_end(num_queries, num_keys, generator):
    query, key = near(SE2, 1, num_queries, generator=generator), near(SE2, 1, num_keys, generator=generator)
    weights = lie_weights(query, key, **settings_of(SE2, generator), causal=True)
    for i, j in itertools.product(range(num_queries), range(num_keys)):
        assert bool((weights[:, :, i, j] > 0).all()) == (j <= i + num_keys - num_queries)
    sums = weights.sum(-1)
    seen = torch.arange(num_queries) + num_keys - num_queries >= 0
    torch.testing.assert_close(sums, seen.double().expand_as(sums))


@pytest.mark.parametrize("shape", [(1, 1, 1, M), (B, 1, 1, M), (1, H, N, M), (B, H, N, M)])
def test_a_mask_broadcasts(shape, generator):
    query, key = near(SE2, B, N, generator=generator), near(SE2, B, M, generator=generator)
    value = torch.randn(B, H, M, D, generator=generator, dtype=torch.float64)
    options = settings_of(SE2, generator)
    mask = torch.rand(shape, generator=generator) < 0.7
    expected = oracle_scores(query[:, None], key[:, None], **options)
    out = lie_attention(query, key, value, **options, mask=mask)
    assert_near(out, oracle_attention(expected, value, mask.expand(B, H, N, M).numpy()))


def test_a_row_that_may_attend_nothing_is_zero_with_zero_gradients(generator):
    arguments = arguments_of(generator)
    tensors = {name: x.requires_grad_() for name, x in arguments.items() if name != "group"}
    mask = torch.ones(B, 1, N, M, dtype=torch.bool)
    mask[0, :, 3] = False
    mask[1] = False
    out = lie_attention(**arguments, mask=mask)
    assert not out[0, :, 3].any()
    assert not out[1].any()
    assert out[0, :, 2].all()
    out.square().sum().backward()
    for tensor in tensors.values():
        assert tensor.grad.isfinite().all()
    assert not tensors["query"].grad[0, 3].any()
    assert not tensors["value"].grad[1].any()


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, 0.0])
def test_what_stands_at_padding_is_never_looked_at(rubbish, generator):
    options = settings_of(SE2, generator)
    query, key = near(SE2, B, N, generator=generator), near(SE2, B, M, generator=generator)
    value = torch.randn(B, H, M, D, generator=generator, dtype=torch.float64)
    content = [torch.randn(B, H, n, 6, generator=generator, dtype=torch.float64) for n in (N, M)]
    mask = torch.ones(B, 1, 1, M, dtype=torch.bool)
    mask[0, ..., -2:] = False
    results = []
    for fill in (None, rubbish):
        tensors = [x.clone() for x in (query, key, value, *content)]
        if fill is not None:
            tensors[1][0, -2:] = tensors[2][0, :, -2:] = tensors[4][0, :, -2:] = fill
        tensors = [x.requires_grad_() for x in tensors]
        q, k, v, cq, ck = tensors
        out = lie_attention(q, k, v, **options, content_query=cq, content_key=ck, mask=mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)


def test_a_head_finds_the_token_two_metres_ahead(generator):
    heading = torch.tensor([0.0, 1.0, 2.5, -2.0], dtype=torch.float64)
    ahead = torch.eye(3, dtype=torch.float64)
    ahead[0, 2] = 2.0
    first = torch.eye(3, dtype=torch.float64).expand(4, 3, 3).clone()
    first[:, 0, 0] = first[:, 1, 1] = heading.cos()
    first[:, 1, 0] = heading.sin()
    first[:, 0, 1] = -heading.sin()
    first[:, :2, 2] = 20 * torch.randn(4, 2, generator=generator, dtype=torch.float64)
    poses = torch.cat([first, first @ ahead])[None]  # token 4 + i stands two metres ahead of token i
    options = {
        "group": SE2,
        "block_weights": torch.ones(2, 2, dtype=torch.float64),
        "temperature": torch.full((2,), 0.1, dtype=torch.float64),
        "displacement": torch.stack([torch.eye(3, dtype=torch.float64), ahead]),
    }
    weights = lie_weights(poses, poses, **options)
    assert weights[0, 0].argmax(-1).tolist() == list(range(8))
    assert weights[0, 1, :4].argmax(-1).tolist() == [4, 5, 6, 7]
    assert (weights[0, 1, :4].amax(-1) > 0.999).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(-3, 3), st.sampled_from([SE2, SO3, SE3, Sim2, Aff2]))
def test_scores_are_symmetric_with_a_zero_diagonal(seed, log10_spread, group):
    """‖log g‖ = ‖log g⁻¹‖; only near poses when the group is not covered by its chart."""
    generator = torch.Generator().manual_seed(seed)
    spread = min(10.0**log10_spread, 0.4)
    poses = near(group, 1, 4, generator=generator, spread=spread, most=0.6)
    scores = lie_scores(poses, poses, **settings_of(group, generator))
    scale = scores.abs().max()
    assert (scores <= 0).all()
    torch.testing.assert_close(scores, scores.mT, rtol=1e-9, atol=1e-9 * float(scale))
    # g⁻¹ g misses the identity by a rounding, and the score is a square.
    assert scores.diagonal(dim1=-2, dim2=-1).abs().max() <= 1e-28


def test_attention_is_invariant_in_float64(group, generator):
    """Condition at most 1e3 or so in translation and 10 in shape, squared by the score: 1e-10 is ample."""
    options = settings_of(group, generator)
    query, key = near(group, B, N, generator=generator), near(group, B, M, generator=generator)
    value = torch.randn(B, H, M, D, generator=generator, dtype=torch.float64)
    elements = far_elements(group, generator)
    assert_invariant(
        lambda q, k, v: lie_attention(q, k, v, **options),
        None,
        (query, key, value),
        act_in=act_on_poses,
        elements=elements,
    )


@pytest.mark.parametrize("group", [SE2, SO3, SE3, Sim2, Aff2], ids=str)
def test_scores_are_invariant_in_float32_as_far_as_the_poses_are(group, generator):
    """h g in float32 is itself wrong by a rounding u = 2⁻²⁴: translations t by u |t|, linear parts A by u √n |A|.

    The query's frame enlarges both by |A⁻¹|, query and key both err, and the arithmetic adds a few roundings of the
    linear part: 2 u |A⁻¹| (|t| + 4 √n |A|). The log is at most π/2 as steep as the pose for turns, twice for the shapes
    here; and a score s = λ d²/τ has the slope 2 √(s λ/τ) in d.
    """
    options64 = settings_of(group, generator)
    options32 = converted(options64, torch.float32)
    poses = near(group, 1, N, generator=generator)
    reference = lie_scores(poses, poses, **options64)
    slope = 2 * (reference.abs().max() * options64["block_weights"].max() / options64["temperature"].min()).sqrt()
    n = group.point_dim
    for element in far_elements(group, generator):
        moved = element @ poses
        linear, translation = moved[..., :n, :n], moved[..., :n, n:]
        size = 4 * math.sqrt(n) * torch.linalg.matrix_norm(linear, 2) + translation.flatten(-2).norm(dim=-1)
        inverse = torch.linalg.matrix_norm(torch.linalg.inv(linear), 2)
        budget = 2 * slope * 2 * 2**-24 * (inverse * size).max()
        assert budget < 0.5 * reference.abs().max()  # or this would prove nothing
        error = (lie_scores(moved.float(), moved.float(), **options32) - reference).abs().max()
        assert error <= budget, (error, budget)


def test_a_score_that_is_not_invariant_is_caught(generator):
    options = settings_of(SE2, generator)
    query, key = near(SE2, B, N, generator=generator), near(SE2, B, M, generator=generator)

    def right_handed(q, k):  # distances in the world instead of the frame
        return lie_scores(SE2.inverse(q), SE2.inverse(k), **options)

    with pytest.raises(AssertionError, match="not equivariant"):
        assert_invariant(right_handed, None, (query, key), act_in=act_on_poses, elements=far_elements(SE2, generator))


def pose_of(group, tangent, base):
    return group.compose(base, group.exp(tangent))


@pytest.mark.parametrize(
    ("group", "where"),
    [
        (SE2, "apart"),
        (SE2, "coincident"),
        (SE2, "almost half a turn"),
        (SO3, "coincident"),
        (SO3, "almost half a turn"),
        (SE3, "apart"),
        (Aff2, "coincident"),
    ],
    ids=str,
)
def test_gradients_and_second_gradients(group, where, generator):
    """Every argument, through poses g exp(ξ) at ξ = 0; at coincident poses the diagonal is at the identity."""
    batch, heads, tokens = 1, 2, 2
    base = near(group, batch, tokens, generator=generator, spread=0.3)
    other = base if where == "coincident" else near(group, batch, tokens, generator=generator, spread=0.3)
    if where == "almost half a turn":
        other = base @ turn(group, math.pi - 1e-2)
    options = settings_of(group, generator, heads=heads)
    arguments = (
        torch.zeros(batch, tokens, group.dim, dtype=torch.float64),
        torch.zeros(batch, tokens, group.dim, dtype=torch.float64),
        torch.randn(batch, heads, tokens, 2, generator=generator, dtype=torch.float64),
        options["block_weights"],
        options["temperature"],
        torch.zeros(heads, group.dim, dtype=torch.float64),
        torch.randn(batch, heads, tokens, 2, generator=generator, dtype=torch.float64),
        torch.randn(batch, heads, tokens, 2, generator=generator, dtype=torch.float64),
    )
    arguments = tuple(x.requires_grad_() for x in arguments)

    def attend(q, k, v, block_weights, temperature, displacement, content_query, content_key):
        return lie_attention(
            pose_of(group, q, base),
            pose_of(group, k, other),
            v,
            group=group,
            block_weights=block_weights,
            temperature=temperature,
            displacement=group.exp(displacement),
            content_query=content_query,
            content_key=content_key,
            impl="reference",
        )

    assert torch.autograd.gradcheck(attend, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, arguments, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("group", [SO2, SE2, SO3, SE3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_finite_at_half_a_turn_and_where_all_poses_coincide(group, dtype, generator):
    start = near(group, 1, 1, generator=generator)
    poses = torch.cat([start, start, start @ turn(group, math.pi)], dim=1).to(dtype).requires_grad_()
    options = settings_of(group, generator, dtype=dtype)
    scores = lie_scores(poses, poses, **options)
    expected = oracle_scores(poses.detach().double()[:, None, :2], poses.detach().double()[:, None, :2], **options)
    assert np.abs(expected).max() < 1e-9
    index = list(group.blocks).index("rotation")
    half_turn = -2 * math.pi**2 * options["block_weights"][:, index] / options["temperature"]
    torch.testing.assert_close(scores[0, :, 0, 2], half_turn, rtol=1e-5, atol=1e-5)
    value = torch.randn(1, H, 3, D, generator=generator, dtype=torch.float64).to(dtype)
    (gradient,) = torch.autograd.grad(
        lie_attention(poses, poses, value, **options, impl="reference").square().sum(), poses, create_graph=True
    )
    assert gradient.isfinite().all()
    (second,) = torch.autograd.grad(gradient.square().sum(), poses)
    assert second.isfinite().all()


def test_the_softmax_is_exact_for_huge_scores(generator):
    """Poses 1e4 apart: scores of −1e8 in float32 leave the softmax of the same scores in float64."""
    query = near(SE2, 1, N, generator=generator, dtype=torch.float32)
    key = near(SE2, 1, M, generator=generator, dtype=torch.float32)
    key[:, ::2, :2, 2] += 1e4
    query[:, 0, :2, 2] -= 1e4
    options = settings_of(SE2, generator, dtype=torch.float32)
    scores = lie_scores(query, key, **options)
    assert scores.min() < -1e8
    expected = scores.double().softmax(-1)
    error = (lie_weights(query, key, **options) - expected).abs().max()
    assert error <= 4 * torch.finfo(torch.float32).eps


def test_float32_errs_as_little_as_its_inputs(generator):
    """Against float64 of the same float32 numbers: a few roundings of the scores, which are of size 10."""
    options = settings_of(SE2, generator, dtype=torch.float32)
    query, key = (near(SE2, B, n, generator=generator, dtype=torch.float32) for n in (N, M))
    value = torch.randn(B, H, M, D, generator=generator)
    options64 = converted(options, torch.float64)
    reference = lie_attention(query.double(), key.double(), value.double(), **options64)
    # what any float32 attention makes of the exact scores
    scores = lie_scores(query.double(), key.double(), **options64).float()
    plain = scores.softmax(-1) @ value
    out = lie_attention(query, key, value, **options)
    assert_low_precision(out, plain, reference, ratio=8.0)
    with pytest.raises(AssertionError):
        assert_low_precision(out + 1e-4, plain, reference, ratio=8.0)


@pytest.mark.parametrize("group", [GL(2), Aff2], ids=str)
def test_outside_the_chart(group, generator):
    options = settings_of(group, generator)
    key = near(group, 1, 3, generator=generator, spread=0.2)
    query = torch.cat([key[:, :1], key[:, :1] @ outside_chart(group)], dim=1).requires_grad_()
    value = torch.randn(1, H, 3, D, generator=generator, dtype=torch.float64)
    inside = group.in_chart(group.relative(query[:, :, None], key[:, None]))
    count = int((~inside).sum())
    assert count >= 1
    assert inside[:, 0].all()
    with pytest.raises(ValueError, match=rf'{count} of 6 pairs do not: use chart="polar" or outside="mask"'):
        lie_attention(query, key, value, **options)
    scores = lie_scores(query, key, **options, outside="mask")
    assert torch.equal(scores == -math.inf, ~inside[:, None].expand_as(scores))
    allowed = inside[:, None].expand_as(scores).numpy()
    out = lie_attention(query, key, value, **options, outside="mask")
    assert_near(out, oracle_attention(scores.detach().nan_to_num(neginf=0.0).numpy(), value, allowed))
    polar = lie_attention(query, key, value, **options, chart="polar")
    for result in (out, polar):
        (gradient,) = torch.autograd.grad(result.square().sum(), query)
        assert result.isfinite().all()
        assert gradient.isfinite().all()
    # a pair that may not attend is not looked at, one that is not checked is not hidden
    mask = inside[:, None].clone()
    assert torch.equal(lie_attention(query, key, value, **options, mask=mask), out)
    mask[:, :, 1] = False  # nor in a row that is empty
    assert not inside[:, 1].all()
    for check in (True, False):
        result = lie_attention(query, key, value, **options, mask=mask, check=check)
        (gradient,) = torch.autograd.grad(result.square().sum(), query)
        assert not result[:, :, 1].any()
        assert gradient.isfinite().all()
    unchecked = lie_scores(query, key, **options, check=False)
    assert torch.equal(unchecked.isnan(), ~inside[:, None].expand_as(scores))


@pytest.mark.parametrize("group", [GL(2), Aff2], ids=str)
def test_the_polar_chart_is_invariant_outside_the_principal_one(group, generator):
    options = settings_of(group, generator)
    query = group.random(1, N, generator=generator, dtype=torch.float64)
    assert_invariant(
        lambda q, k: lie_scores(q, k, **options, chart="polar"),
        None,
        (query, query.roll(1, 1)),
        act_in=act_on_poses,
        elements=far_elements(group, generator),
        tolerance=1e-9,
    )


def test_compiled_is_eager(generator):
    options = settings_of(SE2, generator)
    query, key = near(SE2, B, N, generator=generator), near(SE2, B, M, generator=generator)
    value = torch.randn(B, H, M, D, generator=generator, dtype=torch.float64)
    mask = torch.rand(B, 1, N, M, generator=generator) < 0.6
    tensors = [x.requires_grad_() for x in (query, key, value, options["block_weights"], options["temperature"])]

    def attend(q, k, v, block_weights, temperature):
        return lie_attention(
            q, k, v, group=SE2, block_weights=block_weights, temperature=temperature, mask=mask, causal=True
        )

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        out = function(*tensors)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled, rtol=1e-12, atol=1e-12)


def test_autocast_leaves_the_geometry_alone(generator):
    options = settings_of(SE2, generator, dtype=torch.float32)
    query = near(SE2, B, N, generator=generator, dtype=torch.float32)
    expected = lie_scores(query, query, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lie_scores(query, query, **options), expected)


def change(name, function):
    return lambda arguments: arguments | {name: function(arguments.get(name))}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("query", lambda x: x[..., :2, :2]), r"query must hold matrices of SE2.*received \[2, 5, 2, 2\]"),
        (change("key", lambda x: x[0]), r"key must hold matrices of SE2"),
        (change("group", lambda x: SO2), r"query must hold matrices of SO2|block_weights must have shape"),
        (change("key", lambda x: x[:1]), r"batch of the query.*received \[1, 1\]"),
        (change("query", lambda x: x[:, None].expand(-1, 2, -1, -1, -1)), r"1 or 3 heads, received \[2, 2\]"),
        (change("value", lambda x: x[:, :, :-1]), r"value must have shape \[B, H, M, D\] = \[2, 3, 7, any\]"),
        (change("value", lambda x: x[0]), r"value must have shape"),
        (change("value", lambda x: x.float()), r"float32, or all float64.*value torch\.float32"),
        (change("key", lambda x: x.float()), r"float32, or all float64.*key torch\.float32"),
        (change("temperature", lambda x: x.to("meta")), r"on one device.*temperature torch\.float64 on meta"),
        (change("block_weights", lambda x: x[:, :1]), r"block_weights must have shape \[H, blocks of SE2\]"),
        (change("block_weights", lambda x: -x), r"block_weights must be positive and finite, received -"),
        (change("block_weights", lambda x: x * math.nan), r"block_weights must be positive and finite, received nan"),
        (change("temperature", lambda x: 0 * x), r"temperature must be positive and finite, received 0"),
        (change("temperature", lambda x: x[:2]), r"temperature must have shape \[H\] = \[3\], received \[2\]"),
        (change("displacement", lambda x: torch.eye(3).double()), r"displacement must have shape \[H, m, m\]"),
        (change("content_query", lambda x: torch.zeros(B, H, N, 6).double()), r"received no content_key: give both"),
        (change("mask", lambda x: torch.ones(B, M, dtype=torch.bool)), r"mask must be bool.*mask\[:, None, None, :\]"),
        (change("mask", lambda x: torch.ones(B, H, N, M)), r"mask must be bool.*received torch\.float32"),
        (change("mask", lambda x: torch.ones(B, H, N, 1, dtype=torch.bool)), r"mask must be bool"),
        (change("chart", lambda x: "other"), r"chart of SE2 must be one of principal, received 'other'"),
        (change("outside", lambda x: "drop"), r"outside must be one of error, mask, received 'drop'"),
        (change("impl", lambda x: "dense"), r"impl must be one of auto, reference, tiled, triton, received 'dense'"),
        (change("key", lambda x: 2 * x), r"SE2"),
    ],
)
def test_errors_say_what_is_wrong(spoil, message, generator):
    with pytest.raises(ValueError, match=message):
        lie_attention(**spoil(arguments_of(generator)))


def test_no_keys_and_no_queries(generator):
    options = settings_of(SE2, generator)
    poses, value = near(SE2, B, N, generator=generator), torch.zeros(B, H, 0, D, dtype=torch.float64)
    assert lie_attention(poses[:, :0], poses[:, :0], value, **options).shape == (B, H, 0, D)
    assert not lie_attention(poses, poses[:, :0], value, **options).any()


def test_functional_transforms_are_those_of_autograd(generator):
    options = settings_of(SE2, generator)
    value = torch.randn(B, H, N, D, generator=generator, dtype=torch.float64)
    poses = near(SE2, B, N, generator=generator)

    def loss(query):
        return lie_attention(query, query, value, **options, check=False).square().sum()

    leaf = poses.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(poses), expected)
    several = torch.stack([poses, poses.flip(1)])
    torch.testing.assert_close(torch.func.vmap(loss)(several), torch.stack([loss(x) for x in several]))
