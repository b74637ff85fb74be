"""Conv, ConvTranspose and DeformConv, and the affine that becomes the center of a sibling's kernel (RepVGG)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.affine import WeightLayout
from fastbn.errors import ModelError, expected
from fastbn.graph.model.constant import Constant, Dense
from fastbn.graph.model.node import Node
from fastbn.graph.model.quantized import Dequantized, Requantized
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.multiples import multiple_of
from fastbn.graph.ops.placing import axis_in, constant_slot, require_axis, require_channels
from fastbn.graph.ops.row import PresentGraph, Row, SiblingMerge, Transfer, Traveler
from fastbn.graph.ops.shape_rules import Size, Sizes, same_batch
from fastbn.graph.ops.weighted import scaled, summed
from fastbn.graph.reasons import Refusal

__all__ = ["CONVOLUTION", "merged_into_sibling"]

WEIGHT, BIAS = 1, 2

# Of a DeformConv.
OFFSET, DEFORM_BIAS, MASK = 2, 3, 4


def _weight(node: Node, graph: PresentGraph) -> tuple[Constant, int]:
    """Return (weight, groups) of a convolution."""
    weight, groups = graph.weight(node, WEIGHT), node.attribute("group", 1)
    if len(weight.shape) < 3 or groups < 1 or weight.shape[0] % groups or 0 in weight.shape:
        raise ModelError(expected(f"convolution weights that {groups} groups divide", f"shape {weight.shape}", node.label))
    count = len(weight.shape) - 2
    for name, length in (("strides", count), ("dilations", count), ("pads", 2 * count)):
        sizes = node.attribute(name, [1] * length)
        if len(sizes) != length or (name != "pads" and min(sizes) < 1):
            raise ModelError(expected(f"{length} {name} for {count} axes", f"{sizes}", node.label))
    data = node.inputs[0]
    declared = None if data is None else graph.declared_shape(data)
    channels = weight.shape[0] if node.op == "ConvTranspose" else weight.shape[1] * groups
    if declared and (len(declared) != len(weight.shape) or declared[1] not in (None, channels)):
        raise ModelError(expected(f"weights for an input of shape {declared}", f"shape {weight.shape}", node.label))
    return weight, groups


# Conv:  backward S*(W x + b) + T = (S*W) x + (S*b + T), S along axis 0 of W;  forward W (S x + T) + b = (W*S) x + (b + W T), S along the
# input channels of each group, and W T is the same everywhere only where no padding takes part.
def _conv_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    weight, _ = _weight(node, graph)
    layout = WeightLayout(1, 1, weight.shape[0], math.prod(weight.shape[1:]))
    transfer = _into_outputs(node, traveler.affine, graph, weight, layout, weight.shape[0])
    skip = traveler.skip
    if skip is None:
        return transfer
    # S*(W x + b) + T + R x = (S*W + R at the center) x + (S*b + T), where the convolution reads the same x.
    added, data = None, multiple_of(node.required_input(0), graph)
    if data.root is skip.source:
        added = _added_to_center(node, skip.scale.times(1 / data.number), transfer.constants.get(WEIGHT, weight))
    if added is None:
        raise Refusal("other-branch", f"Conv '{node.label}' does not see each element of '{skip.source.name}' at its center")
    transfer.constants[WEIGHT] = added
    transfer.beside = data.via
    return transfer


# DeformConv:  as Conv, but that its samples may lie beyond the border, where a shift would be missing.
def _deform_conv_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    weight, _ = _weight(node, graph)
    layout = WeightLayout(1, 1, weight.shape[0], math.prod(weight.shape[1:]))
    return _into_outputs(node, traveler.affine, graph, weight, layout, weight.shape[0], DEFORM_BIAS)


def _deform_conv_forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    weight, groups = _weight(node, graph)
    if traveler.affine.shifts:
        raise Refusal("padding", f"DeformConv '{node.label}' may sample beyond the border, where a shift would be missing")
    layout = WeightLayout(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
    return _into_inputs(node, traveler, traveler.affine, graph, weight, layout, weight.shape[0])


def _conv_forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    weight, groups = _weight(node, graph)
    layout = WeightLayout(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
    if traveler.affine.shifts and _pads(node, weight):
        raise Refusal("padding", f"Conv '{node.label}' pads its input with zeros, which a shift would have to change")
    return _into_inputs(node, traveler, traveler.affine, graph, weight, layout, weight.shape[0])


def _pads(node: Node, weight: Constant) -> bool:
    """Say whether zeros of padding take part in a convolution; with auto_pad, a kernel of ones never asks for any."""
    mode = node.attribute("auto_pad", b"NOTSET")
    if mode in (b"SAME_UPPER", b"SAME_LOWER"):
        return any(size > 1 for size in weight.shape[2:])
    return mode != b"VALID" and any(node.attribute("pads", []))


# ConvTranspose: W is (C_in, C_out / groups, ...): group g of the inputs holds the outputs g * C_out/groups ... A shift of its input reaches
# every output alike only where each output sums one full kernel: stride 1 and nothing of the border kept.
def _conv_transpose_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    weight, groups = _weight(node, graph)
    layout = WeightLayout(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
    return _into_outputs(node, traveler.affine, graph, weight, layout, weight.shape[1] * groups)


def _conv_transpose_forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    weight, groups = _weight(node, graph)
    affine = traveler.affine
    if affine.shifts and not _sums_whole_kernels(node, weight):
        raise Refusal("padding", f"the borders of ConvTranspose '{node.label}' sum parts of its kernel, which a shift would reach unevenly")
    layout = WeightLayout(1, 1, weight.shape[0], math.prod(weight.shape[1:]))
    channels = weight.shape[1] * groups
    transfer = _into_inputs(node, traveler, affine.scale_only(), graph, weight, layout, channels)
    if affine.shifts:
        # One row per output channel: (group, channel of the group, inputs of the group, kernel).
        grouped = (groups, weight.shape[0] // groups, weight.shape[1], -1)
        values = Dense.of(weight).values.reshape(grouped).swapaxes(1, 2)
        shift, abs_terms = (part.reshape(groups, 1, -1, 1) for part in affine.along(weight.shape[0])[1:])
        bias = graph.bias(node, BIAS, (channels,), weight.dtype)
        added, size = (values * shift).sum(axis=(2, 3)).reshape(-1), (np.abs(values) * abs_terms).sum(axis=(2, 3)).reshape(-1)
        transfer.constants[BIAS] = bias.affine(1.0, added, size)
    return transfer


def _sums_whole_kernels(node: Node, weight: Constant) -> bool:
    count = len(weight.shape) - 2
    pads, strides = node.attribute("pads", [0] * 2 * count), node.attribute("strides", [1] * count)
    reach = [d * (k - 1) for k, d in zip(weight.shape[2:], node.attribute("dilations", [1] * count), strict=True)]
    plain = node.attribute("auto_pad", b"NOTSET") == b"NOTSET" and "output_shape" not in node.attributes
    none_added = not any(node.attribute("output_padding", []))
    return plain and none_added and all(s == 1 for s in strides) and all(pads[i] >= r <= pads[i + count] for i, r in enumerate(reach))


def _into_outputs(
    node: Node, affine: Affine, graph: PresentGraph, weight: Constant, layout: WeightLayout, channels: int, bias_slot: int = BIAS
) -> Transfer:
    """Return the transfer of an affine of the output: into the weight along its output channels, and into the bias."""
    require_axis(node, affine, axis_in(node, affine, len(weight.shape)), 1, "output")
    require_channels(node, affine, channels, "output")
    scale, shift, abs_terms = affine.along(channels)
    transfer = Transfer()
    if affine.scales:
        transfer.constants[WEIGHT] = scaled(weight, layout, scale)
    if affine.shifts or graph.has(node, bias_slot):
        transfer.constants[bias_slot] = graph.bias(node, bias_slot, (channels,), weight.dtype).affine(scale, shift, abs_terms)
    return transfer


def _into_inputs(
    node: Node, traveler: Traveler, affine: Affine, graph: PresentGraph, weight: Constant, layout: WeightLayout, channels: int
) -> Transfer:
    """Return the transfer of an affine that the input lacks: into the weight along its input channels, its shift as a sum into the bias."""
    if traveler.slot != 0:
        raise Refusal("no-absorber", f"it is the weight or the bias of {node.op} '{node.label}'")
    inputs = layout.groups * layout.channels
    require_axis(node, affine, axis_in(node, affine, len(weight.shape)), 1, "input")
    require_channels(node, affine, inputs, "input")
    transfer = Transfer()
    if affine.scales:
        transfer.constants[WEIGHT] = scaled(weight, layout, affine.along(inputs)[0])
    if affine.shifts:
        added, size = summed(weight, layout, affine)
        transfer.constants[BIAS] = graph.bias(node, BIAS, (channels,), weight.dtype).affine(1.0, added, size)
    return transfer


def merged_into_sibling(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer | None:
    """Return the transfer that makes an affine part of a convolution of the same value that it is added to, None where there is none.

    S x + T is a 1x1 depthwise convolution: its kernel is added to the tap of the sibling that sees the element itself.
    """
    operand = node.inputs[traveler.slot]
    if node.op == "Sub" or len(node.inputs) != 2 or operand is None or operand.producer is not traveler.origin.node:
        return None
    origin = multiple_of(traveler.origin.value, graph)
    pending: list[tuple[int, Node, list[Node]]] = [(1 - traveler.slot, node, [])]
    while pending:
        at, reader, via = pending.pop()
        other = reader.inputs[at]
        sibling = None if other is None else graph.producer(graph.source(other))
        if other is None or sibling is None or sibling.scope is not node.scope:
            continue
        if sibling.is_op("Add", "Conv"):
            graph.check(sibling)
        graph.refuse_readers(other, reader, at)
        if sibling.is_op("Add") and constant_slot(sibling, graph) is None:
            pending.extend((slot, sibling, [*via, sibling]) for slot in range(len(sibling.inputs)))
        elif sibling.is_op("Conv") and (data := multiple_of(sibling.required_input(0), graph)).root is origin.root:
            weight, _ = _weight(sibling, graph)
            added = _added_to_center(sibling, traveler.affine.times(origin.number / data.number), weight)
            if added is not None:
                channels = weight.shape[0]
                bias = graph.bias(sibling, BIAS, (channels,), weight.dtype).affine(1.0, *traveler.affine.along(channels)[1:])
                if isinstance(bias, Requantized):
                    return None
                return Transfer(
                    merge=SiblingMerge(sibling, {WEIGHT: added, BIAS: bias}, via, 1 - traveler.slot), beside=(*origin.via, *data.via)
                )
    return None


def _added_to_center(conv: Node, affine: Affine, weight: Constant | Requantized) -> Dense | None:
    """Return a weight with the affine's scale on the tap that sees each element itself, None where there is no such tap, or no float."""
    if isinstance(weight, (Dequantized, Requantized)):
        return None
    groups, channels = conv.attribute("group", 1), weight.shape[0]
    count = len(weight.shape) - 2
    dilations, mode = conv.attribute("dilations", [1] * count), conv.attribute("auto_pad", b"NOTSET")
    pads = conv.attribute("pads", [0] * 2 * count) if mode == b"NOTSET" else [0] * 2 * count
    if mode in (b"SAME_UPPER", b"SAME_LOWER"):
        reach = [step * (size - 1) for step, size in zip(dilations, weight.shape[2:], strict=True)]
        less, more = [size // 2 for size in reach], [size - size // 2 for size in reach]
        pads = [*less, *more] if mode == b"SAME_UPPER" else [*more, *less]
    plain = all(step == 1 for step in conv.attribute("strides", []))
    same = all(pads[i] + pads[i + count] == dilations[i] * (size - 1) for i, size in enumerate(weight.shape[2:]))
    if not plain or not same or any(pads[i] % dilations[i] for i in range(count)) or weight.shape[1] * groups != channels:
        return None
    if affine.axis is not None and (affine.axis % len(weight.shape) != 1 or affine.channels != channels):
        return None
    scale = affine.along(channels)[0]
    tap = (np.asarray(pads[i] // dilations[i]) for i in range(count))
    dense = Dense.of(weight)
    values, sizes = dense.values.copy(), dense.abs_terms.copy()
    at = (np.arange(channels), np.arange(channels) % weight.shape[1], *tap)
    values[at] += scale
    sizes[at] += np.abs(scale)
    return Dense(weight.dtype, values, sizes)


def _probe_shapes(node: Node, graph: PresentGraph) -> dict[int, tuple[int, ...] | None]:
    shape = graph.weight(node, WEIGHT).shape
    groups = node.attribute("group", 1)
    channels = shape[0] if node.op == "ConvTranspose" else shape[1] * groups
    kernel, count = shape[2:], len(shape) - 2
    dilations = node.attribute("dilations", [1] * count)
    strides = node.attribute("strides", [1] * count)
    if node.op != "ConvTranspose":
        spatial = [d * (k - 1) + 1 + s for k, d, s in zip(kernel, dilations, strides, strict=True)]
    else:
        pads = node.attribute("pads", [0] * 2 * count)
        spatial = [2 + -(-(pads[i] + pads[i + count]) // strides[i]) for i in range(count)]
    return {0: (2, channels, *spatial)}


def _deform_probe_shapes(node: Node, graph: PresentGraph) -> dict[int, tuple[int, ...] | None]:
    kernel = graph.weight(node, WEIGHT).shape[2:]
    count = len(kernel)
    data = _probe_shapes(node, graph)[0]
    assert data is not None, "made of the weight"
    ones = [1] * count
    dilations, strides, pads = node.attribute("dilations", ones), node.attribute("strides", ones), node.attribute("pads", [0] * 2 * count)
    out = [(size + pads[i] + pads[i + count] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i, size in enumerate(data[2:])]
    points = node.attribute("offset_group", 1) * math.prod(kernel)
    return {0: data, OFFSET: (data[0], points * count, *out), MASK: (data[0], points, *out)}


def _terms(node: Node, graph: PresentGraph) -> int:
    shape = graph.weight(node, WEIGHT).shape
    inputs = shape[0] // node.attribute("group", 1) if node.op == "ConvTranspose" else shape[1]
    return inputs * math.prod(shape[2:])


def _weight_matrix(node: Node, slot: int, values: NDArray[Any]) -> NDArray[Any] | None:
    if slot != WEIGHT:
        return None
    if node.op != "ConvTranspose":
        return values.reshape(values.shape[0], -1)
    groups = node.attribute("group", 1)
    grouped = values.reshape(groups, values.shape[0] // groups, values.shape[1], -1)
    return grouped.swapaxes(1, 2).reshape(groups * values.shape[1], -1)


def _work(node: Node, arrays: Sequence[NDArray[Any] | None], size: float) -> float:
    data, weight = arrays[0], arrays[WEIGHT]
    assert data is not None, "ONNX demands both"
    assert weight is not None, "ONNX demands both"
    return (size if node.op == "Conv" else data.size) * weight.size / max(weight.shape[0] if weight.ndim else 1, 1)


# The weight tells the rank, and the channels of both sides.
def _sizes(node: Node, inputs: Sequence[Sizes | None]) -> Sizes | None:
    data, weight = inputs[0], inputs[1] if len(inputs) > 1 else None
    if weight is None or len(weight) < 3:
        return same_batch(node, inputs)
    channels, groups = weight[1 if node.op == "ConvTranspose" else 0], node.attribute("group", 1)
    space: list[Size] = [None] * (len(weight) - 2)
    if data is not None and len(data) == len(weight) and node.op == "Conv" and _keeps_space(node, weight[2:]):
        space = [*data[2:]]
    if isinstance(channels, int) and node.op == "ConvTranspose":
        channels *= groups
    return (data[0] if data else None, channels, *space)


def _keeps_space(node: Node, kernel: Sizes) -> bool:
    """Say whether a Conv gives images of the size that it takes: it goes in steps of 1, and the padding is what the window takes away."""
    count = len(kernel)
    if node.attribute("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER"):
        return all(step == 1 for step in node.attribute("strides", [1] * count))
    pads, dilations = node.attribute("pads", [0] * 2 * count), node.attribute("dilations", [1] * count)
    if node.attribute("auto_pad", b"NOTSET") != b"NOTSET" or len(pads) != 2 * count or len(dilations) != count:
        return False
    around = [before + behind for before, behind in zip(pads[:count], pads[count:], strict=True)]
    windows = zip(kernel, dilations, around, strict=True)
    fits = all(isinstance(size, int) and step * (size - 1) == pad for size, step, pad in windows)
    return fits and all(step == 1 for step in node.attribute("strides", [1] * count))


def _demanded_size(node: Node, weight: Sizes) -> tuple[int, Size]:
    transposed = node.op == "ConvTranspose"
    size = weight[0 if transposed else 1] if len(weight) > 2 else None
    return 1, size * node.attribute("group", 1) if not transposed and isinstance(size, int) else size


_SHARED = Row(
    channel_axis=1,
    bias_slot=BIAS,
    terms=_terms,
    probe_shapes=_probe_shapes,
    weight_matrix=_weight_matrix,
    sizes=_sizes,
    demanded_size=_demanded_size,
    work=_work,
)

CONVOLUTION = {
    "Conv": replace(_SHARED, backward=_conv_backward, forward=_conv_forward, takes_skip=True),
    "ConvTranspose": replace(_SHARED, backward=_conv_transpose_backward, forward=_conv_transpose_forward),
    # Each sample is an average of four elements.
    "DeformConv": replace(
        _SHARED,
        backward=_deform_conv_backward,
        forward=_deform_conv_forward,
        bias_slot=DEFORM_BIAS,
        probe_shapes=_deform_probe_shapes,
        signed_slots=(OFFSET,),
        terms=lambda node, graph: 4 * _terms(node, graph),
        sized=True,
    ),
}
