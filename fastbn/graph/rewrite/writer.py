"""The only writer: applies plans to a copy of the model and hands out the result."""

from collections import Counter, defaultdict

import onnx
from onnx import helper

from fastbn.graph.model.constant import Scaled
from fastbn.graph.model.nesting import scopes_of
from fastbn.graph.model.storage import external_tensors, is_external, location_of
from fastbn.graph.ops.registry import operator_row
from fastbn.graph.rewrite.consistency import check_written
from fastbn.graph.rewrite.output import Output, Patch

__all__ = ["edited", "raises_ir_version", "rewrite"]

# A weight that needs a new place goes to the end of the data file when it is larger than this, into the model file otherwise.
LARGEST_INLINE = 1 << 20

# From this IR version on an initializer need not be a graph input too.
FIRST_IR_OF_CONSTANTS = 4


def edited(proto, constants, attributes):
    """Change a NodeProto: constants is slot -> name, attributes name -> value. Returns it."""
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


def raises_ir_version(index):
    """Say whether the model must have a later IR version, because its initializers leave the graph inputs."""
    return index.freeze_inputs and index.proto.ir_version < FIRST_IR_OF_CONSTANTS and bool(index.proto.graph.initializer)


def rewrite(index, planning):
    """Apply the plans to a copy of the model.

    Returns
    -------
    Output
        Everything that no plan names is as it was.

    Raises
    ------
    ModelError
        The model that was made is not the one that was planned: a fault of this package, found before anything is written.
    """
    return _Writer(index, planning).output()


