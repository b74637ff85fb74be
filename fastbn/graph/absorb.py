"""Table one: the operators that take a per-channel affine into constants they already have, one row per operator.

A row answers one question: the value that this node gives must become S * value + T; which of its constants change, and what is then
asked of its inputs? It returns Taken, or raises Refusal. Rows only read; `site` is the planner's view of the graph (plan.Site), in which
earlier folds have already happened.
"""

from dataclasses import dataclass, field

import numpy as np

from fastbn.affine import View
from fastbn.errors import ModelError, expected
from fastbn.graph.constant import Scaled, Vector
from fastbn.graph.lift import constant_slot
from fastbn.graph.report import Refusal

__all__ = ["ABSORBERS", "Row", "Taken"]


@dataclass
class Taken:
    """What a node does with an affine: constants by slot, attributes to set, and affines that go on to its inputs as (slot, affine)."""

    constants: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)
    onward: list = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One operator: backward(node, affine, site) -> Taken, and what its verification needs.

    terms(node, site) is the number of products summed into one element; sample(node, site) the shapes of its inputs that are no constants,
    by slot, small but large enough for every weight to take part.
    """

    backward: object
    terms: object
    sample: object


def _channels_match(node, affine, channels):
    if affine.channels not in (1, channels):
        raise Refusal("axis", f"{affine.channels} channels meet the {channels} output channels of {node.op} '{node.label}'")


def _axis_is(node, affine, site, axis, rank):
    """Refuse unless the affine runs along this axis (counted from the front) of a value of this rank."""
    if affine.rank > rank:
        raise Refusal("axis", f"a constant of rank {affine.rank} widens the output of {node.op} '{node.label}', which has rank {rank}")
    if affine.axis is not None and affine.axis % rank != axis:
        raise Refusal(
            "axis", f"its channels are axis {affine.axis % rank} of {rank}, the output channels of {node.op} '{node.label}' axis {axis}"
        )


# Conv:  S*(W x + b) + T = (S*W) x + (S*b + T), S along axis 0 of W, whatever the groups.
def _conv(node, affine, site):
    weight = site.weight(node, 1)
    groups = node.attribute("group", 1)
    _check_conv_weight(node, weight, site, groups, weight.shape[1] * groups)
    channels = weight.shape[0]
    _axis_is(node, affine, site, 1, len(weight.shape))
    _channels_match(node, affine, channels)
    view = View(1, 1, channels, int(np.prod(weight.shape[1:])))
    return _linear(node, affine, site, weight, view, channels)


# ConvTranspose: the same, but W is (C_in, C_out / groups, ...): group g of the inputs holds the outputs g * C_out/groups ...
def _conv_transpose(node, affine, site):
    weight = site.weight(node, 1)
    groups = node.attribute("group", 1)
    _check_conv_weight(node, weight, site, groups, weight.shape[0])
    channels = weight.shape[1] * groups
    _axis_is(node, affine, site, 1, len(weight.shape))
    _channels_match(node, affine, channels)
    view = View(groups, weight.shape[0] // groups, weight.shape[1], int(np.prod(weight.shape[2:])))
    return _linear(node, affine, site, weight, view, channels)


def _check_conv_weight(node, weight, site, groups, in_channels):
    if len(weight.shape) < 3 or groups < 1 or weight.shape[0] % groups or 0 in weight.shape:
        raise ModelError(expected(f"convolution weights that {groups} groups divide", f"shape {weight.shape}", node.label))
    count = len(weight.shape) - 2
    for name, length in (("strides", count), ("dilations", count), ("pads", 2 * count)):
        sizes = node.attribute(name, [1] * length)
        if len(sizes) != length or (name != "pads" and min(sizes) < 1):
            raise ModelError(expected(f"{length} {name} for {count} axes", f"{sizes}", node.label))
    declared = site.index.declared_shape(node.inputs[0])
    if declared and (len(declared) != len(weight.shape) or declared[1] not in (None, in_channels)):
        raise ModelError(expected(f"weights for an input of shape {declared}", f"shape {weight.shape}", node.label))


def _linear(node, affine, site, weight, view, channels):
    scale, shift, spread = affine.along(channels)
    taken = Taken()
    if affine.scales:
        taken.constants[1] = _scaled(weight, view, scale)
    if node.input(2) is not None or (node, 2) in site.constants or affine.shifts:
        bias = site.vector(node, 2, (channels,), weight.dtype)
        taken.constants[2] = bias.affine(scale, shift, spread)
    return taken


def _scaled(weight, view, scale):
    return weight.times(view, scale) if isinstance(weight, Scaled) else Scaled(weight, view, np.array(scale))


# Gemm:  S*(alpha A B + beta C) + T = alpha A (S*B) + 1 (S*beta*C + T), S along the columns of B.
def _gemm(node, affine, site):
    weight = site.weight(node, 1)
    if len(weight.shape) != 2:
        raise ModelError(expected("a matrix", f"shape {weight.shape}", node.label))
    columns_first = node.attribute("transB", 0)
    channels = weight.shape[0 if columns_first else 1]
    _axis_is(node, affine, site, 1, 2)
    _channels_match(node, affine, channels)
    scale, shift, spread = affine.along(channels)
    view = View(1, 1, *weight.shape) if columns_first else View(1, *weight.shape, 1)
    taken = Taken()
    if affine.scales:
        taken.constants[1] = _scaled(weight, view, scale)
    # A bias that an earlier plan has made stands there with beta = 1.
    planned = (node, 2) in site.constants
    beta = 1.0 if planned else node.attribute("beta", 1.0)
    has_bias = planned or (node.input(2) is not None and beta != 0)
    if not has_bias and not affine.shifts:
        return taken
    bias = site.constant_vector(node, 2).times(beta) if has_bias else Vector.zeros((channels,), weight.dtype)
    if len(bias.shape) > 2 or (bias.shape and bias.shape[-1] not in (1, channels)):
        raise ModelError(expected(f"a C that broadcasts to {channels} columns", f"shape {bias.shape}", node.label))
    taken.constants[2] = bias.affine(scale, shift, spread)
    if beta != 1:
        taken.attributes["beta"] = 1.0
    if site.index.opset < 7:
        taken.attributes["broadcast"] = 1
    return taken


# MatMul:  S*(A B) = A (S*B) along the columns of a constant B, or (S*A) B along the rows of a constant A. It has no place for T.
def _matmul(node, affine, site):
    slot = _matmul_weight(node, site)
    weight = site.weight(node, slot)
    if len(weight.shape) < 2 and affine.axis is not None:
        raise Refusal("axis", f"the weight of MatMul '{node.label}' is a vector: its output has no axis for it")
    if affine.axis is not None:
        from_end = -1 if slot == 1 else -2
        rank = site.rank(node.outputs[0])
        if rank is None and affine.axis != from_end:
            raise Refusal(
                "axis-unknown", f"the rank of the output of MatMul '{node.label}' is not known, so axis {affine.axis} cannot be placed"
            )
        if rank is not None:
            _axis_is(node, affine, site, rank + from_end, rank)
    elif affine.rank > (site.rank(node.outputs[0]) or len(weight.shape)):
        raise Refusal("axis-unknown", f"a constant of rank {affine.rank} may widen the output of MatMul '{node.label}'")
    if affine.shifts:
        raise Refusal("shift-cannot-pass", f"MatMul '{node.label}' has no bias to take the shift")
    if len(weight.shape) < 2:
        view = View(1, 1, 1, weight.size)
    elif slot == 1:
        view = View(1, int(np.prod(weight.shape[:-1])), weight.shape[-1], 1)
    else:
        view = View(1, int(np.prod(weight.shape[:-2])), *weight.shape[-2:])
    _channels_match(node, affine, view.channels)
    return Taken({slot: _scaled(weight, view, affine.along(view.channels)[0])})


def _matmul_weight(node, site):
    return 1 if site.index.constant(node.inputs[1]) is not None or site.index.constant(node.inputs[0]) is None else 0


# BatchNormalization:  S*(weight * n + bias) + T = (S*weight) n + (S*bias + T), n the normalised input.
def _batch_norm(node, affine, site):
    if site.affine(node) is None:
        raise Refusal("no-absorber", f"it reads {node.op} '{node.label}', which must stay as it is")
    weight, bias = site.constant_vector(node, 1), site.constant_vector(node, 2)
    rank = site.rank(node.outputs[0])
    if rank is None and (affine.axis or 1) != 1:
        raise Refusal("axis-unknown", f"the rank of the output of {node.op} '{node.label}' is not known")
    _axis_is(node, affine, site, 1, rank or max(affine.rank, 2))
    _channels_match(node, affine, weight.shape[0])
    scale, shift, spread = affine.along(weight.shape[0])
    return Taken({1: weight.times(scale), 2: bias.affine(scale, shift, spread)})


# Add, Sub:  S*(x + c) + T = S*x + (S*c + T);  S*(x - c) + T = S*x - (S*c - T);  S*(c - x) + T = (S*c + T) - S*x. The scale goes on to x.
def _add(node, affine, site):
    slot, constant, (scale, shift, spread) = _operand(node, affine, site)
    sign = -1.0 if node.op == "Sub" and slot == 1 else 1.0
    new = constant.affine(scale, sign * shift, spread)
    _refuse_growth(node, constant, new)
    onward = [(1 - slot, affine.scale_only())] if affine.scales else []
    return Taken({slot: new}, onward=onward)


# Mul, Div:  S*(x * c) = x * (S*c);  S*(x / c) = x / (c/S). T finds no place.
def _mul(node, affine, site):
    slot, constant, (scale, _, _) = _operand(node, affine, site)
    if affine.shifts:
        raise Refusal("shift-cannot-pass", f"{node.op} '{node.label}' has no constant to take the shift")
    if node.op == "Div" and slot == 1:
        if (scale == 0).any():
            raise Refusal("no-absorber", f"a scale of zero cannot go into the divisor of Div '{node.label}'")
        scale = 1 / scale
    new = constant.times(scale)
    _refuse_growth(node, constant, new)
    return Taken({slot: new})


def _operand(node, affine, site):
    slot = constant_slot(node, site.index)
    if slot is None:
        raise Refusal("no-absorber", f"it reads {node.op} '{node.label}' of two values that are no constants")
    constant = site.constant_vector(node, slot)
    rank = site.rank(node.outputs[0])
    if rank is None and affine.axis is not None and affine.axis >= 0:
        raise Refusal(
            "axis-unknown", f"the rank of the output of {node.op} '{node.label}' is not known, so axis {affine.axis} cannot be placed"
        )
    if affine.rank > (len(constant.shape) if rank is None else rank):
        raise Refusal("axis-unknown", f"a constant of rank {affine.rank} may widen the output of {node.op} '{node.label}'")
    data = site.shape(node.inputs[1 - slot])
    if affine.axis is not None and data is not None and rank is not None:
        at = affine.axis % rank - rank
        if len(data) < -at or data[at] not in (None, affine.channels):
            raise Refusal("axis", f"{node.op} '{node.label}' makes the {affine.channels} channels by broadcasting a narrower value")
    return slot, constant, affine.shaped(rank)


def _refuse_growth(node, constant, new):
    if new.values.size > max(constant.values.size, new.values.shape[0] if new.values.ndim else 1) and constant.values.size > 1:
        raise Refusal(
            "grows", f"the constant of {node.op} '{node.label}' would grow from {constant.values.size} to {new.values.size} values"
        )


def _conv_sample(node, site):
    shape = site.weight(node, 1).shape
    groups = node.attribute("group", 1)
    channels = shape[1] * groups if node.op == "Conv" else shape[0]
    kernel, count = shape[2:], len(shape) - 2
    dilations = node.attribute("dilations", [1] * count)
    strides = node.attribute("strides", [1] * count)
    if node.op == "Conv":
        spatial = [d * (k - 1) + 1 + s for k, d, s in zip(kernel, dilations, strides, strict=True)]
    else:
        pads = node.attribute("pads", [0] * 2 * count)
        spatial = [2 + -(-(pads[i] + pads[i + count]) // strides[i]) for i in range(count)]
    return {0: (2, channels, *spatial)}


def _conv_terms(node, site):
    shape = site.weight(node, 1).shape
    inputs = shape[1] if node.op == "Conv" else shape[0] // node.attribute("group", 1)
    return inputs * int(np.prod(shape[2:]))


def _gemm_inner(node, site):
    return site.weight(node, 1).shape[1 if node.attribute("transB", 0) else 0]


def _gemm_sample(node, site):
    inner = _gemm_inner(node, site)
    bias = site.index.constant(node.input(2))
    rows = bias.shape[0] if bias is not None and len(bias.shape) == 2 and bias.shape[0] > 1 else 3
    return {0: (inner, rows) if node.attribute("transA", 0) else (rows, inner)}


def _matmul_inner(node, site):
    slot = _matmul_weight(node, site)
    shape = site.weight(node, slot).shape
    return shape[0] if len(shape) == 1 else shape[-2 if slot == 1 else -1]


def _matmul_sample(node, site):
    slot = _matmul_weight(node, site)
    weight, inner = site.weight(node, slot).shape, _matmul_inner(node, site)
    known = site.small_shape(node.inputs[1 - slot])
    if known is None or len(weight) > 2:
        more = len(known or ()) - max(len(weight), 2)
        known = (*[2] * more, *weight[:-2], 3, 3)
    known = list(known)
    known[-1 if slot == 1 or len(known) == 1 else -2] = inner
    return {1 - slot: tuple(known)}


def _elementwise_sample(node, site):
    slot = constant_slot(node, site.index)
    shape = site.index.constant(node.inputs[slot]).shape
    return {1 - slot: site.small_shape(node.inputs[1 - slot]) or tuple(2 if size == 1 else size for size in shape) or (2,)}


def _batch_norm_sample(node, site):
    channels = site.index.constant(node.inputs[1]).shape[0]
    shape = list(site.small_shape(node.inputs[0]) or (2, channels, 3))
    shape[1:2] = [channels]
    return {0: tuple(shape)}


def _one_term(node, site):
    return 1


ABSORBERS = {
    "Conv": Row(_conv, _conv_terms, _conv_sample),
    "ConvTranspose": Row(_conv_transpose, _conv_terms, _conv_sample),
    "Gemm": Row(_gemm, _gemm_inner, _gemm_sample),
    "MatMul": Row(_matmul, _matmul_inner, _matmul_sample),
    "BatchNormalization": Row(_batch_norm, _one_term, _batch_norm_sample),
    "Add": Row(_add, _one_term, _elementwise_sample),
    "Sub": Row(_add, _one_term, _elementwise_sample),
    "Mul": Row(_mul, _one_term, _elementwise_sample),
    "Div": Row(_mul, _one_term, _elementwise_sample),
}
