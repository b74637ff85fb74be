"""The two halves of `batch_norm_backward`, between which processes add up their sums."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsFloat, SupportsIndex

import numpy as np

from fastbn import _check
from fastbn._native import Job, new_like
from fastbn.errors import ArgumentError, expected
from fastbn.geometry import arrange, deliver

if TYPE_CHECKING:
    from fastbn._types import Activation, Array, FloatArray, FloatVector, Parameter, TensorLike
    from fastbn.stats import BatchStats

__all__ = ["backward_input", "backward_sums"]


def backward_sums(
    dy: TensorLike,
    x: TensorLike,
    stats: BatchStats,
    weight: Parameter = None,
    bias: Parameter = None,
    *,
    eps: SupportsFloat = 1e-5,
    axis: SupportsIndex = 1,
    activation: Activation | None = None,
) -> tuple[FloatArray, FloatVector | None, FloatVector | None]:
    """Return (sums, dweight, dbias), the first half of `batch_norm_backward` for statistics of more than this batch.

    sums, float64 of shape (2, C), are ``sum(g)`` and ``sum(g * (x - mean))`` of this batch, which processes add up between the halves;
    dweight and dbias are of this batch too. The arguments are those of `batch_norm_backward`.
    """
    x, dtype, axis, channels, weight, bias, eps, code = _check.common(x, weight, bias, eps, axis, activation)
    dy = _check.same_shape(dy, "dy", x)
    stats = _check.batch_stats_of(stats, channels, None)
    dweight = None if weight is None else new_like(weight)
    dbias = None if bias is None else new_like(bias)
    sums = np.empty((2, channels))
    layout, (source, gradient) = arrange(axis, x, dy)
    Job(layout, dtype, code, eps).backward_sums(
        x=source,
        dy=gradient,
        dweight=dweight,
        dbias=dbias,
        weight=weight,
        bias=bias,
        batch_mean=stats.mean,
        batch_m2=stats.m2,
        count=stats.count,
        sums=sums,
    )
    return sums, dweight, dbias


def backward_input(
    dy: TensorLike,
    x: TensorLike,
    stats: BatchStats,
    sums: FloatArray,
    weight: Parameter = None,
    bias: Parameter = None,
    *,
    eps: SupportsFloat = 1e-5,
    axis: SupportsIndex = 1,
    activation: Activation | None = None,
    out: Array | None = None,
) -> Array:
    """Return dx, the second half of `batch_norm_backward`, from the sums of all ``stats.count`` values."""
    x, dtype, axis, channels, weight, bias, eps, code = _check.common(x, weight, bias, eps, axis, activation)
    dy = _check.same_shape(dy, "dy", x)
    stats = _check.batch_stats_of(stats, channels, None)
    dx = _check.output(out, x, dy)
    sums = np.require(sums, np.float64, ["C", "A"])
    if sums.shape != (2, channels):
        raise ArgumentError(expected(f"shape (2, {channels})", f"shape {sums.shape}", "sums"))
    layout, (x, target, dy) = arrange(axis, x, dx, dy)
    Job(layout, dtype, code, eps).backward_input(
        x=x, dx=target, dy=dy, weight=weight, bias=bias, batch_mean=stats.mean, batch_m2=stats.m2, count=stats.count, sums=sums
    )
    return deliver(out, dx, target)
