"""The shapes and types that inference finds, on a skeleton of the model: its nodes, its small constants, and of everything else the types.

Inference runs in this process, in C++, where a node that is none may end the process: what inference cannot be trusted with is left out.
"""

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, ValueInfoProto, helper, numpy_helper

from fastbn.errors import FastbnError
from fastbn.graph.model.cropping import crop_levels, scopes_within
from fastbn.graph.model.expressions import Constants
from fastbn.graph.model.nesting import LARGEST_INLINED, bodies, is_standard, scopes_of
from fastbn.graph.model.schemas import checker_context, is_function, is_inferable, propagates
from fastbn.graph.model.sizes import LARGEST_LIST, Sizes

__all__ = ["Inference", "shape_of"]

# Each pass knows the shapes that the one before it found behind sizes that the graph computes.
INFERENCE_PASSES = 8

# Operators whose result has as many axes as a list has elements, and the slot of the list.
RANK_SLOTS = {"ConstantOfShape": 0, "Expand": 1, "Reshape": 1, "Unsqueeze": 1}

# Cropping nodes behind more of one another than this are never shown to inference.
MOST_LEVELS = 64

# The domain of a node that inference is not to see yet; it knows no operator of it.
NOWHERE = "fastbn.nowhere"

# Factors, such as the scales of a Resize, are floats; a longer list of floats is no list of factors.
LARGEST_FACTORS = 64

# No size is larger; and inference follows the elements of no longer list, each of which it holds as a message.
LARGEST_DIM = 1 << 31
LARGEST_FOLLOWED = 1 << 16


def shape_of(info: ValueInfoProto) -> tuple | None:
    """Return the shape in a ValueInfoProto, None for each size that it leaves open; None where it says no rank."""
    kind = info.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") and 0 < dim.dim_value <= LARGEST_DIM else None for dim in kind.shape.dim)


