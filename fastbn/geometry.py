"""Where the elements of the arrays of one call lie, as the kernels need it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn import _check, _native

if TYPE_CHECKING:
    from typing import TypeVarTuple

    from fastbn._types import Array, Sizes

    ArraysT = TypeVarTuple("ArraysT")

__all__ = ["arrange", "deliver", "values_per_channel"]


def arrange(axis: int, *arrays: *ArraysT) -> tuple[Sizes, tuple[*ArraysT]]:
    """Return the view of the kernels and the arrays it is of: those given, or C-contiguous copies where they have no common view."""
    view = _native.dense_view(axis, arrays)
    if view is not None:
        return view, arrays
    given: tuple[Any, ...] = arrays  # arrays and None, which a checker cannot be told of ArraysT
    x = given[0]
    view = _check.layout(x.shape, axis, x.itemsize, *(array.strides for array in given if array is not None))
    if view is not None:
        return view, arrays
    copies: tuple[*ArraysT] = tuple(array if array is None else array.copy(order="C") for array in given)  # type: ignore[assignment]
    return arrange(axis, *copies)


def deliver(out: Array | None, result: Array, computed: Array) -> Array:
    """Return what the caller gave as out, or the result, after moving into it what was computed in a copy."""
    if computed is not result:
        np.copyto(result, computed)
    return result if out is None else out


def values_per_channel(x: Array, channels: int) -> int:
    """Return n, the count of one channel."""
    return x.size // channels if channels else 0
