"""Arithmetic of two operands and of one: Add, Sub, Mul, Div, Sum, Neg; others that only constants and sizes meet.

An operand may be a constant: then the node is an affine itself, and takes another one into its constant (`with_constant`).

| node              | affine                    |
|-------------------|---------------------------|
| Add(x, c)         | scale = 1, shift = c      |
| Sub(x, c)         | scale = 1, shift = -c     |
| Sub(c, x)         | scale = -1, shift = c     |
| Mul(x, c)         | scale = c, shift = 0      |
| Div(x, c)         | scale = 1 / c, shift = 0  |
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from fastbn.graph.model.constant import Dense
from fastbn.graph.model.node import Node, Value
from fastbn.graph.ops.affine import Affine, FloatArray
from fastbn.graph.ops.convolution import merged_into_sibling
from fastbn.graph.ops.multiples import around_multiples
from fastbn.graph.ops.placing import FIRST_BROADCASTING_OPSET, axis_in, both_ways, constant_slot, is_wide, require_sign
from fastbn.graph.ops.row import PresentGraph, Row, Skip, Transfer, Traveler, one_term
from fastbn.graph.ops.shape_rules import broadcast_size, broadcast_sizes, each_once, first_size, product_elements, same_sizes
from fastbn.graph.reasons import Refusal

__all__ = ["ELEMENTWISE"]


# ---- one operand is a constant ----


def _lift(node: Node, graph: PresentGraph) -> Affine | None:
    slot = constant_slot(node, graph)
    constant = None if slot is None else graph.tensor(node, slot)
    if constant is None:
        return None
    long_axes = [axis - len(constant.shape) for axis, size in enumerate(constant.shape) if size != 1]
    if len(long_axes) > 1 or 0 in constant.shape:
        return None
    dense = Dense.of(constant)
    values = dense.values.reshape(-1)
    ones, zeros = np.ones_like(values), np.zeros_like(values)
    if node.op == "Div" and slot == 0:
        return None
    with np.errstate(divide="ignore", over="ignore"):
        scale, shift = {
            "Add": (ones, values),
            "Sub": (ones, -values) if slot == 1 else (-ones, values),
            "Mul": (values, zeros),
            "Div": (1 / values, zeros),
        }[node.op]
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return None
    abs_terms = dense.abs_terms.reshape(-1) if node.op in ("Add", "Sub") else zeros
    return Affine(scale, shift, long_axes[0] if long_axes else None, len(constant.shape), abs_terms)


def _data_slot(node: Node, graph: PresentGraph) -> int:
    return 1 - _constant(node, graph)


def _constant(node: Node, graph: PresentGraph) -> int:
    slot = constant_slot(node, graph)
    assert slot is not None, "the row of a node with a constant"
    return slot


# Add, Sub with a constant c:  backward S*(x + c) + T = S*x + (S*c + T), S*(x - c) + T = S*x - (S*c - T), S*(c - x) + T = (S*c + T) - S*x,
# and the scale goes on to x;  forward (S*x + T) + c = S*(x + c/S) + T, or x + (c + T) where S is 1.
def _add_constant_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine, slot = traveler.affine, _constant(node, graph)
    constant = graph.dense(node, slot)
    scale, shift, abs_terms = _shaped(node, affine, 1 - slot, constant, graph)
    sign = -1.0 if node.op == "Sub" and slot == 1 else 1.0
    new = constant.affine(scale, sign * shift, abs_terms)
    further = [(1 - slot, affine.scale_only())] if affine.scales else []
    return Transfer({slot: new}, passed_on=further, objection=_growth(node, constant, new))


def _add_constant_forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine, slot = traveler.affine, _constant(node, graph)
    constant = graph.dense(node, slot)
    scale, shift, abs_terms = _shaped(node, affine, traveler.slot, constant, graph)
    if not affine.scales:
        # x + T + c, x + T - c, c - (x + T): the constant takes the shift and nothing goes on.
        new = constant.affine(1.0, -shift if node.op == "Sub" else shift, abs_terms)
        return Transfer({slot: new}, objection=_growth(node, constant, new))
    if (affine.scale == 0).any():
        raise Refusal("no-absorber", f"a scale of zero cannot be taken out before {node.op} '{node.label}'")
    new = constant.times(1 / scale)
    # c - (S x + T) = S (c/S - x) - T
    further = affine.negated_shift() if node.op == "Sub" and slot == 0 else affine
    return Transfer({slot: new}, passed_on=[(0, further)], objection=_growth(node, constant, new))


# Mul, Div with a constant c:  backward S*(x * c) = x * (S*c), S*(x / c) = x / (c/S), and T finds no place;  forward (S*x + T) * c =
# (S*c) * x + T*c: the constant takes the scale, and T*c goes on. A product of one element may become one per channel.
def _multiply_constant_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine, slot = traveler.affine, _constant(node, graph)
    constant = graph.dense(node, slot)
    if is_wide(affine, graph.shape(node.outputs[0])):
        scale = affine.shaped(None)[0]
    else:
        scale, _, _ = _shaped(node, affine, 1 - slot, constant, graph)
    if affine.shifts:
        raise Refusal("shift-cannot-pass", f"{node.op} '{node.label}' has no constant to take the shift")
    new = constant.times(_as_factor(node, slot, scale))
    return Transfer({slot: new}, objection=_growth(node, constant, new))


def _multiply_constant_forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine, slot = traveler.affine, _constant(node, graph)
    constant = graph.dense(node, slot)
    if node.op == "Div" and slot == 0:
        raise Refusal("no-absorber", f"it is the divisor of Div '{node.label}'")
    scale, shift, abs_terms = _shaped(node, affine, traveler.slot, constant, graph)
    new = constant.times(_as_factor(node, slot, scale)) if affine.scales else constant
    transfer = Transfer({slot: new} if affine.scales else {}, objection=_growth(node, constant, new))
    if affine.shifts:
        factor = constant.values if node.op == "Mul" else 1 / constant.values
        moved, size = shift * factor, abs_terms * np.abs(factor)
        long_axes = [axis - moved.ndim for axis, length in enumerate(moved.shape) if length != 1]
        if len(long_axes) > 1:
            raise Refusal("shift-cannot-pass", f"the shift behind {node.op} '{node.label}' is not one number per channel")
        moved, size = moved.reshape(-1), size.reshape(-1)
        transfer.passed_on.append((0, Affine(np.ones_like(moved), moved, long_axes[0] if long_axes else None, affine.rank, size)))
    return transfer


def _factor_reach(node: Node, slot: int, graph: PresentGraph) -> float:
    return math.inf if node.op == "Div" and slot == 1 else 1.0


def _as_factor(node: Node, slot: int, scale: FloatArray) -> FloatArray:
    """Return what multiplies the constant so that the result has the scale."""
    if node.op == "Mul" or slot == 0:
        return scale
    if (scale == 0).any():
        raise Refusal("no-absorber", f"a scale of zero cannot go into the divisor of Div '{node.label}'")
    factor: FloatArray = 1 / scale
    return factor


def _shaped(node: Node, affine: Affine, data_slot: int, constant: Dense, graph: PresentGraph) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the affine in the shape that meets the node's constant; Refusal where the node widens its data along the axis."""
    rank = graph.rank(node.outputs[0])
    if rank is None and affine.axis is not None and affine.axis >= 0:
        raise Refusal(
            "axis-unknown", f"the rank of the output of {node.op} '{node.label}' is not known, so axis {affine.axis} cannot be placed"
        )
    if affine.rank > (len(constant.shape) if rank is None else rank):
        raise Refusal("axis-unknown", f"a constant of rank {affine.rank} may widen the value at {node.op} '{node.label}'")
    axis = None if rank is None else axis_in(node, affine, rank)
    data = graph.shape(node.inputs[data_slot])
    if axis is not None and data is not None and (len(data) != rank or data[axis] not in (None, affine.channels)):
        raise Refusal("axis", f"{node.op} '{node.label}' makes the {affine.channels} channels by broadcasting a narrower value")
    scale, shift, abs_terms = affine.shaped(rank)
    if any(len({*sizes} - {1}) > 1 for sizes in zip(scale.shape[::-1], constant.shape[::-1], strict=False)):
        raise Refusal("axis", f"{affine.channels} channels meet the constant of {node.op} '{node.label}', which has shape {constant.shape}")
    return scale, shift, abs_terms


