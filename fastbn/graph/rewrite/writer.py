"""The only writer: edits the graphs of a copy of the model as plans say, and returns the copy as an Output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableSequence, Sequence
from typing import TypeVar

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fastbn.graph.model.constant import Constant, Scaled
from fastbn.graph.model.external import is_external
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import scopes_of
from fastbn.graph.model.node import Node, Shape, Value
from fastbn.graph.ops.row import Attribute
from fastbn.graph.planner.planning import Planning
from fastbn.graph.rewrite.consistency import check_written
from fastbn.graph.rewrite.data_files import Patches
from fastbn.graph.rewrite.draft import Draft
from fastbn.graph.rewrite.output import Output, Written
from fastbn.graph.runtime import CARRIED

__all__ = ["edited", "raises_ir_version", "rewrite"]

# A folded weight of more bytes stays in the data file of its original; a smaller one goes into the model file.
LARGEST_INLINE = 1 << 20

# From this IR version on, an initializer need not be a graph input too.
FIRST_IR_OF_CONSTANTS = 4


MessageT = TypeVar("MessageT")


def edited(proto: NodeProto, constants: Mapping[int, str], attributes: Mapping[str, Attribute]) -> NodeProto:
    """Change a NodeProto in place and return it.

    Parameters
    ----------
    proto : onnx.NodeProto
    constants : mapping of int -> str
        Input slot -> name of the value that the node reads there.
    attributes : mapping of str -> value
    """
    for slot, name in constants.items():
        while len(proto.input) <= slot:
            proto.input.append("")
        proto.input[slot] = name
    for name, value in attributes.items():
        attribute = next((attribute for attribute in proto.attribute if attribute.name == name), None)
        if attribute is None:
            attribute = proto.attribute.add()
        attribute.CopyFrom(helper.make_attribute(name, value))
    return proto


def raises_ir_version(index: Index) -> bool:
    """Say whether the written model needs a later IR version, because its initializers are no graph inputs any more."""
    return index.freeze_inputs and index.proto.ir_version < FIRST_IR_OF_CONSTANTS and bool(index.proto.graph.initializer)


def rewrite(index: Index, planning: Planning, draft: Draft) -> Output:
    """Apply the plans to a copy of the model, when that is first asked for; everything that no plan names is as it was.

    Then, or here where the caller holds the model and may change it, ModelError says that what was made is not what was planned: a fault of
    this package, found before any file is written.
    """
    output = Output(index.source, bool(planning.plans) or index.freeze_inputs, lambda: _Writer(index, planning, draft).written())
    if index.source.is_shared:
        output.proto  # noqa: B018  # a property that does the work
    return output


class _Writer:
    """The edits of one model; unused_constants and unused_values hold, by scope number, the names of initializers and of values that are
    not written any more, or not yet."""

    def __init__(self, index: Index, planning: Planning, draft: Draft) -> None:
        self.index = index
        self.view = planning.view
        self.plans = planning.plans
        self.draft = draft
        self.unwritten = draft.unwritten
        self.proto = ModelProto()
        self.proto.CopyFrom(index.proto)
        self.graphs = scopes_of(self.proto.graph)
        self.added = {node: _copy(node.proto) for node in draft.added}
        self.patches = Patches(index.source)
        self.names = {name for scope in index.scopes for name in scope.values} | {new.required_output().name for new in self.added}
        self.tensors = [{tensor.name: tensor for tensor in graph.initializer} for graph in self.graphs]
        self.unused_constants = defaultdict(set, {number: {*names} for number, names in draft.left_out.items()})
        self.unused_values = defaultdict(set, {number: {*names} for number, names in draft.unused_values.items()})
        self.infos: dict[int, defaultdict[str, list[ValueInfoProto]]] = {}

    def written(self) -> Written:
        """Make all edits, in this order: they read what the ones before have noted."""
        self._take_over_names()
        for plan in self.plans:
            for (node, slot), constant in plan.constants.items():
                if node in self.unwritten:  # another fold replaces all that it computed
                    continue
                edited(self._proto(node), {slot: self._write_constant(node, slot, constant)}, {})
            for node, attributes in plan.attributes.items():
                edited(self._proto(node), {}, attributes)
        self._rebuild_graphs()
        if self.index.freeze_inputs:
            self._freeze_inputs()
        check_written(self.index, self.view, self.plans, self.unwritten, self.proto)
        return Written(self.proto, self.patches.entries)

    def _proto(self, node: Node) -> NodeProto:
        return self.added[node] if node in self.added else self.graphs[node.scope.number].node[node.position]

    def _take_over_names(self) -> None:
        """Give the input of each removed node the name of its output, wherever that is written or read.

        Where the affine was folded forward, the name of the input stays, and the readers of the output read it.
        """
        names: dict[Value, str] = {}
        for node, value in self.view.removed.items():
            # A graph input or output, or a value of another scope, keeps its name: it may be read by that name from elsewhere.
            keeps_name = value.producer is None or value.is_output or value.scope is not node.scope
            if node not in self.view.forwarded and not keeps_name:
                names[value] = node.required_output().name
        for node, value in self.view.removed.items():
            names[node.required_output()] = names.get(value, value.name)
        for value, name in names.items():
            if value.name == name:
                continue
            self.unused_values[value.scope.number].add(value.name)
            producer = self.view.producer(value)
            if producer is not None and producer not in self.unwritten:
                self._proto(producer).output[value.slot] = name
            for reader, slot in value.readers:
                present = self.view.present(reader)[0]
                if present not in self.unwritten:
                    self._proto(present).input[slot] = name
        for value, shape in ((value, shape) for plan in self.plans for value, shape in plan.widened.items()):
            self._declare(value.scope.number, names.get(value, value.name), shape, self.index.kind(value))

    def _write_constant(self, node: Node, slot: int, constant: Constant) -> str:
        """Write a folded constant to its home, and return the name under which it stands there."""
        old, is_over, role = self.draft.homes[node, slot]
        if old is not None and is_over:
            scope = old.scope
            tensor = self.tensors[scope.number][old.name]
            self.unused_constants[scope.number].remove(old.name)
            self._declare(scope.number, old.name, constant.shape, helper.np_dtype_to_tensor_dtype(constant.dtype))
        else:
            # Before IR 4 a constant must be a graph input too. The constants of a body, which has no such inputs, go into the main graph.
            scope = self.index.main if self.proto.ir_version < FIRST_IR_OF_CONSTANTS else node.scope
            tensor = self.graphs[scope.number].initializer.add()
            if old is not None and old.initializer is not None:
                tensor.CopyFrom(old.initializer)
            tensor.name = self._new_name(f"{node.label}.{role}")
            if self.proto.ir_version < FIRST_IR_OF_CONSTANTS:
                kind = helper.np_dtype_to_tensor_dtype(constant.dtype)
                self.proto.graph.input.append(helper.make_tensor_value_info(tensor.name, kind, constant.shape))
        self._fill(scope.number, tensor, constant)
        return str(tensor.name)

    def _declare(self, scope: int, name: str, shape: Shape, kind: int) -> None:
        """Write the shape and type of a value that changes into its graph input and value_info, where it has these."""
        if scope not in self.infos:
            self.infos[scope] = defaultdict(list)
            for info in (*self.graphs[scope].input, *self.graphs[scope].value_info):
                self.infos[scope][info.name].append(info)
        for info in self.infos[scope][name]:
            info.type.CopyFrom(helper.make_tensor_type_proto(kind, shape))

    def _new_name(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self.names:
            number += 1
            name = f"{wanted}_{number}"
        self.names.add(name)
        return name

    def _fill(self, scope: int, tensor: TensorProto, constant: Constant) -> None:
        """Write the values of a constant into its tensor, or leave them to a patch of the data file."""
        if is_external(tensor) and isinstance(constant, Scaled) and constant.size * constant.dtype.itemsize > LARGEST_INLINE:
            self.patches.add(scope, tensor, constant)
            return
        for values in ("float_data", "double_data", "int32_data", "raw_data", "external_data", "data_location"):
            tensor.ClearField(values)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(constant.dtype)
        tensor.dims[:] = constant.shape
        array = constant.array()
        # Two or more numbers of these types share a byte.
        tensor.raw_data = numpy_helper.from_array(array).raw_data if array.dtype.name in CARRIED else array.tobytes()

    def _rebuild_graphs(self) -> None:
        """Remove the nodes, constants and declarations that are not needed any more, and put the nodes in that replace others."""
        # Scope number -> position of a node that is not written -> the nodes in its place.
        changed: defaultdict[int, dict[int, list[NodeProto]]] = defaultdict(dict)
        for node in self.unwritten:
            changed[node.scope.number][node.position] = [self.added[new] for new in self.view.replaced.get(node, ())]
        # Innermost first: a graph that is rebuilt holds copies of its nodes, and of the bodies in them.
        for number, graph in reversed([*enumerate(self.graphs)]):
            if number in changed:
                nodes = [new for position, node in enumerate(graph.node) for new in changed[number].get(position, [node])]
                del graph.node[:]
                graph.node.extend(nodes)
                _clear_negative_sizes(graph)
            constants = self.unused_constants[number]
            values = self.unused_values[number] | constants
            _remove(graph.initializer, [tensor.name in constants for tensor in graph.initializer])
            _remove(graph.input, [info.name in constants for info in graph.input])
            _remove(graph.value_info, [info.name in values for info in graph.value_info])
            _remove(graph.quantization_annotation, [entry.tensor_name in values for entry in graph.quantization_annotation])

    def _freeze_inputs(self) -> None:
        """Take the initializers out of the graph inputs, so that a caller cannot override them."""
        constants = {tensor.name for tensor in (*self.index.proto.graph.initializer, *self.proto.graph.initializer)}
        if raises_ir_version(self.index):
            self.proto.ir_version = FIRST_IR_OF_CONSTANTS
        _remove(self.proto.graph.input, [info.name in constants for info in self.proto.graph.input])


def _clear_negative_sizes(graph: GraphProto) -> None:
    """Leave open what a graph declares as a negative size: nodes that are put into it may not go with that, where those before them did."""
    for info in graph.value_info:
        for dim in info.type.tensor_type.shape.dim if info.type.HasField("tensor_type") else ():
            if dim.dim_value < 0:
                dim.ClearField("dim_value")


def _remove(entries: MutableSequence[MessageT], unwanted: Sequence[bool]) -> None:
    """Remove the entries of a repeated field that are unwanted."""
    if any(unwanted):
        kept = [entry for entry, is_unwanted in zip(entries, unwanted, strict=True) if not is_unwanted]
        del entries[:]
        entries.extend(kept)


def _copy(proto: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(proto)
    return copy
