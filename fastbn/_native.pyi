"""Types of the compiled part; `tests/test_typing.py` compares names and parameters with the built module."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeGuard

from fastbn._types import Activation, Array, FloatArray, FloatVector, Sizes
from fastbn.geometry import Layout

# An array, or (address, strides in elements, owner) of a framework's tensor.
_Memory: TypeAlias = Array | tuple[int, tuple[int, ...], object]
# Values per channel: an array, or (address, stride in elements, whether they are float64, owner).
_Values: TypeAlias = Array | tuple[int, int, bool, object]

class _Tensor(Protocol):
    """A tensor of PyTorch, as far as this module asks it."""

    def data_ptr(self) -> int: ...
    def is_neg(self) -> bool: ...
    def numel(self) -> int: ...

class Job:
    def __init__(self, layout: Sizes | Layout, dtype: int, activation: int = 0, eps: float = 0, threads: int = 0) -> None: ...
    def set_running(self, running_mean: _Values | None, running_var: _Values | None, momentum: float, unbiased: bool) -> None: ...
    def infer(
        self,
        *,
        x: _Memory,
        out: _Memory,
        residual: _Memory | None,
        mean: _Values | None,
        var: _Values | None,
        weight: _Values | None,
        bias: _Values | None,
    ) -> None: ...
    def train(
        self,
        *,
        x: _Memory,
        out: _Memory,
        residual: _Memory | None,
        weight: _Values | None,
        bias: _Values | None,
        batch_mean: FloatArray,
        batch_m2: FloatArray,
    ) -> None: ...
    def describe(self, *, strides: tuple[int, ...], has_dy: bool, has_stats: bool) -> dict[str, int]: ...
    def stats(self, *, x: _Memory, batch_mean: FloatArray, batch_m2: FloatArray) -> None: ...
    def backward(
        self,
        *,
        x: _Memory,
        dx: _Memory,
        dy: _Memory,
        residual: _Memory | None,
        dresidual: _Memory | None,
        dweight: _Values | None,
        dbias: _Values | None,
        weight: _Values | None,
        bias: _Values | None,
        batch_mean: FloatArray,
        batch_m2: FloatArray,
        count: int,
        frozen: bool,
    ) -> None: ...
    def backward_sums(
        self,
        *,
        x: _Memory,
        dy: _Memory,
        dweight: _Values | None,
        dbias: _Values | None,
        weight: _Values | None,
        bias: _Values | None,
        batch_mean: FloatArray,
        batch_m2: FloatArray,
        count: int,
        sums: FloatArray,
    ) -> None: ...
    def backward_input(
        self,
        *,
        x: _Memory,
        dx: _Memory,
        dy: _Memory,
        weight: _Values | None,
        bias: _Values | None,
        batch_mean: FloatArray,
        batch_m2: FloatArray,
        count: int,
        sums: FloatArray,
    ) -> None: ...

class PlainTensors:
    def __init__(self, capsule: object, new_like: Callable[..., object], tensor_class: type, parameter_class: type) -> None: ...
    def have_memory(self, *tensors: _Tensor | None) -> bool: ...
    def train(
        self,
        x: _Tensor,
        out: _Tensor,
        running_mean: _Tensor | None,
        running_var: _Tensor | None,
        weight: _Tensor | None,
        bias: _Tensor | None,
        batches: _Tensor | None,
        eps: float,
        momentum: float,
        threads: int,
    ) -> tuple[FloatArray, FloatArray] | None: ...
    def infer(
        self,
        x: _Tensor,
        out: _Tensor,
        mean: _Tensor,
        var: _Tensor,
        weight: _Tensor | None,
        bias: _Tensor | None,
        eps: float,
        threads: int,
    ) -> bool: ...
    # The new tensors are PyTorch's, which this module knows by duck typing alone: hence Any.
    def backward(
        self,
        x: _Tensor,
        dx: _Tensor,
        dy: _Tensor,
        weight: _Tensor | None,
        bias: _Tensor | None,
        batch_mean: FloatArray | _Tensor,
        batch_m2: FloatArray | _Tensor,
        count: int,
        eps: float,
        frozen: bool,
        wanted: tuple[bool, ...],
        threads: int,
    ) -> tuple[Any, Any, Any] | None: ...

def infer_arrays(
    x: object,
    mean: object,
    var: object,
    weight: object,
    bias: object,
    eps: object,
    axis: object,
    activation: object,
    residual: object,
    out: object,
) -> Array | None: ...
def train_arrays(
    x: object,
    weight: object,
    bias: object,
    running_mean: object,
    running_var: object,
    momentum: object,
    unbiased: object,
    eps: object,
    axis: object,
    activation: object,
    residual: object,
    out: object,
) -> tuple[Array, int, FloatArray, FloatArray] | None: ...
def backward_arrays(
    dy: object,
    x: object,
    batch_mean: object,
    batch_m2: object,
    count: object,
    weight: object,
    bias: object,
    eps: object,
    axis: object,
    training: object,
    activation: object,
    out: object,
) -> tuple[Array, FloatVector | None, FloatVector | None] | None: ...
def scale_weight(out: int, weight: int, scale: int, G: int, M: int, C: int, S: int, dtype: int) -> tuple[int, int]: ...
def first_without_root(var: Array, eps: float) -> int: ...
def dense_layout(axis: int, arrays: tuple[object, ...]) -> Sizes | None: ...
def new_moments(channels: int) -> tuple[FloatArray, FloatArray]: ...
def new_like(array: FloatVector | Array) -> Array: ...
def dtype_codes() -> dict[str, int]: ...
def activation_codes() -> dict[Activation | None, int]: ...
def numpy_code(array: object) -> int: ...
def is_vector(array: object, length: int) -> TypeGuard[FloatVector]: ...
def is_like(array: object, other: Array) -> TypeGuard[Array]: ...
def are_moments(mean: object, m2: object) -> bool: ...
def is_aligned(array: Array) -> bool: ...
def may_overlap(a: Array, b: Array) -> bool: ...
def is_separate(array: Array, *others: Array | None) -> bool: ...
def is_disjoint(array: Array, *others: Array | None) -> bool: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def kernel_names() -> list[str]: ...
def num_threads() -> int: ...
def spin_microseconds() -> int: ...
def use_team(team: int, number: int) -> None: ...
def set_num_threads(threads: int) -> None: ...
