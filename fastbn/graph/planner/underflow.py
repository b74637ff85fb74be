"""Folded weights that round to zero in the model's type, and where that matters.

An output channel sums W[k] x[k] and b. Weights below half the least number that the type holds become zero; what the sum loses for inputs
up to X is at most d X, d the sum of their true sizes. The sum is rounded anyway: with u the unit roundoff, A the largest weight of the
channel and v the least normal number, a product of A is rounded by up to u A X, the bias by u |b|, and what is smaller than v by u v, half
the least number that the type holds. So nothing that a run could tell from rounding is lost where

    d X <= u max(A X, |b|, v)

X is 2**16: float16 ends there, in which networks are commonly run. It is the sum as it is folded that counts, so the same holds for a
scale on the output channels and on the input channels.

What weight decay leaves of a dead channel in float32 (|W| near 1e-41 beside a scale near 1e-38) passes by thirty orders of magnitude: its
products round to zero in the original too, in which onnxruntime keeps numbers below v. In float16 (v is 6e-5) a channel of small weights
does not.
"""

import numpy as np

from fastbn.graph.model.constant import float64_of

__all__ = ["lost_channels"]

LARGEST_INPUT = 2.0**16

# Type -> (unit roundoff, least normal number).
ROUNDING = {
    "float16": (2.0**-11, 2.0**-14),
    "bfloat16": (2.0**-8, 2.0**-126),
    "float32": (2.0**-24, 2.0**-126),
    "float64": (2.0**-53, 2.0**-1022),
}


def lost_channels(constant: object, matrix: object, bias: np.ndarray | float) -> tuple[int, list[int]]:
    """Return (how many weights matter that become zero, the output channels that hold them).

    Parameters
    ----------
    constant : constant.Scaled or constant.Dense
        The folded weight.
    matrix : callable
        What makes a matrix of shape (output channels, terms) of the weight.
    bias : array of shape (output channels,), or 0.0
        |b|, the least one where a channel has several.
    """
    unit, least = ROUNDING[constant.dtype.name]
    true, kept = np.abs(matrix(float64_of(constant))), matrix(constant.array()) != 0
    flushed = (true != 0) & ~kept
    lost, largest = (true * flushed).sum(axis=1), true.max(axis=1, initial=0)
    matters = lost * LARGEST_INPUT > unit * np.maximum(np.maximum(largest * LARGEST_INPUT, bias), least)
    return int(flushed[matters].sum()), np.flatnonzero(matters).tolist()
