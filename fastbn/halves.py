"""The two halves of `batch_norm_backward`, between which processes add up their sums."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsFloat, SupportsIndex

import numpy as np

from fastbn import _check, _native
from fastbn.errors import ArgumentError, expected
from fastbn.geometry import arrange, deliver

if TYPE_CHECKING:
    from fastbn._types import Activation, Array, FloatArray, FloatVector, Parameter, TensorLike
    from fastbn.stats import BatchStats

__all__ = ["backward_input", "backward_sums"]


def _checked_half(dy: TensorLike, x: TensorLike, stats: BatchStats, axis: SupportsIndex) -> tuple[Array, Array, int, int, int]:
    """Return (x, dy, dtype, axis, channels), what the halves of the backward pass check alike."""
    x, dtype = _check.tensor(x, "x")
    dy = _check.same_shape(dy, "dy", x)
    axis = _check.axis_of(axis, x)
    _check.batch_stats_of(stats, x.shape[axis], None)
    return x, dy, dtype, axis, x.shape[axis]


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
    x, dy, dtype, axis, channels = _checked_half(dy, x, stats, axis)
    weight = _check.parameter(weight, "weight", channels)
    bias = _check.parameter(bias, "bias", channels)
    dweight = None if weight is None else np.empty_like(weight)
    dbias = None if bias is None else np.empty_like(bias)
    sums = np.empty((2, channels))
    view, (source, gradient) = arrange(axis, x, dy)
    code = _check.activation_of(activation)
    _native.backward_sums(
        source, gradient, dweight, dbias, weight, bias, stats.mean, stats.m2, stats.count, sums, view, dtype, code, _check.eps_of(eps)
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
    x, dy, dtype, axis, channels = _checked_half(dy, x, stats, axis)
    weight = _check.parameter(weight, "weight", channels)
    bias = _check.parameter(bias, "bias", channels)
    dx = _check.output(out, x, dy)
    sums = np.ascontiguousarray(sums, dtype=np.float64)
    if sums.shape != (2, channels):
        raise ArgumentError(expected(f"shape (2, {channels})", f"shape {sums.shape}", "sums"))
    view, (x, target, dy) = arrange(axis, x, dx, dy)
    code = _check.activation_of(activation)
    _native.backward_input(x, target, dy, weight, bias, stats.mean, stats.m2, stats.count, sums, view, dtype, code, _check.eps_of(eps))
    return deliver(out, dx, target)
