"""Interrupts that wait: Ctrl-C, and the signals that the command takes for one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["interrupts_deferred"]

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let an interrupt wait until the block is done; a signal that ends the process at once, or is ignored, does so still."""
    deferred: list[tuple[int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    waiting = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        waiting = {}
    try:
        for number in waiting:
            signal.signal(number, lambda number, frame: deferred.append((number, frame)))
        yield
    finally:
        for number, handler in waiting.items():
            signal.signal(number, handler)
    for number, frame in deferred[:1]:
        waiting[number](number, frame)
