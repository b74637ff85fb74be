"""Every rule about arguments: each function returns what it checked, or raises."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import inf
from operator import index
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex, TypeVar, overload

import numpy as np

from fastbn import _native
from fastbn.dtypes import DTYPES, dtype_code, dtype_name
from fastbn.errors import ArgumentError, ArgumentTypeError, expected
from fastbn.masks import unmasked
from fastbn.stats import BatchStats

if TYPE_CHECKING:
    import numpy.typing as npt

    from fastbn._types import Activation, Array, FloatVector, Parameter, TensorLike

    ValueT = TypeVar("ValueT")
    ResultT = TypeVar("ResultT")

__all__ = [
    "activation_of",
    "axis_of",
    "batch_stats_of",
    "common",
    "converted",
    "eps_of",
    "fold_weight",
    "isa_of",
    "momentum_of",
    "output",
    "parameter",
    "positive_int",
    "running",
    "running_variance",
    "same_shape",
    "tensor",
    "variance",
    "vector",
]

ACTIVATIONS: dict[Activation | None, int] = _native.activation_codes()
_PARAMETERS: tuple[np.dtype[Any], ...] = (np.dtype(np.float32), np.dtype(np.float64))


def converted(read: Callable[[ValueT], ResultT], value: ValueT, what: str, where: str) -> ResultT:
    """Return read(value); what the code of other libraries raises on the way, a KeyError too, becomes the project's error."""
    try:
        return read(value)
    except MemoryError:
        raise
    except Exception as error:
        raise ArgumentTypeError(expected(what, type(value).__name__, where)) from error


def _array(value: npt.ArrayLike, where: str) -> Array:
    array = converted(_detached, unmasked(value, where), "an array", where)
    if dtype_name(array.dtype) not in DTYPES:
        got = type(value).__name__ if array.dtype == object else str(array.dtype)
        raise ArgumentTypeError(expected(f"an array of {', '.join(DTYPES)}", got, where))
    return array


def _detached(value: Any) -> Array:  # Any: what a framework's tensor is
    """Return an object as an array; of a tensor that requires grad its values, as no gradient flows through a fold."""
    return np.asarray(value.detach() if getattr(value, "requires_grad", False) else value)


def fold_weight(value: npt.ArrayLike, where: str, ndim: int) -> Array:
    """Return a C-contiguous floating array with at least ndim axes, aligned and in native byte order."""
    array = _array(value, where)
    if array.ndim < ndim:
        raise ArgumentError(expected(f"at least {ndim} axes", f"shape {array.shape}", where))
    return np.require(array, array.dtype.newbyteorder("="), ["C", "A"])


def vector(value: npt.ArrayLike | None, where: str, length: int) -> Array | None:
    """Return a floating array of shape (length,) without NaN and Inf; None passes."""
    if value is None:
        return None
    array = _array(value, where)
    if array.shape != (length,):
        raise ArgumentError(expected(f"shape ({length},)", f"shape {array.shape}", where))
    if not np.isfinite(array).all():
        raise ArgumentError(expected("finite values", f"{array[~np.isfinite(array)][0]}", where))
    return array


def variance(value: npt.ArrayLike | None, where: str, length: int, eps: float) -> Array:
    """Return a vector whose values plus eps are positive."""
    array = vector(value, where, length)
    if array is None:
        raise ArgumentTypeError(expected("an array", "None", where))
    if not (array.astype(np.float64) + eps > 0).all():
        raise ArgumentError(expected("var + eps > 0", f"{array.astype(np.float64).min() + eps:g}", where))
    return array


def eps_of(value: SupportsFloat, where: str = "eps") -> float:
    """Return eps as a float that is finite and not negative."""
    if type(value) is float and 0 <= value < inf:
        return value
    eps = _number(value, where)
    if not 0 <= eps < inf:
        raise ArgumentError(expected("a finite number >= 0", f"{eps}", where))
    return eps


