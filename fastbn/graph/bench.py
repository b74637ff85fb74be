"""Latency of two models in onnxruntime at its default options, run by run in turn, so that both see the same machine."""

import os
import time

import numpy as np

from fastbn.graph import storage
from fastbn.graph.folding import fold
from fastbn.graph.model import Index
from fastbn.graph.runtime import Runnable, session
from fastbn.graph.verify import feeds_for

__all__ = ["bench"]

WARM_UP = 3


def bench(original, folded=None, *, runs=50, input_shapes=None):
    """Time two models.

    Parameters
    ----------
    original : path, bytes or ModelProto
    folded : the same, optional
        Without it, the original folded in memory.
    runs : int
        Timed runs of each model.
    input_shapes : dict of name -> tuple of int, optional

    Returns
    -------
    list of dict
        threads, model, median_ms, p90_ms and ratio (the median as a part of the original's), for 1 and for all threads.
    """
    source = storage.load(original)
    index = Index(source, input_shapes=input_shapes)
    if folded is None:
        after = Runnable.of(storage.load(fold(original, verify=False, input_shapes=input_shapes).to_bytes()))
    else:
        after = Runnable.of(storage.load(folded))
    models = {"original": Runnable.of(source), "folded": after}
    feed = feeds_for(models["original"], index, input_shapes)[0]
    rows = []
    for threads in sorted({1, os.cpu_count() or 1}):
        sessions = {name: session(model.model, threads=threads, optimise=True) for name, model in models.items()}
        times = {name: [] for name in sessions}
        for turn in range(WARM_UP + runs):
            for name, run in sessions.items():
                start = time.perf_counter()
                run.run(None, feed)
                if turn >= WARM_UP:
                    times[name].append(1e3 * (time.perf_counter() - start))
        base = float(np.median(times["original"]))
        for name, values in times.items():
            median = float(np.median(values))
            p90 = float(np.percentile(values, 90))
            rows.append({"threads": threads, "model": name, "median_ms": median, "p90_ms": p90, "ratio": median / base})
    return rows
