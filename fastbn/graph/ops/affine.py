"""The affine that travels."""

from dataclasses import dataclass

import numpy as np

__all__ = ["Affine"]


@dataclass(frozen=True, eq=False)
class Affine:
    """y = scale * x + shift along one axis of a value, in float64.

    scale, shift and abs_terms have shape (channels,), or (1,) when axis is None: one number for every element. The axis counts from the
    front when it is not negative (BatchNormalization) and from the end otherwise (broadcasting). rank is the least rank that the value
    must have for the operator not to widen it. abs_terms is the size of the terms that shift was summed from: |mean * scale| + |bias|.
    """

    scale: np.ndarray
    shift: np.ndarray
    axis: int | None
    rank: int = 0
    abs_terms: np.ndarray = None

    def __post_init__(self):
        if self.abs_terms is None:
            object.__setattr__(self, "abs_terms", np.abs(self.shift))

    @property
    def channels(self):
        return self.scale.size

    @property
    def scales(self):
        return bool((self.scale != 1).any())

    @property
    def shifts(self):
        return bool((self.shift != 0).any())

    def at(self, axis):
        """Return the same affine along another axis, counted from the front; one number for every element stays so."""
        return self if self.axis is None else Affine(self.scale, self.shift, axis, 0, self.abs_terms)

    def picked(self, indices, axis):
        """Return the affine whose channels are these channels of this one, along an axis counted from the front."""
        scale, shift, spread = (part[indices] for part in (self.scale, self.shift, self.abs_terms))
        return Affine(scale, shift, axis, 0, spread)

    def inverse(self):
        """Return x = (y - shift) / scale as an affine of y; scale must not be 0 anywhere."""
        size = self.abs_terms / np.abs(self.scale)
        return Affine(1 / self.scale, -self.shift / self.scale, self.axis, self.rank, size)

    def scale_only(self):
        """Return the part that multiplies."""
        nothing = np.zeros_like(self.shift)
        return Affine(self.scale, nothing, self.axis, self.rank, nothing)

    def along(self, channels):
        """Return (scale, shift, spread) of length channels: a single number is repeated."""
        if self.channels == channels:
            return self.scale, self.shift, self.abs_terms
        return tuple(np.broadcast_to(part, (channels,)) for part in (self.scale, self.shift, self.abs_terms))

    def shaped(self, rank):
        """Return (scale, shift, spread) in the shape that broadcasts along the axis of a value of this rank (None: unknown)."""
        if self.axis is None:
            return self.scale.reshape(()), self.shift.reshape(()), self.abs_terms.reshape(())
        behind = -self.axis - 1 if self.axis < 0 else rank - 1 - self.axis
        return tuple(part.reshape(-1, *[1] * behind) for part in (self.scale, self.shift, self.abs_terms))
