"""Accuracies with bootstrap intervals, and paired differences of two models.

Blocks of items are resampled with replacement: items made together, such as a minimal pair and its mirror image, are
not independent. An interval is of percentiles; where every item is right (or wrong) it has no width, and says nothing
of how close to 1 (or 0) the truth is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ._items import Item

RESAMPLES = 4000


@dataclass(frozen=True)
class Answer:
    """What a model made of an item."""

    likelihoods: tuple[float, ...]
    """Log-likelihood of each candidate, in nats."""
    greedy: bool
    """Whether each token of the right answer is the likeliest of all tokens."""


class Estimate(NamedTuple):
    """A mean and its interval."""

    mean: float
    low: float
    high: float


def credit(values: Sequence[float], answer: int) -> float:
    """1 if the answer has the highest value, a share if others have it too, else 0."""
    best = max(values)
    return 1 / sum(value == best for value in values) if values[answer] == best else 0.0


@dataclass(frozen=True)
class FamilyResult:
    """A model's answers to the items of a family."""

    family: str
    items: tuple[Item, ...]
    answers: tuple[Answer, ...]
    too_long: int = 0
    """Drafts that were not asked because the context was too short for them."""
    shortest: int = 0
    longest: int = 0
    """Tokens of the shortest and of the longest text."""

    @property
    def credits(self) -> np.ndarray:
        """Of each item, 1 for the right choice and 0 for a wrong one; a tie shares: float64 [n]."""
        pairs = zip(self.items, self.answers)
        return np.array([credit(answer.likelihoods, item.answer) for item, answer in pairs])

    @property
    def credits_a_byte(self) -> np.ndarray:
        """The same, for the choice by log-likelihood a byte."""
        found = []
        for item, answer in zip(self.items, self.answers):
            sizes = [len(text.encode()) for text in item.candidates]
            found.append(credit([value / size for value, size in zip(answer.likelihoods, sizes)], item.answer))
        return np.array(found)

    @property
    def losses(self) -> np.ndarray:
        """Negative log-likelihood of the right answer of each item, in nats: float64 [n]."""
        return np.array([-answer.likelihoods[item.answer] for item, answer in zip(self.items, self.answers)])

    @property
    def blocks(self) -> np.ndarray:
        """The block of each item: int64 [n]."""
        return np.array([item.block for item in self.items])

    @property
    def chance(self) -> float:
        """Mean accuracy of a blind choice."""
        return float(np.mean([item.chance for item in self.items]))


@dataclass(frozen=True)
class Summary:
    """A family, or the mean over families, in numbers."""

    family: str
    num_items: int
    accuracy: Estimate
    chance: float
    accuracy_a_byte: float
    """Of the choice by log-likelihood a byte."""
    top1: float
    """Share of items whose right answer is what the model would write, token by token."""
    loss: float
    """Mean negative log-likelihood of the right answer, in nats."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the same items of a family: second less first."""

    family: str
    difference: Estimate
    """Of the accuracies."""
    better: int
    worse: int
    """Blocks in which the second model has more right than the first, and less."""
    p: float
    """Exact two-sided McNemar test over blocks; NaN for the mean over families, which has none."""


def bootstrap(values: np.ndarray, blocks: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of values over resampled blocks: float64 [resamples].

    Args:
        values: [n].
        blocks: the block of each, int64 [n].
        seed: of the resampling.
        resamples: how many.
    """
    _, place = np.unique(blocks, return_inverse=True)
    sums, sizes = np.bincount(place, values), np.bincount(place)
    rng, found = np.random.default_rng(seed), np.empty(resamples)
    for first in range(0, resamples, 500):
        drawn = rng.integers(0, len(sums), (min(500, resamples - first), len(sums)))
        found[first : first + 500] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return found


def _estimate(mean: float, means: np.ndarray, confidence: float = 0.95) -> Estimate:
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(mean), float(low), float(high))


def summarise(result: FamilyResult, *, seed: int = 0) -> Summary:
    """The numbers of a family, with a 95 % bootstrap interval."""
    credits = result.credits
    return Summary(
        family=result.family,
        num_items=len(credits),
        accuracy=_estimate(credits.mean(), bootstrap(credits, result.blocks, seed=seed)),
        chance=result.chance,
        accuracy_a_byte=float(result.credits_a_byte.mean()),
        top1=float(np.mean([answer.greedy for answer in result.answers])),
        loss=float(result.losses.mean()),
    )


def macro(results: Mapping[str, FamilyResult], *, seed: int = 0) -> Summary:
    """The unweighted mean over families; its interval resamples the blocks within each."""
    each = [summarise(result, seed=seed) for result in results.values()]
    means = [
        bootstrap(result.credits, result.blocks, seed=seed + 1 + number)
        for number, result in enumerate(results.values())
    ]
    return Summary(
        family="mean",
        num_items=sum(summary.num_items for summary in each),
        accuracy=_estimate(float(np.mean([summary.accuracy.mean for summary in each])), np.mean(means, axis=0)),
        chance=float(np.mean([summary.chance for summary in each])),
        accuracy_a_byte=float(np.mean([summary.accuracy_a_byte for summary in each])),
        top1=float(np.mean([summary.top1 for summary in each])),
        loss=float(np.mean([summary.loss for summary in each])),
    )


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p-value of McNemar's test: the binomial test of ``better`` of ``better + worse`` against 1/2."""
    total, few = better + worse, min(better, worse)
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, k) for k in range(few + 1))
    return min(1.0, 2 * tail / 2**total)


def compare(
    first: Mapping[str, FamilyResult], second: Mapping[str, FamilyResult], *, seed: int = 0
) -> list[Comparison]:
    """Paired differences of the accuracies, family by family, and of their mean over families (the last).

    The p-values are not adjusted for the number of families.

    Raises:
        ValueError: the models were not asked the same items.
    """
    if list(first) != list(second):
        raise ValueError("two models are compared on the same families in the same order: ask both all of them")
    found, means = [], []
    for number, (family, one) in enumerate(first.items()):
        other = second[family]
        if [item.text for item in one.items] != [item.text for item in other.items]:
            raise ValueError(
                f"the models were asked different items of {family!r}: make the items for both, with make_suite"
            )
        difference = other.credits - one.credits
        means.append(bootstrap(difference, one.blocks, seed=seed + 1 + number))
        _, place = np.unique(one.blocks, return_inverse=True)
        net = np.bincount(place, difference).round(9)  # thirds of shared credit
        better, worse = int((net > 0).sum()), int((net < 0).sum())
        estimate = _estimate(difference.mean(), means[-1])
        found.append(Comparison(family, estimate, better, worse, mcnemar(better, worse)))
    mean = float(np.mean([comparison.difference.mean for comparison in found]))
    totals = sum(c.better for c in found), sum(c.worse for c in found)
    return [*found, Comparison("mean", _estimate(mean, np.mean(means, axis=0)), *totals, math.nan)]
