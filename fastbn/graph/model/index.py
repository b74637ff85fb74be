"""The index of a model: scopes, nodes, values with their one producer and all their readers, constants, shapes. Reads only."""

from collections.abc import Mapping, Sequence
from typing import NoReturn

from onnx import GraphProto

from fastbn.errors import ArgumentError, ModelError, expected
from fastbn.graph.model.constant import Tensor
from fastbn.graph.model.expressions import Constants
from fastbn.graph.model.nesting import DEEPEST, LARGEST_INLINED, bodies, expanded_size, is_standard
from fastbn.graph.model.node import Node, Scope, Shape, Value, is_complete
from fastbn.graph.model.schemas import check_node
from fastbn.graph.model.shapes import Inference, type_of
from fastbn.graph.model.sizes import LARGEST_LIST
from fastbn.graph.model.storage import Source
from fastbn.graph.ops.shape_rules import Dim, Size, Sizes

__all__ = ["Index"]


class Index:
    """Everything the planner asks about a model.

    Parameters
    ----------
    source : storage.Source
    freeze_inputs : bool
        Treat initializers that are also graph inputs as constants.
    input_shapes : dict of name -> tuple of int, optional
        Sizes of graph inputs, for shape inference.

    Attributes
    ----------
    proto : onnx.ModelProto
    opset : int
        The version of ONNX's own operators that the model imports.
    scopes : list of Scope
        The main graph and all bodies, outer ones first.
    main : Scope
    order : list of Node
        The nodes of all scopes, those of each in an order of the data flow.

    Raises
    ------
    ModelError
        The model is malformed, or input_shapes does not fit it.
    """

    def __init__(self, source: Source, freeze_inputs: bool = False, input_shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.source = source
        self.proto = source.proto
        self.freeze_inputs = freeze_inputs
        self.input_shapes = dict(input_shapes or {})
        self.opset = max((entry.version for entry in self.proto.opset_import if is_standard(entry.domain)), default=1)
        if not 1 <= self.opset < 1 << 31:
            raise ModelError(expected("a version of ONNX's operators of 1 or more", str(self.opset), self.source.name))
        self.scopes: list[Scope] = []
        self._inferred: Inference | None = None
        for function in self.proto.functions:
            self._check_text(function.name, *(name for node in function.node for name in (node.name, *node.output)))
        self._shows_functions = bool(self.proto.functions) and expanded_size(self.proto) <= LARGEST_INLINED
        self._read_scopes()
        self.main = self.scopes[0]
        self._constants = Constants(self.order, self.opset, source, self.is_overridable, self._kind_of_any, self._shape_of_any)
        self._check_inputs()

    def _read_scopes(self) -> None:
        # Outer scopes first, so that a captured name is known when a body asks for it.
        pending: list[tuple[GraphProto, Scope | None, Node | None]] = [(self.proto.graph, None, None)]
        while pending:
            graph, parent, owner = pending.pop(0)
            scope = Scope(graph, parent, len(self.scopes))
            self.scopes.append(scope)
            if owner is not None:
                owner.scopes.append(scope)
                if scope.depth > DEEPEST:
                    raise ModelError(expected(f"at most {DEEPEST} graphs within graphs", "more", owner.label))
            inputs = self._declare(scope)
            for node, names in zip(scope.nodes, inputs, strict=True):
                self._connect(node, names)
                for body in node.bodies:
                    pending.append((body, scope, node))
            for info in graph.output:
                self._resolve(scope, info.name, owner.label if owner else "graph output").is_output = True
        for scope in self.scopes:
            scope.ordered = self._sorted(scope)
        self.order = [node for scope in self.scopes for node in scope.ordered]
        for number, node in enumerate(self.order):
            node.order = number

    def _declare(self, scope: Scope) -> list[list[str]]:
        """Note what a graph gives: inputs, constants and nodes with their outputs; return what each node reads, by name."""
        graph, values = scope.graph, scope.values
        for info in graph.input:
            self._new_value(scope, info.name).is_input = True
        for tensor in graph.initializer:
            name, dims = tensor.name, tuple(tensor.dims)
            if dims and min(dims) < 0:
                raise ModelError(expected("sizes that are not negative", f"{[*dims]}", name))
            value = values.get(name) or self._new_value(scope, name)
            if value.initializer is not None:
                _fail_of_two_sources(name)
            value.initializer, value.dims = tensor, dims
        for tensor in graph.sparse_initializer:
            if tensor.values.name not in values:
                self._new_value(scope, tensor.values.name)
        reads = []
        for position, proto in enumerate(graph.node):
            node = Node(proto, scope, position)
            inputs, outputs = [*proto.input], [*proto.output]
            self._check_text(node.label, node.op, node.domain, *node.attributes, *outputs)
            if is_standard(node.domain):
                check_node(node.op, inputs, outputs, [*proto.attribute], node.label, self.opset)
            scope.nodes.append(node)
            reads.append(inputs)
            for slot, name in enumerate(outputs):
                if not name:
                    node.outputs.append(None)
                    continue
                if name in values:
                    _fail_of_two_sources(name)
                value = values[name] = Value(name, scope)
                value.producer, value.slot = node, slot
                node.outputs.append(value)
        return reads

    def _check_text(self, *names: str) -> None:
        # protobuf hands out a string that is not UTF-8 as bytes, which do not join.
        try:
            "".join(names)
        except TypeError:
            wrong = next(name for name in names if not isinstance(name, str))
            raise ModelError(expected("names in UTF-8", repr(wrong), self.source.name)) from None

    def _new_value(self, scope: Scope, name: str) -> Value:
        self._check_text(name)
        if name in scope.values:
            _fail_of_two_sources(name)
        value = scope.values[name] = Value(name, scope)
        return value

    def _resolve(self, scope: Scope, name: str, where: str) -> Value:
        value = scope.find(name)
        if value is None:
            raise ModelError(expected("a value that a node or an input gives", repr(name), where))
        return value

    def _connect(self, node: Node, names: Sequence[str]) -> None:
        values, inputs = node.scope.values, node.inputs
        for slot, name in enumerate(names):
            value = (values.get(name) or self._resolve(node.scope, name, node.label)) if name else None
            if value is not None:
                value.readers.append((node, slot))
            inputs.append(value)

    def _sorted(self, scope: Scope) -> list[Node]:
        """Return the scope's nodes in an order of the data flow; nearly every model lists them so already."""
        reads = ((node.position, value) for node in scope.nodes for value in self.reads(node))
        if all(value.producer is None or value.scope is not scope or value.producer.position < position for position, value in reads):
            return scope.nodes
        needs = {node: {value.producer for value in self.reads(node) if value.scope is scope and value.producer} for node in scope.nodes}
        dependents: dict[Node, list[Node]] = {}
        for node, producers in needs.items():
            for producer in producers:
                dependents.setdefault(producer, []).append(node)
        missing = {node: len(producers) for node, producers in needs.items()}
        ready = [node for node in scope.nodes if not missing[node]]
        for node in ready:
            for dependent in dependents.get(node, ()):
                missing[dependent] -= 1
                if not missing[dependent]:
                    ready.append(dependent)
        if len(ready) < len(scope.nodes):
            stuck = next(node for node in scope.nodes if missing[node])
            raise ModelError(f"Cannot order the nodes: '{stuck.label}' is part of a cycle, or reads from one")
        return ready

    def reads(self, node: Node) -> list[Value]:
        """Return the values that a node reads, those of its bodies included."""
        reads = [value for value in node.inputs if value is not None]
        pending = [*node.bodies]
        for graph in pending:
            for inner in graph.node:
                names = inner.input
                reads.extend(value for value in map(node.scope.values.get, names) if value is not None)
                pending.extend(bodies(inner))
        return reads

    def _check_inputs(self) -> None:
        inputs = {value.name for value in self.main.values.values() if value.is_input}
        for name in self.input_shapes:
            if name not in inputs:
                raise ArgumentError(
                    expected(f"the name of a graph input ({', '.join(sorted(inputs)) or 'none'})", repr(name), "input_shapes")
                )
            given, declared = self.input_shapes[name], self.declared_shape(self.main.values[name])
            known = given if declared is None else declared
            fits = len(known) == len(given) and all(not size or size in (-1, new) for size, new in zip(known, given, strict=True))
            if not fits:
                shown = ",".join(str(size or "?") for size in known)
                raise ArgumentError(expected(f"sizes that fit {name}={shown}", ",".join(map(str, given)) or "none", "input_shapes"))

    def is_overridable(self, value: Value) -> bool:
        """Say whether a caller may override an initializer: it is a graph input too, and the file's IR version allows that."""
        return value.is_input and value.initializer is not None and self.proto.ir_version >= 4 and not self.freeze_inputs

    def constant(self, value: Value | None, infer: bool = False) -> Tensor | None:
        """Return the Tensor that a value always is, or None.

        Constant nodes, and standard operators on constants, count; what a caller may override does not, nor what is beyond the limits of
        expressions.py. With `infer`, shape inference is asked for types and shapes that the file does not declare and an expression reads.
        """
        return self._constants.find(value, infer=infer)

    def is_constant(self, value: Value) -> bool:
        """Say whether a value is the same in every run: a Tensor, or a sequence of them."""
        return self.constant(value) is not None or self._constants.is_sequence(value)

    def why_no_constant(self, value: Value) -> str:
        """Return why a value is no constant, as the end of a sentence about it."""
        return self._constants.why_none(value)

    def shape(self, value: Value | None) -> Shape | None:
        """Return the shape of a value, None for each size that is not known; None where not even the rank is known, or for no value."""
        if value is None:
            return None
        if value.initializer is not None:
            return value.dims
        constant = self._constants.known(value)
        if constant is not None:
            return constant.shape
        declared = None if self.input_shapes else self.declared_shape(value)
        if is_complete(declared):
            return declared
        inferred = self._inference().shapes.get((value.scope.number, value.name))
        if declared is None or inferred is None or len(declared) != len(inferred):
            return inferred if declared is None else declared
        return tuple(other if size is None else size for size, other in zip(declared, inferred, strict=True))

    def sizes(self, value: Value) -> Sizes | None:
        """Return the shape of a value with a Dim for each size that only a run tells; None where not even the rank is known."""
        shape = self.shape(value)
        if shape is None or is_complete(shape):
            return shape
        sizes = self._inference().sizes(value)
        if sizes is None or len(sizes) != len(shape):
            sizes = tuple(Dim(value, axis) for axis in range(len(shape)))
        return tuple(named if size is None else size for size, named in zip(shape, sizes, strict=True))

    def elements(self, value: Value) -> list[Size] | None:
        """Return the elements of a list of integers as far as they are known, None where not even their number is."""
        constant = self.constant(value)
        if constant is None:
            return self._inference().elements(value)
        if constant.dtype.kind not in "iu" or len(constant.shape) != 1 or constant.size > LARGEST_LIST:
            return None
        numbers: list[Size] = constant.array().tolist()
        return numbers

    def kind(self, value: Value) -> int:
        """Return the type of a value as a number of TensorProto, 0 where it is not known."""
        if value.initializer is not None:
            return value.initializer.data_type
        return self._inference().kinds.get((value.scope.number, value.name), 0)

    def declared_shape(self, value: Value) -> Shape | None:
        """Return what the file itself says of a value's shape, without inference."""
        return self._declared(value)[1]

    def _declared(self, value: Value) -> tuple[int, Shape | None]:
        """Return (type, shape) of a value as the file itself says, 0 and None where it does not."""
        scope = value.scope
        if scope.declared is None:
            # An output without sizes is a scalar, or what an exporter wrote that knew none: inference tells which.
            outputs = {info.name: type_of(info) for info in scope.graph.output}
            inside = (*scope.graph.value_info, *scope.graph.input)
            scope.declared = {name: (kind, shape or None) for name, (kind, shape) in outputs.items()}
            scope.declared.update((info.name, type_of(info)) for info in inside)
        return scope.declared.get(value.name, (0, None))

    def _kind_of_any(self, value: Value, infer: bool) -> int:
        """Return the type of a value; 0 where it is not known, or not without inference."""
        if value.initializer is not None:
            return value.initializer.data_type
        return self._declared(value)[0] or (self.kind(value) if infer else 0)

    def _shape_of_any(self, value: Value, infer: bool) -> Shape | None:
        """Return the shape that a value has whatever the sizes are that the caller gives; None where it is not known."""
        if value.initializer is not None and not self.is_overridable(value):
            return value.dims
        declared = self.declared_shape(value)
        return (
            self.shape(value) if infer and not is_complete(declared) and not self.input_shapes and value.initializer is None else declared
        )

    def _inference(self) -> Inference:
        if self._inferred is None:
            self._inferred = Inference(self.proto, self.opset, self.main, self._constants, self.input_shapes, self._shows_functions)
        return self._inferred


def _fail_of_two_sources(name: str) -> NoReturn:
    raise ModelError(f"Cannot read the model: the value '{name}' has two sources")
