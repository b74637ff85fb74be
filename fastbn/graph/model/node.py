"""Values, nodes and scopes of a model, with their names resolved."""

from onnx import AttributeProto, TensorProto, helper

from fastbn.errors import ModelError, expected
from fastbn.graph.model.nesting import is_standard

__all__ = ["Node", "Scope", "Value"]

# The type of an attribute by that of its default.
KINDS = {
    int: AttributeProto.INT,
    float: AttributeProto.FLOAT,
    bytes: AttributeProto.STRING,
    list: AttributeProto.INTS,
    tuple: AttributeProto.FLOATS,
    TensorProto: AttributeProto.TENSOR,
}


class Value:
    """One name in one scope: who gives it and who reads it. A reader is (node, slot); captures from subgraphs count."""

    __slots__ = ("initializer", "is_input", "is_output", "name", "producer", "readers", "scope", "slot")

    def __init__(self, name, scope):
        self.name = name
        self.scope = scope
        self.producer = None
        self.slot = 0
        self.readers = []
        self.initializer = None
        self.is_input = False
        self.is_output = False


class Node:
    """One NodeProto with its values resolved; inputs and outputs hold None for an empty name. scopes are its bodies."""

    __slots__ = ("attributes", "domain", "inputs", "label", "op", "outputs", "position", "proto", "scope", "scopes")

    def __init__(self, proto, scope, position):
        self.proto = proto
        self.scope = scope
        self.position = position
        self.op = proto.op_type
        self.domain = proto.domain
        self.label = proto.name or next((name for name in proto.output if name), f"{proto.op_type} {position}")
        self.inputs = []
        self.outputs = []
        self.scopes = []
        self.attributes = {attribute.name: attribute for attribute in proto.attribute}

    def attribute(self, name, default=None):
        """Return the value of an attribute, which must have the type of default, or default where it is absent."""
        found = self.attributes.get(name)
        if found is None:
            return default
        kind = KINDS.get(type(default), found.type)
        if found.type != kind:
            names = AttributeProto.AttributeType
            raise ModelError(expected(f"an attribute '{name}' of type {names.Name(kind)}", names.Name(found.type), self.label))
        return helper.get_attribute_value(found)

    def input(self, slot):
        """Return the value at a slot, or None for an absent one."""
        return self.inputs[slot] if slot < len(self.inputs) else None

    def is_op(self, *ops):
        """Say whether this is one of ONNX's own operators of these names."""
        return self.op in ops and is_standard(self.domain)


class Scope:
    """One GraphProto: its values by name, its nodes as the file lists them and in an order of the data flow, and the scope around it."""

    __slots__ = ("declared", "depth", "graph", "nodes", "number", "ordered", "parent", "values")

    def __init__(self, graph, parent, number):
        self.graph = graph
        self.parent = parent
        self.number = number
        self.depth = 0 if parent is None else parent.depth + 1
        self.ordered = []
        self.declared = None
        self.values = {}
        self.nodes = []

    def find(self, name):
        """Return the value that a name means here, or None."""
        scope = self
        while scope is not None:
            value = scope.values.get(name)
            if value is not None:
                return value
            scope = scope.parent
        return None