class Inference:
    """What inference says of a model, by (number of the scope, name of the value).

    Parameters
    ----------
    proto : onnx.ModelProto
    opset : int
    main : model.Scope
    constants : expressions.Constants
    input_shapes : dict of name -> tuple of int
        Sizes of graph inputs.
    expanded : int
        Nodes of the model with its functions in the place of their calls.

    Attributes
    ----------
    shapes : dict of (int, str) -> tuple of int or None
    kinds : dict of (int, str) -> int
        Types of the elements, as numbers of TensorProto.
    """

    def __init__(self, proto: onnx.ModelProto, opset: int, main: object, constants: Constants, input_shapes: dict, expanded: int) -> None:
        self.shapes: dict[tuple[int, str], tuple] = {}
        self.kinds: dict[tuple[int, str], int] = {}
        self._proto = proto
        self._main = main
        self._constants = constants
        self._input_shapes = input_shapes
        self._context = checker_context(proto, opset)
        self._opset = opset
        self._has_functions = expanded <= LARGEST_INLINED
        self._told: dict = {}
        self._lists: dict = {}
        self._numbers: dict = {}
        self._shown: dict = {}
        self._crops: dict = {}
        self._cut: set = set()
        self._follows = False
        self._infer()

    def _infer(self) -> None:
        """Run passes until none finds more; what one finds is known to the next."""
        for _ in range(INFERENCE_PASSES):
            before = dict(self.shapes)
            if not self._pass():
                break
            spreads = bool(self._cut) and before != self.shapes
            sizes = Sizes(self._main.ordered, self.shapes, self._constants)
            if not any(sizes.is_open(node) for scope in scopes_within(self._main) for node in scope.ordered):
                break
            if not self._follows:  # ranks first: they tell which lists are short enough to be followed
                self._follows = not spreads
                continue
            found, lists = sizes.found()
            if not found and not spreads and lists.keys() <= self._lists.keys():
                break
            self._told.update(found)
            self._lists.update(lists)
            self._follows = not self._cut

    def _pass(self) -> bool:
        """Run inference once for each level of cropping nodes, the next one only while no size is negative; say whether it ran."""
        self._cut = {node for scope in scopes_within(self._main) for node in scope.ordered if self._is_endless(node)}
        levels = crop_levels(self._main, self._proto.functions, self._number, self._is_known)
        self._crops = {node: [] for node in levels}
        skeleton, scopes = self._skeleton()
        last = max((level for level in levels.values() if level <= MOST_LEVELS), default=0)
        for level in range(last + 1):
            for node, added in self._crops.items():
                for proto in added:
                    proto.domain = node.domain if levels[node] <= level else NOWHERE
            try:
                graph = onnx.shape_inference.infer_shapes(skeleton, data_prop=self._follows).graph
            except Exception:  # inference raises many kinds on odd models; what it cannot say is unknown, and the checks live elsewhere
                return False
            if level == last or _has_negative(graph):
                break
        self._read(graph, scopes)
        return True

    def _read(self, graph: GraphProto, scopes: list) -> None:
        """Add what a pass has found to what those before it have."""
        for scope, inferred in zip(scopes, scopes_of(graph), strict=True):
            for info in (*inferred.input, *inferred.value_info, *inferred.output):
                key, shape = (scope.number, info.name), shape_of(info)
                self.kinds[key] = info.type.tensor_type.elem_type or self.kinds.get(key, 0)
                known = self.shapes.get(key)
                if shape is not None and known is not None and len(known) == len(shape):
                    shape = tuple(there if size is None else size for size, there in zip(shape, known, strict=True))
                if shape is not None:
                    self.shapes[key] = shape

    # ---- the skeleton ----

    def _skeleton(self) -> tuple[onnx.ModelProto, list]:
        """Return (model, its scopes in the order of scopes_of); the cropping nodes in it are noted in self._crops."""
        skeleton = onnx.ModelProto(ir_version=max(self._proto.ir_version, 4), opset_import=self._proto.opset_import)
        skeleton.opset_import.add(domain=NOWHERE, version=1)
        skeleton.graph.name = "shapes"
        scopes, pending = [], [(self._main, skeleton.graph)]
        for scope, graph in pending:
            scopes.append(scope)
            left_out = self._add_nodes(scope, graph, pending)
            self._add_infos(scope, graph, left_out)
            self._add_constants(scope, graph, left_out)
        if self._has_functions:
            skeleton.functions.extend(function for function in self._proto.functions if is_function(function, self._context))
        return skeleton, scopes

    def _add_nodes(self, scope: object, graph: GraphProto, pending: list) -> set:
        """Add the nodes of a scope, and their bodies to `pending`; return the values that nodes left out would give, or may."""
        left_out = set()
        for node in scope.ordered:
            given = [value for value in node.outputs if value is not None]
            if node not in self._shown:
                shallow = _shallow(node.proto) if node.scopes else node.proto
                self._shown[node] = shallow if is_inferable(shallow, self._context) else None
            shallow = self._shown[node]
            if shallow is None or node in self._cut or self._are_constants(given):
                left_out.update(given)
                continue
            added = graph.node.add()
            added.CopyFrom(shallow)
            pending.extend(zip(node.scopes, bodies(added), strict=True))
            if node in self._crops:
                self._crops[node].append(added)
                left_out.update(given)
        return left_out

    def _are_constants(self, values: list) -> bool:
        return bool(values) and all(self._number(value) is not None or self._constants.find(value, LARGEST_LIST) for value in values)

    def _is_endless(self, node: object) -> bool:
        """Say whether inference would make a message of each element of a list that may be a long one."""
        if not is_standard(node.domain):
            return False
        listed = node.input(RANK_SLOTS.get(node.op, len(node.inputs)))
        if listed is not None and not _is_short(self._shape(listed), LARGEST_LIST):
            return True
        if not self._follows or not propagates(node.op, self._opset):
            return False
        shapes = [self._shape(value) for value in node.inputs if value is not None]
        return not all(_is_short(shape, LARGEST_FOLLOWED) for shape in shapes)

    def _shape(self, value: object) -> tuple | None:
        known = self._constants.find(value, LARGEST_LIST)
        return self.shapes.get((value.scope.number, value.name)) if known is None else known.shape

    def _add_infos(self, scope: object, graph: GraphProto, left_out: set) -> None:
        told = {value.name: sizes for value, sizes in self._told.items() if value.scope is scope}
        for info in scope.graph.input:
            shape = self._input_shapes.get(info.name) if scope is self._main else None
            _add_info(graph.input, info, shape)
        for info in scope.graph.output:
            _add_info(graph.output, info)
            if shape_of(info) == ():  # a scalar, or what an exporter wrote that knew no sizes: inference tells which
                graph.output[-1].type.tensor_type.ClearField("shape")
        declared = [info for info in scope.graph.value_info if info.name not in told]
        for info in declared:
            _add_info(graph.value_info, info)
        names = {info.name for info in declared}
        for value in left_out:
            shape = self.shapes.get((scope.number, value.name)) or self._rank_of_crop(value)
            if value.name not in names and shape is not None and self._number(value) is None:
                told.setdefault(value.name, shape)
        for name, sizes in told.items():
            kind = self._kind(scope.values[name])
            if kind:
                graph.value_info.append(helper.make_tensor_value_info(name, kind, sizes))

    def _is_known(self, value: object) -> bool:
        return None not in (self.shapes.get((value.scope.number, value.name)) or (None,))

    def _rank_of_crop(self, value: object) -> tuple | None:
        """Return open sizes for what a Slice gives that is left out: as many as its data has."""
        data = value.producer.input(0) if value.producer.is_op("Slice") else None
        shape = None if data is None else self._shape(data)
        return None if shape is None else (None,) * len(shape)

    def _kind(self, value: object) -> int:
        """Return the type of a value that is told about, 0 where it is not known: a Reshape gives that of its data."""
        known = self.kinds.get((value.scope.number, value.name), 0)
        data = value.producer.input(0) if value.producer is not None and value.producer.is_op("Flatten", "Reshape", "Slice") else None
        return known or (0 if data is None else self.kinds.get((data.scope.number, data.name), 0))

    def _add_constants(self, scope: object, graph: GraphProto, left_out: set) -> None:
        """Add the constants that nodes of a scope read: small ones with their values, the others as types."""
        listed = {info.name for info in graph.input}
        own = (value for value in scope.values.values() if value.initializer is not None or value in left_out)
        read = (value for node in scope.nodes for value in node.inputs if value is not None)
        for value in dict.fromkeys((*own, *read)):
            number = self._number(value)
            if number is not None:
                graph.initializer.append(numpy_helper.from_array(number, value.name))
                key = value.scope.number, value.name
                self.shapes[key], self.kinds[key] = number.shape, graph.initializer[-1].data_type
            elif value.scope is scope and value.name not in listed:
                self._add_type(scope, graph, value)

    def _add_type(self, scope: object, graph: GraphProto, value: object) -> None:
        found = self._constants.find(value, LARGEST_LIST)
        if value.initializer is not None:
            kind, shape = value.initializer.data_type, value.initializer.dims
        elif found is not None:
            kind, shape = helper.np_dtype_to_tensor_dtype(found.dtype), found.shape
        else:
            return
        # The inputs of a body are counted.
        infos = graph.input if scope.parent is None else graph.value_info
        infos.append(helper.make_tensor_value_info(value.name, kind, shape))

    def _number(self, value: object) -> np.ndarray | None:
        """Return the values of a small constant, or of a list of sizes that is one for these inputs; None for anything else."""
        if self._lists.get(value) is not None:
            return self._lists[value]
        if value not in self._numbers:
            self._numbers[value] = self._small(value)
        return self._numbers[value]

    def _small(self, value: object) -> np.ndarray | None:
        found = self._constants.find(value, LARGEST_LIST)
        limits = {"i": LARGEST_LIST, "u": LARGEST_LIST, "f": LARGEST_FACTORS, "b": LARGEST_FACTORS}
        if found is None or found.size > limits.get(found.dtype.kind, -1):
            return None
        try:
            return found.array()
        except FastbnError:  # it is said where the constant matters
            return None


