"""Files that take the place of others, with their data files, all or nothing.

One rule holds for every name: it gets a new file, and whatever else leads to the old one, a hard link or the target of a symbolic link,
keeps the old one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastbn.graph.digests import Digest
from fastbn.graph.rewrite.destination import PathLike, is_stream, storage_errors, write_through
from fastbn.graph.rewrite.workdir import FILE, JOURNAL, Workdir, identity_of
from fastbn.interrupts import interrupts_deferred

__all__ = ["Replacement", "atomic"]

# The attribute that holds a POSIX access list (ACL).
ACCESS_LIST = "system.posix_acl_access"


class Replacement:
    """A file that will take the place of another, or of none, with data files beside it.

    Attributes
    ----------
    path, temporary : Path
        The place, and where the caller writes the file until it is committed.
    committed : bool
        Whether the file is in its place.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self.committed = False
        self._place = Path(os.path.abspath(path))
        self._workdir = Workdir(self._place.parent)
        self._data: list[tuple[Path, Path]] = []
        self.temporary = self._workdir.path / FILE
        try:
            with storage_errors(path):
                os.close(os.open(self.temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except BaseException:
            self.close()
            raise

    def data_file(self, name: str) -> Path:
        """Return where the caller writes a data file that will be called `name`; no file may have that name yet."""
        place = self._place.parent / name
        temporary = self._workdir.path / f"data{len(self._data)}"
        self._data.append((temporary, place))
        return temporary

    def finish(self) -> None:
        """Say that all files are written: they get the permissions of the file that they replace, and their bytes go to the disk."""
        with storage_errors(self.path):
            for temporary in (*(temporary for temporary, _ in self._data), self.temporary):
                _copy_permissions(self._place, temporary)
                _sync(temporary)

    def size(self) -> int:
        """Return the bytes of all files as they are now."""
        return sum(path.stat().st_size for path in (self.temporary, *(temporary for temporary, _ in self._data)))

    def digests(self) -> list[Digest]:
        """Return the SHA-256 of the file and of its data files as they are now, by the names that they will have."""
        pairs = [(self.temporary, self.path), *((temporary, self.path.parent / place.name) for temporary, place in self._data)]
        return [Digest.of_file(temporary, str(place)) for temporary, place in pairs]

    def commit(self, obsolete: Sequence[Path] = ()) -> None:
        """Put the files in place and remove the obsolete data files. An interrupt waits until that is done.

        First the data files get their names, which are new; then the file replaces the old one in one step of the file system. A run that
        is killed before that step leaves the old model, after it the new one; the journal tells a later run what to remove.
        """
        with storage_errors(self.path):
            if self._data or obsolete:
                self._write_journal(obsolete)
            with interrupts_deferred():
                for temporary, place in self._data:
                    _put_in_place(temporary, place)
                _sync_folder(self._place.parent)
                os.replace(self.temporary, self._place)
                self.committed = True
                _sync_folder(self._place.parent)
                self._workdir.close()

    def _write_journal(self, obsolete: Sequence[Path]) -> None:
        """Write the names of the new and the obsolete data files, each with the identity of its file, as Workdir reads them."""
        files = {
            "new": [(place, temporary) for temporary, place in self._data],
            "old": [(path, path) for path in obsolete if os.path.lexists(path)],
        }
        journal = {
            key: [(os.fsencode(place.name).decode("utf-8", "surrogateescape"), identity_of(file)) for place, file in pairs]
            for key, pairs in files.items()
        }
        part = self._workdir.path / f"{JOURNAL}.part"
        part.write_text(json.dumps(journal), encoding="utf-8")
        _sync(part)
        part.rename(self._workdir.path / JOURNAL)

    def close(self) -> None:
        """Remove the files that are not in their places."""
        self._workdir.close()


def _sync(path: Path) -> None:
    """Wait until a file's bytes are on the disk: a full disk is an error here at the latest."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _put_in_place(temporary: Path, place: Path) -> None:
    """Give a data file its name, unless a file has it by now; it keeps no other name, because onnx reads no data file with two."""
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


def _copy_permissions(place: Path, temporary: Path) -> None:
    """Give a new file the owner, the group, the mode and the access list of the one that it replaces, as far as that is permitted. What
    cannot be kept makes the file no more open: another group gets what others have. A program that is run as its owner stays none."""
    try:
        old, new = os.stat(place), os.stat(temporary)
    except FileNotFoundError:
        return
    has_group = old.st_gid == new.st_gid
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        for owner in (old.st_uid, -1):
            try:
                os.chown(temporary, owner, old.st_gid)
                has_group = True
                break
            except OSError:
                continue
    mode = stat.S_IMODE(old.st_mode) & 0o777
    is_whole = _copy_access_list(place, temporary) and has_group
    os.chmod(temporary, mode if is_whole else mode & (0o707 | (mode & 0o007) << 3))


def _copy_access_list(place: Path, temporary: Path) -> bool:
    """Give a new file the POSIX access list of another, or none where that has none; say whether that was possible."""
    if not hasattr(os, "getxattr"):
        return True
    with contextlib.suppress(OSError):
        os.removexattr(temporary, ACCESS_LIST)  # one that the folder gives to new files
    try:
        access = os.getxattr(place, ACCESS_LIST)
    except OSError:  # there is none, or the file system knows no such lists
        return True
    try:
        os.setxattr(temporary, ACCESS_LIST, access)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def atomic(path: PathLike, text: str) -> Iterator[None]:
    """Write a file under another name; when the block ends well, it takes path's place. A device, a pipe or a stream is written then."""
    data = text.encode("utf-8")
    if is_stream(path):
        yield
        write_through(path, data)
        return
    with contextlib.closing(Replacement(path)) as replacement:
        with storage_errors(path):
            replacement.temporary.write_bytes(data)
        replacement.finish()
        yield
        replacement.commit()
