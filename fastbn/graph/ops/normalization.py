"""BatchNormalization; other normalizations, whose own scale and bias take an affine that stands behind them."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, NodeProto, helper

from fastbn.affine import batch_norm_affine
from fastbn.dtypes import DTYPES, dtype_name
from fastbn.errors import ModelError, expected
from fastbn.graph.model.constant import Constant, Dense, float64_of_all
from fastbn.graph.model.nesting import is_standard
from fastbn.graph.model.node import Node
from fastbn.graph.ops.affine import Affine, FloatArray
from fastbn.graph.ops.placing import axis_in, axis_of, require_axis, require_channels
from fastbn.graph.ops.row import PresentGraph, Row, Transfer, Traveler, one_term
from fastbn.graph.ops.shape_rules import Size, Sizes, each_once, same_sizes
from fastbn.graph.reasons import Refusal, first_few

__all__ = [
    "ADVICE",
    "BATCH_NORM",
    "BIAS",
    "EPSILON",
    "NORMALIZATION",
    "SCALE",
    "batch_norm_training",
    "is_batch_norm",
    "node_counts",
    "used_statistics",
]

BATCH_NORM: Final = "BatchNormalization"
SCALE, BIAS, MEAN, VAR = 1, 2, 3, 4
PARAMETERS = {SCALE: "scale", BIAS: "bias", MEAN: "mean", VAR: "var"}

# What to do about one in training mode, as the end of a sentence.
ADVICE: Final = "; --as-inference makes it use the running ones"

# Why an affine does not pass the other normalizations along the data flow.
NOTHING_PASSES = "which takes out what is common to all that it normalizes, but for its eps, and lets nothing else pass"

# ONNX's default. An attribute is a float32, and in a float64 model the distance to 1e-5 is larger than rounding.
EPSILON = float(np.float32(1e-5))


def is_batch_norm(node: Node) -> bool:
    """Say whether a node is ONNX's own BatchNormalization."""
    return node.is_op(BATCH_NORM)


def node_counts(calls: Iterable[tuple[str, str]], functions: Iterable[FunctionProto]) -> tuple[int, int]:
    """Return how many nodes there are, and how many of them are batch normalizations.

    Parameters
    ----------
    calls : iterable of (str, str)
        Domain and operator of each node.
    functions : iterable of onnx.FunctionProto
        Their nodes count too.
    """
    every = [*calls, *((node.domain, node.op_type) for function in functions for node in function.node)]
    return len(every), sum(op == BATCH_NORM and is_standard(domain) for domain, op in every)


# scale = weight / sqrt(var + eps), shift = bias - mean * scale, along axis 1.
def _lift(node: Node, graph: PresentGraph) -> Affine:
    _refuse_training(node, graph.opset)
    _refuse_per_element(node, graph)
    if len(node.inputs) != 5 or any(value is None for value in node.inputs):
        raise ModelError(expected("5 inputs", f"{sum(value is not None for value in node.inputs)}", node.label))
    scale, bias, mean, var = parameters = [_parameter(node, slot, name, graph) for slot, name in PARAMETERS.items()]
    channels = math.prod(var.shape)
    if math.prod(mean.shape) == channels == 0 < math.prod(scale.shape):
        raise Refusal(
            "training", "its mean and variance are empty: it normalizes with the statistics of the batch, as a training graph does"
        )
    if not channels:
        raise Refusal("bad-parameters", "it has no channels")
    for slot, parameter in zip(PARAMETERS, parameters, strict=True):
        if parameter.shape != (channels,):
            where = f"{node.label}.{node.proto.input[slot]}"
            raise ModelError(expected(f"shape ({channels},)", f"shape {parameter.shape}", where))
    eps = node.attribute("epsilon", EPSILON)
    weights, biases, means, variances = arrays = float64_of_all(parameters)
    good = variances + eps > 0
    for values in arrays:
        good &= np.isfinite(values)
    if np.count_nonzero(good) < channels:
        bad = np.flatnonzero(~good).tolist()
        which = f"channel{'s' if len(bad) > 1 else ''} {first_few(bad)}"
        raise Refusal("bad-parameters", f"a parameter is Inf or NaN, or var + eps is not positive, in {which}")
    rank = graph.rank(node.inputs[0])
    if rank is not None and rank < 2 and channels > 1:
        raise Refusal("axis", f"its data has rank {rank} and no axis for {channels} channels")
    factors, shift = batch_norm_affine(weights, biases, means, variances, eps)
    graph.refuse_widening(node, BIAS, bias)
    abs_terms = np.abs(means * factors) + (bias.abs_terms if isinstance(bias, Dense) else np.abs(biases))
    # A value of one channel may be a list: it has no axis 1 then.
    return Affine(factors, shift, 1, 2 if channels == 1 else 0, abs_terms)


