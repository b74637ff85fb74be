"""The operators that multiply by a weight and take an affine into it: convolutions, Gemm, MatMul, recurrent layers; one row each."""

import math

import numpy as np

from fastbn.affine import WeightLayout
from fastbn.errors import ModelError, expected
from fastbn.graph.model.constant import Dense, Dequantized, Scaled, broadcast_scale
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.row import Row, Taken, axis_in, require_axis, require_channels
from fastbn.graph.ops.weights import (
    conv_outputs,
    conv_sample,
    conv_terms,
    conv_weight,
    gemm_outputs,
    gemm_sample,
    gemm_terms,
    gemm_weight,
    matmul_layouts,
    matmul_outputs,
    matmul_sample,
    matmul_slot,
    matmul_terms,
    recurrent_outputs,
    recurrent_sample,
    recurrent_terms,
)
from fastbn.graph.reasons import Refusal

__all__ = ["PRODUCTS"]


def _scaled(weight, layout, scale):
    if isinstance(weight, Dequantized):
        found = weight.times(layout, scale)
        if found is None:
            raise Refusal("quantised", f"the scale is not one positive number per step of DequantizeLinear '{weight.node.label}'")
        return found
    if isinstance(weight, Dense):
        return weight.times(broadcast_scale(layout, scale, weight.shape))
    return weight.times(layout, scale) if isinstance(weight, Scaled) else Scaled(weight, layout, np.array(scale))


def _summed(weight, layout, affine):
    """Return (sum, size of its terms) of weight * shift over the channels of a layout: what a shift of the input adds, per row."""
    dense = Dense.of(weight)
    shift = np.broadcast_to(affine.shift, (layout.groups * layout.channels,)).reshape(layout.groups, 1, layout.channels, 1)
    spread = np.broadcast_to(affine.abs_terms, (layout.groups * layout.channels,)).reshape(layout.groups, 1, layout.channels, 1)
    added = (dense.values.reshape(layout) * shift).sum(axis=(2, 3)).reshape(-1)
    return added, (np.abs(dense.values.reshape(layout)) * spread).sum(axis=(2, 3)).reshape(-1)


# Conv:  backward S*(W x + b) + T = (S*W) x + (S*b + T), S along axis 0 of W;  forward W (S x + T) + b = (W*S) x + (b + W T), S along the
# input channels of each group, and W T is the same everywhere only where no padding takes part.
def _conv_backward(node, affine, view):
    weight, _ = conv_weight(node, view)
    require_axis(node, affine, axis_in(node, affine, len(weight.shape)), 1, "output")
    require_channels(node, affine, weight.shape[0], "output")
    return _output_side(node, affine, view, weight, WeightLayout(1, 1, weight.shape[0], math.prod(weight.shape[1:])), weight.shape[0])


