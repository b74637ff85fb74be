"""Types of the compiled part; `tests/test_typing.py` compares names and parameters with the built module."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeGuard

from fastbn._types import Array, FloatArray, FloatVector, Sizes

# An array, or the address of a framework's memory.
_Memory: TypeAlias = Array | int
# Values per channel: an array, or (address, stride in elements, whether it is float64, ...).
_Vector: TypeAlias = Array | tuple[object, ...] | None

class _Tensor(Protocol):
    """A tensor of PyTorch, as far as this module asks it."""

    def data_ptr(self) -> int: ...
    def is_neg(self) -> bool: ...
    def numel(self) -> int: ...

class Exchange:
    def __init__(self, capsule: object, new_like: Callable[..., object], kind: type, parameter: type) -> None: ...
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
        batch_mean: Array,
        batch_m2: Array,
        count: int,
        eps: float,
        frozen: bool,
        wanted: tuple[bool, ...],
        threads: int,
    ) -> tuple[Any, Any, Any] | None: ...

def scale_weight(out: int, weight: int, scale: int, G: int, M: int, C: int, S: int, dtype: int) -> tuple[int, int]: ...
def infer(
    x: _Memory,
    out: _Memory,
    residual: _Memory | None,
    mean: _Vector,
    var: _Vector,
    weight: _Vector,
    bias: _Vector,
    view: Sizes,
    dtype: int,
    activation: int,
    eps: float,
    threads: int = 0,
) -> None: ...
def train(
    x: _Memory,
    out: _Memory,
    residual: _Memory | None,
    running_mean: _Vector,
    running_var: _Vector,
    weight: _Vector,
    bias: _Vector,
    batch_mean: Array,
    batch_m2: Array,
    view: Sizes,
    dtype: int,
    activation: int,
    eps: float,
    momentum: float,
    unbiased: bool,
    threads: int = 0,
) -> None: ...
def stats(x: _Memory, batch_mean: Array, batch_m2: Array, view: Sizes, dtype: int, threads: int = 0) -> None: ...
def backward(
    x: _Memory,
    dx: _Memory,
    dy: _Memory,
    residual: _Memory | None,
    dresidual: _Memory | None,
    dweight: _Vector,
    dbias: _Vector,
    weight: _Vector,
    bias: _Vector,
    batch_mean: Array,
    batch_m2: Array,
    count: int,
    view: Sizes,
    dtype: int,
    activation: int,
    eps: float,
    frozen: bool,
    threads: int = 0,
) -> None: ...
def backward_sums(
    x: _Memory,
    dy: _Memory,
    dweight: _Vector,
    dbias: _Vector,
    weight: _Vector,
    bias: _Vector,
    batch_mean: Array,
    batch_m2: Array,
    count: int,
    sums: Array,
    view: Sizes,
    dtype: int,
    activation: int,
    eps: float,
    threads: int = 0,
) -> None: ...
def backward_input(
    x: _Memory,
    dx: _Memory,
    dy: _Memory,
    weight: _Vector,
    bias: _Vector,
    batch_mean: Array,
    batch_m2: Array,
    count: int,
    sums: Array,
    view: Sizes,
    dtype: int,
    activation: int,
    eps: float,
    threads: int = 0,
) -> None: ...
def first_without_root(var: Array, eps: float) -> int: ...
def dense_view(axis: int, arrays: tuple[object, ...]) -> Sizes | None: ...
def new_moments(channels: int) -> tuple[FloatArray, FloatArray]: ...
def numpy_code(array: object) -> int: ...
def is_vector(array: object, length: int) -> TypeGuard[FloatVector]: ...
def is_like(array: object, other: Array) -> TypeGuard[Array]: ...
def is_aligned(array: Array) -> bool: ...
def may_overlap(a: Array, b: Array) -> bool: ...
def is_apart(array: Array, *others: Array | None) -> bool: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def kernel_names() -> list[str]: ...
def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
