"""The job: find the models, fold each in its own task, here or on a cluster, and remember what is done."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from fastbn.cluster.connection import connected, default_workers, killed
from fastbn.cluster.locations import check_protocol, is_url
from fastbn.errors import ArgumentError, ArgumentTypeError, StorageError, expected
from fastbn.graph.ranges import number_between, optional_callable, size_in_bytes, whole_number
from fastbn.interrupts import in_order_of_end, submitted
from fastbn.sizes import LEAST_MEMORY
from fastbn.zoo.names import Entry, entries
from fastbn.zoo.result import Outcome, Zoo
from fastbn.zoo.task import Limits, end_processes, fold_one

__all__ = ["MEMORY", "RECORD", "SECONDS", "Progress", "fold_all"]

# Seconds and bytes that one model may take.
SECONDS, MEMORY = 600.0, 8 << 30

# The file of the output folder that says what has been done: JSON Lines, one for each model.
RECORD = "fold-all.jsonl"

# Is told (models done, models, the last outcome).
Progress: TypeAlias = Callable[[int, int, Outcome | None], None]

Location: TypeAlias = str | os.PathLike[str]


def fold_all(
    sources: Location | Sequence[Location],
    out: Location,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    jobs: int | None = None,
    timeout: float = SECONDS,
    memory: int | str = MEMORY,
    options: Sequence[str] = (),
    again: bool = False,
    progress: Progress | None = None,
) -> Zoo:
    """Fold and verify many models, each in a process of its own: one that crashes, hangs or fills the memory costs only itself.

    Parameters
    ----------
    sources : path, URL, or sequence of them
        Folders (with what lies below), globs and files, here or behind fsspec URLs.
    out : path or URL
        The folder for the folded models, under the names of the originals. Its file fold-all.jsonl says what has been done: a later run
        skips the files that are the same, with the same options, and whose result is there.
    workers, jobs : int, optional
        Models at once on this machine, as many as it has cores (0: one, as 1); or on the cluster, as many as its workers have threads.
    scheduler : str, optional
        The address of a dask scheduler, whose workers do it; they must see the sources and `out`.
    timeout, memory : float, int or str
        Seconds and bytes (or a text such as "8GiB") that one model may take, 256 MiB at least; 0 bytes: as many as there are.
    options, again : sequence of str, bool
        Options of `fastbn fold` for every model, as "--freeze-inputs"; again skips nothing.
    progress : callable of (done, count, Outcome or None), optional

    Returns
    -------
    Zoo

    Raises
    ------
    StorageError, ArgumentError, ArgumentTypeError, FastbnError
        A source cannot be read; two models would get the same name; an option cannot be used; the cluster cannot be used. Nothing has
        been written then.
    """
    began = time.perf_counter()
    size = size_in_bytes(memory, "memory")
    if 0 < size < LEAST_MEMORY:
        raise ArgumentError(expected(f"{LEAST_MEMORY >> 20}M or more, or 0 for all there is", str(memory), "memory"))
    limits = Limits(number_between(timeout, "timeout", 0.001, 1e6, "seconds, more than 0"), size)
    tell = optional_callable(progress, "progress") or (lambda *_: None)
    given = _checked(sources)
    check_protocol(os.fspath(out))
    found = entries(given, os.fspath(out))
    job = _Job(found, list(options), limits, _Record(os.fspath(out), again), tell)
    if scheduler is None:
        job.run_here(default_workers() if workers is None else max(1, whole_number(workers, "workers", 0, 1024)))
    else:
        job.run_on(scheduler, None if jobs is None else whole_number(jobs, "jobs", 1))
    return Zoo([job.outcomes[each] for each in found], time.perf_counter() - began)


def _checked(sources: Location | Sequence[Location]) -> list[str]:
    given = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    for each in given:
        if not isinstance(each, (str, os.PathLike)):
            raise ArgumentTypeError(expected("paths or URLs", type(each).__name__, "sources"))
    if not given:
        raise ArgumentError(expected("at least one source", "none", "sources"))
    return [os.fspath(each) for each in given]


class _Job:
    """The models of one run, and what has become of them so far."""

    def __init__(self, found: list[Entry], options: list[str], limits: Limits, record: _Record, progress: Progress) -> None:
        self.found, self.options, self.limits, self.record, self.progress = found, options, limits, record, progress
        self.outcomes: dict[Entry, Outcome] = {}

    def run_here(self, workers: int) -> None:
        """Fold the models in processes of this machine."""
        end_processes(False)
        pool = ThreadPoolExecutor(workers)
        try:
            before = [self.record.before(each.output) for each in self.found]
            jobs = {
                submitted(pool, fold_one, each, self.options, self.limits, outcome): each
                for each, outcome in zip(self.found, before, strict=True)
            }
            self.progress(0, len(self.found), None)
            for future in in_order_of_end(jobs):
                self._note(jobs[future], future)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end_processes(True)
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            end_processes(False)

    def run_on(self, scheduler: str, jobs: int | None) -> None:
        """Fold the models on the workers of a cluster."""
        with connected(0, scheduler, None) as client:
            most = jobs or sum(client.nthreads().values())
            left = iter(self.found)
            running: dict[Any, Entry] = {}
            self.progress(0, len(self.found), None)
            while True:
                for each in left:
                    before = self.record.before(each.output)
                    running[client.submit(fold_one, each, self.options, self.limits, before, pure=False)] = each
                    if len(running) >= most:
                        break
                if not running:
                    return
                for future in [each for each in running if each.done()]:
                    self._note(running.pop(future), future)
                time.sleep(0.05)

    def _note(self, entry: Entry, future: Future[Outcome] | Any) -> None:
        try:
            outcome = future.result()
        except Exception as error:
            if killed_by(error) is None:
                raise
            outcome = Outcome(entry.source, entry.output, "crashed", reason="it ended one worker after the other")
        self.outcomes[entry] = outcome
        self.record.add(outcome)
        self.progress(len(self.outcomes), len(self.found), outcome)


def killed_by(error: BaseException) -> str | None:
    """Return the key of the task that ended its workers; None for another error, or without dask."""
    with contextlib.suppress(ImportError):
        return killed(error)
    return None


class _Record:
    """What earlier runs have done, one line of JSON for each model; the last one counts."""

    def __init__(self, out: str, again: bool) -> None:
        self._lock = threading.Lock()
        self._path = None if is_url(out) else Path(out) / RECORD
        if self._path is not None and self._path.parent.exists() and not self._path.parent.is_dir():
            raise StorageError(f"Cannot write into '{out}': it is no folder")
        self._before = {} if again else {outcome.output: outcome for outcome in self._lines()}

    def _lines(self) -> Iterator[Outcome]:
        if self._path is None or not self._path.is_file():
            return
        for line in self._path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError):  # a line that a killed run has left half written
                yield Outcome(**json.loads(line))

    def before(self, output: str) -> Outcome | None:
        """Return what an earlier run has made of a model."""
        return self._before.get(output)

    def add(self, outcome: Outcome) -> None:
        """Write a line."""
        if self._path is None or outcome.status == "there":
            return
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(outcome.to_dict()) + "\n")
