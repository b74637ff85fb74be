"""Constants of a graph: as the model holds them (Tensor, Dequantised), as a fold leaves them (Scaled, Dense, Requantised), and the affine
that travels (Affine).

Nothing here is evaluated before it is asked for: weights may be gigabytes in a memory-mapped file.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

from fastbn.affine import WeightLayout, narrow, scale_weight
from fastbn.errors import ModelError, expected

__all__ = ["BLOCK", "Dense", "Dequantised", "Requantised", "Scaled", "Tensor", "broadcast_scale", "float64_of"]

# Elements handled at a time when a weight is streamed: two such blocks of float32 stay in a level-2 cache.
BLOCK = 1 << 17


@dataclass(frozen=True, eq=False)
class Tensor:
    """A constant of the model: its shape and dtype now, its values when array() is called."""

    dtype: np.dtype
    shape: tuple
    read: object = field(repr=False)

    @property
    def size(self):
        return math.prod(self.shape)

    def array(self):
        """Return the values, C-contiguous; those of an external file are mapped, not loaded."""
        return self.read()

    def check(self):
        """Return (nonfinite, flushed) as a fold's constants do: what is only moved loses nothing."""
        return 0, 0

    def magnitude(self):
        """Return the values as they are: integers, which bound nothing."""
        return self.array()


@dataclass(frozen=True, eq=False)
class Dequantised(Tensor):
    """A weight behind a DequantizeLinear: (quantised - zero_point) * scale, along an axis or, without one, for the whole tensor."""

    node: object
    axis: int | None
    scale: "Dense"
    zero_point: Tensor | None

    def times(self, layout, factor):
        """Return the Requantised with one more scale, or None where that is not one positive number per step of the axis."""
        full = broadcast_scale(layout, factor, self.shape)
        axes = range(len(self.shape)) if self.axis is None else [self.axis]
        for axis in axes:
            first = tuple(slice(None) if at == axis else slice(0, 1) for at in range(len(self.shape)))
            if (full == full[first]).all() and (full > 0).all():
                return self._along(axis, full[first].reshape(-1))
        return None

    def _along(self, axis, factor):
        zero = self.zero_point
        if zero is not None and zero.size == 1:
            values = np.broadcast_to(zero.array().reshape(-1), factor.shape).copy()
            zero = Tensor(zero.dtype, values.shape, lambda: values)
        return Requantised(self.node, axis, Dense(self.scale.dtype, self.scale.values * factor, self.scale.abs_terms * factor), zero)


@dataclass(frozen=True, eq=False)
class Requantised:
    """What becomes of a DequantizeLinear whose weight is scaled: its scale, its zero point, and the axis that both run along."""

    node: object
    axis: int
    scale: "Dense"
    zero_point: Tensor | None

    def constants(self):
        """Return (node, slot) -> constant."""
        found = {(self.node, 1): self.scale}
        return found if self.zero_point is None else {**found, (self.node, 2): self.zero_point}


