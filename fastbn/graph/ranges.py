"""Rules about options that are numbers, sizes or callables; an option that breaks one is an error before any work is done."""

import numbers
import operator
from collections.abc import Callable
from typing import SupportsFloat, SupportsIndex, TypeVar

from fastbn.errors import ArgumentError, ArgumentTypeError, expected
from fastbn.sizes import bytes_in

__all__ = ["LARGEST_SEED", "number_between", "optional_callable", "size_in_bytes", "whole_number"]

_Callable = TypeVar("_Callable", bound=Callable[..., object])

# A seed has 32 bits, as NumPy's oldest generators and the attribute of onnx's random operators hold it.
LARGEST_SEED = 2**32 - 1


def whole_number(value: SupportsIndex, where: str, least: int = 0, most: int | None = None) -> int:
    """Return an option as an int; raises ArgumentTypeError where it is no whole number, ArgumentError where it is out of range."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ArgumentTypeError(expected("a whole number", type(value).__name__, where)) from error
    if isinstance(value, bool):
        raise ArgumentTypeError(expected("a whole number", "bool", where))
    if number < least or (most is not None and number > most):
        range_text = f"at least {least}" if most is None else f"a whole number from {least} to {most}"
        raise ArgumentError(expected(range_text, str(number), where))
    return number


def number_between(value: SupportsFloat, where: str, least: float, most: float, what: str) -> float:
    """Return an option as a float, within least and most; raises ArgumentTypeError or ArgumentError, what says what it should be."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ArgumentTypeError(expected(what, type(value).__name__, where))
    if value < least or not value <= most:  # NaN is neither
        raise ArgumentError(expected(what, str(value), where))
    return float(value)


def size_in_bytes(value: SupportsIndex | str, where: str) -> int:
    """Return an option as a number of bytes, given as one or as text such as "500MB"; raises ArgumentError or ArgumentTypeError."""
    return bytes_in(value, where) if isinstance(value, str) else whole_number(value, where)


def optional_callable(value: _Callable | None, where: str) -> _Callable | None:
    """Return an option that is called, or None; raises ArgumentTypeError for anything else."""
    if value is not None and not callable(value):
        raise ArgumentTypeError(expected("something that can be called, or None", type(value).__name__, where))
    return value
