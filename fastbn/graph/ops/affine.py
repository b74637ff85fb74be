"""The affine that travels: y = scale * x + shift along one axis of a value."""

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Affine", "FloatArray"]

FloatArray: TypeAlias = NDArray[np.float64]


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
    """

    scale: FloatArray
    shift: FloatArray
    axis: int | None
    rank: int = 0
    abs_terms: FloatArray = field(default_factory=lambda: NOT_GIVEN)

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
        return self if self.axis is None else Affine(self.scale, self.shift, axis, 0, self.abs_terms)

    def picked(self, indices: NDArray[np.int64] | slice, axis: int | None) -> "Affine":
        """Return the affine whose channels are these channels of this one, along an axis counted from the front."""
        return Affine(self.scale[indices], self.shift[indices], axis, 0, self.abs_terms[indices])

    def inverse(self) -> "Affine":
        """Return x = (y - shift) / scale as an affine of y; scale must not be 0 anywhere."""
        return Affine(1 / self.scale, -self.shift / self.scale, self.axis, self.rank, self.abs_terms / np.abs(self.scale))

    def negated_shift(self) -> "Affine":
        """Return y = scale * x - shift."""
        return Affine(self.scale, -self.shift, self.axis, self.rank, self.abs_terms)

    def times(self, number: float) -> "Affine":
        """Return number * y."""
        return Affine(number * self.scale, number * self.shift, self.axis, self.rank, abs(number) * self.abs_terms)

    def scale_only(self) -> "Affine":
        """Return the part that multiplies."""
        zeros = np.zeros_like(self.shift)
        return Affine(self.scale, zeros, self.axis, self.rank, zeros)

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
