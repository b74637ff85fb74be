"""Where the elements of the tensors of one call lie, as the kernels need it: the one translation of shapes and strides into (N, C, S)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastbn import _native

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeVarTuple

    from fastbn._types import Array, Sizes

    ArraysT = TypeVarTuple("ArraysT")

__all__ = ["Layout", "arrange", "common_layout", "copy_together", "deliver", "find_layout", "parts", "values_per_channel"]

# Elements of a part. docs/numerics.md: caches.
_PART = 1 << 16


class Layout(NamedTuple):
    """Tensors of one shape and one channel axis seen as (N, C, S), each with the strides that it has along three of its axes.

    An axis of -1 stands for the stride of C-contiguous memory: C * S along N, S along C and 1 along S; with `channels_last` it is 1 along
    C. A plain tuple (N, C, S) is the layout of C-contiguous tensors.
    """

    N: int
    C: int
    S: int
    channels_last: bool = False
    n_axis: int = -1
    c_axis: int = -1
    s_axis: int = -1


def arrange(axis: int, *arrays: *ArraysT) -> tuple[Sizes | Layout, tuple[*ArraysT]]:
    """Return the layout of the arrays of one call, and these arrays, or copies where they have no layout in common."""
    layout = common_layout(axis, arrays)
    return (layout, arrays) if layout is not None else copy_together(axis, *arrays)


def common_layout(axis: int, arrays: tuple[Any, ...]) -> Sizes | Layout | None:
    """Return the layout of arrays, and None, of one call, or None where they have none in common."""
    sizes: Sizes | None = _native.dense_layout(axis, arrays)
    if sizes is not None:
        return sizes
    x = arrays[0]
    return find_layout(x.shape, axis, x.itemsize, *[array.strides for array in arrays if array is not None])


def copy_together(axis: int, *arrays: *ArraysT) -> tuple[Sizes | Layout, tuple[*ArraysT]]:
    """Return the layout of C-contiguous arrays, and arrays of which those that are not C-contiguous are copied."""
    given: tuple[Any, ...] = arrays  # arrays and None, which a checker cannot be told of ArraysT
    copies: Any = tuple(array if array is None or array.flags.c_contiguous else array.copy(order="C") for array in given)
    layout = common_layout(axis, copies)
    assert layout is not None  # C-contiguous arrays always have one
    return layout, copies


def parts(axis: int, x: Array, y: Array, added: Array | None) -> Iterator[tuple[Array, Array, Array | None]]:
    """Yield views of the arrays of an elementwise call whose copies stay in a cache: some indexes of the axes along which x has its largest
    strides; the channels stay together."""
    along = max((i for i, size in enumerate(x.shape) if i != axis and size > 1), key=lambda i: abs(x.strides[i]), default=None)
    if along is None or x.size <= _PART:
        yield x, y, added
        return
    step = max(1, _PART * x.shape[along] // x.size)
    for start in range(0, x.shape[along], step):
        index = (slice(None),) * along + (slice(start, start + step),)
        yield from parts(axis, x[index], y[index], None if added is None else added[index])


@lru_cache(maxsize=1024)
def find_layout(shape: tuple[int, ...], axis: int, itemsize: int, *strides: tuple[int, ...]) -> Layout | None:
    """Return the layout of tensors of one shape; None when they have none in common.

    `strides` are those of each tensor, in units of which an element has `itemsize`. The axes beside the channel axis are taken in the order
    in which they lie in the first tensor's memory and joined where that works for every tensor. At most two may remain, and either the last
    of them or the channel axis must have stride 1 in every tensor.
    """
    channels = shape[axis]
    if 0 in shape:
        return Layout(0, channels, 1)
    groups: list[tuple[int, int]] = []  # the size of joined axes, and the innermost of them, whose stride they have
    for inner in sorted((i for i, size in enumerate(shape) if i != axis and size > 1), key=lambda i: -abs(strides[0][i])):
        size = shape[inner]
        if groups and all(steps[groups[-1][1]] == steps[inner] * size for steps in strides):
            groups[-1] = (groups[-1][0] * size, inner)
        else:
            groups.append((size, inner))
    if len(groups) > 2:
        return None
    if groups and all(steps[groups[-1][1]] == itemsize for steps in strides):
        S, _ = groups.pop()
        N, n_axis = groups[0] if groups else (1, -1)
        return Layout(N, channels, S, n_axis=n_axis, c_axis=-1 if channels == 1 else axis)
    if channels == 1 or all(steps[axis] == itemsize for steps in strides):
        N, n_axis = groups[0] if groups else (1, -1)
        S, s_axis = groups[1] if len(groups) == 2 else (1, -1)
        return Layout(N, channels, S, True, n_axis, -1, s_axis)
    return None


def deliver(out: Array | None, result: Array, computed: Array) -> Array:
    """Return what the caller gave as out, or the result, after moving into it what was computed in a copy."""
    if computed is not result:
        np.copyto(result, computed)
    return result if out is None else out


def values_per_channel(x: Array, channels: int) -> int:
    """Return n, the count of one channel."""
    return x.size // channels if channels else 0
