"""The low-precision rule fails what is too coarse, and passes the plain rounding."""

import pytest
import torch

from erlangen.testing import assert_low_precision

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def matrices():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 32, generator=generator, dtype=torch.float64) for _ in range(2)]


def products(matrices, dtype):
    """(candidate: one rounding at the end, plain: all in low precision, float64), from the same rounded inputs."""
    a, b = (matrix.to(dtype) for matrix in matrices)
    reference = a.double() @ b.double()
    plain = (a[:, :, None] * b[None]).sum(1)
    return reference.to(dtype), plain, reference


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_passes(matrices, dtype):
    table = assert_low_precision(*products(matrices, dtype), name="product")
    assert table.passed
    assert 0 < table.max_error <= table.rows[0].budget


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exact_reference_leaves_a_rounding_band(dtype):
    reference = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    assert_low_precision((reference * (1 + eps)).to(dtype), reference.to(dtype), reference)
    with pytest.raises(AssertionError, match="FAILED"):
        assert_low_precision((reference * (1 + 3 * eps)).to(dtype), reference.to(dtype), reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_coarser_precision_fails_and_prints_error_and_budget(matrices, dtype):
    candidate, plain, reference = products(matrices, dtype)
    with pytest.raises(AssertionError, match=r"^coarse: [\s\S]*error\s+budget[\s\S]*FAILED"):
        assert_low_precision(candidate.bfloat16().to(dtype), plain, reference, name="coarse")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_non_finite_value_fails_wherever_it_is(matrices, place, bad):
    tensors = [tensor.clone() for tensor in products(matrices, torch.float32)]
    tensors[place][0, 0] = bad
    with pytest.raises(AssertionError, match="not finite"):
        assert_low_precision(*tensors)


def test_the_same_infinity_everywhere_fails(matrices):
    tensors = [tensor.clone() for tensor in products(matrices, torch.float32)]
    for tensor in tensors:
        tensor[0, 0] = float("inf")
    with pytest.raises(AssertionError, match="not finite"):
        assert_low_precision(*tensors)


def test_shape_and_dtype_must_agree(matrices):
    candidate, plain, reference = products(matrices, torch.bfloat16)
    with pytest.raises(AssertionError, match="differ in shape"):
        assert_low_precision(candidate[:1], plain, reference)
    with pytest.raises(AssertionError, match=r"candidate is torch\.float32"):
        assert_low_precision(candidate.float(), plain, reference)
    with pytest.raises(TypeError, match="float64 reference is"):
        assert_low_precision(candidate, plain, reference.float())
    with pytest.raises(TypeError, match="floating tensor is needed"):
        assert_low_precision(candidate.int(), plain, reference)
    with pytest.raises(ValueError, match="itself"):
        assert_low_precision(plain, plain, reference)


def test_one_bad_gradient_among_good_values_fails_by_name(matrices):
    good = products(matrices, torch.float32)
    trees = [{"value": tensor, "query.grad": tensor.clone()} for tensor in good]
    assert [row.tensor for row in assert_low_precision(*trees).rows] == ["value", "query.grad"]
    trees[0]["query.grad"][3, 4] += 1e-3
    with pytest.raises(AssertionError, match=r"query\.grad.*FAILED"):
        assert_low_precision(*trees)


def test_sequences_and_empty_tensors(matrices):
    good = products(matrices, torch.float32)
    assert len(assert_low_precision(*[[tensor, tensor[:0]] for tensor in good]).rows) == 2
    with pytest.raises(AssertionError, match="different tensors: 0; 0, 1; 0, 1"):
        assert_low_precision([good[0]], [good[1]] * 2, [good[2]] * 2)


def test_the_ratio_is_what_is_allowed():
    reference = torch.tensor([1.0, -1.0], dtype=torch.float64)
    plain, candidate = (reference + 0.01).float(), (reference + 0.019).float()
    assert_low_precision(candidate, plain, reference)
    with pytest.raises(AssertionError, match=r"above 1\.8 x"):
        assert_low_precision(candidate, plain, reference, ratio=1.8)
