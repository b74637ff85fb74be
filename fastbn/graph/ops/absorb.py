"""Table one: the operators that take a per-channel affine into constants they already have, one row per operator (row.Row)."""

import numpy as np

from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.lift import constant_slot
from fastbn.graph.ops.products import PRODUCTS
from fastbn.graph.ops.row import Row, Taken, axis_in, axis_of, require_axis, require_channels
from fastbn.graph.ops.weights import batch_norm_sample, elementwise_sample, no_sample, one_term
from fastbn.graph.reasons import Refusal

__all__ = ["ABSORBERS"]


# BatchNormalization, n its normalised input, s its scale:  backward S*(weight * n + bias) + T = (S*weight) n + (S*bias + T);  forward
# s (S x + T - mean) + bias = s S (x - mean) + (bias + s (T - mean (1 - S))).
def _batch_norm_backward(node, affine, view):
    if view.affine(node) is None:
        raise Refusal("no-absorber", f"it reads {node.op} '{node.label}', which must stay as it is")
    weight, bias = view.dense(node, 1), view.dense(node, 2)
    require_axis(node, affine, axis_of(node, affine, node.outputs[0], view), 1, "output")
    require_channels(node, affine, weight.shape[0], "output")
    scale, shift, spread = affine.along(weight.shape[0])
    return Taken({1: weight.times(scale), 2: bias.affine(scale, shift, spread)})


def _batch_norm_forward(node, slot, affine, view):
    own = view.affine(node)
    if slot != 0 or own is None:
        raise Refusal("no-absorber", f"{node.op} '{node.label}' reads it, which must stay as it is")
    weight, bias, mean = (view.dense(node, at) for at in (1, 2, 3))
    require_axis(node, affine, axis_of(node, affine, node.inputs[0], view), 1, "input")
    require_channels(node, affine, weight.shape[0], "input")
    scale, shift, spread = affine.along(weight.shape[0])
    moved = own.scale * (shift - mean.values * (1 - scale))
    size = np.abs(own.scale) * (spread + np.abs(mean.values * (1 - scale)))
    return Taken({1: weight.times(scale), 2: bias.affine(1.0, moved, size)})


# Add, Sub with a constant c:  backward S*(x + c) + T = S*x + (S*c + T), S*(x - c) + T = S*x - (S*c - T), S*(c - x) + T = (S*c + T) - S*x,
# and the scale goes on to x;  forward (S*x + T) + c = S*(x + c/S) + T, or x + (c + T) where S is 1.
def _add_backward(node, affine, view):
    slot, constant = _operand(node, view)
    scale, shift, spread = _shaped(node, affine, 1 - slot, constant, view)
    sign = -1.0 if node.op == "Sub" and slot == 1 else 1.0
    new = constant.affine(scale, sign * shift, spread)
    _refuse_growth(node, constant, new)
    return Taken({slot: new}, onward=[(1 - slot, affine.scale_only())] if affine.scales else [])


def _add_forward(node, at, affine, view):
    slot, constant = _operand(node, view)
    scale, shift, spread = _shaped(node, affine, at, constant, view)
    minus = node.op == "Sub" and slot == 0
    if not affine.scales:
        # x + T + c, x + T - c, c - (x + T): the constant takes the shift and nothing goes on.
        new = constant.affine(1.0, -shift if (node.op == "Sub") else shift, spread)
        _refuse_growth(node, constant, new)
        return Taken({slot: new})
    if (affine.scale == 0).any():
        raise Refusal("no-absorber", f"a scale of zero cannot be taken out before {node.op} '{node.label}'")
    new = constant.times(1 / scale)
    _refuse_growth(node, constant, new)
    # c - (S x + T) = S (c/S - x) - T
    onward = Affine(affine.scale, -affine.shift if minus else affine.shift, affine.axis, affine.rank, affine.abs_terms)
    return Taken({slot: new}, onward=[(0, onward)])


# Mul, Div with a constant c:  backward S*(x * c) = x * (S*c), S*(x / c) = x / (c/S), and T finds no place;  forward (S*x + T) * c =
# (S*c) * x + T*c: the constant takes the scale, and T*c goes on.
def _mul_backward(node, affine, view):
    slot, constant = _operand(node, view)
    scale, _, _ = _shaped(node, affine, 1 - slot, constant, view)
    if affine.shifts:
        raise Refusal("shift-cannot-pass", f"{node.op} '{node.label}' has no constant to take the shift")
    new = constant.times(_into_factor(node, slot, scale))
    _refuse_growth(node, constant, new)
    return Taken({slot: new})


