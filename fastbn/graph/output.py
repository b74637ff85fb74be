"""The written model: in memory, or as files, its data files patched copies of the original's."""

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

from fastbn.errors import ModelError, StorageError, expected
from fastbn.graph.constant import Scaled
from fastbn.graph.model import scopes_of
from fastbn.graph.storage import PROTOBUF_LIMIT, atomic, external_tensors, location_of, os_error, serialize, sync

__all__ = ["Output", "Patch"]

# onnxruntime maps a tensor instead of reading it when it starts on a page.
PAGE = 4096


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
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
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
                proto = onnx.ModelProto()
                proto.CopyFrom(self.proto)
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