@dataclass(frozen=True, eq=False)
class Scaled:
    """A weight times a per-channel scale, rounded once from float64 when it is evaluated."""

    base: Tensor
    layout: WeightLayout
    scale: np.ndarray

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def shape(self):
        return self.base.shape

    def times(self, layout, scale):
        """Return this weight with one more scale, on the same axis or, at the price of holding it in float64, on another."""
        if layout == self.layout:
            return replace(self, scale=self.scale * scale)
        return Dense.of(self).times(broadcast_scale(layout, scale, self.shape))

    def check(self):
        """Return (nonfinite, flushed): how many elements the type cannot hold."""
        return scale_weight(self.base.array(), self.scale, self.layout, store=False)[1:]

    def bad_channels(self):
        """Return the sorted channels that hold an element which check() counts."""
        bad = set()
        for (group, channels), _, block in self._blocks():
            layout = WeightLayout(1, block.shape[0], block.shape[1], block.shape[2])
            scale = self.scale.reshape(self.layout.groups, -1)[group, channels]
            result = scale_weight(np.ascontiguousarray(block), scale, layout)[0]
            with np.errstate(invalid="ignore"):
                flushed = (result == 0) & (block != 0) & (scale[:, None] != 0)
            hit = (~np.isfinite(result.astype(np.float32)) | flushed).any(axis=(0, 2))
            bad.update((group * self.layout.channels + channels.start + np.flatnonzero(hit)).tolist())
        return sorted(bad)

    def array(self):
        """Return the folded weight as a new array."""
        return scale_weight(self.base.array(), self.scale, self.layout)[0]

    def parts(self):
        """Yield (first element, array) pieces of the folded weight, in order and small enough for a cache."""
        for (group, channels), start, block in self._blocks():
            layout = WeightLayout(1, block.shape[0], block.shape[1], block.shape[2])
            scale = self.scale.reshape(self.layout.groups, -1)[group, channels]
            yield start, scale_weight(block, scale, layout)[0]

    def _blocks(self):
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
                    some = slice(channel, min(channel + step, channels))
                    yield (group, some), start, weight[group, row : row + 1, some]

    def magnitude(self):
        """Return |folded weight|, no smaller than the least normal number: rounding is relative only above it."""
        values = self.array()
        np.abs(values, out=values)
        tiny = np.array(_least_normal(values.dtype), values.dtype)
        return np.maximum(values, tiny, out=values)


def _least_normal(dtype):
    return {"float32": 2.0**-126, "float64": 2.0**-1022, "float16": 2.0**-14, "bfloat16": 2.0**-126}[dtype.name]


def float64_of(constant):
    """Return the values of any constant in float64, not rounded."""
    if isinstance(constant, Dense):
        return constant.values
    if isinstance(constant, Scaled):
        return Dense.of(constant).values
    with np.errstate(invalid="ignore"):  # a signalling NaN says so when it is widened
        return constant.array().astype(np.float64)


def broadcast_scale(layout, scale, shape):
    """Return a scale per (group, channel) of a layout as an array that multiplies weights of this shape."""
    return np.broadcast_to(np.reshape(scale, (layout.groups, 1, layout.channels, 1)), layout).reshape(shape)


@dataclass(frozen=True, eq=False)
class Dense:
    """A constant held in float64, rounded once when it is evaluated; abs_terms is the summed size of the terms that made each value."""

    dtype: np.dtype
    values: np.ndarray
    abs_terms: np.ndarray

    @property
    def shape(self):
        return self.values.shape

    @classmethod
    def of(cls, constant):
        """Return any constant in float64, not rounded."""
        if isinstance(constant, Dense):
            return constant
        if isinstance(constant, Scaled):
            base = cls.of(constant.base)
            return base.times(broadcast_scale(constant.layout, constant.scale, constant.shape))
        values = float64_of(constant)
        return cls(constant.dtype, values, np.abs(values))

    @classmethod
    def zeros(cls, shape, dtype):
        """Return the constant that an absent bias stands for."""
        return cls(dtype, np.zeros(shape), np.zeros(shape))

    def affine(self, scale, shift, spread):
        """Return scale * self + shift, broadcast; spread is the size of shift's own terms."""
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # check() reports it
                return Dense(self.dtype, self.values * scale + shift, self.abs_terms * np.abs(scale) + spread)
        except ValueError as error:
            shapes = f"{self.shape} and {np.shape(scale)}"
            raise ModelError(expected("a constant that broadcasts with what it meets", shapes, "a constant")) from error

    def times(self, factor):
        """Return factor * self."""
        return self.affine(factor, 0.0, 0.0)

    def check(self):
        """Return (nonfinite, flushed); a sum may round to zero, so only infinities and NaN count."""
        return int((~np.isfinite(self.array().astype(np.float64))).sum()), 0

    def bad_channels(self):
        """Return the flat indices of the elements that check() counts."""
        return np.flatnonzero(~np.isfinite(self.array().astype(np.float64))).tolist()

    def array(self):
        """Return the rounded values."""
        return narrow(self.values, self.dtype)

    def magnitude(self):
        """Return the size of the terms that the values were summed from."""
        return narrow(np.maximum(self.abs_terms, np.abs(self.values)), self.dtype)
