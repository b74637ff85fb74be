"""What the command says: lines on streams that may be closed, full or unable to show a name, folded to their width; progress."""

import contextlib
import os
import shutil
import sys

from fastbn.errors import StorageError, expected

__all__ = ["Progress", "Steps", "complain", "emit", "flush", "give_up", "open_streams", "printable", "width_of"]

# Characters of a progress bar.
BAR = 20

# The fewest columns that a line is folded to.
NARROWEST = 40


def open_streams() -> set[str]:
    """Open what was closed of the three standard streams on the null device, so that no file takes their place; return their names."""
    closed = set()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The system gives the lowest free number; a child process is to find all three as well.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            closed.add(name)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
            closed.add(name)
    return closed


def width_of(stream) -> int | None:
    """Return the columns of a terminal, None for another stream."""
    return max(NARROWEST, shutil.get_terminal_size().columns) if stream.isatty() else None


def printable(text, stream) -> str:
    """Return a text as a stream takes it: names may hold control characters, or some that it has no code for."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def emit(text, stream) -> None:
    """Print one line, coloured on a terminal. A reader that has gone away has had enough; a full disk is a StorageError."""
    with _writing(stream):
        print(_coloured(printable(text, stream), stream), file=stream)


def flush(stream) -> None:
    """Hand over what has been printed."""
    with _writing(stream):
        stream.flush()


def complain(text) -> None:
    """Print one line on stderr, if that takes it."""
    with contextlib.suppress(StorageError):
        emit(text, sys.stderr)
        flush(sys.stderr)


@contextlib.contextmanager
def _writing(stream):
    try:
        yield
    except BrokenPipeError:
        give_up(stream)
    except OSError as error:
        give_up(stream)
        name = "stdout" if stream is sys.stdout else "stderr"
        raise StorageError(expected("a stream that takes the output", (error.strerror or str(error)).lower(), name)) from error


def give_up(stream):
    """Let the rest of a stream go nowhere: Python would try once more when it exits."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _coloured(line, stream):
    if os.environ.get("NO_COLOR") or not stream.isatty():
        return line
    for word, colour in (("  folded", 32), ("  kept", 33), ("parity", 36), ("WARNING", 33), ("shipped", 36)):
        if line.startswith(word):
            return f"\x1b[{colour}m{word}\x1b[0m{line[len(word) :]}"
    return line


class Progress:
    """One line on stderr that says what is being verified, when stderr is a terminal; gone when the work is done."""

    def __init__(self, quiet):
        self.shown = not quiet and sys.stderr.isatty()
        self.width = 0

    def __call__(self, text):
        if self.shown:
            text = printable(text, sys.stderr)[: width_of(sys.stderr) - 1]
            self._show(f"\r{text:<{self.width}}")
            self.width = len(text)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.shown and self.width:
            self._show(f"\r{'':<{self.width}}\r")

    def _show(self, text):
        with contextlib.suppress(StorageError), _writing(sys.stderr):
            print(text, end="", file=sys.stderr, flush=True)


class Steps(Progress):
    """A bar with what is being done behind it, on a terminal; one line a step in a log."""

    def __init__(self, quiet):
        super().__init__(quiet)
        self.logged = not quiet and not self.shown
        self.number = 0

    def __call__(self, number, total, step, detail=""):
        if self.logged and number != self.number:
            complain(f"fastbn: {number}/{total} {step}")
        self.number = number
        bar = "#" * round(BAR * (number - 1) / total)
        super().__call__(f"[{bar:-<{BAR}}] {number}/{total} {step}{': ' if detail else ''}{detail}")
