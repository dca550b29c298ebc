"""Causal attention by batched products, against scaled_dot_product_attention in float64."""

import pytest
import torch
import torch.nn.functional as F

from erlangen.lm import _attention
from erlangen.lm._attention import causal_attention


def inputs(batch, heads, kv_heads, tokens, width, dtype=torch.bfloat16):
    random = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    *qkv, grad = (torch.randn(shape, generator=random).to(dtype).transpose(1, 2) for shape in shapes)
    return [x.requires_grad_() for x in qkv], grad


def results(qkv, grad):
    """Output and gradients, with torch's kernel where the dtype is wide."""
    y = causal_attention(*qkv)
    return [y, *torch.autograd.grad(y, qkv, grad.to(y.dtype))]


def exact(qkv, grad):
    return results([x.detach().double().requires_grad_() for x in qkv], grad)


def relative(found, expected):
    return float(((found.double() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens", "width"),
    [(2, 2, 128, 16), (3, 3, 300, 16), (4, 2, 129, 24), (4, 1, 7, 8), (1, 1, 1, 4)],
)
def test_values_and_gradients(heads, kv_heads, tokens, width):
    """To the rounding of bfloat16, and about as near as torch's own kernel."""
    qkv, grad = inputs(2, heads, kv_heads, tokens, width)
    expected, found = exact(qkv, grad), results(qkv, grad)
    assert type(found[0].grad_fn).__name__ == "_BlocksBackward"
    y = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=kv_heads < heads)
    theirs = [y, *torch.autograd.grad(y, qkv, grad)]
    for f, t, e in zip(found, theirs, expected):
        assert f.dtype == torch.bfloat16 and f.shape == e.shape
        # One token has no gradient of its query and key.
        assert relative(f, e) < max(0.005, 2 * relative(t, e)) if e.norm() > 0 else f.norm() < 1e-2
    if tokens > 1:  # no mask, or another scale, is seen
        free = F.scaled_dot_product_attention(*(x.double() for x in qkv), enable_gqa=kv_heads < heads)
        assert relative(found[0], free) > 0.1
        assert relative(causal_attention(2 * qkv[0], *qkv[1:]), expected[0]) > 0.05


def test_large_scores():
    """No overflow, and the softmax still of float32 scores."""
    qkv, grad = inputs(1, 2, 2, 200, 16)
    qkv = [(100 * qkv[0]).detach().requires_grad_(), *qkv[1:]]
    found, expected = results(qkv, grad), exact(qkv, grad)
    assert all(relative(f, e) < 0.02 for f, e in zip(found, expected))


def test_the_future_is_not_seen():
    qkv, _ = inputs(1, 2, 2, 150, 8)
    changed = [x.detach().clone() for x in qkv]
    for x in changed:
        x[:, :, 100:] = 7.0
    before, after = causal_attention(*qkv), causal_attention(*changed)
    assert torch.equal(before[:, :, :100], after[:, :, :100]) and not torch.equal(before, after)


def test_under_autocast_scores_stay_in_float32():
    qkv, grad = inputs(1, 2, 2, 130, 16)
    plain = results(qkv, grad)
    with torch.autocast("cpu", torch.bfloat16):
        found = causal_attention(*(x.float() for x in qkv))
    assert found.dtype == torch.bfloat16 and torch.equal(found, plain[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's kernel under vmap
@pytest.mark.parametrize("case", ["float32", "long", "vmap"])
def test_elsewhere_it_is_torchs(case, monkeypatch):
    qkv, _ = inputs(1, 2, 2, 33, 8, torch.float32 if case == "float32" else torch.bfloat16)
    if case == "long":
        monkeypatch.setattr(_attention, "_LONGEST", 32)
    expected = F.scaled_dot_product_attention(*qkv, is_causal=True)
    if case == "vmap":
        found = torch.func.vmap(lambda q: causal_attention(q, *qkv[1:]))(qkv[0][None])[0]
    else:
        found = causal_attention(*qkv)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert "_BlocksBackward" not in str(found.grad_fn)
