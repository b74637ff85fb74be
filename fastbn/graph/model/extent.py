"""How much an operator gives for constants, and how long that takes: told before it is run, as a few bytes may ask for terabytes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from fastbn.graph.model.evaluation import OPERATOR_IR, Inputs, Key, is_numeric
from fastbn.graph.model.node import Node
from fastbn.graph.model.schemas import checker_context, is_inferable
from fastbn.graph.ops.registry import operator_row

if TYPE_CHECKING:
    pass

__all__ = ["LARGEST_WORK", "result_size", "steps_of"]

# The most steps that one operator may take for constants: a few seconds on one core where each is slow.
LARGEST_WORK = 1 << 31

# Operators with lists that may be empty. Of the others, some kernels of onnxruntime 1.32 divide by a size of an input, and end the process.
MAY_READ_NOTHING = ("Resize",)

# Inference reads the values of lists of no more integers, and of no more floats, than this.
LONGEST_LIST, LONGEST_FACTORS = 1 << 10, 64


def result_size(node: Node, arrays: Inputs, key: Key, opset: int) -> float | None:
    """Return how many elements a node gives in all; None where it cannot run, or where only a run would tell."""
    given = [array for array in arrays if array is not None]
    if not given or not all(is_numeric(array.dtype) for array in given):
        return None
    row = operator_row(node)
    if row.result_size is None:
        return _inferred_size(key, arrays, opset)
    try:
        return row.result_size(node, given)
    except (ValueError, IndexError, TypeError, OverflowError):
        return None


def steps_of(node: Node, arrays: Inputs, size: float) -> float:
    """Return how many steps a node may take to give `size` elements."""
    row = operator_row(node)
    sizes = [array.size for array in arrays if array is not None]
    if row.work is not None:
        return row.work(node, arrays, size)
    if row.result_size is not None:  # it handles each element of its inputs and of its result a few times
        return size + sum(sizes)
    return size * max(sizes)


def _inferred_size(key: Key, arrays: Inputs, opset: int) -> float | None:
    """Return what shape inference says of a model of this node alone, whose short lists it may read."""
    proto: NodeProto = NodeProto.FromString(key[0])
    if proto.op_type not in MAY_READ_NOTHING and any(array is not None and not array.size for array in arrays):
        return None
    graph = GraphProto(name="constant", node=[proto])
    for slot, array in enumerate(arrays):
        if array is None:
            continue
        if array.size <= (LONGEST_LIST if array.dtype.kind in "iub" else LONGEST_FACTORS):
            graph.initializer.append(numpy_helper.from_array(np.asarray(array), f"i{slot}"))
        else:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            graph.input.append(helper.make_tensor_value_info(f"i{slot}", kind, array.shape))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in proto.output if name)
    model = ModelProto(ir_version=OPERATOR_IR, graph=graph, opset_import=[helper.make_opsetid("", opset)])
    if not is_inferable(proto, checker_context(model, opset)):
        return None
    try:
        outputs = onnx.shape_inference.infer_shapes(model).graph.output
    except Exception:  # inference raises many kinds on malformed nodes
        return None
    total = 0
    for info in outputs:
        kind = info.type.tensor_type
        sizes = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
        if not kind.HasField("shape") or min(sizes, default=0) < 0:
            return None
        total += math.prod(sizes)
    return total
