"""What is allowed between two arrays, given how far rounding moves the first: docs/numerics.md, "The bound of an output"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastbn.graph.parity.difference import WorstElement, compare, quantile_error

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["MARGIN", "ModelsDiffer", "Verdict", "judged"]

# The bound is this many times the measured effect of the noise, plus this many units of roundoff of the largest value.
MARGIN, FLOOR = 4, 16

# A bound above this part of the largest value proves nothing.
CONCLUSIVE = 0.01


@dataclass(frozen=True)
class Verdict:
    """One array compared.

    Attributes
    ----------
    name : str
    worst : WorstElement
    bound : float
        The error that the noise explains.
    allowed : float
        The bound, or CONCLUSIVE times the largest value where the bound is larger.
    noise : float
        How far the noise moves the array; inf for an array of integers, which the noise moves by whole steps or not at all.
    """

    name: str
    worst: WorstElement
    bound: float
    allowed: float
    noise: float

    @property
    def part(self) -> float:
        """Return the error as a part of what is allowed."""
        if self.worst.error == 0:
            return 0.0
        return self.worst.error / self.allowed if self.allowed else math.inf

    @property
    def holds(self) -> bool:
        """Say whether the arrays are equal up to what is allowed."""
        return self.worst.error <= self.allowed

    @property
    def is_wrong(self) -> bool:
        """Say whether the noise does not explain the difference; where this and `holds` are both false, nothing is proven."""
        return self.worst.error > self.bound

    @property
    def may_be_rounding(self) -> bool:
        """Say whether the noise does not explain the difference and a larger noise would: it is so small that a bound above it proves
        something, or the values are zero."""
        return self.is_wrong and (self.worst.magnitude == 0 or self.worst.error <= CONCLUSIVE * self.worst.magnitude)

    @property
    def why_inconclusive(self) -> str:
        """Say why nothing is proven where neither `holds` nor `is_wrong`."""
        part = f"{self.bound / self.worst.magnitude:.1%} of the largest value" if self.worst.magnitude else "values that are all zero"
        return f"rounding alone may change {part}, which proves nothing"

    @property
    def proves(self) -> bool:
        """Say whether the arrays are equal and would show a difference: they are not zero, Inf or NaN everywhere, and not constant under
        any noise, as the output of a saturated Softmax is."""
        return self.holds and self.worst.magnitude > 0 and (self.noise > 0 or self.worst.error > 0)


def judged(name: str, before: Array, after: Array, noise: float, unit: float, noisy: Array | None = None) -> Verdict:
    """Compare two arrays of one shape, which must not be empty.

    Parameters
    ----------
    name : str
    before, after : numpy.ndarray
        What the original and the folded model give.
    noise : float
        How far rounding moves `before`.
    unit : float
        The unit of roundoff.
    noisy : numpy.ndarray, optional
        `before` with noise. Where a few elements move by a whole step (a rounding to integers), the quantiles of the errors of all channels
        are compared in the place of the largest error.
    """
    worst = compare(before, after)
    floor = FLOOR * unit * worst.magnitude
    bound = MARGIN * noise + floor
    allowed = min(bound, CONCLUSIVE * worst.magnitude)
    if noisy is not None and noisy.shape == before.shape and allowed < worst.error <= bound:
        quantile_bound = MARGIN * quantile_error(before, noisy) + floor
        if quantile_error(before, after) <= quantile_bound <= CONCLUSIVE * worst.magnitude:
            allowed = bound
    return Verdict(name, worst, bound, allowed, noise if before.dtype.kind == "f" else math.inf)


class ModelsDiffer(Exception):
    """A difference that no noise can explain, in a sentence, and the Verdict about it; None where no arrays could be compared."""

    def __init__(self, sentence: str, verdict: Verdict | None = None) -> None:
        super().__init__(sentence)
        self.verdict = verdict
