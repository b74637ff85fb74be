"""The index of a model: scopes, nodes, values with their one producer and all their readers, constants, shapes. Reads only."""

import math

import numpy as np
import onnx
from onnx import AttributeProto, helper

from fastbn.errors import ModelError, expected
from fastbn.graph.constant import Tensor
from fastbn.graph.sizes import LARGEST_LIST, Sizes
from fastbn.graph.storage import tensor_dtype

__all__ = ["Index", "Node", "Scope", "Value", "bodies", "is_standard", "scopes_of"]

# A constant expression larger than this is left to the runtime.
LARGEST_EXPRESSION = 1 << 24

# Each pass knows the ranks that the one before it found behind a Reshape of computed sizes.
INFERENCE_PASSES = 4


def is_standard(domain):
    """Say whether a domain is ONNX's own."""
    return domain in ("", "ai.onnx")


def bodies(node):
    """Return the subgraphs of a NodeProto, in order."""
    found = []
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            found.append(attribute.g)
        elif attribute.type == AttributeProto.GRAPHS:
            found.extend(attribute.graphs)
    return found


def scopes_of(graph):
    """Return a GraphProto and all subgraphs below it, outermost first: the same order for a model and for its copy."""
    found = [graph]
    for current in found:
        for node in current.node:
            found.extend(bodies(node))
    return found


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
    """One NodeProto with its values resolved; inputs and outputs hold None for an empty name."""

    __slots__ = ("attributes", "domain", "inputs", "label", "op", "outputs", "position", "proto", "scope")

    def __init__(self, proto, scope, position):
        self.proto = proto
        self.scope = scope
        self.position = position
        self.op = proto.op_type
        self.domain = proto.domain
        self.label = proto.name or next((name for name in proto.output if name), f"{proto.op_type} {position}")
        self.inputs = []
        self.outputs = []
        self.attributes = {attribute.name: attribute for attribute in proto.attribute}

    def attribute(self, name, default=None):
        """Return the value of an attribute, which must have the type of default, or default where it is absent."""
        found = self.attributes.get(name)
        if found is None:
            return default
        kinds = {int: AttributeProto.INT, float: AttributeProto.FLOAT, list: AttributeProto.INTS}
        kind = kinds.get(type(default), found.type)
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
    """One GraphProto: its values by name, its nodes, and the scope around it."""

    __slots__ = ("declared", "graph", "nodes", "number", "parent", "values")

    def __init__(self, graph, parent, number):
        self.graph = graph
        self.parent = parent
        self.number = number
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


