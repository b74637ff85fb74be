"""Copies of a model that can be compared: random numbers repeat, every output is a tensor of numbers, every branch can be chosen.

The same change is made to both models, so that what is compared is what differs between them.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from fastbn.graph.model.nesting import bodies, is_standard, scopes_of

__all__ = ["comparable", "has_branches", "is_random", "with_branches"]

# Operators that draw random numbers from an attribute `seed`; Dropout does so in training mode.
RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")

# The graph inputs that choose the branch of every If, by how many others it stands in, and how often every Loop runs.
CONDITION, TRIPS = "fastbn/condition/{}", "fastbn/trips"

# An If inside more of them than this takes the branch that one further out takes.
MOST_NESTED = 3

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


def with_branches(proto: ModelProto) -> tuple[ModelProto, dict[str, dict[str, NDArray]]]:
    """Return a copy in which graph inputs choose the branch of every If and how often every Loop runs, and name -> values of these inputs
    with which every branch is taken once and every Loop runs."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    conditions = [CONDITION.format(depth) for depth in range(min(_choose(copy.graph, 0), MOST_NESTED))]
    copy.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in conditions)
    copy.graph.input.append(helper.make_tensor_value_info(TRIPS, TensorProto.INT64, []))
    ways = {}
    for choice in itertools.product([True, False], repeat=len(conditions)):
        name = "/".join("then" if each else "else" for each in choice)
        ways[f"{name} branches" if name else "loops"] = {
            TRIPS: np.array(2 if all(choice) else 1),
            **{condition: np.array(each) for condition, each in zip(conditions, choice, strict=True)},
        }
    return copy, ways


def _choose(graph: GraphProto, depth: int) -> int:
    """Let graph inputs choose what a graph runs that stands in this many Ifs; return how deep they are nested."""
    deepest = depth
    for node in graph.node:
        is_if = node.op_type == "If" and is_standard(node.domain)
        if is_if:
            node.input[0] = CONDITION.format(depth % MOST_NESTED)
        elif node.op_type == "Loop" and is_standard(node.domain):
            node.input[0] = TRIPS
            node.input[1] = ""  # a condition that is false at first would keep the body from running
        deepest = max([deepest, *(_choose(body, depth + is_if) for body in bodies(node))])
    return deepest
