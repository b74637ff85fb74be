"""Where files go: checked before any work is done, then replaced whole or not at all; what is no file is written through.

A new file comes to be in a room, a hidden folder beside it, and is renamed into place when everything else is done. The room is locked as
long as its run lives, so that the next run can tell what a killed one left, and removes it. One rule holds for every name: it gets a new
file, and whatever else leads to the old one, a hard link or the target of a symbolic link, keeps the old one.
"""

import contextlib
import errno
import json
import mmap
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

from fastbn.errors import StorageError, expected
from fastbn.graph.model.storage import os_error, utf8_path

try:
    import fcntl
except ImportError:  # then a room has no lock, and nobody removes it but its own run
    fcntl = None

__all__ = [
    "Replacement",
    "Room",
    "atomic",
    "check_destination",
    "descriptor_of",
    "is_stream",
    "storage_errors",
    "work_room",
    "write_through",
]

ROOM = re.compile(r"\.fastbn-[0-9a-f]{16}")

# Tries to make a room that no other run takes for a leftover between its making and its locking.
TRIES = 20

# Folders whose entries are the open streams of this process.
DESCRIPTORS = re.compile(r"/dev/fd|/proc/(self|thread-self|[0-9]+)(/task/[0-9]+)?/fd")

# The number of symbolic links that a system follows at most.
LINKS = 40


@contextlib.contextmanager
def storage_errors(where) -> Iterator[None]:
    """Turn what the system says in the block into a StorageError about `where`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise os_error(error, str(where)) from error
    except ValueError as error:  # a NUL in a name
        if "null" not in str(error):
            raise
        raise StorageError(expected("a path", str(error), str(where))) from error


def sync(path) -> None:
    """Wait until a file's bytes are on the disk: a full one is noticed here at the latest."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def descriptor_of(path) -> int | None:
    """Return the number of the open stream that a name such as /dev/stdout or /dev/fd/3 means, or None."""
    path = os.path.abspath(path)
    for _ in range(LINKS):
        folder, name = os.path.split(path)
        if name.isdecimal():
            real = os.path.realpath(folder)
            own = not real.startswith("/proc/") or real.split("/")[2] == str(os.getpid())
            if own and DESCRIPTORS.fullmatch(real):
                return int(name)
        try:
            path = os.path.join(folder, os.readlink(path))
        except (OSError, ValueError):
            return None
    return None


