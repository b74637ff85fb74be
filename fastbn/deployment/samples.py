"""Input data of a deployment: arrays matched to the inputs of a model by name, type and shape, with their labels; or random ones."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import onnx
from numpy.typing import ArrayLike

from fastbn.deployment.groups import Array, Data, Group, Kind, groups, only_name
from fastbn.deployment.labels import IMPLIED, as_labels
from fastbn.errors import ArgumentError, expected
from fastbn.graph.digests import Digest
from fastbn.graph.model.element_types import dtype_of
from fastbn.graph.parity.feeds import random_feeds
from fastbn.graph.reasons import first_few
from fastbn.graph.runtime import runtime_errors
from fastbn.masks import unmasked

if TYPE_CHECKING:
    from fastbn.graph.model.index import Index
    from fastbn.graph.parity.feeds import Feed
    from fastbn.graph.runtime import Session

__all__ = ["Inputs", "Samples", "SamplesFields", "random_samples", "read_samples"]


class SamplesFields(TypedDict):
    """Samples as JSON holds them: without the arrays."""

    origin: str
    random: bool
    feeds: int
    rows: int
    available: int | None
    labels: str | None
    sha256: str
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
    available : int or None
        How many feeds there were to choose from; None where nobody knows how many an iterable has.
    origin : str
        Where they come from.
    random : bool
        Whether they are random numbers.
    notes : tuple of str
        What was done to them.
    labels : list of array, or None
        Of each feed, whole numbers; a negative one is none.
    labels_name : str or None
        What they are called.
    """

    feeds: list[Feed]
    rows: int
    available: int | None
    origin: str
    random: bool
    notes: tuple[str, ...] = ()
    labels: list[Array] | None = None
    labels_name: str | None = None

    def to_dict(self) -> SamplesFields:
        """Return all but the arrays, as JSON holds it."""
        return {
            "origin": self.origin,
            "random": self.random,
            "feeds": len(self.feeds),
            "rows": self.rows,
            "available": self.available,
            "labels": self.labels_name,
            "sha256": self.digest.sha256,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return f"<Samples: {self}>"

    def __str__(self) -> str:
        rows = f"{self.rows} samples" if self.rows > 1 else "1 sample"
        labeled = " with labels" if self.labels is not None else ""
        some = f", of {self.available} feeds there evenly {len(self.feeds)}" if (self.available or 0) > len(self.feeds) else ""
        return f"{rows}{labeled} from {self.origin}{some}"

    @cached_property
    def digest(self) -> Digest:
        """The Digest of the file, or of what was used: of each feed in turn name, dtype, shape and bytes of all arrays, and of labels."""
        if os.path.isfile(self.origin):
            return Digest.of_file(self.origin)
        digest = hashlib.sha256()
        for number, feed in enumerate(self.feeds):
            for name, values in [*feed.items(), *([("labels", self.labels[number])] if self.labels is not None else [])]:
                digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
                digest.update(repr(values.tolist()).encode() if values.dtype.hasobject else np.ascontiguousarray(values).tobytes())
        return Digest(self.origin, digest.hexdigest())


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


def read_samples(data: Data, index: Index, most: int, labels: str | None = None, ignore_unknown: bool = False) -> Samples:
    """Return the Samples of files, arrays or iterables.

    Parameters
    ----------
    data : path, array or tensor, dict of name -> array, sequence of dicts, or iterable of batches
        A .npz file (arrays named after the inputs), a .npy or .pb file for a model of one input, a folder of such files or of ONNX's
        test_data_set_N. Of an array with the rank of its input, axis 0 counts samples; they are fed one by one, or in the batch that the
        model fixes. An array with one axis more counts whole inputs; one that lacks an axis of size 1 is given it. A .pb file, a
        test_data_set and a dict in a sequence is one input as it is. A batch of an iterable (a DataLoader, a tf.data.Dataset, a generator)
        is a dict, a tensor, or a tuple of inputs with labels behind them or none; the first of them are taken.
    index : model.Index
    most : int
        Feeds to keep; of more, evenly spaced ones are taken.
    labels : str, optional
        The array that holds labels; without it, "labels", "y" or "targets" if no input is called so and it holds some.
    ignore_unknown : bool
        Leave out arrays that are neither inputs nor labels, and say so; else they are refused.

    Raises
    ------
    StorageError
        A file cannot be read, or holds something else.
    ArgumentError, ArgumentTypeError
        A name, type or shape is not that of an input; there are no samples; a value is Inf or NaN; labels are of another type or number.
    """
    inputs = Inputs(index, labels, ignore_unknown)
    pieces: list[_Piece] = []
    has_more = False
    for group in groups(data, inputs.names, (*IMPLIED, *([labels] if labels else []))):
        has_more = group.kind == "batch" and len(pieces) >= most
        if has_more:
            break
        pieces.extend(inputs.pieces(group))
    origin = str(data) if isinstance(data, (str, os.PathLike)) else "arrays"
    if not pieces:
        raise ArgumentError(expected("at least one sample", "none", origin))
    inputs.check_labels(pieces, origin)
    available = None if has_more else len(pieces)
    pieces = pieces[:most] if has_more else pieces
    chosen = [pieces[number] for number in np.unique(np.linspace(0, len(pieces) - 1, min(most, len(pieces))).astype(int))]
    feeds = [{name: np.ascontiguousarray(values).reshape(values.shape) for name, values in each.feed.items()} for each in chosen]
    _check_finite([each.where for each in chosen], feeds)
    first = [f"the first {len(feeds)} feeds of an iterable that has more"] if has_more else []
    known = [each.labels for each in chosen if each.labels is not None]
    return Samples(
        feeds,
        sum(map(_rows, feeds)),
        available,
        origin,
        False,
        tuple(dict.fromkeys([*inputs.notes, *first])),
        known or None,
        inputs.labels_name if known else None,
    )


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


@dataclass(frozen=True)
class _Piece:
    """A feed, where it comes from, and its labels."""

    where: str
    feed: Feed
    labels: Array | None


class Inputs:
    """The graph inputs that a caller must give, and how arrays become feeds of them."""

    def __init__(self, index: Index, labels: str | None = None, ignore_unknown: bool = False) -> None:
        constants = {tensor.name for tensor in index.proto.graph.initializer}
        self.infos = {info.name: info for info in index.proto.graph.input if info.name not in constants}
        self.shapes = {name: index.input_shapes.get(name) or index.declared_shape(index.main.values[name]) for name in self.infos}
        self.notes: list[str] = []
        self.wanted = labels
        self.labels_name: str | None = None
        self.ignore_unknown = ignore_unknown

    @property
    def names(self) -> list[str]:
        """Their names, in the order of the model."""
        return list(self.infos)

    def only(self, where: str) -> str:
        """Return the name of the one input; an array without a name is for a model of one."""
        return only_name(where, self.names)

    def split(self, where: str, arrays: Mapping[str, ArrayLike], kind: Kind, rows: int = 1) -> list[tuple[str, Feed]]:
        """Return (where, feed) of every feed in a group of arrays by name, of so many rows where the model leaves the batch open."""
        pieces = self.pieces(Group(where, arrays, kind), rows)
        return [(each.where, each.feed) for each in pieces]

    def pieces(self, group: Group, rows: int = 1) -> list[_Piece]:
        """Return every feed in a group, with its labels, of so many rows where the model leaves the batch open."""
        where, arrays = group.where, group.arrays
        labels = self._labels(group)
        unknown = [name for name in arrays if name not in self.infos and name != self.labels_name]
        missing = [name for name in self.infos if name not in arrays]
        if missing or (unknown and not self.ignore_unknown):
            got = f"'{unknown[0]}'" if unknown else f"none for '{missing[0]}'"
            hint = "" if missing else " (--ignore-unknown leaves out what is no input)"
            raise ArgumentError(expected(f"arrays named after the inputs ({first_few(self.names)}){hint}", got, where))
        if unknown:
            self.notes.append(f"ignored, for no input has the name: {first_few([repr(name) for name in unknown])}")
        parts = {
            name: self._parts(where, name, self._typed(where, name, _plain(arrays[name], name, where)), group.kind, rows)
            for name in self.infos
        }
        count = max(map(len, parts.values()), default=0)
        for name, each in parts.items():
            if len(each) not in (1, count):
                raise ArgumentError(expected(f"{count} samples of every input", f"{len(each)} of '{name}'", where))
        feeds = [{name: each[number if len(each) > 1 else 0] for name, each in parts.items()} for number in range(count)]
        if labels is None:
            return [_Piece(where, feed, None) for feed in feeds]
        return [_Piece(where, feed, each) for feed, each in zip(feeds, self._split_labels(where, feeds, labels), strict=True)]

    def _labels(self, group: Group) -> Array | None:
        """Return the labels of a group, and remember what they are called."""
        if group.labels is not None:
            self.labels_name = self.wanted or IMPLIED[0]
            return as_labels(group.labels, f"labels of {group.where}")
        if self.wanted is not None:
            if self.wanted in self.infos:
                raise ArgumentError(expected("an array of labels that is no input", f"'{self.wanted}'", "labels"))
            if self.wanted not in group.arrays:
                raise ArgumentError(expected(f"labels '{self.wanted}'", first_few([repr(name) for name in group.arrays]), group.where))
            self.labels_name = self.wanted
            return as_labels(group.arrays[self.wanted], f"'{self.wanted}' of {group.where}")
        for name in IMPLIED:
            if name in group.arrays and name not in self.infos:
                try:
                    found = as_labels(group.arrays[name], f"'{name}' of {group.where}")
                except ArgumentError:
                    if self.ignore_unknown:
                        continue
                    raise
                self.labels_name = name
                return found
        return None

    def _split_labels(self, where: str, feeds: Sequence[Feed], labels: Array) -> list[Array]:
        rows = [_rows(feed) for feed in feeds]
        total = sum(rows)
        if not labels.ndim and total == 1:
            labels = labels[None]
        if labels.ndim > 1 and labels.shape[0] == len(feeds) != total and labels.shape[1] == rows[0]:
            labels = labels.reshape(-1, *labels.shape[2:])
        if not labels.ndim or labels.shape[0] != total:
            got = str(labels.shape[0]) if labels.ndim else "one"
            raise ArgumentError(expected(f"{total} labels in '{self.labels_name}', one for each sample", got, where))
        return np.split(labels, np.cumsum(rows)[:-1])

    def check_labels(self, pieces: Sequence[_Piece], origin: str) -> None:
        """Refuse labels that only some samples have."""
        without = [piece.where for piece in pieces if piece.labels is None]
        if without and len(without) < len(pieces):
            raise ArgumentError(expected("labels of every sample or of none", f"none in {without[0]}", origin))

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

    def _parts(self, where: str, name: str, array: Array, kind: str, rows: int) -> list[Array]:
        """Return the feeds of one array, in order."""
        shape = self.shapes[name]
        whole = kind == "input"
        if shape is None or (whole and _fits(array.shape, shape)) or (not shape and not array.shape):
            return [array]
        found = array if whole else self._with_axes(name, array, shape, kind)
        if not whole and found.ndim == len(shape) and _fits(found.shape[1:], shape[1:]):
            step = shape[0] or rows
            if shape[0] and found.shape[0] % step:
                raise ArgumentError(expected(f"a multiple of {step} samples, the model's batch, of '{name}'", str(found.shape[0]), where))
            return [found[first : first + step] for first in range(0, found.shape[0], step)]
        if not whole and found.ndim == len(shape) + 1 and _fits(found.shape[1:], shape):
            return list(found)
        shown = ",".join(str(size or "?") for size in shape)
        raise ArgumentError(expected(f"shape [{shown}] for '{name}'", f"[{','.join(map(str, array.shape))}]", where))

    def _with_axes(self, name: str, array: Array, shape: Sequence[int | None], kind: str) -> Array:
        """Return an array with the axis that it lacks: that of the batch where a loader yields single samples, else one of size 1."""
        if array.ndim != len(shape) - 1:
            return array
        if kind == "batch" and _fits(array.shape, shape[1:]):
            return array[None]
        place = self.lacking(name, array.shape, shape)
        return array if place is None else np.expand_dims(array, place)

    def lacking(self, name: str, sizes: Sequence[int], shape: Sequence[int | None]) -> int | None:
        """Return the axis of size 1 that an array of samples lacks, and note it; None where that is not all it lacks."""
        for place in range(1, len(shape)):
            if shape[place] == 1 and _fits(sizes[1:], (*shape[1:place], *shape[place + 1 :])):
                self.notes.append(f"'{name}' was given an axis of size 1, its axis {place}")
                return place
        return None


def _plain(value: ArrayLike, name: str, where: str) -> Array:
    return np.asarray(unmasked(value, f"'{name}' of {where}"))


def _fits(sizes: Sequence[int], shape: Sequence[int | None]) -> bool:
    return len(sizes) == len(shape) and all(known in (None, size) for size, known in zip(sizes, shape, strict=True))
