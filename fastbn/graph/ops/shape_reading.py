"""What reads a shape, or makes a value of one."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.graph.model.node import Node
from fastbn.graph.ops.row import Row
from fastbn.graph.ops.shape_rules import Sizes, each_once, first_size, list_of_sizes

__all__ = ["SHAPE_READING"]


def _shape_elements(node: Node, sizes: Sizes | None, inputs: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    if sizes is None:
        return None
    chosen = sizes[node.attribute("start", 0) : node.attribute("end", len(sizes))]
    elements = np.empty(len(chosen), object)
    elements[:] = chosen
    return elements


def _filled_size(node: Node, arrays: Sequence[NDArray[Any]]) -> float | None:
    return math.prod(list_of_sizes(arrays[0]))


def _range_size(node: Node, arrays: Sequence[NDArray[Any]]) -> float | None:
    start, limit, delta = (array.item() for array in arrays)
    return max(0, math.ceil((limit - start) / delta)) if delta else math.inf


SHAPE_READING = {
    "Shape": Row(reads={0: "shape"}, list_elements=_shape_elements),
    "Size": Row(reads={0: "shape"}),
    "EyeLike": Row(reads={0: "shape"}, result_size=first_size),
    **dict.fromkeys(("RandomNormalLike", "RandomUniformLike"), Row(reads={0: "shape"})),
    "ConstantOfShape": Row(size_slots=(0,), result_size=_filled_size),
    "Range": Row(size_slots=(0, 1, 2), result_size=_range_size),
    "OneHot": Row(size_slots=(1,), work=each_once),
    "TopK": Row(size_slots=(1,), work=each_once),
}
