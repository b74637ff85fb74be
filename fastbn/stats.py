"""Batch statistics that can be kept, merged and passed to the backward pass."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from fastbn import _native
from fastbn.errors import ArgumentError, ArgumentTypeError, expected
from fastbn.masks import unmasked

if TYPE_CHECKING:
    import numpy.typing as npt

    from fastbn._types import FloatArray

__all__ = ["BatchStats", "merge_stats"]

# How the bytes of statistics begin: a name, the version of the format, a checksum; then count and channels.
MAGIC, VERSION = b"FBNSTATS", 1
HEAD, COUNTS = struct.Struct("<8sII"), struct.Struct("<QQ")


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
        self._set(count, mean, m2, "")

    def _set(self, count: int | np.integer, mean: npt.ArrayLike, m2: npt.ArrayLike, prefix: str) -> None:
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
            raise ArgumentTypeError(expected("an integer", type(count).__name__, f"{prefix}count"))
        if count < 0:
            raise ArgumentError(expected("an integer >= 0", f"{count}", f"{prefix}count"))
        self.count = int(count)
        self.mean = _values(mean, f"{prefix}mean")
        self.m2 = _values(m2, f"{prefix}m2")
        if self.mean.shape != self.m2.shape:
            raise ArgumentError(expected(f"shape {self.mean.shape}, that of mean", f"shape {self.m2.shape}", f"{prefix}m2"))

    @classmethod
    def _new(cls, count: int, channels: int) -> BatchStats:
        """Statistics that a kernel will fill in, without the checks of `__init__`."""
        return cls._of(count, *_native.new_moments(channels))

    @classmethod
    def _of(cls, count: int, mean: FloatArray, m2: FloatArray) -> BatchStats:
        """Statistics from float64 arrays, without the checks of `__init__`."""
        stats = object.__new__(cls)
        stats.count, stats.mean, stats.m2 = count, mean, m2
        return stats

    def _checked(self) -> BatchStats:
        """These statistics if they are what `__init__` makes, else new ones from the attributes that somebody has assigned, or an error."""
        if type(self.count) is int and self.count >= 0 and _native.are_moments(self.mean, self.m2):
            return self
        stats = object.__new__(BatchStats)
        stats._set(self.count, self.mean, self.m2, "stats.")
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
        """Return the statistics of both batches together (Chan, Golub & LeVeque 1979); `+` and `sum` do the same.

        In exact arithmetic the order of merges does not matter. In float64, with u = 2**-53, where no value has been through more than h
        merges, and all means lie within R of each other and within M of zero: a mean is off by at most ``h * u * (M + 4 * R)``, and m2,
        of n values with standard deviation s, by at most ``h * u * m2 * (8 + 4 * (M + 4 * R) / s)``, to first order. A chain over k
        parts has h = k, a tree the logarithm. One order gives one result to the last bit. Derived in docs/numerics.md: merging statistics.

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

    def __add__(self, other: object) -> BatchStats:
        if not isinstance(other, BatchStats):
            return NotImplemented
        return self.merge(other)

    def __radd__(self, other: object) -> BatchStats:
        """Let `sum` begin with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def to_bytes(self) -> bytes:
        """Return the statistics as bytes that any later version and any machine reads: `from_bytes` gives the same bits back.

        Version 1, all little-endian: ``b"FBNSTATS"``, the version as uint32, the CRC-32 of what follows as uint32, count and the number of
        channels as uint64, then the means and m2 as float64.

        Raises
        ------
        ArgumentError
            The count has more than 64 bits.

        Examples
        --------
        >>> BatchStats.from_bytes(BatchStats(4, [2.0], [8.0]).to_bytes())
        BatchStats(count=4, channels=1)
        """
        if self.count >= 1 << 64:
            raise ArgumentError(expected("a count below 2**64", f"{self.count}", "count"))
        body = COUNTS.pack(self.count, self.mean.size) + self.mean.astype("<f8").tobytes() + self.m2.astype("<f8").tobytes()
        return HEAD.pack(MAGIC, VERSION, zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> BatchStats:
        """Return the statistics that `to_bytes` has written.

        Raises
        ------
        ArgumentTypeError
            data are no bytes.
        ArgumentError
            They are not of `to_bytes`, of a later version, cut off or damaged.
        """
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise ArgumentTypeError(expected("bytes", type(data).__name__, "data"))
        data = bytes(data)
        least = HEAD.size + COUNTS.size
        if data[: len(MAGIC)] != MAGIC or len(data) < least:
            raise ArgumentError(expected("the bytes of a BatchStats", f"{len(data)} others", "data"))
        _, version, checksum = HEAD.unpack_from(data)
        if version != VERSION:
            raise ArgumentError(expected(f"version {VERSION} of the bytes of a BatchStats", f"version {version}", "data"))
        count, channels = COUNTS.unpack_from(data, HEAD.size)
        if len(data) != least + 16 * channels or zlib.crc32(data[HEAD.size :]) != checksum:
            raise ArgumentError(expected("the bytes of a BatchStats as they were written", "damaged ones", "data"))
        mean, m2 = np.frombuffer(data, "<f8", offset=least).reshape(2, channels)
        return cls(count, mean, m2)


def _values(value: npt.ArrayLike, where: str) -> FloatArray:
    value = np.asarray(unmasked(value, where))
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
