"""One standard operator on constants: run by the runtime that runs the model, its optimizer off, so that the value is the model's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from fastbn.errors import FastbnError, ModelError, expected
from fastbn.graph.model.element_types import dtype_of
from fastbn.graph.model.node import Node
from fastbn.graph.runtime import CARRIED, CARRIERS, carried, session

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["OPERATOR_IR", "Inputs", "Key", "evaluated", "is_numeric", "key_of"]

# The session of an operator is kept for the next node like it where the inputs have no more bytes than this.
KEPT_SESSION = 1 << 20

# The IR version of models of one operator: runtimes accept it together with every opset.
OPERATOR_IR = 8

# The types of outputs that are read, in the words of onnxruntime.
NUMERIC = frozenset(
    f"tensor({name})"
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float", "double", "float16", "bfloat16", "float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz", "float4e2m1"),
        *("int4", "uint4"),
    )
)

# Feeds -> outputs.
Run: TypeAlias = "Callable[[Mapping[str, Array]], list[Array]]"
# The inputs of a node by slot, None for an absent one.
Inputs: TypeAlias = "Sequence[Array | None]"
# Serialized node and types of its inputs (numbers of TensorProto): nodes with the same key give the same for the same inputs.
Key: TypeAlias = tuple[bytes, tuple[int | None, ...]]


def key_of(node: Node, arrays: Inputs) -> Key:
    """Return the Key of a node: serialized with the inputs i0, i1, ... and the outputs o0, o1, ..., and the types of the inputs."""
    kinds = tuple(None if array is None else helper.np_dtype_to_tensor_dtype(array.dtype) for array in arrays)
    proto = NodeProto(op_type=node.op, attribute=node.proto.attribute)
    proto.input.extend("" if kind is None else f"i{slot}" for slot, kind in enumerate(kinds))
    proto.output.extend("" if value is None else f"o{slot}" for slot, value in enumerate(node.outputs))
    return proto.SerializeToString(deterministic=True), kinds


def evaluated(key: Key, arrays: Inputs, opset: int) -> dict[int, Array] | None:
    """Return slot -> output of a standard operator for these inputs, None where the runtime cannot run it."""
    try:
        feeds = {f"i{slot}": carried(array) for slot, array in enumerate(arrays) if array is not None}
        is_large = sum(array.nbytes for array in feeds.values()) > KEPT_SESSION
        run, dtypes = (_operator.__wrapped__ if is_large else _operator)(*key, opset)
        given = run(feeds)
    except Exception:  # the runtime raises many kinds; a node that it cannot run is no constant
        return None
    if not all(isinstance(result, (np.ndarray, np.generic)) for result in given):  # a sequence or a map
        return None
    results = [np.asarray(result) for result in given]
    results = [result if dtype is None else result.astype(dtype) for result, dtype in zip(results, dtypes, strict=True)]
    if not all(is_numeric(result.dtype) for result in results):
        return None
    slots = [slot for slot, name in enumerate(NodeProto.FromString(key[0]).output) if name]
    return dict(zip(slots, results, strict=True))


def is_numeric(dtype: np.dtype[np.generic]) -> bool:
    """Say whether a type is that of truth values or of numbers that the runtime knows."""
    return dtype.kind in "biuf" or dtype.name in CARRIED


@lru_cache(maxsize=256)
def _operator(node: bytes, kinds: tuple[int | None, ...], opset: int) -> tuple[Run, list[np.dtype[np.generic] | None]]:
    """Return (feeds -> outputs, for each output the dtype to cast it to or None); kept: making a session takes longer than a run."""
    proto: NodeProto = NodeProto.FromString(node)
    nodes: list[NodeProto] = []
    inputs: list[ValueInfoProto] = []
    outputs = [name for name in proto.output if name]
    for slot, kind in enumerate(kinds):
        if kind is not None:
            inputs.append(helper.make_tensor_value_info(f"i{slot}", CARRIERS.get(kind, kind), None))
        if kind in CARRIERS:
            nodes.append(helper.make_node("Cast", [f"i{slot}"], [f"n{slot}"], to=kind))
            proto.input[slot] = f"n{slot}"
    nodes.append(proto)
    model = _model(nodes, inputs, outputs, opset)
    try:
        made = session(model.SerializeToString(), threads=1)
    except FastbnError:  # onnxruntime is not installed
        return _reference(proto, model), [None] * len(outputs)
    if not all(info.type in NUMERIC for info in made.get_outputs()):
        raise ModelError(expected("tensors of numbers", ", ".join(info.type for info in made.get_outputs()), proto.op_type))
    dtypes: list[np.dtype[np.generic] | None] = [None] * len(outputs)
    for slot, info in enumerate(made.get_outputs()):
        given = TensorProto.DataType.Value(info.type.removeprefix("tensor(").removesuffix(")").upper())
        if given in CARRIERS:
            dtypes[slot] = dtype_of(given)
            nodes.append(helper.make_node("Cast", [outputs[slot]], [f"w{slot}"], to=CARRIERS[given]))
            outputs[slot] = f"w{slot}"
    if any(dtypes):
        made = session(_model(nodes, inputs, outputs, opset).SerializeToString(), threads=1)
    return partial(made.run, None), dtypes


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
