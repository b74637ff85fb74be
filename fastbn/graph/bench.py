"""Latency of two models in onnxruntime at its default options, side by side."""

from __future__ import annotations

from typing import TypedDict

from fastbn.errors import ArgumentError, FastbnError, ModelError, expected
from fastbn.graph.job import fold
from fastbn.graph.model import storage
from fastbn.graph.model.index import Index
from fastbn.graph.model.storage import ModelLike
from fastbn.graph.options import InputShapes, checked_shapes
from fastbn.graph.parity.feeds import Feed
from fastbn.graph.parity.reference import feeds_for
from fastbn.graph.ranges import whole_number
from fastbn.graph.reasons import first_few
from fastbn.graph.report import table
from fastbn.graph.runtime import Runnable, runtime_errors, said
from fastbn.graph.timing import Latency, time_runs, word_of

__all__ = ["BenchReport", "bench", "latency_table"]

# The most timed runs of each model that may be asked for.
MOST_RUNS = 1_000_000


class BenchReport(TypedDict):
    """The JSON report of a comparison of latencies."""

    schema: int
    bench: list[Latency]


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
        threads, model ("original" or "folded"), runs, median_ms, p90_ms, ratio (how many times as long as the original it takes), low and
        high (its 99 % interval, by a bootstrap over paired runs; None with fewer than 8, and for the original) and difference ("less" or
        "more" where the whole interval says so by more than 2 %, "unknown" without an interval and with a wide one, else "none").

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
        timings = time_runs({"original": before.model, "folded": after.model}, feed, runs)
    except runtime_errors() as error:  # its optimizer may fail where the plain models load
        raise ModelError(f"Cannot time the models: onnxruntime does not run them with its optimizer: {said(error)}") from error
    for each in (source, other):
        each.check_unchanged()
    return [row for each in timings for row in each.rows()]


def latency_table(rows: list[Latency]) -> list[str]:
    """Return what `bench` gives as lines of text."""
    cells = [["threads", "model", "median", "p90", "times the original's", "99 % interval", "difference"]]
    for row in rows:
        beside = ["", "", ""]
        if row["model"] != "original":
            interval = "-" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
            beside = [f"{row['ratio']:.2f}", interval, word_of(row)]
        cells.append([str(row["threads"]), row["model"], _time_text(row["median_ms"]), _time_text(row["p90_ms"]), *beside])
    return table(cells)


def _time_text(milliseconds: float) -> str:
    """Return a time with three digits and its unit."""
    value, unit = (milliseconds, "ms") if milliseconds < 999.5 else (milliseconds / 1e3, "s")
    return f"{value:#.3g} {unit}".replace(". ", " ")


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
