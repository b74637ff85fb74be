"""The storage types of tensors and weights, and their numbers in the kernels' `fbn_dtype`."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from fastbn import _native

if TYPE_CHECKING:
    from typing import Any

    import numpy as np

__all__ = ["DTYPES", "dtype_code", "dtype_name"]

# dtype name -> its number in fbn_dtype. NumPy knows bfloat16 by name once ml_dtypes is imported; nothing here needs to import it.
DTYPES: dict[str, int] = _native.dtype_codes()


@cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the name of a NumPy dtype, which NumPy builds anew each time that it is asked."""
    return dtype.name


@cache
def dtype_code(dtype: np.dtype[Any]) -> int | None:
    """Return the number in fbn_dtype of a NumPy dtype in native byte order; None for one that the kernels do not know."""
    return DTYPES.get(dtype.name) if dtype.isnative else None
