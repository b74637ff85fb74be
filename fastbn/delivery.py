"""Where a command reads and writes: places are checked before any work is done, and everything is delivered together at the end."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fastbn.confinement import may_deliver
from fastbn.errors import ArgumentError, StorageError, expected
from fastbn.terminal import complain, emit, flush, give_up, open_streams, width_of

if TYPE_CHECKING:
    from fastbn.graph.digests import Digest
    from fastbn.graph.model.storage import Source
    from fastbn.graph.rewrite.output import ModelResult, Prepared

__all__ = [
    "STREAM",
    "Delivery",
    "check_data_files",
    "check_version",
    "in_place",
    "input_name",
    "model_place",
    "place_beside",
    "print_json",
    "source_of",
    "workdir_of",
]

# What stdin and stdout are called as IN and OUT.
STREAM = "-"


def input_name(name: str) -> str:
    """Return what IN means: a name, or STREAM."""
    from fastbn.graph.rewrite.destination import descriptor_of

    return STREAM if name == STREAM or descriptor_of(name) == 0 else name


def source_of(name: str) -> Source:
    """Return the model of that name."""
    from fastbn.graph.model import storage

    return storage.load(storage.read_pipe(sys.stdin.buffer) if name == STREAM else name)


def in_place(name: str, output: str | None) -> Path | str:
    """Return where the result goes that replaces IN; raises ArgumentError where an OUT is given, or IN is no file."""
    if output is not None:
        raise ArgumentError(f"Cannot write '{output}': --in-place writes IN and no OUT")
    if not os.path.isfile(name):
        raise ArgumentError(f"Cannot replace '{name}': --in-place needs a file")
    return model_place(name, None)


def place_beside(name: str, output: str | None, what: str) -> Path | str:
    """Return OUT; where none is given, a name beside IN that says what it is, or stdout where IN comes from stdin."""
    from fastbn.graph.model.files import file_path

    if output is not None:
        return model_place(output, name, "; --in-place replaces it" if what == "folded" else "")
    if name == STREAM:
        return STREAM
    if os.path.isdir(name):
        raise StorageError(expected("a model file", "a folder", name))
    path = file_path(name, "a model file")
    return model_place(path.with_name(f"{path.stem}.{what}.onnx"), name)


def model_place(output: Path | str, name: str | None, hint: str = "") -> Path | str:
    """Return OUT as a Path or STREAM, checked as far as that is possible without the model.

    name is IN, None where OUT replaces it; the hint follows the complaint that they are the same file.
    """
    from fastbn.graph.rewrite.destination import check_destination, descriptor_of

    if output == STREAM or descriptor_of(output) == 1:
        return STREAM
    if name is not None and name != STREAM and _is_same(output, name):
        raise ArgumentError(f"Cannot write '{output}': OUT is IN{hint}")
    check_destination(output)
    return Path(output)


def _is_same(path: Path | str, other: Path | str) -> bool:
    with contextlib.suppress(ValueError):  # a NUL in a name
        return os.path.realpath(path) == os.path.realpath(other)
    return False


def _is_one_of(path: Path | str, others: Iterable[Path | str | None]) -> bool:
    return any(_is_same(path, other) for other in others if other is not None and other != STREAM)


def workdir_of(target: Path | str | None) -> Path | None:
    """Return the folder in which intermediate files may lie, that of OUT, or None where OUT is no file."""
    from fastbn.graph.rewrite.destination import is_stream

    return None if not isinstance(target, Path) or is_stream(target) else target.parent


def check_version(source: Source, target: Path | str | None, force: bool) -> None:
    """Refuse to replace what is no version of the model, and a data file that it reads."""
    from fastbn.graph.model.storage import model_in
    from fastbn.graph.rewrite.version import difference

    if not isinstance(target, Path) or workdir_of(target) is None:
        return
    check_data_files([source], [target])
    if force or not os.path.exists(target) or not os.path.getsize(target):
        return
    other = model_in(target)
    if other is None:
        raise StorageError(f"Cannot replace '{target}': it is no model; --force replaces it all the same")
    what = difference(source.proto, other)
    if what is not None:
        raise StorageError(f"Cannot replace '{target}': it is no version of IN, for it has {what}; --force replaces it all the same")


def check_data_files(sources: Sequence[Source], paths: Sequence[Path | str | None]) -> None:
    """Refuse to write over a data file that a model reads."""
    read = {path for source in sources for path in source.data_files()}
    for path in paths:
        if path is not None and path != STREAM and os.path.realpath(path) in read:
            raise StorageError(f"Cannot write '{path}': it is a data file of the input")


class Delivery:
    """What one run of the command writes, and where.

    Attributes
    ----------
    closed : set of str
        The standard streams that were closed when the command began.
    target : Path, STREAM or None
        Where the model goes; None where none is written.
    json, page : str or None
        Where the reports go; json may be STREAM.
    quiet : bool
        Print errors only.
    prepared : Prepared or None
        The model on its way to its place.
    """

    def __init__(self) -> None:
        self.closed = open_streams()
        self.target: Path | str | None = None
        self.json: str | None = None
        self.page: str | None = None
        self.quiet = False
        self.prepared: Prepared | None = None

    @property
    def written(self) -> str:
        """A sentence for the end of a complaint."""
        return f"{self.prepared.path} is written" if self.has_written and self.prepared is not None else "nothing written"

    @property
    def has_written(self) -> bool:
        """Whether the model is in its place."""
        return self.prepared is not None and self.prepared.committed

    @property
    def is_shown(self) -> bool:
        """Whether the report is printed as text."""
        return not self.quiet and self.json != STREAM

    @property
    def stream(self) -> TextIO:
        """Where the table goes: when the model or the page goes to stdout, to stderr."""
        return sys.stderr if self.target == STREAM or self._page_is_on_stdout() else sys.stdout

    def _page_is_on_stdout(self) -> bool:
        from fastbn.graph.rewrite.destination import descriptor_of

        return self.page is not None and descriptor_of(self.page) == 1

    def choose(
        self,
        inputs: Sequence[Path | str | None],
        *,
        target: Path | str | None = None,
        json: str | None = None,
        page: str | None = None,
        quiet: bool = False,
    ) -> None:
        """Say where everything goes.

        Parameters
        ----------
        inputs : sequence of path
            What is read, and must not be written over.
        target : Path, STREAM or None
            As from `model_place`.
        json, page : str, optional
            Where the reports go.
        quiet : bool
            Print errors only.

        Raises
        ------
        ArgumentError
            A report would replace an input, another output or a model, or stdout would get two things.
        StorageError
            A place cannot be written to.
        """
        from fastbn.graph.rewrite.destination import check_destination
        from fastbn.graph.runtime import silence_log

        silence_log()
        self.quiet = quiet
        self.target = target
        self.page = page
        self.json = self._json_place(json, inputs, [target, page])
        for place, read in ((target, inputs[1:]), (page, inputs)):  # the first may be replaced in place
            if place is not None and place != STREAM and _is_one_of(place, read):
                raise ArgumentError(f"Cannot write '{place}': it is an input")
        if page is not None:
            check_destination(page)
            if self._page_is_on_stdout() and STREAM in (target, self.json):
                raise ArgumentError("Cannot write the page to stdout: the model or the JSON report goes there")

    def _json_place(self, json: str | None, inputs: Sequence[Path | str | None], outputs: Sequence[Path | str | None]) -> str | None:
        """Return where the JSON report goes, None, STREAM or a name."""
        from fastbn.graph.model.storage import model_in
        from fastbn.graph.rewrite.destination import check_destination, descriptor_of, is_stream

        if json is not None and (json == STREAM or descriptor_of(json) == 1):
            json = STREAM
        if STREAM in (json, *outputs) and "stdout" in self.closed:
            raise StorageError("Cannot write to stdout: it is closed")
        if json is None or json == STREAM:
            if json == STREAM and STREAM in outputs:
                raise ArgumentError("Cannot write the JSON report to stdout: the model or the page goes there")
            return json
        check_destination(json)
        device = is_stream(json) and not os.path.isfile(json) and not Path(json).is_fifo()
        same = _is_one_of(json, (*inputs, *outputs))
        if not device and (same or (os.path.isfile(json) and model_in(json) is not None)):
            what = "an input or another output" if same else "a model"
            raise ArgumentError(f"Cannot write the JSON report to '{json}': that is {what}")
        return json

    def deliver(
        self,
        report: Mapping[str, object] | Callable[[Sequence[Digest]], Mapping[str, object]],
        lines: list[str],
        model: ModelResult | None = None,
        page: Callable[[Sequence[Digest]], str] | None = None,
    ) -> None:
        """Write the model and the reports, and say so.

        All files are written under other names first, then comes the table, and only then does everything take its place: what fails before
        leaves nothing behind.

        Parameters
        ----------
        report : dict, or function of list of Digest
            The JSON report; where there is a model, "written" becomes the paths of its files. A function is given their SHA-256.
        lines : list of str
            The report as text.
        model : ModelResult, optional
            Whose model goes to `target`.
        page : function of list of Digest, optional
            Returns the HTML report.
        """
        from fastbn.graph.reasons import first_few
        from fastbn.graph.report import size_text
        from fastbn.graph.rewrite.destination import is_stream
        from fastbn.graph.rewrite.replacement import atomic

        # In this order when the block ends: what goes through a device or a pipe, because that may fail, then the model, then other files.
        with contextlib.ExitStack() as after, contextlib.ExitStack() as files, contextlib.ExitStack() as before:
            data = model.to_bytes() if model is not None and self.target == STREAM else None
            if model is not None and isinstance(self.target, Path):
                self.prepared = files.enter_context(model.prepared(self.target))
            digests = self._digests(data)
            report = report(digests) if callable(report) else report
            if model is not None:
                written = [str(path) for path in self.prepared.paths] if self.prepared is not None else []
                report = {**report, "written": written}
            json_text = None if self.json in (None, STREAM) else _json_text(report) + "\n"
            for place, text in ((self.page, page and page(digests)), (self.json, json_text)):
                if place is not None and text is not None:
                    stack = before if is_stream(place) else after
                    stack.enter_context(atomic(place, text))
            if self.json == STREAM:
                print_json(report)
            if data is not None:
                _write_stdout(data)
            if self.is_shown:
                self._print(lines)
            flush(self.stream)
            may_deliver()
        if self.prepared is not None:
            names = first_few([path.name for path in self.prepared.data.values()])
            self.mention(f"wrote   {self.prepared.path}{' with ' if names else ''}{names}   {size_text(self.prepared.size)}")

    def _digests(self, data: bytes | None) -> list[Digest]:
        """Return the SHA-256 of what is about to be delivered, as far as it is files or the bytes for stdout."""
        from fastbn.graph.digests import Digest

        if data is not None:
            return [Digest.of_bytes(STREAM, data)]
        return [] if self.prepared is None else self.prepared.digests()

    def mention(self, line: str) -> None:
        """Print a line about what has been done: where that is not possible, it has been done all the same."""
        if not self.is_shown:
            return
        try:
            self._print([line])
            flush(self.stream)
        except StorageError as error:
            complain(f"fastbn: {error}")

    def _print(self, lines: list[str]) -> None:
        from fastbn.graph.report import wrapped

        for line in wrapped(lines, width_of(self.stream)):
            emit(line, self.stream)

    def has_left_data(self, source: Source) -> bool:
        """Say whether a model that was replaced has left data files that the new one does not read."""
        if self.prepared is None:
            return False
        written = {os.path.realpath(path) for path in self.prepared.paths}
        return any(os.path.exists(path) and path not in written for path in source.data_files())


def print_json(data: Mapping[str, object]) -> None:
    """Print a report on stdout."""
    for line in _json_text(data).splitlines():
        emit(line, sys.stdout)


def _json_text(data: Mapping[str, object]) -> str:
    return json.dumps(data, indent=2)


def _write_stdout(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        give_up(sys.stdout)
        raise StorageError(f"Cannot write the model to stdout: {(error.strerror or str(error)).lower()}") from error
