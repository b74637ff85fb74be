"""Public array functions: check, allocate, call."""

import numpy as np

from fastbn import _check, _native
from fastbn.affine import View, batch_norm_affine, narrow, scale_weight
from fastbn.errors import ArgumentError, ArgumentTypeError, FoldError, expected
from fastbn.stats import BatchStats

__all__ = ["batch_norm", "batch_norm_backward", "batch_norm_train", "batch_stats", "fold_conv", "fold_linear"]


def batch_norm(x, mean, var, weight=None, bias=None, *, eps=1e-5, axis=1, activation=None, residual=None, out=None):
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
    activation = _check.activation_of(activation)
    if residual is not None:
        residual = _check.same_shape(residual, "residual", x)
    y = _check.output(out, x, residual)
    view, (x, target, residual) = _arrange(axis, x, y, residual)
    _native.infer(x, target, residual, mean, var, weight, bias, view, dtype, activation, eps)
    return _deliver(out, y, target)


def batch_norm_train(
    x,
    weight=None,
    bias=None,
    *,
    running_mean=None,
    running_var=None,
    momentum=0.1,
    unbiased=True,
    eps=1e-5,
    axis=1,
    activation=None,
    residual=None,
    out=None,
):
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
    activation = _check.activation_of(activation)
    momentum = _check.momentum_of(momentum)
    if residual is not None:
        residual = _check.same_shape(residual, "residual", x)
    y = _check.output(out, x, residual)
    running_mean = _check.running(running_mean, "running_mean", channels, x, y)
    running_var = _check.running(running_var, "running_var", channels, x, y, running_mean)
    stats = _new_stats(x, channels)
    view, (x, target, residual) = _arrange(axis, x, y, residual)
    _native.train(
        x, target, residual, running_mean, running_var, weight, bias, stats.mean, stats.m2, view, dtype, activation, eps, momentum, unbiased
    )
    return _deliver(out, y, target), stats


def batch_norm_backward(dy, x, stats, weight=None, bias=None, *, eps=1e-5, axis=1, training=True, activation=None, residual=None, out=None):
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
    activation = _check.activation_of(activation)
    stats = _check.batch_stats_of(stats, channels, _values_per_channel(x, channels) if training else None)
    if residual is not None:
        residual = _check.same_shape(residual, "residual", x)
    dx = _check.output(out, x, dy, residual)
    dweight = None if weight is None else np.empty_like(weight)
    dbias = None if bias is None else np.empty_like(bias)
    with_residual = residual is not None
    dresidual = None
    if with_residual and activation:
        dresidual = np.empty_like(x)
    elif with_residual:
        dresidual, residual = (dy.copy() if dx is dy or np.may_share_memory(dx, dy) else given_dy), None
    masked = dresidual if residual is not None else None
    view, (x, target, dy, residual, masked_target) = _arrange(axis, x, dx, dy, residual, masked)
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
        activation,
        eps,
        not training,
    )
    dx = _deliver(out, dx, target)
    if not with_residual:
        return dx, dweight, dbias
    return dx, dweight, dbias, dresidual if masked is None else _deliver(None, masked, masked_target)


def normalise_with(x, stats, weight=None, bias=None, *, eps=1e-5, axis=1, activation=None, out=None):
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
    view, (x, target) = _arrange(axis, x, y)
    code = _check.activation_of(activation)
    _native.infer(x, target, None, stats.mean, stats.var, weight, bias, view, dtype, code, _check.eps_of(eps))
    return _deliver(out, y, target)


def _checked_half(dy, x, stats, axis):
    """Return (x, dy, dtype, axis, channels), what the halves of the backward pass check alike."""
    x, dtype = _check.tensor(x, "x")
    dy = _check.same_shape(dy, "dy", x)
    axis = _check.axis_of(axis, x)
    _check.batch_stats_of(stats, x.shape[axis], None)
    return x, dy, dtype, axis, x.shape[axis]


