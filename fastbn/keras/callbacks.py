"""What the JAX and TensorFlow backends call back: NumPy in, NumPy out, everything that the backward pass needs in one float64 vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fastbn.affine import narrow
from fastbn.functional import batch_norm, batch_norm_backward, batch_norm_train, normalize_with
from fastbn.stats import BatchStats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastbn._types import Array, FloatArray, FloatVector, TrainOptions

    Mask: TypeAlias = NDArray[np.bool_]
    Gradients: TypeAlias = tuple[Array, Array | None, Array | None]

__all__ = ["infer", "infer_backward", "saved_size", "train", "train_backward"]


def saved_size(channels: int) -> int:
    """Return how many float64 values `train` hands to `train_backward`: the count, mean and m2."""
    return 1 + 2 * channels


def _saved(stats: BatchStats) -> FloatArray:
    return np.concatenate([[stats.count], stats.mean, stats.m2])


def _restored(saved: FloatArray) -> BatchStats:
    mean, m2 = np.split(saved[1:], 2)
    return BatchStats(int(saved[0]), mean, m2)


def _frozen(stats: BatchStats) -> BatchStats:
    """The statistics of some rows as given ones for all."""
    return BatchStats(1, stats.mean, stats.var)


def _var_with_root(var: FloatVector, eps: float) -> FloatVector:
    """Return var, and NaN where var + eps is not positive: Keras gives NaN for such a channel, where the array functions raise."""
    return np.where(var.astype(np.float64) + eps > 0, var, np.array(np.nan, var.dtype))


def infer(
    x: Array, mean: FloatVector, var: FloatVector, weight: FloatVector | None, bias: FloatVector | None, *, eps: float, axis: int
) -> Array:
    """Return y of the shape and dtype of x."""
    return batch_norm(x, mean, _var_with_root(var, eps), weight, bias, eps=eps, axis=axis)


def infer_backward(
    dy: Array,
    x: Array,
    mean: FloatVector,
    var: FloatVector,
    weight: FloatVector | None,
    bias: FloatVector | None,
    *,
    eps: float,
    axis: int,
) -> Gradients:
    """Return (dx, dweight, dbias), None for what has no parameter."""
    stats = BatchStats(1, mean, _var_with_root(var, eps))
    return batch_norm_backward(dy, x, stats, weight, bias, eps=eps, axis=axis, training=False)


def train(
    x: Array,
    running_mean: FloatVector,
    running_var: FloatVector,
    weight: FloatVector | None,
    bias: FloatVector | None,
    mask: Mask | None = None,
    *,
    momentum: float,
    eps: float,
    axis: int,
) -> tuple[Array, FloatVector, FloatVector, FloatArray]:
    """Return (y, running_mean, running_var, saved): the statistics in new arrays, momentum being the weight of the batch.

    `mask`, or None, has the shape of x without its last axis, which is the channels' then; the statistics are of the rows where it holds.
    """
    running_mean, running_var = running_mean.copy(), running_var.copy()
    options: TrainOptions = {
        "running_mean": running_mean,
        "running_var": running_var,
        "momentum": momentum,
        "unbiased": False,
        "eps": eps,
    }
    if mask is None:
        options["axis"] = axis
        y, stats = batch_norm_train(x, weight, bias, **options)
        return y, running_mean, running_var, _saved(stats)
    values = _single_precision(x)
    _, stats = batch_norm_train(values[mask], **options)
    y = normalize_with(values, _frozen(stats), weight, bias, eps=eps, axis=-1)
    return narrow(y, x.dtype), running_mean, running_var, _saved(stats)


def train_backward(
    dy: Array,
    x: Array,
    weight: FloatVector | None,
    bias: FloatVector | None,
    saved: FloatArray,
    mask: Mask | None = None,
    *,
    eps: float,
    axis: int,
) -> Gradients:
    """Return (dx, dweight, dbias), None for what has no parameter.

    With a mask, every value has its part in the gradients of the n rows that made mean and var, and only those rows receive it:
    ``dx = weight / sqrt(var + eps) * (dy - mask * (sum(dy) + xhat * sum(dy * xhat)) / n)``.
    """
    stats = _restored(saved)
    if mask is None:
        return batch_norm_backward(dy, x, stats, weight, bias, eps=eps, axis=axis)
    values = _single_precision(x)
    scale = np.ones(stats.mean.size) if weight is None else weight.astype(np.float64)
    frozen, zeros = _frozen(stats), np.zeros_like(scale)
    dx, dweight, dbias = batch_norm_backward(_single_precision(dy), values, frozen, scale, zeros, eps=eps, axis=-1, training=False)
    if stats.count:
        deviation = np.sqrt(stats.var + eps)
        share = np.divide(scale, deviation * stats.count, out=np.zeros_like(scale), where=deviation != 0)
        dx[mask] -= normalize_with(values[mask], frozen, dweight * share, dbias * share, eps=eps, axis=-1)
    gradients = [None if like is None else gradient.astype(like.dtype) for gradient, like in ((dweight, weight), (dbias, bias))]
    return narrow(dx, x.dtype), gradients[0], gradients[1]


def _single_precision(x: Array) -> Array:
    """Half precision as float32, so that what is computed in two steps is rounded once."""
    return x.astype(np.float32) if x.itemsize == 2 else x
