"""Batches of the inputs of a model: how many samples arrays hold, and feeds of several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from fastbn.deployment.groups import Kind
from fastbn.deployment.samples import Inputs
from fastbn.errors import ArgumentError, expected
from fastbn.graph.reasons import first_few

if TYPE_CHECKING:
    from fastbn.graph.parity.feeds import Feed

__all__ = ["Batches", "rows_in"]


def rows_in(feed: Feed) -> int:
    """Return the rows of a feed."""
    return max((values.shape[0] for values in feed.values() if values.ndim), default=1)


class Batches(Inputs):
    """The graph inputs that a caller must give, and how arrays become feeds of several samples."""

    @property
    def unit(self) -> int:
        """The batch that the model fixes, 1 where it leaves the batch open."""
        return max((shape[0] for shape in self.shapes.values() if shape and shape[0]), default=1)

    def batch_of(self, batch: int) -> int:
        """Return the samples of a partition: those that were asked for, in whole batches of the model."""
        return max(1, batch // self.unit) * self.unit

    def known(self, arrays: Sequence[str], where: str) -> list[str]:
        """Return the names of the inputs, all of which must be among those of the arrays; a file may hold other arrays beside them."""
        missing = [name for name in self.names if name not in arrays]
        if missing:
            got = f"none for '{missing[0]}' ({first_few(sorted(arrays)) or 'no arrays at all'})"
            raise ArgumentError(expected(f"arrays named after the inputs ({first_few(self.names)})", got, where))
        return self.names

    def counted(self, where: str, shapes: Mapping[str, Sequence[int]]) -> tuple[int, tuple[str, ...]]:
        """Return (count, shared): how many entries along axis 0 some arrays have, and the names of those with one for all.

        Raises
        ------
        ArgumentError
            A name or a shape is not that of an input, or the numbers of entries differ.
        """
        unknown = [name for name in shapes if name not in self.infos]
        if unknown:
            raise ArgumentError(expected(f"arrays named after the inputs ({first_few(self.names)})", f"'{unknown[0]}'", where))
        counts = {name: self._count(where, name, shapes[name]) for name in self.known(list(shapes), where)}
        count = max(counts.values(), default=0)
        for name, each in counts.items():
            if each not in (1, count):
                raise ArgumentError(expected(f"{count} samples of every input", f"{each} of '{name}'", where))
        return count, tuple(name for name, each in counts.items() if each < count)

    def _count(self, where: str, name: str, sizes: Sequence[int]) -> int:
        shape = self.shapes[name]
        is_short = shape is not None and len(sizes) == len(shape) - 1 and self.lacking(name, sizes, shape) is not None
        if shape is not None and not is_short and len(sizes) not in (len(shape), len(shape) + 1):
            shown = ",".join(str(size or "?") for size in shape)
            raise ArgumentError(expected(f"shape [{shown}] for '{name}'", f"[{','.join(map(str, sizes))}]", where))
        return sizes[0] if sizes else 1

    def feeds(self, where: str, arrays: Mapping[str, ArrayLike], kind: Kind, batch: int) -> list[Feed]:
        """Return the feeds of a group of arrays, of up to `batch` rows where the model leaves the batch open."""
        return [self._filled(feed) for _, feed in self.split(where, arrays, kind, batch)]

    def _filled(self, feed: Feed) -> Feed:
        """Return a feed in which an input with one row has it for every row."""
        rows = rows_in(feed)
        return {
            name: np.repeat(values, rows, axis=0) if rows > 1 and values.shape[:1] == (1,) and self._is_open(name) else values
            for name, values in feed.items()
        }

    def _is_open(self, name: str) -> bool:
        shape = self.shapes[name]
        return shape is not None and len(shape) > 0 and shape[0] is None

    def joined(self, feeds: Sequence[Feed], batch: int) -> list[Feed]:
        """Return feeds of up to `batch` rows, joined from neighbors whose other sizes are the same."""
        groups: list[list[Feed]] = []
        for feed in feeds:
            last = groups[-1] if groups else []
            if last and self._are_alike(last[0], feed) and sum(map(rows_in, last)) + rows_in(feed) <= batch:
                last.append(feed)
            else:
                groups.append([feed])
        return [
            group[0] if len(group) == 1 else {name: np.concatenate([feed[name] for feed in group]) for name in group[0]} for group in groups
        ]

    def _are_alike(self, feed: Feed, other: Feed) -> bool:
        return all(self._is_open(name) and feed[name].shape[1:] == other[name].shape[1:] for name in feed)
