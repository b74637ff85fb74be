"""Table one: the operators that take a per-channel affine into constants they already have, one row per operator.

A row answers two questions about a node and an affine S, T:

* backward: the value that the node gives must become S * value + T; which of its constants change, and what is asked of its inputs?
* forward: an input of the node is S * input + T no more but plain `input`; which of its constants make up for it, and what remains to be
  made up for behind its outputs?

Both return Taken, or raise Refusal. Rows only read; `site` is the planner's view of the graph (plan.Site), in which earlier folds have
already happened.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from fastbn.affine import View
from fastbn.errors import ModelError, expected
from fastbn.graph.constant import Affine, Dense, Dequantised, Scaled, spread_over
from fastbn.graph.lift import constant_slot
from fastbn.graph.report import Refusal
from fastbn.graph.weights import (
    batch_norm_sample,
    conv_outputs,
    conv_sample,
    conv_terms,
    conv_weight,
    elementwise_sample,
    gemm_outputs,
    gemm_sample,
    gemm_terms,
    gemm_weight,
    matmul_outputs,
    matmul_sample,
    matmul_slot,
    matmul_terms,
    matmul_views,
    no_sample,
    one_term,
    recurrent_outputs,
    recurrent_sample,
    recurrent_terms,
)

__all__ = ["ABSORBERS", "Row", "Taken", "axis_in", "axis_of"]


@dataclass
class Taken:
    """What a node does with an affine.

    constants and attributes are those of the node that change, by slot and by name. onward holds what is asked further: (input slot,
    affine) backward, (output slot, affine) forward; back what a forward row asks of its other inputs, (input slot, affine). elsewhere
    holds constants of another node, by (node, slot), and via the nodes between; a node that dissolves leaves, and the value at that
    input slot takes the place of its output.
    """

    constants: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)
    onward: list = field(default_factory=list)
    back: list = field(default_factory=list)
    elsewhere: dict = field(default_factory=dict)
    via: list = field(default_factory=list)
    dissolves: int | None = None


@dataclass(frozen=True)
class Row:
    """One operator.

    backward(node, affine, site) and forward(node, slot, affine, site) return Taken, or a list of Taken to try in order; None where the
    operator has no such fold. With parts, the operator hands out parts of its input, and one of them (site.asked) may change alone. For
    terms, sample and outputs see weights.py.
    """

    backward: object = None
    forward: object = None
    terms: object = None
    sample: object = None
    outputs: object = None
    parts: bool = False


def axis_of(node, affine, value, site):
    """Return the affine's axis in a value counted from the front, None for one number for every element; Refusal where it is unknown."""
    rank = site.rank(value)
    if rank is None:
        if affine.axis is not None and affine.axis >= 0 and affine.rank == 0:
            return affine.axis
        if affine.axis is None and affine.rank <= 1:
            return None
        raise Refusal("axis-unknown", f"the rank of '{value.name}' at {node.op} '{node.label}' is not known, so the axis cannot be placed")
    return axis_in(node, affine, rank)


def axis_in(node, affine, rank):
    """Return the affine's axis in a value of this rank at a node; Refusal where the affine would widen it."""
    if affine.rank > rank or (affine.axis is not None and not -rank <= affine.axis < rank):
        raise Refusal("axis", f"a constant of rank {affine.rank} widens the value at {node.op} '{node.label}', which has rank {rank}")
    return None if affine.axis is None else affine.axis % rank


def _require_axis(node, affine, axis, wanted, what):
    if axis is not None and axis != wanted:
        raise Refusal("axis", f"its channels are axis {axis}, the {what} channels of {node.op} '{node.label}' axis {wanted}")


def _require_channels(node, affine, channels, what):
    if affine.channels not in (1, channels) or (affine.axis is not None and affine.channels != channels):
        raise Refusal("axis", f"{affine.channels} channels meet the {channels} {what} channels of {node.op} '{node.label}'")


def _scaled(weight, view, scale):
    if isinstance(weight, Dequantised):
        found = weight.times(view, scale)
        if found is None:
            raise Refusal("quantised", f"the scale is not one positive number per step of DequantizeLinear '{weight.node.label}'")
        return found
    if isinstance(weight, Dense):
        return weight.times(spread_over(view, scale, weight.shape))
    return weight.times(view, scale) if isinstance(weight, Scaled) else Scaled(weight, view, np.array(scale))