def positive_int(value: int | np.integer, where: str) -> int:
    """Return value, which must be an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ArgumentTypeError(expected("an integer", type(value).__name__, where))
    if value < 1:
        raise ArgumentError(expected("an integer >= 1", f"{value}", where))
    return int(value)


def _number(value: SupportsFloat, where: str) -> float:
    return converted(_float, value, "a number", where)


def _float(value: SupportsFloat) -> float:
    if isinstance(value, (str, bytes, bytearray)):  # float() would read a text
        raise TypeError
    try:
        return float(value)
    except OverflowError:  # an integer that no float holds
        return inf


def momentum_of(value: SupportsFloat) -> float:
    """Return momentum as a float between 0 and 1, the weight of the new batch."""
    if type(value) is float and 0 <= value <= 1:
        return value
    momentum = _number(value, "momentum")
    if not 0 <= momentum <= 1:
        raise ArgumentError(expected("a number from 0 to 1", f"{momentum}", "momentum"))
    return momentum


def activation_of(value: Activation | None) -> int:
    """Return the number of an activation in fbn_activation."""
    try:
        return ACTIVATIONS[value]
    except (KeyError, TypeError):
        names = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ArgumentError(expected(f"one of {names}", repr(value), "activation")) from None


def isa_of(value: str) -> str:
    """Return the name of an ISA that this build and this CPU have."""
    names = _native.isas()
    if value not in names:
        raise ArgumentError(expected(f"one of {', '.join(names)}", repr(value), "name"))
    return value


def _ndarray(value: TensorLike | None, where: str) -> Array:
    """View an object with a buffer, a CPU DLPack or an array interface as an ndarray."""
    if isinstance(value, np.ndarray):
        return np.asarray(unmasked(value, where))
    if getattr(value, "requires_grad", False) is True:
        got = "a tensor that requires grad, and no gradient comes back: give its detach(), or call fastbn.torch"
        raise ArgumentTypeError(expected("an array in CPU memory", got, where))
    return converted(_view, value, "an array in CPU memory", where)


def _view(value: Any) -> Array:  # Any: NumPy's stubs and those of memoryview ask for more than each of these objects says of itself
    if hasattr(value, "__dlpack__"):
        return np.from_dlpack(value)
    if hasattr(value, "__array_interface__") or hasattr(value, "__array__"):
        return np.asarray(value)
    return np.asarray(memoryview(value))


def tensor(value: TensorLike, where: str) -> tuple[Array, int]:
    """Return (array, code): an aligned array of a dtype that the kernels know, and that dtype's number in fbn_dtype."""
    code = _native.numpy_code(value)
    if code >= 0:
        return value, code  # type: ignore[return-value]  # numpy_code knows arrays alone
    array = value if type(value) is np.ndarray else _ndarray(value, where)
    known = dtype_code(array.dtype)
    if known is None:
        native = array.dtype.newbyteorder("=")
        known = dtype_code(native)
        if known is None:
            raise ArgumentTypeError(expected(f"an array of {', '.join(DTYPES)}", str(array.dtype), where))
        array = array.astype(native)
    return (array if _native.is_aligned(array) else array.copy()), known


def axis_of(value: SupportsIndex, array: Array) -> int:
    """Return axis as an index from 0."""
    if type(value) is int and value == 1 and array.ndim > 1:
        return 1
    axis = converted(index, value, "an integer", "axis")
    if not -array.ndim <= axis < array.ndim:
        raise ArgumentError(expected(f"an axis of an array with {array.ndim} axes", f"{axis}", "axis"))
    return axis % array.ndim


@overload
def parameter(value: TensorLike, where: str, channels: int, *, required: bool = False) -> FloatVector: ...
@overload
def parameter(value: TensorLike | None, where: str, channels: int) -> FloatVector | None: ...
def parameter(value: TensorLike | None, where: str, channels: int, *, required: bool = False) -> FloatVector | None:
    """Return a float32 or float64 array of shape (channels,); None passes unless required."""
    if _native.is_vector(value, channels):
        return value
    if value is None and not required:
        return None
    array = value if type(value) is np.ndarray else _ndarray(value, where)
    if array.dtype not in _PARAMETERS:
        if array.dtype.newbyteorder("=") not in _PARAMETERS:
            raise ArgumentTypeError(expected("an array of float32 or float64", str(array.dtype), where))
        array = array.astype(array.dtype.newbyteorder("="))
    if array.shape != (channels,):
        raise ArgumentError(expected(f"shape ({channels},)", f"shape {array.shape}", where))
    return array if _native.is_aligned(array) else array.copy()


def common(
    x: TensorLike, weight: Parameter, bias: Parameter, eps: SupportsFloat, axis: SupportsIndex, activation: Activation | None
) -> tuple[Array, int, int, int, FloatVector | None, FloatVector | None, float, int]:
    """Return what every call has: (x, its number in fbn_dtype, axis, channels, weight, bias, eps, the number of the activation)."""
    array, dtype = tensor(x, "x")
    axis = axis_of(axis, array)
    eps = eps_of(eps)
    channels = array.shape[axis]
    weight = parameter(weight, "weight", channels)
    bias = parameter(bias, "bias", channels)
    return array, dtype, axis, channels, weight, bias, eps, activation_of(activation)


