"""The only writer: edits the graphs of a copy of the model as plans say, and returns the copy as an Output."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, MutableSequence, Sequence
from typing import TypeVar

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fastbn.graph.model.constant import Constant, Scaled
from fastbn.graph.model.index import Index
from fastbn.graph.model.nesting import scopes_of
from fastbn.graph.model.node import Node, Shape, Value
from fastbn.graph.model.storage import is_external
from fastbn.graph.ops.registry import ignores_elements, operator_row
from fastbn.graph.ops.row import Attribute
from fastbn.graph.planner.planning import Planning
from fastbn.graph.reasons import first_few
from fastbn.graph.report import size_text
from fastbn.graph.rewrite.consistency import check_written
from fastbn.graph.rewrite.data_files import Patches
from fastbn.graph.rewrite.output import Output
from fastbn.graph.runtime import CARRIED

__all__ = ["edited", "raises_ir_version", "rewrite"]

# A folded weight of more bytes stays in the data file of its original; a smaller one goes into the model file.
LARGEST_INLINE = 1 << 20

# A constant that takes this many bytes more than what it was computed from is reported.
LARGEST_UNSAID = 1 << 10

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


def rewrite(index: Index, planning: Planning) -> Output:
    """Apply the plans to a copy of the model; everything that no plan names is as it was.

    Raises
    ------
    ModelError
        The model that was made is not the one that was planned: a fault of this package, found before anything is written.
    """
    return _Writer(index, planning).output()


class _Writer:
    """The edits of one model.

    unwritten holds the nodes that are not written; unused_constants and unused_values hold, by scope number, the names of initializers and
    of values that no node reads or gives any more. left_out is unused_constants before any of them is used again, counted those of its
    values that the note of a larger constant has counted, spare the bytes of the parameters of the plan at hand that no new one takes up.
    """

    def __init__(self, index: Index, planning: Planning) -> None:
        self.index = index
        self.view = planning.view
        self.plans = planning.plans
        self.proto = ModelProto()
        self.proto.CopyFrom(index.proto)
        self.graphs = scopes_of(self.proto.graph)
        self.added = {node: _copy(node.proto) for plan in self.plans for node in plan.added}
        self.before = {new: node for plan in self.plans for node, news in plan.replaced.items() for new in news}
        self.unwritten = {*self.view.removed, *self.view.replaced}
        self.freed = {use for plan in self.plans for use in plan.constants}
        self.growth: defaultdict[Node, list[str]] = defaultdict(list)
        self.counted: set[Value] = set()
        self.patches = Patches(index.source)
        self.names = {name for scope in index.scopes for name in scope.values} | {new.required_output().name for new in self.added}
        self.tensors = [{tensor.name: tensor for tensor in graph.initializer} for graph in self.graphs]
        self.unused_constants: defaultdict[int, set[str]] = defaultdict(set)
        self.unused_values: defaultdict[int, set[str]] = defaultdict(set)
        self.left_out: dict[int, frozenset[str]] = {}
        self.spare = 0
        self.infos: dict[int, defaultdict[str, list[ValueInfoProto]]] = {}

    def output(self) -> Output:
        """Make all edits, in this order: they read what the ones before have noted."""
        self._take_over_names()
        self._find_unused()
        self.left_out = {number: frozenset(names) for number, names in self.unused_constants.items()}
        for plan in self.plans:
            read = {value for node in plan.lifted for value in node.inputs if value is not None and self._is_left_out(value)}
            self.spare = sum(_stored_bytes(self.index, value) for value in read)
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
        changed = bool(self.plans) or self.index.freeze_inputs
        return Output(self.proto, self.patches.entries, self.index.source, self.growth, changed)

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
        """Write a folded constant in the place of the old one if no other node reads that, else under a new name; return the name."""
        old = self._old_constant(node, slot)
        if old is not None and old.name in self.unused_constants[old.scope.number]:
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
            is_weight = isinstance(constant, Scaled) or (node in self.before and node.op != "Add" and slot == 1)
            role = operator_row(node).input_names.get(slot) or ("weight" if is_weight else "bias")
            self._note_growth(node, old, constant, role)
            tensor.name = self._new_name(f"{node.label}.{role}")
            if self.proto.ir_version < FIRST_IR_OF_CONSTANTS:
                kind = helper.np_dtype_to_tensor_dtype(constant.dtype)
                self.proto.graph.input.append(helper.make_tensor_value_info(tensor.name, kind, constant.shape))
        self._fill(scope.number, tensor, constant)
        return str(tensor.name)

    def _old_constant(self, node: Node, slot: int) -> Value | None:
        """Return the value of the original whose place a constant takes: for a node that is added, the one that its own constant is named
        after."""
        own = node.input(slot)
        if node not in self.before or own is None:
            return own
        return next(value for value in self.before[node].inputs if value is not None and value.name == own.name)

    def _note_growth(self, node: Node, old: Value | None, constant: Constant, role: str) -> None:
        """Note that a constant is new, written beside the one that it comes from, or in the place of less that it was computed from."""
        size = math.prod(constant.shape) * constant.dtype.itemsize
        if old is None:
            if size > LARGEST_UNSAID + self.spare:
                self.growth[node].append(f"a new {role} of {size_text(size)}")
            self.spare = max(0, self.spare - size)
            return
        sources = self._sources(old)
        if sources == [old]:
            self.growth[node].append(
                f"weight '{old.name}' is shared: duplicated" + (f", {size_text(size)}" if size > LARGEST_UNSAID else "")
            )
            return
        spared = [value for value in sources if value not in self.counted and self._is_left_out(value)]
        self.counted.update(spared)
        if size > LARGEST_UNSAID + sum(_stored_bytes(self.index, value) for value in spared):
            names = first_few([f"'{value.name}'" for value in sources])
            self.growth[node].append(f"weight '{old.name}' was computed from {names}: stored as it is, {size_text(size)}")

    def _sources(self, value: Value) -> list[Value]:
        """Return the stored constants that a constant is computed from: initializers, and outputs of Constant nodes."""
        pending: dict[Value, None] = {value: None}
        for at in (found := [value]):
            node = None if at.initializer is not None else at.producer
            inputs = () if node is None else [read for slot, read in enumerate(node.inputs) if not ignores_elements(node, slot)]
            reads = [read for read in inputs if read is not None and read not in pending]
            pending.update(dict.fromkeys(reads))
            found.extend(reads)
        return [at for at in pending if at.initializer is not None or (at.producer is not None and at.producer.is_op("Constant"))]

    def _is_left_out(self, value: Value) -> bool:
        """Say whether a stored constant is not written any more."""
        if value.initializer is not None:
            return value.name in self.left_out.get(value.scope.number, ())
        return value.producer in self.unwritten

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

    def _find_unused(self) -> None:
        """Note the constants that only removed nodes and changed slots read, and the nodes that compute them."""
        reads = self._reads()
        pending = [value for node in self.unwritten for value in node.inputs if value is not None]
        freed = [node.input(slot) for node, slot in self.freed if node not in self.added]
        pending += [value for value in freed if value is not None]
        while pending:
            value = pending.pop()
            if value.producer in self.unwritten or reads[value]:
                continue
            node = value.producer
            if value.initializer is not None:
                self.unused_constants[value.scope.number].add(value.name)
            elif node is not None and not node.scopes and self.index.is_constant(value):
                outputs = [output for output in node.outputs if output is not None]
                if any(reads[output] for output in outputs):
                    continue
                self.unwritten.add(node)
                self.unused_values[node.scope.number].update(output.name for output in outputs)
                inputs = [(slot, value) for slot, value in enumerate(node.inputs) if value is not None]
                reads.subtract(self.view.source(value) for slot, value in inputs if (node, slot) not in self.freed)
                pending.extend(value for _, value in inputs)

    def _reads(self) -> Counter[Value]:
        """Return value -> how often the written graph reads it; a removed node's output counts as its input."""
        reads: Counter[Value] = Counter()
        for node in self.index.order:
            slots = [slot for slot in range(len(node.inputs)) if (node, slot) not in self.freed]
            if node in self.unwritten:  # what replaces a node reads its data input
                slots = [self.view.data_slot(node)] if node in self.view.replaced else []
            reads.update(self.view.source(value) for slot in slots if (value := node.inputs[slot]) is not None)
        for scope in self.index.scopes:
            reads.update(self.view.source(value) for value in scope.values.values() if value.is_output)
        return reads

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


def _stored_bytes(index: Index, value: Value) -> int:
    constant = index.constant(value)
    return 0 if constant is None else constant.size * constant.dtype.itemsize


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
