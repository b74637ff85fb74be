"""Data files of a written model: which weights stay in them and where, and patched copies of the original's files."""

from __future__ import annotations

import itertools
import os
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto

from fastbn.errors import StorageError, expected
from fastbn.graph.model.constant import Scaled
from fastbn.graph.model.external import location_of
from fastbn.graph.model.storage import Source
from fastbn.interrupts import in_order_of_end, submitted

__all__ = ["Patch", "Patches", "new_data_names", "patched_layout", "set_external", "stem_of", "write_patched"]

# onnxruntime maps a tensor instead of reading it where its offset is a multiple of this.
PAGE = 4096

# Threads that write a data file: one computes while another waits for the system; more would only need more memory.
WRITERS = 2

# Bytes of a file name that file systems take, less those that tell data files apart.
LONGEST_STEM = 255 - len(".9999.data")


@dataclass(eq=False)
class Patch:
    """A folded weight that is written into a data file.

    Parameters
    ----------
    scope : int
        The number of the scope that the tensor stands in.
    tensor : onnx.TensorProto
    constant : Scaled
        The values.
    location : str
        The name of the data file, as the original has it.
    offset : int or None
        Where the values begin; None: behind the end of the original's file.
    """

    scope: int
    tensor: TensorProto
    constant: Scaled
    location: str
    offset: int | None

    @property
    def size(self) -> int:
        """The bytes of the values."""
        return self.constant.size * self.constant.dtype.itemsize


class Patches:
    """The folded weights that are written into data files.

    Parameters
    ----------
    source : storage.Source
        The original model.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.entries: list[Patch] = []
        # Places that a patch takes, and for each data file the sorted begins and the sorted ends of all external tensors in it.
        self._taken: set[tuple[str, int | None]] = set()
        self._ranges: dict[str, tuple[list[int], list[int]]] | None = None

    def add(self, scope: int, tensor: TensorProto, constant: Scaled) -> None:
        """Leave a weight in its data file: over its old bytes where no other tensor or patch uses these, else behind the last byte."""
        location, offset = location_of(tensor), self.source.place(tensor).offset
        begins, ends = self._used_ranges()[location]
        users = bisect_left(begins, offset + constant.size * constant.dtype.itemsize) - bisect_right(ends, offset)
        own = None if users > 1 or (location, offset) in self._taken else offset
        self._taken.add((location, own))
        self.entries.append(Patch(scope, tensor, constant, location, own))

    def _used_ranges(self) -> dict[str, tuple[list[int], list[int]]]:
        """Return location -> (begins, ends) of all external tensors of the original, each sorted."""
        if self._ranges is None:
            ranges: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
            for tensor in self.source.external_tensors:
                _, offset, length = self.source.place(tensor)
                ranges[location_of(tensor)].append((offset, offset + length))
            self._ranges = {name: (sorted(each[0] for each in used), sorted(each[1] for each in used)) for name, used in ranges.items()}
        return self._ranges


def stem_of(path: Path) -> str:
    """Return what the names of a model's data files begin with: its file name, cut where it leaves no room for an ending; '_' for
    what is not UTF-8."""
    name = os.fsencode(path.name).decode("utf-8", "replace").replace("\ufffd", "_")
    return name.encode("utf-8")[:LONGEST_STEM].decode("utf-8", "ignore")


def new_data_names(path: Path) -> Iterator[str]:
    """Yield names for data files of the model at `path` that no file beside it has."""
    for number in itertools.count():
        name = f"{stem_of(path)}{f'.{number}' if number else ''}.data"
        if not os.path.lexists(path.parent / os.fsdecode(name.encode("utf-8"))):
            yield name


def set_external(tensor: TensorProto, key: str, value: str) -> None:
    """Set an entry (location, offset or length) of an external tensor."""
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
            return
    tensor.external_data.add(key=key, value=value)


def patched_layout(patches: Sequence[Patch], size: int) -> tuple[list[int], int]:
    """Return (offset of each patch, size of the patched file) for a file of `size` bytes.

    A patch without an offset goes behind the end, on a page of its own.
    """
    offsets: list[int] = []
    for patch in patches:
        offset = patch.offset
        if offset is None:
            offset = -(-size // PAGE) * PAGE
            size = offset + patch.size
        offsets.append(offset)
    return offsets, size


def write_patched(source: Path, target: Path, patches: Sequence[Patch], offsets: Sequence[int], size: int) -> None:
    """Write a copy of a data file, of `size` bytes, in which patches replace the bytes at their offsets.

    Raises
    ------
    StorageError
        The data file is shorter than it was when the copy began.
    """
    covered = sorted((offset, offset + patch.size) for patch, offset in zip(patches, offsets, strict=True))
    with open(source, "rb") as reader, open(target, "xb") as writer, ThreadPoolExecutor(1) as flusher, ThreadPoolExecutor(WRITERS) as pool:
        writer.truncate(size)
        end = os.fstat(reader.fileno()).st_size
        jobs: list[Future[None]] = []
        position = 0
        for start, stop in [*covered, (end, end)]:
            jobs.append(submitted(pool, _copy_range, writer.fileno(), reader.fileno(), position, min(start, end)))
            position = max(position, stop)
        for patch, offset in zip(patches, offsets, strict=True):
            jobs.append(submitted(pool, _write_constant_at, writer.fileno(), offset, patch.constant))
        try:
            flushes: list[Future[None]] = []
            for job in in_order_of_end(jobs):
                job.result()
                # Start writing to the disk what is there already: the sync at the end then has little left to do.
                flushes.append(submitted(flusher, os.fsync, writer.fileno()))
            for flush in flushes:
                flush.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _copy_range(target: int, source: int, start: int, stop: int) -> None:
    """Copy the bytes from start to stop from one descriptor to another."""
    while start < stop:
        chunk = os.pread(source, min(1 << 20, stop - start), start)
        if not chunk:
            raise StorageError(expected(f"a data file of {stop} bytes", f"{start}", "external data"))
        _write_at(target, memoryview(chunk), start)
        start += len(chunk)


def _write_constant_at(target: int, offset: int, constant: Scaled) -> None:
    for first, piece in constant.pieces():
        _write_at(target, piece.reshape(-1).view(np.uint8).data, offset + first * piece.dtype.itemsize)


def _write_at(target: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(target, data, offset)
        data, offset = data[written:], offset + written
