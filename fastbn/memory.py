"""Memory of large results, kept when it is given up and lent again: fresh pages cost more than the kernels that fill them in."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from fastbn._types import Array, ScalarT

__all__ = ["KEPT", "lend", "release"]

# Bytes that are kept at most while nobody uses them.
KEPT = 1 << 28

# Bytes of a cache line: blocks begin at one, as a framework's own memory does; operators behind ours would be slower elsewhere.
_LINE = 64

_idle: dict[int, list[_Block]] = {}  # size in bytes -> blocks, the size given back last at the end
_lent: dict[int, tuple[weakref.ref[Array], _Block]] = {}  # id of a weak reference -> that reference and its block


class _Block(np.ndarray[tuple[Any, ...], np.dtype[np.uint8]]):
    """Memory, of a type of its own: a view of a view refers to the last array of its own type, which must be the one that is watched."""


def _new_block(size: int) -> _Block:
    block = _Block(size + _LINE, np.uint8)
    start = -block.ctypes.data % _LINE
    return block[start : start + size]  # type: ignore[return-value]  # a slice keeps the class, which NumPy's stubs do not say


def lend(shape: tuple[int, ...], dtype: np.dtype[ScalarT]) -> npt.NDArray[ScalarT]:
    """Return an uninitialised C-contiguous array, whose memory comes back here when the last reference to it is gone."""
    size = math.prod(shape) * dtype.itemsize
    try:
        block = _idle[size].pop()
    except (KeyError, IndexError):
        block = _new_block(size)
    array = np.ndarray(shape, dtype, block)
    reference = weakref.ref(array, _take_back)
    _lent[id(reference)] = reference, block
    return array


def release() -> None:
    """Free what is kept and not in use."""
    _idle.clear()


def _take_back(reference: weakref.ref[Array]) -> None:
    # This runs wherever a reference ends, even within itself: each step stands alone, and the worst of a race is a block freed early.
    _, block = _lent.pop(id(reference))
    blocks = _idle.pop(block.nbytes, [])
    blocks.append(block)
    _idle[block.nbytes] = blocks
    excess = sum(size * len(blocks) for size, blocks in list(_idle.items())) - KEPT
    for size in list(_idle):
        while excess > 0 and _idle.get(size):
            _idle[size].pop()
            excess -= size
