"""onnxruntime's quantizer in a process of its own: it has a time limit, an interrupt ends it at once, and a crash ends nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self, TypedDict

from fastbn.deployment.quantize import MARK, Job, Made, QuantizerRefused, feed_path
from fastbn.deployment.recipe import Recipe
from fastbn.graph.model.files import os_error

if TYPE_CHECKING:
    from fastbn.graph.parity.feeds import Feed

__all__ = ["Quantizer"]

# What the process runs: with the caller's module search path, and without the caller's script.
PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from fastbn.deployment.quantize import serve; serve()"

# Seconds in which an interrupt is noticed where waiting for a queue cannot be interrupted (Windows), seconds in which a process that has
# closed its output must end, and bytes of a line.
NOTICE, ENDING, LONGEST = 0.2, 2, 1 << 16


class Answer(TypedDict, total=False):
    """What the process answers: progress while it works, at last notes and nodes, or refused."""

    progress: str
    notes: list[str]
    nodes: list[str]
    refused: str


class _Process:
    """A started process, and the lines that it prints; the last is None."""

    def __init__(self, command: list[str]) -> None:
        # An interrupt from the terminal reaches the caller alone, who ends the process.
        session: dict[str, Any] = (  # subprocess.CREATE_NEW_PROCESS_GROUP exists on Windows alone
            {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)} if os.name == "nt" else {"start_new_session": True}
        )
        self.lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **session)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._reader = threading.Thread(target=_read, args=(self._stdout, self.lines), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def ask(self, job: Job) -> None:
        """Write a job into its stdin."""
        with contextlib.suppress(OSError):  # that the process has ended is noticed when its answer is read
            self._stdin.write(json.dumps(job).encode() + b"\n")
            self._stdin.flush()

    def end(self, seconds: float) -> int:
        """Wait this long until the process ends by itself, kill it then, and return its exit code."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._reader.join()
        for stream in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                stream.close()
        return code


class Quantizer:
    """Quantizes model files, one after the other, in one process, which is gone when the block ends.

    Not multiprocessing: that would run the caller's script again, and a daemon process could not use it.

    Parameters
    ----------
    folder : Path
        Where the feeds and intermediate files are written.
    feeds : list of dict of name -> array
        To calibrate on.
    seconds : float
        What one model may take.
    """

    def __init__(self, folder: Path, feeds: list[Feed], seconds: float) -> None:
        self.folder = folder
        self.feeds = feeds
        self.seconds = seconds
        self._written = 0
        self.process: _Process | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def quantize(
        self,
        path: Path,
        target: Path,
        *,
        recipe: Recipe,
        most_feeds: int | None = None,
        optimize: bool = True,
        only: Sequence[str] = (),
        left: Sequence[str] = (),
        restated: Sequence[tuple[Path, Sequence[int]]] = (),
        seconds: float | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Made:
        """Quantize a model file, as `quantize.quantize_file` does, on the first `most_feeds` feeds.

        Raises
        ------
        QuantizerRefused
            The quantizer raises, ends, or gives no answer in time.
        StorageError
            The feeds cannot be written.
        """
        count = len(self.feeds[:most_feeds])
        self._write(count)
        limit = self.seconds if seconds is None else seconds
        job: Job = {
            "path": os.path.abspath(path),
            "target": os.path.abspath(target),
            "folder": os.path.abspath(self.folder),
            "feeds": count,
            "recipe": recipe.to_dict(),
            "optimize": optimize,
            "only": [*only],
            "left": [*left],
            "restated": [(os.path.abspath(place), [*numbers]) for place, numbers in restated],
            "seconds": limit,
        }
        if self.process is None:
            self.process = _started()
        self.process.ask(job)
        answer = self._answer(self.process.lines, limit, progress or (lambda text: None))
        refused = answer.get("refused")
        if refused is not None:
            raise QuantizerRefused(refused)
        return Made(tuple(answer.get("notes", ())), tuple(answer.get("nodes", ())))

    def _write(self, count: int) -> None:
        """Write the feeds that are not written yet: paths are handed over, no arrays."""
        for number in range(self._written, count):
            path = feed_path(self.folder, number)
            try:
                with open(path, "wb") as file:
                    pickle.dump(self.feeds[number], file, protocol=5)
            except OSError as error:
                raise os_error(error, str(path)) from error
            self._written = number + 1

    def _answer(self, lines: queue.SimpleQueue[bytes | None], limit: float, progress: Callable[[str], None]) -> Answer:
        """Return the last answer to a job; whatever goes wrong ends the process."""
        end = time.monotonic() + limit
        last = ""
        while (rest := end - time.monotonic()) > 0:
            try:
                line = lines.get(timeout=min(rest, NOTICE))
            except queue.Empty:
                continue
            if line is None:
                raise QuantizerRefused(f"onnxruntime's quantizer {_ended(self._end(ENDING))}{last}")
            if not line.startswith(MARK):
                last = f": {line.decode(errors='replace').strip()[:300]}"
                continue
            answer: Answer = json.loads(line[len(MARK) :])
            if "progress" not in answer:
                return answer
            progress(answer["progress"])
        self._end()
        raise QuantizerRefused(f"onnxruntime's quantizer gives no answer in {limit:g} s; --quantize-timeout may give it more")

    def _end(self, seconds: float = 0) -> int:
        """End the process, if there is one, after these seconds at the latest, and return its exit code."""
        process, self.process = self.process, None
        return 0 if process is None else process.end(seconds)


def _started() -> _Process:
    if getattr(sys, "frozen", False) or not sys.executable:
        raise QuantizerRefused("onnxruntime's quantizer needs a Python process of its own, and this program cannot start one")
    try:
        return _Process([sys.executable, "-c", PROGRAM, *(entry for entry in sys.path if isinstance(entry, str))])
    except OSError as error:
        raise QuantizerRefused(f"onnxruntime's quantizer has no process: {error.strerror or error}") from error


def _read(stream: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    """Put the lines of a stream into a queue, None at its end."""
    for line in iter(lambda: stream.readline(LONGEST), b""):
        lines.put(line)
    lines.put(None)


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
