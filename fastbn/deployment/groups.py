"""Data as groups of arrays by name: files and folders of them, arrays and tensors, and what loaders of frameworks yield."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import ArrayLike, NDArray
from onnx import numpy_helper

from fastbn.errors import ArgumentError, ArgumentTypeError, StorageError, expected
from fastbn.graph.model.files import file_path, os_error
from fastbn.graph.reasons import first_few

__all__ = [
    "ENDINGS",
    "Array",
    "Data",
    "Group",
    "Kind",
    "as_array",
    "batch_of",
    "groups",
    "is_iterable",
    "is_tensor",
    "items_of",
    "only_name",
    "tensor_in",
]

# An array of any type that a model may read.
Array: TypeAlias = NDArray[Any]

# What is read: a path, an array or a tensor of any framework, arrays by name, or an iterable of what batches of a loader may be.
Data: TypeAlias = str | os.PathLike[str] | Array | Mapping[str, ArrayLike] | Iterable[Any]

# What axis 0 of the arrays of a group counts, as Group says.
Kind: TypeAlias = Literal["samples", "input", "batch"]

# What a folder of samples may hold; anything else in it is left alone.
ENDINGS = (".npz", ".npy", ".pb")

# The layout of ONNX's own test data: one folder a sample, input_0.pb for the first graph input.
TEST_FOLDER = "test_data_set_*"


@dataclass(frozen=True)
class Group:
    """Arrays that belong together.

    Attributes
    ----------
    where : str
        Where they come from.
    arrays : dict of name -> array
    kind : str
        "samples": axis 0 counts them; "input": one input as it is; "batch": of a loader, some samples, or one without an axis that counts
        them.
    labels : array, optional
        Labels that came without a name.
    """

    where: str
    arrays: Mapping[str, ArrayLike]
    kind: Kind = "samples"
    labels: Array | None = None


def groups(data: object, names: Sequence[str], labels: Sequence[str]) -> Iterator[Group]:
    """Yield the groups of data, for a model of inputs with these names; labels are names that arrays of labels may have.

    Raises
    ------
    StorageError
        A file cannot be read, or holds something else.
    ArgumentError, ArgumentTypeError
        Arrays without names are not as many as the inputs, or the data are nothing of all this.
    """
    if isinstance(data, (str, os.PathLike)):
        try:
            if data and os.path.isdir(data):
                yield from _folder(Path(os.fsdecode(data)), names, labels)
            else:
                yield _file(file_path(data, "samples"), names)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise os_error(error, os.fsdecode(data)) from error
    elif isinstance(data, Mapping):
        yield Group("data", {name: as_array(value) for name, value in data.items()})
    elif isinstance(data, (list, tuple)) and all(isinstance(feed, Mapping) for feed in data):
        for number, feed in enumerate(data):
            yield Group(f"data[{number}]", {name: as_array(value) for name, value in feed.items()}, "input")
    elif is_tensor(data):
        yield Group("data", {only_name("data", names): as_array(data)})
    elif not is_iterable(data):
        what = "a path, an array or tensor, a dict of arrays, or an iterable of dicts or batches"
        raise ArgumentTypeError(expected(what, type(data).__name__, "data"))
    else:
        yield from (batch_of(where, item, names) for where, item in items_of(data))


def only_name(where: str, names: Sequence[str]) -> str:
    """Return the name of the one input; an array without a name is for a model of one."""
    if len(names) != 1:
        raise ArgumentError(expected(f"arrays named after the inputs ({first_few(list(names))})", "one without a name", where))
    return names[0]


def is_tensor(value: object) -> bool:
    """Say whether a value is an array, or a tensor of a framework; a list of numbers is none, and a list of tensors are many."""
    return isinstance(value, (np.ndarray, np.generic)) or hasattr(value, "__dlpack__") or hasattr(value, "__array__")


def is_iterable(data: object) -> bool:
    """Say whether data can be gone through item by item; bytes are none: they would be numbers."""
    can_be = hasattr(data, "__iter__") or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))
    return can_be and not isinstance(data, (bytes, bytearray, memoryview, str))


def as_array(value: object) -> Array:
    """Return a value as an array: a tensor of torch is detached and brought to the CPU, one of TensorFlow asked for its array."""
    if isinstance(value, np.ndarray):
        return value
    tensor: Any = value  # of a framework that need not be installed
    try:
        if hasattr(tensor, "detach"):
            tensor = tensor.detach().cpu()
        return np.asanyarray(tensor.numpy() if hasattr(tensor, "numpy") else tensor)
    except (TypeError, ValueError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArgumentTypeError(expected("an array or a tensor", f"{type(value).__name__}: {first}", "data")) from error


def items_of(data: Any) -> Iterator[tuple[str, Any]]:  # of types that need not be installed
    """Yield (where, item) of a loader or of any other iterable; raises ArgumentError where it raises anything itself."""
    number = -1
    items = iter(data)
    while True:
        number += 1
        try:
            item = next(items)
        except StopIteration:
            return
        except Exception as error:  # whatever the caller's data set raises
            first = (str(error).splitlines() or [""])[0]
            raise ArgumentError(f"Cannot read samples: batch {number} of the data raises {type(error).__name__}: {first}") from error
        yield f"data[{number}]", item


def batch_of(where: str, batch: object, names: Sequence[str]) -> Group:
    """Return the group of one batch: a dict, a tensor, or a tuple of inputs in order with labels behind them or none."""
    labels = None
    if isinstance(batch, (tuple, list)):
        parts = list(batch)
        if parts and isinstance(parts[0], Mapping) and len(parts) <= 2:
            batch = parts[0]
            labels = as_array(parts[1]) if len(parts) == 2 else None
        elif len(parts) in (len(names), len(names) + 1):
            batch = dict(zip(names, parts, strict=False))
            labels = as_array(parts[-1]) if len(parts) > len(names) else None
        else:
            what = f"{len(names)} inputs ({first_few(list(names))}), and labels or none, in a batch"
            raise ArgumentError(expected(what, str(len(parts)), where))
    elif not isinstance(batch, Mapping):
        if not is_tensor(batch):
            raise ArgumentTypeError(expected("a dict of arrays, an array or a tuple of them", type(batch).__name__, where))
        batch = {only_name(where, names): batch}
    return Group(where, {name: as_array(value) for name, value in batch.items()}, "batch", labels)


def _file(path: Path, names: Sequence[str]) -> Group:
    """Return the group of one file."""
    if path.suffix not in ENDINGS:
        if not path.exists():
            raise StorageError(f"Cannot read samples: '{path}' does not exist")
        raise ArgumentError(expected(f"a file that ends in {', '.join(ENDINGS)}", path.name, str(path)))
    if path.suffix == ".pb":
        name, array = _tensor(path)
        return Group(str(path), {name if name in names else only_name(str(path), names): array}, "input")
    arrays = _numpy(path)
    if path.suffix == ".npy":
        arrays = {path.stem if path.stem in names else only_name(str(path), names): arrays[path.stem]}
    return Group(str(path), arrays)


def _check_regular(path: Path) -> None:
    """Refuse what is no regular file: a device may have no end, and a pipe cannot be read in parts."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise StorageError(expected("a file of samples", "something that is no file", str(path)))


