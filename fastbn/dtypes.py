"""The storage types of tensors and weights, and their numbers in the kernels' `fbn_dtype`."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from fastbn import _native

if TYPE_CHECKING:
    from typing import Any

    import numpy as np

__all__ = ["DTYPES", "LEAST_NORMAL", "UNIT", "dtype_code", "dtype_name"]

# dtype name -> its number in fbn_dtype. NumPy knows bfloat16 by name once ml_dtypes is imported; nothing here needs to import it.
DTYPES: dict[str, int] = _native.dtype_codes()

# dtype name -> its unit roundoff, half the distance from 1 to the next larger number.
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}

# dtype name -> its least normal number.
LEAST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}


@cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the name of a NumPy dtype, which NumPy builds anew each time that it is asked."""
    return dtype.name


@cache
def dtype_code(dtype: np.dtype[Any]) -> int | None:
    """Return the number in fbn_dtype of a NumPy dtype in native byte order; None for one that the kernels do not know."""
    return DTYPES.get(dtype.name) if dtype.isnative else None
