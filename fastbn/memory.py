"""A pool of memory for large results: fresh pages from the system cost more time than the kernels that fill them in."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from fastbn._types import Array, ScalarT

__all__ = ["KEPT", "lend", "lend_sparingly", "release"]

# Bytes that are kept at most while nobody uses them.
KEPT = 1 << 28

# Bytes of a cache line: blocks are aligned to it, as a framework's own memory is, for the speed of the operators that read them.
_LINE = 64

_idle: dict[int, list[_Block]] = {}  # size in bytes -> blocks, the size given back last at the end
_lent: dict[int, tuple[weakref.ref[Array], _Block]] = {}  # id of a weak reference -> that reference and its block


class _Block(np.ndarray[tuple[Any, ...], np.dtype[np.uint8]]):
    """Memory of the pool. NumPy shortens a chain of views among arrays of one class. This is another class: the array that `lend` returns
    stays the base of all its views, and the end of its weak reference says that nobody uses the memory."""


def _new_block(size: int) -> _Block:
    block = _Block(size + _LINE, np.uint8)
    start = -block.ctypes.data % _LINE
    return block[start : start + size]  # type: ignore[return-value]  # a slice keeps the class, which NumPy's stubs do not say


def lend(shape: tuple[int, ...], dtype: np.dtype[ScalarT]) -> npt.NDArray[ScalarT]:
    """Return an uninitialized C-contiguous array, whose memory comes back here when the last reference to it is gone.

    Examples
    --------
    >>> array = lend((2, 3), np.dtype(np.float32))
    >>> array.shape, array.flags.c_contiguous
    ((2, 3), True)
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        block = _idle[size].pop()
    except (KeyError, IndexError):
        block = _new_block(size)
    array = np.ndarray(shape, dtype, block)
    reference = weakref.ref(array, _take_back)
    _lent[id(reference)] = reference, block
    return array


def lend_sparingly(shape: tuple[int, ...], dtype: np.dtype[ScalarT]) -> npt.NDArray[ScalarT]:
    """Return the same as `lend`; where no block has the size, those that are kept are freed before there is a new one.

    Examples
    --------
    >>> lend_sparingly((2, 3), np.dtype(np.float32)).shape
    (2, 3)
    """
    if not _idle.get(math.prod(shape) * dtype.itemsize):
        release()
    return lend(shape, dtype)


def release() -> None:
    """Free the memory that is kept and not in use.

    Examples
    --------
    >>> release()
    """
    _idle.clear()


def _take_back(reference: weakref.ref[Array]) -> None:
    # The interpreter may call this at any point, also within itself. Every step is atomic: at worst a race drops an idle block.
    _, block = _lent.pop(id(reference))
    blocks = _idle.pop(block.nbytes, [])
    blocks.append(block)
    _idle[block.nbytes] = blocks
    excess = sum(size * len(blocks) for size, blocks in list(_idle.items())) - KEPT
    for size in list(_idle):
        while excess > 0 and _idle.get(size):
            _idle[size].pop()
            excess -= size
