"""What the JAX and TensorFlow backends call back: NumPy in, NumPy out, everything that the backward pass needs in one float64 vector."""

import numpy as np

from fastbn.affine import narrow
from fastbn.functional import batch_norm, batch_norm_backward, batch_norm_train, normalise_with
from fastbn.stats import BatchStats

__all__ = ["infer", "infer_backward", "saved_size", "train", "train_backward"]


def saved_size(channels):
    """Return how many float64 values `train` hands to `train_backward`: the count, mean and m2."""
    return 1 + 2 * channels


def _saved(stats):
    return np.concatenate([[stats.count], stats.mean, stats.m2])


def _restored(saved):
    mean, m2 = np.split(saved[1:], 2)
    return BatchStats(int(saved[0]), mean, m2)


def _frozen(stats: BatchStats) -> BatchStats:
    """The statistics of some rows as given ones for all."""
    return BatchStats(1, stats.mean, stats.var)


def _with_root(var: np.ndarray, eps: float) -> np.ndarray:
    """Return var, and NaN where var + eps is not positive: Keras gives NaN for such a channel, where the array functions raise."""
    return np.where(var.astype(np.float64) + eps > 0, var, np.array(np.nan, var.dtype))


def infer(x, mean, var, weight, bias, *, eps, axis):
    """Return y of the shape and dtype of x."""
    return batch_norm(x, mean, _with_root(var, eps), weight, bias, eps=eps, axis=axis)


def infer_backward(dy, x, mean, var, weight, bias, *, eps, axis):
    """Return (dx, dweight, dbias), None for what has no parameter."""
    return batch_norm_backward(dy, x, BatchStats(1, mean, _with_root(var, eps)), weight, bias, eps=eps, axis=axis, training=False)


def train(x, running_mean, running_var, weight, bias, mask=None, *, momentum, eps, axis):
    """Return (y, running_mean, running_var, saved): the statistics in new arrays, momentum being the weight of the batch.

    `mask`, or None, has the shape of x without its last axis, which is the channels' then; the statistics are of the rows where it holds.
    """
    running_mean, running_var = running_mean.copy(), running_var.copy()
    update = {"running_mean": running_mean, "running_var": running_var, "momentum": momentum, "unbiased": False, "eps": eps}
    if mask is None:
        y, stats = batch_norm_train(x, weight, bias, axis=axis, **update)
        return y, running_mean, running_var, _saved(stats)
    values = _single(x)
    _, stats = batch_norm_train(values[mask], **update)
    y = normalise_with(values, _frozen(stats), weight, bias, eps=eps, axis=-1)
    return narrow(y, x.dtype), running_mean, running_var, _saved(stats)


def train_backward(dy, x, weight, bias, saved, mask=None, *, eps, axis):
    """Return (dx, dweight, dbias), None for what has no parameter.

    With a mask, every value has its part in the gradients of the n rows that made mean and var, and only those rows receive it:
    ``dx = weight / sqrt(var + eps) * (dy - mask * (sum(dy) + xhat * sum(dy * xhat)) / n)``.
    """
    stats = _restored(saved)
    if mask is None:
        return batch_norm_backward(dy, x, stats, weight, bias, eps=eps, axis=axis)
    values = _single(x)
    scale = np.ones(stats.mean.size) if weight is None else weight.astype(np.float64)
    frozen = _frozen(stats)
    dx, dweight, dbias = batch_norm_backward(_single(dy), values, frozen, scale, np.zeros_like(scale), eps=eps, axis=-1, training=False)
    if stats.count:
        deviation = np.sqrt(stats.var + eps)
        share = np.divide(scale, deviation * stats.count, out=np.zeros_like(scale), where=deviation != 0)
        dx[mask] -= normalise_with(values[mask], frozen, dweight * share, dbias * share, eps=eps, axis=-1)
    gradients = (None if like is None else gradient.astype(like.dtype) for gradient, like in ((dweight, weight), (dbias, bias)))
    return narrow(dx, x.dtype), *gradients


def _single(x):
    """Half precision as float32, so that what is computed in two steps is rounded once."""
    return x.astype(np.float32) if x.itemsize == 2 else x
