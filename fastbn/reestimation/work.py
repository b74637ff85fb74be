"""What a worker does: read a partition, run a piece on it, take statistics; plain functions of what they are given."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fastbn import memory
from fastbn.errors import FastbnError, ModelError, expected
from fastbn.functional import batch_stats
from fastbn.graph.runtime import runtime_errors, said, session
from fastbn.reestimation.levels import DTypes
from fastbn.reestimation.pieces import Piece, parameter_names
from fastbn.stats import BatchStats, merge_stats

if TYPE_CHECKING:
    from fastbn._types import Array, FloatArray
    from fastbn.graph.parity.feeds import Feed
    from fastbn.graph.runtime import Session

__all__ = ["SESSIONS", "Parameters", "Setting", "State", "advance", "as_parameters", "held", "normalized", "out_of_memory", "statistics"]

# Sessions that a worker keeps open, those of pieces used last.
MOST_SESSIONS = 256

# Elements that are widened to float64 at a time: they stay in a level-2 cache.
BLOCK = 1 << 18

# Number of a site -> the mean and the variance that it normalizes with, in the types of the model.
Parameters: TypeAlias = "Mapping[int, tuple[Array, Array]]"

# What is known of a partition at a cut: the values by name, of each feed.
State: TypeAlias = "list[Feed]"


@dataclass(frozen=True)
class Setting:
    """What decides the bits of activations beside a piece and its input.

    Attributes
    ----------
    threads : int
        Threads of one operator in onnxruntime.
    version : str
        The version of fastbn that the client has.
    """

    threads: int
    version: str

    def check(self) -> None:
        """Raise FastbnError where this process has another version of fastbn."""
        from fastbn import __version__

        if __version__ != self.version:
            raise FastbnError(f"Cannot use the worker: it has fastbn {__version__}, and the client {self.version}")


class _Sessions:
    """Open sessions of a process, by key of the piece and number of threads; several threads of a worker share them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str, int], Session] = OrderedDict()

    def get(self, piece: Piece, model: bytes, threads: int) -> Session:
        """Return the session of a piece."""
        key = piece.key, threads
        with self._lock:
            if key not in self._open:
                self._open[key] = session(model, threads=threads, optimize=True, shares_arena=True)
            self._open.move_to_end(key)
            while len(self._open) > MOST_SESSIONS:
                self._open.popitem(last=False)
            return self._open[key]

    def close(self) -> None:
        """Give the memory of all sessions back."""
        with self._lock:
            self._open.clear()


SESSIONS = _Sessions()


def advance(piece: Piece, model: bytes, state: State, parameters: Parameters, setting: Setting, label: str) -> State:
    """Run a piece on a partition and return the state behind it: what later pieces read, and what the sites of its level normalize.

    Raises
    ------
    ModelError
        onnxruntime cannot run the piece on it.
    FastbnError
        The memory does not suffice.
    """
    setting.check()
    try:
        opened = SESSIONS.get(piece, model, setting.threads) if piece.gives else None
        given: dict[str, Array] = {}
        for number in piece.parameters:
            given.update(zip(parameter_names(number), parameters[number], strict=True))
        kept = dict.fromkeys((*piece.keeps, *(name for _, name, _ in piece.targets)))
        after = []
        for feed in state:
            outputs = opened.run(None, {**{name: feed[name] for name in piece.reads}, **given}) if opened else []
            values = {**feed, **dict(zip(piece.gives, outputs, strict=True))}
            after.append({name: values[name] for name in kept})
        return after
    except MemoryError as error:
        raise out_of_memory(label) from error
    except runtime_errors() as error:
        if "allocat" in str(error):
            raise out_of_memory(label) from error
        raise ModelError(f"Cannot run the model on {label}: {said(error)}") from error


def held(state: State, before: State) -> State:
    """Return a state that is to be kept: what onnxruntime has made is copied into memory that is used again, so that none of its sessions
    holds any for the rest of the run; what was in the state before stays where it is."""
    known = {id(values) for feed in before for values in feed.values()}
    return [{name: values if id(values) in known else _copied(values) for name, values in feed.items()} for feed in state]


def _copied(values: Array) -> Array:
    if values.dtype.hasobject:
        return values
    copy = memory.lend_sparingly(values.shape, values.dtype)
    np.copyto(copy, values)
    return copy


def out_of_memory(label: str) -> FastbnError:
    """Return the error about a partition that takes more memory than a worker has."""
    remedy = "a smaller --batch, a smaller --memory for kept activations, or fewer workers on a machine may help"
    return FastbnError(f"Cannot go on with {label}: the memory of a worker does not suffice; {remedy}")


def statistics(piece: Piece, state: State, label: str) -> list[BatchStats]:
    """Return the statistics of a partition for each site of a piece's level, the feeds merged in order."""
    stats: dict[str, BatchStats] = {}
    for _, name, channels in piece.targets:
        if name not in stats:
            empty = BatchStats(0, np.zeros(channels), np.zeros(channels))
            merged = merge_stats([empty, *(_moments(_checked(feed[name], channels, name)) for feed in state)])
            if not (np.isfinite(merged.mean).all() and np.isfinite(merged.m2).all()):
                raise ModelError(expected("finite activations", f"NaN or Inf in '{name}' for {label}", "data"))
            stats[name] = merged
    return [stats[name] for _, name, _ in piece.targets]


class _Scratch(threading.local):
    """Memory of a thread for values in float64, used again and again: new memory costs more time than the sums."""

    def __init__(self) -> None:
        self._memory = np.empty(0)

    def widened(self, array: Array) -> FloatArray:
        """Return an array in float64, until the next call."""
        if self._memory.size < array.size:
            self._memory = np.empty(array.size)
        wide = self._memory[: array.size].reshape(array.shape)
        np.copyto(wide, array)
        return wide


_SCRATCH = _Scratch()


def _moments(array: Array) -> BatchStats:
    """Return the statistics of one array, in float64 from the first addition on; float32 sums would lose 1e-8 of a variance."""
    rows = max(1, BLOCK // max(1, array[0].size)) if len(array) else 1
    return merge_stats([batch_stats(_SCRATCH.widened(array[first : first + rows])) for first in range(0, max(1, len(array)), rows)])


def _checked(array: Array, channels: int, name: str) -> Array:
    if array.ndim < 2 or array.shape[1] != channels:
        raise ModelError(expected(f"data with {channels} channels along axis 1", f"shape {list(array.shape)}", name))
    return array


def normalized(
    pieces: Sequence[Piece], models: Sequence[bytes], state: State, setting: Setting, label: str, dtypes: Mapping[int, DTypes]
) -> list[list[BatchStats]]:
    """Return the statistics of every level for a partition in which each feed is normalized by its own: as in training."""
    found: list[list[BatchStats]] = []
    for number, feed in enumerate(state):
        parameters: dict[int, tuple[Array, Array]] = {}
        at: State = [feed]
        for level, (piece, model) in enumerate(zip(pieces, models, strict=True)):
            at = advance(piece, model, at, parameters, setting, label)
            own = statistics(piece, at, label)
            for (site, _, _), stats in zip(piece.targets, own, strict=True):
                parameters[site] = as_parameters(stats.mean, stats.var, dtypes[site])
            if number:
                found[level] = [before.merge(after) for before, after in zip(found[level], own, strict=True)]
            else:
                found.append(own)
    return found


def as_parameters(mean: FloatArray, var: FloatArray, dtypes: DTypes) -> tuple[Array, Array]:
    """Return a mean and a variance in the types of the model."""
    first, second = dtypes
    with np.errstate(over="ignore", under="ignore"):
        return mean.astype(first), var.astype(second)
