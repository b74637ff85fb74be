"""Constants of a graph: as the model holds them (Tensor), and as a fold leaves them (Scaled, Dense).

No values are computed before array() is called: weights may be gigabytes in a memory-mapped file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from fastbn.affine import WeightLayout, narrow, scale_weight
from fastbn.dtypes import LEAST_NORMAL
from fastbn.errors import ModelError, expected

if TYPE_CHECKING:
    from fastbn._types import Array, FloatArray

__all__ = ["BLOCK", "Constant", "DType", "Dense", "Scaled", "Tensor", "broadcast_scale", "float64_of", "float64_of_all", "held"]

# Elements handled at a time when a weight is streamed: two such blocks of float32 stay in a level-2 cache.
BLOCK = 1 << 17

DType: TypeAlias = np.dtype[np.generic]


class Constant(Protocol):
    """A constant input of a node: its dtype and shape, and its values when array() is called."""

    @property
    def dtype(self) -> DType:
        """Type of the elements."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        ...

    def array(self) -> Array:
        """Return the values in the constant's own type, C-contiguous."""
        ...

    def check(self) -> tuple[int, int]:
        """Return (nonfinite, flushed): how many elements a fold makes Inf or NaN, and how many weights it makes zero."""
        ...

    def bad_channels(self) -> list[int]:
        """Return the channels, in order, that hold an element which check() counts."""
        ...

    def magnitude(self) -> Array:
        """Return, per element, the absolute value that the rounding bound of a fold is computed from."""
        ...


@dataclass(frozen=True, eq=False)
class Tensor:
    """A constant of the model.

    Parameters
    ----------
    dtype : numpy.dtype
    shape : tuple of int
    read : callable
        Returns the values; those of an external file are mapped, not loaded.
    """

    dtype: DType
    shape: tuple[int, ...]
    read: Callable[[], Array] = field(repr=False)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def array(self) -> Array:
        """Return the values, C-contiguous; those of an external file are mapped, not loaded."""
        return self.read()

    def check(self) -> tuple[int, int]:
        """Return (0, 0): the values are those of the model."""
        return 0, 0

    def bad_channels(self) -> list[int]:
        """Return an empty list: the values are those of the model."""
        return []

    def magnitude(self) -> Array:
        """Return the values as they are: a plan moves integers (zero points) only, which are exact."""
        return self.array()


def held(array: Array) -> Tensor:
    """Return an array as a constant."""
    array = np.asarray(array, order="C")  # ascontiguousarray would make a scalar a vector
    return Tensor(array.dtype, array.shape, lambda: array)


