"""A check of every written model, before it is returned or saved: it must be the graph that was planned, value by value.

The writer works on names; this reads the names that it wrote as a runtime would, and compares what they mean with the planner's view.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from typing import NoReturn, TypeAlias

from onnx import AttributeProto, ModelProto, NodeProto, helper

from fastbn.errors import ModelError
from fastbn.graph.model.cropping import scopes_within
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import is_standard, scopes_of
from fastbn.graph.model.node import Node, Scope, Use, Value
from fastbn.graph.ops.normalization import BATCH_NORM, is_batch_norm
from fastbn.graph.planner.plan import Plan
from fastbn.graph.planner.view import GraphView

__all__ = ["check_written"]


# What a name means in a written graph: (scope, position of the node that gives it, slot), or (scope, name) of an input or initializer.
Meaning: TypeAlias = tuple[int, int | None, int] | tuple[int, str]


def check_written(index: Index, view: GraphView, plans: Sequence[Plan], unwritten: Set[Node], proto: ModelProto) -> None:
    """Raise ModelError unless a written model is what its plans say.

    Parameters
    ----------
    index : model.Index
        The model as it was.
    view : view.GraphView
        The present graph after all plans.
    plans : list of view.Plan
    unwritten : set of model.Node
        The nodes that are not written: removed and replaced ones, and constants that no node reads any more.
    proto : onnx.ModelProto
        The written model.

    Raises
    ------
    ModelError
        They differ.
    """
    check = _Check(index, view, plans, unwritten, proto)
    check.count()
    for number in check.graphs:
        check.define(number)
    for number in check.graphs:
        check.compare(number)
    check.finish()


class _Check:
    """The comparison of one written model: first `count`, then `define` and `compare` for each graph by its number, then `finish`."""

    def __init__(self, index: Index, view: GraphView, plans: Sequence[Plan], unwritten: Set[Node], proto: ModelProto) -> None:
        self.index = index
        self.view = view
        self.plans = plans
        self.unwritten = unwritten
        # By the number of the scope, without those of nodes that are not written.
        gone = {scope for node in unwritten for body in node.scopes for scope in scopes_within(body)}
        scopes = [scope for scope in index.scopes if scope not in gone]
        self.graphs = {scope.number: graph for scope, graph in zip(scopes, scopes_of(proto.graph), strict=True)}
        self.nodes = {
            scope.number: [new for node in scope.nodes if node in view.replaced or node not in unwritten for new in view.present(node)]
            for scope in scopes
        }
        self.positions = {node: position for nodes in self.nodes.values() for position, node in enumerate(nodes)}
        self.tensors = {number: {tensor.name: tensor for tensor in graph.initializer} for number, graph in self.graphs.items()}
        self.constants = {use: constant for plan in plans for use, constant in plan.constants.items() if use[0] not in unwritten}
        self.attributes = {node: attributes for plan in plans for node, attributes in plan.attributes.items()}
        self.added = {node for plan in plans for node in plan.added}
        self.meanings: dict[int, dict[str, Meaning]] = {}
        self.reads: Counter[Meaning | None] = Counter()
        self.constants_met: dict[Use, Meaning | None] = {}

    def count(self) -> None:
        """Compare the numbers of nodes and of batch normalizations."""
        written = sum(node.op_type == BATCH_NORM and is_standard(node.domain) for graph in self.graphs.values() for node in graph.node)
        leaving = {node for plan in self.plans for node in plan.leaving}
        leaving.update(node for node in self.unwritten if self.index.constant(node.required_output()) is not None)
        planned = sum(is_batch_norm(node) and node not in leaving for node in self.index.order)
        if written != planned:
            _fail(f"it has {written} BatchNormalization, planned are {planned}")
        for nodes, graph in zip(self.nodes.values(), self.graphs.values(), strict=True):
            if len(nodes) != len(graph.node):
                _fail(f"graph '{graph.name}' has {len(graph.node)} nodes, planned are {len(nodes)}")

    def define(self, number: int) -> None:
        """Note what each name of a written graph means."""
        graph = self.graphs[number]
        meanings: dict[str, Meaning] = {info.name: (number, info.name) for info in graph.input}
        for name in (*(tensor.name for tensor in graph.initializer), *(tensor.values.name for tensor in graph.sparse_initializer)):
            meanings[name] = number, name
        if len(self.tensors[number]) < len(graph.initializer):
            _fail(f"graph '{graph.name}' has two initializers of one name")
        for position, node in enumerate(graph.node):
            for slot, name in enumerate(node.output):
                if name in meanings:
                    _fail(f"the value '{name}' has two sources")
                if name:
                    meanings[name] = number, position, slot
        self.meanings[number] = meanings

    def compare(self, number: int) -> None:
        """Compare the nodes and the outputs of a written graph with the present graph."""
        graph, scope = self.graphs[number], self.index.scopes[number]
        for node, written in zip(self.nodes[number], graph.node, strict=True):
            if node.op != written.op_type or node.proto.name != written.name:
                _fail(f"{written.op_type} '{written.name}' is in the place of {node.op} '{node.label}'")
            self._compare_inputs(number, node, written)
            if node in self.added and written.attribute != node.proto.attribute:
                _fail(f"{node.op} '{node.label}' has other attributes than planned")
            attributes: dict[str, AttributeProto] = {attribute.name: attribute for attribute in written.attribute}
            for name, value in self.attributes.get(node, {}).items():
                if name not in attributes or helper.get_attribute_value(attributes[name]) != value:
                    _fail(f"attribute '{name}' of {node.op} '{node.label}' is not {value}")
        for info in graph.output:
            meaning = self._meaning(number, info.name)
            self.reads[meaning] += 1
            if meaning != self._planned(scope.find(info.name)):
                _fail(f"the output '{info.name}' is not the value that is planned")

    def finish(self) -> None:
        """Check that each planned constant has been met, and that nothing else reads it."""
        for use in self.constants.keys() - self.constants_met.keys():
            _fail(f"input {use[1]} of {use[0].op} '{use[0].label}' is planned and not written")
        for (node, slot), meaning in self.constants_met.items():
            if self.reads[meaning] != 1:
                _fail(f"the constant of input {slot} of {node.op} '{node.label}' has {self.reads[meaning]} readers")

    def _compare_inputs(self, number: int, node: Node, written: NodeProto) -> None:
        for slot, name in enumerate(written.input):
            meaning = self._meaning(number, name)
            self.reads[meaning] += 1
            if (node, slot) in self.constants:
                self._compare_constant(node, slot, meaning)
            elif meaning != self._planned(node.input(slot)):
                _fail(f"input {slot} of {node.op} '{node.label}' is not the value that is planned")

    def _compare_constant(self, node: Node, slot: int, meaning: Meaning | None) -> None:
        constant = self.constants[node, slot]
        tensor = self.tensors[meaning[0]].get(meaning[1]) if meaning is not None and len(meaning) == 2 else None
        kind = helper.np_dtype_to_tensor_dtype(constant.dtype)
        if tensor is None or tuple(tensor.dims) != constant.shape or tensor.data_type != kind:
            _fail(f"input {slot} of {node.op} '{node.label}' is not the constant that is planned")
        self.constants_met[node, slot] = meaning

    def _meaning(self, number: int, name: str) -> Meaning | None:
        """Return what a name means in a written graph, None for an empty name."""
        scope: Scope | None = self.index.scopes[number] if name else None
        while scope is not None:
            meaning = self.meanings[scope.number].get(name)
            if meaning is not None:
                return meaning
            scope = scope.parent
        if name:
            _fail(f"nothing gives the value '{name}'")
        return None

    def _planned(self, value: Value | None) -> Meaning | None:
        """Return what the name of a value of the original must mean in the written graphs, as the plans say."""
        if value is None:
            return None
        root = self.view.source(value)
        producer = self.view.producer(root)
        if producer is None:
            return root.scope.number, root.name
        return producer.scope.number, self.positions.get(producer), root.slot


def _fail(sentence: str) -> NoReturn:
    raise ModelError(f"Cannot write the model: {sentence}")
