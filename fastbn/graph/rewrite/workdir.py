"""Hidden working folders for files that are being written, and the removal of those that killed runs left behind.

A new file is written in a workdir, a hidden folder beside its destination, and renamed into its place when all is done. A workdir is locked
as long as its run lives. A later run removes every workdir whose lock is free, after it has brought what the killed run was doing to an end
(see `_recover`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import weakref
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from fastbn.errors import StorageError
from fastbn.graph.model.files import utf8_path
from fastbn.graph.rewrite.destination import PathLike, storage_errors
from fastbn.interrupts import interrupts_deferred

# Without locks (Windows), no run removes the workdirs of others.
if sys.platform != "win32":
    import fcntl

__all__ = ["FILE", "JOURNAL", "Identity", "Workdir", "identity_of", "remove_leftovers", "runtime_workdir"]

NAME = re.compile(r"\.fastbn-[0-9a-f]{16}")

# Tries to make a workdir that no other run removes, as one left behind, between its making and its locking.
TRIES = 20

# Bytes that are searched at a time.
PIECE = 1 << 24

# What a workdir of a Replacement holds: the new file until it takes its place, and the journal of the data files beside it.
FILE, JOURNAL = "file", "journal"

# Device and inode of a file.
Identity: TypeAlias = list[int]


class Workdir:
    """A hidden folder, locked, which is removed when it is closed or this object is.

    Parameters
    ----------
    folder : path, optional
        Where to make it; the system's temporary folder by default.

    Attributes
    ----------
    path : Path

    Raises
    ------
    StorageError
        It cannot be made there.
    """

    def __init__(self, folder: PathLike | None = None) -> None:
        where = folder or _temporary_folder()
        parent = Path(os.path.abspath(where))
        with storage_errors(where):
            remove_leftovers(parent)
            for _ in range(TRIES):
                self.path = parent / f".fastbn-{os.urandom(8).hex()}"
                self._descriptors: list[int] = []
                # Before the folder exists: an interrupt may come in between.
                self._finalizer = weakref.finalize(self, _close, self.path, self._descriptors)
                self.path.mkdir(mode=0o700)
                if self._locked():
                    return
                self.close()
        raise StorageError(f"Cannot make a working folder in '{parent}': another process removes it")

    def _locked(self) -> bool:
        """Lock the folder; say whether it is still there: another run may have removed it before it was locked."""
        if sys.platform == "win32":
            return True
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            self._descriptors.append(descriptor)
            is_held = _lock(descriptor)
            return is_held is None or (is_held and os.path.samestat(os.fstat(descriptor), os.stat(self.path)))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Remove the folder and all that is in it; a second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Workdir:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _temporary_folder() -> str:
    """Return the system's temporary folder; raises StorageError where there is none."""
    try:
        return tempfile.gettempdir()
    except OSError as error:
        raise StorageError(f"Cannot use the temporary folder: {(error.strerror or str(error)).lower()}") from error


def runtime_workdir(folder: PathLike | None = None) -> Workdir:
    """Return a Workdir from which onnxruntime can read: in `folder` where that path is UTF-8 in this locale, else in the temporary one."""
    if folder is not None and utf8_path(os.path.abspath(folder)) == os.path.abspath(folder):
        return Workdir(folder)
    return Workdir()


def _lock(descriptor: int) -> bool | None:
    """Lock an open folder; return whether that was possible, None on a system or file system that has no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _close(path: Path, descriptors: list[int]) -> None:
    with interrupts_deferred():
        if _recover(path):
            shutil.rmtree(path, ignore_errors=True)
        for descriptor in descriptors:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the workdirs of runs that have ended: those of this user whose lock is free."""
    if sys.platform == "win32":
        return
    for name in _entries(folder):
        if not NAME.fullmatch(name):
            continue
        leftover = folder / name
        try:
            descriptor = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        if os.fstat(descriptor).st_uid == os.geteuid() and _lock(descriptor):
            _close(leftover, [descriptor])
        else:
            os.close(descriptor)


def _entries(folder: Path) -> list[str]:
    """Return the names in a folder; none where it may be written to and not read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _recover(workdir: Path) -> bool:
    """Bring the replacement of a workdir to an end, as its journal of data files says; say whether that was possible: if not, a later run
    tries once more.

    Where the new file is still in the workdir, it has not taken its place: the new data files beside the workdir are removed. Otherwise the
    data files that only the old file read are removed, unless another model in the folder names them.
    """
    try:
        with open(workdir / JOURNAL, encoding="utf-8") as file:
            journal = json.load(file)
    except (FileNotFoundError, ValueError):
        return True
    except OSError:
        return False
    is_done = True
    is_waiting = os.path.lexists(workdir / FILE)
    folder = workdir.parent
    for name, identity in journal["new" if is_waiting else "old"]:
        path = folder / os.path.basename(os.fsdecode(name.encode("utf-8", "surrogateescape")))
        try:
            if identity_of(path) == identity and (is_waiting or not _is_mentioned(name, folder)):
                os.unlink(path)
        except (FileNotFoundError, PermissionError):  # gone, or another's
            continue
        except OSError:
            is_done = False
    return is_done


def _is_mentioned(name: str, folder: Path) -> bool:
    """Say whether a model in a folder may read a data file: whether its bytes hold the name."""
    for other in _entries(folder):
        path = os.path.join(folder, other)
        if ".onnx" not in other or other.endswith(".data") or not os.path.isfile(path) or not os.path.getsize(path):
            continue
        if _holds(path, name.encode("utf-8", "surrogateescape")):
            return True
    return False


def _holds(path: str, data: bytes) -> bool:
    """Say whether a file holds some bytes; it is read piece by piece, and not mapped: it may become shorter meanwhile."""
    end = b""
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            if data in end + piece:
                return True
            end = (end + piece)[-len(data) :]
    return False


def identity_of(path: PathLike) -> Identity:
    """Return device and inode of a file, not of what a symbolic link leads to."""
    status = os.lstat(path)
    return [status.st_dev, status.st_ino]