@dataclass(frozen=True, eq=False)
class Scaled:
    """A weight times a per-channel scale, rounded once from float64 when it is evaluated.

    Parameters
    ----------
    base : Tensor
        The weight as it was.
    layout : WeightLayout
    scale : float64 array of layout.groups * layout.channels values
    """

    base: Tensor
    layout: WeightLayout
    scale: FloatArray

    @property
    def dtype(self) -> DType:
        """Type of the elements."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.base.shape

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.base.size

    def times(self, layout: WeightLayout, scale: FloatArray) -> Scaled | Dense:
        """Return this weight with one more scale: Scaled on the same axis, Dense (in float64, which takes memory) on another."""
        if layout == self.layout:
            return replace(self, scale=self.scale * scale)
        return Dense.of(self).times(broadcast_scale(layout, scale, self.shape))

    def check(self) -> tuple[int, int]:
        """Return (nonfinite, flushed): how many elements become Inf or NaN, and how many become zero, in the weight's type."""
        return scale_weight(self.base.array(), self.scale, self.layout, store=False)[1:]

    def bad_channels(self) -> list[int]:
        """Return the sorted channels that hold an element which check() counts."""
        bad: set[int] = set()
        for (group, channels), _, block in self._blocks():
            layout = WeightLayout(1, block.shape[0], block.shape[1], block.shape[2])
            scale = self.scale.reshape(self.layout.groups, -1)[group, channels]
            product = scale_weight(np.ascontiguousarray(block), scale, layout)[0]
            with np.errstate(invalid="ignore"):
                flushed = (product == 0) & (block != 0) & (scale[:, None] != 0)
            is_bad = (~np.isfinite(product.astype(np.float32)) | flushed).any(axis=(0, 2))
            bad.update((group * self.layout.channels + channels.start + np.flatnonzero(is_bad)).tolist())
        return sorted(bad)

    def array(self) -> Array:
        """Return the folded weight as a new array."""
        return scale_weight(self.base.array(), self.scale, self.layout)[0]

    def pieces(self) -> Iterator[tuple[int, Array]]:
        """Yield (first element, array) pieces of the folded weight, in order and small enough for a cache."""
        for (group, channels), start, block in self._blocks():
            layout = WeightLayout(1, block.shape[0], block.shape[1], block.shape[2])
            scale = self.scale.reshape(self.layout.groups, -1)[group, channels]
            yield start, scale_weight(block, scale, layout)[0]

    def _blocks(self) -> Iterator[tuple[tuple[int, slice], int, Array]]:
        """Yield ((group, slice of channels), first element, contiguous block of shape (rows, channels, inner))."""
        groups, rows, channels, inner = self.layout
        weight = self.base.array().reshape(self.layout)
        per_row = channels * inner
        for group in range(groups):
            if per_row <= BLOCK:
                step = max(1, BLOCK // max(per_row, 1))
                for row in range(0, rows, step):
                    yield (group, slice(0, channels)), (group * rows + row) * per_row, weight[group, row : row + step]
                continue
            step = max(1, BLOCK // inner)
            for row in range(rows):
                for channel in range(0, channels, step):
                    start = (group * rows + row) * per_row + channel * inner
                    block = slice(channel, min(channel + step, channels))
                    yield (group, block), start, weight[group, row : row + 1, block]

    def magnitude(self) -> Array:
        """Return |folded weight|, no smaller than the least normal number: rounding is relative only above it."""
        values = self.array()
        np.abs(values, out=values)
        np.maximum(values, np.array(LEAST_NORMAL[values.dtype.name], values.dtype), out=values)
        return values


def float64_of(constant: Constant) -> FloatArray:
    """Return the values of any constant in float64, not rounded."""
    return float64_of_all([constant])[0]


def float64_of_all(constants: Sequence[Constant]) -> list[FloatArray]:
    """Return the values of each constant in float64, not rounded."""
    with np.errstate(invalid="ignore"):  # widening a signaling NaN sets the invalid flag
        return [_widened(constant) for constant in constants]


def _widened(constant: Constant) -> FloatArray:
    if isinstance(constant, Dense):
        return constant.values
    return Dense.of(constant).values if isinstance(constant, Scaled) else constant.array().astype(np.float64)


def broadcast_scale(layout: WeightLayout, scale: FloatArray, shape: Sequence[int]) -> FloatArray:
    """Return a scale per (group, channel) of a layout, float64, as an array of a weight's shape."""
    return np.broadcast_to(np.reshape(scale, (layout.groups, 1, layout.channels, 1)), layout).reshape(shape)


@dataclass(frozen=True, eq=False)
class Dense:
    """A constant held in float64, rounded once to its own type when array() is called.

    Parameters
    ----------
    dtype : numpy.dtype
        The type that it is rounded to.
    values : float64 array
    abs_terms : float64 array, of the shape of values
        For each value, the sum of the absolute values of the terms that it was summed from: its rounding error is relative to that.
    """

    dtype: DType
    values: FloatArray
    abs_terms: FloatArray

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.values.shape

    @classmethod
    def of(cls, constant: Constant) -> Dense:
        """Return any constant in float64, not rounded."""
        if isinstance(constant, Dense):
            return constant
        if isinstance(constant, Scaled):
            base = cls.of(constant.base)
            return base.times(broadcast_scale(constant.layout, constant.scale, constant.shape))
        values = float64_of(constant)
        return cls(constant.dtype, values, np.abs(values))

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: DType) -> Dense:
        """Return the constant that an absent bias stands for."""
        return cls(dtype, np.zeros(shape), np.zeros(shape))

    def affine(self, scale: FloatArray | float, shift: FloatArray | float, abs_terms: FloatArray | float) -> Dense:
        """Return scale * self + shift, broadcast; abs_terms are those of shift.

        Raises
        ------
        ModelError
            The shapes do not broadcast.
        """
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # check() reports it
                return Dense(self.dtype, self.values * scale + shift, self.abs_terms * np.abs(scale) + abs_terms)
        except ValueError as error:
            shapes = f"{self.shape} and {np.shape(scale)}"
            raise ModelError(expected("a constant that broadcasts with what it meets", shapes, "a constant")) from error

    def times(self, factor: FloatArray | float) -> Dense:
        """Return factor * self, broadcast; raises ModelError where the shapes do not allow it."""
        return self.affine(factor, 0.0, 0.0)

    def check(self) -> tuple[int, int]:
        """Return (nonfinite, 0); a sum may round to zero, so only infinities and NaN count."""
        values = self.array()
        finite = np.isfinite(values if values.dtype.kind == "f" else values.astype(np.float64))
        return finite.size - int(np.count_nonzero(finite)), 0

    def bad_channels(self) -> list[int]:
        """Return the flat indices of the elements that check() counts."""
        return np.flatnonzero(~np.isfinite(self.array().astype(np.float64))).tolist()

    def array(self) -> Array:
        """Return the rounded values."""
        return narrow(self.values, self.dtype)

    def magnitude(self) -> Array:
        """Return abs_terms, or the absolute values where these are larger, in the constant's type."""
        return narrow(np.maximum(self.abs_terms, np.abs(self.values)), self.dtype)
