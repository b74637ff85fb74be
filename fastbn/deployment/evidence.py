"""What one stage of a deployment has over another: latency and memory with their intervals, size as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict

import numpy as np

from fastbn.graph.intervals import MARGIN, Difference, Ratio
from fastbn.graph.report import size_texts

if TYPE_CHECKING:
    from fastbn.graph.timing import Timings

__all__ = ["Comparison", "ComparisonFields", "Goal", "between", "comparisons"]

# What is compared, and what a user may want to be better.
Goal: TypeAlias = Literal["latency", "size", "memory"]

# A difference in bytes below this part is no reason by itself.
SIZE_MARGIN = 0.01

# Megabytes below which the memory of a process is not known.
PAGE = 4096 / 1e6


class ComparisonFields(TypedDict):
    """A Comparison as JSON holds it."""

    stage: str
    against: str
    measure: Goal
    threads: int | None
    ratio: float
    low: float | None
    high: float | None
    difference: Difference


@dataclass(frozen=True)
class Comparison:
    """One measure of a stage beside that of another.

    Attributes
    ----------
    stage, against : str
        Names of the stages.
    measure : str
        "latency", "size" (on disk) or "memory" (when loaded).
    ratio : Ratio
        How many times as much the stage takes; the interval is that of paired runs for latency, for memory the extremes.
    threads : int or None
        Of latency.
    values : (float, float)
        What both take: milliseconds, bytes or megabytes.
    """

    stage: str
    against: str
    measure: Goal
    ratio: Ratio
    threads: int | None = None
    values: tuple[float, float] = (0.0, 0.0)

    @property
    def difference(self) -> Difference:
        """Which one takes less, where that can be said and matters."""
        return self.ratio.difference(SIZE_MARGIN if self.measure == "size" else MARGIN)

    @property
    def is_less(self) -> bool:
        """Whether the stage takes less, however little less a size is: that is known exactly."""
        return self.ratio.difference(0) == "less" if self.measure == "size" else self.difference == "less"

    @property
    def is_more(self) -> bool:
        """Whether the stage takes more, however little more a size is."""
        return self.ratio.difference(0) == "more" if self.measure == "size" else self.difference == "more"

    def to_dict(self) -> ComparisonFields:
        """Return the fields as JSON holds them."""
        ratio = self.ratio
        return {
            "stage": self.stage,
            "against": self.against,
            "measure": self.measure,
            "threads": self.threads,
            "ratio": ratio.ratio,
            "low": ratio.low,
            "high": ratio.high,
            "difference": self.difference,
        }

    def __str__(self) -> str:
        """Return what the stage is beside the other, as a sentence goes on: faster, smaller."""
        if self.measure == "latency":
            where = f"on {self.threads} thread{'s' if self.threads != 1 else ''}"
            word = {"less": "faster", "more": "slower", "none": "as fast"}.get(self.difference, "not known to be faster")
            return f"{word} {where} ({self._interval()})"
        if self.measure == "size":
            if not self.is_less and not self.is_more:
                return "as large on disk"
            sizes = size_texts([int(value) for value in self.values])
            part = abs(1 - self.ratio.ratio)
            much = (
                f"{part:.0%}" if part >= 0.1 else f"{part:.1%}" if part >= 0.001 else f"{abs(int(self.values[0] - self.values[1]))} bytes"
            )
            return f"{much} {'smaller' if self.is_less else 'larger'} on disk ({sizes[0]}, not {sizes[1]})"
        if self.difference not in ("less", "more"):
            return "as large in memory" if self.difference == "none" else f"not known to be smaller in memory ({self.ratio.doubt})"
        sizes = size_texts([round(1e6 * value) for value in self.values])
        return f"{'smaller' if self.difference == 'less' else 'larger'} in memory ({sizes[0]}, not {sizes[1]})"

    def _interval(self) -> str:
        """Return the ratio and the ends of its interval, with as many digits as tell them apart from nothing, and what is in doubt."""
        ends = [end for end in (self.ratio.low, self.ratio.high) if end is not None]
        digits = 3 if ends and min(ends) < 0.1 else 2
        text = f"{self.ratio.ratio:.{digits}f} of its time" + (f", {ends[0]:.{digits}f} to {ends[1]:.{digits}f}" if len(ends) == 2 else "")
        return f"{text}: {self.ratio.doubt}" if self.difference == "unknown" else text


def comparisons(timings: Sequence[Timings], sizes: Mapping[str, int], memory: Mapping[str, Sequence[float]]) -> tuple[Comparison, ...]:
    """Return the Comparisons of every pair of stages, the later one beside the earlier.

    Parameters
    ----------
    timings : list of Timings
        One for each number of threads.
    sizes : dict of name -> bytes
    memory : dict of name -> list of megabytes
        Measurements; none where the system does not say.
    """
    return tuple(found for against, stage in combinations(sizes, 2) for found in _of_pair(stage, against, timings, sizes, memory))


def _of_pair(
    stage: str, against: str, timings: Sequence[Timings], sizes: Mapping[str, int], memory: Mapping[str, Sequence[float]]
) -> Iterator[Comparison]:
    for each in timings:
        if stage in each.names and against in each.names:
            values = (float(np.median(each.runs(stage))), float(np.median(each.runs(against))))
            yield Comparison(stage, against, "latency", each.ratio(stage, against), each.threads, values)
    if sizes[against]:
        ratio = sizes[stage] / sizes[against]
        yield Comparison(stage, against, "size", Ratio(ratio, ratio, ratio), None, (sizes[stage], sizes[against]))
    if memory.get(stage) and memory.get(against):
        here, there = ([max(PAGE, value) for value in memory[name]] for name in (stage, against))
        middle = (float(np.median(here)), float(np.median(there)))
        yield Comparison(
            stage, against, "memory", Ratio(middle[0] / middle[1], min(here) / max(there), max(here) / min(there)), None, middle
        )


def between(found: Sequence[Comparison], stage: str, against: str) -> list[Comparison]:
    """Return the Comparisons of a stage beside another."""
    return [each for each in found if (each.stage, each.against) == (stage, against)]
