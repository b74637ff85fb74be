"""Public array functions: check, allocate, call."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsFloat, SupportsIndex, overload

import numpy as np

from fastbn import _check, _native
from fastbn.geometry import arrange, deliver, values_per_channel
from fastbn.stats import BatchStats

if TYPE_CHECKING:
    from typing import Unpack

    from numpy.typing import NDArray

    from fastbn._types import (
        Activation,
        Array,
        BackwardOptions,
        BiasT,
        ForwardOptions,
        Parameter,
        ScalarT,
        TensorLike,
        TrainOptions,
        WeightT,
    )

__all__ = ["batch_norm", "batch_norm_backward", "batch_norm_train", "batch_stats"]


@overload
def batch_norm(
    x: NDArray[ScalarT],
    mean: TensorLike,
    var: TensorLike,
    weight: Parameter = ...,
    bias: Parameter = ...,
    **options: Unpack[ForwardOptions],
) -> NDArray[ScalarT]: ...
@overload
def batch_norm(
    x: TensorLike, mean: TensorLike, var: TensorLike, weight: Parameter = ..., bias: Parameter = ..., **options: Unpack[ForwardOptions]
) -> Array: ...
def batch_norm(
    x: TensorLike,
    mean: TensorLike,
    var: TensorLike,
    weight: Parameter = None,
    bias: Parameter = None,
    *,
    eps: SupportsFloat = 1e-5,
    axis: SupportsIndex = 1,
    activation: Activation | None = None,
    residual: TensorLike | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise with given statistics: the inference form.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`` per channel (Ioffe & Szegedy 2015, algorithm 2).

    Parameters
    ----------
    x : array of float32, float64, float16 or bfloat16
        Shape (N, C), (N, C, S), (N, C, H, W), (N, C, D, H, W) or any other; the channels are those of `axis`. Any object with a CPU
        DLPack, buffer or array interface, in any strides. Channels first, channels last and every slice of them are read in place;
        only where neither the channels nor the innermost axis have stride 1, or the arrays of the call lie in different orders, the call
        works on C-contiguous copies.
    mean, var : array of shape (C,), float32 or float64
        var is the variance; var + eps must be positive.
    weight, bias : array of shape (C,), float32 or float64, or None
        gamma and beta; None means ones and zeros.
    eps : float
        Added to var; finite, not negative.
    axis : int
        The channel axis; -1 for channels last.
    activation : None, "relu", "leaky_relu" or "relu6"
        Applied last; the leak is 0.01. NaN stays NaN.
    residual : array of x's shape and dtype, or None
        Added before the activation.
    out : array of x's shape and dtype, or None
        Receives y; it may be x or residual itself (in place), with the same result, but may not overlap them otherwise.

    Returns
    -------
    y : array of x's shape and dtype
        `out` where it was given, else a new array in the memory order of x.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        An argument that cannot be used; nothing has been written.

    Notes
    -----
    float16 and bfloat16 are computed in float32 and rounded once. The result is the same bits for any number of threads and on every
    instruction set (any NaN counts as the same), for one shape and one set of strides. A constant channel gives exactly bias when mean is
    its value. An x without elements gives a y without elements.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
    >>> batch_norm(x, mean=np.array([1.0, 2.0]), var=np.array([4.0, 4.0]), eps=0.0).tolist()
    [[0.0, 0.0], [1.0, 2.0]]
    """
    x, dtype = _check.tensor(x, "x")
    axis = _check.axis_of(axis, x)
    eps = _check.eps_of(eps)
    channels = x.shape[axis]
    mean = _check.parameter(mean, "mean", channels, required=True)
    var = _check.running_variance(var, "var", channels, eps)
    weight = _check.parameter(weight, "weight", channels)
    bias = _check.parameter(bias, "bias", channels)
    code = _check.activation_of(activation)
    if residual is not None:
        residual = _check.same_shape(residual, "residual", x)
    y = _check.output(out, x, residual)
    view, (x, target, residual) = arrange(axis, x, y, residual)
    _native.infer(x, target, residual, mean, var, weight, bias, view, dtype, code, eps)
    return deliver(out, y, target)


