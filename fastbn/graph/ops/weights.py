"""The weights of each operator that absorbs: where they are, what they must look like, and what its verification needs of them.

That is terms(node, view), the number of products summed into one element, and sample(node, view), the shapes to verify with of its inputs
that are no constants, by slot, small but large enough for every weight to take part; and outputs(node, slot, values), the weight at a slot
as a matrix of shape (output channels, terms), None where no weight is read there.
"""

import math

from fastbn.affine import WeightLayout
from fastbn.errors import ModelError, expected
from fastbn.graph.ops.lift import constant_slot

__all__ = [
    "batch_norm_sample",
    "conv_outputs",
    "conv_sample",
    "conv_terms",
    "conv_weight",
    "elementwise_sample",
    "gemm_outputs",
    "gemm_sample",
    "gemm_terms",
    "gemm_weight",
    "matmul_layouts",
    "matmul_outputs",
    "matmul_sample",
    "matmul_slot",
    "matmul_terms",
    "no_sample",
    "one_term",
    "recurrent_outputs",
    "recurrent_sample",
    "recurrent_terms",
]


def conv_weight(node, view):
    weight, groups = view.weight(node, 1), node.attribute("group", 1)
    if len(weight.shape) < 3 or groups < 1 or weight.shape[0] % groups or 0 in weight.shape:
        raise ModelError(expected(f"convolution weights that {groups} groups divide", f"shape {weight.shape}", node.label))
    count = len(weight.shape) - 2
    for name, length in (("strides", count), ("dilations", count), ("pads", 2 * count)):
        sizes = node.attribute(name, [1] * length)
        if len(sizes) != length or (name != "pads" and min(sizes) < 1):
            raise ModelError(expected(f"{length} {name} for {count} axes", f"{sizes}", node.label))
    declared = view.index.declared_shape(node.inputs[0])
    channels = weight.shape[1] * groups if node.op == "Conv" else weight.shape[0]
    if declared and (len(declared) != len(weight.shape) or declared[1] not in (None, channels)):
        raise ModelError(expected(f"weights for an input of shape {declared}", f"shape {weight.shape}", node.label))
    return weight, groups


def gemm_weight(node, view):
    """Return (B, whether its columns come first, (rows, columns))."""
    weight = view.weight(node, 1)
    if len(weight.shape) != 2:
        raise ModelError(expected("a matrix", f"shape {weight.shape}", node.label))
    columns_first = bool(node.attribute("transB", 0))
    return weight, columns_first, weight.shape[::-1] if columns_first else weight.shape


def matmul_layouts(weight, slot):
    """Return the layouts of a weight that take a scale on its (output, input) channels."""
    shape = weight.shape
    if not shape or 0 in shape:
        raise ModelError(expected("a weight that is a vector or a stack of matrices", f"shape {shape}", "MatMul"))
    if len(shape) < 2:
        return WeightLayout(1, 1, 1, shape[0]), WeightLayout(1, 1, shape[0], 1)
    rows, columns = WeightLayout(1, math.prod(shape[:-2]), shape[-2], shape[-1]), WeightLayout(1, math.prod(shape[:-1]), shape[-1], 1)
    return (columns, rows) if slot == 1 else (rows, columns)


def matmul_slot(node, view):
    return 1 if view.index.constant(node.inputs[1]) is not None or view.index.constant(node.inputs[0]) is None else 0


def conv_sample(node, view):
    shape = view.weight(node, 1).shape
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


def conv_terms(node, view):
    shape = view.weight(node, 1).shape
    inputs = shape[1] if node.op == "Conv" else shape[0] // node.attribute("group", 1)
    return inputs * math.prod(shape[2:])


def conv_outputs(node, slot, values):
    if slot != 1:
        return None
    if node.op == "Conv":
        return values.reshape(values.shape[0], -1)
    groups = node.attribute("group", 1)
    grouped = values.reshape(groups, values.shape[0] // groups, values.shape[1], -1)
    return grouped.swapaxes(1, 2).reshape(groups * values.shape[1], -1)


def gemm_terms(node, view):
    return gemm_weight(node, view)[2][0]


def gemm_sample(node, view):
    inner = gemm_terms(node, view)
    bias = view.index.constant(node.input(2))
    rows = bias.shape[0] if bias is not None and len(bias.shape) == 2 and bias.shape[0] > 1 else 3
    return {0: (inner, rows) if node.attribute("transA", 0) else (rows, inner)}


def gemm_outputs(node, slot, values):
    if slot != 1:
        return None
    return values if node.attribute("transB", 0) else values.T


def matmul_terms(node, view):
    slot = matmul_slot(node, view)
    return matmul_layouts(view.weight(node, slot), slot)[1].channels


def matmul_sample(node, view):
    slot = matmul_slot(node, view)
    weight, inner = view.weight(node, slot).shape, matmul_terms(node, view)
    known = view.small_shape(node.inputs[1 - slot])
    if known is None or len(weight) > 2:
        more = len(known or ()) - max(len(weight), 2)
        known = (*[2] * more, *weight[:-2], 3, 3)
    known = list(known)
    known[-1 if slot == 1 or len(known) == 1 else -2] = inner
    return {1 - slot: tuple(known)}


def matmul_outputs(node, slot, values):
    if values.ndim > 1 and slot == 1:
        values = values.swapaxes(-1, -2)
    return values.reshape(-1, values.shape[-1])


def elementwise_sample(node, view):
    slot = constant_slot(node, view.index)
    if slot is None:
        return {at: view.small_shape(value) for at, value in enumerate(node.inputs)}
    shape = view.index.constant(node.inputs[slot]).shape
    return {1 - slot: view.small_shape(node.inputs[1 - slot]) or tuple(2 if size == 1 else size for size in shape) or (2,)}


def batch_norm_sample(node, view):
    channels = view.index.constant(node.inputs[1]).shape[0]
    shape = list(view.small_shape(node.inputs[0]) or (2, channels, 3))
    shape[1:2] = [channels]
    return {0: tuple(shape)}


def recurrent_sample(node, view):
    return {0: (3, 2, view.weight(node, 1).shape[2])}


def recurrent_terms(node, view):
    return 8 * sum(view.weight(node, 1).shape[1:])


def recurrent_outputs(node, slot, values):
    return values.reshape(-1, values.shape[-1]) if slot == 1 else None


def one_term(node, view):
    return 1


def no_sample(node, view):
    return {}
