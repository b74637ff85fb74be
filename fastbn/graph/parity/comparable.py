"""Copies of a model that can be compared: random numbers repeat, every output is a tensor of numbers, every branch can be chosen, and
no batch normalization in inference has outputs that nothing reads, with which onnxruntime would not run it.

Both models get the same change, so it makes no difference between them. The limits: docs/numerics.md, "Limits of effort".
"""

import itertools
from collections.abc import Iterator, Set

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from fastbn.graph.model.nesting import bodies, is_standard, scopes_of
from fastbn.graph.model.schemas import RANDOM
from fastbn.graph.ops.normalization import BATCH_NORM
from fastbn.graph.parity.feeds import Feed

__all__ = ["comparable", "has_branches", "is_random", "with_branches"]

# Names of graph inputs: the condition of every If inside that many others, and how often every Loop runs.
CONDITION, TRIPS = "fastbn/condition/{}", "fastbn/trips"

# An If inside more others than this gets the condition of one further out: there are 2 ** MOST_NESTED choices at most.
MOST_NESTED = 3

# Before this opset a batch normalization with more than one output is in training.
FIRST_TRAINING_MODE = 14

# Nodes that the search for tensors of numbers goes back from an output that is none.
MOST_STEPS_BACK = 8


def _nodes(proto: ModelProto) -> Iterator[NodeProto]:
    for graph in scopes_of(proto.graph):
        yield from graph.node
    for function in proto.functions:
        yield from function.node


def _is_random_node(node: NodeProto) -> bool:
    return is_standard(node.domain) and (
        node.op_type in RANDOM or (node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] != "")
    )


def is_random(proto: ModelProto) -> bool:
    """Say whether a model draws random numbers."""
    return any(map(_is_random_node, _nodes(proto)))


def comparable(proto: ModelProto) -> ModelProto | None:
    """Return a copy whose random nodes have seeds, by their place in the file, and whose outputs are tensors of numbers; None where this
    already holds for the model.

    An output of maps, sequences or strings is replaced by the inputs of the node that gives it (ZipMap: the scores).
    """
    unread = _with_unread_statistics(proto)
    if not is_random(proto) and not unread and all(map(_is_numeric, proto.graph.output)):
        return None
    copy = ModelProto()
    copy.CopyFrom(proto)
    for number, node in enumerate(filter(_is_random_node, _nodes(copy))):
        others = [attribute for attribute in node.attribute if attribute.name != "seed"]
        del node.attribute[:]
        node.attribute.extend([*others, helper.make_attribute("seed", number + 1 if node.op_type == "Dropout" else float(number + 1))])
    for node in _with_unread_statistics(copy):
        del node.output[1:]
    _replace_outputs(copy.graph)
    return copy


def _with_unread_statistics(proto: ModelProto) -> list[NodeProto]:
    """Return the batch normalizations in inference that name running statistics which nothing reads."""
    if max((entry.version for entry in proto.opset_import if is_standard(entry.domain)), default=1) < FIRST_TRAINING_MODE:
        return []
    named = [node for node in _nodes(proto) if node.op_type == BATCH_NORM and is_standard(node.domain) and len(node.output) > 1]
    if not named:
        return []
    read = {name for node in _nodes(proto) for name in node.input} | {
        info.name for graph in scopes_of(proto.graph) for info in graph.output
    }
    read.update(name for function in proto.functions for name in function.output)
    return [node for node in named if not _trains(node) and read.isdisjoint(node.output[1:])]


def _trains(node: NodeProto) -> bool:
    return any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)


def _is_numeric(info: ValueInfoProto) -> bool:
    kind = info.type.WhichOneof("value")
    return kind is None or (kind == "tensor_type" and info.type.tensor_type.elem_type != TensorProto.STRING)


def _replace_outputs(graph: GraphProto) -> None:
    producers = {name: node for node in graph.node for name in node.output if name}
    typed = {info.name: info for info in (*graph.value_info, *graph.output, *graph.input)}
    pending = [(info, 0) for info in graph.output]
    numeric: dict[str, ValueInfoProto] = {}
    for info, steps in pending:
        node = producers.get(info.name)
        if _is_numeric(info) or node is None or steps == MOST_STEPS_BACK:
            numeric[info.name] = info
            continue
        reads = [name for name in node.input if name in producers]
        pending.extend((typed.get(name) or ValueInfoProto(name=name), steps + 1) for name in reads)
    if list(numeric) != [info.name for info in graph.output]:
        outputs = [_copy(info) for info in numeric.values()]
        del graph.output[:]
        graph.output.extend(outputs)


def _copy(info: ValueInfoProto) -> ValueInfoProto:
    copy = ValueInfoProto()
    copy.CopyFrom(info)
    return copy


def has_branches(proto: ModelProto) -> bool:
    """Say whether a part of a model may run or not: it has an If or a Loop."""
    return any(node.op_type in ("If", "Loop") and is_standard(node.domain) for graph in scopes_of(proto.graph) for node in graph.node)


def with_branches(proto: ModelProto, settled: Set[str] = frozenset()) -> tuple[ModelProto, dict[str, Feed]]:
    """Return (copy, choices): a copy in which graph inputs choose the branch of every If and how often every Loop runs, and the values of
    these inputs by a name for each choice.

    Together the choices take every branch once and run every Loop. Their names are "then branches", "else/then branches" (by depth) or,
    without an If, "loops". An If with a condition of these names, `settled`, chooses as it does, and a Loop that gives a value of these
    names runs as often as it does.
    """
    copy = ModelProto()
    copy.CopyFrom(proto)
    conditions = [CONDITION.format(depth) for depth in range(min(_connect(copy.graph, 0, settled), MOST_NESTED))]
    copy.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in conditions)
    copy.graph.input.append(helper.make_tensor_value_info(TRIPS, TensorProto.INT64, []))
    choices: dict[str, Feed] = {}
    for values in itertools.product([True, False], repeat=len(conditions)):
        name = "/".join("then" if each else "else" for each in values)
        choices[f"{name} branches" if name else "loops"] = {
            TRIPS: np.array(2 if all(values) else 1),
            **{condition: np.array(each) for condition, each in zip(conditions, values, strict=True)},
        }
    return copy, choices


def _connect(graph: GraphProto, depth: int, settled: Set[str]) -> int:
    """Connect every If and Loop of a graph inside this many Ifs to the graph inputs; return how deep the Ifs are nested."""
    deepest = depth
    for node in graph.node:
        is_if = node.op_type == "If" and is_standard(node.domain) and node.input[0] not in settled
        if is_if:
            node.input[0] = CONDITION.format(depth % MOST_NESTED)
        elif node.op_type == "Loop" and is_standard(node.domain):
            if not settled.isdisjoint(node.output):
                continue
            node.input[0] = TRIPS
            node.input[1] = ""  # a condition that is false at first would keep the body from running
        deepest = max([deepest, *(_connect(body, depth + is_if, settled) for body in bodies(node))])
    return deepest
