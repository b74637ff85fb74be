"""The only writer: applies plans to a copy of the model and hands out the result, in memory or as files."""

import os
import shutil
import tempfile
import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from fastbn.errors import ModelError, StorageError, expected
from fastbn.graph.constant import Scaled
from fastbn.graph.nesting import scopes_of
from fastbn.graph.storage import PROTOBUF_LIMIT, atomic, is_external, os_error, serialize, sync

__all__ = ["Output", "edited", "external_tensors", "rewrite"]

# A weight that needs a new place goes to the end of the data file when it is larger than this, into the model file otherwise.
LARGEST_INLINE = 1 << 20

# onnxruntime maps a tensor instead of reading it when it starts on a page.
PAGE = 4096


# What a new constant is called, where it is neither a weight nor a bias.
ROLES = {("DequantizeLinear", 1): "scale", ("DequantizeLinear", 2): "zero_point"}


@dataclass(eq=False)
class Patch:
    """A folded weight that lives in a data file: its scope and TensorProto, its values, and its offset (None: at the end)."""

    scope: int
    tensor: object
    constant: Scaled
    location: str
    offset: int | None

    @property
    def size(self):
        return self.constant.base.size * self.constant.dtype.itemsize


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


def rewrite(index, planning):
    """Apply the plans to a copy of the model.

    Returns
    -------
    Output
        Everything that no plan names is as it was.
    """
    return _Writer(index, planning).output()


class _Writer:
    def __init__(self, index, planning):
        self.index = index
        self.site = planning.site
        self.plans = planning.plans
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(index.proto)
        self.graphs = scopes_of(self.proto.graph)
        self.added = {add: _copy(add.proto) for plan in self.plans for add in plan.replaced.values()}
        self.before = {add: node for plan in self.plans for node, add in plan.replaced.items()}
        self.gone = {*self.site.removed, *self.site.replaced}
        self.freed = {use for plan in self.plans for use in plan.constants}
        self.duplicates = {}
        self.patches = []
        self.names = {name for scope in index.scopes for name in scope.values}
        self.tensors = [{tensor.name: tensor for tensor in graph.initializer} for graph in self.graphs]
        self.dead_tensors = defaultdict(set)
        self.vanished = defaultdict(set)
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
        changed = bool(self.plans) or self.index.freeze_inputs
        return Output(self.proto, self.patches, self.index.source, self.duplicates, changed)

    def _proto(self, node):
        return self.added[node] if node in self.added else self.graphs[node.scope.number].node[node.position]

    def _take_over_names(self):
        """Give the value before a removed node the name of the one behind it, wherever it is written or read.

        Where the affine went forward, the value behind is gone and its readers read the one before.
        """
        names = {}
        for node, value in self.site.removed.items():
            # Where the node that had taken this affine in went forward itself, what stands before it may be seen from elsewhere.
            seen = value.producer is None or value.is_output or value.scope is not node.scope
            if node not in self.site.forwarded and not seen:
                names[value] = node.outputs[0].name
        for node, value in self.site.removed.items():
            names[node.outputs[0]] = names.get(value, value.name)
        for value, name in names.items():
            if value.name == name:
                continue
            self.vanished[value.scope.number].add(value.name)
            producer = self.site.producer(value)
            if producer is not None and producer not in self.gone:
                self._proto(producer).output[value.slot] = name
            for reader, slot in value.readers:
                present = self.site.replaced.get(reader, reader)
                if present not in self.gone:
                    self._proto(present).input[slot] = name

    def _write_constant(self, node, slot, constant):
        """Put a folded constant where the old one was if nobody else reads that, else under a new name; return the name."""
        old = self.before[node].inputs[2] if node in self.before else node.input(slot)
        if old is not None and old.name in self.dead_tensors[old.scope.number]:
            tensor = self.tensors[old.scope.number][old.name]
            self.dead_tensors[old.scope.number].remove(old.name)
        else:
            tensor = self.graphs[node.scope.number].initializer.add()
            if old is not None and old.initializer is not None:
                tensor.CopyFrom(old.initializer)
                self.duplicates[node] = old.name
            role = ROLES.get((node.op, slot)) or ("weight" if isinstance(constant, Scaled) else "bias")
            tensor.name = self._new_name(f"{node.label}.{role}")
            if self.proto.ir_version < 4 and node.scope is self.index.main:
                kind = helper.np_dtype_to_tensor_dtype(constant.dtype)
                self.proto.graph.input.append(helper.make_tensor_value_info(tensor.name, kind, constant.shape))
        self._fill(node.scope.number, tensor, constant)
        return tensor.name

    def _is_read(self, value):
        return value.is_output or any(use[0] not in self.gone and use not in self.freed for use in value.readers)

    def _new_name(self, wanted):
        name, number = wanted, 1
        while name in self.names:
            number += 1
            name = f"{wanted}_{number}"
        self.names.add(name)
        return name

    def _fill(self, scope, tensor, constant):
        if is_external(tensor) and isinstance(constant, Scaled) and constant.base.size * constant.dtype.itemsize > LARGEST_INLINE:
            self._patch(scope, tensor, constant)
            return
        for values in ("float_data", "double_data", "int32_data", "raw_data", "external_data", "data_location"):
            tensor.ClearField(values)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(constant.dtype)
        tensor.dims[:] = constant.shape
        tensor.raw_data = constant.array().tobytes()

    def _patch(self, scope, tensor, constant):
        """Leave a large weight in its data file: over its old bytes if they are its own, else behind the last byte."""
        location, offset = location_of(tensor), self.index.source.location(tensor)[1]
        stop = offset + constant.base.size * constant.dtype.itemsize
        users = sum(1 for start, end in self._extents()[location] if start < stop and offset < end)
        taken = any(patch.location == location and patch.offset == offset for patch in self.patches)
        self.patches.append(Patch(scope, tensor, constant, location, None if users > 1 or taken else offset))

    def _extents(self):
        """Return location -> byte ranges of all external tensors of the model."""
        if self.extents is None:
            self.extents = defaultdict(list)
            for tensor in external_tensors(self.index.proto):
                offset = self.index.source.location(tensor)[1]
                self.extents[location_of(tensor)].append((offset, offset + self.index.source.external(tensor).size))
        return self.extents

    def _bury_dead(self):
        """Mark the constants that only removed nodes and changed slots read, and the nodes that computed them."""
        pending = [value for node in self.gone for value in node.inputs if value is not None]
        pending += [node.input(slot) for node, slot in self.freed if node not in self.added and node.input(slot) is not None]
        pending = [*dict.fromkeys(pending)]  # one constant may belong to thousands of nodes
        while pending:
            value = pending.pop()
            if self._is_read(value):
                continue
            node = value.producer
            if value.initializer is not None:
                self.dead_tensors[value.scope.number].add(value.name)
            elif node is not None and node not in self.gone and self.index.constant(value) is not None:
                outputs = [output for output in node.outputs if output is not None]
                if any(map(self._is_read, outputs)):
                    continue
                self.gone.add(node)
                self.vanished[node.scope.number].update(output.name for output in outputs)
                pending.extend(read for read in node.inputs if read is not None)

    def _rebuild_graphs(self):
        removed = defaultdict(dict)
        for node in self.gone:
            removed[node.scope.number][node.position] = self.added.get(self.site.replaced.get(node))
        for number, graph in enumerate(self.graphs):
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
        constants = {tensor.name for tensor in self.index.proto.graph.initializer}
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