class _Writer:
    def __init__(self, index, planning):
        self.index = index
        self.view = planning.view
        self.plans = planning.plans
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(index.proto)
        self.graphs = scopes_of(self.proto.graph)
        self.added = {add: _copy(add.proto) for plan in self.plans for add in plan.replaced.values()}
        self.before = {add: node for plan in self.plans for node, add in plan.replaced.items()}
        self.gone = {*self.view.removed, *self.view.replaced}
        self.freed = {use for plan in self.plans for use in plan.constants}
        self.duplicates = {}
        self.patches = []
        self.names = {name for scope in index.scopes for name in scope.values}
        self.tensors = [{tensor.name: tensor for tensor in graph.initializer} for graph in self.graphs]
        self.dead_tensors = defaultdict(set)
        self.vanished = defaultdict(set)
        self.infos = {}
        self.extents = None

    def output(self):
        self._take_over_names()
        self._bury_dead()
        for plan in self.plans:
            for (node, slot), constant in plan.constants.items():
                edited(self._proto(node), {slot: self._write_constant(node, slot, constant)}, {})
            for node, attributes in plan.attributes.items():
                edited(self._proto(node), {}, attributes)
        self._rebuild_graphs()
        if self.index.freeze_inputs:
            self._freeze_inputs()
        check_written(self.index, self.view, self.plans, self.gone, self.proto)
        changed = bool(self.plans) or self.index.freeze_inputs
        return Output(self.proto, self.patches, self.index.source, self.duplicates, changed)

    def _proto(self, node):
        return self.added[node] if node in self.added else self.graphs[node.scope.number].node[node.position]

    def _take_over_names(self):
        """Give the value before a removed node the name of the one behind it, wherever it is written or read.

        Where the affine went forward, the value behind is gone and its readers read the one before.
        """
        names = {}
        for node, value in self.view.removed.items():
            # Where the node that had taken this affine in went forward itself, what stands before it may be seen from elsewhere.
            seen = value.producer is None or value.is_output or value.scope is not node.scope
            if node not in self.view.forwarded and not seen:
                names[value] = node.outputs[0].name
        for node, value in self.view.removed.items():
            names[node.outputs[0]] = names.get(value, value.name)
        for value, name in names.items():
            if value.name == name:
                continue
            self.vanished[value.scope.number].add(value.name)
            producer = self.view.producer(value)
            if producer is not None and producer not in self.gone:
                self._proto(producer).output[value.slot] = name
            for reader, slot in value.readers:
                present = self.view.replaced.get(reader, reader)
                if present not in self.gone:
                    self._proto(present).input[slot] = name

    def _write_constant(self, node, slot, constant):
        """Put a folded constant where the old one was if nobody else reads that, else under a new name; return the name."""
        old = self.before[node].inputs[2] if node in self.before else node.input(slot)
        if old is not None and old.name in self.dead_tensors[old.scope.number]:
            scope = old.scope
            tensor = self.tensors[scope.number][old.name]
            self.dead_tensors[scope.number].remove(old.name)
            self._announce(scope.number, old.name, constant)
        else:
            # Before IR 4 a constant must be a graph input too, which a body cannot have: it reads the outer graph's.
            scope = self.index.main if self.proto.ir_version < FIRST_IR_OF_CONSTANTS else node.scope
            tensor = self.graphs[scope.number].initializer.add()
            if old is not None and old.initializer is not None:
                tensor.CopyFrom(old.initializer)
                self.duplicates[node] = old.name
            role = operator_row(node).input_names.get(slot) or ("weight" if isinstance(constant, Scaled) else "bias")
            tensor.name = self._new_name(f"{node.label}.{role}")
            if self.proto.ir_version < FIRST_IR_OF_CONSTANTS:
                kind = helper.np_dtype_to_tensor_dtype(constant.dtype)
                self.proto.graph.input.append(helper.make_tensor_value_info(tensor.name, kind, constant.shape))
        self._fill(scope.number, tensor, constant)
        return tensor.name

    def _announce(self, scope, name, constant):
        """Let the graph input or value_info of a constant say its new shape and type."""
        if scope not in self.infos:
            self.infos[scope] = defaultdict(list)
            for info in (*self.graphs[scope].input, *self.graphs[scope].value_info):
                self.infos[scope][info.name].append(info)
        for info in self.infos[scope][name]:
            kind = helper.np_dtype_to_tensor_dtype(constant.dtype)
            info.type.CopyFrom(helper.make_tensor_type_proto(kind, constant.shape))

    def _new_name(self, wanted):
        name, number = wanted, 1
        while name in self.names:
            number += 1
            name = f"{wanted}_{number}"
        self.names.add(name)
        return name

    def _fill(self, scope, tensor, constant):
        if is_external(tensor) and isinstance(constant, Scaled) and constant.size * constant.dtype.itemsize > LARGEST_INLINE:
            self._patch(scope, tensor, constant)
            return
        for values in ("float_data", "double_data", "int32_data", "raw_data", "external_data", "data_location"):
            tensor.ClearField(values)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(constant.dtype)
        tensor.dims[:] = constant.shape
        tensor.raw_data = constant.array().tobytes()

    def _patch(self, scope, tensor, constant):
        """Leave a large weight in its data file: over its old bytes if they are its own, else behind the last byte."""
        location, offset = location_of(tensor), self.index.source.place(tensor).offset
        stop = offset + constant.size * constant.dtype.itemsize
        users = sum(1 for start, end in self._extents()[location] if start < stop and offset < end)
        taken = any(patch.location == location and patch.offset == offset for patch in self.patches)
        self.patches.append(Patch(scope, tensor, constant, location, None if users > 1 or taken else offset))

    def _extents(self):
        """Return location -> byte ranges of all external tensors of the model."""
        if self.extents is None:
            self.extents = defaultdict(list)
            for tensor in external_tensors(self.index.proto):
                offset = self.index.source.place(tensor).offset
                self.extents[location_of(tensor)].append((offset, offset + self.index.source.external(tensor).size))
        return self.extents

    def _bury_dead(self):
        """Mark the constants that only removed nodes and changed slots read, and the nodes that computed them."""
        reads = self._reads()
        pending = [value for node in self.gone for value in node.inputs if value is not None]
        pending += [node.input(slot) for node, slot in self.freed if node not in self.added and node.input(slot) is not None]
        while pending:
            value = pending.pop()
            if value.producer in self.gone or reads[value]:
                continue
            node = value.producer
            if value.initializer is not None:
                self.dead_tensors[value.scope.number].add(value.name)
            elif node is not None and self.index.constant(value) is not None:
                outputs = [output for output in node.outputs if output is not None]
                if any(reads[output] for output in outputs):
                    continue
                self.gone.add(node)
                self.vanished[node.scope.number].update(output.name for output in outputs)
                read = [value for value in node.inputs if value is not None]
                reads.subtract(map(self.view.source, read))
                pending.extend(read)

    def _reads(self):
        """Return value -> how often the present graph reads it, itself or in the place of nodes that are removed."""
        reads = Counter()
        for node in self.index.order:
            present = [slot for slot in range(len(node.inputs)) if (node, slot) not in self.freed]
            if node in self.gone:  # an Add in its place reads the data
                present = [self.view.data_slot(node)] if node in self.view.replaced else []
            reads.update(self.view.source(node.inputs[slot]) for slot in present if node.inputs[slot] is not None)
        for scope in self.index.scopes:
            reads.update(self.view.source(value) for value in scope.values.values() if value.is_output)
        return reads

    def _rebuild_graphs(self):
        removed = defaultdict(dict)
        for node in self.gone:
            removed[node.scope.number][node.position] = self.added.get(self.view.replaced.get(node))
        # Innermost first: a graph that is rebuilt holds copies of its nodes, and of the bodies in them.
        for number, graph in reversed([*enumerate(self.graphs)]):
            if number in removed:
                nodes = [removed[number].get(position, node) for position, node in enumerate(graph.node)]
                del graph.node[:]
                graph.node.extend(node for node in nodes if node is not None)
            dead = self.dead_tensors[number]
            _keep(graph.initializer, lambda tensor, names=dead: tensor.name not in names)
            _keep(graph.input, lambda info, names=dead: info.name not in names)
            gone = self.vanished[number] | dead
            _keep(graph.value_info, lambda info, names=gone: info.name not in names)
            _keep(graph.quantization_annotation, lambda entry, names=gone: entry.tensor_name not in names)

    def _freeze_inputs(self):
        constants = {tensor.name for tensor in (*self.index.proto.graph.initializer, *self.proto.graph.initializer)}
        if raises_ir_version(self.index):
            self.proto.ir_version = FIRST_IR_OF_CONSTANTS
        _keep(self.proto.graph.input, lambda info: info.name not in constants)


def _keep(entries, wanted):
    kept = [entry for entry in entries if wanted(entry)]
    if len(kept) < len(entries):
        del entries[:]
        entries.extend(kept)


def _copy(proto):
    copy = type(proto)()
    copy.CopyFrom(proto)
    return copy
