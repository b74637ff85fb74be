"""One model of a zoo: read, folded and verified in a process of its own, with limits, and written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from fastbn.cluster.locations import is_url, joined, opened, read_bytes, write_bytes
from fastbn.errors import FastbnError, StorageError
from fastbn.graph.model.external import external_tensors, location_of
from fastbn.graph.model.storage import model_in
from fastbn.zoo.names import Entry
from fastbn.zoo.result import Outcome, Status

__all__ = ["Limits", "end_processes", "fold_one"]

# What the process runs: its limit of memory first, then the command, with the caller's module search path.
PROGRAM = """
import json, sys
memory, arguments, sys.path[:] = json.loads(sys.argv[1])
if memory:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
try:
    from fastbn.cli import main
    code = main(arguments)
except BaseException as error:
    print(f"fastbn: Cannot fold: {type(error).__name__}: {error}", file=sys.stderr)
    code = 70
sys.exit(code)
"""

# Exit code of the command -> what became of the model; 2 and others: failed.
CODES: dict[int, Status] = {0: "ok", 1: "parity", 5: "unverified"}

# Bytes that are hashed at once, and characters of a reason.
CHUNK, LONGEST = 1 << 20, 300


@dataclass(frozen=True)
class Limits:
    """What one model may take: seconds, and bytes of memory, 0 for as much as there is."""

    seconds: float
    memory: int


class _Processes:
    """The processes that run now; the threads of one program share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    @contextlib.contextmanager
    def started(self, command: Sequence[str], output: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Start a process, in a session of its own: an interrupt from the terminal reaches the caller alone, who ends it."""
        with self._lock:
            if self._ended:
                raise FastbnError("Cannot go on: the run has been interrupted")
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=output, start_new_session=os.name != "nt"
            )
            self._running.add(process)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            with self._lock:
                self._running.discard(process)

    def end(self, for_good: bool) -> None:
        """End all that run; for good: start no others until this is called again."""
        with self._lock:
            self._ended = for_good
            for process in self._running:
                process.kill()


_PROCESSES = _Processes()
end_processes = _PROCESSES.end


def fold_one(entry: Entry, options: Sequence[str], limits: Limits, before: Outcome | None) -> Outcome:
    """Fold and verify one model; return what became of it, whatever that is.

    Parameters
    ----------
    entry : Entry
    options : sequence of str
        Of `fastbn fold`.
    limits : Limits
    before : Outcome or None
        Of an earlier run: where the files and the options are the same and its result is there, nothing is done.
    """
    began = time.perf_counter()
    outcome = Outcome(entry.source, entry.output, "failed")
    try:
        with tempfile.TemporaryDirectory(prefix="fastbn-zoo-", ignore_cleanup_errors=True) as folder:
            outcome = _folded(entry, options, limits, before, Path(folder))
    except (FastbnError, OSError) as error:
        outcome = replace(outcome, reason=" ".join(str(error).split())[:LONGEST])
    return outcome if outcome.status == "there" else replace(outcome, seconds=time.perf_counter() - began)


def _folded(entry: Entry, options: Sequence[str], limits: Limits, before: Outcome | None, folder: Path) -> Outcome:
    path = _fetched(entry.source, folder) if is_url(entry.source) else Path(entry.source)
    sha256, size = _digest(path)
    key = hashlib.sha256(json.dumps([*options]).encode()).hexdigest()[:16]
    outcome = Outcome(entry.source, entry.output, "failed", size_before=size, sha256=sha256, options=key)
    if (
        before is not None
        and (before.sha256, before.options, before.output) == (sha256, key, entry.output)
        and before.is_written
        and _is_there(entry)
    ):
        return replace(before, status="there")
    target = folder / "out" / "model.onnx" if is_url(entry.output) else Path(entry.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    report = folder / "report.json"
    status, reason = _run([os.fspath(path), os.fspath(target), "--json", os.fspath(report), "-q", *options], limits)
    outcome = replace(outcome, status=status, reason=reason)
    if not report.exists():  # exit code 1 without a report is none of the command
        return replace(outcome, status="failed") if status == "parity" else outcome
    found = json.loads(report.read_text(encoding="utf-8"))
    norms, parity = found["batch_normalizations"], found["parity"] or {}
    error, allowed = (each if isinstance(each, float) else None for each in (parity.get("error"), parity.get("allowed")))
    outcome = replace(outcome, before=norms["before"], after=norms["after"], error=error, allowed=allowed)
    written = [Path(each) for each in found["written"]]
    if not outcome.is_written:
        return outcome
    if is_url(entry.output):
        for each in written:
            name = PurePosixPath(entry.output).name if each == written[0] else each.name
            write_bytes(joined(str(entry.output).rpartition("/")[0], name), each.read_bytes())
    return replace(outcome, size_after=sum(each.stat().st_size for each in written))


def _is_there(entry: Entry) -> bool:
    try:
        with opened(entry.output):
            return True
    except StorageError:
        return False


def _fetched(source: str, folder: Path) -> Path:
    """Copy a model, and the data files beside it, into a folder."""
    place, _, name = source.rpartition("/")
    path = folder / "in" / name
    path.parent.mkdir()
    path.write_bytes(read_bytes(source))
    proto = model_in(path)
    for location in sorted({location_of(tensor) for tensor in external_tensors(proto)}) if proto is not None else ():
        other = path.parent / location
        if other.resolve().is_relative_to(path.parent.resolve()):  # another is refused when the model is read
            other.parent.mkdir(parents=True, exist_ok=True)
            other.write_bytes(read_bytes(joined(place, location)))
    return path


def _digest(path: Path) -> tuple[str, int]:
    """Return the SHA-256 of a model and of the data files beside it, and their bytes."""
    digest, size = hashlib.sha256(), 0
    with opened(os.fspath(path)):
        proto = model_in(path)
    locations = sorted({location_of(tensor) for tensor in external_tensors(proto)}) if proto is not None else []
    for each in [path, *(path.parent / location for location in locations)]:
        if each.is_file():
            with open(each, "rb") as file:
                while piece := file.read(CHUNK):
                    digest.update(piece)
                    size += len(piece)
    return digest.hexdigest(), size


def _run(arguments: list[str], limits: Limits) -> tuple[Status, str]:
    """Run `fastbn fold` in a process; return (status, reason)."""
    path = [entry for entry in sys.path if isinstance(entry, str)]
    command = [sys.executable, "-c", PROGRAM, json.dumps([limits.memory, ["fold", *arguments], path])]
    with tempfile.TemporaryFile() as errors, _PROCESSES.started(command, errors) as process:
        try:
            code = process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            return "time", f"it takes more than {limits.seconds:g} s; --timeout may give it more"
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    last = said[-1].removeprefix("fastbn: ")[:LONGEST] if said else ""
    if code < 0 or code not in (*CODES, 2, 3, 70):
        name = signal.Signals(-code).name if code < 0 and -code in {each.value for each in signal.Signals} else f"exit code {code}"
        return "crashed", f"its process was ended by {name}{f': {last}' if last else ''}"
    return CODES.get(code, "failed"), "" if code == 0 else last
