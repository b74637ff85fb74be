"""Where files lie: on this machine, or behind a URL that fsspec reads."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from fastbn.errors import FastbnError, StorageError, expected
from fastbn.graph.model.files import os_error

__all__ = ["check_protocol", "ending_of", "is_folder", "is_url", "joined", "names_in", "opened", "read_bytes", "write_bytes"]

# How an fsspec URL begins; a drive of Windows has one letter.
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+(::|://)")


def is_url(name: str) -> bool:
    """Say whether a name is a URL, for fsspec."""
    return URL.match(name) is not None


def check_protocol(name: str) -> None:
    """Raise FastbnError where a name is a URL that nothing here can read or write: fsspec, or what it needs for it, is not installed."""
    if is_url(name):
        with _errors(name):
            _fsspec().core.url_to_fs(name)


def _fsspec() -> Any:  # its file systems have no types
    try:
        import fsspec
    except ImportError as error:
        raise FastbnError("Cannot use a URL: fsspec is not installed (pip install fsspec)") from error
    return fsspec


@contextlib.contextmanager
def _errors(name: str) -> Iterator[None]:
    """Turn what file systems raise into a StorageError about a name."""
    try:
        yield
    except FastbnError:
        raise
    except OSError as error:
        raise os_error(error, name) from error
    except Exception as error:  # fsspec's file systems raise many kinds: of their protocol, their client, their login
        first = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise StorageError(f"Cannot read '{name}': {first}") from error


@contextlib.contextmanager
def opened(name: str) -> Iterator[IO[bytes]]:
    """Open a file for reading; what fails in the block is a StorageError about it, and so is a device or a pipe, which may have no end."""
    if not is_url(name) and os.path.exists(name) and not os.path.isfile(name):
        raise StorageError(expected("a file", "a folder, a device or a pipe", name))
    with _errors(name), _fsspec().open(name, "rb") if is_url(name) else open(name, "rb") as file:
        yield file


def read_bytes(name: str) -> bytes:
    """Return the bytes of a file."""
    with opened(name) as file:
        return bytes(file.read())


def is_folder(name: str) -> bool:
    """Say whether a name is that of a folder."""
    if not is_url(name):
        return os.path.isdir(name)
    with _errors(name):
        system, path = _fsspec().core.url_to_fs(name)
        return bool(system.isdir(path))


def names_in(name: str) -> list[str]:
    """Return what a glob matches, or what lies in a folder, sorted; a name that is neither alone."""
    if not is_url(name):
        if os.path.isdir(name):
            return sorted(os.path.join(name, each) for each in os.listdir(name))
        found = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.lexists(name) else [name]
    else:
        with _errors(name):
            system, path = _fsspec().core.url_to_fs(name)
            is_glob = glob.has_magic(path)
            if not is_glob and not system.isdir(path):
                return [name]
            paths = system.glob(path) if is_glob else system.ls(path, detail=False)
            found = [str(system.unstrip_protocol(each)) for each in sorted(paths)]
    if not found:
        raise StorageError(f"Cannot read '{name}': no file matches it")
    return found


def ending_of(name: str) -> str:
    """Return the ending of a file name, with its dot."""
    return PurePosixPath(name.split("?")[0]).suffix


def joined(place: str, name: str) -> str:
    """Return the name of a file in a folder."""
    return f"{place.rstrip('/')}/{name}" if is_url(place) else os.path.join(place, *name.split("/"))


def write_bytes(name: str, data: bytes) -> None:
    """Write a file behind a URL, its folders made where the file system has some."""
    with _errors(name):
        system, path = _fsspec().core.url_to_fs(name)
        system.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
        system.pipe_file(path, data)