def _refuse_per_element(node: Node, graph: PresentGraph) -> None:
    """spatial=0 (before opset 9) has parameters per element; on data of shape (N, C) an element is a channel."""
    if node.attribute("spatial", 1):
        return
    rank = graph.rank(node.input(0))
    if rank == 2:
        return
    if rank is None:
        raise Refusal("axis-unknown", "spatial=0, and the rank of its data is not known: only on (N, C) are its parameters per channel")
    repair = "onnxruntime does not run it; where the exporter meant parameters per channel (MXNet), spatial=1 is the repair"
    raise Refusal("per-element", f"spatial=0 on data of rank {rank}: its parameters are per element, not per channel; {repair}")


def _parameter(node: Node, slot: int, name: str, graph: PresentGraph) -> Constant:
    value = node.inputs[slot]
    constant = graph.tensor(node, slot)
    assert value is not None, "counted before"
    if constant is None:
        if graph.is_overridable(value):
            sentence = f"its {name} '{value.name}' is also a graph input, which a caller may override: --freeze-inputs makes it a constant"
            raise Refusal("overridable-parameters", sentence)
        raise Refusal("dynamic-parameters", f"its {name} '{value.name}' {graph.why_no_constant(value)}")
    if dtype_name(constant.dtype) not in DTYPES:
        raise Refusal("unsupported-type", f"its {name} is {constant.dtype}")
    return constant


def _refuse_training(node: Node, opset: int) -> None:
    training, used = batch_norm_training(node, opset), used_statistics(node)
    if training is not None:
        raise Refusal("training", f"{training}{f', and {used}' if used else ADVICE}")
    if used is not None:  # in inference these outputs are not defined; where nothing reads them, they leave with the node
        raise Refusal("training", f"it hands out running statistics: {used}")


def used_statistics(node: Node) -> str | None:
    """Return who uses the statistics that a batch normalization hands out, None where nobody does."""
    for value in node.outputs[1:]:
        if value is not None and value.is_output:
            return f"its statistics '{value.name}' are a graph output"
        if value is not None and value.readers:
            reader = value.readers[0][0]
            return f"{reader.op} '{reader.label}' reads its statistics '{value.name}'"
    return None


def batch_norm_training(node: Node, opset: int) -> str | None:
    """Return what makes a batch normalization use the statistics of the batch, None for an inference one: training_mode=1; opset 7 to 13
    with a second output; opset 1 and 6 without is_test."""
    if opset >= 14:
        return "training_mode=1: it normalizes with the statistics of the batch" if node.attribute("training_mode", 0) else None
    if len(node.outputs) > 1:
        return f"it has {len(node.outputs)} outputs, which before opset 14 means training, with the statistics of the batch"
    if opset < 7 and not node.attribute("is_test", 0):
        return f"opset {opset} without is_test=1 means training, with the statistics of the batch"
    return None


# n its normalized input, s its scale:  backward S*(weight * n + bias) + T = (S*weight) n + (S*bias + T);  forward
# s (S x + T - mean) + bias = s S (x - mean) + (bias + s (T - mean (1 - S))).
def _backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine = traveler.affine
    if graph.affine(node) is None:
        raise Refusal("no-absorber", f"it reads {node.op} '{node.label}', which must stay as it is")
    weight, bias = graph.dense(node, SCALE), graph.dense(node, BIAS)
    require_axis(node, affine, axis_of(node, affine, traveler.value, graph), 1, "output")
    require_channels(node, affine, weight.shape[0], "output")
    scale, shift, abs_terms = affine.along(weight.shape[0])
    return Transfer({SCALE: weight.times(scale), BIAS: bias.affine(scale, shift, abs_terms)})


