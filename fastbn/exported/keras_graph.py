"""The graph of a functional Keras model in ONNX, made layer by layer for the planner to read: what it need not know is an opaque node.

No backend is asked for anything but the values of variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from onnx import ModelProto, helper

from fastbn.exported.keras_layers import LAYERS, OPERATIONS, batch_norm
from fastbn.exported.keras_nodes import DOMAIN, FLOATS, Layer, Nodes, Value, kind_of
from fastbn.exported.variables import Norm
from fastbn.keras.layer import BatchNormalization

__all__ = ["NORMS", "KerasGraph"]

OPSET, IR_VERSION = 17, 8

NORMS = (keras.layers.BatchNormalization, BatchNormalization)

# Where Keras's own operations are.
OWN_OPERATIONS = ("keras.src.ops.nn", "keras.src.ops.numpy")


class KerasGraph(Nodes):
    """The graph of a model.

    Parameters
    ----------
    model : keras.Model
        Functional.

    Attributes
    ----------
    proto : onnx.ModelProto
    norms : dict of str -> Norm
        Name of a moving mean -> the batch normalization of the model.
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__()
        self.norms: dict[str, Norm] = {}
        inputs = [Value(f"input{number}", kind_of(tensor.dtype)) for number, tensor in enumerate(model.inputs)]
        infos = [_info(x, tensor) for x, tensor in zip(inputs, model.inputs, strict=True)]
        outputs = [self.node("Identity", [x]) for x in self._run(model, inputs)]
        given = [_info(x, tensor) for x, tensor in zip(outputs, model.outputs, strict=True)]
        graph = helper.make_graph(self.made, "keras", infos, given, list(self.constants.values()), value_info=self.infos)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        self.proto: ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    def _run(self, model: keras.Model, values: Sequence[Value]) -> list[Value]:
        function = model._functional if isinstance(model, keras.Sequential) else model
        results = function._run_through_graph(list(values), call_fn=self._call)
        return [x for x in keras.tree.flatten(results) if isinstance(x, Value)]

    def _call(self, op: Any, *args: Any, **kwargs: Any) -> Any:  # Any: an operation of Keras and its arguments
        """Add the nodes of one call of a layer or an operation; return the values that it gives, as it gives its tensors."""
        given = keras.tree.flatten((args, {name: each for name, each in kwargs.items() if name != "mask"}))
        if isinstance(op, (keras.Sequential, keras.src.models.functional.Functional)):
            results = self._run(op, [x for x in given if isinstance(x, Value)])
        else:
            result = self._known(op, given) if not kwargs.get("training") else None
            values = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, Value)]
            results = self.opaque(op, values, type(op).__name__) if result is None else [result]
        return results if len(results) > 1 else results[0]

    def _known(self, op: Any, given: list[Any]) -> Value | None:  # Any: an operation of Keras and its arguments
        """Return what a layer or an operation gives that has a rule, which masks make no difference to; None for any other one."""
        if not isinstance(op, keras.layers.Layer):
            rule = OPERATIONS.get(type(op).__name__) if type(op).__module__ in OWN_OPERATIONS else None
            return None if rule is None else rule(self, op, given)
        if getattr(op, "quantization_mode", None) or getattr(op, "lora_enabled", False):
            return None
        values = self._cast(op, [x for x in given if isinstance(x, Value)])
        if type(op) in NORMS:
            result, mean = batch_norm(self, op, values)
            self.norms[mean] = Norm(op.name)
            return result
        known = LAYERS.get(type(op).__name__) if type(op).__module__.startswith("keras.src.layers.") else None
        return None if known is None else known(self, op, values)

    def _cast(self, layer: Layer, values: list[Value]) -> list[Value]:
        """Return values in the type of a layer's variables: how it rounds in between, the graph need not know."""
        if not layer.autocast or layer.variable_dtype not in ("float16", "bfloat16", "float32", "float64"):
            return values
        kind = kind_of(layer.variable_dtype)
        return [self.cast(x, kind) if x.kind in FLOATS else x for x in values]


def _info(x: Value, tensor: Any) -> Any:  # Any: a KerasTensor, a ValueInfoProto
    return helper.make_tensor_value_info(x, x.kind, [None if size is None else int(size) for size in tensor.shape])
