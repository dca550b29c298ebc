"""Statistics of a few seeds, against SciPy."""

import math

import numpy as np
import pytest

from erlangen.report import (
    Interval,
    holm,
    mean_and_standard_error,
    paired_interval,
    paired_p_value,
    student_t_quantile,
)


def test_student_quantiles_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle")
    degrees = np.arange(1, 201)
    for probability in (0.025, 0.5, 0.75, 0.975, 0.9995):
        ours = [student_t_quantile(probability, int(number)) for number in degrees]
        np.testing.assert_allclose(ours, stats.t.ppf(probability, degrees), rtol=1e-9, atol=1e-12)


def test_paired_interval_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle")
    differences = np.random.default_rng(0).normal(0.1, 1, 7)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.9)
    assert paired_interval(differences, 0.9) == pytest.approx((differences.mean(), *expected), rel=1e-9)


def test_p_values_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle")
    generator = np.random.default_rng(1)
    for shift in (0.0, 0.3, 2.0):
        for number in (2, 3, 5, 12):
            differences = generator.normal(shift, 1, number)
            expected = stats.ttest_1samp(differences, 0).pvalue
            assert paired_p_value(differences) == pytest.approx(expected, rel=1e-7, abs=1e-13)
    assert paired_p_value([0.3]) == 1.0
    assert paired_p_value([0.3, 0.3]) == pytest.approx(0.0, abs=1e-7), "no spread at all"
    assert math.isnan(paired_p_value([0.1, math.nan]))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []
    adjusted = holm([0.01, math.nan, 0.02])
    assert adjusted[0] == pytest.approx(0.03) and adjusted[2] == pytest.approx(0.04) and math.isnan(adjusted[1])


def test_an_interval_leaves_out_zero_where_its_p_value_says_so():
    generator = np.random.default_rng(2)
    for _ in range(200):
        differences = generator.normal(0.8, 1, 5)
        _, low, high = paired_interval(differences)
        assert (low > 0 or high < 0) == (paired_p_value(differences) < 0.05)


def test_one_seed_has_no_finite_interval_and_says_so():
    interval = paired_interval([0.25])
    assert interval == (0.25, -math.inf, math.inf)
    assert f"{interval:+.2f}" == "+0.25 (n = 1)"
    assert f"{Interval(0.5, 0.25, 0.75):.2f}" == "0.50 [0.25, 0.75]"


def test_mean_and_standard_error():
    mean, error = mean_and_standard_error([1.0, 2.0, 3.0])
    assert (mean, error) == pytest.approx((2, 1 / math.sqrt(3)))
    mean, error = mean_and_standard_error([[1.0, 2.0]])
    assert mean.tolist() == [1, 2]
    assert np.isnan(error).all()
    mean, error = mean_and_standard_error([[1.0, math.nan], [3.0, 5.0]])
    assert mean[0] == 2
    assert math.isnan(mean[1])


def test_a_nan_is_not_dropped():
    assert math.isnan(paired_interval([0.1, 0.2, math.nan]).mean)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_and_standard_error([]), "at least one seed"),
        (lambda: paired_interval([]), "at least one seed"),
        (lambda: paired_interval([[1.0], [2.0]]), "one number a seed"),
        (lambda: paired_interval([1.0, 2.0], 1.0), "between 0 and 1"),
        (lambda: student_t_quantile(0.9, 0), "positive whole number"),
        (lambda: student_t_quantile(0.9, 2.5), "positive whole number"),
    ],
)
def test_what_has_no_answer_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
