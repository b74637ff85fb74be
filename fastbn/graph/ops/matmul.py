"""Gemm and MatMul."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from fastbn.affine import WeightLayout
from fastbn.errors import ModelError, expected
from fastbn.graph.model.constant import Constant, Dense
from fastbn.graph.model.node import Node, Value
from fastbn.graph.model.quantized import Dequantized
from fastbn.graph.ops.affine import Affine, FloatArray
from fastbn.graph.ops.placing import axis_in, require_axis, require_channels
from fastbn.graph.ops.row import PresentGraph, Row, Transfer, Traveler
from fastbn.graph.ops.shape_rules import Size, Sizes
from fastbn.graph.ops.weighted import scaled
from fastbn.graph.reasons import Refusal

__all__ = ["MATMUL"]

# Products of matrices that take one step.
AT_ONCE = 8

# Where Gemm reads its matrix B and its C.
MATRIX, BIAS = 1, 2


def _matrix(node: Node, graph: PresentGraph) -> tuple[Constant, bool, tuple[int, int]]:
    """Return (B of a Gemm, whether its columns come first, (rows, columns))."""
    weight = graph.weight(node, MATRIX)
    if len(weight.shape) != 2:
        raise ModelError(expected("a matrix", f"shape {weight.shape}", node.label))
    first, second = weight.shape
    return (weight, True, (second, first)) if node.attribute("transB", 0) else (weight, False, (first, second))


# Gemm:  backward S*(alpha A B + beta C) + T = alpha A (B*S) + (beta*C*S + T), S along the columns of B;  forward
# alpha (A*S + T) B + beta C = alpha A (S*B) + (beta*C + alpha T B), S along the rows of B.
def _gemm_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    if _has_constant_a(node, graph):
        return _constant_a_backward(node, traveler, graph)
    affine = traveler.affine
    weight, columns_first, (rows, channels) = _matrix(node, graph)
    require_axis(node, affine, axis_in(node, affine, 2), 1, "output")
    require_channels(node, affine, channels, "output")
    scale, shift, abs_terms = affine.along(channels)
    transfer = Transfer()
    if affine.scales:
        layout = WeightLayout(1, 1, channels, rows) if columns_first else WeightLayout(1, rows, channels, 1)
        transfer.constants[MATRIX] = scaled(weight, layout, scale)
    if affine.shifts or _has_bias(node) or graph.is_changed(node, BIAS):
        transfer.constants[BIAS] = _bias(node, graph, weight, channels).affine(scale, shift, abs_terms)
        _set_bias_attributes(node, graph, transfer)
    return transfer


def _gemm_forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine = traveler.affine
    if traveler.slot == MATRIX and _has_constant_a(node, graph):
        return _constant_a_forward(node, traveler, graph)
    if traveler.slot != 0:
        raise Refusal("no-absorber", f"it is not the first operand of Gemm '{node.label}'")
    weight, columns_first, (rows, channels) = _matrix(node, graph)
    require_axis(node, affine, axis_in(node, affine, 2), 0 if node.attribute("transA", 0) else 1, "input")
    require_channels(node, affine, rows, "input")
    transfer = Transfer()
    if affine.scales:
        layout = WeightLayout(1, channels, rows, 1) if columns_first else WeightLayout(1, 1, rows, channels)
        transfer.constants[MATRIX] = scaled(weight, layout, affine.along(rows)[0])
    if affine.shifts:
        matrix = Dense.of(weight).values.T if columns_first else Dense.of(weight).values
        alpha = node.attribute("alpha", 1.0)
        _, shift, abs_terms = affine.along(rows)
        bias = _bias(node, graph, weight, channels)
        transfer.constants[BIAS] = bias.affine(1.0, alpha * (shift @ matrix), abs(alpha) * (abs_terms @ np.abs(matrix)))
        _set_bias_attributes(node, graph, transfer)
    return transfer


# Gemm, constant A, B the data:  a scale along the columns passes to those of B, one along the rows goes into those of A;  forward
# alpha A (B*S + T) + beta C = alpha (A*S) B + (beta*C + alpha A T) along the rows of B, and along its columns a scale goes on.
def _has_constant_a(node: Node, graph: PresentGraph) -> bool:
    return graph.constant(node.inputs[0]) is not None and graph.constant(node.inputs[1]) is None


def _constant_a(node: Node, graph: PresentGraph) -> tuple[Constant, bool]:
    """Return (A, whether its columns, which meet the rows of B, come first)."""
    weight = graph.weight(node, 0)
    if len(weight.shape) != 2:
        raise ModelError(expected("a matrix", f"shape {weight.shape}", node.label))
    return weight, bool(node.attribute("transA", 0))


def _constant_a_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine = traveler.affine
    axis = axis_in(node, affine, 2)
    weight, columns_first = _constant_a(node, graph)
    rows, inner = weight.shape[::-1] if columns_first else weight.shape
    transfer = Transfer()
    if axis == 0:
        require_channels(node, affine, rows, "output")
        layout = WeightLayout(1, inner, rows, 1) if columns_first else WeightLayout(1, 1, rows, inner)
        transfer.constants[0] = scaled(weight, layout, affine.along(rows)[0])
    elif affine.scales:
        transfer.passed_on.append((MATRIX, affine.scale_only().at(_axis_of_b(node, axis or 0))))
    if affine.shifts or _has_bias(node) or graph.is_changed(node, BIAS):
        channels = affine.channels if axis is not None else 1
        shape = (channels, 1) if axis == 0 else (channels,)
        scale, shift, abs_terms = (part.reshape(shape) for part in affine.along(channels))
        _change_bias(node, graph, transfer, weight.dtype, shape, scale, shift, abs_terms)
    return transfer


def _constant_a_forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine = traveler.affine
    weight, columns_first = _constant_a(node, graph)
    rows, inner = weight.shape[::-1] if columns_first else weight.shape
    axis = axis_in(node, affine, 2)
    transfer = Transfer()
    if axis == _axis_of_b(node, 1):
        if affine.shifts or (affine.scale == 0).any():
            raise Refusal("shift-cannot-pass", f"a shift along the columns of B, or a scale of zero, cannot pass Gemm '{node.label}'")
        transfer.passed_on.append((0, affine.at(1)))
        if _has_bias(node) or graph.is_changed(node, BIAS):
            _change_bias(node, graph, transfer, weight.dtype, (affine.channels,), 1 / affine.scale, 0.0, 0.0)
        return transfer
    require_channels(node, affine, inner, "input")
    scale, shift, abs_terms = affine.along(inner)
    if affine.scales:
        layout = WeightLayout(1, 1, inner, rows) if columns_first else WeightLayout(1, rows, inner, 1)
        transfer.constants[0] = scaled(weight, layout, scale)
    if affine.shifts:
        matrix = Dense.of(weight).values.T if columns_first else Dense.of(weight).values
        alpha = node.attribute("alpha", 1.0)
        added, size = (alpha * (matrix @ shift))[:, None], (abs(alpha) * (np.abs(matrix) @ abs_terms))[:, None]
        _change_bias(node, graph, transfer, weight.dtype, (rows, 1), 1.0, added, size)
    return transfer


def _axis_of_b(node: Node, axis: int) -> int:
    """Return the axis of B that is its rows (0) or its columns (1)."""
    return 1 - axis if node.attribute("transB", 0) else axis


def _change_bias(
    node: Node,
    graph: PresentGraph,
    transfer: Transfer,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    scale: FloatArray | float,
    shift: FloatArray | float,
    abs_terms: FloatArray | float,
) -> None:
    """Put scale * beta * C + shift into a transfer; Refusal where C would grow."""
    if graph.is_changed(node, BIAS) or _has_bias(node):
        bias = graph.dense(node, BIAS)
        bias = bias if graph.is_changed(node, BIAS) else bias.times(_beta(node))
    else:
        bias = Dense.zeros(shape, dtype)
    changed = bias.affine(scale, shift, abs_terms)
    if changed.values.size > max(bias.values.size, math.prod(shape)) and bias.values.size > 1:
        raise Refusal("grows", f"C of Gemm '{node.label}' would grow from {bias.values.size} to {changed.values.size} values")
    transfer.constants[BIAS] = changed
    _set_bias_attributes(node, graph, transfer)


def _has_bias(node: Node) -> bool:
    return node.input(BIAS) is not None and _beta(node) != 0


def _beta(node: Node) -> float:
    return node.attribute("beta", 1.0)


def _bias(node: Node, graph: PresentGraph, weight: Constant, channels: int) -> Dense | Dequantized:
    """Return beta * C in float64, zeros where there is none; as it is where a DequantizeLinear gives it."""
    if not graph.is_changed(node, BIAS) and not _has_bias(node):
        return Dense.zeros((channels,), weight.dtype)
    constant = graph.tensor(node, BIAS)
    if _beta(node) == 1 and constant is not None and constant.shape == (channels,):
        return graph.bias(node, BIAS, (channels,), weight.dtype)
    bias = graph.dense(node, BIAS)
    if len(bias.shape) > 2 or (bias.shape and bias.shape[-1] not in (1, channels)):
        raise ModelError(expected(f"a C that broadcasts to {channels} columns", f"shape {bias.shape}", node.label))
    # A bias that an earlier fold has changed includes the factor beta already.
    return bias if graph.is_changed(node, BIAS) else bias.times(_beta(node))


def _set_bias_attributes(node: Node, graph: PresentGraph, transfer: Transfer) -> None:
    """The new C holds beta; before opset 7 a C that broadcasts must say so."""
    if _beta(node) != 1:
        transfer.attributes["beta"] = 1.0
    if graph.opset < 7:
        transfer.attributes["broadcast"] = 1


def _gemm_terms(node: Node, graph: PresentGraph) -> int:
    if _has_constant_a(node, graph):
        weight, columns_first = _constant_a(node, graph)
        return weight.shape[0 if columns_first else 1]
    return _matrix(node, graph)[2][0]


def _gemm_probe_shapes(node: Node, graph: PresentGraph) -> dict[int, tuple[int, ...] | None]:
    inner = _gemm_terms(node, graph)
    if _has_constant_a(node, graph):
        data = node.inputs[MATRIX]
        known = None if data is None else graph.probe_shape(data)
        columns = 3 if known is None or len(known) != 2 else known[_axis_of_b(node, 1)]
        return {MATRIX: (columns, inner) if node.attribute("transB", 0) else (inner, columns)}
    bias = graph.constant(node.input(BIAS))
    rows = bias.shape[0] if bias is not None and len(bias.shape) == 2 and bias.shape[0] > 1 else 3
    return {0: (inner, rows) if node.attribute("transA", 0) else (rows, inner)}


def _gemm_weight_matrix(node: Node, slot: int, values: NDArray[Any]) -> NDArray[Any] | None:
    if slot == 0:
        return values.T if node.attribute("transA", 0) else values
    if slot != MATRIX:
        return None
    return values if node.attribute("transB", 0) else values.T


def _gemm_bound(proto: NodeProto) -> list[NodeProto]:
    for attribute in proto.attribute:
        if attribute.name == "alpha":
            attribute.f = abs(attribute.f)
    return []


def _gemm_sizes(node: Node, inputs: Sequence[Sizes | None]) -> Sizes | None:
    first = inputs[0]
    if first is None or len(first) != 2:
        return None
    return (None if node.attribute("transA", 0) else first[0], None)


def _demanded_size(node: Node, weight: Sizes) -> tuple[int, Size]:
    if len(weight) != 2 or node.attribute("transA", 0):
        return -1, None
    return -1, weight[1 if node.attribute("transB", 0) else 0]


# MatMul, constant B:  backward (A B)*S = A (B*S) along its columns;  forward (A*S + T) B = A (S*B) + T B along its rows, and T B goes on as
# a shift.  Constant A: the same with rows and columns exchanged.  MatMul has no bias for a shift.  A scale along another axis passes
# unchanged.
def _matmul_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine = traveler.affine
    slot, weight, rank = _operands(node, affine, traveler.value, graph)
    axis = _other_axis(node, affine, slot, weight, rank, graph)
    if affine.shifts and axis is not None:
        raise Refusal(
            "shift-cannot-pass", f"a shift along axis {axis} cannot pass MatMul '{node.label}', whose output channels lie elsewhere"
        )
    if affine.shifts:
        raise Refusal("shift-cannot-pass", f"MatMul '{node.label}' has no bias to take the shift")
    if axis is not None:
        return Transfer(passed_on=[(1 - slot, affine.at(axis - rank))])
    layout = _layouts(weight, slot)[0]
    require_channels(node, affine, layout.channels, "output")
    return Transfer({slot: scaled(weight, layout, affine.along(layout.channels)[0])})


def _matmul_forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine = traveler.affine
    slot, weight, rank = _operands(node, affine, traveler.value, graph)
    if traveler.slot == slot:
        raise Refusal("no-absorber", f"MatMul '{node.label}' has no constant operand")
    axis = None if affine.axis is None else axis_in(node, affine, rank)
    contracted = rank - 1 if slot == 1 or rank == 1 else rank - 2
    if axis is not None and axis != contracted:
        if affine.shifts:
            raise Refusal("shift-cannot-pass", f"a shift along axis {axis} cannot pass MatMul '{node.label}'")
        if len(weight.shape) > 2:
            raise Refusal("axis", f"the weight of MatMul '{node.label}' mixes axis {axis}")
        # A product with a vector removes the contracted axis: the axes before it come one closer to the end.
        moves = int(len(weight.shape) < 2 and axis < contracted)
        return Transfer(passed_on=[(0, affine.at(axis - rank + moves))])
    layout = _layouts(weight, slot)[1]
    require_channels(node, affine, layout.channels, "input")
    transfer = Transfer()
    if affine.scales:
        transfer.constants[slot] = scaled(weight, layout, affine.along(layout.channels)[0])
    if affine.shifts:
        if len(weight.shape) != 2:
            raise Refusal(
                "shift-cannot-pass", f"the weight of MatMul '{node.label}' is no matrix, so the shift is not one number per channel"
            )
        matrix = Dense.of(weight).values if slot == 1 else Dense.of(weight).values.T
        _, shift, abs_terms = affine.along(layout.channels)
        total, size = shift @ matrix, abs_terms @ np.abs(matrix)
        transfer.passed_on.append((0, Affine(np.ones_like(total), total, -1 if slot == 1 or rank == 1 else -2, 0, size)))
    return transfer


def _weight_slot(node: Node, graph: PresentGraph) -> int:
    return 1 if graph.constant(node.inputs[1]) is not None or graph.constant(node.inputs[0]) is None else 0


def _operands(node: Node, affine: Affine, value: Value, graph: PresentGraph) -> tuple[int, Constant, int]:
    """Return (slot of the weight, the weight, rank of a value); the rank counts only where the affine has an axis."""
    slot = _weight_slot(node, graph)
    weight = graph.weight(node, slot)
    rank = graph.rank(value)
    # A weight on the right meets the last axis, whatever the rank. One on the left meets the last axis but one of a matrix and the only
    # axis of a vector, so that the rank has to be known.
    if rank is None and (slot == 0 or (affine.axis is not None and affine.axis >= 0)):
        raise Refusal("axis-unknown", f"the rank of '{value.name}' at MatMul '{node.label}' is not known, so the axis cannot be placed")
    fewest = len(weight.shape) - (graph.rank(node.inputs[1 - slot]) == 1)
    if affine.rank > (rank or fewest):
        raise Refusal("axis-unknown", f"a constant of rank {affine.rank} may widen the value at MatMul '{node.label}'")
    return slot, weight, rank or max(len(weight.shape), 2)


def _other_axis(node: Node, affine: Affine, slot: int, weight: Constant, rank: int, graph: PresentGraph) -> int | None:
    """Return None where the affine runs along the weight's own output channels, else its axis, which is one of the other operand."""
    if affine.axis is None:
        return None
    axis = axis_in(node, affine, rank)
    if len(weight.shape) < 2:
        raise Refusal("axis", f"the weight of MatMul '{node.label}' is a vector: its output has no axis for it")
    is_vector = graph.rank(node.inputs[1 - slot]) == 1
    if axis == (rank - 1 if slot == 1 or is_vector else rank - 2):
        return None
    if len(weight.shape) > 2:
        raise Refusal("axis", f"its channels are axis {axis}, which is not the output channels of MatMul '{node.label}'")
    return axis


