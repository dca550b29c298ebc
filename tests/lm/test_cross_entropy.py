"""Logits and cross-entropy of low precision, made together, against float64."""

import pytest
import torch
import torch.nn.functional as F

from erlangen.lm import _cross_entropy
from erlangen.lm._cross_entropy import linear_cross_entropy


def inputs(dtype, weight_dtype):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(20, 8, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(50, 8, generator=random).to(dtype).to(weight_dtype).requires_grad_()
    targets = torch.randint(50, (20,), generator=random)
    targets[[0, 7]] = -100
    return x, weight, targets


@pytest.fixture
def parts(monkeypatch):
    """Parts of rows and of the vocabulary that do not divide them."""
    monkeypatch.setattr(_cross_entropy, "_CPU_CHUNK", 3 * 50)
    monkeypatch.setattr(_cross_entropy, "_GRADIENTS", 20 * 7)


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("uses", ["loss", "logits", "both"])
def test_loss_and_gradients_are_those_of_float64(dtype, uses, parts):
    """The loss to float32; gradients to the rounding of their dtype. Logits may be used beside the loss, or alone."""
    x, weight, targets = inputs(dtype, dtype)
    exact = [y.detach().double().requires_grad_() for y in (x, weight)]
    pull = torch.randn(20, 50, generator=torch.Generator().manual_seed(1))

    def value(logits, loss):
        return (3 * loss if uses != "logits" else 0) + ((logits * pull).sum() / 50 if uses != "loss" else 0)

    logits, loss = linear_cross_entropy(x, weight, targets)
    # At the logits as they were rounded, so that only the gradient's own rounding is seen.
    exact_logits = F.linear(*exact)
    exact_logits.data.copy_(logits.detach())
    expected = F.cross_entropy(exact_logits, targets)
    value(exact_logits, expected).backward()
    value(logits, loss).backward()
    assert (logits.dtype, loss.dtype) == (dtype, torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    bound = 2 * torch.finfo(dtype).eps
    for found, asked in zip((x, weight), exact):
        assert found.grad.dtype == dtype and relative(found.grad, asked.grad) < bound
    if uses == "loss":
        assert not x.grad[[0, 7]].any()
    wrong = torch.autograd.grad(linear_cross_entropy(x, weight, targets.roll(1))[1], x)[0]
    assert relative(3 * wrong, exact[0].grad) > 10 * bound


def test_under_autocast_the_weight_keeps_its_dtype(parts):
    x, weight, targets = inputs(torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = linear_cross_entropy(x, weight, targets)
        plain_loss = F.cross_entropy(F.linear(x, weight).float(), targets)
    assert logits.dtype == torch.bfloat16 and loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    found, asked = (torch.autograd.grad(y, (x, weight)) for y in (loss, plain_loss))
    for f, a in zip(found, asked):
        assert f.dtype == torch.float32 and relative(f, a.double()) < 0.01


def test_wide_logits_are_left_to_torch():
    x, weight, targets = inputs(torch.float64, torch.float64)
    logits, loss = linear_cross_entropy(x, weight, targets)
    assert torch.equal(logits, F.linear(x, weight)) and torch.equal(loss, F.cross_entropy(logits, targets))
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets)[1], (x, weight))


def test_under_vmap():
    x, weight, targets = inputs(torch.bfloat16, torch.bfloat16)
    found = torch.func.vmap(lambda y: linear_cross_entropy(y, weight, targets)[1])(torch.stack([x, 2 * x]))
    assert found.tolist() == pytest.approx([linear_cross_entropy(y, weight, targets)[1].item() for y in (x, 2 * x)])
