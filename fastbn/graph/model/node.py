"""Values, nodes and scopes of a model, with their names resolved."""

from typing import TypeAlias, TypeGuard, get_origin, overload

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper

from fastbn.errors import ModelError, expected
from fastbn.graph.model.nesting import bodies_in, is_standard

__all__ = ["Node", "Scope", "Shape", "Use", "Value", "is_complete"]

# Sizes of the axes of a value, None for one that is not known.
Shape: TypeAlias = tuple[int | None, ...]


def is_complete(shape: Shape | None) -> TypeGuard[tuple[int, ...]]:
    """Say whether all sizes of a shape are known."""
    return shape is not None and None not in shape


# An input of a node: the node and the slot.
Use: TypeAlias = tuple["Node", int]

# Types of attributes; protobuf looks such a number up by its name each time.
INT, INTS = AttributeProto.INT, AttributeProto.INTS

# The type of an attribute by that of its default.
KINDS: dict[type, AttributeProto.AttributeType] = {
    int: INT,
    float: AttributeProto.FLOAT,
    bytes: AttributeProto.STRING,
    list: INTS,
    tuple: AttributeProto.FLOATS,
    TensorProto: AttributeProto.TENSOR,
}


class Value:
    """One name in one scope.

    Attributes
    ----------
    name : str
    scope : Scope
    producer : Node or None
        The node that gives the value; None for an input or an initializer.
    slot : int
        Which output of its producer the value is.
    readers : list of (Node, int)
        The nodes that read it, each with the input slot; captures in bodies count, and a node counts once for each slot.
    initializer : onnx.TensorProto or None
    dims : tuple of int
        The sizes of its axes; () without an initializer.
    is_input, is_output : bool
        Whether it is an input, or an output, of its graph.
    """

    __slots__ = ("dims", "initializer", "is_input", "is_output", "name", "producer", "readers", "scope", "slot")

    def __init__(self, name: str, scope: "Scope") -> None:
        self.name = name
        self.scope = scope
        self.producer: Node | None = None
        self.slot = 0
        self.readers: list[Use] = []
        self.initializer: TensorProto | None = None
        self.dims: tuple[int, ...] = ()
        self.is_input = False
        self.is_output = False