def _forward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine, own = traveler.affine, graph.affine(node)
    if traveler.slot != 0 or own is None:
        raise Refusal("no-absorber", f"{node.op} '{node.label}' reads it, which must stay as it is")
    weight, bias, mean = (graph.dense(node, slot) for slot in (SCALE, BIAS, MEAN))
    require_axis(node, affine, axis_of(node, affine, traveler.value, graph), 1, "input")
    require_channels(node, affine, weight.shape[0], "input")
    scale, shift, abs_terms = affine.along(weight.shape[0])
    moved = own.scale * (shift - mean.values * (1 - scale))
    size = np.abs(own.scale) * (abs_terms + np.abs(mean.values * (1 - scale)))
    return Transfer({SCALE: weight.times(scale), BIAS: bias.affine(1.0, moved, size)})


def _factor_reach(node: Node, slot: int, graph: PresentGraph) -> FloatArray | None:
    if slot != SCALE:
        return None
    return np.asarray(1 / np.sqrt(graph.dense(node, VAR).values + node.attribute("epsilon", EPSILON)))


def _probe_shapes(node: Node, graph: PresentGraph) -> dict[int, tuple[int, ...] | None]:
    scale, data = graph.constant(node.inputs[SCALE]), node.inputs[0]
    assert scale is not None, "it has been lifted"
    channels = scale.shape[0]
    shape = [*((None if data is None else graph.probe_shape(data)) or (2, channels, 3))]
    shape[1:2] = [channels]
    return {0: tuple(shape)}


def _magnitude(slot: int, array: NDArray[Any]) -> NDArray[Any]:
    """|x| - mean must not cancel, so the mean is taken as -|mean|; a variance is a magnitude already."""
    if slot == VAR:
        return array
    return np.asarray(-np.abs(array) if slot == MEAN else np.abs(array))


def _demanded_size(node: Node, scale: Sizes) -> tuple[int, Size]:
    return 1, scale[0] if len(scale) == 1 else None


# InstanceNormalization, GroupNormalization, LayerNormalization, RMSNormalization, n what they normalize, of the rank of
# the input:  backward S*(scale * n + bias) + T = (S*scale) n + (S*bias + T).
def _channels_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine = traveler.affine
    scale = graph.dense(node, SCALE)
    if len(scale.shape) != 1:
        raise ModelError(expected("a list of scales", f"shape {scale.shape}", node.label))
    bias = graph.bias(node, BIAS, scale.shape, scale.dtype)
    require_axis(node, affine, axis_of(node, affine, node.required_input(0), graph), 1, "output")
    require_channels(node, affine, scale.shape[0], "output")
    factor, shift, abs_terms = affine.along(scale.shape[0])
    return Transfer({SCALE: scale.times(factor), BIAS: bias.affine(factor, shift, abs_terms)})


def _normalized_reach(node: Node, slot: int, graph: PresentGraph) -> float | None:
    return 1.0 if slot == SCALE else None


def _last_axes_backward(node: Node, traveler: Traveler, graph: PresentGraph) -> Transfer:
    affine, scale = traveler.affine, graph.dense(node, SCALE)
    rank = graph.rank(node.input(0))
    if rank is None and affine.axis is not None and affine.axis >= 0:
        raise Refusal("axis-unknown", f"the rank of '{traveler.value.name}' at {node.op} '{node.label}' is not known")
    if rank is not None:
        axis_in(node, affine, rank)
    factor, shift, abs_terms = affine.shaped(rank)
    if _broadcast(node, factor.shape, scale.shape) != scale.shape:
        raise Refusal("axis", f"its channels are not those that the scale of {node.op} '{node.label}' of shape {scale.shape} runs along")
    transfer = Transfer({SCALE: scale.times(factor)})
    if node.op == "RMSNormalization" and affine.shifts:
        raise Refusal("shift-cannot-pass", f"{node.op} '{node.label}' has no bias to take the shift")
    if affine.shifts or graph.has(node, BIAS):
        bias = graph.dense(node, BIAS) if graph.has(node, BIAS) else Dense.zeros(scale.shape, scale.dtype)
        shape = _broadcast(node, scale.shape, bias.shape)
        if shape not in (scale.shape, bias.shape):
            raise Refusal("grows", f"the bias of {node.op} '{node.label}' would grow from shape {bias.shape} to {shape}")
        zeros = np.zeros(shape)
        transfer.constants[BIAS] = bias.affine(factor + zeros, shift + zeros, abs_terms + zeros)
    return transfer