def is_stream(path) -> bool:
    """Say whether a name leads to a device, a pipe or an open stream: these are written through, never replaced."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return descriptor_of(path) is not None
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or descriptor_of(path) is not None


def check_destination(path) -> None:
    """Refuse, before any work is done, a place where no file can be put.

    Raises
    ------
    StorageError
        It is a folder, a disk or a socket, it is no name, or its folder takes no new file.
    """
    name = str(path)
    if not name:
        raise StorageError(expected("an output file", "an empty name", name))
    with storage_errors(name):
        try:
            mode = os.stat(name).st_mode
        except FileNotFoundError:
            mode = None
    number = descriptor_of(name)
    if number is not None:
        _check_descriptor(number, name)
        return
    if mode is not None and (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
        if not os.access(name, os.W_OK):
            raise StorageError(expected("a device or pipe that may be written to", "one that may not", name))
        return
    if mode is not None and not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFBLK: "a disk", stat.S_IFSOCK: "a socket"}
        raise StorageError(expected("an output file", kinds.get(stat.S_IFMT(mode), "something else"), name))
    _check_folder(Path(name))


def _check_descriptor(number, name):
    with storage_errors(name):
        os.fstat(number)
        if fcntl is not None and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise StorageError(expected("a stream that is open for writing", "one for reading", name))


def _check_folder(path):
    folder = path.parent
    if not os.path.isdir(folder):
        raise StorageError(expected("an existing output folder", "none", str(folder)))
    if not os.access(folder, os.W_OK):
        raise StorageError(expected("a writable output folder", "one that is not", str(folder)))
    if os.path.lexists(path):
        around, old = os.stat(folder), os.lstat(path)
        if around.st_mode & stat.S_ISVTX and os.geteuid() not in (0, around.st_uid, old.st_uid):
            raise StorageError(expected("a file that may be replaced", "another user's, in a folder where only its owner may", str(path)))


def write_through(path, data) -> None:
    """Write bytes into a device, a pipe or an open stream."""
    with storage_errors(path):
        number = descriptor_of(path)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        opened = os.open(path, os.O_WRONLY | getattr(os, "O_NOCTTY", 0)) if number is None else os.dup(number)
        with open(opened, "wb") as file:
            file.write(data)


class Room:
    """A hidden folder in `folder`, the system's temporary one by default, which lives as long as this object and is locked meanwhile."""

    def __init__(self, folder=None):
        where = folder or tempfile.gettempdir()
        folder = Path(os.path.abspath(where))
        with storage_errors(where):
            _remove_leftovers(folder)
            for _ in range(TRIES):
                self.path = folder / f".fastbn-{os.urandom(8).hex()}"
                self._lock = []
                self.close = weakref.finalize(self, _close, self.path, self._lock)  # before it exists: an interrupt may come in between
                self.path.mkdir(mode=0o700)
                if self._locked():
                    return
                self.close()
        raise StorageError(expected("a folder for what is being written", "one that others remove", str(folder)))

    def _locked(self):
        """Lock the folder; say whether it is still there: another run may have taken it for a leftover."""
        if fcntl is None:
            return True
        try:
            self._lock.append(os.open(self.path, os.O_RDONLY))
            held = _lock(self._lock[0])
            return held is None or (held and os.path.samestat(os.fstat(self._lock[0]), os.stat(self.path)))
        except FileNotFoundError:
            return False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def work_room(folder=None) -> Room:
    """Return a room in which onnxruntime may read: it takes no path that is not UTF-8, so a folder that is not, or that the locale does not
    know to be, gives way to the temporary one."""
    usable = folder is not None and utf8_path(os.path.abspath(folder)) == os.path.abspath(folder)
    return Room(folder if usable else None)


