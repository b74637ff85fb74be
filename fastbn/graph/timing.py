"""How long models take in onnxruntime at its default options: runs in blocks of random order, so that all see the same machine."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from fastbn.graph.intervals import FEWEST_PAIRS, Difference, Ratio, paired_ratio
from fastbn.graph.runtime import Session, session

if TYPE_CHECKING:
    from fastbn.graph.parity.feeds import Feed

__all__ = ["Latency", "Timings", "time_models", "time_runs", "word_of"]

WARM_UP = 3

# Runs of a model in a block, the fastest of which is compared: one that another process interrupts takes many times as long.
MOST_RUNS = 5

# Seconds of a round, which is measured with the same sessions, and seconds after which no further round starts.
ROUND_SECONDS, LONGEST = 0.05, 3.0

# Half the width of an interval at which a ratio is precise.
PRECISE = 0.01

# Name -> a model's bytes, or its path.
Models: TypeAlias = Mapping[str, bytes | str]

# Name -> milliseconds [blocks, runs].
Round: TypeAlias = dict[str, NDArray[np.float64]]


class Latency(TypedDict):
    """How long one model takes on some threads: median and 90th percentile of its runs, and how many times as long as the first model it
    takes, with the ends of the 99 % interval (null with too few runs, and for the first model) and what they say: less, more, none, or
    unknown with too few runs and with an interval too wide to say anything."""

    threads: int
    model: str
    runs: int
    median_ms: float
    p90_ms: float
    ratio: float
    low: float | None
    high: float | None
    difference: Difference


def word_of(row: Latency) -> str:
    """Return what the difference of a row to the first model is called."""
    doubt = Ratio(row["ratio"], row["low"], row["high"]).doubt
    return {"less": "faster", "more": "slower", "none": "no difference", "unknown": doubt}[row["difference"]]


@dataclass(frozen=True)
class Timings:
    """Timed runs of several models on some threads.

    Attributes
    ----------
    threads : int
    rounds : list of dict of name -> array [blocks, runs]
        Milliseconds. In a block every model runs, in random order; the blocks of a round share their sessions.
    seed : int
        Of the bootstrap of `ratio`.
    """

    threads: int
    rounds: list[Round]
    seed: int = 0

    @property
    def names(self) -> list[str]:
        """The names of the models."""
        return list(self.rounds[0])

    def runs(self, name: str) -> NDArray[np.float64]:
        """Return the milliseconds of all runs of a model."""
        return np.concatenate([each[name].ravel() for each in self.rounds])

    def ratio(self, name: str, base: str) -> Ratio:
        """Return how many times as long as another a model takes."""
        return paired_ratio([np.log(each[name].min(axis=1) / each[base].min(axis=1)) for each in self.rounds], self.seed)

    @property
    def is_precise(self) -> bool:
        """Whether the interval of every ratio is narrow."""
        return all(self.ratio(name, base).width <= PRECISE for base, name in combinations(self.names, 2))

    def rows(self) -> list[Latency]:
        """Return the Latency of each model; the first is what the others are compared with."""
        rows = []
        for name in self.names:
            runs = self.runs(name)
            is_first = name == self.names[0]
            ratio = Ratio(1.0) if is_first else self.ratio(name, self.names[0])
            median, p90 = float(np.median(runs)), float(np.percentile(runs, 90))
            rows.append(
                Latency(
                    threads=self.threads,
                    model=name,
                    runs=len(runs),
                    median_ms=median,
                    p90_ms=p90,
                    ratio=ratio.ratio,
                    low=ratio.low,
                    high=ratio.high,
                    difference="none" if is_first else ratio.difference(),
                )
            )
        return rows


def time_runs(
    models: Models,
    feed: Feed,
    runs: int,
    *,
    limit: float | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Timings]:
    """Time a number of runs of each model on one input, on 1 and on all threads.

    Parameters
    ----------
    models : dict of name -> path or bytes
    feed : dict of name -> array
    runs : int
        Timed runs of each model; each is a round of its own, and all share their sessions.
    limit : float, optional
        Seconds after which no further run starts, for each number of threads; FEWEST_PAIRS are made in any case.
    seed : int
        Of the order of the models in each block, and of intervals.
    progress : callable of str, optional

    Returns
    -------
    list of Timings
        One for each number of threads.
    """
    tell = _silent if progress is None else progress

    def run(watch: _Watch) -> Iterator[Round]:
        watch.open()
        began = time.perf_counter()
        for number in range(runs):
            if limit is not None and number >= FEWEST_PAIRS and time.perf_counter() - began > limit:
                return
            tell(f"run {number + 1} of {runs}, {watch.on_threads}")
            yield watch.blocks(1, 1)

    return _timings(models, feed, seed, run, lambda timings: False)


def time_models(
    models: Models, feed: Feed, *, seed: int = 0, longest: float = LONGEST, progress: Callable[[str], None] | None = None
) -> list[Timings]:
    """Time models on one input until their ratios are precise, on 1 and on all threads.

    Parameters
    ----------
    models, feed, seed, progress
        As in `time_runs`.
    longest : float
        Seconds after which no further round starts, for one thread; half as many for all threads. FEWEST_PAIRS rounds are made in any case.

    Returns
    -------
    list of Timings
        One for each number of threads.
    """
    tell = _silent if progress is None else progress

    def run(watch: _Watch) -> Iterator[Round]:
        most = longest if watch.threads == 1 else longest / 2
        end = time.perf_counter() + most
        loading = watch.open()
        fresh = 2 * FEWEST_PAIRS * loading < most
        blocks, runs = watch.plan(max(ROUND_SECONDS, loading if fresh else 0))
        for number in itertools.count(1):
            tell(f"round {number}, {watch.on_threads}")
            if fresh and number > 1:
                watch.open()
            yield watch.blocks(blocks, runs)
            if number >= FEWEST_PAIRS and time.perf_counter() > end:
                return

    return _timings(models, feed, seed, run, lambda timings: len(timings.rounds) >= FEWEST_PAIRS and timings.is_precise)


def _silent(text: str) -> None:
    """Tell nobody."""


def _timings(
    models: Models, feed: Feed, seed: int, run: Callable[[_Watch], Iterator[Round]], is_enough: Callable[[Timings], bool]
) -> list[Timings]:
    """Return the Timings on 1 and on all threads: of the rounds that `run` makes, as long as they are not enough."""
    found = []
    for threads in sorted({1, _cpus()}):
        timings = Timings(threads, [], seed)
        for made in run(_Watch(models, feed, threads, seed)):
            timings.rounds.append(made)
            if is_enough(timings):
                break
        found.append(timings)
    return found


class _Watch:
    """Sessions of several models, and how long they run."""

    def __init__(self, models: Models, feed: Feed, threads: int, seed: int) -> None:
        self.models = models
        self.feed = feed
        self.threads = threads
        self.on_threads = f"{threads} thread{'s' if threads > 1 else ''}"
        self.random = np.random.default_rng(seed)
        self.sessions: dict[str, Session] = {}

    def open(self) -> float:
        """Make the sessions, anew where there are any, in random order; return the seconds that this took, and warm them up."""
        began = time.perf_counter()
        self.sessions = {}
        made = {}
        for name in self._order():
            made[name] = session(self.models[name], threads=self.threads, optimize=True)
        took = time.perf_counter() - began
        self.sessions = {name: made[name] for name in self.models}
        for _ in range(WARM_UP):
            for each in self.sessions.values():
                each.run(None, self.feed)
        return took

    def plan(self, seconds: float) -> tuple[int, int]:
        """Return how many blocks, and runs of a model in each, a round of these seconds has."""
        shortest = {name: times.min() for name, times in self.blocks(1, 1).items()}
        if sum(shortest.values()) < 1e3 * ROUND_SECONDS:  # another process may have interrupted the first
            shortest = {name: min(times.min(), shortest[name]) for name, times in self.blocks(4, 1).items()}
        turn = float(sum(shortest.values())) / 1e3
        runs = max(1 if turn > seconds else 2, min(MOST_RUNS, int(seconds / turn)))
        return max(1, int(seconds / (runs * turn))), runs

    def blocks(self, count: int, runs: int) -> Round:
        """Return name -> milliseconds [count, runs]."""
        times = {name: np.empty((count, runs)) for name in self.models}
        for block in range(count):
            for name in self._order():
                run, row = self.sessions[name].run, times[name][block]
                for number in range(runs):
                    start = time.perf_counter()
                    run(None, self.feed)
                    row[number] = 1e3 * (time.perf_counter() - start)
        return times

    def _order(self) -> list[str]:
        names = list(self.models)
        return [names[place] for place in self.random.permutation(len(names))]


def _cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
