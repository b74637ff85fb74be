"""Input data of a deployment: samples from files or arrays, matched to the inputs of a model by name, type and shape; or random ones."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import ArrayLike, NDArray
from onnx import numpy_helper

from fastbn.errors import ArgumentError, ArgumentTypeError, StorageError, expected
from fastbn.graph.model.element_types import dtype_of
from fastbn.graph.model.files import file_path, os_error
from fastbn.graph.parity.feeds import random_feeds
from fastbn.graph.reasons import first_few
from fastbn.graph.runtime import runtime_errors

if TYPE_CHECKING:
    from fastbn.graph.model.index import Index
    from fastbn.graph.parity.feeds import Feed
    from fastbn.graph.runtime import Session

__all__ = ["ENDINGS", "TEST_FOLDER", "Data", "Inputs", "Samples", "SamplesFields", "random_samples", "read_samples", "tensor_in"]

# An array of any type that a model may read.
Array: TypeAlias = NDArray[Any]

# What `read_samples` reads.
Data: TypeAlias = str | os.PathLike[str] | Array | Mapping[str, ArrayLike] | Sequence[Mapping[str, ArrayLike]]

# Where arrays come from, the arrays by name, and whether they are one input as it is.
Group: TypeAlias = tuple[str, Mapping[str, ArrayLike], bool]

# What a folder of samples may hold; anything else in it is left alone.
ENDINGS = (".npz", ".npy", ".pb")

# The layout of ONNX's own test data: one folder a sample, input_0.pb for the first graph input.
TEST_FOLDER = "test_data_set_*"


class SamplesFields(TypedDict):
    """Samples as JSON holds them: without the arrays."""

    origin: str
    random: bool
    feeds: int
    rows: int
    available: int
    notes: list[str]


@dataclass(frozen=True, repr=False)
class Samples:
    """Inputs for a model.

    Attributes
    ----------
    feeds : list of dict of name -> array
        Each as the model takes it.
    rows : int
        How many samples they hold together.
    available : int
        How many feeds there were to choose from.
    origin : str
        Where they come from.
    random : bool
        Whether they are random numbers.
    notes : tuple of str
        What was done to them.
    """

    feeds: list[Feed]
    rows: int
    available: int
    origin: str
    random: bool
    notes: tuple[str, ...] = ()

    def to_dict(self) -> SamplesFields:
        """Return all but the arrays, as JSON holds it."""
        return {
            "origin": self.origin,
            "random": self.random,
            "feeds": len(self.feeds),
            "rows": self.rows,
            "available": self.available,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return f"<Samples: {self}>"

    def __str__(self) -> str:
        rows = f"{self.rows} samples" if self.rows > 1 else "1 sample"
        some = f", of {self.available} feeds there evenly {len(self.feeds)}" if self.available > len(self.feeds) else ""
        return f"{rows} from {self.origin}{some}"


def random_samples(reference: Session, index: Index, input_shapes: Mapping[str, tuple[int, ...]], seed: int, rows: int) -> Samples:
    """Return Samples of seeded normal numbers, at least this many rows, one by one where the model takes them so; raises feeds.ModelNotRun
    where it takes none."""
    (first,) = random_feeds(reference, index, input_shapes, seed, 1)
    single = _one_row(reference, index, first)
    count = -(-rows // max(1, _rows(single or first)))
    feeds = random_feeds(reference, index, input_shapes, seed, count)
    if single:
        feeds = [{name: values[: len(single[name])] if values.ndim else values for name, values in feed.items()} for feed in feeds]
    return Samples(feeds, sum(map(_rows, feeds)), len(feeds), f"normal random numbers, seed {seed}", True)


def read_samples(data: Data, index: Index, most: int) -> Samples:
    """Return the Samples of files or arrays.

    Parameters
    ----------
    data : path, dict of name -> array, array, or sequence of dicts
        A .npz file (arrays named after the inputs), a .npy or .pb file for a model of one input, a folder of such files or of ONNX's
        test_data_set_N. Of an array with the rank of its input, axis 0 counts samples; they are fed one by one, or in the batch that the
        model fixes. An array with one axis more counts whole inputs. A .pb file, a test_data_set and a dict in a sequence is one input as
        it is.
    index : model.Index
    most : int
        Feeds to keep; of more, evenly spaced ones are taken.

    Raises
    ------
    StorageError
        A file cannot be read, or holds something else.
    ArgumentError, ArgumentTypeError
        A name, type or shape is not that of an input; there are no samples; a value is Inf or NaN.
    """
    inputs = Inputs(index)
    pieces: list[tuple[str, Feed]] = []
    for where, arrays, whole in _groups(data, inputs):
        pieces.extend(inputs.split(where, arrays, whole))
    origin = str(data) if isinstance(data, (str, os.PathLike)) else "arrays"
    if not pieces:
        raise ArgumentError(expected("at least one sample", "none", origin))
    chosen = [pieces[number] for number in np.unique(np.linspace(0, len(pieces) - 1, min(most, len(pieces))).astype(int))]
    feeds = [{name: np.ascontiguousarray(values).reshape(values.shape) for name, values in feed.items()} for _, feed in chosen]
    _check_finite([where for where, _ in chosen], feeds)
    return Samples(feeds, sum(map(_rows, feeds)), len(pieces), origin, False, tuple(dict.fromkeys(inputs.notes)))


def _one_row(reference: Session, index: Index, feed: Feed) -> Feed | None:
    """Return a feed cut to one row wherever the model leaves the batch open, or None where it does not run on that."""
    shapes = {name: index.input_shapes.get(name) or index.declared_shape(index.main.values[name]) for name in feed}
    single = {name: values[:1] if (shapes[name] or (0,))[0] is None else values for name, values in feed.items()}
    try:
        reference.run(None, single)
    except runtime_errors():
        return None
    return single


def _rows(feed: Feed) -> int:
    return max((values.shape[0] for values in feed.values() if values.ndim), default=1)


def _check_finite(places: Sequence[str], feeds: Sequence[Feed]) -> None:
    bad: dict[tuple[str, str], list[int]] = {}
    for number, (where, feed) in enumerate(zip(places, feeds, strict=True)):
        for name, values in feed.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                bad.setdefault((where, name), []).append(number)
    for (where, name), numbers in bad.items():
        kind = "NaN" if any(np.isnan(feeds[number][name]).any() for number in numbers) else "Inf"
        raise ArgumentError(expected("finite values", f"{kind} in {len(numbers)} of {len(feeds)} samples of '{name}'", where))


class Inputs:
    """The graph inputs that a caller must give, and how arrays become feeds of them."""

    def __init__(self, index: Index) -> None:
        constants = {tensor.name for tensor in index.proto.graph.initializer}
        self.infos = {info.name: info for info in index.proto.graph.input if info.name not in constants}
        self.shapes = {name: index.input_shapes.get(name) or index.declared_shape(index.main.values[name]) for name in self.infos}
        self.notes: list[str] = []

    @property
    def names(self) -> list[str]:
        """Their names, in the order of the model."""
        return list(self.infos)

    def only(self, where: str) -> str:
        """Return the name of the one input; an array without a name is for a model of one."""
        if len(self.infos) != 1:
            raise ArgumentError(expected(f"arrays named after the inputs ({first_few(self.names)})", "one without a name", where))
        return self.names[0]

    def split(self, where: str, arrays: Mapping[str, ArrayLike], whole: bool, rows: int = 1) -> list[tuple[str, Feed]]:
        """Return (where, feed) of every feed in a group of arrays by name, of so many rows where the model leaves the batch open."""
        unknown = [name for name in arrays if name not in self.infos]
        missing = [name for name in self.infos if name not in arrays]
        if unknown or missing:
            got = f"'{unknown[0]}'" if unknown else f"none for '{missing[0]}'"
            raise ArgumentError(expected(f"arrays named after the inputs ({first_few(self.names)})", got, where))
        parts = {name: self._parts(where, name, self._typed(where, name, np.asanyarray(arrays[name])), whole, rows) for name in self.infos}
        count = max(map(len, parts.values()), default=0)
        for name, each in parts.items():
            if len(each) not in (1, count):
                raise ArgumentError(expected(f"{count} samples of every input", f"{len(each)} of '{name}'", where))
        return [(where, {name: each[number if len(each) > 1 else 0] for name, each in parts.items()}) for number in range(count)]

    def _typed(self, where: str, name: str, array: Array) -> Array:
        kind = self.infos[name].type.tensor_type.elem_type
        if kind == onnx.TensorProto.STRING:
            if array.dtype.kind not in "OUS":
                raise ArgumentError(expected(f"text for '{name}'", str(array.dtype), where))
            return array.astype(object)
        try:
            wanted = dtype_of(kind)
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError(expected(f"'{name}' to be a tensor", "an input that is none", where)) from error
        if array.dtype == wanted:
            return array
        same_kind = array.dtype.kind == wanted.kind == "f" or {array.dtype.kind, wanted.kind} <= {"i", "u"}
        fits = same_kind and (wanted.kind == "f" or not array.size or np.array_equal(array.astype(wanted), array))
        if not fits:
            raise ArgumentError(expected(f"{wanted} for '{name}'", str(array.dtype), where))
        self.notes.append(f"{array.dtype} of '{name}' read as {wanted}")
        with np.errstate(over="ignore"):
            return array.astype(wanted)

    def _parts(self, where: str, name: str, array: Array, whole: bool, rows: int) -> list[Array]:
        """Return the feeds of one array, in order."""
        shape = self.shapes[name]
        if shape is None or (whole and _fits(array.shape, shape)) or (not shape and not array.shape):
            return [array]
        if not whole and array.ndim == len(shape) and _fits(array.shape[1:], shape[1:]):
            step = shape[0] or rows
            if shape[0] and array.shape[0] % step:
                raise ArgumentError(expected(f"a multiple of {step} samples, the model's batch, of '{name}'", str(array.shape[0]), where))
            return [array[first : first + step] for first in range(0, array.shape[0], step)]
        if not whole and array.ndim == len(shape) + 1 and _fits(array.shape[1:], shape):
            return list(array)
        shown = ",".join(str(size or "?") for size in shape)
        raise ArgumentError(expected(f"shape [{shown}] for '{name}'", f"[{','.join(map(str, array.shape))}]", where))


def _fits(sizes: Sequence[int], shape: Sequence[int | None]) -> bool:
    return len(sizes) == len(shape) and all(known in (None, size) for size, known in zip(sizes, shape, strict=True))


def _groups(data: Data, inputs: Inputs) -> Iterator[Group]:
    """Yield (where, name -> array, whether it is one input as it is) of every file."""
    if isinstance(data, (str, os.PathLike)):
        try:
            if data and os.path.isdir(data):
                yield from _folder(Path(os.fsdecode(data)), inputs)
            else:
                yield _file(file_path(data, "samples"), inputs)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise os_error(error, os.fsdecode(data)) from error
    elif isinstance(data, np.ndarray):
        yield "data", {inputs.only("data"): data}, False
    elif isinstance(data, dict):
        yield "data", data, False
    elif isinstance(data, (list, tuple)) and all(isinstance(feed, dict) for feed in data):
        yield from ((f"data[{number}]", feed, True) for number, feed in enumerate(data))
    else:
        raise ArgumentTypeError(expected("a path, an array, a dict of arrays or a list of such dicts", type(data).__name__, "data"))


def _file(path: Path, inputs: Inputs) -> Group:
    """Return the group of one file."""
    if path.suffix not in ENDINGS:
        if not path.exists():
            raise StorageError(f"Cannot read samples: '{path}' does not exist")
        raise ArgumentError(expected(f"a file that ends in {', '.join(ENDINGS)}", path.name, str(path)))
    if path.suffix == ".pb":
        name, array = _tensor(path)
        return str(path), {name if name in inputs.infos else inputs.only(str(path)): array}, True
    arrays = _numpy(path)
    if path.suffix == ".npy":
        arrays = {path.stem if path.stem in inputs.infos else inputs.only(str(path)): arrays[path.stem]}
    return str(path), arrays, False


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


def _folder(path: Path, inputs: Inputs) -> Iterator[Group]:
    """Yield the groups of a folder: ONNX test data, or files of one kind."""
    tests = sorted(each for each in path.glob(TEST_FOLDER) if each.is_dir()) or ([path] if (path / "input_0.pb").exists() else [])
    if tests:
        yield from ((str(folder), dict(_test_inputs(folder, inputs)), True) for folder in tests)
        return
    files = sorted(each for each in path.iterdir() if each.suffix in ENDINGS and each.is_file())
    kinds = sorted({each.suffix for each in files})
    if len(kinds) != 1:
        got = f"{' and '.join(kinds)} in one folder" if kinds else "a folder without any"
        raise ArgumentError(expected(f"files of one kind ({', '.join(ENDINGS)}) or {TEST_FOLDER}", got, str(path)))
    if kinds != [".npz"] and {each.stem for each in files} == set(inputs.infos):
        yield str(path), {each.stem: _file(each, inputs)[1][each.stem] for each in files}, kinds == [".pb"]
        return
    yield from (_file(each, inputs) for each in files)


def _test_inputs(folder: Path, inputs: Inputs) -> Iterator[tuple[str, Array]]:
    """Yield (name, array) of input_0.pb, input_1.pb, ...: by the tensor's own name, or the place in the list."""
    files = sorted(folder.glob("input_*.pb"), key=lambda file: (len(file.stem), file.stem))
    if not files:
        raise ArgumentError(f"Cannot read samples: there is no input_0.pb in '{folder}'")
    for place, file in enumerate(files):
        name, array = _tensor(file)
        if name not in inputs.infos:
            if place >= len(inputs.infos):
                raise ArgumentError(expected(f"{len(inputs.infos)} inputs ({first_few(inputs.names)})", str(len(files)), str(folder)))
            name = inputs.names[place]
        yield name, array
