"""Files in and out: models from paths, bytes or objects, tensors inline or in memory-mapped files, and writes that are all or nothing."""

import contextlib
import math
import os
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import numpy_helper
from onnx.helper import tensor_dtype_to_np_dtype

from fastbn.errors import ArgumentTypeError, ModelError, StorageError, expected

__all__ = ["Source", "atomic", "is_external", "load", "os_error", "serialize", "sync", "tensor_dtype"]

PROTOBUF_LIMIT = 2**31 - 1


def os_error(error, where):
    """Return a StorageError that says what the system said."""
    return StorageError(expected("a file that can be used", (error.strerror or str(error)).lower(), where))


def load(model):
    """Return the Source of a model.

    Parameters
    ----------
    model : str, os.PathLike, bytes-like or onnx.ModelProto

    Raises
    ------
    StorageError
        The file cannot be read.
    ModelError
        The bytes are no ONNX model.
    ArgumentTypeError
        model is none of these.
    """
    if isinstance(model, onnx.ModelProto):
        return Source(model, None, "model")
    if isinstance(model, (bytes, bytearray, memoryview)):
        data = bytes(model)
        return Source(_parse(data, "model"), None, "model", data)
    if not isinstance(model, (str, os.PathLike)):
        raise ArgumentTypeError(expected("a path, bytes or onnx.ModelProto", type(model).__name__, "model"))
    path = Path(os.fsdecode(model))
    try:
        if path.is_dir():
            raise StorageError(expected("a model file", "a folder", str(path)))
        data = path.read_bytes()
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise os_error(error, str(path)) from error
    except ValueError as error:
        raise StorageError(expected("a path", str(error), str(path))) from error
    return Source(_parse(data, str(path)), path, str(path))


def _parse(data, where):
    if not data:
        raise ModelError(expected("an ONNX model", "no bytes at all", where))
    try:
        proto = onnx.ModelProto.FromString(data)
    except (DecodeError, UnicodeDecodeError) as error:
        raise ModelError(expected("an ONNX model", "bytes that are none", where)) from error
    if not proto.HasField("graph") or not proto.ir_version:
        raise ModelError(expected("an ONNX model", "a message without a graph or an IR version", where))
    return proto


def serialize(proto, where):
    """Return the bytes of a ModelProto; more than protobuf's 2 GB is an error in one line."""
    try:
        data = proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise ModelError(expected("a model below 2 GB without its external data", "a larger one", where)) from error
    if len(data) > PROTOBUF_LIMIT:
        raise ModelError(expected("a model below 2 GB without its external data", f"{len(data)} bytes", where))
    return data


def is_external(tensor):
    """Say whether a TensorProto keeps its values in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def tensor_dtype(tensor, where):
    """Return the NumPy dtype of a TensorProto."""
    try:
        return np.dtype(tensor_dtype_to_np_dtype(tensor.data_type))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(expected("a tensor of a known type", f"type {tensor.data_type}", where)) from error


class Source:
    """A model as it was given: its ModelProto, where it came from, and the values of its tensors."""

    def __init__(self, proto, path, name, data=None):
        self.proto = proto
        self._data = data
        self.path = path
        self.name = name
        self.notes = ()
        self._files = {}

    def to_bytes(self):
        """Return the model as it was given, byte for byte: protobuf writes fields in another order than some exporters."""
        if self.path is None:
            return serialize(self.proto, self.name) if self._data is None else self._data
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise os_error(error, self.name) from error

    def size(self, external):
        """Return the bytes of the model and of the data files of these external tensors."""
        try:
            own = self.path.stat().st_size if self.path else self.proto.ByteSize()
            return own + sum(path.stat().st_size for path in {self.location(tensor)[0] for tensor in external})
        except OSError as error:
            raise os_error(error, error.filename or self.name) from error

    def array(self, tensor):
        """Return the values of a TensorProto, C-contiguous; external ones are a read-only map of their file."""
        where = tensor.name or "a constant"
        dtype = tensor_dtype(tensor, where)
        if any(dim < 0 for dim in tensor.dims):
            raise ModelError(expected("sizes that are not negative", f"{list(tensor.dims)}", where))
        if is_external(tensor):
            raw = self.external(tensor)
        elif tensor.HasField("raw_data"):
            raw = np.frombuffer(tensor.raw_data, np.uint8)
        else:
            try:
                return np.asarray(numpy_helper.to_array(tensor), order="C")
            except (ValueError, TypeError) as error:
                raise ModelError(expected(f"values for shape {list(tensor.dims)}", "another number of them", where)) from error
        if dtype.hasobject:
            raise ModelError(expected("strings in their own field", "raw bytes", where))
        size = math.prod(tensor.dims) * dtype.itemsize
        if raw.size != size:
            raise ModelError(expected(f"{size} bytes", f"{raw.size}", where))
        array = raw.view(dtype).reshape(tuple(tensor.dims))
        return array if array.flags.aligned else array.copy()

    def location(self, tensor):
        """Return (path of the data file, offset, length or None) of an external tensor, checked."""
        where = tensor.name or "a constant"
        fields = {entry.key: entry.value for entry in tensor.external_data}
        name = fields.get("location", "")
        if self.path is None:
            raise ModelError(expected("a path, for a model with external data", "bytes or an object", where))
        # A link inside the folder may lead anywhere (the Hugging Face cache is made of such links); the name itself may not leave it.
        if not name or "\0" in name or os.path.isabs(name) or name[1:2] == ":" or ".." in name.replace("\\", "/").split("/"):
            raise ModelError(expected("external data inside the model's folder", repr(name), where))
        try:
            offset, length = int(fields.get("offset") or 0), fields.get("length")
            length = None if length is None else int(length)
        except ValueError as error:
            raise ModelError(expected("an offset and a length in bytes", f"{fields}", where)) from error
        if offset < 0 or (length is not None and length < 0):
            raise ModelError(expected("an offset and a length that are not negative", f"{offset}, {length}", where))
        return self.path.parent / name, offset, length

    def external(self, tensor):
        """Return the bytes of an external tensor as a map of its file."""
        where = tensor.name or "a constant"
        path, offset, length = self.location(tensor)
        if length is None:
            length = math.prod(tensor.dims) * tensor_dtype(tensor, where).itemsize
        if path not in self._files:
            try:
                size = path.stat().st_size
                self._files[path] = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
            except OSError as error:
                raise os_error(error, str(path)) from error
        data = self._files[path]
        if offset + length > data.size:
            raise ModelError(expected(f"a file of at least {offset + length} bytes", f"{data.size}", str(path)))
        return data[offset : offset + length]


def sync(path):
    """Wait until a file's bytes are on the disk: a full one is noticed here at the latest."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path in path's folder; when the block ends well it is synced and takes path's place, otherwise it is removed."""
    path = Path(path)
    temporary = path.parent / f".{path.name[:100]}.{os.urandom(4).hex()}.tmp"
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        sync(temporary)
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise os_error(error, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
