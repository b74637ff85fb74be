"""How far two outputs are apart, and how far rounding moves one.

Arrays are read in blocks, so that comparing costs no memory beside the arrays themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Worst", "bulk", "compare", "largest", "moved", "same_bits", "small_channel"]

# Elements that are widened to float64 at a time.
BLOCK = 1 << 18

# A channel is small beside the largest of its output below this part, and looked at for an error of more than this part of its own size.
SMALL, SEEN = 1e-3, 1e-3

# Outputs of more elements are not looked through for small channels; a channel has at least so many, as a single one is small by chance.
LARGEST_SEARCHED, FEWEST_IN_CHANNEL = 1 << 22, 32

# The part of the elements of every channel that a bulk bound speaks of: a few may meet a step (a rounding to integers, a sign).
BULK = 0.75


@dataclass(frozen=True)
class Worst:
    """The element of an output with the largest error; values are (before, after), size is the largest |before|."""

    index: tuple[int, ...]
    values: tuple[float, float]
    error: float
    size: float


def _blocks(*arrays: NDArray) -> Iterator[tuple[int, list[NDArray]]]:
    """Yield (first element, the same elements of each array in float64)."""
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, BLOCK):
        yield start, [part[start : start + BLOCK].astype(np.float64) for part in flat]


def _errors(before: NDArray, after: NDArray) -> NDArray:
    """Return |after - before|; 0 for the same infinity and for NaN on both sides, inf where only one side is finite."""
    same = (before == after) | (np.isnan(before) & np.isnan(after))
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(same, 0.0, np.abs(after - before))
    return np.where(np.isnan(error), np.inf, error)


def compare(before: NDArray, after: NDArray) -> Worst:
    """Return the worst element of two arrays of one shape, which must not be empty."""
    worst, at = -1.0, 0
    for start, (one, other) in _blocks(before, after):
        error = _errors(one, other)
        place = int(np.argmax(error))
        if error[place] > worst:
            worst, at = float(error[place]), start + place
    index = tuple(int(i) for i in np.unravel_index(at, before.shape))
    return Worst(index, (float(before[index]), float(after[index])), worst, largest(before))


def largest(values: NDArray) -> float:
    """Return the largest finite magnitude, 0.0 where there is none."""
    size = 0.0
    for _, (block,) in _blocks(values):
        finite = np.abs(block[np.isfinite(block)])
        size = max(size, float(finite.max(initial=0.0)))
    return size


def moved(before: NDArray, disturbed: NDArray) -> float:
    """Return how far the elements that are finite on both sides have moved at most."""
    change = 0.0
    for _, (one, other) in _blocks(before, disturbed):
        finite = np.isfinite(one) & np.isfinite(other)
        change = max(change, float(np.abs(other[finite] - one[finite]).max(initial=0.0)))
    return change


def bulk(before: NDArray, after: NDArray) -> float:
    """Return the largest error that BULK of the elements of every channel stay below, whichever axis holds the channels."""
    error = _errors(before.astype(np.float64), after.astype(np.float64))
    axes = range(1, error.ndim) if error.ndim > 1 else range(0)
    quantiles = [np.quantile(np.moveaxis(error, axis, 0).reshape(error.shape[axis], -1), BULK, axis=1, method="higher") for axis in axes]
    return float(max((part.max(initial=0.0) for part in quantiles), default=np.max(error, initial=0.0)))


def same_bits(one: object, other: object) -> bool:
    """Say whether two outputs are equal element by element, NaN on both sides included; what is no array always is."""
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray):
        return True
    return one.shape == other.shape and bool(np.array_equal(one, other, equal_nan=one.dtype.kind == "f"))


def small_channel(before: NDArray, after: NDArray) -> tuple[slice | int, ...] | None:
    """Return the place of the channel, along any axis but the first, that is small beside the others and has the largest error beside its
    own size; None where none is off."""
    if not 1 < before.ndim <= before.size <= LARGEST_SEARCHED or before.dtype.kind != "f":
        return None
    size = np.abs(np.nan_to_num(before.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0))
    error = _errors(before.astype(np.float64), after.astype(np.float64))
    worst, place = SEEN, None
    for axis in range(1, before.ndim):
        if before.size < FEWEST_IN_CHANNEL * before.shape[axis]:
            continue
        others = tuple(at for at in range(before.ndim) if at != axis)
        sizes, errors = size.max(axis=others), error.max(axis=others)
        small = (sizes > 0) & (sizes < SMALL * sizes.max())
        parts = np.divide(errors, sizes, out=np.zeros_like(sizes), where=small)
        if parts.max(initial=0.0) > worst:
            worst = float(parts.max())
            place = (*[slice(None)] * axis, int(parts.argmax()))
    return place
