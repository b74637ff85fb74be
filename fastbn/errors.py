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
    "first_line",
]


# The most characters of a message. Names in a model may have millions: the middle of a longer message is left out.
LONGEST, SHOWN = 800, 390


class FastbnError(Exception):
    """Base of every error that fastbn raises on purpose."""

    def __str__(self) -> str:
        """Return the message as one line: control characters escaped, the middle of a very long one left out."""
        text = super().__str__()
        if len(text) > LONGEST:
            text = f"{text[:SHOWN]} ... {text[-SHOWN:]}"
        return text if text.isprintable() else "".join(map(_printable, text))


def _printable(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape").decode("ascii")


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


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