def _conv_forward(node, slot, affine, view):
    weight, groups = conv_weight(node, view)
    layout = WeightLayout(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
    if affine.shifts and _pads(node, weight):
        raise Refusal("padding", f"Conv '{node.label}' pads its input with zeros, which a shift would have to change")
    return _input_side(node, slot, affine, view, weight, layout, weight.shape[0])


def _pads(node, weight):
    """Say whether zeros of padding take part in a convolution; with auto_pad, a kernel of ones never asks for any."""
    mode = node.attribute("auto_pad", b"NOTSET")
    if mode in (b"SAME_UPPER", b"SAME_LOWER"):
        return any(size > 1 for size in weight.shape[2:])
    return mode != b"VALID" and any(node.attribute("pads", []))


# ConvTranspose: W is (C_in, C_out / groups, ...): group g of the inputs holds the outputs g * C_out/groups ... A shift of its input reaches
# every output alike only where each output sums one full kernel: stride 1 and nothing of the border kept.
def _conv_transpose_backward(node, affine, view):
    weight, groups = conv_weight(node, view)
    channels = weight.shape[1] * groups
    require_axis(node, affine, axis_in(node, affine, len(weight.shape)), 1, "output")
    require_channels(node, affine, channels, "output")
    layout = WeightLayout(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
    return _output_side(node, affine, view, weight, layout, channels)


def _conv_transpose_forward(node, slot, affine, view):
    weight, groups = conv_weight(node, view)
    if affine.shifts and not _sums_whole_kernels(node, weight):
        raise Refusal("padding", f"the borders of ConvTranspose '{node.label}' sum parts of its kernel, which a shift would reach unevenly")
    layout = WeightLayout(1, 1, weight.shape[0], math.prod(weight.shape[1:]))
    channels = weight.shape[1] * groups
    taken = _input_side(node, slot, affine.scale_only(), view, weight, layout, channels)
    if affine.shifts:
        # One row per output channel: (group, channel of the group, inputs of the group, kernel).
        grouped = (groups, weight.shape[0] // groups, weight.shape[1], -1)
        values = Dense.of(weight).values.reshape(grouped).swapaxes(1, 2)
        shift, spread = (part.reshape(groups, 1, -1, 1) for part in affine.along(weight.shape[0])[1:])
        bias = view.bias(node, 2, (channels,), weight.dtype)
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


def _output_side(node, affine, view, weight, layout, channels):
    scale, shift, spread = affine.along(channels)
    taken = Taken()
    if affine.scales:
        taken.constants[1] = _scaled(weight, layout, scale)
    if affine.shifts or view.has(node, 2):
        taken.constants[2] = view.bias(node, 2, (channels,), weight.dtype).affine(scale, shift, spread)
    return taken


def _input_side(node, slot, affine, view, weight, layout, channels):
    if slot != 0:
        raise Refusal("no-absorber", f"it is the weight or the bias of {node.op} '{node.label}'")
    inputs = layout.groups * layout.channels
    require_axis(node, affine, axis_in(node, affine, len(weight.shape)), 1, "input")
    require_channels(node, affine, inputs, "input")
    taken = Taken()
    if affine.scales:
        taken.constants[1] = _scaled(weight, layout, affine.along(inputs)[0])
    if affine.shifts:
        added, size = _summed(weight, layout, affine)
        taken.constants[2] = view.bias(node, 2, (channels,), weight.dtype).affine(1.0, added, size)
    return taken


# Gemm:  backward S*(alpha A B + beta C) + T = alpha A (B*S) + (beta*C*S + T), S along the columns of B;  forward
# alpha (A*S + T) B + beta C = alpha A (S*B) + (beta*C + alpha T B), S along the rows of B.
def _gemm_backward(node, affine, view):
    weight, columns_first, (rows, channels) = gemm_weight(node, view)
    require_axis(node, affine, axis_in(node, affine, 2), 1, "output")
    require_channels(node, affine, channels, "output")
    scale, shift, spread = affine.along(channels)
    taken = Taken()
    if affine.scales:
        layout = WeightLayout(1, 1, channels, rows) if columns_first else WeightLayout(1, rows, channels, 1)
        taken.constants[1] = _scaled(weight, layout, scale)
    if affine.shifts or _gemm_has_bias(node) or (node, 2) in view.constants:
        taken.constants[2] = _gemm_bias(node, view, weight, channels).affine(scale, shift, spread)
        _own_bias(node, view, taken)
    return taken


def _gemm_forward(node, slot, affine, view):
    if slot != 0:
        raise Refusal("no-absorber", f"it is not the first operand of Gemm '{node.label}'")
    weight, columns_first, (rows, channels) = gemm_weight(node, view)
    require_axis(node, affine, axis_in(node, affine, 2), 0 if node.attribute("transA", 0) else 1, "input")
    require_channels(node, affine, rows, "input")
    taken = Taken()
    if affine.scales:
        layout = WeightLayout(1, channels, rows, 1) if columns_first else WeightLayout(1, 1, rows, channels)
        taken.constants[1] = _scaled(weight, layout, affine.along(rows)[0])
    if affine.shifts:
        matrix = Dense.of(weight).values.T if columns_first else Dense.of(weight).values
        alpha = node.attribute("alpha", 1.0)
        _, shift, spread = affine.along(rows)
        bias = _gemm_bias(node, view, weight, channels)
        taken.constants[2] = bias.affine(1.0, alpha * (shift @ matrix), abs(alpha) * (spread @ np.abs(matrix)))
        _own_bias(node, view, taken)
    return taken


def _gemm_has_bias(node):
    return node.input(2) is not None and node.attribute("beta", 1.0) != 0


def _gemm_bias(node, view, weight, channels):
    """Return beta * C in float64; zeros where there is none."""
    if (node, 2) not in view.constants and not _gemm_has_bias(node):
        return Dense.zeros((channels,), weight.dtype)
    bias = view.dense(node, 2)
    if len(bias.shape) > 2 or (bias.shape and bias.shape[-1] not in (1, channels)):
        raise ModelError(expected(f"a C that broadcasts to {channels} columns", f"shape {bias.shape}", node.label))
    # A bias that an earlier fold has changed holds its beta already.
    return bias if (node, 2) in view.constants else bias.times(node.attribute("beta", 1.0))


def _own_bias(node, view, taken):
    """The new C holds beta; before opset 7 a C that broadcasts must say so."""
    if node.attribute("beta", 1.0) != 1:
        taken.attributes["beta"] = 1.0
    if view.index.opset < 7:
        taken.attributes["broadcast"] = 1


# MatMul, constant B:  backward (A B)*S = A (B*S) along its columns;  forward (A*S + T) B = A (S*B) + T B along its rows, and T B goes on as
# a shift.  Constant A: the same with rows and columns changed over.  It has no place for a shift of its own.  A scale along another axis
# passes unchanged.
def _matmul_backward(node, affine, view):
    slot, weight, rank = _matmul_operands(node, affine, node.outputs[0], view)
    axis = _matmul_axis(node, affine, slot, weight, rank, view)
    if affine.shifts and axis not in (None, "own"):
        raise Refusal(
            "shift-cannot-pass", f"a shift along axis {axis} cannot pass MatMul '{node.label}', whose output channels lie elsewhere"
        )
    if affine.shifts:
        raise Refusal("shift-cannot-pass", f"MatMul '{node.label}' has no bias to take the shift")
    if axis not in (None, "own"):
        return Taken(onward=[(1 - slot, affine.at(axis - rank))])
    layout = matmul_layouts(weight, slot)[0]
    require_channels(node, affine, layout.channels, "output")
    return Taken({slot: _scaled(weight, layout, affine.along(layout.channels)[0])})


def _matmul_forward(node, at, affine, view):
    slot, weight, rank = _matmul_operands(node, affine, node.inputs[at], view)
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
    layout = matmul_layouts(weight, slot)[1]
    require_channels(node, affine, layout.channels, "input")
    taken = Taken()
    if affine.scales:
        taken.constants[slot] = _scaled(weight, layout, affine.along(layout.channels)[0])
    if affine.shifts:
        if len(weight.shape) != 2:
            raise Refusal(
                "shift-cannot-pass", f"the weight of MatMul '{node.label}' is no matrix, so the shift is not one number per channel"
            )
        matrix = Dense.of(weight).values if slot == 1 else Dense.of(weight).values.T
        _, shift, spread = affine.along(layout.channels)
        total, size = shift @ matrix, spread @ np.abs(matrix)
        taken.onward.append((0, Affine(np.ones_like(total), total, -1 if slot == 1 or rank == 1 else -2, 0, size)))
    return taken


def _matmul_operands(node, affine, value, view):
    """Return (slot of the weight, the weight, rank of a value); the rank counts only where the affine has an axis."""
    slot = matmul_slot(node, view)
    weight = view.weight(node, slot)
    rank = view.rank(value)
    # From the right, the last axis is the last axis of any rank; from the left, a vector has its one axis where a matrix has columns.
    if rank is None and (slot == 0 or (affine.axis is not None and affine.axis >= 0)):
        raise Refusal("axis-unknown", f"the rank of '{value.name}' at MatMul '{node.label}' is not known, so the axis cannot be placed")
    if affine.rank > (rank or len(weight.shape)):
        raise Refusal("axis-unknown", f"a constant of rank {affine.rank} may widen the value at MatMul '{node.label}'")
    return slot, weight, rank or max(len(weight.shape), 2)


def _matmul_axis(node, affine, slot, weight, rank, view):
    """Return None, "own" for the weight's own output channels, or another axis of the output, which is one of the other operand."""
    if affine.axis is None:
        return None
    axis = axis_in(node, affine, rank)
    if len(weight.shape) < 2:
        raise Refusal("axis", f"the weight of MatMul '{node.label}' is a vector: its output has no axis for it")
    vector = view.rank(node.inputs[1 - slot]) == 1
    if axis == (rank - 1 if slot == 1 or vector else rank - 2):
        return "own"
    if len(weight.shape) > 2:
        raise Refusal("axis", f"its channels are axis {axis}, which is not the output channels of MatMul '{node.label}'")
    return axis


# LSTM, GRU, RNN:  forward, on the input x: gates W (S x + T) + b = (W*S) x + (b + W T), for each direction.
def _recurrent_forward(node, slot, affine, view):
    if slot != 0:
        raise Refusal("no-absorber", f"it is not the input sequence of {node.op} '{node.label}'")
    weight = view.weight(node, 1)
    if len(weight.shape) != 3:
        raise ModelError(expected("weights of rank 3", f"shape {weight.shape}", node.label))
    directions, gates, inputs = weight.shape
    require_axis(node, affine, axis_in(node, affine, 3), 2, "input")
    require_channels(node, affine, inputs, "input")
    layout = WeightLayout(1, directions * gates, inputs, 1)
    taken = Taken()
    if affine.scales:
        taken.constants[1] = _scaled(weight, layout, affine.along(inputs)[0])
    if affine.shifts:
        added, size = (part.reshape(directions, gates) for part in _summed(weight, layout, affine))
        nothing = np.zeros((directions, gates))
        bias = view.bias(node, 3, (directions, 2 * gates), weight.dtype)
        taken.constants[3] = bias.affine(1.0, np.hstack([added, nothing]), np.hstack([size, nothing]))
    return taken


PRODUCTS = {
    "Conv": Row(_conv_backward, _conv_forward, conv_terms, conv_sample, conv_outputs),
    "ConvTranspose": Row(_conv_transpose_backward, _conv_transpose_forward, conv_terms, conv_sample, conv_outputs),
    "Gemm": Row(_gemm_backward, _gemm_forward, gemm_terms, gemm_sample, gemm_outputs),
    "MatMul": Row(_matmul_backward, _matmul_forward, matmul_terms, matmul_sample, matmul_outputs),
    "LSTM": Row(None, _recurrent_forward, recurrent_terms, recurrent_sample, recurrent_outputs),
    "GRU": Row(None, _recurrent_forward, recurrent_terms, recurrent_sample, recurrent_outputs),
    "RNN": Row(None, _recurrent_forward, recurrent_terms, recurrent_sample, recurrent_outputs),
}
