"""Public array functions: check, allocate, call.

What holds for all of them: float16 and bfloat16 are computed in float32 and rounded once. Results are the same bits for any number of
threads and on every instruction set (any NaN counts as the same), for one shape and one set of strides. The strides decide in which order
sums are added: a slice and its contiguous copy may differ by rounding. Channels first, channels last and every slice of them are read in
place; only where neither the channels nor the innermost axis have stride 1, more than two other axes cannot be joined, or the arrays of the
call lie in different orders, those that are not C-contiguous are copied: in parts for `batch_norm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsFloat, SupportsIndex, overload

from fastbn import _check, any_arrays
from fastbn._native import Job, backward_arrays, infer_arrays, train_arrays
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
    """Normalize with given statistics: the inference form.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`` per channel (Ioffe & Szegedy 2015, algorithm 2).

    Parameters
    ----------
    x : array of float32, float64, float16 or bfloat16
        Any shape and strides, with C channels along `axis`. Any object with a CPU DLPack, buffer or array interface.
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
    residual, out : array of x's shape and dtype, or None
        Added before the activation; receives y: it may be x or residual itself, with the same result, but may not overlap them otherwise.

    Returns
    -------
    y : array of x's shape and dtype
        `out` where it was given, else a new array in the memory order of x; without elements where x has none.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        An argument that cannot be used; nothing has been written.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
    >>> batch_norm(x, mean=np.array([1.0, 2.0]), var=np.array([4.0, 4.0]), eps=0.0).tolist()
    [[0.0, 0.0], [1.0, 2.0]]
    """
    y = infer_arrays(x, mean, var, weight, bias, eps, axis, activation, residual, out)
    return any_arrays.infer(x, mean, var, weight, bias, eps, axis, activation, residual, out) if y is None else y


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
    """Normalize with the statistics of the batch: the training form.

    ``mean = sum(x)/n``, ``var = sum((x - mean)**2)/n`` over the n values of a channel; then ``batch_norm(x, mean, var, weight, bias)``
    (Ioffe & Szegedy 2015, algorithm 1). A constant channel gives exactly bias, also with eps=0.

    Parameters
    ----------
    x, weight, bias, eps, axis, activation, residual, out
        As in `batch_norm`, which says what is raised, too.
    running_mean, running_var : array of shape (C,), float32 or float64, or None
        Updated in place: ``running = (1 - momentum) * running + momentum * batch``. An x without elements leaves them alone.
    momentum : float
        The weight of this batch, 0 to 1: PyTorch's meaning. Keras and ONNX call 1 - momentum by that name.
    unbiased : bool
        running_var receives ``var * n / (n - 1)``, or var where n = 1, as in PyTorch; False gives it var, as Keras and ONNX do.

    Returns
    -------
    y : array of x's shape and dtype
    stats : BatchStats
        n, mean and ``m2 = n * var`` in float64, for `batch_norm_backward` and `merge_stats`; zeros where x has no elements.

    Examples
    --------
    >>> import numpy as np
    >>> y, stats = batch_norm_train(np.array([[1.0, 5.0], [3.0, 5.0]]), bias=np.array([0.0, 7.0]), eps=0.0)
    >>> y.tolist(), stats.mean.tolist(), stats.var.tolist()
    ([[-1.0, 7.0], [1.0, 7.0]], [2.0, 5.0], [1.0, 0.0])
    """
    plain = train_arrays(x, weight, bias, running_mean, running_var, momentum, unbiased, eps, axis, activation, residual, out)
    if plain is None:
        return any_arrays.train(x, weight, bias, running_mean, running_var, momentum, unbiased, eps, axis, activation, residual, out)
    y, count, mean, m2 = plain
    return y, BatchStats._of(count, mean, m2)


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

    With ``xhat = (x - mean) / sqrt(var + eps)`` and g, dy times the gradient of the activation (computed again from x; at the corners 0 for
    relu and relu6, 0.01 for leaky_relu): ``dbias = sum(g)``, ``dweight = sum(g * xhat)`` and
    ``dx = weight / sqrt(var + eps) * (g - dbias/n - xhat * dweight/n)`` (Ioffe & Szegedy 2015, section 3), or, with frozen statistics,
    ``dx = weight / sqrt(var + eps) * g``.

    Parameters
    ----------
    dy, x : arrays of one shape and dtype
        The gradient of y, and the input of the forward pass.
    stats : BatchStats
        Those that `batch_norm_train` returned. With training=False, for example ``BatchStats(1, running_mean, running_var)``.
    weight, bias, eps, axis, activation, residual
        Those of the forward pass. `batch_norm` says what is raised.
    training : bool
        False when the forward pass used given statistics, which then have no gradient.
    out : array of x's shape and dtype, or None
        Receives dx; it may be dy, x or residual itself.

    Returns
    -------
    dx : array of x's shape and dtype
    dweight, dbias : arrays of shape (C,) and the dtype of weight and bias
        None where weight or bias is None: what is not wanted is not computed. Zeros where x has no elements.
    dresidual : array of x's shape and dtype
        Only with a residual. Without an activation it equals dy, and is dy itself unless out is.

    Examples
    --------
    >>> import numpy as np
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [0.0]])
    >>> y, stats = batch_norm_train(x, eps=0.0)
    >>> [gradient.tolist() for gradient in batch_norm_backward(dy, x, stats, np.ones(1), np.zeros(1), eps=0.0)]
    [[[0.0], [0.0]], [-1.0], [1.0]]
    """
    if residual is None and type(stats) is BatchStats:
        plain = backward_arrays(dy, x, stats.mean, stats.m2, stats.count, weight, bias, eps, axis, training, activation, out)
        if plain is not None:
            return plain
    return any_arrays.backward(dy, x, stats, weight, bias, eps, axis, training, activation, residual, out)


def normalize_with(
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
    x, dtype, axis, channels, weight, bias, eps, code = _check.common(x, weight, bias, eps, axis, activation)
    stats = _check.batch_stats_of(stats, channels, None)
    y = _check.output(out, x)
    layout, (x, target) = arrange(axis, x, y)
    Job(layout, dtype, code, eps).infer(x=x, out=target, residual=None, mean=stats.mean, var=stats.var, weight=weight, bias=bias)
    return deliver(out, y, target)


def batch_stats(x: TensorLike, *, axis: SupportsIndex = 1) -> BatchStats:
    """Return the statistics of a batch, without normalizing it.

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
    layout, (source,) = arrange(axis, x)
    Job(layout, dtype).stats(x=source, batch_mean=stats.mean, batch_m2=stats.m2)
    return stats
