"""QuantizeLinear and DequantizeLinear: a weight that stands behind the latter takes a scale into its step."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from fastbn.dtypes import DTYPES, dtype_name
from fastbn.errors import ModelError, expected
from fastbn.graph.model.constant import Constant, Dense
from fastbn.graph.model.node import Node, Value, is_complete
from fastbn.graph.model.quantized import QUANTIZED, SCALE, ZERO_POINT, Dequantized, Quantizer, quantized
from fastbn.graph.ops.row import PresentGraph, Row, one_term
from fastbn.graph.ops.shape_rules import each_once, same_sizes
from fastbn.graph.reasons import Refusal

__all__ = ["QUANTIZATION", "dequantized", "is_quantized"]

# QuantizeLinear and DequantizeLinear have a scale per step of an axis from this opset on.
FIRST_PER_AXIS_OPSET = 13

# Values that a constant is followed back to.
MOST_VALUES = 64

# What hands out all elements of its first input, each once: all but Transpose in the same order.
MOVERS = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")


def is_quantized(value: Value | None) -> bool:
    """Say whether a constant is what a DequantizeLinear gives, or is computed from that."""
    pending = [] if value is None else [value]
    for at in pending:
        node = None if at.initializer is not None else at.producer
        if node is not None and node.is_op("DequantizeLinear"):
            return True
        if node is not None and len(pending) < MOST_VALUES:
            pending.extend(read for read in node.inputs if read is not None and read not in pending)
    return False


def dequantized(node: Node, slot: int, graph: PresentGraph) -> Dequantized | None:
    """Return the constant at a slot that a DequantizeLinear of constants gives, None where there is none that a fold can change."""
    source, via = _source(node, slot, graph)
    if source is None:
        return None
    graph.check(source)
    scale, zero_point = graph.tensor(source, SCALE), graph.tensor(source, ZERO_POINT)
    quantizer = _quantizer(source, graph)
    integers = _integers(source, quantizer, graph)
    if integers is None or scale is None or (zero_point is None and source.input(ZERO_POINT) is not None):
        return None
    if not integers.shape or source.attribute("block_size", 0) or dtype_name(scale.dtype) not in DTYPES:
        return None
    reader, at = node, slot
    for step in (*reversed(via), source):
        graph.refuse_readers(step.required_output(), reader, at)
        reader, at = step, 0
    axis = _axis(source, len(integers.shape), graph) if math.prod(scale.shape) > 1 else None
    steps = scale.shape if axis is None else (integers.shape[axis],)
    if scale.shape != steps or len(steps) > 1 or (zero_point is not None and zero_point.shape != steps):
        raise ModelError(expected(f"scales and zero points of shape {steps}", f"shape {scale.shape}", source.label))
    size = Dense.of(scale)
    shape = integers.shape if not via else graph.shape(via[-1].required_output())
    assert is_complete(shape), "_source has asked"

    def read() -> NDArray[Any]:
        along = [-1 if at == axis else 1 for at in range(len(integers.shape))]
        zero: NDArray[Any] | int = 0 if zero_point is None else zero_point.array().astype(np.float64).reshape(along)
        values: NDArray[Any] = ((integers.array().astype(np.float64) - zero) * size.values.reshape(along)).astype(scale.dtype)
        return values.reshape(-1)[order()].reshape(shape) if via else values

    def order() -> NDArray[Any]:
        numbers = np.arange(math.prod(integers.shape)).reshape(integers.shape)
        for step in via:
            after = graph.shape(step.required_output())
            assert is_complete(after), "_source has asked"
            perm = step.attribute("perm", [*reversed(range(numbers.ndim))])
            numbers = numbers.transpose(perm) if step.op == "Transpose" else numbers.reshape(after)
        return numbers.reshape(-1)

    may_have_axis = graph.opset >= FIRST_PER_AXIS_OPSET
    return Dequantized(scale.dtype, shape, read, source, quantizer, integers, size, zero_point, axis, may_have_axis, tuple(via), order)


def _source(node: Node, slot: int, graph: PresentGraph) -> tuple[Node | None, list[Node]]:
    """Return (the DequantizeLinear that a slot reads, what moves its elements before it is read), None where there is none."""
    value, via = node.input(slot), list[Node]()
    while value is not None and value.producer is not None and value.producer.scope is node.scope:
        if value.producer.is_op("DequantizeLinear"):
            return value.producer, via[::-1]
        if not value.producer.is_op(*MOVERS) or not is_complete(graph.shape(value)) or len(via) == MOST_VALUES:
            break
        via.append(value.producer)
        value = value.producer.input(0)
    return None, []


def _axis(node: Node, rank: int, graph: PresentGraph) -> int:
    planned = graph.planned_attributes(node).get("axis")
    return (planned if isinstance(planned, int) else node.attribute("axis", 1)) % rank


def _quantizer(source: Node, graph: PresentGraph) -> Quantizer | None:
    """Return the QuantizeLinear of a constant that a DequantizeLinear alone reads, if its steps are the same."""
    value = source.input(QUANTIZED)
    node = None if value is None else value.producer
    if value is None or node is None or not node.is_op("QuantizeLinear") or graph.is_changed(source, QUANTIZED):
        return None
    data, integers = graph.tensor(node, QUANTIZED), graph.constant(value)
    same = all(_are_same(graph.tensor(node, slot), graph.tensor(source, slot)) for slot in (SCALE, ZERO_POINT))
    is_plain = node.scope is source.scope and not node.attribute("block_size", 0) and not node.attribute("precision", 0)
    if data is None or integers is None or not same or not is_plain or integers.dtype.kind not in "iu" or not data.shape:
        return None
    if math.prod(integers.shape) and _axis(node, len(data.shape), graph) != _axis(source, len(data.shape), graph):
        return None
    try:
        graph.refuse_readers(value, source, QUANTIZED)
    except Refusal:
        return None
    return Quantizer(node, data)


def _are_same(first: Constant | None, second: Constant | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and first.dtype == second.dtype and bool((first.array() == second.array()).all())


def _integers(source: Node, quantizer: Quantizer | None, graph: PresentGraph) -> Constant | None:
    given = graph.tensor(source, QUANTIZED)
    if quantizer is None or given is None or not graph.is_changed(quantizer.node, QUANTIZED):
        return given
    scale, zero_point = graph.tensor(source, SCALE), graph.tensor(source, ZERO_POINT)
    assert scale is not None, "compared with that of the quantizer"
    axis = _axis(source, len(given.shape), graph) if math.prod(scale.shape) > 1 else None
    return quantized(quantizer.data, scale, zero_point, axis, given.dtype)


def _no_probe(node: Node, graph: PresentGraph) -> dict[int, tuple[int, ...] | None]:
    return {}


def _bound(proto: NodeProto) -> list[NodeProto]:
    """Its integers are signed: the absolute value is taken of what it gives."""
    absolute = helper.make_node("Abs", [f"{proto.output[0]}/signed"], [proto.output[0]])
    proto.output[0] = absolute.input[0]
    return [absolute]


# A weight is made of what a step multiplies, and a QuantizeLinear may divide by the same step.
def _factor_reach(node: Node, slot: int, graph: PresentGraph) -> float | None:
    return math.inf if slot == SCALE else None


QUANTIZATION = {
    "DequantizeLinear": Row(
        terms=one_term,
        probe_shapes=_no_probe,
        bound=_bound,
        factor_reach=_factor_reach,
        input_names={SCALE: "scale", ZERO_POINT: "zero_point"},
        sizes=same_sizes,
        work=each_once,
    ),
    "QuantizeLinear": Row(sizes=same_sizes, work=each_once),
    "DynamicQuantizeLinear": Row(work=each_once),
}
