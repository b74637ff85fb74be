"""What runs here: versions, kernels, threads; what a bug report should contain."""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import TypedDict

import numpy as np

from fastbn import _check, _native

__all__ = ["Config", "get_num_threads", "kernels", "set_num_threads", "show_config", "use_isa"]


class Config(TypedDict):
    """What `show_config` returns."""

    version: str
    isa: str
    isa_available: list[str]
    threads: int
    spin_microseconds: int
    python: str
    platform: str
    machine: str
    cpus: int | None
    numpy: str
    onnx: str | None
    onnxruntime: str | None


def kernels() -> list[str]:
    """Return the names of the array kernels in use: ``fbn_<operation>_<layout>_<dtype>_<isa>``.

    Returns
    -------
    list of str
        Those of one instruction set, chosen by the CPU, by the environment variable FASTBN_ISA or by `use_isa`.

    Examples
    --------
    >>> with use_isa("scalar"):
    ...     print(kernels()[0].startswith("fbn_"), kernels()[0].endswith("_scalar"))
    True True
    """
    return _native.kernel_names()


def get_num_threads() -> int:
    """Return the most threads that a call uses.

    At first these are FASTBN_NUM_THREADS or the CPUs that the affinity mask and the cgroup quota leave to this process.

    Examples
    --------
    >>> get_num_threads() >= 1
    True
    """
    return _native.num_threads()


def set_num_threads(n: int | np.integer) -> None:
    """Set the most threads that a call uses, in the whole process; results do not depend on it.

    Parameters
    ----------
    n : int
        At least 1; more than 256 means 256.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        n is not an integer of at least 1.

    Examples
    --------
    >>> before = get_num_threads()
    >>> set_num_threads(2)
    >>> get_num_threads()
    2
    >>> set_num_threads(before)
    """
    _native.set_num_threads(min(_check.positive_int(n, "n"), 256))


# A signal may be handled inside a block's entry or exit, by code that enters another: the lock is reentrant, and each step leaves the two
# variables in a state that a whole block in between does not change.
_lock = threading.RLock()
_open: list[tuple[use_isa, str, int]] = []  # (block, its name, its thread) in the order in which they were entered
_before: str | None = None  # what was in use before the first of them


_forked_from_torch = False


def forked_from_torch() -> bool:
    """Whether this process was forked from one that had loaded PyTorch: it lacks the threads that OpenMP waits for."""
    return _forked_from_torch


def _after_fork() -> None:
    """Forget the blocks of other threads, which a child does not have, and the lock that one of them may have held."""
    global _lock, _before, _forked_from_torch
    _forked_from_torch = _forked_from_torch or "torch" in sys.modules
    _lock = threading.RLock()
    _open[:] = [entered for entered in _open if entered[2] == threading.get_ident()]
    if _before is not None:
        _native.use_isa(_open[-1][1] if _open else _before)
    _before = _before if _open else None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class use_isa:
    """Context manager: within it, the kernels of one instruction set run, in the whole process; results do not depend on it.

    Of blocks that are open in several threads, the one entered last decides; after the last of them the choice is what it was before the
    first.

    Parameters
    ----------
    name : str
        One of ``show_config()["isa_available"]``, such as "avx512", "avx2", "sse2", "neon" or "scalar".

    Raises
    ------
    ArgumentError
        A name that this build or this CPU does not have.

    Examples
    --------
    >>> with use_isa("scalar"):
    ...     show_config()["isa"]
    'scalar'
    """

    def __init__(self, name: str) -> None:
        self._name = _check.isa_of(name)

    def __enter__(self) -> None:
        global _before
        with _lock:
            in_use = _native.isa()
            _open.append((self, self._name, threading.get_ident()))
            if _before is None:
                _before = in_use
            _native.use_isa(self._name)

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        global _before
        with _lock:
            del _open[max(index for index, (block, *_) in enumerate(_open) if block is self)]
            name = _open[-1][1] if _open else _before
            if name is not None:
                _native.use_isa(name)
            if not _open:
                _before = None


def show_config() -> Config:
    """Return what runs here as a dict that JSON can hold.

    Returns
    -------
    dict
        version, isa (in use), isa_available (names, the best first), threads (the most that a call uses), spin_microseconds (how long
        they look for the next call before they sleep), python, platform, machine, cpus (those this process may use), numpy, onnx and
        onnxruntime (None where not installed).

    Examples
    --------
    >>> config = show_config()
    >>> config["isa"] in config["isa_available"]
    True
    """
    import platform
    from importlib import metadata

    import fastbn

    def installed(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "version": fastbn.__version__,
        "isa": _native.isa(),
        "isa_available": _native.isas(),
        "threads": get_num_threads(),
        "spin_microseconds": _native.spin_microseconds(),
        "python": platform.python_version(),
        "platform": sys.platform,
        "machine": platform.machine(),
        "cpus": cpus,
        "numpy": np.__version__,
        "onnx": installed("onnx"),
        "onnxruntime": installed("onnxruntime"),
    }
