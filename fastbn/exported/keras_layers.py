"""What each layer and operation of Keras is in ONNX: nodes over its variables, or None where it is opaque after all.

Kernels lie in the graph as the layers hold them, moved into ONNX's order by Transpose and Reshape, so that a new one can be moved back.
Layers without a bias have one of zeros there. A layer whose result no affine can pass or enter needs no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from onnx import TensorProto

from fastbn.exported.keras_nodes import FLOATS, Layer, Nodes, Value, is_last_of

__all__ = ["BETWEEN", "LAYERS", "OPERATIONS", "batch_norm"]

# The nodes so far, a layer, what it is called with -> its result; of an operation, what it is called with are values and numbers.
Rule: TypeAlias = Callable[[Nodes, Layer, "list[Value]"], "Value | None"]
OperationRule: TypeAlias = Callable[[Nodes, Any, "list[Any]"], "Value | None"]

# Layers that do nothing in inference.
NOTHING: tuple[str, ...] = (
    "Identity",
    "Dropout",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
    "GaussianNoise",
    "GaussianDropout",
)
NOTHING += ("AlphaDropout", "ActivityRegularization")

# Layers and operations of two operands -> their operator.
SUMS = {"Add": "Add", "Subtract": "Sub", "Multiply": "Mul", "Divide": "Div", "TrueDivide": "Div"}

# What a separable convolution adds between its two kernels: no layer has it as a variable, but the pointwise kernel makes a bias of it.
BETWEEN = "bias between"

# How ONNX calls padding.
PADDINGS = {"valid": "VALID", "same": "SAME_UPPER"}


def batch_norm(graph: Nodes, layer: Layer, values: list[Value]) -> tuple[Value, str]:
    """Add a batch normalization; return (its result, the name of its moving mean)."""
    rank = len(layer._inbound_nodes[0].outputs[0].shape)
    axis = layer.axis % rank
    mean, var = (keras.ops.convert_to_numpy(each) for each in (layer.moving_mean, layer.moving_variance))
    scale = graph.variable(layer, "gamma") if layer.scale else graph.constant(f"{layer.path}/ones", np.ones_like(mean))
    shift = graph.variable(layer, "beta") if layer.center else graph.constant(f"{layer.path}/none", np.zeros_like(mean))
    # ONNX holds epsilon as float32; what it has no place for goes into variances of float64.
    more = layer.epsilon - float(np.float32(layer.epsilon)) if var.dtype == np.float64 else 0.0
    names = [scale, shift, graph.variable(layer, "moving_mean"), graph.constant(f"{layer.path}/moving_variance", var + more)]
    perm = [0, axis, *(each for each in range(1, rank) if each != axis)]
    x = graph.node("BatchNormalization", [graph.moved(values[0], perm), *names], layer, epsilon=float(layer.epsilon))
    return graph.moved(x, np.argsort(perm).tolist()), names[2]


# ---- layers with weights ----


def _pads(layer: Layer, kernel_size: Sequence[int]) -> dict[str, Any] | None:
    if layer.padding != "causal":
        return {"auto_pad": PADDINGS[layer.padding]} if layer.padding in PADDINGS else None
    return {"pads": [(kernel_size[0] - 1) * layer.dilation_rate[0], 0]}


def _depthwise_weight(graph: Nodes, layer: Layer, attribute: str) -> tuple[Value, int, int]:
    """Return (a depthwise kernel in ONNX's order, its groups, its channels)."""
    *space, inner, times = shape = getattr(layer, attribute).shape
    reshaped = graph.sizes(f"{layer.path}/{attribute} shape", [*space, 1, inner * times])
    weight = graph.node("Reshape", [graph.variable(layer, attribute), reshaped])
    return graph.moved(weight, [len(shape) - 1, len(shape) - 2, *range(len(space))]), inner, inner * times


def _convolution(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    depthwise, kernel = "Depthwise" in type(layer).__name__, layer.kernel
    rank, pads = len(kernel.shape), _pads(layer, kernel.shape[:-2])
    if pads is None:
        return None
    if depthwise:
        weight, groups, channels = _depthwise_weight(graph, layer, "kernel")
    else:
        weight = graph.moved(graph.variable(layer, "kernel"), [rank - 1, rank - 2, *range(rank - 2)])
        groups, channels = layer.groups, kernel.shape[-1]
    bias = graph.variable(layer, "bias", _zeros(channels, kernel))
    sizes = {"strides": list(layer.strides), "dilations": list(layer.dilation_rate), "kernel_shape": list(kernel.shape[:-2])}
    x = graph.node("Conv", [graph.first(layer, values[0], rank), weight, bias], layer, group=groups, **pads, **sizes)
    return graph.activated(layer, graph.last(layer, x, rank))


def _separable(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    *space, _, _ = layer.depthwise_kernel.shape
    rank, pads = len(space) + 2, _pads(layer, space)
    if pads is None:
        return None
    weight, groups, channels = _depthwise_weight(graph, layer, "depthwise_kernel")
    between = graph.variable(layer, BETWEEN, _zeros(channels, layer.depthwise_kernel))
    sizes = {"strides": list(layer.strides), "dilations": list(layer.dilation_rate), "kernel_shape": space}
    x = graph.node("Conv", [graph.first(layer, values[0], rank), weight, between], layer, group=groups, **pads, **sizes)
    pointwise = graph.moved(graph.variable(layer, "pointwise_kernel"), [rank - 1, rank - 2, *range(rank - 2)])
    bias = graph.variable(layer, "bias", _zeros(layer.filters, layer.pointwise_kernel))
    x = graph.node("Conv", [x, pointwise, bias], layer, kernel_shape=[1] * len(space))
    return graph.activated(layer, graph.last(layer, x, rank))


def _transposed(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    from keras.src.backend.common.backend_utils import compute_conv_transpose_padding_args_for_jax

    *space, channels, _ = layer.kernel.shape
    rank, strides, dilations = len(space) + 2, list(layer.strides), list(layer.dilation_rate)
    given = (layer.kernel.shape, layer.strides, layer.padding, layer.output_padding, layer.dilation_rate)
    reaches = [(size - 1) * dilation for size, dilation in zip(space, dilations, strict=True)]
    sides = compute_conv_transpose_padding_args_for_jax([None] * rank, *given)
    # What lies before and behind what the kernel reaches is cut off; where more lies behind, zeros are appended.
    begins, ends = ([reach - pads[side] for reach, pads in zip(reaches, sides, strict=True)] for side in (0, 1))
    more = [max(0, -end) for end in ends]
    if min(begins) < 0 or any(size >= stride for size, stride in zip(more, strides, strict=True)):
        return None
    weight = graph.moved(graph.variable(layer, "kernel"), [rank - 1, rank - 2, *range(rank - 2)])
    bias = graph.variable(layer, "bias", _zeros(channels, layer.kernel))
    sizes = {"strides": strides, "dilations": dilations, "kernel_shape": space, "output_padding": more}
    pads = [*begins, *(max(0, end) for end in ends)]
    x = graph.node("ConvTranspose", [graph.first(layer, values[0], rank), weight, bias], layer, pads=pads, **sizes)
    return graph.activated(layer, graph.last(layer, x, rank))


def _dense(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    x = graph.node("MatMul", [values[0], graph.variable(layer, "kernel")], layer)
    bias = graph.variable(layer, "bias", _zeros(layer.kernel.shape[-1], layer.kernel))
    return graph.activated(layer, graph.node("Add", [x, bias], layer))


def _einsum_dense(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    x = graph.node("Einsum", [values[0], graph.variable(layer, "kernel")], layer, equation=layer.equation)
    return graph.activated(layer, x if layer.bias is None else graph.node("Add", [x, graph.variable(layer, "bias")], layer))


def _embedding(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    indices = values[0] if values[0].kind in (TensorProto.INT32, TensorProto.INT64) else graph.cast(values[0], TensorProto.INT32)
    return graph.node("Gather", [graph.variable(layer, "embeddings"), indices], layer, axis=0)


def _layer_norm(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    rank = len(layer._inbound_nodes[0].outputs[0].shape)
    if layer.gamma is None or layer.beta is None or layer.rms_scaling or [axis % rank for axis in layer.axis] != [rank - 1]:
        return None
    names = [graph.variable(layer, "gamma"), graph.variable(layer, "beta")]
    return graph.node("LayerNormalization", [values[0], *names], layer, axis=-1, epsilon=float(layer.epsilon))


def _zeros(size: int, like: Any) -> np.ndarray[Any, Any]:  # Any: a variable of Keras
    return np.zeros(size, keras.ops.convert_to_numpy(like).dtype)


# ---- activations ----


def _activation(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    return graph.activation(layer, values[0])


def _relu(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    if layer.threshold or (layer.max_value is not None and layer.negative_slope):
        return None
    if layer.max_value is not None:
        return graph.node("Clip", [*values, graph.number(0.0, values[0]), graph.number(float(layer.max_value), values[0])])
    return graph.node("LeakyRelu", values, alpha=float(layer.negative_slope)) if layer.negative_slope else graph.node("Relu", values)


def _leaky_relu(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    return graph.node("LeakyRelu", values, alpha=float(layer.negative_slope))


def _prelu(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    return graph.node("PRelu", [values[0], graph.variable(layer, "alpha")], layer)


def _nothing(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    return graph.node("Identity", values[:1])


# ---- windows and sizes ----


def _pooling(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    rank = len(layer.pool_size) + 2
    op = "MaxPool" if type(layer).__name__.startswith("Max") else "AveragePool"
    x = graph.first(layer, values[0], rank)
    sizes = {"kernel_shape": list(layer.pool_size), "strides": list(layer.strides)}
    return graph.last(layer, graph.node(op, [x], auto_pad=PADDINGS[layer.padding], **sizes), rank)


def _global_pooling(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    rank = int(type(layer).__name__[-2]) + 2
    op = "ReduceMax" if "Max" in type(layer).__name__ else "ReduceMean"
    axes = [*range(1, rank - 1)] if is_last_of(layer) else [*range(2, rank)]
    return graph.node(op, values, axes=axes, keepdims=int(layer.keepdims))


def _sides(sizes: Any) -> list[tuple[int, int]]:  # Any: as layers hold them, one pair alone or one for each axis
    return [sizes] if isinstance(sizes[0], int) else list(sizes)


def _zero_padding(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    sides = _sides(layer.padding)
    around = ([(0, 0)], [(0, 0)]) if is_last_of(layer) else ([(0, 0), (0, 0)], [])
    every = [*around[0], *sides, *around[1]]
    pads = [side[0] for side in every] + [side[1] for side in every]
    return graph.node("Pad", [values[0], graph.sizes(f"{layer.path}/pads", pads)])


def _cropping(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    sides = _sides(layer.cropping)
    first = 1 if is_last_of(layer) else 2
    rows = {
        "starts": [begin for begin, _ in sides],
        "ends": [-end if end else np.iinfo(np.int64).max for _, end in sides],
        "axes": [*range(first, first + len(sides))],
    }
    return graph.node("Slice", [values[0], *(graph.sizes(f"{layer.path}/{name}", sizes) for name, sizes in rows.items())])


def _up_sampling(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    sizes, interpolation = np.atleast_1d(layer.size).tolist(), getattr(layer, "interpolation", "nearest")
    if interpolation not in ("nearest", "bilinear"):
        return None
    rank = len(sizes) + 2
    how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    if interpolation == "bilinear":
        how = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    scales = graph.constant(f"{layer.path}/scales", np.array([1, 1, *sizes], np.float32))
    x = graph.node("Resize", [graph.first(layer, values[0], rank), "", scales], **how)
    return graph.last(layer, x, rank)


# ---- layout ----


def _flatten(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    rank = len(layer._inbound_nodes[0].input_tensors[0].shape)
    x = values[0] if is_last_of(layer) or rank < 3 else graph.moved(values[0], [0, *range(2, rank), 1])
    return graph.node("Flatten", [x], axis=1)


def _reshape(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    return graph.node("Reshape", [*values, graph.sizes(f"{layer.path}/shape", [0, *layer.target_shape])])


def _permute(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    return graph.moved(values[0], [0, *layer.dims])


def _repeat_vector(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    x = graph.node("Unsqueeze", [values[0], graph.sizes(f"{layer.path}/axes", [1])])
    return graph.node("Expand", [x, graph.sizes(f"{layer.path}/shape", [1, layer.n, 1])])


def _concatenate(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    return graph.node("Concat", values, axis=layer.axis) if all(isinstance(each, Value) for each in values) else None


# ---- arithmetic ----


def _combined(graph: Nodes, layer: Layer, values: list[Any]) -> Value | None:
    """Add the sum or the product of values, and of numbers that stand in the code."""
    like = next((each for each in values if isinstance(each, Value)), None)
    if like is None or len(values) < 2 or not all(isinstance(each, (Value, int, float)) for each in values):
        return None
    x, *others = (each if isinstance(each, Value) else graph.number(each, like) for each in values)
    if like.kind not in FLOATS or any(each.kind != like.kind for each in (x, *others)):
        return None
    for other in others:
        x = graph.node(SUMS[type(layer).__name__], [x, other])
    return x


def _average(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    x = values[0]
    for other in values[1:]:
        x = graph.node("Add", [x, other])
    return graph.node("Div", [x, graph.number(len(values), x)])


def _rescaling(graph: Nodes, layer: Layer, values: list[Value]) -> Value | None:
    if not all(isinstance(each, (int, float)) for each in (layer.scale, layer.offset)):
        return None
    x = graph.node("Mul", [values[0], graph.number(float(layer.scale), values[0])])
    return graph.node("Add", [x, graph.number(float(layer.offset), values[0])])


# ---- operations of keras.ops ----


def _plain(op: str) -> OperationRule:
    return lambda graph, operation, values: graph.node(op, values)


def _leaky(graph: Nodes, operation: Any, values: list[Any]) -> Value | None:
    return graph.node("LeakyRelu", values, alpha=float(operation.negative_slope))


def _reshaped(graph: Nodes, operation: Any, values: list[Any]) -> Value | None:
    shape = operation.newshape if isinstance(operation.newshape, (list, tuple)) else (operation.newshape,)
    if not all(isinstance(size, int) for size in shape):
        return None
    return graph.node("Reshape", [values[0], graph.sizes(f"{operation.name} shape", shape)], allowzero=1)


def _transpose(graph: Nodes, operation: Any, values: list[Any]) -> Value | None:
    rank = len(operation._inbound_nodes[0].outputs[0].shape)
    return graph.node("Transpose", values, perm=list(range(rank))[::-1] if operation.axes is None else list(operation.axes))


def _reduced(op: str) -> OperationRule:
    def rule(graph: Nodes, operation: Any, values: list[Any]) -> Value | None:
        if operation.axis is None or getattr(operation, "initial", None) is not None:
            return None
        axes = [operation.axis] if isinstance(operation.axis, int) else list(operation.axis)
        return graph.node(op, values, axes=axes, keepdims=int(operation.keepdims))

    return rule


SIZES = ("1D", "2D", "3D")
LAYERS: dict[str, Rule] = {
    "Activation": _activation,
    "Average": _average,
    "Concatenate": _concatenate,
    "Dense": _dense,
    "EinsumDense": _einsum_dense,
    "Embedding": _embedding,
    "Flatten": _flatten,
    "LayerNormalization": _layer_norm,
    "LeakyReLU": _leaky_relu,
    "PReLU": _prelu,
    "Permute": _permute,
    "ReLU": _relu,
    "RepeatVector": _repeat_vector,
    "Rescaling": _rescaling,
    "Reshape": _reshape,
    **dict.fromkeys(NOTHING, _nothing),
    **dict.fromkeys(["Add", "Subtract", "Multiply"], _combined),
    **{f"{kind}{size}": _convolution for kind in ("Conv", "DepthwiseConv") for size in SIZES},
    **{f"SeparableConv{size}": _separable for size in SIZES},
    **{f"Conv{size}Transpose": _transposed for size in SIZES},
    **{f"{kind}Pooling{size}": _pooling for kind in ("Max", "Average") for size in SIZES},
    **{f"Global{kind}Pooling{size}": _global_pooling for kind in ("Max", "Average") for size in SIZES},
    **{f"ZeroPadding{size}": _zero_padding for size in SIZES},
    **{f"Cropping{size}": _cropping for size in SIZES},
    **{f"UpSampling{size}": _up_sampling for size in SIZES},
}
OPERATIONS: dict[str, OperationRule] = {
    "Concatenate": _concatenate,
    "LeakyRelu": _leaky,
    "Max": _reduced("ReduceMax"),
    "Mean": _reduced("ReduceMean"),
    "Negative": _plain("Neg"),
    "Relu": _plain("Relu"),
    "Reshape": _reshaped,
    "Sigmoid": _plain("Sigmoid"),
    "Tanh": _plain("Tanh"),
    "Transpose": _transpose,
    **dict.fromkeys(SUMS, _combined),
}