def _mul_forward(node, at, affine, view):
    slot, constant = _operand(node, view)
    if node.op == "Div" and slot == 0:
        raise Refusal("no-absorber", f"it is the divisor of Div '{node.label}'")
    scale, shift, spread = _shaped(node, affine, at, constant, view)
    new = constant.times(_into_factor(node, slot, scale)) if affine.scales else constant
    _refuse_growth(node, constant, new)
    taken = Taken({slot: new} if affine.scales else {})
    if affine.shifts:
        factor = constant.values if node.op == "Mul" else 1 / constant.values
        moved, size = shift * factor, spread * np.abs(factor)
        wide = [axis - moved.ndim for axis, length in enumerate(moved.shape) if length != 1]
        if len(wide) > 1:
            raise Refusal("shift-cannot-pass", f"the shift behind {node.op} '{node.label}' is not one number per channel")
        moved, size = moved.reshape(-1), size.reshape(-1)
        taken.onward.append((0, Affine(np.ones_like(moved), moved, wide[0] if wide else None, affine.rank, size)))
    return taken


def _into_factor(node, slot, scale):
    if node.op == "Mul" or slot == 0:
        return scale
    if (scale == 0).any():
        raise Refusal("no-absorber", f"a scale of zero cannot go into the divisor of Div '{node.label}'")
    return 1 / scale


def _operand(node, view):
    slot = constant_slot(node, view.index)
    if slot is None:
        raise Refusal("no-absorber", f"it meets {node.op} '{node.label}' of two values that are no constants")
    return slot, view.dense(node, slot)


def _shaped(node, affine, data_slot, constant, view):
    """Return the affine in the shape that meets the node's constant; Refusal where the node widens its data along the axis."""
    rank = view.rank(node.outputs[0])
    if rank is None and affine.axis is not None and affine.axis >= 0:
        raise Refusal(
            "axis-unknown", f"the rank of the output of {node.op} '{node.label}' is not known, so axis {affine.axis} cannot be placed"
        )
    if affine.rank > (len(constant.shape) if rank is None else rank):
        raise Refusal("axis-unknown", f"a constant of rank {affine.rank} may widen the value at {node.op} '{node.label}'")
    if rank is not None:
        axis_in(node, affine, rank)
    data = view.shape(node.inputs[data_slot])
    if affine.axis is not None and data is not None and rank is not None:
        at = affine.axis - len(data) if affine.axis >= 0 and len(data) < rank else (affine.axis % rank - rank)
        if len(data) < -at or len(data) != rank or data[at] not in (None, affine.channels):
            raise Refusal("axis", f"{node.op} '{node.label}' makes the {affine.channels} channels by broadcasting a narrower value")
    scale, shift, spread = affine.shaped(rank)
    if any(len({*sizes} - {1}) > 1 for sizes in zip(scale.shape[::-1], constant.shape[::-1], strict=False)):
        raise Refusal("axis", f"{affine.channels} channels meet the constant of {node.op} '{node.label}', which has shape {constant.shape}")
    return scale, shift, spread


def _refuse_growth(node, constant, new):
    if new.values.size > max(constant.values.size, new.values.shape[0] if new.values.ndim else 1) and constant.values.size > 1:
        raise Refusal(
            "grows", f"the constant of {node.op} '{node.label}' would grow from {constant.values.size} to {new.values.size} values"
        )


ABSORBERS = {
    **PRODUCTS,
    "BatchNormalization": Row(_batch_norm_backward, _batch_norm_forward, one_term, batch_norm_sample),
    "Add": Row(_add_backward, _add_forward, one_term, elementwise_sample),
    "Sub": Row(_add_backward, _add_forward, one_term, elementwise_sample),
    "Mul": Row(_mul_backward, _mul_forward, one_term, elementwise_sample),
    "Div": Row(_mul_backward, _mul_forward, one_term, elementwise_sample),
    # The weight of one of the above may stand behind it, and a scale goes into its own.
    "DequantizeLinear": Row(None, None, one_term, no_sample),
}
