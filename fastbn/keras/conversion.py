"""Models with our layer in place of Keras's, and back."""

from __future__ import annotations

from typing import Any, TypeAlias

import keras

from fastbn.errors import ArgumentError, ArgumentTypeError, expected
from fastbn.keras.layer import BatchNormalization

__all__ = ["convert"]

# Any: what JSON holds, as Keras gives it out.
_Config: TypeAlias = dict[str, Any]


def convert(model: keras.Model, *, back: bool = False) -> keras.Model:
    """Return a copy of a model with `BatchNormalization` in place of every keras.layers.BatchNormalization, weights kept.

    Parameters
    ----------
    model : keras.Model
        Functional or Sequential, with nested models and wrappers such as TimeDistributed. It is left as it is.
    back : bool
        True puts Keras's layers in place of ours: for machines without fastbn, and for exports that cannot call Python.

    Returns
    -------
    keras.Model
        With new layers of the same names and its own weights; not compiled.

    Raises
    ------
    TypeError
        `model` is no Keras model.
    ValueError
        Keras cannot copy the model (one written as a class of its own), or a layer makes its BatchNormalization itself, so that no
        configuration names it.

    Examples
    --------
    >>> import keras
    >>> model = convert(keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn"), keras.layers.Dense(1)]))
    >>> type(model.layers[0]).__module__, type(convert(model, back=True).layers[0]) is keras.layers.BatchNormalization
    ('fastbn.keras.layer', True)
    """
    if not isinstance(model, keras.Model):
        raise ArgumentTypeError(expected("a keras.Model", type(model).__name__, "model"))
    old, new = keras.layers.BatchNormalization, BatchNormalization
    if back:
        old, new = new, old
    headers = _header(old), _header(new)

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = _replaced(layer.get_config(), *headers)
        return (new if type(layer) is old else type(layer)).from_config(config)

    copy = keras.models.clone_model(model, clone_function=clone)
    hidden = [layer.name for layer in copy._flatten_layers() if type(layer) is old]
    if hidden:
        raise ArgumentError(f"Cannot convert the model: {hidden[0]!r} is in no configuration, another layer makes it itself")
    copy.set_weights(model.get_weights())
    return copy


def _header(layer_class: type[keras.layers.Layer]) -> _Config:
    """Return what a serialized layer says about its class."""
    serialized = keras.saving.serialize_keras_object(layer_class(name="any"))
    return {key: serialized[key] for key in ("module", "class_name", "registered_name")}


def _replaced(config: Any, old: _Config, new: _Config) -> Any:
    """Return a configuration in which every serialized layer with the header `old` has the header `new`."""
    if isinstance(config, (list, tuple)):
        return type(config)(_replaced(item, old, new) for item in config)
    if not isinstance(config, dict):
        return config
    config = {key: _replaced(value, old, new) for key, value in config.items()}
    return {**config, **new} if old.items() <= config.items() else config
