"""PReLU against torch's own: values, derivatives of every kind, low precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from erlangen.lm._prelu import prelu


def expected(x: Tensor, slope: Tensor) -> Tensor:
    return F.prelu(x.flatten(0, -2), slope).view_as(x)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    x[0, 0, 0], x[1, 2, 4] = 0.0, -0.0
    return x.requires_grad_(), torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()


def test_values_and_gradients_are_those_of_torch(inputs: tuple[Tensor, Tensor]) -> None:
    ours, theirs = prelu(*inputs), expected(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    weight = torch.randn_like(ours)
    for found, asked in zip(torch.autograd.grad(ours, inputs, weight), torch.autograd.grad(theirs, inputs, weight)):
        torch.testing.assert_close(found, asked, rtol=1e-14, atol=1e-14)
    with pytest.raises(AssertionError):  # a gradient of the other side is not taken for right
        wrong = torch.autograd.grad(prelu(-inputs[0], inputs[1]), inputs[0], weight)[0]
        torch.testing.assert_close(wrong, torch.autograd.grad(expected(*inputs), inputs[0], weight)[0])


def test_second_derivatives_forward_mode_and_vmap() -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(4, 3, dtype=torch.float64, generator=generator) + 0.01).requires_grad_()
    slope = torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(prelu, (x, slope), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(prelu, (x, slope))
    forward, reverse = (way(prelu, argnums=(0, 1))(x, slope) for way in (torch.func.jacfwd, torch.func.jacrev))
    torch.testing.assert_close(forward, reverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_keeps_its_dtype_and_the_slope_its_own(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 5, generator=generator).to(dtype).requires_grad_()
    slope = torch.randn(5, generator=generator).requires_grad_()
    weight = torch.randn(64, 5, generator=generator).to(dtype)
    out = prelu(x, slope)
    found = torch.autograd.grad(out, (x, slope), weight)
    assert (out.dtype, found[0].dtype, found[1].dtype) == (dtype, dtype, torch.float32)
    exact = (x.detach().double().requires_grad_(), slope.detach().to(dtype).double().requires_grad_())
    asked = torch.autograd.grad(expected(*exact), exact, weight.double())
    bound = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found[0].double(), asked[0], rtol=bound, atol=bound)
    torch.testing.assert_close(found[1].double(), asked[1], rtol=4 * bound, atol=64 * bound)


def test_gradients_of_many_pulls_at_once(inputs: tuple[Tensor, Tensor]) -> None:
    out = prelu(*inputs)
    pulls = torch.randn(4, *out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(out, inputs, pulls, is_grads_batched=True, retain_graph=True)
    for number, pull in enumerate(pulls):
        asked = torch.autograd.grad(out, inputs, pull, retain_graph=True)
        assert all(torch.allclose(f[number], a, rtol=1e-13, atol=1e-13) for f, a in zip(found, asked))
