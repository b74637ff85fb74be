"""A check of every model that is written: it is the graph that was planned, value by value, before anybody may see it.

The writer works on names; this reads the names that it wrote as a runtime would, and compares what they mean with the planner's view.
"""

from collections import Counter

from onnx import ModelProto, helper

from fastbn.errors import ModelError
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import is_standard, scopes_of
from fastbn.graph.ops.normalization import is_batch_norm
from fastbn.graph.planner.view import GraphView

__all__ = ["check_written"]


def check_written(index: Index, view: GraphView, plans: list, gone: set, proto: ModelProto) -> None:
    """Raise ModelError unless a written model is what its plans say.

    Parameters
    ----------
    index : model.Index
        The model as it was.
    view : view.GraphView
        The present graph after all plans.
    plans : list of view.Plan
    gone : set of model.Node
        The nodes that are not written: removed and replaced ones, and constants that nobody reads any more.
    proto : onnx.ModelProto
        What was written.
    """
    check = _Check(index, view, plans, gone, proto)
    check.count()
    for number in range(len(check.graphs)):
        check.define(number)
    for number in range(len(check.graphs)):
        check.compare(number)
    check.finish()


class _Check:
    def __init__(self, index, view, plans, gone, proto):
        self.index = index
        self.view = view
        self.plans = plans
        self.graphs = scopes_of(proto.graph)
        replaced = view.replaced
        self.nodes = [[replaced.get(node, node) for node in each.nodes if node in replaced or node not in gone] for each in index.scopes]
        self.place = {node: position for nodes in self.nodes for position, node in enumerate(nodes)}
        self.tensors = [{tensor.name: tensor for tensor in graph.initializer} for graph in self.graphs]
        self.constants = {use: constant for plan in plans for use, constant in plan.constants.items()}
        self.attributes = {node: attributes for plan in plans for node, attributes in plan.attributes.items()}
        self.meanings = []
        self.reads = Counter()
        self.holds = {}

    def count(self):
        """Compare the numbers of nodes and of batch normalizations."""
        found = sum(node.op_type == "BatchNormalization" and is_standard(node.domain) for graph in self.graphs for node in graph.node)
        lifted = sum(is_batch_norm(node) for plan in self.plans for node in plan.lifted)
        planned = sum(map(is_batch_norm, self.index.order)) - lifted
        if found != planned:
            _fail(f"it has {found} BatchNormalization, planned are {planned}")
        for nodes, graph in zip(self.nodes, self.graphs, strict=True):
            if len(nodes) != len(graph.node):
                _fail(f"graph '{graph.name}' has {len(graph.node)} nodes, planned are {len(nodes)}")

    def define(self, number):
        """Note what each name of a written graph means: (scope, position of its node, slot), or (scope, name) where no node gives it."""
        graph = self.graphs[number]
        found = {info.name: (number, info.name) for info in graph.input}
        for name in (*(tensor.name for tensor in graph.initializer), *(tensor.values.name for tensor in graph.sparse_initializer)):
            found[name] = number, name
        if len(self.tensors[number]) < len(graph.initializer):
            _fail(f"graph '{graph.name}' has two initializers of one name")
        for position, node in enumerate(graph.node):
            for slot, name in enumerate(node.output):
                if name in found:
                    _fail(f"the value '{name}' has two sources")
                if name:
                    found[name] = number, position, slot
        self.meanings.append(found)

    def compare(self, number):
        """Compare the nodes and the outputs of a written graph with the present graph."""
        graph, scope = self.graphs[number], self.index.scopes[number]
        for node, written in zip(self.nodes[number], graph.node, strict=True):
            if node.op != written.op_type or node.proto.name != written.name:
                _fail(f"{written.op_type} '{written.name}' is in the place of {node.op} '{node.label}'")
            for slot, name in enumerate(written.input):
                meaning = self._meaning(number, name)
                self.reads[meaning] += 1
                if (node, slot) in self.constants:
                    self._compare_constant(node, slot, meaning)
                elif meaning != self._planned(node.input(slot)):
                    _fail(f"input {slot} of {node.op} '{node.label}' is not the value that is planned")
            found = {attribute.name: attribute for attribute in written.attribute}
            for name, value in self.attributes.get(node, {}).items():
                if name not in found or helper.get_attribute_value(found[name]) != value:
                    _fail(f"attribute '{name}' of {node.op} '{node.label}' is not {value}")
        for info in graph.output:
            meaning = self._meaning(number, info.name)
            self.reads[meaning] += 1
            if meaning != self._planned(scope.find(info.name)):
                _fail(f"the output '{info.name}' is not the value that is planned")

    def finish(self):
        """Demand that each planned constant has been met, and that nothing else reads it."""
        for use in self.constants.keys() - self.holds.keys():
            _fail(f"input {use[1]} of {use[0].op} '{use[0].label}' is planned and not written")
        for (node, slot), meaning in self.holds.items():
            if self.reads[meaning] != 1:
                _fail(f"the constant of input {slot} of {node.op} '{node.label}' has {self.reads[meaning]} readers")

    def _compare_constant(self, node, slot, meaning):
        constant = self.constants[node, slot]
        scope, name = meaning if meaning is not None and len(meaning) == 2 else (0, None)
        tensor = self.tensors[scope].get(name)
        kind = helper.np_dtype_to_tensor_dtype(constant.dtype)
        if tensor is None or tuple(tensor.dims) != constant.shape or tensor.data_type != kind:
            _fail(f"input {slot} of {node.op} '{node.label}' is not the constant that is planned")
        self.holds[node, slot] = meaning

    def _meaning(self, number, name):
        """Return what a name means in a written graph, None for an empty name."""
        scope = self.index.scopes[number] if name else None
        while scope is not None:
            found = self.meanings[scope.number].get(name)
            if found is not None:
                return found
            scope = scope.parent
        if name:
            _fail(f"nothing gives the value '{name}'")
        return None

    def _planned(self, value):
        """Return the meaning of what stands for a value of the original in the present graph."""
        if value is None:
            return None
        root = self.view.source(value)
        producer = self.view.producer(root)
        if producer is None:
            return root.scope.number, root.name
        return producer.scope.number, self.place.get(producer), root.slot


def _fail(sentence):
    raise ModelError(f"Cannot write the model: {sentence}")
