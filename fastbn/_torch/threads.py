"""The kernels on PyTorch's own threads.

Between two parallel regions the threads of an OpenMP library look for the next one for milliseconds; threads of ours would wait for their
CPUs meanwhile, so that a layer took several times as long as its kernels. docs/numerics.md: threads.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from fastbn import _native
from fastbn.config import forked_from_torch

__all__ = ["share_threads"]


def share_threads() -> bool:
    """Have the kernels run on the threads of PyTorch's OpenMP library; return whether it has one that this process can use."""
    if forked_from_torch():
        return False
    try:
        # Names are looked up in what libtorch_cpu needs, too, whichever OpenMP library that is.
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        functions = library.GOMP_parallel, library.omp_get_thread_num
    except (OSError, AttributeError):
        return False
    team, number = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    if not team or not number:
        return False
    _native.use_team(team, number)
    return True
