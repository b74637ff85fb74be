"""Data files, on this machine or behind an fsspec URL: the shapes of their arrays, and rows of these."""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy

from fastbn.cluster.locations import ending_of, opened
from fastbn.errors import FastbnError, StorageError, expected

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["UNPACKED", "ArrayFile", "arrays_in", "rows_of"]

# Compressed arrays that a process keeps unpacked, each in a temporary file.
MOST_UNPACKED = 4

# Bytes that are copied at once.
CHUNK = 1 << 20


@dataclass(frozen=True)
class ArrayFile:
    """One array in a .npy file, or in a .npz file.

    Attributes
    ----------
    name : str
        The path or URL.
    member : str or None
        Its name in a .npz file.
    shape : tuple of int
    dtype : str
        As NumPy's files spell it.
    """

    name: str
    member: str | None
    shape: tuple[int, ...]
    dtype: str

    def rows(self, start: int, stop: int) -> Array:
        """Return some entries along axis 0; a file that is no longer what it was is a StorageError."""
        with opened(self.name) as file, _member(file, self) as stream:
            shape, fortran, dtype = _header(stream, self.name)
            if shape != self.shape or dtype.str != self.dtype:
                raise StorageError(expected(f"{self.dtype} {list(self.shape)}, as before", f"{dtype.str} {list(shape)}", self.name))
            if fortran:
                whole: Array = _read(stream, int(np.prod(shape)) * dtype.itemsize, self.name).view(dtype).reshape(shape, order="F")
                return np.ascontiguousarray(whole[start:stop])
            size = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
            stream.seek(start * size, os.SEEK_CUR)
            return _read(stream, (stop - start) * size, self.name).view(dtype).reshape(stop - start, *shape[1:])

    def whole(self) -> Array:
        """Return the array."""
        with opened(self.name) as file, _member(file, self) as stream:
            shape, fortran, dtype = _header(stream, self.name)
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            return _read(stream, size, self.name).view(dtype).reshape(shape, order="F" if fortran else "C")


def arrays_in(name: str) -> dict[str, ArrayFile]:
    """Return the arrays of a .npy or .npz file by name, that of a .npy file by the name of the file; no values are read.

    Raises
    ------
    StorageError
        The file cannot be read, or holds something else.
    """
    with opened(name) as file:
        try:
            if ending_of(name) == ".npy":
                return {PurePosixPath(name).stem: _array_file(file, name, None)}
            with zipfile.ZipFile(file) as archive:
                members = [each for each in archive.namelist() if each.endswith(".npy")]
                found = {}
                for member in members:
                    with archive.open(member) as stream:
                        found[member.removesuffix(".npy")] = _array_file(stream, name, member)
                return found
        except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
            if isinstance(error, FastbnError):
                raise
            raise StorageError(expected(f"a {ending_of(name)} file of numbers", str(error).splitlines()[0], name)) from error


def _array_file(stream: IO[bytes], name: str, member: str | None) -> ArrayFile:
    shape, _, dtype = _header(stream, name)
    return ArrayFile(name, member, shape, dtype.str)


def _header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return (shape, whether in Fortran's order, dtype), and leave a stream at the first value."""
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, TypeError, EOFError) as error:
        raise StorageError(expected("an array of numbers in NumPy's format", str(error).splitlines()[0], name)) from error
    if dtype.hasobject:
        raise StorageError(expected("an array of numbers", "one of Python objects", name))
    return shape, fortran, dtype


def _read(stream: IO[bytes], size: int, name: str) -> Array:
    """Return so many bytes."""
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size:
        piece = stream.read(min(size - filled, 64 * CHUNK))
        if not piece:
            raise StorageError(expected(f"{size} bytes more", f"{filled}", name))
        view[filled : filled + len(piece)] = piece
        filled += len(piece)
    return np.frombuffer(data, np.uint8)


@contextlib.contextmanager
def _member(file: IO[bytes], array: ArrayFile) -> Iterator[IO[bytes]]:
    """Return the stream of an array: within the file, or within what has been unpacked from it."""
    if array.member is None:
        yield file
        return
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo(array.member)
        if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
            file.seek(info.header_offset + 26)
            sizes = np.frombuffer(file.read(4), "<u2")
            file.seek(int(sizes.sum()), os.SEEK_CUR)
            yield file
            return
        with UNPACKED.lock:
            yield UNPACKED.get(archive, info, array.name)


class _Unpacked:
    """Compressed arrays as temporary files: rows of them can be read, and no memory is taken.

    Attributes
    ----------
    lock : threading.Lock
        Held by the thread that reads one of the files.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._files: OrderedDict[tuple[str, str, int], IO[bytes]] = OrderedDict()

    def get(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> IO[bytes]:
        """Return the file of a member, at its first byte."""
        key = name, info.filename, info.CRC
        if key not in self._files:
            target = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as rows of it are read
            with archive.open(info) as stream:
                while piece := stream.read(CHUNK):
                    target.write(piece)
            self._files[key] = target
            while len(self._files) > MOST_UNPACKED:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(key)
        self._files[key].seek(0)
        return self._files[key]

    def close(self) -> None:
        """Remove the files."""
        while self._files:
            self._files.popitem()[1].close()


UNPACKED = _Unpacked()
atexit.register(UNPACKED.close)


def rows_of(array: ArrayFile, numbers: Sequence[int]) -> Array:
    """Return the entries of these numbers along axis 0: one read where they follow each other."""
    first, last = numbers[0], numbers[-1]
    if last - first + 1 == len(numbers):
        return array.rows(first, last + 1)
    return np.concatenate([array.rows(number, number + 1) for number in numbers])
