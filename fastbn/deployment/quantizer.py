"""onnxruntime's quantiser in a process of its own: it has a time limit, an interrupt ends it at once, and what it breaks is its own."""

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
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from types import TracebackType

from fastbn.deployment.quantize import MARK, QuantizerRefused, Recipe, feed_path
from fastbn.graph.model.storage import os_error

__all__ = ["Quantizer"]

# What the process runs. The module search path is that of the caller, and nothing of his own script.
PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from fastbn.deployment.quantize import serve; serve()"

# Seconds in which an interrupt is noticed where waiting for a queue cannot be interrupted (Windows), seconds in which a process that has
# closed its output must end, and bytes of a line.
NOTICE, ENDING, LONGEST = 0.2, 2, 1 << 16


class Quantizer:
    """Quantises model files, one after the other, in one process, which is gone when the block ends.

    multiprocessing would run the caller's script again, and needs a parent that is no daemon; this does neither.

    Parameters
    ----------
    folder : Path
        Where the feeds are written, and what lies between.
    feeds : list of dict of name -> array
        To calibrate on.
    seconds : float
        What one model may take.
    """

    def __init__(self, folder: Path, feeds: list[dict], seconds: float) -> None:
        self.folder = folder
        self.feeds = feeds
        self.seconds = seconds
        self.written = 0
        self.process: subprocess.Popen | None = None
        self.reader: threading.Thread | None = None
        self.lines: queue.SimpleQueue = queue.SimpleQueue()

    def __enter__(self) -> "Quantizer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def quantize(
        self,
        path: Path,
        target: Path,
        *,
        recipe: Recipe,
        most_feeds: int | None = None,
        optimise: bool = True,
        seconds: float | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> tuple[str, ...]:
        """Quantise a model file, as `quantize.quantize_file` does, on the first `most_feeds` feeds; return what else was done to it.

        Raises
        ------
        QuantizerRefused
            The quantiser raises, ends, or gives no answer in time.
        StorageError
            The feeds cannot be written.
        """
        count = len(self.feeds[:most_feeds])
        self._write(count)
        limit = self.seconds if seconds is None else seconds
        job = {
            "path": os.path.abspath(path),
            "target": os.path.abspath(target),
            "folder": os.path.abspath(self.folder),
            "feeds": count,
            "recipe": astuple(recipe),
            "optimise": optimise,
            "seconds": limit,
        }
        self._ask(job)
        answer = self._answer(limit, progress or (lambda text: None))
        if "refused" in answer:
            raise QuantizerRefused(answer["refused"])
        return tuple(answer["notes"])

    def _write(self, count: int) -> None:
        """Write the feeds that are not written yet: paths are handed over, no arrays."""
        for number in range(self.written, count):
            path = feed_path(self.folder, number)
            try:
                with open(path, "wb") as file:
                    pickle.dump(self.feeds[number], file, protocol=5)
            except OSError as error:
                raise os_error(error, str(path)) from error
            self.written = number + 1

    def _ask(self, job: dict) -> None:
        if self.process is None:
            self._start()
        with contextlib.suppress(OSError):  # a process that has ended says so when the answer is awaited
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()

    def _start(self) -> None:
        if getattr(sys, "frozen", False) or not sys.executable:
            raise QuantizerRefused("onnxruntime's quantiser needs a Python process of its own, and this program cannot start one")
        command = [sys.executable, "-c", PROGRAM, *(entry for entry in sys.path if isinstance(entry, str))]
        # A session of its own: an interrupt from the terminal reaches the caller alone, who ends the process.
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **apart)
        except OSError as error:
            raise QuantizerRefused(f"onnxruntime's quantiser has no process: {error.strerror or error}") from error
        self.lines = queue.SimpleQueue()
        self.reader = threading.Thread(target=_read, args=(self.process.stdout, self.lines), daemon=True)
        self.reader.start()

    def _answer(self, limit: float, progress: Callable[[str], None]) -> dict:
        """Return the last answer to a job; whatever goes wrong ends the process."""
        end = time.monotonic() + limit
        last = ""
        while (rest := end - time.monotonic()) > 0:
            try:
                line = self.lines.get(timeout=min(rest, NOTICE))
            except queue.Empty:
                continue
            if line is None:
                raise QuantizerRefused(f"onnxruntime's quantiser {_ended(self._end(kill=False))}{last}")
            if not line.startswith(MARK):
                last = f": {line.decode(errors='replace').strip()[:300]}"
                continue
            answer = json.loads(line[len(MARK) :])
            if "progress" not in answer:
                return answer
            progress(answer["progress"])
        self._end()
        raise QuantizerRefused(f"onnxruntime's quantiser gives no answer in {limit:g} s; --quantize-timeout may give it more")

    def _end(self, kill: bool = True) -> int:
        """End the process, if there is one, and return its exit code."""
        process, self.process = self.process, None
        if process is None:
            return 0
        try:
            code = process.wait(0 if kill else ENDING)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        self.reader.join()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                stream.close()
        return code


def _read(stream: object, lines: queue.SimpleQueue) -> None:
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
