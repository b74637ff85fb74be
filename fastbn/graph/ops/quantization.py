"""QuantizeLinear and DequantizeLinear: a weight that stands behind the latter takes a scale into its step."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from fastbn.dtypes import DTYPES, dtype_name
from fastbn.errors import ModelError, expected
from fastbn.graph.model.constant import Dense, Dequantized
from fastbn.graph.model.node import Node
from fastbn.graph.ops.row import PresentGraph, Row
from fastbn.graph.ops.shape_rules import same_sizes

__all__ = ["QUANTIZATION", "dequantized", "is_dequantized"]

# The slot of the weight of Conv, ConvTranspose and Gemm; DequantizeLinear has a scale per step of an axis from this opset on.
WEIGHT_SLOT, FIRST_PER_AXIS_OPSET = 1, 13

# Of a DequantizeLinear.
QUANTIZED, SCALE, ZERO_POINT = 0, 1, 2


def is_dequantized(node: Node, slot: int) -> bool:
    """Say whether a DequantizeLinear gives the input at a slot."""
    value = node.input(slot)
    return value is not None and value.producer is not None and value.producer.is_op("DequantizeLinear")


def dequantized(node: Node, slot: int, graph: PresentGraph) -> Dequantized | None:
    """Return the weight at a slot that a DequantizeLinear of constants gives, None where there is none."""
    value = node.input(slot)
    source = None if value is None else value.producer
    if value is None or source is None or not is_dequantized(node, slot) or slot != WEIGHT_SLOT or graph.opset < FIRST_PER_AXIS_OPSET:
        return None
    graph.check(source)
    integers, scale = graph.tensor(source, QUANTIZED), graph.tensor(source, SCALE)
    zero_point = graph.tensor(source, ZERO_POINT)
    if integers is None or scale is None or (zero_point is None and source.input(ZERO_POINT) is not None):
        return None
    if not integers.shape or source.attribute("block_size", 0) or dtype_name(scale.dtype) not in DTYPES or source.scope is not node.scope:
        return None
    graph.refuse_readers(value, node, slot)
    planned = graph.planned_attributes(source).get("axis")
    axis = (planned if isinstance(planned, int) else source.attribute("axis", 1)) % len(integers.shape)
    per_axis = math.prod(scale.shape) > 1
    steps = (integers.shape[axis],) if per_axis else scale.shape
    if scale.shape != steps or (zero_point is not None and zero_point.shape != steps):
        raise ModelError(expected(f"scales and zero points of shape {steps}", f"shape {scale.shape}", source.label))
    step = Dense.of(scale)
    flat = Dense(step.dtype, step.values.reshape(-1), step.abs_terms.reshape(-1))

    def read() -> NDArray[Any]:
        along = [-1 if at == axis and per_axis else 1 for at in range(len(integers.shape))]
        zero = (
            0.0 if zero_point is None else zero_point.array().reshape(along if math.prod(zero_point.shape) > 1 else -1).astype(np.float64)
        )
        return ((integers.array().astype(np.float64) - zero) * flat.values.reshape(along)).astype(scale.dtype)

    return Dequantized(scale.dtype, integers.shape, read, source, axis if per_axis else None, flat, zero_point)


def _one_term(node: Node, graph: PresentGraph) -> int:
    return 1


def _no_probe(node: Node, graph: PresentGraph) -> dict[int, tuple[int, ...] | None]:
    return {}


def _bound(proto: NodeProto) -> list[NodeProto]:
    """Its integers are signed: the absolute value is taken of what it gives."""
    absolute = helper.make_node("Abs", [f"{proto.output[0]}/signed"], [proto.output[0]])
    proto.output[0] = absolute.input[0]
    return [absolute]


QUANTIZATION = {
    "DequantizeLinear": Row(
        terms=_one_term,
        probe_shapes=_no_probe,
        bound=_bound,
        input_names={SCALE: "scale", ZERO_POINT: "zero_point"},
        sizes=same_sizes,
    ),
    "QuantizeLinear": Row(sizes=same_sizes),
}