def location_of(tensor):
    """Return the location entry of an external tensor."""
    return next(entry.value for entry in tensor.external_data if entry.key == "location")


def external_tensors(proto):
    """Yield every external TensorProto of a model: initializers, and tensors in attributes."""
    for graph in scopes_of(proto.graph):
        yield from filter(is_external, graph.initializer)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t") and is_external(attribute.t):
                    yield attribute.t


class Output:
    """A model ready to be written: its ModelProto, and the patches of its data files, which are evaluated when they are written.

    duplicates is node -> name of the weight that the node shared with others and now has for itself.
    """

    def __init__(self, proto, patches, source, duplicates, changed):
        self.duplicates = duplicates
        self.proto = proto
        self.patches = patches
        self.source = source
        self.changed = changed
        self._external = any(True for _ in external_tensors(proto))
        self._staged = {}

    @property
    def is_external(self):
        """Say whether the model keeps tensors in data files."""
        return self._external

    def to_bytes(self):
        """Return the model as bytes, all tensors inside; raises ModelError above protobuf's 2 GB."""
        if not self.changed and not self._external:
            return self.source.to_bytes()
        return serialize(self.to_proto(), self.source.name)

    def to_proto(self):
        """Return the model as a ModelProto, all tensors inside; raises ModelError above protobuf's 2 GB."""
        if not self._external:
            return self.proto
        total = sum(self.source.external(tensor).size for tensor in external_tensors(self.source.proto))
        if total > PROTOBUF_LIMIT:
            raise ModelError(expected("a model below 2 GB, or a path to save it to", f"{total} bytes", self.source.name))
        proto = _copy(self.proto)
        for patch, tensor in zip(self.patches, self._patched_in(proto), strict=True):
            _put_inside(tensor, patch.constant.array())
        for tensor in external_tensors(proto):
            _put_inside(tensor, self.source.array(tensor))
        return proto

    def stage(self, folder=None):
        """Write the model into a new folder inside `folder` and return its path; the next save takes the data files from there."""
        stage = Path(folder or tempfile.gettempdir()) / f".fastbn-{os.urandom(8).hex()}"
        weakref.finalize(self, shutil.rmtree, stage, ignore_errors=True)  # before it exists: an interrupt may come in between
        try:
            stage.mkdir(mode=0o700)
        except OSError as error:
            raise os_error(error, str(stage)) from error
        path = stage / "staged.onnx"
        self._staged = self.save(path)
        return path

    def save(self, path):
        """Write the model, and its data files beside it, all or nothing; return location -> path of the data files.

        Raises
        ------
        StorageError
            A file cannot be written; nothing has been.
        """
        path = Path(path)
        if self.source.path is not None and os.path.realpath(path) in self._data_files():
            raise StorageError(expected("an output that is no data file of the input", "one", str(path)))
        written = {}
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic(path))
            if self._external:
                proto = _copy(self.proto)
                written = self._write_data_files(path, proto, stack)
            temporary.write_bytes(serialize(proto, str(path)) if self._external else self.to_bytes())
            if any(target.exists() for target in written.values()):
                sync(temporary)  # a full disk must be noticed while the old model stands
                # From here until the new model stands, a stop leaves no model rather than an old one with new data.
                path.unlink(missing_ok=True)
        return written

    def _data_files(self):
        """Return the real paths of the data files that the original reads."""
        return {os.path.realpath(self.source.path.parent / location_of(tensor)) for tensor in external_tensors(self.source.proto)}

    def _patched_in(self, copy):
        """Return the tensor of each patch in a copy of the model; two bodies may use one name, so the scope counts."""
        graphs = scopes_of(copy.graph)
        named = {number: {tensor.name: tensor for tensor in graphs[number].initializer} for number in {p.scope for p in self.patches}}
        return [named[patch.scope][patch.tensor.name] for patch in self.patches]

    def _write_data_files(self, path, proto, stack):
        """Write a patched copy of each data file and point the model's tensors to it."""
        tensors = defaultdict(list)
        for tensor in external_tensors(proto):
            tensors[location_of(tensor)].append(tensor)
        patched = self._patched_in(proto)
        inputs = self._data_files()
        written = {}
        for location in sorted(tensors):
            target = written[location] = _data_path(path, inputs, written.values())
            temporary = stack.enter_context(atomic(target))
            patches = [patch for patch in self.patches if patch.location == location]
            source = self.source.path.parent / location
            offsets, size = _layout(patches, source.stat().st_size)
            if not _moved(self._staged.pop(location, None), temporary):
                _write_patched(source, temporary, patches, offsets, size)
                sync(temporary)
            for tensor in tensors[location]:
                _set_external(tensor, "location", target.name)
            for patch, offset in zip(patches, offsets, strict=True):
                tensor = patched[self.patches.index(patch)]
                _set_external(tensor, "offset", str(offset))
                _set_external(tensor, "length", str(patch.size))
        return written


