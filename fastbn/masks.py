"""Masked arrays of NumPy: nothing here knows a mask, and nothing may take what lies below one for a value."""

from __future__ import annotations

import sys
from typing import TypeVar

from fastbn.errors import ArgumentTypeError, expected

__all__ = ["unmasked"]

_Value = TypeVar("_Value")


def unmasked(value: _Value, where: str) -> _Value:
    """Return a value; raises ArgumentTypeError for an array with masked elements.

    Examples
    --------
    >>> unmasked([1.0, 2.0], "x")
    [1.0, 2.0]
    """
    module = sys.modules.get("numpy.ma")  # NumPy loads it when it is first asked for: before that there are no such arrays
    if module is not None and isinstance(value, module.MaskedArray) and module.is_masked(value):
        raise ArgumentTypeError(expected("an array without a mask, as its filled() gives it", "masked elements", where))
    return value