def backward_sums(dy, x, stats, weight=None, bias=None, *, eps=1e-5, axis=1, activation=None):
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
    view, (x, dy) = _arrange(axis, x, dy)
    code = _check.activation_of(activation)
    _native.backward_sums(
        x, dy, dweight, dbias, weight, bias, stats.mean, stats.m2, stats.count, sums, view, dtype, code, _check.eps_of(eps)
    )
    return sums, dweight, dbias


def backward_input(dy, x, stats, sums, weight=None, bias=None, *, eps=1e-5, axis=1, activation=None, out=None):
    """Return dx, the second half of `batch_norm_backward`, from the sums of all ``stats.count`` values."""
    x, dy, dtype, axis, channels = _checked_half(dy, x, stats, axis)
    weight = _check.parameter(weight, "weight", channels)
    bias = _check.parameter(bias, "bias", channels)
    dx = _check.output(out, x, dy)
    sums = np.ascontiguousarray(sums, dtype=np.float64)
    if sums.shape != (2, channels):
        raise ArgumentError(expected(f"shape (2, {channels})", f"shape {sums.shape}", "sums"))
    view, (x, target, dy) = _arrange(axis, x, dx, dy)
    code = _check.activation_of(activation)
    _native.backward_input(x, target, dy, weight, bias, stats.mean, stats.m2, stats.count, sums, view, dtype, code, _check.eps_of(eps))
    return _deliver(out, dx, target)


def batch_stats(x, *, axis=1):
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
    stats = _new_stats(x, x.shape[axis])
    view, (x,) = _arrange(axis, x)
    _native.stats(x, stats.mean, stats.m2, view, dtype)
    return stats


def _values_per_channel(x, channels):
    return x.size // channels if channels else 0


def _new_stats(x, channels):
    return BatchStats._new(_values_per_channel(x, channels), channels)


def _arrange(axis, *arrays):
    """Return the view of the kernels and the arrays it is of: those given, or C-contiguous copies where they have no common view."""
    view = _native.dense_view(axis, arrays)
    if view is None:
        x = arrays[0]
        view = _check.layout(x.shape, axis, x.itemsize, *(array.strides for array in arrays if array is not None))
    if view is not None:
        return view, arrays
    return _arrange(axis, *(array if array is None else array.copy(order="C") for array in arrays))


def _deliver(out, result, computed):
    """Return what the caller gave as out, or the result, after moving into it what was computed in a copy."""
    if computed is not result:
        np.copyto(result, computed)
    return result if out is None else out