def _put_inside(tensor, values):
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = values.tobytes()


def _data_path(path, inputs, taken):
    """Return where a data file of the model at `path` goes: named after it, and never over a data file that is being read."""
    number = 0
    while True:
        target = path.parent / (path.name + (f".{number}" if number else "") + ".data")
        if target not in taken and os.path.realpath(target) not in inputs:
            return target
        number += 1


def _set_external(tensor, key, value):
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
            return
    tensor.external_data.add(key=key, value=value)


def _moved(staged, target):
    """Move a staged data file into place; say whether that was possible (not across file systems)."""
    try:
        if staged is not None:
            os.replace(staged, target)
            return True
    except OSError:
        pass
    return False


def _layout(patches, size):
    """Return (offset of each patch, size of the patched file): what needs a new place goes behind the end, on a page of its own."""
    offsets = []
    for patch in patches:
        offset = patch.offset
        if offset is None:
            offset = -(-size // PAGE) * PAGE
            size = offset + patch.size
        offsets.append(offset)
    return offsets, size


def _write_patched(source, target, patches, offsets, size):
    """Write a copy of a data file in which folded weights replace the old ones."""
    covered = sorted((offset, offset + patch.size) for patch, offset in zip(patches, offsets, strict=True))
    with open(source, "rb") as reader, open(target, "rb+") as writer, ThreadPoolExecutor(1) as flusher, ThreadPoolExecutor(WRITERS) as pool:
        writer.truncate(size)
        end = os.fstat(reader.fileno()).st_size
        jobs, position = [], 0
        for start, stop in [*covered, (end, end)]:
            jobs.append(pool.submit(_copy_range, writer.fileno(), reader.fileno(), position, min(start, end)))
            position = max(position, stop)
        for patch, offset in zip(patches, offsets, strict=True):
            jobs.append(pool.submit(_write_constant_at, writer.fileno(), offset, patch.constant))
        try:
            flushes = []
            for job in as_completed(jobs):
                job.result()
                # The disk starts on what is there while the rest is written: the sync at the end finds little left.
                flushes.append(flusher.submit(os.fsync, writer.fileno()))
            for flush in flushes:
                flush.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# Two writers keep the kernel and the page cache busy; more would only need more memory.
WRITERS = 2


def _copy_range(into, out_of, start, stop):
    while start < stop:
        chunk = os.pread(out_of, min(1 << 20, stop - start), start)
        if not chunk:
            raise StorageError(expected(f"a data file of {stop} bytes", f"{start}", "external data"))
        _write_at(into, memoryview(chunk), start)
        start += len(chunk)


def _write_constant_at(into, offset, constant):
    for first, part in constant.parts():
        _write_at(into, memoryview(part.reshape(-1).view(np.uint8)), offset + first * part.dtype.itemsize)


def _write_at(into, view, offset):
    while view:
        written = os.pwrite(into, view, offset)
        view, offset = view[written:], offset + written
