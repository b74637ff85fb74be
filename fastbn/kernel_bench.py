"""Which way the kernels take for a shape on this machine, why, and how long it takes: what a user with another CPU can see and report."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np

from fastbn import _check, _native
from fastbn.config import Config, get_num_threads, set_num_threads, show_config
from fastbn.dtypes import dtype_code, dtype_name
from fastbn.errors import ArgumentError
from fastbn.functional import batch_norm, batch_norm_backward, batch_norm_train
from fastbn.geometry import find_layout
from fastbn.stats import BatchStats

__all__ = [
    "KernelBench",
    "KernelBenchReport",
    "Schedule",
    "Timing",
    "bench_kernels",
    "kernel_lines",
    "kernel_schedule",
    "percentile",
    "time_calls",
]

Operation: TypeAlias = Literal["inference", "training", "backward"]
Way: TypeAlias = Literal["by planes", "by columns"]
Store: TypeAlias = Literal["streaming", "ordinary"]

OPERATIONS: tuple[Operation, ...] = ("inference", "training", "backward")

# Calls that are timed at most.
MOST_CALLS = 2000

# What NumPy has at most.
MOST_AXES = 64


class Schedule(TypedDict):
    """How one operation visits tensors of a shape; results do not depend on it. `reduction` is None where nothing is added up, `fused`
    says whether channels are mapped as soon as they are reduced, and `why` gives the reasons, a sentence each. `threads` and `store` are
    those of the fastest way so far; the first calls of a shape, and now and then a later one, try others."""

    operation: Operation
    reduction: Way | None
    map: Way
    fused: bool
    store: Store
    threads: int
    why: list[str]


class Timing(Schedule):
    """A schedule and its time: the 10th percentile of its calls in microseconds, and as a multiple of np.copyto of the same array."""

    us: float
    copies: float


class KernelBench(TypedDict):
    """What `bench_kernels` returns."""

    shape: list[int]
    axis: int
    dtype: str
    bytes: int
    copy_us: float
    timings: list[Timing]
    config: Config


class KernelBenchReport(KernelBench):
    """The JSON report of a `KernelBench`."""

    schema: int


def _sizes(shape: Sequence[int], axis: int, dtype: Any) -> tuple[tuple[int, ...], int, np.dtype[Any], int]:
    """Return the checked shape, the axis from 0 on, the dtype and its number."""
    sizes = tuple(_check.positive_int(size, "shape") for size in shape)
    if not 0 < len(sizes) <= MOST_AXES:
        raise ArgumentError(f"Expected 1 to {MOST_AXES} dimensions, got {len(sizes)} - at `shape`")
    if math.prod(sizes) >= 1 << 40:
        raise ArgumentError(f"Expected 1 to 2**40 elements, got {sizes} - at `shape`")
    if isinstance(axis, bool) or not isinstance(axis, int) or not -len(sizes) <= axis < len(sizes):
        raise ArgumentError(f"Expected an axis of {len(sizes)} dimensions, got {axis!r} - at `axis`")
    try:
        resolved = np.dtype(dtype)
    except TypeError as error:
        raise ArgumentError(f"Expected a dtype, got {dtype!r} - at `dtype`") from error
    code = dtype_code(resolved)
    if code is None:
        raise ArgumentError(f"Expected float32, float64, float16 or bfloat16, got {dtype_name(resolved)} - at `dtype`")
    return sizes, axis % len(sizes), resolved, code


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.3g} MB" if size >= 1 << 16 else f"{size} bytes"


def _count(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def _compared(plan: dict[str, Any], names: list[str]) -> str:
    """Return what is known of the ways that the kernels compare by the time of their calls."""
    times = [_time_text(ns / 1e3) if ns else "not yet" for ns in plan["way_nanoseconds"][: len(names)]]
    if not any(plan["way_nanoseconds"]):
        return f"the first calls will compare {', '.join(names)}"
    return "by the time of calls: " + ", ".join(f"{name} {text}" for name, text in zip(names, times, strict=True))


def _differ(plan: dict[str, Any], name: Literal["way_threads", "way_streams"]) -> bool:
    return len(set(plan[name][: plan["ways"]])) > 1


def _ways(plan: dict[str, Any]) -> list[str]:
    """Return the ways that the kernels compare, by threads and stores as far as these differ."""
    count = plan["ways"]
    parts = [_count(number) if _differ(plan, "way_threads") else "" for number in plan["way_threads"][:count]]
    names = ["streaming stores" if stream else "ordinary stores" for stream in plan["way_streams"][:count]]
    stores = [name if _differ(plan, "way_streams") else "" for name in names]
    return [" with ".join(filter(None, pair)) for pair in zip(parts, stores, strict=True)]


def _why_threads(plan: dict[str, Any], elements: int) -> str:
    threads = plan["threads"]
    if _differ(plan, "way_threads"):
        return f"{_count(threads)}: {_compared(plan, _ways(plan))}"
    if threads == get_num_threads():
        return f"{_count(threads)}: all that may be used"
    return f"{_count(threads)}: more would cost more than they save with {elements} elements"


def _why_store(plan: dict[str, Any], store: Store) -> str:
    if _differ(plan, "way_streams") and _differ(plan, "way_threads"):
        return f"{store} stores: chosen together with the threads"
    if _differ(plan, "way_streams"):
        return f"{store} stores: {_compared(plan, _ways(plan))}"
    size, cache = _megabytes(plan["bytes"]), _megabytes(plan["last_cache"])
    if plan["streams"]:
        return f"{store} stores: the tensors have {size}, more than {_megabytes(plan['most_bytes'])} of a last cache of {cache}"
    return f"{store} stores: the tensors have {size}, which caches of {_megabytes(plan['core_cache'])} and {cache} hold"


def _schedule(operation: Operation, sizes: tuple[int, ...], axis: int, dtype: np.dtype[Any], code: int) -> Schedule:
    strides = tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
    layout = find_layout(sizes, axis, 1, strides)
    assert layout is not None  # C-contiguous memory always has one
    plan = _native.Job(layout, code).describe(strides=strides, has_dy=operation == "backward", has_stats=operation != "inference")
    store: Store = "streaming" if plan["streams"] else "ordinary"
    why = [_why_threads(plan, math.prod(sizes)), _why_store(plan, store)]
    if operation != "inference" and plan["reduces_by_columns"]:
        why.append("sums by columns: channels lie side by side, or planes are short and samples many")
    elif operation != "inference":
        why.append("sums by planes: the values of a channel lie side by side")
    if plan["fused"] and operation != "inference":
        why.append(f"fused: channels are mapped while a core's cache of {_megabytes(plan['core_cache'])} has them")
    return {
        "operation": operation,
        "reduction": None if operation == "inference" else "by columns" if plan["reduces_by_columns"] else "by planes",
        "map": "by columns" if plan["maps_by_columns"] else "by planes",
        "fused": bool(plan["fused"]) and operation != "inference",
        "store": store,
        "threads": plan["threads"],
        "why": why,
    }


def kernel_schedule(shape: Sequence[int], *, axis: int = 1, dtype: Any = "float32") -> list[Schedule]:
    """Return how inference, training and the backward pass visit C-contiguous tensors of a shape on this machine, and why.

    Parameters
    ----------
    shape : sequence of int
        Sizes of at least 1; no memory of that size is taken.
    axis : int
        The channel axis.
    dtype : dtype
        float32, float64, float16 or ml_dtypes.bfloat16.

    Returns
    -------
    list of dict
        One `Schedule` for each operation, for the number of threads in use. docs/numerics.md says where each limit comes from.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A size, the axis or the dtype cannot be used.

    Examples
    --------
    >>> [row["reduction"] for row in kernel_schedule((32, 64, 56, 56))]
    [None, 'by planes', 'by planes']
    >>> kernel_schedule((32, 56, 56, 64), axis=-1)[1]["reduction"]
    'by columns'
    """
    checked = _sizes(shape, axis, dtype)
    return [_schedule(operation, *checked) for operation in OPERATIONS]


def time_calls(call: Callable[[], object], seconds: float, least: int = 7) -> list[float]:
    """Call once, and then for some seconds and at least `least` times; return how long each took, in microseconds."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < MOST_CALLS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def percentile(times: list[float]) -> float:
    """Return the 10th percentile."""
    return sorted(times)[len(times) // 10]


def _calls(sizes: tuple[int, ...], axis: int, dtype: np.dtype[Any]) -> tuple[Callable[[], object], dict[Operation, Callable[[], object]]]:
    """Return a copy and the operations, over arrays of their own."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(sizes, dtype=np.float32).astype(dtype) for _ in range(2))
    out, channels = np.zeros_like(x), sizes[axis]
    values = np.ones(channels, np.float32)
    stats = BatchStats(x.size // channels, np.zeros(channels), np.full(channels, float(x.size // channels)))
    return lambda: np.copyto(out, x), {
        "inference": lambda: batch_norm(x, values, values, values, values, axis=axis, out=out),
        "training": lambda: batch_norm_train(x, values, values, axis=axis, out=out),
        "backward": lambda: batch_norm_backward(dy, x, stats, values, values, axis=axis, out=out),
    }


def _fits(size: int) -> bool:
    """Whether the machine has so much memory at all: a system that promises more ends the process while the arrays are filled."""
    return size <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bench_kernels(shape: Sequence[int], *, axis: int = 1, dtype: Any = "float32", seconds: float = 0.2) -> KernelBench:
    """Measure inference, training and the backward pass of a shape on this machine, on one thread and on all, beside a copy.

    Parameters
    ----------
    shape, axis, dtype
        As in `kernel_schedule`; four arrays of this size are allocated.
    seconds : float
        For each figure.

    Returns
    -------
    dict
        A `KernelBench`: times in microseconds and in copies, each with its schedule and the reasons for it. A copy of the same array
        (np.copyto, one thread) is what memory or the cache allow; tools/bench_kernels.py has more roofs and other libraries.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        As `kernel_schedule`; `seconds` is not a positive number.
    MemoryError
        The arrays do not fit.

    Examples
    --------
    >>> bench = bench_kernels((2, 3, 8, 8), seconds=0.001)
    >>> [row["operation"] for row in bench["timings"] if row["threads"] == 1][:3]
    ['inference', 'training', 'backward']
    """
    sizes, axis, resolved, code = _sizes(shape, axis, dtype)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < 3600:
        raise ArgumentError(f"Expected a number of seconds above 0, got {seconds!r} - at `seconds`")
    if not _fits(4 * math.prod(sizes) * resolved.itemsize):
        raise MemoryError("four arrays of this size are more than the machine's memory")
    copy, calls = _calls(sizes, axis, resolved)
    copy_us = percentile(time_calls(copy, seconds))
    most = get_num_threads()
    timings: list[Timing] = []
    try:
        for threads in sorted({1, most}):
            set_num_threads(threads)
            for operation, call in calls.items():
                us = percentile(time_calls(call, seconds))
                schedule = _schedule(operation, sizes, axis, resolved, code)
                if threads > 1 and schedule["threads"] == 1:
                    continue
                timings.append({**schedule, "us": us, "copies": us / copy_us})
    finally:
        set_num_threads(most)
    return {
        "shape": list(sizes),
        "axis": axis,
        "dtype": dtype_name(resolved),
        "bytes": math.prod(sizes) * resolved.itemsize,
        "copy_us": copy_us,
        "timings": timings,
        "config": show_config(),
    }


def kernel_lines(bench: KernelBench) -> list[str]:
    """Return what `bench_kernels` gives as lines of text."""
    size = f"{','.join(map(str, bench['shape']))} {bench['dtype']}, channels on axis {bench['axis']}, {_megabytes(bench['bytes'])}"
    lines = [f"{size}: a copy takes {_time_text(bench['copy_us'])} on one thread"]
    widths = (9, 11, 10, 8, 12, 12, 1)
    rows = [("threads", "operation", "time", "copies", "sums", "results", "stores")]
    for row in bench["timings"]:
        sums = "-" if row["reduction"] is None else row["reduction"]
        how = "fused" if row["fused"] else row["map"]
        rows.append((str(row["threads"]), row["operation"], _time_text(row["us"]), f"{row['copies']:#.3g}", sums, how, row["store"]))
    lines += ["".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines + [f"why  {sentence}" for sentence in dict.fromkeys(sentence for row in bench["timings"] for sentence in row["why"])]


def _time_text(us: float) -> str:
    """Return a time with three digits and its unit."""
    value, unit = (us, "us") if us < 999.5 else (us / 1e3, "ms")
    return f"{value:#.3g} {unit}".replace(". ", " ")