@overload
def batch_norm_train(
    x: NDArray[ScalarT], weight: Parameter = ..., bias: Parameter = ..., **options: Unpack[TrainOptions]
) -> tuple[NDArray[ScalarT], BatchStats]: ...
@overload
def batch_norm_train(
    x: TensorLike, weight: Parameter = ..., bias: Parameter = ..., **options: Unpack[TrainOptions]
) -> tuple[Array, BatchStats]: ...
def batch_norm_train(
    x: TensorLike,
    weight: Parameter = None,
    bias: Parameter = None,
    *,
    running_mean: TensorLike | None = None,
    running_var: TensorLike | None = None,
    momentum: SupportsFloat = 0.1,
    unbiased: bool = True,
    eps: SupportsFloat = 1e-5,
    axis: SupportsIndex = 1,
    activation: Activation | None = None,
    residual: TensorLike | None = None,
    out: Array | None = None,
) -> tuple[Array, BatchStats]:
    """Normalise with the statistics of the batch: the training form.

    ``mean = sum(x)/n``, ``var = sum((x - mean)**2)/n`` over all axes but the channels', n values per channel, then
    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`` (Ioffe & Szegedy 2015, algorithm 1).

    Parameters
    ----------
    x, weight, bias, eps, axis, activation, residual, out
        As in `batch_norm`.
    running_mean, running_var : array of shape (C,), float32 or float64, or None
        Updated in place: ``running = (1 - momentum) * running + momentum * batch``. An x without elements leaves them alone.
    momentum : float
        The weight of this batch, 0 to 1: PyTorch's meaning. Keras and ONNX call 1 - momentum by that name.
    unbiased : bool
        running_var receives ``var * n / (n - 1)``, as in PyTorch; False gives it the biased variance, as Keras and ONNX do. With one value
        per channel there is nothing to correct and it receives the biased variance, 0.

    Returns
    -------
    y : array of x's shape and dtype
        `out` where it was given.
    stats : BatchStats
        n, mean and ``m2 = n * var`` in float64, for `batch_norm_backward` and `merge_stats`; zeros where x has no elements.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        An argument that cannot be used; nothing has been written.

    Notes
    -----
    In float32, for mean/std from 0 to 1e7, the error of y stays below ``2e-6 * (1 + |y|)`` with unit weight and no bias, and that of var
    below 1e-6 of var. A constant channel gives exactly bias, also with eps=0. NaN and Inf make NaN of their own channel only.
    Bits and in-place use are as in `batch_norm`. The strides decide in which order sums are added: a slice and its contiguous copy may
    differ by rounding.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 5.0], [3.0, 5.0]])
    >>> y, stats = batch_norm_train(x, bias=np.array([0.0, 7.0]), eps=0.0)
    >>> y.tolist(), stats.mean.tolist(), stats.var.tolist()
    ([[-1.0, 7.0], [1.0, 7.0]], [2.0, 5.0], [1.0, 0.0])
    """
    x, dtype = _check.tensor(x, "x")
    axis = _check.axis_of(axis, x)
    eps = _check.eps_of(eps)
    channels = x.shape[axis]
    weight = _check.parameter(weight, "weight", channels)
    bias = _check.parameter(bias, "bias", channels)
    code = _check.activation_of(activation)
    momentum = _check.momentum_of(momentum)
    if residual is not None:
        residual = _check.same_shape(residual, "residual", x)
    y = _check.output(out, x, residual)
    running_mean = _check.running(running_mean, "running_mean", channels, x, y)
    running_var = _check.running(running_var, "running_var", channels, x, y, running_mean)
    stats = BatchStats._new(values_per_channel(x, channels), channels)
    view, (x, target, residual) = arrange(axis, x, y, residual)
    _native.train(
        x, target, residual, running_mean, running_var, weight, bias, stats.mean, stats.m2, view, dtype, code, eps, momentum, unbiased
    )
    return deliver(out, y, target), stats


