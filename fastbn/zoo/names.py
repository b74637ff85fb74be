"""Which models a zoo has, and where the folded form of each one goes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from fastbn.cluster.locations import is_folder, is_url, joined, names_in
from fastbn.errors import ArgumentError, StorageError

__all__ = ["Entry", "entries"]


@dataclass(frozen=True)
class Entry:
    """One model: where it is read from, its name below the output folder, and where its folded form goes."""

    source: str
    name: str
    output: str


def entries(sources: Iterable[str], out: str) -> list[Entry]:
    """Return the models of some sources, every name once.

    A folder stands for the .onnx files in it and below, whose places below it are kept, without those in `out`; of anything else the file
    name is.

    Raises
    ------
    StorageError
        A source cannot be read, or is a folder without models.
    ArgumentError
        Two models would get the same name, or one would replace a model that is read.
    """
    found: list[Entry] = []
    for source in sources:
        pairs = (
            list(_below(source, "", frozenset({_real(out)}))) if is_folder(source) else [(each, _last(each)) for each in names_in(source)]
        )
        if len(pairs) == 1 and pairs[0][0] == source and not is_url(source) and not os.path.lexists(source):
            raise StorageError(f"Cannot read '{source}': no such file or folder")
        if not pairs:
            raise StorageError(f"Cannot fold the models of '{source}': no .onnx file lies in it or below")
        found += [Entry(path, name, joined(out, name)) for path, name in pairs]
    taken: dict[str, Entry] = {}
    read = {_real(each.source) for each in found}
    for each in found:
        other = taken.setdefault(each.name.casefold(), each)
        if other is not each and _real(other.source) != _real(each.source):
            raise ArgumentError(f"Cannot fold both '{other.source}' and '{each.source}': they would get the same name '{each.name}'")
        if _real(each.output) in read:
            raise ArgumentError(f"Cannot write '{each.output}': it is one of the models that are read")
    return list(taken.values())


def _below(folder: str, prefix: str, above: frozenset[str]) -> Iterable[tuple[str, str]]:
    """Yield (path, name below the folder) of the models in a folder and below.

    above are folders that are not entered: that of the results, which may lie in it, and those above, which a link may lead back to.
    """
    above |= {_real(folder)}
    for path in names_in(folder):
        name = _last(path)
        if name.startswith("."):
            continue
        if is_folder(path):
            if _real(path) not in above:
                yield from _below(path, f"{prefix}{name}/", above)
        elif name.endswith(".onnx"):
            yield path, prefix + name


def _last(path: str) -> str:
    return PurePosixPath(path.rstrip("/")).name if is_url(path) else os.path.basename(path.rstrip("/"))


def _real(path: str) -> str:
    return path.rstrip("/") if is_url(path) else os.path.realpath(path)
