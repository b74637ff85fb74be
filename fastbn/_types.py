"""Types of the array wing, for type checkers alone: every file imports them under TYPE_CHECKING, so nothing loads this one."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, SupportsFloat, SupportsIndex, TypeAlias, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt
import typing_extensions

__all__ = [
    "Activation",
    "Array",
    "BackwardOptions",
    "BiasT",
    "Communicator",
    "Exchange",
    "FloatArray",
    "FloatVector",
    "ForwardOptions",
    "Options",
    "Parameter",
    "ScalarT",
    "Sizes",
    "State",
    "StateName",
    "TensorLike",
    "TrainOptions",
    "WeightT",
]

Activation: TypeAlias = Literal["relu", "leaky_relu", "relu6"]
StateName: TypeAlias = Literal["weight", "bias", "running_mean", "running_var"]

# An array of any dtype: bfloat16 is a type of ml_dtypes, which NumPy's stubs do not know.
Array: TypeAlias = npt.NDArray[Any]
FloatArray: TypeAlias = npt.NDArray[np.float64]
# Values per channel, of shape (C,).
FloatVector: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.float64]
# (N, C, S): samples, channels, spatial positions.
Sizes: TypeAlias = tuple[int, int, int]

ScalarT = TypeVar("ScalarT", bound=np.generic)
WeightT = TypeVar("WeightT", bound=np.generic)
BiasT = TypeVar("BiasT", bound=np.generic)


class SupportsDLPack(Protocol):
    """A tensor of another framework."""

    def __dlpack__(self) -> object: ...


class SupportsArrayInterface(Protocol):
    """What NumPy reads by its array interface."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


class SupportsArray(Protocol):
    """What makes an array of itself."""

    def __array__(self) -> Array: ...


class SupportsBuffer(Protocol):
    """What has a buffer, such as array.array and memoryview."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


# What the array functions read in place. A list is none of these: it has no dtype.
TensorLike: TypeAlias = Array | SupportsDLPack | SupportsArrayInterface | SupportsArray | SupportsBuffer
# A weight or bias of shape (C,).
Parameter: TypeAlias = TensorLike | None


# Closed: a checker knows that `np.savez(path, **state)` passes arrays and nothing else.
class State(typing_extensions.TypedDict, total=False, closed=True):
    """What `BatchNorm.state_dict` returns: the arrays that the layer has, under PyTorch's names."""

    weight: FloatVector
    bias: FloatVector
    running_mean: FloatVector
    running_var: FloatVector
    num_batches_tracked: npt.NDArray[np.int64]


class Options(TypedDict, total=False):
    """What every array function takes by name alone."""

    eps: SupportsFloat
    axis: SupportsIndex
    activation: Activation | None


class ForwardOptions(Options, total=False):
    """Those of `batch_norm`."""

    residual: TensorLike | None
    out: Array | None


class TrainOptions(ForwardOptions, total=False):
    """Those of `batch_norm_train`."""

    running_mean: TensorLike | None
    running_var: TensorLike | None
    momentum: SupportsFloat
    unbiased: bool


class BackwardOptions(Options, total=False):
    """Those of `batch_norm_backward`, but for the residual, on which the number of results depends."""

    training: bool
    out: Array | None


# Takes the array of this process and returns those of all processes, in the order of the ranks.
Exchange: TypeAlias = Callable[[FloatArray], Iterable[npt.ArrayLike]]


class Communicator(Protocol):
    """What shares arrays between processes, such as a communicator of mpi4py."""

    def allgather(self, values: FloatArray, /) -> Iterable[npt.ArrayLike]:
        """Return the arrays of all processes, in the order of the ranks."""
        ...
