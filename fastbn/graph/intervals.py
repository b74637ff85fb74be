"""How sure a ratio is: 99 % intervals of paired measurements, and the word that such an interval allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONFIDENCE", "FEWEST_PAIRS", "MARGIN", "Difference", "Ratio", "bootstrap", "paired_ratio"]

Difference: TypeAlias = Literal["less", "more", "none", "unknown"]

CONFIDENCE = 0.99

# Pairs below which nothing can be said: seven that all go one way would do so by chance in 1.6 % of cases, eight in 0.8 %.
FEWEST_PAIRS = 8

# Sessions of one file differ by up to 1 % for as long as they live: their weights and buffers lie elsewhere in memory.
MARGIN = 0.02

# Half the width of an interval, as a part of the ratio, above which it hides differences that matter.
NOISY = 0.05

RESAMPLES = 4000


@dataclass(frozen=True)
class Ratio:
    """How many times another measurement a measurement is, and the ends of its 99 % interval, None where there are too few pairs."""

    ratio: float
    low: float | None = None
    high: float | None = None

    def difference(self, margin: float = MARGIN) -> Difference:
        """Return "less" or "more" where the whole interval is that by more than `margin`, else "none"; "unknown" without an interval, and
        where one of both sides of 1 is so wide that it says nothing."""
        if self.low is None or self.high is None:
            return "unknown"
        if self.high < 1 - margin:
            return "less"
        return "more" if self.low > 1 + margin else "none" if self.width <= NOISY else "unknown"

    @property
    def width(self) -> float:
        """Half the length of the interval as a part of the ratio, Inf where there is none."""
        return math.inf if self.low is None or self.high is None else (self.high - self.low) / (2 * self.ratio)

    @property
    def doubt(self) -> str:
        """Why a difference is "unknown"."""
        return "too few runs to tell" if self.low is None else "too noisy to tell"

    def __str__(self) -> str:
        return f"{self.ratio:.2f}" + ("" if self.low is None or self.high is None else f" ({self.low:.2f} to {self.high:.2f})")


def paired_ratio(rounds: Sequence[NDArray[np.float64]], seed: int) -> Ratio:
    """Return the Ratio of paired measurements.

    Parameters
    ----------
    rounds : list of array [pairs]
        Logarithms of the ratios of pairs; those of one round are alike for reasons that a further run would not share (the same session,
        the same second), so rounds are what is drawn again.
    seed : int
        Of the bootstrap.

    Returns
    -------
    Ratio
        The mean over rounds of the mean of the middle half of each, and its bootstrap interval.
    """
    means = np.array([middle_mean(each) for each in rounds])
    low, high = bootstrap(means, seed) if len(means) >= FEWEST_PAIRS else (None, None)
    return Ratio(math.exp(means.mean()), *(None if end is None else math.exp(end) for end in (low, high)))


def middle_mean(values: NDArray[np.float64]) -> float:
    """Return the mean of the middle half of some values, which a few disturbed ones do not move."""
    cut = len(values) // 4
    return float(np.sort(values)[cut : len(values) - cut].mean())


def bootstrap(values: NDArray[np.float64], seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the ends of the 99 % interval of the mean of independent values.

    The percentile interval is too narrow where values are few (T. Hesterberg, What Teachers Should Know about the Bootstrap, 2015, section
    5): both ends are moved out by the factor that makes Student's interval of it where the values are normal.
    """
    count = len(values)
    drawn = np.random.default_rng(seed).integers(0, count, (resamples, count))
    means = values[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    wider = math.sqrt(count / (count - 1)) * _student(z, count - 1) / z
    middle = float(values.mean())
    return middle + wider * (float(low) - middle), middle + wider * (float(high) - middle)


def _student(z: float, freedom: int) -> float:
    """Return the quantile of Student's t where z is the normal one (Abramowitz and Stegun, 26.7.5)."""
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
