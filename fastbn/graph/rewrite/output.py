"""The written model: in memory, or as files, its data files patched copies of the original's."""

import contextlib
import itertools
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from fastbn.errors import ModelError, StorageError, expected
from fastbn.graph.model.constant import Scaled
from fastbn.graph.model.nesting import scopes_of
from fastbn.graph.model.storage import PROTOBUF_LIMIT, external_tensors, location_of, serialize
from fastbn.graph.rewrite.destination import Replacement, is_stream, storage_errors, work_room, write_through

__all__ = ["Output", "Patch", "Prepared", "prepared_bytes"]

# onnxruntime maps a tensor instead of reading it when it starts on a page.
PAGE = 4096

# Two writers keep the kernel and the page cache busy; more would only need more memory.
WRITERS = 2

# Bytes of a file name that file systems take, less those that tell data files apart.
LONGEST_STEM = 255 - len(".9999.data")


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
        return self.constant.size * self.constant.dtype.itemsize


@dataclass
class Prepared:
    """A model that is written and not yet in its place: the path of that, location -> paths of its data files, and the bytes of all."""

    path: Path
    data: dict = field(default_factory=dict)
    size: int = 0
    replacement: Replacement | None = None

    @property
    def paths(self):
        """The paths that are written, the model's first."""
        return [self.path, *self.data.values()]

    @property
    def committed(self):
        """Whether the model is in its place."""
        return self.replacement is not None and self.replacement.committed


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
        self._room = None

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
        total = sum(self.source.place(tensor).length for tensor in external_tensors(self.source.proto))
        if total > PROTOBUF_LIMIT:
            raise ModelError(expected("a model below 2 GB, or a path to save it to", f"{total} bytes", self.source.name))
        proto = self._copy()
        for patch, tensor in zip(self.patches, self._patched_in(proto), strict=True):
            _put_inside(tensor, patch.constant.array().tobytes())
        for tensor in external_tensors(proto):
            _put_inside(tensor, self.source.read(tensor))
        return proto

    def _copy(self):
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        return proto

    def stage(self, folder=None):
        """Write the model into a hidden folder inside `folder` and return its path; the next save takes the data files from there."""
        room = work_room(folder)
        path = room.path / "staged.onnx"
        self._staged = self.save(path)
        self._room = room
        return path

    def save(self, path):
        """Write the model, and its data files beside it, all or nothing; return location -> path of the data files.

        Raises
        ------
        StorageError
            A file cannot be written; nothing has been.
        """
        with self.prepared(path) as prepared:
            pass
        return prepared.data

    def prepared(self, path):
        """Return a context that writes the model, and its data files beside it, under other names, and yields a Prepared; when the block
        ends well, everything takes its place. A device, a pipe or an open stream then gets the model with all tensors inside.

        Raises
        ------
        StorageError
            A file cannot be written; nothing has been.
        """
        if not self._external or is_stream(path):
            return prepared_bytes(path, self.to_bytes(), self.source)
        return _prepared(path, self._write_into, self.source)

    def _write_into(self, replacement):
        """Write all files of the model; return location -> path of the data files."""
        proto = self._copy()
        written = self._write_data_files(replacement, proto)
        replacement.temporary.write_bytes(serialize(proto, str(replacement.path)))
        return written

    def _patched_in(self, copy):
        """Return the tensor of each patch in a copy of the model; two bodies may use one name, so the scope counts."""
        graphs = scopes_of(copy.graph)
        named = {number: {tensor.name: tensor for tensor in graphs[number].initializer} for number in {p.scope for p in self.patches}}
        return [named[patch.scope][patch.tensor.name] for patch in self.patches]

    def _write_data_files(self, replacement, proto):
        """Write a patched copy of each data file and point the model's tensors to it; return location -> path."""
        tensors = defaultdict(list)
        for tensor in external_tensors(proto):
            tensors[location_of(tensor)].append(tensor)
        patched = self._patched_in(proto)
        staged, self._staged = self._staged, {}
        written = {}
        for location, name in zip(sorted(tensors), _new_data_names(replacement.path), strict=False):
            written[location] = replacement.path.parent / os.fsdecode(name.encode("utf-8"))
            temporary = replacement.data_file(written[location].name)
            patches = [patch for patch in self.patches if patch.location == location]
            source = self.source.place(tensors[location][0]).path
            offsets, size = _layout(patches, source.stat().st_size)
            if not _moved(staged.get(location), temporary):
                _write_patched(source, temporary, patches, offsets, size)
            for tensor in tensors[location]:
                _set_external(tensor, "location", name)
            for patch, offset in zip(patches, offsets, strict=True):
                tensor = patched[self.patches.index(patch)]
                _set_external(tensor, "offset", str(offset))
                _set_external(tensor, "length", str(patch.size))
        if staged:
            self._room.close()
        return written


