"""Nodes of a graph in ONNX for layers of Keras: constants that are variables of a layer, channels where ONNX has them, opaque nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import keras
import numpy as np
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["DOMAIN", "FLOATS", "Layer", "Nodes", "Value", "is_last_of", "kind_of"]

Layer: TypeAlias = keras.layers.Layer

# The domain of opaque nodes.
DOMAIN = "keras"

FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)

# Functions of one operator that lets an affine pass, or of one that says more of a reason than its name does -> that operator.
ACTIVATIONS = {
    keras.activations.linear: "Identity",
    keras.activations.relu: "Relu",
    keras.activations.leaky_relu: "LeakyRelu",
    keras.activations.sigmoid: "Sigmoid",
    keras.activations.tanh: "Tanh",
    keras.activations.softplus: "Softplus",
}

# The slope of keras.activations.leaky_relu.
LEAKY_SLOPE = 0.2


class Value(str):
    """The name of a value of the graph, in the place of a tensor of Keras, with its type there."""

    kind: int

    def __new__(cls, name: str, kind: int) -> Value:
        """Make a name of a type, a number of TensorProto."""
        made = super().__new__(cls, name)
        made.kind = kind
        return made


class Nodes:
    """A graph that grows.

    Attributes
    ----------
    owners : dict of str -> (layer, str)
        Name of a constant -> the layer that holds it as a variable, and the name of the variable there.
    layers : dict of str -> layer
        By the names that nodes have.
    """

    def __init__(self) -> None:
        self.owners: dict[str, tuple[Layer, str]] = {}
        self.layers: dict[str, Layer] = {}
        self.made: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.infos: list[Any] = []

    def node(self, op: str, inputs: Sequence[str], layer: Layer | None = None, **attributes: Any) -> Value:  # Any: of ONNX
        """Add a node of one output, of the type of its first input; return that. The first node of a layer has its name, any other one
        that name, a slash and its output's."""
        kind = inputs[0].kind if isinstance(inputs[0], Value) else TensorProto.FLOAT
        kind = attributes["to"] if op == "Cast" else kind
        output = Value(f"{'value' if layer is None else layer.name}.{len(self.made)}", kind)
        name = str(output) if layer is None else layer.name if layer.name not in self.layers else f"{layer.name}/{output}"
        if layer is not None:
            self.layers.setdefault(layer.name, layer)
        self.made.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def opaque(self, op: Any, values: Sequence[Value], what: str) -> list[Value]:  # Any: a layer or an operation of Keras
        """Add a node that the planner does not know, of a layer or an operation; return its outputs."""
        kinds = [kind_of(tensor.dtype) for tensor in keras.tree.flatten(op._inbound_nodes[0].outputs)]
        outputs = [Value(f"{op.name}.{len(self.made)}.{number}", kind) for number, kind in enumerate(kinds)]
        shapes = (_merged(op, number) for number in range(len(kinds)))
        self.infos += [helper.make_tensor_value_info(x, x.kind, shape) for x, shape in zip(outputs, shapes, strict=True)]
        self.made.append(helper.make_node(what, values, outputs, name=f"/{op.name}", domain=DOMAIN))
        return outputs

    def constant(self, name: str, array: Array) -> str:
        """Return the name of a constant, which is added where there is none of it."""
        self.constants.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def number(self, value: float, like: Value) -> Value:
        """Return a constant of one element, of the type of a value."""
        dtype = helper.tensor_dtype_to_np_dtype(like.kind)
        return Value(self.constant(f"number {value!r} {dtype.name}", np.array(value, dtype)), like.kind)

    def sizes(self, name: str, sizes: Sequence[int]) -> str:
        """Return the name of a constant of whole numbers."""
        return self.constant(name, np.array(sizes, np.int64))

    def variable(self, layer: Layer, attribute: str, missing: Array | None = None) -> Value:
        """Return the constant that a variable of a layer is; of one that it does not have, with these values."""
        name = f"{layer.path}/{attribute}"
        while name in self.owners and self.owners[name][0] is not layer:  # two layers of one path
            name += "_"
        variable = getattr(layer, attribute, None)
        self.owners[name] = layer, attribute
        array = missing if variable is None else keras.ops.convert_to_numpy(variable)
        assert array is not None, "a rule asks for variables that its layer has, or gives their values"
        return Value(self.constant(name, array), helper.np_dtype_to_tensor_dtype(array.dtype))

    def cast(self, x: Value, kind: int) -> Value:
        """Return a value in a type."""
        return x if x.kind == kind else self.node("Cast", [x], to=kind)

    def moved(self, x: Value, perm: Sequence[int]) -> Value:
        """Return data with its axes in another order."""
        return x if list(perm) == sorted(perm) else self.node("Transpose", [x], perm=list(perm))

    def first(self, layer: Layer, x: Value, rank: int) -> Value:
        """Return data with its channels on axis 1."""
        return self.moved(x, [0, rank - 1, *range(1, rank - 1)]) if is_last_of(layer) else x

    def last(self, layer: Layer, x: Value, rank: int) -> Value:
        """Return data whose channels are on axis 1 with them where the layer has them."""
        return self.moved(x, [0, *range(2, rank), 1]) if is_last_of(layer) else x

    def activated(self, layer: Layer, x: Value) -> Value:
        """Return what the activation of a layer makes of its result."""
        return x if layer.activation in (None, keras.activations.linear) else self.activation(layer, x)

    def activation(self, layer: Layer, x: Value) -> Value:
        """Return what the activation of a layer makes of a value."""
        op = ACTIVATIONS.get(layer.activation) if callable(layer.activation) else None
        if op is not None:
            return self.node(op, [x], **({"alpha": LEAKY_SLOPE} if op == "LeakyRelu" else {}))
        return self.opaque(layer, [x], getattr(layer.activation, "__name__", type(layer.activation).__name__))[0]


def is_last_of(layer: Layer) -> bool:
    """Say whether a layer has channels last."""
    return bool(getattr(layer, "data_format", "channels_last") != "channels_first")


def kind_of(dtype: str) -> int:
    """Return a type of Keras as a number of TensorProto."""
    return int(TensorProto.BFLOAT16 if dtype == "bfloat16" else helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _merged(op: Any, number: int) -> list[int | None] | None:  # Any: a layer or an operation of Keras
    """Return the shape of an output in all calls of a layer or an operation: sizes that differ are open, and where ranks do, all is."""
    shapes = [keras.tree.flatten(node.outputs)[number].shape for node in op._inbound_nodes]
    if len(set(map(len, shapes))) > 1:
        return None
    return [int(sizes[0]) if len(set(sizes)) == 1 and sizes[0] is not None else None for sizes in zip(*shapes, strict=True)]