def _growth(node: Node, constant: Dense, new: Dense) -> Refusal | None:
    """Return what a node says against a constant that would be larger than it is."""
    if new.values.size <= max(constant.values.size, new.values.shape[0] if new.values.ndim else 1) or constant.values.size == 1:
        return None
    return Refusal("grows", f"the constant of {node.op} '{node.label}' would grow from {constant.values.size} to {new.values.size} values")


def _constant_probe_shapes(node: Node, graph: PresentGraph) -> dict[int, tuple[int, ...] | None]:
    slot = _constant(node, graph)
    constant, data = graph.constant(node.inputs[slot]), node.inputs[1 - slot]
    shape = () if constant is None else constant.shape
    known = None if data is None else graph.probe_shape(data)
    return {1 - slot: known or tuple(2 if size == 1 else size for size in shape) or (2,)}


# ---- no operand is a constant ----


# Add, Sub, Sum of values that are no constants:  S (a + b) + T = (S a + T) + S b: the scale goes to each, the shift to one of them.
# Forward a scale needs every operand to have it, a shift passes.  Where the other operand is a convolution of the same value, the affine
# becomes the center of its kernel (RepVGG); otherwise the producers of the other operands are asked to make up for it. Or an operand stays
# as it is, where a convolution of the same value makes up for it (RepViT).
def _sum_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Iterable[Transfer]:
    affine, skip = traveler.affine, traveler.skip
    parts = [_narrowed(node, affine, traveler.value, value, graph) for value in node.inputs]
    scales = [part.scale_only() for part in parts]
    signs = [-1.0 if node.op == "Sub" and slot == 1 else 1.0 for slot in range(len(parts))]
    takers = range(len(parts)) if affine.shifts or skip is not None else range(1)
    if node.op == "Sub":
        parts[1] = parts[1].negated_shift()
    for taker in takers:
        passed_on = [(slot, parts[slot] if slot == taker else scales[slot]) for slot in range(len(parts)) if slot == taker or affine.scales]
        asked = None if skip is None else (taker, Skip(skip.source, skip.scale.times(signs[taker])))
        yield Transfer(passed_on=passed_on, skip=asked)
    if affine.shifts and skip is None and traveler.may_rearrange:  # where the operands come from one value, each may want the same of it
        yield Transfer(passed_on=[(slot, part.share(len(parts))) for slot, part in enumerate(parts)])
    if affine.scales:
        added = [None if skip is None else _narrowed(node, skip.scale, traveler.value, value, graph) for value in node.inputs]
        yield from around_multiples(node, parts, signs, skip, added, graph)