@overload
def batch_norm_backward(
    dy: TensorLike,
    x: NDArray[ScalarT],
    stats: BatchStats,
    weight: NDArray[WeightT],
    bias: NDArray[BiasT],
    *,
    residual: None = ...,
    **options: Unpack[BackwardOptions],
) -> tuple[NDArray[ScalarT], NDArray[WeightT], NDArray[BiasT]]: ...
@overload
def batch_norm_backward(
    dy: Array,
    x: NDArray[ScalarT],
    stats: BatchStats,
    weight: NDArray[WeightT],
    bias: NDArray[BiasT],
    *,
    residual: TensorLike,
    **options: Unpack[BackwardOptions],
) -> tuple[NDArray[ScalarT], NDArray[WeightT], NDArray[BiasT], NDArray[ScalarT]]: ...
@overload
def batch_norm_backward(
    dy: TensorLike,
    x: NDArray[ScalarT],
    stats: BatchStats,
    weight: Parameter = ...,
    bias: Parameter = ...,
    *,
    residual: None = ...,
    **options: Unpack[BackwardOptions],
) -> tuple[NDArray[ScalarT], Array | None, Array | None]: ...
@overload
def batch_norm_backward(
    dy: Array,
    x: NDArray[ScalarT],
    stats: BatchStats,
    weight: Parameter = ...,
    bias: Parameter = ...,
    *,
    residual: TensorLike,
    **options: Unpack[BackwardOptions],
) -> tuple[NDArray[ScalarT], Array | None, Array | None, NDArray[ScalarT]]: ...
@overload
def batch_norm_backward(
    dy: TensorLike,
    x: TensorLike,
    stats: BatchStats,
    weight: Parameter = ...,
    bias: Parameter = ...,
    *,
    residual: None = ...,
    **options: Unpack[BackwardOptions],
) -> tuple[Array, Array | None, Array | None]: ...
@overload
def batch_norm_backward(
    dy: TensorLike,
    x: TensorLike,
    stats: BatchStats,
    weight: Parameter = ...,
    bias: Parameter = ...,
    *,
    residual: TensorLike,
    **options: Unpack[BackwardOptions],
) -> tuple[Array, Array | None, Array | None, TensorLike]: ...
def batch_norm_backward(
    dy: TensorLike,
    x: TensorLike,
    stats: BatchStats,
    weight: Parameter = None,
    bias: Parameter = None,
    *,
    eps: SupportsFloat = 1e-5,
    axis: SupportsIndex = 1,
    training: bool = True,
    activation: Activation | None = None,
    residual: TensorLike | None = None,
    out: Array | None = None,
) -> tuple[Array, Array | None, Array | None] | tuple[Array, Array | None, Array | None, TensorLike]:
    """Gradients of `batch_norm_train`, or of `batch_norm` with frozen statistics.

    With ``g = dy`` where the activation passed its input (recomputed from x, no mask is stored), ``xhat = (x - mean) / sqrt(var + eps)``:
    ``dbias = sum(g)``, ``dweight = sum(g * xhat)`` and, in training,
    ``dx = weight / sqrt(var + eps) * (g - dbias/n - xhat * dweight/n)`` (Ioffe & Szegedy 2015, section 3); with frozen statistics
    ``dx = weight / sqrt(var + eps) * g``.

    Parameters
    ----------
    dy, x : arrays of one shape and dtype
        The gradient of y, and the input of the forward pass, in the types and strides that `batch_norm` takes.
    stats : BatchStats
        Those that `batch_norm_train` returned. With training=False, for example ``BatchStats(1, running_mean, running_var)``.
    weight, bias, eps, axis, activation, residual
        Those of the forward pass.
    training : bool
        False when the forward pass used given statistics, which then have no gradient.
    out : array of x's shape and dtype, or None
        Receives dx; it may be dy, x or residual itself.

    Returns
    -------
    dx : array of x's shape and dtype
    dweight, dbias : arrays of shape (C,) and the dtype of weight and bias
        None where weight or bias is None: what is not wanted is not computed.
    dresidual : array of x's shape and dtype
        Only with a residual. Without an activation it equals dy, and is dy itself unless out is.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        An argument that cannot be used; nothing has been written.

    Notes
    -----
    Bits are as in `batch_norm`. At the corners the gradient of relu and relu6 is 0 and that of leaky_relu is 0.01. An x without elements
    gives zeros for dweight and dbias.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0], [3.0]])
    >>> y, stats = batch_norm_train(x, eps=0.0)
    >>> dx, dweight, dbias = batch_norm_backward(np.array([[1.0], [0.0]]), x, stats, np.ones(1), np.zeros(1), eps=0.0)
    >>> dx.tolist(), dweight.tolist(), dbias.tolist()
    ([[0.0], [0.0]], [-1.0], [1.0])
    """
    x, dtype = _check.tensor(x, "x")
    given_dy, dy = dy, _check.same_shape(dy, "dy", x)
    axis = _check.axis_of(axis, x)
    eps = _check.eps_of(eps)
    channels = x.shape[axis]
    weight = _check.parameter(weight, "weight", channels)
    bias = _check.parameter(bias, "bias", channels)
    code = _check.activation_of(activation)
    stats = _check.batch_stats_of(stats, channels, values_per_channel(x, channels) if training else None)
    if residual is not None:
        residual = _check.same_shape(residual, "residual", x)
    dx = _check.output(out, x, dy, residual)
    dweight = None if weight is None else np.empty_like(weight)
    dbias = None if bias is None else np.empty_like(bias)
    dresidual: TensorLike | None = None
    masked: Array | None = None
    if residual is not None and code:
        dresidual = masked = np.empty_like(x)
    elif residual is not None:
        dresidual, residual = (dy.copy() if dx is dy or np.may_share_memory(dx, dy) else given_dy), None
    view, (x, target, dy, residual, masked_target) = arrange(axis, x, dx, dy, residual, masked)
    _native.backward(
        x,
        target,
        dy,
        residual,
        masked_target,
        dweight,
        dbias,
        weight,
        bias,
        stats.mean,
        stats.m2,
        stats.count,
        view,
        dtype,
        code,
        eps,
        not training,
    )
    dx = deliver(out, dx, target)
    if dresidual is None:
        return dx, dweight, dbias
    if masked is not None and masked_target is not None:
        dresidual = deliver(None, masked, masked_target)
    return dx, dweight, dbias, dresidual


