"""A client of a cluster: of processes that are started on this machine, or of a scheduler that runs already."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

from fastbn.errors import ArgumentError, FastbnError, StorageError
from fastbn.graph.ranges import whole_number
from fastbn.graph.reasons import first_few
from fastbn.graph.rewrite.workdir import Workdir
from fastbn.graph.runtime import runtime_errors

__all__ = ["Client", "Future", "connected", "default_workers", "finished", "killed", "large_graphs", "wait_for"]

# distributed.Client and distributed.Future: the library has no types that hold with and without it.
Client = Any
Future = Any

# Processes on this machine at most.
MOST_WORKERS = 1024

# Seconds in which a scheduler must answer, in which one without workers must get one, and in which workers say which versions they have.
ANSWER, JOINING, VERSIONS = 4, 4, 30

# Bytes that a worker of this machine may take beside what it keeps: the interpreter, the libraries, the arrays of one partition.
OWN = 1 << 30

# Seconds between two looks at how many tasks are done.
LOOK = 0.2


def default_workers() -> int:
    """Return the number of cores that this process may use."""
    from fastbn import show_config

    return show_config()["cpus"] or 1


def _distributed() -> Any:  # a module without types that hold without it
    try:
        import distributed
    except ImportError as error:
        name = (error.name or "distributed").partition(".")[0]
        raise FastbnError(
            f"Cannot use a cluster: {name} is not installed (pip install dask distributed); --workers 0 works without it"
        ) from error
    return distributed


@contextlib.contextmanager
def connected(workers: int, scheduler: str | None, client: Client | None, kept: int = 0) -> Iterator[Client]:
    """Yield a client; what was started for it is ended when the block ends, however that happens.

    Parameters
    ----------
    workers : int
        Processes to start on this machine, where neither a scheduler nor a client is given.
    scheduler : str or None
        The address of a scheduler.
    client : distributed.Client or None
    kept : int
        Bytes of results that each process of this machine keeps in memory; it writes the others to a temporary folder.

    Raises
    ------
    FastbnError
        dask is not installed; a worker has no onnxruntime, or another version of fastbn.
    StorageError
        The scheduler cannot be reached, or has no workers.
    """
    distributed = _distributed()
    with _silent_logs():
        if client is not None:
            if not isinstance(client, distributed.Client):
                raise ArgumentError(f"Expected a distributed.Client, got {type(client).__name__} - at `client`")
            _check_workers(client, "the cluster")
            yield client
        elif scheduler is not None:
            with contextlib.closing(_client_of(distributed, scheduler)) as own:
                _check_workers(own, f"the scheduler at '{scheduler}'")
                yield own
        else:
            with _local(distributed, whole_number(workers, "workers", 1, MOST_WORKERS), kept) as own:
                _check_workers(own, "this machine")
                yield own


@contextlib.contextmanager
def _silent_logs() -> Iterator[None]:
    """Keep dask's logs of lost workers and closed connections off stderr, where nobody has set a level for them."""
    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _client_of(distributed: Any, scheduler: str) -> Client:
    try:
        kind, place = distributed.comm.parse_address(scheduler)
        if kind in ("tcp", "tls"):  # a client that is not made in the end waits when it is removed
            distributed.comm.parse_host_port(place)
        return distributed.Client(scheduler, timeout=ANSWER, set_as_default=False)
    except (OSError, TimeoutError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0].strip() or f"no answer in {ANSWER} s"
        raise StorageError(f"Cannot reach the scheduler at '{scheduler}': {reason[:200]}") from error


