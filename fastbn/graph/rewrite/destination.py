"""Where files go: checks of a destination before any work is done, and bytes written through what is no file: devices, pipes, streams."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from fastbn.errors import StorageError, expected
from fastbn.graph.model.files import file_path, os_error

if sys.platform != "win32":
    import fcntl

__all__ = ["PathLike", "check_destination", "descriptor_of", "is_stream", "storage_errors", "write_through"]

# A path as users give it.
PathLike: TypeAlias = "str | os.PathLike[str]"

# Folders whose entries are the open streams of this process.
DESCRIPTORS = re.compile(r"/dev/fd|/proc/(self|thread-self|[0-9]+)(/task/[0-9]+)?/fd")

# How mountinfo writes spaces and their like.
OCTAL = re.compile(r"\\([0-7]{3})")

# The most symbolic links that a system follows for one name.
LINKS = 40


@contextlib.contextmanager
def storage_errors(where: PathLike) -> Iterator[None]:
    """Turn an OSError of the block, or a ValueError about a NUL in a path, into a StorageError about `where`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise os_error(error, str(where)) from error
    except ValueError as error:
        if "null" not in str(error):
            raise
        raise StorageError(expected("a path", str(error), str(where))) from error


def descriptor_of(path: PathLike) -> int | None:
    """Return the number of the open stream that a name such as /dev/stdout or /dev/fd/3 means, None for any other name."""
    path = os.path.abspath(path)
    for _ in range(LINKS):
        folder, name = os.path.split(path)
        if name.isdecimal():
            real = os.path.realpath(folder)
            is_own = not real.startswith("/proc/") or real.split("/")[2] == str(os.getpid())
            if is_own and DESCRIPTORS.fullmatch(real):
                return int(name)
        try:
            path = os.path.join(folder, os.readlink(path))
        except (OSError, ValueError):
            return None
    return None


def is_stream(path: PathLike) -> bool:
    """Say whether a name leads to a device, a pipe or an open stream: bytes are written into it, and it is never replaced by a file."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return descriptor_of(path) is not None
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or descriptor_of(path) is not None


def check_destination(path: PathLike) -> None:
    """Refuse, before any work is done, a place where no file can be put.

    Raises
    ------
    StorageError
        It is a folder, a disk or a socket, the name is empty or not valid, or its folder takes no new file.
    """
    name = os.fsdecode(path)
    file = file_path(name, "an output file")
    with storage_errors(name):
        mode: int | None = None
        with contextlib.suppress(FileNotFoundError):
            mode = os.stat(name).st_mode
    number = descriptor_of(name)
    if number is not None:
        _check_descriptor(number, name)
        return
    if mode is not None and (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
        if not os.access(name, os.W_OK):
            raise StorageError(f"Cannot write to the device or pipe '{name}': permission denied")
        return
    if mode is not None and not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFBLK: "a disk", stat.S_IFSOCK: "a socket"}
        raise StorageError(expected("an output file", kinds.get(stat.S_IFMT(mode), "something else"), name))
    _check_folder(file)


def _check_descriptor(number: int, name: str) -> None:
    with storage_errors(name):
        os.fstat(number)
        if sys.platform != "win32" and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise StorageError(expected("a stream that is open for writing", "one for reading", name))


def _check_folder(path: Path) -> None:
    folder = path.parent
    if not os.path.isdir(folder):
        raise StorageError(f"Cannot write '{path}': there is no folder '{folder}'")
    if not os.access(folder, os.W_OK):
        raise StorageError(f"Cannot write '{path}': no file can be made in the folder '{folder}'")
    if os.path.lexists(path):
        if _is_mount_point(path):
            raise StorageError(f"Cannot replace '{path}': it is a mount point, as containers have them for single files; mount its folder")
        its_folder, old = os.stat(folder), os.lstat(path)
        if its_folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, its_folder.st_uid, old.st_uid):
            raise StorageError(f"Cannot replace '{path}': it is another user's, and in this folder only the owner may replace a file")


def _is_mount_point(path: Path) -> bool:
    """Say whether something is mounted on a file, under which another cannot take its place; Linux alone tells."""
    place = os.path.join(os.path.realpath(path.parent), path.name)
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            return any(OCTAL.sub(lambda code: chr(int(code[1], 8)), line.split(" ")[4]) == place for line in lines)
    except OSError:
        return False


def write_through(path: PathLike, data: bytes) -> None:
    """Write bytes into a device, a pipe or an open stream."""
    with storage_errors(path):
        number = descriptor_of(path)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        opened = os.open(path, os.O_WRONLY | getattr(os, "O_NOCTTY", 0)) if number is None else os.dup(number)
        with open(opened, "wb") as file:
            file.write(data)