def fold_conv(weight, bias, mean, var, gamma=None, beta=None, *, eps=1e-5, groups=1, transposed=False):
    """Fold an inference batch normalization into the convolution before it.

    ``BN(conv(x, weight) + bias)`` equals ``conv(x, weight') + bias'`` with
    ``scale = gamma / sqrt(var + eps)``, ``weight' = weight * scale`` on the output channels and
    ``bias' = (bias - mean) * scale + beta`` (Ioffe & Szegedy 2015, algorithm 2). All of it is computed in float64 and rounded once.

    Parameters
    ----------
    weight : array, float32, float64, float16 or bfloat16
        Shape (C_out, C_in / groups, k, ...) with any number of spatial axes; with `transposed`, (C_in, C_out / groups, k, ...).
    bias : array of shape (C_out,) or None
        None means zeros.
    mean, var : array of shape (C_out,)
        The frozen statistics; var is the variance.
    gamma, beta : array of shape (C_out,) or None
        The weight and bias of the batch normalization; None means ones and zeros.
    eps : float
        Added to var.
    groups : int
        Groups of the convolution; depthwise is groups == C_in.
    transposed : bool
        The weight belongs to a transposed convolution.

    Returns
    -------
    (weight, bias)
        New arrays of weight's dtype; weight keeps its shape, bias has shape (C_out,).

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A shape, dtype or value that cannot be used.
    FoldError
        A result is Inf or NaN, or a weight that is not zero became zero.

    Examples
    --------
    >>> import numpy as np
    >>> weight, bias = fold_conv(np.ones((2, 1, 1, 1)), None, mean=np.array([1.0, 2.0]), var=np.array([3.0, 0.0]), eps=1.0)
    >>> weight.ravel().tolist(), bias.tolist()
    ([0.5, 1.0], [-0.5, -2.0])
    """
    weight = _check.fold_weight(weight, "weight", 3)
    groups = _check.positive_int(groups, "groups")
    if weight.shape[0] % groups:
        raise ArgumentError(expected(f"a first axis that {groups} groups divide", f"shape {weight.shape}", "weight"))
    inner = int(np.prod(weight.shape[2:]))
    if transposed:
        view = View(groups, weight.shape[0] // groups, weight.shape[1], inner)
    else:
        view = View(1, 1, weight.shape[0], weight.shape[1] * inner)
    return _fold(weight, bias, mean, var, gamma, beta, eps, view)


def fold_linear(weight, bias, mean, var, gamma=None, beta=None, *, eps=1e-5, transposed=False):
    """Fold an inference batch normalization into the linear layer before it.

    The formula and the parameters are those of `fold_conv`; the layer is ``x @ weight.T + bias``.

    Parameters
    ----------
    weight : array, float32, float64, float16 or bfloat16
        Shape (out_features, in_features), as PyTorch and a Gemm with transB hold it; with `transposed`, (in_features, out_features), as
        Keras and MatMul hold it.
    bias, mean, var, gamma, beta : array of shape (out_features,) or None as in `fold_conv`
    eps : float
        Added to var.
    transposed : bool
        The weight is stored as (in_features, out_features).

    Returns
    -------
    (weight, bias)
        New arrays of weight's dtype.

    Raises
    ------
    ArgumentError, ArgumentTypeError, FoldError
        As `fold_conv`.

    Examples
    --------
    >>> import numpy as np
    >>> weight, bias = fold_linear(np.ones((1, 2)), np.array([3.0]), mean=np.array([1.0]), var=np.array([4.0]), eps=0.0)
    >>> weight.tolist(), bias.tolist()
    ([[0.5, 0.5]], [1.0])
    """
    weight = _check.fold_weight(weight, "weight", 2)
    if weight.ndim != 2:
        raise ArgumentError(expected("2 axes", f"shape {weight.shape}", "weight"))
    view = View(1, weight.shape[0], weight.shape[1], 1) if transposed else View(1, 1, *weight.shape)
    return _fold(weight, bias, mean, var, gamma, beta, eps, view)


def _fold(weight, bias, mean, var, gamma, beta, eps, view):
    channels = view.groups * view.channels
    eps = _check.eps_of(eps)
    bias = _check.vector(bias, "bias", channels)
    gamma = _check.vector(gamma, "gamma", channels)
    beta = _check.vector(beta, "beta", channels)
    mean = _check.vector(mean, "mean", channels)
    if mean is None:
        raise ArgumentTypeError(expected("an array", "None", "mean"))
    var = _check.variance(var, "var", channels, eps)
    scale, shift = batch_norm_affine(gamma, beta, mean, var, eps)
    new_weight, nonfinite, flushed = scale_weight(weight, scale, view)
    if nonfinite:
        raise FoldError(expected(f"finite folded weights in {weight.dtype}", f"{nonfinite} that are Inf or NaN", "weight"))
    if flushed:
        raise FoldError(expected(f"folded weights that {weight.dtype} can hold", f"{flushed} flushed to zero", "weight"))
    with np.errstate(over="ignore", invalid="ignore"):
        new_bias = narrow(shift if bias is None else bias.astype(np.float64) * scale + shift, weight.dtype)
    if not np.isfinite(new_bias).all():
        raise FoldError(expected(f"a finite folded bias in {weight.dtype}", f"{new_bias[~np.isfinite(new_bias)][0]}", "bias"))
    return new_weight, new_bias
