"""Copies of a model that can be compared: random numbers repeat, every output is a tensor of numbers, every branch can be chosen.

The same change is made to both models, so that what is compared is what differs between them.
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from fastbn.graph.nesting import is_standard, scopes_of

__all__ = ["BRANCHES", "comparable", "has_branches", "is_random", "with_branches"]

# Operators that draw random numbers from an attribute `seed`; Dropout does so in training mode.
RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")

# The graph inputs that choose the branch of every If and how often every Loop runs, and their values: one way, then the other.
CONDITION, TRIPS = "fastbn/condition", "fastbn/trips"
BRANCHES = {
    "then branches": {CONDITION: np.array(True), TRIPS: np.array(2)},
    "else branches": {CONDITION: np.array(False), TRIPS: np.array(1)},
}

# How many nodes an output that is no tensor of numbers is followed back.
MOST_STEPS_BACK = 8


def _nodes(proto: ModelProto) -> Iterator[NodeProto]:
    for graph in scopes_of(proto.graph):
        yield from graph.node
    for function in proto.functions:
        yield from function.node


def _draws(node: NodeProto) -> bool:
    return is_standard(node.domain) and (
        node.op_type in RANDOM or (node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] != "")
    )


def is_random(proto: ModelProto) -> bool:
    """Say whether a model draws random numbers."""
    return any(map(_draws, _nodes(proto)))


def comparable(proto: ModelProto) -> ModelProto | None:
    """Return a copy whose random nodes have seeds, by their place in the file, and whose outputs are tensors of numbers; None where the
    model is so already.

    An output that holds maps, sequences or strings gives way to the inputs of the node that makes it (ZipMap: the scores).
    """
    if not is_random(proto) and all(map(_is_numeric, proto.graph.output)):
        return None
    copy = ModelProto()
    copy.CopyFrom(proto)
    for number, node in enumerate(filter(_draws, _nodes(copy))):
        kept = [attribute for attribute in node.attribute if attribute.name != "seed"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("seed", number + 1 if node.op_type == "Dropout" else float(number + 1))])
    _replace_outputs(copy.graph)
    return copy


def _is_numeric(info: onnx.ValueInfoProto) -> bool:
    kind = info.type.WhichOneof("value")
    return kind is None or (kind == "tensor_type" and info.type.tensor_type.elem_type != TensorProto.STRING)


def _replace_outputs(graph: GraphProto) -> None:
    producers = {name: node for node in graph.node for name in node.output if name}
    typed = {info.name: info for info in (*graph.value_info, *graph.output, *graph.input)}
    pending, found = [(info, 0) for info in graph.output], {}
    for info, steps in pending:
        node = producers.get(info.name)
        if _is_numeric(info) or node is None or steps == MOST_STEPS_BACK:
            found[info.name] = info
            continue
        reads = [name for name in node.input if name in producers]
        pending.extend((typed.get(name) or onnx.ValueInfoProto(name=name), steps + 1) for name in reads)
    if list(found) != [info.name for info in graph.output]:
        kept = [_copy(info) for info in found.values()]
        del graph.output[:]
        graph.output.extend(kept)


def _copy(info: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(info)
    return copy


def has_branches(proto: ModelProto) -> bool:
    """Say whether a part of a model may run or not: it has an If or a Loop."""
    return any(node.op_type in ("If", "Loop") and is_standard(node.domain) for graph in scopes_of(proto.graph) for node in graph.node)


def with_branches(proto: ModelProto) -> ModelProto:
    """Return a copy in which two graph inputs, CONDITION and TRIPS, choose the branch of every If and how often every Loop runs."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    for graph in scopes_of(copy.graph):
        for node in graph.node:
            if not is_standard(node.domain):
                continue
            if node.op_type == "If":
                node.input[0] = CONDITION
            elif node.op_type == "Loop":
                node.input[0] = TRIPS
                node.input[1] = ""  # a condition that is false at first would keep the body from running
    copy.graph.input.append(helper.make_tensor_value_info(CONDITION, TensorProto.BOOL, []))
    copy.graph.input.append(helper.make_tensor_value_info(TRIPS, TensorProto.INT64, []))
    return copy
