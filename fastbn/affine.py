"""The fact that both wings use: in inference, batch normalization is y = scale * x + shift per channel, in float64.

With weight (gamma), bias (beta), mean, var of length C and eps (Ioffe & Szegedy 2015, algorithm 2):

    scale = weight / sqrt(var + eps)        shift = bias - mean * scale

Folding multiplies a producer's weights by scale; `scale_weight` does that in float64 and rounds once to the weights' own type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import numpy as np

from fastbn import _native
from fastbn.dtypes import DTYPES, dtype_name

if TYPE_CHECKING:
    import numpy.typing as npt

    from fastbn._types import Array, FloatArray, ScalarT

__all__ = ["WeightLayout", "batch_norm_affine", "narrow", "scale_weight"]


class WeightLayout(NamedTuple):
    """Weights seen as (groups, rows, channels, inner): the third axis takes one scale per (group, channel)."""

    groups: int
    rows: int
    channels: int
    inner: int


def batch_norm_affine(
    weight: npt.ArrayLike | None, bias: npt.ArrayLike | None, mean: npt.ArrayLike, var: npt.ArrayLike, eps: float
) -> tuple[FloatArray, FloatArray]:
    """Return (scale, shift), float64 arrays of shape (C,), of an inference batch normalization.

    Parameters
    ----------
    weight, bias : array of shape (C,) or None
        gamma and beta; None means ones and zeros.
    mean, var : array of shape (C,)
        The frozen statistics; var is the variance, not the standard deviation.
    eps : float
        Added to var, which must stay positive and finite after it: that is for the caller to check.
    """
    mean = np.asarray(mean, np.float64)
    deviation = np.sqrt(np.asarray(var, np.float64) + eps)
    with np.errstate(over="ignore", invalid="ignore"):  # float64 parameters may overflow: the caller looks at the result
        scale = (np.ones_like(mean) if weight is None else np.asarray(weight, np.float64)) / deviation
        shift = (np.zeros_like(mean) if bias is None else np.asarray(bias, np.float64)) - mean * scale
    return scale, shift


@overload
def scale_weight(
    weight: npt.NDArray[ScalarT],
    scale: npt.ArrayLike,
    layout: WeightLayout,
    out: npt.NDArray[ScalarT] | None = None,
    *,
    store: Literal[True] = True,
) -> tuple[npt.NDArray[ScalarT], int, int]: ...
@overload
def scale_weight(
    weight: npt.NDArray[ScalarT], scale: npt.ArrayLike, layout: WeightLayout, out: npt.NDArray[ScalarT] | None = None, *, store: bool
) -> tuple[npt.NDArray[ScalarT] | None, int, int]: ...
def scale_weight(
    weight: Array, scale: npt.ArrayLike, layout: WeightLayout, out: Array | None = None, *, store: bool = True
) -> tuple[Array | None, int, int]:
    """Multiply weights by a per-channel scale in float64 and round once, to nearest even, to the weights' type.

    Parameters
    ----------
    weight : C-contiguous array, float32, float64, float16 or bfloat16, aligned and in native byte order
    scale : float64 array of layout.groups * layout.channels values
    layout : WeightLayout
        How the axes of weight are grouped; its sizes multiply to weight.size.
    out : C-contiguous array of weight's dtype and size, optional
        Receives the result; it may be weight itself.
    store : bool
        False only looks: nothing is written and the returned array is None.

    Returns
    -------
    (out, nonfinite, flushed)
        nonfinite counts results that are Inf or NaN, flushed counts zero results of a weight and a scale that are not zero.
    """
    factors = np.require(scale, np.float64, ["C", "A"])
    address = 0
    if store:
        out = np.empty(weight.shape, weight.dtype) if out is None else out
        address = out.ctypes.data
    nonfinite, flushed = _native.scale_weight(address, weight.ctypes.data, factors.ctypes.data, *layout, DTYPES[dtype_name(weight.dtype)])
    return out, nonfinite, flushed


def narrow(values: npt.ArrayLike, dtype: np.dtype[ScalarT]) -> npt.NDArray[ScalarT]:
    """Round a float64 array once, to nearest even, to dtype; overflow gives Inf, as in the hardware."""
    exact = np.asarray(values, dtype=np.float64, order="C")
    if dtype_name(dtype) != "bfloat16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return exact.astype(dtype, copy=False)
    # ml_dtypes converts float64 by way of float32, which rounds twice: round to 8 bits first, after which both steps are exact.
    _, exponent = np.frexp(exact)
    ulp = np.ldexp(1.0, np.maximum(exponent, -125) - 8)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded: FloatArray = np.rint(exact / ulp) * ulp
        return rounded.astype(np.float32).astype(dtype)