@contextlib.contextmanager
def prepared_bytes(path, data, source) -> Iterator[Prepared]:
    """As Output.prepared, for a model made of `source` that is bytes."""
    if is_stream(path):
        yield Prepared(Path(path), size=len(data))
        write_through(path, data)
        return

    def write_into(replacement):
        replacement.temporary.write_bytes(data)
        return {}

    with _prepared(path, write_into, source) as prepared:
        yield prepared


@contextlib.contextmanager
def _prepared(path, write_into, source):
    if os.path.realpath(path) in source.data_files():
        raise StorageError(expected("an output that is no data file of the input", "one", str(path)))
    with contextlib.closing(Replacement(path)) as replacement:
        with storage_errors(path):
            data = write_into(replacement)
        replacement.finish()
        yield Prepared(Path(path), data, replacement.size(), replacement)
        replacement.commit(_obsolete(Path(path), source))


def _obsolete(path, source):
    """Return the data files that only the model at `path` reads, as far as their names say that they are its own."""
    with contextlib.suppress(OSError, DecodeError, UnicodeDecodeError):
        found = os.lstat(path)
        # What another name leads to goes on reading its data files.
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            return []
        own = re.compile(re.escape(_stem(path)) + r"(\.[0-9]+)?\.data")
        old = onnx.ModelProto.FromString(path.read_bytes())
        names = {entry.value for tensor in external_tensors(old) for entry in tensor.external_data if entry.key == "location"}
        paths = [path.parent / os.fsdecode(name.encode("utf-8")) for name in sorted(names) if own.fullmatch(name)]
        in_place = source.path is not None and os.path.realpath(path) == os.path.realpath(source.path)
        read = set() if in_place else source.data_files()
        return [each for each in paths if os.path.isfile(each) and not each.is_symlink() and os.path.realpath(each) not in read]
    return []


def _stem(path):
    """Return what the names of a model's data files begin with: its own name, as far as that is UTF-8 and leaves room for an ending."""
    name = os.fsencode(path.name).decode("utf-8", "replace").replace("\ufffd", "_")
    return name.encode("utf-8")[:LONGEST_STEM].decode("utf-8", "ignore")


def _new_data_names(path) -> Iterator[str]:
    """Yield names for data files of the model at `path` that nothing beside it has."""
    for number in itertools.count():
        name = f"{_stem(path)}{f'.{number}' if number else ''}.data"
        if not os.path.lexists(path.parent / os.fsdecode(name.encode("utf-8"))):
            yield name


def _put_inside(tensor, data):
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = data


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
    with open(source, "rb") as reader, open(target, "xb") as writer, ThreadPoolExecutor(1) as flusher, ThreadPoolExecutor(WRITERS) as pool:
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


def _copy_range(into, out_of, start, stop):
    while start < stop:
        chunk = os.pread(out_of, min(1 << 20, stop - start), start)
        if not chunk:
            raise StorageError(expected(f"a data file of {stop} bytes", f"{start}", "external data"))
        _write_at(into, memoryview(chunk), start)
        start += len(chunk)


def _write_constant_at(into, offset, constant):
    for first, part in constant.pieces():
        _write_at(into, memoryview(part.reshape(-1).view(np.uint8)), offset + first * part.dtype.itemsize)


def _write_at(into, view, offset):
    while view:
        written = os.pwrite(into, view, offset)
        view, offset = view[written:], offset + written
