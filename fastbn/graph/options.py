"""Options of the main job, checked: globs over the names of nodes, and sizes of inputs."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

from fastbn.errors import ArgumentError, ArgumentTypeError, expected
from fastbn.graph.model.index import Index
from fastbn.graph.ops.normalization import is_batch_norm
from fastbn.graph.reasons import first_few

__all__ = ["Globs", "InputShapes", "check_named", "checked_globs", "checked_shapes"]

Globs: TypeAlias = str | list[str] | tuple[str, ...]
InputShapes: TypeAlias = Mapping[str, list[int] | tuple[int, ...]]


def checked_globs(value: Globs | None, where: str) -> list[str] | None:
    """Return globs as a list; raises ArgumentTypeError where they are something else."""
    if value is None:
        return None
    globs = [value] if isinstance(value, str) else value
    if not isinstance(globs, (list, tuple)) or not all(isinstance(glob, str) for glob in globs):
        raise ArgumentTypeError(expected("a glob or a list of globs", type(value).__name__, where))
    return list(globs)


def check_named(index: Index, globs: Iterable[str], where: str) -> None:
    """Raise ArgumentError where a glob names no node of a model."""
    labels = [node.label for node in index.order]
    for glob in globs:
        if not any(fnmatchcase(label, glob) for label in labels):
            some = first_few([node.label for node in index.order if is_batch_norm(node)])
            raise ArgumentError(expected(f"a glob that names a node (BatchNormalization: {some or 'none'})", repr(glob), where))


def checked_shapes(input_shapes: InputShapes | None) -> dict[str, tuple[int, ...]]:
    """Return input_shapes as a dict of name -> tuple of int; raises ArgumentError or ArgumentTypeError where it is not that."""
    shapes = {}
    if input_shapes is not None and not isinstance(input_shapes, Mapping):
        raise ArgumentTypeError(expected("a dict of name -> sizes", type(input_shapes).__name__, "input_shapes"))
    for name, sizes in (input_shapes or {}).items():
        good = isinstance(sizes, (list, tuple)) and all(
            isinstance(size, int) and not isinstance(size, bool) and 0 < size < 1 << 63 for size in sizes
        )
        if not good:
            raise ArgumentError(expected("positive sizes", repr(sizes), f"input_shapes[{name!r}]"))
        shapes[name] = tuple(sizes)
    return shapes