@contextlib.contextmanager
def _local(distributed: Any, workers: int, kept: int) -> Iterator[Client]:
    """Yield a client of processes that are started on this machine."""
    import dask

    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise FastbnError('Cannot start workers: the calling script runs again in each; put the call under `if __name__ == "__main__":`')
    limit = kept + OWN
    memory = {"target": max(kept, 1) / limit, "spill": False, "pause": False, "terminate": False}
    settings = {f"distributed.worker.memory.{name}": value for name, value in memory.items()}
    with Workdir() as workdir, dask.config.set(settings):
        try:
            cluster = distributed.LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
                memory_limit=limit,
                local_directory=str(workdir.path),
                silence_logs=logging.CRITICAL,
            )
        except (OSError, RuntimeError, TimeoutError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise FastbnError(f"Cannot start {workers} workers on this machine: {reason[:200]}") from error
        with contextlib.closing(cluster), contextlib.closing(distributed.Client(cluster, set_as_default=False)) as client:
            try:
                yield client
            except BaseException:
                _end_workers(cluster)
                raise


def _end_workers(cluster: Any) -> None:
    """End the processes of a cluster of this machine at once: closing it would wait for what they do, whose results nobody wants."""
    for nanny in list(cluster.workers.values()):
        nanny.auto_restart = False
        number = getattr(nanny.process, "pid", None)
        if number is not None:
            with contextlib.suppress(OSError):
                os.kill(number, getattr(signal, "SIGKILL", signal.SIGTERM))


def _versions() -> tuple[str, str]:
    """Return the versions of fastbn and onnxruntime of a worker, "" for one that is not installed."""
    from fastbn import __version__, show_config

    try:
        runtime_errors()
    except FastbnError:
        return __version__, ""
    return __version__, str(show_config()["onnxruntime"])


def _check_workers(client: Client, where: str) -> None:
    """Raise where there is no worker, or one that could not do the work or would round differently."""
    from fastbn import __version__

    try:
        client.wait_for_workers(1, timeout=JOINING)
        answers = client.run(_versions, on_error="return")
    except (TimeoutError, OSError) as error:
        raise StorageError(f"Cannot use {where}: it has no workers") from error
    runtimes: dict[str, str] = {}
    for address, answer in sorted(answers.items()):
        if isinstance(answer, BaseException):
            reason = (str(answer).splitlines() or [type(answer).__name__])[0]
            raise FastbnError(f"Cannot use the worker at {address}: it cannot load fastbn ({reason[:200]})")
        version, runtime = answer
        if version != __version__:
            raise FastbnError(f"Cannot use the worker at {address}: it has fastbn {version}, and this process {__version__}")
        if not runtime:
            raise FastbnError(
                f"Cannot use the worker at {address}: onnx or onnxruntime is not installed there (pip install onnx onnxruntime)"
            )
        runtimes.setdefault(runtime, address)
    if len(runtimes) > 1:
        found = first_few([f"{version} at {address}" for version, address in runtimes.items()])
        raise FastbnError(f"Cannot use {where}: its workers have several versions of onnxruntime, which may round differently: {found}")


def large_graphs() -> contextlib.AbstractContextManager[object]:
    """Return a context in which dask does not warn of tasks that hold models or arrays."""
    import dask

    setting: contextlib.AbstractContextManager[object] = dask.config.set({"distributed.admin.large-graph-warning-threshold": 1 << 50})
    return setting


def finished(futures: Sequence[Future]) -> int:
    """Return how many are done."""
    return sum(future.status in ("finished", "error") for future in futures)


def wait_for(future: Future, parts: Sequence[Future], tell: Callable[[int, int], None]) -> object:
    """Return the result of a future, telling meanwhile how many of those that it is made of are done.

    Raises
    ------
    FastbnError
        The cluster lost it.
    Exception
        What the task raised.
    """
    while future.status == "pending":
        # Not future.result(timeout=...): a time-out during the transfer of a result would cancel every later transfer of this client.
        with future.client.as_current(), contextlib.suppress(TimeoutError, CancelledError):
            _distributed().wait([future], timeout=LOOK)
        tell(finished(parts), len(parts))
    if future.status in ("cancelled", "lost"):
        raise FastbnError("Cannot go on: the cluster has lost the run; was its scheduler ended?")
    return future.result()


def killed(error: BaseException) -> str | None:
    """Return the key of the task that ended one worker after the other, None for another error."""
    from distributed.scheduler import KilledWorker

    return str(error.task) if isinstance(error, KilledWorker) else None
