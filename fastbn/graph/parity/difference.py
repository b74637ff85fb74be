"""How far two outputs differ.

Arrays are read in blocks, so that comparing takes no memory beside the arrays themselves. The constants: docs/numerics.md, "Small channels"
and "Values that move by steps".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import numpy as np

if TYPE_CHECKING:
    from fastbn._types import Array, FloatArray

__all__ = ["WorstElement", "compare", "equal", "is_numeric", "max_abs", "max_change", "quantile_error", "small_channel"]

# Elements that are converted to float64 at a time.
BLOCK = 1 << 18

# A channel whose largest element is below this part of the output's largest is small, and its error counts above this part of its own size.
SMALL, VISIBLE = 1e-3, 1e-3

# Outputs of more elements are not searched for small channels; a channel of fewer elements may be small by chance.
LARGEST_SEARCHED, FEWEST_IN_CHANNEL = 1 << 22, 32

# The quantile of the errors of a channel that `quantile_error` takes.
QUANTILE = 0.75

# Indices of one channel of an output.
Place: TypeAlias = "tuple[slice | int, ...]"


@dataclass(frozen=True)
class WorstElement:
    """The element of an output with the largest error.

    Attributes
    ----------
    index : tuple of int
    values : tuple of float
        (before, after).
    error : float
        |after - before|; inf where only one of them is finite.
    magnitude : float
        The largest finite |before| of the whole output.
    """

    index: tuple[int, ...]
    values: tuple[float, float]
    error: float
    magnitude: float


def is_numeric(output: object) -> TypeGuard[Array]:
    """Say whether an output is an array of numbers, and no map, sequence or array of strings."""
    return isinstance(output, np.ndarray) and output.dtype.kind in "fiub"


def _blocks(*arrays: Array) -> Iterator[tuple[int, list[FloatArray]]]:
    """Yield (number of the first element, the same elements of each array in float64)."""
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, BLOCK):
        yield start, [part[start : start + BLOCK].astype(np.float64) for part in flat]


def _errors(before: FloatArray, after: FloatArray) -> FloatArray:
    """Return |after - before|; 0 for the same infinity and for NaN on both sides, inf where only one side is finite."""
    same = (before == after) | (np.isnan(before) & np.isnan(after))
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(same, 0.0, np.abs(after - before))
    return np.where(np.isnan(error), np.inf, error)


def compare(before: Array, after: Array) -> WorstElement:
    """Return the worst element of two arrays of one shape, which must not be empty."""
    worst, position = -1.0, 0
    for start, (one, other) in _blocks(before, after):
        error = _errors(one, other)
        place = int(np.argmax(error))
        if error[place] > worst:
            worst, position = float(error[place]), start + place
    index = tuple(int(i) for i in np.unravel_index(position, before.shape))
    return WorstElement(index, (float(before[index]), float(after[index])), worst, max_abs(before))


def max_abs(values: Array) -> float:
    """Return the largest finite magnitude, 0.0 where there is none."""
    result = 0.0
    for _, (block,) in _blocks(values):
        finite = np.abs(block[np.isfinite(block)])
        result = max(result, float(finite.max(initial=0.0)))
    return result


def max_change(before: Array, after: Array) -> float:
    """Return the largest |after - before| over the elements that are finite on both sides."""
    change = 0.0
    for _, (one, other) in _blocks(before, after):
        finite = np.isfinite(one) & np.isfinite(other)
        change = max(change, float(np.abs(other[finite] - one[finite]).max(initial=0.0)))
    return change


def quantile_error(before: Array, after: Array) -> float:
    """Return the largest QUANTILE of the errors of a channel, over the channels of every axis but the first."""
    error = _errors(before.astype(np.float64), after.astype(np.float64))
    axes = range(1, error.ndim) if error.ndim > 1 else range(0)
    quantiles = [
        np.quantile(np.moveaxis(error, axis, 0).reshape(error.shape[axis], -1), QUANTILE, axis=1, method="higher") for axis in axes
    ]
    return float(max((part.max(initial=0.0) for part in quantiles), default=np.max(error, initial=0.0)))


def equal(one: object, other: object) -> bool:
    """Say whether two outputs are equal element by element, NaN on both sides included; outputs that are no arrays count as equal."""
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray):
        return True
    return one.shape == other.shape and bool(np.array_equal(one, other, equal_nan=one.dtype.kind == "f"))


def small_channel(before: Array, after: Array) -> Place | None:
    """Return the place of the small channel with the largest error relative to its own size, along any axis but the first; None where no
    small channel has a visible error."""
    if not 1 < before.ndim <= before.size <= LARGEST_SEARCHED or before.dtype.kind != "f":
        return None
    size = np.abs(np.nan_to_num(before.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0))
    error = _errors(before.astype(np.float64), after.astype(np.float64))
    worst: float = VISIBLE
    place: Place | None = None
    for axis in range(1, before.ndim):
        if before.size < FEWEST_IN_CHANNEL * before.shape[axis]:
            continue
        others = tuple(other for other in range(before.ndim) if other != axis)
        sizes, errors = size.max(axis=others), error.max(axis=others)
        small = (sizes > 0) & (sizes < SMALL * sizes.max())
        parts = np.divide(errors, sizes, out=np.zeros_like(sizes), where=small)
        if parts.max(initial=0.0) > worst:
            worst = float(parts.max())
            place = (*(slice(None) for _ in range(axis)), int(parts.argmax()))
    return place