def _summed(weight, view, affine):
    """Return (sum, size of its terms) of weight * shift over the channels of a view: what a shift of the input adds, per row."""
    dense = Dense.of(weight)
    shift = np.broadcast_to(affine.shift, (view.groups * view.channels,)).reshape(view.groups, 1, view.channels, 1)
    spread = np.broadcast_to(affine.spread, (view.groups * view.channels,)).reshape(view.groups, 1, view.channels, 1)
    added = (dense.values.reshape(view) * shift).sum(axis=(2, 3)).reshape(-1)
    return added, (np.abs(dense.values.reshape(view)) * spread).sum(axis=(2, 3)).reshape(-1)


# Conv:  backward S*(W x + b) + T = (S*W) x + (S*b + T), S along axis 0 of W;  forward W (S x + T) + b = (W*S) x + (b + W T), S along the
# input channels of each group, and W T is the same everywhere only where no padding takes part.
def _conv_backward(node, affine, site):
    weight, _ = conv_weight(node, site)
    _require_axis(node, affine, axis_in(node, affine, len(weight.shape)), 1, "output")
    _require_channels(node, affine, weight.shape[0], "output")
    return _output_side(node, affine, site, weight, View(1, 1, weight.shape[0], math.prod(weight.shape[1:])), weight.shape[0])


