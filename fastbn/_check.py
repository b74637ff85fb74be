"""Every rule about arguments: each function returns what it checked, or raises with the project's one form of message."""

import numpy as np

from fastbn.affine import DTYPES
from fastbn.errors import ArgumentError, ArgumentTypeError, expected

__all__ = ["eps_of", "fold_weight", "positive_int", "variance", "vector"]


def _array(value, where):
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise ArgumentTypeError(expected("an array", type(value).__name__, where)) from error
    if array.dtype.name not in DTYPES:
        got = type(value).__name__ if array.dtype == object else str(array.dtype)
        raise ArgumentTypeError(expected(f"an array of {', '.join(DTYPES)}", got, where))
    return array


def fold_weight(value, where, ndim):
    """Return a C-contiguous floating array with at least ndim axes."""
    array = _array(value, where)
    if array.ndim < ndim:
        raise ArgumentError(expected(f"at least {ndim} axes", f"shape {array.shape}", where))
    return np.ascontiguousarray(array)


def vector(value, where, length):
    """Return a floating array of shape (length,) without NaN and Inf; None passes."""
    if value is None:
        return None
    array = _array(value, where)
    if array.shape != (length,):
        raise ArgumentError(expected(f"shape ({length},)", f"shape {array.shape}", where))
    if not np.isfinite(array).all():
        raise ArgumentError(expected("finite values", f"{array[~np.isfinite(array)][0]}", where))
    return array


def variance(value, where, length, eps):
    """Return a vector whose values plus eps are positive."""
    array = vector(value, where, length)
    if array is None:
        raise ArgumentTypeError(expected("an array", "None", where))
    if not (array.astype(np.float64) + eps > 0).all():
        raise ArgumentError(expected("var + eps > 0", f"{array.astype(np.float64).min() + eps:g}", where))
    return array


def eps_of(value):
    """Return eps as a float that is finite and not negative."""
    try:
        eps = float(value)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(expected("a number", type(value).__name__, "eps")) from error
    if not 0 <= eps < float("inf"):
        raise ArgumentError(expected("a finite number >= 0", f"{eps}", "eps"))
    return eps


def positive_int(value, where):
    """Return value, which must be an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ArgumentTypeError(expected("an integer", type(value).__name__, where))
    if value < 1:
        raise ArgumentError(expected("an integer >= 1", f"{value}", where))
    return int(value)
