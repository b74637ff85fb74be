"""What the command says: lines on streams that may be closed, full or unable to show a name, folded to their width; progress."""

import contextlib
import os
import sys
import unicodedata
from collections.abc import Iterator
from types import TracebackType
from typing import Self, TextIO

from fastbn.errors import StorageError

__all__ = ["Progress", "Steps", "Tally", "complain", "emit", "flush", "give_up", "open_streams", "printable", "width_of"]

# Characters of a progress bar.
BAR = 20

# The fewest columns that a line is folded to, and the columns of a terminal that does not say how many it has.
NARROWEST, USUAL = 40, 80

# Characters that a complaint shows of its beginning and of its end: names and values may have thousands.
BEGINNING, END = 600, 200


def open_streams() -> set[str]:
    """Open what was closed of the three standard streams on the null device, so that no file takes their place; return their names."""
    closed = set()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # os.open takes the lowest free descriptor, which is this one. Child processes inherit it, so that they find all three open.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            closed.add(name)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
            closed.add(name)
    return closed


def width_of(stream: TextIO) -> int | None:
    """Return the columns that lines are folded to: those of a terminal, None for another stream."""
    return max(NARROWEST, _columns(stream)) if stream.isatty() else None


def _columns(stream: TextIO) -> int:
    """Return the columns of a terminal."""
    given = os.environ.get("COLUMNS", "")
    if given.isascii() and given.isdecimal() and int(given):
        return int(given)
    with contextlib.suppress(OSError, ValueError):  # a stream of a test has no descriptor
        return os.get_terminal_size(stream.fileno()).columns or USUAL
    return USUAL


def _is_plain(stream: TextIO) -> bool:
    """Say whether a stream takes lines alone: it is no terminal, or one that cannot do more."""
    return not stream.isatty() or os.environ.get("TERM") == "dumb"


def _cut(text: str, columns: int) -> tuple[str, int]:
    """Return as much of a text as so many columns of a terminal hold, and how many it takes there."""
    taken = 0
    for place, char in enumerate(text):
        wide = 0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if taken + wide > columns:
            return text[:place], taken
        taken += wide
    return text, taken


def printable(text: str, stream: TextIO) -> str:
    """Return a text as a stream takes it: names may hold control characters, or some that it has no code for."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def emit(text: str, stream: TextIO) -> None:
    """Print one line, colored on a terminal. Nothing happens where the reader of a pipe has ended; a full disk is a StorageError."""
    with _writing(stream):
        print(_colored(printable(text, stream), stream), file=stream)


def flush(stream: TextIO) -> None:
    """Hand over what has been printed."""
    with _writing(stream):
        stream.flush()


def complain(text: str) -> None:
    """Print one line on stderr, if that takes it; the middle of a very long one is left out."""
    if len(text) > BEGINNING + END:
        text = f"{text[:BEGINNING]} ... {text[-END:]}"
    with contextlib.suppress(StorageError):
        emit(text, sys.stderr)
        flush(sys.stderr)


@contextlib.contextmanager
def _writing(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        give_up(stream)
    except OSError as error:
        give_up(stream)
        name = "stdout" if stream is sys.stdout else "stderr"
        raise StorageError(f"Cannot write to {name}: {(error.strerror or str(error)).lower()}") from error


def give_up(stream: TextIO) -> None:
    """Let the rest of a stream go nowhere: Python would try once more when it exits."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _colored(line: str, stream: TextIO) -> str:
    if os.environ.get("NO_COLOR") or _is_plain(stream):
        return line
    for word, color in (("  folded", 32), ("  kept", 33), ("parity", 36), ("WARNING", 33), ("shipped", 36)):
        if line.startswith(word):
            return f"\x1b[{color}m{word}\x1b[0m{line[len(word) :]}"
    return line


class _StatusLine:
    """One line on stderr that is overwritten, when stderr is a terminal; it is cleared when the block ends."""

    def __init__(self, quiet: bool) -> None:
        self.shown = not quiet and not _is_plain(sys.stderr)
        self._length = 0

    def show(self, text: str) -> None:
        """Replace the line."""
        if self.shown:
            text, length = _cut(printable(text, sys.stderr), _columns(sys.stderr) - 1)
            self._print(f"\r{text}{' ' * (self._length - length)}")
            self._length = length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.shown and self._length:
            self._print(f"\r{'':<{self._length}}\r")

    def _print(self, text: str) -> None:
        with contextlib.suppress(StorageError), _writing(sys.stderr):
            print(text, end="", file=sys.stderr, flush=True)


class Progress(_StatusLine):
    """What is being verified, as the status line."""

    def __call__(self, text: str) -> None:
        self.show(text)


def _bar(done: int, total: int) -> str:
    return f"[{'#' * round(BAR * done / max(total, 1)):-<{BAR}}]"


class Steps(_StatusLine):
    """The step of some work: a bar and what is being done, as the status line; where stderr takes lines alone, one for each step.

    The line of the first step waits for the second: the first is where what is asked for turns out to be wrong.
    """

    def __init__(self, quiet: bool) -> None:
        super().__init__(quiet)
        self._logs = not quiet and not self.shown
        self._number = 0
        self._held = ""

    def __call__(self, number: int, total: int, step: str, detail: str = "") -> None:
        if self._logs and number != self._number:
            line = f"fastbn: {number}/{total} {step}"
            for each in filter(None, (self._held, line if number > 1 else "")):
                complain(each)
            self._held = line if number == 1 else ""
        self._number = number
        self.show(f"{_bar(number - 1, total)} {number}/{total} {step}{': ' if detail else ''}{detail}")


class Tally(_StatusLine):
    """How many of some things are done, as the status line; where stderr takes lines alone, one for each thing."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(quiet)
        self._logs = not quiet and not self.shown

    def __call__(self, done: int, total: int, last: str) -> None:
        if self._logs and done:
            complain(f"fastbn: {done}/{total} {last}")
        self.show(f"{_bar(done, total)} {done}/{total} {last}")
