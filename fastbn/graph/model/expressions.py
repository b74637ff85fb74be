"""Constant expressions: standard operators on constants, evaluated by the runtime that runs the model, within limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from fastbn.errors import FastbnError, ModelError, expected
from fastbn.graph.model.constant import Tensor
from fastbn.graph.model.nesting import is_standard
from fastbn.graph.model.node import Node, Shape, Value, is_complete
from fastbn.graph.model.storage import Source, tensor_dtype
from fastbn.graph.ops.registry import operator_row
from fastbn.graph.runtime import session

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["LARGEST_RESULT", "LARGEST_TOTAL", "Constants", "is_expression"]

# The most elements that a constant expression may read, and that it may give; what is larger is no constant.
LARGEST_RESULT = 1 << 24

# The most elements of all results of a model's constant expressions together.
LARGEST_TOTAL = 1 << 26

# The session of an operator is kept for the next node like it where the inputs have no more bytes than this.
KEPT_SESSION = 1 << 20

# Attribute of a Constant node -> the type of the attribute, the dtype of the constant.
LITERALS: dict[str, tuple[type, type[np.generic]]] = {
    "value_float": (float, np.float32),
    "value_floats": (tuple, np.float32),
    "value_int": (int, np.int64),
    "value_ints": (list, np.int64),
}

# The IR version of models of one operator: runtimes accept it together with every opset.
OPERATOR_IR = 8

# Feeds -> outputs.
Run: TypeAlias = "Callable[[Mapping[str, Array]], list[Array]]"
# The inputs of a node by slot, None for an absent one.
Inputs: TypeAlias = "Sequence[Array | None]"
# Serialized node and types of its inputs (numbers of TensorProto): nodes with the same key give the same for the same inputs.
Key: TypeAlias = tuple[bytes, tuple[int | None, ...]]


def is_expression(node: Node) -> bool:
    """Say whether the result of a node on constants is a constant: its operator is deterministic and has no bodies."""
    return operator_row(node).result_size is not None


class Constants:
    """The constants of a model: initializers, Constant nodes, and standard operators on constants.

    Parameters
    ----------
    nodes : iterable of model.Node
        All nodes, in the order of the data flow.
    opset : int
    source : storage.Source
    is_overridable : callable
        Value -> whether a caller may override its initializer.
    declared : callable
        Value -> the shape that the file itself declares, or None.
    """

    def __init__(
        self,
        nodes: Iterable[Node],
        opset: int,
        source: Source,
        is_overridable: Callable[[Value], bool],
        declared: Callable[[Value], Shape | None],
    ) -> None:
        self._opset = opset
        self._source = source
        self._is_overridable = is_overridable
        self._declared = declared
        self._tensors: dict[Value | None, Tensor | None] = {}
        self._too_large: set[Value | None] = set()
        self._refused: dict[int, set[Value | None]] = {}
        self._elements_left = LARGEST_TOTAL
        self._keys: dict[tuple[object, ...], Key] = {}
        self._candidates = _candidates(nodes)

    def find(self, value: Value | None, largest: int | None = None) -> Tensor | None:
        """Return the Tensor that a value always is, or None.

        With `largest`, no expression of more elements is evaluated, neither for the value nor for what it is computed from.
        """
        limit = LARGEST_RESULT if largest is None else min(largest, LARGEST_RESULT)
        refused = self._refused.setdefault(limit, set())
        pending = [value]
        while pending:
            current = pending[-1]
            if self._is_decided(current, refused):
                pending.pop()
                continue
            waiting = [read for read in _reads(current) if not self._is_decided(read, refused)]
            if waiting:
                pending.extend(waiting)
            elif current is not None:
                self._decide(current, limit, refused)
        return self._tensors.get(value)

    def known(self, value: Value) -> Tensor | None:
        """Return the Tensor of a value where it has been found already."""
        return self._tensors.get(value)

    def is_too_large(self, value: Value) -> bool:
        """Say whether a value would be a constant without the limits on its size."""
        return self.find(value) is None and value in self._too_large

    def evaluate(self, node: Node, arrays: Inputs, largest: int) -> list[Array] | None:
        """Return the outputs of a node for these inputs, None where they have more than `largest` elements or it cannot be run."""
        size = _result_size(node, arrays)
        return None if size is None or size > largest else _run(node, arrays, self._opset, self._keys)

    def _is_decided(self, value: Value | None, refused: set[Value | None]) -> bool:
        return value is None or value in self._tensors or value in refused or (value.initializer is None and value not in self._candidates)

    def _decide(self, value: Value, limit: int, refused: set[Value | None]) -> None:
        """Note what a value is, once everything is decided that it is computed from."""
        node = value.producer
        if value.initializer is not None:
            self._tensors[value] = None if self._is_overridable(value) else self._tensor(value.initializer, value.name)
        elif node is None:
            self._tensors[value] = None
        elif node.op in ("Identity", "Shape") and node.input(0) in refused:
            refused.add(value)
        elif node.op == "Identity":
            self._tensors[value] = self._tensors.get(node.input(0))
            self._too_large.update([value] if node.input(0) in self._too_large else ())
        elif node.op == "Constant":
            self._tensors[value] = self._constant_node(node)
        elif node.op == "Shape":
            self._tensors[value] = self._shape(node)
        else:
            self._expression(node, limit, refused)

    def _tensor(self, tensor: TensorProto, where: str) -> Tensor:
        return Tensor(tensor_dtype(tensor, where), tuple(tensor.dims), lambda: self._source.array(tensor))

    def _constant_node(self, node: Node) -> Tensor | None:
        if len(node.proto.attribute) != 1:
            return None
        name = node.proto.attribute[0].name
        if name == "value":
            return self._tensor(node.attribute(name, TensorProto()), node.label)
        if name not in LITERALS:
            return None
        kind, dtype = LITERALS[name]
        return _literal(np.asarray(node.find_attribute(name, kind), dtype))

    def _shape(self, node: Node) -> Tensor | None:
        data = node.required_input(0)
        known = self._tensors.get(data)
        shape = self._declared(data) if known is None else known.shape
        if not is_complete(shape):
            return None
        return _literal(np.asarray(shape[node.attribute("start", 0) : node.attribute("end", len(shape))], np.int64))

    def _expression(self, node: Node, limit: int, refused: set[Value | None]) -> None:
        """Evaluate a node for all its outputs, or note that it is beyond the limits."""
        outputs = [value for value in node.outputs if value is not None]
        if any(value in refused for value in node.inputs):
            refused.update(outputs)
            return
        inputs = [self._tensors.get(value) for value in node.inputs]
        if any(tensor is None and value is not None for value, tensor in zip(node.inputs, inputs, strict=True)):
            self._tensors.update(dict.fromkeys(outputs))
            self._too_large.update(outputs if any(value in self._too_large for value in node.inputs) else ())
            return
        size: float | None = math.inf
        arrays: list[Array | None] = []
        if sum(tensor.size for tensor in inputs if tensor is not None) <= limit:
            arrays = [None if tensor is None else tensor.array() for tensor in inputs]
            size = _result_size(node, arrays)
        if size is not None and size > min(limit, self._elements_left):
            (refused if limit < LARGEST_RESULT else self._too_large).update(outputs)
            self._tensors.update(dict.fromkeys(outputs) if limit >= LARGEST_RESULT else {})
            return
        results = None if size is None else _run(node, arrays, self._opset, self._keys)
        self._tensors.update(dict.fromkeys(outputs))
        if results is None:
            return
        for value in outputs:
            tensor = self._tensors[value] = _literal(results[value.slot])
            self._elements_left -= tensor.size


def _candidates(nodes: Iterable[Node]) -> set[Value]:
    """Return the values that constant nodes and expressions over constants give: one pass in the order of the data flow."""
    candidates: set[Value] = set()
    for node in nodes:
        if not is_standard(node.domain):
            continue
        constants_only = all(value is None or value in candidates or value.initializer is not None for value in node.inputs)
        if node.op in ("Constant", "Shape") or (constants_only and any(node.inputs) and (is_expression(node) or node.is_op("Identity"))):
            candidates.update(value for value in node.outputs if value is not None)
    return candidates


def _reads(value: Value | None) -> list[Value]:
    """Return the values that have to be decided before a candidate can be."""
    if value is None or value.producer is None or value.initializer is not None:
        return []
    return [read for read in value.producer.inputs if read is not None]


def _literal(array: Array) -> Tensor:
    array = np.asarray(array, order="C")  # ascontiguousarray would make a scalar a vector
    return Tensor(array.dtype, array.shape, lambda: array)


def _result_size(node: Node, arrays: Inputs) -> float | None:
    """Return how many elements a node gives in all, math.inf where it is sure to be too many, None where it cannot run."""
    given = [array for array in arrays if array is not None]
    result_size = operator_row(node).result_size
    if not given or result_size is None or not all(map(_is_numeric, given)):
        return None
    try:
        return result_size(node, given)
    except (ValueError, IndexError, TypeError, OverflowError):
        return None


def _run(node: Node, arrays: Inputs, opset: int, keys: dict[tuple[object, ...], Key]) -> list[Array] | None:
    """Return the outputs of a standard operator for these inputs, None where the runtime cannot run it.

    keys remembers the Key of a node for inputs of these types.
    """
    try:
        types = node, *(None if array is None else array.dtype for array in arrays)
        if types not in keys:
            keys[types] = _key(node, arrays)
        feeds = {f"i{slot}": _without_bfloat16(array) for slot, array in enumerate(arrays) if array is not None}
        is_large = sum(array.nbytes for array in feeds.values()) > KEPT_SESSION
        run, dtypes = (_operator.__wrapped__ if is_large else _operator)(*keys[types], opset)
        results = [np.asarray(result) for result in run(feeds)]
    except Exception:  # the runtime raises many kinds; a node that it cannot run is no constant
        return None
    results = [result if dtype is None else result.astype(dtype) for result, dtype in zip(results, dtypes, strict=True)]
    return results if all(_is_numeric(result) for result in results) else None


def _key(node: Node, arrays: Inputs) -> Key:
    """Return the Key of a node: serialized with the inputs i0, i1, ... and the outputs o0, o1, ..., and the types of the inputs."""
    kinds = tuple(None if array is None else helper.np_dtype_to_tensor_dtype(array.dtype) for array in arrays)
    proto = NodeProto(op_type=node.op, attribute=node.proto.attribute)
    proto.input.extend("" if kind is None else f"i{slot}" for slot, kind in enumerate(kinds))
    proto.output.extend(f"o{slot}" for slot in range(len(node.outputs)))
    return proto.SerializeToString(deterministic=True), kinds


def _is_numeric(array: np.ndarray) -> bool:
    return array.dtype.kind in "biuf" or _is_bfloat16(array)


def _is_bfloat16(array: np.ndarray) -> bool:
    return array.dtype.kind == "V" and array.dtype.name == "bfloat16"


def _without_bfloat16(array: Array) -> Array:
    """Return an array that the runtime takes: bfloat16, which NumPy does not have itself, as float32, which holds every value of it."""
    return array.astype(np.float32) if _is_bfloat16(array) else array


@lru_cache(maxsize=256)
def _operator(node: bytes, kinds: tuple[int | None, ...], opset: int) -> tuple[Run, list[np.dtype[np.generic] | None]]:
    """Return (feeds -> outputs, for each output the dtype to cast it to or None); kept: making a session takes longer than a run."""
    proto: NodeProto = NodeProto.FromString(node)
    nodes: list[NodeProto] = []
    inputs: list[ValueInfoProto] = []
    outputs = list(proto.output)
    for slot, kind in enumerate(kinds):
        if kind is not None:
            inputs.append(helper.make_tensor_value_info(f"i{slot}", TensorProto.FLOAT if kind == TensorProto.BFLOAT16 else kind, None))
        if kind == TensorProto.BFLOAT16:
            nodes.append(helper.make_node("Cast", [f"i{slot}"], [f"n{slot}"], to=kind))
            proto.input[slot] = f"n{slot}"
    nodes.append(proto)
    model = _model(nodes, inputs, outputs, opset)
    try:
        made = session(model.SerializeToString(), threads=1)
    except FastbnError:  # onnxruntime is not installed
        return _reference(proto, model), [None] * len(outputs)
    is_bfloat16 = [info.type == "tensor(bfloat16)" for info in made.get_outputs()]
    if any(is_bfloat16):
        for slot in np.flatnonzero(is_bfloat16).tolist():
            nodes.append(helper.make_node("Cast", [outputs[slot]], [f"w{slot}"], to=TensorProto.FLOAT))
            outputs[slot] = f"w{slot}"
        made = session(_model(nodes, inputs, outputs, opset).SerializeToString(), threads=1)
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    return partial(made.run, None), [dtype if each else None for each in is_bfloat16]


def _model(nodes: Sequence[NodeProto], inputs: Sequence[ValueInfoProto], outputs: Sequence[str], opset: int) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "constant", inputs, [ValueInfoProto(name=name) for name in outputs])
    return helper.make_model(graph, ir_version=OPERATOR_IR, opset_imports=[helper.make_opsetid("", opset)])


def _reference(proto: NodeProto, model: onnx.ModelProto) -> Run:
    """Return the node's outputs as a function of its feeds, by onnx's own evaluator; raises ModelError where that is known to be wrong."""
    from onnx.reference import ReferenceEvaluator

    axes = next((list(attribute.ints) for attribute in proto.attribute if attribute.name == "axes"), [])
    if proto.op_type in ("Squeeze", "Unsqueeze") and len(axes) > 1 and (min(axes) < 0 or axes != sorted(axes)):
        raise ModelError(expected("axes in order, from the front", str(axes), proto.op_type))
    evaluator = ReferenceEvaluator(model)

    def run(feeds: Mapping[str, Array]) -> list[Array]:
        with np.errstate(all="ignore"):
            return [np.asarray(result) for result in evaluator.run(None, dict(feeds))]

    return run
