"""A Keras 3 layer that is keras.layers.BatchNormalization with our kernels inside."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import keras
from keras import ops

from fastbn import _check
from fastbn.dtypes import DTYPES
from fastbn.errors import ArgumentError, expected

__all__ = ["BatchNormalization"]

# Any: a tensor of the backend, torch.Tensor, jax.Array or tf.Tensor.
_Tensor: TypeAlias = Any


class _Backend(Protocol):
    """What the module of each backend has."""

    def infer(
        self, x: _Tensor, mean: _Tensor, var: _Tensor, weight: _Tensor | None, bias: _Tensor | None, eps: float, axis: int, /
    ) -> _Tensor:
        """Return y."""
        ...

    def train(
        self,
        x: _Tensor,
        running_mean: _Tensor,
        running_var: _Tensor,
        weight: _Tensor | None,
        bias: _Tensor | None,
        mask: _Tensor | None,
        momentum: float,
        eps: float,
        axis: int,
        /,
    ) -> tuple[_Tensor, _Tensor, _Tensor]:
        """Return (y, running_mean, running_var); only y has a gradient."""
        ...


def _load_backend(name: str) -> _Backend:
    if name == "torch":
        from fastbn.keras import torch

        return torch
    if name == "jax":
        from fastbn.keras import jax

        return jax
    if name == "tensorflow":
        from fastbn.keras import tensorflow

        return tensorflow
    raise ImportError(expected("torch, jax or tensorflow", repr(name), "KERAS_BACKEND"))


kernels = _load_backend(keras.backend.backend())


@keras.saving.register_keras_serializable(package="fastbn")
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization as keras.layers.BatchNormalization does it, on fastbn's kernels.

    Arguments, defaults, weights, their order, masks, dtype policies and saving are those of Keras's layer, so that either loads the
    weights of the other.

    In training, over all axes but `axis`, ``y = (x - mean(x)) / sqrt(var(x) + epsilon) * gamma + beta`` (Ioffe & Szegedy 2015, algorithm
    1), and ``moving = moving * momentum + batch * (1 - momentum)`` with the *biased* variance: momentum is the weight of the old value,
    where PyTorch and `fastbn.batch_norm_train` call 1 - momentum so. In inference, and with ``trainable = False``, the moving statistics
    take the place of the batch's.

    Parameters
    ----------
    axis, momentum, epsilon, center, scale, synchronized, renorm, ... :
        Those of keras.layers.BatchNormalization. ``synchronized=True`` and ``renorm=True`` train on Keras's own path.

    Raises
    ------
    ValueError
        What Keras's layer raises it for: an axis that the input does not have, another number of channels, a mask of another rank.

    Examples
    --------
    >>> import keras, numpy as np
    >>> layer = BatchNormalization(momentum=0.9, epsilon=0.0)
    >>> y = layer(np.array([[1.0, 4.0], [3.0, 8.0]], "float32"), training=True)
    >>> keras.ops.convert_to_numpy(y).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    >>> np.round(keras.ops.convert_to_numpy(layer.moving_mean), 4).tolist() == np.round(np.float32([0.2, 0.6]), 4).tolist()
    True
    """

    # Any: the arguments of Keras's layer, passed on as they are.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check.momentum_of(self.momentum)
        _check.eps_of(self.epsilon, "epsilon")
        # XLA calls no Python from TensorFlow; without this, compile() would choose it.
        self.supports_jit = keras.backend.backend() != "tensorflow"

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the weights; Keras calls it with the first shape it sees."""
        if len(input_shape) < 2:
            raise ArgumentError(expected("an input with at least 2 axes", f"shape {tuple(input_shape)}", "inputs"))
        if not -len(input_shape) <= self.axis < len(input_shape):
            raise ArgumentError(expected(f"an axis of an input with {len(input_shape)} axes", f"{self.axis}", "axis"))
        super().build(input_shape)

    def call(self, inputs: _Tensor, training: bool | None = None, mask: _Tensor | None = None) -> _Tensor:
        """Normalize inputs.

        Parameters
        ----------
        inputs : tensor of rank 2 or more
            float32, float64, float16 or bfloat16, as the dtype policy makes it; integers become float32, as Keras makes them. The result
            has the compute dtype of the layer. Half precision is computed in float32 and rounded once.
        training : bool
            True takes the statistics of the batch and updates the moving ones.
        mask : boolean tensor of the shape of inputs without its last axis, or None
            Training statistics are those of the rows where it holds (of the channels' axis being the last; otherwise Keras's own path
            runs). Where it holds nowhere, as for a batch without elements, the moving statistics stay as they are.
        """
        training = training and self.trainable
        rank = len(inputs.shape)
        if mask is not None and len(mask.shape) != rank - 1:
            raise ArgumentError(expected(f"{rank - 1} axes, one less than inputs", f"shape {tuple(mask.shape)}", "mask"))
        masked_elements = mask is not None and self.axis not in (-1, rank - 1)
        if training and (self.renorm or self.synchronized or masked_elements):
            return super().call(inputs, training=training, mask=mask)
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        param_dtype = keras.backend.result_type(dtype, "float32")
        if dtype not in DTYPES:
            inputs = ops.cast(inputs, param_dtype)
        variables = self.moving_mean, self.moving_variance, self.gamma, self.beta
        mean, variance, gamma, beta = (None if variable is None else ops.cast(variable, param_dtype) for variable in variables)
        if training:
            if mask is not None:
                mask = ops.broadcast_to(ops.cast(mask, "bool"), ops.shape(inputs)[:-1])
            momentum = 1 - self.momentum
            outputs, mean, variance = kernels.train(inputs, mean, variance, gamma, beta, mask, momentum, self.epsilon, self.axis)
            self.moving_mean.assign(mean)
            self.moving_variance.assign(variance)
        else:
            outputs = kernels.infer(inputs, mean, variance, gamma, beta, self.epsilon, self.axis)
        return ops.cast(outputs, self.compute_dtype)
