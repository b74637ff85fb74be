"""The graph of a functional Keras model in ONNX, made layer by layer for the planner to read: what it need not know is an opaque node.

The kernels lie in it as the layers hold them, moved into ONNX's order by Transpose and Reshape, so that a new one can be moved back. Layers
without a bias have one of zeros there. No backend is asked for anything but the values of variables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fastbn.exported.variables import Norm
from fastbn.keras.layer import BatchNormalization

__all__ = ["KerasGraph"]

OPSET, IR_VERSION = 17, 8

# The domain of opaque nodes.
DOMAIN = "keras"

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

# Functions and layers of one operator -> that operator.
ACTIVATIONS = {"relu": "Relu", "linear": "Identity", "sigmoid": "Sigmoid", "tanh": "Tanh", "softplus": "Softplus"}
SUMS = {"Add": "Add", "Subtract": "Sub", "Multiply": "Mul"}

_Layer: TypeAlias = keras.layers.Layer
_Rule: TypeAlias = Callable[["KerasGraph", _Layer, "list[Value]"], "Value | None"]


class Value(str):
    """The name of a value of the graph, in the place of a tensor of Keras."""


class KerasGraph:
    """The graph of a model.

    Parameters
    ----------
    model : keras.Model
        Functional.

    Attributes
    ----------
    proto : onnx.ModelProto
    owners : dict of str -> (layer, str)
        Name of a constant -> the layer that holds it as a variable, and the name of the variable there.
    norms : dict of str -> Norm
        Name of a moving mean -> the batch normalization of the model.
    layers : dict of str -> layer
        By the names that nodes have.
    """

    def __init__(self, model: keras.Model) -> None:
        self.owners: dict[str, tuple[_Layer, str]] = {}
        self.norms: dict[str, Norm] = {}
        self.layers: dict[str, _Layer] = {}
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._infos: list[Any] = []
        inputs = [Value(f"input{number}") for number in range(len(model.inputs))]
        infos = [helper.make_tensor_value_info(x, _kind(t.dtype), _open(t.shape)) for x, t in zip(inputs, model.inputs, strict=True)]
        results = self._run(model, inputs)
        outputs = [self._node("Identity", [x]) for x in results]
        given = [helper.make_tensor_value_info(x, _kind(t.dtype), _open(t.shape)) for x, t in zip(outputs, model.outputs, strict=True)]
        graph = helper.make_graph(self._nodes, "keras", infos, given, list(self._constants.values()), value_info=self._infos)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        self.proto: ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    def _run(self, model: keras.Model, values: Sequence[Value]) -> list[Value]:
        function = model._functional if isinstance(model, keras.Sequential) else model
        results = function._run_through_graph(list(values), call_fn=self._call)
        return [x for x in keras.tree.flatten(results) if isinstance(x, Value)]

    def _call(self, op: Any, *args: Any, **kwargs: Any) -> Any:  # Any: an operation of Keras and its arguments
        """Add the nodes of one call of a layer or an operation; return the values that it gives, as it gives its tensors."""
        values = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, Value)]
        tensors = keras.tree.flatten(op._inbound_nodes[0].outputs)
        if isinstance(op, (keras.Sequential, keras.src.models.functional.Functional)):
            results = self._run(op, values)
            return results if len(results) > 1 else results[0]
        name = type(op).__name__
        is_own = type(op).__module__.split(".")[0] == "keras" or type(op) is BatchNormalization
        changed = getattr(op, "quantization_mode", None) or getattr(op, "lora_enabled", False) or kwargs.get("training")
        rule = RULES.get(name) if is_own and not changed and len(tensors) == 1 else None
        result = rule(self, op, values) if rule is not None else None
        return result if result is not None else self._opaque(op, values, tensors)

    # ---- nodes ----

    def _node(self, op: str, inputs: Sequence[str], layer: _Layer | None = None, **attributes: Any) -> Value:  # Any: of ONNX
        """Add a node of one output; the first one of a layer has its name, any other one that name, a slash and its output's."""
        output = Value(f"{'value' if layer is None else layer.name}.{len(self._nodes)}")
        name = str(output) if layer is None else layer.name if layer.name not in self.layers else f"{layer.name}/{output}"
        if layer is not None:
            self.layers.setdefault(layer.name, layer)
        self._nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def _opaque(self, op: Any, values: Sequence[Value], tensors: Sequence[Any]) -> Any:  # Any: an operation and tensors of Keras
        outputs = [Value(f"{op.name}.{len(self._nodes)}.{number}") for number in range(len(tensors))]
        self._infos += [helper.make_tensor_value_info(x, _kind(t.dtype), _open(t.shape)) for x, t in zip(outputs, tensors, strict=True)]
        self._nodes.append(helper.make_node(type(op).__name__, values, outputs, name=f"/{op.name}", domain=DOMAIN))
        return outputs if len(outputs) > 1 else outputs[0]

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> str:
        self._constants.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _variable(self, layer: _Layer, attribute: str, missing: np.ndarray[Any, Any]) -> str:
        """Return the name of the constant that a variable of a layer is; of one that it does not have, with these values."""
        name = f"{layer.path}/{attribute}"
        while name in self.owners and self.owners[name][0] is not layer:  # two layers of one path
            name += "_"
        variable = getattr(layer, attribute, None)
        self.owners[name] = layer, attribute
        return self._constant(name, missing if variable is None else keras.ops.convert_to_numpy(variable))

    def _moved(self, layer: _Layer, x: str, perm: Sequence[int]) -> Value:
        return self._node("Transpose", [x], perm=list(perm))

    def _first(self, layer: _Layer, x: Value, rank: int) -> Value:
        """Return data with its channels on axis 1."""
        return self._moved(layer, x, [0, rank - 1, *range(1, rank - 1)]) if _is_last(layer) and rank > 2 else x

    def _last(self, layer: _Layer, x: Value, rank: int) -> Value:
        """Return data whose channels are on axis 1 with them where the layer has them."""
        return self._moved(layer, x, [0, *range(2, rank), 1]) if _is_last(layer) and rank > 2 else x

    def _activated(self, layer: _Layer, x: Value) -> Value:
        """Return what the activation of a layer makes of its result."""
        name = getattr(layer.activation, "__name__", "")
        if name == "linear" or layer.activation is None:
            return x
        if name in ACTIVATIONS:
            return self._node(ACTIVATIONS[name], [x])
        return self._opaque(layer, [x], keras.tree.flatten(layer._inbound_nodes[0].outputs))  # type: ignore[no-any-return]  # one value

    # ---- rules: layer, values -> value, or None where the layer is opaque after all ----

    def batch_norm(self, layer: _Layer, values: list[Value]) -> Value | None:
        rank = len(layer._inbound_nodes[0].outputs[0].shape)
        axis = layer.axis % rank
        if axis not in (1, rank - 1):
            return None
        mean, var = (keras.ops.convert_to_numpy(each) for each in (layer.moving_mean, layer.moving_variance))
        names = [
            self._variable(layer, "gamma", np.ones_like(mean)) if layer.scale else self._constant(f"{layer.path}/ones", np.ones_like(mean)),
            self._variable(layer, "beta", np.zeros_like(mean))
            if layer.center
            else self._constant(f"{layer.path}/none", np.zeros_like(mean)),
            self._variable(layer, "moving_mean", mean),
        ]
        # ONNX holds epsilon as float32; what it has no place for goes into variances of float64.
        more = layer.epsilon - float(np.float32(layer.epsilon)) if var.dtype == np.float64 else 0.0
        names.append(self._constant(f"{layer.path}/moving_variance", var + more))
        self.norms[names[2]] = Norm(layer.name)
        is_moved = axis != 1
        x = self._moved(layer, values[0], [0, axis, *range(1, axis)]) if is_moved else values[0]
        x = self._node("BatchNormalization", [x, *names], layer, epsilon=float(layer.epsilon))
        return self._moved(layer, x, [0, *range(2, rank), 1]) if is_moved else x

    def convolution(self, layer: _Layer, values: list[Value]) -> Value | None:
        depthwise = "Depthwise" in type(layer).__name__
        kernel = layer.kernel
        rank = len(kernel.shape)
        if layer.padding not in ("valid", "same"):
            return None
        name = self._variable(layer, "kernel", np.empty(0))
        space, (inner, outer) = tuple(range(rank - 2)), kernel.shape[-2:]
        weight: str = name
        if depthwise:
            weight = self._node("Reshape", [name, self._constant(f"{layer.path}/shape", np.array([*kernel.shape[:-2], 1, inner * outer]))])
        groups, size = (inner, inner * outer) if depthwise else (layer.groups, outer)
        weight = self._moved(layer, weight, [rank - 1, rank - 2, *space])
        bias = self._variable(layer, "bias", np.zeros(size, keras.ops.convert_to_numpy(kernel).dtype))
        x = self._first(layer, values[0], rank)
        pads = "VALID" if layer.padding == "valid" else "SAME_UPPER"
        sizes = {"strides": list(layer.strides), "dilations": list(layer.dilation_rate), "kernel_shape": list(kernel.shape[:-2])}
        x = self._node("Conv", [x, weight, bias], layer, group=groups, auto_pad=pads, **sizes)
        return self._activated(layer, self._last(layer, x, rank))

    def dense(self, layer: _Layer, values: list[Value]) -> Value | None:
        kernel = keras.ops.convert_to_numpy(layer.kernel)
        name, bias = self._variable(layer, "kernel", kernel), self._variable(layer, "bias", np.zeros(kernel.shape[-1], kernel.dtype))
        x = self._node("MatMul", [values[0], name], layer)
        return self._activated(layer, self._node("Add", [x, bias], layer))

    def activation(self, layer: _Layer, values: list[Value]) -> Value | None:
        name = getattr(layer.activation, "__name__", "")
        return self._node(ACTIVATIONS[name], values) if name in ACTIVATIONS else None

    def relu(self, layer: _Layer, values: list[Value]) -> Value | None:
        plain = layer.max_value is None and layer.threshold == 0
        return (
            self._node("LeakyRelu", values, alpha=float(layer.negative_slope))
            if plain and layer.negative_slope
            else (self._node("Relu", values) if plain else None)
        )

    def leaky_relu(self, layer: _Layer, values: list[Value]) -> Value | None:
        return self._node("LeakyRelu", values, alpha=float(layer.negative_slope))

    def nothing(self, layer: _Layer, values: list[Value]) -> Value | None:
        return self._node("Identity", values)

    def pooling(self, layer: _Layer, values: list[Value]) -> Value | None:
        rank = len(layer.pool_size) + 2
        op = "MaxPool" if type(layer).__name__.startswith("Max") else "AveragePool"
        pads = "VALID" if layer.padding == "valid" else "SAME_UPPER"
        x = self._first(layer, values[0], rank)
        x = self._node(op, [x], kernel_shape=list(layer.pool_size), strides=list(layer.strides), auto_pad=pads)
        return self._last(layer, x, rank)

    def global_pooling(self, layer: _Layer, values: list[Value]) -> Value | None:
        rank = int(type(layer).__name__[-2]) + 2
        op = "ReduceMax" if "Max" in type(layer).__name__ else "ReduceMean"
        axes = [*range(1, rank - 1)] if _is_last(layer) else [*range(2, rank)]
        return self._node(op, values, axes=axes, keepdims=int(layer.keepdims))

    def flatten(self, layer: _Layer, values: list[Value]) -> Value | None:
        return self._node("Flatten", values, axis=1) if _is_last(layer) else None

    def reshape(self, layer: _Layer, values: list[Value]) -> Value | None:
        return self._node("Reshape", [*values, self._constant(f"{layer.path}/shape", np.array([0, *layer.target_shape]))])

    def permute(self, layer: _Layer, values: list[Value]) -> Value | None:
        return self._moved(layer, values[0], [0, *layer.dims])

    def concatenate(self, layer: _Layer, values: list[Value]) -> Value | None:
        return self._node("Concat", values, axis=layer.axis)

    def combined(self, layer: _Layer, values: list[Value]) -> Value | None:
        if len(values) < 2:  # beside a number
            return None
        x = values[0]
        for other in values[1:]:
            x = self._node(SUMS[type(layer).__name__], [x, other])
        return x


