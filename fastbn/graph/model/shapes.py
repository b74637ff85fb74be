"""The shapes and types that onnx's inference finds on a skeleton of the model: its nodes, its small constants, the types of the others.

Inference runs in this process, in C++, where a malformed node may end the process: nodes on which that can happen are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto, helper, numpy_helper

from fastbn.errors import FastbnError
from fastbn.graph.model.cropping import crop_levels, scopes_within
from fastbn.graph.model.expressions import Constants
from fastbn.graph.model.nesting import bodies, is_standard, scopes_of
from fastbn.graph.model.node import Node, Scope, Shape, Value, is_complete
from fastbn.graph.model.schemas import checker_context, is_function, is_inferable, propagates
from fastbn.graph.model.sizes import LARGEST_LIST, SizeInference
from fastbn.graph.ops.shape_rules import Size, Sizes

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["Inference", "type_of"]

# The most passes of inference; each one knows the sizes that the one before it has found.
INFERENCE_PASSES = 8

# Operators whose result has as many axes as a list has elements -> the slot of the list.
RANK_SLOTS = {"ConstantOfShape": 0, "Expand": 1, "Reshape": 1, "Unsqueeze": 1}

# Cropping nodes of a higher level than this are never shown to inference.
MOST_LEVELS = 64

# The domain of a node that inference must not see yet: it has no operators, so inference skips the node.
HIDDEN = "fastbn.hidden"

# The longest list of floats that is read for factors, such as the scales of a Resize.
LARGEST_FACTORS = 64

# The numbers of types.
KINDS = frozenset(TensorProto.DataType.values())

# A longer type, in bytes, is read anew for each value.
LONGEST_KEPT_TYPE = 1 << 10

# The longest list whose elements inference follows: it holds each element as a message of protobuf.
LARGEST_FOLLOWED = 1 << 16


class Infos(Protocol):
    """A repeated field of ValueInfoProto, as far as it is used here; protobuf's own class has no type."""

    def add(self) -> ValueInfoProto:
        """Append an empty one and return it."""
        ...


def type_of(info: ValueInfoProto) -> tuple[int, Shape | None]:
    """Return (type, shape) in a ValueInfoProto: 0 where it gives no type of elements, or none that exists, None for each size that it
    leaves open or that is none, and for the shape where it gives no rank."""
    data = info.type.SerializeToString()
    return _read_type(data) if len(data) <= LONGEST_KEPT_TYPE else _read_type.__wrapped__(data)


