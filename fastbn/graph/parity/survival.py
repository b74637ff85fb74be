"""Which sizes a model may not be run with: some kernels of onnxruntime end the process where their data have no elements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from fastbn.errors import ModelError
from fastbn.graph.model.element_types import dtype_of
from fastbn.graph.model.index import Index
from fastbn.graph.model.node import Node, is_complete
from fastbn.graph.ops.registry import operator_row
from fastbn.graph.runtime import Runnable, runtime_errors

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["Feed", "Shapes", "reader_of_nothing"]

# Name of a graph input -> its values; -> its sizes.
Feed: TypeAlias = "dict[str, Array]"
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


def reader_of_nothing(index: Index, shapes: Shapes, feed: Feed) -> Node | None:
    """Return a node that would end the process with these sizes of the graph inputs, None where there is none.

    Shape inference tells most sizes. For others the model is run with nodes in their places that survive, and that give the same sizes.
    """
    fragile = [node for node in index.order if operator_row(node).ends_on_nothing]
    if not fragile:
        return None
    try:
        sized = Index(index.source, index.freeze_inputs, shapes)
    except ModelError:
        return None
    unknown = []
    for node in fragile:
        shape = sized.shape(sized.scopes[node.scope.number].find(node.required_input(0).name))
        if shape is not None and 0 in shape:
            return node
        if not is_complete(shape) and node.scope is index.main:
            unknown.append(node)
    return _run_with_substitutes(index, unknown, feed) if unknown else None


def _run_with_substitutes(index: Index, nodes: list[Node], feed: Feed) -> Node | None:
    """Return the first of some nodes whose data have no elements."""
    copy = onnx.ModelProto()
    copy.CopyFrom(index.proto)
    names = list(dict.fromkeys(node.required_input(0).name for node in nodes))
    for node in index.main.nodes:
        if operator_row(node).ends_on_nothing:
            substitute = _substitute(node, copy)
            if substitute is None:
                return node
            copy.graph.node[node.position].CopyFrom(substitute)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    try:
        session = Runnable.of(index.source).with_proto(copy).session()
        known = {entry.name for entry in session.get_inputs()}
        sizes = dict(zip(names, session.run(names, {name: values for name, values in feed.items() if name in known}), strict=True))
    except runtime_errors():
        return None  # what it stops at stops the model too
    return next((node for node in nodes if not np.size(sizes[node.required_input(0).name])), None)


def _substitute(node: Node, copy: onnx.ModelProto) -> NodeProto | None:
    """Return a node whose results have the same sizes: Identity of a normalization, a plain recurrent network of a GRU; else None."""
    if node.op != "GRU":
        return helper.make_node("Identity", list(node.proto.input[:1]), list(node.proto.output[:1]))
    weight = node.required_input(1).initializer
    if weight is None or len(weight.dims) != 3 or weight.dims[1] % 3:
        return None
    directions, units, width = weight.dims[0], weight.dims[1] // 3, weight.dims[2]
    dtype = dtype_of(weight.data_type)
    zeros = [np.zeros((directions, units, size), dtype) for size in (width, units)]
    inputs = [f"{node.label}/zeros/{number}" for number in range(2)]
    copy.graph.initializer.extend(numpy_helper.from_array(values, name) for values, name in zip(zeros, inputs, strict=True))
    attributes = [each for each in node.proto.attribute if each.name in ("direction", "hidden_size", "layout")]
    made = helper.make_node("RNN", [node.proto.input[0], *inputs], list(node.proto.output))
    made.attribute.extend(attributes)
    if len(node.proto.input) > 4:
        made.input.extend(["", *node.proto.input[4:6]])
    return made
