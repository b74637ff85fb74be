"""The TensorFlow backend: numpy_function with a gradient of its own, eager and in a tf.function (XLA cannot call back)."""

from functools import partial

import tensorflow as tf

from fastbn.keras import callbacks

__all__ = ["infer", "train"]


def _call(function, results, *arrays):
    """Call a function of NumPy arrays that gives several; each result is a tensor of the dtype and shape of its entry in results."""
    found = tf.numpy_function(function, arrays, [like.dtype for like in results], stateful=False)
    for value, like in zip(found, results, strict=True):
        value.set_shape(like.shape)
    return found


def _parameters(weight, bias, mean):
    return tf.ones_like(mean) if weight is None else weight, tf.zeros_like(mean) if bias is None else bias


def infer(x, mean, var, weight, bias, eps, axis):
    """Return y."""

    @tf.custom_gradient
    def apply(x, weight, bias):
        forward = partial(callbacks.infer, eps=eps, axis=axis)
        y = tf.numpy_function(forward, [x, mean, var, weight, bias], x.dtype, stateful=False)
        y.set_shape(x.shape)
        backward = partial(callbacks.infer_backward, eps=eps, axis=axis)
        return y, lambda dy: _call(backward, [x, weight, bias], dy, x, mean, var, weight, bias)

    return apply(x, *_parameters(weight, bias, mean))


def train(x, running_mean, running_var, weight, bias, mask, momentum, eps, axis):
    """Return (y, running_mean, running_var); only y has a gradient."""
    masks = [] if mask is None else [mask]

    @tf.custom_gradient
    def apply(x, weight, bias):
        saved = tf.TensorSpec([callbacks.saved_size(x.shape[axis])], tf.float64)
        forward = partial(callbacks.train, momentum=momentum, eps=eps, axis=axis)
        *results, saved = _call(forward, [x, running_mean, running_var, saved], x, running_mean, running_var, weight, bias, *masks)
        backward = partial(callbacks.train_backward, eps=eps, axis=axis)
        return results, lambda dy, *_: _call(backward, [x, weight, bias], dy, x, weight, bias, saved, *masks)

    y, *running = apply(x, *_parameters(weight, bias, running_mean))
    return y, *map(tf.stop_gradient, running)