@lru_cache(maxsize=1024)
def _read_type(data: bytes) -> tuple[int, Shape | None]:
    """Return type_of of a TypeProto; kept, as most values of a network have one of a few types."""
    kind = TypeProto.FromString(data).tensor_type
    elements = kind.elem_type if kind.elem_type in KINDS else 0
    if not kind.HasField("shape"):
        return elements, None
    dims = kind.shape.dim
    # Exporters that know no batch write 0 for it.
    is_known = [dim.HasField("dim_value") and dim.dim_value >= (0 if axis else 1) for axis, dim in enumerate(dims)]
    shape = tuple(dim.dim_value if known else None for dim, known in zip(dims, is_known, strict=True))
    return elements, shape


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
    shows_functions : bool
        Whether inference sees the functions of the model: it puts them in the place of their calls, each time anew.

    Attributes
    ----------
    shapes : dict of (int, str) -> tuple of int or None
    kinds : dict of (int, str) -> int
        Types of the elements, as numbers of TensorProto.
    """

    def __init__(
        self,
        proto: ModelProto,
        opset: int,
        main: Scope,
        constants: Constants,
        input_shapes: Mapping[str, tuple[int, ...]],
        shows_functions: bool,
    ) -> None:
        self.shapes: dict[tuple[int, str], Shape] = {}
        self.kinds: dict[tuple[int, str], int] = {}
        self._proto = proto
        self._main = main
        self._constants = constants
        self._input_shapes = input_shapes
        self._context = checker_context(proto, opset)
        self._opset = opset
        self._shows_functions = shows_functions
        # What SizeInference has computed: shapes, and the elements of lists.
        self._computed_shapes: dict[Value, Shape] = {}
        self._computed_lists: dict[Value, Array] = {}
        # Small constants, as arrays and as messages; types of others.
        self._numbers: dict[Value, Array | None] = {}
        self._number_protos: dict[Value, tuple[Array, TensorProto]] = {}
        self._type_infos: dict[Value, ValueInfoProto | None] = {}
        self._nodes = [node for scope in scopes_within(main) for node in scope.ordered]
        # Nodes as inference sees them, None: not at all.
        self._safe_protos = {node: self._safe_proto(node) for node in self._nodes}
        # Nodes whose outputs are constant whatever is known of sizes.
        self._constant_nodes = {node for node in self._nodes if self._gives_constants(node)}
        # Nodes of which inference may read lists.
        own = [node for node in self._nodes if is_standard(node.domain) and node not in self._constant_nodes]
        self._list_readers = [node for node in own if node.op in RANK_SLOTS or propagates(node.op, opset)]
        # The sizes that Dims tell to be equal, made when they are first asked for.
        self._sizes: SizeInference | None = None
        self._infer()

    def _infer(self) -> None:
        """Run passes until none finds more; what one finds is known to the next.

        Lists are followed once all are known to be short, or no other pass finds more.
        """
        sizes: SizeInference | None = None
        is_stuck = False
        for _ in range(INFERENCE_PASSES):
            before = dict(self.shapes)
            left_out = {node for node in self._list_readers if self._may_be_endless(node, True)}
            follows_lists = is_stuck or not left_out
            if not follows_lists:
                left_out = {node for node in left_out if self._may_be_endless(node, False)}
            if not self._pass(left_out, follows_lists):
                break
            is_changing = bool(left_out) and before != self.shapes
            if sizes is not None and follows_lists and not is_changing and sizes.has_told(self.shapes, before):
                self._sizes = sizes
                break
            sizes = SizeInference(self._nodes, self.shapes, self._constants)
            if not any(map(sizes.is_open, sizes.nodes)):
                break
            shapes, lists = sizes.infer()
            is_stuck = not shapes and not is_changing and lists.keys() <= self._computed_lists.keys()
            if is_stuck and follows_lists:
                self._sizes = sizes
                break
            self._computed_lists.update(lists)
            self._computed_shapes.update(shapes)
            self.shapes.update(((value.scope.number, value.name), shape) for value, shape in shapes.items())

    def sizes(self, value: Value) -> Sizes | None:
        """Return the sizes of a value, a Dim for each one that only a run tells; None where not even the rank is known."""
        return self._finished().sizes(value)

    def elements(self, value: Value) -> list[Size] | None:
        """Return the elements of a list of integers as far as they are known, None where not even their number is."""
        return self._finished().elements(value)

    def _finished(self) -> SizeInference:
        if self._sizes is None:
            self._sizes = SizeInference(self._nodes, self.shapes, self._constants)
            self._sizes.infer()
        return self._sizes

    def _pass(self, left_out: Set[Node], follows_lists: bool) -> bool:
        """Run inference without some nodes, once for each level of cropping nodes, the next one only while no size is negative; say whether
        it ran."""
        levels = crop_levels(self._main, self._proto.functions, self._number, self._is_known)
        crops: dict[Node, list[NodeProto]] = {node: [] for node in levels}
        skeleton, scopes = self._skeleton(left_out, crops)
        graph = skeleton.graph
        last = max((level for level in levels.values() if level <= MOST_LEVELS), default=0)
        for level in range(last + 1):
            for node, added in crops.items():
                for proto in added:
                    proto.domain = node.domain if levels[node] <= level else HIDDEN
            try:
                graph = onnx.shape_inference.infer_shapes(skeleton, data_prop=follows_lists).graph
            except Exception:  # inference raises many kinds on malformed models; the shapes stay unknown, and other code checks the model
                return False
            if level == last or _has_negative(graph):
                break
        self._read(graph, scopes)
        return True

    def _read(self, graph: GraphProto, scopes: list[Scope]) -> None:
        """Add the shapes and types of a pass to those of the passes before it."""
        for scope, inferred in zip(scopes, scopes_of(graph), strict=True):
            for info in (*inferred.input, *inferred.value_info, *inferred.output):
                key, (kind, shape) = (scope.number, info.name), type_of(info)
                self.kinds[key] = kind or self.kinds.get(key, 0)
                known = self.shapes.get(key)
                if shape is not None and known is not None and len(known) == len(shape):
                    shape = tuple(before if size is None else size for size, before in zip(shape, known, strict=True))
                if shape is not None:
                    self.shapes[key] = shape

    # ---- the skeleton ----

    def _skeleton(self, left_out: Set[Node], crops: dict[Node, list[NodeProto]]) -> tuple[ModelProto, list[Scope]]:
        """Return (model without the nodes left out, its scopes in the order of scopes_of); note the copies of cropping nodes in `crops`."""
        skeleton = ModelProto(ir_version=max(self._proto.ir_version, 4), opset_import=self._proto.opset_import)
        skeleton.opset_import.add(domain=HIDDEN, version=1)
        skeleton.graph.name = "shapes"
        scopes: list[Scope] = []
        pending = [(self._main, skeleton.graph)]
        for scope, graph in pending:
            scopes.append(scope)
            orphans = self._add_nodes(scope, graph, pending, left_out, crops)
            self._add_infos(scope, graph, orphans)
            self._add_constants(scope, graph, orphans)
        if self._shows_functions:
            skeleton.functions.extend(function for function in self._proto.functions if is_function(function, self._context))
        return skeleton, scopes

    def _add_nodes(
        self,
        scope: Scope,
        graph: GraphProto,
        pending: list[tuple[Scope, GraphProto]],
        left_out: Set[Node],
        crops: dict[Node, list[NodeProto]],
    ) -> set[Value]:
        """Add the nodes of a scope, and their bodies to `pending`; return the orphans, values whose nodes are left out or may be hidden."""
        orphans: set[Value] = set()
        shown: list[tuple[Node, NodeProto]] = []
        for node in scope.ordered:
            proto = self._safe_protos[node]
            is_constant = node in self._constant_nodes or (bool(self._computed_lists) and self._gives_constants(node))
            if proto is not None and node not in left_out and not is_constant:
                shown.append((node, proto))
            if not shown or shown[-1][0] is not node or node in crops:
                orphans.update(value for value in node.outputs if value is not None)
        graph.node.extend(proto for _, proto in shown)
        for (node, _), added in zip(shown, graph.node, strict=True):
            if node.scopes:
                pending.extend(zip(node.scopes, bodies(added), strict=True))
            if node in crops:
                crops[node].append(added)
        return orphans

    def _safe_proto(self, node: Node) -> NodeProto | None:
        proto = _shallow(node.proto) if node.scopes else node.proto
        return proto if is_inferable(proto, self._context) else None

    def _gives_constants(self, node: Node) -> bool:
        """Say whether all that a node gives is constant, for what is known of sizes by now."""
        computed, outputs = self._computed_lists, [value for value in node.outputs if value is not None]
        return bool(outputs) and all(value in computed or self._constants.find(value, LARGEST_LIST) is not None for value in outputs)

    def _may_be_endless(self, node: Node, follows_lists: bool) -> bool:
        """Say whether inference would make a message of each element of a list that may be a long one."""
        dims = node.input(RANK_SLOTS.get(node.op, len(node.inputs)))
        if dims is not None and not _is_short(self._shape(dims), LARGEST_LIST):
            return True
        if not follows_lists or not propagates(node.op, self._opset):
            return False
        shapes = [self._shape(value) for value in node.inputs if value is not None]
        return not all(_is_short(shape, LARGEST_FOLLOWED) for shape in shapes)

    def _shape(self, value: Value) -> Shape | None:
        known = self._constants.find(value, LARGEST_LIST)
        return self.shapes.get((value.scope.number, value.name)) if known is None else known.shape

    def _add_infos(self, scope: Scope, graph: GraphProto, orphans: set[Value]) -> None:
        """Add the inputs and outputs of a scope, and the shapes of values that the file declares or that are known by now."""
        known = {value.name: shape for value, shape in self._computed_shapes.items() if value.scope is scope}
        for info in scope.graph.input:
            _add_info(graph.input, info, self._input_shapes.get(info.name) if scope is self._main else None)
        for info in scope.graph.output:
            _add_info(graph.output, info)
            if type_of(info)[1] == ():  # a scalar, or written by an exporter that knew no sizes: inference tells which
                graph.output[-1].type.tensor_type.ClearField("shape")
        declared = [info for info in scope.graph.value_info if info.name not in known]
        for info in declared:
            _add_info(graph.value_info, info)
        names = {info.name for info in declared}
        for value in orphans:
            shape = self.shapes.get((scope.number, value.name)) or self._rank_of_crop(value)
            if value.name not in names and shape is not None and self._number(value) is None:
                known.setdefault(value.name, shape)
        for name, sizes in known.items():
            kind = self._kind(scope.values[name])
            if kind:
                graph.value_info.append(helper.make_tensor_value_info(name, kind, sizes))

    def _is_known(self, value: Value) -> bool:
        shape = self.shapes.get((value.scope.number, value.name))
        return bool(shape) and is_complete(shape)

    def _rank_of_crop(self, value: Value) -> Shape | None:
        """Return the unknown sizes of the output of a Slice: as many as its data has."""
        data = value.producer.input(0) if value.producer is not None and value.producer.is_op("Slice") else None
        shape = None if data is None else self._shape(data)
        return None if shape is None else (None,) * len(shape)

    def _kind(self, value: Value) -> int:
        """Return the type of a value, 0 where it is not known: a Reshape, Flatten or Slice gives that of its data."""
        known = self.kinds.get((value.scope.number, value.name), 0)
        data = value.producer.input(0) if value.producer is not None and value.producer.is_op("Flatten", "Reshape", "Slice") else None
        return known or (0 if data is None else self.kinds.get((data.scope.number, data.name), 0))

    def _add_constants(self, scope: Scope, graph: GraphProto, orphans: set[Value]) -> None:
        """Add the constants that nodes of a scope read: small ones with their values, the others as types."""
        inputs = {info.name for info in graph.input}
        tensors: list[TensorProto] = []
        infos: list[ValueInfoProto] = []
        own = (value for value in scope.values.values() if value.initializer is not None or value in orphans)
        read = (value for node in scope.nodes for value in node.inputs if value is not None)
        for value in dict.fromkeys((*own, *read)):
            number = self._number(value)
            if number is not None:
                tensor = self._number_proto(value, number)
                tensors.append(tensor)
                key = value.scope.number, value.name
                self.shapes[key], self.kinds[key] = number.shape, tensor.data_type
            elif value.scope is scope and value.name not in inputs:
                if value not in self._type_infos:
                    self._type_infos[value] = self._type_info(value)
                info = self._type_infos[value]
                infos += [] if info is None else [info]
        graph.initializer.extend(tensors)
        # A body must not get more inputs: inference compares their number with what its node hands over.
        (graph.input if scope.parent is None else graph.value_info).extend(infos)

    def _number_proto(self, value: Value, number: Array) -> TensorProto:
        known = self._number_protos.get(value)
        if known is None or known[0] is not number:
            known = self._number_protos[value] = number, numpy_helper.from_array(number, value.name)
        return known[1]

    def _type_info(self, value: Value) -> ValueInfoProto | None:
        """Return the type of a constant, None for what is none."""
        if value.initializer is not None:
            return helper.make_tensor_value_info(value.name, value.initializer.data_type, value.dims)
        constant = self._constants.find(value, LARGEST_LIST)
        if constant is None:
            return None
        return helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(constant.dtype), constant.shape)

    def _number(self, value: Value) -> Array | None:
        """Return the values of a small constant, or of a list of sizes that is constant for these input sizes; None for anything else."""
        if value in self._computed_lists:
            return self._computed_lists[value]
        if value not in self._numbers:
            self._numbers[value] = self._small(value)
        return self._numbers[value]

    def _small(self, value: Value) -> Array | None:
        constant = self._constants.find(value, LARGEST_LIST)
        limits = {"i": LARGEST_LIST, "u": LARGEST_LIST, "f": LARGEST_FACTORS, "b": LARGEST_FACTORS}
        if constant is None or constant.size > limits.get(constant.dtype.kind, -1):
            return None
        if constant.dtype.kind == "f" and len(constant.shape) > 1:  # no factors, but a small weight
            return None
        try:
            return constant.array()
        except FastbnError:  # raised again where the constant is needed
            return None


def _has_negative(graph: GraphProto) -> bool:
    """Say whether any inferred size is negative, in bodies too."""
    infos = (info for each in scopes_of(graph) for info in (*each.value_info, *each.output))
    return any(dim.dim_value < 0 for info in infos for dim in info.type.tensor_type.shape.dim)


def _is_short(shape: Shape | None, longest: int) -> bool:
    """Say whether a value is known to be no list, or one of no more elements than `longest`."""
    return shape is not None and (len(shape) != 1 or 0 <= (longest + 1 if shape[0] is None else shape[0]) <= longest)


def _add_info(infos: Infos, info: ValueInfoProto, shape: Shape | None = None) -> None:
    """Add a copy of a ValueInfoProto, with another shape where one is given; a negative size becomes unknown."""
    added = infos.add()
    added.CopyFrom(info)
    if shape is not None:
        added.CopyFrom(helper.make_tensor_value_info(info.name, info.type.tensor_type.elem_type, shape))
    for dim in added.type.tensor_type.shape.dim if added.type.HasField("tensor_type") else ():
        if dim.HasField("dim_value") and dim.dim_value < 0:
            dim.ClearField("dim_value")


def _shallow(proto: NodeProto) -> NodeProto:
    """Return a copy of a node with empty bodies."""
    shallow = NodeProto(op_type=proto.op_type, domain=proto.domain, name=proto.name, input=proto.input, output=proto.output)
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
