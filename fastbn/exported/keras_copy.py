"""Copies of Keras models, in which layers are Identity and variables have other values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from fastbn.errors import ArgumentError, first_line

if TYPE_CHECKING:
    from fastbn._types import Array

__all__ = ["copied", "is_functional"]

# Attributes that hold a function: a layer made of a configuration has one of the same name, which may be another function.
FUNCTIONS = ("activation", "recurrent_activation")


def is_functional(layer: keras.layers.Layer) -> bool:
    """Say whether a layer is a model of layers, whose graph is known."""
    return isinstance(layer, (keras.Sequential, keras.src.models.functional.Functional))


def copied(model: keras.Model, gone: set[keras.layers.Layer], values: dict[tuple[keras.layers.Layer, str], Array]) -> keras.Model:
    """Return a copy of a model in which layers are Identity and variables have new values; biases that are not there are made."""
    made: dict[keras.layers.Layer, keras.layers.Layer] = {}
    identities: set[keras.layers.Layer] = set()

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        if layer not in made:
            if is_functional(layer):
                made[layer] = cloned(layer)
            elif layer in gone:
                made[layer] = keras.layers.Identity(name=layer.name, dtype=layer.get_config()["dtype"])
                identities.add(made[layer])
            else:
                made[layer] = _layer_like(layer, (layer, "bias") in values)
        return made[layer]

    def call(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:  # Any: the arguments and the result of a layer
        return layer(args[0]) if layer in identities else layer(*args, **kwargs)  # without the mask that the layer took

    def cloned(whole: keras.Model) -> keras.Model:
        options = {} if isinstance(whole, keras.Sequential) else {"call_function": call}
        return keras.models.clone_model(whole, clone_function=clone, **options)

    copy = cloned(model)
    for old, new in made.items():
        if not is_functional(old) and old not in gone and isinstance(old, keras.layers.Layer):
            _give(new, old, {attribute: array for (layer, attribute), array in values.items() if layer is old})
    return copy


def _layer_like(layer: keras.layers.Layer, needs_bias: bool) -> keras.layers.Layer:
    """Return a new layer of the configuration of another one."""
    try:
        if type(layer) is keras.layers.Lambda:  # its function is not to be read from bytes
            options = {"output_shape": layer._output_shape, "mask": layer.mask, "arguments": layer.arguments}
            return keras.layers.Lambda(layer.function, name=layer.name, dtype=layer.dtype_policy, **options)
        config = layer.get_config()
        new = type(layer).from_config({**config, "use_bias": True} if needs_bias and "use_bias" in config else config)
    except Exception as error:  # whatever a class of the user raises
        raise ArgumentError(f"Cannot copy the layer '{layer.name}' of class {type(layer).__name__}: {first_line(error)}") from error
    _give_functions(new, layer)
    return new


def _give_functions(new: keras.layers.Layer, old: keras.layers.Layer) -> None:
    """Give a layer the functions of another one, and so the layers in it: what an LSTM shows as its functions are those of its cell."""
    for name in FUNCTIONS:
        if name in vars(old) and not isinstance(vars(old)[name], keras.layers.Layer):
            setattr(new, name, vars(old)[name])
    if not isinstance(old, keras.layers.Layer):  # an operation has none
        return
    for new_part, old_part in zip(new._layers, old._layers, strict=False):  # what only a build makes is not there yet
        if type(new_part) is type(old_part):
            _give_functions(new_part, old_part)


def _give(new: keras.layers.Layer, old: keras.layers.Layer, changed: dict[str, Array]) -> None:
    """Give a layer the variables of another one, or other values; a bias that is not among them is zero."""
    if not changed:
        new.set_weights(old.get_weights())
        return
    values = {variable.name: variable for variable in old.weights}
    for variable in new.weights:
        value = changed.get(variable.name, values.get(variable.name))
        variable.assign(keras.ops.zeros_like(variable) if value is None else value)
