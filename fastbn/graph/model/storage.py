"""Models in: from paths, bytes or objects, their tensors inside or in data files, which are checked at once and mapped when read."""

from __future__ import annotations

import math
import mmap
import os
import re
import stat
from collections.abc import Sized
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, NamedTuple, TypeAlias

import numpy as np
from google.protobuf.message import DecodeError, EncodeError
from onnx import ModelProto, TensorProto, numpy_helper

from fastbn.errors import ArgumentTypeError, ModelError, StorageError, expected
from fastbn.graph.model.element_types import bits_of, dtype_of
from fastbn.graph.model.external import external_tensors, is_external
from fastbn.graph.model.files import Signature, file_path, opened, os_error, signature_of
from fastbn.graph.model.objects import proto_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from fastbn._types import Array
    from fastbn.graph.model.objects import Program, TensorGraph

__all__ = [
    "PROTOBUF_LIMIT",
    "InferenceForm",
    "ModelLike",
    "Place",
    "Source",
    "load",
    "model_in",
    "read_pipe",
    "serialize",
    "tensor_dtype",
]

# What a model may be given as: a path, bytes, an object, or what load() has made of one of these.
ModelLike: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | ModelProto | TensorGraph | Program | Source"

# The largest message that protobuf writes or reads, in bytes.
PROTOBUF_LIMIT = 2**31 - 1

# An offset or a length in a data file: 64 bits hold no more digits.
NUMBER = re.compile(r"-?[0-9]{1,19}")

# Names that begin so are no files to onnxruntime, but addresses in its own memory.
ADDRESS = "*/_ORT_"

# The entries of an external tensor that say where its values lie.
PLACE = ("location", "offset", "length")


def model_in(path: str | os.PathLike[str]) -> ModelProto | None:
    """Return the ModelProto of a file, or None for one that cannot be read or holds no model."""
    try:
        return _parse(Path(path).read_bytes(), str(path))
    except (ModelError, OSError):
        return None


def load(model: ModelLike) -> Source:
    """Return the Source of a model, the places of its external tensors checked.

    Parameters
    ----------
    model : str, os.PathLike, bytes-like, onnx.ModelProto, onnx_ir.Model, torch.onnx.ONNXProgram or Source
        A Source is returned as it is.

    Raises
    ------
    StorageError
        The file, or a data file, cannot be read.
    ModelError
        The bytes are no ONNX model, or an external tensor has no place inside a data file beside it.
    ArgumentTypeError
        model is none of these.
    """
    if isinstance(model, Source):
        return model
    if isinstance(model, ModelProto):
        source = Source(model, None, "model")
        source.is_shared = True
    elif isinstance(model, (bytes, bytearray, memoryview)):
        data = bytes(model)
        source = Source(_parse(data, "model"), None, "model", data)
    elif isinstance(model, (str, os.PathLike)):
        source = _load_file(file_path(model, "a model file"))
    elif (proto := proto_of(model)) is not None:
        source = Source(proto, None, "model")
    else:
        raise ArgumentTypeError(expected("a path, bytes, onnx.ModelProto or onnx_ir.Model", type(model).__name__, "model"))
    source.check_places()
    return source


