"""Who does the work: the workers of a cluster, by dask."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbn.cluster.connection import Client, Future, killed, large_graphs, wait_for
from fastbn.errors import FastbnError
from fastbn.reestimation.collections import Deferred, ready
from fastbn.reestimation.engines import Partition, Task, Tell, bytes_of, without_targets
from fastbn.reestimation.inputs import Batches, rows_in
from fastbn.reestimation.levels import DTypes
from fastbn.reestimation.merging import FAN, MergeTree, Moments, merge
from fastbn.reestimation.pieces import Piece
from fastbn.reestimation.work import Parameters, Setting, State, advance, held, normalized, out_of_memory, statistics
from fastbn.stats import BatchStats

__all__ = ["MOST_TASKS", "OnCluster", "Run", "width_of"]

# Tasks of one level; with more partitions, a task takes FAN of them, or FAN * FAN, ... whose statistics are one node of the merge tree.
MOST_TASKS = 1 << 15


def width_of(partitions: int) -> int:
    """Return how many partitions a task takes."""
    width = 1
    while -(-partitions // width) > MOST_TASKS:
        width *= FAN
    return width


@dataclass(frozen=True)
class Run:
    """What the tasks of one run share, and travels with each.

    Attributes
    ----------
    inputs : Batches
    setting : Setting
    """

    inputs: Batches
    setting: Setting


@dataclass
class Kept:
    """Activations of the partitions of a task at a cut, and the rows that these have."""

    states: list[State]
    labels: list[str]
    rows: int


def started(partitions: Sequence[Partition], run: Run) -> Kept:
    """Return the data of some partitions."""
    states = [partition.read(run.inputs) for partition in partitions]
    return Kept(states, [partition.label for partition in partitions], sum(rows_in(feed) for state in states for feed in state))


def advanced(
    before: Kept | Sequence[Partition], pieces: Sequence[Piece], models: Sequence[bytes], parameters: Parameters, run: Run
) -> Kept:
    """Return the activations behind some pieces, in memory that no session of onnxruntime holds."""
    if not isinstance(before, Kept):
        before = started(before, run)
    behind = passed(before, pieces, models, parameters, run)
    return Kept([held(*pair) for pair in zip(behind.states, before.states, strict=True)], before.labels, before.rows)


def passed(before: Kept, pieces: Sequence[Piece], models: Sequence[bytes], parameters: Parameters, run: Run) -> Kept:
    """Return the activations behind some pieces as onnxruntime makes them."""
    states = []
    for state, label in zip(before.states, before.labels, strict=True):
        for piece, model in zip(pieces, models, strict=True):
            state = advance(piece, model, state, parameters, run.setting, label)
        states.append(state)
    return Kept(states, before.labels, before.rows)


def measured(kept: Kept, piece: Piece) -> Moments:
    """Return the statistics of some partitions for the sites of a level, and behind them their rows, as statistics without channels."""
    tree = MergeTree()
    for state, label in zip(kept.states, kept.labels, strict=True):
        tree.add(statistics(piece, state, label))
    return [*tree.result(), _counted(kept.rows)]


def measured_at_once(
    partitions: Sequence[Partition], pieces: Sequence[Piece], models: Sequence[bytes], parameters: Parameters, run: Run
) -> Moments:
    """Return the same from the data, one partition after the other; nothing is kept."""
    tree, rows = MergeTree(), 0
    for partition in partitions:
        kept = passed(started([partition], run), pieces, models, parameters, run)
        tree.add(statistics(pieces[-1], kept.states[0], partition.label))
        rows += kept.rows
    return [*tree.result(), _counted(rows)]


def normalized_at_once(
    partitions: Sequence[Partition], pieces: Sequence[Piece], models: Sequence[bytes], run: Run, dtypes: Mapping[int, DTypes]
) -> Moments:
    """Return the statistics of all levels, one after the other, each feed normalized by its own; and the rows."""
    tree, rows = MergeTree(), 0
    for partition in partitions:
        kept = started([partition], run)
        levels = normalized(pieces, models, kept.states[0], run.setting, partition.label, dtypes)
        tree.add([stats for level in levels for stats in level])
        rows += kept.rows
    return [*tree.result(), _counted(rows)]


def probed(
    partitions: Sequence[Partition], pieces: Sequence[Piece], models: Sequence[bytes], parameters: Parameters, run: Run
) -> list[int]:
    """Return the bytes that one partition takes behind each piece."""
    kept = started(partitions[:1], run)
    sizes = []
    for piece, model in zip(pieces, models, strict=True):
        kept = passed(kept, [piece], [model], parameters, run)
        sizes.append(bytes_of(kept.states[0]))
        kept = Kept([without_targets(piece, kept.states[0])], kept.labels, kept.rows)
    return sizes


def _counted(rows: int) -> BatchStats:
    return BatchStats(rows, np.zeros(0), np.zeros(0))


def _same(value: bytes) -> bytes:
    return value


class OnCluster:
    """The workers of a cluster. Each task takes one partition, or many where there are very many.

    Activations at a cut are results of tasks that stay on the worker, for as many partitions as the budget of all workers allows; the
    others are computed from the data again at each level. Whatever a lost worker had is computed again by others.
    """

    def __init__(self, task: Task, client: Client, parameters: Parameters) -> None:
        self.task, self.client = task, client
        self._addresses = list(client.scheduler_info(n_workers=-1)["workers"])
        self.workers, self.samples = len(self._addresses), 0
        self._run = Run(task.inputs, task.setting)
        self._id = uuid.uuid4().hex[:12]
        is_deferred = any(isinstance(partition, Deferred) for partition in task.partitions)
        self._width = 1 if is_deferred else width_of(len(task.partitions))
        parts = task.partitions
        # Task -> its partitions.
        self._bundles = [list(parts[first : first + self._width]) for first in range(0, len(parts), self._width)]
        self._models: dict[int, Future] = {}
        # Task -> (level, its activations there).
        self._kept: dict[int, tuple[int, Future]] = {}
        self._parameters = parameters
        self._sizes: list[int] | None = None

    def _sources(self, without: Container[int] = ()) -> list[Any]:
        """Return the partitions of each task; those that dask computes as results of its own tasks, None for tasks that need none."""
        sources: list[Any] = [None if number in without else bundle for number, bundle in enumerate(self._bundles)]
        deferred = {number: bundle[0] for number, bundle in enumerate(sources) if bundle and isinstance(bundle[0], Deferred)}
        if deferred:
            with large_graphs():
                items = self.client.compute([each.delayed for each in deferred.values()])
            for (number, each), future in zip(deferred.items(), items, strict=True):
                sources[number] = [self._submit(ready, "ready", 0, number, each.label, each.whole, each.batch, future)]
        return sources

    def measure(self, level: int, parameters: Parameters, tell: Tell) -> Moments:
        """Return the statistics of a level."""
        task, before = self.task, self._kept
        count = self._most_kept(level)
        leaves: list[Future] = []
        self._kept = {}
        for number, source in enumerate(self._sources(before)):
            at, given = before.get(number, (0, source))
            chain, models = list(task.pieces[at:level]), [self._model(each) for each in range(at, level)]
            submit = self._submit if at else self._spread
            if number < count or at:
                kept = submit(advanced, "advanced", level, number, given, chain, models, parameters, self._run)
                leaves.append(self._submit(measured, "measured", level, number, kept, task.pieces[level - 1]))
                if number < count:
                    self._kept[number] = level, kept
            else:
                leaves.append(submit(measured_at_once, "measured", level, number, given, chain, models, parameters, self._run))
        del before
        moments = self._merged(leaves, level, tell)
        if len(self._kept) == len(self._bundles):  # nothing will be computed from the data again
            self._models.clear()
        return moments

    def normalize(self, tell: Tell) -> list[Moments]:
        """Return the statistics of all levels, each feed normalized by its own."""
        task = self.task
        models = [self._model(each) for each in range(task.depth)]
        leaves = [
            self._spread(normalized_at_once, "measured", 0, number, source, list(task.pieces), models, self._run, dict(task.dtypes))
            for number, source in enumerate(self._sources())
        ]
        flat = self._merged(leaves, 1, tell)
        levels = []
        for piece in task.pieces:
            levels.append(flat[: len(piece.targets)])
            flat = flat[len(piece.targets) :]
        return levels

    def _most_kept(self, level: int) -> int:
        """Return how many tasks may keep their activations behind a level."""
        task = self.task
        if level == task.depth or not task.memory:
            return 0
        if self._sizes is None:
            models = [self._model(each) for each in range(task.depth)]
            probe = self._submit(
                probed,
                "probed",
                0,
                0,
                self._sources(range(1, len(self._bundles)))[0],
                list(task.pieces),
                models,
                self._parameters,
                self._run,
            )
            sizes: list[int] = self._result(probe, [], lambda done, count: None)
            self._sizes = sizes
        return min(len(self._bundles), task.memory * self.workers // max(1, self._sizes[level - 1] * self._width))

    def _model(self, number: int) -> Future:
        """Return the model of a piece as the result of a task: what has lost it gets it again."""
        if number not in self._models:
            self._models[number] = self._submit(_same, "model", number, 0, self.task.models[number])
        return self._models[number]

    def _submit(self, function: Any, what: str, level: int, number: int, *arguments: Any, **where: Any) -> Future:
        with large_graphs():
            return self.client.submit(function, *arguments, key=f"fastbn-{what}-{self._id}-{level}-{number}", pure=False, **where)

    def _spread(self, function: Any, what: str, level: int, number: int, *arguments: Any) -> Future:
        """Submit a task that reads data, to the workers in turn: dask would give all to the one that has the model of the piece, and with
        them the memory of what they keep. Where that worker is lost or late, another takes the task."""
        address = self._addresses[number % len(self._addresses)]
        return self._submit(function, what, level, number, *arguments, workers=[address], allow_other_workers=True)

    def _merged(self, leaves: list[Future], level: int, tell: Tell) -> Moments:
        nodes, height = leaves, 0
        while len(nodes) > 1:
            groups = [nodes[first : first + FAN] for first in range(0, len(nodes), FAN)]
            height += 1
            nodes = [self._submit(merge, f"merge{height}", level, number, group) for number, group in enumerate(groups)]
        moments: Moments = self._result(nodes[0], leaves, tell)
        self.samples = moments[-1].count
        return moments[:-1]

    def _result(self, future: Future, parts: Sequence[Future], tell: Tell) -> Any:
        try:
            return wait_for(future, parts, tell)
        except FastbnError:
            raise
        except MemoryError as error:
            raise out_of_memory("the data") from error
        except Exception as error:
            key = killed(error)
            if key is None:
                raise
            raise self._killed(key) from error

    def _killed(self, key: str) -> FastbnError:
        number = key.rpartition("-")[2]
        is_own = key.startswith("fastbn-") and not key.startswith(("fastbn-merge", "fastbn-model"))
        label = self._bundles[int(number)][0].label if is_own and number.isdecimal() else "the data"
        remedy = "most likely their memory did not suffice: a smaller --batch or --memory, or fewer workers on a machine, may help"
        return FastbnError(f"Cannot go on with {label}: it ended one worker after the other; {remedy}")

    def close(self) -> None:
        """Let the cluster forget the run."""
        self._kept.clear()
        self._models.clear()
        with contextlib.suppress(Exception):  # the cluster may be gone
            self.client.cancel([])