def _lock(descriptor):
    """Lock an open folder; return whether that was possible, None on a file system that has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _close(path, lock):
    _settle(path)
    shutil.rmtree(path, ignore_errors=True)
    for descriptor in lock:
        os.close(descriptor)


def _remove_leftovers(folder):
    """Remove the rooms of runs that are gone: those of this user whose lock is free."""
    if fcntl is None:
        return
    for name in _listed(folder):
        if not ROOM.fullmatch(name):
            continue
        room = os.path.join(folder, name)
        try:
            descriptor = os.open(room, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        if os.fstat(descriptor).st_uid == os.geteuid() and _lock(descriptor):
            _close(room, [descriptor])
        else:
            os.close(descriptor)


def _listed(folder):
    try:
        return os.listdir(folder)
    except OSError:  # a folder may be closed for reading and open for writing
        return []


# What a room holds: the file on its way, and what is to happen beside it. While the file is there, it has not taken its place.
FILE, JOURNAL = "file", "journal"


def _settle(room):
    """Bring what a room has done beside its folder to an end: without its file in place, the new data files go; with it, the old ones."""
    try:
        with open(os.path.join(room, JOURNAL), encoding="utf-8") as file:
            journal = json.load(file)
    except (OSError, ValueError):
        return
    waiting = os.path.lexists(os.path.join(room, FILE))
    folder = os.path.dirname(room)
    for name, identity in journal["new" if waiting else "old"]:
        path = os.path.join(folder, os.path.basename(os.fsdecode(name.encode("utf-8", "surrogateescape"))))
        with contextlib.suppress(OSError):
            if _identity(path) == identity and (waiting or not _is_mentioned(name, folder)):
                os.unlink(path)


def _is_mentioned(name, folder):
    """Say whether a model in a folder may read a data file: whether its bytes hold the name."""
    for other in _listed(folder):
        path = os.path.join(folder, other)
        if ".onnx" not in other or other.endswith(".data") or not os.path.isfile(path) or not os.path.getsize(path):
            continue
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data.find(name.encode("utf-8", "surrogateescape")) >= 0:
                return True
    return False


def _identity(path):
    found = os.lstat(path)
    return [found.st_dev, found.st_ino]


class Replacement:
    """A file on its way to its place, with data files that go beside it.

    Attributes
    ----------
    path, temporary : Path
        The place, and where the caller writes the file meanwhile.
    committed : bool
        Whether the file is in its place.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.committed = False
        self._place = Path(os.path.abspath(path))
        self._room = Room(self._place.parent)
        self._data = []
        self.temporary = self._room.path / FILE
        try:
            with storage_errors(path):
                os.close(os.open(self.temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except BaseException:
            self.close()
            raise

    def data_file(self, name) -> Path:
        """Return where the caller writes a data file that will be called `name`, a name that nothing has yet."""
        place = self._place.parent / name
        temporary = self._room.path / f"data{len(self._data)}"
        self._data.append((temporary, place))
        return temporary

    def finish(self) -> None:
        """Say that all files are written: their bytes go to the disk, and the owner and mode of what they replace are theirs."""
        with storage_errors(self.path):
            for temporary, _ in (*self._data, (self.temporary, None)):
                _become_like(temporary, self._place)
                sync(temporary)

    def size(self) -> int:
        """Return the bytes of all files as they are now."""
        return sum(path.stat().st_size for path in (self.temporary, *(temporary for temporary, _ in self._data)))

    def commit(self, obsolete=()) -> None:
        """Put the files in place: first the data files, under names that are new, then the file, which is the one moment at which old
        becomes new; then remove the obsolete data files. An interrupt waits until that is done."""
        with storage_errors(self.path):
            if self._data or obsolete:
                self._write_journal(obsolete)
            with _undivided():
                for temporary, place in self._data:
                    _publish(temporary, place)
                _sync_folder(self._place.parent)
                os.replace(self.temporary, self._place)
                self.committed = True
                _sync_folder(self._place.parent)
                self._room.close()

    def _write_journal(self, obsolete):
        lists = {
            "new": [(place, temporary) for temporary, place in self._data],
            "old": [(path, path) for path in obsolete if os.path.lexists(path)],
        }
        journal = {
            when: [(os.fsencode(place.name).decode("utf-8", "surrogateescape"), _identity(held)) for place, held in files]
            for when, files in lists.items()
        }
        part = self._room.path / f"{JOURNAL}.part"
        part.write_text(json.dumps(journal), encoding="utf-8")
        sync(part)
        part.rename(self._room.path / JOURNAL)

    def close(self) -> None:
        """Remove what is not in its place."""
        self._room.close()


def _publish(temporary, place):
    """Give a data file its name, unless something has that by now, and no other: onnx reads no data file that has two names."""
    try:
        os.link(temporary, place)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from None
        os.rename(temporary, place)
    else:
        os.unlink(temporary)


def _become_like(temporary, path):
    """Give a new file the mode, the owner and the group of the one that it replaces, as far as that is permitted."""
    try:
        old, new = os.stat(path), os.stat(temporary)
    except FileNotFoundError:
        return
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        for owner in (old.st_uid, -1):
            try:
                os.chown(temporary, owner, old.st_gid)
                break
            except OSError:
                continue
    os.chmod(temporary, stat.S_IMODE(old.st_mode) & 0o777)


def _sync_folder(folder):
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _undivided():
    """Let an interrupt (Ctrl-C) wait until the block is done."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting = []
    signal.signal(signal.SIGINT, lambda *given: waiting.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if waiting:
        handler(*waiting[0])


@contextlib.contextmanager
def atomic(path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, its file takes path's place, or is written through where path is no file."""
    if is_stream(path):
        with Room() as room, storage_errors(path):
            temporary = room.path / FILE
            yield temporary
            data = temporary.read_bytes()
        write_through(path, data)
        return
    replacement = Replacement(path)
    try:
        with storage_errors(path):
            yield replacement.temporary
        replacement.finish()
        replacement.commit()
    finally:
        replacement.close()
