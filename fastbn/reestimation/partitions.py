"""Data as fixed partitions: which samples each one has depends on the data and the batch alone, never on who reads it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from fastbn.cluster.locations import ending_of, is_folder, is_url, names_in, read_bytes
from fastbn.deployment.groups import ENDINGS, as_array, batch_of, is_iterable, is_tensor, items_of, tensor_in
from fastbn.errors import ArgumentError, ArgumentTypeError, StorageError, expected
from fastbn.graph.reasons import first_few
from fastbn.reestimation.files import ArrayFile, arrays_in, rows_of
from fastbn.reestimation.inputs import Batches, rows_in

if TYPE_CHECKING:
    from fastbn._types import Array
    from fastbn.reestimation.work import State

__all__ = ["Data", "Part", "Rows", "Whole", "fixed_partitions", "rows_of_arrays"]

# What `reestimate` reads, beside collections of dask.
Data: TypeAlias = "str | os.PathLike[str] | Array | Mapping[str, ArrayLike] | Iterable[Any]"

# A folder of ONNX's own test data begins with this.
TEST_FOLDER = "test_data_set_"

Source: TypeAlias = "ArrayFile | Array"


@dataclass(frozen=True)
class Rows:
    """Entries along axis 0 of some arrays that belong together.

    Attributes
    ----------
    where : str
        The file, for messages.
    arrays : dict of name -> ArrayFile or array
        By the name of the graph input.
    numbers : sequence of int
        Which entries, in order.
    shared : tuple of str
        Names of the arrays that have one entry for all.
    """

    where: str
    arrays: Mapping[str, Source]
    numbers: Sequence[int]
    shared: tuple[str, ...] = ()

    def read(self) -> Mapping[str, ArrayLike]:
        """Return the arrays by name."""
        return {name: self._entries(array, (0,) if name in self.shared else self.numbers) for name, array in self.arrays.items()}

    def _entries(self, array: Source, numbers: Sequence[int]) -> Array:
        if not array.shape:
            return array.whole() if isinstance(array, ArrayFile) else array
        return rows_of(array, numbers) if isinstance(array, ArrayFile) else array[np.asarray(numbers)]

    def name_of(self, row: int) -> str:
        """Return what a message calls an entry."""
        return f"sample {self.numbers[row] if row < len(self.numbers) else 0} of {self.where}"


@dataclass(frozen=True)
class Whole:
    """One input as it is: arrays, files of tensors by the name of the input, or a file of several arrays; or a batch of a loader.

    Attributes
    ----------
    where : str
    arrays : dict of name -> array, ArrayFile or path
    kind : str
        "input" or "batch", as in `deployment.groups.Group`.
    """

    where: str
    arrays: Mapping[str, ArrayLike | ArrayFile | str]
    kind: Literal["input", "batch"] = "input"

    def read(self) -> Mapping[str, ArrayLike]:
        """Return the arrays by name."""
        return {name: self._value(array) for name, array in self.arrays.items()}

    def _value(self, array: ArrayLike | ArrayFile | str) -> ArrayLike:
        if isinstance(array, ArrayFile):
            return array.whole()
        return tensor_in(read_bytes(array), array)[1] if isinstance(array, str) else array

    def name_of(self, row: int) -> str:
        """Return what a message calls a row of it."""
        return f"sample {row} of {self.where}"


@dataclass(frozen=True)
class Part:
    """One partition: some rows of one group of arrays, or of several that are batched together.

    Attributes
    ----------
    pieces : tuple of Rows or Whole
    batch : int
        Rows of a feed where the model leaves the batch open.
    """

    pieces: tuple[Rows | Whole, ...]
    batch: int

    @property
    def label(self) -> str:
        """Which samples these are."""
        first = self.pieces[0]
        if len(self.pieces) > 1:
            return f"{len(self.pieces)} inputs from {first.where} on"
        if isinstance(first, Whole):
            return first.where
        return f"samples {first.numbers[0]} to {first.numbers[-1]} of {first.where}"

    def read(self, inputs: Batches) -> State:
        """Return its feeds.

        Raises
        ------
        StorageError
            A file cannot be read, or is no longer what it was.
        ArgumentError
            A name, type or shape is not that of an input; a value is Inf or NaN.
        """
        state: State = []
        group: State = []
        for piece in self.pieces:
            kind = piece.kind if isinstance(piece, Whole) else "samples"
            feeds = inputs.feeds(piece.where, piece.read(), kind, self.batch)
            row = 0
            for feed in feeds:
                _check_finite(feed, piece, row)
                row += rows_in(feed)
            if kind == "input":  # as it is
                state += [*inputs.joined(group, self.batch), *feeds]
                group = []
            else:
                group += feeds
        return [*state, *inputs.joined(group, self.batch)]


def _check_finite(feed: Mapping[str, Array], piece: Rows | Whole, first: int) -> None:
    for name, values in feed.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            kind = "NaN" if np.isnan(values).any() else "Inf"
            axes = tuple(range(1, values.ndim))
            row = int(np.flatnonzero(~np.isfinite(values).all(axis=axes))[0]) if values.ndim else 0
            raise ArgumentError(expected("finite values", f"{kind} in '{name}'", piece.name_of(first + row)))


# ---- which partitions there are ----


def fixed_partitions(data: Data, inputs: Batches, batch: int, most: int | None) -> list[Part]:
    """Return the partitions of data that are files or arrays.

    Parameters
    ----------
    data
        As in `fastbn.reestimate`, no collection of dask.
    inputs : inputs.Batches
    batch : int
        Rows of a partition.
    most : int, optional
        Samples to take; of more, evenly spaced ones.

    Raises
    ------
    StorageError, ArgumentError, ArgumentTypeError
        A file cannot be read; a name or shape is not that of an input; there are no samples.
    """
    pieces = list(_pieces(data, inputs))
    total = sum(len(piece.numbers) if isinstance(piece, Rows) else 1 for piece in pieces)
    if not total:
        raise ArgumentError(expected("at least one sample", "none", _origin(data)))
    if most is not None and most < total:
        unit = inputs.unit if all(isinstance(piece, Rows) for piece in pieces) else 1
        chosen = np.unique(np.linspace(0, total // unit - 1, max(1, most // unit)).astype(int))
        pieces = list(_thinned(pieces, (chosen[:, None] * unit + np.arange(unit)).reshape(-1)))
    return list(_partitions(pieces, inputs, inputs.batch_of(batch)))


def _origin(data: Data) -> str:
    return str(data) if isinstance(data, (str, os.PathLike)) else "data"


def _thinned(pieces: Iterable[Rows | Whole], chosen: Array) -> Iterator[Rows | Whole]:
    """Yield what is left of pieces when only some samples, by their number among all, are taken."""
    first = 0
    for piece in pieces:
        count = len(piece.numbers) if isinstance(piece, Rows) else 1
        inside = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, first + count)] - first
        first += count
        if inside.size and isinstance(piece, Rows):
            yield Rows(piece.where, piece.arrays, [piece.numbers[row] for row in inside.tolist()], piece.shared)
        elif inside.size:
            yield piece


def _partitions(pieces: Iterable[Rows | Whole], inputs: Batches, batch: int) -> Iterator[Part]:
    """Yield partitions of up to `batch` samples: of one group where it has so many, else of several."""
    group: list[Rows | Whole] = []
    filled = 0
    for piece in pieces:
        count = len(piece.numbers) if isinstance(piece, Rows) else _whole_rows(piece)
        if group and filled + count > batch:
            yield Part(tuple(group), batch)
            group, filled = [], 0
        if isinstance(piece, Whole) or count <= batch:
            group.append(piece)
            filled += count
            continue
        for first in range(0, count, batch):
            numbers = piece.numbers[first : first + batch]
            yield Part((_own(piece, numbers),), batch)
    if group:
        yield Part(tuple(group), batch)


def _own(piece: Rows, numbers: Sequence[int]) -> Rows:
    """Return some rows of a piece, with no more of an array in memory than these: a partition travels to a worker."""
    if any(isinstance(array, ArrayFile) for array in piece.arrays.values()):
        return Rows(piece.where, piece.arrays, numbers, piece.shared)
    return Slices(piece.where, piece.arrays, numbers, piece.shared)


class Slices(Rows):
    """Rows of arrays in memory, of which only these rows are pickled."""

    def __reduce__(self) -> tuple[Any, ...]:  # what pickle takes
        arrays = {name: self._entries(array, (0,) if name in self.shared else self.numbers) for name, array in self.arrays.items()}
        return Cut, (self.where, arrays, self.numbers, self.shared)


class Cut(Rows):
    """Such rows, as a worker gets them."""

    def read(self) -> Mapping[str, ArrayLike]:
        """Return the arrays by name."""
        return {name: np.asanyarray(array) for name, array in self.arrays.items()}


def _whole_rows(piece: Whole) -> int:
    shapes = [array.shape for array in piece.arrays.values() if isinstance(array, (np.ndarray, ArrayFile))]
    return max((shape[0] for shape in shapes if shape), default=1)


def _pieces(data: Data, inputs: Batches) -> Iterator[Rows | Whole]:
    """Yield the groups of arrays of some data, in order."""
    if isinstance(data, (str, os.PathLike)):
        yield from _files(os.fspath(data), inputs)
    elif isinstance(data, Mapping):
        yield from rows_of_arrays("data", {str(name): as_array(array) for name, array in data.items()}, inputs)
    elif is_tensor(data):
        yield from rows_of_arrays("data", {inputs.only("data"): as_array(data)}, inputs)
    elif is_iterable(data):
        is_list = isinstance(data, (list, tuple))
        for where, item in items_of(data):
            if isinstance(item, (str, os.PathLike)):
                yield from _files(os.fspath(item), inputs)
            elif is_list and isinstance(item, Mapping):
                yield Whole(where, {name: as_array(array) for name, array in item.items()})
            else:
                arrays = batch_of(where, item, inputs.names).arrays
                yield Whole(where, {name: arrays[name] for name in inputs.known(list(arrays), where)}, "batch")
    else:
        what = "paths, URLs, arrays or tensors, a loader, an iterable of dicts, or a collection of dask"
        raise ArgumentTypeError(expected(what, type(data).__name__, "data"))


def rows_of_arrays(where: str, arrays: Mapping[str, Source], inputs: Batches) -> Iterator[Rows]:
    """Yield the rows of arrays that belong together, if they have any."""
    count, shared = inputs.counted(where, {name: array.shape for name, array in arrays.items()})
    if count:
        yield Rows(where, arrays, range(count), shared)


def _files(name: str, inputs: Batches) -> Iterator[Rows | Whole]:
    """Yield the groups of a file, a folder or a glob."""
    for path in [name] if is_folder(name) else names_in(name):
        if is_folder(path):
            yield from _folder(path, names_in(path), inputs)
        else:
            yield from _file(path, inputs)


def _file(path: str, inputs: Batches) -> Iterator[Rows | Whole]:
    ending, stem = ending_of(path), PurePosixPath(path).stem
    if ending not in ENDINGS:
        if not is_url(path) and not os.path.exists(path):
            raise StorageError(f"Cannot read samples: '{path}' does not exist")
        raise ArgumentError(expected(f"a file that ends in {', '.join(ENDINGS)}", PurePosixPath(path).name, path))
    if ending == ".pb":
        yield Whole(path, {stem if stem in inputs.infos else inputs.only(path): path})
        return
    arrays: Mapping[str, ArrayFile] = arrays_in(path)
    if ending == ".npy":
        arrays = {stem if stem in inputs.infos else inputs.only(path): arrays[stem]}
    yield from rows_of_arrays(path, {name: arrays[name] for name in inputs.known(list(arrays), path)}, inputs)


def _folder(path: str, names: Sequence[str], inputs: Batches) -> Iterator[Rows | Whole]:
    """Yield the groups of a folder: ONNX's test data, or files of one kind."""
    tests = [each for each in names if PurePosixPath(each).name.startswith(TEST_FOLDER) and is_folder(each)]
    if not tests and any(PurePosixPath(each).name == "input_0.pb" for each in names):
        tests = [path]
    if tests:
        for folder in tests:
            yield Whole(folder, dict(_test_inputs(folder, inputs)))
        return
    files = [each for each in names if ending_of(each) in ENDINGS]
    kinds = sorted({ending_of(each) for each in files})
    if len(kinds) != 1:
        got = f"{' and '.join(kinds)} in one folder" if kinds else "a folder without any"
        raise ArgumentError(expected(f"files of one kind ({', '.join(ENDINGS)}) or {TEST_FOLDER}*", got, path))
    stems = {PurePosixPath(each).stem: each for each in files}
    if kinds != [".npz"] and set(stems) == set(inputs.infos):
        if kinds == [".pb"]:
            yield Whole(path, stems)
        else:
            yield from rows_of_arrays(path, {stem: arrays_in(each)[stem] for stem, each in stems.items()}, inputs)
        return
    for each in files:
        yield from _file(each, inputs)


def _test_inputs(folder: str, inputs: Batches) -> Iterator[tuple[str, str]]:
    """Yield (name, path) of input_0.pb, input_1.pb, ...: by the tensor's own name, or the place in the list."""
    files = [each for each in names_in(folder) if PurePosixPath(each).match("input_*.pb")]
    if not files:
        raise ArgumentError(f"Cannot read samples: there is no input_0.pb in '{folder}'")
    for place, file in enumerate(sorted(files, key=lambda each: (len(each), each))):
        name, _ = tensor_in(read_bytes(file), file)
        if name not in inputs.infos:
            if place >= len(inputs.infos):
                raise ArgumentError(expected(f"{len(inputs.infos)} inputs ({first_few(inputs.names)})", str(len(files)), folder))
            name = inputs.names[place]
        yield name, file
