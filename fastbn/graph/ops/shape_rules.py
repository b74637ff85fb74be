"""How the sizes of a result follow from those of the inputs, and how many elements a constant expression gives: rules that rows share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.graph.model.node import Node, Value

__all__ = [
    "Dim",
    "Product",
    "Size",
    "Sizes",
    "broadcast_size",
    "broadcast_sizes",
    "dims_of",
    "each_once",
    "first_size",
    "list_of_sizes",
    "product",
    "product_elements",
    "product_of_elements",
    "quotient",
    "same_batch",
    "same_sizes",
]

# More numbers than an array has axes are no list of sizes.
MOST_AXES = 64


@dataclass(frozen=True)
class Dim:
    """The size of one axis of one value, which only a run tells. Two of them are equal where value and axis are the same."""

    value: Value
    axis: int


@dataclass(frozen=True)
class Product:
    """A number times sizes that only a run tells, these in a fixed order, so that equal products are equal."""

    number: int
    dims: tuple[Dim, ...]


# A number, the size of an axis that only a run tells, a product of such, or nothing known.
Size = int | Dim | Product | None
Sizes = Sequence[Size]


def same_sizes(node: Node, inputs: Sequence[Sizes | None]) -> Sizes | None:
    """The output has the shape of the first input."""
    return inputs[0] if inputs else None


def same_batch(node: Node, inputs: Sequence[Sizes | None]) -> Sizes | None:
    """Axis 0 of the output is that of the first input; the others are as many as those of the input, their sizes unknown."""
    first = inputs[0] if inputs else None
    return None if first is None else (*first[:1], *[None] * (len(first) - 1))


def broadcast_sizes(node: Node, inputs: Sequence[Sizes | None]) -> Sizes | None:
    """Each size of the output is the one of the operands' sizes that is not 1."""
    operands = [sizes for sizes in inputs if sizes is not None]
    if not operands or len(operands) < len(inputs):
        return None
    rank = max(map(len, operands))
    aligned: list[list[Size]] = [[*[1] * (rank - len(sizes)), *sizes] for sizes in operands]
    columns = zip(*aligned, strict=True)
    choices = [{size for size in column if size != 1} for column in columns]
    return tuple((choice or {1}).pop() if len(choice) < 2 else None for choice in choices)


def dims_of(sizes: Sequence[Size]) -> list[Dim]:
    """Return the sizes that only a run tells among the factors of some sizes."""
    return [dim for size in sizes for dim in ([size] if isinstance(size, Dim) else size.dims if isinstance(size, Product) else ())]


def product(sizes: Sequence[Size]) -> Size:
    """Return the product of sizes, None where one of them is not known."""
    if None in sizes:
        return None
    number = math.prod(size if isinstance(size, int) else size.number if isinstance(size, Product) else 1 for size in sizes)
    return _size(number, dims_of(sizes))


def quotient(sizes: Sequence[Size], others: Sequence[Size]) -> Size:
    """Return the size of an axis beside others that make up the same number of elements as sizes; None where they do not cancel."""
    whole, part = product(sizes), product(others)
    if whole is None or part is None:
        return None
    left = dims_of([whole])
    for dim in dims_of([part]):
        if dim not in left:
            return None
        left.remove(dim)
    number, divisor = (each if isinstance(each, int) else each.number if isinstance(each, Product) else 1 for each in (whole, part))
    return _size(number // divisor, left) if divisor > 0 and number % divisor == 0 else None


def _size(number: int, dims: Sequence[Dim]) -> Size:
    if not dims:
        return number
    if number == 1 and len(dims) == 1:
        return dims[0]
    return Product(number, tuple(sorted(dims, key=lambda dim: (dim.value.scope.number, dim.value.name, dim.axis))))


def product_elements(node: Node, sizes: Sizes | None, inputs: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    """The elements of a product of two lists of integers, not all of them numbers: these are left to the runtime, which may wrap them."""
    arrays = [array for array in inputs if array is not None and array.dtype == object]
    if not len(arrays) == len(inputs) == 2 or not dims_of([size for array in arrays for size in array.flat]):
        return None
    try:
        first, second = np.broadcast_arrays(*arrays)
    except ValueError:  # the model is wrong
        return None
    elements = np.empty(first.shape, object)
    elements.reshape(-1)[:] = [product(pair) for pair in zip(first.flat, second.flat, strict=True)]
    return elements


def product_of_elements(node: Node, sizes: Sizes | None, inputs: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    """The product of the elements of a list of integers, not all of them numbers."""
    listed = inputs[0]
    if listed is None or listed.dtype != object or listed.ndim != 1 or not dims_of(listed.tolist()):
        return None
    elements = np.empty((1,) if node.attribute("keepdims", 1) else (), object)
    elements[...] = product(listed.tolist())
    return elements


def first_size(node: Node, arrays: Sequence[NDArray[Any]]) -> float | None:
    """The result has as many elements as the first input, or fewer."""
    return arrays[0].size


def broadcast_size(node: Node, arrays: Sequence[NDArray[Any]]) -> float | None:
    """The result has the elements of the operands broadcast."""
    return math.prod(np.broadcast_shapes(*(array.shape for array in arrays)))


def each_once(node: Node, arrays: Sequence[NDArray[Any] | None], size: float) -> float:
    """It handles each element of its inputs and of its result a few times."""
    return size + sum(array.size for array in arrays if array is not None)


def list_of_sizes(array: NDArray[Any]) -> list[int]:
    """Return the elements of a list of sizes; raises ValueError where they are none."""
    sizes: list[int] = array.reshape(-1).tolist()
    if len(sizes) > MOST_AXES or any(size < 0 for size in sizes):
        raise ValueError("no list of sizes")
    return sizes