def _layouts(weight: Constant, slot: int) -> tuple[WeightLayout, WeightLayout]:
    """Return the layouts of a weight that take a scale on its (output, input) channels."""
    shape = weight.shape
    if not shape or 0 in shape:
        raise ModelError(expected("a weight that is a vector or a stack of matrices", f"shape {shape}", "MatMul"))
    if len(shape) == 1:
        return WeightLayout(1, 1, 1, shape[0]), WeightLayout(1, 1, shape[0], 1)
    rows = WeightLayout(1, math.prod(shape[:-2]), shape[-2], shape[-1])
    columns = WeightLayout(1, math.prod(shape[:-1]), shape[-1], 1)
    return (columns, rows) if slot == 1 else (rows, columns)


def _matmul_terms(node: Node, graph: PresentGraph) -> int:
    slot = _weight_slot(node, graph)
    return _layouts(graph.weight(node, slot), slot)[1].channels


def _matmul_probe_shapes(node: Node, graph: PresentGraph) -> dict[int, tuple[int, ...] | None]:
    slot = _weight_slot(node, graph)
    weight, inner = graph.weight(node, slot).shape, _matmul_terms(node, graph)
    data = node.inputs[1 - slot]
    shape = None if data is None else graph.probe_shape(data)
    if not shape or len(weight) > 2:
        more = len(shape or ()) - max(len(weight), 2)
        shape = (*[2] * more, *weight[:-2], 3, 3)
    sizes = list(shape)
    sizes[-1 if slot == 1 or len(sizes) == 1 else -2] = inner
    return {1 - slot: tuple(sizes)}


