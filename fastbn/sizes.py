"""Numbers of bytes as people write them: the one reader of every option that is a size.

2G and 2GiB are 2 * 1024^3 bytes, 2GB is 2 * 1000^3; K, M and T likewise, in capitals or not; a number alone counts bytes.
"""

import re

from fastbn.errors import ArgumentError, expected

__all__ = ["LEAST_MEMORY", "bytes_in"]

# What Python, NumPy, onnx and onnxruntime take before any model is read, and some more.
LEAST_MEMORY = 256 << 20

LETTERS = "KMGT"
UNITS = {
    **{"": 1, "B": 1},
    **{f"{letter}{ending}": 1024**power for power, letter in enumerate(LETTERS, 1) for ending in ("", "IB")},
    **{f"{letter}B": 1000**power for power, letter in enumerate(LETTERS, 1)},
}
SIZE = re.compile(r"\s*([0-9]{1,16}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*")


def bytes_in(text: str, where: str) -> int:
    """Return the number of bytes that a text is; raises ArgumentError where it is none.

    Examples
    --------
    >>> bytes_in("2G", "memory"), bytes_in("2 GiB", "memory"), bytes_in("1.5kB", "memory"), bytes_in("512", "memory")
    (2147483648, 2147483648, 1500, 512)
    """
    match = SIZE.fullmatch(text)
    if match is None or match[2].upper() not in UNITS:
        raise ArgumentError(expected("a number of bytes, as 500MB or 2G", repr(text[:200]), where))
    factor = UNITS[match[2].upper()]
    return int(match[1]) * factor if match[1].isdecimal() else int(float(match[1]) * factor)
