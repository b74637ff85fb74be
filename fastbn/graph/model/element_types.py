"""Types of the elements of tensors: the numbers of TensorProto.DataType as NumPy has them."""

import re
from functools import cache

import numpy as np
from onnx.helper import tensor_dtype_to_np_dtype

__all__ = ["bits_of", "dtype_of"]

# NumPy's names of the types of which several elements share a byte.
PACKED = re.compile(r"(?:u?int|float)([24])(?![0-9])")


@cache
def dtype_of(kind: int) -> np.dtype[np.generic]:
    """Return the NumPy dtype of a type; raises KeyError for a number that is none."""
    return np.dtype(tensor_dtype_to_np_dtype(kind))


@cache
def bits_of(kind: int) -> int:
    """Return the bits that an element of a type takes in raw data; raises KeyError for a number that is none."""
    dtype = dtype_of(kind)
    packed = PACKED.match(dtype.name)
    return int(packed[1]) if packed else 8 * dtype.itemsize
