"""Where a deployment writes, checked before any work; and the call that it was, as a report shows it."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import TYPE_CHECKING, TypeAlias

from fastbn.deployment.options import Options
from fastbn.deployment.report import template
from fastbn.errors import ArgumentError, StorageError
from fastbn.graph.rewrite.destination import check_destination, is_stream, storage_errors

if TYPE_CHECKING:
    from fastbn.graph.model.storage import ModelLike

__all__ = ["Location", "call_text", "check_paths"]

Location: TypeAlias = str | os.PathLike[str]


def call_text(model: ModelLike, output: Location | None, report: Location | None, options: Options) -> str:
    """Return the call as a report shows it: what is no number, text or path is three dots."""
    plain = (str, int, float)
    given = {"report": report} | {each.name: getattr(options, each.name) for each in fields(options)}
    usual = {"report": None} | {each.name: each.default for each in fields(options)}
    words = [repr(str(each)) if isinstance(each, (str, os.PathLike)) else "..." for each in (model, output) if each is not None]
    changed = {
        name: value for name, value in given.items() if not (value is usual[name] or (isinstance(value, plain) and value == usual[name]))
    }
    for name, value in changed.items():
        value = str(value) if isinstance(value, os.PathLike) else value
        words.append(f"{name}={value!r}" if isinstance(value, plain) else f"{name}=...")
    return f"fastbn.deploy({', '.join(words)})"


def check_paths(model: ModelLike, output: Location | None, report: Location | None, force: bool, how: str = "force=True") -> None:
    """Refuse, before any work is done, an output or a report that could not be made or would replace what it must not.

    how is what replaces a report that exists, as the caller has to say it.
    """
    given, written = (_real_path(place) for place in (model, output))
    if written is not None and written == given:
        raise ArgumentError(f"Cannot write '{output}': it is the input")
    if report is None:
        return
    template()
    if is_stream(report):
        return
    if _real_path(report) in (given, written):
        raise ArgumentError(f"Cannot write the report to '{report}': that is the input or the output")
    check_destination(report)
    if os.path.lexists(report) and not force:
        raise StorageError(f"Cannot write the report to '{report}': it exists; {how} replaces it")


def _real_path(place: object) -> str | None:
    """Return the path of a file with all links followed, None for what is no path."""
    if not isinstance(place, (str, os.PathLike)):
        return None
    with storage_errors(place):
        return os.path.realpath(place)
