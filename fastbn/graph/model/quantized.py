"""Constants behind a DequantizeLinear, (quantized - zero_point) * scale, and what a fold makes of them.

A scale goes into the step: S (q - z) s = (q - z) (S s), exactly. Under a negative one the integers are mirrored at the zero point,
(z - q) (-S s), and under zero they become it; small floating numbers in their place (float8) are negated. A shift T adds T / s to the
integers where that is a whole number of steps. Between the DequantizeLinear and its reader there may be nodes that move elements.

Where a QuantizeLinear of a constant w gives the integers, as in a model trained for quantization, S w and the new step stay in its place.
What is so close to the middle of two steps that rounding might now decide otherwise is written as the step that it was rounded to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastbn.affine import WeightLayout
from fastbn.graph.model.constant import Constant, Dense, Tensor, broadcast_scale, float64_of
from fastbn.graph.model.node import Node, Use
from fastbn.graph.reasons import Refusal, first_few

if TYPE_CHECKING:
    from fastbn._types import Array, FloatArray

__all__ = ["QUANTIZED", "SCALE", "ZERO_POINT", "Dequantized", "Quantizer", "Requantized", "quantized"]

# The inputs of QuantizeLinear and of DequantizeLinear.
QUANTIZED, SCALE, ZERO_POINT = 0, 1, 2

# A number that is farther from its step than this, in steps, might be rounded to the next one in float16.
NEAR = 3 / 8

# A shift is a whole number of steps if it is off by no more than this part of the terms that it was summed from: some roundings in float32.
EXACT = 2.0**-21


@dataclass(frozen=True)
class Requantized:
    """What becomes of a constant behind a DequantizeLinear: what the nodes that quantize and dequantize it read, the axis of their steps.

    axes: node -> the axis that its steps run along; without the nodes whose steps stay one number. via: nodes that move its elements.
    """

    constants: dict[Use, Constant]
    axes: dict[Node, int]
    via: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Quantizer:
    """A QuantizeLinear with the same steps, and the constant that it reads."""

    node: Node
    data: Constant


@dataclass(frozen=True, eq=False)
class Dequantized(Tensor):
    """A constant behind a DequantizeLinear.

    Parameters
    ----------
    node : model.Node
        The DequantizeLinear.
    quantizer : Quantizer or None
        What gives the integers.
    integers : Constant
    scale : Dense
        Of shape (), (1,), or (steps of the axis,).
    zero_point : Constant or None
    axis : int or None
        The axis that scale and zero_point run along; None where both are one number.
    may_have_axis : bool
        Whether the opset knows one step for each index of an axis.
    via : tuple of Node
        What moves its elements between the DequantizeLinear and the reader.
    order : callable
        Returns the numbers of the elements as the reader sees them: where each was behind the DequantizeLinear.
    """

    node: Node
    quantizer: Quantizer | None
    integers: Constant
    scale: Dense
    zero_point: Constant | None
    axis: int | None
    may_have_axis: bool
    via: tuple[Node, ...]
    order: Callable[[], Array]

    def _back(self, values: FloatArray) -> FloatArray:
        """Return numbers for each element as they lie behind the DequantizeLinear."""
        if not self.via:
            return values
        back = np.empty(values.size)
        back[self.order()] = values.reshape(-1)
        return back.reshape(self.integers.shape)

    def times(self, layout: WeightLayout, factor: FloatArray) -> Requantized:
        """Return what becomes of it times a factor per (group, channel) of a layout; Refusal where the steps cannot take it."""
        self.integers.array()  # raises ModelError where the model has no values for all the elements that it states
        full = self._back(broadcast_scale(layout, factor, self.shape))
        zeros = np.zeros(())
        if self.axis is None and full.size and (full == full.flat[0]).all():
            return self._stepped(None, full.reshape(-1)[:1], zeros, zeros)
        axes = range(full.ndim) if self.axis is None else [self.axis]
        for axis in axes if self.may_have_axis else ():
            first = tuple(slice(None) if at == axis else slice(0, 1) for at in range(full.ndim))
            if (full == full[first]).all():
                return self._stepped(axis, full[first].reshape(-1), zeros, zeros)
        raise Refusal("quantised", f"the scale is not one number per step of DequantizeLinear '{self.node.label}'")

    def affine(self, scale: FloatArray | float, shift: FloatArray | float, abs_terms: FloatArray | float) -> Requantized:
        """Return what becomes of scale * self + shift, one number of each per element of a bias; Refusal where that is not exact."""
        self.integers.array()  # as in times
        factor, shifts, sizes = (
            self._back(np.broadcast_to(np.asarray(each, np.float64), self.shape)) for each in (scale, shift, abs_terms)
        )
        if self.axis is None and (factor == factor.flat[0]).all():
            return self._stepped(None, factor.reshape(-1)[:1], shifts, sizes)
        if not self.may_have_axis:
            raise Refusal("quantised", f"DequantizeLinear '{self.node.label}' has one step for all channels at this opset")
        axis = self.axis or 0
        first = tuple(slice(None) if at == axis else slice(0, 1) for at in range(factor.ndim))
        if (factor != factor[first]).any():
            raise Refusal("quantised", f"the scale is not one number per step of DequantizeLinear '{self.node.label}'")
        return self._stepped(axis, factor[first].reshape(-1), shifts, sizes)

    def _stepped(self, axis: int | None, factor: FloatArray, shift: FloatArray, abs_terms: FloatArray) -> Requantized:
        size = np.where(factor == 0, 1.0, np.abs(factor))
        steps = self.scale.values.reshape(-1) * size
        shape = self.scale.shape if axis is None else steps.shape
        scale = Dense(self.scale.dtype, steps.reshape(shape), (self.scale.abs_terms.reshape(-1) * size).reshape(shape))
        changed: dict[int, Constant] = {SCALE: scale}
        zero = self.zero_point
        if zero is not None and axis is not None and math.prod(zero.shape) == 1:
            zeros = np.broadcast_to(zero.array().reshape(-1), factor.shape).copy()
            changed[ZERO_POINT] = zero = Tensor(zero.dtype, zeros.shape, lambda: zeros)
        along = _along(axis, len(self.integers.shape))
        middle: Array | int = 0 if zero is None else zero.array().astype(np.int64).reshape(along if zero.shape else ())
        rounded = scale.array().astype(np.float64).reshape(along)
        sign, moved = np.sign(factor).astype(np.int64).reshape(along), self._moved(shift, abs_terms, rounded)
        integers = self.integers
        if (sign < 1).any() or moved.any():
            integers = self._negated(middle, sign, moved) or self._checked(
                (integers.array().astype(np.int64) - middle) * sign + middle + moved, axis or 0
            )
        quantizer = self.quantizer
        nodes = {self.node: changed}
        if quantizer is not None:
            data = _rescaled(quantizer.data, factor.reshape(along), rounded, integers, middle)
            nodes[quantizer.node] = {QUANTIZED: data, **changed}
        elif integers is not self.integers:
            nodes[self.node] = {QUANTIZED: integers, **changed}
        constants = {(node, slot): constant for node, slots in nodes.items() for slot, constant in slots.items()}
        return Requantized(constants, {} if axis is None else dict.fromkeys(nodes, axis), self.via)

    def _negated(self, middle: Array | int, sign: Array, moved: Array) -> Constant | None:
        """Return small floating numbers times -1, 0 or 1, which is exact; None for integers, Refusal where more is asked of them."""
        dtype = self.integers.dtype
        if not dtype.name.startswith("float"):
            return None
        if np.any(middle) or moved.any():
            raise Refusal("quantised", f"the {dtype} of DequantizeLinear '{self.node.label}' are no steps that a shift could move")
        values = self.integers.array().astype(np.float32) * sign
        array: Array = np.where(values == 0, np.float32(0), values).astype(dtype)  # some of these types have no negative zero
        return Tensor(dtype, array.shape, lambda: array)

    def _moved(self, shift: FloatArray, abs_terms: FloatArray, steps: FloatArray) -> Array:
        """Return how many steps a shift is; Refusal where it is no whole number of them."""
        if not shift.any():
            return np.zeros((), np.int64)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            exact = shift / steps
            count = np.rint(exact)
            off = np.abs(exact - count)
            is_off = ~(off * np.abs(steps) <= EXACT * np.maximum(np.abs(shift), abs_terms)) | (np.abs(count) >= 2.0**31)
        if is_off.any():
            worst = np.max(np.where(np.isfinite(off), off, 0.0))
            channels = first_few(np.flatnonzero(is_off).tolist())
            sentence = f"the shift is no whole number of steps of DequantizeLinear '{self.node.label}': the bias would be off by"
            raise Refusal("quantised", f"{sentence} up to {worst:.2g} steps, channels {channels}")
        return count.astype(np.int64)

    def _checked(self, values: Array, axis: int) -> Constant:
        """Return integers in their own type; Refusal where it does not hold them."""
        dtype = self.integers.dtype
        least, largest = _range_of(dtype)
        bad = (values < least) | (values > largest)
        if bad.any():
            channels = first_few(sorted(set(np.nonzero(bad)[axis].tolist())))
            sentence = f"mirrored at the zero point, or moved by the shift, values of DequantizeLinear '{self.node.label}' leave"
            raise Refusal("quantised", f"{sentence} the range of {dtype}, channels {channels}")
        array: Array = values.astype(dtype)
        return Tensor(dtype, array.shape, lambda: array)


def quantized(data: Constant, scale: Constant, zero_point: Constant | None, axis: int | None, dtype: np.dtype[np.generic]) -> Tensor:
    """Return what QuantizeLinear makes of a constant that a Requantized holds: none of it is close to the middle of two steps."""

    def read() -> Array:
        along = _along(axis, len(data.shape))
        zero: Array | int = 0 if zero_point is None else zero_point.array().astype(np.int64).reshape(along if zero_point.shape else ())
        least, largest = _range_of(dtype)
        steps = data.array().astype(np.float64) / scale.array().astype(np.float64).reshape(along)
        return np.asarray(np.clip(np.rint(steps) + zero, least, largest)).astype(dtype)

    return Tensor(dtype, data.shape, read)


def _range_of(dtype: np.dtype[np.generic]) -> tuple[int, int]:
    """Return the least and the largest number of a type of integers, int4 and its like among them, by its name."""
    signed, _, bits = dtype.name.rpartition("int")
    span = 1 << int(bits)
    return (0, span - 1) if signed == "u" else (-span // 2, span // 2 - 1)


def _along(axis: int | None, rank: int) -> list[int]:
    """Return the shape in which one number per index of an axis broadcasts with a constant."""
    return [-1 if at == axis else 1 for at in range(rank)]


def _rescaled(data: Constant, factor: FloatArray, steps: FloatArray, integers: Constant, middle: Array | int) -> Dense:
    """Return what a QuantizeLinear is to read so that it gives these integers with these steps: the data times a factor."""
    values = float64_of(data) * factor
    least, largest = _range_of(integers.dtype)
    whole = integers.array().astype(np.int64)
    wanted = (whole - middle).astype(np.float64)
    given = values / steps
    beyond = ((whole == largest) & (given > wanted)) | ((whole == least) & (given < wanted))
    values = np.where((np.abs(given - wanted) <= NEAR) | beyond, values, wanted * steps)
    return Dense(data.dtype, values, np.abs(values))
