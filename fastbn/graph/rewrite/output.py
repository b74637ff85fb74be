"""The written model: in memory, or as files."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self, TypeAlias

from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto

from fastbn.errors import ModelError, StorageError, expected
from fastbn.graph.digests import Digest
from fastbn.graph.model.external import external_tensors, location_of
from fastbn.graph.model.nesting import scopes_of
from fastbn.graph.model.storage import PROTOBUF_LIMIT, Source, serialize
from fastbn.graph.rewrite.data_files import Patch, new_data_names, patched_layout, set_external, stem_of, write_patched
from fastbn.graph.rewrite.destination import PathLike, is_stream, storage_errors, write_through
from fastbn.graph.rewrite.replacement import Replacement
from fastbn.graph.rewrite.workdir import Workdir, runtime_workdir

__all__ = ["ModelResult", "Output", "Prepared"]

# Location of a data file, as the original has it -> the path that it is written to.
DataPaths: TypeAlias = dict[str, Path]


@dataclass
class Prepared:
    """A model that is written and not yet in its place.

    Parameters
    ----------
    path : Path
        Its place.
    data : dict of str -> Path
        Location of each data file, as the original has it -> its place.
    size : int
        The bytes of all files.
    replacement : Replacement or None
        None for a device, a pipe or an open stream.
    """

    path: Path
    data: DataPaths = field(default_factory=dict)
    size: int = 0
    replacement: Replacement | None = None

    @property
    def paths(self) -> list[Path]:
        """The paths that are written, the model's first."""
        return [self.path, *self.data.values()]

    def digests(self) -> list[Digest]:
        """Return the SHA-256 of every file, the model's first; none of what goes through a device, a pipe or an open stream."""
        return [] if self.replacement is None else self.replacement.digests()

    @property
    def committed(self) -> bool:
        """Whether the model is in its place."""
        return self.replacement is not None and self.replacement.committed


class Written(NamedTuple):
    """A written model, and the weights that go into its data files, which are computed when these are written."""

    proto: ModelProto
    patches: list[Patch]


class Output:
    """A model ready to be written.

    Parameters
    ----------
    source : storage.Source
        The original.
    changed : bool
        Whether it is another model than the original.
    write : callable
        Returns the Written; called once, when that is first needed.
    data : bytes, optional
        The model as bytes, where it was made as such.
    """

    def __init__(self, source: Source, changed: bool, write: Callable[[], Written], data: bytes | None = None) -> None:
        self.source = source
        self._data = data
        self.changed = changed
        self._write = write
        # Data files that save_in_workdir has written: the next save moves them.
        self._written_before: DataPaths = {}
        self._workdir: Workdir | None = None

    @classmethod
    def of_bytes(cls, data: bytes, source: Source) -> Self:
        """Return the Output of a model made from `source` that is given as bytes, all tensors inside."""
        return cls(source, True, lambda: Written(ModelProto.FromString(data), []), data)

    @cached_property
    def _written(self) -> Written:
        return self._write()

    @property
    def proto(self) -> ModelProto:
        """The written model, as it is with data files beside it; raises ModelError where it is not the one that was planned."""
        return self._written.proto

    @property
    def patches(self) -> list[Patch]:
        """The weights that go into its data files."""
        return self._written.patches

    @cached_property
    def is_external(self) -> bool:
        """Whether the model keeps tensors in data files."""
        return bool(self.source.external_tensors) and any(True for _ in external_tensors(self.proto))

    def to_bytes(self) -> bytes:
        """Return the model as bytes, all tensors inside; raises ModelError above protobuf's 2 GB."""
        if self._data is not None:
            return self._data
        if not self.changed and not self.is_external:
            return self.source.to_bytes()
        return serialize(self.to_proto(), self.source.name)

    def to_proto(self) -> ModelProto:
        """Return the model as a ModelProto, all tensors inside; raises ModelError above protobuf's 2 GB."""
        if not self.is_external:
            return self.proto
        total = sum(self.source.place(tensor).length for tensor in self.source.external_tensors)
        if total > PROTOBUF_LIMIT:
            raise ModelError(expected("a model below 2 GB, or a path to save it to", f"{total} bytes", self.source.name))
        proto = self._copy()
        for patch, tensor in zip(self.patches, self._patched_in(proto), strict=True):
            _put_inside(tensor, patch.constant.array().tobytes())
        for tensor in external_tensors(proto):
            _put_inside(tensor, self.source.read(tensor))
        self.source.check_unchanged()
        return proto

    def _copy(self) -> ModelProto:
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        return proto

    def save_in_workdir(self, folder: PathLike | None = None) -> Path:
        """Write the model into a workdir inside `folder` and return its path; the next save moves the data files from there.

        Raises
        ------
        StorageError
            A file cannot be written.
        """
        workdir = runtime_workdir(folder)
        path = workdir.path / "model.onnx"
        self._written_before = self.save(path)
        self._workdir = workdir
        return path

    def save(self, path: PathLike) -> DataPaths:
        """Write the model, and its data files beside it, all or nothing; return location -> path of the data files.

        Raises
        ------
        StorageError
            A file cannot be written; nothing has been.
        """
        with self.prepared(path) as prepared:
            pass
        return prepared.data

    def prepared(self, path: PathLike) -> contextlib.AbstractContextManager[Prepared]:
        """Return a context that writes the model and its data files into a workdir, and yields a Prepared; when the block ends well, all
        files take their places. A device, a pipe or an open stream then gets the model with all tensors inside.

        Raises
        ------
        StorageError
            A file cannot be written; nothing has been.
        """
        if not self.is_external or is_stream(path):
            return _prepared_bytes(path, self.to_bytes(), self.source)
        return _prepared(path, self._write_into, self.source)

    def _write_into(self, replacement: Replacement) -> DataPaths:
        """Write all files of the model; return location -> path of the data files."""
        proto = self._copy()
        paths = self._write_data_files(replacement, proto)
        replacement.temporary.write_bytes(serialize(proto, str(replacement.path)))
        return paths

    def _patched_in(self, copy: ModelProto) -> list[TensorProto]:
        """Return the tensor of each patch in a copy of the model; two bodies may use one name, so the scope counts."""
        graphs = scopes_of(copy.graph)
        named = {number: {tensor.name: tensor for tensor in graphs[number].initializer} for number in {p.scope for p in self.patches}}
        return [named[patch.scope][patch.tensor.name] for patch in self.patches]

    def _write_data_files(self, replacement: Replacement, proto: ModelProto) -> DataPaths:
        """Write a patched copy of each data file and point the model's tensors to it; return location -> path."""
        tensors: defaultdict[str, list[TensorProto]] = defaultdict(list)
        for tensor in external_tensors(proto):
            tensors[location_of(tensor)].append(tensor)
        patches_of: defaultdict[str, list[tuple[Patch, TensorProto]]] = defaultdict(list)
        for patch, tensor in zip(self.patches, self._patched_in(proto), strict=True):
            patches_of[patch.location].append((patch, tensor))
        written_before, self._written_before = self._written_before, {}
        paths: DataPaths = {}
        for location, name in zip(sorted(tensors), new_data_names(replacement.path), strict=False):
            paths[location] = replacement.path.parent / os.fsdecode(name.encode("utf-8"))
            temporary = replacement.data_file(paths[location].name)
            patches = [patch for patch, _ in patches_of[location]]
            source = self.source.place(tensors[location][0]).path
            offsets, size = patched_layout(patches, source.stat().st_size)
            if not _move(written_before.get(location), temporary):
                write_patched(source, temporary, patches, offsets, size)
            for tensor in tensors[location]:
                set_external(tensor, "location", name)
            for (patch, tensor), offset in zip(patches_of[location], offsets, strict=True):
                set_external(tensor, "offset", str(offset))
                set_external(tensor, "length", str(patch.size))
        if written_before and self._workdir is not None:
            self._workdir.close()
        return paths