def _broadcast(node: Node, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that some shapes broadcast to; raises ModelError where they do not."""
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        raise ModelError(expected("a scale and a bias that broadcast", f"shapes {shapes}", node.label)) from None


def _last_axes_bound(proto: NodeProto) -> list[NodeProto]:
    """4 |scale| + |bias|: a normalized number is seldom larger than 4. The output is made of zeros like the data."""
    data, scale, output = proto.input[0], proto.input[1], proto.output[0]
    bias = proto.input[2] if len(proto.input) > 2 else ""
    names = [f"{output}/{step}" for step in ("zeros", "ones", "twos", "fours", "scaled")]
    _become(proto, "Sub", [data, data], names[0])
    last = names[4] if bias else output
    nodes = [
        helper.make_node("Exp", [names[0]], [names[1]]),
        helper.make_node("Add", [names[1], names[1]], [names[2]]),
        helper.make_node("Add", [names[2], names[2]], [names[3]]),
        helper.make_node("Mul", [names[3], scale], [last]),
    ]
    return [*nodes, helper.make_node("Add", [last, bias], [output])] if bias else nodes


def _channels_bound(proto: NodeProto) -> list[NodeProto]:
    """The same per channel, as a BatchNormalization of zeros with a mean of -4 and a variance of 1."""
    (data, scale, bias), output = proto.input[:3], proto.output[0]
    names = [f"{output}/{step}" for step in ("zeros", "nothing", "ones", "twos", "fours", "mean")]
    _become(proto, "Sub", [data, data], names[0])
    return [
        helper.make_node("Sub", [scale, scale], [names[1]]),
        helper.make_node("Exp", [names[1]], [names[2]]),
        helper.make_node("Add", [names[2], names[2]], [names[3]]),
        helper.make_node("Add", [names[3], names[3]], [names[4]]),
        helper.make_node("Neg", [names[4]], [names[5]]),
        helper.make_node("BatchNormalization", [names[0], scale, bias, names[5], names[2]], [output]),
    ]


def _images_of_several(node: Node, graph: PresentGraph) -> dict[int, tuple[int, ...] | None]:
    """Return the shape of the data with more than one element per channel: of a single one, only the rounding of x / sqrt(eps) is left."""
    data = node.inputs[0]
    shape = None if data is None else graph.probe_shape(data)
    is_one = shape is not None and all(size == 1 for size in shape[2:])
    return {0: (*shape[:2], *(3 for _ in shape[2:])) if shape is not None and is_one else shape}


def _become(proto: NodeProto, op: str, inputs: list[str], output: str) -> None:
    proto.Clear()
    proto.CopyFrom(helper.make_node(op, inputs, [output]))


_CHANNELS = Row(
    _channels_backward,
    forward_refusal=NOTHING_PASSES,
    bias_slot=BIAS,
    factor_reach=_normalized_reach,
    terms=one_term,
    probe_shapes=_images_of_several,
    bound=_channels_bound,
    sizes=same_sizes,
    work=each_once,
)
_LAST_AXES = Row(
    _last_axes_backward,
    forward_refusal=NOTHING_PASSES,
    bias_slot=BIAS,
    factor_reach=_normalized_reach,
    terms=one_term,
    bound=_last_axes_bound,
    sizes=same_sizes,
    work=each_once,
)

NORMALIZATION = {
    BATCH_NORM: Row(
        _backward,
        _forward,
        lift=_lift,
        bias_slot=BIAS,
        factor_reach=_factor_reach,
        terms=one_term,
        probe_shapes=_probe_shapes,
        magnitude=_magnitude,
        sizes=same_sizes,
        demanded_size=_demanded_size,
        work=each_once,
    ),
    "InstanceNormalization": replace(_CHANNELS, ends_on_nothing=True),
    "GroupNormalization": _CHANNELS,
    "LayerNormalization": _LAST_AXES,
    "RMSNormalization": replace(_LAST_AXES, bias_slot=None),
    "LRN": Row(sizes=same_sizes),
    **dict.fromkeys(("LpNormalization", "MeanVarianceNormalization"), Row(work=each_once)),
}