def _has_negative(graph: GraphProto) -> bool:
    """Say whether any size that inference has found is negative, in bodies too."""
    infos = (info for each in scopes_of(graph) for info in (*each.value_info, *each.output))
    return any(dim.dim_value < 0 for info in infos for dim in info.type.tensor_type.shape.dim)


def _is_short(shape: tuple | None, longest: int) -> bool:
    """Say whether an array is known to be no list, or one of no more elements."""
    return shape is not None and (len(shape) != 1 or 0 <= (longest + 1 if shape[0] is None else shape[0]) <= longest)


def _add_info(infos: object, info: ValueInfoProto, shape: tuple | None = None) -> None:
    """Add a copy of a ValueInfoProto, with another shape where one is given; a size that cannot be one is left open."""
    added = infos.add()
    added.CopyFrom(info)
    if shape is not None:
        added.CopyFrom(helper.make_tensor_value_info(info.name, info.type.tensor_type.elem_type, shape))
    for dim in added.type.tensor_type.shape.dim if added.type.HasField("tensor_type") else ():
        if dim.HasField("dim_value") and not 0 <= dim.dim_value <= LARGEST_DIM:
            dim.ClearField("dim_value")


def _shallow(proto: NodeProto) -> NodeProto:
    """Return a node whose bodies are empty."""
    shallow = onnx.NodeProto(op_type=proto.op_type, domain=proto.domain, name=proto.name, input=proto.input, output=proto.output)
    for attribute in proto.attribute:
        if attribute.type not in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            shallow.attribute.add().CopyFrom(attribute)
            continue
        added = shallow.attribute.add(name=attribute.name, type=attribute.type)
        if attribute.type == AttributeProto.GRAPH:
            added.g.name = "body"
        for _ in attribute.graphs:
            added.graphs.add(name="body")
    return shallow
