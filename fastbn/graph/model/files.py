"""Files that are read: their names, what the system says of them, and whether they are still what they were."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from fastbn.errors import StorageError, expected

__all__ = ["Signature", "file_path", "opened", "os_error", "signature_of", "utf8_path"]


def os_error(error: OSError, where: str) -> StorageError:
    """Return a StorageError with the message of the operating system."""
    return StorageError(f"Cannot use '{where}': {(error.strerror or str(error)).lower()}")


def file_path(name: str | os.PathLike[str], what: str) -> Path:
    """Return the path of a file; raises StorageError for a name that only a folder may have, which Path would take for that of a file."""
    text = os.fsdecode(name)
    if not text or text.endswith(os.sep):
        raise StorageError(expected(what, f"{'the name of a folder' if text else 'an empty name'}", text))
    return Path(text)


def utf8_path(path: str | os.PathLike[str]) -> str | None:
    """Return a path as libraries in C++ take it, whatever the locale: as text whose UTF-8 is the name; None where the name is no UTF-8."""
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        return None


class Signature(NamedTuple):
    """What tells a file from another, and from itself after a change."""

    device: int
    inode: int
    size: int
    modified: int


def signature_of(path: Path) -> Signature | None:
    """Return the Signature of a file, None where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return Signature(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a data file; one that has become a pipe or a device since it was checked is an error, and does not hang."""
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise StorageError(expected("a data file", "something that is no file", str(path)))
            yield file
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise os_error(error, str(path)) from error
