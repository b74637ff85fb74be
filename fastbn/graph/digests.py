"""SHA-256 of files and bytes, by which a file is known again."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypedDict

from fastbn.errors import StorageError

__all__ = ["Digest", "DigestFields"]


class DigestFields(TypedDict):
    """A Digest as JSON holds it."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Digest:
    """The name of a file, or of what is no file, and the SHA-256 of its bytes."""

    name: str
    sha256: str

    @classmethod
    def of_bytes(cls, name: str, data: bytes) -> Self:
        """Return the Digest of some bytes."""
        return cls(name, hashlib.sha256(data).hexdigest())

    @classmethod
    def of_file(cls, path: str | os.PathLike[str], name: str | None = None) -> Self:
        """Return the Digest of a file, which may lie elsewhere than its name says; raises StorageError where it cannot be read."""
        try:
            with open(path, "rb") as file:
                return cls(str(Path(path) if name is None else name), hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise StorageError(f"Cannot use '{path}': {(error.strerror or str(error)).lower()}") from error

    def to_dict(self) -> DigestFields:
        """Return the fields as JSON holds them."""
        return {"name": self.name, "sha256": self.sha256}
