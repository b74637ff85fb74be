"""Interrupts: Ctrl-C, signals that the command takes for it, and times in which all of them wait or come too late."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

__all__ = ["in_order_of_end", "interrupts_deferred", "interrupts_end_it", "interrupts_ignored", "is_command", "stoppable", "submitted"]

ResultT = TypeVar("ResultT")

# Seconds between two looks at whether a job has ended.
LOOK = 0.2

# Signals that end a process, and that the command takes for an interrupt.
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
SIGNALS = (signal.SIGINT, *ENDING)


def _is_main_thread() -> bool:
    """Say whether this thread may set handlers."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP interrupt the block as Ctrl-C does, where they would end the process and leave its files behind."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    ours = [number for number in ENDING if _is_main_thread() and signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let an interrupt wait until the block is done; a signal that ends the process at once, or is ignored, does so still."""
    deferred: list[tuple[int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS if _is_main_thread()}
    waiting = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in waiting:
            signal.signal(number, lambda number, frame: deferred.append((number, frame)))
        yield
    finally:
        for number, handler in waiting.items():
            signal.signal(number, handler)
    for number, frame in deferred[:1]:
        waiting[number](number, frame)


def submitted(pool: Executor, function: Callable[..., ResultT], *arguments: object) -> Future[ResultT]:
    """Submit a job to a pool of threads; an interrupt in between would keep a lock of the pool for ever."""
    with interrupts_deferred():
        return pool.submit(function, *arguments)


def in_order_of_end(jobs: Collection[Future[ResultT]]) -> Iterator[Future[ResultT]]:
    """Yield jobs of threads as they end.

    `concurrent.futures.wait` and `as_completed` take the locks of all jobs for a moment. An interrupt in this moment keeps them: the
    threads then wait for ever to set their results, and so does whoever waits for the threads.
    """
    import queue  # here: what the command loads first is loaded without a handler of interrupts

    ended: queue.SimpleQueue[Future[ResultT]] = queue.SimpleQueue()
    with interrupts_deferred():
        for job in jobs:
            job.add_done_callback(ended.put)
    left = len(jobs)
    while left:
        try:
            job = ended.get(timeout=LOOK)
        except queue.Empty:  # some systems interrupt no wait without an end
            continue
        left -= 1
        yield job


def is_command() -> bool:
    """Say whether this process is the command: `fastbn`, or `python -m fastbn`."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return name in ("fastbn", "fastbn.exe") or sys.orig_argv[1:3] == ["-m", "fastbn"]


@contextlib.contextmanager
def interrupts_end_it() -> Iterator[None]:
    """Let Ctrl-C end the process without a word while the command is loaded, which has opened nothing yet."""
    is_ours = _is_main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Ignore interrupts while the block says the last words: one Ctrl-C is often followed by another."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS if _is_main_thread()}
    ours = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in ours:
        signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
