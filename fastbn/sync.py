"""Statistics of a batch that several processes share: one exchange per forward and one per backward, float64, in the order of the ranks.

An exchange is a function that takes this process's array and returns the arrays of all processes in rank order, the same list in each:
mpi4py's ``comm.allgather``, or what `fastbn.torch` makes of a process group. So every process computes the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from fastbn.errors import ArgumentError
from fastbn.stats import BatchStats, merge_stats

if TYPE_CHECKING:
    import numpy.typing as npt

    from fastbn._types import Array, Exchange, FloatArray, FloatVector

__all__ = ["add_up", "merge", "update_running"]


def merge(stats: BatchStats, exchange: Exchange) -> BatchStats:
    """Return the statistics of the batches of all processes together; a process may have no values."""
    rows = exchange(np.concatenate([[stats.count], stats.mean, stats.m2]))
    return merge_stats(BatchStats(int(row[0]), *np.split(row[1:], 2)) for row in _of_one_shape(rows))


def add_up(sums: FloatArray, exchange: Exchange) -> FloatArray:
    """Return the sums of the backward pass over all processes."""
    total: FloatArray = np.add.reduce(_of_one_shape(exchange(sums)), axis=0)
    return total


def update_running(
    running_mean: FloatVector | None, running_var: FloatVector | None, stats: BatchStats, momentum: float, unbiased: bool = True
) -> None:
    """Update running statistics, in place, as `fastbn.batch_norm_train` does with those of one process; either may be None."""
    if stats.count == 0:
        return
    var = stats.m2 / max(stats.count - 1, 1) if unbiased else stats.var
    for running, batch in ((running_mean, stats.mean), (running_var, var)):
        if running is not None:
            running[...] = (1 - momentum) * running.astype(np.float64) + momentum * batch


def _of_one_shape(rows: Iterable[npt.ArrayLike]) -> list[Array]:
    arrays = [np.asarray(row) for row in rows]
    for array in arrays:
        if array.shape != arrays[0].shape:
            got = f"{arrays[0].shape} and {array.shape}"
            raise ArgumentError(f"Cannot merge the statistics of several processes: their numbers of channels differ (arrays of {got})")
    return arrays
