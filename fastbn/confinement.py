"""Limits of time and memory for models from strangers: the command does its work in a process of its own, which the system ends.

The process asks before its files take their places: whatever ends it before that has written nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from fastbn.errors import ArgumentError, FastbnError, expected
from fastbn.sizes import LEAST_MEMORY, bytes_in

__all__ = ["Ended", "Limits", "confine", "confined", "is_confined", "limits_in", "may_deliver"]

# The most seconds, and the most bytes.
MOST_SECONDS, MOST_MEMORY = 1e6, 1 << 50

SECONDS = re.compile(r"[0-9]{1,7}(\.[0-9]{1,6})?")

# Seconds after which the process is ended that an interrupt has not ended, and ends itself where nobody else has ended it.
GRACE = 5

# What is written into the pipes: the question whether files may take their places, and the answer.
READY, GO = b"r", b"g"

# The program of the process. argv[1] is a list of what it needs, in JSON.
PROGRAM = """\
import signal
is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if is_ours:  # until there is something to tidy up
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import json, sys
path, words, memory, seconds, closed, ends = json.loads(sys.argv[1])
sys.path[:] = path
from fastbn.confinement import confine
confine(memory, seconds, closed, *ends)
from fastbn.cli import main
if is_ours:
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(words))
"""


@dataclass(frozen=True)
class Limits:
    """What the work may take: bytes of memory, seconds by the clock; None is no limit."""

    memory: int | None = None
    seconds: float | None = None


class Ended(FastbnError):
    """The work took more than it may, or its process crashed.

    Attributes
    ----------
    is_harmless : bool
        Whether nothing was written.
    """

    def __init__(self, reason: str, is_harmless: bool) -> None:
        super().__init__(reason)
        self.is_harmless = is_harmless


def limits_in(text: str) -> Limits:
    """Return the Limits that a text such as memory=2G,time=60 gives; raises ArgumentError where it gives none."""
    given: dict[str, str] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name in given and name in ("memory", "time"):
            raise ArgumentError(expected(f"one {name}", "two", "--limits"))
        given[name] = value
    seconds = SECONDS.fullmatch(given.pop("time", "0"))
    size = given.pop("memory", None)
    if given or seconds is None or "=" not in text:
        raise ArgumentError(expected("memory=SIZE,time=SECONDS, as memory=2G,time=60", repr(text[:200]), "--limits"))
    found = Limits(None if size is None else bytes_in(size, "--limits"), float(seconds[0]) if "time=" in text else None)
    if found.memory is not None and not LEAST_MEMORY <= found.memory <= MOST_MEMORY:
        raise ArgumentError(expected(f"a memory of {LEAST_MEMORY >> 20}M or more, up to {MOST_MEMORY >> 40}T", str(size), "--limits"))
    if found.seconds is not None and not 0 < found.seconds <= MOST_SECONDS:
        raise ArgumentError(expected(f"a time above 0 s and up to {MOST_SECONDS:.0f} s", f"{seconds[0]} s", "--limits"))
    return found


# ---- the process that waits ----


def confined(words: Sequence[str], limits: Limits, closed: Collection[str], what: str) -> int:
    """Run the command with these words in a process of its own, and return its exit code.

    Parameters
    ----------
    words : sequence of str
        The command line, without the name of the program.
    limits : Limits
    closed : collection of str
        Which of the standard streams were closed when this process began.
    what : str
        What is done, for errors: "fold 'model.onnx'".

    Raises
    ------
    Ended
        The work took too long, or its process was ended by a signal.
    ArgumentError
        This system cannot limit a process.
    """
    if sys.platform != "linux" or getattr(sys, "frozen", False) or not sys.executable:
        raise ArgumentError("Cannot limit time and memory: that needs Linux, and a Python that can start another")
    (asked, ask), (answered, answer) = os.pipe(), os.pipe()
    path = [entry for entry in sys.path if isinstance(entry, str)]
    given = json.dumps([path, list(words), limits.memory, limits.seconds, sorted(closed), [ask, answered]])
    command = [sys.executable, "-c", PROGRAM, given]
    # An interrupt from the terminal reaches this process alone, which hands it on.
    process = subprocess.Popen(command, pass_fds=(ask, answered), start_new_session=True)
    for end in (ask, answered):
        os.close(end)
    try:
        is_ready = _wait(process, limits, asked, answer)
    except BaseException:
        process.kill()
        raise
    finally:
        code = process.wait()
        for end in (asked, answer):
            os.close(end)
    if is_ready is None:
        raise Ended(f"Cannot {what}: it took more than {limits.seconds:g} s", True)
    if code == -signal.SIGINT and not is_ready:  # before the command could say so itself
        raise KeyboardInterrupt
    if code < 0:
        raise Ended(f"Cannot {what}: the work was ended by {_signal_name(-code)}", not is_ready)
    return code


def _wait(process: subprocess.Popen[bytes], limits: Limits, asked: int, answer: int) -> bool | None:
    """Wait until the process ends; say whether its files might take their places, None where it has been ended for its time."""
    end = None if limits.seconds is None else time.monotonic() + limits.seconds
    is_ready = is_interrupted = False
    while True:
        try:
            rest = None if end is None else max(0.0, end - time.monotonic())
            is_late = not select.select([asked], [], [], rest)[0]
            if not is_late and not os.read(asked, 1):
                return is_ready
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            if not is_ready:  # a run of onnxruntime is deaf to it
                end, is_interrupted = time.monotonic() + GRACE, True
            continue
        if is_late:
            process.kill()
            if is_interrupted:
                raise KeyboardInterrupt
            return None
        is_ready, end = True, None
        with contextlib.suppress(BrokenPipeError):  # it has ended meanwhile
            os.write(answer, GO)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# ---- the process that works ----

_ask_to_deliver: Callable[[], None] | None = None


def is_confined() -> bool:
    """Say whether this is the process that works within limits."""
    return _ask_to_deliver is not None


def may_deliver() -> None:
    """Ask whether files may take their places; where nobody limits this process, that is so."""
    if _ask_to_deliver is not None:
        _ask_to_deliver()


def confine(memory: int | None, seconds: float | None, closed: Sequence[str], ask: int, answered: int) -> None:
    """Put this process, which has done nothing yet, under limits.

    Parameters
    ----------
    memory, seconds : int or None, float or None
        As in Limits. What counts as memory is what the process may write to and shares with nobody: files that are mapped do not.
    closed : sequence of str
        The standard streams that are to be closed.
    ask, answered : int
        The ends of pipes: to ask whether files may take their places, and for the answer.
    """
    global _ask_to_deliver
    import resource

    if memory is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if seconds is not None:  # this needs no lock of the interpreter, which a loop in C++ may hold
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=nowhere)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if name in closed:
            os.close(number)
            setattr(sys, name, None)
    if sys.stderr is not None:  # what C++ says when it ends the process is no sentence of ours
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors)
        os.dup2(nowhere, 2)
    go = threading.Event()

    def listen() -> None:
        while os.read(answered, 1):
            go.set()
        os._exit(os.EX_SOFTWARE)  # nobody waits for this process any more

    threading.Thread(target=listen, daemon=True).start()

    def ask_to_deliver() -> None:
        faulthandler.cancel_dump_traceback_later()
        os.write(ask, READY)
        go.wait()

    _ask_to_deliver = ask_to_deliver