def normalise_with(
    x: TensorLike,
    stats: BatchStats,
    weight: Parameter = None,
    bias: Parameter = None,
    *,
    eps: SupportsFloat = 1e-5,
    axis: SupportsIndex = 1,
    activation: Activation | None = None,
    out: Array | None = None,
) -> Array:
    """Return what `batch_norm_train` returns as y, with statistics of more than this batch: those that several processes merged.

    The arguments are those of `batch_norm_train`; eps=0 with a variance of 0 gives bias, as there.
    """
    x, dtype = _check.tensor(x, "x")
    axis = _check.axis_of(axis, x)
    channels = x.shape[axis]
    stats = _check.batch_stats_of(stats, channels, None)
    weight = _check.parameter(weight, "weight", channels)
    bias = _check.parameter(bias, "bias", channels)
    y = _check.output(out, x)
    view, (x, target) = arrange(axis, x, y)
    code = _check.activation_of(activation)
    _native.infer(x, target, None, stats.mean, stats.var, weight, bias, view, dtype, code, _check.eps_of(eps))
    return deliver(out, y, target)


def batch_stats(x: TensorLike, *, axis: SupportsIndex = 1) -> BatchStats:
    """Return the statistics of a batch, without normalising it.

    ``mean = sum(x)/n`` and ``m2 = sum((x - mean)**2)`` over all axes but the channels', in float64 (Chan, Golub & LeVeque 1979).

    Parameters
    ----------
    x, axis
        As in `batch_norm`.

    Returns
    -------
    BatchStats
        n values per channel, mean and m2 of shape (C,) in float64; zeros where x has no elements.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        An argument that cannot be used.

    Examples
    --------
    >>> import numpy as np
    >>> stats = batch_stats(np.array([[1.0, 2.0], [3.0, 6.0]], np.float32))
    >>> stats.count, stats.mean.tolist(), stats.var.tolist()
    (2, [2.0, 4.0], [1.0, 4.0])
    """
    x, dtype = _check.tensor(x, "x")
    axis = _check.axis_of(axis, x)
    channels = x.shape[axis]
    stats = BatchStats._new(values_per_channel(x, channels), channels)
    view, (source,) = arrange(axis, x)
    _native.stats(source, stats.mean, stats.m2, view, dtype)
    return stats
