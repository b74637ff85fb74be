"""The affine that travels: y = scale * x + shift along one axis of a value."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Affine", "BoolArray", "FloatArray", "agreed"]

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]


# What a scale and its inverse make of 1, and a shift and its negative of 0, by some rounding errors each.
NEUTRAL = 2.0**-48

# Stands for abs_terms until they are made of the shift.
NOT_GIVEN: FloatArray = np.empty(0)


@dataclass(frozen=True, eq=False)
class Affine:
    """y = scale * x + shift along one axis of a value, in float64.

    Attributes
    ----------
    scale, shift : array of shape (channels,)
        (1,) where axis is None: one number for every element.
    axis : int or None
        Counted from the front when it is not negative (BatchNormalization) and from the end otherwise (broadcasting).
    rank : int
        The least rank that the value must have for the operator not to widen it.
    abs_terms : array of shape (channels,)
        The summed size of the terms that made each shift, |mean * scale| + |bias|; |shift| where it is not given.
    free : array of shape (channels,) or None
        True for channels that nobody reads who asks for this affine: any other scale and shift would do there.
    """

    scale: FloatArray
    shift: FloatArray
    axis: int | None
    rank: int = 0
    abs_terms: FloatArray = field(default_factory=lambda: NOT_GIVEN)
    free: BoolArray | None = None

    def __post_init__(self) -> None:
        if self.abs_terms is NOT_GIVEN:
            object.__setattr__(self, "abs_terms", np.abs(self.shift))

    @property
    def channels(self) -> int:
        """The number of channels, 1 where one number stands for every element."""
        return self.scale.size

    @property
    def scales(self) -> bool:
        """Whether it multiplies at all."""
        return bool(np.count_nonzero(self.scale != 1))

    @property
    def shifts(self) -> bool:
        """Whether it adds anything."""
        return bool(np.count_nonzero(self.shift))

    @property
    def is_neutral(self) -> bool:
        """Whether it leaves every value as it is, but for rounding errors of float64."""
        kept = (np.abs(self.scale - 1) <= NEUTRAL).all() and (np.abs(self.shift) <= NEUTRAL * self.abs_terms).all()
        return bool(kept)

    def equals(self, other: "Affine") -> bool:
        """Say whether another affine has the same numbers along the same axis."""
        same = np.array_equal(self.scale, other.scale) and np.array_equal(self.shift, other.shift)
        return same and self.axis == other.axis

    def at(self, axis: int) -> "Affine":
        """Return the same affine along another axis; one number for every element stays so."""
        return self if self.axis is None else replace(self, axis=axis, rank=0)

    def picked(self, indices: NDArray[np.int64] | slice, axis: int | None) -> "Affine":
        """Return the affine whose channels are these channels of this one, along an axis counted from the front."""
        free = None if self.free is None else self.free[indices]
        return Affine(self.scale[indices], self.shift[indices], axis, 0, self.abs_terms[indices], free)

    def inverse(self) -> "Affine":
        """Return x = (y - shift) / scale as an affine of y; scale must not be 0 anywhere."""
        return Affine(1 / self.scale, -self.shift / self.scale, self.axis, self.rank, self.abs_terms / np.abs(self.scale))

    def negated_shift(self) -> "Affine":
        """Return y = scale * x - shift."""
        return replace(self, shift=-self.shift)

    def times(self, number: float) -> "Affine":
        """Return number * y."""
        return Affine(number * self.scale, number * self.shift, self.axis, self.rank, abs(number) * self.abs_terms)

    def scale_only(self) -> "Affine":
        """Return the part that multiplies."""
        zeros = np.zeros_like(self.shift)
        return replace(self, shift=zeros, abs_terms=zeros)

    def share(self, count: int) -> "Affine":
        """Return y = scale * x + shift / count."""
        return replace(self, shift=self.shift / count, abs_terms=self.abs_terms / count)

    def along(self, channels: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return (scale, shift, abs_terms) of length channels: a single number is repeated."""
        if self.channels == channels:
            return self.scale, self.shift, self.abs_terms
        shape = (channels,)
        return np.broadcast_to(self.scale, shape), np.broadcast_to(self.shift, shape), np.broadcast_to(self.abs_terms, shape)

    def shaped(self, rank: int | None) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return (scale, shift, abs_terms) in the shape that broadcasts along the axis in a value of this rank.

        rank may be None, not known, where the axis counts from the end or is None.
        """
        if self.axis is None:
            shape: tuple[int, ...] = ()
        elif self.axis < 0:
            shape = (-1, *[1] * (-self.axis - 1))
        else:
            assert rank is not None, "an axis from the front needs the rank"
            shape = (-1, *[1] * (rank - 1 - self.axis))
        return self.scale.reshape(shape), self.shift.reshape(shape), self.abs_terms.reshape(shape)


def agreed(affines: Iterable[Affine]) -> Affine | None:
    """Return the affine of a value that several askers want, each where anybody reads it; None where two of them want different numbers.

    Their axes must be counted alike.
    """
    found: Affine | None = None
    for affine in affines:
        found = affine if found is None else _both(found, affine)
        if found is None:
            return None
    return found


def _both(one: Affine, other: Affine) -> Affine | None:
    count = max(one.channels, other.channels)
    longer = one if one.channels == count else other
    if min(one.channels, other.channels) > 1 and (one.channels != other.channels or one.axis != other.axis):
        return None
    (scale, shift, terms), (other_scale, other_shift, other_terms) = one.along(count), other.along(count)
    free, other_free = (np.broadcast_to(False if each.free is None else each.free, (count,)) for each in (one, other))
    if (((scale != other_scale) | (shift != other_shift)) & ~free & ~other_free).any():
        return None
    return Affine(
        np.where(free, other_scale, scale),
        np.where(free, other_shift, shift),
        longer.axis,
        max(one.rank, other.rank),
        np.maximum(np.where(free, 0, terms), np.where(other_free, 0, other_terms)),
        free & other_free,
    )
