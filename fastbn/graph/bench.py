"""Latency of models in onnxruntime at its default options, run by run in turn, so that all see the same machine."""

import os
import time

import numpy as np

from fastbn.errors import ArgumentError, FastbnError, ModelError, expected
from fastbn.graph.job import checked_shapes, fold
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.parity.reference import feeds_for
from fastbn.graph.ranges import whole_number
from fastbn.graph.reasons import first_few
from fastbn.graph.runtime import Runnable, runtime_errors, said, session

__all__ = ["bench", "side_by_side"]

WARM_UP = 3

# However slow the models are, a median and a 90th percentile take this many runs.
FEWEST_RUNS = 5


def bench(original, folded=None, *, runs=50, input_shapes=None):
    """Time two models.

    Parameters
    ----------
    original : path, bytes or ModelProto
    folded : the same, optional
        Without it, the original folded in memory.
    runs : int
        Timed runs of each model.
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
    runs = whole_number(runs, "runs", 1)
    input_shapes = checked_shapes(input_shapes)
    source = storage.load(original)
    index = Index(source, input_shapes=input_shapes)
    other = storage.load(fold(original, verify=False, input_shapes=input_shapes).to_bytes() if folded is None else folded)
    before, after = Runnable.of(source), Runnable.of(other)
    feed = feeds_for(before, index, input_shapes)[0]
    _check_runs(after, other.name, feed)
    try:
        return side_by_side({"original": before.model, "folded": after.model}, feed, runs)
    except runtime_errors() as error:  # its optimiser may fail where the plain models load
        raise ModelError(expected("models that onnxruntime runs with its optimiser", said(error), source.name)) from error


def _check_runs(model: Runnable, where: str, feed: dict) -> None:
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
        raise ModelError(expected("a model that onnxruntime runs on the inputs of the first one", said(error), where)) from error


def side_by_side(models, feed, runs, limit=None, progress=None):
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
    rows = []
    for threads in sorted({1, _cpus()}):
        sessions = {name: session(model, threads=threads, optimize=True) for name, model in models.items()}
        times = {name: [] for name in sessions}
        names = list(sessions)
        start_of_all = time.perf_counter()
        for turn in range(WARM_UP + runs):
            if progress:
                progress(f"run {turn + 1} of {WARM_UP + runs}, {threads} thread{'s' if threads > 1 else ''}")
            # Nobody is always the one after a certain other.
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
            row = {"threads": threads, "model": name, "runs": len(values), "median_ms": median, "p90_ms": p90, "ratio": median / base}
            rows.append(row)
    return rows


def _cpus():
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
