"""Batch statistics that can be kept, merged and passed to the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from fastbn import _native
from fastbn.errors import ArgumentError, ArgumentTypeError, expected

if TYPE_CHECKING:
    import numpy.typing as npt

    from fastbn._types import FloatArray

__all__ = ["BatchStats", "merge_stats"]


class BatchStats:
    """How many values each channel had, their mean, and the sum of their squared distances to it.

    Parameters
    ----------
    count : int
        Values per channel, n = N * S.
    mean, m2 : array of shape (C,)
        Held as float64; m2 is ``sum((x - mean)**2)``.

    For the backward pass with frozen statistics, pass ``BatchStats(1, running_mean, running_var)``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A count that is not an integer >= 0, or mean and m2 that are not two floating arrays of one shape (C,).

    Examples
    --------
    >>> import numpy as np
    >>> stats = BatchStats(4, np.array([2.0]), np.array([8.0]))
    >>> stats.var.tolist()
    [2.0]
    """

    __slots__ = ("count", "m2", "mean")
    count: int
    mean: FloatArray
    m2: FloatArray

    def __init__(self, count: int | np.integer, mean: npt.ArrayLike, m2: npt.ArrayLike) -> None:
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
            raise ArgumentTypeError(expected("an integer", type(count).__name__, "count"))
        if count < 0:
            raise ArgumentError(expected("an integer >= 0", f"{count}", "count"))
        self.count = int(count)
        self.mean = _values(mean, "mean")
        self.m2 = _values(m2, "m2")
        if self.mean.shape != self.m2.shape:
            raise ArgumentError(expected(f"shape {self.mean.shape}, that of mean", f"shape {self.m2.shape}", "m2"))

    @classmethod
    def _new(cls, count: int, channels: int) -> BatchStats:
        """Statistics that a kernel will fill in, without the checks of `__init__`."""
        stats = object.__new__(cls)
        stats.count = count
        stats.mean, stats.m2 = _native.new_moments(channels)
        return stats

    def __repr__(self) -> str:
        return f"BatchStats(count={self.count}, channels={self.mean.size})"

    @property
    def var(self) -> FloatArray:
        """The biased variance, m2 / count, of shape (C,); zeros where there are no values.

        Examples
        --------
        >>> BatchStats(4, [0.0], [8.0]).var.tolist()
        [2.0]
        """
        return self.m2 / max(self.count, 1)

    def merge(self, other: BatchStats) -> BatchStats:
        """Return the statistics of both batches together (Chan, Golub & LeVeque 1979).

        Examples
        --------
        >>> import numpy as np
        >>> BatchStats(1, np.array([2.0]), np.array([0.0])).merge(BatchStats(1, np.array([4.0]), np.array([0.0]))).var.tolist()
        [1.0]
        """
        if not isinstance(other, BatchStats):
            raise ArgumentTypeError(expected("a BatchStats", type(other).__name__, "other"))
        if other.mean.shape != self.mean.shape:
            raise ArgumentError(expected(f"{self.mean.size} channels", f"{other.mean.size}", "other"))
        if not (self.count and other.count):
            return self if self.count else other
        count = self.count + other.count
        with np.errstate(invalid="ignore", over="ignore"):
            delta = other.mean - self.mean
            mean = self.mean + delta * (other.count / count)
            m2 = self.m2 + other.m2 + delta * delta * (self.count / count * other.count)
        return BatchStats(count, mean, m2)


def _values(value: npt.ArrayLike, where: str) -> FloatArray:
    value = np.asarray(value)
    if value.dtype.kind != "f" or value.ndim != 1:
        raise ArgumentTypeError(expected("a floating array of shape (C,)", f"{value.dtype} of shape {value.shape}", where))
    return np.require(value, dtype=np.float64, requirements=["C", "A"])


def merge_stats(stats: Iterable[BatchStats]) -> BatchStats:
    """Merge the statistics of several batches, threads or processes, in the order given.

    Parameters
    ----------
    stats : iterable of BatchStats
        At least one, all of the same number of channels.

    Returns
    -------
    BatchStats
        As if one call had seen all values; the same bits for the same order.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        No statistics, another type among them, or different numbers of channels.

    Examples
    --------
    >>> import numpy as np
    >>> merged = merge_stats([BatchStats(2, np.array([1.0]), np.array([0.0])), BatchStats(2, np.array([3.0]), np.array([0.0]))])
    >>> merged.count, merged.mean.tolist(), merged.var.tolist()
    (4, [2.0], [1.0])
    """
    merged: BatchStats | None = None
    for item in stats:
        if merged is None and not isinstance(item, BatchStats):
            raise ArgumentTypeError(expected("BatchStats", type(item).__name__, "stats"))
        merged = item if merged is None else merged.merge(item)
    if merged is None:
        raise ArgumentError(expected("at least one BatchStats", "none", "stats"))
    return merged