def _conv_forward(node, slot, affine, site):
    weight, groups = conv_weight(node, site)
    view = View(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
    if affine.shifts and _pads(node, weight):
        raise Refusal("padding", f"Conv '{node.label}' pads its input with zeros, which a shift would have to change")
    return _input_side(node, slot, affine, site, weight, view, weight.shape[0])


def _pads(node, weight):
    """Say whether zeros of padding take part in a convolution; with auto_pad, a kernel of ones never asks for any."""
    mode = node.attribute("auto_pad", b"NOTSET")
    if mode in (b"SAME_UPPER", b"SAME_LOWER"):
        return any(size > 1 for size in weight.shape[2:])
    return mode != b"VALID" and any(node.attribute("pads", []))


# ConvTranspose: W is (C_in, C_out / groups, ...): group g of the inputs holds the outputs g * C_out/groups ... A shift of its input reaches
# every output alike only where each output sums one full kernel: stride 1 and nothing of the border kept.
def _conv_transpose_backward(node, affine, site):
    weight, groups = conv_weight(node, site)
    channels = weight.shape[1] * groups
    _require_axis(node, affine, axis_in(node, affine, len(weight.shape)), 1, "output")
    _require_channels(node, affine, channels, "output")
    view = View(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
    return _output_side(node, affine, site, weight, view, channels)


def _conv_transpose_forward(node, slot, affine, site):
    weight, groups = conv_weight(node, site)
    if affine.shifts and not _sums_whole_kernels(node, weight):
        raise Refusal("padding", f"the borders of ConvTranspose '{node.label}' sum parts of its kernel, which a shift would reach unevenly")
    view = View(1, 1, weight.shape[0], math.prod(weight.shape[1:]))
    channels = weight.shape[1] * groups
    taken = _input_side(node, slot, affine.scale_only(), site, weight, view, channels)
    if affine.shifts:
        # One row per output channel: (group, channel of the group, inputs of the group, kernel).
        grouped = (groups, weight.shape[0] // groups, weight.shape[1], -1)
        values = Dense.of(weight).values.reshape(grouped).swapaxes(1, 2)
        shift, spread = (part.reshape(groups, 1, -1, 1) for part in affine.along(weight.shape[0])[1:])
        bias = site.bias(node, 2, (channels,), weight.dtype)
        added, size = (values * shift).sum(axis=(2, 3)).reshape(-1), (np.abs(values) * spread).sum(axis=(2, 3)).reshape(-1)
        taken.constants[2] = bias.affine(1.0, added, size)
    return taken


def _sums_whole_kernels(node, weight):
    count = len(weight.shape) - 2
    pads, strides = node.attribute("pads", [0] * 2 * count), node.attribute("strides", [1] * count)
    reach = [d * (k - 1) for k, d in zip(weight.shape[2:], node.attribute("dilations", [1] * count), strict=True)]
    plain = node.attribute("auto_pad", b"NOTSET") == b"NOTSET" and "output_shape" not in node.attributes
    none_added = not any(node.attribute("output_padding", []))
    return plain and none_added and all(s == 1 for s in strides) and all(pads[i] >= r <= pads[i + count] for i, r in enumerate(reach))


def _output_side(node, affine, site, weight, view, channels):
    scale, shift, spread = affine.along(channels)
    taken = Taken()
    if affine.scales:
        taken.constants[1] = _scaled(weight, view, scale)
    if affine.shifts or site.has(node, 2):
        taken.constants[2] = site.bias(node, 2, (channels,), weight.dtype).affine(scale, shift, spread)
    return taken


def _input_side(node, slot, affine, site, weight, view, channels):
    if slot != 0:
        raise Refusal("no-absorber", f"it is the weight or the bias of {node.op} '{node.label}'")
    inputs = view.groups * view.channels
    _require_axis(node, affine, axis_in(node, affine, len(weight.shape)), 1, "input")
    _require_channels(node, affine, inputs, "input")
    taken = Taken()
    if affine.scales:
        taken.constants[1] = _scaled(weight, view, affine.along(inputs)[0])
    if affine.shifts:
        added, size = _summed(weight, view, affine)
        taken.constants[2] = site.bias(node, 2, (channels,), weight.dtype).affine(1.0, added, size)
    return taken


# Gemm:  backward S*(alpha A B + beta C) + T = alpha A (B*S) + (beta*C*S + T), S along the columns of B;  forward
# alpha (A*S + T) B + beta C = alpha A (S*B) + (beta*C + alpha T B), S along the rows of B.
def _gemm_backward(node, affine, site):
    weight, columns_first, (rows, channels) = gemm_weight(node, site)
    _require_axis(node, affine, axis_in(node, affine, 2), 1, "output")
    _require_channels(node, affine, channels, "output")
    scale, shift, spread = affine.along(channels)
    taken = Taken()
    if affine.scales:
        view = View(1, 1, channels, rows) if columns_first else View(1, rows, channels, 1)
        taken.constants[1] = _scaled(weight, view, scale)
    if affine.shifts or _gemm_has_bias(node) or (node, 2) in site.constants:
        taken.constants[2] = _gemm_bias(node, site, weight, channels).affine(scale, shift, spread)
        _own_bias(node, site, taken)
    return taken


def _gemm_forward(node, slot, affine, site):
    if slot != 0:
        raise Refusal("no-absorber", f"it is not the first operand of Gemm '{node.label}'")
    weight, columns_first, (rows, channels) = gemm_weight(node, site)
    _require_axis(node, affine, axis_in(node, affine, 2), 0 if node.attribute("transA", 0) else 1, "input")
    _require_channels(node, affine, rows, "input")
    taken = Taken()
    if affine.scales:
        view = View(1, channels, rows, 1) if columns_first else View(1, 1, rows, channels)
        taken.constants[1] = _scaled(weight, view, affine.along(rows)[0])
    if affine.shifts:
        matrix = Dense.of(weight).values.T if columns_first else Dense.of(weight).values
        alpha = node.attribute("alpha", 1.0)
        _, shift, spread = affine.along(rows)
        bias = _gemm_bias(node, site, weight, channels)
        taken.constants[2] = bias.affine(1.0, alpha * (shift @ matrix), abs(alpha) * (spread @ np.abs(matrix)))
        _own_bias(node, site, taken)
    return taken


def _gemm_has_bias(node):
    return node.input(2) is not None and node.attribute("beta", 1.0) != 0


def _gemm_bias(node, site, weight, channels):
    """Return beta * C in float64; zeros where there is none."""
    if (node, 2) not in site.constants and not _gemm_has_bias(node):
        return Dense.zeros((channels,), weight.dtype)
    bias = site.dense(node, 2)
    if len(bias.shape) > 2 or (bias.shape and bias.shape[-1] not in (1, channels)):
        raise ModelError(expected(f"a C that broadcasts to {channels} columns", f"shape {bias.shape}", node.label))
    # A bias that an earlier fold has changed holds its beta already.
    return bias if (node, 2) in site.constants else bias.times(node.attribute("beta", 1.0))


def _own_bias(node, site, taken):
    """The new C holds beta; before opset 7 a C that broadcasts must say so."""
    if node.attribute("beta", 1.0) != 1:
        taken.attributes["beta"] = 1.0
    if site.index.opset < 7:
        taken.attributes["broadcast"] = 1


# MatMul, constant B:  backward (A B)*S = A (B*S) along its columns;  forward (A*S + T) B = A (S*B) + T B along its rows, and T B goes on as
# a shift.  Constant A: the same with rows and columns changed over.  It has no place for a shift of its own.  A scale along another axis
# passes unchanged.
def _matmul_backward(node, affine, site):
    slot, weight, rank = _matmul_operands(node, affine, node.outputs[0], site)
    axis = _matmul_axis(node, affine, slot, weight, rank, site)
    if affine.shifts and axis not in (None, "own"):
        raise Refusal(
            "shift-cannot-pass", f"a shift along axis {axis} cannot pass MatMul '{node.label}', whose output channels lie elsewhere"
        )
    if affine.shifts:
        raise Refusal("shift-cannot-pass", f"MatMul '{node.label}' has no bias to take the shift")
    if axis not in (None, "own"):
        return Taken(onward=[(1 - slot, affine.at(axis - rank))])
    view = matmul_views(weight, slot)[0]
    _require_channels(node, affine, view.channels, "output")
    return Taken({slot: _scaled(weight, view, affine.along(view.channels)[0])})


def _matmul_forward(node, at, affine, site):
    slot, weight, rank = _matmul_operands(node, affine, node.inputs[at], site)
    if at == slot:
        raise Refusal("no-absorber", f"MatMul '{node.label}' has no constant operand")
    axis = None if affine.axis is None else axis_in(node, affine, rank)
    contracted = rank - 1 if slot == 1 or rank == 1 else rank - 2
    if axis not in (None, contracted):
        if affine.shifts:
            raise Refusal("shift-cannot-pass", f"a shift along axis {axis} cannot pass MatMul '{node.label}'")
        if len(weight.shape) > 2:
            raise Refusal("axis", f"the weight of MatMul '{node.label}' mixes axis {axis}")
        # A vector takes the contracted axis out: what lies before it moves one towards the end.
        moves = int(len(weight.shape) < 2 and axis < contracted)
        return Taken(onward=[(0, affine.at(axis - rank + moves))])
    view = matmul_views(weight, slot)[1]
    _require_channels(node, affine, view.channels, "input")
    taken = Taken()
    if affine.scales:
        taken.constants[slot] = _scaled(weight, view, affine.along(view.channels)[0])
    if affine.shifts:
        if len(weight.shape) != 2:
            raise Refusal(
                "shift-cannot-pass", f"the weight of MatMul '{node.label}' is no matrix, so the shift is not one number per channel"
            )
        matrix = Dense.of(weight).values if slot == 1 else Dense.of(weight).values.T
        _, shift, spread = affine.along(view.channels)
        total, size = shift @ matrix, spread @ np.abs(matrix)
        taken.onward.append((0, Affine(np.ones_like(total), total, -1 if slot == 1 or rank == 1 else -2, 0, size)))
    return taken


def _matmul_operands(node, affine, value, site):
    """Return (slot of the weight, the weight, rank of a value); the rank counts only where the affine has an axis."""
    slot = matmul_slot(node, site)
    weight = site.weight(node, slot)
    rank = site.rank(value)
    # From the right, the last axis is the last axis of any rank; from the left, a vector has its one axis where a matrix has columns.
    if rank is None and (slot == 0 or (affine.axis is not None and affine.axis >= 0)):
        raise Refusal("axis-unknown", f"the rank of '{value.name}' at MatMul '{node.label}' is not known, so the axis cannot be placed")
    if affine.rank > (rank or len(weight.shape)):
        raise Refusal("axis-unknown", f"a constant of rank {affine.rank} may widen the value at MatMul '{node.label}'")
    return slot, weight, rank or max(len(weight.shape), 2)


def _matmul_axis(node, affine, slot, weight, rank, site):
    """Return None, "own" for the weight's own output channels, or another axis of the output, which is one of the other operand."""
    if affine.axis is None:
        return None
    axis = axis_in(node, affine, rank)
    if len(weight.shape) < 2:
        raise Refusal("axis", f"the weight of MatMul '{node.label}' is a vector: its output has no axis for it")
    vector = site.rank(node.inputs[1 - slot]) == 1
    if axis == (rank - 1 if slot == 1 or vector else rank - 2):
        return "own"
    if len(weight.shape) > 2:
        raise Refusal("axis", f"its channels are axis {axis}, which is not the output channels of MatMul '{node.label}'")
    return axis


# BatchNormalization, n its normalised input, s its scale:  backward S*(weight * n + bias) + T = (S*weight) n + (S*bias + T);  forward
# s (S x + T - mean) + bias = s S (x - mean) + (bias + s (T - mean (1 - S))).
def _batch_norm_backward(node, affine, site):
    if site.affine(node) is None:
        raise Refusal("no-absorber", f"it reads {node.op} '{node.label}', which must stay as it is")
    weight, bias = site.dense(node, 1), site.dense(node, 2)
    _require_axis(node, affine, axis_of(node, affine, node.outputs[0], site), 1, "output")
    _require_channels(node, affine, weight.shape[0], "output")
    scale, shift, spread = affine.along(weight.shape[0])
    return Taken({1: weight.times(scale), 2: bias.affine(scale, shift, spread)})


def _batch_norm_forward(node, slot, affine, site):
    own = site.affine(node)
    if slot != 0 or own is None:
        raise Refusal("no-absorber", f"{node.op} '{node.label}' reads it, which must stay as it is")
    weight, bias, mean = (site.dense(node, at) for at in (1, 2, 3))
    _require_axis(node, affine, axis_of(node, affine, node.inputs[0], site), 1, "input")
    _require_channels(node, affine, weight.shape[0], "input")
    scale, shift, spread = affine.along(weight.shape[0])
    moved = own.scale * (shift - mean.values * (1 - scale))
    size = np.abs(own.scale) * (spread + np.abs(mean.values * (1 - scale)))
    return Taken({1: weight.times(scale), 2: bias.affine(1.0, moved, size)})


# Add, Sub with a constant c:  backward S*(x + c) + T = S*x + (S*c + T), S*(x - c) + T = S*x - (S*c - T), S*(c - x) + T = (S*c + T) - S*x,
# and the scale goes on to x;  forward (S*x + T) + c = S*(x + c/S) + T, or x + (c + T) where S is 1.
def _add_backward(node, affine, site):
    slot, constant = _operand(node, site)
    scale, shift, spread = _shaped(node, affine, 1 - slot, constant, site)
    sign = -1.0 if node.op == "Sub" and slot == 1 else 1.0
    new = constant.affine(scale, sign * shift, spread)
    _refuse_growth(node, constant, new)
    return Taken({slot: new}, onward=[(1 - slot, affine.scale_only())] if affine.scales else [])


def _add_forward(node, at, affine, site):
    slot, constant = _operand(node, site)
    scale, shift, spread = _shaped(node, affine, at, constant, site)
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
    onward = Affine(affine.scale, -affine.shift if minus else affine.shift, affine.axis, affine.rank, affine.spread)
    return Taken({slot: new}, onward=[(0, onward)])


# Mul, Div with a constant c:  backward S*(x * c) = x * (S*c), S*(x / c) = x / (c/S), and T finds no place;  forward (S*x + T) * c =
# (S*c) * x + T*c: the constant takes the scale, and T*c goes on.
def _mul_backward(node, affine, site):
    slot, constant = _operand(node, site)
    scale, _, _ = _shaped(node, affine, 1 - slot, constant, site)
    if affine.shifts:
        raise Refusal("shift-cannot-pass", f"{node.op} '{node.label}' has no constant to take the shift")
    new = constant.times(_into_factor(node, slot, scale))
    _refuse_growth(node, constant, new)
    return Taken({slot: new})


def _mul_forward(node, at, affine, site):
    slot, constant = _operand(node, site)
    if node.op == "Div" and slot == 0:
        raise Refusal("no-absorber", f"it is the divisor of Div '{node.label}'")
    scale, shift, spread = _shaped(node, affine, at, constant, site)
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


def _operand(node, site):
    slot = constant_slot(node, site.index)
    if slot is None:
        raise Refusal("no-absorber", f"it meets {node.op} '{node.label}' of two values that are no constants")
    return slot, site.dense(node, slot)


def _shaped(node, affine, data_slot, constant, site):
    """Return the affine in the shape that meets the node's constant; Refusal where the node widens its data along the axis."""
    rank = site.rank(node.outputs[0])
    if rank is None and affine.axis is not None and affine.axis >= 0:
        raise Refusal(
            "axis-unknown", f"the rank of the output of {node.op} '{node.label}' is not known, so axis {affine.axis} cannot be placed"
        )
    if affine.rank > (len(constant.shape) if rank is None else rank):
        raise Refusal("axis-unknown", f"a constant of rank {affine.rank} may widen the value at {node.op} '{node.label}'")
    if rank is not None:
        axis_in(node, affine, rank)
    data = site.shape(node.inputs[data_slot])
    if affine.axis is not None and data is not None and rank is not None:
        at = affine.axis - len(data) if affine.axis >= 0 and len(data) < rank else (affine.axis % rank - rank)
        if len(data) < -at or len(data) != rank or data[at] not in (None, affine.channels):
            raise Refusal("axis", f"{node.op} '{node.label}' makes the {affine.channels} channels by broadcasting a narrower value")
    return affine.shaped(rank)


def _refuse_growth(node, constant, new):
    if new.values.size > max(constant.values.size, new.values.shape[0] if new.values.ndim else 1) and constant.values.size > 1:
        raise Refusal(
            "grows", f"the constant of {node.op} '{node.label}' would grow from {constant.values.size} to {new.values.size} values"
        )


# LSTM, GRU, RNN:  forward, on the input x: gates W (S x + T) + b = (W*S) x + (b + W T), for each direction.
def _recurrent_forward(node, slot, affine, site):
    if slot != 0:
        raise Refusal("no-absorber", f"it is not the input sequence of {node.op} '{node.label}'")
    weight = site.weight(node, 1)
    if len(weight.shape) != 3:
        raise ModelError(expected("weights of rank 3", f"shape {weight.shape}", node.label))
    directions, gates, inputs = weight.shape
    _require_axis(node, affine, axis_in(node, affine, 3), 2, "input")
    _require_channels(node, affine, inputs, "input")
    view = View(1, directions * gates, inputs, 1)
    taken = Taken()
    if affine.scales:
        taken.constants[1] = _scaled(weight, view, affine.along(inputs)[0])
    if affine.shifts:
        added, size = (part.reshape(directions, gates) for part in _summed(weight, view, affine))
        nothing = np.zeros((directions, gates))
        bias = site.bias(node, 3, (directions, 2 * gates), weight.dtype)
        taken.constants[3] = bias.affine(1.0, np.hstack([added, nothing]), np.hstack([size, nothing]))
    return taken


ABSORBERS = {
    "Conv": Row(_conv_backward, _conv_forward, conv_terms, conv_sample, conv_outputs),
    "ConvTranspose": Row(_conv_transpose_backward, _conv_transpose_forward, conv_terms, conv_sample, conv_outputs),
    "Gemm": Row(_gemm_backward, _gemm_forward, gemm_terms, gemm_sample, gemm_outputs),
    "MatMul": Row(_matmul_backward, _matmul_forward, matmul_terms, matmul_sample, matmul_outputs),
    "BatchNormalization": Row(_batch_norm_backward, _batch_norm_forward, one_term, batch_norm_sample),
    "Add": Row(_add_backward, _add_forward, one_term, elementwise_sample),
    "Sub": Row(_add_backward, _add_forward, one_term, elementwise_sample),
    "Mul": Row(_mul_backward, _mul_forward, one_term, elementwise_sample),
    "Div": Row(_mul_backward, _mul_forward, one_term, elementwise_sample),
    # The weight of one of the above may stand behind it, and a scale goes into its own.
    "DequantizeLinear": Row(None, None, one_term, no_sample),
    "LSTM": Row(None, _recurrent_forward, recurrent_terms, recurrent_sample, recurrent_outputs),
    "GRU": Row(None, _recurrent_forward, recurrent_terms, recurrent_sample, recurrent_outputs),
    "RNN": Row(None, _recurrent_forward, recurrent_terms, recurrent_sample, recurrent_outputs),
}
