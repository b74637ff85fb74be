"""Statistics of partitions, merged in a tree that depends on their number alone: the same bits, whoever merges and whenever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from fastbn.stats import BatchStats, merge_stats

__all__ = ["FAN", "MergeTree", "Moments", "merge"]

# Statistics that one step of the tree takes together.
FAN = 32

# The statistics of several batch normalizations over the same partition, always in the same order.
Moments: TypeAlias = list[BatchStats]


def merge(parts: Sequence[Moments]) -> Moments:
    """Return the statistics of some partitions together, merged in order."""
    return parts[0] if len(parts) == 1 else [merge_stats(each) for each in zip(*parts, strict=True)]


class MergeTree:
    """Merges statistics as they come, in the order of their partitions.

    Node i of a height takes the nodes FAN * i to FAN * i + FAN - 1 of the height below it; the partitions are those of height 0. So what
    FAN ** h partitions in a row give together may be merged anywhere, and handed on as one node of height h.
    """

    def __init__(self) -> None:
        self._waiting: list[list[Moments]] = []

    def add(self, moments: Moments) -> None:
        """Add the statistics of the next partition, or of the next FAN ** h of them to a tree of such."""
        for height in range(len(self._waiting) + 1):
            if height == len(self._waiting):
                self._waiting.append([])
            self._waiting[height].append(moments)
            if len(self._waiting[height]) < FAN:
                return
            moments, self._waiting[height] = merge(self._waiting[height]), []

    def result(self) -> Moments:
        """Return the statistics of all; there must be some."""
        rest: list[Moments] = []
        for waiting in self._waiting:
            nodes = [*waiting, *rest]
            rest = [merge(nodes)] if nodes else []
        return rest[0]
