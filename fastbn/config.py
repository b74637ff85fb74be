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


_lock = threading.Lock()
# (block, name): what was in use before the first block of `use_isa`, then the blocks in the order in which they were entered
_open: list[tuple[use_isa | None, str]] = []


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
        with _lock:
            if not _open:
                _open.append((None, _native.isa()))
            _open.append((self, self._name))
            _native.use_isa(self._name)

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        with _lock:
            last = max(index for index, (block, _) in enumerate(_open) if block is self)
            del _open[last]
            _native.use_isa(_open[-1][1])
            if len(_open) == 1:
                _open.clear()


def show_config() -> Config:
    """Return what runs here as a dict that JSON can hold.

    Returns
    -------
    dict
        version, isa (in use), isa_available (names, the best first), threads (the most that a call uses), python, platform, machine,
        cpus (those this process may use), numpy, onnx and onnxruntime (None where not installed).

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
        "python": platform.python_version(),
        "platform": sys.platform,
        "machine": platform.machine(),
        "cpus": cpus,
        "numpy": np.__version__,
        "onnx": installed("onnx"),
        "onnxruntime": installed("onnxruntime"),
    }
