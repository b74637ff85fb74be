"""What the array functions do with arrays that are not plain: convert, copy and compute, or raise. `_arrays.pxi` says which are plain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex

import numpy as np

from fastbn import _check
from fastbn._native import Job, new_like
from fastbn.geometry import arrange, common_layout, copy_together, deliver, parts, values_per_channel
from fastbn.stats import BatchStats

if TYPE_CHECKING:
    from fastbn._types import Activation, Array, Parameter, TensorLike

__all__ = ["backward", "infer", "train"]


def infer(
    x: TensorLike,
    mean: TensorLike,
    var: TensorLike,
    weight: Parameter,
    bias: Parameter,
    eps: SupportsFloat,
    axis: SupportsIndex,
    activation: Activation | None,
    residual: TensorLike | None,
    out: Array | None,
) -> Array:
    """Return y of `batch_norm`."""
    x, dtype, axis, channels, weight, bias, eps, code = _check.common(x, weight, bias, eps, axis, activation)
    mean = _check.parameter(mean, "mean", channels, required=True)
    var = _check.running_variance(var, "var", channels, eps)
    added = None if residual is None else _check.same_shape(residual, "residual", x)
    y = _check.output(out, x, added)
    layout = common_layout(axis, (x, y, added))
    if layout is not None:
        Job(layout, dtype, code, eps).infer(x=x, out=y, residual=added, mean=mean, var=var, weight=weight, bias=bias)
        return y if out is None else out
    parameters = {"mean": _apart(mean, y), "var": _apart(var, y), "weight": _apart(weight, y), "bias": _apart(bias, y)}
    for part in parts(axis, x, y, added):
        layout, (source, target, added_part) = copy_together(axis, *part)
        Job(layout, dtype, code, eps).infer(x=source, out=target, residual=added_part, **parameters)
        deliver(None, part[1], target)
    return y if out is None else out


def _apart(values: Any, y: Array) -> Any:
    """Return parameters, or a copy of those that lie in y: a call in parts writes to y before it has read them for the last time."""
    return values.copy() if values is not None and np.may_share_memory(values, y) else values


def train(
    x: TensorLike,
    weight: Parameter,
    bias: Parameter,
    running_mean: TensorLike | None,
    running_var: TensorLike | None,
    momentum: SupportsFloat,
    unbiased: bool,
    eps: SupportsFloat,
    axis: SupportsIndex,
    activation: Activation | None,
    residual: TensorLike | None,
    out: Array | None,
) -> tuple[Array, BatchStats]:
    """Return y and the statistics of `batch_norm_train`."""
    x, dtype, axis, channels, weight, bias, eps, code = _check.common(x, weight, bias, eps, axis, activation)
    momentum, unbiased = _check.momentum_of(momentum), bool(unbiased)
    added = None if residual is None else _check.same_shape(residual, "residual", x)
    y = _check.output(out, x, added)
    running_mean = _check.running(running_mean, "running_mean", channels, x, y)
    running_var = _check.running(running_var, "running_var", channels, x, y, running_mean)
    stats = BatchStats._new(values_per_channel(x, channels), channels)
    layout, (x, target, added) = arrange(axis, x, y, added)
    job = Job(layout, dtype, code, eps)
    job.set_running(running_mean, running_var, momentum, unbiased)
    job.train(x=x, out=target, residual=added, weight=weight, bias=bias, batch_mean=stats.mean, batch_m2=stats.m2)
    return deliver(out, y, target), stats


def backward(
    dy: TensorLike,
    x: TensorLike,
    stats: BatchStats,
    weight: Parameter,
    bias: Parameter,
    eps: SupportsFloat,
    axis: SupportsIndex,
    training: bool,
    activation: Activation | None,
    residual: TensorLike | None,
    out: Array | None,
) -> tuple[Array, Array | None, Array | None] | tuple[Array, Array | None, Array | None, TensorLike]:
    """Return the gradients of `batch_norm_backward`."""
    x, dtype, axis, channels, weight, bias, eps, code = _check.common(x, weight, bias, eps, axis, activation)
    given_dy, dy, training = dy, _check.same_shape(dy, "dy", x), bool(training)
    stats = _check.batch_stats_of(stats, channels, values_per_channel(x, channels) if training else None)
    added = None if residual is None else _check.same_shape(residual, "residual", x)
    dx = _check.output(out, x, dy, added)
    dweight, dbias = None if weight is None else new_like(weight), None if bias is None else new_like(bias)
    dresidual: TensorLike | None = None
    masked: Array | None = None  # the gradient behind the activation, where there is one
    if added is not None and code:
        dresidual = masked = new_like(x)
    elif added is not None:
        dresidual, added = (dy.copy() if dx is dy or np.may_share_memory(dx, dy) else given_dy), None
    layout, (x, target, dy, added, masked_target) = arrange(axis, x, dx, dy, added, masked)
    Job(layout, dtype, code, eps).backward(
        x=x,
        dx=target,
        dy=dy,
        residual=added,
        dresidual=masked_target,
        dweight=dweight,
        dbias=dbias,
        weight=weight,
        bias=bias,
        batch_mean=stats.mean,
        batch_m2=stats.m2,
        count=stats.count,
        frozen=not training,
    )
    dx = deliver(out, dx, target)
    if dresidual is None:
        return dx, dweight, dbias
    if masked is not None and masked_target is not None:
        dresidual = deliver(None, masked, masked_target)
    return dx, dweight, dbias, dresidual
