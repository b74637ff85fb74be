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
    "Size",
    "Sizes",
    "broadcast_size",
    "broadcast_sizes",
    "first_size",
    "list_of_sizes",
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


# A number, the size of an axis that only a run tells, or nothing known.
Size = int | Dim | None
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


def first_size(node: Node, arrays: Sequence[NDArray[Any]]) -> float | None:
    """The result has as many elements as the first input, or fewer."""
    return arrays[0].size


def broadcast_size(node: Node, arrays: Sequence[NDArray[Any]]) -> float | None:
    """The result has the elements of the operands broadcast."""
    return math.prod(np.broadcast_shapes(*(array.shape for array in arrays)))


def list_of_sizes(array: NDArray[Any]) -> list[int]:
    """Return the elements of a list of sizes; raises ValueError where they are none."""
    sizes: list[int] = array.reshape(-1).tolist()
    if len(sizes) > MOST_AXES or any(size < 0 for size in sizes):
        raise ValueError("no list of sizes")
    return sizes