class Index:
    """Everything the planner asks about a model.

    Parameters
    ----------
    source : storage.Source
    freeze_inputs : bool
        Treat initializers that are also graph inputs as constants.
    input_shapes : dict of name -> tuple of int, optional
        Sizes of graph inputs, for shape inference.
    """

    def __init__(self, source, freeze_inputs=False, input_shapes=None):
        self.source = source
        self.proto = source.proto
        self.freeze_inputs = freeze_inputs
        self.input_shapes = input_shapes or {}
        self.opset = max((entry.version for entry in self.proto.opset_import if is_standard(entry.domain)), default=1)
        self.scopes = []
        self._constants = {}
        self._inferred = None
        for function in self.proto.functions:
            self._check_text(function.name, *(name for node in function.node for name in (node.name, *node.output)))
        self._read_scopes()
        self.main = self.scopes[0]
        self._candidates = self._find_candidates()
        self._check_inputs()

    def _read_scopes(self):
        # Outer scopes first, so that a captured name is known when a body asks for it.
        pending = [(self.proto.graph, None, None)]
        while pending:
            graph, parent, owner = pending.pop(0)
            scope = Scope(graph, parent, len(self.scopes))
            self.scopes.append(scope)
            self._declare(scope)
            for node in scope.nodes:
                self._connect(node)
                for body in bodies(node.proto):
                    pending.append((body, scope, node))
            for info in graph.output:
                self._resolve(scope, info.name, owner.label if owner else "graph output").is_output = True
        self.order = [node for scope in self.scopes for node in self._sorted(scope)]

    def _declare(self, scope):
        graph = scope.graph
        for info in graph.input:
            self._new_value(scope, info.name).is_input = True
        for tensor in graph.initializer:
            value = scope.values.get(tensor.name) or self._new_value(scope, tensor.name)
            value.initializer = tensor
        for tensor in graph.sparse_initializer:
            if tensor.values.name not in scope.values:
                self._new_value(scope, tensor.values.name)
        for position, proto in enumerate(graph.node):
            node = Node(proto, scope, position)
            self._check_text(node.label, node.op, node.domain)
            scope.nodes.append(node)
            for slot, name in enumerate(proto.output):
                value = None
                if name:
                    value = self._new_value(scope, name)
                    value.producer, value.slot = node, slot
                node.outputs.append(value)

    def _check_text(self, *names):
        # protobuf hands out a string that is not UTF-8 as bytes.
        for name in names:
            if not isinstance(name, str):
                raise ModelError(expected("names in UTF-8", repr(name), self.source.name))

    def _new_value(self, scope, name):
        self._check_text(name)
        if name in scope.values:
            raise ModelError(expected("one source for each value", "two", name))
        value = scope.values[name] = Value(name, scope)
        return value

    def _resolve(self, scope, name, where):
        value = scope.find(name)
        if value is None:
            raise ModelError(expected("a value that a node or an input gives", repr(name), where))
        return value

    def _connect(self, node):
        for slot, name in enumerate(node.proto.input):
            value = None
            if name:
                value = self._resolve(node.scope, name, node.label)
                value.readers.append((node, slot))
            node.inputs.append(value)

    def _sorted(self, scope):
        """Return the scope's nodes in an order of data flow; nearly every model lists them so already."""
        needs = {node: {value.producer for value in self._reads(node) if value.scope is scope and value.producer} for node in scope.nodes}
        if all(producer.position < node.position for node, producers in needs.items() for producer in producers):
            return scope.nodes
        dependents = {}
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
            raise ModelError(expected("a graph without cycles", "a cycle", stuck.label))
        return ready

    def _reads(self, node):
        """Return the values that a node reads, those of its bodies included."""
        reads = [value for value in node.inputs if value is not None]
        pending = bodies(node.proto)
        for graph in pending:
            for inner in graph.node:
                names = inner.input
                reads.extend(value for value in map(node.scope.values.get, names) if value is not None)
                pending.extend(bodies(inner))
        return reads

    def _check_inputs(self):
        inputs = {value.name for value in self.main.values.values() if value.is_input}
        for name in self.input_shapes:
            if name not in inputs:
                raise ModelError(expected(f"the name of a graph input ({', '.join(sorted(inputs)) or 'none'})", repr(name), "input_shapes"))
            given, declared = self.input_shapes[name], self.declared_shape(self.main.values[name])
            known = given if declared is None else declared
            fits = len(known) == len(given) and all(not size or size in (-1, new) for size, new in zip(known, given, strict=True))
            if not fits:
                shown = ",".join(str(size or "?") for size in declared)
                raise ModelError(expected(f"sizes that fit {name}={shown}", ",".join(map(str, given)) or "none", "input_shapes"))

    def is_overridable(self, value):
        """Say whether a caller may override an initializer: it is a graph input too, and the file's IR version allows that."""
        return value.is_input and value.initializer is not None and self.proto.ir_version >= 4 and not self.freeze_inputs

    def constant(self, value):
        """Return the Tensor that a value always is, or None.

        Constant nodes, and standard operators on constants (Cast, Expand, ConstantOfShape, Shape, ...), count; what a caller may override
        does not.
        """
        if value is None or (value.initializer is None and value not in self._candidates):
            return None
        if value not in self._constants:
            self._constants[value] = self._find_constant(value)
        return self._constants[value]

    def _find_candidates(self):
        """Return the values that constant nodes and expressions over constants give: one pass in the order of the data flow."""
        found = set()
        for node in self.order:
            if not is_standard(node.domain):
                continue
            if node.op in ("Constant", "Shape") or (
                (node.op == "Identity" or node.op in EXPRESSIONS)
                and all(value is None or value in found or (value.initializer is not None) for value in node.inputs)
            ):
                found.update(value for value in node.outputs if value is not None)
        return found

    def _find_constant(self, value):
        if value.initializer is not None:
            if self.is_overridable(value):
                return None
            tensor = value.initializer
            return Tensor(tensor_dtype(tensor, tensor.name), tuple(tensor.dims), lambda: self.source.array(tensor))
        node = value.producer
        if node is None or not is_standard(node.domain):
            return None
        if node.op == "Identity":
            return self.constant(node.input(0))
        if node.op == "Constant":
            return self._constant_node(node)
        return self._expression(node, value.slot)

    def _constant_node(self, node):
        if len(node.proto.attribute) != 1:
            return None
        attribute = node.proto.attribute[0]
        if attribute.name == "value":
            tensor = attribute.t
            return Tensor(tensor_dtype(tensor, node.label), tuple(tensor.dims), lambda: self.source.array(tensor))
        dtypes = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
        if attribute.name not in dtypes:
            return None
        return _literal(np.asarray(helper.get_attribute_value(attribute), dtypes[attribute.name]))

    def _expression(self, node, slot):
        if node.op == "Shape":
            read = node.input(0)
            known = self.constant(read)
            shape = self.declared_shape(read) if known is None else known.shape
            if shape is None or None in shape:
                return None
            part = slice(node.attribute("start", 0), node.attribute("end"))
            return _literal(np.asarray(shape[part], np.int64))
        if node.op not in EXPRESSIONS or not node.inputs:
            return None
        inputs = [None if value is None else self.constant(value) for value in node.inputs]
        if any(value is not None and found is None for value, found in zip(node.inputs, inputs, strict=True)):
            return None
        if sum(found.size for found in inputs if found is not None) > LARGEST_EXPRESSION:
            return None
        if node.op in ("Expand", "ConstantOfShape") and math.prod(inputs[-1].array().reshape(-1).tolist()) > LARGEST_EXPRESSION:
            return None
        result = self._evaluate(node, [None if found is None else found.array() for found in inputs])
        return None if result is None or slot >= len(result) else _literal(result[slot])

    def _evaluate(self, node, arrays):
        """Return what a node gives for these inputs, None for an absent one; None where the evaluator cannot run it."""
        from onnx.reference import ReferenceEvaluator

        names = [f"i{slot}" if array is not None else "" for slot, array in enumerate(arrays)]
        proto = onnx.NodeProto()
        proto.CopyFrom(node.proto)
        del proto.input[:]
        proto.input.extend(names)
        outputs = [name or f"unused{slot}" for slot, name in enumerate(proto.output)]
        del proto.output[:]
        proto.output.extend(outputs)
        untyped = [onnx.ValueInfoProto(name=name) for name in outputs]
        feeds = {name: array for name, array in zip(names, arrays, strict=True) if array is not None}
        graph = helper.make_graph([proto], "constant", [onnx.ValueInfoProto(name=name) for name in feeds], untyped)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        try:
            with np.errstate(all="ignore"):
                return [np.asarray(result) for result in ReferenceEvaluator(model).run(None, feeds)]
        except Exception:  # the evaluator raises whatever NumPy does; a node that it cannot run is simply no constant
            return None

    def shape(self, value):
        """Return the shape of a value as a tuple with None for unknown sizes, or None where not even the rank is known."""
        if value is None:
            return None
        if value.initializer is not None:
            return tuple(value.initializer.dims)
        found = self._constants.get(value)
        if found is not None:
            return found.shape
        declared = None if self.input_shapes else self.declared_shape(value)
        if declared is not None and None not in declared:
            return declared
        inferred = self._shapes().get((value.scope.number, value.name))
        if declared is None or inferred is None or len(declared) != len(inferred):
            return inferred if declared is None else declared
        return tuple(there if size is None else size for size, there in zip(declared, inferred, strict=True))

    def kind(self, value):
        """Return the type of a value as a number of TensorProto, 0 where it is not known."""
        if value.initializer is not None:
            return value.initializer.data_type
        self._shapes()
        return self._kinds.get((value.scope.number, value.name), 0)

    def declared_shape(self, value):
        """Return what the file itself says of a value's shape, without inference."""
        scope = value.scope
        if scope.declared is None:
            # An output without sizes is a scalar, or what an exporter wrote that knew none: inference tells which.
            outputs = (info for info in scope.graph.output if _shape_of(info) != ())
            scope.declared = {info.name: _shape_of(info) for info in (*outputs, *scope.graph.value_info, *scope.graph.input)}
        return scope.declared.get(value.name)

    def _shapes(self):
        if self._inferred is None:
            self._inferred, self._kinds = {}, {}
            graph = self._infer()
            # Bodies are numbered in the order of the file, which inference has seen only if it is that of the data flow.
            scopes = scopes_of(graph) if self._sorted(self.main) is self.main.nodes else [graph]
            for number, inferred in enumerate(scopes):
                for info in (*inferred.input, *inferred.value_info, *inferred.output):
                    self._kinds[number, info.name] = info.type.tensor_type.elem_type
                    shape = _shape_of(info)
                    if shape is not None:
                        self._inferred[number, info.name] = shape
        return self._inferred

    def _infer(self):
        """Return the graph with inferred value_info; weights travel as types only, so that a large model costs little."""
        skeleton = onnx.ModelProto(ir_version=max(self.proto.ir_version, 4), opset_import=self.proto.opset_import)
        graph = skeleton.graph
        graph.name = "shapes"
        graph.node.extend(node.proto for node in self._sorted(self.main))
        graph.value_info.extend(self.proto.graph.value_info)
        graph.output.extend(self.proto.graph.output)
        for info in graph.output:
            if _shape_of(info) == ():
                info.type.tensor_type.ClearField("shape")
        for info in self.proto.graph.input:
            sized = graph.input.add()
            sized.CopyFrom(info)
            if info.name in self.input_shapes:
                kind = info.type.tensor_type.elem_type
                sized.CopyFrom(helper.make_tensor_value_info(info.name, kind, self.input_shapes[info.name]))
        listed = {info.name for info in graph.input}
        for tensor in self.proto.graph.initializer:
            integer = tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
            if integer and math.prod(tensor.dims) <= LARGEST_LIST and not self.is_overridable(self.main.values[tensor.name]):
                graph.initializer.add().CopyFrom(tensor)
            elif tensor.name not in listed:
                graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        skeleton.functions.extend(self.proto.functions)
        for _ in range(INFERENCE_PASSES):
            try:
                graph = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
            except Exception:  # inference raises many kinds on odd models; what it cannot say is unknown, and the checks live elsewhere
                break
            infos = (*graph.input, *graph.value_info, *graph.output)
            known = {info.name: shape for info in infos if (shape := _shape_of(info)) is not None}
            found = Sizes(self._sorted(self.main), known, self.constant, self._evaluate).found()
            if not found:
                break
            kinds = {info.name: info.type.tensor_type.elem_type for info in infos}
            names = {value.name for value in found}
            kept = [info for info in graph.value_info if info.name not in names]
            skeleton.graph.ClearField("value_info")
            skeleton.graph.value_info.extend(kept)
            for value, sizes in found.items():
                kind = kinds.get(value.name) or onnx.TensorProto.FLOAT
                skeleton.graph.value_info.append(helper.make_tensor_value_info(value.name, kind, sizes))
        return graph


# Standard operators whose result on constants is a constant: deterministic, without bodies.
# fmt: off
EXPRESSIONS = frozenset([
    "Abs", "Add", "Cast", "CastLike", "Concat", "ConstantOfShape", "Div", "Exp", "Expand", "Flatten", "Gather", "Mul", "Neg", "Pow",
    "Reciprocal", "Reshape", "Slice", "Sqrt", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze",
])
# fmt: on


def _literal(array):
    array = np.asarray(array, order="C")  # ascontiguousarray would make a vector of a scalar
    return Tensor(array.dtype, array.shape, lambda: array)


def _shape_of(info):
    kind = info.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in kind.shape.dim)
