"""Latency of models in onnxruntime at its default options, run by run in turn, so that all see the same machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TypedDict

import numpy as np

from fastbn.errors import ArgumentError, FastbnError, ModelError, expected
from fastbn.graph.job import InputShapes, checked_shapes, fold
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.model.storage import ModelLike
from fastbn.graph.parity.feeds import Feed
from fastbn.graph.parity.reference import feeds_for
from fastbn.graph.ranges import whole_number
from fastbn.graph.reasons import first_few
from fastbn.graph.runtime import Runnable, runtime_errors, said, session

__all__ = ["Latency", "bench", "side_by_side"]

WARM_UP = 3

# The most timed runs of each model that may be asked for.
MOST_RUNS = 1_000_000

# The fewest timed runs, however slow the models are: a median and a 90th percentile need them.
FEWEST_RUNS = 5


class Latency(TypedDict):
    """How long one model takes on some threads: median and 90th percentile of its runs, and the median as a part of the first model's."""

    threads: int
    model: str
    runs: int
    median_ms: float
    p90_ms: float
    ratio: float


def bench(
    original: ModelLike, folded: ModelLike | None = None, *, runs: int = 50, input_shapes: InputShapes | None = None
) -> list[Latency]:
    """Time two models.

    Parameters
    ----------
    original : path, bytes or ModelProto
    folded : the same, optional
        Without it, the original folded in memory.
    runs : int
        Timed runs of each model, a million at most.
    input_shapes : dict of name -> sequence of int, optional

    Returns
    -------
    list of dict
        As from `side_by_side`, the models called original and folded.

    Raises
    ------
    StorageError
        A file cannot be read.
    ModelError
        A model is malformed, or onnxruntime cannot run it.
    ArgumentError, ArgumentTypeError
        An option cannot be used, or the second model does not take the inputs of the first.
    """
    runs = whole_number(runs, "runs", 1, MOST_RUNS)
    shapes = checked_shapes(input_shapes)
    source = storage.load(original)
    index = Index(source, input_shapes=shapes)
    other = storage.load(fold(original, verify=False, input_shapes=input_shapes).to_bytes() if folded is None else folded)
    before, after = Runnable.of(source), Runnable.of(other)
    feed = feeds_for(before, index, shapes)[0]
    _check_runs(after, other.name, feed)
    try:
        rows = side_by_side({"original": before.model, "folded": after.model}, feed, runs)
    except runtime_errors() as error:  # its optimizer may fail where the plain models load
        raise ModelError(f"Cannot time the models: onnxruntime does not run them with its optimizer: {said(error)}") from error
    for each in (source, other):
        each.check_unchanged()
    return rows


def _check_runs(model: Runnable, where: str, feed: Feed) -> None:
    """Refuse a model that onnxruntime does not load, or not run on the inputs of another; its missing data files are the usual reason."""
    try:
        loaded = model.session()
        wanted = [entry.name for entry in loaded.get_inputs()]
        missing = [name for name in wanted if name not in feed]
        if missing or len(wanted) < len(feed):
            raise ArgumentError(
                expected(f"the inputs {first_few(list(feed))} as the first model has them", first_few(wanted) or "none", where)
            )
        loaded.run(None, feed)
    except runtime_errors() as error:
        if isinstance(error, FastbnError):
            raise
        raise ModelError(f"Cannot time '{where}': onnxruntime does not run it on the inputs of the first model: {said(error)}") from error


def side_by_side(
    models: Mapping[str, bytes | str],
    feed: Feed,
    runs: int,
    limit: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Latency]:
    """Time models on one input, on 1 and on all threads.

    Parameters
    ----------
    models : dict of name -> path or bytes
        The first is what the others are compared with.
    feed : dict of name -> array
    runs : int
        Timed runs of each model.
    limit : float, optional
        Seconds after which no further run starts, for each number of threads; FEWEST_RUNS are made in any case.
    progress : callable of str, optional

    Returns
    -------
    list of dict
        threads, model, runs, median_ms, p90_ms and ratio (the median as a part of the first model's).
    """
    rows: list[Latency] = []
    for threads in sorted({1, _cpus()}):
        sessions = {name: session(model, threads=threads, optimize=True) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in sessions}
        names = list(sessions)
        start_of_all = time.perf_counter()
        for turn in range(WARM_UP + runs):
            if progress:
                progress(f"run {turn + 1} of {WARM_UP + runs}, {threads} thread{'s' if threads > 1 else ''}")
            # Rotate the order so that no model always follows the same one.
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = time.perf_counter()
                sessions[name].run(None, feed)
                if turn >= WARM_UP:
                    times[name].append(1e3 * (time.perf_counter() - start))
            late = limit is not None and time.perf_counter() - start_of_all > limit
            if late and turn + 1 >= WARM_UP + FEWEST_RUNS:
                break
        base = float(np.median(times[names[0]]))
        for name, values in times.items():
            median, p90 = float(np.median(values)), float(np.percentile(values, 90))
            rows.append(Latency(threads=threads, model=name, runs=len(values), median_ms=median, p90_ms=p90, ratio=median / base))
    return rows


def _cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
