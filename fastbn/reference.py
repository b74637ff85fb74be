"""Reference implementation: NumPy twins of the array functions in float64, with the same signatures; the oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, overload

import numpy as np

from fastbn.affine import batch_norm_affine, narrow
from fastbn.stats import BatchStats

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from fastbn._types import Activation, Array, FloatArray, FloatVector, ScalarT

__all__ = ["batch_norm", "batch_norm_backward", "batch_norm_train", "batch_stats", "fold_conv", "fold_linear"]


def _broadcast(values: ArrayLike, x: Array, axis: int) -> FloatArray:
    """Per-channel values, in a shape that broadcasts against x."""
    return np.asarray(values, dtype=np.float64).reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def _sum(x: FloatArray, axis: int) -> FloatArray:
    total: FloatArray = x.sum(axis=tuple(i for i in range(x.ndim) if i != axis % x.ndim))
    return total


def _invstd(var: FloatArray, eps: float) -> FloatArray:
    """1/sqrt(var + eps), and 0 where there is nothing to divide by."""
    with np.errstate(divide="ignore"):
        return np.where(var + eps == 0, 0.0, 1 / np.sqrt(var + eps))


def _activate(z: FloatArray, activation: Activation | None) -> FloatArray:
    # A comparison with NaN is false, which keeps NaN.
    if activation == "leaky_relu":
        return np.where(z < 0, 0.01 * z, z)
    if activation is not None:
        z = np.where(z < 0, 0.0, z)
    return np.where(z > 6, 6.0, z) if activation == "relu6" else z


def _activation_gradient(dy: FloatArray, z: FloatArray, activation: Activation | None) -> FloatArray:
    """The gradient of `_activate` at z, times dy."""
    if activation == "leaky_relu":
        return np.where(z <= 0, 0.01 * dy, dy)
    if activation is not None:
        dy = np.where(z <= 0, 0.0, dy)
    return np.where(z >= 6, 0.0, dy) if activation == "relu6" else dy


def _normalized(
    x: Array, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float, axis: int, residual: Array | None
) -> tuple[FloatArray, FloatArray]:
    """(xhat, z) in float64: the normalized values, and what the activation sees."""
    xhat = (x.astype(np.float64) - _broadcast(mean, x, axis)) * _broadcast(_invstd(np.asarray(var, np.float64), eps), x, axis)
    z = xhat if weight is None else xhat * _broadcast(weight, x, axis)
    z = z if bias is None else z + _broadcast(bias, x, axis)
    return xhat, z if residual is None else z + residual.astype(np.float64)


def _into(out: NDArray[ScalarT] | None, values: FloatArray, dtype: np.dtype[ScalarT]) -> NDArray[ScalarT]:
    result = narrow(values, dtype)
    if out is None:
        return result
    out[...] = result
    return out


def batch_norm(
    x: NDArray[ScalarT],
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    activation: Activation | None = None,
    residual: Array | None = None,
    out: NDArray[ScalarT] | None = None,
) -> NDArray[ScalarT]:
    """Twin of `fastbn.batch_norm`, without its checks."""
    _, z = _normalized(x, mean, var, weight, bias, eps, axis, residual)
    return _into(out, _activate(z, activation), x.dtype)


def batch_stats(x: Array, *, axis: int = 1) -> BatchStats:
    """Twin of `fastbn.batch_stats`, without its checks: two passes in float64."""
    channels = x.shape[axis]
    count = x.size // channels if channels else 0
    if count == 0:
        return BatchStats(0, np.zeros(channels), np.zeros(channels))
    values = x.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        mean = _sum(values, axis) / count
        # The second pass also corrects the rounding error that the first left in the mean.
        mean = mean + _sum(values - _broadcast(mean, x, axis), axis) / count
        return BatchStats(count, mean, _sum((values - _broadcast(mean, x, axis)) ** 2, axis))


def batch_norm_train(
    x: NDArray[ScalarT],
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    running_mean: FloatVector | None = None,
    running_var: FloatVector | None = None,
    momentum: float = 0.1,
    unbiased: bool = True,
    eps: float = 1e-5,
    axis: int = 1,
    activation: Activation | None = None,
    residual: Array | None = None,
    out: NDArray[ScalarT] | None = None,
) -> tuple[NDArray[ScalarT], BatchStats]:
    """Twin of `fastbn.batch_norm_train`, without its checks."""
    stats = batch_stats(x, axis=axis)
    y = batch_norm(x, stats.mean, stats.var, weight, bias, eps=eps, axis=axis, activation=activation, residual=residual, out=out)
    if stats.count:
        var = stats.m2 / (max(stats.count - 1, 1) if unbiased else stats.count)
        for running, batch in ((running_mean, stats.mean), (running_var, var)):
            if running is not None:
                running[...] = (1 - momentum) * running.astype(np.float64) + momentum * batch
    return y, stats


@overload
def batch_norm_backward(
    dy: Array,
    x: NDArray[ScalarT],
    stats: BatchStats,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    training: bool = True,
    activation: Activation | None = None,
    residual: None = None,
    out: NDArray[ScalarT] | None = None,
) -> tuple[NDArray[ScalarT], Array | None, Array | None]: ...
@overload
def batch_norm_backward(
    dy: Array,
    x: NDArray[ScalarT],
    stats: BatchStats,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    training: bool = True,
    activation: Activation | None = None,
    residual: Array,
    out: NDArray[ScalarT] | None = None,
) -> tuple[NDArray[ScalarT], Array | None, Array | None, NDArray[ScalarT]]: ...
def batch_norm_backward(
    dy: Array,
    x: NDArray[ScalarT],
    stats: BatchStats,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    training: bool = True,
    activation: Activation | None = None,
    residual: Array | None = None,
    out: NDArray[ScalarT] | None = None,
) -> tuple[NDArray[ScalarT], Array | None, Array | None] | tuple[NDArray[ScalarT], Array | None, Array | None, NDArray[ScalarT]]:
    """Twin of `fastbn.batch_norm_backward`, without its checks."""
    xhat, z = _normalized(x, stats.mean, stats.var, weight, bias, eps, axis, residual)
    g = _activation_gradient(dy.astype(np.float64), z, activation)
    dbias, dweight = _sum(g, axis), _sum(g * xhat, axis)
    n = max(x.size // max(x.shape[axis], 1), 1)
    dx = g - (_broadcast(dbias / n, x, axis) + xhat * _broadcast(dweight / n, x, axis) if training else 0)
    dx = dx * _broadcast((1 if weight is None else weight) * _invstd(stats.var, eps), x, axis)
    gradients = (
        _into(out, dx, x.dtype),
        None if weight is None else narrow(dweight, weight.dtype),
        None if bias is None else narrow(dbias, bias.dtype),
    )
    return gradients if residual is None else (*gradients, narrow(g, x.dtype))


def _fold(
    weight: NDArray[ScalarT],
    bias: Array | None,
    mean: Array,
    var: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    channel_axis_scale: Callable[[FloatArray], FloatArray],
) -> tuple[NDArray[ScalarT], NDArray[ScalarT]]:
    scale, shift = batch_norm_affine(gamma, beta, mean, var, eps)
    with np.errstate(over="ignore", invalid="ignore"):
        new_weight = narrow(weight.astype(np.float64) * channel_axis_scale(scale), weight.dtype)
        new_bias = narrow(shift if bias is None else bias.astype(np.float64) * scale + shift, weight.dtype)
    return new_weight, new_bias


def fold_conv(
    weight: NDArray[ScalarT],
    bias: Array | None,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[NDArray[ScalarT], NDArray[ScalarT]]:
    """Twin of `fastbn.fold_conv`, without its checks."""

    def per_output_channel(scale: FloatArray) -> FloatArray:
        if not transposed:
            return scale.reshape(-1, *[1] * (weight.ndim - 1))
        # (C_in, C_out / groups, ...): input channel i belongs to group i // (C_in / groups), which owns that group's outputs.
        per_group = scale.reshape(groups, -1).repeat(weight.shape[0] // groups, axis=0)
        return per_group.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))

    return _fold(weight, bias, mean, var, gamma, beta, eps, per_output_channel)


def fold_linear(
    weight: NDArray[ScalarT],
    bias: Array | None,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    transposed: bool = False,
) -> tuple[NDArray[ScalarT], NDArray[ScalarT]]:
    """Twin of `fastbn.fold_linear`, without its checks."""
    return _fold(weight, bias, mean, var, gamma, beta, eps, lambda scale: scale if transposed else scale[:, None])