def _matmul_weight_matrix(node: Node, slot: int, values: NDArray[Any]) -> NDArray[Any] | None:
    if values.ndim > 1 and slot == 1:
        values = values.swapaxes(-1, -2)
    return values.reshape(-1, values.shape[-1])


def _matmul_sizes(node: Node, inputs: Sequence[Sizes | None]) -> Sizes | None:
    first, second = inputs[0], inputs[1] if len(inputs) > 1 else None
    if first is None or second is None or len(second) != 2:
        return None
    return (*first[:-1], None)


# ---- how long they take for constants: one step for a product, or for several at once ----


def _gemm_work(node: Node, arrays: Sequence[NDArray[Any] | None], size: float) -> float:
    first = arrays[0]
    assert first is not None, "an operand that ONNX demands"
    return size * first.shape[0 if node.attribute("transA", 0) else -1] / AT_ONCE if first.ndim else size


MATMUL = {
    "Gemm": Row(
        _gemm_backward,
        _gemm_forward,
        channel_axis=1,
        bias_slot=BIAS,
        bias_factor=_beta,
        terms=_gemm_terms,
        probe_shapes=_gemm_probe_shapes,
        weight_matrix=_gemm_weight_matrix,
        bound=_gemm_bound,
        sizes=_gemm_sizes,
        demanded_size=_demanded_size,
        work=_gemm_work,
    ),
    "MatMul": Row(
        _matmul_backward,
        _matmul_forward,
        has_no_place_for_shift=True,
        terms=_matmul_terms,
        probe_shapes=_matmul_probe_shapes,
        weight_matrix=_matmul_weight_matrix,
        sizes=_matmul_sizes,
        demanded_size=_demanded_size,
        work=_gemm_work,
    ),
    **dict.fromkeys(("MatMulInteger", "QLinearMatMul"), Row(work=_gemm_work)),
}
