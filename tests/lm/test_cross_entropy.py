"""The row-by-row cross-entropy of low-precision logits, against float64."""

import pytest
import torch
import torch.nn.functional as F

from erlangen.lm import _cross_entropy
from erlangen.lm._cross_entropy import cross_entropy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_gradient_are_those_of_float64(dtype, monkeypatch):
    """The loss to float32; the gradient to the rounding of its dtype, in chunks that do not divide the rows."""
    monkeypatch.setattr(_cross_entropy, "_CPU_CHUNK", 3 * 50)
    random = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(20, 50, generator=random)).to(dtype).requires_grad_()
    targets = torch.randint(50, (20,), generator=random)
    targets[[0, 7]] = -100
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, targets)
    (3 * expected).backward()
    loss = cross_entropy(logits, targets)
    (3 * loss).backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert not logits.grad[[0, 7]].any()
    wrong = targets.roll(1)
    assert abs(cross_entropy(logits, wrong).item() - expected.item()) > 0.1


def test_wide_logits_are_left_to_torch():
    logits, targets = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.arange(6) % 5
    assert torch.equal(cross_entropy(logits, targets), F.cross_entropy(logits, targets))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), logits)