def _numpy(path: Path) -> dict[str, Array]:
    """Return the arrays of a .npz file by name, or that of a .npy file, mapped, by the name of the file."""
    _check_regular(path)
    try:
        if path.suffix == ".npy":
            return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False)}
        with np.load(path, allow_pickle=False) as loaded:
            return {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise os_error(error, str(path)) from error
    except Exception as error:  # NumPy and zipfile raise many kinds on files that are none of theirs
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise StorageError(expected(f"a {path.suffix} file of numbers", first, str(path))) from error


def _tensor(path: Path) -> tuple[str, Array]:
    """Return (name, array) of a file that holds a TensorProto."""
    _check_regular(path)
    return tensor_in(path.read_bytes(), str(path))


def tensor_in(data: bytes, where: str) -> tuple[str, Array]:
    """Return (name, array) of the bytes of a TensorProto; raises StorageError where they are none."""
    try:
        tensor = onnx.TensorProto.FromString(data)
        if not tensor.data_type:
            raise ValueError("one without a type")
        return tensor.name, numpy_helper.to_array(tensor)
    except (DecodeError, UnicodeDecodeError, ValueError, TypeError, KeyError) as error:
        raise StorageError(f"Cannot read '{where}': it holds no ONNX tensor") from error


def _folder(path: Path, names: Sequence[str], labels: Sequence[str]) -> Iterator[Group]:
    """Yield the groups of a folder: ONNX test data, or files of one kind."""
    tests = sorted(each for each in path.glob(TEST_FOLDER) if each.is_dir()) or ([path] if (path / "input_0.pb").exists() else [])
    if tests:
        yield from (Group(str(folder), dict(_test_inputs(folder, names)), "input") for folder in tests)
        return
    files = sorted(each for each in path.iterdir() if each.suffix in ENDINGS and each.is_file())
    kinds = sorted({each.suffix for each in files})
    if len(kinds) != 1:
        got = f"{' and '.join(kinds)} in one folder" if kinds else "a folder without any"
        raise ArgumentError(expected(f"files of one kind ({', '.join(ENDINGS)}) or {TEST_FOLDER}", got, str(path)))
    if kinds != [".npz"] and set(names) <= {each.stem for each in files} <= {*names, *labels}:
        arrays = {each.stem: _file(each, [each.stem]).arrays[each.stem] for each in files}
        yield Group(str(path), arrays, "input" if kinds == [".pb"] else "samples")
        return
    yield from (_file(each, names) for each in files)


def _test_inputs(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Array]]:
    """Yield (name, array) of input_0.pb, input_1.pb, ...: by the tensor's own name, or the place in the list."""
    files = sorted(folder.glob("input_*.pb"), key=lambda file: (len(file.stem), file.stem))
    if not files:
        raise ArgumentError(f"Cannot read samples: there is no input_0.pb in '{folder}'")
    for place, file in enumerate(files):
        name, array = _tensor(file)
        if name not in names:
            if place >= len(names):
                raise ArgumentError(expected(f"{len(names)} inputs ({first_few(list(names))})", str(len(files)), str(folder)))
            name = names[place]
        yield name, array
