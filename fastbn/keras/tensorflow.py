"""The TensorFlow backend: numpy_function with a gradient of its own, eager and in a tf.function (XLA cannot call back)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tensorflow as tf

from fastbn.keras import callbacks

__all__ = ["infer", "train"]


# Any: `tf.numpy_function` calls each function with the arrays of its own arguments.
def _call(function: Callable[..., Any], like: list[tf.Tensor | tf.TensorSpec], *arrays: tf.Tensor) -> list[tf.Tensor]:
    """Call a function of NumPy arrays; each result is a tensor of the dtype and shape of its entry in `like`."""
    results: list[tf.Tensor] = tf.numpy_function(function, arrays, [each.dtype for each in like], stateful=False)
    for result, each in zip(results, like, strict=True):
        result.set_shape(each.shape)
    return results


def _parameters(weight: tf.Tensor | None, bias: tf.Tensor | None, mean: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.ones_like(mean) if weight is None else weight, tf.zeros_like(mean) if bias is None else bias


def infer(
    x: tf.Tensor, mean: tf.Tensor, var: tf.Tensor, weight: tf.Tensor | None, bias: tf.Tensor | None, eps: float, axis: int
) -> tf.Tensor:
    """Return y."""

    @tf.custom_gradient
    def apply(x: tf.Tensor, weight: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], list[tf.Tensor]]]:
        forward = partial(callbacks.infer, eps=eps, axis=axis)
        y = tf.numpy_function(forward, [x, mean, var, weight, bias], x.dtype, stateful=False)
        y.set_shape(x.shape)
        backward = partial(callbacks.infer_backward, eps=eps, axis=axis)
        return y, lambda dy: _call(backward, [x, weight, bias], dy, x, mean, var, weight, bias)

    return apply(x, *_parameters(weight, bias, mean))


def train(
    x: tf.Tensor,
    running_mean: tf.Tensor,
    running_var: tf.Tensor,
    weight: tf.Tensor | None,
    bias: tf.Tensor | None,
    mask: tf.Tensor | None,
    momentum: float,
    eps: float,
    axis: int,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return (y, running_mean, running_var); only y has a gradient."""
    masks = [] if mask is None else [mask]

    @tf.custom_gradient
    def apply(x: tf.Tensor, weight: tf.Tensor, bias: tf.Tensor) -> tuple[list[tf.Tensor], Callable[..., list[tf.Tensor]]]:
        saved = tf.TensorSpec([callbacks.saved_size(x.shape[axis])], tf.float64)
        forward = partial(callbacks.train, momentum=momentum, eps=eps, axis=axis)
        *results, saved = _call(forward, [x, running_mean, running_var, saved], x, running_mean, running_var, weight, bias, *masks)
        backward = partial(callbacks.train_backward, eps=eps, axis=axis)
        return results, lambda dy, *_: _call(backward, [x, weight, bias], dy, x, weight, bias, saved, *masks)

    y, mean, var = apply(x, *_parameters(weight, bias, running_mean))
    return y, tf.stop_gradient(mean), tf.stop_gradient(var)
