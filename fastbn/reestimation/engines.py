"""Who does the work: this process, partition by partition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from fastbn import memory
from fastbn.reestimation.files import UNPACKED
from fastbn.reestimation.inputs import Batches, rows_in
from fastbn.reestimation.levels import DTypes
from fastbn.reestimation.merging import MergeTree, Moments
from fastbn.reestimation.pieces import Piece
from fastbn.reestimation.work import SESSIONS, Parameters, Setting, State, advance, held, normalized, statistics

__all__ = ["Engine", "InProcess", "Partition", "Task", "Tell", "bytes_of", "without_targets"]

# Is told (partitions done, partitions).
Tell: TypeAlias = Callable[[int, int], None]


class Partition(Protocol):
    """A fixed part of the data."""

    @property
    def label(self) -> str:
        """Which samples these are, for messages."""
        ...

    def read(self, inputs: Batches, /) -> State:
        """Return its feeds; raises FastbnError where they cannot be read or used."""
        ...


@dataclass(frozen=True)
class Task:
    """What all engines are given.

    Attributes
    ----------
    partitions : sequence of Partition
    pieces, models : sequence of Piece, of bytes
        One of each level.
    inputs : Batches
    setting : Setting
    memory : int
        Bytes of activations that a worker may keep.
    dtypes : dict of int -> pair of numpy.dtype
        Number of a site -> the types of its mean and variance as they are run.
    """

    partitions: Sequence[Partition]
    pieces: Sequence[Piece]
    models: Sequence[bytes]
    inputs: Batches
    setting: Setting
    memory: int
    dtypes: Mapping[int, DTypes]

    @property
    def depth(self) -> int:
        """The number of levels."""
        return len(self.pieces)


class Engine(Protocol):
    """Takes the statistics of all partitions.

    Attributes
    ----------
    workers : int
        Processes that work, 0 for this one alone.
    samples : int
        Rows that have been read, once the first statistics are there.
    """

    workers: int
    samples: int

    def measure(self, level: int, parameters: Parameters, tell: Tell, /) -> Moments:
        """Return the statistics of a level, whose lower ones have these parameters; levels are asked for in order, from 1."""
        ...

    def normalize(self, tell: Tell, /) -> list[Moments]:
        """Return the statistics of all levels, each feed normalized by its own."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


def bytes_of(state: State) -> int:
    """Return the bytes of the arrays of a state."""
    return sum(values.nbytes for feed in state for values in feed.values())


def without_targets(piece: Piece, state: State) -> State:
    """Return what later pieces read of a state."""
    return [{name: feed[name] for name in piece.keeps} for feed in state]


class InProcess:
    """This process, one partition after the other. Activations at the cut are kept as far as the budget goes, and computed again beyond."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.workers = self.samples = 0
        # Partition -> (level, what is known of it there).
        self._kept: dict[int, tuple[int, State]] = {}
        self._bytes = 0

    def measure(self, level: int, parameters: Parameters, tell: Tell) -> Moments:
        """Return the statistics of a level."""
        task, tree = self.task, MergeTree()
        for number, partition in enumerate(task.partitions):
            at, before = self._take(number)
            state = before
            if level == 1:
                self.samples += sum(map(rows_in, state))
            for piece, model in zip(task.pieces[at:level], task.models[at:level], strict=True):
                state = advance(piece, model, state, parameters, task.setting, partition.label)
            piece = task.pieces[level - 1]
            tree.add(statistics(piece, state, partition.label))
            if level < task.depth:
                self._keep(number, level, without_targets(piece, state), before)
            tell(number + 1, len(task.partitions))
        return tree.result()

    def _take(self, number: int) -> tuple[int, State]:
        if number not in self._kept:
            return 0, self.task.partitions[number].read(self.task.inputs)
        level, state = self._kept.pop(number)
        self._bytes -= bytes_of(state)
        return level, state

    def _keep(self, number: int, level: int, state: State, before: State) -> None:
        size = bytes_of(state)
        if self._bytes + size <= self.task.memory:
            self._kept[number] = level, held(state, before)
            self._bytes += size

    def normalize(self, tell: Tell) -> list[Moments]:
        """Return the statistics of all levels, each feed normalized by its own."""
        task, trees = self.task, [MergeTree() for _ in self.task.pieces]
        for number, partition in enumerate(task.partitions):
            state = partition.read(task.inputs)
            self.samples += sum(map(rows_in, state))
            levels = normalized(task.pieces, task.models, state, task.setting, partition.label, task.dtypes)
            for tree, moments in zip(trees, levels, strict=True):
                tree.add(moments)
            tell(number + 1, len(task.partitions))
        return [tree.result() for tree in trees]

    def close(self) -> None:
        """Close sessions and files."""
        self._kept.clear()
        SESSIONS.close()
        memory.release()
        UNPACKED.close()