def running_variance(value: TensorLike, where: str, channels: int, eps: float) -> FloatVector:
    """Return a parameter whose values plus eps are positive, or NaN."""
    array = parameter(value, where, channels, required=True)
    position = _native.first_without_root(array, eps)
    if position >= 0:
        raise ArgumentError(expected("var + eps > 0", f"{float(array[position]) + eps:g} in channel {position}", where))
    return array


def running(value: TensorLike | None, where: str, channels: int, *tensors: Array | None) -> FloatVector | None:
    """Return statistics that can be updated in place, or None."""
    if value is None:
        return None
    array = parameter(value, where, channels)
    if array is value and _native.is_like(array, array) and _native.is_disjoint(array, *tensors):
        return array
    if array is not value and not (array.size == 0 or np.shares_memory(array, _ndarray(value, where))):
        raise ArgumentError(expected("aligned values in native byte order", "others", where))
    _writable(array, where)
    if _overlaps_itself(array.shape, array.strides):
        raise ArgumentError(expected("a value of its own for each channel", "an array that overlaps itself", where))
    if any(other is not None and _native.may_overlap(array, other) and np.shares_memory(array, other) for other in tensors):
        raise ArgumentError(expected("memory of its own", "an array that overlaps another", where))
    return array


def same_shape(value: TensorLike, where: str, x: Array) -> Array:
    """Return an array of x's shape and dtype."""
    array, _ = tensor(value, where)
    if array.dtype != x.dtype:
        raise ArgumentTypeError(expected(f"an array of {x.dtype}, as x", str(array.dtype), where))
    if array.shape != x.shape:
        raise ArgumentError(expected(f"shape {x.shape}, that of x", f"shape {array.shape}", where))
    return array


def output(value: TensorLike | None, x: Array, *inputs: Array | None) -> Array:
    """Return the array to write: a new one, or value, which is an input itself or overlaps none of them."""
    if value is None:
        return _native.new_like(x)
    array: Array
    if _native.is_like(value, x):
        array = value
    else:
        array = value if type(value) is np.ndarray else _ndarray(value, "out")
        if array.dtype != x.dtype:
            raise ArgumentTypeError(expected(f"an array of {x.dtype}, as x", str(array.dtype), "out"))
        if array.shape != x.shape:
            raise ArgumentError(expected(f"shape {x.shape}, that of x", f"shape {array.shape}", "out"))
        if not _native.is_aligned(array):
            raise ArgumentError(expected("aligned memory", "an unaligned array", "out"))
        _writable(array, "out")
        if _overlaps_itself(array.shape, array.strides):
            raise ArgumentError(expected("an element of its own for each result", "an array that overlaps itself", "out"))
    if not _native.is_separate(array, x, *inputs):
        for other in (x, *inputs):
            _check_separate(array, other, "out")
    return array


def _writable(array: Array, where: str) -> None:
    if not array.flags.writeable:
        raise ArgumentError(expected("a writable array", "a read-only one", where))


def _check_separate(array: Array, other: Array | None, where: str) -> None:
    if other is None or other is array or not _native.may_overlap(array, other):
        return
    same = array.ctypes.data == other.ctypes.data and array.shape == other.shape and array.strides == other.strides
    if not same and np.shares_memory(array, other):
        raise ArgumentError(expected("an input itself or memory apart from it", "an array that overlaps an input", where))


@lru_cache(maxsize=256)
def _overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    if 0 in shape:
        return False
    span = 0  # bytes from the first element to the last of the axes so far
    for stride, size in sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= span:
            return True
        span += stride * (size - 1)
    return False


def batch_stats_of(value: BatchStats, channels: int, count: int | None) -> BatchStats:
    """Return statistics of the right number of channels, and of the right count where one is given."""
    if not isinstance(value, BatchStats):
        raise ArgumentTypeError(expected("a BatchStats", type(value).__name__, "stats"))
    value = value._checked()
    if value.mean.size != channels:
        raise ArgumentError(expected(f"{channels} channels", f"{value.mean.size}", "stats"))
    if count is not None and value.count != count:
        raise ArgumentError(expected(f"statistics of {count} values per channel", f"{value.count}", "stats"))
    if count is None and value.count == 0:
        raise ArgumentError(expected("statistics of at least one value", "none", "stats"))
    if value.count >= 1 << 63:
        raise ArgumentError(expected("statistics of fewer than 2**63 values", f"{value.count}", "stats"))
    return value
