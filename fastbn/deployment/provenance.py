"""What a signature under a report needs: which files, when, where, and what the figures depend on."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import onnx

from fastbn.graph.digests import Digest, DigestFields

if TYPE_CHECKING:
    from fastbn.graph.model.storage import Source

__all__ = ["Provenance", "ProvenanceFields", "Versions", "now_and_here", "versions"]


class ProvenanceFields(TypedDict):
    """A Provenance as JSON holds it."""

    input: list[DigestFields]
    output: list[DigestFields]
    data: DigestFields | None
    date: str
    host: str


@dataclass(frozen=True)
class Provenance:
    """Where a deployment comes from and where it went.

    Attributes
    ----------
    input, output : tuple of Digest
        The model that was given and the one that is shipped, the model's file first, then those of its data; output is empty where nothing
        is shipped, and where a model with data files is not written yet.
    data : Digest or None
        Of the file of samples, or of the samples that were used; None where the model could not be run.
    date, host : str
        UTC, as ISO 8601 has it; the name of the machine.
    """

    input: tuple[Digest, ...]
    output: tuple[Digest, ...] = ()
    data: Digest | None = None
    date: str = ""
    host: str = ""

    def to_dict(self) -> ProvenanceFields:
        """Return the fields as JSON holds them."""
        return {
            "input": [each.to_dict() for each in self.input],
            "output": [each.to_dict() for each in self.output],
            "data": None if self.data is None else self.data.to_dict(),
            "date": self.date,
            "host": self.host,
        }


def now_and_here(source: Source) -> Provenance:
    """Return the Provenance of a deployment that begins, of a model as it was given; raises StorageError where a file cannot be read."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    if source.path is None:
        given: tuple[Digest, ...] = (Digest.of_bytes(source.name, source.to_bytes()),)
    else:
        given = tuple(map(Digest.of_file, [source.path, *sorted(map(Path, source.data_files()))]))
    return Provenance(given, date=date, host=platform.node())


class Versions(TypedDict):
    """What a figure depends on: versions, machine."""

    fastbn: str
    onnx: str
    onnxruntime: str
    numpy: str
    python: str
    platform: str
    cpu: str


def versions() -> Versions:
    """Return what figures depend on."""
    import onnxruntime

    import fastbn

    return {
        "fastbn": fastbn.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "cpu": _cpu_name(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
