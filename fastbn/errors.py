"""The errors of fastbn.

A message is one sentence: "Expected <what>, got <what> - at `<where>`" about types, shapes and values, "Cannot <do what>: <reason>" about
all else.
"""

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "FastbnError",
    "FoldError",
    "ModelError",
    "ParityError",
    "StorageError",
    "TensorError",
    "expected",
]


class FastbnError(Exception):
    """Base of every error that fastbn raises on purpose."""


class ArgumentError(FastbnError, ValueError):
    """An argument has the right type and a value that cannot be used."""


class ArgumentTypeError(FastbnError, TypeError):
    """An argument has a type or dtype that cannot be used."""


class FoldError(FastbnError, ValueError):
    """A fold would make a constant overflow, become NaN or flush to zero."""


class ModelError(FastbnError, ValueError):
    """A model is malformed, or is not what the caller says it is."""


class ParityError(FastbnError, ValueError):
    """A folded model differs from its original by more than rounding explains."""


class StorageError(FastbnError, OSError):
    """A file cannot be read or written."""


class TensorError(FastbnError, RuntimeError):
    """A tensor has a type, device or shape that cannot be used: a RuntimeError, as its framework raises."""


def expected(what: str, got: str, where: str) -> str:
    """Return the message of an error about a type, a shape or a value."""
    return f"Expected {what}, got {got} - at `{where}`"