def _is_last(layer: _Layer) -> bool:
    return bool(getattr(layer, "data_format", "channels_last") != "channels_first")


def _kind(dtype: str) -> int:
    """Return a type of Keras as a number of TensorProto."""
    return int(TensorProto.BFLOAT16 if dtype == "bfloat16" else helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _open(shape: Sequence[int | None]) -> list[int | None]:
    return [None if size is None else int(size) for size in shape]


SIZES = ("1D", "2D", "3D")
RULES: dict[str, _Rule] = {
    "BatchNormalization": KerasGraph.batch_norm,
    "Dense": KerasGraph.dense,
    "Activation": KerasGraph.activation,
    "ReLU": KerasGraph.relu,
    "LeakyReLU": KerasGraph.leaky_relu,
    "Flatten": KerasGraph.flatten,
    "Reshape": KerasGraph.reshape,
    "Permute": KerasGraph.permute,
    "Concatenate": KerasGraph.concatenate,
    **dict.fromkeys(NOTHING, KerasGraph.nothing),
    **dict.fromkeys(SUMS, KerasGraph.combined),
    **dict.fromkeys([f"{kind}{size}" for kind in ("Conv", "DepthwiseConv") for size in SIZES], KerasGraph.convolution),
    **dict.fromkeys([f"{kind}Pooling{size}" for kind in ("Max", "Average") for size in SIZES], KerasGraph.pooling),
    **dict.fromkeys([f"Global{kind}Pooling{size}" for kind in ("Max", "Average") for size in SIZES], KerasGraph.global_pooling),
}
