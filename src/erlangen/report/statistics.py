"""What a few seeds can say: a mean, its standard error, and Student's interval for paired differences."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and its confidence interval, infinite when there is one seed. Prints as ``0.12 [0.05, 0.19]``."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        if math.isinf(self.low) or math.isinf(self.high):
            return f"{self.mean:{spec}} (n = 1)"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def mean_and_standard_error(values: Any) -> tuple[Any, Any]:
    """Mean over the first axis (the seeds), and its standard error ``s / √n`` with the sample deviation ``s``.

    Args:
        values: [seeds] or [seeds, ...], at least one seed. A NaN gives a NaN: a seed that diverged is not dropped.

    Returns:
        The mean and the standard error, floats for [seeds], else arrays of shape [...]; the error of one seed is NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 0 or len(values) == 0:
        raise ValueError(f"values must hold at least one seed on the first axis; received shape {values.shape}")
    mean = values.mean(axis=0)
    error = values.std(axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.full_like(mean, np.nan)
    return (mean, error) if mean.ndim else (float(mean), float(error))


def paired_interval(differences: Any, confidence: float = 0.95) -> Interval:
    """Student's confidence interval for the mean of paired differences.

    Args:
        differences: [n], one difference a seed (both runs share the seed).
        confidence: probability that such an interval holds the true mean, if the differences are normal.

    Returns:
        ``(mean, low, high)``. One difference says nothing of the spread: the interval is then infinite.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim != 1:
        raise ValueError(f"differences must be one number a seed; received shape {differences.shape}")
    mean, error = mean_and_standard_error(differences)
    if len(differences) == 1:
        return Interval(mean, -math.inf, math.inf)
    half = student_t_quantile((1 + confidence) / 2, len(differences) - 1) * error
    return Interval(mean, mean - half, mean + half)


def paired_p_value(differences: Any) -> float:
    """Student's two-sided p-value of paired differences against a mean of zero.

    Args:
        differences: [n], one difference a seed. A NaN gives a NaN.

    Returns:
        the probability of a mean as far from zero, were the differences normal with mean zero; 1 for one difference,
        which says nothing of the spread.
    """
    differences = np.asarray(differences, dtype=np.float64)
    mean, _, _ = paired_interval(differences)
    if math.isnan(mean) or len(differences) == 1:
        return mean if math.isnan(mean) else 1.0
    degrees = len(differences) - 1
    _, error = mean_and_standard_error(differences)
    return 1.0 - _central_probability(math.atan2(abs(mean), error * math.sqrt(degrees)), degrees)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several questions asked together, adjusted after Holm (1979): below α, a question is answered so that
    the chance of one wrong answer or more among all is at most α. A NaN counts as a question that was asked, and stays.
    """
    filled = [1.0 if math.isnan(p) else p for p in p_values]
    adjusted, largest = list(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(filled)), key=filled.__getitem__)):
        largest = max(largest, min(1.0, (len(filled) - rank) * filled[index]))
        if not math.isnan(p_values[index]):
            adjusted[index] = largest
    return adjusted


def student_t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """The ``t`` with ``P(T ≤ t) = probability`` for Student's distribution with a whole number of degrees of freedom.

    With ``t = √ν tan θ`` the probability is a finite sum of positive terms (Abramowitz and Stegun, 26.7.3 and 26.7.4),
    which is inverted by bisection over the angle ``θ``.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability must be between 0 and 1, not {probability}")
    if degrees_of_freedom < 1 or degrees_of_freedom % 1:
        raise ValueError(f"degrees_of_freedom must be a positive whole number, not {degrees_of_freedom}")
    if probability < 0.5:
        return -student_t_quantile(1 - probability, degrees_of_freedom)
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _central_probability(middle, degrees_of_freedom) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees_of_freedom) * math.tan(low)


def _central_probability(theta: float, degrees_of_freedom: int) -> float:
    """``P(|T| ≤ √ν tan θ)``."""
    odd, cosine = degrees_of_freedom % 2, math.cos(theta)
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, degrees_of_freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    total *= math.sin(theta)
    return (theta + total) * 2 / math.pi if odd else total