def _load_file(path: Path) -> Source:
    where = str(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise StorageError(expected("a model file", "a folder", where))
        if stat.S_ISREG(mode):
            if path.stat().st_size > PROTOBUF_LIMIT:
                raise ModelError(expected("a model below 2 GB without its external data", f"{path.stat().st_size} bytes", where))
            return Source(_parse(path.read_bytes(), where), path, where)
        if not stat.S_ISFIFO(mode):
            raise StorageError(expected("a model file or a pipe", "a device or a socket", where))
        with path.open("rb") as pipe:
            data = read_pipe(pipe)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise os_error(error, where) from error
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise StorageError(expected("a path", str(error), where)) from error
    # A pipe cannot be read twice, so the bytes are kept; and it has no folder for data files.
    return Source(_parse(data, where), None, where, data)


def read_pipe(pipe: BinaryIO | IO[bytes]) -> bytes:
    """Return the bytes of an open pipe, up to one piece more than the largest model: an endless pipe must not fill the memory."""
    data = bytearray()
    while len(data) <= PROTOBUF_LIMIT and (piece := pipe.read(1 << 20)):
        data += piece
    return bytes(data)


def _parse(data: bytes, where: str) -> ModelProto:
    if not data:
        raise ModelError(expected("an ONNX model", "no bytes at all", where))
    if len(data) > PROTOBUF_LIMIT:
        raise ModelError(expected("a model below 2 GB without its external data", f"{len(data)} bytes or more", where))
    try:
        proto: ModelProto = ModelProto.FromString(data)
    except (DecodeError, UnicodeDecodeError) as error:
        raise ModelError(expected("an ONNX model", "bytes that are none", where)) from error
    if not proto.HasField("graph") or not proto.ir_version:
        raise ModelError(expected("an ONNX model", "a message without a graph or an IR version", where))
    return proto


def serialize(proto: ModelProto, where: str) -> bytes:
    """Return the bytes of a ModelProto; raises ModelError above protobuf's 2 GB."""
    try:
        data: bytes = proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise ModelError(expected("a model below 2 GB without its external data", "a larger one", where)) from error
    if len(data) > PROTOBUF_LIMIT:
        raise ModelError(expected("a model below 2 GB without its external data", f"{len(data)} bytes", where))
    return data


def tensor_dtype(tensor: TensorProto, where: str) -> np.dtype[np.generic]:
    """Return the NumPy dtype of a TensorProto."""
    try:
        return dtype_of(tensor.data_type)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(expected("a tensor of a known type", f"type {tensor.data_type}", where)) from error


class Place(NamedTuple):
    """Where an external tensor lies: its data file, and the range of its bytes."""

    path: Path
    offset: int
    length: int


class InferenceForm(NamedTuple):
    """Labels of the nodes in training mode that were made inference ones, and (label, reason) of those that were not."""

    changed: list[str]
    left: list[tuple[str, str]]


class Source:
    """A model as it was given, and the values of its tensors.

    Parameters
    ----------
    proto : onnx.ModelProto
    path : Path or None
        The file; None for a model from memory or a pipe, which can have no data files.
    name : str
        What messages call it.
    data : bytes, optional
        Its bytes, where it was given as bytes.

    Attributes
    ----------
    notes : tuple of str
        What a report says about the way in which the model was read.
    inference : InferenceForm or None
        Where the model was to become an inference one.
    is_shared : bool
        Whether the caller holds `proto`, and may change it later.
    """

    def __init__(self, proto: ModelProto, path: Path | None, name: str, data: bytes | None = None) -> None:
        self.proto = proto
        self._data = data
        self.path = path
        self.name = name
        self.notes: tuple[str, ...] = ()
        self.inference: InferenceForm | None = None
        self.is_shared = False
        self._is_edited = False
        self._files: dict[Path, npt.NDArray[np.uint8]] = {}
        # Which file the model was read from, and its data files, as they were then.
        self._own = None if path is None else signature_of(path)
        self._signatures: dict[Path, Signature | None] = {}

    @property
    def is_edited(self) -> bool:
        """Whether the model is another one than that of its file."""
        return self._is_edited or (self.inference is not None and bool(self.inference.changed))

    def derived(self, proto: ModelProto | None = None, edited: bool = False) -> Source:
        """Return the same model, or another one that is made of it (an edited one computes something else), with the same name, data files,
        and notes."""
        other = Source(self.proto if proto is None else proto, self.path, self.name, self._data if proto is None else None)
        other.notes, other.inference, other._signatures = self.notes, self.inference, self._signatures
        other.is_shared = self.is_shared and proto is None
        other._is_edited = self._is_edited or edited
        return other

    def to_bytes(self) -> bytes:
        """Return the model as it was given, byte for byte: protobuf writes fields in another order than some exporters."""
        if self.path is None or self.is_edited or signature_of(self.path) != self._own:
            return serialize(self.proto, self.name) if self._data is None else self._data
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise os_error(error, self.name) from error

    @cached_property
    def external_tensors(self) -> tuple[TensorProto, ...]:
        """Every external TensorProto of the model."""
        return tuple(external_tensors(self.proto))

    def size(self) -> int:
        """Return the bytes of the model and of its data files."""
        try:
            own = self.path.stat().st_size if self.path and not self.is_edited else self.proto.ByteSize()
            return own + sum(path.stat().st_size for path in {self.place(tensor).path for tensor in self.external_tensors})
        except OSError as error:
            raise os_error(error, error.filename or self.name) from error

    def array(self, tensor: TensorProto) -> Array:
        """Return the values of a TensorProto, C-contiguous; external ones are a read-only map of their file.

        Raises
        ------
        ModelError
            The tensor does not hold as many values as its shape says, or its type is not known.
        """
        where = tensor.name or "a constant"
        dtype = tensor_dtype(tensor, where)
        shape = tuple(tensor.dims)
        if shape and min(shape) < 0:
            raise ModelError(expected("sizes that are not negative", f"{[*shape]}", where))
        raw: bytes | npt.NDArray[np.uint8]
        if is_external(tensor):
            raw = self.external(tensor)
        elif not tensor.HasField("raw_data"):
            return _listed_values(tensor, where)
        else:
            raw = tensor.raw_data
        if dtype.hasobject:
            raise ModelError(expected("strings in their own field", "raw bytes", where))
        count = math.prod(shape)
        size = -(-count * bits_of(tensor.data_type) // 8)
        if len(raw) != size:
            raise ModelError(expected(f"{size} bytes", f"{len(raw)}", where))
        if size < count * dtype.itemsize:
            packed = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=bytes(raw))
            return np.asarray(numpy_helper.to_array(packed), order="C")
        array = np.frombuffer(raw, dtype).reshape(shape) if isinstance(raw, bytes) else raw.view(dtype).reshape(shape)
        return array if array.flags.aligned else array.copy()

    def data_files(self) -> set[str]:
        """Return the real paths of the data files that the model reads."""
        return {os.path.realpath(self.place(tensor).path) for tensor in self.external_tensors}

    def check_places(self) -> None:
        """Check the place of every external tensor: a name inside the folder, given once, of a file that holds its bytes.

        Raises
        ------
        StorageError
            A data file cannot be read, or is no file.
        ModelError
            A tensor has no place, or one that is not inside a data file beside the model.
        """
        sizes: dict[Path, int] = {}
        for tensor in self.external_tensors:
            path, offset, length = self.place(tensor)
            if path not in sizes:
                self._signatures[path] = signature_of(path)
                sizes[path] = self._checked_size(path, tensor)
            if offset + length > sizes[path]:
                raise ModelError(expected(f"a file of at least {offset + length} bytes", f"{sizes[path]}", str(path)))

    def check_unchanged(self) -> None:
        """Check that the data files are those that they were when the model was read; raises StorageError for another, or a changed one."""
        for path, signature in self._signatures.items():
            if signature_of(path) != signature:
                raise StorageError(f"Cannot use '{path}': it has changed since the model was read")

    def _checked_size(self, path: Path, tensor: TensorProto) -> int:
        """Return the bytes of a data file; a link may lead to another name only inside the folder of the model, or, where the model is a
        link itself, as in the cache of Hugging Face, inside that of the file that it means."""
        where, model = str(path), self._path_beside(tensor)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise StorageError(expected("a data file", "something that is no file", where))
            if not os.access(path, os.R_OK):
                raise StorageError(f"Cannot use '{where}': permission denied")
            real = os.path.realpath(path)
            folders = [os.path.realpath(model.parent), os.path.dirname(os.path.realpath(model))]
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise os_error(error, where) from error
        if not any(os.path.commonpath([folder, real]) == folder for folder in folders):
            raise ModelError(expected("external data inside the model's folder", f"a link to '{real}'", tensor.name or "a constant"))
        return status.st_size

    def _path_beside(self, tensor: TensorProto) -> Path:
        """Return the path of the model, beside which an external tensor lies."""
        if self.path is None:
            raise ModelError(expected("a path, for a model with external data", "bytes or an object", tensor.name or "a constant"))
        return self.path

    def place(self, tensor: TensorProto) -> Place:
        """Return the Place of an external tensor; raises ModelError where its entries give none. The file is not read."""
        where, model = tensor.name or "a constant", self._path_beside(tensor)
        for key in PLACE:
            if sum(entry.key == key for entry in tensor.external_data) > 1:
                raise ModelError(expected(f"one {key} of external data", "several", where))
        fields = {entry.key: entry.value for entry in tensor.external_data if entry.key in PLACE}
        for key, value in fields.items():
            if not isinstance(value, str):  # what protobuf gives where it is none
                raise ModelError(expected(f"a {key} of external data in UTF-8", repr(value), where))
        name = fields.get("location", "")
        # A link inside the folder may lead elsewhere (_checked_size says where to); the name itself may not leave it.
        is_outside = os.path.isabs(name) or name[1:2] == ":" or ".." in name.replace("\\", "/").split("/")
        if not name or "\0" in name or is_outside or name.startswith(ADDRESS):
            raise ModelError(expected("external data inside the model's folder", repr(name), where))
        numbers = {key: fields[key] for key in PLACE[1:] if fields.get(key)}
        if not all(map(NUMBER.fullmatch, numbers.values())):
            raise ModelError(expected("an offset and a length in bytes", f"{numbers}", where))
        offset, length = int(numbers.get("offset", 0)), int(numbers.get("length", _bytes_of(tensor, where)))
        if offset < 0 or length < 0:
            raise ModelError(expected("an offset and a length that are not negative", f"{offset}, {length}", where))
        if length != _bytes_of(tensor, where):
            raise ModelError(expected(f"{_bytes_of(tensor, where)} bytes of external data", f"{length}", where))
        # The name is UTF-8 on the disk, whatever the locale says.
        return Place(model.parent / os.fsdecode(name.encode("utf-8")), offset, length)

    def external(self, tensor: TensorProto) -> npt.NDArray[np.uint8]:
        """Return the bytes of an external tensor as a map of its file, which stays open."""
        path, offset, length = self.place(tensor)
        if path not in self._files:
            with opened(path) as file:
                self._files[path] = np.memmap(file, np.uint8, "r") if os.fstat(file.fileno()).st_size else np.empty(0, np.uint8)
        data = self._files[path][offset : offset + length]
        _check_length(data, offset, length, path)
        return data

    def give_pages_back(self) -> None:
        """Let the system use the memory that holds pages of data files: it reads them again where they are looked at again."""
        for data in self._files.values():
            mapped = getattr(data, "_mmap", None)  # an empty file has none
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def read(self, tensor: TensorProto) -> bytes:
        """Return the bytes of an external tensor, and leave no file open: there may be more of them than a process may open."""
        path, offset, length = self.place(tensor)
        with opened(path) as file:
            file.seek(offset)
            data = file.read(length)
        _check_length(data, offset, length, path)
        return data


def _listed_values(tensor: TensorProto, where: str) -> Array:
    """Return the values of a TensorProto that lists them in the field of its type."""
    try:
        return np.asarray(numpy_helper.to_array(tensor), order="C")
    except (ValueError, TypeError) as error:
        raise ModelError(expected(f"values for shape {[*tensor.dims]}", "another number of them", where)) from error


def _bytes_of(tensor: TensorProto, where: str) -> int:
    """Return the bytes that the values of a tensor take: types below 8 bits are packed."""
    dtype, dims = tensor_dtype(tensor, where), tuple(tensor.dims)
    if dtype.hasobject or (dims and min(dims) < 0):
        raise ModelError(expected("external data of numbers, in sizes that are not negative", f"{dtype} {[*dims]}", where))
    bits: int = math.prod(dims) * bits_of(tensor.data_type)
    return -(-bits // 8)


def _check_length(data: Sized, offset: int, length: int, path: Path) -> None:
    """Raise ModelError where a data file ends before the bytes of a tensor."""
    if len(data) != length:
        raise ModelError(expected(f"a file of at least {offset + length} bytes", f"{offset + len(data)}", str(path)))
