"""A batch normalization layer as data, read from the modules of PyTorch and Keras and written as one of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastbn.errors import ArgumentError, ArgumentTypeError, expected

if TYPE_CHECKING:
    import keras
    import torch

    from fastbn._types import Activation, FloatVector

__all__ = ["LayerData", "from_keras", "from_torch", "to_keras", "to_torch"]


@dataclass(frozen=True)
class LayerData:
    """Settings, parameters and statistics, under the names of `fastbn.BatchNorm`."""

    num_features: int
    eps: float
    momentum: float | None
    axis: int
    activation: Activation | None
    unbiased: bool
    training: bool
    weight: FloatVector | None
    bias: FloatVector | None
    running_mean: FloatVector | None
    running_var: FloatVector | None
    num_batches_tracked: int


def from_torch(module: torch.nn.Module) -> LayerData:
    """Read a batch normalization of PyTorch; see `fastbn.BatchNorm.from_torch`."""
    names = ("num_features", "eps", "momentum", "affine", "track_running_stats", "weight", "bias", "num_batches_tracked")
    if not all(hasattr(module, name) for name in names):
        raise ArgumentTypeError(expected("a batch normalization of PyTorch", type(module).__name__, "module"))

    def copied(name: str) -> FloatVector | None:
        tensor = getattr(module, name)
        values: FloatVector | None = None if tensor is None else tensor.detach().cpu().float().numpy().copy()
        return values

    return LayerData(
        num_features=module.num_features,
        eps=module.eps,
        momentum=module.momentum,
        axis=1,
        activation=None,
        unbiased=True,
        training=module.training,
        weight=copied("weight"),
        bias=copied("bias"),
        running_mean=copied("running_mean"),
        running_var=copied("running_var"),
        num_batches_tracked=int(module.num_batches_tracked or 0),
    )


def to_torch(layer: LayerData, dimensions: int) -> torch.nn.modules.batchnorm._BatchNorm:
    """Write a module of PyTorch; see `fastbn.BatchNorm.to_torch`."""
    _check_convertible(layer, dimensions, (1, 2, 3))
    if layer.axis != 1:
        raise ArgumentError(expected("axis 1, that of PyTorch", f"{layer.axis}", "axis"))
    import torch

    module_class = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)[dimensions - 1]
    tracked = layer.running_mean is not None and layer.running_var is not None
    module = module_class(layer.num_features, layer.eps, layer.momentum, layer.weight is not None, tracked)
    for name, values in (("weight", layer.weight), ("bias", layer.bias)):
        module.register_parameter(name, None if values is None else torch.nn.Parameter(torch.from_numpy(values.copy())))
    if tracked:
        module.running_mean.copy_(torch.from_numpy(layer.running_mean))
        module.running_var.copy_(torch.from_numpy(layer.running_var))
        module.num_batches_tracked.fill_(layer.num_batches_tracked)
    return module.train(layer.training)


def from_keras(layer: keras.layers.BatchNormalization) -> LayerData:
    """Read a batch normalization of Keras; see `fastbn.BatchNorm.from_keras`."""
    names = ("axis", "momentum", "epsilon", "center", "scale", "built", "get_weights")
    if not all(hasattr(layer, name) for name in names):
        raise ArgumentTypeError(expected("a BatchNormalization of Keras", type(layer).__name__, "layer"))
    if not layer.built:
        raise ArgumentError("Cannot convert the layer: it has not been built")
    if not isinstance(layer.axis, int):
        raise ArgumentError(expected("one axis", f"{layer.axis}", "axis"))
    # In this order: gamma and beta where there are any, moving mean, moving variance.
    values = [np.array(array, np.float32) for array in layer.get_weights()]
    return LayerData(
        num_features=values[0].size,
        eps=layer.epsilon,
        momentum=1 - layer.momentum,
        axis=layer.axis,
        activation=None,
        unbiased=False,
        training=True,
        weight=values[0] if layer.scale else None,
        bias=values[int(layer.scale)] if layer.center else None,
        running_mean=values[-2],
        running_var=values[-1],
        num_batches_tracked=0,
    )


def to_keras(layer: LayerData, dimensions: int) -> keras.layers.BatchNormalization:
    """Write a built layer of Keras; see `fastbn.BatchNorm.to_keras`."""
    _check_convertible(layer, dimensions, (0, 1, 2, 3))
    if layer.momentum is None or layer.running_mean is None or layer.running_var is None:
        what = "momentum None" if layer.momentum is None else "no running statistics"
        raise ArgumentError(expected("running statistics with a momentum, as Keras has", what, "momentum"))
    import keras

    new = keras.layers.BatchNormalization(
        axis=layer.axis, momentum=1 - layer.momentum, epsilon=layer.eps, center=layer.bias is not None, scale=layer.weight is not None
    )
    shape: list[int | None] = [None] * (2 + dimensions)
    shape[layer.axis] = layer.num_features
    new.build(tuple(shape))
    weights = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    new.set_weights([values for values in weights if values is not None])
    return new


def _check_convertible(layer: LayerData, dimensions: int, possible: Collection[int]) -> None:
    if dimensions not in possible:
        raise ArgumentError(expected(f"one of {', '.join(map(str, possible))}", f"{dimensions!r}", "dimensions"))
    if layer.activation is not None:
        raise ArgumentError(expected("no activation, which the framework keeps in a layer of its own", layer.activation, "activation"))