def _sum_forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    if traveler.affine.scales:
        return merged_into_sibling(node, traveler, graph) or _joined(node, traveler, graph)
    return Transfer(passed_on=[(0, _behind_sum(node, traveler, graph))])


def _behind_sum(node: Node, traveler: Traveler, graph: PresentGraph) -> Affine:
    """Return the affine that a sum lacks where its operand lacks one."""
    affine = _narrowed(node, traveler.affine, traveler.value, node.outputs[0], graph)
    return affine.negated_shift() if node.op == "Sub" and traveler.slot == 1 else affine


def _joined(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    """(S x + T) + b = S (x + b/S) + T: the other operands are asked for what makes up for the scale."""
    if not traveler.may_rearrange or (traveler.affine.scale == 0).any():
        raise Refusal("other-branch", f"{node.op} '{node.label}' adds it to a value that does not have its scale")
    behind = _behind_sum(node, traveler, graph)
    undone = behind.inverse().scale_only()
    others = [slot for slot in range(len(node.inputs)) if slot != traveler.slot]
    # A generator, because the search gives up after a few of very many operands.
    required = ((slot, _narrowed(node, undone, node.outputs[0], node.inputs[slot], graph)) for slot in others)
    return Transfer(passed_on=[(0, behind)], required=required)


# Forward, from several operands:  S a + Ta + S b + Tb = S (a + b) + (Ta + Tb), and those that do not have the affine have S = 1;
# (Sa a) (Sb b) = Sa Sb (a b).
def _sum_join(node: Node, affines: Mapping[int, Affine], graph: PresentGraph) -> Transfer:
    parts = _aligned(node, affines, graph)
    scale = parts[0].scale
    complete = len(affines) == len(node.inputs)
    if any((part.scale != scale).any() for part in parts) or not (complete or (scale == 1).all()):
        raise Refusal("other-branch", f"{node.op} '{node.label}' adds values that do not have the same scale")
    signs = [-1.0 if node.op == "Sub" and slot == 1 else 1.0 for slot in affines]
    shift = sum((sign * part.shift for sign, part in zip(signs, parts, strict=True)), np.zeros_like(scale))
    abs_terms = sum((part.abs_terms for part in parts), np.zeros_like(scale))
    return Transfer(passed_on=[(0, Affine(scale, shift, parts[0].axis, 0, abs_terms))])


def _product_join(node: Node, affines: Mapping[int, Affine], graph: PresentGraph) -> Transfer:
    for affine in affines.values():
        _refuse_shift(node, affine)
    first, second = _aligned(node, dict(sorted(affines.items())), graph)
    if node.op == "Mul":
        scale = first.scale * second.scale
    elif (second.scale == 0).any():
        raise Refusal("no-absorber", f"a scale of zero cannot be taken out of the divisor of Div '{node.label}'")
    else:
        scale = first.scale / second.scale
    return Transfer(passed_on=[(0, Affine(scale, np.zeros_like(scale), first.axis, 0))])


def _aligned(node: Node, affines: Mapping[int, Affine], graph: PresentGraph) -> list[Affine]:
    """Return affines of operands as they lie along one axis of the result, in the order of the slots given."""
    parts = [_narrowed(node, affine, node.inputs[slot], node.outputs[0], graph) for slot, affine in affines.items()]
    longest = max(parts, key=lambda part: part.channels)
    places = {_place(node, part, graph) for part in parts if part.channels > 1}
    if len(places) > 1 or any(part.channels not in (1, longest.channels) for part in parts):
        raise Refusal("other-branch", f"{node.op} '{node.label}' joins affines along different axes")
    return [Affine(*part.along(longest.channels)[:2], longest.axis, 0, part.along(longest.channels)[2]) for part in parts]


def _place(node: Node, affine: Affine, graph: PresentGraph) -> int | None:
    rank = graph.rank(node.outputs[0])
    return affine.axis if rank is None else axis_in(node, affine, rank)


def _narrowed(node: Node, affine: Affine, source: Value | None, target: Value | None, graph: PresentGraph) -> Affine:
    """Return the affine along the axis of another value that broadcasts with this one; Refusal where it does not fit."""
    before, after = graph.shape(source), graph.shape(target)
    if before is None or after is None:
        raise Refusal("axis-unknown", f"the shapes at {node.op} '{node.label}' are not known")
    if graph.opset < FIRST_BROADCASTING_OPSET and node.attribute("broadcast", 0):
        raise Refusal("axis", f"{node.op} '{node.label}' broadcasts along an axis that it names, as opset {graph.opset} does")
    axis = axis_in(node, affine, len(before)) if affine.axis is not None else None
    if axis is None:
        return affine
    behind = axis - len(before)
    # Forward, what has more than one channel is not repeated.
    is_kept = target is node.outputs[0] and affine.channels > 1 and -behind <= len(after) and after[behind] is None
    if not is_kept and (-behind > len(after) or after[behind] is None or after[behind] != affine.channels):
        raise Refusal("axis", f"{node.op} '{node.label}' makes the {affine.channels} channels by broadcasting")
    return affine.at(behind + len(after))


# Mul, Div of values that are no constants:  S (a * b) = (S a) * b, S (a / b) = a / (b / S): either operand takes it, no shift passes.
def _product_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> list[Transfer]:
    affine = traveler.affine
    _refuse_shift(node, affine)
    choices: list[Transfer] = []
    wide: list[Transfer] = []
    refused = Refusal("no-absorber", f"{node.op} '{node.label}' has no factor that takes the scale")
    for slot, value in enumerate(node.inputs):
        if node.op == "Div" and slot == 1:
            if (affine.scale == 0).any():
                continue
            affine = affine.inverse()
        try:
            choices.append(Transfer(passed_on=[(slot, _narrowed(node, affine, traveler.value, value, graph))]))
        except Refusal as refusal:
            refused = refusal
            asked = _widening(node, affine, traveler.value, graph)
            if is_wide(asked, graph.shape(value)):
                wide.append(Transfer(passed_on=[(slot, asked)]))
    if not choices and not wide:
        raise refused
    return choices + wide


def _widening(node: Node, affine: Affine, source: Value, graph: PresentGraph) -> Affine:
    """Return an affine of a value with its axis counted from the end, as it lies in a value that broadcasts with this one."""
    rank, axis = graph.rank(source), affine.axis
    if axis is not None and axis >= 0 and rank is not None:
        axis = (axis_in(node, affine, rank) or 0) - rank
    return Affine(affine.scale, affine.shift, axis, -axis if axis is not None and axis < 0 else 0, affine.abs_terms)


def _product_forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    _refuse_shift(node, traveler.affine)
    if node.op == "Div" and traveler.slot == 1:
        raise Refusal("no-absorber", f"it is the divisor of Div '{node.label}'")
    return Transfer(passed_on=[(0, _narrowed(node, traveler.affine, traveler.value, node.outputs[0], graph))])


def _refuse_shift(node: Node, affine: Affine) -> None:
    if affine.shifts:
        raise Refusal("shift-cannot-pass", f"a shift cannot pass {node.op} '{node.label}' of two values")


# Mean of n values:  S mean(a, b) + T = mean(S a + T, S b + T); forward a shift T of one of them is T / n behind it.
# Max, Min:  S max(a, b) + T = max(S a + T, S b + T) where S >= 0.  Where:  either value.
def _each_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    if node.op in ("Max", "Min"):
        require_sign(node, traveler.affine, 0)
    slots = range(1, 3) if node.op == "Where" else range(len(node.inputs))
    return Transfer(passed_on=[(slot, _narrowed(node, traveler.affine, traveler.value, node.inputs[slot], graph)) for slot in slots])


def _mean_forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    if traveler.affine.scales:
        raise Refusal("other-branch", f"Mean '{node.label}' joins it with a value that does not have its scale")
    behind, count = _narrowed(node, traveler.affine, traveler.value, node.outputs[0], graph), len(node.inputs)
    return Transfer(passed_on=[(0, Affine(behind.scale, behind.shift / count, behind.axis, behind.rank, behind.abs_terms / count))])


def _number_of_operands(node: Node, graph: PresentGraph) -> int:
    return len(node.inputs)


# Neg:  -(S x + T) = S (-x) - T.
def _negative(node: Node, affine: Affine, source: Value, target: Value, graph: PresentGraph) -> Affine:
    return affine.negated_shift()


# ---- what is rounded, and how large results are ----


def _sub_bound(proto: NodeProto) -> list[NodeProto]:
    proto.op_type = "Add"
    return []


def _min_bound(proto: NodeProto) -> list[NodeProto]:
    proto.op_type = "Max"
    return []


def _neg_bound(proto: NodeProto) -> list[NodeProto]:
    proto.op_type = "Identity"
    return []


def _division_size(node: Node, arrays: Sequence[NDArray[Any]]) -> float | None:
    """None where an integer division has no result: some processors stop the process there."""
    if len(arrays) == 2 and arrays[1].dtype.kind in "iu":
        divided, divisor = arrays
        if (divisor == 0).any() or ((divisor == -1).any() and (divided == np.iinfo(divided.dtype).min).any()):
            return None
    return broadcast_size(node, arrays)


_TWO = Row(broadcasts=True, terms=one_term, sizes=broadcast_sizes, result_size=broadcast_size)
_SUM = replace(_TWO, backward=_sum_backward, forward=_sum_forward, join=_sum_join, takes_skip=True)
_PRODUCT = replace(_TWO, backward=_product_backward, forward=_product_forward, join=_product_join, takes_wide=True)
_CONSTANT = replace(_TWO, lift=_lift, data_slot=_data_slot, probe_shapes=_constant_probe_shapes)
_ADD_CONSTANT = replace(_CONSTANT, backward=_add_constant_backward, forward=_add_constant_forward)
_MULTIPLY_CONSTANT = replace(
    _CONSTANT, backward=_multiply_constant_backward, forward=_multiply_constant_forward, takes_wide=True, factor_reach=_factor_reach
)
_NEGATIVE = both_ways(_negative)
_EXTREME = Row(_each_backward, broadcasts=True, sizes=broadcast_sizes, result_size=broadcast_size)

# One operand, whose shape the result has.
_SAME_EVALUATED = Row(sizes=same_sizes, result_size=broadcast_size)

ELEMENTWISE = {
    "Add": replace(_SUM, with_constant=_ADD_CONSTANT),
    "Sub": replace(_SUM, with_constant=replace(_ADD_CONSTANT, bound=_sub_bound), bound=_sub_bound),
    "Mul": replace(_PRODUCT, with_constant=_MULTIPLY_CONSTANT, list_elements=product_elements),
    "Div": replace(_PRODUCT, with_constant=replace(_MULTIPLY_CONSTANT, result_size=_division_size), result_size=_division_size),
    "Sum": _SUM,
    "Neg": replace(_SAME_EVALUATED, backward=_NEGATIVE[0], forward=_NEGATIVE[1], bound=_neg_bound),
    "Max": _EXTREME,
    "Min": replace(_EXTREME, bound=_min_bound),
    "Where": Row(_each_backward, broadcasts=True, result_size=broadcast_size),
    "Mean": Row(_each_backward, _mean_forward, broadcasts=True, terms=_number_of_operands, result_size=broadcast_size),
    "Pow": Row(sizes=broadcast_sizes, result_size=broadcast_size),
    "Mod": Row(result_size=_division_size),
    **dict.fromkeys(
        ("And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Xor"),
        Row(result_size=broadcast_size),
    ),
    **dict.fromkeys(("Acos", "Asin", "Atan", "Cos", "Round", "Sign", "Sin", "Tan"), Row(result_size=broadcast_size)),
    **dict.fromkeys(("Ceil", "Exp", "Floor", "Log", "Reciprocal", "Sqrt"), _SAME_EVALUATED),
    "Clip": Row(sizes=same_sizes, result_size=first_size),
    "Erf": _SAME_EVALUATED,
    **dict.fromkeys(("Acosh", "Asinh", "Atanh", "Cosh", "IsInf", "IsNaN", "Sinh"), Row(work=each_once)),
    **dict.fromkeys(("CumProd", "CumSum"), Row(size_slots=(1,), work=each_once)),
    **dict.fromkeys(("BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"), Row(work=each_once)),
}