class Node:
    """One NodeProto with its values resolved.

    Attributes
    ----------
    proto : onnx.NodeProto
    scope : Scope
    position : int
        Its place among the nodes of its graph, as the file lists them.
    order : int
        Its place among all nodes of the model in the order of the data flow; a node is before those that read what it gives.
    op, domain : str
    label : str
        Its name, or that of its first output, or its operator and position.
    inputs, outputs : list of Value or None
        By slot; None for an empty name.
    bodies : list of onnx.GraphProto
        Its subgraphs, in order.
    scopes : list of Scope
        The same as scopes.
    attributes : dict of str -> onnx.AttributeProto
    """

    __slots__ = ("attributes", "bodies", "domain", "inputs", "label", "op", "order", "outputs", "position", "proto", "scope", "scopes")

    def __init__(self, proto: NodeProto, scope: "Scope", position: int) -> None:
        self.proto = proto
        self.scope = scope
        self.position = position
        self.order = position
        self.op = proto.op_type
        self.domain = proto.domain
        self.label = proto.name or next((name for name in proto.output if name), f"{proto.op_type} {position}")
        self.inputs: list[Value | None] = []
        self.outputs: list[Value | None] = []
        self.scopes: list[Scope] = []
        attributes = list(proto.attribute)
        self.attributes = {attribute.name: attribute for attribute in attributes}
        self.bodies = bodies_in(attributes)

    @overload
    def attribute(self, name: str) -> object: ...
    # First of those with a default: onnx's messages derive from a class without types, so they would match any of the others.
    @overload
    def attribute(self, name: str, default: TensorProto) -> TensorProto: ...
    @overload
    def attribute(self, name: str, default: int) -> int: ...
    @overload
    def attribute(self, name: str, default: float) -> float: ...
    @overload
    def attribute(self, name: str, default: bytes) -> bytes: ...
    @overload
    def attribute(self, name: str, default: list[int]) -> list[int]: ...
    @overload
    def attribute(self, name: str, default: tuple[float, ...]) -> list[float]: ...
    def attribute(self, name: str, default: object = None) -> object:
        """Return the value of an attribute, or default where it is absent.

        Raises
        ------
        ModelError
            Its type is not that of default: int, float, bytes, list (of int) or tuple (of float).
        """
        attribute = self.attributes.get(name)
        return default if attribute is None else self._value_of(attribute, None if default is None else type(default))

    @overload
    def find_attribute(self, name: str, kind: type[int]) -> int | None: ...
    @overload
    def find_attribute(self, name: str, kind: type[float]) -> float | None: ...
    @overload
    def find_attribute(self, name: str, kind: type[bytes]) -> bytes | None: ...
    @overload
    def find_attribute(self, name: str, kind: type[list[int]]) -> list[int] | None: ...
    @overload
    def find_attribute(self, name: str, kind: type[tuple[float, ...]]) -> list[float] | None: ...
    def find_attribute(self, name: str, kind: type) -> object:
        """Return the value of an attribute of a type (int, float, bytes, list of int or tuple of float), None where it is absent.

        Raises
        ------
        ModelError
            It has another type.
        """
        attribute = self.attributes.get(name)
        return None if attribute is None else self._value_of(attribute, get_origin(kind) or kind)

    def _value_of(self, attribute: AttributeProto, kind: type | None) -> object:
        found = attribute.type
        wanted = found if kind is None else KINDS.get(kind, found)
        if found != wanted:
            names = AttributeProto.AttributeType
            shown = names.Name(found)
            raise ModelError(expected(f"an attribute '{attribute.name}' of type {names.Name(wanted)}", shown, self.label))
        if found == INT:  # the most frequent ones; onnx compares with every type there is
            return attribute.i
        value: object = [*attribute.ints] if found == INTS else helper.get_attribute_value(attribute)
        return value

    def input(self, slot: int) -> Value | None:
        """Return the value at a slot, or None for an absent one."""
        return self.inputs[slot] if slot < len(self.inputs) else None

    def required_input(self, slot: int) -> Value:
        """Return the value at a slot that ONNX demands; raises ModelError where it is absent."""
        value = self.input(slot)
        if value is None:
            raise ModelError(expected(f"an input {slot} of {self.op}", "none", self.label))
        return value

    def required_output(self, slot: int = 0) -> Value:
        """Return the value that the node gives at a slot that ONNX demands; raises ModelError where it is absent."""
        value = self.outputs[slot] if slot < len(self.outputs) else None
        if value is None:
            raise ModelError(expected(f"an output {slot} of {self.op}", "none", self.label))
        return value

    def is_op(self, *ops: str) -> bool:
        """Say whether this is one of ONNX's own operators of these names."""
        return self.op in ops and is_standard(self.domain)


class Scope:
    """One GraphProto of a model.

    Attributes
    ----------
    graph : onnx.GraphProto
    parent : Scope or None
        The scope around it, None for the main graph.
    number, depth : int
        Its place among the scopes of the model, and how many scopes are around it.
    values : dict of str -> Value
        Those that its inputs, initializers and nodes give.
    nodes, ordered : list of Node
        As the file lists them, and in an order of the data flow.
    declared : dict of str -> (int, tuple or None)
        The types and shapes that the file declares, read by the index at first use.
    """

    __slots__ = ("declared", "depth", "graph", "nodes", "number", "ordered", "parent", "values")

    def __init__(self, graph: GraphProto, parent: "Scope | None", number: int) -> None:
        self.graph = graph
        self.parent = parent
        self.number = number
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.ordered: list[Node] = []
        self.declared: dict[str, tuple[int, Shape | None]] | None = None
        self.values: dict[str, Value] = {}
        self.nodes: list[Node] = []

    def find(self, name: str) -> Value | None:
        """Return the value that a name means here, or None."""
        scope: Scope | None = self
        while scope is not None:
            value = scope.values.get(name)
            if value is not None:
                return value
            scope = scope.parent
        return None
