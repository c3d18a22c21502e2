"""Statistics of timings: medians, percentiles, intervals of ratios, geometric means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
NORMAL_95 = 1.96


class Ratio(NamedTuple):
    """A ratio of two medians and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def relative_width(self) -> float:
        return (self.high - self.low) / self.value

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


class Summary(NamedTuple):
    """Median and outer deciles of samples, in their unit."""

    median: float
    p10: float
    p90: float


def summarize(samples: Sequence[float]) -> Summary:
    p10, median, p90 = np.percentile(samples, [10, 50, 90])
    return Summary(float(median), float(p10), float(p90))


def ratio_of_medians(
    numerator: Sequence[float], denominator: Sequence[float], seed: int = 0
) -> Ratio:
    """Ratio of medians with a bootstrap interval.

    Parameters
    ----------
    numerator, denominator
        Samples of the same interleaved rounds, in the same order. Rounds are resampled as pairs,
        so what slowed a whole round down cancels.
    """
    pair = np.array([numerator, denominator], dtype=float)
    rounds = pair.shape[1]
    picks = np.random.default_rng(seed).integers(rounds, size=(RESAMPLES, rounds))
    medians = np.median(pair[:, picks], axis=2)
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    value = np.median(pair[0]) / np.median(pair[1])
    return Ratio(float(value), float(low), float(high))


def geometric_mean(ratios: Sequence[Ratio]) -> Ratio:
    """Geometric mean of independent ratios, its interval from theirs (log-normal errors)."""
    logs = [math.log(ratio.value) for ratio in ratios]
    errors = [math.log(ratio.high / ratio.low) / (2 * NORMAL_95) for ratio in ratios]
    mean = sum(logs) / len(logs)
    half = NORMAL_95 * math.hypot(*errors) / len(errors)
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def relative_spread(summary: Summary) -> float:
    """Width between the outer deciles over the median: the noise of one measurement."""
    return (summary.p90 - summary.p10) / summary.median