class ModelResult:
    """What a job returns that has made a model: the model in memory, and as files."""

    def _made(self) -> Output:
        """Return the model; raises FastbnError where there is none."""
        raise NotImplementedError

    @property
    def model(self) -> ModelProto:
        """The onnx.ModelProto with all tensors inside; above 2 GB use save."""
        return self._made().to_proto()

    def to_bytes(self) -> bytes:
        """Return the model as bytes with all tensors inside; a model in which nothing changed comes back byte for byte."""
        return self._made().to_bytes()

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the model, and data files beside it if it had any, all or nothing; return their paths, the model's first.

        Raises
        ------
        ParityError
            The model must not be used: it differs from its original by more than rounding explains, or no stage is good enough.
        StorageError
            A file cannot be written.
        """
        with self.prepared(path) as prepared:
            pass
        return prepared.paths

    def prepared(self, path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[Prepared]:
        """Return a context in which the files of `save` are written under other names; they are renamed when it ends without an error."""
        return self._made().prepared(path)


@contextlib.contextmanager
def _prepared_bytes(path: PathLike, data: bytes, source: Source) -> Iterator[Prepared]:
    """Do as Output.prepared, for a model made from `source` that is given as bytes.

    Raises
    ------
    StorageError
        A file cannot be written; nothing has been.
    """
    if is_stream(path):
        yield Prepared(Path(path), size=len(data))
        write_through(path, data)
        return

    def write_into(replacement: Replacement) -> DataPaths:
        replacement.temporary.write_bytes(data)
        return {}

    with _prepared(path, write_into, source) as prepared:
        yield prepared


@contextlib.contextmanager
def _prepared(path: PathLike, write_into: Callable[[Replacement], DataPaths], source: Source) -> Iterator[Prepared]:
    if os.path.realpath(path) in source.data_files():
        raise StorageError(f"Cannot write '{path}': it is a data file of the input")
    with contextlib.closing(Replacement(path)) as replacement:
        with storage_errors(path):
            data = write_into(replacement)
        replacement.finish()
        source.check_unchanged()
        yield Prepared(Path(path), data, replacement.size(), replacement)
        replacement.commit(_obsolete(Path(path), source))


def _obsolete(path: Path, source: Source) -> list[Path]:
    """Return the data files that only the model at `path` reads: those that are named after it and that `source` does not need."""
    with contextlib.suppress(OSError, DecodeError, UnicodeDecodeError):
        status = os.lstat(path)
        # A model that has another name too keeps reading its data files under that name.
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            return []
        own = re.compile(re.escape(stem_of(path)) + r"(\.[0-9]+)?\.data")
        old: ModelProto = ModelProto.FromString(path.read_bytes())
        names = {entry.value for tensor in external_tensors(old) for entry in tensor.external_data if entry.key == "location"}
        paths = [path.parent / os.fsdecode(name.encode("utf-8")) for name in sorted(names) if own.fullmatch(name)]
        is_in_place = source.path is not None and os.path.realpath(path) == os.path.realpath(source.path)
        needed = set() if is_in_place else source.data_files()
        return [each for each in paths if os.path.isfile(each) and not each.is_symlink() and os.path.realpath(each) not in needed]
    return []


def _put_inside(tensor: TensorProto, data: bytes) -> None:
    """Make an external tensor one that holds its values itself."""
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = data


def _move(path: Path | None, target: Path) -> bool:
    """Move a data file, if there is one; say whether that was possible (not across file systems)."""
    if path is None:
        return False
    try:
        os.replace(path, target)
    except OSError:
        return False
    return True
